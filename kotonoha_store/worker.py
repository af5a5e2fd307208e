"""From text to vector: :class:`EmbeddingWorker`."""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Final

from kotonoha_store.embedders import Embedder
from kotonoha_store.embedding_batch import BACKOFF, CALL_TIMEOUT, EmbeddingBatch, Provider
from kotonoha_store.embedding_queue import EmbeddingQueue
from kotonoha_store.errors import EmbedderConfigurationError, InvalidInputError, StoreError
from kotonoha_store.events import log_event
from kotonoha_store.records import EmbeddingReport, Lease
from kotonoha_store.service_loop import run_service
from kotonoha_store.wakeup import Listener

_SOON: Final = timedelta(milliseconds=500)
# How often, in seconds, the queue is counted at most.
_COUNT_INTERVAL: Final = 15.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pass:
    """Batches beside each other, until nothing can be claimed."""

    stop: asyncio.Event
    report: EmbeddingReport = field(default_factory=EmbeddingReport)
    running: int = 0
    woken: bool = False
    waker: "asyncio.Task[None] | None" = None
    errors: list[Exception] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return bool(self.errors) or self.stop.is_set()


class EmbeddingWorker:
    """Claims chunks, has them embedded, writes the vectors. Any number of workers may run at once.

    While the embedder works, no transaction and no connection is held, and the lease is renewed.

    * *Rate limited*: the provider is left alone for as long as it asks, by every worker; no attempt is counted.
    * *Failed* (time-out, 5xx, malformed answer): tried again after 1, 5 and 15 minutes, then buried. From the third
      failed call in a row on the provider counts as down: it is left alone, no attempt is counted, and it is asked
      for a single word before it gets chunks again.
    * *Refused text*: the batch is halved until the text is alone; it is buried, its neighbours are embedded.
    * *Not configured* (key, permission, model, dimension): the provider is left alone, no attempt is counted.

    A provider that refuses every text as it would a bad one fills the dead letters; when it is mended,
    ``queue.requeue(error_code=ErrorCode.INVALID_INPUT)`` brings them all back.
    """

    def __init__(
        self,
        queue: EmbeddingQueue,
        embedder: Embedder,
        *,
        batch_size: int = 100,
        concurrency: int = 5,
        request_tokens: int = 300_000,
        reuse: bool = True,
        backoff: Sequence[timedelta] = BACKOFF,
        provider: str | None = None,
        call_timeout: timedelta = CALL_TIMEOUT,
        interval: timedelta = timedelta(minutes=1),
        listen: bool = True,
        drain: timedelta = timedelta(seconds=30),
    ) -> None:
        """
        Args:
            batch_size: chunks claimed at once.
            concurrency: batches in flight at once, each with one request to the provider at a time.
            request_tokens: of one request; OpenAI, "Create embeddings": at most 300,000 over all inputs.
            reuse: give a text that has a vector of the same model already that one, instead of paying again.
            backoff: how long to wait after the first, second ... failed attempt.
            provider: whom a pause is for; the embedder's model by default.
            call_timeout: how long one call of the embedder may take, whatever its own limit.
            interval: how often :meth:`run` looks for jobs when nothing wakes it.
            listen: whether new jobs wake it, by LISTEN on a connection of its own; a transaction pooler has none.
            drain: how long running batches may go on when it is stopped.

        Raises:
            InvalidInputError: a number is below 1, a time is not positive, or there is no backoff.
        """
        least = {"batch_size": batch_size, "concurrency": concurrency, "request_tokens": request_tokens}
        for name, value in {**least, "backoff": len(backoff)}.items():
            if value < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {value}")
        if min(interval, call_timeout) <= timedelta(0) or drain < timedelta(0):
            given = f"got {interval}, {call_timeout} and {drain}"
            raise InvalidInputError(f"interval and call_timeout must be positive, drain not negative; {given}")
        self._queue = queue
        self._provider = Provider(queue, embedder, name=provider, call_timeout=call_timeout)
        self._batch_size = batch_size
        self._concurrency = concurrency
        self._request_tokens = request_tokens
        self._backoff = tuple(backoff)
        self._in_flight: dict[str, asyncio.Event] | None = {} if reuse else None
        self._interval = interval
        self._listen = listen
        self._drain = drain

    async def run_until_empty(self) -> EmbeddingReport:
        """Embed batch after batch until nothing can be claimed now.

        What failed or was put off waits for its time and is not waited for, nor is a provider that is paused
        (see :meth:`EmbeddingQueue.pauses`); one that is down or not configured is asked again first.

        Raises:
            EmbedderConfigurationError: key, permission, model or dimension is wrong; the chunks wait on.
            StoreUnavailableError: the database did not answer.
        """
        report, _ = await self._pass(asyncio.Event(), probe=True)
        return report

    async def run_once(self) -> EmbeddingReport:
        """Claim one batch and see it through.

        Raises: as :meth:`run_until_empty`.
        """
        if await self._provider.pause(probe=True) is not None:
            return EmbeddingReport()
        return await self._see_through(await self._claim())

    async def run(self, stop: asyncio.Event | None = None) -> None:
        """Embed what comes, until ``stop`` is set or the task is cancelled.

        Woken by new jobs, when one that was put off is due, and otherwise on the interval. A database that does
        not answer and a provider that fails or is not configured are waited for.

        Args:
            stop: set by :func:`~kotonoha_store.service_loop.stop_on_signals`, for example. Nothing more is claimed
                then; running batches have their time to end, then their leases are given back, as they are at once
                when the task is cancelled.
        """
        stop = asyncio.Event() if stop is None else stop
        # Somebody may have mended what this provider was paused for: the first pass asks.
        is_first = True
        counted = -math.inf

        async def work(_woken: bool) -> timedelta | None:
            nonlocal is_first, counted
            probe, is_first = is_first, False
            try:
                _, wait = await self._pass(stop, probe=probe, listener=listener)
            except EmbedderConfigurationError as error:
                log_event(
                    logger,
                    logging.ERROR,
                    "embedding_not_configured",
                    provider=self._provider.name,
                    error_code=str(error.code),
                    reason=str(error),
                )
                wait = None  # the pause is looked at when the interval is over
            # An empty queue is counted each time, so that its end is seen.
            if wait is None or monotonic() - counted >= _COUNT_INTERVAL:
                await self._queue.depth()  # for its metric
                counted = monotonic()
            return wait

        async with self._queue.listener(enabled=self._listen) as listener:
            await run_service(
                work,
                name="embedding_worker",
                listener=listener,
                interval=self._interval,
                stop=stop,
                drain=self._drain,
            )

    async def _pass(
        self, stop: asyncio.Event, *, probe: bool, listener: Listener | None = None
    ) -> tuple[EmbeddingReport, timedelta | None]:
        """Until nothing can be claimed. Returns also when there may be something again; None: there is no job.

        Args:
            listener: so that new jobs are claimed while other batches take their time.
        """
        total = EmbeddingReport()
        while True:
            pause = await self._provider.pause(probe=probe)
            if pause is not None:
                return total, pause
            probe = False
            current = _Pass(stop)
            async with asyncio.TaskGroup() as group:
                self._start(group, current)
                if listener is not None:
                    current.waker = group.create_task(self._wake(group, current, listener))
            if current.errors:
                raise current.errors[0]
            total += current.report
            if not current.report.claimed:
                due = await self._queue.next_due()
                # Not at once: what is due and was not claimed is locked by somebody.
                return total, None if due is None else max(due, _SOON)

    async def _wake(self, group: asyncio.TaskGroup, current: _Pass, listener: Listener) -> None:
        """As long as a batch is running, others are begun beside it when there are jobs; cancelled with the last."""
        while True:
            await listener.wait(self._interval.total_seconds())
            # One of those that are running may have looked just before the new jobs were there: it looks once more.
            current.woken = True
            if current.running < self._concurrency and not current.is_over:
                self._start(group, current)

    def _start(self, group: asyncio.TaskGroup, current: _Pass) -> None:
        current.running += 1
        group.create_task(self._slot(group, current))

    async def _slot(self, group: asyncio.TaskGroup, current: _Pass) -> None:
        """Batch after batch; an error stops the others from claiming, but not in what they have paid for."""
        try:
            while not current.is_over:
                current.woken = False
                lease = await self._claim()
                if not lease.chunks and not lease.buried:
                    if current.woken:
                        continue
                    return
                if lease.chunks and current.running < self._concurrency and not current.is_over:
                    self._start(group, current)
                # Not `+=`, which would read the sum before it waits.
                report = await self._see_through(lease)
                current.report += report
        except Exception as error:  # noqa: BLE001  raised again by whoever started the pass
            current.errors.append(error)
        finally:
            current.running -= 1
            if not current.running and current.waker is not None:
                current.waker.cancel()

    async def _claim(self) -> Lease:
        claiming = asyncio.ensure_future(self._queue.claim(self._batch_size, provider=self._provider.name))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The server may have leased them already; their attempts are counted, and nobody would give them back.
            await asyncio.shield(self._give_back(claiming))
            raise

    async def _give_back(self, claiming: "asyncio.Future[Lease]") -> None:
        try:
            lease = await claiming
            await self._queue.defer(lease, lease.chunk_ids, timedelta(0))
        except StoreError as error:
            log_event(logger, logging.WARNING, "embedding_lease_left", error=type(error).__name__)

    async def _see_through(self, lease: Lease) -> EmbeddingReport:
        claimed = EmbeddingReport(claimed=len(lease.chunks) + len(lease.buried), buried=len(lease.buried))
        if not lease.chunks:
            return claimed
        batch = EmbeddingBatch(
            self._queue,
            self._provider,
            lease,
            in_flight=self._in_flight,
            request_tokens=self._request_tokens,
            backoff=self._backoff,
        )
        return claimed + await batch.run()
