"""What a search by word looks for: a text's terms, and what a query asks of them. Pure.

Texts and queries go through the same steps. They are folded (Unicode NFKC, which unifies half and full
width, and without case). Writing without spaces between words (Japanese, Chinese, Thai ...) becomes
overlapping pairs of characters; writing with spaces becomes words and their English stems (Snowball); an
emoji is a term of its own. Pairs find any substring of Japanese, which words cut by a
dictionary do not, and need no extension in the database.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from operator import add
from typing import Final

import Stemmer

QUERY_MAX_CHARACTERS: Final = 10_000
"""What stands beyond in a query does not take part in a search by word."""

TERM_MAX_BYTES: Final = 255
"""Longer words (hashes, base64) are known by their beginning; PostgreSQL takes no lexeme above 2,046 bytes."""

TERMS_MAX_BYTES: Final = 900_000
"""Bytes of terms kept of one chunk: a tsvector holds 1 MB (``MAXSTRPOS``). Terms beyond are not found.

The title's are kept first, then the shortest.
"""

# A word's place and the count of its places, two bytes each, and one to align them.
_PLACE_BYTES: Final = 5

_MARKS_MAX: Final = 30

SCOPE_MARK: Final = "#"
"""Begins the terms that say whose a chunk is; no term of a text does."""

_HIRAGANA: Final = frozenset(map(chr, range(0x3041, 0x30A0)))
# Latin, Greek, Cyrillic, Hebrew, Arabic and what else lies here are written with spaces.
_SPACED_BLOCKS: Final = (range(0x700), range(0x1E00, 0x2000))
_OTHER_BLOCKS: Final = (range(0x700, 0x1E00), range(0x2000, 0xD800), range(0xE000, 0x10000))
# Beyond the basic plane: whole blocks, since a class of many ranges there would be searched one by one.
_JOINED_BEYOND: Final = r"\U00010000-\U0001efff\U00020000-\U0003ffff"
_PICTURES_BEYOND: Final = r"\U0001f000-\U0001f3fa\U0001f400-\U0001faff"
# Variation selectors choose a glyph and are no letters.
_SELECTORS: Final = frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0x180B, 0x180E), 0x180F)))
_QUOTED: Final = re.compile(r'["“”„]([^"“”„]*)["“”„]')

# PostgreSQL's english.stop.
_STOP_WORDS: Final = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now
    """.split()  # noqa: SIM905  easier to read
)

# What weighs less than its rarity says: grammar, which says little of what a text is about but orders what is
# otherwise equal. Chosen on LoCoMo and JSQuAD (benchmarks/retrieval.py), where neither 0.2 to 0.5 for the
# first nor 0.15 to 0.6 for the second makes a difference.
_HIRAGANA_WEIGHT: Final = 0.3
_HALF_HIRAGANA_WEIGHT: Final = 0.5
_STOP_WORD_WEIGHT: Final = 0.5


@dataclass(frozen=True, slots=True)
class Words:
    """What is kept of a chunk to find it by word.

    Attributes:
        pairs: distinct terms of writing without spaces, and pictures.
        words: distinct words and stems that occur once.
        repeated: those that occur more than once.
        folded: title and content as phrases are looked up in them; None where folding changed nothing.
    """

    pairs: frozenset[str]
    words: frozenset[str]
    repeated: frozenset[str]
    folded: str | None

    @property
    def terms(self) -> frozenset[str]:
        """All of them."""
        return self.pairs | self.words | self.repeated


@dataclass(frozen=True, slots=True)
class Phrase:
    """Text that must occur as it stands, folded; within words too, as LIKE finds it.

    Attributes:
        text: what is looked up in the folded text.
        lookup: tsquery (as text) that every text with the phrase meets; None where nothing is certain.
        guess: tsquery that most of them meet, where nothing is certain: the phrase may be a part of a word.
    """

    text: str
    lookup: str | None
    guess: str | None


