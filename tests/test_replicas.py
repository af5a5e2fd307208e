"""Searches and reads on a real streaming replica: lagging, cut off, stopped, promoted, of another database."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import prometheus_client
import pytest
from conftest import run_sql, settings_for
from replica import Pair, Relay, fetch, pair
from searching import write
from sqlalchemy import URL, text

from kotonoha_store import (
    ConfigurationError,
    Database,
    HashingEmbedder,
    Message,
    ModelMismatchError,
    ReplicaStatus,
    SearchFilters,
    SearchResult,
    Store,
    StoreError,
    StoreUnavailableError,
    UnitOfWork,
    migrations,
    replicas,
)
from kotonoha_store.driver_errors import translate_error
from kotonoha_store.replicas import Replica

GUILD = SearchFilters(guild_id=1)

# A busy machine is neither a silent server nor a replica that lags.
PATIENT = {"kb_replica_wait_seconds": 60.0, "kb_replica_max_lag_seconds": 3600.0, "db_connect_timeout": 60.0}


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a time-out says which."""
    for name in ("ANSWER_SECONDS", "COMMAND_SECONDS", "POOL_SECONDS"):
        monkeypatch.setattr(replicas, name, 60.0)


@pytest.fixture(scope="module")
def servers() -> Iterator[Pair]:
    with pair() as servers:

        async def migrate() -> None:
            await run_sql(servers.url("postgres"), "CREATE DATABASE template")
            async with Database(servers.url("template"), settings_for(servers.url("template"))) as database:
                await migrations.upgrade(database)

        asyncio.run(migrate())
        yield servers


@pytest.fixture
def name(servers: Pair) -> Iterator[str]:
    """A migrated database of the test's own, on both servers."""
    name = f"kt_{uuid.uuid4().hex[:8]}"

    async def create() -> None:
        await run_sql(servers.url("postgres"), f"CREATE DATABASE {name} TEMPLATE template")
        await replayed(servers)

    asyncio.run(create())
    yield name
    servers.standby.start()
    asyncio.run(run_sql(servers.standby.url("postgres"), "SELECT pg_wal_replay_resume()"))


@asynccontextmanager
async def opened(servers: Pair, name: str, *, replica: URL | None = None, **settings: Any) -> AsyncIterator[Store]:
    """A store of both servers, patient enough for a busy machine."""
    url = servers.standby.url(name) if replica is None else replica
    values = {**PATIENT, **settings}
    values["database_replica_url"] = url.render_as_string(hide_password=False)
    async with Store.open(settings_for(servers.url(name), **values), embedder=HashingEmbedder()) as store:
        yield store


async def replayed(servers: Pair) -> None:
    """Wait until the standby has all that the primary has now, and has not flushed yet."""
    position = await fetch(servers.url("postgres"), replicas._WRITTEN)
    await until(servers.standby.url("postgres"), f"SELECT pg_last_wal_replay_lsn() >= '{position}'")


async def until(url: URL, condition: str) -> None:
    async with asyncio.timeout(30):
        while not await fetch(url, condition):  # noqa: ASYNC110  another process's
            await asyncio.sleep(0.005)


async def pause(servers: Pair) -> None:
    url = servers.standby.url("postgres")
    await run_sql(url, "SELECT pg_wal_replay_pause()")
    await until(url, "SELECT pg_get_wal_replay_pause_state() = 'paused'")


async def resume(servers: Pair) -> None:
    await run_sql(servers.standby.url("postgres"), "SELECT pg_wal_replay_resume()")


async def say(store: Store, *lines: str) -> None:
    """Put each into the long-term memory, with its vector."""
    for line in lines:
        await store.add_document(line, line, guild_id=1)
    await store.embedding_worker.run_until_empty()


async def words(store: Store, query: str, **options: Any) -> SearchResult:
    return await store.search(query, mode="words", filters=GUILD, **options)


async def status(store: Store) -> ReplicaStatus:
    found = await store.replica_status()
    assert found is not None
    return found


async def until_status(store: Store, reason: str | None) -> ReplicaStatus:
    async with asyncio.timeout(30):
        while (found := await status(store)).reason != reason:  # noqa: ASYNC110  another process's
            await asyncio.sleep(0.01)
    return found


