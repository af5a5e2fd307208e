"""Reading the old bot's SQLite file: its rows as sessions, or why they are none."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Final, NoReturn

from kotonoha_store.checks import BIGINT_MAX, check_json, check_text, in_utc
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.report import name
from kotonoha_store.importers.session_rows import SessionRow
from kotonoha_store.records import Message, Scope
from kotonoha_store.sessions import check_key

ROLES: Final = frozenset({"user", "assistant", "system", "developer", "tool", "function"})
"""Roles that are known; a message of another one is set aside."""

BATCH_SESSIONS: Final = 200
"""So many sessions are read at once, fewer where they are long."""

_BATCH_LENGTH: Final = 8_000_000
# PostgreSQL, "JSON Types": the strings of a jsonb array have less than 256 MB.
_LONGEST: Final = 200_000_000

_IDS: Final = ("channel_id", "thread_id", "user_id")
_NEEDED: Final = ("session_key", "session_type", "messages", "created_at", "last_active_at")
_LOCK_SECONDS: Final = 30.0
_COUNT: Final = "SELECT count(*) FROM sessions"
# Instructions of SQLite's machine between two looks at whether to go on: about a millisecond's.
_STEPS: Final = 10_000


@dataclass(slots=True)
class ReadSession:
    """A row of the file: the session that it holds, or why it holds none, and which of its messages were set aside."""

    where: str
    raw: dict[str, Any] = field(repr=False)
    session: SessionRow | None = None
    problem: str | None = None
    messages: int = 0
    rejected: list[tuple[int, str, Any]] = field(default_factory=list, repr=False)
    untimed: int = 0
    is_zoneless: bool = False


class SessionFile:
    """The old file, open for reading; once ``stop`` is set, what is being read ends with an error."""

    def __init__(self, path: Path, zone: tzinfo, guild_id: int | None, stop: threading.Event) -> None:
        self.path = path
        self.damage: str | None = None
        self._zone = zone
        self._guild_id = guild_id
        self._number = 0
        self._connection = _open(path)
        self._connection.set_progress_handler(stop.is_set, _STEPS)
        try:
            self._columns = self._find_columns()
            self.total: int = self._connection.execute(_COUNT).fetchone()[0]
            columns = ", ".join(self._columns)
            # By key: two imports lock in the same order.
            every = f"SELECT {columns} FROM sessions ORDER BY session_key"  # noqa: S608  names of ours, see _find_columns
            self._rows = self._connection.execute(every)
        except sqlite3.Error as error:
            self._connection.close()
            _refuse(path, error)
        except BaseException:
            self._connection.close()
            raise

    def _find_columns(self) -> list[str]:
        # No view, which may compute anything, and no virtual table, which has no pages of its own.
        tables = self._connection.execute(
            "SELECT 1 FROM sqlite_master WHERE type = 'table' AND rootpage > 0 AND name = 'sessions' COLLATE NOCASE"
        )
        found = {row[1] for row in self._connection.execute("PRAGMA table_info(sessions)")}
        if tables.fetchone() is None:
            raise InvalidInputError(f"{name(str(self.path))} has no table named sessions: is it the old bot's file?")
        if missing := [column for column in _NEEDED if column not in found]:
            raise InvalidInputError(
                f"the table sessions in {name(str(self.path))} has no column {', '.join(missing)}: "
                "is it the old bot's file?"
            )
        return [*_NEEDED, *(column for column in _IDS if column in found)]

    def batch(self) -> list[ReadSession]:
        """Read the next rows; none at the end, or where the file is damaged."""
        batch: list[ReadSession] = []
        length = 0
        while self.damage is None and len(batch) < BATCH_SESSIONS and length < _BATCH_LENGTH:
            try:
                row = self._rows.fetchone()
            except sqlite3.OperationalError as error:
                _refuse(self.path, error)
            except sqlite3.DatabaseError:
                self.damage = "damaged"
                break
            if row is None:
                break
            self._number += 1
            raw = dict(zip(self._columns, row, strict=True))
            length += len(raw["messages"]) if isinstance(raw["messages"], str | bytes) else 0
            batch.append(_read(raw, self._number, self._zone, self._guild_id))
        return batch

    def close(self) -> None:
        self._connection.close()


def _open(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise InvalidInputError(f"{name(str(path))} is no file; give the path of the old bot's SQLite file")
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        return _begin(uri)
    except sqlite3.Error as error:
        # WAL needs files beside it even for reading, which a read-only folder has no room for. With an empty log
        # nothing is missed without them.
        is_blocked = _code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if is_blocked and not any(map(_has_content, (f"{path}-wal", f"{path}-journal"))):
            with suppress(sqlite3.Error):
                return _begin(f"{uri}&immutable=1")
        _refuse(path, error)


def _has_content(path: str) -> bool:
    try:
        return Path(path).stat().st_size > 0
    except OSError:
        return False


def _begin(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    # Bytes that are no UTF-8 become lone surrogates, which are set aside with their record.
    connection.text_factory = lambda value: value.decode("utf-8", "surrogateescape")
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


_REASONS: Final = {
    sqlite3.SQLITE_NOTADB: "is no SQLite file, or is encrypted; decrypt it first",
    sqlite3.SQLITE_CORRUPT: "is damaged; try `sqlite3 FILE .recover`",
    sqlite3.SQLITE_BUSY: "is locked by another program; stop the old bot and try again",
    sqlite3.SQLITE_LOCKED: "is locked by another program; stop the old bot and try again",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; is it readable, and complete with its -wal file?",
    sqlite3.SQLITE_READONLY: "was not closed in order and needs a repair by writing; copy it with the files beside it "
    "(-wal, -journal) to a folder that can be written, and open the copy once with `sqlite3`",
}


def _refuse(path: Path, error: sqlite3.Error) -> NoReturn:
    # SQLite's own words may quote the schema; its code says enough.
    reason = _REASONS.get(_code(error), f"cannot be read by SQLite (code {_code(error)})")
    raise InvalidInputError(f"{name(str(path))} {reason}") from None


def _read(raw: dict[str, Any], number: int, zone: tzinfo, guild_id: int | None) -> ReadSession:
    key = raw["session_key"]
    where = f"session {name(key)}" if isinstance(key, str) else f"row {number}"
    read = ReadSession(where, raw)
    times = _Times(zone)
    try:
        items = _items(raw["messages"])
        read.messages = len(items)
        if not isinstance(key, str):
            raise InvalidInputError("its session_key is no text")
        check_key(key)
        if not check_text(raw["session_type"], "session_type").strip():
            raise InvalidInputError("its session_type is empty")
        created_at, last_active_at = (_time(raw, column, times) for column in ("created_at", "last_active_at"))
        ids = {column: _id(raw.get(column), column) for column in _IDS}
        messages = list(_messages(items, read, times))
        if items and not messages:
            raise InvalidInputError(f"none of its {len(items)} messages can be used")
        scope = Scope(guild_id=guild_id, **ids)
        read.session = SessionRow(key, raw["session_type"], scope, messages, created_at, last_active_at)
    except InvalidInputError as error:
        read.problem = str(error)
    read.is_zoneless = times.is_zoneless
    return read


def _items(text: Any) -> list[Any]:
    if not isinstance(text, str):
        raise InvalidInputError("its messages are no text")
    if len(text) > _LONGEST:
        raise InvalidInputError("its messages are longer than what PostgreSQL can keep in one session")
    try:
        items = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        # Without its own words, which quote the text.
        raise InvalidInputError("its messages are no valid JSON") from None
    if not isinstance(items, list):
        raise InvalidInputError("its messages are no JSON list")
    return items


def _no_number(_: str) -> NoReturn:
    raise ValueError("NaN and infinity are no JSON")


def _messages(items: list[Any], read: ReadSession, times: "_Times") -> Iterator[dict[str, Any]]:
    for index, item in enumerate(items):
        try:
            message = _message(item, times)
        except InvalidInputError as error:
            read.rejected.append((index, str(error), item))
            continue
        read.untimed += message.timestamp is None and item.get("timestamp") is not None
        yield message.to_stored()


def _message(item: Any, times: "_Times") -> Message:
    if not isinstance(item, dict):
        raise InvalidInputError("it is no JSON object")
    if not isinstance(item.get("role"), str) or item["role"] not in ROLES:
        raise InvalidInputError(f"its role is none of {', '.join(sorted(ROLES))}")
    if item.get("content") is None:
        raise InvalidInputError("its content is null")
    check_text(item["content"], "its content")
    try:
        check_json(item)
    except InvalidInputError:
        # Without the path, which names keys that may be private.
        raise InvalidInputError("a field beside its content holds what PostgreSQL cannot store") from None
    if isinstance(time := item.get("timestamp"), str):
        with suppress(InvalidInputError):
            item = {**item, "timestamp": times.read(time).isoformat()}
    return Message.from_stored(item)


class _Times:
    """Reads times, and remembers whether one had no zone."""

    def __init__(self, zone: tzinfo) -> None:
        self._zone = zone
        self.is_zoneless = False

    def read(self, text: str) -> datetime:
        try:
            value = datetime.fromisoformat(text.strip())
        except ValueError:
            raise InvalidInputError("is no ISO 8601 time") from None
        if value.tzinfo is None:
            self.is_zoneless = True
            value = value.replace(tzinfo=self._zone)
        return in_utc(value)


def _time(raw: dict[str, Any], column: str, times: _Times) -> datetime:
    value = raw[column]
    if not isinstance(value, str):
        raise InvalidInputError(f"its {column} is no text")
    try:
        return times.read(value)
    except InvalidInputError:
        raise InvalidInputError(f"its {column} is no time in ISO 8601, such as 2024-06-01T12:00:00+09:00") from None


def _id(value: Any, column: str) -> int | None:
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) < 100:
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or not -BIGINT_MAX - 1 <= value <= BIGINT_MAX:
        raise InvalidInputError(f"its {column} is no whole number of 64 bits")
    return value
