"""What the tests of the archive share."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from kotonoha_store import Database, Message, SessionArchiver, SessionRecord, SessionRepository

NOW = timedelta(0)
NOON = datetime(2024, 6, 1, 12, tzinfo=UTC)


def archiver(database: Database, **options: Any) -> SessionArchiver:
    return SessionArchiver(database, **{"min_session_length": 0, "overlap_messages": 0, **options})


def talk(count: int, start: int = 0) -> list[Message]:
    """Question and answer in turn, a minute apart, with ids from 100 on."""
    return [
        Message(
            role=("user", "assistant")[number % 2],
            content=f"message {number}",
            timestamp=NOON + timedelta(minutes=number),
            message_id=100 + number,
        )
        for number in range(start, start + count)
    ]


async def append(database: Database, key: str, messages: Message | Sequence[Message], **scope: Any) -> int:
    async with database.begin() as session:
        return (await SessionRepository(session).append(key, messages, **scope)).session_id


async def load(database: Database, key: str) -> SessionRecord:
    async with database.begin() as session:
        return await SessionRepository(session).load(key)


async def query(database: Database, sql: str, **values: Any) -> Sequence[Any]:
    async with database.begin() as session:
        result = await session.execute(text(sql), values)
        return result.all() if result.returns_rows else []


async def sources(database: Database) -> Sequence[Any]:
    return await query(database, "SELECT * FROM knowledge_sources ORDER BY id")


async def chunks(database: Database) -> Sequence[Any]:
    return await query(database, "SELECT * FROM knowledge_chunks ORDER BY id")


async def snapshot(database: Database) -> list[str]:
    """All that an archive writes, to compare."""
    tables = ("sessions", "knowledge_sources", "knowledge_chunks", "embedding_jobs")
    return [str(await query(database, f"SELECT * FROM {table} ORDER BY 1")) for table in tables]


def said(record: SessionRecord) -> list[str]:
    return [message.content for message in record.messages]


def before_writing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], *, times: int = 1) -> list[int]:
    """Have ``act`` awaited after the archiver has read a session and before it locks it."""
    calls: list[int] = []
    original = asyncio.to_thread

    async def to_thread(function: Any, *arguments: Any, **options: Any) -> Any:
        result = await original(function, *arguments, **options)
        calls.append(1)
        if len(calls) <= times:
            await act()
        return result

    monkeypatch.setattr("kotonoha_store.archiver.asyncio.to_thread", to_thread)
    return calls
