"""Indexes built again beside running work, and mended where a build was cut short."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import numpy as np
import pytest
from conftest import run_sql, settings_for
from sqlalchemy import URL
from typer.testing import CliRunner

from kotonoha_store import (
    ConfigurationError,
    Database,
    InvalidInputError,
    NewChunk,
    NotFoundError,
    Store,
    StoreError,
    StoreTimeoutError,
    index_builds,
    migrations,
)
from kotonoha_store.cli.commands import app
from kotonoha_store.database import connect_arguments
from kotonoha_store.index_builds import VECTOR_INDEX, IndexAction

MODEL = "model"
DEFINITION = "USING hnsw (embedding halfvec_cosine_ops) WITH (m='{}', ef_construction='{}')"


async def fill(store: Store, count: int) -> np.ndarray[Any, Any]:
    vectors = np.random.default_rng(1).standard_normal((count, 1536)).astype(np.float32)
    chunks = [NewChunk(f"text {i}", embedding=vectors[i], embedding_model=MODEL) for i in range(count)]
    await index_builds.drop_vector_index(store.database)
    async with store.begin() as tx:
        await tx.knowledge.put_document("document", chunks, uri="file:a")
    await index_builds.ensure_vector_index(store.database)
    return vectors


@asynccontextmanager
async def raw(url: URL) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(**connect_arguments(url, settings_for(url)))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def writing(url: URL) -> AsyncIterator[None]:
    """A transaction that no concurrent build gets past."""
    async with raw(url) as connection, connection.transaction():
        await connection.execute("INSERT INTO knowledge_sources (type, title) VALUES ('web_page', 'open')")
        await connection.execute("LOCK TABLE knowledge_chunks IN ROW EXCLUSIVE MODE")
        yield


async def building(connection: Any) -> None:
    """Return once a build waits for the transaction that writes."""
    async with asyncio.timeout(30):
        while not await connection.fetchval(  # noqa: ASYNC110  the server's state is asked for
            "SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting for%'"
        ):
            await asyncio.sleep(0.01)


async def definitions(connection: Any) -> dict[str, str]:
    rows = await connection.fetch("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'")
    return {row["indexname"]: row["indexdef"] for row in rows}


async def states(database: Database) -> dict[str, str]:
    return {each.name: each.state for each in await index_builds.index_states(database) if each.state != "valid"}


async def test_other_options_come_beside_searches_and_writes_and_leave_one_index_of_the_same_name(
    store: Store, migrated_url: URL
) -> None:
    vectors = await fill(store, 600)
    async with raw(migrated_url) as connection:
        before = await definitions(connection)
        seen = asyncio.Event()

        async def search_and_write() -> None:
            result = await store.search(
                vectors[7], model=MODEL, everywhere=True, threshold=None, top_k=1, effort="thorough"
            )
            assert [hit.content for hit in result.hits] == ["text 7"]
            async with store.begin() as tx:
                await tx.knowledge.put_document("new", [NewChunk("new")])

        async with writing(migrated_url):
            build = asyncio.create_task(
                index_builds.reindex(store.database, m=8, ef_construction=200, progress=lambda _: seen.set())
            )
            await building(connection)
            await asyncio.wait_for(seen.wait(), 30)
            await search_and_write()
            assert not build.done()
        while not build.done():
            await search_and_write()
        report = await build
        after = await definitions(connection)
    (built,) = report.built
    assert (built.name, built.action, built.fitted) == (VECTOR_INDEX, IndexAction.REPLACED, True)
    assert built.size > 0
    assert after.pop(VECTOR_INDEX).endswith(DEFINITION.format(8, 200))
    before.pop(VECTOR_INDEX)
    assert after == before
    await migrations.check(store.database)
    # Options that nobody asks for stay as they are.
    (again,) = (await index_builds.reindex(store.database)).built
    assert again.action is IndexAction.REBUILT
    async with raw(migrated_url) as connection:
        assert (await definitions(connection))[VECTOR_INDEX].endswith(DEFINITION.format(8, 200))


async def test_a_configured_option_counts_where_none_is_given(migrated_url: URL) -> None:
    async with Database(migrated_url, settings_for(migrated_url, kb_hnsw_m=10)) as database:
        (built,) = (await index_builds.reindex(database)).built
        assert built.action is IndexAction.REPLACED
        with pytest.raises(ConfigurationError, match="ef_construction must be at least twice m"):
            await index_builds.reindex(database, m=50)
    async with raw(migrated_url) as connection:
        assert (await definitions(connection))[VECTOR_INDEX].endswith(DEFINITION.format(10, 64))


@pytest.mark.parametrize("options", [{}, {"m": 8}])
async def test_a_cancelled_build_leaves_the_index_in_use_and_its_remains_go_with_the_next(
    database: Database, migrated_url: URL, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_builds, "_CLEAN_SECONDS", 0.1)
    async with raw(migrated_url) as connection:
        before = await definitions(connection)
        async with writing(migrated_url):
            build = asyncio.create_task(index_builds.reindex(database, **options))
            await building(connection)
            build.cancel()
            with pytest.raises(asyncio.CancelledError):
                await build
            left = await states(database)
            assert left == {f"{VECTOR_INDEX}_ccnew": "leftover"}
        report = await index_builds.reindex(database, [])
        assert (report.built, report.removed) == ((), tuple(left))
        assert await definitions(connection) == before


async def test_a_build_cancelled_where_nobody_is_in_the_way_leaves_nothing(
    store: Store, migrated_url: URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(store, 20)
    monkeypatch.setattr(index_builds, "_CLEAN_SECONDS", 60)
    async with raw(migrated_url) as connection:
        async with writing(migrated_url):
            build = asyncio.create_task(index_builds.reindex(store.database, m=8))
            await building(connection)
            build.cancel()
        with pytest.raises(asyncio.CancelledError):
            await build
    assert await states(store.database) == {}


async def test_of_two_builds_at_once_the_second_says_so(database: Database, migrated_url: URL) -> None:
    async with raw(migrated_url) as connection, raw(migrated_url) as other:
        async with writing(migrated_url):
            build = asyncio.create_task(index_builds.reindex(database))
            await building(connection)
            with pytest.raises(StoreTimeoutError, match="another migration or index build"):
                await index_builds.reindex(database)
        await build
        async with writing(migrated_url):
            # The server goes on building for a client that was killed, and its lock is gone.
            orphan = asyncio.create_task(other.execute(f"REINDEX INDEX CONCURRENTLY {VECTOR_INDEX}"))
            await building(connection)
            with pytest.raises(StoreError, match=f"process {other.get_server_pid()} of the server"):
                await index_builds.reindex(database)
        await orphan


async def test_what_is_missing_or_invalid_is_built_as_the_migrations_do(database: Database, migrated_url: URL) -> None:
    async with raw(migrated_url) as connection:
        before = await definitions(connection)
        gone = ("idx_chunks_searchable", "idx_sources_document_key", "idx_chunk_terms_terms", "idx_sources_metadata")
        await connection.execute(f"DROP INDEX {', '.join(gone)}")
        await connection.execute(
            "UPDATE pg_index SET indisvalid = false"
            f" WHERE indexrelid IN ('{VECTOR_INDEX}'::regclass, 'idx_chunks_guild_id'::regclass)"
        )
        broken = dict.fromkeys(gone, "missing") | dict.fromkeys((VECTOR_INDEX, "idx_chunks_guild_id"), "invalid")
        assert await states(database) == broken
        report = await index_builds.reindex(database, [])
        assert {built.name for built in report.built} == set(broken)
        assert await definitions(connection) == before
        assert await states(database) == {}
        everything = await index_builds.reindex(database, everything=True)
        assert {built.name for built in everything.built} == before.keys() - {"alembic_version_pkc"}
        assert await definitions(connection) == before


async def test_the_options_of_a_dropped_index_outlive_the_process_that_dropped_it(
    database: Database, migrated_url: URL
) -> None:
    await run_sql(migrated_url, "COMMENT ON COLUMN knowledge_chunks.embedding IS 'a note of ours'")
    await index_builds.reindex(database, m=9, ef_construction=40)
    assert await index_builds.drop_vector_index(database)
    assert not await index_builds.drop_vector_index(database)
    assert await states(database) == {VECTOR_INDEX: "missing"}
    async with Database(migrated_url, settings_for(migrated_url)) as next_process:
        built = await index_builds.ensure_vector_index(next_process)
        assert built is not None
        assert await index_builds.ensure_vector_index(next_process) is None
    async with raw(migrated_url) as connection:
        assert (await definitions(connection))[VECTOR_INDEX].endswith(DEFINITION.format(9, 40))
        comment = "SELECT col_description('knowledge_chunks'::regclass, 4)"
        assert await connection.fetchval(comment) == "a note of ours"


async def test_without_shared_memory_for_helpers_the_build_goes_on_alone(store: Store, migrated_url: URL) -> None:
    await fill(store, 20)
    # Small tables get no helpers by themselves.
    await run_sql(migrated_url, "ALTER TABLE knowledge_chunks SET (parallel_workers = 1)")
    (built,) = (await index_builds.reindex(store.database, maintenance_work_mem=2**40, parallel_workers=1)).built
    assert built.memory == 2**40
    assert await states(store.database) == {}


async def test_a_graph_beyond_its_memory_is_told(store: Store) -> None:
    await fill(store, 300)
    (built,) = (await index_builds.reindex(store.database, maintenance_work_mem=2**20, parallel_workers=0)).built
    assert not built.fitted


def test_memory_follows_the_table_within_what_the_server_may_have() -> None:
    gib, mib = 2**30, 2**20
    chosen = index_builds._chosen_memory
    # Measured: 100,000 vectors in a table of 391 MB need some 400 MB.
    assert 400 * mib < chosen(391 * mib, 16, 64 * mib, 8 * gib) < 600 * mib
    assert chosen(10 * gib, 16, 64 * mib, 8 * gib) == 4 * gib
    assert chosen(10 * gib, 16, 64 * mib, None) == gib
    assert chosen(10 * gib, 16, 2 * gib, None) == 2 * gib
    assert chosen(0, 16, 64 * mib, None) == 64 * mib


async def test_wrong_options_are_refused_before_anything_is_touched(database: Database) -> None:
    for options in ({"m": 1}, {"ef_construction": 1001}, {"maintenance_work_mem": 0}, {"parallel_workers": -1}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            await index_builds.reindex(database, **options)
    with pytest.raises(InvalidInputError, match="name it too"):
        await index_builds.reindex(database, ["idx_dlq_source_id"], m=8)
    with pytest.raises(NotFoundError, match="no index 'nothing'"):
        await index_builds.reindex(database, ["nothing"])


def test_the_commands_find_and_mend_what_is_missing(migrated_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", migrated_url.render_as_string(hide_password=False))

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.stdout, result.stderr

    asyncio.run(run_sql(migrated_url, f"DROP INDEX {VECTOR_INDEX}"))
    code, out, _ = run("indexes")
    assert code == 1
    assert "missing" in out
    code, out, _ = run("reindex", "--broken", "--json")
    assert code == 0
    assert [built["name"] for built in json.loads(out)["built"]] == [VECTOR_INDEX]
    assert run("indexes")[0] == 0
    code, out, _ = run("reindex", "--m", "12", "--memory", "128MB")
    assert code == 0
    assert "replaced" in out
    for wrong in (["nothing"], ["--memory", "much"], ["--all", "--broken"]):
        code, _, err = run("reindex", *wrong)
        assert code == 3
        assert err.count("\n") == 1
