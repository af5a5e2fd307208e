"""Whether a store can do its work: one report, in a time that is never exceeded.

What makes a report unhealthy (``/health`` then answers 503, and a load balancer takes the process out of service) is
what keeps this process from serving anybody: the database cannot be reached, pgvector's operator does not work, tables
are missing, or a check that its owner registered as critical fails. Everything else is a warning in a healthy report:

- *a paused provider, dead letters, a queue that does not answer*: texts wait for their vectors, but messages are kept
  and memories are found; and since all processes share the queue, taking one of them out helps nobody;
- *a schema that is newer than this version*: so it is for every old process while a new version is rolled out, and
  taking all of them out at once would be the outage that rolling out avoids.

No check repeats what the driver or the server said: such text may hold hosts, users, passwords or stored data.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, TypeVar

import asyncpg
from sqlalchemy.pool import QueuePool

from kotonoha_store import migrations
from kotonoha_store.checks import check_number
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.embedding_queue import OUTAGE_FAILURES, EmbeddingQueue
from kotonoha_store.errors import (
    ConfigurationError,
    ErrorCode,
    InvalidInputError,
    SchemaOutdatedError,
    StoreError,
    StoreUnavailableError,
)
from kotonoha_store.migrations import SchemaState
from kotonoha_store.records import ProviderPause, QueueDepth

LIMIT_SECONDS: Final = 2.0
"""How long a report takes at most."""

# Their messages are the library's own sentences, without a name or a value in them.
_SAYABLE: Final = (StoreUnavailableError, ConfigurationError, SchemaOutdatedError)

_OUTAGE_CODES: Final = (ErrorCode.SERVER_ERROR, ErrorCode.EMBEDDING_API_TIMEOUT)

_OWN: Final = ("database", "queue")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a registered check saw.

    Attributes:
        state: ``failed`` makes the report unhealthy where the check is critical, else it is a warning too.
        message: what is wrong, in a sentence; it is served to whoever asks, so no text, name or address.
        details: figures to report, as JSON has them.
    """

    state: Literal["ok", "warning", "failed"] = "ok"
    message: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {"state": self.state, "message": self.message, "details": dict(self.details)}


Check: TypeAlias = Callable[[], Awaitable[CheckResult]]


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What :meth:`Store.health` saw.

    Attributes:
        pgvector: None where the database did not come to answer about it.
        error: why it is unhealthy.
        schema: where the tables stand beside this version of the library; None where that is not known.
        queue: None where the queue did not answer; so are ``pauses``.
        pauses: providers that are left alone now, or failed so often that they are asked before they are trusted.
        warnings: what somebody should look at, though this process does its work.
        checks: results of the registered checks.
        seconds: how long it took.
    """

    status: Literal["healthy", "unhealthy"]
    database: Literal["connected", "disconnected"]
    pgvector: Literal["working", "not_working"] | None
    pgvector_version: str | None
    error: str | None
    schema: SchemaState | None
    queue: QueueDepth | None
    pauses: tuple[ProviderPause, ...] | None
    warnings: tuple[str, ...]
    checks: Mapping[str, CheckResult]
    seconds: float

    @property
    def is_healthy(self) -> bool:
        return self.status == "healthy"

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON object; ``pgvector``, ``pgvector_version`` and ``error`` only where there is one."""
        named = {"pgvector": self.pgvector, "pgvector_version": self.pgvector_version, "error": self.error}
        return {
            "status": self.status,
            "database": self.database,
            **{name: value for name, value in named.items() if value is not None},
            "schema": None if self.schema is None else asdict(self.schema),
            "queue": None if self.queue is None else asdict(self.queue),
            "dead_letters": None if self.queue is None else self.queue.dead,
            "provider_pauses": None if self.pauses is None else [_pause_as_json(pause) for pause in self.pauses],
            "warnings": list(self.warnings),
            "checks": {name: result.to_dict() for name, result in self.checks.items()},
            "seconds": round(self.seconds, 4),
        }


def is_misconfigured(pause: ProviderPause) -> bool:
    """Whether the provider refused key, permission, model, dimension or quota, which no waiting mends."""
    return pause.failures >= OUTAGE_FAILURES and pause.error_code not in _OUTAGE_CODES


def describe_pause(pause: ProviderPause) -> str:
    """Say in a sentence why nothing is embedded."""
    if is_misconfigured(pause):
        return (
            f"the embedding provider {pause.provider!r} refuses key, permission, model or quota ({pause.error_code}): "
            "nothing is embedded until that is corrected"
        )
    return (
        f"the embedding provider {pause.provider!r} is left alone for {pause.remaining.total_seconds():.0f} s "
        f"after {pause.failures} failed calls in a row ({pause.error_code})"
    )


