"""Values that cross the library's boundary: frozen, detached from any connection.

What comes in (:class:`Message`, :class:`SearchFilters`) is validated by pydantic; what goes out is a
frozen, slotted dataclass.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from numbers import Real
from typing import Annotated, Any, Final, Literal, Self, TypeAlias
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from kotonoha_store.errors import ErrorCode, InvalidInputError


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


BIGINT_MAX = 2**63 - 1
JSON_MAX_DEPTH = 200  # pydantic refuses more than 255, Python's json a little more
FILTER_MAX_PARTS: Final = 100
FILTER_MAX_DEPTH: Final = 32  # compiling a statement recurses, several frames for each level


def check_id(value: int, what: str = "id") -> int:
    """Return ``value`` if it is a 64-bit integer.

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -BIGINT_MAX - 1 <= value <= BIGINT_MAX:
        raise InvalidInputError(f"{what} must be a 64-bit integer, not {value!r}")
    return value


def check_number(value: object, what: str, least: float, most: float) -> float:
    """Return ``value`` if it is a number from ``least`` to ``most``.

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) <= most:
        raise InvalidInputError(f"{what} must be a number from {least:g} to {most:g}, got {value!r}")
    return float(value)


def check_count(value: object, what: str, least: int, most: int) -> int:
    """Return ``value`` if it is a whole number from ``least`` to ``most``.

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidInputError(f"{what} must be a whole number from {least} to {most}, got {value!r}")
    return value


def check_text(value: str, what: str = "text") -> str:
    """Return ``value`` if PostgreSQL can store it as UTF-8 text.

    Raises:
        InvalidInputError: it is no text, or holds NUL or a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{what} must be text, not {type(value).__name__}")
    if "\x00" in value:
        raise InvalidInputError(
            f"{what} holds a NUL character at position {value.index(chr(0))}, which PostgreSQL cannot store; remove it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"{what} holds a lone surrogate at position {error.start}, which is not valid Unicode; "
            "decode the input with errors='replace'"
        ) from None
    return value


def check_json(value: object, what: str = "JSON value") -> None:
    """Refuse what ``jsonb`` would refuse, before the server does.

    Raises:
        InvalidInputError: NUL or a lone surrogate in a key or string, NaN or infinity, a value that
            JSON does not know, or nesting deeper than :data:`JSON_MAX_DEPTH` (a value that contains
            itself, too); the message gives the path to it.
    """
    # A stack and not recursion: the nesting depth is the caller's.
    stack: list[tuple[object, str, int]] = [(value, what, 0)]
    while stack:
        item, path, depth = stack.pop()
        if depth > JSON_MAX_DEPTH:
            raise InvalidInputError(f"{what} is nested more than {JSON_MAX_DEPTH} levels deep")
        if isinstance(item, str):
            check_text(item, path)
        elif item is None or isinstance(item, (bool, int)):
            continue
        elif isinstance(item, float):
            if item != item or item in (float("inf"), float("-inf")):
                raise InvalidInputError(f"{path} is {item}, which JSON cannot hold")
        elif isinstance(item, dict):
            for key, inner in item.items():
                if not isinstance(key, str):
                    raise InvalidInputError(f"{path} has the key {key!r}; JSON keys are strings")
                check_text(key, f"a key of {path}")
                stack.append((inner, f"{path}.{key}", depth + 1))
        elif isinstance(item, (list, tuple)):
            stack.extend((inner, f"{path}[{index}]", depth + 1) for index, inner in enumerate(item))
        else:
            raise InvalidInputError(f"{path} is of type {type(item).__name__}, which JSON cannot hold")


def in_utc(value: datetime) -> datetime:
    """Return the same instant in UTC: PostgreSQL keeps no offset, and JSON none of odd seconds.

    Raises:
        InvalidInputError: it has no time zone, or lies outside the years 1 to 9999.
    """
    if value.utcoffset() is None:
        raise InvalidInputError("a time needs its time zone, such as tzinfo=datetime.UTC")
    try:
        instant = value.astimezone(UTC)
    except OverflowError:
        raise InvalidInputError("a time lies outside the years 1 to 9999 in UTC") from None
    if instant.replace(tzinfo=None) in (datetime.min, datetime.max):  # noqa: DTZ901  compared without zones
        raise InvalidInputError("the first and the last instant that datetime knows mean infinity to PostgreSQL")
    return instant


def _storable(value: str) -> str:
    return check_text(value)


def _storable_json(value: object) -> object:
    check_json(value)
    return value


def _no_number(value: object) -> object:
    # pydantic would take it for seconds since 1970
    if isinstance(value, int | float) or (isinstance(value, str) and value.strip().isdecimal()):
        raise ValueError("expected a datetime with its zone, or ISO 8601 text")
    return value


def dump_filter_json(value: object, *, sort_keys: bool = False) -> str:
    """Return the JSON text that ``jsonb`` is compared with.

    Raises:
        ValueError: an integer is beyond 4,300 digits.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)


