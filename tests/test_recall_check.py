"""Store.recall_check: the figure is what a search through the index finds, also where the index is a bad one."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import new_database, run_sql, settings_for
from numpy.typing import NDArray
from sqlalchemy import URL, text

from kotonoha_store import (
    ConfigurationError,
    Database,
    HashingEmbedder,
    InvalidInputError,
    NotFoundError,
    SchemaOutdatedError,
    Store,
)
from kotonoha_store.columns import pack_vectors
from kotonoha_store.database import driver_connection
from kotonoha_store.search_statements import sampled_vectors
from kotonoha_store.selectivity import ef_search

MODEL = "model-a"
OTHER = "model-b"
VECTORS = 2_000
# To build an index takes as long as it takes.
UNHURRIED = {"db_command_timeout": 600}


def clustered(count: int = VECTORS, *, centres: int = 40, seed: int = 1) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    middle = random.standard_normal((centres, 1536), dtype=np.float32)
    return middle[random.integers(centres, size=count)] + 0.6 * random.standard_normal((count, 1536), dtype=np.float32)


async def insert(database: Database, vectors: NDArray[Any], *, model: str = MODEL, first_id: int = 1) -> None:
    packed = pack_vectors(np.asarray(vectors, dtype=np.float32))
    async with database.begin() as session:
        await session.execute(
            text("INSERT INTO knowledge_sources (id, type, title) VALUES (1, 'web_page', 't') ON CONFLICT DO NOTHING")
        )
        driver = await driver_connection(session)
        rows = [(first_id + place, 1, f"text {place}", vector, model) for place, vector in enumerate(packed)]
        columns = ("id", "source_id", "content", "embedding", "embedding_model")
        await driver.copy_records_to_table("knowledge_chunks", columns=columns, records=rows)


async def run(database: Database, *statements: str) -> None:
    async with database.connect() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def build_index(database: Database, *, m: int = 16, ef_construction: int = 64) -> None:
    await run(
        database,
        "DROP INDEX IF EXISTS idx_chunks_embedding",
        "CREATE INDEX idx_chunks_embedding ON knowledge_chunks USING hnsw (embedding halfvec_cosine_ops)"
        f" WITH (m = {m}, ef_construction = {ef_construction})",
        "ANALYZE knowledge_chunks",
    )


@pytest.fixture(scope="module")
def clustered_url(server_url: URL, template: URL) -> Iterator[URL]:
    """2,000 vectors and their index; whoever changes them takes a clone."""

    async def fill(url: URL) -> None:
        async with Database(url, settings_for(url), patient=True) as database:
            await run(database, "DROP INDEX idx_chunks_embedding")
            await insert(database, clustered())
            await build_index(database)

    with new_database(server_url, template=str(template.database)) as url:
        asyncio.run(fill(url))
        yield url


@pytest.fixture
async def clustered_store(clustered_url: URL) -> AsyncIterator[Store]:
    async with Store.open(settings_for(clustered_url, **UNHURRIED)) as store:
        yield store


@pytest.fixture
def own_url(server_url: URL, clustered_url: URL) -> Iterator[URL]:
    with new_database(server_url, template=str(clustered_url.database)) as url:
        yield url


@pytest.fixture
async def own(own_url: URL) -> AsyncIterator[Store]:
    """The same vectors, to be changed."""
    async with Store.open(settings_for(own_url, **UNHURRIED)) as store:
        yield store


async def sample(store: Store, limit: int, *, model: str = MODEL, seed: float = 0.5) -> dict[int, Any]:
    prepared = sampled_vectors()
    async with store.database.driver() as driver:
        await driver.execute(f"SELECT setseed({seed})")
        rows = await driver.fetch(prepared.sql, *prepared.arguments({"model": model, "limit": limit}))
    assert len({row[0] for row in rows}) == len(rows)
    return dict(rows)


# The figure


async def test_a_good_index_finds_nearly_all(clustered_store: Store) -> None:
    report = await clustered_store.recall_check(model=MODEL)
    assert (report.model, report.sampled, report.top_k, report.wanted) == (MODEL, 50, 10, 0.98)
    assert report.recall >= 0.98
    assert report.is_good
    assert report.recall == report.by_ef_search[report.ef_search]
    assert set(report.by_ef_search) == {40, 100, 200, 400, 1000, ef_search(10)}
    assert report.ef_search_for_wanted in report.by_ef_search
    assert report.seconds > 0


async def test_a_bad_index_is_seen(own: Store) -> None:
    await build_index(own.database, m=2, ef_construction=4)
    report = await own.recall_check(model=MODEL)
    assert report.recall < 0.7
    assert not report.is_good
    assert report.ef_search_for_wanted is None
    await run(own.database, "REINDEX INDEX idx_chunks_embedding", "ANALYZE")
    assert not (await own.recall_check(model=MODEL)).is_good
    await build_index(own.database)
    assert (await own.recall_check(model=MODEL)).is_good


async def test_more_effort_finds_more(own: Store) -> None:
    await build_index(own.database, m=3, ef_construction=8)
    report = await own.recall_check(model=MODEL, sample=100)
    shares = list(report.by_ef_search.values())
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] <= 1.0
    between = (shares[0] + shares[-1]) / 2
    reached = await own.recall_check(model=MODEL, sample=100, wanted=between)
    assert reached.ef_search_for_wanted in list(report.by_ef_search)[1:]
    nothing = await own.recall_check(model=MODEL, sample=5, wanted=0)
    assert (nothing.ef_search_for_wanted, nothing.is_good) == (40, True)


async def measured(store: Store, vectors: NDArray[Any], *, top_k: int, effort: int) -> float:
    """The same by hand: NumPy knows what is nearest, and a plain query says what the index finds."""
    halves = vectors.astype(np.float16).astype(np.float64)
    halves /= np.linalg.norm(halves, axis=1, keepdims=True)
    near = halves @ halves.T
    np.fill_diagonal(near, -2)
    found = 0
    async with store.database.driver() as driver, driver.transaction():
        await driver.execute(f"SET LOCAL hnsw.ef_search = {effort}; SET LOCAL hnsw.iterative_scan = relaxed_order")
        for place, vector in enumerate(vectors):
            rows = await driver.fetch(
                "SELECT id FROM knowledge_chunks WHERE embedding IS NOT NULL AND embedding_model = $2"
                " ORDER BY embedding <=> $1 LIMIT $3",
                vector,
                MODEL,
                top_k + 1,
            )
            others = [row[0] - 1 for row in rows if row[0] != place + 1][:top_k]
            found += len(set(others) & set(np.argsort(-near[place])[:top_k].tolist()))
    return found / (len(vectors) * top_k)


@pytest.mark.parametrize("top_k", [1, 10])
async def test_the_figure_is_what_is_measured_by_hand(migrated_url: URL, top_k: int) -> None:
    """Of the neighbours: that a vector finds itself says nothing."""
    # So few vectors are else compared one by one.
    await run_sql(migrated_url, f"ALTER DATABASE {migrated_url.database} SET enable_seqscan = off")
    async with Store.open(settings_for(migrated_url, **UNHURRIED)) as store:
        await check_by_hand(store, top_k)


async def check_by_hand(store: Store, top_k: int) -> None:
    vectors = np.random.default_rng(3).standard_normal((300, 1536)).astype(np.float32)
    await insert(store.database, vectors)
    await build_index(store.database, m=2, ef_construction=4)
    report = await store.recall_check(model=MODEL, sample=10_000, top_k=top_k)
    assert report.sampled == 300
    by_hand = {effort: await measured(store, vectors, top_k=top_k, effort=effort) for effort in (40, 100)}
    assert by_hand[40] < 0.9
    assert {effort: report.by_ef_search[effort] for effort in by_hand} == pytest.approx(by_hand, abs=0.01)


async def test_rows_written_again_are_measured_as_they_are(own: Store) -> None:
    """Dead rows are still in the graph, and take a part of what the index looks at."""
    again = clustered()[:1500]
    await run(own.database, "ALTER TABLE knowledge_chunks SET (autovacuum_enabled = off)")
    for turn in range(1, 3):
        first = 1 if turn == 1 else 10_001
        await run(own.database, f"DELETE FROM knowledge_chunks WHERE id BETWEEN {first} AND {first + 1499}")
        await insert(own.database, again, first_id=10_001 * turn)
    report = await own.recall_check(model=MODEL, sample=30)
    assert report.sampled == 30
    assert 0.9 <= report.recall <= 1


async def test_without_an_index_everything_is_compared(own: Store) -> None:
    await run(own.database, "DROP INDEX idx_chunks_embedding")
    report = await own.recall_check(model=MODEL, sample=5)
    assert set(report.by_ef_search.values()) == {1.0}


async def test_which_of_two_equals_was_found_is_no_matter(store: Store) -> None:
    await insert(store.database, np.repeat(clustered(20), 20, axis=0))
    await build_index(store.database)
    report = await store.recall_check(model=MODEL, sample=100)
    assert set(report.by_ef_search.values()) == {1.0}


@pytest.mark.parametrize("top_k", [1, 60, 450, 500])
async def test_the_effort_is_that_of_a_search(clustered_store: Store, top_k: int) -> None:
    # So many neighbours that chance misses no tenth of them.
    report = await clustered_store.recall_check(model=MODEL, sample=max(2, 100 // top_k), top_k=top_k)
    assert report.ef_search == ef_search(top_k)
    assert min(report.by_ef_search) >= top_k
    assert report.recall > 0.9


async def test_nothing_is_left_on_the_connection(own_url: URL) -> None:
    async with Store.open(settings_for(own_url, db_pool_max_size=1)) as store:
        await store.recall_check(model=MODEL, sample=1)
        async with store.database.connect() as connection:
            settings = "SELECT current_setting('hnsw.ef_search'), current_setting('hnsw.iterative_scan')"
            assert (await connection.execute(text(settings))).one() == ("40", "off")


# Which vectors


@pytest.mark.parametrize("count", [1, 2, 7])
async def test_fewer_vectors_than_asked_for(store: Store, count: int) -> None:
    await insert(store.database, clustered(count))
    report = await store.recall_check(model=MODEL)
    assert (report.sampled, report.recall) == (count, 1.0)


async def test_each_model_by_itself(own: Store) -> None:
    await insert(own.database, clustered(30, seed=2), model=OTHER, first_id=5_000)
    report = await own.recall_check(model=OTHER, sample=40)
    assert report.sampled == 30
    assert report.recall > 0.9
    assert (await own.recall_check(model=MODEL, sample=40)).is_good
    with pytest.raises(NotFoundError, match="'model-c'"):
        await own.recall_check(model="model-c")


async def test_the_embedders_model_by_default(store: Store) -> None:
    await insert(store.database, clustered(5), model=HashingEmbedder().model)
    assert (await store.recall_check()).model == HashingEmbedder().model
    with pytest.raises(NotFoundError, match="''"):
        await store.recall_check(model="")


async def test_without_vectors_there_is_nothing_to_check(store: Store) -> None:
    with pytest.raises(NotFoundError, match="embed some chunks first"):
        await store.recall_check(model=MODEL)
    await store.add_document("t", "waits for its vector")
    with pytest.raises(NotFoundError):
        await store.recall_check()
    with pytest.raises(NotFoundError):
        await store.recall_check(model=MODEL)


async def test_without_an_embedder_the_model_must_be_named(clustered_store: Store) -> None:
    with pytest.raises(ConfigurationError, match="no embedder"):
        await clustered_store.recall_check()


async def test_a_sample_is_drawn_from_all(clustered_store: Store) -> None:
    """Not the first that were met: 50 of 2,000 lie around the middle. Five standard deviations either way."""
    drawn = await sample(clustered_store, 50)
    assert len(drawn) == 50
    assert 600 < np.mean(list(drawn)) < 1400
    assert max(drawn) > 1500
    assert min(drawn) < 500
    assert drawn != await sample(clustered_store, 50, seed=0.1)
    stored = pack_vectors(clustered())
    assert all(pack_vectors(vector[None].astype(np.float32))[0] == stored[key - 1] for key, vector in drawn.items())


async def test_all_are_drawn_where_there_are_no_more(clustered_store: Store) -> None:
    assert len(await sample(clustered_store, VECTORS)) == VECTORS
    assert len(await sample(clustered_store, 10_000)) == VECTORS


@pytest.mark.parametrize("far", [10**6, 10**15, 2**63 - 1])
async def test_gaps_in_the_ids(store: Store, far: int) -> None:
    """Hardly a random id is one of a chunk: then the newest are taken."""
    await insert(store.database, clustered(20))
    await insert(store.database, clustered(1), first_id=far, model=OTHER)
    assert len(await sample(store, 5)) == 5
    assert (await store.recall_check(model=MODEL)).sampled == 20
    assert (await store.recall_check(model=OTHER)).sampled == 1


async def test_ids_that_no_sequence_gave(store: Store) -> None:
    await insert(store.database, clustered(20), first_id=-(2**63))
    assert set(await sample(store, 5)) == {-(2**63) + place for place in range(15, 20)}
    assert (await store.recall_check(model=MODEL)).sampled == 20


async def test_a_vector_without_a_direction_is_passed_over(store: Store) -> None:
    """Other programs may have stored it; no distance to it is a number."""
    await insert(store.database, clustered(20))
    zeros = "UPDATE knowledge_chunks SET embedding = array_fill(0, ARRAY[1536])::halfvec WHERE id <= 5"
    await run(store.database, zeros)
    report = await store.recall_check(model=MODEL)
    assert (report.sampled, report.recall) == (15, 1.0)
    # Nor does it count as a neighbour where there are hardly any.
    assert (await store.recall_check(model=MODEL, top_k=18)).recall == 1.0


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sample": 0}, "sample must be a whole number from 1 to 10000"),
        ({"sample": 10_001}, "sample"),
        ({"sample": True}, "sample"),
        ({"sample": "5"}, "sample"),
        ({"sample": 5.0}, "sample"),
        ({"top_k": 0}, "top_k must be a whole number from 1 to 500"),
        ({"top_k": 501}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"wanted": -0.1}, "wanted must be a number from 0 to 1"),
        ({"wanted": 1.1}, "wanted"),
        ({"wanted": float("nan")}, "wanted"),
        ({"wanted": True}, "wanted"),
        ({"wanted": "1"}, "wanted"),
        ({"model": 5}, "model must be text"),
        ({"model": "\x00"}, "NUL"),
    ],
)
async def test_bad_arguments(clustered_store: Store, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        await clustered_store.recall_check(**{"model": MODEL, **arguments})


async def test_before_the_first_migration(empty_url: URL) -> None:
    async with Store.open(settings_for(empty_url)) as store:
        with pytest.raises(SchemaOutdatedError):
            await store.recall_check(model=MODEL)
