"""What comes in is validated; what was stored by anybody can be read."""

import functools
import itertools
import json
import math
import operator
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kotonoha_store import InvalidInputError, Message, Scope, SearchFilters, SourceType
from kotonoha_store.checks import BIGINT_MAX, JSON_MAX_DEPTH, check_count, check_json, check_number, check_text, in_utc
from kotonoha_store.search_records import FILTER_MAX_DEPTH, FILTER_MAX_PARTS, AnyFilters, CombinedFilters

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
instants = st.datetimes(
    min_value=datetime(1, 1, 3),  # noqa: DTZ001
    max_value=datetime(9999, 12, 29),  # noqa: DTZ001
    timezones=st.timezones() | st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
)
messages = st.builds(
    Message,
    role=texts.filter(lambda text: 1 <= len(text) <= 64),
    content=texts,
    timestamp=instants | st.none(),
    author=texts | st.none(),
    message_id=st.integers(-BIGINT_MAX - 1, BIGINT_MAX) | texts | st.none(),
    metadata=st.dictionaries(texts, json_values, max_size=4),
)


class Role(StrEnum):
    USER = "person"


def nested(depth: int, value: Any = 1) -> Any:
    for _ in range(depth):
        value = {"a": value}
    return value


# Messages


@unhurried
@given(messages)
def test_a_message_survives_its_stored_form(message: Message) -> None:
    stored = message.to_stored()
    check_json(stored)
    # Through JSON text, as the database sends it.
    assert Message.from_stored(json.loads(json.dumps(stored))) == message


@unhurried
@given(
    st.dictionaries(st.sampled_from([*Message.model_fields, "x", "stored.x", "self", "cls", ""]) | texts, json_values)
    | json_values
)
def test_anything_stored_becomes_a_message_that_holds_all_of_it(data: Any) -> None:
    message = Message.from_stored(data)
    again = Message.from_stored(json.loads(json.dumps(message.to_stored())))
    assert again == message
    if not isinstance(data, dict):
        assert message.metadata == {"stored": data}
        return
    given_metadata = data.get("metadata") if isinstance(data.get("metadata"), dict) else {}
    kept = list(message.metadata.values())
    for name, value in given_metadata.items():
        assert message.metadata[name] == value
    for name, value in data.items():
        if value is None and name in Message.model_fields:
            continue
        if name == "metadata" and isinstance(value, dict):
            continue
        is_field = name in Message.model_fields and name != "metadata" and value_of(message, name) == value
        # A time is kept as an instant, not as it was written.
        assert is_field or value in kept or (name == "timestamp" and message.timestamp is not None)


def value_of(message: Message, name: str) -> Any:
    return message.to_stored().get(name, getattr(message, name))


def test_absent_fields_are_not_stored() -> None:
    now = datetime(2024, 1, 1, tzinfo=UTC)
    assert Message.user("x", timestamp=now).to_stored() == {
        "role": "user",
        "content": "x",
        "timestamp": "2024-01-01T00:00:00Z",
    }
    assert Message.user("", timestamp=None, metadata={"a": None}).to_stored() == {
        "role": "user",
        "content": "",
        "metadata": {"a": None},
    }


def test_the_time_is_now_and_knows_its_zone() -> None:
    before = datetime.now(UTC)
    stamp = Message.user("x").timestamp
    assert stamp is not None
    assert before <= stamp <= datetime.now(UTC)


def test_times_are_kept_to_the_second_of_old_offsets() -> None:
    old = datetime(1880, 1, 1, tzinfo=ZoneInfo("Asia/Tokyo"))
    message = Message.user("x", timestamp=old)
    assert message.timestamp == old
    assert Message.from_stored(message.to_stored()).timestamp == old


def test_an_enum_of_strings_is_text() -> None:
    message = Message(role=Role.USER, content="x")
    assert message.to_stored()["role"] == "person"
    assert Message.from_stored(message.to_stored()) == message


def test_shorthands() -> None:
    for role in ("user", "assistant", "system"):
        message = getattr(Message, role)("x", author="a")
        assert (message.role, message.content, message.author) == (role, "x", "a")


@pytest.mark.parametrize("field", ["role", "content", "author", "message_id"])
@pytest.mark.parametrize("bad", ["a\x00", "\ud800", "ok\udfff", b"bytes", 1.5, ["x"]])
def test_text_that_cannot_be_stored_is_refused(field: str, bad: Any) -> None:
    with pytest.raises(InvalidInputError, match=field):
        Message(**{"role": "user", "content": "x", field: bad})


