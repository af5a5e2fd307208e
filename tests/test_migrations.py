"""Each revision up, down and up again with awkward rows; reruns, the check and the command itself."""

import asyncio
import hashlib
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import run_sql
from migrating import (
    CHECKOUT,
    HEAD,
    alembic,
    crash_at,
    downgrade,
    fetch,
    fetch_value,
    finished,
    new_role,
    opened,
    seeded,
    upgrade,
)
from sqlalchemy import URL, make_url
from test_schema import describe, dump, find_program, libpq_url

from kotonoha_store import (
    SchemaOutdatedError,
    StoreError,
    migrations,
)

# -- rows ---------------------------------------------------------------------------------------------------------


async def test_sessions_come_through(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url)
    rows = {row["id"]: row for row in await fetch(empty_url, "SELECT * FROM sessions")}
    plain = rows[1]
    assert (plain["status"], plain["version"], plain["last_archived_message_index"]) == ("archived", 7, 1)
    assert (plain["messages_offset"], plain["rewrite_version"], plain["guild_id"]) == (0, 1, 1)
    assert "9007199254740993" in plain["messages"]
    assert plain["last_active_at"] == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    # Rounded up to five minutes.
    assert plain["archive_due_at"] == datetime(2026, 1, 2, 3, 5, tzinfo=UTC)
    nulls = rows[2]
    assert (nulls["status"], nulls["version"], nulls["last_archived_message_index"]) == ("active", 1, 0)
    assert nulls["created_at"] == nulls["last_active_at"]
    assert rows[3]["last_active_at"] == rows[3]["created_at"] == datetime(2026, 1, 3, tzinfo=UTC)
    assert rows[4]["created_at"] == rows[4]["last_active_at"] == datetime(2026, 1, 4, tzinfo=UTC)
    assert rows[4]["last_archived_message_index"] == 0


async def test_ids_in_metadata_become_columns_and_garbage_becomes_null(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url)
    columns = "guild_id, channel_id, thread_id, user_id"
    rows = {row["id"]: tuple(row)[1:] for row in await fetch(empty_url, f"SELECT id, {columns} FROM knowledge_sources")}
    assert rows[1] == (1, -2, 2**63 - 1, 7)
    assert rows[2] == (1, 2**53 + 1, -(2**63), None)
    assert all(rows[source_id] == (None, None, None, None) for source_id in (3, 4, 5, 6, 7))
    of_chunks = await fetch(
        empty_url,
        f"SELECT (SELECT row({columns}) FROM knowledge_sources s WHERE s.id = c.source_id) = row({columns})"
        " OR num_nonnulls(guild_id, channel_id, thread_id, user_id) = 0 FROM knowledge_chunks c",
    )
    assert all(row[0] for row in of_chunks)
    assert tuple((await fetch(empty_url, f"SELECT {columns} FROM knowledge_chunks WHERE id = 1"))[0]) == rows[1]
    assert tuple((await fetch(empty_url, f"SELECT {columns} FROM knowledge_chunks WHERE id = 2"))[0]) == rows[2]


async def test_sources_keep_their_times_and_metadata(empty_url: URL) -> None:
    await seeded(empty_url)
    before = await fetch(empty_url, "SELECT id, metadata, created_at, updated_at, status FROM knowledge_sources")
    await upgrade(empty_url)
    after = {row["id"]: row for row in await fetch(empty_url, "SELECT * FROM knowledge_sources")}
    for row in before:
        for name, value in row.items():
            assert value is None or after[row["id"]][name] == value
    assert (after[5]["status"], after[5]["metadata"]) == ("pending", "{}")
    assert after[5]["created_at"] == after[5]["updated_at"]
    assert after[6]["created_at"] == datetime(2026, 1, 5, tzinfo=UTC)
    assert after[7]["updated_at"] == datetime(2026, 1, 6, tzinfo=UTC)


