"""The words of chunks, kept beside them: written with the chunk, in the same transaction."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from sqlalchemy import ARRAY, BigInteger, bindparam, delete, func, select

from kotonoha_store.columns import AnySelect
from kotonoha_store.database import Executor, driver_connection, ensure_codecs
from kotonoha_store.models import ChunkTerms, KnowledgeChunk, KnowledgeSource
from kotonoha_store.records import Scope
from kotonoha_store.words import analyse, pack_terms, scope_terms

FILL_BATCH: Final = 1000

# More than this takes a visible part of a second: off the event loop.
_CHARACTERS_IN_LOOP: Final = 20_000


class TextOfChunk(NamedTuple):
    """What the terms of a chunk are made of."""

    chunk_id: int
    title: str
    content: str
    scope: Scope


async def write_terms(unit: Executor, chunks: Sequence[TextOfChunk]) -> None:
    """Write the terms of chunks that have none, by COPY. The transaction must have begun."""
    if not chunks:
        return
    await ensure_codecs(unit)
    if sum(len(chunk.content) for chunk in chunks) > _CHARACTERS_IN_LOOP:
        records = await asyncio.to_thread(_records, chunks)
    else:
        records = _records(chunks)
    driver = await driver_connection(unit)
    await driver.copy_records_to_table("chunk_terms", columns=["chunk_id", "terms", "folded"], records=records)


async def refresh_terms(unit: Executor) -> None:
    """Merge new terms into their index, and count anew how many chunks hold each where that may have changed.

    Else every search would read what was not merged, one by one.
    """
    await unit.execute(select(func.kotonoha_refresh_terms()))


async def rewrite_terms(unit: Executor, chunks: Sequence[TextOfChunk]) -> None:
    """Replace the terms of chunks, since the title changed."""
    ids = [chunk.chunk_id for chunk in chunks]
    await unit.execute(_delete(), {"ids": ids})
    await write_terms(unit, chunks)


async def fill_terms(unit: Executor, *, after_id: int = 0, ids: Sequence[int] | None = None) -> int | None:
    """Write the terms of up to :data:`FILL_BATCH` chunks that have none.

    Args:
        ids: only these chunks, however many.

    Returns:
        The last chunk's id, after which the next call goes on; None when there were none.
    """
    parameters: Mapping[str, Any] = {"after_id": after_id} if ids is None else {"ids": list(ids)}
    rows = (await unit.execute(_without_terms(only=ids is not None), parameters)).all()
    await write_terms(unit, [TextOfChunk(row.id, row.title, row.content, Scope(*row[3:])) for row in rows])
    return rows[-1].id if rows else None


def _records(chunks: Sequence[TextOfChunk]) -> list[tuple[int, bytes, str | None]]:
    records = []
    for chunk in chunks:
        words = analyse(chunk.title, chunk.content)
        records.append((chunk.chunk_id, pack_terms(words, scope_terms(**asdict(chunk.scope))), words.folded))
    return records


def _delete() -> Any:
    return (
        delete(ChunkTerms)
        .where(ChunkTerms.chunk_id == func.any(bindparam("ids", type_=ARRAY(BigInteger))))
        .execution_options(synchronize_session=False)
    )


def _without_terms(*, only: bool) -> AnySelect:
    """Locked, so that a chunk that is being deleted meanwhile is passed over and not violated."""
    chunk, source = KnowledgeChunk, KnowledgeSource
    statement = (
        select(chunk.id, source.title, chunk.content, chunk.guild_id, chunk.channel_id, chunk.thread_id, chunk.user_id)
        .join(source, source.id == chunk.source_id)
        .where(~select(ChunkTerms.chunk_id).where(ChunkTerms.chunk_id == chunk.id).exists())
        .order_by(chunk.id)
        .with_for_update(key_share=True, of=chunk, skip_locked=True)
    )
    if only:
        return statement.where(chunk.id == func.any(bindparam("ids", type_=ARRAY(BigInteger))))
    return statement.where(chunk.id > bindparam("after_id", type_=BigInteger())).limit(FILL_BATCH)