@pytest.mark.parametrize(
    "fields",
    [
        {"role": ""},
        {"role": "x" * 65},
        {"role": None},
        {"content": None},
        {"message_id": 2**63},
        {"message_id": -(2**63) - 1},
        {"message_id": True},
        {"timestamp": datetime(2024, 1, 1)},  # noqa: DTZ001
        {"timestamp": "2024-01-01T00:00:00"},
        {"timestamp": "0001-01-01T00:00:00+14:00"},
        {"timestamp": "9999-12-31T23:59:59-14:00"},
        {"metadata": {"a": {"b": ["\x00"]}}},
        {"metadata": {"\ud800": 1}},
        {"metadata": {"x": math.nan}},
        {"metadata": {"x": -math.inf}},
        {"metadata": {"x": object()}},
        {"metadata": {1: 1}},
        {"metadata": nested(JSON_MAX_DEPTH + 1)},
        {"metadata": ["x"]},
        {"metadata": None},
        {"unheard_of": 1},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_bad_message_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"invalid Message: {next(iter(fields))}") as caught:
        Message(**{"role": "user", "content": "x", **fields})
    assert len(str(caught.value)) < 400


def test_errors_do_not_repeat_private_text() -> None:
    with pytest.raises(InvalidInputError) as caught:
        Message(role="user", content="my secret\x00", metadata={"k": "my secret\x00"})
    assert "secret" not in str(caught.value)
    assert "content" in str(caught.value)
    assert "metadata" in str(caught.value)


def test_a_message_does_not_change() -> None:
    message = Message.user("x")
    with pytest.raises(ValidationError):
        message.content = "y"


def test_64_bit_ids_stay_numbers() -> None:
    for number in (2**63 - 1, -(2**63), 0):
        stored = Message.user("x", message_id=number).to_stored()
        assert stored["message_id"] == number
        assert Message.from_stored(stored).message_id == number
    assert Message.user("x", message_id="12").message_id == "12"


def test_what_fits_no_message_is_kept_as_text() -> None:
    for data in ({"role": "user", "x": nested(300)}, [nested(300)], {"content": "x", "metadata": {"n": math.inf}}):
        kept = Message.from_stored(data).metadata["stored"]
        assert isinstance(kept, str)
        assert json.loads(kept) == data


def test_names_that_are_taken_are_not_overwritten() -> None:
    message = Message.from_stored(
        {"x": 1, "stored.x": 2, "role": 3, "metadata": {"x": 4, "role": 5, "stored.stored.x": 6}}
    )
    assert message.metadata == {
        "x": 4,
        "stored.x": 1,
        "stored.stored.x": 6,
        "stored.stored.stored.x": 2,
        "role": 5,
        "stored.role": 3,
    }


# Filters


@pytest.mark.parametrize(
    "fields",
    [
        {"author_id": 1},
        {"guild": 1},
        {"guild_id": "1"},
        {"guild_id": 1.0},
        {"guild_id": True},
        {"guild_id": 2**63},
        {"channel_id": [1]},
        {"source_ids": 1},
        {"source_ids": ["1"]},
        {"source_ids": [2**63]},
        {"source_types": "web_page"},
        {"source_types": ["unheard_of"]},
        {"since": datetime(2024, 1, 1)},  # noqa: DTZ001
        {"until": "yesterday"},
        {"metadata": "x"},
        {"metadata": {"a": "\x00"}},
        {"metadata": {"a": MappingProxyType({})}},
        {"metadata": {"a": math.nan}},
        {"metadata": {"a": "\ud800"}},
        {"metadata": {"\x00": 1}},
        {"metadata": {1: 1}},
        {"metadata": [1]},
        pytest.param({"metadata": {"a": 10**5000}}, id="5001 digits"),
        {"user_id": -(2**63) - 1},
        {"thread_id": "5"},
        {"source_ids": "12"},
        {"source_ids": [True]},
        {"source_ids": [1.0]},
        {"session_key": "one"},
        {"session_keys": "one"},
        {"session_keys": b"one"},
        {"session_keys": [1]},
        {"session_keys": [None]},
        {"session_keys": ["a\x00b"]},
        {"session_keys": ["\ud800"]},
        {"session_keys": {"one": 1}},
        {"models": "model-a"},
        {"models": [b"model-a"]},
        {"models": ["\udfff"]},
        {"models": ["\x00"]},
        {"models": 1},
    ],
    ids=ascii,
)
def test_unknown_and_ill_typed_filters_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"invalid SearchFilters: {next(iter(fields))}"):
        SearchFilters(**fields)


