"""The streaming replica that answers searches and marked reads; where it cannot, the primary does.

While reads come, one of them each second asks both servers how they stand: the replica must still be one, of the same
database at the same revision, and not too far behind. After a failure it is left alone for some seconds, so that a dead
one does not cost each read its time-out. While the *primary* does not answer, the replica serves with what it has; one
that was too far behind what the primary last said is so still.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any, Final, Literal

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import QueuePool

from kotonoha_store import metrics
from kotonoha_store.database import Database, driver_connection
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.endpoints import postgres_url
from kotonoha_store.errors import (
    ConfigurationError,
    InvalidInputError,
    ModelMismatchError,
    NotFoundError,
    SchemaOutdatedError,
    StoreError,
    StoreUnavailableError,
)
from kotonoha_store.events import log_event
from kotonoha_store.settings import Settings

_log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 1.0
"""How old what is known of a replica in use may be."""

RETRY_SECONDS: Final = 10.0
"""How long a replica that failed is left alone."""

ANSWER_SECONDS: Final = 2.0
"""How long connecting to the replica may take, or a server to say how it is."""

COMMAND_SECONDS: Final = 10.0
"""How long a statement on the replica may take, before the primary answers: one that hangs says nothing."""

POOL_SECONDS: Final = 0.5
"""How long to wait for one of the replica's connections when all are in use."""

_POSITIONS: Final = 100
_LONGEST_PAUSE: Final = 0.05
_POSITION: Final = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")

Reason = Literal[
    # For some seconds, or until it is mended.
    "unavailable",
    "refused",
    "promoted",
    "lagging",
    "schema",
    "another_database",
    "unverified",
    # Of this read alone.
    "not_replayed",
    "busy",
    "conflict",
    "missing",
]

_OF_ONE_READ: Final[frozenset[Reason]] = frozenset({"not_replayed", "busy", "conflict", "missing"})

# A copy by streaming has the same of each; databases made from one template share only the table's.
_IDENTITY: Final = """
    (SELECT system_identifier FROM pg_control_system()),
    (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
    to_regclass('knowledge_chunks')::oid::bigint,
    (SELECT max(version_num) FROM alembic_version)
"""

# Flushed, since only that is sent to replicas.
_PRIMARY: Final = f"SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint, {_IDENTITY}"

_REPLICA: Final = f"""
    SELECT pg_is_in_recovery(), (pg_last_wal_replay_lsn() - '0/0')::bigint,
        extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float8, {_IDENTITY}
"""  # noqa: S608  constants

_REPLAYED: Final = "SELECT pg_is_in_recovery(), (pg_last_wal_replay_lsn() - '0/0')::bigint"

# Inserted, not flushed: with synchronous_commit off a commit returns before it is flushed. Where the last record fills
# its page, the position is behind the next page's header (24 bytes, 40 at the start of a file), which a replica that
# has replayed everything does not reach.
_WRITTEN: Final = """
    SELECT ('0/0'::pg_lsn + written - CASE
        WHEN written % pg_size_bytes(current_setting('wal_segment_size')) = 40 THEN 40
        WHEN written % current_setting('wal_block_size')::int = 24 THEN 24
        ELSE 0 END)::text
    FROM (SELECT pg_current_wal_insert_lsn() - '0/0' AS written) AS position
"""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """How the replica stands.

    Attributes:
        is_used: whether reads go there now.
        reason: why not: ``unavailable`` (it does not answer), ``refused`` (user, password or privilege), ``promoted``
            (no replica any more), ``lagging``, ``schema`` (another revision), ``another_database``, or
            ``unverified`` (the primary was never there to compare with).
        lag_seconds: how far it is behind at most; None where that is unknown.
        error: what was raised, where anything was.
    """

    is_used: bool
    reason: Reason | None
    lag_seconds: float | None
    error: str | None


async def write_position(primary: Database) -> str:
    """Return a position in the primary's log behind everything committed before this call.

    Raises:
        StoreUnavailableError: the primary did not answer.
    """
    async with primary.driver() as connection:
        with translated_errors():
            return str(await connection.fetchval(_WRITTEN))


