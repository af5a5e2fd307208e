"""How much of what is nearest the HNSW index finds, measured on the stored vectors themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from time import perf_counter
from typing import Any, Final

import numpy as np

from kotonoha_store import search_statements as statements
from kotonoha_store.checks import check_count, check_number, check_text
from kotonoha_store.database import Database
from kotonoha_store.driver_errors import translated_errors
from kotonoha_store.errors import NotFoundError
from kotonoha_store.filters import EVERYTHING
from kotonoha_store.prepared import Prepared
from kotonoha_store.selectivity import ef_search

_LADDER: Final = (40, 100, 200, 400, 1000)
_ID: Final = 0
_SIMILARITY: Final = 6

# Half precision holds about three digits: nearer than this two distances are the same.
_TIE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class RecallReport:
    """What :meth:`Store.recall_check` found.

    Attributes:
        model: whose vectors were searched.
        sampled: how many stored vectors were searched for.
        top_k: how many neighbours of each, itself not counted.
        recall: share of the true neighbours that the index finds at the ``ef_search`` searches use by default.
        ef_search: that default.
        by_ef_search: the share for each value that was tried.
        wanted: the share asked for.
        ef_search_for_wanted: the least value tried that reaches it; None if none does: then the index wants
            a REINDEX, or to be built with larger KB_HNSW_M and KB_HNSW_EF_CONSTRUCTION.
        seconds: how long the check took.
    """

    model: str
    sampled: int
    top_k: int
    recall: float
    ef_search: int
    by_ef_search: dict[int, float]
    wanted: float
    ef_search_for_wanted: int | None
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether searches reach what was wanted as they are."""
        return self.recall >= self.wanted


async def recall_check(
    database: Database, model: str, *, sample: int = 50, top_k: int = 10, wanted: float = 0.98
) -> RecallReport:
    """Search for stored vectors through the index and by comparing all; return how far the two agree.

    Each sampled vector is compared with all: some 0.15 s for 100,000 vectors.

    Raises:
        NotFoundError: there are no vectors of this model.
        InvalidInputError: a value is out of range.
        StoreUnavailableError: the database did not answer.
    """
    started = perf_counter()
    check_text(model, "model")
    check_count(sample, "sample", 1, 10_000)
    check_count(top_k, "top_k", 1, 500)
    check_number(wanted, "wanted", 0, 1)
    default = ef_search(top_k)
    efforts = sorted({default, *(max(value, top_k) for value in _LADDER)})
    found = dict.fromkeys(efforts, 0)
    total = 0
    async with database.driver() as driver:
        with translated_errors():
            vectors = await _sample(driver, model, sample)
            if not vectors:
                raise NotFoundError(f"there are no vectors of {model!r} to check; embed some chunks first")
            for chunk_id, vector in vectors:
                # One more, since each vector finds itself.
                values = {"query": vector, "model": model, "candidates": top_k + 1, "top_k": top_k + 1, "offset": 0}
                exact = statements.nearest("exact", EVERYTHING)
                truth = (await _similarities(driver, exact, values, chunk_id))[:top_k]
                total += len(truth)
                for effort in efforts:
                    index = statements.nearest("index", EVERYTHING)
                    near = await _similarities(driver, index, values | {"ef_search": str(effort)}, chunk_id)
                    # By distance, so that either of two equals will do.
                    found[effort] += sum(similarity >= truth[-1] - _TIE for similarity in near[: len(truth)])
    # A vector that is alone has no neighbour to be missed.
    by_ef_search = {effort: count / total if total else 1.0 for effort, count in found.items()}
    return RecallReport(
        model=model,
        sampled=len(vectors),
        top_k=top_k,
        recall=by_ef_search[default],
        ef_search=default,
        by_ef_search=by_ef_search,
        wanted=float(wanted),
        ef_search_for_wanted=next((effort for effort in efforts if by_ef_search[effort] >= wanted), None),
        seconds=perf_counter() - started,
    )


async def _sample(driver: Any, model: str, count: int) -> list[Any]:
    prepared = statements.sampled_vectors()
    rows = await driver.fetch(prepared.sql, *prepared.arguments({"model": model, "limit": count}))
    # Nothing is near to a vector of zeros; other programs may have stored one.
    return [row for row in rows if np.any(row[1])]


async def _similarities(driver: Any, prepared: Prepared, values: dict[str, Any], without: int) -> Sequence[float]:
    rows = await driver.fetch(prepared.sql, *prepared.arguments(values))
    return [row[_SIMILARITY] for row in rows if row[_ID] != without and not isnan(row[_SIMILARITY])]