def is_paused(pause: ProviderPause) -> bool:
    """Whether no worker claims for this provider now, or only after asking it."""
    return pause.remaining.total_seconds() > 0 or pause.failures >= OUTAGE_FAILURES


class Health:
    """The checks of one store, and of whatever registers its own.

    Reports may be asked for by any number of tasks at once. Each takes two connections of the pool for a few
    milliseconds, as any request would: a pool that has none to give cannot serve either.
    """

    def __init__(self, database: Database, queue: EmbeddingQueue) -> None:
        self._database = database
        self._queue = queue
        self._registered: dict[str, tuple[Check, bool]] = {}
        self._ending: set[asyncio.Task[Any]] = set()

    def register(self, name: str, check: Check, *, critical: bool = False) -> None:
        """Let every report include a check.

        Args:
            check: called for each report, cancelled at its limit. It returns its result; what it raises is a failure.
            critical: whether its failure makes the report unhealthy.

        Raises:
            InvalidInputError: the name is taken.
        """
        if name in self._registered or name in _OWN:
            raise InvalidInputError(f"there is a health check named {name!r} already")
        self._registered[name] = (check, critical)

    async def report(self, limit_seconds: float = LIMIT_SECONDS) -> HealthReport:
        """Run every check at once; what has not answered in time is reported as such. Raises nothing of theirs.

        Raises:
            InvalidInputError: the limit is not a number of seconds, 0.05 to 600.
        """
        started = time.perf_counter()
        base = _Base(self._database, check_number(limit_seconds, "limit_seconds", 0.05, 600))
        state = _QueueState()
        outcomes = await self._within(
            base.limit,
            {
                "database": base.look(),
                "queue": state.look(self._queue),
                **{name: _called(check) for name, (check, _) in self._registered.items()},
            },
        )
        error = base.error(outcomes["database"])
        late = f"no answer within {base.limit:g} s"
        warnings = list(base.warnings())
        checks: dict[str, CheckResult] = {}
        for name, (_, critical) in self._registered.items():
            result = outcomes[name]
            if not isinstance(result, CheckResult):
                result = CheckResult("failed", late if result is None else _sentence(result))
            checks[name] = result
            if result.state != "ok":
                sentence = f"{name}: {result.message or result.state}"
                if critical and result.state == "failed":
                    error = error or sentence
                else:
                    warnings.append(sentence)
        if base.database == "connected" and base.schema is not None and base.schema.state in ("current", "newer"):
            queue_error = outcomes["queue"]
            if state.depth is None or state.pauses is None:
                warnings.append(f"queue: {late if queue_error is None else _sentence(queue_error)}")
            warnings += state.warnings()
        return HealthReport(
            status="healthy" if error is None else "unhealthy",
            database=base.database,
            pgvector=base.pgvector,
            pgvector_version=base.pgvector_version,
            error=error,
            schema=base.schema,
            queue=state.depth,
            pauses=state.pauses,
            warnings=tuple(warnings),
            checks=MappingProxyType(checks),
            seconds=time.perf_counter() - started,
        )

    async def why_not_ready(self, limit_seconds: float = LIMIT_SECONDS) -> str | None:
        """Return why this process cannot serve, or None: the database is reachable and the schema is in place.

        The first part of :meth:`report`, on one connection, without queue and registered checks.

        Raises:
            InvalidInputError: the limit is not a number of seconds, 0.05 to 600.
        """
        base = _Base(self._database, check_number(limit_seconds, "limit_seconds", 0.05, 600))
        return base.error((await self._within(base.limit, {"database": base.look()}))["database"])

    async def refresh_gauges(self, limit_seconds: float = LIMIT_SECONDS) -> bool:
        """Bring the gauges of the queue up to date, as the figures of whoever only serves are; returns whether it did.

        Raises:
            InvalidInputError: the limit is not a number of seconds, 0.05 to 600.
        """
        limit = check_number(limit_seconds, "limit_seconds", 0.05, 600)
        state = _QueueState()
        await self._within(limit, {"queue": state.look(self._queue)})
        return state.pauses is not None

    async def _within(
        self, limit: float, checks: Mapping[str, Coroutine[Any, Any, T]]
    ) -> dict[str, T | Exception | None]:
        """Run them at once; returns each one's result or exception, None for what did not end in time."""
        tasks = {name: asyncio.create_task(check, name=f"health {name}") for name, check in checks.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=limit)
        finally:
            for task in tasks.values():
                if not task.done():
                    # Not waited for: a connection to a server that is silent takes its time to close as well.
                    task.cancel()
                    self._ending.add(task)
                    task.add_done_callback(self._forget)
        return {name: _outcome(task) for name, task in tasks.items()}

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._ending.discard(task)
        if not task.cancelled():
            # Retrieved: else asyncio would log what it says.
            task.exception()


