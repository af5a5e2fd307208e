"""How fast sessions are appended to and archived: beside hand-written asyncpg, and as a session grows.

    python benchmarks/sessions.py [--messages N] [--sessions N] [--repeats R] [--json]

Appends, one message each in a transaction of its own (``Store.begin``), in turn to new sessions (their first
ten) and to one that has had 5,000, while the store's archiver runs in the same process (``append_p50_5000_over_10``).
``append_ratio_raw``: the same SQL, recorded from our own run, by bare asyncpg on a held connection in the same
transactions, both to sessions of up to ten messages.

Archive of 1,000 sessions of 50 messages, by ``SessionArchiver.run_once``: reading, splitting, counting tokens, making
the words, writing all of it and pruning the sessions, beside bare asyncpg that inserts the same rows of sources,
chunks, jobs and words (``archive_ratio_raw``, of rates). The rival has all chunks, cut and counted, with their places,
and makes their rows on the clock, as any program must: JSON, hash, words. One transaction a source, on as many
connections as the archiver uses: INSERT of the source, ids of the chunks from their sequence, COPY of chunks, jobs,
and words in binary. It neither reads sessions nor prunes them nor merges words into their index. Once more with rows
that were made before (``archive_ratio_raw_rows_ready``): then it only sends. And once without words on both sides,
which are neither made nor written (``archive_ratio_raw_without_words``).

lz4: the append's SQL by bare asyncpg on sessions of 10, 50, 100 and 1,000 messages, in turn on two tables that differ
in the compression of ``messages`` alone.

Messages: Japanese, 20 to 80 characters. ``synchronous_commit = off``, autovacuum off.
"""

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
from common import (
    SEED,
    Contestant,
    connect,
    console,
    contest,
    driver_arguments,
    embedded_server,
    median_rate,
    print_json,
    progress_bar,
    rate_ratio,
    run_sql,
    server_versions,
    store_settings,
)
from japanese import read_corpus
from rich.table import Table
from sqlalchemy import URL, event
from vectors import SERVER_OPTIONS

from kotonoha_store import HashingEmbedder, Message, NewChunk, Scope, Store, archive_writes
from kotonoha_store.database import register_codecs
from kotonoha_store.words import analyse, pack_terms, scope_terms

FIRST: Final = 10
LENGTHS: Final = (10, 50, 100, 1000)
MESSAGES_A_SESSION: Final = 50
NOON: Final = datetime(2026, 11, 21, 12, tzinfo=UTC)

Append = Callable[[str, Message], Awaitable[None]]


def conversation(count: int) -> list[Message]:
    """Question and answer in turn, always the same."""
    chosen = random.Random(SEED)
    text = "".join(read_corpus(None).texts(1, 80 * count))
    messages, start = [], 0
    for number in range(count):
        end = start + chosen.randint(20, 80)
        role = ("user", "assistant")[number % 2]
        said = NOON + timedelta(seconds=number)
        messages.append(Message(role=role, content=text[start:end], timestamp=said, message_id=2**60 + number))
        start = end
    return messages


# Appends


async def timed_appends(append: Append, key: str, messages: Sequence[Message]) -> list[float]:
    """Seconds of each append."""
    seconds = []
    for message in messages:
        started = time.perf_counter()
        await append(key, message)
        seconds.append(time.perf_counter() - started)
    return seconds


def append_by_us(store: Store) -> Append:
    async def append(key: str, message: Message) -> None:
        async with store.begin() as tx:
            await tx.sessions.append(key, message, guild_id=1, channel_id=2)

    return append


async def append_by_hand(store: Store, connection: Any) -> Append:
    """The statement that the store sends, as it is, with key and messages put in their places."""
    sent: list[tuple[str, Any]] = []

    def listen(_: Any, __: Any, sql: str, parameters: Any, *___: Any) -> None:
        sent.append((sql, parameters))

    engine = store.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", listen)
    await append_by_us(store)("recorded", Message.user("recorded"))
    event.remove(engine, "before_cursor_execute", listen)
    ((sql, values),) = sent
    key, stored = values.index("recorded"), next(i for i, value in enumerate(values) if str(value).startswith("["))

    async def append(session_key: str, message: Message) -> None:
        arguments = [*values]
        arguments[key], arguments[stored] = session_key, json.dumps([message.to_stored()], ensure_ascii=False)
        async with connection.transaction(isolation="read_committed"):
            await connection.fetchrow(sql, *arguments)

    return append


