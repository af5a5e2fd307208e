"""What a bot puts in its prompt: the end of the conversation and what it remembers, within a budget. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kotonoha_store.records import Message, SearchHit, SearchResult
from kotonoha_store.tokens import count_tokens

MESSAGES_SHARE: Final = 0.5
"""Of the budget, what the conversation may take before the hits; what they leave is its as well."""

# What chat APIs put around each message (OpenAI's cookbook, "How to count tokens with tiktoken").
_TOKENS_A_MESSAGE: Final = 4


@dataclass(frozen=True, slots=True)
class Citation:
    """A source of the hits, numbered as :meth:`Recall.context` cites it: ``[1]``."""

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
        numbers = {citation.source_id: citation.number for citation in self.citations}
        return "\n\n".join(_cited(hit, numbers[hit.source_id]) for hit in self.hits)


def assemble(
    messages: Sequence[Message], first_index: int, session_key: str, result: SearchResult, *, max_tokens: int
) -> Recall:
    """Choose what fits: messages from the last one backwards, then hits from the best one on.

    Args:
        messages: the session's last, oldest first.
        first_index: the absolute index of the first of them.
    """
    costs = [_tokens_of(message) for message in messages]
    kept = _last_that_fit(costs, int(max_tokens * MESSAGES_SHARE))
    used = sum(costs[len(costs) - kept :])
    shown = range(first_index + len(messages) - kept, first_index + len(messages))
    hits: list[SearchHit] = []
    numbers: dict[int, int] = {}
    for hit in _elsewhere(result.hits, session_key, shown):
        number = numbers.get(hit.source_id, len(numbers) + 1)
        cost = count_tokens(_cited(hit, number) + "\n\n")
        if used + cost <= max_tokens:
            used += cost
            numbers[hit.source_id] = number
            hits.append(hit)
    more = _last_that_fit(costs[: len(costs) - kept], max_tokens - used)
    used += sum(costs[len(costs) - kept - more : len(costs) - kept])
    kept += more
    return Recall(
        messages=tuple(messages[len(messages) - kept :]),
        hits=tuple(hits),
        citations=tuple(_citations(hits, numbers)),
        tokens=used,
        result=result,
    )


def _last_that_fit(costs: Sequence[int], budget: int) -> int:
    kept = 0
    for cost in reversed(costs):
        if cost > budget:
            break
        budget -= cost
        kept += 1
    return kept


def _elsewhere(hits: Sequence[SearchHit], session_key: str, shown: range) -> Iterator[SearchHit]:
    """Those whose messages are not all shown anyway, each text once."""
    seen: set[str] = set()
    for hit in hits:
        if hit.content not in seen and not _is_shown(hit, session_key, shown):
            seen.add(hit.content)
            yield hit


def _is_shown(hit: SearchHit, session_key: str, shown: range) -> bool:
    first, last = (hit.location.get(f"{end}_message_index") for end in ("first", "last"))
    return (
        hit.location.get("session_key") == session_key
        and isinstance(first, int)
        and isinstance(last, int)
        and first in shown
        and last in shown
    )


def _cited(hit: SearchHit, number: int) -> str:
    head = f"[{number}] {hit.title}" + (f" ({hit.url})" if hit.url else "")
    return f"{head}\n{hit.content}"


def _tokens_of(message: Message) -> int:
    return _TOKENS_A_MESSAGE + count_tokens(message.content) + count_tokens(message.author or "")


def _citations(hits: Sequence[SearchHit], numbers: dict[int, int]) -> Iterator[Citation]:
    first: dict[int, SearchHit] = {}
    for hit in hits:
        first.setdefault(hit.source_id, hit)
    for source_id, hit in first.items():
        yield Citation(numbers[source_id], source_id, hit.title, hit.url)
