"""What a bot puts in its prompt: the end of the conversation and what it remembers, within a budget. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kotonoha_store.records import Message
from kotonoha_store.search_records import SearchHit, SearchResult
from kotonoha_store.tokens import count_tokens

MESSAGES_SHARE: Final = 0.5
"""Of the budget, what the conversation may take before the hits; what they leave is its as well."""

TOKENS_A_MESSAGE: Final = 4
"""What chat APIs put around each message (OpenAI's cookbook, "How to count tokens with tiktoken")."""

_TOKENS_A_NAME: Final = 1


@dataclass(frozen=True, slots=True)
class Citation:
    """A source of the hits, numbered as :meth:`Recall.context` cites it: ``[1]``.

    Attributes:
        title: on one line, as it stands there.
        url: of the source's first hit; the others of a conversation link to their own messages.
    """

    number: int
    source_id: int
    title: str
    url: str | None


@dataclass(frozen=True, slots=True)
class Recall:
    """What belongs in the prompt for one question.

    Attributes:
        messages: the last ones of the session, oldest first.
        hits: what was found elsewhere, best first; nothing that is among the messages, and nothing twice.
        citations: their sources, in the order of the first hit of each.
        tokens: of the messages and of :meth:`context` together (cl100k_base), at most what was allowed.
        result: the search behind the hits, before anything was left out.
    """

    messages: tuple[Message, ...]
    hits: tuple[SearchHit, ...]
    citations: tuple[Citation, ...]
    tokens: int
    result: SearchResult

    def context(self) -> str:
        """The hits as text, each with the number, title and link of its source."""
        return _context(self.hits)


def assemble(
    messages: Sequence[Message], first_index: int, session_key: str, result: SearchResult, *, max_tokens: int
) -> Recall:
    """Choose what fits: messages from the last one backwards, then hits from the best one on.

    Args:
        messages: the session's last, oldest first.
        first_index: the absolute index of the first of them.
    """
    costs = _costs(messages, max_tokens)
    # What is being answered comes before all that is remembered.
    kept = _that_fit(costs, int(max_tokens * MESSAGES_SHARE)) or _that_fit(costs[:1], max_tokens)
    while True:
        start = len(messages) - kept
        used = sum(costs[:kept])
        elsewhere = _Shown(messages[start:], first_index + start, session_key).others(result.hits)
        hits = _hits_that_fit(elsewhere, max_tokens - used)
        used += count_tokens(_context(hits))
        more = _that_fit(costs[kept:], max_tokens - used)
        if not more:
            break
        # These may say what a hit says: choose again.
        kept += more
    return Recall(
        messages=tuple(messages[len(messages) - kept :]),
        hits=tuple(hits),
        citations=tuple(_citations(hits)),
        tokens=used,
        result=result,
    )


class _Shown:
    """The messages that are in the prompt anyway."""

    def __init__(self, messages: Sequence[Message], first_index: int, session_key: str) -> None:
        self._session_key = session_key
        self._messages = {first_index + place: message for place, message in enumerate(messages)}
        # As chunking writes it.
        lines = (f"{_name(message)}: {message.content}" for message in messages if message.content.strip())
        self._text = "\n".join(lines)

    def others(self, hits: Sequence[SearchHit]) -> list[SearchHit]:
        """The hits that say anything else."""
        return [hit for hit in hits if not self._has(hit)]

    def _has(self, hit: SearchHit) -> bool:
        # By the text: at the same place other messages may stand by now, and the same ones at another place.
        if hit.location.get("session_key") != self._session_key:
            return False
        return hit.content in self._text or self._has_parts(hit)

    def _has_parts(self, hit: SearchHit) -> bool:
        """Whether its lines are in the messages it is of: parts of one repeat the name, and long names are cut."""
        first, last = (hit.location.get(f"{end}_message_index") for end in ("first", "last"))
        if not isinstance(first, int) or not isinstance(last, int) or not {first, last} <= self._messages.keys():
            return False
        messages = [self._messages[index] for index in range(first, last + 1)]
        return all(
            any(_without_name(line, _name(message)) in message.content for message in messages)
            for line in hit.content.split("\n")
        )


def _name(message: Message) -> str:
    return _on_one_line(message.author or "") or _on_one_line(message.role)


def _without_name(line: str, name: str) -> str:
    head, cut, rest = line.partition("…: ")
    return rest if cut and name.startswith(head) else line.removeprefix(f"{name}: ")


def _costs(messages: Sequence[Message], budget: int) -> list[int]:
    """The tokens of each, from the last one backwards, as far as they can matter."""
    costs: list[int] = []
    for message in reversed(messages):
        costs.append(_tokens_of(message))
        budget -= costs[-1]
        if budget < 0:
            break
    return costs


def _tokens_of(message: Message) -> int:
    name = count_tokens(message.author) + _TOKENS_A_NAME if message.author else 0
    return TOKENS_A_MESSAGE + name + count_tokens(message.content)


def _that_fit(costs: Sequence[int], budget: int) -> int:
    kept = 0
    for cost in costs:
        if cost > budget:
            break
        budget -= cost
        kept += 1
    return kept


def _hits_that_fit(hits: Sequence[SearchHit], budget: int) -> list[SearchHit]:
    """From the best one on, each text once; what is too long makes room for the next."""
    chosen: list[SearchHit] = []
    seen: set[str] = set()
    numbers: dict[int, int] = {}
    left = budget
    for hit in hits:
        number = numbers.get(hit.source_id, len(numbers) + 1)
        cost = 0 if hit.content in seen else count_tokens(_cited(hit, number) + "\n\n")
        if 0 < cost <= left:
            left -= cost
            seen.add(hit.content)
            numbers[hit.source_id] = number
            chosen.append(hit)
    # Counted in one piece, a text may have a token more than in several.
    while count_tokens(_context(chosen)) > budget:
        chosen.pop()
    return chosen


def _context(hits: Sequence[SearchHit]) -> str:
    numbers = _numbers(hits)
    return "\n\n".join(_cited(hit, numbers[hit.source_id]) for hit in hits)


def _numbers(hits: Sequence[SearchHit]) -> dict[int, int]:
    sources = dict.fromkeys(hit.source_id for hit in hits)
    return {source_id: number for number, source_id in enumerate(sources, 1)}


def _cited(hit: SearchHit, number: int) -> str:
    url = _url(hit)
    link = f" ({url})" if url else ""
    return f"[{number}] {_on_one_line(hit.title)}{link}\n{hit.content}"


def _citations(hits: Sequence[SearchHit]) -> Iterator[Citation]:
    first: dict[int, SearchHit] = {}
    for hit in hits:
        first.setdefault(hit.source_id, hit)
    for number, (source_id, hit) in enumerate(first.items(), 1):
        yield Citation(number, source_id, _on_one_line(hit.title), _url(hit))


def _url(hit: SearchHit) -> str | None:
    # From a chunk's location, where other programs may have written anything.
    url: object = hit.url
    return _on_one_line(url) or None if isinstance(url, str) else None


def _on_one_line(text: str) -> str:
    """So that a line of it cannot be taken for another source or message."""
    return " ".join(text.split())
