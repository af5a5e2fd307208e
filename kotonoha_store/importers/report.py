"""What every import tells at its end, and where it puts what it could not take."""

import base64
import fcntl
import json
import os
import stat
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kotonoha_store.errors import InvalidInputError

REPORTED: Final = 100
"""So many rejections are kept for the report; the file of rejects holds all."""

_NAME_LENGTH: Final = 100
_REASON_LENGTH: Final = 300
_LINE_START: Final = b'{"where":'


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that was set aside.

    Attributes:
        where: which one, by file, key or number.
        reason: the rule that it breaks; never what it holds.
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the records of one kind; ``read`` is the sum of the others.

    Attributes:
        imported: written, or with a dry run: would be written.
        unchanged: stand in the database already as they were read.
        kept: differ in the database, which was left as it is.
        skipped: left out by a rule that the report's notes name.
        rejected: set aside.
    """

    read: int = 0
    imported: int = 0
    unchanged: int = 0
    kept: int = 0
    skipped: int = 0
    rejected: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Counts)))


@dataclass(frozen=True, slots=True)
class ImportReport(Counts):
    """What an import did.

    Attributes:
        what: what is counted: "sessions", "messages", "files".
        inner: what became of the parts of these records, by their name, such as the messages of sessions.
        details: further figures, by name.
        notes: sentences on what was decided and what to look at.
        rejections: the first :data:`REPORTED` records that were set aside.
        set_aside: how many were, each of them once: a session as one, whose messages ``inner`` counts beside it.
        is_dry_run: whether nothing was written.
    """

    what: str = "records"
    inner: Mapping[str, Counts] = field(default_factory=dict)
    details: Mapping[str, int | str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rejections: tuple[Rejected, ...] = ()
    set_aside: int = 0
    is_dry_run: bool = False

    @property
    def has_rejects(self) -> bool:
        """Whether anything was set aside."""
        return bool(self.rejected or self.rejections or any(counts.rejected for counts in self.inner.values()))


class Rejects:
    """Takes what is set aside: all of it into a file as it goes, the first ones into memory for the report.

    The file holds a JSON object a line: ``where``, ``reason``, ``record``. It is the owner's alone (0600), since the
    records are private. A file of rejects that is there is begun anew, by the first record or by an end without any: an
    import that was stopped sets the same aside again. Use as a context manager.
    """

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: where to; None keeps no records.

        Raises:
            InvalidInputError: the file cannot be written, others may read it, it holds something else, or another
                import writes it.
        """
        self.count = 0
        self._path = path
        self._first: list[Rejected] = []
        self._file: int | None = None if path is None else _open(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None or self._path is None:
            return
        # What failed before it set anything aside leaves those of the run before.
        is_empty = os.fstat(self._file).st_size == 0 or (self.count == 0 and error is None)
        if is_empty:
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None

    @property
    def first(self) -> tuple[Rejected, ...]:
        """The first :data:`REPORTED` of them."""
        return tuple(self._first)

    def add(self, where: str, reason: str, record: object = None) -> None:
        """Set a record aside.

        Args:
            where: which record, without its content.
            reason: the rule that it breaks, without its content.
            record: what was read, of any type; only the file gets it.

        Raises:
            InvalidInputError: the file can no longer be written (a full disk).
        """
        self.count += 1
        # One may name each of 1,536 numbers.
        reason = textwrap.shorten(reason, _REASON_LENGTH, placeholder=" ...")
        if len(self._first) < REPORTED:
            self._first.append(Rejected(where, reason))
        if self._file is not None:
            line = memoryview(_line(where, reason, record))
            try:
                if self.count == 1:
                    os.ftruncate(self._file, 0)
                while line:
                    line = line[os.write(self._file, line) :]
            except OSError as error:
                raise InvalidInputError(f"the file of rejects cannot be written ({error.strerror})") from None


def name(value: object) -> str:
    """A key or path for use in a report: printable, on one line; of a long one, how it begins and ends."""
    shown = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    half = _NAME_LENGTH // 2
    return shown if len(shown) <= _NAME_LENGTH else f"{shown[:half]}...{shown[-half:]}"


def _open(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInputError(f"the file of rejects {name(str(path))} cannot be opened ({error.strerror})") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInputError(f"the file of rejects {name(str(path))} is no regular file; give another")
        if status.st_mode & 0o077:
            raise InvalidInputError(
                f"others may read {name(str(path))}, and rejected records are private; chmod 600, or give another file"
            )
        if status.st_size and os.pread(file, len(_LINE_START), 0) != _LINE_START:
            raise InvalidInputError(f"{name(str(path))} exists and holds no rejects; give another file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInputError(f"another import writes {name(str(path))} just now; give another file") from None
    except BaseException:
        os.close(file)
        raise
    return file


def _line(where: str, reason: str, record: object) -> bytes:
    try:
        text = json.dumps(record, allow_nan=False, default=_plain)
    except (ValueError, TypeError, RecursionError):
        try:
            text = json.dumps({"repr": repr(record)})
        except (ValueError, RecursionError):
            text = '{"error": "nested too deep, or with numbers too long, to be written here"}'
    return f'{{"where": {json.dumps(where)}, "reason": {json.dumps(reason)}, "record": {text}}}\n'.encode()


def _plain(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else {"repr": repr(value)}
