"""Revision 0004, up and down with rows in it."""

import asyncio

import asyncpg
import pytest
from conftest import run_sql, settings_for
from migrating import crash_at, downgrade, fetch, fetch_value, opened, seeded, upgrade
from sqlalchemy import URL
from test_schema import describe

from kotonoha_store import migrations
from kotonoha_store.database import connect_arguments

TABLES = ("sessions", "knowledge_sources", "knowledge_chunks", "knowledge_chunks_dlq", "embedding_jobs", "chunk_terms")


async def contents(url: URL, *without: str) -> dict[str, list[str]]:
    """Every row, but for these columns."""
    names = "ARRAY[" + ", ".join(f"'{name}'" for name in without) + "]::text[]"
    rows = {}
    for table in TABLES:
        found = await fetch(url, f"SELECT (to_jsonb(t) - {names})::text FROM {table} t ORDER BY 1")
        rows[table] = [row[0] for row in found]
    return rows


async def test_up_down_up_loses_no_row(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url, "0003")
    before, schema = await contents(empty_url), await describe(empty_url)

    await upgrade(empty_url, "0004")
    new = ("archive_requested_at", "history")
    assert await contents(empty_url, *new) == before
    assert await fetch_value(empty_url, "SELECT count(*) FROM sessions WHERE archive_requested_at IS NOT NULL") == 0
    assert {row[0] for row in await fetch(empty_url, "SELECT history FROM knowledge_chunks_dlq")} == {"[]"}
    await run_sql(
        empty_url,
        "UPDATE sessions SET archive_requested_at = now()",
        "UPDATE embedding_jobs SET history = '[{}]'",
        "UPDATE knowledge_chunks_dlq SET history = '[{}]'",
        "INSERT INTO embedding_pauses (provider, error_code) VALUES ('a model', 'RATE_LIMIT')",
    )
    there = await describe(empty_url)

    for _ in range(2):
        await downgrade(empty_url, "0003")
        assert await contents(empty_url) == before
        assert await describe(empty_url) == schema
        await upgrade(empty_url, "0004")
        assert await contents(empty_url, *new) == before
        assert await describe(empty_url) == there


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE IF NOT EXISTS embedding_pauses",
        "idx_sessions_archive_requested",
        "IF NOT EXISTS idx_chunks_content",
    ],
)
async def test_a_half_applied_revision_completes(
    empty_url: URL, template: URL, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    await seeded(empty_url)
    await upgrade(empty_url, "0003")
    async with opened(empty_url) as database:
        with crash_at(database, statement, monkeypatch):
            await migrations.upgrade(database)
        assert await migrations.current(database) == "0003"
    await upgrade(empty_url)
    assert await describe(empty_url) == await describe(template)


@pytest.mark.parametrize("index", ["idx_chunks_content_hash", "idx_sessions_archive_requested"])
async def test_an_invalid_index_is_built_anew(migrated_url: URL, index: str) -> None:
    before = await describe(migrated_url)
    await run_sql(
        migrated_url,
        f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{index}'::regclass",
        "UPDATE alembic_version SET version_num = '0003'",
    )
    await upgrade(migrated_url)
    assert not await fetch(migrated_url, "SELECT FROM pg_index WHERE NOT indisvalid")
    assert await describe(migrated_url) == before


async def test_one_notification_for_each_transaction_that_adds_jobs(empty_url: URL) -> None:
    await seeded(empty_url)
    await upgrade(empty_url)
    await run_sql(empty_url, "DELETE FROM embedding_jobs")
    heard: asyncio.Queue[str] = asyncio.Queue()
    connection = await asyncpg.connect(**connect_arguments(empty_url, settings_for(empty_url)))
    try:
        await connection.add_listener("kotonoha_embedding_jobs", lambda *_: heard.put_nowait("jobs"))
        await run_sql(
            empty_url,
            "BEGIN; INSERT INTO embedding_jobs (chunk_id) VALUES (-5), (1); INSERT INTO embedding_jobs (chunk_id)"
            " VALUES (2); COMMIT",
            "UPDATE embedding_jobs SET attempts = 1",
            "INSERT INTO embedding_jobs (chunk_id) VALUES (3)",
            "DELETE FROM embedding_jobs",
            "NOTIFY kotonoha_embedding_jobs, 'end'",
        )
        async with asyncio.timeout(30):
            assert [await heard.get() for _ in range(3)] == ["jobs"] * 3
        assert heard.empty()
    finally:
        await connection.close()


async def test_messages_are_compressed_by_lz4_where_the_server_has_it(migrated_url: URL) -> None:
    has_lz4 = await fetch_value(
        migrated_url, "SELECT 'lz4' = ANY (enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"
    )
    used = await fetch_value(
        migrated_url,
        "SELECT attcompression FROM pg_attribute WHERE attrelid = 'sessions'::regclass AND attname = 'messages'",
    )
    assert used == (b"l" if has_lz4 else b"\x00")
