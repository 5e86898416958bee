"""Expected gain in hypervolume of policies whose latency and size are known and whose accuracy is not."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pareto import non_dominated
from .surrogate import Scale

Array = NDArray[np.float64]
MOST_FRONT = 20
_NODES, _RAW = np.polynomial.hermite_e.hermegauss(7)
_WEIGHTS = _RAW / _RAW.sum()


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be beaten: rows of ``front`` are (accuracy, latency_ms, size_bytes), as is ``corner``, beyond which a
    point is worth nothing. Made by :func:`target`."""

    front: Array
    corner: Array

    def with_point(self, accuracy: float, costs: Array) -> "Target":
        """The same once one more point is known."""
        return target(np.vstack([self.front, [accuracy, *costs]]), self.corner)


def target(points: Array, corner: Array) -> Target:
    """The non-dominated points inside the box, most accurate first; a long front is thinned."""
    inside = points[(points[:, 0] > corner[0]) & (points[:, 1:] < corner[1:]).all(axis=1)]
    if len(inside):
        inside = inside[non_dominated(inside * np.array([-1.0, 1.0, 1.0]))]
        inside = inside[np.argsort(-inside[:, 0], kind="stable")]
    if len(inside) > MOST_FRONT:
        inside = inside[np.unique(np.linspace(0, len(inside) - 1, MOST_FRONT).round().astype(int))]
    return Target(inside, corner)


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
    unit = target.corner[1:]
    priced = (costs / unit).astype(np.float32)  # latency and size as shares of the corner's
    kept = target.front
    edges = np.concatenate([[np.inf], kept[:, 0], [target.corner[0]]])
    gains = np.zeros(len(draws))
    for level in range(len(kept) + 1):
        above, below = edges[level], edges[level + 1]
        height = (np.clip(draws, below, above) - below) @ weights
        gains += height * _free_area(priced, (kept[:level, 1:] / unit).astype(np.float32))
    return gains


def _free_area(points: NDArray[np.float32], covering: NDArray[np.float32]) -> NDArray[np.float32]:
    """Area between each point and (1, 1) that no covering point dominates, shape (n,)."""
    order = covering[np.argsort(covering[:, 0], kind="stable")]
    edges = np.concatenate([[-np.inf], order[:, 0], [1.0]]).astype(points.dtype)
    ceiling = np.concatenate([[1.0], np.minimum(np.minimum.accumulate(order[:, 1]), 1.0)]).astype(points.dtype)
    x, y = np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])
    area = np.zeros_like(x)
    for j in range(len(ceiling)):
        width = np.maximum(edges[j + 1] - np.maximum(edges[j], x), 0)
        area += width * np.maximum(ceiling[j] - y, 0)
    return area
