"""Search through the index and beside it: plans, efforts, settings, and how many round trips they take.

5,000 vectors in 50 clusters of 100; cluster c lies in guild c % 10 + 1.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from conftest import new_database, settings_for
from numpy.typing import NDArray
from searching import MODEL, OTHER, Vectors, ids, similarities, summary, watched_store
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import Database, SearchFilters, SearchRepository, selectivity
from kotonoha_store.columns import pack_vectors
from kotonoha_store.database import driver_connection
from kotonoha_store.selectivity import EFFORTS, Effort, Remembered, Selectivity, ef_search

pytestmark = pytest.mark.role("app")

GUILD = SearchFilters(guild_id=1)
SHOW = text("SELECT current_setting('hnsw.ef_search'), current_setting('hnsw.iterative_scan')")


@dataclass(frozen=True)
class Clusters:
    url: URL
    vectors: Vectors
    ids: NDArray[np.int64]

    def nearest(self, query: Vectors, guild: int | None = None) -> list[int]:
        """All ids of the guild, nearest first."""
        order = np.argsort(-similarities(self.vectors, query), kind="stable")
        return self.ids[order if guild is None else order[order // 100 % 10 + 1 == guild]].tolist()

    def near(self, cluster: int, seed: int = 0) -> Vectors:
        centre = self.vectors[cluster * 100 : cluster * 100 + 100].mean(axis=0)
        noise = np.random.default_rng(seed).standard_normal(1536) * 0.3
        return (centre + noise).astype(np.float32)


@pytest.fixture(scope="module")
def clusters(server_url: URL, template: URL) -> Iterator[Clusters]:
    rng = np.random.default_rng(7)
    centres = np.repeat(rng.standard_normal((50, 1536)), 100, axis=0)
    stored = (centres + 0.6 * rng.standard_normal((5000, 1536))).astype(np.float32)

    async def fill(url: URL) -> NDArray[np.int64]:
        async with Database(url, settings_for(url), patient=True) as database, database.begin() as session:
            # Neither pages nor rows are counted anew while the tests run.
            await session.execute(text("ALTER TABLE knowledge_chunks SET (autovacuum_enabled = off)"))
            definition = (
                await session.execute(text("SELECT pg_get_indexdef('idx_chunks_embedding'::regclass)"))
            ).scalar_one()
            # Loaded first and indexed then: ten times as fast.
            await session.execute(text("DROP INDEX idx_chunks_embedding"))
            await session.execute(
                text("INSERT INTO knowledge_sources (type, title) SELECT 'web_page', 'x' FROM generate_series(1, 50)")
            )
            driver = await driver_connection(session)
            await driver.copy_records_to_table(
                "knowledge_chunks",
                columns=("source_id", "content", "embedding", "embedding_model", "guild_id"),
                records=[
                    (i // 100 + 1, "x", packed, MODEL, i // 100 % 10 + 1)
                    for i, packed in enumerate(pack_vectors(stored))
                ],
            )
            await session.execute(text("SET LOCAL maintenance_work_mem = '256MB'"))
            await session.execute(text(definition))
            await session.execute(text("ANALYZE knowledge_chunks"))
            found = await session.execute(text("SELECT id FROM knowledge_chunks ORDER BY id"))
            return np.array(found.scalars().all())

    with new_database(server_url, template=str(template.database)) as url:
        yield Clusters(url, stored, asyncio.run(fill(url)))


@pytest.fixture
async def clustered(clusters: Clusters) -> AsyncIterator[AsyncSession]:
    """A transaction in the clusters' database in which the planner keeps to the index; rolled back."""
    async with Database(clusters.url, settings_for(clusters.url)) as database, database.session_factory() as session:
        # Of 5,000 rows the planner would rather sort those of the guild.
        for name in ("seqscan", "bitmapscan", "sort"):
            await session.execute(text(f"SET LOCAL enable_{name} = off"))
        yield session


# How well it finds


async def test_the_index_finds_nearly_all_that_are_nearest(clusters: Clusters, clustered: AsyncSession) -> None:
    index, exact = SearchRepository(clustered, exact_limit=0), SearchRepository(clustered)
    shared = 0
    for seed in range(30):
        query = clusters.near(seed, seed)
        through = await index.nearest(query, model=MODEL, top_k=10, everywhere=True)
        assert (through.plan, through.complete, len(through.hits)) == ("index", True, 10)
        assert [h.similarity for h in through.hits] == sorted((h.similarity for h in through.hits), reverse=True)
        compared = await exact.nearest(query, model=MODEL, top_k=10, everywhere=True, effort="exact")
        assert compared.plan == "exact"
        assert ids(compared) == clusters.nearest(query)[:10]
        shared += len(set(ids(through)) & set(ids(compared)))
    assert shared / 300 >= 0.95


