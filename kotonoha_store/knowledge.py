"""Long-term memory: :class:`KnowledgeRepository`, sources and their chunks."""

import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, astuple
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import ARRAY, BigInteger, ColumnElement, bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import bulk_changes
from kotonoha_store.checks import check_id, check_json, check_text, in_utc
from kotonoha_store.columns import AnyRow, AnySelect, PackedVector, pack_vectors
from kotonoha_store.database import driver_connection, dump_json, ensure_codecs
from kotonoha_store.driver_errors import translated
from kotonoha_store.errors import InvalidInputError, NotFoundError
from kotonoha_store.models import KnowledgeChunk, KnowledgeChunkDeadLetter, KnowledgeSource
from kotonoha_store.records import SCOPE_FIELDS, DocumentResult, NewChunk, Scope, SourceRecord, SourceStatus, SourceType
from kotonoha_store.search_records import AnyFilters, BulkResult
from kotonoha_store.source_status import recompute_status
from kotonoha_store.term_index import TextOfChunk, refresh_terms, rewrite_terms, write_terms


class _Row(NamedTuple):
    """What a chunk becomes, checked; named as the columns."""

    content: str
    embedding: PackedVector | None
    location: str
    token_count: int | None
    embedding_model: str | None
    content_hash: bytes
    occurred_from: datetime | None
    occurred_to: datetime | None


class OwnedRow(NamedTuple):
    """A checked chunk and whose it is."""

    source_id: int
    title: str
    scope: Scope
    row: _Row


class CheckedDocument(NamedTuple):
    """A document whose every value can be stored; the source's columns by name, the chunks and their rows."""

    values: dict[str, Any]
    scope: Scope
    chunks: Sequence[NewChunk]
    rows: Sequence[_Row]


_CHUNK_COLUMNS: Final = ("id", "source_id", *SCOPE_FIELDS, *_Row._fields)

_SOURCE: Final = (
    KnowledgeSource.id,
    KnowledgeSource.type,
    KnowledgeSource.title,
    KnowledgeSource.uri,
    KnowledgeSource.status,
    KnowledgeSource.error_code,
    KnowledgeSource.error_message,
    KnowledgeSource.guild_id,
    KnowledgeSource.channel_id,
    KnowledgeSource.thread_id,
    KnowledgeSource.user_id,
    KnowledgeSource.source_metadata,
    KnowledgeSource.created_at,
    KnowledgeSource.updated_at,
)


def content_hash(content: str) -> bytes:
    """SHA-256 of the text that is embedded: equal hashes under one model have equal vectors."""
    return hashlib.sha256(content.encode()).digest()


