"""What a search was asked for: checked, and turned into the parameters of its statement."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from kotonoha_store.checks import check_count, check_number, check_text
from kotonoha_store.columns import VectorLike, pack_vector
from kotonoha_store.errors import InvalidInputError
from kotonoha_store.filters import EVERYTHING, Shape, check_scope, parameters, shape
from kotonoha_store.records import SCOPE_FIELDS
from kotonoha_store.search_records import AnyFilters, CombinedFilters, SearchFilters
from kotonoha_store.selectivity import EFFORTS, Effort
from kotonoha_store.word_statements import POOLS, SELECTING_TERMS, WordPlan, WordsShape
from kotonoha_store.words import WordQuery, lookup, parse_query, scope_terms

Match = Literal["any", "all"]

TOP_K_MAX: Final = 1000
"""More rows than pgvector's index can keep in mind (``hnsw.ef_search`` <= 1000) cannot be found through it."""

NEIGHBOURS_MAX: Final = 20

# How many rows of the words' index may be read to find them.
_BUDGET: Final = 3_000.0
# Of chunks that have all that must be there, how many are ranked: the same for every page.
_REQUIRED_POOL: Final = 1_000
# How many of the nearest are fetched for each hit of a diverse result.
_DIVERSE_POOL: Final = 4

# Of lists and texts in the filters.
_REMEMBERED_VALUES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Asked:
    """The filters of a search.

    Attributes:
        scope: terms that every chunk in them holds.
        is_narrowed: whether they ask for more than that.
    """

    filters: AnyFilters
    shape: Shape
    values: dict[str, Any]
    scope: list[str]
    is_narrowed: bool

    @property
    def is_short(self) -> bool:
        """Whether it is worth the memory to remember these filters."""
        return sum(len(value) for value in self.values.values() if isinstance(value, list | str)) <= _REMEMBERED_VALUES

    @classmethod
    def by(cls, filters: AnyFilters) -> "Asked":
        parts = _all_of(filters)
        scope = [term for part in parts for term in scope_terms(**_scope_of(part))]
        asked = shape(filters)
        # Combined filters may ask for nothing, such as ``a | SearchFilters()``.
        is_narrowed = asked != EVERYTHING and len(scope) < sum(
            isinstance(part, CombinedFilters) or len(part.model_dump(exclude_none=True)) for part in parts
        )
        values = parameters(filters) | {"scope": lookup(scope)}
        return cls(filters, asked, values, scope, is_narrowed)


def _all_of(filters: AnyFilters) -> list[AnyFilters]:
    """What must all hold."""
    if isinstance(filters, CombinedFilters) and filters.op == "and":
        return [part for each in filters.parts for part in _all_of(each)]
    return [filters]


def _scope_of(filters: AnyFilters) -> dict[str, int | None]:
    if isinstance(filters, CombinedFilters):
        return {}
    return {name: getattr(filters, name) for name in SCOPE_FIELDS}


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a query, and what must be there."""

    query: WordQuery
    certain: str
    required: str
    guess: str
    match: Match

    @classmethod
    def of(cls, text: str, match: Match) -> "Words":
        if match not in ("any", "all"):
            raise InvalidInputError(f'match must be "any" or "all", got {match!r}')
        query = parse_query(text)
        certain = [phrase.lookup for phrase in query.phrases if phrase.lookup is not None]
        if match == "all" and query.loose:
            certain += query.lookups(query.loose, anywhere=True)
        guesses = [phrase.guess for phrase in query.phrases if phrase.lookup is None and phrase.guess is not None]
        return cls(query, " & ".join(certain), " & ".join([*certain, *guesses]), " & ".join(guesses), match)

    @property
    def is_guess(self) -> bool:
        return self.certain != self.required

    @property
    def plan(self) -> WordPlan:
        if self.required:
            return "required"
        return "scan" if self.query.phrases else "any"

    @property
    def certain_plan(self) -> WordPlan:
        """The plan that relies on no guess."""
        return "required" if self.certain else "scan"

    def shape(self, asked: Asked, plan: WordPlan) -> WordsShape:
        is_ranked = self.match == "any" and bool(self.query.loose)
        return WordsShape(
            asked.shape,
            plan,
            bool(asked.scope),
            asked.is_narrowed,
            bool(self.query.phrases),
            is_ranked=is_ranked,
            is_guessed=bool(self.guess),
        )

    def values(self, *, candidates: int) -> dict[str, Any]:
        pool = next(size for size in POOLS if size >= candidates)
        return {
            "terms": list(self.query.terms),
            "factors": list(self.query.terms.values()),
            "lookups": self.query.lookups(self.query.terms),
            "repetitions": self.query.repetitions(),
            "beyond": self.query.beyond(),
            "pairs_only": self.query.pairs_only,
            "required": self.required,
            "guess": self.guess,
            "phrases": [phrase.text for phrase in self.query.phrases],
            "selecting": SELECTING_TERMS,
            "budget": _BUDGET,
            "first_budget": _BUDGET,
            "candidates": candidates,
            "pool": pool if self.plan == "any" else _REQUIRED_POOL,
        }


@dataclass(frozen=True, slots=True)
class Options:
    """What a search was asked for, checked."""

    asked: Asked
    top_k: int
    offset: int
    threshold: float | None
    diversity: float | None
    neighbours: int

    @property
    def is_diverse(self) -> bool:
        return self.diversity is not None

    def candidates(self, needed: int) -> int:
        """How many to rank: more than are asked for where a choice among them is to be made."""
        return min(TOP_K_MAX, max(_DIVERSE_POOL * needed, 50)) if self.is_diverse else needed

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of the filters and of the page."""
        return self.asked.values | {"top_k": self.candidates(self.top_k), "offset": self.offset}


def check_search(
    top_k: int,
    threshold: float | None,
    filters: AnyFilters | None,
    everywhere: bool,
    *,
    offset: int = 0,
    effort: Effort = "balanced",
    diversity: float | None = None,
    neighbours: int = 0,
) -> Options:
    """Refuse what no search can be made of.

    Raises:
        InvalidInputError: no scope was named, or a value is out of its range.
    """
    filters = SearchFilters() if filters is None else filters
    check_scope(filters, everywhere, "search")
    check_count(top_k, "top_k", 1, TOP_K_MAX)
    check_count(offset, "offset", 0, TOP_K_MAX)
    if top_k + offset > TOP_K_MAX:
        raise InvalidInputError(f"top_k and offset together must not exceed {TOP_K_MAX}, got {top_k} and {offset}")
    check_count(neighbours, "neighbours", 0, NEIGHBOURS_MAX)
    if threshold is not None:
        check_number(threshold, "threshold, a similarity (or None for none),", -1, 1)
    if diversity is not None:
        check_number(diversity, "diversity", 0, 1)
        if offset:
            raise InvalidInputError("a diverse result has one page: ask for a larger top_k instead of an offset")
    if effort not in EFFORTS:
        raise InvalidInputError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    return Options(Asked.by(filters), top_k, offset, threshold, diversity, neighbours)


def vector_values(vector: VectorLike, model: str) -> dict[str, Any]:
    """Return the parameters that say what vectors are compared with.

    Raises:
        InvalidInputError: the model is no text that can be stored.
        InvalidVectorError: the vector cannot be compared.
    """
    check_text(model, "model")
    return {"query": pack_vector(vector), "model": model}


def check_query(query: str) -> str:
    """Return the query if there is something in it.

    Raises:
        InvalidInputError: it is blank, no text, or not valid Unicode.
    """
    if not check_text(query, "query").strip():
        raise InvalidInputError("the query is blank; there is nothing to search for")
    return query
