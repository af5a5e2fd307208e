"""What is read of a file: its text, its parts, and what it says about itself."""

from pathlib import Path

import pytest
from document_files import JAPANESE, pdf

from kotonoha_store.errors import ConfigurationError, InvalidInputError
from kotonoha_store.importers import reader_pool
from kotonoha_store.importers.document import Document, PassedOver, Unreadable
from kotonoha_store.importers.reader_pool import ReaderPool
from kotonoha_store.importers.readers import read, read_html, read_markdown, read_pdf


def read_bytes(folder: Path, name: str, content: bytes, **options: object) -> Document:
    path = folder / name
    path.write_bytes(content)
    return read(str(path), **options)


def test_each_page_of_a_pdf_is_a_part_with_its_number() -> None:
    document = read_pdf(
        pdf(("Rain in June",), (), ("梅雨の章", "北海道には梅雨がないと言われて", "いる。"), title="梅雨の報告")
    )
    assert [(part.page, part.anchor, part.start) for part in document.parts] == [(1, "page=1", 0), (3, "page=3", 0)]
    assert document.parts[0].text == "Rain in June"
    # A line that is full goes on in the next, within a word perhaps; a heading does not.
    assert document.parts[1].text == f"梅雨の章\n{JAPANESE}"
    assert document.title == "梅雨の報告"
    assert document.occurred_at == "2000-01-01T00:00:00+00:00"
    assert document.metadata["pages"] == 3
    assert document.notes == ("1 of 3 pages have no text",)


def test_a_pdf_named_by_its_program_has_no_title() -> None:
    assert read_pdf(pdf(("text",), title="Microsoft Word - report.docx")).title is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pdf(("secret",), password="user"), "opens with a password only"),
        (pdf(("text",))[:500], "a damaged PDF"),
        (pdf((), ()), "scanned probably"),
    ],
    ids=["protected", "damaged", "scanned"],
)
def test_a_pdf_without_text_to_import_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read_pdf(content)


def test_a_pdf_that_only_its_owner_may_change_is_read() -> None:
    assert read_pdf(pdf(("open to all",), password="")).parts[0].text == "open to all"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "cp932", "euc_jp", "iso2022_jp", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
@pytest.mark.parametrize("times", [1, 500])
def test_japanese_is_read_in_every_encoding_that_it_is_written_in(encoding: str, times: int, tmp_path: Path) -> None:
    text = f"{JAPANESE}\n" * times
    document = read_bytes(tmp_path, "a.txt", text.encode(encoding))
    assert document.parts[0].text == text
    assert document.notes == ()


def test_other_encodings_are_found_or_given(tmp_path: Path) -> None:
    french = "L'été dernier, à la fenêtre, nous avons mangé des crêpes près du château de la forêt. " * 5
    assert read_bytes(tmp_path, "a.txt", french.encode("cp1252")).parts[0].text == french
    kanji = "東京都千代田区"
    assert read_bytes(tmp_path, "b.txt", kanji.encode("cp932"), encoding="Shift_JIS").parts[0].text == kanji
    page = f'<meta charset="euc-jp"><p>{kanji}'.encode("euc_jp")
    assert read_bytes(tmp_path, "c.html", page).parts[0].text == kanji
    with pytest.raises(Unreadable, match="no encoding 'nope'"):
        read_bytes(tmp_path, "d.txt", b"\xe9t\xe9", encoding="nope")


def test_a_few_damaged_bytes_do_not_turn_the_text_into_another_encoding(tmp_path: Path) -> None:
    document = read_bytes(tmp_path, "a.txt", (JAPANESE * 20).encode()[:-1])
    assert document.parts[0].text == (JAPANESE * 20)[:-1] + "\N{REPLACEMENT CHARACTER}"
    assert document.notes == ("1 characters could not be decoded",)


