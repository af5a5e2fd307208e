"""Migrations without the command line: upgrade, downgrade, current, check.

The scripts are those that ``alembic upgrade head`` runs in a checkout; the wheel carries a copy.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Final, Literal

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import (
    ConfigurationError,
    ExtensionMissingError,
    SchemaOutdatedError,
    StoreError,
    StoreTimeoutError,
)
from kotonoha_store.settings import Settings

# Any constant; the same in every release, since old and new may start side by side.
LOCK_ID: Final = 7_205_110_862_154_902_381
LOCK_WAIT_SECONDS: Final = 600.0
LOCK_TIMEOUT_SECONDS: Final = 30
UNFINISHED: Final = "kotonoha_restore_unfinished"
"""A table that a database has while it is being restored."""

_POLL_SECONDS: Final = 0.1

# Set for the role or the database, they would end a long index build, or the idle connection with the lock.
_NO_TIMEOUTS: Final = """
    SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN (
        'statement_timeout', 'transaction_timeout', 'idle_session_timeout', 'idle_in_transaction_session_timeout'
    )
"""

# Where the bare name leads, and where our revision stands: beside the library's tables, or where those would be made.
# Where they have none beside them, the one that is seen: it was there before a schema was put in front of it.
_VERSIONS: Final = """
    FROM (
        SELECT seen, CASE WHEN tables IS NULL THEN current_schema()
            WHEN to_regclass(format('%I.alembic_version', tables)) IS NULL THEN coalesce(seen, current_schema())
            ELSE tables END AS ours
        FROM (
            SELECT max(n.nspname) FILTER (WHERE c.oid = to_regclass('alembic_version')) AS seen,
                max(n.nspname) FILTER (WHERE c.oid = to_regclass('knowledge_chunks')) AS tables
            FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
            WHERE c.oid IN (to_regclass('alembic_version'), to_regclass('knowledge_chunks'))
        ) AS visible
    ) AS versions
"""

VERSION_TABLE: Final = f"SELECT to_regclass(quote_ident(ours) || '.alembic_version')::text {_VERSIONS}"
"""The table of this library's revision as a quoted name; null where there is none."""

# alembic.context is global to the process: one migration at a time in it, on whichever loop or thread.
_in_process = threading.Lock()


def script_location() -> Path:
    """Return the folder with ``env.py``: the checkout's where there is one, else the wheel's copy."""
    package = Path(__file__).parent
    checkout = package.parent / "alembic"
    # An editable install may have a stale copy beside the package.
    return checkout if (checkout / "versions" / "kotonoha").is_dir() else package / "alembic"


def alembic_config() -> Config:
    """Return the configuration that ``alembic.ini`` gives, wherever the scripts are."""
    # Alembic's commands print; a library does not.
    config = Config(stdout=StringIO())
    location = script_location()
    # ConfigParser interpolates %: the paths may hold one.
    for name, value in {
        "script_location": str(location),
        "version_locations": str(location / "versions" / "kotonoha"),
        "path_separator": "newline",
    }.items():
        config.set_main_option(name, value.replace("%", "%%"))
    return config


def head() -> str:
    """Return the revision that this version of the library needs."""
    revision = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if revision is None:
        raise ConfigurationError(f"no migration scripts in {script_location()}; install the package again")
    return revision


async def upgrade(database: Database, revision: str = "head") -> None:
    """Bring the database to ``revision``. Safe to run again, and by several processes at once.

    A database that is there already is left alone, without waiting for a lock: a bot that migrates at its start does
    not wait for an index build.

    Raises:
        ExtensionMissingError: pgvector is not there and cannot be created; the message says what to do.
        ConfigurationError: the role may not change the schema, the revision is unknown, or a restore into it was
            interrupted.
        StoreTimeoutError: another migration held the lock too long, or a table was locked.
        StoreUnavailableError: the database did not answer. Run it again: what was done stays done.
    """
    now = await current(database)
    if revision == "head" and now == head():
        return
    if now is None:
        await refuse_half_restored(database)
    await _change(database, lambda config: command.upgrade(config, revision))


async def downgrade(database: Database, revision: str) -> None:
    """Bring the database back to ``revision`` (``base``: no tables). Columns added since are lost.

    Raises: as :func:`upgrade`.
    """
    await _change(database, lambda config: command.downgrade(config, revision))


