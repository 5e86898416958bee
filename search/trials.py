"""One trial after another: propose, look at the free objectives, train rung by rung, record."""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ..evaluators.evaluate import Job, Outcome
from ..evaluators.latency.profile import Point
from ..spaces.plan import plan
from ..spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from .disk import find_room, is_full
from .policy_sampler import TrialSuggest
from .records import Latency, Rung, TrialRecord, TrialState
from .session import TICK_SECONDS, Session, quality_of
from .stopping import spared, verdict
from .store import policy_of
from .worker import Failure

log = logging.getLogger("nightpress")
MOST_REPEATS = 60


@dataclass(slots=True)
class Trials:
    """Runs trials on the session's workers. ``running`` maps a trial's number to the job it is at;
    ``adopted`` are trials that an earlier driver began and did not end."""

    session: Session
    adopted: list[TrialRecord] = field(default_factory=list[TrialRecord])
    running: dict[int, Job] = field(default_factory=dict[int, Job])
    repeats: int = 0
    """Proposals in a row that were known already: the sampler has run dry."""
    finished: int = 0
    judged: int = 0
    """How many had finished when the search was last judged."""
    held: dict[int, Job] = field(default_factory=dict[int, Job])
    """Jobs that found the disk full; they go on when there is room."""
    _points: dict[str, Point] = field(default_factory=dict[str, Point])

    @property
    def dry(self) -> bool:
        """Whether the sampler has proposed nothing new for a while."""
        return self.repeats >= MOST_REPEATS

    def fill(self, most: int) -> bool:
        """Start trials until every worker is busy or ``most`` have begun; those left by a killed driver first.

        Ends after a tick in any case, because results and signals wait meanwhile; returns whether that was why.
        """
        self._take_up_held()
        begun, end = 0, time.monotonic() + TICK_SECONDS
        while len(self.running) < self.session.workers and not self.dry:
            if self.adopted:
                self._adopt(self.adopted.pop(0))
            elif begun < most:
                self.begin()
                begun += 1
            else:
                break
            if time.monotonic() >= end:
                return True
        return False

    def _adopt(self, record: TrialRecord) -> None:
        """Go on at the rung after the trial's last result; from its start where that was not yet on record."""
        log.info("trial %d is taken up again", record.number)
        if record.qualities and record.params is not None:
            self._submit(record.number, policy_of(record), Rung.SHORT)
        else:
            self._start(record.number, policy_of(record), record.role)

    def begin(self) -> None:
        """Ask for one policy and start it."""
        store = self.session.store
        trial = store.ask()
        policy = self._policy(trial.user_attrs, TrialSuggest(trial))
        mine = store.claims.take(f"policy:{digest(policy)}") == (store.driver or "")
        if not mine and self._known(digest(policy), trial.number) is None:  # another driver is at it
            store.drop(trial)
            self.repeats += 1
            return
        store.begin(trial, policy, self.session.clock.now())
        self._start(trial.number, policy, str(trial.user_attrs["role"]))

    def _start(self, number: int, policy: Policy, role: str) -> None:
        """Look at the free objectives, then train; or close it at once: known already, or beyond a hard limit."""
        store, session = self.session.store, self.session
        known = self._known(digest(policy), number)
        if known is not None:
            self._reuse(number, known)
            return
        self.repeats = 0
        predicted, size = session.predicted(policy), session.predict(policy)[3]
        planned = plan(session.prepared.anatomy, policy)
        store.note(
            number,
            predicted=asdict(predicted),
            size_bytes=size, macs=planned.macs, params=planned.params,
        )  # fmt: skip
        point = self._measured_points().get(digest(policy))
        if point is not None and not session.profile.forced:  # it was measured during calibration
            store.note(
                number,
                measured=_measured(point.latency_ms, point.repeat_error, session.profile.reference_ms),
            )
        excess = self.excess(predicted.low_ms, size)
        if excess:
            store.constrain(number, excess)
        beyond = [f"{name} by {value:.0%}" for name, value in excess.items() if value > 0]
        if beyond and role != "baseline":
            self._finish(number, TrialState.INFEASIBLE, f"beyond {', '.join(beyond)}, not trained")
            return
        self._submit(number, policy, Rung.BN)

    def excess(self, latency_ms: float, size_bytes: int) -> dict[str, float]:
        """How far beyond the limits on free objectives, as shares of the limits. Latency counts by the low
        end of its interval: only what is surely too slow is refused."""
        limits = self.session.config.limits
        found: dict[str, float] = {}
        if limits.max_latency_ms is not None:
            found["max_latency_ms"] = latency_ms / limits.max_latency_ms - 1
        if limits.max_size_bytes is not None:
            found["max_size_bytes"] = size_bytes / limits.max_size_bytes - 1
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
        """Wait for what is running and what was adopted; nothing new begins."""
        while self.running or self.adopted or self.held:
            self.fill(0)
            self.collect()

    def _take_up_held(self) -> None:
        if not self.held:
            return
        room = find_room(self.session, [*self.running, *self.held])
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

    def _advance(self, number: int, job: Job, outcome: Outcome) -> None:
        store = self.session.store
        store.note_quality(number, quality_of(outcome.search, job.rung, "search", outcome.losses, outcome.seconds))
        record = store.trial(number)
        if job.rung == Rung.BN:
            if self._hopeless(record):
                return
            self._submit(number, job.policy, Rung.SHORT)
            return
        least = self.session.config.limits.min_accuracy
        if least is not None:
            store.constrain(number, {"min_accuracy": least - outcome.search.accuracy})
        self._finish(number, TrialState.COMPLETE, None)

    def _hopeless(self, record: TrialRecord) -> bool:
        """Stop a trial that the rule gives up, but for a sample that is finished to count the rule's errors."""
        config = self.session.config
        if "rungs" in config.search.without:
            return False
        found = verdict(record, self.session.store.tally().judges(), config.limits.min_accuracy)
        if found is None:
            return False
        if spared(record.digest):
            self.session.store.note(record.number, spared=asdict(found))
            return False
        self._finish(record.number, TrialState.STOPPED, found.reason)
        return True

    def _policy(self, attrs: Mapping[str, object], suggest: TrialSuggest) -> Policy:
        given = attrs.get("given")
        if given is None:
            return self.session.prepared.space.sample(suggest)
        policy = policy_from_dict(given, "enqueued policy")
        if self.session.prepared.space.contains(policy):
            self.session.prepared.space.sample(suggest)  # so that the sampler knows where the policy lies
        return policy

    def _known(self, policy_digest: str, number: int) -> TrialRecord | None:
        """Another trial that has measured the policy."""
        known = self.session.store.tally().number_of(policy_digest)
        return self.session.store.trial(known) if known is not None and known != number else None

    def _measured_points(self) -> Mapping[str, Point]:
        """What was measured during calibration, by digest."""
        if not self._points:
            self._points = {digest(point.policy): point for point in self.session.profile.points}
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
        job = Job(
            policy=policy, rung=rung.value, seed=session.config.seed, folder=session.folder.artifacts(number),
            steps=session.state["rungs"]["short_steps"] if rung is Rung.SHORT else 0,
        )  # fmt: skip
        self.running[number] = job
        session.state["current"] = {"trial": number, "rung": rung.value}
        session.jobs.submit(number, job)

    def _finish(self, number: int, state: TrialState, reason: str | None) -> None:
        self.session.store.finish(number, state, finished=self.session.clock.now(), reason=reason)
        self.finished += 1
        record = self.session.store.trial(number)
        quality = f" accuracy {record.quality.accuracy:.4f}" if record.quality else ""
        latency = f" latency {record.latency.latency_ms:.3f} ms" if record.latency else ""
        log.info("trial %d %s%s%s%s", number, state, quality, latency, f" ({reason})" if reason else "")
        self.session.watch(self.session)


def enqueue(session: Session, policy: Policy, role: str, name: str | None = None) -> None:
    """Put a policy in front of the sampler's proposals, whether or not the space contains it."""
    space = session.prepared.space
    params = space.params(policy) if space.contains(policy) else {}
    session.store.enqueue(params, role, name, given=policy_to_dict(policy))


def _plain(latency: Latency | None) -> dict[str, object] | None:
    return asdict(latency) if latency is not None else None


def _measured(latency_ms: float, repeat_error: float, reference_ms: float) -> dict[str, object]:
    return {
        "latency_ms": latency_ms, "low_ms": latency_ms / (1 + repeat_error), "high_ms": latency_ms * (1 + repeat_error),
        "measured": True, "repeat_error": repeat_error, "reference_ms": reference_ms,
    }  # fmt: skip
