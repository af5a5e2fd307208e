"""Documents from files: found again with their page or section, replaced when they change, never doubled."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from document_files import JAPANESE, pdf
from sqlalchemy import URL, func, select
from typer.testing import CliRunner, Result

from kotonoha_store import (
    InvalidInputError,
    KnowledgeChunk,
    KnowledgeSource,
    NotFoundError,
    Scope,
    SearchFilters,
    SearchHit,
    SourceType,
    Store,
    TextPart,
)
from kotonoha_store.cli.commands import app
from kotonoha_store.importers import file_paths
from kotonoha_store.importers.file_paths import find_files
from kotonoha_store.importers.files import import_files
from kotonoha_store.importers.report import name

GUIDE = "---\ndate: 2024-05-01\n---\n# Guide\n\n## Install\n\nPump the bilge.\n\n## Use\n\nTurn the capstan.\n"
PAGE = '<html><head><title>Rain</title></head><body><nav>Home</nav><h2 id="jun">June</h2><p>The monsoon comes.</html>'
SCOPE = Scope(guild_id=1, channel_id=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "手引き").mkdir(parents=True)
    (folder / "report.pdf").write_bytes(pdf(("Rain in June",), (), (JAPANESE,), title="梅雨の報告"))
    (folder / "手引き" / "guide.md").write_text(GUIDE)
    (folder / "page.html").write_text(PAGE)
    (folder / "sjis.txt").write_bytes("紫陽花が咲く。\r\n".encode("cp932"))
    return folder


async def find(store: Store, words: str, **scope: Any) -> SearchHit:
    result = await store.search(words, mode="words", filters=SearchFilters(**scope or {"guild_id": 1}))
    assert len(result.hits) == 1, words
    return result.hits[0]


async def stored(store: Store) -> dict[str, set[int]]:
    """The ids of each document's chunks, by its URI. No two documents may have the same."""
    statement = select(KnowledgeSource.uri, func.array_agg(KnowledgeChunk.id)).join(KnowledgeChunk)
    async with store.begin() as tx:
        rows = (await tx.session.execute(statement.group_by(KnowledgeSource.id))).all()
    assert len({uri for uri, _ in rows}) == len(rows)
    return {str(uri): set(ids) for uri, ids in rows}


async def test_a_hit_names_its_page_or_section_and_links_there(store: Store, folder: Path) -> None:
    report = await import_files(store, [folder], scope=SCOPE, base_url="https://example.org/docs")
    assert (report.read, report.imported, report.details["new"], report.rejected) == (4, 4, 4, 0)
    assert report.inner["chunks"].imported == 6
    await store.embedding_worker.run_until_empty()

    page = await find(store, '"梅雨がない"', guild_id=1)
    assert page.content == JAPANESE
    assert page.title == "梅雨の報告"
    assert page.source_type is SourceType.DOCUMENT_FILE
    assert page.url == "https://example.org/docs/report.pdf#page=3"
    assert page.location["page"] == 3
    assert page.location["label"] == f"report.pdf, page 3, characters 1 to {len(JAPANESE)}"

    section = await find(store, "capstan", channel_id=2)
    assert section.url == "https://example.org/docs/%E6%89%8B%E5%BC%95%E3%81%8D/guide.md"
    assert section.location["section"] == ["Guide", "Use"]
    start, end = section.location["start"], section.location["end"]
    assert GUIDE[start:end] == section.content == "## Use\n\nTurn the capstan."
    assert section.location["label"] == f"guide.md, Guide > Use, characters {start + 1} to {end}"
    assert section.occurred_from is not None
    assert section.occurred_from.isoformat() == "2024-05-01T00:00:00+00:00"

    web = await find(store, "monsoon")
    assert (web.source_type, web.title) == (SourceType.WEB_PAGE, "Rain")
    assert web.url == "https://example.org/docs/page.html#jun"
    text = await find(store, "紫陽花")
    assert (text.title, text.content, text.occurred_from) == ("sjis.txt", "紫陽花が咲く。", None)
    assert text.metadata["modified_at"].endswith("+00:00")


