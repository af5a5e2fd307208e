"""The library behind a real pgbouncer in transaction mode: where it is not installed, the run's summary says so."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.util import CommandError
from conftest import run_sql, settings_for
from migrating import fetch_value, opened
from pgbouncer import PgBouncer, pgbouncer
from sqlalchemy import URL, text

from kotonoha_store import (
    ConfigurationError,
    Database,
    HashingEmbedder,
    Message,
    SearchFilters,
    Store,
    StoreTimeoutError,
    StoreUnavailableError,
    migrations,
)
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.transfer import export_jsonl
from kotonoha_store.wakeup import JOBS_CHANNEL, Listener

POOL_SIZE = 3


@pytest.fixture(scope="module")
def pooler(server_url: URL) -> Iterator[PgBouncer]:
    with pgbouncer(server_url, default_pool_size=str(POOL_SIZE)) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def narrow(server_url: URL) -> Iterator[PgBouncer]:
    """One that has little and says so soon."""
    with pgbouncer(server_url, default_pool_size="1", max_client_conn="3", query_wait_timeout="4") as pooler:
        yield pooler


def text_of(url: URL) -> str:
    return url.render_as_string(hide_password=False)


# -- nothing of a session -----------------------------------------------------------------------------------------


async def test_clients_that_share_connections_get_their_own_answers_and_leave_nothing_behind(
    pooler: PgBouncer, migrated_url: URL, tmp_path: Path
) -> None:
    url = pooler.url(migrated_url.database)
    settings = settings_for(url, db_pool_max_size=12, kb_min_session_length=1, kb_archive_overlap_messages=0)

    async def converse(store: Store, number: int) -> None:
        for turn in range(4):
            async with store.begin() as tx:
                await tx.sessions.append(
                    f"thread:{number}", Message.user(f"message {turn}"), session_type="thread", guild_id=number
                )
            await store.add_document(f"document {number}", f"about topic{number} {turn}", guild_id=number)
            # In autocommit: each statement may run on another connection than the one that described it.
            async with store.database.driver() as driver:
                assert await driver.fetchval("SELECT $1::int", number) == number
                assert await driver.fetch("SELECT status FROM knowledge_sources WHERE guild_id = $1", number)
                await driver.executemany("SELECT $1::int", [(number,), (turn,)])
            if number == 0:
                pooler.reload()

    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        assert store.database.is_pooled
        await asyncio.gather(*(converse(store, number) for number in range(12)))
        report = await store.archiver.run_once(idle_for=timedelta(0))
        assert (report.archived, report.failed) == (12, ())
        assert (await store.embedding_worker.run_until_empty()).failed == 0
        searches = (
            store.search(f"topic{number}", filters=SearchFilters(guild_id=number), threshold=None)
            for number in range(12)
        )
        found_titles = [{hit.title for hit in result.hits} for result in await asyncio.gather(*searches)]
        assert all(f"document {number}" in titles for number, titles in enumerate(found_titles))
        assert not any(f"document {number + 1}" in titles for number, titles in enumerate(found_titles))

        for _ in range(POOL_SIZE):
            # As by processes of their own, which end without having tidied up.
            async with Store.open(settings, embedder=HashingEmbedder()) as other:
                await export_jsonl(other.database, tmp_path / "all.jsonl", overwrite=True)

        # Every connection of the pooler's, by holding them all at once.
        async with AsyncExitStack() as held:
            sessions = [await held.enter_async_context(store.database.begin()) for _ in range(POOL_SIZE)]
            found = [(await session.execute(text(_LEFT_BEHIND))).one() for session in sessions]
    assert len({row.pid for row in found}) == POOL_SIZE
    for row in found:
        assert row.prepared == 0
        # It brings to each connection what the client said in connecting; the last one is this transaction's own.
        assert set(row.settings) <= {"application_name", "client_encoding", "transaction_isolation"}
        assert (row.listens, row.locks, row.temporary) == (0, 0, 0)


_LEFT_BEHIND = """
    SELECT pg_backend_pid() AS pid, (SELECT count(*) FROM pg_prepared_statements WHERE name <> '') AS prepared,
        (SELECT coalesce(array_agg(name), '{}') FROM pg_settings WHERE source = 'session') AS settings,
        (SELECT count(*) FROM pg_listening_channels()) AS listens,
        (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks,
        (SELECT count(*) FROM pg_class WHERE relpersistence = 't') AS temporary
"""


async def test_without_the_mode_a_statement_that_is_elsewhere_names_the_setting(
    pooler: PgBouncer, empty_url: URL
) -> None:
    url = pooler.url(empty_url.database)
    statement = "SELECT pg_backend_pid() FROM (SELECT $1::int) AS one"
    async with AsyncExitStack() as held:
        others = await held.enter_async_context(opened(url))
        database = await held.enter_async_context(opened(url, db_pooler="none"))
        driver = await held.enter_async_context(database.driver())
        pid = await driver.fetchval(statement, 1)
        # The connection that knows it has somebody else now.
        while await (await held.enter_async_context(others.begin())).scalar(text("SELECT pg_backend_pid()")) != pid:
            pass
        with pytest.raises(ConfigurationError, match="DB_POOLER=transaction"), translated_errors():
            await driver.fetchval(statement, 1)


async def test_a_column_whose_type_changed_is_read_as_it_is_now(pooler: PgBouncer, empty_url: URL) -> None:
    """Of a statement without a name nobody says that its result has changed: no description of it may be kept."""
    await run_sql(empty_url, "CREATE TABLE t (n int)", "INSERT INTO t VALUES (7)")
    async with opened(pooler.url(empty_url.database)) as database, database.connect() as connection:
        assert await connection.scalar(text("SELECT n FROM t")) == 7
        await run_sql(empty_url, "ALTER TABLE t ALTER n TYPE text")
        assert await connection.scalar(text("SELECT n FROM t")) == "7"


# -- past the pooler ----------------------------------------------------------------------------------------------


async def test_migrations_go_past_the_pooler_or_name_the_setting(pooler: PgBouncer, empty_url: URL) -> None:
    url = pooler.url(empty_url.database)
    async with opened(url) as database:
        with pytest.raises(ConfigurationError, match="DATABASE_DIRECT_URL"):
            await migrations.upgrade(database)
        assert await migrations.current(database) is None
    async with opened(url, database_direct_url=text_of(empty_url)) as database:
        await migrations.upgrade(database)
        assert (await migrations.state(database)).state == "current"


async def test_the_alembic_command_goes_past_the_pooler_or_names_the_setting(
    pooler: PgBouncer, empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setenv("DATABASE_URL", text_of(pooler.url(empty_url.database)))
    with pytest.raises(CommandError, match="DATABASE_DIRECT_URL"):
        await migrations.with_connection(lambda _: ran.append("pooled"))
    monkeypatch.setenv("DATABASE_DIRECT_URL", text_of(empty_url))
    await migrations.with_connection(lambda _: ran.append("direct"))
    assert ran == ["direct"]


async def test_a_listener_polls_behind_the_pooler_and_listens_past_it(
    pooler: PgBouncer, empty_url: URL, caplog: pytest.LogCaptureFixture
) -> None:
    url = pooler.url(empty_url.database)
    async with opened(url) as database, Listener(database, JOBS_CHANNEL) as listener:
        assert not database.can_listen
        # Not even the first one, after connecting.
        assert not await listener.wait(0.3)
        assert not caplog.records
    past = text_of(empty_url)
    async with opened(url, database_direct_url=past) as database, Listener(database, JOBS_CHANNEL) as listener:
        assert await listener.wait(20)
        async with database.begin() as session:
            await session.execute(text(f"NOTIFY {JOBS_CHANNEL}"))
        assert await listener.wait(20)


# -- ends ---------------------------------------------------------------------------------------------------------


async def test_connections_that_the_server_ends_cost_no_more_than_their_own_transaction(
    pooler: PgBouncer, empty_url: URL
) -> None:
    end_all = (
        "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def interrupted(database: Database) -> None:
        async with database.begin() as session:
            await session.execute(text("SELECT 1"))
            await run_sql(empty_url, end_all)
            with translated_errors():
                await session.execute(text("SELECT 1"))

    async with opened(pooler.url(empty_url.database), db_pool_max_size=1) as database:
        await database.ping()
        await run_sql(empty_url, end_all)
        # The client's connection is the same; the pooler has made another one to the server.
        await database.ping()
        with pytest.raises(StoreUnavailableError):
            await interrupted(database)
        await database.ping()


async def test_a_statement_that_takes_too_long_is_ended_on_the_server(pooler: PgBouncer, empty_url: URL) -> None:
    async def too_long(database: Database) -> None:
        async with database.begin() as session:
            with translated_errors():
                await session.execute(text("SELECT pg_sleep(60)"))

    async with opened(pooler.url(empty_url.database), db_command_timeout=1.0, db_pool_max_size=1) as database:
        with pytest.raises(StoreTimeoutError):
            await too_long(database)
        async with database.driver() as driver:
            assert await driver.fetchval("SELECT 1", timeout=60) == 1
    running = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    assert await fetch_value(empty_url, running) == 0


async def test_while_the_pooler_holds_everybody_back_statements_wait(pooler: PgBouncer, empty_url: URL) -> None:
    async with opened(pooler.url(empty_url.database)) as database:
        await database.ping()
        pooler.pause()
        try:
            waiting = asyncio.create_task(database.ping())
            await asyncio.wait([waiting], timeout=0.3)
            assert not waiting.done()
        finally:
            pooler.resume()
        await asyncio.wait_for(waiting, 20)


async def test_a_pooler_that_has_no_connection_free_says_so(narrow: PgBouncer, empty_url: URL) -> None:
    async with opened(narrow.url(empty_url.database), db_connect_attempts=1) as database:
        async with database.begin() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(StoreTimeoutError, match="query_wait_timeout"):
                await database.ping()
        await database.ping()


async def test_a_pooler_that_has_enough_clients_says_so(narrow: PgBouncer, empty_url: URL) -> None:
    url = narrow.url(empty_url.database)
    async with opened(url, db_connect_attempts=2) as database, AsyncExitStack() as held:
        for _ in range(3):
            await held.enter_async_context(database.driver())
        with pytest.raises(StoreUnavailableError, match="max_client_conn"):
            await held.enter_async_context(database.driver())


async def test_a_pooler_that_has_lost_its_server_says_so(narrow: PgBouncer, empty_url: URL) -> None:
    async with opened(narrow.url(empty_url.database), db_connect_attempts=2) as database:
        await database.ping()
        narrow.lose_server()
        try:
            with pytest.raises(StoreUnavailableError, match=r"cannot connect to the server|query_wait_timeout"):
                await database.ping()
        finally:
            narrow.find_server()
        await database.ping()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"database": "kt_missing"}, "does not exist"),
        ({"username": "kt_missing"}, "user or password"),
        ({"query": {"extra_float_digits": "1"}}, "refuses a parameter"),
    ],
)
async def test_what_a_pooler_refuses_for_good_is_not_tried_again(
    pooler: PgBouncer, change: dict[str, Any], said: str
) -> None:
    url = pooler.url(pooler.server.database)
    url = url.update_query_dict(change.pop("query")) if "query" in change else url.set(**change)
    before = pooler.refusals()
    async with opened(url, db_connect_attempts=2) as database:
        with pytest.raises(ConfigurationError, match=said):
            await database.ping()
    assert pooler.refusals() - before == 1