async def measure_appends(store: Store, connection: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the first appends and of those to a long session, and beside bare asyncpg."""
    ours, raw = append_by_us(store), await append_by_hand(store, connection)
    messages = conversation(options.messages + FIRST * (options.append_rounds + 1))
    stop = asyncio.Event()
    archiving = asyncio.create_task(store.archiver.run(stop))
    first: list[float] = []
    late: list[float] = []
    ratios: list[float] = []
    held = 0
    with progress_bar() as bar:
        task = bar.add_task("appending", total=options.messages)
        for message in messages[: options.messages]:
            await ours("long", message)
            bar.advance(task)
        for number in range(-1, options.append_rounds):
            some = messages[options.messages + FIRST * (number + 1) :][:FIRST]
            new = await timed_appends(ours, f"new {number}", some)
            old = await timed_appends(ours, "long", some)
            rival = await timed_appends(raw, f"raw {number}", some)
            async with store.begin() as tx:
                held = max(held, (await tx.sessions.load("long")).message_count)
            if number >= 0:
                first, late = first + new, late + old
                ratios.append(statistics.median(new) / statistics.median(rival))
    stop.set()
    await archiving
    sources = await connection.fetchval("SELECT count(*) FROM knowledge_sources WHERE origin_session_key = 'long'")
    return {
        "append_p50_5000_over_10": statistics.median(late) / statistics.median(first),
        "append_ratio_raw": statistics.median(ratios),
        "append_ms": {"first": 1000 * statistics.median(first), "late": 1000 * statistics.median(late)},
        "long_session": {"most_messages": held, "sources": sources},
    }


async def measure_compression(store: Store, connection: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of one append by the session's length, under pglz and lz4; nothing without lz4."""
    if (
        await connection.fetchval("SELECT 1 FROM pg_settings WHERE name = 'wal_compression' AND 'lz4' = ANY(enumvals)")
        is None
    ):
        return {}
    engine = store.database.engine.sync_engine
    sent: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda _, __, sql, parameters, *___: sent.append((sql, parameters)))
    await append_by_us(store)("compressed", Message.user("x"))
    ((sql, values),) = sent
    table = {"lz4": "sessions", "pglz": "sessions_pglz"}
    await connection.execute("DROP TABLE IF EXISTS sessions_pglz")
    await connection.execute("CREATE TABLE sessions_pglz (LIKE sessions INCLUDING ALL)")
    await connection.execute("ALTER TABLE sessions_pglz ALTER COLUMN messages SET COMPRESSION pglz")
    stored = [message.to_stored() for message in conversation(max(LENGTHS) + 1)]
    key, new = values.index("compressed"), next(i for i, value in enumerate(values) if str(value).startswith("["))
    figures: dict[str, Any] = {}
    for length in LENGTHS:
        seconds: dict[str, list[float]] = {name: [] for name in table}
        for number in range(-1, options.repeats * 5):
            for name in table if number % 2 else reversed(table):
                statement = sql.replace("sessions", table[name])
                arguments = [*values]
                arguments[key] = f"{length} messages"
                await connection.execute(f"DELETE FROM {table[name]} WHERE session_key = $1", arguments[key])
                arguments[new] = json.dumps(stored[:length], ensure_ascii=False)
                await connection.fetchrow(statement, *arguments)
                arguments[new] = json.dumps(stored[length : length + 1], ensure_ascii=False)
                for _ in range(5):
                    started = time.perf_counter()
                    await connection.fetchrow(statement, *arguments)
                    if number >= 0:
                        seconds[name].append(time.perf_counter() - started)
        figures[str(length)] = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    await connection.execute("DROP TABLE sessions_pglz")
    return figures


# Archive


@dataclass(frozen=True, slots=True)
class Made:
    """What a session became: its source's columns, the chunks as our archive cut them, and rows for the driver."""

    source: tuple[Any, ...]
    scope: Scope
    title: str
    chunks: Sequence[NewChunk]
    rows: Sequence[tuple[Any, ...]]


SOURCE_COLUMNS: Final = (
    "type, title, uri, metadata, guild_id, channel_id, origin_session_id, origin_first_index, archived_messages,"
    " origin_session_key"
)
CHUNK_COLUMNS: Final = (
    "content",
    "location",
    "token_count",
    "content_hash",
    "occurred_from",
    "occurred_to",
    "guild_id",
    "channel_id",
)


def rows_of(chunks: Sequence[NewChunk], title: str, scope: Scope, *, words: bool) -> list[tuple[Any, ...]]:
    """Rows as the driver takes them: JSON as text, hashes, and at the end the words in their binary format."""
    rows = []
    whose = scope_terms(**asdict(scope))
    for chunk in chunks:
        found = analyse(title, chunk.content) if words else None
        rows.append(
            (
                chunk.content,
                json.dumps(chunk.location, ensure_ascii=False),
                chunk.token_count,
                hashlib.sha256(chunk.content.encode()).digest(),
                chunk.occurred_from,
                chunk.occurred_to,
                scope.guild_id,
                scope.channel_id,
                *((pack_terms(found, whose), found.folded) if found else ()),
            )
        )
    return rows


