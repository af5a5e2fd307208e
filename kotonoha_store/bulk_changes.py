"""Deleting and changing by filter, on the caller's transaction.

The sources concerned are locked first, in the order of their ids, and only then is it decided what the filters
keep: what others wrote before they let go of a source is seen, and nobody adds to it behind the decision.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    Column,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Subquery,
    Table,
    Text,
    Update,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    union,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.visitors import replacement_traverse

from kotonoha_store.checks import check_json, check_text
from kotonoha_store.columns import AnySelect
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.filters import Shape, check_scope, conditions, parameters, shape
from kotonoha_store.models import (
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeSource,
)
from kotonoha_store.records import SCOPE_FIELDS, Scope
from kotonoha_store.search_records import AnyFilters, BulkResult
from kotonoha_store.source_status import lock_sources, recompute_status
from kotonoha_store.term_index import TextOfChunk, refresh_terms, rewrite_terms

_BATCH: Final = 1000
"""Rows written by one statement, so that each stays far below DB_COMMAND_TIMEOUT."""

_IDS: Final = bindparam("ids", type_=ARRAY(BigInteger))

_CHUNKS: Final[Any] = KnowledgeChunk.__table__
_SOURCES: Final[Any] = KnowledgeSource.__table__
_LETTERS: Final[Any] = KnowledgeChunkDeadLetter.__table__
# Beside itself, since a filter looks into the table of the sources, too.
_EMPTY: Final = _SOURCES.alias("empty_source")


class _Asked(NamedTuple):
    """Filters, ready for a statement."""

    shape: Shape
    values: dict[str, Any]


class _Changes(NamedTuple):
    """What becomes of the sources, checked."""

    title: str | None
    keys: dict[str, Any]
    removed: list[str]

    @property
    def of_metadata(self) -> bool:
        return bool(self.keys or self.removed)


async def delete_chunks(
    session: AsyncSession, filters: AnyFilters, *, everywhere: bool = False, dry_run: bool = False
) -> BulkResult:
    """See :meth:`kotonoha_store.knowledge.KnowledgeRepository.delete_chunks`."""
    asked = _asked(filters, everywhere, "delete in", "delete from")
    if dry_run:
        row = (await session.execute(_count_deletions(asked.shape), asked.values)).one()
        return BulkResult(row.chunks, row.sources, row.dead_letters, dry_run=True)
    sources = await _ids(session, _concerned(asked.shape), asked.values)
    await _lock(session, sources)
    values = {**asked.values, "ids": sources}
    chunks = await _ids(session, _chunks_to_delete(asked.shape), values)
    letters = await _ids(session, _letters_to_delete(asked.shape), values)
    deleted_chunks = await _delete_each(session, KnowledgeChunk, chunks)
    deleted_letters = await _delete_each(session, KnowledgeChunkDeadLetter, letters)
    deleted_sources = await _settle(session, sources)
    if chunks:
        await refresh_terms(session, force=True)
    return BulkResult(deleted_chunks, deleted_sources, deleted_letters, dry_run=False)


async def update_sources(
    session: AsyncSession,
    filters: AnyFilters,
    *,
    metadata: Mapping[str, Any] | None = None,
    title: str | None = None,
    everywhere: bool = False,
    dry_run: bool = False,
) -> BulkResult:
    """See :meth:`kotonoha_store.knowledge.KnowledgeRepository.update_sources`."""
    changes = _changes(metadata, title)
    asked = _asked(filters, everywhere, "change", "change the sources of")
    if dry_run:
        return await _sizes(session, _with_kept_chunks(asked.shape), asked.values, dry_run=True)
    sources = await _ids(session, _with_kept_chunks(asked.shape), asked.values)
    await _lock(session, sources)
    kept = _with_kept_chunks(asked.shape).where(KnowledgeChunk.source_id == func.any(_IDS))
    sources = await _ids(session, kept, {**asked.values, "ids": sources})
    retitled: list[int] = []
    for batch in _batches(sources):
        if changes.title is not None:
            retitled += await _ids(session, _titled_otherwise(), {"ids": batch, "new_title": title})
            await session.execute(_retitle_letters(), {"ids": batch, "new_title": title})
        await session.execute(_change(changes), _change_values(changes, batch))
    await _rewrite_words(session, retitled)
    return await _sizes(session, select(func.unnest(_IDS)), {"ids": sources}, dry_run=False)


# What was asked for


def _asked(filters: AnyFilters, everywhere: bool, verb: str, verb_for_all: str) -> _Asked:
    check_scope(filters, everywhere, verb, verb_for_all)
    return _Asked(shape(filters), parameters(filters))


def _changes(metadata: Mapping[str, Any] | None, title: str | None) -> _Changes:
    if title is not None and not check_text(title, "title").strip():
        raise InvalidInputError("title must not be blank")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InvalidInputError(f"metadata must be a mapping, not {metadata.__class__.__name__}")
    given = dict(metadata or {})
    check_json(given, "metadata")
    if title is None and not given:
        raise InvalidInputError("nothing to change was given: name a title, or at least one key of the metadata")
    return _Changes(
        title=title,
        keys={key: value for key, value in given.items() if value is not None},
        removed=[key for key, value in given.items() if value is None],
    )


# Steps


async def _ids(session: AsyncSession, statement: Any, values: Mapping[str, Any]) -> list[int]:
    return sorted((await session.execute(statement, values)).scalars())


def _batches(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))


async def _lock(session: AsyncSession, sources: Sequence[int]) -> None:
    for batch in _batches(sources):
        await lock_sources(session, batch)


async def _delete_each(session: AsyncSession, model: Any, ids: Sequence[int]) -> int:
    statement = delete(model).where(model.id == func.any(_IDS)).execution_options(synchronize_session=False)
    deleted = 0
    for batch in _batches(ids):
        result: Any = await session.execute(statement, {"ids": batch})
        deleted += result.rowcount
    return deleted


async def _settle(session: AsyncSession, sources: Sequence[int]) -> int:
    """Delete the sources with nothing left, and bring the status of the others up to date."""
    deleted = 0
    for batch in _batches(sources):
        # First the lock that keeps even those from adding a chunk who do not lock sources as this library does.
        # It does not change the row, so it is the second statement that sees what they had added by then.
        emptied = await _ids(session, _lock_emptied(), {"ids": batch})
        if emptied:
            result: Any = await session.execute(_delete_emptied(), {"ids": emptied})
            deleted += result.rowcount
        await recompute_status(session, batch)
    return deleted


async def _rewrite_words(session: AsyncSession, sources: Sequence[int]) -> None:
    """Rebuild the terms of all chunks of these sources: the title's words are among them."""
    chunk = KnowledgeChunk
    chunks = await _ids(session, select(chunk.id).where(chunk.source_id == func.any(_IDS)), {"ids": sources})
    for batch in _batches(chunks):
        rows = (await session.execute(_lock_texts(), {"ids": batch})).all()
        texts = [TextOfChunk(row.id, row.title, row.content, Scope(*row[3:])) for row in rows]
        await rewrite_terms(session, texts)
    if chunks:
        await refresh_terms(session)


