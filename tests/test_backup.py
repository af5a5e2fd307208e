"""Backups are whole or not there, and what they are restored into is what they were made of, or said not to be."""

import asyncio
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import RUN, VERSION, new_database, run_alone, run_sql, settings_for
from sqlalchemy import URL, make_url, text
from typer.testing import CliRunner

from kotonoha_store import (
    ConfigurationError,
    Database,
    HashingEmbedder,
    InvalidInputError,
    Message,
    Settings,
    Store,
    StoreError,
    backup,
    embedded,
    migrations,
    programs,
)
from kotonoha_store.backup_contents import manifest_path, read_manifest, write_manifest
from kotonoha_store.cli.commands import app
from kotonoha_store.database import connect_arguments

BIG = 2**63 - 1


async def fill(url: URL) -> None:
    async with Store.open(settings_for(url), embedder=HashingEmbedder()) as store:
        await store.migrate()
        async with store.begin() as tx:
            messages = [Message.user("梅雨がないのはどこ？", message_id=BIG), Message.assistant("北海道です。" * 10)]
            await tx.sessions.append("a\nb", messages, guild_id=BIG, channel_id=-BIG)
        await store.archiver.run_once(idle_for=timedelta(0))
        for number in range(5):
            await store.add_document(
                f"文書{number}", f"雨の多い季節 {number} \\ \t" * 20, uri=f"https://example.org/{number}"
            )
        await store.embedding_worker.run_until_empty()
        await store.add_document("まだ", "待っている")
        async with store.begin() as tx:
            await tx.sessions.append("後", Message.user("😀"))


@pytest.fixture(scope="module")
def source(server_url: URL) -> Iterator[URL]:
    """A database with conversations, documents, vectors and a waiting job."""
    with new_database(server_url) as url:
        asyncio.run(fill(url))
        yield url


