"""What a policy teaches whose fine-tune diverged, and one whose trial failed by no fault of its own."""

from pathlib import Path

import numpy as np
import pytest

from nightpress.evaluators.quality import DivergedError
from nightpress.search.experience import Experience
from nightpress.search.records import DIVERGED, TrialState
from nightpress.search.sampler import NightpressSampler
from nightpress.search.store import Store, policy_of
from nightpress.spaces.policy import Policy
from test_batch import ask, begun, finish

HIGHEST = 0.02
"""In these nights a fine-tune diverges above this learning rate, two fifths of all that are drawn by chance."""


def run(store: Store, count: int, reason: str) -> list[bool]:
    """Trials, each too high a rate for it or not."""
    high: list[bool] = []
    for _ in range(count):
        number, policy = ask(store)
        high.append(policy.finetune.learning_rate > HIGHEST)
        if high[-1]:
            store.finish(number, TrialState.FAILED, finished=1.0, reason=reason)
        else:
            finish(store, number, policy)
    return high


def expected(store: Store, policy: Policy) -> float:
    sampler = store.study.sampler
    assert isinstance(sampler, NightpressSampler)
    sampler.experience.read(store.study)
    surrogate = sampler.surrogate()
    return float(surrogate.scale.down(surrogate.mean(sampler.encoder.row(policy)[None]))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reason", "learned"),
    [(f"{DIVERGED}: the loss became nan", True), ("OutOfMemory: 3 GB", False), ("the disk is full", False)],
)
def test_less_is_expected_of_what_diverged_and_nothing_learned_of_what_the_machine_did(
    tmp_path: Path, reason: str, learned: bool
) -> None:  # fmt: skip
    store, _ = begun(tmp_path)
    number, policy = ask(store)
    before = expected(store, policy)

    store.finish(number, TrialState.FAILED, finished=1.0, reason=reason)

    after = expected(store, policy)
    assert after < before - 0.01 if learned else after == before


@pytest.mark.slow
def test_the_search_leaves_the_region_where_fine_tunes_diverge(tmp_path: Path) -> None:
    diverging = begun(tmp_path / "diverging")[0]
    unlucky = begun(tmp_path / "unlucky")[0]

    turned = run(diverging, 20, f"{DIVERGED}: the training loss became nan")
    stayed = run(unlucky, 20, "WorkerLost: it went away")

    assert sum(turned[8:]) < sum(stayed[8:]) / 2


@pytest.mark.slow
def test_a_record_teaches_what_the_study_did(tmp_path: Path) -> None:
    store, _ = begun(tmp_path)
    run(store, 4, f"{DIVERGED}: the training loss became nan")
    sampler = store.study.sampler
    assert isinstance(sampler, NightpressSampler)
    sampler.experience.read(store.study)

    taken = Experience(sampler.encoder)
    taken.take(store.trials())

    told, known = taken.observations(), sampler.experience.observations()
    assert [o.accuracy for o in told] == [o.accuracy for o in known]
    assert np.array_equal(np.stack([o.row for o in told]), np.stack([o.row for o in known]))


@pytest.mark.slow
def test_where_nothing_was_finished_nothing_is_made_of_what_diverged(tmp_path: Path) -> None:
    store, _ = begun(tmp_path)
    sampler = store.study.sampler
    assert isinstance(sampler, NightpressSampler)
    fresh = Experience(sampler.encoder)
    number, policy = ask(store)
    store.finish(number, TrialState.FAILED, finished=1.0, reason=f"{DIVERGED}: nan")

    fresh.take([t for t in store.trials() if t.number == number])

    assert policy_of(store.trials()[number]) == policy
    assert fresh.observations() == []


def test_the_records_know_the_engine_s_word_for_it() -> None:
    assert DivergedError.__name__ == DIVERGED
