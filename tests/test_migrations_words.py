"""The revision that brings the words: chunks that were there get theirs."""

import asyncio
import subprocess
import time

import pytest
from alembic.script import ScriptDirectory
from conftest import run_sql
from migrating import alembic, crash_at, downgrade, fetch, fetch_value, finished, opened, seeded, upgrade
from sqlalchemy import URL, text
from test_schema import describe, find_program, libpq_url

from kotonoha_store import (
    KnowledgeRepository,
    NewChunk,
    migrations,
)
from kotonoha_store.term_index import fill_terms
from kotonoha_store.words import analyse, scope_terms

# -- words ------------------------------------------------------------------------------------------------------


# As the archiver of revision 2 wrote them, and whoever wrote by hand.
SESSION_SOURCES = """
    INSERT INTO knowledge_sources (id, type, title, metadata, guild_id, created_at, updated_at)
    SELECT id, type::source_type_enum, title, metadata::jsonb, guild_id, '2026-01-01 00:00Z', '2026-01-02 00:00Z'
    FROM (VALUES
        (11, 'discord_session', 'a session', '{"origin_session_key": "thread:1"}', 1),
        (12, 'discord_session', 'odd', '{"origin_session_key": " :x ''\\"\\\\ ｶﾞ"}', NULL),
        (13, 'discord_session', 'a number', '{"origin_session_key": 5}', NULL),
        (14, 'discord_session', 'null', '{"origin_session_key": null}', NULL),
        (15, 'discord_session', 'none', '{}', NULL),
        (16, 'discord_session', 'no object', '["origin_session_key"]', NULL),
        (17, 'discord_session', 'an object', '{"origin_session_key": {"a": 1}}', NULL),
        (18, 'web_page', 'no session', '{"origin_session_key": "thread:2"}', NULL)
    ) AS n (id, type, title, metadata, guild_id);
    INSERT INTO knowledge_chunks (id, source_id, content, guild_id) VALUES
        (11, 11, 'ＲＵＮＮＩＮＧ towers, running', 1),
        (12, 12, 'ignored', NULL);
    SELECT setval('knowledge_sources_id_seq', 100), setval('knowledge_chunks_id_seq', 100);
"""
SESSION_KEYS = {11: "thread:1", 12: " :x '\"\\ ｶﾞ"}


async def at_revision_2(url: URL) -> None:
    await seeded(url)
    await upgrade(url, "0002")
    await run_sql(url, SESSION_SOURCES)


async def terms_of_chunks(url: URL) -> dict[int, tuple[set[str], str | None]]:
    rows = await fetch(url, "SELECT chunk_id, tsvector_to_array(terms), folded FROM chunk_terms")
    return {row[0]: (set(row[1]), row[2]) for row in rows}


async def expected_terms(url: URL) -> dict[int, tuple[set[str], str | None]]:
    """As the library itself writes them."""
    names = ("guild_id", "channel_id", "thread_id", "user_id")
    found = {}
    for row in await fetch(
        url, "SELECT c.*, title FROM knowledge_chunks c JOIN knowledge_sources s ON s.id = source_id"
    ):
        words = analyse(row["title"], row["content"])
        scope = scope_terms(**{name: row[name] for name in names})
        found[row["id"]] = ({*words.terms, *scope}, words.folded)
    return found


async def session_keys(url: URL) -> dict[int, str]:
    query = "SELECT id, origin_session_key FROM knowledge_sources WHERE origin_session_key IS NOT NULL"
    return dict(await fetch(url, query))


async def test_chunks_that_are_there_get_their_terms(empty_url: URL) -> None:
    await at_revision_2(empty_url)
    await upgrade(empty_url)
    found = await terms_of_chunks(empty_url)
    assert set(found) == {-5, 1, 2, 3, 4, 5, 11, 12}
    assert found == await expected_terms(empty_url)
    assert found[11] == (
        {"a", "session", "running", "run", "towers", "tower", "#guild_id=1"},
        "a session\nrunning towers, running",
    )
    assert "'run':1A" in await fetch_value(empty_url, "SELECT terms::text FROM chunk_terms WHERE chunk_id = 11")
    assert f"#thread_id={2**63 - 1}" in found[1][0]
    frequencies = dict(await fetch(empty_url, "SELECT term, frequency FROM term_frequencies"))
    assert (frequencies[""], frequencies["run"]) == (8.0, 1 / 8)
    assert await fetch_value(empty_url, "SELECT gin_clean_pending_list('idx_chunk_terms_terms')") == 0


