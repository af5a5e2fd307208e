"""The old bot's SQLite file: what arrives, what is set aside, and what a second run does."""

import asyncio
import json
import sqlite3
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from archiving import append, archiver, load, query, said
from command_line import kotonoha
from sqlalchemy import URL

from kotonoha_store import Database, InvalidInputError, Message, StoreUnavailableError
from kotonoha_store.importers import sqlite_file
from kotonoha_store.importers.report import ImportReport, name
from kotonoha_store.importers.sqlite import import_sqlite

SCHEMA = """CREATE TABLE sessions (session_key TEXT PRIMARY KEY, session_type TEXT NOT NULL, messages TEXT NOT NULL,
    created_at TEXT NOT NULL, last_active_at TEXT NOT NULL,
    channel_id INTEGER, thread_id INTEGER, user_id INTEGER)"""
# Without types and rules, as SQLite allows: anything may stand anywhere.
LAX = """CREATE TABLE sessions (session_key PRIMARY KEY, session_type, messages, created_at, last_active_at,
    channel_id, thread_id, user_id)"""
MORNING = "2025-12-01T09:00:00.123456"
EVENING = "2025-12-02T18:30:00"
SECRET = "秘密の話"


def said_by_turns(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Messages as the old bot wrote them: local times without a zone."""
    began = datetime(2025, 12, 1, 9)  # noqa: DTZ001  as it wrote them
    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": f"{number}番目の話",
            "timestamp": (began + timedelta(minutes=number)).isoformat(),
        }
        for number in range(start, start + count)
    ]


def row(key: object = "thread:1", messages: object = None, **values: object) -> tuple[object, ...]:
    given = {
        "session_key": key,
        "session_type": "thread",
        "messages": said_by_turns(2) if messages is None else messages,
        "created_at": MORNING,
        "last_active_at": EVENING,
        "channel_id": 2**53 + 1,
        "thread_id": 2**62 + 1,
        "user_id": None,
        **values,
    }
    if isinstance(given["messages"], list):
        given["messages"] = json.dumps(given["messages"])
    return tuple(given.values())


def make(path: Path, rows: Sequence[tuple[object, ...]], *, schema: str = SCHEMA, journal: str = "wal") -> Path:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute(schema)
        connection.executemany("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    return path


@pytest.fixture
def old(tmp_path: Path) -> Callable[..., Path]:
    def build(*rows: tuple[object, ...], **options: str) -> Path:
        return make(tmp_path / "bot's 100%? #1.db", rows, **options)

    return build


def counted(report: ImportReport) -> tuple[int, ...]:
    return (report.read, report.imported, report.unchanged, report.kept, report.rejected)


async def everything(database: Database) -> str:
    return str(await query(database, "SELECT * FROM sessions ORDER BY id"))


async def test_sessions_arrive_with_their_messages_ids_and_times(database: Database, old: Callable[..., Path]) -> None:
    path = old(row(), row("mention:5", [], session_type="mention", channel_id=None, thread_id=None, user_id="77"))
    before = path.read_bytes()
    done: list[tuple[int, int | None]] = []

    report = await import_sqlite(
        database, path, guild_id=9, timezone="Asia/Tokyo", progress=lambda *now: done.append(now)
    )

    assert counted(report) == (2, 2, 0, 0, 0)
    assert report.inner["messages"].imported == 2
    assert report.details["checksum_read"] == report.details["checksum_stored"] != ""
    assert any("2 sessions" in note and "Asia/Tokyo" in note for note in report.notes)
    assert done == [(0, 2), (2, 2)]
    thread = await load(database, "thread:1")
    assert (thread.session_type, thread.version) == ("thread", 1)
    assert (thread.scope.guild_id, thread.scope.channel_id, thread.scope.thread_id) == (9, 2**53 + 1, 2**62 + 1)
    assert [(m.role, m.content) for m in thread.messages] == [("user", "0番目の話"), ("assistant", "1番目の話")]
    assert thread.messages[1].timestamp == datetime(2025, 12, 1, 0, 1, tzinfo=UTC)
    assert thread.created_at == datetime(2025, 12, 1, 0, 0, 0, 123456, tzinfo=UTC)
    assert thread.last_active_at == datetime(2025, 12, 2, 9, 30, tzinfo=UTC)
    mention = await load(database, "mention:5")
    assert (mention.scope.user_id, mention.messages) == (77, ())
    assert path.read_bytes() == before


async def test_imported_sessions_are_due_for_archiving_at_once(database: Database, old: Callable[..., Path]) -> None:
    report = await import_sqlite(database, old(row(), row("thread:2", said_by_turns(60))))
    assert report.imported == 2

    archived = await archiver(database).run_once()

    assert (archived.archived, archived.messages) == (2, 62)
    assert (await query(database, "SELECT max(jsonb_array_length(messages)) FROM sessions"))[0][0] == 0


async def test_a_session_used_lately_that_is_too_long_asks_to_be_archived(
    database: Database, old: Callable[..., Path]
) -> None:
    now = datetime.now(UTC).isoformat()
    await import_sqlite(
        database, old(row("short", last_active_at=now), row("long", said_by_turns(60), last_active_at=now))
    )

    asked = await query(database, "SELECT session_key FROM sessions WHERE archive_requested_at IS NOT NULL")

    assert [tuple(each) for each in asked] == [("long",)]


async def test_times_in_the_future_are_told_and_do_not_hold_up_the_archive(
    database: Database, old: Callable[..., Path]
) -> None:
    report = await import_sqlite(database, old(row("late", last_active_at="9999-12-31T23:59:59"), row("quiet")))

    assert any("1 sessions were last active in the future" in note for note in report.notes)
    assert (await archiver(database).run_once()).archived == 1


async def test_a_second_run_changes_nothing_before_or_after_the_archive(
    database: Database, old: Callable[..., Path]
) -> None:
    path = old(row(messages=said_by_turns(12)), row("thread:2"))
    await import_sqlite(database, path)
    first = await everything(database)
    assert counted(await import_sqlite(database, path)) == (2, 0, 2, 0, 0)
    assert await everything(database) == first

    await archiver(database, overlap_messages=3).run_once()
    archived = await everything(database)
    report = await import_sqlite(database, path)

    assert counted(report) == (2, 0, 2, 0, 0)
    assert report.details["checksum_read"] == report.details["checksum_stored"]
    assert await everything(database) == archived


async def test_what_the_old_bot_added_since_is_appended_once(database: Database, old: Callable[..., Path]) -> None:
    path = old(row(messages=said_by_turns(6)))
    await import_sqlite(database, path)
    await archiver(database, overlap_messages=2).run_once()
    with closing(sqlite3.connect(path)) as connection, connection:
        later = (json.dumps(said_by_turns(9)), "2025-12-03T10:00:00+09:00")
        connection.execute("UPDATE sessions SET messages = ?, last_active_at = ?", later)

    reports = [await import_sqlite(database, path) for _ in range(2)]

    assert [counted(report) for report in reports] == [(1, 1, 0, 0, 0), (1, 0, 1, 0, 0)]
    assert reports[0].details["extended"] == 1
    assert (reports[0].inner["messages"].imported, reports[0].inner["messages"].unchanged) == (3, 6)
    session = await load(database, "thread:1")
    assert said(session) == [f"{number}番目の話" for number in range(4, 9)]
    assert session.last_active_at == datetime(2025, 12, 3, 1, tzinfo=UTC)


async def test_sessions_that_were_changed_or_deleted_here_are_left_as_they_are(
    database: Database, old: Callable[..., Path]
) -> None:
    scope = {"session_type": "thread", "channel_id": 2**53 + 1, "thread_id": 2**62 + 1}
    path = old(*(row(key) for key in ("appended", "elsewhere", "own", "thrown away")))
    await append(database, "own", Message.user("別の話"), **scope)
    await append(database, "elsewhere", [Message.from_stored(m) for m in said_by_turns(2)], channel_id=5)
    await import_sqlite(database, path)
    await append(database, "appended", Message.user("続き"))
    await archiver(database).run_once(idle_for=timedelta(0))
    await query(database, "DELETE FROM sessions WHERE session_key = 'thrown away'")
    before = await everything(database)

    report = await import_sqlite(database, path)

    assert counted(report) == (4, 0, 0, 4, 0)
    assert any("4 sessions were changed or deleted here" in note for note in report.notes)
    assert await everything(database) == before


BAD: list[tuple[tuple[object, ...], str]] = [
    (row("broken", f'[{{"role": "user", "content": "{SECRET}"'), "no valid JSON"),
    (row("object", json.dumps({"content": SECRET})), "no JSON list"),
    (row("NaN", '[{"role": "user", "content": "x", "n": NaN}]'), "no valid JSON"),
    (row("nested without end", "[" * 100_000), "no valid JSON"),
    (row("a number of 5000 digits", f"[{'9' * 5000}]"), "no valid JSON"),
    (row("blob", SECRET.encode()), "messages are no text"),
    (row("number", messages=3), "messages are no text"),
    (row("no UTF-8"), "lone surrogate"),
    (row(None), "session_key is no text"),
    (row(5), "session_key is no text"),
    (row("NUL\0"), "NUL"),
    (row("k" * 3000), "2000 bytes"),
    (row(""), "2000 bytes"),
    (row("no type", session_type=None), "session_type"),
    (row("blank type", session_type=" "), "session_type is empty"),
    (row("no time", created_at=SECRET), "created_at is no time"),
    (row("a time as a number", last_active_at=1733000000), "last_active_at is no text"),
    (row("a time before the year 1", last_active_at="0001-01-01T00:00:00+14:00"), "last_active_at is no time"),
    (row("beyond 64 bits", channel_id=2.0**63), "channel_id is no whole number"),
    (row("beyond 64 bits as text", user_id=str(2**63)), "user_id is no whole number"),
    (row("no id", thread_id=SECRET), "thread_id is no whole number"),
    (row("no usable message", [{"role": "user", "content": None}]), "none of its 1 messages"),
]


async def test_sessions_that_cannot_be_used_are_set_aside_with_their_reasons(
    database: Database, old: Callable[..., Path], tmp_path: Path
) -> None:
    # Any order in the file: they are read by their keys.
    path = old(*(bad for bad, _ in BAD), row("good"), schema=LAX)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE sessions SET session_type = CAST(x'ff41' AS TEXT) WHERE session_key = 'no UTF-8'")
    rejects = tmp_path / "rejects.jsonl"

    report = await import_sqlite(database, path, rejects=rejects)

    assert counted(report) == (len(BAD) + 1, 1, 0, 0, len(BAD))
    assert report.has_rejects
    reasons = {each.where: each.reason for each in report.rejections}
    for (key, *_), reason in BAD:
        where = f"session {name(key)}" if isinstance(key, str) else f"row {1 if key is None else 2}"
        assert reason in reasons[where]
    assert SECRET not in str(report)
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(each["where"], each["reason"]) for each in lines] == [(r.where, r.reason) for r in report.rejections]
    assert lines[0]["record"]["created_at"] == MORNING
    assert stat.S_IMODE(rejects.stat().st_mode) == 0o600


async def test_of_a_session_with_bad_messages_the_others_are_imported(
    database: Database, old: Callable[..., Path], tmp_path: Path
) -> None:
    good = said_by_turns(2)
    bad: list[tuple[object, str]] = [
        (SECRET, "no JSON object"),
        ({"role": SECRET, "content": "x"}, "role is none of"),
        ({"role": ["user"], "content": "x"}, "role is none of"),
        ({"role": "user"}, "content is null"),
        ({"role": "user", "content": [SECRET]}, "content must be text"),
        ({"role": "user", "content": f"{SECRET}\0"}, "NUL"),
        ({"role": "user", "content": "\ud83d"}, "lone surrogate"),
        ({"role": "user", "content": "x", SECRET: {"y": "\0"}}, "beside its content"),
    ]
    untimed = {"role": "user", "content": "いつか", "timestamp": "昨日", "mood": 1e2}
    rejects = tmp_path / "rejects.jsonl"

    report = await import_sqlite(
        database, old(row(messages=[good[0], *(item for item, _ in bad), good[1], untimed])), rejects=rejects
    )

    assert counted(report) == (1, 1, 0, 0, 0)
    messages = report.inner["messages"]
    assert (messages.read, messages.imported, messages.rejected) == (11, 3, 8)
    assert report.has_rejects
    for found, (_, reason) in zip(report.rejections, bad, strict=True):
        assert reason in found.reason
    assert report.rejections[0].where == "session thread:1, message 2"
    assert SECRET not in str(report)
    assert [json.loads(line)["record"]["message"] for line in rejects.read_text().splitlines()] == [i for i, _ in bad]
    session = await load(database, "thread:1")
    assert said(session) == ["0番目の話", "1番目の話", "いつか"]
    assert (session.messages[2].timestamp, session.messages[2].metadata) == (None, {"timestamp": "昨日", "mood": 100})
    assert any(note.startswith("1 messages have a time that cannot be read") for note in report.notes)


async def test_an_import_that_was_stopped_goes_on_where_it_was(
    database: Database, old: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BATCH_SESSIONS", 4)
    path = old(*(row(f"thread:{number:02}") for number in range(10)), row("a", "[]x"))
    rejects = tmp_path / "rejects.jsonl"

    def stop(done: int, _: int | None) -> None:
        if done >= 8:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await import_sqlite(database, path, progress=stop, rejects=rejects)
    with rejects.open("a") as cut_off:
        cut_off.write('{"where": "sess')
    report = await import_sqlite(database, path, rejects=rejects)

    assert counted(report) == (11, 3, 7, 0, 1)
    assert (await query(database, "SELECT count(*), count(DISTINCT session_key) FROM sessions"))[0] == (10, 10)
    # Begun anew, with the same once more.
    assert [json.loads(line)["where"] for line in rejects.read_text().splitlines()] == ["session a"]


async def test_two_imports_at_once_write_each_session_once(
    database: Database, old: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BATCH_SESSIONS", 7)
    path = old(*(row(f"thread:{number}") for number in range(60)))

    reports = await asyncio.gather(*(import_sqlite(database, path) for _ in range(3)))

    assert sum(report.imported for report in reports) == 60
    assert all(report.imported + report.unchanged == 60 for report in reports)
    assert (await query(database, "SELECT count(*), sum(version) FROM sessions"))[0] == (60, 60)


async def test_what_does_not_arrive_as_it_was_read_is_told(database: Database, old: Callable[..., Path]) -> None:
    await query(
        database,
        """CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.session_key = 'changed' THEN NEW.messages = jsonb_set(NEW.messages, '{0,content}', '"x"'); END IF;
        IF NEW.session_key = 'shortened' THEN NEW.messages = NEW.messages - 1; END IF;
        RETURN NEW; END $$""",
    )
    spoil = "CREATE TRIGGER spoil BEFORE INSERT OR UPDATE ON sessions FOR EACH ROW EXECUTE FUNCTION spoil()"
    await query(database, spoil)

    report = await import_sqlite(database, old(row("whole"), row("changed"), row("shortened")))

    assert counted(report) == (3, 1, 0, 0, 2)
    reasons = {each.where: each.reason for each in report.rejections}
    assert "does not stand in the database as it was read" in reasons["session changed"]
    assert "changes in the database while it is imported" in reasons["session shortened"]


async def test_what_the_server_refuses_is_set_aside_alone(database: Database, old: Callable[..., Path]) -> None:
    await query(database, "ALTER TABLE sessions ADD CHECK (session_type <> 'refused')")

    report = await import_sqlite(
        database, old(*(row(f"{n}", session_type="refused" if n == 5 else "thread") for n in range(9)))
    )

    assert counted(report) == (9, 8, 0, 0, 1)
    assert [each.where for each in report.rejections] == ["session 5"]


async def test_a_dry_run_tells_the_same_and_writes_nothing(database: Database, old: Callable[..., Path]) -> None:
    path = old(row("a"), row("b"), row("c", "x"))

    report = await import_sqlite(database, path, dry_run=True)

    assert report.is_dry_run
    assert counted(report) == (3, 2, 0, 0, 1)
    assert await everything(database) == "[]"


async def test_a_bot_that_writes_meanwhile_neither_waits_nor_changes_what_is_read(
    database: Database, old: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BATCH_SESSIONS", 1)
    path = old(row("a"), row("b"))

    def write(done: int, _: int | None) -> None:
        if done == 1:
            with closing(sqlite3.connect(path, timeout=0)) as bot, bot:
                bot.execute("DELETE FROM sessions WHERE session_key = 'b'")
                bot.execute("INSERT INTO sessions SELECT 'c', 'thread', '[]', ?, ?, 1, 2, 3", (MORNING, EVENING))

    report = await import_sqlite(database, path, progress=write)

    assert counted(report) == (2, 2, 0, 0, 0)


async def test_a_file_is_read_where_no_log_can_be_made_beside_it_if_it_needs_none(
    database: Database, old: Callable[..., Path]
) -> None:
    path = old(row())
    # As in a read-only folder: a name that leaves no room for the ending -wal.
    long = path.rename(path.with_name("o" * 253))
    assert counted(await import_sqlite(database, long)) == (1, 1, 0, 0, 0)

    path = long.rename(path)
    path.with_name(f"{path.name}-wal").mkdir()
    with pytest.raises(InvalidInputError, match="-wal"):
        await import_sqlite(database, path)


def _encrypted(path: Path) -> None:
    path.write_bytes(bytes(range(1, 256)) * 40)


def _other_table(path: Path) -> None:
    make(path, [], schema="CREATE TABLE sessions (session_key, a, messages, b, c, d, e, f)")


def _view(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE VIEW sessions AS SELECT 1 AS session_key")


def _empty(path: Path) -> None:
    path.touch()


def _folder(path: Path) -> None:
    path.mkdir()


async def test_a_file_that_is_not_the_old_bots_is_refused(database: Database, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[Path], object], str]] = [
        (_encrypted, "no SQLite file, or is encrypted"),
        (_other_table, "no column session_type, created_at, last_active_at"),
        (_empty, "no table named sessions"),
        (_view, "no table named sessions"),
        (_folder, "is no file"),
        (lambda _: None, "is no file"),
    ]
    for number, (prepare, reason) in enumerate(cases):
        path = tmp_path / f"{number}.db"
        prepare(path)
        with pytest.raises(InvalidInputError, match=reason):
            await import_sqlite(database, path)


async def test_a_locked_file_says_who_to_stop(
    database: Database, old: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_LOCK_SECONDS", 0.0)
    path = old(row(), journal="delete")
    with closing(sqlite3.connect(path, isolation_level=None)) as bot:
        bot.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InvalidInputError, match="stop the old bot"):
            await import_sqlite(database, path)


async def test_a_damaged_file_gives_what_can_be_read_and_tells_of_the_rest(
    database: Database, old: Callable[..., Path]
) -> None:
    path = old(*(row(f"{number:03}") for number in range(50)))
    content = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        page = connection.execute(
            "SELECT max(pageno) FROM dbstat WHERE name = 'sessions' AND pagetype = 'leaf'"
        ).fetchone()[0]
    content[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(content)

    report = await import_sqlite(database, path)

    assert report.read == 50 == report.imported + report.rejected
    assert 0 < report.rejected < 50
    assert any("recover" in note for note in report.notes)


async def test_an_import_can_be_stopped_while_the_file_is_opened(
    database: Database, old: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A minute at least, on any machine.
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 300000000) SELECT count(*) FROM r"
    monkeypatch.setattr(sqlite_file, "_COUNT", endless)
    counting = asyncio.Event()
    connect = sqlite_file._open
    loop = asyncio.get_running_loop()

    def opened(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.set_trace_callback(lambda sql: loop.call_soon_threadsafe(counting.set) if sql == endless else None)
        return connection

    monkeypatch.setattr(sqlite_file, "_open", opened)
    task = asyncio.create_task(import_sqlite(database, old(row())))
    await counting.wait()
    began = loop.time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.time() - began < 30


async def test_a_database_that_goes_away_ends_the_import(database: Database, old: Callable[..., Path]) -> None:
    path = old(row("a"))
    await database.engine.dispose()
    await query(database, "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS "
                          "$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$")  # fmt: skip
    await query(database, "CREATE TRIGGER die BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION die()")

    with pytest.raises(StoreUnavailableError):
        await import_sqlite(database, path)


async def test_an_unknown_zone_is_refused(database: Database, old: Callable[..., Path]) -> None:
    path = old()
    for timezone in ("Asia/Nowhere", "../etc/passwd", "", "a\0b"):
        with pytest.raises(InvalidInputError, match="no time zone"):
            await import_sqlite(database, path, timezone=timezone)


async def test_a_file_of_rejects_never_spoils_another(
    database: Database, old: Callable[..., Path], tmp_path: Path
) -> None:
    path = old(row("a", "x"))
    notes = tmp_path / "notes.txt"
    notes.write_text("notes\n")
    notes.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")

    for rejects in (notes, link, tmp_path, tmp_path / "no folder" / "r"):
        with pytest.raises(InvalidInputError, match=rejects.name):
            await import_sqlite(database, path, rejects=rejects)
    assert notes.read_text() == "notes\n"
    assert not (tmp_path / "elsewhere").exists()


async def test_rejects_that_others_could_read_are_refused_and_none_leave_no_file(
    database: Database, old: Callable[..., Path], tmp_path: Path
) -> None:
    rejects = tmp_path / "rejects.jsonl"
    path = old(row())
    await import_sqlite(database, path, rejects=rejects)
    assert not rejects.exists()

    rejects.touch(0o644)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        await import_sqlite(database, path, rejects=rejects)


def test_from_a_file_of_500_sessions_to_a_hit_by_the_command_line(empty_url: URL, old: Callable[..., Path]) -> None:
    about = [{"role": "user", "content": "北海道に梅雨がないのはなぜですか", "timestamp": MORNING}]
    path = old(*(row(f"thread:{n}", said_by_turns(4) if n != 321 else said_by_turns(4) + about) for n in range(500)))

    for command in (["migrate"], ["import", "sqlite", str(path), "--guild", "9"], ["archive"], ["embed"]):
        ran = kotonoha(*command, url=empty_url)
        assert ran.code == 0, ran.stderr
    hits = kotonoha("search", "北海道の梅雨", "--guild", "9", "--json", url=empty_url).json["hits"]

    assert hits[0]["location"]["session_key"] == "thread:321"
    again = kotonoha("import", "sqlite", str(path), "--json", url=empty_url).json
    assert (again["read"], again["unchanged"]) == (500, 500)


def test_the_command_line_tells_what_was_set_aside_and_ends_with_1(
    migrated_url: URL, old: Callable[..., Path], tmp_path: Path
) -> None:
    path = str(old(row("good"), row("bad", f"{SECRET}[")))

    shown = kotonoha("import", "sqlite", path, "--dry-run", url=migrated_url)
    assert shown.code == 1
    assert "session bad" in shown.stdout
    assert "no valid JSON" in shown.stdout
    assert "Dry run" in shown.stdout
    assert "--rejects FILE" in shown.stdout
    assert "would import" in shown.stdout
    ran = kotonoha("import", "sqlite", path, "--json", "--rejects", str(tmp_path / "r.jsonl"), url=migrated_url)
    assert ran.code == 1
    assert (ran.json["imported"], ran.json["inner"]["messages"]["imported"]) == (1, 2)
    assert SECRET not in shown.stdout + ran.stdout + ran.stderr
    assert json.loads((tmp_path / "r.jsonl").read_text())["record"]["messages"] == f"{SECRET}["


def test_what_was_set_aside_is_counted_once_and_named_up_to_ten(
    migrated_url: URL, old: Callable[..., Path], tmp_path: Path
) -> None:
    def file(name: str, *rows: tuple[object, ...]) -> str:
        return str(old(*rows).rename(tmp_path / name))

    rejects = tmp_path / "r.jsonl"
    # Its messages go with a session: they are no records of their own.
    few = file("few", row("a", created_at="x"), row("b", "[]x"))

    shown = kotonoha("import", "sqlite", few, "--rejects", str(rejects), url=migrated_url)
    assert "Nothing was imported." in shown.stdout
    assert "more" not in shown.stdout
    assert len(rejects.read_text().splitlines()) == 2

    # The same again, and more: not behind those of the last run.
    many = file("many", *(row(f"bad {number}", "[]x") for number in range(12)))
    shown = kotonoha("import", "sqlite", many, "--rejects", str(rejects), url=migrated_url)
    assert shown.stdout.count("session bad") == 10
    assert "and 2 more" in shown.stdout
    kept = len(rejects.read_text().splitlines())
    assert kept == kotonoha("import", "sqlite", many, "--json", url=migrated_url).json["set_aside"] == 12

    # An import that fails leaves them, one without any removes them.
    assert kotonoha("import", "sqlite", __file__, "--rejects", str(rejects), url=migrated_url).code == 3
    assert rejects.exists()
    good = file("good", row("good"))
    assert kotonoha("import", "sqlite", good, "--rejects", str(rejects), url=migrated_url).code == 0
    assert not rejects.exists()
