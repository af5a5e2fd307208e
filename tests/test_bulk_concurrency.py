"""Deleting and changing by filter while others are at work."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from bulk_data import (
    DAY,
    GUILD,
    JUNE,
    MINUTE,
    MODEL,
    TABLES,
    add,
    bury,
    embedded,
    everything,
    ids_of,
    plain,
    query,
    sizes,
    vectors,
    wrong_terms,
)

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    ErrorCode,
    KnowledgeRepository,
    Lease,
    LeaseLostError,
    Message,
    NewChunk,
    NotFoundError,
    Scope,
    SearchFilters,
    SessionArchiver,
    SessionRepository,
    StoreError,
)
from kotonoha_store.columns import pack_vector
from kotonoha_store.search_records import AnyFilters, BulkResult
from kotonoha_store.term_index import fill_terms

pytestmark = pytest.mark.role("app", "worker")

# Transactions


@pytest.mark.parametrize("change", ["delete", "update"])
async def test_a_rollback_leaves_all_as_it_was(database: Database, change: str) -> None:
    async with database.begin() as session:
        _, ids = await add(KnowledgeRepository(session), *plain("a", "b"), embedded("c"))
        await bury(session, ids[0])
        start = await everything(session)

    async def change_and_fail() -> None:
        async with database.begin() as session:
            if change == "delete":
                await KnowledgeRepository(session).delete_chunks(GUILD)
            else:
                await KnowledgeRepository(session).update_sources(GUILD, title="x", metadata={"a": 1})
            assert await everything(session) != start
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await change_and_fail()
    async with database.begin() as session:
        assert await everything(session) == start


async def seen_waiting(database: Database, number: int = 1) -> None:
    """Return once so many transactions wait for a lock."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(60):
        while True:
            async with database.begin() as session:
                if (await query(session, statement))[0] >= number:
                    return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def waiting_for(database: Database, change: Coroutine[Any, Any, Any]) -> AsyncIterator["asyncio.Task[Any]"]:
    """Start it, and go on once it waits for the caller."""
    task = asyncio.create_task(change)
    try:
        await seen_waiting(database)
        yield task
    except BaseException:
        task.cancel()
        raise


async def delete_by(database: Database, wanted: AnyFilters = GUILD, **options: Any) -> BulkResult:
    async with database.begin() as session:
        return await KnowledgeRepository(session).delete_chunks(wanted, **options)


async def update_by(database: Database, wanted: AnyFilters = GUILD, **options: Any) -> BulkResult:
    async with database.begin() as session:
        return await KnowledgeRepository(session).update_sources(wanted, **options)


async def added(database: Database, *new: NewChunk, **values: Any) -> tuple[int, list[int]]:
    async with database.begin() as session:
        return await add(KnowledgeRepository(session), *new, **values)


WRITES: dict[str, Callable[[EmbeddingQueue, Lease, Sequence[int]], Coroutine[Any, Any, Any]]] = {
    "complete": lambda queue, lease, ids: queue.complete(lease, ids, vectors(len(ids)), MODEL),
    "defer": lambda queue, lease, ids: queue.defer(lease, ids, MINUTE),
    "fail": lambda queue, lease, ids: queue.fail(lease, ids, ErrorCode.SERVER_ERROR, retry_in=MINUTE),
    "bury": lambda queue, lease, ids: queue.bury(lease, ids, ErrorCode.INVALID_INPUT),
}
each_write = pytest.mark.parametrize("write", WRITES)


@each_write
@pytest.mark.parametrize("max_attempts", [1, 3])
async def test_a_worker_passes_over_what_was_deleted_under_its_lease(
    database: Database, write: str, max_attempts: int
) -> None:
    queue = EmbeddingQueue(database, max_attempts=max_attempts)
    _, ours = await added(database, *plain("a", "b"))
    _, theirs = await added(database, *plain("c"), scope=Scope(2))
    lease = await queue.claim()
    assert (await delete_by(database)).chunks == 2
    await WRITES[write](queue, lease, [*ours, *theirs])
    async with database.begin() as session:
        left = set(await query(session, "SELECT original_chunk_id FROM knowledge_chunks_dlq"))
        left |= set(await ids_of(session, "knowledge_chunks"))
        assert left == set(theirs)
        assert await query(session, "SELECT 1 FROM embedding_jobs WHERE lease_token IS NOT NULL") == []


