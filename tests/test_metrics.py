"""The figures, scraped as Prometheus does it, after the work that should have moved them."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic
from typing import Any

import numpy as np
import prometheus_client
import pytest
from conftest import settings_for
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL

from kotonoha_store import (
    Database,
    ErrorCode,
    HashingEmbedder,
    Message,
    NotFoundError,
    RateLimitedError,
    SessionArchiver,
    Settings,
    Store,
    metrics,
)

Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


class Figures:
    """How much each figure has changed since the beginning."""

    def __init__(self, address: str) -> None:
        self._address = address
        # A gauge: what earlier tests left in it is no beginning.
        metrics.PENDING_CHUNKS.set(0)
        self._before = self._scrape()

    def _scrape(self) -> Scrape:
        with urllib.request.urlopen(self._address, timeout=60) as answer:  # noqa: S310  our own
            exposition = answer.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
        }

    async def change(self, name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return (await asyncio.to_thread(self._scrape)).get(key, 0.0) - self._before.get(key, 0.0)

    async def queries(self, query_type: str) -> float:
        return await self.change("db_query_duration_seconds_count", query_type=query_type)


@pytest.fixture
def figures(address: str) -> Figures:
    # Pools of earlier tests that wait for the collector would go on their own time.
    gc.collect()
    return Figures(address)


async def test_a_messages_whole_journey_moves_the_figures(store: Store, figures: Figures) -> None:
    started = monotonic()
    for number in range(2):
        async with store.begin() as tx:
            await tx.sessions.append(
                f"thread:{number}", Message.user("梅雨がないのはどこ？ " * 10), session_type="thread"
            )
    await store.archiver.run_once(idle_for=timedelta(0))
    chunks = (await store.queue.depth()).ready
    assert chunks >= 2
    assert await figures.change("pending_chunks_count") == chunks
    await store.embedding_worker.run_until_empty()
    await store.queue.depth()
    await store.search("雨", everywhere=True, threshold=None)

    assert await figures.change("sessions_archived_total") == 2
    assert await figures.change("session_archive_seconds_count") == 2
    assert await figures.change("session_archive_seconds_sum") > 0
    assert await figures.change("embedding_processed_total") == chunks
    assert await figures.change("embedding_processing_seconds_count") == 1
    assert await figures.change("pending_chunks_count") == 0
    assert await figures.queries("sessions.append") == 2
    assert await figures.queries("retrieval.nearest") == 1
    assert await figures.queries("embedding_queue.complete") == 1
    # In seconds.
    appending = await figures.change("db_query_duration_seconds_sum", query_type="sessions.append")
    assert 0 < appending < monotonic() - started


async def test_every_figure_has_the_name_that_dashboards_know(figures: Figures) -> None:
    """As they are scraped, not as they are constructed: the client appends _total by itself."""
    metrics.EMBEDDING_ERRORS.labels(error_type="RATE_LIMIT").inc(0)
    metrics.ARCHIVE_ERRORS.labels(error_type="StoreError").inc(0)
    exposition = prometheus_client.generate_latest().decode()
    types = dict(line.split(" ")[2:] for line in exposition.splitlines() if line.startswith("# TYPE "))
    expected = {
        "embedding_processing_seconds": "histogram",
        "pending_chunks_count": "gauge",
        "dead_letters_count": "gauge",
        "oldest_job_age_seconds": "gauge",
        "paused_providers_count": "gauge",
        "embedding_errors_total": "counter",
        "embedding_processed_total": "counter",
        "db_query_duration_seconds": "histogram",
        "db_pool_size": "gauge",
        "session_archive_seconds": "histogram",
        "sessions_archived_total": "counter",
        "sessions_archived_errors_total": "counter",
    }
    assert expected.items() <= types.items()
    for sample in (
        'embedding_errors_total{error_type="RATE_LIMIT"} ',
        'sessions_archived_errors_total{error_type="StoreError"} ',
        'db_query_duration_seconds_bucket{le="0.0005",query_type="sessions.append"} ',
        'db_pool_size{state="in_use"} ',
        'db_pool_size{state="idle"} ',
    ):
        assert f"\n{sample}" in exposition


async def test_a_call_that_fails_is_observed_too(store: Store, figures: Figures) -> None:
    with pytest.raises(NotFoundError):
        async with store.begin() as tx:
            await tx.sessions.load("nobody")
    assert await figures.queries("sessions.load") == 1


class Refusing(HashingEmbedder):
    async def embed_documents(self, _: Any) -> np.ndarray:
        raise RateLimitedError("slow down", retry_after=60.0)


async def test_a_refused_request_counts_as_an_error_of_its_code_and_as_no_vector(
    settings: Settings, figures: Figures
) -> None:
    async with Store.open(settings, embedder=Refusing()) as store:
        await store.add_document("t", "a text")
        await store.embedding_worker.run_until_empty()
        await store.queue.depth()
    assert await figures.change("embedding_errors_total", error_type=ErrorCode.RATE_LIMIT) == 1
    assert await figures.change("embedding_processed_total") == 0
    assert await figures.change("embedding_processing_seconds_count") == 1


async def test_an_archive_that_fails_counts_as_an_error_and_not_as_an_archive(
    store: Store, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with store.begin() as tx:
        await tx.sessions.append("thread:1", Message.user("梅雨がないのはどこ？ " * 10), session_type="thread")

    async def broken(*_: object, **__: object) -> None:
        raise LookupError("a fault of the program")

    monkeypatch.setattr(SessionArchiver, "_archive_once", broken)
    report = await store.archiver.run_once(idle_for=timedelta(0))
    assert len(report.failed) == 1
    assert await figures.change("sessions_archived_errors_total", error_type="LookupError") == 1
    assert await figures.change("sessions_archived_total") == 0
    assert await figures.change("session_archive_seconds_count") == 0


async def test_pools_are_counted_together_for_as_long_as_they_live(migrated_url: URL, figures: Figures) -> None:
    async def sizes() -> tuple[float, float]:
        return await figures.change("db_pool_size", state="in_use"), await figures.change("db_pool_size", state="idle")

    settings = settings_for(migrated_url, db_pool_min_size=2)
    async with Database(migrated_url, settings) as one, Database(migrated_url, settings) as two:
        async with one.begin(), two.begin(), two.begin():
            assert await sizes() == (3, 0)
        assert await sizes() == (0, 3)
        await one.close()
        assert await sizes() == (0, 2)
    assert await sizes() == (0, 0)


def test_a_scrape_while_pools_come_and_go_fails_never(migrated_url: URL) -> None:
    """A set that changes under its iteration raises; a scrape runs in a thread of its own."""
    settings = settings_for(migrated_url)
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            metrics.pool_sizes()

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as threads:
            scraping = threads.submit(scrape)
            kept = [Database(migrated_url, settings) for _ in range(300)]
            done.set()
            scraping.result()
    finally:
        sys.setswitchinterval(switching)
    assert len(kept) == 300


WITHOUT = """
import asyncio, datetime, sys
sys.modules["prometheus_client"] = None
from kotonoha_store import HashingEmbedder, Message, Store, metrics

async def main():
    assert not metrics.IS_MEASURING
    async with Store.open(embedder=HashingEmbedder()) as store:
        async with store.begin() as tx:
            await tx.sessions.append("k", Message.user("a question, long enough to keep"), session_type="thread")
        report = await store.archiver.run_once(idle_for=datetime.timedelta(0))
        await store.embedding_worker.run_until_empty()
        result = await store.search("question", everywhere=True, threshold=None)
    assert metrics.pool_sizes() == {"in_use": 0, "idle": 0}
    for metric in (metrics.EMBEDDING_ERRORS, metrics.ARCHIVE_ERRORS):
        metric.labels(error_type="x").inc(2)
    metrics.PENDING_CHUNKS.set(3)
    metrics.ARCHIVE_SECONDS.observe(0.5)
    print(len(result.hits))

asyncio.run(main())
"""


def test_without_the_client_everything_works_and_nothing_is_measured(migrated_url: URL) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT],
        env={**os.environ, "DATABASE_URL": migrated_url.render_as_string(hide_password=False)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
