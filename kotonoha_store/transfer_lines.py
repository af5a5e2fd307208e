"""The lines of an export, read and checked: what each column needs, which lines belong together, what is damaged."""

import base64
import binascii
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias
from uuid import UUID

import numpy as np
from sqlalchemy import BigInteger, Column, DateTime, Enum, Integer, LargeBinary, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from kotonoha_store import migrations
from kotonoha_store.checks import BIGINT_MAX, check_json, check_text, in_utc
from kotonoha_store.columns import EMBEDDING_DIMENSION, HalfVector, PackedVector, pack_vector
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.lines import raw_lines, unpacked
from kotonoha_store.transfer import FORMAT, SEQUENCES, TABLES

# Beyond, no row of a live sequence is: what asks for more would use it up.
_SEQUENCE_MAX: Final = 2**62
# Of which sequence the ids are that a line keeps.
_KEPT: Final = {
    "session": {"id": "session"},
    "source": {"id": "source", "origin_session_id": "session"},
    "chunk": {"id": "chunk"},
    "dead_letter": {"id": "dead_letter", "original_chunk_id": "chunk"},
    "pause": {},
}
# Digits before the decimal point: what Python's int() takes, so that the row can be read again; PostgreSQL would store
# 131072. After it: PostgreSQL, "Numeric Types".
_DIGITS_BEFORE: Final = 4300
_DIGITS_AFTER: Final = 16383
_BEGIN: Final = b'{"kotonoha_store":'
_END: Final = b'{"end":'
_UNREADABLE: Final = "line"
_DAMAGED: Final = (EOFError, gzip.BadGzipFile, zlib.error)

Values: TypeAlias = dict[str, Any]


class Bad(NamedTuple):
    """The first line of a unit that cannot be stored, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What a file holds, before anything of it is written.

    Attributes:
        header: its first line.
        problem: why it is not whole; None where the last line is there and agrees with all before it.
        bad: what cannot be stored, by the line that its unit begins with.
        lines: rows, bad ones included.
        largest: the largest ids, by the kind whose sequence gave them.
    """

    header: Mapping[str, Any]
    problem: str | None
    bad: Mapping[int, Bad]
    lines: int
    largest: Mapping[str, int]


class Line(NamedTuple):
    """A row, and what it belongs to.

    Attributes:
        unit: the line that begins what goes in whole or not at all: itself, or the source before it.
        reason: why it cannot be stored; None where it can.
    """

    unit: int
    number: int
    kind: str
    values: Values
    reason: str | None
    raw: bytes


def is_export(path: Path) -> bool:
    """Whether the file begins as an export does.

    Raises:
        InvalidInputError: it cannot be read.
    """
    with readable(path), suppress(*_DAMAGED), unpacked(path) as file:
        return bool(file.read(len(_BEGIN)) == _BEGIN)
    return False


def check_export(path: Path) -> FileCheck:
    """Read all of an export and check every line; nothing is written. Takes as long as reading and parsing takes.

    Raises:
        InvalidInputError: the file cannot be read, is no export, or a newer one.
    """
    digest = hashlib.sha256()
    header: Mapping[str, Any] | None = None
    problem: str | None = "its last line is missing: it was cut off"
    lines = 0

    def rows() -> Iterator[tuple[int, bytes]]:
        nonlocal header, problem, lines
        for number, line in raw_lines(path):
            if header is None:
                header = read_header(line, path)
            elif line.startswith(_END):
                problem = end_problem(line, number - 1, digest.hexdigest())
                return
            else:
                lines += 1
                yield number, line
            digest.update(line)

    bad: dict[int, Bad] = {}
    largest: dict[str, int] = {}
    with readable(path):
        try:
            for line in _in_units(rows()):
                if line.reason is not None:
                    bad.setdefault(line.unit, Bad(line.number, line.reason))
                    continue
                for name, kind in _KEPT[line.kind].items():
                    largest[kind] = max(largest.get(kind, 0), line.values[name] or 0)
        except _DAMAGED:
            problem = "its compression ends too early or is damaged"
    if header is None:
        raise InvalidInputError(f"{path.name} is empty or no export of kotonoha-store")
    return FileCheck(header, problem, bad, lines, largest)


def read_units(path: Path) -> Iterator[Line]:
    """The rows of an export that was checked, to where it is intact."""

    def rows() -> Iterator[tuple[int, bytes]]:
        for number, line in raw_lines(path):
            if line.startswith(_END):
                return
            if number > 1:
                yield number, line

    with readable(path), suppress(*_DAMAGED):
        yield from _in_units(rows())


