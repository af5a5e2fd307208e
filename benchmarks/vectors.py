"""What the search benchmarks share: rows with vectors, hand-written asyncpg beside ours, turns query by query.

A row's number stands in its ``location``, so that every side's hits can be compared with the truth: the
nearest rows found with numpy among the stored half-precision values, which asks nobody that is measured.
"""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import asyncpg
import numpy as np
from common import clustered_vectors, driver_arguments, progress_bar
from numpy.typing import NDArray
from sqlalchemy import URL, Engine, Pool, event

from kotonoha_store import EMBEDDING_DIMENSION, NewChunk, Scope, SearchResult, SourceType, Store

MODEL: Final = "benchmark"
TOP_K: Final = 10
CHUNKS_A_SOURCE: Final = 10
SOURCES_A_COMMIT: Final = 100
# pgvector's binary format: dimension, zero, then big-endian halves.
HEADER: Final = EMBEDDING_DIMENSION.to_bytes(2, "big") + bytes(2)
SERVER_OPTIONS: Final = {
    # Nothing else at work while somebody is measured.
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "maintenance_work_mem": "2GB",
}

Vectors = NDArray[np.float32]
Numbers = list[int]
"""The numbers of the rows that a search found, nearest first."""
Search = Callable[[Vectors], Awaitable[Any]]


def split_vectors(rows: int, queries: int) -> tuple[Vectors, Vectors]:
    """Vectors to store and others of the same clusters to search with."""
    stored, asked = np.split(clustered_vectors(rows + queries), [rows])
    return stored, asked


def nearest_rows(stored: Vectors, queries: Vectors, members: NDArray[np.int64] | None = None) -> list[set[int]]:
    """The true nearest rows of each query, by cosine, among ``members`` (all rows where None)."""
    members = np.arange(len(stored)) if members is None else members
    halves = stored[members].astype(np.float16).astype(np.float32)
    halves /= np.linalg.norm(halves, axis=1, keepdims=True)
    similar = queries.astype(np.float16).astype(np.float32) @ halves.T
    return [set(members[np.argsort(-row)[:TOP_K]].tolist()) for row in similar]


def recall(found: Sequence[Numbers], truth: Sequence[set[int]]) -> float:
    """Mean share of the true nearest rows that were found."""
    return statistics.mean(len(true.intersection(rows)) / len(true) for rows, true in zip(found, truth, strict=True))


async def load(store: Store, connection: Any, vectors: Vectors, channels: NDArray[np.int64] | None = None) -> None:
    """Fill the empty tables of ``store`` through its own API and build the HNSW index afterwards.

    Args:
        channels: the channel of each source, ten rows of ``vectors`` after the other; all 1 where None.
    """
    definition = await connection.fetchval("SELECT pg_get_indexdef('idx_chunks_embedding'::regclass)")
    await connection.execute("DROP INDEX idx_chunks_embedding")
    await connection.execute("TRUNCATE knowledge_sources RESTART IDENTITY CASCADE")
    sources = len(vectors) // CHUNKS_A_SOURCE
    channels = np.ones(sources, dtype=np.int64) if channels is None else channels
    with progress_bar() as bar:
        task = bar.add_task("loading", total=len(vectors))
        for first in range(0, sources, SOURCES_A_COMMIT):
            async with store.begin() as tx:
                for source in range(first, min(first + SOURCES_A_COMMIT, sources)):
                    scope = Scope(guild_id=1, channel_id=int(channels[source]))
                    source_id = await tx.knowledge.add_source(SourceType.DOCUMENT_FILE, "benchmark", scope=scope)
                    await tx.knowledge.add_chunks(source_id, make_chunks(vectors, source * CHUNKS_A_SOURCE))
            bar.advance(task, SOURCES_A_COMMIT * CHUNKS_A_SOURCE)
    await connection.execute(definition)
    await connection.execute("VACUUM ANALYZE")
    await connection.execute("CHECKPOINT")


def make_chunks(vectors: Vectors, first: int, count: int = CHUNKS_A_SOURCE) -> list[NewChunk]:
    """Chunks of some 400 characters with the vectors from ``first`` on; the row's number is in the location."""
    return [
        NewChunk(
            content=" ".join(f"{number * 57 + word:x}" for word in range(70)),
            location={"number": number},
            token_count=100,
            embedding=vectors[number],
            embedding_model=MODEL,
        )
        for number in range(first, first + count)
    ]


# Ours


def our_search(store: Store, **options: Any) -> Search:
    """A search by vector, as a caller of the library writes it."""

    async def search(query: Vectors) -> SearchResult:
        return await store.search(query, model=MODEL, top_k=TOP_K, threshold=None, **options)

    return search


def our_numbers(result: SearchResult) -> Numbers:
    return [hit.location["number"] for hit in result.hits]


