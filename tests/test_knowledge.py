"""Sources and chunks: bulk writes by COPY, documents that change, a status that follows."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import asyncpg
import numpy as np
import pytest
from conftest import acting_as
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    Database,
    DocumentResult,
    InvalidInputError,
    InvalidVectorError,
    KnowledgeRepository,
    NewChunk,
    NotFoundError,
    Scope,
    SourceRecord,
    SourceStatus,
    SourceType,
)
from kotonoha_store.columns import pack_vector

pytestmark = pytest.mark.role("app")

MODEL = "test-model"
URI = "https://example.com"
BIG = 2**63 - 1


@pytest.fixture
def knowledge(session: AsyncSession) -> KnowledgeRepository:
    return KnowledgeRepository(session)


def vector(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(1536).astype(np.float32)


def embedded(content: str, seed: int = 0, model: str = MODEL) -> NewChunk:
    return NewChunk(content, embedding=vector(seed), embedding_model=model)


def plain(*contents: str) -> list[NewChunk]:
    return [NewChunk(content) for content in contents]


async def query(session: AsyncSession, sql: str, **values: Any) -> Sequence[Any]:
    result = await session.execute(text(sql), values)
    return result.all() if result.returns_rows else []


async def chunks(session: AsyncSession) -> Sequence[Any]:
    return await query(session, "SELECT * FROM knowledge_chunks ORDER BY id")


async def jobs(session: AsyncSession) -> list[int]:
    return [row[0] for row in await query(session, "SELECT chunk_id FROM embedding_jobs ORDER BY 1")]


async def counts(session: AsyncSession) -> tuple[int, ...]:
    tables = ("knowledge_sources", "knowledge_chunks", "embedding_jobs", "knowledge_chunks_dlq")
    row = (await query(session, f"SELECT {', '.join(f'(SELECT count(*) FROM {table})' for table in tables)}"))[0]
    return tuple(row)


async def embed_all(session: AsyncSession, model: str = MODEL) -> dict[int, bytes]:
    """As a worker would; returns the vectors by chunk id."""
    packed = {row.id: pack_vector(vector(row.id)) for row in await chunks(session)}
    driver = (await (await session.connection()).get_raw_connection()).driver_connection
    await driver.executemany(
        "UPDATE knowledge_chunks SET embedding = $2, embedding_model = $3 WHERE id = $1",
        [(chunk_id, bytes(data), model) for chunk_id, data in packed.items()],
    )
    async with acting_as(session, "worker"):
        await query(session, "DELETE FROM embedding_jobs")
        await query(session, "UPDATE knowledge_sources SET status = 'completed'")
    return await vectors(session)


async def vectors(session: AsyncSession) -> dict[int, bytes]:
    rows = await query(
        session, "SELECT id, halfvec_send(embedding) FROM knowledge_chunks WHERE embedding IS NOT NULL ORDER BY id"
    )
    return dict(map(tuple, rows))


async def bury(session: AsyncSession, chunk_id: int) -> None:
    async with acting_as(session, "worker"):
        await query(
            session,
            "INSERT INTO knowledge_chunks_dlq (original_chunk_id, source_id, content, location)"
            " SELECT id, source_id, content, location FROM knowledge_chunks WHERE id = :id",
            id=chunk_id,
        )
        await query(session, "DELETE FROM knowledge_chunks WHERE id = :id", id=chunk_id)


async def add(knowledge: KnowledgeRepository, *new: NewChunk) -> tuple[int, list[int]]:
    source_id = await knowledge.add_source(SourceType.WEB_PAGE, "title")
    return source_id, await knowledge.add_chunks(source_id, new)


# Sources


async def test_a_source_comes_back_as_it_went_in(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    scope = Scope(guild_id=BIG, channel_id=-BIG - 1, thread_id=3, user_id=4)
    metadata = {"n": 2**60, "text": "梅雨 \"'\\", "deep": [{"x": None}]}
    source_id = await knowledge.add_source(
        SourceType.IMAGE_CAPTION, "題", uri=URI, scope=scope, metadata=MappingProxyType(metadata), origin=(7, 8)
    )
    source = await knowledge.get_source(source_id)
    assert source == SourceRecord(
        id=source_id,
        type=SourceType.IMAGE_CAPTION,
        title="題",
        uri=URI,
        status=SourceStatus.PENDING,
        error_code=None,
        error_message=None,
        scope=scope,
        metadata=metadata,
        created_at=source.created_at,
        updated_at=source.updated_at,
    )
    rows = await query(
        session, "SELECT origin_session_id, origin_first_index, archived_messages IS NULL FROM knowledge_sources"
    )
    assert rows == [(7, 8, True)]


async def test_raw_messages_are_kept(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    messages = [{"role": "user", "n": BIG}]
    await knowledge.add_source(SourceType.DISCORD_SESSION, "t", origin=(1, 0), archived_messages=messages)
    assert await query(session, "SELECT archived_messages FROM knowledge_sources") == [(messages,)]


async def test_the_same_messages_twice_are_refused(knowledge: KnowledgeRepository) -> None:
    await knowledge.add_source(SourceType.DISCORD_SESSION, "t", origin=(1, 0))
    await knowledge.add_source(SourceType.DISCORD_SESSION, "t", origin=(1, 5))
    with pytest.raises(InvalidInputError, match="archived already"):
        await knowledge.add_source(SourceType.DISCORD_SESSION, "t", origin=(1, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"title": " \n"}, "title"),
        ({"title": "a\x00"}, "title"),
        ({"uri": "\ud800"}, "uri"),
        ({"metadata": {"a": {"b": ["\x00"]}}}, r"metadata\.a\.b\[0\] holds a NUL"),
        ({"metadata": {"\x00": 1}}, "a key of metadata"),
        ({"metadata": {"x": float("nan")}}, r"metadata\.x is nan"),
        ({"metadata": {"x": MappingProxyType({})}}, r"metadata\.x is of type mappingproxy"),
    ],
)
async def test_what_cannot_be_stored_is_refused(
    knowledge: KnowledgeRepository, session: AsyncSession, values: dict[str, Any], message: str
) -> None:
    given = {"title": "t", "uri": URI, **values}
    with pytest.raises(InvalidInputError, match=message):
        await knowledge.add_source(SourceType.WEB_PAGE, **given)
    with pytest.raises(InvalidInputError, match=message):
        await knowledge.put_document(chunks=plain("x"), **given)
    assert await counts(session) == (0, 0, 0, 0)


async def test_sources_come_in_pages_and_filtered(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    ids = [
        await knowledge.add_source(kind, "t", scope=Scope(guild_id=guild))
        for kind, guild in [
            (SourceType.WEB_PAGE, 1),
            (SourceType.WEB_PAGE, 2),
            (SourceType.DOCUMENT_FILE, 1),
            (SourceType.DOCUMENT_FILE, BIG),
        ]
    ]
    await query(session, "UPDATE knowledge_sources SET status = 'failed' WHERE id = :id", id=ids[2])
    assert [s.id for s in await knowledge.list_sources(limit=3)] == ids[:3]
    assert [s.id for s in await knowledge.list_sources(limit=3, after_id=ids[2])] == ids[3:]
    assert [s.id for s in await knowledge.list_sources(guild_id=1)] == [ids[0], ids[2]]
    assert [s.id for s in await knowledge.list_sources(type=SourceType.WEB_PAGE, guild_id=2)] == [ids[1]]
    assert [s.id for s in await knowledge.list_sources(status=SourceStatus.FAILED)] == [ids[2]]
    for size in (1, 2, 4, 5):
        assert [s.id async for s in knowledge.iterate_sources(page_size=size)] == ids
    assert [s.id async for s in knowledge.iterate_sources(page_size=1, guild_id=1)] == [ids[0], ids[2]]
    with pytest.raises(InvalidInputError, match="limit"):
        await knowledge.list_sources(limit=0)


async def test_delete_removes_all_that_belongs_to_the_source(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    source_id, ids = await add(knowledge, *plain("a", "b"))
    await bury(session, ids[0])
    await add(knowledge, *plain("other"))
    assert await counts(session) == (2, 2, 2, 1)
    await knowledge.delete_source(source_id)
    assert await counts(session) == (1, 1, 1, 0)
    with pytest.raises(NotFoundError, match=str(source_id)):
        await knowledge.delete_source(source_id)
    with pytest.raises(NotFoundError, match=str(source_id)):
        await knowledge.get_source(source_id)


# Chunks


async def test_chunks_come_back_as_they_went_in(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    scope = Scope(guild_id=BIG, channel_id=2, thread_id=3, user_id=4)
    source_id = await knowledge.add_source(SourceType.WEB_PAGE, "t", scope=scope)
    since, until = datetime(1999, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)
    ids = await knowledge.add_chunks(
        source_id,
        [
            NewChunk("tab\t newline\n backslash \\N 梅雨", {"n": BIG}, 5, since, until, vector(1), MODEL),
            NewChunk("waits", embedding_model="ignored without a vector"),
        ],
    )
    first, second = await chunks(session)
    assert [first.id, second.id] == ids == sorted(ids)
    assert first.content == "tab\t newline\n backslash \\N 梅雨"
    assert (first.location, first.token_count, first.embedding_model) == ({"n": BIG}, 5, MODEL)
    assert (first.occurred_from, first.occurred_to) == (since, until)
    assert (second.location, second.token_count, second.embedding, second.embedding_model) == ({}, None, None, None)
    assert (second.occurred_from, second.occurred_to) == (None, None)
    for row in (first, second):
        assert (row.source_id, row.retry_count) == (source_id, 0)
        assert Scope(row.guild_id, row.channel_id, row.thread_id, row.user_id) == scope
    assert await vectors(session) == {ids[0]: bytes(pack_vector(vector(1)))}
    assert await jobs(session) == [ids[1]]
    (hashed,) = await query(
        session, "SELECT bool_and(content_hash = sha256(convert_to(content, 'UTF8'))) FROM knowledge_chunks"
    )
    assert hashed == (True,)


async def test_the_status_follows(knowledge: KnowledgeRepository) -> None:
    source_id, _ = await add(knowledge)
    assert (await knowledge.get_source(source_id)).status is SourceStatus.PENDING
    await knowledge.add_chunks(source_id, plain("waits"))
    assert (await knowledge.get_source(source_id)).status is SourceStatus.PENDING
    source_id, _ = await add(knowledge, embedded("a"), embedded("b"))
    assert (await knowledge.get_source(source_id)).status is SourceStatus.COMPLETED
    await knowledge.add_chunks(source_id, plain("waits"))
    assert (await knowledge.get_source(source_id)).status is SourceStatus.PROCESSING


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (NewChunk(" \n\t\u3000"), InvalidInputError, "blank"),
        (NewChunk(""), InvalidInputError, "blank"),
        (NewChunk("a\x00b"), InvalidInputError, "NUL"),
        (NewChunk("\ud800"), InvalidInputError, "surrogate"),
        (NewChunk("x", {"a": "\x00"}), InvalidInputError, r"\.a holds a NUL"),
        (NewChunk("x", embedding=[1.0] * 1536), InvalidInputError, "no embedding_model"),
        (NewChunk("x", embedding=[1.0] * 1536, embedding_model="\x00"), InvalidInputError, "embedding_model"),
        (embedded("x", 0, ""), InvalidInputError, "no embedding_model"),
        (NewChunk("x", embedding=[1.0], embedding_model=MODEL), InvalidVectorError, "1536 dimensions"),
        (NewChunk("x", embedding=[0.0] * 1536, embedding_model=MODEL), InvalidVectorError, "zeros"),
        (NewChunk("x", token_count=2**31), InvalidInputError, "token_count"),
        (NewChunk("x", token_count=-1), InvalidInputError, "token_count"),
        (NewChunk("x", occurred_from=datetime(2024, 1, 1)), InvalidInputError, "time zone"),  # noqa: DTZ001
        (NewChunk("x", occurred_to=datetime(2024, 1, 1)), InvalidInputError, "time zone"),  # noqa: DTZ001
    ],
)
async def test_one_bad_chunk_and_none_is_written(
    session: AsyncSession, bad: NewChunk, error: type[Exception], message: str
) -> None:
    knowledge = KnowledgeRepository(session, insert_batch_size=1)
    source_id, _ = await add(knowledge)
    with pytest.raises(error, match=message):
        await knowledge.add_chunks(source_id, [*plain("good", "too"), bad])
    with pytest.raises(error, match=message):
        await knowledge.put_document("t", [*plain("good", "too"), bad], uri=URI)
    # The transaction goes on: the error came before anything was sent.
    assert await counts(session) == (1, 0, 0, 0)


async def test_an_unknown_source_is_refused(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    with pytest.raises(NotFoundError, match="17"):
        await knowledge.add_chunks(17, plain("x"))
    assert await counts(session) == (0, 0, 0, 0)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was sent by COPY: into which table, how many rows."""
    copies: list[tuple[str, int]] = []
    original = asyncpg.Connection.copy_records_to_table

    async def copy(self: Any, table: str, *, records: Any, **options: Any) -> Any:
        copies.append((table, len(records)))
        return await original(self, table, records=records, **options)

    monkeypatch.setattr(asyncpg.Connection, "copy_records_to_table", copy)
    return copies