async def test_the_key_of_its_session_comes_out_of_a_sources_metadata(empty_url: URL) -> None:
    await at_revision_2(empty_url)
    kept = "SELECT id, metadata, updated_at FROM knowledge_sources ORDER BY id"
    before = await fetch(empty_url, kept)
    await upgrade(empty_url)
    assert await session_keys(empty_url) == SESSION_KEYS
    # Filling in is no change of the source.
    assert await fetch(empty_url, kept) == before
    await run_sql(empty_url, "UPDATE knowledge_sources SET title = 'new' WHERE id = 11")
    assert await fetch_value(empty_url, "SELECT updated_at > '2026-01-03' FROM knowledge_sources WHERE id = 11")


@pytest.mark.parametrize(
    ("statement", "committed"),
    [
        ("ADD COLUMN IF NOT EXISTS origin_session_key", False),
        ("UPDATE knowledge_sources", False),
        ("CREATE OR REPLACE TRIGGER", False),
        ("IF NOT EXISTS chunk_terms", False),
        ("SET STORAGE EXTERNAL", False),
        ("IF NOT EXISTS term_frequencies", False),
        ("CREATE OR REPLACE FUNCTION kotonoha_refresh_terms", False),
        ("ALTER FUNCTION kotonoha_refresh_terms", False),
        ("INSERT INTO chunk_terms", True),
        ("SET lock_timeout = 0", True),
        ("IF NOT EXISTS idx_sources_origin_session_key", True),
        ("IF NOT EXISTS idx_chunk_terms_terms", True),
        ("SELECT kotonoha_refresh_terms", True),
        ("UPDATE alembic_version", True),
    ],
)
async def test_half_of_the_words_completes_when_run_again(
    empty_url: URL, template: URL, monkeypatch: pytest.MonkeyPatch, statement: str, committed: bool
) -> None:
    await at_revision_2(empty_url)
    async with opened(empty_url) as database:
        with crash_at(database, statement, monkeypatch):
            await migrations.upgrade(database)
        assert await migrations.current(database) == "0002"
    assert await fetch_value(empty_url, "SELECT to_regclass('chunk_terms') IS NOT NULL") == committed
    if committed:
        # The application, deployed already, writes meanwhile.
        async with opened(empty_url) as database, database.begin() as session:
            await KnowledgeRepository(session).add_chunks(13, [NewChunk("new")])
        await run_sql(
            empty_url,
            "UPDATE knowledge_sources SET origin_session_key = 'kept' WHERE id IN (11, 13)",
            "DELETE FROM knowledge_chunks WHERE id IN (1, 2)",
            "DELETE FROM chunk_terms WHERE chunk_id = 3",
        )
    times = await fetch(empty_url, "SELECT id, updated_at FROM knowledge_sources ORDER BY id")

    await upgrade(empty_url)

    assert await describe(empty_url) == await describe(template)
    assert not await fetch(empty_url, "SELECT FROM pg_index WHERE NOT indisvalid")
    assert await terms_of_chunks(empty_url) == await expected_terms(empty_url)
    assert await session_keys(empty_url) == SESSION_KEYS | ({11: "kept", 13: "kept"} if committed else {})
    assert await fetch(empty_url, "SELECT id, updated_at FROM knowledge_sources ORDER BY id") == times
    counted = await fetch_value(empty_url, "SELECT frequency FROM term_frequencies WHERE term = ''")
    assert counted == await fetch_value(empty_url, "SELECT count(*) FROM knowledge_chunks")
    path = "SELECT proconfig::text FROM pg_proc WHERE proname = 'kotonoha_refresh_terms'"
    assert await fetch_value(empty_url, path) == '{"search_path=public, pg_temp"}'


