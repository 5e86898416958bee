"""How many policies a calibration measures: batch after batch, until the held-out error has stopped falling."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...spaces.anatomy import Anatomy
from ...spaces.plans import choices_of
from ...spaces.policy import Policy, digest
from .measure import Timer, Timing, measure_policies
from .profile import Profile, profile_of
from .target import Target
from .units import Worker

FIRST, BATCH, MOST = 24, 16, 120
CANDIDATES = 200
"""Random policies among which kinds of kernels are looked for that the first batch does not run."""
PATIENCE = 2
"""Batches that must improve the error together by :data:`WORTH` of it, or the calibration ends."""
WORTH = 0.05
SECONDS = 120.0


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

    Raises MeasurementError.
    """
    start = time.perf_counter()
    policies: dict[str, Policy] = {}
    timings: dict[str, Timing] = {}
    sizes: dict[str, int] = {}
    stages: list[Stage] = []
    batch = covering(Worker(anatomy), [*always, *draw(FIRST)], draw(CANDIDATES))
    while True:
        before, new = time.perf_counter(), {digest(p): p for p in batch if digest(p) not in policies}
        if progress is not None:
            progress(f"measuring {len(new)} policies, {len(policies)} are measured")
        found, their_sizes = measure_policies(anatomy, new, target, timer, kernels=True)
        policies, timings, sizes = policies | new, timings | found, sizes | their_sizes
        profile = profile_of(
            anatomy, target, policies, timings, sizes, seconds=lambda: time.perf_counter() - start,
            device=timer.fingerprint(),
        )  # fmt: skip
        spent = time.perf_counter() - start
        heldout = profile.predictor.heldout
        stages.append(Stage(policies=len(policies), design=profile.predictor.design, mape=heldout.mape, seconds=spent))
        reason = _reason(stages, spent + (time.perf_counter() - before) * BATCH / max(1, len(new)), seconds, most)
        if reason is not None:
            return Calibration(profile=profile, stages=tuple(stages), reason=reason)
        batch = draw(min(BATCH, most - len(policies)))


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