@pytest.mark.parametrize("model", [None, "it's :odd, a:b 100% \\ model"])
async def test_chunks_get_hash_model_and_job(empty_url: URL, model: str | None) -> None:
    await seeded(empty_url)
    contents = dict(await fetch(empty_url, "SELECT id, content FROM knowledge_chunks"))
    await upgrade(empty_url, kb_embedding_model=model)
    rows = {row["id"]: row for row in await fetch(empty_url, "SELECT * FROM knowledge_chunks")}
    assert {chunk_id: row["content"] for chunk_id, row in rows.items()} == contents
    for row in rows.values():
        assert row["content_hash"] == hashlib.sha256(row["content"].encode()).digest()
        assert row["embedding_model"] == ((model or "text-embedding-3-small") if row["embedding"] else None)
        assert row["source_id"] is not None
        assert row["created_at"] is not None
        assert row["retry_count"] is not None
    assert (rows[1]["location"], rows[3]["location"], rows[3]["retry_count"]) == ('{"url": "u"}', "{}", 3)
    jobs = {row["chunk_id"]: row for row in await fetch(empty_url, "SELECT * FROM embedding_jobs")}
    assert {chunk_id: row["attempts"] for chunk_id, row in jobs.items()} == {-5: 0, 2: 2, 3: 3, 5: 0}
    assert all(row["lease_token"] is None and row["available_at"] <= datetime.now(UTC) for row in jobs.values())
    adopted = await fetch(empty_url, "SELECT id, title, status FROM knowledge_sources WHERE id > 7")
    assert {rows[4]["source_id"], rows[5]["source_id"]} == {row["id"] for row in adopted}
    assert [(row["title"], row["status"]) for row in adopted] == [("Chunks without a source", "pending")]


async def test_dead_letters_come_through(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url)
    rows = {row["id"]: row for row in await fetch(empty_url, "SELECT * FROM knowledge_chunks_dlq")}
    assert (rows[1]["content"], rows[1]["error_code"], rows[1]["retry_count"]) == ("dead", "RATE_LIMIT", 3)
    assert (rows[1]["original_chunk_id"], rows[1]["source_id"], rows[1]["location"]) == (99, 2, "{}")
    assert (rows[2]["retry_count"], rows[2]["source_id"]) == (0, None)
    assert rows[2]["created_at"] is not None


async def test_up_down_up_loses_no_row(empty_url: URL) -> None:
    await seeded(empty_url)
    tables = ("sessions", "knowledge_sources", "knowledge_chunks", "knowledge_chunks_dlq")

    async def contents() -> dict[str, list[Any]]:
        return {table: await fetch(empty_url, f"SELECT * FROM {table} ORDER BY id") for table in tables}

    await upgrade(empty_url)
    first, jobs = await contents(), await fetch(empty_url, "SELECT chunk_id, attempts FROM embedding_jobs ORDER BY 1")
    indexes = (await describe(empty_url))["indexes"]
    await run_sql(empty_url, "UPDATE embedding_jobs SET attempts = attempts + 1 WHERE chunk_id = 2")

    await downgrade(empty_url, "0001")
    counts = dict(await fetch(empty_url, "SELECT id, retry_count FROM knowledge_chunks"))
    # What the queue counted stands in the row again, where the first design looks for it.
    assert counts == {-5: 0, 1: 0, 2: 3, 3: 3, 4: 0, 5: 0}
    assert await fetch_value(empty_url, "SELECT version_num FROM alembic_version") == "0001"

    await run_sql(empty_url, "UPDATE knowledge_chunks SET retry_count = 2 WHERE id = 2")
    await upgrade(empty_url)
    assert await contents() == first
    assert await fetch(empty_url, "SELECT chunk_id, attempts FROM embedding_jobs ORDER BY 1") == jobs
    assert (await describe(empty_url))["indexes"] == indexes


async def test_a_downgrade_restores_the_first_design(empty_url: URL, server_url: URL) -> None:
    await seeded(empty_url)
    before = await describe(empty_url)
    await upgrade(empty_url)
    await downgrade(empty_url, "0001")
    assert await describe(empty_url) == before


async def test_down_to_base_leaves_nothing_but_the_extension(migrated_url: URL) -> None:
    await downgrade(migrated_url, "base")
    left = await fetch(
        migrated_url,
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind <> 'c'"
        " UNION ALL SELECT typname FROM pg_type WHERE typtype = 'e'"
        " UNION ALL SELECT proname FROM pg_proc WHERE proname LIKE 'kotonoha%'",
    )
    assert {row[0] for row in left} == {"alembic_version", "alembic_version_pkc"}
    assert await fetch_value(migrated_url, "SELECT count(*) FROM pg_extension WHERE extname = 'vector'") == 1
    async with opened(migrated_url) as database:
        assert await migrations.current(database) is None
    await upgrade(migrated_url)
    async with opened(migrated_url) as database:
        await migrations.check(database)


