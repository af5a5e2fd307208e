"""Terms, folding and queries: pure, and what the server makes of them."""

import asyncio
import base64
import hashlib
import random
import unicodedata
from collections.abc import AsyncIterator

import asyncpg
import pytest
from conftest import settings_for
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import URL

from kotonoha_store.database import connect_arguments, register_codecs
from kotonoha_store.words import (
    QUERY_MAX_CHARACTERS,
    TERM_MAX_BYTES,
    TERMS_MAX_BYTES,
    Phrase,
    Words,
    analyse,
    fold,
    lookup,
    pack_terms,
    parse_query,
    scope_terms,
    terms_literal,
    unpack_terms,
)

# What a text is made of, a few of each, so that random texts share runs, and characters that folding changes.
LETTERS = ["a", "b", "A", "é", "İ", "ß", "ς", "ﬁ", "я", "ế", "ا", "ל", "running", "cafes"]
DIGITS = ["1", "2", "３", "①", "½", "٣"]
JOINED = [*"あいガｶﾞ東京都市ー々", "が", "か\u3099", "𠮷", "㌔", "ก", "น้ำ", "हि", "न्दी", "한", "국", "ᄒ"]
PICTURES = ["😀", "👍🏽", "❤️", "🇯🇵", "☔", "©", "👩‍👩‍👧", "1️⃣"]
MARKS = [
    " ",
    "\n",
    "\t",
    "　",
    ".",
    "、",
    "。",
    "「",
    "'",
    "\\",
    "%",
    "_",
    "#",
    "-",
    ":",
    "&",
    "!",
    "(",
    "\u200b",
    "\u0301",
]
PARTS = [*LETTERS, *DIGITS, *JOINED, *PICTURES, *MARKS]

ANY_TEXT = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
)


@pytest.fixture
async def server(shared_url: URL) -> AsyncIterator[asyncpg.Connection]:
    """A bare connection with the codecs."""
    connection = await asyncpg.connect(**connect_arguments(shared_url, settings_for(shared_url)))
    try:
        assert await register_codecs(connection)
        yield connection
    finally:
        await connection.close()


def terms(text: str) -> set[str]:
    return set(analyse("", text).terms)


def phrase(text: str) -> Phrase:
    """As it stands in quotes."""
    (found,) = parse_query(f'"{text}"').phrases
    return found


# -- folding ------------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
def test_folding_again_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)


def test_folding_ends_for_every_character() -> None:
    """Also with a mark behind that composes with it."""
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            for mark in ("", "\u0345"):
                folded = fold(chr(code) + mark)
                assert fold(folded) == folded


@pytest.mark.parametrize("marks", ["\u0301", "\u0301\u0323", "\u3099"])
def test_of_very_many_marks_on_one_letter_thirty_are_kept(marks: str) -> None:
    """To put 200,000 of them in order would take minutes."""
    first = (marks * 30)[:30]
    assert fold(f"か{marks * 100_000}き") == fold(f"か{first}き")
    assert fold(f"か{first[:-1]}き") != fold(f"か{first}き")
    # Wherever they stand.
    for before in range(31):
        assert fold(f"{'x' * before}か{(marks * 31)[:31]}き") == fold(f"{'x' * before}か{first}き")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ｶﾞｷﾞ", "ガギ"),
        ("か\u3099", "が"),
        ("ＡＢＣ", "abc"),
        ("ABC", "abc"),
        ("①", "1"),
        ("ﬁn", "fin"),
        ("Straße", "STRASSE"),
        ("ΟΔΟΣ", "οδος"),
        ("οδος", "οδοσ"),
        ("İ", "i\u0307"),
        ("CAFÉ", "cafe\u0301"),
        ("Я", "я"),
        ("㌔", "キロ"),
        ("ﷺ", "صلى الله عليه وسلم"),
        ("　", " "),
        ("～", "~"),
    ],
)
def test_width_case_and_composition_are_one(one: str, other: str) -> None:
    assert fold(one) == fold(other)
    assert terms(one) == terms(other)
    assert parse_query(one).terms == parse_query(other).terms


@pytest.mark.parametrize(
    ("one", "other"), [("か", "が"), ("ハ", "バ"), ("は", "ハ"), ("e", "é"), ("i", "İ"), ("五", "5")]
)
def test_what_differs_stays_different(one: str, other: str) -> None:
    assert fold(one) != fold(other)


