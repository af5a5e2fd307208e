"""Running a piece of work again and again until told to stop: what worker and archiver have in common."""

import asyncio
import logging
import random
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, Final, TypeVar

from kotonoha_store.errors import StoreUnavailableError
from kotonoha_store.events import log_event
from kotonoha_store.wakeup import Listener, backoff_seconds

_FIRST_RETRY: Final = 1.0
_LONGEST_RETRY: Final = 60.0
# For giving leases back, which is one statement each.
_CLEAN_UP: Final = 5.0
_JITTER: Final = 0.1

T = TypeVar("T")

logger = logging.getLogger(__name__)


async def run_service(
    work: Callable[[bool], Awaitable[timedelta | None]],
    *,
    name: str,
    listener: Listener,
    interval: timedelta,
    stop: asyncio.Event,
    drain: timedelta,
    start_jitter: timedelta = timedelta(seconds=1),
) -> None:
    """Call ``work`` whenever the listener is notified or the interval has passed, until ``stop`` is set.

    Args:
        work: told whether a notification brought it; returns after how long to call it again, should that be before
            the interval (±10 %) ends. It claims nothing new once ``stop`` is set, and gives back what it
            holds when cancelled. While the database does not answer, it is tried again after 1 s, then longer, up to
            the interval or a minute.
        name: of the service, for log records.
        listener: entered by the caller.
        drain: how long running work may go on after ``stop``; then it is cancelled, with 5 s for its clean-up.
        start_jitter: wait a random part of this first, so that what starts together does not claim together.

    Cancelled, it cancels the work and waits for its clean-up, for ``drain`` or 5 s, whichever is longer.

    Raises:
        whatever ``work`` raises but StoreUnavailableError.
    """
    longest_retry = min(interval.total_seconds(), _LONGEST_RETRY)
    failures = 0
    log_event(logger, logging.INFO, "service_started", loop=name)
    try:
        await _unless(stop, asyncio.sleep(random.uniform(0, start_jitter.total_seconds())))  # noqa: S311  no secret
        woken = False
        while not stop.is_set():
            try:
                sooner = await _see_through(work(woken), name, stop, drain.total_seconds())
            except StoreUnavailableError as error:
                failures += 1
                pause = backoff_seconds(failures, first=min(_FIRST_RETRY, longest_retry), longest=longest_retry)
                log_event(
                    logger,
                    logging.WARNING,
                    "service_retries",
                    loop=name,
                    error=type(error).__name__,
                    reason=str(error),
                    failures=failures,
                    retry_seconds=pause,
                )
                await _unless(stop, asyncio.sleep(pause))
                continue
            failures = 0
            seconds = interval.total_seconds() * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311  no secret
            if sooner is not None:
                seconds = min(seconds, max(sooner.total_seconds(), 0.0))
            woken = bool(await _unless(stop, listener.wait(seconds)))
    finally:
        log_event(logger, logging.INFO, "service_ended", loop=name)


async def _see_through(
    work: Awaitable[timedelta | None], name: str, stop: asyncio.Event, drain: float
) -> timedelta | None:
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            started = time.monotonic()
            await asyncio.wait([task], timeout=drain)
            log_event(
                logger,
                logging.INFO if task.done() else logging.WARNING,
                "service_drained" if task.done() else "service_cut_off",
                loop=name,
                seconds=time.monotonic() - started,
            )
    except asyncio.CancelledError:
        await _cancel(task, name, max(drain, _CLEAN_UP))
        if task.done() and not task.cancelled() and (failure := task.exception()) is not None:
            log_event(logger, logging.ERROR, "service_clean_up_failed", loop=name, error=type(failure).__name__)
        raise
    finally:
        stopped.cancel()
        await asyncio.wait([stopped])
    if not task.done():
        await _cancel(task, name, _CLEAN_UP)
        if not task.done() or task.cancelled():
            return None
    return task.result()


async def _cancel(task: asyncio.Future[Any], name: str, limit: float) -> None:
    """Cancel a task and wait for its clean-up, which a cancellation of the waiting itself does not cut short."""
    task.cancel()
    cancelled = False
    deadline = time.monotonic() + limit
    while not task.done() and (left := deadline - time.monotonic()) > 0:
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError:
            cancelled = True
    if not task.done():
        log_event(logger, logging.ERROR, "service_does_not_end", loop=name, seconds=limit)
    if cancelled:
        raise asyncio.CancelledError


async def _unless(stop: asyncio.Event, waiting: Coroutine[Any, Any, T]) -> T | None:
    """Return what was waited for, or None when ``stop`` came first."""
    tasks = asyncio.ensure_future(waiting), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@contextmanager
def stop_on_signals() -> Iterator[asyncio.Event]:
    """An event for :func:`run_service` that SIGTERM and SIGINT set. Only in the main thread, under a running loop.

    The first signal puts back the handlers that were there before, so a second one takes its usual effect; so does
    the end of the block.

    Raises:
        ValueError: called outside the main thread.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def request(number: int) -> None:
        log_event(logger, logging.INFO, "stop_requested", signal=signal.Signals(number).name)
        stop.set()

    def handle(number: int, _: FrameType | None) -> None:
        restore()
        # Not here: a handler runs amid any statement, one that writes to the log included.
        loop.call_soon_threadsafe(request, number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            # None stands for a handler that Python did not install and cannot put back.
            previous[number] = signal.signal(number, handle) or signal.SIG_DFL
        yield stop
    finally:
        restore()
