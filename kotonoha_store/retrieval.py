"""Search in long-term memory: :class:`SearchRepository`."""

from numbers import Real
from typing import Any, Final

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Integer, bindparam, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store.columns import AnyRow, AnySelect, HalfVector, VectorLike, pack_vector
from kotonoha_store.database import ensure_codecs, translated
from kotonoha_store.errors import InvalidInputError, ModelMismatchError
from kotonoha_store.models import KnowledgeChunk, KnowledgeSource
from kotonoha_store.records import SearchFilters, SearchHit, SearchResult
from kotonoha_store.selectivity import EXACT_LIMIT, Plan, choose_plan, ef_search

TOP_K_MAX: Final = 1000
"""More rows than pgvector's index can keep in mind (``hnsw.ef_search`` <= 1000) cannot be found through it."""

_QUERY: Final = bindparam("query", type_=HalfVector())
_TOP_K: Final = bindparam("top_k", type_=Integer())


class SearchRepository:
    """Searches on the caller's transaction.

    Every method raises :class:`~kotonoha_store.errors.StoreUnavailableError` when the database does not
    answer and :class:`~kotonoha_store.errors.SchemaOutdatedError` when it was not migrated.
    """

    def __init__(self, session: AsyncSession, *, exact_limit: int = EXACT_LIMIT) -> None:
        """``exact_limit``: up to how many candidates every one is compared."""
        self._session = session
        self._exact_limit = exact_limit

    @translated
    async def nearest(
        self,
        query: VectorLike,
        *,
        model: str,
        top_k: int = 10,
        threshold: float | None = None,
        filters: SearchFilters | None = None,
        everywhere: bool = False,
    ) -> SearchResult:
        """Return the chunks nearest in meaning: similarity is 1 - cosine distance, highest first.

        A filter that keeps few chunks is answered exactly; only where it keeps more than the index
        handles well is the search approximate (``result.plan``).

        Args:
            query: shape (1536,), made by ``model``; vectors of other models are not compared.
            top_k: 1 to 1000.
            threshold: least similarity, in [-1, 1]; None for none.
            filters: must name a scope (guild, channel, thread, user or sources) unless ``everywhere``.
            everywhere: search all that is stored, of every guild and user.

        Raises:
            InvalidInputError: no scope was named, or top_k or threshold is out of range.
            InvalidVectorError: the query cannot be compared: dimension, NaN, zero.
            ModelMismatchError: there are vectors in this scope, but none of ``model``.
        """
        filters = SearchFilters() if filters is None else filters
        check_search(top_k, threshold, filters, everywhere)
        conditions = _conditions(filters)
        own = [*conditions, KnowledgeChunk.embedding.is_not(None), KnowledgeChunk.embedding_model == model]
        parameters = {"query": pack_vector(query), "top_k": top_k}
        await ensure_codecs(self._session)

        plan: Plan = "index" if filters.is_empty else await self._plan(own)
        rows = await self._run(plan, own, parameters)
        complete = True
        if plan == "index" and len(rows) < top_k:
            # The index gave up before it had enough. Few enough candidates are compared one by one.
            plan = await self._plan(own)
            complete = plan == "exact"
            rows = await self._run(plan, own, parameters) if complete else rows
        # No rows of an index that gave up do not mean that there are none.
        if not rows and complete:
            await self._refuse_other_models(conditions, model)
        hits = tuple(_hit(row) for row in rows if threshold is None or row.similarity >= threshold)
        return SearchResult(
            hits=hits, plan=plan, complete=complete, hidden_by_threshold=len(rows) - len(hits), model=model
        )

    async def _plan(self, conditions: list[ColumnElement[bool]]) -> Plan:
        counted = select(text("1")).select_from(KnowledgeChunk).where(*conditions).limit(self._exact_limit + 1)
        count = (await self._session.execute(select(func.count()).select_from(counted.subquery()))).scalar_one()
        return choose_plan(count, exact_limit=self._exact_limit)

    async def _run(self, plan: Plan, conditions: list[ColumnElement[bool]], parameters: dict[str, Any]) -> list[AnyRow]:
        if plan == "exact":
            return list((await self._session.execute(_exact(conditions), parameters)).all())
        await self._session.execute(_index_settings(), {"ef_search": str(ef_search(parameters["top_k"]))})
        return list((await self._session.execute(_through_index(conditions), parameters)).all())

    async def _refuse_other_models(self, conditions: list[ColumnElement[bool]], model: str) -> None:
        statement = (
            select(KnowledgeChunk.embedding_model)
            .where(*conditions, KnowledgeChunk.embedding.is_not(None), KnowledgeChunk.embedding_model != model)
            .limit(1)
        )
        other = (await self._session.execute(statement)).scalar_one_or_none()
        if other is not None:
            raise ModelMismatchError(
                f"the query was embedded by {model!r}, but the vectors in this scope by {other!r}; "
                "vectors of different models cannot be compared: search with that model, or embed the chunks again"
            )


