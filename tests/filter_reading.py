"""Filters read plainly, rows to read, and any filter there can be: what tests of filters share."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import KnowledgeChunk, KnowledgeSource, SearchFilters, SourceType
from kotonoha_store.database import driver_connection
from kotonoha_store.filters import Shape, conditions, parameters, shape
from kotonoha_store.search_records import AnyFilters, CombinedFilters

JUNE = datetime(2024, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)
IDS = ("guild_id", "channel_id", "thread_id", "user_id")

unhurried = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=300
)


@dataclass(frozen=True)
class Row:
    """A chunk as the reference sees it."""

    id: int = 0
    source_id: int | None = None
    guild_id: int | None = None
    channel_id: int | None = None
    thread_id: int | None = None
    user_id: int | None = None
    occurred_from: datetime | None = None
    occurred_to: datetime | None = None
    model: str | None = None
    type: SourceType = SourceType.WEB_PAGE
    session_key: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


async def add(session: AsyncSession, **values: Any) -> Row:
    """Store a source with one chunk."""
    row = Row(**values)
    source = insert(KnowledgeSource).values(
        type=row.type, title="a source", source_metadata=row.metadata, origin_session_key=row.session_key
    )
    if row.source_id is not None:
        source = source.values(id=row.source_id)
    source_id = (await session.execute(source.returning(KnowledgeSource.id))).scalar_one()
    chunk = insert(KnowledgeChunk).values(
        source_id=source_id,
        content="a chunk",
        embedding_model=row.model,
        occurred_from=row.occurred_from,
        occurred_to=row.occurred_to,
        **{name: getattr(row, name) for name in IDS},
    )
    chunk_id = (await session.execute(chunk.returning(KnowledgeChunk.id))).scalar_one()
    return Row(**{**values, "id": chunk_id, "source_id": source_id})


def compiled(shape: Shape) -> tuple[str, list[str]]:
    """The statement as asyncpg takes it, and the names of its parameters in their order."""
    statement = select(KnowledgeChunk.id).where(*conditions(shape))
    result = statement.compile(dialect=asyncpg_dialect.dialect())
    return str(result), list(result.positiontup or ())


async def kept(session: AsyncSession, wanted: AnyFilters, *, statement_of: AnyFilters | None = None) -> set[int]:
    """What the database keeps, asked through SQLAlchemy and through asyncpg alone."""
    sql, names = compiled(shape(wanted if statement_of is None else statement_of))
    values = parameters(wanted)
    assert sorted(names) == sorted(values)
    arguments = tuple(values[name] for name in names)
    connection = await session.connection()
    found = [row[0] for row in await connection.exec_driver_sql(sql, arguments or None)]
    alone = [row[0] for row in await (await driver_connection(session)).fetch(sql, *arguments)]
    assert sorted(alone) == sorted(found)
    assert len(set(found)) == len(found)
    return set(found)


# The plain reading


def contains(outer: Any, inner: Any) -> bool:
    """``outer @> inner`` of jsonb."""
    if isinstance(inner, dict):
        return isinstance(outer, dict) and all(k in outer and contains(outer[k], v) for k, v in inner.items())
    if isinstance(inner, list):
        return isinstance(outer, list) and all(any(contains(o, i) for o in outer) for i in inner)
    return isinstance(outer, bool) == isinstance(inner, bool) and type(outer) is not dict and outer == inner


def meets_fields(row: Row, wanted: SearchFilters) -> bool:
    start, end = row.occurred_from, row.occurred_to
    return all(
        (
            *(getattr(wanted, name) in (None, getattr(row, name)) for name in IDS),
            wanted.source_ids is None or row.source_id in wanted.source_ids,
            wanted.source_types is None or row.type in wanted.source_types,
            wanted.since is None or (end is not None and end >= wanted.since),
            wanted.until is None or (start is not None and start < wanted.until),
            wanted.metadata is None or contains(row.metadata, wanted.metadata),
            wanted.session_keys is None or row.session_key in wanted.session_keys,
            wanted.models is None or row.model in wanted.models,
        )
    )


def meets(row: Row, wanted: AnyFilters) -> bool:
    if isinstance(wanted, SearchFilters):
        return meets_fields(row, wanted)
    each = (meets(row, part) for part in wanted.parts)
    return {"and": all, "or": any, "not": lambda parts: not any(parts)}[wanted.op](each)


def named_scopes(wanted: AnyFilters) -> list[SearchFilters]:
    """The scopes that a filter names and does not negate, each as a filter of its own."""
    if isinstance(wanted, CombinedFilters):
        return [] if wanted.op == "not" else [scope for part in wanted.parts for scope in named_scopes(part)]
    given = {name: getattr(wanted, name) for name in (*IDS, "source_ids", "session_keys")}
    scope = SearchFilters(**{name: value for name, value in given.items() if value is not None})
    return [] if scope.is_empty else [scope]


# Few values each, so that rows and filters meet.
small = st.integers(1, 2)
days = st.integers(0, 4).map(lambda day: JUNE + day * DAY)
some_models = st.sampled_from(["model-a", "model-b"])
some_types = st.sampled_from(list(SourceType)[:2])
keys = st.sampled_from(["one", "two"])
documents = st.dictionaries(
    st.sampled_from(["a", "b"]),
    st.sampled_from([1, 1.5, "1", True, False, 0, None, [1, "1"], {"a": 1}, [], {}]),
    max_size=2,
)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, max_size=2)


rows = st.builds(
    Row,
    source_id=st.integers(1, 4),
    **{name: small | st.none() for name in IDS},
    occurred_from=days | st.none(),
    occurred_to=days | st.none(),
    model=some_models | st.none(),
    type=some_types,
    session_key=keys | st.none(),
    metadata=documents,
)


def leaves(source_ids: st.SearchStrategy[int]) -> st.SearchStrategy[SearchFilters]:
    fields: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(IDS, small),
        "source_ids": some(source_ids),
        "source_types": some(some_types),
        "metadata": documents,
        "session_keys": some(keys),
        "models": some(some_models),
    }
    times = st.tuples(days | st.none(), st.integers(1, 3) | st.none()).map(
        lambda pair: {"since": pair[0], "until": (pair[0] or JUNE) + pair[1] * DAY if pair[1] else None}
    )
    # Few fields at a time: with many of them hardly a row would be kept.
    chosen = st.lists(st.sampled_from([*fields, "times"]), unique=True, max_size=3)
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names if name != "times"}).flatmap(
            lambda values: (times if "times" in names else st.just({})).map(
                lambda more: SearchFilters(**values, **more)
            )
        )
    )


def trees(source_ids: st.SearchStrategy[int]) -> st.SearchStrategy[AnyFilters]:
    def combine(inner: st.SearchStrategy[AnyFilters]) -> st.SearchStrategy[AnyFilters]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            inner.map(lambda a: ~a),
            pairs.map(lambda pair: pair[0] & pair[1]),
            pairs.map(lambda pair: pair[0] | pair[1]),
            st.builds(
                CombinedFilters, op=st.sampled_from(["and", "or"]), parts=st.lists(inner, min_size=1, max_size=3)
            ),
        )

    return st.recursive(leaves(source_ids), combine, max_leaves=10)


def scoped_trees(source_ids: st.SearchStrategy[int]) -> st.SearchStrategy[AnyFilters]:
    """Hardly a random tree names a scope; of these most do."""
    named = leaves(source_ids).map(lambda leaf: leaf if leaf.names_scope else leaf & SearchFilters(guild_id=1))
    anything = trees(source_ids)

    def combine(inner: st.SearchStrategy[AnyFilters]) -> st.SearchStrategy[AnyFilters]:
        return st.one_of(
            st.tuples(inner, anything).map(lambda pair: pair[0] & pair[1]),
            st.tuples(anything, inner).map(lambda pair: pair[0] & pair[1]),
            st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
            st.tuples(inner, anything).map(lambda pair: pair[0] | pair[1]),
        )

    return st.recursive(named, combine, max_leaves=4)


any_trees = trees(st.integers(1, 4)) | scoped_trees(st.integers(1, 4))


def mirrored(wanted: AnyFilters) -> AnyFilters:
    if isinstance(wanted, SearchFilters):
        return wanted
    return CombinedFilters(op=wanted.op, parts=tuple(mirrored(part) for part in reversed(wanted.parts)))
