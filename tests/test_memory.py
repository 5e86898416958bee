"""The sampler's memory: a night that is killed after any proposal goes on as if it had not been."""

from pathlib import Path

import numpy as np
import pytest

from nightpress.search.memory import Memory
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.records import TrialState
from nightpress.search.sampler import NightpressSampler, make_sampler
from nightpress.search.store import Store, open_storage
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import Space
from strategies import toy_anatomy
from test_search import accuracy_of, batch_costs_of, costs_of, quality

COUNT = 11


def space() -> Space:
    return Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))


def driver(folder: Path, name: str = "nightpress") -> Store:
    """A store as a driver opens it, with a new sampler that remembers in the folder."""
    found = space()
    costs = costs_of(found.anatomy)
    many = batch_costs_of(found.anatomy)
    sampler = make_sampler(name, 5, 0, found, many)
    if isinstance(sampler, NightpressSampler):
        latency, size = costs(Policy(model=found.anatomy.digest))
        sampler.reference = (-0.5, latency, float(size))
        sampler.memory = Memory(folder)
    fresh = None if name == "nightpress" else (lambda trials: make_sampler(name, 5, trials, found, many))
    store = Store(open_storage(folder, None), sampler, sampler_at=fresh)
    store.repair()
    return store


def one_trial(store: Store, *, killed: bool = False) -> None:
    """What the driver does with a trial; killed between the proposal and its beginning."""
    found = space()
    costs = costs_of(found.anatomy)
    trial = store.ask()
    policy = found.sample(TrialSuggest(trial))
    if killed:
        return
    latency, size = costs(policy)
    store.begin(trial, policy, 0.0)
    store.note(
        trial.number, size_bytes=size,
        predicted={"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False},
    )  # fmt: skip
    store.note_quality(trial.number, quality(accuracy_of(policy)))
    store.finish(trial.number, TrialState.COMPLETE, finished=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nightpress", "random", "nsga2", "tpe"])
def test_a_driver_that_is_killed_again_and_again_tries_the_same_policies(tmp_path: Path, name: str) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    store = driver(tmp_path / "whole", name)
    for _ in range(COUNT):
        one_trial(store)
    for number in range(COUNT):
        if number % 3 == 0:  # after the proposal was asked for, and before it was begun
            one_trial(driver(tmp_path / "killed", name), killed=True)
        one_trial(driver(tmp_path / "killed", name))

    undisturbed, disturbed = store.trials(), driver(tmp_path / "killed", name).trials()

    assert [t.digest for t in disturbed] == [t.digest for t in undisturbed]
    assert [t.number for t in disturbed] == list(range(COUNT))


def test_the_newest_memory_before_a_trial_counts(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.before(0) is None
    for number in (3, 4, 7):
        memory.keep(number, {"spread": np.array(float(number))})

    def known(number: int) -> float | None:
        found = Memory(tmp_path).before(number)
        return None if found is None else float(found["spread"])

    assert [known(n) for n in (8, 7, 5, 4)] == [7.0, 4.0, 4.0, None]
    again = Memory(tmp_path)
    again.before(7)
    again.keep(7, {"spread": np.array(7.5)})  # proposed once more: what was before it stays
    assert [known(n) for n in (8, 7)] == [7.5, 4.0]


def test_a_damaged_memory_is_none(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    memory.keep(1, {"spread": np.array(1.0)})
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    assert memory.before(9) is None
    (tmp_path / "sampler-1.npz").write_bytes(b"\x80\x04cos\nsystem\n.")  # a pickle
    assert memory.before(9) is None
