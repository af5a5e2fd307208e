"""Claiming a batch of chunks that wait and writing their vectors: through the queue, and by hand-written asyncpg."""

import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import numpy as np
from vectors import MODEL, Vectors, pack

from kotonoha_store import Store, queue_statements
from kotonoha_store.embedding_queue import OUTAGE_FAILURES
from kotonoha_store.prepared import Prepared

LEASE: Final = timedelta(minutes=5)
CLAIM_BY_HAND: Final = """\
WITH leased AS (
    UPDATE embedding_jobs SET lease_token = $1, available_at = now() + $2::interval, attempts = attempts + 1
    WHERE chunk_id = ANY (ARRAY(
        SELECT chunk_id FROM embedding_jobs WHERE available_at <= now()
        ORDER BY available_at, chunk_id LIMIT {batch} FOR UPDATE SKIP LOCKED
    ))
    RETURNING chunk_id, attempts, available_at
)
SELECT leased.*, c.source_id, c.content, c.token_count
FROM leased JOIN knowledge_chunks AS c ON c.id = leased.chunk_id"""
END_BY_HAND: Final = (
    "DELETE FROM embedding_jobs WHERE chunk_id = ANY ($1::bigint[]) AND lease_token = $2 RETURNING chunk_id"
)
WRITE_BY_HAND: Final = "UPDATE knowledge_chunks SET embedding = $2, embedding_model = $3 WHERE id = $1"


def vectors_for(vectors: Vectors, ids: Sequence[int]) -> Vectors:
    """The vectors that an embedder would give for these chunks: float32, shape (len(ids), 1536)."""
    return vectors[np.asarray(ids) % len(vectors)]


Batch = Callable[[], Awaitable[bool]]
"""Claims a batch and writes its vectors; returns whether there was one."""


def by_us(store: Store, batch: int, vectors: Vectors) -> Batch:
    """As a worker does it."""

    async def write() -> bool:
        lease = await store.queue.claim(batch)
        if lease.chunks:
            await store.queue.complete(lease, lease.chunk_ids, vectors_for(vectors, lease.chunk_ids), MODEL)
        return bool(lease.chunks)

    return write


def by_hand(connection: Any, batch: int, vectors: Vectors) -> Batch:
    """Two statements, and no more than they need."""
    claim = CLAIM_BY_HAND.format(batch=batch)

    async def write() -> bool:
        token = uuid.uuid4()
        claimed = await connection.fetch(claim, token, LEASE)
        if not claimed:
            return False
        ids = [row["chunk_id"] for row in claimed]
        packed = dict(zip(ids, pack(vectors_for(vectors, ids)), strict=True))
        async with connection.transaction():
            held = await connection.fetch(END_BY_HAND, ids, token)
            rows = [(row["chunk_id"], packed[row["chunk_id"]], MODEL) for row in held]
            await connection.executemany(WRITE_BY_HAND, rows)
        return True

    return write


def by_same_statements(connection: Any, batch: int, vectors: Vectors) -> Batch:
    """What our queue sends, with nothing around it."""
    front, after = queue_statements.claim(batch), queue_statements.claim(batch, after=True)
    update = queue_statements.write_vector()
    last: tuple[Any, int] | None = None

    async def run(statement: Prepared, **values: Any) -> list[Any]:
        rows: list[Any] = await connection.fetch(statement.sql, *statement.arguments(values))
        return rows

    async def write() -> bool:
        nonlocal last
        token = uuid.uuid4()
        values = {"token": token, "duration": LEASE, "asked": "", "failed": OUTAGE_FAILURES}
        claimed = [] if last is None else await run(after, due_at=last[0], chunk_id=last[1], **values)
        if not claimed and not (claimed := await run(front, **values)):
            return False
        last = max((row["due_at"], row["chunk_id"]) for row in claimed)
        ids = [row["chunk_id"] for row in claimed]
        sources = sorted({row["source_id"] for row in claimed})
        packed = dict(zip(ids, pack(vectors_for(vectors, ids)), strict=True))
        async with connection.transaction():
            held = await run(queue_statements.finish(), ids=ids, token=token, sources=sources)
            given = [{"chunk": row["chunk_id"], "vector": packed[row["chunk_id"]], "model": MODEL} for row in held]
            await connection.executemany(update.sql, [update.arguments(one) for one in given])
            await run(queue_statements.recompute_status(), ids=sources)
        return True

    return write
