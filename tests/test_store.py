"""The whole journey, and what the store adds to its parts."""

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import asyncpg
import numpy as np
import pytest
from sqlalchemy import URL, select
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from kotonoha_store import (
    ConfigurationError,
    HashingEmbedder,
    InvalidInputError,
    KnowledgeChunk,
    KnowledgeRepository,
    Message,
    NewChunk,
    SearchFilters,
    SearchRepository,
    Settings,
    SourceType,
    Store,
    StoreError,
    StoreUnavailableError,
    UnitOfWork,
)
from kotonoha_store.database import connect_arguments
from kotonoha_store.driver_errors import translate_error

pytestmark = pytest.mark.role("app", "worker")


async def test_a_conversation_goes_in_and_is_found_again(store: Store) -> None:
    async with store.begin() as tx:
        await tx.sessions.append(
            "thread:42",
            [
                Message.user("梅雨がないのはどこ？", message_id=2**62 + 1),
                Message.assistant("北海道と小笠原諸島には梅雨がありません。"),
                Message.user("I adopted a puppy named Biscuit last week."),
            ],
            session_type="thread",
            guild_id=1,
            channel_id=2,
            thread_id=42,
        )
    report = await store.archiver.run_once(idle_for=timedelta(0))
    assert (report.archived, report.messages) == (1, 3)
    embedded = await store.embedding_worker.run_until_empty()
    assert embedded.embedded == report.chunks

    result = await store.search("梅雨 北海道", threshold=None, filters=SearchFilters(guild_id=1))

    assert "北海道" in result.hits[0].content
    assert result.hits[0].title == "梅雨がないのはどこ？"
    assert result.hits[0].url == f"https://discord.com/channels/1/42/{2**62 + 1}"
    assert result.complete
    other = await store.search("梅雨 北海道", threshold=None, filters=SearchFilters(guild_id=2))
    assert other.hits == ()


async def test_a_search_without_a_scope_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="everywhere=True"):
        await store.search("anything")


async def test_without_an_embedder_the_error_says_how_to_get_one(settings: Settings) -> None:
    async with Store.open(settings) as store:
        with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
            await store.search("anything", everywhere=True)


async def test_the_embedder_that_was_given_stays_open(settings: Settings) -> None:
    embedder = HashingEmbedder()
    async with Store.open(settings, embedder=embedder):
        pass
    assert (await embedder.embed_query("still here")).shape == (1536,)


async def test_adding_a_document_again_keeps_what_did_not_change(store: Store) -> None:
    first = await store.add_document("梅雨", "梅雨は雨の多い季節です。", uri="https://example.com", guild_id=1)
    await store.embedding_worker.run_until_empty()
    again = await store.add_document("梅雨", "梅雨は雨の多い季節です。", uri="https://example.com", guild_id=1)
    assert (again.source_id, again.added, again.kept, again.removed) == (first.source_id, 0, 1, 0)
    assert (await store.queue.depth()).ready == 0
    changed = await store.add_document("梅雨", "梅雨は六月に始まる。", uri="https://example.com", guild_id=1)
    assert (changed.source_id, changed.added, changed.kept, changed.removed) == (first.source_id, 1, 0, 1)
    elsewhere = await store.add_document("梅雨", "梅雨は雨の多い季節です。", uri="https://example.com", guild_id=2)
    assert elsewhere.source_id != first.source_id


async def test_repositories_work_on_a_session_of_the_callers_own(settings: Settings, migrated_url: URL) -> None:
    """An engine that knows nothing of pgvector's binary format until a repository teaches it."""
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**connect_arguments(migrated_url, settings))
    )
    vector = np.linspace(-1, 1, 1536, dtype=np.float32)
    async with AsyncSession(engine) as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, "a page")
        chunk = NewChunk("made elsewhere", embedding=vector, embedding_model="m")
        await knowledge.add_chunks(source_id, [NewChunk("waits"), chunk])
        await session.commit()
    async with AsyncSession(engine) as session:
        result = await SearchRepository(session).nearest(vector, model="m", everywhere=True)
        assert [hit.content for hit in result.hits] == ["made elsewhere"]
    await engine.dispose()
    async with AsyncSession(engine) as session:
        [stored] = await session.scalars(select(KnowledgeChunk).where(KnowledgeChunk.embedding.is_not(None)))
        assert stored.embedding is not None
        assert stored.embedding.dtype == np.float16
        np.testing.assert_array_equal(stored.embedding, vector.astype(np.float16))
    await engine.dispose()


