"""Out as lines of JSON and back: row by row, into an empty database and into others, from files that are damaged."""

import asyncio
import base64
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_data import query
from command_line import kotonoha
from conftest import new_database, run_sql, settings_for
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError

from kotonoha_store import (
    Base,
    Database,
    ErrorCode,
    InvalidInputError,
    Message,
    NewChunk,
    SchemaOutdatedError,
    Scope,
    Store,
    transfer,
)
from kotonoha_store.importers.jsonl import import_documents
from kotonoha_store.transfer import TABLES, ExportFilters, export_jsonl
from kotonoha_store.transfer_import import import_jsonl
from kotonoha_store.transfer_lines import _json, _Number, parse_line

BIG = 2**63 - 1
MOMENT = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
MADE = {"chunk_terms", "term_frequencies"}
"""What is made of the rest, and not exported."""

# Numbers that Python's own would change, keys and texts of every kind.
ODD_JSON = """{"big": 9007199254740993, "long": 12345678901234567890123456789.12345678901234567890, "trailing": 1.10,
"tiny": 1e-30, "minus": -0.5, "梅雨": ["😀", null, true, {"": "\\" \\\\ \\n \\u2028"}]}"""


async def fill(store: Store) -> None:
    """Rows of every table and state, with values at the edges."""
    vectors = np.random.default_rng(5).standard_normal((3, 1536)).astype(np.float16)
    vectors[0, :4] = [-0.0, 6e-8, 65504, -65504]
    async with store.begin() as tx:
        messages = [
            Message.user("梅雨がない？😀", message_id=BIG, timestamp=MOMENT),
            Message.assistant("北海道\n"),
        ]
        await tx.sessions.append("thread:1", messages * 4, session_type="thread", guild_id=BIG, user_id=-BIG - 1)
        await tx.sessions.append("dm:2", [Message.user("short")], session_type="dm")
    await store.archiver.run_once(idle_for=timedelta(0))
    async with store.begin() as tx:
        await tx.sessions.append("thread:1", [Message.user("later")], session_type="thread")
        chunks = [
            NewChunk("vector", {"a": 1}, 3, MOMENT, MOMENT, vectors[0], "model"),
            NewChunk("second", {}, None, None, None, vectors[1], "model"),
            NewChunk("waits"),
            NewChunk("dies"),
            NewChunk("leased"),
        ]
        await tx.knowledge.put_document("文書", chunks, uri="file:/a?b=%20", scope=Scope(guild_id=7, channel_id=8))
        await tx.knowledge.put_document("no uri", [NewChunk("free")])
        await tx.session.execute(
            text("UPDATE knowledge_sources SET metadata = CAST(:odd AS jsonb) WHERE title = '文書'"), {"odd": ODD_JSON}
        )
    lease = await store.queue.claim(100)
    dies = [each.chunk_id for each in lease.chunks if each.content == "dies"]
    await store.queue.bury(lease, dies, ErrorCode.INVALID_INPUT)
    await store.queue.pause("provider", timedelta(hours=1), ErrorCode.RATE_LIMIT)
    async with store.begin() as tx:
        for statement in (
            "UPDATE knowledge_chunks SET created_at = 'infinity' WHERE content = 'second'",
            "INSERT INTO knowledge_chunks_dlq (original_chunk_id, source_id, content, history, last_retry_at)"
            " VALUES (999999, 888888, 'orphan', '[{\"error_code\": 1.50}]', '-infinity'),"
            " (NULL, NULL, 'lone', '[]', NULL)",
        ):
            await tx.session.execute(text(statement.replace(":", r"\:")))


async def everything(database: Database) -> dict[str, list[Any]]:
    tables = sorted(Base.metadata.tables.keys() - {"term_frequencies"})
    async with database.begin() as session:
        return {table: await query(session, f"SELECT to_jsonb(t)::text FROM {table} t ORDER BY 1") for table in tables}


@pytest.fixture
def other_url(server_url: URL, template: URL) -> Iterator[URL]:
    with new_database(server_url, template=str(template.database)) as url:
        yield url


