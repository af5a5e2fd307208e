"""Sessions as imports write them: at the times at which they were lived, and never twice."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

from kotonoha_store.database import dump_json
from kotonoha_store.records import Scope
from kotonoha_store.wakeup import ARCHIVE_CHANNEL

# As SessionRepository.append rounds it; Python knows no year 10000.
_DUE: Final = "least(date_bin('5 minutes', {0}, '2000-01-01 00:00Z') + interval '5 minutes', '9999-12-31 00:00Z')"

_INSERT: Final = f"""
WITH done AS (
    INSERT INTO sessions (session_key, session_type, messages, guild_id, channel_id, thread_id, user_id,
        created_at, last_active_at, archive_due_at, archive_requested_at)
    SELECT key, type, messages::jsonb, guild_id, channel_id, thread_id, user_id, created_at, last_active_at,
        {_DUE.format("last_active_at")}, CASE WHEN length > $1 THEN now() END
    FROM unnest($2::text[], $3::text[], $4::text[], $5::int[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[],
                $10::timestamptz[], $11::timestamptz[])
        AS each(key, type, messages, length, guild_id, channel_id, thread_id, user_id, created_at, last_active_at)
    ORDER BY key
    ON CONFLICT (session_key) DO NOTHING
    RETURNING id, session_key, archive_requested_at
), notified AS MATERIALIZED (
    SELECT pg_notify('{ARCHIVE_CHANNEL}', '') FROM done WHERE archive_requested_at IS NOT NULL LIMIT 1
)
SELECT id, session_key, (SELECT count(*) FROM notified) FROM done
"""  # noqa: S608  of constants

# How many messages a session ever had only grows by appends: whoever else appended in between is noticed.
_EXTEND: Final = f"""
UPDATE sessions
SET messages = messages || $2::text::jsonb,
    version = version + 1,
    status = 'active',
    last_active_at = greatest(last_active_at, $4::timestamptz),
    archive_due_at = greatest(archive_due_at, {_DUE.format("$4::timestamptz")}),
    archive_requested_at = CASE WHEN jsonb_array_length(messages) + $5 > $6
        THEN coalesce(archive_requested_at, now()) ELSE archive_requested_at END
WHERE id = $1 AND messages_offset + jsonb_array_length(messages) = $3
RETURNING CASE WHEN archive_requested_at = now() THEN pg_notify('{ARCHIVE_CHANNEL}', '')::text END
"""  # noqa: S608  of constants

_SESSIONS: Final = """
SELECT id, session_key, session_type, guild_id, channel_id, thread_id, user_id, messages::text, messages_offset,
    last_archived_message_index
FROM sessions WHERE session_key = ANY($1::text[])
"""

_SOURCES: Final = """
SELECT origin_session_id, origin_session_key, origin_first_index, archived_messages::text
FROM knowledge_sources
WHERE origin_session_id = ANY($1::bigint[]) AND archived_messages IS NOT NULL
"""

_ARCHIVED_KEYS: Final = "SELECT DISTINCT origin_session_key FROM knowledge_sources WHERE origin_session_key = ANY($1)"


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session to write.

    Attributes:
        messages: as they are stored.
    """

    key: str
    type: str
    scope: Scope
    messages: list[dict[str, Any]] = field(repr=False)
    created_at: datetime
    last_active_at: datetime


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as it stands, with what was archived of it.

    Attributes:
        total: how many messages it ever had.
        messages: those that are known, by their absolute index; those of deleted sources are not.
    """

    id: int
    type: str
    scope: Scope
    total: int
    messages: Mapping[int, Any] = field(repr=False)


async def insert_sessions(driver: Any, rows: Sequence[SessionRow], *, max_messages: int) -> dict[str, int]:
    """Insert sessions in one statement; return the ids of those whose keys were free, by their keys.

    One that is longer than ``max_messages`` asks to be archived, as if it had grown.
    """
    values = [
        (
            row.key,
            row.type,
            dump_json(row.messages),
            len(row.messages),
            *astuple(row.scope),
            row.created_at,
            row.last_active_at,
        )
        for row in rows
    ]
    columns = [list(column) for column in zip(*values, strict=True)]
    return {row["session_key"]: row["id"] for row in await driver.fetch(_INSERT, max_messages, *columns)}


async def extend_session(
    driver: Any,
    session_id: int,
    messages: Sequence[dict[str, Any]],
    *,
    total: int,
    last_active_at: datetime,
    max_messages: int,
) -> bool:
    """Append messages if the session had ``total`` until now; return whether it had."""
    row = await driver.fetchrow(
        _EXTEND, session_id, dump_json(messages), total, last_active_at, len(messages), max_messages
    )
    return row is not None


async def stored_sessions(driver: Any, keys: Sequence[str]) -> dict[str, StoredSession | None]:
    """Return the sessions that have these keys, with their archived messages.

    None stands for a session that was archived and deleted then.
    """
    rows = await driver.fetch(_SESSIONS, keys)
    archived: dict[int, dict[int, Any]] = {row["id"]: {} for row in rows}
    if pruned := [row["id"] for row in rows if row["messages_offset"] or row["last_archived_message_index"]]:
        for source in await driver.fetch(_SOURCES, pruned):
            messages = json.loads(source["archived_messages"])
            archived[source["origin_session_id"]].update(enumerate(messages, source["origin_first_index"]))
    result: dict[str, StoredSession | None] = {}
    for row in rows:
        offset, held = row["messages_offset"], json.loads(row["messages"])
        known = archived[row["id"]]
        # Those that stayed as context may have been edited since: what was archived counts.
        known.update((at, message) for at, message in enumerate(held, offset) if at not in known)
        scope = Scope(row["guild_id"], row["channel_id"], row["thread_id"], row["user_id"])
        result[row["session_key"]] = StoredSession(row["id"], row["session_type"], scope, offset + len(held), known)
    if free := [key for key in keys if key not in result]:
        result.update((row["origin_session_key"], None) for row in await driver.fetch(_ARCHIVED_KEYS, free))
    return result


def compare(row: SessionRow, stored: StoredSession) -> Literal["same", "longer", "differs"]:
    """How the session that was read stands to the stored one: ``longer``, if it only has more at its end.

    A guild that only one of them knows makes no difference.
    """
    ours, theirs = row.scope, stored.scope
    if (row.type, ours.channel_id, ours.thread_id, ours.user_id) != (
        stored.type,
        theirs.channel_id,
        theirs.thread_id,
        theirs.user_id,
    ):
        return "differs"
    if None not in (ours.guild_id, theirs.guild_id) and ours.guild_id != theirs.guild_id:
        return "differs"
    length = len(row.messages)
    # Without a message to compare by, it may be another conversation.
    if stored.total > length or (stored.total and not stored.messages):
        return "differs"
    if any(at >= length or row.messages[at] != message for at, message in stored.messages.items()):
        return "differs"
    return "same" if stored.total == length else "longer"


def digest(key: str, session_type: str, scope: Scope, messages: Sequence[Any]) -> bytes:
    """SHA-256 of what an import is to keep of a session."""
    parts = [key, session_type, scope.channel_id, scope.thread_id, scope.user_id, _plain(list(messages))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).digest()


def stored_digest(key: str, stored: StoredSession, row: SessionRow) -> bytes:
    """The same of the session as it stands; messages of deleted sources count as they were read."""
    messages = [stored.messages.get(at, row.messages[at]) for at in range(min(stored.total, len(row.messages)))]
    return digest(key, stored.type, stored.scope, messages)


def _plain(value: Any) -> Any:
    """Numbers as PostgreSQL gives them back: 1e2 is 100 in jsonb."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