async def test_unchanged_files_change_nothing_wherever_they_lie(store: Store, folder: Path, tmp_path: Path) -> None:
    await import_files(store, [folder], scope=SCOPE)
    before = await stored(store)
    assert "docs/report.pdf" in before

    elsewhere = tmp_path / "moved" / "docs"
    shutil.copytree(folder, elsewhere)
    again = await import_files(store, [elsewhere / "sjis.txt", elsewhere], scope=SCOPE)
    assert (again.imported, again.unchanged, again.inner["chunks"].unchanged) == (0, 4, 6)
    assert await stored(store) == before
    # Another scope is another document.
    await import_files(store, [folder / "sjis.txt"], scope=Scope(guild_id=9))
    assert (await find(store, "紫陽花", guild_id=9)).source_id != (await find(store, "紫陽花", guild_id=1)).source_id


async def test_of_a_changed_file_only_what_changed_is_embedded_again(store: Store, folder: Path) -> None:
    await import_files(store, [folder], scope=SCOPE)
    await store.embedding_worker.run_until_empty()
    before = await stored(store)
    (folder / "手引き" / "guide.md").write_text("A preface.\n\n" + GUIDE.split("---\n")[2].replace("bilge", "hold"))
    (folder / "report.pdf").write_bytes(pdf(("New cover",), ("Rain in June",), (), (JAPANESE,), title="梅雨の報告"))
    report = await import_files(store, [folder], scope=SCOPE)
    assert (report.details["new"], report.details["changed"], report.unchanged) == (0, 2, 2)
    assert (report.inner["chunks"].imported, report.details["removed_chunks"]) == (3, 1)
    assert (await store.queue.depth()).ready == 3
    after = await stored(store)
    assert before["docs/report.pdf"] < after["docs/report.pdf"]
    moved = await find(store, '"梅雨がない"')
    assert (moved.url, moved.location["page"]) == ("docs/report.pdf#page=4", 4)


