"""What the tests of search share: vectors, stored chunks, and what a search sent and found."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from conftest import settings_for
from numpy.typing import NDArray
from sqlalchemy import URL, event
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import (
    HashingEmbedder,
    KnowledgeRepository,
    NewChunk,
    Scope,
    SearchFilters,
    SearchResult,
    SourceType,
    Store,
)

MODEL = "model-a"
OTHER = "model-b"
JUNE = datetime(2024, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
GUILD = SearchFilters(guild_id=1)

Vectors = NDArray[np.float32]


def vectors(n: int, seed: int = 0) -> Vectors:
    """Around five centres, so that similarities differ."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((5, 1536))
    return (centres[rng.integers(5, size=n)] + rng.uniform(0.3, 2, (n, 1)) * rng.standard_normal((n, 1536))).astype(
        np.float32
    )


def similarities(stored: Vectors, query: Vectors) -> NDArray[np.float64]:
    """1 - cosine distance of what half precision keeps."""
    a, b = stored.astype(np.float16).astype(np.float64), query.astype(np.float16).astype(np.float64)
    return a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)


async def add(
    session: AsyncSession,
    embeddings: Sequence[Any],
    *,
    texts: Sequence[str] | None = None,
    title: str = "a source",
    model: str = MODEL,
    source_type: SourceType = SourceType.WEB_PAGE,
    metadata: dict[str, Any] | None = None,
    session_key: str | None = None,
    occurred: tuple[datetime | None, datetime | None] = (None, None),
    locations: Sequence[dict[str, Any]] | None = None,
    **scope: int,
) -> list[int]:
    """Add a source with a chunk per vector (None: not embedded yet); return the chunks' ids."""
    knowledge = KnowledgeRepository(session)
    source_id = await knowledge.add_source(
        source_type, title, scope=Scope(**scope), metadata=metadata, session_key=session_key
    )
    chunks = [
        NewChunk(
            content=f"chunk {index}" if texts is None else texts[index],
            location={} if locations is None else locations[index],
            embedding=embedding,
            embedding_model=None if embedding is None else model,
            occurred_from=occurred[0],
            occurred_to=occurred[1],
        )
        for index, embedding in enumerate(embeddings)
    ]
    return await knowledge.add_chunks(source_id, chunks)


async def write(session: AsyncSession, *texts: str, **options: Any) -> list[int]:
    """Add a source with these texts, without vectors, in guild 1 unless said otherwise."""
    return await add(session, [None] * len(texts), texts=texts, **{"guild_id": 1, "title": "title", **options})


def ids(result: SearchResult) -> list[int]:
    return [hit.chunk_id for hit in result.hits]


def summary(result: SearchResult) -> tuple[list[int], str, bool]:
    return ids(result), result.plan, result.complete


@dataclass
class Sent:
    """The statements that reached the server."""

    statements: list[str] = field(default_factory=list)

    async def taken(self) -> int:
        """How many there are; forget them."""
        # The driver reports a statement in the loop's next turn.
        await asyncio.sleep(0)
        number = len(self.statements)
        self.statements.clear()
        return number


@contextmanager
def sent_by(session: AsyncSession) -> Iterator[Sent]:
    """What a session sends meanwhile."""
    sent = Sent()

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        sent.statements.append(statement)

    engine = session.get_bind().engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


@asynccontextmanager
async def watched_store(url: URL, **settings: Any) -> AsyncIterator[tuple[Store, Sent]]:
    """A store with a single connection, and what the driver sends on it."""
    sent = Sent()
    values = {"db_pool_min_size": 1, "db_pool_max_size": 1, **settings}
    async with Store.open(settings_for(url, **values), embedder=HashingEmbedder()) as store:
        async with store.database.driver() as connection:
            connection.add_query_logger(lambda record: sent.statements.append(record.query))
        yield store, sent
