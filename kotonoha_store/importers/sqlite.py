"""From SQLite: the sessions of the old bot's file, one way."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Final, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from kotonoha_store.checks import check_id
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.report import Counts, ImportReport, Rejects, name
from kotonoha_store.importers.session_rows import (
    SessionRow,
    StoredSession,
    compare,
    digest,
    extend_session,
    insert_sessions,
    stored_digest,
    stored_sessions,
)
from kotonoha_store.importers.sqlite_file import ReadSession, SessionFile
from kotonoha_store.records import Progress

_ATTEMPTS: Final = 5

T = TypeVar("T")


async def import_sqlite(
    database: Database,
    path: Path,
    *,
    guild_id: int | None = None,
    timezone: str = "UTC",
    rejects: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Import the sessions of the old bot's SQLite file, with the times at which they were made and last used.

    The file is opened read-only and read in one transaction: a bot that uses WAL, as the old one does, may go on
    writing. Batches are committed one by one: an import that was stopped is run again and goes on. Run again it
    changes nothing, but appends what the old bot has added since. A session that was changed here, or was
    archived and deleted here, is left as it is and counted as ``kept``. Several imports may run at once.

    A session whose key, type, times or ids cannot be used is set aside whole; of one with single bad messages
    these are, and the others imported. A message whose time cannot be read is imported without one.

    What was written or found unchanged is read back, archived messages included, and compared by checksums.

    Args:
        guild_id: the server that the bot was on; the file does not name it.
        timezone: of times without a zone, such as ``Asia/Tokyo``.
        rejects: a file for what is set aside; see :class:`Rejects`.
        dry_run: read and compare, but write nothing to the database.
        progress: called with sessions.

    Raises:
        InvalidInputError: the file is no SQLite file, is encrypted, locked or damaged, or lacks the table or columns;
            the zone is unknown; the file of rejects cannot be written.
        StoreUnavailableError: the database did not answer; what was imported stays.
    """
    if guild_id is not None:
        check_id(guild_id, "guild_id")
    zone = _zone(timezone)
    # One thread for the file, so that it is closed when nothing reads it any more.
    with Rejects(rejects) as rejected, ThreadPoolExecutor(1, "import-sqlite") as executor:
        source: SessionFile | None = None
        stop = threading.Event()
        try:
            source = await _in(executor, lambda: SessionFile(path, zone, guild_id, stop))
            run = _Run(database, rejected, timezone, guild_id, dry_run=dry_run)
            progress = progress or (lambda _done, _total: None)
            progress(0, source.total)
            while batch := await _in(executor, source.batch):
                await run.take(batch)
                progress(run.counts.read, source.total)
            if source.damage is not None:
                run.reject_rest(source)
            return run.report()
        finally:
            stop.set()
            if source is not None:
                executor.submit(source.close)


