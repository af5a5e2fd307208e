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
    or_,
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
    await connection.execute(lock_statement(), {"ids": list(source_ids)})


async def recompute_status(connection: AsyncSession | AsyncConnection, source_ids: Sequence[int]) -> None:
    """Set the status of sources that this transaction has locked with :func:`lock_sources`.

    A statement of its own after the writes, under READ COMMITTED: the second of two workers that
    finish a source together waited at the lock, and sees here what the first one wrote.
    """
    await connection.execute(recompute_statement(), {"ids": list(source_ids)})


@cache
def lock_statement() -> AnySelect:
    """Parameters: ids."""
    return (
        select(KnowledgeSource.id)
        .where(KnowledgeSource.id == func.any(_IDS))
        .order_by(KnowledgeSource.id)
        .with_for_update(key_share=True)
    )


@cache
def recompute_statement() -> Update:
    """Parameters: ids."""
    source = KnowledgeSource
    of_source = KnowledgeChunk.source_id == source.id
    # OFFSET 0: so that each is asked for once.
    now = (
        select(
            source.id,
            source.status,
            source.error_code,
            source.error_message,
            exists().where(of_source).label("chunks"),
            exists().where(of_source, KnowledgeChunk.embedding.is_(None)).label("waiting"),
            exists().where(KnowledgeChunkDeadLetter.source_id == source.id).label("dead"),
        )
        .where(source.id == func.any(_IDS))
        .offset(literal_column("0"))
        .subquery("now")
    )
    ended = or_(now.c.status == _status(SourceStatus.COMPLETED), now.c.status == _status(SourceStatus.FAILED))
    status = case(
        # Searchable stays searchable: a partial source with chunks queued again remains partial.
        (and_(now.c.waiting, ended), _status(SourceStatus.PROCESSING)),
        (now.c.waiting, now.c.status),
        # From here on every chunk that is there is embedded. Not asked for as such: statistics may know of none.
        (and_(now.c.chunks, now.c.dead), _status(SourceStatus.PARTIAL)),
        (now.c.dead, _status(SourceStatus.FAILED)),
        (now.c.chunks, _status(SourceStatus.COMPLETED)),
        else_=now.c.status,
    )
    new = select(
        now.c.id,
        status.label("status"),
        case((now.c.dead, now.c.error_code)).label("error_code"),
        case((now.c.dead, now.c.error_message)).label("error_message"),
    ).subquery("new")
    is_changed = or_(
        source.status != new.c.status,
        source.error_code.is_distinct_from(new.c.error_code),
        source.error_message.is_distinct_from(new.c.error_message),
    )
    # Only what changes: the row stands in ten indexes, and most batches leave their sources as they are.
    return (
        update(source)
        .where(source.id == new.c.id, is_changed)
        .values(status=new.c.status, error_code=new.c.error_code, error_message=new.c.error_message)
        .execution_options(synchronize_session=False)
    )


def _status(status: SourceStatus) -> ColumnElement[SourceStatus]:
    # A bound parameter in a CASE would be text, which is no source_status_enum.
    return literal_column(f"'{status}'::source_status_enum")
