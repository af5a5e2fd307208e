"""Values that cross the library's boundary: frozen, detached from any connection.

What comes in (:class:`Message`) is validated by pydantic; what goes out is a
frozen, slotted dataclass.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final, Self, TypeAlias
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
)

from kotonoha_store.checks import (
    BIGINT_MAX,
    check_id,
    check_json,
    check_text,
    in_utc,
)
from kotonoha_store.errors import ErrorCode, InvalidInputError

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called during long work with how much is done and how much there is, where that is known."""


class SourceType(StrEnum):
    """Where a knowledge source came from (``source_type_enum``)."""

    DISCORD_SESSION = "discord_session"
    DOCUMENT_FILE = "document_file"
    WEB_PAGE = "web_page"
    IMAGE_CAPTION = "image_caption"
    AUDIO_TRANSCRIPT = "audio_transcript"


class SessionStatus(StrEnum):
    """Whether a session is in use or has been archived (``session_status_enum``)."""

    ACTIVE = "active"
    ARCHIVED = "archived"


class SourceStatus(StrEnum):
    """How far a source's chunks have come (``source_status_enum``).

    ``partial``: some chunks are dead letters, the rest is searchable. ``failed``: all of them are.
    """

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    PARTIAL = "partial"
    FAILED = "failed"


def _storable(value: str) -> str:
    return check_text(value)


def _storable_json(value: object) -> object:
    check_json(value)
    return value


StoredText = Annotated[str, Field(strict=True), AfterValidator(_storable)]
BigInt = Annotated[int, Field(strict=True, ge=-BIGINT_MAX - 1, le=BIGINT_MAX)]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_storable_json)]
Instant = Annotated[AwareDatetime, AfterValidator(in_utc)]


class Input(BaseModel):
    """Base of the validated inputs: frozen, unknown fields refused, errors are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            # The offending value may be private: name the field and the rule, not the input.
            problems = "; ".join(
                ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
                for e in error.errors(include_input=False, include_url=False)
            )
            raise InvalidInputError(f"invalid {type(self).__name__}: {problems}") from None


class Message(Input):
    """One message of a conversation.

    Attributes:
        role: who speaks, as the chat APIs name it: ``user``, ``assistant``, ``system``, ``tool`` ...
        content: the text; may be empty (an attachment alone).
        timestamp: when it was said, given with its time zone and kept in UTC. None only for stored
            messages that never had one.
        author: the speaker's display name.
        message_id: the platform's id (64-bit integers survive), used for links.
        metadata: anything else to keep with the message.
    """

    role: Annotated[StoredText, Field(min_length=1, max_length=64)]
    content: StoredText
    timestamp: Instant | None = Field(default_factory=lambda: datetime.now(UTC))
    author: StoredText | None = None
    message_id: BigInt | StoredText | None = None
    metadata: JsonObject = Field(default_factory=dict)

    @classmethod
    def user(cls, content: str, **fields: Any) -> Self:
        """A message of the person."""
        return cls(role="user", content=content, **fields)

    @classmethod
    def assistant(cls, content: str, **fields: Any) -> Self:
        """A message of the bot."""
        return cls(role="assistant", content=content, **fields)

    @classmethod
    def system(cls, content: str, **fields: Any) -> Self:
        """An instruction to the bot."""
        return cls(role="system", content=content, **fields)

    @classmethod
    def from_stored(cls, data: object) -> Self:
        """Read a message as another program may have stored it: leniently, losing nothing.

        A missing role becomes ``user``, a missing or null content the empty text, an unreadable
        timestamp None; unknown fields and unreadable values are kept under ``metadata`` (as
        ``stored.<name>`` where that name is taken), and what fits no message at all as JSON text
        under ``metadata["stored"]``.
        """
        try:
            return cls._from_object(data) if isinstance(data, dict) else cls._blank(metadata={"stored": data})
        except InvalidInputError:
            return cls._blank(metadata={"stored": json.dumps(data)})

    @classmethod
    def _blank(cls, **fields: Any) -> Self:
        return cls(**{"role": "user", "content": "", "timestamp": None, **fields})

    @classmethod
    def _from_object(cls, data: dict[str, Any]) -> Self:
        if data.keys() <= cls.model_fields.keys():
            with suppress(InvalidInputError):
                return cls._blank(**data)  # as to_stored() writes it
        metadata = dict(data["metadata"]) if isinstance(data.get("metadata"), dict) else {}
        fields: dict[str, Any] = {}
        for name, value in data.items():
            if name == "metadata" and isinstance(value, dict):
                continue
            if name in cls.model_fields and value is None:
                continue
            if name in cls.model_fields and name != "metadata":
                with suppress(InvalidInputError):
                    fields[name] = getattr(cls._blank(**{name: value}), name)
                    continue
            while name in metadata:
                name = f"stored.{name}"
            metadata[name] = value
        return cls._blank(**fields, metadata=metadata)

    def to_stored(self) -> dict[str, Any]:
        """The JSON object that stands in ``sessions.messages``; absent fields are left out."""
        stored: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        if not self.metadata:
            del stored["metadata"]
        return stored


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose a session, source or chunk is. Discord's ids: signed 64-bit integers."""

    guild_id: int | None = None
    channel_id: int | None = None
    thread_id: int | None = None
    user_id: int | None = None

    def __post_init__(self) -> None:
        for name in SCOPE_FIELDS:
            value = getattr(self, name)
            if value is not None:
                check_id(value, name)