async def test_new_rules_hold_and_the_old_checks_are_gone(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url)
    constraints = {name for _, name, _ in (await describe(empty_url))["constraints"]}
    assert not constraints & {"chk_sessions_status", "chk_sources_status"}
    # A CHECK that repeated the labels would stop this value.
    await run_sql(empty_url, "ALTER TYPE session_status_enum ADD VALUE 'paused'")
    await run_sql(empty_url, "UPDATE sessions SET status = 'paused'")
    for statement, constraint in (
        ("UPDATE knowledge_chunks SET embedding_model = NULL WHERE id = 1", "chk_chunks_embedding_model"),
        ("UPDATE sessions SET last_archived_message_index = -1", "chk_sessions_counters"),
        ("UPDATE sessions SET messages_offset = -1", "chk_sessions_counters"),
        ("UPDATE knowledge_sources SET origin_session_id = 1", "chk_sources_origin"),
    ):
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            await run_sql(empty_url, statement)
        assert caught.value.constraint_name == constraint
    with pytest.raises(asyncpg.NotNullViolationError):
        await run_sql(empty_url, "UPDATE knowledge_chunks SET source_id = NULL")


async def test_updated_at_follows_updates(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url)
    updated_at = "SELECT updated_at FROM knowledge_sources WHERE id = $1"
    before = await fetch_value(empty_url, updated_at, 2)
    moment = await fetch_value(empty_url, "SELECT clock_timestamp()")
    await run_sql(empty_url, "UPDATE knowledge_sources SET title = 'new' WHERE id = 1")
    assert await fetch_value(empty_url, updated_at, 1) >= moment
    assert await fetch_value(empty_url, updated_at, 2) == before


# -- reruns -------------------------------------------------------------------------------------------------------


async def test_a_database_made_by_the_first_script_is_taken_over(empty_url: URL) -> None:
    await seeded(empty_url)
    await run_sql(empty_url, "DROP TABLE alembic_version")
    await upgrade(empty_url)
    assert await fetch_value(empty_url, "SELECT count(*) FROM knowledge_chunks WHERE content_hash IS NOT NULL") == 6
    async with opened(empty_url) as database:
        await migrations.check(database)


async def test_migrating_again_changes_nothing(migrated_url: URL) -> None:
    before = await describe(migrated_url)
    await upgrade(migrated_url)
    assert await describe(migrated_url) == before


@pytest.mark.parametrize(
    ("statement", "committed"),
    [
        ("chk_sources_origin", False),
        ("CREATE OR REPLACE TRIGGER", False),
        ("UPDATE knowledge_chunks AS c", True),
        ("SET lock_timeout = 0", True),
        ("IF NOT EXISTS idx_sources_document_key", True),
        ("IF NOT EXISTS idx_chunks_embedding", True),
        ("UPDATE alembic_version", True),
    ],
)
async def test_a_half_applied_revision_completes_when_run_again(
    empty_url: URL, template: URL, monkeypatch: pytest.MonkeyPatch, statement: str, committed: bool
) -> None:
    await seeded(empty_url)
    async with opened(empty_url) as database:
        with crash_at(database, statement, monkeypatch):
            await migrations.upgrade(database)
        assert await migrations.current(database) == "0001"
    assert await fetch_value(empty_url, "SELECT to_regclass('embedding_jobs') IS NOT NULL") == committed
    if committed:
        # The application, deployed already, writes meanwhile.
        await run_sql(
            empty_url,
            'UPDATE knowledge_sources SET guild_id = 42, metadata = metadata || \'{"guild_id": "77"}\' WHERE id = 3',
            "UPDATE knowledge_chunks SET content_hash = 'kept' WHERE id = 3",
            "DELETE FROM embedding_jobs WHERE chunk_id = 5",
            "UPDATE embedding_jobs SET attempts = 1 WHERE chunk_id = 3",
        )
    times = await fetch(empty_url, "SELECT id, updated_at FROM knowledge_sources ORDER BY id")

    await upgrade(empty_url)

    assert await describe(empty_url) == await describe(template)
    assert not await fetch(empty_url, "SELECT FROM pg_index WHERE NOT indisvalid")
    assert await fetch_value(empty_url, "SELECT count(*) FROM knowledge_chunks WHERE content_hash IS NULL") == 0
    assert await fetch_value(empty_url, "SELECT count(*) FROM embedding_jobs") == 4
    assert await fetch_value(empty_url, "SELECT count(*) FROM knowledge_sources WHERE title LIKE 'Chunks%'") == 1
    if committed:
        assert await fetch_value(empty_url, "SELECT guild_id FROM knowledge_sources WHERE id = 3") == 42
        assert await fetch_value(empty_url, "SELECT content_hash FROM knowledge_chunks WHERE id = 3") == b"kept"
        assert await fetch_value(empty_url, "SELECT attempts FROM embedding_jobs WHERE chunk_id = 3") == 1
        # Filling in is no change of the source.
        assert await fetch(empty_url, "SELECT id, updated_at FROM knowledge_sources ORDER BY id") == times


