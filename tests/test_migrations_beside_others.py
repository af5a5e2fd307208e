"""Migrations beside rivals and running transactions; servers, roles and schemas of every kind."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from conftest import VERSION, run_sql, settings_for
from migrating import HEAD, alembic, fetch, fetch_value, finished, new_role, opened, seeded, upgrade
from sqlalchemy import URL, Connection, event, text

from kotonoha_store import (
    ConfigurationError,
    Database,
    EmbeddingQueue,
    ExtensionMissingError,
    HashingEmbedder,
    SchemaOutdatedError,
    Store,
    StoreTimeoutError,
    StoreUnavailableError,
    migrations,
)
from kotonoha_store.health import Health

# -- others at work -----------------------------------------------------------------------------------------------


def test_two_commands_at_once_both_succeed(empty_url: URL) -> None:
    processes = [alembic(empty_url, "upgrade", "head") for _ in range(2)]
    results = [finished(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert asyncio.run(fetch_value(empty_url, "SELECT version_num FROM alembic_version")) == HEAD


async def test_two_upgrades_in_one_loop_both_succeed(empty_url: URL) -> None:
    async with opened(empty_url) as one, opened(empty_url) as other:
        await asyncio.gather(migrations.upgrade(one), migrations.upgrade(one), migrations.upgrade(other))
        assert await migrations.current(one) == HEAD


def test_two_upgrades_in_two_threads_both_succeed(empty_url: URL) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(upgrade(empty_url))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert not errors
    assert asyncio.run(fetch_value(empty_url, "SELECT version_num FROM alembic_version")) == HEAD


async def test_connections_made_before_see_the_new_tables(empty_url: URL) -> None:
    """Statements that a connection has prepared are of the old ones."""
    async with opened(empty_url) as database:
        await migrations.upgrade(database, "0001")
        for column in (False, True):
            async with database.connect() as connection:
                result = await connection.execute(text("SELECT * FROM sessions"))
                assert ("rewrite_version" in result.keys()) == column  # noqa: SIM118
            await migrations.upgrade(database)


async def test_one_connection_in_the_pool_is_enough(empty_url: URL) -> None:
    await upgrade(empty_url, db_pool_max_size=1)
    async with opened(empty_url, db_pool_max_size=1) as database:
        await migrations.check(database)


async def test_time_outs_of_the_role_do_not_end_a_migration(empty_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosted servers set such; building an index takes longer."""
    await seeded(empty_url)
    names = {"statement_timeout", "idle_session_timeout", "idle_in_transaction_session_timeout"}
    if VERSION >= 17:
        names.add("transaction_timeout")
    # Too long to end anything here: in the middle they must be off, on the connection that holds the lock too.
    await run_sql(empty_url, *(f"ALTER DATABASE {empty_url.database} SET {name} = '1h'" for name in names))
    seen: dict[str, dict[str, str]] = {}
    async with opened(empty_url) as database:
        make_patient = database.patient

        def patient() -> Database:
            made = make_patient()

            @event.listens_for(made.engine.sync_engine, "before_cursor_execute")
            def look(connection: Connection, _cursor: Any, sql: str, *_: Any) -> None:
                for statement in ("UPDATE knowledge_chunks AS c", "IF NOT EXISTS idx_chunks_embedding", "_unlock("):
                    if statement in sql and statement not in seen:
                        found = connection.execute(text("SELECT name, setting FROM pg_settings")).all()
                        seen[statement] = {row.name: row.setting for row in found if row.name in names}

            return made

        monkeypatch.setattr(database, "patient", patient)
        await migrations.upgrade(database)
    assert len(seen) == 3
    assert all(settings == dict.fromkeys(names, "0") for settings in seen.values()), seen


async def test_a_locked_table_gives_a_time_out_and_no_hang(empty_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.2)
    await seeded(empty_url)
    async with opened(empty_url) as database:
        async with database.begin() as session:
            await session.execute(text("SELECT FROM sessions"))
            with pytest.raises(StoreTimeoutError, match="lock"):
                await asyncio.wait_for(upgrade(empty_url), 60)
        await migrations.upgrade(database)
        assert await migrations.current(database) == HEAD


