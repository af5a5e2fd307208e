"""Hits that differ from each other: the choice, pure, against a plain reading of its formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kotonoha_store.diversity import spread_out

Case = tuple[NDArray[np.float32], list[float]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count, dimension = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    # Whole numbers: equal and opposite vectors occur, and none is nearly zero.
    row = st.lists(st.integers(-3, 3), min_size=dimension, max_size=dimension).filter(any)
    vectors = np.array(draw(st.lists(row, min_size=count, max_size=count)), dtype=np.float32)
    relevance = draw(st.lists(st.floats(-1, 1, width=32), min_size=count, max_size=count))
    return vectors, relevance


diversities = st.floats(0, 1)


@given(cases(), st.integers(1, 15), diversities)
def test_each_choice_is_the_best_that_is_left(case: Case, count: int, diversity: float) -> None:
    vectors, relevance = case
    chosen = spread_out(vectors, relevance, count=count, diversity=diversity)
    units = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, position in enumerate(chosen):
        before = chosen[:number]

        def value(i: int, before: list[int] = before) -> float:
            echo = max((float(units[i] @ units[j]) for j in before), default=0.0)
            return (1 - diversity) * relevance[i] - diversity * echo

        # Equal ones may come in either order.
        assert value(position) >= max(value(i) for i in range(len(relevance)) if i not in before) - 1e-5


@given(cases(), st.integers(1, 15), diversities)
def test_as_many_as_asked_for_and_none_twice(case: Case, count: int, diversity: float) -> None:
    vectors, relevance = case
    chosen = spread_out(vectors, relevance, count=count, diversity=diversity)
    assert len(chosen) == len(set(chosen)) == min(count, len(relevance))
    assert set(chosen) <= set(range(len(relevance)))
    assert all(type(position) is int for position in chosen)


@given(cases(), st.integers(1, 15), diversities)
def test_fewer_are_the_first_of_more(case: Case, count: int, diversity: float) -> None:
    vectors, relevance = case
    every = spread_out(vectors, relevance, count=len(relevance), diversity=diversity)
    assert spread_out(vectors, relevance, count=count, diversity=diversity) == every[:count]


@given(cases())
def test_without_diversity_relevance_alone_decides(case: Case) -> None:
    vectors, relevance = case
    chosen = spread_out(vectors, relevance, count=len(relevance), diversity=0.0)
    assert chosen == sorted(range(len(relevance)), key=lambda i: (-relevance[i], i))


@given(cases(), diversities)
def test_the_length_of_a_vector_says_nothing(case: Case, diversity: float) -> None:
    vectors, relevance = case
    # By powers of two, so that nothing is rounded.
    longer = vectors * 2.0 ** np.arange(-4, len(vectors) - 4)[:, np.newaxis]
    choices = [spread_out(v, relevance, count=5, diversity=diversity) for v in (vectors, longer)]
    assert choices[0] == choices[1]


@given(cases(), st.floats(0, 0.999))
def test_the_most_relevant_comes_first(case: Case, diversity: float) -> None:
    vectors, relevance = case
    first = spread_out(vectors, relevance, count=1, diversity=diversity)[0]
    assert relevance[first] == pytest.approx(max(relevance), abs=1e-4)


def test_what_says_the_same_waits() -> None:
    vectors = np.array([[1, 0], [1, 0], [1, 0.1], [0, 1]], dtype=np.float16)
    relevance = [0.9, 0.89, 0.88, 0.5]
    assert spread_out(vectors, relevance, count=4, diversity=0.0) == [0, 1, 2, 3]
    assert spread_out(vectors, relevance, count=2, diversity=0.5) == [0, 3]
    assert spread_out(vectors, relevance, count=4, diversity=1.0)[:2] == [0, 3]


def test_half_precision_does_not_overflow() -> None:
    vectors = np.full((2, 1536), 60_000, dtype=np.float16)
    vectors[1, :768] *= -1
    assert spread_out(vectors, [0.1, 0.2], count=2, diversity=0.5) == [1, 0]


def test_of_nothing_nothing_is_chosen() -> None:
    assert spread_out(np.empty((0, 1536), dtype=np.float16), [], count=5, diversity=0.5) == []