async def test_the_index_goes_on_until_the_filter_is_filled(clusters: Clusters, clustered: AsyncSession) -> None:
    """The query lies in guild 1; the rows of guild 6 are far behind the 100 that the index looks at first."""
    repository = SearchRepository(clustered, exact_limit=100)
    for top_k in (10, 200):
        result = await repository.nearest(clusters.near(0), model=MODEL, top_k=top_k, filters=SearchFilters(guild_id=6))
        assert (result.plan, result.complete, len(result.hits)) == ("index", True, top_k)
        assert all(((hit.source_id - 1) % 10) + 1 == 6 for hit in result.hits)


async def test_rows_deleted_around_the_query_do_not_empty_the_result(
    clusters: Clusters, clustered: AsyncSession
) -> None:
    query = clusters.near(0)
    nearest = clusters.ids[np.argsort(-similarities(clusters.vectors, query))]
    await clustered.execute(text("DELETE FROM knowledge_chunks WHERE id = ANY(:ids)"), {"ids": nearest[:1500].tolist()})
    result = await SearchRepository(clustered, exact_limit=0).nearest(query, model=MODEL, everywhere=True)
    assert (result.plan, result.complete, len(result.hits)) == ("index", True, 10)
    assert not set(ids(result)) & set(nearest[:1500].tolist())


async def test_an_index_that_gives_up_says_so(clusters: Clusters, clustered: AsyncSession) -> None:
    query = clusters.near(0)
    farthest = clusters.ids[np.argsort(similarities(clusters.vectors, query))]
    move = text("UPDATE knowledge_chunks SET guild_id = 77, embedding_model = :model WHERE id = :id")
    await clustered.execute(move, {"model": MODEL, "id": int(farthest[0])})
    await clustered.execute(text("LOAD 'vector'"))
    await clustered.execute(text("SET LOCAL hnsw.max_scan_tuples = 1"))
    scope, index = SearchFilters(guild_id=77), SearchRepository(clustered, exact_limit=0)
    result = await index.nearest(query, model=MODEL, filters=scope)
    assert (result.plan, result.complete, result.hits) == ("index", False, ())

    # Another model's rows in the same scope do not make it an error: there are rows of this one.
    await clustered.execute(move, {"model": OTHER, "id": int(farthest[1])})
    result = await index.nearest(query, model=MODEL, filters=scope)
    assert (result.plan, result.complete, result.hits) == ("index", False, ())

    # Where the rows that are left are few enough, they are compared one by one instead.
    await clustered.execute(text("DELETE FROM knowledge_chunks WHERE id <> ALL(:ids)"), {"ids": farthest[:20].tolist()})
    result = await SearchRepository(clustered).nearest(query, model=MODEL, everywhere=True)
    assert (result.plan, result.complete, len(result.hits)) == ("exact", True, 10)


@pytest.mark.parametrize(("limit", "plan"), [(500, "exact"), (499, "index")])
async def test_the_number_of_candidates_decides_the_plan(
    clusters: Clusters, clustered: AsyncSession, limit: int, plan: str
) -> None:
    repository = SearchRepository(clustered, exact_limit=limit)
    result = await repository.nearest(clusters.near(0), model=MODEL, filters=SearchFilters(guild_id=1))
    assert (result.plan, result.complete, len(result.hits)) == (plan, True, 10)


async def test_the_settings_of_a_search_end_with_its_transaction(clusters: Clusters) -> None:
    settings = settings_for(clusters.url, db_pool_max_size=1)
    async with Database(clusters.url, settings) as database:
        async with database.begin() as session:
            await session.execute(text("LOAD 'vector'"))
            before = (await session.execute(SHOW)).one()
        async with database.begin() as session:
            repository = SearchRepository(session, exact_limit=0)
            await repository.nearest(clusters.near(0), model=MODEL, top_k=300, everywhere=True)
            assert (await session.execute(SHOW)).one() == (str(ef_search(300)), "relaxed_order")
        async with database.begin() as session:
            assert (await session.execute(SHOW)).one() == before


@pytest.mark.parametrize("exact_limit", [0, 10_000])
async def test_a_read_only_transaction_can_search(clusters: Clusters, exact_limit: int) -> None:
    async with Database(clusters.url, settings_for(clusters.url)) as database, database.begin() as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        repository = SearchRepository(session, exact_limit=exact_limit)
        result = await repository.nearest(clusters.near(0), model=MODEL, filters=SearchFilters(guild_id=1))
    assert len(result.hits) == 10


