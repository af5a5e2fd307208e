"""Which plan a search takes, and what is remembered for it. Pure."""

from itertools import pairwise
from math import inf, isqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kotonoha_store import selectivity
from kotonoha_store.selectivity import (
    EF_SEARCH_MAX,
    EFFORTS,
    EVERYTHING,
    EXACT,
    Effort,
    Remembered,
    Selectivity,
    VectorPlan,
    choose_plan,
    ef_search,
    exact_limit,
)

tops = st.integers(1, 1000)
totals = st.floats(0, 1e12)
shares = st.floats(0, 1)
efforts: st.SearchStrategy[Effort] = st.sampled_from(EFFORTS)
index_efforts: st.SearchStrategy[Effort] = st.sampled_from(EFFORTS[:3])


# Up to how many candidates every one is compared


@pytest.mark.parametrize(
    ("top_k", "total", "limit"), [(10, 100_000, 7071), (10, 1_000_000, 22_360), (1, 0, 7), (1, 1, 7), (10, 500, 500)]
)
def test_the_exact_limit_is_where_the_measured_costs_meet(top_k: int, total: float, limit: int) -> None:
    assert exact_limit(top_k, total) == limit


@given(tops, st.integers(1, 10**12))
def test_the_exact_limit_is_a_root(top_k: int, total: int) -> None:
    assert abs(exact_limit(top_k, total) - isqrt(50 * top_k * total)) <= 1


@given(tops, tops, totals, totals)
def test_more_hits_and_more_chunks_make_exact_search_worth_while_longer(a: int, b: int, c: float, d: float) -> None:
    (few, many), (small, large) = sorted((a, b)), sorted((c, d))
    assert 0 < exact_limit(few, small) <= exact_limit(many, small) <= exact_limit(many, large)


# The plan


@given(st.floats(0, 1e12), totals, tops, efforts, st.integers(0, 2**31 - 1) | st.none())
def test_few_candidates_are_compared_and_many_go_through_the_index(
    kept: float, total: float, top_k: int, effort: Effort, limit: int | None
) -> None:
    known = Selectivity(kept, max(kept, total))
    plan = choose_plan(known, top_k=top_k, effort=effort, limit=limit)
    least = exact_limit(top_k, known.total) if limit is None else limit
    if effort == "exact" or kept <= least:
        assert plan == EXACT == VectorPlan("exact")
    else:
        assert plan == VectorPlan("index", ef_search(top_k, effort, share=known.share))


@given(st.lists(st.floats(0, 1e9), min_size=2), tops, efforts, st.integers(0, 10**9) | st.none())
def test_a_narrower_filter_never_goes_back_to_the_index(
    numbers: list[float], top_k: int, effort: Effort, limit: int | None
) -> None:
    plans = [
        choose_plan(Selectivity(kept, 1e9), top_k=top_k, effort=effort, limit=limit).name for kept in sorted(numbers)
    ]
    assert plans == sorted(plans)


@given(tops, index_efforts, st.integers(0, 2**31 - 1) | st.none())
def test_everything_goes_through_the_index_unless_exact_is_asked_for(
    top_k: int, effort: Effort, limit: int | None
) -> None:
    plan = choose_plan(EVERYTHING, top_k=top_k, effort=effort, limit=limit)
    assert plan == VectorPlan("index", ef_search(top_k, effort))
    assert choose_plan(EVERYTHING, top_k=top_k, effort="exact", limit=limit) is EXACT


@pytest.mark.parametrize(("kept", "limit", "plan"), [(0, 0, "exact"), (1, 0, "index"), (10, 10, "exact")])
def test_a_given_limit_is_inclusive(kept: int, limit: int, plan: str) -> None:
    assert choose_plan(Selectivity(kept, 100), top_k=10, limit=limit).name == plan


@given(st.floats(0, 1e15) | st.just(inf), totals)
def test_a_share_is_one(kept: float, total: float) -> None:
    assert 0 <= Selectivity(kept, total).share <= 1


def test_shares() -> None:
    assert [Selectivity(25, 100).share, Selectivity(0, 0).share, Selectivity(5, 0).share] == [0.25, 0, 1]
    assert EVERYTHING.share == 1


# ef_search


@given(tops, efforts, shares)
def test_ef_search_has_room_for_the_hits_within_pgvectors_limit(top_k: int, effort: Effort, share: float) -> None:
    assert max(40, min(2 * top_k, EF_SEARCH_MAX)) <= ef_search(top_k, effort, share=share) <= EF_SEARCH_MAX


@given(tops, tops, shares, shares, efforts)
def test_ef_search_follows_hits_and_filter(a: int, b: int, c: float, d: float, effort: Effort) -> None:
    (few, many), (narrow, wide) = sorted((a, b)), sorted((c, d))
    assert ef_search(few, effort, share=wide) <= ef_search(many, effort, share=wide)
    assert ef_search(few, effort, share=wide) <= ef_search(few, effort, share=narrow)


@given(tops, shares)
def test_more_effort_is_never_less(top_k: int, share: float) -> None:
    values = [ef_search(top_k, effort, share=share) for effort in EFFORTS]
    assert all(less <= more for less, more in pairwise(values))
    assert values[-1] == EF_SEARCH_MAX


def test_ef_search_of_common_searches() -> None:
    assert [ef_search(top_k) for top_k in (1, 50, 51, 150, 151, 400, 1000)] == [100, 100, 102, 300, 453, 1000, 1000]
    assert [ef_search(10, effort) for effort in EFFORTS] == [40, 100, 400, 1000]
    assert [ef_search(10, share=share) for share in (1, 0.5, 0.1, 0.05, 0.01, 0)] == [100, 100, 100, 600, 1000, 1000]


# What is remembered


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(selectivity, "monotonic", lambda: now[0])
    return now


def test_remembered_for_a_minute(clock: list[float]) -> None:
    known: Remembered[str, int] = Remembered()
    assert known.get("a") is None
    known.put("a", 1)
    clock[0] += 60
    assert known.get("a") == 1
    clock[0] += 0.001
    assert known.get("a") is None
    known.put("a", 2)
    assert known.get("a") == 2


def test_what_is_past_its_time_takes_no_memory(clock: list[float]) -> None:
    known: Remembered[int, int] = Remembered()
    for key in range(3):
        known.put(key, key)
        clock[0] += 20
    clock[0] += 15
    known.put(3, 3)
    assert list(known._known) == [1, 2, 3]
    clock[0] += 100
    known.put(4, 4)
    assert list(known._known) == [4]


def test_the_oldest_is_forgotten_first(clock: list[float]) -> None:
    known: Remembered[int, Any] = Remembered(size=3)
    for key in (1, 2, 3, 1, 4):
        known.put(key, -key)
    assert [known.get(key) for key in (1, 2, 3, 4)] == [-1, None, -3, -4]


def test_no_more_is_kept_than_fits(clock: list[float]) -> None:
    known: Remembered[int, Any] = Remembered(size=10)
    for key in range(1000):
        known.put(key, key)
    assert len(known._known) == 10
