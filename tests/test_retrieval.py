"""Search by meaning, against numpy and against a plain reading of what each filter says."""

import math
import random
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import numpy as np
import pytest
from conftest import settings_for
from searching import DAY, JUNE, MODEL, OTHER, Vectors, add, ids, similarities, vectors
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    Database,
    HashingEmbedder,
    InvalidInputError,
    InvalidVectorError,
    KnowledgeRepository,
    ModelMismatchError,
    NewChunk,
    SchemaOutdatedError,
    SearchFilters,
    SearchRepository,
    SearchResult,
    Settings,
    SourceType,
    Store,
    StoreUnavailableError,
)
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.search_records import AnyFilters
from kotonoha_store.selectivity import Remembered, Selectivity

pytestmark = pytest.mark.role("app")


async def found(session: AsyncSession, query: Vectors, **filters: Any) -> set[int]:
    repository = SearchRepository(session)
    return set(
        ids(await repository.nearest(query, model=MODEL, top_k=100, filters=SearchFilters(**filters), everywhere=True))
    )


# Distance, order, number


async def test_similarity_is_one_minus_cosine_distance_and_nearest_comes_first(session: AsyncSession) -> None:
    stored, query = vectors(40), vectors(1, seed=1)[0]
    chunk_ids = await add(session, stored, guild_id=1)
    expected = similarities(stored, query)
    order = np.argsort(-expected)[:10]

    result = await SearchRepository(session).nearest(query, model=MODEL, filters=SearchFilters(guild_id=1))

    assert ids(result) == [chunk_ids[i] for i in order]
    np.testing.assert_allclose([hit.similarity for hit in result.hits], expected[order], atol=1e-6)
    assert (result.plan, result.complete, result.hidden_by_threshold, result.model) == ("exact", True, 0, MODEL)


