"""Backup and restore by pg_dump and pg_restore, with a manifest that tells whether everything came back.

A backup is two files: the dump in pg_dump's custom format, and beside it ``<file>.json``: the dump's size and SHA-256,
and for each table how many rows there are and a checksum over them, taken in the very snapshot that was dumped. What is
saved is the schema that holds the library's tables, with whatever else lies in it; not other schemas, roles, privileges
or settings of the database. Nothing is encrypted: keep the files where the messages in them may lie.

While a database is being restored it holds a table ``kotonoha_restore_unfinished`` and no revision, so that no command
takes it for whole.
"""

import asyncio
import os
import re
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store import backup_files, migrations, programs
from kotonoha_store.backup_contents import (
    NO_TIMEOUTS,
    REVISION,
    SEQUENCES,
    Manifest,
    checked,
    compare,
    digest_of,
    sums,
)
from kotonoha_store.checks import check_text
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import sqlstate_of, translated_errors
from kotonoha_store.errors import ConfigurationError, ExtensionMissingError, InvalidInputError, StoreError
from kotonoha_store.migrations import UNFINISHED, SchemaState
from kotonoha_store.records import Progress

VERIFICATION: Final = "kotonoha_verify_"

_LOCK_WAIT_MILLISECONDS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Restored:
    """What :func:`restore` did; the contents were compared and are those of the backup.

    Attributes:
        database: into which.
        created: whether it was made for it.
        manifest: of the backup.
        state: where its schema stands beside this version of the library: ``outdated`` means ``migrate`` next.
    """

    database: str
    created: bool
    manifest: Manifest
    state: SchemaState


async def backup(database: Database, file: Path, *, force: bool = False, progress: Progress | None = None) -> Manifest:
    """Write a backup of the database, of whatever revision, while it is in use.

    The file appears when it is whole, readable by its owner alone; nothing is left when this is cancelled or fails.

    Args:
        force: replace a file that is there.
        progress: told the bytes written.

    Raises:
        InvalidInputError: there is a file already.
        ConfigurationError: no pg_dump that fits, a privilege is missing, or a pooler in transaction mode without
            DATABASE_DIRECT_URL. The message says what to do.
        SchemaOutdatedError: the database was never migrated.
        StoreUnavailableError: the server did not answer, or a table stayed locked. Run it again.
        OSError: the file cannot be written.
    """
    file = backup_files.place(file, force)
    async with database.patient() as direct, _read_by_few(), _snapshot(direct) as connection:
        with translated_errors():
            source = await _source(connection)
        tools = await asyncio.to_thread(programs.to_dump, source.major)
        await asyncio.to_thread(backup_files.remove_abandoned, file)
        partial, lock = backup_files.new_file(file)
        try:
            dump = programs.run(
                tools,
                "pg_dump",
                "--format=custom",
                f"--file={partial}",
                # A pattern, in which quotes keep each character for itself.
                f"--schema={_quoted(source.schema)}",
                f"--snapshot={source.snapshot}",
                f"--lock-wait-timeout={_LOCK_WAIT_MILLISECONDS}",
                "--no-password",
                variables=programs.environment(direct.direct_url, direct.settings),
                watch=None if progress is None else lambda: progress(partial.stat().st_size, None),
            )
            _, tables = await _both(dump, sums(connection, source.schema))
            size, digest = await asyncio.to_thread(digest_of, partial)
            manifest = Manifest(
                format=1,
                created_at=source.created_at,
                library=version("kotonoha-store"),
                revision=source.revision,
                server=source.server,
                program=tools.version,
                schema=source.schema,
                vector=source.vector,
                vector_schema=source.vector_schema,
                size=size,
                sha256=digest,
                tables=tables,
                sequences=source.sequences,
            )
            await asyncio.to_thread(backup_files.publish, partial, manifest, file, force)
        finally:
            backup_files.discard(partial)
            os.close(lock)
    return manifest