async def _sizes(session: AsyncSession, sources: AnySelect, values: Mapping[str, Any], *, dry_run: bool) -> BulkResult:
    row = (await session.execute(_count_belongings(sources), values)).one()
    return BulkResult(row.chunks, row.sources, row.dead_letters, dry_run=dry_run)


# Filters, read for what is no chunk


def _on(shape: Shape, outer: FromClause, columns: Mapping[Any, ColumnElement[Any]]) -> list[ColumnElement[bool]]:
    """The conditions, reading other columns in the place of chunks' (and sources') own."""
    known = {(column.table.name, column.name): other for column, other in columns.items()}

    def other(element: Any, **_: Any) -> Any:
        if isinstance(element, Column):
            return known.get((element.table.name, element.name))
        # What a subquery correlates to.
        return outer if isinstance(element, Table) and element.name == _CHUNKS.name else None

    return [replacement_traverse(condition, {}, other) for condition in conditions(shape)]


def _on_letters(shape: Shape) -> list[ColumnElement[bool]]:
    """A dead letter is read as the chunk that it was, one whose source is gone by what it knows of it."""
    names = {"id": "original_chunk_id", "created_at": "chunk_created_at"}
    columns = {column: _LETTERS.c.get(names.get(column.name, column.name)) for column in _CHUNKS.c}
    columns[_CHUNKS.c.embedding] = cast(null(), _CHUNKS.c.embedding.type)
    source = _source_of_letter()
    return _on(shape, _LETTERS, columns | {column: source.c[column.name] for column in _SOURCES.c})


