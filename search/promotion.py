"""What a free worker should do next: go on with a paused trial, or begin a new one.

A trial that has shown something at a cheap rung is worth the hypervolume that it is expected to add at the top, by the
gains of trials that are alike. Going on is right while it promises more for its cost than beginning anew does; and
what that promises is known from the trials before: begin them all, pay for their first rung, and go on with the best
of them only. The largest rate (gain over cost) at which the recent ones could have been worked through in that way is
the reservation rate of a search with recall (Weitzman 1979). Nothing is stopped here: who waits may still be continued.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .gain import Target, mean_gain, target
from .records import TrialRecord
from .stopping import Judge

Array = NDArray[np.float64]
RECENT = 30
"""Trials by which a new one is judged; the front moves, and what they were worth with it."""


class Worth(NamedTuple):
    """What a trial promised after its first rung: hypervolume (see :func:`gains`), what it costs to get it, and what
    the first rung did cost, in training steps of the uncompressed model."""

    gain: float
    rest: float
    first: float

    @property
    def rate(self) -> float:
        return self.gain / max(self.rest, 1e-9)


def gains(records: Sequence[TrialRecord], judge: Judge, corner: tuple[float, float, float]) -> list[float | None]:
    """Hypervolume that each trial is expected to add at the top, in accuracy times shares of the latency (ms) and the
    size (bytes) of ``corner``, whose accuracy is the least that counts; None where nobody knows what it will gain."""
    prospects = [judge.prospects(record) for record in records]
    known = [i for i, p in enumerate(prospects) if p is not None]
    found: list[float | None] = [None] * len(records)
    if known:
        aim = target(judge.points, np.array(corner))
        for i, gain in zip(known, _added([records[i] for i in known], prospects, aim), strict=True):
            found[i] = gain
    return found


def _added(records: Sequence[TrialRecord], prospects: Sequence[Array | None], aim: Target) -> list[float]:
    draws = np.stack([p for p in prospects if p is not None])
    costs = np.array([(t.latency.latency_ms if t.latency else np.inf, t.size_bytes or np.inf) for t in records])
    weights = np.full(draws.shape[1], 1 / draws.shape[1])
    return mean_gain(draws, weights, costs, aim).tolist()


def reservation_rate(seen: Sequence[Worth]) -> float:
    """The rate below which it is better to begin a new trial than to go on with one, from what recent ones promised."""
    ranked = sorted(seen, key=lambda worth: -worth.rate)
    gained = np.cumsum([worth.gain for worth in ranked])
    paid = np.cumsum([worth.rest for worth in ranked]) + sum(worth.first for worth in ranked)
    return float((gained / np.maximum(paid, 1e-9)).max()) if ranked else 0.0


def promoted(paused: Sequence[tuple[int, Worth | None]], seen: Sequence[Worth], *, new: bool) -> int | None:
    """The trial to go on with, by its number; None where a new one is better, if there may be one. Who cannot be judged
    yet comes first: the search learns most from it. Of equals the newest, which more was known for; so where nothing
    promises anything, trials go through as they are begun, and the front's next surprise is found at the top."""
    for number, worth in paused:
        if worth is None:
            return number
    best = max(((worth.rate, number) for number, worth in paused if worth is not None), default=None)
    if best is None or (new and best[0] < reservation_rate(seen)):
        return None
    return best[1]
