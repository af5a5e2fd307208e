"""How fast vectors are written: beside hand-written asyncpg, pgvector's own type, and other stores.

    python benchmarks/writes.py [--rows N] [--repeats R] [--peers NAME ...] [--json]

Embeddings into rows that wait for them, batches of 100, one connection:

* fenced: :class:`EmbeddingQueue`'s claim and complete, as a worker calls them, against bare asyncpg on a held
  connection sending the same statements in the same transactions;
* update: only the UPDATE that writes the vectors, one transaction a batch, through SQLAlchemy with our type,
  through asyncpg, and through SQLAlchemy with pgvector's stock type. All three by executemany.

Ingest of chunks that have their vectors already, one source, one transaction:

* ``add_chunks`` in ``Store.begin`` against COPY of the same rows into the same columns of the same tables,
  once with the records made from the chunks on the clock (as any program must), once with records made before;
* against other stores on the same server, each by its documented way of adding many rows.

Chunks without vectors, Japanese texts of 400 characters, 2,000 a call, with the terms that searches by word need
(``ingest_words``). The rivals' tables have no words; of ours every figure includes them.

Everywhere the HNSW index is dropped first, and then once more all have one (``with_hnsw``). All sides have the
same durability: first ``synchronous_commit = off`` (the figures quoted: here the time of an fsync, paid by whoever
commits more often, would hide the rest), then ``on`` (``durable``).
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import numpy as np
from common import (
    SEED,
    Contestant,
    clustered_vectors,
    connect,
    console,
    contest,
    embedded_server,
    median_rate,
    notes,
    package_versions,
    print_json,
    run_sql,
    server_versions,
    store_settings,
)
from japanese import read_corpus
from peers import EF_CONSTRUCTION, PEERS, M, Peer, installed, peer_packages
from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import URL, BigInteger, Column, MetaData, Text, bindparam, update
from sqlalchemy import Table as SQLTable
from sqlalchemy.ext.asyncio import create_async_engine
from vectors import CHUNKS_A_SOURCE, MODEL, SERVER_OPTIONS, Vectors, pack
from waiting import Batch, by_same_statements, by_us, vectors_for
from words import LENGTH
from words import load as ingest_texts
from write_figures import Seconds, embedding_figures, ingest_figures, peer_figures, print_figures

from kotonoha_store import (
    EMBEDDING_DIMENSION,
    HalfVector,
    KnowledgeChunk,
    NewChunk,
    Scope,
    SourceType,
    Store,
    queue_statements,
)
from kotonoha_store.columns import pack_vectors
from kotonoha_store.database import register_codecs

BATCH: Final = 100
WORD_TEXTS: Final = 6000
HNSW: Final = f"USING hnsw ({{column}} {{ops}}) WITH (m = {M}, ef_construction = {EF_CONSTRUCTION})"


# Embeddings into rows that wait


class Waiting:
    """Chunks that wait for their vectors, ten to a source, as the archiver leaves them."""

    def __init__(self, bench: "Bench", rows: int) -> None:
        self._bench = bench
        self._connection = bench.connection
        self._rows = rows
        self.ids: list[int] = []

    async def prepare(self) -> None:
        """Leave exactly ``rows`` waiting chunks and their jobs, all due."""
        connection = self._connection
        await self._bench.reset("knowledge_chunks")
        sources = await connection.fetch(
            "INSERT INTO knowledge_sources (type, title, guild_id) "
            "SELECT 'discord_session', 'benchmark', 1 FROM generate_series(1, $1) RETURNING id",
            self._rows // CHUNKS_A_SOURCE,
        )
        chunks = await connection.fetch(
            "INSERT INTO knowledge_chunks (source_id, content, token_count, guild_id) "
            "SELECT source, repeat(md5(source::text || n), 12), 100, 1 "
            "FROM unnest($1::bigint[]) AS source, generate_series(1, $2) AS n ORDER BY source, n RETURNING id",
            [row["id"] for row in sources],
            CHUNKS_A_SOURCE,
        )
        self.ids = [row["id"] for row in chunks]
        await connection.execute("INSERT INTO embedding_jobs (chunk_id) SELECT unnest($1::bigint[])", self.ids)
        await self._bench.settle()

    def batches(self) -> Iterator[list[int]]:
        for start in range(0, len(self.ids), BATCH):
            yield self.ids[start : start + BATCH]

    async def check(self) -> None:
        """All of them must have their vectors now."""
        left = await self._connection.fetchval("SELECT count(*) FROM knowledge_chunks WHERE embedding IS NULL")
        if left:
            raise RuntimeError(f"{left} of {self._rows} vectors were not written")


async def until_empty(write: Batch) -> None:
    """Batch after batch."""
    while await write():
        pass


async def update_by_us(store: Store, waiting: Waiting, vectors: Vectors) -> None:
    """The UPDATE through SQLAlchemy Core with our binary type."""
    statement = (
        update(KnowledgeChunk)
        .where(KnowledgeChunk.id == bindparam("chunk"))
        .values(embedding=bindparam("vector", type_=HalfVector()), embedding_model=bindparam("model"))
    )
    for ids in waiting.batches():
        # All at once, as the queue does it.
        packed = pack_vectors(vectors_for(vectors, ids))
        rows = [{"chunk": i, "vector": vector, "model": MODEL} for i, vector in zip(ids, packed, strict=True)]
        async with store.database.engine.begin() as connection:
            await connection.execute(statement, rows)
    await waiting.check()


async def update_by_hand(connection: Any, waiting: Waiting, vectors: Vectors) -> None:
    """The same UPDATE through asyncpg."""
    write = queue_statements.write_vector()
    for ids in waiting.batches():
        packed = pack(vectors_for(vectors, ids))
        rows = [{"chunk": i, "vector": vector, "model": MODEL} for i, vector in zip(ids, packed, strict=True)]
        async with connection.transaction(isolation="read_committed"):
            await connection.executemany(write.sql, [write.arguments(row) for row in rows])
    await waiting.check()


async def update_by_stock_type(engine: Any, waiting: Waiting, vectors: Vectors) -> None:
    """The same UPDATE through SQLAlchemy Core with ``pgvector.sqlalchemy.HALFVEC``, which sends text."""
    table = SQLTable(
        "knowledge_chunks",
        MetaData(),
        Column("id", BigInteger, primary_key=True),
        Column("embedding", HALFVEC(EMBEDDING_DIMENSION)),
        Column("embedding_model", Text),
    )
    statement = (
        update(table)
        .where(table.c.id == bindparam("chunk"))
        .values(embedding=bindparam("vector", type_=HALFVEC(EMBEDDING_DIMENSION)), embedding_model=bindparam("model"))
    )
    for ids in waiting.batches():
        # Arrays: of what the stock type takes, it is quickest with these.
        given = vectors_for(vectors, ids)
        rows = [{"chunk": i, "vector": vector, "model": MODEL} for i, vector in zip(ids, given, strict=True)]
        async with engine.begin() as connection:
            await connection.execute(statement, rows)
    await waiting.check()


async def measure_embedding(bench: "Bench", rows: int, repeats: int) -> Seconds:
    """Seconds for writing ``rows`` embeddings, by contestant."""
    waiting = Waiting(bench, rows)
    store, vectors = bench.store, bench.vectors

    async def checked(write: Batch) -> None:
        await until_empty(write)
        await waiting.check()

    contestants = {
        "fenced/ours": partial(checked, by_us(store, BATCH, vectors)),
        "fenced/raw": partial(checked, by_same_statements(bench.connection, BATCH, vectors)),
        "update/ours": partial(update_by_us, store, waiting, vectors),
        "update/raw": partial(update_by_hand, bench.connection, waiting, vectors),
        "update/stock": partial(update_by_stock_type, bench.stock_engine, waiting, vectors),
    }
    return await contest(
        [Contestant(name, waiting.prepare, run) for name, run in contestants.items()],
        repeats=repeats,
        label="writing embeddings",
    )


# Ingest of chunks that have their vectors


def make_chunks(count: int, vectors: Vectors) -> list[NewChunk]:
    """Chunks of a document with their vectors, always the same."""
    words = random.Random(SEED)
    said = datetime(2026, 11, 21, tzinfo=UTC)
    return [
        NewChunk(
            content=" ".join(f"{words.getrandbits(24):x}" for _ in range(56)),
            location={
                "url": "https://example.com/document",
                "label": f"characters {400 * index + 1} to {400 * index + 400}",
                "chunk_index": index,
                "start": 400 * index,
                "end": 400 * index + 400,
            },
            token_count=100,
            occurred_from=said,
            occurred_to=said,
            embedding=vectors[index % len(vectors)],
            embedding_model=MODEL,
        )
        for index in range(count)
    ]


async def ingest_by_us(store: Store, chunks: Sequence[NewChunk]) -> None:
    """A source and its chunks in one transaction."""
    async with store.begin() as tx:
        scope = Scope(guild_id=1, channel_id=2)
        source_id = await tx.knowledge.add_source(SourceType.DOCUMENT_FILE, "benchmark", scope=scope)
        await tx.knowledge.add_chunks(source_id, chunks)


COPIED: Final = (
    "source_id",
    "guild_id",
    "channel_id",
    "content",
    "embedding",
    "location",
    "token_count",
    "embedding_model",
    "content_hash",
    "occurred_from",
    "occurred_to",
)


def make_records(chunks: Sequence[NewChunk]) -> list[tuple[Any, ...]]:
    """The least that turns chunks into records for COPY (without the source): nothing is checked."""
    packed = pack(np.stack([chunk.embedding for chunk in chunks]))
    return [
        (
            1,
            2,
            chunk.content,
            vector,
            json.dumps(chunk.location),
            chunk.token_count,
            chunk.embedding_model,
            hashlib.sha256(chunk.content.encode()).digest(),
            chunk.occurred_from,
            chunk.occurred_to,
        )
        for chunk, vector in zip(chunks, packed, strict=True)
    ]


async def ingest_by_copy(connection: Any, records: Callable[[], Sequence[tuple[Any, ...]]]) -> None:
    """One COPY, ids from the sequence; they are not returned, nor is anything locked."""
    async with connection.transaction(isolation="read_committed"):
        source_id = await connection.fetchval(
            "INSERT INTO knowledge_sources (type, title, status, guild_id, channel_id) "
            "VALUES ('document_file', 'benchmark', 'completed', 1, 2) RETURNING id"
        )
        rows = [(source_id, *record) for record in records()]
        await connection.copy_records_to_table("knowledge_chunks", columns=COPIED, records=rows)


async def measure_ingest(bench: "Bench", rows: int, repeats: int, *, peers: bool) -> Seconds:
    """Seconds for adding ``rows`` chunks, by contestant."""
    chunks = make_chunks(rows, bench.vectors)
    records = make_records(chunks)
    contestants = {
        "ours": partial(ingest_by_us, bench.store, chunks),
        "copy": partial(ingest_by_copy, bench.connection, lambda: make_records(chunks)),
    }
    if not peers:
        contestants["copy, records ready"] = partial(ingest_by_copy, bench.connection, lambda: records)
    for name, peer in bench.peers.items() if peers else ():
        peer.take(chunks)
        contestants[name] = peer.insert

    async def prepare(table: str) -> None:
        await bench.reset(table)
        await bench.settle()

    tables = {name: peer.table for name, peer in bench.peers.items()}
    return await contest(
        [
            Contestant(name, partial(prepare, tables.get(name, "knowledge_chunks")), run)
            for name, run in contestants.items()
        ],
        repeats=repeats,
        label=f"ingesting{' beside other stores' if peers else ''}",
    )


# The whole


@dataclass(frozen=True, slots=True)
class Bench:
    """What the measurements use: our store, one bare connection, the others.

    Attributes:
        bases: by table, what :meth:`reset` fills it with and the index that it builds on that; else it only empties.
    """

    store: Store
    connection: Any
    stock_engine: Any
    peers: dict[str, Peer]
    vectors: Vectors
    bases: dict[str, str] = field(default_factory=dict)

    async def reset(self, table: str) -> None:
        """Bring a table into the state that every run starts from."""
        both = ("knowledge_sources", table) if table == "knowledge_chunks" else (table,)
        index = self.bases.get(table)
        await self.connection.execute("DROP INDEX IF EXISTS bench_hnsw")
        await self.connection.execute(f"TRUNCATE {both[0]} {'' if index else 'RESTART IDENTITY'} CASCADE")
        if index:
            for name in both:
                await self.connection.execute(f"INSERT INTO {name} SELECT * FROM base_{name}")
            if table == "knowledge_chunks":
                # The same ids in every run, and so the same vectors.
                await self.connection.execute(
                    "SELECT setval(pg_get_serial_sequence('knowledge_chunks', 'id'), max(id)) FROM knowledge_chunks"
                )
            await self.connection.execute(f"CREATE INDEX bench_hnsw ON {table} {index}")

    async def settle(self) -> None:
        """The same start for everybody: fresh statistics, no dirty pages."""
        await self.connection.execute("ANALYZE knowledge_sources, knowledge_chunks, embedding_jobs")
        await self.connection.execute("CHECKPOINT")

    async def keep_as_base(self, table: str, column: str, operators: str) -> None:
        """Let :meth:`reset` bring back what the table holds now, with an HNSW index over it."""
        for name in ("knowledge_sources", table) if table == "knowledge_chunks" else (table,):
            await self.connection.execute(f"CREATE TABLE base_{name} AS TABLE {name}")
        self.bases[table] = HNSW.format(column=column, ops=operators)


@asynccontextmanager
async def opened(url: URL, vectors: Vectors, peer_names: Sequence[str]) -> AsyncIterator[Bench]:
    """Open everybody on new connections, so that the database's settings hold for all."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(store_settings(url)))
        await store.migrate()
        connection = await connect(url)
        stack.push_async_callback(connection.close)
        await register_codecs(connection)
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        stack.push_async_callback(engine.dispose)
        peers: dict[str, Peer] = {}
        for name in peer_names:
            peers[name] = PEERS[name][0]()
            await connection.execute(f"DROP TABLE IF EXISTS {peers[name].table}")
            await peers[name].open(url)
            stack.push_async_callback(peers[name].close)
        yield Bench(store, connection, engine, peers, vectors)


