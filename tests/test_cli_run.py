"""A real night on a tiny task, end to end through the command line: its files, its numbers, and what it survives."""

import hashlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml

import tiny
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.target import target_from_dict
from nightpress.evaluators.task import load_task
from nightpress.search.folder import read_run
from nightpress.search.proposals import baselines
from nightpress.search.records import TrialState
from nightpress.spaces.policy import Distill, FineTune, digest, policy_from_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

POINT_KEYS = {
    "trial", "digest", "accuracy", "accuracy_se", "split", "rung", "latency_ms", "low_ms", "high_ms", "measured",
    "size_bytes", "macs", "policy",
}  # fmt: skip
RUN_KEYS = {"run", "state", "phase", "deadline", "trials", "front", "baselines", "hypervolume", "seconds"}
STATES = {"COMPLETE", "STOPPED", "INFEASIBLE", "FAILED", "RUNNING"}
EXPORT_FILES = {
    "policy.json", "model.onnx", "model.safetensors", "config.pbtxt", "runtime.json", "card.md", "manifest.json",
    "reference.onnx", "finetune.yaml", "LICENSES.txt", "verify.py", "timer.py",
}  # fmt: skip
PHASES = ["inspect", "calibrate", "baselines", "sensitivity", "search", "finalists", "verify", "report"]

Cli = tiny.Cli


@pytest.fixture
def night(tmp_path_factory: pytest.TempPathFactory) -> tiny.Night:
    return tiny.night(tmp_path_factory)


def pruned_rules(night: tiny.Night) -> list[str]:
    """Uniform rules in INT8 that prune. On coarse channel steps, which the processor decides, some are the same."""
    task = load_task(night.task)
    target = target_from_dict(json.loads((night.run / "target.json").read_text())["target"])
    rules = baselines(inspect(task, step_of=target.channel_step)[0], distill=True)
    first = {digest(policy): name for name, policy in reversed(rules.items())}
    return [n for n, policy in rules.items() if "% INT8" in n and policy.prune and first[digest(policy)] == n]


# The night itself


def test_it_ends_well_and_prints_one_object(night: tiny.Night) -> None:
    data = night.result.json

    assert data.keys() >= RUN_KEYS
    assert (data["run"], data["state"]) == (str(night.run), "done")
    assert data["trials"].keys() == STATES
    assert data["trials"]["RUNNING"] == data["trials"]["FAILED"] == 0
    assert data["trials"]["COMPLETE"] >= 9
    assert list(data["seconds"]) == PHASES
    assert all(seconds >= 0 for seconds in data["seconds"].values())
    covered = data[
        "hypervolume"
    ]  # None where no trial of the search stands: integers are not faster on every processor
    assert covered is None or 0 <= covered <= 1


def test_it_says_what_it_does_on_stderr_only(night: tiny.Night) -> None:
    assert night.result.code == 0
    assert "phase search" in night.result.err
    assert "Warning" not in night.result.err
    assert "Traceback" not in night.result.err


def test_every_point_of_the_front_was_measured(night: tiny.Night) -> None:
    front = night.result.json["front"]
    assert front
    for point in front:
        assert point.keys() >= POINT_KEYS
        assert point["measured"] is True
        assert (point["split"], point["rung"]) == ("test", "long")
        assert point["low_ms"] <= point["latency_ms"] <= point["high_ms"]
        assert 0 <= point["accuracy"] <= 1
        assert point["size_bytes"] > 0
        assert digest(policy_from_json(json.dumps(point["policy"]), "front")) == point["digest"]
    latencies = [point["latency_ms"] for point in front]
    assert latencies == sorted(latencies)
    for one in front:  # nothing on a front is worse in everything
        assert not any(
            other["accuracy"] > one["accuracy"] and other["latency_ms"] < one["latency_ms"]
            and other["size_bytes"] < one["size_bytes"]
            for other in front
        )  # fmt: skip


def test_the_simple_rules_are_its_baselines(night: tiny.Night) -> None:
    baselines = night.result.json["baselines"]
    names = [point["name"] for point in baselines]
    fp32 = ["uniform 75% fp32", "uniform 50% fp32", "uniform 25% fp32"]  # left out where INT8 is faster and smaller
    assert [name for name in names if name not in fp32 and not name.startswith(("greedy", "global magnitude"))] == [
        "uncompressed", "uniform INT8", *pruned_rules(night)
    ]  # fmt: skip
    assert any(name.startswith("global magnitude") for name in names)  # each policy once, whoever comes to it
    for point in baselines:
        assert point.keys() >= POINT_KEYS
        assert point["measured"] is True
        assert point["split"] == "test"
    assert baselines[0]["policy"]["prune"] == baselines[0]["policy"]["bits"] == {}
    assert baselines[0]["size_bytes"] > 3 * baselines[1]["size_bytes"]


