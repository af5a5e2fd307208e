"""How a search is run: by comparing every candidate, or through the HNSW index. Pure.

Comparing costs the same for each candidate. The index looks at the nearest of all vectors, filtered or not:
where a filter keeps the share ``s`` it looks at some ``top_k / s`` of them before it has ``top_k``, and the
further it looks, the more it misses. So the fewer a filter keeps, the cheaper is the one, and the dearer the other.
``benchmarks/filtered.py`` measures both.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf, sqrt
from time import monotonic
from typing import Final, Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Effort = Literal["fast", "balanced", "thorough", "exact"]
EFFORTS: Final[tuple[Effort, ...]] = ("fast", "balanced", "thorough", "exact")

# 100,000 vectors of 1,536 dimensions, two kinds of clusters: exact comparison takes 1.4 us a candidate, the
# index 20 us for each vector that it looks at beyond its first ef_search; with what that needs for a recall of 0.98
# the two meet where candidates ** 2 is some 50 * top_k * chunks: at 7,000 of 100,000 for ten hits.
_CROSSOVER: Final = 50

_REACH: Final = 150
"""How many of the nearest the index looks at with the recall of an unfiltered search, that is ``top_k / share``."""

EF_SEARCH_MAX: Final = 1000
"""pgvector's limit for ``hnsw.ef_search``."""

_EF_SEARCH: Final[dict[Effort, int]] = {"fast": 40, "balanced": 100, "thorough": 400, "exact": EF_SEARCH_MAX}
_CACHE_SECONDS: Final = 60.0
_CACHE_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class Selectivity:
    """What is known of a filter.

    Attributes:
        kept: how many chunks it keeps: counted up to the limit, estimated beyond.
        total: about how many chunks there are.
    """

    kept: float
    total: float

    @property
    def share(self) -> float:
        """Of all chunks, 0 to 1."""
        return 1.0 if self.kept == inf else min(1.0, self.kept / max(self.total, 1.0))


PlanName = Literal["exact", "index"]

EVERYTHING: Final = Selectivity(inf, inf)


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """``exact``: every candidate compared. ``index``: through HNSW with this ``ef_search``."""

    name: PlanName
    ef_search: int = 0


EXACT: Final = VectorPlan("exact")


def exact_limit(top_k: int, total: float) -> int:
    """Return up to how many of ``total`` chunks it is cheaper to compare every one than to use the index."""
    return int(sqrt(_CROSSOVER * top_k * max(total, 1.0)))


def choose_plan(
    selectivity: Selectivity, *, top_k: int, effort: Effort = "balanced", limit: int | None = None
) -> VectorPlan:
    """Return the plan that is cheapest at a recall of 0.98 or more.

    ``limit``: compare up to so many candidates, instead of what :func:`exact_limit` says.
    """
    if selectivity.kept == inf:
        return EXACT if effort == "exact" else VectorPlan("index", ef_search(top_k, effort))
    limit = exact_limit(top_k, selectivity.total) if limit is None else limit
    if effort == "exact" or selectivity.kept <= limit:
        return EXACT
    return VectorPlan("index", ef_search(top_k, effort, share=selectivity.share))


def ef_search(top_k: int, effort: Effort = "balanced", *, share: float = 1.0) -> int:
    """Return ``hnsw.ef_search`` for ``top_k``: how many candidates the index keeps while it searches.

    On 100,000 vectors of 1,536 dimensions 100 reached a recall at 10 of 0.985 to 0.998, pgvector's default of 40
    0.91 to 0.98. It has to exceed ``top_k``, and to follow how far a filter makes the index look.
    """
    reach = top_k / max(share, 1e-6)
    least = 2 * top_k if reach <= _REACH else 3 * reach
    return int(min(max(_EF_SEARCH[effort], least), EF_SEARCH_MAX))


class Remembered(Generic[K, V]):
    """Values that hold for a minute, so that most searches are one round trip."""

    def __init__(self, *, seconds: float = _CACHE_SECONDS, size: int = _CACHE_SIZE) -> None:
        self._seconds = seconds
        self._size = size
        self._known: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """What was put in less than a minute ago, if anything was."""
        found = self._known.get(key)
        return None if found is None or monotonic() - found[0] > self._seconds else found[1]

    def put(self, key: K, value: V) -> None:
        """Remember it, and forget what was put in first when there is too much."""
        now = monotonic()
        self._known[key] = (now, value)
        self._known.move_to_end(key)
        while len(self._known) > self._size or now - next(iter(self._known.values()))[0] > self._seconds:
            self._known.popitem(last=False)
