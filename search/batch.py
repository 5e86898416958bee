"""Several proposals from one bred population, for workers that are free at the same time.

Breeding takes nearly all of a proposal's time, and what it looks at holds more than one good policy. One that is taken
counts as if it had come out as expected: its point joins the front (the Kriging believer of Ginsbourger et al. 2010,
section 4), and what its evaluation will tell of policies like it is not worth finding out twice, which under a Gaussian
process does not depend on how it comes out. By both, gains only shrink: what was computed before is an upper bound, and
only the head of the list is computed anew (Minoux 1978).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..spaces.policy import Policy, digest
from .costs import trial_effort
from .encoding import Encoder
from .gain import Target, expected_gain, front_of
from .surrogate import Surrogate

Array = NDArray[np.float64]
TOGETHER = 3
"""So many workers must be free at once; for fewer a population is bred each."""
MOST = 64
"""Proposals from one population."""
CANDIDATES = 800
"""Of the rows that a breeding has looked at: those that are kept to choose from."""
MOST_PENDING = 64
"""Trials under way that are counted, the latest: each is a row of every factor."""
HEAD = 64
"""Of the list, looked at anew together: one by one would be as many products of small matrices."""


@dataclass(slots=True)
class Looked:
    """Says what rows are worth and keeps both: the later generations crowd around the best policy, the earlier ones
    hold what differs from it."""

    worth: Callable[[Array], Array]
    _rows: list[Array] = field(default_factory=list[Array])
    _worths: list[Array] = field(default_factory=list[Array])

    def __call__(self, rows: Array) -> Array:
        worths = self.worth(rows)
        self._rows.append(rows)
        self._worths.append(worths)
        return worths

    def best(self, count: int) -> Array:
        """The most promising rows of all generations, each once."""
        order = np.argsort(-np.concatenate(self._worths), kind="stable")[: 2 * count]
        rows = np.vstack(self._rows)[order]
        _, first = np.unique(rows, axis=0, return_index=True)
        return rows[np.sort(first)[:count]]


class Doubts:
    """How far an evaluation at ``rung`` is likely to move the mean of u of rows, see :meth:`Surrogate.hoped`, once
    evaluations of some of the rows are under way, at most ``most``."""

    def __init__(self, surrogate: Surrogate, rows: Array, rung: int, most: int) -> None:
        self._kernel, self._noise, self._rungs = surrogate.kernel, surrogate.noise_at(rung), (rung, surrogate.rung)
        self._parts = surrogate.describer(rows)
        known = surrogate.explained(self._parts, rung)
        self.mean = known[surrogate.rung][0]
        """Of u at the surrogate's rung, shape (n,)."""
        self._seen = len(known[rung][1])
        self._factors = [np.vstack([known[r][1], np.empty((most, len(rows)))]) for r in self._rungs]
        own, shared = (self._kernel.prior(self._parts, rung, r) for r in self._rungs)
        low, top = (known[r][1] for r in self._rungs)
        self._own = own - np.einsum("ij,ij->j", low, low)
        self._shared = shared - np.einsum("ij,ij->j", low, top)

    def spread(self, at: NDArray[np.intp]) -> Array:
        """Standard deviation of the move, shape (len(at),)."""
        return np.abs(self._shared[at]) / np.sqrt(np.maximum(self._own[at], 1e-8) + self._noise)

    def begin(self, index: int) -> None:
        """Count one of the rows as being evaluated: another row of the Cholesky factor."""
        (low, top), seen = self._factors, self._seen
        one = (self._parts[0][[index]], self._parts[1][[index]], self._parts[2][[index]])
        near, at = self._kernel.near(self._parts, one), np.array([self._rungs[0]])
        scale = np.sqrt(max(self._own[index], 1e-8) + self._noise)
        told = low[:seen, index].copy()
        for factor, rung in zip(self._factors, self._rungs, strict=True):
            cross = self._kernel(near, np.array([rung]), at)[:, 0]
            factor[seen] = (cross - told @ factor[:seen]) / scale
        self._own -= low[seen] ** 2
        self._shared -= low[seen] * top[seen]
        self._seen += 1


class Batch:
    """Policies that are proposed one after the other. ``rows`` are candidates, (n, columns), with their ``costs``,
    (n, 2); ``taken`` is the row that was chosen already, with its costs; ``pending`` are rows that are being evaluated,
    whose points stand on the front of ``aim``; ``known`` are digests that are not proposed again."""

    def __init__(
        self, encoder: Encoder, surrogate: Surrogate, aim: Target, rung: int, *, rows: Array, costs: Array,
        taken: tuple[Array, Array], pending: Array, known: Collection[str], most: int,
    ) -> None:  # fmt: skip
        self.size = self.left = most
        """How many it was made for, and how many of them are still to come."""
        self._encoder, self._scale, self._aim = encoder, surrogate.scale, aim
        priced = ~np.isnan(costs).any(axis=1)
        self._rows, self._costs = rows[priced], costs[priced]
        self._effort = trial_effort(surrogate.describer.macs(self._rows))
        begun = np.vstack([pending[-MOST_PENDING:], taken[0][None]])
        self._doubts = Doubts(surrogate, np.vstack([self._rows, begun]), rung, len(begun) + most)
        for index in range(len(begun)):
            self._doubts.begin(len(self._rows) + index)
        self._join(self._doubts.mean[-1], taken[1])
        self._known, self._open = set(known), np.ones(len(self._rows), dtype=np.bool_)
        self._worths, self._sure = np.zeros(len(self._rows)), np.zeros(len(self._rows), dtype=np.bool_)
        self._look(np.arange(len(self._rows)))

    def take(self) -> Policy | None:
        """The next policy; None where there is none left that would gain anything."""
        while self.left and self._open.any():
            index = self._best()
            if self._worths[index] <= 0:
                break
            self._open[index] = False
            policy = self._encoder.policy(self._rows[index])
            key = digest(policy)
            if key in self._known:
                continue
            self._known.add(key)
            self._doubts.begin(index)
            self._join(self._doubts.mean[index], self._costs[index])
            self._sure[:] = False
            self.left -= 1
            return policy
        self.left = 0
        return None

    def _best(self) -> int:
        while True:
            head = np.argsort(np.where(self._open, -self._worths, np.inf), kind="stable")[:HEAD]
            if self._sure[head[0]]:
                return int(head[0])
            self._look(head[self._open[head] & ~self._sure[head]])

    def _look(self, at: NDArray[np.intp]) -> None:
        """Expected gain by the cost of the trial, as things stand."""
        mean, spread = self._doubts.mean[at], self._doubts.spread(at)
        self._worths[at] = expected_gain(mean, spread, self._scale, self._costs[at], self._aim) / self._effort[at]
        self._sure[at] = True

    def _join(self, mean: float, costs: Array) -> None:
        """Put a point on the front, which is not thinned: what was just taken must stand on it."""
        points = np.vstack([self._aim.front, [float(self._scale.down(mean)), *costs]])
        self._aim = replace(self._aim, front=points[front_of(points, self._aim.corner)])
