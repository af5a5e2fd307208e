"""What the processes run that the crash tests kill: one embedding worker or one archiver each.

They are forked from a server of :mod:`multiprocessing` that has imported everything already, so that one is at
work a few hundredths of a second after the last was killed.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kotonoha_store import (
    Database,
    EmbeddingQueue,
    EmbeddingWorker,
    OpenAIEmbedder,
    SessionArchiver,
    Settings,
    embedding_batch,
    service_loop,
)
from kotonoha_store.service_loop import stop_on_signals

KILLER = "kills whoever embeds it"
LAST_WORDS = "kills whoever has embedded it"

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["kotonoha_store", "openai"])


@dataclass(frozen=True)
class Options:
    """How a worker works."""

    batch_size: int = 4
    concurrency: int = 2
    lease: float = 1.5
    max_attempts: int = 3
    timeout: float = 1.0
    drain: float = 5.0


def start_worker(url: str, base_url: str, options: Options | None = None) -> BaseProcess:
    return _start(_embed, url, base_url, options or Options())


def start_archiver(url: str) -> BaseProcess:
    return _start(_archive, url)


def _start(target: Any, *arguments: Any) -> BaseProcess:
    process = _processes.Process(target=_run, args=(target, *arguments), daemon=True)
    process.start()
    return process


def settings_of(url: str) -> Settings:
    return Settings(
        _env_file=None,
        database_url=url,
        db_pool_min_size=1,
        db_pool_max_size=6,
        db_command_timeout=10.0,
        db_connect_attempts=1,
    )


def archiver_of(database: Database) -> SessionArchiver:
    return SessionArchiver(
        database,
        idle_for=timedelta(seconds=0.3),
        batch_size=3,
        overlap_messages=3,
        max_messages=12,
        min_session_length=0,
        concurrency=2,
        interval=timedelta(seconds=0.3),
    )


def worker_of(database: Database, embedder: OpenAIEmbedder, options: Options) -> EmbeddingWorker:
    queue = EmbeddingQueue(
        database, lease=timedelta(seconds=options.lease), max_attempts=options.max_attempts, update_batch_size=3
    )
    return EmbeddingWorker(
        queue,
        embedder,
        batch_size=options.batch_size,
        concurrency=options.concurrency,
        backoff=(timedelta(seconds=0.05), timedelta(seconds=0.2)),
        interval=timedelta(seconds=0.5),
        drain=timedelta(seconds=options.drain),
    )


class Mortal(OpenAIEmbedder):
    """Dies of some texts: of the one before the request, of the other between the answer and the write."""

    async def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        _die_of(KILLER, texts)
        vectors = await super().embed_documents(texts)
        _die_of(LAST_WORDS, texts)
        return vectors


def hurry() -> None:
    """Waits of minutes become parts of a second."""
    service_loop.run_service.__kwdefaults__["start_jitter"] = timedelta(0)
    short: Any = embedding_batch
    short.RATE_LIMIT_DELAY_MIN = timedelta(seconds=0.1)
    short.OUTAGE_DELAYS = (timedelta(seconds=0.1), timedelta(seconds=0.5))
    short.CONFIGURATION_DELAY = timedelta(seconds=0.2)
    # On a busy machine giving leases back may take longer than a service has; nobody here waits for it in vain.
    patient: Any = service_loop
    patient._CLEAN_UP = 30.0


def _die_of(words: str, texts: Sequence[str]) -> None:
    if any(words in text for text in texts):
        os.kill(os.getpid(), signal.SIGKILL)


def _run(target: Any, *arguments: Any) -> None:
    logging.basicConfig(level=os.environ.get("CRASH_LOG_LEVEL", "ERROR"), format="%(process)d %(message)s")
    hurry()
    asyncio.run(target(*arguments))


async def _embed(url: str, base_url: str, options: Options) -> None:
    async with await Database.open(settings_of(url)) as database:
        embedder = Mortal(base_url=base_url, timeout=options.timeout)
        with stop_on_signals() as stop:
            await worker_of(database, embedder, options).run(stop)
        await embedder.aclose()


async def _archive(url: str) -> None:
    async with await Database.open(settings_of(url)) as database:
        with stop_on_signals() as stop:
            await archiver_of(database).run(stop)
