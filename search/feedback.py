"""What the night measures goes back into the latency profile; a target that has drifted is calibrated again."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..evaluators.latency.calibrate import CANDIDATES, SECONDS, calibrate, calibrate_until_flat, stages_to_list
from ..evaluators.latency.insitu import UnseenKernelError
from ..evaluators.latency.measure import REFERENCE, MeasurementError, Timing, measure_policies
from ..evaluators.latency.nodes import Matcher
from ..evaluators.latency.predictor import LEAST_DRIFT, LEAST_POINTS
from ..evaluators.latency.profile import Point, Profile, drift, point_of
from ..spaces.errors import InputError
from ..spaces.plans import choices_of
from ..spaces.policy import INT8, Policy
from .clock import ENDING, Clock
from .proposals import baselines
from .session import Session

LEAST_LEVEL = 3
"""So many policies tell how slow a device is."""
SPARE = 0.05
"""Of the finalists' time, for a calibration after the search: so much the plan of the long fine-tunes is off anyway."""


def measure_target(session: Session, policies: list[Policy] | None = None) -> Profile:
    """Calibrate here and now. Without ``policies`` the agent decides how many, unless the config says so.

    Raises MeasurementError.
    """
    config, prepared = session.config, session.prepared
    generator = np.random.default_rng(config.seed)

    def draw(count: int) -> list[Policy]:
        return [prepared.space.random(generator) for _ in range(count)]

    integers = prepared.space.integers or INT8
    always = list(baselines(prepared.anatomy, bool(config.space.distill), integers=integers).values())
    candidates = list[Policy]()
    if policies is None and config.calibration_policies is not None:
        policies = [*draw(max(LEAST_POINTS, config.calibration_policies)), *always]
        candidates = draw(CANDIDATES)
    with session.timer("calibrate") as timer:
        if policies is not None:
            profile = calibrate(
                prepared.anatomy, policies, config.target, candidates=candidates, timer=timer,
                progress=lambda text: _tell(session, text),
            )  # fmt: skip
            stages, reason = [], "as many as were asked for, each timed twice"
        else:
            made = calibrate_until_flat(
                prepared.anatomy, draw, config.target, always=always, timer=timer,
                seconds=min(SECONDS, session.clock.share_seconds("calibrate")),
                progress=lambda text: _tell(session, text),
            )  # fmt: skip
            profile, stages, reason = made.profile, stages_to_list(made.stages), made.reason
    for text in profile.noise_warnings():
        session.warn("calibrate", text)
    held = profile.predictor.heldout
    session.folder.decide(
        "calibrate", f"predict latency by {profile.predictor.design}",
        f"held-out error {held.mape:.1%} over {held.n} measured policies, the best of "
        f"{len(profile.predictor.candidates)} designs; {reason}",
        designs=profile.predictor.candidates, stages=stages,
    )  # fmt: skip
    return profile


