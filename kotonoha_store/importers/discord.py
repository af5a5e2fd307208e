"""From Discord: the chats that DiscordChatExporter wrote, through the archive like those that the bot lived."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

from kotonoha_store.checks import check_id
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import InvalidInputError, NotFoundError, StoreUnavailableError
from kotonoha_store.importers.discord_file import ExportFile, Place, ReadMessage, export_files
from kotonoha_store.importers.report import Counts, ImportReport, Rejects, name
from kotonoha_store.importers.session_rows import SessionRow, extend_session, insert_sessions
from kotonoha_store.records import Message, Progress
from kotonoha_store.store import Store

CONVERSATION_GAP: Final = timedelta(hours=6)
"""After so long a silence another conversation, and source, begins."""

_ATTEMPTS: Final = 5

_STATE: Final = """
SELECT id, messages_offset + jsonb_array_length(messages) AS total FROM sessions WHERE session_key = $1
"""

# Of whichever session: what the bot lived itself is not taken in again.
_KNOWN: Final = r"""
SELECT CASE WHEN each.value ->> 'message_id' ~ '^\d{1,19}$' THEN (each.value ->> 'message_id')::numeric END AS id
FROM (
    SELECT messages FROM sessions WHERE session_key = $1 OR coalesce(thread_id, channel_id) = $2
    UNION ALL
    SELECT archived_messages FROM knowledge_sources
    WHERE archived_messages IS NOT NULL AND (origin_session_key = $1 OR coalesce(thread_id, channel_id) = $2)
) AS held, jsonb_array_elements(held.messages) AS each
"""
_NEWEST: Final = f"SELECT coalesce(max(id), 0)::text FROM ({_KNOWN}) AS known"  # noqa: S608  of a constant
_ALL_KNOWN: Final = f"SELECT id::text FROM ({_KNOWN}) AS known WHERE id IS NOT NULL"  # noqa: S608  of a constant

T = TypeVar("T")


async def import_discord(
    store: Store,
    paths: Sequence[Path],
    *,
    bot_ids: Collection[int] | None = None,
    gap: timedelta = CONVERSATION_GAP,
    rejects: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Import chats that DiscordChatExporter wrote as JSON: files, or folders of them.

    Each channel and thread becomes a session with the key ``discord:<its id>``. Its conversations are archived one
    by one, so that it stays short, with the places, links and words that they would have if the bot had lived
    them; their chunks wait to be embedded. What is too short to be archived by itself stays in the session and goes
    with the next conversation.

    A message is taken in once, by its id, whichever session of that channel has it: run again, with the same export
    or a longer one, only new messages are added, and an import that was stopped goes on. What was edited or deleted
    in Discord after its import stays as it was. Several imports may run at once.

    Notices (joins, pins, calls) and messages without any text are left out and counted. The names of attachments and
    stickers are part of the text; embeds only of messages that have no text else.

    Args:
        bot_ids: whose messages are the assistant's; those of all bots where none are given.
        gap: after so long a silence another conversation begins.
        rejects: a file for what is set aside; see :class:`Rejects`.
        dry_run: read and compare, but write nothing to the database.
        progress: called with bytes.

    Raises:
        InvalidInputError: a path does not exist, there is no file, the gap is not positive, an id is none, or the file
            of rejects cannot be written.
        ConfigurationError: ijson is not installed (extra ``imports``).
        StoreUnavailableError: the database did not answer; what was imported stays.
    """
    if gap <= timedelta(0):
        raise InvalidInputError(f"gap must be positive, got {gap}")
    bots = None if bot_ids is None else frozenset(check_id(each, "bot_ids") for each in bot_ids)
    progress = progress or (lambda _done, _total: None)
    with Rejects(rejects) as rejected, ThreadPoolExecutor(1, "import-discord") as executor:
        files = await _in(executor, lambda: [(path, path.stat().st_size) for path in export_files(paths)])
        run = _Run(store, rejected, gap, dry_run=dry_run)
        done, total = 0, sum(size for _, size in files)
        progress(0, total)
        for path, size in files:
            try:
                file = await _in(executor, partial(ExportFile, path, bots))
            except InvalidInputError as error:
                run.reject_file(path, str(error))
            else:
                try:
                    await run.begin(file.place)
                    while messages := await _in(executor, file.messages):
                        if not await run.take(path, messages):
                            break
                        progress(done + file.read, total)
                    await run.end(path, file.damage)
                finally:
                    executor.submit(file.close)
            done += size
            progress(done, total)
        return run.report()


