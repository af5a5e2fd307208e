"""Each revision up, down and up again with awkward rows; reruns, rivals, roles, schemas and the command itself."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest
from alembic.script import ScriptDirectory
from conftest import run_sql, settings_for
from sqlalchemy import URL, Connection, event, make_url, text
from test_schema import describe, dump, find_program, libpq_url

from kotonoha_store import (
    ConfigurationError,
    Database,
    ExtensionMissingError,
    HashingEmbedder,
    KnowledgeRepository,
    NewChunk,
    SchemaOutdatedError,
    Settings,
    Store,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    migrations,
)
from kotonoha_store.database import connect_arguments
from kotonoha_store.term_index import fill_terms
from kotonoha_store.words import analyse, scope_terms

CHECKOUT = Path(__file__).parent.parent
HEAD = "0004"
VECTOR = "[" + ",".join(["0.5"] * 1536) + "]"

# What the first design let in. Ids are given, so that the tests can name the rows.
AWKWARD_ROWS = """
    INSERT INTO sessions (id, session_key, session_type, messages, status, guild_id, version,
        last_archived_message_index, created_at, last_active_at) VALUES
        (1, 'plain', 'thread', '[{"role": "user", "content": "hi", "id": 9007199254740993}]', 'archived', 1, 7, 1,
            '2026-01-01 00:00Z', '2026-01-02 03:04:05Z'),
        (2, 'nulls', 'dm', '[]', NULL, NULL, NULL, NULL, NULL, NULL),
        (3, 'half a time', 'dm', '[]', 'active', NULL, 1, 0, '2026-01-03 00:00Z', NULL),
        (4, 'counted below zero', 'dm', '[]', 'active', NULL, 1, -1, NULL, '2026-01-04 00:00Z');

    INSERT INTO knowledge_sources (id, type, title, status, metadata, created_at, updated_at) VALUES
        (1, 'discord_session', 'strings', 'completed',
            '{"guild_id": "1", "channel_id": "-2", "thread_id": "9223372036854775807", "user_id": "007"}',
            '2026-01-01 00:00Z', '2026-01-02 00:00Z'),
        (2, 'discord_session', 'numbers', 'partial',
            '{"guild_id": 1, "channel_id": 9007199254740993, "thread_id": -9223372036854775808, "user_id": null}',
            '2026-01-01 00:00Z', '2026-01-02 00:00Z'),
        (3, 'web_page', 'garbage', 'failed',
            '{"guild_id": "abc", "channel_id": "", "thread_id": "1; DROP", "user_id": {"id": 1}}',
            '2026-01-01 00:00Z', '2026-01-02 00:00Z'),
        (4, 'web_page', 'beyond 64 bits', 'pending',
            '{"guild_id": 9223372036854775808, "channel_id": "-9223372036854775809",
              "thread_id": 1e400, "user_id": 1.5}',
            '2026-01-01 00:00Z', '2026-01-02 00:00Z'),
        (5, 'document_file', 'nulls', NULL, NULL, NULL, NULL),
        (6, 'document_file', 'no object', 'pending', '["guild_id"]', NULL, '2026-01-05 00:00Z'),
        (7, 'document_file', 'a line', 'pending', '{"guild_id": "1\\n", "channel_id": "１"}',
            '2026-01-06 00:00Z', NULL);

    SELECT setval('knowledge_sources_id_seq', 7);
"""
CHUNKS = f"""
    INSERT INTO knowledge_chunks (id, source_id, content, embedding, location, token_count, retry_count, created_at)
    VALUES
        (-5, 1, 'an id that no sequence gave', NULL, '{{}}', 1, 0, '2026-01-01 00:00Z'),
        (1, 1, '梅雨がないのはどこ？ \\ ''quoted'' :name %s $1', '{VECTOR}', '{{"url": "u"}}', 9, 0,
            '2026-01-01 00:00Z'),
        (2, 2, '', NULL, '{{}}', 0, 2, '2026-01-02 00:00Z'),
        (3, 4, 'given up', NULL, NULL, NULL, 3, '2026-01-03 00:00Z'),
        (4, NULL, 'orphan, embedded', '{VECTOR}', NULL, NULL, NULL, NULL),
        (5, NULL, 'orphan, waiting', NULL, NULL, NULL, NULL, NULL);
    INSERT INTO knowledge_chunks_dlq (id, original_chunk_id, source_id, source_title, content, error_code, retry_count,
        created_at) VALUES
        (1, 99, 2, 'numbers', 'dead', 'RATE_LIMIT', 3, '2026-01-01 00:00Z'),
        (2, NULL, NULL, NULL, 'dead without anything', NULL, NULL, NULL);
