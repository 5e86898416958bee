"""Several proposals from one population: who gets them, what they are, and what is known of each while others run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nightpress.search.batch import CANDIDATES, Doubts, Looked
from nightpress.search.encoding import Encoder
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.proposals import Sensitivity
from nightpress.search.records import TrialState
from nightpress.search.sampler import NightpressSampler
from nightpress.search.store import Store
from nightpress.search.surrogate import RUNGS, Describer, Observation, Surrogate
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Choices
from nightpress.spaces.policy import FP32, INT8, Policy, digest
from nightpress.spaces.space import Space
from strategies import toy_anatomy
from test_search import accuracy_of, batch_costs_of, costs_of, made_store, quality, run_trials

BN, _, SHORT, LONG = range(len(RUNGS))
SPACE = Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))


@dataclass
class Counted:
    """The toy's prices; a population is bred where they are asked for."""

    asked: int = 0

    def __post_init__(self) -> None:
        self._prices = batch_costs_of(SPACE.anatomy)

    def __call__(self, choices: Choices) -> NDArray[np.float64]:
        self.asked += 1
        return self._prices(choices)


def begun(folder: Path, max_latency: float | None = None) -> tuple[Store, Counted]:
    """A study with eight finished trials, and who counts how often prices are asked for from now on."""
    folder.mkdir(exist_ok=True)
    store = made_store(folder, SPACE, "nightpress")
    sampler, counted = store.study.sampler, Counted()
    assert isinstance(sampler, NightpressSampler)
    assert sampler.reference is not None
    if max_latency is not None:
        sampler.reference = (sampler.reference[0], max_latency * sampler.reference[1], sampler.reference[2])
    run_trials(store, SPACE, 8)
    sampler.costs = counted
    return store, counted


