"""Files that are no lines of JSON, and exports of one guild."""

import json
from pathlib import Path

import pytest
from command_line import kotonoha
from sqlalchemy import URL, text

from kotonoha_store import Message, NewChunk, Scope, Store
from kotonoha_store.importers.jsonl import import_documents
from kotonoha_store.transfer import ExportFilters, export_jsonl


@pytest.mark.parametrize("content", [b"SQLite format 3\0\x10" + bytes(range(256)) * 500, b"a,b\n1 2,c\n" * 20,
                                     b"\x1f\x8bnot gzip", "[\n  {\n".encode("utf-16")])  # fmt: skip
def test_a_file_without_any_line_of_json_is_refused_as_a_whole(
    migrated_url: URL, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)

    ran = kotonoha("import", "jsonl", str(path), url=migrated_url)

    assert (ran.code, ran.stdout) == (3, "")
    assert "holds no lines of JSON" in ran.stderr


async def test_an_export_of_a_guild_holds_nothing_of_others_or_of_none(store: Store, tmp_path: Path) -> None:
    async with store.begin() as tx:
        for guild in (7, 8, None):
            await tx.sessions.append(
                f"of {guild}", [Message(role="user", content="x")], session_type="dm", guild_id=guild
            )
            await tx.knowledge.put_document(
                f"source {guild}", [NewChunk(content=f"chunk {guild}")], uri=f"u:{guild}", scope=Scope(guild_id=guild)
            )
            for source in (f"(SELECT id FROM knowledge_sources WHERE title = 'source {guild}')", "NULL"):
                await tx.session.execute(
                    text(
                        "INSERT INTO knowledge_chunks_dlq (source_id, source_title, source_type, content, error_code,"
                        f" error_message, guild_id) VALUES ({source}, 'title', 'web_page', 'dead {guild}', 'x', 'x',"
                        f" {guild or 'NULL'})"
                    )
                )
    path = tmp_path / "guild.jsonl"

    report = await export_jsonl(store.database, path, filters=ExportFilters(guild_id=7))

    assert (report.sessions, report.sources, report.chunks, report.dead_letters) == (1, 1, 1, 2)
    assert report.file_size == path.stat().st_size
    lines = path.read_text()
    found = [f"{what} {guild}" in lines for what in ("of", "source", "chunk", "dead") for guild in (7, 8, None)]
    assert found == [True, False, False] * 4


async def test_a_reason_names_no_more_than_fits_a_line(store: Store, tmp_path: Path) -> None:
    bad = {"title": "t", "chunks": [{"content": "c", "embedding": ["x"] * 1536, "embedding_model": "m"}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(bad))
    report = await import_documents(store.database, tmp_path / "bad.jsonl")
    (rejected,) = report.rejections
    assert 10 < len(rejected.reason) <= 300
