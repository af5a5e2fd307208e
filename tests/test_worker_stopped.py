"""Workers that lose their lease, are stopped, or lose the database."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from conftest import run_sql
from embedding_server import (
    EmbeddingServer,
    hang,
    status,
)
from numpy.typing import NDArray
from sqlalchemy import URL, text
from working import Scripted, add, assert_embedded, jobs, raising, right, sql

from kotonoha_store import (
    Database,
    EmbedderConfigurationError,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    HashingEmbedder,
    Lease,
    LeaseLostError,
    RateLimitedError,
    Settings,
    Store,
    StoreUnavailableError,
    UnembeddableTextError,
)
from kotonoha_store.embedding_batch import PROBE

# Leases that end, and being stopped


async def test_what_another_worker_took_meanwhile_is_reported_as_lost(
    database: Database, queue: EmbeddingQueue
) -> None:
    await add(database, "a", "b", "c")
    results: list[EmbeddingReport] = []

    class Slow(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            # The lease of one chunk ends, and a faster worker comes.
            await sql(
                database,
                "UPDATE embedding_jobs SET available_at = now() - interval '1 s'"
                " WHERE chunk_id = (SELECT min(chunk_id) FROM embedding_jobs)",
            )
            results.append(await EmbeddingWorker(queue, Scripted()).run_once())
            return await super().embed_documents(texts)

    for call, expected in (
        (right, EmbeddingReport(claimed=3, embedded=2, lost=1)),
        (raising(RuntimeError()), EmbeddingReport(claimed=3, failed=2, lost=1)),
        (raising(RateLimitedError("")), EmbeddingReport(claimed=3, deferred=2, lost=1)),
    ):
        await sql(database, "DELETE FROM knowledge_sources")
        await sql(database, "DELETE FROM embedding_pauses")
        await add(database, "a", "b", "c")
        assert await EmbeddingWorker(queue, Slow(call), reuse=False).run_once() == expected
        assert results.pop() == EmbeddingReport(claimed=1, embedded=1)
    await sql(database, "DELETE FROM embedding_pauses")

    class SlowOnce(Slow):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            parent = Scripted if self.texts else Slow
            return await parent.embed_documents(self, texts)

    slow = SlowOnce(*[lambda texts: right(texts) if texts == [PROBE] else raising(RuntimeError())(texts)] * 9)
    last_chance = EmbeddingWorker(EmbeddingQueue(database, max_attempts=1), slow)
    await sql(database, "DELETE FROM knowledge_sources")
    await add(database, "a", "b", "c")
    assert await last_chance.run_once() == EmbeddingReport(claimed=3, buried=2, lost=1)
    await sql(database, "DELETE FROM knowledge_sources")
    await add(database, "a")
    refused = EmbeddingWorker(queue, Slow(raising(UnembeddableTextError(""))))
    assert await refused.run_once() == EmbeddingReport(claimed=1, lost=1)


async def test_a_cancelled_worker_gives_its_lease_back(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "a", "b")
    server.script(hang)
    task = asyncio.create_task(worker.run_until_empty())
    await server.until(lambda: server.in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for leased, attempts, code, wait in await jobs(database):
        assert (leased, attempts, code) == (False, 0, None)
        assert wait <= 0
    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, embedded=2)


async def test_a_second_cancellation_does_not_keep_the_lease(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "a")
    server.script(hang)
    task = asyncio.create_task(worker.run_once())
    await server.until(lambda: server.in_flight)
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(30):
        # Until who gives it back has had the answer, too.
        while (await jobs(database))[0][0] or database.engine.pool.checkedout():  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), LeaseLostError("lost", [1])])
async def test_a_database_that_is_gone_does_not_swallow_the_cancellation(
    database: Database,
    server: EmbeddingServer,
    queue: EmbeddingQueue,
    worker: EmbeddingWorker,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    await add(database, "a")
    server.script(hang, status(401))

    async def defer(*_: object) -> None:
        raise error

    monkeypatch.setattr(queue, "defer", defer)
    task = asyncio.create_task(worker.run_once())
    await server.until(lambda: server.in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await sql(database, "UPDATE embedding_jobs SET available_at = now()")
    with pytest.raises(EmbedderConfigurationError):
        await worker.run_once()


async def wait_for_locks_briefly(url: URL) -> None:
    """The database's connections from now on: a short time-out for each statement would end those that are slow."""
    await run_sql(url, f"ALTER DATABASE {url.database} SET lock_timeout = '0.5s'")


