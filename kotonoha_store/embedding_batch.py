"""What becomes of one lease: :class:`EmbeddingBatch` has its texts embedded and sees each chunk to its end."""

import asyncio
import contextlib
import logging
import random
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kotonoha_store.columns import EMBEDDING_DIMENSION, check_vectors
from kotonoha_store.embedders import Embedder
from kotonoha_store.embedding_queue import OUTAGE_FAILURES, EmbeddingQueue
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
from kotonoha_store.events import log_event
from kotonoha_store.metrics import EMBEDDING_ERRORS, EMBEDDING_SECONDS, EMBEDDINGS
from kotonoha_store.records import ClaimedChunk, EmbeddingReport, Lease

BACKOFF: Final = (timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=15))
"""How long to wait after the first, second, third failed attempt; the last holds for all later ones."""

RATE_LIMIT_DELAY: Final = timedelta(minutes=1)
"""How long to wait when the provider asks to, but does not say how long."""

RATE_LIMIT_DELAY_MIN: Final = timedelta(seconds=1)
"""The shortest: a provider that limits and says 0 must not be asked again and again."""

RATE_LIMIT_DELAY_MAX: Final = timedelta(hours=1)
"""The longest wait a provider can ask for. One wrong header must not put chunks off for years; asking once an hour
costs one refused call."""

OUTAGE_DELAYS: Final = (timedelta(seconds=30), timedelta(minutes=15))
"""How long a provider that is down is left alone: the first time, doubled each time, and at most."""

CONFIGURATION_DELAY: Final = timedelta(minutes=5)
"""How long until a provider that refuses the key or the model is asked again."""

CALL_TIMEOUT: Final = timedelta(minutes=15)
"""How long a call of the embedder may take. The heartbeat would keep the lease of one that hangs for ever."""

PROBE: Final = "ping"
"""What a provider that was down is asked to embed before it is trusted with chunks."""

logger = logging.getLogger("kotonoha_store.worker")


