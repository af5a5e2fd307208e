"""Providers that limit, fail or are not configured: left alone by every worker, at no chunk's cost."""

import math
from contextlib import suppress
from datetime import timedelta

import numpy as np
import pytest
from embedding_server import Behaviour, EmbeddingServer, dimension, ok, reordered, status, texts_of
from working import AT_ONCE, Scripted, add, assert_embedded, jobs, letters, raising, sql

from kotonoha_store import (
    Database,
    Embedder,
    EmbedderConfigurationError,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    ErrorCode,
    ProviderPause,
    RateLimitedError,
    embedding_batch,
)
from kotonoha_store.embedding_batch import (
    OUTAGE_DELAYS,
    PROBE,
    RATE_LIMIT_DELAY,
    RATE_LIMIT_DELAY_MAX,
)

pytestmark = pytest.mark.role("worker")

# Long enough for whatever is looked at while it lasts.
SHORTEST = timedelta(seconds=45)


async def asked_for(database: Database) -> float:
    """How many seconds the one pause that there is was to last, however much of it is over."""
    [(seconds,)] = await sql(
        database, "SELECT extract(epoch FROM paused_until - updated_at)::float FROM embedding_pauses"
    )
    return seconds


# Rate limits


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "70"}, 70),
        ({"retry-after": "0"}, SHORTEST.total_seconds()),
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
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    seconds: float,
) -> None:
    monkeypatch.setattr(embedding_batch, "RATE_LIMIT_DELAY_MIN", SHORTEST)
    await add(database, "a", "b", "c")
    server.script(status(429, headers=headers))
    worker = EmbeddingWorker(queue, embedder, batch_size=2, concurrency=1)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, deferred=2)
    assert len(server.requests) == 1
    assert [job[:3] for job in await jobs(database)] == [(False, 0, "RATE_LIMIT")] * 2 + [(False, 0, None)]
    (pause,) = await queue.pauses()
    assert (pause.provider, pause.failures, pause.error_code) == (embedder.model, 0, "RATE_LIMIT")
    assert await asked_for(database) == seconds
    # Nobody claims for it, and whoever asks does not pester it.
    assert (await queue.claim(provider=embedder.model)).chunks == ()
    assert await EmbeddingWorker(queue, embedder).run_until_empty() == EmbeddingReport()
    assert len(server.requests) == 1


@pytest.mark.parametrize("retry_after", [math.nan, math.inf, 1e300, -5.0])
async def test_any_number_can_be_a_wait(database: Database, queue: EmbeddingQueue, retry_after: float) -> None:
    await add(database, "a")
    worker = EmbeddingWorker(queue, Scripted(raising(RateLimitedError("slow down", retry_after=retry_after))))
    assert await worker.run_once() == EmbeddingReport(claimed=1, deferred=1)
    assert await asked_for(database) == (1 if retry_after < 0 else 3600)


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


# Outages


async def later(database: Database) -> None:
    """The pauses are over, and so are the waits of the jobs."""
    await sql(database, "UPDATE embedding_pauses SET paused_until = now()")
    await sql(database, "UPDATE embedding_jobs SET available_at = now() WHERE lease_token IS NULL")


async def test_an_outage_costs_no_attempts_from_the_third_failure_on(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    contents = [f"text {i}" for i in range(10)]
    await add(database, *contents)
    server.default = status(503)
    worker = EmbeddingWorker(queue, embedder, batch_size=2, concurrency=1)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=6, failed=4, deferred=2)
    # Three batches and the probe; from here on one word each time.
    assert [texts_of(body) for body in server.requests[3:]] == [[PROBE]]
    pauses = []
    for asked in range(5, 14):
        pauses.append(await asked_for(database))
        assert (await queue.claim(provider=embedder.model)).chunks == ()
        await later(database)
        assert await worker.run_until_empty() == EmbeddingReport()
        assert len(server.requests) == asked
    assert [round(pause / 30 / 2**n) for n, pause in enumerate(pauses[:5])] == [1] * 5
    assert max(pauses) <= 1.2 * OUTAGE_DELAYS[1].total_seconds()
    assert [job[1] for job in await jobs(database)] == [1] * 4 + [0] * 6

    server.default = ok
    await later(database)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=10, embedded=10)
    assert await queue.pauses() == []
    await assert_embedded(database, contents)


async def test_failures_count_in_a_row_over_all_workers(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, *"abcdef")
    workers = [EmbeddingWorker(queue, embedder, batch_size=1) for _ in range(3)]
    server.script(status(500), status(500), ok, status(500), status(500))
    for worker, expected in zip(workers * 2, ["failed", "failed", "embedded", "failed", "failed"], strict=False):
        assert getattr(await worker.run_once(), expected) == 1
    (pause,) = await queue.pauses()
    assert pause.failures == 2


