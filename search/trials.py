"""Trials: propose, look at the free objectives, train rung by rung, pause where others promise more, record."""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ..evaluators.evaluate import Job, Outcome
from ..evaluators.latency.insitu import UnseenKernelError
from ..evaluators.latency.measure import AGREE, MeasurementError
from ..evaluators.latency.profile import Point
from ..spaces.errors import InputError
from ..spaces.plan import plan
from ..spaces.policy import Policy, digest, network_digest, policy_from_dict, policy_to_dict
from .corner import asked_rung
from .disk import drop_below, find_room, is_full
from .judging import Judging
from .policy_sampler import TrialSuggest
from .promotion import RECENT, Worth, promoted
from .records import NOT_CONTINUED, Latency, Rung, TrialRecord, TrialState
from .session import TICK_SECONDS, Session, quality_of
from .split_gap import search_limits
from .stopping import spared
from .store import policy_of
from .study import end_study, next_rung, rungs_of, studying
from .worker import Failure

log = logging.getLogger("nightpress")
MOST_REPEATS = 60


@dataclass(slots=True)
class Trials:
    """Runs trials on the session's workers. ``running`` maps a trial's number to the job it is at;
    ``adopted`` are trials that an earlier driver began and did not end."""

    session: Session
    adopted: list[TrialRecord] = field(default_factory=list[TrialRecord])
    straight: bool = False
    """Whether a trial goes from its first rung to the top without a pause and without the rung in between."""
    running: dict[int, Job] = field(default_factory=dict[int, Job])
    most_waiting: float = math.inf
    """Paused trials; where so many wait, nothing new begins."""
    paused: dict[int, TrialRecord] = field(default_factory=dict[int, TrialRecord])
    """Trials that wait at a rung; they may go on later."""
    repeats: int = 0
    """Proposals in a row that were known already: the sampler has run dry."""
    finished: int = 0
    judged: int = 0
    """How many had finished when the search was last judged."""
    held: dict[int, Job] = field(default_factory=dict[int, Job])
    """Jobs that found the disk full; they go on when there is room."""
    judging: Judging = field(init=False)
    _digests: dict[int, str] = field(default_factory=dict[int, str])
    """Of the trials that have begun and not ended."""
    _points: dict[str, Point] = field(default_factory=dict[str, Point])
    _spared: set[int] = field(default_factory=set[int])
    _worths: deque[Worth] = field(default_factory=lambda: deque(maxlen=RECENT))
    """What the latest trials promised after their first rung."""

    def __post_init__(self) -> None:
        self.judging = Judging(self.session)
        store = self.session.store  # an earlier driver knew more than what it left unfinished
        self._spared.update(store.noted("spared"))
        first = rungs_of(self.session.state["rungs"])[0]
        again = {t.number for t in self.adopted if t.quality is None or t.quality.rung == first}  # judged once more
        self._worths.extend(Worth(*w) for number, w in sorted(store.noted("worth").items()) if number not in again)

    @property
    def unfinished(self) -> bool:
        """Whether there is something to go on with although nothing new begins."""
        return not self.straight and bool(self.running or self.paused)

    @property
    def dry(self) -> bool:
        """Whether the sampler has proposed nothing new for a while."""
        return self.repeats >= MOST_REPEATS

    def fill(self, most: int, *, go_on: bool = True) -> bool:
        """Start work until every worker is busy or ``most`` trials have begun: first what a killed driver left, then
        paused trials (if ``go_on``) or new ones, whichever promise more.

        Ends after a tick in any case, because results and signals wait meanwhile; returns whether that was why.
        """
        self._take_up_held()
        self.session.state["waiting"] = len(self.paused)
        begun, end = 0, time.monotonic() + TICK_SECONDS
        while len(self.running) < self.session.workers:
            new = begun < most and not self.dry
            if self.adopted:
                self._adopt(self.adopted.pop(0))
            elif go_on and (number := self._promoted(new=new)) is not None:
                self._go_on(self.paused.pop(number))
            elif new:
                self.begin(min(self.session.workers - len(self.running), most - begun))
                begun += 1
            else:
                break
            if time.monotonic() >= end:
                return True
        return False

    def _promoted(self, *, new: bool) -> int | None:
        """The paused trial to go on with now; those that have become hopeless meanwhile are stopped."""
        if not self.paused:
            return None
        for number, record in self.judging.unseen(self.paused).items():
            if self._hopeless(record):
                del self.paused[number]
            elif number in self._spared:
                return number
        self.judging.look(self.paused)
        new = new and len(self.paused) < self.most_waiting
        return promoted([(n, self.judging.waiting[n]) for n in self.paused], list(self._worths), new=new)

    def _adopt(self, record: TrialRecord) -> None:
        """Go on after the trial's last result; from its start where that was not yet on record."""
        log.info("trial %d is taken up again", record.number)
        self._digests[record.number] = record.digest
        if record.qualities and record.params is not None:
            self._onward(record)
        else:
            self._start(record.number, policy_of(record), record.role)

    def begin(self, wanted: int = 1) -> None:
        """Ask for one policy, of so many that are wanted at once, and start it."""
        store = self.session.store
        trial = store.ask(wanted)
        policy = self._policy(trial.user_attrs, TrialSuggest(trial))
        mine = store.claims.take(f"policy:{digest(policy)}") == (store.driver or "")
        if "given" not in trial.user_attrs and digest(policy) in self._digests.values():
            mine = False
        if not mine and self._known(digest(policy), trial.number) is None:  # somebody is at it already
            store.drop(trial)
            self.repeats += 1
            return
        store.begin(trial, policy, self.session.clock.now())
        self._digests[trial.number] = digest(policy)
        self._start(trial.number, policy, str(trial.user_attrs["role"]))

    def _start(self, number: int, policy: Policy, role: str) -> None:
        """Look at the free objectives, then train; or close it at once: known already, or beyond a hard limit."""
        store, session = self.session.store, self.session
        known = self._known(digest(policy), number)
        if known is not None:
            self._reuse(number, known)
            return
        self.repeats = 0
        try:
            predicted, size = session.predicted(policy), session.predict(policy)[3]
        except (InputError, UnseenKernelError, MeasurementError) as error:  # its kernels cannot be measured; others can
            if role == "baseline" and isinstance(error, MeasurementError):  # it is the target that was lost
                raise
            self._finish(number, TrialState.FAILED, f"it has no price: {error}")
            return
        planned = plan(session.prepared.anatomy, policy)
        store.note(
            number,
            predicted=asdict(predicted),
            size_bytes=size, macs=planned.macs, params=planned.params,
        )  # fmt: skip
        point = self._measured_points().get(network_digest(policy))
        if point is not None and not session.profile.forced:  # it was measured during calibration
            settled, reference_ms = point.repeat_error <= AGREE, session.profile.reference_ms
            store.note(
                number,
                measured=asdict(
                    Latency.of_windows(point.latency_ms, point.repeat_error, reference_ms, settled=settled)
                ),
            )
        excess = self.excess(predicted.low_ms, size, planned.macs)
        if excess:
            store.constrain(number, excess)
        beyond = [f"{name} by {value:.0%}" for name, value in excess.items() if value > 0]
        if beyond and role != "baseline":
            self._finish(number, TrialState.INFEASIBLE, f"beyond {', '.join(beyond)}, not trained")
            return
        self._submit(number, policy, self._next(None))

    def excess(self, latency_ms: float, size_bytes: int, macs: int) -> dict[str, float]:
        """How far beyond the limits on what is free to know, as shares of the limits. Latency counts by the low
        end of its interval: only what is surely too slow is refused."""
        limits = self.session.config.limits
        found: dict[str, float] = {}
        if limits.max_latency_ms is not None:
            found["max_latency_ms"] = latency_ms / limits.max_latency_ms - 1
        if limits.max_size_bytes is not None:
            found["max_size_bytes"] = size_bytes / limits.max_size_bytes - 1
        if limits.max_macs is not None:
            found["max_macs"] = macs / limits.max_macs - 1
        return found

    def collect(self, timeout_seconds: float = TICK_SECONDS) -> None:
        """Take results that come within the timeout and move their trials on."""
        for number, result in self.session.results(timeout_seconds):
            self.take(number, result)

    def take(self, number: int, result: Outcome | Failure) -> None:
        """Move a trial on by the result of the job it is at."""
        job = self.running.pop(number)
        if is_full(result):
            self.held[number] = job
        elif isinstance(result, Failure):
            self._finish(number, TrialState.FAILED, f"{result.kind}: {result.text}")
        else:
            self._advance(number, job, result)

    def close(self, number: int, state: TrialState, reason: str) -> None:
        """End a trial as it stands."""
        del self.running[number]
        self._finish(number, state, reason)

    def drain(self) -> None:
        """Wait for what is running and what was adopted; nothing new begins, and who pauses waits."""
        while self.running or self.adopted or self.held:
            self.fill(0, go_on=False)
            self.collect()

    def close_paused(self, most: int | None = None) -> None:
        """End the trials that wait, or the ``most`` that promise least."""
        waiting = list(self.paused.values())
        if most is not None:
            worths = self.judging.worths(waiting)
            rates = {t.number: math.inf if w is None else w.rate for t, w in zip(waiting, worths, strict=True)}
            waiting = sorted(waiting, key=lambda t: (rates[t.number], t.number))[:most]
        for record in waiting:
            del self.paused[record.number]
            self._finish(record.number, TrialState.STOPPED, NOT_CONTINUED)
        self.session.state["waiting"] = len(self.paused)

    def make_room(self) -> bool:
        """Room on the disk where it lacks, if need be by ending half of the trials that wait; whether there is any."""

        def give_up() -> bool:
            there = len(self.paused)
            self.close_paused((there + 1) // 2)
            return bool(there)

        return find_room(self.session, [*self.running, *self.held], give_up)

    def _take_up_held(self) -> None:
        if not self.held:
            return
        room = self.make_room()
        for number, job in self.held.items():
            if room:
                self._submit(number, job.policy, Rung(job.rung))
            else:
                self._finish(number, TrialState.FAILED, "the disk is full")
        self.held.clear()

    def give_up(self, reason: str) -> None:
        """Close what is running as failed; its workers are gone."""
        for number in [*self.running, *self.held]:
            self._finish(number, TrialState.FAILED, reason)
        self.running.clear()
        self.held.clear()
        self.close_paused()

    def _advance(self, number: int, job: Job, outcome: Outcome) -> None:
        store = self.session.store
        if outcome.looks:
            store.note(number, looks=outcome.looks)
        store.note_quality(number, quality_of(outcome.search, job.rung, "search", outcome.losses, outcome.seconds))
        drop_below(self.session.folder, number, job.rung)
        self._onward(store.trial(number))

    def _onward(self, record: TrialRecord) -> None:
        """What comes after a rung: the end, the next rung at once, a pause, or a stop."""
        rungs, config = self.session.state["rungs"], self.session.config
        if record.quality is not None and record.quality.rung == Rung.SHORT:
            self._complete(record, record.quality.accuracy)
        elif record.role != "search" or "rungs" in config.search.without or self._studied or self._compared:
            self._go_on(record)
        else:
            if record.quality is not None and record.quality.rung == rungs_of(rungs)[0]:
                self._note_worth(record)
            if self._hopeless(record):
                return
            if self.straight or record.number in self._spared:
                self._go_on(record)
            else:
                self.paused[record.number] = record

    def _complete(self, record: TrialRecord, accuracy: float) -> None:
        state = self.session.state
        least = search_limits(self.session, asked_rung(state, Rung.SHORT)).min_accuracy
        if least is not None:
            self.session.store.constrain(record.number, {"min_accuracy": least - accuracy})
        self._finish(record.number, TrialState.COMPLETE, None)
        rungs = self.session.state["rungs"]
        if studying(rungs) and len(self.session.store.noted("looks")) >= rungs["study"]:
            end_study(self.session)

    @property
    def _studied(self) -> bool:
        """Whether trials are looked at for the study of the rungs, and therefore never stopped."""
        return not self.straight and studying(self.session.state["rungs"])

    @property
    def _compared(self) -> bool:
        """Whether the sampler compares its proposals with each other, each by its short fine-tune."""
        return self.session.config.search.sampler == "netadapt"

    def _note_worth(self, record: TrialRecord) -> None:
        [worth] = self.judging.worths([record])
        if worth is not None:
            self.session.store.note(record.number, worth=worth)
            self._worths.append(worth)

    def _hopeless(self, record: TrialRecord) -> bool:
        """Stop a trial that the rule gives up, but for a sample that is finished to count the rule's errors."""
        if record.number in self._spared:
            return False
        found = self.judging.judge().verdict(record)
        if found is None:
            return False
        if spared(record.digest):
            self.session.store.note(record.number, spared=asdict(found))
            self._spared.add(record.number)
            return False
        self._finish(record.number, TrialState.STOPPED, found.reason)
        return True

    def _next(self, reached: str | None) -> Rung:
        rungs = self.session.state["rungs"]
        return next_rung({**rungs, "part_steps": 0, "bn": True} if self.straight else rungs, reached)

    def _go_on(self, record: TrialRecord) -> None:
        self.judging.waiting.pop(record.number, None)
        reached = record.quality.rung if record.quality is not None else None
        self._submit(record.number, policy_of(record), self._next(reached))

    def _policy(self, attrs: Mapping[str, object], suggest: TrialSuggest) -> Policy:
        given = attrs.get("given")
        if given is None:
            return self.session.prepared.space.sample(suggest)
        self.session.prepared.space.sample(suggest)  # so that the sampler knows where the policy lies
        return policy_from_dict(given, "enqueued policy")

    def _known(self, policy_digest: str, number: int) -> TrialRecord | None:
        """Another trial that has measured the policy."""
        known = self.session.store.tally().number_of(policy_digest)
        return self.session.store.trial(known) if known is not None and known != number else None

    def _measured_points(self) -> Mapping[str, Point]:
        """What was measured during calibration, by the network that runs."""
        if not self._points:
            self._points = {network_digest(point.policy): point for point in self.session.profile.points}
        return self._points

    def _reuse(self, number: int, known: TrialRecord) -> None:
        self.repeats += 1
        store = self.session.store
        for quality in known.qualities:
            store.note_quality(number, quality)
        store.note(
            number, predicted=_plain(known.predicted), measured=_plain(known.measured), size_bytes=known.size_bytes,
            macs=known.macs, params=known.params, reused_from=known.reused_from or known.number,
        )  # fmt: skip
        self._finish(number, known.state, f"same policy as trial {known.number}: its measurements are reused")

    def _submit(self, number: int, policy: Policy, rung: Rung) -> None:
        session = self.session
        rungs = session.state["rungs"]
        job = Job(
            policy=policy, rung=rung.value, seed=session.config.seed, folder=session.folder.artifacts(number),
            steps=0 if rung is Rung.BN else rungs["short_steps"],
            stop=rungs["part_steps"] if rung is Rung.PART else None,
            looks=tuple(rungs["looks"]) if rung is Rung.SHORT and self._studied else (),
        )  # fmt: skip
        self.running[number] = job
        session.state["current"] = {"trial": number, "rung": rung.value}
        session.jobs.submit(number, job)

    def _finish(self, number: int, state: TrialState, reason: str | None) -> None:
        self.session.store.finish(number, state, finished=self.session.clock.now(), reason=reason)
        self._digests.pop(number, None)
        self.judging.waiting.pop(number, None)
        self.finished += 1
        record = self.session.store.trial(number)
        quality = f" accuracy {record.quality.accuracy:.4f}" if record.quality else ""
        latency = f" latency {record.latency.latency_ms:.3f} ms" if record.latency else ""
        log.info("trial %d %s%s%s%s", number, state, quality, latency, f" ({reason})" if reason else "")
        self.session.watch(self.session)


def enqueue(session: Session, policy: Policy, role: str, name: str | None = None) -> None:
    """Put a policy in front of the sampler's proposals, whether or not the space contains it.

    What the space does not offer, Optuna learns at the nearest answer. It samples jointly only what every complete
    trial has a value for: one trial without parameters would make its samplers random, or univariate, for good.
    """
    params = session.prepared.space.nearest_params(policy)
    session.store.enqueue(params, role, name, given=policy_to_dict(policy))


def _plain(latency: Latency | None) -> dict[str, object] | None:
    return asdict(latency) if latency is not None else None
