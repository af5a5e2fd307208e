"""The queue of chunks that wait for their vector: :class:`EmbeddingQueue`.

A claim is a lease under a token, with an end. Whoever writes must still hold the token, so a worker that
was thought dead, and whose jobs were given to another, changes nothing when it comes back.

Lock order everywhere: source, chunk, job, sources in the order of their ids.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, Final
from uuid import UUID, uuid4

from numpy.typing import NDArray
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Insert,
    Interval,
    Text,
    Update,
    Uuid,
    bindparam,
    case,
    delete,
    exists,
    extract,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from kotonoha_store.columns import AnySelect, HalfVector, PackedVector, VectorLike, pack_vectors
from kotonoha_store.database import Database, driver_connection, translated
from kotonoha_store.errors import ErrorCode, InvalidInputError, LeaseLostError
from kotonoha_store.models import EmbeddingJob, KnowledgeChunk, KnowledgeChunkDeadLetter, KnowledgeSource
from kotonoha_store.records import SCOPE_FIELDS, ClaimedChunk, DeadLetter, Lease, QueueDepth, SourceStatus
from kotonoha_store.source_status import lock_sources, recompute_status
from kotonoha_store.term_index import fill_terms, refresh_terms

ERROR_MESSAGES: Final[dict[ErrorCode, str]] = {
    ErrorCode.EMBEDDING_API_TIMEOUT: "the embedding provider did not answer in time",
    ErrorCode.RATE_LIMIT: "the embedding provider's rate limit was reached",
    ErrorCode.AUTHENTICATION_ERROR: "the embedding provider refused the API key",
    ErrorCode.PERMISSION_ERROR: "the embedding provider refused access",
    ErrorCode.NOT_FOUND: "the embedding model was not found",
    ErrorCode.SERVER_ERROR: "the embedding provider failed",
    ErrorCode.INVALID_INPUT: "the embedding provider refuses this text",
    ErrorCode.UNKNOWN_ERROR: "the text could not be embedded",
    ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED: "the text could not be embedded in the allowed number of attempts",
}
"""What is stored beside a code: generic on purpose, since details may hold private text."""

# What a dead letter keeps of its chunk, and a requeue brings back.
_KEPT: Final = (
    "content",
    "location",
    "token_count",
    "content_hash",
    *SCOPE_FIELDS,
    "occurred_from",
    "occurred_to",
)


_IDS: Final = bindparam("ids", type_=ARRAY(BigInteger))
_TOKEN: Final = bindparam("token", type_=Uuid())


class EmbeddingQueue:
    """Claims, completes and buries jobs, each in a short transaction of its own.

    It is no repository: no transaction or connection stays open while the vectors are made.

    Every method raises :class:`~kotonoha_store.errors.StoreUnavailableError` when the database does not
    answer; what it was doing is then done or undone as a whole.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease: timedelta = timedelta(minutes=5),
        max_attempts: int = 3,
        update_batch_size: int = 100,
    ) -> None:
        """
        Args:
            lease: how long a claim lasts by the server's clock; longer than the slowest API call.
            max_attempts: after how many failed attempts a chunk becomes a dead letter.
            update_batch_size: rows sent to the server at once.
        """
        self._database = database
        self._lease = lease
        self.max_attempts: Final = max_attempts
        self._update_batch_size = update_batch_size

    @translated
    async def claim(self, limit: int = 100) -> Lease:
        """Take up to ``limit`` jobs that are due, the longest due first; empty when there are none.

        The attempt is counted here, so a text that kills its worker is counted too; one that was
        claimed ``max_attempts`` times without an answer becomes a dead letter now.

        Raises:
            InvalidInputError: ``limit`` is below 1.
        """
        if limit < 1:
            raise InvalidInputError(f"limit must be at least 1, got {limit}")
        buried: list[int] = []
        while True:
            lease, exhausted = await self._claim(limit)
            buried += exhausted
            # Nothing but used-up jobs does not mean that the queue is empty.
            if lease.chunks or not exhausted:
                return replace(lease, buried=tuple(buried))

    async def _claim(self, limit: int) -> tuple[Lease, list[int]]:
        token = uuid4()
        async with self._database.transaction() as connection:
            rows = (await connection.execute(_claim(), {"limit": limit, "token": token, "lease": self._lease})).all()
            if rows:
                await connection.execute(_start(), {"ids": sorted({row.source_id for row in rows})})
        lease = Lease(
            token=token,
            chunks=tuple(
                ClaimedChunk(
                    chunk_id=row.chunk_id,
                    source_id=row.source_id,
                    content=row.content,
                    attempt=row.attempts,
                    token_count=row.token_count,
                )
                for row in rows
            ),
            expires_at=max((row.available_at for row in rows), default=None),
        )
        exhausted = [chunk.chunk_id for chunk in lease.chunks if chunk.attempt > self.max_attempts]
        if not exhausted:
            return lease, exhausted
        # Ours no longer if the lease was that short: then another claim buries them.
        with suppress(LeaseLostError):
            await self.bury(lease, exhausted, ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED)
        return _without(lease, exhausted), exhausted

    @translated
    async def complete(
        self, lease: Lease, chunk_ids: Sequence[int], vectors: Sequence[VectorLike] | NDArray[Any], model: str
    ) -> None:
        """Write the vectors of these chunks and the model that made them; the jobs are done.

        ``vectors``: shape (len(chunk_ids), 1536). Chunks that were deleted meanwhile are passed over.

        Raises:
            InvalidVectorError: a vector cannot be stored. Nothing was written.
            LeaseLostError: some jobs belong to another worker now; the others were written.
        """
        packed = pack_vectors(vectors)
        if len(packed) != len(chunk_ids) or not model:
            raise InvalidInputError(
                f"{len(chunk_ids)} chunks need as many vectors (got {len(packed)}) and a model name"
            )
        async with self._database.transaction() as connection:
            sources = await self._lock(connection, lease, chunk_ids)
            held = await _ids(connection, _finish(), {"ids": list(chunk_ids), "token": lease.token})
            statement, row_of = _write_vectors()
            rows = [
                row_of(chunk_id, vector, model)
                for chunk_id, vector in zip(chunk_ids, packed, strict=True)
                if chunk_id in held
            ]
            # By the driver: what SQLAlchemy does for each row costs as much as the row does there.
            driver = await driver_connection(connection)
            for start in range(0, len(rows), self._update_batch_size):
                await driver.executemany(statement, rows[start : start + self._update_batch_size])
            if held:
                await recompute_status(connection, sources)
            lost = await _lost(connection, lease, set(chunk_ids) - held)
        _raise_if(lost)

    @translated
    async def defer(
        self, lease: Lease, chunk_ids: Sequence[int], delay: timedelta, error_code: ErrorCode | None = None
    ) -> None:
        """Give jobs back for ``delay``, and the attempt with them: the texts were not at fault.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were given back.
        """
        parameters = {"ids": list(chunk_ids), "token": lease.token, "delay": delay, "code": error_code}
        async with self._database.transaction() as connection:
            held = await _ids(connection, _release(give_back=True), parameters)
            lost = await _lost(connection, lease, set(chunk_ids) - held)
        _raise_if(lost)

    @translated
    async def fail(
        self,
        lease: Lease,
        chunk_ids: Sequence[int],
        error_code: ErrorCode,
        *,
        retry_in: timedelta,
        model: str | None = None,
    ) -> list[int]:
        """Record a failed attempt: try again after ``retry_in``, or bury what has used up its attempts.

        Returns:
            The chunks that became dead letters.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were recorded.
        """
        attempts = {chunk.chunk_id: chunk.attempt for chunk in lease.chunks}
        # What is not of this lease the fence refuses.
        over = [chunk_id for chunk_id in chunk_ids if attempts.get(chunk_id, 0) >= self.max_attempts]
        again = [chunk_id for chunk_id in chunk_ids if attempts.get(chunk_id, 0) < self.max_attempts]
        parameters = {"ids": again, "token": lease.token, "delay": retry_in, "code": error_code}
        async with self._database.transaction() as connection:
            await self._lock(connection, lease, over)
            held = await _ids(connection, _release(give_back=False), parameters) if again else set()
            if over:
                held |= await _bury_locked(
                    connection, lease.token, over, ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED, error_code, model
                )
            lost = await _lost(connection, lease, set(chunk_ids) - held)
        _raise_if(lost)
        return [chunk_id for chunk_id in over if chunk_id in held]

    @translated
    async def bury(
        self, lease: Lease, chunk_ids: Sequence[int], error_code: ErrorCode, *, model: str | None = None
    ) -> None:
        """Move chunks to the dead letters, with all that is needed to queue them again.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were moved.
        """
        async with self._database.transaction() as connection:
            await self._lock(connection, lease, chunk_ids)
            held = await _bury_locked(connection, lease.token, chunk_ids, error_code, error_code, model)
            lost = await _lost(connection, lease, set(chunk_ids) - held)
        _raise_if(lost)

    @translated
    async def requeue(
        self,
        dead_letter_ids: Sequence[int] | None = None,
        *,
        source_id: int | None = None,
        error_code: ErrorCode | str | None = None,
    ) -> int:
        """Queue dead letters again, under their old chunk ids, with their attempts reset.

        All of them, or those that meet every condition given. Dead letters whose source is gone stay.

        Returns:
            How many were queued.
        """
        letter = KnowledgeChunkDeadLetter
        conditions: list[ColumnElement[bool]] = []
        if dead_letter_ids is not None:
            conditions.append(_among(letter.id, dead_letter_ids))
        if source_id is not None:
            conditions.append(letter.source_id == source_id)
        if error_code is not None:
            conditions.append(letter.error_code == str(error_code))
        async with self._database.transaction() as connection:
            sources = await _ids(connection, select(letter.source_id).where(letter.source_id.is_not(None), *conditions))
            await lock_sources(connection, sorted(sources))
            queued = await _ids(connection, _requeue([*conditions, _among(letter.source_id, sources)]))
            if queued:
                await fill_terms(connection, ids=sorted(queued))
                await refresh_terms(connection)
            await recompute_status(connection, sorted(sources))
        return len(queued)

    @translated
    async def dead_letters(self, *, after_id: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters in the order of their ids; the next page starts after the last id."""
        letter = KnowledgeChunkDeadLetter
        statement = (
            select(
                letter.id,
                letter.original_chunk_id,
                letter.source_id,
                letter.source_title,
                letter.content,
                letter.error_code,
                letter.error_message,
                letter.retry_count,
                letter.created_at,
            )
            .where(letter.id > after_id)
            .order_by(letter.id)
            .limit(limit)
        )
        async with self._database.connect() as connection:
            return [DeadLetter(*row) for row in await connection.execute(statement)]

    @translated
    async def depth(self) -> QueueDepth:
        """Count what can be claimed now, what is leased or deferred, and what is dead."""
        is_due = EmbeddingJob.available_at <= func.now()
        age = extract("epoch", func.now() - func.min(EmbeddingJob.created_at))
        dead = select(func.count()).select_from(KnowledgeChunkDeadLetter).scalar_subquery()
        statement = select(func.count().filter(is_due), func.count().filter(~is_due), dead, age)
        async with self._database.connect() as connection:
            ready, waiting, dead_count, oldest = (await connection.execute(statement)).one()
        return QueueDepth(
            ready=ready, waiting=waiting, dead=dead_count, oldest_seconds=None if oldest is None else float(oldest)
        )

    async def _lock(self, connection: AsyncConnection, lease: Lease, chunk_ids: Sequence[int]) -> list[int]:
        wanted = set(chunk_ids)
        sources = sorted({chunk.source_id for chunk in lease.chunks if chunk.chunk_id in wanted})
        if sources:
            await lock_sources(connection, sources)
        return sources


def _without(lease: Lease, chunk_ids: Sequence[int]) -> Lease:
    gone = set(chunk_ids)
    rest = tuple(chunk for chunk in lease.chunks if chunk.chunk_id not in gone)
    return Lease(token=lease.token, chunks=rest, expires_at=lease.expires_at)


async def _ids(connection: AsyncConnection, statement: Any, parameters: Mapping[str, Any] | None = None) -> set[int]:
    return {row[0] for row in await connection.execute(statement, parameters or {})}


async def _lost(connection: AsyncConnection, lease: Lease, missing: set[int]) -> list[int]:
    """Those of the chunks not written that somebody else took, embedded or buried.

    The rest was deleted, or is just being deleted.
    """
    if not missing:
        return []
    parameters = {"ids": sorted(missing), "token": lease.token}
    # In this order: what is deleted between the two is gone from the second as well.
    ours = await _ids(connection, _still_ours(), parameters)
    return sorted(await _ids(connection, _still_there(), parameters) - ours)


def _raise_if(lost: Sequence[int]) -> None:
    if lost:
        raise LeaseLostError(
            f"{len(lost)} of these chunks belong to another worker now: the lease had ended; "
            "nothing was written for them. Raise KB_EMBEDDING_LEASE_SECONDS if calls take that long",
            lost,
        )


async def _bury_locked(
    connection: AsyncConnection,
    token: UUID,
    chunk_ids: Sequence[int],
    code: ErrorCode,
    cause: ErrorCode,
    model: str | None,
) -> set[int]:
    message = ERROR_MESSAGES[cause]
    parameters = {"ids": list(chunk_ids), "token": token, "code": code, "message": message, "model": model}
    buried = (await connection.execute(_bury(), parameters)).all()
    if buried:
        sources = sorted({row.source_id for row in buried})
        await connection.execute(_blame(), {"ids": sources, "code": code, "message": message})
        await recompute_status(connection, sources)
    return {row.original_chunk_id for row in buried}


def _among(column: Any, ids: Collection[int]) -> ColumnElement[bool]:
    """IN as one array: of single parameters a statement takes 32,767 only."""
    among: ColumnElement[bool] = column == func.any(literal(list(ids), ARRAY(BigInteger)))
    return among


def _is_ours() -> ColumnElement[bool]:
    """The fence: the job is still leased under our token."""
    return (EmbeddingJob.chunk_id == func.any(_IDS)) & (EmbeddingJob.lease_token == _TOKEN)


@cache
def _claim() -> AnySelect:
    """Lock due jobs, skipping those that others are claiming, and lease them.

    The CTE is a fence: without it the planner may lock more rows than LIMIT says.
    """
    picked = (
        select(EmbeddingJob.chunk_id)
        .where(EmbeddingJob.available_at <= func.now())
        .order_by(EmbeddingJob.available_at, EmbeddingJob.chunk_id)
        .limit(bindparam("limit"))
        .with_for_update(skip_locked=True)
        .cte("picked")
    )
    leased = (
        update(EmbeddingJob)
        .where(EmbeddingJob.chunk_id == picked.c.chunk_id)
        .values(
            lease_token=_TOKEN,
            available_at=func.now() + bindparam("lease", type_=Interval()),
            attempts=EmbeddingJob.attempts + 1,
        )
        .returning(EmbeddingJob.chunk_id, EmbeddingJob.attempts, EmbeddingJob.available_at)
        .cte("leased")
    )
    return (
        select(
            leased.c.chunk_id,
            leased.c.attempts,
            leased.c.available_at,
            KnowledgeChunk.source_id,
            KnowledgeChunk.content,
            KnowledgeChunk.token_count,
        )
        .join(KnowledgeChunk, KnowledgeChunk.id == leased.c.chunk_id)
        .order_by(leased.c.chunk_id)
    )


@cache
def _start() -> Update:
    """pending -> processing, passing over locked sources: the claim must not wait for them."""
    pending = (
        select(KnowledgeSource.id)
        .where(KnowledgeSource.id == func.any(_IDS), KnowledgeSource.status == SourceStatus.PENDING)
        .order_by(KnowledgeSource.id)
        .with_for_update(skip_locked=True, key_share=True)
        .cte("pending")
    )
    return (
        update(KnowledgeSource)
        .where(KnowledgeSource.id == pending.c.id)
        .values(status=SourceStatus.PROCESSING)
        .execution_options(synchronize_session=False)
    )


@cache
def _finish() -> Any:
    return (
        delete(EmbeddingJob)
        .where(_is_ours())
        .returning(EmbeddingJob.chunk_id)
        .execution_options(synchronize_session=False)
    )


@cache
def _write_vector() -> Update:
    return (
        update(KnowledgeChunk)
        .where(KnowledgeChunk.id == bindparam("chunk"))
        .values(embedding=bindparam("vector", type_=HalfVector()), embedding_model=bindparam("model"))
    )


@cache
def _write_vectors() -> tuple[str, Callable[[int, PackedVector, str], tuple[Any, ...]]]:
    """The same as the driver takes it: its text, and what makes its arguments."""
    compiled = _write_vector().compile(dialect=asyncpg.dialect())  # type: ignore[no-untyped-call]  # untyped there
    order = [("chunk", "vector", "model").index(name) for name in compiled.positiontup or ()]
    return str(compiled), lambda *values: tuple(values[position] for position in order)


@cache
def _release(*, give_back: bool) -> Any:
    """Give jobs back without waiting for anybody, so that neither a locked source nor a deadlock is in the way.

    What is locked is being deleted, by the cascade of its source or document, or claimed by another worker.
    """
    attempts = EmbeddingJob.attempts - 1 if give_back else EmbeddingJob.attempts
    held = select(EmbeddingJob.chunk_id).where(_is_ours()).with_for_update(skip_locked=True).cte("held")
    return (
        update(EmbeddingJob)
        .where(EmbeddingJob.chunk_id == held.c.chunk_id)
        .values(
            lease_token=None,
            available_at=func.now() + bindparam("delay", type_=Interval()),
            attempts=attempts,
            error_code=bindparam("code", type_=Text()),
        )
        .returning(EmbeddingJob.chunk_id)
        .execution_options(synchronize_session=False)
    )


@cache
def _bury() -> Insert:
    """Job and chunk out, dead letter in: one statement, so that nothing is ever in neither place."""
    letter, chunk = KnowledgeChunkDeadLetter, KnowledgeChunk
    jobs = delete(EmbeddingJob).where(_is_ours()).returning(EmbeddingJob.chunk_id, EmbeddingJob.attempts).cte("jobs")
    kept = [getattr(chunk, name) for name in _KEPT]
    chunks = (
        delete(chunk)
        .where(chunk.id == jobs.c.chunk_id)
        .returning(chunk.id, chunk.source_id, *kept, chunk.created_at, jobs.c.attempts)
        .cte("chunks")
    )
    rows = select(
        chunks.c.id,
        chunks.c.source_id,
        KnowledgeSource.title,
        KnowledgeSource.type,
        chunks.c.created_at,
        chunks.c.attempts,
        bindparam("code", type_=Text()),
        bindparam("message", type_=Text()),
        bindparam("model", type_=Text()),
        *(chunks.c[name] for name in _KEPT),
    ).join(KnowledgeSource, KnowledgeSource.id == chunks.c.source_id)
    target = [
        "original_chunk_id",
        "source_id",
        "source_title",
        "source_type",
        "chunk_created_at",
        "retry_count",
        "error_code",
        "error_message",
        "embedding_model",
        *_KEPT,
    ]
    # Raw: else SQLAlchemy takes the parameters for the values of a row.
    return (
        insert(letter)
        .from_select(target, rows)
        .returning(letter.original_chunk_id, letter.source_id)
        .execution_options(dml_strategy="raw")
    )


@cache
def _blame() -> Update:
    return (
        update(KnowledgeSource)
        .where(KnowledgeSource.id == func.any(_IDS))
        .values(error_code=bindparam("code", type_=Text()), error_message=bindparam("message", type_=Text()))
        .execution_options(synchronize_session=False)
    )


def _requeue(conditions: Sequence[ColumnElement[bool]]) -> Insert:
    """Dead letter out, chunk and job in: one statement."""
    letter, chunk = KnowledgeChunkDeadLetter, KnowledgeChunk
    has_source = exists().where(KnowledgeSource.id == letter.source_id)
    is_back = exists().where(chunk.id == letter.original_chunk_id)
    kept = [getattr(letter, name) for name in _KEPT]
    letters = (
        delete(letter)
        .where(*conditions, has_source, or_(letter.original_chunk_id.is_(None), ~is_back))
        .returning(letter.original_chunk_id, letter.source_id, letter.chunk_created_at, *kept)
        .cte("letters")
    )
    sequence = func.nextval(func.pg_get_serial_sequence("knowledge_chunks", "id"))
    rows = select(
        case((letters.c.original_chunk_id.is_(None), sequence), else_=letters.c.original_chunk_id),
        letters.c.source_id,
        func.coalesce(letters.c.chunk_created_at, func.now()),
        *(letters.c[name] for name in _KEPT),
    )
    chunks = (
        postgresql.insert(chunk)
        .from_select(["id", "source_id", "created_at", *_KEPT], rows)
        # A queue without leases could bury a chunk twice: the copies become one chunk again.
        .on_conflict_do_nothing(index_elements=[chunk.id])
        .returning(chunk.id)
        .cte("chunks")
    )
    return insert(EmbeddingJob).from_select(["chunk_id"], select(chunks.c.id)).returning(EmbeddingJob.chunk_id)


@cache
def _still_ours() -> Any:
    return select(EmbeddingJob.chunk_id).where(_is_ours())


@cache
def _still_there() -> Any:
    ids = func.any(_IDS)
    chunks = select(KnowledgeChunk.id).where(KnowledgeChunk.id == ids)
    letters = select(KnowledgeChunkDeadLetter.original_chunk_id).where(
        KnowledgeChunkDeadLetter.original_chunk_id == ids
    )
    return union_all(chunks, letters)
