"""An export folder is there whole or not at all, is the same each time, and holds nothing from outside its run."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import yaml

import exports
import tiny
from nightpress.evaluators.latency.timer import cores
from nightpress.evaluators.training import sgd
from nightpress.export import Options, export_trial, finetune_export, verify
from nightpress.export.folder import swap
from nightpress.export.licences import licence_line, licences_text
from nightpress.export.recipe import FIXED
from nightpress.search.records import RunRecord
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import digest, policy_from_json

# Exports the same trial over and over; says when the first one is there.
LOOP = """
import sys
from pathlib import Path
from nightpress.export import Options, export_trial
from nightpress.search.folder import read_run

run, out = read_run(Path(sys.argv[1])), Path(sys.argv[2])
while True:
    export_trial(run, run.trials[2], out, Options(force=True))
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return exports.record(exports.run_folder(tmp_path_factory))


# Whole or not at all


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_export_leaves_the_whole_folder_or_none(run: RunRecord, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    for number in range(2):
        out = tmp_path / str(number) / "export"
        command = [sys.executable, tmp_path / "loop.py", run.path, out]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            try:
                if number:  # the first is killed before it is done once
                    assert process.stdout.readline() == "done\n"
                    time.sleep(0.05)
                else:
                    while process.poll() is None and not list(tmp_path.glob("0/.export-*")):
                        time.sleep(0.001)
            finally:
                process.send_signal(signal.SIGKILL)
        assert out.exists() == (number > 0)
        if out.exists():
            check = verify.check_files(out, verify.read_json(out / "manifest.json"))
            assert check.state == "ok", check.text


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    """A reader that looks all the time, as a server that reloads its model would."""
    out = tmp_path / "export"
    out.mkdir()
    (out / "model").write_text("old")
    missed: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            if not (out / "model").is_file():
                missed.append(1)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(300):
        folder = tmp_path / f"new{number}"
        folder.mkdir()
        (folder / "model").write_text(str(number))
        swap(folder, out)
    ended.set()
    for reader in readers:
        reader.join()
    assert missed == []
    assert (out / "model").read_text() == "299"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_stands_in_the_place_is_replaced_not_followed(run: RunRecord, tmp_path: Path, kind: str) -> None:
    other, out = tmp_path / "other", tmp_path / "place" / "export"
    out.parent.mkdir()
    if kind == "link":
        other.mkdir()
        (other / "mine.txt").write_text("mine")
    if kind == "file":
        out.write_text("old")
    else:
        out.symlink_to(other)
    with pytest.raises(InputError, match="the export folder exists already"):
        export_trial(run, run.trials[2], out)
    export_trial(run, run.trials[2], out, Options(force=True))
    assert out.is_dir()
    assert not out.is_symlink()
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    assert not other.exists() or tiny.bare(other) == {"mine.txt": b"mine"}


# The same each time


@pytest.mark.slow
def test_every_file_is_the_same_in_another_process(run: RunRecord, tmp_path: Path) -> None:
    ours = export_trial(run, run.trials[2], tmp_path / "ours")
    theirs = tiny.nightpress("export", run.path, "2", "--out", tmp_path / "theirs", "--json").json
    assert {**theirs, "dir": ours["dir"]} == ours
    assert tiny.bare(tmp_path / "theirs") == tiny.bare(tmp_path / "ours")
    assert set(ours["files"]) == {path.name for path in (tmp_path / "ours").iterdir()}
    assert ours["manifest"] == verify.sha256(tmp_path / "ours" / "manifest.json")


def test_the_shipped_scripts_are_those_of_nightpress(run: RunRecord, tmp_path: Path) -> None:
    export_trial(run, run.trials[2], tmp_path / "out")
    assert (tmp_path / "out" / "verify.py").read_text() == Path(verify.__file__).read_text()
    assert "import nightpress" not in (tmp_path / "out" / "timer.py").read_text()


# Nothing from outside


@pytest.mark.parametrize("name", ["../../secret/model.onnx", "/etc/hostname", "link/model.onnx"])
def test_a_record_that_leads_out_of_its_run_is_refused(run: RunRecord, tmp_path: Path, name: str) -> None:
    folder = exports.copy_of(run.path, tmp_path)
    secret = tmp_path / "secret"
    secret.mkdir()
    for file in ("model.onnx", "long.safetensors"):
        (secret / file).write_bytes((run.path / "artifacts" / "2" / file).read_bytes())
    (folder / "link").symlink_to(secret)
    verified = run.trials[2].verified
    assert verified is not None
    trial = replace(run.trials[2], verified=replace(verified, model_file=name))
    with pytest.raises(InputError, match=f"its record names the file '{re.escape(name)}', which lies outside the run"):
        export_trial(replace(run, path=folder), trial, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_reuse_that_leads_out_of_the_run_is_refused(run: RunRecord, tmp_path: Path) -> None:
    folder = exports.copy_of(run.path, tmp_path)
    trial = replace(run.trials[2], verified=None, reused_from="../../secret")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"trial 2 reuses '\.\./\.\./secret', which is no trial's number"):
        export_trial(replace(run, path=folder), trial, tmp_path / "out")


def test_names_of_a_user_cannot_break_the_card_or_the_configuration(run: RunRecord, tmp_path: Path) -> None:
    name = 'x"\n}\n# <b>|' + "a" * 300
    words = ({"trial": 2, "digest": run.trials[2].digest, "note": "a\n# b | c", "who": "e\nve", "time": "now"},)
    export_trial(replace(run, state={**run.state, "task": name}, approvals=words), run.trials[2], tmp_path / "out")
    card = (tmp_path / "out" / "card.md").read_text()
    assert "approvals: approved by e ve, now: a # b \\| c\n" in card
    assert [line for line in card.splitlines() if line.startswith("# ")] == [card.splitlines()[0]]
    first = (tmp_path / "out" / "config.pbtxt").read_text().splitlines()[0]
    assert first == f'name: "x_______b__{"a" * 300}"'


# Licences


def test_licences_of_what_is_needed_and_what_was_used_are_named() -> None:
    text = licences_text(("openvino",))
    needed, used = text.split("Used to make it:")
    assert f"  numpy {version('numpy')}: BSD-3-Clause" in needed
    assert f"  onnxruntime {version('onnxruntime')}: MIT" in needed
    assert f"  nightpress {version('nightpress')}: Apache-2.0\n" in used
    assert "\n  openvino" in used
    assert "openvino" not in licences_text()


def test_a_package_that_is_not_there_is_said_to_be_missing() -> None:
    assert licence_line("no-such-package-here") == "no-such-package-here: not installed"


# Full-length training


@pytest.fixture(scope="module")
def exported(run: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "two"
    export_trial(run, run.trials[2], out)
    return out


def test_the_training_config_is_what_the_trainer_does(exported: Path) -> None:
    import torch

    data = yaml.safe_load((exported / "finetune.yaml").read_text())
    policy = policy_from_json((exported / "policy.json").read_text(), "policy.json")
    assert data["distill"] == asdict(policy.distill)
    assert data["learning_rate"] == policy.finetune.learning_rate
    assert data["fixed"] == FIXED
    optimiser = sgd(([torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))], []), 0.02)
    assert type(optimiser).__name__ == FIXED["optimizer"]["name"]
    for group, decay in zip(optimiser.param_groups, ("weight_decay", "weight_decay_of_vectors"), strict=True):
        assert group["weight_decay"] == FIXED["optimizer"][decay]
        assert {key: group[key] for key in ("momentum", "nesterov")} == {"momentum": 0.9, "nesterov": True}


