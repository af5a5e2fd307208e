"""From short-term to long-term memory: :class:`SessionArchiver`."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal

from kotonoha_store import archive_writes, metrics
from kotonoha_store.archive_pieces import Rules, Snapshot, make_pieces
from kotonoha_store.archive_restore import RestoredSession, restore_source
from kotonoha_store.checks import check_id
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated, translated_errors
from kotonoha_store.errors import InvalidInputError, NotFoundError, StoreTimeoutError, StoreUnavailableError
from kotonoha_store.events import log_event
from kotonoha_store.records import SCOPE_FIELDS, Scope, SessionStatus
from kotonoha_store.service_loop import run_service
from kotonoha_store.sessions import DueSession, RequestedSession, SessionRepository
from kotonoha_store.term_index import refresh_terms
from kotonoha_store.wakeup import ARCHIVE_CHANNEL, Listener

# Until then a search reads the words of so many sessions one by one, unless the index merges them before: when they are
# as many as it may keep (its gin_pending_list_limit). Many at once are merged in less time.
_MERGE_AFTER: Final = 1000

_LONGEST_IDLE: Final = timedelta(days=36_500)

REQUEST_INTERVAL: Final = timedelta(minutes=1)
"""How often sessions that have grown too long are looked for without having been notified."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArchivedSession:
    """What became of one session.

    Attributes:
        source_id: the new source, or None if there was nothing worth a source.
        messages: how many messages were archived.
        chunks: how many chunks wait for their vector now.
    """

    session_id: int
    source_id: int | None
    messages: int
    chunks: int


@dataclass(frozen=True, slots=True)
class ArchiveReport:
    """What one pass did.

    Attributes:
        archived: sessions that became a source.
        skipped: sessions marked archived without a source: too short, nobody asked anything, or
            nothing new.
        failed: (session id, error) of those left as they were.
    """

    archived: int = 0
    skipped: int = 0
    messages: int = 0
    chunks: int = 0
    failed: tuple[tuple[int, Exception], ...] = field(default=())