@pytest.fixture(scope="module")
def made(source: URL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its backup; to be copied before it is changed."""
    file = tmp_path_factory.mktemp("backup") / "昨日 の.dump"

    async def make() -> None:
        async with Database(source, settings_for(source)) as database:
            await backup.backup(database, file)

    asyncio.run(make())
    return file


@pytest.fixture
async def database(source: URL) -> AsyncIterator[Database]:
    async with Database(source, settings_for(source)) as database:
        yield database


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    for path in (made, manifest_path(made)):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / made.name


@pytest.fixture
def target(server_url: URL) -> Iterator[str]:
    """A name for a database, with a character that conninfo strings, URLs and SQL read otherwise."""
    name = f"kt_{RUN} 'q'=\\%22\""
    yield name
    quoted = name.replace('"', '""')
    asyncio.run(run_alone(server_url, f'DROP DATABASE IF EXISTS "{quoted}" WITH (FORCE)'))


@asynccontextmanager
async def connected(database: Database, name: str | None = None) -> AsyncIterator[Any]:
    """The driver's connection to a database of the server, past any pooler."""
    url = database.direct_url
    connection = await asyncpg.connect(**connect_arguments(url.set(database=name or url.database), Settings()))
    try:
        yield connection
    finally:
        await connection.close()


async def until(connection: Any, sql: str, expected: int) -> None:
    async with asyncio.timeout(60):
        while await connection.fetchval(sql) != expected:  # noqa: ASYNC110  the server tells nobody
            await asyncio.sleep(0.02)


CONTENTS = (
    "SELECT id, session_key, messages::text, guild_id, channel_id, last_active_at FROM sessions ORDER BY id",
    "SELECT id, title, uri, metadata::text, archived_messages::text FROM knowledge_sources ORDER BY id",
    "SELECT id, content, embedding::text, embedding_model, content_hash FROM knowledge_chunks ORDER BY id",
    "SELECT chunk_id, terms::text, folded FROM chunk_terms ORDER BY 1",
    "SELECT chunk_id, available_at FROM embedding_jobs ORDER BY 1",
    "SELECT term, frequency FROM term_frequencies ORDER BY 1",
    "SELECT sequencename::text, last_value FROM pg_sequences ORDER BY 1",
    "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1",
    "SELECT proname::text, prosecdef, proconfig FROM pg_proc WHERE proname LIKE 'kotonoha%' ORDER BY 1",
    "SELECT version_num FROM alembic_version",
)


async def contents(database: Database, name: str | None = None) -> list[list[tuple[Any, ...]]]:
    async with connected(database, name) as connection:
        return [[tuple(row) for row in await connection.fetch(sql)] for sql in CONTENTS]


async def test_what_is_restored_is_what_was_there(database: Database, made: Path, target: str) -> None:
    seen: list[tuple[int, int | None]] = []
    done = await backup.restore(database, made, to=target, progress=lambda *step: seen.append(step))
    assert (done.created, done.state.state) == (True, "current")
    assert seen[-1][0] == seen[-1][1] > 20
    # By its own means, not by the checksums.
    assert await contents(database, target) == await contents(database)
    async with connected(database, target) as connection:
        assert await connection.fetchval("SELECT count(*) FROM knowledge_chunks WHERE embedding IS NOT NULL") > 5
        assert await connection.fetchval("SELECT reltuples FROM pg_class WHERE relname = 'knowledge_chunks'") > 5
        assert await connection.fetchval("SELECT bool_and(indisvalid) FROM pg_index")


async def test_a_backup_beside_writers_is_of_one_moment(migrated_url: URL, tmp_path: Path) -> None:
    stop = asyncio.Event()
    async with Database(migrated_url, settings_for(migrated_url)) as database:

        async def write() -> int:
            written = 0
            while not stop.is_set():
                async with database.begin() as session:
                    sql = "INSERT INTO sessions (session_key, session_type) VALUES (gen_random_uuid(), 'x')"
                    await session.execute(text(sql))
                    written += 1
            return written

        writer = asyncio.create_task(write())
        try:
            manifest = await backup.backup(database, tmp_path / "x")
        finally:
            stop.set()
        assert await writer > manifest.tables["sessions"].rows
        await backup.verify(database, tmp_path / "x")
        assert await backup.leftovers(database) == ()


def test_the_file_is_for_its_owner_alone_and_is_not_overwritten(
    source: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(source)
    assert settings.database_url is not None
    monkeypatch.setenv("DATABASE_URL", settings.database_url.get_secret_value())
    if settings.database_direct_url is not None:
        monkeypatch.setenv("DATABASE_DIRECT_URL", settings.database_direct_url.get_secret_value())
    file = tmp_path / "-x"
    run = CliRunner().invoke(app, ["backup", "--json", "--", str(file)])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert said["manifest"]["tables"]["sessions"]["rows"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-x", "-x.json"]
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600, 0o600]
    assert "北海道" not in manifest_path(file).read_text()
    before = file.stat().st_ino
    again = CliRunner().invoke(app, ["backup", str(file)])
    assert (again.exit_code, file.stat().st_ino) == (3, before)
    assert "--force" in again.stderr
    assert CliRunner().invoke(app, ["backup", str(file), "--force"]).exit_code == 0
    assert file.stat().st_ino != before
    os.mkfifo(tmp_path / "pipe")
    refused = CliRunner().invoke(app, ["backup", str(tmp_path / "pipe"), "--force"])
    assert (refused.exit_code, (tmp_path / "pipe").is_fifo()) == (3, True)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "truncated"),
        (change, "SHA-256"),
        (lambda file: manifest_path(file).unlink(), "is missing"),
        (lambda file: manifest_path(file).write_text('{"format": 1}'), "is no manifest"),
        (Path.unlink, "there is no file"),
    ],
)
async def test_a_damaged_backup_is_refused_before_anything_is_made(
    database: Database, copied: Path, target: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(copied)
    with pytest.raises(InvalidInputError, match=said):
        await backup.restore(database, copied, to=target)
    async with connected(database) as connection:
        assert not await connection.fetchval("SELECT count(*) FROM pg_database WHERE datname = $1", target)


async def test_a_changed_row_is_found_and_the_database_taken_by_nobody(
    database: Database, copied: Path, target: str
) -> None:
    """As when somebody changes the dump and fits the manifest to it, save the sums over the rows."""
    other = copied.with_name("other")
    async with connected(database) as connection:
        message = await connection.fetchval("SELECT messages::text FROM sessions WHERE id = 2")
        vector = await connection.fetchval("SELECT embedding::text FROM knowledge_chunks WHERE id = 2")
        await connection.execute("UPDATE sessions SET messages = jsonb_set(messages, '{0,content}', '1') WHERE id = 2")
        changed = vector.replace("0.", "0.5", 1)
        set_vector = "UPDATE knowledge_chunks SET embedding = $1::text::halfvec WHERE id = 2"
        await connection.execute(set_vector, changed)
        try:
            false = await backup.backup(database, other)
        finally:
            await connection.execute("UPDATE sessions SET messages = $1::text::jsonb WHERE id = 2", message)
            await connection.execute(set_vector, vector)
    manifest_path(other).unlink()
    true = read_manifest(copied)
    write_manifest(manifest_path(other), replace(true, size=false.size, sha256=false.sha256))

    with pytest.raises(StoreError, match="knowledge_chunks has rows of other content; sessions has rows of other"):
        await backup.restore(database, other, to=target)
    url = database.direct_url.set(database=target)
    async with Database(url, database.settings, direct=True) as inside:
        assert (await migrations.state(inside)).state == "empty"
    with pytest.raises(InvalidInputError, match=r"interrupted restore.*--replace"):
        await backup.restore(database, copied, to=target)


async def test_a_table_that_the_manifest_leaves_out_is_not_believed(
    database: Database, copied: Path, target: str
) -> None:
    true = read_manifest(copied)
    manifest_path(copied).unlink()
    kept = {name: sums for name, sums in true.tables.items() if name != "sessions"}
    write_manifest(manifest_path(copied), replace(true, tables=kept))
    with pytest.raises(StoreError, match="sessions is not in the manifest"):
        await backup.restore(database, copied, to=target)


async def test_an_interrupted_restore_is_known_as_such_and_done_again(
    database: Database, made: Path, target: str
) -> None:
    def interrupt(done: int, _: int | None) -> None:
        if done == 5:
            task.cancel()

    task = asyncio.create_task(backup.restore(database, made, to=target, progress=interrupt))
    with pytest.raises(asyncio.CancelledError):
        await task
    async with connected(database, target) as connection:
        # Those of pg_restore are told to end, and may take a moment for it.
        await until(
            connection,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type IN ('client backend', 'parallel worker')",
            0,
        )
        assert await connection.fetchval(f"SELECT to_regclass('{backup.UNFINISHED}') IS NOT NULL")
    with pytest.raises(InvalidInputError, match="--replace"):
        await backup.restore(database, made, to=target)
    assert (await backup.restore(database, made, to=target, replace=True)).created


async def test_a_database_with_tables_is_left_alone(database: Database, made: Path) -> None:
    before = await contents(database)
    with pytest.raises(InvalidInputError, match="is not empty"):
        await backup.restore(database, made)
    assert await contents(database) == before


async def test_an_interrupted_backup_leaves_nothing(database: Database, tmp_path: Path) -> None:
    async with connected(database) as other, connected(database) as watcher:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("LOCK TABLE embedding_pauses")
        task = asyncio.create_task(backup.backup(database, tmp_path / "x"))
        dumping = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_dump'"
        await until(watcher, f"{dumping} AND wait_event_type = 'Lock'", 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await transaction.rollback()
        await until(watcher, dumping, 0)
    assert not any(os.scandir(tmp_path))


async def test_what_a_killed_backup_left_goes_with_the_next_to_the_same_file(
    database: Database, tmp_path: Path
) -> None:
    names = [".x*.abcdefgh.partial", ".x*.hijklmno.partial", ".x*.hijklmno.partial.json", ".y.abcdefgh.partial"]
    for name in names:
        (tmp_path / name).touch()
    with (tmp_path / names[0]).open() as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        await backup.backup(database, tmp_path / "x*")
    left = set(os.listdir(tmp_path))  # noqa: PTH208
    assert left == {names[0], names[3], "x*", "x*.json"}


@pytest.mark.role("backup")
def test_a_backup_that_cannot_be_verified_is_said_to_be_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.database_url is not None
    monkeypatch.setenv("DATABASE_URL", settings.database_url.get_secret_value())
    done = CliRunner().invoke(app, ["backup", str(tmp_path / "x"), "--verify"])
    assert done.exit_code == 3
    assert "was written, but not verified: this role may not make" in " ".join(done.stderr.split())
    assert (tmp_path / "x").is_file()


@pytest.mark.parametrize("grant", ["SELECT ON alembic_version", "SELECT ON ALL TABLES IN SCHEMA public"])
async def test_who_may_not_read_everything_is_told_of_the_role_that_may(
    migrated_url: URL, server_url: URL, tmp_path: Path, grant: str
) -> None:
    name = f"kt_{RUN}_nobody"
    await run_sql(server_url, f"CREATE ROLE {name} LOGIN PASSWORD '{RUN}'")
    await run_sql(migrated_url, f"GRANT {grant} TO {name}")
    url = migrated_url.set(username=name, password=RUN)
    async with Database(url, settings_for(url)) as database:
        with pytest.raises(ConfigurationError, match="kotonoha_backup"):
            await backup.backup(database, tmp_path / "x")
    await run_sql(migrated_url, f"DROP OWNED BY {name}", f"DROP ROLE {name}")
    assert not any(os.scandir(tmp_path))


@pytest.mark.role("backup")
async def test_a_member_of_backup_needs_no_more(settings: Settings, tmp_path: Path) -> None:
    async with await Database.open(settings) as database:
        manifest = await backup.backup(database, tmp_path / "x")
    assert manifest.tables["alembic_version"].rows == 1


@pytest.mark.role("app")
async def test_who_may_make_no_database_is_told(settings: Settings, made: Path, target: str) -> None:
    async with await Database.open(settings) as database:
        with pytest.raises(ConfigurationError, match="CREATEDB"):
            await backup.restore(database, made, to=target)


@pytest.fixture
def other_directory() -> Iterator[Path]:
    # Not below pytest's own folder: another run takes the server's right to pass through it.
    directory = Path(tempfile.mkdtemp(prefix="kt"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


async def test_sums_are_the_same_on_every_version_and_no_dump_goes_back(
    made: Path, source: URL, tmp_path: Path, target: str, other_directory: Path
) -> None:
    """Of 16, restored into 18; and of 18, refused by 16."""
    other = 16 if VERSION == 18 else 18
    server = embedded.start(other_directory / "pg", version=other, databases=("kotonoha",))
    try:
        url = make_url(server.url())
        old, new = (url, source) if other == 16 else (source, url)
        if other == 16:
            await fill(url)
        async with Database(old, settings_for(old)) as sixteen, Database(new, settings_for(new)) as eighteen:
            await backup.backup(sixteen, tmp_path / "x")
            done = await backup.restore(eighteen, tmp_path / "x", to=target)
            assert done.state.state == "current"
            if other == 18:
                return
            with pytest.raises(ConfigurationError, match="restore it into a server of version 18 or newer"):
                await backup.restore(sixteen, made, to=target)
    finally:
        server.stop()


async def test_neither_backup_nor_restore_goes_to_another_database(
    source: URL, empty_url: URL, made: Path, tmp_path: Path
) -> None:
    """--replace would drop that one."""
    wrong = empty_url.render_as_string(hide_password=False)
    async with Database(source, settings_for(source, database_direct_url=wrong)) as database:
        for work in (backup.backup(database, tmp_path / "x"), backup.restore(database, made, replace=True)):
            with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL leads to another database"):
                await work
    assert not any(os.scandir(tmp_path))


def test_an_old_pg_dump_is_no_help_and_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "found", lambda: [programs.Programs("15.1", 15, Path("/nowhere"))])
    with pytest.raises(ConfigurationError, match=r"\(found 15\); install the package postgresql-client-18"):
        programs.to_dump(18)
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 16.*postgresql-client-16"):
        programs.to_restore(16, 16)


def test_a_childs_environment_has_the_password_and_no_other_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("PGOPTIONS", raising=False)
    # It would outweigh all that follows.
    monkeypatch.setenv("PGSERVICE", "another")
    url = make_url("postgresql://me:p%40%3A%2F%20%25@h:5/d%25b?sslmode=require&connect_timeout=7&search_path=a b")
    found = programs.environment(url.set(database="d%b"), Settings())
    expected = {"PGHOST": "h", "PGPORT": "5", "PGUSER": "me", "PGPASSWORD": "p@:/ %", "PGDATABASE": "d%b"}
    expected |= {"PGSSLMODE": "require", "PGCONNECT_TIMEOUT": "7", "PGOPTIONS": "-c search_path=a\\ b"}
    assert {name: found.get(name) for name in expected} == expected
    assert not {"OPENAI_API_KEY", "PGSERVICE"} & found.keys()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("could not execute query: ERROR:  permission denied for table x", "permission denied for table x"),
        (
            'COPY failed for table "t": ERROR:  invalid input syntax for type json: "geheim"',
            'COPY failed for table "t"',
        ),
    ],
)
def test_what_a_program_says_is_told_without_values(line: str, said: str) -> None:
    error = programs._failure("pg_restore", ["noise", f"pg_restore: error: {line}", "CONTEXT: geheim"], 1)
    assert said in str(error)
    assert "geheim" not in str(error)


async def test_another_applications_revision_in_front_is_not_what_is_saved(migrated_url: URL, tmp_path: Path) -> None:
    await run_sql(
        migrated_url,
        "CREATE SCHEMA front",
        "CREATE TABLE front.alembic_version (version_num text)",
        "INSERT INTO front.alembic_version VALUES ('abc123')",
        f'ALTER DATABASE "{migrated_url.database}" SET search_path = front, public',
    )
    async with Database(migrated_url, settings_for(migrated_url)) as database:
        manifest = await backup.backup(database, tmp_path / "x")
        assert (manifest.schema, manifest.revision) == ("public", await migrations.current(database))
    assert "knowledge_chunks" in manifest.tables
