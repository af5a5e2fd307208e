"""The words of chunks in the database: written with the chunk, counted, filled in, gone with it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest
from conftest import run_sql, settings_for
from migrating import new_role
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    ErrorCode,
    KnowledgeRepository,
    NewChunk,
    Scope,
    SearchFilters,
    SourceType,
    migrations,
)
from kotonoha_store.database import connect_arguments
from kotonoha_store.term_index import FILL_BATCH, FIRST_ID, fill_terms, refresh_terms
from kotonoha_store.words import analyse

PENDING = "SELECT gin_clean_pending_list('idx_chunk_terms_terms')"
COUNTED = "SELECT frequency FROM term_frequencies WHERE term = ''"
URI = "https://example.com"


async def add(database: Database, *contents: str, title: str = "東京 Tower", scope: Scope | None = None) -> list[int]:
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, title, scope=scope)
        return await knowledge.add_chunks(source_id, [NewChunk(content) for content in contents])


async def put(database: Database, title: str, *contents: str) -> int:
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        result = await knowledge.put_document(title, [NewChunk(content) for content in contents], uri=URI)
        return result.source_id


async def sql(database: Database, statement: str, **parameters: Any) -> list[Any]:
    async with database.begin() as session:
        result = await session.execute(text(statement), parameters)
        return [tuple(row) if len(row) > 1 else row[0] for row in result] if result.returns_rows else []


async def terms_in(unit: AsyncSession | AsyncConnection) -> dict[int, tuple[set[str], str | None]]:
    rows = await unit.execute(text("SELECT chunk_id, tsvector_to_array(terms), folded FROM chunk_terms"))
    return {row[0]: (set(row[1]), row[2]) for row in rows}


async def stored(database: Database) -> dict[int, tuple[set[str], str | None]]:
    async with database.begin() as session:
        return await terms_in(session)


def expected(title: str, content: str, *scope: str) -> tuple[set[str], str | None]:
    words = analyse(title, content)
    return {*words.terms, *scope}, words.folded


async def many(database: Database, count: int, *, first: int = 1, term: str = "all", index: bool = True) -> None:
    """Chunks by SQL: every one has ``term``, every second ``half``, every tenth ``tenth``, and one of its own."""
    await sql(
        database,
        "INSERT INTO knowledge_sources (id, type, title) VALUES (-1, 'web_page', 't') ON CONFLICT DO NOTHING",
    )
    await sql(
        database,
        "INSERT INTO knowledge_chunks (id, source_id, content) SELECT n, -1, 'c'"
        " FROM generate_series(CAST(:a AS bigint), :z) AS n",
        a=first,
        z=first + count - 1,
    )
    await sql(database, "SELECT setval('knowledge_chunks_id_seq', greatest(1, CAST(:z AS bigint)))", z=first + count)
    if index:
        await sql(
            database,
            "INSERT INTO chunk_terms (chunk_id, terms) SELECT n, array_to_tsvector(array_remove(ARRAY[CAST(:t AS text),"
            " 'own' || n, '#guild_id=1', CASE WHEN n % 2 = 0 THEN 'half' END,"
            " CASE WHEN n % 10 = 0 THEN 'tenth' END], NULL)) FROM generate_series(CAST(:a AS bigint), :z) AS n",
            t=term,
            a=first,
            z=first + count - 1,
        )


async def refresh(database: Database, *, force: bool = False) -> None:
    async with database.begin() as session:
        await refresh_terms(session, force=force)


async def delete(database: Database, filters: SearchFilters) -> int:
    async with database.begin() as session:
        return (await KnowledgeRepository(session).delete_chunks(filters)).chunks


async def frequencies(database: Database) -> dict[str, float]:
    return dict(await sql(database, "SELECT term, frequency FROM term_frequencies"))


# -- written with the chunk ----------------------------------------------------------------------------------------


async def test_added_chunks_have_their_terms(database: Database) -> None:
    scope = Scope(guild_id=1, channel_id=-2, user_id=2**63 - 1)
    one, other = await add(database, "ｶﾞｷﾞ RUNS", "it's 100% \\ 雨", title="tower", scope=scope)
    marks = ("#guild_id=1", "#channel_id=-2", f"#user_id={2**63 - 1}")
    assert await stored(database) == {
        one: expected("tower", "ｶﾞｷﾞ RUNS", *marks),
        other: expected("tower", "it's 100% \\ 雨", *marks),
    }
    found = await stored(database)
    assert found[one] == ({"tower", "ガギ", "ギ", "run", "runs", *marks}, "tower\nガギ runs")
    # Folding changes nothing there.
    assert found[other][1] is None


async def test_terms_are_read_as_postgresql_prints_them(database: Database) -> None:
    await add(database, "runs, it runs", title="t")
    assert await sql(database, "SELECT terms FROM chunk_terms") == await sql(
        database, "SELECT CAST(terms AS text) FROM chunk_terms"
    )


async def test_a_document_has_terms_and_a_large_one_too(database: Database) -> None:
    large = " ".join(f"word{number}" for number in range(5000))
    await put(database, "a title", "short", large)
    one, other = (found for _, found in sorted((await stored(database)).items()))
    assert one == expected("a title", "short")
    assert other == expected("a title", large)
    assert {"titl", "word4999"} <= other[0]


@pytest.mark.parametrize("how", ["add_chunks", "put_document"])
async def test_terms_are_of_the_chunks_transaction(database: Database, how: str) -> None:
    chunks = [NewChunk("a"), NewChunk("b")]
    async with database.engine.connect() as connection, AsyncSession(connection) as session:
        knowledge = KnowledgeRepository(session)
        if how == "add_chunks":
            await knowledge.add_chunks(await knowledge.add_source(SourceType.WEB_PAGE, "t"), chunks)
        else:
            await knowledge.put_document("t", chunks, uri=URI)
        assert len(await terms_in(session)) == 2
        assert await stored(database) == {}
        await session.rollback()
    assert await stored(database) == {}
    assert await frequencies(database) == {}


async def test_a_changed_title_rewrites_the_terms_of_kept_chunks(database: Database) -> None:
    await put(database, "old title", "kept", "gone")
    before = {row[1]: row[0] for row in await sql(database, "SELECT id, content FROM knowledge_chunks")}
    await put(database, "NEW title", "kept", "added")
    after = {row[1]: row[0] for row in await sql(database, "SELECT id, content FROM knowledge_chunks")}
    assert after["kept"] == before["kept"]
    assert await stored(database) == {
        after["kept"]: expected("NEW title", "kept"),
        after["added"]: expected("NEW title", "added"),
    }


async def test_the_same_title_leaves_the_terms_of_kept_chunks(database: Database) -> None:
    await put(database, "title", "kept", "gone")
    rows = (
        "SELECT CAST(t.ctid AS text) FROM chunk_terms t JOIN knowledge_chunks ON id = chunk_id WHERE content = 'kept'"
    )
    before = await sql(database, rows)
    await put(database, "title", "kept", "added")
    assert await sql(database, rows) == before
    assert len(await stored(database)) == 2


async def test_two_who_rename_a_document_at_once_leave_one_of_both_titles(database: Database) -> None:
    await put(database, "first", "kept")
    await asyncio.gather(*(put(database, f"title{number}", "kept") for number in range(6)))
    (title,) = await sql(database, "SELECT title FROM knowledge_sources")
    assert list((await stored(database)).values()) == [expected(title, "kept")]


async def test_chunks_that_are_queued_again_have_their_terms_back(database: Database) -> None:
    queue = EmbeddingQueue(database)
    ids = await add(database, "one", "Two", scope=Scope(thread_id=5))
    before = await stored(database)
    lease = await queue.claim()
    await queue.bury(lease, ids, ErrorCode.INVALID_INPUT)
    assert await stored(database) == {}
    assert await queue.requeue() == 2
    assert await stored(database) == before
    assert await sql(database, PENDING) == [0]


async def test_terms_go_with_their_chunk_and_with_its_source(database: Database) -> None:
    one, other = await add(database, "one", "other")
    await sql(database, "DELETE FROM knowledge_chunks WHERE id = :id", id=one)
    assert set(await stored(database)) == {other}
    (source_id,) = await sql(database, "SELECT id FROM knowledge_sources")
    async with database.begin() as session:
        await KnowledgeRepository(session).delete_source(source_id)
    assert await stored(database) == {}


# -- merged and counted ---------------------------------------------------------------------------------------------


async def test_new_terms_are_merged_into_their_index(database: Database) -> None:
    # Which merges them as well.
    await sql(database, "ALTER TABLE chunk_terms SET (autovacuum_enabled = off)")
    await many(database, 50)
    await refresh(database)
    assert await sql(database, PENDING) == [0]
    # What the next would have merged, had nobody refreshed.
    await many(database, 1, first=100)
    assert await sql(database, PENDING) != [0]
    await add(database, "a", "b")
    assert await sql(database, PENDING) == [0]
    await put(database, "t", "a")
    assert await sql(database, PENDING) == [0]


async def test_few_chunks_are_counted_exactly(database: Database) -> None:
    await many(database, 150)
    await refresh(database)
    found = await frequencies(database)
    assert {name: found[name] for name in ("all", "half", "tenth", "")} == {
        "all": 1.0,
        "half": 0.5,
        "tenth": 0.1,
        "": 150.0,
    }
    assert found["own7"] == pytest.approx(1 / 150)
    # Scope is no word; this one is the newest id.
    assert [name for name in found if name.startswith("#")] == ["#", "#size"]


async def test_all_of_up_to_two_thousand_are_counted(database: Database) -> None:
    await many(database, 1990)
    await refresh(database)
    found = await frequencies(database)
    assert (found[""], found["half"], found["tenth"]) == (1990.0, 0.5, 0.1)
    # What occurs once is rare enough without a number.
    assert not any(name.startswith("own") for name in found)


@pytest.mark.parametrize("thinned", [False, True])
async def test_many_are_counted_by_a_sample(database: Database, thinned: bool) -> None:
    await many(database, 5000)
    if thinned:
        # Every second of the tens, and half of the rest.
        await sql(database, "DELETE FROM knowledge_chunks WHERE id % 4 IN (0, 1)")
    await refresh(database)
    found = await frequencies(database)
    assert found["all"] == 1.0
    # Five standard deviations of what 800 drawn at random show.
    assert found["half"] == pytest.approx(0.5, abs=0.09)
    assert found["tenth"] == pytest.approx(0.1, abs=0.055)
    # That it is a sample: one in 35 shows just the half.
    halves = {found["half"]}
    for _ in range(3):
        await refresh(database, force=True)
        halves.add((await frequencies(database))["half"])
    assert halves != {0.5}
    assert found[""] == pytest.approx(2500 if thinned else 5000, rel=0.1)
    assert not any(name.startswith("own") for name in found)


async def test_counted_again_after_growth_by_half_or_when_forced(database: Database) -> None:
    await many(database, 100)
    await refresh(database)
    await many(database, 49, first=101, term="later")
    await refresh(database)
    assert (await frequencies(database)).get("later") is None
    await refresh(database, force=True)
    assert (await frequencies(database))["later"] == pytest.approx(49 / 149)
    await many(database, 75, first=150, term="latest")
    await refresh(database)
    assert (await frequencies(database))["latest"] == pytest.approx(75 / 224)


async def test_nothing_is_counted_where_nothing_is(database: Database) -> None:
    await refresh(database, force=True)
    assert await frequencies(database) == {}


async def test_a_gap_in_the_ids_is_counted_by_the_newest(database: Database) -> None:
    await many(database, 2600, term="old")
    await many(database, 1000, first=10**12, term="new")
    await refresh(database)
    found = await frequencies(database)
    assert (found["new"], found["old"]) == (0.5, 0.5)
    # The number of chunks, as far as anybody knows, and not the largest id.
    assert 2000 <= found[""] <= 3600
    # Growth is still seen.
    await many(database, 2000, first=10**12 + 1000, term="newest")
    await refresh(database)
    assert (await frequencies(database))["newest"] == 1.0


async def test_growth_below_an_id_far_above_the_others_is_seen_by_the_size(database: Database) -> None:
    await many(database, 100)
    await many(database, 1, first=10**12)
    await refresh(database)
    await many(database, 100, first=101, term="later")
    await refresh(database)
    # Little has changed, as far as the largest id and the size tell.
    assert (await frequencies(database)).get("later") is None
    await many(database, 1500, first=201, term="x" * 1500)
    await refresh(database)
    found = await frequencies(database)
    assert (found["later"], found[""]) == (pytest.approx(100 / 1701), 1701.0)


async def test_words_of_a_deleted_source_are_forgotten(database: Database) -> None:
    for content in ("gone stays", "stays"):
        await add(database, content, title=content)
    await refresh(database, force=True)
    assert (await frequencies(database))["gone"] == 0.5
    sources = await sql(database, "SELECT id FROM knowledge_sources ORDER BY id")
    for source_id, left in zip(sources, (1.0, None), strict=True):
        async with database.begin() as session:
            await KnowledgeRepository(session).delete_source(source_id)
        found = await frequencies(database)
        assert (found.get("gone"), found.get("stay")) == (None, left)


async def test_after_a_vacuum_a_gap_hides_no_chunk(migrated_url: URL, database: Database) -> None:
    await many(database, 2600)
    await many(database, 1000, first=10**12)
    await run_sql(migrated_url, "VACUUM chunk_terms")
    await refresh(database)
    assert (await frequencies(database))[""] == 3600.0


async def test_ids_below_zero_and_ids_that_began_anew_are_counted(database: Database) -> None:
    await many(database, 30, first=-30)
    await refresh(database)
    assert (await frequencies(database))[""] == 30.0
    await many(database, 10, first=10**9)
    await refresh(database)
    await sql(database, "TRUNCATE knowledge_chunks RESTART IDENTITY CASCADE")
    await many(database, 20, first=1, term="anew")
    await refresh(database)
    assert ((await frequencies(database))[""], (await frequencies(database))["anew"]) == (20.0, 1.0)


async def test_two_who_count_at_once_do_not_wait_for_each_other(database: Database) -> None:
    await many(database, 100)
    async with database.begin() as first:
        await refresh_terms(first)
        # It has counted, and not committed.
        await asyncio.wait_for(refresh(database, force=True), 60)
        await asyncio.wait_for(add(database, "a", "b"), 60)
        assert await frequencies(database) == {}
    assert (await frequencies(database))["all"] == 1.0


async def test_who_deletes_does_not_wait_for_who_is_counting(database: Database) -> None:
    await add(database, "a", scope=Scope(guild_id=1))
    async with database.begin() as adding:
        knowledge = KnowledgeRepository(adding)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, "other")
        await knowledge.add_chunks(source_id, [NewChunk(f"text {number}") for number in range(50)])
        # Counted anew, and not committed.
        assert (await adding.execute(text(COUNTED))).scalar() == 51.0
        assert await asyncio.wait_for(delete(database, SearchFilters(guild_id=1)), 60) == 1
    assert len(await stored(database)) == 50


async def test_who_sees_an_old_snapshot_adds_and_leaves_the_counting_to_others(database: Database) -> None:
    await add(database, "a")
    async with database.engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        async with AsyncSession(connection) as session, session.begin():
            await terms_in(session)
            # Counted meanwhile: to write the same rows would be a failure of the whole transaction.
            await refresh(database, force=True)
            knowledge = KnowledgeRepository(session)
            source_id = await knowledge.add_source(SourceType.WEB_PAGE, "t")
            await knowledge.add_chunks(source_id, [NewChunk(f"late {number}") for number in range(9)])
    assert len(await stored(database)) == 10
    assert (await frequencies(database)).get("late") is None


async def test_many_who_add_at_once(database: Database) -> None:
    for _ in range(3):
        await asyncio.wait_for(asyncio.gather(*(add(database, f"text{number}") for number in range(9))), 60)
    assert len(await stored(database)) == 27
    await refresh(database, force=True)
    assert (await frequencies(database))[""] == 27.0


async def test_while_the_index_is_not_there_yet_chunks_are_added(database: Database) -> None:
    """A migration that has not finished builds it last."""
    await sql(database, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_chunk_terms_terms'::regclass")
    await add(database, "a")
    await sql(database, "DROP INDEX idx_chunk_terms_terms")
    await add(database, "b")
    assert len(await stored(database)) == 2


# -- by whose right, and whose tables -------------------------------------------------------------------------------


@contextmanager
def application_role(server: URL, url: URL) -> Iterator[URL]:
    """A role that may read and write, and owns nothing."""
    with new_role(server) as role:
        grants = [
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{role}"',
            f'GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO "{role}"',
            f'CREATE SCHEMA other AUTHORIZATION "{role}"',
        ]
        asyncio.run(run_sql(url, *grants))
        try:
            yield url.set(username=role)
        finally:
            # What ends drops its temporary tables itself, and a pooler ends nothing.
            ended = f"SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE usename = '{role}'"
            asyncio.run(run_sql(url, ended, f'DROP OWNED BY "{role}" CASCADE'))


@pytest.fixture
def role_url(server_url: URL, migrated_url: URL) -> Iterator[URL]:
    with application_role(server_url, migrated_url) as url:
        yield url


@pytest.fixture
async def as_role(role_url: URL) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(**connect_arguments(role_url, settings_for(role_url)))
    try:
        yield connection
    finally:
        await connection.close()


async def test_a_role_that_owns_nothing_adds_and_counts(role_url: URL, database: Database) -> None:
    async with Database(role_url, settings_for(role_url)) as application:
        await add(application, "one", "two")
    assert await sql(database, PENDING) == [0]
    assert (await frequencies(database))["one"] == 0.5


async def test_a_role_that_may_not_read_how_rare_words_are_adds_and_deletes(
    role_url: URL, migrated_url: URL, database: Database
) -> None:
    await run_sql(migrated_url, f'REVOKE ALL ON term_frequencies FROM "{role_url.username}"')
    async with Database(role_url, settings_for(role_url)) as application:
        await add(application, "one", "two", scope=Scope(guild_id=1))
        await add(application, "three")
        assert "two" in await frequencies(database)
        assert await delete(application, SearchFilters(guild_id=1)) == 2
    assert "two" not in await frequencies(database)


@pytest.mark.parametrize("where", ["other", "pg_temp"])
async def test_namesakes_that_the_caller_finds_first_are_left_alone(
    database: Database, as_role: asyncpg.Connection, where: str
) -> None:
    """A trigger on one of them would run with the owner's right."""
    await many(database, 100)
    await as_role.execute(
        f"CREATE TABLE {where}.chunk_terms (chunk_id bigint, terms tsvector);"
        f"CREATE INDEX idx_chunk_terms_terms ON {where}.chunk_terms USING gin (terms);"
        f"CREATE TABLE {where}.term_frequencies (term text, frequency double precision, by text);"
        "CREATE FUNCTION other.note() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.by := current_user; RETURN NEW; END $$;"
        f"CREATE TRIGGER note BEFORE INSERT ON {where}.term_frequencies"
        " FOR EACH ROW EXECUTE FUNCTION other.note();"
        f"INSERT INTO {where}.chunk_terms VALUES (1, 'theirs');"
        "SET search_path = other, public"
    )
    await as_role.execute("SELECT kotonoha_refresh_terms()")
    assert await as_role.fetch(f"SELECT * FROM {where}.term_frequencies") == []
    found = await frequencies(database)
    assert (found["all"], found.get("theirs")) == (1.0, None)
    assert await sql(database, PENDING) == [0]