@given(ANY_TEXT)
def test_folded_is_none_just_where_folding_changes_nothing(text: str) -> None:
    together = f"t\n{text}"
    assert analyse("t", text).folded == (None if fold(together) == together else fold(together))


# -- terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        (" \n、。!?\\'%_#", set()),
        ("東京タワー", {"東京", "京タ", "タワ", "ワー", "ー"}),
        ("東", {"東"}),
        ("佐々木〆切", {"佐々", "々木", "木〆", "〆切", "切"}),
        # A character beyond the basic plane is one character.
        ("𠮷野家", {"𠮷野", "野家", "家"}),
        ("runs Running", {"runs", "run", "running"}),
        ("Tokyo東京tower", {"tokyo", "東京", "京", "tower"}),
        ("v2.0", {"v2", "0"}),
        ("it's", {"it", "s"}),
        ("snake_case", {"snake", "case"}),
        ("東京😀tower", {"東京", "京", "😀", "tower"}),
        # Variation selectors and skin tones are no terms; what is joined by ZWJ is found by each part.
        ("❤️👍🏽", {"❤", "👍"}),
        ("👩‍👧", {"👩", "👧"}),
        ("🇯🇵", {"🇯", "🇵"}),
        ("สวัสดี", {"สว", "วั", "ัส", "สด", "ดี", "ี"}),
        ("हिन्दी", {"हि", "िन", "न्", "्द", "दी", "ी"}),
        ("안녕하세요 세계", {"안녕", "녕하", "하세", "세요", "요", "세계", "계"}),
        ("مرحبا بالعالم", {"مرحبا", "بالعالم"}),
        ("привет МИР", {"привет", "мир"}),
        ("שלום", {"שלום"}),
        ("tiếng Việt", {"tiếng", "việt"}),
    ],
)
def test_terms_of(text: str, expected: set[str]) -> None:
    assert terms(text) == expected


def test_the_titles_words_are_among_them_and_do_not_run_into_the_text() -> None:
    assert analyse("東京", "都 tower").terms == {"東京", "京", "都", "tower"}


def test_words_that_occur_again_are_marked() -> None:
    found = analyse("Tower", "the tower, the night runs; run. 東京東京 😀😀")
    # By their stem too. Pairs and pictures are not counted.
    assert found.repeated == {"tower", "the", "run"}
    assert found.words == {"night", "runs"}
    assert found.pairs == {"東京", "京東", "京", "😀"}


@given(ANY_TEXT)
def test_no_term_is_empty_or_reads_as_scope_or_has_what_would_need_care(text: str) -> None:
    found = analyse("title", text)
    assert len(found.pairs) + len(found.words) + len(found.repeated) == len(found.terms)
    for term in found.terms:
        assert term
        assert not set(term) & set("# \n\0'\\\"%_:")
        assert len(term.encode()) <= TERM_MAX_BYTES
        assert fold(unicodedata.normalize("NFC", term)) == fold(term)


def test_scope_terms_name_what_is_there() -> None:
    assert scope_terms(guild_id=1, channel_id=None, thread_id=-2, user_id=0) == [
        "#guild_id=1",
        "#thread_id=-2",
        "#user_id=0",
    ]


def test_lone_surrogates_are_no_terms() -> None:
    """The library refuses them before (check_text); here they part words and are never packed."""
    found = analyse("\ud800", "tokyo\udfff東京")
    assert found.terms == {"tokyo", "東京", "京"}
    pack_terms(found)
    assert set(parse_query("\ud800 東京").terms) == {"東京"}


# -- queries ------------------------------------------------------------------------------------------------------


def test_a_query_has_the_stems_pairs_and_pictures() -> None:
    query = parse_query("Running towers in 東京都 😀")
    assert set(query.terms) == {"run", "tower", "in", "東京", "京都", "😀"}
    assert query.loose == tuple(query.terms)
    assert query.phrases == ()
    assert not query.is_empty


def test_grammar_weighs_less() -> None:
    weights = parse_query("the tower 東京 京は です").terms
    assert weights["tower"] == weights["東京"] == 1.0
    assert weights["the"] == weights["京は"] == 0.5
    assert weights["です"] < weights["京は"]


