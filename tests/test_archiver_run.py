"""The archiver as a long-running task: woken, stopped, cut off, and what it tells of its work."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from archiving import append, archiver, chunks, load, query, snapshot, sources, talk

from kotonoha_store import (
    Database,
    Message,
    SessionArchiver,
    SessionRepository,
    SessionStatus,
    StoreUnavailableError,
    archive_writes,
    metrics,
    service_loop,
)
from kotonoha_store import archiver as archiving_module
from kotonoha_store.wakeup import Listener

pytestmark = pytest.mark.role("app")

QUIET = "UPDATE sessions SET last_active_at = now() - interval '2 hours', archive_due_at = now() - interval '2 hours'"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of a second of waiting before the first pass, and short ones between retries."""
    monkeypatch.setattr(service_loop.random, "uniform", lambda low, high: low)
    monkeypatch.setattr(service_loop, "_FIRST_RETRY", 0.01)


@asynccontextmanager
async def running(service: SessionArchiver) -> AsyncIterator[tuple[asyncio.Event, "asyncio.Task[None]"]]:
    stop = asyncio.Event()
    task = asyncio.create_task(service.run(stop))
    try:
        async with asyncio.timeout(60):
            yield stop, task
            stop.set()
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def append_too_many(database: Database, key: str, messages: Sequence[Message] | None = None) -> int:
    async with database.begin() as session:
        repository = SessionRepository(session, archive_max_messages=10)
        return (await repository.append(key, talk(11) if messages is None else messages)).session_id


class Watched:
    """Counts the sessions whose source is written, holds them there, or lets them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.changed = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        original = archive_writes.write_session

        async def write_session(driver: Any, prepared: archive_writes.Prepared, *arguments: Any) -> Any:
            key = prepared.snapshot.session_key
            self.keys.append(key)
            self.changed.set()
            await self.go_on.wait()
            if key in self.failing:
                raise self.failing[key]
            return await original(driver, prepared, *arguments)

        monkeypatch.setattr(archive_writes, "write_session", write_session)

    async def seen(self, count: int) -> None:
        while len(self.keys) < count:
            self.changed.clear()
            await self.changed.wait()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


async def test_it_archives_what_is_quiet_and_is_woken_by_what_grows_too_long(
    database: Database, watched: Watched
) -> None:
    await append(database, "quiet", talk(2))
    await query(database, QUIET)
    await append(database, "busy", talk(2))
    async with running(archiver(database, max_messages=10)):
        await watched.seen(1)
        await append_too_many(database, "long")
        await watched.seen(2)
    assert watched.keys == ["quiet", "long"]
    assert (await load(database, "quiet")).status is SessionStatus.ARCHIVED
    assert (await load(database, "long")).status is SessionStatus.ACTIVE
    assert (await load(database, "busy")).message_count == 2


async def test_without_listening_the_interval_finds_them(database: Database, watched: Watched) -> None:
    async with running(archiver(database, max_messages=10, listen=False, interval=timedelta(seconds=0.05))):
        await append_too_many(database, "long")
        await watched.seen(1)
        await append(database, "quiet", talk(2))
        await query(database, f"{QUIET} WHERE session_key = 'quiet'")
        await watched.seen(2)


async def test_notifications_do_not_put_off_the_quiet_ones(
    database: Database, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each wait ended with one, and never with the interval."""

    async def wait(_: Listener, timeout_seconds: float) -> bool:
        await asyncio.sleep(min(timeout_seconds, 0.01))
        return True

    monkeypatch.setattr(Listener, "wait", wait)
    await append(database, "first", talk(1))
    await query(database, QUIET)
    async with running(archiver(database, max_messages=10, interval=timedelta(seconds=0.2))):
        await watched.seen(1)
        await append(database, "quiet", talk(2))
        await query(database, f"{QUIET} WHERE session_key = 'quiet'")
        await watched.seen(2)


async def test_one_that_fails_is_not_tried_again_at_every_notification(database: Database, watched: Watched) -> None:
    watched.failing["bad"] = ValueError("unreadable")
    await append_too_many(database, "bad")
    async with running(archiver(database, max_messages=10)):
        await watched.seen(1)
        for number in range(5):
            await append_too_many(database, f"good {number}")
            await watched.seen(2 + number)
    assert watched.keys == ["bad", *(f"good {number}" for number in range(5))]


async def test_one_that_failed_is_tried_again_with_the_next_interval(database: Database, watched: Watched) -> None:
    watched.failing["bad"] = ValueError("unreadable")
    await append_too_many(database, "bad")
    async with running(archiver(database, max_messages=10, interval=timedelta(seconds=0.05))):
        await watched.seen(2)
        watched.failing.clear()
        await watched.seen(len(watched.keys) + 1)
    assert (await load(database, "bad")).message_count < 10


