"""Everything at once for a while, with everything going wrong: is anything lost, doubled, or ever growing?

    python benchmarks/soak.py [--minutes M] [--workers N] [--rate R] [--json]

Writers append messages to sessions in use and to new ones. Worker processes archive and embed, as ``Store.run`` does;
one is killed (SIGKILL) every few seconds and started anew, and server processes of theirs and of the writers are
terminated. The embedding provider, a local one with OpenAI's protocol, answers with 429, 500, short, reordered and NaN
vectors, hangs up or does not answer, and refuses some texts for good. Every ten seconds a line says how it stands:
dead rows and sizes must level off.

Then writing and killing end, the provider behaves, what waits is waited for, and all is counted. Exit status 1:

* lost: a message whose append was committed is neither in its session nor archived; or a chunk is neither embedded,
  queued nor a dead letter, or still waits in the end, or has the vector of another text;
* doubled: a message is there twice; or a chunk is embedded and queued, or both a chunk and a dead letter;
* a text that was neither refused nor given a vector with NaN is a dead letter.
"""

import argparse
import asyncio
import itertools
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
from common import SEED, connect, console, embedded_server, print_json, server_versions, store_settings
from sqlalchemy import URL, make_url

from kotonoha_store import EmbeddingWorker, Message, Store, StoreUnavailableError
from kotonoha_store.database import register_codecs
from kotonoha_store.service_loop import stop_on_signals

# The tests' provider, which misbehaves on request.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
import embedding_server as provider

REFUSED: Final = "一度も受け付けられない文"
"""Texts with this in them the provider always refuses."""
REFUSED_EVERY: Final = 500
# Each behaviour with its share of the requests; all others are answered.
FAULTS: Final[tuple[tuple[provider.Behaviour, float], ...]] = (
    (provider.status(429, headers={"retry-after": "1"}), 0.02),
    (provider.status(500), 0.03),
    (provider.close, 0.02),
    (provider.cut, 0.01),
    (provider.short, 0.02),
    (provider.reordered, 0.05),
    (provider.nan, 0.005),
    (provider.not_json, 0.01),
    (provider.hang, 0.005),
    (provider.slow(1.0), 0.05),
)
LEASE: Final = 10.0
"""Seconds until what a killed worker held is taken over."""
EVERY: Final = 10.0
"""Seconds between two lines."""
AT_ONCE: Final = 3
"""Messages of one append."""
WORKER_NAME: Final = "soak worker"
WRITER_NAME: Final = "soak writer"
TABLES: Final = ("embedding_jobs", "sessions")


# The worker: python benchmarks/soak.py --worker DATABASE_URL PROVIDER_URL


async def work(url: str, base_url: str) -> None:
    """Archive and embed until SIGTERM, with waits of seconds where they are minutes by default."""
    settings = store_settings(
        make_url(url),
        openai_base_url=base_url,
        openai_api_key="none",
        kb_embedder="openai",
        kb_embedding_lease_seconds=LEASE,
        # Faults of the provider and kills must not bury a text.
        kb_embedding_max_retry=100,
        kb_archive_threshold_hours=5 / 3600,
        kb_archive_interval_hours=3 / 3600,
    )
    async with Store.open(settings) as store:
        worker = EmbeddingWorker(
            store.queue,
            store.embedder,
            backoff=(timedelta(seconds=1), timedelta(seconds=3)),
            interval=timedelta(seconds=2),
            drain=timedelta(seconds=10),
        )
        with stop_on_signals() as stop:
            async with asyncio.TaskGroup() as group:
                group.create_task(store.archiver.run(stop))
                group.create_task(worker.run(stop))


# The others


