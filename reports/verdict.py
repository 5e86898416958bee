"""The night in plain sentences: what you get, whether the search was worth it, what to distrust."""

import re
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from ..search.pareto import MAX_DROP
from ..search.records import RunRecord, TrialRecord, TrialState, row
from .covered import hypervolume_over_time, hypervolumes, late_gain, sides, unverified_baselines
from .front import (
    beyond_limits,
    breaches,
    candidates,
    feasible,
    front,
    limits,
    only_beyond,
    origin_of,
    original_accuracy,
    picked,
    picks,
    point,
    rule,
    shrinkage,
    speedup,
    verified_any,
)
from .noise import Gain, gain_of
from .text import accuracy, counted, cut, digits, million_macs, milliseconds, percent, size, times, title

FINISHED = frozenset({"done", "finished", "complete", "completed"})
LEAST_LUCK = 0.05
"""Points of hypervolume from which on it is worth a word."""
FEW_TRIALS = 20
"""Below this many complete trials of the search, a good policy was hardly looked for."""
NOISY = 0.05
"""Repeat error of the uncompressed model above which a latency is doubtful."""
IMPRECISE = 0.10
"""Held-out error of the latency predictor above which the search was steered by guesses."""
DRIFT = 0.10
"""Share by which the uncompressed model's latency may wander over the night."""
STILL_GROWING = 0.01
"""Share of the hypervolume that the last quarter of the search may add, were it converged."""
STILL_FALLING = 0.05
"""Share by which a converged fine-tune's loss may fall from its last tenth but one to its last."""


def finished(run: RunRecord) -> bool:
    """Whether the run went through all its phases."""
    return str(run.state.get("state")).lower() in FINISHED


def verdict(run: RunRecord) -> list[str]:
    """Sentences on what was found, then on what to distrust."""
    return [*findings(run), *doubts(run)]


def findings(run: RunRecord) -> list[str]:
    """What you get, pick by pick, and whether the search beat the baselines."""
    chosen = picked(run)
    if not chosen:
        return answer(run)
    said = [_pick_sentence(run, trial, labels) for trial, labels in chosen]
    if "best" not in picks(run):
        said.append(f"No point of the front is {rule(run).words}; there is no default choice.")
    return [*said, *_against_baselines(run)]


def answer(run: RunRecord) -> list[str]:
    """What you get for the limits that you set, in the shortest words, and whether it was worth the search."""
    if not run.trials:
        return ["No trial was recorded."]
    chosen = picked(run)
    if not chosen:
        return [_no_front(run)]
    best = picks(run).get("best")
    if best is None:
        trial = chosen[0][0]
        said = [f"No point of the front is {rule(run).words}.", _pick_sentence(run, trial, ["the nearest"])]
    else:
        said = [_pick_sentence(run, best, [f"the fastest {rule(run).words}"])]
    return [_asked(run), *said, *_against_baselines(run)]


def _asked(run: RunRecord) -> str:
    allowed = limits(run)
    words = [
        f"{name} {words(value)}"
        for name, words, value in (
            ("latency of at most", milliseconds, allowed.max_latency_ms),
            ("accuracy of at least", percent, allowed.min_accuracy),
            ("size of at most", size, allowed.max_size_bytes),
            ("at most", million_macs, allowed.max_macs),
        )
        if value is not None
    ]
    within = counted(len(front(run)), "point")
    standing = f"{within} that nothing beats {'is' if within.startswith('1 ') else 'are'} within them"
    if not words:
        return f"You set no limits; {within} {'is' if within.startswith('1 ') else 'are'} beaten by nothing."
    return f"Your limits: {', '.join(words)}; {standing}."


def _no_front(run: RunRecord) -> str:
    known = candidates(run) or only_beyond(run)
    if not known:
        return (
            "No trial has accuracy, latency and size all known"
            + (" and passed verification" if verified_any(run) else "")
            + "; there is no front."
        )
    closest = min(known, key=lambda trial: _excess(run, trial))
    found = point(closest)
    numbers = (
        f"{milliseconds(found.latency_ms)}, {percent(found.accuracy)}, {size(found.size_bytes)}" if found else "unknown"
    )
    allowed = limits(run, verified=closest.verified is not None)
    missed = "; ".join(breaches(allowed, found)) if found else "its figures are not known"
    return f"No trial is within the limits; {title(closest)} comes nearest ({numbers}): {missed}."


