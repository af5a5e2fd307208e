"""The statements of the queue, compiled once: SQL as asyncpg takes it.

Each claim is one statement. What writes stands in a transaction that has locked the sources before; see
:mod:`kotonoha_store.embedding_queue`.
"""

from functools import cache, lru_cache
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    DateTime,
    Integer,
    Interval,
    Text,
    Uuid,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    not_,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects import postgresql

from kotonoha_store.columns import HalfVector
from kotonoha_store.models import (
    EmbeddingJob,
    EmbeddingPause,
    KnowledgeChunk,
    KnowledgeChunkDeadLetter,
    KnowledgeSource,
)
from kotonoha_store.prepared import Prepared, prepare
from kotonoha_store.records import SCOPE_FIELDS, SourceStatus
from kotonoha_store.source_status import lock_statement, recompute_statement

KEPT: Final = (
    "content",
    "location",
    "token_count",
    "content_hash",
    *SCOPE_FIELDS,
    "occurred_from",
    "occurred_to",
)
"""What a dead letter keeps of its chunk, and a requeue brings back."""

_IDS: Final = bindparam("ids", type_=ARRAY(BigInteger))
_TOKEN: Final = bindparam("token", type_=Uuid())
_PROVIDER: Final = bindparam("asked", type_=Text())
_CODE: Final = bindparam("code", type_=Text())
_MESSAGE: Final = bindparam("message", type_=Text())
_MODEL: Final = bindparam("model", type_=Text())
_ZERO: Final[ColumnElement[int]] = literal_column("0")
_DURATION: Final = bindparam("duration", type_=Interval())
_FAILURES: Final = bindparam("failed", type_=Integer())


def _is_ours() -> ColumnElement[bool]:
    """The fence: the job is still leased under our token."""
    return (EmbeddingJob.chunk_id == func.any(_IDS)) & (EmbeddingJob.lease_token == _TOKEN)