async def check(database: Database) -> None:
    """Compare the tables with the models.

    Raises:
        SchemaOutdatedError: they differ, or revisions are missing.
    """
    try:
        await _run(database, command.check)
    except CommandError as error:
        raise SchemaOutdatedError(f"the database is not at this library's revision: {error}") from error


async def refuse_half_restored(database: Database) -> None:
    """
    Raises:
        ConfigurationError: a restore into this database was interrupted, or is under way.
    """
    async with database.connect() as connection:
        with translated_errors():
            if (await connection.scalar(text("SELECT to_regclass(:name)"), {"name": UNFINISHED})) is not None:
                raise ConfigurationError(
                    "this database holds what an interrupted restore left (or one is under way); restore again with "
                    "`kotonoha-store restore FILE --replace`, which drops this database first"
                )


async def current(database: Database) -> str | None:
    """Return the revision the database is at, or None when it was never migrated."""
    async with database.connect() as connection:
        with translated_errors():
            return await connection.run_sync(_current)


def _current(connection: Connection) -> str | None:
    options = {"version_table_schema": version_table_schema(connection)}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


def version_table_schema(connection: Connection) -> str | None:
    """Return where ``alembic_version`` lies or belongs, or None where its bare name leads there (for ``env.py``).

    That name may lead to another application's, further along the search_path.
    """
    schema: str | None = connection.scalar(text(f"SELECT ours {_VERSIONS} WHERE seen <> ours"))
    return schema


@dataclass(frozen=True, slots=True)
class SchemaState:
    """Where a database stands beside this version of the library.

    Attributes:
        revision: the database's, None when it was never migrated.
        head: what this version needs.
        state: ``newer``: the revision is unknown to this version.
    """

    revision: str | None
    head: str
    state: Literal["empty", "outdated", "current", "newer"]

    def check(self) -> None:
        """
        Raises:
            SchemaOutdatedError: the tables are not this version's; the message says what to do.
        """
        if self.state == "empty":
            raise SchemaOutdatedError(
                "the database was never migrated; run `kotonoha-store migrate` or `alembic upgrade head`"
            )
        if self.state == "outdated":
            raise SchemaOutdatedError(
                f"the database is at revision {self.revision}, this version needs {self.head}; "
                "run `kotonoha-store migrate` or `alembic upgrade head`"
            )
        if self.state == "newer":
            raise SchemaOutdatedError(
                f"the database is at revision {self.revision}, which this version (up to {self.head}) does not know; "
                "install the version of kotonoha-store that migrated it, or a newer one"
            )


async def state(database: Database) -> SchemaState:
    """Compare the database's revision with what this version of the library needs."""
    return compare(await current(database))


def compare(revision: str | None) -> SchemaState:
    """Say where a database at this revision (None: never migrated) stands. The first call reads the scripts."""
    head, known = _revisions(script_location())
    if revision is None:
        return SchemaState(None, head, "empty")
    if revision == head:
        return SchemaState(revision, head, "current")
    return SchemaState(revision, head, "outdated" if revision in known else "newer")


@cache
def _revisions(_: Path) -> tuple[str, frozenset[str]]:
    scripts = ScriptDirectory.from_config(alembic_config())
    return head(), frozenset(script.revision for script in scripts.walk_revisions())


async def with_connection(run: Callable[[Connection], None]) -> None:
    """Open the database of the environment, take the migration lock, and call ``run`` (for ``env.py``).

    Raises:
        CommandError: what any error of this library says, so that the command prints one line.
    """
    try:
        # The first keeps an embedded server running; the second goes past a pooler.
        async with await Database.open() as database, database.patient() as patient, locked(patient) as connection:
            await refuse_half_restored(patient)
            with _errors():
                await connection.run_sync(run)
    except StoreError as error:
        raise CommandError(str(error)) from error


async def _change(database: Database, run: Callable[[Config], None]) -> None:
    try:
        await _run(database, run)
    except CommandError as error:
        raise ConfigurationError(f"{error}; is the database newer than this library?") from error
    # Connections made before the extension was there learn its types anew.
    await database.engine.dispose()


async def _run(database: Database, run: Callable[[Config], None]) -> None:
    config = alembic_config()
    config.attributes["settings"] = database.settings

    def with_config(connection: Connection) -> None:
        config.attributes["connection"] = connection
        run(config)

    # A thread's lock, since the other migration may run on another thread's loop.
    while not _in_process.acquire(blocking=False):  # noqa: ASYNC110  an Event is one loop's
        await asyncio.sleep(_POLL_SECONDS)
    try:
        async with database.patient() as patient, locked(patient) as connection:
            with _errors():
                await connection.run_sync(with_config)
    finally:
        _in_process.release()


