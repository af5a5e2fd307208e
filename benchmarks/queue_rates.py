"""How fast the queue drains: beside pgqueuer, procrastinate, and hand-written asyncpg. Run by queue.py.

Every run starts from a copy of the same database: chunks without vectors, ten to a source, queued and with the terms
that searches by word need, through the library's own API; every index of the head schema is there. The rivals' jobs
are enqueued through theirs, into databases of their own on the same server. Workers are tasks of one process; all run
in uvloop, as pgqueuer's command does. Autovacuum is on.

* drain: nothing is computed for a job. Rivals run a function that does nothing; we claim and end the job
  (``queue.finish``, as for a vector that is there already: sources locked, fenced, their status recomputed). Once more
  with real vectors of 1,536 dimensions (``queue.complete``), which no rival writes; their HNSW index is dropped.
* write: claim and fenced write of real vectors, one worker, without the HNSW index, batch by batch in turn with
  hand-written asyncpg on a held connection. ``write_ratio_raw``: two statements of its own, a claim under a lease that
  reads the texts, then in one transaction the fenced DELETE of the jobs and the UPDATE of the chunks by executemany;
  it looks for no pause, keeps no expired job apart, and does nothing about the sources' status.
  ``write_ratio_same``: our own statements, all of them, in the same transactions.
* claim: how long a claim takes at the end of a drain by that at its beginning, without and with a snapshot held open
  all the while, as pg_dump does.
* buys: how often a chunk is handed out while several workers drain.

First with ``synchronous_commit = on``, as installed, then ``off`` (``relaxed``): the time of an fsync flips between
machines and minutes, and is paid by whoever commits more often.
"""

import argparse
import asyncio
import importlib
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from common import (
    Contestant,
    clustered_vectors,
    connect,
    console,
    contest,
    embedded_server,
    median_rate,
    notes,
    package_versions,
    print_json,
    progress_bar,
    rate_ratio,
    run_sql,
    server_versions,
    store_settings,
)
from queue_rivals import RIVALS, Rival
from rich.table import Table
from sqlalchemy import URL
from vectors import CHUNKS_A_SOURCE, MODEL, Vectors
from waiting import by_hand, by_same_statements, by_us, vectors_for

from kotonoha_store import Lease, NewChunk, Scope, SourceType, Store
from kotonoha_store.database import register_codecs

SOURCES_A_COMMIT: Final = 100
VECTORS: Final = 10_000
SETTLING: Final = 10
"""Claims of each worker before those that count: statements are prepared and plans chosen meanwhile."""
CLAIMS: Final = 10
"""Whose median is taken at either end."""
CALL: Final = 0.002
"""Seconds that whoever buys a vector waits for it."""
SERVER_OPTIONS: Final = {"max_wal_size": "8GB", "checkpoint_timeout": "1h"}

Seconds = dict[str, list[float]]
Figures = dict[str, Any]


# What is measured


class Runner(Protocol):
    """One of those that drain the queue, on a database made for that run."""

    async def open(self, url: URL) -> None: ...

    async def run(self) -> None: ...

    async def close(self) -> None:
        """Raises: RuntimeError: not everything was done that should have been."""