async def test_words_go_down_and_up_again(empty_url: URL) -> None:
    await at_revision_2(empty_url)
    before = await describe(empty_url)
    rows = {table: f"SELECT * FROM {table} ORDER BY id" for table in ("knowledge_sources", "knowledge_chunks")}
    old = {table: await fetch(empty_url, query) for table, query in rows.items()}
    await upgrade(empty_url)
    terms, new = (
        await terms_of_chunks(empty_url),
        {table: await fetch(empty_url, query) for table, query in rows.items()},
    )

    await downgrade(empty_url, "0002")
    assert await describe(empty_url) == before
    assert {table: await fetch(empty_url, query) for table, query in rows.items()} == old
    assert not await fetch(empty_url, "SELECT FROM pg_proc WHERE proname = 'kotonoha_refresh_terms'")

    await upgrade(empty_url)
    assert await terms_of_chunks(empty_url) == terms
    assert {table: await fetch(empty_url, query) for table, query in rows.items()} == new


async def test_a_chunk_that_is_being_deleted_is_not_waited_for(empty_url: URL) -> None:
    """Its deletion may wait for another chunk of the batch: a deadlock."""
    await at_revision_2(empty_url)
    await upgrade(empty_url)
    await run_sql(empty_url, "DELETE FROM chunk_terms")
    revision = ScriptDirectory.from_config(migrations.alembic_config()).get_revision("0003")
    async with opened(empty_url) as database, database.engine.connect() as other:
        await other.execute(text("DELETE FROM knowledge_chunks WHERE id = 3"))
        async with database.connect() as connection:
            await asyncio.wait_for(connection.run_sync(revision.module.fill_terms), 30)
        await other.commit()
    assert len(await terms_of_chunks(empty_url)) == 7
    assert await terms_of_chunks(empty_url) == await expected_terms(empty_url)


@pytest.mark.parametrize("chunks", [True, False])
def test_a_script_warns_of_chunks_without_words(empty_url: URL, server_url: URL, chunks: bool) -> None:
    psql = find_program("psql", server_url)
    if psql is None:
        pytest.skip("no psql to run the script with")
    asyncio.run(at_revision_2(empty_url) if chunks else upgrade(empty_url, "0002"))
    code, out, err = finished(alembic(empty_url, "upgrade", "0002:0003", "--sql"))
    assert code == 0, err
    command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", libpq_url(empty_url)]
    result = subprocess.run(command, input=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert ("WARNING" in result.stderr and "fill_terms" in result.stderr) == chunks, result.stderr
    if chunks:
        assert asyncio.run(terms_of_chunks(empty_url)) == {}
        assert asyncio.run(session_keys(empty_url)) == SESSION_KEYS
        asyncio.run(_fill(empty_url))
        assert asyncio.run(terms_of_chunks(empty_url)) == asyncio.run(expected_terms(empty_url))


async def _fill(url: URL) -> None:
    async with opened(url) as database, database.begin() as session:
        assert await fill_terms(session) == 12


async def test_a_large_table_is_filled_in_batches(empty_url: URL) -> None:
    await upgrade(empty_url, "0001")
    await run_sql(
        empty_url,
        "INSERT INTO knowledge_sources (type, title, metadata) VALUES ('web_page', 't', '{\"guild_id\": 5}')",
        "INSERT INTO knowledge_chunks (source_id, content) SELECT 1, 'c' || n FROM generate_series(1, 12000) AS n",
        "DELETE FROM knowledge_chunks WHERE id % 7 = 0",
    )
    started = time.monotonic()
    await upgrade(empty_url)
    assert time.monotonic() - started < 120
    wrong = (
        "SELECT count(*) FROM knowledge_chunks WHERE content_hash IS DISTINCT FROM"
        " sha256(convert_to(content, 'UTF8')) OR guild_id IS DISTINCT FROM 5"
    )
    assert await fetch_value(empty_url, wrong) == 0
    unlike = "SELECT count(*) FROM knowledge_chunks LEFT JOIN chunk_terms ON chunk_id = id"
    assert await fetch_value(empty_url, f"{unlike} WHERE terms IS NULL OR NOT terms @@ content::tsquery") == 0
    assert await fetch_value(empty_url, "SELECT count(DISTINCT xmin::text) FROM chunk_terms") == 11
    frequency = await fetch_value(empty_url, "SELECT frequency FROM term_frequencies WHERE term = ''")
    assert frequency == pytest.approx(12000 * 6 / 7, rel=0.1)
