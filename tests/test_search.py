"""What the search decides: samplers, the stopping rule, seeds, the record of trials."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage

from nightpress.evaluators.latency.units import NO_LAYER, Worker
from nightpress.search.costs import ManyCosts
from nightpress.search.pareto import hypervolume, losses
from nightpress.search.policy_sampler import TrialSuggest, distributions
from nightpress.search.proposals import (
    Sensitivity,
    baselines,
    greedy_rules,
    greedy_walk,
    pointless,
    probes,
    rule_count,
    sensitivity_of,
    walk_seeds,
)
from nightpress.search.records import Latency, Quality, TrialState
from nightpress.search.sampler import NightpressSampler, make_sampler
from nightpress.search.store import Store, open_storage, policy_of, read_study
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Choices
from nightpress.spaces.policy import FP32, INT8, Policy, digest
from nightpress.spaces.space import Space
from strategies import toy_anatomy


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))


def costs_of(anatomy: Anatomy):
    """A made-up device: time and bytes grow with work, and integers are four times cheaper."""

    def costs(policy: Policy) -> tuple[float, int]:
        planned = plan(anatomy, policy)
        time = sum(op.macs / (4 if op.int8 else 1) for op in planned.ops) + 1
        size = sum(op.weight_count * (1 if op.bits.weights < 32 else 4) for op in planned.ops) + 1
        return float(time), int(size)

    return costs


def batch_costs_of(anatomy: Anatomy) -> ManyCosts:
    """The same of a batch; as :func:`costs_of`, where no layer is grouped."""
    worker, ops = Worker(anatomy), anatomy.ops
    places = np.array([math.prod(ops[i].shape) / ops[i].shape[ops[i].channel_axis] for i in worker.layers])
    order = [worker.planner.layer_of[int(i)] for i in worker.layers]

    def costs(choices: Choices) -> NDArray[np.float64]:
        [state] = worker.states(choices, len(choices))
        there = state.weights * (state.layer_codes != NO_LAYER)
        bits = choices.bits.T[order]
        int8, small = (np.array(kind)[bits] for kind in
                       zip(*((pair.int8, pair.weights < 32) for pair in choices.pairs), strict=True))  # fmt: skip
        time = (there * places[:, None] / np.where(int8, 4, 1)).sum(axis=0) + 1
        return np.column_stack([time, (there * np.where(small, 1, 4)).sum(axis=0) + 1])

    return costs


def accuracy_of(policy: Policy) -> float:
    """A made-up truth: pruning costs, the more the harsher, removed blocks cost, and integers a little."""
    pruned = sum(0.1 * r**2 for r in policy.prune.values())
    return 0.9 - pruned - 0.1 * len(policy.removed_blocks) - 0.002 * len(policy.bits)


def quality(accuracy: float, rung: str = "short") -> Quality:
    return Quality(rung=rung, split="search", accuracy=accuracy, accuracy_se=0.01, samples=100, seconds=0.1)


def run_trials(store: Store, space: Space, count: int) -> None:
    """What the driver does with a trial, without the training."""
    costs = costs_of(space.anatomy)
    for _ in range(count):
        trial = store.study.ask()
        policy = space.sample(TrialSuggest(trial))
        latency, size = costs(policy)
        store.begin(trial, policy, 0.0)
        store.note(
            trial.number, size_bytes=size,
            predicted={"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False}
        )  # fmt: skip
        store.note_quality(trial.number, quality(accuracy_of(policy)))
        store.finish(trial.number, TrialState.COMPLETE, finished=1.0)


def made_store(path: Path, space: Space, name: str, seed: int = 0) -> Store:
    storage = open_storage(path, None)
    sampler = make_sampler(name, seed, 0, space, batch_costs_of(space.anatomy))
    if isinstance(sampler, NightpressSampler):
        latency, size = costs_of(space.anatomy)(Policy(model=space.anatomy.digest))
        sampler.reference = (-0.5, latency, float(size))
    return Store(storage, sampler)


@pytest.mark.parametrize("name", ["nightpress", "nsga2", "nsga3", "tpe", "random"])
def test_every_sampler_proposes_policies_of_the_space_and_is_recorded(tmp_path: Path, space: Space, name: str) -> None:
    store = made_store(tmp_path, space, name)

    run_trials(store, space, 12)

    trials = store.trials()
    assert [t.number for t in trials] == list(range(12))
    assert all(space.contains(policy_of(t)) for t in trials)
    assert all(t.state is TrialState.COMPLETE and t.quality and t.latency for t in trials)


def test_the_same_seed_gives_the_same_trials(tmp_path: Path, space: Space) -> None:
    digests = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        store = made_store(folder, space, "nightpress", seed=3)
        run_trials(store, space, 10)
        digests.append([t.digest for t in store.trials()])

    assert digests[0] == digests[1]


def proposed(space: Space, name: str, seed: int, count: int = 12) -> list[str]:
    """Digests of what a sampler proposes that is made anew for each trial, as a night does with Optuna's."""
    costs, found = batch_costs_of(space.anatomy), list[str]()
    store = Store(InMemoryStorage(), sampler_at=lambda trials: make_sampler(name, seed, trials, space, costs))
    for _ in range(count):
        trial = store.ask()
        found.append(digest(space.sample(TrialSuggest(trial))))
        store.drop(trial)
    return found


