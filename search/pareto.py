"""Dominance, hypervolume and the knee. Everything here minimises; unknown values are refused, never ranked."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PIVOTS = 16
MAX_DROP = 0.01
"""How much accuracy the default choice may lose where the config sets no min_accuracy: 1.0 point."""


def as_losses(points: Sequence[Sequence[float]] | Array) -> Array:
    """Points as an array of shape (n, objectives). Raises ValueError when a value is not finite."""
    array = np.asarray(points, dtype=np.float64)
    if array.size and not np.isfinite(array).all():
        raise ValueError(
            f"every objective must be known and finite, but got {array[~np.isfinite(array).all(axis=1)][0]}"
        )
    return array.reshape(len(array), -1) if array.size else array.reshape(0, 0)


def non_dominated(points: Sequence[Sequence[float]] | Array) -> list[int]:
    """Indices of the points that no other dominates (no worse anywhere and better somewhere), in order.

    Of equal points the first stays.
    """
    losses = as_losses(points)
    if not len(losses):
        return []
    # In lexicographic order a point is dominated only by points before it, and then also by a kept one.
    order = np.lexsort(losses.T[::-1])
    order = order[~_plainly_dominated(losses)[order]]
    kept = np.empty_like(losses)
    keep: list[int] = []
    for i in order:
        if not (kept[: len(keep)] <= losses[i]).all(axis=1).any():
            kept[len(keep)] = losses[i]
            keep.append(int(i))
    return sorted(keep)


def _plainly_dominated(losses: Array) -> NDArray[np.bool_]:
    """Which points a few good ones dominate: nearly all of a large set, at a fraction of the cost of the loop."""
    if len(losses) < 2 * PIVOTS:
        return np.zeros(len(losses), np.bool_)
    ranks = np.argsort(np.argsort(losses, axis=0), axis=0).sum(axis=1)
    found = np.zeros(len(losses), np.bool_)
    for pivot in losses[np.argsort(ranks, kind="stable")[:PIVOTS]]:
        found |= (pivot <= losses).all(axis=1) & (pivot < losses).any(axis=1)
    return found


def dominated_by(point: Sequence[float] | Array, front: Array) -> bool:
    """Whether some point of the front is no worse in every objective and better in one."""
    if not len(front):
        return False
    target = np.asarray(point, dtype=np.float64)
    return bool(((front <= target).all(axis=1) & (front < target).any(axis=1)).any())


def hypervolume(points: Sequence[Sequence[float]] | Array, reference: Sequence[float] | Array) -> float:
    """Volume that the points dominate below the reference point; exact, by slicing along the last objective.

    Points that are not better than the reference in every objective add nothing.
    """
    corner = np.asarray(reference, dtype=np.float64)
    losses = as_losses(points)
    if not len(losses):
        return 0.0
    inside = losses[(losses < corner).all(axis=1)]
    return _volume(inside[non_dominated(inside)], corner) if len(inside) else 0.0


def _volume(losses: Array, corner: Array) -> float:
    if losses.shape[1] == 1:
        return float(corner[0] - losses.min())
    if losses.shape[1] == 2:
        return _area(losses, corner)
    losses = losses[np.argsort(losses[:, -1], kind="stable")]
    edges = np.append(losses[:, -1], corner[-1])
    total = 0.0
    for i in range(len(losses)):
        depth = edges[i + 1] - edges[i]
        if depth > 0:
            total += depth * _volume(losses[: i + 1, :-1], corner[:-1])
    return float(total)


def _area(losses: Array, corner: Array) -> float:
    order = losses[np.lexsort((losses[:, 1], losses[:, 0]))]
    floor = np.minimum.accumulate(order[:, 1])
    ceilings = np.concatenate(([corner[1]], floor[:-1]))
    return float(((corner[0] - order[:, 0]) * np.maximum(ceilings - order[:, 1], 0)).sum())


def spread(
    points: Sequence[Sequence[float]] | Array, reference: Sequence[float] | Array, count: int,
    first: Sequence[int] = (), known: Sequence[Sequence[float]] | Array = (),
) -> list[int]:  # fmt: skip
    """At most ``count`` indices: ``first``, then those chosen greedily by the hypervolume that each adds to those
    before it and to the ``known`` points."""
    losses = as_losses(points)
    beside = as_losses(known) if len(known) else losses[:0]
    chosen = list(first[:count])

    def covered(more: Sequence[int]) -> float:
        there = np.vstack([beside, losses[list(more)]])
        return hypervolume(there, reference) if len(there) else 0.0

    while len(chosen) < min(count, len(losses)):
        have = covered(chosen)
        gains = [-1.0 if i in chosen else covered([*chosen, i]) - have for i in range(len(losses))]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        chosen.append(best)
    return chosen


def knee(points: Sequence[Sequence[float]] | Array) -> int | None:
    """The point nearest to the ideal one after each objective is scaled to [0, 1] over the points."""
    losses = as_losses(points)
    if not len(losses):
        return None
    low, high = losses.min(axis=0), losses.max(axis=0)
    scaled = (losses - low) / np.where(high > low, high - low, 1.0)
    return int(np.argmin((scaled**2).sum(axis=1)))


def losses(accuracy: float, latency_ms: float, size_bytes: float) -> tuple[float, float, float]:
    """The one place where accuracy's sign is turned: what is minimised, in the order used everywhere."""
    return (-accuracy, latency_ms, float(size_bytes))


def relative_hypervolume(points: Sequence[tuple[float, float, float]], reference: tuple[float, float, float]) -> float:
    """Hypervolume of losses as a share of the box between the reference point and a perfect, free model
    (accuracy 1, no time, no bytes); in [0, 1] for accuracies up to 1."""
    corner = np.asarray(reference)
    box = corner - np.array([-1.0, 0.0, 0.0])
    scaled = (as_losses(points) - np.array([-1.0, 0.0, 0.0])) / box if len(points) else as_losses(points)
    return hypervolume(scaled, np.ones(3))
