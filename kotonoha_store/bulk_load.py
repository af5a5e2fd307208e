"""Many documents at once: a thousand chunks a transaction, by COPY, and the HNSW index built afterwards."""

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import ARRAY, LargeBinary, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import index_builds
from kotonoha_store.columns import AnySelect
from kotonoha_store.database import Database, dump_json
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import ConfigurationError, InvalidInputError, StoreTimeoutError, StoreUnavailableError
from kotonoha_store.index_builds import OnProgress
from kotonoha_store.knowledge import CheckedDocument, KnowledgeRepository, OwnedRow, check_document
from kotonoha_store.models import KnowledgeChunk, KnowledgeSource
from kotonoha_store.records import NewChunk, Progress, Scope, SourceType
from kotonoha_store.source_status import recompute_status
from kotonoha_store.term_index import refresh_terms

BATCH_CHUNKS: Final = 1000
"""Chunks of one transaction: what a load that is killed writes again at most."""

# From this share of new vectors on, dropping and rebuilding the index is faster (benchmarks/bulk.py).
_REBUILD_PAYS: Final = 0.14
# So that each stays far below DB_COMMAND_TIMEOUT where the index is kept: some 250 vectors a second.
COPY_ROWS: Final = 500

_KEYS: Final = bindparam("keys", type_=ARRAY(LargeBinary))

_log: Final = logging.getLogger(__name__)


IndexOutcome: TypeAlias = Literal["kept", "rebuilt", "missing"]


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document to load.

    Attributes:
        title: shown with its hits and searched by word.
        chunks: at least one; those with a vector need no embedding.
        uri: with type and scope what makes it the same document when it is loaded again. Without one, all of
            it does: text, title, places, times and metadata.
    """

    title: str = field(repr=False)
    chunks: Sequence[NewChunk] = field(repr=False)
    type: SourceType = SourceType.DOCUMENT_FILE
    uri: str | None = field(default=None, repr=False)
    scope: Scope = field(default_factory=Scope)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What :func:`load_documents` did.

    Attributes:
        added: documents that were not there.
        changed: documents that took the place of what was there under their URI.
        unchanged: documents that were there as they are.
        rejected: documents that were set aside.
        chunks: inserted.
        vectors: those of them that came with their vector.
        index: ``kept`` up to date row by row, ``rebuilt``, or ``missing`` where this role may not build it.
        rebuild_pays: whether ``rebuild=True`` would have been faster.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    rejected: int = 0
    chunks: int = 0
    vectors: int = 0
    index: IndexOutcome = "kept"
    rebuild_pays: bool = False

    @property
    def documents(self) -> int:
        """How many were read."""
        return self.added + self.changed + self.unchanged + self.rejected


OnRejected: TypeAlias = Callable[[int, InvalidInputError], None]
"""Called with a document's position, from 0, and the rule that it breaks."""


async def load_documents(
    database: Database,
    documents: Iterable[NewDocument] | AsyncIterable[NewDocument],
    *,
    rebuild: bool | None = None,
    dry_run: bool = False,
    total: int | None = None,
    progress: Progress | None = None,
    on_rejected: OnRejected | None = None,
    on_build: OnProgress | None = None,
    maintenance_work_mem: int | None = None,
    parallel_workers: int | None = None,
) -> LoadReport:
    """Add documents, or replace what was loaded under the same type, URI and scope, batch by batch.

    Each batch is one transaction: a load that was stopped, or killed, goes on when it is called again with the same
    documents, what is there stays, and nothing is doubled. Others read, write, archive and embed meanwhile.

    With the HNSW index in place some 250 vectors a second can be written. With ``rebuild`` it is dropped before the
    first vector and built at the end, with its options; until then searches by meaning compare all. A process
    that dies in between leaves it dropped: the next load builds it, and so does ``reindex``.

    Args:
        documents: read as they are needed; held in memory a batch at a time.
        rebuild: None: only where no vector is stored yet, and nobody could search.
        dry_run: count what would be done; nothing is written.
        total: how many there are, for ``progress``.
        on_rejected: takes documents that cannot be stored; without it the first one ends the load.
        on_build: told how the index build goes.
        maintenance_work_mem: bytes; see :func:`kotonoha_store.index_builds.reindex`.
        parallel_workers: see there.

    Raises:
        InvalidInputError: a document cannot be stored, and ``on_rejected`` is not given. Earlier batches stay.
        ConfigurationError: ``rebuild`` was asked for, and this role does not own the tables.
        StoreUnavailableError: the database did not answer. Call it again with the same documents.
    """
    index = IndexOfLoad(database, rebuild)
    load = _Load(database, index, on_rejected, dry_run=dry_run)
    async with index.apart():
        async for batch in _batches(documents, load):
            await load.write(batch)
            if progress is not None:
                progress(load.report.documents, total)
    if dry_run:
        return load.report
    state = await index.finish(
        maintenance_work_mem=maintenance_work_mem, parallel_workers=parallel_workers, progress=on_build
    )
    return replace(load.report, index=state, rebuild_pays=state == "kept" and index.rebuild_pays(load.report.vectors))