@pytest.mark.parametrize("name", ["random", "nsga2", "nsga3", "tpe"])
def test_neighbouring_seeds_share_no_proposal(space: Space, name: str) -> None:
    assert not set(proposed(space, name, 0)) & set(proposed(space, name, 1))


@pytest.mark.parametrize("name", ["nightpress", "netadapt", "random", "tpe"])
def test_a_seed_may_have_as_many_bits_as_optuna_takes(space: Space, name: str) -> None:
    found = proposed(space, name, 2**32 - 1, 3)

    assert found == proposed(space, name, 2**32 - 1, 3)
    assert found != proposed(space, name, 2**32 - 2, 3) or name == "netadapt"  # its first round is the same for all


def test_our_sampler_covers_more_than_random_choice_at_equal_trials(tmp_path: Path, space: Space) -> None:
    covered = {}
    for name in ("nightpress", "random"):
        folder = tmp_path / name
        folder.mkdir()
        store = made_store(folder, space, name)
        run_trials(store, space, 18)
        points = [
            losses(t.quality.accuracy, t.latency.latency_ms, t.size_bytes)
            for t in store.trials()
            if t.quality and t.latency and t.size_bytes
        ]
        latency, size = costs_of(space.anatomy)(Policy(model=space.anatomy.digest))
        covered[name] = hypervolume(points, (-0.5, latency, float(size)))

    assert covered["nightpress"] > covered["random"]


def test_unknown_is_never_told_as_a_number(tmp_path: Path, space: Space) -> None:
    store = made_store(tmp_path, space, "random")
    for state in (TrialState.FAILED, TrialState.INFEASIBLE):
        trial = store.study.ask()
        store.begin(trial, space.sample(TrialSuggest(trial)), 0.0)
        store.finish(trial.number, state, finished=1.0, reason="because")

    told = store.study.get_trials(deepcopy=False)
    assert [t.state for t in told] == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.PRUNED]
    assert all(t.values is None for t in told)
    assert [t.reason for t in store.trials()] == ["because", "because"]


def test_a_trial_whose_state_is_on_record_is_told_after_a_kill_and_others_are_handed_back(
    tmp_path: Path, space: Space
) -> None:
    store = made_store(tmp_path, space, "random")
    finished, running, asked = (store.study.ask() for _ in range(3))
    for trial in (finished, running):
        store.begin(trial, space.sample(TrialSuggest(trial)), 0.0)
    store.note_quality(finished.number, quality(0.5))
    store.note(
        finished.number, size_bytes=10, state="COMPLETE", finished=1.0,
        predicted={"latency_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "measured": False},
    )  # fmt: skip

    later = made_store(tmp_path, space, "random")
    unfinished = later.repair()

    assert [t.number for t in unfinished] == [running.number]
    states = {t.number: t.state.name for t in store.study.get_trials(deepcopy=False)}
    assert states == {finished.number: "COMPLETE", running.number: "RUNNING", asked.number: "RUNNING"}
    assert later.ask().number == asked.number  # it was asked for and not begun: it is the next
    assert later.ask().number == asked.number + 1


def test_trials_read_back_from_the_folder_equal_those_written(tmp_path: Path, space: Space) -> None:
    store = made_store(tmp_path, space, "random")
    run_trials(store, space, 3)
    store.remeasure(
        1, Latency(latency_ms=2.0, low_ms=1.9, high_ms=2.1, measured=True, repeat_error=0.05, reference_ms=4.0)
    )
    store.approve({"trial": 1, "who": "me"})

    trials, approvals, unreadable = read_study(tmp_path, None)

    assert trials == store.trials()
    assert unreadable == ()
    assert trials[1].latency is not None
    assert trials[1].latency.measured
    assert trials[1].latency.ratio == 2.0
    assert approvals == ({"trial": 1, "who": "me"},)


def test_a_storage_that_does_not_answer_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"search.storage: postgresql://someone@localhost:1/none does not answer"
    ) as caught:
        open_storage(tmp_path, "postgresql://someone:hunter2@localhost:1/none")
    assert "hunter2" not in str(caught.value)


