"""Messages or text -> pieces to embed. Pure: the same input gives the same pieces, and no text is lost.

Every piece has at least one character that no earlier piece has, so nothing merely repeats and every loop ends.
White space at the ends of a piece that was cut out of a longer text is dropped.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from semantic_text_splitter import TextSplitter

from kotonoha_store.checks import check_text
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.records import Message
from kotonoha_store.tokens import count_tokens

Strategy = Literal["message_based", "token_based"]

MIN_TOKENS = 16  # the least max_tokens: any one character, with a shortened author before it, fits

# A piece never spans more characters than this for each token: a million spaces are few tokens, and a useless piece.
_CHARS_PER_TOKEN = 16
_LOOKAHEAD = 32  # characters that the splitter sees after the end of a piece
_STRETCH = 8192

_OPENING = "「『（【〈《〔［｛“‘(["


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """One piece of a conversation.

    Attributes:
        content: the rendered lines; what is embedded.
        first, last: indexes into the given messages of the first and the last message that has text
            in the piece, both inclusive.
        token_count: tokens of ``content``.
    """

    content: str
    first: int
    last: int
    token_count: int


@dataclass(frozen=True, slots=True)
class TextPiece:
    """One piece of a text.

    Attributes:
        content: what is embedded.
        start, end: where it stands, in characters: ``text[start:end] == content``.
        token_count: tokens of ``content``.
    """

    content: str
    start: int
    end: int
    token_count: int


@dataclass(frozen=True, slots=True)
class _Line:
    """A message that is not blank: its index, its label (``author: ``), and the tokens of both and a newline.

    cl100k_base joins nothing to a newline that ends a line, so that the tokens of lines add up, save that the last line
    of a text has no newline.
    """

    index: int
    role: str
    label: str
    content: str
    tokens: int

    @property
    def text(self) -> str:
        return self.label + self.content


def split_text(text: str, *, max_tokens: int = 4000, overlap_ratio: float = 0.2) -> list[TextPiece]:
    """Cut ``text`` into pieces of at most ``max_tokens`` tokens, each at the best boundary in its second half.

    Best to worst: the longest run of newlines, one newline, the end of a sentence (Japanese ones included), of a word,
    of a grapheme. Together the pieces hold every character that is not white space; a blank text has none.

    Args:
        text: what to cut; NUL and lone surrogates are refused, since no chunk can hold them.
        max_tokens: cl100k_base tokens, at least 16.
        overlap_ratio: a piece repeats at most ``max_tokens * overlap_ratio`` tokens of its predecessor's end;
            0 <= ratio < 1.

    Raises:
        InvalidInputError: an option is out of its range, or ``text`` cannot be stored.
    """
    _check_limits(max_tokens, overlap_ratio)
    check_text(text)
    return list(_pieces(text, max_tokens, int(max_tokens * overlap_ratio)))


def chunk_messages(
    messages: Sequence[Message],
    *,
    strategy: Strategy = "message_based",
    size: int = 5,
    overlap: int = 2,
    max_tokens: int = 4000,
    overlap_ratio: float = 0.2,
    context: int = 0,
) -> list[ChatPiece]:
    """Cut a conversation into pieces of at most ``max_tokens`` tokens.

    A message is rendered as ``author: content``, or ``role: content`` without an author; one with blank content is
    left out and counts nowhere. An author that takes more than an eighth of ``max_tokens`` is shortened.

    ``message_based``: windows of ``size`` messages. A window repeats the last ``overlap`` messages of its predecessor,
    fewer where they would take more than half of ``max_tokens``, and closes early where ``max_tokens`` is reached.
    With ``overlap=0`` a window that would end with a user's question, its answer next, leaves the question to the next
    window when both fit there. A message too long for a piece is cut as by :func:`split_text`, each part
    labelled with its speaker and a piece of its own.

    ``token_based``: all lines as one text, cut as by :func:`split_text`; a piece may begin inside a message.

    Args:
        messages: oldest first.
        strategy: ``message_based`` or ``token_based``.
        size: messages in a window, at least 1 (message_based).
        overlap: messages repeated, 0 <= overlap < size; also the most context messages that open the first piece.
        max_tokens: cl100k_base tokens, at least 16.
        overlap_ratio: what two pieces share where a text is cut, as a part of ``max_tokens``; 0 <= ratio < 1.
        context: how many messages at the beginning were archived before. They only precede the others in the first
            piece; none of the pieces consists of them alone.

    Returns:
        The pieces in order. Every message from ``context`` on that is not blank is in them in full.

    Raises:
        InvalidInputError: an option is out of its range; the message names it.
    """
    _check_limits(max_tokens, overlap_ratio)
    _check_windows(strategy, size, overlap, context)
    lines = [_render(index, message, max_tokens) for index, message in enumerate(messages) if message.content.strip()]
    done = sum(line.index < context for line in lines)
    repeated = int(max_tokens * overlap_ratio)
    if strategy == "token_based":
        return list(_by_tokens(lines, done, overlap, max_tokens, repeated))
    return list(_by_messages(lines, done, size, overlap, max_tokens, repeated))


def _check_limits(max_tokens: int, overlap_ratio: float) -> None:
    _check_int("max_tokens", max_tokens, MIN_TOKENS)
    if isinstance(overlap_ratio, bool) or not isinstance(overlap_ratio, (int, float)) or not 0 <= overlap_ratio < 1:
        raise InvalidInputError(
            f"overlap_ratio must be a number from 0 up to but not including 1, not {overlap_ratio!r}"
        )


def _check_windows(strategy: str, size: int, overlap: int, context: int) -> None:
    if strategy not in get_args(Strategy):
        raise InvalidInputError(f"strategy must be 'message_based' or 'token_based', not {strategy!r}")
    _check_int("size", size, 1)
    _check_int("overlap", overlap, 0)
    _check_int("context", context, 0)
    if overlap >= size:
        raise InvalidInputError(f"overlap must be less than size, but {overlap} >= {size}")


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name} must be an integer of at least {least}, not {value!r}")


# Messages


def _render(index: int, message: Message, max_tokens: int) -> _Line:
    # On one line: a name with a newline in it must not look like another message.
    speaker = " ".join((message.author or "").split()) or " ".join(message.role.split())
    label = _shortened(speaker, max(MIN_TOKENS // 2, max_tokens // 8)) + ": "
    return _Line(index, message.role, label, message.content, count_tokens(f"{label}{message.content}\n"))


def _shortened(speaker: str, budget: int) -> str:
    # A token has a byte at least, so that most are not counted.
    if len(speaker.encode()) + 2 <= budget or _label_tokens(speaker) <= budget:
        return speaker
    kept = _longest(lambda n: _label_tokens(speaker[:n] + "…"), min(len(speaker), budget * _CHARS_PER_TOKEN), budget)
    return speaker[:kept] + "…"


def _label_tokens(speaker: str) -> int:
    return count_tokens(speaker + ": ")


def _by_messages(
    lines: list[_Line], done: int, size: int, overlap: int, max_tokens: int, repeated: int
) -> Iterator[ChatPiece]:
    """Yield windows; ``lines[:done]`` need no piece of their own."""
    # As if each newline were a token of its own: this decides quickly, the count of the window has the last word.
    ends = list(accumulate((line.tokens for line in lines), initial=0))

    def estimate(start: int, end: int) -> int:
        return ends[end] - ends[start] - 1

    def pair_fits(answer: int) -> bool:
        roles = lines[answer - 1].role, lines[answer].role
        return roles == ("user", "assistant") and estimate(answer - 1, answer + 1) <= max_tokens

    while done < len(lines):
        if _is_too_long(lines[done].text, max_tokens):
            yield from _parts(lines[done], max_tokens, repeated)
            done += 1
            continue
        start = max(0, done - overlap)
        while start < done - 1 and estimate(start, done) > max_tokens // 2:
            start += 1
        while start < done and estimate(start, done + 1) > max_tokens:
            start += 1
        end = done + 1
        while end < min(start + size, len(lines)) and estimate(start, end + 1) <= max_tokens:
            end += 1
        if overlap == 0 and done < end - 1 and end < len(lines) and pair_fits(end):
            end -= 1
        piece = _window(lines[start:end])
        while piece.token_count > max_tokens:
            start, end = (start, end - 1) if end > done + 1 else (start + 1, end)
            piece = _window(lines[start:end])
        yield piece
        done = end


def _window(lines: list[_Line]) -> ChatPiece:
    content = "\n".join(line.text for line in lines)
    tokens = sum(line.tokens for line in lines[:-1]) + count_tokens(lines[-1].text)
    return ChatPiece(content, lines[0].index, lines[-1].index, tokens)


def _is_too_long(text: str, max_tokens: int) -> bool:
    # A token has a byte at least.
    return len(text.encode()) > max_tokens and count_tokens(text) > max_tokens


def _parts(line: _Line, max_tokens: int, repeated: int) -> Iterator[ChatPiece]:
    for piece in _pieces(line.content, max_tokens, repeated, label=line.label):
        yield ChatPiece(line.label + piece.content, line.index, line.index, piece.token_count)


def _by_tokens(lines: list[_Line], done: int, overlap: int, max_tokens: int, repeated: int) -> Iterator[ChatPiece]:
    """Yield pieces of all lines as one text, from the first line on that needs a piece, after some context."""
    if done == len(lines):
        return
    lines = lines[max(0, done - overlap) :]
    done = min(done, overlap)
    text = "\n".join(line.text for line in lines)
    starts = list(accumulate((len(line.text) + 1 for line in lines), initial=0))[:-1]
    fresh = starts[done]
    begin = 0 if count_tokens(text[:fresh]) <= repeated else _step_back(text, 0, fresh, repeated)
    for piece in _pieces(text, max_tokens, repeated, begin=begin, fresh=fresh):
        first = bisect_right(starts, piece.start) - 1
        last = bisect_right(starts, piece.end - 1) - 1
        yield ChatPiece(piece.content, lines[first].index, lines[last].index, piece.token_count)


# Text


def _pieces(
    text: str, max_tokens: int, repeated: int, *, begin: int = 0, fresh: int = 0, label: str = ""
) -> Iterator[TextPiece]:
    """Yield pieces that together hold all of ``text[fresh:]``; the first may begin as early as ``begin``.

    ``label`` stands before each piece when its tokens are counted, and is not part of it.
    """
    start, fresh = _skip_space(text, begin), _skip_space(text, fresh)
    end = len(text.rstrip())
    if fresh < end <= start + max_tokens * _CHARS_PER_TOKEN:
        whole = _text_piece(text, start, end, label)
        if whole.token_count <= max_tokens:
            # What fits stays whole; the search below would stop a little short of it.
            yield whole
            return
    while fresh < len(text):
        piece = _piece(text, start, fresh, max_tokens, label)
        if piece is None:
            # The repeated text left no room for a single new character.
            start = fresh
            piece = _piece(text, start, fresh, max_tokens, label) or _text_piece(text, start, fresh + 1, label)
        yield piece
        fresh = _skip_space(text, piece.end)
        start = _skip_space(text, _step_back(text, piece.start, piece.end, repeated))


def _piece(text: str, start: int, fresh: int, max_tokens: int, label: str) -> TextPiece | None:
    """The piece from ``start`` that reaches beyond ``fresh``, or None if that would be more than ``max_tokens``."""
    room = min(len(text) - start, max_tokens * _CHARS_PER_TOKEN)
    high = start + _longest(lambda n: count_tokens(label + text[start : start + n]), room, max_tokens)
    while high > fresh:
        low = max(fresh, (start + high) // 2)
        end = start + len(text[start : _boundary(text, low, high)].rstrip())
        piece = _text_piece(text, start, end, label)
        if piece.token_count <= max_tokens:
            return piece
        # A shorter text can have more tokens, since other letters join: rare, and a little less helps.
        high = end - 1
    return None


def _text_piece(text: str, start: int, end: int, label: str) -> TextPiece:
    content = text[start:end]
    return TextPiece(content, start, end, count_tokens(label + content))


def _step_back(text: str, floor: int, end: int, budget: int) -> int:
    """Where, after ``floor``, the text of at most ``budget`` tokens before ``end`` begins, at a good boundary."""
    room = min(end - floor - 1, budget * _CHARS_PER_TOKEN)
    length = _longest(lambda n: count_tokens(text[end - n : end]), room, budget)
    if length < 2:
        return end
    low = end - length
    start = _boundary(text, low, low + length // 2)
    return start if count_tokens(text[start:end]) <= budget else end


def _boundary(text: str, low: int, high: int) -> int:
    """The last boundary of the best kind in ``text[low:high]``, in (low, high]."""
    # With what follows: else the splitter would take ``high`` for the end of a word or sentence. In characters:
    # counting tokens, its time is quadratic over a long run of one letter or of newlines.
    stretch = text[low : high + _LOOKAHEAD]
    chunk = TextSplitter(high - low, trim=False).chunks(stretch)[0]
    # Unicode counts the 「 in 。「 to the sentence before it. One or two: a long run is no quotation.
    kept = chunk.rstrip(_OPENING)
    return low + len(kept if kept and len(chunk) - len(kept) <= 2 else chunk)


def _skip_space(text: str, start: int) -> int:
    # In steps: lstrip() alone would copy all the rest of a long text for every piece.
    while start < len(text):
        stretch = text[start : start + _STRETCH]
        kept = len(stretch.lstrip())
        if kept:
            return start + len(stretch) - kept
        start += len(stretch)
    return start


def _longest(measure: Callable[[int], int], longest: int, budget: int) -> int:
    """A length in [0, longest] that measures at most ``budget``, within about 3% of the greatest such length.

    Few, well-guessed measurements: each one counts tokens. Halving every other time bounds their number.
    """
    low, high = 0, longest + 1
    guess = min(longest, budget * 4)
    halve = False
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        measured = measure(guess)
        if measured <= budget:
            low = guess
            if measured >= budget - budget // 32:
                break
        else:
            high = guess
        guess = (low + high) // 2 if halve else guess * budget // max(measured, 1)
        halve = not halve
    return low