async def test_what_is_not_imported_is_counted_and_told(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "notes.txt").write_text("hidden")
    (folder / "loop").symlink_to(folder)
    (folder / "linked.txt").symlink_to(folder / "sjis.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "picture.PNG").write_bytes(b"\x89PNG")
    (folder / "empty.txt").touch()
    (folder / "program.txt").write_bytes(bytes(range(256)) * 9)
    (folder / "closed").mkdir()
    (folder / "damaged.pdf").write_bytes(pdf(("text",))[:400])
    (folder / "protected.pdf").write_bytes(pdf(("text",), password="secret"))
    (folder / "long.txt").write_text("long " * 20_000)

    scan = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(file_paths.os, "scandir", scandir)
    rejects = tmp_path / "rejects.jsonl"
    report = await import_files(store, [folder], scope=SCOPE, max_bytes=50_000, rejects=rejects)
    assert (report.read, report.imported, report.skipped, report.rejected) == (15, 4, 7, 4)
    assert "Passed over: 1 binary, 1 empty, 1 hidden, 1 no regular files, 1 of other types, 2 symbolic links." in (
        report.notes
    )
    assert any(".png 1" in note for note in report.notes)
    assert any("page" in note and "report.pdf" in note for note in report.notes)
    reasons = {Path(each.where).name: each.reason for each in report.rejections}
    assert reasons["closed"] == "permission denied"
    assert reasons["damaged.pdf"] == "a damaged PDF"
    assert "password" in reasons["protected.pdf"]
    assert "longer than" in reasons["long.txt"]
    assert len(rejects.read_text().splitlines()) == 4


async def test_a_long_text_is_one_document_with_positions_up_to_its_end(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20_000 + "zyzzyva")
    report = await import_files(store, [path], scope=SCOPE)
    assert report.inner["chunks"].imported > 10
    assert (await find(store, "zyzzyva")).location["end"] == 45 * 20_000 + 7


async def test_a_dry_run_tells_all_of_it_and_writes_nothing(store: Store, folder: Path) -> None:
    dry = await import_files(store, [folder], scope=SCOPE, dry_run=True)
    assert await stored(store) == {}
    wet = await import_files(store, [folder], scope=SCOPE)
    assert dry.is_dry_run
    assert (dry.imported, dry.inner, dry.details) == (wet.imported, wet.inner, wet.details)


async def test_pruning_deletes_what_lost_its_file_and_nothing_else(store: Store, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for paths, scope in (([folder], SCOPE), ([other], SCOPE), ([folder], Scope(guild_id=9, channel_id=2))):
        await import_files(store, paths, scope=scope)
    await store.add_document("by hand", "not from a file", uri="docs/sjis.txt.bak", guild_id=1, channel_id=2)
    (folder / "sjis.txt").unlink()
    # A page that was saved again, with its address in it, is another document of the same file.
    (folder / "page.html").write_text(PAGE.replace("<head>", '<head><link rel="canonical" href="https://e.org/rain">'))
    # Not imported now, but there.
    (folder / "report.pdf").write_bytes(b"%PDF-1.7 damaged")
    dry = await import_files(store, [folder], scope=SCOPE, prune=True, dry_run=True)
    assert dry.details["pruned"] == 2
    assert {note for note in dry.notes if "Pruned" in note} == {"Pruned: docs/page.html", "Pruned: docs/sjis.txt"}
    assert (await find(store, "紫陽花", guild_id=9)).url == "docs/sjis.txt"
    wet = await import_files(store, [folder], scope=SCOPE, prune=True)
    assert wet.details["pruned"] == 2
    statement = select(KnowledgeSource.uri).where(KnowledgeSource.guild_id == 1)
    async with store.begin() as tx:
        left = (await tx.session.execute(statement)).scalars().all()
    guide = "%E6%89%8B%E5%BC%95%E3%81%8D/guide.md"
    untouched = {f"other/{each}" for each in ("report.pdf", "page.html", "sjis.txt", guide)}
    assert {*left} - untouched == {"docs/report.pdf", f"docs/{guide}", "docs/sjis.txt.bak", "https://e.org/rain"}
    assert {*left} > untouched
    assert (await find(store, "紫陽花", guild_id=9)).url == "docs/sjis.txt"


async def test_a_folder_never_prunes_what_was_imported_from_another_of_its_name(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "b" / "docs"
    other.mkdir(parents=True)
    (other / "only.txt").write_text("text")
    with pytest.raises(InvalidInputError, match="the same name"):
        await import_files(store, [folder, other], scope=SCOPE, prune=True)
    assert not await stored(store)
    await import_files(store, [folder], scope=SCOPE)
    report = await import_files(store, [other], scope=SCOPE, prune=True)
    assert report.details["pruned"] == 0
    assert "4 documents without a file here" in report.notes[0]
    assert len(await stored(store)) == 5


async def test_a_folder_that_may_not_be_mounted_is_not_pruned(store: Store, folder: Path, tmp_path: Path) -> None:
    await import_files(store, [folder], scope=SCOPE)
    for path in list(folder.iterdir()):  # noqa: ASYNC240
        shutil.move(path, tmp_path)
    with pytest.raises(InvalidInputError, match="is it mounted"):
        await import_files(store, [folder], scope=SCOPE, prune=True)
    (folder / "sjis.txt").write_text("text")
    with pytest.raises(InvalidInputError, match="only folders"):
        await import_files(store, [folder / "sjis.txt"], scope=SCOPE, prune=True)
    assert len(await stored(store)) == 4


async def test_two_imports_at_once_leave_one_document_of_each_file(store: Store, folder: Path) -> None:
    reports = await asyncio.gather(*(import_files(store, [folder], scope=SCOPE) for _ in range(2)))
    assert sum(report.imported for report in reports) == sum(report.unchanged for report in reports) == 4
    assert sum(map(len, (await stored(store)).values())) == 6


async def test_an_import_that_was_stopped_goes_on_when_run_again(store: Store, folder: Path) -> None:
    def stop(done: int, _total: int | None) -> None:
        if done == 2:
            raise KeyError

    with pytest.raises(KeyError):
        await import_files(store, [folder], scope=SCOPE, progress=stop)
    assert len(await stored(store)) == 2
    report = await import_files(store, [folder], scope=SCOPE)
    assert (report.imported, report.unchanged) == (2, 2)
    assert len(await stored(store)) == 4


async def test_two_files_of_one_address_do_not_replace_each_other(store: Store, folder: Path) -> None:
    page = PAGE.replace("<head>", '<head><link rel="canonical" href="https://e.org/rain">')
    (folder / "page.html").write_text(page)
    (folder / "page (1).html").write_text(page.replace("monsoon", "typhoon"))
    report = await import_files(store, [folder], scope=SCOPE)
    first = name(str(folder / "page (1).html"))
    assert [each.reason for each in report.rejections] == [f"has the same address as {first}"]
    assert (await find(store, "typhoon")).url == "https://e.org/rain#jun"
    # With a base URL the file's own place counts.
    report = await import_files(store, [folder], scope=SCOPE, base_url="https://e.org/saved/")
    assert not report.rejections
    assert (await find(store, "monsoon")).metadata["published_at"] == "https://e.org/rain"


def test_addresses_are_stable_whatever_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / os.fsdecode(b"caf\xe9 #1?.txt")).write_text("x")
    monkeypatch.chdir(folder)

    def uris(*paths: str, **options: Any) -> list[str]:
        return sorted(file.uri for file in find_files([Path(each) for each in paths], **options).files)

    everything = uris(".")
    assert "docs/caf%E9%20%231%3F.txt" in everything
    assert uris("../docs", str(folder), "sjis.txt") == everything
    assert uris("sjis.txt") == ["docs/sjis.txt"]
    assert uris("手引き", root=folder) == uris("手引き/guide.md", root=folder) == [everything[0]]
    assert uris(".", globs=["手引き/*.MD"]) == [everything[0]]
    assert uris(".", base_url="https://e.org/x", globs=["sjis*"]) == ["https://e.org/x/sjis.txt"]
    with pytest.raises(InvalidInputError, match="outside of the root"):
        uris("sjis.txt", root=folder / "手引き")
    for url in ("example.org", "https://e.org/?a=b", "https://e.org/#a", "https://e .org", "http://["):
        with pytest.raises(InvalidInputError, match="must be an address"):
            uris(".", base_url=url)
    with pytest.raises(InvalidInputError, match="neither user nor password") as caught:
        uris(".", base_url="https://user:geheim@e.org/")
    assert "geheim" not in str(caught.value)
    with pytest.raises(NotFoundError, match=r"nothing.txt cannot be read \(no such file or directory\)"):
        uris("nothing.txt")


async def test_parts_of_a_document_can_be_given_by_anybody(store: Store) -> None:
    parts = [TextPart("first", "page 1", "r#page=1", location={"page": 1}), TextPart(" "), TextPart("second", start=9)]
    await store.add_document("title", parts, uri="r", guild_id=1)
    first, second = await find(store, "first"), await find(store, "second")
    assert (first.url, first.location["page"], first.location["label"]) == ("r#page=1", 1, "page 1, characters 1 to 5")
    assert (second.url, second.location["start"], second.location["label"]) == ("r", 9, "characters 10 to 15")
    for wrong in (["text"], [TextPart("a\x00b")], [TextPart(" ")], b"text"):
        with pytest.raises(InvalidInputError):
            await store.add_document("title", wrong, uri="r", guild_id=1)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _environment(self, migrated_url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATABASE_URL", migrated_url.render_as_string(hide_password=False))

    def run(self, *arguments: object, answer: str = "") -> Result:
        return CliRunner().invoke(app, ["import", "files", *map(str, arguments)], input=answer)

    def test_it_imports_and_prunes_what_is_asked_for(self, folder: Path) -> None:
        result = self.run(folder, "--guild", 1, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["imported"] == 4
        (folder / "sjis.txt").unlink()
        (folder / "damaged.pdf").write_bytes(b"%PDF-")
        result = self.run(folder, "--guild", 1, "--prune", answer="n\n")
        assert (result.exit_code, "not confirmed" in result.stderr) == (1, True)
        result = self.run(folder, "--guild", 1, "--prune", "--yes")
        assert result.exit_code == 1
        assert "Pruned: docs/sjis.txt" in result.stdout
        assert "a damaged PDF" in result.stdout

    def test_what_is_wrong_is_said_in_one_sentence(self) -> None:
        for arguments, code, sentence in (
            (["/no/such/folder"], 3, "/no/such/folder cannot be read"),
            ([".", "--type", "discord_session"], 2, "'document_file', 'web_page'"),
            ([".", "--base-url", "here"], 3, "must be an address"),
            ([".", "--guild", 2**63], 3, "64-bit"),
            ([], 2, "Missing argument"),
        ):
            result = self.run(*arguments)
            assert result.exit_code == code
            assert sentence in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1
