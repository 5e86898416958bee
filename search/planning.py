"""The night's plan, made anew by what the night has learned."""

import numpy as np
from numpy.typing import NDArray

from ..evaluators.latency.calibrate import FIRST, SECOND_LOOK
from ..spaces.errors import InputError
from .clock import SHARES, length
from .finalists import choose, complete
from .folder import TARGET
from .long_length import LEAST_PACE, MOST_EPOCHS, a_finalist, in_all, long_costs, ours, within_reach
from .long_tuning import waits
from .prepare import COMPRESSED_STEP, FINALISTS_WANTED, LEAST_STEPS
from .proposals import rule_count
from .session import Session
from .study import FORWARD_SHARE

MARGIN = 1.15
LESS, MORE = 0.8, 1.1
"""Of the time that is planned for finalists, within which it stays: who they are changes from look to look, and each
has its own cost. Too little costs one of them, too much goes to further ones."""
MOST_SHARE = 0.5
"""Of the night, for the finalists: without a search there would be none."""
LEAST_VERIFY_SECONDS = 12.0
TIMES_VERIFIED = 2.0
"""What verifying a model takes beside calibrating with one: it is timed, and looked at layer by layer. Two short nights
on a busy core took 1.3 and 1.5."""
LEAST_REPORT_SECONDS, MOST_REPORT_SECONDS = 8.0, 30.0
MODEL_SECONDS, END_SECONDS = 0.35, 10.0
"""What the least night takes: seconds a calibrated policy, seconds at the end."""
SPARE = 1.5
"""In the budget that is advised: all that was timed is timed anew, and a busy machine is not twice equally fast."""


def plan_finalists(session: Session) -> None:
    """Plan the finalists' phase by what their short fine-tunes took: no more than they can use, no less than they need
    to be trained for longer than before."""
    _take_back_finalists(session)
    rungs, clock = session.state["rungs"], session.clock
    rules, chosen = complete(session, "baseline"), choose(session)
    queue = [t for t in ours(session, chosen) if waits(session, t)]
    given = rungs["long_steps"] if rungs.get("long_sized") else session.config.finetune.long_steps
    lengths = given or rungs["short_steps"], given or MOST_EPOCHS * rungs["epoch_steps"]
    behind = [t for t in ours(session, rules) if waits(session, t) and within_reach(session, t, rules, lengths[0])]
    # Finalists that nobody has proposed yet are taken to cost what the median rule does. No more of them are expected
    # than there are already: a night that kept the time for four had two in the end, and a search that was cut short.
    missing = min(max(0, rungs["finalists"] - len(chosen)), len(chosen) or rungs["finalists"]) if rules else 0
    count = len(queue) + len(behind) + missing
    if not count:
        return

    def seconds(costs: NDArray[np.float64]) -> tuple[float, float]:
        fixed, a_step = (MARGIN * costs / session.workers).tolist()
        return fixed + a_step * lengths[0], fixed + a_step * lengths[1]

    needed = long_costs(session, queue).sum(axis=0) + (missing * a_finalist(session, rules) if missing else 0.0)
    least, most = seconds(needed)
    first, _ = seconds(long_costs(session, behind).sum(axis=0))  # rules that still wait take nothing from finalists
    planned = min(most, max(least, SHARES["finalists"] * clock.total_seconds), MOST_SHARE * clock.total_seconds)
    planned += first
    was = clock.share_seconds("finalists")
    if not LESS * was <= planned <= MORE * was:
        session.replan(
            {"finalists": planned},
            f"{count} long fine-tunes need between {least + first:.0f} and {most + first:.0f} s, at what the short "
            "ones took",
        )


def _take_back_finalists(session: Session) -> None:
    """Finalists that were given up for longer fine-tunes come back as far as the usual share of the night pays for
    them, by what those of the rules took."""
    rungs, took = session.state["rungs"], session.store.longs()
    rules = [t for t in complete(session, "baseline") if t.number in took]
    by_hand = session.config.finetune.finalists is not None or not rungs.get("long_sized")
    if by_hand or len(rules) < LEAST_PACE:
        return
    one = float(in_all(session, a_finalist(session, rules)))
    share = SHARES["finalists"] * session.clock.total_seconds
    count = min(FINALISTS_WANTED, int(session.workers * share / max(MARGIN * one, 1e-9)))
    if count > rungs["finalists"]:
        session.update(rungs={**rungs, "finalists": count})
        session.folder.decide(
            "search", f"{count} finalists",
            f"one takes {one:.0f} s, as those of the rules did, and the finalists' usual share is {share:.0f} s",
            wanted=FINALISTS_WANTED, before=rungs["finalists"],
        )  # fmt: skip


def plan_verify(session: Session) -> None:
    """Plan the verification by what this device took for a policy while it was calibrated, noise and all."""
    profile, clock = session.profile, session.clock
    if session.config.target_profile is not None:  # it was measured on another day
        return
    models = session.state["rungs"]["finalists"] + rule_count(session.prepared.space)
    planned = min(max(LEAST_VERIFY_SECONDS, TIMES_VERIFIED * profile.seconds_each * models), 0.2 * clock.total_seconds)
    page = min(max(clock.share_seconds("report"), LEAST_REPORT_SECONDS), MOST_REPORT_SECONDS)
    session.replan(
        {"verify": planned, "report": page},
        f"a model took {profile.seconds_each:.2g} s while the target was calibrated (repeat error of the reference "
        f"{profile.reference_repeat_error:.1%}), and each is timed and looked at layer by layer",
    )


def more_to_verify(session: Session, count: int) -> None:
    """Plan the verification of so many models beside those that were planned."""
    if count:
        longer = session.clock.share_seconds("verify") + TIMES_VERIFIED * session.profile.seconds_each * count
        session.replan({"verify": longer}, f"{count} finalists more are to be verified")


def check_budget(session: Session, others: int = 0) -> None:
    """Raises InputError when the time that is left is too short for even the baselines, with the least that it takes.

    Each baseline is judged after re-estimation and after a short fine-tune, and fine-tuned once more for the export;
    ``others`` of them are left to the drivers that began them.
    """
    prepared, config, clock = session.prepared, session.config, session.clock
    if session.folder.path.joinpath(TARGET).is_file():
        return  # a resumed night has been through it
    step = COMPRESSED_STEP * prepared.step_ms / 1000
    passes = 6 * FORWARD_SHARE * prepared.train_items / config.finetune.batch_size
    trained = 2 * (config.finetune.short_steps or LEAST_STEPS) + passes
    rules = rule_count(prepared.space)
    ours = max(0, rules - others)
    looks = 1 + SECOND_LOOK if config.calibration_policies else 1.0  # else a second one is left out where time lacks
    models = (config.calibration_policies or FIRST) + rules
    calibrated = 0.0 if config.target_profile else MODEL_SECONDS * looks * models
    least = calibrated + ours * trained * step / session.workers + END_SECONDS
    if clock.left_seconds < least:
        raise InputError(
            f"The budget is too short for even the baselines: {length(clock.spent_seconds)} went into the start and "
            f"the inspection and {length(clock.left_seconds)} are left, but {length(calibrated)} of calibration, "
            f"{ours} baselines at about {1000 * step:.0f} ms a training step and the verification need "
            f"{length(least)}; the least budget here is {length(SPARE * (clock.spent_seconds + least))}."
        )
