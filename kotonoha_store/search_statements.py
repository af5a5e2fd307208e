"""The statements of a search, compiled once for each shape of filter.

A search is one statement, and so one round trip; settings of the index that it needs are made inside of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, Literal

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    Exists,
    Integer,
    Numeric,
    Subquery,
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
    nulls_last,
    or_,
    select,
    tablesample,
    text,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import TSQUERY, TSVECTOR
from sqlalchemy.orm import aliased
from sqlalchemy.sql.visitors import replacement_traverse

from kotonoha_store import filters as filter_conditions
from kotonoha_store.columns import AnySelect, HalfVector
from kotonoha_store.filters import Shape
from kotonoha_store.models import ChunkTerms, KnowledgeChunk, KnowledgeSource, TermFrequency
from kotonoha_store.prepared import Prepared, prepare

VectorPlan = Literal["exact", "index"]
WordPlan = Literal["any", "required", "scan"]
"""By the query's heaviest terms; by what must be there; by reading every text in scope."""

_CACHED_SHAPES: Final = 256

SELECTING_TERMS: Final = 8
"""How many of a query's terms, the heaviest, a chunk is found by; the others only add to its score.

With 6 to 16 LoCoMo and JSQuAD rank the same (``benchmarks/retrieval.py``); terms in every second chunk would only
make a search slow.
"""

POOLS: Final = (100, 200, 400, 800, 1000)
"""How many chunks, the best by their heaviest terms, are ranked by all terms: the least of these that is enough.

What comes in with a larger pool is ranked behind the smaller ones, so that all pages of a search agree.
"""

_REQUIRED_REACH: Final = 20_000
"""How many chunks that have all that must be there are looked at: some 50 ms."""

_UNSEEN: Final = 0.5
"""In how many chunks a term is thought to be that no sampled chunk has."""

_REPEATED: Final = 1.25
"""What a word counts that a chunk repeats, as against once: the saturation of BM25, as far as one bit goes."""

QUERY_TERMS: Final = 64
"""How many of a query's terms, the heaviest, take part: a pasted page is bounded so."""

_TEXTS: Final = ARRAY(Text)
_NO_DISTANCE: Final = cast(null(), Double).label("distance")
_GUESSED: Final[ColumnElement[int]] = literal_column("1000000")
_ZERO: Final[ColumnElement[int]] = literal_column("0")
_NOTHING: Final[ColumnElement[float]] = literal_column("0::float8")
_ONE: Final[ColumnElement[float]] = literal_column("1")
# The distance to a vector of zeros, such as other programs may have written; no index has these.
_NAN: Final[ColumnElement[float]] = literal_column("'NaN'::float8")
_QUERY: Final = bindparam("query", type_=HalfVector())
_MODEL: Final = bindparam("model", type_=Text())
_SCOPE: Final = cast(bindparam("scope", type_=Text()), TSQUERY)


@dataclass(frozen=True, slots=True)
class WordsShape:
    """What a statement that looks for words is compiled for.

    Attributes:
        filters: their shape.
        plan: ``any`` has the parameters budget, first_budget, selecting, scope_size, and pairs_only (no term is a
            word, which a text may repeat); ``required`` has required.
        scoped: whether the parameter scope has terms that every chunk in the filters' scope holds.
        narrowed: whether the filters ask for more than those terms say.
        phrases: whether the parameter phrases has texts that must occur.
        is_ranked: whether what has all that is required may hold more or fewer of the query's terms.
        is_guessed: whether the parameter guess is a tsquery that most of what is required meets; those come first.
    """

    filters: Shape
    plan: WordPlan
    scoped: bool = False
    narrowed: bool = False
    phrases: bool = False
    is_ranked: bool = False
    is_guessed: bool = False


@lru_cache(maxsize=_CACHED_SHAPES)
def nearest(plan: VectorPlan, shape: Shape, *, with_vectors: bool = False) -> Prepared:
    """The chunks nearest in meaning.

    Parameters: query, model, candidates (how many of the nearest are looked up), top_k, offset; with the index
    also ef_search.
    """
    meaning = _meaning(plan, shape)
    return prepare(_with_details(_page(meaning, (_ONE - meaning.c.distance).label("score")), with_vectors=with_vectors))


