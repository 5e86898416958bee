"""What production reads: the files of an export, the numbers on its card, and folders that are whole or not there."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import fakes_run
import tiny
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Recipe
from nightpress.evaluators.latency.measure import Timing
from nightpress.evaluators.latency.target import Target, target_to_dict
from nightpress.evaluators.latency.timer import processor, session_config
from nightpress.export import Options, export_trial
from nightpress.export.folder import swap
from nightpress.search.mark import mark
from nightpress.search.records import RunRecord, TrialRecord, TrialState
from nightpress.search.session import latency_of
from nightpress.search.verification import verified_of
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import INT8, Policy, digest, policy_from_json, policy_to_dict

FORCE = Options(force=True)
DEVICE = {**processor(), "cpu": "Slow CPU", "runtime_version": "9.9.9"}
TIMING = Timing(windows_ms=(0.0128, 0.01344, 0.02), reference_ms=0.0256)


@dataclass(frozen=True, slots=True)
class Finished:
    """A run in which trial 1 was verified, and what its folder is made from."""

    run: RunRecord
    trial: TrialRecord
    policy: Policy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Trained, exported and compared for real, but timed by hand."""
    place = tiny.place(tmp_path_factory)
    folder = tmp_path_factory.mktemp("finished") / "run"
    anatomy, threads = place.anatomy, torch.get_num_threads()
    policy = Policy(
        model=anatomy.digest, prune={"block.conv1": 0.5}, bits={"block.conv1": INT8, "block.conv2": INT8},
    )  # fmt: skip
    recipe = Recipe(
        task=place.task, base=None, anatomy=anatomy, seed=0, compute=Compute(), batch_size=64, threads=1,
        disabled_optimizers=Target().disabled_optimizers,
    )  # fmt: skip
    job = Job(policy=policy, rung="long", seed=0, steps=1, folder=folder / "artifacts" / "1")
    outcome = Evaluator(recipe)(job)
    verified = verified_of(
        outcome, latency_of(TIMING), rung="long", model_file="artifacts/1/model.onnx", struck_out=None
    )
    trial = fakes_run.trial(
        1, policy=policy_to_dict(policy), digest=digest(policy), size_bytes=verified.size_bytes, verified=verified
    )
    uncompressed = Policy(model=anatomy.digest)
    original = fakes_run.original(policy=policy_to_dict(uncompressed), digest=digest(uncompressed))
    run = RunRecord(
        path=folder,
        config={
            "task": place.task, "base": None, "seed": 0, "target": target_to_dict(Target()), "limits": {},
            "finetune": {"batch_size": 64},
        },
        state={
            "state": "done", "task": "tiny", "model": anatomy.digest, "data": "da7a", "code": "c0de",
            "reference_accuracy": {"given": 0.8, "trained_longer": 0.85, "counted": 0.85},
            "mark": mark(place.task, None),
        },
        trials=(original, trial), decisions=(), sensitivity=None,
        target={"device": DEVICE},
        approvals=(
            {"trial": 1, "digest": trial.digest, "note": "checked", "who": "ada", "time": "2026-01-31T07:10:00+0000"},
            {"trial": 0, "digest": original.digest, "note": "not this one", "who": "bob", "time": "2026-01-31"},
        ),
    )  # fmt: skip
    yield Finished(run, trial, policy)
    torch.set_num_threads(threads)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exports" / "tiny"


def leftovers(out: Path) -> list[str]:
    """What stands beside an export that does not belong there."""
    return sorted(path.name for path in out.parent.iterdir() if path != out) if out.parent.is_dir() else []


# The files


