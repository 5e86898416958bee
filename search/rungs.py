"""How far the cheap rungs could be trusted: whether they ranked policies as the long fine-tune did, and how often a
trial was stopped wrongly."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from .records import NOT_CONTINUED, Rung
from .session import Session
from .split_gap import least_short
from .stopping import accuracy_at, upper_bound, wrongly

Array = NDArray[np.float64]
LEAST_PAIRS = 6
DRAWS = 500
COVERED = (0.05, 0.95)


class Agreement(NamedTuple):
    """Rank correlation of a rung with the long fine-tune over ``pairs`` policies, and the ends of its 90 % interval."""

    rung: str
    pairs: int
    rank_correlation: float
    low: float
    high: float


def correlations(columns: Array, top: Array, draws: int = 0, seed: int = 0) -> Array:
    """Rank correlation of each of the columns, shape (n, k), with what policies were at the top, shape (n,), equal
    values sharing a rank. Shape (k,); with ``draws`` those of as many bootstrap samples of the policies, the same for
    all columns (Efron and Tibshirani 1993, ch. 13), shape (draws, k). NaN where a column is all the same."""
    values = np.column_stack([columns, top])
    if not draws:
        return _ranked(values)
    generator = np.random.default_rng(seed)
    return np.stack([_ranked(values[generator.integers(len(values), size=len(values))]) for _ in range(draws)])


def _ranked(values: Array) -> Array:
    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(axis=0)
    spread = np.sqrt((ranks**2).sum(axis=0))
    products = ranks[:, :-1].T @ ranks[:, -1]
    scale = spread[:-1] * spread[-1]
    return np.divide(products, scale, out=np.full(len(products), np.nan), where=scale > 0)


def interval(drawn: Array) -> tuple[float, float]:
    """The ends of the 90 % interval of a drawn correlation."""
    low, high = np.nanquantile(drawn, COVERED)
    return float(low), float(high)


def agreement(rung: str, pairs: Sequence[tuple[float, float]], seed: int = 0) -> Agreement | None:
    """From (accuracy at the rung, accuracy after the long fine-tune) of policies; None for fewer than six or where one
    side is all the same."""
    values = np.array(pairs, dtype=np.float64).reshape(len(pairs), 2)
    if len(values) < LEAST_PAIRS or (values.std(axis=0) == 0).any():
        return None
    low, high = interval(correlations(values[:, :1], values[:, 1], DRAWS, seed)[:, 0])
    return Agreement(rung, len(values), float(correlations(values[:, :1], values[:, 1])[0]), low, high)


def agreements(seen: Sequence[Mapping[str, float]]) -> list[Agreement]:
    """Of each cheap rung, from the accuracies by rung of every policy that was trained long."""
    found = [
        agreement(rung, [(s[rung], s[Rung.LONG]) for s in seen if rung in s and Rung.LONG in s])
        for rung in (Rung.BN.value, Rung.PART.value, Rung.SHORT.value)
    ]
    return [a for a in found if a is not None]


def judge_rungs(session: Session) -> None:
    """Say how far the cheap rungs ranked as the long fine-tune did, over all that went through it."""
    long, part_steps = session.store.longs(), session.state["rungs"].get("part_steps")
    seen: list[dict[str, float]] = []
    for trial in (t for t in session.store.trials() if t.number in long):
        at = {rung.value: accuracy_at(trial, rung, part_steps) for rung in (Rung.BN, Rung.PART, Rung.SHORT)}
        known = {rung: accuracy for rung, accuracy in at.items() if accuracy is not None}
        seen.append(known | {Rung.LONG.value: long[trial.number].accuracy})
    for found in agreements(seen):
        session.folder.decide(
            "finalists", f"rung {found.rung} ranks as the long fine-tune with {found.rank_correlation:.2f}",
            f"rank correlation over {found.pairs} policies, 90 % interval {found.low:.2f} to {found.high:.2f}",
            **found._asdict(),
        )  # fmt: skip


def judge_stopping(session: Session) -> None:
    """Say how often the stopping rule was wrong, as far as the sample of trials that it spared tells."""
    trials = session.store.trials()
    hopes = {number: float(verdict["hope"]) for number, verdict in session.store.noted("spared").items()}
    found = wrongly(trials, hopes, least_short(session))
    waiting = sum(t.reason == NOT_CONTINUED for t in trials)
    if waiting:
        session.folder.decide(
            "search", f"{waiting} paused trials were not continued", "others promised more for the time", paused=waiting
        )
    if found.stopped or found.finished:
        most = upper_bound(found.wrong, found.finished)
        session.folder.decide(
            "search", f"stopped {found.stopped} trials early",
            f"of {found.finished} more that were finished all the same, {found.above} ended above what was hoped for "
            f"and {found.wrong} came onto the front; at most {most:.0%} are stopped wrongly (one-sided 95 % interval)",
            **found._asdict(), wrong_most=most,
        )  # fmt: skip
