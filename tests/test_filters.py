"""Filters as SQL, against a plain reading of what they say."""

import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from filter_reading import (
    DAY,
    IDS,
    JUNE,
    MICROSECOND,
    Row,
    add,
    any_trees,
    compiled,
    kept,
    meets,
    mirrored,
    named_scopes,
    rows,
    scoped_trees,
    trees,
    unhurried,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import InvalidInputError, KnowledgeChunk, KnowledgeSource, SearchFilters, SourceType, filters
from kotonoha_store.checks import BIGINT_MAX
from kotonoha_store.filters import EVERYTHING, NOTHING, Shape, conditions, parameters, shape
from kotonoha_store.search_records import FILTER_MAX_DEPTH, FILTER_MAX_PARTS, AnyFilters, CombinedFilters

pytestmark = pytest.mark.role("app")

# The database reads as we do


@pytest.fixture
async def world(session: AsyncSession) -> list[Row]:
    """Three dozen chunks, half of what can be NULL being NULL."""
    stored = []
    for number in range(36):
        start = JUNE + number % 5 * DAY
        values: dict[str, Any] = {
            **{name: (None, 1, 2)[number // 3**place % 3] for place, name in enumerate(IDS)},
            "model": (None, "model-a", "model-b")[number % 3],
            "session_key": (None, "one", "two", "three")[number % 4],
            "type": list(SourceType)[number % 3],
            "metadata": (
                {},
                {"a": 1, "b": "1"},
                {"a": True, "b": None},
                {"a": "1", "b": [1, "1", {"a": 1}]},
                {"a": {"a": 1, "b": 2}, "b": 0},
                {"a": 1.5, "b": False},
                {"a": []},
            )[number % 7],
        }
        if number % 4:
            values |= {"occurred_from": start, "occurred_to": start + number % 2 * DAY}
        stored.append(await add(session, **values))
    return stored


async def test_any_combination_agrees_with_a_plain_reading(session: AsyncSession, world: list[Row]) -> None:
    """One statement for each shape: made of the mirrored tree, it serves this one."""
    source_ids = st.sampled_from([row.source_id for row in world[:6]] + [-1])
    seen = {"some": 0, "combined": 0, "scoped": 0}
    wanted_trees: list[AnyFilters] = []

    # Hypothesis' own loop is not ours: it finds the trees, the event loop of the test asks for them.
    @unhurried
    @given(trees(source_ids) | scoped_trees(source_ids))
    def collect(wanted: AnyFilters) -> None:
        wanted_trees.append(wanted)

    collect()
    for wanted in wanted_trees:
        found = await kept(session, wanted, statement_of=mirrored(wanted))
        assert found == {row.id for row in world if meets(row, wanted)}, wanted
        seen["some"] += 0 < len(found) < len(world)
        seen["combined"] += isinstance(wanted, CombinedFilters)
        seen["scoped"] += wanted.names_scope and bool(found)
        if wanted.names_scope:
            inside = {row.id for row in world if any(meets(row, scope) for scope in named_scopes(wanted))}
            assert found <= inside, wanted
    assert min(seen.values()) > 10, seen


FIELDS: list[dict[str, Any]] = [
    {"guild_id": 1},
    {"channel_id": 1},
    {"thread_id": 1},
    {"user_id": 1},
    {"source_types": ["web_page"]},
    {"source_types": [SourceType.WEB_PAGE, SourceType.DISCORD_SESSION]},
    {"since": JUNE + 2 * DAY},
    {"until": JUNE + 2 * DAY},
    {"since": JUNE + DAY, "until": JUNE + 2 * DAY},
    {"metadata": {"a": 1}},
    {"metadata": {}},
    {"session_keys": ["one"]},
    {"session_keys": ["one", "two", "one"]},
    {"models": ["model-a"]},
    {"models": ["model-a", "model-b"]},
    {"guild_id": 1, "models": ["model-a"], "session_keys": ["one"], "source_types": ["document_file"]},
    {"source_ids": []},
    {"source_types": []},
    {"session_keys": []},
    {"models": []},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
async def test_each_field_and_what_it_leaves_out(
    session: AsyncSession, world: list[Row], fields: dict[str, Any]
) -> None:
    """``~`` keeps exactly the rest, the rows that have NULL there included."""
    wanted = SearchFilters(**fields)
    expected = {row.id for row in world if meets(row, wanted)}
    assert bool(expected) is ([] not in fields.values())
    everything = {row.id for row in world}
    assert await kept(session, wanted) == expected
    assert await kept(session, ~wanted) == everything - expected
    assert await kept(session, ~~wanted) == expected
    assert await kept(session, wanted | ~wanted) == everything
    assert await kept(session, wanted & ~wanted) == set()
    assert await kept(session, ~(wanted & SearchFilters(guild_id=2))) == everything - {
        row.id for row in world if row.id in expected and row.guild_id == 2
    }


async def test_source_ids(session: AsyncSession, world: list[Row]) -> None:
    a, b, *_ = world
    assert await kept(session, SearchFilters(source_ids=[a.source_id, b.source_id, -1])) == {a.id, b.id}
    assert await kept(session, ~SearchFilters(source_ids=[a.source_id])) == {row.id for row in world} - {a.id}


async def test_not_this_channel_keeps_what_is_in_no_channel(session: AsyncSession) -> None:
    nowhere = await add(session)
    here = await add(session, channel_id=5, model="model-a", occurred_from=JUNE, occurred_to=JUNE, session_key="one")
    there = await add(session, channel_id=6)
    assert await kept(session, ~SearchFilters(channel_id=5)) == {nowhere.id, there.id}
    assert await kept(session, ~SearchFilters(models=["model-a"])) == {nowhere.id, there.id}
    assert await kept(session, ~SearchFilters(session_keys=["one"])) == {nowhere.id, there.id}
    assert await kept(session, ~SearchFilters(since=JUNE)) == {nowhere.id, there.id}
    assert await kept(session, ~SearchFilters(until=JUNE + DAY)) == {nowhere.id, there.id}
    assert await kept(session, ~(SearchFilters(channel_id=5) | SearchFilters(channel_id=6))) == {nowhere.id}
    assert await kept(session, ~(~SearchFilters(channel_id=5) & SearchFilters(models=["model-b"]))) == {
        nowhere.id,
        here.id,
        there.id,
    }


async def test_since_is_inclusive_and_until_is_not(session: AsyncSession) -> None:
    row = await add(session, occurred_from=JUNE, occurred_to=JUNE + DAY)
    assert await kept(session, SearchFilters(since=JUNE + DAY)) == {row.id}
    assert await kept(session, SearchFilters(since=JUNE + DAY + MICROSECOND)) == set()
    assert await kept(session, SearchFilters(until=JUNE)) == set()
    assert await kept(session, SearchFilters(until=JUNE + MICROSECOND)) == {row.id}
    tokyo = timezone(timedelta(hours=9))
    assert await kept(session, SearchFilters(since=(JUNE + DAY).astimezone(tokyo))) == {row.id}
    first, last = datetime(1, 1, 1, 0, 0, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert await kept(session, SearchFilters(since=first, until=last)) == {row.id}


async def test_metadata_is_typed(session: AsyncSession) -> None:
    values: list[Any] = [1, "1", True, None, "true", [1], {"1": 1}, 2**53 + 1, 2**63 + 1, 1.5, "%s :f0 $1 %(f0)s"]
    stored = {json.dumps(value): (await add(session, metadata={"n": value})).id for value in values}
    for value in values:
        assert await kept(session, SearchFilters(metadata={"n": value})) == {stored[json.dumps(value)]}
    assert await kept(session, SearchFilters(metadata={"n": 1.0})) == {stored["1"]}
    assert await kept(session, SearchFilters(metadata={"n": 2**53})) == set()
    assert await kept(session, SearchFilters(metadata={"n": 10**4000})) == set()
    assert await kept(session, SearchFilters(metadata={})) == set(stored.values())
    assert await kept(session, SearchFilters(metadata={"n'; DROP TABLE x --": '\\"'})) == set()


@pytest.mark.parametrize("value", [2**53, BIGINT_MAX - 1, -BIGINT_MAX - 1, -1])
async def test_ids_are_exact_to_64_bits(session: AsyncSession, value: int) -> None:
    for name in IDS:
        row = await add(session, **{name: value})
        await add(session, **{name: value + 1})
        assert await kept(session, SearchFilters(**{name: value})) == {row.id}
    row = await add(session, source_id=value)
    await add(session, source_id=value + 1)
    assert await kept(session, SearchFilters(source_ids=[value])) == {row.id}


ODD = (
    "'; DROP TABLE knowledge_chunks; --",
    "%s %(f0)s %% :f0 $1 {} ?",
    '"quoted" and \\ back\\\\slash',
    "{one,two}",
    "NULL",
    "",
    " one ",
    "a,b\n\t\x01",
    "会話:『東京』\U0001f600",
    "e\u0301",
    "\u00e9",
)


async def test_odd_names_are_only_names(session: AsyncSession) -> None:
    stored = {name: (await add(session, session_key=name, model=name)).id for name in ODD}
    await add(session)
    for name, chunk_id in stored.items():
        assert await kept(session, SearchFilters(session_keys=[name])) == {chunk_id}
        assert await kept(session, SearchFilters(models=[name])) == {chunk_id}
    assert await kept(session, SearchFilters(session_keys=ODD, models=ODD)) == set(stored.values())


async def test_more_values_than_a_statement_takes_parameters(session: AsyncSession) -> None:
    row = await add(session, session_key="mine", model="mine")
    many = range(10**9, 10**9 + 40_000)
    names = [f"other {number}" for number in many]
    assert await kept(session, SearchFilters(source_ids=[*many, row.source_id])) == {row.id}
    assert await kept(session, SearchFilters(session_keys=[*names, "mine"], models=[*names, "mine"])) == {row.id}
    assert await kept(session, ~SearchFilters(source_ids=many, models=names)) == {row.id}


async def test_the_largest_combinations_can_be_asked(session: AsyncSession) -> None:
    row = await add(session, guild_id=7)
    full = SearchFilters(
        **dict.fromkeys(IDS, 8),
        source_ids=[1],
        source_types=["web_page"],
        since=JUNE,
        until=JUNE + DAY,
        metadata={"a": 1},
        session_keys=["one"],
        models=["model-a"],
        without=["guild_id"],
    )
    assert set(shape(full).fields) == set(SearchFilters.model_fields)
    wide = CombinedFilters(op="or", parts=[full] * (FILTER_MAX_PARTS - 1) + [SearchFilters(guild_id=7)])
    assert len(parameters(wide)) == 12 * (FILTER_MAX_PARTS - 1) + 1
    assert await kept(session, wide) == {row.id}

    deep: AnyFilters = SearchFilters(guild_id=7)
    for level in range(FILTER_MAX_DEPTH):
        others = SearchFilters(channel_id=1), SearchFilters(guild_id=7)
        deep = (deep | others[0]) if level % 2 else (deep & others[1])
    assert await kept(session, deep) == {row.id}
    deep = SearchFilters(guild_id=8)
    for _ in range(FILTER_MAX_DEPTH // 2):
        deep = ~(deep & SearchFilters(metadata={}))
    assert await kept(session, deep) == ({row.id} if (FILTER_MAX_DEPTH // 2) % 2 else set())


# Scope: no tenant sees another's


@settings(unhurried, max_examples=600)
@given(any_trees, st.lists(rows, min_size=1, max_size=8))
def test_what_is_accepted_as_scoped_stays_in_the_scopes_it_names(wanted: AnyFilters, some_rows: list[Row]) -> None:
    scopes = named_scopes(wanted)
    for row in some_rows if wanted.names_scope else ():
        assert not meets(row, wanted) or any(meets(row, scope) for scope in scopes)


@unhurried
@given(any_trees)
def test_what_keeps_a_stranger_names_no_scope(wanted: AnyFilters) -> None:
    """A row of nobody's, and one of somebody's that no filter here names, in every other respect alike."""
    others = itertools.product(
        (None, "model-a", "model-b"), list(SourceType)[:2], (None, JUNE, JUNE + 4 * DAY), ({}, {"a": 1, "b": True})
    )
    for model, kind, moment, metadata in others:
        described: dict[str, Any] = {
            "model": model,
            "type": kind,
            "occurred_from": moment,
            "occurred_to": moment,
            "metadata": metadata,
        }
        for owner in ({}, {**dict.fromkeys(IDS, 99), "session_key": "another's", "source_id": 99}):
            assert not (wanted.names_scope and meets(Row(**described, **owner), wanted))


# Shapes


@unhurried
@given(any_trees)
def test_a_shape_holds_no_value_and_no_order(wanted: AnyFilters) -> None:
    names = {*SearchFilters.model_fields, "fields", "and", "or", "not"}

    def strings(shape: Shape) -> set[str]:
        assert isinstance(shape, Shape)
        return {shape.op, *shape.fields}.union(*map(strings, shape.parts))

    assert strings(shape(wanted)) <= names
    assert shape(mirrored(wanted)) == shape(wanted)
    assert hash(shape(mirrored(wanted))) == hash(shape(wanted))
    sql, positions = compiled(shape(wanted))
    assert compiled(shape(mirrored(wanted))) == (sql, positions)
    assert list(parameters(wanted)) == [f"f{index}" for index in range(len(positions))]


@unhurried
@given(any_trees)
def test_what_keeps_everything_has_no_condition(wanted: AnyFilters) -> None:
    assert wanted.is_empty is (shape(wanted) == EVERYTHING) is (conditions(shape(wanted)) == [])


def test_other_values_have_the_same_shape() -> None:
    a, b = SearchFilters(guild_id=1, models=["x"]), SearchFilters(guild_id=2, models=["y", "z"])
    assert shape(a) == shape(b) == Shape("fields", ("guild_id", "models"))
    c = SearchFilters(session_keys=["k"])
    assert shape(a | c) == shape(c | b)
    assert shape(a & (b & c)) == shape((c & a) & b)
    assert shape(a & c) != shape(a | c)
    nested = CombinedFilters(op="and", parts=(a, CombinedFilters(op="and", parts=(b, c))))
    assert shape(nested) == shape(c & b & a)
    assert shape(~~(a | b) | c) == shape(a | b | c)
    assert shape(~a) != shape(a) == shape(~~a)
    assert shape(SearchFilters()) == EVERYTHING
    # Which values belong to which part: the parts are ordered by shape, those of one shape as given.
    assert parameters(c | b | a) == {"f0": 2, "f1": ["y", "z"], "f2": 1, "f3": ["x"], "f4": ["k"]}
    assert parameters(a | c | b) == {"f0": 1, "f1": ["x"], "f2": 2, "f3": ["y", "z"], "f4": ["k"]}


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda a, empty: a & empty, Shape("fields", ("guild_id",))),
        (lambda a, empty: empty & a & empty, Shape("fields", ("guild_id",))),
        (lambda a, empty: a | empty, EVERYTHING),
        (lambda a, empty: ~empty, NOTHING),
        (lambda a, empty: ~~empty, EVERYTHING),
        (lambda a, empty: a & ~empty, NOTHING),
        (lambda a, empty: a | ~empty, Shape("fields", ("guild_id",))),
        (lambda a, empty: empty & empty, EVERYTHING),
        (lambda a, empty: ~empty | ~empty, NOTHING),
        (lambda a, empty: ~(a | empty), NOTHING),
        (lambda a, empty: ~(a & ~empty), EVERYTHING),
        (lambda a, empty: CombinedFilters(op="or", parts=[a]), Shape("fields", ("guild_id",))),
        (lambda a, empty: CombinedFilters(op="or", parts=[empty]), EVERYTHING),
    ],
)
async def test_an_empty_filter_in_combinations(
    session: AsyncSession, combine: Callable[..., AnyFilters], expected: Shape
) -> None:
    mine, other = await add(session, guild_id=1), await add(session)
    wanted = combine(SearchFilters(guild_id=1), SearchFilters())
    assert shape(wanted) == expected
    found = {EVERYTHING: {mine.id, other.id}, NOTHING: set()}.get(expected, {mine.id})
    assert await kept(session, wanted) == found
    assert wanted.is_empty is (expected == EVERYTHING)


def test_every_field_is_translated() -> None:
    assert set(filters._FIELDS) == set(SearchFilters.model_fields)


def test_a_single_filter_is_a_plain_conjunction() -> None:
    for fields in [*FIELDS, {"source_ids": [1]}]:
        sql, _ = compiled(shape(SearchFilters(**fields)))
        assert not {"NOT", "OR", "COALESCE", "IS"} & set(sql.upper().replace("(", " ").split()), sql


def test_values_are_what_the_driver_takes() -> None:
    class Key(str):
        __slots__ = ()

    wanted = SearchFilters(
        source_ids=[1], source_types=[SourceType.WEB_PAGE], session_keys=[Key("k")], metadata={"語": 1}
    )
    values = parameters(wanted)
    assert list(values.values()) == [[1], ["web_page"], ["k"], '{"語":1}']
    assert [type(value[0]) for value in (values["f0"], values["f1"], values["f2"])] == [int, str, str]


@pytest.mark.parametrize("wanted", [None, {}, {"guild_id": 1}, SearchFilters, Shape("fields")])
def test_only_filters_have_a_shape(wanted: Any) -> None:
    for function in (shape, parameters):
        with pytest.raises(InvalidInputError, match="filters must be SearchFilters"):
            function(wanted)


async def test_a_statement_may_read_the_sources_itself(session: AsyncSession) -> None:
    mine, other = await add(session, session_key="one"), await add(session, session_key="two")
    wanted = SearchFilters(session_keys=["one"])
    joined = select(KnowledgeChunk.id).join(KnowledgeSource, KnowledgeSource.id == KnowledgeChunk.source_id)
    for expected, asked in (([mine.id], wanted), ([other.id], ~wanted)):
        statement = joined.where(*conditions(shape(asked)))
        assert list((await session.execute(statement, parameters(asked))).scalars()) == expected


# Plans


@pytest.mark.role("superuser")
async def test_sources_are_looked_up_where_a_filter_is_negated_or_an_alternative(session: AsyncSession) -> None:
    """More sources than fit into work_mem: an IN would be compared with them one by one."""
    connection = await session.connection()
    for statement in (
        "INSERT INTO knowledge_sources (type, title, origin_session_key) SELECT CASE WHEN i % 10 = 0 THEN 'web_page'"
        " ELSE 'discord_session' END::source_type_enum, 'title', 'key ' || i FROM generate_series(1, 10000) i",
        "INSERT INTO knowledge_chunks (source_id, content, guild_id) SELECT id, 'c', id % 10 FROM knowledge_sources",
        "ANALYZE knowledge_sources, knowledge_chunks",
        "SET LOCAL work_mem = '64kB'",
    ):
        await session.execute(text(statement))
    talks = SearchFilters(source_types=["discord_session"])
    guild = SearchFilters(guild_id=1)

    async def plan(wanted: AnyFilters) -> str:
        sql, names = compiled(shape(wanted))
        arguments = tuple(parameters(wanted)[name] for name in names)
        return "\n".join(row[0] for row in await connection.exec_driver_sql(f"EXPLAIN {sql}", arguments))

    for wanted in (guild & ~talks, guild & (talks | SearchFilters(channel_id=1)), ~talks):
        assert "knowledge_sources_pkey" in await plan(wanted)
    # Expected to be rare, since the planner sees the value.
    assert "Seq Scan" not in await plan(SearchFilters(source_types=["image_caption"]))
    assert "idx_sources_origin_session_key" in await plan(SearchFilters(session_keys=["key 77"]))
    assert "idx_chunks_guild_id" in await plan(guild)


async def test_without(session: AsyncSession) -> None:
    """Chunks that have none of the named ids; a document of a guild that is of no channel, say."""
    of_guild = await add(session, guild_id=7)
    of_channel = await add(session, guild_id=7, channel_id=8)
    of_user = await add(session, user_id=9)
    assert await kept(session, SearchFilters(guild_id=7, without=["channel_id"])) == {of_guild.id}
    assert await kept(session, SearchFilters(without=["guild_id"])) == {of_user.id}
    assert await kept(session, SearchFilters(guild_id=7) & ~SearchFilters(without=["channel_id"])) == {of_channel.id}
    assert await kept(session, SearchFilters(without=["user_id", "channel_id"])) == {of_guild.id}
    assert not SearchFilters(without=["guild_id"]).names_scope
    with pytest.raises(InvalidInputError, match="without"):
        SearchFilters(without=["source_id"])
