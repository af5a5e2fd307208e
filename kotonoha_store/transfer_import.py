"""The way back: the lines of an export into a database, empty or not."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import migrations
from kotonoha_store.bulk_load import BATCH_CHUNKS, COPY_ROWS, IndexOfLoad
from kotonoha_store.database import Database, driver_connection, ensure_codecs
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.report import Counts, ImportReport, Rejects
from kotonoha_store.index_builds import OnProgress
from kotonoha_store.records import SCOPE_FIELDS, Progress, Scope
from kotonoha_store.term_index import TextOfChunk, refresh_terms, write_terms
from kotonoha_store.transfer import SEQUENCES, TABLES
from kotonoha_store.transfer_lines import FileCheck, Values, check_export, read_units

_SESSIONS_A_BATCH: Final = 200


@dataclass(slots=True)
class _Unit:
    """What goes in whole or not at all: a session, a pause, a dead letter alone, or a source with what follows it."""

    kind: str
    line: int
    values: Values
    chunks: list[tuple[Values, Values | None]] = field(default_factory=list)
    letters: list[Values] = field(default_factory=list)
    has_origin: bool = False
    """Whether a source's origin is the database's by now, no more the file's."""

    @property
    def rows(self) -> int:
        return 1 + len(self.chunks) + len(self.letters)


async def import_jsonl(
    database: Database,
    path: Path,
    *,
    dry_run: bool = False,
    rejects: Path | None = None,
    partial: bool = False,
    rebuild: bool | None = None,
    progress: Progress | None = None,
    on_build: OnProgress | None = None,
) -> ImportReport:
    """Bring in an export. What is there stays as it is, so it may be run again, also after it was stopped.

    All of the file is checked before the first row is written. Sessions are the same by their key; sources by type,
    URI and scope, by the session and message they begin with, or by id, type and time of creation. A row keeps its
    id where that is free, so that an empty database becomes what was exported, row by row; where another row has
    it, it gets a new one, and what refers to it follows. A source goes in with all of its chunks or not at all.

    Args:
        dry_run: say what would be done; nothing is written.
        rejects: where to put what cannot be stored; by default it is only counted and named.
        partial: import what is intact of a file that was cut off or changed.
        rebuild: as with :func:`kotonoha_store.bulk_load.load_documents`.
        on_build: told how the index build goes.

    Raises:
        InvalidInputError: this is no export, a newer one, or not whole.
        ConfigurationError: this role may not do it.
        SchemaOutdatedError: the database is not at this version's revision.
        StoreUnavailableError: the database did not answer. Run it again.
    """
    (await migrations.state(database)).check()
    found = await asyncio.to_thread(check_export, path)
    if found.problem is not None and not partial:
        raise InvalidInputError(
            f"{path.name} is not whole: {found.problem}; get it again, or import what is intact by --partial"
        )
    index = IndexOfLoad(database, rebuild)
    run = _Import(database, index, dry_run=dry_run)
    total = found.lines
    with Rejects(rejects) as aside:
        if not dry_run:
            await run.advance_sequences(found)
        async with index.apart():
            async for batch in _batches(path, found, aside, run):
                await run.write(batch)
                if progress is not None:
                    progress(run.done, total)
        outcome = "untouched" if dry_run else await index.finish(progress=on_build)
        return run.report(found, aside, outcome)


@dataclass(slots=True)
class _Tally:
    read: Counter[str] = field(default_factory=Counter)
    imported: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def of(self, kind: str) -> Counts:
        numbers = (self.imported[kind], self.unchanged[kind], self.kept[kind], 0, self.rejected[kind])
        return Counts(sum(numbers), *numbers)


async def _batches(path: Path, found: FileCheck, aside: Rejects, run: "_Import") -> AsyncIterator[list[_Unit]]:
    """Units of one kind, as many as one transaction takes; bad ones are set aside on the way."""
    batch: list[_Unit] = []
    rows = 0
    units = _units(path, found, aside, run.tally)
    while (unit := await asyncio.to_thread(next, units, None)) is not None:
        limit = _SESSIONS_A_BATCH if unit.kind == "session" else BATCH_CHUNKS
        if batch and (batch[0].kind != unit.kind or rows + unit.rows > limit):
            yield batch
            batch, rows = [], 0
        batch.append(unit)
        rows += unit.rows
    if batch:
        yield batch


