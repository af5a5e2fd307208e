"""The worker as a long-running task: woken, patient, stopped without leaving anything behind."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from conftest import settings_for
from embedding_server import EmbeddingServer, hang, held, ok, status, texts_of
from numpy.typing import NDArray
from sqlalchemy import URL, text
from working import Scripted, add, assert_embedded, jobs, right, sql

from kotonoha_store import (
    Database,
    Embedder,
    EmbeddingQueue,
    EmbeddingWorker,
    LeaseLostError,
    Message,
    OpenAIEmbedder,
    Settings,
    Store,
    StoreUnavailableError,
    service_loop,
    wakeup,
)

pytestmark = pytest.mark.role("worker")

LONG = timedelta(hours=1)


@pytest.fixture(autouse=True)
def _time_for_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy server may take longer to give leases back than a service that ends waits for it."""
    monkeypatch.setattr(service_loop, "_CLEAN_UP", 60.0)


async def until(condition: Any, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  the database tells nobody
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(worker: EmbeddingWorker) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event]]:
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        yield task, stop
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def is_done(database: Database) -> bool:
    return not await jobs(database)


# Woken


async def test_new_jobs_wake_it_at_once(database: Database, queue: EmbeddingQueue) -> None:
    async with running(EmbeddingWorker(queue, Scripted(), interval=LONG)) as (task, _):
        for number in range(3):
            await add(database, f"text {number}")
            await until(lambda: is_done(database))
        assert not task.done()


async def test_without_listen_it_looks_on_the_interval(database: Database, queue: EmbeddingQueue) -> None:
    worker = EmbeddingWorker(queue, Scripted(), interval=timedelta(seconds=0.2), listen=False)
    async with running(worker):
        await asyncio.sleep(1.2)  # its first look is over
        await add(database, "a text")
        await until(lambda: is_done(database))
        listening = await sql(
            database,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'",
        )
        assert listening == [(0,)]


async def test_what_was_put_off_is_taken_when_it_is_due(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "a text")
    server.script(status(500), status(429, headers={"retry-after": "1"}))
    worker = EmbeddingWorker(queue, embedder, interval=LONG, backoff=(timedelta(seconds=1),))
    started = monotonic()
    async with running(worker):
        await until(lambda: is_done(database))
    # Two waits: one of the chunk, one of the provider.
    assert monotonic() - started > 1.7
    assert len(server.requests) == 3


# Patient


async def test_a_wrong_configuration_is_waited_for(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder, caplog: Any
) -> None:
    await add(database, "a text")
    server.default = status(401)
    worker = EmbeddingWorker(queue, embedder, interval=timedelta(seconds=0.1))
    async with running(worker) as (task, _):

        async def is_given_back() -> bool:
            return [job[:3] for job in await jobs(database)] == [(False, 0, "AUTHENTICATION_ERROR")]

        await until(is_given_back)
        await asyncio.sleep(0.6)
        # One question, however often it looks; nobody else asks either.
        assert len(server.requests) == 1
        assert not task.done()
        assert await is_given_back()
    # Started anew, with the key mended, it does not wait for the pause to end.
    server.default = ok
    async with running(EmbeddingWorker(queue, embedder, interval=LONG)):
        await until(lambda: is_done(database))
    assert any(getattr(record, "event", None) == "embedding_not_configured" for record in caplog.records)