def _excess(run: RunRecord, trial: TrialRecord) -> float:
    """How far beyond the limits a trial is, as the sum of the relative excesses."""
    allowed, found = limits(run, verified=trial.verified is not None), point(trial)
    if found is None:
        return float("inf")
    total = 0.0
    if allowed.max_latency_ms:
        total += max(0.0, found.latency_ms / allowed.max_latency_ms - 1)
    if allowed.min_accuracy:
        total += max(0.0, 1 - found.accuracy / allowed.min_accuracy)
    if allowed.max_size_bytes:
        total += max(0.0, found.size_bytes / allowed.max_size_bytes - 1)
    if allowed.max_macs:
        total += max(0.0, (found.macs or 0) / allowed.max_macs - 1)
    return total


def _pick_sentence(run: RunRecord, trial: TrialRecord, labels: list[str]) -> str:
    found = point(trial)
    if found is None:
        return f"{title(trial)} is not fully known."
    itself = origin_of(run, trial) is trial
    faster, smaller = (None, None) if itself else (speedup(run, trial), shrinkage(run, trial))
    compared = f" ({times(faster)} as fast as the original)" if faster else ""
    shrunk = f" ({times(smaller)} smaller)" if smaller else ""
    name = ", ".join(labels)
    return (
        f"{name[0].upper()}{name[1:]}: {title(trial)} runs in {milliseconds(found.latency_ms)}{compared} at "
        f"{accuracy(found.accuracy, row(trial)['accuracy_se'])} accuracy{_drop(run, trial)}, "
        f"in {size(found.size_bytes)}{shrunk}."
    )


def drop_points(run: RunRecord, trial: TrialRecord) -> float | None:
    """Points of accuracy above the uncompressed model's, see :func:`original_accuracy` (below: negative); None for
    itself and the unknown."""
    before, after = original_accuracy(run, trial), point(trial)
    if before is None or after is None or origin_of(run, trial) is trial:
        return None
    return 100 * (after.accuracy - before)


def _drop(run: RunRecord, trial: TrialRecord) -> str:
    points = drop_points(run, trial)
    if points is None:
        return ""
    if abs(points) < 0.05:
        return ", that of the uncompressed model"
    return f", {abs(points):.1f} points {'above' if points > 0 else 'below'} the uncompressed model"


def _against_baselines(run: RunRecord) -> list[str]:
    said: list[str] = []
    covered, verified = hypervolumes(run), sides(run).verified
    search, rules = covered["search"], covered["baselines"]
    if search is not None and rules is not None:
        basis = "" if verified else ", both on the search split, since not all baselines are verified"
        numbers = f"{percent(search)} of the objective box against {percent(rules)}{basis}"
        if search > rules and not verified:
            # The best of many noisy readings is above the best of a few even where no trial is better.
            said.append(
                f"The search covers {numbers}. Its points were chosen on this very split, so this shows nothing yet."
            )
        elif search > rules and (gain := gain_of(run)) is not None:
            more = f"{100 * (search / rules - 1):.1f} % more hypervolume" if rules else "the rules cover nothing"
            said.append(_gain(gain, more, numbers))
        elif search == rules == 0:
            said.append("Neither the search nor the baselines have a point that beats the reference point.")
        else:
            said.append(f"The search did not beat the baselines: it covers {numbers}.")
    return [*said, *_best_against_baseline(run)]


def _gain(gain: Gain, more: str, numbers: str) -> str:
    gained = f"the gain of {digits(100 * gain.gain, 2)} points"
    if 100 * gain.luck >= LEAST_LUCK:
        gained += f", of which {digits(100 * gain.luck, 2)} are what luck makes of more points,"
    noise = f"the {digits(200 * gain.error, 2)} points of noise (two standard errors)"
    if gain.shown:
        return f"The search beat the baselines: {more} ({numbers}); {gained} is more than {noise}."
    return f"Whether the search beat the baselines is not shown: it covers {numbers}; {gained} is no more than {noise}."


