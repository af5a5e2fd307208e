"""The worker: the real OpenAI client, a server that misbehaves, a real queue."""

import asyncio
import logging
import math
from collections.abc import Callable
from time import monotonic
from typing import Any

import numpy as np
import pytest
from embedding_server import (
    Behaviour,
    EmbeddingServer,
    close,
    echo,
    hang,
    nan,
    ok,
    poison,
    reordered,
    short,
    status,
    texts_of,
    zero,
)
from numpy.typing import NDArray
from working import AT_ONCE, Scripted, add, assert_embedded, jobs, letters, raising, right, sql

from kotonoha_store import (
    Database,
    Embedder,
    EmbedderConfigurationError,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    ErrorCode,
    OpenAIEmbedder,
    TransientEmbeddingError,
)
from kotonoha_store.embedding_batch import (
    BACKOFF,
)

pytestmark = pytest.mark.role("worker")


def since(started: float) -> float:
    """How much of a wait may be over by now, and what two clocks may differ by."""
    return monotonic() - started + 1


# What goes right


async def test_each_chunk_gets_its_own_vector(
    database: Database, server: EmbeddingServer, embedder: Embedder, queue: EmbeddingQueue
) -> None:
    contents = [f"text {i}" for i in range(25)]
    await add(database, *contents)
    server.script(reordered)
    report = await EmbeddingWorker(queue, embedder, batch_size=10).run_until_empty()
    assert report == EmbeddingReport(claimed=25, embedded=25)
    # Of the rest two may take a part each at the same moment.
    sizes = [len(texts_of(body)) for body in server.requests]
    assert (max(sizes), sum(sizes)) == (10, 25)
    await assert_embedded(database, contents)
    assert await sql(database, "SELECT DISTINCT embedding_model FROM knowledge_chunks") == [(embedder.model,)]
    assert await sql(database, "SELECT DISTINCT status::text FROM knowledge_sources") == [("completed",)]


async def test_with_nothing_to_do_the_embedder_is_not_asked(server: EmbeddingServer, worker: EmbeddingWorker) -> None:
    assert await worker.run_once() == EmbeddingReport()
    assert await worker.run_until_empty() == EmbeddingReport()
    assert server.requests == []


async def test_no_connection_is_held_while_the_embedder_works(database: Database, queue: EmbeddingQueue) -> None:
    await add(database, "a", "b")
    held: list[Any] = []

    def look(texts: list[str]) -> NDArray[np.float32]:
        held.append(database.engine.pool.checkedout())  # type: ignore[attr-defined]
        return right(texts)

    await EmbeddingWorker(queue, Scripted(look, look), batch_size=1, concurrency=1).run_until_empty()
    assert held == [0, 0]


async def test_workers_share_the_queue(database: Database, queue: EmbeddingQueue, embedder: Embedder) -> None:
    contents = [f"text {i}" for i in range(60)]
    await add(database, *contents)
    workers = [EmbeddingWorker(queue, embedder, batch_size=5) for _ in range(4)]
    reports = await asyncio.gather(*(worker.run_until_empty() for worker in workers))
    assert sum(reports, EmbeddingReport()) == EmbeddingReport(claimed=60, embedded=60)
    await assert_embedded(database, contents)


# Passing failures


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (status(500), "SERVER_ERROR"),
        (status(503), "SERVER_ERROR"),
        (close, "SERVER_ERROR"),
        (short, "SERVER_ERROR"),
        (hang, "EMBEDDING_API_TIMEOUT"),
    ],
)
async def test_a_passing_failure_counts_and_waits(
    database: Database,
    server: EmbeddingServer,
    queue: EmbeddingQueue,
    embedder: Embedder,
    behaviour: Behaviour,
    code: str,
) -> None:
    contents = [f"text {i}" for i in range(4)]
    await add(database, *contents)
    # By default, not by the script: on a busy machine a call may end before its request has arrived.
    server.default = behaviour
    hasty = OpenAIEmbedder(base_url=server.base_url, timeout=0.2 if behaviour is hang else 60.0)
    started = monotonic()
    assert await EmbeddingWorker(queue, hasty).run_until_empty() == EmbeddingReport(claimed=4, failed=4)
    assert len(server.requests) == 1 or (behaviour is hang and not server.requests)
    for leased, attempts, stored_code, wait in await jobs(database):
        assert (leased, attempts, stored_code) == (False, 1, code)
        assert 0.8 * 60 - since(started) <= wait <= 1.2 * 60
    await hasty.aclose()

    server.default = ok
    await sql(database, "UPDATE embedding_jobs SET available_at = now()")
    assert await EmbeddingWorker(queue, embedder).run_until_empty() == EmbeddingReport(claimed=4, embedded=4)
    await assert_embedded(database, contents)