@pytest.mark.parametrize(
    "text", ["", " ", "、。!", "\\", "%", "_", "'", "''", '"', '""', '" "', "“”", "#", "\u200b", "🏽"]
)
def test_a_query_without_letters_digits_and_pictures_is_empty(text: str) -> None:
    assert parse_query(text).is_empty


def test_a_phrase_of_marks_is_looked_up_though_no_term_helps() -> None:
    query = parse_query('"?!"')
    assert not query.is_empty
    assert query.phrases == (Phrase("?!", None, None),)


@pytest.mark.parametrize("opening", '"“”„＂')
@pytest.mark.parametrize("closing", '"“”„＂')
def test_quotes_of_all_kinds(opening: str, closing: str) -> None:
    query = parse_query(f"tower {opening}Night View{closing} 東京")
    assert [found.text for found in query.phrases] == ["night view"]
    assert query.loose == ("tower", "東京")
    assert set(query.terms) == {"tower", "night", "view", "東京"}


@pytest.mark.parametrize(
    ("text", "phrases", "loose"),
    [
        ('"night view', [], ["night", "view"]),
        ('night view"', [], ["night", "view"]),
        ('"a" b" c', ["a"], ["b", "c"]),
        ('"a""b"', ["a", "b"], []),
        ('""a""', [], ["a"]),
        ('x"東京"y', ["東京"], ["x", "y"]),
        ("'night view'", [], ["night", "view"]),
        ("「東京」", [], ["東京"]),
        ('"100% _a_ \\ it\'s"', ["100% _a_ \\ it's"], []),
        ('" a "', [" a "], []),
        ('"a\nb"', ["a\nb"], []),
    ],
)
def test_unbalanced_quotes_and_odd_characters(text: str, phrases: list[str], loose: list[str]) -> None:
    query = parse_query(text)
    assert [found.text for found in query.phrases] == phrases
    assert list(query.loose) == loose


def test_a_single_character_is_looked_up_wherever_it_stands() -> None:
    assert parse_query("東").lookups(["東"]) == ["'東':*"]
    assert phrase("東").lookup == "'東':*"
    # A letter and a picture are terms of their own.
    assert parse_query("a").lookups(["a"]) == ["'a'"]
    assert parse_query("😀").lookups(["😀"]) == ["'😀'"]


@pytest.mark.parametrize(
    ("text", "certain", "guess"),
    [
        ("東京都", "'東京' & '京都'", None),
        ("東京、", "'東京' & '京'", None),
        ("、東", "'東':*", None),
        ("night view", "'view':*", None),
        (" night view ", "'night' & 'view'", None),
        ("a 東京 b 😀", "'東京' & '京' & 'b' & '😀'", None),
        ("night", None, "'night':*"),
        ("night ", None, "'night'"),
        ("running ", None, "'running'"),
    ],
)
def test_what_a_phrase_is_looked_up_by(text: str, certain: str | None, guess: str | None) -> None:
    assert phrase(text) == Phrase(fold(text), certain, guess)


def test_lookups_are_quoted_for_the_server() -> None:
    assert lookup(["a'b\\"], ["c"]) == "'a''b\\\\' & 'c':*"


