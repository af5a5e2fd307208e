"""The hot statements use their indexes, on enough rows, with the parameters known and unknown.

After five runs of a prepared statement PostgreSQL may plan it once for all parameters (generic plan).
"""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from conftest import new_database, settings_for
from sqlalchemy import URL, text

from kotonoha_store import (
    Database,
    KnowledgeChunk,
    Message,
    Scope,
    SearchFilters,
    Session,
    SourceType,
    embedding_queue,
    knowledge,
    retrieval,
    sessions,
    source_status,
)
from kotonoha_store.columns import pack_vectors
from kotonoha_store.database import driver_connection

CHUNKS = 20_000
MODEL = "model-a"
QUERY = pack_vectors(np.random.default_rng(0).standard_normal((1, 1536)))[0]
JUNE = datetime(2024, 6, 1, tzinfo=UTC)

# 2,000 sources in 20 guilds with 10 embedded chunks each; 20,000 more chunks wait, of every fourth source;
# 20,000 dead letters of every fourth source; 20,000 sessions.
DATA = """
INSERT INTO knowledge_sources (type, title, status, metadata, guild_id)
    SELECT CASE WHEN i % 100 = 0 THEN 'web_page' ELSE 'discord_session' END::source_type_enum, 'title ' || i,
           'processing', jsonb_build_object('n', i), i % 20
    FROM generate_series(1, 2000) i;
INSERT INTO knowledge_chunks (source_id, content, guild_id, channel_id, thread_id, user_id)
    SELECT i % 500 * 4 + 1, 'waiting ' || i, i % 20, i % 200, i % 2000, i % 1000
    FROM generate_series(1, 20000) i;
INSERT INTO embedding_jobs (chunk_id, available_at)
    SELECT id, now() - interval '1 hour' + id * interval '1 second' FROM knowledge_chunks WHERE embedding IS NULL;
INSERT INTO knowledge_chunks_dlq (source_id, original_chunk_id, content)
    SELECT i % 500 * 4 + 2, 100000 + i, 'dead' FROM generate_series(1, 20000) i;
INSERT INTO sessions (session_key, session_type, status, channel_id, last_active_at, archive_due_at)
    SELECT 'key ' || i, 'chat', CASE WHEN i % 2 = 0 THEN 'active' ELSE 'archived' END::session_status_enum, i % 2000,
           now() - i * interval '1 minute', now() - i * interval '1 minute'
    FROM generate_series(1, 20000) i;
"""


def records() -> list[tuple[Any, ...]]:
    """Embedded chunks: 200 different vectors, since building the graph is what takes time."""
    rng = np.random.default_rng(1)
    packed = pack_vectors(rng.standard_normal((200, 1536)))
    moments = [JUNE + timedelta(hours=i) for i in range(CHUNKS)]
    return [
        (
            i % 2000 + 1,
            f"chunk {i}",
            packed[i % 200],
            MODEL,
            i % 20,
            i % 200,
            i % 2000,
            i % 1000,
            moments[i],
            moments[i],
        )
        for i in range(CHUNKS)
    ]


@pytest.fixture(scope="module")
def filled(server_url: URL, template: URL) -> Iterator[URL]:
    columns = (
        "source_id",
        "content",
        "embedding",
        "embedding_model",
        "guild_id",
        "channel_id",
        "thread_id",
        "user_id",
        "occurred_from",
        "occurred_to",
    )

    async def fill(url: URL) -> None:
        async with Database(url, settings_for(url), patient=True) as database:
            async with database.begin() as session:
                await session.execute(text("SET LOCAL maintenance_work_mem = '256MB'"))
                index = text("SELECT pg_get_indexdef('idx_chunks_embedding'::regclass)")
                definition = (await session.execute(index)).scalar_one()
                await session.execute(text("DROP INDEX idx_chunks_embedding"))
                driver = await driver_connection(session)
                await driver.execute(DATA)
                await driver.copy_records_to_table("knowledge_chunks", columns=columns, records=records())
                await session.execute(text(definition))
            async with database.connect() as connection:
                await connection.execute(text("VACUUM ANALYZE"))

    with new_database(server_url, template=str(template.database)) as url:
        asyncio.run(fill(url))
        yield url


class Planner:
    """EXPLAIN of the statements as the library sends them."""

    def __init__(self, database: Database, *, generic: bool) -> None:
        self._database = database
        self._generic = generic

    async def plan(self, statement: Any, **parameters: Any) -> str:
        compiled = statement.compile(dialect=self._database.engine.dialect)
        state = compiled.construct_expanded_state(parameters)
        processors = {**compiled._bind_processors, **state.processors}
        arguments = [
            process(state.parameters[name]) if (process := processors.get(name)) else state.parameters[name]
            for name in state.positiontup or ()
        ]
        explain = "EXPLAIN (GENERIC_PLAN)" if self._generic else "EXPLAIN"
        async with self._database.begin() as session:
            await session.execute(retrieval._index_settings(), {"ef_search": "100"})
            driver = await driver_connection(session)
            rows = await driver.fetch(f"{explain} {state.statement}", *arguments)
        return "\n".join(row[0] for row in rows)

    async def search(self, plan: Any, filters: SearchFilters | None = None, top_k: int = 10) -> str:
        own = [
            *retrieval._conditions(filters or SearchFilters()),
            KnowledgeChunk.embedding.is_not(None),
            KnowledgeChunk.embedding_model == MODEL,
        ]
        return await self.plan(plan(own), query=QUERY, top_k=top_k)