async def test_settings_of_a_search_by_a_store_end_with_its_statement(clusters: Clusters) -> None:
    async with watched_store(clusters.url) as (store, _), store.database.driver() as connection:
        await connection.execute("LOAD 'vector'")
        before = await connection.fetchrow(str(SHOW))
    async with watched_store(clusters.url) as (store, sent):
        result = await store.search(clusters.near(0), model=MODEL, top_k=300, threshold=None, everywhere=True)
        assert (result.plan, len(result.hits), await sent.taken()) == ("index", 300, 1)
        async with store.database.driver() as connection:
            assert await connection.fetchrow(str(SHOW)) == before


@pytest.mark.parametrize("effort", EFFORTS)
async def test_an_effort_reaches_the_index(clusters: Clusters, clustered: AsyncSession, effort: Effort) -> None:
    query = clusters.near(3)
    result = await SearchRepository(clustered).nearest(query, model=MODEL, everywhere=True, effort=effort)
    used, scan = (await clustered.execute(SHOW)).one()
    if effort == "exact":
        assert (result.plan, ids(result), used) == ("exact", clusters.nearest(query)[:10], "40")
    else:
        assert (result.plan, used, scan) == ("index", str(ef_search(10, effort)), "relaxed_order")
    assert len(set(ids(result)) & set(clusters.nearest(query)[:10])) >= 8


async def test_a_narrower_filter_makes_the_index_look_further(clusters: Clusters, clustered: AsyncSession) -> None:
    known: Remembered[Any, Selectivity] = Remembered()
    repository = SearchRepository(clustered, exact_limit=100, selectivities=known)
    await repository.nearest(clusters.near(0), model=MODEL, top_k=25, filters=GUILD)
    used, _ = (await clustered.execute(SHOW)).one()
    estimated = known.get(GUILD)
    assert estimated is not None
    # A tenth of the chunks, by a sample of every fourth page: for 25 hits some 250 are to be looked at. Six standard
    # deviations either way.
    assert estimated.share == pytest.approx(0.1, abs=0.065)
    assert int(used) == ef_search(25, share=estimated.share) > 2 * ef_search(25)


async def test_what_a_filter_keeps_is_counted_or_estimated(clusters: Clusters, clustered: AsyncSession) -> None:
    query, three = clusters.near(0), SearchFilters(guild_id=1) | SearchFilters(guild_id=2) | SearchFilters(guild_id=3)
    known: Remembered[Any, Selectivity] = Remembered()
    await SearchRepository(clustered, exact_limit=500, selectivities=known).nearest(query, model=MODEL, filters=GUILD)
    counted = known.get(GUILD)
    assert counted is not None
    assert counted.kept == 500
    assert counted.total == pytest.approx(5000, rel=0.05)
    for _ in range(3):
        known = Remembered()
        repository = SearchRepository(clustered, exact_limit=100, selectivities=known)
        await repository.nearest(query, model=MODEL, filters=three)
        estimated = known.get(three)
        assert estimated is not None
        assert estimated.share == pytest.approx(0.3, rel=0.35)
        assert estimated.total == pytest.approx(5000, rel=0.2)


# Pages


@pytest.mark.parametrize("effort", ["balanced", "exact"])
async def test_pages_add_up(clusters: Clusters, clustered: AsyncSession, effort: Effort) -> None:
    query, repository = clusters.near(7), SearchRepository(clustered, exact_limit=10_000)
    filters = SearchFilters(guild_id=8) if effort == "balanced" else None

    async def page(offset: int, top_k: int) -> list[int]:
        result = await repository.nearest(
            query, model=MODEL, top_k=top_k, offset=offset, filters=filters, everywhere=True, effort=effort
        )
        assert (result.plan, result.complete) == ("exact", True)
        return ids(result)

    whole = clusters.nearest(query, None if filters is None else 8)
    assert [await page(offset, 50) for offset in range(0, 200, 50)] == [whole[i : i + 50] for i in range(0, 200, 50)]
    assert await page(999, 1) == whole[999:1000]
    assert await page(490, 20) == whole[490:510]


