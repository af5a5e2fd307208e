"""Dead letters: looked at, queued again, thrown away, and nothing of them lost on the way."""

import asyncio
import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from working import AT_ONCE, Scripted, add, jobs, letters, raising, right, sql

from kotonoha_store import (
    Database,
    DeadLetter,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    ErrorCode,
    InvalidInputError,
    NotFoundError,
    UnembeddableTextError,
)

pytestmark = pytest.mark.role("worker")

REFUSED = raising(UnembeddableTextError("no"))


async def bury(database: Database, queue: EmbeddingQueue, *contents: str, code: ErrorCode) -> list[int]:
    """Add a source with these chunks and bury them; return the ids of the dead letters."""
    ids = await add(database, *contents)
    lease = await queue.claim()
    await queue.bury(lease, ids, code, model="a model")
    return [letter.id for letter in await queue.dead_letters() if letter.original_chunk_id in ids]


async def statuses(database: Database) -> list[str]:
    return [row[0] for row in await sql(database, "SELECT status::text FROM knowledge_sources ORDER BY id")]


async def kept(database: Database) -> list[dict[str, Any]]:
    """Everything of the chunks but what their life in the queue changes."""
    rows = await sql(
        database, "SELECT to_jsonb(c) - 'embedding' - 'embedding_model' FROM knowledge_chunks c ORDER BY id"
    )
    return [row[0] for row in rows]


async def test_nothing_of_a_chunk_is_lost_there_and_back(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "a text")
    await sql(
        database,
        "UPDATE knowledge_chunks SET location = '{\"big\": 9007199254740993}', token_count = 7, guild_id = 1,"
        " channel_id = 2, thread_id = 3, user_id = 9223372036854775807, occurred_from = '2024-01-01Z',"
        " occurred_to = '2024-01-02Z', created_at = '2024-01-03Z'",
    )
    before = await kept(database)
    for times in range(1, 4):
        lease = await queue.claim()
        await queue.bury(lease, lease.chunk_ids, ErrorCode.INVALID_INPUT, model="a model")
        assert await kept(database) == []
        assert await queue.requeue() == 1
        assert await kept(database) == before
        ((history,),) = await sql(database, "SELECT history::text FROM embedding_jobs")
        assert [death["error_code"] for death in json.loads(history)] == ["INVALID_INPUT"] * times
    assert await EmbeddingWorker(queue, Scripted()).run_until_empty() == EmbeddingReport(claimed=1, embedded=1)


async def test_a_dead_letter_tells_its_history(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "a text")
    worker = EmbeddingWorker(
        queue, Scripted(*[raising(RuntimeError())] * 3, right, REFUSED), backoff=AT_ONCE, concurrency=1
    )
    # The third failure in a row is followed by a word that succeeds.
    assert (await worker.run_until_empty()).buried == 1
    await queue.requeue()
    ((attempts,),) = await sql(database, "SELECT attempts FROM embedding_jobs")
    assert attempts == 0
    assert (await worker.run_until_empty()).buried == 1

    (letter,) = await queue.dead_letters()
    assert await queue.dead_letter(letter.id) == letter
    assert (letter.error_code, letter.retry_count, letter.embedding_model) == ("INVALID_INPUT", 1, "scripted")
    (death,) = letter.history
    assert {name: death[name] for name in ("error_code", "retry_count", "embedding_model")} == {
        "error_code": "EMBEDDING_MAX_RETRIES_EXCEEDED",
        "retry_count": 3,
        "embedding_model": "scripted",
    }
    assert death["buried_at"] < death["requeued_at"]
    assert letter.last_retry_at is not None
    assert letter.last_retry_at == datetime.fromisoformat(death["requeued_at"])


async def test_the_history_is_bounded(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "a text")
    for _ in range(25):
        lease = await queue.claim()
        await queue.bury(lease, lease.chunk_ids, ErrorCode.INVALID_INPUT)
        await queue.requeue()
    lease = await queue.claim()
    await queue.bury(lease, lease.chunk_ids, ErrorCode.INVALID_INPUT)
    (letter,) = await queue.dead_letters()
    assert len(letter.history) == 20
    requeued = [death["requeued_at"] for death in letter.history]
    assert requeued == sorted(requeued)


async def test_they_are_listed_by_code_and_source(database: Database, queue: EmbeddingQueue) -> None:
    refused = await bury(database, queue, "a", "b", code=ErrorCode.INVALID_INPUT)
    failed = await bury(database, queue, "c", code=ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED)

    async def listed(**options: Any) -> list[int]:
        return [letter.id for letter in await queue.dead_letters(**options)]

    source = (await queue.dead_letter(failed[0])).source_id
    assert await listed() == [*refused, *failed]
    assert await listed(error_code="INVALID_INPUT") == refused
    assert await listed(source_id=source) == failed
    assert await listed(source_id=source, error_code="INVALID_INPUT") == []
    assert await listed(limit=1) == refused[:1]
    assert await listed(after_id=refused[0], limit=1) == refused[1:]


