"""Indexes looked at, rebuilt beside running work, and mended where an earlier build was cut short.

Nothing here stops a search or a write: indexes are built and dropped CONCURRENTLY, and exchanged by renaming. One
build at a time holds the migrations' lock, so that neither two builds nor a build and a migration meet.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import Any, Final, Literal, TypeAlias

import asyncpg
from sqlalchemy import Index
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from kotonoha_store import migrations
from kotonoha_store.checks import check_count
from kotonoha_store.columns import EMBEDDING_DIMENSION
from kotonoha_store.database import Database, driver_connection
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import ConfigurationError, InvalidInputError, NotFoundError, SchemaOutdatedError, StoreError
from kotonoha_store.models import Base

VECTOR_INDEX: Final = "idx_chunks_embedding"
"""The HNSW index, which searches by meaning use."""

# As REINDEX CONCURRENTLY calls them, a number where the name is taken: what is built, and what it replaces.
_NEW: Final = "_ccnew"
_OLD: Final = "_ccold"
_LEFTOVER: Final = re.compile(r"(.+)_cc(?:new|old)\d*", re.DOTALL)

# Renaming locks neither readers nor writers out; it waits for VACUUM at most.
_RENAME_SECONDS: Final = 30
_CLEAN_SECONDS: Final = 5
_POLL_SECONDS: Final = 0.5

_MIB: Final = 2**20
_GIB: Final = 2**30
_MEMORY_LIMITS: Final = (1 * _MIB, 2**31 * 1024 - 1024)
# Of servers on which nobody said how much memory there is.
_MODEST_MEMORY: Final = 1 * _GIB
# An element of the graph beside its vector: itself, and per neighbour and layer (pgvector ``src/hnsw.h``).
_ELEMENT_BYTES: Final = 256
_NEIGHBOUR_BYTES: Final = 24
# A vector stands in its row, and two rows of 3 kB fill a page.
_PAGE_BYTES: Final = 8192
_VECTORS_A_PAGE: Final = 2

# In a comment, since it must survive the process and be gone with the index built again.
_REMEMBERED: Final = re.compile(
    r"\n?kotonoha_store: idx_chunks_embedding was dropped for an import \(m = (\d+), ef_construction = (\d+)\)"
)

_INDEXES: Final = """
SELECT c.relname AS name, t.relname AS table, am.amname AS method,
       i.indisvalid AND i.indisready AND i.indislive AS valid,
       c.oid::regclass::text AS quoted, t.oid::regclass::text AS quoted_table,
       pg_get_indexdef(c.oid) AS definition, pg_relation_size(c.oid) AS size, c.reloptions AS options,
       EXISTS (SELECT FROM pg_constraint WHERE conindid = c.oid AND contype IN ('p', 'u', 'x')) AS of_constraint
FROM unnest($1::text[]) AS ours
JOIN pg_index AS i ON i.indrelid = to_regclass(quote_ident(ours))
JOIN pg_class AS c ON c.oid = i.indexrelid
JOIN pg_class AS t ON t.oid = i.indrelid
JOIN pg_am AS am ON am.oid = c.relam
ORDER BY t.relname, c.relname
"""

_RUNNING: Final = """
SELECT pid, index_relid::regclass::text AS index FROM pg_stat_progress_create_index
WHERE datname = current_database()
  AND relid IN (SELECT to_regclass(quote_ident(ours)) FROM unnest($1::text[]) AS ours)
LIMIT 1
"""

_PROGRESS: Final = """
SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total, lockers_done, lockers_total
FROM pg_stat_progress_create_index WHERE pid = $1
"""

_MEMORY: Final = """
SELECT pg_size_bytes(current_setting('maintenance_work_mem')) AS current,
       (SELECT setting::bigint * 8192 FROM pg_settings
        WHERE name = 'effective_cache_size' AND source <> 'default') AS cache,
       pg_relation_size(to_regclass('knowledge_chunks')) AS size