async def test_in_a_schema_of_its_own(empty_url: URL) -> None:
    """With odd characters, which the function's search_path must quote."""
    schema = '"My app, it\'s"'
    await run_sql(empty_url, f"CREATE SCHEMA {schema}", "CREATE EXTENSION vector")
    path = f"-csearch_path={schema},public".replace(" ", "\\ ")
    app = empty_url.update_query_dict({"options": path})
    async with Database(app, settings_for(app)) as database:
        await migrations.upgrade(database)
        await add(database, "one", "two")
        assert (await frequencies(database))["one"] == 0.5
        assert await sql(database, PENDING) == [0]
    # Whoever calls it by its full name.
    await run_sql(empty_url, f"SELECT {schema}.kotonoha_refresh_terms(force => true)")


# -- filled in ------------------------------------------------------------------------------------------------------


async def fill_all(database: Database) -> int:
    """As Store does it: batch by batch."""
    after, batches = FIRST_ID, 0
    while True:
        async with database.begin() as session:
            last = await fill_terms(session, after_id=after)
        if last is None:
            return batches
        assert last > after
        after, batches = last, batches + 1


async def test_what_has_no_terms_is_filled_in(database: Database) -> None:
    await add(database, "One", "two", "three", scope=Scope(guild_id=3))
    before = await stored(database)
    one, two, _ = sorted(before)
    await sql(database, "DELETE FROM chunk_terms WHERE chunk_id IN (:one, :two)", one=one, two=two)
    kept = await sql(database, "SELECT CAST(xmin AS text) FROM chunk_terms")
    assert await fill_all(database) == 1
    assert await stored(database) == before
    assert await sql(database, "SELECT CAST(xmin AS text) FROM chunk_terms WHERE chunk_id > :two", two=two) == kept
    assert await fill_all(database) == 0