async def test_opposite_vectors_have_similarity_minus_one(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    await add(session, [vector, -vector], guild_id=1)
    result = await SearchRepository(session).nearest(vector, model=MODEL, filters=SearchFilters(guild_id=1))
    assert [hit.similarity for hit in result.hits] == pytest.approx([1, -1])
    assert all(-1 <= hit.similarity <= 1 for hit in result.hits)


async def test_equal_distances_are_ordered_by_id(session: AsyncSession) -> None:
    near, far = vectors(2)
    chunk_ids = await add(session, [far, near, near, far, near, far], guild_id=1)
    # So that the order on disk is another.
    await session.execute(text("UPDATE knowledge_chunks SET token_count = 1 WHERE id = :id"), {"id": chunk_ids[1]})
    expected = [chunk_ids[i] for i in (1, 2, 4, 0, 3, 5)]
    for top_k in range(1, 7):
        result = await SearchRepository(session).nearest(
            near, model=MODEL, top_k=top_k, filters=SearchFilters(guild_id=1)
        )
        assert (ids(result), result.plan) == (expected[:top_k], "exact")
        next_one = await SearchRepository(session).nearest(
            near, model=MODEL, top_k=1, offset=top_k - 1, filters=SearchFilters(guild_id=1)
        )
        assert ids(next_one) == expected[top_k - 1 : top_k]
        # Through the index any of the equal ones may be among the top_k.
        through = await SearchRepository(session, exact_limit=0).nearest(
            near, model=MODEL, top_k=top_k, filters=SearchFilters(guild_id=1)
        )
        assert through.plan == "index"
        assert [hit.similarity for hit in through.hits] == [hit.similarity for hit in result.hits]
        assert ids(through) == sorted(ids(through), key=expected.index)


async def test_a_hit_says_where_it_stands(session: AsyncSession) -> None:
    knowledge = KnowledgeRepository(session)
    vector = vectors(1)[0]
    source_id = await knowledge.add_source(
        SourceType.DOCUMENT_FILE, "梅雨", uri="https://example.com/doc", metadata={"a": 1}
    )
    for location in ({"url": "https://example.com/doc#2", "label": "two"}, {"label": "one"}):
        chunk = NewChunk(
            content="雨",
            location=location,
            embedding=vector,
            embedding_model=MODEL,
            occurred_from=JUNE,
            occurred_to=JUNE,
        )
        await knowledge.add_chunks(source_id, [chunk])
    result = await SearchRepository(session).nearest(
        vector, model=MODEL, filters=SearchFilters(source_ids=(source_id,))
    )
    assert [hit.url for hit in result.hits] == ["https://example.com/doc#2", "https://example.com/doc"]
    hit = result.hits[1]
    assert (hit.source_id, hit.source_type, hit.title, hit.content) == (source_id, "document_file", "梅雨", "雨")
    assert (hit.location, hit.metadata, hit.occurred_from) == ({"label": "one"}, {"a": 1}, JUNE)


async def test_the_threshold_hides_and_counts(session: AsyncSession) -> None:
    stored, query = vectors(20), vectors(1, seed=1)[0]
    await add(session, stored, guild_id=1)
    repository, scope = SearchRepository(session), SearchFilters(guild_id=1)
    everything = await repository.nearest(query, model=MODEL, top_k=10, filters=scope)
    fourth = everything.hits[3].similarity

    result = await repository.nearest(query, model=MODEL, top_k=10, threshold=fourth, filters=scope)
    assert (result.hits, result.hidden_by_threshold, result.complete) == (everything.hits[:4], 6, True)
    nothing = await repository.nearest(query, model=MODEL, top_k=10, threshold=1.0, filters=scope)
    assert (nothing.hits, nothing.hidden_by_threshold, nothing.complete) == ((), 10, True)
    all_of_them = await repository.nearest(query, model=MODEL, top_k=10, threshold=-1, filters=scope)
    assert all_of_them.hits == everything.hits


@pytest.mark.parametrize("top_k", [0, -1, 1001, 10**9, 10**30, True, "5", 5.0, None])
async def test_top_k_must_be_a_number_from_1_to_1000(session: AsyncSession, top_k: Any) -> None:
    with pytest.raises(InvalidInputError, match="top_k"):
        await SearchRepository(session).nearest(vectors(1)[0], model=MODEL, top_k=top_k, everywhere=True)


@pytest.mark.parametrize("top_k", [1, 1000])
async def test_top_k_can_be_its_bounds(session: AsyncSession, top_k: int) -> None:
    stored = vectors(1100)
    chunk_ids = await add(session, [*stored[:3]], guild_id=1)
    result = await SearchRepository(session).nearest(stored[0], model=MODEL, top_k=top_k, everywhere=True)
    assert ids(result)[0] == chunk_ids[0]
    assert len(result.hits) == min(top_k, 3)
    assert result.complete


@pytest.mark.parametrize("threshold", [1.01, -1.01, math.nan, math.inf, "0.5"])
async def test_the_threshold_must_be_a_similarity(session: AsyncSession, threshold: Any) -> None:
    with pytest.raises(InvalidInputError, match="threshold"):
        await SearchRepository(session).nearest(vectors(1)[0], model=MODEL, threshold=threshold, everywhere=True)


@pytest.mark.parametrize(
    "query",
    [np.ones(768), np.zeros(1536), np.full(1536, np.nan), np.full(1536, 1e6), np.ones((1, 1536)), [], "text", None],
    ids=["dimension", "zero", "nan", "overflow", "shape", "empty", "text", "none"],
)
async def test_a_query_that_cannot_be_compared_is_refused(session: AsyncSession, query: Any) -> None:
    with pytest.raises(InvalidVectorError):
        await SearchRepository(session).nearest(query, model=MODEL, everywhere=True)


# Scope and filters


@pytest.mark.parametrize(
    "filters",
    [
        None,
        SearchFilters(),
        SearchFilters(source_types=(SourceType.WEB_PAGE,)),
        SearchFilters(since=JUNE),
        SearchFilters(metadata={"a": 1}),
    ],
)
async def test_a_scope_must_be_named(session: AsyncSession, filters: SearchFilters | None) -> None:
    repository = SearchRepository(session)
    with pytest.raises(InvalidInputError, match="everywhere=True"):
        await repository.nearest(vectors(1)[0], model=MODEL, filters=filters)
    assert (await repository.nearest(vectors(1)[0], model=MODEL, filters=filters, everywhere=True)).hits == ()


@pytest.mark.parametrize("name", ["guild_id", "channel_id", "thread_id", "user_id"])
async def test_each_id_narrows_the_scope(session: AsyncSession, name: str) -> None:
    vector = vectors(1)[0]
    big = 2**62 + 1
    (mine,) = await add(session, [vector], **{name: big})
    await add(session, [vector], **{name: big - 1})
    await add(session, [vector])
    await add(
        session,
        [vector],
        **{other: big for other in ("guild_id", "channel_id", "thread_id", "user_id") if other != name},
    )
    result = await SearchRepository(session).nearest(vector, model=MODEL, filters=SearchFilters(**{name: big}))
    assert ids(result) == [mine]


async def test_sources_can_be_named(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    chunk_ids = [(await add(session, [vector]))[0] for _ in range(3)]
    result = await SearchRepository(session).nearest(vector, model=MODEL, everywhere=True)
    source_ids = {hit.chunk_id: hit.source_id for hit in result.hits}
    a, b, c = (source_ids[chunk_id] for chunk_id in chunk_ids)
    assert await found(session, vector, source_ids=(a, c)) == {chunk_ids[0], chunk_ids[2]}
    assert await found(session, vector, source_ids=(b, b, -1)) == {chunk_ids[1]}
    assert await found(session, vector, source_ids=()) == set()
    # More than a statement takes parameters.
    assert await found(session, vector, source_ids=(*range(10**9, 10**9 + 33_000), a)) == {chunk_ids[0]}


async def test_source_types(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    by_type = {kind: (await add(session, [vector], source_type=kind))[0] for kind in SourceType}
    for kind, chunk_id in by_type.items():
        assert await found(session, vector, source_types=(kind,)) == {chunk_id}
    assert await found(session, vector, source_types=tuple(SourceType)) == set(by_type.values())
    assert await found(session, vector, source_types=()) == set()


async def test_since_is_inclusive_and_until_is_not(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    (early,) = await add(session, [vector], occurred=(JUNE, JUNE + DAY))
    (late,) = await add(session, [vector], occurred=(JUNE + 2 * DAY, JUNE + 3 * DAY))
    await add(session, [vector])  # without a time: in no range
    assert await found(session, vector, since=JUNE + DAY) == {early, late}
    assert await found(session, vector, since=JUNE + DAY + timedelta(microseconds=1)) == {late}
    assert await found(session, vector, until=JUNE + 2 * DAY) == {early}
    assert await found(session, vector, until=JUNE + 2 * DAY + timedelta(microseconds=1)) == {early, late}
    # A chunk counts whose messages reach into the range.
    assert await found(session, vector, since=JUNE + DAY / 2, until=JUNE + DAY) == {early}
    assert await found(session, vector, since=JUNE + 4 * DAY) == set()


async def test_metadata_must_contain(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    (number,) = await add(session, [vector], metadata={"n": 1, "tags": ["a", "b"], "deep": {"er": {"x": 1, "y": None}}})
    (string,) = await add(session, [vector], metadata={"n": "1", "tags": ["b"]})
    (big,) = await add(session, [vector], metadata={"n": 2**63 + 1})
    assert await found(session, vector, metadata={"n": 1}) == {number}
    assert await found(session, vector, metadata={"n": "1"}) == {string}
    assert await found(session, vector, metadata={"n": 2**63 + 1}) == {big}
    assert await found(session, vector, metadata={"n": True}) == set()
    assert await found(session, vector, metadata={"tags": ["b"]}) == {number, string}
    assert await found(session, vector, metadata={"tags": ["b", "a"]}) == {number}
    assert await found(session, vector, metadata={"deep": {"er": {"y": None}}}) == {number}
    assert await found(session, vector, metadata={"deep": {"x": 1}}) == set()
    assert await found(session, vector, metadata={}) == {number, string, big}
    assert await found(session, vector, metadata={"n'; DROP TABLE x --": "%s :n $1"}) == set()


@dataclass
class Known:
    """A chunk as the reference sees it."""

    id: int
    vector: Vectors | None
    model: str
    scope: dict[str, int]
    type: SourceType
    metadata: dict[str, Any]
    occurred: tuple[datetime | None, datetime | None]
    filters: dict[str, Any] = field(default_factory=dict)

    def meets(self, filters: dict[str, Any]) -> bool:
        start, end = self.occurred
        return all(
            (
                all(self.scope.get(name) == value for name, value in filters.items() if name.endswith("_id")),
                "source_types" not in filters or self.type in filters["source_types"],
                "since" not in filters or (end is not None and end >= filters["since"]),
                "until" not in filters or (start is not None and start < filters["until"]),
                all(self.metadata.get(key) == value for key, value in filters.get("metadata", {}).items()),
            )
        )


async def test_filters_together_agree_with_a_plain_reading(session: AsyncSession) -> None:
    rng = random.Random(2)
    names = ("guild_id", "channel_id", "thread_id", "user_id")
    known: list[Known] = []
    pool = iter(vectors(200, seed=3))
    for _ in range(40):
        start = JUNE + rng.randrange(10) * DAY
        occurred = rng.choice([(None, None), (start, start + rng.randrange(3) * DAY)])
        described: dict[str, Any] = {
            "scope": {name: rng.randrange(1, 3) for name in names if rng.random() < 0.8},
            "type": rng.choice(list(SourceType)[:3]),
            "metadata": {"lang": rng.choice(["ja", "en"]), "n": rng.randrange(2)},
            "occurred": occurred,
            "model": MODEL if rng.random() < 0.8 else OTHER,
        }
        embeddings = [next(pool) if rng.random() < 0.8 else None for _ in range(5)]
        chunk_ids = await add(
            session,
            embeddings,
            model=described["model"],
            source_type=described["type"],
            metadata=described["metadata"],
            occurred=occurred,
            **described["scope"],
        )
        known += [Known(id=i, vector=v, **described) for i, v in zip(chunk_ids, embeddings, strict=True)]

    seen = {"hits": 0, "empty": 0, "mismatch": 0}
    for seed in range(150):
        filters: dict[str, Any] = {name: rng.randrange(1, 3) for name in names if rng.random() < 0.3}
        since = JUNE + rng.randrange(10) * DAY
        more = (
            ("source_types", tuple(rng.sample(list(SourceType)[:3], 2))),
            ("since", since),
            ("until", since + rng.randrange(1, 6) * DAY),
            ("metadata", rng.choice([{"lang": "ja"}, {"n": 1}, {"lang": "en", "n": 0}])),
        )
        filters |= {name: value for name, value in more if rng.random() < 0.3}
        top_k, threshold = rng.choice([1, 3, 10, 200]), rng.choice([None, 0.0, 0.2])
        query = vectors(1, seed=1000 + seed)[0]
        meeting = [chunk for chunk in known if chunk.vector is not None and chunk.meets(filters)]
        own = [chunk for chunk in meeting if chunk.model == MODEL]

        async def search(
            query: Vectors = query,
            top_k: int = top_k,
            threshold: float | None = threshold,
            filters: dict[str, Any] = filters,
        ) -> SearchResult:
            # Through the index chance would decide what is nearest.
            return await SearchRepository(session, exact_limit=len(known)).nearest(
                query,
                model=MODEL,
                top_k=top_k,
                threshold=threshold,
                filters=SearchFilters(**filters),
                everywhere=True,
                effort="balanced" if filters else "exact",
            )

        if meeting and not own:
            seen["mismatch"] += 1
            with pytest.raises(ModelMismatchError):
                await search()
            continue
        result = await search()
        assert result.complete
        if not own:
            seen["empty"] += 1
            assert result.hits == ()
            continue
        similarity = similarities(np.array([chunk.vector for chunk in own]), query)
        order = np.argsort(-similarity)[:top_k]
        shown = [i for i in order if threshold is None or similarity[i] >= threshold]
        assert ids(result) == [own[i].id for i in shown]
        np.testing.assert_allclose([hit.similarity for hit in result.hits], similarity[shown], atol=1e-6)
        assert result.hidden_by_threshold == len(order) - len(shown)
        seen["hits"] += 1
    assert min(seen.values()) >= 5, seen


# Models


async def test_only_vectors_of_the_querys_model_are_compared(session: AsyncSession) -> None:
    vector = vectors(1)[0]
    (mine,) = await add(session, [vector], guild_id=1)
    await add(session, [vector], guild_id=1, model=OTHER)
    for everywhere, filters in ((False, SearchFilters(guild_id=1)), (True, None)):
        result = await SearchRepository(session).nearest(vector, model=MODEL, filters=filters, everywhere=everywhere)
        assert ids(result) == [mine]


async def test_vectors_of_other_models_alone_are_an_error(session: AsyncSession) -> None:
    repository, vector = SearchRepository(session), vectors(1)[0]
    nothing = await repository.nearest(vector, model=MODEL, everywhere=True)
    assert (nothing.hits, nothing.complete) == ((), True)
    await add(session, [None], guild_id=1)
    assert (await repository.nearest(vector, model=MODEL, filters=SearchFilters(guild_id=1))).complete

    await add(session, [vector], guild_id=1, model=OTHER)
    await add(session, [vector], guild_id=2, model="secret-model")
    for filters in (SearchFilters(guild_id=1), SearchFilters(guild_id=1, source_types=(SourceType.WEB_PAGE,))):
        with pytest.raises(ModelMismatchError, match=OTHER) as raised:
            await repository.nearest(vector, model=MODEL, filters=filters)
        # What other tenants use is none of this one's business.
        assert "secret-model" not in str(raised.value)
    with pytest.raises(ModelMismatchError):
        await repository.nearest(vector, model=MODEL, everywhere=True)
    # A scope without any vector has none of another model either.
    assert (await repository.nearest(vector, model=MODEL, filters=SearchFilters(guild_id=3))).hits == ()


async def test_what_is_deleted_or_not_embedded_is_never_found(session: AsyncSession) -> None:
    stored = vectors(6)
    chunk_ids = await add(session, [*stored[:3], None, None], guild_id=1)
    (doomed,) = await add(session, [stored[0]], guild_id=1)
    repository = SearchRepository(session)

    async def search(**options: Any) -> list[int]:
        return ids(await repository.nearest(stored[0], model=MODEL, top_k=100, **options))

    assert await search(everywhere=True) == await search(filters=SearchFilters(guild_id=1))
    assert set(await search(everywhere=True)) == {*chunk_ids[:3], doomed}
    (source_id,) = (
        await session.execute(text("SELECT source_id FROM knowledge_chunks WHERE id = :id"), {"id": doomed})
    ).scalars()
    await KnowledgeRepository(session).delete_source(source_id)
    assert set(await search(everywhere=True)) == set(chunk_ids[:3])
    assert set(await search(filters=SearchFilters(guild_id=1))) == set(chunk_ids[:3])
    # To be embedded again, its model not yet forgotten.
    await session.execute(text("UPDATE knowledge_chunks SET embedding = NULL WHERE id = :id"), {"id": chunk_ids[0]})
    assert set(await search(everywhere=True)) == set(chunk_ids[1:3])
    assert set(await search(filters=SearchFilters(guild_id=1))) == set(chunk_ids[1:3])


# Around it


@pytest.mark.parametrize("filters", [None, SearchFilters(guild_id=1)])
async def test_a_database_that_was_not_migrated_is_named_as_such(empty_url: URL, filters: SearchFilters | None) -> None:
    async with Database(empty_url, settings_for(empty_url)) as database, database.session_factory() as session:
        with pytest.raises(SchemaOutdatedError, match="migrate"):
            await SearchRepository(session).nearest(vectors(1)[0], model=MODEL, filters=filters, everywhere=True)


async def test_no_connection_is_held_while_the_query_is_embedded(settings: Settings) -> None:
    held: list[int] = []

    class Looking(HashingEmbedder):
        async def embed_query(self, text: str) -> Vectors:
            held.append(store.database.engine.pool.checkedout())  # type: ignore[attr-defined]
            return await super().embed_query(text)

    async with Store.open(settings, embedder=Looking()) as store:
        await store.database.ping()
        await store.search("anything", everywhere=True)
    assert held == [0]


async def test_a_refused_search_costs_no_call_of_the_embedder(settings: Settings) -> None:
    class Costly(HashingEmbedder):
        async def embed_query(self, text: str) -> Vectors:
            raise AssertionError("called")

    async with Store.open(settings, embedder=Costly()) as store:
        for options in ({}, {"everywhere": True, "top_k": 0}, {"everywhere": True, "threshold": 2.0}):
            with pytest.raises(InvalidInputError):
                await store.search("anything", **options)


async def test_a_store_searches_by_vector_with_the_model_named(store: Store) -> None:
    vector = vectors(1)[0]
    async with store.begin() as tx:
        (chunk_id,) = await add(tx.session, [vector], guild_id=1)
    with pytest.raises(ModelMismatchError):
        await store.search(vector, everywhere=True)
    result = await store.search(vector, model=MODEL, everywhere=True)
    assert ids(result) == [chunk_id]
    with pytest.raises(InvalidInputError, match="blank"):
        await store.search(" \n", everywhere=True)


async def test_a_text_is_not_said_to_be_of_another_model(store: Store) -> None:
    await store.add_document("title", "text", guild_id=1)
    own = store.embedder.model
    wrong: list[dict[str, Any]] = [
        {"model": MODEL},
        {"model": MODEL, "mode": "hybrid"},
        {"model": own, "mode": "words"},
    ]
    for options in wrong:
        with pytest.raises(InvalidInputError, match="model= says who made a vector"):
            await store.search("text", everywhere=True, **options)
    # What is so anyway may be said.
    result = await store.search("text", everywhere=True, model=own, mode="hybrid")
    assert len(result.hits) == 1


@pytest.mark.parametrize(("number", "is_remembered"), [(10_000, True), (10_001, False)])
async def test_filters_with_very_many_values_are_not_remembered(
    session: AsyncSession, number: int, is_remembered: bool
) -> None:
    """They are kept for a minute as they are, thousands of them."""
    known: Remembered[AnyFilters, Selectivity] = Remembered()
    wanted = SearchFilters(source_ids=range(1, number + 1))
    search = SearchRepository(session, selectivities=known)
    await search.nearest(vectors(1)[0], model=MODEL, filters=wanted)
    assert (known.get(wanted) is not None) == is_remembered


def test_a_driver_that_lost_its_way_is_an_unavailable_store() -> None:
    """A cancelled statement can leave asyncpg so; the connection is done for, the database is not."""
    with pytest.raises(StoreUnavailableError, match="InternalClientError") as caught, translated_errors():
        raise asyncpg.exceptions.InternalClientError("got result for unknown protocol state 3")
    assert "protocol state" not in str(caught.value)


@pytest.mark.role("app", "worker")
async def test_a_location_that_is_no_object_does_not_spoil_a_search(store: Store) -> None:
    await store.add_document("title", "somebody else wrote this row", guild_id=9)
    await store.embedding_worker.run_until_empty()
    async with store.begin() as tx:
        await tx.session.execute(text("UPDATE knowledge_chunks SET location = 'null'"))
    [hit] = (await store.search("row", threshold=None, filters=SearchFilters(guild_id=9))).hits
    assert hit.location == {}
    async with store.begin() as tx:
        with pytest.raises(InvalidInputError, match="location must be a dict"):
            await tx.knowledge.add_chunks(hit.source_id, [NewChunk("text", location=None)])


@pytest.mark.parametrize("url", [5, None, "", [], {"a": 1}])
async def test_a_link_is_text(session: AsyncSession, url: Any) -> None:
    vector = vectors(1)[0]
    await add(session, [vector], locations=[{"url": url}], guild_id=1)
    [hit] = (await SearchRepository(session).nearest(vector, model=MODEL, everywhere=True)).hits
    assert (hit.url, hit.location) == (None, {"url": url})
