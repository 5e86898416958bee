"""The long fine-tune: who gets it, and what comes of it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluators.evaluate import Job, Outcome
from ..evaluators.quality import Score
from ..spaces.files import write_whole
from ..spaces.space import LEARNING_RATE
from .clock import ENDING
from .disk import find_room, free_disk, is_full
from .finalists import beyond, choose, complete, expected_accuracies, hopeful, surrogate_of
from .long_length import long_seconds, ours, rate_times, rules_of, short_accuracy, size_long, untrained
from .records import DIVERGED, UNCOMPRESSED, Rung, TrialRecord
from .rungs import judge_rungs
from .sampler import NightpressSampler
from .session import Session, quality_of
from .split_gap import note_long_gap, search_limits
from .store import policy_of
from .surrogate import RUNGS
from .worker import WORKER_LOST, Failure

OUTCOME = "long.json"
FAILED, OWN_RATE = "long_failed", "own_rate"
"""Of the state: trials whose long fine-tune failed, and would only fail again; those that diverged at a higher learning
rate than their own."""
MOST_FURTHER = 16
"""Finalists beyond the planned ones, where there is time for them at the end."""
SURE = 1.3
"""So many times of what a further one is expected to take must be left: given up at the end, it was for nothing."""


def train_rules(session: Session, end: float | None = None) -> None:
    """The long fine-tune of the baselines, before most proposals: they get the same training as the finalists, or the
    comparison with them would be worth nothing, and the search learns from them what it will give."""
    _train(session, rules_of(session), size_long(session) if end is None else end)


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
    worst = min((short_accuracy(t) for t in rules_of(session)), default=0.0)
    seeds = [t for t in ours(session, complete(session, "search")) if t.role == "seed" and short_accuracy(t) < worst]
    seeds.sort(key=lambda t: (short_accuracy(t), t.number))
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
    _train(session, rules_of(session), end)  # those that there was no time for before the search
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
    # What is left of the time goes to those that would have been chosen next, by what the first ones have taught.
    if (by_hand := session.config.finetune.finalists) is None:
        _train_next(session, end, MOST_FURTHER, more=MOST_FURTHER)
    else:
        _train_next(session, end, by_hand - len(chosen))
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
    over = trial.number in session.state.get(FAILED, ()) or outcome_file(session, trial.number).is_file()
    return trial.struck_out is None and not over


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
    one, again = float(long_seconds(session, trials).mean()), list[TrialRecord]()
    session.update(activity=f"{len(waiting)} long fine-tunes to go")
    for number, result in session.run_all(_worthwhile(session, waiting), end + one):
        if is_full(result):
            free_disk(session, needed)
        if isinstance(result, Failure):
            session.folder.decide("finalists", f"trial {number} failed", f"{result.kind}: {result.text}")
            if result.kind == DIVERGED and _rate(session, trial := session.store.trial(number)) > 1:
                session.update(**{OWN_RATE: [*session.state.get(OWN_RATE, ()), number]})
                again.append(trial)
            elif result.kind != WORKER_LOST and not is_full(result):
                session.update(**{FAILED: [*session.state.get(FAILED, ()), number]})
        else:
            # In this order: what is killed in between is trained once more, and nothing that it taught is missed.
            session.store.note_long(number, quality_of(result.search, Rung.LONG, "search", seconds=result.seconds))
            if (trial := session.store.trial(number)).role == "baseline" and not untrained(session, trial):
                note_long_gap(session, trial.name, result)
            save_outcome(session, number, result)
        session.update(activity=f"{len(waiting)} long fine-tunes to go")
    session.update(activity=None)
    if again:
        session.folder.decide(
            "finalists", f"long fine-tunes of trials {', '.join(str(t.number) for t in again)} once more",
            "they diverged: now at the learning rates at which the short ones did not",
        )  # fmt: skip
        _train(session, again, end)
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
        "search", f"no long fine-tune of {rule.name}", found, trial=rule.number, short=short_accuracy(rule), **evidence
    )
    return True


def _expected(session: Session, rule: TrialRecord) -> tuple[str, dict[str, float]] | None:
    """That a rule is expected to end below ``min_accuracy``, with the figures; None while it may reach it."""
    least = search_limits(session, Rung.LONG).min_accuracy
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


def _job(session: Session, trial: TrialRecord) -> Job:
    session.state["current"] = {"trial": trial.number, "rung": Rung.LONG.value}
    kept = untrained(session, trial)
    return Job(
        policy=policy_of(trial), rung=Rung.LONG.value, seed=session.config.seed + 1,
        steps=0 if kept else session.state["rungs"]["long_steps"], untrained=kept,
        folder=session.folder.artifacts(trial.number), rate=_rate(session, trial),
    )  # fmt: skip


def _rate(session: Session, trial: TrialRecord) -> float:
    """What the long fine-tune multiplies a policy's learning rate by: :func:`rate_times`, up to the highest rate that
    the space offers; nothing once it has diverged so."""
    if trial.number in session.state.get(OWN_RATE, ()):
        return 1.0
    rungs, own = session.state["rungs"], float(trial.policy["finetune"]["learning_rate"])
    return max(1.0, min(rate_times(rungs["long_steps"], rungs["short_steps"]), LEARNING_RATE[1] / max(own, 1e-9)))


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
