"""Files -> their text, each as what its content is.

:func:`serve` is a program of its own, that reads the files named on its standard input: a parser that hangs, crashes
or takes all memory on a hostile file is ended, and takes nothing with it.
"""

import json
import math
import os
import re
import signal
import stat
import sys
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any, Final

from kotonoha_store.importers.decoding import decode
from kotonoha_store.importers.document import (
    WRAPPED,
    Document,
    Heading,
    Part,
    PassedOver,
    Unreadable,
    clean,
    instant,
    one_line,
    sections,
)
from kotonoha_store.importers.html_pages import read_html

MARKDOWN_NAMES: Final = (".md", ".markdown")
HTML_NAMES: Final = (".html", ".htm", ".xhtml")
PDF_NAMES: Final = (".pdf",)

_FRONT_MATTER_MAX: Final = 64 * 1024
_VALUES_MAX: Final = 5000
_DEPTH_MAX: Final = 50

_HTML_START: Final = re.compile(
    r"\s*(?:<\?xml[^>]{0,200}\?>\s*)?(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL
)


def read(path: str, *, encoding: str | None = None, max_bytes: int = 2**30) -> Document:
    """Read a file, whatever its name says, as what its content is.

    Args:
        encoding: of text, Markdown and HTML, where it is known; else it is found.
        max_bytes: longer files are refused.

    Raises:
        Unreadable: damaged, protected, too long, without text, or in an unknown encoding.
        OSError: the file cannot be read.
    """
    data, status = _content(path, max_bytes)
    if not data.strip(b"\x00\t\n\f\r "):
        raise PassedOver("empty")
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122  paths stay as the system gives them
    document = _read(data, suffix, encoding)
    if not any(part.text.strip() for part in document.parts):
        raise PassedOver("no text")
    modified = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
    return Document(**{**_fields(document), "size": len(data), "modified_at": modified})


def _content(path: str, max_bytes: int) -> tuple[bytes, os.stat_result]:
    # Non-blocking: a pipe that took the file's place would wait for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("no regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Unreadable(f"longer than {max_bytes // 2**20} MiB; allow more, or divide it")
    return data, status


def _read(data: bytes, suffix: str, encoding: str | None) -> Document:
    if b"%PDF-" in data[:1024]:
        return read_pdf(data)
    try:
        text, notes = decode(data, encoding)
    except PassedOver:
        if suffix in PDF_NAMES:
            raise Unreadable("no PDF, or a damaged one") from None
        raise
    is_html = suffix in HTML_NAMES or _HTML_START.match(text) is not None
    if is_html and suffix not in MARKDOWN_NAMES:
        document = read_html(text)
    elif suffix in MARKDOWN_NAMES:
        document = read_markdown(text)
    else:
        document = Document("text", (Part(text),))
    if suffix in PDF_NAMES:
        notes = (*notes, f"named {suffix}, but it is {document.kind}")
    return Document(**{**_fields(document), "notes": (*notes, *document.notes)})


def _fields(document: Document) -> dict[str, Any]:
    return {name: getattr(document, name) for name in Document.__slots__}


# Markdown

_FRONT_MATTER: Final = re.compile(r"---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def read_markdown(text: str) -> Document:
    """Markdown as it was written, cut at its headings; YAML at its beginning becomes metadata."""
    from markdown_it import MarkdownIt

    notes: tuple[str, ...] = ()
    matter: dict[str, Any] = {}
    begin = 0
    if found := _FRONT_MATTER.match(text, 0, _FRONT_MATTER_MAX):
        try:
            matter = _front_matter(found[1])
            begin = found.end()
        except Unreadable as error:
            notes = (str(error),)
    parser = MarkdownIt("commonmark")
    # Nobody needs the inline syntax of all the text, and it takes most of the time.
    parser.core.ruler.disable("inline")
    starts = [begin]
    for line in text[begin:].split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    headings = []
    tokens = parser.parse(text[begin:])
    for opening, inline in pairwise(tokens):
        if (
            opening.type == "heading_open"
            and opening.level == 0
            and opening.map
            and (title := _heading(inline.content))
        ):
            first, last = opening.map
            end = min(starts[last], len(text))
            headings.append(Heading(starts[first], end, int(opening.tag[1:]), title))
    title = one_line(matter.get("title")) or (headings[0].title if headings else None)
    says = next((when for key in ("date", "published", "created") if (when := instant(matter.get(key)))), None)
    metadata = {"front_matter": matter} if matter else {}
    return Document("markdown", sections(text, headings, begin), title, says, None, metadata, notes)


def _heading(source: str) -> str | None:
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").parseInline(source[:2000])[0].children or []
    return one_line("".join(" " if each.type == "softbreak" else each.content for each in tokens), 200)


def _front_matter(source: str) -> dict[str, Any]:
    import yaml

    try:
        value = _plain(yaml.safe_load(source), [_VALUES_MAX])
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        raise Unreadable("its front matter is no YAML, and was taken as text") from None
    if not isinstance(value, dict):
        raise Unreadable("its front matter names no values, and was taken as text")
    return value


def _plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """The value as JSON can hold it. Aliases can make endless values of a few lines."""
    left[0] -= 1
    if left[0] < 0 or depth > _DEPTH_MAX:
        raise ValueError("too many values")
    if isinstance(value, dict):
        return {clean(str(key)): _plain(each, left, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each, left, depth + 1) for each in value]
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, date):
        return value.isoformat()
    return clean(str(value))