def test_what_cannot_be_stored_or_seen_is_left_out(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\x00\x07 four\x0cfive\ufeff\u2028six " + "filler " * 20
    document = read_bytes(tmp_path, "a.txt", text.encode())
    assert document.parts[0].text == "one\ntwo\nthree four\nfive\nsix " + "filler " * 20
    assert document.notes == ("1 NUL characters were left out",)
    page = read_html("<html><title>a&#0;b&#xD800;</title><p>c&#xDFFF;d&#1;e")
    assert page.title == "a\ufffdb\ufffd"
    assert page.parts[0].text == "c\ufffdde"


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "a.txt", pdf(("text",))).kind == "pdf"
    assert read_bytes(tmp_path, "b.txt", b"\n<!-- x -->\n<!DOCTYPE html><p>text").kind == "html"
    page = read_bytes(tmp_path, "c.pdf", b"<html><body>Not found")
    assert (page.kind, page.notes) == ("html", ("named .pdf, but it is html",))


@pytest.mark.parametrize(
    ("name", "content", "error", "reason"),
    [
        ("a.txt", b"", PassedOver, "empty"),
        ("b.md", b"\xef\xbb\xbf \r\n", PassedOver, "no text"),
        ("c.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 40, PassedOver, "binary"),
        ("d.pdf", bytes(range(256)) * 40, Unreadable, "no PDF, or a damaged one"),
        ("e.html", b"<html><script>run()</script><nav>Home</nav>", PassedOver, "no text"),
        ("f.txt", b"x" * 1001, Unreadable, "longer than"),
    ],
)
def test_what_has_no_text_is_told_apart(
    name: str, content: bytes, error: type[Unreadable], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Unreadable, match=reason) as caught:
        read_bytes(tmp_path, name, content, max_bytes=1000 if name == "f.txt" else 2**20)
    assert type(caught.value) is error


MARKDOWN = """---
title: 手引き
date: 2024-05-01T09:00:00+09:00
tags: [雨, rain]
weight: .nan
---
Before all headings.

# Guide

## Install `uv`

```sh
# no heading
```

## Use

### Search

Find it.
"""


def test_markdown_is_cut_at_its_headings_and_kept_as_written() -> None:
    document = read_markdown(MARKDOWN)
    assert [part.section for part in document.parts] == [(), ("Guide", "Install uv"), ("Guide", "Use", "Search")]
    for part in document.parts:
        assert MARKDOWN[part.start : part.start + len(part.text)] == part.text
    # All of it but the front matter, and a heading without text stays with what follows.
    assert "".join(part.text for part in document.parts) == MARKDOWN.split("---\n", 2)[2]
    assert document.parts[2].text == "## Use\n\n### Search\n\nFind it.\n"
    assert document.title == "手引き"
    assert document.occurred_at == "2024-05-01T00:00:00+00:00"
    assert document.metadata["front_matter"]["tags"] == ["雨", "rain"]
    assert document.metadata["front_matter"]["weight"] == "nan"


@pytest.mark.parametrize(
    "matter",
    [
        "a: [unclosed",
        "just words",
        "[" * 300,
        "&a [*a]",
        "\n".join(["a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 30))]),
        "n: " + "9" * 5000,
    ],
    ids=["broken", "no values", "deep", "endless", "exploding", "long number"],
)
def test_front_matter_that_is_none_is_text(matter: str) -> None:
    text = f"---\n{matter}\n---\n\nThe body.\n"
    document = read_markdown(text)
    assert "".join(part.text for part in document.parts) == text
    assert document.metadata == {}
    assert len(document.notes) == 1


PAGE = """<!DOCTYPE html>
<!-- saved from url=(0026)https://example.org/a/b.html -->
<html lang="ja"><head><title> 雨の
 話 </title><link rel="canonical" href="/rain#top"><meta property="article:published_time" content="2023-06-01">
<meta name="author" content="言葉"><style>p { color: red }</style></head>
<body><header role="banner">Site</header><nav><a href="/">Home</a></nav><div hidden>not yet</div>
<main><h1 id="top">雨</h1><p>北海道に
は<ruby>梅雨<rp>(</rp><rt>つゆ</rt></ruby>が<b>ない</b>。One
<i>two</i>.<br>three<!-- comment --></p><ul><li>first<li><p>second</ul>
<table><tr><th>a<th>b<tr><td>1<td>2</table><script>run()</script>
<h2>次</h2><pre>
if x:
    y
</pre></main><footer>(c)</footer></body></html>"""


def test_of_a_page_only_what_people_read_is_taken() -> None:
    document = read_html(PAGE)
    first, second = document.parts
    assert first.text.strip() == (
        "# 雨\n\n北海道には梅雨がない。One two.\nthree\n\n- first\n\n- second\n\na | b\n1 | 2"
    )
    assert second.text.strip() == "## 次\n\nif x:\n    y"
    assert (first.section, first.anchor, first.start) == (("雨",), "top", 0)
    assert (second.section, second.anchor, second.start) == (("雨", "次"), None, len(first.text))
    assert document.title == "雨の 話"
    assert document.url == "https://example.org/rain"
    assert document.occurred_at == "2023-06-01T00:00:00+00:00"
    assert document.metadata == {"author": "言葉", "language": "ja"}


def test_what_lies_outside_of_a_small_main_part_is_not_lost() -> None:
    document = read_html("<html><body><p>A long introduction, which matters.</p><article>Short.</article>")
    assert document.parts[0].text == "A long introduction, which matters.\n\nShort."


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "/rain", "https://u:p@example.org/", "http://[", "file:///etc"]
)
def test_a_page_cannot_name_an_address_that_is_none(address: str) -> None:
    assert read_html(f'<html><link rel="canonical" href="{address}"><p>text').url is None


def test_a_page_nested_deeper_than_the_stack_is_read() -> None:
    assert read_html("<div>" * 3000 + "deep").parts[0].text == "deep"


async def test_a_parser_that_hangs_or_crashes_costs_its_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, hanging = tmp_path / "good.txt", tmp_path / "hanging.txt"
    good.write_text("good")
    hanging.write_text("hanging")
    # The last lines of the real program, after a parser that does what the file's name says.
    monkeypatch.setattr(
        reader_pool,
        "_PROGRAM",
        reader_pool._PROGRAM.replace(
            "serve(int",
            "import os, time\n"
            "from kotonoha_store.importers import readers\n"
            "real = readers.read\n"
            "def read(path, **options):\n"
            "    if 'hanging' in path: time.sleep(600)\n"
            "    if 'crashing' in path: os.abort()\n"
            "    if 'greedy' in path: bytearray(2**33)\n"
            "    if 'telling' in path: raise OSError(0, str('DATABASE_URL' in os.environ))\n"
            "    print('noise', flush=True)\n"
            "    return real(path, **options)\n"
            "readers.read = read\n"
            "serve(int",
        ),
    )
    monkeypatch.setenv("DATABASE_URL", "postgresql://secret")
    async with ReaderPool(1, seconds=1.5) as pool:
        for name, reason in {
            "hanging": "longer than 1.5 seconds",
            "crashing": "crashed",
            "greedy": "more memory than it may",
            "telling": "false",
        }.items():
            with pytest.raises(Unreadable, match=reason):
                await pool.read(str(tmp_path / f"{name}.txt"))
            # What does not hang may take what a busy machine needs, to start a process above all.
            monkeypatch.setattr(pool, "_seconds", 60)
            monkeypatch.setitem(pool._request, "seconds", 60)
            assert (await pool.read(str(good))).parts[0].text == "good"
        processes = list(pool._all)
    assert [process.returncode is None for process in processes] == [False]


def test_a_pool_without_its_parsers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="at least 1 file"):
        ReaderPool(0)
    monkeypatch.setattr(reader_pool, "_NEEDED", ("no_such_parser",))
    with pytest.raises(ConfigurationError, match="no_such_parser: pip install"):
        ReaderPool()
