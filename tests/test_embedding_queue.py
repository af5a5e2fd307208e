"""The queue: leases and their fence, dead letters, and the status that sources have in the end."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import pytest
from asyncpg.transaction import Transaction
from conftest import settings_for
from numpy.typing import NDArray
from sqlalchemy import URL, text

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    ErrorCode,
    InvalidInputError,
    InvalidVectorError,
    KnowledgeRepository,
    Lease,
    LeaseLostError,
    NewChunk,
    NotFoundError,
    Scope,
    Settings,
    SourceRecord,
    SourceType,
    StoreUnavailableError,
    embedding_queue,
    queue_statements,
)
from kotonoha_store.prepared import Prepared

pytestmark = pytest.mark.role("worker")

MODEL = "test-model"
MINUTE = timedelta(minutes=1)


@pytest.fixture
def queue(database: Database) -> EmbeddingQueue:
    return EmbeddingQueue(database)


async def add(database: Database, *contents: str, title: str = "a source") -> tuple[int, list[int]]:
    """Add a source with these chunks; return its id and theirs."""
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, title, scope=Scope(guild_id=1))
        return source_id, await knowledge.add_chunks(source_id, [NewChunk(content=content) for content in contents])


async def sql(database: Database, statement: str, **parameters: Any) -> list[Any]:
    async with database.begin() as session:
        result = await session.execute(text(statement), parameters)
        return [tuple(row) if len(row) > 1 else row[0] for row in result] if result.returns_rows else []


async def expire(database: Database, *chunk_ids: int) -> None:
    """End the leases, and the waiting, of these jobs, or of all."""
    which = f"WHERE chunk_id = ANY(ARRAY{list(chunk_ids)}::bigint[])" if chunk_ids else ""
    await sql(database, f"UPDATE embedding_jobs SET available_at = now() - interval '1 second' {which}")


async def jobs(database: Database) -> list[tuple[Any, ...]]:
    return await sql(
        database, "SELECT chunk_id, lease_token, attempts, error_code, available_at FROM embedding_jobs ORDER BY 1"
    )


async def embedded(database: Database) -> list[int]:
    return await sql(database, "SELECT id FROM knowledge_chunks WHERE embedding IS NOT NULL ORDER BY id")


async def source(database: Database, source_id: int) -> SourceRecord:
    async with database.begin() as session:
        return await KnowledgeRepository(session).get_source(source_id)


async def delete_source(database: Database, source_id: int) -> None:
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_source(source_id)


def vectors(n: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, 1536)).astype(np.float32)


async def complete(queue: EmbeddingQueue, lease: Lease, chunk_ids: Sequence[int]) -> None:
    await queue.complete(lease, chunk_ids, vectors(len(chunk_ids)), MODEL)


# Claiming


async def test_the_longest_due_come_first_and_equal_ones_by_id(database: Database, queue: EmbeddingQueue) -> None:
    _, (a, b, c, d, e) = await add(database, *"abcde")
    # In one statement, so that equal ones are equal.
    await sql(
        database,
        "UPDATE embedding_jobs SET available_at = now() - make_interval(secs => seconds)"
        f" FROM (VALUES ({a}, 10), ({b}, 30), ({c}, 20), ({d}, 20), ({e}, -3600)) AS due (id, seconds)"
        " WHERE chunk_id = id",
    )
    assert [(await queue.claim(1)).chunk_ids for _ in range(5)] == [(b,), (c,), (d,), (a,), ()]


async def test_a_claim_takes_no_more_than_its_limit(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, *map(str, range(10)))
    lease = await queue.claim(3)
    assert lease.chunk_ids == tuple(ids[:3])
    assert [(c.source_id, c.content, c.attempt) for c in lease.chunks] == [(source_id, str(i), 1) for i in range(3)]
    assert sum(row[1] == lease.token for row in await jobs(database)) == 3
    assert len((await queue.claim(100)).chunks) == 7
    empty = await queue.claim()
    assert (empty.chunks, empty.expires_at) == ((), None)


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_claim_of_nothing_is_refused(queue: EmbeddingQueue, limit: int) -> None:
    with pytest.raises(InvalidInputError, match="limit"):
        await queue.claim(limit)


async def test_the_lease_ends_when_it_says(database: Database) -> None:
    await add(database, "a")
    [before] = await sql(database, "SELECT now()")
    lease = await EmbeddingQueue(database, lease=timedelta(seconds=90)).claim()
    [after] = await sql(database, "SELECT now()")
    assert lease.expires_at is not None
    assert before <= lease.expires_at - timedelta(seconds=90) <= after
    assert (await jobs(database))[0][4] == lease.expires_at


async def test_a_short_lease_runs_out_by_itself(database: Database) -> None:
    _, ids = await add(database, "a")
    queue = EmbeddingQueue(database, lease=timedelta(milliseconds=300))
    first = await queue.claim()
    async with asyncio.timeout(30):
        while not (second := await queue.claim()).chunks:  # noqa: ASYNC110  the server's clock
            await asyncio.sleep(0.05)
    # Not before: a claim's own moment is where its lease begins.
    assert first.expires_at is not None
    assert second.expires_at is not None
    assert second.expires_at - queue.lease >= first.expires_at
    assert second.chunk_ids == tuple(ids)
    assert [chunk.attempt for chunk in second.chunks] == [2]
    with pytest.raises(LeaseLostError):
        await complete(queue, first, ids)


async def test_no_two_of_many_claimers_share_a_chunk(database: Database, migrated_url: URL) -> None:
    _, ids = await add(database, *map(str, range(300)))
    async with Database(migrated_url, settings_for(migrated_url)) as other:

        async def claimer(queue: EmbeddingQueue) -> list[int]:
            taken: list[int] = []
            # An empty answer may also mean that others are just taking what is left: they will have it.
            while (lease := await queue.claim(7)).chunks:
                taken.extend(lease.chunk_ids)
            return taken

        taken = await asyncio.gather(*(claimer(EmbeddingQueue(db)) for db in (database, other) for _ in range(8)))
    assert sorted(chain(*taken)) == ids
    assert {row[2] for row in await jobs(database)} == {1}


async def test_the_claim_counts_the_attempt_and_buries_what_had_its_last(
    database: Database, queue: EmbeddingQueue
) -> None:
    source_id, (killer, other) = await add(database, "kills its worker", "harmless")
    await sql(database, "UPDATE embedding_jobs SET available_at = now() + interval '1 h' WHERE chunk_id = :i", i=other)
    for attempt in (1, 2, 3):
        (chunk,) = (await queue.claim()).chunks
        assert (chunk.chunk_id, chunk.attempt) == (killer, attempt)
        await expire(database, killer)
    await expire(database)

    lease = await queue.claim()

    assert lease.chunk_ids == (other,)
    (letter,) = await queue.dead_letters()
    assert (letter.original_chunk_id, letter.source_id, letter.source_title) == (killer, source_id, "a source")
    assert letter.error_code == ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED
    await complete(queue, lease, [other])
    assert (await source(database, source_id)).status == "partial"


async def test_a_claim_that_loses_its_lease_before_the_burial_goes_on(database: Database) -> None:
    await add(database, "a")
    await sql(database, "UPDATE embedding_jobs SET attempts = 3")
    queue = EmbeddingQueue(database)

    async def bury(*_: object, **__: object) -> None:
        raise LeaseLostError("taken", [1])

    queue.bury = bury  # type: ignore[method-assign]
    assert (await queue.claim()).chunks == ()


async def test_the_first_claim_sets_the_source_to_processing(database: Database, queue: EmbeddingQueue) -> None:
    first, _ = await add(database, "a")
    second, _ = await add(database, "b")
    await queue.claim(1)
    assert ((await source(database, first)).status, (await source(database, second)).status) == (
        "processing",
        "pending",
    )


async def test_the_claim_does_not_wait_for_a_locked_source(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, "a")
    async with database.begin() as session:
        await session.execute(text("SELECT id FROM knowledge_sources FOR UPDATE"))
        async with asyncio.timeout(30):
            lease = await queue.claim()
    assert lease.chunk_ids == tuple(ids)
    await complete(queue, lease, ids)
    assert (await source(database, source_id)).status == "completed"


async def test_a_very_long_text_passes_through(database: Database, queue: EmbeddingQueue) -> None:
    content = "梅雨" * 170_000  # 1 MB in UTF-8
    _, ids = await add(database, content)
    lease = await queue.claim()
    assert lease.chunks[0].content == content
    await queue.bury(lease, ids, ErrorCode.INVALID_INPUT)
    assert (await queue.dead_letters())[0].content == content
    assert await queue.requeue() == 1
    assert (await queue.claim()).chunks[0].content == content


# Completing


async def test_complete_writes_vector_and_model_and_ends_the_job(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, *"abc")
    # Batches of one row less than there are.
    queue = EmbeddingQueue(database, update_batch_size=2)
    lease = await queue.claim()
    given = vectors(3)
    await queue.complete(lease, ids[::-1], given, MODEL)

    async with database.begin() as session:
        rows = (
            await session.execute(text("SELECT id, embedding::text, embedding_model FROM knowledge_chunks ORDER BY id"))
        ).all()
    stored = np.array([np.fromstring(row.embedding.strip("[]"), sep=",") for row in rows])
    np.testing.assert_allclose(stored, given[::-1].astype(np.float16), rtol=1e-3)
    assert {row.embedding_model for row in rows} == {MODEL}
    assert await jobs(database) == []
    assert (await source(database, source_id)).status == "completed"


async def test_a_chunk_row_is_updated_once(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "a")
    # Each version of the row takes the next place on its page.
    lease = await queue.claim()
    await complete(queue, lease, lease.chunk_ids)
    assert await sql(database, "SELECT ctid::text FROM knowledge_chunks") == ["(0,2)"]


async def test_a_source_is_completed_with_its_last_chunk(database: Database, queue: EmbeddingQueue) -> None:
    source_id, (a, b) = await add(database, "a", "b")
    lease = await queue.claim()
    await complete(queue, lease, [a])
    assert (await source(database, source_id)).status == "processing"
    await complete(queue, lease, [b])
    assert (await source(database, source_id)).status == "completed"


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e6])
async def test_vectors_are_checked_before_anything_is_written(
    database: Database, queue: EmbeddingQueue, number: float
) -> None:
    _, ids = await add(database, *"abc")
    lease = await queue.claim()
    bad = vectors(3)
    bad[2, 7] = number
    with pytest.raises(InvalidVectorError, match="vector 2"):
        await queue.complete(lease, ids, bad, MODEL)
    assert await embedded(database) == []
    await complete(queue, lease, ids)
    assert await embedded(database) == ids


@pytest.mark.parametrize(
    ("given", "model"), [(vectors(1), MODEL), (vectors(3), MODEL), (vectors(2), ""), (vectors(2)[:, :768], MODEL)]
)
async def test_vectors_must_fit_the_chunks(
    database: Database, queue: EmbeddingQueue, given: NDArray[np.float32], model: str
) -> None:
    _, ids = await add(database, "a", "b")
    lease = await queue.claim()
    with pytest.raises(InvalidInputError):
        await queue.complete(lease, ids, given, model)
    assert await embedded(database) == []
    assert [row[1] for row in await jobs(database)] == [lease.token] * 2


async def test_chunks_that_were_deleted_meanwhile_are_passed_over(database: Database, queue: EmbeddingQueue) -> None:
    source_id, (a, b) = await add(database, "a", "b")
    lease = await queue.claim()
    await sql(database, "DELETE FROM knowledge_chunks WHERE id = :id", id=a)
    await complete(queue, lease, [a, b])
    assert await embedded(database) == [b]
    assert (await source(database, source_id)).status == "completed"


Write: TypeAlias = Callable[[EmbeddingQueue, Lease, Sequence[int]], Coroutine[Any, Any, Any]]
WRITES: dict[str, Write] = {
    "complete": complete,
    "defer": lambda queue, lease, ids: queue.defer(lease, ids, MINUTE, ErrorCode.RATE_LIMIT),
    "fail": lambda queue, lease, ids: queue.fail(lease, ids, ErrorCode.SERVER_ERROR, retry_in=MINUTE),
    "bury": lambda queue, lease, ids: queue.bury(lease, ids, ErrorCode.INVALID_INPUT),
}
each_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


@pytest.mark.role("app", "worker")
@each_write
async def test_a_source_deleted_while_it_is_leased_is_passed_over(
    database: Database, queue: EmbeddingQueue, write: Write
) -> None:
    source_id, ids = await add(database, "a", "b")
    lease = await queue.claim()
    await delete_source(database, source_id)
    await write(queue, lease, ids)
    assert await sql(database, "SELECT count(*) FROM knowledge_chunks_dlq") == [0]
    assert await jobs(database) == []


# The fence


async def everything(database: Database) -> list[Any]:
    tables = ("embedding_jobs", "knowledge_chunks", "knowledge_sources", "knowledge_chunks_dlq")
    return [await sql(database, f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1") for table in tables]


@pytest.mark.parametrize("max_attempts", [1, 3])
@each_write
async def test_a_worker_that_lost_its_lease_changes_nothing(
    database: Database, write: Write, max_attempts: int
) -> None:
    queue = EmbeddingQueue(database, max_attempts=max_attempts)
    _, ids = await add(database, "a", "b")
    late = await queue.claim()
    await expire(database)
    # Its attempts stay below the limit, so that it is not buried.
    await sql(database, "UPDATE embedding_jobs SET attempts = 0")
    for _ in ids:
        await EmbeddingQueue(database).claim()
    before = await everything(database)

    with pytest.raises(LeaseLostError) as raised:
        await write(queue, late, ids)

    assert raised.value.chunk_ids == tuple(ids)
    assert await everything(database) == before


@each_write
async def test_an_expired_lease_that_nobody_took_still_holds(
    database: Database, queue: EmbeddingQueue, write: Write
) -> None:
    _, ids = await add(database, "a")
    lease = await queue.claim()
    await expire(database)
    await write(queue, lease, ids)
    assert [row for row in await jobs(database) if row[1] is not None] == []


@each_write
async def test_the_part_of_the_lease_that_is_left_is_written(
    database: Database, queue: EmbeddingQueue, write: Write
) -> None:
    _, (a, b, c) = await add(database, *"abc")
    late = await queue.claim()
    await expire(database, b)
    other = await queue.claim()
    assert other.chunk_ids == (b,)

    with pytest.raises(LeaseLostError) as raised:
        await write(queue, late, [a, b, c])

    assert raised.value.chunk_ids == (b,)
    # Whatever was written, a and c are leased no more, and b still is.
    assert [row[:3] for row in await jobs(database) if row[1] is not None] == [(b, other.token, 2)]
    await complete(queue, other, [b])


@each_write
async def test_a_lease_cannot_be_used_twice(database: Database, queue: EmbeddingQueue, write: Write) -> None:
    _, ids = await add(database, "a")
    lease = await queue.claim()
    await write(queue, lease, ids)
    before = await everything(database)
    with pytest.raises(LeaseLostError):
        await write(queue, lease, ids)
    assert await everything(database) == before


@each_write
async def test_chunks_of_another_lease_are_refused(database: Database, queue: EmbeddingQueue, write: Write) -> None:
    await add(database, "a", "b")
    mine, other = await queue.claim(1), await queue.claim(1)
    before = await everything(database)
    with pytest.raises(LeaseLostError) as raised:
        await write(queue, mine, other.chunk_ids)
    assert raised.value.chunk_ids == other.chunk_ids
    assert await everything(database) == before


# Deferring and failing


async def test_defer_gives_the_attempt_back(database: Database, queue: EmbeddingQueue) -> None:
    _, ids = await add(database, "a")
    for _ in range(5):
        lease = await queue.claim()
        assert lease.chunks[0].attempt == 1
        await queue.defer(lease, ids, timedelta(hours=1), ErrorCode.RATE_LIMIT)
        ((_, token, attempts, code, available_at),) = await jobs(database)
        assert (token, attempts, code) == (None, 0, "RATE_LIMIT")
        assert timedelta(minutes=59) < available_at - datetime.now(UTC) < timedelta(minutes=61)
        assert (await queue.claim()).chunks == ()
        await expire(database)


async def test_fail_waits_and_remembers_why(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, "a")
    lease = await queue.claim()
    assert await queue.fail(lease, ids, ErrorCode.SERVER_ERROR, retry_in=timedelta(minutes=5)) == []
    ((_, token, attempts, code, available_at),) = await jobs(database)
    assert (token, attempts, code) == (None, 1, "SERVER_ERROR")
    assert timedelta(minutes=4) < available_at - datetime.now(UTC) < timedelta(minutes=6)
    found = await source(database, source_id)
    assert (found.status, found.error_code) == ("processing", None)
    await expire(database)
    assert (await queue.claim()).chunks[0].attempt == 2


async def test_the_last_failed_attempt_makes_a_dead_letter(database: Database, queue: EmbeddingQueue) -> None:
    source_id, (a, b) = await add(database, "secret a", "secret b")
    done = await queue.claim(1)
    await complete(queue, done, [a])
    for attempt in (1, 2, 3):
        lease = await queue.claim()
        buried = await queue.fail(lease, [b], ErrorCode.SERVER_ERROR, retry_in=timedelta(0), model=MODEL)
        assert buried == ([b] if attempt == 3 else [])

    (letter,) = await queue.dead_letters()
    assert (letter.original_chunk_id, letter.content, letter.retry_count) == (b, "secret b", 3)
    assert letter.error_code == ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED
    assert letter.error_message == embedding_queue.ERROR_MESSAGES[ErrorCode.SERVER_ERROR]
    found = await source(database, source_id)
    assert (found.status, found.error_code) == ("partial", "EMBEDDING_MAX_RETRIES_EXCEEDED")
    assert found.error_message == letter.error_message
    assert await sql(database, "SELECT id FROM knowledge_chunks") == [a]


async def test_a_source_whose_every_chunk_died_has_failed(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, "a", "b")
    lease = await queue.claim()
    await queue.bury(lease, ids[:1], ErrorCode.INVALID_INPUT)
    assert (await source(database, source_id)).status == "processing"
    await queue.bury(lease, ids[1:], ErrorCode.INVALID_INPUT)
    found = await source(database, source_id)
    assert (found.status, found.error_code) == ("failed", "INVALID_INPUT")


async def test_fail_tells_which_were_buried_and_not_which_were_deleted(database: Database) -> None:
    queue = EmbeddingQueue(database, max_attempts=1)
    _, (a, b) = await add(database, "a", "b")
    lease = await queue.claim()
    await sql(database, "DELETE FROM knowledge_chunks WHERE id = :id", id=a)
    assert await queue.fail(lease, [a, b], ErrorCode.SERVER_ERROR, retry_in=MINUTE) == [b]


def test_every_code_has_a_message() -> None:
    assert set(embedding_queue.ERROR_MESSAGES) == set(ErrorCode)


# Dead letters and back


async def test_a_dead_letter_keeps_everything_and_a_requeue_brings_it_back(
    database: Database, queue: EmbeddingQueue
) -> None:
    said = datetime(2024, 6, 1, 12, tzinfo=UTC)
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(
            SourceType.AUDIO_TRANSCRIPT,
            "梅雨の話",
            scope=Scope(guild_id=2**62 + 1, channel_id=2, thread_id=3, user_id=4),
        )
        chunk = NewChunk(
            content="梅雨は雨の多い季節です。",
            location={"url": "https://example.com", "first_message_id": 2**62 + 1, "label": "四"},
            token_count=17,
            occurred_from=said,
            occurred_to=said + MINUTE,
        )
        ids = await knowledge.add_chunks(source_id, [chunk])
    await sql(database, "UPDATE knowledge_chunks SET created_at = '2024-06-02 00:00Z'")
    before = await sql(database, "SELECT to_jsonb(c)::text FROM knowledge_chunks c")

    await queue.bury(await queue.claim(), ids, ErrorCode.INVALID_INPUT, model=MODEL)

    assert await sql(database, "SELECT count(*) FROM knowledge_chunks") == [0]
    assert await jobs(database) == []
    ((kind, model, created, hashed, retries),) = await sql(
        database,
        "SELECT source_type::text, embedding_model, chunk_created_at, content_hash, retry_count"
        " FROM knowledge_chunks_dlq",
    )
    assert (kind, model, retries) == ("audio_transcript", MODEL, 1)
    assert created == datetime(2024, 6, 2, tzinfo=UTC)
    assert len(hashed) == 32
    (letter,) = await queue.dead_letters()
    assert (letter.original_chunk_id, letter.source_id, letter.source_title) == (ids[0], source_id, "梅雨の話")

    assert await queue.requeue([letter.id]) == 1

    assert await sql(database, "SELECT to_jsonb(c)::text FROM knowledge_chunks c") == before
    assert await queue.dead_letters() == []
    (chunk_again,) = (await queue.claim()).chunks
    assert (chunk_again.chunk_id, chunk_again.attempt) == (ids[0], 1)


async def test_a_failed_source_is_processed_again(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, "a")
    await queue.bury(await queue.claim(), ids, ErrorCode.INVALID_INPUT)
    await queue.requeue()
    found = await source(database, source_id)
    assert (found.status, found.error_code, found.error_message) == ("processing", None, None)
    await complete(queue, await queue.claim(), ids)
    assert (await source(database, source_id)).status == "completed"


async def test_a_partial_source_stays_partial_until_all_is_embedded(database: Database, queue: EmbeddingQueue) -> None:
    source_id, (a, b) = await add(database, "a", "b")
    lease = await queue.claim()
    await complete(queue, lease, [a])
    await queue.bury(lease, [b], ErrorCode.INVALID_INPUT)
    assert (await source(database, source_id)).status == "partial"
    await queue.requeue()
    assert (await source(database, source_id)).status == "partial"
    await complete(queue, await queue.claim(), [b])
    assert (await source(database, source_id)).status == "completed"


async def test_requeue_takes_what_meets_every_condition(database: Database, queue: EmbeddingQueue) -> None:
    first, (a, b) = await add(database, "a", "b")
    second, (c, d) = await add(database, "c", "d")
    lease = await queue.claim()
    await queue.bury(lease, [a, c], ErrorCode.INVALID_INPUT)
    await queue.bury(lease, [b, d], ErrorCode.UNKNOWN_ERROR)
    letters = {letter.original_chunk_id: letter.id for letter in await queue.dead_letters()}
    assert [set(list(letters)[:2]), set(list(letters)[2:])] == [{a, c}, {b, d}]

    assert await queue.requeue([]) == 0
    assert await queue.requeue([letters[a]], error_code=ErrorCode.UNKNOWN_ERROR) == 0
    assert await queue.requeue(source_id=first, error_code="INVALID_INPUT") == 1
    assert (await queue.claim()).chunk_ids == (a,)
    assert await queue.requeue([letters[a], letters[d]]) == 1
    assert (await queue.claim()).chunk_ids == (d,)
    assert await queue.requeue(source_id=second) == 1
    assert (await queue.claim()).chunk_ids == (c,)
    assert await queue.requeue() == 1
    assert (await queue.claim()).chunk_ids == (b,)


@pytest.mark.role("app", "worker")
async def test_dead_letters_of_a_source_that_is_gone_stay(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, "a", "b")
    await queue.bury(await queue.claim(), ids, ErrorCode.INVALID_INPUT)
    # Not by delete_source(), which takes the letters along.
    await sql(database, "DELETE FROM knowledge_sources WHERE id = :id", id=source_id)
    assert await queue.requeue() == 0
    assert len(await queue.dead_letters()) == 2


@pytest.mark.role("app", "worker")
async def test_deleting_a_source_takes_its_dead_letters_along(database: Database, queue: EmbeddingQueue) -> None:
    source_id, ids = await add(database, "a")
    await queue.bury(await queue.claim(), ids, ErrorCode.INVALID_INPUT)
    await delete_source(database, source_id)
    assert await queue.dead_letters() == []
    with pytest.raises(NotFoundError):
        await source(database, source_id)


async def test_dead_letters_of_the_first_implementation_are_queued_as_new_chunks(
    database: Database, queue: EmbeddingQueue
) -> None:
    source_id, (existing,) = await add(database, "a")
    await sql(
        database,
        "INSERT INTO knowledge_chunks_dlq (source_id, content, original_chunk_id, retry_count, error_code)"
        " VALUES (:s, 'no id', NULL, 3, 'X'), (:s, 'no id either', NULL, 3, 'X'), (:s, 'still there', :e, 3, 'X'),"
        " (NULL, 'no source', NULL, 3, 'X')",
        s=source_id,
        e=existing,
    )
    assert await queue.requeue() == 2
    assert {letter.content for letter in await queue.dead_letters()} == {"still there", "no source"}
    lease = await queue.claim()
    assert {(chunk.content, chunk.attempt) for chunk in lease.chunks} == {("a", 1), ("no id", 1), ("no id either", 1)}
    assert len(set(lease.chunk_ids)) == 3
    await complete(queue, lease, lease.chunk_ids)


async def test_a_chunk_that_was_buried_twice_comes_back_once(database: Database, queue: EmbeddingQueue) -> None:
    source_id, _ = await add(database, "a")
    await sql(
        database,
        "INSERT INTO knowledge_chunks_dlq (source_id, content, original_chunk_id)"
        " SELECT :s, 'embedded by two workers at once', 1000 FROM generate_series(1, 2)",
        s=source_id,
    )
    assert await queue.requeue() == 1
    assert await queue.dead_letters() == []
    assert 1000 in (await queue.claim()).chunk_ids


async def test_requeue_of_more_sources_than_a_statement_takes_parameters(settings: Settings) -> None:
    n = 33_000
    # So many rows may take a busy server longer than the usual limit.
    async with await Database.open(settings.model_copy(update={"db_command_timeout": 600.0})) as database:
        await sql(
            database,
            "WITH s AS (INSERT INTO knowledge_sources (type, title, status) SELECT 'web_page', 'x', 'failed'"
            " FROM generate_series(1, :n) RETURNING id)"
            " INSERT INTO knowledge_chunks_dlq (source_id, content) SELECT id, 'a' FROM s",
            n=n,
        )
        ids = await sql(database, "SELECT id FROM knowledge_chunks_dlq")
        assert await EmbeddingQueue(database).requeue(ids) == n
        assert await sql(database, "SELECT DISTINCT status::text FROM knowledge_sources") == ["processing"]


async def test_requeues_at_once_queue_each_letter_once(database: Database, queue: EmbeddingQueue) -> None:
    _, ids = await add(database, *map(str, range(20)))
    await queue.bury(await queue.claim(), ids, ErrorCode.INVALID_INPUT)
    assert sum(await asyncio.gather(*(queue.requeue() for _ in range(5)))) == 20
    assert (await queue.claim()).chunk_ids == tuple(ids)


async def test_dead_letters_are_paged_by_id(database: Database, queue: EmbeddingQueue) -> None:
    _, ids = await add(database, *map(str, range(5)))
    await queue.bury(await queue.claim(), ids, ErrorCode.INVALID_INPUT)
    pages: list[list[str]] = []
    after = 0
    while page := await queue.dead_letters(after_id=after, limit=2):
        pages.append([letter.content for letter in page])
        after = page[-1].id
    assert [len(page) for page in pages] == [2, 2, 1]
    assert sorted(chain(*pages)) == list("01234")


async def test_depth_counts_ready_waiting_and_dead(database: Database, queue: EmbeddingQueue) -> None:
    empty = await queue.depth()
    assert (empty.ready, empty.waiting, empty.dead, empty.oldest_seconds) == (0, 0, 0, None)
    _, ids = await add(database, *map(str, range(6)))
    await sql(
        database, "UPDATE embedding_jobs SET created_at = now() - interval '90 s' WHERE chunk_id = :id", id=ids[5]
    )
    lease = await queue.claim(3)
    await queue.bury(lease, ids[:1], ErrorCode.INVALID_INPUT)
    await queue.defer(lease, ids[1:2], MINUTE)
    depth = await queue.depth()
    assert (depth.ready, depth.waiting, depth.dead) == (3, 2, 1)
    assert depth.oldest_seconds is not None
    assert 90 <= depth.oldest_seconds < 190


# Together


def without_lock() -> Prepared:
    """The fenced end of jobs alone."""
    sql = "DELETE FROM embedding_jobs WHERE chunk_id = ANY ($1::bigint[]) AND lease_token = $2 RETURNING chunk_id"
    return Prepared(sql, ("ids", "token"), {})


@pytest.mark.parametrize(("locked", "status"), [(True, "completed"), (False, "processing")])
async def test_two_that_finish_a_source_together_leave_it_completed(
    database: Database, migrated_url: URL, monkeypatch: pytest.MonkeyPatch, locked: bool, status: str
) -> None:
    """The second case is the control: without the lock this interleaving does lose the status."""
    source_id, (a, b) = await add(database, "a", "b")
    recompute = embedding_queue.recompute_status
    both_have_written, both_have_looked = asyncio.Barrier(2), asyncio.Barrier(2)

    async def together(driver: Any, source_ids: Sequence[int]) -> None:
        async def meet(barrier: asyncio.Barrier) -> None:
            # With the lock nobody else comes here: the other waits for the source.
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5 if locked else 30):
                    await barrier.wait()

        await meet(both_have_written)
        await recompute(driver, source_ids)
        await meet(both_have_looked)

    monkeypatch.setattr(embedding_queue, "recompute_status", together)
    if not locked:
        monkeypatch.setattr(queue_statements, "finish", without_lock)
    async with Database(migrated_url, settings_for(migrated_url)) as other:
        queues = EmbeddingQueue(database), EmbeddingQueue(other)
        leases = [await queue.claim(1) for queue in queues]
        async with asyncio.timeout(100):
            await asyncio.gather(*map(complete, queues, leases, ([a], [b])))
    assert await embedded(database) == [a, b]
    assert (await source(database, source_id)).status == status


@pytest.mark.role("app", "worker")
@pytest.mark.parametrize(
    ("write", "locked"), [(WRITES["complete"], True), (WRITES["complete"], False), (WRITES["bury"], True)]
)
async def test_a_source_deleted_in_the_middle_of_a_write_waits_for_it(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch, write: Write, locked: bool
) -> None:
    """Without the lock, the control, this is a deadlock: the one has the source, the other the chunk."""
    source_id, ids = await add(database, "a")
    lease = await queue.claim()
    recompute = embedding_queue.recompute_status
    deleting: list[asyncio.Task[None]] = []
    waiting = (
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE NOT granted AND datname = current_database()"
    )

    async def meanwhile(driver: Any, source_ids: Sequence[int]) -> None:
        deleting.append(asyncio.create_task(delete_source(database, source_id)))
        async with asyncio.timeout(30):
            while await sql(database, waiting) == [0]:  # noqa: ASYNC110  the database tells nobody
                await asyncio.sleep(0.01)
        await recompute(driver, source_ids)

    monkeypatch.setattr(embedding_queue, "recompute_status", meanwhile)
    if not locked:
        monkeypatch.setattr(queue_statements, "finish", without_lock)
    results = [*await asyncio.gather(write(queue, lease, ids), return_exceptions=True)]
    results += await asyncio.gather(*deleting, return_exceptions=True)
    if not locked:
        assert [type(result) for result in results if result is not None] == [StoreUnavailableError]
        return
    assert results == [None, None]
    assert await everything(database) == [[], [], [], []]


@pytest.mark.role("app", "worker")
async def test_deleting_sources_while_their_chunks_are_written_does_not_deadlock(
    database: Database, queue: EmbeddingQueue
) -> None:
    for _ in range(25):
        sources = [await add(database, "a", "b", "c") for _ in range(3)]
        lease = await queue.claim()
        first, second, third = (list(ids) for ids in zip(*(ids for _, ids in sources), strict=True))
        await asyncio.gather(
            complete(queue, lease, first),
            queue.bury(lease, second[::-1], ErrorCode.INVALID_INPUT),
            queue.fail(lease, third, ErrorCode.SERVER_ERROR, retry_in=timedelta(0)),
            *(delete_source(database, source_id) for source_id, _ in sources[::-1]),
            queue.claim(),
            queue.requeue(),
        )
        # A requeue can have come between; whatever it was, no source is left and nothing of one.
        assert await sql(database, "SELECT count(*) FROM knowledge_chunks") == [0]
        assert await jobs(database) == []
        await sql(database, "DELETE FROM knowledge_chunks_dlq")


# Broken connections


async def test_a_backend_killed_in_the_middle_leaves_nothing_half_written(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_id, ids = await add(database, "a", "b")
    lease = await queue.claim()
    recompute = embedding_queue.recompute_status

    async def killed(driver: Any, source_ids: Sequence[int]) -> None:
        await driver.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    monkeypatch.setattr(embedding_queue, "recompute_status", killed)
    for write in (complete, WRITES["bury"]):
        with pytest.raises(StoreUnavailableError):
            await write(queue, lease, ids)
        assert await embedded(database) == []
        assert await queue.dead_letters() == []
        assert [row[:3] for row in await jobs(database)] == [(chunk_id, lease.token, 1) for chunk_id in ids]

    monkeypatch.setattr(embedding_queue, "recompute_status", recompute)
    await complete(queue, lease, ids)
    assert (await source(database, source_id)).status == "completed"


async def test_an_answer_lost_after_the_commit_can_be_asked_for_again(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_id, ids = await add(database, "a")
    lease = await queue.claim()
    commit = Transaction._Transaction__commit

    async def lost_answer(transaction: Transaction) -> None:
        await commit(transaction)
        raise ConnectionResetError

    monkeypatch.setattr(Transaction, "_Transaction__commit", lost_answer)
    with pytest.raises(StoreUnavailableError):
        await complete(queue, lease, ids)
    monkeypatch.setattr(Transaction, "_Transaction__commit", commit)
    before = await everything(database)
    with pytest.raises(LeaseLostError):
        await complete(queue, lease, ids)
    assert await everything(database) == before
    assert (await source(database, source_id)).status == "completed"


async def test_a_cancelled_write_is_undone_as_a_whole(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = await add(database, "a", "b")
    lease = await queue.claim()
    reached = asyncio.Event()
    recompute = embedding_queue.recompute_status

    async def stuck(*_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(embedding_queue, "recompute_status", stuck)
    task = asyncio.create_task(complete(queue, lease, ids))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await embedded(database) == []
    monkeypatch.setattr(embedding_queue, "recompute_status", recompute)
    await complete(queue, lease, ids)
    assert await embedded(database) == ids


async def test_only_the_sources_of_what_was_buried_are_blamed(database: Database, queue: EmbeddingQueue) -> None:
    lost_source, [lost_chunk] = await add(database, "lost")
    held_source, [held_chunk] = await add(database, "held")
    lease = await queue.claim()
    async with database.begin() as session:
        await session.execute(
            text("UPDATE embedding_jobs SET lease_token = gen_random_uuid() WHERE chunk_id = :id"), {"id": lost_chunk}
        )
        await session.execute(
            text("UPDATE knowledge_sources SET error_code = 'EARLIER' WHERE id = :id"), {"id": lost_source}
        )
    with pytest.raises(LeaseLostError):
        await queue.bury(lease, [lost_chunk, held_chunk], ErrorCode.SERVER_ERROR)
    assert (await source(database, lost_source)).error_code == "EARLIER"
    assert (await source(database, held_source)).error_code == "SERVER_ERROR"


# Where claims begin


async def test_what_comes_before_the_last_claimed_is_found_a_moment_later(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long this takes.
    monkeypatch.setattr(embedding_queue, "FRONT_INTERVAL", 3600.0)
    _, ids = await add(database, *"abcdef")
    first = await queue.claim(2)
    # A transaction that began earlier commits only now.
    _, [late] = await add(database, "late")
    await sql(
        database, "UPDATE embedding_jobs SET available_at = now() - interval '1 hour' WHERE chunk_id = :id", id=late
    )
    await queue.defer(first, first.chunk_ids, -timedelta(minutes=30))
    assert (await queue.claim(2)).chunk_ids == tuple(ids[2:4])
    monkeypatch.setattr(embedding_queue, "FRONT_INTERVAL", 0.0)
    assert (await queue.claim(2)).chunk_ids == (ids[0], late)
    assert (await queue.claim(10)).chunk_ids == (ids[1], *ids[4:])


async def test_the_end_of_the_queue_is_only_said_from_its_front(database: Database, queue: EmbeddingQueue) -> None:
    _, ids = await add(database, *"abcd")
    first = await queue.claim(2)
    second = await queue.claim(2)
    await queue.defer(first, first.chunk_ids, -timedelta(minutes=1))
    assert (await queue.claim(2)).chunk_ids == tuple(ids[:2])
    assert second.chunk_ids == tuple(ids[2:])
    assert (await queue.claim(2)).chunk_ids == ()
