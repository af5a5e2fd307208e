"""The statements of a search, compiled once for each shape of filter.

A search is one statement, and so one round trip; settings of the index that it needs are made inside of it.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    Column,
    ColumnElement,
    Double,
    Exists,
    Integer,
    Numeric,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    exists,
    false,
    func,
    literal_column,
    null,
    select,
    tablesample,
    text,
    true,
    union_all,
)
from sqlalchemy.orm import aliased
from sqlalchemy.sql.visitors import replacement_traverse

from kotonoha_store import filters as filter_conditions
from kotonoha_store.columns import AnySelect, HalfVector
from kotonoha_store.filters import Shape
from kotonoha_store.models import KnowledgeChunk, KnowledgeSource
from kotonoha_store.prepared import Prepared, prepare
from kotonoha_store.selectivity import PlanName
from kotonoha_store.word_statements import GUESSED, WordsShape, by_words, materialized

_CACHED_SHAPES: Final = 256

_ONE: Final[ColumnElement[float]] = literal_column("1")
# The distance to a vector of zeros, such as other programs may have written; no index has these.
_NAN: Final[ColumnElement[float]] = literal_column("'NaN'::float8")
_QUERY: Final = bindparam("query", type_=HalfVector())
_MODEL: Final = bindparam("model", type_=Text())


class Found(NamedTuple):
    """A row of :func:`nearest`, :func:`matching` or :func:`hybrid`.

    Attributes:
        location, metadata: JSON as the driver gives it.
        vector: a float16 array where it was asked for and the query's model made it, else None.
        found_by_words: of a hybrid search, how many chunks the words found.
    """

    chunk_id: int
    source_id: int
    source_type: str
    title: str
    uri: str | None
    content: str
    similarity: float | None
    score: float
    location: Any
    metadata: Any
    occurred_from: datetime | None
    occurred_to: datetime | None
    vector: Any
    found_by_words: int = 0


@lru_cache(maxsize=_CACHED_SHAPES)
def nearest(plan: PlanName, shape: Shape, *, with_vectors: bool = False) -> Prepared:
    """The chunks nearest in meaning.

    Parameters: query, model, candidates (how many of the nearest are looked up), top_k, offset; with the index
    also ef_search.
    """
    meaning = _meaning(plan, shape)
    return prepare(_with_details(_page(meaning, (_ONE - meaning.c.distance).label("score")), with_vectors=with_vectors))


@lru_cache(maxsize=_CACHED_SHAPES)
def matching(words: WordsShape) -> Prepared:
    """The chunks that hold the query's words.

    Parameters: terms, factors, lookups, repetitions, beyond; candidates (how many are ranked in the end), pool
    (among how many), top_k, offset; and what :class:`WordsShape` names.
    """
    ranked = by_words(words)
    return prepare(_with_details(_page(ranked, ranked.c.score), in_blocks=words.is_guessed))


@lru_cache(maxsize=_CACHED_SHAPES)
def hybrid(plan: PlanName, words: WordsShape, *, with_vectors: bool = False) -> Prepared:
    """Both, fused by reciprocal rank (Cormack, Clarke, Büttcher 2009): the sum of weight / (k + rank).

    Parameters: those of both; candidates is how many of each are
    fused; k, words_weight, meaning_weight, neighbour_penalty.
    """
    words_found = by_words(words)
    fused = _fused(_meaning(plan, words.filters), words_found)
    number = select(func.count()).select_from(words_found).scalar_subquery()
    page = _with_details(_page(fused, fused.c.score), with_vectors=with_vectors, measured=True)
    return prepare(page.add_columns(number.label("found_by_words")))


@lru_cache(maxsize=_CACHED_SHAPES)
def count_up_to(shape: Shape) -> Prepared:
    """How many chunks a filter keeps, counted up to ``limit``. By the filter alone, so that an index may answer."""
    kept: AnySelect = (
        select(literal_column("1")).select_from(KnowledgeChunk).where(*filter_conditions.conditions(shape))
    )
    counted = kept.limit(bindparam("limit", type_=Integer())).subquery()
    return prepare(select(func.count()).select_from(counted))


@lru_cache(maxsize=_CACHED_SHAPES)
def sampled(shape: Shape) -> Prepared:
    """Of the chunks on sampled pages: how many a filter keeps, and how many there are. Parameter: percent."""
    chunks: Any = KnowledgeChunk.__table__
    pages = tablesample(chunks, func.system(bindparam("percent", type_=Double())))

    def of_sample(element: Any, **_: Any) -> Any:
        if isinstance(element, Column) and element.table.name == chunks.name:
            return pages.c[element.name]
        # What a subquery correlates to.
        return pages if isinstance(element, Table) and element.name == chunks.name else None

    # Not by a join with the table itself: a plan for any percentage would read the whole of it.
    holds = replacement_traverse(and_(true(), *filter_conditions.conditions(shape)), {}, of_sample)
    sample = select(holds.label("holds")).select_from(pages).subquery()
    return prepare(select(func.count().filter(sample.c.holds), func.count()).select_from(sample))


@cache
def table_size() -> Prepared:
    """How many pages the chunks fill now; how many pages and chunks there were when that was last counted."""
    size = func.pg_relation_size(literal_column("'knowledge_chunks'::regclass"))
    block_size = cast(func.current_setting(literal_column("'block_size'")), BigInteger)
    pages = cast(func.div(size, block_size), Integer)
    counted = text("relpages, reltuples FROM pg_class WHERE oid = 'knowledge_chunks'::regclass")
    return prepare(select(pages, counted))


@lru_cache(maxsize=_CACHED_SHAPES)
def other_model(shape: Shape) -> Prepared:
    """A model other than ``model`` that made vectors in this scope."""
    statement = (
        select(KnowledgeChunk.embedding_model)
        .where(
            *filter_conditions.conditions(shape),
            KnowledgeChunk.embedding.is_not(None),
            KnowledgeChunk.embedding_model != _MODEL,
        )
        .limit(1)
    )
    return prepare(statement)


def _meaning(plan: PlanName, shape: Shape) -> CTE:
    kept = filter_conditions.conditions(shape)
    comparable = [KnowledgeChunk.embedding.is_not(None), KnowledgeChunk.embedding_model == _MODEL]
    candidates = bindparam("candidates", type_=Integer())
    distance = KnowledgeChunk.embedding.cosine_distance(_QUERY)
    if plan == "exact":
        # Materialized, so that the planner cannot take the index after all.
        each = select(KnowledgeChunk.id, distance.label("distance")).where(*kept, *comparable)
        compared = materialized(each, "compared")
        found = select(compared).where(compared.c.distance != _NAN)
        return materialized(found.order_by(compared.c.distance, compared.c.id).limit(candidates), "nearest")
    # ORDER BY the bare distance, ascending: anything else loses the index, on PostgreSQL 16 even an id after it.
    # So equal distances are ordered by id among the rows returned; which of them are is up to the index.
    through_index = select(KnowledgeChunk.id, distance.label("distance")).where(
        *_one_by_one(kept), *comparable, *_index_settings()
    )
    return materialized(through_index.order_by(distance).limit(candidates), "nearest")


def _one_by_one(conditions: Sequence[ColumnElement[bool]]) -> list[ColumnElement[bool]]:
    """The filter as one condition that is asked of each chunk at hand.

    So the planner has no other index for it, and nothing to estimate: for metadata or lists of ids that it does not
    know (a plan for any values) it would expect few chunks, fetch all of them, and compare each.
    """
    if not conditions:
        return []
    # An EXISTS with an OFFSET stays where it is, and does not become a join that begins with the sources.
    fenced = [
        exists(condition.element.element.offset(literal_column("0"))) if isinstance(condition, Exists) else condition
        for condition in conditions
    ]
    return [func.coalesce(and_(*fenced), false())]


def _index_settings() -> list[ColumnElement[bool]]:
    """Set for this statement only, before the index is read: the planner makes conditions without a column a gate.

    So a search is one round trip, and behind a pooler no setting reaches another client. Iterative scans also where
    nothing is filtered, since dead rows take the index's slots.
    """
    settings = {
        "hnsw.iterative_scan": literal_column("'relaxed_order'"),
        "hnsw.ef_search": bindparam("ef_search", type_=Text()),
    }
    local: ColumnElement[bool] = literal_column("true")
    return [
        select(func.set_config(literal_column(f"'{name}'"), value, local)).scalar_subquery().is_not(None)
        for name, value in settings.items()
    ]


def _fused(meaning: CTE, words: CTE) -> CTE:
    by_meaning = select(
        meaning.c.id,
        meaning.c.distance,
        func.row_number().over(order_by=(meaning.c.distance, meaning.c.id)).label("place"),
    ).subquery("by_meaning")
    by_score = select(
        words.c.id, func.row_number().over(order_by=(words.c.score.desc(), words.c.id)).label("place")
    ).subquery("by_words")
    k: ColumnElement[float] = bindparam("k", type_=Double())

    def part(weight: str, leg: Any) -> Any:
        return func.coalesce(bindparam(weight, type_=Double()) / (k + leg.c.place), 0.0)

    score = part("meaning_weight", by_meaning) + part("words_weight", by_score)
    fused = (
        select(func.coalesce(by_meaning.c.id, by_score.c.id).label("id"), by_meaning.c.distance, score.label("score"))
        .select_from(by_meaning.join(by_score, by_score.c.id == by_meaning.c.id, full=True))
        .subquery("fused")
    )
    return materialized(_without_echoes(fused), "ranked")


def _without_echoes(fused: Any) -> AnySelect:
    """Lower what stands next to something better in the same source: with an overlap it says the same once more."""
    placed = (
        select(fused, KnowledgeChunk.source_id, _place(KnowledgeChunk).label("number"))
        .join(KnowledgeChunk, KnowledgeChunk.id == fused.c.id)
        .subquery("placed")
    )
    window: dict[str, Any] = {"partition_by": placed.c.source_id, "order_by": (placed.c.number, placed.c.id)}

    def beside(side: Any, column: Any) -> Any:
        return side(column).over(**window)

    before = and_(
        beside(func.lag, placed.c.number) == placed.c.number - 1, beside(func.lag, placed.c.score) >= placed.c.score
    )
    after = and_(
        beside(func.lead, placed.c.number) == placed.c.number + 1, beside(func.lead, placed.c.score) > placed.c.score
    )
    better = case((before, 1), else_=0) + case((after, 1), else_=0)
    penalty: ColumnElement[float] = bindparam("neighbour_penalty", type_=Double())
    kept = 1 - penalty
    return select(placed.c.id, placed.c.distance, (placed.c.score * func.power(kept, better)).label("score"))


def _page(ranked: CTE, score: Any) -> CTE:
    page = select(ranked.c.id, ranked.c.distance, score).order_by(score.desc(), ranked.c.id)
    page = page.limit(bindparam("top_k", type_=Integer())).offset(bindparam("offset", type_=Integer()))
    return page.cte("page")


def _with_details(
    page: CTE, *, with_vectors: bool = False, measured: bool = False, in_blocks: bool = False
) -> AnySelect:
    chunk, source = KnowledgeChunk, KnowledgeSource
    distance: Any = page.c.distance
    if measured:
        # What only the words found is compared here.
        measurable = func.nullif(chunk.embedding.cosine_distance(_QUERY), _NAN)
        comparable = case((chunk.embedding_model == _MODEL, measurable))
        distance = func.coalesce(distance, comparable)
    score: Any = page.c.score
    if in_blocks:
        # What puts a block before the other is no weight of words.
        score = score - func.floor(score / GUESSED) * GUESSED
    columns = {
        "chunk_id": chunk.id,
        "source_id": chunk.source_id,
        "source_type": cast(source.type, Text),
        "title": source.title,
        "uri": source.uri,
        "content": chunk.content,
        "similarity": _ONE - distance,
        "score": score,
        "location": chunk.location,
        "metadata": source.source_metadata,
        "occurred_from": chunk.occurred_from,
        "occurred_to": chunk.occurred_to,
        "vector": case((chunk.embedding_model == _MODEL, chunk.embedding)) if with_vectors else null(),
    }
    return (
        select(*(columns[name].label(name) for name in Found._fields if name in columns))
        .select_from(page)
        .join(chunk, chunk.id == page.c.id)
        .join(source, source.id == chunk.source_id)
        # Sorted here: the order of a page read before is nobody's promise.
        .order_by(page.c.score.desc(), page.c.id)
    )


@cache
def neighbours() -> Prepared:
    """The chunks up to ``reach`` places before and after each of the chunks ``ids`` in their sources, in order."""
    hit, other = aliased(KnowledgeChunk), aliased(KnowledgeChunk)
    here, there = (_place(chunk) for chunk in (hit, other))
    reach = cast(bindparam("reach", type_=Integer()), Numeric)
    hits = materialized(
        select(hit.id, hit.source_id, here.label("place")).where(
            hit.id == func.any(bindparam("ids", type_=ARRAY(BigInteger)))
        ),
        "hits",
    )
    statement = (
        select(hits.c.id, (there - hits.c.place).label("distance"), other.id, other.content, other.location)
        .join(other, and_(other.source_id == hits.c.source_id, other.id != hits.c.id))
        .where(there.between(hits.c.place - reach, hits.c.place + reach), there != hits.c.place)
        .order_by(hits.c.id, there, other.id)
    )
    return prepare(statement)


def _place(chunk: Any) -> Any:
    """Where the chunk stands in its source; NULL where its location does not say."""
    index = chunk.location["chunk_index"]
    return case((func.jsonb_typeof(index) == literal_column("'number'"), cast(index.astext, Numeric)))


@cache
def sampled_vectors() -> Prepared:
    """Ids and vectors of up to ``limit`` chunks embedded by ``model``: drawn by random ids, else the newest."""
    chunk = KnowledgeChunk
    usable = [chunk.embedding.is_not(None), chunk.embedding_model == _MODEL]
    limit = bindparam("limit", type_=Integer())
    largest = select(func.max(chunk.id)).scalar_subquery()
    # Ten times as many as wanted, since ids may be gone, not embedded, or of another model.
    random_id = cast(1 + func.floor(func.random() * largest), BigInteger).label("id")
    ids = materialized(select(random_id).select_from(func.generate_series(1, 10 * limit)).distinct(), "random_ids")
    # Shuffled, since those that are met first may be the oldest.
    shuffled = select(chunk.id).join(ids, ids.c.id == chunk.id).where(*usable).order_by(func.random()).limit(limit)
    drawn = materialized(shuffled, "drawn")
    missing = limit - select(func.count()).select_from(drawn).scalar_subquery()
    newest = select(chunk.id).where(*usable, chunk.id.not_in(select(drawn.c.id))).order_by(chunk.id.desc())
    chosen = union_all(select(drawn.c.id), newest.limit(missing).subquery().select()).subquery("chosen")
    return prepare(select(chunk.id, chunk.embedding).join(chosen, chosen.c.id == chunk.id))