def test_filters_are_read() -> None:
    filters = SearchFilters(
        guild_id=BIGINT_MAX,
        source_ids=[1, 2],
        source_types=["web_page", SourceType.DOCUMENT_FILE],
        since="2024-01-01T09:00:00+09:00",
        metadata={"a": [1, "1", None]},
        session_keys=["会話", "one"],
        models={"model-a"},
    )
    assert (filters.session_keys, filters.models) == (("会話", "one"), ("model-a",))
    assert (filters.guild_id, filters.source_ids) == (BIGINT_MAX, (1, 2))
    assert filters.source_types == (SourceType.WEB_PAGE, SourceType.DOCUMENT_FILE)
    assert filters.since == datetime(2024, 1, 1, tzinfo=UTC)
    assert filters.metadata == {"a": [1, "1", None]}


@pytest.mark.parametrize("value", [5, 1.7e9, True, "2024-01-01T09:00:00", datetime(2024, 1, 1)])  # noqa: DTZ001
def test_a_time_is_no_number_and_has_its_zone(value: object) -> None:
    with pytest.raises(InvalidInputError, match="since"):
        SearchFilters(since=value)


def test_a_time_range_has_a_beginning_and_an_end() -> None:
    now = datetime.now(UTC)
    SearchFilters(since=now, until=now + timedelta(microseconds=1))
    for until in (now, now - timedelta(days=1)):
        with pytest.raises(InvalidInputError, match="since must lie before until"):
            SearchFilters(since=now, until=until)


@pytest.mark.parametrize(
    ("fields", "names_scope", "is_empty"),
    [
        ({}, False, True),
        ({"guild_id": 0}, True, False),
        ({"channel_id": 1}, True, False),
        ({"thread_id": 1}, True, False),
        ({"user_id": 1}, True, False),
        ({"source_ids": ()}, True, False),
        ({"session_keys": ["one"]}, True, False),
        ({"session_keys": ()}, True, False),
        ({"models": ["model-a"]}, False, False),
        ({"models": ()}, False, False),
        ({"source_types": ["web_page"]}, False, False),
        ({"metadata": {"a": 1}}, False, False),
        ({"since": datetime(2024, 1, 1, tzinfo=UTC)}, False, False),
    ],
)
def test_what_names_a_scope(fields: dict[str, Any], names_scope: bool, is_empty: bool) -> None:
    filters = SearchFilters(**fields)
    assert (filters.names_scope, filters.is_empty) == (names_scope, is_empty)


def test_filters_are_compared_by_value() -> None:
    one, same = (SearchFilters(guild_id=1, metadata={"a": 1, "b": [1]}) for _ in range(2))
    assert one == same
    assert len({one, same}) == 1
    assert one == SearchFilters(guild_id=1, metadata={"b": [1], "a": 1})
    # Equal to Python, but not to PostgreSQL.
    assert one != SearchFilters(guild_id=1, metadata={"a": True, "b": [1]})
    assert one != SearchFilters(guild_id=1, metadata={"a": 1, "b": [True]})
    assert SearchFilters(metadata={}) != SearchFilters()
    assert one != ~one != ~~one
    assert {one & ~same: 1}[same & ~one] == 1
    assert one != one.model_dump()


def test_filters_cannot_be_changed_and_keep_nothing_of_the_callers() -> None:
    tags = ["x"]
    filters = SearchFilters(guild_id=1, metadata={"tags": tags})
    tags.append("y")
    assert filters.metadata == {"tags": ["x"]}
    combined = filters | SearchFilters(guild_id=2)
    for target, name in ((filters, "guild_id"), (combined, "op"), (combined, "parts")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, None)


guild, channel, model = SearchFilters(guild_id=1), SearchFilters(channel_id=2), SearchFilters(models=["model-a"])
empty = SearchFilters()


