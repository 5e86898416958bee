"""How many policies a calibration measures: as many as were asked for, or batch after batch until the held-out error
has stopped falling; then all of them once more, in another order."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...spaces.anatomy import Anatomy
from ...spaces.errors import InputError
from ...spaces.plans import choices_of
from ...spaces.policy import Policy, digest, one_of_each_network
from .measure import REFERENCE, SECOND_ROUNDS, Timer, Timing, measure_policies
from .predictor import LEAST_POINTS
from .profile import Profile, profile_of
from .target import Target
from .units import Worker

FIRST, BATCH, MOST = 24, 16, 120
CANDIDATES = 200
"""Random policies among which kinds of kernels are looked for that the first batch does not run."""
PATIENCE = 2
"""Batches that must improve the error together by :data:`WORTH` of it, or the calibration ends."""
WORTH = 0.05
SECONDS, LEAST_SECONDS = 120.0, 30.0
"""How long a calibration may take, and how long it has where it may take less: a short night's share of it can be less
than the policies of a small model take."""
SECOND_LOOK = 0.4
"""Of the time that measuring a policy with its kernels took: what measuring it again, without them, takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The predictor after so many measured policies: its design and held-out error."""

    policies: int
    design: str
    mape: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A profile with how it came about: the stages, and why there were no more."""

    profile: Profile
    stages: tuple[Stage, ...]
    reason: str


def calibrate_until_flat(
    anatomy: Anatomy, draw: Callable[[int], Sequence[Policy]], target: Target, *, always: Sequence[Policy] = (),
    timer: Timer, seconds: float = SECONDS, most: int = MOST, progress: Callable[[str], None] | None = None,
) -> Calibration:  # fmt: skip
    """Measure ``always`` and batches that ``draw`` gives, fitting after each, until two batches in a row no longer
    lower the held-out error by a twentieth, ``most`` policies are measured, or the next batch would pass ``seconds``.
    Where that leaves the time, all are timed once more, in another order, and the lower latency counts. Policies that a
    slow model leaves no time for are not in it. See :func:`worth_measuring`.

    Raises MeasurementError, and InputError where too few policies were measured in time.
    """
    start, measuring = time.perf_counter(), 0.0
    policies: dict[str, Policy] = {}
    timings: dict[str, Timing] = {}
    sizes: dict[str, int] = {}
    stages: list[Stage] = []

    def fitted() -> Profile:
        made = profile_of(
            anatomy, target, policies, timings, sizes, seconds=lambda: time.perf_counter() - start,
            device=timer.fingerprint(),
        )  # fmt: skip
        spent, predictor = time.perf_counter() - start, made.predictor
        stages.append(
            Stage(policies=len(policies), design=predictor.design, mape=predictor.heldout.mape, seconds=spent)
        )
        return made

    limit = max(seconds, LEAST_SECONDS)
    with timer.within(limit):
        batch = covering(Worker(anatomy, target.runtime), [*always, *draw(FIRST)], draw(CANDIDATES))
        while True:
            before, known = time.perf_counter(), list(policies.values())
            new = {digest(p): p for p in worth_measuring([*known, *batch]) if digest(p) not in policies}
            if progress is not None:
                progress(f"measuring {len(new)} policies, {len(policies)} are measured")
            found, their_sizes = measure_policies(anatomy, new, target, timer, kernels=True)
            measuring += time.perf_counter() - before
            policies |= {key: policy for key, policy in new.items() if key in found}
            timings, sizes = timings | found, sizes | their_sizes
            _check_enough(len(policies), len(new), timings.get(REFERENCE), limit)
            profile = fitted()
            again = SECOND_LOOK * measuring
            ahead = BATCH * ((time.perf_counter() - before) / max(1, len(new)) + again / len(policies))
            reason = _reason(stages, time.perf_counter() - start + again + ahead, seconds, most)
            if reason is not None:
                break
            batch = draw(min(BATCH, most - len(policies)))
        if late := sum(key not in found for key in new):
            reason += f", and {late} of the last {len(new)} policies found no time in {limit:.0f} s"
        if time.perf_counter() - start + again > seconds:
            return Calibration(profile=profile, stages=tuple(stages), reason=reason)
        timings = _timed_again(anatomy, policies, timings, target, timer, progress)
    profile = fitted()
    return Calibration(profile=profile, stages=tuple(stages), reason=f"{reason}; all were timed a second time")


