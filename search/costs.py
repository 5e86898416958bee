"""Latency and size of many rows at once: a quick estimate, fitted to the target's own predictions."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..spaces.policy import Policy
from .encoding import Encoder

Array = NDArray[np.float64]
Costs = Callable[[Policy], tuple[float, int]]
"""Predicted latency in ms and file size in bytes of a policy."""

EXAMPLES, MOST_EXAMPLES = 400, 1600
_RIDGE = 1e-4


class QuickCosts:
    """Screens a population; what is proposed is priced by ``exact`` itself.

    Both are sums over layers of work, weights and calls by precision, and of the changes of precision, so that a
    ridge regression on these amounts follows the predictor closely. It learns from every exact price, so it is
    best where the search looks.
    """

    def __init__(self, encoder: Encoder, exact: Costs, seed: int = 0) -> None:
        self.exact = exact
        self._encoder, self._shapes = encoder, encoder.shapes
        self._rows = np.zeros((0, len(encoder.columns)))
        self._truth = np.zeros((0, 2))
        rows = encoder.random(EXAMPLES, np.random.default_rng(seed))
        self._learn(rows, np.array([exact(encoder.policy(row)) for row in rows], dtype=np.float64))

    @property
    def examples(self) -> tuple[Array, Array]:
        """Rows and their exact prices that it has learned from."""
        return self._rows, self._truth

    def recall(self, rows: Array, truth: Array) -> None:
        """Learn from these examples and no others."""
        self._rows, self._truth = rows[:0], truth[:0]
        self._learn(rows, truth)

    def price(self, rows: Array, policies: Sequence[Policy]) -> Array:
        """Exact latency in ms and size in bytes of policies and their rows, shape (n, 2)."""
        found = np.array([self.exact(policy) for policy in policies], dtype=np.float64)
        self._learn(rows, found)
        return found

    def _learn(self, rows: Array, truth: Array) -> None:
        self._rows = np.vstack([self._rows[-MOST_EXAMPLES:], rows])
        self._truth = np.vstack([self._truth[-MOST_EXAMPLES:], truth])
        amounts = np.hstack(self._parts(self._rows))
        self._scale = np.maximum(np.abs(amounts).max(axis=0), 1e-12)
        self._weights = np.stack([_fit(amounts / self._scale, self._truth[:, i]) for i in range(2)], axis=1)
        self._floor = self._truth.min(axis=0) / 2

    def __call__(self, rows: Array) -> Array:
        """Latency in ms and size in bytes, shape (n, 2)."""
        found, start = np.zeros((len(rows), 2)), 0
        for part in self._parts(rows):  # summed part by part: side by side they would be copied twice
            end = start + part.shape[1]
            found += part @ (self._weights[start:end] / self._scale[start:end, None])
            start = end
        return np.maximum(found, self._floor)

    def _parts(self, rows: Array) -> list[Array]:
        """Amounts of each layer and of the whole, each of shape (n, ·)."""
        macs, weights, elements = self._shapes.work(rows)
        alive, int8 = self._shapes.alive(rows), self._shapes.int8(rows)
        changes = np.abs(np.diff(int8, axis=1)) * alive[:, 1:]
        stored = (weights * self._shapes.bytes_each(rows)).sum(axis=1)
        whole = np.stack([np.ones(len(rows)), weights.sum(axis=1), stored], axis=1)
        return [whole, macs, macs * int8, elements, elements * int8, alive, alive * int8, changes]


def _fit(amounts: Array, truth: Array) -> Array:
    """Ridge on relative errors, so that fast policies count as much as slow ones."""
    design, target = amounts / truth[:, None], np.ones(len(truth))
    gram = design.T @ design
    gram[np.diag_indices_from(gram)] += _RIDGE * np.trace(gram) / len(gram)
    return np.linalg.solve(gram, design.T @ target)
