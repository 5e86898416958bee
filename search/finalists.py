"""After the search: re-measure the front, choose a spread of it for the long fine-tune."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from threadpoolctl import threadpool_limits

from ..evaluators.latency.measure import MeasurementError, measure_policies
from ..spaces.plan import plan
from ..spaces.policy import Policy, network_digest
from .corner import asked_rung, least_accuracy
from .encoding import Encoder
from .experience import Experience
from .feedback import feed_back
from .pareto import dominated_by, losses, non_dominated, spread
from .records import Rung, TrialRecord, TrialState
from .session import Session, latency_of
from .split_gap import search_limits
from .store import policy_of
from .surrogate import RUNGS, Describer, Surrogate, kept_accuracy

MOST_REMEASURED = 30
Array = NDArray[np.float64]


def complete(session: Session, role: str | None = None) -> list[TrialRecord]:
    """COMPLETE trials whose three objectives are known; each policy once."""
    return [
        t for t in session.store.trials()
        if t.state is TrialState.COMPLETE and t.losses and t.reused_from is None
        and (role is None or (t.role == "baseline") == (role == "baseline"))
    ]  # fmt: skip


def remeasure_seconds(session: Session) -> float:
    """What it takes to measure as many policies as may lie near the front, at what one took during calibration."""
    return min(MOST_REMEASURED, session.store.tally().begun) * session.profile.seconds_each


def remeasure_front(session: Session, *, over: bool = True) -> None:
    """Measure what is on the predicted front or within its error of it, before finalists are chosen. While the search
    is not ``over``, times are taken at the calibration's pace: trials of two paces would stand on one front."""
    trials = [t for t in complete(session, "search") if t.measured is None and session.store.ours(t)]
    # Fine-tunes of one network take the same time: it is measured once, and all of them are told.
    alike: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        alike.setdefault(network_digest(policy_of(trial)), []).append(trial)
    for known in complete(session):
        if (found := known.measured) is not None:
            for trial in alike.pop(network_digest(policy_of(known)), ()):
                session.store.remeasure(trial.number, found)
    waiting = [trial for same in alike.values() for trial in same]
    nearest = dict.fromkeys(network_digest(policy_of(trial)) for trial in _near_front(session, waiting))
    near = [alike[key] for key in nearest][:MOST_REMEASURED]
    if not near or session.profile.remote:
        return
    session.update(activity=f"measuring {len(near)} policies near the front")
    policies = {str(same[0].number): policy_of(same[0]) for same in near}
    anatomy, target = session.prepared.anatomy, session.config.target
    try:
        timings, sizes = session.on_target(
            "search", lambda timer: measure_policies(anatomy, policies, target, timer, kernels=True)
        )
    except MeasurementError as error:
        session.trouble(f"the front is not measured, its latencies are predictions: {error}")
        session.folder.decide("search", "the front was not re-measured", str(error))
        return
    level = feed_back(session, policies, timings, sizes, recalibrate=over)
    for same in near:
        found = latency_of(timings[str(same[0].number)], session.forced)
        for trial in same:
            session.store.remeasure(trial.number, found if over else found.at_pace(level))
    session.folder.decide(
        "search",
        f"re-measured {len(near)} policies",
        "those that the predictor's error could put on the front",
    )


def _near_front(session: Session, trials: list[TrialRecord]) -> list[TrialRecord]:
    """Trials that nothing dominates even at the low end of their own interval, the nearest to the front first: by how
    many times they take what the fastest takes that is no worse in the rest."""
    everything = [t for t in complete(session) if not session.config.limits.too_much_work(t.macs)]
    front = np.array([t.losses for t in everything])

    def behind(trial: TrialRecord) -> float:
        loss = np.array(trial.losses)
        return float(loss[1] / front[(front[:, [0, 2]] <= loss[[0, 2]]).all(axis=1), 1].min())

    return sorted((t for t in trials if (hoped := t.hoped(1)) and not dominated_by(hoped, front)), key=behind)