async def _in(executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, work)


class _Run:
    """What one import writes and counts."""

    def __init__(self, store: Store, rejects: Rejects, gap: timedelta, *, dry_run: bool) -> None:
        self._store = store
        self._limit = store.settings.kb_archive_max_messages
        self._rejects = rejects
        self._gap = gap
        self._dry_run = dry_run
        self._counts = Counts()
        self._files = Counts()
        self._skipped: Counter[str] = Counter()
        self._places: set[int] = set()
        self._sources = self._chunks = 0
        self._channel: _Channel | None = None
        self._conversation: list[Message] = []
        self._problem: str | None = None
        self._began = False

    async def begin(self, place: Place) -> None:
        """Begin a file."""
        self._places.add(place.id)
        self._problem = None
        self._began = False
        self._conversation = []
        # The next part of the same export goes on where that one ended.
        if self._channel is None or self._channel.place != place:
            self._channel = _Channel(self._store.database, place, dry_run=self._dry_run)
            await self._channel.load()
        if self._channel.session_id is not None and not self._dry_run:
            await self._archive(self._channel.session_id)  # what a run that was stopped had appended

    async def take(self, path: Path, messages: Sequence[ReadMessage]) -> bool:
        """Take in a slice; return whether the file can go on."""
        ids = [message.id for message in messages if message.id]
        # Most of them: one wrong id turns no export around.
        if not self._began and sum(one > other for one, other in pairwise(ids)) * 2 > len(ids) - 1:
            self._problem = "its newest message stands first; export it again in chronological order"
            return False
        self._began = True
        for read in messages:
            await self._take(path, read)
        return True

    async def _take(self, path: Path, read: ReadMessage) -> None:
        if read.notice is not None:
            self._skipped[read.notice] += 1
            self._counts += Counts(read=1, skipped=1)
            return
        if read.message is None:
            where = f"{name(str(path))}, message {read.id or f'number {read.number}'}"
            self._rejects.add(where, read.problem or "it cannot be read", read.raw)
            self._counts += Counts(read=1, rejected=1)
            return
        if self._conversation and (
            len(self._conversation) >= self._limit or _time(read.message) - _time(self._conversation[-1]) >= self._gap
        ):
            await self._flush()
        # Only now: what the append found that others had written counts.
        if await self._opened.is_new(read.id):
            self._conversation.append(read.message)
        else:
            self._counts += Counts(read=1, unchanged=1)

    async def end(self, path: Path, damage: str | None) -> None:
        """End a file."""
        await self._flush()
        if problem := self._problem or damage:
            self.reject_file(path, problem)
        else:
            self._files += Counts(read=1, imported=1)

    def reject_file(self, path: Path, reason: str) -> None:
        self._rejects.add(name(str(path)), reason)
        self._files += Counts(read=1, rejected=1)

    @property
    def _opened(self) -> "_Channel":
        assert self._channel is not None, "begin() comes first"  # noqa: S101  for the type checker
        return self._channel

    async def _flush(self) -> None:
        """Append the conversation and archive it."""
        messages, self._conversation = self._conversation, []
        if not messages:
            return
        if self._dry_run:
            self._counts += Counts(read=len(messages), imported=len(messages))
            return
        appended = await self._opened.append(messages, self._limit)
        self._counts += Counts(read=len(messages), imported=appended, unchanged=len(messages) - appended)
        if appended and self._opened.session_id is not None:
            await self._archive(self._opened.session_id)

    async def _archive(self, session_id: int) -> None:
        try:
            archived = await self._store.archiver.archive(session_id)
        except NotFoundError:
            return  # deleted meanwhile: the next append notices it
        if archived is not None and archived.source_id is not None:
            self._sources += 1
            self._chunks += archived.chunks

    def report(self) -> ImportReport:
        return ImportReport(
            **asdict(self._counts),
            what="messages",
            inner={"files": self._files},
            details={"channels": len(self._places), "sources": self._sources, "chunks": self._chunks},
            notes=tuple(f"Left out: {count} {what}." for what, count in sorted(self._skipped.items())),
            rejections=self._rejects.first,
            set_aside=self._rejects.count,
            is_dry_run=self._dry_run,
        )