def test_the_folder_holds_what_the_trial_was(finished: Finished, out: Path) -> None:
    data = export_trial(finished.run, finished.trial, out)

    verified = finished.trial.verified
    assert verified is not None
    source = finished.run.path / "artifacts" / "1"
    assert (out / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()
    assert (out / "model.safetensors").read_bytes() == (source / "long.safetensors").read_bytes()
    assert load_file(out / "model.safetensors").keys() >= {"stem.weight", "block.conv1.weight", "head.weight"}
    policy = (out / "policy.json").read_text()
    assert policy_from_json(policy, "policy.json") == finished.policy
    assert json.loads(policy)["digests"] == {"model": finished.policy.model, "data": "da7a", "code": "c0de"}
    assert leftovers(out) == []

    assert data["latency_ms"] == 0.0128
    assert data["reference_ms"] == 0.0256
    assert data["ratio"] == 2.0
    assert data["repeat_error"] == pytest.approx(0.05)
    assert data["accuracy"] == verified.quality.accuracy
    assert data["bits_used"] == {"stem": "fp32", "block.conv1": "int8", "block.conv2": "int8", "head": "fp32"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["trial"] == 1
    assert manifest["digests"] == json.loads(policy)["digests"]
    assert manifest["measured"]["parity"] == data["parity"]
    for file in out.iterdir():
        assert file.stat().st_mode & 0o444 == 0o444  # what serves it may be another user


def test_the_runtime_file_repeats_the_measurement_s_options(finished: Finished, out: Path) -> None:
    export_trial(finished.run, finished.trial, out)
    assert json.loads((out / "runtime.json").read_text()) == {
        "runtime": "onnxruntime", "threads": 1, "batch": 1, "execution_mode": "sequential", "inter_op_threads": 1,
        "disabled_optimizers": ["WeightBiasQuantization"], "providers": ["CPUExecutionProvider"],
        "session_config": session_config(DEVICE), "device": DEVICE,
        "needs_disabled_optimizers": False,
        "input": {"name": "input", "shape": [None, 1, 8, 8], "type": "float"},
        "output": {"name": "logits", "shape": [None, 4], "type": "float"},
    }  # fmt: skip


def test_triton_is_told_types_shapes_and_threads(finished: Finished, out: Path) -> None:
    export_trial(finished.run, finished.trial, out)
    assert (out / "config.pbtxt").read_text() == (
        'name: "tiny"\n'
        'backend: "onnxruntime"\n'
        "max_batch_size: 64\n"
        'input [{ name: "input", data_type: TYPE_FP32, dims: [ 1, 8, 8 ] }]\n'
        'output [{ name: "logits", data_type: TYPE_FP32, dims: [ 4 ] }]\n'
        "dynamic_batching { }\n"
        "instance_group [{ kind: KIND_CPU, count: 1 }]\n"
        'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }\n'
        'parameters { key: "inter_op_thread_count" value: { string_value: "1" } }\n'
    )


def test_a_name_with_slashes_is_fit_for_a_folder_of_triton(finished: Finished, out: Path) -> None:
    run = replace(finished.run, state={**finished.run.state, "task": "torchvision:resnet/18"})
    export_trial(run, finished.trial, out)
    assert 'name: "torchvision_resnet_18"' in (out / "config.pbtxt").read_text()


# The card


def test_the_card_s_numbers_are_those_of_the_record(finished: Finished, out: Path) -> None:
    export_trial(finished.run, finished.trial, out)
    verified = finished.trial.verified
    assert verified is not None
    quality, text = verified.quality, (out / "card.md").read_text()

    assert quality.accuracy_se is not None
    assert f"| test accuracy | {quality.accuracy:.4f} ± {quality.accuracy_se:.4f} (standard error) |" in text
    assert "0.8500 (given weights 0.8000, after the same extra training 0.8500) |" in text
    assert "| latency | 0.013 ms (repeat error 5.0%) | 0.026 ms |" in text
    assert "| speed | 2.00× (1.74× to 2.30×) | 1× |" in text
    assert f"| file | {verified.size_bytes:,} bytes | 1,000,000 bytes |" in text
    assert f"top-1 {verified.top1_agreement:.2%}, largest difference" in text
    assert f"output {verified.max_abs_diff:.2g}." in text
    assert "the better of the given weights and of the uncompressed model after the same extra training." in text
    assert "(80 examples), weights from the rung `long`" in text
    assert "batch 1, 1 thread(s), Slow CPU, onnxruntime 9.9.9" in text
    assert "from the optimised graph: 2 of 4." in text
    assert f"policy `{finished.trial.digest}`: 1 pruned groups, 2 layers below 32 bits, removed blocks: none" in text
    assert "distillation: logit, α 0.7, T 3.0 (constant)" in text
    assert "learning rate 0.02" in text
    assert "approvals: approved by ada, 2026-01-31T07:10:00+0000: checked\n" in text
    assert "not this one" not in text
    assert not re.search(r"\bNone\b|\bnan\b|\{|\}\}", text.split("```")[0])


def test_the_card_s_program_runs(finished: Finished, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_trial(finished.run, finished.trial, out)
    program = re.search(r"```python\n(.*?)```", (out / "card.md").read_text(), re.DOTALL)
    assert program is not None
    monkeypatch.chdir(out)
    names: dict[str, Any] = {"batch": np.zeros((5, 1, 8, 8), np.float32)}
    exec(program[1], names)
    assert names["logits"].shape == (5, 4)


@pytest.mark.parametrize(
    ("state", "trials", "expected"),
    [
        ({"reference_accuracy": {"given": 0.8, "trained_longer": None, "counted": 0.8}}, True,
         ["| 0.8000 (given weights 0.8000) |", "1,000,000 bytes", "of the given weights; it had no extra training."]),
        ({"reference_accuracy": None, "given": {"test": {"accuracy": 0.8, "accuracy_se": 0.01}}}, True,
         ["| 0.8000 (given weights 0.8000) |"]),
        ({"reference_accuracy": None, "given": {"test": {"accuracy": 31.5, "accuracy_se": None}}}, True,
         ["| 31.5000 (given weights 31.5000) |"]),
        ({"reference_accuracy": None}, False, ["| unknown |\n| latency", "bytes | unknown |"]),
    ],
)  # fmt: skip
def test_what_is_not_known_is_said_on_the_card(
    finished: Finished, out: Path, state: dict[str, Any], trials: bool, expected: list[str]
) -> None:
    run = replace(
        finished.run, state={**finished.run.state, **state}, target=None, approvals=(),
        trials=finished.run.trials if trials else (finished.trial,),
    )  # fmt: skip
    export_trial(run, finished.trial, out)
    text = (out / "card.md").read_text()
    for part in expected:
        assert part in text
    assert "unknown CPU, onnxruntime unknown" in text
    assert "approvals: none" in text


# Whole or not there


def test_force_replaces_the_whole_folder(finished: Finished, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")
    with pytest.raises(InputError, match=r"exports/tiny: the export folder exists already; --force replaces it\."):
        export_trial(finished.run, finished.trial, out)
    assert [file.name for file in out.iterdir()] == ["old.txt"]

    data = export_trial(finished.run, finished.trial, out, FORCE)

    assert sorted(file.name for file in out.iterdir()) == sorted(data["files"])
    assert leftovers(out) == []


def test_force_replaces_a_file_as_well(finished: Finished, out: Path) -> None:
    out.parent.mkdir()
    out.write_text("old")
    export_trial(finished.run, finished.trial, out, FORCE)
    assert (out / "model.onnx").is_file()
    assert leftovers(out) == []


def broken(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the run folder, for damage."""
    return Path(shutil.copytree(finished.run.path, tmp_path / "run"))


@pytest.mark.parametrize("name", ["model.onnx", "long.safetensors"])
def test_a_missing_artefact_leaves_the_old_export(finished: Finished, tmp_path: Path, out: Path, name: str) -> None:
    folder = broken(finished, tmp_path)
    (folder / "artifacts" / "1" / name).unlink()
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")

    with pytest.raises(InputError, match=rf"{name}: the run's artefact is missing, so trial 1 cannot be exported\."):
        export_trial(replace(finished.run, path=folder), finished.trial, out, FORCE)

    assert tiny.bare(out) == {"old.txt": b"old"}
    assert leftovers(out) == []


def test_a_damaged_model_leaves_nothing_behind(finished: Finished, tmp_path: Path, out: Path) -> None:
    folder = broken(finished, tmp_path)
    path = folder / "artifacts" / "1" / "model.onnx"
    model = onnx.load(str(path))
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, str(path))

    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        export_trial(replace(finished.run, path=folder), finished.trial, out)

    assert not out.exists()
    assert leftovers(out) == []


def test_a_move_that_fails_puts_the_old_folder_back(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError, match="staged"):
        swap(out.parent / "staged", out)
    assert tiny.bare(out) == {"old.txt": b"old"}
    assert leftovers(out) == []


def test_a_place_that_cannot_be_written_is_refused(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(InputError, match=r"file\.txt/out: the export cannot be written: "):
        export_trial(finished.run, finished.trial, tmp_path / "file.txt" / "out")


# Which trials


def test_a_trial_that_was_struck_out_is_refused(finished: Finished, out: Path) -> None:
    assert finished.trial.verified is not None
    reason = "not faster than the original: 0.030 ms against 0.025 ms"
    struck = replace(finished.trial, verified=replace(finished.trial.verified, struck_out=reason))

    with pytest.raises(InputError, match=f"trial 1 was struck out: {reason}; --force exports it"):
        export_trial(finished.run, struck, out)
    assert not out.parent.exists()

    assert export_trial(finished.run, struck, out, FORCE)["latency_ms"] == 0.0128


def test_a_trial_without_weights_is_refused(finished: Finished, out: Path) -> None:
    trial = fakes_run.trial(7, state=TrialState.FAILED, policy=finished.trial.policy)
    with pytest.raises(InputError, match=r"trial 7 \(FAILED\) left no weights, so it cannot be exported\."):
        export_trial(finished.run, trial, out)
    assert leftovers(out) == []


def test_a_task_that_has_changed_since_is_refused(finished: Finished, tmp_path: Path, out: Path) -> None:
    folder = broken(finished, tmp_path)
    run = replace(finished.run, path=folder, state={**finished.run.state, "model": "0" * 16})
    with pytest.raises(
        InputError, match=f"the run was made with model 0{{16}}, but the task's model is {finished.policy.model} now"
    ):
        export_trial(run, replace(finished.trial, verified=None), out)
    assert leftovers(out) == []


@pytest.mark.slow
def test_a_trial_that_reused_the_first_one_finds_its_weights(finished: Finished, tmp_path: Path, out: Path) -> None:
    """Trial 0 is a trial like any other. Nothing was verified, so it is compared and measured now."""
    folder = broken(finished, tmp_path)
    (folder / "artifacts" / "1").rename(folder / "artifacts" / "0")
    trial = replace(finished.trial, number=5, reused_from=0, verified=None)

    data = export_trial(replace(finished.run, path=folder), trial, out)

    source = load_file(folder / "artifacts" / "0" / "long.safetensors")
    exported = load_file(out / "model.safetensors")
    assert source.keys() == exported.keys()
    assert all(torch.equal(source[name], exported[name]) for name in source)
    assert json.loads((out / "manifest.json").read_text())["trial"] == 5
    assert data["latency_ms"] > 0
    assert data["reference_ms"] > 0
    assert data["parity"]["top1_agreement"] > 0.9
    assert sorted(file.name for file in out.iterdir()) == sorted(data["files"])