@each_write
@pytest.mark.parametrize("survives", [True, False])
async def test_a_worker_gets_on_while_its_chunks_are_being_deleted(
    database: Database, queue: EmbeddingQueue, write: str, survives: bool
) -> None:
    """``survives``: the source, by an older chunk that the filter does not keep."""
    old = [embedded("old", occurred_from=JUNE, occurred_to=JUNE)] if survives else []
    new = [NewChunk(content, occurred_from=JUNE + DAY, occurred_to=JUNE + DAY) for content in "ab"]
    source_id, ids = await added(database, *old, *new)
    ours = ids[len(old) :]
    _, theirs = await added(database, *plain("c"), scope=Scope(2))
    lease = await queue.claim()
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_chunks(GUILD & SearchFilters(since=JUNE + DAY))
        working = asyncio.create_task(WRITES[write](queue, lease, [*ours, *theirs]))
        # Whoever writes less than a vector or a dead letter does not even wait.
        await (seen_waiting(database) if write in ("complete", "bury") else asyncio.wait_for(working, 60))
    await asyncio.wait_for(working, 60)
    async with database.begin() as session:
        assert await ids_of(session, "knowledge_chunks") == [*ids[: len(old)], *([] if write == "bury" else theirs)]
        assert await ids_of(session, "knowledge_chunks_dlq", "original_chunk_id") == (theirs if write == "bury" else [])
        assert await query(session, "SELECT 1 FROM embedding_jobs WHERE lease_token IS NOT NULL") == []
        found = await query(session, "SELECT status::text FROM knowledge_sources WHERE id = :id", id=source_id)
        assert found == (["completed"] if survives else [])


async def test_it_waits_for_a_worker_that_is_writing_and_sees_what_it_wrote(
    database: Database, queue: EmbeddingQueue
) -> None:
    """By models, which the worker's write decides."""
    _, ids = await added(database, *plain("a", "b"))
    lease = await queue.claim()
    async with database.begin() as session:
        # Halfway through complete(): the source is locked, the vector written.
        await query(session, "SELECT 1 FROM knowledge_sources FOR NO KEY UPDATE")
        await query(session, "DELETE FROM embedding_jobs WHERE chunk_id = :id", id=ids[0])
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        await driver.execute(
            "UPDATE knowledge_chunks SET embedding = $2, embedding_model = $3 WHERE id = $1",
            ids[0],
            bytes(pack_vector(vectors(1)[0])),
            MODEL,
        )
        not_embedded = GUILD & ~SearchFilters(models=[MODEL])
        async with waiting_for(database, delete_by(database, not_embedded)) as deleting:
            pass
    assert await deleting == BulkResult(chunks=1, sources=0, dead_letters=0, dry_run=False)
    with pytest.raises(LeaseLostError):
        # The first one is embedded already, by whoever held its lease then.
        await queue.complete(lease, ids, vectors(2), MODEL)
    async with database.begin() as session:
        assert await query(session, "SELECT id FROM knowledge_chunks WHERE embedding IS NOT NULL") == ids[:1]
        assert await query(session, "SELECT status::text FROM knowledge_sources") == ["completed"]


async def test_a_chunk_added_before_the_lock_is_deleted_too(database: Database) -> None:
    source_id, _ = await added(database, *plain("a"))
    async with database.begin() as session:
        await KnowledgeRepository(session).add_chunks(source_id, plain("b", "c"))
        counted = await delete_by(database, dry_run=True)
        async with waiting_for(database, delete_by(database)) as deleting:
            pass
    assert counted == BulkResult(chunks=1, sources=1, dead_letters=0, dry_run=True)
    assert await deleting == BulkResult(chunks=3, sources=1, dead_letters=0, dry_run=False)
    async with database.begin() as session:
        assert (await sizes(session))[:5] == [0] * 5


