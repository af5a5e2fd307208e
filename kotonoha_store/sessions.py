"""Short-term memory: :class:`SessionRepository`."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Text,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store.checks import check_id, check_text
from kotonoha_store.columns import AnyRow, AnySelect
from kotonoha_store.database import dump_json
from kotonoha_store.driver_errors import translated
from kotonoha_store.errors import InvalidInputError, NotFoundError, StaleSessionError
from kotonoha_store.models import Session
from kotonoha_store.prepared import Prepared, prepare
from kotonoha_store.records import (
    SCOPE_FIELDS,
    AppendResult,
    Message,
    Scope,
    SessionRecord,
    SessionStatus,
    SessionSummary,
)
from kotonoha_store.wakeup import ARCHIVE_CHANNEL

KEY_MAX_BYTES: Final = 2000
"""A B-tree entry must fit a third of an 8 kB page (PostgreSQL, "B-Tree Indexes")."""

DUE_ROUNDING: Final = timedelta(minutes=5)
"""How far ``archive_due_at`` may lie after ``last_active_at``."""

_SCOPE_COLUMNS: Final = (Session.guild_id, Session.channel_id, Session.thread_id, Session.user_id)
_SUMMARY: Final = (
    Session.id,
    Session.session_key,
    Session.session_type,
    Session.status,
    *_SCOPE_COLUMNS,
    Session.version,
    Session.created_at,
    Session.last_active_at,
    func.jsonb_array_length(Session.messages).label("message_count"),
)


@dataclass(frozen=True, slots=True)
class DueSession:
    """A session that has been quiet long enough; keep the pair as the cursor of the next page."""

    id: int
    archive_due_at: datetime


@dataclass(frozen=True, slots=True)
class RequestedSession:
    """A session that has grown too long while it is in use; keep the pair as the cursor of the next page."""

    id: int
    archive_requested_at: datetime


class SessionRepository:
    """Reads and writes sessions on the caller's transaction; never commits.

    Every method raises :class:`~kotonoha_store.errors.StoreUnavailableError` when the database does not
    answer and :class:`~kotonoha_store.errors.SchemaOutdatedError` when it was not migrated.
    """

    def __init__(self, session: AsyncSession, *, archive_max_messages: int | None = None) -> None:
        """
        Args:
            archive_max_messages: a session that holds more asks to be archived while it is in use; None: never.
        """
        if archive_max_messages is not None and archive_max_messages < 1:
            raise InvalidInputError(f"archive_max_messages must be at least 1, got {archive_max_messages}")
        self._session = session
        self._limit = archive_max_messages

    @translated
    async def append(
        self,
        session_key: str,
        messages: Message | Sequence[Message],
        *,
        session_type: str = "chat",
        guild_id: int | None = None,
        channel_id: int | None = None,
        thread_id: int | None = None,
        user_id: int | None = None,
    ) -> AppendResult:
        """Append messages, creating the session on the first call; one statement.

        Safe under concurrent writers: each one's messages keep their order and none is lost. An
        archived session becomes active again. Type and scope are those of the first call; ids that were
        unknown then are filled in. An append that makes the session too long asks for archiving and wakes
        the archivers when it is committed.

        Messages keep the order in which they arrive: one that was said earlier stands after those that were
        appended before, and is archived with the next ones if these are archived already.

        Raises:
            InvalidInputError: no message, an unusable key, or a key that belongs to another scope.
        """
        new = _checked_messages(messages)
        if not new:
            raise InvalidInputError("append needs at least one message")
        scope = Scope(guild_id=guild_id, channel_id=channel_id, thread_id=thread_id, user_id=user_id)
        statement = _append(self._limit)
        values = {
            "new_key": check_key(session_key),
            "new_type": check_text(session_type, "session_type"),
            "new_messages": dump_json([message.to_stored() for message in new]),
            **{f"new_{name}": value for name, value in asdict(scope).items()},
        }
        connection = await self._session.connection()
        row = (await connection.exec_driver_sql(statement.sql, tuple(statement.arguments(values)))).one_or_none()
        if row is None:
            raise InvalidInputError(
                f"the session {session_key!r} belongs to another guild, channel, thread or user; "
                "use a key that is unique across them, and name no user where several share the session"
            )
        return AppendResult(session_id=row.id, version=row.version, message_count=row.message_count)

    @translated
    async def load(self, session_key: str, *, last: int | None = None) -> SessionRecord:
        """Return the session with all its messages, or only the ``last`` n.

        Raises:
            NotFoundError: no session has this key.
            InvalidInputError: ``last`` is negative.
        """
        record = await self.find(session_key, last=last)
        if record is None:
            raise NotFoundError(f"no session has the key {session_key!r}")
        return record

    @translated
    async def find(self, session_key: str, *, last: int | None = None) -> SessionRecord | None:
        """Return the session or None; as :meth:`load`."""
        if last is not None and check_id(last, "last") < 0:
            raise InvalidInputError(f"last must not be negative, got {last}")
        row = (await self._session.execute(_load(Session.session_key == check_key(session_key), last))).one_or_none()
        return None if row is None else _record(row)

    @translated
    async def get(self, session_id: int) -> SessionRecord | None:
        """Return the session with this id, or None."""
        check_id(session_id, "session_id")
        row = (await self._session.execute(_load(Session.id == session_id, None))).one_or_none()
        return None if row is None else _record(row)

    @translated
    async def save(self, record: SessionRecord, messages: Sequence[Message]) -> SessionRecord:
        """Replace all messages of the session as it was loaded.

        What was archived already stays archived where it is still at the front (trimmed there, or edited
        in place: the same message id there, or without one the same role and time); everything else counts as
        not archived yet. The sources that were made of archived messages do not change.

        Raises:
            StaleSessionError: the session changed since ``record`` was loaded, or is gone.
            InvalidInputError: ``record`` was loaded with ``last`` and does not hold all messages.
        """
        if len(record.messages) != record.message_count:
            raise InvalidInputError("this record holds only the last messages; load the whole session to save it")
        stored = [message.to_stored() for message in _checked_messages(messages)]
        archived = _still_archived(record.messages, messages, record.last_archived_message_index)
        too_long = self._limit is not None and len(stored) > self._limit
        asked = func.coalesce(Session.archive_requested_at, func.now())
        row = (
            await self._session.execute(
                update(Session)
                .where(Session.id == record.id, Session.version == record.version)
                .values(
                    messages=stored,
                    version=Session.version + 1,
                    rewrite_version=Session.rewrite_version + 1,
                    messages_offset=Session.messages_offset + Session.last_archived_message_index - archived,
                    last_archived_message_index=archived,
                    status=SessionStatus.ACTIVE,
                    last_active_at=func.greatest(Session.last_active_at, func.now()),
                    archive_due_at=func.greatest(Session.archive_due_at, due_at()),
                    archive_requested_at=asked if too_long else null(),
                )
                .returning(Session.id)
                .execution_options(synchronize_session=False)
            )
        ).one_or_none()
        if row is None:
            raise StaleSessionError(
                f"the session {record.session_key!r} changed after it was loaded (version {record.version}) "
                "or is gone; load it again, repeat the change, save"
            )
        if too_long:
            await request_archiving(self._session)
        saved = await self.get(record.id)
        assert saved is not None, "the row is locked by the update above"  # noqa: S101  for the type checker
        return saved

    @translated
    async def delete(self, session_key: str) -> None:
        """Delete the session with its messages. What was archived of it stays searchable.

        Messages that were not archived yet are gone. An archiver that has it in hand passes it over, or has
        finished before.

        Raises:
            NotFoundError: no session has this key.
        """
        statement = delete(Session).where(Session.session_key == check_key(session_key)).returning(Session.id)
        if (await self._session.execute(statement)).one_or_none() is None:
            raise NotFoundError(f"no session has the key {session_key!r}")

    @translated
    async def due_for_archiving(
        self, idle_for: timedelta, *, limit: int, after: DueSession | None = None
    ) -> list[DueSession]:
        """Return active sessions without a change for ``idle_for``, the longest quiet first."""
        return [DueSession(*row) for row in await self._session.execute(_due(idle_for, limit, after))]

    @translated
    async def requested_for_archiving(
        self, *, limit: int, after: RequestedSession | None = None
    ) -> list[RequestedSession]:
        """Return sessions that have grown too long while they are in use, those that asked first at the beginning."""
        return [RequestedSession(*row) for row in await self._session.execute(_requested(limit, after))]

    async def iterate(self, *, page_size: int = 100, **filters: Any) -> AsyncIterator[SessionSummary]:
        """Iterate over all sessions, page by page; filters as in :meth:`list`."""
        after_id = 0
        while True:
            page = await self.list(after_id=after_id, limit=page_size, **filters)
            for summary in page:
                yield summary
            if len(page) < page_size:
                return
            after_id = page[-1].id

    @translated
    async def list(
        self,
        *,
        after_id: int = 0,
        limit: int = 100,
        status: SessionStatus | None = None,
        guild_id: int | None = None,
        channel_id: int | None = None,
        thread_id: int | None = None,
        user_id: int | None = None,
    ) -> Sequence[SessionSummary]:
        """Return up to ``limit`` sessions in the order of their ids, without messages.

        The next page starts after the last id of this one.
        """
        if limit < 1:
            raise InvalidInputError(f"limit must be at least 1, got {limit}")
        statement = select(*_SUMMARY).where(Session.id > after_id).order_by(Session.id).limit(limit)
        Scope(guild_id=guild_id, channel_id=channel_id, thread_id=thread_id, user_id=user_id)  # refuses what is no id
        wanted = {
            Session.status: status,
            Session.guild_id: guild_id,
            Session.channel_id: channel_id,
            Session.thread_id: thread_id,
            Session.user_id: user_id,
        }
        for column, value in wanted.items():
            if value is not None:
                statement = statement.where(column == value)
        return [_summary(row) for row in await self._session.execute(statement)]


def _still_archived(old: Sequence[Message], new: Sequence[Message], archived: int) -> int:
    """How many messages at the front of ``new`` are archived; in doubt fewer, since a message may not be lost."""
    is_longer = len(new) >= len(old) and list(new[archived : len(old)]) == list(old[archived:])
    # Edited in place: what was not archived stands where it stood, and each archived message is itself.
    if is_longer and all(map(_is_same, old[:archived], new)):
        return archived
    kept = range(min(archived, len(new)), 0, -1)
    return next((k for k in kept if list(new[:k]) == list(old[archived - k : archived])), 0)


def _is_same(old: Message, new: Message) -> bool:
    """Whether the message is the same one, as it was or edited."""
    if old == new:
        return True
    if old.message_id is not None or new.message_id is not None:
        return old.message_id == new.message_id
    return old.timestamp is not None and (old.timestamp, old.role) == (new.timestamp, new.role)


async def request_archiving(session: AsyncSession) -> None:
    """Wake the archivers when this transaction is committed."""
    await session.execute(select(cast(func.pg_notify(ARCHIVE_CHANNEL, ""), Text)))


def _checked_messages(messages: Message | Sequence[Message]) -> list[Message]:
    given: Any = [messages] if isinstance(messages, Message) else messages
    if not isinstance(given, Sequence) or not all(isinstance(message, Message) for message in given):
        raise InvalidInputError('messages must be Message values, such as Message.user("hello"), one or a sequence')
    return list(given)


def check_key(session_key: str) -> str:
    check_text(session_key, "session_key")
    if not session_key or len(session_key.encode()) > KEY_MAX_BYTES:
        raise InvalidInputError(f"session_key must have 1 to {KEY_MAX_BYTES} bytes")
    return session_key


def due_at() -> ColumnElement[datetime]:
    """Now, rounded up to :data:`DUE_ROUNDING`, so that most appends change no indexed column (HOT)."""
    return func.date_bin(text("INTERVAL '5 minutes'"), func.now(), text("TIMESTAMPTZ '2000-01-01 00:00Z'")) + text(
        "INTERVAL '5 minutes'"
    )


@cache
def _append(limit: int | None) -> Prepared:
    """The upsert that creates or extends a session; no row comes back if the scopes differ.

    Beyond ``limit`` messages it asks for archiving too, once: the request is taken back by the archiver.

    Parameters: new_key, new_type, new_messages (JSON), and the scope's ids. Compiled once: it is the statement that is
    sent most often.
    """
    given = bindparam("new_messages", type_=JSONB())
    ids = {name: bindparam(f"new_{name}", type_=BigInteger()) for name in SCOPE_FIELDS}
    statement = insert(Session).values(
        session_key=bindparam("new_key", type_=Text()),
        session_type=bindparam("new_type", type_=Text()),
        messages=given,
        archive_due_at=due_at(),
        archive_requested_at=null() if limit is None else case((func.jsonb_array_length(given) > limit, func.now())),
        **ids,
    )
    new = statement.excluded
    asks: dict[str, Any] = {}
    if limit is not None:
        length = func.jsonb_array_length(Session.messages) + func.jsonb_array_length(new.messages)
        asked = Session.archive_requested_at
        asks["archive_requested_at"] = case((length > limit, func.coalesce(asked, func.now())), else_=asked)
    upsert = statement.on_conflict_do_update(
        index_elements=[Session.session_key],
        set_={
            "messages": Session.messages.op("||", return_type=JSONB())(new.messages),
            "version": Session.version + 1,
            "status": text("'active'"),
            # now() is when the transaction began: a long one must not set the clock back.
            "last_active_at": func.greatest(Session.last_active_at, func.now()),
            "archive_due_at": func.greatest(Session.archive_due_at, new.archive_due_at),
            **asks,
            **{name: func.coalesce(getattr(Session, name), getattr(new, name)) for name in ids},
        },
        where=_same_scope(new),
    )
    result = [Session.id, Session.version, func.jsonb_array_length(Session.messages).label("message_count")]
    if limit is None:
        return prepare(upsert.returning(*result))
    done = upsert.returning(*result, (Session.archive_requested_at == func.now()).label("asks")).cte("done")
    notify = case((done.c.asks, cast(func.pg_notify(ARCHIVE_CHANNEL, ""), Text)))
    return prepare(select(done.c.id, done.c.version, done.c.message_count, notify))


def _same_scope(new: Any) -> ColumnElement[bool]:
    conditions = [
        or_(column.is_(None), new[column.key].is_(None), column == new[column.key]) for column in _SCOPE_COLUMNS
    ]
    return conditions[0] & conditions[1] & conditions[2] & conditions[3]


def _load(condition: ColumnElement[bool], last: int | None) -> AnySelect:
    """The session with its messages; the last n are cut by the server."""
    messages: Any = Session.messages
    if last is not None:
        path = func.concat("$[", func.greatest(func.jsonb_array_length(Session.messages) - last, 0), " to last]")
        cut = func.jsonb_path_query_array(Session.messages, path.op("::")(text("jsonpath")))
        messages = cut if last else literal([], JSONB())
    return select(
        *_SUMMARY,
        messages.label("messages"),
        Session.messages_offset,
        Session.last_archived_message_index,
        Session.rewrite_version,
    ).where(condition)


def _due(idle_for: timedelta, limit: int, after: DueSession | None) -> AnySelect:
    """Through idx_sessions_archive_candidates: its time is up to DUE_ROUNDING late, hence the second condition."""
    statement: AnySelect = (
        select(Session.id, Session.archive_due_at)
        .where(
            Session.status == text("'active'"),
            Session.archive_due_at <= func.now() - idle_for + DUE_ROUNDING,
            Session.last_active_at <= func.now() - idle_for,
        )
        .order_by(Session.archive_due_at, Session.id)
        .limit(limit)
    )
    if after is None:
        return statement
    return statement.where(func.row(Session.archive_due_at, Session.id) > func.row(after.archive_due_at, after.id))


def _requested(limit: int, after: RequestedSession | None) -> AnySelect:
    """Through idx_sessions_archive_requested."""
    statement: AnySelect = (
        select(Session.id, Session.archive_requested_at)
        .where(Session.archive_requested_at.is_not(None))
        .order_by(Session.archive_requested_at, Session.id)
        .limit(limit)
    )
    if after is None:
        return statement
    cursor = func.row(after.archive_requested_at, after.id)
    return statement.where(func.row(Session.archive_requested_at, Session.id) > cursor)


def _scope(row: AnyRow) -> Scope:
    return Scope(guild_id=row.guild_id, channel_id=row.channel_id, thread_id=row.thread_id, user_id=row.user_id)


def _summary(row: AnyRow) -> SessionSummary:
    return SessionSummary(
        id=row.id,
        session_key=row.session_key,
        session_type=row.session_type,
        status=row.status,
        scope=_scope(row),
        message_count=row.message_count,
        version=row.version,
        created_at=row.created_at,
        last_active_at=row.last_active_at,
    )


def _record(row: AnyRow) -> SessionRecord:
    return SessionRecord(
        id=row.id,
        session_key=row.session_key,
        session_type=row.session_type,
        status=row.status,
        scope=_scope(row),
        messages=tuple(Message.from_stored(item) for item in row.messages),
        message_count=row.message_count,
        messages_offset=row.messages_offset,
        last_archived_message_index=row.last_archived_message_index,
        version=row.version,
        rewrite_version=row.rewrite_version,
        created_at=row.created_at,
        last_active_at=row.last_active_at,
    )
