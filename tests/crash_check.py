"""What must hold whatever was killed, restarted or refused: looked up in the database, violation by violation."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from embedding_server import vector_of
from sqlalchemy import select, text

from kotonoha_store import (
    Database,
    EmbeddingJob,
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeSource,
    Message,
    Session,
)
from kotonoha_store.knowledge import content_hash

WAITING = {"pending", "processing", "partial"}


@dataclass
class Sent:
    """What one writer appended to a session, in its order; every message has an id of its own.

    Attributes:
        unsure: the ids whose commit was not answered: they may be there or not.
    """

    messages: list[Message] = field(default_factory=list)
    unsure: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Found:
    """All that the tables hold."""

    chunks: Sequence[Any]
    jobs: Sequence[Any]
    letters: Sequence[Any]
    sources: Sequence[Any]
    sessions: Sequence[Any]

    @classmethod
    async def read(cls, database: Database) -> "Found":
        tables = (KnowledgeChunk, EmbeddingJob, KnowledgeChunkDeadLetter, KnowledgeSource, Session)
        async with database.begin() as session:
            # One moment of all tables.
            await session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            return cls(
                *[
                    (await session.execute(select(*table.__table__.columns).order_by(text("1")))).all()
                    for table in tables
                ]
            )


async def violations(
    database: Database,
    *,
    model: str,
    is_blameless: Callable[[str], bool] = lambda text: True,
    documents: Mapping[int, Sequence[str]] | None = None,
    sent: Mapping[str, Sequence[Sent]] | None = None,
    ended: bool = True,
) -> list[str]:
    """Return what is wrong in this database, or nothing.

    Args:
        model: whose vectors they are; each is compared with what the embedding server gives that text.
        is_blameless: whether nothing was wrong with a text, so that it may not be a dead letter.
        documents: the texts of the chunks that were surely added, by source.
        sent: by session key, what each writer appended. None: the messages are not looked at.
        ended: whether nothing may be left in the queue.
    """
    found = await Found.read(database)
    wrong = [*damages(found, model=model, ended=ended), *incomplete(found)]
    wrong += [
        f"dead letter {letter.id} ({letter.error_code}): nothing was wrong with its text"
        for letter in found.letters
        if is_blameless(letter.content)
    ]
    for source_id, texts in (documents or {}).items():
        held = [row.content for row in (*found.chunks, *found.letters) if row.source_id == source_id]
        if Counter(held) != Counter(texts):
            wrong.append(f"source {source_id} has {len(held)} chunks, or others than the {len(texts)} that were added")
    if sent is not None:
        wrong += _messages(found, sent)
    return wrong


def damages(found: Found, *, model: str, ended: bool) -> list[str]:
    """Return what is wrong, whatever was written and deleted before; see :func:`violations`."""
    return [*_places(found, ended), *_vectors(found, model), *_statuses(found)]


def _places(found: Found, ended: bool) -> Iterable[str]:
    """Each chunk is in one place: waiting, embedded or dead."""
    queued = {job.chunk_id for job in found.jobs}
    chunks = {chunk.id for chunk in found.chunks}
    for chunk in found.chunks:
        is_embedded, is_queued = chunk.embedding is not None, chunk.id in queued
        if is_embedded and is_queued:
            yield f"chunk {chunk.id} is embedded and still queued"
        elif not is_embedded and not is_queued:
            yield f"chunk {chunk.id} is neither embedded nor queued"
        elif is_queued and ended:
            yield f"chunk {chunk.id} was never finished"
    buried = Counter(letter.original_chunk_id for letter in found.letters)
    yield from (f"chunk {chunk_id} was buried {times} times" for chunk_id, times in buried.items() if times > 1)
    yield from (f"chunk {chunk_id} is a dead letter and a chunk" for chunk_id in buried.keys() & chunks)
    sources = {source.id for source in found.sources}
    yield from (f"dead letter {letter.id} has no source" for letter in found.letters if letter.source_id not in sources)
    yield from (f"job of chunk {job.chunk_id}: attempt {job.attempts}" for job in found.jobs if job.attempts < 0)


def incomplete(found: Found) -> Iterable[str]:
    """Each chunk that tells its number among how many is there, once."""
    numbers: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in (*found.chunks, *found.letters):
        if "total_chunks" in row.location:
            numbers[row.source_id, row.location["total_chunks"]].append(row.location["chunk_index"])
    for (source_id, total), indexes in numbers.items():
        if sorted(indexes) != list(range(total)):
            yield f"source {source_id}: chunks {sorted(indexes)} of {total}"


def _vectors(found: Found, model: str) -> Iterable[str]:
    for chunk in found.chunks:
        if chunk.content_hash != content_hash(chunk.content):
            yield f"chunk {chunk.id}: the hash of another text"
        if chunk.embedding is None:
            continue
        if chunk.embedding_model != model:
            yield f"chunk {chunk.id}: embedded by {chunk.embedding_model}"
        # Both of length 1; those of two texts are almost at right angles.
        if not float(np.dot(chunk.embedding.astype(np.float32), vector_of(chunk.content))) > 0.999:
            yield f"chunk {chunk.id}: the vector of another text"


def _statuses(found: Found) -> Iterable[str]:
    for source in found.sources:
        chunks = [chunk for chunk in found.chunks if chunk.source_id == source.id]
        dead = any(letter.source_id == source.id for letter in found.letters)
        if not chunks and not dead:
            continue
        if any(chunk.embedding is None for chunk in chunks):
            fitting = WAITING
        elif dead:
            fitting = {"partial"} if chunks else {"failed"}
        else:
            fitting = {"completed"}
        if source.status not in fitting:
            yield f"source {source.id} is {source.status} and not {' or '.join(sorted(fitting))}"
        if fitting is not WAITING and (source.error_code is not None) != dead:
            yield f"source {source.id}: error {source.error_code}, dead letters: {dead}"


def _messages(found: Found, sent: Mapping[str, Sequence[Sent]]) -> Iterable[str]:
    sessions = {session.session_key: session for session in found.sessions}
    if unknown := sessions.keys() - sent.keys():
        yield f"sessions that nobody made: {sorted(unknown)}"
    for key, writers in sent.items():
        session = sessions.get(key)
        if session is None:
            if any(message.message_id not in each.unsure for each in writers for message in each.messages):
                yield f"session {key} is gone"
            continue
        sources = sorted(
            (source for source in found.sources if source.origin_session_id == session.id),
            key=lambda source: source.origin_first_index,
        )
        archived: list[Any] = []
        for source in sources:
            if source.origin_first_index != len(archived):
                yield f"session {key}: {len(archived)} archived, then a source from {source.origin_first_index} on"
            archived += source.archived_messages
            yield from unsearchable(found, source)
        yield from _joint(session, archived)
        transcript = archived + session.messages[session.last_archived_message_index :]
        yield from _complete(key, transcript, writers)


def _joint(session: Any, archived: list[Any]) -> Iterable[str]:
    """Where the archive ends, the session goes on; what it still holds of the archived is the same."""
    context = session.last_archived_message_index
    if session.messages_offset + context != len(archived):
        yield (
            f"session {session.session_key}: {len(archived)} are archived, "
            f"by its own account {session.messages_offset + context}"
        )
    if session.messages[:context] != archived[len(archived) - context :]:
        yield f"session {session.session_key}: the context is not what was archived last"


def _complete(key: str, transcript: Sequence[Any], writers: Sequence[Sent]) -> Iterable[str]:
    """Each message is there once, as it was sent; those of one writer in their order."""
    ids = [message.get("message_id") for message in transcript]
    doubled = sorted(number for number, times in Counter(ids).items() if times > 1)
    if doubled:
        yield f"session {key}: messages {doubled} are there more than once"
    places = {number: place for place, number in enumerate(ids)}
    all_sent = {message.message_id for each in writers for message in each.messages}
    if foreign := places.keys() - all_sent:
        yield f"session {key}: messages {sorted(foreign)} were never sent"
    for each in writers:
        here = [message for message in each.messages if message.message_id in places]
        lost = [m.message_id for m in each.messages if m.message_id not in places and m.message_id not in each.unsure]
        if lost:
            yield f"session {key}: messages {lost} are lost"
        order = [places[message.message_id] for message in here]
        if any(earlier >= later for earlier, later in pairwise(order)):
            yield f"session {key}: the messages of a writer are in another order"
        changed = [m.message_id for m in here if transcript[places[m.message_id]] != m.to_stored()]
        if changed:
            yield f"session {key}: messages {changed} are not what was sent"


def unsearchable(found: Found, source: Any) -> Iterable[str]:
    """Each archived message stands in a chunk, embedded or dead, that says so."""
    texts: dict[int, str] = defaultdict(str)
    for row in (*found.chunks, *found.letters):
        if row.source_id == source.id:
            for index in range(row.location["first_message_index"], row.location["last_message_index"] + 1):
                texts[index] += row.content + "\n"
    for index, message in enumerate(source.archived_messages, source.origin_first_index):
        if message["content"].strip() not in texts[index]:
            yield f"source {source.id}: message {index} is in no chunk"