async def test_a_chunk_added_after_the_lock_finds_no_source(database: Database) -> None:
    source_id, _ = await added(database, *plain("a"))

    async def add_late() -> None:
        async with database.begin() as session:
            await KnowledgeRepository(session).add_chunks(source_id, plain("late"))

    async with database.begin() as session:
        await KnowledgeRepository(session).delete_chunks(GUILD)
        async with waiting_for(database, add_late()) as adding:
            pass
    with pytest.raises(NotFoundError):
        await adding


@pytest.mark.role("superuser")
async def test_a_chunk_that_another_program_adds_without_locking_keeps_its_source(database: Database) -> None:
    """Its foreign key alone locks the source: it must not go by the cascade of a source that seemed empty."""
    source_id, ids = await added(database, *plain("a"))
    async with database.begin() as session:
        foreign = await query(
            session,
            "INSERT INTO knowledge_chunks (source_id, content, guild_id) VALUES (:id, 'other', 2) RETURNING id",
            id=source_id,
        )
        async with waiting_for(database, delete_by(database)) as deleting:
            pass
    assert await deleting == BulkResult(chunks=1, sources=0, dead_letters=0, dry_run=False)
    async with database.begin() as session:
        assert await ids_of(session, "knowledge_chunks") == foreign != ids
        assert await ids_of(session, "knowledge_sources") == [source_id]


@pytest.mark.role("superuser")
@pytest.mark.parametrize("change", ["delete", "update"])
async def test_sources_are_locked_first_and_in_order(database: Database, change: str) -> None:
    """While it waits for the first source it holds nothing of the others, nor any chunk, job or dead letter."""
    (first, chunks), (second, _), _ = [await added(database, *plain("a", "b")) for _ in range(3)]
    async with database.begin() as session:
        await bury(session, chunks[0])
        # What is read in another order than that of the ids: the first is last in the table now.
        await query(session, "UPDATE knowledge_sources SET uri = 'x' WHERE id = :id", id=first)
    work = delete_by(database) if change == "delete" else update_by(database, title="new", metadata={"a": 1})
    async with database.begin() as session:
        await query(session, "SELECT 1 FROM knowledge_sources WHERE id = :id FOR NO KEY UPDATE", id=first)
        async with waiting_for(database, work) as working, database.begin() as other:
            for table in ("knowledge_chunks", "embedding_jobs", "knowledge_chunks_dlq", "chunk_terms"):
                assert await query(other, f"SELECT 1 FROM {table} FOR UPDATE NOWAIT")
            rest = "SELECT id FROM knowledge_sources WHERE id <> :id ORDER BY id FOR UPDATE NOWAIT"
            assert (await query(other, rest, id=first))[0] == second
    assert (await working).sources == 3


async def test_dead_letters_that_no_source_guards_are_locked_in_order(database: Database) -> None:
    """Else two who delete the same ones could each hold what the other waits for."""
    _, ids = await added(database, *plain("a", "b", "c"))
    async with database.begin() as session:
        await bury(session, *ids)
        await query(session, "DELETE FROM knowledge_sources")
        first, *others = await ids_of(session, "knowledge_chunks_dlq")
        # It is read last now.
        await query(session, "UPDATE knowledge_chunks_dlq SET retry_count = 1 WHERE id = :id", id=first)
    async with database.begin() as session:
        await query(session, "SELECT 1 FROM knowledge_chunks_dlq WHERE id = :id FOR UPDATE", id=first)
        async with waiting_for(database, delete_by(database)) as deleting, database.begin() as other:
            rest = "SELECT id FROM knowledge_chunks_dlq WHERE id <> :id ORDER BY id FOR UPDATE NOWAIT"
            assert await query(other, rest, id=first) == others
    assert (await deleting).dead_letters == 3


@pytest.mark.role("superuser")
async def test_a_dry_run_waits_for_nobody(database: Database) -> None:
    await added(database, *plain("a"))
    async with database.begin() as session:
        await query(session, "LOCK TABLE knowledge_sources, knowledge_chunks, embedding_jobs IN EXCLUSIVE MODE")
        assert await asyncio.wait_for(delete_by(database, dry_run=True), 30) == BulkResult(1, 1, 0, True)
        assert await asyncio.wait_for(update_by(database, title="x", dry_run=True), 30) == BulkResult(1, 1, 0, True)


