"""The status of a source, which follows its chunks. Shared by everything that writes chunks."""

from collections.abc import Sequence
from functools import cache
from typing import Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Update,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal_column,
    not_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from kotonoha_store.columns import AnySelect
from kotonoha_store.models import KnowledgeChunk, KnowledgeChunkDeadLetter, KnowledgeSource
from kotonoha_store.records import SourceStatus

# One array: of single parameters a statement takes 32,767 only.
_IDS: Final = bindparam("ids", type_=ARRAY(BigInteger))


async def lock_sources(connection: AsyncSession | AsyncConnection, source_ids: Sequence[int]) -> None:
    """Lock the sources before their chunks are written.

    Always first, always in id order: a cascading delete locks source, then chunk, and whoever did it
    the other way round would deadlock with it.
    """
    await connection.execute(_lock(), {"ids": list(source_ids)})


async def recompute_status(connection: AsyncSession | AsyncConnection, source_ids: Sequence[int]) -> None:
    """Set the status of sources that this transaction has locked with :func:`lock_sources`.

    A statement of its own after the writes, under READ COMMITTED: the second of two workers that
    finish a source together waited at the lock, and sees here what the first one wrote.
    """
    await connection.execute(_recompute(), {"ids": list(source_ids)})


@cache
def _lock() -> AnySelect:
    return (
        select(KnowledgeSource.id)
        .where(KnowledgeSource.id == func.any(_IDS))
        .order_by(KnowledgeSource.id)
        .with_for_update(key_share=True)
    )


@cache
def _recompute() -> Update:
    of_source = KnowledgeChunk.source_id == KnowledgeSource.id
    waiting = exists().where(of_source, KnowledgeChunk.embedding.is_(None))
    embedded = exists().where(of_source, KnowledgeChunk.embedding.is_not(None))
    dead = exists().where(KnowledgeChunkDeadLetter.source_id == KnowledgeSource.id)
    # Searchable stays searchable: a partial source with chunks queued again remains partial.
    started = KnowledgeSource.status.in_([SourceStatus.COMPLETED, SourceStatus.FAILED])
    status = case(
        (and_(waiting, started), _status(SourceStatus.PROCESSING)),
        (waiting, KnowledgeSource.status),
        (and_(embedded, dead), _status(SourceStatus.PARTIAL)),
        (dead, _status(SourceStatus.FAILED)),
        (embedded, _status(SourceStatus.COMPLETED)),
        else_=KnowledgeSource.status,
    )
    return (
        update(KnowledgeSource)
        .where(KnowledgeSource.id == func.any(_IDS))
        .values(
            status=status,
            error_code=case((not_(dead), None), else_=KnowledgeSource.error_code),
            error_message=case((not_(dead), None), else_=KnowledgeSource.error_message),
        )
        .execution_options(synchronize_session=False)
    )


def _status(status: SourceStatus) -> ColumnElement[SourceStatus]:
    # A bound parameter in a CASE would be text, which is no source_status_enum.
    return literal_column(f"'{status}'::source_status_enum")
