"""How long the long fine-tunes are, what they cost, and how many of them the night can pay for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .clock import ENDING
from .finalists import beyond, complete, hopeful
from .records import UNCOMPRESSED, Rung, TrialRecord
from .session import Session
from .split_gap import search_limits

LENGTH = "long"
"""Of long fine-tunes, which the drivers of a shared study agree on."""
MOST_EPOCHS, LEAST_EPOCHS = 20, 4
"""Of a long fine-tune: what it can use, and what it should have. One of an epoch and a half left even the uncompressed
ResNet-20 worse than it had been."""
LONGER, LEAST_FINALISTS = 3, 3
"""A long fine-tune should be so many short ones; where it cannot, so few finalists must do."""
LONG_SHARES = (0.5, 0.6)
"""Of what is left before the verification, once the baselines are judged, for long fine-tunes: longer ones raise the
whole front, and more trials only its choice. The second where the first cannot pay for what they should have."""
SIMULATED = 1.3
"""What simulated activations make of a step's cost."""
LEAST_PACE, LEAST_PACE_RATIO = 3, 0.25
"""So many long fine-tunes say how long the others will take, beside what was guessed; at least that share of it."""
Array = NDArray[np.float64]


def size_long(session: Session) -> float:
    """Once the baselines are judged: say how long all long fine-tunes are. Returns how many seconds before the deadline
    those of the rules must be over."""
    left = session.clock.left_before(*ENDING)
    _size_long(session, rules_of(session), left)
    return session.clock.left_seconds - LONG_SHARES[-1] * left


def _size_long(session: Session, rules: list[TrialRecord], left_seconds: float) -> None:
    """The length that lets the baselines and the finalists finish, from what the short fine-tunes took: rather fewer
    finalists than shorter ones; the config wins."""
    rungs, given = session.state["rungs"], session.config.finetune
    known = session.store.known(LENGTH)
    if rungs.get("long_sized") or rungs.get("long_told"):
        return
    if not rules:  # those of a shared study are another driver's, who may be slower, or gone
        if session.store.driver is not None and given.long_steps is None:
            own = {"long_steps": max(rungs["short_steps"], rungs["long_steps"]), "squeezed": False}
            _take_over(session, session.store.agreed(LENGTH, own), rungs["finalists"])
        return
    if given.long_steps is not None:
        _decide_length(session, given.long_steps, "as the config has it")
        session.update(rungs={**rungs, "long_told": True})
        return
    most = MOST_EPOCHS * rungs["epoch_steps"]
    enough = min(most, max(LONGER * rungs["short_steps"], LEAST_EPOCHS * rungs["epoch_steps"]))
    wanted = rungs["finalists"]
    fewest = wanted if given.finalists is not None else min(wanted, LEAST_FINALISTS)
    usual, stretched = (share * left_seconds for share in LONG_SHARES)
    if known is not None:
        enough = known["long_steps"]
    size = _affordable(session, rules, wanted, enough, usual)
    while size.steps < enough and size.finalists > fewest:
        size = _affordable(session, rules, size.finalists - 1, enough, usual)
    if known is not None:
        _take_over(session, known, size.finalists, affordable=size.steps)
        return
    if size.steps < enough:
        size = _affordable(session, rules, fewest, enough, stretched)
        if size.steps < enough:
            session.update(rungs={**rungs, "squeezed": True})
            size = _affordable(session, rules, fewest, enough, stretched)
        size = size._replace(steps=min(size.steps, enough))
        if kept := [str(t.name) for t in rules if untrained(session, t)]:
            session.folder.decide(
                "search", f"no fine-tune of {', '.join(kept)}",
                "as accurate as the given network without one, and less so after the short one; there is no time for "
                f"the {enough} steps that a long one should have",
            )  # fmt: skip
    rungs = session.state["rungs"]
    steps = max(rungs["short_steps"], min(most, size.steps))
    _decide_length(
        session, steps,
        f"{size.rules} baselines that may come within the limits and {size.finalists} finalists, at what the short "
        f"ones took, fit into the time for it; {enough} steps are wanted",
        affordable=size.steps, least=rungs["short_steps"], wanted=enough, most=most,
    )  # fmt: skip
    found = {"long_steps": steps, "squeezed": bool(rungs.get("squeezed"))}
    if (agreed := session.store.agreed(LENGTH, found)) != found:  # another driver was first by a moment
        _take_over(session, agreed, size.finalists, affordable=size.steps)
        return
    session.update(rungs={**rungs, "long_steps": steps, "finalists": size.finalists, "long_sized": True})


def _take_over(session: Session, known: Mapping[str, Any], finalists: int, **evidence: float) -> None:
    """Go by the length that the first driver of a shared study has: all their points stand on one front."""
    reason = f"as the study has it, whose drivers compare their points; {finalists} finalists"
    if evidence.get("affordable", math.inf) < known["long_steps"]:
        reason += f", of whom this run has time for {evidence['affordable']:.0f} steps each: some will be left out"
    _decide_length(session, known["long_steps"], reason, **evidence)
    session.update(rungs={**session.state["rungs"], **known, "finalists": finalists, "long_sized": True})


def _decide_length(session: Session, steps: int, reason: str, **evidence: float) -> None:
    """Record how long long fine-tunes are, and by what that multiplies learning rates as far as the space allows."""
    times = rate_times(steps, session.state["rungs"]["short_steps"])
    session.folder.decide(
        "search", f"long fine-tunes of {steps} steps", reason, **evidence, learning_rate_times=round(times, 2)
    )


class _Size(NamedTuple):
    """Of the long fine-tunes that a share of the time pays for."""

    steps: int
    rules: int
    finalists: int