async def test_a_source_that_is_just_being_deleted_is_passed_over(database: Database) -> None:
    source_id, _ = await added(database, *plain("a"))
    other, _ = await added(database, *plain("b"))
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_source(source_id)
        async with waiting_for(database, delete_by(database)) as deleting:
            pass
    assert await deleting == BulkResult(chunks=1, sources=1, dead_letters=0, dry_run=False)
    with pytest.raises(NotFoundError):
        async with database.begin() as session:
            await KnowledgeRepository(session).delete_source(other)


async def test_a_document_added_again_while_it_is_deleted_is_there_afterwards(database: Database) -> None:
    async def put(*contents: str) -> Any:
        async with database.begin() as session:
            return await KnowledgeRepository(session).put_document(
                "title", plain(*contents), uri="https://example.com", scope=Scope(1)
            )

    await put("a", "b")
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_chunks(GUILD)
        async with waiting_for(database, put("b", "c")) as putting:
            pass
    result = await putting
    assert (result.added, result.kept) == (2, 0)
    async with database.begin() as session:
        assert (await sizes(session))[:5] == [1, 2, 2, 2, 0]


async def test_of_two_changes_the_second_sees_what_the_first_left(database: Database) -> None:
    await added(database, *plain("a"), metadata={"version": 1})
    wanted = GUILD & SearchFilters(metadata={"version": 1})
    async with database.begin() as session:
        done = await KnowledgeRepository(session).update_sources(wanted, metadata={"version": 2})
        assert done.sources == 1
        async with waiting_for(database, update_by(database, wanted, metadata={"version": 3})) as updating:
            pass
        async with waiting_for(database, delete_by(database, wanted)) as deleting:
            pass
    assert (await updating).sources == 0
    assert await deleting == BulkResult(0, 0, 0, False)
    async with database.begin() as session:
        assert await query(session, "SELECT metadata FROM knowledge_sources") == [{"version": 2}]


@pytest.mark.parametrize("by_migration", [True, False])
async def test_words_that_are_just_being_filled_in_are_waited_for(database: Database, by_migration: bool) -> None:
    """A migration does not lock the sources."""
    _, ids = await added(database, *plain("a", "b"))
    async with database.begin() as session:
        await query(session, "DELETE FROM chunk_terms")
    async with database.begin() as session:
        if by_migration:
            await query(session, "INSERT INTO chunk_terms (chunk_id, terms) SELECT id, '' FROM knowledge_chunks")
        else:
            await fill_terms(session)
        async with waiting_for(database, update_by(database, title="new")) as updating:
            pass
    assert (await updating).sources == 1
    async with database.begin() as session:
        assert await ids_of(session, "chunk_terms", "chunk_id") == ids
        assert await wrong_terms(session) == []


