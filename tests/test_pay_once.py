"""Equal texts are embedded once, requests are packed, batches run beside each other."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from embedding_server import EmbeddingServer, hang, ok, poison, slow, status, texts_of
from numpy.typing import NDArray
from working import Scripted, add, assert_embedded, jobs, letters, raising, right, sql

from kotonoha_store import (
    Database,
    Embedder,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    InvalidInputError,
    KnowledgeRepository,
    LeaseLostError,
    NewChunk,
    OpenAIEmbedder,
    SourceType,
    Store,
    TransientEmbeddingError,
)

pytestmark = pytest.mark.role("worker")

# Pay once


async def test_a_text_that_comes_twice_in_a_batch_is_sent_once(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "same", "other", "same", "same")
    assert await worker.run_until_empty() == EmbeddingReport(claimed=4, embedded=4, reused=2)
    assert [texts_of(body) for body in server.requests] == [["same", "other"]]
    await assert_embedded(database, ["same", "other"])
    assert await sql(database, "SELECT count(*) FROM knowledge_chunks WHERE embedding IS NOT NULL") == [(4,)]


async def test_a_text_that_has_a_vector_is_not_sent_again(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "same", "other")
    await worker.run_until_empty()
    await add(database, "same", "new")
    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, embedded=2, reused=1)
    assert server.texts == ["same", "other", "new"]
    # To the bit, and with its model.
    distinct = "SELECT count(DISTINCT embedding::text), count(*), min(embedding_model) FROM knowledge_chunks"
    assert await sql(database, f"{distinct} WHERE content = 'same'") == [(1, 2, "text-embedding-3-small")]
    assert await sql(database, "SELECT DISTINCT status::text FROM knowledge_sources") == [("completed",)]
    assert await jobs(database) == []


async def test_another_model_makes_its_own_vector(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker, queue: EmbeddingQueue
) -> None:
    await add(database, "same")
    await worker.run_until_empty()
    await add(database, "same")
    other = Scripted()
    assert await EmbeddingWorker(queue, other).run_until_empty() == EmbeddingReport(claimed=1, embedded=1)
    assert other.texts == [["same"]]


async def test_it_can_be_turned_off(database: Database, server: EmbeddingServer, store: Store) -> None:
    settings = store.settings.model_copy(update={"kb_embedding_reuse": False})
    embedder = Scripted()
    await add(database, "same", "same")
    report = await Store(store.database, settings, embedder).embedding_worker.run_until_empty()
    assert report == EmbeddingReport(claimed=2, embedded=2)
    assert embedder.texts == [["same", "same"]]


async def test_batches_beside_each_other_pay_once(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, *["same"] * 10)
    server.default = slow(0.2)
    report = await EmbeddingWorker(queue, embedder, batch_size=2).run_until_empty()
    assert report == EmbeddingReport(claimed=10, embedded=10, reused=9)
    assert server.texts == ["same"]


async def test_a_text_that_is_finished_between_two_looks_is_not_paid_for_again(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(database, "same", "same")
    reuse, complete = queue.reuse, queue.complete
    looks = 0
    second_has_looked, first_is_written = asyncio.Event(), asyncio.Event()

    async def slow_look(*arguments: Any) -> set[int]:
        nonlocal looks
        looks += 1
        is_second = looks == 2
        known = await reuse(*arguments)
        if is_second and not known:
            second_has_looked.set()
            await first_is_written.wait()
            await asyncio.sleep(0.1)
        return known

    async def told(*arguments: Any) -> None:
        await complete(*arguments)
        first_is_written.set()

    class Slow(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await second_has_looked.wait()
            return await super().embed_documents(texts)

    monkeypatch.setattr(queue, "reuse", slow_look)
    monkeypatch.setattr(queue, "complete", told)
    embedder = Slow()
    report = await EmbeddingWorker(queue, embedder, batch_size=1).run_until_empty()
    assert report == EmbeddingReport(claimed=2, embedded=2, reused=1)
    assert embedder.texts == [["same"]]


async def test_what_another_batch_could_not_embed_is_tried_again(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "same", "same")
    server.script(slow(0.2, status(500)))
    report = await EmbeddingWorker(queue, embedder, batch_size=1).run_until_empty()
    assert (report.embedded, report.failed) == (1, 1)
    await assert_embedded(database, ["same"])


async def test_a_refused_text_that_came_twice_is_buried_twice(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "poison", "good", "poison")
    server.default = poison(lambda text: text == "poison")
    assert await worker.run_until_empty() == EmbeddingReport(claimed=3, embedded=1, buried=2)
    assert await letters(database) == [("poison", "INVALID_INPUT")] * 2


async def test_a_twin_that_is_deleted_meanwhile_is_no_loss(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    (twin,) = await add(database, "same")
    worker = EmbeddingWorker(queue, Scripted())
    await worker.run_until_empty()
    await add(database, "same")
    settle = queue._settle

    async def after_deletion(*args: object, **options: object) -> set[int]:
        await sql(database, f"DELETE FROM knowledge_chunks WHERE id = {twin}")
        return await settle(*args, **options)

    monkeypatch.setattr(queue, "_settle", after_deletion)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=1, embedded=1)
    await assert_embedded(database, ["same"])


async def test_a_lost_lease_is_not_completed_by_a_twin(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "same")
    await EmbeddingWorker(queue, Scripted()).run_until_empty()
    (chunk,) = await add(database, "same")
    late = await queue.claim()
    await sql(database, "UPDATE embedding_jobs SET available_at = now()")
    other = await queue.claim()
    assert await queue.reuse(late, [chunk], Scripted.model) == set()
    assert await queue.reuse(other, [chunk], Scripted.model) == {chunk}


async def test_a_job_whose_vector_stands_already_is_ended_under_the_fence(
    database: Database, queue: EmbeddingQueue
) -> None:
    (chunk,) = await add(database, "a text")
    late = await queue.claim()
    await sql(database, "UPDATE embedding_jobs SET available_at = now()")
    lease = await queue.claim()
    written = "embedding_model = 'm', embedding = ('[' || repeat('1,', 1535) || '1]')::halfvec"
    await sql(database, f"UPDATE knowledge_chunks SET {written} WHERE id = {chunk}")
    with pytest.raises(LeaseLostError):
        await queue.finish(late, [chunk])
    assert len(await jobs(database)) == 1
    await queue.finish(lease, [chunk])
    assert await jobs(database) == []
    assert await sql(database, "SELECT status::text FROM knowledge_sources") == [("completed",)]


# Requests


async def test_requests_are_packed_by_tokens(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source = await knowledge.add_source(SourceType.WEB_PAGE, "a source")
        tokens = [60, 40, 1, 200, 50, 50]
        await knowledge.add_chunks(
            source, [NewChunk(content=f"text {n}", token_count=count) for n, count in enumerate(tokens)]
        )
        # Not counted: as many as it has bytes.
        await knowledge.add_chunks(source, [NewChunk(content="雨" * 33), NewChunk(content="x")])
    report = await EmbeddingWorker(queue, embedder, request_tokens=100).run_until_empty()
    assert report == EmbeddingReport(claimed=8, embedded=8)
    assert [[text[:6] for text in texts_of(body)] for body in server.requests] == [
        ["text 0", "text 1"],
        ["text 2"],
        ["text 3"],
        ["text 4", "text 5"],
        ["雨" * 6, "x"],
    ]


async def test_so_many_batches_are_in_flight_and_no_more(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    contents = [f"text {i}" for i in range(12)]
    await add(database, *contents)
    most = 0
    three = asyncio.Event()

    class Watched(Scripted):
        running = 0

        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            nonlocal most
            Watched.running += 1
            most = max(most, Watched.running)
            if most == 3:
                three.set()
            async with asyncio.timeout(30):
                await three.wait()
            # Long enough for a fourth to come.
            await asyncio.sleep(0.05)
            Watched.running -= 1
            return right(list(texts))

    report = await EmbeddingWorker(queue, Watched(), batch_size=1, concurrency=3).run_until_empty()
    assert report == EmbeddingReport(claimed=12, embedded=12)
    assert most == 3


async def test_a_slow_source_does_not_hold_up_the_others(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue
) -> None:
    await add(database, "slow")
    for number in range(20):
        await add(database, f"quick {number}")
    server.default = lambda body: hang(body) if "slow" in texts_of(body) else ok(body)
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=600.0)
    task = asyncio.create_task(EmbeddingWorker(queue, embedder, batch_size=1, concurrency=2).run_until_empty())
    async with asyncio.timeout(120):
        while len(await jobs(database)) > 1:  # noqa: ASYNC110  the database tells nobody
            await asyncio.sleep(0.02)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await embedder.aclose()


async def test_a_failure_of_one_batch_lets_the_others_write_what_was_paid_for(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(database, "bad", "good")
    is_over = asyncio.Event()

    class Both(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if texts == ["bad"]:
                is_over.set()
                raise TransientEmbeddingError("")
            await is_over.wait()
            await asyncio.sleep(0.1)
            return right(list(texts))

    async def fail(*_: object, **__: object) -> list[int]:
        raise InvalidInputError("a fault of ours")

    monkeypatch.setattr(queue, "fail", fail)
    with pytest.raises(InvalidInputError):
        await EmbeddingWorker(queue, Both(), batch_size=1).run_until_empty()
    await assert_embedded(database, ["good"])
    assert [job[:2] for job in await jobs(database)] == [(False, 0)]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"concurrency": 0},
        {"request_tokens": 0},
        {"backoff": ()},
        {"interval": timedelta(0)},
        {"drain": timedelta(-1)},
        {"call_timeout": timedelta(0)},
    ],
)
async def test_sizes_out_of_range_are_refused(queue: EmbeddingQueue, options: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        EmbeddingWorker(queue, Scripted(raising(AssertionError())), **options)