@pytest.fixture(params=["custom", "generic"])
async def planner(filled: URL, request: pytest.FixtureRequest) -> Any:
    async with Database(filled, settings_for(filled)) as database:
        yield Planner(database, generic=request.param == "generic")


# The queue


async def test_claim(planner: Planner) -> None:
    plan = await planner.plan(embedding_queue._claim(), limit=100, token=uuid4(), lease=timedelta(minutes=5))
    assert "Index Scan using idx_embedding_jobs_available_at" in plan
    assert "Sort" not in plan[plan.index("CTE picked") : plan.index("CTE leased")]
    assert "Index Scan using knowledge_chunks_pkey" in plan


async def test_complete(planner: Planner) -> None:
    finish = await planner.plan(embedding_queue._finish(), ids=list(range(1, 101)), token=uuid4())
    assert "embedding_jobs_pkey" in finish
    assert "Seq Scan" not in finish
    write = await planner.plan(embedding_queue._write_vector(), chunk=1, vector=QUERY, model=MODEL)
    assert "Index Scan using knowledge_chunks_pkey" in write


async def test_release_and_bury(planner: Planner) -> None:
    ids = list(range(1, 101))
    release = await planner.plan(
        embedding_queue._release(give_back=True), ids=ids, token=uuid4(), delay=timedelta(0), code=None
    )
    bury = await planner.plan(embedding_queue._bury(), ids=ids, token=uuid4(), code="X", message="x", model=None)
    for plan in (release, bury):
        assert "embedding_jobs_pkey" in plan
        assert "Seq Scan on embedding_jobs" not in plan
        assert "Seq Scan on knowledge_chunks" not in plan


async def test_source_status(planner: Planner) -> None:
    plan = await planner.plan(source_status._recompute(), ids=[1, 2, 3])
    assert "idx_chunks_queue" in plan
    assert "idx_dlq_source_id" in plan
    assert "Seq Scan" not in plan
    lock = await planner.plan(source_status._lock(), ids=[1, 2, 3])
    assert "knowledge_sources_pkey" in lock


# Search


async def test_search_through_the_index(planner: Planner) -> None:
    plan = await planner.search(retrieval._through_index)
    assert "Index Scan using idx_chunks_embedding" in plan
    assert "Seq Scan on knowledge_chunks" not in plan


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        (SearchFilters(guild_id=1), "idx_chunks_guild_id"),
        (SearchFilters(channel_id=1), "idx_chunks_channel_id"),
        (SearchFilters(thread_id=1), "idx_chunks_thread_id"),
        (SearchFilters(user_id=1), "idx_chunks_user_id"),
        (SearchFilters(guild_id=1, user_id=1), "idx_chunks_user_id"),
        (SearchFilters(source_ids=(1, 2, 3)), "idx_chunks_s"),
        (SearchFilters(since=JUNE + timedelta(hours=CHUNKS - 100)), "idx_chunks_occurred_to"),
        (SearchFilters(metadata={"n": 1}), "idx_sources_metadata"),
        (SearchFilters(source_types=(SourceType.WEB_PAGE,)), "idx_sources_type"),
    ],
)
async def test_exact_search_within_a_scope(planner: Planner, filters: SearchFilters, index: str) -> None:
    plan = await planner.search(retrieval._exact, filters)
    # How few rows an unknown range keeps the planner cannot tell.
    if not (planner._generic and filters.since):
        assert index in plan
        assert "Seq Scan on knowledge_chunks" not in plan
    assert "idx_chunks_embedding" not in plan


async def test_the_exact_plan_of_everything_does_not_take_the_index(planner: Planner) -> None:
    assert "idx_chunks_embedding" not in await planner.search(retrieval._exact)


# Short-term memory, and chunks of a source


async def test_append(planner: Planner) -> None:
    plan = await planner.plan(sessions._append("key 1", "chat", Scope(), [Message.user("hello")]))
    assert "Conflict Arbiter Indexes: sessions_session_key_key" in plan


async def test_load(planner: Planner) -> None:
    plan = await planner.plan(sessions._load(Session.session_key == "key 1", 10))
    assert "Index Scan using sessions_session_key_key" in plan


@pytest.mark.parametrize("after", [None, sessions.DueSession(id=1, archive_due_at=JUNE)])
async def test_due_sessions(planner: Planner, after: sessions.DueSession | None) -> None:
    plan = await planner.plan(sessions._due(timedelta(hours=1), 10, after))
    assert "Index Scan using idx_sessions_archive_candidates" in plan
    assert "Sort" not in plan


async def test_chunks_of_a_source(planner: Planner) -> None:
    plan = await planner.plan(knowledge._chunks_of(1))
    assert "idx_chunks_source_id" in plan or "idx_chunks_searchable" in plan
    assert "Seq Scan" not in plan
