"""From text to vector: :class:`EmbeddingWorker`."""

import asyncio
import logging
import random
import traceback
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kotonoha_store.columns import EMBEDDING_DIMENSION, check_vectors
from kotonoha_store.embedders import Embedder
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.errors import (
    EmbedderConfigurationError,
    EmbeddingError,
    ErrorCode,
    InvalidVectorError,
    LeaseLostError,
    RateLimitedError,
    StoreUnavailableError,
    TransientEmbeddingError,
    UnembeddableTextError,
)
from kotonoha_store.records import ClaimedChunk, Lease

BACKOFF: Final = (timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=15))
"""How long to wait after the first, second, third failed attempt; the last holds for all later ones."""

RATE_LIMIT_DELAY: Final = timedelta(minutes=1)
"""How long to wait when the provider asks to, but does not say how long."""

RATE_LIMIT_DELAY_MAX: Final = timedelta(hours=1)
"""The longest wait a provider can ask for. One wrong header must not put chunks off for years; asking once an hour
costs one refused call."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingReport:
    """What became of the chunks that were claimed.

    Attributes:
        deferred: put off without a fault of theirs, to be tried again later.
        failed: put off after a failed attempt.
        buried: now dead letters.
        lost: given to another worker meanwhile; its result counts.
    """

    claimed: int = 0
    embedded: int = 0
    deferred: int = 0
    failed: int = 0
    buried: int = 0
    lost: int = 0

    def __add__(self, other: "EmbeddingReport") -> "EmbeddingReport":
        return EmbeddingReport(
            claimed=self.claimed + other.claimed,
            embedded=self.embedded + other.embedded,
            deferred=self.deferred + other.deferred,
            failed=self.failed + other.failed,
            buried=self.buried + other.buried,
            lost=self.lost + other.lost,
        )


class EmbeddingWorker:
    """Claims chunks, has them embedded, writes the vectors. Any number of workers may run at once.

    While the embedder works, no transaction and no connection is held.

    A batch that is refused for its texts is halved until those at fault are alone: they become dead
    letters at once, whatever their number. A provider that refuses every text as it would a bad one
    thus fills the dead letters; when it is mended, ``queue.requeue(error_code=ErrorCode.INVALID_INPUT)``
    brings them all back.
    """

    def __init__(
        self,
        queue: EmbeddingQueue,
        embedder: Embedder,
        *,
        batch_size: int = 100,
        backoff: Sequence[timedelta] = BACKOFF,
    ) -> None:
        self._queue = queue
        self._embedder = embedder
        self._batch_size = batch_size
        self._backoff = tuple(backoff)

    async def run_until_empty(self) -> EmbeddingReport:
        """Embed batch after batch until nothing can be claimed now.

        What failed or was put off waits for its time and is not waited for.

        Raises:
            EmbedderConfigurationError: key, permission, model or dimension is wrong; the chunks wait on.
            StoreUnavailableError: the database did not answer.
        """
        total = EmbeddingReport()
        while (report := await self.run_once()).claimed:
            total += report
            if report.deferred:
                break  # the provider asked for a pause
        return total

    async def run_once(self) -> EmbeddingReport:
        """Claim one batch and see it through.

        Raises: as :meth:`run_until_empty`.
        """
        lease = await self._queue.claim(self._batch_size)
        claimed = EmbeddingReport(claimed=len(lease.chunks) + len(lease.buried), buried=len(lease.buried))
        if not lease.chunks:
            return claimed
        try:
            report = await self._embed(lease, lease.chunks)
        except (asyncio.CancelledError, EmbedderConfigurationError, StoreUnavailableError) as stopped:
            code = stopped.code if isinstance(stopped, EmbedderConfigurationError) else None
            # Back at once, with the attempt; shielded, since a second cancellation would leave them leased.
            await asyncio.shield(self._give_back(lease, code))
            raise
        return claimed + report

    async def _give_back(self, lease: Lease, code: ErrorCode | None) -> None:
        try:
            await self._queue.defer(lease, lease.chunk_ids, timedelta(0), code)
        except LeaseLostError:
            logger.info("part of the lease had been finished or lost already")
        except StoreUnavailableError as error:
            # What stopped the worker is what the caller must hear of; the lease ends by itself.
            logger.warning("%d chunks stay leased until their lease ends: %s", len(lease.chunks), error)

    async def _embed(self, lease: Lease, chunks: Sequence[ClaimedChunk]) -> EmbeddingReport:
        ids = [chunk.chunk_id for chunk in chunks]
        try:
            vectors = await self._vectors(chunks)
        except UnembeddableTextError as error:
            if len(chunks) > 1:
                # At least one of them is at fault: halve, so that it costs itself and no neighbour.
                middle = len(chunks) // 2
                return await self._embed(lease, chunks[:middle]) + await self._embed(lease, chunks[middle:])
            logger.warning("chunk %s is refused by the embedder: %s", ids[0], error.code)
            return await self._bury(lease, ids, error.code)
        except RateLimitedError as error:
            delay = _wait(error.retry_after)
            logger.warning("rate limited: %d chunks wait %s", len(ids), delay)
            return await self._defer(lease, ids, delay, error.code)
        except EmbedderConfigurationError:
            raise
        except EmbeddingError as error:
            logger.warning("%d chunks could not be embedded: %s", len(ids), error.code)
            return await self._fail(lease, chunks, error.code)
        except Exception as error:  # noqa: BLE001  whatever an embedder raises
            # A fault of the embedder itself. The attempt counts, so that it cannot be repeated for ever.
            # Where it failed and not what it says: its message may quote the texts.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("the embedder failed on %d chunks: %s at\n%s", len(ids), type(error).__name__, where)
            return await self._fail(lease, chunks, ErrorCode.UNKNOWN_ERROR)
        return await self._complete(lease, ids, vectors)

    async def _vectors(self, chunks: Sequence[ClaimedChunk]) -> NDArray[np.float32]:
        vectors: Any = await self._embedder.embed_documents([chunk.content for chunk in chunks])
        array = np.asarray(vectors, dtype=np.float32)
        if len(array) != len(chunks):
            raise TransientEmbeddingError(f"{len(chunks)} texts, but {len(array)} vectors")
        if array.shape[1:] != (EMBEDDING_DIMENSION,):
            # Every text would meet with the same: none of them is at fault.
            raise EmbedderConfigurationError(
                f"the embedder {self._embedder.model!r} gives vectors of shape {array.shape[1:]}, "
                f"the column holds ({EMBEDDING_DIMENSION},): choose another model, or pad its vectors",
                code=ErrorCode.UNKNOWN_ERROR,
            )
        try:
            return check_vectors(array)
        except InvalidVectorError as error:
            raise UnembeddableTextError(str(error)) from error

    async def _complete(self, lease: Lease, ids: list[int], vectors: NDArray[np.float32]) -> EmbeddingReport:
        try:
            lost = await _lost(self._queue.complete(lease, ids, vectors, self._embedder.model))
        except StoreUnavailableError as error:
            logger.warning("writing %d vectors failed, trying source by source: %s", len(ids), error)
            return await self._complete_by_source(lease, ids, vectors)
        return EmbeddingReport(embedded=len(ids) - lost, lost=lost)

    async def _complete_by_source(self, lease: Lease, ids: list[int], vectors: NDArray[np.float32]) -> EmbeddingReport:
        """Write what was paid for once more, so that a source somebody has locked holds up itself alone.

        Raises:
            StoreUnavailableError: no source could be written.
        """
        report = EmbeddingReport()
        failure: StoreUnavailableError | None = None
        row_of = {chunk_id: row for row, chunk_id in enumerate(ids)}
        chunks = [chunk for chunk in lease.chunks if chunk.chunk_id in row_of]
        for source_id in sorted({chunk.source_id for chunk in chunks}):
            group = [chunk.chunk_id for chunk in chunks if chunk.source_id == source_id]
            rows = vectors[[row_of[chunk_id] for chunk_id in group]]
            try:
                lost = await _lost(self._queue.complete(lease, group, rows, self._embedder.model))
            except StoreUnavailableError as error:
                failure = error
                continue
            report += EmbeddingReport(embedded=len(group) - lost, lost=lost)
        if failure is not None:
            # What could not be written is given back with its attempt: see run_once().
            raise failure
        return report

    async def _bury(self, lease: Lease, ids: list[int], code: ErrorCode) -> EmbeddingReport:
        lost = await _lost(self._queue.bury(lease, ids, code, model=self._embedder.model))
        return EmbeddingReport(buried=len(ids) - lost, lost=lost)

    async def _defer(self, lease: Lease, ids: list[int], delay: timedelta, code: ErrorCode) -> EmbeddingReport:
        lost = await _lost(self._queue.defer(lease, ids, delay, code))
        return EmbeddingReport(deferred=len(ids) - lost, lost=lost)

    async def _fail(self, lease: Lease, chunks: Sequence[ClaimedChunk], code: ErrorCode) -> EmbeddingReport:
        report = EmbeddingReport()
        for attempt in sorted({chunk.attempt for chunk in chunks}):
            ids = [chunk.chunk_id for chunk in chunks if chunk.attempt == attempt]
            lost = await _lost(
                self._queue.fail(lease, ids, code, retry_in=self._delay(attempt), model=self._embedder.model)
            )
            recorded = len(ids) - lost
            if attempt < self._queue.max_attempts:
                report += EmbeddingReport(failed=recorded, lost=lost)
            else:
                report += EmbeddingReport(buried=recorded, lost=lost)
        return report

    def _delay(self, attempt: int) -> timedelta:
        # Jitter, so that what failed together does not come back together.
        base = self._backoff[min(attempt, len(self._backoff)) - 1]
        return base * random.uniform(0.8, 1.2)  # noqa: S311  no secret


def _wait(retry_after: float | None) -> timedelta:
    if retry_after is None:
        return RATE_LIMIT_DELAY
    # In this order NaN becomes the longest wait.
    return timedelta(seconds=max(0.0, min(RATE_LIMIT_DELAY_MAX.total_seconds(), retry_after)))


async def _lost(write: Awaitable[object]) -> int:
    """Write to the queue; return for how many chunks it came too late."""
    try:
        await write
    except LeaseLostError as error:
        logger.warning("%s", error)
        return len(error.chunk_ids)
    return 0