async def test_the_next_page_of_the_index_is_farther_away(clusters: Clusters, clustered: AsyncSession) -> None:
    query, repository = clusters.near(7), SearchRepository(clustered)
    pages = [await repository.nearest(query, model=MODEL, offset=o, everywhere=True) for o in (0, 10, 20, 90)]
    assert [page.plan for page in pages] == ["index"] * 4
    found = [hit.similarity for page in pages for hit in page.hits]
    assert len(found) == 40
    assert found == pytest.approx(sorted(found, key=lambda value: -(value or 0)), abs=0.02)
    assert len({hit.chunk_id for page in pages for hit in page.hits}) >= 38


# Round trips


async def test_a_filter_is_counted_once_a_minute(clusters: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(selectivity, "monotonic", lambda: now[0])
    async with watched_store(clusters.url, kb_exact_search_limit=500) as (store, sent):

        async def search(guild: int) -> int:
            filters = SearchFilters(guild_id=guild)
            result = await store.search(clusters.near(0), model=MODEL, threshold=None, filters=filters)
            assert (result.plan, len(result.hits)) == ("exact", 10)
            return await sent.taken()

        # The table's size, the count, the search.
        assert [await search(1), await search(1), await search(1)] == [3, 1, 1]
        assert [await search(2), await search(2), await search(1)] == [3, 1, 1]
        now[0] += 61
        assert [await search(1), await search(1)] == [3, 1]


async def test_a_wide_filter_is_sampled_once(clusters: Clusters) -> None:
    async with watched_store(clusters.url, kb_exact_search_limit=499) as (store, sent):
        for number in (4, 1, 1):
            result = await store.search(clusters.near(0), model=MODEL, threshold=None, filters=GUILD)
            assert (result.plan, len(result.hits), await sent.taken()) == ("index", 10, number)


@pytest.mark.parametrize(("limit", "plan"), [(None, "exact"), (500, "exact"), (499, "index"), (0, "index")])
async def test_the_setting_decides_up_to_how_many_are_compared(
    clusters: Clusters, limit: int | None, plan: str
) -> None:
    query = clusters.near(0)
    async with watched_store(clusters.url, kb_exact_search_limit=limit) as (store, _):
        result = await store.search(query, model=MODEL, threshold=None, filters=GUILD)
        assert (result.plan, result.complete, len(result.hits)) == (plan, True, 10)
        async with store.begin() as tx:
            again = await tx.search.nearest(query, model=MODEL, filters=GUILD)
        assert again.plan == plan


async def test_exact_search_is_one_round_trip(clusters: Clusters) -> None:
    query = clusters.near(0)
    async with watched_store(clusters.url) as (store, sent):
        result = await store.search(query, model=MODEL, threshold=None, everywhere=True, effort="exact")
        assert (ids(result), await sent.taken()) == (clusters.nearest(query)[:10], 1)
        # Nothing needs to be counted for it either.
        result = await store.search(query, model=MODEL, threshold=None, filters=GUILD, effort="exact")
        assert (ids(result), await sent.taken()) == (clusters.nearest(query, 1)[:10], 1)


async def test_searches_by_one_plan_for_all_parameters_are_right(clusters: Clusters) -> None:
    """After five runs PostgreSQL may keep one plan (generic plan); forced, it keeps it from the first."""
    for mode in ("auto", "force_generic_plan"):
        async with watched_store(clusters.url, kb_exact_search_limit=500) as (store, _):
            async with store.database.driver() as connection:
                await connection.execute(f"SET plan_cache_mode = {mode}")
            for seed in range(9):
                query, guild = clusters.near(seed, seed), seed % 10 + 1
                filters = SearchFilters(guild_id=guild)
                exact = await store.search(query, model=MODEL, threshold=None, filters=filters, top_k=seed + 1)
                assert summary(exact) == (clusters.nearest(query, guild)[: seed + 1], "exact", True)
                through = await store.search(query, model=MODEL, threshold=None, everywhere=True, top_k=10 + seed)
                assert (through.plan, len(through.hits)) == ("index", 10 + seed)
                assert len(set(ids(through)) & set(clusters.nearest(query)[: 10 + seed])) >= 9


async def test_many_search_at_once(clusters: Clusters) -> None:
    settings = settings_for(clusters.url, db_pool_max_size=4)
    # The last of them wait for all the others.
    async with Database(clusters.url, settings, pool_timeout=600) as database:

        async def search(seed: int) -> None:
            query, guild = clusters.near(seed, seed), seed % 10 + 1
            async with database.driver() as connection:
                result = await SearchRepository(connection).nearest(
                    query, model=MODEL, filters=SearchFilters(guild_id=guild)
                )
            assert summary(result) == (clusters.nearest(query, guild)[:10], "exact", True)

        await asyncio.gather(*map(search, range(40)))