@dataclass(frozen=True, slots=True)
class WordQuery:
    """What a query asks for.

    Attributes:
        terms: with what each weighs beside its rarity, phrases' terms included.
        loose: the terms outside of phrases.
        phrases: what stood in double quotes.
    """

    terms: dict[str, float]
    loose: tuple[str, ...]
    phrases: tuple[Phrase, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look for: no letter, digit or picture."""
        return not self.terms and not self.phrases

    def lookups(self, terms: Iterable[str], *, anywhere: bool = False) -> list[str]:
        """The tsquery (as text) of each of these terms, in order.

        ``anywhere``: every single character wherever it stands, as what must be there; else an ideograph only.
        """
        return [lookup([], [term]) if self._is_beginning(term, anywhere) else lookup([term]) for term in terms]

    def beyond(self) -> list[str | None]:
        """Of each term that is looked up as the beginning of others, in order: what sorts after all of those."""
        return [f"{term}\U0010ffff" if self._is_beginning(term, anywhere=False) else None for term in self.terms]

    def _is_beginning(self, term: str, anywhere: bool) -> bool:
        # As the first of a pair, or the last of its run. A kana by itself says nothing: too many texts have it.
        return _is_lone(term) and (anywhere or len(self.terms) == 1 or not _pair_weight(term) < 1)

    @property
    def pairs_only(self) -> bool:
        """Whether no term is a word, which alone can be repeated."""
        return not any(_runs(term)[0][1] for term in self.terms)

    def repetitions(self) -> list[str]:
        """What a text also meets that repeats the term, in order; of words only, pairs do not count."""
        # Of what is in the text already, the negation is never met.
        return [
            f"{_quoted(term)}:A" if _runs(term)[0][1] else f"!({found})"
            for term, found in zip(self.terms, self.lookups(self.terms), strict=True)
        ]


def fold(text: str) -> str:
    """Return the text in compatibility form and without case; folding again changes nothing.

    Of more than thirty marks on one letter the rest is dropped: putting them in order takes time by the square of
    their number (Unicode Standard Annex 15, "Stream-Safe Text Format").
    """
    # Of more marks in a row than that, one stands at such a place: a look at the others takes long.
    if not text.isascii() and any(map(unicodedata.combining, text[_MARKS_MAX::_MARKS_MAX])):
        text = _marks().sub(lambda marks: marks.group()[:_MARKS_MAX], text)
    while not text.isascii():
        folded = unicodedata.normalize("NFKC", text).casefold()
        # A few characters take a second pass.
        if folded == text:
            return text
        text = folded
    return text.lower()


def analyse(title: str, content: str) -> Words:
    """Return the words of a chunk and of its title."""
    text = f"{title}\n{content}"
    folded = fold(text)
    pairs: set[str] = set()
    words: set[str] = set()
    repeated: set[str] = set()
    for joined, word, picture in _runs(folded):
        if joined:
            pairs.update(map(add, joined, joined[1:]))
            # So that a single character is found wherever it stands: as a pair's first, or here.
            pairs.add(joined[-1])
        elif word:
            found = _word_terms(word)
            repeated |= words & found
            words |= found
        else:
            pairs.add(picture)
    if len(folded) * 12 > TERMS_MAX_BYTES:
        pairs, words = _bounded(pairs, words, analyse(title, "").terms if content else frozenset())
    repeated &= words
    return Words(
        pairs=frozenset(pairs),
        words=frozenset(words - repeated),
        repeated=frozenset(repeated),
        folded=None if folded == text else folded,
    )


def parse_query(text: str) -> WordQuery:
    """Return what a query asks for: ``東京 tower "night view"`` has loose terms and a phrase.

    Quotes may be straight, curly or full width; one without its partner is no quote.
    """
    text = unicodedata.normalize("NFKC", text[:QUERY_MAX_CHARACTERS])
    quoted = [fold(inner) for inner in _QUOTED.findall(text) if inner.strip()]
    loose = _query_terms(_QUOTED.sub("\n", text))
    terms = dict(loose)
    for inner in quoted:
        terms |= _query_terms(inner)
    return WordQuery(terms, tuple(loose), tuple(map(_phrase, quoted)))


def scope_terms(**ids: int | None) -> list[str]:
    """Return the terms that say whose a chunk is, such as ``#guild_id=1``."""
    return [f"{SCOPE_MARK}{name}={value}" for name, value in ids.items() if value is not None]


def lookup(terms: Iterable[str], beginnings: Iterable[str] = ()) -> str:
    """Return the tsquery (as text) of what has all of these terms, and terms that begin so."""
    return " & ".join([*map(_quoted, terms), *(f"{_quoted(beginning)}:*" for beginning in beginnings)])


def terms_literal(words: Words, scope: Iterable[str] = ()) -> str:
    """Return the ``tsvector`` as text. Words have a position, so that those that are repeated can have a weight (A)."""
    # A term without any position would meet every weight that is asked for.
    marked = {"": [*words.pairs, *scope], ":1": words.words, ":1A": words.repeated}
    return " ".join(f"{_quoted(term)}{mark}" for mark, terms in marked.items() for term in terms)


def pack_terms(words: Words, scope: Iterable[str] = ()) -> bytes:
    """Return the ``tsvector`` in PostgreSQL's binary format, for COPY.

    The format (``tsvectorsend`` in ``src/backend/utils/adt/tsvector.c``): the number of terms, then of each its
    text, a zero byte, the number of positions, and the positions, with the weight in the upper two bits.
    """
    plain = [*words.pairs, *scope]
    count = len(plain) + len(words.words) + len(words.repeated)
    return (
        count.to_bytes(4, "big")
        + _terminated(plain, b"\0\0\0")
        + _terminated(words.words, b"\0\0\x01\0\x01")
        + _terminated(words.repeated, b"\0\0\x01\xc0\x01")
    )


def unpack_terms(data: bytes) -> str:
    """Return what :func:`pack_terms` packed as PostgreSQL's own text form, for whoever reads the column."""
    position, found = 4, []
    for _ in range(int.from_bytes(data[:4], "big")):
        end = data.index(0, position)
        places = int.from_bytes(data[end + 1 : end + 3], "big")
        marks = [int.from_bytes(data[end + 3 + 2 * i : end + 5 + 2 * i], "big") for i in range(places)]
        term = _quoted(data[position:end].decode())
        found.append(
            term + ("" if not marks else ":" + ",".join(f"{m & 0x3FFF}{' CBA'[m >> 14].strip()}" for m in marks))
        )
        position = end + 3 + 2 * places
    return " ".join(found)


def _terminated(terms: Iterable[str], end: bytes) -> bytes:
    # No term holds a zero: one encoding instead of one for each.
    return "\0".join([*terms, ""]).encode().replace(b"\0", end)


def _quoted(term: str) -> str:
    escaped = term.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _runs(folded: str) -> list[tuple[str, str, str]]:
    """Of each run either the first is filled (written without spaces), the second (a word) or the third (a picture)."""
    found: list[tuple[str, str, str]] = _pattern().findall(folded)
    return found


@cache
def _marks() -> re.Pattern[str]:
    marks = _ranges(
        [range(0x300, 0xD800), range(0xE000, 0x1F000)], lambda character: unicodedata.combining(character) > 0
    )
    return re.compile(f"[{marks}]{{{_MARKS_MAX + 1},}}")


@cache
def _pattern() -> re.Pattern[str]:
    """From Python's own Unicode tables, since ``re`` knows no scripts, and takes no mark for a letter."""
    joined = _ranges(_OTHER_BLOCKS, _is_letter) + _JOINED_BEYOND
    word = _ranges(_SPACED_BLOCKS, _is_letter)
    picture = _ranges(_OTHER_BLOCKS, lambda character: unicodedata.category(character) == "So") + _PICTURES_BEYOND
    return re.compile(f"([{joined}]+)|([{word}]+)|([{picture}])")


def _is_letter(character: str) -> bool:
    return character.isalnum() or (unicodedata.category(character) in {"Mn", "Mc"} and character not in _SELECTORS)


def _ranges(blocks: Iterable[range], belongs: Callable[[str], bool]) -> str:
    parts = []
    for block in blocks:
        for wanted, group in groupby(block, lambda code: belongs(chr(code))):
            if wanted:
                codes = list(group)
                parts.append(f"\\U{codes[0]:08x}-\\U{codes[-1]:08x}")
    return "".join(parts)


def _is_lone(run: str) -> bool:
    """Whether it is one character of a script in which pairs are the terms."""
    return len(run) == 1 and bool(_runs(run)[0][0])


def _word_terms(word: str) -> set[str]:
    """The stem, and the word as it is written: what a phrase asks for."""
    word = _cut(word)
    return {word, _stem(word)}


@lru_cache(maxsize=50_000)
def _stem(word: str) -> str:
    # One for each call: it is not safe to share between threads.
    return str(Stemmer.Stemmer("english", 0).stemWord(word))


def _cut(word: str) -> str:
    if len(word) * 4 <= TERM_MAX_BYTES:
        return word
    return word.encode()[:TERM_MAX_BYTES].decode(errors="ignore")


def _bounded(pairs: set[str], words: set[str], of_title: frozenset[str]) -> tuple[set[str], set[str]]:
    terms = pairs | words
    kept: set[str] = set()
    room = TERMS_MAX_BYTES
    # Sorted twice, since by a key of both it takes five times as long.
    for term in [*sorted(terms & of_title), *sorted(sorted(terms - of_title), key=len)]:
        room -= len(term.encode()) + (_PLACE_BYTES if term in words else 0)
        if room < 0:
            break
        kept.add(term)
    return pairs & kept, words & kept


def _query_terms(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for joined, word, picture in _runs(fold(text)):
        if joined:
            for term in map(add, joined, joined[1:]) if len(joined) > 1 else [joined]:
                found[term] = _pair_weight(term)
        elif word:
            found[_stem(_cut(word))] = _STOP_WORD_WEIGHT if word in _STOP_WORDS else 1.0
        else:
            found[picture] = 1.0
    return found


def _pair_weight(term: str) -> float:
    grammar = sum(character in _HIRAGANA for character in term)
    if grammar == len(term):
        return _HIRAGANA_WEIGHT
    return _HALF_HIRAGANA_WEIGHT if grammar else 1.0


def _phrase(text: str) -> Phrase:
    terms: list[str] = []
    beginnings: list[str] = []
    guess: str | None = None
    for match in _pattern().finditer(text):
        joined, word, picture = match.groups()
        opens, closes = match.start() == 0, match.end() == len(text)
        if joined:
            terms += map(add, joined, joined[1:])
            if not closes:
                terms.append(joined[-1])
            elif _is_lone(joined):
                beginnings.append(joined)
        elif picture:
            terms.append(picture)
        elif opens:
            # In the text more may stand before it.
            guess = lookup([], [_cut(word)]) if closes else lookup([_cut(word)])
        elif closes:
            beginnings.append(_cut(word))
        else:
            terms.append(_cut(word))
    certain = lookup(dict.fromkeys(terms), beginnings)
    return Phrase(text, certain or None, None if certain else guess)