async def test_a_downgrade_can_be_run_again(migrated_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(migrated_url) as database:
        with crash_at(database, "ADD CONSTRAINT chk_sources_status", monkeypatch):
            await migrations.downgrade(database, "0001")
        # Each revision is a transaction of its own.
        assert await migrations.current(database) == "0002"
    await downgrade(migrated_url, "0001")
    assert "chk_sources_status" in {name for _, name, _ in (await describe(migrated_url))["constraints"]}


@pytest.mark.parametrize(
    "index",
    [
        "idx_chunks_embedding",
        "idx_sources_origin",
        "idx_dlq_source_id",
        "idx_sources_origin_session_key",
        "idx_chunk_terms_terms",
    ],
)
async def test_an_invalid_index_is_built_anew(migrated_url: URL, index: str) -> None:
    before = await describe(migrated_url)
    await run_sql(
        migrated_url,
        f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass",
        "UPDATE alembic_version SET version_num = '0001'",
    )
    await upgrade(migrated_url)
    assert not await fetch(migrated_url, "SELECT FROM pg_index WHERE NOT indisvalid")
    assert await describe(migrated_url) == before


async def test_an_index_that_really_failed_is_built_anew(migrated_url: URL) -> None:
    insert = "INSERT INTO knowledge_sources (type, title, document_key) VALUES ('web_page', '{}', 'same')"
    await run_sql(migrated_url, "DROP INDEX idx_sources_document_key", insert.format("a"), insert.format("b"))
    await run_sql(migrated_url, "UPDATE alembic_version SET version_num = '0001'")
    for _ in range(2):
        with pytest.raises(StoreError, match="idx_sources_document_key"):
            await upgrade(migrated_url)
        assert await fetch(migrated_url, "SELECT FROM pg_index WHERE NOT indisvalid")
    await run_sql(migrated_url, "DELETE FROM knowledge_sources WHERE title = 'b'")
    await upgrade(migrated_url)
    assert not await fetch(migrated_url, "SELECT FROM pg_index WHERE NOT indisvalid")


async def test_a_namesake_in_another_schema_is_left_alone(empty_url: URL) -> None:
    """Two installations in one database, both in the search_path: a rerun drops only its own indexes."""
    await upgrade(empty_url, "0001")
    await run_sql(empty_url, "DROP TABLE alembic_version", "CREATE SCHEMA app")
    before = (await describe(empty_url))["indexes"]
    await run_sql(empty_url, "DROP TABLE alembic_version")
    app = empty_url.update_query_dict({"options": "-csearch_path=app,public"})
    for _ in range(2):
        await upgrade(app)
        await run_sql(empty_url, "UPDATE app.alembic_version SET version_num = '0001'")
    assert (await describe(empty_url))["indexes"] == before


# -- check and current --------------------------------------------------------------------------------------------


async def test_current_and_head(empty_url: URL) -> None:
    assert migrations.head() == HEAD
    async with opened(empty_url) as database:
        assert await migrations.current(database) is None
        await migrations.upgrade(database, "0001")
        assert await migrations.current(database) == "0001"
        await migrations.upgrade(database)
        assert await migrations.current(database) == HEAD


async def test_check_is_clean_after_an_upgrade(migrated_url: URL, capsys: pytest.CaptureFixture[str]) -> None:
    async with opened(migrated_url) as database:
        await migrations.check(database)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE sessions DROP COLUMN rewrite_version",
        "ALTER TABLE sessions ALTER COLUMN status DROP NOT NULL",
        "ALTER TABLE knowledge_chunks ALTER COLUMN retry_count SET DEFAULT 7",
        "ALTER TABLE knowledge_chunks ALTER COLUMN token_count TYPE bigint",
        "DROP INDEX idx_chunks_queue",
        "DROP TABLE embedding_jobs",
        "DROP INDEX idx_chunk_terms_terms",
        "DROP TABLE term_frequencies",
        "ALTER TABLE chunk_terms DROP COLUMN folded",
        "UPDATE alembic_version SET version_num = '0001'",
    ],
)
async def test_check_sees(migrated_url: URL, change: str) -> None:
    await run_sql(migrated_url, change)
    async with opened(migrated_url) as database:
        with pytest.raises(SchemaOutdatedError):
            await migrations.check(database)


