"""The long fine-tune: how long it is, who gets it, and what comes of it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..evaluators.evaluate import Job, Outcome
from ..evaluators.quality import Score
from ..spaces.files import write_whole
from ..spaces.space import LEARNING_RATE
from .clock import ENDING
from .disk import find_room, free_disk, is_full
from .finalists import beyond, choose, complete, expected_accuracies, hopeful, surrogate_of
from .records import UNCOMPRESSED, Rung, TrialRecord
from .rungs import judge_rungs
from .sampler import NightpressSampler
from .session import Session, quality_of
from .split_gap import search_limits
from .store import policy_of
from .surrogate import RUNGS
from .worker import WORKER_LOST, Failure

OUTCOME = "long.json"
LENGTH = "long"
"""Of long fine-tunes, which the drivers of a shared study agree on."""
MOST_EPOCHS, LEAST_EPOCHS = 20, 4
"""Of a long fine-tune: what it can use, and what it should have. One of an epoch and a half left even the uncompressed
ResNet-20 worse than it had been."""
LONGER, LEAST_FINALISTS = 3, 3
"""A long fine-tune should be so many short ones; where it cannot, so few finalists must do."""
MOST_FURTHER = 16
"""Finalists beyond the planned ones, where there is time for them at the end."""
SURE = 1.3
"""So many times of what a further one is expected to take must be left: given up at the end, it was for nothing."""
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
    _size_long(session, _rules(session), left)
    return session.clock.left_seconds - LONG_SHARES[-1] * left


def train_rules(session: Session, end: float | None = None) -> None:
    """The long fine-tune of the baselines, before most proposals: they get the same training as the finalists, or the
    comparison with them would be worth nothing, and the search learns from them what it will give."""
    _train(session, _rules(session), size_long(session) if end is None else end)


def teachable(session: Session) -> bool:
    """Whether trials may get their long fine-tune before the search is over: its sampler learns from them, and the
    number of finalists is open."""
    return isinstance(session.sampler, NightpressSampler) and session.config.finetune.finalists is None


def train_lessons(session: Session, end: float) -> int:
    """Long fine-tunes of up to two seeds, harsher than every rule, for a sampler that learns; how many there were.

    Somewhere below the rules networks stop recovering: where, only such ones can tell, and the search would look for it
    at length among networks that cost it next to nothing.
    """
    if not teachable(session):
        return 0
    before = len(session.store.longs())
    worst = min((_accuracy(t) for t in _rules(session)), default=0.0)
    seeds = [t for t in ours(session, complete(session, "search")) if t.role == "seed" and _accuracy(t) < worst]
    seeds.sort(key=lambda t: (_accuracy(t), t.number))
    lessons = [t for i, t in enumerate(seeds) if i in {0, len(seeds) // 2} and waits(session, t)]
    if lessons:
        session.folder.decide(
            "search", f"long fine-tunes of trials {', '.join(str(t.number) for t in lessons)} as well",
            f"below every rule after the short one ({worst:.4g}): what a long one makes of such networks no rule shows",
        )  # fmt: skip
        _train(session, lessons, end)
    return len(session.store.longs()) - before


def train_long(session: Session) -> None:
    """The long fine-tune of the finalists, each exported. What the deadline leaves no time for is said."""
    end = session.clock.share_seconds("verify") + session.clock.share_seconds("report")
    _train(session, _rules(session), end)  # those that there was no time for before the search
    chosen = choose(session)
    if chosen:
        expected = expected_accuracies(session, chosen)
        session.folder.decide(
            "finalists", f"trials {', '.join(str(t.number) for t in chosen)}",
            "chosen greedily by the hypervolume that each adds to those before it, at the accuracy to be expected "
            "after the long fine-tune", expected={str(number): round(value, 4) for number, value in expected.items()},
            alternatives=len(complete(session, "search")),
        )  # fmt: skip
    _train(session, ours(session, chosen), end)
    if session.config.finetune.finalists is None:
        # What is left of the time goes to those that would have been chosen next.
        _train_next(session, end, MOST_FURTHER, more=MOST_FURTHER)
    judge_rungs(session)


def train_early(session: Session, most: int, spare_seconds: float, why: str) -> int:
    """Long fine-tunes of finalists while the search still goes on, up to ``most``; how many there were. None unless
    ``spare_seconds`` are left behind them, beside the time for as many finalists in the end and for the verification.

    They stand for the front whatever comes after, so the search may go on with what they have taught.
    """
    later = sum(session.clock.share_seconds(phase) for phase in ("finalists", *ENDING))
    before = len(session.store.longs())
    _train_next(session, later + spare_seconds, most, why=why)
    return len(session.store.longs()) - before


def _train_next(session: Session, end: float, most: int, *, more: int = 0, why: str | None = None) -> None:
    """Long fine-tunes of up to ``most`` trials as long as there is time for them: of those that are chosen next, by all
    that is known then, as many at once as there are workers. Each has to be verified, too."""
    tried: set[int] = set()
    while len(tried) < most:
        chosen = [t for t in ours(session, choose(session, more)) if t.number not in tried and waits(session, t)]
        following = chosen[: min(session.workers, most - len(tried))]
        if not following:
            return
        tried.update(t.number for t in following)
        end += len(following) * session.profile.seconds_each
        one = float(long_seconds(session, following).max())
        left = session.clock.left_seconds
        if left < end + SURE * one:
            return
        reason = why or f"{left - end:.0f} s are left before the verification, and one takes {one:.0f} s"
        session.folder.decide(
            str(session.state["phase"]), f"also trials {', '.join(str(t.number) for t in following)}", reason
        )
        _train(session, following, end)


def waits(session: Session, trial: TrialRecord) -> bool:
    """Whether its long fine-tune is still to come."""
    over = trial.number in session.long_failed or outcome_file(session, trial.number).is_file()
    return trial.struck_out is None and not over


def _rules(session: Session) -> list[TrialRecord]:
    """The most promising first: of those it is learned what can be expected of the others."""
    rules = ours(session, complete(session, "baseline"))
    return sorted(rules, key=lambda t: (t.name != UNCOMPRESSED, -_accuracy(t), t.number))


def _accuracy(trial: TrialRecord) -> float:
    return trial.quality.accuracy if trial.quality is not None else 0.0


def ours(session: Session, trials: list[TrialRecord]) -> list[TrialRecord]:
    """Those whose checkpoints lie in this run's folder; of a shared study each driver trains its own."""
    return [t for t in trials if session.store.ours(t)]


