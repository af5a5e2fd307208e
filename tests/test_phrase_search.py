"""Phrases in double quotes: what PostgreSQL's LIKE finds in the folded text, nothing more and nothing less."""

import random
from typing import Any

import pytest
from searching import GUILD, ids, summary, write
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from word_reference import Known, frequencies, random_text, ranked

from kotonoha_store import SearchFilters, SearchRepository
from kotonoha_store.words import fold

pytestmark = pytest.mark.role("app")

# Whatever quotes are taken for, and what folds to them.
QUOTES = '"“”„〝〞＂'

LIKE = text(
    "SELECT c.id FROM knowledge_chunks c JOIN knowledge_sources s ON s.id = c.source_id"
    " LEFT JOIN chunk_terms t ON t.chunk_id = c.id"
    " WHERE c.guild_id = 1 AND coalesce(t.folded, s.title || E'\\n' || c.content) LIKE :pattern ESCAPE '!'"
    " ORDER BY c.id"
)


async def found(session: AsyncSession, query: str, **options: Any) -> list[int]:
    result = await SearchRepository(session).matching(query, **{"filters": GUILD, "top_k": 200, **options})
    assert result.complete
    return ids(result)


async def like(session: AsyncSession, phrase: str) -> list[int]:
    folded = fold(phrase)
    for special in "!%_":
        folded = folded.replace(special, f"!{special}")
    return list((await session.execute(LIKE, {"pattern": f"%{folded}%"})).scalars())


async def mixed(session: AsyncSession, seed: int) -> list[Known]:
    rng = random.Random(seed)
    known = []
    for _ in range(20):
        title = random_text(rng, 2)
        texts = [random_text(rng, rng.randrange(1, 25)) for _ in range(3)]
        # Only ASCII now and then, which folding leaves alone.
        texts.append(" ".join(rng.choice(["plain", "old", "text", "42", "a_b"]) for _ in range(5)))
        chunk_ids = await write(session, *texts, title=title)
        known += [Known.of(i, title, content) for i, content in zip(chunk_ids, texts, strict=True)]
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    return known


async def test_phrases_are_found_to_the_letter(session: AsyncSession) -> None:
    rng = random.Random(11)
    known = await mixed(session, 3)
    seen = {"within": 0, "edge": 0, "none": 0}
    for number in range(500):
        folded = rng.choice(known).folded
        start = rng.randrange(len(folded))
        phrase = folded[start : start + rng.choice([1, 2, 3, 5, 8, 20])]
        if number % 7 == 0:
            phrase = phrase[::-1]
        if number % 5 == 0:
            phrase = phrase.upper()
        if not phrase.strip() or set(phrase) & set(QUOTES):
            continue
        expected = await like(session, phrase)
        assert expected == sorted(chunk.id for chunk in known if fold(phrase) in chunk.folded)
        # Without a guess first the search may have to read every text: both ways find the same.
        for top_k in (1, 200):
            hits = await found(session, f'"{phrase}"', top_k=top_k)
            assert (
                sorted(hits) == expected
                if top_k == 200
                else set(hits) <= set(expected) and bool(hits) is bool(expected)
            ), phrase
        seen["none"] += not expected
        seen["within"] += bool(expected)
        seen["edge"] += start > 0 and folded[start - 1].isalnum() and folded[start].isalnum()
    assert min(seen.values()) > 40, seen


async def test_phrases_together_with_words_are_ranked_as_a_plain_reading_does(session: AsyncSession) -> None:
    rng = random.Random(12)
    known = await mixed(session, 4)
    counted = await frequencies(session)
    seen = 0
    for number in range(200):
        folded = rng.choice(known).folded
        phrases = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            start = rng.randrange(len(folded))
            phrases.append(folded[start : start + rng.choice([1, 2, 4])].translate(dict.fromkeys(map(ord, QUOTES))))
        query = "".join(f'{random_text(rng, number % 3)} "{phrase}" ' for phrase in phrases if phrase.strip())
        if not query:
            continue
        match: Any = rng.choice(["any", "all"])
        expected = ranked(known, query, counted, match)
        result = await SearchRepository(session).matching(query, match=match, filters=GUILD, top_k=200)
        assert summary(result) == ([chunk_id for _, chunk_id in expected], "words", True), (query, match)
        assert [hit.score for hit in result.hits] == pytest.approx([score for score, _ in expected], abs=1e-8)
        seen += bool(expected)
    assert seen > 60


async def test_a_phrase_may_begin_and_end_within_words_and_numbers(session: AsyncSession) -> None:
    tower, number, both = await write(session, "the towers", "call 20245 now", "x1tower2024y")
    cases: dict[str, list[int]] = {
        "owe": [tower, both],
        "he to": [tower],
        "02": [number, both],
        "ll 202": [number],
        "ower2": [both],
        "1t": [both],
        "towers": [tower],
        "tower": [tower, both],
        "s": [tower],
        "e\ncall": [number],
        "all  2": [],
    }
    for phrase, expected in cases.items():
        assert await found(session, f'"{phrase}"') == expected, phrase
        assert await found(session, f'"{phrase}" "{phrase}"') == expected