def _best_against_baseline(run: RunRecord) -> list[str]:
    """Hypervolume says little to most people: the same comparison for the default choice alone."""
    best = picks(run).get("best")
    if best is None:
        return []
    if not any(trial.role != "baseline" for trial in candidates(run)):
        return ["There is no trial of the search to compare with the baselines."]
    if best.role == "baseline":
        return [f"The default choice is a baseline: the search found nothing faster {rule(run).words}."]
    floor = rule(run).min_accuracy - 1e-9
    if verified_any(run) and (missing := [title(trial) for trial in unverified_baselines(run)]):
        return [f"How much faster it is than the fastest baseline is not known: {', '.join(missing)} not verified."]
    rivals = [
        (found.latency_ms, trial)
        for trial in candidates(run)
        if trial.role == "baseline" and feasible(run, trial)
        if (found := point(trial)) and found.accuracy >= floor
    ]
    if not any(trial.role == "baseline" for trial in candidates(run)):
        tried = any(trial.role == "baseline" and trial.state is TrialState.COMPLETE for trial in run.trials)
        return ["No baseline is within the limits." if tried else "There is no baseline to compare with."]
    if not rivals:
        return [f"No baseline is {rule(run).words}."]
    latency_ms, rival = min(rivals, key=lambda pair: pair[0])
    best_point = point(best)
    ratio = times(latency_ms / best_point.latency_ms if best_point else None)
    fastest = f"the fastest baseline is {title(rival)} with {milliseconds(latency_ms)}"
    return [f"By the same rule, {rule(run).words}, {fastest}: the best trial is {ratio} as fast."]


def doubts(run: RunRecord) -> list[str]:
    """What to distrust tonight; empty when nothing speaks against the figures."""
    return [
        *_unfinished(run),
        *_forced(run),
        *_doubtful_latency(run),
        *_warned(run),
        *_doubtful_accuracy(run),
        *_unconverged(run),
        *_doubtful_trials(run),
    ]


def _unfinished(run: RunRecord) -> list[str]:
    said: list[str] = []
    state = str(run.state.get("state") or "")
    where = f" in phase {run.state['phase']}" if run.state.get("phase") else ""
    if state.lower() == "running":
        said.append(f"The run is not over; it is still{where or ' going'}.")
    elif state and not finished(run):
        said.append(f"The run did not reach its end: it is {state}{where}.")
    searched = [t for t in run.trials if t.role != "baseline" and t.state is TrialState.COMPLETE]
    if searched and not any(t.verified for t in searched):
        basis = (
            "the front shows verified baselines alone" if verified_any(run) else "the front rests on the search split"
        )
        said.append(f"No trial of the search was exported and re-measured; {basis}.")
    return said


def forced(run: RunRecord) -> str | None:
    """In what the latency profile differs from the run's model or device, where ``--force`` overrode it."""
    own = "; ".join((run.target or {}).get("forced") or ())
    carried = (t.latency.forced for t in run.trials if t.latency)
    return "; ".join(dict.fromkeys(text for text in (own, *carried) if text)) or None


def _forced(run: RunRecord) -> list[str]:
    overridden = forced(run)
    if overridden is None:
        return []
    return [f"The latency profile does not hold here and was used all the same (--force): {cut(overridden)}."]


