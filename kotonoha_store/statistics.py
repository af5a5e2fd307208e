"""How a database stands: what connects to it, what it holds, what waits, how large its parts are."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from time import perf_counter
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.models import Base
from kotonoha_store.records import Progress, ProviderPause, QueueDepth, SessionStatus, SourceStatus

_ROUND_TRIPS: Final = 5
TABLES: Final = tuple(Base.metadata.tables)


@dataclass(frozen=True, slots=True)
class ConnectionReport:
    """What one connection tells of the server behind it.

    Attributes:
        server: version of PostgreSQL, such as ``18.4``.
        pgvector: version of the extension in this database, None where it is not there.
        pgvector_available: the version that the server could install, None where it has none.
        schema: where the extension lives.
        host: address of the server as it sees itself; None for a socket.
        tls: version of TLS, None without.
        is_replica: whether it only replays what a primary writes.
        round_trip_seconds: median of a few.
    """

    server: str
    pgvector: str | None
    pgvector_available: str | None
    schema: str | None
    database: str
    user: str
    host: str | None
    port: int | None
    tls: str | None
    is_replica: bool
    round_trip_seconds: float


@dataclass(frozen=True, slots=True)
class RelationSize:
    """A table with what is beside it, or an index of one.

    Attributes:
        table: of an index, else None.
        rows: of a table, about: the planner's estimate; before the first ANALYZE what was counted of writes.
        bytes: of a table without its indexes.
    """

    name: str
    table: str | None
    rows: int | None
    bytes: int


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What the store holds and what waits.

    Attributes:
        sessions: how many of each status.
        sources: how many of each status.
        chunks: all of them, with and without a vector.
        pauses: providers that are left alone or have failed lately.
        database_bytes: of the whole database, whoever else uses it.
    """

    sessions: dict[SessionStatus, int]
    sources: dict[SourceStatus, int]
    chunks: int
    queue: QueueDepth
    pauses: tuple[ProviderPause, ...]
    tables: tuple[RelationSize, ...]
    indexes: tuple[RelationSize, ...]
    database_bytes: int


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """What the server has counted of a table since its statistics were last reset.

    Attributes:
        dead_rows: deleted or updated, and not yet cleaned up by VACUUM.
        vacuumed_at, analysed_at: by hand or by autovacuum.
        cache_hit: share of the blocks read that were in shared_buffers; None when none were read.
    """

    name: str
    live_rows: int
    dead_rows: int
    vacuumed_at: datetime | None
    analysed_at: datetime | None
    sequential_scans: int
    index_scans: int
    cache_hit: float | None


@dataclass(frozen=True, slots=True)
class IndexStatistics:
    """How often an index was used since the server's statistics were last reset."""

    name: str
    table: str
    scans: int
    bytes: int
    is_valid: bool


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """What searches and the planner go by.

    Attributes:
        models: how many chunks have a vector of each embedding model; under None those that have one of an unknown one.
        chunks: all of them.
        chunks_without_vector: waiting, or skipped by other programs.
        chunks_without_words: not found by words until they are filled in.
        terms_counted: how many chunks there were when the terms' frequencies were counted; None: never.
        common_terms: how many terms have a frequency.
    """

    models: tuple[tuple[str | None, int], ...]
    chunks: int
    chunks_without_vector: int
    chunks_without_words: int
    terms_counted: int | None
    common_terms: int
    tables: tuple[TableStatistics, ...]
    indexes: tuple[IndexStatistics, ...]


_CONNECTION: Final = """
    SELECT current_setting('server_version') AS server, e.extversion AS pgvector, n.nspname AS schema,
        a.default_version AS pgvector_available, current_database() AS database, current_user AS user,
        host(inet_server_addr()) AS host, inet_server_port() AS port,
        (SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()) AS tls, pg_is_in_recovery() AS is_replica
    FROM (VALUES (1)) AS one
    LEFT JOIN pg_extension AS e ON e.extname = 'vector'
    LEFT JOIN pg_namespace AS n ON n.oid = e.extnamespace
    LEFT JOIN pg_available_extensions AS a ON a.name = 'vector'
"""

