"""Everything that cannot be made again, as lines of JSON: the format, and the export.

One JSON object a line. The first is a header; then, each under its kind, sessions, sources (each followed by its
chunks and dead letters), dead letters without a source, paused providers; the last line holds a checksum, so that a
file that was cut off is noticed. Every column is there as it is: ids and numbers with all their digits, times to the
microsecond, vectors to the bit (base64 of little-endian half precision), hashes in hexadecimal. What is made of these
is not: words and their frequencies.
"""

import asyncio
import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from sqlalchemy import BigInteger, Column, DateTime, Enum, Integer, LargeBinary, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from kotonoha_store import migrations
from kotonoha_store.checks import check_id
from kotonoha_store.columns import EMBEDDING_DIMENSION, HalfVector
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.models import (
    Base,
    EmbeddingJob,
    EmbeddingPause,
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeSource,
    Session,
)
from kotonoha_store.records import Progress

FORMAT: Final = 1


def _table(model: type[Base]) -> Table:
    assert isinstance(model.__table__, Table)  # noqa: S101  no model here is mapped to anything else
    return model.__table__


TABLES: Final[Mapping[str, Table]] = {
    "session": _table(Session),
    "source": _table(KnowledgeSource),
    "chunk": _table(KnowledgeChunk),
    "job": _table(EmbeddingJob),
    "dead_letter": _table(KnowledgeChunkDeadLetter),
    "pause": _table(EmbeddingPause),
}
"""The kinds of lines; a job stands within its chunk's."""

SEQUENCES: Final = ("session", "source", "chunk", "dead_letter")
"""The kinds whose ids a sequence gives."""

# Rows that are held at once: archived messages may be megabytes each.
_PAGE: Final = 100
_PREFETCH: Final = 20
# Each cursor has a name of its own: the driver remembers what a FETCH returns.
_numbers: Final = itertools.count(1)
_BUFFER_BYTES: Final = 2**20
_GZIP_LEVEL: Final = 5


@dataclass(frozen=True, slots=True)
class ExportFilters:
    """What to export; everything where none is given.

    Attributes:
        guild_id: only what is of this guild.
        source_ids: only these sources, and no sessions.
    """

    guild_id: int | None = None
    source_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.guild_id is not None:
            check_id(self.guild_id, "guild_id")
        for source_id in self.source_ids or ():
            check_id(source_id, "source_id")

    @property
    def is_everything(self) -> bool:
        return self.guild_id is None and self.source_ids is None


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: None where it went to standard output.
        size: bytes before compression.
        file_size: bytes of the file; None of standard output.
        sha256: of the lines, which the last line holds too.
    """

    path: str | None
    revision: str
    sessions: int
    sources: int
    chunks: int
    dead_letters: int
    pauses: int
    size: int
    sha256: str
    file_size: int | None = None


async def export_jsonl(
    database: Database,
    path: Path | None,
    *,
    filters: ExportFilters | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write what is stored into a file of JSON lines, as it is at one moment, in constant memory.

    The file appears when it is whole, readable by its owner alone; a name that ends in ``.gz`` is compressed.

    Args:
        path: None: standard output.
        overwrite: whether a file that is there may be replaced.
        progress: told how many rows are written.

    Raises:
        InvalidInputError: the file is there, or cannot be written.
        SchemaOutdatedError: the database is not at this version's revision.
        StoreUnavailableError: the database did not answer; there is no file then.
    """
    filters = filters or ExportFilters()
    if path is not None:
        await asyncio.to_thread(_check_place, path, overwrite=overwrite)
    state = await migrations.state(database)
    state.check()
    with _output(path, overwrite=overwrite) as file:
        sink = _Sink(file)
        async with database.driver() as driver:
            with translated_errors(), _of_the_calendar():
                async with driver.transaction(isolation="repeatable_read", readonly=True):
                    header = await _header(driver, str(state.revision), filters)
                    await sink.write({"kotonoha_store": header})
                    total = sum(header["counts"].values())
                    async for line in _lines(driver, filters):
                        await sink.write_raw(line)
                        if progress is not None and sink.lines % _PAGE == 0:
                            progress(sink.lines - 1, total)
        sha256 = sink.hash.hexdigest()
        await sink.write({"end": {"lines": sink.lines, "sha256": sha256}})
        await sink.flush()
        if progress is not None:
            progress(total, total)
    file_size = None if path is None else (await asyncio.to_thread(path.stat)).st_size
    return ExportReport(None if path is None else str(path), str(state.revision), **header["counts"],
                        size=sink.size, sha256=sha256, file_size=file_size)  # fmt: skip