def _warned(run: RunRecord) -> list[str]:
    """What the night warned of, the most frequent first. Warnings that differ in their figures alone are told once, in
    the latest words."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for warning in run.state.get("warnings") or []:
        kinds.setdefault(re.sub(r"[\d.,]+", "", warning["text"]), []).append(warning)
    return [
        f"Warned {f'{len(alike)} times, last ' if len(alike) > 1 else ''}in phase {alike[-1]['phase']}: "
        f"{cut(alike[-1]['text']).rstrip('.')}."
        for alike in sorted(kinds.values(), key=lambda alike: -len(alike))
    ]


def _doubtful_latency(run: RunRecord) -> list[str]:
    said: list[str] = []
    noise: list[Mapping[str, Any]] = list(run.state.get("noise") or [])
    errors = [n["repeat_error"] for n in noise if n.get("repeat_error") is not None]
    noisy = [error for error in errors if error > NOISY]
    if noisy:
        said.append(
            f"The machine was noisy: the uncompressed model's repeat error was over {percent(NOISY)} in "
            f"{len(noisy)} of {counted(len(errors), 'measurement')} (worst {percent(max(noisy))})."
        )
    levels = [float(n["reference_ms"]) for n in noise if n.get("reference_ms")]
    if len(levels) > 1 and max(levels) / min(levels) - 1 > DRIFT:
        said.append(
            f"The machine drifted: the uncompressed model took between {digits(min(levels))} and "
            f"{milliseconds(max(levels))} over the night, so trust ratios more than milliseconds."
        )
    apart = (run.target or {}).get("looks_apart") or 0.0
    if apart > NOISY and run.config.get("target_profile") is not None:  # of its own calibration the night has warned
        said.append(
            f"The device changed its speed while it was calibrated: two looks at the same models differ by "
            f"{percent(apart)} as a whole, so the intervals are wider."
        )
    unsteady = [t for t in front(run) if t.latency and (t.latency.repeat_error or 0) > NOISY]
    if unsteady:
        said.append(f"Latencies on the front that did not repeat within {percent(NOISY)}: {_list(unsteady)}.")
    heldout: Mapping[str, Any] = dict((run.target or {}).get("heldout") or {})
    error = heldout.get("mape")
    if error is not None and error > IMPRECISE:
        said.append(
            f"The latency predictor is {percent(error)} off on {counted(heldout.get('n') or 0, 'model')} "
            "that it had not seen, so the search was steered by rough figures."
        )
    return said


def _doubtful_accuracy(run: RunRecord) -> list[str]:
    """A rule of one point means little when chance alone moves the accuracy by as much."""
    best = picks(run).get("best")
    values = row(best) if best else {}
    error = values.get("accuracy_se")
    if error is None or 2 * error <= MAX_DROP:
        return []
    moves = f"± {digits(200 * error, 2)} points (two standard errors)"
    examples = counted(values["samples"], "example")
    return [f"Accuracies rest on {examples}: chance alone moves them by {moves}, as much as many differences."]


def _unconverged(run: RunRecord) -> list[str]:
    """A search or a training that was cut off while it still gained."""
    said: list[str] = []
    gain = late_gain(hypervolume_over_time(run))
    if gain is not None and gain > STILL_GROWING:
        said.append(
            f"The search had not converged: the last quarter of its time still added {percent(gain)} of hypervolume."
        )
    curves = [t.verified.quality.losses for t in run.trials if t.verified and len(t.verified.quality.losses) >= 4]
    falls = [1 - after / before for *_, before, after in curves if before > 0]
    falling = median(falls) if falls else 0.0
    if falling > STILL_FALLING:
        said.append(
            f"The long fine-tunes had not converged: their loss still fell by {percent(falling)} in the last tenth "
            f"(median of {len(falls)}), so training longer would gain accuracy."
        )
    return said


def _doubtful_trials(run: RunRecord) -> list[str]:
    said: list[str] = []
    complete = [t for t in run.trials if t.role != "baseline" and t.state is TrialState.COMPLETE]
    if len(complete) < FEW_TRIALS:
        said.append(f"Few trials: the search completed only {len(complete)}.")
    failed = [t for t in run.trials if t.state is TrialState.FAILED]
    if failed:
        reason, count = Counter(t.reason or "no reason recorded" for t in failed).most_common(1)[0]
        often = f"; most often ({count} times): {reason}" if count > 1 else f": {reason}"
        said.append(f"{counted(len(failed), 'trial')} of {len(run.trials)} failed{often.rstrip('.')}.")
    # That the original is beyond the limits is why there was a night.
    expected = beyond_limits(run)
    struck = [t for t in run.trials if t.verified and t.verified.struck_out and t is not expected]
    if struck:
        said.append(f"Struck out by verification: {_list(struck)}.")
    hopeless = [t for t in run.trials if t.verified is None and t.hopeless is not None]
    if hopeless:
        said.append(f"Not trained long, since they could not come within the limits: {_list(hopeless)}.")
    if run.unreadable:
        said.append(f"{counted(len(run.unreadable), 'record')} could not be read: {', '.join(run.unreadable[:3])}.")
    return said


def _list(trials: list[TrialRecord], most: int = 5) -> str:
    names = [title(trial) for trial in trials[:most]]
    return ", ".join(names) + (f" and {len(trials) - most} more" if len(trials) > most else "")