"""

_COMMENT: Final = (
    "SELECT col_description(attrelid, attnum) FROM pg_attribute"
    " WHERE attrelid = to_regclass('knowledge_chunks') AND attname = 'embedding'"
)


class IndexAction(StrEnum):
    """What was done to an index: built again, built with other options, or built where it was missing or invalid."""

    REBUILT = "rebuilt"
    REPLACED = "replaced"
    CREATED = "created"


@dataclass(frozen=True, slots=True)
class IndexState:
    """An index of this library's tables.

    Attributes:
        state: ``leftover``: what a build that was cut short has left; ``foreign``: not of this library.
        definition: the statement that makes it; None where it is missing.
        size: bytes.
    """

    name: str
    table: str
    method: str
    state: Literal["valid", "invalid", "missing", "leftover", "foreign"]
    definition: str | None
    size: int | None


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """How far a build has come.

    Attributes:
        index: its name.
        phase: as ``pg_stat_progress_create_index`` names it.
        done, total: rows, pages or transactions waited for, by phase; None where there is nothing to count.
    """

    index: str
    phase: str
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """An index that was built.

    Attributes:
        size, size_before: bytes; ``size_before`` is None where there was none.
        memory: bytes of maintenance_work_mem it was built with.
        fitted: whether an HNSW graph stayed within them; beyond, building takes several times as long.
    """

    name: str
    action: IndexAction
    seconds: float
    size: int
    size_before: int | None
    memory: int
    fitted: bool


@dataclass(frozen=True, slots=True)
class ReindexReport:
    """What :func:`reindex` did.

    Attributes:
        removed: names of leftovers that were dropped.
    """

    built: tuple[BuiltIndex, ...]
    removed: tuple[str, ...]


OnProgress: TypeAlias = Callable[[BuildProgress], None]


async def index_states(database: Database) -> list[IndexState]:
    """Return every index of this library's tables, and those that are missing.

    Raises:
        SchemaOutdatedError, StoreUnavailableError
    """
    async with database.driver() as driver:
        with translated_errors():
            rows = await _found(driver)
    states = [
        IndexState(row["name"], row["table"], row["method"], _state(row), row["definition"], row["size"])
        for row in rows.values()
    ]
    missing = [
        IndexState(name, str(index.table), _method(index), "missing", None, None)
        for name, index in _ours().items()
        if name not in rows
    ]
    return states + missing


async def reindex(
    database: Database,
    names: Collection[str] | None = None,
    *,
    everything: bool = False,
    m: int | None = None,
    ef_construction: int | None = None,
    maintenance_work_mem: int | None = None,
    parallel_workers: int | None = None,
    progress: OnProgress | None = None,
) -> ReindexReport:
    """Build indexes again beside searches and writes, and mend what is broken.

    By default: the HNSW index, and every index that is missing or invalid. Leftovers of builds that were cut
    short are dropped in any case. A build that is cancelled leaves the old index in use; what remains of the new
    one is dropped at once, or by the next call where the server could not be reached any more.

    Args:
        names: only these; none of them (an empty list): only what is missing or invalid.
        everything: every index of the library's tables.
        m, ef_construction: of the HNSW index; KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION where they are set, else
            as it was. An index with other options is built beside the old one, and takes its name at the end.
        maintenance_work_mem: bytes for an HNSW build. By default what the graph needs by the table's size, but no
            more than half of the server's effective_cache_size (where that was not set: 1 GiB), and no less than
            the server's own setting.
        parallel_workers: processes that help with it; the server's max_parallel_maintenance_workers by default.
        progress: called about twice a second.

    Raises:
        InvalidInputError: an option is out of range, or has no meaning for these names.
        NotFoundError: there is no such index on the library's tables.
        ConfigurationError: this role does not own the tables, or the options do not fit together.
        StoreError: another build or a migration is at work; the message says which.
        StoreUnavailableError: the database did not answer. Call it again.
    """
    options = _checked_options(m, ef_construction)
    if maintenance_work_mem is not None:
        check_count(maintenance_work_mem, "maintenance_work_mem", *_MEMORY_LIMITS)
    if parallel_workers is not None:
        check_count(parallel_workers, "parallel_workers", 0, 1024)
    if options != (None, None) and names is not None and VECTOR_INDEX not in names and not everything:
        raise InvalidInputError(f"m and ef_construction are options of {VECTOR_INDEX} only; name it too")
    async with _alone(database) as driver:
        builder = _Builder(database, driver, maintenance_work_mem, parallel_workers, progress)
        removed = await builder.remove_leftovers()
        found = await _found(driver)
        built = [
            await builder.build(name, found.get(name), options) for name in _chosen(found, names, everything=everything)
        ]
    return ReindexReport(tuple(built), removed)


async def drop_vector_index(database: Database) -> bool:
    """Drop the HNSW index before many vectors are written; its options are remembered in the database.

    Until :func:`ensure_vector_index` or :func:`reindex` has built it again, searches by meaning compare all.

    Returns:
        Whether there was one.

    Raises: as :func:`reindex`.
    """
    async with _alone(database, wait=migrations.LOCK_WAIT_SECONDS) as driver:
        with translated_errors():
            row = (await _found(driver)).get(VECTOR_INDEX)
            if row is None:
                return False
            m, ef_construction = await _remembered(driver) or _options_of(row)
            comment = f"kotonoha_store: {VECTOR_INDEX} was dropped for an import"
            await _write_comment(driver, f"{comment} (m = {m}, ef_construction = {ef_construction})")
            await driver.execute("SET lock_timeout = 0")
            await driver.execute(f"DROP INDEX CONCURRENTLY {row['quoted']}")
    return True


async def ensure_vector_index(
    database: Database,
    *,
    maintenance_work_mem: int | None = None,
    parallel_workers: int | None = None,
    progress: OnProgress | None = None,
) -> BuiltIndex | None:
    """Build the HNSW index where it is missing or invalid, with the options that it had.

    Somebody else who is building it is waited for.

    Returns:
        What was built; None where it was there.

    Raises: as :func:`reindex`.
    """
    async with database.driver() as reader:
        with translated_errors():
            row = (await _found(reader)).get(VECTOR_INDEX)
    if row is not None and row["valid"]:
        return None
    async with _alone(database, wait=float("inf")) as driver:
        builder = _Builder(database, driver, maintenance_work_mem, parallel_workers, progress)
        await builder.remove_leftovers()
        row = (await _found(driver)).get(VECTOR_INDEX)
        if row is not None and row["valid"]:
            return None
        return await builder.build(VECTOR_INDEX, row, (None, None))


class _Builder:
    """Builds one index after the other on the connection that :func:`_alone` gives."""

    def __init__(
        self, database: Database, driver: Any, memory: int | None, workers: int | None, progress: OnProgress | None
    ) -> None:
        self._database = database
        self._driver = driver
        self._memory = memory
        self._workers = workers
        self._progress = progress

    async def remove_leftovers(self) -> tuple[str, ...]:
        leftovers = [row for row in (await _found(self._driver)).values() if _state(row) == "leftover"]
        with translated_errors():
            for row in leftovers:
                await self._driver.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {row['quoted']}")
        return tuple(row["name"] for row in leftovers)

    async def build(self, name: str, row: Any, given: tuple[int | None, int | None]) -> BuiltIndex:
        started = perf_counter()
        is_vector = name == VECTOR_INDEX
        now = await self._options(row, given) if is_vector else None
        memory = await self._set_memory(now) if is_vector else await self._server_memory()
        size_before = row["size"] if row is not None else None
        with _notices(self._driver) as notices:
            try:
                if row is None or not row["valid"]:
                    action = IndexAction.CREATED
                    await self._create(name, row, now)
                elif is_vector and now != _options_of(row):
                    action = IndexAction.REPLACED
                    await self._replace(row, now)
                else:
                    action = IndexAction.REBUILT
                    await self._run(name, f"REINDEX INDEX CONCURRENTLY {row['quoted']}")
            except BaseException:
                await self._clean_up()
                raise
            # Notices are handed over by the event loop.
            await asyncio.sleep(0)
        found = (await _found(self._driver)).get(name)
        if found is None or not found["valid"]:
            raise StoreError(f"{name} was not built; run the reindex again")
        if is_vector:
            await _write_comment(self._driver, None)
        fitted = not any("maintenance_work_mem" in notice for notice in notices)
        seconds = perf_counter() - started
        return BuiltIndex(name, action, seconds, found["size"], size_before, memory, fitted)

    async def _options(self, row: Any, given: tuple[int | None, int | None]) -> tuple[int, int]:
        """Asked for, set in the environment, as it is, as it was before an import, or the default."""
        settings = self._database.settings
        before = await _remembered(self._driver) or (None if row is None else _options_of(row))
        wanted = []
        for index, field in enumerate(("kb_hnsw_m", "kb_hnsw_ef_construction")):
            configured: int = getattr(settings, field)
            is_set = field in settings.model_fields_set or before is None
            value = given[index]
            wanted.append(value if value is not None else configured if is_set or before is None else before[index])
        m, ef_construction = wanted
        if ef_construction < 2 * m:
            raise ConfigurationError(
                f"ef_construction must be at least twice m, got {ef_construction} and {m}; give both"
            )
        return m, ef_construction

    async def _create(self, name: str, row: Any, options: tuple[int, int] | None) -> None:
        index = _ours().get(name)
        if index is None:
            # Of a constraint, or of somebody else: what it was is all that is known.
            await self._run(name, f"REINDEX INDEX CONCURRENTLY {row['quoted']}")
            return
        if row is not None:
            with translated_errors():
                await self._driver.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {row['quoted']}")
        if options is not None:
            await self._run(name, _create_vector_index(VECTOR_INDEX, "knowledge_chunks", options))
            return
        statement = str(CreateIndex(index).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]  # untyped there
        await self._run(name, re.sub(r"^(CREATE (?:UNIQUE )?INDEX) ", r"\1 CONCURRENTLY ", statement))

    async def _replace(self, row: Any, options: tuple[int, int] | None) -> None:
        """REINDEX keeps the options, so: a new index, its name exchanged with the old one's in one transaction."""
        assert options is not None  # noqa: S101  only the vector index has some
        new, old = VECTOR_INDEX + _NEW, VECTOR_INDEX + _OLD
        await self._run(new, _create_vector_index(new, row["quoted_table"], options))
        quoted = (await _found(self._driver))[new]["quoted"]
        with translated_errors():
            async with self._driver.transaction():
                await self._driver.execute(f"SET LOCAL lock_timeout = '{_RENAME_SECONDS}s'")
                await self._driver.execute(f"ALTER INDEX {row['quoted']} RENAME TO {old}")
                await self._driver.execute(f"ALTER INDEX {quoted} RENAME TO {VECTOR_INDEX}")
            replaced = (await _found(self._driver))[old]["quoted"]
            await self._driver.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {replaced}")

    async def _run(self, name: str, statement: str) -> None:
        async with self._reported(name):
            try:
                await self._driver.execute(statement)
            except (asyncpg.exceptions.DiskFullError, asyncpg.exceptions.OutOfMemoryError):
                # Helpers share the graph in /dev/shm, which containers keep small; alone it needs none.
                await self._clean_up()
                await self._driver.execute("SET max_parallel_maintenance_workers = 0")
                await self._driver.execute(statement)

    @asynccontextmanager
    async def _reported(self, name: str) -> AsyncIterator[None]:
        with translated_errors():
            watch = asyncio.create_task(self._watch(name)) if self._progress else None
            try:
                yield
            finally:
                if watch is not None:
                    watch.cancel()
                    with suppress(asyncio.CancelledError):
                        await watch

    async def _watch(self, name: str) -> None:
        """On a connection of its own, since the other one is busy. That it breaks is no reason to stop the build."""
        assert self._progress is not None  # noqa: S101  else there is nothing to watch for
        pid = self._driver.get_server_pid()
        with suppress(StoreError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            watcher = await self._database.connect_apart()
            try:
                while True:
                    if (row := await watcher.fetchrow(_PROGRESS, pid)) is not None:
                        self._progress(_progress_of(name, row))
                    await asyncio.sleep(_POLL_SECONDS)
            finally:
                await watcher.close(timeout=_CLEAN_SECONDS)

    async def _clean_up(self) -> None:
        """Drop what a failed or cancelled build has left, if that can be done now; else the next call does it."""
        with suppress(StoreError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            async with asyncio.timeout(_CLEAN_SECONDS):
                await self.remove_leftovers()

    async def _server_memory(self) -> int:
        with translated_errors():
            memory: int = (await self._driver.fetchrow(_MEMORY))["current"]
        return memory

    async def _set_memory(self, options: tuple[int, int] | None) -> int:
        assert options is not None  # noqa: S101  only the vector index needs more
        with translated_errors():
            row = await self._driver.fetchrow(_MEMORY)
            memory = self._memory or _chosen_memory(row["size"], options[0], row["current"], row["cache"])
            await self._driver.execute(f"SET maintenance_work_mem = '{memory // 1024}kB'")
            if self._workers is not None:
                await self._driver.execute(f"SET max_parallel_maintenance_workers = {self._workers}")
        return memory


def _chosen_memory(table_size: int, m: int, current: int, cache: int | None) -> int:
    """Bytes for a graph of as many vectors as a table of this size can hold, within what the server may have."""
    vectors = table_size // _PAGE_BYTES * _VECTORS_A_PAGE
    needed = vectors * (EMBEDDING_DIMENSION * 2 + _ELEMENT_BYTES + 3 * m * _NEIGHBOUR_BYTES)
    limit = _MODEST_MEMORY if cache is None else cache // 2
    return min(max(current, min(needed, limit)), _MEMORY_LIMITS[1])


@asynccontextmanager
async def _alone(database: Database, *, wait: float = 0.0) -> AsyncIterator[Any]:
    """A driver's connection without time-outs, while nobody else builds an index or migrates.

    The server goes on with a build whose client is gone, without the lock: that is looked for as well.
    """
    async with database.patient() as patient, migrations.locked(patient, wait=wait) as connection:
        driver = await driver_connection(connection)
        with translated_errors():
            # CONCURRENTLY waits for older transactions, however long they take.
            await driver.execute("SET lock_timeout = 0")
            while (running := await driver.fetchrow(_RUNNING, _tables())) is not None:
                if wait != float("inf"):
                    raise StoreError(
                        f"another session (process {running['pid']} of the server) is building the index "
                        f"{running['index']}; wait until it is done, or end it with "
                        f"SELECT pg_cancel_backend({running['pid']})"
                    )
                await asyncio.sleep(_POLL_SECONDS)
        yield driver


@contextmanager
def _notices(driver: Any) -> Iterator[list[str]]:
    heard: list[str] = []

    def listen(_: Any, notice: Any) -> None:
        heard.append(str(notice.message))

    driver.add_log_listener(listen)
    try:
        yield heard
    finally:
        driver.remove_log_listener(listen)


async def _found(driver: Any) -> dict[str, Any]:
    with translated_errors():
        rows = await driver.fetch(_INDEXES, _tables())
    if not rows:
        raise SchemaOutdatedError("the tables are missing; run `alembic upgrade head` or `await store.migrate()`")
    return {row["name"]: row for row in rows}


def _tables() -> list[str]:
    return sorted(Base.metadata.tables)


def _ours() -> dict[str, Index]:
    """The indexes of the models, by name; those of constraints have no statement of their own."""
    return {str(index.name): index for table in Base.metadata.tables.values() for index in table.indexes}


def _method(index: Index) -> str:
    return str(index.dialect_options["postgresql"]["using"] or "btree")


def _state(row: Any) -> Literal["valid", "invalid", "leftover", "foreign"]:
    leftover = _LEFTOVER.fullmatch(row["name"])
    if leftover is not None and (leftover[1] in _ours() or not row["valid"]):
        return "leftover"
    if not row["valid"]:
        return "invalid"
    return "valid" if row["of_constraint"] or row["name"] in _ours() else "foreign"


def _chosen(found: dict[str, Any], names: Collection[str] | None, *, everything: bool) -> list[str]:
    if names is not None:
        for name in names:
            if name not in found and name not in _ours():
                raise NotFoundError(f"there is no index {name!r} on the tables of this library")
    broken = [name for name, row in found.items() if _state(row) == "invalid"]
    broken += [name for name in _ours() if name not in found]
    if everything:
        whole = [name for name, row in found.items() if _state(row) == "valid"]
        return sorted({*whole, *broken})
    if names:
        return sorted(set(names))
    return sorted(broken if names is not None else {VECTOR_INDEX, *broken})


def _checked_options(m: int | None, ef_construction: int | None) -> tuple[int | None, int | None]:
    # Ranges: pgvector, "Index options".
    if m is not None:
        check_count(m, "m", 2, 100)
    if ef_construction is not None:
        check_count(ef_construction, "ef_construction", 4, 1000)
    return m, ef_construction


def _options_of(row: Any) -> tuple[int, int]:
    given = dict(option.split("=", 1) for option in row["options"] or ())
    # What pgvector takes where nothing is said.
    return int(given.get("m", 16)), int(given.get("ef_construction", 64))


def _create_vector_index(name: str, table: str, options: tuple[int, int]) -> str:
    return (
        f"CREATE INDEX CONCURRENTLY {name} ON {table} USING hnsw (embedding halfvec_cosine_ops)"
        f" WITH (m = {options[0]}, ef_construction = {options[1]})"
    )


async def _remembered(driver: Any) -> tuple[int, int] | None:
    with translated_errors():
        found = _REMEMBERED.search(await driver.fetchval(_COMMENT) or "")
    return (int(found[1]), int(found[2])) if found else None


async def _write_comment(driver: Any, ours: str | None) -> None:
    """Put ours behind a comment that somebody else may have written there, or take it away."""
    with translated_errors():
        before = await driver.fetchval(_COMMENT) or ""
        rest = _REMEMBERED.sub("", before)
        after = "\n".join(filter(None, (rest, ours)))
        if after != before:
            literal = "'" + after.replace("'", "''") + "'" if after else "NULL"
            await driver.execute(f"COMMENT ON COLUMN knowledge_chunks.embedding IS {literal}")


def _progress_of(name: str, row: Any) -> BuildProgress:
    for unit in ("lockers", "tuples", "blocks"):
        if row[f"{unit}_total"]:
            return BuildProgress(name, row["phase"], row[f"{unit}_done"], row[f"{unit}_total"])
    return BuildProgress(name, row["phase"], row["tuples_done"] or row["blocks_done"], None)
