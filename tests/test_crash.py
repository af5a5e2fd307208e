"""Whatever is killed, restarted or refused: nothing is lost, nothing is there twice, nothing hangs.

The tests that restart PostgreSQL have an embedded server of their own.
"""

import asyncio
import os
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archiving import append, snapshot, talk
from conftest import VERSION, new_database, settings_for
from crash_check import Sent, violations
from crash_worker import KILLER, LAST_WORDS, Options, start_archiver, start_worker
from embedding_server import (
    Behaviour,
    Body,
    EmbeddingServer,
    Reply,
    answer,
    close,
    cut,
    dimension,
    duplicate_index,
    empty,
    extra,
    hang,
    held,
    nan,
    not_json,
    ok,
    ragged,
    reordered,
    short,
    slow,
    status,
    texts_of,
    vector_of,
    zero,
)
from sqlalchemy import URL, make_url, text
from working import add, assert_embedded, jobs, letters, sql

from kotonoha_store import (
    Database,
    KnowledgeRepository,
    Message,
    NewChunk,
    OpenAIEmbedder,
    SessionRepository,
    SourceType,
    StoreUnavailableError,
    embedded,
    migrations,
)
from kotonoha_store.embedded import EmbeddedServer

REFUSED = "is refused"
SPOILED = "has no vector"
MODEL = OpenAIEmbedder(base_url="http://127.0.0.1:9/v1").model


def is_blameless(text: str) -> bool:
    return not any(words in text for words in (KILLER, LAST_WORDS, REFUSED, SPOILED))


# A server that may be restarted


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedServer]:
    directory = Path(tempfile.mkdtemp(prefix="kt"))
    directory.chmod(0o755)
    server = embedded.start(directory / "pg", version=VERSION, databases=("postgres",))
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def pg_ctl(server: EmbeddedServer, *arguments: str) -> None:
    owner = server.data_dir.stat()
    as_owner: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    subprocess.run(
        [server.bin_dir / "pg_ctl", *arguments, "-w", "-t", "60", "-D", ".", "-l", "server.log"],
        cwd=server.data_dir,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        **(as_owner if os.geteuid() == 0 else {}),
    )


def restart(server: EmbeddedServer, mode: str) -> None:
    """Stop and start it; ``immediate``: without a checkpoint, as after a crash of all its processes."""
    pg_ctl(server, "restart", "-m", mode)


@pytest.fixture(scope="module")
def crash_template(postgres: EmbeddedServer) -> Iterator[URL]:
    async def migrate(url: URL) -> None:
        async with Database(url, settings_for(url)) as database:
            await migrations.upgrade(database)

    with new_database(make_url(postgres.url("postgres"))) as url:
        asyncio.run(migrate(url))
        yield url


@pytest.fixture
def crash_url(postgres: EmbeddedServer, crash_template: URL) -> Iterator[URL]:
    with new_database(make_url(postgres.url("postgres")), template=str(crash_template.database)) as url:
        yield url


# Processes