@lru_cache(maxsize=_CACHED_SHAPES)
def matching(words: "WordsShape") -> Prepared:
    """The chunks that hold the query's words.

    Parameters: terms, factors, lookups, repetitions, beyond; candidates (how many are ranked in the end), pool
    (among how many), top_k, offset; and what :class:`WordsShape` names.
    """
    ranked = _words(words)
    return prepare(_with_details(_page(ranked, ranked.c.score), in_blocks=words.is_guessed))


@cache
def selected_terms() -> Prepared:
    """By how many of the query's terms chunks are looked for with this budget; parameters as for plan ``any``."""
    return prepare(select(func.count()).select_from(_selecting(_query_terms())))


@lru_cache(maxsize=_CACHED_SHAPES)
def hybrid(plan: VectorPlan, words: "WordsShape", *, with_vectors: bool = False) -> Prepared:
    """Both, fused by reciprocal rank (Cormack, Clarke, Büttcher 2009): the sum of weight / (k + rank).

    Its last column is how many the words found. Parameters: those of both; candidates is how many of each are
    fused; k, words_weight, meaning_weight, neighbour_penalty.
    """
    by_words = _words(words)
    fused = _fused(_meaning(plan, words.filters), by_words)
    found = select(func.count()).select_from(by_words).scalar_subquery().label("found_by_words")
    page = _with_details(_page(fused, fused.c.score), with_vectors=with_vectors, measured=True)
    return prepare(page.add_columns(found))


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


def _meaning(plan: VectorPlan, shape: Shape) -> CTE:
    kept = filter_conditions.conditions(shape)
    comparable = [KnowledgeChunk.embedding.is_not(None), KnowledgeChunk.embedding_model == _MODEL]
    candidates = bindparam("candidates", type_=Integer())
    distance = KnowledgeChunk.embedding.cosine_distance(_QUERY)
    if plan == "exact":
        # Materialized, so that the planner cannot take the index after all.
        each = select(KnowledgeChunk.id, distance.label("distance")).where(*kept, *comparable)
        compared = _materialized(each, "compared")
        found = select(compared).where(compared.c.distance != _NAN)
        return _materialized(found.order_by(compared.c.distance, compared.c.id).limit(candidates), "nearest")
    # ORDER BY the bare distance, ascending: anything else loses the index, on PostgreSQL 16 even an id after it.
    # So equal distances are ordered by id among the rows returned; which of them are is up to the index.
    through_index = select(KnowledgeChunk.id, distance.label("distance")).where(
        *_one_by_one(kept), *comparable, *_index_settings()
    )
    return _materialized(through_index.order_by(distance).limit(candidates), "nearest")


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


def _words(words: WordsShape) -> CTE:
    """Chunks with words of the query, by how many of its terms they hold and how rare those are."""
    query = _query_terms()
    if words.plan == "any":
        scored = _scored_by_heaviest(query, words)
    else:
        found = _by_required(words)
        scored = _ranked(found, query, words) if words.is_ranked else _equal(found, query, words)
    best = select(scored.c.id, _NO_DISTANCE, scored.c.score).order_by(scored.c.score.desc(), scored.c.id)
    return _materialized(best.limit(bindparam("candidates", type_=Integer())), "words")


def _ranked(found: CTE, query: CTE, words: WordsShape) -> Subquery:
    """By the words beside the phrases; a phrase in the text itself counts more than one in the title."""
    by_terms = _scored(found, query, words)
    score = (by_terms.c.score + found.c.in_text).label("score")
    return select(by_terms.c.id, score).join(found, found.c.id == by_terms.c.id).subquery("scored")


def _equal(found: CTE, query: CTE, words: WordsShape) -> Subquery:
    """All of them have all of it."""
    weight = select(func.coalesce(func.sum(query.c.weight), 0.0)).scalar_subquery()
    score = (weight + found.c.in_text).label("score")
    return _kept(select(found.c.id, score), found.c.id, words.filters).subquery("scored")


def _scored_by_heaviest(query: CTE, words: WordsShape) -> Subquery:
    """What the heaviest terms found, by all terms; read again only if that can change what was added up."""
    selecting = _selecting(query)
    found = _by_heaviest(selecting, words)
    all_terms = select(func.count()).select_from(query).scalar_subquery()
    their_number = select(func.count()).select_from(selecting).scalar_subquery()
    is_final = and_(bindparam("pairs_only", type_=Boolean()), their_number == all_terms)
    decision = _materialized(select(is_final.label("is_final")), "decision")
    gate = select(decision.c.is_final).scalar_subquery()
    final = _kept(select(found.c.id, found.c.score).where(gate), found.c.id, words.filters)
    again = select(_scored(found, query, words, only_if=~gate))
    return _in_blocks(union_all(final, again).subquery("each"), found)


