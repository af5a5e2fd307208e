"""The worker: the real OpenAI client, a server that misbehaves, a real queue."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from embedding_server import (
    Behaviour,
    EmbeddingServer,
    close,
    dimension,
    echo,
    hang,
    nan,
    poison,
    reordered,
    short,
    status,
    texts_of,
    vector_of,
    zero,
)
from numpy.typing import NDArray
from sqlalchemy import text

from kotonoha_store import (
    Database,
    Embedder,
    EmbedderConfigurationError,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    ErrorCode,
    HashingEmbedder,
    KnowledgeRepository,
    LeaseLostError,
    NewChunk,
    OpenAIEmbedder,
    RateLimitedError,
    Settings,
    SourceType,
    Store,
    StoreUnavailableError,
    UnembeddableTextError,
)
from kotonoha_store.embedding_batch import BACKOFF, RATE_LIMIT_DELAY, RATE_LIMIT_DELAY_MAX

AT_ONCE = (timedelta(0),)


class Scripted:
    """An embedder that does what it is told for each call."""

    model = "scripted"

    def __init__(self, *calls: Callable[[list[str]], Any]) -> None:
        self.calls = list(calls)
        self.texts: list[list[str]] = []

    async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts.append(list(texts))
        return (self.calls.pop(0) if self.calls else right)(list(texts))

    async def embed_query(self, text: str) -> NDArray[np.float32]:
        return right([text])[0]

    async def aclose(self) -> None:
        pass


def right(texts: list[str]) -> NDArray[np.float32]:
    return np.array([vector_of(text) for text in texts])


def raising(error: Exception) -> Callable[[list[str]], Any]:
    def call(texts: list[str]) -> Any:
        raise error

    return call


@pytest.fixture
def queue(database: Database) -> EmbeddingQueue:
    return EmbeddingQueue(database)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddingServer]:
    async with EmbeddingServer() as server:
        yield server


@pytest.fixture
async def embedder(server: EmbeddingServer) -> AsyncIterator[OpenAIEmbedder]:
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=2.0)
    yield embedder
    await embedder.aclose()


@pytest.fixture
def worker(queue: EmbeddingQueue, embedder: Embedder) -> EmbeddingWorker:
    return EmbeddingWorker(queue, embedder)


async def add(database: Database, *contents: str) -> list[int]:
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, "a source")
        return await knowledge.add_chunks(source_id, [NewChunk(content=content) for content in contents])


async def sql(database: Database, statement: str) -> list[Any]:
    async with database.begin() as session:
        result = await session.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


async def stored(database: Database) -> dict[str, NDArray[np.float64]]:
    """The vectors there are, by content."""
    rows = await sql(database, "SELECT content, embedding::text FROM knowledge_chunks WHERE embedding IS NOT NULL")
    return {content: np.array(vector.strip("[]").split(","), dtype=float) for content, vector in rows}


async def jobs(database: Database) -> list[tuple[Any, ...]]:
    """Leased or not, attempts, code, and the seconds until it may be claimed."""
    return await sql(
        database,
        "SELECT lease_token IS NOT NULL, attempts, error_code, extract(epoch FROM available_at - now())::float"
        " FROM embedding_jobs ORDER BY chunk_id",
    )


async def letters(database: Database) -> list[tuple[Any, ...]]:
    return await sql(database, "SELECT content, error_code FROM knowledge_chunks_dlq ORDER BY id")


async def assert_embedded(database: Database, contents: Sequence[str]) -> None:
    found = await stored(database)
    assert set(found) == set(contents)
    for content, vector in found.items():
        np.testing.assert_allclose(vector, vector_of(content), atol=1e-4)


# What goes right


async def test_each_chunk_gets_its_own_vector(
    database: Database, server: EmbeddingServer, embedder: Embedder, queue: EmbeddingQueue
) -> None:
    contents = [f"text {i}" for i in range(25)]
    await add(database, *contents)
    server.script(reordered)
    report = await EmbeddingWorker(queue, embedder, batch_size=10).run_until_empty()
    assert report == EmbeddingReport(claimed=25, embedded=25)
    assert [len(texts_of(body)) for body in server.requests] == [10, 10, 5]
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

    await EmbeddingWorker(queue, Scripted(look, look), batch_size=1).run_until_empty()
    assert held == [0, 0]


async def test_workers_share_the_queue(database: Database, queue: EmbeddingQueue, embedder: Embedder) -> None:
    contents = [f"text {i}" for i in range(60)]
    await add(database, *contents)
    workers = [EmbeddingWorker(queue, embedder, batch_size=5) for _ in range(4)]
    reports = await asyncio.gather(*(worker.run_until_empty() for worker in workers))
    assert sum(reports, EmbeddingReport()) == EmbeddingReport(claimed=60, embedded=60)
    await assert_embedded(database, contents)


# Rate limits


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0"}, 0),
        ({}, RATE_LIMIT_DELAY.total_seconds()),
        ({"retry-after": "soon"}, RATE_LIMIT_DELAY.total_seconds()),
        ({"retry-after": "1e300"}, RATE_LIMIT_DELAY_MAX.total_seconds()),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, RATE_LIMIT_DELAY_MAX.total_seconds()),
    ],
)
async def test_a_rate_limit_puts_off_gives_the_attempt_back_and_stops(
    database: Database,
    server: EmbeddingServer,
    queue: EmbeddingQueue,
    embedder: Embedder,
    headers: dict[str, str],
    seconds: float,
) -> None:
    await add(database, "a", "b", "c")
    server.script(status(429, headers=headers))
    report = await EmbeddingWorker(queue, embedder, batch_size=2).run_until_empty()
    assert report == EmbeddingReport(claimed=2, deferred=2)
    assert len(server.requests) == 1
    first, second, untouched = await jobs(database)
    for leased, attempts, code, wait in (first, second):
        assert (leased, attempts, code) == (False, 0, "RATE_LIMIT")
        assert wait == pytest.approx(seconds, abs=2)
    assert untouched[:3] == (False, 0, None)


@pytest.mark.parametrize("retry_after", [math.nan, math.inf, 1e300, -5.0])
async def test_any_number_can_be_a_wait(database: Database, queue: EmbeddingQueue, retry_after: float) -> None:
    await add(database, "a")
    worker = EmbeddingWorker(queue, Scripted(raising(RateLimitedError("slow down", retry_after=retry_after))))
    assert await worker.run_once() == EmbeddingReport(claimed=1, deferred=1)
    ((_, _, _, wait),) = await jobs(database)
    assert wait == pytest.approx(0 if retry_after < 0 else 3600, abs=2)


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
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, behaviour: Behaviour, code: str
) -> None:
    contents = [f"text {i}" for i in range(4)]
    await add(database, *contents)
    server.script(behaviour)
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=0.2 if behaviour is hang else 2.0)
    worker = EmbeddingWorker(queue, embedder)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=4, failed=4)
    assert len(server.requests) == 1
    for leased, attempts, stored_code, wait in await jobs(database):
        assert (leased, attempts, stored_code) == (False, 1, code)
        assert 0.8 * 60 - 2 <= wait <= 1.2 * 60

    await sql(database, "UPDATE embedding_jobs SET available_at = now()")
    assert await worker.run_until_empty() == EmbeddingReport(claimed=4, embedded=4)
    await assert_embedded(database, contents)
    await embedder.aclose()


async def test_the_wait_grows_with_the_attempts(
    database: Database, server: EmbeddingServer, embedder: Embedder
) -> None:
    await add(database, "a")
    server.default = status(500)
    worker = EmbeddingWorker(EmbeddingQueue(database, max_attempts=5), embedder)
    for attempt in range(1, 5):
        await worker.run_once()
        ((_, attempts, _, wait),) = await jobs(database)
        base = BACKOFF[min(attempt, 3) - 1].total_seconds()
        assert attempts == attempt
        assert 0.8 * base - 2 <= wait <= 1.2 * base
        await sql(database, "UPDATE embedding_jobs SET available_at = now()")


async def test_the_wait_is_spread(queue: EmbeddingQueue) -> None:
    worker = EmbeddingWorker(queue, Scripted())
    waits = {worker._delay(1) for _ in range(100)}
    assert len(waits) > 90
    assert timedelta(seconds=48) <= min(waits)
    assert max(waits) <= timedelta(seconds=72)


async def test_what_fails_three_times_is_buried(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "a", "b")
    server.default = status(500)
    report = await EmbeddingWorker(queue, embedder, backoff=AT_ONCE).run_until_empty()
    assert report == EmbeddingReport(claimed=6, failed=4, buried=2)
    assert len(server.requests) == 3
    assert await letters(database) == [(content, "EMBEDDING_MAX_RETRIES_EXCEEDED") for content in "ab"]
    assert await sql(database, "SELECT status::text FROM knowledge_sources") == [("failed",)]

    server.default = reordered
    await queue.requeue(error_code=ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED)
    assert await EmbeddingWorker(queue, embedder).run_until_empty() == EmbeddingReport(claimed=2, embedded=2)
    await assert_embedded(database, ["a", "b"])


async def test_chunks_of_different_attempts_are_counted_each_on_its_own(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    a, b, _ = await add(database, "a", "b", "c")
    await sql(
        database, f"UPDATE embedding_jobs SET attempts = CASE chunk_id WHEN {a} THEN 2 WHEN {b} THEN 1 ELSE 0 END"
    )
    server.script(status(500))
    assert await worker.run_once() == EmbeddingReport(claimed=3, failed=2, buried=1)
    assert await letters(database) == [("a", "EMBEDDING_MAX_RETRIES_EXCEEDED")]
    second, first = await jobs(database)
    assert (second[1], first[1]) == (2, 1)
    assert 240 - 2 <= second[3] <= 360
    assert 48 - 2 <= first[3] <= 72


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
    assert await worker.run_until_empty() == EmbeddingReport(claimed=4, embedded=3, buried=1)
    assert await letters(database) == [("bad", "INVALID_INPUT")]
    await assert_embedded(database, ["a", "b", "c"])


async def test_a_provider_that_refuses_every_text_can_be_recovered_from(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, worker: EmbeddingWorker
) -> None:
    contents = [f"text {i}" for i in range(8)]
    await add(database, *contents)
    server.default = status(400)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=8, buried=8)
    server.default = zero
    await queue.requeue(error_code=ErrorCode.INVALID_INPUT)
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


# Configuration


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (status(401), "AUTHENTICATION_ERROR"),
        (status(403), "PERMISSION_ERROR"),
        (status(404), "NOT_FOUND"),
        (status(400, error={"param": "dimensions"}), "NOT_FOUND"),
        (status(429, error={"code": "insufficient_quota"}), "RATE_LIMIT"),
        (dimension(3072), "UNKNOWN_ERROR"),
    ],
)
async def test_a_wrong_configuration_is_told_and_consumes_nothing(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker, behaviour: Behaviour, code: str
) -> None:
    await add(database, "a", "b")
    server.default = behaviour
    for _ in range(5):
        with pytest.raises(EmbedderConfigurationError):
            await worker.run_until_empty()
    assert len(server.requests) == 5
    for leased, attempts, stored_code, wait in await jobs(database):
        assert (leased, attempts, stored_code) == (False, 0, code)
        assert wait <= 0
    server.default = reordered
    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, embedded=2)


async def test_a_key_that_expires_while_halving_gives_back_the_rest_only(
    database: Database, server: EmbeddingServer, worker: EmbeddingWorker
) -> None:
    await add(database, "a", "b", "c", "d")
    server.script(status(400), reordered, status(401))
    with pytest.raises(EmbedderConfigurationError):
        await worker.run_until_empty()
    await assert_embedded(database, ["a", "b"])
    assert [row[:3] for row in await jobs(database)] == [(False, 0, "AUTHENTICATION_ERROR")] * 2


@pytest.mark.parametrize("shape", [(2, 768), (2,), (2, 1, 1536)])
async def test_an_embedder_of_another_dimension_is_a_wrong_configuration(
    database: Database, queue: EmbeddingQueue, shape: tuple[int, ...]
) -> None:
    await add(database, "a", "b")
    with pytest.raises(EmbedderConfigurationError, match="1536"):
        await EmbeddingWorker(queue, Scripted(lambda texts: np.ones(shape))).run_until_empty()
    assert [row[:2] for row in await jobs(database)] == [(False, 0)] * 2


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
        await add(database, "a", "b", "c")
        assert await EmbeddingWorker(queue, Slow(call)).run_once() == expected
        assert results.pop() == EmbeddingReport(claimed=1, embedded=1)
    last_chance = EmbeddingWorker(EmbeddingQueue(database, max_attempts=1), Slow(raising(RuntimeError())))
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
    async with asyncio.timeout(5):
        while (await jobs(database))[0][0]:  # noqa: ASYNC110
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
    server.default = echo(401)
    with pytest.raises(EmbedderConfigurationError) as raised:
        await worker.run_once()
    assert secret not in str(raised.value)
    server.default = echo(400)
    assert (await worker.run_once()).buried == 2

    assert len(caplog.records) >= 4
    assert secret not in caplog.text
    # What went wrong, and where, is there all the same.
    assert "ValueError" in caplog.text
    assert "embed_documents" in caplog.text


async def test_a_locked_source_holds_up_itself_alone_and_costs_no_attempt(settings: Settings) -> None:
    """The embedder did its work each time; only the write to one source had to wait."""
    hasty = settings.model_copy(update={"db_command_timeout": 0.5})
    async with await Database.open(hasty) as database, await Database.open(settings) as other:
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
