"""What tests of recall share: hits and messages."""

from collections.abc import Sequence
from typing import Any

from kotonoha_store import (
    Message,
    SearchHit,
    SourceType,
)
from kotonoha_store.tokens import count_tokens

KEY = "channel:7"


def hit(chunk_id: int, content: str, **fields: Any) -> SearchHit:
    values: dict[str, Any] = {"source_id": chunk_id, "title": f"title {chunk_id}", "url": None, "location": {}}
    values |= fields
    return SearchHit(
        chunk_id=chunk_id,
        source_type=SourceType.DISCORD_SESSION,
        content=content,
        similarity=None,
        score=1.0 / chunk_id,
        metadata={},
        occurred_from=None,
        occurred_to=None,
        **values,
    )


def of_session(chunk_id: int, content: str, first: int, last: int, *, key: str = KEY) -> SearchHit:
    place = {"session_key": key, "first_message_index": first, "last_message_index": last}
    return hit(chunk_id, content, location=place)


def users(*contents: str) -> list[Message]:
    return [Message.user(content) for content in contents]


def contents(found: Sequence[Message] | Sequence[SearchHit]) -> list[str]:
    return [each.content for each in found]


def tokens_of(messages: Sequence[Message]) -> int:
    """As OpenAI's cookbook counts: around each message, and for a name."""
    names = [message.author for message in messages if message.author]
    texts = [*names, *(message.content for message in messages)]
    return 4 * len(messages) + len(names) + sum(map(count_tokens, texts))