async def _header(driver: Any, revision: str, filters: ExportFilters) -> dict[str, Any]:
    counts = {
        "sessions": await _count(driver, "session", filters),
        "sources": await _count(driver, "source", filters),
        "chunks": await _count(driver, "chunk", filters),
        "dead_letters": await _count(driver, "dead_letter", filters),
        "pauses": await _count(driver, "pause", filters),
    }
    sequences = {}
    for kind in SEQUENCES:
        if not filters.is_everything:
            # How much else there is, is no business of who gets a part.
            condition, arguments = _condition(kind, filters)
            largest = f"SELECT coalesce(max(id), 0) FROM {TABLES[kind].name} WHERE {condition}"
            sequences[kind] = await driver.fetchval(largest, *arguments)
            continue
        # What was given last, so that ids kept elsewhere are not given there once more.
        sequences[kind] = await driver.fetchval(
            "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence($1, 'id')::regclass), 0)", TABLES[kind].name
        )
    return {
        "format": FORMAT,
        "revision": revision,
        "dimension": EMBEDDING_DIMENSION,
        "exported_at": datetime.now(UTC).isoformat(),
        "filters": None if filters.is_everything else asdict(filters),
        "counts": counts,
        "sequences": sequences,
    }


async def _count(driver: Any, kind: str, filters: ExportFilters) -> int:
    condition, arguments = _condition(kind, filters)
    count: int = await driver.fetchval(f"SELECT count(*) FROM {TABLES[kind].name} WHERE {condition}", *arguments)
    return count


def _condition(kind: str, filters: ExportFilters) -> tuple[str, list[Any]]:
    """SQL that keeps what is to be exported, and its arguments."""
    if filters.is_everything:
        return "true", []
    if kind == "pause" or (kind == "session" and filters.source_ids is not None):
        return "false", []
    arguments: list[Any] = []
    conditions: list[str] = []
    if filters.source_ids is not None:
        arguments.append(list(filters.source_ids))
        conditions.append(f"{'id' if kind == 'source' else 'source_id'} = ANY($1::bigint[])")
    if filters.guild_id is not None:
        arguments.append(filters.guild_id)
        mark = f"${len(arguments)}::bigint"
        if kind in ("session", "source"):
            conditions.append(f"guild_id = {mark}")
        else:
            # A chunk goes where its source goes.
            of_guild = f"source_id IN (SELECT id FROM knowledge_sources WHERE guild_id = {mark})"
            orphan = "NOT EXISTS (SELECT FROM knowledge_sources AS s WHERE s.id = source_id)"
            conditions.append(of_guild if kind == "chunk" else f"({of_guild} OR (guild_id = {mark} AND {orphan}))")
    return " AND ".join(conditions), arguments


