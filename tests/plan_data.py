"""Enough rows that the planner has a choice, and EXPLAIN of what the library sends, for the tests of plans.

2,000 sources: every second in guild 0, the others in ten guilds. 20,000 embedded chunks, ten of each source, and
20,000 that wait, of every fourth source; terms of 35,000 of these chunks; 20,000 dead letters of every fourth
source; 20,000 sessions.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from conftest import new_database, settings_for
from sqlalchemy import URL, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store import Database, Scope
from kotonoha_store.columns import pack_vectors
from kotonoha_store.database import driver_connection, ensure_codecs
from kotonoha_store.prepared import Prepared
from kotonoha_store.term_index import TextOfChunk, write_terms

CHUNKS = 20_000
SOURCES = 2_000
MODEL = "model-a"
QUERY = pack_vectors(np.random.default_rng(0).standard_normal((1, 1536)))[0]
JUNE = datetime(2024, 6, 1, tzinfo=UTC)

# Word, and its share of the chunks.
MARKS = {
    "half": 0.5,
    "fifth": 0.2,
    "twentieth": 0.05,
    "seldom": 0.001,
    "東京": 0.05,
    "night view": 0.02,
    "Ｎｅｏｎ": 0.2,
}
# So that the list of the common words is full.
VOCABULARY = 12_000
WORDS_OF_CHUNK = 60
# The last of the chunks that wait have no terms yet.
WITH_TERMS = 35_000

SOURCES_AND_SESSIONS = f"""
INSERT INTO knowledge_sources (type, title, status, metadata, guild_id, origin_session_key, document_key)
    SELECT CASE WHEN i % 100 = 0 THEN 'web_page' ELSE 'discord_session' END::source_type_enum, 'title ' || i,
           'processing', jsonb_build_object('n', i, 'kind', 'talk'), CASE WHEN i % 2 = 0 THEN 0 ELSE i % 20 END,
           'key ' || i, sha256(('document ' || i)::bytea)
    FROM generate_series(1, {SOURCES}) i;
INSERT INTO sessions (session_key, session_type, status, channel_id, last_active_at, archive_due_at)
    SELECT 'key ' || i, 'chat', CASE WHEN i % 2 = 0 THEN 'active' ELSE 'archived' END::session_status_enum, i % 2000,
           now() - i * interval '1 minute', now() - i * interval '1 minute'
    FROM generate_series(1, 20000) i;
"""
# Nothing is vacuumed or analysed again while the tests run.
WITHOUT_AUTOVACUUM = """
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT oid::regclass FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace LOOP
        EXECUTE 'ALTER TABLE ' || name || ' SET (autovacuum_enabled = off)';
    END LOOP;
END $$
"""
# What an index alone can answer depends on it.
NOT_ALL_VISIBLE = """
SELECT count(*) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relallvisible < relpages
"""
JOBS_AND_LETTERS = """
INSERT INTO embedding_jobs (chunk_id, available_at)
    SELECT id, now() - interval '1 hour' + id * interval '1 second' FROM knowledge_chunks WHERE embedding IS NULL;
INSERT INTO knowledge_chunks_dlq (source_id, original_chunk_id, content)
    SELECT i % 500 * 4 + 2, 100000 + i, 'dead' FROM generate_series(1, 20000) i;