async def test_terms_are_copied_in_batches_of_characters_the_titles_included(
    database: Database, copies: list[tuple[str, int]]
) -> None:
    """Each chunk has the words of its title, too: a long one makes many short chunks long."""
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, "long title " * 1000)
        await knowledge.add_chunks(source_id, plain(*(f"chunk {n}" for n in range(50))))
    # 20,000 characters, then 200,000 at a time.
    assert [rows for table, rows in copies if table == "chunk_terms"] == [2, 19, 19, 10]


async def test_two_thousand_chunks_are_two_copies(database: Database, copies: list[tuple[str, int]]) -> None:
    statements: list[str] = []
    event.listen(
        database.engine.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    async with database.begin() as session:
        source_id, ids = await add(KnowledgeRepository(session), *plain(*(f"chunk {n}" for n in range(2000))))
    assert copies[:4] == [("knowledge_chunks", 1000), ("embedding_jobs", 1000)] * 2
    assert {table for table, _ in copies[4:]} == {"chunk_terms"}
    assert sum(rows for _, rows in copies[4:]) == 2000
    assert len(statements) < 10, statements
    async with database.begin() as session:
        rows = await chunks(session)
        assert [row.id for row in rows] == ids == await jobs(session)
        assert [row.content for row in rows] == [f"chunk {n}" for n in range(2000)]
        assert {row.source_id for row in rows} == {source_id}


async def test_an_error_after_the_copy_takes_it_back(database: Database) -> None:
    async def add_and_fail() -> None:
        async with database.begin() as session:
            await add(KnowledgeRepository(session, insert_batch_size=2), *plain("a", "b", "c"))
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError):
        await add_and_fail()
    async with database.begin() as session:
        assert await counts(session) == (0, 0, 0, 0)


