"""Search in long-term memory: :class:`SearchRepository`."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from time import perf_counter
from typing import Any, Final, Literal

import numpy as np
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store import search_statements as statements
from kotonoha_store.columns import VectorLike
from kotonoha_store.database import ensure_codecs
from kotonoha_store.diversity import spread_out
from kotonoha_store.driver_errors import translated
from kotonoha_store.errors import InvalidInputError, ModelMismatchError
from kotonoha_store.filters import EVERYTHING as EVERYTHING_SHAPE
from kotonoha_store.prepared import Prepared
from kotonoha_store.records import SourceType
from kotonoha_store.search_records import (
    AnyFilters,
    Fusion,
    Neighbour,
    SearchHit,
    SearchResult,
    SearchTimings,
)
from kotonoha_store.search_request import Asked, Match, Options, Words, check_query, check_search, vector_values
from kotonoha_store.search_statements import Found
from kotonoha_store.selectivity import (
    EVERYTHING,
    EXACT,
    Effort,
    Remembered,
    Selectivity,
    VectorPlan,
    choose_plan,
    exact_limit,
)
from kotonoha_store.word_statements import QUERY_TERMS, WordPlan, selected_terms

# Of how many pages the share that a filter keeps is estimated, some two chunks each.
_SAMPLED_PAGES: Final = 600

# A page with an embedding in each row.
_CHUNKS_A_PAGE: Final = 2

# An index that gave up is worth a longer exact search.
_FALLBACK: Final = 100

# How many rows of the words' index may be read when the heaviest words found too little.
_LAST_BUDGET: Final = 100_000.0


class SearchRepository:
    """Searches on the caller's transaction, or on a connection of the driver.

    A search names its scope (guild, channel, thread, user, sources or sessions) or says ``everywhere=True``.

    Every method raises :class:`~kotonoha_store.errors.StoreUnavailableError` when the database does not
    answer and :class:`~kotonoha_store.errors.SchemaOutdatedError` when it was not migrated.
    """

    def __init__(
        self,
        session: AsyncSession | Any,
        *,
        exact_limit: int | None = None,
        selectivities: Remembered[AnyFilters, Selectivity] | None = None,
    ) -> None:
        """
        Args:
            session: SQLAlchemy's AsyncSession, or a connection of asyncpg that knows ``halfvec``.
            exact_limit: up to how many candidates every one is compared; by default what was measured to be
                cheapest for the number of chunks and hits.
            selectivities: what is known of filters, shared by searches one after another.
        """
        self._runner = _SessionRunner(session) if isinstance(session, AsyncSession) else _DriverRunner(session)
        self._exact_limit = exact_limit
        self._selectivities = Remembered() if selectivities is None else selectivities

    @translated
    async def nearest(
        self,
        query: VectorLike,
        *,
        model: str,
        top_k: int = 10,
        offset: int = 0,
        threshold: float | None = None,
        filters: AnyFilters | None = None,
        everywhere: bool = False,
        effort: Effort = "balanced",
        diversity: float | None = None,
        neighbours: int = 0,
    ) -> SearchResult:
        """Return the chunks nearest in meaning: similarity is 1 - cosine distance, highest first.

        A filter that keeps few chunks is answered exactly; only where it keeps more than the index
        handles well is the search approximate (``result.plan``).

        Args:
            query: shape (1536,), made by ``model``; vectors of other models are not compared.
            top_k: 1 to 1000, together with ``offset``.
            offset: how many of the nearest to pass over, for the next page.
            threshold: least similarity, in [-1, 1]; None for none.
            filters: must name a scope unless ``everywhere``.
            everywhere: search all that is stored, of every guild and user.
            effort: how thoroughly the index is searched: ``fast``, ``balanced``, ``thorough``; ``exact`` compares
                every candidate.
            diversity: 0 to 1: hits that differ from each other (maximal marginal relevance), the more the higher.
            neighbours: how many chunks before and after each hit to bring along, 0 to 20.

        Raises:
            InvalidInputError: no scope was named, or a value is out of range.
            InvalidVectorError: the query cannot be compared: dimension, NaN, zero.
            ModelMismatchError: there are vectors in this scope, but none of ``model``.
        """
        started = perf_counter()
        options = check_search(
            top_k,
            threshold,
            filters,
            everywhere,
            offset=offset,
            effort=effort,
            diversity=diversity,
            neighbours=neighbours,
        )
        asked = options.asked
        candidates = options.candidates(top_k + offset)
        values = {**options.values, **vector_values(query, model), "candidates": candidates}

        def prepared(plan: VectorPlan) -> Prepared:
            return statements.nearest(plan.name, asked.shape, with_vectors=options.is_diverse)

        plan = await self._vector_plan(asked, candidates, effort)
        rows, plan, complete = await self._by_meaning(prepared, plan, values, asked)
        # No rows of an index that gave up do not mean that there are none.
        if not rows and complete and not offset:
            await self._refuse_other_models(asked, model)
        return await self._result(rows, plan.name, complete, model, options, started)

    @translated
    async def matching(
        self,
        query: str,
        *,
        match: Match = "any",
        top_k: int = 10,
        offset: int = 0,
        filters: AnyFilters | None = None,
        everywhere: bool = False,
        neighbours: int = 0,
    ) -> SearchResult:
        """Return the chunks that hold the query's words, in the text or its source's title.

        What stands in double quotes must occur as it stands (width and case aside), within words too. Ranked
        by how many distinct words of the query a chunk holds and how rare they are. Chunks that wait for their
        vector are found as well. A query without letters, digits or pictures finds nothing.

        Args:
            query: at most its first 10,000 characters take part, and of its words the 64 heaviest.
            match: ``any`` of the words, or ``all`` of them.
            top_k, offset, filters, everywhere, neighbours: as for :meth:`nearest`.

        Raises:
            InvalidInputError: a blank query, no scope was named, or a value is out of range.
        """
        started = perf_counter()
        options = check_search(top_k, None, filters, everywhere, offset=offset, neighbours=neighbours)
        words = Words.of(check_query(query), match)
        if words.query.is_empty:
            return SearchResult((), "words", True, 0, None)
        asked = options.asked
        values = {
            **options.values,
            **words.values(candidates=top_k + offset),
            "scope_size": await self._scope_size(asked, top_k),
        }
        rows, complete = await self._by_words(words, asked, values)
        return await self._result(rows, "words", complete, None, options, started)

    @translated
    async def hybrid(
        self,
        query: str,
        vector: VectorLike,
        *,
        model: str,
        top_k: int = 10,
        offset: int = 0,
        threshold: float | None = None,
        filters: AnyFilters | None = None,
        everywhere: bool = False,
        effort: Effort = "balanced",
        fusion: Fusion | None = None,
        diversity: float | None = None,
        neighbours: int = 0,
    ) -> SearchResult:
        """Return the chunks that meaning and words together find best, in one statement.

        The ranks of both are fused (:class:`Fusion`). What only the words found has its true similarity, too.

        Args:
            query: as for :meth:`matching`; phrases in quotes must occur in what the words find.
            vector: of the same query, as for :meth:`nearest`, and so are the other arguments.
            threshold: hides hits whose similarity is less.
            fusion: weights, k and how many candidates of each side are fused, at least ``offset + top_k``: what is
                found beyond them can still move later pages a little.

        Raises:
            InvalidInputError: a blank query, no scope was named, or a value is out of range.
            InvalidVectorError: the vector cannot be compared: dimension, NaN, zero.
            ModelMismatchError: nothing was found, there are vectors in this scope, but none of ``model``.
        """
        started = perf_counter()
        fusion = Fusion() if fusion is None else fusion
        if not isinstance(fusion, Fusion):
            raise InvalidInputError(f"fusion must be Fusion(...), not {type(fusion).__name__}")
        options = check_search(
            top_k,
            threshold,
            filters,
            everywhere,
            offset=offset,
            effort=effort,
            diversity=diversity,
            neighbours=neighbours,
        )
        words = Words.of(check_query(query), "any")
        asked = options.asked
        candidates = max(fusion.candidates, options.candidates(top_k + offset))
        values = {
            **options.values,
            **words.values(candidates=candidates),
            **vector_values(vector, model),
            "k": fusion.k,
            "words_weight": fusion.words,
            "meaning_weight": fusion.meaning,
            "neighbour_penalty": fusion.neighbour_penalty,
            "scope_size": await self._scope_size(asked, candidates),
        }

        def prepared(plan: VectorPlan, by_words: WordPlan = words.plan) -> Prepared:
            return statements.hybrid(plan.name, words.shape(asked, by_words), with_vectors=options.is_diverse)

        plan = await self._vector_plan(asked, candidates, effort)
        rows, plan, complete = await self._by_meaning(prepared, plan, values, asked)
        if (rows[0].found_by_words if rows else 0) < top_k and not words.query.is_empty:
            # The words found less than they might; they look again as they do alone.
            rows, complete = await self._again(rows, prepared, plan, values, words, complete=complete)
        if not rows and complete and not offset:
            await self._refuse_other_models(asked, model)
        return await self._result(rows, "hybrid", complete, model, options, started)

    async def _again(
        self,
        rows: Sequence[Found],
        prepared: Callable[[VectorPlan, WordPlan], Prepared],
        plan: VectorPlan,
        values: dict[str, Any],
        words: Words,
        *,
        complete: bool,
    ) -> tuple[Sequence[Found], bool]:
        values |= {"ef_search": str(plan.ef_search)}
        if words.is_guess:
            values |= {"required": words.certain}
            return await self._found(prepared(plan, words.certain_plan), values), complete
        if words.plan != "any" or await self._all_selected(values):
            return rows, complete
        values |= {"selecting": QUERY_TERMS, "budget": _LAST_BUDGET}
        rows = await self._found(prepared(plan, "any"), values)
        is_full = len(rows) >= values["top_k"]
        return rows, complete and (is_full or await self._all_selected(values))

    async def _by_meaning(
        self, prepared: Callable[[VectorPlan], Prepared], plan: VectorPlan, values: dict[str, Any], asked: Asked
    ) -> tuple[Sequence[Found], VectorPlan, bool]:
        rows = await self._found(prepared(plan), values | {"ef_search": str(plan.ef_search)})
        if plan is EXACT or len(rows) >= values["top_k"]:
            return rows, plan, True
        # The index gave up before it had enough. Few enough candidates are compared one by one.
        limit = await self._limit(_FALLBACK * values["candidates"])
        if await self._count(asked, limit + 1) > limit:
            return rows, plan, False
        return await self._found(prepared(EXACT), values), EXACT, True

    async def _by_words(self, words: Words, asked: Asked, values: dict[str, Any]) -> tuple[Sequence[Found], bool]:
        found = words.shape(asked, words.plan)
        rows = await self._found(statements.matching(found), values)
        if len(rows) >= values["top_k"]:
            return rows, True
        if words.plan == "any":
            if await self._all_selected(values):
                return rows, True
            values |= {"selecting": QUERY_TERMS, "budget": _LAST_BUDGET}
            rows = await self._found(statements.matching(found), values)
            return rows, len(rows) >= values["top_k"] or await self._all_selected(values)
        if words.is_guess:
            values |= {"required": words.certain}
            rows = await self._found(statements.matching(words.shape(asked, words.certain_plan)), values)
        return rows, True

    async def _found(self, prepared: Prepared, values: Mapping[str, Any]) -> list[Found]:
        return [Found(*row) for row in await self._runner.fetch(prepared, values)]

    async def _all_selected(self, values: Mapping[str, Any]) -> bool:
        """Whether chunks were looked for by every term of the query."""
        (row,) = await self._runner.fetch(selected_terms(), values)
        return bool(row[0] == len(values["terms"]))

    async def _vector_plan(self, asked: Asked, top_k: int, effort: Effort) -> VectorPlan:
        if effort == "exact":
            return EXACT
        selectivity = await self._selectivity(asked, top_k)
        return choose_plan(selectivity, top_k=top_k, effort=effort, limit=self._exact_limit)

    async def _scope_size(self, asked: Asked, top_k: int) -> float:
        return (await self._selectivity(asked, top_k)).kept if asked.scope else inf

    async def _selectivity(self, asked: Asked, top_k: int) -> Selectivity:
        """How many chunks the filters keep: counted as far as they could be compared, else sampled."""
        if asked.shape == EVERYTHING_SHAPE:
            return EVERYTHING
        if (known := self._selectivities.get(asked.filters)) is None:
            pages, total = await self._size()
            limit = self._exact_limit if self._exact_limit is not None else exact_limit(top_k, total)
            count = await self._count(asked, limit + 1)
            known = Selectivity(count, max(total, count))
            if count > limit:
                known = await self._sampled(asked, pages, count)
            if asked.is_short:
                self._selectivities.put(asked.filters, known)
        return known

    async def _limit(self, top_k: int) -> int:
        if self._exact_limit is not None:
            return self._exact_limit
        _, total = await self._size()
        return exact_limit(top_k, total)

    async def _size(self) -> tuple[int, float]:
        """Pages, and about how many chunks: as the planner estimates it."""
        ((pages, counted_pages, counted),) = await self._runner.fetch(statements.table_size(), {})
        chunks_a_page = counted / counted_pages if counted_pages > 0 and counted > 0 else _CHUNKS_A_PAGE
        return pages, pages * chunks_a_page

    async def _count(self, asked: Asked, limit: int) -> int:
        ((count,),) = await self._runner.fetch(statements.count_up_to(asked.shape), asked.values | {"limit": limit})
        return int(count)

    async def _sampled(self, asked: Asked, pages: int, at_least: int) -> Selectivity:
        percent = min(100.0, 100.0 * _SAMPLED_PAGES / max(pages, 1))
        sample = asked.values | {"percent": percent}
        ((kept, seen),) = await self._runner.fetch(statements.sampled(asked.shape), sample)
        total = max(seen * 100.0 / percent, at_least)
        return Selectivity(max(kept * 100.0 / percent, at_least), total)

    async def _refuse_other_models(self, asked: Asked, model: str) -> None:
        rows = await self._runner.fetch(statements.other_model(asked.shape), asked.values | {"model": model})
        if rows:
            raise ModelMismatchError(
                f"the query was embedded by {model!r}, but the vectors in this scope by {rows[0][0]!r}; "
                "vectors of different models cannot be compared: search with that model, or embed the chunks again"
            )

    async def _result(
        self,
        rows: Sequence[Found],
        plan: Literal["exact", "index", "words", "hybrid"],
        complete: bool,
        model: str | None,
        options: Options,
        started: float,
    ) -> SearchResult:
        chosen = rows
        if options.is_diverse:
            chosen = _spread(rows, options)
            complete = len(chosen) == options.top_k or (complete and len(chosen) == len(rows))
        hits = [_hit(row) for row in chosen if _is_near(row.similarity, options.threshold)]
        if options.neighbours and hits:
            hits = await self._with_neighbours(hits, options.neighbours)
        return SearchResult(
            hits=tuple(hits),
            plan=plan,
            complete=complete,
            hidden_by_threshold=len(chosen) - len(hits),
            model=model,
            timings=SearchTimings(0.0, perf_counter() - started),
        )

    async def _with_neighbours(self, hits: Sequence[SearchHit], reach: int) -> list[SearchHit]:
        ids = [hit.chunk_id for hit in hits]
        rows = await self._runner.fetch(statements.neighbours(), {"ids": ids, "reach": reach})
        beside: dict[tuple[int, bool], list[Neighbour]] = defaultdict(list)
        for hit_id, distance, chunk_id, content, location in rows:
            beside[hit_id, distance > 0].append(Neighbour(chunk_id, content, _object(location)))
        return [
            replace(hit, before=tuple(beside[hit.chunk_id, False]), after=tuple(beside[hit.chunk_id, True]))
            for hit in hits
        ]


class _SessionRunner:
    """On SQLAlchemy's session: part of the caller's transaction."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def fetch(self, prepared: Prepared, values: Mapping[str, Any]) -> Sequence[Any]:
        if self._session.autoflush:
            # As before any query of a session's own.
            await self._session.flush()
        await ensure_codecs(self._session)
        connection = await self._session.connection()
        return (await connection.exec_driver_sql(prepared.sql, tuple(prepared.arguments(values)))).all()


