"""How a search is run: by comparing every candidate, or through the HNSW index. Pure.

The index looks at the nearest vectors of all, filtered or not. A filter that keeps the share ``s`` makes it look
at some ``top_k / s`` of them before it has ``top_k``; that is fast and finds nearly all of the right ones while
it is a few hundred, and neither beyond. ``benchmarks/filtered.py`` measures both sides.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from time import monotonic
from typing import Final, Literal

Effort = Literal["fast", "balanced", "thorough", "exact"]
EFFORTS: Final[tuple[Effort, ...]] = ("fast", "balanced", "thorough", "exact")

EXACT_LIMIT: Final = 5_000
"""Up to this many candidates every one is compared: some 6 ms, where the index takes 1 to 25 and may miss some."""

EXACT_LIMIT_OF_RARE: Final = 50_000
"""The same where the index would have to look far: 5 % of 100,000 take 6 ms exactly, and 15 at a recall of 0.98."""

REACH: Final = 150
"""How many of the nearest the index looks at with good recall, that is ``top_k / share``: at 100 it found
0.997 of the right ones, at 200 it found 0.96."""

EF_SEARCH_MAX: Final = 1000
"""pgvector's limit for ``hnsw.ef_search``."""

_EF_SEARCH: Final[dict[Effort, int]] = {"fast": 40, "balanced": 100, "thorough": 400, "exact": EF_SEARCH_MAX}
_CACHE_SECONDS: Final = 60.0
_CACHE_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class Selectivity:
    """What is known of a filter.

    Attributes:
        count: how many chunks it keeps: exact up to the limit to which they were counted, else estimated.
        share: of all chunks, 0 to 1.
    """

    count: float
    share: float = 1.0


EVERYTHING: Final = Selectivity(float("inf"))


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """``exact``: every candidate compared. ``index``: through HNSW with this ``ef_search``."""

    name: Literal["exact", "index"]
    ef_search: int = 0


EXACT: Final = VectorPlan("exact")


def choose_plan(
    selectivity: Selectivity, *, top_k: int, effort: Effort = "balanced", exact_limit: int = EXACT_LIMIT
) -> VectorPlan:
    """Return the plan that is cheapest at a recall of 0.98 or more."""
    if effort == "exact" or selectivity.count <= exact_limit:
        return EXACT
    far = top_k > REACH * selectivity.share
    # As many times the limit as the constants have it.
    if far and selectivity.count <= exact_limit * (EXACT_LIMIT_OF_RARE // EXACT_LIMIT):
        return EXACT
    return VectorPlan("index", ef_search(top_k, effort, share=selectivity.share))


def ef_search(top_k: int, effort: Effort = "balanced", *, share: float = 1.0) -> int:
    """Return ``hnsw.ef_search`` for ``top_k``: how many candidates the index keeps while it searches.

    On 100,000 vectors of 1,536 dimensions 100 reached a recall at 10 of 0.985 to 0.998, pgvector's default of 40
    0.91 to 0.98. It has to exceed ``top_k``, and where a filter makes the index look far, to follow that.
    """
    least = 2 * top_k if top_k <= REACH * share else 5 * top_k / max(share, 1e-6)
    return int(min(max(_EF_SEARCH[effort], least), EF_SEARCH_MAX))


class SelectivityCache:
    """Remembers for a minute what filters keep, so that most searches are one round trip."""

    def __init__(self, *, seconds: float = _CACHE_SECONDS, size: int = _CACHE_SIZE) -> None:
        self._seconds = seconds
        self._size = size
        self._known: OrderedDict[Hashable, tuple[float, Selectivity]] = OrderedDict()

    def get(self, key: Hashable) -> Selectivity | None:
        """What was found less than a minute ago, if anything was."""
        found = self._known.get(key)
        if found is None or monotonic() - found[0] > self._seconds:
            return None
        return found[1]

    def put(self, key: Hashable, selectivity: Selectivity) -> None:
        """Remember it, and forget what was put first when there is too much."""
        self._known[key] = (monotonic(), selectivity)
        self._known.move_to_end(key)
        if len(self._known) > self._size:
            self._known.popitem(last=False)
