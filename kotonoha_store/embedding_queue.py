"""The queue of chunks that wait for their vector: :class:`EmbeddingQueue`.

A claim is a lease under a token, with an end. Whoever writes must still hold the token, so a worker that
was thought dead, and whose jobs were given to another, changes nothing when it comes back.

Lock order everywhere: source, chunk, job, sources in the order of their ids.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from numpy.typing import NDArray

from kotonoha_store import dead_letters, queue_statements
from kotonoha_store.checks import check_text
from kotonoha_store.columns import VectorLike, pack_vectors
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated
from kotonoha_store.errors import ErrorCode, InvalidInputError, LeaseLostError, StoreUnavailableError
from kotonoha_store.metrics import DEAD_LETTERS, OLDEST_JOB_SECONDS, PAUSED_PROVIDERS, PENDING_CHUNKS
from kotonoha_store.prepared import Prepared
from kotonoha_store.queue_writes import (
    end_jobs,
    ids_of,
    lock_sources,
    lost_of,
    raise_if_lost,
    recompute_status,
    run,
    sources_of,
)
from kotonoha_store.records import ClaimedChunk, DeadLetter, Lease, Progress, ProviderPause, QueueDepth, Requeued
from kotonoha_store.wakeup import JOBS_CHANNEL, Listener

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

OUTAGE_FAILURES: Final = 3
"""After so many failed calls in a row it is the provider that is at fault, and no text."""


FRONT_INTERVAL: Final = 1.0
"""How often, in seconds, claims begin at the front of the queue."""

_REQUEUE_BATCH: Final = 1000


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
            lease: how long a claim lasts by the server's clock; workers renew it while they are at it.
            max_attempts: after how many failed attempts a chunk becomes a dead letter.
            update_batch_size: rows sent to the server at once.

        Raises:
            InvalidInputError: one of these is not positive.
        """
        if not timedelta(0) < lease <= timedelta(days=365) or max_attempts < 1 or update_batch_size < 1:
            raise InvalidInputError("lease must be positive and at most a year, the two numbers at least 1")
        self._database = database
        self.lease: Final = lease
        self.max_attempts: Final = max_attempts
        self._update_batch_size = update_batch_size
        # The last job that was claimed, and when the claims last began at the front of the queue.
        self._mark: tuple[datetime, int] | None = None
        self._began_at_front = 0.0

    @translated
    async def claim(self, limit: int = 100, *, provider: str = "") -> Lease:
        """Take up to ``limit`` jobs that are due, the longest due first; empty when there are none.

        The attempt is counted here, so a text that kills its worker is counted too; one that was
        claimed ``max_attempts`` times without an answer becomes a dead letter now. A job whose lease
        ran out comes alone, so that whatever its worker died of costs no neighbour an attempt.

        Args:
            provider: who is to make the vectors; nothing is claimed while it is paused.

        Raises:
            InvalidInputError: ``limit`` is below 1.
        """
        if limit < 1:
            raise InvalidInputError(f"limit must be at least 1, got {limit}")
        buried: list[int] = []
        while True:
            lease, exhausted = await self._claim(min(limit, 2**31 - 1), provider)
            buried += exhausted
            # Nothing but used-up jobs does not mean that the queue is empty.
            if lease.chunks or not exhausted:
                return replace(lease, buried=tuple(buried))

    async def _claim(self, limit: int, provider: str) -> tuple[Lease, list[int]]:
        token = uuid4()
        rows = await self._due_rows(limit, token=token, duration=self.lease, asked=provider, failed=OUTAGE_FAILURES)
        lease = Lease(
            token=token,
            chunks=tuple(
                ClaimedChunk(
                    chunk_id=row["chunk_id"],
                    source_id=row["source_id"],
                    content=row["content"],
                    attempt=row["attempts"],
                    token_count=row["token_count"],
                )
                for row in rows
            ),
            expires_at=max((row["available_at"] for row in rows), default=None),
            provider_has_failed=bool(rows) and rows[0]["has_failed"],
        )
        exhausted = [chunk.chunk_id for chunk in lease.chunks if chunk.attempt > self.max_attempts]
        if not exhausted:
            return lease, exhausted
        gone = set(exhausted)
        # Ours no longer if the lease was that short, and left alone if that fails, on a source that is locked for long:
        # then another claim buries them, and the jobs claimed beside them are none the worse.
        try:
            await self.bury(lease, exhausted, ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED)
        except (LeaseLostError, StoreUnavailableError):
            exhausted = []
        return replace(lease, chunks=tuple(c for c in lease.chunks if c.chunk_id not in gone)), exhausted

    async def _due_rows(self, limit: int, **values: Any) -> list[Any]:
        """Claim where the last claim ended.

        In front of it lie the dead entries of what was claimed, which nobody can clean up while some transaction
        is long open (pg_dump): walked over each time, they make a claim many times as long. What comes to lie there
        (added by a transaction that took its time, or given back) is found a second later.
        """
        mark = self._mark
        rows: list[Any] = []
        if mark is not None and monotonic() - self._began_at_front < FRONT_INTERVAL:
            statement = queue_statements.claim(limit, after=True)
            rows = await self._fetch(statement, due_at=mark[0], chunk_id=mark[1], **values)
        if not rows:
            self._began_at_front = monotonic()
            rows = await self._fetch(queue_statements.claim(limit), **values)
        is_full = len(rows) == limit
        self._mark = max((row["due_at"], row["chunk_id"]) for row in rows) if is_full else None
        return rows

    @translated
    async def heartbeat(self, lease: Lease, chunk_ids: Sequence[int] | None = None) -> None:
        """Let the lease, or this part of it, last its whole length from now on.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were renewed.
        """
        ids = lease.chunk_ids if chunk_ids is None else chunk_ids
        held = await self._ids(queue_statements.heartbeat(), ids=list(ids), token=lease.token, duration=self.lease)
        raise_if_lost(await self._lost(lease, set(ids) - held))

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
        statement = queue_statements.write_vector()

        async def write(driver: Any, sources: Sequence[int]) -> set[int]:
            held = await end_jobs(driver, lease, chunk_ids, sources)
            rows = [
                statement.arguments({"chunk": chunk_id, "vector": vector, "model": model})
                for chunk_id, vector in zip(chunk_ids, packed, strict=True)
                if chunk_id in held
            ]
            for start in range(0, len(rows), self._update_batch_size):
                await driver.executemany(statement.sql, rows[start : start + self._update_batch_size])
            return held

        await self._settle(lease, chunk_ids, write)

    @translated
    async def finish(self, lease: Lease, chunk_ids: Sequence[int]) -> None:
        """End the jobs of chunks that somebody gave a vector past the queue.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were ended.
        """

        async def write(driver: Any, sources: Sequence[int]) -> set[int]:
            return await end_jobs(driver, lease, chunk_ids, sources)

        await self._settle(lease, chunk_ids, write)

    @translated
    async def reuse(self, lease: Lease, chunk_ids: Sequence[int], model: str) -> set[int]:
        """Give chunks whose text has a vector of this model already that same vector; their jobs are done.

        Returns:
            Which chunks those are.
        """
        # One look for each text, however many chunks have it.
        content_of = {chunk.chunk_id: chunk.content for chunk in lease.chunks}
        first_of = {content_of[chunk_id]: chunk_id for chunk_id in reversed(chunk_ids) if chunk_id in content_of}
        known = await self._ids(queue_statements.known(), ids=list(first_of.values()), model=model)
        found = {chunk_id for chunk_id in chunk_ids if first_of.get(content_of.get(chunk_id, "")) in known}
        if not found:
            return found

        async def write(driver: Any, sources: Sequence[int]) -> set[int]:
            await lock_sources(driver, sources)
            return await ids_of(
                driver, queue_statements.copy_known(), ids=sorted(found), token=lease.token, model=model
            )

        # What was lost, or whose twin is gone meanwhile, is embedded like any other.
        return await self._settle(lease, sorted(found), write, tell_lost=False)

    @translated
    async def defer(
        self, lease: Lease, chunk_ids: Sequence[int], delay: timedelta, error_code: ErrorCode | None = None
    ) -> None:
        """Give jobs back for ``delay``, and the attempt with them: the texts were not at fault.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were given back.
        """
        held = await self._ids(
            queue_statements.release(give_back=True),
            ids=list(chunk_ids),
            token=lease.token,
            duration=delay,
            code=error_code,
        )
        raise_if_lost(await self._lost(lease, set(chunk_ids) - held))

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
            The chunks that are tried no more; see :meth:`bury`.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were recorded.
        """
        attempts = {chunk.chunk_id: chunk.attempt for chunk in lease.chunks}
        # What is not of this lease the fence refuses.
        over = [chunk_id for chunk_id in chunk_ids if attempts.get(chunk_id, 0) >= self.max_attempts]
        again = [chunk_id for chunk_id in chunk_ids if attempts.get(chunk_id, 0) < self.max_attempts]
        release = queue_statements.release(give_back=False)
        async with self._locked(lease, over) as driver:
            held: set[int] = set()
            if again:
                held = await ids_of(driver, release, ids=again, token=lease.token, duration=retry_in, code=error_code)
            buried: set[int] = set()
            if over:
                code = ErrorCode.EMBEDDING_MAX_RETRIES_EXCEEDED
                buried = await self._bury(driver, lease, over, code, error_code, model)
            lost = await lost_of(driver, lease, set(chunk_ids) - held - buried)
        raise_if_lost(lost)
        return [chunk_id for chunk_id in over if chunk_id in buried]

    @translated
    async def bury(
        self, lease: Lease, chunk_ids: Sequence[int], error_code: ErrorCode, *, model: str | None = None
    ) -> None:
        """Move chunks to the dead letters, with all that is needed to queue them again.

        One that has a vector, which another model was to replace, keeps it instead, and stays where searches find it;
        :meth:`requeue_embedded` queues it again.

        Raises:
            LeaseLostError: some jobs belong to another worker now; the others were moved.
        """
        async with self._locked(lease, chunk_ids) as driver:
            held = await self._bury(driver, lease, chunk_ids, error_code, error_code, model)
            lost = await lost_of(driver, lease, set(chunk_ids) - held)
        raise_if_lost(lost)

    @translated
    async def dead_letters(
        self,
        *,
        after_id: int = 0,
        limit: int = 100,
        source_id: int | None = None,
        error_code: ErrorCode | str | None = None,
    ) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters in the order of their ids; the next page starts after the last id.

        All of them, or those that meet every condition given.
        """
        if limit < 1:
            raise InvalidInputError(f"limit must be at least 1, got {limit}")
        selection = dead_letters.Selection(None, source_id, error_code)
        async with self._database.connect() as connection:
            return await dead_letters.page(connection, selection, after_id=after_id, limit=limit)

    @translated
    async def dead_letter(self, dead_letter_id: int) -> DeadLetter:
        """Return one dead letter.

        Raises:
            NotFoundError: there is none with this id; it may have been queued again or discarded.
        """
        async with self._database.connect() as connection:
            return await dead_letters.one(connection, dead_letter_id)

    @translated
    async def requeue(
        self,
        dead_letter_ids: Sequence[int] | None = None,
        *,
        source_id: int | None = None,
        error_code: ErrorCode | str | None = None,
    ) -> int:
        """Queue dead letters again, under their old chunk ids, with their attempts reset and their history kept.

        All of them, or those that meet every condition given. Dead letters whose source is gone stay.

        Returns:
            How many were queued.
        """
        selection = dead_letters.Selection(dead_letter_ids, source_id, error_code)
        async with self._database.transaction() as connection:
            return await dead_letters.requeue(connection, selection)

    @translated
    async def requeue_embedded(
        self,
        model: str,
        *,
        everything: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Requeued:
        """Queue chunks again whose vector another model made, so that workers embed them with this one.

        Each keeps its vector until it has the new one: searches with the old model find it until then, those with
        the new one from then on. By batches: when it is stopped or fails, run it again. Several may run at once.

        Args:
            model: as :attr:`Embedder.model` says it.
            everything: those with a vector of this model, too; run again, that makes all of them once more.
            dry_run: only count.
            progress: called with chunks.

        Raises:
            InvalidInputError: ``model`` is empty or cannot be stored.
        """
        check_text(model, "model")
        if not model:
            raise InvalidInputError("model must not be empty")
        which: dict[str, Any] = {} if everything else {"model": model}
        (count,) = await self._fetch(queue_statements.count_outdated(everything=everything), **which)
        if dry_run:
            return Requeued(count["chunks"] - count["waiting"], count["waiting"])
        page = queue_statements.outdated(_REQUEUE_BATCH, everything=everything)
        queue_again = queue_statements.queue_again(everything=everything)
        after = done = queued = 0
        progress = progress or (lambda _done, _total: None)
        progress(0, count["chunks"])
        while rows := await self._fetch(page, after=after, **which):
            async with self._transaction() as driver:
                await lock_sources(driver, sorted({row["source_id"] for row in rows}))
                queued += len(await ids_of(driver, queue_again, ids=[row["id"] for row in rows], **which))
            after, done = rows[-1]["id"], done + len(rows)
            progress(done, max(done, count["chunks"]))
        return Requeued(queued, done - queued)

    @translated
    async def discard(
        self,
        dead_letter_ids: Sequence[int] | None = None,
        *,
        source_id: int | None = None,
        error_code: ErrorCode | str | None = None,
        everything: bool = False,
    ) -> int:
        """Delete dead letters for good, with the texts they hold; their sources' status follows.

        Those that meet every condition given.

        Args:
            everything: must be said where no condition is given.

        Returns:
            How many were deleted.

        Raises:
            InvalidInputError: neither a condition nor ``everything``, or both.
        """
        selection = dead_letters.Selection(dead_letter_ids, source_id, error_code)
        if selection.is_everything != everything:
            raise InvalidInputError(
                "say which dead letters to discard (ids, source_id, error_code), or everything=True"
            )
        async with self._database.transaction() as connection:
            return await dead_letters.discard(connection, selection)

    @translated
    async def depth(self) -> QueueDepth:
        """Count what is due (of a paused provider, too), what is leased or put off, and what is dead."""
        (row,) = await self._fetch(queue_statements.depth())
        age = row["oldest"]
        PENDING_CHUNKS.set(row["ready"] + row["leased"] + row["put_off"])
        DEAD_LETTERS.set(row["dead"])
        OLDEST_JOB_SECONDS.set(0.0 if age is None else float(age))
        return QueueDepth(
            ready=row["ready"],
            waiting=row["leased"] + row["put_off"],
            leased=row["leased"],
            dead=row["dead"],
            oldest_seconds=None if age is None else float(age),
        )

    @translated
    async def next_due(self) -> timedelta | None:
        """How long until a job can be claimed: put off until then, or leased; None without jobs, never negative."""
        rows = await self._fetch(queue_statements.next_due())
        return max(rows[0]["wait"], timedelta(0)) if rows else None

    @translated
    async def pause(
        self, provider: str, duration: timedelta, error_code: ErrorCode, *, until_probed: bool = False
    ) -> None:
        """Leave a provider alone for a while: no worker claims for it. The longer of two pauses counts.

        Args:
            until_probed: nor after that, before :meth:`record_success`.
        """
        await self._fetch(
            queue_statements.pause(),
            asked=provider,
            duration=duration,
            failed=OUTAGE_FAILURES if until_probed else 0,
            code=error_code,
        )

    @translated
    async def record_failure(self, provider: str, error_code: ErrorCode) -> int:
        """Count a call that failed without a fault of its texts, over all workers.

        From :data:`OUTAGE_FAILURES` on nothing is claimed for this provider before :meth:`record_success`.

        Returns:
            How many have failed since the last one that succeeded.
        """
        (row,) = await self._fetch(queue_statements.record_failure(), asked=provider, code=error_code)
        failures: int = row["failures"]
        return failures

    @translated
    async def record_success(self, provider: str) -> None:
        """The provider answers: forget its failures. A wait that it asked for is kept."""
        await self._fetch(queue_statements.record_success(), asked=provider, failed=OUTAGE_FAILURES)

    @translated
    async def resume(self, provider: str) -> None:
        """End a pause, whatever it was for: workers claim for this provider again at once."""
        await self._fetch(queue_statements.resume(), asked=provider)

    @translated
    async def pauses(self) -> list[ProviderPause]:
        """Return the providers that are left alone or have failed lately."""
        pauses = [ProviderPause(*row) for row in await self._fetch(queue_statements.pauses(one=False))]
        PAUSED_PROVIDERS.set(
            sum(pause.remaining > timedelta(0) or pause.failures >= OUTAGE_FAILURES for pause in pauses)
        )
        return pauses

    @translated
    async def pause_of(self, provider: str) -> ProviderPause | None:
        """Return why and how long this provider is left alone, or None."""
        rows = await self._fetch(queue_statements.pauses(one=True), asked=provider)
        return ProviderPause(*rows[0]) if rows else None

    def listener(self, *, enabled: bool = True) -> Listener:
        """What waits for new jobs; see :class:`~kotonoha_store.wakeup.Listener`."""
        return Listener(self._database, JOBS_CHANNEL, enabled=enabled)

    async def _fetch(self, statement: Prepared, **values: Any) -> list[Any]:
        async with self._database.driver() as driver:
            rows: list[Any] = await driver.fetch(statement.sql, *statement.arguments(values))
            return rows

    async def _ids(self, statement: Prepared, **values: Any) -> set[int]:
        return {row[0] for row in await self._fetch(statement, **values)}

    async def _lost(self, lease: Lease, missing: set[int]) -> list[int]:
        if not missing:
            return []
        async with self._database.driver() as driver:
            return await lost_of(driver, lease, missing)

    @asynccontextmanager
    async def _locked(self, lease: Lease, chunk_ids: Sequence[int]) -> AsyncIterator[Any]:
        """A transaction in which the sources of these chunks are locked."""
        async with self._transaction() as driver:
            await lock_sources(driver, sources_of(lease, chunk_ids))
            yield driver

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Any]:
        # Whatever the server's default: the status relies on each statement seeing what was committed before it.
        async with self._database.driver() as driver, driver.transaction(isolation="read_committed"):
            yield driver

    async def _settle(
        self,
        lease: Lease,
        chunk_ids: Sequence[int],
        write: Callable[[Any, Sequence[int]], Awaitable[set[int]]],
        *,
        tell_lost: bool = True,
    ) -> set[int]:
        """Let ``write`` lock the sources and write, let the status follow; returns what was written."""
        lost: list[int] = []
        sources = sources_of(lease, chunk_ids)
        async with self._transaction() as driver:
            held = await write(driver, sources)
            if held:
                await recompute_status(driver, sources)
            if tell_lost:
                lost = await lost_of(driver, lease, set(chunk_ids) - held)
        raise_if_lost(lost)
        return held

    async def _bury(
        self,
        driver: Any,
        lease: Lease,
        chunk_ids: Sequence[int],
        code: ErrorCode,
        cause: ErrorCode,
        model: str | None,
    ) -> set[int]:
        # Of what is to be embedded again nothing is lost because the new model refuses it.
        spared = await ids_of(driver, queue_statements.spare(), ids=list(chunk_ids), token=lease.token)
        said: Mapping[str, Any] = {"code": code, "message": ERROR_MESSAGES[cause]}
        buried = await run(
            driver,
            queue_statements.bury(),
            ids=list(chunk_ids),
            token=lease.token,
            model=model,
            most=self.max_attempts,
            **said,
        )
        if buried:
            sources = sorted({row["source_id"] for row in buried})
            await run(driver, queue_statements.blame(), ids=sources, **said)
            await recompute_status(driver, sources)
        return spared | {row["original_chunk_id"] for row in buried}