"""


async def fetch(url: URL, query: str, *args: object) -> list[Any]:
    connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
    try:
        return list(await connection.fetch(query, *args))
    finally:
        await connection.close()


async def fetch_value(url: URL, query: str, *args: object) -> Any:
    return (await fetch(url, query, *args))[0][0]


@asynccontextmanager
async def opened(url: URL, **values: object) -> AsyncIterator[Database]:
    async with Database(url, settings_for(url, **values)) as database:
        yield database


async def upgrade(url: URL, revision: str = "head", **values: object) -> None:
    async with opened(url, **values) as database:
        await migrations.upgrade(database, revision)


async def downgrade(url: URL, revision: str) -> None:
    async with opened(url) as database:
        await migrations.downgrade(database, revision)


async def seeded(url: URL) -> None:
    await upgrade(url, "0001")
    await run_sql(url, AWKWARD_ROWS, CHUNKS)


def alembic(url: URL, *args: str, **environment: str) -> subprocess.Popen[str]:
    """The command in the checkout, as a user types it."""
    kept = {name: value for name, value in os.environ.items() if name.upper().lower() not in Settings.model_fields}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "alembic", *args],
        cwd=CHECKOUT,
        env=kept | {"DATABASE_URL": url.render_as_string(hide_password=False), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@contextmanager
def new_role(server: URL, options: str = "") -> Iterator[str]:
    name = f"kt_role_{uuid.uuid4().hex[:8]}"
    asyncio.run(run_sql(server, f'CREATE ROLE "{name}" LOGIN {options}'))
    try:
        yield name
    finally:
        asyncio.run(run_sql(server, f'DROP ROLE "{name}"'))


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
    await run_sql(empty_url, "UPDATE knowledge_sources SET title = 'new' WHERE id = 1")
    query = "SELECT now() - updated_at < INTERVAL '1 minute' FROM knowledge_sources WHERE id = $1"
    assert await fetch_value(empty_url, query, 1)
    assert not await fetch_value(empty_url, query, 2)


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


class _CrashError(Exception):
    """The process died here."""


@contextmanager
def crash_at(database: Database, statement: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise before the first statement that holds ``statement`` on the migration's connection."""
    make_patient = database.patient

    def patient() -> Database:
        made = make_patient()

        @event.listens_for(made.engine.sync_engine, "before_cursor_execute")
        def crash(_c: Any, _cursor: Any, sql: str, *_: Any) -> None:
            if statement in sql:
                raise _CrashError(statement)

        return made

    monkeypatch.setattr(database, "patient", patient)
    with pytest.raises(_CrashError):
        yield


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


# -- words ------------------------------------------------------------------------------------------------------


# As the archiver of revision 2 wrote them, and whoever wrote by hand.
SESSION_SOURCES = """
    INSERT INTO knowledge_sources (id, type, title, metadata, guild_id, created_at, updated_at)
    SELECT id, type::source_type_enum, title, metadata::jsonb, guild_id, '2026-01-01 00:00Z', '2026-01-02 00:00Z'
    FROM (VALUES
        (11, 'discord_session', 'a session', '{"origin_session_key": "thread:1"}', 1),
        (12, 'discord_session', 'odd', '{"origin_session_key": " :x ''\\"\\\\ ｶﾞ"}', NULL),
        (13, 'discord_session', 'a number', '{"origin_session_key": 5}', NULL),
        (14, 'discord_session', 'null', '{"origin_session_key": null}', NULL),
        (15, 'discord_session', 'none', '{}', NULL),
        (16, 'discord_session', 'no object', '["origin_session_key"]', NULL),
        (17, 'discord_session', 'an object', '{"origin_session_key": {"a": 1}}', NULL),
        (18, 'web_page', 'no session', '{"origin_session_key": "thread:2"}', NULL)
    ) AS n (id, type, title, metadata, guild_id);
    INSERT INTO knowledge_chunks (id, source_id, content, guild_id) VALUES
        (11, 11, 'ＲＵＮＮＩＮＧ towers, running', 1),
        (12, 12, 'ignored', NULL);
    SELECT setval('knowledge_sources_id_seq', 100), setval('knowledge_chunks_id_seq', 100);
"""
SESSION_KEYS = {11: "thread:1", 12: " :x '\"\\ ｶﾞ"}