# PDF

# Incorrect password, unsupported security.
_PROTECTED: Final = (4, 5)
_NO_TITLE: Final = re.compile(r"(?i)untitled.*|microsoft \w+ - .*|.*\.(?:docx?|pptx?|xlsx?|odt|rtf|indd|tex|dvi|pdf)")
_PDF_DATE: Final = re.compile(r"D?:?(\d{4})(\d\d)?(\d\d)?(\d\d)?(\d\d)?(\d\d)?(?:Z|([+-])(\d\d)'?(\d\d)?)?")


def read_pdf(data: bytes) -> Document:
    """A PDF's text, page by page.

    Raises:
        Unreadable: it is damaged, opens with a password only, or has no text.
    """
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) in _PROTECTED:
            raise Unreadable("opens with a password only; save a copy without one") from None
        raise Unreadable("a damaged PDF") from None
    pages = len(pdf)
    parts, failed = [], []
    for index in range(pages):
        try:
            page = pdf[index]
            text_page = page.get_textpage()
            text = _page_of_lines(text_page.get_text_bounded())
            text_page.close()
            page.close()
        except pypdfium2.PdfiumError:
            failed.append(index + 1)
            continue
        if text.strip():
            parts.append(Part(text, page=index + 1, anchor=f"page={index + 1}"))
    if not parts and failed:
        raise Unreadable("a damaged PDF: none of its pages can be read")
    if not parts:
        raise Unreadable("a PDF without text, scanned probably; recognise its text first, by ocrmypdf for example")
    says = {key: line for key, value in pdf.get_metadata_dict().items() if (line := one_line(value, 1000))}
    notes = [f"{len(failed)} damaged pages of {pages} were left out: {_some(failed)}"] if failed else []
    if blank := pages - len(parts) - len(failed):
        notes.append(f"{blank} of {pages} pages have no text")
    metadata: dict[str, Any] = {key.lower(): says[key] for key in ("Author", "Subject", "Keywords") if key in says}
    metadata["pages"] = pages
    title = says.get("Title")
    if title and _NO_TITLE.fullmatch(title):
        title = None
    return Document(
        "pdf", tuple(parts), one_line(title), _pdf_date(says.get("CreationDate")), None, metadata, tuple(notes)
    )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" ..." if len(numbers) > 10 else "")


def _page_of_lines(text: str) -> str:
    # What PDFium writes for a hyphen at the end of a line.
    text = clean(re.sub("[\x02\ufffe]", "", text))
    lines = [line.rstrip() for line in text.split("\n")]
    width = max(map(len, lines))
    joined = lines[:1]
    for previous, line in pairwise(lines):
        # A full line of Japanese goes on in the next, often within a word, which nobody would find then.
        if len(previous) >= width * 0.7 and WRAPPED.search(f"{previous[-1:]}\n{line[:1]}"):
            joined[-1] += line
        else:
            joined.append(line)
    return "\n".join(joined)


def _pdf_date(value: str | None) -> str | None:
    if value is None or not (found := _PDF_DATE.match(value)):
        return None
    year, month, day, hour, minute, second = (
        int(each or least) for each, least in zip(found.groups(), (0, 1, 1, 0, 0, 0), strict=False)
    )
    try:
        offset = timedelta(hours=int(found[8] or 0), minutes=int(found[9] or 0))
        zone = timezone(-offset if found[7] == "-" else offset)
        return instant(datetime(year, month, day, hour, minute, second, tzinfo=zone))
    except ValueError:
        return None


# The program


def serve(memory_bytes: int) -> None:
    """Answer each request, a line of JSON, by another: what :func:`read` returned, or why it did not."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # Whatever a parser prints is no reply.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Whoever asked ends this process in time, unless it is gone itself.
        signal.setitimer(signal.ITIMER_REAL, request.pop("seconds"))
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(answer, allow_nan=False).encode() + b"\n")
        replies.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"document": asdict(read(**request))}
    except PassedOver as error:
        return {"passed_over": str(error)}
    except Unreadable as error:
        return {"unreadable": str(error)}
    except OSError as error:
        return {"unreadable": (error.strerror or type(error).__name__).lower()}
    except MemoryError:
        return {"unreadable": "reading it takes more memory than it may"}
    except RecursionError:
        return {"unreadable": "nested too deeply"}
    except Exception as error:  # noqa: BLE001  of a parser, on a file that may be made for it
        return {"unreadable": f"its parser failed ({type(error).__name__})"}