class SessionArchiver:
    """Turns sessions into sources and chunks, one transaction each.

    A quiet session is archived wholly. One in use that has grown too long is archived up to a settled point
    and stays active, so that it stays short; then also what is not worth searching becomes a source, without chunks
    if it is blank.

    Several archivers may run at once, beside writers: each session is taken by one of them, a message is archived
    exactly once. What is appended during the archive stays in the session and is archived with the next messages,
    also where it was said earlier. A session saved meanwhile is read again, one deleted meanwhile passed over.
    """

    def __init__(
        self,
        database: Database,
        *,
        idle_for: timedelta = timedelta(hours=1),
        batch_size: int = 10,
        overlap_messages: int = 5,
        max_messages: int = 50,
        min_session_length: int = 30,
        concurrency: int = 5,
        strategy: Literal["message_based", "token_based"] = "message_based",
        chunk_size_messages: int = 5,
        chunk_overlap_messages: int = 2,
        chunk_max_tokens: int = 4000,
        chunk_overlap_ratio: float = 0.2,
        insert_batch_size: int = 100,
        interval: timedelta = timedelta(hours=1),
        listen: bool = True,
        drain: timedelta = timedelta(seconds=30),
    ) -> None:
        """
        Args:
            idle_for: how long a session must have been quiet.
            overlap_messages: how many archived messages stay in the session as context.
            max_messages: how long a session in use may grow; more than ``overlap_messages``.
            min_session_length: characters below which a session is not worth a source.
            concurrency: sessions archived at once; each holds a connection.
            interval: how often :meth:`run` looks for quiet sessions.
            listen: whether :meth:`run` is woken by sessions that grow too long; not through a transaction pooler.
            drain: how long :meth:`run` finishes what it has in hand when it is stopped.

        Raises:
            InvalidInputError: a size or number is out of its range.
        """
        least = {
            "batch_size": (batch_size, 1),
            "overlap_messages": (overlap_messages, 0),
            "max_messages": (max_messages, overlap_messages + 1),
            "concurrency": (concurrency, 1),
            "insert_batch_size": (insert_batch_size, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise InvalidInputError(f"{name} must be at least {minimum}, got {value}")
        if interval <= timedelta(0) or not timedelta(0) <= idle_for <= _LONGEST_IDLE or drain < timedelta(0):
            raise InvalidInputError(
                f"interval must be positive, idle_for and drain not negative, and idle_for at most {_LONGEST_IDLE.days}"
                f" days; got {interval}, {idle_for} and {drain}"
            )
        self._database = database
        self._idle_for = idle_for
        self._batch_size = batch_size
        self._insert_batch_size = insert_batch_size
        self._concurrency = concurrency
        self._interval = interval
        self._listen = listen
        self._drain = drain
        self._rules = Rules(
            overlap=overlap_messages,
            max_messages=max_messages,
            min_length=min_session_length,
            chunk_overlap=chunk_overlap_messages,
            chunk_options={
                "strategy": strategy,
                "size": chunk_size_messages,
                "overlap": chunk_overlap_messages,
                "max_tokens": chunk_max_tokens,
                "overlap_ratio": chunk_overlap_ratio,
            },
        )

    async def run_once(self, idle_for: timedelta | None = None) -> ArchiveReport:
        """Archive every session that is due now, in batches: the quiet ones, then those in use that are too long.

        What another archiver has in hand is passed over. A session that fails is left as it was, named in the
        report, and does not stop the others.

        Args:
            idle_for: instead of the one given at construction; zero archives all active sessions.

        Raises:
            StoreUnavailableError: the database did not answer; what was archived stays so.
            InvalidInputError: ``idle_for`` is negative.
        """
        idle_for = self._idle_for if idle_for is None else idle_for
        if not isinstance(idle_for, timedelta) or idle_for < timedelta(0):
            raise InvalidInputError(f"idle_for must be a timedelta and not negative, got {idle_for!r}")
        return await self._pass(idle_for)

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Archive until ``stop`` is set: on the interval all that is due, and at once what has grown too long.

        Then no new session is begun, and what is in hand is finished, or undone when the limit for that is over.
        While the database does not answer it is tried again, each time after a longer wait. A session that
        failed is tried again with the next interval. Without LISTEN what has grown too long is looked for every minute.

        Args:
            stop: where none is given, cancel the task; what is in hand is undone then.
        """
        stop = stop or asyncio.Event()
        failed: set[int] = set()
        due = time.monotonic()

        async def work(_woken: bool) -> timedelta:
            nonlocal due
            is_whole = time.monotonic() >= due
            if is_whole:
                failed.clear()
            report = await self._pass(self._idle_for if is_whole else None, stop=stop, skip=failed)
            failed.update(session_id for session_id, _ in report.failed)
            if is_whole:
                due = time.monotonic() + self._interval.total_seconds()
            # A notification can be missed: behind a pooler, or while the connection for it is made anew.
            return min(timedelta(seconds=due - time.monotonic()), REQUEST_INTERVAL)

        async with Listener(self._database, ARCHIVE_CHANNEL, enabled=self._listen) as listener:
            await run_service(
                work, name="archiver", listener=listener, interval=self._interval, stop=stop, drain=self._drain
            )

    async def archive(self, session_id: int) -> ArchivedSession | None:
        """Archive one session now, quiet or not; None if it is archived already or another archiver has it in hand.

        Raises:
            NotFoundError: the session is gone.
            StoreUnavailableError: the database did not answer.
        """
        check_id(session_id, "session_id")
        archived = await self._archive(session_id, is_in_use=False)
        if archived is not None and archived.chunks:
            await self._refresh_terms()
        return archived

    async def _refresh_terms(self) -> None:
        """Merge the new words into their index; apart from the archive, since one at a time does that."""
        async with self._database.transaction() as connection:
            with translated_errors():
                await refresh_terms(connection)

    @translated
    async def restore(self, source_id: int, *, session_key: str | None = None) -> RestoredSession:
        """Put the messages of an archived session back into it and delete the source; see :func:`restore_source`.

        The newest source of a session first, then the one before. A session that was deleted is made again.

        Args:
            session_key: for a session that was deleted: its new key, where the old one is taken.

        Raises:
            NotFoundError: there is no such source (any more).
            InvalidInputError: the source is no archived session or has no messages, others must be restored
                before it, or the session's key is taken.
            StoreUnavailableError: the database did not answer.
        """
        async with self._database.begin() as session:
            return await restore_source(session, source_id, session_key=session_key, overlap=self._rules.overlap)

    async def _pass(
        self, idle_for: timedelta | None, *, stop: asyncio.Event | None = None, skip: Collection[int] = ()
    ) -> ArchiveReport:
        """Archive what is due; with None as ``idle_for`` only what has grown too long."""
        batch = _Batch(stop or asyncio.Event(), set(skip))
        if idle_for is not None:
            await self._each(self._quiet(idle_for), batch, is_in_use=False)
        await self._each(self._too_long(), batch, is_in_use=True)
        return batch.report()

    async def _quiet(self, idle_for: timedelta) -> AsyncGenerator[int, None]:
        after: DueSession | None = None
        while True:
            async with self._database.begin() as session:
                repository = SessionRepository(session)
                due = await repository.due_for_archiving(idle_for, limit=self._batch_size, after=after)
            for entry in due:
                yield entry.id
            if len(due) < self._batch_size:
                return
            after = due[-1]

    async def _too_long(self) -> AsyncGenerator[int, None]:
        after: RequestedSession | None = None
        while True:
            async with self._database.begin() as session:
                repository = SessionRepository(session)
                requested = await repository.requested_for_archiving(limit=self._batch_size, after=after)
            for entry in requested:
                yield entry.id
            if len(requested) < self._batch_size:
                return
            after = requested[-1]

    async def _each(self, session_ids: AsyncGenerator[int, None], batch: "_Batch", *, is_in_use: bool) -> None:
        """Archive these, so many at once. One at a time asks for the next, whose page is read when it is needed."""
        turn = asyncio.Lock()

        async def work() -> None:
            while not batch.stop.is_set():
                async with turn:
                    session_id = await anext(session_ids, None)
                if session_id is None:
                    return
                # Once in a pass: what has failed would fail again, and what keeps growing would keep it from ending.
                if session_id not in batch.seen:
                    batch.seen.add(session_id)
                    await self._guarded(session_id, batch, is_in_use=is_in_use)
                    if len(batch.done) >= batch.merged + _MERGE_AFTER:
                        await self._merge(batch)

        async with aclosing(session_ids):
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._concurrency):
                        group.create_task(work())
            except ExceptionGroup as errors:
                # The first is why the others were cancelled.
                raise errors.exceptions[0] from errors.exceptions[0].__cause__
            await self._merge(batch)

    async def _merge(self, batch: "_Batch") -> None:
        new, batch.merged = batch.done[batch.merged :], len(batch.done)
        if any(entry.chunks for entry in new):
            await self._refresh_terms()

    async def _guarded(self, session_id: int, batch: "_Batch", *, is_in_use: bool) -> None:
        try:
            archived = await self._archive(session_id, is_in_use=is_in_use)
        except NotFoundError:
            return  # deleted meanwhile
        except Exception as error:
            if isinstance(error, StoreUnavailableError) and not isinstance(error, StoreTimeoutError):
                raise
            # One session that is unreadable, or too large, must not keep the others from being archived.
            batch.failed.append((session_id, error))
            return
        if archived is not None:
            batch.done.append(archived)

    async def _archive(self, session_id: int, *, is_in_use: bool) -> ArchivedSession | None:
        started = time.perf_counter()
        try:
            archived = await self._archive_once(session_id, is_in_use=is_in_use)
        except Exception as error:
            if not isinstance(error, NotFoundError):
                metrics.ARCHIVE_ERRORS.labels(error_type=type(error).__name__).inc()
                # The error itself, which may quote what was said, goes to the caller and not to the log.
                log_event(logger, logging.ERROR, "archive_failed", session_id=session_id, error=type(error).__name__)
            raise
        if archived is not None:
            seconds = time.perf_counter() - started
            metrics.ARCHIVE_SECONDS.observe(seconds)
            metrics.SESSIONS_ARCHIVED.inc()
            log_event(
                logger,
                logging.INFO,
                "session_archived",
                session_id=session_id,
                source_id=archived.source_id,
                messages=archived.messages,
                chunks=archived.chunks,
                in_use=is_in_use,
                seconds=seconds,
            )
        return archived

    @translated
    async def _archive_once(self, session_id: int, *, is_in_use: bool) -> ArchivedSession | None:
        async with self._database.driver() as driver, driver.transaction(isolation="read_committed"):
            while True:
                row = await archive_writes.take(driver, session_id)
                if row is None:
                    return None
                if row["id"] is None:
                    raise NotFoundError(f"session {session_id} is gone; nothing was archived")
                if row["status"] == SessionStatus.ARCHIVED or (is_in_use and not row["is_too_long"]):
                    return None
                # Off the event loop, and before the lock: reading and splitting long sessions is work.
                prepared = await asyncio.to_thread(_prepare, row, self._rules, is_in_use=is_in_use)
                written = await archive_writes.write_session(driver, prepared, self._rules)
                if written is not None:
                    return await self._finish(driver, prepared, written["source_id"])
                # Rewritten meanwhile: once more, now under the lock, so that this ends.
                await archive_writes.lock(driver, session_id)

    async def _finish(self, driver: Any, prepared: archive_writes.Prepared, source_id: int | None) -> ArchivedSession:
        snapshot, pieces = prepared.snapshot, prepared.pieces
        if source_id is None:
            return ArchivedSession(snapshot.id, None, 0, 0)
        for start in range(0, len(prepared.chunks), self._insert_batch_size):
            batch = prepared.chunks[start : start + self._insert_batch_size]
            await archive_writes.write_chunks(driver, source_id, snapshot.scope, batch)
        return ArchivedSession(snapshot.id, source_id, pieces.upto - snapshot.archived, len(prepared.chunks))


@dataclass(slots=True)
class _Batch:
    """One pass: what stops it, the sessions it has taken, of how many the words are merged, and what became of them."""

    stop: asyncio.Event
    seen: set[int]
    merged: int = 0
    done: list[ArchivedSession] = field(default_factory=list)
    failed: list[tuple[int, Exception]] = field(default_factory=list)

    def report(self) -> ArchiveReport:
        return ArchiveReport(
            archived=sum(entry.source_id is not None for entry in self.done),
            skipped=sum(entry.source_id is None for entry in self.done),
            messages=sum(entry.messages for entry in self.done),
            chunks=sum(entry.chunks for entry in self.done),
            failed=tuple(self.failed),
        )


def _prepare(row: Any, rules: Rules, *, is_in_use: bool) -> archive_writes.Prepared:
    snapshot = Snapshot(
        id=row["id"],
        session_key=row["session_key"],
        session_type=row["session_type"],
        scope=Scope(*(row[name] for name in SCOPE_FIELDS)),
        stored=json.loads(row["messages"]),
        offset=row["messages_offset"],
        archived=row["last_archived_message_index"],
        rewrite_version=row["rewrite_version"],
        is_too_long=row["is_too_long"],
    )
    return archive_writes.make_rows(snapshot, make_pieces(snapshot, rules, is_in_use=is_in_use))