async def _lines(driver: Any, filters: ExportFilters) -> AsyncIterator[bytes]:
    condition, arguments = _condition("session", filters)
    session, source, letter = _Encoder("session"), _Encoder("source"), _Encoder("dead_letter")
    async for row in _rows(driver, f"{session.select} WHERE {condition} ORDER BY t.id", *arguments):
        yield session.line(row)
    condition, arguments = _condition("source", filters)
    ids: list[int] = []
    async for row in _rows(driver, f"SELECT id FROM knowledge_sources WHERE {condition} ORDER BY id", *arguments):
        ids.append(row[0])
        if len(ids) == _PAGE:
            async for line in _sources(driver, source, letter, ids):
                yield line
            ids = []
    async for line in _sources(driver, source, letter, ids):
        yield line
    condition, arguments = _condition("dead_letter", filters)
    orphan = "NOT EXISTS (SELECT FROM knowledge_sources AS s WHERE s.id = t.source_id)"
    async for row in _rows(driver, f"{letter.select} WHERE {condition} AND {orphan} ORDER BY t.id", *arguments):
        yield letter.line(row)
    condition, arguments = _condition("pause", filters)
    pause = _Encoder("pause")
    async for row in _rows(driver, f"{pause.select} WHERE {condition} ORDER BY t.provider", *arguments):
        yield pause.line(row)


async def _sources(driver: Any, source: "_Encoder", letter: "_Encoder", ids: Sequence[int]) -> AsyncIterator[bytes]:
    """Each source with what belongs to it, by three streams in the same order."""
    if not ids:
        return
    chunk, job = _Encoder("chunk"), _Encoder("job", without=("chunk_id",))
    chunks = _Stream(
        _rows(
            driver,
            f"SELECT {chunk.columns}, j.chunk_id IS NOT NULL AS has_job, {job.named('j')} FROM knowledge_chunks AS t"
            " LEFT JOIN embedding_jobs AS j ON j.chunk_id = t.id"
            " WHERE t.source_id = ANY($1::bigint[]) ORDER BY t.source_id, t.id",
            ids,
        )
    )
    letters = _Stream(
        _rows(driver, f"{letter.select} WHERE t.source_id = ANY($1::bigint[]) ORDER BY t.source_id, t.id", ids)
    )
    place = letter.names.index("source_id")
    async for row in _rows(driver, f"{source.select} WHERE t.id = ANY($1::bigint[]) ORDER BY t.id", ids):
        yield source.line(row)
        width = len(chunk.names)
        async for each in chunks.while_at(chunk.names.index("source_id"), row[0]):
            queued = job.object(each[width + 1 :]) if each[width] else "null"
            yield f'{{"chunk":{chunk.object(each)[:-1]},"job":{queued}}}}}\n'.encode()
        async for each in letters.while_at(place, row[0]):
            yield letter.line(each)


async def _rows(driver: Any, sql: str, *arguments: Any) -> AsyncIterator[Any]:
    # A cursor of the transaction: the driver's own leaves a named statement on a pooler's connection.
    name = f"kotonoha_export_{next(_numbers)}"
    await driver.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {sql}", *arguments)
    while rows := await driver.fetch(f"FETCH {_PREFETCH} FROM {name}"):
        for row in rows:
            yield row
    await driver.execute(f"CLOSE {name}")


class _Stream:
    """Rows that are looked at before they are taken."""

    def __init__(self, rows: AsyncIterator[Any]) -> None:
        self._rows = rows
        self._next: Any = None

    async def while_at(self, column: int, value: int) -> AsyncIterator[Any]:
        if self._next is None:
            self._next = await anext(self._rows, None)
        while self._next is not None and self._next[column] == value:
            yield self._next
            self._next = await anext(self._rows, None)


class _Encoder:
    """Turns rows of a table into JSON."""

    def __init__(self, kind: str, *, without: Sequence[str] = ()) -> None:
        table = TABLES[kind]
        columns = [column for column in table.columns if column.name not in without]
        self.names = [column.name for column in columns]
        self.columns = ", ".join(map(_selected, columns))
        self.select = f"SELECT {self.columns} FROM {table.name} AS t"
        self._kind = kind
        self._all = columns
        self._pairs = [(f'"{column.name}":', _encoder_of(column)) for column in columns]

    def named(self, alias: str) -> str:
        return ", ".join(_selected(column, alias) for column in self._all)

    def object(self, row: Any) -> str:
        pairs = zip(self._pairs, row, strict=False)
        return (
            "{" + ",".join(key + ("null" if value is None else encode(value)) for (key, encode), value in pairs) + "}"
        )

    def line(self, row: Any) -> bytes:
        return f'{{"{self._kind}":{self.object(row)}}}\n'.encode()