def _units(path: Path, found: FileCheck, aside: Rejects, tally: "_Tally") -> Iterator[_Unit]:
    """What can be stored, unit by unit; the rest is set aside."""
    unit: _Unit | None = None
    for line in read_units(path):
        if unit is not None and unit.line != line.unit:
            yield unit
            unit = None
        if (bad := found.bad.get(line.unit)) is not None:
            reason = line.reason or f"goes with line {bad.line}: {bad.reason}"
            aside.add(f"line {line.number}", reason, line.raw.decode(errors="replace").rstrip("\n"))
            tally.rejected[line.kind] += 1
        elif unit is None:
            unit = _Unit(line.kind, line.number, line.values)
        elif line.kind == "chunk":
            job = line.values.pop("job")
            unit.chunks.append((line.values, job))
        else:
            unit.letters.append(line.values)
    if unit is not None:
        yield unit


class _Import:
    """Writes units, and keeps count."""

    def __init__(self, database: Database, index: IndexOfLoad, *, dry_run: bool) -> None:
        self._database = database
        self._index = index
        self._dry_run = dry_run
        self.tally = _Tally()
        self.renumbered: Counter[str] = Counter()
        self._session_ids: dict[int, int] = {}
        self._origin_ids: dict[tuple[int, str | None], int] = {}

    @property
    def done(self) -> int:
        tally = self.tally
        return sum(sum(each.values()) for each in (tally.imported, tally.unchanged, tally.kept, tally.rejected))

    async def advance_sequences(self, found: FileCheck) -> None:
        """No row that is made meanwhile or later shall take an id that is to be kept."""
        async with self._database.begin() as session:
            with translated_errors():
                for kind in SEQUENCES:
                    # The header of a file that was changed may say too little.
                    last = max(found.header["sequences"][kind], found.largest.get(kind, 0))
                    if last:
                        await session.execute(_advance(TABLES[kind].name), {"table": TABLES[kind].name, "last": last})

    async def write(self, batch: Sequence[_Unit]) -> None:
        write = {
            "session": self._sessions,
            "source": self._sources,
            "dead_letter": self._letters,
            "pause": self._pauses,
        }[batch[0].kind]
        if batch[0].kind == "source" and not self._dry_run:
            vectors = sum(row["embedding"] is not None for unit in batch for row, _ in unit.chunks)
            if vectors:
                async with self._database.begin() as session:
                    there = await self._there(session, await driver_connection(session), batch)
                new = (unit for unit in batch if unit.line not in there)
                await self._index.before_vectors(
                    sum(row["embedding"] is not None for unit in new for row, _ in unit.chunks)
                )
        async with self._database.begin() as session:
            with translated_errors():
                # The first statement begins the transaction that the driver's own take part in.
                await session.execute(text("SELECT 1"))
                await ensure_codecs(session)
                await write(session, await driver_connection(session), batch)

    def report(self, found: FileCheck, aside: Rejects, outcome: str) -> ImportReport:
        tally = self.tally
        notes = []
        if found.problem is not None:
            notes.append(f"the file is not whole: {found.problem}; what was intact of it is taken")
        if renumbered := sum(self.renumbered.values()):
            notes.append(f"{renumbered} rows got new ids, since others have theirs")
        if any(tally.kept.values()):
            notes.append("what differs in the database was left as it is there")
        if outcome == "missing":
            notes.append("the HNSW index is missing; have its owner run `kotonoha-store reindex --broken`")
        inner = {
            name: tally.of(kind)
            for name, kind in (
                ("sessions", "session"),
                ("chunks", "chunk"),
                ("dead letters", "dead_letter"),
                ("pauses", "pause"),
                ("unreadable lines", "line"),
            )
            if kind != "line" or tally.rejected[kind]
        }
        sources = tally.of("source")
        return ImportReport(
            **asdict(sources),
            what="sources",
            inner=inner,
            details={"new ids": renumbered, "vector index": outcome},
            notes=tuple(notes),
            rejections=aside.first,
            set_aside=aside.count,
            is_dry_run=self._dry_run,
        )

    async def _sessions(self, session: AsyncSession, driver: Any, batch: Sequence[_Unit]) -> None:
        keys = [unit.values["session_key"] for unit in batch]
        columns = "session_key, id, version, rewrite_version, last_active_at"
        rows = await driver.fetch(f"SELECT {columns} FROM sessions WHERE session_key = ANY($1::text[])", keys)
        there = {row["session_key"]: row for row in rows}
        taken = await _taken(driver, "session", [unit.values["id"] for unit in batch])
        new: list[Values] = []
        for unit in batch:
            values = unit.values
            if (row := there.get(values["session_key"])) is not None:
                same = all(row[name] == values[name] for name in ("version", "rewrite_version", "last_active_at"))
                (self.tally.unchanged if same else self.tally.kept)["session"] += 1
                self._session_ids[values["id"]] = row["id"]
                continue
            self.tally.imported["session"] += 1
            there[values["session_key"]] = values
            old = values["id"]
            if old in taken:
                values = {**values, "id": await self._new(driver, "session")}
            taken.add(values["id"])
            self._session_ids[old] = values["id"]
            new.append(values)
        if new and not self._dry_run:
            await driver.executemany(_insert("session"), [list(values.values()) for values in new])

    async def _sources(self, session: AsyncSession, driver: Any, batch: Sequence[_Unit]) -> None:
        there = await self._there(session, driver, batch)
        taken = await _taken(driver, "source", [unit.values["id"] for unit in batch])
        new: list[_Unit] = []
        keys: set[Any] = set()
        for unit in batch:
            identity = self._identity(unit.values)
            if unit.line in there or identity in keys:
                same = unit.line in there and there[unit.line] == unit.values["updated_at"]
                tally = self.tally.unchanged if same else self.tally.kept
            else:
                tally = self.tally.imported
                keys.add(identity)
                new.append(unit)
            tally["source"] += 1
            tally["chunk"] += len(unit.chunks)
            tally["dead_letter"] += len(unit.letters)
        if not new:
            return
        chunk_ids = [row["id"] for unit in new for row, _ in unit.chunks]
        chunk_ids += [row["original_chunk_id"] for unit in new for row in unit.letters]
        taken_chunks = await _taken(driver, "chunk", chunk_ids)
        taken_letters = await _taken(driver, "dead_letter", [row["id"] for unit in new for row in unit.letters])
        for unit in new:
            await self._renumber(driver, unit, taken, taken_chunks, taken_letters)
        if self._dry_run:
            return
        await driver.executemany(_insert("source"), [list(unit.values.values()) for unit in new])
        chunks = [row for unit in new for row, _ in unit.chunks]
        jobs = [job for unit in new for _, job in unit.chunks if job is not None]
        for kind, rows in (
            ("chunk", chunks),
            ("job", jobs),
            ("dead_letter", [row for unit in new for row in unit.letters]),
        ):
            await _copy(driver, kind, rows)
        texts = [
            TextOfChunk(row["id"], unit.values["title"], row["content"], Scope(*(row[name] for name in SCOPE_FIELDS)))
            for unit in new
            for row, _ in unit.chunks
        ]
        await write_terms(session, texts)
        await refresh_terms(session)

    async def _there(self, session: AsyncSession, driver: Any, batch: Sequence[_Unit]) -> dict[int, Any]:
        """By line, those sources that the database has, and when they were last changed there."""
        await self._settle_origins(driver, batch)
        columns = "id, type::text, document_key, origin_session_id, origin_first_index, created_at, updated_at"
        found: dict[Any, Any] = {}
        by_key = [self._key(unit.values) for unit in batch]
        rows = await driver.fetch(
            f"SELECT {columns} FROM knowledge_sources WHERE document_key = ANY($1::bytea[])"
            f" UNION SELECT {columns} FROM knowledge_sources WHERE id = ANY($2::bigint[])"
            f" UNION SELECT {columns} FROM knowledge_sources JOIN unnest($3::bigint[], $4::bigint[]) AS o(i, f)"
            " ON origin_session_id = i AND origin_first_index = f",
            by_key,
            [unit.values["id"] for unit in batch],
            [unit.values["origin_session_id"] for unit in batch],
            [unit.values["origin_first_index"] for unit in batch],
        )
        for row in rows:
            if row["document_key"] is not None:
                found["key", row["document_key"]] = row
            if row["origin_session_id"] is not None:
                found["origin", row["origin_session_id"], row["origin_first_index"]] = row
            if row["document_key"] is None and row["origin_session_id"] is None:
                found["id", row["id"], row["type"], row["created_at"]] = row
        there = {}
        for unit, key in zip(batch, by_key, strict=True):
            row = found.get(self._identity(unit.values)) or found.get(("key", key))
            if row is not None:
                there[unit.line] = row["updated_at"]
        return there

    def _identity(self, values: Values) -> tuple[Any, ...]:
        if values["document_key"] is not None:
            return ("key", values["document_key"])
        if values["origin_session_id"] is not None:
            return ("origin", values["origin_session_id"], values["origin_first_index"])
        return ("id", values["id"], values["type"], values["created_at"])

    def _key(self, values: Values) -> bytes:
        """The document's key; where it has none, the one that it gets together with a new id."""
        if values["document_key"] is not None:
            return bytes(values["document_key"])
        names = ("id", "type", "uri", "created_at", *SCOPE_FIELDS)
        return hashlib.sha256(repr(["imported", *(str(values[name]) for name in names)]).encode()).digest()

    async def _renumber(self, driver: Any, unit: _Unit, taken: set[int], chunks: set[int], letters: set[int]) -> None:
        """New ids where others have them, and what refers to them."""
        source = unit.values
        if source["id"] in taken:
            if source["document_key"] is None and source["origin_session_id"] is None:
                source["document_key"] = self._key(source)
            source["id"] = await self._new(driver, "source")
        taken.add(source["id"])
        for row, job in unit.chunks:
            if row["id"] in chunks:
                row["id"] = await self._new(driver, "chunk")
            chunks.add(row["id"])
            row["source_id"] = source["id"]
            if job is not None:
                job["chunk_id"] = row["id"]
        for row in unit.letters:
            if row["id"] in letters:
                row["id"] = await self._new(driver, "dead_letter")
            letters.add(row["id"])
            if row["original_chunk_id"] in chunks:
                row["original_chunk_id"] = await self._new(driver, "chunk")
            row["source_id"] = source["id"]

    async def _settle_origins(self, driver: Any, batch: Sequence[_Unit]) -> None:
        """Give sources the id that the session they were made of has in the database; another may have the file's."""
        made = [unit for unit in batch if unit.values["origin_session_id"] is not None and not unit.has_origin]
        if not made:
            return
        names = ("origin_session_id", "origin_session_key", "origin_first_index", "created_at")
        rows = await driver.fetch(_SAME_ORIGIN, [unit.line for unit in made],
                                  *([unit.values[name] for unit in made] for name in names))  # fmt: skip
        there = {row["line"]: row["origin_session_id"] for row in rows}
        firsts: dict[tuple[int, str | None], list[int]] = {}
        for unit in made:
            origin, key, first = (unit.values[name] for name in names[:3])
            firsts.setdefault((origin, key), []).append(first)
        for unit in made:
            unit.has_origin = True
            origin, key = unit.values["origin_session_id"], unit.values["origin_session_key"]
            now = there.get(unit.line) or self._session_ids.get(origin)
            if now is None:
                now = await self._origin(driver, origin, key, firsts[origin, key])
            if now != origin and key is None and unit.values["document_key"] is None:
                # By nothing else it would be found again.
                unit.values["document_key"] = self._key(unit.values)
            unit.values["origin_session_id"] = now

    async def _origin(self, driver: Any, origin: int, key: str | None, firsts: Sequence[int]) -> int:
        """The id for a session that is not in the file: its own, or where another has that, one of its key, or new."""
        if (known := self._origin_ids.get((origin, key))) is not None:
            return known
        rows = await driver.fetch(
            "SELECT session_key FROM sessions WHERE id = $1"
            " UNION SELECT origin_session_key FROM knowledge_sources WHERE origin_session_id = $1",
            origin,
        )
        holders = {row[0] for row in rows}
        now: int | None = origin
        if holders and key not in holders:
            # Not one that a session has: it would take these messages for its own.
            now = await driver.fetchval(
                "SELECT origin_session_id FROM knowledge_sources AS k WHERE origin_session_key = $1"
                " AND NOT EXISTS (SELECT FROM sessions AS s WHERE s.id = k.origin_session_id)"
                " GROUP BY 1 HAVING NOT bool_or(origin_first_index = ANY($2::bigint[])) ORDER BY 1 LIMIT 1",
                key,
                firsts,
            )
        if now is None:
            now = await self._new(driver, "session")
        self._origin_ids[origin, key] = now
        return now

    async def _new(self, driver: Any, kind: str) -> int:
        self.renumbered[kind] += 1
        if self._dry_run:
            # One that no row has.
            return -(2**62) - sum(self.renumbered.values())
        new: int = await driver.fetchval("SELECT nextval(pg_get_serial_sequence($1, 'id'))", TABLES[kind].name)
        return new

    async def _letters(self, session: AsyncSession, driver: Any, batch: Sequence[_Unit]) -> None:
        moments = [unit.values["created_at"] for unit in batch]
        rows = await driver.fetch(
            "SELECT created_at, content FROM knowledge_chunks_dlq WHERE created_at = ANY($1::timestamptz[])", moments
        )
        there = Counter((row["created_at"], row["content"]) for row in rows)
        ids = [unit.values["id"] for unit in batch]
        taken = await _taken(driver, "dead_letter", ids)
        chunks = await _taken(driver, "chunk", [unit.values["original_chunk_id"] for unit in batch])
        sources = await _taken(driver, "source", [unit.values["source_id"] for unit in batch])
        new = []
        for unit in batch:
            row = unit.values
            if there[row["created_at"], row["content"]]:
                there[row["created_at"], row["content"]] -= 1
                self.tally.unchanged["dead_letter"] += 1
                continue
            self.tally.imported["dead_letter"] += 1
            if row["id"] in taken:
                row["id"] = await self._new(driver, "dead_letter")
            taken.add(row["id"])
            if row["original_chunk_id"] in chunks:
                row["original_chunk_id"] = await self._new(driver, "chunk")
            if row["source_id"] in sources:
                # Its own source is gone, and this one is another.
                row["source_id"] = None
            new.append(row)
        if not self._dry_run:
            await _copy(driver, "dead_letter", new)

    async def _pauses(self, session: AsyncSession, driver: Any, batch: Sequence[_Unit]) -> None:
        names = [unit.values["provider"] for unit in batch]
        rows = await driver.fetch("SELECT provider FROM embedding_pauses WHERE provider = ANY($1::text[])", names)
        there = {row["provider"] for row in rows}
        new = [unit.values for unit in batch if unit.values["provider"] not in there]
        self.tally.unchanged["pause"] += len(batch) - len(new)
        self.tally.imported["pause"] += len(new)
        if new and not self._dry_run:
            await driver.executemany(
                f"{_insert('pause')} ON CONFLICT DO NOTHING", [list(values.values()) for values in new]
            )