async def test_check_of_an_empty_database_changes_nothing(empty_url: URL) -> None:
    async with opened(empty_url) as database:
        with pytest.raises(SchemaOutdatedError):
            await migrations.check(database)
    assert not await fetch(empty_url, "SELECT FROM pg_tables WHERE schemaname = 'public'")


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_goes_up_and_down(empty_url: URL) -> None:
    code, _, err = finished(alembic(empty_url, "upgrade", "head", KB_HNSW_M="8", KB_EMBEDDING_MODEL="m"))
    assert code == 0, err
    assert "m='8'" in asyncio.run(describe(empty_url))["indexes"]["idx_chunks_embedding"]
    code, out, err = finished(alembic(empty_url, "current"))
    assert (code, HEAD in out) == (0, True), err
    code, _, err = finished(alembic(empty_url, "check"))
    assert code == 0, err
    code, _, err = finished(alembic(empty_url, "downgrade", "base"))
    assert code == 0, err
    assert asyncio.run(fetch_value(empty_url, "SELECT to_regclass('sessions')")) is None


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("postgresql://u:s3cret@127.0.0.1:1/x", {}, "cannot be reached"),
        ("mysql://u:s3cret@127.0.0.1/x", {}, "needs postgresql://"),
        ("postgresql://u:s3cret@127.0.0.1:1/x", {"DB_POOL_MAX_SIZE": "no"}, "DB_POOL_MAX_SIZE"),
    ],
)
def test_the_command_fails_in_one_line(url: str, environment: dict[str, str], expected: str) -> None:
    process = alembic(make_url(url), "upgrade", "head", DB_CONNECT_ATTEMPTS="1", **environment)
    code, out, err = finished(process)
    assert code not in (0, None)
    assert expected in out + err
    assert "Traceback" not in out + err
    assert "s3cret" not in out + err


def test_an_odd_password_works_through_the_command(empty_url: URL, server_url: URL) -> None:
    password = "p%40ss:w/o?r#d 100% $x'\"é"
    quoted = password.replace("'", "''")
    with new_role(server_url, f"SUPERUSER PASSWORD '{quoted}'") as role:
        url = empty_url.set(username=role, password=password)
        code, _, err = finished(alembic(url, "upgrade", "head"))
        assert code == 0, err
        owner = "SELECT tableowner::text FROM pg_tables WHERE tablename = 'sessions'"
        assert asyncio.run(fetch_value(url, owner)) == role
        asyncio.run(run_sql(empty_url, f'DROP OWNED BY "{role}"'))


def test_the_script_that_the_command_prints_makes_the_same(
    empty_url: URL, template: URL, server_url: URL, tmp_path: Path
) -> None:
    psql, pg_dump = find_program("psql", server_url), find_program("pg_dump", server_url)
    if psql is None:
        pytest.skip("no psql to run the script with")
    unreachable = URL.create("postgresql", host="127.0.0.1", port=1)
    model = "it's :odd, a:b 100% model"
    code, out, err = finished(alembic(unreachable, "upgrade", "head", "--sql", KB_EMBEDDING_MODEL=model))
    assert code == 0, err
    assert "DEFAULT 'it''s :odd, a:b 100% model'" in out
    script = tmp_path / "upgrade.sql"
    script.write_text(out)
    command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(script), libpq_url(empty_url)]
    # Twice: each statement can be run again.
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert asyncio.run(describe(empty_url)) == asyncio.run(describe(template))
    if pg_dump is not None:
        assert dump(pg_dump, empty_url) == dump(pg_dump, template)
    assert asyncio.run(fetch(empty_url, "SELECT version_num FROM alembic_version")) == [(HEAD,)]


def test_the_script_goes_down_too(migrated_url: URL, server_url: URL) -> None:
    psql = find_program("psql", server_url)
    if psql is None:
        pytest.skip("no psql to run the script with")
    code, out, err = finished(alembic(migrated_url, "downgrade", f"{HEAD}:base", "--sql"))
    assert code == 0, err
    command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", libpq_url(migrated_url)]
    result = subprocess.run(command, input=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert asyncio.run(fetch_value(migrated_url, "SELECT to_regclass('sessions')")) is None


async def test_scripts_in_an_odd_folder_are_found(
    empty_url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "100% odd; folder" / "alembic"
    shutil.copytree(CHECKOUT / "alembic", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(migrations, "script_location", lambda: folder)
    await upgrade(empty_url)
    async with opened(empty_url) as database:
        assert await migrations.current(database) == HEAD
