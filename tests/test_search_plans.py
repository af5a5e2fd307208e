"""The statements of searches use their indexes, on enough rows, with the values known and unknown.

After five runs of a prepared statement PostgreSQL may plan it once for all values (generic plan).
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import timedelta
from math import inf
from typing import Any, NamedTuple

import pytest
from plan_data import CHUNKS, JUNE, MODEL, QUERY, SOURCES, Planner, filled_database, planner_of
from sqlalchemy import URL

from kotonoha_store import SearchFilters, SourceType
from kotonoha_store import search_statements as statements
from kotonoha_store.prepared import Prepared
from kotonoha_store.search_records import AnyFilters
from kotonoha_store.search_request import Asked, Match, Words
from kotonoha_store.selectivity import PlanName
from kotonoha_store.word_statements import WordPlan, selected_terms

EVERYTHING = SearchFilters()
HALF = SearchFilters(guild_id=0)
ONE_USER = SearchFilters(user_id=1)
NARROW: dict[str, tuple[SearchFilters, str]] = {
    "guild": (SearchFilters(guild_id=1), "idx_chunks_guild_id"),
    "channel": (SearchFilters(channel_id=1), "idx_chunks_channel_id"),
    "thread": (SearchFilters(thread_id=1), "idx_chunks_thread_id"),
    "user": (ONE_USER, "idx_chunks_user_id"),
    "guild-and-user": (SearchFilters(guild_id=0, user_id=1), "idx_chunks_user_id"),
    "sources": (SearchFilters(source_ids=(1, 2, 3)), "idx_chunks_source_id"),
    "since": (SearchFilters(since=JUNE + timedelta(hours=CHUNKS - 100)), "idx_chunks_occurred_to"),
    "metadata": (SearchFilters(metadata={"n": 1}), "idx_sources_metadata"),
    "source-types": (SearchFilters(source_types=(SourceType.WEB_PAGE,)), "idx_sources_type"),
    "session-keys": (SearchFilters(session_keys=("key 77",)), "idx_sources_origin_session_key"),
}
SCOPES: dict[str, AnyFilters] = {
    "everywhere": EVERYTHING,
    "half": HALF,
    "eighth": SearchFilters(guild_id=1),
    "half-and-metadata": SearchFilters(guild_id=0, metadata={"kind": "talk"}),
}
BROAD: dict[str, AnyFilters] = {
    "everything": EVERYTHING,
    "guild": HALF,
    "sources": SearchFilters(source_ids=tuple(range(1, SOURCES // 2))),
    "since": SearchFilters(since=JUNE + timedelta(hours=CHUNKS // 2)),
    "guild-and-since": SearchFilters(guild_id=0, since=JUNE + timedelta(hours=100)),
    "range": SearchFilters(since=JUNE + timedelta(hours=100), until=JUNE + timedelta(hours=CHUNKS)),
    "metadata": SearchFilters(metadata={"kind": "talk"}),
    "source-types": SearchFilters(source_types=(SourceType.DISCORD_SESSION,)),
    "session-keys": SearchFilters(session_keys=tuple(f"key {i}" for i in range(1, SOURCES // 2))),
    "guild-and-metadata": SCOPES["half-and-metadata"],
    "not": ~SearchFilters(guild_id=1),
    "or": HALF | SearchFilters(user_id=1),
}
# Not that all have a term that half of the chunks have: once PostgreSQL knows what is asked for, it rightly reads the
# table, and not the index first. And no phrase in more chunks than are ranked: which of them are is up to the plan.
QUERIES: dict[str, tuple[str, Match]] = {
    "any": ("twentieth seldom 東京 word4000", "any"),
    "all": ("fifth 東京", "all"),
    "phrase": ('"night view"', "any"),
    "phrase-and-words": ('"night view" seldom twentieth', "any"),
    "phrases-and-all": ('"night view" fifth "neon"', "all"),
}


@pytest.fixture(scope="module")
def filled(server_url: URL, template: URL) -> Iterator[URL]:
    with filled_database(server_url, template) as url:
        yield url


@pytest.fixture(params=["custom", "generic"])
async def planner(filled: URL, request: pytest.FixtureRequest) -> AsyncIterator[Planner]:
    async with planner_of(filled, generic=request.param == "generic") as planner:
        yield planner


class Search(NamedTuple):
    """A statement with its values."""

    prepared: Prepared
    values: Mapping[str, Any]


def page(candidates: int = 10) -> dict[str, Any]:
    return {"candidates": candidates, "top_k": 10, "offset": 0}


def vector() -> dict[str, Any]:
    return {"query": QUERY, "model": MODEL, "ef_search": "100"}


def nearest(plan: PlanName, filters: AnyFilters) -> Search:
    asked = Asked.by(filters)
    return Search(statements.nearest(plan, asked.shape), asked.values | page() | vector())


def matching(text: str, filters: AnyFilters, match: Match = "any", plan: WordPlan | None = None) -> Search:
    asked, words = Asked.by(filters), Words.of(text, match)
    values = asked.values | words.values(candidates=10) | page() | {"scope_size": inf}
    return Search(statements.matching(words.shape(asked, plan or words.plan)), values)


def hybrid(plan: PlanName, text: str, filters: AnyFilters) -> Search:
    asked, words = Asked.by(filters), Words.of(text, "any")
    fusion = {"k": 60.0, "words_weight": 1.0, "meaning_weight": 1.0, "neighbour_penalty": 0.5, "scope_size": inf}
    values = asked.values | words.values(candidates=50) | page(50) | vector() | fusion
    return Search(statements.hybrid(plan, words.shape(asked, words.plan)), values)


def about(statement: Any, filters: AnyFilters, **values: Any) -> Search:
    asked = Asked.by(filters)
    return Search(statement(asked.shape), asked.values | values)


def neighbours() -> Search:
    return Search(statements.neighbours(), {"ids": list(range(1, 11)), "reach": 2})


def terms_selected() -> Search:
    return Search(selected_terms(), matching("twentieth seldom", EVERYTHING).values)


async def plan_of(planner: Planner, search: Search) -> str:
    return await planner.of(search.prepared, search.values)


def assert_reads_no_table(plan: str) -> None:
    assert "Seq Scan on knowledge_chunks" not in plan
    assert "Seq Scan on chunk_terms" not in plan


def assert_behind_its_gate(plan: str) -> None:
    """The index is read below the Result whose filter sets what the index needs."""
    lines = [line.strip() for line in plan.splitlines()]
    (scan,) = (number for number, line in enumerate(lines) if "Index Scan using idx_chunks_embedding" in line)
    assert lines[scan - 1].startswith("One-Time Filter: ")
    assert lines[scan - 1].count("IS NOT NULL") == 2
    assert lines[scan - 2].startswith("->  Result")


def assert_finds_terms(plan: str) -> None:
    assert "Bitmap Index Scan on idx_chunk_terms_terms" in plan
    assert "Index Scan using knowledge_chunks_pkey" in plan
    assert_reads_no_table(plan)


# By meaning


@pytest.mark.parametrize("filters", BROAD.values(), ids=BROAD)
async def test_nearest_through_the_index(planner: Planner, filters: AnyFilters) -> None:
    plan = await plan_of(planner, nearest("index", filters))
    assert_behind_its_gate(plan)
    assert_reads_no_table(plan)


@pytest.mark.parametrize(("filters", "index"), NARROW.values(), ids=NARROW)
async def test_nearest_within_a_scope(planner: Planner, filters: SearchFilters, index: str) -> None:
    plan = await plan_of(planner, nearest("exact", filters))
    assert "idx_chunks_embedding" not in plan
    # Of two types PostgreSQL expects every source, as long as it does not know which of them are asked for.
    if not (planner.generic and filters.source_types):
        assert index in plan
        assert_reads_no_table(plan)


async def test_nearest_of_everything_does_not_take_the_index_where_it_is_to_be_exact(planner: Planner) -> None:
    assert "idx_chunks_embedding" not in await plan_of(planner, nearest("exact", EVERYTHING))


# By words


@pytest.mark.parametrize("filters", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize(("text", "match"), QUERIES.values(), ids=QUERIES)
async def test_matching(planner: Planner, text: str, match: Match, filters: AnyFilters) -> None:
    assert_finds_terms(await plan_of(planner, matching(text, filters, match)))


@pytest.mark.parametrize(("filters", "index"), NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("kind", ["any", "all"])
async def test_matching_within_a_scope(planner: Planner, kind: str, filters: SearchFilters, index: str) -> None:
    plan = await plan_of(planner, matching(QUERIES[kind][0], filters, QUERIES[kind][1]))
    # Whichever holds fewer.
    assert "Bitmap Index Scan on idx_chunk_terms_terms" in plan or index in plan
    assert "Index Scan using knowledge_chunks_pkey" in plan
    assert_reads_no_table(plan)


async def test_terms_are_read_by_their_chunk(planner: Planner) -> None:
    plan = await plan_of(planner, matching("twentieth seldom", EVERYTHING))
    assert "Index Scan using chunk_terms_pkey" in plan


async def test_matching_by_reading_every_text_in_scope(planner: Planner) -> None:
    plan = await plan_of(planner, matching('"e"', ONE_USER, plan="scan"))
    assert "idx_chunk_terms_terms" in plan
    assert_reads_no_table(plan)


async def test_frequencies_of_terms(planner: Planner) -> None:
    plan = await plan_of(planner, terms_selected())
    assert plan.count("Index Scan using term_frequencies_pkey") == 2
    assert "Seq Scan" not in plan


# By both


@pytest.mark.parametrize("filters", [EVERYTHING, HALF, BROAD["metadata"]], ids=["everywhere", "guild", "metadata"])
async def test_hybrid_through_the_index(planner: Planner, filters: AnyFilters) -> None:
    plan = await plan_of(planner, hybrid("index", "twentieth seldom 東京", filters))
    assert_behind_its_gate(plan)
    assert_finds_terms(plan)


@pytest.mark.parametrize("kind", ["user", "sources", "session-keys"])
async def test_hybrid_within_a_scope(planner: Planner, kind: str) -> None:
    filters, index = NARROW[kind]
    plan = await plan_of(planner, hybrid("exact", "twentieth seldom 東京", filters))
    assert index in plan
    assert "idx_chunks_embedding" not in plan
    # Of few chunks PostgreSQL may as well read the terms.
    assert "idx_chunk_terms_terms" in plan or "Index Scan using chunk_terms_pkey" in plan
    assert_reads_no_table(plan)


# Beside a search


async def test_neighbours(planner: Planner) -> None:
    plan = await plan_of(planner, neighbours())
    assert "idx_chunks_source_id" in plan or "idx_chunks_searchable" in plan
    assert "knowledge_chunks_pkey" in plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("kind", ["guild", "channel", "thread", "user", "sources", "since"])
async def test_count(planner: Planner, kind: str) -> None:
    filters, index = NARROW[kind]
    plan = await plan_of(planner, about(statements.count_up_to, filters, limit=1000))
    assert f"Index Only Scan using {index}" in plan


@pytest.mark.parametrize("kind", ["metadata", "source-types", "session-keys"])
async def test_count_of_chunks_whose_sources_are_asked_for(planner: Planner, kind: str) -> None:
    filters, index = NARROW[kind]
    plan = await plan_of(planner, about(statements.count_up_to, filters, limit=1000))
    assert "Index Only Scan using idx_chunks_source_id" in plan
    # Up to a limit that it does not know PostgreSQL may as well go through these few sources.
    if not planner.generic:
        assert index in plan


@pytest.mark.parametrize("filters", BROAD.values(), ids=BROAD)
async def test_sampled(planner: Planner, filters: AnyFilters) -> None:
    plan = await plan_of(planner, about(statements.sampled, filters, percent=6.0))
    assert "Sample Scan on knowledge_chunks" in plan
    assert_reads_no_table(plan)


@pytest.mark.parametrize(("filters", "index"), NARROW.values(), ids=NARROW)
async def test_other_model(planner: Planner, filters: SearchFilters, index: str) -> None:
    plan = await plan_of(planner, about(statements.other_model, filters, model=MODEL))
    assert "idx_chunks_embedding" not in plan
    if not (planner.generic and filters.source_types):
        assert index in plan
        assert_reads_no_table(plan)


# The change from one kind of plan to the other

RUN: dict[str, Search] = {
    **{f"nearest-index-{kind}": nearest("index", filters) for kind, filters in BROAD.items()},
    **{f"nearest-exact-{kind}": nearest("exact", filters) for kind, (filters, _) in NARROW.items()},
    **{
        f"matching-{kind}-{scope}": matching(text, filters, match)
        for kind, (text, match) in QUERIES.items()
        for scope, filters in SCOPES.items()
    },
    "matching-scan": matching('"e"', ONE_USER, plan="scan"),
    **{
        f"hybrid-index-{kind}": hybrid("index", "twentieth seldom 東京", BROAD[kind])
        for kind in ("everything", "guild", "metadata", "session-keys")
    },
    "hybrid-exact": hybrid("exact", "twentieth seldom 東京", ONE_USER),
    "neighbours": neighbours(),
    "selected_terms": terms_selected(),
    **{f"count-{kind}": about(statements.count_up_to, filters, limit=30) for kind, (filters, _) in NARROW.items()},
    # All pages: else it would be others each time.
    **{
        f"sampled-{kind}": about(statements.sampled, BROAD[kind], percent=100.0) for kind in ("guild", "metadata", "or")
    },
    "other_model": about(statements.other_model, HALF, model="model-b"),
}


async def fetch(driver: Any, search: Search) -> Sequence[Any]:
    rows: Sequence[Any] = await driver.fetch(search.prepared.sql, *search.prepared.arguments(search.values))
    return rows


@pytest.mark.parametrize("search", RUN.values(), ids=RUN)
async def test_results_do_not_depend_on_how_often_a_statement_was_run(filled: URL, search: Search) -> None:
    async with planner_of(filled, generic=False) as planner:
        driver = planner.driver
        await driver.execute("SET plan_cache_mode = auto")
        first, *later = [await fetch(driver, search) for _ in range(8)]
        assert first
        assert all(rows == first for rows in later)
        # Also where PostgreSQL would not change by itself.
        await driver.execute("SET plan_cache_mode = force_generic_plan")
        assert await fetch(driver, search) == first
        runs = "SELECT custom_plans, generic_plans FROM pg_prepared_statements WHERE statement = $1"
        custom, generic = await driver.fetchrow(runs, search.prepared.sql)
        assert custom >= 5
        assert generic >= 1
        assert custom + generic == 9