def _outcome(task: asyncio.Task[T]) -> T | Exception | None:
    if not task.done():
        return None
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if error is None:
        return task.result()
    if isinstance(error, Exception):
        return error
    return StoreUnavailableError("the check was cancelled")


def _sentence(error: object) -> str:
    # StoreError itself: the store was closed, or a statement refused. Other messages may quote what is stored.
    is_sayable = type(error) is StoreError or isinstance(error, _SAYABLE)
    return str(error) if is_sayable else f"failed with {type(error).__name__}"


async def _called(check: Check) -> CheckResult:
    result = await check()
    if not isinstance(result, CheckResult):
        raise TypeError("a health check returns a CheckResult")
    return result


class _Base:
    """What nothing works without. What was seen stays where the next step hangs."""

    def __init__(self, database: Database, limit: float) -> None:
        self._database = database
        self.limit = limit
        self.database: Literal["connected", "disconnected"] = "disconnected"
        self.pgvector: Literal["working", "not_working"] | None = None
        self.pgvector_version: str | None = None
        self.schema: SchemaState | None = None
        self._is_full = False

    async def look(self) -> None:
        pool = self._database.engine.pool
        self._is_full = isinstance(pool, QueuePool) and pool.checkedout() >= self._database.settings.db_pool_max_size
        async with self._database.driver() as driver:
            with translated_errors():
                await driver.fetchval("SELECT 1")
                self.database = "connected"
                version = await driver.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
                try:
                    distance = await driver.fetchval("SELECT '[1,2,3]'::halfvec <=> '[1,2,3]'::halfvec")
                except (asyncpg.exceptions.UndefinedObjectError, asyncpg.exceptions.UndefinedFunctionError):
                    distance = None
                self.pgvector = "not_working" if version is None or distance is None else "working"
                self.pgvector_version = version
                revision = None
                if (table := await driver.fetchval(migrations.VERSION_TABLE)) is not None:
                    revision = await driver.fetchval(f"SELECT version_num FROM {table}")  # noqa: S608  quoted
        # Not in a thread, though the first call reads files for some milliseconds: all of those may be busy for long.
        self.schema = migrations.compare(revision)

    def error(self, raised: object) -> str | None:
        if raised is not None:
            return _sentence(raised)
        if self.pgvector == "not_working":
            if self.pgvector_version is None:
                return "pgvector is not in this database; have its owner run: CREATE EXTENSION vector"
            return "pgvector is not working properly: its schema is not in the search_path of this role"
        if self.schema is None:
            return self._why_late()
        if self.schema.state in ("empty", "outdated"):
            try:
                self.schema.check()
            except SchemaOutdatedError as error:
                return str(error)
        return None

    def _why_late(self) -> str:
        if self.database == "connected":
            return (
                f"the database did not answer within {self.limit:g} s, though it took a connection; is a table locked?"
            )
        if self._is_full:
            return (
                f"no connection came free within {self.limit:g} s; raise DB_POOL_MAX_SIZE or hold connections shorter"
            )
        return f"the database did not answer within {self.limit:g} s; check that it runs and can be reached from here"

    def warnings(self) -> list[str]:
        if self.schema is not None and self.schema.state == "newer":
            return [
                f"schema: the database is at revision {self.schema.revision}, newer than this version "
                f"({self.schema.head}); bring this process up to date"
            ]
        return []


class _QueueState:
    def __init__(self) -> None:
        self.depth: QueueDepth | None = None
        self.pauses: tuple[ProviderPause, ...] | None = None

    async def look(self, queue: EmbeddingQueue) -> None:
        self.depth = await queue.depth()
        self.pauses = tuple(pause for pause in await queue.pauses() if is_paused(pause))

    def warnings(self) -> list[str]:
        said = [describe_pause(pause) for pause in self.pauses or ()]
        if self.depth is not None and self.depth.dead:
            said.append(f"{self.depth.dead} dead letters: texts that could not be embedded are not found by meaning")
        return said


def _pause_as_json(pause: ProviderPause) -> dict[str, Any]:
    return {
        "provider": pause.provider,
        "remaining_seconds": round(pause.remaining.total_seconds(), 3),
        "failures": pause.failures,
        "error_code": pause.error_code,
        "is_configuration": is_misconfigured(pause),
    }
