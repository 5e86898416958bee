"""What proposals rest on: rows, quick costs, the surrogate of accuracies, the expected gain, the stopping rule."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nightpress.search.breeding import MOST_ALIKE, crowded, population
from nightpress.search.config import Limits
from nightpress.search.costs import trial_effort
from nightpress.search.encoding import Encoder
from nightpress.search.gain import expected_gain, target
from nightpress.search.netadapt import NetAdaptSampler
from nightpress.search.pareto import hypervolume
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.proposals import (
    Sensitivity,
    baselines,
    global_magnitude,
    greedy_rules,
    greedy_walk,
    own_policies,
    pointless,
)
from nightpress.search.records import Latency, Quality, TrialRecord, TrialState
from nightpress.search.sampler import NightpressSampler
from nightpress.search.stopping import Judge, spared, upper_bound, wrongly
from nightpress.search.store import Store, open_storage, policy_of
from nightpress.search.surrogate import RUNGS, Describer, Kernel, Observation, Scale, Surrogate
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Choices
from nightpress.spaces.policy import FP32, INT8, FineTune, Policy, digest, policy_to_dict, policy_to_json
from nightpress.spaces.space import Space
from strategies import toy_anatomy
from test_search import accuracy_of, batch_costs_of, costs_of, made_store, run_trials

BN, PART, SHORT, LONG = range(len(RUNGS))


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))


@pytest.fixture(scope="module")
def encoder(space: Space) -> Encoder:
    return Encoder(space)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_rows_stand_for_policies_of_the_space_and_come_back(encoder: Encoder, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = encoder.random(3, generator)
    rows = np.vstack([rows, encoder.children(rows, 3, generator)])

    policies = [encoder.policy(row) for row in rows]

    assert all(encoder.space.contains(policy) for policy in policies)
    assert [encoder.policy(encoder.row(policy)) for policy in policies] == policies


def test_choices_in_removed_blocks_make_one_row(encoder: Encoder) -> None:
    rows = np.repeat(encoder.random(1, np.random.default_rng(0)), 2, axis=0)
    rows[:, encoder.block] = 1
    inside = encoder.bits[encoder.block_layers.sum(axis=0) > 0]
    rows[0, inside], rows[1, inside] = 0, 1

    tidied = encoder.tidy(rows)

    assert len(inside)
    assert (tidied[0] == tidied[1]).all()


def test_work_of_rows_is_that_of_their_plans(encoder: Encoder) -> None:
    rows = encoder.random(20, np.random.default_rng(0))
    macs, weights = encoder.shapes.totals(rows)
    plans = [plan(encoder.space.anatomy, encoder.policy(row)) for row in rows]

    assert macs == pytest.approx([p.macs for p in plans])
    assert weights == pytest.approx([sum(op.weight_count for op in p.ops) for p in plans])


def test_a_batch_of_rows_costs_what_its_policies_do(encoder: Encoder) -> None:
    exact, rows = costs_of(encoder.space.anatomy), encoder.random(50, np.random.default_rng(9))

    found = batch_costs_of(encoder.space.anatomy)(encoder.choices(rows))

    np.testing.assert_allclose(found, [exact(encoder.policy(row)) for row in rows])


def test_a_policy_whose_costs_cannot_be_said_is_not_proposed(tmp_path: Path, space: Space) -> None:
    store = made_store(tmp_path, space, "nightpress")
    run_trials(store, space, 8)
    sampler, known = store.study.sampler, batch_costs_of(space.anatomy)
    assert isinstance(sampler, NightpressSampler)
    first = space.anatomy.groups[0].name

    def costs(choices: Choices) -> NDArray[np.float64]:
        """Nothing can be said where the first group keeps all its channels."""
        found = known(choices)
        found[choices.kept[:, 0] == space.anatomy.groups[0].channels, 0] = np.nan
        return found

    sampler.costs = costs
    assert all(first in policy_of(trial).prune for trial in proposals(store, space, 3))


def test_variants_of_what_was_tried_do_not_crowd_out_what_was_not(tmp_path: Path, space: Space) -> None:
    """Of the best network at hand many fine-tunes were tried, all alike. Of four hundred more of them more is expected
    than of some other networks, but nothing is to be found out there."""
    store, encoder = made_store(tmp_path, space, "nightpress"), Encoder(space)
    run_trials(store, space, 10)
    known = encoder.policy(max(encoder.random(500, np.random.default_rng(0)), key=lambda row: _covers(encoder, row)))
    rates = np.geomspace(0.02, 0.1, 441)
    variants = [replace(known, finetune=FineTune(learning_rate=round(float(rate), 6))) for rate in rates]
    for tried in variants[::11]:
        store.enqueue(space.params(tried), "search", None, policy_to_dict(tried))
    run_trials(store, space, len(variants[::11]))
    sampler = store.study.sampler
    assert isinstance(sampler, NightpressSampler)
    assert sampler.reference is not None
    sampler.experience.read(store.study)
    surrogate = sampler.surrogate()
    aim, _ = sampler._aim(surrogate, sampler.reference)  # pyright: ignore[reportPrivateUsage]

    def mean_gain(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """As if an evaluation moved each policy as far as any other."""
        mean, costs = surrogate.mean(rows), batch_costs_of(space.anatomy)(encoder.choices(rows))
        gain = expected_gain(mean, np.full(len(rows), 0.2), surrogate.scale, costs, aim)
        return gain / trial_effort(surrogate.describer.macs(rows))

    rows = np.stack([encoder.row(policy) for i, policy in enumerate(variants) if i % 11])
    others = encoder.random(40, np.random.default_rng(3))
    others = others[mean_gain(others) < mean_gain(rows).min()]

    worth = sampler._worth(np.vstack([rows, others]), surrogate, aim)  # pyright: ignore[reportPrivateUsage]

    assert worth[len(rows) :].max() > worth[: len(rows)].max()


def test_what_was_tried_counts_among_the_variants_of_a_network() -> None:
    networks = np.array([7, 7, 7, 5, 5])

    assert crowded(networks, 2).tolist() == [False, False, True, False, False]
    assert crowded(networks, 2, np.array([1, 1, 1, 2, 2])).tolist() == [False, True, True, True, True]


@pytest.mark.slow
def test_a_search_does_not_stay_with_the_fine_tunes_of_one_network(tmp_path: Path, space: Space) -> None:
    store, encoder = made_store(tmp_path, space, "nightpress"), Encoder(space)
    run_trials(store, space, 50)

    rows = np.stack([encoder.row(policy_of(trial)) for trial in store.trials()])
    assert np.bincount(encoder.networks(rows)).max() <= MOST_ALIKE


def _covers(encoder: Encoder, row: NDArray[np.float64]) -> float:
    """Hypervolume of a policy alone."""
    costs, policy = costs_of(encoder.space.anatomy), encoder.policy(row)
    shares = np.divide(costs(policy), costs(Policy(model=encoder.space.anatomy.digest)))
    return float((accuracy_of(policy) - 0.5) * (1 - shares[0]) * (1 - shares[1]))


def proposals(store: Store, space: Space, count: int) -> list[TrialRecord]:
    before = len(store.trials())
    run_trials(store, space, count)
    return list(store.trials()[before:])


def observations(encoder: Encoder, count: int, rungs: tuple[int, ...] = (SHORT,)) -> list[Observation]:
    """Of the made-up truth of test_search; a cheaper rung shows two tenths less a rung."""
    rows = encoder.random(count, np.random.default_rng(1))
    return [
        Observation(row=row, rung=rung, accuracy=accuracy_of(encoder.policy(row)) - 0.2 * (LONG - rung), se=0.002)
        for row in rows
        for rung in rungs
    ]


def test_the_surrogate_ranks_policies_that_it_has_not_seen(encoder: Encoder) -> None:
    surrogate = Surrogate(Describer(encoder, Sensitivity()), observations(encoder, 40))
    rows = encoder.random(60, np.random.default_rng(2))
    truth = np.array([accuracy_of(encoder.policy(row)) for row in rows])

    median, low, high = surrogate.accuracy(rows)

    assert np.corrcoef(median, truth)[0, 1] > 0.9
    assert (low < median).all()
    assert (median < high).all()


def test_what_a_policy_showed_at_a_cheap_rung_counts_for_the_long_one(encoder: Encoder) -> None:
    seen = observations(encoder, 12, (SHORT, LONG))
    row = encoder.random(1, np.random.default_rng(3))
    describer = Describer(encoder, Sensitivity())
    good, bad = (
        Surrogate(describer, [*seen, Observation(row=row[0], rung=SHORT, accuracy=a, se=0.002)]).accuracy(row)[0][0]
        for a in (0.7, 0.5)
    )

    assert good > bad + 0.02


def test_a_part_of_the_fine_tune_says_more_than_re_estimation_and_less_than_the_whole(encoder: Encoder) -> None:
    parts = Describer(encoder, Sensitivity())(encoder.random(5, np.random.default_rng(3)))
    kernel = Kernel(linear=1.0, smooth=0.3, length=1.4, hyper=0.3, apart=0.7)
    shared = [kernel.prior(parts, rung, LONG) for rung in (BN, PART, SHORT, LONG)]
    assert all((low < high).all() for low, high in pairwise(shared))


def test_an_evaluation_of_what_is_known_promises_less_than_one_of_what_is_not(encoder: Encoder) -> None:
    seen = observations(encoder, 30)
    surrogate = Surrogate(Describer(encoder, Sensitivity()), seen)
    new = encoder.random(30, np.random.default_rng(7))

    known, unknown = (surrogate.hoped(rows, SHORT)[1] for rows in (np.stack([o.row for o in seen]), new))

    assert np.median(known) < 0.7 * np.median(unknown)


@pytest.mark.parametrize("count", [130, 400])
def test_of_many_policies_the_harsh_ones_are_not_forgotten(encoder: Encoder, count: int) -> None:
    """Most of what is tried late and most of what is accurate lies near the front; the harsh end was tried early."""
    truth = sorted(observations(encoder, count, (BN, SHORT)), key=lambda o: o.rung == BN)
    truth.sort(key=lambda o: accuracy_of(encoder.policy(o.row)))
    known = Surrogate(Describer(encoder, Sensitivity()), truth)
    harsh = truth[: count // 4]
    accuracies = np.array([o.accuracy for o in harsh if o.rung == SHORT])
    rows = np.stack([o.row for o in harsh if o.rung == SHORT])

    expected = known.scale.down(known.mean(rows))

    assert float(np.abs(expected - accuracies).mean()) < 0.02


def test_a_surrogate_of_nothing_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="at least one observation"):
        Surrogate(Describer(encoder, Sensitivity()), [])


@given(
    front=st.lists(st.tuples(*[st.floats(0.01, 0.99)] * 3), min_size=0, max_size=6),
    point=st.tuples(*[st.floats(0.01, 0.99)] * 3),
)
def test_the_gain_of_a_certain_accuracy_is_the_hypervolume_that_it_adds(
    front: list[tuple[float, float, float]], point: tuple[float, float, float]
) -> None:
    scale = Scale(ceiling=1.0, floor=0.0)
    corner = np.array([0.0, 1.0, 1.0])
    aim = target(np.array(front).reshape(len(front), 3), corner)

    gain = expected_gain(scale.up(np.array([point[0]])), np.zeros(1), scale, np.array([point[1:]]), aim)[0]

    losses = [(-a, b, c) for a, b, c in front]
    added = hypervolume([*losses, (-point[0], *point[1:])], (0.0, 1.0, 1.0)) - hypervolume(losses, (0.0, 1.0, 1.0))
    assert gain == pytest.approx(added, abs=1e-9)


def test_accuracy_above_the_top_is_worth_nothing() -> None:
    scale, corner = Scale(ceiling=1.0, floor=0.0), np.array([0.0, 1.0, 1.0])
    front = np.array([[0.8, 0.6, 0.6], [0.5, 0.2, 0.2]])

    def gain(accuracy: float, cost: float, top: float) -> float:
        aim, known = target(front, corner, top), scale.up(np.array([accuracy]))
        return float(expected_gain(known, np.zeros(1), scale, np.array([[cost, cost]]), aim)[0])

    assert gain(0.9, 0.7, top=0.8) == 0.0 < gain(0.9, 0.7, top=math.inf)
    assert 0 < gain(0.9, 0.5, top=0.8) == pytest.approx(gain(0.8, 0.5, top=math.inf))


def test_workers_in_parallel_get_different_policies(tmp_path: Path, space: Space) -> None:
    store = made_store(tmp_path, space, "nightpress")
    run_trials(store, space, 8)
    costs = costs_of(space.anatomy)
    found = []
    for _ in range(4):  # asked one after the other, none of them finished
        trial = store.study.ask()
        policy = space.sample(TrialSuggest(trial))
        latency, size = costs(policy)
        store.begin(trial, policy, 0.0)
        predicted = {"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False}
        store.note(trial.number, size_bytes=size, predicted=predicted)
        found.append(digest(policy))

    assert len(set(found) | {t.digest for t in store.trials()}) == 12


def test_netadapt_cuts_the_most_accurate_policy_of_the_last_round(tmp_path: Path, space: Space) -> None:
    sampler = NetAdaptSampler(space, batch_costs_of(space.anatomy), 0)
    store = Store(open_storage(tmp_path, None), sampler)
    first = len(sampler.cuts(baselines(space.anatomy, True)["uniform INT8"]))
    run_trials(store, space, first + 1)

    *round_one, next_one = store.trials()
    best = max(round_one, key=lambda t: t.quality.accuracy if t.quality else 0.0)
    assert set(policy_of(best).prune) <= set(policy_of(next_one).prune)
    assert next_one.latency is not None
    assert best.latency is not None
    assert next_one.latency.latency_ms < best.latency.latency_ms


def test_netadapt_decides_no_round_while_another_worker_still_tries_a_part_of_it(tmp_path: Path, space: Space) -> None:
    sampler = NetAdaptSampler(space, batch_costs_of(space.anatomy), 0)
    store = Store(open_storage(tmp_path, None), sampler)
    cuts = {digest(cut) for cut in sampler.cuts(baselines(space.anatomy, True)["uniform INT8"])}
    run_trials(store, space, len(cuts) - 1)
    last = store.study.ask()
    assert digest(space.sample(TrialSuggest(last))) in cuts
    store.begin(last, space.sample(TrialSuggest(last)), 0.0)

    beside = space.sample(TrialSuggest(store.study.ask()))

    assert beside == space.random(np.random.default_rng((0, len(cuts))))


# The stopping rule


def trial(number: int, *, macs: int, accuracies: tuple[float, ...], latency_ms: float, **fields: Any) -> TrialRecord:
    rungs = ("bn", "short")[: len(accuracies)]
    return TrialRecord(
        number=number, role="search", name=None, digest=f"{number:012x}", policy={}, macs=macs, params=macs,
        state=TrialState.COMPLETE if len(accuracies) > 1 else TrialState.RUNNING, size_bytes=macs,
        predicted=Latency(latency_ms=latency_ms, low_ms=latency_ms, high_ms=latency_ms, measured=False),
        qualities=tuple(
            Quality(rung=r, split="search", accuracy=a, accuracy_se=0.01, samples=100, seconds=1.0)
            for r, a in zip(rungs, accuracies, strict=True)
        ),
        **fields,
    )  # fmt: skip


MILD = [trial(i, macs=1_000_000, accuracies=(0.90, 0.95), latency_ms=1.0) for i in range(8)]
HARSH = [trial(10 + i, macs=50_000, accuracies=(0.20, 0.90), latency_ms=0.1) for i in range(8)]


def test_a_harsh_policy_is_judged_by_what_harsh_ones_gained() -> None:
    record = trial(99, macs=50_000, accuracies=(0.2,), latency_ms=0.09)

    assert Judge([*MILD, *HARSH]).hope(record) == pytest.approx(0.2 + 0.7 + 0.01)
    assert Judge([*MILD, *HARSH]).verdict(record) is None  # faster than all others, and it may reach 0.9


def test_a_trial_that_cannot_reach_the_front_any_more_is_stopped() -> None:
    record = trial(99, macs=1_000_000, accuracies=(0.86,), latency_ms=1.2)
    found = Judge(MILD).verdict(record)

    assert found is not None
    assert found.reason == "even 0.9500 would be dominated"  # no less than what they came to
    assert Judge(MILD).verdict(replace(record, role="seed")) is None


def test_nothing_is_stopped_for_being_no_better_than_what_has_more_work_than_is_allowed() -> None:
    """Integers of full width are faster and smaller than narrow floats."""
    record = replace(trial(99, macs=1_000_000, accuracies=(0.86,), latency_ms=1.2), size_bytes=2_000_000)
    rules = [replace(known, macs=1_100_000) for known in MILD]

    assert Judge(rules, limits=Limits(max_macs=1_100_000)).verdict(record) is not None
    assert Judge(rules, limits=Limits(max_macs=1_050_000)).verdict(record) is None
    assert Judge(rules, limits=Limits(max_macs=1_050_000)).hope(record) == Judge(rules).hope(record)


def test_where_nothing_alike_was_finished_nothing_is_stopped() -> None:
    record = trial(99, macs=50_000, accuracies=(0.2,), latency_ms=2.0)

    assert Judge(MILD).verdict(record) is None


@pytest.mark.parametrize(("columns", "policies"), [(27, 4000), (75, 4000), (100, 3000), (120, 2500), (300, 2500)])
def test_a_generation_has_as_many_policies_as_are_priced_in_the_same_time(columns: int, policies: int) -> None:
    assert population(columns) == policies


def test_even_a_fast_trial_is_stopped_below_the_accuracy_that_is_asked_for() -> None:
    record = trial(99, macs=50_000, accuracies=(0.2,), latency_ms=0.01)
    found = Judge(HARSH, 0.95).verdict(record)

    assert found is not None
    assert found.reason.endswith("would be below 0.9500, from where none comes to min_accuracy")


def test_the_rule_counts_its_errors_on_the_trials_that_it_spared() -> None:
    good = trial(20, macs=50_000, accuracies=(0.2, 0.99), latency_ms=0.05)
    poor = trial(21, macs=50_000, accuracies=(0.2, 0.5), latency_ms=0.3)
    stopped = replace(trial(22, macs=1, accuracies=(0.1,), latency_ms=1.0), state=TrialState.STOPPED)

    assert wrongly([*MILD, good, poor, stopped], {20: 0.9, 21: 0.9}) == (1, 2, 1, 1)
    assert upper_bound(0, 0) == 1.0
    assert upper_bound(1, 2) > 0.5 > upper_bound(0, 20)


def test_about_one_in_eight_is_spared() -> None:
    assert 60 < sum(spared(f"{n * 7919:012x}") for n in range(800)) < 140


# Rules and seeds


def test_global_magnitude_leaves_the_strongest_channels_of_the_whole_network(space: Space) -> None:
    groups = space.anatomy.groups
    scores = {g.name: (np.linspace(0.1, 1.9, g.channels) * (10 if g is groups[0] else 1)).tolist() for g in groups}

    policy = global_magnitude(space.anatomy, scores, 0.5, Policy(model=space.anatomy.digest))

    assert groups[0].name not in policy.prune
    assert all(policy.prune[g.name] >= 0.5 for g in groups[1:])
    assert set(policy.bits.values()) == {INT8}


def test_a_rule_whose_twin_in_integers_is_better_in_time_and_size_is_pointless(space: Space) -> None:
    rules = baselines(space.anatomy, distill=True)

    assert pointless(rules, costs_of(space.anatomy)) == {
        f"uniform {w} fp32": f"uniform {w} INT8" for w in ("75%", "50%", "25%")
    }
    assert pointless(rules, lambda policy: (1.0, 1)) == {}


def test_the_greedy_rivals_are_as_fast_as_the_uniform_ones(space: Space) -> None:
    costs = costs_of(space.anatomy)
    rules = baselines(space.anatomy, distill=True)
    walk = greedy_walk(space, Sensitivity(), batch_costs_of(space.anatomy), 1000)

    found = greedy_rules(walk, rules, costs)
    assert list(found) == ["greedy 50%", "greedy 25%"]
    for name, policy in found.items():
        like = costs(rules[name.replace("greedy", "uniform") + " INT8"])[0]
        assert min(abs(np.log(costs(p)[0] / like)) for p in walk) == abs(np.log(costs(policy)[0] / like))


def test_a_seed_of_another_model_is_refused_by_file(tmp_path: Path, space: Space) -> None:
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    mine.write_text(policy_to_json(Policy(model=space.anatomy.digest)))
    other.write_text(policy_to_json(Policy(model="0123")))

    assert own_policies([str(mine)], space) == [Policy(model=space.anatomy.digest)]
    with pytest.raises(InputError, match=r"seeds: .*other.json: a policy belongs to one model; this one is for 0123"):
        own_policies([str(other)], space)
    with pytest.raises(InputError, match=r"seeds: .*missing.json cannot be read"):
        own_policies([str(tmp_path / "missing.json")], space)
