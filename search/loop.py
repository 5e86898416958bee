"""The search itself: trials until it is enough, and what is done where it stands still."""

import math
import time
from collections.abc import Callable
from functools import partial

from . import finalists, long_tuning, planning
from .aiming import aim
from .clock import ENDING
from .corner import least_accuracy
from .pareto import losses
from .plateau import LEAST_TRIALS, stalled
from .records import Rung
from .rungs import judge_stopping
from .session import TICK_SECONDS, Session
from .split_gap import search_limits, take_long_gap
from .study import end_study, studying
from .trials import Trials

JUDGED = 50
"""A long search is judged after each so-and-so-many-th part of it: judging looks at all trials."""
SOON = 0.5
"""Of the usual standstill, where finalists can teach the search: they are trained in the end anyway."""
FIRST, FIRST_SHARE = 24, 0.25
"""Trials that come before the long fine-tunes of the rules; at most that share of the time for trials, or of
``max_trials``, beside the seeds."""
LOOK_SECONDS = 20.0
"""How often the search looks at the disk and at what the finalists will need."""
TARGET_LOOKS = (2 / 3, 1 / 3)
"""Shares of a search's time that are left when it looks at the target: what lies near the front is measured and fed
back, while there is something to propose by it."""
LOOK_SHARE = 0.03
"""Of the time that is left: what such a look may take. A shorter search has one at its end."""


def search(session: Session, trials: Trials) -> None:
    """Trials until the clock, the trial limit, the disk, the front or the sampler's ideas say that it is enough."""
    patience, since, most = (SOON if long_tuning.teachable(session) else 1.0), 0, session.config.search.max_trials
    target = _TargetLooks(session)
    while True:
        reason = _run(session, trials, partial(enough, session, trials, patience, since), most, target.look)
        if _over(session, trials) is not None:
            break
        if _learned(session, trials, reason):
            patience, since = SOON, trials.finished
        elif patience < 1:
            patience = 1.0
        else:
            break
    trials.drain()
    trials.close_paused()
    session.folder.decide("search", "ended the search", reason)
    if studying(session.state["rungs"]):
        end_study(session)
    judge_stopping(session)


def run_first(session: Session, trials: Trials) -> None:
    """What comes before the long fine-tunes of the rules, which may take a third of a short night: the seeds, which
    nothing could change that those teach, and proposals by what short fine-tunes tell. Who looks in, or has to end the
    night early, has a front at once."""
    if session.state.get("first_trials_over"):  # a resumed night goes on with what came after them
        return
    most, store = session.config.search.max_trials, session.store
    count = FIRST if most is None else min(FIRST, int(FIRST_SHARE * most))
    _run(session, trials, lambda: _over(session, trials) or (None if store.waiting("seed") else "no seed waits"), most)
    planning.plan_finalists(session)
    left = session.clock.left_before("finalists", *ENDING)

    def ended() -> str | None:
        if store.tally().begun >= count:
            return f"{count} trials have begun"
        # Counted trials are the same on every machine; time is not.
        used = most is None and session.clock.left_before("finalists", *ENDING) <= (1 - FIRST_SHARE) * left
        return "their time is used up" if used else _over(session, trials)

    _run(session, trials, ended, count)
    trials.drain()
    session.update(first_trials_over=True)


def _run(
    session: Session, trials: Trials, ended: Callable[[], str | None], most: int | None,
    look: Callable[[], None] = lambda: None,
) -> str:  # fmt: skip
    """Trials until they ``ended``, and until ``most`` have begun; says why. ``look`` is called
    in between."""
    looked = -math.inf
    planning.plan_finalists(session)  # first, or time that they cannot use ends a search before it begins
    while (reason := ended()) is None:
        if time.monotonic() - looked > LOOK_SECONDS or session.folder.pressed:
            looked = time.monotonic()
            if take_long_gap(session):
                aim(session)
            planning.plan_finalists(session)
            trials.make_room()
            continue
        look()
        more = trials.fill(session.workers if most is None else most - session.store.tally().begun)
        trials.collect(0.0 if more else TICK_SECONDS)
    return reason


class _TargetLooks:
    """When the search looks at the target. Never where trials are counted: they are to be the same on every machine,
    and no two measurements are."""

    def __init__(self, session: Session) -> None:
        self._session = session
        whole = self._left()
        counted = session.config.search.max_trials is not None
        self._due = [] if counted else [share * whole for share in TARGET_LOOKS]

    def _left(self) -> float:
        return self._session.clock.left_before("finalists", *ENDING)

    def look(self) -> None:
        """Measure what is near the front, where it is time to."""
        left = self._left()
        if not self._due or left > self._due[0]:
            return
        self._due = [due for due in self._due if due < left]
        if finalists.remeasure_seconds(self._session) <= LOOK_SHARE * left:
            finalists.remeasure_front(self._session, over=False)


def _learned(session: Session, trials: Trials, reason: str) -> bool:
    """Where the search stands still with time left: give finalists their long fine-tune now, and say whether there is
    something to go on with. What short fine-tunes tell is used up then; what the long ones give of policies as harsh
    as those that are proposed, which no rule is, moves the surrogate. Nothing is lost: they are finalists all the same.
    """
    if not long_tuning.teachable(session):
        return False
    trials.drain()
    count = session.state["rungs"]["finalists"]
    spare = LEAST_TRIALS * _trial_seconds(session) / session.workers + finalists.remeasure_seconds(session)
    trained = long_tuning.train_early(session, count, spare, f"the search stands still: {reason}")
    planning.more_to_verify(session, trained)
    return trained > 0


def enough(session: Session, trials: Trials, patience: float = 1.0, since: int = 0) -> str | None:
    """Why the search ends; None while it goes on. ``patience``: see :func:`~.plateau.stalled`; ``since``: how many had
    finished when it was taught something."""
    if (over := _over(session, trials)) is not None:
        return over
    if trials.finished - trials.judged < max(1, trials.finished // JUDGED):
        return None
    trials.judged = trials.finished
    if since and trials.finished - since < patience * LEAST_TRIALS:
        return None
    reference = session.state["reference"]
    # A stricter limit is asked of long fine-tunes; what grows below it after the short ones may end within it.
    floor = min(reference["accuracy"], least_accuracy(session.state, search_limits(session, Rung.SHORT), Rung.SHORT))
    corner = losses(floor, reference["latency_ms"], reference["size_bytes"])
    return stalled([t for t in session.store.trials() if t.role != "baseline"], corner, patience)


def _over(session: Session, trials: Trials) -> str | None:
    """What ends the search however much it still finds."""
    most = session.config.search.max_trials
    ending = _trial_seconds(session) + finalists.remeasure_seconds(session)
    if session.clock.left_before("finalists", *ENDING) <= ending:
        return "the time for it is used up"
    if most is not None and session.store.tally().begun >= most and not trials.unfinished:
        return f"max_trials {most} is reached"
    if session.state.get("disk_full"):
        return "the disk is full"
    if trials.dry and not trials.unfinished:
        return "the sampler proposes only policies that are known"
    return None


def _trial_seconds(session: Session) -> float:
    """What a trial takes, from those of this night: the upper quartile, so that the last one still fits."""
    spans = session.store.tally().spans
    return spans[(3 * len(spans)) // 4] if spans else 0.0