def test_its_folder_has_all_its_files(night: tiny.Night) -> None:
    assert {path.name for path in night.run.iterdir()} >= tiny.RUN_FILES
    assert not [path.name for path in night.run.rglob("*partial*")]
    config = yaml.safe_load((night.run / "config.yaml").read_text())
    assert config["search"]["max_trials"] == 4
    assert config["finetune"]["batch_size"] == 64
    decisions = [json.loads(line) for line in (night.run / "decisions.jsonl").read_text().splitlines()]
    assert {decision["phase"] for decision in decisions} >= {"inspect", "calibrate", "sensitivity", "search"}
    assert all(decision["decision"] and decision["reason"] for decision in decisions)
    log = [json.loads(line) for line in (night.run / "log.jsonl").read_text().splitlines()]
    assert [line["message"] for line in log if line["message"].startswith("phase ")] == [
        f"phase {name}" for name in PHASES[:-1]
    ]
    assert "tiny" in (night.run / "report.html").read_text()


def test_what_was_chosen_beforehand_is_tried_before_the_rules_get_their_long_fine_tunes(night: tiny.Night) -> None:
    trials = read_run(night.run).trials
    seeds = [trial for trial in trials if trial.role == "seed"]
    longs = [night.run / "artifacts" / str(t.number) / "long.json" for t in trials if t.role == "baseline"]
    begun = min(path.stat().st_mtime for path in longs if path.is_file())

    assert seeds
    assert all(trial.finished and trial.finished < begun for trial in seeds)


def test_its_artifacts_are_what_an_export_needs(night: tiny.Night) -> None:
    for trial in read_run(night.run).trials:
        folder = night.run / "artifacts" / str(trial.number)
        if trial.verified is not None:
            assert {path.name for path in folder.iterdir()} == {"long.json", "long.safetensors", "model.onnx"}
            assert (night.run / trial.verified.model_file).stat().st_size == trial.verified.size_bytes
        elif trial.state is TrialState.COMPLETE and trial.reused_from is None:
            assert {path.name for path in folder.iterdir()} == {"short.safetensors"}


def test_its_tables_hold_every_trial(night: tiny.Night) -> None:
    csv, parquet = pd.read_csv(night.run / "trials.csv"), pd.read_parquet(night.run / "trials.parquet")
    numbers = [trial.number for trial in read_run(night.run).trials]
    assert list(csv["trial"]) == list(parquet["trial"]) == numbers
    by_number = csv.set_index("trial")
    for point in night.result.json["front"]:
        assert by_number.loc[point["trial"], "accuracy"] == pytest.approx(point["accuracy"])
        assert by_number.loc[point["trial"], "latency_ms"] == pytest.approx(point["latency_ms"])


def test_status_agrees(night: tiny.Night, cli: Cli) -> None:
    assert cli("status", night.run, "--json").json == night.result.json


def test_status_and_report_for_people(night: tiny.Night, cli: Cli, tmp_path: Path) -> None:
    status = cli("status", night.run)
    assert status.code == 0
    assert f"{night.run}: done, phase report" in status.out
    page = tmp_path / "page.html"
    data = cli("report", night.run, "--out", page, "--json").json
    assert data["report"] == str(page)
    assert {key: data[key] for key in RUN_KEYS} == {key: night.result.json[key] for key in RUN_KEYS}
    assert page.stat().st_size > 1000


def test_the_layers_of_what_may_ship_are_on_record(night: tiny.Night) -> None:
    run = read_run(night.run)
    standing = {str(t.number) for t in run.trials if t.verified is not None and t.verified.struck_out is None}
    assert run.layers
    assert set(run.layers) <= standing
    names = {layer["name"] for layer in run.state["anatomy"]["layers"]}
    for costs in run.layers.values():
        assert costs["layers"].keys() <= names
        assert all(layer["ms"] > 0 and layer["bytes"] > 0 for layer in costs["layers"].values())


def test_compared_with_itself_nothing_differs(night: tiny.Night, cli: Cli) -> None:
    data = cli("compare", night.run, night.run, "--json").json
    assert len(data["runs"]) == 2
    assert data["front"]


def test_accuracy_to_search_is_of_the_search_split(night: tiny.Night) -> None:
    """A fifth of the training data; the test split was touched by verified trials alone."""
    for trial in read_run(night.run).trials:
        for quality in trial.qualities:
            assert (quality.split, quality.samples) == ("search", 40)
        if trial.verified is not None:
            assert (trial.verified.quality.split, trial.verified.quality.samples) == ("test", 80)


