"""Wrong run folders, trials and output places: exit code 2, one sentence, and nothing of the user's is touched."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from nightpress.cli.config import load_config
from nightpress.search.clock import Deadline
from nightpress.search.folder import RunFolder
from nightpress.search.night import run_night
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import Policy

Cli = tiny.Cli


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory)


# Run folders


@pytest.mark.parametrize("words", [["status"], ["report"], ["approve", "0", "--note", "x"], ["export", "0"]])
def test_a_folder_that_is_no_run(cli: Cli, tmp_path: Path, words: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    more = ["--out", tmp_path / "out"] if words[0] == "export" else []
    sentence = tiny.refused(cli(words[0], folder, *words[1:], *more, "--json"))
    assert sentence == f"{folder}: not a run folder: it has no config.yaml."
    assert list(folder.iterdir()) == []
    assert f"{tmp_path}/none: not a run folder" in tiny.refused(cli(words[0], tmp_path / "none", *words[1:], *more))


def test_a_config_alone_makes_no_run(cli: Cli, tmp_path: Path) -> None:
    assert cli("init", tmp_path).code == 0
    assert tiny.refused(cli("status", tmp_path, "--json")) == f"{tmp_path}: not a run folder: it has no state.json."


def test_runs_to_compare(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    run = tiny.write_run(tiny.config_for(place, tmp_path))
    assert tiny.refused(cli("compare", run, "--json")) == "compare needs at least two run folders."
    sentence = tiny.refused(cli("compare", run, tmp_path / "other", "--json"))
    assert sentence == f"{tmp_path}/other: not a run folder: it has no config.yaml."


def test_a_run_folder_that_exists(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tiny.config_for(place, tmp_path)
    run = tiny.write_run(path)
    before = {file.name: file.read_bytes() for file in run.iterdir()}

    sentence = tiny.refused(cli("run", path, "--json"))

    assert sentence == f"{run}: the run folder exists already; choose another out, or go on with --resume."
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_a_run_folder_that_is_a_file(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tiny.config_for(place, tmp_path)
    (tmp_path / "run").write_text("mine")
    assert "the run folder exists already" in tiny.refused(cli("run", path, "--json"))
    assert (tmp_path / "run").read_text() == "mine"


def test_nothing_to_resume(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("run", tiny.config_for(place, tmp_path), "--resume", "--json"))
    assert sentence == f"{tmp_path}/run: not a run folder, so there is nothing to resume: it has no config.yaml."
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": 5}, "seed was 0 and is now 5."),
        ({"limits": {"min_accuracy": 0.5}}, "limits was {'max_latency_ms': None, "),
        ({"target": "onnxruntime"}, "target_profile was "),
        ({"search": {"max_trials": 5}}, "search was {"),
    ],
)
def test_a_run_resumed_with_another_config(
    cli: Cli, place: tiny.Place, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    run = tiny.write_run(tiny.config_for(place, tmp_path))
    path = tiny.config_for(place, tmp_path, **keys)
    sentence = tiny.refused(cli("run", path, "--resume", "--json"))
    assert sentence.startswith(f"{run}/config.yaml: a run is resumed with the config it began with, but {message}")


def test_a_run_whose_deadline_has_passed(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tiny.config_for(place, tmp_path, budget=None)
    run = tiny.write_run(path)
    state = {"state": "interrupted", "deadline": "2026-01-31T07:00:00+00:00", "deadline_epoch": 1769842800.0}
    (run / "state.json").write_text(json.dumps(state))
    sentence = tiny.refused(cli("run", path, "--resume", "--json"))
    assert sentence == f"{run}: its deadline {state['deadline']} has passed; give --budget or --until to go on."


def test_a_run_that_another_driver_holds(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = tiny.config_for(place, tmp_path)
    driver = RunFolder(tiny.write_run(path))
    driver.acquire()
    try:
        sentence = tiny.refused(cli("run", path, "--resume", "--json"))
    finally:
        driver.release()
    assert re.fullmatch(rf"{driver.path}: only one driver may work on a run, but pid {os.getpid()} on \S+ holds it\.",
                        sentence)  # fmt: skip


def test_a_storage_that_does_not_answer_is_refused_before_anything_is_measured(
    cli: Cli, place: tiny.Place, tmp_path: Path
) -> None:
    storage = "postgresql://night:s3cret@127.0.0.1:1/studies"
    result = cli("run", tiny.config_for(place, tmp_path, search={"storage": storage}), "--json")
    sentence = tiny.refused(result)
    assert sentence == "search.storage: postgresql://night@127.0.0.1:1/studies does not answer (OperationalError)."
    assert "s3cret" not in result.err
    assert "phase inspect" in result.err
    assert "calibrate" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_warm_start_from_a_run_of_another_model(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    before = tiny.write_run(tiny.config_for(place, tmp_path / "before"))
    state = json.loads((before / "state.json").read_text())
    (before / "state.json").write_text(json.dumps(state | {"model": "another"}))

    sentence = tiny.refused(cli("run", tiny.config_for(place, tmp_path, warm_start=[str(before)]), "--json"))

    assert sentence == f"warm_start: {before} is a run of model another, this one's is {place.anatomy.digest}."
    assert not (tmp_path / "run").exists()


def test_a_deadline_that_passes_while_the_night_starts(place: tiny.Place, tmp_path: Path) -> None:
    config = load_config(tiny.config_for(place, tmp_path))
    with pytest.raises(InputError, match=r"The deadline passed \d+ s ago, while the night was starting; give it more"):
        run_night(config, Deadline(time.time() - 5, fixed=False), resume=False)
    assert not config.out.exists()


# Trials and exports


@pytest.fixture
def run(place: tiny.Place, tmp_path: Path) -> Path:
    """A run with trial 0, which left no weights."""
    folder = tiny.write_run(tiny.config_for(place, tmp_path))
    assert tiny.add_trial(folder, Policy(model=place.anatomy.digest)) == 0
    return folder


@pytest.mark.parametrize("name", ["7", "-1", "first", "0.0", "00"])
@pytest.mark.parametrize("command", ["approve", "export"])
def test_a_trial_that_does_not_exist(cli: Cli, run: Path, tmp_path: Path, command: str, name: str) -> None:
    more = ["--note", "x"] if command == "approve" else ["--out", tmp_path / "out"]
    sentence = tiny.refused(cli(command, *more, "--json", "--", run, name))
    assert sentence == (
        f"{run}: TRIAL must be best, knee, fastest, accurate or the number of one of its 1 trials, but got '{name}'."
    )
    assert not (tmp_path / "out").exists()


def test_a_pick_of_a_run_without_a_front(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    run = tiny.write_run(tiny.config_for(place, tmp_path))
    sentence = tiny.refused(cli("export", run, "best", "--out", tmp_path / "out", "--json"))
    assert sentence.startswith(f"{run}: no trial can be called best. No ")


def test_an_export_folder_that_exists(cli: Cli, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    sentence = tiny.refused(cli("export", run, "0", "--out", out, "--json"))
    assert sentence == f"{out}: the export folder exists already; --force replaces it."
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_a_trial_that_left_no_weights(cli: Cli, run: Path, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("export", run, "0", "--out", tmp_path / "out", "--json"))
    assert sentence == f"{run}: trial 0 (COMPLETE) left no weights, so it cannot be exported."
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "run"]


# Places that cannot be written


@pytest.mark.parametrize("command", ["run", "report", "export", "sample", "calibrate", "apply", "init"])
def test_an_output_below_a_regular_file(cli: Cli, place: tiny.Place, run: Path, tmp_path: Path, command: str) -> None:
    """A folder that cannot be made, whoever asks: the tests may run as root."""
    file = tmp_path / "file.txt"
    file.write_text("mine")
    out = file / "out"
    words = {
        "run": ["run", tiny.config_for(place, tmp_path), "--out", out, "--json"],
        "report": ["report", run, "--out", out, "--json"],
        "export": ["export", run, "0", "--out", out, "--json"],
        "sample": ["sample", place.task, "--out", out, "--json"],
        "calibrate": ["calibrate", place.task, "--out", out, "--json"],
        "apply": ["apply", place.policy, place.task, "--out", out, "--json"],
        "init": ["init", out],
    }[command]

    sentence = tiny.refused(cli(*words))

    assert sentence.startswith(str(out)), sentence
    assert file.read_text() == "mine"


def test_a_starter_file_that_exists(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("mine")
    result = cli("init", tmp_path)
    assert (result.code, result.sentence) == (2, f"{tmp_path}/task.py: the file exists already; --force replaces it.")
    assert (tmp_path / "task.py").read_text() == "mine"
