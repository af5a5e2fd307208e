"""What tests of the worker share: an embedder that does as it is told, and a look at what became of the chunks."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from embedding_server import vector_of
from numpy.typing import NDArray
from sqlalchemy import text

from kotonoha_store import Database, KnowledgeRepository, NewChunk, SourceType

AT_ONCE = (timedelta(0),)


class Scripted:
    """An embedder that does what it is told for each call."""

    model = "scripted"

    def __init__(self, *calls: Callable[[list[str]], Any]) -> None:
        self.calls = list(calls)
        self.texts: list[list[str]] = []

    async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts.append(list(texts))
        return (self.calls.pop(0) if self.calls else right)(list(texts))

    async def embed_query(self, text: str) -> NDArray[np.float32]:
        return right([text])[0]

    async def aclose(self) -> None:
        pass


def right(texts: list[str]) -> NDArray[np.float32]:
    return np.array([vector_of(text) for text in texts])


def raising(error: Exception) -> Callable[[list[str]], Any]:
    def call(texts: list[str]) -> Any:
        raise error

    return call


async def add(database: Database, *contents: str) -> list[int]:
    async with database.begin() as session:
        knowledge = KnowledgeRepository(session)
        source_id = await knowledge.add_source(SourceType.WEB_PAGE, "a source")
        return await knowledge.add_chunks(source_id, [NewChunk(content=content) for content in contents])


async def sql(database: Database, statement: str) -> list[Any]:
    async with database.begin() as session:
        result = await session.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


async def stored(database: Database) -> dict[str, NDArray[np.float64]]:
    """The vectors there are, by content."""
    rows = await sql(database, "SELECT content, embedding::text FROM knowledge_chunks WHERE embedding IS NOT NULL")
    return {content: np.array(vector.strip("[]").split(","), dtype=float) for content, vector in rows}


async def jobs(database: Database) -> list[tuple[Any, ...]]:
    """Leased or not, attempts, code, and the seconds until it may be claimed."""
    return await sql(
        database,
        "SELECT lease_token IS NOT NULL, attempts, error_code, extract(epoch FROM available_at - now())::float"
        " FROM embedding_jobs ORDER BY chunk_id",
    )


async def letters(database: Database) -> list[tuple[Any, ...]]:
    return await sql(database, "SELECT content, error_code FROM knowledge_chunks_dlq ORDER BY id")


async def assert_embedded(database: Database, contents: Sequence[str]) -> None:
    found = await stored(database)
    assert set(found) == set(contents)
    for content, vector in found.items():
        np.testing.assert_allclose(vector, vector_of(content), atol=1e-4)
