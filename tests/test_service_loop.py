"""The loop under worker and archiver: when it calls, how it stops, what it does about failures."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from conftest import run_sql, settings_for
from sqlalchemy import URL

from kotonoha_store import Database, StoreUnavailableError, service_loop
from kotonoha_store.service_loop import run_service, stop_on_signals
from kotonoha_store.wakeup import ARCHIVE_CHANNEL, Listener

NOWHERE = URL.create("postgresql", "u", "p", "127.0.0.1", 1, "x")
HOUR = timedelta(hours=1)
MOMENT = timedelta(milliseconds=10)
# Longer than anything takes: what should end by itself fails by this.
LONG = 60.0


@pytest.fixture
async def poller() -> AsyncIterator[Listener]:
    """A listener that hears nothing."""
    async with (
        Database(NOWHERE, settings_for(NOWHERE)) as database,
        Listener(database, ARCHIVE_CHANNEL, enabled=False) as listener,
    ):
        yield listener


@pytest.fixture(autouse=True)
def _time_for_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than LONG, too: what is cut short by it is so in the test of just that."""
    monkeypatch.setattr(service_loop, "_CLEAN_UP", 600.0)


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kotonoha_store")


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records if record.name == service_loop.__name__]


class Work:
    """Stops the loop at its n-th call."""

    def __init__(self, until: int, sooner: timedelta | None = None) -> None:
        self.stop, self.second = asyncio.Event(), asyncio.Event()
        self.calls: list[bool] = []
        self._until = until
        self._sooner = sooner

    async def __call__(self, woken: bool) -> timedelta | None:
        self.calls.append(woken)
        if len(self.calls) == 2:
            self.second.set()
        if len(self.calls) >= self._until:
            self.stop.set()
        return self._sooner


async def run(work: Callable[[bool], Awaitable[timedelta | None]], listener: Listener, **options: Any) -> None:
    given = {"name": "test", "interval": HOUR, "drain": HOUR, "start_jitter": timedelta(0), "stop": asyncio.Event()}
    async with asyncio.timeout(LONG):
        await run_service(work, listener=listener, **{**given, **options})


async def test_it_works_at_once_and_again_after_each_interval(poller: Listener) -> None:
    work = Work(until=3)
    await run(work, poller, interval=MOMENT, stop=work.stop)
    assert work.calls == [False, False, False]


async def test_a_notification_brings_it_before_the_interval(database: Database, migrated_url: URL) -> None:
    work = Work(until=3)
    async with Listener(database, ARCHIVE_CHANNEL) as listener:
        running = asyncio.create_task(run(work, listener, stop=work.stop))
        # The first wakes by itself, the second for what may have come before the connection stood.
        await asyncio.wait_for(work.second.wait(), LONG)
        await run_sql(migrated_url, f"NOTIFY {ARCHIVE_CHANNEL}")
        await running
    assert work.calls == [False, True, True]


@pytest.mark.parametrize(("interval", "sooner"), [(HOUR, MOMENT), (MOMENT, HOUR), (HOUR, -HOUR)])
async def test_work_may_ask_for_an_earlier_call_not_for_a_later_one(
    poller: Listener, interval: timedelta, sooner: timedelta
) -> None:
    work = Work(until=3, sooner=sooner)
    await run(work, poller, interval=interval, stop=work.stop)
    assert len(work.calls) == 3


async def test_intervals_differ_by_up_to_a_tenth() -> None:
    waits: list[float] = []

    class Recorder(Listener):
        async def wait(self, timeout_seconds: float) -> bool:
            waits.append(timeout_seconds)
            return False

    async with Database(NOWHERE, settings_for(NOWHERE)) as database:
        work = Work(until=300)
        await run(work, Recorder(database, ARCHIVE_CHANNEL), interval=timedelta(seconds=100), stop=work.stop)
    assert 90 <= min(waits) < 95 < 105 < max(waits) <= 110