def test_the_greedy_walk_saves_more_at_each_step_and_stays_in_the_space(space: Space) -> None:
    costs = costs_of(space.anatomy)
    harm, many = Sensitivity(groups={g.name: 1.0 for g in space.anatomy.groups}), batch_costs_of(space.anatomy)
    walk = greedy_walk(space, harm, many, 6)

    assert 2 <= len(walk) <= 6
    assert all(space.contains(policy) for policy in walk)
    products = [np.prod(costs(policy)) for policy in walk]
    assert products == sorted(products, reverse=True)
    assert len({digest(policy) for policy in walk}) == len(walk)


def test_a_search_begins_with_the_harshest_steps_of_the_greedy_walk(space: Space) -> None:
    costs = costs_of(space.anatomy)
    walk = greedy_walk(space, Sensitivity(), batch_costs_of(space.anatomy), 1000)

    seeds = walk_seeds(walk, 4)

    assert seeds[0] == walk[-1]
    assert seeds[-1] == walk[0]
    products = [np.prod(costs(policy)) for policy in seeds]
    assert products == sorted(products)
    assert len(seeds) == 4


def test_the_greedy_walk_cuts_the_harmless_group_first(space: Space) -> None:
    first, *others = [g.name for g in space.anatomy.groups]
    harm = Sensitivity(
        groups={first: 1e-6, **dict.fromkeys(others, 100.0)},
        blocks={b.name: 100.0 for b in space.anatomy.blocks},
    )

    step = greedy_walk(space, harm, batch_costs_of(space.anatomy), 1000)[0]

    assert set(step.prune) == {first}
    assert step.removed_blocks == ()


def test_probes_change_one_thing_each(space: Space) -> None:
    for (kind, name, _), policy in probes(space).items():
        changed = [*policy.prune, *policy.bits, *policy.removed_blocks]
        assert changed == [name]
        assert kind in {"group", "block", "bits"}


def test_what_could_not_be_probed_counts_as_the_worst() -> None:
    found = sensitivity_of({("group", "a", ""): 0.1, ("group", "b", ""): float("nan"), ("block", "c", ""): 2.0})

    assert found.groups == {"a": 0.1, "b": 2.0}
    assert found.damage(Policy(model="m", prune={"a": 0.5}, removed_blocks=("c",))) == pytest.approx(2.1)


def test_baselines_are_the_uncompressed_model_and_uniform_rules(space: Space) -> None:
    rules = baselines(space.anatomy, distill=True)

    assert list(rules)[:2] == ["uncompressed", "uniform INT8"]
    assert len(rules) == 8
    assert len({digest(p) for p in rules.values()}) == 8
    assert rules["uncompressed"].distill.method == "none"
    assert not rules["uncompressed"].prune
    assert all(pair == INT8 for pair in rules["uniform 50% INT8"].bits.values())


def test_a_night_plans_for_all_rules_that_it_trains(space: Space) -> None:
    floats = replace(space, bit_choices=(FP32,))
    scores = {g.name: [1.0] * g.channels for g in space.anatomy.groups}
    rules = baselines(space.anatomy, distill=True, scores=scores)
    walk = greedy_walk(space, Sensitivity(), batch_costs_of(space.anatomy), 1000)
    trained = {name for name in rules if name not in pointless(rules, costs_of(space.anatomy))}

    assert rule_count(space) == len(trained | set(greedy_rules(walk, rules, costs_of(space.anatomy))))
    assert rule_count(floats) == rule_count(space) + 3


def test_every_choice_of_the_space_is_visible_to_optuna(space: Space) -> None:
    names = distributions(space)

    assert len(names) == space.dimensions
    assert {n.split(":")[0] for n in names if ":" in n} == {"keep", "bits", "block"}