def check_search(top_k: int, threshold: float | None, filters: SearchFilters, everywhere: bool) -> None:
    """Refuse what no search can be made of.

    Raises:
        InvalidInputError: no scope was named, or top_k or threshold is out of range.
    """
    if not isinstance(filters, SearchFilters):
        raise InvalidInputError(f"filters must be SearchFilters(...), not {type(filters).__name__}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= TOP_K_MAX:
        raise InvalidInputError(f"top_k must be a whole number from 1 to {TOP_K_MAX}, got {top_k!r}")
    if threshold is not None and not _is_similarity(threshold):
        raise InvalidInputError(f"threshold is a similarity, from -1 to 1 (or None for none), got {threshold!r}")
    if not everywhere and not filters.names_scope:
        raise InvalidInputError(
            "name the scope to search: filters=SearchFilters(guild_id=...), or channel_id, thread_id, user_id, "
            "source_ids; or say everywhere=True to search all that is stored"
        )


def _is_similarity(value: object) -> bool:
    return isinstance(value, Real) and -1 <= float(value) <= 1


def _conditions(filters: SearchFilters) -> list[ColumnElement[bool]]:
    chunk, source = KnowledgeChunk, KnowledgeSource
    conditions: list[ColumnElement[bool]] = [
        getattr(chunk, name) == value
        for name in ("guild_id", "channel_id", "thread_id", "user_id")
        if (value := getattr(filters, name)) is not None
    ]
    if filters.source_ids is not None:
        # One array: of single parameters a statement takes 32,767 only.
        conditions.append(chunk.source_id == func.any(literal(list(filters.source_ids), ARRAY(BigInteger))))
    if filters.since is not None:
        conditions.append(chunk.occurred_to >= filters.since)
    if filters.until is not None:
        conditions.append(chunk.occurred_from < filters.until)
    of_source: list[ColumnElement[bool]] = []
    if filters.source_types is not None:
        of_source.append(source.type.in_(filters.source_types))
    if filters.metadata is not None:
        of_source.append(source.source_metadata.contains(filters.metadata))
    if of_source:
        conditions.append(chunk.source_id.in_(select(source.id).where(*of_source)))
    return conditions


def _index_settings() -> AnySelect:
    """For this transaction only: behind a pooler a setting of the session would reach other clients.

    Iterative scans also where nothing is filtered, since dead rows take the index's slots.
    """
    return select(
        func.set_config("hnsw.iterative_scan", "relaxed_order", text("true")),
        func.set_config("hnsw.ef_search", bindparam("ef_search"), text("true")),
    )


def _exact(conditions: list[ColumnElement[bool]]) -> AnySelect:
    """Distance to every candidate. Materialized, so that the planner cannot take the index after all."""
    candidates = (
        select(KnowledgeChunk.id, KnowledgeChunk.embedding.cosine_distance(_QUERY).label("distance"))
        .where(*conditions)
        .cte("candidates")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    nearest = select(candidates).order_by(candidates.c.distance, candidates.c.id).limit(_TOP_K).cte("nearest")
    return _with_details(nearest)


def _through_index(conditions: list[ColumnElement[bool]]) -> AnySelect:
    """ORDER BY the bare distance, ascending: anything else loses the index, on PostgreSQL 16 even an id after it.

    So equal distances are ordered by id among the rows returned; which of them are is up to the index.
    """
    distance = KnowledgeChunk.embedding.cosine_distance(_QUERY)
    nearest = (
        select(KnowledgeChunk.id, distance.label("distance"))
        .where(*conditions)
        .order_by(distance)
        .limit(_TOP_K)
        .cte("nearest")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    return _with_details(nearest)


def _with_details(nearest: Any) -> AnySelect:
    chunk, source = KnowledgeChunk, KnowledgeSource
    return (
        select(
            chunk.id,
            chunk.source_id,
            chunk.content,
            chunk.location,
            chunk.occurred_from,
            chunk.occurred_to,
            source.type,
            source.title,
            source.uri,
            source.source_metadata,
            (1 - nearest.c.distance).label("similarity"),
        )
        .select_from(nearest)
        .join(chunk, chunk.id == nearest.c.id)
        .join(source, source.id == chunk.source_id)
        # + 0: a relaxed scan may claim an order that it does not keep, and the sort be optimised away.
        .order_by(nearest.c.distance + 0, nearest.c.id)
    )


def _hit(row: AnyRow) -> SearchHit:
    # Other programs may have written anything.
    location = row.location if isinstance(row.location, dict) else {}
    metadata = row.source_metadata if isinstance(row.source_metadata, dict) else {}
    return SearchHit(
        chunk_id=row.id,
        source_id=row.source_id,
        source_type=row.type,
        title=row.title,
        url=location.get("url") or row.uri,
        content=row.content,
        similarity=float(row.similarity),
        location=location,
        metadata=metadata,
        occurred_from=row.occurred_from,
        occurred_to=row.occurred_to,
    )
