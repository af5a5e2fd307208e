"""From short-term to long-term memory: :class:`SessionArchiver`."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, func, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store.checks import check_id
from kotonoha_store.chunking import ChatPiece, chunk_messages
from kotonoha_store.columns import AnyRow, AnySelect
from kotonoha_store.database import Database, translated
from kotonoha_store.errors import (
    InvalidInputError,
    NotFoundError,
    StaleSessionError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kotonoha_store.knowledge import KnowledgeRepository
from kotonoha_store.models import Session
from kotonoha_store.records import Message, NewChunk, Scope, SessionStatus, SourceType
from kotonoha_store.sessions import DueSession, SessionRepository

TITLE_LENGTH: Final = 50
DEFAULT_TITLE: Final = "Discord Session"
_CONFLICT_ATTEMPTS: Final = 5

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


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A session as it was read: what is archived, whatever is appended meanwhile."""

    id: int
    session_key: str
    session_type: str
    scope: Scope
    stored: Sequence[Any]
    offset: int
    archived: int
    rewrite_version: int


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a snapshot becomes."""

    chunks: Sequence[NewChunk]
    title: str
    metadata: dict[str, Any]


class SessionArchiver:
    """Turns quiet sessions into sources and chunks, one transaction each.

    Several archivers may run at once, beside writers: a message is archived exactly once. Appends
    during the archive stay in the session; any other change makes it start over on a fresh read.
    """

    def __init__(
        self,
        database: Database,
        *,
        idle_for: timedelta = timedelta(hours=1),
        batch_size: int = 10,
        overlap_messages: int = 5,
        min_session_length: int = 30,
        concurrency: int = 5,
        strategy: Literal["message_based", "token_based"] = "message_based",
        chunk_size_messages: int = 5,
        chunk_overlap_messages: int = 2,
        chunk_max_tokens: int = 4000,
        chunk_overlap_ratio: float = 0.2,
        insert_batch_size: int = 100,
    ) -> None:
        """
        Args:
            idle_for: how long a session must have been quiet.
            overlap_messages: how many archived messages stay in the session as context.
            min_session_length: characters below which a session is not worth a source.
            concurrency: sessions archived at once; each holds a connection.

        Raises:
            InvalidInputError: a size or number is out of its range.
        """
        least = {
            "batch_size": (batch_size, 1),
            "overlap_messages": (overlap_messages, 0),
            "concurrency": (concurrency, 1),
            "insert_batch_size": (insert_batch_size, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise InvalidInputError(f"{name} must be at least {minimum}, got {value}")
        self._database = database
        self._idle_for = idle_for
        self._batch_size = batch_size
        self._overlap_messages = overlap_messages
        self._min_session_length = min_session_length
        self._insert_batch_size = insert_batch_size
        self._concurrency = concurrency
        self._chunk_overlap = chunk_overlap_messages
        self._chunk_options: dict[str, Any] = {
            "strategy": strategy,
            "size": chunk_size_messages,
            "overlap": chunk_overlap_messages,
            "max_tokens": chunk_max_tokens,
            "overlap_ratio": chunk_overlap_ratio,
        }

    async def run_once(self, idle_for: timedelta | None = None) -> ArchiveReport:
        """Archive every session that is due now, in batches.

        A session that fails is left as it was, named in the report, and does not stop the others.

        Args:
            idle_for: instead of the one given at construction; zero archives all active sessions.

        Raises:
            StoreUnavailableError: the database did not answer; what was archived stays so.
            InvalidInputError: ``idle_for`` is negative.
        """
        idle_for = self._idle_for if idle_for is None else idle_for
        if not isinstance(idle_for, timedelta) or idle_for < timedelta(0):
            raise InvalidInputError(f"idle_for must be a timedelta and not negative, got {idle_for!r}")
        limit = asyncio.Semaphore(self._concurrency)
        done: list[ArchivedSession | None] = []
        failed: list[tuple[int, Exception]] = []
        cursor: DueSession | None = None
        while True:
            async with self._database.begin() as session:
                due = await SessionRepository(session).due_for_archiving(idle_for, limit=self._batch_size, after=cursor)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._guarded(entry.id, limit, failed)) for entry in due]
            except ExceptionGroup as errors:
                # The first is why the others were cancelled.
                raise errors.exceptions[0] from errors.exceptions[0].__cause__
            done.extend(task.result() for task in tasks)
            if len(due) < self._batch_size:
                break
            cursor = due[-1]
        changed = [entry for entry in done if entry is not None]
        return ArchiveReport(
            archived=sum(entry.source_id is not None for entry in changed),
            skipped=sum(entry.source_id is None for entry in changed),
            messages=sum(entry.messages for entry in changed),
            chunks=sum(entry.chunks for entry in changed),
            failed=tuple(failed),
        )

    @translated
    async def archive(self, session_id: int) -> ArchivedSession | None:
        """Archive one session now, quiet or not; None if it is archived already.

        Raises:
            NotFoundError: the session is gone.
            StaleSessionError: the session was rewritten each time it was tried.
            StoreUnavailableError: the database did not answer.
        """
        check_id(session_id, "session_id")
        for _ in range(_CONFLICT_ATTEMPTS):
            async with self._database.begin() as session:
                row = (await session.execute(_snapshot(session_id))).one_or_none()
            if row is None:
                raise NotFoundError(f"session {session_id} is gone; nothing was archived")
            snapshot = _read(row)
            if row.status is SessionStatus.ARCHIVED:
                return None
            # Off the event loop, and before the lock: reading and splitting long sessions is work.
            prepared = await asyncio.to_thread(self._prepare, snapshot)
            async with self._database.begin() as session:
                locked = (await session.execute(_lock(session_id))).one_or_none()
                if locked is not None and locked.rewrite_version == snapshot.rewrite_version:
                    return await self._write(session, snapshot, prepared, locked.length)
        raise StaleSessionError(
            f"session {session_id} was rewritten {_CONFLICT_ATTEMPTS} times while it was being archived; try later"
        )

    async def _guarded(
        self, session_id: int, limit: asyncio.Semaphore, failed: list[tuple[int, Exception]]
    ) -> ArchivedSession | None:
        async with limit:
            try:
                return await self.archive(session_id)
            except NotFoundError:
                return None  # deleted meanwhile
            except Exception as error:
                if isinstance(error, StoreUnavailableError) and not isinstance(error, StoreTimeoutError):
                    raise
                # One session that is unreadable, or too large, must not keep the others from being archived.
                # The error itself, which may quote what was said, goes to the caller and not to the log.
                logger.error("session %s was not archived: %s", session_id, type(error).__name__)
                failed.append((session_id, error))
                return None

    def _prepare(self, snapshot: _Snapshot) -> _Prepared:
        new = [Message.from_stored(item) for item in snapshot.stored[snapshot.archived :]]
        return _Prepared(chunks=self._chunks(snapshot, new), title=_title(new), metadata=_metadata(snapshot, new))

    def _chunks(self, snapshot: _Snapshot, new: Sequence[Message]) -> list[NewChunk]:
        """The chunks of the new messages; none if they are not worth a source."""
        length = sum(len(message.content.strip()) for message in new)
        if length < self._min_session_length or not any(message.role == "user" for message in new):
            return []
        context = min(snapshot.archived, self._chunk_overlap)
        start = snapshot.archived - context
        messages = [Message.from_stored(item) for item in snapshot.stored[start : snapshot.archived]]
        messages += new
        pieces = chunk_messages(messages, context=context, **self._chunk_options)
        return [
            _chunk(snapshot, messages, start, piece, index=index, total=len(pieces))
            for index, piece in enumerate(pieces)
        ]

    async def _write(
        self, session: AsyncSession, snapshot: _Snapshot, prepared: _Prepared, length: int
    ) -> ArchivedSession:
        """Source, chunks and the pruned session: all or nothing. The row is locked."""
        upto = len(snapshot.stored)
        status = SessionStatus.ARCHIVED if length == upto else SessionStatus.ACTIVE
        if not prepared.chunks:
            # Too little to remember by itself; should the session go on, it is archived with the rest.
            await session.execute(_mark(snapshot.id, status))
            return ArchivedSession(snapshot.id, None, 0, 0)
        knowledge = KnowledgeRepository(session, insert_batch_size=self._insert_batch_size)
        first = snapshot.offset + snapshot.archived
        source_id = await knowledge.add_source(
            SourceType.DISCORD_SESSION,
            prepared.title,
            uri=_channel_url(snapshot.scope),
            scope=snapshot.scope,
            metadata=prepared.metadata,
            origin=(snapshot.id, first),
            session_key=snapshot.session_key,
            archived_messages=_raw(snapshot.id, snapshot.archived, upto),
        )
        await knowledge.add_chunks(source_id, prepared.chunks)
        keep = min(self._overlap_messages, upto)
        await session.execute(_prune(snapshot.id, removed=upto - keep, archived=keep, status=status))
        return ArchivedSession(snapshot.id, source_id, upto - snapshot.archived, len(prepared.chunks))


def _snapshot(session_id: int) -> AnySelect:
    return select(
        Session.id,
        Session.session_key,
        Session.session_type,
        Session.status,
        Session.guild_id,
        Session.channel_id,
        Session.thread_id,
        Session.user_id,
        Session.messages,
        Session.messages_offset,
        Session.last_archived_message_index,
        Session.rewrite_version,
    ).where(Session.id == session_id)


def _read(row: AnyRow) -> _Snapshot:
    return _Snapshot(
        id=row.id,
        session_key=row.session_key,
        session_type=row.session_type,
        scope=Scope(row.guild_id, row.channel_id, row.thread_id, row.user_id),
        stored=row.messages,
        offset=row.messages_offset,
        archived=row.last_archived_message_index,
        rewrite_version=row.rewrite_version,
    )


def _lock(session_id: int) -> AnySelect:
    """Appends wait for this lock; what they add comes after the messages that are archived."""
    return (
        select(Session.rewrite_version, func.jsonb_array_length(Session.messages).label("length"))
        .where(Session.id == session_id)
        .with_for_update(key_share=True)
    )


def _mark(session_id: int, status: SessionStatus) -> Any:
    return (
        update(Session)
        .where(Session.id == session_id)
        .values(status=status, version=Session.version + 1)
        .execution_options(synchronize_session=False)
    )


def _raw(session_id: int, first: int, end: int) -> ColumnElement[Any]:
    """The messages as they stand there; on the way through Python long numbers would lose digits."""
    path = text(f"'$[{first:d} to {end - 1:d}]'::jsonpath")
    messages = func.jsonb_path_query_array(Session.messages, path, type_=JSONB())
    return select(messages).where(Session.id == session_id).scalar_subquery()


def _prune(session_id: int, *, removed: int, archived: int, status: SessionStatus) -> Any:
    """Cut ``removed`` messages off the front of the array as it is now, later appends included."""
    rest: ColumnElement[Any] = func.jsonb_path_query_array(
        Session.messages, text(f"'$[{removed:d} to last]'::jsonpath"), type_=JSONB()
    )
    return (
        update(Session)
        .where(Session.id == session_id)
        .values(
            messages=rest,
            messages_offset=Session.messages_offset + removed,
            last_archived_message_index=archived,
            status=status,
            version=Session.version + 1,
            rewrite_version=Session.rewrite_version + 1,
        )
        .execution_options(synchronize_session=False)
    )


def _title(messages: Sequence[Message]) -> str:
    for message in messages:
        if message.role == "user" and (words := " ".join(message.content.split())):
            return words if len(words) <= TITLE_LENGTH else f"{words[:TITLE_LENGTH]}..."
    return DEFAULT_TITLE


def _channel_url(scope: Scope) -> str | None:
    if scope.channel_id is None:
        return None
    url = f"https://discord.com/channels/{scope.guild_id or '@me'}/{scope.channel_id}"
    return url if scope.thread_id is None else f"{url}/{scope.thread_id}"


def _message_url(scope: Scope, messages: Sequence[Message]) -> str | None:
    """A link that Discord opens at the first message that has an id.

    Unlike in the source's URI, a thread stands in the place of its channel there.
    """
    if scope.channel_id is None:
        return None
    place = f"https://discord.com/channels/{scope.guild_id or '@me'}/{scope.thread_id or scope.channel_id}"
    ids = (message.message_id for message in messages if isinstance(message.message_id, int))
    return next((f"{place}/{message_id}" for message_id in ids), place)


def _metadata(snapshot: _Snapshot, new: Sequence[Message]) -> dict[str, Any]:
    until = max((message.timestamp for message in new if message.timestamp is not None), default=None)
    return {
        "channel_id": snapshot.scope.channel_id,
        "thread_id": snapshot.scope.thread_id,
        "user_id": snapshot.scope.user_id,
        "guild_id": snapshot.scope.guild_id,
        "session_type": snapshot.session_type,
        "archived_at": datetime.now(UTC).isoformat(),
        "origin_session_id": snapshot.id,
        "origin_session_key": snapshot.session_key,
        "archived_message_count": len(new),
        "archived_until_timestamp": None if until is None else until.isoformat(),
    }


def _chunk(
    snapshot: _Snapshot, messages: Sequence[Message], start: int, piece: ChatPiece, *, index: int, total: int
) -> NewChunk:
    """A piece with its place: absolute indexes, which pruning does not shift."""
    said = [message.timestamp for message in messages[piece.first : piece.last + 1] if message.timestamp is not None]
    first, last = (snapshot.offset + start + position for position in (piece.first, piece.last))
    return NewChunk(
        content=piece.content,
        token_count=piece.token_count,
        occurred_from=min(said, default=None),
        occurred_to=max(said, default=None),
        location={
            "url": _message_url(snapshot.scope, messages[piece.first : piece.last + 1]),
            "label": f"messages {first + 1} to {last + 1}",
            "session_key": snapshot.session_key,
            "chunk_index": index,
            "total_chunks": total,
            "first_message_index": first,
            "last_message_index": last,
            "first_message_id": messages[piece.first].message_id,
            "last_message_id": messages[piece.last].message_id,
        },
    )
