"""The words of chunks, kept beside them: written with the chunk, in the same transaction."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Final, NamedTuple, TypeAlias

from sqlalchemy import ARRAY, BigInteger, Boolean, ColumnElement, bindparam, delete, func, select

from kotonoha_store.columns import AnySelect
from kotonoha_store.database import Executor, driver_connection, ensure_codecs
from kotonoha_store.models import ChunkTerms, KnowledgeChunk, KnowledgeSource
from kotonoha_store.records import Scope
from kotonoha_store.words import analyse, pack_terms, scope_terms

FILL_BATCH: Final = 1000

FIRST_ID: Final = -(2**63)
"""Before every chunk: also those whose id no sequence gave."""

# What takes a few milliseconds; more is done off the event loop.
_CHARACTERS_IN_LOOP: Final = 20_000
_CHARACTERS_A_BATCH: Final = 200_000

_Record: TypeAlias = tuple[int, bytes, str | None]

_IDS: Final = bindparam("ids", type_=ARRAY(BigInteger))


class TextOfChunk(NamedTuple):
    """What the terms of a chunk are made of."""

    chunk_id: int
    title: str
    content: str
    scope: Scope


async def write_terms(unit: Executor, chunks: Sequence[TextOfChunk]) -> None:
    """Write the terms of chunks that have none, by COPY. The transaction must have begun."""
    await ensure_codecs(unit)
    driver = await driver_connection(unit)
    async with aclosing(_analysed(chunks)) as batches:
        async for records in batches:
            await driver.copy_records_to_table("chunk_terms", columns=["chunk_id", "terms", "folded"], records=records)


async def refresh_terms(unit: Executor, *, force: bool = False) -> None:
    """Merge new terms into their index, and count anew how many chunks hold each where that may have changed.

    Else every search would read what was not merged, one by one.

    Args:
        force: count in any case: growth is seen by new ids and by the table's size, but not deletions, nor terms
            filled in for chunks that were there.
    """
    await unit.execute(_refresh(), {"force": force})


async def rewrite_terms(unit: Executor, chunks: Sequence[TextOfChunk]) -> None:
    """Replace the terms of chunks, since the title changed."""
    ids = [chunk.chunk_id for chunk in chunks]
    await unit.execute(_delete(), {"ids": ids})
    await write_terms(unit, chunks)


async def fill_terms(unit: Executor, *, after_id: int = FIRST_ID, ids: Sequence[int] | None = None) -> int | None:
    """Write the terms of up to :data:`FILL_BATCH` chunks that have none.

    Their sources are locked first, as by everybody who writes chunks. So nobody else writes the same terms, and no
    title changes meanwhile.

    Args:
        ids: only these chunks, however many.

    Returns:
        The last chunk's id, after which the next call goes on; None when there were none.
    """
    parameters: Mapping[str, Any] = {"after_id": after_id} if ids is None else {"ids": list(ids)}
    found = (await unit.execute(_without_terms(only=ids is not None), parameters)).all()
    if not found:
        return None
    await unit.execute(_lock_sources(), {"ids": sorted({row.source_id for row in found})})
    rows = await unit.execute(_texts(), {"ids": [row.id for row in found]})
    await write_terms(unit, [TextOfChunk(row.id, row.title, row.content, Scope(*row[3:])) for row in rows])
    last: int = found[-1].id
    return last


async def _analysed(chunks: Sequence[TextOfChunk]) -> AsyncGenerator[list[_Record], None]:
    """Rows in batches: while the server takes one, the next is made in a thread."""
    batches = _batches(chunks)
    if sum(map(_characters, chunks)) <= _CHARACTERS_IN_LOOP:
        for batch in batches:
            yield _records(batch)
        return
    following: asyncio.Task[list[_Record]] | None = None
    try:
        for position in range(len(batches)):
            records = await (following or asyncio.to_thread(_records, batches[position]))
            if position + 1 < len(batches):
                following = asyncio.create_task(asyncio.to_thread(_records, batches[position + 1]))
            yield records
    finally:
        if following is not None:
            following.cancel()


def _characters(chunk: TextOfChunk) -> int:
    return len(chunk.title) + len(chunk.content)


def _batches(chunks: Sequence[TextOfChunk]) -> list[list[TextOfChunk]]:
    batches: list[list[TextOfChunk]] = []
    room = 0
    for chunk in chunks:
        if room <= 0:
            batches.append([])
            # The first is short: nothing is written while it is made.
            room = _CHARACTERS_IN_LOOP if len(batches) == 1 else _CHARACTERS_A_BATCH
        batches[-1].append(chunk)
        room -= _characters(chunk)
    return batches


def _records(chunks: Sequence[TextOfChunk]) -> list[_Record]:
    records = []
    for chunk in chunks:
        words = analyse(chunk.title, chunk.content)
        records.append((chunk.chunk_id, pack_terms(words, scope_terms(**asdict(chunk.scope))), words.folded))
    return records


def _delete() -> Any:
    return delete(ChunkTerms).where(ChunkTerms.chunk_id == func.any(_IDS)).execution_options(synchronize_session=False)


def _refresh() -> AnySelect:
    return select(func.kotonoha_refresh_terms(bindparam("force", type_=Boolean())))


def _without_terms(*, only: bool) -> AnySelect:
    chunk = KnowledgeChunk
    statement = select(chunk.id, chunk.source_id).where(_has_no_terms()).order_by(chunk.id)
    if only:
        return statement.where(chunk.id == func.any(_IDS))
    return statement.where(chunk.id > bindparam("after_id", type_=BigInteger())).limit(FILL_BATCH)


def _lock_sources() -> AnySelect:
    source = KnowledgeSource.id
    return select(source).where(source == func.any(_IDS)).order_by(source).with_for_update(key_share=True)


def _texts() -> AnySelect:
    """A statement of its own after the lock, so that it sees whose terms were written meanwhile.

    Locked too, so that a chunk that somebody deletes without its source is passed over and not violated.
    """
    chunk, source = KnowledgeChunk, KnowledgeSource
    return (
        select(chunk.id, source.title, chunk.content, chunk.guild_id, chunk.channel_id, chunk.thread_id, chunk.user_id)
        .join(source, source.id == chunk.source_id)
        .where(chunk.id == func.any(_IDS), _has_no_terms())
        .order_by(chunk.id)
        .with_for_update(read=True, key_share=True, of=chunk, skip_locked=True)
    )


def _has_no_terms() -> ColumnElement[bool]:
    return ~select(ChunkTerms.chunk_id).where(ChunkTerms.chunk_id == KnowledgeChunk.id).exists()
