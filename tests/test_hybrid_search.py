"""Meaning and words fused, against a plain computation; hits that differ, and their neighbours."""

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from searching import GUILD, MODEL, OTHER, Vectors, add, ids, similarities, summary, vectors, watched_store
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession
from word_reference import random_text

from kotonoha_store import (
    Fusion,
    InvalidInputError,
    InvalidVectorError,
    KnowledgeChunk,
    KnowledgeSource,
    ModelMismatchError,
    SearchFilters,
    SearchRepository,
    SearchResult,
    SourceType,
    Store,
)
from kotonoha_store.words import parse_query

pytestmark = pytest.mark.role("app")

Place = tuple[int, int | None]


def fused(
    meaning: Sequence[int], words: Sequence[int], places: Mapping[int, Place], fusion: Fusion
) -> list[tuple[float, int]]:
    """Weighted reciprocal ranks; what stands beside something better in its source loses a part."""
    by_meaning = {chunk_id: fusion.meaning / (fusion.k + rank) for rank, chunk_id in enumerate(meaning, 1)}
    by_words = {chunk_id: fusion.words / (fusion.k + rank) for rank, chunk_id in enumerate(words, 1)}
    score = {i: by_meaning.get(i, 0.0) + by_words.get(i, 0.0) for i in {*by_meaning, *by_words}}
    of_source = defaultdict(list)
    for chunk_id in sorted(score):
        source, number = places[chunk_id]
        if number is not None:
            of_source[source].append((number, chunk_id))
    better: dict[int, int] = defaultdict(int)
    for numbered in of_source.values():
        numbered.sort()
        for (number, one), (after, other) in pairwise(numbered):
            if after == number + 1:
                # Of equals the later one.
                better[other if score[one] >= score[other] else one] += 1
    kept = 1 - fusion.neighbour_penalty
    return sorted(((value * kept ** better[i], i) for i, value in score.items()), key=lambda pair: (-pair[0], pair[1]))


async def places_of(session: AsyncSession) -> dict[int, Place]:
    rows = await session.execute(text("SELECT id, source_id, location FROM knowledge_chunks"))
    return {row.id: (row.source_id, row.location.get("chunk_index")) for row in rows}


