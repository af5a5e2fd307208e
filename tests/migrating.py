"""What tests of migrations share: awkward rows, going up and down, the command."""

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import run_sql, settings_for
from sqlalchemy import URL, event

from kotonoha_store import (
    Database,
    Settings,
    migrations,
)
from kotonoha_store.database import connect_arguments

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
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


@contextmanager
def new_role(server: URL, options: str = "") -> Iterator[str]:
    name = f"kt_role_{uuid.uuid4().hex[:8]}"
    asyncio.run(run_sql(server, f'CREATE ROLE "{name}" LOGIN {options}'))
    try:
        yield name
    finally:
        asyncio.run(run_sql(server, f'DROP ROLE "{name}"'))


class CrashError(Exception):
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
                raise CrashError(statement)

        return made

    monkeypatch.setattr(database, "patient", patient)
    with pytest.raises(CrashError):
        yield
