"""Search by word, against a plain reading of it."""

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import settings_for
from filter_reading import Row, meets, scoped_trees, trees, unhurried
from hypothesis import given
from hypothesis import strategies as st
from searching import DAY, GUILD, JUNE, ids, summary, vectors, watched_store, write
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession
from test_filters import world
from word_reference import Known, frequencies, random_text, ranked

from kotonoha_store import (
    Database,
    HashingEmbedder,
    InvalidInputError,
    KnowledgeRepository,
    NewChunk,
    SchemaOutdatedError,
    Scope,
    SearchFilters,
    SearchRepository,
    SearchResult,
    SourceType,
    Store,
)
from kotonoha_store.search_records import AnyFilters
from kotonoha_store.term_index import fill_terms

pytestmark = pytest.mark.role("app")

__all__ = ["world"]  # a fixture


async def find(session: AsyncSession, query: str, **options: Any) -> SearchResult:
    return await SearchRepository(session).matching(query, **{"filters": GUILD, **options})


async def found(session: AsyncSession, query: str, **options: Any) -> list[int]:
    result = await find(session, query, **options)
    assert (result.plan, result.model) == ("words", None)
    return ids(result)


# What is found


async def test_any_or_all_of_the_words(session: AsyncSession) -> None:
    both, tower, night, _ = await write(session, "Tokyo tower at night", "a tower", "night train", "a dog")
    assert await found(session, "tower night") == [both, tower, night]
    assert await found(session, "tower night", match="all") == [both]
    assert await found(session, "tower cat", match="all") == []
    assert await found(session, "cat") == []


async def test_any_or_all_in_japanese(session: AsyncSession) -> None:
    both, tower, view, _ = await write(session, "東京タワーの夜景", "東京タワーに登る", "函館の夜景", "犬の散歩")
    assert await found(session, "東京タワー 夜景") == [both, tower, view]
    assert await found(session, "東京タワー 夜景", match="all") == [both]
    assert await found(session, "タワー") == [both, tower]


async def test_rare_words_weigh_more_than_common_ones(session: AsyncSession) -> None:
    common = await write(session, *["the meeting about lunch"] * 30)
    (rare,) = await write(session, "the zeppelin")
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    result = await find(session, "meeting zeppelin")
    assert ids(result) == [rare, *common[:9]]
    assert result.hits[0].score > 3 * result.hits[1].score
    assert all(hit.similarity is None for hit in result.hits)


async def test_more_distinct_words_come_first_and_a_repeated_one_counts_a_quarter_more(session: AsyncSession) -> None:
    once, often, both = await write(session, "apple", "apple apple apple apple", "apple pear")
    result = await find(session, "apple pear")
    assert ids(result) == [both, often, once]
    assert result.hits[1].score == pytest.approx(1.25 * result.hits[2].score)
    # Pairs of Japanese are not counted.
    one, two = await write(session, "梅雨", "梅雨、梅雨、梅雨")
    result = await find(session, "梅雨")
    assert ids(result) == [one, two]
    assert result.hits[0].score == result.hits[1].score


async def test_the_title_counts(session: AsyncSession) -> None:
    (by_title,) = await write(session, "nothing of the kind", title="北海道 Travel Guide")
    (by_text,) = await write(session, "北海道 travel")
    await write(session, "nothing at all")
    assert await found(session, "北海道") == [by_title, by_text]
    assert await found(session, "travels", match="all") == [by_title, by_text]
    assert await found(session, '"travel guide"') == [by_title]
    assert await found(session, "北海道 kind", match="all") == [by_title]


@pytest.mark.parametrize(
    ("query", "texts"),
    [
        ("雨", ["雨", "梅雨前線", "雨が降る", "大雨"]),
        ("あ", ["ああ", "これはあれ", "あ"]),
        ("カ", ["カ", "ｶ", "カメラ", "イカ"]),
        ("x", ["x", "X 1", "an Ｘ"]),
        ("7", ["7", "７", "on day 7."]),
        ("😀", ["😀", "ok😀ok", "雨😀"]),
        ("☔", ["☔", "雨☔️"]),
        ("𠮷", ["𠮷野家", "𠮷"]),
        ("한", ["한국", "한"]),
    ],
)
async def test_one_character(session: AsyncSession, query: str, texts: Sequence[str]) -> None:
    chunk_ids = await write(session, *texts)
    await write(session, "犬 dog", "貓 77 xx 😺")
    assert sorted(await found(session, query)) == chunk_ids
    assert sorted(await found(session, f'"{query}"')) >= chunk_ids
    assert sorted(await found(session, query, match="all")) == chunk_ids