@dataclass(slots=True)
class Ours:
    """Claim and end through :class:`kotonoha_store.EmbeddingQueue`, batch after batch.

    Attributes:
        vectors: what to write; None: end the jobs without.
        call: seconds between claim and end.
    """

    workers: int
    batch: int
    vectors: Vectors | None = None
    call: float = 0.0
    claims: list[float] = field(default_factory=list)
    handed_out: Counter[int] = field(default_factory=Counter)
    _opened: AsyncExitStack = field(default_factory=AsyncExitStack)
    _store: Any = None

    async def open(self, url: URL) -> None:
        self.claims.clear()
        self.handed_out.clear()
        settings = store_settings(url, db_pool_min_size=self.workers, db_pool_max_size=self.workers + 1)
        self._store = await self._opened.enter_async_context(Store.open(settings))
        await asyncio.gather(*(self._store.database.ping() for _ in range(self.workers)))

    async def run(self) -> None:
        await asyncio.gather(*(self._work() for _ in range(self.workers)))

    async def _work(self) -> None:
        queue = self._store.queue
        while True:
            started = time.perf_counter()
            lease: Lease = await queue.claim(self.batch)
            self.claims.append(time.perf_counter() - started)
            if not lease.chunks:
                return
            self.handed_out.update(lease.chunk_ids)
            if self.call:
                await asyncio.sleep(self.call)
            if self.vectors is None:
                await queue.finish(lease, lease.chunk_ids)
            else:
                await queue.complete(lease, lease.chunk_ids, vectors_for(self.vectors, lease.chunk_ids), MODEL)

    async def close(self) -> None:
        depth = await self._store.queue.depth()
        await self._opened.aclose()
        if depth.ready + depth.waiting:
            raise RuntimeError(f"{depth.ready + depth.waiting} jobs are left")

    @property
    def buys(self) -> float:
        return self.handed_out.total() / len(self.handed_out)

    @property
    def claim_ms(self) -> tuple[float, float]:
        """Milliseconds of a claim at the beginning and at the end."""
        skipped = SETTLING * self.workers
        # Each worker's last claim found nothing.
        full = self.claims[: len(self.claims) - self.workers]
        return (
            1000 * statistics.median(full[skipped : skipped + CLAIMS]),
            1000 * statistics.median(full[-CLAIMS:]),
        )


@dataclass(slots=True)
class Theirs:
    """Another library's queue."""

    rival: Rival
    chunks: int
    workers: int
    batch: int
    _done: int = 0

    async def open(self, url: URL) -> None:
        await self.rival.open(url, self.workers, self.batch)

    async def run(self) -> None:
        self._done = await self.rival.drain()

    async def close(self) -> None:
        left = await self.rival.left()
        await self.rival.close()
        if left or self._done != self.chunks:
            raise RuntimeError(f"{type(self.rival).__name__}: {self._done} of {self.chunks} jobs run, {left} left")


# Databases


@dataclass(slots=True)
class Bench:
    """The server: databases that are filled once, and a copy of one of them for each run."""

    url: URL
    options: argparse.Namespace
    vectors: Vectors
    rivals: dict[str, Rival]
    commit: str = "on"
    _running: Runner | None = None

    async def make(self, name: str, fill: Callable[[URL], Awaitable[None]], *, template: str = "template0") -> None:
        """Create and fill a database that runs are copied from."""
        await run_sql(self.url, f"CREATE DATABASE {name} TEMPLATE {template}")
        await fill(self.url.set(database=name))
        await run_sql(self.url.set(database=name), "VACUUM ANALYZE")

    async def prepare(self, runner: Runner, template: str) -> None:
        """Give the runner a fresh copy; the run before it is looked over first."""
        await self.finish()
        await runner.open(await self.copy(template))
        self._running = runner

    async def copy(self, template: str) -> URL:
        """Make the running database anew."""
        await run_sql(
            self.url,
            "DROP DATABASE IF EXISTS running WITH (FORCE)",
            f"CREATE DATABASE running TEMPLATE {template} STRATEGY FILE_COPY",
            f"ALTER DATABASE running SET synchronous_commit = {self.commit}",
            "CHECKPOINT",
        )
        return self.url.set(database="running")

    async def finish(self) -> None:
        """Check and close what ran last."""
        if self._running is not None:
            runner, self._running = self._running, None
            await runner.close()

    async def contest(
        self, runners: dict[str, tuple[Runner, str]], *, repeats: int, label: str, warmups: int = 1
    ) -> Seconds:
        """Runners and the databases they start from, in turn."""

        def contestant(name: str, runner: Runner, template: str) -> Contestant:
            async def prepare() -> None:
                await self.prepare(runner, template)

            return Contestant(name, prepare, runner.run)

        seconds = await contest(
            [contestant(name, runner, template) for name, (runner, template) in runners.items()],
            repeats=repeats,
            label=label,
            warmups=warmups,
        )
        await self.finish()
        return seconds

    @asynccontextmanager
    async def snapshot(self) -> Any:
        """A transaction of the running database that sees it as it is now, for as long as it is open."""
        connection = await connect(self.url.set(database="running"))
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                await connection.fetchval("SELECT count(*) FROM sessions")
                yield
        finally:
            await connection.close()

    def ours(self, workers: int | None = None, **given: Any) -> Ours:
        return Ours(workers or self.options.workers, self.options.batch, **given)