def choose(session: Session, more: int = 0) -> list[TrialRecord]:
    """A spread of the search's front within the limits: who may become the pick, then those that add most hypervolume
    to it and to the rules; so many ``more`` than are planned.

    Accuracies are those to be expected after the long fine-tune: harsh policies gain most by it, so choosing by the
    short one would leave the fast end of the front out, and of many trials the luckiest would be taken for the best. A
    trial below ``min_accuracy`` is a candidate where that may still bring it there, or where nothing may come there.
    """
    trials = [t for t in complete(session, "search") if beyond(session, t) is None]
    if not trials:
        return []
    surrogate = surrogate_of(session)
    rung = asked_rung(session.state, RUNGS[surrogate.rung])
    limits = search_limits(session, rung)
    least = limits.min_accuracy
    mean, error = surrogate.predict(_rows(surrogate, trials))
    later, _, hope = surrogate.scale.interval(mean, error)
    points = np.array([_losses(trial, float(accuracy)) for trial, accuracy in zip(trials, later, strict=True)])
    apart = _one_of_each_network(session, trials, later)
    within = [i for i in apart if least is None or hope[i] >= least or hopeful(session, trials[i])]
    within = within or apart  # where none may come within, the nearest show how far it is
    front = [within[i] for i in non_dominated(points[within])]
    reference = session.state["reference"]
    floor = least_accuracy(session.state, limits, rung)
    corner = losses(floor, reference["latency_ms"] * 1.01, reference["size_bytes"] * 1.01)
    wanted = session.state["rungs"]["finalists"] + more
    pick = _likely_pick(session, surrogate, [trials[i] for i in front], mean[front], error[front])
    # A finalist that a rule dominates would show nothing.
    rules = [_losses(rule, accuracy) for rule, accuracy in _trained(session, surrogate, "baseline")]
    chosen = [front[i] for i in spread(points[front], corner, wanted, pick, rules)]
    # Where nothing beats the reference point, the most accurate ones are still worth a look.
    rest = sorted((i for i in front if i not in chosen), key=lambda i: points[i, 0])
    found = (chosen + rest)[:wanted] if len(chosen) < min(wanted, 2) else chosen
    return [trials[i] for i in found]


def _one_of_each_network(session: Session, trials: Sequence[TrialRecord], expected: Array) -> list[int]:
    """The places of one trial for each network, whose fine-tunes take the same time: what had its long one, also where
    that showed it to be beyond the limits, or else what is expected to be the most accurate. Others would have a long
    fine-tune for next to nothing."""
    longs, found = session.store.longs(), dict[str, int]()
    for place in sorted(range(len(trials)), key=lambda i: (trials[i].number in longs, expected[i])):
        found[network_digest(policy_of(trials[place]))] = place
    return sorted(found.values())


def _trained(session: Session, surrogate: Surrogate, role: str | None = None) -> list[tuple[TrialRecord, float]]:
    """Trials that had their long fine-tune, each with the accuracy that is to be expected of it."""
    longs = session.store.longs()
    found = [t for t in complete(session, role) if t.number in longs]
    expected = _expected(surrogate, found) if found else {}
    return [(t, expected[t.number]) for t in found]


def expected_accuracies(session: Session, trials: list[TrialRecord]) -> dict[int, float]:
    """Accuracy that each trial will probably have after the long fine-tune, by number."""
    return _expected(surrogate_of(session), trials)


def _expected(surrogate: Surrogate, trials: list[TrialRecord]) -> dict[int, float]:
    median, _, _ = surrogate.accuracy(_rows(surrogate, trials))
    return {t.number: float(value) for t, value in zip(trials, median, strict=True)}


def _rows(surrogate: Surrogate, trials: list[TrialRecord]) -> Array:
    return np.stack([surrogate.describer.encoder.row(policy_of(t)) for t in trials])