async def test_stopped_before_its_start_it_never_works(poller: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_loop.random, "uniform", lambda _, most: most)
    work = Work(until=1)
    running = asyncio.create_task(run(work, poller, start_jitter=HOUR, stop=work.stop))
    await asyncio.sleep(0.05)
    assert not running.done()
    work.stop.set()
    await running
    assert work.calls == []


async def test_stopped_while_it_waits_it_ends_at_once(poller: Listener) -> None:
    stop, called = asyncio.Event(), asyncio.Event()

    async def work(_: bool) -> None:
        called.set()

    running = asyncio.create_task(run(work, poller, stop=stop))
    await called.wait()
    await asyncio.sleep(0.05)
    stop.set()
    await running
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Batch:
    """Work that goes on until it is let go, and says how it ended."""

    def __init__(self) -> None:
        self.started, self.go, self.clean_up = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.ended: list[str] = []

    async def __call__(self, _: bool) -> None:
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await self.clean_up.wait()
            self.ended.append("given back")
            raise
        self.ended.append("finished")


async def test_running_work_may_finish_after_stop(poller: Listener, caplog: pytest.LogCaptureFixture) -> None:
    batch, stop = Batch(), asyncio.Event()
    running = asyncio.create_task(run(batch, poller, stop=stop))
    await batch.started.wait()
    stop.set()
    await asyncio.sleep(0.05)
    batch.go.set()
    await running
    assert batch.ended == ["finished"]
    assert events(caplog) == ["service_started", "service_drained", "service_ended"]