def failing_on(bad: str) -> Behaviour:
    """500 for every request with this text."""
    return lambda body: status(500)(body) if bad in texts_of(body) else ok(body)


async def embed_another(database: Database, worker: EmbeddingWorker) -> None:
    """So that failed calls do not come in a row."""
    await sql(database, "UPDATE embedding_jobs SET available_at = now() + interval '1 hour'")
    await add(database, "another")
    assert (await worker.run_once()).embedded == 1


async def test_the_wait_grows_with_the_attempts(
    database: Database, server: EmbeddingServer, embedder: Embedder
) -> None:
    await add(database, "a")
    server.default = failing_on("a")
    worker = EmbeddingWorker(EmbeddingQueue(database, max_attempts=5), embedder, reuse=False)
    for attempt in range(1, 5):
        started = monotonic()
        await worker.run_once()
        ((_, attempts, _, wait),) = await jobs(database)
        base = BACKOFF[min(attempt, 3) - 1].total_seconds()
        assert attempts == attempt
        assert 0.8 * base - since(started) <= wait <= 1.2 * base
        await embed_another(database, worker)
        await sql(database, "UPDATE embedding_jobs SET available_at = now()")


async def test_the_wait_is_spread(database: Database, queue: EmbeddingQueue) -> None:
    # One by one, so that each has its own; of an odd number, so that no third failure comes in a row.
    waits = set()
    for number in range(40):
        await add(database, f"text {number}")
        started = monotonic()
        await EmbeddingWorker(queue, Scripted(raising(TransientEmbeddingError("")))).run_once()
        wait = (await jobs(database))[-1][3]
        assert 48 - since(started) <= wait <= 72
        await queue.resume(Scripted.model)
        waits.add(round(wait))
    assert len(waits) > 10