async def _in(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


def _zone(timezone: str) -> tzinfo:
    if timezone == "UTC":
        return UTC  # also where the system has no time zones
    try:
        return ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidInputError(
            f"there is no time zone {name(timezone)}; give one such as UTC or Asia/Tokyo (where the system has no "
            "time zones: pip install tzdata)"
        ) from None


class _Run:
    """What one import writes and counts."""

    def __init__(
        self, database: Database, rejects: Rejects, timezone: str, guild_id: int | None, *, dry_run: bool
    ) -> None:
        self.counts = Counts()
        self._messages = Counts()
        self._database = database
        self._max_messages = database.settings.kb_archive_max_messages
        self._rejects = rejects
        self._timezone = timezone
        self._guild_id = guild_id
        self._dry_run = dry_run
        self._extended = self._zoneless = self._untimed = self._future = self._guildless = 0
        self._read_sum = hashlib.sha256()
        self._stored_sum = hashlib.sha256()
        self._notes: list[str] = []

    async def take(self, batch: Sequence[ReadSession]) -> None:
        """Import these rows."""
        sessions = []
        for read in batch:
            for index, reason, message in read.rejected:
                record = {"session_key": read.raw["session_key"], "index": index, "message": message}
                self._rejects.add(f"{read.where}, message {index + 1}", reason, record)
            bad = len(read.rejected)
            self._messages += Counts(read=bad, rejected=bad)
            self._zoneless += read.is_zoneless
            self._untimed += read.untimed
            if read.session is None:
                self._reject(read, read.problem or "it cannot be read", read.messages - bad)
            else:
                self._future += read.session.last_active_at > datetime.now(UTC) + timedelta(minutes=5)
                sessions.append(read)
        if sessions:
            async with self._database.driver() as driver:
                with translated_errors():
                    await self._write(driver, sessions)

    async def _write(self, driver: Any, reads: Sequence[ReadSession]) -> None:
        written: dict[str, int] = {}
        left = {_session(read).key: read for read in reads}
        for _ in range(_ATTEMPTS):
            stored = await stored_sessions(driver, list(left))
            new, longer = [], []
            for key, read in list(left.items()):
                session, found = _session(read), stored.get(key)
                how = "new" if key not in stored else "differs" if found is None else compare(session, found)
                if how == "new":
                    new.append(read)
                elif how == "longer":
                    longer.append((read, found))
                else:
                    del left[key]
                    self._settle(read, found, how, written.get(key))
            if not left:
                return
            if self._dry_run:
                for read in new:
                    self._count(Counts(read=1, imported=1), Counts(imported=len(_session(read).messages)))
                for read, found in longer:
                    assert found is not None  # noqa: S101  compared with it
                    self._extended += 1
                    self._count_extended(read, found.total)
                return
            for read in await self._insert(driver, new):
                written[_session(read).key] = 0
            left = {key: read for key, read in left.items() if read.problem is None}
            for read, found in longer:
                assert found is not None  # noqa: S101  compared with it
                if await self._extend(driver, _session(read), found):
                    written[_session(read).key] = found.total
        for read in left.values():
            self._reject(read, "it changes in the database while it is imported; run the import again")

    def _settle(self, read: ReadSession, found: StoredSession | None, how: str, written_from: int | None) -> None:
        """Count a session of which all is in the database, or which differs there."""
        session = _session(read)
        if how == "differs" and written_from is not None:
            self._reject(read, "it does not stand in the database as it was read; run the import again")
            return
        if how == "differs" or found is None:
            self._count(Counts(read=1, kept=1), Counts(kept=len(session.messages)))
            return
        self._read_sum.update(digest(session.key, session.type, session.scope, session.messages))
        self._stored_sum.update(stored_digest(session.key, found, session))
        self._guildless += session.scope.guild_id is not None and found.scope.guild_id is None
        if written_from is None:
            self._count(Counts(read=1, unchanged=1), Counts(unchanged=len(session.messages)))
        else:
            self._extended += written_from > 0
            self._count_extended(read, written_from)

    def _count_extended(self, read: ReadSession, before: int) -> None:
        imported = len(_session(read).messages) - before
        self._count(Counts(read=1, imported=1), Counts(imported=imported, unchanged=before))

    def _count(self, session: Counts, messages: Counts) -> None:
        read = messages.imported + messages.unchanged + messages.kept + messages.rejected
        self.counts += session
        self._messages += messages + Counts(read=read)

    def _reject(self, read: ReadSession, reason: str, messages: int | None = None) -> None:
        read.problem = reason
        self._rejects.add(read.where, reason, read.raw)
        count = messages if messages is not None else len(_session(read).messages)
        self._count(Counts(read=1, rejected=1), Counts(rejected=count))

    async def _insert(self, driver: Any, reads: Sequence[ReadSession]) -> list[ReadSession]:
        """Insert the sessions whose keys are free; what the server refuses is set aside alone."""
        if not reads:
            return []
        rows = [_session(read) for read in reads]
        try:
            with translated_errors():
                inserted = await insert_sessions(driver, rows, max_messages=self._max_messages)
        except InvalidInputError as error:
            if len(reads) == 1:
                self._reject(reads[0], str(error))
                return []
            half = len(reads) // 2
            return await self._insert(driver, reads[:half]) + await self._insert(driver, reads[half:])
        return [read for read in reads if _session(read).key in inserted]

    async def _extend(self, driver: Any, session: SessionRow, found: StoredSession) -> bool:
        return await extend_session(
            driver,
            found.id,
            session.messages[found.total :],
            total=found.total,
            last_active_at=session.last_active_at,
            max_messages=self._max_messages,
        )

    def reject_rest(self, source: SessionFile) -> None:
        """Tell of what a damaged file no longer gives."""
        rest = max(source.total - self.counts.read, 1)
        self._rejects.add(name(str(source.path)), f"the file is damaged: {rest} sessions could not be read")
        self.counts += Counts(read=rest, rejected=rest)
        self._notes.append("The file is damaged: `sqlite3 FILE .recover` may bring back more of it.")

    def report(self) -> ImportReport:
        notes = self._notes
        if self._zoneless:
            notes.append(f"{self._zoneless} sessions have times without a zone: read as {self._timezone} (--timezone).")
        if self._untimed:
            notes.append(f"{self._untimed} messages have a time that cannot be read: kept without one.")
        if self._future:
            notes.append(f"{self._future} sessions were last active in the future: is the time zone right?")
        if self.counts.kept:
            notes.append(f"{self.counts.kept} sessions were changed or deleted here since: left as they are.")
        if self._guildless:
            notes.append(f"{self._guildless} sessions stand here without a guild: left so.")
        details: dict[str, int | str] = {"extended": self._extended}
        if not self._dry_run:
            details["checksum_read"] = self._read_sum.hexdigest()
            details["checksum_stored"] = self._stored_sum.hexdigest()
        return ImportReport(
            **asdict(self.counts),
            what="sessions",
            inner={"messages": self._messages},
            details=details,
            notes=tuple(notes),
            rejections=self._rejects.first,
            set_aside=self._rejects.count,
            is_dry_run=self._dry_run,
        )


def _session(read: ReadSession) -> SessionRow:
    assert read.session is not None, "only what could be read is written"  # noqa: S101  for the type checker
    return read.session