SCOPE_FIELDS: Final = tuple(each.name for each in fields(Scope))
"""The columns that sessions, sources, chunks and dead letters have of it."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as it was when it was read.

    Attributes:
        messages: those still in the session, oldest first (all, or the last n that were asked for).
        message_count: how many the session holds.
        messages_offset: how many were removed before them; ``messages_offset + i`` is a message's
            absolute index for life.
        last_archived_message_index: how many of the held messages are archived already.
        version: raised by every change; what :meth:`SessionRepository.save` compares.
    """

    id: int
    session_key: str
    session_type: str
    status: SessionStatus
    scope: Scope
    messages: tuple[Message, ...]
    message_count: int
    messages_offset: int
    last_archived_message_index: int
    version: int
    rewrite_version: int
    created_at: datetime
    last_active_at: datetime


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session without its messages, as lists give it."""

    id: int
    session_key: str
    session_type: str
    status: SessionStatus
    scope: Scope
    message_count: int
    version: int
    created_at: datetime
    last_active_at: datetime


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What an append did: the session's id, its version, and how many messages it holds now."""

    session_id: int
    version: int
    message_count: int


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A knowledge source."""

    id: int
    type: SourceType
    title: str
    uri: str | None
    status: SourceStatus
    error_code: str | None
    error_message: str | None
    scope: Scope
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to insert.

    Attributes:
        content: the text that is embedded and shown; not blank.
        location: where in the source it stands (JSON).
        token_count: tokens of ``content``.
        occurred_from, occurred_to: when the first and the last thing in it was said.
        embedding: a vector that exists already, with ``embedding_model``; else the chunk is queued.
    """

    content: str
    location: dict[str, Any] = field(default_factory=dict)
    token_count: int | None = None
    occurred_from: datetime | None = None
    occurred_to: datetime | None = None
    embedding: Any = field(default=None, repr=False)
    embedding_model: str | None = None


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """What :meth:`Store.add_document` did.

    Attributes:
        added: chunks inserted, waiting for a vector.
        kept: chunks whose text had not changed; their vectors stay.
        removed: chunks of the earlier text that are gone.
    """

    source_id: int
    added: int
    kept: int
    removed: int


@dataclass(frozen=True, slots=True)
class ClaimedChunk:
    """A chunk that this worker may embed until its lease ends.

    Attributes:
        attempt: 1 the first time.
    """

    chunk_id: int
    source_id: int
    content: str = field(repr=False)
    attempt: int
    token_count: int | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Jobs claimed together under one token. Writes that name another token change nothing.

    Attributes:
        buried: chunks that had used up their attempts and became dead letters instead of being claimed.
        provider_has_failed: whether failed calls of the provider are on record.
    """

    token: UUID
    chunks: tuple[ClaimedChunk, ...]
    expires_at: datetime | None
    buried: tuple[int, ...] = ()
    provider_has_failed: bool = False

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        return tuple(chunk.chunk_id for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class EmbeddingReport:
    """What became of the chunks that were claimed.

    Attributes:
        embedded: have their vector now.
        reused: those of ``embedded`` whose text had one already, or came twice: nothing was paid for them.
        deferred: put off without a fault of theirs, to be tried again later.
        failed: put off after a failed attempt.
        buried: now dead letters.
        lost: given to another worker meanwhile; its result counts.
    """

    claimed: int = 0
    embedded: int = 0
    reused: int = 0
    deferred: int = 0
    failed: int = 0
    buried: int = 0
    lost: int = 0

    def __add__(self, other: "EmbeddingReport") -> "EmbeddingReport":
        return EmbeddingReport(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A chunk that could not be embedded, with all it needs to be queued again.

    Attributes:
        retry_count: how many attempts it had.
        created_at: when it was buried.
        last_retry_at: when it was last queued again before that.
        history: its earlier deaths, the oldest first, at most 20: ``error_code``, ``error_message``,
            ``retry_count``, ``embedding_model``, ``buried_at``, ``requeued_at``.
    """

    id: int
    original_chunk_id: int | None
    source_id: int | None
    source_title: str | None = field(repr=False)
    source_type: SourceType | None
    content: str = field(repr=False)
    location: dict[str, Any]
    token_count: int | None
    scope: Scope
    occurred_from: datetime | None
    occurred_to: datetime | None
    error_code: ErrorCode | str | None
    error_message: str | None
    retry_count: int
    embedding_model: str | None
    created_at: datetime
    last_retry_at: datetime | None
    history: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Requeued:
    """What :meth:`~kotonoha_store.EmbeddingQueue.requeue_embedded` did, or with a dry run would do.

    Attributes:
        queued: chunks that were queued again.
        waiting: chunks that were in the queue already.
    """

    queued: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How the queue stands.

    Attributes:
        ready: due; claimed as soon as a worker has time and its provider is not paused.
        waiting: leased, or put off until later.
        leased: those of ``waiting`` that a worker holds.
        dead: dead letters.
        oldest_seconds: age of the oldest job.
    """

    ready: int
    waiting: int
    leased: int
    dead: int
    oldest_seconds: float | None


@dataclass(frozen=True, slots=True)
class ProviderPause:
    """A provider that is left alone, or has failed lately.

    Attributes:
        remaining: how long no worker claims for it.
        failures: calls that failed in a row. From 3 on, or when it refused key or model, which counts as many, it is
            asked for a single word before anything is claimed.
        error_code: of the last failure.
    """

    provider: str
    remaining: timedelta
    failures: int
    error_code: ErrorCode | str | None