SELECT setval(pg_get_serial_sequence('knowledge_chunks', 'id'), (SELECT max(id) FROM knowledge_chunks));
"""
COLUMNS = (
    "id",
    "source_id",
    "content",
    "embedding",
    "embedding_model",
    "location",
    "token_count",
    "guild_id",
    "channel_id",
    "thread_id",
    "user_id",
    "occurred_from",
    "occurred_to",
)


def contents() -> list[str]:
    """As unevenly distributed as words are, and marks in just so many chunks."""
    rng = np.random.default_rng(2)
    shares = 1 / (np.arange(VOCABULARY) + 100)
    drawn = rng.choice(VOCABULARY, (2 * CHUNKS, WORDS_OF_CHUNK), p=shares / shares.sum())
    texts = [[f"word{number}" for number in row] for row in drawn]
    for mark, share in MARKS.items():
        for position in np.flatnonzero(rng.random(2 * CHUNKS) < share):
            texts[position].append(mark)
    return [" ".join(words) for words in texts]


def guild_of(source_id: int) -> int:
    return 0 if source_id % 2 == 0 else source_id % 20


def records() -> Iterator[tuple[Any, ...]]:
    """200 different vectors, since building the graph is what takes time."""
    packed = pack_vectors(np.random.default_rng(1).standard_normal((200, 1536)))
    for i, content in enumerate(contents()):
        waits = i >= CHUNKS
        source = i % 500 * 4 + 1 if waits else i % SOURCES + 1
        moment = None if waits else JUNE + timedelta(hours=i)
        yield (
            i + 1,
            source,
            content,
            None if waits else packed[i % 200],
            None if waits else MODEL,
            f'{{"chunk_index": {i // SOURCES}}}',
            30,
            guild_of(source),
            i % 200,
            i % 2000,
            i % 1000,
            moment,
            moment,
        )


async def fill(url: URL, *, with_graph: bool) -> None:
    async with Database(url, settings_for(url, db_command_timeout=600), patient=True) as database:
        async with database.begin() as session:
            await session.execute(text("SET LOCAL maintenance_work_mem = '256MB'"))
            index = text("SELECT pg_get_indexdef('idx_chunks_embedding'::regclass)")
            definition = (await session.execute(index)).scalar_one()
            await session.execute(text("DROP INDEX idx_chunks_embedding"))
            driver = await driver_connection(session)
            await driver.execute(WITHOUT_AUTOVACUUM)
            await driver.execute(SOURCES_AND_SESSIONS)
            rows = list(records())
            await driver.copy_records_to_table("knowledge_chunks", columns=COLUMNS, records=rows)
            await driver.execute(JOBS_AND_LETTERS)
            texts = [TextOfChunk(row[0], f"title {row[1]}", row[2], Scope(*row[7:11])) for row in rows[:WITH_TERMS]]
            await write_terms(session, texts)
            await session.execute(select(func.kotonoha_refresh_terms(True)))
            if with_graph:
                await session.execute(text(definition))
        async with database.connect() as connection:
            await connection.execute(text("VACUUM ANALYZE"))
            # It passes over pages that the checkpointer or somebody's older snapshot holds just then.
            async with asyncio.timeout(60):
                while (await connection.execute(text(NOT_ALL_VISIBLE))).scalar_one():
                    await asyncio.sleep(0.2)
                    await connection.execute(text("VACUUM ANALYZE"))


@contextmanager
def filled_database(server: URL, template: URL, *, with_graph: bool = True) -> Iterator[URL]:
    """Without the graph of the vectors it takes a fraction of the time."""
    with new_database(server, template=str(template.database)) as url:
        asyncio.run(fill(url, with_graph=with_graph))
        yield url


# Without bound values: with them EXPLAIN (GENERIC_PLAN) plans for these after all.
GENERIC_FUNCTION = """
CREATE FUNCTION pg_temp.generic_plan(statement text) RETURNS SETOF text LANGUAGE plpgsql AS $$
BEGIN
    RETURN QUERY EXECUTE 'EXPLAIN (GENERIC_PLAN) ' || statement;
END
$$
"""


class Planner:
    """EXPLAIN of the statements as the library sends them, as PostgreSQL plans them at first and after five runs."""

    def __init__(self, connection: AsyncConnection, driver: Any, *, generic: bool) -> None:
        self.driver = driver
        self.generic = generic
        self._dialect = connection.dialect

    async def of(self, prepared: Prepared, values: Mapping[str, Any]) -> str:
        """The plan of a search's statement."""
        return await self._explain(prepared.sql, prepared.arguments(values))

    async def plan(self, statement: Any, **parameters: Any) -> str:
        """The plan of any other statement."""
        compiled = statement.compile(dialect=self._dialect)
        state = compiled.construct_expanded_state(parameters)
        processors = {**compiled._bind_processors, **state.processors}
        arguments = [
            process(state.parameters[name]) if (process := processors.get(name)) else state.parameters[name]
            for name in state.positiontup or ()
        ]
        return await self._explain(state.statement, arguments)

    async def _explain(self, sql: str, arguments: Sequence[Any]) -> str:
        if self.generic:
            rows = await self.driver.fetch("SELECT * FROM pg_temp.generic_plan($1)", sql)
        else:
            rows = await self.driver.fetch(f"EXPLAIN {sql}", *arguments)
        return "\n".join(row[0] for row in rows)


@asynccontextmanager
async def planner_of(url: URL, *, generic: bool) -> AsyncIterator[Planner]:
    async with Database(url, settings_for(url)) as database, database.connect() as connection:
        await ensure_codecs(connection)
        driver = await driver_connection(connection)
        if generic:
            await driver.execute(GENERIC_FUNCTION)
        yield Planner(connection, driver, generic=generic)
