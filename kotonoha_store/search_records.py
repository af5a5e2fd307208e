"""Values of a search: filters go in, validated by pydantic; hits come out, frozen."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    FailFast,
    Field,
    JsonValue,
    model_validator,
)

from kotonoha_store.checks import (
    check_count,
    check_number,
)
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.records import SCOPE_FIELDS, BigInt, Input, Instant, JsonObject, SourceType, StoredText

FILTER_MAX_PARTS: Final = 100
FILTER_MAX_DEPTH: Final = 32  # compiling a statement recurses, several frames for each level


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


FilterTime = Annotated[Instant, BeforeValidator(_no_number)]
FilterJson = Annotated[JsonObject, AfterValidator(_searchable_json)]
_Part: TypeAlias = Annotated["SearchFilters | CombinedFilters", BeforeValidator(_is_filters)]
# What names a scope.
_SCOPE_FIELDS: Final = (*SCOPE_FIELDS, "source_ids", "session_keys")


class _Filters(Input):
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
        from_replica: whether the replica answered :meth:`Store.search`; of a unit of work, it says so itself.
    """

    hits: tuple[SearchHit, ...]
    plan: Literal["exact", "index", "words", "hybrid"]
    complete: bool
    hidden_by_threshold: int
    model: str | None
    timings: SearchTimings = SearchTimings(0.0, 0.0)
    from_replica: bool = False


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