async def fill_sessions(store: Store, connection: Any, sessions: int) -> None:
    """Keep the sessions that every round starts from in a table beside."""
    messages = conversation(MESSAGES_A_SESSION * sessions)
    await connection.execute("TRUNCATE sessions, knowledge_sources CASCADE")
    for number in range(sessions):
        said = messages[MESSAGES_A_SESSION * number :][:MESSAGES_A_SESSION]
        async with store.begin() as tx:
            await tx.sessions.append(f"session {number}", said, guild_id=1, channel_id=number % 20)
    await connection.execute("DROP TABLE IF EXISTS kept; CREATE TABLE kept AS TABLE sessions")


async def reset(connection: Any) -> None:
    """All sessions as they were, nothing archived. What is known of common words stays, as in a store in use."""
    await connection.execute("TRUNCATE sessions, knowledge_sources CASCADE")
    await connection.execute("INSERT INTO sessions SELECT * FROM kept")
    await connection.execute("VACUUM ANALYZE sessions")
    await connection.execute("CHECKPOINT")


async def archive_by_us(store: Store, sessions: int) -> None:
    report = await store.archiver.run_once(timedelta(0))
    if report.archived != sessions or report.failed:
        raise RuntimeError(f"{report.archived} of {sessions} sessions were archived: {report.failed[:1]}")


async def read_made(connection: Any) -> list[Made]:
    """What the archive has just made."""
    made = []
    for source in await connection.fetch(f"SELECT id, {SOURCE_COLUMNS} FROM knowledge_sources ORDER BY id"):
        found = await connection.fetch("SELECT * FROM knowledge_chunks WHERE source_id = $1 ORDER BY id", source["id"])
        chunks = [
            NewChunk(
                content=chunk["content"],
                location=json.loads(chunk["location"]),
                token_count=chunk["token_count"],
                occurred_from=chunk["occurred_from"],
                occurred_to=chunk["occurred_to"],
            )
            for chunk in found
        ]
        scope = Scope(guild_id=source["guild_id"], channel_id=source["channel_id"])
        rows = rows_of(chunks, source["title"], scope, words=True)
        made.append(Made(tuple(source)[1:], scope, source["title"], chunks, rows))
    return made


async def insert_by_hand(pool: Any, made: Sequence[Made], *, words: bool, ready: bool) -> None:
    """One transaction a source, on every connection of the pool."""
    left = iter(made)
    values = ", ".join(f"${number + 1}" for number in range(len(SOURCE_COLUMNS.split(","))))
    insert = f"INSERT INTO knowledge_sources ({SOURCE_COLUMNS}) VALUES ({values}) RETURNING id"
    reserve = "SELECT nextval('knowledge_chunks_id_seq') FROM generate_series(1, $1)"
    width = len(CHUNK_COLUMNS)

    async def work() -> None:
        async with pool.acquire() as connection:
            for each in left:
                rows = each.rows if ready else rows_of(each.chunks, each.title, each.scope, words=words)
                async with connection.transaction():
                    source_id = await connection.fetchval(insert, *each.source)
                    ids = [row[0] for row in await connection.fetch(reserve, len(rows))]
                    await connection.copy_records_to_table(
                        "knowledge_chunks",
                        columns=("id", "source_id", *CHUNK_COLUMNS),
                        records=[(i, source_id, *row[:width]) for i, row in zip(ids, rows, strict=True)],
                    )
                    await connection.copy_records_to_table(
                        "embedding_jobs", columns=("chunk_id",), records=[(i,) for i in ids]
                    )
                    if words:
                        await connection.copy_records_to_table(
                            "chunk_terms",
                            columns=("chunk_id", "terms", "folded"),
                            records=[(i, *row[width:]) for i, row in zip(ids, rows, strict=True)],
                        )

    await asyncio.gather(*(work() for _ in range(pool.get_size())))


@contextmanager
def without_words() -> Iterator[None]:
    """Chunks are written without their words, which are not made either."""
    kept = archive_writes.analyse, archive_writes._WRITE_CHUNKS
    statement, _, _ = kept[1].rpartition("INSERT INTO chunk_terms")
    none = analyse("", "")
    archive_writes.analyse = lambda *_: none  # type: ignore[assignment]  # a stand-in
    # The columns stay parameters, of no type that costs anything.
    archive_writes._WRITE_CHUNKS = f"{statement}SELECT count(*) FROM new"  # type: ignore[misc]  # Final: changed for this measurement only
    try:
        yield
    finally:
        archive_writes.analyse, archive_writes._WRITE_CHUNKS = kept  # type: ignore[misc]  # as before


