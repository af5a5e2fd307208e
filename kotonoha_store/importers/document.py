"""What is read from a file: a document's text, in parts that know their page or section."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any, Final, Literal, TypeAlias

Kind: TypeAlias = Literal["text", "markdown", "html", "pdf"]

_TITLE_MAX: Final = 300
# Kana, kanji and what stands between them within a sentence.
_JOINED: Final = "\u3001\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"

WRAPPED: Final = re.compile(rf"(?<=[{_JOINED}])[ \t]*\n[ \t\n]*(?=[{_JOINED}])")
"""The end of a line within such writing, which is no space (CSS Text, 4.1.3): a word with one in it is not found."""


class Unreadable(Exception):
    """Why a file has no text to import; says nothing of what it holds."""


class PassedOver(Unreadable):
    """The file is none that anybody meant: empty, or no text at all."""


@dataclass(frozen=True, slots=True)
class Part:
    """A page, a section, or the whole text.

    Attributes:
        start: where it begins, in characters: of a section, in the document's text; of a page, 0.
        page: the page's number, from 1.
        section: the headings it stands under, the outermost first.
        anchor: what a link to it ends in, after ``#``.
    """

    text: str = field(repr=False)
    start: int = 0
    page: int | None = None
    section: tuple[str, ...] = ()
    anchor: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """What was read from a file.

    Attributes:
        title: from the document itself, or None.
        occurred_at: the date that the document gives for itself: ISO 8601 in UTC, or None.
        url: where the document says that it is published.
        metadata: what else it says about itself.
        notes: what was left out or guessed.
        size: of the file, in bytes.
        modified_at: of the file: ISO 8601 in UTC.
    """

    kind: Kind
    parts: tuple[Part, ...] = field(repr=False)
    title: str | None = None
    occurred_at: str | None = None
    url: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    size: int = 0
    modified_at: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Document":
        """The document that ``dataclasses.asdict`` and JSON made this of."""
        parts = (Part(**{**part, "section": tuple(part["section"])}) for part in value["parts"])
        return cls(**{**value, "parts": tuple(parts), "notes": tuple(value["notes"])})


_REMOVED: Final = re.compile("[\x00-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufeff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with ``\\n`` for every line end, and without what PostgreSQL cannot store or nobody can see."""
    text = re.sub("\r\n?|[\x0b\x0c\x85\u2028\u2029]", "\n", text)
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", _REMOVED.sub("", text))


def one_line(value: object, limit: int = _TITLE_MAX) -> str | None:
    """A title or name: one line, not blank, not endless."""
    if not isinstance(value, str) or not (text := " ".join(clean(value).split())):
        return None
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True, slots=True)
class Heading:
    start: int
    end: int
    level: int
    title: str
    anchor: str | None = None


def sections(text: str, headings: Sequence[Heading], begin: int = 0) -> tuple[Part, ...]:
    """Cut at each heading; one with nothing below it stays with the next."""
    parts = []
    path: list[Heading] = []
    start = begin
    for index, heading in enumerate(headings):
        if text[start : heading.start].strip() and (
            index == 0 or text[headings[index - 1].end : heading.start].strip()
        ):
            parts.append(_section(text, start, heading.start, path))
            start = heading.start
        while path and path[-1].level >= heading.level:
            path.pop()
        path.append(heading)
    if text[start:].strip():
        parts.append(_section(text, start, len(text), path))
    return tuple(parts)


def _section(text: str, start: int, end: int, path: Sequence[Heading]) -> Part:
    anchor = path[-1].anchor if path else None
    return Part(text[start:end], start, section=tuple(each.title for each in path), anchor=anchor)


def instant(value: object) -> str | None:
    """A date or time as ISO 8601 in UTC; one without its zone is taken as UTC."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day, tzinfo=UTC)
        if not isinstance(value, datetime) or not 1 < value.year < 9999:
            return None
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        return None
