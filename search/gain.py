"""Expected gain in hypervolume of policies whose latency and size are known and whose accuracy is not."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pareto import non_dominated
from .surrogate import Scale

Array = NDArray[np.float64]
MOST_FRONT, ROUGH_FRONT = 60, 20
_NODES, _RAW = np.polynomial.hermite_e.hermegauss(7)
_WEIGHTS = _RAW / _RAW.sum()


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be beaten: rows of ``front`` are (accuracy, latency_ms, size_bytes), as is ``corner``, beyond which a
    point is worth nothing. Accuracy above ``top`` is worth nothing either. Made by :func:`target`."""

    front: Array
    corner: Array
    top: float = math.inf

    def rough(self) -> "Target":
        """The same of fewer points, to look at a whole population."""
        return Target(_thinned(self.front, ROUGH_FRONT), self.corner, self.top)

    def with_point(self, accuracy: float, costs: Array) -> "Target":
        """The same once one more point is known."""
        return target(np.vstack([self.front, [accuracy, *costs]]), self.corner, self.top)


def target(points: Array, corner: Array, top: float = math.inf) -> Target:
    """The non-dominated points inside the box, most accurate first; a long front is thinned."""
    return Target(_thinned(points[front_of(points, corner)], MOST_FRONT), corner, top)


def _thinned(front: Array, most: int) -> Array:
    if len(front) <= most:
        return front
    return front[np.unique(np.linspace(0, len(front) - 1, most).round().astype(int))]


def front_of(points: Array, corner: Array) -> NDArray[np.intp]:
    """Which points are inside the box and not dominated, the most accurate first."""
    inside = np.flatnonzero((points[:, 0] > corner[0]) & (points[:, 1:] < corner[1:]).all(axis=1))
    front = inside[non_dominated(points[inside] * np.array([-1.0, 1.0, 1.0]))] if len(inside) else inside
    return front[np.argsort(-points[front, 0], kind="stable")]


def expected_gain(mean: Array, spread: Array, scale: Scale, costs: Array, target: Target) -> Array:
    """Expected hypervolume improvement (Emmerich et al. 2006), as a share of the box under the corner; shape (n,).

    With two of three objectives known, the gain is a piecewise linear function of the accuracy: between two
    neighbouring accuracies of the front its slope is the area of latency and size that nothing on the front above
    covers. The expectation over the accuracy is a Gauss–Hermite sum. ``mean`` and ``spread`` are of u, see
    :class:`~nightpress.search.surrogate.Scale`.
    """
    draws = scale.down(mean[:, None] + spread[:, None] * _NODES)  # (n, nodes)
    return mean_gain(draws, _WEIGHTS, costs, target) / max(scale.ceiling - target.corner[0], 1e-9)


def mean_gain(draws: Array, weights: Array, costs: Array, target: Target) -> Array:
    """Mean hypervolume that points add, shape (n,), from draws of their accuracy, shape (n, m), that weigh ``weights``,
    shape (m,); latency and size, shape (n, 2), count as shares of the corner's."""
    unit = target.corner[1:]  # latency and size count as shares of the corner's
    edges = np.minimum(np.concatenate([[np.inf], target.front[:, 0], [target.corner[0]]]), target.top)
    beyond = np.array([np.maximum(draws - edge, 0) @ weights for edge in edges])
    return (np.diff(beyond, axis=0) * _free_areas(costs / unit, target.front[:, 1:] / unit)).sum(axis=0)


def _free_areas(points: Array, covering: Array) -> Array:
    """Area between each point and (1, 1) that none of the first covering points dominates, for no covering point up
    to all of them, shape (covering + 1, n).

    What they leave free is a staircase that falls with the latency: of it a point has what lies between its own
    latency and the step that is as low as its size. Which step that is for each rank of a size is worked out once.
    """
    order = np.argsort(covering[:, 0], kind="stable")
    sizes, latencies = np.minimum(covering[order, 1], 1.0), covering[order, 0]
    edges = np.concatenate([[0.0], latencies, [1.0]])
    first = np.arange(len(covering) + 1)[:, None]
    whole = np.ones((len(first), 1))
    stairs = np.minimum.accumulate(np.hstack([whole, np.where(order < first, sizes, 1.0)]), axis=1)
    under = np.hstack([0 * whole, np.cumsum(np.diff(edges) * stairs, axis=1)])
    heights = np.sort(np.append(sizes, 1.0))
    higher = (stairs[:, None] >= np.append(heights, np.inf)[:, None]).sum(axis=2)  # steps above a size of each rank

    latency, size = points.T
    step = higher[:, np.searchsorted(heights, size, side="right")]
    own = np.clip(np.searchsorted(edges, latency, side="right") - 1, 0, len(covering))
    before = under[:, own] + stairs[:, own] * (latency - edges[own])
    free = np.take_along_axis(under, step, axis=1) - before - size * (edges[step] - latency)
    return np.where(edges[step] > latency, free, 0.0)