class KnowledgeRepository:
    """Reads and writes sources and chunks on the caller's transaction; never commits.

    Every method raises :class:`~kotonoha_store.errors.StoreUnavailableError` when the database does not
    answer and :class:`~kotonoha_store.errors.SchemaOutdatedError` when it was not migrated.
    """

    def __init__(self, session: AsyncSession, *, insert_batch_size: int = 1000, update_batch_size: int = 1000) -> None:
        self._session = session
        self._insert_batch_size = insert_batch_size
        self._update_batch_size = update_batch_size

    @translated
    async def add_source(
        self,
        type: SourceType,  # noqa: A002  the column's name
        title: str,
        *,
        uri: str | None = None,
        scope: Scope | None = None,
        metadata: Mapping[str, Any] | None = None,
        origin: tuple[int, int] | None = None,
        session_key: str | None = None,
        archived_messages: Sequence[Mapping[str, Any]] | ColumnElement[Any] | None = None,
    ) -> int:
        """Insert a source (status pending) and return its id.

        ``origin``: session id and absolute index of its first archived message; that pair is unique.
        ``session_key``: of that session, for searches within it.

        Raises:
            InvalidInputError: a blank title, text that PostgreSQL cannot store, or messages that are archived already.
        """
        values = _source_values(type, title, uri, scope or Scope(), metadata or {})
        values["archived_messages"] = archived_messages
        values["origin_session_key"] = None if session_key is None else check_text(session_key, "session_key")
        if origin is not None:
            values["origin_session_id"], values["origin_first_index"] = origin
        statement = insert(KnowledgeSource).values(values).returning(KnowledgeSource.id)
        return (await self._session.execute(statement)).scalar_one()

    @translated
    async def add_chunks(self, source_id: int, chunks: Sequence[NewChunk]) -> list[int]:
        """Insert chunks by COPY and queue those without a vector; return their ids, in order.

        Raises:
            NotFoundError: no such source.
            InvalidInputError: a blank chunk, one with a vector but no model, a time without its zone, or
                a value that cannot be stored. Nothing was written.
            InvalidVectorError: a vector cannot be stored. Nothing was written.
        """
        rows = _rows(chunks)
        title, scope = await self._locked_source(source_id)
        ids = await self.insert_chunks([OwnedRow(source_id, title, scope, row) for row in rows])
        await refresh_terms(self._session)
        await recompute_status(self._session, [source_id])
        return ids

    @translated
    async def put_document(
        self,
        title: str,
        chunks: Sequence[NewChunk],
        *,
        type: SourceType = SourceType.DOCUMENT_FILE,  # noqa: A002  the column's name
        uri: str | None = None,
        scope: Scope | None = None,
        metadata: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> DocumentResult:
        """Add a document, or replace what was added before under the same type, URI and scope.

        Chunks whose text did not change keep their vector (unless ``model`` is given and another one
        made it) and take the new place and time; the others are deleted and the new ones queued. Dead
        letters of the document are tried again. A document without a URI is always a new one.

        Raises:
            InvalidInputError: no chunks, or a value that cannot be stored. Nothing was written.
        """
        document = check_document(title, chunks, type=type, uri=uri, scope=scope, metadata=metadata)
        result = await self.put_checked(document, model=model)
        await refresh_terms(self._session)
        await recompute_status(self._session, [result.source_id])
        return result

    async def put_checked(self, document: CheckedDocument, *, model: str | None = None) -> DocumentResult:
        """As :meth:`put_document`; the caller refreshes terms and status afterwards, of many documents at once."""
        values, scope, chunks, rows = document
        title: str = values["title"]
        old_title: str | None = title
        if "document_key" not in values:
            source_id = (
                await self._session.execute(insert(KnowledgeSource).values(values).returning(KnowledgeSource.id))
            ).scalar_one()
        else:
            old_title = (await self._session.execute(_lock_title(values["document_key"]))).scalar_one_or_none()
            # One statement that inserts or locks: two that add it at once come one after the other.
            statement = insert(KnowledgeSource).values(values)
            changed = {"title": statement.excluded.title, "metadata": statement.excluded.metadata}
            source_id = (
                await self._session.execute(
                    statement.on_conflict_do_update(
                        index_elements=[KnowledgeSource.document_key], set_=changed
                    ).returning(KnowledgeSource.id)
                )
            ).scalar_one()
        kept, removed, added = await self._replace_chunks(source_id, title, scope, chunks, rows, model)
        if old_title != title:
            await rewrite_terms(self._session, [TextOfChunk(chunk_id, title, text, scope) for chunk_id, text in kept])
        return DocumentResult(source_id=source_id, added=added, kept=len(kept), removed=removed)

    @translated
    async def get_source(self, source_id: int) -> SourceRecord:
        """Return the source.

        Raises:
            NotFoundError: no such source.
        """
        check_id(source_id, "source_id")
        row = (await self._session.execute(select(*_SOURCE).where(KnowledgeSource.id == source_id))).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no source {source_id}")
        return _record(row)

    @translated
    async def delete_source(self, source_id: int) -> None:
        """Delete the source with its chunks, jobs and dead letters.

        Raises:
            NotFoundError: no such source.
        """
        check_id(source_id, "source_id")
        statement = delete(KnowledgeSource).where(KnowledgeSource.id == source_id).returning(KnowledgeSource.id)
        if (await self._session.execute(statement)).one_or_none() is None:
            raise NotFoundError(f"there is no source {source_id}")
        await self._session.execute(
            delete(KnowledgeChunkDeadLetter).where(KnowledgeChunkDeadLetter.source_id == source_id)
        )
        # Words that only these chunks had must not stay in the list of the common ones.
        await refresh_terms(self._session, force=True)

    @translated
    async def delete_chunks(
        self, filters: AnyFilters, *, everywhere: bool = False, dry_run: bool = False
    ) -> BulkResult:
        """Delete every chunk that the filters keep, embedded or waiting, and what belongs to it.

        With the chunks go their jobs and words, and the dead letters that the filters keep: a dead letter is
        read as the chunk that it was, its model being the one that gave up. A source that has neither chunks
        nor dead letters left is deleted with its archived messages, also one that had none before and lies in
        the filters' scope. A source that keeps a chunk or dead letter outside of the filters stays as it is:
        its title, its metadata and all of its archived messages, those of deleted chunks included; for these
        call :meth:`delete_source`.

        Sessions are not touched: what was not archived yet stays there, and is archived later. A transaction
        that writes a session as well does so first, and calls this once: sources are locked in the order of
        their ids. Workers that hold a lease of a deleted chunk pass it over.

        Args:
            filters: must name a scope (guild, channel, thread, user, sources or sessions) unless ``everywhere``.
            everywhere: delete from all that is stored, of every guild and user.
            dry_run: only count what would be deleted now; nothing is locked or changed.

        Raises:
            InvalidInputError: these are no filters, or no scope was named.
        """
        return await bulk_changes.delete_chunks(self._session, filters, everywhere=everywhere, dry_run=dry_run)

    @translated
    async def update_sources(
        self,
        filters: AnyFilters,
        *,
        metadata: Mapping[str, Any] | None = None,
        title: str | None = None,
        everywhere: bool = False,
        dry_run: bool = False,
    ) -> BulkResult:
        """Change every source with at least one chunk, embedded or waiting, that the filters keep.

        Metadata and title are the source's: all of its chunks are found by the new ones, also those that the
        filters do not keep. Scope, type, URI and times cannot be changed; a document of another scope is
        another document. As with :meth:`delete_chunks`, a transaction that writes a session does so first.

        Args:
            filters: must name a scope (guild, channel, thread, user, sources or sessions) unless ``everywhere``.
            metadata: merged key by key; a key given as None is removed, what lies deeper is replaced as a whole.
            title: the new title, the same for all of them; their words and dead letters follow.
            everywhere: change the sources of all that is stored, of every guild and user.
            dry_run: only count what would be changed now; nothing is locked or changed.

        Raises:
            InvalidInputError: these are no filters, no scope was named, nothing to change was given, or a
                title or metadata that cannot be stored. Nothing was written.
        """
        return await bulk_changes.update_sources(
            self._session, filters, metadata=metadata, title=title, everywhere=everywhere, dry_run=dry_run
        )

    async def iterate_sources(self, *, page_size: int = 100, **filters: Any) -> AsyncIterator[SourceRecord]:
        """Iterate over all sources, page by page; filters as in :meth:`list_sources`."""
        after_id = 0
        while True:
            page = await self.list_sources(after_id=after_id, limit=page_size, **filters)
            for record in page:
                yield record
            if len(page) < page_size:
                return
            after_id = page[-1].id

    @translated
    async def list_sources(
        self,
        *,
        after_id: int = 0,
        limit: int = 100,
        status: SourceStatus | None = None,
        type: SourceType | None = None,  # noqa: A002  the column's name
        guild_id: int | None = None,
    ) -> list[SourceRecord]:
        """Return up to ``limit`` sources in the order of their ids; the next page starts after the last id."""
        if limit < 1:
            raise InvalidInputError(f"limit must be at least 1, got {limit}")
        statement = select(*_SOURCE).where(KnowledgeSource.id > after_id).order_by(KnowledgeSource.id).limit(limit)
        Scope(guild_id=guild_id)  # refuses what is no id
        wanted = {KnowledgeSource.status: status, KnowledgeSource.type: type, KnowledgeSource.guild_id: guild_id}
        for column, value in wanted.items():
            if value is not None:
                statement = statement.where(column == value)
        return [_record(row) for row in await self._session.execute(statement)]

    async def _locked_source(self, source_id: int) -> tuple[str, Scope]:
        """Lock the source as lock_sources() does, and read its title and scope on the way."""
        check_id(source_id, "source_id")
        columns = [getattr(KnowledgeSource, name) for name in SCOPE_FIELDS]
        statement = (
            select(KnowledgeSource.title, *columns)
            .where(KnowledgeSource.id == source_id)
            .with_for_update(key_share=True)
        )
        row = (await self._session.execute(statement)).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no source {source_id}")
        return row.title, Scope(*row[1:])

    async def insert_chunks(self, owned: Sequence[OwnedRow]) -> list[int]:
        """Insert checked chunks of sources that this transaction has locked or made, with their jobs and words.

        The caller refreshes terms and status afterwards.
        """
        if not owned:
            return []
        ids: list[int] = [row[0] for row in await self._session.execute(_reserve_ids(), {"count": len(owned)})]
        # The statement above has begun the transaction that COPY, being the driver's own, takes part in.
        await ensure_codecs(self._session)
        driver = await driver_connection(self._session)
        numbered = list(zip(ids, owned, strict=True))
        for start in range(0, len(owned), self._insert_batch_size):
            batch = numbered[start : start + self._insert_batch_size]
            records = [(chunk_id, each.source_id, *astuple(each.scope), *each.row) for chunk_id, each in batch]
            await driver.copy_records_to_table("knowledge_chunks", columns=_CHUNK_COLUMNS, records=records)
            if waiting := [(chunk_id,) for chunk_id, each in batch if each.row.embedding is None]:
                await driver.copy_records_to_table("embedding_jobs", columns=["chunk_id"], records=waiting)
        texts = [TextOfChunk(chunk_id, each.title, each.row.content, each.scope) for chunk_id, each in numbered]
        await write_terms(self._session, texts)
        return ids

    async def _replace_chunks(
        self,
        source_id: int,
        title: str,
        scope: Scope,
        chunks: Sequence[NewChunk],
        rows: Sequence[_Row],
        model: str | None,
    ) -> tuple[list[tuple[int, str]], int, int]:
        """Return what was kept (chunk id, text), and how many were removed and added."""
        existing: dict[bytes, list[AnyRow]] = defaultdict(list)
        gone: set[int] = set()
        for old in await self._session.execute(_chunks_of(source_id)):
            gone.add(old.id)
            if old.content_hash is not None and (model is None or old.embedding_model in (None, model)):
                existing[old.content_hash].append(old)
        moved: list[dict[str, Any]] = []
        new: list[_Row] = []
        kept: list[tuple[int, str]] = []
        for chunk, row in zip(chunks, rows, strict=True):
            same = existing[row.content_hash]
            # A vector that is given is not passed over for a chunk that still waits, or has another model's.
            fits = (each for each in same if row.embedding is None or each.embedding_model == row.embedding_model)
            found: AnyRow | None = next(fits, None)
            if found is None:
                new.append(row)
                continue
            same.remove(found)
            gone.remove(found.id)
            kept.append((found.id, row.content))
            place = (chunk.location, row.occurred_from, row.occurred_to)
            if (found.location, found.occurred_from, found.occurred_to) != place:
                moved.append(dict(zip(("chunk_id", "place", "since", "until"), (found.id, *place), strict=True)))
        await self._session.execute(_delete_chunks(), {"ids": sorted(gone)})
        await self._session.execute(
            delete(KnowledgeChunkDeadLetter).where(KnowledgeChunkDeadLetter.source_id == source_id)
        )
        connection = await self._session.connection()
        for start in range(0, len(moved), self._update_batch_size):
            await connection.execute(_move(), moved[start : start + self._update_batch_size])
        await self.insert_chunks([OwnedRow(source_id, title, scope, row) for row in new])
        return kept, len(gone), len(new)


def _source_values(
    type: SourceType,  # noqa: A002  the column's name
    title: str,
    uri: str | None,
    scope: Scope,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    if not check_text(title, "title").strip():
        raise InvalidInputError("title must not be blank")
    if not isinstance(metadata, Mapping):
        raise InvalidInputError(f"metadata must be a mapping, not {metadata.__class__.__name__}")
    if type not in set(SourceType):
        raise InvalidInputError(f"there is no source type {type!r}; take one of {', '.join(SourceType)}")
    check_json(dict(metadata), "metadata")
    return {
        "type": SourceType(type),
        "title": title,
        "uri": None if uri is None else check_text(uri, "uri"),
        "source_metadata": dict(metadata),
        **asdict(scope),
    }


def check_document(
    title: str,
    chunks: Sequence[NewChunk],
    *,
    type: SourceType = SourceType.DOCUMENT_FILE,  # noqa: A002  the column's name
    uri: str | None = None,
    scope: Scope | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> CheckedDocument:
    """Check all of a document before the first of it is written.

    Raises:
        InvalidInputError: no chunks, or a value that cannot be stored.
    """
    if not chunks:
        raise InvalidInputError("the document has no text; there is nothing to remember")
    scope = scope or Scope()
    rows = _rows(chunks)
    values = _source_values(type, title, uri, scope, metadata or {})
    if uri is not None:
        values["document_key"] = _document_key(type, uri, scope)
    return CheckedDocument(values, scope, chunks, rows)


def _document_key(type: SourceType, uri: str, scope: Scope) -> bytes:  # noqa: A002  the column's name
    """What makes two additions the same document. The scope belongs to it: no tenant replaces another's."""
    identity = [str(type), uri, *(getattr(scope, name) for name in SCOPE_FIELDS)]
    return hashlib.sha256(dump_json(identity).encode()).digest()


def _rows(chunks: Sequence[NewChunk]) -> list[_Row]:
    """Check all chunks before the first is written."""
    return [_row(chunk, vector) for chunk, vector in zip(chunks, _packed(chunks), strict=True)]


def _row(chunk: NewChunk, vector: PackedVector | None) -> _Row:
    if not check_text(chunk.content, "content").strip():
        raise InvalidInputError("a chunk must not be blank: there is nothing to embed or to find")
    if not isinstance(chunk.location, dict):
        raise InvalidInputError(f"location must be a dict, not {type(chunk.location).__name__}")
    if chunk.token_count is not None and not 0 <= chunk.token_count < 2**31:
        raise InvalidInputError(f"token_count must be from 0 to 2147483647, got {chunk.token_count}")
    return _Row(
        content=chunk.content,
        embedding=vector,
        location=dump_json(chunk.location),
        token_count=chunk.token_count,
        embedding_model=None if vector is None else check_text(str(chunk.embedding_model), "embedding_model"),
        content_hash=content_hash(chunk.content),
        occurred_from=None if chunk.occurred_from is None else in_utc(chunk.occurred_from),
        occurred_to=None if chunk.occurred_to is None else in_utc(chunk.occurred_to),
    )


def _packed(chunks: Sequence[NewChunk]) -> list[PackedVector | None]:
    """The chunks' vectors in the wire format, checked all at once."""
    given = [index for index, chunk in enumerate(chunks) if chunk.embedding is not None]
    for index in given:
        if not chunks[index].embedding_model:
            raise InvalidInputError(
                f"chunk {index} has a vector but no embedding_model: searches could not tell it apart"
            )
    packed: list[PackedVector | None] = [None] * len(chunks)
    if given:
        for index, vector in zip(given, pack_vectors([chunks[index].embedding for index in given]), strict=True):
            packed[index] = vector
    return packed


def _reserve_ids() -> AnySelect:
    """COPY returns no ids, and the jobs need them."""
    sequence = func.pg_get_serial_sequence("knowledge_chunks", "id")
    return select(func.nextval(sequence)).select_from(func.generate_series(1, bindparam("count")))


def _chunks_of(source_id: int) -> AnySelect:
    return (
        select(
            KnowledgeChunk.id,
            KnowledgeChunk.content_hash,
            KnowledgeChunk.location,
            KnowledgeChunk.embedding_model,
            KnowledgeChunk.occurred_from,
            KnowledgeChunk.occurred_to,
        )
        .where(KnowledgeChunk.source_id == source_id)
        .order_by(KnowledgeChunk.id)
    )


def _lock_title(document_key: bytes) -> AnySelect:
    """The title as it was: where it changes, so do the words of the chunks that are kept."""
    statement = select(KnowledgeSource.title).where(KnowledgeSource.document_key == document_key)
    return statement.with_for_update(key_share=True)


def _move() -> Any:
    return (
        update(KnowledgeChunk)
        .where(KnowledgeChunk.id == bindparam("chunk_id"))
        .values(location=bindparam("place"), occurred_from=bindparam("since"), occurred_to=bindparam("until"))
    )


def _delete_chunks() -> Any:
    # One array: of single parameters a statement takes 32,767 only.
    return (
        delete(KnowledgeChunk)
        .where(KnowledgeChunk.id == func.any(bindparam("ids", type_=ARRAY(BigInteger))))
        .execution_options(synchronize_session=False)
    )


def _record(row: AnyRow) -> SourceRecord:
    return SourceRecord(
        id=row.id,
        type=row.type,
        title=row.title,
        uri=row.uri,
        status=row.status,
        error_code=row.error_code,
        error_message=row.error_message,
        scope=Scope(*(getattr(row, name) for name in SCOPE_FIELDS)),
        metadata=row.source_metadata,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
