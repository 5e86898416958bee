"""Dominance, hypervolume, spread and knee, against definitions spelled out on small grids."""

import itertools
import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.search import pareto

SIDE = 5
Points = list[tuple[int, ...]]


def grids(dimensions: int, most: int = 8) -> st.SearchStrategy[Points]:
    """Points with whole coordinates from 0 to SIDE: ties and equal points come often."""
    return st.lists(st.tuples(*[st.integers(0, SIDE)] * dimensions), max_size=most)


any_grid = st.integers(1, 4).flatmap(grids)


def dominates(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def covered_cells(points: Points, dimensions: int) -> int:
    """Unit cells below the corner (SIDE, …) that some point dominates: the hypervolume, counted."""
    cells = itertools.product(range(SIDE), repeat=dimensions)
    return sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)


@given(any_grid)
def test_non_dominated_is_the_definition(points: Points) -> None:
    expected = [
        i
        for i, point in enumerate(points)
        if not any(dominates(other, point) for other in points) and point not in points[:i]
    ]
    assert pareto.non_dominated(points) == expected


@given(any_grid, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(points: Points, chance: random.Random) -> None:
    shuffled = list(points)
    chance.shuffle(shuffled)
    front = {points[i] for i in pareto.non_dominated(points)}
    assert {shuffled[i] for i in pareto.non_dominated(shuffled)} == front


@given(st.integers(1, 3).flatmap(lambda n: st.tuples(grids(n), st.tuples(*[st.integers(0, SIDE)] * n))))
def test_dominated_by_is_the_definition(case: tuple[Points, tuple[int, ...]]) -> None:
    points, point = case
    front = np.array(points, dtype=float).reshape(len(points), len(point))
    assert pareto.dominated_by(point, front) == any(dominates(other, point) for other in points)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
@given(data=st.data())
def test_hypervolume_counts_the_cells(dimensions: int, data: st.DataObject) -> None:
    points = data.draw(grids(dimensions))
    assert pareto.hypervolume(points, [SIDE] * dimensions) == covered_cells(points, dimensions)


def test_hypervolume_agrees_with_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((12, 3))
    samples = rng.random((40_000, 3))
    inside = np.any(np.all(points[None] <= samples[:, None], axis=2), axis=1)
    assert pareto.hypervolume(points, [1, 1, 1]) == pytest.approx(float(inside.mean()), abs=0.01)


@given(grids(3))
def test_dominated_points_add_nothing(points: Points) -> None:
    front = [points[i] for i in pareto.non_dominated(points)]
    corner = [SIDE] * 3
    assert pareto.hypervolume(front, corner) == pareto.hypervolume(points, corner)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "use",
    [
        pareto.as_losses,
        pareto.non_dominated,
        pareto.knee,
        partial(pareto.hypervolume, reference=(1, 1, 1)),
        partial(pareto.relative_hypervolume, reference=(0.0, 1.0, 1.0)),
        partial(pareto.spread, reference=(1, 1, 1), count=2),
    ],
    ids=["as_losses", "non_dominated", "knee", "hypervolume", "relative_hypervolume", "spread"],
)
def test_unknown_is_refused(use: Callable[[list[tuple[float, float, float]]], object], value: float) -> None:
    with pytest.raises(ValueError, match="every objective must be known and finite, but got"):
        use([(0.0, 0.0, 0.0), (0.0, value, 0.0)])


def test_nothing_has_no_front() -> None:
    assert pareto.non_dominated([]) == []
    assert pareto.hypervolume([], [1, 1, 1]) == 0
    assert pareto.relative_hypervolume([], (0.0, 1.0, 1.0)) == 0
    assert pareto.spread([], [1, 1], 3) == []
    assert pareto.knee([]) is None
    assert not pareto.dominated_by((0.0, 0.0), np.empty((0, 2)))


def test_points_at_or_beyond_the_reference_add_nothing() -> None:
    assert pareto.hypervolume([(1, 0, 0), (0, 2, 0)], [1, 1, 1]) == 0


@given(grids(3), st.integers(0, 5))
def test_spread_picks_from_the_front_by_what_each_adds(points: Points, count: int) -> None:
    corner = [SIDE] * 3
    chosen = pareto.spread(points, corner, count)
    assert len(chosen) == len(set(chosen)) <= count
    have = 0.0
    for at, index in enumerate(chosen):
        now = pareto.hypervolume([points[i] for i in chosen[: at + 1]], corner)
        best = max(pareto.hypervolume([*(points[i] for i in chosen[:at]), p], corner) for p in points)
        assert now == best > have, index
        have = now
    if len(chosen) < min(count, len(points)):
        assert have == pareto.hypervolume(points, corner)


def test_spread_begins_with_what_is_given() -> None:
    points = [(0.0, 0.9), (0.05, 0.85), (0.9, 0.0)]
    assert pareto.spread(points, [1, 1], 2, first=[1]) == [1, 2]
    assert pareto.spread(points, [1, 1], 3, first=[1]) == [1, 2, 0]
    assert pareto.spread(points, [1, 1], 1, first=[0]) == [0]


def test_spread_adds_to_what_is_known() -> None:
    points = [(0.1, 0.5), (0.5, 0.1), (0.3, 0.3)]
    assert pareto.spread(points, [1, 1], 3, known=[(0.0, 0.4)]) == [1, 2]
    assert pareto.spread(points, [1, 1], 3, known=[(0.0, 0.0)]) == []


def test_spread_takes_the_ends_before_the_near_neighbour() -> None:
    assert pareto.spread([(0.0, 0.9), (0.05, 0.85), (0.9, 0.0)], [1, 1], 2) == [1, 2]


def test_knee_is_nearest_to_the_ideal_after_scaling() -> None:
    assert pareto.knee([(0, 1000), (0.2, 200), (1, 0)]) == 1
    assert pareto.knee([(3, 3)]) == 0
    assert pareto.knee([(0, 7), (1, 7)]) == 0


def test_losses_turn_accuracy_alone() -> None:
    assert pareto.losses(0.9, 2.5, 1000) == (-0.9, 2.5, 1000.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 4), st.integers(0, 5000)), max_size=6))
def test_relative_hypervolume_is_a_share(points: list[tuple[float, float, int]]) -> None:
    share = pareto.relative_hypervolume([pareto.losses(*point) for point in points], (-0.5, 2.0, 2000.0))
    assert 0 <= share <= 1


def test_relative_hypervolume_of_known_points() -> None:
    reference = pareto.losses(0.5, 2.0, 2000)
    perfect, half = pareto.losses(1.0, 0, 0), pareto.losses(0.75, 1.0, 1000)
    assert pareto.relative_hypervolume([perfect], reference) == pytest.approx(1)
    assert pareto.relative_hypervolume([half], reference) == pytest.approx(0.125)
