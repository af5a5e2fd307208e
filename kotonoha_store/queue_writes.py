"""The steps of one transaction of the queue, on the driver's connection; see :mod:`kotonoha_store.embedding_queue`."""

from collections.abc import Sequence
from typing import Any

from kotonoha_store import queue_statements
from kotonoha_store.errors import LeaseLostError
from kotonoha_store.prepared import Prepared
from kotonoha_store.records import Lease


def sources_of(lease: Lease, chunk_ids: Sequence[int]) -> list[int]:
    wanted = set(chunk_ids)
    return sorted({chunk.source_id for chunk in lease.chunks if chunk.chunk_id in wanted})


async def lock_sources(driver: Any, source_ids: Sequence[int]) -> None:
    """See :func:`kotonoha_store.source_status.lock_sources`."""
    await run(driver, queue_statements.lock_sources(), ids=source_ids)


async def recompute_status(driver: Any, source_ids: Sequence[int]) -> None:
    """See :func:`kotonoha_store.source_status.recompute_status`."""
    await run(driver, queue_statements.recompute_status(), ids=source_ids)


async def end_jobs(driver: Any, lease: Lease, chunk_ids: Sequence[int], sources: Sequence[int]) -> set[int]:
    statement = queue_statements.finish()
    return await ids_of(driver, statement, ids=list(chunk_ids), token=lease.token, sources=sources)


async def run(driver: Any, statement: Prepared, **values: Any) -> list[Any]:
    rows: list[Any] = await driver.fetch(statement.sql, *statement.arguments(values))
    return rows


async def ids_of(driver: Any, statement: Prepared, **values: Any) -> set[int]:
    return {row[0] for row in await run(driver, statement, **values)}


async def lost_of(driver: Any, lease: Lease, missing: set[int]) -> list[int]:
    """Those of the chunks not written that somebody else took, embedded or buried.

    The rest was deleted, or is just being deleted.
    """
    if not missing:
        return []
    # In this order: what is deleted between the two is gone from the second as well.
    ours = await ids_of(driver, queue_statements.still_ours(), ids=sorted(missing), token=lease.token)
    return sorted(await ids_of(driver, queue_statements.still_there(), ids=sorted(missing)) - ours)


def raise_if_lost(lost: Sequence[int]) -> None:
    if lost:
        raise LeaseLostError(
            f"{len(lost)} of these chunks belong to another worker now: the lease had ended; "
            "nothing was written for them. Raise KB_EMBEDDING_LEASE_SECONDS if calls take that long",
            lost,
        )