# Speed is no test; that it ends is.
@pytest.mark.parametrize(
    "unit", ["あ", "東京 ", "a", "a ", '"', '"a', '"a" ', "😀", "ﷺ", "\\", "'", "a\u0301", "　", '㌔"']
)
@pytest.mark.parametrize("length", [QUERY_MAX_CHARACTERS, 1_000_000])
def test_long_queries_are_cut(unit: str, length: int) -> None:
    text = (unit * (length // len(unit) + 1))[:length]
    assert parse_query(text) == parse_query(text[:QUERY_MAX_CHARACTERS])


def test_what_stands_beyond_does_not_take_part() -> None:
    query = parse_query("x" + " " * (QUERY_MAX_CHARACTERS - 1) + '東京 "y"')
    assert list(query.terms) == ["x"]


async def test_the_longest_phrase_is_looked_up_by_the_server(server: asyncpg.Connection) -> None:
    """Ten thousand terms, each nested in the next: the server's stack must bear it."""
    text = "".join(random.Random(1).sample([chr(code) for code in range(0x4E00, 0x9FFF)], QUERY_MAX_CHARACTERS - 2))
    asked = phrase(text).lookup
    assert await server.fetchval("SELECT $1::tsvector @@ $2::text::tsquery", pack_terms(analyse("", text)), asked)


# -- a phrase's lookup is met by every text with the phrase ---------------------------------------------------------


def _random_text(rng: random.Random, length: int) -> str:
    # Few different parts at a time: else hardly any part follows another twice.
    return "".join(rng.choices(rng.sample(PARTS, 12), k=rng.randint(1, length)))


def _texts_with_phrases() -> list[tuple[str, str, str]]:
    rng = random.Random(20240601)
    found = []
    for _ in range(12_000):
        title, text = _random_text(rng, 4), _random_text(rng, 30)
        folded = fold(f"{title}\n{text}")
        start = rng.randrange(len(folded))
        found.append((title, text, folded[start : start + rng.choice((1, 2, 3, 5, 8, 20))]))
    return found


async def test_every_text_with_a_phrase_meets_its_lookup(server: asyncpg.Connection) -> None:
    cases = [
        (title, text, part, phrase(part))
        for title, text, part in _texts_with_phrases()
        # What is blank is no phrase; a part that begins with a mark composes anew, and is another text then.
        if part.strip() and fold(part) == part and '"' not in part
    ]
    certain = [(title, text, part, asked) for title, text, part, asked in cases if asked.lookup is not None]
    assert len(certain) > 5000
    assert len(cases) - len(certain) > 500
    missed = await server.fetch(
        "SELECT number FROM unnest($1::tsvector[], $2::text[]) WITH ORDINALITY AS n (terms, asked, number)"
        " WHERE NOT terms @@ asked::tsquery",
        [pack_terms(analyse(title, text)) for title, text, _, _ in certain],
        [asked.lookup for *_, asked in certain],
    )
    assert [certain[row[0] - 1] for row in missed] == []
    assert all(asked.text in (analyse(title, text).folded or f"{title}\n{text}") for title, text, _, asked in cases)


async def test_a_long_word_is_found_by_its_beginning_however_it_is_cut(server: asyncpg.Connection) -> None:
    rng = random.Random(3)
    texts = ["".join(rng.choices("abcéế0", k=rng.randint(50, 300))) for _ in range(300)]
    parts = [". " + text[: rng.randint(40, len(text))] for text in texts]
    met = await server.fetch(
        "SELECT terms @@ asked::tsquery FROM unnest($1::tsvector[], $2::text[]) AS n (terms, asked)",
        [pack_terms(analyse("", f". {text}")) for text in texts],
        [phrase(part).lookup for part in parts],
    )
    assert len(met) == 300
    assert all(row[0] for row in met)


async def test_a_guess_is_met_where_the_phrase_is_a_word_or_begins_one(server: asyncpg.Connection) -> None:
    asked = phrase("night").guess
    texts = ["a night", "Nightly.", "midnight"]
    met = [
        await server.fetchval("SELECT $1::tsvector @@ $2::text::tsquery", pack_terms(analyse("", text)), asked)
        for text in texts
    ]
    assert met == [True, True, False]


def _lookups(text: str) -> list[str]:
    query = parse_query(text)
    return query.lookups(query.loose)


async def test_only_words_that_a_text_repeats_meet_the_repetition(server: asyncpg.Connection) -> None:
    query = parse_query("running towers 東京 😀 b")
    text = pack_terms(analyse("tower", "a tower runs. 東京東京 😀😀 b"), ["#guild_id=1"])
    met = await server.fetch(
        "SELECT term, $1::tsvector @@ again::tsquery FROM unnest($2::text[], $3::text[]) AS n (term, again)",
        text,
        list(query.terms),
        query.repetitions(),
    )
    assert dict(met) == {"run": False, "tower": True, "東京": False, "😀": False, "b": False}
    assert not query.pairs_only
    assert parse_query("東京 😀").pairs_only


async def test_every_query_finds_the_text_it_is(server: asyncpg.Connection) -> None:
    """Each term of a query by itself: what the query's side makes of a text is what the text's side stored."""
    rng = random.Random(4)
    texts = [_random_text(rng, 20) for _ in range(2000)]
    pairs = [(text, asked) for text in texts for asked in _lookups(text)]
    missed = await server.fetch(
        "SELECT number FROM unnest($1::tsvector[], $2::text[]) WITH ORDINALITY AS n (terms, asked, number)"
        " WHERE NOT terms @@ asked::tsquery",
        [pack_terms(analyse("", text)) for text, _ in pairs],
        [asked for _, asked in pairs],
    )
    # A character by itself is stored as the last of its run, and is the last of its run here.
    assert [pairs[row[0] - 1] for row in missed] == []


# -- packing ------------------------------------------------------------------------------------------------------


async def test_packed_terms_are_what_the_server_makes_of_the_text_form(server: asyncpg.Connection) -> None:
    rng = random.Random(5)
    words = [analyse(_random_text(rng, 5), _random_text(rng, 60)) for _ in range(500)]
    words.append(Words(frozenset({"a'b"}), frozenset({"é'\\"}), frozenset({"\\", "c d"}), None))
    words.append(Words(frozenset(), frozenset(), frozenset(), None))
    scope = scope_terms(guild_id=2**63 - 1, channel_id=-(2**63), user_id=0)
    rows = await server.fetch(
        # As text: equality of tsvectors compares their padding too, which follows the order terms were sent in.
        "SELECT packed::text = literal::tsvector::text, packed::text, packed"
        " FROM unnest($1::tsvector[], $2::text[]) AS n (packed, literal)",
        [pack_terms(each, scope) for each in words],
        [terms_literal(each, scope) for each in words],
    )
    assert len(rows) == len(words)
    for is_same, printed, read in rows:
        assert is_same
        assert read == printed


async def test_what_the_server_sends_is_read_as_it_would_print_it(server: asyncpg.Connection) -> None:
    for literal in ("", "a:1A,2B,3C,4 b c:16383", "'it''s' '\\\\' '東京':7B '#guild_id=1'", f"x:{','.join('12345')}"):
        printed, read = await server.fetchrow("SELECT v::text, v FROM (SELECT $1::text::tsvector) AS t (v)", literal)
        assert read == printed
    packed = pack_terms(Words(frozenset("a"), frozenset("b"), frozenset("c"), None), ["#d=1"])
    assert unpack_terms(packed) == "'a' '#d=1' 'b':1 'c':1A"


def _large_texts() -> dict[str, str]:
    rng = random.Random(6)
    kanji = [chr(code) for code in range(0x4E00, 0x9FFF)]
    numbers = " ".join(f"{number:06d}" for number in range(140_000))
    return {
        "base64 on one line": base64.b64encode(rng.randbytes(750_000)).decode(),
        "hash": hashlib.sha512(b"x").hexdigest(),
        "url": "https://example.com/" + "/".join(rng.randbytes(8).hex() for _ in range(20_000)) + "?q=%E6%9D%B1#x",
        "one word": "ế" * 1_000_000,
        "10 MB of Japanese": "".join(rng.choices(kanji[:800], k=3_500_000)),
        "long words": " ".join(f"{number:060d}" for number in range(30_000)),
        # A mark takes room of its own.
        "words that repeat": f"{numbers} {numbers}",
        "short words": " ".join(f"{number:x}" for number in range(300_000)),
        "short words that repeat": " ".join(f"{a}{b}{c}" for a in kanji[:90] for b in "xyzw" for c in range(990)) * 2,
        "emoji": "".join(chr(code) for code in range(0x1F400, 0x1F600)) * 500,
        "what folding makes longer": "ﷺ㍿㌀" * 100_000,
    }


async def test_no_text_is_too_large_to_be_stored(server: asyncpg.Connection) -> None:
    for name, text in (await asyncio.to_thread(_large_texts)).items():
        words = await asyncio.to_thread(analyse, "title", text)
        packed, literal = pack_terms(words, ["#guild_id=1"]), terms_literal(words, ["#guild_id=1"])
        count, same = await server.fetchrow(
            "SELECT length($1::tsvector), $1::tsvector::text = $2::text::tsvector::text", packed, literal
        )
        assert (count, same) == (len(words.terms) + 1, True), name
        assert sum(len(term.encode()) for term in words.terms) <= TERMS_MAX_BYTES, name
        assert "title" in words.terms, name


def test_of_too_many_terms_the_shortest_are_kept() -> None:
    """More of them, and a pair says as much as a hash."""
    text = " ".join(f"{number:x}" for number in range(200_000))
    kept = analyse("", text).terms
    assert {"0", "ff", "fff"} <= kept
    assert len(kept) < 200_000
