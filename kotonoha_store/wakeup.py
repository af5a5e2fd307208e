"""Hearing of new work at once: LISTEN on a connection of its own, renewed whenever it is lost."""

import asyncio
import contextlib
import logging
import random
from types import TracebackType
from typing import Final, Never, Self

import asyncpg

from kotonoha_store.database import Database
from kotonoha_store.events import log_event

JOBS_CHANNEL: Final = "kotonoha_embedding_jobs"
"""Notified with every insertion of chunks to embed."""

ARCHIVE_CHANNEL: Final = "kotonoha_archive"
"""Notified when a session asks to be archived."""

_FIRST_RETRY: Final = 0.5
_LONGEST_RETRY: Final = 30.0
_CLOSE_TIMEOUT: Final = 2.0

logger = logging.getLogger(__name__)


def backoff_seconds(failures: int, *, first: float, longest: float) -> float:
    """Return how long to wait after so many failures in a row: doubled each time, less up to half by chance."""
    return min(longest, first * 2.0 ** min(max(failures, 1) - 1, 30)) * random.uniform(0.5, 1.0)  # noqa: S311  no secret


class Listener:
    """Waits for notifications on a channel. For one task at a time, inside ``async with``.

    While there is no connection, :meth:`wait` is a sleep: whoever polls at its time-outs misses nothing and is
    merely later. So it is behind a transaction pooler, where LISTEN works only past it, by DATABASE_DIRECT_URL.

    The connection does not come from the pool and is not counted in DB_POOL_MAX_SIZE.
    """

    def __init__(
        self, database: Database, channel: str, *, enabled: bool = True, keepalive_seconds: float = 15.0
    ) -> None:
        """
        Args:
            enabled: whether to connect at all.
            keepalive_seconds: how often the connection is tried, and how long the answer may take: a
                connection that died in silence is found in twice that.
        """
        self._database = database
        self._channel = channel
        self._enabled = enabled and database.can_listen
        self._keepalive = keepalive_seconds
        self._notified = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._entered = False
        self._failures = 0

    async def __aenter__(self) -> Self:
        """Start to connect, without waiting for it."""
        self._entered = True
        if self._enabled:
            self._keeper = asyncio.create_task(self._keep(), name=f"listener {self._channel}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            # Not `await keeper`, which would confuse its cancellation with our own.
            await asyncio.wait([keeper])

    async def wait(self, timeout_seconds: float) -> bool:
        """Wait until notified, for so many seconds at most; a notification since the last call counts.

        Returns:
            Whether there may be work: after notifications, and once after each connection made, since what was
            sent before it is unknown. False after the time-out. Whatever happens to the connection is no error here.
        """
        if not self._entered:
            raise RuntimeError("a Listener is used inside `async with`")
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._notified.wait()
        except TimeoutError:
            return False
        self._notified.clear()
        return True

    async def _keep(self) -> None:
        while True:
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001  polling goes on, whatever keeps us from listening
                self._failures += 1
                # Once an outage, not at every try.
                if self._failures == 1:
                    log_event(
                        logger, logging.WARNING, "listener_lost", channel=self._channel, error=type(error).__name__
                    )
            await asyncio.sleep(backoff_seconds(self._failures, first=_FIRST_RETRY, longest=_LONGEST_RETRY))

    async def _listen(self) -> Never:
        """Connect and listen; raise as soon as the connection is found lost."""
        connection = await self._database.connect_apart()
        lost = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: lost.set())
            async with asyncio.timeout(self._keepalive):
                await connection.add_listener(self._channel, lambda *_: self._notified.set())
            self._notified.set()
            if self._failures:
                log_event(logger, logging.INFO, "listener_renewed", channel=self._channel, tries=self._failures)
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._keepalive):
                        await lost.wait()
                # Raises on a closed connection.
                await connection.execute("SELECT 1", timeout=self._keepalive)
                # Not before: a server that ends each new connection is still the same outage.
                self._failures = 0
        finally:
            # Where it cannot be closed in time, asyncpg aborts it.
            with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await connection.close(timeout=_CLOSE_TIMEOUT)