async def load(url: URL, chunks: int) -> None:
    """Queue chunks as a program does: through the library, with the terms for searches by word."""
    async with Store.open(store_settings(url)) as store:
        await store.migrate()
        with progress_bar() as bar:
            task = bar.add_task("queueing chunks", total=chunks)
            for first in range(0, chunks, SOURCES_A_COMMIT * CHUNKS_A_SOURCE):
                last = min(first + SOURCES_A_COMMIT * CHUNKS_A_SOURCE, chunks)
                async with store.begin() as tx:
                    for number in range(first, last, CHUNKS_A_SOURCE):
                        scope = Scope(guild_id=1, channel_id=number)
                        source_id = await tx.knowledge.add_source(SourceType.DISCORD_SESSION, "benchmark", scope=scope)
                        texts = [" ".join(f"{57 * (number + n) + word:x}" for word in range(70)) for n in range(10)]
                        added = [NewChunk(content=text, token_count=100) for text in texts]
                        await tx.knowledge.add_chunks(source_id, added)
                bar.advance(task, last - first)


# The measurements


async def measure_drain(bench: Bench, *, extras: bool) -> Figures:
    """Chunks or jobs a second until nothing is left."""
    chunks, repeats = bench.options.chunks, bench.options.repeats
    runners: dict[str, tuple[Runner, str]] = {"ours": (bench.ours(), "ours")}
    if extras:
        runners["ours, no words"] = (bench.ours(), "ours_no_words")
        runners["ours, vectors"] = (bench.ours(vectors=bench.vectors), "ours_no_hnsw")
    theirs = {
        name: (Theirs(rival, chunks, bench.options.workers, bench.options.batch), name)
        for name, rival in bench.rivals.items()
    }
    # A hundred thousand jobs take it two minutes.
    slow = {name: theirs.pop(name) for name in ("procrastinate",) if name in theirs}
    seconds = await bench.contest(runners | theirs, repeats=repeats, label="draining")
    figures: Figures = {"rates": {name: median_rate(chunks, measured) for name, measured in seconds.items()}}
    for name in theirs:
        figures[f"drain_ratio_{name}"] = rate_ratio(seconds["ours"], seconds[name])
        if extras:
            figures[f"drain_vectors_ratio_{name}"] = rate_ratio(seconds["ours, vectors"], seconds[name])
    for name, entry in slow.items():
        # It takes minutes, in which the load of the machine changes: ours before and after it.
        around = {"before": (bench.ours(), "ours"), name: entry, "after": (bench.ours(), "ours")}
        beside = await bench.contest(
            around, repeats=bench.options.slow_repeats, label=f"draining beside {name}", warmups=0
        )
        figures["rates"][name] = median_rate(chunks, beside[name])
        ours = [(before + after) / 2 for before, after in zip(beside["before"], beside["after"], strict=True)]
        figures[f"drain_ratio_{name}"] = rate_ratio(ours, beside[name])
    return figures