def _selected(column: Column[Any], alias: str = "t") -> str:
    # As text: on the way through Python's numbers long ones would lose digits.
    return f"{alias}.{column.name}::text" if isinstance(column.type, JSONB) else f"{alias}.{column.name}"


Encode: TypeAlias = Callable[[Any], str]


def _encoder_of(column: Column[Any]) -> Encode:
    kind = column.type
    if isinstance(kind, JSONB):
        return str
    if isinstance(kind, HalfVector):
        return lambda value: f'"{base64.b64encode(value.astype("<f2").tobytes()).decode()}"'
    if isinstance(kind, LargeBinary):
        return lambda value: f'"{value.hex()}"'
    if isinstance(kind, DateTime):
        return lambda value: f'"{moment_text(value)}"'
    if isinstance(kind, Uuid):
        return lambda value: f'"{value}"'
    if isinstance(kind, BigInteger | Integer):
        return str
    if isinstance(kind, Enum | Text):
        return lambda value: json.dumps(value, ensure_ascii=False)
    raise TypeError(f"{column} has a type that the export does not know")  # a column added later: a test sees it


def moment_text(value: datetime) -> str:
    """A time in ISO 8601; infinite ones as PostgreSQL writes them."""
    if value.tzinfo is None:
        # What the driver gives for infinity.
        return "infinity" if value.year > 1 else "-infinity"
    return value.isoformat()


class _Sink:
    """Collects lines, and writes them off the event loop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = bytearray()
        self.hash = hashlib.sha256()
        self.lines = 0
        self.size = 0

    async def write(self, value: Mapping[str, Any]) -> None:
        await self.write_raw(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    async def write_raw(self, line: bytes) -> None:
        self._buffer += line
        self.hash.update(line)
        self.lines += 1
        self.size += len(line)
        if len(self._buffer) >= _BUFFER_BYTES:
            await self.flush()

    async def flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        # To the end, also when this task is cancelled: the file is closed after it.
        writing = asyncio.ensure_future(asyncio.to_thread(self._file.write, data))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait([writing])
            raise


def _check_place(path: Path, *, overwrite: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # what is wrong with it, writing tells
    if not stat.S_ISREG(mode):
        raise InvalidInputError(f"{path.name} is no regular file (a link, device, pipe or folder); choose another name")
    if not overwrite:
        raise _is_there(path)


def _is_there(path: Path) -> InvalidInputError:
    return InvalidInputError(
        f"{path.name} is there already; choose another name, or replace it by --force (overwrite=True)"
    )


def _publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Give the file its name; of two at once that may not overwrite, one fails."""
    _check_place(path, overwrite=overwrite)
    if not overwrite:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise _is_there(path) from None
        except OSError:
            pass  # a file system without links
        else:
            partial.unlink()
            return
    partial.replace(path)


@contextmanager
def _output(path: Path | None, *, overwrite: bool) -> Iterator[BinaryIO]:
    """The file to write to, which takes its name when all is written."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        # Beside it, so that renaming is one step; mode 0600.
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        partial = Path(name)
        try:
            with os.fdopen(number, "wb") as raw:
                if path.name.endswith(".gz"):
                    packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=_GZIP_LEVEL, mtime=0)
                    with packed, io.BufferedWriter(packed, _BUFFER_BYTES) as buffered:
                        yield buffered
                else:
                    yield raw
                raw.flush()
                os.fsync(raw.fileno())
            _publish(partial, path, overwrite=overwrite)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise InvalidInputError(f"{path.name} cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def _of_the_calendar() -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise InvalidInputError(
            "a time in the database lies outside the years 1 to 9999, which this export cannot write; correct it"
        ) from error