def _in_blocks(scored: Subquery, found: CTE) -> Subquery:
    """Press what scores too high for its block just below the blocks before it, in the order that it has."""
    earlier = func.min(scored.c.score).over(order_by=found.c.block, range_=(None, -1))
    step: ColumnElement[float] = literal_column("1e-6::float8")
    below = earlier - found.c.block * step
    # Nothing is before the first block, and nothing is greater than NULL.
    score = case((scored.c.score > below - step, below - step / (1 + scored.c.score)), else_=scored.c.score)
    return select(scored.c.id, score.label("score")).join(found, found.c.id == scored.c.id).subquery("scored")


def _scored(found: CTE, query: CTE, words: WordsShape, *, only_if: ColumnElement[bool] | None = None) -> Subquery:
    # Read once: what is stored apart would be fetched again for each term.
    read = select(found.c.id, _copied(ChunkTerms.terms).label("terms")).join(
        ChunkTerms, ChunkTerms.chunk_id == found.c.id
    )
    if only_if is not None:
        read = read.where(only_if)
    loaded = _materialized(_kept(read, found.c.id, words.filters), "loaded")
    is_repeated = _matches(loaded.c.terms, query.c.repetition)
    held = case((is_repeated, query.c.weight * _REPEATED), else_=query.c.weight)
    return (
        select(loaded.c.id, _rounded(func.coalesce(func.sum(held), _NOTHING)).label("score"))
        .outerjoin(query, _matches(loaded.c.terms, query.c.lookup))
        .group_by(loaded.c.id)
        .subquery("rescored")
    )


def _rounded(score: Any) -> ColumnElement[Any]:
    """The order of adding must not decide between equals."""
    scale: ColumnElement[float] = literal_column("1e9::float8")
    rounded: ColumnElement[Any] = func.round(score * scale) / scale
    return rounded


def _kept(rows: AnySelect, chunk_id: Any, shape: Shape) -> AnySelect:
    """The filters themselves decide, whatever the terms of the scope say."""
    if conditions := filter_conditions.conditions(shape):
        rows = rows.join(KnowledgeChunk, KnowledgeChunk.id == chunk_id).where(*conditions)
    return rows


def _query_terms() -> CTE:
    """The query's terms with their weight: rarity (BM25's) times what they weigh as grammar or not."""
    given = (
        func.unnest(
            bindparam("terms", type_=_TEXTS),
            bindparam("factors", type_=ARRAY(Double)),
            bindparam("lookups", type_=_TEXTS),
            bindparam("repetitions", type_=_TEXTS),
            bindparam("beyond", type_=_TEXTS),
        )
        .table_valued("term", "factor", "lookup", "repetition", "beyond")
        .render_derived(name="given")
    )
    known = select(TermFrequency.frequency).where(TermFrequency.term == literal_column("''")).scalar_subquery()
    total = _materialized(select(func.coalesce(known, literal_column("1.0")).label("chunks")), "total")
    longer = aliased(TermFrequency)
    of_longer = (
        select(func.least(func.sum(longer.frequency), _ONE))
        .where(longer.term >= given.c.term, longer.term < given.c.beyond)
        .correlate(given)
        .scalar_subquery()
    )
    frequency = case((given.c.beyond.is_not(None), of_longer), else_=TermFrequency.frequency)
    holding = func.greatest(func.coalesce(frequency, 0.0) * total.c.chunks, _UNSEEN)
    # ln(1 + (N - n + 0.5) / (n + 0.5)): Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework".
    rarity = func.ln(1 + func.greatest(total.c.chunks - holding + 0.5, 0.0) / (holding + 0.5))
    weight = (cast(given.c.factor, Double) * rarity).label("weight")
    terms = (
        select(
            given.c.term,
            cast(given.c.lookup, TSQUERY).label("lookup"),
            cast(given.c.repetition, TSQUERY).label("repetition"),
            weight,
            holding.label("holding"),
            total.c.chunks,
        )
        .select_from(given)
        .join(total, true())
        .outerjoin(TermFrequency, TermFrequency.term == given.c.term)
        .order_by(weight.desc(), given.c.term)
        .limit(QUERY_TERMS)
    )
    return _materialized(terms, "query")


