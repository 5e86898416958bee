"""The study at the start of a night: how many policies, which steps, and what is chosen from what they show."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from nightpress.search.config import FineTuneConfig, RunConfig, SearchConfig
from nightpress.search.records import Quality, Rung, TrialRecord, TrialState
from nightpress.search.rungs import agreements, correlations
from nightpress.search.study import choose, next_rung, planned, rungs_of, studying

LOOKS, STEPS = (8, 16, 32), 64


def config(*, max_trials: int | None = None, without: tuple[str, ...] = (), **finetune: int) -> RunConfig:
    search = SearchConfig(max_trials=max_trials, without=without)
    return RunConfig(task="t", base=None, out=Path("out"), search=search, finetune=FineTuneConfig(**finetune))


def plan_of(settings: RunConfig, *, short_steps: int = STEPS, payable: float = 100.0) -> dict[str, object]:
    return planned(settings, short_steps=short_steps, train_items=3200, rules=8, payable=payable)


def trial(number: int, bn: float, looks: tuple[float, ...], top: float) -> TrialRecord:
    qualities = tuple(
        Quality(rung=rung, split="search", accuracy=value, accuracy_se=0.01, samples=800, seconds=1.0)
        for rung, value in (("bn", bn), ("short", top))
    )
    return TrialRecord(
        number=number, state=TrialState.COMPLETE, role="search", name=None, digest=f"{number:x}", policy={},
        qualities=qualities, looks=tuple(zip(LOOKS, looks, strict=True)),
    )  # fmt: skip


def trials(count: int, noise: tuple[float, float, float, float], seed: int = 0) -> list[TrialRecord]:
    """Trials whose cheap rungs (re-estimation, then each look) show their end with so much noise."""
    generator = np.random.default_rng(seed)
    ends = generator.uniform(0.5, 0.95, count)
    shown = ends[:, None] - 0.1 + generator.normal(0, 1, (count, 4)) * noise
    return [trial(i, row[0], tuple(row[1:]), end) for i, (row, end) in enumerate(zip(shown, ends, strict=True))]


def test_thirty_policies_are_studied_where_there_is_time_and_fewer_where_there_is_not() -> None:
    assert plan_of(config()) == {"looks": [8, 16, 32], "study": 30}
    assert plan_of(config(), payable=20.0)["study"] == 8 + 6
    assert plan_of(config(max_trials=10))["study"] == 8 + 3
    assert planned(config(), short_steps=STEPS, train_items=3200, rules=2, payable=1.0)["study"] == 6


def test_a_look_that_costs_as_much_as_it_can_save_is_none() -> None:
    """Judging 800 items takes 4.4 steps of 64."""
    assert plan_of(config(), short_steps=16)["looks"] == [2, 4]
    assert plan_of(config(), short_steps=8) == {"part_steps": 0}
    assert plan_of(config(), short_steps=1) == {"part_steps": 0}


def test_the_config_wins_and_without_rungs_there_is_none() -> None:
    assert plan_of(config(part_steps=20)) == {"part_steps": 20}
    assert plan_of(config(part_steps=0)) == {"part_steps": 0}
    assert plan_of(config(part_steps=99)) == {"part_steps": 0}
    assert plan_of(config(without=("rungs",))) == {"part_steps": 0}


def test_the_cheapest_is_taken_that_is_not_clearly_worse() -> None:
    found, part, bn = choose(trials(30, (0.15, 0.1, 0.02, 0.02)), LOOKS, STEPS)

    assert (part, bn) == (16, True)
    assert [(c.rung, c.steps, c.share) for c in found] == [
        ("bn", 0, 0.0), ("part", 8, 0.125), ("part", 16, 0.25), ("part", 32, 0.5),
    ]  # fmt: skip
    assert all(c.low < c.rank_correlation < c.high for c in found)
    assert all(c.pairs == 30 for c in found)


def test_where_re_estimation_ranks_as_well_no_part_is_needed() -> None:
    assert choose(trials(30, (0.02, 0.02, 0.02, 0.02)), LOOKS, STEPS)[1:] == (0, True)


def test_re_estimation_that_ranks_by_chance_is_dropped() -> None:
    assert choose(trials(30, (9.0, 0.02, 0.02, 0.02)), LOOKS, STEPS)[1:] == (8, False)


@pytest.mark.parametrize(
    "seen", [[], trials(5, (0.1, 0.1, 0.1, 0.1)), [trial(i, 0.5, (0.5,) * 3, 0.9) for i in range(9)]]
)
def test_of_too_few_or_too_alike_nothing_is_concluded(seen: list[TrialRecord]) -> None:
    assert choose(seen, LOOKS, STEPS) == ([], 0, True)


def test_what_may_rank_by_chance_is_no_rung_however_few_policies_were_studied() -> None:
    """With eight, the interval of noise is so wide that it is seldom clearly worse than a part that ranks well."""
    kept = [choose(trials(8, (5.0, 0.01, 0.01, 0.01), seed), LOOKS, STEPS) for seed in range(20)]
    assert sum(bn for _, _, bn in kept) <= 2
    assert all(part or bn for _, part, bn in kept)

    noise = [choose(trials(8, (5.0, 5.0, 5.0, 5.0), seed), LOOKS, STEPS) for seed in range(20)]
    silent = [(part, bn) for found, part, bn in noise if all(candidate.low <= 0 for candidate in found)]
    assert len(silent) >= 10
    assert set(silent) == {(0, False)}


def test_a_rung_that_shows_the_same_of_all_is_no_candidate() -> None:
    seen = [trial(i, 0.1, (0.1, 0.5 + i / 100, 0.5 + i / 90), 0.6 + i / 80) for i in range(20)]
    found, part, bn = choose(seen, LOOKS, STEPS)
    assert [c.steps for c in found] == [16, 32]
    assert (part, bn) == (16, False)


def test_the_rungs_of_a_night_follow_from_its_state() -> None:
    new, old = {"looks": [2], "study": 9, "short_steps": 4}, {"short_steps": 4}
    assert studying(new)
    assert not studying(old)
    assert rungs_of(old) == rungs_of(new) == (Rung.BN, Rung.SHORT)
    chosen = {**new, "part_steps": 2, "bn": False}
    assert not studying(chosen)
    assert rungs_of(chosen) == (Rung.PART, Rung.SHORT)
    assert [next_rung({**new, "part_steps": 2}, reached) for reached in (None, "bn", "part")] == ["bn", "part", "short"]
    assert next_rung(chosen, "bn") == "part"
    assert next_rung(old, "part") == "short"


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=3, max_size=12))
def test_equal_accuracies_share_a_rank(rows: list[tuple[int, int, int]]) -> None:
    values = np.array(rows, dtype=np.float64)
    found = correlations(values[:, :2], values[:, 2])
    for column in range(2):
        constant = values[:, column].std() == 0 or values[:, 2].std() == 0
        if constant:
            assert np.isnan(found[column])
        else:
            assert found[column] == pytest.approx(spearmanr(values[:, column], values[:, 2])[0])


def test_the_part_is_checked_on_the_finalists_too() -> None:
    seen = [{"bn": i % 3, "part": i, "short": i, "long": i + 0.5} for i in range(8)]
    found = {a.rung: a for a in agreements(seen)}
    assert found.keys() == {"bn", "part", "short"}
    assert found["part"].rank_correlation == 1.0
    assert found["bn"].rank_correlation < 0.9