class IndexOfLoad:
    """What becomes of the HNSW index while many vectors are written."""

    def __init__(self, database: Database, rebuild: bool | None) -> None:
        self._database = database
        self._rebuild = rebuild
        self._before: float | None = None
        self._has_dropped = False

    async def before_vectors(self, vectors: int) -> None:
        """To be called with the number of new vectors before a batch is written; the first one decides.

        Raises:
            ConfigurationError: the index is to be dropped, and this role does not own it.
        """
        if not vectors or self._before is not None:
            return
        async with self._database.connect() as connection:
            with translated_errors():
                is_empty = (await connection.execute(_NO_VECTOR)).scalar_one()
                self._before = float((await connection.execute(_ESTIMATE)).scalar_one())
        if self._rebuild:
            self._has_dropped = await index_builds.drop_vector_index(self._database)
        elif self._rebuild is None and is_empty and vectors >= BATCH_CHUNKS // 2:
            try:
                self._has_dropped = await index_builds.drop_vector_index(self._database)
            except (ConfigurationError, StoreTimeoutError):
                _log.info("the HNSW index is kept during the load: this role may not drop it, or it is in use")

    @asynccontextmanager
    async def apart(self) -> AsyncIterator[None]:
        """Around the writing: after an error in what is read the index is built as well, and the error raised."""
        try:
            yield
        except Exception as error:
            if self._has_dropped and not isinstance(error, StoreUnavailableError):
                await index_builds.ensure_vector_index(self._database)
            else:
                self._warn()
            raise
        except BaseException:
            self._warn()
            raise

    async def finish(
        self,
        *,
        maintenance_work_mem: int | None = None,
        parallel_workers: int | None = None,
        progress: OnProgress | None = None,
    ) -> IndexOutcome:
        """Build the index where it is missing, whoever dropped it.

        Raises: as :func:`kotonoha_store.index_builds.reindex`.
        """
        try:
            built = await index_builds.ensure_vector_index(
                self._database,
                maintenance_work_mem=maintenance_work_mem,
                parallel_workers=parallel_workers,
                progress=progress,
            )
        except ConfigurationError:
            # Missing before, by another role's doing: no reason to fail what is written.
            if self._has_dropped:
                raise
            return "missing"
        return "rebuilt" if built is not None or self._has_dropped else "kept"

    def rebuild_pays(self, vectors: int) -> bool:
        """Whether so many new vectors are more quickly written without the index."""
        return vectors >= BATCH_CHUNKS and vectors > _REBUILD_PAYS * ((self._before or 0) + vectors)

    def _warn(self) -> None:
        if self._has_dropped:
            _log.warning(
                "the load was stopped while the HNSW index is dropped: load again, or run `kotonoha-store reindex "
                "--broken`; until then searches by meaning compare all vectors"
            )


@dataclass(frozen=True, slots=True)
class _Checked:
    key: bytes
    document: CheckedDocument

    @property
    def vectors(self) -> int:
        return sum(row.embedding is not None for row in self.document.rows)