async def test_everybody_at_once(database: Database) -> None:
    """Nobody is killed by a deadlock, and no table has what another one lacks."""
    rng = random.Random(7)
    queue = EmbeddingQueue(database, max_attempts=1)
    archiver = SessionArchiver(database, idle_for=timedelta(0), min_session_length=1, overlap_messages=0)
    done: dict[str, int] = {}

    def wanted() -> AnyFilters:
        guild = SearchFilters(guild_id=rng.randint(1, 2))
        return rng.choice(
            [
                guild,
                guild & SearchFilters(user_id=rng.randint(1, 3)),
                guild & SearchFilters(since=JUNE + rng.randrange(5) * DAY),
                guild & ~SearchFilters(models=[MODEL]),
                SearchFilters(session_keys=[f"key {rng.randrange(4)}"]),
                SearchFilters(metadata={"n": rng.randrange(3)}) & guild,
            ]
        )

    def some() -> list[NewChunk]:
        times = [JUNE + rng.randrange(5) * DAY for _ in range(rng.randint(1, 4))]
        return [NewChunk(f"text {rng.randrange(9)}", occurred_from=time, occurred_to=time) for time in times]

    def scope() -> Scope:
        return Scope(guild_id=rng.randint(1, 2), user_id=rng.randint(1, 3))

    async def put() -> None:
        async with database.begin() as session:
            await KnowledgeRepository(session).put_document(
                f"title {rng.randrange(3)}",
                some(),
                uri=f"u{rng.randrange(6)}",
                scope=scope(),
                metadata={"n": rng.randrange(3)},
            )

    async def extend() -> None:
        async with database.begin() as session:
            knowledge = KnowledgeRepository(session)
            sources = await knowledge.list_sources(limit=50)
            if sources:
                await knowledge.add_chunks(rng.choice(sources).id, some())

    async def work() -> None:
        lease = await queue.claim(10)
        if lease.chunks:
            write = rng.choice(list(WRITES))
            await asyncio.sleep(rng.random() * 0.01)
            await WRITES[write](queue, lease, lease.chunk_ids)

    async def archive() -> None:
        async with database.begin() as session:
            await SessionRepository(session).append(
                f"key {rng.randrange(4)}",
                [Message.user(f"hello {rng.randrange(9)}")],
                guild_id=1,
            )
        report = await archiver.run_once()
        assert report.failed == ()

    async def delete_one() -> None:
        async with database.begin() as session:
            knowledge = KnowledgeRepository(session)
            if sources := await knowledge.list_sources(limit=50):
                await knowledge.delete_source(rng.choice(sources).id)

    async def delete() -> None:
        await delete_by(database, wanted())

    async def change() -> None:
        await update_by(database, wanted(), title=f"title {rng.randrange(3)}", metadata={"n": rng.randrange(3)})

    async def requeue() -> None:
        await queue.requeue()

    async def again(name: str, action: Callable[[], Coroutine[Any, Any, None]], pause: float) -> None:
        for _ in range(40):
            with suppress(NotFoundError, LeaseLostError):
                await action()
                done[name] = done.get(name, 0) + 1
            await asyncio.sleep(rng.random() * pause)

    actions: dict[str, tuple[Callable[[], Coroutine[Any, Any, None]], float]] = {
        "put": (put, 0.01),
        "extend": (extend, 0.02),
        "work": (work, 0.01),
        "archive": (archive, 0.05),
        "delete one": (delete_one, 0.05),
        "delete": (delete, 0.03),
        "delete too": (delete, 0.03),
        "change": (change, 0.02),
        "requeue": (requeue, 0.05),
    }
    async with asyncio.TaskGroup() as group:
        for name, (action, pause) in actions.items():
            group.create_task(again(name, action, pause))
    assert min(done.get(name, 0) for name in actions) > 5, done
    async with database.begin() as session:
        assert await wrong_terms(session) == []
        waiting = await query(session, "SELECT id FROM knowledge_chunks WHERE embedding IS NULL ORDER BY id")
        assert await ids_of(session, "embedding_jobs", "chunk_id") == waiting
        orphans = "SELECT 1 FROM knowledge_chunks_dlq d WHERE NOT EXISTS"
        assert await query(session, f"{orphans} (SELECT FROM knowledge_sources s WHERE s.id = d.source_id)") == []
        empty = (
            "SELECT 1 FROM knowledge_sources s WHERE NOT EXISTS (SELECT FROM knowledge_chunks WHERE source_id = s.id)"
            " AND NOT EXISTS (SELECT FROM knowledge_chunks_dlq WHERE source_id = s.id)"
        )
        assert await query(session, empty) == []
    for guild in (1, 2):
        counted = await delete_by(database, SearchFilters(guild_id=guild), dry_run=True)
        deleted = await delete_by(database, SearchFilters(guild_id=guild))
        assert (counted.chunks, counted.sources, counted.dead_letters) == (
            deleted.chunks,
            deleted.sources,
            deleted.dead_letters,
        )
    async with database.begin() as session:
        assert await sizes(session) == [0] * len(TABLES)


@pytest.mark.role("superuser")
async def test_a_failure_of_the_server_is_told_in_our_words(database: Database) -> None:
    await added(database, *plain("a"))
    async with database.begin() as session:
        await query(session, "DROP TABLE knowledge_chunks_dlq")
    with pytest.raises(StoreError, match="a table is missing"):
        await delete_by(database)
