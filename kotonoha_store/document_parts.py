"""Documents -> pieces that know their page or section. Pure: the same parts give the same chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kotonoha_store.checks import check_text
from kotonoha_store.chunking import split_text
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.records import NewChunk


@dataclass(frozen=True, slots=True)
class TextPart:
    """A part of a document that no chunk reaches beyond: a page, a section, or all of it.

    Attributes:
        text: may be blank; then it has no chunk.
        label: what people call the part, such as ``page 7``.
        url: a link to it, such as ``report.pdf#page=7``; the document's where there is none.
        start: where its text begins, in characters, in what positions are counted in; 0 where they are the part's own.
        location: stored with each of its chunks, beside ``url``, ``label``, ``chunk_index``, ``start`` and ``end``.
    """

    text: str = field(repr=False)
    label: str | None = None
    url: str | None = None
    start: int = 0
    location: Mapping[str, Any] = field(default_factory=dict)


def document_chunks(
    text: str | Sequence[TextPart],
    *,
    uri: str | None = None,
    occurred_at: datetime | None = None,
    max_tokens: int = 4000,
    overlap_ratio: float = 0.2,
) -> list[NewChunk]:
    """Cut a document into chunks as :func:`kotonoha_store.chunking.split_text` does, each within one part.

    Args:
        text: the whole text, or its parts in their order.
        uri: what chunks of parts without a link of their own link to.
        occurred_at: the time of all chunks, with its zone.

    Raises:
        InvalidInputError: these are no parts, or a value is out of range or cannot be stored.
    """
    parts = text if isinstance(text, Sequence) and not isinstance(text, str | bytes) else [TextPart(text)]
    chunks: list[NewChunk] = []
    for part in parts:
        if not isinstance(part, TextPart):
            raise InvalidInputError(f"a document is a text or a sequence of TextPart, not of {type(part).__name__}")
        check_text(part.text, "text")
        for piece in split_text(part.text, max_tokens=max_tokens, overlap_ratio=overlap_ratio):
            start, end = part.start + piece.start, part.start + piece.end
            characters = f"characters {start + 1} to {end}"
            chunks.append(
                NewChunk(
                    content=piece.content,
                    token_count=piece.token_count,
                    occurred_from=occurred_at,
                    occurred_to=occurred_at,
                    location={
                        **part.location,
                        "url": part.url or uri,
                        "label": f"{part.label}, {characters}" if part.label else characters,
                        "chunk_index": len(chunks),
                        "start": start,
                        "end": end,
                    },
                )
            )
    return chunks