@contextmanager
def _errors() -> Iterator[None]:
    """As translated_errors(), for statements that make the tables instead of using them."""
    try:
        with translated_errors():
            yield
    except SchemaOutdatedError as error:
        raise ConfigurationError(
            "a table or type of this database has the name of one of ours, but is another; give the library "
            "a database or a schema (search_path) of its own"
        ) from error


@asynccontextmanager
async def locked(database: Database, *, wait: float | None = None) -> AsyncIterator[AsyncConnection]:
    """A connection to migrate or to build indexes on, while another connection holds the lock.

    Of its own, because Alembic commits and changes isolation on the first; tried and not waited for,
    because a waiting transaction would keep CREATE INDEX CONCURRENTLY from ever finishing.
    """
    async with database.connect() as guard, database.engine.connect() as connection:
        with translated_errors():
            seconds = LOCK_WAIT_SECONDS if wait is None else wait
            deadline = asyncio.get_running_loop().time() + seconds
            while not (await guard.execute(text("SELECT pg_try_advisory_lock(:id)"), {"id": LOCK_ID})).scalar():
                if asyncio.get_running_loop().time() >= deadline:
                    raise StoreTimeoutError(
                        f"another migration or index build holds the lock (waited {seconds:.0f} seconds); wait until "
                        "it is done, or see who in pg_locks, locktype = 'advisory'"
                    )
                await asyncio.sleep(_POLL_SECONDS)
            for each in (guard, connection):
                await each.execute(text(_NO_TIMEOUTS))
            # Waiting for a lock, a migration stops every query behind it: rather give up.
            await connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
            # Alembic given an open transaction would leave the commit to us.
            await connection.commit()
            try:
                yield connection
            finally:
                # A pooled connection would keep a session's lock.
                await guard.execute(text("SELECT pg_advisory_unlock(:id)"), {"id": LOCK_ID})


def hnsw_options(settings: Settings) -> str:
    """Return what stands in ``WITH (...)`` of the vector index; used by the revisions.

    Raises:
        ConfigurationError: pgvector would refuse the pair.
    """
    m, ef_construction = settings.kb_hnsw_m, settings.kb_hnsw_ef_construction
    if ef_construction < 2 * m:
        raise ConfigurationError(
            f"KB_HNSW_EF_CONSTRUCTION must be at least twice KB_HNSW_M, got {ef_construction} and {m}"
        )
    return f"m = {m}, ef_construction = {ef_construction}"


def ensure_vector(connection: Connection) -> None:
    """Create the extension where it is missing and this role may; used by the first revision.

    Raises:
        ExtensionMissingError: it cannot be created, is older than 0.8, or lies outside the search_path.
    """
    find = text(
        "SELECT e.extversion, n.nspname, to_regtype('halfvec') IS NOT NULL,"
        " concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(n.nspname)) FROM pg_extension e"
        " JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    )
    found = connection.execute(find).one_or_none()
    if found is None:
        _create_vector(connection)
        found = connection.execute(find).one()
    version, schema, visible, search_path = found
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 8):
        raise ExtensionMissingError(
            f"pgvector {version} is too old: searches need iterative index scans (0.8 or newer); "
            "have its owner run: ALTER EXTENSION vector UPDATE"
        )
    if not visible:
        raise ExtensionMissingError(
            f'pgvector is in the schema "{schema}", outside the search_path; run: '
            f"ALTER ROLE CURRENT_USER SET search_path = {search_path}"
        )


def _create_vector(connection: Connection) -> None:
    try:
        with connection.begin_nested():
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
    except DBAPIError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        if sqlstate in {"0A000", "58P01"}:
            raise ExtensionMissingError(
                "pgvector is not installed on this server; install it there (the package postgresql-NN-pgvector, or "
                "the image pgvector/pgvector), then run the migration again"
            ) from error
        if sqlstate == "42501":
            raise ExtensionMissingError(
                "pgvector is not in this database and this role may not create it; have a superuser (on a managed "
                "server: its admin role) run in this database: CREATE EXTENSION vector"
            ) from error
        raise