@dataclass(slots=True)
class Soak:
    """What has been written, killed and seen so far.

    Attributes:
        sent: by session key, the ids of the messages whose append was committed.
        unsure: those whose commit was not answered.
        paid: texts that the provider embedded, repetitions included.
        given_nan: texts that it gave a vector with NaN once.
    """

    url: URL
    options: argparse.Namespace
    sent: dict[str, list[int]] = field(default_factory=dict)
    unsure: set[int] = field(default_factory=set)
    workers: list[asyncio.subprocess.Process] = field(default_factory=list)
    killed: int = 0
    terminated: int = 0
    died: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    paid: int = 0
    given_nan: set[str] = field(default_factory=set)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def answer(self, body: dict[str, Any]) -> provider.Reply:
        """What the provider says while things go wrong."""
        (behaviour,) = random.choices(
            [*(fault for fault, _ in FAULTS), provider.ok],
            [*(share for _, share in FAULTS), 1 - sum(share for _, share in FAULTS)],
        )
        return self._answer(body, behaviour)

    def answer_well(self, body: dict[str, Any]) -> provider.Reply:
        return self._answer(body, provider.ok)

    def _answer(self, body: dict[str, Any], behaviour: provider.Behaviour) -> provider.Reply:
        reply = provider.poison(lambda text: REFUSED in text, behaviour)(body)
        self.requests["refused" if reply.status == 400 else "answered" if behaviour is provider.ok else "spoilt"] += 1
        if behaviour is provider.nan and reply.status == 200:
            # Alone in its request, such a text is buried: that is what is promised.
            self.given_nan.add(provider.texts_of(body)[-1])
        if reply.status == 200 and not (reply.close or reply.cut):
            self.paid += len(provider.texts_of(body))
        return reply

    async def write(self, store: Store, deadline: float) -> None:
        """Append to a few sessions in use, now and then to a new one, at the rate asked for."""
        pause = self.options.writers * AT_ONCE / self.options.rate
        keys = [f"hot:{next(self.numbers)}" for _ in range(3)]
        while time.monotonic() < deadline:
            key = random.choice(keys) if random.random() < 0.8 else f"short:{next(self.numbers)}"
            ids = [next(self.numbers) for _ in range(AT_ONCE)]
            messages = [Message.user(_text(number), message_id=number) for number in ids]
            try:
                async with store.begin() as tx:
                    await tx.sessions.append(key, messages, session_type="thread", guild_id=1, channel_id=2)
                self.sent.setdefault(key, []).extend(ids)
            except StoreUnavailableError:
                self.unsure.update(ids)
                self.sent.setdefault(key, [])
            await asyncio.sleep(random.uniform(0.5, 1.5) * pause)

    async def start_worker(self, base_url: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            "--worker",
            self.url.update_query_dict({"application_name": WORKER_NAME}).render_as_string(hide_password=False),
            base_url,
            start_new_session=True,
        )
        self.workers.append(process)

    async def kill(self, base_url: str, deadline: float) -> None:
        """SIGKILL now this worker, now that one."""
        while (pause := random.uniform(0.5, 1.5) * self.options.kill_every) < deadline - time.monotonic():
            await asyncio.sleep(pause)
            process = self.workers.pop(random.randrange(len(self.workers)))
            if process.returncode is None:
                process.kill()
                self.killed += 1
            else:
                self.died += 1
            await process.wait()
            await self.start_worker(base_url)

    async def terminate(self, connection: Any, deadline: float) -> None:
        """End a connection that workers or writers have."""
        while (pause := random.uniform(0.5, 1.5) * self.options.terminate_every) < deadline - time.monotonic():
            await asyncio.sleep(pause)
            self.terminated += await connection.fetchval(
                "SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = ANY ($1::text[]) ORDER BY random() LIMIT 1) AS ended",
                [WORKER_NAME, WRITER_NAME],
            )

    async def stop_workers(self) -> None:
        """SIGTERM; a worker that does not end by itself is counted as one that died."""
        for process in self.workers:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        for process in self.workers:
            try:
                async with asyncio.timeout(30):
                    if await process.wait() != 0:
                        self.died += 1
            except TimeoutError:
                process.kill()
                self.died += 1
                await process.wait()


def _text(number: int) -> str:
    words = " ".join(f"{number * 31 + word:x}" for word in range(random.randint(3, 60)))
    return f"{REFUSED}。{words}" if number % REFUSED_EVERY == 0 else f"{number}番の発言。{words}"


# What is seen


async def look(connection: Any) -> dict[str, Any]:
    """Counts, dead rows and sizes as they are now."""
    row = await connection.fetchrow(
        "SELECT (SELECT count(*) FROM embedding_jobs) AS queued,"
        " (SELECT count(*) FROM knowledge_chunks WHERE embedding IS NOT NULL) AS embedded,"
        " (SELECT count(*) FROM knowledge_chunks_dlq) AS dead,"
        " (SELECT count(*) FROM sessions WHERE status = 'active') AS active,"
        " (SELECT coalesce(max(jsonb_array_length(messages)), 0) FROM sessions) AS longest"
    )
    seen = dict(row)
    for table in TABLES:
        seen[f"{table}_dead_rows"] = await connection.fetchval("SELECT pg_stat_get_dead_tuples($1::regclass)", table)
        seen[f"{table}_kb"] = await connection.fetchval("SELECT pg_total_relation_size($1::regclass) / 1024", table)
    return seen


