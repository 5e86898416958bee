"""How far the cheap rungs can be trusted: do they rank policies as the long fine-tune does?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..evaluators.latency.predictor import spearman
from .records import Rung

LEAST_PAIRS = 6
DRAWS = 500
_COVERED = (0.05, 0.95)


class Agreement(NamedTuple):
    """Rank correlation of a rung with the long fine-tune over ``pairs`` policies, and the ends of its 90 % interval."""

    rung: str
    pairs: int
    rank_correlation: float
    low: float
    high: float


def agreement(rung: str, pairs: Sequence[tuple[float, float]], seed: int = 0) -> Agreement | None:
    """From (accuracy at the rung, accuracy after the long fine-tune) of policies; None for fewer than six or where one
    side is all the same. The interval is a bootstrap over policies (Efron and Tibshirani 1993, ch. 13)."""
    values = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    if len(values) < LEAST_PAIRS or (values.std(axis=0) == 0).any():
        return None
    generator = np.random.default_rng(seed)
    drawn: list[float] = []
    while len(drawn) < DRAWS:
        sample = values[generator.integers(len(values), size=len(values))]
        if (sample.std(axis=0) > 0).all():
            drawn.append(spearman(sample[:, 0], sample[:, 1]))
    low, high = np.quantile(drawn, _COVERED)
    return Agreement(rung, len(values), spearman(values[:, 0], values[:, 1]), float(low), float(high))


def agreements(seen: Sequence[dict[str, float]]) -> list[Agreement]:
    """Of each cheap rung, from the accuracies by rung of every policy that was trained long."""
    found = [
        agreement(rung, [(s[rung], s[Rung.LONG]) for s in seen if rung in s and Rung.LONG in s])
        for rung in (Rung.BN.value, Rung.SHORT.value)
    ]
    return [a for a in found if a is not None]