async def test_a_locked_source_holds_up_itself_alone_and_costs_no_attempt(
    settings: Settings, migrated_url: URL
) -> None:
    """The embedder did its work each time; only the write to one source had to wait."""
    await wait_for_locks_briefly(migrated_url)
    async with await Database.open(settings) as database, await Database.open(settings) as other:
        queue = EmbeddingQueue(database)
        worker = EmbeddingWorker(queue, Scripted(), batch_size=10)
        [locked] = await add(database, "locked")
        await add(database, "free")
        async with other.begin() as session:
            await session.execute(
                text(
                    "SELECT FROM knowledge_sources WHERE id ="
                    " (SELECT source_id FROM knowledge_chunks WHERE id = :id) FOR UPDATE"
                ),
                {"id": locked},
            )
            for _ in range(4):
                with pytest.raises(StoreUnavailableError):
                    await worker.run_until_empty()
            await assert_embedded(other, ["free"])
            assert [job[:2] for job in await jobs(other)] == [(False, 0)]
        report = await worker.run_until_empty()
        assert (report.embedded, report.buried) == (1, 0)


async def test_a_lost_connection_gives_the_lease_and_the_attempt_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = EmbeddingQueue(database)
    await add(database, "one", "two")

    async def unavailable(*_: Any, **__: Any) -> None:
        raise StoreUnavailableError("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(queue, "complete", unavailable)
        for _ in range(4):
            with pytest.raises(StoreUnavailableError):
                await EmbeddingWorker(queue, Scripted()).run_until_empty()
    assert [job[:2] for job in await jobs(database)] == [(False, 0), (False, 0)]
    assert (await EmbeddingWorker(queue, Scripted()).run_until_empty()).embedded == 2


async def test_used_up_jobs_do_not_hide_those_behind_them(database: Database, queue: EmbeddingQueue) -> None:
    ids = await add(database, *"abcde")
    await sql(
        database,
        "UPDATE embedding_jobs SET attempts = 3, available_at = now() - interval '1 hour'"
        f" WHERE chunk_id IN ({ids[0]}, {ids[1]})",
    )
    lease = await queue.claim(2)
    assert (lease.chunk_ids, lease.buried) == (tuple(ids[2:4]), tuple(ids[:2]))
    await queue.defer(lease, lease.chunk_ids, timedelta(0))
    await sql(database, f"UPDATE embedding_jobs SET attempts = 3 WHERE chunk_id = {ids[2]}")
    report = await EmbeddingWorker(queue, Scripted(), batch_size=1).run_until_empty()
    assert (report.claimed, report.embedded, report.buried) == (3, 2, 1)
    assert (await queue.depth()).ready == 0


async def test_putting_off_and_replacing_the_same_chunks_does_not_deadlock(store: Store) -> None:
    """Both take many jobs: the one by their ids, the other by the cascade of a deletion."""
    documents = ["\n\n".join(f"{word} {number}. " * 30 for number in range(40)) for word in ("rain", "snow")]
    small = store.settings.model_copy(update={"kb_chunk_max_tokens": 64})
    writer = Store(store.database, small, HashingEmbedder())
    until = asyncio.get_running_loop().time() + 4

    async def put_off() -> None:
        queue = EmbeddingQueue(store.database)
        while asyncio.get_running_loop().time() < until:
            lease = await queue.claim(50)
            with suppress(LeaseLostError):
                await queue.defer(lease, lease.chunk_ids, timedelta(0))

    async def replace(uri: str) -> None:
        turn = 0
        while asyncio.get_running_loop().time() < until:
            turn += 1
            await writer.add_document("weather", documents[turn % 2], uri=uri)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(put_off())
        for uri in ("https://a.example", "https://b.example"):
            group.create_task(replace(uri))


async def test_a_claim_that_is_cancelled_is_given_back(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has leased the jobs, but its answer is still under way."""
    await add(database, "a", "b")
    claim, leased = queue.claim, asyncio.Event()

    async def slow_answer(*arguments: Any, **options: Any) -> Lease:
        lease = await claim(*arguments, **options)
        leased.set()
        await asyncio.sleep(0.2)
        return lease

    monkeypatch.setattr(queue, "claim", slow_answer)
    task = asyncio.create_task(EmbeddingWorker(queue, Scripted()).run_until_empty())
    await leased.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [job[:2] for job in await jobs(database)] == [(False, 0), (False, 0)]


async def test_an_embedder_that_cancels_itself_has_failed(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "a")
    worker = EmbeddingWorker(queue, Scripted(raising(asyncio.CancelledError())))
    assert await worker.run_until_empty() == EmbeddingReport(claimed=1, failed=1)
    assert [job[:3] for job in await jobs(database)] == [(False, 1, "UNKNOWN_ERROR")]


async def test_an_embedder_that_ends_the_program_leaves_no_lease(database: Database, queue: EmbeddingQueue) -> None:
    class EndError(BaseException):
        pass

    await add(database, "a")
    with pytest.raises(EndError):
        await EmbeddingWorker(queue, Scripted(raising(EndError()))).run_once()
    assert [job[:2] for job in await jobs(database)] == [(False, 0)]


async def test_no_heartbeat_comes_in_the_middle_of_a_write(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the jobs for a moment, and a write that waits for nobody would pass them over."""
    queue = EmbeddingQueue(database, lease=timedelta(seconds=0.3))
    await add(database, "a")
    defer, heartbeat = queue.defer, queue.heartbeat
    is_writing = False
    beats: list[bool] = []

    async def slow_defer(*arguments: Any) -> None:
        nonlocal is_writing
        is_writing = True
        await asyncio.sleep(0.5)
        await defer(*arguments)
        is_writing = False

    async def watched(*arguments: Any) -> None:
        beats.append(is_writing)
        await heartbeat(*arguments)

    class Slow(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            async with asyncio.timeout(30):
                while not beats:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            return await super().embed_documents(texts)

    monkeypatch.setattr(queue, "defer", slow_defer)
    monkeypatch.setattr(queue, "heartbeat", watched)
    worker = EmbeddingWorker(queue, Slow(raising(RateLimitedError(""))))
    assert await worker.run_once() == EmbeddingReport(claimed=1, deferred=1)
    assert beats
    assert not any(beats)


async def test_used_up_jobs_of_a_locked_source_do_not_hold_up_those_beside_them(
    settings: Settings, migrated_url: URL
) -> None:
    await wait_for_locks_briefly(migrated_url)
    async with await Database.open(settings) as database, await Database.open(settings) as other:
        [used_up] = await add(database, "used up")
        await add(database, "free")
        await sql(database, f"UPDATE embedding_jobs SET attempts = 3 WHERE chunk_id = {used_up}")
        async with other.begin() as session:
            await session.execute(text("SELECT FROM knowledge_sources ORDER BY id LIMIT 1 FOR UPDATE"))
            report = await EmbeddingWorker(EmbeddingQueue(database), Scripted()).run_once()
        assert (report.embedded, report.buried) == (1, 0)
        await sql(other, "UPDATE embedding_jobs SET available_at = now()")
        assert (await EmbeddingWorker(EmbeddingQueue(other), Scripted()).run_once()).buried == 1
        (letter,) = await EmbeddingQueue(other).dead_letters()
        assert letter.retry_count == 3


async def test_an_embedder_that_hangs_for_ever_has_failed(database: Database, queue: EmbeddingQueue) -> None:
    class Hanging(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return await asyncio.Event().wait()

    await add(database, "a")
    worker = EmbeddingWorker(queue, Hanging(), call_timeout=timedelta(seconds=0.2))
    async with asyncio.timeout(30):
        assert await worker.run_until_empty() == EmbeddingReport(claimed=1, failed=1)
    assert [job[:3] for job in await jobs(database)] == [(False, 1, "EMBEDDING_API_TIMEOUT")]
