"""The statements of the queue, of sources and of sessions use their indexes, on enough rows.

With the values known and unknown: after five runs of a prepared statement PostgreSQL may plan it once for all values
(generic plan). Those of searches are in ``test_search_plans.py``.
"""

import re
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
from plan_data import JUNE, MODEL, QUERY, Planner, filled_database, planner_of
from sqlalchemy import URL

from kotonoha_store import Session, knowledge, queue_statements, sessions, term_index
from kotonoha_store.records import SCOPE_FIELDS


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
    values = {"token": uuid4(), "duration": timedelta(minutes=5), "asked": "model", "failed": 3}
    plan = await planner.of(queue_statements.claim(100), values)
    due = plan[plan.index("CTE due") : plan.index("CTE leased")]
    assert "Index Scan using idx_embedding_jobs_available_at" in due
    assert "Sort" not in due
    assert "embedding_jobs_pkey" in plan
    assert "Index Scan using knowledge_chunks_pkey" in plan
    assert "knowledge_sources_pkey" in plan
    assert not re.search("Seq Scan on (embedding_jobs|knowledge)", plan)


async def test_claim_after_the_last_one(planner: Planner) -> None:
    values = {"token": uuid4(), "duration": timedelta(minutes=5), "asked": "model", "failed": 3}
    plan = await planner.of(queue_statements.claim(100, after=True), {**values, "due_at": JUNE, "chunk_id": 1})
    due = plan[plan.index("CTE due") : plan.index("CTE leased")]
    assert "Index Scan using idx_embedding_jobs_available_at" in due
    # Where the scan begins, and no filter on what it reads.
    assert re.search(r"Index Cond: .*ROW\(available_at, chunk_id\) > ROW", due)


async def test_when_a_job_is_due(planner: Planner) -> None:
    assert "using idx_embedding_jobs_available_at" in await planner.of(queue_statements.next_due(), {})


async def test_complete(planner: Planner) -> None:
    ids = list(range(1, 101))
    finish = await planner.of(queue_statements.finish(), {"ids": ids, "token": uuid4(), "sources": [1, 2]})
    assert "embedding_jobs_pkey" in finish
    assert "knowledge_sources_pkey" in finish
    assert "Seq Scan" not in finish
    write = await planner.of(queue_statements.write_vector(), {"chunk": 1, "vector": QUERY, "model": MODEL})
    assert "Index Scan using knowledge_chunks_pkey" in write


async def test_vectors_of_known_texts(planner: Planner) -> None:
    values = {"ids": list(range(1, 101)), "token": uuid4(), "model": MODEL}
    for statement in (queue_statements.known(), queue_statements.copy_known()):
        plan = await planner.of(statement, values)
        assert "using idx_chunks_content_hash" in plan
        assert "Seq Scan" not in plan


async def test_heartbeat_release_and_bury(planner: Planner) -> None:
    job = {"ids": list(range(1, 101)), "token": uuid4(), "duration": timedelta(0)}
    for statement, values in (
        (queue_statements.heartbeat(), job),
        (queue_statements.release(give_back=True), {**job, "code": None}),
        (queue_statements.bury(), {**job, "code": "X", "message": "x", "model": None, "most": 3}),
    ):
        plan = await planner.of(statement, values)
        assert "embedding_jobs_pkey" in plan
        assert "Seq Scan on embedding_jobs" not in plan
        assert "Seq Scan on knowledge_chunks" not in plan


async def test_source_status(planner: Planner) -> None:
    plan = await planner.of(queue_statements.recompute_status(), {"ids": [1, 2, 3]})
    assert "idx_chunks_queue" in plan
    assert "idx_dlq_source_id" in plan
    # Whatever statistics say of how many are embedded: this one would be read from one end to the other.
    assert "idx_chunks_content_hash" not in plan
    assert "Seq Scan" not in plan
    lock = await planner.of(queue_statements.lock_sources(), {"ids": [1, 2, 3]})
    assert "knowledge_sources_pkey" in lock


# Short-term memory, and chunks of a source


async def test_append(planner: Planner) -> None:
    values = {"new_key": "key 1", "new_type": "chat", "new_messages": "[{}]"}
    plan = await planner.of(sessions._append(50), {**values, **{f"new_{name}": None for name in SCOPE_FIELDS}})
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
