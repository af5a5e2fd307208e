"""The statements of the queue, of sources and of sessions use their indexes, on enough rows.

With the values known and unknown: after five runs of a prepared statement PostgreSQL may plan it once for all values
(generic plan). Those of searches are in ``test_search_plans.py``.
"""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
from plan_data import JUNE, MODEL, QUERY, Planner, filled_database, planner_of
from sqlalchemy import URL

from kotonoha_store import Message, Scope, Session, embedding_queue, knowledge, sessions, source_status, term_index


@pytest.fixture(scope="module")
def filled(server_url: URL, template: URL) -> Iterator[URL]:
    with filled_database(server_url, template, with_graph=False) as url:
        yield url


@pytest.fixture(params=["custom", "generic"])
async def planner(filled: URL, request: pytest.FixtureRequest) -> AsyncIterator[Planner]:
    async with planner_of(filled, generic=request.param == "generic") as planner:
        yield planner


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


async def test_changes_of_chunks(planner: Planner) -> None:
    ids = list(range(1, 101))
    gone = await planner.plan(knowledge._delete_chunks(), ids=ids)
    moved = await planner.plan(knowledge._move(), chunk_id=1, place={}, since=JUNE, until=JUNE)
    for plan in (gone, moved):
        assert "knowledge_chunks_pkey" in plan
        assert "Seq Scan" not in plan


async def test_a_document_that_is_added_again(planner: Planner) -> None:
    plan = await planner.plan(knowledge._lock_title(b"key"))
    assert "Index Scan using idx_sources_document_key" in plan


# Words of chunks


async def test_terms_of_given_chunks(planner: Planner) -> None:
    ids = list(range(1, 101))
    missing = await planner.plan(term_index._without_terms(only=True), ids=ids)
    assert "knowledge_chunks_pkey" in missing
    assert "chunk_terms_pkey" in missing
    assert "Seq Scan on knowledge_chunks" not in missing
    assert "Seq Scan on chunk_terms" not in missing
    gone = await planner.plan(term_index._delete(), ids=ids)
    assert "chunk_terms_pkey" in gone
    assert "Seq Scan" not in gone


async def test_filling_in_of_terms(planner: Planner) -> None:
    plan = await planner.plan(term_index._without_terms(only=False), after_id=0)
    assert "Index Scan using knowledge_chunks_pkey" in plan
    assert "Index Only Scan using chunk_terms_pkey" in plan
    assert "Sort" not in plan