@pytest.mark.parametrize(
    ("query", "stored"),
    [
        ("ＴＯＫＹＯ", "tokyo"),
        ("tokyo", "ＴＯＫＹＯ"),
        ("ﾀﾜｰ", "タワー"),
        ("ガイド", "ｶﾞｲﾄﾞ"),
        ("STRASSE", "straße"),
        ("１２３", "123"),
        ("cafe\u0301", "caf\u00e9"),
        ("㌔", "キロ"),
        ("running", "run"),
        ("towers", "TOWER"),
    ],
)
async def test_width_case_and_inflection_do_not_matter(session: AsyncSession, query: str, stored: str) -> None:
    (chunk_id,) = await write(session, f"「{stored}」")
    assert await found(session, query) == [chunk_id]
    assert await found(session, query, match="all") == [chunk_id]


@pytest.mark.parametrize(
    "query",
    [
        "100%",
        "snake_case",
        "it's",
        "O''Brien",
        "C:\\dir",
        "a\\' OR 1=1 --",
        "'; DROP TABLE knowledge_chunks; --",
        "a & b | !c <-> d:*",
        "(a",
        ":A :* !",
        "$1 %s %(query)s :query {} ?",
        '"unbalanced',
        'a " b',
        '""',
        '"" a',
        "#guild_id=1",
        "NULL",
        "\x01\x7f\u200b a",
        "a\ud7ffb",
        "\U0010ffff a",
    ],
)
async def test_marks_of_every_kind_are_harmless(session: AsyncSession, query: str) -> None:
    (chunk_id, other) = await write(session, f"before {query} after", "different")
    for match in ("any", "all"):
        result = await find(session, query, match=match)
        assert other not in ids(result)
        assert ids(result) == ([] if query == '""' else [chunk_id])
    assert await found(session, "different") == [other]


async def test_marks_are_no_wildcards(session: AsyncSession) -> None:
    percent, underscore, _, _ = await write(session, "a%b", "a_b", "axb", "a b")
    assert await found(session, '"a%b"') == [percent]
    assert await found(session, '"a_b"') == [underscore]


@pytest.mark.parametrize("query", ["。", "!?", "...", "「」", "-", "()", "\u200b", '""', "'", "。、・…"])
async def test_a_query_of_marks_finds_nothing(session: AsyncSession, query: str) -> None:
    await write(session, f"a{query}b。、!?...「」-()'")
    result = await find(session, query)
    assert summary(result) == ([], "words", True)
    assert result.hidden_by_threshold == 0


@pytest.mark.parametrize("query", ["", " ", "\n\t　", "a\x00", "\ud800", None, 5, b"a", ["a"]])
async def test_what_is_no_query_is_refused(session: AsyncSession, query: Any) -> None:
    with pytest.raises(InvalidInputError, match="query"):
        await find(session, query)


