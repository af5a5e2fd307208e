"""HTML -> its text: what people read of a page."""

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from kotonoha_store.importers.document import WRAPPED, Document, Heading, clean, instant, one_line, sections

_SKIPPED: Final = (
    frozenset(("script", "style", "template", "noscript", "head", "title", "nav", "aside", "menu", "dialog"))
    | frozenset(("iframe", "object", "svg", "canvas", "audio", "video", "map", "button", "select", "textarea"))
    | frozenset(("rt", "rp"))
)
_SKIPPED_ROLES: Final = frozenset(("navigation", "banner", "contentinfo", "search", "complementary", "dialog"))
_CONTENT: Final = frozenset(("article", "main", "section", "blockquote"))
_PARAGRAPHS: Final = frozenset(("p", "pre", "table", "ul", "ol", "dl", "blockquote", "figure"))
_BLOCKS: Final = (
    _PARAGRAPHS
    | frozenset(
        (
            "address",
            "article",
            "body",
            "caption",
            "dd",
            "details",
            "div",
            "dt",
            "fieldset",
            "figcaption",
            "footer",
            "form",
        )
    )
    | frozenset(("header", "hgroup", "hr", "li", "main", "section", "summary", "tbody", "tfoot", "thead", "tr"))
)
_HEADINGS: Final = {f"h{level}": level for level in range(1, 7)}
_SPACE: Final = re.compile(r"[ \t\n\r\f]+")
_GAPS: Final = ("", " ", " | ", "\n", "\n\n")
_SAVED_FROM: Final = re.compile(r"<!--\s*saved from url=\(\d+\)(\S{1,2000})", re.IGNORECASE)
_SINGLE_FILE: Final = re.compile(r"<!--\s*Page saved with SingleFile\s+url:\s*(\S{1,2000})", re.IGNORECASE)
_DATES: Final = ("article:published_time", "date", "dc.date", "dc.date.issued", "dcterms.created", "dcterms.date")


def read_html(text: str) -> Document:
    """The text of a page, cut at its headings: what people read, without scripts, styles and navigation."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    names: dict[str, str] = {}
    for meta in soup.find_all("meta", limit=1000):
        key, value = meta.get("property") or meta.get("name"), meta.get("content")
        if isinstance(key, str) and isinstance(value, str):
            names.setdefault(key.lower(), value)
    page = _PageText()
    page.walk(soup.body or soup)
    for found in (soup.find_all("main"), soup.find_all(role="main"), soup.find_all("article")):
        if len(found) == 1:
            main = _PageText()
            main.walk(found[0])
            # What lies outside may be as much a part of it.
            if main.size * 2 >= page.size:
                page = main
            break
    content = "".join(page.pieces)
    title = soup.title and one_line(soup.title.get_text())
    title = title or one_line(names.get("og:title")) or (page.headings[0].title if page.headings else None)
    metadata = {key: line for key in ("author", "description") if (line := one_line(names.get(key), 1000))}
    if soup.html and (lang := one_line(soup.html.get("lang"), 40)):
        metadata["language"] = lang
    says = next((when for key in _DATES if (when := instant(names.get(key)))), None)
    return Document("html", sections(content, page.headings), title, says, _page_url(text, soup, names), metadata)


def _page_url(text: str, soup: Any, names: Mapping[str, str]) -> str | None:
    saved = _SAVED_FROM.search(text, 0, 10_000) or _SINGLE_FILE.search(text, 0, 10_000)
    base = saved[1] if saved else ""
    canonical = soup.find("link", rel="canonical")
    for each in (canonical.get("href") if canonical else None, names.get("og:url"), base):
        if isinstance(each, str) and (url := _web_address(base, each)):
            return url
    return None


def _web_address(base: str, value: str) -> str | None:
    try:
        url = urljoin(base, value.strip()).partition("#")[0]
        parsed = urlsplit(url)
    except ValueError:
        return None
    is_one = parsed.scheme in ("http", "https") and parsed.hostname and not parsed.username and len(url) <= 2000
    return url if is_one and url.isprintable() and " " not in url else None


class _PageText:
    """The text of a part of a page, as it is walked through; without recursion, which a page could exhaust."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.headings: list[Heading] = []
        self.size = 0
        # What comes before the next text: the widest gap that was asked for, and the sign of an item or heading.
        self._gap = ""
        self._sign = ""

    def walk(self, root: Any) -> None:
        from bs4.element import NavigableString, Tag

        todo: list[tuple[Any, bool]] = [(root, True)]
        heading: tuple[Any, int, int] | None = None
        verbatim = 0
        while todo:
            node, opens = todo.pop()
            if not isinstance(node, Tag):
                # Not of its subclasses: comments, scripts, ruby.
                if type(node) is NavigableString:
                    self._write(clean(str(node)), verbatim > 0)
                continue
            name = node.name
            if opens and node is not root and _is_skipped(node):
                continue
            if name == "pre":
                verbatim += 1 if opens else -1
            level = _HEADINGS.get(name)
            if level or name in _BLOCKS:
                self._separate("\n\n" if level or name in _PARAGRAPHS else "\n")
            if opens:
                if name in ("td", "th"):
                    self._separate(" | ")
                todo.append((node, False))
                todo.extend((child, True) for child in reversed(node.contents))
                if name == "li":
                    self._sign = "- "
                elif level and heading is None:
                    self._flush()
                    heading = node, self.size, len(self.pieces)
                    self._sign = "#" * level + " "
            elif name == "br":
                self._separate("\n")
            elif name == "li":
                self._sign = ""
            elif heading is not None and heading[0] is node:
                self._end_heading(*heading)
                heading = None

    def _end_heading(self, node: Any, start: int, first: int) -> None:
        self._sign = ""
        anchor = node.get("id")
        if not isinstance(anchor, str) or not re.fullmatch(r"[^\s#]{1,200}", anchor):
            anchor = None
        if title := one_line("".join(self.pieces[first:]).lstrip("#"), 200):
            self.headings.append(Heading(start, self.size, _HEADINGS[node.name], title, anchor))

    def _write(self, text: str, verbatim: bool) -> None:
        if verbatim:
            text = text.lstrip("\n") if self._gap else text
        else:
            text = _SPACE.sub(" ", WRAPPED.sub("", text))
            if text.startswith(" "):
                self._separate(" ")
        if words := text if verbatim else text.strip(" "):
            self._flush()
            self._add(words)
            if text.endswith(" ") and not verbatim:
                self._separate(" ")

    def _separate(self, gap: str) -> None:
        self._gap = max(self._gap, gap, key=_GAPS.index)

    def _flush(self) -> None:
        if self.pieces:
            self._add(self._gap)
        self._add(self._sign)
        self._gap = self._sign = ""

    def _add(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.size += len(text)


def _is_skipped(tag: Any) -> bool:
    if tag.name in _SKIPPED or tag.has_attr("hidden") or tag.get("aria-hidden") == "true":
        return True
    if tag.name == "footer":
        return not any(parent.name in _CONTENT for parent in tag.parents)
    style = tag.get("style")
    return str(tag.get("role", "")) in _SKIPPED_ROLES or (
        isinstance(style, str) and "display:none" in style.replace(" ", "").lower()
    )