def worth_measuring(policies: Sequence[Policy]) -> list[Policy]:
    """Each policy once; of those that differ in their fine-tune alone, which take the same time, the first, unless a
    predictor could not be made of so few networks."""
    networks = one_of_each_network(policies)
    return networks if len(networks) >= LEAST_POINTS else list({digest(p): p for p in policies}.values())


def check_drawn(count: int) -> None:
    """Raises InputError where so many different policies are too few for a predictor."""
    if count < LEAST_POINTS:
        raise InputError(
            f"A calibration needs {LEAST_POINTS} different policies, but only {count} were drawn: this model has "
            "hardly more."
        )


def _check_enough(measured: int, asked: int, reference: Timing | None, seconds: float) -> None:
    """Raises InputError where there are too few policies for a predictor."""
    if asked <= measured:
        check_drawn(measured)
    if reference is None or measured < LEAST_POINTS:
        each = "not even the uncompressed model was timed" if reference is None else (
            f"the uncompressed model takes {reference.latency_ms:,.0f} ms an inference"
        )  # fmt: skip
        raise InputError(
            f"The calibration had time for {measured} of {asked} policies in {seconds:.0f} s ({each}), and a predictor "
            f"needs {LEAST_POINTS}: ask for a number of policies, which are measured however long it takes (-n of "
            f"nightpress calibrate, calibration_policies of a night)."
        )


def calibrate(
    anatomy: Anatomy, policies: Sequence[Policy], target: Target, *, candidates: Sequence[Policy] = (), timer: Timer,
    progress: Callable[[str], None] | None = None,
) -> Profile:  # fmt: skip
    """Measure these policies of the model's own space, and those ``candidates`` that run kinds of kernels which none of
    them does, each twice, and fit the predictor.

    Raises MeasurementError, InputError where they are too few for a predictor, ValueError.
    """
    start = time.perf_counter()
    asked = covering(Worker(anatomy, target.runtime), policies, candidates) if candidates else policies
    unique = {digest(policy): policy for policy in worth_measuring(asked)}
    check_drawn(len(unique))
    if progress is not None:
        progress(f"measuring {len(unique)} policies")
    timings, sizes = measure_policies(anatomy, unique, target, timer, kernels=True)
    timings = _timed_again(anatomy, unique, timings, target, timer, progress)
    return profile_of(
        anatomy, target, unique, timings, sizes, seconds=lambda: time.perf_counter() - start,
        device=timer.fingerprint(),
    )  # fmt: skip


def _timed_again(
    anatomy: Anatomy, policies: Mapping[str, Policy], timings: Mapping[str, Timing], target: Target, timer: Timer,
    progress: Callable[[str], None] | None,
) -> dict[str, Timing]:  # fmt: skip
    """The timings with what a second look at all of them found, in another order and without kernels."""
    if progress is not None:
        progress(f"measuring {len(policies)} policies a second time")
    order = np.random.default_rng(0).permutation(list(policies)).tolist()
    shuffled = {key: policies[key] for key in order}
    found, _ = measure_policies(anatomy, shuffled, target, timer, most_rounds=SECOND_ROUNDS)
    return {key: timing.with_again(found[key]) if key in found else timing for key, timing in timings.items()}


def covering(worker: Worker, policies: Sequence[Policy], candidates: Sequence[Policy]) -> list[Policy]:
    """The policies, with those candidates that run kinds of kernels which none before them does."""
    chosen, known = list(policies), set[str]()
    for number, policy in enumerate([*policies, *candidates]):
        work = worker.work(choices_of(worker.anatomy, [policy]))
        kinds = {units.kind for units in work.units}
        kinds |= {name for name, amounts in work.conversions.items() if amounts[:, 0].any()}
        if number >= len(policies) and not kinds <= known:
            chosen.append(policy)
        known |= kinds
    return chosen


def _reason(stages: Sequence[Stage], after_next: float, seconds: float, most: int) -> str | None:
    """Why to stop, or None."""
    if stages[-1].policies >= most:
        return f"{most} policies are the most"
    errors = [stage.mape for stage in stages]
    if len(errors) > PATIENCE and min(errors[-PATIENCE:]) > (1 - WORTH) * min(errors[:-PATIENCE]):
        return f"the held-out error stopped falling at {min(errors):.1%}"
    if after_next > seconds:
        return f"the next batch would pass {seconds:.0f} s"
    return None


def stages_to_list(stages: Sequence[Stage]) -> list[Mapping[str, object]]:
    """As JSON-ready data."""
    return [
        {"policies": s.policies, "design": s.design, "mape": s.mape, "seconds": round(s.seconds, 1)} for s in stages
    ]
