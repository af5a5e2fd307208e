"""What the archive of one session sends to the database: few statements, since sessions are many.

On the driver's own connection and in one transaction: :func:`take`, :func:`write_session`, :func:`write_chunks`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from kotonoha_store.archive_pieces import Pieces, Rules, Snapshot, channel_url, lock_key
from kotonoha_store.database import dump_json
from kotonoha_store.knowledge import content_hash
from kotonoha_store.records import Scope, SourceStatus
from kotonoha_store.wakeup import ARCHIVE_CHANNEL
from kotonoha_store.words import analyse, pack_terms, scope_terms

# The lock first: who does not get it reads no messages.
_TAKE: Final = """
SELECT lock.is_ours, s.id, s.session_key, s.session_type, s.status, s.guild_id, s.channel_id, s.thread_id, s.user_id,
       s.messages::text, s.messages_offset, s.last_archived_message_index, s.rewrite_version,
       s.archive_requested_at IS NOT NULL AS is_too_long
FROM (SELECT pg_try_advisory_xact_lock($1) AS is_ours) AS lock
LEFT JOIN sessions AS s ON lock.is_ours AND s.id = $2
"""

_LOCK: Final = "SELECT FROM sessions WHERE id = $1 FOR NO KEY UPDATE"

# Too little to remember by itself.
_MARK: Final = """
UPDATE sessions
SET version = version + 1,
    status = CASE WHEN jsonb_array_length(messages) = $3 THEN 'archived' ELSE 'active' END::session_status_enum
WHERE id = $1 AND rewrite_version = $2
RETURNING NULL::bigint AS source_id
"""

# Raw, as they stand there: on the way through Python long numbers would lose digits. Of the array as it is now, later
# appends included, which make it ask once more if they are many.
_WRITE_SESSION: Final = f"""
WITH session AS MATERIALIZED (
    SELECT id, session_key, messages, messages_offset, last_archived_message_index
    FROM sessions WHERE id = $1 AND rewrite_version = $2 FOR NO KEY UPDATE
), source AS (
    INSERT INTO knowledge_sources (type, title, uri, status, metadata, guild_id, channel_id, thread_id, user_id,
        origin_session_id, origin_first_index, archived_messages, origin_session_key)
    SELECT 'discord_session', $7, $8, $9::text::source_status_enum, $10::text::jsonb, $11, $12, $13, $14,
        id, messages_offset + last_archived_message_index,
        jsonb_path_query_array(messages, format('$[%s to %s]', last_archived_message_index, $3 - 1)::jsonpath),
        session_key
    FROM session WHERE $6
    RETURNING id
)
UPDATE sessions AS s
SET messages = jsonb_path_query_array(s.messages, format('$[%s to last]', $3 - $4)::jsonpath),
    messages_offset = s.messages_offset + ($3 - $4),
    last_archived_message_index = $4,
    status = CASE WHEN jsonb_array_length(s.messages) = $3 THEN 'archived' ELSE 'active' END::session_status_enum,
    archive_requested_at = CASE WHEN jsonb_array_length(s.messages) - ($3 - $4) > $5 THEN now() END,
    version = s.version + 1,
    rewrite_version = s.rewrite_version + 1
FROM session WHERE s.id = session.id
RETURNING (SELECT id FROM source) AS source_id,
    CASE WHEN s.archive_requested_at IS NOT NULL THEN pg_notify('{ARCHIVE_CHANNEL}', '')::text END
"""  # noqa: S608  the channel is a constant of ours

_WRITE_CHUNKS: Final = """
WITH new AS MATERIALIZED (
    SELECT nextval((SELECT pg_get_serial_sequence('knowledge_chunks', 'id'))) AS id, each.*
    FROM unnest($6::text[], $7::text[], $8::integer[], $9::bytea[], $10::timestamptz[], $11::timestamptz[],
                $12::tsvector[], $13::text[])
        AS each(content, location, token_count, content_hash, occurred_from, occurred_to, terms, folded)
), chunk AS (
    INSERT INTO knowledge_chunks (id, source_id, guild_id, channel_id, thread_id, user_id, content, location,
        token_count, content_hash, occurred_from, occurred_to)
    SELECT id, $1::bigint, $2::bigint, $3::bigint, $4::bigint, $5::bigint, content, location::jsonb,
        token_count, content_hash, occurred_from, occurred_to
    FROM new
), job AS (
    INSERT INTO embedding_jobs (chunk_id) SELECT id FROM new
)
INSERT INTO chunk_terms (chunk_id, terms, folded) SELECT id, terms, folded FROM new
"""


_encode: Final = json.JSONEncoder(ensure_ascii=False).encode


class ChunkRow(NamedTuple):
    """A chunk as it is written, and its words."""

    content: str
    location: str
    token_count: int | None
    content_hash: bytes
    occurred_from: datetime | None
    occurred_to: datetime | None
    terms: bytes
    folded: str | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A snapshot's pieces, ready for the driver."""

    snapshot: Snapshot
    pieces: Pieces
    metadata: str
    chunks: Sequence[ChunkRow]


def make_rows(snapshot: Snapshot, pieces: Pieces) -> Prepared:
    """Make all that is written: this is work, to be done before anything is locked."""
    scope = scope_terms(**asdict(snapshot.scope))
    rows = []
    for chunk in pieces.chunks:
        words = analyse(pieces.title, chunk.content)
        row = ChunkRow(
            content=chunk.content,
            # Made of checked values.
            location=_encode(chunk.location),
            token_count=chunk.token_count,
            content_hash=content_hash(chunk.content),
            occurred_from=chunk.occurred_from,
            occurred_to=chunk.occurred_to,
            terms=pack_terms(words, scope),
            folded=words.folded,
        )
        rows.append(row)
    return Prepared(snapshot, pieces, dump_json(pieces.metadata), rows)


async def take(driver: Any, session_id: int) -> Any:
    """Return the session's row, which holds nothing if it is gone; None if another archiver has it in hand."""
    row = await driver.fetchrow(_TAKE, lock_key(session_id), session_id)
    return row if row["is_ours"] else None


async def lock(driver: Any, session_id: int) -> None:
    """Let nobody change the session until the transaction ends."""
    await driver.execute(_LOCK, session_id)


async def write_session(driver: Any, prepared: Prepared, rules: Rules) -> Any:
    """Lock and prune the session, and insert its source. Appends wait for the lock and come after.

    Returns:
        A row with ``source_id``, NULL where no source is made; None if the session was rewritten meanwhile or is
        gone: nothing was written then.
    """
    snapshot, pieces = prepared.snapshot, prepared.pieces
    known = (snapshot.id, snapshot.rewrite_version, pieces.upto)
    if not pieces.is_source and not snapshot.is_too_long:
        return await driver.fetchrow(_MARK, *known)
    return await driver.fetchrow(
        _WRITE_SESSION,
        *known,
        min(rules.overlap, pieces.upto),
        rules.max_messages,
        pieces.is_source,
        pieces.title,
        channel_url(snapshot.scope),
        # Nothing waits where there are no chunks.
        SourceStatus.PENDING if prepared.chunks else SourceStatus.COMPLETED,
        prepared.metadata,
        *astuple(snapshot.scope),
    )


async def write_chunks(driver: Any, source_id: int, scope: Scope, chunks: Sequence[ChunkRow]) -> None:
    """Insert chunks with their jobs and words; the source is new, so nobody else has it locked."""
    columns = [list(column) for column in zip(*chunks, strict=True)]
    await driver.execute(_WRITE_CHUNKS, source_id, *astuple(scope), *columns)
