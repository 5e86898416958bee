"""What is suggested of a run's folder: all that its study knows counts, and what has no price is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fakes_run
import tiny
from nightpress.cli.config import load_config
from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.profile_file import profile_to_dict
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
    given = {split: {"accuracy": 0.6, "accuracy_se": None} for split in ("search", "test")}
    state = json.loads((folder / "state.json").read_text())
    state |= {"model": place.anatomy.digest, "reference": reference, "given": given}
    (folder / "state.json").write_text(json.dumps(state))
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
    # A fine-tune has told since what is still remembered of the search split.
    (run / "state.json").write_text(json.dumps(state | {"given": given, "split_gap": 0.03}))
    assert suggest(read_run(run), Limits())["basis"]["shift"] == -0.03


def test_intervals_hold_what_a_reading_of_the_test_split_is_off_by(run: Path) -> None:
    """That is what is verified of them."""

    def widths() -> list[float]:
        found = suggest(read_run(run), Limits(max_latency_ms=1e9))["suggested"]
        return [entry["accuracy_high"] - entry["accuracy_low"] for entry in found]

    before, state = widths(), json.loads((run / "state.json").read_text())
    given = {"search": {"accuracy": 0.9}, "test": {"accuracy": 0.9, "accuracy_se": 0.01}}
    (run / "state.json").write_text(json.dumps(state | {"given": given}))

    assert before
    assert all(wide > max(narrow, 0.02) for narrow, wide in zip(before, widths(), strict=True))


def judge(run: Path, number: int, accuracy: float, latency_ms: float, struck_out: str | None, **more: Any) -> None:
    """Verify a trial, beside an original of 0.87 ms, and strike it out where it says why."""
    record = fakes_run.verify(fakes_run.trial(number, accuracy, latency_ms), struck_out=struck_out, **more)
    assert record.verified is not None
    Store(open_storage(run, None)).verify(number, record.verified)


def test_what_only_the_limits_of_the_run_struck_out_is_judged_by_the_limits_asked_for(run: Path) -> None:
    judge(run, 1, 0.85, 0.2, "test accuracy 0.8500 is below min_accuracy 0.9")
    judge(run, 2, 0.85, 0.9, "not surely faster than the original: 0.918 ms against 0.870 ms")
    judge(run, 4, 0.84, 0.3, "test accuracy 0.8400 is below min_accuracy 0.9")  # and worse than trial 1
    judge(run, 3, 0.85, 0.2, "the exported file agrees with torch on only 80.0%", top1_agreement=0.8)

    def within(least: float) -> list[int]:
        return [entry["trial"] for entry in suggest(read_run(run), Limits(min_accuracy=least))["verified"]]

    assert within(0.8) == [1]
    assert within(0.86) == []


def test_no_suggestion_is_expected_to_be_worse_in_everything_than_a_verified_point(run: Path) -> None:
    """Luck alone might make it better, which is worth a trial only while a search goes on."""
    reference_ms = json.loads((run / "state.json").read_text())["reference"]["latency_ms"]
    judge(run, 1, 0.88, 0.57 * reference_ms, None, size_bytes=2000)
    found = suggest(read_run(run), Limits(min_accuracy=0.6))
    [point] = found["verified"]

    assert found["suggested"]
    for entry in found["suggested"]:
        better = entry["latency_ms"] < point["latency_ms"] or entry["size_bytes"] < point["size_bytes"]
        assert better or entry["accuracy"] > point["accuracy"]


def test_the_command_says_what_the_run_struck_out_and_what_its_accuracies_rest_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("suggest", run, "--max-latency-ms", 1e9)
    basis = tiny.call(*words, "--json", capsys=capsys).json["basis"]
    assert basis == {"rung": "short", "seen": 8, "shift": 0.0, "verified": 0}
    assert "+0.0 points against the search split, as the uncompressed network's, since none was verified." in said(
        words, capsys
    )

    for number in (1, 2):
        lost = fakes_run.quality(0.9 + 0.01 * number, rung="long")
        judge(
            run,
            number,
            0.85 + 0.01 * number,
            0.2 * number,
            "test accuracy is below min_accuracy 0.9",
            search_quality=lost,
        )

    text = said(words, capsys)
    assert "The run's own limits struck out 1, 2 of them: nightpress export takes such with --force." in text
    assert "after the rung short, to which 8 trials came, on the test split: -5.0 points" in text
    assert "against the search split, the mean of 2 verified." in text


def said(words: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> str:
    return tiny.call(*words, capsys=capsys).out


@pytest.mark.parametrize(
    ("accuracy", "rule"),
    [
        ("90", "at most 1, but got 90"),
        ("0", "above 0 and finite, but got 0"),
        ("nan", "above 0 and finite, but got nan"),
        ("inf", "above 0 and finite, but got inf"),
    ],
)
def test_an_accuracy_in_per_cent_is_refused(
    run: Path, accuracy: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = tiny.refused(tiny.call("suggest", run, "--min-accuracy", accuracy, capsys=capsys))

    assert f"--min-accuracy must be {rule}" in sentence