async def test_a_unit_of_work_ends_with_its_block(store: Store) -> None:
    async with store.begin() as tx:
        pass
    with pytest.raises(InvalidRequestError, match="permanently closed"):
        await tx.sessions.append("late", Message.user("I would be lost"))
    async with store.begin() as tx:
        assert await tx.sessions.find("late") is None


async def test_a_closed_store_says_so(settings: Settings) -> None:
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        pass
    with pytest.raises(StoreError, match="was closed"):
        await store.search("anything", everywhere=True)
    with pytest.raises(StoreError, match="was closed"):
        await store.queue.depth()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda store, tx: tx.sessions.append("k", "hello"), "Message.user"),
        (lambda store, tx: tx.sessions.append("k", [Message.user("a"), "b"]), "Message.user"),
        (lambda store, tx: tx.sessions.append("k", None), "Message.user"),
        (lambda store, tx: tx.sessions.append(5, Message.user("a")), "session_key must be text"),
        (lambda store, tx: tx.sessions.load("k", last="2"), "last must be a 64-bit integer"),
        (lambda store, tx: tx.sessions.get("k"), "session_id must be a 64-bit integer"),
        (lambda store, tx: tx.knowledge.get_source("a"), "source_id must be a 64-bit integer"),
        (lambda store, tx: tx.knowledge.delete_source(2**63), "source_id must be a 64-bit integer"),
        (lambda store, tx: store.archiver.archive("k"), "session_id must be a 64-bit integer"),
        (lambda store, tx: store.archiver.run_once(idle_for=3600), "idle_for must be a timedelta"),
        (lambda store, tx: store.add_document(5, "text"), "title must be text"),
        (lambda store, tx: store.add_document("title", None), "text must be text"),
        (lambda store, tx: store.add_document("title", "text", uri=5), "uri must be text"),
        (lambda store, tx: store.add_document("title", "text", source_type="x"), "there is no source type 'x'"),
        (lambda store, tx: store.add_document("title", "text", metadata="a"), "metadata must be a mapping"),
        (lambda store, tx: store.add_document("title", "text", occurred_at="2024"), "occurred_at must be a datetime"),
        (lambda store, tx: store.search("x", filters={"guild_id": 1}), "filters must be SearchFilters"),
        (lambda store, tx: store.search("x", filters={}), "filters must be SearchFilters"),
        (lambda store, tx: store.search("x", mode="both", everywhere=True), "mode must be"),
        (lambda store, tx: store.search("x", match="all", everywhere=True), "no meaning in a search by meaning"),
        (lambda store, tx: store.search([1.0], mode="words", everywhere=True), "needs the query as text"),
        (lambda store, tx: store.search("x", mode="hybrid", fusion={"k": 1}, everywhere=True), "fusion must be"),
        (lambda store, tx: store.search("x", mode="words", match="some", everywhere=True), "match must be"),
        (lambda store, tx: store.search("x", everywhere=True, after="yesterday"), "write_position"),
        (lambda store, tx: store.recall("k", "x", 100, mode="words", after=5), "write_position"),
        (lambda store, tx: tx.search.matching("x", top_k="5", everywhere=True), "top_k must be"),
    ],
)
async def test_obvious_mistakes_are_named(store: Store, call: Callable[[Store, UnitOfWork], Any], said: str) -> None:
    async with store.begin() as tx:
        with pytest.raises(InvalidInputError, match=said):
            await call(store, tx)


@pytest.mark.parametrize("embedder", ["hashing", HashingEmbedder])
async def test_an_embedder_is_an_embedder(settings: Settings, embedder: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"HashingEmbedder\(\)"):
        async with Store.open(settings, embedder=embedder):
            pass


def test_a_host_that_cannot_be_resolved_may_be_a_password() -> None:
    translated = translate_error(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert isinstance(translated, StoreUnavailableError)
    assert "percent-encode" in str(translated)
