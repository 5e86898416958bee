"""The long fine-tune: which rules get it, and how long it is."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.storages import BaseStorage, InMemoryStorage

from fakes_jobs import Instant
from nightpress.evaluators.evaluate import Job, Outcome
from nightpress.evaluators.quality import Score
from nightpress.search.clock import Clock, Times
from nightpress.search.config import FineTuneConfig, Limits, RunConfig
from nightpress.search.finalists import choose, reachable
from nightpress.search.folder import RunFolder, read_run
from nightpress.search.jobs import Jobs
from nightpress.search.long_length import long_costs, size_long
from nightpress.search.long_tuning import outcome_file, train_lessons, train_long, train_rules
from nightpress.search.planning import plan_finalists
from nightpress.search.proposals import baselines
from nightpress.search.records import DIVERGED, Quality, TrialState
from nightpress.search.sampler import make_sampler
from nightpress.search.session import Prepared, Session
from nightpress.search.store import Store, policy_of
from nightpress.search.trials import enqueue
from nightpress.search.worker import Failure
from nightpress.spaces.policy import FP32, INT8, FineTune, Policy
from nightpress.spaces.space import Space, uniform
from strategies import toy_anatomy
from test_planning import TASK

SPACE = Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))
RULES = baselines(SPACE.anatomy, distill=True)
EPOCH, SHORT = 700, 350


def accuracy(policy: Policy, rung: str) -> float:
    """Errors that a cut multiplies, and that each rung lowers by as much."""
    lost = 0.02 + 0.9 * max(policy.prune.values(), default=0.0) ** 2
    return 0.98 - lost * {"bn": 1.0, "short": 0.6, "long": 0.4}[rung]


def outcome(job: Job, pace: float) -> Outcome:
    """After so much of the time that the short fine-tune lets expect."""
    seconds = 4 + 0.14 * job.steps * (1.3 if job.policy.bits else 1.0)
    score = Score(accuracy=accuracy(job.policy, "long"), accuracy_se=0.003, samples=5000, seconds=0.0)
    return Outcome(search=score, seconds=pace * seconds)


def judged(
    folder: Path, *, hours: float = 2.0, least: float | None = 0.87, record: BaseStorage | None = None,
    finetune: FineTuneConfig | None = None, pace: float = 1.0, untouched: float | None = None,
    driver: str | None = None, **limits: Any,
) -> Session:  # fmt: skip
    """A night whose rules have had their short fine-tune: 50 s for one, as much as an hour has seventy-two of.
    ``untouched`` is the accuracy of rules that cut nothing before any fine-tune."""
    kept: Any = {"min_accuracy": least, **limits}
    finetune = finetune or FineTuneConfig()
    config = RunConfig(task="t", base=None, out=folder, limits=Limits(**kept), finetune=finetune)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("{task: t}")
    clock = Clock(Times().wall() + 3600 * hours)
    session = Session(config=config, folder=RunFolder(folder), clock=clock, watch=lambda session: None)
    session.state |= {
        "state": "running", "phase": "search",
        "given": {"search": {"accuracy": 0.97}, "test": {"accuracy": 0.97, "accuracy_se": 0.003}},
        "rungs": {"short_steps": SHORT, "long_steps": 2 * EPOCH, "finalists": 8, "epoch_steps": EPOCH},
        "reference": {"accuracy": 0.8, "latency_ms": 1.0, "size_bytes": 1e6},
    }  # fmt: skip
    store, runner = Store(record or InMemoryStorage(), driver=driver), Instant(lambda job: outcome(job, pace))
    session.provide(
        store=store, jobs=Jobs(runner, 64, expected_seconds=lambda job: 1.0, tell=print),
        prepared=Prepared(task=TASK, anatomy=SPACE.anatomy, space=SPACE, train_items=64 * EPOCH, step_ms=140),
        profile=SimpleNamespace(remote=False, seconds_each=1.0),
    )  # fmt: skip
    for name, policy in RULES.items() if not store.trials() else ():
        finish(session, policy, "baseline", name, latency_ms=0.5, untouched=None if policy.prune else untouched)
    return session


def finish(
    session: Session, policy: Policy, role: str, name: str | None, latency_ms: float, untouched: float | None = None
) -> None:
    """A trial that has had its short fine-tune."""
    store = session.store
    enqueue(session, policy, role, name)
    trial = store.study.ask()
    store.begin(trial, policy, 0.0)
    if store.driver is not None:
        store.note(trial.number, driver=store.driver)
    latency = {"latency_ms": latency_ms, "low_ms": 0.8 * latency_ms, "high_ms": 1.2 * latency_ms, "measured": False}
    store.note(trial.number, predicted=latency, size_bytes=80_000, macs=1, params=1)
    for rung, seconds in (("bn", 1.0), ("short", 50.0)):
        found = untouched if rung == "bn" and untouched is not None else accuracy(policy, rung)
        store.note_quality(trial.number, Quality(rung=rung, split="search", accuracy=found,
                                                 accuracy_se=0.003, samples=5000, seconds=seconds))  # fmt: skip
    store.finish(trial.number, TrialState.COMPLETE, finished=1.0)


def searched(folder: Path, *, hours: float, finalists: int | None) -> int:
    """How many of six trials, each the faster the less accurate, are trained long where one is planned."""
    session = judged(folder, hours=hours, least=None, finetune=FineTuneConfig(finalists=finalists))
    session.state["rungs"] |= {"finalists": finalists or 1, "long_sized": True}
    group = SPACE.anatomy.groups[0].name
    for k in range(6):
        policy = Policy(model=SPACE.anatomy.digest, prune={group: 0.1 * (k + 1)})
        finish(session, policy, "search", None, latency_ms=0.4 - 0.05 * k)
    train_long(session)
    return sum(name is None for name in trained(session))


def chosen(folder: Path, *, least: float, cuts: list[float]) -> list[float]:
    """The cuts of two finalists, of trials that are the faster the more they cut; the rules are trained before."""
    return chosen_of(judged(folder, least=least), cuts)


def chosen_of(session: Session, cuts: list[float]) -> list[float]:
    train_rules(session)
    session.state["rungs"] |= {"finalists": 2, "long_sized": True}
    group = SPACE.anatomy.groups[0].name
    for cut in cuts:
        policy = Policy(model=SPACE.anatomy.digest, prune={group: cut})
        finish(session, policy, "search", None, latency_ms=0.5 - 0.5 * cut)
    return [t.policy["prune"][group] for t in choose(session)]


@pytest.mark.parametrize(("least", "fastest"), [(0.92, 0.25), (0.86, 0.5)])
def test_the_first_finalist_is_the_fastest_that_is_likely_to_keep_its_accuracy(
    tmp_path: Path, least: float, fastest: float
) -> None:
    """Half of the channels leave 83 % after the short fine-tune and 88 % after the long one."""
    assert chosen(tmp_path, least=least, cuts=[0.25, 0.5, 0.75])[0] == fastest


def test_steps_of_the_walk_that_no_fine_tune_would_bring_within_the_limit_are_not_taken(tmp_path: Path) -> None:
    """Of the error that is allowed, 10 points, twice may be left: 80 % of the channels gone leave 62 %."""
    steps = [uniform(SPACE.anatomy, width=width, bits=INT8) for width in (0.7, 0.2)]

    assert reachable(judged(tmp_path / "limited"), steps) == steps[:1]
    assert reachable(judged(tmp_path / "free", least=None), steps) == steps


def test_where_every_rule_failed_no_step_of_the_walk_is_known_to_be_out_of_reach(tmp_path: Path) -> None:
    steps = [uniform(SPACE.anatomy, width=width, bits=INT8) for width in (0.7, 0.2)]
    session = judged(tmp_path)
    session.provide(store=Store(InMemoryStorage()))
    for name, policy in RULES.items():
        enqueue(session, policy, "baseline", name)
        trial = session.store.ask()
        session.store.begin(trial, policy, 0.0)
        session.store.finish(trial.number, TrialState.FAILED, finished=1.0, reason="it has no price")

    assert reachable(session, steps) == steps


@pytest.mark.parametrize(("own", "steps", "rate"), [(0.02, 4 * SHORT, 2.0), (0.08, 4 * SHORT, 1.25), (0.02, SHORT, 1),
                                                    (0.4, 4 * SHORT, 1)])  # fmt: skip
def test_a_longer_fine_tune_learns_at_a_higher_rate_up_to_the_highest_of_the_space(
    tmp_path: Path, own: float, steps: int, rate: float
) -> None:
    session = judged(tmp_path, least=None)
    session.state["rungs"] |= {"long_steps": steps, "finalists": 1, "long_sized": True}
    policy = Policy(model=SPACE.anatomy.digest, prune={SPACE.anatomy.groups[0].name: 0.5},
                    finetune=FineTune(learning_rate=own))  # fmt: skip
    finish(session, policy, "search", None, latency_ms=0.1)
    train_long(session)

    runner = session.runner
    assert isinstance(runner, Instant)
    [job] = [
        job for _, job in runner.asked if job.policy.finetune.learning_rate == own and job.policy.prune == policy.prune
    ]
    assert job.rate == pytest.approx(rate)


def test_a_trial_that_a_rule_dominates_is_no_finalist(tmp_path: Path) -> None:
    """Rules take 0.5 ms, the uncompressed one among them; of four trials the first is slower and no more accurate."""
    session = judged(tmp_path, least=None)
    train_rules(session)
    session.state["rungs"] |= {"finalists": 4, "long_sized": True}
    group = SPACE.anatomy.groups[0].name
    for cut, latency_ms in ((0.125, 0.6), (0.25, 0.4), (0.5, 0.3), (0.625, 0.2)):
        policy = Policy(model=SPACE.anatomy.digest, prune={group: cut})
        finish(session, policy, "search", None, latency_ms=latency_ms)

    chosen = {t.policy["prune"][group] for t in choose(session)}
    assert chosen >= {0.25, 0.625}
    assert 0.125 not in chosen


def trained(session: Session) -> list[str | None]:
    runner = session.runner
    assert isinstance(runner, Instant)
    return [session.store.trial(number).name for number, _ in runner.asked]


def trained_steps(session: Session) -> list[tuple[str | None, int]]:
    runner = session.runner
    assert isinstance(runner, Instant)
    return [(session.store.trial(number).name, job.steps) for number, job in runner.asked]


def test_a_rule_that_is_bound_to_end_below_the_limit_is_not_trained_long_and_says_why(tmp_path: Path) -> None:
    session = judged(tmp_path)

    train_rules(session)

    gone = [t for t in session.store.trials() if t.struck_out]
    assert {t.name for t in gone} >= {"uniform 25% fp32", "uniform 25% INT8"}
    assert {t.name for t in gone} | set(trained(session)) == set(RULES)
    assert not {t.name for t in gone} & set(trained(session))
    for rule in gone:
        said = rule.struck_out or ""
        assert said.startswith("expected to end below min_accuracy 0.87: ")
        expected, _, spread = said.rpartition(": ")[2].partition(" ± ")
        assert float(expected) + float(spread) < 0.871  # both are rounded
        assert rule.quality is not None
        assert rule.quality.rung == "short"  # it stays on record with what it showed
    told = {d["decision"] for d in read_run(tmp_path).decisions}
    assert told >= {f"no long fine-tune of {t.name}" for t in gone}


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_latency_ms": 0.39}, "takes at least 0.4 ms, above max_latency_ms 0.39"),
        ({"max_size_bytes": 79_999}, "has 80000 bytes, above max_size_bytes 79999"),
    ],
)
def test_rules_that_are_slower_or_larger_than_allowed_leave_their_time_to_others(
    tmp_path: Path, limits: dict[str, Any], reason: str
) -> None:
    """Each is accurate enough; the uncompressed network is what all are compared with."""
    session = judged(tmp_path / "limited", least=None, hours=1.0, **limits)
    free = judged(tmp_path / "free", least=None, hours=1.0, **{name: value + 1 for name, value in limits.items()})

    train_rules(session)
    train_rules(free)

    assert trained(session) == ["uncompressed"]
    assert {t.struck_out for t in session.store.trials() if t.name != "uncompressed"} == {reason}
    assert set(trained(free)) == set(RULES)
    assert session.state["rungs"]["long_steps"] > 1.2 * free.state["rungs"]["long_steps"]


def test_rules_within_the_limits_are_trained_the_most_promising_first(tmp_path: Path) -> None:
    session = judged(tmp_path)
    train_rules(session)
    assert trained(session)[:4] == ["uncompressed", "uniform INT8", "uniform 75% fp32", "uniform 75% INT8"]


def rates_of(folder: Path, kind: str, below: float) -> list[float]:
    """At which rates a rule is trained long that fails with ``kind`` at this one and above it."""
    folder.mkdir()
    session, policy = judged(folder, least=None), RULES["uniform 75% INT8"]

    def failing(job: Job) -> Outcome | Failure:
        return Failure(kind, "nan") if job.policy == policy and job.rate >= below else outcome(job, 1.0)

    runner = Instant(failing)
    session.provide(jobs=Jobs(runner, 64, expected_seconds=lambda job: 1.0, tell=print))
    for _ in range(2):
        train_rules(session)
    assert set(trained(session)) == set(RULES)
    return [job.rate for _, job in runner.asked if job.policy == policy]


def test_a_long_fine_tune_that_diverged_is_tried_once_more_at_the_policy_s_own_rate(tmp_path: Path) -> None:
    """Anything else would only fail again."""
    high = rates_of(tmp_path / "a", "ValueError", below=0.0)
    assert len(high) == 1
    assert high[0] > 1
    assert rates_of(tmp_path / "b", DIVERGED, below=1.01) == [*high, 1.0]
    assert rates_of(tmp_path / "c", DIVERGED, below=0.0) == [*high, 1.0]
    known = read_run(tmp_path / "c").state  # what a resumed night goes by
    assert len(known["long_failed"]) == 1
    assert known["own_rate"] == known["long_failed"]


def test_without_a_limit_on_accuracy_every_rule_is_trained(tmp_path: Path) -> None:
    session = judged(tmp_path, least=None)
    train_rules(session)
    assert set(trained(session)) == set(RULES)
    assert not any(t.struck_out for t in session.store.trials())


@pytest.mark.parametrize(("sampler", "finalists", "taught"), [
    ("nightpress", None, [0.8, 0.78]), ("nightpress", 3, []), ("random", None, []),
])  # fmt: skip
def test_seeds_harsher_than_every_rule_teach_what_a_long_fine_tune_makes_of_such_networks(
    tmp_path: Path, sampler: str, finalists: int | None, taught: list[float]
) -> None:
    session = judged(tmp_path, least=None, finetune=FineTuneConfig(finalists=finalists))
    session.provide(sampler=make_sampler(sampler, 0, 0, SPACE, lambda choices: np.ones((len(choices), 2))))
    group = SPACE.anatomy.groups[0].name
    for cut in (0.3, 0.76, 0.78, 0.8):  # rules cut three quarters at most
        finish(session, Policy(model=SPACE.anatomy.digest, prune={group: cut}), "seed", None, latency_ms=0.1)
    train_rules(session)
    rules = len(session.store.longs())

    assert train_lessons(session, 0.0) == len(taught)

    cuts = [policy_of(session.store.trial(number)).prune[group] for number in list(session.store.longs())[rules:]]
    assert sorted(cuts, reverse=True) == taught


def test_a_resumed_night_neither_trains_nor_judges_a_rule_twice(tmp_path: Path) -> None:
    record = InMemoryStorage()
    session = judged(tmp_path, record=record)
    train_rules(session)
    again = judged(tmp_path, record=record)
    again.state["rungs"] = session.state["rungs"]
    decisions = len(read_run(tmp_path).decisions)

    train_rules(again)

    assert trained(again) == []
    assert len(read_run(tmp_path).decisions) == decisions
    assert [t.struck_out for t in again.store.trials()] == [t.struck_out for t in session.store.trials()]


def test_long_fine_tunes_have_four_epochs_where_fewer_finalists_make_room_for_them(tmp_path: Path) -> None:
    rungs = sized(tmp_path, hours=3.5)
    assert rungs["long_steps"] >= 4 * EPOCH
    assert 3 <= rungs["finalists"] < 8


def test_where_four_epochs_do_not_fit_three_finalists_share_more_of_the_time(tmp_path: Path) -> None:
    rungs, more = sized(tmp_path, hours=1.0), sized(tmp_path, hours=1.5)
    assert rungs["finalists"] == more["finalists"] == 3
    assert rungs["long_steps"] < more["long_steps"] < 4 * EPOCH


def test_hopeless_rules_leave_their_time_to_longer_fine_tunes(tmp_path: Path) -> None:
    assert sized(tmp_path, hours=1.0)["long_steps"] > 1.2 * sized(tmp_path, hours=1.0, least=None)["long_steps"]


def test_a_driver_whose_rules_are_all_out_of_reach_plans_its_finalists_all_the_same(tmp_path: Path) -> None:
    """One that joins a search late: another has taken the uncompressed network and the gentle rules."""
    session = judged(tmp_path, least=0.97)
    session.provide(store=Store(InMemoryStorage()))
    finish(session, RULES["uniform 25% INT8"], "baseline", "uniform 25% INT8", latency_ms=0.5)

    size_long(session)

    assert 4 * EPOCH <= session.state["rungs"]["long_steps"] <= 20 * EPOCH


def test_what_only_loses_by_a_fine_tune_that_is_too_short_has_none(tmp_path: Path) -> None:
    """The given network has 97 %, and so have its integers; 96.8 % are left after the short fine-tune."""
    session, others = judged(tmp_path / "kept", hours=1.0, untouched=0.976), judged(tmp_path / "lost", hours=1.0)
    for night in (session, others):
        train_rules(night)

    assert {name for name, steps in trained_steps(session) if steps == 0} == {"uncompressed", "uniform INT8"}
    assert all(steps for _, steps in trained_steps(others))
    assert session.state["rungs"]["long_steps"] > 1.2 * others.state["rungs"]["long_steps"]
    told = [d["decision"] for d in read_run(tmp_path / "kept").decisions]
    assert "no fine-tune of uncompressed, uniform INT8" in told


@pytest.mark.parametrize("hours", [2.5, 8.0])
def test_where_there_is_time_for_a_whole_fine_tune_everything_is_trained(tmp_path: Path, hours: float) -> None:
    """Also where that takes the larger share of the time."""
    session = judged(tmp_path, hours=hours, untouched=0.976)
    train_rules(session)
    assert all(steps for _, steps in trained_steps(session))


@pytest.mark.parametrize("given", [{"long_steps": 123}, {"finalists": 5}, {"long_steps": 123, "finalists": 5}])
def test_the_config_fixes_the_length_and_the_number_of_finalists(tmp_path: Path, given: dict[str, int]) -> None:
    finetune = FineTuneConfig(**given)
    session = judged(tmp_path, hours=1.0, finetune=finetune)
    session.state["rungs"] |= given
    train_rules(session)
    assert session.state["rungs"] | given == session.state["rungs"]


def test_drivers_of_a_study_train_their_finalists_equally_long(tmp_path: Path) -> None:
    """The second one joins late, and the rules are those of the first."""
    record = InMemoryStorage()
    one = judged(tmp_path / "one", record=record, driver="one")
    size_long(one)
    other = judged(tmp_path / "other", hours=0.7, record=record, driver="other")
    size_long(other)
    alone = judged(tmp_path / "alone", hours=0.7)
    size_long(alone)

    lengths = [session.state["rungs"]["long_steps"] for session in (one, other, alone)]
    assert lengths[0] == lengths[1] != lengths[2]
    other.update()
    assert [d["reason"] for d in read_run(tmp_path / "other").decisions][-1].startswith("as the study has it")


@pytest.mark.parametrize(("steps", "rate"), [(4 * SHORT, 2.0), (SHORT // 2, 1.0)])
def test_a_length_in_the_config_is_told_once_with_what_it_does_to_learning_rates(
    tmp_path: Path, steps: int, rate: float
) -> None:
    session = judged(tmp_path, finetune=FineTuneConfig(long_steps=steps))
    session.state["rungs"] |= {"long_steps": steps}
    for _ in range(2):
        size_long(session)
    [told] = [d for d in read_run(tmp_path).decisions if d["decision"] == f"long fine-tunes of {steps} steps"]
    assert told["reason"] == "as the config has it"
    assert told["evidence"] == {"learning_rate_times": rate}


def test_before_its_first_trial_the_search_keeps_for_the_finalists_what_they_will_take(tmp_path: Path) -> None:
    """Their usual share is 504 s of half an hour; two of 400 steps take 60 s each, 77 s with simulated bits."""
    assert 1.15 * 2 * 60 <= planned_seconds(tmp_path, pace=1.0) <= 1.15 * 2 * 77


def test_the_finalists_are_planned_by_what_the_long_fine_tunes_of_the_rules_took(tmp_path: Path) -> None:
    assert planned_seconds(tmp_path / "fast", pace=0.5) == pytest.approx(0.5 * planned_seconds(tmp_path / "as", pace=1))


@pytest.mark.parametrize(("pace", "least", "most"), [(0.3, 6, 8), (1.0, 3, 4)])
def test_finalists_that_were_given_up_come_back_where_the_usual_share_pays_for_them(
    tmp_path: Path, pace: float, least: int, most: int
) -> None:
    session = judged(tmp_path, hours=1.0, pace=pace)
    train_rules(session)
    assert session.state["rungs"]["finalists"] == 3

    plan_finalists(session)

    assert least <= session.state["rungs"]["finalists"] <= most


@pytest.mark.parametrize(("cuts", "planned"), [([0.25], 2), ([0.25, 0.5], 4)])
def test_no_more_finalists_are_planned_for_than_twice_those_that_were_found(
    tmp_path: Path, cuts: list[float], planned: int
) -> None:
    session = judged(tmp_path, hours=8, least=None)
    train_rules(session)
    session.state["rungs"] |= {"finalists": 8, "long_steps": 400, "long_sized": True}
    for cut in cuts:
        policy = Policy(model=SPACE.anatomy.digest, prune={SPACE.anatomy.groups[0].name: cut})
        finish(session, policy, "search", None, latency_ms=0.4 - 0.4 * cut)
    plan_finalists(session)

    told = [d["reason"] for d in read_run(tmp_path).decisions if d["decision"].startswith("planned anew: finalists")]
    assert told[-1].startswith(f"{planned} long fine-tunes need between ")


def test_a_number_of_finalists_in_the_config_does_not_grow(tmp_path: Path) -> None:
    session = judged(tmp_path, hours=1.0, finetune=FineTuneConfig(finalists=2), pace=0.3)
    session.state["rungs"] |= {"finalists": 2}
    train_rules(session)
    plan_finalists(session)
    assert session.state["rungs"]["finalists"] == 2


def planned_seconds(folder: Path, pace: float) -> float:
    """For two finalists of 400 steps, in a night of half an hour before its first trial."""
    session = judged(folder, hours=0.5, least=None, finetune=FineTuneConfig(finalists=2, long_steps=400), pace=pace)
    session.state["rungs"] |= {"finalists": 2, "long_steps": 400}
    train_rules(session)
    plan_finalists(session)
    return session.clock.share_seconds("finalists")


def test_what_looks_cost_is_not_taken_for_training(tmp_path: Path) -> None:
    """Of 50 s, each of three looks took one as the lowest rung does: 46 s for 350 steps, not 49."""
    session = judged(tmp_path)
    plain = session.store.trials()[0]
    looked = replace(plain, looks=((44, 0.5), (88, 0.6), (175, 0.7)))

    assert long_costs(session, [plain, looked])[:, 1] == pytest.approx([49 / SHORT, 46 / SHORT])


def test_time_that_is_left_goes_to_further_finalists(tmp_path: Path) -> None:
    count = searched(tmp_path, hours=4.0, finalists=None)
    assert count > 1
    told = [d["decision"] for d in read_run(tmp_path).decisions]
    assert sum(text.startswith("also trials ") for text in told) == count - 1  # one worker, one at a time


def test_a_number_of_finalists_in_the_config_is_kept(tmp_path: Path) -> None:
    assert searched(tmp_path, hours=4.0, finalists=2) == 2


def test_where_no_time_is_left_no_finalist_is_added(tmp_path: Path) -> None:
    assert searched(tmp_path, hours=0.05, finalists=None) == 0


def sized(folder: Path, **keys: float | None) -> dict[str, int]:
    session = judged(folder, **keys)  # type: ignore[arg-type]
    train_rules(session)
    for number in range(len(RULES)):
        outcome_file(session, number).unlink(missing_ok=True)
    return session.state["rungs"]