async def at_revision_2(url: URL) -> None:
    await seeded(url)
    await upgrade(url, "0002")
    await run_sql(url, SESSION_SOURCES)


async def terms_of_chunks(url: URL) -> dict[int, tuple[set[str], str | None]]:
    rows = await fetch(url, "SELECT chunk_id, tsvector_to_array(terms), folded FROM chunk_terms")
    return {row[0]: (set(row[1]), row[2]) for row in rows}


async def expected_terms(url: URL) -> dict[int, tuple[set[str], str | None]]:
    """As the library itself writes them."""
    names = ("guild_id", "channel_id", "thread_id", "user_id")
    found = {}
    for row in await fetch(
        url, "SELECT c.*, title FROM knowledge_chunks c JOIN knowledge_sources s ON s.id = source_id"
    ):
        words = analyse(row["title"], row["content"])
        scope = scope_terms(**{name: row[name] for name in names})
        found[row["id"]] = ({*words.terms, *scope}, words.folded)
    return found


async def session_keys(url: URL) -> dict[int, str]:
    query = "SELECT id, origin_session_key FROM knowledge_sources WHERE origin_session_key IS NOT NULL"
    return dict(await fetch(url, query))


async def test_chunks_that_are_there_get_their_terms(empty_url: URL) -> None:
    await at_revision_2(empty_url)
    await upgrade(empty_url)
    found = await terms_of_chunks(empty_url)
    assert set(found) == {-5, 1, 2, 3, 4, 5, 11, 12}
    assert found == await expected_terms(empty_url)
    assert found[11] == (
        {"a", "session", "running", "run", "towers", "tower", "#guild_id=1"},
        "a session\nrunning towers, running",
    )
    assert "'run':1A" in await fetch_value(empty_url, "SELECT terms::text FROM chunk_terms WHERE chunk_id = 11")
    assert f"#thread_id={2**63 - 1}" in found[1][0]
    frequencies = dict(await fetch(empty_url, "SELECT term, frequency FROM term_frequencies"))
    assert (frequencies[""], frequencies["run"]) == (8.0, 1 / 8)
    assert await fetch_value(empty_url, "SELECT gin_clean_pending_list('idx_chunk_terms_terms')") == 0


async def test_the_key_of_its_session_comes_out_of_a_sources_metadata(empty_url: URL) -> None:
    await at_revision_2(empty_url)
    kept = "SELECT id, metadata, updated_at FROM knowledge_sources ORDER BY id"
    before = await fetch(empty_url, kept)
    await upgrade(empty_url)
    assert await session_keys(empty_url) == SESSION_KEYS
    # Filling in is no change of the source.
    assert await fetch(empty_url, kept) == before
    await run_sql(empty_url, "UPDATE knowledge_sources SET title = 'new' WHERE id = 11")
    assert await fetch_value(empty_url, "SELECT updated_at > '2026-01-03' FROM knowledge_sources WHERE id = 11")


