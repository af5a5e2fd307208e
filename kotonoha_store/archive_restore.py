"""The way back: from a source to the session that it was made of."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, column, func, literal, null, select, text, true, update
from sqlalchemy.dialects.postgresql import JSONB, aggregate_order_by, insert
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store.archive_pieces import lock_key
from kotonoha_store.checks import check_id
from kotonoha_store.columns import AnyRow, AnySelect
from kotonoha_store.errors import InvalidInputError, NotFoundError
from kotonoha_store.knowledge import KnowledgeRepository
from kotonoha_store.models import KnowledgeSource, Session
from kotonoha_store.records import SCOPE_FIELDS, SessionStatus
from kotonoha_store.sessions import check_key, due_at

_NAMED = 10


@dataclass(frozen=True, slots=True)
class RestoredSession:
    """Where the messages are again.

    Attributes:
        messages: how many were put back.
    """

    session_id: int
    session_key: str
    messages: int


async def restore_source(
    session: AsyncSession, source_id: int, *, session_key: str | None, overlap: int
) -> RestoredSession:
    """Put the messages of an archived session back and delete the source with all that was made of it.

    The session holds then, in this order: the last ``overlap`` messages before these, archived, as context; these;
    what had not been archived. All keep their absolute indexes, so that the next archive makes the same source
    and chunks again (with new ids). It is active, and due when it has been quiet once more. A worker that
    embeds one of the chunks meanwhile passes it over. Messages come back as they were archived: what ``save``
    changed since then in those that had stayed as context is not kept.

    Raises:
        as :meth:`kotonoha_store.archiver.SessionArchiver.restore`.
    """
    check_id(source_id, "source_id")
    if session_key is not None:
        check_key(session_key)
    found = await _read(session, _source(source_id), source_id)
    # No archiver may have the session in hand, and of two that restore one comes first, whether it exists or not.
    await session.execute(select(func.pg_advisory_xact_lock(lock_key(found.origin_session_id))))
    # The order in which everybody locks: session, source, chunks.
    held = (await session.execute(_lock_session(found.origin_session_id))).one_or_none()
    source = await _read(session, _source(source_id).with_for_update(), source_id)
    end = source.origin_first_index + source.length
    await _check_newest(session, source, end, None if held is None else held.archived_until)
    if held is None:
        key = await _make_again(session, source, end, session_key)
    elif session_key in (None, held.session_key):
        key = held.session_key
    else:
        raise InvalidInputError(
            f"the session {held.session_key!r} still exists, and its messages belong there; leave session_key out"
        )
    await session.execute(_put_back(source, overlap))
    await KnowledgeRepository(session).delete_source(source_id)
    return RestoredSession(source.origin_session_id, key, source.length)


async def _read(session: AsyncSession, statement: AnySelect, source_id: int) -> AnyRow:
    row = (await session.execute(statement)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no source {source_id}")
    if row.origin_session_id is None:
        raise InvalidInputError(f"source {source_id} is no archived session; there is nothing to restore")
    if row.length is None:
        raise InvalidInputError(
            f"source {source_id} was archived without its messages, by an earlier version; they cannot be restored"
        )
    return row


async def _check_newest(session: AsyncSession, source: AnyRow, end: int, archived_until: int | None) -> None:
    later = (await session.execute(_later(source))).scalars().all()
    if later:
        more = " and others" if len(later) > _NAMED else ""
        names = ", ".join(map(str, later[:_NAMED]))
        raise InvalidInputError(
            f"source {source.id} is not the newest of its session; restore these first, in this order: {names}{more}"
        )
    if archived_until not in (None, end):
        raise InvalidInputError(
            f"the messages that follow source {source.id} were archived too, and their source was deleted; "
            "what comes before a gap cannot be restored"
        )


async def _make_again(session: AsyncSession, source: AnyRow, end: int, session_key: str | None) -> str:
    """Make the session again, without messages, under the id that its other sources name."""
    key: str | None = source.origin_session_key if session_key is None else session_key
    if key is None:
        raise InvalidInputError(f"the session of source {source.id} is gone and its key unknown; give session_key=")
    taken = (await session.execute(_make_session(source, end, key))).one_or_none() is None
    if taken:
        raise InvalidInputError(
            f"the session of source {source.id} is gone and another one has the key {key!r}; give session_key= "
            "to restore it under another key"
        )
    return key


def _source(source_id: int) -> AnySelect:
    columns = KnowledgeSource
    return select(
        columns.id,
        columns.origin_session_id,
        columns.origin_first_index,
        func.coalesce(columns.origin_session_key, columns.source_metadata["origin_session_key"].astext).label(
            "origin_session_key"
        ),
        func.coalesce(columns.source_metadata["session_type"].astext, "chat").label("session_type"),
        func.jsonb_array_length(columns.archived_messages).label("length"),
        *(getattr(columns, name) for name in SCOPE_FIELDS),
    ).where(columns.id == source_id)


def _lock_session(session_id: int) -> AnySelect:
    archived_until = Session.messages_offset + Session.last_archived_message_index
    return (
        select(Session.session_key, archived_until.label("archived_until"))
        .where(Session.id == session_id)
        .with_for_update(key_share=True)
    )


def _later(source: AnyRow) -> AnySelect:
    """The sources of the same session that come after, the newest first."""
    first = KnowledgeSource.origin_first_index
    return (
        select(KnowledgeSource.id)
        .where(KnowledgeSource.origin_session_id == source.origin_session_id, first > source.origin_first_index)
        .order_by(first.desc())
        .limit(_NAMED + 1)
    )


def _make_session(source: AnyRow, end: int, session_key: str) -> Any:
    return (
        insert(Session)
        .values(
            id=source.origin_session_id,
            session_key=session_key,
            session_type=source.session_type,
            messages_offset=end,
            **{name: getattr(source, name) for name in SCOPE_FIELDS},
        )
        .on_conflict_do_nothing(index_elements=[Session.session_key])
        .returning(Session.id)
    )


def _put_back(source: AnyRow, overlap: int) -> Any:
    """All in the server: on the way through Python long numbers would lose digits."""
    context = _context(source, overlap).subquery("context")
    restored = KnowledgeSource.archived_messages
    return (
        update(Session)
        .where(
            Session.id == context.c.session_id,
            KnowledgeSource.origin_session_id == Session.id,
            KnowledgeSource.id == source.id,
        )
        .values(
            messages=_joined(_joined(context.c.messages, restored), _not_archived()),
            messages_offset=source.origin_first_index - context.c.length,
            last_archived_message_index=context.c.length,
            status=SessionStatus.ACTIVE,
            version=Session.version + 1,
            rewrite_version=Session.rewrite_version + 1,
            last_active_at=func.now(),
            archive_due_at=func.greatest(Session.archive_due_at, due_at()),
            archive_requested_at=null(),
        )
        .execution_options(synchronize_session=False)
    )


def _joined(first: Any, second: Any) -> ColumnElement[Any]:
    joined: ColumnElement[Any] = first.op("||", return_type=JSONB())(second)
    return joined


def _not_archived() -> ColumnElement[Any]:
    path = func.concat("$[", Session.last_archived_message_index, " to last]").op("::")(text("jsonpath"))
    return func.jsonb_path_query_array(Session.messages, path, type_=JSONB())


def _context(source: AnyRow, overlap: int) -> AnySelect:
    """The last messages before this source, in one row; none from before a gap, such as a deleted source leaves."""
    first = KnowledgeSource.origin_first_index
    before = (
        select(first, KnowledgeSource.archived_messages)
        .where(KnowledgeSource.origin_session_id == source.origin_session_id, first < source.origin_first_index)
        .order_by(first.desc())
        # Each has a message at least.
        .limit(overlap)
        .cte("before")
    )
    each = (
        func.jsonb_array_elements(before.c.archived_messages)
        .table_valued(column("message", JSONB()), with_ordinality="number", name="each")
        .render_derived()
    )
    at = before.c.origin_first_index + each.c.number - 1
    back = func.row_number().over(order_by=at.desc())
    messages = (
        select(at.label("at"), each.c.message, back.label("back"))
        .select_from(before)
        .join(each, true())
        .subquery("messages")
    )
    ordered = func.jsonb_agg(aggregate_order_by(messages.c.message, messages.c.at), type_=JSONB())
    return select(
        literal(source.origin_session_id, BigInteger()).label("session_id"),
        func.coalesce(ordered, text("'[]'::jsonb"), type_=JSONB()).label("messages"),
        func.count().label("length"),
    ).where(messages.c.at == source.origin_first_index - messages.c.back, messages.c.back <= overlap)