@pytest.mark.parametrize(
    "options",
    [
        {"match": "some"},
        {"match": None},
        {"match": ["any"]},
        {"top_k": 0},
        {"top_k": 1001},
        {"top_k": True},
        {"top_k": "5"},
        {"offset": -1},
        {"offset": 1000},
        {"offset": True},
        {"neighbours": 21},
        {"neighbours": -1},
        {"filters": None},
        {"filters": SearchFilters(since=JUNE)},
        {"filters": ~GUILD},
        {"filters": {"guild_id": 1}},
    ],
    ids=str,
)
async def test_options_out_of_range_are_refused(session: AsyncSession, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        await find(session, "a", **options)


# Long queries


@pytest.mark.parametrize("unit", ["word ", "雨", "東京タワー夜景 ", "a1b2 ", "😀", '"a" ', '"雨が" ', '"!', "\ufdfa"])
@pytest.mark.parametrize("match", ["any", "all"])
async def test_a_long_query_is_bounded(session: AsyncSession, unit: str, match: Any) -> None:
    wanted, *_ = await write(session, unit * 20 + " end", *["filler 雨 text"] * 20)
    for length in (10_000, 1_000_000):
        query = (unit * (length // len(unit) + 1))[:length]
        result = await asyncio.wait_for(find(session, query, match=match, top_k=1), 60)
        assert ids(result) == [wanted]


async def test_different_words_by_the_thousand(session: AsyncSession) -> None:
    query = " ".join(f"word{number}" for number in range(100_000))
    (wanted,) = await write(session, query[:10_000])
    assert await found(session, query) == [wanted]
    assert await found(session, query, match="all") == [wanted]
    assert await found(session, f"zeppelin {query}", match="all") == []
    assert await found(session, f'"{query[:4_000]}"') == [wanted]


async def test_complete_means_that_every_word_was_looked_for(session: AsyncSession) -> None:
    await write(session, *[f"word{number} filler" for number in range(70)])
    for count, complete in ((1, True), (8, True), (9, True), (64, True), (65, False), (70, False)):
        query = " ".join(f"word{number}" for number in range(count))
        result = await find(session, query, top_k=100)
        assert (len(result.hits), result.complete) == (min(count, 64), complete)
        # With as many hits as asked for nothing is missing.
        result = await find(session, query, top_k=1)
        assert (len(result.hits), result.complete) == (1, True)
    assert (await find(session, "nothing here")).complete


async def test_light_words_are_looked_for_where_the_heavy_ones_find_too_little(session: AsyncSession) -> None:
    heavy = "zeppelin quagga obelisk fjord axolotl sphinx nimbus kelp"
    one, *light = await write(session, f"{heavy} common", *["common"] * 20)
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    assert await found(session, f"{heavy} common", top_k=1) == [one]
    result = await find(session, f"{heavy} common", top_k=30)
    assert summary(result) == ([one, *light], "words", True)


# The whole ranking


async def library(session: AsyncSession, *, count: int = 60, seed: int = 1) -> list[Known]:
    rng = random.Random(seed)
    known = []
    for _ in range(count // 3):
        title = random_text(rng, 2)
        texts = [random_text(rng, rng.randrange(1, 25)) for _ in range(3)]
        chunk_ids = await write(session, *texts, title=title)
        known += [Known.of(i, title, content) for i, content in zip(chunk_ids, texts, strict=True)]
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    return known


@pytest.mark.parametrize("match", ["any", "all"])
async def test_the_ranking_is_that_of_a_plain_reading(session: AsyncSession, match: Any) -> None:
    rng = random.Random(5)
    known = await library(session)
    counted = await frequencies(session)
    seen = 0
    for _ in range(150):
        query = random_text(rng, rng.choice([1, 1, 2, 3, 5, 12]))
        expected = ranked(known, query, counted, match)
        result = await find(session, query, match=match, top_k=100)
        assert result.complete
        assert ids(result) == [chunk_id for _, chunk_id in expected], query
        assert [hit.score for hit in result.hits] == pytest.approx([score for score, _ in expected], abs=1e-5)
        seen += len(expected) > 1
    assert seen > 40


async def test_pages_are_disjoint_and_add_up(session: AsyncSession) -> None:
    await library(session)
    rng = random.Random(8)
    for _ in range(20):
        query = random_text(rng, 4)
        whole = await found(session, query, top_k=100)
        for size in (1, 7, 20):
            pages = [await found(session, query, top_k=size, offset=at) for at in range(0, len(whole) + size, size)]
            assert [chunk_id for page in pages for chunk_id in page] == whole
        assert await found(session, query, offset=990) == []


@pytest.mark.parametrize(
    "query", ["tower", "tower night", "雨", "tower night view dog cat n1 n2 n3 n4 n5", "rare tower"]
)
async def test_pages_of_very_many_are_disjoint_and_add_up(session: AsyncSession, query: str) -> None:
    """More than are ranked by all terms at once, some found only by going on with lighter words."""
    rng = random.Random(1)
    texts = [
        " ".join([*rng.choices(["tower", "night", "view", "dog", "cat", "雨"], k=3), f"n{number}"])
        for number in range(400)
    ]
    await write(session, *texts, "rare", "rare dog")
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    whole = await find(session, query, top_k=500)
    assert len(whole.hits) > 100
    scores = [hit.score for hit in whole.hits]
    assert scores == sorted(scores, reverse=True)
    for size in (10, 90, 200):
        pages = [await found(session, query, top_k=size, offset=at) for at in range(0, len(scores) + size, size)]
        assert [chunk_id for page in pages for chunk_id in page] == ids(whole)


async def test_a_word_that_no_sampled_chunk_has_is_thought_to_be_in_half_a_one(session: AsyncSession) -> None:
    await write(session, *["common"] * 250, "zeppelin")
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    counted = await frequencies(session)
    assert "zeppelin" not in counted
    [hit] = (await find(session, "zeppelin")).hits
    assert hit.score == pytest.approx(math.log(1 + counted[""]))


@pytest.mark.role("superuser")
async def test_equals_are_ordered_by_id_across_pages(session: AsyncSession) -> None:
    chunk_ids = await write(session, *["同じ 雨"] * 250)
    # So that the order on disk is another.
    await session.execute(text("UPDATE chunk_terms SET folded = folded WHERE chunk_id % 3 = 0"))
    for query in ("雨", "同じ 雨", '"同じ 雨"'):
        assert await found(session, query, top_k=250) == chunk_ids
        pages = [await found(session, query, top_k=50, offset=at) for at in range(0, 300, 50)]
        assert [chunk_id for page in pages for chunk_id in page] == chunk_ids


# Filters


async def test_each_kind_of_filter(session: AsyncSession) -> None:
    common: dict[str, Any] = {"channel_id": 2, "thread_id": 3, "user_id": 4, "session_key": "one"}
    (mine,) = await write(
        session,
        "雨",
        source_type=SourceType.DOCUMENT_FILE,
        metadata={"a": 1},
        occurred=(JUNE, JUNE),
        **common,
    )
    await write(session, "雨", guild_id=9, channel_id=9, thread_id=9, user_id=9, metadata={"a": 2})
    source_id = (await session.execute(text("SELECT max(source_id) - 1 FROM knowledge_chunks"))).scalar_one()
    fields: list[dict[str, Any]] = [
        *({name: value} for name, value in (("guild_id", 1), ("channel_id", 2), ("thread_id", 3), ("user_id", 4))),
        {"guild_id": 1, "channel_id": 2, "user_id": 4},
        {"source_ids": [source_id]},
        {"source_types": ["document_file"]},
        {"since": JUNE},
        {"until": JUNE + DAY},
        {"metadata": {"a": 1}},
        {"session_keys": ["one"]},
        {"guild_id": 1, "since": JUNE, "metadata": {"a": 1}},
    ]
    for each in fields:
        wanted = SearchFilters(**each)
        for query in ("雨", '"雨"', '"雨" x'):
            assert await found(session, query, filters=wanted, everywhere=True) == [mine]
        assert mine not in await found(session, "雨", filters=~wanted, everywhere=True)
    assert await found(session, "雨", filters=SearchFilters(models=["m"]), everywhere=True) == []


@pytest.mark.parametrize("query", ["chunk", '"a ch"', '"chunk" source', "chunk source -"])
async def test_any_combination_of_filters(session: AsyncSession, world: list[Row], query: str) -> None:
    await fill_terms(await session.connection())
    wanted_trees: list[AnyFilters] = []
    source_ids = st.sampled_from([row.source_id for row in world[:6]])

    @unhurried
    @given(trees(source_ids) | scoped_trees(source_ids))
    def collect(wanted: AnyFilters) -> None:
        wanted_trees.append(wanted)

    collect()
    seen = 0
    for wanted in wanted_trees[::5]:
        expected = sorted(row.id for row in world if meets(row, wanted))
        result = await find(session, query, filters=wanted, everywhere=True, top_k=100)
        assert summary(result) == (expected, "words", True), wanted
        seen += 0 < len(expected) < len(world)
    assert seen > 10


async def test_what_others_have_takes_no_room(session: AsyncSession) -> None:
    """More of theirs than are ranked, all of them older and better."""
    await write(session, *["雨 rain rain"] * 300, guild_id=2)
    mine = await write(session, *["雨 rain"] * 5)
    for filters in (GUILD, GUILD & SearchFilters(metadata={}), ~SearchFilters(guild_id=2)):
        for query in ("雨", "rain 雨", '"ain"', '"雨" rain'):
            assert await found(session, query, filters=filters, everywhere=True) == mine


@pytest.mark.role("superuser")
async def test_the_filters_decide_whatever_the_terms_of_the_scope_say(session: AsyncSession) -> None:
    mine = await write(session, *["secret 雨"] * 5)
    theirs = await write(session, *["secret 雨"] * 5, guild_id=2)
    await session.execute(
        text("UPDATE chunk_terms SET terms = (terms::text || ' ''#guild_id=1''')::tsvector WHERE chunk_id = ANY(:ids)"),
        {"ids": theirs},
    )
    wider = [GUILD, GUILD & SearchFilters(source_types=["web_page"]), GUILD | SearchFilters(guild_id=3)]
    for filters in (*wider, GUILD & ~SearchFilters(guild_id=2), SearchFilters(guild_id=1, metadata={})):
        for query in ("secret", "雨", "secret 雨", '"secret"', '"ecre"', '"secret" 雨', '"ret 雨"'):
            for match in ("any", "all"):
                assert await found(session, query, match=match, filters=filters, top_k=100) == mine
    assert await found(session, "secret", filters=SearchFilters(guild_id=2)) == theirs


# Around it


async def test_chunks_without_a_vector_are_found(session: AsyncSession) -> None:
    (waiting,) = await write(session, "雨 rain")
    source_id = (await session.execute(text("SELECT max(id) FROM knowledge_sources"))).scalar_one()
    chunk = NewChunk("雨 rain", embedding=vectors(1)[0], embedding_model="any model")
    (embedded,) = await KnowledgeRepository(session).add_chunks(source_id, [chunk])
    result = await find(session, "雨")
    assert ids(result) == [waiting, embedded]
    assert [hit.similarity for hit in result.hits] == [None, None]
    assert result.timings.database > 0
    assert result.timings.embedding == 0


async def test_what_is_deleted_is_not_found_and_a_new_title_is(store: Store) -> None:
    await store.add_document("first title", "雨の話", uri="https://example.com", guild_id=1)
    assert len((await store.search("first", mode="words", filters=GUILD)).hits) == 1
    again = await store.add_document("second title", "雨の話", uri="https://example.com", guild_id=1)
    assert (await store.search("first", mode="words", filters=GUILD)).hits == ()
    [hit] = (await store.search("second", mode="words", filters=GUILD)).hits
    assert (hit.title, hit.url, hit.source_type) == ("second title", "https://example.com", "document_file")
    async with store.begin() as tx:
        await tx.knowledge.delete_source(again.source_id)
    assert (await store.search("雨", mode="words", filters=GUILD)).hits == ()


async def test_an_empty_database_has_nothing(store: Store) -> None:
    for query in ("雨", '"雨"', "rain 雨", '"ai"'):
        for match in ("any", "all"):
            result = await store.search(query, mode="words", match=match, everywhere=True)
            assert summary(result) == ([], "words", True)


async def test_a_store_without_an_embedder_finds_words(settings: Any) -> None:
    async with Store.open(settings) as store:
        await store.add_document("title", "雨の話", guild_id=1)
        [hit] = (await store.search("雨の話", mode="words", filters=GUILD)).hits
        assert hit.content == "雨の話"


async def test_a_database_that_was_not_migrated_is_named_as_such(empty_url: URL) -> None:
    async with Store.open(settings_for(empty_url), embedder=HashingEmbedder()) as store:
        for filters in (None, GUILD):
            with pytest.raises(SchemaOutdatedError, match="migrate"):
                await store.search("雨", mode="words", filters=filters, everywhere=True)
        await store.migrate()
        await store.add_document("title", "雨の話", guild_id=1)
        assert len((await store.search("雨", mode="words", filters=GUILD)).hits) == 1


@pytest.mark.role("superuser")
@pytest.mark.parametrize("mode", ["words", "hybrid"])
async def test_a_database_before_the_words_is_named_as_such(store: Store, mode: Any) -> None:
    async with store.begin() as tx:
        await tx.session.execute(text("DROP TABLE chunk_terms"))
    with pytest.raises(SchemaOutdatedError, match="migrate"):
        await store.search("雨", mode=mode, filters=GUILD)


async def test_a_read_only_transaction_can_search(migrated_url: URL) -> None:
    async with Database(migrated_url, settings_for(migrated_url)) as database:
        async with database.begin() as session:
            (chunk_id,) = await write(session, "雨 rain")
        async with database.begin() as session:
            await session.execute(text("SET TRANSACTION READ ONLY"))
            for query in ("雨", "rain 雨", '"ain"'):
                assert await found(session, query) == [chunk_id]


async def test_a_transaction_finds_what_it_wrote_itself(store: Store) -> None:
    async with store.begin() as tx:
        (chunk_id,) = await write(tx.session, "雨 rain")
        for query in ("雨", '"ain"', "rain"):
            assert ids(await tx.search.matching(query, filters=GUILD)) == [chunk_id]
            assert (await store.search(query, mode="words", filters=GUILD)).hits == ()
    assert ids(await store.search("雨", mode="words", filters=GUILD)) == [chunk_id]


async def test_many_search_at_once(store: Store) -> None:
    async with store.begin() as tx:
        chunk_ids = [(await write(tx.session, f"word{n} 雨", guild_id=n % 5))[0] for n in range(20)]

    async def search(number: int) -> None:
        filters = SearchFilters(guild_id=number % 5)
        result = await store.search(f"word{number}", mode="words", filters=filters)
        assert ids(result) == [chunk_ids[number]]

    await asyncio.gather(*map(search, [*range(20)] * 3))


async def test_a_search_is_one_round_trip_when_enough_is_found(migrated_url: URL) -> None:
    async with watched_store(migrated_url) as (store, sent):
        async with store.begin() as tx:
            await write(tx.session, *["rain 雨"] * 20)
        await sent.taken()
        for query, match in (("雨", "any"), ("rain 雨", "any"), ("rain 雨", "all"), ('"rain" 雨', "any")):
            await store.search(query, mode="words", match=match, filters=GUILD)
            await sent.taken()
            for options in ({"filters": GUILD}, {"everywhere": True}):
                result = await store.search(query, mode="words", match=match, **options)
                assert (len(result.hits), await sent.taken()) == (10, 1)


async def test_searches_by_one_plan_for_all_parameters_are_right(migrated_url: URL) -> None:
    for mode in ("auto", "force_generic_plan"):
        async with watched_store(migrated_url) as (store, _):
            async with store.database.driver() as connection:
                await connection.execute(f"SET plan_cache_mode = {mode}")
            async with store.begin() as tx:
                stored = [
                    (await write(tx.session, f"item{n} 雨{n}", guild_id=n, title=mode, channel_id=len(mode)))[0]
                    for n in range(1, 10)
                ]
            channel = len(mode)
            for number, chunk_id in enumerate(stored, 1):
                filters = SearchFilters(guild_id=number, channel_id=channel)
                for query in (f"item{number}", f'"item{number}"', '"tem"', "雨", f"雨 item{number}", '"雨" item1'):
                    result = await store.search(query, mode="words", filters=filters)
                    assert summary(result) == ([chunk_id], "words", True)


async def test_a_search_names_no_other_modes_options(store: Store) -> None:
    wrong: list[dict[str, Any]] = [
        {"mode": "words", "threshold": 0.5},
        {"mode": "words", "diversity": 0.5},
        {"mode": "meaning", "match": "all"},
        {"mode": "hybrid", "match": "all"},
        {"mode": "magic"},
        {"mode": None},
    ]
    for options in wrong:
        with pytest.raises(InvalidInputError, match=r"mode|meaning"):
            await store.search("雨", everywhere=True, **options)
    for mode in ("words", "hybrid"):
        with pytest.raises(InvalidInputError, match="as text"):
            await store.search(vectors(1)[0], mode=mode, everywhere=True)


@pytest.mark.parametrize("match", ["any", "all"])
async def test_one_character_beside_another_word(session: AsyncSession, match: Any) -> None:
    (chunk_id,) = await write(session, "雨の日の傘立て")
    result = await find(session, "雨 傘", match=match)
    assert ids(result) == [chunk_id]


async def test_scopes_that_contradict_each_other_find_nothing(session: AsyncSession) -> None:
    await write(session, "雨")
    assert await found(session, "雨", filters=GUILD & SearchFilters(guild_id=2)) == []
    assert await found(session, "雨", filters=GUILD & GUILD) != []
    assert (await KnowledgeRepository(session).add_source(SourceType.WEB_PAGE, "t", scope=Scope(guild_id=1))) > 0