async def measure_archive(store: Store, connection: Any, url: URL, options: argparse.Namespace) -> dict[str, Any]:
    """Sessions a second and the ratio of rates, with words and without."""
    await fill_sessions(store, connection, options.sessions)
    await reset(connection)
    await archive_by_us(store, options.sessions)
    made = await read_made(connection)
    chunks = sum(len(each.chunks) for each in made)

    async def ours_without_words() -> None:
        with without_words():
            await archive_by_us(store, options.sessions)

    size = store.archiver._concurrency
    async with asyncpg.create_pool(**driver_arguments(url), min_size=size, max_size=size, init=register_codecs) as pool:
        runs: dict[str, Callable[[], Awaitable[None]]] = {
            "ours": lambda: archive_by_us(store, options.sessions),
            "raw": lambda: insert_by_hand(pool, made, words=True, ready=False),
            "raw, rows ready": lambda: insert_by_hand(pool, made, words=True, ready=True),
            "ours, no words": ours_without_words,
            "raw, no words": lambda: insert_by_hand(pool, made, words=False, ready=False),
        }
        seconds = await contest(
            [Contestant(name, lambda: reset(connection), run) for name, run in runs.items()],
            repeats=options.repeats,
            label="archiving",
        )
    return {
        "archive_ratio_raw": rate_ratio(seconds["ours"], seconds["raw"]),
        "archive_ratio_raw_rows_ready": rate_ratio(seconds["ours"], seconds["raw, rows ready"]),
        "archive_ratio_raw_without_words": rate_ratio(seconds["ours, no words"], seconds["raw, no words"]),
        "archive_rates": {name: median_rate(options.sessions, times) for name, times in seconds.items()},
        "archive_chunks": chunks,
        "connections": size,
    }


def print_figures(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Tables: who, how fast, and how they compare."""
    table = Table(title=f"append of one message, the archiver beside it, {options.messages:,} messages before")
    for heading in ("first ten, ms", "late, ms", "late / first", "ours / raw"):
        table.add_column(heading, justify="right")
    ms = figures["append_ms"]
    table.add_row(
        f"{ms['first']:.2f}",
        f"{ms['late']:.2f}",
        f"{figures['append_p50_5000_over_10']:.2f}",
        f"{figures['append_ratio_raw']:.2f}",
    )
    console.print(table)
    table = Table(title=f"archive of {options.sessions:,} sessions of {MESSAGES_A_SESSION} messages")
    table.add_column("what")
    for heading in ("sessions/s", "chunks/s", "ours / raw"):
        table.add_column(heading, justify="right")
    ratios = {
        "raw": figures["archive_ratio_raw"],
        "raw, rows ready": figures["archive_ratio_raw_rows_ready"],
        "raw, no words": figures["archive_ratio_raw_without_words"],
    }
    for name, rate in figures["archive_rates"].items():
        chunks = rate * figures["archive_chunks"] / options.sessions
        table.add_row(name, f"{rate:,.0f}", f"{chunks:,.0f}", f"{ratios[name]:.2f}" if name in ratios else "")
    console.print(table)
    table = Table(title="append by bare asyncpg, ms, by compression of the array")
    for heading in ("messages", "pglz", "lz4"):
        table.add_column(heading, justify="right")
    for length, found in figures["append_compression_ms"].items():
        table.add_row(length, f"{found['pglz']:.2f}", f"{found['lz4']:.2f}")
    console.print(table if table.row_count else "lz4: this server was built without it, the array stays under pglz")


async def measure_all(url: URL, options: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    await run_sql(url, "ALTER DATABASE bench SET synchronous_commit = off")
    # The pool keeps as many connections as it makes: making one costs more than what is measured.
    settings = store_settings(url, db_pool_min_size=20, db_pool_max_size=20)
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        await store.migrate()
    async with Store.open(settings, embedder=HashingEmbedder()) as store:
        connection = await connect(url)
        try:
            figures = await measure_appends(store, connection, options)
            figures |= await measure_archive(store, connection, url, options)
            figures["append_compression_ms"] = await measure_compression(store, connection, options)
        finally:
            await connection.close()
    print_figures(figures, options)
    console.print(", ".join(f"{name} {version}" for name, version in (await server_versions(url)).items()))
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--messages", type=int, default=5000, help="appended to the long session before")
    parser.add_argument("--append-rounds", type=int, default=30)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args()


def main() -> None:
    """Measure on a server of our own."""
    options = _options()
    with embedded_server(options=SERVER_OPTIONS) as url:
        figures = asyncio.run(measure_all(url, options))
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