def test_operators_join_what_they_are_given() -> None:
    assert guild & channel == CombinedFilters(op="and", parts=(guild, channel))
    assert guild | channel == CombinedFilters(op="or", parts=[guild, channel])
    assert ~guild == CombinedFilters(op="not", parts=(guild,))
    assert ~guild & channel | model == CombinedFilters(
        op="or", parts=(CombinedFilters(op="and", parts=(~guild, channel)), model)
    )
    assert (
        guild & (channel & model)
        == (guild & channel) & model
        == CombinedFilters(op="and", parts=(guild, channel, model))
    )
    assert (guild | channel) & model == CombinedFilters(
        op="and", parts=(CombinedFilters(op="or", parts=(guild, channel)), model)
    )
    assert ~~guild == CombinedFilters(op="not", parts=(CombinedFilters(op="not", parts=(guild,)),))


@pytest.mark.parametrize("filters", [guild, empty, guild | channel, ~guild])
def test_filters_are_neither_true_nor_false(filters: AnyFilters) -> None:
    """By Python's own `and`, `or`, `not` one of them would be lost, and with it a scope."""
    for ask in (lambda: filters and channel, lambda: filters or channel, lambda: not filters, lambda: bool(filters)):
        with pytest.raises(InvalidInputError, match=r"& \| ~"):
            ask()


@pytest.mark.parametrize(
    "other", [None, {}, {"guild_id": 1}, 1, True, "x", [guild], {guild}, SearchFilters, Message.user("x")]
)
def test_filters_combine_with_filters_only(other: Any) -> None:
    for filters in (guild, guild | channel):
        for combine in (operator.and_, operator.or_):
            for left, right in ((filters, other), (other, filters)):
                with pytest.raises(InvalidInputError, match=f"expected SearchFilters .*not {type(other).__name__}"):
                    combine(left, right)


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "and", "parts": ()},
        {"op": "or", "parts": ()},
        {"op": "not", "parts": ()},
        {"op": "not", "parts": (guild, channel)},
        {"op": "xor", "parts": (guild, channel)},
        {"op": "and", "parts": guild},
        {"op": "and", "parts": None},
        {"op": "and", "parts": ({"guild_id": 1},)},
        {"op": "and", "parts": (guild, None)},
        {"op": "and"},
        {"op": "and", "parts": (guild,), "guild_id": 1},
    ],
    ids=str,
)
def test_combinations_of_nothing_or_of_something_else_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="invalid CombinedFilters"):
        CombinedFilters(**fields)


def test_combinations_are_bounded() -> None:
    with pytest.raises(InvalidInputError, match="at least 1 item"):
        CombinedFilters(op="or", parts=())
    guilds = [SearchFilters(guild_id=number) for number in range(FILTER_MAX_PARTS)]
    all_of_them = functools.reduce(operator.or_, guilds)
    assert len(all_of_them.parts) == FILTER_MAX_PARTS
    for too_many in (
        lambda: all_of_them | guild,
        lambda: all_of_them & guild,
        lambda: CombinedFilters(op="or", parts=[*guilds, guild]),
        lambda: CombinedFilters(op="and", parts=(guild for _ in itertools.count())),
    ):
        with pytest.raises(InvalidInputError, match="100"):
            too_many()
    deep: Any = guild
    for _ in range(FILTER_MAX_DEPTH):
        deep = ~deep
    for too_deep in (lambda: ~deep, lambda: deep & guild, lambda: guild | deep):
        with pytest.raises(InvalidInputError, match="at most 32 levels"):
            too_deep()


@pytest.mark.parametrize(
    ("filters", "names_scope", "is_empty"),
    [
        (guild & model, True, False),
        (model & guild, True, False),
        (model & model, False, False),
        (guild & empty, True, False),
        (guild & ~guild, True, False),
        (guild & (model | empty), True, False),
        (guild | channel, True, False),
        (guild | model, False, False),
        (model | guild, False, False),
        (guild | empty, False, True),
        (guild | ~empty, False, False),
        (guild | ~channel, False, False),
        (guild & model | channel, True, False),
        ((guild | model) & channel, True, False),
        ((guild | model) & (channel | model), False, False),
        (guild | channel & ~guild, True, False),
        (~guild, False, False),
        (~~guild, False, False),
        (~model, False, False),
        (~(~guild | ~channel), False, False),
        (~empty, False, False),
        (~~empty, False, True),
        (empty & empty, False, True),
        (empty | model, False, True),
        (~(guild & ~empty), False, True),
        (~(model | ~~empty), False, False),
        (~(guild & ~guild), False, False),
        (CombinedFilters(op="or", parts=[model]), False, False),
        (CombinedFilters(op="or", parts=[guild]), True, False),
        (CombinedFilters(op="and", parts=[empty]), False, True),
    ],
    ids=lambda value: "" if isinstance(value, CombinedFilters) else str(value),
)
def test_which_combinations_name_a_scope(filters: CombinedFilters, names_scope: bool, is_empty: bool) -> None:
    """guild scope is named only where nothing outside of the named scopes can be kept."""
    assert (filters.names_scope, filters.is_empty) == (names_scope, is_empty)