def _in_units(rows: Iterable[tuple[int, bytes]]) -> Iterator[Line]:
    """Tell by the order of the lines which belong together."""
    unit = 0
    # Whose chunks and dead letters may follow: a source's id, of one that cannot be read an object like nothing else.
    source: object = None
    chunks: set[int] = set()
    for number, raw in rows:
        reason: str | None = None
        values: Values = {}
        try:
            kind, values = parse_line(raw)
            of_source: object = values.get("source_id")
            own_id: object = values.get("id")
        except BadLineError as error:
            kind, reason = error.kind or _UNREADABLE, str(error)
            of_source, own_id = error.number("source_id"), error.number("id") or object()
        # What cannot be read at all may be of the source before it.
        follows = source is not None and (
            kind in ("chunk", _UNREADABLE) or (kind == "dead_letter" and of_source == source)
        )
        if not follows:
            unit, source, chunks = number, own_id if kind == "source" else None, set()
        if kind == "chunk" and reason is None:
            if not follows or of_source != source:
                reason = "the chunk does not follow its source"
            elif values["id"] in chunks:
                reason = "two chunks have the same id"
            chunks.add(values["id"])
        yield Line(unit, number, kind, values, reason, raw)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around reading: what the system refuses, as this library's error."""
    try:
        yield
    except _DAMAGED:
        raise
    except OSError as error:
        raise InvalidInputError(f"{path.name} cannot be read ({error.strerror})") from None


class _Number(str):
    """A number of JSON, digit for digit."""

    __slots__ = ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_float=_Number, parse_int=_Number, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadLineError("the line is not UTF-8") from None
    except RecursionError:
        raise BadLineError("the line is nested too deeply") from None
    except ValueError:
        raise BadLineError("the line is no JSON") from None


def read_header(line: bytes, path: Path) -> Mapping[str, Any]:
    try:
        header = json.loads(line)["kotonoha_store"]
        version, dimension, revision = int(header["format"]), int(header["dimension"]), str(header["revision"])
        sequences = {kind: int(header["sequences"].get(kind, 0)) for kind in SEQUENCES}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidInputError(f"{path.name} is no export of kotonoha-store: its first line is no header") from None
    if version > FORMAT:
        raise InvalidInputError(
            f"{path.name} has the format {version}, and this version reads up to {FORMAT}; "
            "install a newer kotonoha-store"
        )
    if migrations.compare(revision).state == "newer":
        raise InvalidInputError(
            f"{path.name} was written at a revision that this version does not know; install the kotonoha-store that "
            "wrote it, or a newer one"
        )
    if dimension != EMBEDDING_DIMENSION:
        raise InvalidInputError(
            f"{path.name} holds vectors of {dimension} dimensions, and this version stores {EMBEDDING_DIMENSION}"
        )
    if not all(0 <= last < _SEQUENCE_MAX for last in sequences.values()):
        raise InvalidInputError(f"{path.name} has a header whose sequences are out of range")
    return {**header, "sequences": sequences}


def end_problem(line: bytes, lines: int, digest: str) -> str | None:
    try:
        end = json.loads(line)["end"]
        if int(end["lines"]) != lines:
            return f"it has {lines} lines before its last, and should have {int(end['lines'])}"
        return None if end["sha256"] == digest else "its checksum does not agree: it was changed or damaged"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its last line is damaged"


class BadLineError(InvalidInputError):
    """A line that cannot be stored.

    Attributes:
        kind: of the row, where that can be read.
        row: what was read of it.
    """

    def __init__(self, message: str, kind: str | None = None, row: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.row = row or {}

    def number(self, name: str) -> int | None:
        """A field of the row, if it is a whole number."""
        try:
            return _big(self.row.get(name), name)
        except InvalidInputError:
            return None


def parse_line(line: bytes) -> tuple[str, Values]:
    """Read a line; return its kind, and the values of its columns, ready for the driver.

    Raises:
        BadLineError: it is none, or holds what cannot be stored; the message names the field, never its value.
    """
    data = _parse(line)
    if not isinstance(data, dict) or len(data) != 1:
        raise BadLineError("the line is no object with one kind of row")
    ((kind, row),) = data.items()
    if kind not in TABLES or kind == "job":
        raise BadLineError("the line is of an unknown kind")
    if not isinstance(row, dict):
        raise BadLineError(f"{kind} is no object", kind)
    try:
        return kind, _checked(kind, row)
    except InvalidInputError as error:
        raise BadLineError(str(error), kind, row) from None


def _checked(kind: str, row: Mapping[str, Any]) -> Values:
    if kind != "chunk":
        values = _values(kind, row)
    else:
        row = dict(row)
        job = row.pop("job", None)
        values = _values(kind, row)
        if job is not None and not isinstance(job, dict):
            raise InvalidInputError("job is no object")
        values["job"] = None if job is None else _values("job", {**job, "chunk_id": row["id"]})
    _check_row(kind, values)
    return values


def _values(kind: str, row: Mapping[str, Any]) -> Values:
    columns = _DECODERS[kind]
    if unknown := len(row.keys() - columns.keys()):
        raise InvalidInputError(f"{kind} has {unknown} fields that this version does not know")
    values: Values = {}
    for name, (column, decode) in columns.items():
        value = row.get(name)
        if value is None:
            if not column.nullable:
                raise InvalidInputError(f"{kind}.{name} is missing")
            values[name] = None
            continue
        try:
            values[name] = decode(value, f"{kind}.{name}")
        except (ValueError, TypeError, OverflowError, binascii.Error) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"{kind}.{name} is not of the form that it is exported in") from None
    return values