async def test_another_migration_that_never_ends_gives_a_time_out(
    empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_WAIT_SECONDS", 0.3)
    async with opened(empty_url) as database, database.connect() as other:
        await other.execute(text("SELECT pg_advisory_lock(:id)"), {"id": migrations.LOCK_ID})
        with pytest.raises(StoreTimeoutError, match="another migration"):
            await migrations.upgrade(database)


async def test_what_is_migrated_already_waits_for_nobody(migrated_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "LOCK_WAIT_SECONDS", 0.2)
    async with await Database.open(settings_for(migrated_url)) as database, migrations.locked(database):
        await migrations.upgrade(database)


async def test_a_cancelled_migration_leaves_no_lock(empty_url: URL) -> None:
    await seeded(empty_url)
    async with opened(empty_url) as database:
        # Something to be waiting for in the middle.
        async with database.begin() as session:
            await session.execute(text("SELECT FROM knowledge_sources"))
            task = asyncio.create_task(migrations.upgrade(database))
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND"
            while not await fetch_value(empty_url, f"{waiting} wait_event_type = 'Lock'"):
                assert not task.done()
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
        oid = "(SELECT oid FROM pg_database WHERE datname = current_database())"
        assert await fetch_value(empty_url, f"{locks} {oid}") == 0
        assert not migrations._in_process.locked()
        await migrations.upgrade(database)
        assert await migrations.current(database) == HEAD


async def test_an_old_transaction_delays_indexes_past_the_lock_timeout(
    empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.2)
    await seeded(empty_url)
    async with opened(empty_url) as database:
        async with database.engine.connect() as old:
            await old.execution_options(isolation_level="REPEATABLE READ")
            await old.execute(text("SELECT 1"))
            task = asyncio.create_task(migrations.upgrade(database))
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'virtualxid' AND NOT granted"
            while not await fetch_value(empty_url, waiting):
                assert not task.done()
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            assert not task.done()
        await asyncio.wait_for(task, 60)


# -- the server and the role --------------------------------------------------------------------------------------


async def test_a_role_that_may_not_create_the_extension_is_told_the_statement(empty_url: URL, server_url: URL) -> None:
    def run() -> None:
        with new_role(server_url) as role:
            asyncio.run(run_sql(empty_url, f'CREATE SCHEMA AUTHORIZATION "{role}"'))
            try:
                url = empty_url.set(username=role)
                with pytest.raises(ExtensionMissingError, match="CREATE EXTENSION vector"):
                    asyncio.run(upgrade(url))
                # What it says, helps.
                asyncio.run(run_sql(empty_url, "CREATE EXTENSION vector"))
                asyncio.run(upgrade(url))
                assert asyncio.run(fetch_value(url, "SELECT to_regclass('sessions')::text")) == "sessions"
            finally:
                asyncio.run(run_sql(empty_url, f'DROP SCHEMA "{role}" CASCADE'))

    await asyncio.to_thread(run)


async def test_a_role_that_may_not_create_tables_is_told_so(empty_url: URL, server_url: URL) -> None:
    def run() -> None:
        with new_role(server_url) as role, pytest.raises(ConfigurationError, match="privilege"):
            asyncio.run(upgrade(empty_url.set(username=role)))

    await asyncio.to_thread(run)


async def test_an_extension_outside_the_search_path_is_told_and_inside_it_works(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE SCHEMA extensions", "CREATE EXTENSION vector SCHEMA extensions")
    with pytest.raises(ExtensionMissingError, match=r'search_path = "\$user", public, extensions$'):
        await upgrade(empty_url)
    await run_sql(empty_url, f'ALTER DATABASE {empty_url.database} SET search_path = "$user", public, extensions')
    async with Store.open(settings_for(empty_url), embedder=HashingEmbedder()) as store:
        await store.migrate()
        await store.add_document("梅雨", "梅雨は雨の多い季節です。", guild_id=1)
        assert (await store.embedding_worker.run_until_empty()).embedded == 1
        result = await store.search("梅雨", everywhere=True, threshold=None)
        assert [hit.title for hit in result.hits] == ["梅雨"]
        async with store.begin() as tx:
            found = await tx.session.scalar(text("SELECT embedding FROM knowledge_chunks"))
        assert isinstance(found, np.ndarray)
        await migrations.check(store.database)


@pytest.mark.parametrize("version", ["0.7.4", "0.10.0"])
async def test_versions_of_the_extension_are_numbers(empty_url: URL, version: str) -> None:
    await run_sql(empty_url, "CREATE EXTENSION vector", f"UPDATE pg_extension SET extversion = '{version}'")
    if version == "0.10.0":
        await upgrade(empty_url)
        return
    with pytest.raises(ExtensionMissingError, match="ALTER EXTENSION vector UPDATE"):
        await upgrade(empty_url)


async def test_an_old_version_that_the_server_offers_is_refused(
    empty_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_old(connection: Connection) -> None:
        connection.execute(text("CREATE EXTENSION vector"))
        connection.execute(text("UPDATE pg_extension SET extversion = '0.7.4' WHERE extname = 'vector'"))

    monkeypatch.setattr(migrations, "_create_vector", create_old)
    with pytest.raises(ExtensionMissingError, match=r"0\.7\.4"):
        await upgrade(empty_url)


async def test_tables_go_where_the_search_path_points(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE SCHEMA app", "CREATE TABLE public.sessions (sid text)")
    app = empty_url.update_query_dict({"options": "-csearch_path=app,public"})
    await upgrade(app)
    tables = await fetch(empty_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'app'")
    assert {row[0] for row in tables} >= {"alembic_version", "sessions", "knowledge_chunks"}
    assert [
        row[0] for row in await fetch(empty_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    ] == ["sessions"]


@pytest.mark.parametrize("theirs", ["abc123", HEAD])
async def test_another_applications_revision_further_along_the_search_path_is_not_ours(
    empty_url: URL, theirs: str
) -> None:
    await run_sql(
        empty_url,
        "CREATE TABLE public.alembic_version (version_num varchar(32) PRIMARY KEY)",
        f"INSERT INTO public.alembic_version VALUES ('{theirs}')",
        'CREATE SCHEMA "K b"',
        f'ALTER DATABASE "{empty_url.database}" SET search_path = "K b", public',
    )
    async with opened(empty_url) as database:
        health = Health(database, EmbeddingQueue(database))
        for expected in ("empty", "current"):
            assert (await migrations.state(database)).state == expected
            schema = (await health.report(30)).schema
            assert schema is not None
            assert schema.state == expected
            await migrations.upgrade(database)
        assert await migrations.current(database) == HEAD
        await migrations.check(database)
        await migrations.downgrade(database, "base")
        assert await migrations.current(database) is None
        await migrations.upgrade(database)
    assert await fetch(empty_url, "SELECT version_num FROM public.alembic_version") == [(theirs,)]
    assert await fetch_value(empty_url, 'SELECT version_num FROM "K b".alembic_version') == HEAD


async def test_tables_beside_their_revision_are_found_behind_an_empty_schema(migrated_url: URL) -> None:
    await run_sql(
        migrated_url,
        "CREATE SCHEMA kb",
        f'ALTER DATABASE "{migrated_url.database}" SET search_path = kb, public',
    )
    async with opened(migrated_url) as database:
        assert await migrations.current(database) == HEAD
        await migrations.downgrade(database, "0003")
        await migrations.upgrade(database)
    assert await fetch_value(migrated_url, "SELECT to_regclass('kb.alembic_version')") is None


async def test_the_schema_of_the_extension_is_added_to_the_search_path_there_is(empty_url: URL) -> None:
    await run_sql(
        empty_url,
        "CREATE SCHEMA mine",
        'CREATE SCHEMA "e xt"',
        'CREATE EXTENSION vector SCHEMA "e xt"',
        f'ALTER DATABASE "{empty_url.database}" SET search_path = mine',
    )
    with pytest.raises(ExtensionMissingError, match=r'SET search_path = mine, "e xt"$'):
        await upgrade(empty_url)


async def test_a_foreign_table_of_the_same_name_is_told(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE TABLE sessions (sid text PRIMARY KEY, expire timestamptz)")
    with pytest.raises(ConfigurationError, match="has the name of one of ours"):
        await upgrade(empty_url)
    assert await fetch_value(empty_url, "SELECT count(*) FROM pg_type WHERE typtype = 'e'") == 0


async def test_a_search_path_without_a_schema_is_told(empty_url: URL) -> None:
    await run_sql(empty_url, "CREATE EXTENSION vector")
    nowhere = empty_url.update_query_dict({"options": "-csearch_path=nowhere"})
    with pytest.raises(ConfigurationError, match="search_path"):
        await upgrade(nowhere)


async def test_options_of_the_index_that_pgvector_refuses_are_told(empty_url: URL) -> None:
    # Past the settings, which refuse the pair themselves.
    settings = settings_for(empty_url).model_copy(update={"kb_hnsw_m": 64, "kb_hnsw_ef_construction": 64})
    async with Database(empty_url, settings) as database:
        with pytest.raises(ConfigurationError, match="KB_HNSW_EF_CONSTRUCTION"):
            await migrations.upgrade(database)


async def test_an_unreachable_server_gives_one_sentence() -> None:
    url = URL.create("postgresql", "u", "s3cret", "127.0.0.1", 1, "x")
    async with opened(url, db_connect_attempts=1) as database:
        with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
            await migrations.upgrade(database)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_an_unknown_revision_is_told(migrated_url: URL) -> None:
    await run_sql(migrated_url, "UPDATE alembic_version SET version_num = '9999'")
    async with opened(migrated_url) as database:
        assert await migrations.current(database) == "9999"
        with pytest.raises(ConfigurationError, match=r"9999.*newer"):
            await migrations.upgrade(database)
        with pytest.raises(ConfigurationError, match="9999"):
            await migrations.downgrade(database, "base")
        with pytest.raises(SchemaOutdatedError):
            await migrations.check(database)


async def test_a_revision_that_does_not_exist_is_told(migrated_url: URL) -> None:
    async with opened(migrated_url) as database:
        with pytest.raises(ConfigurationError, match="8888"):
            await migrations.upgrade(database, "8888")
