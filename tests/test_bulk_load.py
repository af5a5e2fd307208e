"""Many documents at once: killed and started again, beside others, with the HNSW index kept or built afterwards."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from bulk_data import query
from conftest import run_sql, settings_for
from migrating import new_role
from sqlalchemy import URL

from kotonoha_store import (
    ConfigurationError,
    Database,
    InvalidInputError,
    Message,
    NewChunk,
    NewDocument,
    Scope,
    SearchFilters,
    Store,
    bulk_load,
    index_builds,
)
from kotonoha_store.bulk_load import LoadReport, load_documents

MODEL = "model"
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
VECTORS = np.random.default_rng(3).standard_normal((300, 1536)).astype(np.float32)


def document(number: int, *, chunks: int = 1, vector: bool = True, uri: bool = True, text: str = "梅雨") -> NewDocument:
    pieces = [
        NewChunk(
            f"{text} {number} {piece}",
            {"chunk_index": piece, "label": "頁"},
            token_count=3,
            occurred_from=NOON,
            embedding=VECTORS[(number + piece) % 300] if vector else None,
            embedding_model=MODEL if vector else None,
        )
        for piece in range(chunks)
    ]
    return NewDocument(
        f"title {number}",
        pieces,
        uri=f"file:{number}" if uri else None,
        scope=Scope(guild_id=2**63 - 1),
        metadata={"number": number, "big": 2**60 + 1},
    )


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_load, "BATCH_CHUNKS", 50)


async def counted(database: Database) -> dict[str, Any]:
    tables = ("knowledge_sources", "knowledge_chunks", "embedding_jobs", "chunk_terms")
    async with database.begin() as session:
        return {table: (await query(session, f"SELECT count(*) FROM {table}"))[0] for table in tables}


async def broken(database: Database) -> list[str]:
    return [each.state for each in await index_builds.index_states(database) if each.state != "valid"]


async def test_documents_with_and_without_vectors_are_there_once_however_often_they_are_loaded(store: Store) -> None:
    def documents() -> Iterator[NewDocument]:
        for number in range(120):
            yield document(number, chunks=2, vector=number % 3 > 0, uri=number % 2 == 0)

    seen: list[tuple[int, int | None]] = []
    report = await store.load_documents(documents(), total=120, progress=lambda done, total: seen.append((done, total)))
    assert report == LoadReport(added=120, chunks=240, vectors=160, index="rebuilt")
    assert seen[-1] == (120, 120)
    before = await counted(store.database)
    assert before == {
        "knowledge_sources": 120,
        "knowledge_chunks": 240,
        "embedding_jobs": 80,
        "chunk_terms": 240,
    }
    again = await store.load_documents(documents(), rebuild=True)
    # Without a new vector there is no reason to drop the index.
    assert again == LoadReport(unchanged=120, index="kept")
    assert await counted(store.database) == before
    async with store.begin() as tx:
        statuses = await query(tx.session, "SELECT status::text, count(*) FROM knowledge_sources GROUP BY 1 ORDER BY 1")
        assert statuses == [("completed", 80), ("pending", 40)]
        assert await query(tx.session, "SELECT DISTINCT metadata ->> 'big' FROM knowledge_sources") == [str(2**60 + 1)]
    result = await store.search("梅雨 7 1", mode="words", filters=SearchFilters(guild_id=2**63 - 1), top_k=1)
    assert [hit.content for hit in result.hits] == ["梅雨 7 1"]


async def test_a_document_that_changed_takes_the_place_of_what_was_there(store: Store) -> None:
    await store.load_documents([document(0, vector=False), document(1), document(2)])
    # A vector that is given now is taken, the text's own place in the queue is not needed any more.
    report = await store.load_documents([document(0), document(1, text="台風"), document(2), document(2)])
    assert (report.added, report.changed, report.unchanged, report.chunks, report.vectors) == (0, 2, 2, 2, 2)
    assert await counted(store.database) == {
        "knowledge_sources": 3,
        "knowledge_chunks": 3,
        "embedding_jobs": 0,
        "chunk_terms": 3,
    }
    async with store.begin() as tx:
        texts = await query(tx.session, "SELECT content FROM knowledge_chunks WHERE embedding IS NOT NULL ORDER BY 1")
    assert texts == ["台風 1 0", "梅雨 0 0", "梅雨 2 0"]


async def test_an_empty_store_is_loaded_without_the_index_which_is_there_at_the_end(store: Store) -> None:
    report = await load_documents(store.database, [document(number) for number in range(130)])
    assert (report.added, report.index, report.rebuild_pays) == (130, "rebuilt", False)
    assert await broken(store.database) == []
    # Now somebody may be searching: it is kept unless asked otherwise.
    more = await load_documents(store.database, [document(number) for number in range(200, 300)])
    assert (more.index, more.rebuild_pays) == ("kept", True)
    result = await store.search(VECTORS[7], model=MODEL, everywhere=True, threshold=None, top_k=1, effort="thorough")
    assert [hit.title for hit in result.hits] == ["title 7"]


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from conftest import settings_for
from kotonoha_store import Database, bulk_load
from sqlalchemy import make_url
from test_bulk_load import document
bulk_load.BATCH_CHUNKS = 50

def documents():
    for number in range(150):
        if number == 120:
            os.kill(os.getpid(), signal.SIGKILL)
        yield document(number, uri=number % 2 == 0)

async def main():
    async with await Database.open(settings_for(make_url({url!r}))) as database:
        await bulk_load.load_documents(database, documents(), rebuild=True)

asyncio.run(main())
"""