def _train(session: Session, trials: list[TrialRecord], end: float) -> None:
    """Long fine-tunes of trials that have none yet; none starts that would not be over ``end`` seconds before the
    deadline."""
    waiting = {t.number: t for t in trials if waits(session, t)}
    if not waiting:
        return
    needed = tuple(waiting)  # also while they run: their checkpoints and what they are writing
    if not find_room(session, needed):
        session.folder.decide("finalists", f"{len(waiting)} long fine-tunes left out", "the disk is full")
        return
    one = float(long_seconds(session, trials).mean())
    session.update(activity=f"{len(waiting)} long fine-tunes to go")
    for number, result in session.run_all(_worthwhile(session, waiting), end + one):
        if is_full(result):
            free_disk(session, needed)
        if isinstance(result, Failure):
            session.folder.decide("finalists", f"trial {number} failed", f"{result.kind}: {result.text}")
            if result.kind != WORKER_LOST and not is_full(result):
                session.long_failed.add(number)
        else:
            # In this order: what is killed in between is trained once more, and nothing that it taught is missed.
            session.store.note_long(number, quality_of(result.search, Rung.LONG, "search", seconds=result.seconds))
            save_outcome(session, number, result)
        session.update(activity=f"{len(waiting)} long fine-tunes to go")
    session.update(activity=None)
    if waiting:
        session.folder.decide("finalists", f"{len(waiting)} long fine-tunes left out", "the deadline")


def _worthwhile(session: Session, waiting: dict[int, TrialRecord]) -> Iterator[tuple[int, Job]]:
    """Jobs of those that wait, each judged when a worker is free for it, by all that is known then."""
    for number, trial in list(waiting.items()):
        del waiting[number]
        if not _hopeless(session, trial):
            yield number, _job(session, trial)


def _hopeless(session: Session, rule: TrialRecord) -> bool:
    """Whether a rule cannot stand on the front, because it is slower or larger than the limits allow, or because even
    an optimistic extrapolation leaves it below ``min_accuracy``: then its long fine-tune would show nothing. That is
    recorded. The uncompressed network, against which all are judged, is trained in any case."""
    if rule.role != "baseline" or rule.name == UNCOMPRESSED:
        return False
    if (reason := beyond(session, rule)) is not None:
        found, evidence = reason, dict[str, float]()
    elif (expected := _expected(session, rule)) is not None:
        found, evidence = expected
    else:
        return False
    session.store.note_hopeless(rule.number, found)
    session.folder.decide(
        "search", f"no long fine-tune of {rule.name}", found, trial=rule.number, short=_accuracy(rule), **evidence
    )
    return True