async def test_what_fails_three_times_is_buried_and_its_neighbours_are_not(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    contents = [f"text {i}" for i in range(8)]
    await add(database, *contents)
    server.default = failing_on("text 3")
    worker = EmbeddingWorker(queue, embedder, backoff=AT_ONCE, concurrency=1)
    for _ in range(2):
        assert await worker.run_once() == EmbeddingReport(claimed=8, failed=8)
        await queue.resume(embedder.model)
    assert await worker.run_once() == EmbeddingReport(claimed=8, embedded=7, buried=1)
    assert len(server.requests) <= 3 + 2 * math.ceil(math.log2(8))
    assert await letters(database) == [("text 3", "EMBEDDING_MAX_RETRIES_EXCEEDED")]
    assert await sql(database, "SELECT status::text FROM knowledge_sources") == [("partial",)]

    server.default = reordered
    await queue.requeue(error_code=ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=1, embedded=1)
    await assert_embedded(database, contents)


async def test_chunks_of_different_attempts_are_counted_each_on_its_own(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    a, b, _ = await add(database, "a", "b", "c")
    await sql(
        database, f"UPDATE embedding_jobs SET attempts = CASE chunk_id WHEN {a} THEN 2 WHEN {b} THEN 1 ELSE 0 END"
    )
    # With its last attempt it is tried once more without the others.
    server.script(status(500), status(500))
    started = monotonic()
    assert await worker.run_once() == EmbeddingReport(claimed=3, failed=2, buried=1)
    assert [texts_of(body) for body in server.requests] == [["a", "b", "c"], ["a"]]
    assert await letters(database) == [("a", "EMBEDDING_MAX_RETRIES_EXCEEDED")]
    second, first = await jobs(database)
    assert (second[1], first[1]) == (2, 1)
    assert 240 - since(started) <= second[3] <= 360
    assert 48 - since(started) <= first[3] <= 72


# Texts at fault


@pytest.mark.parametrize("n", [1, 2, 3, 64, 100])
async def test_one_bad_text_costs_one_chunk(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker, n: int
) -> None:
    contents = [f"text {i}" for i in range(n)]
    contents[n // 3] = "poison"
    await add(database, *contents)
    server.default = poison(lambda text: text == "poison")
    assert await worker.run_until_empty() == EmbeddingReport(claimed=n, embedded=n - 1, buried=1)
    assert await letters(database) == [("poison", "INVALID_INPUT")]
    assert len(server.requests) <= 1 + 2 * math.ceil(math.log2(n))
    await assert_embedded(database, [content for content in contents if content != "poison"])
    expected = "partial" if n > 1 else "failed"
    assert await sql(database, "SELECT status::text FROM knowledge_sources") == [(expected,)]


async def test_a_vector_that_cannot_be_stored_costs_one_chunk(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "a", "b", "c", "bad")
    server.default = lambda body: (nan if "bad" in texts_of(body) else reordered)(body)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=4, embedded=3, failed=1)
    assert await letters(database) == []
    for expected in (EmbeddingReport(claimed=1, failed=1), EmbeddingReport(claimed=1, buried=1)):
        await sql(database, "UPDATE embedding_jobs SET available_at = now()")
        assert await worker.run_until_empty() == expected
    assert await letters(database) == [("bad", "EMBEDDING_MAX_RETRIES_EXCEEDED")]
    await assert_embedded(database, ["a", "b", "c"])


async def test_one_bad_answer_does_not_bury_a_good_text(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "good")
    server.script(nan, zero)
    report = await EmbeddingWorker(queue, embedder, backoff=AT_ONCE, concurrency=1).run_until_empty()
    assert report == EmbeddingReport(claimed=3, failed=2, embedded=1)


async def test_a_provider_that_refuses_every_text_can_be_recovered_from(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, worker: EmbeddingWorker
) -> None:
    contents = [f"text {i}" for i in range(8)]
    await add(database, *contents)
    server.default = status(400)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=8, buried=8)
    server.default = reordered
    assert await queue.requeue(error_code=ErrorCode.INVALID_INPUT) == 8
    assert await worker.run_until_empty() == EmbeddingReport(claimed=8, embedded=8)
    await assert_embedded(database, contents)


async def test_a_rate_limit_while_halving_keeps_what_was_done(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "a", "b", "c", "poison")
    server.script(status(400), reordered, status(429, headers={"retry-after": "30"}))
    assert await worker.run_until_empty() == EmbeddingReport(claimed=4, embedded=2, deferred=2)
    await assert_embedded(database, ["a", "b"])
    assert [row[1] for row in await jobs(database)] == [0, 0]


# Embedders at fault


@pytest.mark.parametrize(
    "call",
    [
        raising(RuntimeError("a bug")),
        raising(TimeoutError()),
        lambda texts: None,
        lambda texts: [["x"] * 1536 for _ in texts],
        lambda texts: [[1.0] * (1536 - i) for i, _ in enumerate(texts)],
    ],
    ids=["bug", "timeout", "nothing", "no numbers", "ragged"],
)
async def test_a_fault_of_the_embedder_counts_as_an_attempt(
    database: Database, queue: EmbeddingQueue, call: Callable[[list[str]], Any]
) -> None:
    await add(database, "a", "b")
    assert await EmbeddingWorker(queue, Scripted(call)).run_until_empty() == EmbeddingReport(claimed=2, failed=2)
    assert [row[:3] for row in await jobs(database)] == [(False, 1, "UNKNOWN_ERROR")] * 2


@pytest.mark.parametrize("n", [0, 1, 3])
async def test_too_few_or_too_many_vectors_are_a_passing_failure(
    database: Database, queue: EmbeddingQueue, n: int
) -> None:
    await add(database, "a", "b")
    worker = EmbeddingWorker(queue, Scripted(lambda texts: np.ones((n, 1536))))
    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, failed=2)
    assert [row[:3] for row in await jobs(database)] == [(False, 1, "SERVER_ERROR")] * 2


async def test_logs_hold_no_text(
    database: Database,
    server: EmbeddingServer,
    queue: EmbeddingQueue,
    embedder: Embedder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="kotonoha_store")
    secret = "梅雨の秘密"
    await add(database, secret, f"{secret} too")
    worker = EmbeddingWorker(queue, embedder)
    buggy = EmbeddingWorker(queue, Scripted(raising(ValueError(f"cannot embed {secret!r}"))))
    server.script(echo(429), echo(500))
    for run in (worker, worker, buggy):
        assert (await run.run_once()).claimed == 2
        await sql(database, "UPDATE embedding_jobs SET available_at = now()")
        await sql(database, "DELETE FROM embedding_pauses")
    server.default = echo(401)
    with pytest.raises(EmbedderConfigurationError) as raised:
        await worker.run_once()
    assert secret not in str(raised.value)
    server.default = echo(400)
    await sql(database, "DELETE FROM embedding_pauses")
    assert (await worker.run_once()).buried == 2

    assert len(caplog.records) >= 4
    assert secret not in caplog.text
    # What went wrong, and where, is there all the same.
    assert "ValueError" in caplog.text
    assert "embed_documents" in caplog.text