# What comes after it


def test_an_approval_keeps_who_when_what_and_why(night: tiny.Night, cli: Cli) -> None:
    front = night.result.json["front"]
    note = "checked on the camera: <ok> & „gut“"
    before = time.time()

    entry = cli("approve", night.run, str(front[0]["trial"]), "--note", note, "--json").json

    assert entry["trial"] == front[0]["trial"]
    assert entry["digest"] == front[0]["digest"]
    assert entry["note"] == note
    assert entry["who"]
    then = time.mktime(time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S"))
    assert before - 1 <= then <= time.time()
    assert entry in read_run(night.run).approvals
    page = (night.run / "report.html").read_text()
    assert "checked on the camera: &lt;ok&gt; &amp; „gut“" in page
    assert "<ok>" not in page


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The default choice, exported in a process of its own."""
    night = tiny.night(tmp_path_factory)
    out = tmp_path_factory.mktemp("exports") / "best"
    return out, tiny.nightpress("export", night.run, "best", "--out", out, "--json").json


def test_an_export_is_whole(exported: tuple[Path, dict[str, Any]], night: tiny.Night) -> None:
    out, data = exported
    assert {path.name for path in out.iterdir()} == set(data["files"]) == EXPORT_FILES
    assert data["dir"] == str(out)
    assert data.keys() >= {
        "dir", "files", "accuracy", "latency_ms", "reference_ms", "ratio", "size_bytes", "parity", "bits_used",
    }  # fmt: skip
    assert data["parity"].keys() >= {"top1_agreement", "max_abs_diff"}
    assert data["parity"]["top1_agreement"] > 0.9
    assert data["ratio"] == pytest.approx(data["reference_ms"] / data["latency_ms"])
    assert data["size_bytes"] == (out / "model.onnx").stat().st_size

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.name != "manifest.json"
    }
    assert {key: data[key] for key in manifest["measured"]} == manifest["measured"]
    points = {point["trial"]: point for point in night.result.json["front"]}
    chosen = points[manifest["trial"]]
    assert (manifest["policy"], data["accuracy"]) == (chosen["digest"], chosen["accuracy"])
    policy = (out / "policy.json").read_text()
    assert digest(policy_from_json(policy, "policy.json")) == chosen["digest"]
    assert json.loads(policy)["schema"] == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_an_export_made_twice_is_the_same(night: tiny.Night, cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert cli("export", night.run, "best", "--out", tmp_path / name, "--json").code == 0
    assert tiny.bare(tmp_path / "one") == tiny.bare(tmp_path / "two")


def run_onnx(folder: Path, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As the card says: onnxruntime alone, with the recorded session options."""
    runtime = json.loads((folder / "runtime.json").read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime["threads"]
    for name, value in runtime["session_config"].items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=runtime["providers"],
        disabled_optimizers=runtime["disabled_optimizers"],
    )  # fmt: skip
    return np.asarray(session.run(["logits"], {"input": inputs})[0])


def test_an_export_gives_the_accuracy_that_it_states(exported: tuple[Path, dict[str, Any]], night: tiny.Night) -> None:
    out, data = exported
    inputs, labels = load_task(night.task).test.tensors  # type: ignore[attr-defined]
    logits = run_onnx(out, inputs.numpy())
    assert logits.shape == (80, 4)
    assert float((logits.argmax(1) == labels.numpy()).mean()) == pytest.approx(data["accuracy"])
    np.testing.assert_allclose(run_onnx(out, inputs[3:4].numpy()), logits[3:4], atol=1e-5)  # any batch


@pytest.mark.parametrize("which", [0, -1])
def test_an_export_is_rebuilt_in_torch(night: tiny.Night, cli: Cli, tmp_path: Path, which: int) -> None:
    trial = next(t for t in read_run(night.run).trials if t.name == pruned_rules(night)[which])
    out, module_file = tmp_path / "export", tmp_path / "model.pt"
    # --force: whether it is faster than the original on this machine is not the question.
    assert cli("export", night.run, str(trial.number), "--out", out, "--json", "--force").code == 0

    data = cli(
        "apply", out / "policy.json", night.task, "--out", module_file, "--weights", out / "model.safetensors",
        "--json",
    ).json  # fmt: skip

    assert data["digest"] == trial.digest
    module = torch.load(module_file, weights_only=False)
    assert 0 < data["params"] <= sum(parameter.numel() for parameter in module.parameters()) < 19_000
    inputs = load_task(night.task).test.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        ours = module.eval()(inputs).numpy()
    theirs = run_onnx(out, inputs.numpy())
    cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    assert cosine.min() > 0.99


def test_a_trial_that_was_not_verified_is_exported_all_the_same(night: tiny.Night, cli: Cli, tmp_path: Path) -> None:
    trial = next(
        t for t in reversed(read_run(night.run).trials) if t.verified is None and t.state is TrialState.COMPLETE
    )
    data = cli("export", night.run, str(trial.number), "--out", tmp_path / "out", "--json").json
    assert {path.name for path in (tmp_path / "out").iterdir()} == EXPORT_FILES
    assert data["latency_ms"] > 0
    inputs, labels = load_task(night.task).test.tensors  # type: ignore[attr-defined]
    logits = run_onnx(tmp_path / "out", inputs.numpy())
    assert float((logits.argmax(1) == labels.numpy()).mean()) == pytest.approx(data["accuracy"])


# The steps of a night on their own


def test_inspect_prints_the_anatomy(night: tiny.Night, cli: Cli) -> None:
    data = cli("inspect", night.task, "--json").json
    assert data["model"].keys() >= {"params", "macs", "size_bytes"}
    assert data["model"]["params"] == sum(p.numel() for p in load_task(night.task).model.parameters())
    assert [layer["name"] for layer in data["layers"]] == ["stem", "block.conv1", "block.conv2", "head"]
    for key, names in (
        ("groups", {"name", "channels", "step", "layers", "macs"}),
        ("layers", {"name", "kind", "macs", "params", "bits"}),
        ("blocks", {"name"}),
        ("left_out", {"name", "reason"}),
    ):
        assert data[key]
        assert all(entry.keys() >= names for entry in data[key])


def test_policies_are_sampled_predicted_and_measured(night: tiny.Night, cli: Cli, tmp_path: Path) -> None:
    # What a run measured for its target is a profile, which may refuse bits that are sampled for another one.
    profile = night.run / "target.json"
    words = ("sample", night.task, "--target", profile, "-n", "3", "--seed", "1", "--json", "--out")
    sampled = cli(*words, tmp_path / "a").json["policies"]
    assert len(sampled) == 3
    assert [file["digest"] for file in cli(*words, tmp_path / "b").json["policies"]] == [f["digest"] for f in sampled]
    assert tiny.bare(tmp_path / "a") == tiny.bare(tmp_path / "b")
    files = [file["file"] for file in sampled]

    predicted = cli("predict", night.task, *files, "--target", profile, "--json").json["policies"]
    measured = cli("measure", night.task, *files, "--target", "onnxruntime", "--json").json["policies"]

    for rows in (predicted, measured):
        assert [(row["file"], row["digest"]) for row in rows] == [(f["file"], f["digest"]) for f in sampled]
    for row in predicted:
        assert row.keys() >= {"latency_ms", "low_ms", "high_ms", "size_bytes", "macs"}
        assert 0 < row["low_ms"] <= row["latency_ms"] <= row["high_ms"]
    for row, guess in zip(measured, predicted, strict=True):
        assert row.keys() >= {"latency_ms", "repeat_error", "reference_ms", "ratio"}
        assert row["latency_ms"] > 0
        assert row["ratio"] == pytest.approx(row["reference_ms"] / row["latency_ms"])
        assert guess["size_bytes"] == row["size_bytes"]


def test_a_target_is_calibrated(night: tiny.Night, cli: Cli, tmp_path: Path) -> None:
    profile = tmp_path / "here.json"
    data = cli("calibrate", night.task, "--target", "onnxruntime", "-n", "10", "--out", profile, "--json").json

    assert data.keys() >= {"profile", "target", "models_measured", "seconds", "heldout", "truth_repeat"}
    assert data["profile"] == str(profile)
    assert data["target"]["runtime"] == "onnxruntime"
    assert data["heldout"].keys() >= {"n", "mape", "within_5", "within_10", "spearman", "interval_coverage"}
    assert data["truth_repeat"].keys() >= {"mape", "within_10"}
    assert data["models_measured"] == data["heldout"]["n"] == len(json.loads(profile.read_text())["points"])
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(night.result.json["front"][0]["policy"]))
    row = cli("predict", night.task, policy, "--target", profile, "--json").json["policies"][0]
    assert row["latency_ms"] > 0