_TABLE_SIZES: Final = """
    SELECT c.relname AS name, NULL AS table,
        CASE WHEN c.reltuples >= 0 THEN c.reltuples::bigint ELSE pg_stat_get_live_tuples(c.oid) END AS rows,
        pg_table_size(c.oid) AS bytes
    FROM pg_class AS c JOIN unnest(CAST(:tables AS text[])) AS t ON c.oid = to_regclass(t)
    ORDER BY bytes DESC, name
"""

_INDEX_SIZES: Final = """
    SELECT c.relname AS name, t AS table, NULL::bigint AS rows, pg_relation_size(c.oid) AS bytes
    FROM unnest(CAST(:tables AS text[])) AS t JOIN pg_index AS i ON i.indrelid = to_regclass(t)
    JOIN pg_class AS c ON c.oid = i.indexrelid
    ORDER BY bytes DESC, name
"""

_TABLES: Final = """
    SELECT s.relname AS name, s.n_live_tup AS live_rows, s.n_dead_tup AS dead_rows,
        greatest(s.last_vacuum, s.last_autovacuum) AS vacuumed_at,
        greatest(s.last_analyze, s.last_autoanalyze) AS analysed_at,
        coalesce(s.seq_scan, 0) AS sequential_scans, coalesce(s.idx_scan, 0) AS index_scans,
        CAST(hits AS double precision) / nullif(hits + reads, 0) AS cache_hit
    FROM unnest(CAST(:tables AS text[])) AS t JOIN pg_stat_all_tables AS s ON s.relid = to_regclass(t)
    JOIN pg_statio_all_tables AS io USING (relid)
    CROSS JOIN LATERAL (SELECT
        coalesce(heap_blks_hit, 0) + coalesce(idx_blks_hit, 0) + coalesce(toast_blks_hit, 0) AS hits,
        coalesce(heap_blks_read, 0) + coalesce(idx_blks_read, 0) + coalesce(toast_blks_read, 0) AS reads) AS blocks
    ORDER BY name
"""

_INDEXES: Final = """
    SELECT s.indexrelname AS name, s.relname AS table, coalesce(s.idx_scan, 0) AS scans,
        pg_relation_size(s.indexrelid) AS bytes, i.indisvalid AS is_valid
    FROM unnest(CAST(:tables AS text[])) AS t JOIN pg_stat_all_indexes AS s ON s.relid = to_regclass(t)
    JOIN pg_index AS i USING (indexrelid)
    ORDER BY 2, 1
"""

_MODELS: Final = """
    SELECT embedding_model AS model, count(*) FILTER (WHERE embedding IS NOT NULL) AS embedded, count(*) AS chunks
    FROM knowledge_chunks GROUP BY embedding_model ORDER BY embedded DESC, model
"""

_WORDS: Final = """
    SELECT (SELECT count(*) FROM knowledge_chunks AS c
            WHERE NOT EXISTS (SELECT FROM chunk_terms AS t WHERE t.chunk_id = c.id)) AS missing,
        (SELECT frequency FROM term_frequencies WHERE term = '') AS counted,
        (SELECT count(*) FROM term_frequencies WHERE term NOT IN ('', '#', '#size')) AS common
"""

# As ANALYZE decides itself: of others' tables it only warns.
_MAY_ANALYZE: Final = """
    SELECT pg_has_role(c.relowner, 'USAGE')
        OR (current_setting('server_version_num')::int >= 170000 AND has_table_privilege(c.oid, 'MAINTAIN'))
    FROM pg_class AS c WHERE c.oid = to_regclass(:table)
"""


