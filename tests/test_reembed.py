"""Another model takes the place of one, while searches with both go on."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from command_line import kotonoha
from numpy.typing import NDArray
from sqlalchemy import URL
from working import AT_ONCE, Scripted, add, jobs, letters, raising, right, sql

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    EmbeddingReport,
    EmbeddingWorker,
    HashingEmbedder,
    ModelMismatchError,
    Store,
    UnembeddableTextError,
    embedding_queue,
)
from kotonoha_store.records import Requeued
from kotonoha_store.settings import Settings

TEXTS = ["alpha", "bravo", "charlie", "delta", "echo"]


class _DiedError(Exception):
    pass


class New(Scripted):
    """Vectors that differ from the old model's."""

    model = "new"

    def __init__(self, *calls: Callable[[list[str]], Any]) -> None:
        super().__init__(*calls, *[_reversed] * 100)

    async def embed_query(self, text: str) -> NDArray[np.float32]:
        return _reversed([text])[0]


def _reversed(texts: list[str]) -> NDArray[np.float32]:
    return np.ascontiguousarray(right(texts)[:, ::-1])


@pytest.fixture
async def chunks(database: Database, queue: EmbeddingQueue) -> list[int]:
    chunks = await add(database, *TEXTS)
    await EmbeddingWorker(queue, Scripted()).run_until_empty()
    return chunks


async def found(database: Database, settings: Settings, embedder: Scripted) -> set[str]:
    result = await Store(database, settings, embedder).search("alpha", top_k=10, threshold=None, everywhere=True)
    return {hit.content for hit in result.hits}


@pytest.mark.role("app", "worker")
async def test_the_old_model_finds_each_chunk_until_the_new_one_does(
    database: Database,
    queue: EmbeddingQueue,
    settings: Settings,
    chunks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedding_queue, "_REQUEUE_BATCH", 2)

    def die(done: int, _total: int | None) -> None:
        if done:
            raise _DiedError

    assert await queue.requeue_embedded("new", dry_run=True) == Requeued(queued=5)
    with pytest.raises(_DiedError):
        await queue.requeue_embedded("new", progress=die)
    assert len(await jobs(database)) == 2
    assert await queue.requeue_embedded("new", dry_run=True) == Requeued(queued=3, waiting=2)
    assert await queue.requeue_embedded("new") == Requeued(queued=3, waiting=2)
    assert await found(database, settings, Scripted()) == set(TEXTS)
    with pytest.raises(ModelMismatchError):
        await found(database, settings, New())

    worker = EmbeddingWorker(queue, New(), batch_size=3)
    assert await worker.run_once() == EmbeddingReport(claimed=3, embedded=3)
    assert await found(database, settings, New()) == set(TEXTS[:3])
    assert await found(database, settings, Scripted()) == set(TEXTS[3:])
    assert await queue.requeue_embedded("new") == Requeued(waiting=2)

    assert await worker.run_until_empty() == EmbeddingReport(claimed=2, embedded=2)
    assert await found(database, settings, New()) == set(TEXTS)
    assert await queue.requeue_embedded("new") == Requeued()
    assert await sql(database, "SELECT status::text FROM knowledge_sources") == [("completed",)]


async def test_everything_is_made_anew_and_not_copied_from_itself(
    database: Database, queue: EmbeddingQueue, chunks: list[int]
) -> None:
    embedder = Scripted()
    assert await queue.requeue_embedded(embedder.model) == Requeued()
    assert await queue.requeue_embedded(embedder.model, everything=True) == Requeued(queued=5)
    report = await EmbeddingWorker(queue, embedder).run_until_empty()
    assert report == EmbeddingReport(claimed=5, embedded=5)
    assert [sorted(texts) for texts in embedder.texts] == [TEXTS]


@pytest.mark.parametrize("attempts", ["refused", "used up"])
async def test_a_text_that_the_new_model_refuses_keeps_its_old_vector(
    database: Database, queue: EmbeddingQueue, settings: Settings, chunks: list[int], attempts: str
) -> None:
    await queue.requeue_embedded("new")
    if attempts == "used up":
        await sql(database, "UPDATE embedding_jobs SET attempts = 3")
    error = raising(UnembeddableTextError("no"))
    worker = EmbeddingWorker(queue, New(*[error] * 20), backoff=AT_ONCE)
    assert (await worker.run_until_empty()).buried == 5
    assert await letters(database) == []
    assert await jobs(database) == []
    assert await found(database, settings, Scripted()) == set(TEXTS)
    assert await queue.requeue_embedded("new") == Requeued(queued=5)


async def test_the_command_queues_for_the_model_that_is_set(
    database: Database, chunks: list[int], migrated_url: URL
) -> None:
    dry = await asyncio.to_thread(kotonoha, "reembed", "--dry-run", url=migrated_url)
    assert dry.code == 0
    assert "would be queued       5" in dry.stdout
    model = HashingEmbedder().model
    expected = {"model": model, "queued": 5, "waiting": 0, "is_dry_run": False}
    assert (await asyncio.to_thread(kotonoha, "reembed", "--json", url=migrated_url)).json == expected
    assert (await asyncio.to_thread(kotonoha, "embed", "--json", url=migrated_url)).json["embedded"] == 5
    assert await sql(database, "SELECT DISTINCT embedding_model FROM knowledge_chunks") == [(model,)]