def _affordable(session: Session, rules: list[TrialRecord], finalists: int, enough: int, seconds: float) -> _Size:
    """The steps that all can have in this time. A finalist is taken to cost what the median baseline does. Of the rules
    those are counted that may come within the limits with ``enough`` steps, or with more where there are more."""
    steps, trained = enough, rules
    for _ in range(2):
        trained = [t for t in rules if within_reach(session, t, rules, max(steps, enough))]
        fixed, a_step = long_costs(session, trained).sum(axis=0) + finalists * a_finalist(session, trained or rules)
        steps = int((0.9 * seconds * session.workers - fixed) / max(a_step, 1e-9))
    return _Size(steps, len(trained), finalists)


def within_reach(session: Session, rule: TrialRecord, rules: list[TrialRecord], steps: int) -> bool:
    """Whether a rule may end within the limits, were its error to fall with the square root of the steps: a guess, for
    the plan alone. Measured on ResNet-20, errors fell by at most 1.5 with three times the steps."""
    if rule.name == UNCOMPRESSED:
        return True
    if beyond(session, rule) is not None:
        return False
    least = search_limits(session, Rung.SHORT).min_accuracy
    if least is None or hopeful(session, rule):
        return True
    top = max(session.state["given"]["search"]["accuracy"], *(short_accuracy(t) for t in rules))
    return top - short_accuracy(rule) <= max(top - least, 0.0) * math.sqrt(
        steps / session.state["rungs"]["short_steps"]
    )


def untrained(session: Session, trial: TrialRecord) -> bool:
    """Whether a trial is exported as the lowest rung left it: as accurate as the given network, and less so after the
    short fine-tune. So it is with the uncompressed network and with integers alone where the long fine-tune is shorter
    than it should be; a whole one would bring them further."""
    rungs, found = session.state["rungs"], {q.rung: q for q in trial.qualities}
    low, short = found.get(Rung.BN), found.get(Rung.SHORT)
    if low is None or short is None or not rungs.get("squeezed"):
        return False
    given = session.state["given"]["search"]["accuracy"]
    noise = math.hypot(low.accuracy_se or 0.0, short.accuracy_se or 0.0)  # the lowest rung looks at fewer items
    return low.accuracy > short.accuracy + noise and low.accuracy + (low.accuracy_se or 0.0) >= given


def a_finalist(session: Session, rules: list[TrialRecord]) -> Array:
    """Seconds that the long fine-tune of a finalist takes in any case, and seconds a step, shape (2,): what the median
    rule takes of those that are trained."""
    costs = long_costs(session, rules)
    return np.median(costs[costs[:, 1] > 0] if costs[:, 1].any() else costs, axis=0)


def long_costs(session: Session, trials: Sequence[TrialRecord]) -> Array:
    """Seconds that a long fine-tune of each trial takes however short it is, and seconds a step, shape (n, 2): from its
    lower rungs, times what those of the night took beside what was expected of them."""
    took = session.store.longs()
    trained = [t for t in session.store.trials() if t.number in took and session.store.ours(t)]
    pace = 1.0
    if len(trained) >= LEAST_PACE:
        spent = sum(took[t.number].seconds for t in trained)
        guessed = float(in_all(session, _guessed_costs(session, trained)).sum())
        pace = max(spent / max(guessed, 1e-9), LEAST_PACE_RATIO)
    return pace * _guessed_costs(session, trials)


def long_seconds(session: Session, trials: Sequence[TrialRecord]) -> Array:
    """What the long fine-tune of each trial will take, shape (n,)."""
    return in_all(session, long_costs(session, trials))


def in_all(session: Session, costs: Array) -> Array:
    """Seconds of a whole long fine-tune from its fixed part and those of a step, shape (…, 2)."""
    return costs @ np.array([1.0, session.state["rungs"]["long_steps"]])


def _guessed_costs(session: Session, trials: Sequence[TrialRecord]) -> Array:
    """By the lower rungs alone. The fixed part is four times the lowest rung: both splits, the exported file on the
    test split, a new view of the data; and each look of the study of the rungs costs about one of it."""
    found: list[tuple[float, float]] = []
    for trial in trials:
        spent = {q.rung: q.seconds for q in trial.qualities}
        low, short = spent.get(Rung.BN, 0.0), spent.get(Rung.PART, 0.0) + spent.get(Rung.SHORT, 0.0)
        a_step = max(short - (1 + len(trial.looks)) * low, 0.3 * short) / session.state["rungs"]["short_steps"]
        times = 0.0 if untrained(session, trial) else SIMULATED if trial.policy["bits"] else 1.0
        found.append((4 * low, times * a_step))
    return np.array(found, dtype=np.float64).reshape(len(found), 2)


def rate_times(long_steps: int, short_steps: int) -> float:
    """The square root of how many times as long as the short fine-tune the long one is, at least 1.

    The search finds the rate by short fine-tunes, in which a low one is best; the more steps a fine-tune has, the
    higher a rate does it good (Zimmer, Spiegel and Pokutta 2023, "How I Learned to Stop Worrying and Love Retraining",
    who scale it linearly).
    """
    return max(1.0, math.sqrt(long_steps / short_steps))


def rules_of(session: Session) -> list[TrialRecord]:
    """The most promising first: of those it is learned what can be expected of the others."""
    rules = ours(session, complete(session, "baseline"))
    return sorted(rules, key=lambda t: (t.name != UNCOMPRESSED, -short_accuracy(t), t.number))


def ours(session: Session, trials: list[TrialRecord]) -> list[TrialRecord]:
    """Those whose checkpoints lie in this run's folder; of a shared study each driver trains its own."""
    return [t for t in trials if session.store.ours(t)]


def short_accuracy(trial: TrialRecord) -> float:
    return trial.quality.accuracy if trial.quality is not None else 0.0