async def test_a_database_that_is_gone_is_waited_for(
    database: Database, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(database, "a text")
    claim, failures = queue.claim, 2

    async def unavailable(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise StoreUnavailableError("gone")
        return await claim(*arguments, **options)

    monkeypatch.setattr(queue, "claim", unavailable)
    worker = EmbeddingWorker(queue, Scripted(), interval=timedelta(seconds=0.2))
    async with running(worker):
        await until(lambda: is_done(database))


async def test_new_jobs_are_embedded_while_another_call_takes_its_time(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue
) -> None:
    await add(database, "slow")
    server.default = lambda body: hang(body) if "slow" in texts_of(body) else ok(body)
    # Its time-out is no way out.
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=600.0)
    async with running(EmbeddingWorker(queue, embedder, interval=LONG, concurrency=2)) as (task, _):
        await server.until(lambda: server.in_flight)
        for number in range(3):
            await add(database, f"quick {number}")
            await until(lambda: are_left(database, 1))
        assert not task.done()
    await embedder.aclose()


async def test_a_job_that_comes_while_a_claim_finds_nothing_is_claimed(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its notification is heard when every slot is taken, one of them by that claim."""
    await add(database, "slow")
    server.default = lambda body: hang(body) if "slow" in texts_of(body) else ok(body)
    claim, wait = queue.claim, wakeup.Listener.wait
    heard = [asyncio.Event(), asyncio.Event()]  # the connection, then the job
    later = iter(heard)

    async def listen(listener: wakeup.Listener, timeout_seconds: float) -> bool:
        found = await wait(listener, timeout_seconds)
        if event := next(later, None):
            event.set()
        return found

    async def late(*arguments: Any, **options: Any) -> Any:
        lease = await claim(*arguments, **options)
        if not lease.chunks and not heard[1].is_set():
            await heard[0].wait()
            await add(database, "quick")
            await heard[1].wait()
        return lease

    monkeypatch.setattr(wakeup.Listener, "wait", listen)
    monkeypatch.setattr(queue, "claim", late)
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=600.0)
    async with running(EmbeddingWorker(queue, embedder, interval=LONG, concurrency=2)):
        async with asyncio.timeout(30):
            await heard[1].wait()
        await until(lambda: are_left(database, 1))
    await embedder.aclose()


async def are_left(database: Database, number: int) -> bool:
    return len(await jobs(database)) == number


# The heartbeat


async def test_a_call_longer_than_the_lease_keeps_it(database: Database) -> None:
    queue = EmbeddingQueue(database, lease=timedelta(seconds=0.6))
    await add(database, "a", "b")
    # Nobody else claims: on a busy machine a heartbeat may come too late for a lease that short.
    end = "SELECT min(available_at) FROM embedding_jobs WHERE lease_token IS NOT NULL HAVING count(*) = 2"

    class Slow(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            [(first,)] = await sql(database, end)

            async def is_kept() -> bool:
                [(now,)] = await sql(database, end)
                return now > first + 3 * queue.lease

            await until(is_kept)
            return right(list(texts))

    assert (await EmbeddingWorker(queue, Slow()).run_once()).embedded == 2


async def test_a_heartbeat_tells_what_was_lost_and_renews_the_rest(database: Database, queue: EmbeddingQueue) -> None:
    a, b = await add(database, "a", "b")
    lease = await queue.claim()
    await sql(database, f"UPDATE embedding_jobs SET lease_token = gen_random_uuid() WHERE chunk_id = {a}")
    await sql(database, "UPDATE embedding_jobs SET available_at = now() + interval '1 second'")
    with pytest.raises(LeaseLostError) as raised:
        await queue.heartbeat(lease)
    assert raised.value.chunk_ids == (a,)
    of_other, of_ours = await jobs(database)
    assert of_other[3] < 2
    assert 200 < of_ours[3] <= 300
    await queue.heartbeat(lease, [b])


async def test_a_heartbeat_waits_for_nobody(database: Database, queue: EmbeddingQueue) -> None:
    """What is locked is being finished, or deleted."""
    a, _ = await add(database, "a", "b")
    lease = await queue.claim()
    async with database.begin() as session:
        await session.execute(text(f"SELECT FROM embedding_jobs WHERE chunk_id = {a} FOR UPDATE"))
        async with asyncio.timeout(30):
            await queue.heartbeat(lease)
    assert [job[:2] for job in await jobs(database)] == [(True, 1), (True, 1)]


async def test_a_heartbeat_that_fails_does_not_stop_the_batch(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = EmbeddingQueue(database, lease=timedelta(seconds=0.9))
    await add(database, "a")
    beats: list[Exception] = [StoreUnavailableError("gone"), LeaseLostError("lost", [1])]
    heartbeat = queue.heartbeat

    async def failing(*arguments: Any) -> None:
        if beats:
            raise beats.pop(0)
        await heartbeat(*arguments)

    class Slow(Scripted):
        async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
            async with asyncio.timeout(30):
                while beats:  # noqa: ASYNC110  the heartbeat tells nobody
                    await asyncio.sleep(0.05)
            return right(list(texts))

    monkeypatch.setattr(queue, "heartbeat", failing)
    assert (await EmbeddingWorker(queue, Slow()).run_once()).embedded == 1


# Leases that ran out


async def test_what_a_dead_worker_held_comes_one_by_one(database: Database, queue: EmbeddingQueue) -> None:
    first = await add(database, *"abc")
    await queue.claim()
    await sql(database, "UPDATE embedding_jobs SET available_at = now() - interval '1 minute'")
    fresh = await add(database, *"def")
    claimed = [(await queue.claim()).chunk_ids for _ in range(5)]
    assert claimed == [(first[0],), (first[1],), (first[2],), tuple(fresh), ()]


async def test_fresh_jobs_before_one_that_ran_out_come_together(database: Database, queue: EmbeddingQueue) -> None:
    fresh = await add(database, *"ab")
    late = await add(database, *"cd")
    await sql(database, "UPDATE embedding_jobs SET available_at = now() - interval '1 hour'")
    await sql(
        database,
        "UPDATE embedding_jobs SET available_at = now() - interval '1 minute', lease_token = gen_random_uuid()"
        f" WHERE chunk_id >= {late[0]}",
    )
    claimed = [(await queue.claim()).chunk_ids for _ in range(4)]
    assert claimed == [tuple(fresh), (late[0],), (late[1],), ()]


# Stopped


async def test_a_stop_lets_running_batches_finish_and_claims_nothing_more(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    contents = [f"text {number}" for number in range(20)]
    await add(database, *contents)
    answering = asyncio.Event()
    server.default = held(answering)
    worker = EmbeddingWorker(queue, embedder, batch_size=2, concurrency=2)
    async with running(worker) as (task, stop):
        await server.until(lambda: server.in_flight == 2)
        stop.set()
        await asyncio.sleep(0.1)
        assert not task.done()
        answering.set()
        async with asyncio.timeout(30):
            await task
    assert len(server.requests) == 2
    await assert_embedded(database, server.texts)
    assert [job[:2] for job in await jobs(database)] == [(False, 0)] * 16


async def test_what_takes_longer_than_the_limit_is_given_back(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "a", "b")
    server.default = hang
    worker = EmbeddingWorker(queue, embedder, drain=timedelta(seconds=0.3))
    async with running(worker) as (task, stop):
        await server.until(lambda: server.in_flight)
        stop.set()
        # Before the embedder's own limit, and the usual one.
        async with asyncio.timeout(20):
            await task
    assert [(job[:3], job[3] <= 0) for job in await jobs(database)] == [((False, 0, None), True)] * 2


async def test_a_cancellation_gives_back_at_once(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "a", "b")
    server.default = hang
    async with running(EmbeddingWorker(queue, embedder, batch_size=1)) as (task, _):
        await server.until(lambda: server.in_flight == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [job[:3] for job in await jobs(database)] == [(False, 0, None)] * 2


PROCESS = """
import asyncio, sys
from kotonoha_store import HashingEmbedder, Settings, Store, stop_on_signals

class Slow(HashingEmbedder):
    async def embed_documents(self, texts):
        print("embedding", flush=True)
        await self.stop.wait()
        await asyncio.sleep(0.5)
        return await super().embed_documents(texts)

async def main():
    embedder = Slow()
    async with Store.open(Settings(), embedder=embedder) as store:
        with stop_on_signals() as embedder.stop:
            await store.run(embedder.stop)

asyncio.run(main())
"""


async def test_a_process_that_is_told_to_end_leaves_nothing_leased(store: Store, migrated_url: URL) -> None:
    await add(store.database, *(f"text {number}" for number in range(6)))
    environment = {
        **os.environ,
        "DATABASE_URL": migrated_url.render_as_string(hide_password=False),
        "KB_EMBEDDING_BATCH_SIZE": "2",
        "KB_EMBEDDING_MAX_CONCURRENT": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROCESS, env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(120):
        assert await process.stdout.readline() == b"embedding\n"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert [job[:2] for job in await jobs(store.database)] == [(False, 0)] * 4


async def test_the_whole_journey_runs_by_itself(settings: Settings, migrated_url: URL) -> None:
    """A session grows too long, is archived while it is in use, and is found, with nobody calling anything."""
    quick = settings_for(migrated_url, kb_archive_max_messages=10, kb_archive_overlap_messages=2)
    async with Store.open(quick, embedder=Scripted()) as store:
        stop = asyncio.Event()
        task = asyncio.create_task(store.run(stop))
        for number in range(12):
            async with store.begin() as tx:
                await tx.sessions.append("key", Message.user(f"message {number} about rain"), guild_id=1)

        async def is_embedded() -> bool:
            return bool(await sql(store.database, "SELECT 1 FROM knowledge_chunks WHERE embedding IS NOT NULL"))

        await until(is_embedded)
        stop.set()
        async with asyncio.timeout(60):
            await task
        assert (await store.search("rain", mode="words", everywhere=True)).hits


async def test_an_unexpected_fault_ends_both_loops(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(store.queue, "claim", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        async with asyncio.timeout(30):
            await store.run()
