"""The router and the example application, through ASGI and once through a real server."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from conftest import run_sql, settings_for
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import URL, make_url

from kotonoha_store import ErrorCode, HashingEmbedder, Settings, Store, metrics
from kotonoha_store.web import health_router

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "web_app.py"


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client,
    ):
        yield client


def app_around(store: Store | None, limit_seconds: float = 60.0) -> FastAPI:
    app = FastAPI()
    app.include_router(health_router(limit_seconds=limit_seconds))
    app.state.store = store
    return app


def example() -> ModuleType:
    specification = importlib.util.spec_from_file_location("web_app", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["web_app"] = module
    specification.loader.exec_module(module)
    return module


def figures(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def healthy_within(seconds: float, url: str) -> Any:
    """The first answer with 200: a probe of two seconds may find the machine standing still as long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  our own
                assert answer.status == 200
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503 or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)


async def test_probes_of_a_store_that_works(store: Store) -> None:
    async with client_of(app_around(store)) as client:
        health = await client.get("/health")
        assert (health.status_code, health.headers["cache-control"]) == (200, "no-store")
        assert health.json().items() >= {"status": "healthy", "database": "connected", "pgvector": "working"}.items()
        assert (await client.get("/ready")).json() == {"status": "ready"}
        assert (await client.get("/live")).json() == {"status": "alive"}


async def test_without_a_database_the_process_lives_but_is_not_ready() -> None:
    url = make_url("postgresql://nobody:s3cr3t@127.0.0.1:1/kotonoha")
    async with (
        Store.open(settings_for(url, db_connect_attempts=1), embedder=HashingEmbedder()) as store,
        client_of(app_around(store)) as client,
    ):
        for path, status in (("/health", "unhealthy"), ("/ready", "not ready")):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["status"]) == (503, status)
            assert "cannot be reached" in answer.json()["error"]
            assert "127.0.0.1" not in answer.text
            assert "s3cr3t" not in answer.text
        assert (await client.get("/live")).status_code == 200


async def test_an_outdated_schema_is_not_ready(migrated_url: URL) -> None:
    await run_sql(migrated_url, "UPDATE alembic_version SET version_num = '0001'")
    async with (
        Store.open(settings_for(migrated_url), embedder=HashingEmbedder()) as store,
        client_of(app_around(store)) as client,
    ):
        assert (await client.get("/ready")).status_code == 503
        assert "migrate" in (await client.get("/health")).json()["error"]


async def test_a_store_that_is_not_open_is_told() -> None:
    async with client_of(app_around(None)) as client:
        for path in ("/health", "/ready"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert "app.state.store" in answer.json()["error"]
        assert (await client.get("/live")).status_code == 200


async def test_a_scrape_reads_the_queue_anew(store: Store) -> None:
    """A process that only serves embeds nothing, and would show the queue as it once was."""
    for text in ("one", "two", "three"):
        await store.add_document("t", text)
    lease = await store.queue.claim(1)
    await store.queue.bury(lease, lease.chunk_ids, ErrorCode.INVALID_INPUT)
    await store.queue.pause("keyless", timedelta(hours=1), ErrorCode.AUTHENTICATION_ERROR, until_probed=True)
    await store.queue.record_failure("once", ErrorCode.SERVER_ERROR)
    for gauge in metrics.QUEUE_GAUGES:
        gauge.set(99)
    async with client_of(app_around(store)) as client:
        answer = await client.get("/metrics")
        found = figures(answer.text)
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert (found["pending_chunks_count"], found["dead_letters_count"], found["paused_providers_count"]) == (
            2,
            1,
            1,
        )
        assert 0 < found["oldest_job_age_seconds"] < 99
        assert "db_pool_size" in found
        openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert openmetrics.text.endswith("# EOF\n")

        # What is not known is no number.
        async with store.database.transaction() as connection:
            await connection.exec_driver_sql("LOCK TABLE embedding_jobs")
            async with client_of(app_around(store, limit_seconds=0.5)) as hasty:
                found = figures((await hasty.get("/metrics")).text)
        assert found["pending_chunks_count"] != found["pending_chunks_count"]
        assert figures((await client.get("/metrics")).text)["pending_chunks_count"] == 2


async def test_without_the_extra_metrics_a_scrape_is_told_what_to_install(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "IS_MEASURING", False)
    async with client_of(app_around(store)) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 501
    assert "kotonoha-store[metrics]" in answer.text


def test_without_the_extra_web_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['fastapi'] = None; import kotonoha_store.web"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: kotonoha_store.web needs FastAPI: pip install")


async def test_the_example_takes_messages_and_finds_them(settings: Settings) -> None:
    app = example().create_app(settings.model_copy(update={"kb_embedder": "hashing"}))
    message = {"session_key": "web:1", "content": "北海道には梅雨がない。 " * 5, "user_id": 2**62}
    asked = {"query": "梅雨", "user_id": 2**62}
    async with client_of(app) as client:
        answer = await client.post("/messages", json=message)
        assert (answer.status_code, answer.json()) == (201, {"message_count": 1})
        await app.state.store.archiver.run_once(idle_for=timedelta(0))
        await app.state.store.embedding_worker.run_until_empty()
        for mode in ("words", "meaning", "hybrid"):
            (hit,) = (await client.get("/search", params={**asked, "mode": mode})).json()
            assert "北海道" in hit["content"]
        assert (await client.get("/search", params={**asked, "user_id": 3})).json() == []
        for path, wrong in (("/search", {"query": "\0", "user_id": 1}), ("/search", {"query": "a", "user_id": 2**63})):
            assert (await client.get(path, params=wrong)).status_code == 422
        assert (await client.post("/messages", json={**message, "content": "a\0b"})).status_code == 422
        # Its probes have two seconds, and the machine may stand still as long.
        async with asyncio.timeout(60):
            while (await client.get("/health")).status_code != 200:  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(0.1)


async def test_the_example_says_when_its_store_is_closed(settings: Settings) -> None:
    app = example().create_app(settings)
    async with client_of(app) as client:
        async with app.router.lifespan_context(app):
            pass
        answer = await client.get("/search", params={"query": "a", "user_id": 1})
    assert (answer.status_code, answer.json()["error"]) == (503, "StoreUnavailableError")


async def test_the_examples_own_requests_find_what_was_said(settings: Settings) -> None:
    module = example()
    said = re.search(r"-d '(.*)'", str(module.__doc__))
    asked = re.search(r"localhost:8000(/search\S*)'", str(module.__doc__))
    assert said
    assert asked
    app = module.create_app(settings)
    async with client_of(app) as client:
        assert (await client.post("/messages", json=json.loads(said[1]))).status_code == 201
        await app.state.store.archiver.run_once(idle_for=timedelta(0))
        (hit,) = (await client.get(asked[1])).json()
    assert "rainy season" in hit["content"]


def test_the_example_runs_as_a_server_and_stops(empty_url: URL) -> None:
    environment = {
        **os.environ,
        "DATABASE_URL": empty_url.render_as_string(hide_password=False),
        "PYTHONWARNINGS": "error",
    }
    with subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--migrate", "--port", "0"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    break
            else:
                raise AssertionError("".join(lines))
            assert healthy_within(60, f"{found[1]}/health")["status"] == "healthy"
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=120)[1]
    assert "Traceback" not in rest
    assert "Application shutdown complete" in rest
