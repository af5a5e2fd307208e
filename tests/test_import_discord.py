"""Chats exported from Discord: where they land, what is left out or set aside, and what a second run does."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from archiving import append, load, query, said
from command_line import kotonoha
from sqlalchemy import URL

from kotonoha_store import HashingEmbedder, InvalidInputError, Message, SearchFilters, Settings, Store
from kotonoha_store.importers import discord_file
from kotonoha_store.importers.discord import import_discord
from kotonoha_store.importers.report import ImportReport

GUILD = 2**53 + 1
CHANNEL = 2**53 + 3
THREAD = 2**60 + 5
IN_THREAD = {"type": "GuildPublicThread", "id": str(THREAD), "categoryId": str(CHANNEL)}
NOON = datetime(2024, 6, 1, 12, tzinfo=UTC)
SECRET = "秘密の話"


def message(number: int, content: str | None = None, *, at: timedelta | None = None, **values: Any) -> dict[str, Any]:
    """The n-th message as the exporter writes it: a question of a person, or the answer of a bot."""
    is_bot = number % 2 == 1
    return {
        "id": str(2**60 + number),
        "type": "Default",
        "timestamp": (NOON + (timedelta(minutes=number) if at is None else at)).isoformat(),
        "timestampEdited": None,
        "callEndedTimestamp": None,
        "isPinned": False,
        "content": f"{number}番目の梅雨の話をしましょう" if content is None else content,
        "author": {
            "id": "77" if is_bot else "55",
            "name": "kotonoha" if is_bot else "hana",
            "discriminator": "0000",
            "nickname": "言葉" if is_bot else "花",
            "isBot": is_bot,
            "roles": [{"id": "1", "name": "r", "color": None, "position": 1}],
        },
        "attachments": [],
        "embeds": [],
        "stickers": [],
        "reactions": [{"emoji": {"id": "", "name": "🎉"}, "count": 2, "users": []}],
        "mentions": [],
        **values,
    }


def export(messages: list[Any], *, guild: int = GUILD, **channel: Any) -> dict[str, Any]:
    return {
        "guild": {"id": str(guild), "name": "庭", "iconUrl": ""},
        "channel": {
            "id": str(CHANNEL),
            "type": "GuildTextChat",
            "categoryId": "8",
            "category": "Text",
            "name": "雑談",
            "topic": None,
            **channel,
        },
        "dateRange": {"after": None, "before": None},
        "exportedAt": NOON.isoformat(),
        "messages": messages,
        "messageCount": len(messages),
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(value: Any, name: str = "庭 - 雑談 [1].json") -> Path:
        path = tmp_path / "exports" / name
        path.parent.mkdir(exist_ok=True)
        content = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, indent=1).encode()
        path.write_bytes(content)
        return path

    return write


def counted(report: ImportReport) -> tuple[int, ...]:
    return (report.read, report.imported, report.unchanged, report.skipped, report.rejected)


def talk(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [message(number) for number in range(start, start + count)]


async def everything(store: Store) -> list[Any]:
    tables = ("sessions", "knowledge_sources", "knowledge_chunks", "embedding_jobs", "chunk_terms")
    return [str(await query(store.database, f"SELECT * FROM {table} ORDER BY 1")) for table in tables]


async def archived(store: Store, key: str = f"discord:{CHANNEL}") -> list[int]:
    """The numbers of all messages of the session, as archived and as they wait, in their order."""
    rows = await query(
        store.database,
        "SELECT m ->> 'message_id' AS id FROM ("
        " SELECT origin_first_index AS at, archived_messages AS messages FROM knowledge_sources"
        " WHERE origin_session_key = :key UNION ALL"
        " SELECT messages_offset + last_archived_message_index,"
        " jsonb_path_query_array(messages, format('$[%s to last]', last_archived_message_index)::jsonpath)"
        " FROM sessions WHERE session_key = :key) AS held, jsonb_array_elements(messages) WITH ORDINALITY AS e(m, n)"
        " ORDER BY at, n",
        key=key,
    )
    return [int(row.id) - 2**60 for row in rows]


async def test_a_channel_becomes_sources_that_searches_find_with_a_link_to_the_message(
    store: Store, write: Callable[..., Path]
) -> None:
    days = timedelta(days=2)
    later = [
        message(4, "紫陽花はいつ咲きますか", at=days),
        message(5, "六月に咲きます。この庭でもたくさん見られます。", at=days + timedelta(minutes=1)),
    ]
    path = write(export([*talk(4), *later]))
    done: list[tuple[int, int | None]] = []

    report = await import_discord(store, [path], progress=lambda *now: done.append(now))

    assert counted(report) == (6, 6, 0, 0, 0)
    assert report.details["channels"] == 1
    assert report.details["sources"] == 2
    size = path.stat().st_size
    assert (done[0], done[-1]) == ((0, size), (size, size))
    await store.embedding_worker.run_until_empty()
    result = await store.search(
        "紫陽花", mode="words", filters=SearchFilters(guild_id=GUILD, channel_id=CHANNEL), top_k=1
    )
    hit = result.hits[0]
    assert hit.url == f"https://discord.com/channels/{GUILD}/{CHANNEL}/{2**60 + 2}"  # its context
    assert hit.location["last_message_id"] == 2**60 + 5
    uris = await query(store.database, "SELECT DISTINCT uri FROM knowledge_sources")
    assert [row.uri for row in uris] == [f"https://discord.com/channels/{GUILD}/{CHANNEL}"]
    assert hit.title == "紫陽花はいつ咲きますか"
    session = await load(store.database, f"discord:{CHANNEL}")
    assert session.created_at == NOON
    assert session.last_active_at == NOON + timedelta(days=2, minutes=1)
    last = session.messages[-1]
    assert (last.role, last.author, last.metadata) == ("assistant", "言葉", {"author_id": 77})


async def test_messages_keep_the_place_where_they_were_written(store: Store, write: Callable[..., Path]) -> None:
    cases: list[tuple[dict[str, Any], tuple[int | None, ...], str]] = [
        ({"type": "GuildTextChat"}, (GUILD, CHANNEL, None), "channel"),
        (IN_THREAD, (GUILD, CHANNEL, THREAD), "thread"),
        # A thread whose channel is not named.
        ({"type": "GuildPrivateThread", "id": "71", "categoryId": None}, (GUILD, 71, None), "channel"),
        ({"type": "DirectTextChat", "id": "72", "guild": 0}, (None, 72, None), "dm"),
    ]
    for channel, scope, session_type in cases:
        await import_discord(store, [write(export(talk(2), **channel))])

        session = await load(store.database, f"discord:{scope[2] or scope[1]}")
        assert (session.scope.guild_id, session.scope.channel_id, session.scope.thread_id) == scope
        assert session.session_type == session_type


async def test_a_long_channel_stays_short_in_its_session(store: Store, write: Callable[..., Path]) -> None:
    limit = store.settings.kb_archive_max_messages

    report = await import_discord(store, [write(export(talk(3 * limit + 7)))])

    assert report.imported == 3 * limit + 7
    assert await archived(store) == list(range(3 * limit + 7))
    assert len((await load(store.database, f"discord:{CHANNEL}")).messages) <= limit
    assert report.details["sources"] == 4


async def test_monologues_of_bots_do_not_grow_without_end(store: Store, write: Callable[..., Path]) -> None:
    bot = message(1)["author"]

    await import_discord(store, [write(export([message(number, "ok", author=bot) for number in range(130)]))])

    assert await archived(store) == list(range(130))
    assert len((await load(store.database, f"discord:{CHANNEL}")).messages) < 100


async def test_a_second_run_and_a_longer_export_add_only_what_is_new(store: Store, write: Callable[..., Path]) -> None:
    await import_discord(store, [write(export(talk(20, start=10)))])
    first = await everything(store)
    assert counted(await import_discord(store, [write(export(talk(20, start=10)))])) == (20, 0, 20, 0, 0)
    assert await everything(store) == first

    # Reaches further back, too, and goes on where the first one ended.
    longer = await import_discord(store, [write(export(talk(45)))])

    assert counted(longer) == (45, 25, 20, 0, 0)
    assert sorted(await archived(store)) == list(range(45))
    assert counted(await import_discord(store, [write(export(talk(45)))])) == (45, 0, 45, 0, 0)


async def test_what_the_bot_lived_itself_is_not_taken_in_again(store: Store, write: Callable[..., Path]) -> None:
    lived = [Message(role="user", content="x" * 40, message_id=2**60 + n) for n in range(4)]
    await append(store.database, "thread:7", lived[:2], channel_id=CHANNEL, thread_id=THREAD)
    await store.archiver.run_once(idle_for=timedelta(0))
    await append(store.database, "thread:7", lived[2:], channel_id=CHANNEL, thread_id=THREAD)

    report = await import_discord(store, [write(export(talk(6), **IN_THREAD))])

    assert counted(report) == (6, 2, 4, 0, 0)


async def test_parts_of_an_export_are_read_in_their_order_and_messages_in_two_of_them_once(
    store: Store, write: Callable[..., Path]
) -> None:
    for part, name in enumerate(["a.json", *(f"a [part {n}].json" for n in range(2, 12))]):
        folder = write(export(talk(12, start=10 * part)), name).parent

    report = await import_discord(store, [folder, folder / "a.json"])

    assert counted(report) == (132, 112, 20, 0, 0)
    assert report.inner["files"].imported == 11
    assert await archived(store) == list(range(112))


async def test_an_import_that_was_stopped_goes_on_and_doubles_nothing(
    store: Store, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(export(talk(200)))
    monkeypatch.setattr(discord_file, "SLICE_MESSAGES", 60)
    archive = store.archiver.archive
    calls: list[int] = []

    async def archive_once(session_id: int) -> Any:
        calls.append(session_id)
        if len(calls) == 2:
            raise asyncio.CancelledError  # between the append and the archive
        return await archive(session_id)

    monkeypatch.setattr(store.archiver, "archive", archive_once)
    with pytest.raises(asyncio.CancelledError):
        await import_discord(store, [path])
    assert await archived(store) == list(range(100))

    report = await import_discord(store, [path])

    assert counted(report) == (200, 100, 100, 0, 0)
    assert await archived(store) == list(range(200))
    # What had only been appended became a source of its own.
    assert report.details["sources"] == 3


async def test_imports_of_the_same_file_at_once_double_nothing(settings: Settings, write: Callable[..., Path]) -> None:
    path = write(export(talk(230)))
    async with Store.open(settings, HashingEmbedder()) as one, Store.open(settings, HashingEmbedder()) as two:
        reports = await asyncio.gather(*(import_discord(store, [path]) for store in (one, two, one)))
        numbers = await archived(one)

    assert sum(report.imported for report in reports) == 230
    assert all(report.imported + report.unchanged == 230 for report in reports)
    assert sorted(numbers) == list(range(230))


async def test_attachments_stickers_and_embeds_speak_where_there_is_no_other_text(
    store: Store, write: Callable[..., Path]
) -> None:
    attached = [{"id": "1", "url": "https://cdn/x/町.png", "fileName": "町.png", "fileSizeBytes": 3}]
    embeds = [{"title": "天気", "description": "晴れ", "fields": [{"name": "気温", "value": "20度"}]}]
    messages = [
        message(0, "見て", attachments=attached, embeds=embeds, timestampEdited=NOON.isoformat()),
        message(1, "", embeds=embeds, reference={"messageId": str(2**60)}),
        message(2, "", stickers=[{"id": "1", "name": "笑顔"}]),
        message(3, "", forwardedMessage={"content": "転送"}),
        message(4, ""),
        message(5, "Pinned a message.", type="ChannelPinnedMessage"),
        message(6, "Joined the server.", type="8"),
        message(7, "/weather", type="20"),
    ]

    report = await import_discord(store, [write(export(messages))])

    assert counted(report) == (8, 5, 0, 3, 0)
    assert not report.has_rejects
    assert set(report.notes) == {
        "Left out: 1 messages without any text.",
        "Left out: 2 notices of joins, pins, calls and the like.",
    }
    session = await load(store.database, f"discord:{CHANNEL}")
    assert said(session) == ["見て\n[町.png]", "天気\n晴れ\n気温: 20度", "[笑顔]", "転送", "/weather"]
    assert session.messages[0].metadata["attachments"] == ["https://cdn/x/町.png"]
    assert session.messages[0].metadata["edited_at"] == NOON.isoformat()
    assert session.messages[1].metadata["reply_to"] == 2**60


@pytest.mark.parametrize("number", [0, 2, 5])
@pytest.mark.parametrize("wrong_id", ["notanumber", "1"])
async def test_a_message_with_a_wrong_id_turns_no_file_around(
    store: Store, write: Callable[..., Path], number: int, wrong_id: str
) -> None:
    messages = talk(6)
    messages[number] = {**messages[number], "id": wrong_id}

    report = await import_discord(store, [write(export(messages))])

    assert report.imported == (5 if wrong_id == "notanumber" else 6)
    assert report.inner["files"].rejected == 0


async def test_only_the_named_bots_are_the_assistant(store: Store, write: Callable[..., Path]) -> None:
    await import_discord(store, [write(export(talk(2)))], bot_ids=[55])

    assert [m.role for m in (await load(store.database, f"discord:{CHANNEL}")).messages] == ["assistant", "user"]


async def test_bad_messages_are_set_aside_and_the_others_imported(
    store: Store, write: Callable[..., Path], tmp_path: Path
) -> None:
    bad: list[tuple[Any, str]] = [
        (SECRET, "no JSON object"),
        (message(2, SECRET, id=str(2**63)), "its id is no number"),
        (message(2, SECRET, id="x"), "its id is no number"),
        (message(2, SECRET, author=None), "its author has no id"),
        (message(2, SECRET, timestamp=SECRET), "timestamp"),
        (message(2, SECRET, timestamp="2024-06-01T12:00:00"), "timestamp"),
        (message(2, f"{SECRET}\0"), "NUL"),
        (message(2, content=None, timestamp=None), "timestamp"),
        ({**message(2), "content": [SECRET]}, "no text"),
    ]
    path = write(export([*talk(2), *(item for item, _ in bad), message(3), message(4)]))
    rejects = tmp_path / "rejects.jsonl"

    report = await import_discord(store, [path], rejects=rejects)

    assert counted(report) == (13, 4, 0, 0, 9)
    assert [reason in found.reason for found, (_, reason) in zip(report.rejections, bad, strict=True)] == [True] * 9
    assert SECRET not in str(report)
    assert [json.loads(line)["record"] for line in rejects.read_text().splitlines()] == [item for item, _ in bad]
    assert await archived(store) == [0, 1, 3, 4]


def _cut(messages: int = 3) -> bytes:
    whole = json.dumps(export(talk(messages + 1))).encode()
    return whole[: whole.index(str(2**60 + messages).encode()) + 30]


FILES: dict[str, tuple[Any, int, str]] = {
    "cut off": (_cut(), 3, "damaged or cut off after message 3"),
    "nested without end": (
        json.dumps(export(talk(2))).encode().replace(b'], "messageCount"', b", " + b"[" * 2_000_000),
        2,
        "damaged or cut off after message 2",
    ),
    "nested deeply": (
        json.dumps(export([*talk(2), message(2, id="x", deep=0)]))
        .encode()
        .replace(b'"deep": 0', b'"deep": ' + b"[" * 100_000 + b"]" * 100_000),
        2,
        "damaged or cut off after message 2",
    ),
    "followed by other things": (json.dumps(export(talk(2))).encode() + b"{}", 2, "damaged or cut off"),
    "not UTF-8": (json.dumps(export(talk(2, 8))).encode().replace(b"hana", b"\xff"), 0, "damaged or cut off"),
    "no JSON": (b"<html>", 0, "no valid JSON"),
    "empty": (b"", 0, "no valid JSON"),
    "another JSON": ({"messages": talk(2)}, 0, "names no guild and channel"),
    "a list": (talk(2), 0, "names no guild and channel"),
    "no channel id": (export(talk(2), id="x"), 0, "has no id of 64 bits"),
    "newest first": (export(talk(4)[::-1]), 0, "chronological order"),
}


async def test_of_files_that_cannot_be_used_is_told_why_and_the_others_are_imported(
    store: Store, write: Callable[..., Path]
) -> None:
    for number, (case, (content, _, _)) in enumerate(FILES.items()):
        if isinstance(content, bytes):
            content = content.replace(str(CHANNEL).encode(), str(CHANNEL + number).encode())
        write(content, f"{case}.json")
    folder = write(export(talk(5), id=str(THREAD)), "with byte order mark.JSON").parent
    marked = folder / "with byte order mark.JSON"
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    (folder / "notes.txt").write_text("no export")

    report = await import_discord(store, [folder])

    reasons = {Path(each.where).stem: each.reason for each in report.rejections}
    assert reasons.keys() == FILES.keys()
    assert [case for case, (_, _, reason) in FILES.items() if reason not in reasons[case]] == []
    assert report.imported == 5 + sum(count for _, count, _ in FILES.values())
    files = report.inner["files"]
    assert (files.read, files.imported, files.rejected) == (len(FILES) + 1, 1, len(FILES))


async def test_a_dry_run_tells_the_same_and_writes_nothing(store: Store, write: Callable[..., Path]) -> None:
    await import_discord(store, [write(export(talk(5)))])
    before = await everything(store)
    paths = [write(export(talk(9))), write(export(talk(9)), "again.json")]

    report = await import_discord(store, paths, dry_run=True)

    assert report.is_dry_run
    assert counted(report) == (18, 4, 14, 0, 0)
    assert await everything(store) == before


async def test_a_path_without_exports_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no file and no folder"):
        await import_discord(store, [tmp_path / "nothing"])
    with pytest.raises(InvalidInputError, match=r"no \.json file"):
        await import_discord(store, [tmp_path])


def test_from_a_folder_of_exports_to_a_hit_by_the_command_line(migrated_url: URL, write: Callable[..., Path]) -> None:
    folder = write(export([*talk(4), message(4, "紫陽花はいつ咲きますか")])).parent

    ran = kotonoha("import", "discord", str(folder), "--bot-id", "77", "--json", url=migrated_url)
    assert ran.code == 0, ran.stderr
    assert (ran.json["imported"], ran.json["details"]["sources"]) == (5, 1)
    hits = kotonoha("search", "紫陽花", "--mode", "words", "--everywhere", "--json", url=migrated_url).json["hits"]
    assert hits[0]["location"]["last_message_id"] == 2**60 + 4

    write(_cut(), "cut.json")
    cut = kotonoha("import", "discord", str(folder), url=migrated_url)
    assert cut.code == 1
    assert "cut off after message 3" in cut.stdout
