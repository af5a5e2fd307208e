"""Documents from files: text, Markdown, HTML and PDF."""

import asyncio
import hashlib
import os
from collections import Counter, deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import select

from kotonoha_store.document_parts import TextPart, document_chunks
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.document import Document, Part, PassedOver, Unreadable, one_line
from kotonoha_store.importers.file_paths import Folder, FoundFile, FoundFiles, find_files
from kotonoha_store.importers.reader_pool import ReaderPool
from kotonoha_store.importers.report import Counts, ImportReport, Rejects
from kotonoha_store.models import KnowledgeSource
from kotonoha_store.records import DocumentResult, NewChunk, Progress, Scope, SourceType
from kotonoha_store.search_records import SearchFilters
from kotonoha_store.store import Store

_NOTES_MAX: Final = 20
_PRUNED_AT_ONCE: Final = 500
_IMPORTER: Final = "files"


@dataclass(frozen=True, slots=True)
class _Ready:
    """A file that was read: its document's values, or why there is none."""

    file: FoundFile
    type: SourceType = SourceType.DOCUMENT_FILE
    uri: str = ""
    title: str = ""
    chunks: Sequence[NewChunk] = field(default=(), repr=False)
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    passed_over: str | None = None
    unreadable: str | None = None


class _DryRun(Exception):
    """Rolls back what was tried."""


async def import_files(
    store: Store,
    paths: Sequence[Path],
    *,
    globs: Sequence[str] = (),
    root: Path | None = None,
    base_url: str | None = None,
    scope: Scope | None = None,
    source_type: SourceType | None = None,
    encoding: str | None = None,
    prune: bool = False,
    dry_run: bool = False,
    rejects: Path | None = None,
    concurrency: int = 2,
    seconds: float = 60,
    max_bytes: int = 100 * 2**20,
    progress: Progress | None = None,
) -> ImportReport:
    """Import files as documents, page by page or section by section.

    Each file is a source of its own, written in a transaction of its own: an import that was stopped is run again
    and goes on. A file that was imported before, under the same address and scope, replaces what it was; chunks
    whose text did not change keep their vectors, and an unchanged file changes nothing. Several imports may run at
    once. Parsers run in processes of their own, within limits of time and memory.

    A document's address (``uri``) is the base URL, or else the name of the root, and the file's path below it: it is
    the same wherever the folder lies. A saved web page that names its own address has that one, unless a base URL is
    given. Two folders of one name need different scopes or base URLs.

    ``occurred_at`` is a date that the document gives for itself (front matter, meta element, PDF); the file's own
    stands in the metadata, as ``modified_at``.

    Args:
        paths: files and folders; of folders, see :func:`kotonoha_store.importers.file_paths.find_files`.
        globs: which files of folders, such as ``*.md``; text, Markdown, HTML and PDF by default.
        root: what addresses are relative to; by default each folder given, and of a file given its own folder.
        base_url: where the root is published.
        scope: whose the documents are.
        source_type: by default ``web_page`` for HTML, else ``document_file``.
        encoding: of files of text without a byte order mark, where it is known; else it is found.
        prune: delete the documents of this scope that were imported from the given folders, and whose files are gone,
            or stand under another address or type by now. Of another folder of the same name none is deleted.
        dry_run: tell what would be done; nothing is written, but rejects.
        rejects: a file for what is set aside; see :class:`~kotonoha_store.importers.report.Rejects`.
        concurrency: how many files are parsed at once.
        seconds: how long the parsing of one may take.
        max_bytes: longer files are set aside.
        progress: called with files.

    Raises:
        ConfigurationError: the extra ``files`` is not installed.
        NotFoundError: there is no such path.
        InvalidInputError: an option is out of range, a folder to prune holds nothing at all, or two have one name.
        StoreUnavailableError: the database did not answer; what was imported stays.
    """
    if source_type is not None and source_type not in (SourceType.DOCUMENT_FILE, SourceType.WEB_PAGE):
        raise InvalidInputError("files become document_file or web_page; give one of these as the type")
    progress = progress or (lambda _done, _total: None)
    pool = ReaderPool(concurrency, seconds=seconds, max_bytes=max_bytes, encoding=encoding)
    found = await asyncio.to_thread(find_files, paths, globs=globs, root=root, base_url=base_url)
    if prune:
        _check_prune(paths, found)
    with Rejects(rejects) as rejected:
        run = _Run(store, scope or Scope(), source_type, rejected, has_base=base_url is not None, dry_run=dry_run)
        run.look_at(found)
        progress(0, len(found.files))
        async with pool, aclosing(run.read(pool, found.files, concurrency)) as documents:
            done = 0
            async for ready in documents:
                await run.take(ready)
                done += 1
                progress(done, len(found.files))
        if prune:
            await run.prune(found.folders)
        return run.report()