async def test_where_the_guess_finds_enough_nothing_more_is_read(session: AsyncSession) -> None:
    """A phrase of one word is first looked for at the beginning of words."""
    within, beginning = await write(session, "a watchtower", "a tower")
    assert await found(session, '"tower"', top_k=1) == [beginning]
    # The same order however many are asked for, so that pages fit together.
    assert await found(session, '"tower"', top_k=2) == [beginning, within]
    assert await found(session, '"tower"', top_k=1, offset=1) == [within]


async def test_a_phrase_in_the_text_comes_before_one_in_the_title_alone(session: AsyncSession) -> None:
    # First written, and so the first of equals.
    (in_title,) = await write(session, "dogs", title="a night view")
    in_text, in_both = await write(session, "dogs at night view", "dogs, night view", title="night view")
    (between,) = await write(session, "view of dogs", title="one night")
    assert await found(session, '"night view"') == [in_text, in_both, in_title]
    # Beside words, which all of them have.
    assert await found(session, '"night view" dogs') == [in_text, in_both, in_title]
    assert between not in await found(session, '"night view" dogs', match="all")


async def test_several_phrases_must_all_be_there(session: AsyncSession) -> None:
    both, _, _, loose = await write(
        session, "東京タワー and night view", "東京タワー", "night view", "night view of 東京タワー with dogs"
    )
    assert await found(session, '"京タワ" "night view"') == [both, loose]
    assert await found(session, '"京タワ" "ight vie" dogs') == [loose, both]
    assert await found(session, '"京タワ" "night view" dogs', match="all") == [loose]
    assert await found(session, '"view night"') == []
    assert await found(session, 'cats "京タワ"') != []
    assert await found(session, 'cats "京タワ"', match="all") == []


@pytest.mark.parametrize(
    ("query", "stored"),
    [
        ('"ＴＯＫＹＯ ｔｏｗｅｒ"', "tokyo tower"),
        ("“ﾀﾜｰ”", "東京タワー"),
        ("「x」＂タワー＂", "東京タワーx"),
        ('"straße"', "STRASSE 5"),
        ('"100%"', "100% sure"),
        ('"a_b"', "xa_by"),
        ('"it\'s"', "and it's here"),
        ('"C:\\dir"', "c:\\DIRECTORY"),
        ('"\\"', "one \\ here"),
        ('"!!"', "so!!"),
        ('"。"', "終わり。"),
        ('" "', "a b"),
        ('" b"', "a b"),
        ('"😀"', "ok😀"),
        ('"😀ok"', "x😀okay"),
        ('"1. a"', "11. apple"),
        ('"\n"', "a\nb"),
        ('"-1"', "x-12"),
    ],
)
async def test_odd_phrases(session: AsyncSession, query: str, stored: str) -> None:
    chunk_id, other = await write(session, stored, "anything-else", title="T")
    hits = await found(session, query)
    if query in ('" "', '"\n"'):
        # A blank phrase is none, and nothing else is asked for.
        assert hits == []
    else:
        assert chunk_id in hits
        assert other not in hits


async def test_a_phrase_of_marks_reads_the_scope_alone(session: AsyncSession) -> None:
    mine = await write(session, "so!!", "what!!")
    await write(session, "so!!", guild_id=2)
    assert await found(session, '"!!"') == mine
    assert await found(session, '"!!" what') == mine[::-1]
    assert await found(session, '"!!" what', match="all") == mine[1:]
    assert await found(session, '"!!"', filters=GUILD | SearchFilters(), everywhere=True) != mine


async def test_chunks_without_a_folded_text_are_read_as_they_are(session: AsyncSession) -> None:
    plain, other = await write(session, "plain text", "other text", title="ascii")
    assert (await session.execute(text("SELECT count(*) FROM chunk_terms WHERE folded IS NULL"))).scalar_one() >= 2
    for query in ('"ain te"', '"plain"', '"plain text"'):
        assert await found(session, query) == [plain]
    assert await found(session, '"ascii"') == [plain, other]


async def test_more_than_are_ranked(session: AsyncSession) -> None:
    """Of very many with all of it a thousand are ranked; pages of these agree."""
    chunk_ids = await write(session, *[f"雨 number{number}" for number in range(1100)])
    for query in ('"雨 num"', '"雨"'):
        hits = await found(session, query, top_k=1000)
        assert len(set(hits)) == 1000
        assert set(hits) <= set(chunk_ids)
        assert hits == sorted(hits)
        assert await found(session, query, top_k=100, offset=700) == hits[700:800]