def _selecting(query: CTE) -> CTE:
    """The query's heaviest terms, as many as the budget of rows to read allows, but one at least."""
    order = (query.c.weight.desc(), query.c.term)
    share = func.least(1.0, bindparam("scope_size", type_=Double()) / query.c.chunks)
    ranked = select(
        query.c.lookup,
        query.c.weight,
        func.row_number().over(order_by=order).label("place"),
        func.sum(query.c.holding * share).over(order_by=order).label("rows"),
    ).subquery("heaviest")

    def few(count: Any, budget: str) -> ColumnElement[bool]:
        within = ranked.c.rows <= bindparam(budget, type_=Double())
        return or_(ranked.c.place == 1, and_(ranked.c.place <= count, within))

    at_first = few(literal_column(str(SELECTING_TERMS)), "first_budget").label("at_first")
    chosen = select(ranked.c.lookup, ranked.c.weight, at_first)
    return _materialized(chosen.where(few(bindparam("selecting", type_=Integer()), "budget")), "selecting")


def _by_heaviest(selecting: CTE, words: WordsShape) -> CTE:
    """Chunks with one of the heaviest terms, in blocks: the pools that they are ranked in, and what comes later."""
    wanted: Any = selecting.c.lookup
    if words.scoped:
        wanted = _SCOPE.op("&&", return_type=TSQUERY())(wanted)
    rows = select(ChunkTerms.chunk_id, selecting.c.weight, selecting.c.at_first)
    rows = rows.join(ChunkTerms, _matches(ChunkTerms.terms, wanted))
    if words.narrowed:
        rows = _kept(rows, ChunkTerms.chunk_id, words.filters)
    held = rows.subquery("held")
    score = _rounded(func.sum(held.c.weight)).label("score")
    # Where a search goes on with more terms, what it found with the first stays before what these add.
    at_first = _rounded(func.sum(held.c.weight).filter(held.c.at_first))
    columns = (held.c.chunk_id.label("id"), score, at_first.label("at_first"))
    order = (nulls_last(at_first.desc()), case((at_first.is_(None), score)).desc(), held.c.chunk_id)
    best = select(*columns).group_by(held.c.chunk_id).order_by(*order).limit(bindparam("pool", type_=Integer()))
    pool = best.subquery("pool")
    is_later = pool.c.at_first.is_(None)
    place = func.row_number().over(
        order_by=(nulls_last(pool.c.at_first.desc()), case((is_later, pool.c.score)).desc(), pool.c.id)
    )
    ends: ColumnElement[Any] = literal_column(f"ARRAY[{', '.join(f'{size + 1}::bigint' for size in POOLS[:-1])}]")
    later = case((is_later, literal_column(str(len(POOLS)))), else_=literal_column("0"))
    block = (func.width_bucket(place, ends) + later).label("block")
    return _materialized(select(pool.c.id, pool.c.score, block), "found")


def _by_required(words: WordsShape) -> CTE:
    """Chunks that have all that must be there, phrases to the letter."""
    rows = select(ChunkTerms.chunk_id.label("id"))
    if words.plan == "required":
        rows = rows.where(_matches(ChunkTerms.terms, cast(bindparam("required", type_=Text()), TSQUERY)))
    if words.scoped:
        rows = rows.where(_matches(ChunkTerms.terms, _SCOPE))
    if words.narrowed:
        rows = _kept(rows, ChunkTerms.chunk_id, words.filters)
    elif words.phrases:
        rows = rows.join(KnowledgeChunk, KnowledgeChunk.id == ChunkTerms.chunk_id)
    in_text: ColumnElement[Any] = literal_column("0")
    if words.phrases:
        rows = rows.join(KnowledgeSource, KnowledgeSource.id == KnowledgeChunk.source_id)
        as_it_is = KnowledgeSource.title + literal_column("E'\\n'") + KnowledgeChunk.content
        whole = func.coalesce(ChunkTerms.folded, as_it_is)
        phrase = func.unnest(bindparam("phrases", type_=_TEXTS)).table_valued("text").render_derived(name="phrase")
        missing = func.strpos(whole, phrase.c.text) == _ZERO
        rows = rows.where(~exists().select_from(phrase).where(missing))
        # Past the first line, which is the title's.
        text_alone = func.substr(whole, func.strpos(whole, literal_column("E'\\n'")) + literal_column("1"))
        has = func.count().filter(func.strpos(text_alone, phrase.c.text) > _ZERO)
        in_text = select(has).select_from(phrase).scalar_subquery()
    if words.is_guessed:
        # A whole block before the others, so that they follow where the guess alone found too little.
        guessed = _matches(ChunkTerms.terms, cast(bindparam("guess", type_=Text()), TSQUERY))
        in_text = in_text + case((guessed, _GUESSED), else_=_ZERO)
    # Of more than that, any; of those, the newest: which rows are read first is up to the server.
    met = _materialized(rows.add_columns(in_text.label("in_text")).limit(_REQUIRED_REACH), "met")
    newest = select(met.c.id, met.c.in_text).order_by(met.c.in_text.desc(), met.c.id.desc())
    return _materialized(newest.limit(bindparam("pool", type_=Integer())), "found")


