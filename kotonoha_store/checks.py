"""What PostgreSQL can store: values refused before they are sent."""

from datetime import UTC, datetime
from numbers import Real
from typing import Any

from kotonoha_store.errors import InvalidInputError

BIGINT_MAX = 2**63 - 1
JSON_MAX_DEPTH = 200  # pydantic refuses more than 255, Python's json a little more


def check_id(value: int, what: str = "id") -> int:
    """Return ``value`` if it is a 64-bit integer.

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -BIGINT_MAX - 1 <= value <= BIGINT_MAX:
        raise InvalidInputError(f"{what} must be a 64-bit integer, not {value!r}")
    return value


def check_number(value: Any, what: str, least: float, most: float) -> float:
    """Return ``value`` if it is a number from ``least`` to ``most``.

    Raises:
        InvalidInputError: it is not.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # Compared as it is: a whole number may be too long for a float.
    if not is_number or not least <= value <= most:
        raise InvalidInputError(f"{what} must be a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


def check_count(value: object, what: str, least: int, most: int) -> int:
    """Return ``value`` if it is a whole number from ``least`` to ``most``.

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidInputError(f"{what} must be a whole number from {least} to {most}, got {value!r}")
    return value


def check_text(value: str, what: str = "text") -> str:
    """Return ``value`` if PostgreSQL can store it as UTF-8 text.

    Raises:
        InvalidInputError: it is no text, or holds NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{what} must be text, not {type(value).__name__}")
    if "\x00" in value:
        raise InvalidInputError(
            f"{what} holds a NUL character at position {value.index(chr(0))}, which PostgreSQL cannot store; remove it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{what} holds a lone surrogate at position {error.start}, which is not valid Unicode; "
            "decode the input with errors='replace'"
        ) from None
    return value


def check_json(value: object, what: str = "JSON value") -> None:
    """Refuse what ``jsonb`` would refuse, before the server does.

    Raises:
        InvalidInputError: NUL or a lone surrogate in a key or string, NaN or infinity, a value that
            JSON does not know, or nesting deeper than :data:`JSON_MAX_DEPTH` (a value that contains
            itself, too); the message gives the path to it.
    """
    # A stack and not recursion: the nesting depth is the caller's.
    stack: list[tuple[object, str, int]] = [(value, what, 0)]
    while stack:
        item, path, depth = stack.pop()
        if depth > JSON_MAX_DEPTH:
            raise InvalidInputError(f"{what} is nested more than {JSON_MAX_DEPTH} levels deep")
        if isinstance(item, str):
            check_text(item, path)
        elif item is None or isinstance(item, (bool, int)):
            continue
        elif isinstance(item, float):
            if item != item or item in (float("inf"), float("-inf")):
                raise InvalidInputError(f"{path} is {item}, which JSON cannot hold")
        elif isinstance(item, dict):
            for key, inner in item.items():
                if not isinstance(key, str):
                    raise InvalidInputError(f"{path} has the key {key!r}; JSON keys are strings")
                check_text(key, f"a key of {path}")
                stack.append((inner, f"{path}.{key}", depth + 1))
        elif isinstance(item, (list, tuple)):
            stack.extend((inner, f"{path}[{index}]", depth + 1) for index, inner in enumerate(item))
        else:
            raise InvalidInputError(f"{path} is of type {type(item).__name__}, which JSON cannot hold")


def in_utc(value: datetime) -> datetime:
    """Return the same instant in UTC: PostgreSQL keeps no offset, and JSON none of odd seconds.

    Raises:
        InvalidInputError: it has no time zone, or lies outside the years 1 to 9999.
    """
    if value.utcoffset() is None:
        raise InvalidInputError("a time needs its time zone, such as tzinfo=datetime.UTC")
    try:
        instant = value.astimezone(UTC)
    except OverflowError:
        raise InvalidInputError("a time lies outside the years 1 to 9999 in UTC") from None
    if instant.replace(tzinfo=None) in (datetime.min, datetime.max):  # noqa: DTZ901  compared without zones
        raise InvalidInputError("the first and the last instant that datetime knows mean infinity to PostgreSQL")
    return instant