async def until_caught_up(store: Store) -> None:
    """Wait until it has all that the primary had when that was asked last."""
    async with asyncio.timeout(30):
        while (await status(store)).lag_seconds != 0:  # noqa: ASYNC110  another process's
            await asyncio.sleep(0.01)


async def is_standby(tx: UnitOfWork) -> bool:
    return bool((await tx.session.execute(text("SELECT pg_is_in_recovery()"))).scalar_one())


def fallbacks(reason: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value("replica_fallbacks_total", {"reason": reason}) or 0.0


async def test_every_search_and_read_works_on_a_replica_as_on_the_primary(servers: Pair, name: str) -> None:
    async with opened(servers, name) as store, Store.open(settings_for(servers.url(name)), HashingEmbedder()) as alone:
        async with store.begin() as tx:
            await tx.sessions.append("thread:1", Message.user("When is the rainy season?"), guild_id=1, channel_id=2)
        await say(store, "The rainy season begins in June.", "Hokkaido has no rainy season.", "Biscuit is a puppy.")
        token = await store.write_position()
        vector = await store.embedder.embed_query("rainy season")
        searches: list[tuple[Any, dict[str, Any]]] = [
            ("rainy season", {"threshold": None, "neighbours": 2}),
            ("rainy season", {"threshold": None, "diversity": 0.3}),
            (vector, {"effort": "exact"}),
            ('"rainy season"', {"mode": "words", "match": "all"}),
            ("rainy puppy", {"mode": "hybrid"}),
        ]
        for query, options in searches:
            # An index that is used, and a filter that is counted.
            for scope in ({"everywhere": True}, {"filters": GUILD}):
                found = await store.search(query, after=token, **scope, **options)
                expected = await alone.search(query, **scope, **options)
                assert found.hits == expected.hits, (query, options)
                assert found.hits
                assert (found.from_replica, expected.from_replica) == (True, False)
        recall = await store.recall("thread:1", "rainy season", 500, filters=GUILD, after=token)
        assert recall.result.from_replica
        assert [message.content for message in recall.messages] == ["When is the rainy season?"]
        async with store.read(after=token) as tx:
            assert await is_standby(tx)
            assert tx.from_replica
            assert (await tx.sessions.load("thread:1")).message_count == 1
            assert (await tx.search.nearest(vector, model=store.embedder.model, everywhere=True)).hits
        with pytest.raises(ModelMismatchError):
            await store.search(vector, model="another", everywhere=True, after=token)
        assert (await words(store, "puppy")).from_replica


async def test_reads_see_the_write_they_ask_for_and_are_answered_by_the_primary_where_the_replica_lags(
    servers: Pair, name: str
) -> None:
    async with opened(servers, name, kb_replica_wait_seconds=0.05) as store:
        await say(store, "old news")
        await words(store, "news", after=await store.write_position())
        await replayed(servers)
        await pause(servers)
        before = fallbacks("not_replayed")
        async with store.begin() as tx:
            # Committed before it is flushed.
            await tx.session.execute(text("SET LOCAL synchronous_commit = off"))
            await tx.sessions.append("thread:1", Message.user("fresh news"))
            await write(tx.session, "fresh news")
        token = await store.write_position()

        stale = await words(store, "news")
        assert (len(stale.hits), stale.from_replica) == (1, True)
        seen = await words(store, "news", after=token)
        assert (len(seen.hits), seen.from_replica) == (2, False)
        async with store.read(after=token) as tx:
            assert await tx.sessions.find("thread:1") is not None
        # Just written, the messages come from the primary, though nobody asked.
        recall = await store.recall("thread:1", "news", 500, filters=GUILD, mode="words")
        assert (len(recall.messages), recall.result.from_replica) == (1, True)
        assert fallbacks("not_replayed") - before == 2
        assert (await status(store)).is_used

        await resume(servers)
        await replayed(servers)
        caught_up = await words(store, "news", after=token)
        assert (len(caught_up.hits), caught_up.from_replica) == (2, True)


async def test_a_read_waits_until_its_write_is_replayed(servers: Pair, name: str) -> None:
    async with opened(servers, name) as store:
        await pause(servers)
        await say(store, "fresh news")
        search = asyncio.create_task(words(store, "news", after=await store.write_position()))
        await until(
            servers.standby.url("postgres"),
            f"SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query = $q${replicas._REPLAYED}$q$)",
        )
        await resume(servers)
        found = await search
        assert (len(found.hits), found.from_replica) == (1, True)

    async with opened(servers, name, kb_replica_wait_seconds=0.0) as store:
        # The next record will begin behind a header, which no replica replays before that comes.
        await run_sql(servers.url("postgres"), "SELECT pg_switch_wal()")
        token = await store.write_position()
        await replayed(servers)
        assert (await words(store, "news", after=token)).from_replica


async def test_a_replica_that_is_cut_off_lags_although_it_cannot_know(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    standby = servers.standby.url("postgres")
    reconnect = await fetch(
        standby, "SELECT format('ALTER SYSTEM SET primary_conninfo = %L', current_setting('primary_conninfo'))"
    )
    async with opened(servers, name, kb_replica_max_lag_seconds=0.2) as store:
        await say(store, "old news")
        try:
            await run_sql(standby, "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")
            await until(standby, "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)")
            await say(store, "fresh news")
            lagging = await until_status(store, "lagging")
            assert lagging.lag_seconds is not None
            assert lagging.lag_seconds > 0.2
            found = await words(store, "news")
            assert (len(found.hits), found.from_replica) == (2, False)
        finally:
            await run_sql(standby, reconnect, "SELECT pg_reload_conf()")
        await replayed(servers)
        # Long ago is not behind, where nothing was written since.
        await until(standby, "SELECT now() - pg_last_xact_replay_timestamp() > interval '0.3 s'")
        # The next look may find something that the primary writes by itself.
        monkeypatch.setattr(replicas, "CHECK_SECONDS", 3600.0)
        await until_caught_up(store)
        found = await words(store, "news")
        assert (len(found.hits), found.from_replica) == (2, True)


async def test_a_lag_is_no_less_where_the_answer_was_noticed_late(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Replica._lag

    def late(*arguments: Any) -> float | None:
        time.sleep(1)  # as while the process is stopped
        return judged(*arguments)

    async with opened(servers, name, kb_replica_max_lag_seconds=0.2) as store:
        await pause(servers)
        await say(store, "news")
        await until(
            servers.standby.url("postgres"), "SELECT clock_timestamp() - pg_last_xact_replay_timestamp() > '0.3 s'"
        )
        monkeypatch.setattr(Replica, "_lag", late)
        # The first look, which has the replica's own clock alone to go by.
        assert (await status(store)).reason == "lagging"


async def test_while_the_replica_is_stopped_the_primary_answers_and_one_line_is_logged(
    servers: Pair, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kotonoha_store.replicas")
    async with opened(servers, name) as store:
        await say(store, "news")
        token = await store.write_position()

        async def lose_it_within() -> None:
            async with store.read(after=token) as tx:
                assert await is_standby(tx)
                servers.standby.stop()
                await tx.sessions.find("a key")

        with pytest.raises(StoreUnavailableError):
            await lose_it_within()
        async with store.read(after=token) as tx:
            assert not await is_standby(tx)
            assert not tx.from_replica
        found = await asyncio.gather(*(words(store, "news", after=token) for _ in range(20)))
        assert {(len(result.hits), result.from_replica) for result in found} == {(1, False)}
        assert (await status(store)).reason == "unavailable"
        health = await store.health(30)
        assert health.is_healthy
        assert "the replica is passed over (unavailable)" in " ".join(health.warnings)
        assert [vars(record)["event"] for record in caplog.records] == ["replica_passed_over"]

        servers.standby.start()
        await until_status(store, None)
        assert (await words(store, "news", after=token)).from_replica
        health = await store.health(30)
        assert (health.warnings, health.checks["replica"].details["is_used"]) == ((), True)
        assert [vars(record)["event"] for record in caplog.records] == ["replica_passed_over", "replica_used_again"]


async def test_a_replica_that_goes_away_under_a_search_is_not_noticed_by_it(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas, "CHECK_SECONDS", 3600.0)
    async with opened(servers, name) as store:
        await say(store, "news")
        assert (await words(store, "news", after=await store.write_position())).from_replica
        before = fallbacks("unavailable")
        servers.standby.stop()
        for _ in range(3):
            found = await words(store, "news")
            assert (len(found.hits), found.from_replica) == (1, False)
        assert fallbacks("unavailable") - before == 3
        assert [vars(record)["event"] for record in caplog.records] == ["replica_passed_over"]


async def test_a_replica_that_falls_silent_is_asked_by_one_search_even_if_that_one_gives_up(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(replicas, "RETRY_SECONDS", 3600.0)
    async with Relay(servers.standby.url(name)) as relay, opened(servers, name, replica=relay.url) as store:
        await say(store, "news")
        assert (await words(store, "news", after=await store.write_position())).from_replica
        relay.is_silent = True
        search = asyncio.create_task(words(store, "news"))
        await relay.swallowed.wait()
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        async with asyncio.timeout(20):
            for _ in range(5):
                assert not (await words(store, "news")).from_replica


async def test_while_the_primary_hangs_a_read_that_gives_up_does_not_switch_the_replica_off(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Relay(servers.url(name)) as relay:
        replica = servers.standby.url(name).render_as_string(hide_password=False)
        settings = settings_for(relay.url, database_replica_url=replica, **PATIENT)
        async with Store.open(settings, HashingEmbedder()) as store:
            await say(store, "news")
            assert (await words(store, "news", after=await store.write_position())).from_replica
            monkeypatch.setattr(replicas, "CHECK_SECONDS", 0.0)
            monkeypatch.setattr(replicas, "RETRY_SECONDS", 3600.0)
            await until_status(store, None)
            relay.is_silent = True
            search = asyncio.create_task(words(store, "news"))
            await relay.swallowed.wait()
            search.cancel()
            with pytest.raises(asyncio.CancelledError):
                await search
            async with asyncio.timeout(20):
                assert (await words(store, "news")).from_replica
                # Nor does a probe, which tells what is known.
                health = await store.health()
                assert (health.status, health.checks["replica"].details["is_used"]) == ("unhealthy", True)
                assert (await words(store, "news")).from_replica


async def test_a_replica_that_lagged_is_not_asked_because_the_primarys_connections_are_all_in_use(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(servers, name, db_pool_max_size=1, kb_replica_max_lag_seconds=0.2) as store:
        await say(store, "old news")
        await replayed(servers)
        await until_caught_up(store)
        await pause(servers)
        await say(store, "fresh news")
        await until_status(store, "lagging")
        monkeypatch.setattr(store.database.engine.pool, "_timeout", 0.1)
        async with store.begin():
            lagging = await status(store)
            assert lagging.reason == "lagging"
            assert lagging.lag_seconds is not None
            assert lagging.lag_seconds > 0.2
            await resume(servers)
            await replayed(servers)
            # What was written since, nobody has said.
            assert (await status(store)).reason == "lagging"
        await until_status(store, None)


async def test_a_replica_that_hangs_within_a_search_does_not_cost_it_the_primarys_time_out(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "CHECK_SECONDS", 3600.0)
    monkeypatch.setattr(replicas, "COMMAND_SECONDS", 0.5)
    async with Relay(servers.standby.url(name)) as relay, opened(servers, name, replica=relay.url) as store:
        await say(store, "news")
        await until_status(store, None)
        relay.is_silent = True
        async with asyncio.timeout(20):
            found = await words(store, "news")
        assert (len(found.hits), found.from_replica) == (1, False)


async def test_a_promoted_replica_is_not_believed(servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As between two looks at it.
    monkeypatch.setattr(replicas, "CHECK_SECONDS", 3600.0)
    other = servers.another("promoted")
    try:
        async with opened(servers, name, replica=other.url(name)) as store:
            await say(store, "news")
            token = await store.write_position()
            assert (await words(store, "news", after=token)).from_replica
            await run_sql(other.url(name), "SELECT pg_promote()", "DELETE FROM knowledge_sources")
            for _ in range(2):
                found = await words(store, "news", after=token)
                assert (len(found.hits), found.from_replica) == (1, False)
            assert (await status(store)).reason == "promoted"
    finally:
        other.stop()


async def test_only_a_replica_of_this_database_is_asked(servers: Pair, name: str) -> None:
    wrong = {
        servers.standby.url("template"): "another_database",
        servers.url("template"): "another_database",
        servers.url(name): "promoted",
        servers.standby.url("missing"): "refused",
    }
    for url, reason in wrong.items():
        async with opened(servers, name, replica=url) as store:
            assert not (await words(store, "news")).from_replica
            assert (await status(store)).reason == reason


async def test_a_replica_that_has_not_replayed_the_migration_is_asked_when_it_has(servers: Pair) -> None:
    name = f"kt_{uuid.uuid4().hex[:8]}"
    await run_sql(servers.url("postgres"), f"CREATE DATABASE {name}")
    await replayed(servers)
    await pause(servers)
    try:
        async with opened(servers, name) as store:
            await store.migrate()
            assert not (await words(store, "news")).from_replica
            behind = await status(store)
            assert (behind.reason, behind.is_used) == ("schema", False)
            await resume(servers)
            await replayed(servers)
            await until_status(store, None)
            assert (await words(store, "news")).from_replica
    finally:
        await resume(servers)


async def test_while_the_primary_does_not_answer_a_replica_that_is_known_does(servers: Pair, name: str) -> None:
    async with opened(servers, name) as store, opened(servers, name) as late:
        await say(store, "news")
        token = await store.write_position()
        assert (await words(store, "news", after=token)).from_replica
        # Also what the check of that search saw.
        await replayed(servers)
        await pause(servers)
        await run_sql(
            servers.url("postgres"),
            f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
        )
        try:
            with pytest.raises(StoreError):
                await store.write_position()
            unknown = await status(store)
            assert (unknown.is_used, unknown.lag_seconds) == (True, None)
            assert (await words(store, "news", after=token)).from_replica
            assert (await store.recall("new", "news", 500, mode="words", filters=GUILD, after=token)).hits
            # Whose replica it is, nobody has said yet.
            with pytest.raises(StoreError):
                await words(late, "news")
            assert (await status(late)).reason == "unverified"
        finally:
            await run_sql(servers.url("postgres"), f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def test_a_unit_that_reads_does_not_write_whoever_serves_it(servers: Pair, name: str) -> None:
    async with opened(servers, name) as store, Store.open(settings_for(servers.url(name)), HashingEmbedder()) as alone:
        await until_status(store, None)
        for each in (store, alone):
            with pytest.raises(ConfigurationError, match=r"store\.begin\(\)"):
                async with each.read() as tx:
                    await tx.sessions.append("thread:1", Message.user("lost"))
            async with each.read() as tx:
                assert await tx.sessions.find("thread:1") is None
        assert (await status(store)).is_used
        assert await alone.replica_status() is None


async def test_while_the_replicas_connections_are_all_in_use_the_primary_answers(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "POOL_SECONDS", 0.05)
    async with opened(servers, name, db_pool_max_size=1) as store:
        await until_status(store, None)
        async with store.read():
            before = fallbacks("busy")
            assert not (await words(store, "news")).from_replica
            # Nor is a look at it, which waits as well, held against it.
            assert (await status(store)).is_used
            assert fallbacks("busy") - before == 1
        assert (await words(store, "news")).from_replica


def test_what_is_removed_under_a_statement_is_no_fault_of_the_replica() -> None:
    cause = asyncpg.exceptions.SerializationError("canceling statement due to conflict with recovery")
    error = translate_error(cause)
    assert error is not None
    error.__cause__ = cause
    assert replicas._reason(error) == "conflict"


@pytest.mark.parametrize("url", ["mysql://u:s3cret@host/db", "postgresql://u:s3cret@host:99999/db", "s3cret"])
async def test_an_address_that_cannot_be_used_is_named_not_shown(servers: Pair, url: str) -> None:
    settings = settings_for(servers.url("postgres"), database_replica_url=url)
    with pytest.raises(ConfigurationError, match="DATABASE_REPLICA_URL") as caught:
        async with Store.open(settings, HashingEmbedder()):
            pass
    assert "s3cret" not in str(caught.value)
