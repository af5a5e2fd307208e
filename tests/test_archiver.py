"""The archiver: each message becomes long-term memory exactly once, and nothing is half done."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from archiving import NOON, NOW, append, archiver, before_writing, chunks, load, query, said, snapshot, sources, talk
from conftest import settings_for
from sqlalchemy import URL

from kotonoha_store import (
    ArchivedSession,
    ArchiveReport,
    Database,
    InvalidInputError,
    Message,
    NotFoundError,
    SessionArchiver,
    SessionRepository,
    SessionStatus,
    StoreTimeoutError,
    StoreUnavailableError,
    archive_writes,
)

pytestmark = pytest.mark.role("app")

# What is written


async def test_source_and_chunks_as_specified(database: Database) -> None:
    scope = {"guild_id": 2**63 - 1, "channel_id": 2, "thread_id": 3, "user_id": 4}
    session_id = await append(database, "thread:3", talk(7), session_type="thread", **scope)
    before = datetime.now(UTC) - timedelta(minutes=1)
    report = await archiver(database, chunk_size_messages=5, chunk_overlap_messages=2).run_once(NOW)
    assert report == ArchiveReport(archived=1, messages=7, chunks=2)

    (source,) = await sources(database)
    url = f"https://discord.com/channels/{2**63 - 1}"
    assert (source.type, source.status, source.title) == ("discord_session", "pending", "message 0")
    assert source.uri == f"{url}/2/3"
    assert {name: getattr(source, name) for name in scope} == scope
    assert (source.origin_session_id, source.origin_first_index) == (session_id, 0)
    archived_at = datetime.fromisoformat(source.metadata.pop("archived_at"))
    assert before < archived_at < before + timedelta(minutes=10)
    assert source.metadata == {
        **scope,
        "session_type": "thread",
        "origin_session_id": session_id,
        "origin_session_key": "thread:3",
        "archived_message_count": 7,
        "archived_until_timestamp": "2024-06-01T12:06:00+00:00",
    }

    first, second = await chunks(database)
    assert first.location == {
        "url": f"{url}/3/100",
        "label": "messages 1 to 5",
        "session_key": "thread:3",
        "chunk_index": 0,
        "total_chunks": 2,
        "first_message_index": 0,
        "last_message_index": 4,
        "first_message_id": 100,
        "last_message_id": 104,
    }
    assert second.location["url"] == f"{url}/3/103"
    assert [second.location[name] for name in ("label", "chunk_index")] == ["messages 4 to 7", 1]
    assert (first.occurred_from, first.occurred_to) == (NOON, NOON + timedelta(minutes=4))
    assert (second.occurred_from, second.occurred_to) == (NOON + timedelta(minutes=3), NOON + timedelta(minutes=6))
    for chunk in (first, second):
        assert (chunk.source_id, chunk.embedding, chunk.embedding_model) == (source.id, None, None)
        assert chunk.token_count > 0
        assert {name: getattr(chunk, name) for name in scope} == scope
    assert first.content.split("\n")[:2] == ["user: message 0", "assistant: message 1"]
    jobs = await query(database, "SELECT chunk_id, attempts, lease_token FROM embedding_jobs ORDER BY 1")
    assert jobs == [(first.id, 0, None), (second.id, 0, None)]

    record = await load(database, "thread:3")
    assert (record.status, record.messages) == (SessionStatus.ARCHIVED, ())
    assert (record.messages_offset, record.last_archived_message_index) == (7, 0)
    assert (record.version, record.rewrite_version) == (2, 2)


@pytest.mark.parametrize(
    ("messages", "title"),
    [
        ([Message.user("x" * 50)], "x" * 50),
        ([Message.user("x" * 51)], "x" * 50 + "..."),
        ([Message.user("雨" * 51)], "雨" * 50 + "..."),
        ([Message.assistant("hello"), Message.user(" first \n question ")], "first question"),
        ([Message.user("  "), Message.user("second")], "second"),
        ([Message.user(" "), Message.assistant("nobody asked")], "Discord Session"),
    ],
)
async def test_the_title_is_the_first_question(database: Database, messages: list[Message], title: str) -> None:
    await append(database, "k", messages)
    await archiver(database).run_once(NOW)
    assert [source.title for source in await sources(database)] == [title]


@pytest.mark.parametrize(
    ("scope", "uri", "link"),
    [
        ({}, None, None),
        ({"guild_id": 1}, None, None),
        ({"channel_id": 2}, "@me/2", "@me/2/100"),
        ({"guild_id": 1, "channel_id": 2}, "1/2", "1/2/100"),
        ({"guild_id": 1, "channel_id": 2, "thread_id": 3}, "1/2/3", "1/3/100"),
    ],
)
async def test_links(database: Database, scope: dict[str, int], uri: str | None, link: str | None) -> None:
    def full(path: str | None) -> str | None:
        return None if path is None else f"https://discord.com/channels/{path}"

    await append(database, "with ids", talk(1), **scope)
    await append(database, "without", Message.user("no id", message_id="17"), **scope)
    await archiver(database).run_once(NOW)
    assert [source.uri for source in await sources(database)] == [full(uri)] * 2
    urls = {chunk.location["session_key"]: chunk.location["url"] for chunk in await chunks(database)}
    assert urls == {"with ids": full(link), "without": full(link and link.removesuffix("/100"))}


async def test_the_archived_messages_are_what_was_stored(database: Database) -> None:
    stored = (
        '[{"role": "user", "content": "梅雨", "odd": 0.12345678901234567890123456789, "big": 1e400}, "text", null,'
        ' [1, [2]], {"content": null, "timestamp": "yesterday", "metadata": {"n": 9223372036854775808}},'
        ' {"timestamp": "0001-01-01T00:00:00+14:00"}, {"timestamp": null, "role": "user", "content": "last"}]'
    )
    await query(
        database,
        "INSERT INTO sessions (session_key, session_type, messages) VALUES ('k', 'chat', cast(:m AS jsonb))",
        m=stored,
    )
    report = await archiver(database).run_once(NOW)
    assert (report.archived, report.failed) == (1, ())
    same = await query(database, "SELECT archived_messages = cast(:m AS jsonb) FROM knowledge_sources", m=stored)
    assert same == [(True,)]
    (chunk,) = await chunks(database)
    assert (chunk.occurred_from, chunk.occurred_to) == (None, None)
    (source,) = await sources(database)
    assert source.metadata["archived_until_timestamp"] is None
    assert source.metadata["archived_message_count"] == 7


async def test_token_based(database: Database) -> None:
    await append(database, "k", talk(40))
    report = await archiver(
        database, strategy="token_based", chunk_max_tokens=40, chunk_overlap_ratio=0.2, overlap_messages=2
    ).run_once(NOW)
    rows = await chunks(database)
    assert report.chunks == len(rows) > 5
    assert all(row.token_count <= 40 for row in rows)
    assert rows[0].location["first_message_index"] == 0
    assert rows[-1].location["last_message_index"] == 39
    for number in range(40):
        assert any(f"message {number}" in row.content for row in rows)


# Overlap


async def test_the_overlap_stays_as_context_and_is_archived_once(database: Database) -> None:
    await append(database, "k", talk(8))
    keeping = archiver(database, overlap_messages=3, chunk_size_messages=4, chunk_overlap_messages=2)
    await keeping.run_once(NOW)
    record = await load(database, "k")
    assert said(record) == ["message 5", "message 6", "message 7"]
    assert (record.messages_offset, record.last_archived_message_index) == (5, 3)
    assert (await keeping.run_once(NOW)) == ArchiveReport()

    await append(database, "k", talk(2, start=8))
    report = await keeping.run_once(NOW)
    assert (report.archived, report.messages) == (1, 2)
    _, source = await sources(database)
    assert source.origin_first_index == 8
    assert [message["content"] for message in source.archived_messages] == ["message 8", "message 9"]
    assert (source.title, source.metadata["archived_message_count"]) == ("message 8", 2)
    last = (await chunks(database))[-1]
    # Two of the three that were kept lead in to the new ones.
    assert last.content.split("\n")[0] == "user: message 6"
    assert [last.location[f"{end}_message_index"] for end in ("first", "last")] == [6, 9]
    assert [last.location[f"{end}_message_id"] for end in ("first", "last")] == [106, 109]
    record = await load(database, "k")
    assert said(record) == ["message 7", "message 8", "message 9"]
    assert (record.messages_offset, record.last_archived_message_index) == (7, 3)


async def test_an_overlap_longer_than_the_session_keeps_all_of_it(database: Database) -> None:
    keeping = archiver(database, overlap_messages=100, max_messages=101)
    await append(database, "k", talk(3))
    await keeping.run_once(NOW)
    record = await load(database, "k")
    assert (len(record.messages), record.messages_offset, record.last_archived_message_index) == (3, 0, 3)
    await append(database, "k", talk(2, start=3))
    await keeping.run_once(NOW)
    assert [(s.origin_first_index, len(s.archived_messages)) for s in await sources(database)] == [(0, 3), (3, 2)]


async def test_a_cleared_session_goes_on_with_new_indexes(database: Database) -> None:
    keeping = archiver(database, overlap_messages=5)
    await append(database, "k", talk(3))
    await keeping.run_once(NOW)
    async with database.begin() as session:
        repository = SessionRepository(session)
        await repository.save(await repository.load("k"), [])
    await append(database, "k", talk(2, start=3))
    report = await keeping.run_once(NOW)
    assert (report.archived, report.failed) == (1, ())
    assert [(s.origin_first_index, len(s.archived_messages)) for s in await sources(database)] == [(0, 3), (3, 2)]


# Without a source


@pytest.mark.parametrize(
    ("messages", "minimum"),
    [
        ([Message.user("x" * 29)], 30),
        ([Message.user("x" * 29 + " " * 99)], 30),
        ([Message.assistant("nobody asked " * 10)], 0),
        ([Message.user("  \n ")], 0),
    ],
)
async def test_what_is_not_worth_a_source_is_kept(database: Database, messages: list[Message], minimum: int) -> None:
    await append(database, "k", messages)
    service = archiver(database, min_session_length=minimum)
    assert await service.run_once(NOW) == ArchiveReport(skipped=1)
    record = await load(database, "k")
    assert (record.status, record.messages) == (SessionStatus.ARCHIVED, tuple(messages))
    assert (record.messages_offset, record.last_archived_message_index, record.version) == (0, 0, 2)
    assert await sources(database) == []
    assert await service.run_once(NOW) == ArchiveReport()

    await append(database, "k", Message.user("y" * 30))
    report = await service.run_once(NOW)
    assert (report.archived, report.messages) == (1, len(messages) + 1)
    (source,) = await sources(database)
    assert [message["content"] for message in source.archived_messages] == [messages[0].content, "y" * 30]


async def test_thirty_characters_are_enough(database: Database) -> None:
    await append(database, "k", [Message.user("x" * 10), Message.assistant("y" * 20)])
    assert (await archiver(database, min_session_length=30).run_once(NOW)).archived == 1


async def test_an_active_session_without_anything_new_is_not_looked_at_for_ever(database: Database) -> None:
    await append(database, "k", talk(2))
    async with database.begin() as session:
        repository = SessionRepository(session)
        await repository.save(await repository.load("k"), [])
    assert await archiver(database).run_once(NOW) == ArchiveReport(skipped=1)
    assert (await load(database, "k")).status is SessionStatus.ARCHIVED
    assert await archiver(database).run_once(NOW) == ArchiveReport()


# Beside others


@pytest.mark.parametrize("minimum", [0, 10**6])
async def test_what_is_appended_meanwhile_stays(
    database: Database, monkeypatch: pytest.MonkeyPatch, minimum: int
) -> None:
    session_id = await append(database, "k", talk(4))
    calls = before_writing(monkeypatch, lambda: append(database, "k", talk(2, start=4)))
    archived = await archiver(database, overlap_messages=1, min_session_length=minimum).archive(session_id)
    assert archived is not None
    assert len(calls) == 1, "an append must not make the archiver start over"
    record = await load(database, "k")
    assert record.status is SessionStatus.ACTIVE
    if minimum:
        assert (archived.source_id, archived.messages, len(record.messages)) == (None, 0, 6)
        return
    assert archived.messages == 4
    assert said(record) == ["message 3", "message 4", "message 5"]
    assert (record.messages_offset, record.last_archived_message_index) == (3, 1)
    again = await archiver(database, overlap_messages=1).archive(session_id)
    assert again is not None
    assert again.messages == 2


async def test_a_save_meanwhile_makes_it_read_again(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = await append(database, "k", talk(4))

    async def save() -> None:
        async with database.begin() as session:
            repository = SessionRepository(session)
            await repository.save(await repository.load("k"), [Message.user("rewritten")])

    calls = before_writing(monkeypatch, save)
    archived = await archiver(database).archive(session_id)
    assert len(calls) == 2, "the second read is under the lock, so that a session that is often saved is archived too"
    (source,) = await sources(database)
    assert archived == ArchivedSession(session_id, source.id, 1, 1)
    assert [message["content"] for message in source.archived_messages] == ["rewritten"]
    assert [chunk.content for chunk in await chunks(database)] == ["user: rewritten"]


async def test_a_session_deleted_meanwhile_is_passed_over(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = await append(database, "k", talk(4))
    before_writing(monkeypatch, lambda: query(database, "DELETE FROM sessions"))
    assert await archiver(database).run_once(NOW) == ArchiveReport()
    assert await sources(database) == []
    with pytest.raises(NotFoundError, match=str(session_id)):
        await archiver(database).archive(session_id)


async def test_a_session_deleted_and_made_again_is_archived_too(database: Database) -> None:
    for _ in range(2):
        await append(database, "k", talk(2))
        assert (await archiver(database).run_once(NOW)).archived == 1
        await query(database, "DELETE FROM sessions")
    assert len(await sources(database)) == 2


async def test_two_archivers_share_the_sessions(database: Database) -> None:
    for number in range(20):
        await append(database, f"k{number}", talk(3))
    reports = await asyncio.gather(*(archiver(database, concurrency=3).run_once(NOW) for _ in range(2)))
    assert sum(report.archived for report in reports) == 20
    assert [report.failed for report in reports] == [(), ()]
    assert len(await sources(database)) == 20
    assert len(await chunks(database)) == 20


async def test_more_sessions_than_a_batch(database: Database) -> None:
    for number in range(7):
        await append(database, f"k{number}", talk(1 + number))
    report = await archiver(database, batch_size=2).run_once(NOW)
    assert (report.archived, report.messages) == (7, 28)
    assert {source.metadata["origin_session_key"] for source in await sources(database)} == {
        f"k{number}" for number in range(7)
    }


async def test_only_quiet_sessions(database: Database) -> None:
    await append(database, "quiet", talk(1))
    await append(database, "busy", talk(1))
    quiet = "now() - interval '61 minutes'"
    await query(
        database, f"UPDATE sessions SET last_active_at = {quiet}, archive_due_at = {quiet} WHERE session_key = 'quiet'"
    )
    assert (await SessionArchiver(database, min_session_length=0).run_once()).archived == 1
    assert (await load(database, "quiet")).status is SessionStatus.ARCHIVED
    assert (await load(database, "busy")).status is SessionStatus.ACTIVE
    assert (await SessionArchiver(database, min_session_length=0).run_once(timedelta(days=365 * 2000))).archived == 0


async def test_never_more_at_once_than_allowed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        await append(database, f"k{number}", talk(1))
    running = 0
    most = 0
    together = asyncio.Event()
    original = archive_writes.write_chunks

    async def counted(*arguments: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            if running == 2:
                # Time for a third, were it allowed.
                await asyncio.sleep(0.1)
                together.set()
            async with asyncio.timeout(30):
                await together.wait()
            await original(*arguments)
        finally:
            running -= 1

    monkeypatch.setattr(archive_writes, "write_chunks", counted)
    assert (await archiver(database, concurrency=2).run_once(NOW)).archived == 8
    assert most == 2


# Failures


async def test_a_crash_between_leaves_everything_as_it_was(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = await append(database, "k", talk(4))
    before = await snapshot(database)
    original = archive_writes.write_chunks

    async def write_and_crash(*arguments: Any) -> None:
        await original(*arguments)
        raise RuntimeError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(archive_writes, "write_chunks", write_and_crash)
        with pytest.raises(RuntimeError, match="power"):
            await archiver(database).archive(session_id)
        assert await snapshot(database) == before
        report = await archiver(database).run_once(NOW)
        assert [(failed, str(error)) for failed, error in report.failed] == [(session_id, "the power went out")]
        assert await snapshot(database) == before
    assert (await archiver(database).run_once(NOW)).archived == 1


async def test_a_cancelled_archive_is_done_or_undone(database: Database) -> None:
    for number in range(10):
        await append(database, f"k{number}", talk(4))
        task = asyncio.create_task(archiver(database).run_once(NOW))
        await asyncio.sleep(number * 0.004)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        archived = await query(
            database,
            "SELECT s.status, (SELECT count(*) FROM knowledge_sources k WHERE k.origin_session_id = s.id),"
            " (SELECT count(*) FROM knowledge_chunks), (SELECT count(*) FROM embedding_jobs),"
            " (SELECT count(*) FROM knowledge_sources) FROM sessions s",
        )
        assert {(row[0], row[1]) for row in archived} <= {("active", 0), ("archived", 1)}
        assert {row[2:4] for row in archived} == {(row[4], row[4]) for row in archived}
    # What was cancelled in the midst of its commit is in hand until the server has finished that.
    async with asyncio.timeout(60):
        while len(await sources(database)) < 10:
            await archiver(database).run_once(NOW)
    assert len(await chunks(database)) == len(await sources(database)) == 10


async def test_a_cancelled_begin_does_not_swallow_the_next_commit(migrated_url: URL) -> None:
    """On the same connection the next transaction would be a savepoint within the first."""
    async with Database(migrated_url, settings_for(migrated_url, db_pool_max_size=1)) as database:
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                async with database.driver() as driver:
                    begin = asyncio.create_task(driver.transaction().start())
                    await asyncio.sleep(0)
                    begin.cancel()
                    await begin
            await append(database, "k", talk(2))
            report = await archiver(database).run_once(NOW)
            assert report.archived == len(await sources(database)) == 1
            await query(database, "TRUNCATE sessions, knowledge_sources CASCADE")


async def test_one_bad_session_does_not_stop_the_others(database: Database) -> None:
    ids = [await append(database, f"k{number}", talk(2)) for number in range(5)]
    await query(database, "UPDATE sessions SET messages = '{}' WHERE session_key IN ('k0', 'k3')")
    async with asyncio.timeout(60):
        report = await archiver(database, batch_size=2).run_once(NOW)
    assert report.archived == 3
    assert sorted(failed for failed, _ in report.failed) == [ids[0], ids[3]]
    # They are tried again by the next pass, and only once in it.
    assert len((await archiver(database, batch_size=1).run_once(NOW)).failed) == 2


async def test_messages_that_are_archived_already_are_not_archived_again(database: Database) -> None:
    session_id = await append(database, "k", talk(2))
    await archiver(database).run_once(NOW)
    # As if the session alone had been restored from a backup.
    await append(database, "k", talk(2))
    await query(database, "UPDATE sessions SET messages_offset = 0, last_archived_message_index = 0")
    report = await archiver(database).run_once(NOW)
    ((failed, error),) = report.failed
    assert (failed, type(error), str(error)) == (
        session_id,
        InvalidInputError,
        "these messages of the session are archived already",
    )
    assert len(await sources(database)) == 1


async def test_a_session_too_slow_to_archive_does_not_stop_the_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = await append(database, "k0", talk(2))
    await append(database, "k1", talk(2))
    original = archive_writes.write_session

    async def write_session(driver: Any, prepared: archive_writes.Prepared, *arguments: Any) -> Any:
        if prepared.snapshot.id == slow:
            raise StoreTimeoutError("too slow")
        return await original(driver, prepared, *arguments)

    monkeypatch.setattr(archive_writes, "write_session", write_session)
    report = await archiver(database).run_once(NOW)
    assert (report.archived, [failed for failed, _ in report.failed]) == (1, [slow])


async def test_a_database_that_is_gone_ends_the_pass(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        await append(database, f"k{number}", talk(2))
    cause = OSError("cable")

    async def write_session(*_: Any) -> Any:
        raise StoreUnavailableError("gone") from cause

    monkeypatch.setattr(archive_writes, "write_session", write_session)
    with pytest.raises(StoreUnavailableError, match="gone") as caught:
        await archiver(database).run_once(NOW)
    assert caught.value.__cause__ is cause
    assert await sources(database) == []


async def test_a_killed_backend_ends_the_pass_with_our_error(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await append(database, "k", talk(2))
    original = archive_writes.write_chunks

    async def killed(driver: Any, *arguments: Any) -> None:
        # Not what the driver says: behind a pooler that is the first connection's.
        pid = await driver.fetchval("SELECT pg_backend_pid()")
        await query(database, "SELECT pg_terminate_backend(:pid, 30000)", pid=pid)
        await original(driver, *arguments)

    before = await snapshot(database)
    with monkeypatch.context() as patch:
        patch.setattr(archive_writes, "write_chunks", killed)
        with pytest.raises(StoreUnavailableError):
            await archiver(database).run_once(NOW)
    assert await snapshot(database) == before
    archived = await archiver(database).archive(session_id)
    assert archived is not None
    assert archived.messages == 2


async def test_nothing_to_do(database: Database) -> None:
    assert await archiver(database).run_once(NOW) == ArchiveReport()
    assert await archiver(database).run_once(timedelta(hours=1)) == ArchiveReport()
    with pytest.raises(InvalidInputError, match="negative"):
        await archiver(database).run_once(timedelta(seconds=-1))
    with pytest.raises(NotFoundError):
        await archiver(database).archive(1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("concurrency", 0),
        ("insert_batch_size", 0),
        ("overlap_messages", -1),
        ("max_messages", 0),
    ],
)
async def test_sizes_out_of_range_are_refused(database: Database, name: str, value: int) -> None:
    with pytest.raises(InvalidInputError, match=name):
        archiver(database, **{name: value})


async def test_a_pool_of_one_is_enough(migrated_url: URL) -> None:
    async with Database(migrated_url, settings_for(migrated_url, db_pool_max_size=1)) as database:
        for number in range(4):
            await append(database, f"k{number}", talk(2))
        async with asyncio.timeout(60):
            assert (await archiver(database).run_once(NOW)).archived == 4


async def test_many_chunks_of_one_session(database: Database) -> None:
    await append(database, "k", talk(300))
    report = await archiver(
        database, chunk_size_messages=1, chunk_overlap_messages=0, insert_batch_size=7, overlap_messages=5
    ).run_once(NOW)
    rows = await chunks(database)
    assert report.chunks == len(rows) == 300
    assert [row.location["chunk_index"] for row in rows] == list(range(300))
    assert {row.location["total_chunks"] for row in rows} == {300}


async def test_words_are_merged_every_so_many_sessions_and_at_the_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kotonoha_store.archiver._MERGE_AFTER", 2)
    for number in range(5):
        await append(database, f"key {number}", talk(6))
    mine = archiver(database, concurrency=1)
    merge, archived = mine._refresh_terms, []

    async def counted() -> None:
        await merge()
        archived.append(len(await sources(database)))

    monkeypatch.setattr(mine, "_refresh_terms", counted)
    assert (await mine.run_once(timedelta(0))).archived == 5
    assert archived == [2, 4, 5]
