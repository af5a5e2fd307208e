"""Sessions that never go quiet: they ask to be archived when they grow too long, and stay short."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from archiving import NOW, archiver, before_writing, chunks, load, query, said, sources, talk
from conftest import settings_for
from sqlalchemy import event

from kotonoha_store import (
    ArchiveReport,
    Database,
    InvalidInputError,
    Message,
    SessionArchiver,
    SessionRepository,
    SessionStatus,
    Settings,
    Store,
    archive_writes,
)
from kotonoha_store import archiver as archiver_module
from kotonoha_store.archive_pieces import Rules, Snapshot, settled_point
from kotonoha_store.database import connect_arguments, database_url
from kotonoha_store.records import Scope

pytestmark = pytest.mark.role("app")

NOT_QUIET = timedelta(days=1)


async def append(database: Database, key: str, messages: Message | Sequence[Message], limit: int | None = 10) -> int:
    async with database.begin() as session:
        repository = SessionRepository(session, archive_max_messages=limit)
        return (await repository.append(key, messages)).message_count


async def requests(database: Database) -> list[Any]:
    return [row[0] for row in await query(database, "SELECT archive_requested_at FROM sessions ORDER BY id")]


@asynccontextmanager
async def listening(settings: Settings) -> AsyncIterator[Callable[[], Any]]:
    """How many notifications have come; all that were committed before the call have."""
    url = database_url(settings)
    assert url is not None
    connection = await asyncpg.connect(**connect_arguments(url, settings))
    heard: list[str] = []
    await connection.add_listener("kotonoha_archive", lambda *_: heard.append("one"))

    async def count() -> int:
        # Notifications come before the answer.
        await connection.execute("SELECT 1")
        return len(heard)

    try:
        yield count
    finally:
        await connection.close()


# Asking for it


async def test_the_append_that_makes_it_too_long_asks_once(database: Database, settings: Settings) -> None:
    async with listening(settings) as heard:
        for number in range(10):
            await append(database, "k", talk(1, start=number))
        assert (await requests(database), await heard()) == ([None], 0)
        assert await append(database, "k", talk(1, start=10)) == 11
        (asked,) = await requests(database)
        assert asked is not None
        assert await heard() == 1
        await append(database, "k", talk(5, start=11))
        assert (await requests(database), await heard()) == ([asked], 1)


async def test_it_is_still_one_statement(database: Database) -> None:
    statements: list[str] = []
    event.listen(
        database.engine.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    for number in range(3):
        await append(database, "k", talk(1, start=number), limit=2)
    assert len(statements) == 3


async def test_a_first_append_may_be_too_long_already(database: Database, settings: Settings) -> None:
    async with listening(settings) as heard:
        await append(database, "k", talk(11))
        assert await heard() == 1
    assert await requests(database) != [None]


async def test_an_append_that_is_rolled_back_wakes_nobody(database: Database, settings: Settings) -> None:
    async with listening(settings) as heard:
        async with database.begin() as session:
            await SessionRepository(session, archive_max_messages=1).append("k", talk(2))
            await session.rollback()
        assert await heard() == 0


async def test_a_save_asks_and_takes_back(database: Database, settings: Settings) -> None:
    await append(database, "k", talk(2))

    async def save(count: int) -> None:
        async with database.begin() as session:
            repository = SessionRepository(session, archive_max_messages=10)
            await repository.save(await repository.load("k"), talk(count))

    async with listening(settings) as heard:
        await save(11)
        assert (await requests(database), await heard()) != ([None], 0)
        await save(10)
        assert (await requests(database), await heard()) == ([None], 1)


def test_a_session_may_hold_a_message_at_least() -> None:
    with pytest.raises(InvalidInputError, match="archive_max_messages"):
        SessionRepository(None, archive_max_messages=0)  # type: ignore[arg-type]


# The settled point


def cut(roles: str, *, maximum: int, overlap: int = 0, archived: int = 0) -> int:
    names = {"u": "user", "a": "assistant"}
    stored = [{"role": names[role], "content": "x"} for role in roles]
    snapshot = Snapshot(1, "k", "chat", Scope(), stored, 0, archived, 1, is_too_long=True)
    return settled_point(snapshot, Rules(overlap, maximum, 0, 0, {}))


@pytest.mark.parametrize(
    ("roles", "options", "expected"),
    [
        # Two of ten stay, and the first that stays is a user's.
        ("uaaauaaaaua", {"maximum": 10}, 9),
        ("uaaauaauaaa", {"maximum": 10}, 7),
        # Only in the newer half of what would be cut.
        ("uaaauaaaaaa", {"maximum": 10}, 9),
        ("aaaaauaaaaa", {"maximum": 10}, 5),
        # Nobody asked: anyhow.
        ("aaaaaaaaaaa", {"maximum": 10}, 9),
        # What stays is not too long with its overlap.
        ("aaaaauaaaaaa", {"maximum": 10, "overlap": 4, "archived": 4}, 10),
        ("aaaaaaauaaaa", {"maximum": 10, "overlap": 4, "archived": 4}, 7),
        # Room for what stays: overlap and it together are less than the maximum.
        ("aaaaaaaaaaa", {"maximum": 10, "overlap": 9, "archived": 9}, 11),
        ("aaaaaaaaaua", {"maximum": 10, "overlap": 8, "archived": 8}, 9),
        # Nothing is archived twice.
        ("aaaaaaaaaaa", {"maximum": 10, "archived": 10}, 10),
        ("aaa", {"maximum": 2, "overlap": 1, "archived": 1}, 3),
    ],
)
def test_where_it_is_cut(roles: str, options: dict[str, int], expected: int) -> None:
    assert cut(roles, **options) == expected


@pytest.mark.parametrize("overlap", range(10))
@pytest.mark.parametrize("roles", ["ua" * 30, "uaaaaaaaa" * 7, "a" * 60, "u" * 60])
def test_what_stays_is_never_too_long(roles: str, overlap: int) -> None:
    for length in range(11, 60):
        for archived in range(min(overlap, length) + 1):
            upto = cut(roles[:length], maximum=10, overlap=overlap, archived=archived)
            assert archived <= upto <= length
            assert length - upto + min(overlap, upto) <= 10


# Archiving it


async def test_it_is_archived_up_to_a_settled_point_and_stays_active(database: Database) -> None:
    await append(database, "k", talk(11))
    service = archiver(database, max_messages=10, overlap_messages=3, chunk_size_messages=4, chunk_overlap_messages=2)
    assert await service.run_once(NOT_QUIET) == ArchiveReport(archived=1, messages=8, chunks=3)
    record = await load(database, "k")
    assert said(record) == [f"message {number}" for number in range(5, 11)]
    assert (record.status, record.messages_offset) == (SessionStatus.ACTIVE, 5)
    assert (record.last_archived_message_index, record.version, record.rewrite_version) == (3, 2, 2)
    assert await requests(database) == [None]
    assert await service.run_once(NOT_QUIET) == ArchiveReport()

    await append(database, "k", talk(5, start=11))
    assert (await service.run_once(NOT_QUIET)).messages == 6
    assert [(s.origin_first_index, len(s.archived_messages)) for s in await sources(database)] == [(0, 8), (8, 6)]
    second = [row for row in await chunks(database) if row.location["first_message_index"] >= 6]
    # Two of the three that were kept lead in to the new ones.
    assert second[0].content.split("\n")[:3] == ["user: message 6", "assistant: message 7", "user: message 8"]

    assert (await service.run_once(NOW)).messages == 2
    assert [len(s.archived_messages) for s in await sources(database)] == [8, 6, 2]
    assert (await load(database, "k")).status is SessionStatus.ARCHIVED


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([Message.user(" ", metadata={"attachment": n}) for n in range(12)], 0),
        ([Message.assistant(f"nobody asked {n}") for n in range(12)], 2),
        ([Message.user("x") for n in range(12)], 2),
    ],
    ids=["blank", "nobody asked", "short"],
)
@pytest.mark.parametrize("idle_for", [NOT_QUIET, NOW])
async def test_also_what_is_not_worth_a_source_must_not_grow(
    database: Database, messages: list[Message], found: int, idle_for: timedelta
) -> None:
    await append(database, "k", messages)
    service = archiver(database, max_messages=10, min_session_length=10**6, chunk_overlap_messages=0)
    report = await service.run_once(idle_for)
    quiet = idle_for == NOW
    assert (report.archived, report.messages) == (1, 12 if quiet else 10)
    assert report.chunks == (found + quiet if found else 0)
    (source,) = await sources(database)
    assert source.status == ("pending" if found else "completed")
    assert [message["content"] for message in source.archived_messages] == [
        m.content for m in messages[: report.messages]
    ]
    record = await load(database, "k")
    assert record.messages == tuple(messages[report.messages :])
    assert await requests(database) == [None]


async def test_one_that_is_still_too_long_asks_again(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append(database, "k", talk(11))
    (asked,) = await requests(database)
    calls = before_writing(monkeypatch, lambda: append(database, "k", talk(20, start=11)))
    service = archiver(database, max_messages=10)
    async with listening(settings) as heard:
        assert (await service.run_once(NOT_QUIET)).messages == 8
        assert len(calls) == 1, "once in a pass"
        assert await heard() == 1
        (again,) = await requests(database)
        assert again > asked
        assert (await service.run_once(NOT_QUIET)).archived == 1
        assert await requests(database) == [None]
        assert await heard() == 1
    record = await load(database, "k")
    assert len(record.messages) <= 10
    archived = [message["content"] for source in await sources(database) for message in source.archived_messages]
    assert archived + said(record) == [f"message {number}" for number in range(31)]


async def test_a_request_without_anything_new_is_taken_back(database: Database) -> None:
    """As after a restart with a smaller overlap: what is archived already is only trimmed."""
    await append(database, "k", talk(11))
    await query(database, "UPDATE sessions SET last_archived_message_index = 11")
    report = await archiver(database, max_messages=10, overlap_messages=2).run_once(NOT_QUIET)
    assert (report.archived, report.skipped, report.failed) == (0, 1, ())
    record = await load(database, "k")
    assert (len(record.messages), record.messages_offset, record.last_archived_message_index) == (2, 9, 2)
    assert (await requests(database), await sources(database)) == ([None], [])


async def test_those_that_fail_do_not_keep_the_others_from_being_taken(database: Database) -> None:
    for number in range(7):
        await append(database, f"k{number}", talk(11))
    await query(database, "UPDATE sessions SET messages = '{}' WHERE session_key < 'k4'")
    async with asyncio.timeout(60):
        report = await archiver(database, max_messages=10, batch_size=2).run_once(NOT_QUIET)
    assert (report.archived, len(report.failed)) == (3, 4)
    # Neither is a quiet one that failed tried again as a long one.
    assert len((await archiver(database, max_messages=10).run_once(NOW)).failed) == 4


async def test_an_archived_session_that_asked_is_left_alone(database: Database) -> None:
    await append(database, "k", talk(11))
    await query(database, "UPDATE sessions SET status = 'archived'")
    assert await archiver(database, max_messages=10).run_once(NOT_QUIET) == ArchiveReport()


# Several archivers


async def test_what_another_has_in_hand_is_neither_read_nor_split(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await append(database, "k", talk(11))
    await append(database, "other", talk(2))
    writing, go_on = asyncio.Event(), asyncio.Event()
    original = archive_writes.write_chunks

    async def slow(*arguments: Any) -> None:
        writing.set()
        await go_on.wait()
        await original(*arguments)

    split: list[str] = []

    def counted(row: Any, *arguments: Any, **options: Any) -> archive_writes.Prepared:
        split.append(row["session_key"])
        return prepare(row, *arguments, **options)

    prepare = archiver_module._prepare
    monkeypatch.setattr(archiver_module, "_prepare", counted)
    with monkeypatch.context() as patch:
        patch.setattr(archive_writes, "write_chunks", slow)
        first = asyncio.create_task(archiver(database, max_messages=10).run_once(NOT_QUIET))
        async with asyncio.timeout(60):
            await writing.wait()
    taken: list[Any] = []
    take = archive_writes.take

    async def counted_take(*arguments: Any) -> Any:
        taken.append(await take(*arguments))
        return taken[-1]

    monkeypatch.setattr(archive_writes, "take", counted_take)
    # By the quiet way, beside the other one: all that nobody else has.
    async with asyncio.timeout(60):
        report = await archiver(database, max_messages=10).run_once(NOW)
    assert (report.archived, report.messages, report.failed) == (1, 2, ())
    assert split == ["k", "other"]
    # Both are asked for at once, in either order.
    assert {row and row["session_key"] for row in taken} == {None, "other"}, "the first row was not even sent"
    assert len(taken) == 2
    go_on.set()
    assert (await first).messages == 8
    assert len(await sources(database)) == 2


async def test_quiet_and_long_passes_at_once_take_each_message_once(database: Database) -> None:
    for number in range(12):
        await append(database, f"k{number}", talk(11 + number))
    services = [archiver(database, max_messages=10, overlap_messages=2, concurrency=2) for _ in range(4)]
    passes = [service.run_once(idle) for service, idle in zip(services, [NOW, NOT_QUIET] * 2, strict=True)]
    reports = await asyncio.gather(*passes)
    assert [report.failed for report in reports] == [()] * 4
    await archiver(database, max_messages=10).run_once(NOW)
    for number in range(12):
        rows = await query(
            database,
            "SELECT jsonb_array_elements(archived_messages) ->> 'content' FROM knowledge_sources"
            " WHERE origin_session_key = :key ORDER BY origin_first_index",
            key=f"k{number}",
        )
        assert [row[0] for row in rows] == [f"message {n}" for n in range(11 + number)]


async def test_two_thousand_appends_never_hold_much_more_than_the_maximum(settings: Settings) -> None:
    settings = settings_for(database_url(settings), kb_archive_max_messages=50)  # type: ignore[arg-type]
    stop = asyncio.Event()
    most = 0
    async with Store.open(settings) as store:
        archiving = [asyncio.create_task(store.archiver.run(stop)) for _ in range(2)]
        for number in range(2000):
            async with store.begin() as tx:
                held = (await tx.sessions.append("k", talk(1, start=number))).message_count
            most = max(most, held)
            if held > 150:
                break
            if held > 60:
                # At the pace of a conversation that goes on meanwhile; slower and slower, lest the speed of the machine
                # decide: not to be archived for a minute is too long.
                await asyncio.sleep(0.01 * 2 ** ((held - 60) // 10))
        stop.set()
        await asyncio.gather(*archiving)
        await store.archiver.run_once(NOT_QUIET)
        record = await load(store.database, "k")
        kept = await sources(store.database)
        pieces = await chunks(store.database)
    assert most <= 150
    assert record.message_count <= 50
    archived = [message["content"] for source in kept for message in source.archived_messages]
    waiting = said(record)[record.last_archived_message_index :]
    assert archived + waiting == [f"message {number}" for number in range(2000)]
    first = 0
    for source in kept:
        assert source.origin_first_index == first
        first += len(source.archived_messages)
    assert record.messages_offset + record.last_archived_message_index == first
    found = {
        number
        for row in pieces
        for number in range(row.location["first_message_index"], row.location["last_message_index"] + 1)
    }
    assert found == set(range(first))


async def test_run_once_of_the_store_follows_its_settings(settings: Settings) -> None:
    settings = settings_for(database_url(settings), kb_archive_max_messages=20)  # type: ignore[arg-type]
    async with Store.open(settings) as store:
        async with store.begin() as tx:
            await tx.sessions.append("k", talk(21))
        assert (await store.archiver.run_once()).messages == 16
        assert isinstance(store.archiver, SessionArchiver)