async def test_it_goes_on_batch_by_batch_from_the_lowest_id(database: Database) -> None:
    await many(database, FILL_BATCH + 5, first=-3, index=False)
    assert await fill_all(database) == 2
    assert len(await stored(database)) == FILL_BATCH + 5
    async with database.begin() as session:
        await refresh_terms(session, force=True)
    assert (await frequencies(database))["c"] == 1.0


async def test_given_ids_only_these_are_filled(database: Database) -> None:
    await many(database, 10, index=False)
    async with database.begin() as session:
        assert await fill_terms(session, ids=[]) is None
        assert await fill_terms(session, ids=[3, 7, 99]) == 7
    assert set(await stored(database)) == {3, 7}


@pytest.mark.parametrize("commits", [True, False])
async def test_a_chunk_that_is_being_deleted_is_passed_over(database: Database, commits: bool) -> None:
    await many(database, 5, index=False)
    async with database.engine.connect() as other:
        await other.execute(text("DELETE FROM knowledge_chunks WHERE id = 3"))
        assert await asyncio.wait_for(fill_all(database), 60) == 1
        await (other.commit() if commits else other.rollback())
    assert set(await stored(database)) == {1, 2, 4, 5}
    assert await fill_all(database) == (0 if commits else 1)


async def test_a_chunk_that_is_being_changed_is_not_passed_over(database: Database) -> None:
    await many(database, 5, index=False)
    async with database.engine.connect() as other:
        await other.execute(text("UPDATE knowledge_chunks SET token_count = 1 WHERE id = 3"))
        assert await asyncio.wait_for(fill_all(database), 60) == 1
        await other.commit()
    assert len(await stored(database)) == 5