async def search_settings(store: Store, query: Vectors) -> dict[str, str]:
    """What pgvector's settings are while our store searches."""
    async with store.begin() as tx:
        await tx.search.nearest(query, model=MODEL, top_k=TOP_K, everywhere=True)
        connection = await tx.session.connection()
        rows = await connection.exec_driver_sql("SELECT name, setting FROM pg_settings WHERE name LIKE 'hnsw.%'")
        return {row.name: row.setting for row in rows}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A statement that a search of ours sent.

    Attributes:
        vectors: which of the parameters are the query.
    """

    sql: str
    parameters: tuple[Any, ...]
    vectors: frozenset[int]

    def arguments(self, query: Vectors) -> list[Any]:
        """The parameters for another query."""
        return [query if place in self.vectors else value for place, value in enumerate(self.parameters)]


async def record_search(search: Search, queries: Vectors) -> Recorded:
    """The statement that compares vectors, of those that a search sends, with the query found by its changing."""
    sent = []
    for query in queries[:2]:
        with _sent_statements() as statements:
            await search(query)
            # The driver calls its loggers in the loop's next round.
            await asyncio.sleep(0)
        compared = [statement for statement in statements if "<=>" in statement[0]]
        if len(compared) != 1:
            raise RuntimeError(f"a search sends other statements than this script knows: {statements}")
        sent.append(compared[0])
    (sql, one), (again, other) = sent
    if sql != again:
        raise RuntimeError(f"a search sends another statement each time: {sql}; {again}")
    changing = (place for place, pair in enumerate(zip(one, other, strict=True)) if repr(pair[0]) != repr(pair[1]))
    return Recorded(sql, one, frozenset(changing))


@contextmanager
def _sent_statements() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Collect what is sent through SQLAlchemy, and by the methods of the driver's connections in its pools."""
    sent: list[tuple[str, tuple[Any, ...]]] = []

    def through_sqlalchemy(_: Any, __: Any, sql: str, parameters: Any, ___: Any, ____: bool) -> None:
        sent.append((sql, tuple(parameters)))

    def by_driver(query: Any) -> None:
        sent.append((query.query, tuple(query.args or ())))

    watched = []

    def watch(connection: Any, *_: Any) -> None:
        connection.driver_connection.add_query_logger(by_driver)
        watched.append(connection.driver_connection)

    event.listen(Engine, "before_cursor_execute", through_sqlalchemy)
    event.listen(Pool, "checkout", watch)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", through_sqlalchemy)
        event.remove(Pool, "checkout", watch)
        for connection in watched:
            connection.remove_query_logger(by_driver)


# By hand


def pack(vectors: Vectors) -> list[bytes]:
    """What hand-written code does to send vectors in binary; nothing is checked."""
    return [HEADER + row.tobytes() for row in vectors.astype(">f2")]


@asynccontextmanager
async def raw_pool(url: URL, settings: Mapping[str, str], *, size: int = 1) -> AsyncIterator[Any]:
    """A pool of bare asyncpg with its settings set once, when it connects.

    As the server's settings: those of a session are reset whenever a connection comes back to the pool.
    """

    async def ready(connection: Any) -> None:
        await connection.set_type_codec("halfvec", schema="public", encoder=_encode, decoder=bytes, format="binary")

    arguments = driver_arguments(url)
    arguments["server_settings"] = {**(arguments.get("server_settings") or {}), **settings}
    pool = await asyncpg.create_pool(min_size=size, max_size=size, init=ready, **arguments)
    try:
        yield pool
    finally:
        await pool.close()


def _encode(vector: Vectors) -> bytes:
    return pack(vector[np.newaxis])[0]


def raw_numbers(rows: Sequence[Any]) -> Numbers:
    return [json.loads(row["location"])["number"] for row in rows]


# Turns


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each query, and what it found in the first round."""

    seconds: list[float]
    answers: list[Any]

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)


async def take_turns(
    searches: Mapping[str, Callable[[Any], Awaitable[Any]]],
    queries: Vectors | Sequence[str],
    *,
    repeats: int,
    label: str,
) -> dict[str, Turns]:
    """Ask every query of each side in turn, who goes first alternating, after a warm-up of twenty queries.

    Each side asks a query once more before it is timed: else whoever goes first would read the pages that the
    next one finds in the server's small cache.
    """
    turns = {name: Turns([], []) for name in searches}
    order = list(searches.items())
    with progress_bar() as bar:
        task = bar.add_task(label, total=repeats * len(queries))
        for query in queries[:20]:
            for _, search in order:
                await search(query)
        for round_number in range(repeats):
            for number, query in enumerate(queries):
                for name, search in order if (number + round_number) % 2 == 0 else reversed(order):
                    await search(query)
                    started = time.perf_counter()
                    answer = await search(query)
                    turns[name].seconds.append(time.perf_counter() - started)
                    if round_number == 0:
                        turns[name].answers.append(answer)
                bar.advance(task)
    return turns