class Corpus:
    """120 chunks of 20 sources: some not embedded, some by another model, some that do not say where they stand."""

    def __init__(self) -> None:
        self.vectors: dict[int, Vectors] = {}

    @classmethod
    async def stored(cls, session: AsyncSession) -> "Corpus":
        rng = random.Random(3)
        pool, corpus = iter(vectors(200, seed=5)), cls()
        for source in range(20):
            model = OTHER if source % 7 == 3 else MODEL
            embeddings = [next(pool) if rng.random() < 0.8 else None for _ in range(6)]
            chunk_ids = await add(
                session,
                embeddings,
                texts=[random_text(rng, rng.randrange(2, 20)) for _ in range(6)],
                model=model,
                locations=[{"chunk_index": n // (1 + source % 2)} if source % 5 else {} for n in range(6)],
                guild_id=1 + source % 4 // 3,
            )
            if model == MODEL:
                corpus.vectors |= {i: v for i, v in zip(chunk_ids, embeddings, strict=True) if v is not None}
        await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
        return corpus

    def similarity(self, chunk_id: int, query: Vectors) -> float | None:
        vector = self.vectors.get(chunk_id)
        return None if vector is None else float(similarities(vector[np.newaxis], query)[0])


@pytest.fixture
async def corpus(session: AsyncSession) -> Corpus:
    return await Corpus.stored(session)


async def hybrid(session: AsyncSession, query: str, vector: Vectors, **options: Any) -> SearchResult:
    options = {"filters": GUILD, "model": MODEL, **options}
    return await SearchRepository(session).hybrid(query, vector, **options)


# The fusion


async def test_the_fusion_is_that_of_a_plain_computation(session: AsyncSession, corpus: Corpus) -> None:
    rng = random.Random(9)
    places, repository = await places_of(session), SearchRepository(session)
    seen = 0
    for seed in range(120):
        query, vector = random_text(rng, rng.choice([1, 2, 3])), vectors(1, seed=100 + seed)[0]
        if len(parse_query(query).terms) > 8:
            continue
        fusion = Fusion(
            words=rng.choice([0, 0.5, 1, 3]) if seed % 3 else 1,
            meaning=rng.choice([0.1, 0.6, 1]) if seed % 3 else 0,
            k=rng.choice([0, 10, 60]),
            candidates=rng.choice([5, 20, 200]),
            neighbour_penalty=rng.choice([0, 0.15, 1]),
        )
        scope: dict[str, Any] = rng.choice([{"filters": GUILD}, {"filters": None, "everywhere": True}])
        top_k = rng.choice([3, 10, 200])
        count = max(fusion.candidates, top_k)
        meaning = await repository.nearest(vector, model=MODEL, top_k=count, effort="exact", **scope)
        words = await repository.matching(query, top_k=count, **scope)
        expected = fused(ids(meaning), ids(words), places, fusion)[:top_k]
        result = await hybrid(session, query, vector, top_k=top_k, fusion=fusion, effort="exact", **scope)
        assert ids(result) == [chunk_id for _, chunk_id in expected], (query, fusion)
        assert [hit.score for hit in result.hits] == pytest.approx([score for score, _ in expected], abs=1e-12)
        assert (result.plan, result.complete, result.model) == ("hybrid", True, MODEL)
        for hit in result.hits:
            # What only the words found as well; None where there is nothing to compare.
            wanted = corpus.similarity(hit.chunk_id, vector)
            assert hit.similarity == (None if wanted is None else pytest.approx(wanted, abs=1e-6))
        seen += bool({*ids(words)} - {*ids(meaning)})
    assert seen > 20


async def test_of_equal_neighbours_the_later_one_loses(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    locations = [{"chunk_index": 0}, {"chunk_index": 1}]
    by_meaning, by_words = await add(
        session, [vector, None], texts=["something", "雨"], locations=locations, guild_id=1
    )
    fusion = Fusion(words=1, meaning=1, k=9, neighbour_penalty=0.5)
    result = await hybrid(session, "雨", vector, fusion=fusion)
    assert [(hit.chunk_id, hit.score) for hit in result.hits] == [(by_meaning, 0.1), (by_words, 0.05)]


async def test_a_weight_of_zero_leaves_the_other_sides_order(session: AsyncSession, corpus: Corpus) -> None:
    repository, vector = SearchRepository(session), vectors(1, seed=7)[0]
    meaning = ids(await repository.nearest(vector, model=MODEL, top_k=20, filters=GUILD))
    words = ids(await repository.matching("東京 tower", top_k=20, filters=GUILD))
    assert set(meaning) != set(words)
    options: dict[str, Any] = {"candidates": 20, "neighbour_penalty": 0}
    only_words = await hybrid(session, "東京 tower", vector, fusion=Fusion(meaning=0, **options), top_k=len(words))
    assert ids(only_words) == words
    only_meaning = await hybrid(session, "東京 tower", vector, fusion=Fusion(words=0, **options), top_k=20)
    assert ids(only_meaning) == meaning


async def test_pages_are_disjoint_and_add_up(session: AsyncSession, corpus: Corpus) -> None:
    fusion = Fusion(candidates=200)
    for seed, query in enumerate(["東京 tower", "雨", '"東京" 夜景', "nothing like it"]):
        vector = vectors(1, seed=seed)[0]
        whole = ids(await hybrid(session, query, vector, top_k=200, fusion=fusion))
        assert len(set(whole)) == len(whole) > 60
        for size in (7, 30):
            pages = [
                await hybrid(session, query, vector, top_k=size, offset=at, fusion=fusion)
                for at in range(0, len(whole) + size, size)
            ]
            assert [chunk_id for page in pages for chunk_id in ids(page)] == whole
            assert all(page.complete for page in pages)


async def test_later_pages_fuse_as_many_as_they_need(session: AsyncSession, corpus: Corpus) -> None:
    vector, fusion = vectors(1)[0], Fusion(candidates=10, words=0, neighbour_penalty=0)
    meaning = await SearchRepository(session).nearest(vector, model=MODEL, top_k=200, filters=GUILD)
    for offset in (0, 10, 20, 40):
        page = await hybrid(session, "zzzz", vector, offset=offset, fusion=fusion)
        assert summary(page) == (ids(meaning)[offset : offset + 10], "hybrid", True)
    assert summary(await hybrid(session, "雨", vector, offset=200, fusion=fusion)) == ([], "hybrid", True)


async def test_pages_beyond_the_candidates_are_those_of_a_longer_result(session: AsyncSession, corpus: Corpus) -> None:
    """By default fifty of each side are fused; later pages fuse more."""
    vector = vectors(1, seed=6)[0]
    for offset in (0, 45, 60, 70):
        longer = await hybrid(session, "東京 tower 雨", vector, top_k=offset + 10)
        page = await hybrid(session, "東京 tower 雨", vector, offset=offset)
        assert summary(page) == (ids(longer)[offset:], "hybrid", True)
        assert len(page.hits) == 10


async def test_without_words_to_look_for_meaning_alone_is_left(session: AsyncSession, corpus: Corpus) -> None:
    vector, none = vectors(1, seed=3)[0], Fusion(neighbour_penalty=0)
    meaning = await SearchRepository(session).nearest(vector, model=MODEL, filters=GUILD)
    for query in ("!?", "。", "zzzz"):
        result = await hybrid(session, query, vector, fusion=none)
        assert ids(result) == ids(meaning)
        assert [hit.similarity for hit in result.hits] == [hit.similarity for hit in meaning.hits]


async def test_the_threshold_hides_what_is_less_similar(session: AsyncSession, corpus: Corpus) -> None:
    vector = vectors(1, seed=4)[0]
    every = await hybrid(session, "東京 tower 雨", vector, top_k=50)
    known = sorted(hit.similarity for hit in every.hits if hit.similarity is not None)
    middle = known[len(known) // 2]
    result = await hybrid(session, "東京 tower 雨", vector, top_k=50, threshold=middle)
    assert result.hits == tuple(hit for hit in every.hits if hit.similarity is None or hit.similarity >= middle)
    assert result.hidden_by_threshold == len(every.hits) - len(result.hits) > 0


async def test_a_phrase_must_occur_in_what_the_words_find(session: AsyncSession) -> None:
    vector, far = vectors(2)
    near, with_phrase, without = await add(
        session, [vector, None, None], texts=["something", "night view of Tokyo", "Tokyo: view at night"], guild_id=1
    )
    await add(session, [far], texts=["night view"], guild_id=2)
    assert set(ids(await hybrid(session, '"night view" Tokyo', vector))) == {near, with_phrase}
    assert set(ids(await hybrid(session, "night view Tokyo", vector))) == {near, with_phrase, without}


async def test_a_phrase_within_a_word_is_looked_for_where_the_guess_finds_too_little(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    within, beginning = await add(session, [None, None], texts=["a watchtower", "a tower"], guild_id=1)
    assert summary(await hybrid(session, '"tower"', vector)) == ([beginning, within], "hybrid", True)
    assert ids(await hybrid(session, '"tower"', vector, top_k=1)) == [beginning]


async def test_light_words_are_looked_for_where_the_heavy_ones_find_too_little(session: AsyncSession) -> None:
    heavy, vector = "zeppelin quagga obelisk fjord axolotl sphinx nimbus kelp", vectors(1)[0]
    texts = [f"{heavy} common", *["common"] * 20]
    one, *light = await add(session, [None] * len(texts), texts=texts, guild_id=1)
    await session.execute(text("SELECT kotonoha_refresh_terms(true)"))
    assert ids(await hybrid(session, f"{heavy} common", vector, top_k=1)) == [one]
    assert summary(await hybrid(session, f"{heavy} common", vector, top_k=30)) == ([one, *light], "hybrid", True)


async def test_more_words_than_are_looked_for_may_hide_something(session: AsyncSession) -> None:
    texts = [f"word{number}" for number in range(70)]
    await add(session, [None] * len(texts), texts=texts, guild_id=1)
    for count, complete in ((64, True), (65, False)):
        result = await hybrid(session, " ".join(texts[:count]), vectors(1)[0], top_k=100)
        assert (len(result.hits), result.complete) == (64, complete)


async def test_what_only_a_second_look_finds_is_no_mismatch_of_models(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    (within,) = await add(session, [vector], texts=["a watchtower"], guild_id=1, model=OTHER)
    assert ids(await hybrid(session, '"tower"', vector)) == [within]
    with pytest.raises(ModelMismatchError, match=OTHER):
        await hybrid(session, '"castle"', vector)


async def test_other_models_and_what_waits_have_no_similarity(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    (waiting,) = await add(session, [None], texts=["雨 waits"], guild_id=1)
    (other,) = await add(session, [vector], texts=["雨 other"], guild_id=1, model=OTHER)
    result = await hybrid(session, "雨", vector)
    assert [(hit.chunk_id, hit.similarity) for hit in result.hits] == [(waiting, None), (other, None)]
    assert [hit.chunk_id for hit in (await hybrid(session, "雨", vector, threshold=0.9)).hits] == [waiting, other]
    # Found by neither: the reason is named.
    with pytest.raises(ModelMismatchError, match=OTHER):
        await hybrid(session, "nothing", vector)
    assert (await hybrid(session, "nothing", vector, filters=SearchFilters(guild_id=5))).hits == ()


@pytest.mark.role("superuser")
async def test_no_chunk_of_others_is_fused(session: AsyncSession, corpus: Corpus) -> None:
    await session.execute(
        text("UPDATE chunk_terms SET terms = (terms::text || ' ''#guild_id=1''')::tsvector WHERE terms::text !~ 'd=1'")
    )
    found = set()
    for query in ("東京", '"東京"', '"o" tower', "the"):
        result = await hybrid(session, query, vectors(1)[0], top_k=200, fusion=Fusion(candidates=1000))
        found |= set(ids(result))
    rows = await session.execute(text("SELECT guild_id FROM knowledge_chunks WHERE id = ANY(:ids)"), {"ids": [*found]})
    assert set(rows.scalars()) == {1}


# What is refused


@pytest.mark.parametrize("name", ["words", "meaning", "k", "neighbour_penalty", "candidates"])
@pytest.mark.parametrize("value", [math.nan, -1, -1e-9, math.inf, -math.inf, 2**63, True, "1", None, 1j, [1], b"1"])
def test_a_fusion_is_of_numbers_in_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=name):
        Fusion(**{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"neighbour_penalty": 1.01},
        {"candidates": 0},
        {"candidates": 1001},
        {"candidates": 5.0},
        {"k": 1e6 + 1},
        {"words": 0, "meaning": 0},
    ],
)
def test_a_fusion_has_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Fusion(**values)


@pytest.mark.parametrize(
    "fusion",
    [
        Fusion(words=0, meaning=1e6, k=0, candidates=1, neighbour_penalty=1),
        Fusion(words=1e6, meaning=0, k=1e6, candidates=1000, neighbour_penalty=0),
        Fusion(words=np.float64(1), meaning=np.float32(0.5)),  # type: ignore[arg-type]
    ],
)
async def test_a_fusion_may_be_at_its_bounds(session: AsyncSession, corpus: Corpus, fusion: Fusion) -> None:
    result = await hybrid(session, "東京 tower", vectors(1)[0], fusion=fusion, top_k=5)
    assert len(result.hits) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k"),
        ({"offset": 999, "top_k": 2}, "offset"),
        ({"diversity": 0.5, "offset": 1}, "one page"),
        ({"diversity": 1.1}, "diversity"),
        ({"diversity": "0.5"}, "diversity"),
        ({"diversity": math.nan}, "diversity"),
        ({"diversity": True}, "diversity"),
        ({"effort": "hard"}, "effort"),
        ({"effort": None}, "effort"),
        ({"threshold": 2}, "threshold"),
        ({"neighbours": 21}, "neighbours"),
        ({"neighbours": 1.0}, "neighbours"),
        ({"filters": None}, "everywhere"),
        ({"filters": {"guild_id": 1}}, "filters must be"),
        ({"model": 5}, "model"),
    ],
    ids=str,
)
async def test_options_out_of_range_are_refused(session: AsyncSession, options: dict[str, Any], said: str) -> None:
    vector = vectors(1)[0]
    with pytest.raises(InvalidInputError, match=said):
        await hybrid(session, "雨", vector, **options)
    if "filters" not in options:
        with pytest.raises(InvalidInputError, match=said):
            await SearchRepository(session).nearest(vector, **{"model": MODEL, "filters": GUILD, **options})


async def test_what_cannot_be_asked_is_refused(session: AsyncSession) -> None:
    for query in ("", " \n", "\x00", None):
        with pytest.raises(InvalidInputError, match="query"):
            await hybrid(session, query, vectors(1)[0])  # type: ignore[arg-type]
    for vector in (np.ones(768), np.zeros(1536), np.full(1536, np.nan), None):
        with pytest.raises(InvalidVectorError):
            await hybrid(session, "雨", vector)  # type: ignore[arg-type]


# Round trips


async def test_a_search_is_one_round_trip(migrated_url: URL) -> None:
    async with watched_store(migrated_url) as (store, sent):
        async with store.begin() as tx:
            await Corpus.stored(tx.session)
        vector = vectors(1)[0]
        async with store.database.driver() as connection:
            search = store._search(connection)
            # Counts what the filter keeps.
            await search.hybrid("東京 tower", vector, model=MODEL, filters=GUILD)
            await sent.taken()
            for options in ({}, {"offset": 10}, {"diversity": 0.3}, {"effort": "fast"}, {"fusion": Fusion(k=1)}):
                result = await search.hybrid("東京 tower", vector, model=MODEL, filters=GUILD, **options)
                assert (len(result.hits), await sent.taken()) == (10, 1)
            result = await search.hybrid("東京 tower", vector, model=MODEL, filters=GUILD, neighbours=2)
            assert (len(result.hits), await sent.taken()) == (10, 2)
            result = await search.hybrid("東京 tower", vector, model=MODEL, everywhere=True)
            assert (len(result.hits), await sent.taken()) == (10, 1)


@pytest.mark.role("app", "worker")
async def test_a_store_fuses_both(store: Store) -> None:
    for number, content in enumerate(["梅雨前線の北上", "puppies and kittens", "梅雨が明けた"]):
        await store.add_document(f"title {number}", content, guild_id=1)
    waiting = await store.search("梅雨", mode="hybrid", filters=GUILD)
    assert [hit.similarity for hit in waiting.hits] == [None, None]
    await store.embedding_worker.run_until_empty()
    result = await store.search("梅雨", mode="hybrid", filters=GUILD)
    assert [hit.content[:2] for hit in result.hits[:2]] == ["梅雨", "梅雨"]
    assert len(result.hits) == 3
    assert all(hit.similarity is not None for hit in result.hits)
    assert result.timings.embedding > 0
    assert result.timings.database > 0
    assert result.model == store.embedder.model


async def test_searches_by_one_plan_for_all_parameters_are_right(migrated_url: URL) -> None:
    async with watched_store(migrated_url) as (store, _):
        async with store.begin() as tx:
            await Corpus.stored(tx.session)
            places = await places_of(tx.session)
        for mode in ("auto", "force_generic_plan"):
            async with store.database.driver() as connection:
                await connection.execute(f"SET plan_cache_mode = {mode}")
                search = store._search(connection)
                for seed in range(8):
                    vector, query = vectors(1, seed=seed)[0], ["東京", "tower", "雨 of"][seed % 3]
                    meaning = await search.nearest(vector, model=MODEL, top_k=50, filters=GUILD)
                    words = await search.matching(query, top_k=50, filters=GUILD)
                    expected = fused(ids(meaning), ids(words), places, Fusion())
                    result = await search.hybrid(query, vector, model=MODEL, filters=GUILD)
                    assert ids(result) == [chunk_id for _, chunk_id in expected[:10]]


# Hits that differ


async def test_diversity_brings_other_hits(session: AsyncSession) -> None:
    centres = np.random.default_rng(1).standard_normal((3, 1536))
    noise = np.random.default_rng(2).standard_normal((30, 1536)) * 0.05
    stored = (np.repeat(centres, 10, axis=0) + noise).astype(np.float32)
    query = (centres[0] + 0.6 * centres[1] + 0.5 * centres[2]).astype(np.float32)
    chunk_ids = await add(session, stored, texts=[f"word{n // 10}" for n in range(30)], guild_id=1)
    group = {chunk_id: n // 10 for n, chunk_id in enumerate(chunk_ids)}
    repository = SearchRepository(session)

    async def groups(**options: Any) -> list[int]:
        by_meaning = await repository.nearest(query, model=MODEL, top_k=3, filters=GUILD, **options)
        by_both = await hybrid(session, "word0 word1 word2", query, top_k=3, **options)
        assert (len(by_meaning.hits), by_meaning.complete, by_both.complete) == (3, True, True)
        assert len(by_both.hits) == 3
        if options.get("diversity"):
            assert {group[i] for i in ids(by_both)} == {0, 1, 2}
        return [group[i] for i in ids(by_meaning)]

    assert await groups() == [0, 0, 0]
    assert await groups(diversity=0.0) == [0, 0, 0]
    assert sorted(await groups(diversity=0.7)) == [0, 1, 2]
    plain = await repository.nearest(query, model=MODEL, top_k=5, filters=GUILD)
    assert await repository_ids(repository, query, diversity=0.0) == ids(plain)


async def repository_ids(repository: SearchRepository, query: Vectors, **options: Any) -> list[int]:
    return ids(await repository.nearest(query, model=MODEL, top_k=5, filters=GUILD, **options))


async def test_what_cannot_be_compared_is_no_part_of_a_diverse_result(session: AsyncSession) -> None:
    stored = vectors(4)
    with_vectors = await add(session, stored, texts=["雨"] * 4, guild_id=1)
    await add(session, [None, None], texts=["雨", "雨"], guild_id=1)
    enough = await hybrid(session, "雨", stored[0], top_k=4, diversity=0.5)
    assert set(ids(enough)) == set(with_vectors)
    assert enough.complete
    # Two more there are.
    result = await hybrid(session, "雨", stored[0], top_k=5, diversity=0.5)
    assert set(ids(result)) == set(with_vectors)
    assert not result.complete
    nearest = await SearchRepository(session).nearest(stored[0], model=MODEL, top_k=5, filters=GUILD, diversity=0.5)
    assert (set(ids(nearest)), nearest.complete) == (set(with_vectors), True)
    nothing = SearchFilters(guild_id=9)
    assert summary(await hybrid(session, "雨", stored[0], diversity=1.0, filters=nothing)) == ([], "hybrid", True)


async def test_a_vector_of_zeros_that_others_wrote_is_not_found(session: AsyncSession) -> None:
    """Its distance to anything is NaN, which PostgreSQL takes for the greatest number."""
    stored = vectors(3)
    first, zero, third = await add(session, stored, texts=["雨", "雨", "雨"], guild_id=1)
    await session.execute(
        text("UPDATE knowledge_chunks SET embedding = array_fill(0::real, ARRAY[1536])::halfvec WHERE id = :id"),
        {"id": zero},
    )
    nearest = await SearchRepository(session).nearest(stored[0], model=MODEL, filters=GUILD)
    assert ids(nearest) == [first, third]
    diverse = await SearchRepository(session).nearest(stored[0], model=MODEL, filters=GUILD, diversity=0.5)
    assert ids(diverse) == [first, third]
    both = await hybrid(session, "雨", stored[0])
    assert {hit.chunk_id: hit.similarity is None for hit in both.hits} == {first: False, zero: True, third: False}
    assert set(ids(await hybrid(session, "雨", stored[0], diversity=0.5))) == {first, third}


async def test_what_a_transaction_added_by_the_orm_is_found(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    source = KnowledgeSource(type=SourceType.WEB_PAGE, title="a page")
    session.add(source)
    await session.flush()
    session.add(
        KnowledgeChunk(source_id=source.id, content="text", embedding=vector, embedding_model=MODEL, guild_id=1)
    )
    result = await SearchRepository(session).nearest(vector, model=MODEL, filters=GUILD)
    assert [hit.content for hit in result.hits] == ["text"]


# Neighbours


async def row_of(session: AsyncSession, indexes: Sequence[Any], **options: Any) -> dict[str, int]:
    """A source whose chunks have these indexes; only those of ``options["hits"]`` hold the word 雨."""
    hits = options.pop("hits", ())
    texts = [f"{index!r} {'雨' if number in hits else ''}" for number, index in enumerate(indexes)]
    locations = [{} if index is ... else {"chunk_index": index} for index in indexes]
    chunk_ids = await add(
        session, [None] * len(indexes), texts=texts, title="t", locations=locations, **{"guild_id": 1, **options}
    )
    return dict(zip(texts, chunk_ids, strict=True))


async def beside(session: AsyncSession, reach: int, **options: Any) -> list[tuple[list[str], list[str]]]:
    result = await SearchRepository(session).matching("雨", neighbours=reach, **{"filters": GUILD, **options})
    return [
        ([n.content.split()[0] for n in hit.before], [n.content.split()[0] for n in hit.after]) for hit in result.hits
    ]


async def test_neighbours_come_in_order_and_end_with_the_source(session: AsyncSession) -> None:
    await row_of(session, [3, 1, 4, 0, 2, 5], hits=[0])
    await row_of(session, [2, 3, 4], hits=[])
    assert await beside(session, 0) == [([], [])]
    assert await beside(session, 1) == [(["2"], ["4"])]
    assert await beside(session, 2) == [(["1", "2"], ["4", "5"])]
    assert await beside(session, 20) == [(["0", "1", "2"], ["4", "5"])]


async def test_neighbours_at_the_ends_and_hits_beside_each_other(session: AsyncSession) -> None:
    await row_of(session, [0, 1, 2], hits=[0, 1, 2])
    assert await beside(session, 1) == [([], ["1"]), (["0"], ["2"]), (["1"], [])]


async def test_neighbours_are_of_the_same_source_and_say_who_they_are(session: AsyncSession) -> None:
    chunk_ids = await row_of(session, [0, 1], hits=[0])
    await row_of(session, [1], guild_id=2)
    await session.execute(text("UPDATE knowledge_chunks SET embedding_model = 'x'"))
    result = await SearchRepository(session).matching("雨", neighbours=5, filters=GUILD)
    [hit] = result.hits
    [neighbour] = hit.after
    assert (neighbour.chunk_id, neighbour.content, neighbour.location) == (chunk_ids["1 "], "1 ", {"chunk_index": 1})


@pytest.mark.parametrize(
    "odd", ["1", None, ..., [1], {"a": 1}, True, 1e300, -(10**30), 10**400, "'; DROP TABLE x", "NaN"], ids=repr
)
async def test_odd_places_have_no_neighbours(session: AsyncSession, odd: Any) -> None:
    await row_of(session, [0, odd, 2], hits=[1])
    assert await beside(session, 2) == [([], [])]
    assert (await hybrid(session, "雨", vectors(1)[0], neighbours=2)).hits[0].before == ()


async def test_places_between_and_places_twice(session: AsyncSession) -> None:
    await row_of(session, [0, 0.5, 1, 1, 1.5, 2, 2.5, -1], hits=[2])
    assert await beside(session, 1) == [(["0", "0.5"], ["1.5", "2"])]
    huge = SearchFilters(guild_id=3)
    await row_of(session, [2**63, 2**63 + 1, 2**63 + 2], hits=[1], guild_id=3)
    assert await beside(session, 1, filters=huge) == [([str(2**63)], [str(2**63 + 2)])]


@pytest.mark.parametrize("location", ["null", "[]", "5", '"x"', "{}"])
async def test_a_location_that_is_no_object_has_no_place(session: AsyncSession, location: str) -> None:
    await row_of(session, [0, 1, 2], hits=[1])
    await session.execute(text(f"UPDATE knowledge_chunks SET location = '{location}' WHERE content LIKE '1%'"))
    assert await beside(session, 2) == [([], [])]
    await session.execute(text(f"UPDATE knowledge_chunks SET location = '{location}'"))
    result = await hybrid(session, "雨", vectors(1)[0], neighbours=2)
    assert (result.hits[0].before, result.hits[0].location) == ((), {})


async def test_neighbours_of_all_three_ways(session: AsyncSession) -> None:
    stored = vectors(3)
    await add(session, stored, texts=["a", "b 雨", "c"], locations=[{"chunk_index": n} for n in range(3)], guild_id=1)
    repository = SearchRepository(session)
    results = [
        await repository.nearest(stored[1], model=MODEL, top_k=1, neighbours=1, filters=GUILD),
        await repository.nearest(stored[1], model=MODEL, top_k=1, neighbours=1, filters=GUILD, diversity=0.5),
        await repository.matching("雨", neighbours=1, filters=GUILD),
        await hybrid(session, "雨", stored[1], top_k=1, neighbours=1),
    ]
    for result in results:
        [hit] = result.hits
        assert ([n.content for n in hit.before], [n.content for n in hit.after]) == (["a"], ["c"])