async def report(soak: Soak, connection: Any, started: float) -> None:
    """A line every ten seconds, until cancelled."""
    console.print("seconds  messages  queued  embedded  dead  longest  dead rows and kB: embedding_jobs, sessions")
    last = await look(connection)
    while True:
        await asyncio.sleep(EVERY)
        seen = await look(connection)
        tables = ", ".join(f"{seen[f'{table}_dead_rows']} {seen[f'{table}_kb']}" for table in TABLES)
        rate = (seen["embedded"] - last["embedded"]) / EVERY
        console.print(
            f"{time.monotonic() - started:7.0f} {sum(map(len, soak.sent.values())):9} {seen['queued']:7}"
            f" {seen['embedded']:9} (+{rate:.0f}/s) {seen['dead']:5} {seen['longest']:8}  {tables}"
        )
        last = seen


async def settle(soak: Soak, connection: Any) -> bool:
    """Wait until nothing is queued, and no session is to be archived; returns whether that came to pass."""
    deadline = time.monotonic() + soak.options.settle
    while time.monotonic() < deadline:
        seen = await look(connection)
        if not seen["queued"] and not seen["active"]:
            return True
        await asyncio.sleep(1)
    return False


# How many chunks and dead letters are fewer than their source was cut into.
_MISSING: Final = """
SELECT coalesce(sum(total - present), 0)::bigint FROM (
    SELECT max((location ->> 'total_chunks')::int) AS total, count(*) AS present FROM (
        SELECT source_id, location FROM knowledge_chunks UNION ALL SELECT source_id, location FROM knowledge_chunks_dlq
    ) AS pieces GROUP BY source_id
) AS counted WHERE total > present"""


async def count_messages(soak: Soak, connection: Any) -> tuple[int, int]:
    """How many committed messages are nowhere, and how many stand somewhere twice."""
    found: dict[str, Counter[int]] = {}
    archived = await connection.fetch(
        "SELECT origin_session_key AS key, m -> 'message_id' AS id FROM knowledge_sources,"
        " jsonb_array_elements(archived_messages) AS m"
    )
    # What is before the index was archived, and stays as context.
    here = await connection.fetch(
        "SELECT session_key AS key, m -> 'message_id' AS id FROM sessions,"
        " jsonb_array_elements(messages) WITH ORDINALITY AS e(m, place) WHERE place > last_archived_message_index"
    )
    for row in (*archived, *here):
        found.setdefault(row["key"], Counter())[int(row["id"])] += 1
    lost = sum(1 for key, ids in soak.sent.items() for number in ids if not found.get(key, Counter())[number])
    doubled = sum(times - 1 for ids in found.values() for times in ids.values())
    return lost, doubled


async def count_chunks(soak: Soak, connection: Any) -> dict[str, int]:
    """What is wrong with chunks, jobs and dead letters."""
    row = await connection.fetchrow(
        "SELECT count(*) FILTER (WHERE c.embedding IS NULL AND j.chunk_id IS NULL) AS nowhere,"
        " count(*) FILTER (WHERE c.embedding IS NULL AND j.chunk_id IS NOT NULL) AS unfinished,"
        " count(*) FILTER (WHERE c.embedding IS NOT NULL AND j.chunk_id IS NOT NULL) AS embedded_and_queued,"
        " count(*) FILTER (WHERE d.original_chunk_id IS NOT NULL) AS chunk_and_dead_letter"
        " FROM knowledge_chunks AS c LEFT JOIN embedding_jobs AS j ON j.chunk_id = c.id"
        " LEFT JOIN knowledge_chunks_dlq AS d ON d.original_chunk_id = c.id"
    )
    wrong = dict(row)
    wrong["buried_twice"] = await connection.fetchval(
        "SELECT count(*) - count(DISTINCT original_chunk_id) FROM knowledge_chunks_dlq"
    )
    wrong["buried_without_fault"] = await connection.fetchval(
        "SELECT count(*) FROM knowledge_chunks_dlq WHERE position($1 IN content) = 0 AND content <> ALL ($2::text[])",
        REFUSED,
        list(soak.given_nan),
    )
    wrong["missing"] = await connection.fetchval(_MISSING)
    wrong["empty_sources"] = await connection.fetchval(
        "SELECT count(*) FROM knowledge_sources AS s"
        " WHERE NOT EXISTS (SELECT FROM knowledge_chunks WHERE source_id = s.id)"
        " AND NOT EXISTS (SELECT FROM knowledge_chunks_dlq WHERE source_id = s.id)"
    )
    wrong["unfinished_sources"] = await connection.fetchval(
        "SELECT count(*) FROM knowledge_sources WHERE status IN ('pending', 'processing')"
    )
    wrong["wrong_vectors"] = 0
    async with connection.transaction():
        async for chunk in connection.cursor(
            "SELECT content, embedding FROM knowledge_chunks WHERE embedding IS NOT NULL", prefetch=500
        ):
            # Both of length 1; those of two texts are almost at right angles.
            alike = float(np.dot(chunk["embedding"].astype(np.float32), provider.vector_of(chunk["content"])))
            wrong["wrong_vectors"] += alike < 0.999
    return wrong