# Documents


async def put(knowledge: KnowledgeRepository, *contents: str | NewChunk, **options: Any) -> DocumentResult:
    new = [NewChunk(content) if isinstance(content, str) else content for content in contents]
    return await knowledge.put_document(options.pop("title", "t"), new, **{"uri": URI, **options})


async def test_a_document_put_again_keeps_what_did_not_change(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    first = await put(knowledge, "a", "b", "c", title="old", metadata={"v": 1})
    assert (first.added, first.kept, first.removed) == (3, 0, 0)
    before = await embed_all(session)
    assert len(before) == 3

    same = await put(knowledge, "a", "b", "c", title="new", metadata={"v": 2})
    assert same == DocumentResult(source_id=first.source_id, added=0, kept=3, removed=0)
    assert await vectors(session) == before
    assert await jobs(session) == []
    source = await knowledge.get_source(first.source_id)
    assert (source.title, source.metadata, source.status) == ("new", {"v": 2}, SourceStatus.COMPLETED)

    changed = await put(knowledge, "a", "B", "c", "d")
    assert changed == DocumentResult(source_id=first.source_id, added=2, kept=2, removed=1)
    rows = await chunks(session)
    assert sorted(row.content for row in rows) == ["B", "a", "c", "d"]
    kept = {row.id for row in rows if row.content in "ac"}
    assert await vectors(session) == {chunk_id: before[chunk_id] for chunk_id in kept}
    assert await jobs(session) == sorted({row.id for row in rows} - kept)
    assert (await knowledge.get_source(first.source_id)).status is SourceStatus.PROCESSING


async def test_chunks_that_wait_are_kept_in_the_queue(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    await put(knowledge, "a", "b")
    queued = await jobs(session)
    again = await put(knowledge, "a", "b", model=MODEL)
    assert (again.added, again.kept) == (0, 2)
    assert await jobs(session) == queued


async def test_a_text_that_stands_twice_is_two_chunks(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    await put(knowledge, "same", "same", "other")
    assert len(await chunks(session)) == 3
    before = await embed_all(session)
    again = await put(knowledge, "same", "same", "other")
    assert (again.added, again.kept, again.removed) == (0, 3, 0)
    assert await vectors(session) == before
    once = await put(knowledge, "same", "other")
    assert (once.added, once.kept, once.removed) == (0, 2, 1)
    thrice = await put(knowledge, "same", "same", "same", "other")
    assert (thrice.added, thrice.kept, thrice.removed) == (2, 2, 0)


async def test_a_chunk_that_moved_keeps_its_vector(session: AsyncSession) -> None:
    knowledge = KnowledgeRepository(session, update_batch_size=2)
    then, now = datetime(2020, 1, 1, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC)
    old = [NewChunk(f"text {n}", {"start": n}, occurred_from=then, occurred_to=then) for n in range(5)]
    await put(knowledge, *old)
    before = await embed_all(session)
    written = await query(session, "SELECT id, xmin, ctid FROM knowledge_chunks ORDER BY id")
    moved = [replace(chunk, location={"start": 10 + n}) for n, chunk in enumerate(old[:3])]
    result = await put(knowledge, *moved, replace(old[3], occurred_from=now, occurred_to=now), old[4])
    assert (result.added, result.kept, result.removed) == (0, 5, 0)
    rows = await chunks(session)
    assert [row.location["start"] for row in rows] == [10, 11, 12, 3, 4]
    assert [row.occurred_to for row in rows] == [then, then, then, now, then]
    assert [row.occurred_from for row in rows] == [then, then, then, now, then]
    assert await vectors(session) == before
    assert await jobs(session) == []
    # The one that did not move was not written at all.
    assert (await query(session, "SELECT id, xmin, ctid FROM knowledge_chunks ORDER BY id"))[-1] == written[-1]


@pytest.mark.parametrize("name", ["guild_id", "channel_id", "thread_id", "user_id"])
async def test_the_same_uri_elsewhere_is_another_document(
    knowledge: KnowledgeRepository, session: AsyncSession, name: str
) -> None:
    ids = [
        (await put(knowledge, "a", **options)).source_id
        for options in ({}, {"scope": Scope(**{name: 1})}, {"scope": Scope(**{name: 2})})
    ]
    ids.append((await put(knowledge, "a", type=SourceType.WEB_PAGE)).source_id)
    ids.append((await put(knowledge, "a", uri=URI + "/")).source_id)
    assert len(set(ids)) == 5
    assert (await put(knowledge, "b", scope=Scope(**{name: 1}))).source_id == ids[1]
    assert sorted(row.content for row in await chunks(session)) == ["a"] * 4 + ["b"]


async def test_without_a_uri_it_is_always_new(knowledge: KnowledgeRepository) -> None:
    first = await put(knowledge, "a", uri=None)
    second = await put(knowledge, "a", uri=None)
    assert first.source_id != second.source_id


async def test_a_document_without_chunks_is_refused(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    with pytest.raises(InvalidInputError, match="no text"):
        await put(knowledge)
    assert await counts(session) == (0, 0, 0, 0)


async def test_dead_letters_of_the_document_are_tried_again(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    first = await put(knowledge, "good", "bad")
    await embed_all(session)
    await bury(session, (await chunks(session))[1].id)
    await query(session, "UPDATE knowledge_sources SET status = 'partial', error_code = 'INVALID_INPUT'")
    other_source, ids = await add(knowledge, *plain("other"))
    await bury(session, ids[0])
    again = await put(knowledge, "good", "bad")
    assert again == DocumentResult(source_id=first.source_id, added=1, kept=1, removed=0)
    source = await knowledge.get_source(first.source_id)
    # Searchable stays searchable.
    assert (source.status, source.error_code) == (SourceStatus.PARTIAL, None)
    assert await query(session, "SELECT source_id FROM knowledge_chunks_dlq") == [(other_source,)]
    assert await jobs(session) == [(await chunks(session))[-1].id]


async def test_vectors_of_another_model_are_made_anew(knowledge: KnowledgeRepository, session: AsyncSession) -> None:
    await put(knowledge, "a", "b")
    before = await embed_all(session, "old-model")
    same = await put(knowledge, "a", "b", model="old-model")
    assert (same.added, same.kept, same.removed) == (0, 2, 0)
    unasked = await put(knowledge, "a", "b")
    assert (unasked.added, unasked.kept, unasked.removed) == (0, 2, 0)
    assert await vectors(session) == before
    other = await put(knowledge, "a", "b", model="new-model")
    assert (other.added, other.kept, other.removed) == (2, 0, 2)
    assert await vectors(session) == {}
    assert len(await jobs(session)) == 2


async def test_a_document_with_vectors_is_completed_at_once(
    knowledge: KnowledgeRepository, session: AsyncSession
) -> None:
    result = await put(knowledge, embedded("a", 1), embedded("b", 2))
    assert (await knowledge.get_source(result.source_id)).status is SourceStatus.COMPLETED
    assert await jobs(session) == []


async def test_a_document_of_very_many_chunks_can_change(knowledge: KnowledgeRepository) -> None:
    # A statement takes 32,767 single parameters.
    contents = [f"chunk {n}" for n in range(33_000)]
    await put(knowledge, *contents)
    again = await put(knowledge, *contents[1:])
    assert (again.added, again.kept, again.removed) == (0, 32_999, 1)
    replaced = await put(knowledge, "all new")
    assert (replaced.added, replaced.kept, replaced.removed) == (1, 0, 32_999)


async def test_two_that_put_the_same_document_at_once_end_with_one(database: Database) -> None:
    async def put_at_once(*contents: str) -> DocumentResult:
        async with database.begin() as session:
            return await put(KnowledgeRepository(session), *contents)

    for round_ in range(5):
        versions = [[f"{round_} {who} {n}" for n in range(3)] + ["shared"] for who in range(4)]
        results = await asyncio.gather(*(put_at_once(*contents) for contents in versions))
        assert len({result.source_id for result in results}) == 1
        async with database.begin() as session:
            assert sorted(row.content for row in await chunks(session)) in [sorted(version) for version in versions]
            found = await counts(session)
        assert (found[0], found[1], found[2]) == (1, 4, 4)


async def test_a_cancelled_put_is_done_or_undone(database: Database) -> None:
    for number in range(12):
        contents = [f"{number} {part}" for part in range(50)]

        async def put_it(contents: list[str] = contents) -> None:
            async with database.begin() as session:
                await put(KnowledgeRepository(session, insert_batch_size=5), *contents)

        task = asyncio.create_task(put_it())
        await asyncio.sleep(number * 0.003)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with database.begin() as session:
            # One moment of both tables: a commit that was cancelled may still be under way.
            await query(session, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            rows = await chunks(session)
            assert len({row.content.split()[0] for row in rows}) <= 1
            assert len(rows) in (0, 50)
            assert await jobs(session) == [row.id for row in rows]