class _Load:
    """The state of one load between its batches."""

    def __init__(
        self, database: Database, index: IndexOfLoad, on_rejected: OnRejected | None, *, dry_run: bool
    ) -> None:
        self._database = database
        self._dry_run = dry_run
        self._index = index
        self._on_rejected = on_rejected
        self.report = LoadReport()

    def check(self, position: int, document: NewDocument) -> _Checked | None:
        try:
            return _checked(document)
        except InvalidInputError as error:
            if self._on_rejected is None:
                raise
            self._on_rejected(position, error)
            self.report = replace(self.report, rejected=self.report.rejected + 1)
            return None

    async def write(self, batch: Sequence[_Checked]) -> None:
        if any(each.vectors for each in batch) and not self._dry_run:
            await self._index.before_vectors(await self._new_vectors(batch))
        async with self._database.begin() as session:
            with translated_errors():
                done = await _write(session, batch, dry_run=self._dry_run)
        report = self.report
        self.report = replace(
            report,
            added=report.added + done.added,
            changed=report.changed + done.changed,
            unchanged=report.unchanged + done.unchanged,
            chunks=report.chunks + done.chunks,
            vectors=report.vectors + done.vectors,
        )

    async def _new_vectors(self, batch: Sequence[_Checked]) -> int:
        """What is there already costs nothing."""
        async with self._database.connect() as connection:
            with translated_errors():
                rows = await connection.execute(_sources(), {"keys": [each.key for each in batch]})
                there = {row.document_key for row in rows}
        return sum(each.vectors for each in batch if each.key not in there)


_NO_VECTOR: Final = text("SELECT NOT EXISTS (SELECT FROM knowledge_chunks WHERE embedding IS NOT NULL)")
_ESTIMATE: Final = text("SELECT greatest(reltuples, 0) FROM pg_class WHERE oid = to_regclass('knowledge_chunks')")


async def _batches(
    documents: Iterable[NewDocument] | AsyncIterable[NewDocument], load: _Load
) -> AsyncIterator[list[_Checked]]:
    batch: list[_Checked] = []
    keys: set[bytes] = set()
    size = 0
    position = -1
    async for document in _each(documents):
        position += 1
        # Hashing and packing take time that others on this loop may want.
        checked = await asyncio.to_thread(load.check, position, document)
        if checked is None:
            continue
        if checked.key in keys:
            # The same document again: one after the other, so that the last one counts.
            yield batch
            batch, keys, size = [], set(), 0
        batch.append(checked)
        keys.add(checked.key)
        size += len(checked.document.rows)
        if size >= BATCH_CHUNKS:
            yield batch
            batch, keys, size = [], set(), 0
    if batch:
        yield batch


async def _each(documents: Iterable[NewDocument] | AsyncIterable[NewDocument]) -> AsyncIterator[NewDocument]:
    if isinstance(documents, AsyncIterable):
        async for document in documents:
            yield document
    else:
        for document in documents:
            yield document


def _checked(document: NewDocument) -> _Checked:
    if not isinstance(document, NewDocument):
        raise InvalidInputError(f"a document must be a NewDocument, not {type(document).__name__}")
    checked = check_document(
        document.title,
        document.chunks,
        type=document.type,
        uri=document.uri,
        scope=document.scope,
        metadata=document.metadata,
    )
    if document.uri is None:
        checked.values["document_key"] = _key_of_all(checked)
    return _Checked(checked.values["document_key"], checked)


def _key_of_all(document: CheckedDocument) -> bytes:
    identity: list[Any] = [
        "loaded",
        str(document.values["type"]),
        document.values["title"],
        dump_json(document.values["source_metadata"]),
        *asdict(document.scope).values(),
    ]
    for row in document.rows:
        moments = [None if moment is None else moment.isoformat() for moment in (row.occurred_from, row.occurred_to)]
        identity.append([row.content_hash.hex(), row.location, *moments])
    return hashlib.sha256(dump_json(identity).encode()).digest()