@asynccontextmanager
async def writers_store(url: URL) -> AsyncIterator[Store]:
    named = url.update_query_dict({"application_name": WRITER_NAME})
    async with Store.open(store_settings(named)) as store:
        yield store


async def run(url: URL, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Soak, settle and count; returns the figures and what is wrong."""
    random.seed(options.seed)
    soak = Soak(url, options)
    async with writers_store(url) as store, provider.EmbeddingServer(soak.answer) as server:
        await store.migrate()
        connection = await connect(url)
        watching = await connect(url)
        await register_codecs(connection)
        started = time.monotonic()
        deadline = started + 60 * options.minutes
        for _ in range(options.workers):
            await soak.start_worker(server.base_url)
        reporting = asyncio.create_task(report(soak, watching, started))
        forgetting = asyncio.create_task(_forget(server))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(options.writers):
                    group.create_task(soak.write(store, deadline))
                group.create_task(soak.kill(server.base_url, deadline))
                group.create_task(soak.terminate(connection, deadline))
            server.default = soak.answer_well
            elapsed = time.monotonic() - started
            at_end = await look(connection)
            is_settled = await settle(soak, connection)
        finally:
            for task in (reporting, forgetting):
                task.cancel()
            await asyncio.gather(reporting, forgetting, return_exceptions=True)
            await soak.stop_workers()
        lost, doubled = await count_messages(soak, connection)
        wrong = await count_chunks(soak, connection)
        seen = await look(connection)
        await watching.close()
        await connection.close()
    lost += sum(wrong[name] for name in ("nowhere", "unfinished", "missing", "empty_sources", "wrong_vectors"))
    doubled += sum(wrong[name] for name in ("embedded_and_queued", "chunk_and_dead_letter", "buried_twice"))
    problems = [f"{number} {name}" for name, number in {**wrong, "lost": lost, "doubled": doubled}.items() if number]
    if not is_settled:
        problems.append(f"not at rest after {options.settle} s: {seen['queued']} queued, {seen['active']} active")
    if soak.died:
        problems.append(f"{soak.died} workers ended by themselves, or not when they were asked to")
    figures = {
        "seconds": elapsed,
        "messages": sum(map(len, soak.sent.values())),
        "messages_per_second": sum(map(len, soak.sent.values())) / elapsed,
        "unsure": len(soak.unsure),
        "embedded": seen["embedded"],
        "embedded_per_second": at_end["embedded"] / elapsed,
        "paid_per_chunk": soak.paid / max(1, seen["embedded"]),
        "dead_letters": seen["dead"],
        "killed": soak.killed,
        "terminated": soak.terminated,
        "requests": dict(soak.requests),
        "lost": lost,
        "doubled": doubled,
        **{f"{table}_{what}": at_end[f"{table}_{what}"] for table in TABLES for what in ("dead_rows", "kb")},
        "longest_session": at_end["longest"],
    }
    return figures, problems


async def _forget(server: provider.EmbeddingServer) -> None:
    """The provider keeps every request; for hours of them there is no room."""
    while True:
        await asyncio.sleep(EVERY)
        server.requests.clear()
        server.headers.clear()


# The command


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=3, help="processes, each with an archiver and an embedder")
    parser.add_argument("--writers", type=int, default=8, help="tasks that append messages")
    parser.add_argument("--rate", type=float, default=60.0, help="messages a second, of all writers")
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds, on average")
    parser.add_argument("--terminate-every", type=float, default=4.0, help="seconds, on average")
    parser.add_argument("--settle", type=float, default=180.0, help="seconds to wait for the rest in the end")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worker", nargs=2, metavar=("DATABASE_URL", "PROVIDER_URL"), help=argparse.SUPPRESS)
    return parser.parse_args()


async def _measure(url: URL, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    figures, problems = await run(url, options)
    for name, value in figures.items():
        console.print(f"{name:24} {value:,.2f}" if isinstance(value, float) else f"{name:24} {value}")
    console.print(", ".join(f"{name} {version}" for name, version in (await server_versions(url)).items()))
    for problem in problems:
        console.print(f"[red]{problem}")
    return figures, problems


def main() -> int:
    """Soak on a server of our own; or be one of its workers."""
    options = _options()
    if options.worker:
        asyncio.run(work(*options.worker))
        return 0
    with embedded_server() as url:
        figures, problems = asyncio.run(_measure(url, options))
    if options.json:
        print_json(figures)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