def _searchable_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    dump_filter_json(value)
    return value


def _is_filters(value: object) -> object:
    if not isinstance(value, _Filters):
        raise ValueError(f"expected SearchFilters or CombinedFilters, not {type(value).__name__}")
    return value


StoredText = Annotated[str, Field(strict=True), AfterValidator(_storable)]
BigInt = Annotated[int, Field(strict=True, ge=-BIGINT_MAX - 1, le=BIGINT_MAX)]
JsonObject = Annotated[dict[str, JsonValue], BeforeValidator(_storable_json)]
Instant = Annotated[AwareDatetime, AfterValidator(in_utc)]
FilterTime = Annotated[Instant, BeforeValidator(_no_number)]
FilterJson = Annotated[JsonObject, AfterValidator(_searchable_json)]
_Part: TypeAlias = Annotated["SearchFilters | CombinedFilters", BeforeValidator(_is_filters)]

_SCOPE_FIELDS: Final = ("guild_id", "channel_id", "thread_id", "user_id", "source_ids", "session_keys")


class _Input(BaseModel):
    """Base of the validated inputs: frozen, unknown fields refused, errors are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            # The offending value may be private: name the field and the rule, not the input.
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or type(self).__name__}: {e['msg']}"
                for e in error.errors(include_input=False, include_url=False)
            )
            raise InvalidInputError(f"invalid {type(self).__name__}: {problems}") from None


class Message(_Input):
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


class _Filters(_Input):
    """What ``&``, ``|`` and ``~`` are made of."""

    def __and__(self, other: "AnyFilters") -> "CombinedFilters":
        return _combined("and", self, other)

    def __or__(self, other: "AnyFilters") -> "CombinedFilters":
        return _combined("or", self, other)

    def __invert__(self) -> "CombinedFilters":
        return _combined("not", self)

    def __bool__(self) -> bool:
        # `a and b` would be b, and the scope of a lost.
        raise InvalidInputError("combine filters by & | ~ and not by and, or, not; to ask for None write `is None`")

    # Only what is no filter has left it to these: it gets the same error as on the right.
    def __rand__(self, other: Any) -> "CombinedFilters":
        return _combined("and", other, self)

    def __ror__(self, other: Any) -> "CombinedFilters":
        return _combined("or", other, self)


class SearchFilters(_Filters):
    """What a search is narrowed to; all that is given must hold.

    Guild, channel, thread, user, source ids and session keys name the *scope*; a search without one of
    them must say ``everywhere=True``. Unknown fields and values of the wrong type are refused. An empty
    list keeps nothing. Filters combine by ``&``, ``|`` and ``~`` (:class:`CombinedFilters`).

    Attributes:
        guild_id, channel_id, thread_id, user_id: as on the session or document.
        source_ids: only chunks of these sources.
        source_types: only sources of these types.
        since, until: only chunks whose messages were said at or after / before this time.
        metadata: JSON that the source's metadata must contain (``@>``); 1, "1" and true differ.
        session_keys: only chunks archived from these sessions.
        models: only chunks whose vector was made by one of these models.
        without: only chunks that have none of these, such as documents of a guild that are of no channel.

    Raises:
        InvalidInputError: a field is unknown or its value cannot be searched for; also from ``&`` and
            ``|`` with anything but filters.
    """

    guild_id: BigInt | None = None
    channel_id: BigInt | None = None
    thread_id: BigInt | None = None
    user_id: BigInt | None = None
    source_ids: tuple[BigInt, ...] | None = None
    source_types: tuple[SourceType, ...] | None = None
    since: FilterTime | None = None
    until: FilterTime | None = None
    metadata: FilterJson | None = None
    session_keys: tuple[StoredText, ...] | None = None
    models: tuple[StoredText, ...] | None = None
    without: tuple[Literal["guild_id", "channel_id", "thread_id", "user_id"], ...] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValueError("since must lie before until")
        return self

    @property
    def names_scope(self) -> bool:
        """Whether it is narrowed to a guild, channel, thread, user, to sources or sessions."""
        return any(getattr(self, name) is not None for name in _SCOPE_FIELDS)

    @property
    def is_empty(self) -> bool:
        """Whether it narrows nothing at all."""
        return all(getattr(self, name) is None for name in SearchFilters.model_fields)

    @property
    def _identity(self) -> tuple[object, ...]:
        # The metadata as text: a dict has no hash, and to Python 1 == True.
        metadata = None if self.metadata is None else dump_filter_json(self.metadata, sort_keys=True)
        return metadata, *(getattr(self, name) for name in SearchFilters.model_fields if name != "metadata")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SearchFilters):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


class CombinedFilters(_Filters):
    """Filters joined by ``a & b``, ``a | b`` or negated by ``~a``; these combine further.

    Every condition either holds for a chunk or does not: ``~SearchFilters(channel_id=5)`` keeps chunks
    without a channel, too. ``SearchFilters()`` keeps everything: it changes nothing in ``&``, keeps
    everything in ``|`` and nothing under ``~``.

    Attributes:
        op: ``and``, ``or``, ``not``.
        parts: what is joined; one part for ``not``.

    Raises:
        InvalidInputError: a part is no filter, or there are too many: together at most 100
            :class:`SearchFilters`, combined at most 32 levels deep.
    """

    op: Literal["and", "or", "not"]
    parts: Annotated[tuple[_Part, ...], Field(min_length=1, max_length=FILTER_MAX_PARTS), FailFast()]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.op == "not" and len(self.parts) != 1:
            raise ValueError("not takes exactly one part; join several by & or | first")
        if (count := self._count) > FILTER_MAX_PARTS:
            raise ValueError(f"{count} SearchFilters are combined, at most {FILTER_MAX_PARTS} can be")
        if self._depth > FILTER_MAX_DEPTH:
            raise ValueError(f"filters can be combined at most {FILTER_MAX_DEPTH} levels deep")
        return self

    @property
    def names_scope(self) -> bool:
        """Whether no chunk can be kept that lies outside of every scope named in it.

        ``and``: any part names one; ``or``: every part does; ``not``: never, since it keeps what lies outside.
        """
        if self.op == "and":
            return any(part.names_scope for part in self.parts)
        return self.op == "or" and all(part.names_scope for part in self.parts)

    @property
    def is_empty(self) -> bool:
        """Whether it narrows nothing at all, whatever the values."""
        return _keeps(self) is True

    @property
    def _count(self) -> int:
        return sum(part._count if isinstance(part, CombinedFilters) else 1 for part in self.parts)

    @property
    def _depth(self) -> int:
        return 1 + max(part._depth if isinstance(part, CombinedFilters) else 0 for part in self.parts)


AnyFilters: TypeAlias = SearchFilters | CombinedFilters


def _combined(op: Literal["and", "or", "not"], *filters: Any) -> CombinedFilters:
    parts: list[Any] = []
    for part in filters:
        # a & b & c is one "and" of three, however it is bracketed.
        joins_on = op != "not" and isinstance(part, CombinedFilters) and part.op == op
        parts.extend(part.parts if joins_on else [part])
    return CombinedFilters(op=op, parts=tuple(parts))


def _keeps(filters: AnyFilters) -> bool | None:
    """Whether it keeps everything or nothing; None where that depends on the chunk."""
    if isinstance(filters, SearchFilters):
        return True if filters.is_empty else None
    kept = [_keeps(part) for part in filters.parts]
    if filters.op == "not":
        return None if kept[0] is None else not kept[0]
    decides = filters.op == "or"  # one part that keeps everything decides an "or", nothing an "and"
    if decides in kept:
        return decides
    return None if None in kept else not decides


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose a session, source or chunk is. Discord's ids: signed 64-bit integers."""

    guild_id: int | None = None
    channel_id: int | None = None
    thread_id: int | None = None
    user_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("guild_id", "channel_id", "thread_id", "user_id"):
            value = getattr(self, name)
            if value is not None:
                check_id(value, name)


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
    content: str
    attempt: int
    token_count: int | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Jobs claimed together under one token. Writes that name another token change nothing.

    Attributes:
        buried: chunks that had used up their attempts and became dead letters instead of being claimed.
    """

    token: UUID
    chunks: tuple[ClaimedChunk, ...]
    expires_at: datetime | None
    buried: tuple[int, ...] = ()

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        return tuple(chunk.chunk_id for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A chunk that could not be embedded, with all it needs to be queued again."""

    id: int
    original_chunk_id: int | None
    source_id: int | None
    source_title: str | None
    content: str
    error_code: ErrorCode | str | None
    error_message: str | None
    retry_count: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How the queue stands: ready to claim, leased or deferred, dead; age of the oldest job in seconds."""

    ready: int
    waiting: int
    dead: int
    oldest_seconds: float | None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A chunk that stands next to a hit in its source."""

    chunk_id: int
    content: str
    location: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A chunk that was found.

    Attributes:
        similarity: 1 - cosine distance, in [-1, 1]; nearer to 1 is nearer in meaning. None where it was not
            compared: searches by word alone, chunks that wait for their vector, vectors of another model.
        score: what the hits are ordered by, highest first: the similarity; by word the weight of the words that
            were found; both fused by rank. Comparable within one result only. A diverse result has an order of its own.
        url: a link to the first message or the document, where one is known.
        location: where in the source the chunk stands.
        before, after: its neighbours in the source, in their order, where they were asked for.
    """

    chunk_id: int
    source_id: int
    source_type: SourceType
    title: str
    url: str | None
    content: str
    similarity: float | None
    score: float
    location: dict[str, Any]
    metadata: dict[str, Any]
    occurred_from: datetime | None
    occurred_to: datetime | None
    before: tuple[Neighbour, ...] = ()
    after: tuple[Neighbour, ...] = ()


@dataclass(frozen=True, slots=True)
class Fusion:
    """How a hybrid search weighs meaning and words: each adds weight / (k + rank), ranks counted from 1.

    The defaults were chosen on LoCoMo, where k from 5 to 20, weights of meaning from 0.5 to 0.7 and 30 to 200
    candidates hardly differ (``benchmarks/retrieval.py``); plain fusion (k 60, equal weights) is worse than words.

    Attributes:
        k: the larger, the less the first ranks stand out.
        candidates: how many of each side are fused; pages of one search need the same number.
        neighbour_penalty: what a hit loses for each better one right before or after it in its source, 0 to 1:
            chunks overlap, so it says much of the same.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    words: float = 1.0
    meaning: float = 0.6
    k: float = 10.0
    candidates: int = 50
    neighbour_penalty: float = 0.15

    def __post_init__(self) -> None:
        check_number(self.words, "words", 0, 1e6)
        check_number(self.meaning, "meaning", 0, 1e6)
        if not self.words and not self.meaning:
            raise InvalidInputError("words and meaning must not both weigh nothing")
        check_number(self.k, "k", 0, 1e6)
        check_number(self.neighbour_penalty, "neighbour_penalty", 0, 1)
        check_count(self.candidates, "candidates", 1, 1000)


@dataclass(frozen=True, slots=True)
class SearchTimings:
    """Where the time of a search went, in seconds: making the query's vector, and in the database."""

    embedding: float
    database: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found, best first.

    Attributes:
        hits: at most top_k.
        plan: ``exact`` (every candidate compared), ``index`` (approximate, HNSW), ``words``, or ``hybrid``.
        complete: False when there are fewer hits than top_k although more may exist.
        hidden_by_threshold: found among the top_k, but below the threshold.
        model: the embedding model searched; None for words alone.
    """

    hits: tuple[SearchHit, ...]
    plan: Literal["exact", "index", "words", "hybrid"]
    complete: bool
    hidden_by_threshold: int
    model: str | None
    timings: SearchTimings = SearchTimings(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a change by filter did, or would do.

    Attributes:
        chunks: deleted; of an update, how many the changed sources have, whether the filters keep them or not.
        sources: deleted, or changed.
        dead_letters: deleted; of an update, how many the changed sources have.
        dry_run: whether nothing was changed.
    """

    chunks: int
    sources: int
    dead_letters: int
    dry_run: bool