def _source_of_letter() -> Subquery:
    known = {
        "id": _LETTERS.c.source_id,
        "type": _LETTERS.c.source_type,
        "title": _LETTERS.c.source_title,
        "metadata": literal_column("'{}'::jsonb"),
        "origin_session_key": _LETTERS.c.location["session_key"].astext,
        **{name: _LETTERS.c[name] for name in SCOPE_FIELDS},
    }
    columns = [
        case((_SOURCES.c.id.is_(None), known[column.name]), else_=column).label(column.name)
        if column.name in known
        else column
        for column in _SOURCES.c
    ]
    one = select(literal_column("1")).subquery("one")
    joined = one.outerjoin(_SOURCES, _SOURCES.c.id == _LETTERS.c.source_id)
    return select(*columns).select_from(joined).correlate(_LETTERS).subquery("source_of_letter")


def _is_empty_and_kept(shape: Shape) -> list[ColumnElement[bool]]:
    """A source without chunks and dead letters, its messages perhaps, is read as a chunk of unknown time and model."""
    own = {column: _EMPTY.c.get(column.name) for column in _CHUNKS.c}
    own[_CHUNKS.c.source_id] = _EMPTY.c.id
    for column in (_CHUNKS.c.id, _CHUNKS.c.created_at):
        own[column] = None
    columns = {column: cast(null(), column.type) if other is None else other for column, other in own.items()}
    return [*_has_nothing(_EMPTY), *_on(shape, _EMPTY, columns)]


def _has_nothing(source: Any) -> list[ColumnElement[bool]]:
    """Asked of the table or of its alias."""
    return [~exists().where(table.c.source_id == source.c.id).correlate(source) for table in (_CHUNKS, _LETTERS)]


# Statements


def _concerned(shape: Shape) -> CompoundSelect[Any]:
    return union(
        select(KnowledgeChunk.source_id).where(*conditions(shape)),
        select(_LETTERS.c.source_id).where(_LETTERS.c.source_id.is_not(None), *_on_letters(shape)),
        select(_EMPTY.c.id).where(*_is_empty_and_kept(shape)),
    )


def _with_kept_chunks(shape: Shape) -> AnySelect:
    return select(KnowledgeChunk.source_id).where(*conditions(shape)).distinct()


def _chunks_to_delete(shape: Shape) -> AnySelect:
    return select(KnowledgeChunk.id).where(KnowledgeChunk.source_id == func.any(_IDS), *conditions(shape))


def _letters_to_delete(shape: Shape) -> AnySelect:
    """Locked in order: those whose source is gone are guarded by no lock of it."""
    of_source = or_(_LETTERS.c.source_id == func.any(_IDS), _LETTERS.c.source_id.is_(None))
    statement = select(_LETTERS.c.id).where(of_source, *_on_letters(shape))
    return statement.order_by(_LETTERS.c.id).with_for_update(of=_LETTERS)


def _lock_emptied() -> AnySelect:
    of_batch = _SOURCES.c.id == func.any(_IDS)
    return select(_SOURCES.c.id).where(of_batch, *_has_nothing(_SOURCES)).order_by(_SOURCES.c.id).with_for_update()


def _delete_emptied() -> Any:
    of_batch = KnowledgeSource.id == func.any(_IDS)
    statement = delete(KnowledgeSource).where(of_batch, *_has_nothing(_SOURCES))
    return statement.execution_options(synchronize_session=False)