def opened(url: URL) -> Database:
    return Database(url, settings_for(url))


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def sealed(path: Path, body: list[bytes]) -> Path:
    """Write lines with a last one that agrees with them."""
    end = {"lines": len(body), "sha256": hashlib.sha256(b"".join(body)).hexdigest()}
    path.write_bytes(b"".join(body) + b'{"end":' + json.dumps(end).encode() + b"}\n")
    return path


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
async def test_an_empty_database_becomes_what_was_exported_row_by_row(
    store: Store, other_url: URL, tmp_path: Path, name: str
) -> None:
    await fill(store)
    before = await everything(store.database)
    assert {len(rows) for table, rows in before.items()} >= {1, 2, 3}
    assert all(before.values())
    report = await export_jsonl(store.database, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert (report.sessions, report.sources, report.dead_letters, report.pauses) == (2, 3, 3, 1)
    async with opened(other_url) as other:
        for expected in ("imported", "unchanged"):
            done = await import_jsonl(other, tmp_path / name)
            assert await everything(other) == before
            assert getattr(done, expected) == done.read == 3
            assert {key: getattr(counts, expected) for key, counts in done.inner.items()} == {
                "sessions": 2,
                "chunks": report.chunks,
                "dead letters": 3,
                "pauses": 1,
            }
        # Exported there, it is the same file but for its header.
        again = tmp_path / "again.jsonl"
        await export_jsonl(other, again)
        first = (
            gzip.decompress((tmp_path / name).read_bytes()) if name.endswith(".gz") else (tmp_path / name).read_bytes()
        )
        assert lines(again)[1:-1] == first.splitlines(keepends=True)[1:-1]
        # What is new there does not take an id that is to be kept.
        async with Store.open(settings_for(other_url)) as there, there.begin() as tx:
            assert (await tx.knowledge.put_document("new", [NewChunk("new")])).source_id == 4


def test_every_column_of_the_models_is_exported() -> None:
    """A column that is added later fails here until export and import know its type."""
    assert {table.name for table in TABLES.values()} == Base.metadata.tables.keys() - MADE
    for kind, table in TABLES.items():
        columns = [column.name for column in Base.metadata.tables[table.name].columns]
        encoder = transfer._Encoder(kind)
        assert list(json.loads(encoder.object([None] * len(columns)))) == columns


async def test_numbers_times_and_vectors_are_in_the_file_as_they_are(store: Store, tmp_path: Path) -> None:
    await fill(store)
    await export_jsonl(store.database, tmp_path / "all.jsonl")
    content = (tmp_path / "all.jsonl").read_text()
    for part in (
        "9007199254740993",
        "12345678901234567890123456789.12345678901234567890",
        "1.10",
        str(BIG),
        "梅雨がない",
    ):
        assert part in content
    assert "2026-02-03T04:05:06.789012+00:00" in content
    chunk = next(json.loads(line)["chunk"] for line in lines(tmp_path / "all.jsonl") if b'"vector"' in line)
    vector = np.frombuffer(base64.b64decode(chunk["embedding"]), "<f2")
    assert np.signbit(vector[0])
    assert vector[:4].tolist() == [-0.0, float(np.float16(6e-8)), 65504, -65504]
    # A list of numbers does as well.
    kind, values = parse_line(json.dumps({"chunk": {**chunk, "embedding": vector.tolist()}}).encode())
    assert (kind, values["embedding"][4:]) == ("chunk", vector.astype(">f2").tobytes())


async def test_the_export_is_of_one_moment_in_little_memory(
    store: Store, other_url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PAGE", 2)
    monkeypatch.setattr(transfer, "_PREFETCH", 2)
    async with store.begin() as tx:
        for number in range(5):
            await tx.knowledge.put_document(f"d{number}", [NewChunk(f"{number} {each}") for each in range(5)])
    before = await everything(store.database)
    changed = asyncio.Event()

    async def change() -> None:
        async with store.begin() as tx:
            await tx.session.execute(text("DELETE FROM knowledge_sources WHERE title <> 'd0'"))
            await tx.knowledge.put_document("new", [NewChunk("new")])
        changed.set()

    original = transfer._Sink.write_raw

    async def write_raw(self: Any, line: bytes) -> None:
        if b'"source"' in line and not changed.is_set():
            await change()
        await original(self, line)

    monkeypatch.setattr(transfer._Sink, "write_raw", write_raw)
    report = await export_jsonl(store.database, tmp_path / "all.jsonl")
    assert changed.is_set()
    assert (report.sources, report.chunks) == (5, 25)
    async with opened(other_url) as other:
        await import_jsonl(other, tmp_path / "all.jsonl")
        assert await everything(other) == before


async def test_into_a_database_in_use_rows_get_new_ids_and_what_refers_to_them_follows(
    store: Store, other_url: URL, tmp_path: Path
) -> None:
    await fill(store)
    path = tmp_path / "all.jsonl"
    await export_jsonl(store.database, path)
    async with Store.open(settings_for(other_url)) as other:
        async with other.begin() as tx:
            # Other rows have the ids 1, 2 ... there; one session has the key of ours.
            await tx.sessions.append("other", [Message.user("梅雨" * 30), Message.assistant("。")], session_type="dm")
            await tx.sessions.append("dm:2", [Message.user("own")], session_type="dm")
        await other.archiver.run_once(idle_for=timedelta(0))
        await other.add_document("theirs", "text", uri="file:theirs")
        there = await everything(other.database)
        planned = await import_jsonl(other.database, path, dry_run=True)
        assert await everything(other.database) == there
        done = await import_jsonl(other.database, path)
        assert (done.imported, done.inner["sessions"].imported, done.inner["sessions"].kept) == (3, 1, 1)
        assert (planned.imported, planned.inner, planned.details["new ids"]) == (3, done.inner, done.details["new ids"])
        after = await everything(other.database)
        for table in there:
            assert set(there[table]) <= set(after[table])
        again = await import_jsonl(other.database, path)
        assert (again.imported, again.unchanged, again.details["new ids"]) == (0, 3, 0)
        assert await everything(other.database) == after
        async with other.begin() as tx:
            joined = await query(
                tx.session,
                "SELECT session_key FROM knowledge_sources k JOIN sessions s ON s.id = origin_session_id ORDER BY 1",
            )
            assert joined == ["other", "thread:1"]
            texts = await query(
                tx.session,
                "SELECT c.content FROM knowledge_chunks c JOIN knowledge_sources k ON k.id = c.source_id"
                " JOIN chunk_terms USING (id) WHERE k.title = '文書' ORDER BY 1".replace(
                    "USING (id)", "ON chunk_id = c.id"
                ),
            )
            assert texts == ["leased", "second", "vector", "waits"]
        assert await other.queue.requeue() == 1
        assert [hit.title for hit in (await other.search("dies", mode="words", everywhere=True)).hits] == ["文書"]


@pytest.mark.parametrize("archived", [True, False])
async def test_what_was_made_of_a_session_is_not_taken_for_another_session_of_its_id(
    store: Store, other_url: URL, tmp_path: Path, archived: bool
) -> None:
    async def talk(store: Store, key: str) -> None:
        async with store.begin() as tx:
            await tx.sessions.append(key, [Message.user(f"{key} {n} " * 9) for n in range(8)], session_type="thread")

    await talk(store, "alpha")
    await store.archiver.run_once(idle_for=timedelta(0))
    # One of an early version, without a key.
    await run_sql(
        store.database.direct_url,
        "INSERT INTO knowledge_sources (type, title, metadata, origin_session_id, origin_first_index)"
        " VALUES ('discord_session', 'early', '{}', 1, 90)",
    )
    path = tmp_path / "sources.jsonl"
    async with store.begin() as tx:
        ids = tuple(await query(tx.session, "SELECT id FROM knowledge_sources ORDER BY id"))
    assert len(ids) == 2
    await export_jsonl(store.database, path, filters=ExportFilters(source_ids=ids))
    async with Store.open(settings_for(other_url)) as other:
        await talk(other, "beta")
        if archived:
            await other.archiver.run_once(idle_for=timedelta(0))
        first = await import_jsonl(other.database, path)
        after = await everything(other.database)
        again = await import_jsonl(other.database, path)
        assert (first.imported, again.imported, again.unchanged) == (2, 0, 2)
        assert await everything(other.database) == after
        async with other.begin() as tx:
            own = await query(
                tx.session, "SELECT origin_session_key FROM knowledge_sources WHERE origin_session_id = 1"
            )
        assert own == (["beta"] if archived else [])


async def test_a_file_whose_header_says_too_little_leaves_no_id_to_be_given_twice(
    store: Store, other_url: URL, tmp_path: Path
) -> None:
    await fill(store)
    path = tmp_path / "all.jsonl"
    await export_jsonl(store.database, path)
    path.write_bytes(re.sub(rb'"sequences":{[^}]*}', b'"sequences":{}', path.read_bytes()))
    async with Store.open(settings_for(other_url)) as other:
        await import_jsonl(other.database, path, partial=True)
        async with other.begin() as tx:
            await tx.sessions.append("new", [Message.user("text")], session_type="dm")
            await tx.knowledge.put_document("new", [NewChunk("text")])
            (last,) = await query(tx.session, "SELECT max(id) FROM knowledge_chunks")
        assert last > 999999, "a dead letter may want its own back"


@pytest.mark.parametrize(
    ("number", "fits"),
    [
        ("1e4299", True),
        ("-1.5E-16382", True),
        ("1e4300", False),
        ("1e131072", False),
        ("1e-16384", False),
        (f"1e{'9' * 5000}", False),
    ],
)
async def test_a_number_that_could_not_be_stored_and_read_again_spoils_its_line_alone(
    database: Database, number: str, fits: bool
) -> None:
    try:
        _json(_Number(number), "metadata")
    except InvalidInputError:
        assert not fits
    else:
        assert fits
    async with database.begin() as session:
        try:
            await session.execute(text(f"SELECT '{number}'::jsonb"))
        except (DBAPIError, ValueError):
            assert not fits
        else:
            assert fits


async def test_a_line_that_would_fill_the_memory_ends_the_import_with_a_sentence(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kotonoha_store.importers.lines.LONGEST_LINE", 1000)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 10_000_000))
    for read in (import_jsonl, import_documents):
        with pytest.raises(InvalidInputError, match="has more than 1000 bytes"):
            await read(database, path)


async def test_a_stopped_import_goes_on(
    store: Store, other_url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(store)
    before = await everything(store.database)
    path = tmp_path / "all.jsonl"
    await export_jsonl(store.database, path)
    monkeypatch.setattr("kotonoha_store.transfer_import.BATCH_CHUNKS", 1)

    def stop(done: int, total: int | None) -> None:
        if done > 3:
            raise KeyError("stopped")

    async with opened(other_url) as other:
        with pytest.raises(KeyError):
            await import_jsonl(other, path, progress=stop)
        assert 0 < len((await everything(other))["knowledge_sources"]) < 3
        await import_jsonl(other, path)
        assert await everything(other) == before


async def test_a_source_is_there_with_all_of_its_chunks_or_not_at_all(
    store: Store, other_url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(store)
    before = await everything(store.database)
    await export_jsonl(store.database, tmp_path / "all.jsonl")

    async def die(*_: Any) -> None:
        raise KeyError("died")

    async with opened(other_url) as other:
        with monkeypatch.context() as patch:
            patch.setattr("kotonoha_store.transfer_import.write_terms", die)
            with pytest.raises(KeyError):
                await import_jsonl(other, tmp_path / "all.jsonl")
        half = await everything(other)
        assert half["sessions"] == before["sessions"]
        assert not any(half[table] for table in ("knowledge_sources", "knowledge_chunks", "embedding_jobs"))
        await import_jsonl(other, tmp_path / "all.jsonl")
        assert await everything(other) == before


async def test_what_cannot_be_stored_is_set_aside_with_its_source_and_a_reason(
    store: Store, other_url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with store.begin() as tx:
        for number in range(6):
            await tx.knowledge.put_document(f"d{number}", [NewChunk(f"{number} {each}") for each in range(2)])
        await tx.sessions.append("key", [Message.user("text")], session_type="dm")
    path = tmp_path / "all.jsonl"
    await export_jsonl(store.database, path)
    header, *rows, _ = lines(path)
    sources = [index for index, row in enumerate(rows) if row.startswith(b'{"source"')]

    def edit(index: int, old: str, new: str) -> None:
        assert old.encode() in rows[index]
        rows[index] = rows[index].replace(old.encode(), new.encode())

    edit(0, '"text"', r'"a\u0000b"')
    edit(sources[0], '"d0"', r'"\ud800"')
    edit(sources[1] + 1, '"source_id":2', '"source_id":9223372036854775808')
    edit(sources[2] + 2, '"token_count":null', '"token_count":1.5')
    rows[sources[3] + 1] = b"\xff{ no json\n"
    edit(sources[4] + 2, '"embedding":null', f'"embedding":"{base64.b64encode(bytes(3072)).decode()}"')
    sealed(path, [header, *rows])
    aside = tmp_path / "rejects.jsonl"
    async with opened(other_url) as other:
        report = await import_jsonl(other, path, rejects=aside)
        assert report.has_rejects
        assert (report.read, report.imported, report.rejected) == (6, 1, 5)
        assert report.inner["sessions"].rejected == 1
        assert (report.inner["chunks"].imported, report.inner["chunks"].rejected) == (2, 9)
        assert report.inner["unreadable lines"].rejected == 1
        kept = await everything(other)
        assert (len(kept["knowledge_sources"]), len(kept["knowledge_chunks"]), len(kept["sessions"])) == (1, 2, 0)
    records = [json.loads(line) for line in lines(aside)]
    assert len(records) == 16
    assert [record["record"] + "\n" for record in records if record["where"] == "line 2"] == [rows[0].decode()]
    reasons = [record["reason"] for record in records if not record["reason"].startswith("goes with")]
    parts = ("jsonb", "surrogate", "source_id must be", "token_count must be", "not UTF-8", "zeros")
    assert all(part in reason for part, reason in zip(parts, reasons, strict=True)), reasons


async def test_a_file_that_is_cut_off_or_changed_is_noticed_before_anything_is_written(
    store: Store, other_url: URL, tmp_path: Path
) -> None:
    await fill(store)
    path = tmp_path / "all.jsonl"
    await export_jsonl(store.database, path)
    whole = path.read_bytes()
    packed = gzip.compress(whole)
    damaged = {
        "cut off": whole[: len(whole) // 2],
        "last line is missing": whole[: whole.rindex(b'{"end"')],
        "checksum": whole.replace("北海道".encode(), "北海都".encode()),
        "should have": whole.replace(lines(path)[1], b"", 1),
        "compression": packed[: len(packed) // 2],
        "last line is damaged": whole[:-20],
        "no header": whole[10:],
        "format 2": whole.replace(b'"format":1', b'"format":2', 1),
        "a revision that": re.sub(rb'"revision":"[^"]*"', b'"revision":"0099"', whole, count=1),
        "3072 dimensions": whole.replace(b'"dimension":1536', b'"dimension":3072', 1),
        "sequences": re.sub(rb'"sequences":{"session":[0-9]+', b'"sequences":{"session":%d' % BIG, whole),
        "is empty": b"",
    }
    async with opened(other_url) as other:
        empty = await everything(other)
        for problem, content in damaged.items():
            path.write_bytes(content)
            with pytest.raises(InvalidInputError, match=problem):
                await import_jsonl(other, path)
        assert await everything(other) == empty
        with pytest.raises(InvalidInputError, match="cannot be read"):
            await import_jsonl(other, tmp_path)
        # What is intact of it can be had.
        path.write_bytes(damaged["compression"])
        report = await import_jsonl(other, path, partial=True)
        assert report.inner["sessions"].imported == 2
        assert "not whole" in report.notes[0]


async def test_an_export_that_fails_leaves_no_file_and_none_is_overwritten_unasked(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(store)
    path = tmp_path / "all.jsonl"
    path.write_text("precious")
    with pytest.raises(InvalidInputError, match="is there already"):
        await export_jsonl(store.database, path)
    await run_sql(store.database.direct_url, "UPDATE knowledge_sources SET created_at = '10000-01-01' WHERE id = 3")
    with pytest.raises(InvalidInputError, match="years 1 to 9999"):
        await export_jsonl(store.database, path, overwrite=True)
    with pytest.raises(InvalidInputError, match="cannot be written"):
        await export_jsonl(store.database, tmp_path / "no" / "all.jsonl")
    assert os.listdir(tmp_path) == ["all.jsonl"]  # noqa: PTH208  a blocking call either way
    assert path.read_text() == "precious"


async def test_an_export_replaces_no_pipe_or_link_and_of_two_at_once_one_fails(store: Store, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nowhere")
    for path in (pipe, link):
        for overwrite in (False, True):
            with pytest.raises(InvalidInputError, match="no regular file"):
                await export_jsonl(store.database, path, overwrite=overwrite)
    assert (pipe.is_fifo(), link.is_symlink()) == (True, True)
    path = tmp_path / "all.jsonl"

    def made_meanwhile(*_: Any) -> None:
        path.write_text("precious")

    with pytest.raises(InvalidInputError, match="is there already"):
        await export_jsonl(store.database, path, progress=made_meanwhile)
    assert path.read_text() == "precious"
    both = [export_jsonl(store.database, tmp_path / "both.jsonl") for _ in range(2)]
    results = await asyncio.gather(*both, return_exceptions=True)
    assert sum(isinstance(result, InvalidInputError) for result in results) == 1


async def test_filters_export_a_guild_or_single_sources(store: Store, other_url: URL, tmp_path: Path) -> None:
    await fill(store)
    everywhere = await export_jsonl(store.database, tmp_path / "all.jsonl", filters=ExportFilters(guild_id=7))
    assert (everywhere.sessions, everywhere.sources, everywhere.chunks, everywhere.dead_letters) == (0, 1, 4, 1)
    async with store.begin() as tx:
        (source_id,) = await query(tx.session, "SELECT id FROM knowledge_sources WHERE title = 'no uri'")
    one = await export_jsonl(store.database, tmp_path / "one.jsonl", filters=ExportFilters(source_ids=(source_id,)))
    assert (one.sessions, one.sources, one.chunks, one.pauses) == (0, 1, 1, 0)
    header = json.loads(lines(tmp_path / "one.jsonl")[0])["kotonoha_store"]
    assert (header["sequences"]["session"], header["sequences"]["source"]) == (0, source_id)
    async with opened(other_url) as other:
        for name in ("one", "all"):
            assert (await import_jsonl(other, tmp_path / f"{name}.jsonl")).imported == 1
        wanted = [
            row for row in (await everything(store.database))["knowledge_sources"] if "文書" in row or "no uri" in row
        ]
        assert (await everything(other))["knowledge_sources"] == wanted


async def test_vectors_are_written_before_the_index_where_that_is_asked(
    store: Store, other_url: URL, tmp_path: Path
) -> None:
    await fill(store)
    await export_jsonl(store.database, tmp_path / "all.jsonl")
    async with opened(other_url) as other:
        report = await import_jsonl(other, tmp_path / "all.jsonl", rebuild=True)
        assert report.details["vector index"] == "rebuilt"
        again = await import_jsonl(other, tmp_path / "all.jsonl", rebuild=True)
        assert again.details["vector index"] == "kept"


async def test_a_database_of_another_revision_is_refused(empty_url: URL, tmp_path: Path) -> None:
    async with opened(empty_url) as database:
        with pytest.raises(SchemaOutdatedError):
            await export_jsonl(database, tmp_path / "all.jsonl")
        with pytest.raises(SchemaOutdatedError):
            await import_jsonl(database, tmp_path / "all.jsonl")


async def test_documents_of_a_file_are_cut_or_taken_with_their_vectors(database: Database, tmp_path: Path) -> None:
    vector = np.ones(1536, "<f2")
    good: list[dict[str, Any]] = [
        {
            "title": "文書",
            "text": "梅雨がない。",
            "uri": "file:1",
            "guild_id": BIG,
            "occurred_at": "2026-01-01T00:00:00Z",
        },
        {"title": "list", "chunks": [{"content": "a", "embedding": vector.tolist()}], "embedding_model": "m"},
        {
            "title": "base64",
            "chunks": [
                {"content": "b", "embedding": base64.b64encode(vector).decode(), "embedding_model": "m"},
                {"content": "c", "location": {"page": 2**60 + 1}},
            ],
            "metadata": {"author": "😀"},
        },
    ]
    bad = {
        b'{"title": "both", "text": "x", "chunks": []}': "either text or chunks",
        b'{"title": "nul", "text": "a\\u0000b"}': "NUL",
        b'{"self": 1}': "fields that no document has",
        b'{"title": 1, "text": "x"}': "title",
        b'{"title": "x", "chunks": [{"content": "x", "embedding": "@"}]}': "base64",
        b'{"title": "x", "chunks": [{"content": "x", "embedding": [1], "embedding_model": "m"}]}': "1536 dimensions",
        b"[1]": "no JSON object",
        b"\xff": "no JSON",
        b'{"title": "", "text": "x"}': "blank",
    }
    path, aside = tmp_path / "documents.jsonl.gz", tmp_path / "rejects.jsonl"
    rows = [json.dumps(each, ensure_ascii=False).encode() for each in good]
    path.write_bytes(gzip.compress(b"\n".join([*rows[:1], b"", *bad, *rows[1:]])))
    planned = await import_documents(database, path, dry_run=True)
    assert (await everything(database))["knowledge_sources"] == []
    done = await import_documents(database, path, rejects=aside)
    for report in (planned, done):
        assert (report.read, report.imported, report.rejected) == (3 + len(bad), 3, len(bad))
        assert (report.inner["chunks"].imported, report.details["vectors"]) == (4, 2)
    records = [json.loads(line) for line in lines(aside)]
    assert [record["where"] for record in records] == [f"line {number}" for number in range(3, 3 + len(bad))]
    assert all(part in record["reason"] for part, record in zip(bad.values(), records, strict=True)), records
    before = await everything(database)
    assert (await import_documents(database, path)).unchanged == 3
    assert await everything(database) == before
    async with database.begin() as session:
        assert await query(session, "SELECT location ->> 'page' FROM knowledge_chunks WHERE content = 'c'") == [
            str(2**60 + 1)
        ]


def test_the_commands_export_and_import(migrated_url: URL, other_url: URL, tmp_path: Path) -> None:
    source, path = tmp_path / "documents.jsonl", tmp_path / "all.jsonl.gz"
    source.write_text('{"title": "文書", "text": "梅雨", "guild_id": 1}\n{"title": ""}\n')
    ran = kotonoha("import", "jsonl", str(source), "--json", url=migrated_url)
    assert (ran.code, ran.json["imported"], ran.json["rejected"]) == (1, 1, 1)
    assert kotonoha("export", str(path), "--guild", "1", url=migrated_url).code == 0
    refused = kotonoha("export", str(path), url=migrated_url)
    assert (refused.code, refused.stderr.count("\n")) == (3, 1)
    assert kotonoha("export", str(path), "--force", "--json", url=migrated_url).json["sources"] == 1
    plain = kotonoha("export", "-", url=migrated_url)
    assert plain.stdout.encode().splitlines()[1:-1] == gzip.decompress(path.read_bytes()).splitlines()[1:-1]
    dry = kotonoha("import", "jsonl", str(path), "--dry-run", url=other_url)
    assert (dry.code, "nothing was written" in dry.stdout) == (0, True)
    assert kotonoha("import", "jsonl", str(path), "--json", url=other_url).json["imported"] == 1
    assert kotonoha("import", "jsonl", str(path), "--json", url=other_url).json["unchanged"] == 1
    missing = kotonoha("import", "jsonl", str(tmp_path / "nothing"), url=other_url)
    assert (missing.code, missing.stderr.count("\n")) == (3, 1)