async def _meanwhile(database: Database, task: "asyncio.Task[Any]") -> None:
    """Until the task waits for a lock."""
    waiting = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'client backend' AND wait_event_type = 'Lock'"
    )
    while await sql(database, waiting) == [0]:
        assert not task.done()
        await asyncio.sleep(0.01)


async def test_a_source_that_is_being_deleted_is_waited_for(database: Database) -> None:
    await many(database, 5, index=False)
    (other_id,) = await add(database, "x")
    await sql(database, "DELETE FROM chunk_terms")
    async with database.engine.connect() as other:
        await other.execute(text("DELETE FROM knowledge_sources WHERE id = -1"))
        filling = asyncio.create_task(fill_all(database))
        await _meanwhile(database, filling)
        await other.commit()
    await asyncio.wait_for(filling, 60)
    assert set(await stored(database)) == {other_id}


async def test_two_who_fill_at_once_write_each_once(database: Database) -> None:
    await many(database, 2 * FILL_BATCH, index=False)
    async with database.begin() as session:
        await fill_terms(session)
        filling = asyncio.create_task(fill_all(database))
        await _meanwhile(database, filling)
    assert await asyncio.wait_for(filling, 60) == 2
    assert len(await stored(database)) == 2 * FILL_BATCH
    await sql(database, "DELETE FROM chunk_terms")
    await asyncio.wait_for(asyncio.gather(*(fill_all(database) for _ in range(4))), 60)
    assert len(await stored(database)) == 2 * FILL_BATCH


async def test_a_document_that_is_renamed_meanwhile_has_its_new_title(database: Database) -> None:
    await put(database, "old", "kept")
    await sql(database, "DELETE FROM chunk_terms")
    async with database.begin() as session:
        await fill_terms(session)
        renaming = asyncio.create_task(put(database, "new", "kept"))
        await _meanwhile(database, renaming)
    await asyncio.wait_for(renaming, 60)
    assert list((await stored(database)).values()) == [expected("new", "kept")]