def _time(message: Message) -> datetime:
    assert message.timestamp is not None, "an exported message has its time"  # noqa: S101  for the type checker
    return message.timestamp


class _Channel:
    """The session of one channel or thread, and which of its messages are known.

    A message that is newer than all known ones is new: only for an older one the ids are loaded, about 100 bytes each.
    """

    def __init__(self, database: Database, place: Place, *, dry_run: bool) -> None:
        self.session_id: int | None = None
        self._database = database
        self.place = place
        self._dry_run = dry_run
        self._total = 0
        self._newest = 0
        self._known: set[int] | None = None
        # Of the conversation that is not written yet.
        self._taken: set[int] = set()

    async def load(self) -> None:
        """Read how the session stands now."""
        async with self._database.driver() as driver:
            with translated_errors():
                await self._load(driver)

    async def _load(self, driver: Any) -> None:
        row = await driver.fetchrow(_STATE, self.place.session_key)
        self.session_id, self._total = (None, 0) if row is None else (row["id"], row["total"])
        self._known = None
        self._newest = int(await driver.fetchval(_NEWEST, self.place.session_key, self.place.id))
        if self._dry_run:
            await self._load_known(driver)

    async def _load_known(self, driver: Any) -> set[int]:
        rows = await driver.fetch(_ALL_KNOWN, self.place.session_key, self.place.id)
        self._known = {int(row["id"]) for row in rows}
        return self._known

    async def is_new(self, message_id: int) -> bool:
        """Whether the message is not known; it is from now on."""
        if message_id <= self._newest:
            if self._known is None:
                async with self._database.driver() as driver:
                    with translated_errors():
                        await self._load_known(driver)
            assert self._known is not None  # noqa: S101  loaded above
            if message_id in self._known or message_id in self._taken:
                return False
        self._newest = max(self._newest, message_id)
        self._taken.add(message_id)
        return True

    async def append(self, messages: Sequence[Message], limit: int) -> int:
        """Append what nobody else has appended meanwhile; return how many."""
        async with self._database.driver() as driver:
            with translated_errors():
                for _ in range(_ATTEMPTS):
                    if not messages or await self._append(driver, messages, limit):
                        if self._known is not None:
                            self._known |= self._taken
                        self._taken.clear()
                        return len(messages)
                    await self._load(driver)
                    known = await self._load_known(driver)
                    messages = [message for message in messages if message.message_id not in known]
        raise StoreUnavailableError("others import the same channel all the time; run the import again later")

    async def _append(self, driver: Any, messages: Sequence[Message], limit: int) -> bool:
        stored = [message.to_stored() for message in messages]
        times = [_time(message) for message in messages]
        if self.session_id is None:
            place = self.place
            row = SessionRow(place.session_key, place.session_type, place.scope, stored, min(times), max(times))
            inserted = await insert_sessions(driver, [row], max_messages=limit)
            self.session_id = inserted.get(place.session_key)
            is_done = self.session_id is not None
        else:
            is_done = await extend_session(
                driver, self.session_id, stored, total=self._total, last_active_at=max(times), max_messages=limit
            )
        if is_done:
            self._total += len(stored)
        return is_done