async def restore(
    database: Database,
    file: Path,
    *,
    to: str | None = None,
    replace: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Restore a backup into a database of the same server, and compare what came back with the manifest.

    The database is made when it is not there; otherwise its schema must be empty. Owner of everything is the role that
    restores; privileges are not restored: run ``grants`` afterwards.

    Args:
        to: the database's name; the configured one by default.
        replace: drop the database first if it is there, with all that is in it.
        jobs: how many connections work at once; the number of processors, at most 4, by default.
        progress: told the steps of pg_restore.

    Raises:
        InvalidInputError: no whole backup is there, or the database is not empty.
        ExtensionMissingError: pgvector is not there and this role may not create it.
        ConfigurationError: no pg_restore that fits, or this role may not create a database.
        StoreUnavailableError: the server did not answer. What is half restored is known as such: run it again with
            ``replace``.
        StoreError: what came back is not what the manifest says; the message names the tables.
    """
    file = backup_files.absolute(file)
    manifest = await asyncio.to_thread(checked, file)
    target = str(to if to is not None else database.direct_url.database or database.settings.postgres_db)
    check_text(target, "the name of the database")
    if not target or len(target.encode()) > 63:
        raise InvalidInputError("the name of the database must have 1 to 63 bytes")
    await _refuse_another_server(database)
    created = await _prepare(database, target, manifest, replace=replace)
    state = await _fill(database, target, file, manifest, jobs=jobs, progress=progress)
    return Restored(target, created, manifest, state)


async def verify(
    database: Database, file: Path, *, jobs: int | None = None, progress: Progress | None = None
) -> Manifest:
    """Restore a backup into a database made for it, compare, and drop that database again.

    Needs the right to create databases, and room for one more of that size.

    Raises: as :func:`restore`.
    """
    name = f"{VERIFICATION}{uuid.uuid4().hex[:12]}"
    try:
        restored = await restore(database, file, to=name, jobs=jobs, progress=progress)
    finally:
        await _shielded(_drop(database, name))
    return restored.manifest


async def leftovers(database: Database) -> tuple[str, ...]:
    """Return the databases of verifications that were killed, or are under way; they may be dropped."""
    async with database.patient() as direct, direct.connect() as connection:
        with translated_errors():
            found = await connection.execute(
                text("SELECT datname FROM pg_database WHERE starts_with(datname, :prefix) ORDER BY 1"),
                {"prefix": VERIFICATION},
            )
            return tuple(found.scalars())


@dataclass(frozen=True, slots=True)
class _Source:
    schema: str
    revision: str
    server: str
    major: int
    vector: str | None
    vector_schema: str | None
    created_at: datetime
    sequences: dict[str, int]
    snapshot: str


@asynccontextmanager
async def _snapshot(database: Database) -> AsyncIterator[AsyncConnection]:
    """A transaction that sees one moment, for as long as it takes."""
    with translated_errors():
        connection = await database.engine.connect()
    try:
        await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _read_by_few() -> AsyncIterator[None]:
    try:
        yield
    except ConfigurationError as error:
        if sqlstate_of(error) != "42501":
            raise
        raise ConfigurationError(
            "this role may not read all that a backup holds; connect as the owner, or as a member of kotonoha_backup "
            "(see `kotonoha-store grants`)"
        ) from error


_WHERE: Final = text(f"""
    SELECT n.nspname AS schema, current_setting('server_version') AS server,
        CAST(current_setting('server_version_num') AS integer) / 10000 AS major, now() AS now,
        (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS vector,
        (SELECT e.nspname FROM pg_extension AS x JOIN pg_namespace AS e ON e.oid = x.extnamespace
            WHERE x.extname = 'vector') AS vector_schema
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = CAST(({migrations.VERSION_TABLE}) AS regclass)
""")  # noqa: S608  a constant

_TARGET: Final = text("""
    SELECT CAST(current_setting('server_version_num') AS integer) / 10000 AS major,
        EXISTS (SELECT FROM pg_database WHERE datname = :name) AS is_there
""")

_VECTOR: Final = text(
    "SELECT n.nspname FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace WHERE extname = 'vector'"
)

# What is there of ours or anybody's, save what extensions brought.
_HELD: Final = text("""
    WITH held AS (
        SELECT 'pg_class'::regclass AS class, oid, relname AS name, relnamespace AS namespace FROM pg_class
        WHERE relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
        UNION ALL
        SELECT 'pg_proc'::regclass, oid, proname, pronamespace FROM pg_proc
        UNION ALL
        SELECT 'pg_type'::regclass, oid, typname, typnamespace FROM pg_type WHERE typtype IN ('e', 'd')
    )
    SELECT pg_encoding_to_char(encoding) AS encoding, min(name) AS name,
        coalesce(bool_or(name = :unfinished), false) AS is_unfinished
    FROM pg_database LEFT JOIN held ON namespace = (SELECT oid FROM pg_namespace WHERE nspname = :schema)
        AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = class AND d.objid = held.oid AND d.deptype = 'e')
    WHERE datname = current_database()
    GROUP BY encoding
""")


async def _source(connection: AsyncConnection) -> _Source:
    await connection.execute(NO_TIMEOUTS)
    where = (await connection.execute(_WHERE)).one_or_none()
    if where is None:
        SchemaState(None, migrations.head(), "empty").check()
    assert where is not None  # noqa: S101  check() has raised
    newest = f"SELECT min(version_num) FROM {_quoted(where.schema)}.{REVISION}"  # noqa: S608  quoted, and a constant
    revision = (await connection.exec_driver_sql(newest)).scalar_one()
    if revision is None:
        SchemaState(None, migrations.head(), "empty").check()
    sequences = await connection.execute(SEQUENCES, {"schema": where.schema})
    return _Source(
        schema=where.schema,
        revision=revision,
        server=where.server.split()[0],
        major=where.major,
        vector=where.vector,
        vector_schema=where.vector_schema,
        created_at=where.now.astimezone(UTC),
        sequences={row.sequencename: row.last_value for row in sequences},
        snapshot=(await connection.execute(text("SELECT pg_export_snapshot()"))).scalar_one(),
    )


async def _both(first: Any, second: Any) -> tuple[Any, Any]:
    """Both at once; when one fails the other is stopped."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as errors:
        error = errors.exceptions[0]
        raise error from error.__cause__
    return tasks[0].result(), tasks[1].result()


def _at(database: Database, name: str) -> Database:
    return Database(database.direct_url.set(database=name), database.settings, patient=True, direct=True)


async def _refuse_another_server(database: Database) -> None:
    try:
        await database.check_direct_url()
    except StoreError as error:
        # What is to be restored may not be there yet; a pooler says so in its own way.
        if sqlstate_of(error) != "3D000" and "does not exist" not in str(error):
            raise


async def _maintenance(database: Database, target: str) -> Database:
    """Another database of the server than the one that is to be made or dropped; close it after use."""
    names = [name for name in (database.direct_url.database, "postgres", "template1") if name and name != target]
    for position, name in enumerate(names):
        other = _at(database, name)
        try:
            await other.ping()
        except StoreError as error:
            await other.close()
            # There is none of that name, or it is not for this role.
            if position + 1 == len(names) or sqlstate_of(error) not in ("3D000", "42501"):
                raise
        else:
            return other
    raise ConfigurationError(f"no other database of the server to connect to than {target}")


async def _prepare(database: Database, target: str, manifest: Manifest, *, replace: bool) -> bool:
    """See to it that the database is there and empty. Returns whether it was made."""
    async with await _maintenance(database, target) as other, other.connect() as connection:
        with translated_errors():
            where = (await connection.execute(_TARGET, {"name": target})).one()
        # Before anything is made, or dropped.
        await asyncio.to_thread(programs.to_restore, where.major, int(manifest.program.split(".")[0]))
        if where.is_there and replace:
            await _change_databases(connection, f"DROP DATABASE IF EXISTS {_quoted(target)}", target)
        if not where.is_there or replace:
            statement = f"CREATE DATABASE {_quoted(target)} TEMPLATE template0 ENCODING 'UTF8'"
            await _change_databases(connection, statement, target)
            return True
    async with _at(database, target) as inside, inside.connect() as connection:
        with translated_errors():
            await _refuse_full(connection, target, manifest.schema)
    return False


async def _change_databases(connection: AsyncConnection, statement: str, target: str) -> None:
    try:
        with translated_errors():
            await connection.exec_driver_sql(statement)
    except StoreError as error:
        state = sqlstate_of(error)
        if state == "42P04":
            raise InvalidInputError(f"the database {target} was made by somebody else just now") from error
        if state == "55006":
            raise InvalidInputError(
                f"others are connected to the database {target} (or to template0); stop them first"
            ) from error
        if state == "42501":
            raise ConfigurationError(
                f"this role may not make or drop the database {target}: give it CREATEDB (and that database), or have "
                "an admin create the database, and restore into that"
            ) from error
        raise


async def _drop(database: Database, target: str) -> None:
    async with await _maintenance(database, target) as other, other.connect() as connection:
        await _change_databases(connection, f"DROP DATABASE IF EXISTS {_quoted(target)} WITH (FORCE)", target)


async def _refuse_full(connection: AsyncConnection, target: str, schema: str) -> None:
    found = (await connection.execute(_HELD, {"schema": schema, "unfinished": UNFINISHED})).one()
    if found.encoding != "UTF8":
        raise InvalidInputError(f"the database {target} is encoded in {found.encoding}; it must be UTF8")
    if found.is_unfinished:
        raise InvalidInputError(
            f"the database {target} holds what an interrupted restore left (or one is under way); restore again with "
            "--replace, which drops this database first"
        )
    if found.name is not None:
        raise InvalidInputError(
            f"the schema {schema} of the database {target} is not empty (it has {found.name}); restore into a new "
            "database, or with --replace, which drops this one first with all that is in it"
        )


async def _fill(
    database: Database, target: str, file: Path, manifest: Manifest, *, jobs: int | None, progress: Progress | None
) -> SchemaState:
    schema = _quoted(manifest.schema)
    async with _at(database, target) as inside, inside.connect() as connection:
        with translated_errors():
            where = (await connection.execute(_TARGET, {"name": target})).one()
            await _ensure_schema(connection, manifest.schema)
            try:
                # As a lock too: of two that restore into the same database one goes on.
                await connection.exec_driver_sql(f"CREATE TABLE {schema}.{UNFINISHED} ()")
            except DBAPIError:
                await _refuse_full(connection, target, manifest.schema)
                raise
        await _extension(inside, manifest)
        tools = await asyncio.to_thread(programs.to_restore, where.major, int(manifest.program.split(".")[0]))
        run = _Restoring(tools, inside, target, file, jobs or min(4, os.cpu_count() or 1))
        await run(manifest.schema, progress)
        with translated_errors():
            for table in manifest.tables:
                await connection.exec_driver_sql(f"ANALYZE {schema}.{_quoted(table)}")
        await compare(inside, manifest)
        await run.revision(manifest.schema)
        await compare(inside, manifest, only=[REVISION])
        with translated_errors():
            await connection.exec_driver_sql(f"DROP TABLE {schema}.{UNFINISHED}")
        return await migrations.state(inside)


async def _ensure_schema(connection: AsyncConnection, name: str) -> None:
    # IF NOT EXISTS would ask for the right to create one all the same.
    found = await connection.execute(text("SELECT oid FROM pg_namespace WHERE nspname = :name"), {"name": name})
    if found.one_or_none() is None:
        await connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {_quoted(name)}")


async def _extension(database: Database, manifest: Manifest) -> None:
    """Create pgvector where the dump looks for it."""
    if manifest.vector is None or manifest.vector_schema is None:
        return
    schema = _quoted(manifest.vector_schema)
    async with database.transaction() as connection:
        with translated_errors():
            await _ensure_schema(connection, manifest.vector_schema)
            found = (await connection.execute(_VECTOR)).scalar_one_or_none()
            if found not in (None, manifest.vector_schema):
                raise ExtensionMissingError(
                    f"pgvector lies in the schema {found} there, and the backup needs it in {manifest.vector_schema}; "
                    f"have its owner run in that database: ALTER EXTENSION vector SET SCHEMA {schema}"
                )
            await connection.exec_driver_sql(f"SET LOCAL search_path = {schema}")
            await connection.run_sync(migrations.ensure_vector)


@dataclass(frozen=True, slots=True)
class _Restoring:
    """One file into one database."""

    tools: programs.Programs
    database: Database
    target: str
    file: Path
    jobs: int

    async def __call__(self, schema: str, progress: Progress | None) -> None:
        """All but the revision, by which other commands would take the database for whole."""
        variables = programs.environment(self.database.direct_url, self.database.settings)
        contents = await programs.run(self.tools, "pg_restore", "--list", str(self.file), variables=variables)
        entries = [line for line in contents.splitlines() if _is_restored(line, schema)]
        done = 0

        def read(line: str) -> None:
            nonlocal done
            if progress is not None and _STEP.match(line):
                done = min(done + 1, len(entries))
                progress(done, len(entries))

        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="kotonoha", suffix=".list") as wanted:
            wanted.write("".join(f"{line}\n" for line in entries))
            wanted.flush()
            options = (f"--use-list={wanted.name}", f"--jobs={self.jobs}", "--verbose")
            await self._run(*options, read=read)
        if progress is not None:
            progress(len(entries), len(entries))

    async def revision(self, schema: str) -> None:
        await self._run("--data-only", f"--schema={schema}", f"--table={REVISION}")

    async def _run(self, *options: str, read: Callable[[str], None] | None = None) -> None:
        escaped = self.target.replace("\\", "\\\\").replace("'", "\\'")
        await programs.run(
            self.tools,
            "pg_restore",
            # Spelled out: a name with = in it would be read as a list of parameters.
            f"--dbname=dbname='{escaped}'",
            "--no-password",
            "--exit-on-error",
            "--no-owner",
            "--no-privileges",
            "--no-tablespaces",
            "--no-security-labels",
            *options,
            str(self.file),
            variables=programs.environment(self.database.direct_url, self.database.settings),
            read=read,
        )


_STEP: Final = re.compile(r"pg_restore: (?:processing item|launching item)")
_ENTRY: Final = re.compile(r"\d+; \d+ \d+ (.*)")


def _is_restored(line: str, schema: str) -> bool:
    """Of pg_restore's list: not what is there already, nor the revision, which comes last."""
    entry = _ENTRY.match(line)
    if entry is None:
        return False
    rest = entry.group(1)
    return not (
        re.match(r"(?:COMMENT - )?(?:SCHEMA|EXTENSION) ", rest) or rest.startswith(f"TABLE DATA {schema} {REVISION} ")
    )


async def _shielded(work: Coroutine[Any, Any, None]) -> None:
    """Do it to its end, also when this task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
