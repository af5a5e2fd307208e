"""The way back from a source to its session: the same messages, at the same absolute indexes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from archiving import NOW, append, archiver, chunks, load, query, said, snapshot, sources, talk

from kotonoha_store import (
    ArchiveReport,
    Database,
    EmbeddingQueue,
    InvalidInputError,
    KnowledgeRepository,
    Message,
    NotFoundError,
    RestoredSession,
    SessionArchiver,
    SessionRepository,
    SessionStatus,
    SourceType,
    archive_restore,
)

pytestmark = pytest.mark.role("app")

KEPT = {"overlap_messages": 3, "chunk_size_messages": 4, "chunk_overlap_messages": 2}


async def made(database: Database) -> list[Any]:
    """What an archive made, without what differs each time: ids and times of the archive itself."""
    rows = await query(
        database,
        "SELECT s.title, s.uri, s.metadata - 'archived_at' AS metadata, s.origin_session_id, s.origin_first_index,"
        " s.archived_messages, s.origin_session_key, s.guild_id, c.content, c.location, c.content_hash,"
        " c.occurred_from, c.occurred_to, c.user_id, t.terms::text, t.folded FROM knowledge_sources s"
        " JOIN knowledge_chunks c ON c.source_id = s.id JOIN chunk_terms t ON t.chunk_id = c.id"
        " ORDER BY s.origin_first_index, c.id",
    )
    return [tuple(row) for row in rows]


async def source_ids(database: Database) -> list[int]:
    return [source.id for source in await sources(database)]


async def archived_in_parts(database: Database, *counts: int, **options: Any) -> SessionArchiver:
    """A session ``k`` of so many sources."""
    service = archiver(database, **{**KEPT, **options})
    start = 0
    for count in counts:
        await append(database, "k", talk(count, start=start), guild_id=1, channel_id=2, user_id=4)
        await service.run_once(NOW)
        start += count
    return service


# There and back


@pytest.mark.parametrize("counts", [(6,), (6, 5), (1, 1, 1, 5), (4, 4, 1)])
async def test_archived_again_it_is_the_same(database: Database, counts: Sequence[int]) -> None:
    service = await archived_in_parts(database, *counts)
    before, session = await made(database), await load(database, "k")
    source = (await source_ids(database))[-1]
    restored = await service.restore(source)
    assert restored == RestoredSession(session.id, "k", counts[-1])

    record = await load(database, "k")
    total, context = sum(counts), min(3, sum(counts[:-1]))
    assert (record.messages_offset, record.last_archived_message_index) == (total - counts[-1] - context, context)
    assert said(record) == [f"message {number}" for number in range(record.messages_offset, total)]
    assert (record.status, record.version) == (SessionStatus.ACTIVE, session.version + 1)
    assert record.rewrite_version == session.rewrite_version + 1
    assert record.last_active_at > session.last_active_at

    assert await service.run_once() == ArchiveReport(), "it is not quiet"
    assert (await service.run_once(NOW)).messages == counts[-1]
    assert await made(database) == before


async def test_one_after_the_other_back_to_the_beginning(database: Database) -> None:
    service = await archived_in_parts(database, 6, 1, 4)
    before = await made(database)
    await append(database, "k", Message.user("said since then"))
    for source in reversed(await source_ids(database)):
        await service.restore(source)
    record = await load(database, "k")
    assert said(record) == [*(f"message {number}" for number in range(11)), "said since then"]
    assert (record.messages_offset, record.last_archived_message_index) == (0, 0)
    for table in ("knowledge_sources", "knowledge_chunks", "embedding_jobs", "chunk_terms"):
        assert await query(database, f"SELECT 1 FROM {table}") == []
    await service.run_once(NOW)
    (source,) = await sources(database)
    assert (source.origin_first_index, len(source.archived_messages)) == (0, 12)
    assert (before[0][4], before[-1][4]) == (0, 7)


async def test_the_messages_are_what_was_stored(database: Database) -> None:
    """Whole JSON, not what Python makes of it: long numbers keep their digits."""
    stored = (
        '[{"role": "user", "content": "梅雨", "odd": 0.12345678901234567890123456789, "big": 1e400}, "text", null,'
        ' [1, [2]], {"content": null, "timestamp": "yesterday", "metadata": {"n": 92233720368547758081234567890}}]'
    )
    await query(
        database,
        "INSERT INTO sessions (session_key, session_type, messages) VALUES ('k', 'chat', cast(:m AS jsonb))",
        m=stored,
    )
    service = archiver(database, overlap_messages=4)
    await service.run_once(NOW)
    more = '{"content": "more", "n": 1e500}, null'
    added = "UPDATE sessions SET status = 'active', messages = messages || cast(:m AS jsonb)"
    await query(database, added, m=f"[{more}]")
    await service.run_once(NOW)
    await query(database, added, m="[2e600]")
    first, second = await source_ids(database)
    await service.restore(second)
    same = "SELECT messages = cast(:m AS jsonb) FROM sessions"
    overlap = stored[: stored.index("{")] + stored[stored.index('"text"') :]
    assert await query(database, same, m=overlap[:-1] + f", {more}, 2e600]") == [(True,)]
    await service.restore(first)
    assert await query(database, same, m=stored[:-1] + f", {more}, 2e600]") == [(True,)]


async def test_a_part_of_a_session_in_use_comes_back_too(database: Database) -> None:
    await append(database, "k", talk(11))
    await query(database, "UPDATE sessions SET archive_requested_at = now()")
    service = archiver(database, max_messages=10, **KEPT)
    assert (await service.run_once()).messages == 8
    (source,) = await source_ids(database)
    await service.restore(source)
    record = await load(database, "k")
    assert said(record) == [f"message {number}" for number in range(11)]
    assert (record.messages_offset, record.last_archived_message_index) == (0, 0)
    assert await query(database, "SELECT archive_requested_at FROM sessions") == [(None,)]


async def test_a_source_without_chunks_comes_back(database: Database) -> None:
    await append(database, "k", [Message.user(" ")] * 11)
    await query(database, "UPDATE sessions SET archive_requested_at = now()")
    service = archiver(database, max_messages=10)
    await service.run_once(NOW)
    assert (await load(database, "k")).messages == ()
    await service.restore((await source_ids(database))[0])
    assert (await load(database, "k")).message_count == 11
    assert await sources(database) == []


async def test_what_save_changed_meanwhile(database: Database) -> None:
    """Edits of what is archived are not kept; what is not archived is."""
    service = await archived_in_parts(database, 6)
    async with database.begin() as session:
        repository = SessionRepository(session)
        record = await repository.load("k")
        edited = [Message(**{**message.model_dump(), "content": "edited"}) for message in record.messages]
        await repository.save(record, [*edited, Message.user("new")])
    await service.restore((await source_ids(database))[0])
    assert said(await load(database, "k")) == [*(f"message {number}" for number in range(6)), "new"]


async def test_no_context_from_before_a_gap(database: Database) -> None:
    service = await archived_in_parts(database, 2, 1, 5)
    _, middle, newest = await source_ids(database)
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_source(middle)
    await service.restore(newest)
    record = await load(database, "k")
    assert (record.messages_offset, record.last_archived_message_index) == (3, 0)
    assert said(record) == [f"message {number}" for number in range(3, 8)]


@pytest.mark.role("app", "worker")
async def test_dead_letters_go_with_it(database: Database) -> None:
    service = await archived_in_parts(database, 6)
    (source,) = await source_ids(database)
    await query(
        database,
        "INSERT INTO knowledge_chunks_dlq (source_id, content) VALUES (:source, 'dead'), (:source + 1, 'another''s')",
        source=source,
    )
    await service.restore(source)
    assert await query(database, "SELECT content FROM knowledge_chunks_dlq") == [("another's",)]


# What cannot be restored


async def test_the_newest_comes_first(database: Database) -> None:
    service = await archived_in_parts(database, 2, 2, 2)
    first, second, third = await source_ids(database)
    before = await snapshot(database)
    with pytest.raises(InvalidInputError, match=f"in this order: {third}, {second}$"):
        await service.restore(first)
    assert await snapshot(database) == before
    await service.restore(third)
    with pytest.raises(InvalidInputError, match=f"in this order: {second}$"):
        await service.restore(first)


async def test_what_comes_before_a_gap_is_refused(database: Database) -> None:
    service = await archived_in_parts(database, 2, 2)
    first, second = await source_ids(database)
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_source(second)
    with pytest.raises(InvalidInputError, match="was deleted"):
        await service.restore(first)


async def test_what_is_no_archived_session_is_refused(database: Database) -> None:
    async with database.begin() as session:
        document = await KnowledgeRepository(session).add_source(SourceType.DOCUMENT_FILE, "document")
    service = await archived_in_parts(database, 2)
    await query(database, "UPDATE knowledge_sources SET archived_messages = NULL")
    *_, older = await source_ids(database)
    with pytest.raises(InvalidInputError, match=f"{document} is no archived session"):
        await service.restore(document)
    with pytest.raises(InvalidInputError, match=f"{older} was archived without its messages"):
        await service.restore(older)
    with pytest.raises(NotFoundError, match="no source 999"):
        await service.restore(999)
    with pytest.raises(InvalidInputError, match="session_key"):
        await service.restore(older, session_key="")


async def test_a_second_restore_finds_nothing(database: Database) -> None:
    service = await archived_in_parts(database, 2)
    (source,) = await source_ids(database)
    await service.restore(source)
    with pytest.raises(NotFoundError):
        await service.restore(source)


@pytest.mark.parametrize("gone", [False, True])
async def test_of_two_at_once_one_restores(database: Database, gone: bool) -> None:
    service = await archived_in_parts(database, 6)
    (source,) = await source_ids(database)
    if gone:
        await query(database, "DELETE FROM sessions")
    results = await asyncio.gather(*(service.restore(source) for _ in range(4)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["NotFoundError"] * 3 + ["RestoredSession"]
    assert (await load(database, "k")).message_count == 6


# The session is gone


async def test_a_session_that_was_deleted_is_made_again(database: Database) -> None:
    await append(database, "k", talk(6), session_type="thread", guild_id=1, channel_id=2, thread_id=3, user_id=4)
    service = archiver(database, **KEPT)
    await service.run_once(NOW)
    await append(database, "k", talk(2, start=6))
    await service.run_once(NOW)
    before, session = await made(database), await load(database, "k")
    await query(database, "DELETE FROM sessions")
    first, second = await source_ids(database)
    with pytest.raises(InvalidInputError, match=f"in this order: {second}$"):
        await service.restore(first)

    assert await service.restore(second) == RestoredSession(session.id, "k", 2)
    record = await load(database, "k")
    assert (record.session_type, record.scope, record.status) == ("thread", session.scope, SessionStatus.ACTIVE)
    assert said(record) == [f"message {number}" for number in range(3, 8)]
    assert (record.messages_offset, record.last_archived_message_index) == (3, 3)
    await service.run_once(NOW)
    assert await made(database) == before
    # A new session gets another id.
    assert await append(database, "new", talk(1)) > session.id


async def test_of_two_sources_at_once_the_session_is_made_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await archived_in_parts(database, 2, 2)
    first, second = await source_ids(database)
    await query(database, "DELETE FROM sessions")
    others: list[asyncio.Task[RestoredSession]] = []
    check = archive_restore._check_newest

    async def beside(*arguments: Any) -> None:
        if not others:
            others.append(asyncio.create_task(service.restore(second)))
            # It waits for this one; were it not to, it would be done long before.
            await asyncio.wait(others, timeout=0.5)
        await check(*arguments)

    monkeypatch.setattr(archive_restore, "_check_newest", beside)
    with pytest.raises(InvalidInputError, match=f"in this order: {second}$"):
        await service.restore(first)
    assert (await others[0]).messages == 2
    assert (await service.restore(first)).messages == 2
    assert said(await load(database, "k")) == [f"message {number}" for number in range(4)]


async def test_a_key_that_is_taken(database: Database) -> None:
    service = await archived_in_parts(database, 6)
    await query(database, "DELETE FROM sessions")
    await append(database, "k", Message.user("another conversation"))
    (source,) = await source_ids(database)
    before = await snapshot(database)
    with pytest.raises(InvalidInputError, match="another one has the key 'k'; give session_key="):
        await service.restore(source)
    assert await snapshot(database) == before
    restored = await service.restore(source, session_key="k again")
    assert (restored.session_key, restored.messages) == ("k again", 6)
    assert (await load(database, "k again")).message_count == 6
    assert said(await load(database, "k")) == ["another conversation"]


async def test_another_key_for_a_session_that_exists_is_refused(database: Database) -> None:
    service = await archived_in_parts(database, 6)
    (source,) = await source_ids(database)
    with pytest.raises(InvalidInputError, match="'k' still exists"):
        await service.restore(source, session_key="other")
    assert (await service.restore(source, session_key="k")).messages == 6


# Beside others


@pytest.mark.role("app", "worker")
async def test_a_worker_that_holds_its_chunks_passes_them_over(database: Database) -> None:
    service = await archived_in_parts(database, 6)
    (source,) = await source_ids(database)
    queue = EmbeddingQueue(database)
    lease = await queue.claim(100)
    assert lease.chunks
    await service.restore(source)
    await queue.complete(lease, lease.chunk_ids, [[1.0] * 1536] * len(lease.chunk_ids), "model")
    assert await chunks(database) == []


async def test_beside_appends_and_archives_nothing_is_lost_or_doubled(database: Database) -> None:
    service = await archived_in_parts(database, 6)
    total = 40

    async def write() -> None:
        for number in range(6, total):
            await append(database, "k", talk(1, start=number))

    async def archive() -> None:
        for _ in range(10):
            report = await service.run_once(NOW)
            assert report.failed == ()

    async def restore() -> int:
        restored = 0
        for _ in range(20):
            try:
                await service.restore(max(await source_ids(database), default=1))
                restored += 1
            except (NotFoundError, InvalidInputError):
                continue
        return restored

    *_, restored, again = await asyncio.gather(write(), archive(), archive(), restore(), restore())
    assert restored + again > 0
    await service.run_once(NOW)
    record = await load(database, "k")
    archived = [message["content"] for source in await sources(database) for message in source.archived_messages]
    assert archived == [f"message {number}" for number in range(total)]
    assert record.messages_offset + record.last_archived_message_index == total