def _fused(meaning: CTE, words: CTE) -> CTE:
    by_meaning = select(
        meaning.c.id,
        meaning.c.distance,
        func.row_number().over(order_by=(meaning.c.distance, meaning.c.id)).label("place"),
    ).subquery("by_meaning")
    by_words = select(
        words.c.id, func.row_number().over(order_by=(words.c.score.desc(), words.c.id)).label("place")
    ).subquery("by_words")
    k: ColumnElement[float] = bindparam("k", type_=Double())

    def part(weight: str, leg: Any) -> Any:
        return func.coalesce(bindparam(weight, type_=Double()) / (k + leg.c.place), 0.0)

    score = part("meaning_weight", by_meaning) + part("words_weight", by_words)
    fused = (
        select(func.coalesce(by_meaning.c.id, by_words.c.id).label("id"), by_meaning.c.distance, score.label("score"))
        .select_from(by_meaning.join(by_words, by_words.c.id == by_meaning.c.id, full=True))
        .subquery("fused")
    )
    return _materialized(_without_echoes(fused), "ranked")


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
    # What puts a block before the other is no weight of words.
    blocks = func.floor(page.c.score / _GUESSED) * _GUESSED
    columns = [
        chunk.id,
        chunk.source_id,
        cast(source.type, Text),
        source.title,
        source.uri,
        chunk.content,
        (_ONE - distance).label("similarity"),
        (page.c.score - blocks).label("score") if in_blocks else page.c.score,
        chunk.location,
        source.source_metadata,
        chunk.occurred_from,
        chunk.occurred_to,
    ]
    if with_vectors:
        columns.append(case((chunk.embedding_model == _MODEL, chunk.embedding)).label("vector"))
    return (
        select(*columns)
        .select_from(page)
        .join(chunk, chunk.id == page.c.id)
        .join(source, source.id == chunk.source_id)
        # Sorted here: the order of a page read before is nobody's promise.
        .order_by(page.c.score.desc(), page.c.id)
    )


def _copied(terms: Any) -> ColumnElement[Any]:
    copy: ColumnElement[Any] = terms.op("||", return_type=TSVECTOR())(cast(literal_column("''"), TSVECTOR))
    return copy


def _materialized(statement: AnySelect, name: str) -> CTE:
    return statement.cte(name).prefix_with("MATERIALIZED", dialect="postgresql")


def _matches(terms: Any, query: Any) -> ColumnElement[bool]:
    matches: ColumnElement[bool] = terms.op("@@", return_type=Boolean())(query)
    return matches


@cache
def neighbours() -> Prepared:
    """The chunks up to ``reach`` places before and after each of the chunks ``ids`` in their sources, in order."""
    hit, other = aliased(KnowledgeChunk), aliased(KnowledgeChunk)
    here, there = (_place(chunk) for chunk in (hit, other))
    reach = cast(bindparam("reach", type_=Integer()), Numeric)
    hits = _materialized(
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
    ids = _materialized(select(random_id).select_from(func.generate_series(1, 10 * limit)).distinct(), "random_ids")
    # Shuffled, since those that are met first may be the oldest.
    shuffled = select(chunk.id).join(ids, ids.c.id == chunk.id).where(*usable).order_by(func.random()).limit(limit)
    drawn = _materialized(shuffled, "drawn")
    missing = limit - select(func.count()).select_from(drawn).scalar_subquery()
    newest = select(chunk.id).where(*usable, chunk.id.not_in(select(drawn.c.id))).order_by(chunk.id.desc())
    chosen = union_all(select(drawn.c.id), newest.limit(missing).subquery().select()).subquery("chosen")
    return prepare(select(chunk.id, chunk.embedding).join(chosen, chosen.c.id == chunk.id))
