"""Dead letters: chunks that could not be embedded, looked at, queued again or thrown away."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Insert,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store.checks import check_id, check_text
from kotonoha_store.columns import AnyRow
from kotonoha_store.errors import ErrorCode, NotFoundError
from kotonoha_store.models import EmbeddingJob, KnowledgeChunk, KnowledgeChunkDeadLetter, KnowledgeSource
from kotonoha_store.queue_statements import KEPT
from kotonoha_store.records import SCOPE_FIELDS, DeadLetter, Scope
from kotonoha_store.source_status import lock_sources, recompute_status
from kotonoha_store.term_index import fill_terms, refresh_terms

HISTORY_KEPT: Final = 20
"""How many earlier deaths a dead letter remembers."""

_LETTER: Final = KnowledgeChunkDeadLetter


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: all, or those that meet every condition given."""

    ids: Collection[int] | None
    source_id: int | None
    error_code: ErrorCode | str | None

    def __post_init__(self) -> None:
        for dead_letter_id in self.ids or ():
            check_id(dead_letter_id, "dead_letter_ids")
        if self.source_id is not None:
            check_id(self.source_id, "source_id")
        if self.error_code is not None:
            check_text(self.error_code, "error_code")

    @property
    def is_everything(self) -> bool:
        return self.ids is None and self.source_id is None and self.error_code is None

    def conditions(self) -> list[ColumnElement[bool]]:
        conditions: list[ColumnElement[bool]] = []
        if self.ids is not None:
            conditions.append(_among(_LETTER.id, self.ids))
        if self.source_id is not None:
            conditions.append(_LETTER.source_id == self.source_id)
        if self.error_code is not None:
            conditions.append(_LETTER.error_code == str(self.error_code))
        return conditions


async def page(connection: AsyncConnection, selection: Selection, *, after_id: int, limit: int) -> list[DeadLetter]:
    """Up to ``limit`` of them in the order of their ids, after this one."""
    columns = _LETTER.__table__.columns
    statement = select(*columns).where(_LETTER.id > after_id, *selection.conditions())
    return [_record(row) for row in await connection.execute(statement.order_by(_LETTER.id).limit(limit))]


async def one(connection: AsyncConnection, dead_letter_id: int) -> DeadLetter:
    """Raises NotFoundError."""
    check_id(dead_letter_id, "dead_letter_id")
    statement = select(*_LETTER.__table__.columns).where(_LETTER.id == dead_letter_id)
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no dead letter {dead_letter_id}; it was queued again, discarded or never there")
    return _record(row)


async def requeue(connection: AsyncConnection, selection: Selection) -> int:
    """Dead letters become chunks and jobs again; returns how many."""
    conditions = selection.conditions()
    sources = await _lock_sources_of(connection, conditions)
    queued = {row[0] for row in await connection.execute(_requeue([*conditions, _among(_LETTER.source_id, sources)]))}
    if queued:
        await fill_terms(connection, ids=sorted(queued))
        await refresh_terms(connection)
    await recompute_status(connection, sources)
    return len(queued)


async def discard(connection: AsyncConnection, selection: Selection) -> int:
    """Dead letters are deleted; returns how many."""
    conditions = selection.conditions()
    sources = await _lock_sources_of(connection, conditions)
    # One that was buried since then, of a source that is not locked, is not among those that were looked at.
    among = or_(_LETTER.source_id.is_(None), _among(_LETTER.source_id, sources))
    deleted = (await connection.execute(delete(_LETTER).where(*conditions, among).returning(_LETTER.id))).all()
    await recompute_status(connection, sources)
    return len(deleted)


async def _lock_sources_of(connection: AsyncConnection, conditions: list[ColumnElement[bool]]) -> list[int]:
    statement = select(_LETTER.source_id).where(_LETTER.source_id.is_not(None), *conditions).distinct()
    sources: list[int] = sorted(filter(None, (await connection.execute(statement)).scalars()))
    await lock_sources(connection, sources)
    return sources


def _among(column: Any, ids: Collection[int]) -> ColumnElement[bool]:
    """IN as one array: of single parameters a statement takes 32,767 only."""
    among: ColumnElement[bool] = column == func.any(literal(list(ids), ARRAY(BigInteger)))
    return among


def _requeue(conditions: list[ColumnElement[bool]]) -> Insert:
    """Dead letter out, chunk and job in: one statement."""
    letter, chunk = _LETTER, KnowledgeChunk
    has_source = exists().where(KnowledgeSource.id == letter.source_id)
    is_back = exists().where(chunk.id == letter.original_chunk_id)
    sequence = func.nextval(func.pg_get_serial_sequence("knowledge_chunks", "id"))
    letters = (
        delete(letter)
        .where(*conditions, has_source, or_(letter.original_chunk_id.is_(None), ~is_back))
        .returning(
            case((letter.original_chunk_id.is_(None), sequence), else_=letter.original_chunk_id).label("chunk_id"),
            letter.id,
            letter.source_id,
            func.coalesce(letter.chunk_created_at, func.now()).label("created_at"),
            _history().label("history"),
            letter.error_code,
            *(getattr(letter, name) for name in KEPT),
        )
        .cte("letters")
    )
    # A queue without leases could bury a chunk twice: the copies become one chunk again, the one that died last.
    copy = func.row_number().over(partition_by=letters.c.chunk_id, order_by=letters.c.id.desc()).label("copy")
    numbered = select(letters, copy).cte("numbered")
    values = ("source_id", "created_at", *KEPT)
    rows = select(numbered.c.chunk_id, *(numbered.c[name] for name in values)).where(numbered.c.copy == 1)
    chunks = insert(chunk).from_select(["id", *values], rows).returning(chunk.id).cte("chunks")
    jobs = (
        select(chunks.c.id, numbered.c.history, numbered.c.error_code)
        .join(numbered, numbered.c.chunk_id == chunks.c.id)
        .where(numbered.c.copy == 1)
    )
    job = EmbeddingJob
    return insert(job).from_select(["chunk_id", "history", "error_code"], jobs).returning(job.chunk_id)


def _history() -> ColumnElement[Any]:
    """What the dead letter remembers, its own death at the end."""
    death: dict[str, Any] = {
        "error_code": _LETTER.error_code,
        "error_message": _LETTER.error_message,
        "retry_count": _LETTER.retry_count,
        "embedding_model": _LETTER.embedding_model,
        "buried_at": _LETTER.created_at,
        "requeued_at": func.now(),
    }
    entries: list[Any] = []
    for name, value in death.items():
        entries += [literal_column(f"'{name}'"), value]
    earlier = func.jsonb_path_query_array(
        _LETTER.history, literal_column(f"'$[last - {HISTORY_KEPT - 2} to last]'::jsonpath"), type_=JSONB()
    )
    return earlier.op("||", return_type=JSONB())(func.jsonb_build_array(func.jsonb_build_object(*entries)))


def _record(row: AnyRow) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        original_chunk_id=row.original_chunk_id,
        source_id=row.source_id,
        source_title=row.source_title,
        source_type=row.source_type,
        content=row.content,
        location=row.location,
        token_count=row.token_count,
        scope=Scope(*(getattr(row, name) for name in SCOPE_FIELDS)),
        occurred_from=row.occurred_from,
        occurred_to=row.occurred_to,
        error_code=row.error_code,
        error_message=row.error_message,
        retry_count=row.retry_count,
        embedding_model=row.embedding_model,
        created_at=row.created_at,
        last_retry_at=row.last_retry_at,
        history=tuple(row.history),
    )