async def test_discarded_ones_are_gone_and_the_status_follows(database: Database, queue: EmbeddingQueue) -> None:
    ids = await add(database, "good", "bad", "worse")
    lease = await queue.claim()
    await queue.bury(lease, ids[1:], ErrorCode.INVALID_INPUT)
    await queue.complete(lease, ids[:1], right(["good"]), "a model")
    await bury(database, queue, "alone", code=ErrorCode.SERVER_ERROR)
    assert await statuses(database) == ["partial", "failed"]

    bad, worse, alone = await queue.dead_letters()
    assert await queue.discard([bad.id]) == 1
    assert await queue.discard([bad.id]) == 0
    assert await statuses(database) == ["partial", "failed"]
    assert await queue.discard(error_code=ErrorCode.INVALID_INPUT) == 1
    assert await statuses(database) == ["completed", "failed"]
    assert await sql(database, "SELECT error_code, error_message FROM knowledge_sources WHERE id = 1") == [(None, None)]
    assert await queue.discard(source_id=alone.source_id, error_code="SERVER_ERROR") == 1
    assert await letters(database) == []
    with pytest.raises(NotFoundError):
        await queue.dead_letter(worse.id)


@pytest.mark.role("app", "worker")
async def test_those_of_a_source_that_is_gone_can_be_discarded(database: Database, queue: EmbeddingQueue) -> None:
    await bury(database, queue, "a", code=ErrorCode.INVALID_INPUT)
    await sql(database, "DELETE FROM knowledge_sources")
    assert await queue.requeue() == 0
    assert await queue.discard(everything=True) == 1


async def test_everything_must_be_said(database: Database, queue: EmbeddingQueue) -> None:
    letters = await bury(database, queue, "a", code=ErrorCode.INVALID_INPUT)
    with pytest.raises(InvalidInputError, match="everything"):
        await queue.discard()
    with pytest.raises(InvalidInputError, match="everything"):
        await queue.discard(letters, everything=True)
    assert await queue.discard([]) == 0
    assert await queue.discard(everything=True) == 1


@pytest.mark.parametrize(
    "options",
    [{"dead_letter_ids": [2**63]}, {"dead_letter_ids": ["1"]}, {"source_id": 2**63}, {"error_code": "a\x00b"}],
)
async def test_what_is_no_id_or_code_is_refused(queue: EmbeddingQueue, options: dict[str, Any]) -> None:
    for method in (queue.requeue, queue.discard):
        with pytest.raises(InvalidInputError):
            await method(**options)
    with pytest.raises(InvalidInputError):
        await queue.dead_letter(2**63)
    with pytest.raises(InvalidInputError):
        await queue.dead_letters(limit=0)


@pytest.mark.role("app", "worker")
async def test_requeue_and_discard_at_once_take_each_letter_once(database: Database, queue: EmbeddingQueue) -> None:
    for _ in range(10):
        ids = await bury(database, queue, *"abcdef", code=ErrorCode.INVALID_INPUT)
        requeued, discarded = await asyncio.gather(queue.requeue(ids), queue.discard(ids))
        assert requeued + discarded == 6
        assert await letters(database) == []
        assert len(await jobs(database)) == requeued
        await sql(database, "DELETE FROM knowledge_sources")


async def test_the_content_is_not_shown_by_a_repr(database: Database, queue: EmbeddingQueue) -> None:
    await bury(database, queue, "梅雨の秘密", code=ErrorCode.INVALID_INPUT)
    (letter,) = await queue.dead_letters()
    assert isinstance(letter, DeadLetter)
    assert letter.content == "梅雨の秘密"
    assert "梅雨" not in repr(letter)
    await queue.requeue()
    assert "梅雨" not in repr(await queue.claim())


async def test_a_requeued_chunk_is_found_by_word_again(database: Database, queue: EmbeddingQueue) -> None:
    await bury(database, queue, "rain", code=ErrorCode.INVALID_INPUT)
    assert await sql(database, "SELECT count(*) FROM chunk_terms") == [(0,)]
    await queue.requeue()
    assert await sql(database, "SELECT count(*) FROM chunk_terms") == [(1,)]


async def test_depth_tells_the_leased_from_the_put_off(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, *"abcdef")
    lease = await queue.claim(3)
    await queue.defer(lease, lease.chunk_ids[:1], timedelta(minutes=1))
    await queue.bury(lease, lease.chunk_ids[1:2], ErrorCode.INVALID_INPUT)
    depth = await queue.depth()
    assert (depth.ready, depth.waiting, depth.leased, depth.dead) == (3, 2, 1, 1)
    assert await queue.next_due() == timedelta(0)
    assert await EmbeddingWorker(queue, Scripted()).run_once() == EmbeddingReport(claimed=3, embedded=3)
    due = await queue.next_due()
    assert due is not None
    assert timedelta(0) < due <= timedelta(minutes=1)