async def test_after_a_kill_the_next_load_goes_on_and_the_index_comes_back_with_its_options(
    database: Database, migrated_url: URL, request: pytest.FixtureRequest
) -> None:
    await index_builds.reindex(database, m=8, ef_construction=32)
    url = migrated_url.render_as_string(hide_password=False)
    script = KILLED.format(tests=str(request.path.parent), url=url)
    process = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script], timeout=180, check=False)
    assert process.returncode == -signal.SIGKILL
    assert await broken(database) == ["missing"]
    there = await counted(database)
    assert there["knowledge_sources"] == 100
    report = await load_documents(database, [document(number, uri=number % 2 == 0) for number in range(150)])
    assert report == LoadReport(added=50, unchanged=100, chunks=50, vectors=50, index="rebuilt")
    assert await broken(database) == []
    assert (await counted(database))["knowledge_chunks"] == 150
    async with database.begin() as session:
        (definition,) = await query(session, "SELECT pg_get_indexdef('idx_chunks_embedding'::regclass)")
    assert definition.endswith("(m='8', ef_construction='32')")


async def test_an_error_on_the_way_leaves_what_was_written_and_the_index(database: Database) -> None:
    documents = [document(number) for number in range(80)] + [NewDocument("", [NewChunk("text")])]
    with pytest.raises(InvalidInputError, match="title must not be blank"):
        await load_documents(database, documents, rebuild=True)
    assert (await counted(database))["knowledge_sources"] == 50
    assert await broken(database) == []


async def test_documents_that_cannot_be_stored_are_set_aside_with_their_position(database: Database) -> None:
    bad = [
        NewDocument("nul", [NewChunk("a\x00b")]),
        NewDocument("surrogate", [NewChunk("a\ud800b")]),
        NewDocument("NaN", [NewChunk("text", embedding=[float("nan")] * 1536, embedding_model=MODEL)]),
        NewDocument("no chunks", []),
        NewDocument("number", [NewChunk("text", token_count=2**31)]),
        "no document",
    ]
    rejected: dict[int, str] = {}
    report = await load_documents(
        database,
        [document(0), *bad, document(1)],  # type: ignore[list-item]
        on_rejected=lambda position, error: rejected.update({position: str(error)}),
    )
    assert (report.added, report.rejected, report.documents) == (2, 6, 8)
    assert list(rejected) == [1, 2, 3, 4, 5, 6]
    for reason, part in zip(
        rejected.values(), ("NUL", "surrogate", "NaN", "no text", "token_count", "NewDocument"), strict=True
    ):
        assert part in reason


async def test_loads_of_the_same_documents_beside_worker_archiver_and_deletions_lose_and_double_nothing(
    store: Store,
) -> None:
    documents = [document(number, chunks=2, vector=number % 2 == 0) for number in range(150)]
    for number in range(4):
        async with store.begin() as tx:
            messages = [Message.user("何？" * 20), Message.assistant("それ")]
            await tx.sessions.append(f"s{number}", messages, session_type="thread", guild_id=1)
    loads = asyncio.gather(
        load_documents(store.database, documents, rebuild=True), load_documents(store.database, documents[::-1])
    )
    while not loads.done():
        await store.archiver.run_once(idle_for=timedelta(0))
        await store.embedding_worker.run_once()
        async with store.begin() as tx:
            await tx.knowledge.delete_chunks(SearchFilters(guild_id=1))
    one, other = await loads
    assert one.added + other.added == 150
    assert one.unchanged + other.unchanged + one.changed + other.changed == 150
    await store.embedding_worker.run_until_empty()
    async with store.begin() as tx:
        await tx.knowledge.delete_chunks(SearchFilters(guild_id=1))
    assert await counted(store.database) == {
        "knowledge_sources": 150,
        "knowledge_chunks": 300,
        "embedding_jobs": 0,
        "chunk_terms": 300,
    }
    assert await broken(store.database) == []


@pytest.fixture
def role(server_url: URL, migrated_url: URL) -> Iterator[str]:
    with new_role(server_url) as role:
        tables, sequences = (f"GRANT ALL ON ALL {each} IN SCHEMA public TO {role}" for each in ("TABLES", "SEQUENCES"))
        asyncio.run(run_sql(migrated_url, tables, sequences))
        yield role
        asyncio.run(run_sql(migrated_url, f"DROP OWNED BY {role}"))


async def test_a_role_that_does_not_own_the_tables_loads_with_the_index_kept(role: str, migrated_url: URL) -> None:
    url = migrated_url.set(username=role)
    async with Database(url, settings_for(url)) as database:
        report = await load_documents(database, [document(number) for number in range(60)])
        assert (report.added, report.index) == (60, "kept")
        with pytest.raises(ConfigurationError, match="owner"):
            await load_documents(database, [document(100)], rebuild=True)
        await run_sql(migrated_url, "DROP INDEX idx_chunks_embedding")
        assert (await load_documents(database, [document(101)])).index == "missing"