class _DriverRunner:
    """On the driver itself: half of what SQLAlchemy does for a row is more than the row costs here."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def fetch(self, prepared: Prepared, values: Mapping[str, Any]) -> Sequence[Any]:
        rows: Sequence[Found] = await self._connection.fetch(prepared.sql, *prepared.arguments(values))
        return rows


def _hit(row: Found) -> SearchHit:
    location = _object(row.location)
    return SearchHit(
        chunk_id=row.chunk_id,
        source_id=row.source_id,
        source_type=SourceType(row.source_type),
        title=row.title,
        url=url if isinstance(url := location.get("url"), str) and url else row.uri,
        content=row.content,
        similarity=row.similarity,
        score=row.score,
        location=location,
        metadata=_object(row.metadata),
        occurred_from=row.occurred_from,
        occurred_to=row.occurred_to,
    )


def _object(value: Any) -> dict[str, Any]:
    """JSON as the driver gives it. Other programs may have written anything."""
    if isinstance(value, str):
        # Text of JSON; or a string, where the driver has read it already.
        with suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, dict) else {}


def _is_near(similarity: float | None, threshold: float | None) -> bool:
    # What was not compared was found by its words.
    return threshold is None or similarity is None or similarity >= threshold


def _spread(rows: Sequence[Found], options: Options) -> list[Found]:
    """The rows that differ from each other; those without a vector cannot be compared, and are left out."""
    compared = [row for row in rows if row.similarity is not None]
    if not compared or options.diversity is None:
        return []
    relevance = _on_scale_of_similarities(compared)
    vectors = np.stack([row.vector for row in compared])
    chosen = spread_out(vectors, relevance, count=options.top_k, diversity=options.diversity)
    return [compared[position] for position in chosen]


def _on_scale_of_similarities(rows: Sequence[Found]) -> list[float]:
    """Fused scores spread over the range of the similarities, so that the two can be weighed against each other."""
    scores = np.array([row.score for row in rows])
    similarities = np.array([row.similarity for row in rows])
    low, high = scores.min(), scores.max()
    if high == low:
        return list(similarities)
    share = (scores - low) / (high - low)
    return list(similarities.min() + share * (similarities.max() - similarities.min()))