async def measure_writes(bench: Bench) -> Figures:
    """Claim and write, one worker, batch by batch in turn."""
    options = bench.options
    url = await bench.copy("ours_no_hnsw")
    seconds: Seconds = {}
    async with Store.open(store_settings(url)) as store, AsyncExitStack() as stack:
        sides = {"ours": by_us(store, options.batch, bench.vectors)}
        for name, side in (("by hand", by_hand), ("same statements", by_same_statements)):
            connection = await connect(url)
            stack.push_async_callback(connection.close)
            await register_codecs(connection)
            sides[name] = side(connection, options.batch, bench.vectors)
        rounds = options.written // options.batch
        order = list(sides.items())
        with progress_bar() as bar:
            for number in bar.track(range(SETTLING + rounds), description="writing vectors"):
                for name, write in order if number % 2 else reversed(order):
                    started = time.perf_counter()
                    await write()
                    if number >= SETTLING:
                        seconds.setdefault(name, []).append(time.perf_counter() - started)
        written = len(sides) * options.batch * (SETTLING + rounds)
        depth = await store.queue.depth()
        if depth.ready + depth.waiting != options.chunks - written:
            raise RuntimeError(f"{options.chunks - depth.ready - depth.waiting} vectors were written, not {written}")
    # Each batch beside the others of its turn would be noisier than the medians of all.
    typical = {name: statistics.median(measured) for name, measured in seconds.items()}
    return {
        "write_ratio_raw": typical["by hand"] / typical["ours"],
        "write_ratio_same": typical["same statements"] / typical["ours"],
        "write_rates": {name: options.batch / typical[name] for name in sides},
    }


async def measure_claims(bench: Bench) -> Figures:
    """The last claims by the first ones, the median over the rounds."""
    figures: Figures = {}
    claim_ms: dict[str, Any] = {}
    variants = [(workers, held) for workers in (1, bench.options.workers) for held in (False, True)]
    measured: dict[str, list[tuple[float, float]]] = {}
    for _ in range(bench.options.repeats):
        for workers, held in variants:
            runner = bench.ours(workers)
            await bench.prepare(runner, "ours")
            async with AsyncExitStack() as stack:
                if held:
                    await stack.enter_async_context(bench.snapshot())
                await runner.run()
            await bench.finish()
            name = f"{workers} worker{'s' if workers > 1 else ''}{', snapshot held' if held else ''}"
            measured.setdefault(name, []).append(runner.claim_ms)
    for name, pairs in measured.items():
        claim_ms[name] = {
            "first": statistics.median(first for first, _ in pairs),
            "last": statistics.median(last for _, last in pairs),
            "last_over_first": statistics.median(last / first for first, last in pairs),
        }
    figures["claim_last_over_first"] = claim_ms["1 worker"]["last_over_first"]
    figures["claim_last_over_first_snapshot"] = claim_ms["1 worker, snapshot held"]["last_over_first"]
    return figures | {"claim_ms": claim_ms}


async def measure_buys(bench: Bench) -> Figures:
    """How many times a chunk was handed out, by the number of workers."""
    buys = {}
    for workers in (2, 4, 8):
        runner = bench.ours(workers, call=CALL)
        await bench.prepare(runner, "ours")
        await runner.run()
        await bench.finish()
        buys[str(workers)] = runner.buys
    return {"buys_per_chunk": buys}


