"""What a query's words find, as a part of a search's statement."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from sqlalchemy import (
    ARRAY,
    CTE,
    Boolean,
    ColumnElement,
    Double,
    Integer,
    Subquery,
    Text,
    and_,
    bindparam,
    case,
    cast,
    exists,
    func,
    literal_column,
    null,
    nulls_last,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import TSQUERY, TSVECTOR
from sqlalchemy.orm import aliased

from kotonoha_store.columns import AnySelect
from kotonoha_store.filters import Shape, conditions
from kotonoha_store.models import ChunkTerms, KnowledgeChunk, KnowledgeSource, TermFrequency
from kotonoha_store.prepared import Prepared, prepare

WordPlan = Literal["any", "required", "scan"]
"""By the query's heaviest terms; by what must be there; by reading every text in scope."""

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

GUESSED: Final[ColumnElement[int]] = literal_column("1000000")
"""Added to the score of what meets a guess: a whole block before the others, so that they follow where the guess alone
found too little."""

_TEXTS: Final = ARRAY(Text)
_NO_DISTANCE: Final = cast(null(), Double).label("distance")
_ZERO: Final[ColumnElement[int]] = literal_column("0")
_NOTHING: Final[ColumnElement[float]] = literal_column("0::float8")
_ONE: Final[ColumnElement[float]] = literal_column("1")
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


@cache
def selected_terms() -> Prepared:
    """By how many of the query's terms chunks are looked for with this budget; parameters as for plan ``any``."""
    return prepare(select(func.count()).select_from(_selecting(_query_terms())))


def by_words(words: WordsShape) -> CTE:
    """Chunks with words of the query, by how many of its terms they hold and how rare those are."""
    query = _query_terms()
    if words.plan == "any":
        scored = _scored_by_heaviest(query, words)
    else:
        found = _by_required(words)
        scored = _ranked(found, query, words) if words.is_ranked else _equal(found, query, words)
    best = select(scored.c.id, _NO_DISTANCE, scored.c.score).order_by(scored.c.score.desc(), scored.c.id)
    return materialized(best.limit(bindparam("candidates", type_=Integer())), "words")


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
    decision = materialized(select(is_final.label("is_final")), "decision")
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
    loaded = materialized(_kept(read, found.c.id, words.filters), "loaded")
    is_repeated = matches(loaded.c.terms, query.c.repetition)
    held = case((is_repeated, query.c.weight * _REPEATED), else_=query.c.weight)
    return (
        select(loaded.c.id, _rounded(func.coalesce(func.sum(held), _NOTHING)).label("score"))
        .outerjoin(query, matches(loaded.c.terms, query.c.lookup))
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
    if asked := conditions(shape):
        rows = rows.join(KnowledgeChunk, KnowledgeChunk.id == chunk_id).where(*asked)
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
    total = materialized(select(func.coalesce(known, literal_column("1.0")).label("chunks")), "total")
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
    return materialized(terms, "query")


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
    return materialized(chosen.where(few(bindparam("selecting", type_=Integer()), "budget")), "selecting")


def _by_heaviest(selecting: CTE, words: WordsShape) -> CTE:
    """Chunks with one of the heaviest terms, in blocks: the pools that they are ranked in, and what comes later."""
    wanted: Any = selecting.c.lookup
    if words.scoped:
        wanted = _SCOPE.op("&&", return_type=TSQUERY())(wanted)
    rows = select(ChunkTerms.chunk_id, selecting.c.weight, selecting.c.at_first)
    rows = rows.join(ChunkTerms, matches(ChunkTerms.terms, wanted))
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
    return materialized(select(pool.c.id, pool.c.score, block), "found")


def _by_required(words: WordsShape) -> CTE:
    """Chunks that have all that must be there, phrases to the letter."""
    rows = select(ChunkTerms.chunk_id.label("id"))
    if words.plan == "required":
        rows = rows.where(matches(ChunkTerms.terms, cast(bindparam("required", type_=Text()), TSQUERY)))
    if words.scoped:
        rows = rows.where(matches(ChunkTerms.terms, _SCOPE))
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
        guessed = matches(ChunkTerms.terms, cast(bindparam("guess", type_=Text()), TSQUERY))
        in_text = in_text + case((guessed, GUESSED), else_=_ZERO)
    # Of more than that, any; of those, the newest: which rows are read first is up to the server.
    met = materialized(rows.add_columns(in_text.label("in_text")).limit(_REQUIRED_REACH), "met")
    newest = select(met.c.id, met.c.in_text).order_by(met.c.in_text.desc(), met.c.id.desc())
    return materialized(newest.limit(bindparam("pool", type_=Integer())), "found")


def _copied(terms: Any) -> ColumnElement[Any]:
    copy: ColumnElement[Any] = terms.op("||", return_type=TSVECTOR())(cast(literal_column("''"), TSVECTOR))
    return copy


def matches(terms: Any, query: Any) -> ColumnElement[bool]:
    met: ColumnElement[bool] = terms.op("@@", return_type=Boolean())(query)
    return met


def materialized(statement: AnySelect, name: str) -> CTE:
    return statement.cte(name).prefix_with("MATERIALIZED", dialect="postgresql")