async def ended(process: BaseProcess) -> int:
    """Wait for its end; returns the exit code, negative for a signal."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(process.sentinel)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


async def killed(process: BaseProcess) -> None:
    process.kill()
    assert await ended(process) == -signal.SIGKILL


@asynccontextmanager
async def running(process: BaseProcess) -> AsyncIterator[BaseProcess]:
    try:
        yield process
    finally:
        process.kill()
        process.join()


async def until(look: Callable[[], Awaitable[int]], *, count: int, seconds: float = 60.0) -> None:
    """What happens in other processes sends no event."""
    async with asyncio.timeout(seconds):
        while True:
            # PostgreSQL may just be restarting.
            with suppress(StoreUnavailableError):
                if await look() == count:
                    return
            await asyncio.sleep(0.02)


async def waiting_jobs(database: Database) -> int:
    [(count,)] = await sql(database, "SELECT count(*) FROM embedding_jobs")
    return int(count)


async def end_leases(database: Database) -> None:
    await sql(database, "UPDATE embedding_jobs SET available_at = now() - interval '1 s'")


def text_of(url: URL) -> str:
    return url.render_as_string(hide_password=False)


# Embedding: one fault at a time


@pytest.fixture
def url(migrated_url: URL) -> str:
    return text_of(migrated_url)


async def waiting_for_locks(database: Database) -> int:
    [(count,)] = await sql(
        database,
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()",
    )
    return int(count)


@pytest.mark.parametrize("table", ["knowledge_sources", "knowledge_chunks"])
async def test_a_worker_killed_between_answer_and_commit_costs_the_batches_in_flight(
    database: Database, url: str, server: EmbeddingServer, table: str
) -> None:
    """Held up before its first write, or in the middle, where a job is gone and its vector not there yet."""
    texts = [f"text {number}" for number in range(20)]
    await add(database, *texts)
    options = Options(batch_size=4, concurrency=2, lease=60, timeout=60)
    async with database.begin() as session:
        await session.execute(text(f"SELECT FROM {table} FOR UPDATE"))
        async with running(start_worker(url, server.base_url, options)) as process:
            await until(lambda: waiting_for_locks(database), count=2)
            await killed(process)
    assert len(server.texts) == 8
    await end_leases(database)
    assert [job[0:2] for job in await jobs(database)] == [(True, 1)] * 8 + [(False, 0)] * 12
    async with running(start_worker(url, server.base_url, options)):
        await until(lambda: waiting_jobs(database), count=0)
    assert len(server.texts) == 8 + 20
    await assert_embedded(database, texts)
    assert await violations(database, model=MODEL) == []


@pytest.mark.parametrize("words", [KILLER, LAST_WORDS])
async def test_a_text_that_kills_its_worker_becomes_a_dead_letter_and_its_neighbours_do_not(
    database: Database, url: str, server: EmbeddingServer, words: str
) -> None:
    texts = [f"text {number}" for number in range(7)]
    await add(database, *texts[:3], words, *texts[3:])
    options = Options(batch_size=8, concurrency=1, lease=60, timeout=60)
    deaths = 0
    while await waiting_jobs(database):
        async with running(start_worker(url, server.base_url, options)) as process:
            death = asyncio.create_task(ended(process))
            done = asyncio.create_task(until(lambda: waiting_jobs(database), count=0))
            await asyncio.wait([death, done], return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                assert death.result() == -signal.SIGKILL
                deaths += 1
                spared = await sql(
                    database,
                    "SELECT max(attempts) FROM embedding_jobs JOIN knowledge_chunks ON id = chunk_id"
                    f" WHERE content <> '{words}'",
                )
                assert spared[0][0] in (None, 1), "two more are left"
            for task in (death, done):
                task.cancel()
            await asyncio.wait([death, done])
        await end_leases(database)
    assert deaths == options.max_attempts
    assert await letters(database) == [(words, "EMBEDDING_MAX_RETRIES_EXCEEDED")]
    await assert_embedded(database, texts)
    assert await violations(database, model=MODEL, is_blameless=is_blameless) == []


async def test_a_terminated_worker_ends_what_it_has_begun_and_nothing_else(
    database: Database, url: str, server: EmbeddingServer
) -> None:
    await add(database, *[f"text {number}" for number in range(20)])
    go_on = asyncio.Event()
    server.default = held(go_on)
    options = Options(batch_size=4, concurrency=2, lease=120, timeout=120, drain=60)
    async with running(start_worker(url, server.base_url, options)) as process:
        await server.until(lambda: server.in_flight == 2)
        process.terminate()
        go_on.set()
        async with asyncio.timeout(30):
            assert await ended(process) == 0
    assert len(server.texts) == 8
    assert [job[:2] for job in await jobs(database)] == [(False, 0)] * 12
    assert await violations(database, model=MODEL, ended=False) == []


async def test_a_terminated_worker_gives_back_at_once_what_takes_too_long(
    database: Database, url: str, server: EmbeddingServer
) -> None:
    await add(database, *[f"text {number}" for number in range(8)])
    server.default = hang
    options = Options(batch_size=4, concurrency=2, lease=120, timeout=120, drain=0.2)
    async with running(start_worker(url, server.base_url, options)) as process:
        await server.until(lambda: server.in_flight == 2)
        process.terminate()
        async with asyncio.timeout(30):
            assert await ended(process) == 0
    for leased, attempts, _, wait in await jobs(database):
        assert (leased, attempts) == (False, 0)
        assert wait <= 0


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_drain_goes_on_when_postgresql_is_there_again(
    postgres: EmbeddedServer, crash_url: URL, server: EmbeddingServer, mode: str
) -> None:
    """Its writes meet with a connection that is gone, and it with a server that is."""
    texts = [f"text {number}" for number in range(20)]
    go_on = asyncio.Event()
    server.default = held(go_on)
    # Leases are short here; a text may lose a few of them to a machine that stops for a while.
    options = Options(batch_size=5, concurrency=2, timeout=60, max_attempts=12)
    async with Database(crash_url, settings_for(crash_url)) as database:
        await add(database, *texts)
        async with running(start_worker(text_of(crash_url), server.base_url, options)) as process:
            await server.until(lambda: server.in_flight == 2)
            await asyncio.to_thread(pg_ctl, postgres, "stop", "-m", mode)
            go_on.set()
            await server.until(lambda: not server.in_flight)
            # For it to give up the batches, and to try again in vain.
            await asyncio.sleep(1)
            await asyncio.to_thread(restart, postgres, mode)
            await until(lambda: waiting_jobs(database), count=0)
            process.terminate()
            assert await ended(process) == 0
        await assert_embedded(database, texts)
        assert await violations(database, model=MODEL) == []


# Archiving: one fault at a time


@pytest.mark.parametrize("table", ["sessions", "embedding_jobs"])
async def test_an_archiver_killed_in_the_middle_of_its_write_leaves_no_trace(
    database: Database, url: str, table: str
) -> None:
    """Before it has the session's lock, or between the source and the jobs of its chunks."""
    sent = Sent(talk(20))
    await append(database, "k", sent.messages)
    await sql(database, "UPDATE sessions SET last_active_at = '2020-01-01', archive_due_at = '2020-01-01'")
    before = await snapshot(database)
    async with database.begin() as session:
        await session.execute(text(f"LOCK TABLE {table} IN EXCLUSIVE MODE"))
        async with running(start_archiver(url)) as process:
            await until(lambda: waiting_for_locks(database), count=1)
            await killed(process)
    # Waits for the killed one's transaction.
    await sql(database, f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    assert await snapshot(database) == before
    async with running(start_archiver(url)):
        await until(lambda: active_sessions(database), count=0)
    assert await violations(database, model=MODEL, sent={"k": [sent]}, ended=False) == []


async def active_sessions(database: Database) -> int:
    [(count,)] = await sql(database, "SELECT count(*) FROM sessions WHERE status = 'active'")
    return int(count)


# Everything at once


REFUSE = status(400, error={"type": "invalid_request_error"})
FAULTS: list[Behaviour] = [
    status(429, headers={"retry-after-ms": "200"}),
    status(500),
    status(503),
    status(401),
    hang,
    close,
    cut,
    short,
    extra,
    empty,
    ragged,
    not_json,
    dimension(768),
]
# Of a text alone these would be right, or a verdict on it.
FAULTS_OF_SEVERAL: list[Behaviour] = [duplicate_index, nan, zero, REFUSE]


def behaving(body: Body) -> Reply:
    """Right, save that some texts are refused and of some NaN is made."""
    texts = texts_of(body)
    if any(REFUSED in text for text in texts):
        return REFUSE(body)
    return answer(body, vector=lambda text, size: vector_of(text, size) * np.float32(np.nan if SPOILED in text else 1))


def misbehaving(chance: random.Random) -> Behaviour:
    def behave(body: Body) -> Reply:
        if chance.random() < 0.15:
            return chance.choice(FAULTS + (FAULTS_OF_SEVERAL if len(texts_of(body)) > 1 else []))(body)
        if is_blameless("".join(texts_of(body))):
            return chance.choice([ok, reordered, slow(chance.uniform(0, 0.2))])(body)
        return behaving(body)

    return behave


@dataclass
class Chaos:
    """Processes at work, what is done to them, and what was written meanwhile."""

    chance: random.Random
    postgres: EmbeddedServer
    database: Database
    base_url: str
    options: Options
    processes: list[BaseProcess] = field(default_factory=list)
    documents: dict[int, list[str]] = field(default_factory=dict)
    sent: dict[str, list[Sent]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    async def keep(self, start: Callable[[], BaseProcess], over: asyncio.Event) -> None:
        """Start it again whenever it dies; at the end ask it to stop."""
        process = start()
        place = len(self.processes)
        self.processes.append(process)
        stopping = asyncio.create_task(over.wait())
        try:
            while True:
                death = asyncio.create_task(ended(process))
                await asyncio.wait([death, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not death.done():
                    process.terminate()
                    code = await death
                    # It may have died before it could listen to signals, or of a text: that is heard of later.
                    if code not in (0, -signal.SIGTERM, -signal.SIGKILL):
                        self.unexpected.append(f"a process that was to stop ended with {code}")
                    return
                if death.result() != -signal.SIGKILL:
                    self.unexpected.append(f"a process ended by itself with {death.result()}")
                process = self.processes[place] = start()
        finally:
            stopping.cancel()
            process.kill()
            process.join()

    async def work(self, url: str, over: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(self.keep(lambda: start_worker(url, self.base_url, self.options), over))
            for _ in range(2):
                group.create_task(self.keep(lambda: start_archiver(url), over))

    async def append(self, key: str, ids: Iterator[int], over: asyncio.Event) -> None:
        mine = Sent()
        self.sent.setdefault(key, []).append(mine)
        while not over.is_set() or len(mine.messages) <= 5:
            new = [
                Message(role=self.chance.choice(["user", "assistant"]), content=f"message {number}", message_id=number)
                for number in islice(ids, self.chance.randint(1, 3))
            ]
            mine.messages += new
            try:
                async with self.database.begin() as session:
                    await SessionRepository(session, archive_max_messages=12).append(key, new)
            except StoreUnavailableError:
                mine.unsure |= {message.message_id for message in new}
            await asyncio.sleep(self.chance.uniform(0, 0.1))

    async def add_documents(self, over: asyncio.Event) -> None:
        special = [KILLER, LAST_WORDS, REFUSED, SPOILED]
        for number in count():
            texts = [f"text {self.chance.randrange(10 * number + 10)}" for _ in range(self.chance.randint(1, 8))]
            if special:
                texts.insert(self.chance.randint(0, len(texts)), f"{number} {special.pop()}")
            places = [{"chunk_index": index, "total_chunks": len(texts)} for index in range(len(texts))]
            chunks = [NewChunk(text, location=place) for text, place in zip(texts, places, strict=True)]
            with suppress(StoreUnavailableError):
                async with self.database.begin() as session:
                    knowledge = KnowledgeRepository(session)
                    source_id = await knowledge.add_source(SourceType.WEB_PAGE, "a page")
                    await knowledge.add_chunks(source_id, chunks)
                self.documents[source_id] = texts
            await asyncio.sleep(self.chance.uniform(0, 0.1))
            if over.is_set() and len(self.documents) > 5:
                return

    async def strike(self) -> None:
        acts = ["kill"] * 24 + ["terminate a backend"] * 10 + ["fast", "immediate"] * 2
        self.chance.shuffle(acts)
        for act in acts:
            await asyncio.sleep(self.chance.uniform(0.05, 0.6))
            self.done[act] += 1
            if act == "kill":
                self.chance.choice(self.processes).kill()
            elif act == "terminate a backend":
                with suppress(StoreUnavailableError):
                    await sql(
                        self.database,
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                        f" AND pid <> pg_backend_pid() ORDER BY md5(pid::text || '{self.chance.random()}') LIMIT 1",
                    )
            else:
                await asyncio.to_thread(restart, self.postgres, act)

    async def unfinished(self) -> list[Any]:
        return [
            *await sql(self.database, "SELECT 'job', *, now() FROM embedding_jobs"),
            *await sql(self.database, "SELECT 'pause', *, now() FROM embedding_pauses"),
            *await sql(
                self.database,
                "SELECT 'session', id, version, rewrite_version, last_archived_message_index,"
                " jsonb_array_length(messages), last_active_at, archive_requested_at, now()"
                " FROM sessions WHERE status = 'active'",
            ),
            *await sql(
                self.database,
                "SELECT 'backend', pid, state, wait_event, query_start, now(), query FROM pg_stat_activity"
                " WHERE datname = current_database()",
            ),
        ]

    async def bring_the_doomed_near_their_end(self) -> int:
        """Each worker that dies of one costs a lease's time, and may cost texts beside it an attempt; returns 0."""
        await sql(
            self.database,
            f"UPDATE embedding_jobs SET attempts = greatest(attempts, {self.options.max_attempts - 2})"
            f" FROM knowledge_chunks WHERE id = chunk_id AND content ~ '{KILLER}|{LAST_WORDS}|{SPOILED}'",
        )
        return 0

    async def still_to_do(self) -> int:
        # One statement: what was a session a moment ago is jobs now.
        [(count,)] = await sql(
            self.database,
            "SELECT (SELECT count(*) FROM embedding_jobs) + (SELECT count(*) FROM sessions WHERE status = 'active')",
        )
        return int(count)


async def test_nothing_is_lost_and_nothing_is_there_twice_whatever_happens(
    postgres: EmbeddedServer, crash_url: URL, server: EmbeddingServer
) -> None:
    """Twenty seconds of it; CRASH_SEED repeats the choices, though not what the processes make of them."""
    seed = int(os.environ.get("CRASH_SEED", secrets.randbits(32)))
    print(f"CRASH_SEED={seed}")
    chance = random.Random(seed)
    server.default = misbehaving(random.Random(seed))
    writing, working = asyncio.Event(), asyncio.Event()
    async with Database(crash_url, settings_for(crash_url)) as database:
        chaos = Chaos(chance, postgres, database, server.base_url, Options(lease=1.0, max_attempts=40))
        async with asyncio.TaskGroup() as processes:
            processes.create_task(chaos.work(text_of(crash_url), working))
            async with asyncio.TaskGroup() as writers:
                for ids, key in enumerate("aabbcc"):
                    writers.create_task(chaos.append(key, count(10**6 * (ids + 1)), writing))
                writers.create_task(chaos.add_documents(writing))
                await chaos.strike()
                writing.set()
            server.default = behaving
            try:
                await until(chaos.bring_the_doomed_near_their_end, count=0)
                await until(chaos.still_to_do, count=0, seconds=300)
            except TimeoutError:
                chaos.unexpected += [f"not at rest: {row}" for row in await chaos.unfinished()]
            working.set()
        wrong = await violations(
            database, model=MODEL, is_blameless=is_blameless, documents=chaos.documents, sent=chaos.sent
        )
        assert wrong + chaos.unexpected == []
        dead = {content for content, _ in await letters(database)}
        bad = {content for texts in chaos.documents.values() for content in texts if not is_blameless(content)}
        assert dead >= bad
        assert len(chaos.documents) > 5
        assert all(len(sent.messages) > 5 for writers in chaos.sent.values() for sent in writers)