async def measure_all(url: URL, options: argparse.Namespace) -> Figures:
    """Everything, one durability after the other."""
    bench = Bench(url, options, clustered_vectors(VECTORS), {name: RIVALS[name]() for name in options.rivals})

    async def leave_out(url: URL, statement: str) -> None:
        await run_sql(url, statement)

    async def fill(url: URL) -> None:
        await load(url, options.chunks)

    await bench.make("ours", fill)
    await bench.make("ours_no_words", lambda url: leave_out(url, "TRUNCATE chunk_terms"), template="ours")
    await bench.make("ours_no_hnsw", lambda url: leave_out(url, "DROP INDEX idx_chunks_embedding"), template="ours")
    for name, rival in bench.rivals.items():
        notes.print(f"enqueueing {options.chunks} jobs in {name}")

        async def enqueue(url: URL, rival: Rival = rival) -> None:
            await rival.fill(url, options.chunks)

        await bench.make(name, enqueue)

    figures = await measure_drain(bench, extras=True)
    figures |= await measure_writes(bench) | await measure_claims(bench) | await measure_buys(bench)
    print_figures("synchronous_commit on", figures, options)
    if options.relaxed:
        bench.commit = "off"
        figures["relaxed"] = await measure_drain(bench, extras=False) | await measure_writes(bench)
        print_figures("synchronous_commit off", figures["relaxed"], options)
    versions = await server_versions(url.set(database="ours")) | package_versions("uvloop", "psycopg", *options.rivals)
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for rival in bench.rivals.values():
        console.print(f"{rival.distribution}: {rival.note}")
    return figures


# Tables


def print_figures(title: str, figures: Figures, options: argparse.Namespace) -> None:
    """Rates and ratios; claims and buys where they were measured."""
    table = Table(title=f"{title}, {options.chunks} chunks, batches of {options.batch}", title_justify="left")
    table.add_column("what")
    for heading in ("a second", "ours / theirs"):
        table.add_column(heading, justify="right")
    for name, rate in figures["rates"].items():
        ratio = figures.get(f"drain_ratio_{name}")
        table.add_row(f"drain, {options.workers} workers: {name}", f"{rate:,.0f}", f"{ratio:.2f}" if ratio else "")
    for name, rate in figures["write_rates"].items():
        ratio = figures.get({"by hand": "write_ratio_raw", "same statements": "write_ratio_same"}.get(name, ""))
        table.add_row(f"claim and write, 1 worker: {name}", f"{rate:,.0f}", f"{ratio:.2f}" if ratio else "")
    console.print(table)
    if "claim_ms" in figures:
        claims = Table(title="claim, ms", title_justify="left")
        for heading in ("workers", "first", "last", "last / first"):
            claims.add_column(heading, justify="left" if heading == "workers" else "right")
        for name, row in figures["claim_ms"].items():
            claims.add_row(name, f"{row['first']:.2f}", f"{row['last']:.2f}", f"{row['last_over_first']:.2f}")
        console.print(claims)
        bought = ", ".join(f"{buys:.3f} with {workers}" for workers, buys in figures["buys_per_chunk"].items())
        console.print(f"each chunk is handed out {bought} workers")


# The command


def installed(names: Sequence[str]) -> list[str]:
    """Those of the rivals that can be imported; the others are named and left out."""
    found = []
    for name in names:
        try:
            importlib.import_module(name)
            found.append(name)
        except ImportError as error:
            notes.print(f"[yellow]{name} is left out: {error}")
    return found


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--chunks", type=int, default=100_000, help="how many wait; a multiple of 1000")
    parser.add_argument("--written", type=int, default=20_000, help="vectors that each side writes, one worker")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-repeats", type=int, default=1, help="rounds beside procrastinate")
    parser.add_argument("--no-relaxed", dest="relaxed", action="store_false", help="skip synchronous_commit = off")
    parser.add_argument(
        "--rivals", nargs="*", choices=tuple(RIVALS), default=list(RIVALS), help="none after the option: skip them"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.chunks % (SOURCES_A_COMMIT * CHUNKS_A_SOURCE) or options.chunks < 100 * options.batch:
        parser.error("--chunks must be a multiple of 1000 and at least 100 batches")
    if options.written % options.batch or 3 * (options.written + SETTLING * options.batch) > options.chunks:
        parser.error("--written must be a multiple of --batch, and well below a third of --chunks")
    return options


def main() -> None:
    """Measure on a server of our own."""
    options = _options()
    options.rivals = installed(options.rivals)
    with embedded_server(options=SERVER_OPTIONS) as url, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        figures = runner.run(measure_all(url, options))
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
