"""The plain model of sessions, archive and queue that the state machine keeps beside the database."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

Stored = dict[str, Any]

OVERLAP = 2


@dataclass
class Chat:
    """A session.

    Attributes:
        until: absolute index of the first message that is not archived.
        context: the archived messages that it still holds.
    """

    key: str
    until: int = 0
    context: list[Stored] = field(default_factory=list)
    waiting: list[Stored] = field(default_factory=list)
    is_active: bool = True
    is_too_long: bool = False

    @property
    def messages(self) -> list[Stored]:
        return self.context + self.waiting

    @property
    def row(self) -> tuple[Any, ...]:
        start = self.until - len(self.context)
        return self.key, self.messages, start, len(self.context), self.is_active, self.is_too_long

    def keep(self, until: int) -> None:
        """All before is archived."""
        messages, moved = self.messages, until - self.until
        archived = len(self.context) + moved
        self.context, self.waiting = messages[:archived][-OVERLAP:], messages[archived:]
        self.until = until
        self.is_active = bool(self.waiting)
        self.is_too_long = False


@dataclass
class Source:
    """A document, or what was archived of a session: then with messages."""

    session_id: int | None = None
    key: str | None = None
    first: int | None = None
    messages: list[Stored] | None = None

    @property
    def end(self) -> int:
        assert self.first is not None
        assert self.messages is not None
        return self.first + len(self.messages)


@dataclass
class Chunk:
    source_id: int
    content: str
    state: str = "waiting"
    attempts: int = 0
    token: UUID | None = None
    is_due: bool = True
    deaths: int = 0

    def end(self, state: str) -> None:
        self.state, self.token = state, None

    def release(self, delay: timedelta) -> None:
        self.token, self.is_due = None, not delay