def feed_back(
    session: Session, policies: Mapping[str, Policy], timings: Mapping[str, Timing], sizes: Mapping[str, int],
    *, recalibrate: bool = True,
) -> float:  # fmt: skip
    """Add measurements of policies, by the keys of their timings, to the profile and fit it again. Where the reference
    has drifted beyond its repeat error, their times are taken at the calibration's pace (:func:`level_of`), or, if that
    is asked for and there is time, the calibration's policies are measured again first. A
    profile that is used although it is of another device learns nothing from this one. Returns how many times as slow
    as by the profile the device is now."""
    if session.profile.forced:
        return 1.0
    profile, reference, level = session.profile, timings.get(REFERENCE), 1.0
    moved = drift(profile, reference) if reference is not None else 0.0
    if reference is not None and abs(moved) > max(LEAST_DRIFT, profile.reference_repeat_error, reference.repeat_error):
        level = level_of(profile, policies, timings)
        evidence = {
            "reference_ms": reference.latency_ms, "calibrated_ms": profile.reference_ms, "policies_level": level
        }  # fmt: skip
        reason = f"the uncompressed model took {reference.latency_ms:.3g} ms, {moved:+.1%} against the calibration"
        if not recalibrate:
            taken = "as they are" if level == 1 else "at the calibration's pace"
            session.folder.decide("search", f"times are taken {taken}", reason, **evidence)
        elif has_time(session.clock, profile.seconds):
            session.folder.decide("search", "calibrate the target again", reason, **evidence)
            try:
                profile, level = measure_target(session, [p.policy for p in profile.points]), 1.0
            except MeasurementError as error:  # what was measured before it is worth having all the same
                session.folder.decide("search", "the calibration before is kept", f"the new one was lost: {error}")
        else:
            reason += f"; another one would take {profile.seconds:.0f} s of the long fine-tunes'"
            session.folder.decide("search", "did not calibrate the target again", reason, **evidence)
    matcher = Matcher(session.prepared.anatomy)
    points: list[Point] = [
        _at_level(point_of(policies[key], timings[key], sizes[key], matcher), level) for key in policies
    ]
    before = profile.predictor.heldout
    profile = profile.with_points(points)
    after = profile.predictor.heldout
    session.keep_profile(profile)
    session.folder.decide(
        "search", f"fitted the latency predictor to {len(points)} more measurements",
        f"{profile.predictor.design}: held-out error {after.mape:.1%} over {after.n}, before {before.mape:.1%} over "
        f"{before.n}",
    )  # fmt: skip
    return level


def level_of(profile: Profile, policies: Mapping[str, Policy], timings: Mapping[str, Timing]) -> float:
    """How many times as slow as by the profile the device is now, by what the policies themselves took beside what was
    predicted of them: the median; 1 where they are too few to tell, or where it is no more than what predictions are
    off by, and neighbours do in passing.

    The uncompressed network's own drift does not tell it: a neighbour that takes memory bandwidth slows large fp32
    weights down and small integer networks not. 30 policies that were 6.8 % too fast by its drift were 1.4 % off as
    measured.
    """
    keys = list(policies)
    expected = profile.costs(choices_of(profile.worker.anatomy, [policies[key] for key in keys]))[:, 0]
    left = np.log(np.array([timings[key].latency_ms for key in keys]) / expected)
    left = left[np.isfinite(left)]  # of a kind of kernel that was never measured nothing is expected
    if len(left) < LEAST_LEVEL:
        return 1.0
    level = float(np.exp(np.median(left)))
    return level if abs(level - 1) > LEAST_DRIFT else 1.0


def _at_level(point: Point, level: float) -> Point:
    """What was measured on a device that is so many times as slow as when it was calibrated, as it was then: mixed as
    they are, measurements of two levels would make one poor predictor. Of its nodes only shares are used."""
    halves = (point.halves_ms[0] / level, point.halves_ms[1] / level)
    return replace(point, session="", latency_ms=point.latency_ms / level, halves_ms=halves)


def has_time(clock: Clock, seconds: float) -> bool:
    """Whether so long a calibration leaves the finalists their time, but for a little of it. In a short night one took
    that of seven of eight long fine-tunes, when all that was near the front had just been measured."""
    return seconds <= clock.left_before("finalists", *ENDING) + SPARE * clock.share_seconds("finalists")


def measure_unseen(session: Session, policy: Policy, error: UnseenKernelError) -> None:
    """A policy with a kind of kernel that no measured policy ran is measured, and the predictor learns from it.

    Raises InputError where the profile is of another device, which cannot be measured here.
    """
    if session.profile.remote:
        raise InputError(
            f"{error}, and the profile is of another device, so it cannot be measured here: make a larger kit."
        )
    if session.profile.forced:
        raise InputError(
            f"{error}, and a profile that was forced ({session.profile.caveat}) learns nothing here: calibrate again."
        )
    session.folder.decide("search", "measured a policy", str(error))
    found = {"unseen": policy}
    anatomy, target = session.prepared.anatomy, session.config.target
    timings, sizes = session.on_target(
        "search", lambda timer: measure_policies(anatomy, found, target, timer, kernels=True)
    )
    feed_back(session, found, timings, sizes, recalibrate=False)  # trials of two paces would stand on one front


def _tell(session: Session, text: str) -> None:
    session.update(activity=text)