@pytest.mark.parametrize(
    ("statement", "committed"),
    [
        ("ADD COLUMN IF NOT EXISTS origin_session_key", False),
        ("UPDATE knowledge_sources", False),
        ("CREATE OR REPLACE TRIGGER", False),
        ("IF NOT EXISTS chunk_terms", False),
        ("SET STORAGE EXTERNAL", False),
        ("IF NOT EXISTS term_frequencies", False),
        ("CREATE OR REPLACE FUNCTION kotonoha_refresh_terms", False),
        ("ALTER FUNCTION kotonoha_refresh_terms", False),
        ("INSERT INTO chunk_terms", True),
        ("SET lock_timeout = 0", True),
        ("IF NOT EXISTS idx_sources_origin_session_key", True),
        ("IF NOT EXISTS idx_chunk_terms_terms", True),
        ("SELECT kotonoha_refresh_terms", True),
        ("UPDATE alembic_version", True),
    ],
)
async def test_half_of_the_words_completes_when_run_again(
    empty_url: URL, template: URL, monkeypatch: pytest.MonkeyPatch, statement: str, committed: bool
) -> None:
    await at_revision_2(empty_url)
    async with opened(empty_url) as database:
        with crash_at(database, statement, monkeypatch):
            await migrations.upgrade(database)
        assert await migrations.current(database) == "0002"
    assert await fetch_value(empty_url, "SELECT to_regclass('chunk_terms') IS NOT NULL") == committed
    if committed:
        # The application, deployed already, writes meanwhile.
        async with opened(empty_url) as database, database.begin() as session:
            await KnowledgeRepository(session).add_chunks(13, [NewChunk("new")])
        await run_sql(
            empty_url,
            "UPDATE knowledge_sources SET origin_session_key = 'kept' WHERE id IN (11, 13)",
            "DELETE FROM knowledge_chunks WHERE id IN (1, 2)",
            "DELETE FROM chunk_terms WHERE chunk_id = 3",
        )
    times = await fetch(empty_url, "SELECT id, updated_at FROM knowledge_sources ORDER BY id")

    await upgrade(empty_url)

    assert await describe(empty_url) == await describe(template)
    assert not await fetch(empty_url, "SELECT FROM pg_index WHERE NOT indisvalid")
    assert await terms_of_chunks(empty_url) == await expected_terms(empty_url)
    assert await session_keys(empty_url) == SESSION_KEYS | ({11: "kept", 13: "kept"} if committed else {})
    assert await fetch(empty_url, "SELECT id, updated_at FROM knowledge_sources ORDER BY id") == times
    counted = await fetch_value(empty_url, "SELECT frequency FROM term_frequencies WHERE term = ''")
    assert counted == await fetch_value(empty_url, "SELECT count(*) FROM knowledge_chunks")
    path = "SELECT proconfig::text FROM pg_proc WHERE proname = 'kotonoha_refresh_terms'"
    assert await fetch_value(empty_url, path) == '{"search_path=public, pg_temp"}'


async def test_words_go_down_and_up_again(empty_url: URL) -> None:
    await at_revision_2(empty_url)
    before = await describe(empty_url)
    rows = {table: f"SELECT * FROM {table} ORDER BY id" for table in ("knowledge_sources", "knowledge_chunks")}
    old = {table: await fetch(empty_url, query) for table, query in rows.items()}
    await upgrade(empty_url)
    terms, new = (
        await terms_of_chunks(empty_url),
        {table: await fetch(empty_url, query) for table, query in rows.items()},
    )

    await downgrade(empty_url, "0002")
    assert await describe(empty_url) == before
    assert {table: await fetch(empty_url, query) for table, query in rows.items()} == old
    assert not await fetch(empty_url, "SELECT FROM pg_proc WHERE proname = 'kotonoha_refresh_terms'")

    await upgrade(empty_url)
    assert await terms_of_chunks(empty_url) == terms
    assert {table: await fetch(empty_url, query) for table, query in rows.items()} == new


async def test_a_chunk_that_is_being_deleted_is_not_waited_for(empty_url: URL) -> None:
    """Its deletion may wait for another chunk of the batch: a deadlock."""
    await at_revision_2(empty_url)
    await upgrade(empty_url)
    await run_sql(empty_url, "DELETE FROM chunk_terms")
    revision = ScriptDirectory.from_config(migrations.alembic_config()).get_revision(HEAD)
    async with opened(empty_url) as database, database.engine.connect() as other:
        await other.execute(text("DELETE FROM knowledge_chunks WHERE id = 3"))
        async with database.connect() as connection:
            await asyncio.wait_for(connection.run_sync(revision.module.fill_terms), 10)
        await other.commit()
    assert len(await terms_of_chunks(empty_url)) == 7
    assert await terms_of_chunks(empty_url) == await expected_terms(empty_url)


