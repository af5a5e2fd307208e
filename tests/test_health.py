"""Health: what it says, and that it says it in time whatever hangs."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import pytest
from conftest import run_sql, settings_for
from sqlalchemy import URL, make_url

from kotonoha_store import (
    ErrorCode,
    HashingEmbedder,
    InvalidInputError,
    Settings,
    Store,
    StoreUnavailableError,
    migrations,
)
from kotonoha_store.database import connect_arguments
from kotonoha_store.health import CheckResult

LIMIT = 0.5
# For where something hangs, and other things are to be told nevertheless.
PARTLY = 2.0
# Beyond the limit only what a loaded machine adds; what hangs here does so for longer.
SLACK = 20.0
PATIENT = 60.0
SECRETS = ("s3cr3t", "nobody", "localhost", "127.0.0.1", "a private text")


@asynccontextmanager
async def opened(url: URL, **values: object) -> AsyncIterator[Store]:
    async with Store.open(settings_for(url, **values), embedder=HashingEmbedder()) as store:
        yield store


async def timed(store: Store, limit: float = LIMIT) -> dict[str, object]:
    started = time.monotonic()
    report = await store.health(limit)
    assert time.monotonic() - started < limit + SLACK
    assert report.seconds < limit + SLACK
    said = json.dumps(report.to_dict())
    assert not [secret for secret in SECRETS if secret in said]
    return report.to_dict()


@pytest.fixture
def silent_url() -> Iterator[URL]:
    """A server that takes connections and swallows what it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        yield make_url(f"postgresql://nobody:s3cr3t@127.0.0.1:{port}/kotonoha?sslmode=disable")


async def test_a_healthy_store_says_so_under_the_names_that_were_agreed(store: Store) -> None:
    await store.add_document("t", "a private text")
    report = await store.health(PATIENT)
    said = json.loads(json.dumps(report.to_dict()))
    assert {name: said[name] for name in ("status", "database", "pgvector")} == {
        "status": "healthy",
        "database": "connected",
        "pgvector": "working",
    }
    assert report.is_healthy
    assert said["pgvector_version"].startswith("0.")
    assert "error" not in said
    assert said["schema"] == {"revision": migrations.head(), "head": migrations.head(), "state": "current"}
    assert said["queue"].items() >= {"ready": 1, "waiting": 0, "dead": 0}.items()
    assert said["queue"]["oldest_seconds"] >= 0
    assert said["dead_letters"] == 0
    assert said["provider_pauses"] == said["warnings"] == []
    assert "private" not in repr(report)


async def test_a_paused_provider_and_dead_letters_are_warnings(store: Store) -> None:
    """They are no reason to take a bot that answers out of service."""
    await store.add_document("t", "a private text")
    lease = await store.queue.claim()
    await store.queue.bury(lease, lease.chunk_ids, ErrorCode.INVALID_INPUT)
    await store.queue.pause("keyless", timedelta(hours=1), ErrorCode.AUTHENTICATION_ERROR, until_probed=True)
    await store.queue.pause("busy", timedelta(minutes=1), ErrorCode.RATE_LIMIT)
    await store.queue.record_failure("once", ErrorCode.SERVER_ERROR)
    said = await timed(store, PATIENT)
    assert said["status"] == "healthy"
    assert said["dead_letters"] == 1
    busy, keyless = said["provider_pauses"]  # type: ignore[misc]
    assert (busy["provider"], busy["is_configuration"]) == ("busy", False)
    assert (keyless["provider"], keyless["is_configuration"]) == ("keyless", True)
    warnings = " ".join(said["warnings"])  # type: ignore[arg-type]
    assert "'keyless' refuses key" in warnings
    assert "AUTHENTICATION_ERROR" in warnings
    assert "'busy' is left alone for" in warnings
    assert "1 dead letters" in warnings


async def test_a_server_that_never_answers_is_told_within_the_limit(silent_url: URL) -> None:
    async with opened(silent_url, db_connect_timeout=60.0) as store:
        # As often as it is asked.
        for _ in range(3):
            said = await timed(store)
            assert (said["status"], said["database"]) == ("unhealthy", "disconnected")
            assert "did not answer within 0.5 s" in str(said["error"])
        assert await store.health_checks.why_not_ready(LIMIT) is not None


async def test_an_exhausted_pool_is_told_within_the_limit(migrated_url: URL) -> None:
    async with (
        opened(migrated_url, db_pool_min_size=1, db_pool_max_size=1) as store,
        store.database.connect(),
    ):
        said = await timed(store)
    assert (said["status"], said["database"]) == ("unhealthy", "disconnected")
    assert "DB_POOL_MAX_SIZE" in str(said["error"])


async def test_one_connection_is_enough(migrated_url: URL) -> None:
    async with opened(migrated_url, db_pool_min_size=1, db_pool_max_size=1) as store:
        assert (await store.health(30)).is_healthy


