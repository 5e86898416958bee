"""Which rungs a trial of this night goes through: from a study on the user's own model.

The night's first trials (the rules, the greedy walk, the first proposals: from mild to harsh) go through the whole
short fine-tune unstopped and are judged at several of its steps. Nothing of that is wasted, and it tells for each
length of a part how well it ranks policies as the whole does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..evaluators.evaluate import BN_ITEMS
from ..evaluators.training import REESTIMATION_ITEMS
from .config import RunConfig
from .records import Rung, TrialRecord, TrialState
from .rungs import COVERED, DRAWS, LEAST_PAIRS, correlations, interval
from .session import Session
from .stopping import accuracy_at

Array = NDArray[np.float64]
WANTED = 30
"""Policies."""
SHARE = 0.3
"""Of the trials that the search has time for, beside the rules, which are trained in any case."""
FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
FORWARD_SHARE = 0.35
"""A forward pass as a share of a training step."""
BEGIN_STEPS = 5.0
"""A proposal, its price and its start, in training steps: seconds would make the order of work a matter of chance."""
WORTH_LOOKING = 0.5
"""A look may cost so much of the steps that come after it, which are saved where it shows a trial to be hopeless."""
SEARCH_ITEMS = 0.25
"""Items of the search split for each training item."""


class Candidate(NamedTuple):
    """A cheap rung: its ``steps`` as a ``share`` of the short fine-tune's, and how it ranked policies as that did."""

    rung: str
    steps: int
    share: float
    pairs: int
    rank_correlation: float
    low: float
    high: float


def planned(config: RunConfig, *, short_steps: int, train_items: int, rules: int, payable: float) -> dict[str, Any]:
    """What the state keeps of the rungs before the study: ``looks``, the steps that may become a rung, and ``study``,
    the number of policies; or ``part_steps`` (0 for no such rung) where there is nothing to find out.

    ``payable`` is the number of trials that the search's time pays for; ``max_trials`` takes its place.
    """
    if config.finetune.part_steps is not None or "rungs" in config.search.without:
        given = 0 if "rungs" in config.search.without else config.finetune.part_steps or 0
        return {"part_steps": given if given < short_steps else 0}
    look = look_steps(train_items, config.finetune.batch_size)
    looks = sorted({max(1, round(short_steps * f)) for f in FRACTIONS})
    looks = [step for step in looks if look < WORTH_LOOKING * (short_steps - step)]
    if not looks:
        return {"part_steps": 0}
    affordable = rules + int(SHARE * (config.search.max_trials or payable))
    return {"looks": looks, "study": max(LEAST_PAIRS, min(WANTED, affordable))}


def look_steps(train_items: int, batch_size: int) -> float:
    """What it costs to judge a trial on the search split, in training steps."""
    return FORWARD_SHARE * SEARCH_ITEMS * train_items / batch_size


def first_steps(train_items: int, batch_size: int) -> float:
    """What batch-norm re-estimation and its judgement cost, in training steps."""
    passes = 2 * min(REESTIMATION_ITEMS, train_items) + min(BN_ITEMS, SEARCH_ITEMS * train_items)
    return FORWARD_SHARE * passes / batch_size


def studying(rungs: Mapping[str, Any]) -> bool:
    """Whether the study goes on, from the state's ``rungs``; nights of earlier versions have none."""
    return bool(rungs.get("looks")) and "part_steps" not in rungs


def rungs_of(rungs: Mapping[str, Any]) -> tuple[Rung, ...]:
    """The rungs of a trial in order, from the state's ``rungs``."""
    kept = {Rung.BN: rungs.get("bn", True), Rung.PART: rungs.get("part_steps"), Rung.SHORT: True}
    return tuple(rung for rung, there in kept.items() if there)


def next_rung(rungs: Mapping[str, Any], reached: str | None) -> Rung:
    """The rung after the one that a trial has reached; None for none yet."""
    order = list(Rung)
    at = order.index(Rung(reached)) if reached is not None else -1
    return next(rung for rung in rungs_of(rungs) if order.index(rung) > at)


def end_study(session: Session) -> None:
    """Choose the rungs from what the study has shown, however many policies came to its end."""
    rungs = session.state["rungs"]
    seen = [t for t in session.store.trials() if t.looks and t.state is TrialState.COMPLETE and t.reused_from is None]
    found, *own = choose(seen, rungs["looks"], rungs["short_steps"])
    part, bn = session.store.agreed("part", own)
    told = [f"{_named(c)} {c.rank_correlation:.2f} (90 %: {c.low:.2f} to {c.high:.2f})" for c in found]
    reason = f"{len(seen)} of {rungs['study']} policies went through the whole short fine-tune"
    if told:
        reason += f"; with it rank: {', '.join(told)}; the cheapest is taken that ranks better than chance and is not "
        reason += "clearly worse than the best"
    else:
        reason += f", too few or too alike to say how well a part of it ranks; {LEAST_PAIRS} that differ would do"
    if [part, bn] != own:
        reason += "; another driver of the study was the first to end it, and its choice holds"
    said = f"a rung after {part} of {rungs['short_steps']} steps" if part else "no rung in the short fine-tune"
    session.folder.decide(
        "search", said + ("" if bn else ", none before it"), reason,
        study=[c._asdict() for c in found], policies=len(seen), wanted=WANTED, part_steps=part, bn=bn,
    )  # fmt: skip
    session.update(rungs={**rungs, "part_steps": part, "bn": bn})


def choose(seen: Sequence[TrialRecord], looks: Sequence[int], short_steps: int) -> tuple[list[Candidate], int, bool]:
    """The candidates as they came out, the steps of the part that becomes a rung (0: none), and whether batch-norm
    re-estimation stays one.

    Of the candidates that rank better than chance (the 90 % interval of their correlation is above 0) the cheapest is
    taken whose correlation is not clearly lower than the best one's: the interval of their difference, over the same
    bootstrap samples, reaches 0. Where batch-norm re-estimation is that, no part is needed; where it may rank no better
    than chance, it is dropped. Where all may, there is neither.
    """
    rows = [
        (accuracy_at(t, Rung.BN, None), *(accuracy_at(t, Rung.PART, step) for step in looks), t.quality.accuracy)
        for t in seen if t.quality is not None
    ]  # fmt: skip
    values = np.array([row for row in rows if None not in row], dtype=np.float64).reshape(-1, len(looks) + 2)
    if len(values) < LEAST_PAIRS or values[:, -1].std() == 0:
        return [], 0, True
    columns, top = values[:, :-1], values[:, -1]
    known, drawn = correlations(columns, top), correlations(columns, top, DRAWS)
    usable = [i for i in range(len(known)) if np.isfinite(known[i])]
    if not usable:
        return [], 0, True
    found = [
        Candidate(Rung.PART if i else Rung.BN, steps, steps / short_steps, len(values), float(known[i]),
                  *interval(drawn[:, i]))
        for i, steps in enumerate((0, *looks)) if i in usable
    ]  # fmt: skip
    telling = [i for i, candidate in zip(usable, found, strict=True) if candidate.low > 0]
    if not telling:
        return found, 0, False
    best = max(telling, key=lambda i: known[i])
    taken = next(i for i in telling if i == best or np.nanquantile(drawn[:, i] - drawn[:, best], COVERED[1]) >= 0)
    return found, (0, *looks)[taken], 0 in telling


def _named(candidate: Candidate) -> str:
    return f"{candidate.steps} steps" if candidate.rung == Rung.PART else "batch-norm re-estimation"