def _check_row(kind: str, values: Values) -> None:
    """The rules of the tables, so that one row does not fail those written with it."""
    for name in _KEPT.get(kind, ()):
        if (values[name] or 0) >= _SEQUENCE_MAX:
            raise InvalidInputError(f"{kind}.{name} is larger than any id that was ever given")
    if kind == "session" and (values["last_archived_message_index"] < 0 or values["messages_offset"] < 0):
        raise InvalidInputError("session counts fewer than no messages")
    if kind == "source" and (values["origin_session_id"] is None) != (values["origin_first_index"] is None):
        raise InvalidInputError("source has an origin that is not whole")
    if kind == "chunk":
        if values["embedding"] is not None and values["embedding_model"] is None:
            raise InvalidInputError("chunk has a vector of no model")
        if values["embedding"] is not None and values["job"] is not None:
            raise InvalidInputError("chunk has a vector and waits for one")


def _whole_number(value: Any, what: str, least: int, most: int) -> int:
    if not isinstance(value, _Number) or not re.fullmatch(r"-?[0-9]{1,19}", value) or not least <= int(value) <= most:
        raise InvalidInputError(f"{what} must be a whole number from {least} to {most}")
    return int(value)


def _big(value: Any, what: str) -> int:
    return _whole_number(value, what, -BIGINT_MAX - 1, BIGINT_MAX)


def _small(value: Any, what: str) -> int:
    return _whole_number(value, what, -(2**31), 2**31 - 1)


def _text(value: Any, what: str) -> str:
    if isinstance(value, _Number):
        raise InvalidInputError(f"{what} must be text")
    return check_text(value, what)


def _moment(value: Any, what: str) -> datetime:
    if value in ("infinity", "-infinity"):
        return datetime.max if value == "infinity" else datetime.min  # noqa: DTZ901  as the driver takes them
    return in_utc(datetime.fromisoformat(_text(value, what)))


def _json(value: Any, what: str) -> str:
    # Where it stands is left out: a key may be private.
    try:
        check_json(value, what)
    except InvalidInputError:
        raise InvalidInputError(f"{what} holds what PostgreSQL's jsonb cannot store") from None
    try:
        return _dump(value)
    except OverflowError:
        raise InvalidInputError(f"{what} holds a number of too many digits to be stored and read again") from None


def _is_numeric(number: str) -> bool:
    digits, _, exponent = number.lower().partition("e")
    whole, _, fraction = digits.lstrip("-").partition(".")
    if len(exponent) > 7:  # longer ones may be more than Python converts
        return False
    power = int(exponent or 0)
    return len(whole) + power <= _DIGITS_BEFORE and len(fraction) - power <= _DIGITS_AFTER


def _dump(value: Any) -> str:
    """As json.dumps, with numbers as they were written."""
    if isinstance(value, _Number):
        if not _is_numeric(value):
            raise OverflowError
        return str(value)
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{_dump(each)}" for key, each in value.items()) + "}"
        )
    if isinstance(value, list):
        return f"[{','.join(map(_dump, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _vector(value: Any, what: str) -> PackedVector:
    if isinstance(value, list):
        return pack_vector([float(each) for each in value])
    data = base64.b64decode(_text(value, what), validate=True)
    return pack_vector(np.frombuffer(data, dtype="<f2"))


def _bytes(value: Any, what: str) -> bytes:
    return bytes.fromhex(_text(value, what))


def _uuid(value: Any, what: str) -> UUID:
    return UUID(_text(value, what))


Decode: TypeAlias = Callable[[Any, str], Any]


def _decoder_of(column: Column[Any]) -> Decode:
    kind = column.type
    if isinstance(kind, Enum):
        members = frozenset(kind.enums)

        def member(value: Any, what: str) -> str:
            if value not in members:
                raise InvalidInputError(f"{what} must be one of {', '.join(sorted(members))}")
            return str(value)

        return member
    by_type: tuple[tuple[type[Any], Decode], ...] = (
        (JSONB, _json),
        (HalfVector, _vector),
        (LargeBinary, _bytes),
        (DateTime, _moment),
        (Uuid, _uuid),
        (BigInteger, _big),
        (Integer, _small),
    )
    return next((decode for each, decode in by_type if isinstance(kind, each)), _text)


_DECODERS: Final = {
    kind: {column.name: (column, _decoder_of(column)) for column in table.columns} for kind, table in TABLES.items()
}