async def measure_plain(url: URL, vectors: Vectors, options: argparse.Namespace) -> dict[str, Any]:
    """Everything without an HNSW index."""
    async with opened(url, vectors, options.peers) as bench:
        await bench.connection.execute("DROP INDEX IF EXISTS idx_chunks_embedding")
        embedding = await measure_embedding(bench, options.rows, options.repeats)
        ingest = await measure_ingest(bench, options.rows, options.repeats, peers=False)
        figures = embedding_figures(embedding, options.rows) | ingest_figures(ingest, options.rows)
        if bench.peers:
            beside = await measure_ingest(bench, options.peer_rows, options.peer_repeats, peers=True)
            figures["peers"] = peer_figures(beside, options.peer_rows)
            figures["rates"]["ingest beside peers"] = median_rate(options.peer_rows, beside["ours"])
        return figures


async def measure_with_hnsw(url: URL, vectors: Vectors, base: Vectors, options: argparse.Namespace) -> dict[str, Any]:
    """The same with an HNSW index of the same options on every table, over rows that are there already."""
    rows = options.hnsw_rows
    async with opened(url, vectors, options.peers) as bench:
        await _load_bases(bench, base)
        ingest = await measure_ingest(bench, rows, options.peer_repeats, peers=True)
        embedding = await measure_embedding(bench, rows, options.peer_repeats)
        figures = embedding_figures(embedding, rows) | ingest_figures(ingest, rows)
        if bench.peers:
            figures["peers"] = peer_figures(ingest, rows)
        return figures