def _count_deletions(shape: Shape) -> AnySelect:
    """In one statement, and so of one instant. A source goes when all that it has is counted here."""
    chunks = _per_source(_CHUNKS, conditions(shape), "kept_chunks")
    letters = _per_source(_LETTERS, _on_letters(shape), "kept_letters")
    joined = _SOURCES.outerjoin(chunks, chunks.c.source_id == _SOURCES.c.id).outerjoin(
        letters, letters.c.source_id == _SOURCES.c.id
    )
    emptied = (
        select(func.count())
        .select_from(joined)
        .where(
            or_(chunks.c.number.is_not(None), letters.c.number.is_not(None)),
            *(
                select(func.count()).where(table.c.source_id == _SOURCES.c.id).correlate(_SOURCES).scalar_subquery()
                == func.coalesce(kept.c.number, 0)
                for table, kept in ((_CHUNKS, chunks), (_LETTERS, letters))
            ),
        )
    )
    empty = select(func.count()).select_from(_EMPTY).where(*_is_empty_and_kept(shape))
    return select(
        _sum(chunks).label("chunks"),
        (emptied.scalar_subquery() + empty.scalar_subquery()).label("sources"),
        _sum(letters).label("dead_letters"),
    )


def _per_source(table: Any, kept: Sequence[ColumnElement[bool]], name: str) -> CTE:
    return select(table.c.source_id, func.count().label("number")).where(*kept).group_by(table.c.source_id).cte(name)


def _sum(counted: CTE) -> ColumnElement[int]:
    return select(cast(func.coalesce(func.sum(counted.c.number), 0), BigInteger)).scalar_subquery()


def _count_belongings(sources: AnySelect) -> AnySelect:
    wanted = sources.cte("wanted")
    (source_id,) = wanted.c
    chunks, letters = (
        select(func.count()).select_from(table).where(table.c.source_id.in_(select(source_id))).scalar_subquery()
        for table in (_CHUNKS, _LETTERS)
    )
    return select(
        chunks.label("chunks"),
        select(func.count()).select_from(wanted).scalar_subquery().label("sources"),
        letters.label("dead_letters"),
    )


def _titled_otherwise() -> AnySelect:
    source = KnowledgeSource
    return select(source.id).where(source.id == func.any(_IDS), source.title != bindparam("new_title", type_=Text()))


def _retitle_letters() -> Update:
    return (
        update(KnowledgeChunkDeadLetter)
        .where(KnowledgeChunkDeadLetter.source_id == func.any(_IDS))
        .values(source_title=bindparam("new_title", type_=Text()))
        .execution_options(synchronize_session=False)
    )


def _change(changes: _Changes) -> Update:
    values: dict[str, ColumnElement[Any]] = {}
    if changes.title is not None:
        values["title"] = bindparam("new_title", type_=Text())
    if changes.of_metadata:
        values["source_metadata"] = _merged(changes)
    return (
        update(KnowledgeSource)
        .where(KnowledgeSource.id == func.any(_IDS))
        .values(values)
        .execution_options(synchronize_session=False)
    )


def _merged(changes: _Changes) -> ColumnElement[Any]:
    metadata: Any = KnowledgeSource.source_metadata
    keys = bindparam("keys", type_=JSONB())
    rest = metadata.op("-", return_type=JSONB())(bindparam("removed", type_=ARRAY(Text)))
    # Other programs may have written anything; what is no object has no keys to keep.
    is_object = func.jsonb_typeof(metadata) == "object"
    return case((is_object, rest.op("||", return_type=JSONB())(keys)), else_=keys if changes.keys else metadata)


def _change_values(changes: _Changes, batch: Sequence[int]) -> dict[str, Any]:
    values: dict[str, Any] = {"ids": batch}
    if changes.title is not None:
        values["new_title"] = changes.title
    if changes.of_metadata:
        values |= {"keys": changes.keys, "removed": changes.removed}
    return values


def _lock_texts() -> AnySelect:
    """Locked against the keys of terms: who is just writing some, as a migration does, is waited for, not violated."""
    chunk, source = KnowledgeChunk, KnowledgeSource
    return (
        select(chunk.id, source.title, chunk.content, chunk.guild_id, chunk.channel_id, chunk.thread_id, chunk.user_id)
        .join(source, source.id == chunk.source_id)
        .where(chunk.id == func.any(_IDS))
        .order_by(chunk.id)
        .with_for_update(of=chunk)
    )