async def _write(session: AsyncSession, batch: Sequence[_Checked], *, dry_run: bool) -> LoadReport:
    """New documents together; those that are there one by one, in the order in which everybody locks sources."""
    repository = KnowledgeRepository(session, insert_batch_size=COPY_ROWS)
    by_key = {each.key: each for each in batch}
    there = {row.document_key for row in await session.execute(_sources(), {"keys": list(by_key)})}
    # In the order of the keys, so that two loads of the same documents wait for each other and not in a circle.
    new = [by_key[key].document for key in sorted(by_key.keys() - there)]
    if dry_run:
        sources = (await session.execute(_sources(), {"keys": list(by_key)})).all()
        same = await _unchanged(session, sources, by_key)
        return LoadReport(
            added=len(new),
            changed=len(sources) - len(same),
            unchanged=len(same),
            chunks=sum(len(document.rows) for document in new),
            vectors=sum(by_key[document.values["document_key"]].vectors for document in new),
        )
    inserted = await _insert_sources(session, new)
    owned = [
        OwnedRow(inserted[document.values["document_key"]], document.values["title"], document.scope, row)
        for document in new
        if document.values["document_key"] in inserted
        for row in document.rows
    ]
    await repository.insert_chunks(owned)
    chunks = len(owned)
    vectors = sum(each.row.embedding is not None for each in owned)
    changed = 0
    touched = list(inserted.values())
    others = by_key.keys() - inserted.keys()
    if others:
        sources = (await session.execute(_sources(), {"keys": list(others)})).all()
        same = await _unchanged(session, sources, by_key)
        gone = sorted(others - {row.document_key for row in sources})
        for key in [row.document_key for row in sources if row.id not in same] + gone:
            result = await repository.put_checked(by_key[key].document)
            chunks += result.added
            vectors += min(result.added, by_key[key].vectors)
            touched.append(result.source_id)
            changed += 1
    if touched:
        await refresh_terms(session)
        await recompute_status(session, touched)
    return LoadReport(
        added=len(inserted),
        changed=changed,
        unchanged=len(batch) - len(inserted) - changed,
        chunks=chunks,
        vectors=vectors,
    )


async def _insert_sources(session: AsyncSession, documents: Sequence[CheckedDocument]) -> dict[bytes, int]:
    """Return the ids by key; without those that somebody else inserted first."""
    if not documents:
        return {}
    source = KnowledgeSource
    statement = (
        insert(source)
        .on_conflict_do_nothing(index_elements=[source.document_key])
        .returning(source.document_key, source.id)
    )
    connection = await session.connection()
    columns = {"source_metadata": "metadata"}
    values = [{columns.get(name, name): value for name, value in each.values.items()} for each in documents]
    return {row.document_key: row.id for row in await connection.execute(statement, values)}


async def _unchanged(session: AsyncSession, sources: Sequence[Any], by_key: Mapping[bytes, _Checked]) -> set[int]:
    """Of these sources the ids of those that a load would leave as they are."""
    held: dict[int, Counter[Any]] = {row.id: Counter() for row in sources}
    vectors: dict[int, Counter[Any]] = {row.id: Counter() for row in sources}
    for row in await session.execute(_chunks(), {"ids": list(held)}):
        held[row.source_id][_mark(row.content_hash, row.location, row.occurred_from, row.occurred_to)] += 1
        vectors[row.source_id][row.content_hash, row.embedding_model] += 1
    same = set()
    for source in sources:
        document = by_key[source.document_key].document
        rows = document.rows
        wanted = Counter(
            _mark(row.content_hash, chunk.location, row.occurred_from, row.occurred_to)
            for chunk, row in zip(document.chunks, rows, strict=True)
        )
        given = Counter((row.content_hash, row.embedding_model) for row in rows if row.embedding is not None)
        is_same = source.title == document.values["title"]
        is_same = is_same and source.source_metadata == document.values["source_metadata"]
        if is_same and wanted == held[source.id] and given <= vectors[source.id]:
            same.add(source.id)
    return same


def _mark(content_hash: bytes | None, location: Any, since: datetime | None, until: datetime | None) -> Any:
    return (content_hash, json.dumps(location, sort_keys=True), since, until)


def _sources() -> AnySelect:
    source = KnowledgeSource
    columns = (source.id, source.document_key, source.title, source.source_metadata)
    return select(*columns).where(source.document_key == func.any(_KEYS)).order_by(source.id)


def _chunks() -> AnySelect:
    chunk = KnowledgeChunk
    columns = (chunk.source_id, chunk.content_hash, chunk.location, chunk.occurred_from, chunk.occurred_to)
    ids = bindparam("ids", type_=ARRAY(chunk.id.type))
    return select(*columns, chunk.embedding_model).where(chunk.source_id == func.any(ids))