def _check_prune(paths: Sequence[Path], found: FoundFiles) -> None:
    if len(found.folders) < len(paths):
        raise InvalidInputError("only folders can be pruned: give the folder, or import the file without pruning")
    if not found.files and not found.passed_over:
        raise InvalidInputError("nothing lies in what is to be pruned; is it mounted? nothing was changed")
    roots: dict[str, str] = {}
    for folder in found.folders:
        if roots.setdefault(folder.prefix, folder.root) != folder.root:
            raise InvalidInputError(
                "two of these folders have the same name, and so their documents the same addresses: prune one at a "
                "time, or give a --root that holds both"
            )


class _Run:
    """What one import writes and counts."""

    def __init__(
        self,
        store: Store,
        scope: Scope,
        source_type: SourceType | None,
        rejects: Rejects,
        *,
        has_base: bool,
        dry_run: bool,
    ) -> None:
        self._store = store
        self._scope = scope
        self._type = source_type
        self._rejects = rejects
        self._has_base = has_base
        self._dry_run = dry_run
        self._counts = Counts()
        self._chunks = Counts()
        self._details = Counter({"new": 0, "changed": 0, "removed_chunks": 0})
        self._passed_over: Counter[str] = Counter()
        self._suffixes: Counter[str] = Counter()
        self._notes: list[str] = []
        self._more_notes = 0
        # What stands under each address, so that no file of this run replaces another's.
        self._taken: dict[tuple[SourceType, str], FoundFile] = {}
        self._stored: dict[tuple[str, str], tuple[SourceType, str]] = {}

    def look_at(self, found: FoundFiles) -> None:
        """Count what is not read at all."""
        self._passed_over += found.passed_over
        self._suffixes += found.suffixes
        skipped = found.passed_over.total()
        self._counts += Counts(read=skipped, skipped=skipped)
        for where, reason in found.unreadable:
            self._reject(where, reason)

    async def read(self, pool: ReaderPool, files: Sequence[FoundFile], ahead: int) -> AsyncGenerator[_Ready, None]:
        """Yield the files in their order, while the next ones are read."""
        tasks: deque[asyncio.Task[_Ready]] = deque()
        try:
            for file in files:
                tasks.append(asyncio.create_task(self._read(pool, file)))
                if len(tasks) > ahead:
                    yield await tasks.popleft()
            while tasks:
                yield await tasks.popleft()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, pool: ReaderPool, file: FoundFile) -> _Ready:
        try:
            document = await pool.read(file.path)
        except PassedOver as error:
            return _Ready(file, passed_over=str(error))
        except Unreadable as error:
            return _Ready(file, unreadable=str(error))
        return await asyncio.to_thread(self._ready, file, document)

    def _ready(self, file: FoundFile, document: Document) -> _Ready:
        kind = SourceType.WEB_PAGE if document.kind == "html" else SourceType.DOCUMENT_FILE
        type_ = self._type or kind
        is_elsewhere = type_ is SourceType.WEB_PAGE and not self._has_base
        uri = (is_elsewhere and document.url) or file.uri
        settings = self._store.settings
        chunks = document_chunks(
            [_text_part(part, file, uri) for part in document.parts],
            uri=uri,
            occurred_at=None if document.occurred_at is None else datetime.fromisoformat(document.occurred_at),
            max_tokens=settings.kb_chunk_max_tokens,
            overlap_ratio=settings.kb_chunk_overlap_ratio,
        )
        metadata = {
            **document.metadata,
            "importer": _IMPORTER,
            "root": file.prefix,
            "root_id": _root_id(file.root),
            "path": file.relative,
            "format": document.kind,
            "bytes": document.size,
            "modified_at": document.modified_at,
        }
        if document.url is not None and document.url != uri:
            metadata["published_at"] = document.url
        title = document.title or one_line(file.name) or file.relative
        return _Ready(file, type_, uri, title, chunks, metadata, document.notes)

    async def take(self, ready: _Ready) -> None:
        """Write a document, or count why there is none."""
        file = ready.file
        if ready.passed_over is not None:
            self._passed_over[ready.passed_over] += 1
            self._counts += Counts(read=1, skipped=1)
            return
        if ready.unreadable is not None:
            self._reject(file.where, ready.unreadable, file.path)
            return
        first = self._taken.setdefault((ready.type, ready.uri), file)
        if first is not file:
            self._reject(file.where, f"has the same address as {first.where}", file.path)
            return
        try:
            result = await self._put(ready)
        except InvalidInputError as error:
            self._reject(file.where, str(error), file.path)
            return
        self._stored[file.prefix, file.relative] = (ready.type, ready.uri)
        is_same = not result.added and not result.removed
        if not is_same:
            self._details["changed" if result.kept or result.removed else "new"] += 1
        self._details["removed_chunks"] += result.removed
        self._counts += Counts(read=1, imported=not is_same, unchanged=is_same)
        self._chunks += Counts(read=len(ready.chunks), imported=result.added, unchanged=result.kept)
        for note in ready.notes:
            self._note(f"{file.where}: {note}.")

    async def _put(self, ready: _Ready) -> DocumentResult:
        try:
            async with self._store.begin() as tx:
                result = await tx.knowledge.put_document(
                    ready.title,
                    ready.chunks,
                    type=ready.type,
                    uri=ready.uri,
                    scope=self._scope,
                    metadata=ready.metadata,
                )
                if self._dry_run:
                    raise _DryRun
        except _DryRun:
            pass
        return result

    async def prune(self, folders: Sequence[Folder]) -> None:
        """Delete what was imported from these folders and has no file any more."""
        gone: dict[int, str] = {}
        elsewhere: set[int] = set()
        kept = set(self._stored.values())
        for folder in folders:
            root_id = _root_id(folder.root)
            for source_id, type_, uri, path, its_root in await self._imported(folder.prefix):
                now = self._stored.get((folder.prefix, path))
                has_moved = now not in (None, (type_, uri))
                if (type_, uri) in kept or not (has_moved or await asyncio.to_thread(folder.has_lost, path)):
                    continue
                if its_root == root_id:
                    gone[source_id] = uri
                else:
                    elsewhere.add(source_id)
        if elsewhere:
            self._note(
                f"{len(elsewhere)} documents without a file here were imported from another folder of this name, from "
                "another place, or by a version that did not note which: not pruned."
            )
        ids = sorted(gone)
        for start in range(0, len(ids), _PRUNED_AT_ONCE):
            batch = SearchFilters(source_ids=tuple(ids[start : start + _PRUNED_AT_ONCE]))
            async with self._store.begin() as tx:
                await tx.knowledge.delete_chunks(batch, dry_run=self._dry_run)
        self._details["pruned"] = len(ids)
        for source_id in ids:
            self._note(f"Pruned: {gone[source_id]}")

    async def _imported(self, prefix: str) -> list[tuple[int, SourceType, str, str, object]]:
        columns = KnowledgeSource.id, KnowledgeSource.type, KnowledgeSource.uri, KnowledgeSource.source_metadata
        statement = select(*columns).where(
            KnowledgeSource.source_metadata.contains({"importer": _IMPORTER, "root": prefix}),
            *(
                getattr(KnowledgeSource, column).is_not_distinct_from(value)
                for column, value in asdict(self._scope).items()
            ),
        )
        async with self._store.begin() as tx:
            rows = (await tx.session.execute(statement)).all()
        return [
            (row[0], row[1], row[2], path, row[3].get("root_id"))
            for row in rows
            if isinstance(path := row[3].get("path"), str) and row[2]
        ]

    def _reject(self, where: str, reason: str, record: object = None) -> None:
        self._rejects.add(where, reason, record)
        self._counts += Counts(read=1, rejected=1)

    def _note(self, sentence: str) -> None:
        if len(self._notes) < _NOTES_MAX:
            self._notes.append(sentence)
        else:
            self._more_notes += 1

    def report(self) -> ImportReport:
        notes = self._notes
        if self._more_notes:
            notes.append(f"And {self._more_notes} more such notes.")
        if self._passed_over:
            notes.append(
                "Passed over: " + ", ".join(f"{n} {why}" for why, n in sorted(self._passed_over.items())) + "."
            )
        if self._suffixes:
            some = ", ".join(f"{suffix} {n}" for suffix, n in self._suffixes.most_common(10))
            notes.append(f"Other types can be imported by --glob, where they are text: {some}.")
        if not self._counts.read:
            notes.append("No files were found.")
        return ImportReport(
            **asdict(self._counts),
            what="files",
            inner={"chunks": self._chunks},
            details=dict(self._details),
            notes=tuple(notes),
            rejections=self._rejects.first,
            set_aside=self._rejects.count,
            is_dry_run=self._dry_run,
        )


def _root_id(root: str) -> str:
    """Tells folders of one name apart, without telling who reads the hits where they lie."""
    return hashlib.sha256(os.fsencode(root)).hexdigest()


def _text_part(part: Part, file: FoundFile, uri: str) -> TextPart:
    location: dict[str, Any] = {}
    if part.page is not None:
        location["page"] = part.page
    if part.section:
        location["section"] = list(part.section)
    place = f"page {part.page}" if part.page is not None else " > ".join(part.section)
    label = ", ".join(each for each in (one_line(file.name), one_line(place)) if each)
    url = None if part.anchor is None else f"{uri}#{quote(part.anchor, safe='=~!$&()*+,;:@/?')}"
    return TextPart(part.text, label=label, url=url, start=part.start, location=location)