@pytest.mark.parametrize("name", ["guild_id", "channel_id", "thread_id", "user_id"])
def test_a_scope_holds_64_bit_integers(name: str) -> None:
    for value in (BIGINT_MAX, -BIGINT_MAX - 1, 0, None):
        assert getattr(Scope(**{name: value}), name) == value
    for bad in (BIGINT_MAX + 1, -BIGINT_MAX - 2, True, 1.0, "1"):
        with pytest.raises(InvalidInputError, match=name):
            Scope(**{name: bad})


# Checks


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("\x00", "value holds a NUL character at position 0"),
        ({"a": ["x", {"b": "y\x00"}]}, r"value\.a\[1\]\.b holds a NUL character at position 1"),
        ([["\ud800"]], r"value\[0\]\[0\] holds a lone surrogate at position 0"),
        ({"a": {"b\x00": 1}}, r"a key of value\.a holds a NUL"),
        ({"a": {1: 1}}, r"value\.a has the key 1; JSON keys are strings"),
        ({"a": (1, math.nan)}, r"value\.a\[1\] is nan"),
        ([math.inf], r"value\[0\] is inf"),
        ([-math.inf], r"value\[0\] is -inf"),
        ({"a": {1, 2}}, r"value\.a is of type set"),
        ({"a": datetime(2024, 1, 1, tzinfo=UTC)}, r"value\.a is of type datetime"),
        ({"a": MappingProxyType({})}, r"value\.a is of type mappingproxy"),
        (b"x", "value is of type bytes"),
        (nested(JSON_MAX_DEPTH + 1), "more than 200 levels"),
    ],
)
def test_what_json_cannot_hold_is_named_by_its_path(value: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_json(value, "value")


@pytest.mark.parametrize("again", [lambda loop: [loop], lambda loop: {"a": loop}, lambda loop: [loop, loop]])
def test_what_contains_itself_is_refused(again: Any) -> None:
    loop: list[Any] = []
    loop.append(again(loop))
    with pytest.raises(InvalidInputError, match="levels"):
        check_json(loop)


@unhurried
@given(json_values)
def test_all_json_passes(value: Any) -> None:
    check_json(value)


def test_the_deepest_and_the_widest_that_pass() -> None:
    check_json(nested(JSON_MAX_DEPTH))
    check_json([[]] * 100_000)
    json.dumps(nested(JSON_MAX_DEPTH))
    Message.user("x", metadata=nested(JSON_MAX_DEPTH))


@unhurried
@given(st.text())
def test_text_passes_exactly_when_postgresql_can_store_it(value: str) -> None:
    is_bad = "\x00" in value or any(0xD800 <= ord(character) <= 0xDFFF for character in value)
    if is_bad:
        with pytest.raises(InvalidInputError, match=r"text holds a .* at position \d+"):
            check_text(value)
    else:
        assert check_text(value) is value


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_number_too_long_for_a_float_is_out_of_range(value: int) -> None:
    for check in (check_number, check_count):
        with pytest.raises(InvalidInputError, match="from 0 to 1, got"):
            check(value, "share", 0, 1)


def test_a_time_without_a_zone_is_no_instant() -> None:
    with pytest.raises(InvalidInputError, match="time zone"):
        in_utc(datetime(2024, 1, 1))  # noqa: DTZ001
    assert in_utc(datetime(2024, 1, 1, 9, tzinfo=ZoneInfo("Asia/Tokyo"))) == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("instant", [datetime.min, datetime.max])  # noqa: DTZ901
def test_the_ends_of_time_are_refused(instant: datetime) -> None:
    with pytest.raises(InvalidInputError, match="infinity"):
        Message.user("a", timestamp=instant.replace(tzinfo=UTC))
