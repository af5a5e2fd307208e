"""What tests of changes by filter share: sources, chunks and dead letters, and all that is stored of them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    KnowledgeRepository,
    NewChunk,
    Scope,
    SearchFilters,
    SourceType,
)
from kotonoha_store.words import analyse, scope_terms, terms_literal

MODEL = "model-a"
JUNE = datetime(2024, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
GUILD = SearchFilters(guild_id=1)

TABLES = (
    "knowledge_sources",
    "knowledge_chunks",
    "embedding_jobs",
    "chunk_terms",
    "knowledge_chunks_dlq",
    "term_frequencies",
)


def vectors(n: int) -> Any:
    return np.random.default_rng(n).standard_normal((n, 1536)).astype(np.float32)


def embedded(content: str, **values: Any) -> NewChunk:
    return NewChunk(content, embedding=vectors(1)[0], embedding_model=MODEL, **values)


def plain(*contents: str) -> list[NewChunk]:
    return [NewChunk(content) for content in contents]


async def query(session: AsyncSession, sql: str, **values: Any) -> list[Any]:
    result = await session.execute(text(sql), values)
    return [tuple(row) if len(row) > 1 else row[0] for row in result] if result.returns_rows else []


async def everything(session: AsyncSession) -> dict[str, list[Any]]:
    return {table: await query(session, f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1") for table in TABLES}


async def sizes(session: AsyncSession) -> list[int]:
    return [(await query(session, f"SELECT count(*) FROM {table}"))[0] for table in TABLES]


async def bury(session: AsyncSession, *chunk_ids: int) -> None:
    """As the queue does, whatever state the chunk is in."""
    await query(
        session,
        "INSERT INTO knowledge_chunks_dlq (original_chunk_id, source_id, source_title, source_type, content, location,"
        " token_count, embedding_model, content_hash, guild_id, channel_id, thread_id, user_id, occurred_from,"
        " occurred_to, chunk_created_at)"
        " SELECT c.id, s.id, s.title, s.type, content, location, token_count, embedding_model, content_hash,"
        " c.guild_id, c.channel_id, c.thread_id, c.user_id, occurred_from, occurred_to, c.created_at"
        " FROM knowledge_chunks c JOIN knowledge_sources s ON s.id = source_id WHERE c.id = ANY(:ids)",
        ids=list(chunk_ids),
    )
    await query(session, "DELETE FROM knowledge_chunks WHERE id = ANY(:ids)", ids=list(chunk_ids))


async def add(
    knowledge: KnowledgeRepository,
    *new: NewChunk,
    scope: Scope | None = None,
    kind: SourceType = SourceType.WEB_PAGE,
    **values: Any,
) -> tuple[int, list[int]]:
    source_id = await knowledge.add_source(kind, values.pop("title", "a title"), scope=scope or Scope(1), **values)
    return source_id, await knowledge.add_chunks(source_id, new)


async def ids_of(session: AsyncSession, table: str, column: str = "id") -> list[int]:
    return await query(session, f"SELECT {column} FROM {table} ORDER BY 1")


async def wrong_terms(session: AsyncSession) -> list[int]:
    """Chunks whose terms are not those of their text and of their source's title."""
    rows = await query(
        session,
        "SELECT c.id, s.title, c.content, c.guild_id, c.channel_id, c.thread_id, c.user_id FROM knowledge_chunks c"
        " JOIN knowledge_sources s ON s.id = c.source_id",
    )
    wrong = []
    for chunk_id, title, content, *ids in rows:
        names = dict(zip(("guild_id", "channel_id", "thread_id", "user_id"), ids, strict=True))
        literal = terms_literal(analyse(title, content), scope_terms(**names))
        # As text: vectors that were received in another order differ in their padding.
        right = (
            "SELECT terms::text = CAST(CAST(:terms AS text) AS tsvector)::text FROM chunk_terms WHERE chunk_id = :id"
        )
        if await query(session, right, terms=literal, id=chunk_id) != [True]:
            wrong.append(chunk_id)
    return wrong
