"""LISTEN on a connection of its own: woken at once, latched, renewed whatever happens to it, never in the way."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from conftest import run_sql, settings_for
from sqlalchemy import URL, text

from kotonoha_store import Database, Store, StoreError, StoreUnavailableError, wakeup
from kotonoha_store.database import connect_arguments
from kotonoha_store.wakeup import ARCHIVE_CHANNEL, JOBS_CHANNEL, Listener, backoff_seconds

# Longer than anything takes: a wait() that is not woken fails by its False.
LONG = 60.0


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeup, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(wakeup, "_LONGEST_RETRY", 0.1)


class Proxy:
    """A TCP port before the server that can refuse, and stop forwarding without a word."""

    def __init__(self, url: URL) -> None:
        self._upstream = url
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._live: set[asyncio.Event] = set()
        self.refuses = False
        self.swallows_new = False
        self.connections = 0
        self.connected = asyncio.Condition()

    @property
    def url(self) -> URL:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        url = self._upstream
        # A client on this machine need not be asked for TLS.
        return URL.create("postgresql", url.username, url.password, "127.0.0.1", port, url.database)

    def freeze(self) -> None:
        """Whatever is connected now gets no byte through any more."""
        for flowing in self._live:
            flowing.clear()

    async def had(self, connections: int) -> None:
        async with self.connected:
            await asyncio.wait_for(self.connected.wait_for(lambda: self.connections >= connections), LONG)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            await self._relay(reader, writer)
        except asyncio.CancelledError:
            # The server's own callback would report it as a failure.
            pass
        finally:
            self._relays.discard(task)
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.connected:
            self.connections += 1
            self.connected.notify_all()
        if self.refuses:
            return
        flowing = asyncio.Event()
        if not self.swallows_new:
            flowing.set()
        self._live.add(flowing)
        host = self._upstream.query.get("host")
        if isinstance(host, str):
            up_reader, up_writer = await asyncio.open_unix_connection(
                f"{host}/.s.PGSQL.{self._upstream.query.get('port', '5432')}"
            )
        else:
            up_reader, up_writer = await asyncio.open_connection(self._upstream.host, self._upstream.port or 5432)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(65536):
                    await flowing.wait()
                    sink.write(data)
                    await sink.drain()
            # An end of the connection is news too.
            await flowing.wait()
            sink.close()

        try:
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
        finally:
            self._live.discard(flowing)
            up_writer.close()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for relay in self._relays:
            relay.cancel()
        if self._relays:
            await asyncio.wait(self._relays)


@asynccontextmanager
async def proxied(url: URL, **options: Any) -> AsyncIterator[tuple[Proxy, Listener]]:
    # Connecting that is never answered ends later than whatever waits for it.
    async with Proxy(url) as proxy, Database(proxy.url, settings_for(proxy.url, db_connect_timeout=600.0)) as database:
        yield proxy, Listener(database, ARCHIVE_CHANNEL, **options)


async def connections(url: URL) -> int:
    """How many of this library's connections the test's own database has."""
    connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
    try:
        return await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    finally:
        await connection.close()


async def none_connected(url: URL) -> None:
    """A backend ends a moment after its client."""
    for _ in range(1200):
        if not (found := await connections(url)):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"{found} connections were left behind")


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records if record.name == wakeup.__name__]


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kotonoha_store")


async def test_chunks_that_are_added_wake_at_once(store: Store) -> None:
    async with Listener(store.database, JOBS_CHANNEL) as listener:
        assert await listener.wait(LONG)  # connected
        assert not await listener.wait(0.05)
        waiting = asyncio.create_task(listener.wait(LONG))
        await store.add_document("t", "a text that waits for its vector")
        assert await waiting


async def test_a_notification_counts_though_nobody_waited_for_it_and_counts_once(database: Database) -> None:
    async with Listener(database, ARCHIVE_CHANNEL) as listener:
        assert await listener.wait(LONG)
        async with database.connect() as connection:
            await connection.execute(text(f"NOTIFY {ARCHIVE_CHANNEL}"))
        async with asyncio.timeout(LONG):
            await listener._notified.wait()
        assert await listener.wait(0)
        assert not await listener.wait(0)


async def test_a_channel_hears_nothing_of_another(database: Database) -> None:
    async with Listener(database, ARCHIVE_CHANNEL) as archive, Listener(database, JOBS_CHANNEL) as jobs:
        assert await archive.wait(LONG)
        assert await jobs.wait(LONG)
        async with database.connect() as connection:
            await connection.execute(text(f"NOTIFY {JOBS_CHANNEL}"))
        assert await jobs.wait(LONG)
        assert not await archive.wait(0)


async def test_the_pool_is_left_alone(migrated_url: URL) -> None:
    settings = settings_for(migrated_url, db_pool_max_size=1)
    async with Database(migrated_url, settings, pool_timeout=0.1) as database, database.begin():
        async with Listener(database, JOBS_CHANNEL) as listener:
            assert await listener.wait(LONG)
        assert database.engine.pool.checkedout() == 1  # type: ignore[attr-defined]


async def test_a_terminated_backend_is_found_and_replaced_and_told_once(
    database: Database, migrated_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    async with Listener(database, ARCHIVE_CHANNEL, keepalive_seconds=LONG) as listener:
        assert await listener.wait(LONG)
        for _ in range(2):
            # No notification arrives: what wakes is the new connection, since one may have been missed.
            await run_sql(
                migrated_url,
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
            )
            assert await listener.wait(LONG)
        await run_sql(migrated_url, f"NOTIFY {ARCHIVE_CHANNEL}")
        assert await listener.wait(LONG)
    # Both belong to one outage: no round trip had proved the second connection.
    assert events(caplog) == ["listener_lost", "listener_renewed", "listener_renewed"]
    await none_connected(migrated_url)


async def test_a_connection_that_dies_in_silence_is_found_by_its_missing_answer(
    migrated_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = asyncpg.Connection.execute
    # What a busy server may need for an answer; the one that is missing is not waited for as long.
    patience = 10.0
    answers = 0

    async def counted(self: asyncpg.Connection, query: str, *arguments: Any, **options: Any) -> str:
        nonlocal answers
        is_round_trip = query == "SELECT 1"
        status = await execute(self, query, *arguments, **({"timeout": patience} if is_round_trip else options))
        answers += is_round_trip
        return status

    monkeypatch.setattr(asyncpg.Connection, "execute", counted)
    async with proxied(migrated_url, keepalive_seconds=0.1) as (proxy, listener), listener:
        assert await listener.wait(LONG)
        before = answers
        async with asyncio.timeout(LONG):
            while answers < before + 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # The kept connection answers: it is not renewed.
        assert not await listener.wait(0)
        patience = 0.1
        proxy.freeze()
        assert await listener.wait(LONG)
        await run_sql(migrated_url, f"NOTIFY {ARCHIVE_CHANNEL}")
        assert await listener.wait(LONG)


async def test_while_the_server_refuses_waiting_ends_on_time_and_the_outage_is_told_once(
    migrated_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxied(migrated_url) as (proxy, listener):
        proxy.refuses = True
        async with listener:
            started = time.monotonic()
            assert not await listener.wait(0.2)
            assert 0.19 < time.monotonic() - started < LONG
            await proxy.had(5)
            assert events(caplog) == ["listener_lost"]
            proxy.refuses = False
            assert await listener.wait(LONG)
            assert events(caplog) == ["listener_lost", "listener_renewed"]
    assert caplog.records[0].error == "StoreUnavailableError"  # type: ignore[attr-defined]


async def test_a_server_that_accepts_and_never_answers_holds_up_neither_waiting_nor_leaving(migrated_url: URL) -> None:
    async with proxied(migrated_url) as (proxy, listener):
        proxy.swallows_new = True
        async with listener:
            await proxy.had(1)
            started = time.monotonic()
            assert not await listener.wait(0.1)
        assert time.monotonic() - started < LONG


async def test_leaving_is_bounded_when_the_connection_is_dead(
    migrated_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeup, "_CLOSE_TIMEOUT", 0.1)
    async with proxied(migrated_url, keepalive_seconds=0.05) as (proxy, listener):
        async with listener:
            assert await listener.wait(LONG)
            proxy.swallows_new = True
            proxy.freeze()
            # Into the round trip that is never answered.
            await asyncio.sleep(0.08)
            started = time.monotonic()
        assert time.monotonic() - started < LONG


async def test_disabled_it_opens_no_connection_and_only_sleeps(database: Database, migrated_url: URL) -> None:
    async with Listener(database, JOBS_CHANNEL, enabled=False) as listener:
        started = time.monotonic()
        assert not await listener.wait(0.2)
        assert time.monotonic() - started > 0.19
        assert await connections(migrated_url) == 0


async def test_a_cancelled_wait_leaves_no_connection_behind(database: Database, migrated_url: URL) -> None:
    connected = asyncio.Event()

    async def listen() -> None:
        async with Listener(database, JOBS_CHANNEL) as listener:
            assert await listener.wait(LONG)
            connected.set()
            await listener.wait(LONG)

    task = asyncio.create_task(listen())
    await asyncio.wait_for(connected.wait(), LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await none_connected(migrated_url)


async def test_cancelled_at_any_moment_of_connecting_it_leaves_no_connection_behind(
    database: Database, migrated_url: URL
) -> None:
    for milliseconds in range(12):
        async with Listener(database, JOBS_CHANNEL):
            await asyncio.sleep(milliseconds / 1000)
    await none_connected(migrated_url)


async def test_a_closed_database_is_an_outage_like_any_other(
    migrated_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(migrated_url, settings_for(migrated_url)) as database:
        pass
    async with Listener(database, JOBS_CHANNEL) as listener:
        assert not await listener.wait(0.1)
    assert events(caplog) == ["listener_lost"]


async def test_waiting_outside_of_its_block_is_refused(database: Database) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Listener(database, JOBS_CHANNEL).wait(0)


async def test_a_connection_apart_is_tried_once_and_in_our_own_words(migrated_url: URL) -> None:
    async with proxied(migrated_url) as (proxy, listener):
        proxy.refuses = True
        with pytest.raises(StoreUnavailableError):
            await listener._database.connect_apart()
        # The driver itself tries again without TLS.
        assert proxy.connections <= 2
        await listener._database.close()
        with pytest.raises(StoreError, match="closed"):
            await listener._database.connect_apart()


def test_backoff_doubles_up_to_its_limit_and_is_never_the_same_for_all() -> None:
    for failures, most in ((0, 1), (1, 1), (2, 2), (5, 16), (7, 60), (10**9, 60)):
        waits = [backoff_seconds(failures, first=1, longest=60) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most
