"""Filters as SQL, in two halves: the conditions, which depend on a filter's shape alone, and the values.

A statement is built and compiled once for each shape; a search brings only the values.
"""

from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import (
    ARRAY,
    BigInteger,
    BindParameter,
    ColumnElement,
    DateTime,
    Text,
    and_,
    bindparam,
    cast,
    exists,
    false,
    func,
    literal_column,
    or_,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from kotonoha_store.errors import InvalidInputError
from kotonoha_store.models import KnowledgeChunk, KnowledgeSource
from kotonoha_store.search_records import AnyFilters, CombinedFilters, SearchFilters, dump_filter_json


class Shape(NamedTuple):
    """Which fields are asked for and how they are combined, without any value; hashable, comparable.

    Attributes:
        op: ``fields`` for what one :class:`SearchFilters` asks for, else how ``parts`` are combined.
        fields: in the order of the table below.
        parts: in their own order, whatever order they were combined in.
    """

    op: Literal["fields", "and", "or", "not"]
    fields: tuple[str, ...] = ()
    parts: tuple["Shape", ...] = ()


EVERYTHING: Final = Shape("fields")
NOTHING: Final = Shape("not", parts=(EVERYTHING,))


def shape(filters: AnyFilters) -> Shape:
    """Return what a statement is compiled for: equal shapes have equal conditions.

    Raises:
        InvalidInputError: these are no filters.
    """
    return _normalised(filters).shape


def check_scope(filters: AnyFilters, everywhere: bool, verb: str, verb_for_all: str | None = None) -> None:
    """Refuse what names no scope, unless everything is meant.

    Args:
        verb, verb_for_all: what is to be done with the scope, and with all that is stored; for the message.

    Raises:
        InvalidInputError: no scope is named, or these are no filters.
    """
    if not isinstance(filters, SearchFilters | CombinedFilters):
        raise _no_filters(filters)
    if not everywhere and not filters.names_scope:
        raise InvalidInputError(
            f"name the scope to {verb}: filters=SearchFilters(guild_id=...), or channel_id, thread_id, user_id, "
            f"source_ids, session_keys; or say everywhere=True to {verb_for_all or verb} all that is stored"
        )


def parameters(filters: AnyFilters) -> dict[str, Any]:
    """Return the values for the parameters of ``conditions(shape(filters))``, as asyncpg takes them.

    Raises:
        InvalidInputError: these are no filters.
    """
    values = _normalised(filters).values
    return {f"f{index}": _FIELDS[name].to_driver(value) for index, (name, value) in enumerate(values)}


def conditions(shape: Shape) -> list[ColumnElement[bool]]:
    """Return the conditions on :class:`KnowledgeChunk` that must all hold; none for what keeps everything.

    Their parameters are named ``f0``, ``f1`` ... Each states its type, so that the compiled statement can
    be handed to asyncpg as it is.
    """
    return _conditions(shape, (f"f{index}" for index in count()))


class _Normal(NamedTuple):
    """A filter with its parts in the order of their shapes; the values follow that order."""

    shape: Shape
    values: tuple[tuple[str, Any], ...] = ()
    parts: tuple["_Normal", ...] = ()


def _normalised(filters: AnyFilters) -> _Normal:
    if isinstance(filters, SearchFilters):
        given = tuple((name, value) for name in _FIELDS if (value := getattr(filters, name)) is not None)
        return _Normal(Shape("fields", tuple(name for name, _ in given)), given)
    if not isinstance(filters, CombinedFilters):
        raise _no_filters(filters)
    parts = [_normalised(part) for part in filters.parts]
    return _negated(parts[0]) if filters.op == "not" else _joined(filters.op, parts)


def _no_filters(value: object) -> InvalidInputError:
    return InvalidInputError(f"filters must be SearchFilters(...) or a combination of them, not {type(value).__name__}")


def _negated(part: _Normal) -> _Normal:
    if part.shape.op == "not":
        return part.parts[0]
    return _Normal(Shape("not", parts=(part.shape,)), part.values, (part,))


def _joined(op: Literal["and", "or"], parts: list[_Normal]) -> _Normal:
    neutral, decisive = (EVERYTHING, NOTHING) if op == "and" else (NOTHING, EVERYTHING)
    pieces: list[_Normal] = []
    for part in parts:
        if part.shape == decisive:
            return part
        if part.shape != neutral:
            pieces.extend(part.parts if part.shape.op == op else [part])
    if len(pieces) < 2:
        return pieces[0] if pieces else parts[0]
    pieces.sort(key=lambda piece: piece.shape)
    values = tuple(chain.from_iterable(piece.values for piece in pieces))
    return _Normal(Shape(op, parts=tuple(piece.shape for piece in pieces)), values, tuple(pieces))


def _conditions(shape: Shape, names: Iterator[str]) -> list[ColumnElement[bool]]:
    if shape.op == "fields":
        return _of_fields(shape.fields, names)
    if shape == NOTHING:
        return [false()]
    parts = [_conditions(part, names) for part in shape.parts]
    if shape.op == "and":
        return list(chain.from_iterable(parts))
    if shape.op == "or":
        return [or_(*(and_(*part) for part in parts))]
    # NOT of unknown would be unknown: a chunk without a channel is in no channel, so it is not in this one.
    return [and_(*parts[0]).is_not(true())]


def _of_fields(fields: tuple[str, ...], names: Iterator[str]) -> list[ColumnElement[bool]]:
    of_chunk: list[ColumnElement[bool]] = []
    of_source: list[ColumnElement[bool]] = []
    for name in fields:
        field = _FIELDS[name]
        condition = field.condition(bindparam(next(names), type_=field.type))
        (of_source if field.of_source else of_chunk).append(condition)
    if of_source:
        of_chunk.append(_source_with(of_source))
    return of_chunk


def _source_with(conditions: list[ColumnElement[bool]]) -> ColumnElement[bool]:
    # EXISTS and not IN: AND-ed they are the same semi-join, but under OR and NOT the planner compares an IN of more
    # ids than fit into work_mem one by one (13 s and more where EXISTS, on 500,000 sources, looks them up in 30 ms).
    of_chunk = KnowledgeSource.id == KnowledgeChunk.source_id
    return exists().where(of_chunk, *conditions).correlate(KnowledgeChunk)


def _as_it_is(value: Any) -> Any:
    return value


class _Field(NamedTuple):
    """How a field of :class:`SearchFilters` is asked for."""

    type: TypeEngine[Any]
    condition: Callable[[BindParameter[Any]], ColumnElement[bool]]
    to_driver: Callable[[Any], Any] = _as_it_is
    of_source: bool = False


def _has_none_of(names: BindParameter[Any]) -> ColumnElement[bool]:
    columns = (KnowledgeChunk.guild_id, KnowledgeChunk.channel_id, KnowledgeChunk.thread_id, KnowledgeChunk.user_id)

    def is_asked_for(name: str) -> ColumnElement[bool]:
        return func.array_position(names, literal_column(f"'{name}'")).is_not(None)

    return and_(*(or_(column.is_(None), ~is_asked_for(column.key)) for column in columns))


_MOMENT: Final = DateTime(timezone=True)
# One array: of single parameters a statement takes 32,767 only.
_BIGINTS: Final = ARRAY(BigInteger)
_TEXTS: Final = ARRAY(Text)

_FIELDS: Final[dict[str, _Field]] = {
    "guild_id": _Field(BigInteger(), lambda value: KnowledgeChunk.guild_id == value),
    "channel_id": _Field(BigInteger(), lambda value: KnowledgeChunk.channel_id == value),
    "thread_id": _Field(BigInteger(), lambda value: KnowledgeChunk.thread_id == value),
    "user_id": _Field(BigInteger(), lambda value: KnowledgeChunk.user_id == value),
    "source_ids": _Field(_BIGINTS, lambda value: KnowledgeChunk.source_id == func.any(value), list),
    "since": _Field(_MOMENT, lambda value: KnowledgeChunk.occurred_to >= value),
    "until": _Field(_MOMENT, lambda value: KnowledgeChunk.occurred_from < value),
    "models": _Field(_TEXTS, lambda value: KnowledgeChunk.embedding_model == func.any(value), list),
    "without": _Field(_TEXTS, lambda names: _has_none_of(names), list),
    # Of the column's own type: cast from text[], its values would tell the planner nothing.
    "source_types": _Field(
        ARRAY(KnowledgeSource.type.type),
        lambda value: KnowledgeSource.type == func.any(value),
        lambda types: [kind.value for kind in types],
        of_source=True,
    ),
    "session_keys": _Field(
        _TEXTS, lambda value: KnowledgeSource.origin_session_key == func.any(value), list, of_source=True
    ),
    "metadata": _Field(
        Text(),
        lambda value: KnowledgeSource.source_metadata.contains(cast(value, JSONB)),
        dump_filter_json,
        of_source=True,
    ),
}