@lru_cache(maxsize=64)
def claim(limit: int, *, after: bool = False) -> Prepared:
    """Lease due jobs, skipping those that others are claiming. Parameters: token, duration, asked (the provider),
    failed (how many failures are too many); where it is ``after`` a job, that one's due_at and chunk_id.

    The longest due come first. Up to the first one whose lease ran out; that one comes alone: its worker may have died
    of it, and its neighbours shall not.
    """
    job, chunk = EmbeddingJob, KnowledgeChunk
    order = (job.available_at, job.chunk_id)
    # A CTE is a fence: without it the planner may lock more rows than LIMIT says.
    conditions = [job.available_at <= func.now(), ~exists().where(_is_paused())]
    if after:
        conditions.append(
            tuple_(*order)
            > tuple_(bindparam("due_at", type_=DateTime(True)), bindparam("chunk_id", type_=BigInteger()))
        )
    due = (
        select(*order, job.lease_token.is_not(None).label("ran_out"))
        .where(*conditions)
        .order_by(*order)
        # Part of the statement: planned for any limit it reads a tenth of the tables, or is planned anew each time.
        .limit(literal_column(str(limit)))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    taken = (due.c.available_at, due.c.chunk_id)
    placed = select(
        due.c.chunk_id,
        func.row_number().over(order_by=taken).label("place"),
        func.bool_or(due.c.ran_out).over(order_by=taken).label("after_one_that_ran_out"),
    ).subquery("placed")
    picked = select(placed.c.chunk_id).where(or_(~placed.c.after_one_that_ran_out, placed.c.place == 1))
    leased = (
        update(job)
        # As an array: joined, the planner reads the whole queue once it is planned for any limit.
        .where(job.chunk_id == func.any(func.array(picked.scalar_subquery(), type_=ARRAY(BigInteger))))
        .values(lease_token=_TOKEN, available_at=func.now() + _DURATION, attempts=job.attempts + 1)
        .returning(job.chunk_id, job.attempts, job.available_at)
        .cte("leased")
    )
    # OFFSET 0: one by one through the primary key, for the same reason.
    text = (
        select(chunk.source_id, chunk.content, chunk.token_count)
        .where(chunk.id == leased.c.chunk_id)
        .offset(literal_column("0"))
        .lateral("text")
    )
    read = (
        select(leased, text, due.c.available_at.label("due_at"))
        .select_from(leased.join(text, true()).join(due, due.c.chunk_id == leased.c.chunk_id))
        .cte("read")
    )
    # pending -> processing, passing over locked sources: the claim must not wait for them.
    source = KnowledgeSource
    pending = (
        select(source.id)
        .where(
            source.id == func.any(func.array(select(read.c.source_id).distinct().scalar_subquery())),
            source.status == literal_column("'pending'::source_status_enum"),
        )
        .order_by(source.id)
        .with_for_update(skip_locked=True, key_share=True)
        .cte("pending")
    )
    started = (
        update(source)
        .where(source.id == pending.c.id)
        .values(status=literal_column(f"'{SourceStatus.PROCESSING}'::source_status_enum"))
        .cte("started")
    )
    has_failed = exists().where(EmbeddingPause.provider == _PROVIDER).select().scalar_subquery()
    return prepare(select(read, has_failed.label("has_failed")).order_by(read.c.chunk_id).add_cte(started))


def _is_paused() -> ColumnElement[bool]:
    pause = EmbeddingPause
    return and_(pause.provider == _PROVIDER, or_(pause.paused_until > func.now(), pause.failures >= _FAILURES))


@cache
def heartbeat() -> Prepared:
    """Let leases last longer. Parameters: ids, token, duration. Locked rows are just being finished."""
    held = select(EmbeddingJob.chunk_id).where(_is_ours()).with_for_update(skip_locked=True).cte("held")
    return prepare(
        update(EmbeddingJob)
        .where(EmbeddingJob.chunk_id == held.c.chunk_id)
        .values(available_at=func.now() + _DURATION)
        .returning(EmbeddingJob.chunk_id)
    )


@cache
def lock_sources() -> Prepared:
    """See :func:`kotonoha_store.source_status.lock_sources`."""
    return prepare(lock_statement())


@cache
def recompute_status() -> Prepared:
    """See :func:`kotonoha_store.source_status.recompute_status`."""
    return prepare(recompute_statement())


@cache
def finish() -> Prepared:
    """Lock sources, then end jobs: in this order, since the deletion asks how many are locked.

    Parameters: ids, token, sources. The fence is looked at again in what was changed while the locks were waited for.
    """
    source = KnowledgeSource
    locked = (
        select(source.id)
        .where(source.id == func.any(bindparam("sources", type_=ARRAY(BigInteger))))
        .order_by(source.id)
        .with_for_update(key_share=True)
        .cte("locked")
        .prefix_with("MATERIALIZED")
    )
    have_been = select(func.count()).select_from(locked).scalar_subquery() >= literal_column("0")
    return prepare(delete(EmbeddingJob).where(_is_ours(), have_been).returning(EmbeddingJob.chunk_id))


@cache
def write_vector() -> Prepared:
    """Parameters: chunk, vector, model."""
    return prepare(
        update(KnowledgeChunk)
        .where(KnowledgeChunk.id == bindparam("chunk", type_=BigInteger()))
        .values(embedding=bindparam("vector", type_=HalfVector()), embedding_model=_MODEL)
    )


def _twin(*columns: Any) -> Any:
    """The vector of the same text under the same model, of any chunk."""
    twin = KnowledgeChunk.__table__.alias("twin")
    return (
        select(*(twin.c[name] for name in columns))
        .where(
            twin.c.content_hash == KnowledgeChunk.content_hash,
            # As the index has it.
            func.hashtextextended(twin.c.embedding_model, _ZERO) == func.hashtextextended(_MODEL, _ZERO),
            twin.c.embedding_model == _MODEL,
            twin.c.embedding.is_not(None),
            # Nor its own vector, nor another that is to be made again.
            ~exists().where(EmbeddingJob.chunk_id == twin.c.id),
        )
        .limit(literal_column("1"))
        .lateral("known")
    )


@cache
def known() -> Prepared:
    """Which of these chunks have a text that has a vector already. Parameters: ids, model."""
    twin = _twin("id")
    return prepare(select(KnowledgeChunk.id).join(twin, true()).where(KnowledgeChunk.id == func.any(_IDS)))


@cache
def copy_known() -> Prepared:
    """Give chunks the vectors that their texts have already, and end their jobs. Parameters: ids, token, model."""
    job, chunk = EmbeddingJob, KnowledgeChunk
    held = select(job.chunk_id).where(_is_ours()).with_for_update().cte("held")
    twin = _twin("embedding", "embedding_model")
    copies = (
        select(held.c.chunk_id, twin.c.embedding, twin.c.embedding_model)
        .select_from(held)
        .join(chunk, chunk.id == held.c.chunk_id)
        .join(twin, true())
        .cte("copies")
    )
    written = (
        update(chunk)
        .where(chunk.id == copies.c.chunk_id)
        .values(embedding=copies.c.embedding, embedding_model=copies.c.embedding_model)
        .returning(chunk.id)
        .cte("written")
    )
    return prepare(delete(job).where(job.chunk_id == written.c.id).returning(job.chunk_id))


def _is_outdated(*, everything: bool) -> ColumnElement[bool]:
    """Chunks that have a vector: of another model, or any."""
    has_vector = KnowledgeChunk.embedding.is_not(None)
    return has_vector if everything else and_(has_vector, KnowledgeChunk.embedding_model != _MODEL)


@cache
def outdated(limit: int, *, everything: bool) -> Prepared:
    """Chunks to embed again, after one, in the order of their ids. Parameters: after, model unless ``everything``."""
    chunk = KnowledgeChunk
    return prepare(
        select(chunk.id, chunk.source_id)
        .where(chunk.id > bindparam("after", type_=BigInteger()), _is_outdated(everything=everything))
        .order_by(chunk.id)
        .limit(literal_column(str(limit)))
    )


@cache
def count_outdated(*, everything: bool) -> Prepared:
    """How many these are, and how many of them wait already. Parameters: model unless ``everything``."""
    job = EmbeddingJob
    return prepare(
        select(func.count().label("chunks"), func.count(job.chunk_id).label("waiting"))
        .select_from(KnowledgeChunk)
        .outerjoin(job, job.chunk_id == KnowledgeChunk.id)
        .where(_is_outdated(everything=everything))
    )


@cache
def queue_again(*, everything: bool) -> Prepared:
    """Queue those of these chunks that are still to be embedded again. Parameters: ids, model unless ``everything``."""
    job, chunk = EmbeddingJob, KnowledgeChunk
    rows = select(chunk.id).where(chunk.id == func.any(_IDS), _is_outdated(everything=everything)).order_by(chunk.id)
    return prepare(
        postgresql.insert(job).from_select(["chunk_id"], rows).on_conflict_do_nothing().returning(job.chunk_id)
    )


@cache
def spare() -> Prepared:
    """End the jobs of chunks that have a vector. Parameters: ids, token."""
    has_vector = exists().where(KnowledgeChunk.id == EmbeddingJob.chunk_id, KnowledgeChunk.embedding.is_not(None))
    return prepare(delete(EmbeddingJob).where(_is_ours(), has_vector).returning(EmbeddingJob.chunk_id))


@cache
def release(*, give_back: bool) -> Prepared:
    """Give jobs back without waiting for anybody. Parameters: ids, token, duration, code.

    So neither a locked source nor a deadlock is in the way: what is locked is being deleted, by the cascade of its
    source or document, or claimed by another worker.
    """
    attempts = EmbeddingJob.attempts - 1 if give_back else EmbeddingJob.attempts
    held = select(EmbeddingJob.chunk_id).where(_is_ours()).with_for_update(skip_locked=True).cte("held")
    return prepare(
        update(EmbeddingJob)
        .where(EmbeddingJob.chunk_id == held.c.chunk_id)
        .values(lease_token=None, available_at=func.now() + _DURATION, attempts=attempts, error_code=_CODE)
        .returning(EmbeddingJob.chunk_id)
    )


@cache
def bury() -> Prepared:
    """Job and chunk out, dead letter in: one statement, so that nothing is ever in neither place.

    Parameters: ids, token, code, message, model, most (attempts).
    """
    job, chunk, letter = EmbeddingJob, KnowledgeChunk, KnowledgeChunkDeadLetter
    jobs = delete(job).where(_is_ours()).returning(job.chunk_id, job.attempts, job.history).cte("jobs")
    chunks = (
        delete(chunk)
        .where(chunk.id == jobs.c.chunk_id)
        .returning(
            chunk.id,
            chunk.source_id,
            chunk.created_at,
            jobs.c.attempts,
            jobs.c.history,
            *(getattr(chunk, name) for name in KEPT),
        )
        .cte("chunks")
    )
    requeued_at = chunks.c.history[-1]["requeued_at"].astext
    values: dict[str, Any] = {
        "original_chunk_id": chunks.c.id,
        "source_id": chunks.c.source_id,
        "source_title": KnowledgeSource.title,
        "source_type": KnowledgeSource.type,
        "chunk_created_at": chunks.c.created_at,
        # The claim that finds them used up is no attempt.
        "retry_count": func.least(chunks.c.attempts, bindparam("most", type_=Integer())),
        "last_retry_at": sql_cast(requeued_at, letter.last_retry_at.type),
        "history": func.coalesce(chunks.c.history, literal_column("'[]'::jsonb")),
        "error_code": _CODE,
        "error_message": _MESSAGE,
        "embedding_model": _MODEL,
        **{name: chunks.c[name] for name in KEPT},
    }
    rows = select(*values.values()).join(KnowledgeSource, KnowledgeSource.id == chunks.c.source_id)
    # Raw: else SQLAlchemy takes the parameters for the values of a row.
    return prepare(
        insert(letter)
        .from_select(list(values), rows)
        .returning(letter.original_chunk_id, letter.source_id)
        .execution_options(dml_strategy="raw")
    )


@cache
def blame() -> Prepared:
    """Write on sources why chunks of theirs died. Parameters: ids, code, message."""
    return prepare(
        update(KnowledgeSource)
        .where(KnowledgeSource.id == func.any(_IDS))
        .values(error_code=_CODE, error_message=_MESSAGE)
    )


@cache
def still_ours() -> Prepared:
    """Parameters: ids, token."""
    return prepare(select(EmbeddingJob.chunk_id).where(_is_ours()))


@cache
def still_there() -> Prepared:
    """Which of these chunks exist, as chunk or as dead letter. Parameters: ids."""
    chunk_id, letter = KnowledgeChunk.id, KnowledgeChunkDeadLetter.original_chunk_id
    any_of = func.any(_IDS)
    return prepare(union_all(select(chunk_id).where(chunk_id == any_of), select(letter).where(letter == any_of)))


@cache
def depth() -> Prepared:
    """Ready, leased, put off, dead, and the age of the oldest job in seconds."""
    job = EmbeddingJob
    is_due = job.available_at <= func.now()
    is_leased = job.lease_token.is_not(None)
    dead = select(func.count()).select_from(KnowledgeChunkDeadLetter).scalar_subquery()
    return prepare(
        select(
            func.count().filter(is_due).label("ready"),
            func.count().filter(~is_due, is_leased).label("leased"),
            func.count().filter(~is_due, ~is_leased).label("put_off"),
            dead.label("dead"),
            func.extract("epoch", func.now() - func.min(job.created_at)).label("oldest"),
        )
    )


@cache
def next_due() -> Prepared:
    """How long until the first job can be claimed; no row without jobs."""
    job = EmbeddingJob
    order = (job.available_at, job.chunk_id)
    return prepare(select((job.available_at - func.now()).label("wait")).order_by(*order).limit(literal_column("1")))


@cache
def pause() -> Prepared:
    """Leave a provider alone: the longer of two waits counts. Parameters: asked, duration, failed, code."""
    table = EmbeddingPause
    statement = postgresql.insert(table).values(
        provider=_PROVIDER, paused_until=func.now() + _DURATION, failures=_FAILURES, error_code=_CODE
    )
    new = statement.excluded
    return prepare(
        statement.on_conflict_do_update(
            index_elements=[table.provider],
            set_={
                "paused_until": func.greatest(table.paused_until, new.paused_until),
                "failures": func.greatest(table.failures, new.failures),
                "error_code": new.error_code,
                "updated_at": func.now(),
            },
        )
    )


@cache
def record_failure() -> Prepared:
    """Count a failed call; returns how many came in a row. Parameters: asked, code."""
    table = EmbeddingPause
    statement = postgresql.insert(table).values(provider=_PROVIDER, failures=1, error_code=_CODE)
    return prepare(
        statement.on_conflict_do_update(
            index_elements=[table.provider],
            set_={"failures": table.failures + 1, "error_code": _CODE, "updated_at": func.now()},
        ).returning(table.failures)
    )


@cache
def resume() -> Prepared:
    """Parameters: asked."""
    return prepare(delete(EmbeddingPause).where(EmbeddingPause.provider == _PROVIDER))


@cache
def record_success() -> Prepared:
    """The provider answers again; a wait that it asked for stays. Parameters: asked, failed (too many failures)."""
    table = EmbeddingPause
    is_asked_for = and_(table.paused_until > func.now(), table.failures < _FAILURES)
    kept = update(table).where(table.provider == _PROVIDER, is_asked_for).values(failures=_ZERO).cte("kept")
    return prepare(delete(table).where(table.provider == _PROVIDER, not_(is_asked_for)).add_cte(kept))


@cache
def pauses(*, one: bool) -> Prepared:
    """Parameters: asked, where it is ``one``."""
    table = EmbeddingPause
    # 'infinity', written by hand, fits no timedelta.
    until = func.least(table.paused_until, func.now() + literal_column("interval '1 day'"))
    remaining = func.greatest(until - func.now(), literal_column("interval '0'"))
    statement = select(table.provider, remaining.label("remaining"), table.failures, table.error_code)
    return prepare(statement.where(table.provider == _PROVIDER) if one else statement.order_by(table.provider))
