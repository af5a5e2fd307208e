"""Documents as lines of JSON, with or without chunks and vectors of their own."""

import asyncio
import base64
import binascii
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import Field, JsonValue

from kotonoha_store.bulk_load import LoadReport, NewDocument, load_documents
from kotonoha_store.database import Database
from kotonoha_store.document_parts import document_chunks
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.importers.lines import raw_lines
from kotonoha_store.importers.report import Counts, ImportReport, Rejects
from kotonoha_store.index_builds import OnProgress
from kotonoha_store.records import BigInt, Input, Instant, JsonObject, NewChunk, Progress, Scope, SourceType, StoredText
from kotonoha_store.settings import Settings

_BLOCK: Final = 2**16
_LOOKED_AT: Final = 10
_DAMAGED: Final = (EOFError, gzip.BadGzipFile, zlib.error)


class ChunkLine(Input):
    """A chunk that is cut already; ``embedding`` is a list of numbers or base64 of little-endian half precision."""

    content: StoredText
    location: JsonObject = Field(default_factory=dict)
    token_count: int | None = None
    occurred_from: Instant | None = None
    occurred_to: Instant | None = None
    embedding: list[float] | str | None = Field(default=None, repr=False)
    embedding_model: StoredText | None = None


class DocumentLine(Input):
    """A line: a document with its text, which is cut into chunks, or with chunks that are ready.

    Attributes:
        uri: with type and scope what makes it the same document when it is imported again.
        occurred_at: the time of chunks that say none.
        embedding_model: of vectors that say none.
    """

    title: StoredText
    text: StoredText | None = Field(default=None, repr=False)
    chunks: list[ChunkLine] | None = Field(default=None, repr=False)
    type: SourceType = SourceType.DOCUMENT_FILE
    uri: StoredText | None = None
    guild_id: BigInt | None = None
    channel_id: BigInt | None = None
    thread_id: BigInt | None = None
    user_id: BigInt | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    occurred_at: Instant | None = None
    embedding_model: StoredText | None = None


async def import_documents(
    database: Database,
    path: Path,
    *,
    dry_run: bool = False,
    rejects: Path | None = None,
    rebuild: bool | None = None,
    progress: Progress | None = None,
    on_build: OnProgress | None = None,
) -> ImportReport:
    """Load a file with a document a line; see :func:`kotonoha_store.bulk_load.load_documents`.

    Run again it goes on, and changes only what changed in the file.

    Raises:
        InvalidInputError: the file cannot be read, or holds no JSON lines at all.
        ConfigurationError, StoreUnavailableError: see there.
    """
    with Rejects(rejects) as aside:
        reading = _Reading(path, database.settings, aside)
        await asyncio.to_thread(reading.check)
        report = await load_documents(
            database,
            reading.documents(),
            rebuild=rebuild,
            dry_run=dry_run,
            progress=progress,
            on_rejected=lambda _, error: reading.reject(error),
            on_build=on_build,
        )
        return _report(report, aside, reading, dry_run=dry_run)


def _report(report: LoadReport, aside: Rejects, reading: "_Reading", *, dry_run: bool) -> ImportReport:
    imported = report.added + report.changed
    notes = list(reading.notes)
    if report.rebuild_pays:
        notes.append("so many vectors are written faster with --rebuild, which builds the index afterwards")
    if report.index == "missing":
        notes.append("the HNSW index is missing; have its owner run `kotonoha-store reindex --broken`")
    return ImportReport(
        read=imported + report.unchanged + aside.count,
        imported=imported,
        unchanged=report.unchanged,
        rejected=aside.count,
        what="documents",
        inner={"chunks": Counts(read=report.chunks, imported=report.chunks)},
        details={
            "changed": report.changed,
            "vectors": report.vectors,
            "vector index": "untouched" if dry_run else report.index,
        },
        notes=tuple(notes),
        rejections=aside.first,
        set_aside=aside.count,
        is_dry_run=dry_run,
    )


@dataclass(slots=True)
class _Reading:
    """The file, and the line that is in hand."""

    path: Path
    settings: Settings
    aside: Rejects
    notes: list[str] = field(default_factory=list)
    _number: int = 0
    _line: bytes = b""

    def reject(self, error: InvalidInputError) -> None:
        self.aside.add(f"line {self._number}", str(error), self._line.decode(errors="replace").rstrip("\n"))

    def check(self) -> None:
        """Refuse what is no file of JSON lines, instead of setting each line of it aside.

        Raises:
            InvalidInputError: its first block holds NUL, or none of its first lines is JSON.
        """
        lines, size = 0, 0
        for line in self._lines():
            size += len(line)
            if b"\0" in line[:_BLOCK]:
                break
            if not line.strip():
                continue
            if _is_json(line):
                return
            lines += 1
            if lines == _LOOKED_AT or size > _BLOCK:
                break
        else:
            is_damaged = bool(self.notes)
            self.notes.clear()  # said when it is read
            if not lines and not is_damaged:
                return
        raise InvalidInputError(
            f"{self.path.name} holds no lines of JSON: give what `export` wrote, or a file with one JSON object a line"
        )

    async def documents(self) -> AsyncIterator[NewDocument]:
        lines = self._lines()
        while (line := await asyncio.to_thread(next, lines, None)) is not None:
            self._number += 1
            self._line = line
            if not line.strip():
                continue
            try:
                document = await asyncio.to_thread(self._document, line)
            except InvalidInputError as error:
                self.reject(error)
                continue
            yield document

    def _lines(self) -> Iterator[bytes]:
        try:
            for _, line in raw_lines(self.path):
                yield line
        except _DAMAGED:
            self.notes.append("the file's compression ends too early or is damaged; what was before is taken")
        except OSError as error:
            raise InvalidInputError(f"{self.path.name} cannot be read ({error.strerror})") from None

    def _document(self, line: bytes) -> NewDocument:
        given = _parsed(line)
        if (given.text is None) == (given.chunks is None):
            raise InvalidInputError("a document has either text or chunks")
        if given.text is not None:
            chunks = document_chunks(
                given.text,
                uri=given.uri,
                occurred_at=given.occurred_at,
                max_tokens=self.settings.kb_chunk_max_tokens,
                overlap_ratio=self.settings.kb_chunk_overlap_ratio,
            )
        else:
            chunks = [_chunk(each, given) for each in given.chunks or ()]
        return NewDocument(
            given.title,
            chunks,
            type=given.type,
            uri=given.uri,
            scope=Scope(given.guild_id, given.channel_id, given.thread_id, given.user_id),
            metadata=given.metadata,
        )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _parsed(line: bytes) -> DocumentLine:
    try:
        data = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        raise InvalidInputError("the line is no JSON") from None
    if not isinstance(data, dict):
        raise InvalidInputError("the line is no JSON object")
    if not data.keys() <= DocumentLine.model_fields.keys():
        raise InvalidInputError("the line has fields that no document has; see `import jsonl --help`")
    return DocumentLine(**data)


def _chunk(given: ChunkLine, document: DocumentLine) -> NewChunk:
    embedding: Any = given.embedding
    if isinstance(embedding, str):
        try:
            embedding = np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f2")
        except (ValueError, binascii.Error):
            raise InvalidInputError("an embedding is a list of numbers or base64 of half precision numbers") from None
    return NewChunk(
        content=given.content,
        location=dict(given.location),
        token_count=given.token_count,
        occurred_from=given.occurred_from or document.occurred_at,
        occurred_to=given.occurred_to or document.occurred_at,
        embedding=embedding,
        embedding_model=given.embedding_model or (document.embedding_model if embedding is not None else None),
    )
