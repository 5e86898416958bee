"""Wrong input through the real command line: exit code 2 and one sentence that says what, where and what is right."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import tiny

MISTAKES = """
def raising():
    layers = {"stem": 32}
    return layers["head"]


def returns_nothing():
    pass


def not_a_task():
    return 3


def wrong_input():
    return build(example_input=torch.zeros(1, 3, 8, 8))


def empty_training_set():
    return build(train=TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)))


def label_out_of_range():
    x, labels = pictures(8, 0).tensors
    labels[5] = 4
    return build(train=TensorDataset(x, labels))


def another_model():
    return build(model=Net(16))


answer = 42
"""

Cli = tiny.Cli


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory, MISTAKES)


# The config file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [a", "not YAML at line 1: expected ',' or ']', but got '<stream end>'."),
        ("task: a\nlimit: {}", "unknown key limit; did you mean limits."),
        ("task: a\nsearch: {workers: [1]}", "search.workers must be a valid integer, but got [1]."),
        ("seed: 1", "task is missing; it names a built-in task or path/to/file.py:function."),
    ],
)
def test_a_config_that_is_wrong(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert tiny.refused(cli("run", path, "--json")) == f"{path}: {message}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_config_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    sentence = tiny.refused(cli("run", path, "--json"))
    assert sentence == f"{path}: there is no such config file; nightpress init DIR makes one."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--until", "25:00"], "--until must be a time such as 07:00 or 2026-01-31T07:00, but got '25:00'."),
        (["--budget", "long"], "--budget must be a length of time such as 8h or 1h30m, but got 'long'."),
        (["--budget", "8h", "--until", "07:00"], "--until and --budget exclude each other."),
    ],
)
def test_a_time_limit_that_is_wrong(
    cli: Cli, place: tiny.Place, tmp_path: Path, words: list[str], message: str
) -> None:
    assert tiny.refused(cli("run", tiny.config_for(place, tmp_path), *words, "--json")) == message
    assert not (tmp_path / "run").exists()


def test_a_moment_that_has_passed(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("run", tiny.config_for(place, tmp_path), "--until", "2020-01-31T07:00", "--json"))
    assert sentence.startswith("--until must lie in the future, but got '2020-01-31T07:00' and it is ")


@pytest.mark.slow
def test_a_budget_too_short_for_the_baselines_names_the_least(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("run", tiny.config_for(place, tmp_path), "--budget", "5s", "--json"))
    assert sentence.startswith("The budget is too short for even the baselines: ")
    assert re.search(r"9 baselines at about \d+ ms a training step .* the least budget here is \d+ s\.$", sentence)
    assert not (tmp_path / "run").exists()  # the same folder may be used again


# Limits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_latency_ms": 1e-6},
         r"limits.max_latency_ms is 1e-06, but no policy .* is predicted to be faster than (\S+) ms on this target\."),
        ({"max_size_bytes": 10}, r"limits.max_size_bytes is 10, but the smallest file of this space has (\d+) bytes\."),
    ],
)  # fmt: skip
def test_a_limit_that_no_policy_can_meet(
    cli: Cli, place: tiny.Place, tmp_path: Path, limits: dict[str, float], message: str
) -> None:
    """The sentence names the nearest value that can be reached; nothing was trained for it."""
    sentence = tiny.refused(cli("run", tiny.config_for(place, tmp_path, limits=limits), "--json"))

    found = re.fullmatch(message, sentence)
    assert found is not None, sentence
    profile = json.loads(place.profile.read_text())
    key = "measured_ms" if "max_latency_ms" in limits else "size_bytes"
    least = min(point[key] for point in profile["points"])
    assert 0.3 * least < float(found[1]) < 1.2 * least
    assert not (tmp_path / "run").exists()  # the corrected config may use the same folder


# The task


def test_a_task_file_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("inspect", f"{tmp_path}/plates.py:build", "--json"))
    assert sentence == f"The task file {tmp_path.resolve()}/plates.py does not exist."


def test_a_built_in_task_that_is_not_there(cli: Cli) -> None:
    assert "mnist5k-resnet" in tiny.refused(cli("inspect", "mnist5k-resnot", "--json"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("biuld", r"There is no function biuld in \S+/task\.py; the nearest is build\."),
        ("answer", r"answer in \S+/task\.py must be a function, but it is of type int\."),
        ("returns_nothing", r"returns_nothing in \S+ must return a \S+\.Task, but it returned None\."),
        ("not_a_task", r"not_a_task in \S+ must return a \S+\.Task, but it returned a value of type int\."),
        ("wrong_input", r"The model \w+ cannot run a batch of 1 .*channels.* Its forward must take .*\."),
        ("empty_training_set", r"The training set is empty, but at least one item is needed\."),
        ("label_out_of_range", r"Labels must be in \[0, 4\), .*, but the training set has label 4 at index 5\."),
    ],
)  # fmt: skip
def test_a_task_that_is_wrong(cli: Cli, place: tiny.Place, function: str, message: str) -> None:
    sentence = tiny.refused(cli("inspect", f"{place.task_file}:{function}", "--json"))
    assert re.fullmatch(message, sentence), sentence


def test_a_task_that_raises_shows_its_last_line_and_where(cli: Cli, place: tiny.Place) -> None:
    lines = place.task_file.read_text().splitlines()
    number = lines.index('    return layers["head"]') + 1
    sentence = tiny.refused(cli("inspect", f"{place.task_file}:raising", "--json"))
    assert sentence == f"raising in {place.task_file} raised KeyError: 'head' ({place.task_file}:{number})."


def test_a_task_file_that_cannot_be_imported(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text("import numpie\n")
    sentence = tiny.refused(cli("inspect", f"{path}:build", "--json"))
    assert sentence == f"Importing {path} raised ModuleNotFoundError: No module named 'numpie' ({path}:1)."
    path.write_text("def build(:\n")
    assert f"({path}:1)" in tiny.refused(cli("inspect", f"{path}:build", "--json"))


def test_a_night_refuses_a_wrong_task_as_the_other_commands_do(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tiny.config_for(place, tmp_path, task=f"{place.task_file}:label_out_of_range")
    assert "has label 4 at index 5" in tiny.refused(cli("run", path, "--json"))


def test_a_target_that_is_neither_runtime_nor_profile(cli: Cli, place: tiny.Place) -> None:
    sentence = tiny.refused(cli("inspect", place.task, "--target", "tensorrt", "--json"))
    runtimes = "onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, openvino"
    assert sentence == f"--target: target must be one of {runtimes} or a profile file, but got 'tensorrt'."


def test_more_threads_than_cores(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tiny.config_for(place, tmp_path, target={"threads": 4096})
    sentence = tiny.refused(cli("run", path, "--json"))
    cores = len(os.sched_getaffinity(0))
    assert sentence == f"target.threads must be between 1 and this machine's {cores} cores, but got 4096."


# Policies


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prune": {"block.conv9": 0.5}}, "prune names block.conv9, which this model does not have; did you mean"),
        ({"prune": {"block.conv1": 1.0}}, "prune.block.conv1 must be a number in [0, 1), but got 1.0."),
        ({"prune": {"block.conv1": -0.1}}, "prune.block.conv1 must be a number in [0, 1), but got -0.1."),
        ({"prune": {"block.conv1": "half"}}, "prune.block.conv1 must be a number in [0, 1), but got 'half'."),
        ({"bits": {"stem": {"weights": 9}}}, "bits.stem.weights must be one of 2, 3, 4, 5, 6, 7, 8, 16, 32, but"),
        ({"bits": {"stem": {"activations": 9}}}, "bits.stem.activations must be one of 2, 3, 4, 5, 6, 7, 8, 16, 32,"),
        ({"bits": {"stm": {"weights": 8}}}, "bits names stm, which this model does not have; did you mean stem."),
        ({"removed_blocks": ["blocks"]}, "removed_blocks names blocks, which this model does not have"),
        ({"removed_blocks": "block"}, "removed_blocks must be a list of block names, but got 'block'."),
        ({"schema": 3}, "schema must be one of 1, 2, the versions that this nightpress reads, but got 3."),
        ({"schema": None}, "schema must be one of 1, 2, the versions that this nightpress reads, but got None."),
        ({"model": "0123456789abcdef"}, "a policy belongs to one model; this one is for 0123456789abcdef, the"),
        ({"pruning": {}}, "unknown key pruning; did you mean prune."),
        ({"distill": {"alpha": 2}}, "distill.alpha must be a number in [0, 1], but got 2."),
    ],
)  # fmt: skip
def test_a_policy_that_is_wrong(
    cli: Cli, place: tiny.Place, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**json.loads(place.policy.read_text()), **keys}))

    sentence = tiny.refused(cli("apply", path, place.task, "--out", tmp_path / "model.pt", "--json"))

    assert sentence.startswith(f"{path}: {message}")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["predict", "measure", "apply"])
def test_each_command_names_the_policy_that_is_wrong(cli: Cli, place: tiny.Place, tmp_path: Path, command: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**json.loads(place.policy.read_text()), "pruning": {}}))
    words = {
        "predict": ["predict", place.task, place.policy, path, "--target", place.profile],
        "measure": ["measure", place.task, place.policy, path],
        "apply": ["apply", path, place.task, "--out", tmp_path / "model.pt"],
    }[command]

    sentence = tiny.refused(cli(*words, "--json"))

    assert sentence.startswith(f"{path}: unknown key pruning; did you mean prune.")
    assert list(tmp_path.iterdir()) == [path]


def test_a_policy_file_that_cannot_be_read(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    assert f"{path}: the policy cannot be read: " in tiny.refused(cli("measure", place.task, path, "--json"))
    path.write_text('{\n"schema": 1,\n')
    sentence = tiny.refused(cli("measure", place.task, path, "--json"))
    assert sentence.startswith(f"{path}: a policy is a JSON file, but line 3 is not: ")


def test_weights_that_are_not_those_of_the_policy(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    words = ["apply", place.policy, place.task, "--out", tmp_path / "model.pt", "--json", "--weights"]
    weights = tmp_path / "model.safetensors"
    assert "not the weights of this policy: No such file" in tiny.refused(cli(*words, weights))
    weights.write_text("not safetensors")
    assert f"{weights}: not the weights of this policy: " in tiny.refused(cli(*words, weights))
    save_file({}, weights)
    assert re.search(r": not the weights of this policy: Missing key\(s\) in state_dict: .*\.$",
                     tiny.refused(cli(*words, weights)))  # fmt: skip
    assert not (tmp_path / "model.pt").exists()


# Profiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "model": "0" * 16}, f"a profile belongs to one model; this one is for {'0' * 16}, the task's"),
        (lambda p: {**p, "device": {**p["device"], "cpu": "Z80"}},
         "a profile holds for one device; cpu was 'Z80' when it was made, here it is "),
        (lambda p: {**p, "device": {**p["device"], "runtime_version": "0.1"}},
         "a profile holds for one device; runtime_version was '0.1' when it was made, here it is "),
        (lambda p: {**p, "version": 9}, "a profile of version 2 was expected; make one with nightpress calibrate."),
        (lambda p: {key: p[key] for key in p if key != "points"}, "the profile is damaged: KeyError 'points'."),
    ],
)  # fmt: skip
def test_a_profile_that_does_not_fit(
    cli: Cli, place: tiny.Place, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(change(json.loads(place.profile.read_text()))))
    sentence = tiny.refused(cli("predict", place.task, place.policy, "--target", path, "--json"))
    assert sentence.startswith(f"{path}: {message}")


def test_a_night_refuses_a_profile_that_does_not_fit(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**json.loads(place.profile.read_text()), "model": "0" * 16}))
    sentence = tiny.refused(cli("run", tiny.config_for(place, tmp_path, target=str(path)), "--json"))
    assert sentence.startswith(f"{path}: a profile belongs to one model; this one is for {'0' * 16}, the task's")


def test_a_profile_that_is_none(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{}")
    sentence = tiny.refused(cli("predict", place.task, place.policy, "--target", path, "--json"))
    assert sentence == f"{path}: not a profile of nightpress calibrate (KeyError: 'target')."


# The command line itself


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspekt", "a"], "No such command 'inspekt'. Did you mean 'inspect'?; --help shows what there is."),
        (["run", "a", "--budgt", "3"], "No such option: --budgt"),
        (["run"], "Missing argument 'CONFIG.yaml'; --help shows what there is."),
        (["run", "a", "--budget"], "Option '--budget' requires an argument; --help shows what there is."),
        (["approve", "a", "0"], "Missing option '--note'; --help shows what there is."),
        (["measure", "a"], "Missing argument 'POLICY.json...'; --help shows what there is."),
        (["sample", "a", "--out", "b", "-n", "0"], "Invalid value for '-n': "),
        (["calibrate", "a", "--out", "b", "-n", "9"], "Invalid value for '-n': "),
        (["sample", "a", "--out", "b", "--seed", "x"], "Invalid value for '--seed': "),
    ],
)
def test_words_that_are_no_command(cli: Cli, words: list[str], message: str) -> None:
    assert tiny.refused(cli(*words)).startswith(message)


def test_no_words_at_all_shows_the_commands(cli: Cli) -> None:
    result = cli()
    assert (result.code, result.err) == (0, "")
    assert "Usage: nightpress" in result.out


def test_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = tiny.nightpress("status", tmp_path, "--json")
    assert tiny.refused(result) == f"{tmp_path}: not a run folder: it has no config.yaml."