@pytest.mark.parametrize("chunks", [True, False])
def test_a_script_warns_of_chunks_without_words(empty_url: URL, server_url: URL, chunks: bool) -> None:
    psql = find_program("psql", server_url)
    if psql is None:
        pytest.skip("no psql to run the script with")
    asyncio.run(at_revision_2(empty_url) if chunks else upgrade(empty_url, "0002"))
    code, out, err = finished(alembic(empty_url, "upgrade", "0002:0003", "--sql"))
    assert code == 0, err
    command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", libpq_url(empty_url)]
    result = subprocess.run(command, input=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert ("WARNING" in result.stderr and "fill_terms" in result.stderr) == chunks, result.stderr
    if chunks:
        assert asyncio.run(terms_of_chunks(empty_url)) == {}
        assert asyncio.run(session_keys(empty_url)) == SESSION_KEYS
        asyncio.run(_fill(empty_url))
        assert asyncio.run(terms_of_chunks(empty_url)) == asyncio.run(expected_terms(empty_url))


async def _fill(url: URL) -> None:
    async with opened(url) as database, database.begin() as session:
        assert await fill_terms(session) == 12


# -- others at work -----------------------------------------------------------------------------------------------


def test_two_commands_at_once_both_succeed(empty_url: URL) -> None:
    processes = [alembic(empty_url, "upgrade", "head") for _ in range(2)]
    results = [finished(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert asyncio.run(fetch_value(empty_url, "SELECT version_num FROM alembic_version")) == HEAD


async def test_two_upgrades_in_one_loop_both_succeed(empty_url: URL) -> None:
    async with opened(empty_url) as one, opened(empty_url) as other:
        await asyncio.gather(migrations.upgrade(one), migrations.upgrade(one), migrations.upgrade(other))
        assert await migrations.current(one) == HEAD


def test_two_upgrades_in_two_threads_both_succeed(empty_url: URL) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(upgrade(empty_url))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert asyncio.run(fetch_value(empty_url, "SELECT version_num FROM alembic_version")) == HEAD


async def test_connections_made_before_see_the_new_tables(empty_url: URL) -> None:
    """Statements that a connection has prepared are of the old ones."""
    async with opened(empty_url) as database:
        await migrations.upgrade(database, "0001")
        for column in (False, True):
            async with database.connect() as connection:
                result = await connection.execute(text("SELECT * FROM sessions"))
                assert ("rewrite_version" in result.keys()) == column  # noqa: SIM118
            await migrations.upgrade(database)


async def test_one_connection_in_the_pool_is_enough(empty_url: URL) -> None:
    await upgrade(empty_url, db_pool_max_size=1)
    async with opened(empty_url, db_pool_max_size=1) as database:
        await migrations.check(database)


async def test_time_outs_of_the_role_do_not_end_a_migration(empty_url: URL) -> None:
    """Hosted servers set such; building an index takes longer."""
    await seeded(empty_url)
    await run_sql(
        empty_url,
        f"ALTER DATABASE {empty_url.database} SET statement_timeout = '300ms'",
        f"ALTER DATABASE {empty_url.database} SET idle_session_timeout = '300ms'",
        # Each chunk takes a while.
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END $$",
        "CREATE TRIGGER slow BEFORE UPDATE ON knowledge_chunks FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    await upgrade(empty_url)


async def test_a_locked_table_gives_a_time_out_and_no_hang(empty_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.2)
    await seeded(empty_url)
    async with opened(empty_url) as database:
        async with database.begin() as session:
            await session.execute(text("SELECT FROM sessions"))
            with pytest.raises(StoreTimeoutError, match="lock"):
                await asyncio.wait_for(upgrade(empty_url), 20)
        await migrations.upgrade(database)
        assert await migrations.current(database) == HEAD


async def test_another_migration_that_never_ends_gives_a_time_out(
    empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_WAIT_SECONDS", 0.3)
    async with opened(empty_url) as database, database.connect() as other:
        await other.execute(text("SELECT pg_advisory_lock(:id)"), {"id": migrations.LOCK_ID})
        with pytest.raises(StoreTimeoutError, match="another migration"):
            await migrations.upgrade(database)


async def test_a_cancelled_migration_leaves_no_lock(empty_url: URL) -> None:
    await seeded(empty_url)
    async with opened(empty_url) as database:
        # Something to be waiting for in the middle.
        async with database.begin() as session:
            await session.execute(text("SELECT FROM knowledge_sources"))
            task = asyncio.create_task(migrations.upgrade(database))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND"
            while not await fetch_value(empty_url, f"{waiting} wait_event_type = 'Lock'"):
                assert not task.done()
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
        oid = "(SELECT oid FROM pg_database WHERE datname = current_database())"
        assert await fetch_value(empty_url, f"{locks} {oid}") == 0
        assert not migrations._in_process.locked()
        await migrations.upgrade(database)
        assert await migrations.current(database) == HEAD


async def test_an_old_transaction_delays_indexes_past_the_lock_timeout(
    empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.2)
    await seeded(empty_url)
    async with opened(empty_url) as database:
        async with database.engine.connect() as old:
            await old.execution_options(isolation_level="REPEATABLE READ")
            await old.execute(text("SELECT 1"))
            task = asyncio.create_task(migrations.upgrade(database))
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'virtualxid' AND NOT granted"
            while not await fetch_value(empty_url, waiting):
                assert not task.done()
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            assert not task.done()
        await asyncio.wait_for(task, 30)


# -- the server and the role --------------------------------------------------------------------------------------


async def test_a_role_that_may_not_create_the_extension_is_told_the_statement(empty_url: URL, server_url: URL) -> None:
    def run() -> None:
        with new_role(server_url) as role:
            asyncio.run(run_sql(empty_url, f'CREATE SCHEMA AUTHORIZATION "{role}"'))
            try:
                url = empty_url.set(username=role)
                with pytest.raises(ExtensionMissingError, match="CREATE EXTENSION vector"):
                    asyncio.run(upgrade(url))
                # What it says, helps.
                asyncio.run(run_sql(empty_url, "CREATE EXTENSION vector"))
                asyncio.run(upgrade(url))
                assert asyncio.run(fetch_value(url, "SELECT to_regclass('sessions')::text")) == "sessions"
            finally:
                asyncio.run(run_sql(empty_url, f'DROP SCHEMA "{role}" CASCADE'))

    await asyncio.to_thread(run)


async def test_a_role_that_may_not_create_tables_is_told_so(empty_url: URL, server_url: URL) -> None:
    def run() -> None:
        with new_role(server_url) as role, pytest.raises(ConfigurationError, match="privilege"):
            asyncio.run(upgrade(empty_url.set(username=role)))

    await asyncio.to_thread(run)


async def test_an_extension_outside_the_search_path_is_told_and_inside_it_works(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE SCHEMA extensions", "CREATE EXTENSION vector SCHEMA extensions")
    with pytest.raises(ExtensionMissingError, match=r'search_path.*"extensions"'):
        await upgrade(empty_url)
    await run_sql(empty_url, f'ALTER DATABASE {empty_url.database} SET search_path = "$user", public, extensions')
    async with Store.open(settings_for(empty_url), embedder=HashingEmbedder()) as store:
        await store.migrate()
        await store.add_document("梅雨", "梅雨は雨の多い季節です。", guild_id=1)
        assert (await store.embedding_worker.run_until_empty()).embedded == 1
        result = await store.search("梅雨", everywhere=True, threshold=None)
        assert [hit.title for hit in result.hits] == ["梅雨"]
        async with store.begin() as tx:
            found = await tx.session.scalar(text("SELECT embedding FROM knowledge_chunks"))
        assert isinstance(found, np.ndarray)
        await migrations.check(store.database)


@pytest.mark.parametrize("version", ["0.7.4", "0.10.0"])
async def test_versions_of_the_extension_are_numbers(empty_url: URL, version: str) -> None:
    await run_sql(empty_url, "CREATE EXTENSION vector", f"UPDATE pg_extension SET extversion = '{version}'")
    if version == "0.10.0":
        await upgrade(empty_url)
        return
    with pytest.raises(ExtensionMissingError, match="ALTER EXTENSION vector UPDATE"):
        await upgrade(empty_url)


async def test_an_old_version_that_the_server_offers_is_refused(
    empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_old(connection: Connection) -> None:
        connection.execute(text("CREATE EXTENSION vector"))
        connection.execute(text("UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'"))

    monkeypatch.setattr(migrations, "_create_vector", create_old)
    with pytest.raises(ExtensionMissingError, match=r"0\.7\.4"):
        await upgrade(empty_url)


async def test_tables_go_where_the_search_path_points(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE SCHEMA app", "CREATE TABLE public.sessions (sid text)")
    app = empty_url.update_query_dict({"options": "-csearch_path=app,public"})
    await upgrade(app)
    tables = await fetch(empty_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'app'")
    assert {row[0] for row in tables} >= {"alembic_version", "sessions", "knowledge_chunks"}
    assert [
        row[0] for row in await fetch(empty_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    ] == ["sessions"]


async def test_a_foreign_table_of_the_same_name_is_told(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE TABLE sessions (sid text PRIMARY KEY, expire timestamptz)")
    with pytest.raises(ConfigurationError, match="has the name of one of ours"):
        await upgrade(empty_url)
    assert await fetch_value(empty_url, "SELECT count(*) FROM pg_type WHERE typtype = 'e'") == 0


async def test_a_search_path_without_a_schema_is_told(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE EXTENSION vector")
    nowhere = empty_url.update_query_dict({"options": "-csearch_path=nowhere"})
    with pytest.raises(ConfigurationError, match="search_path"):
        await upgrade(nowhere)


async def test_options_of_the_index_that_pgvector_refuses_are_told(empty_url: URL) -> None:
    # Past the settings, which refuse the pair themselves.
    settings = settings_for(empty_url).model_copy(update={"kb_hnsw_m": 64, "kb_hnsw_ef_construction": 64})
    async with Database(empty_url, settings) as database:
        with pytest.raises(ConfigurationError, match="KB_HNSW_EF_CONSTRUCTION"):
            await migrations.upgrade(database)


async def test_an_unreachable_server_gives_one_sentence() -> None:
    url = URL.create("postgresql", "u", "s3cret", "127.0.0.1", 1, "x")
    async with opened(url, db_connect_attempts=1) as database:
        with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
            await migrations.upgrade(database)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_an_unknown_revision_is_told(migrated_url: URL) -> None:
    await run_sql(migrated_url, "UPDATE alembic_version SET version_num = '9999'")
    async with opened(migrated_url) as database:
        assert await migrations.current(database) == "9999"
        with pytest.raises(ConfigurationError, match=r"9999.*newer"):
            await migrations.upgrade(database)
        with pytest.raises(ConfigurationError, match="9999"):
            await migrations.downgrade(database, "base")
        with pytest.raises(SchemaOutdatedError):
            await migrations.check(database)


async def test_a_revision_that_does_not_exist_is_told(migrated_url: URL) -> None:
    async with opened(migrated_url) as database:
        with pytest.raises(ConfigurationError, match="8888"):
            await migrations.upgrade(database, "8888")


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
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert asyncio.run(describe(empty_url)) == asyncio.run(describe(template))
    if pg_dump is not None:
        assert dump(pg_dump, empty_url) == dump(pg_dump, template)
    assert asyncio.run(fetch_value(empty_url, "SELECT version_num FROM alembic_version")) == HEAD


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


async def test_a_large_table_is_filled_in_batches(empty_url: URL) -> None:
    await upgrade(empty_url, "0001")
    await run_sql(
        empty_url,
        "INSERT INTO knowledge_sources (type, title, metadata) VALUES ('web_page', 't', '{\"guild_id\": 5}')",
        "INSERT INTO knowledge_chunks (source_id, content) SELECT 1, 'c' || n FROM generate_series(1, 12000) AS n",
        "DELETE FROM knowledge_chunks WHERE id % 7 = 0",
    )
    started = time.monotonic()
    await upgrade(empty_url)
    assert time.monotonic() - started < 30
    wrong = (
        "SELECT count(*) FROM knowledge_chunks WHERE content_hash IS DISTINCT FROM"
        " sha256(convert_to(content, 'UTF8')) OR guild_id IS DISTINCT FROM 5"
    )
    assert await fetch_value(empty_url, wrong) == 0
    unlike = "SELECT count(*) FROM knowledge_chunks LEFT JOIN chunk_terms ON chunk_id = id"
    assert await fetch_value(empty_url, f"{unlike} WHERE terms IS NULL OR NOT terms @@ content::tsquery") == 0
    assert await fetch_value(empty_url, "SELECT count(DISTINCT xmin::text) FROM chunk_terms") == 11
    frequency = await fetch_value(empty_url, "SELECT frequency FROM term_frequencies WHERE term = ''")
    assert frequency == pytest.approx(12000 * 6 / 7, rel=0.1)