# What it knows beyond itself


def test_suggestions_are_untried_policies_within_the_limits(
    night: tiny.Night, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = json.loads((night.run / "state.json").read_text())["reference"]
    most = 0.9 * reference["latency_ms"]

    found = tiny.call("suggest", night.run, "--max-latency-ms", most, "--min-accuracy", 0.05, "--json", capsys=capsys)

    assert found.code == 0, found.err
    tried = {trial["digest"] for trial in night.result.json["front"] + night.result.json["baselines"]}
    assert all(point["latency_ms"] <= most and point["measured"] for point in found.json["verified"])
    assert found.json["suggested"]
    for entry in found.json["suggested"]:
        assert entry["latency_ms"] <= most * 1.0001
        assert 0 <= entry["accuracy_low"] < entry["accuracy"] <= entry["accuracy_high"] <= 1
        assert entry["low_ms"] <= entry["latency_ms"] <= entry["high_ms"]
        assert entry["digest"] not in tried
        assert digest(policy_from_json(json.dumps(entry["policy"]), "suggested")) == entry["digest"]
    policies = [policy_from_json(json.dumps(entry["policy"]), "suggested") for entry in found.json["suggested"]]
    networks = {digest(replace(policy, finetune=FineTune(), distill=Distill())) for policy in policies}
    assert len(networks) == len(policies)  # not one with five fine-tunes


def _suggested_with(night: tiny.Night, folder: Path, capsys: pytest.CaptureFixture[str], **changed: Any) -> Any:
    """What is suggested for a copy of the night whose target file says something else."""
    run = folder / "run"
    shutil.copytree(night.run, run)
    target = json.loads((run / "target.json").read_text())
    (run / "target.json").write_text(json.dumps(target | changed))
    return tiny.call("suggest", run, "--min-accuracy", 0.05, "--json", capsys=capsys).json["suggested"]


def test_a_run_of_another_device_has_suggestions_for_that_device(
    night: tiny.Night, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = json.loads((night.run / "target.json").read_text())["device"] | {"cpu": "Another CPU"}

    found = _suggested_with(night, tmp_path, capsys, device=device)

    assert {entry["forced"] for entry in found} == {None}


def test_suggestions_lie_on_the_channel_steps_that_the_night_measured(
    night: tiny.Night, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    channels = {group.name: group.channels for group in tiny.anatomy_of(Path(night.task.partition(":")[0])).groups}
    target = json.loads((night.run / "target.json").read_text())["target"] | {"channel_steps": [[0, 8]]}

    found = _suggested_with(night, tmp_path, capsys, target=target)

    kept = [channels[name] * (1 - ratio) for entry in found for name, ratio in entry["policy"]["prune"].items()]
    assert kept
    assert all(round(value, 6) % 8 == 0 for value in kept)


def test_suggestions_say_what_their_run_was_forced_to_overlook(
    night: tiny.Night, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _suggested_with(night, tmp_path, capsys, forced=["cpu was 'Another CPU'"])

    assert {entry["forced"] for entry in found} == {"cpu was 'Another CPU'"}


def test_a_limit_of_nothing_is_refused(night: tiny.Night, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = tiny.refused(tiny.call("suggest", night.run, "--max-latency-ms", 0, capsys=capsys))

    assert "--max-latency-ms must be above 0 and finite, but got 0" in sentence


def test_a_night_says_why_its_finalists_are_as_they_are(night: tiny.Night) -> None:
    why = json.loads((night.run / "why.json").read_text())
    verified = [t for t in night.result.json["front"] if t["role"] != "baseline"]

    assert {str(trial["trial"]) for trial in verified} <= set(why)
    policies = {str(t.number): t.policy for t in read_run(night.run).trials}
    for number, entries in why.items():
        made = {("group", name): ratio for name, ratio in policies[number]["prune"].items()}
        made |= {("block", name): "removed" for name in policies[number]["removed_blocks"]}
        made |= {("layer", name): f"{b['weights']}/{b['activations']}" for name, b in policies[number]["bits"].items()}
        assert entries
        assert {(entry["kind"], entry["name"]): entry["choice"] for entry in entries}.items() <= made.items()
        for entry in entries:
            assert entry.keys() == {
                "kind", "name", "choice", "sensitivity", "saved_ms", "accuracy_cost", "measured",
            }  # fmt: skip
            assert np.isfinite(entry["saved_ms"])
            assert -1 <= entry["accuracy_cost"] <= 1
        assert sum(entry["measured"] for entry in entries) == min(3, len(entries))
        rest = [entry["saved_ms"] for entry in entries if not entry["measured"]]
        assert rest == sorted(rest, reverse=True)
    for trial in verified:  # faster than the original by what was chosen
        assert max(entry["saved_ms"] for entry in why[str(trial["trial"])]) > 0
