"""What a session becomes when it is archived: where it is cut, its title, its chunks and their places. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kotonoha_store.chunking import ChatPiece, chunk_messages
from kotonoha_store.records import Message, NewChunk, Scope

TITLE_LENGTH: Final = 50
DEFAULT_TITLE: Final = "Discord Session"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session as it was read: what is archived, whatever is appended meanwhile.

    Attributes:
        stored: its messages as they are stored.
        offset: absolute index of the first of them.
        archived: how many of them are archived already.
        is_too_long: whether it asked to be archived while it is in use.
    """

    id: int
    session_key: str
    session_type: str
    scope: Scope
    stored: Sequence[Any]
    offset: int
    archived: int
    rewrite_version: int
    is_too_long: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """How sessions are archived.

    Attributes:
        overlap: how many archived messages stay in the session as context.
        max_messages: from how many on a session is archived while it is in use.
        min_length: characters below which a session is not worth a source.
        chunk_overlap: how many messages of context the first chunk repeats.
        chunk_options: of :func:`chunk_messages`.
    """

    overlap: int
    max_messages: int
    min_length: int
    chunk_overlap: int
    chunk_options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a snapshot becomes.

    Attributes:
        upto: how many of its messages are archived then.
        is_source: whether a source is made of the new ones among them; it may have no chunks.
    """

    upto: int
    is_source: bool
    chunks: Sequence[NewChunk]
    title: str
    metadata: dict[str, Any]


def make_pieces(snapshot: Snapshot, rules: Rules, *, is_in_use: bool) -> Pieces:
    """Cut the session where it is settled, or take all of it, and make the chunks of what is new.

    What is too long is archived whether or not it is worth searching, since it must not grow for ever.
    """
    upto = settled_point(snapshot, rules) if is_in_use else len(snapshot.stored)
    new = [Message.from_stored(item) for item in snapshot.stored[snapshot.archived : upto]]
    is_worth_it = snapshot.is_too_long or _is_worth_a_source(new, rules.min_length)
    chunks = _chunks(snapshot, new, rules) if is_worth_it else []
    is_source = bool(new) if snapshot.is_too_long else bool(chunks)
    return Pieces(upto, is_source, chunks, _title(new), _metadata(snapshot, new))


def lock_key(session_id: int) -> int:
    """The advisory lock of whoever archives or restores this session: 64 bits, signed."""
    digest = hashlib.blake2b(f"kotonoha_store.archive:{session_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def settled_point(snapshot: Snapshot, rules: Rules) -> int:
    """How many messages of a session in use are archived: not the newest fifth of what it may hold.

    Cut before a message of the user, so that no question is parted from its answer, if there is one in the
    newer half of what would be cut, and what stays is not too long then.
    """
    kept = min(max(1, rules.max_messages // 5), rules.max_messages - 1 - rules.overlap)
    length, done = len(snapshot.stored), snapshot.archived
    end = max(done, length - kept)
    lowest = max(done + (end - done + 1) // 2, length + rules.overlap - rules.max_messages)
    turns = range(min(end, length - 1), max(done, lowest - 1), -1)
    return next((at for at in turns if Message.from_stored(snapshot.stored[at]).role == "user"), end)


def channel_url(scope: Scope) -> str | None:
    """The source's URI: where the conversation took place."""
    if scope.channel_id is None:
        return None
    url = f"https://discord.com/channels/{scope.guild_id or '@me'}/{scope.channel_id}"
    return url if scope.thread_id is None else f"{url}/{scope.thread_id}"


def _is_worth_a_source(new: Sequence[Message], min_length: int) -> bool:
    length = sum(len(message.content.strip()) for message in new)
    return length >= min_length and any(message.role == "user" for message in new)


def _chunks(snapshot: Snapshot, new: Sequence[Message], rules: Rules) -> list[NewChunk]:
    context = min(snapshot.archived, rules.chunk_overlap)
    start = snapshot.archived - context
    messages = [Message.from_stored(item) for item in snapshot.stored[start : snapshot.archived]]
    messages += new
    pieces = chunk_messages(messages, context=context, **rules.chunk_options)
    return [
        _chunk(snapshot, messages, start, piece, index=index, total=len(pieces)) for index, piece in enumerate(pieces)
    ]


def _title(messages: Sequence[Message]) -> str:
    for message in messages:
        if message.role == "user" and (words := " ".join(message.content.split())):
            return words if len(words) <= TITLE_LENGTH else f"{words[:TITLE_LENGTH]}..."
    return DEFAULT_TITLE


def _message_url(scope: Scope, messages: Sequence[Message]) -> str | None:
    """A link that Discord opens at the first message that has an id.

    Unlike in the source's URI, a thread stands in the place of its channel there.
    """
    if scope.channel_id is None:
        return None
    place = f"https://discord.com/channels/{scope.guild_id or '@me'}/{scope.thread_id or scope.channel_id}"
    ids = (message.message_id for message in messages if isinstance(message.message_id, int))
    return next((f"{place}/{message_id}" for message_id in ids), place)


def _metadata(snapshot: Snapshot, new: Sequence[Message]) -> dict[str, Any]:
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
    snapshot: Snapshot, messages: Sequence[Message], start: int, piece: ChatPiece, *, index: int, total: int
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