async def _load_bases(bench: Bench, vectors: Vectors) -> None:
    """``vectors``: none of those that are added later; the graph takes a copy of what it has for nothing."""
    notes.print(f"loading {len(vectors)} rows everywhere")
    await bench.connection.execute("DROP INDEX IF EXISTS idx_chunks_embedding")
    await bench.reset("knowledge_chunks")
    chunks = make_chunks(len(vectors), vectors)
    await ingest_by_us(bench.store, chunks)
    await bench.keep_as_base("knowledge_chunks", "embedding", "halfvec_cosine_ops")
    for peer in bench.peers.values():
        peer.take(chunks)
        await peer.insert()
        await bench.keep_as_base(peer.table, peer.column, peer.operators)


async def measure_all(url: URL, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, one durability after the other."""
    # From the same clusters, but no vector is in both.
    base, vectors = np.split(clustered_vectors(options.hnsw_base + options.rows), [options.hnsw_base])
    await run_sql(url, "ALTER DATABASE bench SET synchronous_commit = off")
    figures = await measure_plain(url, vectors, options)
    print_figures(f"no HNSW index, synchronous_commit off, {options.rows} rows", figures)
    if options.hnsw_rows:
        figures["with_hnsw"] = await measure_with_hnsw(url, vectors, base, options)
        title = f"HNSW index over {options.hnsw_base} rows, {options.hnsw_rows} more"
        print_figures(title, figures["with_hnsw"])
    if options.durable:
        await run_sql(url, "ALTER DATABASE bench SET synchronous_commit = on")
        figures["durable"] = await measure_plain(url, vectors, options)
        print_figures(f"no HNSW index, synchronous_commit on, {options.rows} rows", figures["durable"])
    figures["ingest_words"] = await measure_words(url)
    console.print(f"Japanese texts of {LENGTH} characters, terms included: {figures['ingest_words']:,.0f} chunks/s")
    versions = await server_versions(url) | package_versions(*peer_packages(options.peers))
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for name in options.peers:
        console.print(f"{name}: {PEERS[name][0].note}")
    return figures


async def measure_words(url: URL) -> float:
    """Texts without vectors, two thousand a transaction; the median of three rounds, in chunks a second."""
    await run_sql(url, "ALTER DATABASE bench SET synchronous_commit = off")
    texts = read_corpus(None).texts(3 * WORD_TEXTS, LENGTH)
    async with Store.open(store_settings(url)) as store:
        rounds = [texts[first : first + WORD_TEXTS] for first in range(0, len(texts), WORD_TEXTS)]
        return statistics.median([await ingest_texts(store, part) for part in rounds])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=5000, help="a multiple of 100")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-rows", type=int, default=2000, help="rows beside other stores")
    parser.add_argument("--peer-repeats", type=int, default=3, help="rounds beside other stores and with HNSW")
    parser.add_argument("--hnsw-base", type=int, default=2000, help="rows that an HNSW index has before")
    parser.add_argument("--hnsw-rows", type=int, default=300, help="rows added to it, a multiple of 100; 0: skip")
    parser.add_argument("--no-durable", dest="durable", action="store_false", help="skip synchronous_commit = on")
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS), help="none after the option: skip them"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.rows < BATCH or options.rows % BATCH or options.hnsw_rows % BATCH:
        parser.error(f"--rows and --hnsw-rows must be multiples of {BATCH}")
    if max(options.hnsw_rows, options.peer_rows) > options.rows:
        parser.error("--hnsw-rows and --peer-rows must not exceed --rows, or vectors would repeat")
    return options


def main() -> None:
    """Measure on a server of our own."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch, embedded_server(options=SERVER_OPTIONS) as url:
        options.peers = installed(options.peers, scratch)
        figures = asyncio.run(measure_all(url, options))
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