@pytest.mark.parametrize(("table", "status"), [("embedding_jobs", "healthy"), ("alembic_version", "unhealthy")])
async def test_a_locked_table_is_told_within_the_limit(migrated_url: URL, table: str, status: str) -> None:
    connection = await asyncpg.connect(**connect_arguments(migrated_url, settings_for(migrated_url)))
    async with opened(migrated_url) as store:
        # Its connections are there.
        assert (await store.health(PATIENT)).is_healthy
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table}")
            said = await timed(store, PARTLY)
            assert (said["status"], said["database"]) == (status, "connected")
            assert "within 2 s" in json.dumps([said["warnings"], said.get("error")])
            assert said["pgvector"] == "working"
            # What hung is given up on the server as well, and does not pile up.
            waiting = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{table}'::regclass"
            async with asyncio.timeout(30):
                while await connection.fetchval(waiting):  # noqa: ASYNC110  the server tells nobody
                    await asyncio.sleep(0.02)
        assert (await store.health(30)).warnings == ()
    await connection.close()


async def test_a_host_name_that_is_never_resolved_is_told_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unresolved(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unresolved)
    url = make_url("postgresql://nobody:s3cr3t@localhost:1/kotonoha")
    async with opened(url, db_connect_timeout=60.0) as store:
        said = await timed(store)
    assert (said["status"], said["database"]) == ("unhealthy", "disconnected")


async def test_a_refused_connection_is_told_without_host_user_or_password() -> None:
    url = make_url("postgresql://nobody:s3cr3t@127.0.0.1:1/kotonoha")
    async with opened(url, db_connect_attempts=1) as store:
        said = await timed(store, PATIENT)
    assert (said["status"], said["database"]) == ("unhealthy", "disconnected")
    assert "cannot be reached" in str(said["error"])


async def test_a_missing_extension_is_no_working_pgvector(empty_url: URL) -> None:
    async with opened(empty_url) as store:
        said = await timed(store, PATIENT)
        assert (said["status"], said["database"], said["pgvector"]) == ("unhealthy", "connected", "not_working")
        assert "CREATE EXTENSION vector" in str(said["error"])
        await run_sql(empty_url, "CREATE SCHEMA elsewhere", "CREATE EXTENSION vector SCHEMA elsewhere")
        assert "search_path" in str((await timed(store, PATIENT))["error"])


@pytest.mark.parametrize(
    ("revision", "status", "said"),
    [("0001", "unhealthy", "migrate"), ("9999", "healthy", "newer")],
)
async def test_an_outdated_schema_is_unhealthy_and_a_newer_one_is_not(
    migrated_url: URL, revision: str, status: str, said: str
) -> None:
    """Else rolling out a version that migrates would take every process of the old one out of service."""
    await run_sql(migrated_url, f"UPDATE alembic_version SET version_num = '{revision}'")
    async with opened(migrated_url) as store:
        report = await store.health(PATIENT)
        assert report.status == status
        assert said in (report.error or " ".join(report.warnings))
        assert (await store.health_checks.why_not_ready(PATIENT) is None) == (status == "healthy")
    await run_sql(migrated_url, "DROP TABLE alembic_version")
    async with opened(migrated_url) as store:
        report = await store.health(PATIENT)
        assert "never migrated" in str(report.error)
        assert report.queue is not None


async def test_other_systems_add_their_checks(store: Store) -> None:
    async def late() -> CheckResult:
        await asyncio.Event().wait()
        raise AssertionError

    async def broken() -> CheckResult:
        raise ValueError("a private text")

    async def down() -> CheckResult:
        raise StoreUnavailableError("the other database did not answer")

    async def fine() -> CheckResult:
        return CheckResult(details={"rows": 3})

    store.health_checks.register("fine", fine, critical=True)
    assert (await store.health(PATIENT)).warnings == ()
    store.health_checks.register("late", late)
    store.health_checks.register("broken", broken)
    said = await timed(store, PARTLY)
    assert said["status"] == "healthy"
    assert said["warnings"] == ["late: no answer within 2 s", "broken: failed with ValueError"]
    assert said["checks"]["fine"] == {"state": "ok", "message": None, "details": {"rows": 3}}  # type: ignore[index]

    store.health_checks.register("down", down, critical=True)
    said = await timed(store, PARTLY)
    assert (said["status"], said["error"]) == ("unhealthy", "down: the other database did not answer")
    assert said["database"] == "connected"

    for name in ("fine", "database"):
        with pytest.raises(InvalidInputError, match="already"):
            store.health_checks.register(name, fine)


async def test_whoever_asks_may_go_away(silent_url: URL) -> None:
    async with opened(silent_url) as store:
        asking = asyncio.create_task(store.health(600))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_threads_that_are_all_busy_do_not_make_a_store_unready(store: Store) -> None:
    """Such as with splitting large documents."""
    assert (await store.health(30)).is_healthy
    ended = threading.Event()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as executor:
        loop.set_default_executor(executor)
        busy = loop.run_in_executor(None, ended.wait)
        try:
            assert await store.health_checks.why_not_ready(PATIENT) is None
        finally:
            ended.set()
            await busy


async def test_a_store_that_was_closed_says_so(settings: Settings) -> None:
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        pass
    assert "this store was closed" in str((await store.health(PATIENT)).error)
    assert "this store was closed" in str(await store.health_checks.why_not_ready(PATIENT))


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "2", 2**63])
async def test_a_limit_is_a_number_of_seconds(settings: Settings, limit: object) -> None:
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        with pytest.raises(InvalidInputError, match="limit_seconds"):
            await store.health(limit)  # type: ignore[arg-type]
