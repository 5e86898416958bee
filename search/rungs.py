"""How far the cheap rungs could be trusted: whether they ranked policies as the long fine-tune did, and how often a
trial was stopped wrongly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..evaluators.latency.predictor import spearman
from .records import Rung
from .session import Session
from .stopping import upper_bound, wrongly

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


def judge_rungs(session: Session) -> None:
    """Say how far the cheap rungs ranked as the long fine-tune did, over all that went through it."""
    long = session.store.longs()
    seen = [
        {q.rung: q.accuracy for q in t.qualities} | {Rung.LONG.value: long[t.number]}
        for t in session.store.trials() if t.number in long
    ]  # fmt: skip
    for found in agreements(seen):
        session.folder.decide(
            "finalists", f"rung {found.rung} ranks as the long fine-tune with {found.rank_correlation:.2f}",
            f"rank correlation over {found.pairs} policies, 90 % interval {found.low:.2f} to {found.high:.2f}",
            **found._asdict(),
        )  # fmt: skip


def judge_stopping(session: Session) -> None:
    """Say how often the stopping rule was wrong, as far as the sample of trials that it spared tells."""
    hopes = session.store.noted("spared")
    stopped, finished, wrong = wrongly(session.store.trials(), {n: v["hope"] for n, v in hopes.items()})
    if stopped or finished:
        session.folder.decide(
            "search", f"stopped {stopped} trials early",
            f"of {finished} more that were finished all the same, {wrong} came onto the front; at most "
            f"{upper_bound(wrong, finished):.0%} are stopped wrongly (one-sided 95 % interval)",
            stopped=stopped, finished=finished, wrong=wrong, wrong_most=upper_bound(wrong, finished),
        )  # fmt: skip