async def test_what_does_not_finish_in_time_is_cancelled_and_cleans_up(
    poller: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    batch, stop = Batch(), asyncio.Event()
    running = asyncio.create_task(run(batch, poller, stop=stop, drain=timedelta(0)))
    await batch.started.wait()
    stop.set()
    await asyncio.sleep(0.05)
    assert not running.done()
    batch.clean_up.set()
    await running
    assert batch.ended == ["given back"]
    assert events(caplog) == ["service_started", "service_cut_off", "service_ended"]


async def test_work_that_ignores_its_cancellation_does_not_hold_up_the_end(
    poller: Listener, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_loop, "_CLEAN_UP", 0.05)
    batch, stop = Batch(), asyncio.Event()
    running = asyncio.create_task(run(batch, poller, stop=stop, drain=MOMENT))
    await batch.started.wait()
    stop.set()
    await running
    assert "service_does_not_end" in events(caplog)
    batch.clean_up.set()


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_it_waits_for_the_clean_up_however_often(poller: Listener, times: int) -> None:
    batch = Batch()
    running = asyncio.create_task(run(batch, poller))
    await batch.started.wait()
    for _ in range(times):
        running.cancel()
        await asyncio.sleep(0.01)
    assert not running.done()
    batch.clean_up.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert batch.ended == ["given back"]


async def test_cancelled_while_it_cuts_off_it_is_still_cancelled(poller: Listener) -> None:
    batch, stop = Batch(), asyncio.Event()
    running = asyncio.create_task(run(batch, poller, stop=stop, drain=timedelta(0)))
    await batch.started.wait()
    stop.set()
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.sleep(0.01)
    batch.clean_up.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert batch.ended == ["given back"]


async def test_a_clean_up_that_fails_is_told_and_does_not_hide_the_cancellation(
    poller: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    started = asyncio.Event()

    async def work(_: bool) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise StoreUnavailableError("gone")

    running = asyncio.create_task(run(work, poller))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "service_clean_up_failed" in events(caplog)


async def test_while_the_database_does_not_answer_it_tries_again_and_says_so(
    poller: Listener, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_loop, "_FIRST_RETRY", 0.01)
    work = Work(until=1)
    tries = 0

    async def unreachable_at_first(woken: bool) -> timedelta | None:
        nonlocal tries
        tries += 1
        if tries < 4:
            async with Database(NOWHERE, settings_for(NOWHERE, db_connect_attempts=1)) as database:
                await database.ping()
        return await work(woken)

    await run(unreachable_at_first, poller, stop=work.stop)
    told = [record for record in caplog.records if getattr(record, "event", "") == "service_retries"]
    assert [record.failures for record in told] == [1, 2, 3]  # type: ignore[attr-defined]
    pauses = [record.retry_seconds for record in told]  # type: ignore[attr-defined]
    assert all(low <= pause <= 2 * low for low, pause in zip((0.005, 0.01, 0.02), pauses, strict=True))
    assert told[0].error == "StoreUnavailableError"  # type: ignore[attr-defined]


async def test_it_waits_no_longer_for_the_database_than_its_interval(poller: Listener) -> None:
    stop = asyncio.Event()
    calls = 0

    async def work(_: bool) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            stop.set()
        raise StoreUnavailableError("gone")

    await run(work, poller, interval=MOMENT, stop=stop)
    assert calls == 20


async def test_stopped_while_the_database_does_not_answer_it_ends_at_once(
    poller: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than LONG, by which it would be found out.
    monkeypatch.setattr(service_loop, "_FIRST_RETRY", 3600.0)
    monkeypatch.setattr(service_loop, "_LONGEST_RETRY", 3600.0)
    stop = asyncio.Event()

    async def work(_: bool) -> None:
        asyncio.get_running_loop().call_later(0.05, stop.set)
        raise StoreUnavailableError("gone")

    await run(work, poller, stop=stop)


async def test_any_other_failure_ends_it(poller: Listener) -> None:
    async def work(_: bool) -> None:
        raise LookupError("a fault of the program")

    with pytest.raises(LookupError):
        await run(work, poller)
    assert asyncio.all_tasks() == {asyncio.current_task()}


# -- signals ------------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, datetime, signal, sys
from sqlalchemy import URL
from kotonoha_store import Database, Settings
from kotonoha_store.service_loop import run_service, stop_on_signals
from kotonoha_store.wakeup import Listener

IS_BUSY = sys.argv[1] == "busy"
# Ignored where the tests themselves were started in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def work(woken):
    print("working", flush=True)
    try:
        await asyncio.sleep(3600 if IS_BUSY else 0)
    except asyncio.CancelledError:
        print("given back", flush=True)
        raise

async def main():
    url = URL.create("postgresql", "u", "p", "127.0.0.1", 1, "x")
    async with Database(url, Settings(_env_file=None)) as database, Listener(database, "c", enabled=False) as listener:
        with stop_on_signals() as stop:
            async def tell():
                await stop.wait()
                print("stopping", flush=True)
            telling = asyncio.create_task(tell())
            await run_service(
                work, name="test", listener=listener, interval=datetime.timedelta(hours=1), stop=stop,
                drain=datetime.timedelta(seconds=float(sys.argv[2])), start_jitter=datetime.timedelta(0),
            )
            await telling
    print("ended", flush=True)

asyncio.run(main())
"""


@contextmanager
def program(*arguments: str, stderr: int | None = None) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # nothing is waited for that a failed test leaves running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("state", "expected"), [("idle", ["stopping", "ended"]), ("busy", ["stopping", "given back", "ended"])]
)
def test_a_signal_drains_and_ends_in_order(number: signal.Signals, state: str, expected: list[str]) -> None:
    with program(state, "0.1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=LONG)
    assert output.split("\n")[:-1] == expected
    assert process.returncode == 0


def test_a_second_signal_kills_what_does_not_end() -> None:
    with program("busy", "3600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=LONG)
    assert (output, process.returncode) == ("", -signal.SIGTERM)


def test_a_second_interrupt_cancels_as_asyncio_does() -> None:
    with program("busy", "3600", stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=LONG)
    assert output == "given back\n"
    assert "KeyboardInterrupt" in errors


async def test_the_handlers_of_before_come_back() -> None:
    def mine(*_: object) -> None:
        """Not the default one, so that a signal too many ends no test run."""

    before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert [signal.getsignal(number) for number in before] == [mine, mine]
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stop.wait(), LONG)
            # With the first signal already, for both.
            assert [signal.getsignal(number) for number in before] == [mine, mine]
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Not put back a second time: this handler was set meanwhile.
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
