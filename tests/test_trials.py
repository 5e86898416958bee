"""The order of work: trials pause, are gone on with, survive their driver, and no rung is trained twice."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage

from fakes_jobs import Instant
from nightpress.evaluators.evaluate import Job, Outcome
from nightpress.evaluators.latency.insitu import UnseenKernelError
from nightpress.evaluators.latency.measure import MeasurementError
from nightpress.evaluators.latency.profile import Point
from nightpress.evaluators.quality import Score
from nightpress.search.clock import Clock, Times
from nightpress.search.config import Limits, RunConfig, SearchConfig
from nightpress.search.folder import RunFolder, read_run
from nightpress.search.jobs import Jobs
from nightpress.search.loop import enough
from nightpress.search.promotion import Worth, promoted, reservation_rate
from nightpress.search.records import NOT_CONTINUED, TrialRecord, TrialState
from nightpress.search.sampler import make_sampler
from nightpress.search.session import Prepared, Session
from nightpress.search.store import Store, policy_of
from nightpress.search.trials import Trials, enqueue
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Choices, choices_of
from nightpress.spaces.policy import FP32, INT8, Policy, digest
from nightpress.spaces.space import Space
from strategies import toy_anatomy
from test_planning import TASK

SHORT, PART = 12, 4
PLANNED: dict[str, Any] = {"short_steps": SHORT, "part_steps": PART}


def outcome(job: Job) -> Outcome:
    """A made-up accuracy: less with every channel that is gone, above all at cheap rungs, and some luck."""
    lost = sum(0.06 * ratio**2 for ratio in job.policy.prune.values())
    luck = np.random.default_rng(int(digest(job.policy), 16)).normal(0, 0.01)

    def accuracy(done: float) -> float:
        return float(np.clip(0.95 + luck - lost * (3 - 2 * done), 0, 1))

    score = Score(accuracy=accuracy((job.stop or job.steps) / SHORT), accuracy_se=0.01, samples=400, seconds=0.0)
    return Outcome(search=score, looks=tuple((step, accuracy(step / SHORT)) for step in job.looks))


class Priced(Session):
    """A session on a made-up device: time and bytes grow with work and weights."""

    def predict(self, policy: Policy) -> tuple[float, float, float, int]:
        planned = plan(self.prepared.anatomy, policy)
        latency_ms = 0.01 + planned.macs / (1e8 * (1 + 3 * bool(policy.bits)))
        return latency_ms, 0.95 * latency_ms, 1.05 * latency_ms, 1000 + planned.params


SPACE = Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))
UNCOMPRESSED = plan(SPACE.anatomy, Policy(model=SPACE.anatomy.digest))


def begun(
    folder: Path, rungs: dict[str, Any], *, most: int | None = 16, workers: int = 1, record: BaseStorage | None = None,
    kind: type[Session] = Priced, **keys: Any,
) -> Trials:  # fmt: skip
    """A night at the moment when its search begins, or goes on from what is on record. The record is in memory: what
    a disk makes of it has tests of its own."""
    search = SearchConfig(sampler="random", max_trials=most, workers=workers)
    config = RunConfig(task="t", base=None, out=folder, search=search, **keys)
    (folder / "config.yaml").write_text("{task: t}")
    clock = Clock(Times().wall() + 86_400)
    session = kind(config=config, folder=RunFolder(folder), clock=clock, watch=lambda session: None)
    reference_ms = 0.01 + UNCOMPRESSED.macs / 1e8
    session.state |= {"state": "running", "phase": "search", "rungs": rungs}
    session.state["given"] = {split: {"accuracy": 0.7, "accuracy_se": 0.01} for split in ("search", "test")}
    session.state["reference"] = {"accuracy": 0.6, "latency_ms": reference_ms, "size_bytes": 1000 + UNCOMPRESSED.params}
    session.provide(
        prepared=Prepared(task=TASK, anatomy=SPACE.anatomy, space=SPACE, train_items=160, step_ms=9.0),
        profile=SimpleNamespace(points=(), forced=(), caveat=None, seconds_each=0.0, remote=False),
        jobs=Jobs(Instant(outcome, workers), 64, expected_seconds=lambda job: 1.0, tell=print),
    )  # fmt: skip
    store = Store(record or InMemoryStorage(), sampler_at=lambda trials: sampler_of("random", 0, trials))
    session.provide(store=store)
    return Trials(session, adopted=store.repair())


def sampler_of(name: str, seed: int, trials: int) -> BaseSampler:
    return make_sampler(name, seed, trials, SPACE, lambda choices: np.ones((len(choices), 2)))


def run(trials: Trials, jobs: int = 10_000) -> bool:
    """Search until it is over (True), or until so many jobs have begun and the driver is killed."""
    session = trials.session
    while enough(session, trials) is None:
        trials.fill((session.config.search.max_trials or 0) - session.store.tally().begun)
        if len(asked(trials)) >= jobs:
            return False
        trials.collect(0.0)
    trials.drain()
    trials.close_paused()
    return True


def asked(trials: Trials) -> list[tuple[int, Job]]:
    runner = trials.session.runner
    assert isinstance(runner, Instant)
    return runner.asked


def fixed(trial: TrialRecord) -> tuple[Any, ...]:
    """All but times."""
    return trial.number, trial.digest, trial.state, trial.reason, tuple((q.rung, q.accuracy) for q in trial.qualities)


def test_no_rung_is_trained_twice_and_each_goes_on_from_the_one_before(tmp_path: Path) -> None:
    trials = begun(tmp_path, PLANNED, most=40, workers=3)

    assert run(trials)

    came = Counter((number, job.rung) for number, job in asked(trials))
    assert set(came.values()) == {1}
    for number in {number for number, _ in came}:
        rungs = [job.rung for key, job in asked(trials) if key == number]
        assert rungs == ["bn", "part", "short"][: len(rungs)]
    assert {job.stop for _, job in asked(trials) if job.rung == "part"} == {PART}
    ends = Counter(t.state for t in trials.session.store.trials())
    assert ends.keys() == {TrialState.COMPLETE, TrialState.STOPPED}
    order = [number for number, _ in asked(trials)]
    assert order != sorted(order), "nothing was paused"


def test_a_greedy_search_judges_each_step_by_its_short_fine_tune(tmp_path: Path) -> None:
    """Its rounds compare accuracies, which must be of one rung: no trial waits while others begin."""
    trials, others = begun(tmp_path, PLANNED, most=40), begun(tmp_path, PLANNED, most=40)
    search = replace(trials.session.config.search, sampler="netadapt")
    trials.session.config = replace(trials.session.config, search=search)
    orders = [[number for number, _ in asked(night)] for night in (trials, others) if run(night)]
    assert [order == sorted(order) for order in orders] == [True, False]


@pytest.mark.parametrize(("repeat_error", "settled"), [(0.001, True), (0.2, False)])
def test_what_calibration_measured_is_on_record_with_whether_its_windows_agreed(
    tmp_path: Path, repeat_error: float, settled: bool
) -> None:
    trials = begun(tmp_path, PLANNED, most=1)
    policy = SPACE.random(np.random.default_rng(0))
    point = Point(policy=policy, latency_ms=0.1, halves_ms=(0.1, 0.1), repeat_error=repeat_error, size_bytes=1)
    known = SimpleNamespace(points=(point,), forced=(), caveat=None, seconds_each=0, remote=False, reference_ms=1.0)
    trials.session.provide(profile=known)
    enqueue(trials.session, policy, "seed")
    run(trials)
    [latency] = [t.measured for t in trials.session.store.trials() if t.digest == digest(policy)]
    assert latency is not None
    assert (latency.latency_ms, latency.settled) == (0.1, settled)


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    found: list[Any] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trials = begun(tmp_path / name, PLANNED)
        run(trials)
        found.append([fixed(t) for t in trials.session.store.trials()])
    assert found[0] == found[1]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(1, 9), min_size=1, max_size=4), study=st.booleans())
def test_a_killed_driver_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], study: bool
) -> None:
    rungs: dict[str, Any] = {"short_steps": SHORT, "looks": [2, 6], "study": 8} if study else PLANNED
    truth = begun(tmp_path_factory.mktemp("truth"), rungs)
    run(truth)
    folder, record = tmp_path_factory.mktemp("killed"), InMemoryStorage()
    trials = begun(folder, rungs, record=record)
    repeated = 0
    for jobs in kills:
        if not run(trials, jobs):
            repeated += len(trials.running)
            trials = begun(folder, trials.session.state["rungs"], record=record)
    run(trials)

    assert [fixed(t) for t in trials.session.store.trials()] == [fixed(t) for t in truth.session.store.trials()]
    assert repeated <= len(kills)


def test_who_waits_when_the_search_ends_is_closed_and_the_record_says_so(tmp_path: Path) -> None:
    trials = begun(tmp_path, PLANNED, most=40)
    while not trials.paused:
        trials.fill(1)
        trials.collect(0.0)
    waiting = set(trials.paused)
    trials.fill(0, go_on=False)
    assert trials.session.state["waiting"] == len(waiting)

    trials.drain()
    trials.close_paused()

    ended = {t.number: t for t in trials.session.store.trials()}
    assert waiting
    assert all(ended[number].state is TrialState.STOPPED for number in waiting)
    assert all(ended[number].reason == NOT_CONTINUED for number in waiting)
    assert not any(t.state is TrialState.RUNNING for t in ended.values())
    assert not trials.session.store.repair()


def test_rules_seeds_and_the_trials_of_the_study_go_straight_to_the_top(tmp_path: Path) -> None:
    trials = begun(tmp_path, {"short_steps": SHORT, "looks": [2, 6], "study": 12}, most=30)
    enqueue(trials.session, SPACE.random(np.random.default_rng(3)), "seed")

    run(trials)

    trials.session.update()
    found = trials.session.store.trials()
    [seed] = [t for t in found if t.role == "seed"]
    assert seed.state is TrialState.COMPLETE
    looked = [t for t in found if t.looks]
    assert len(looked) == 12
    assert all(t.state is TrialState.COMPLETE and [q.rung for q in t.qualities] == ["bn", "short"] for t in looked)
    [decision] = [d for d in read_run(trials.session.folder.path).decisions if "study" in d["evidence"]]
    assert decision["evidence"]["policies"] == 12
    assert {c["rung"] for c in decision["evidence"]["study"]} == {"bn", "part"}
    assert trials.session.state["rungs"]["part_steps"] == decision["evidence"]["part_steps"]


def test_half_of_those_who_wait_give_their_room_first(tmp_path: Path) -> None:
    trials = begun(tmp_path, PLANNED, most=60)
    while len(trials.paused) < 4:
        trials.fill(1)
        trials.collect(0.0)
    worths = dict(zip(trials.paused, trials.judging.worths(list(trials.paused.values())), strict=True))

    trials.close_paused(2)

    kept = [worths[number] for number in trials.paused]
    gone = [worth for number, worth in worths.items() if number not in trials.paused]
    assert len(kept) == len(gone) == 2
    assert all(a is None or (b is not None and b.rate <= a.rate) for a in kept for b in gone)


class Unpriced(Priced):
    """One that has no price for the first proposals."""

    def predict(self, policy: Policy) -> tuple[float, float, float, int]:
        if len(self.store.trials()) <= 2:
            raise InputError("its kernel cannot be measured here")
        return super().predict(policy)


def test_a_policy_that_has_no_price_fails_alone(tmp_path: Path) -> None:
    trials = begun(tmp_path, PLANNED, most=6, kind=Unpriced)

    assert run(trials)

    found = trials.session.store.trials()
    assert [t.state for t in found[:2]] == [TrialState.FAILED] * 2
    assert found[0].reason == "it has no price: its kernel cannot be measured here"
    assert len(found) == 6
    assert TrialState.COMPLETE in {t.state for t in found[2:]}


@dataclass
class Refused:
    """A profile to which every kernel is new, on a target that refuses them all."""

    forced: tuple[str, ...] = ()
    remote: bool = False
    asked: int = 0

    def costs(self, choices: Choices) -> np.ndarray[Any, Any]:
        return np.full((len(choices), 2), np.nan)

    def predict(self, policies: list[Policy]) -> np.ndarray[Any, Any]:
        raise UnseenKernelError("conv int8")

    def measure(self, *given: object) -> None:
        self.asked += 1
        raise MeasurementError("the runtime refuses it")


def test_a_kernel_that_the_target_refuses_has_no_price_and_is_asked_for_once(tmp_path: Path) -> None:
    session, profile = begun(tmp_path, PLANNED).session, Refused()
    session.provide(profile=profile, measure_unseen=profile.measure)
    choices = choices_of(SPACE.anatomy, [Policy(model=SPACE.anatomy.digest)])

    for _ in range(2):
        assert np.isnan(session.costs_of(choices)).all()

    assert profile.asked == 1
    session.update()
    assert "the runtime refuses it" in [d["reason"] for d in read_run(tmp_path).decisions]


def test_a_policy_beyond_a_limit_is_not_trained_and_says_so(tmp_path: Path) -> None:
    most_ms = 0.01 + UNCOMPRESSED.macs / 1e9
    trials = begun(tmp_path, PLANNED, most=24, limits=Limits(max_latency_ms=most_ms))
    rule = Policy(model=SPACE.anatomy.digest)
    enqueue(trials.session, rule, "baseline", "uncompressed")

    assert run(trials)

    found = trials.session.store.trials()
    beyond = [t for t in found if t.predicted is not None and t.predicted.low_ms > most_ms and t.role != "baseline"]
    assert 0 < len(beyond) < len(found) - 1
    assert {t.state for t in beyond} == {TrialState.INFEASIBLE}
    assert all(re.fullmatch(r"beyond max_latency_ms by \d+%, not trained", t.reason or "") for t in beyond)
    assert not {number for number, _ in asked(trials)} & {t.number for t in beyond}
    assert found[0].state is TrialState.COMPLETE


def test_a_policy_that_waits_is_not_begun_again(tmp_path: Path) -> None:
    trials = begun(tmp_path, PLANNED, most=60)
    while not trials.paused:
        trials.fill(1)
        trials.collect(0.0)
    store, [waiting] = trials.session.store, list(trials.paused.values())
    again = policy_of(waiting)
    store.study.enqueue_trial(SPACE.params(again))

    trials.begin()

    assert trials.repeats == 1
    assert not trials.running
    assert [t.digest for t in store.trials()].count(waiting.digest) == 1


def test_a_full_disk_takes_those_who_wait_before_it_stops_the_night(tmp_path: Path) -> None:
    trials = begun(tmp_path, PLANNED, most=60, max_disk_bytes=6_000_000)
    while len(trials.paused) < 4:
        trials.fill(1)
        trials.collect(0.0)
    trials.drain()
    for number in trials.paused:
        folder = trials.session.folder.artifacts(number)
        folder.mkdir(parents=True)
        (folder / "part.safetensors").write_bytes(b"x" * 1_000_000)

    assert trials.make_room()

    assert len(trials.paused) == 2
    assert len(list(tmp_path.rglob("part.safetensors"))) == 2
    reasons = [t.reason for t in trials.session.store.trials() if t.state is TrialState.STOPPED]
    assert reasons.count(NOT_CONTINUED) == 2


def test_a_night_of_an_earlier_version_goes_on_as_it_began(tmp_path: Path) -> None:
    trials = begun(tmp_path, {"short_steps": SHORT})
    run(trials)
    assert {job.rung for _, job in asked(trials)} == {"bn", "short"}
    assert not any(job.looks for _, job in asked(trials))
    assert any(t.state is TrialState.COMPLETE for t in trials.session.store.trials())


# Which of them


def test_a_paused_trial_goes_on_while_it_promises_more_for_its_cost_than_a_new_one() -> None:
    seen = [Worth(gain, rest=10.0, first=2.0) for gain in (0.0, 0.0, 1.0, 4.0)]

    assert reservation_rate(seen) == pytest.approx(4 / 18)  # begin all four, go on with the best
    assert promoted([(7, Worth(3.0, 10.0, 2.0))], seen, new=True) == 7
    assert promoted([(7, Worth(2.0, 10.0, 2.0))], seen, new=True) is None
    assert promoted([(7, Worth(2.0, 10.0, 2.0))], seen, new=False) == 7
    assert promoted([(7, Worth(2.0, 5.0, 2.0))], seen, new=True) == 7  # at a later rung half of the cost is paid


def test_who_cannot_be_judged_goes_first_and_of_equals_the_newest() -> None:
    some = Worth(1.0, 1.0, 1.0)
    assert promoted([(1, some), (2, None)], [some], new=True) == 2
    assert promoted([(4, some), (3, some)], [some], new=True) == 4
    assert promoted([], [some], new=True) is None
    nothing = Worth(0.0, 1.0, 1.0)
    assert promoted([(1, nothing)], [nothing], new=True) == 1
    assert promoted([(1, nothing)], [nothing, some], new=True) is None


@given(st.lists(st.builds(Worth, gain=st.floats(0, 1), rest=st.floats(0.1, 10), first=st.floats(0.1, 10)), min_size=1))
def test_the_best_rate_is_reached_by_going_on_with_all_that_lie_above_it(seen: list[Worth]) -> None:
    rate = reservation_rate(seen)
    above = [worth for worth in seen if worth.rate > rate]
    paid = sum(worth.first for worth in seen) + sum(worth.rest for worth in above)
    assert sum(worth.gain for worth in above) == pytest.approx(rate * paid, abs=1e-9)