def _expected(session: Session, rule: TrialRecord) -> tuple[str, dict[str, float]] | None:
    """That a rule is expected to end below ``min_accuracy``, with the figures; None while it may reach it."""
    least = search_limits(session).min_accuracy
    if least is None or hopeful(session, rule):
        return None
    surrogate = surrogate_of(session)
    if RUNGS[surrogate.rung] != Rung.LONG:  # nobody knows yet what a long fine-tune gives
        return None
    row = surrogate.describer.encoder.row(policy_of(rule))
    expected, _, hope = (float(value[0]) for value in surrogate.accuracy(row[None]))
    if hope >= least:
        return None
    reason = f"expected to end below min_accuracy {least:.4g}: {expected:.3f} ± {hope - expected:.3f}"
    return reason, {"expected": round(expected, 4), "hope": round(hope, 4)}


class _Size(NamedTuple):
    """Of the long fine-tunes that a share of the time pays for."""

    steps: int
    rules: int
    finalists: int


def untrained(session: Session, trial: TrialRecord) -> bool:
    """Whether a trial is exported as the lowest rung left it: as accurate as the given network, and less so after the
    short fine-tune. So it is with the uncompressed network and with integers alone where the long fine-tune is shorter
    than it should be; a whole one would bring them further."""
    rungs, found = session.state["rungs"], {q.rung: q for q in trial.qualities}
    low, short = found.get(Rung.BN), found.get(Rung.SHORT)
    if low is None or short is None or not rungs.get("squeezed"):
        return False
    given = session.state["given"]["search"]["accuracy"]
    return low.accuracy > short.accuracy and low.accuracy + (low.accuracy_se or 0.0) >= given


def a_finalist(session: Session, rules: list[TrialRecord]) -> Array:
    """Seconds that the long fine-tune of a finalist takes in any case, and seconds a step, shape (2,): what the median
    rule takes of those that are trained."""
    costs = long_costs(session, rules)
    return np.median(costs[costs[:, 1] > 0] if costs[:, 1].any() else costs, axis=0)


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
    times = _rate_times(steps, session.state["rungs"]["short_steps"])
    session.folder.decide(
        "search", f"long fine-tunes of {steps} steps", reason, **evidence, learning_rate_times=round(times, 2)
    )


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
    least = search_limits(session).min_accuracy
    if least is None or hopeful(session, rule):
        return True
    top = max(session.state["given"]["search"]["accuracy"], *(_accuracy(t) for t in rules))
    return top - _accuracy(rule) <= max(top - least, 0.0) * math.sqrt(steps / session.state["rungs"]["short_steps"])


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


def _job(session: Session, trial: TrialRecord) -> Job:
    session.state["current"] = {"trial": trial.number, "rung": Rung.LONG.value}
    kept = untrained(session, trial)
    return Job(
        policy=policy_of(trial), rung=Rung.LONG.value, seed=session.config.seed + 1,
        steps=0 if kept else session.state["rungs"]["long_steps"], untrained=kept,
        folder=session.folder.artifacts(trial.number), rate=_rate(session, trial),
    )  # fmt: skip


def _rate(session: Session, trial: TrialRecord) -> float:
    """What the long fine-tune multiplies a policy's learning rate by: :func:`_rate_times`, up to the highest rate that
    the space offers."""
    rungs, own = session.state["rungs"], float(trial.policy["finetune"]["learning_rate"])
    return max(1.0, min(_rate_times(rungs["long_steps"], rungs["short_steps"]), LEARNING_RATE[1] / max(own, 1e-9)))


def _rate_times(long_steps: int, short_steps: int) -> float:
    """The square root of how many times as long as the short fine-tune the long one is, at least 1.

    The search finds the rate by short fine-tunes, in which a low one is best; the more steps a fine-tune has, the
    higher a rate does it good (Zimmer, Spiegel and Pokutta 2023, "How I Learned to Stop Worrying and Love Retraining",
    who scale it linearly).
    """
    return max(1.0, math.sqrt(long_steps / short_steps))


def outcome_file(session: Session, number: int) -> Path:
    return session.folder.artifacts(number) / OUTCOME


def save_outcome(session: Session, number: int, outcome: Outcome) -> None:
    path, text = outcome_file(session, number), json.dumps(asdict(outcome), allow_nan=False)
    session.folder.written(lambda: write_whole(path, lambda partial: partial.write_text(text)))


def load_outcome(path: Path) -> Outcome:
    data: dict[str, Any] = json.loads(path.read_text())
    for key in ("search", "simulated", "exported"):
        data[key] = Score(**data[key]) if data[key] else None
    data["losses"] = tuple(data["losses"])
    return Outcome(**data)