def ask(store: Store, wanted: int = 1) -> tuple[int, Policy]:
    """Begin one trial of so many that are wanted at once."""
    trial = store.ask(wanted)
    policy = SPACE.sample(TrialSuggest(trial))
    store.begin(trial, policy, 0.0)
    latency, size = costs_of(SPACE.anatomy)(policy)
    known = {"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False}
    store.note(trial.number, size_bytes=size, predicted=known)
    return trial.number, policy


def finish(store: Store, number: int, policy: Policy) -> None:
    store.note_quality(number, quality(accuracy_of(policy)))
    store.finish(number, TrialState.COMPLETE, finished=1.0)


def test_many_free_workers_share_a_population_and_get_different_policies_within_the_limits(tmp_path: Path) -> None:
    store, counted = begun(tmp_path, max_latency=0.5)
    first = ask(store, 12)
    bred = counted.asked

    found = [first[1], *(ask(store, 12 - i)[1] for i in range(1, 12))]

    assert counted.asked == bred
    assert len({digest(policy) for policy in found} | {t.digest for t in store.trials()}) == 20
    assert all(SPACE.contains(policy) for policy in found)
    most, _ = costs_of(SPACE.anatomy)(Policy(model=SPACE.anatomy.digest))
    assert all(costs_of(SPACE.anatomy)(policy)[0] < 0.5 * most for policy in found)
    ask(store, 12)
    assert counted.asked > bred, "a batch has no more than it was made for"


def test_one_and_two_workers_get_what_they_always_got(tmp_path: Path) -> None:
    alone, _ = begun(tmp_path / "alone")
    two, _ = begun(tmp_path / "two")
    for wanted in (2, 1, 1, 2, 1):
        (number, policy), (other, same) = ask(alone), ask(two, wanted)
        finish(alone, number, policy)
        finish(two, other, same)
        assert digest(policy) == digest(same)


def test_the_best_of_a_batch_is_what_a_single_worker_would_get(tmp_path: Path) -> None:
    alone, _ = begun(tmp_path / "alone")
    many, _ = begun(tmp_path / "many")
    assert ask(alone)[1] == ask(many, 8)[1]


def test_many_workers_can_begin_before_anything_is_known(tmp_path: Path) -> None:
    store = made_store(tmp_path, SPACE, "nightpress")
    found = [ask(store, 20 - i)[1] for i in range(20)]
    assert len({digest(policy) for policy in found}) == 20


def test_a_batch_is_given_up_once_as_many_results_have_come_as_it_was_made_for(tmp_path: Path) -> None:
    store, counted = begun(tmp_path)
    running = [ask(store, 5), *(ask(store, 3) for _ in range(2))]
    bred = counted.asked
    for number, policy in running:
        finish(store, number, policy)
    running = [ask(store)]
    assert counted.asked == bred
    finish(store, *running[0])
    finish(store, *ask(store, 1))
    assert counted.asked == bred
    ask(store)
    assert counted.asked > bred


def test_the_rows_of_all_generations_are_kept_the_best_first_and_once_each() -> None:
    encoder = Encoder(SPACE)
    rows = encoder.random(2 * CANDIDATES, np.random.default_rng(0))
    looked = Looked(lambda rows: rows[:, 0])
    for part in (rows[:100], rows, rows[100:]):
        looked(part)

    found = looked.best(CANDIDATES)

    assert len(np.unique(found, axis=0)) == len(found) <= CANDIDATES
    assert len(found) > CANDIDATES / 2
    assert (np.diff(found[:, 0]) <= 0).all()
    assert found[0, 0] == rows[:, 0].max()


@pytest.mark.parametrize("top", [SHORT, LONG])
def test_what_an_evaluation_under_way_will_tell_is_not_worth_finding_out_again(top: int) -> None:
    encoder, generator = Encoder(SPACE), np.random.default_rng(1)
    seen = [
        Observation(row=row, rung=rung, accuracy=accuracy_of(encoder.policy(row)) - 0.02 * (top - rung), se=0.002)
        for row in encoder.random(12, generator) for rung in (BN, SHORT, top)
    ]  # fmt: skip
    surrogate = Surrogate(Describer(encoder, Sensitivity()), seen)
    rows = encoder.random(6, generator)
    everything = np.arange(len(rows))
    doubts = Doubts(surrogate, rows, SHORT, 2)
    mean, spread = surrogate.hoped(rows, SHORT)
    assert doubts.mean == pytest.approx(mean)
    assert doubts.spread(everything) == pytest.approx(spread, rel=1e-5)

    for index in (4, 1):
        doubts.begin(index)

    truth = by_hand(surrogate, seen, rows, (4, 1))
    assert doubts.spread(everything) == pytest.approx(truth, rel=2e-3)  # the kernel's parts have single digits
    assert (doubts.spread(everything) < spread).all()
    assert doubts.spread(everything)[4] < 0.8 * spread[4]


def by_hand(
    surrogate: Surrogate, seen: list[Observation], rows: NDArray[np.float64], begun: tuple[int, ...]
) -> NDArray[np.float64]:
    """The same from one covariance matrix of everything: observations, what has begun, and the rows at both rungs."""
    at = [(o.row, o.rung, surrogate.noise_at(o.rung)) for o in seen]
    at += [(rows[i], SHORT, surrogate.noise_at(SHORT)) for i in begun]
    at += [(row, SHORT, 0.0) for row in rows] + [(row, surrogate.rung, 0.0) for row in rows]
    parts = surrogate.describer(np.stack([row for row, *_ in at]))
    rungs = np.array([rung for _, rung, _ in at], dtype=np.intp)
    full = surrogate.kernel(surrogate.kernel.near(parts, parts), rungs, rungs) + np.diag([noise for *_, noise in at])
    known = len(seen) + len(begun)
    inner, cross = full[:known, :known], full[:known, known:]
    left = full[known:, known:] - cross.T @ np.linalg.solve(inner, cross)
    n = len(rows)
    own, shared = np.diag(left)[:n], np.diag(left[n:, :n])
    return np.abs(shared) / np.sqrt(own + surrogate.noise_at(SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("above", [0.002, 0.2])
def test_a_limit_above_all_that_is_known_does_not_make_the_search_a_random_one(tmp_path: Path, above: float) -> None:
    """Nothing known is in the box then; proposals still go to where it may be reached, or come nearest to it."""
    store, _ = begun(tmp_path)
    sampler = store.study.sampler
    assert isinstance(sampler, NightpressSampler)
    assert sampler.reference is not None
    best = max(t.quality.accuracy for t in store.trials() if t.quality is not None)
    sampler.reference = (-(best + above), *sampler.reference[1:])
    found: list[float] = []
    for _ in range(10):
        number, policy = ask(store)
        finish(store, number, policy)
        found.append(accuracy_of(policy))

    generator = np.random.default_rng(0)
    chance = [accuracy_of(SPACE.random(generator)) for _ in range(200)]
    assert np.median(found) > np.quantile(chance, 0.75)


@pytest.mark.parametrize("wanted", [1, 6])
def test_proposals_have_no_more_work_than_the_limit_although_others_would_gain_more(
    tmp_path: Path, wanted: int
) -> None:
    """A policy of half of the multiply-accumulates is accurate in no way that one of three quarters is not."""
    store, _ = begun(tmp_path)
    sampler, anatomy = store.study.sampler, SPACE.anatomy
    assert isinstance(sampler, NightpressSampler)
    free = [plan(anatomy, ask(store, wanted)[1]).macs / anatomy.macs for _ in range(6)]
    sampler.most_macs = most = float(np.median(free))
    bound = [plan(anatomy, ask(store, wanted)[1]).macs / anatomy.macs for _ in range(6)]

    assert max(free) > most
    assert max(bound) <= most