# By line, the id of the session that the same source has here. Sessions may be deleted and begun again under their
# key, so that key and place alone do not tell; those of early versions have no key.
_SAME_ORIGIN: Final = """
WITH o AS (
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::timestamptz[])
    AS o(line, id, key, first, created)
)
SELECT o.line, s.origin_session_id, false AS is_own FROM o JOIN knowledge_sources AS s
ON s.origin_session_key = o.key AND s.origin_first_index = o.first AND s.created_at = o.created
UNION ALL
SELECT o.line, s.origin_session_id, true FROM o JOIN knowledge_sources AS s
ON s.origin_session_id = o.id AND s.origin_first_index = o.first AND s.created_at = o.created
AND (o.key IS NULL OR s.origin_session_key IS NULL OR s.origin_session_key = o.key)
ORDER BY is_own
"""


async def _taken(driver: Any, kind: str, ids: Sequence[int | None]) -> set[int]:
    """Which of these ids rows have; of chunks also those that dead letters want back."""
    statement = f"SELECT id FROM {TABLES[kind].name} WHERE id = ANY($1::bigint[])"
    if kind == "chunk":
        statement += (
            " UNION SELECT original_chunk_id FROM knowledge_chunks_dlq WHERE original_chunk_id = ANY($1::bigint[])"
        )
    return {row[0] for row in await driver.fetch(statement, [each for each in ids if each is not None])}


async def _copy(driver: Any, kind: str, rows: Sequence[Values]) -> None:
    columns = [column.name for column in TABLES[kind].columns]
    for start in range(0, len(rows), COPY_ROWS):
        records = [[row[name] for name in columns] for row in rows[start : start + COPY_ROWS]]
        await driver.copy_records_to_table(TABLES[kind].name, columns=columns, records=records)


def _insert(kind: str) -> str:
    table = TABLES[kind]
    names = ", ".join(column.name for column in table.columns)
    marks = ", ".join(f"${number}" for number in range(1, len(table.columns) + 1))
    return f"INSERT INTO {table.name} ({names}) VALUES ({marks})"


def _advance(table: str) -> Any:
    return text(
        "SELECT setval(pg_get_serial_sequence(:table, 'id')::regclass, :last)"
        " WHERE coalesce(pg_sequence_last_value(pg_get_serial_sequence(:table, 'id')::regclass), 0) < :last"
    )