def _likely_pick(
    session: Session, surrogate: Surrogate, trials: list[TrialRecord], mean: Array, error: Array
) -> list[int]:  # fmt: skip
    """The place of who will probably be picked, because it keeps its accuracy and is faster than all that are known to:
    rules after their long fine-tune, and finalists where this is asked after some of them. Hypervolume hardly sees the
    pick: at the least accuracy that is allowed a point covers next to nothing. Empty where nobody is likely to be.
    ``mean`` and ``error`` are of the trials' u, each of shape (n,)."""
    rung = asked_rung(session.state, RUNGS[surrogate.rung])
    least = kept_accuracy(surrogate, search_limits(session, rung).min_accuracy)
    fastest_ms = min(
        (
            t.latency.latency_ms
            for t, accuracy in _trained(session, surrogate)
            if t.latency and accuracy >= least and beyond(session, t) is None
        ),
        default=session.state["reference"]["latency_ms"],
    )
    likely = ndtr((mean - surrogate.scale.up(least)) / error)
    faster = np.log(fastest_ms / np.array([t.latency.latency_ms if t.latency else np.inf for t in trials]))
    gains = np.where(likely >= 0.5, likely * faster, 0.0)  # one finalist is no lottery ticket
    best = int(np.argmax(gains))
    return [best] if gains[best] > 0 else []


def surrogate_of(session: Session) -> Surrogate:
    """What the night knows of accuracies, whichever sampler proposed the trials. Raises ValueError where no trial has
    shown any."""
    encoder = Encoder(session.prepared.space)
    known = Experience(encoder)
    known.read(session.store.study)
    with threadpool_limits(limits=1, user_api="blas"):
        return Surrogate(Describer(encoder, session.sensitivity), known.observations())


def reachable(session: Session, policies: Sequence[Policy]) -> list[Policy]:
    """Those that may come within ``min_accuracy``: even the upper end of what is expected of them must not lose twice
    of what may be lost, since a long fine-tune, of which nothing is known yet, wins back less than half. All without
    such a limit, and where no accuracy is known because every rule failed. What has more multiply-accumulates than
    ``max_macs`` is left out in any case."""
    limits, anatomy = session.config.limits, session.prepared.anatomy
    policies = [policy for policy in policies if not limits.too_much_work(plan(anatomy, policy).macs)]
    least = search_limits(session, Rung.SHORT).min_accuracy
    if least is None or not policies or not any(t.state is TrialState.COMPLETE for t in session.store.trials()):
        return policies
    surrogate = surrogate_of(session)
    _, _, hope = surrogate.accuracy(np.stack([surrogate.describer.encoder.row(policy) for policy in policies]))
    floor = least - max(session.state["given"]["search"]["accuracy"] - least, 0.0)
    return [policy for policy, value in zip(policies, hope, strict=True) if value >= floor]


def hopeful(session: Session, trial: TrialRecord) -> bool:
    """Within the limits by what was seen of it, or within its error."""
    least, quality = search_limits(session, Rung.SHORT).min_accuracy, trial.quality
    return (
        quality is not None
        and (least is None or quality.accuracy + 2 * (quality.accuracy_se or 0) >= least)
        and beyond(session, trial) is None
    )


def beyond(session: Session, trial: TrialRecord) -> str | None:
    """Which limit on what is free to know a trial is beyond, by the low end of its latency; None where it is within."""
    limits, latency, size_bytes = session.config.limits, trial.latency, trial.size_bytes
    if latency is None or size_bytes is None:
        return "its latency and size are not known"
    if limits.max_latency_ms is not None and latency.low_ms > limits.max_latency_ms:
        return f"takes at least {latency.low_ms:.4g} ms, above max_latency_ms {limits.max_latency_ms:g}"
    if limits.max_size_bytes is not None and size_bytes > limits.max_size_bytes:
        return f"has {size_bytes} bytes, above max_size_bytes {limits.max_size_bytes}"
    if limits.too_much_work(trial.macs):
        return f"has {trial.macs} multiply-accumulates, above max_macs {limits.max_macs}"
    return None


def _losses(trial: TrialRecord, accuracy: float) -> tuple[float, float, float]:
    """Of a trial with another accuracy than was seen."""
    if trial.losses is None:
        raise ValueError(f"trial {trial.number} has an unknown objective")
    return (-accuracy, *trial.losses[1:])
