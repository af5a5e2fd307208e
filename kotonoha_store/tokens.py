"""Token counts without the network: cl100k_base, the encoding of OpenAI's embedding models."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import cast

logger = logging.getLogger(__name__)

# bpe_openai refuses 1,000,000 characters or 200,000 tokens at once. A character is at most four bytes,
# and a token at least one, so a slice of this many characters passes both limits.
SLICE_CHARS = 50_000

# The encoding never joins a letter or digit to the white space or punctuation after it: cutting there
# leaves the count as it is.
_BREAK = re.compile(r"[^\W_](?=[\s!-/:-@\[-`{-~、。])")
_NEARBY = 500


def count_tokens(text: str) -> int:
    """Return how many cl100k_base tokens ``text`` has.

    Text that spells a special token (``<|endoftext|>``) counts as the ordinary text it is, and a lone
    surrogate as U+FFFD; nothing in ``text`` makes this raise. The time grows with the length alone.

    A run of more than 50,000 characters without a single break (one letter repeated, say) is counted in
    slices; each cut may shift the count by a token or two. If ``bpe_openai`` cannot be loaded, the count
    is that of UTF-8 bytes, an upper bound, and a warning is logged once.
    """
    encode = _encoder()
    if encode is None:
        return len(text.encode(errors="surrogatepass"))
    if len(text) <= SLICE_CHARS:
        return len(encode(text))
    return sum(len(encode(part)) for part in _slices(text))


@cache
def _encoder() -> Callable[[str], list[int]] | None:
    # Here and not at the top: reading the table takes half a second, and not every process counts.
    try:
        with warnings.catch_warnings():
            # Its own use of importlib.resources; under ``-W error`` that would be an exception here.
            warnings.simplefilter("ignore", DeprecationWarning)
            import bpe_openai

            return cast(Callable[[str], list[int]], bpe_openai.get_encoding("cl100k_base").encode_ordinary)
    except (ImportError, OSError, AttributeError, LookupError, RuntimeError) as error:
        logger.warning("bpe_openai cannot be loaded (%s): tokens are counted as UTF-8 bytes, which is too many", error)
        return None


def _slices(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > SLICE_CHARS:
        end = _last_break(text, start, start + SLICE_CHARS)
        yield text[start:end]
        start = end
    yield text[start:]


def _last_break(text: str, start: int, end: int) -> int:
    for low in (max(start, end - _NEARBY), start):
        breaks = [match.end() for match in _BREAK.finditer(text, low, end)]
        if breaks:
            return breaks[-1]
    return end
