"""The search as a whole: seeds come first and count, and where it stands still finalists teach it."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from nightpress.search.clock import ENDING, Clock, Times
from nightpress.search.config import FineTuneConfig
from nightpress.search.folder import read_run
from nightpress.search.loop import FIRST, FIRST_SHARE, run_first, search
from nightpress.search.plateau import LEAST_TRIALS
from nightpress.search.sampler import NightpressSampler
from nightpress.search.trials import Trials, enqueue
from nightpress.spaces.policy import Policy
from test_trials import SPACE, asked, begun, sampler_of

RUNGS: dict[str, Any] = {
    "short_steps": 12, "part_steps": 0, "long_steps": 36, "finalists": 3, "epoch_steps": 10, "long_sized": True,
}  # fmt: skip


def night(folder: Path, *, finalists: int | None = None, **keys: Any) -> Trials:
    """Random policies, for a night that believes in its sampler."""
    trials = begun(folder, dict(RUNGS), finetune=FineTuneConfig(finalists=finalists), **keys)
    ours = sampler_of("nightpress", 0, 0)
    assert isinstance(ours, NightpressSampler)
    trials.session.provide(sampler=ours)
    trials.session.state["given"] = {"search": {"accuracy": 0.95}, "test": {"accuracy": 0.95, "accuracy_se": 0.01}}
    return trials


def with_seeds(trials: Trials, count: int) -> Trials:
    group = SPACE.anatomy.groups[0].name
    for number in range(count):
        policy = Policy(model=SPACE.anatomy.digest, prune={group: 0.05 * (number + 1)})
        enqueue(trials.session, policy, "seed")
    return trials


def rungs_of(trials: Trials) -> list[str]:
    return [job.rung for _, job in asked(trials)]


@pytest.mark.slow
def test_where_the_search_stands_still_finalists_are_trained_and_it_goes_on(tmp_path: Path) -> None:
    trials = night(tmp_path, most=2_000)

    search(trials.session, trials)

    rungs, run = rungs_of(trials), read_run(tmp_path)
    still = [d for d in run.decisions if d["reason"].startswith("the search stands still: the last ")]
    first = rungs.index("long")
    assert still
    assert all(decision["decision"].startswith("also trials ") for decision in still)
    assert rungs[first:].count("bn") >= LEAST_TRIALS
    assert len(still) == rungs.count("long") == len(trials.session.store.longs())
    [ended] = [d for d in run.decisions if d["decision"] == "ended the search"]
    assert ended["reason"].startswith("the last ")
    at_once = [len(list(group)) for rung, group in groupby(rungs) if rung == "long"]
    assert max(at_once) <= RUNGS["finalists"]


@pytest.mark.slow
def test_a_number_of_finalists_in_the_config_is_for_the_end(tmp_path: Path) -> None:
    trials = night(tmp_path, most=2_000, finalists=3)

    search(trials.session, trials)

    assert "long" not in rungs_of(trials)


def test_seeds_count_against_the_most_trials(tmp_path: Path) -> None:
    trials = with_seeds(night(tmp_path, most=4, workers=2), 8)

    run_first(trials.session, trials)

    assert trials.session.store.tally().begun == 4
    assert trials.session.store.waiting("seed") == 4


@pytest.mark.parametrize(("most", "first"), [(None, FIRST), (40, FIRST_SHARE * 40)])
@pytest.mark.parametrize("workers", [1, 5])
def test_seeds_and_the_first_proposals_come_before_the_long_fine_tunes(
    tmp_path: Path, most: int | None, first: float, workers: int
) -> None:
    trials = with_seeds(night(tmp_path, most=most, workers=workers), 8)

    run_first(trials.session, trials)

    roles = [trial.role for trial in trials.session.store.trials()]
    assert roles == ["seed"] * 8 + ["search"] * (int(first) - 8)
    assert "long" not in rungs_of(trials)


def test_a_resumed_night_has_no_second_first_trials(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    before = night(one, most=8)
    run_first(before.session, before)
    resumed = night(two, most=40)
    resumed.session.state |= {"first_trials_over": before.session.state["first_trials_over"]}

    run_first(resumed.session, resumed)

    assert asked(before)
    assert not asked(resumed)


def test_the_first_trials_leave_most_of_the_time_to_those_after_the_long_fine_tunes(tmp_path: Path) -> None:
    trials = with_seeds(night(tmp_path, most=None), 2)
    begun, real = Times().wall(), Times().awake()

    def spent() -> float:
        return 600.0 * len(asked(trials))

    times = Times(lambda: begun + spent(), lambda: real + spent(), lambda: real + spent())
    trials.session.clock = Clock(begun + 86_400, times=times)

    run_first(trials.session, trials)

    still = trials.session.clock.left_before("finalists", *ENDING)
    assert FIRST_SHARE < spent() / (spent() + still) < 1.5 * FIRST_SHARE
    assert 2 < len(trials.session.store.trials()) < FIRST
