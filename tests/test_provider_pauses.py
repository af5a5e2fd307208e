"""Providers that limit, fail or are not configured: left alone by every worker, at no chunk's cost."""

import math

import numpy as np
import pytest
from embedding_server import (
    Behaviour,
    EmbeddingServer,
    dimension,
    reordered,
    status,
)
from working import Scripted, add, assert_embedded, jobs, raising

from kotonoha_store import (
    Database,
    Embedder,
    EmbedderConfigurationError,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    RateLimitedError,
)
from kotonoha_store.embedding_batch import (
    RATE_LIMIT_DELAY,
    RATE_LIMIT_DELAY_MAX,
    RATE_LIMIT_DELAY_MIN,
)

# Rate limits


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0"}, RATE_LIMIT_DELAY_MIN.total_seconds()),
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
    worker = EmbeddingWorker(queue, embedder, batch_size=2, concurrency=1)
    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, deferred=2)
    assert len(server.requests) == 1
    assert [job[:3] for job in await jobs(database)] == [(False, 0, "RATE_LIMIT")] * 2 + [(False, 0, None)]
    (pause,) = await queue.pauses()
    assert (pause.provider, pause.failures, pause.error_code) == (embedder.model, 0, "RATE_LIMIT")
    assert pause.remaining.total_seconds() == pytest.approx(seconds, abs=0.7)
    # Nobody claims for it, and whoever asks does not pester it.
    assert (await queue.claim(provider=embedder.model)).chunks == ()
    assert await EmbeddingWorker(queue, embedder).run_until_empty() == EmbeddingReport()
    assert len(server.requests) == 1


@pytest.mark.parametrize("retry_after", [math.nan, math.inf, 1e300, -5.0])
async def test_any_number_can_be_a_wait(database: Database, queue: EmbeddingQueue, retry_after: float) -> None:
    await add(database, "a")
    worker = EmbeddingWorker(queue, Scripted(raising(RateLimitedError("slow down", retry_after=retry_after))))
    assert await worker.run_once() == EmbeddingReport(claimed=1, deferred=1)
    (pause,) = await queue.pauses()
    assert pause.remaining.total_seconds() == pytest.approx(1 if retry_after < 0 else 3600, abs=0.7)


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
