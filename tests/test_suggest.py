"""What is suggested of a run's folder: all that its study knows counts, and what has no price is left out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from nightpress.cli.config import load_config
from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.profile import profile_to_dict
from nightpress.evaluators.latency.target import Target
from nightpress.search.config import Limits
from nightpress.search.folder import read_run
from nightpress.search.prepare import space_of
from nightpress.search.records import Quality, Rung, TrialState
from nightpress.search.store import Store, open_storage
from nightpress.search.suggest import known_of, suggest
from nightpress.search.surrogate import RUNGS
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import choices_of
from nightpress.spaces.policy import FP32, Policy

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A night that goes on: eight trials so far, on a target that was only ever seen to run fp32. The first has had its
    long fine-tune."""
    place = tiny.place(tmp_path_factory)
    config = tiny.config_for(place, tmp_path)
    folder, space = tiny.write_run(config), space_of(place.anatomy, load_config(config))
    generator, floats = np.random.default_rng(0), replace(space, bit_choices=(FP32,))
    profile = calibrate(
        place.anatomy, [floats.random(generator) for _ in range(12)], Target(), timer=tiny.FormulaTimer()
    )
    (folder / "target.json").write_text(json.dumps(profile_to_dict(profile)))
    reference = {"accuracy": 0.5, "latency_ms": profile.reference_ms, "size_bytes": 4 * place.anatomy.params}
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"model": place.anatomy.digest, "reference": reference}))
    store = Store(open_storage(folder, None))
    for policy in [Policy(model=place.anatomy.digest), *(floats.random(generator) for _ in range(7))]:
        asked = store.study.ask()
        [(latency_ms, size_bytes)] = profile.costs(choices_of(place.anatomy, [policy])).tolist()
        planned = plan(place.anatomy, policy)
        store.begin(asked, policy, 0.0)
        store.note(
            asked.number, size_bytes=int(size_bytes), macs=planned.macs, params=planned.params,
            predicted={"latency_ms": latency_ms, "low_ms": latency_ms, "high_ms": latency_ms, "measured": False},
        )  # fmt: skip
        store.note_quality(asked.number, quality(Rung.SHORT, 0.9 - 0.1 * sum(policy.prune.values())))
        store.finish(asked.number, TrialState.COMPLETE, finished=1.0)
    store.note_long(0, quality(Rung.LONG, 0.95))
    return folder


def quality(rung: Rung, accuracy: float) -> Quality:
    return Quality(rung=rung, split="search", accuracy=accuracy, accuracy_se=0.01, samples=400, seconds=1.0)


def test_a_long_fine_tune_counts_before_it_is_verified(run: Path) -> None:
    seen = known_of(read_run(run)).experience.observations()

    assert [s.accuracy for s in seen if RUNGS[s.rung] == Rung.LONG] == [0.95]
    assert len(seen) == 9


def test_a_policy_that_nobody_can_price_is_not_suggested_however_slow_it_may_be(run: Path) -> None:
    reference_ms = json.loads((run / "state.json").read_text())["reference"]["latency_ms"]

    found = suggest(read_run(run), Limits(max_latency_ms=3 * reference_ms))["suggested"]

    assert found
    assert all(entry["latency_ms"] <= 3 * reference_ms and not entry["policy"]["bits"] for entry in found)


def test_without_verified_trials_accuracies_are_those_that_the_given_networks_splits_let_expect(run: Path) -> None:
    def medians() -> list[float]:
        return [entry["accuracy"] for entry in suggest(read_run(run), Limits(max_latency_ms=1e9))["suggested"]]

    before, state = medians(), json.loads((run / "state.json").read_text())
    given = {"search": {"accuracy": 0.97}, "test": {"accuracy": 0.89}}
    (run / "state.json").write_text(json.dumps(state | {"given": given}))

    assert before
    assert medians() == pytest.approx([accuracy - 0.08 for accuracy in before], abs=1e-3)


@pytest.mark.parametrize(
    ("accuracy", "rule"),
    [("90", "at most 1, but got 90"), ("0", "above 0, but got 0"), ("nan", "above 0, but got nan")],
)
def test_an_accuracy_in_per_cent_is_refused(
    run: Path, accuracy: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = tiny.refused(tiny.call("suggest", run, "--min-accuracy", accuracy, capsys=capsys))

    assert f"--min-accuracy must be {rule}" in sentence