async def test_a_database_that_does_not_answer_is_tried_again(database: Database, watched: Watched) -> None:
    watched.failing["long"] = StoreUnavailableError("gone")
    await append_too_many(database, "long")
    async with running(archiver(database, max_messages=10)):
        await watched.seen(3)
        watched.failing.clear()
        await watched.seen(len(watched.keys) + 1)
    assert (await load(database, "long")).message_count < 10


# The end


async def test_a_stop_finishes_what_is_in_hand_and_begins_nothing(database: Database, watched: Watched) -> None:
    for number in range(6):
        await append(database, f"k{number}", talk(2))
    await query(database, QUIET)
    watched.go_on.clear()
    async with running(archiver(database, concurrency=2, batch_size=2)) as (stop, task):
        await watched.seen(2)
        stop.set()
        watched.go_on.set()
        await task
    assert sorted(watched.keys) == ["k0", "k1"]
    assert len(await sources(database)) == 2
    assert len(await query(database, "SELECT 1 FROM sessions WHERE status = 'active'")) == 4


@pytest.mark.parametrize("by", ["limit", "cancellation"])
async def test_what_is_cut_off_is_undone(database: Database, watched: Watched, by: str) -> None:
    await append(database, "k", talk(2))
    await query(database, QUIET)
    before = await snapshot(database)
    watched.go_on.clear()
    async with running(archiver(database, drain=timedelta(seconds=0.05))) as (stop, task):
        await watched.seen(1)
        if by == "limit":
            stop.set()
        else:
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (by == "cancellation")
        assert await snapshot(database) == before


async def test_a_stop_before_the_start(database: Database, watched: Watched) -> None:
    await append(database, "k", talk(2))
    await query(database, QUIET)
    stop = asyncio.Event()
    stop.set()
    async with asyncio.timeout(60):
        await archiver(database).run(stop)
    assert watched.keys == []


# What it tells


async def test_an_event_for_each_session_without_what_was_said(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    good = await append(database, "secret key", [Message.user("what nobody may read")])
    bad = await append(database, "bad", talk(2))
    await query(database, "UPDATE sessions SET messages = '{\"content\": \"private\"}' WHERE session_key = 'bad'")
    with caplog.at_level(logging.INFO):
        await archiver(database).run_once(timedelta(0))
    (source,) = await sources(database)
    events = {record.__dict__["event"]: record.__dict__ for record in caplog.records if "event" in record.__dict__}
    done = events["session_archived"]
    assert {name: done[name] for name in ("session_id", "source_id", "messages", "chunks", "in_use")} == {
        "session_id": good,
        "source_id": source.id,
        "messages": 1,
        "chunks": 1,
        "in_use": False,
    }
    assert 0 < done["seconds"] < 60
    assert (events["archive_failed"]["session_id"], events["archive_failed"]["levelname"]) == (bad, "ERROR")
    logged = json.dumps([record.__dict__ for record in caplog.records], default=str)
    for private in ("nobody may read", "private", "secret key"):
        assert private not in logged
    assert len(await chunks(database)) == 1


async def test_metrics(database: Database) -> None:
    registry = pytest.importorskip("prometheus_client").REGISTRY
    assert metrics.IS_MEASURING

    def read() -> list[float]:
        names = ("sessions_archived_total", "session_archive_seconds_count", "session_archive_seconds_sum")
        values = [registry.get_sample_value(name) or 0.0 for name in names]
        errors = ("TypeError", "InvalidInputError", "AttributeError", "KeyError")
        failed = [registry.get_sample_value("sessions_archived_errors_total", {"error_type": name}) for name in errors]
        return [*values, sum(filter(None, failed))]

    before = read()
    await append(database, "one", talk(2))
    await append(database, "two", talk(2))
    await append(database, "bad", talk(2))
    await query(database, "UPDATE sessions SET messages = '{}' WHERE session_key = 'bad'")
    report = await archiver(database).run_once(timedelta(0))
    assert (report.archived, len(report.failed)) == (2, 1)
    archived, timed, seconds, failed = (now - then for now, then in zip(read(), before, strict=True))
    assert (archived, timed, failed) == (2, 2, 1)
    assert 0 < seconds < 60


async def test_without_listen_sessions_that_grow_too_long_are_looked_for_more_often(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiving_module, "REQUEST_INTERVAL", timedelta(seconds=0.2))
    archiving = SessionArchiver(database, max_messages=4, overlap_messages=0, interval=timedelta(hours=1), listen=False)

    async def count() -> int:
        async with database.begin() as session:
            return (await SessionRepository(session).load("key")).message_count

    async with running(archiving):
        await asyncio.sleep(0.5)  # its first pass is over
        async with database.begin() as session:
            messages = [Message.user(f"message {number}") for number in range(6)]
            await SessionRepository(session, archive_max_messages=4).append("key", messages)
        while await count() == 6:  # noqa: ASYNC110  the database tells nobody
            await asyncio.sleep(0.05)
