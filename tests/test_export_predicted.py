"""Where the night's device or its profile's was another one: every file and line of an export says so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import exports
import tiny
from nightpress.evaluators.latency.target import Target, fingerprint, fingerprint_to_dict
from nightpress.export import export_set, export_trial
from nightpress.search.records import RunRecord, Verified
from nightpress.search.store import Store, open_storage

FORCED = "its profile is of CPU Slow, not Fast"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return exports.record(exports.run_folder(tmp_path_factory))


def predicted(verified: Verified | None, share: float) -> Verified:
    """The same figures as predictions whose intervals reach so far, as a share of the latency."""
    assert verified is not None
    latency_ms = verified.latency.latency_ms
    latency = replace(
        verified.latency, measured=False, repeat_error=None, low_ms=latency_ms / (1 + share),
        high_ms=latency_ms * (1 + share), forced=FORCED,
    )  # fmt: skip
    return replace(verified, latency=latency)


@pytest.mark.parametrize(("share", "margin"), [(0.5, 0.5), (0.02, 0.1)])
def test_the_ratio_is_stated_within_the_prediction_s_own_interval(
    run: RunRecord, tmp_path: Path, share: float, margin: float
) -> None:
    """Otherwise verify on the device would fail what is as fast as it was predicted to be at the worst."""
    trial = replace(run.trials[2], verified=predicted(run.trials[2].verified, share))
    export_trial(run, trial, tmp_path / "out")
    measured = json.loads((tmp_path / "out" / "manifest.json").read_text())["measured"]
    assert measured["ratio_low"] == pytest.approx(0.4 / 0.1 / (1 + margin))
    assert measured["ratio_high"] == pytest.approx(0.4 / 0.1 * (1 + margin))
    assert (measured["low_ms"], measured["high_ms"]) == pytest.approx((0.1 / (1 + share), 0.1 * (1 + share)))
    assert (measured["latency_measured"], measured["forced"], measured["repeat_error"]) == (False, FORCED, None)


def test_a_measured_latency_keeps_its_interval(run: RunRecord, tmp_path: Path) -> None:
    export_trial(run, run.trials[2], tmp_path / "out")
    measured = json.loads((tmp_path / "out" / "manifest.json").read_text())["measured"]
    assert (measured["latency_measured"], measured["forced"]) == (True, None)
    assert measured["ratio_low"] == pytest.approx(4 / 1.11)  # 10 % and the repeat error of 1 %
    assert measured["high_ms"] == pytest.approx(0.101)


def test_the_card_states_no_repeat_error_of_a_prediction(run: RunRecord, tmp_path: Path) -> None:
    trial = replace(run.trials[2], verified=predicted(run.trials[2].verified, 0.5))
    export_trial(run, trial, tmp_path / "out")
    text = (tmp_path / "out" / "card.md").read_text()
    assert "| latency | 0.100 ms (predicted) | 0.400 ms |" in text
    assert f"**predicted, not measured** (0.067 to 0.150 ms in 90 % of cases; {FORCED})" in text
    assert "repeat error" not in text


def test_a_set_says_which_latencies_are_predictions(run: RunRecord, tmp_path: Path) -> None:
    mixed = [replace(run.trials[3], verified=predicted(run.trials[3].verified, 0.5)), run.trials[0]]
    export_set(run, mixed, 2, tmp_path / "mixed")
    export_set(run, [run.trials[3], run.trials[0]], 2, tmp_path / "measured")
    listing, known = (json.loads((tmp_path / name / "set.json").read_text()) for name in ("mixed", "measured"))
    assert [(m["latency_measured"], m["forced"]) for m in listing["models"]] == [(False, FORCED), (True, None)]
    assert "Where latency_measured is false, latency_ms is a prediction" in listing["rule"]
    assert "of the measured device" not in listing["rule"]
    assert known["rule"].endswith("Latencies are those of the measured device: elsewhere time each model first.")


@pytest.mark.parametrize("which", [["2"], ["--set", "2"]])
def test_the_command_says_what_is_predicted(run: RunRecord, cli: tiny.Cli, tmp_path: Path, which: list[str]) -> None:
    folder = exports.copy_of(run.path, tmp_path)
    store = Store(open_storage(folder, None))
    for trial in run.trials:
        store.verify(trial.number, predicted(trial.verified, 0.5))
    result = cli("export", folder, *which, "--out", tmp_path / "out")
    figures = [line for line in result.out.splitlines() if line.startswith("accuracy")]
    assert len(figures) == len(which)
    assert all(f" ms (predicted, not measured; --force: {FORCED}) against 0.400 ms" in line for line in figures)


# A profile of another device that was taken by force: what is measured, is measured here


OTHER = {
    **fingerprint_to_dict(fingerprint(Target())), "cpu": "Slow CPU", "machine": "x86_64", "flags": [], "cores": 64,
    "session_config": {"session.x64quantprecision": "1"},
}  # fmt: skip


def forced(run: RunRecord, **state: Any) -> RunRecord:
    """The run as one that had another device's profile, on this machine unless ``state`` says otherwise."""
    target = {**(run.target or {}), "device": OTHER, "forced": [FORCED]}
    device = fingerprint_to_dict(fingerprint(Target()))
    return replace(run, target=target, state={**run.state, "device": device, **state})


@pytest.mark.slow
def test_what_was_measured_under_another_device_s_profile_names_the_device_that_measured(
    run: RunRecord, cli: tiny.Cli, tmp_path: Path
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    export_trial(run, run.trials[2], plain)
    export_trial(forced(run), run.trials[2], out)

    for name in ("runtime.json", "config.pbtxt"):
        assert (out / name).read_text() == (plain / name).read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    here = fingerprint_to_dict(fingerprint(Target()))
    assert manifest["origin"]["device"] == here
    assert (manifest["measured"]["latency_measured"], manifest["measured"]["forced"]) == (True, FORCED)
    card = (out / "card.md").read_text()
    assert "Slow CPU" not in card.replace(FORCED, "")
    assert here["cpu"] in card
    assert f"**found by a profile that does not hold** (--force); {FORCED}" in card
    assert "--force" not in (plain / "card.md").read_text()
    trained = cli("finetune", out, "--epochs", 0, "--out", tmp_path / "trained")
    assert f" ms (--force: {FORCED}) against " in trained.out  # it was found so, whoever measures it later


def test_the_device_of_a_forced_run_that_did_not_record_it_is_not_known(run: RunRecord, tmp_path: Path) -> None:
    export_trial(forced(run, device=None), run.trials[2], tmp_path / "out")
    runtime = json.loads((tmp_path / "out" / "runtime.json").read_text())
    assert (runtime["device"], runtime["session_config"]) == (None, {})
    assert "unknown CPU" in (tmp_path / "out" / "card.md").read_text()


def test_a_kit_s_device_stays_that_of_its_predictions(run: RunRecord, tmp_path: Path) -> None:
    given = forced(run)
    kit = replace(given, target={**(given.target or {}), "remote": True})
    trial = replace(run.trials[2], verified=predicted(run.trials[2].verified, 0.5))
    export_trial(kit, trial, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "runtime.json").read_text())["device"] == OTHER