@dataclass(frozen=True, slots=True)
class _Text:
    """A text, and the chunks that hold it."""

    content: str
    chunks: tuple[ClaimedChunk, ...]

    @property
    def attempt(self) -> int:
        return max(chunk.attempt for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        # Uncounted, as many as it has bytes: never more, whatever the tokenizer.
        counted = self.chunks[0].token_count
        return len(self.content.encode()) if counted is None else counted


class Provider:
    """An embedder as the queue knows it: paused when it asks for it, fails or is not configured.

    Shared by the batches of a worker.
    """

    def __init__(
        self,
        queue: EmbeddingQueue,
        embedder: Embedder,
        *,
        name: str | None = None,
        call_timeout: timedelta = CALL_TIMEOUT,
    ) -> None:
        self._queue = queue
        self._call_timeout = call_timeout
        self.embedder = embedder
        # Rate limits and outages are mostly a model's.
        self.name: Final = name or embedder.model

    async def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return shape (len(texts), 1536).

        Raises:
            EmbeddingError: the embedder's, or that its answer cannot be stored.
        """
        limit = asyncio.timeout(self._call_timeout.total_seconds())
        try:
            async with limit:
                vectors: Any = await self.embedder.embed_documents(texts)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TransientEmbeddingError(
                f"the embedder did not return within {self._call_timeout}", code=ErrorCode.EMBEDDING_API_TIMEOUT
            ) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not we were cancelled, but something in there: a failure like any other.
            raise TransientEmbeddingError("the embedder cancelled its own work", code=ErrorCode.UNKNOWN_ERROR) from None
        array = np.asarray(vectors, dtype=np.float32)
        if len(array) != len(texts):
            raise TransientEmbeddingError(f"{len(texts)} texts, but {len(array)} vectors")
        if array.shape[1:] != (EMBEDDING_DIMENSION,):
            # Every text would meet with the same: none of them is at fault.
            raise EmbedderConfigurationError(
                f"the embedder {self.embedder.model!r} gives vectors of shape {array.shape[1:]}, "
                f"the column holds ({EMBEDDING_DIMENSION},): choose another model, or pad its vectors",
                code=ErrorCode.UNKNOWN_ERROR,
            )
        try:
            return check_vectors(array)
        except InvalidVectorError as error:
            raise UnembeddableTextError(str(error), code=ErrorCode.UNKNOWN_ERROR) from error

    async def rate_limited(self, error: RateLimitedError) -> None:
        await self._pause(_wait(error.retry_after), error.code)

    async def misconfigured(self, error: EmbedderConfigurationError) -> None:
        await self._pause(CONFIGURATION_DELAY, error.code, until_probed=True)

    async def failed(self, code: ErrorCode) -> bool:
        """Count a failed call; returns whether the provider is down, which is no text's fault.

        It is when it fails on a harmless word too, asked from the third failure in a row on: a text that makes it fail
        each time must not pass for an outage, or it would be tried for ever.

        Raises:
            EmbedderConfigurationError: it refuses the key, the model or any text.
        """
        failures = await self._queue.record_failure(self.name, code)
        return failures >= OUTAGE_FAILURES and not await self._probe()

    async def answered(self) -> None:
        await self._queue.record_success(self.name)

    async def pause(self, *, probe: bool) -> timedelta | None:
        """How long nothing may be claimed; None: now.

        A provider that was down is asked for one word when its pause is over.

        Args:
            probe: ask it even before.

        Raises:
            EmbedderConfigurationError: it refuses the key, the model or any text.
        """
        pause = await self._queue.pause_of(self.name)
        if pause is None:
            return None
        is_down = pause.failures >= OUTAGE_FAILURES
        if pause.remaining and not (is_down and probe):
            seconds = round(pause.remaining.total_seconds(), 3)
            code = str(pause.error_code)
            log_event(
                logger,
                logging.WARNING,
                "embedding_provider_waited_for",
                provider=self.name,
                error_code=code,
                seconds=seconds,
            )
            return pause.remaining
        if not is_down or await self._probe():
            return None
        now = await self._queue.pause_of(self.name)
        return None if now is None else now.remaining

    async def _probe(self) -> bool:
        """Ask for a single word; returns whether the provider is up, else it is paused."""
        try:
            await self.vectors([PROBE])
        except RateLimitedError as error:
            # It answers; what it failed on before was not its fault.
            await self.answered()
            await self.rate_limited(error)
            return False
        except UnembeddableTextError as error:
            refused = EmbedderConfigurationError("the embedder refuses even a harmless text", code=error.code)
            await self.misconfigured(refused)
            raise refused from error
        except EmbedderConfigurationError as error:
            await self.misconfigured(error)
            raise
        except Exception as error:  # noqa: BLE001  whatever an embedder raises
            code = _code(error)
            failures = await self._queue.record_failure(self.name, code)
            first, most = OUTAGE_DELAYS
            # The exponent bounded, so that a long outage does not overflow.
            delay = min(most, first * 2 ** min(max(failures - OUTAGE_FAILURES - 1, 0), 30))
            await self._pause(delay * random.uniform(0.8, 1.2), code, until_probed=True)  # noqa: S311  no secret
            return False
        log_event(logger, logging.INFO, "embedding_provider_answers", provider=self.name)
        await self.answered()
        return True

    async def _pause(self, delay: timedelta, code: ErrorCode, *, until_probed: bool = False) -> None:
        log_event(
            logger,
            logging.WARNING,
            "embedding_provider_paused",
            provider=self.name,
            error_code=str(code),
            seconds=round(delay.total_seconds(), 3),
        )
        await self._queue.pause(self.name, delay, code, until_probed=until_probed)


class EmbeddingBatch:
    """One lease. :meth:`run` returns when each chunk is embedded, buried, put off or lost."""

    def __init__(
        self,
        queue: EmbeddingQueue,
        provider: Provider,
        lease: Lease,
        *,
        in_flight: dict[str, asyncio.Event] | None = None,
        request_tokens: int = 300_000,
        backoff: Sequence[timedelta] = BACKOFF,
    ) -> None:
        """
        Args:
            in_flight: the texts that other batches are having embedded; None pays for each text anew.
        """
        self._queue = queue
        self._provider = provider
        self._model = provider.embedder.model
        self._lease = lease
        self._in_flight = in_flight
        self._request_tokens = request_tokens
        self._backoff = tuple(backoff)
        self._open = set(lease.chunk_ids)
        # A heartbeat in the middle of a write would have it pass over the jobs that it is renewing.
        self._writing = asyncio.Lock()
        self._has_failed = lease.provider_has_failed
        # Why the provider is left alone since a request of this batch.
        self._paused: ErrorCode | None = None

    async def run(self) -> EmbeddingReport:
        """See the lease through, renewing it meanwhile.

        Raises:
            EmbedderConfigurationError: key, permission, model or dimension is wrong. What is left was given back.
            StoreUnavailableError: the database did not answer. What is left was given back, or its lease ends.
        """
        started = perf_counter()
        report = EmbeddingReport()
        try:
            async with self._heartbeat():
                report = await self._run()
        except BaseException as stopped:
            # Shielded, since a second cancellation would leave the lease.
            await asyncio.shield(self._stop(stopped))
            raise
        finally:
            log_event(
                logger,
                logging.INFO,
                "embedding_batch",
                lease=str(self._lease.token),
                model=self._model,
                chunks=len(self._lease.chunks),
                sources=len({chunk.source_id for chunk in self._lease.chunks}),
                embedded=report.embedded,
                reused=report.reused,
                deferred=report.deferred,
                failed=report.failed,
                buried=report.buried,
                lost=report.lost,
                given_back=len(self._open),
                seconds=round(perf_counter() - started, 3),
            )
        return report

    @asynccontextmanager
    async def _heartbeat(self) -> AsyncIterator[None]:
        beating = asyncio.create_task(self._beat(), name="kotonoha heartbeat")
        try:
            yield
        finally:
            beating.cancel()
            # Not `await beating`, which would take our own cancellation for its.
            await asyncio.wait([beating])
        if not beating.cancelled():
            beating.result()

    async def _beat(self) -> None:
        while True:
            # A third: two beats may fail before the lease ends.
            await asyncio.sleep(self._queue.lease.total_seconds() / 3)
            try:
                async with self._writing:
                    await self._queue.heartbeat(self._lease, sorted(self._open))
            except LeaseLostError as error:
                # The result, paid for already, is refused when it comes: another worker's counts.
                log_event(logger, logging.WARNING, "embedding_lease_lost", chunks=len(error.chunk_ids))
            except StoreUnavailableError as error:
                log_event(logger, logging.WARNING, "embedding_heartbeat_failed", error=type(error).__name__)

    async def _stop(self, stopped: BaseException) -> None:
        """Give back at once what is left, with the attempt."""
        code: ErrorCode | None = None
        if isinstance(stopped, EmbedderConfigurationError):
            code = stopped.code
            # First of all, so that nobody claims what is given back.
            with contextlib.suppress(StoreUnavailableError):
                await self._provider.misconfigured(stopped)
        if not self._open:
            return
        try:
            await self._queue.defer(self._lease, sorted(self._open), timedelta(0), code)
        except LeaseLostError:
            pass  # finished by another worker, or about to be
        except StoreUnavailableError as error:
            # What stopped the worker is what the caller must hear of; the lease ends by itself.
            log_event(
                logger, logging.WARNING, "embedding_lease_left", chunks=len(self._open), error=type(error).__name__
            )

    async def _run(self) -> EmbeddingReport:
        if self._in_flight is None:
            return await self._embed_packed([_Text(chunk.content, (chunk,)) for chunk in self._lease.chunks])
        in_flight = self._in_flight
        mine: list[_Text] = []
        others: list[_Text] = []
        for text in _grouped(self._lease.chunks):
            (others if text.content in in_flight else mine).append(text)
        # Before the look at what has a vector: what another batch finishes between the two would be paid for again.
        with _announced(in_flight, mine) as done_with:
            report = await self._reuse(_chunk_ids(mine))
            left = _grouped(self._still_open(mine))
            done_with({text.content for text in mine} - {text.content for text in left})
            report += await self._embed_packed(left)
        if others:
            # Another batch of this worker is paying for them.
            await asyncio.gather(*(in_flight[text.content].wait() for text in others if text.content in in_flight))
            report += await self._reuse(_chunk_ids(others))
            # What that one could not embed.
            report += await self._embed_packed(_grouped(self._still_open(others)))
        return report

    def _still_open(self, texts: Iterable[_Text]) -> list[ClaimedChunk]:
        return [chunk for text in texts for chunk in text.chunks if chunk.chunk_id in self._open]

    async def _reuse(self, chunk_ids: Sequence[int]) -> EmbeddingReport:
        async with self._writing:
            known = await self._queue.reuse(self._lease, chunk_ids, self._model)
        self._open -= known
        EMBEDDINGS.inc(len(known))
        return EmbeddingReport(embedded=len(known), reused=len(known))

    async def _embed_packed(self, texts: Sequence[_Text]) -> EmbeddingReport:
        report = EmbeddingReport()
        for request in _packed(texts, self._request_tokens):
            report += await self._embed(request)
        return report

    async def _embed(self, texts: Sequence[_Text]) -> EmbeddingReport:
        """One request, and what follows from its answer."""
        if self._paused is not None:
            return await self._defer(texts, self._paused)
        failure: Exception | None = None
        started = perf_counter()
        try:
            vectors = await self._provider.vectors([text.content for text in texts])
        except Exception as error:  # noqa: BLE001  whatever an embedder raises
            failure = error
        EMBEDDING_SECONDS.observe(perf_counter() - started)
        if failure is not None:
            code = _code(failure)
            EMBEDDING_ERRORS.labels(error_type=str(code)).inc()
            return await self._after(failure, code, texts)
        if self._has_failed:
            await self._provider.answered()
            self._has_failed = False
        return await self._complete(texts, vectors)

    async def _after(self, error: Exception, code: ErrorCode, texts: Sequence[_Text]) -> EmbeddingReport:
        """A request failed: whose fault it was decides."""
        if isinstance(error, EmbedderConfigurationError):
            raise error
        if isinstance(error, UnembeddableTextError):
            if len(texts) > 1:
                # At least one of them is at fault.
                return await self._halves(texts)
            refused = texts[0].chunks[0]
            ids = {"chunk_id": refused.chunk_id, "source_id": refused.source_id}
            log_event(logger, logging.WARNING, "embedding_text_refused", error_code=str(code), **ids)
            # Refused, it will be again; a vector that cannot be stored may have been a bad answer.
            return await (self._bury if code == ErrorCode.INVALID_INPUT else self._fail)(texts, code)
        if isinstance(error, RateLimitedError):
            self._paused = code
            await self._provider.rate_limited(error)
            return await self._defer(texts, code)
        if not isinstance(error, EmbeddingError):
            # A fault of the embedder itself. Where it failed and not what it says: its message may quote the texts.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("the embedder failed on %d texts: %s at\n%s", len(texts), type(error).__name__, where)
        log_event(
            logger,
            logging.WARNING,
            "embedding_failed",
            provider=self._provider.name,
            error_code=str(code),
            texts=len(texts),
            attempt=max(text.attempt for text in texts),
        )
        self._has_failed = True
        if await self._provider.failed(code):
            self._paused = code
            return await self._defer(texts, code)
        if len(texts) == 1:
            return await self._fail(texts, code)
        # Nobody dies for a neighbour: those with their last attempt are tried without the others, then in halves.
        last = [text for text in texts if text.attempt >= self._queue.max_attempts]
        report = await self._fail([text for text in texts if text.attempt < self._queue.max_attempts], code)
        if last:
            report += await (self._halves(last) if len(last) == len(texts) else self._embed(last))
        return report

    async def _halves(self, texts: Sequence[_Text]) -> EmbeddingReport:
        middle = len(texts) // 2
        return await self._embed(texts[:middle]) + await self._embed(texts[middle:])

    async def _complete(self, texts: Sequence[_Text], vectors: NDArray[np.float32]) -> EmbeddingReport:
        if any(len(text.chunks) > 1 for text in texts):
            vectors = np.repeat(vectors, [len(text.chunks) for text in texts], axis=0)
        chunks = [chunk for text in texts for chunk in text.chunks]
        ids = [chunk.chunk_id for chunk in chunks]
        try:
            lost = await self._write(ids, self._queue.complete(self._lease, ids, vectors, self._model))
        except StoreUnavailableError as error:
            log_event(logger, logging.WARNING, "embedding_write_failed", chunks=len(ids), error=type(error).__name__)
            return await self._complete_by_source(chunks, vectors)
        EMBEDDINGS.inc(len(ids) - lost)
        return EmbeddingReport(embedded=len(ids) - lost, reused=len(ids) - len(texts), lost=lost)

    async def _complete_by_source(
        self, chunks: Sequence[ClaimedChunk], vectors: NDArray[np.float32]
    ) -> EmbeddingReport:
        """Write what was paid for once more, so that a source somebody has locked holds up itself alone.

        Raises:
            StoreUnavailableError: some source could not be written.
        """
        report = EmbeddingReport()
        failure: StoreUnavailableError | None = None
        for source_id in sorted({chunk.source_id for chunk in chunks}):
            rows = [row for row, chunk in enumerate(chunks) if chunk.source_id == source_id]
            ids = [chunks[row].chunk_id for row in rows]
            try:
                lost = await self._write(ids, self._queue.complete(self._lease, ids, vectors[rows], self._model))
            except StoreUnavailableError as error:
                failure = error
                continue
            EMBEDDINGS.inc(len(ids) - lost)
            report += EmbeddingReport(embedded=len(ids) - lost, lost=lost)
        if failure is not None:
            # What could not be written is given back with its attempt.
            raise failure
        return report

    async def _bury(self, texts: Sequence[_Text], code: ErrorCode) -> EmbeddingReport:
        ids = _chunk_ids(texts)
        lost = await self._write(ids, self._queue.bury(self._lease, ids, code, model=self._model))
        return EmbeddingReport(buried=len(ids) - lost, lost=lost)

    async def _defer(self, texts: Sequence[_Text], code: ErrorCode) -> EmbeddingReport:
        """Back at once: it is the provider that waits, and another one may take them."""
        ids = _chunk_ids(texts)
        lost = await self._write(ids, self._queue.defer(self._lease, ids, timedelta(0), code))
        return EmbeddingReport(deferred=len(ids) - lost, lost=lost)

    async def _fail(self, texts: Sequence[_Text], code: ErrorCode) -> EmbeddingReport:
        report = EmbeddingReport()
        chunks = [chunk for text in texts for chunk in text.chunks]
        for attempt in sorted({chunk.attempt for chunk in chunks}):
            ids = [chunk.chunk_id for chunk in chunks if chunk.attempt == attempt]
            delay = self._delay(attempt)
            lost = await self._write(ids, self._queue.fail(self._lease, ids, code, retry_in=delay, model=self._model))
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

    async def _write(self, ids: Sequence[int], write: Coroutine[Any, Any, object]) -> int:
        """Write to the queue; return for how many chunks it came too late."""
        lost: Sequence[int] = ()
        try:
            async with self._writing:
                await write
        except LeaseLostError as error:
            log_event(logger, logging.WARNING, "embedding_lease_lost", chunks=len(error.chunk_ids))
            lost = error.chunk_ids
        finally:
            write.close()  # where it was cancelled before it began
        self._open.difference_update(ids)
        return len(lost)


@contextlib.contextmanager
def _announced(
    in_flight: dict[str, asyncio.Event], texts: Sequence[_Text]
) -> Iterator[Callable[[Iterable[str]], None]]:
    """Let other batches know that these are being paid for; what is yielded tells them which are no longer."""
    mine = {text.content for text in texts}
    in_flight.update((content, asyncio.Event()) for content in mine)

    def done_with(contents: Iterable[str]) -> None:
        for content in contents:
            mine.discard(content)
            in_flight.pop(content).set()

    try:
        yield done_with
    finally:
        done_with(tuple(mine))


def _chunk_ids(texts: Iterable[_Text]) -> list[int]:
    return [chunk.chunk_id for text in texts for chunk in text.chunks]


def _grouped(chunks: Sequence[ClaimedChunk]) -> list[_Text]:
    """Equal texts are embedded once."""
    by_content: dict[str, list[ClaimedChunk]] = {}
    for chunk in chunks:
        by_content.setdefault(chunk.content, []).append(chunk)
    return [_Text(content, tuple(same)) for content, same in by_content.items()]


def _packed(texts: Sequence[_Text], tokens: int) -> list[list[_Text]]:
    """Requests of no more tokens than that, in order; a text that is longer goes alone."""
    requests: list[list[_Text]] = []
    room = 0
    for text in texts:
        if text.tokens > room or not requests:
            requests.append([])
            room = tokens
        requests[-1].append(text)
        room -= text.tokens
    return requests


def _code(error: Exception) -> ErrorCode:
    return error.code if isinstance(error, EmbeddingError) else ErrorCode.UNKNOWN_ERROR


def _wait(retry_after: float | None) -> timedelta:
    if retry_after is None:
        return RATE_LIMIT_DELAY
    # In this order NaN becomes the longest wait.
    return max(
        RATE_LIMIT_DELAY_MIN, timedelta(seconds=max(0.0, min(RATE_LIMIT_DELAY_MAX.total_seconds(), retry_after)))
    )
