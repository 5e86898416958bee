"""What a stopped trial tells: Optuna's samplers no objectives, ours all that it has shown."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest

from nightpress.search.encoding import Encoder
from nightpress.search.experience import Experience
from nightpress.search.records import DIVERGED, NOT_CONTINUED, TrialState
from nightpress.search.sampler import make_sampler
from nightpress.search.storages import open_storage
from nightpress.search.store import Store, read_study
from nightpress.spaces.policy import digest
from test_batch import SPACE, ask
from test_search import accuracy_of, batch_costs_of, quality

LOST = 0.3
"""What a policy lacks at its lowest rung."""
Stop = Callable[[Store, int], None]


def as_now(store: Store, number: int) -> None:
    store.finish(number, TrialState.STOPPED, finished=1.0, reason=NOT_CONTINUED)


def as_before(store: Store, number: int) -> None:
    """As older versions told Optuna of it."""
    store.note(number, reason=NOT_CONTINUED, finished=1.0, state="STOPPED")
    record = store.trial(number)
    assert record.losses is not None
    loss, latency_ms, size_bytes = record.losses
    store.study.tell(number, [-loss, latency_ms, size_bytes])


def search(folder: Path, count: int, sampler: str = "random", stop: Stop = as_now) -> Store:
    """Trials of which each third is finished, and the others are stopped at their lowest rung or were never trained."""
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        store = Store(open_storage(folder, None), make_sampler(sampler, 0, 0, SPACE, batch_costs_of(SPACE.anatomy)))
    for i in range(count):
        number, policy = ask(store)
        if i % 3 == 2:
            store.finish(number, TrialState.INFEASIBLE, finished=1.0, reason="beyond max_latency_ms by 5%")
            continue
        store.note_quality(number, quality(accuracy_of(policy) - LOST, "bn"))
        if i % 3 == 1:
            stop(store, number)
        else:
            store.note_quality(number, quality(accuracy_of(policy)))
            store.finish(number, TrialState.COMPLETE, finished=1.0)
    return store


@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
def test_optunas_samplers_see_accuracies_of_the_short_fine_tune_alone(tmp_path: Path, name: str) -> None:
    store = search(tmp_path, 48, name)

    told, known = store.study.get_trials(deepcopy=False), store.trials()
    complete = [t for t in told if t.state is optuna.trial.TrialState.COMPLETE]
    assert {known[t.number].quality.rung for t in complete if known[t.number].quality} == {"short"}  # type: ignore[union-attr]
    assert len(complete) == 16
    assert all(t.values is None for t in told if t not in complete)


def test_a_stopped_trial_keeps_what_it_has_shown_on_record(tmp_path: Path) -> None:
    search(tmp_path, 6)
    stopped = read_study(tmp_path, None).trials[1]
    assert (stopped.state, stopped.reason) == (TrialState.STOPPED, NOT_CONTINUED)
    assert stopped.quality is not None
    assert stopped.quality.rung == "bn"


def learned(store: Store) -> Experience:
    found = Experience(Encoder(SPACE))
    found.read(store.study)
    return found


def same(one: Experience, other: Experience) -> bool:
    rows = [np.array([o.row for o in found.observations()]) for found in (one, other)]
    seen = [[(o.rung, o.accuracy, o.se) for o in found.observations()] for found in (one, other)]
    whole = [len(found.observations(cheap=False)) for found in (one, other)]
    return (
        np.array_equal(rows[0], rows[1]) and seen[0] == seen[1] and whole[0] == whole[1]
        and one.digests == other.digests
        and np.array_equal(one.costs, other.costs) and np.array_equal(one.rows, other.rows)
    )  # fmt: skip


@pytest.mark.parametrize("stop", [as_now, as_before])
def test_our_sampler_learns_of_a_stopped_trial_what_its_record_says_and_of_an_infeasible_one_nothing(
    tmp_path: Path, stop: Stop
) -> None:
    store = search(tmp_path, 18, stop=stop)
    known = [t for t in store.trials() if t.state is not TrialState.INFEASIBLE]

    found = learned(store)

    assert [o.accuracy for o in found.observations()] == [q.accuracy for t in known for q in t.qualities]
    assert len(found.rows) == len(known) == 12
    by_record = Experience(Encoder(SPACE))
    by_record.take(store.trials())
    assert same(found, by_record)


def test_a_study_of_an_older_version_teaches_what_one_of_today_does(tmp_path: Path) -> None:
    now, before = (search(tmp_path / stop.__name__, 18, stop=stop) for stop in (as_now, as_before))
    assert same(learned(now), learned(before))


def test_what_was_stopped_is_never_proposed_again_nor_taken_for_a_failure(tmp_path: Path) -> None:
    store = search(tmp_path, 6)
    number, policy = ask(store)
    store.finish(number, TrialState.FAILED, finished=1.0, reason=f"{DIVERGED}: nan")

    found = learned(store)

    assert digest(policy) in found.digests
    assert {t.digest for t in store.trials()} == found.digests
    assert store.tally().number_of(store.trials()[1].digest) == 1


def test_a_driver_that_was_killed_before_it_told_of_a_stopped_trial_tells_when_it_comes_back(tmp_path: Path) -> None:
    store = search(tmp_path, 3)
    number, policy = ask(store)
    store.note_quality(number, quality(accuracy_of(policy) - LOST, "bn"))
    store.note(number, reason=NOT_CONTINUED, finished=1.0, state="STOPPED")

    later = Store(open_storage(tmp_path, None))

    assert later.repair() == []
    assert later.study.get_trials()[number].state is optuna.trial.TrialState.PRUNED
    assert learned(later).digests == {t.digest for t in later.trials()}