async def test_a_text_that_fails_each_time_is_no_outage(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    """Alone in the queue, each failure is one in a row: the word that is asked then tells the difference."""
    await add(database, "killer")
    server.default = lambda body: status(500)(body) if "killer" in texts_of(body) else ok(body)
    report = await EmbeddingWorker(queue, embedder, backoff=AT_ONCE, concurrency=1).run_until_empty()
    assert report == EmbeddingReport(claimed=3, failed=2, buried=1)
    assert [texts_of(body)[0] for body in server.requests] == ["killer"] * 3 + [PROBE]
    assert await queue.pauses() == []


async def test_a_first_text_that_fails_each_time_dies_alone(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    """Halved towards the front, it fails many times in a row."""
    contents = ["killer", *(f"text {i}" for i in range(63))]
    await add(database, *contents)
    server.default = lambda body: status(500)(body) if "killer" in texts_of(body) else ok(body)
    report = await EmbeddingWorker(queue, embedder, backoff=AT_ONCE, concurrency=1).run_until_empty()
    assert report == EmbeddingReport(claimed=3 * 64, failed=2 * 64, embedded=63, buried=1)
    assert await letters(database) == [("killer", "EMBEDDING_MAX_RETRIES_EXCEEDED")]


async def test_a_rate_limit_in_the_answer_to_the_probe_is_kept(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, worker: EmbeddingWorker, embedder: Embedder
) -> None:
    await add(database, "a")
    await queue.pause(embedder.model, timedelta(0), ErrorCode.SERVER_ERROR, until_probed=True)
    server.script(status(429, headers={"retry-after": "40"}))
    assert await worker.run_once() == EmbeddingReport()
    (pause,) = await queue.pauses()
    assert (pause.failures, pause.error_code) == (0, "RATE_LIMIT")
    assert await asked_for(database) == 40


async def test_a_provider_that_refuses_even_the_probe_is_not_configured(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, worker: EmbeddingWorker, embedder: Embedder
) -> None:
    await add(database, "a")
    await queue.pause(embedder.model, timedelta(0), ErrorCode.SERVER_ERROR, until_probed=True)
    server.default = status(400)
    with pytest.raises(EmbedderConfigurationError, match="harmless"):
        await worker.run_once()
    assert [job[:2] for job in await jobs(database)] == [(False, 0)]


async def test_a_success_keeps_a_wait_that_another_worker_was_asked_for(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, "a")
    await queue.record_failure(embedder.model, ErrorCode.SERVER_ERROR)
    lease = await queue.claim(provider=embedder.model)
    assert lease.provider_has_failed
    await queue.record_success(embedder.model)
    await queue.record_failure(embedder.model, ErrorCode.SERVER_ERROR)
    await queue.pause(embedder.model, timedelta(seconds=30), ErrorCode.RATE_LIMIT)
    await queue.record_success(embedder.model)
    (pause,) = await queue.pauses()
    assert pause == ProviderPause(embedder.model, pause.remaining, 0, "RATE_LIMIT")


async def test_a_pause_can_be_ended_by_hand(
    database: Database, queue: EmbeddingQueue, worker: EmbeddingWorker, embedder: Embedder
) -> None:
    await add(database, "a")
    await queue.pause(embedder.model, timedelta(hours=1), ErrorCode.RATE_LIMIT)
    assert await worker.run_until_empty() == EmbeddingReport()
    await queue.resume(embedder.model)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=1, embedded=1)


async def test_the_longer_of_two_pauses_counts(queue: EmbeddingQueue) -> None:
    for seconds in (20, 50, 5):
        await queue.pause("model", timedelta(seconds=seconds), ErrorCode.RATE_LIMIT)
    pause = await queue.pause_of("model")
    assert pause is not None
    assert 20 < pause.remaining.total_seconds() <= 50


async def test_a_paused_provider_is_not_sent_the_rest_of_its_batch(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, *(f"text {i}" for i in range(6)))
    server.script(ok, status(429))
    # Each text is one token or two: requests of one text.
    worker = EmbeddingWorker(queue, embedder, request_tokens=1)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=6, embedded=1, deferred=5)
    assert len(server.requests) == 2


async def test_one_provider_does_not_block_another(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    await add(database, *"abcd")
    for behaviour in (status(429), status(401)):
        server.script(behaviour)
        with suppress(EmbedderConfigurationError):
            await EmbeddingWorker(queue, embedder, batch_size=2, concurrency=1).run_until_empty()
        report = await EmbeddingWorker(queue, Scripted(), batch_size=2, concurrency=1).run_once()
        assert report == EmbeddingReport(claimed=2, embedded=2)
    (pause,) = await queue.pauses()
    assert pause.provider == embedder.model


async def test_a_pause_for_ever_is_told_as_a_day(
    database: Database, server: EmbeddingServer, queue: EmbeddingQueue, embedder: Embedder
) -> None:
    """As somebody may set by hand."""
    await add(database, "a")
    await queue.pause(embedder.model, timedelta(seconds=1), ErrorCode.RATE_LIMIT)
    await sql(database, "UPDATE embedding_pauses SET paused_until = 'infinity'")
    (pause,) = await queue.pauses()
    assert pause.remaining == timedelta(days=1)
    assert await EmbeddingWorker(queue, embedder).run_until_empty() == EmbeddingReport()
    assert server.requests == []