def parse_position(value: str | None) -> int | None:
    """Read what :func:`write_position` returned.

    Raises:
        InvalidInputError: it is something else.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not _POSITION.fullmatch(value):
        raise InvalidInputError("after must be what `await store.write_position()` returned, such as '0/3000028'")
    high, low = value.split("/")
    return int(high, 16) << 32 | int(low, 16)


class _NotReplayedError(StoreUnavailableError):
    """What must be seen was not replayed in time."""


class _PromotedError(StoreUnavailableError):
    """It is a primary by now, and goes its own way."""


class Replica:
    """A replica of ``primary``: whether it can be asked now, and its connections."""

    def __init__(self, database: Database, primary: Database, *, wait_seconds: float, max_lag_seconds: float) -> None:
        """
        Args:
            database: the replica's, closed by :meth:`close`.
            wait_seconds: how long a read that must see a write waits for it.
            max_lag_seconds: further behind it is not asked.
        """
        self._database = database
        self._primary = primary
        self._wait_seconds = wait_seconds
        self._max_lag_seconds = max_lag_seconds
        self._status = ReplicaStatus(False, "unverified", None, None)
        self._is_outage_told = False
        self._check_at = 0.0
        self._checking: asyncio.Task[None] | None = None
        self._is_asked = False
        self._is_given_up = False
        self._identity: tuple[Any, ...] | None = None
        # What the primary had written when; and when it had written what is replayed by now.
        self._positions: deque[tuple[float, int]] = deque(maxlen=_POSITIONS)
        self._fresh_at = -inf

    @classmethod
    def from_settings(cls, settings: Settings, primary: Database) -> "Replica | None":
        """Make what DATABASE_REPLICA_URL names, without connecting yet; None when it is not set.

        Raises:
            ConfigurationError: DATABASE_REPLICA_URL cannot be used. Its value is not shown.
        """
        if settings.database_replica_url is None:
            return None
        url = postgres_url(settings.database_replica_url, "DATABASE_REPLICA_URL")
        # One short try: the primary is there to answer.
        quick = settings.model_copy(
            update={
                "db_connect_attempts": 1,
                "db_connect_timeout": min(settings.db_connect_timeout, ANSWER_SECONDS),
                "db_command_timeout": min(settings.db_command_timeout, COMMAND_SECONDS),
            }
        )
        try:
            database = Database(url, quick, pool_timeout=POOL_SECONDS)
        except ConfigurationError as error:
            raise ConfigurationError(_told(error)) from None
        return cls(
            database,
            primary,
            wait_seconds=settings.kb_replica_wait_seconds,
            max_lag_seconds=settings.kb_replica_max_lag_seconds,
        )

    async def close(self) -> None:
        """Close its connections."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.wait({self._checking})
        await self._database.close()

    async def is_ready(self) -> bool:
        """Whether it can be asked now, as far as is known; the primary answers where not."""
        if monotonic() >= self._check_at:
            await self._checked()
        reason = "unavailable" if self._is_given_up else self._status.reason
        if reason is not None:
            metrics.REPLICA_FALLBACKS.labels(reason=reason).inc()
        return reason is None

    async def status(self, within: float | None = None) -> ReplicaStatus:
        """Ask now how it stands. Takes some seconds at most, and raises nothing.

        Args:
            within: seconds after which what is known is returned.
        """
        await self._checked(within)
        return self._status

    @asynccontextmanager
    async def driver(self, after: int | None) -> AsyncIterator[Any]:
        """The driver's connection, see :meth:`Database.driver`, once the replica has replayed ``after``.

        Raises:
            StoreError: it cannot be used; see :meth:`failed`.
        """
        async with self._database.driver() as connection:
            await self._replayed(connection, after)
            yield connection

    @asynccontextmanager
    async def begin(self, after: int | None) -> AsyncIterator[AsyncSession]:
        """A transaction, read only as all are there, once the replica has replayed ``after``.

        Raises:
            StoreError: it cannot be used; see :meth:`failed`.
        """
        async with self._database.begin() as session:
            await self._replayed(await driver_connection(session), after)
            yield session

    def failed(self, error: StoreError) -> None:
        """Take note that the primary answers instead; leave the replica alone for a while where it is at fault."""
        reason = _reason(error)
        metrics.REPLICA_FALLBACKS.labels(reason=reason).inc()
        if reason not in _OF_ONE_READ:
            self._pass_over(reason, error=error)

    async def _replayed(self, connection: Any, after: int | None) -> None:
        """Wait, on the read's own connection: behind one address there may be several replicas."""
        if after is None:
            return
        deadline = monotonic() + self._wait_seconds
        pause = 0.001
        while True:
            with translated_errors():
                is_standby, replayed = await connection.fetchrow(_REPLAYED, timeout=ANSWER_SECONDS)
            if not is_standby:
                raise _PromotedError("the replica is a primary by now")
            if replayed is not None and replayed >= after:
                return
            if monotonic() + pause > deadline:
                raise _NotReplayedError("the replica has not replayed the write in time")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _checked(self, within: float | None = None) -> None:
        """Await a check that all share, and that goes on where nobody waits for it any more."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check(), name="replica check")
        try:
            await asyncio.wait({self._checking}, timeout=within)
        except asyncio.CancelledError:
            # The next one would not wait for the replica's answer either. Nothing is held against it once that comes.
            self._is_given_up = self._is_asked
            raise
        # Cancelled by close(): the read says that itself.
        if self._checking.done() and not self._checking.cancelled():
            self._checking.result()

    async def _check(self) -> None:
        # Before it ends: the others do not wait for it.
        self._check_at = monotonic() + RETRY_SECONDS
        try:
            written = await self._ask_primary()
            self._is_asked = True
            # Longer, so that a pool without a free connection says so itself.
            async with asyncio.timeout(2 * ANSWER_SECONDS), self._database.driver() as connection:
                asked_at = monotonic()
                with translated_errors():
                    is_standby, replayed, since_replay, *identity = await connection.fetchrow(_REPLICA)
        except (StoreError, TimeoutError) as error:
            reason = _reason(error)
            if reason == "busy" and self._status.is_used:
                # With other reads, which is no fault.
                self._check_at = monotonic() + CHECK_SECONDS
            else:
                self._pass_over(reason, error=error)
            return
        finally:
            self._is_asked = self._is_given_up = False
        lag = None if replayed is None else self._lag(written, replayed, since_replay, asked_at)
        fault = self._judged(is_standby, lag, tuple(identity))
        if fault is None and self._status.reason == "lagging" and written is None and self._is_primary_full():
            # It may have caught up with what was known, and that be long ago.
            fault, lag = "lagging", self._status.lag_seconds if lag is None else lag
        if fault is not None:
            self._pass_over(fault, lag=lag)
            return
        if self._is_outage_told:
            log_event(_log, logging.INFO, "replica_used_again")
            self._is_outage_told = False
        self._status = ReplicaStatus(True, None, _finite(lag), None)
        # A primary that does not answer is not to cost a read its time-out each second.
        self._check_at = monotonic() + (CHECK_SECONDS if written is not None else RETRY_SECONDS)

    def _is_primary_full(self) -> bool:
        pool = self._primary.engine.pool
        return isinstance(pool, QueuePool) and pool.checkedout() >= self._primary.settings.db_pool_max_size

    async def _ask_primary(self) -> int | None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._primary.driver() as connection:
                with translated_errors():
                    written, *identity = await connection.fetchrow(_PRIMARY)
        except (StoreError, TimeoutError):
            return None
        self._identity = tuple(identity)
        self._positions.append((monotonic(), written))
        return int(written)

    def _lag(self, written: int | None, replayed: int, since_replay: float | None, asked_at: float) -> float | None:
        """How far it is behind at most; by the primary's position, since a replica cannot know what it was not sent.

        Where the primary does not answer: how far behind what that last said. None where it has all of that.
        """
        while self._positions and self._positions[0][1] <= replayed:
            self._fresh_at = self._positions.popleft()[0]
        if not self._positions:
            return None if written is None else 0.0
        # The latter is long on a primary where nothing was written for a while; the former at the first look.
        behind = min(asked_at - self._fresh_at, inf if since_replay is None else since_replay)
        # By when it was asked: it answered later, and this process noticed later still.
        return max(0.0, behind - (asked_at - self._positions[-1][0]))

    def _judged(self, is_standby: bool, lag: float | None, identity: tuple[Any, ...]) -> Reason | None:
        if self._identity is None:
            return "unverified"
        if identity[:2] != self._identity[:2]:
            return "another_database"
        if not is_standby:
            return "promoted"
        if identity != self._identity:
            return "schema"
        return "lagging" if lag is not None and lag > self._max_lag_seconds else None

    def _pass_over(self, reason: Reason, *, error: BaseException | None = None, lag: float | None = None) -> None:
        self._check_at = monotonic() + RETRY_SECONDS
        self._status = ReplicaStatus(False, reason, _finite(lag), None if error is None else _told(error))
        if not self._is_outage_told:
            self._is_outage_told = True
            kind = None if error is None else type(error).__name__
            log_event(_log, logging.WARNING, "replica_passed_over", reason=reason, error_type=kind)


def _reason(error: BaseException) -> Reason:
    cause = error.__cause__
    if isinstance(cause, PoolTimeoutError):
        return "busy"
    if isinstance(cause, DBAPIError):
        cause = cause.orig
    # 40001: what the statement reads is being removed by what the replica replays.
    if str(getattr(cause, "sqlstate", None)).startswith("40"):
        return "conflict"
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return reason
    return "unavailable"


_REASONS: Final[dict[type[StoreError], Reason]] = {
    _NotReplayedError: "not_replayed",
    _PromotedError: "promoted",
    # The primary may have it already.
    ModelMismatchError: "missing",
    NotFoundError: "missing",
    SchemaOutdatedError: "schema",
    ConfigurationError: "refused",
}


def _told(error: BaseException) -> str:
    return (str(error) or type(error).__name__).replace("DATABASE_URL", "DATABASE_REPLICA_URL")


def _finite(lag: float | None) -> float | None:
    return None if lag is None or lag == inf else lag
