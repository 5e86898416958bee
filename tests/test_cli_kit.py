"""The command that writes a kit: it is there whole or not at all, and goes to a host anew each time."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny

LINEAR = """
def linear():
    return build(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)))
"""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory, LINEAR)


def profile_with(place: tiny.Place, folder: Path, **settings: Any) -> Path:
    """The place's profile as of a target with other settings."""
    data = json.loads(place.profile.read_text())
    (folder / "board.json").write_text(json.dumps({**data, "target": {**data["target"], **settings}}))
    return folder / "board.json"


def old_kit(folder: Path) -> Path:
    folder.mkdir()
    (folder / "kit.json").write_text("{}")
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_kit_is_not_removed_for_one_that_cannot_be_made(cli: tiny.Cli, place: tiny.Place, tmp_path: Path) -> None:
    """A model with nothing to prune on a device without integer kernels."""
    board, kit = profile_with(place, tmp_path, integer_kernels=False), old_kit(tmp_path / "kit")
    task = f"{place.task_file}:linear"

    sentence = tiny.refused(cli("kit", task, "--target", board, "--out", kit, "--force", "--json"))

    assert sentence.startswith("space: there is nothing to search")
    assert files_in(tmp_path) == ["board.json", "kit", "kit/kit.json"]


def test_what_is_there_is_kept_unless_it_is_to_be_replaced(cli: tiny.Cli, place: tiny.Place, tmp_path: Path) -> None:
    kit = old_kit(tmp_path / "kit")
    sentence = tiny.refused(cli("kit", place.task, "--out", kit, "--json"))
    assert sentence == f"{kit}: the folder is not empty; --force replaces it."
    assert files_in(tmp_path) == ["kit", "kit/kit.json"]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["a file", "a kit", "an empty folder"])
def test_a_kit_takes_the_place_of_what_was_there(cli: tiny.Cli, place: tiny.Place, tmp_path: Path, before: str) -> None:
    kit = tmp_path / "kit"
    makers: dict[str, Callable[[], object]] = {
        "a file": lambda: kit.write_text("mine"), "a kit": lambda: old_kit(kit), "an empty folder": kit.mkdir
    }  # fmt: skip
    makers[before]()
    force = [] if before == "an empty folder" else ["--force"]

    made = cli("kit", place.task, "-n", 10, "--out", kit, *force, "--json").json

    assert {path.name for path in kit.iterdir()} == {"kit.json", "measure.py", "models", "probes"}
    assert json.loads((kit / "kit.json").read_text())["id"] == made["id"]
    assert list(tmp_path.iterdir()) == [kit]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "threads", "batch"), [([], 4, 8), (["--threads", 2, "--batch", 1], 2, 1)])
def test_a_kit_keeps_threads_and_batch_of_a_profile(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, given: list[object], threads: int, batch: int
) -> None:
    board = profile_with(place, tmp_path, threads=4, batch=8)

    cli("kit", place.task, "-n", 10, "--target", board, *given, "--out", tmp_path / "kit", "--json")

    target = json.loads((tmp_path / "kit" / "kit.json").read_text())["target"]
    assert (target["threads"], target["batch"]) == (threads, batch)


@pytest.mark.slow
def test_a_kit_that_is_interrupted_leaves_nothing_of_itself(place: tiny.Place, tmp_path: Path) -> None:
    kit = old_kit(tmp_path / "kit")

    with tiny.driver("kit", place.task, "-n", 120, "--out", kit, "--force") as process:
        while process.poll() is None and not any(tmp_path.rglob("*.onnx")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait(60)

    assert process.returncode == 130
    assert files_in(tmp_path) == ["kit", "kit/kit.json"]