@pytest.mark.slow
def test_a_longer_training_is_a_new_export_with_new_numbers(exported: Path, cli: tiny.Cli, tmp_path: Path) -> None:
    recipe = exported / "finetune.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("learning_rate: 0.02", "learning_rate: 0.05"))
    try:
        data = cli("finetune", exported, "--out", tmp_path / "new", "--epochs", "2", "--json").json
    finally:
        recipe.write_text(before)

    new = json.loads((tmp_path / "new" / "manifest.json").read_text())
    old = json.loads((exported / "manifest.json").read_text())
    assert data["epochs"] == 2
    assert data["before"] == old["measured"]["accuracy"]
    assert new["measured"]["latency_ms"] != old["measured"]["latency_ms"]
    assert new["files"]["model.safetensors"] != old["files"]["model.safetensors"]
    assert new["origin"]["epochs"] == 2
    policy = policy_from_json((tmp_path / "new" / "policy.json").read_text(), "policy.json")
    assert policy.finetune.learning_rate == 0.05
    assert new["policy"] == digest(policy) != old["policy"]
    metadata = {p.key: p.value for p in onnx.load(str(tmp_path / "new" / "model.onnx")).metadata_props}
    assert metadata["nightpress.policy"] == new["policy"]
    assert "and 2 more epochs of training" in (tmp_path / "new" / "card.md").read_text()
    checked = verify.verify(tmp_path / "new", verify.Options(latency=False), Path())
    assert [check.state for check in checked] == ["ok", "ok", "skipped"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in exported.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threads": cores() + 1}, r"target\.threads must be between 1 and this machine's \d+ cores, but got \d+\."),
        pytest.param(
            {"runtime": "onnxruntime-cuda"}, "The runtime onnxruntime-cuda needs CUDAExecutionProvider",
            marks=pytest.mark.skipif(
                "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
            ),
        ),
    ],
)  # fmt: skip
def test_a_target_that_this_machine_cannot_run_is_refused_before_any_training(
    run: RunRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], reason: str
) -> None:
    caplog.set_level("INFO", logger="nightpress")
    elsewhere = replace(run, config={**run.config, "target": {**run.config["target"], **change}})
    export_trial(elsewhere, run.trials[2], tmp_path / "old")
    with pytest.raises(InputError, match=reason):
        finetune_export(tmp_path / "old", tmp_path / "new", epochs=1)
    assert "training 1 epochs" not in caplog.text
    with pytest.raises(InputError, match=reason):  # what the night did not verify
        export_trial(elsewhere, replace(run.trials[2], verified=None), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def edited(exported: Path, folder: Path, old: str, new: str, file: str = "finetune.yaml") -> Path:
    """A copy of the export with a change in one file."""
    copy = Path(shutil.copytree(exported, folder / "export"))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    return copy


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("epochs: 20.0", "epochs: many", r"finetune\.yaml: epochs must be a number in \[0, 100000\], but got 'many'\."),
        ("epochs: 20.0", "epochs: .nan", "epochs must be a number in"),
        ("batch_size: 64", "batch_size: 1", "batch_size must be a number in"),
        ("momentum: 0.9", "momentum: 0.5", "the keys below fixed say what nightpress's trainer does and cannot"),
        ("alpha: 0.7", "alpha: 7", r"distill\.alpha must be a number in \[0, 1\], but got 7"),
        ("schema: 1", "schema: 9", "must be a mapping with schema: 1"),
        ("schema: 1", "{{", "is not a YAML file"),
    ],
)
def test_a_training_config_that_makes_no_sense(exported: Path, tmp_path: Path, old: str, new: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        finetune_export(edited(exported, tmp_path, old, new), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tampered_export_is_not_trained(exported: Path, tmp_path: Path) -> None:
    copy = edited(exported, tmp_path, "schema", "shema", "policy.json")
    with pytest.raises(InputError, match=r"policy\.json is not the file that was exported"):
        finetune_export(copy, tmp_path / "new")


def test_a_folder_that_is_no_export_is_not_trained(cli: tiny.Cli, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("finetune", tmp_path, "--out", tmp_path / "new", "--json"))
    assert sentence == f"{tmp_path}: not an export folder: it has no manifest.json."


def test_a_task_of_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(tiny.TASK.replace("width: int = 32", "width: int = 16"))
    with pytest.raises(InputError, match=r"the export was made with model .*, but the task's model is"):
        finetune_export(exported, tmp_path / "new", epochs=1, task=f"{tmp_path}/task.py:build")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".new", "new"))]