async def connection_report(database: Database) -> ConnectionReport:
    """Connect, and say what was reached. Works before the first migration.

    Raises:
        StoreUnavailableError: the database did not answer.
        ConfigurationError: it refused this user, password or database name.
    """
    async with database.connect() as connection:
        with translated_errors():
            row = (await connection.execute(text(_CONNECTION))).one()
            seconds = []
            for _ in range(_ROUND_TRIPS):
                started = perf_counter()
                await connection.exec_driver_sql("SELECT 1")
                seconds.append(perf_counter() - started)
    return ConnectionReport(**row._mapping, round_trip_seconds=median(seconds))


async def store_status(database: Database) -> StoreStatus:
    """Count sessions, sources, chunks and the queue, and measure tables and indexes.

    Raises:
        SchemaOutdatedError: a table is missing.
        StoreUnavailableError: the database did not answer.
    """
    queue = EmbeddingQueue(database)
    async with database.connect() as connection:
        with translated_errors():
            sessions = await _by_status(connection, "sessions")
            sources = await _by_status(connection, "knowledge_sources")
            chunks = (await connection.execute(text("SELECT count(*) FROM knowledge_chunks"))).scalar_one()
            tables = await _rows(connection, _TABLE_SIZES)
            indexes = await _rows(connection, _INDEX_SIZES)
            size = (await connection.execute(text("SELECT pg_database_size(current_database())"))).scalar_one()
    return StoreStatus(
        sessions={each: sessions.get(each.value, 0) for each in SessionStatus},
        sources={each: sources.get(each.value, 0) for each in SourceStatus},
        chunks=chunks,
        queue=await queue.depth(),
        pauses=tuple(await queue.pauses()),
        tables=tuple(RelationSize(**row) for row in tables),
        indexes=tuple(RelationSize(**row) for row in indexes),
        database_bytes=size,
    )


async def store_statistics(database: Database) -> StoreStatistics:
    """Count vectors by model and words, and read the server's own statistics. Reads every chunk's row.

    Raises: as :func:`store_status`.
    """
    async with database.connect() as connection:
        with translated_errors():
            models = await _rows(connection, _MODELS)
            words = (await connection.execute(text(_WORDS))).one()
            tables = await _rows(connection, _TABLES)
            indexes = await _rows(connection, _INDEXES)
    chunks = sum(row["chunks"] for row in models)
    return StoreStatistics(
        models=tuple((row["model"], row["embedded"]) for row in models if row["embedded"]),
        chunks=chunks,
        chunks_without_vector=chunks - sum(row["embedded"] for row in models),
        chunks_without_words=words.missing,
        terms_counted=None if words.counted is None else round(words.counted),
        common_terms=words.common,
        tables=tuple(TableStatistics(**row) for row in tables),
        indexes=tuple(IndexStatistics(**row) for row in indexes),
    )


async def analyze(database: Database, *, progress: Progress | None = None) -> tuple[str, ...]:
    """Have the server look at every table anew (ANALYZE), as after a large import.

    Returns:
        The tables that this role may not analyse: their owner has to, or grant MAINTAIN (PostgreSQL 17).

    Raises: as :func:`store_status`.
    """
    refused = []
    async with database.connect() as connection:
        for done, table in enumerate(TABLES):
            if progress is not None:
                progress(done, len(TABLES))
            with translated_errors():
                allowed = (await connection.execute(text(_MAY_ANALYZE), {"table": table})).scalar()
                if allowed:
                    await connection.exec_driver_sql(f"ANALYZE {table}")
                else:
                    refused.append(table)
    if progress is not None:
        progress(len(TABLES), len(TABLES))
    return tuple(refused)


async def _rows(connection: AsyncConnection, sql: str) -> Sequence[Any]:
    parameters = {"tables": list(TABLES)} if ":tables" in sql else {}
    return (await connection.execute(text(sql), parameters)).mappings().all()


async def _by_status(connection: AsyncConnection, table: str) -> dict[str, int]:
    counts = f"SELECT status::text, count(*) FROM {table} GROUP BY status"  # noqa: S608  a constant of the caller's
    rows = await connection.execute(text(counts))
    return {row[0]: row[1] for row in rows}
