"""The steps of a night on their own: which machine must run a target, whose times are told, what is written."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.capabilities import Capabilities, Width, beside_profile
from nightpress.evaluators.latency.profile_file import profile_to_dict
from nightpress.evaluators.latency.target import RUNTIMES, Target, missing_runtime
from nightpress.search.config import RunConfig
from nightpress.search.prepare import space_of
from nightpress.spaces.policy import INT8, LayerBits, Policy, digest, policy_from_json, policy_to_json
from nightpress.spaces.space import uniform

MANY = 4096
"""Threads, more than any machine here has cores."""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory)


Change = Callable[[dict[str, Any]], object]


def profile_with(place: tiny.Place, folder: Path, change: Change) -> Path:
    """The place's profile with something changed in it."""
    data = json.loads(place.profile.read_text())
    change(data)
    (folder / "profile.json").write_text(json.dumps(data))
    return folder / "profile.json"


def of_a_board(data: dict[str, Any]) -> None:
    data["target"].update(threads=MANY)
    data["device"].update(cpu="Cortex-A76", cores=MANY)


# What runs nothing here


def test_a_model_is_looked_at_for_a_target_that_this_machine_cannot_run(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path
) -> None:
    board = profile_with(place, tmp_path, of_a_board)

    assert cli("inspect", place.task, "--target", board, "--json").json["groups"]
    drawn = cli("sample", place.task, "--target", board, "-n", 2, "--out", tmp_path / "policies", "--json").json
    assert len(drawn["policies"]) == 2


@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if missing_runtime(name) is not None])
def test_a_model_is_looked_at_for_a_runtime_that_is_not_here(cli: tiny.Cli, place: tiny.Place, runtime: str) -> None:
    assert cli("inspect", place.task, "--target", runtime, "--json").json["groups"]


@pytest.mark.parametrize(
    "words",
    [["-n", 20], ["--seed", 0], ["--target", "onnxruntime"], ["--threads", 1], ["--batch", 1]],
    ids=lambda words: words[0],
)
def test_what_a_kit_s_results_already_say_is_refused_beside_them(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, words: list[object]
) -> None:
    sentence = tiny.refused(
        cli("calibrate", place.task, "--from", tmp_path / "results.json", *words, "--out", tmp_path / "there.json")
    )
    assert sentence == f"{words[0]} belongs to what is measured here, but --from takes what the kit measured."


# Whose times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_a_board, "a profile holds for one device; cpu was 'Cortex-A76' when it was made, here it is "),
        (lambda data: data.update(remote=True), "a profile holds for one device; this one was made of a kit's results"),
    ],
)  # fmt: skip
def test_another_device_s_policies_are_not_timed_here_without_a_word(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, change: Change, message: str
) -> None:
    path = profile_with(place, tmp_path, change)
    sentence = tiny.refused(cli("measure", place.task, place.policy, "--target", path, "--json"))
    assert sentence.startswith(f"{path}: {message}")
    assert sentence.endswith(": calibrate again, or use it all the same with --force.")


@pytest.mark.slow
def test_times_of_this_machine_in_place_of_another_say_so(cli: tiny.Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = profile_with(place, tmp_path, lambda data: data["device"].update(cpu="Cortex-A76"))
    words = ("measure", place.task, place.policy, "--target")

    [forced] = cli(*words, path, "--force", "--json").json["policies"]
    [own] = cli(*words, place.profile, "--batch", 2, "--json").json["policies"]

    assert forced["forced"].startswith("a profile holds for one device; cpu was 'Cortex-A76' when it was made")
    assert own["forced"] is None
    assert all(row["latency_ms"] > 0 for row in (forced, own))


def integers(place: tiny.Place, folder: Path, weights: int) -> Path:
    path = folder / f"{weights}.json"
    bits = LayerBits(weights=weights, activations=8)
    path.write_text(policy_to_json(uniform(place.anatomy, width=1, bits=bits)))
    return path


def probed(data: dict[str, Any], **keys: Any) -> None:
    """Integers of 7 bits were measured to be twice as fast as those of 8."""
    widths = [Width(weights=w, activations=8, kernel="int8", speedup=s) for w, s in ((8, 1.0), (7, 2.0))]
    found = Capabilities(
        stairs=(), widths=tuple(widths), change_ms=0.0, change_elements=1, settled=True, seconds=1.0
    )  # fmt: skip
    data.update(beside_profile(found))
    data["capabilities"].update(keys)


def test_integers_of_eight_bits_are_refused_where_those_of_seven_were_measured(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path
) -> None:
    """But for their true latency, which anybody may ask for."""
    profile = profile_with(place, tmp_path, lambda data: data["target"].update(integer_bits=7))
    path = integers(place, tmp_path, 8)

    sentence = tiny.refused(cli("predict", place.task, path, "--target", profile))
    assert re.match(
        rf"{path}: bits\.[\w.]+ is 8/8, but integer weights of this target have 7 bits, as those ", sentence
    )
    assert cli("measure", place.task, path, "--target", profile, "--json").json["policies"][0]["latency_ms"] > 0


def test_fewer_bits_are_not_priced_as_eight_where_their_kernels_are_faster(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path
) -> None:
    profile = profile_with(place, tmp_path, probed)

    for weights in (4, 7):
        path = integers(place, tmp_path, weights)
        sentence = tiny.refused(cli("predict", place.task, path, "--target", profile))
        assert sentence.startswith(f"{path}: integers of fewer than 8 bits take faster kernels on the device of ")
    for weights, known in ((8, profile), (4, place.profile)):
        path = integers(place, tmp_path, weights)
        assert cli("predict", place.task, path, "--target", known, "--json").json["policies"]


@pytest.mark.parametrize("damage", [{"widths": [{"weights": 8}]}, {"change_elements": "many"}, {"seconds": None}])
def test_damaged_capabilities_of_a_profile_are_named(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, damage: dict[str, Any]
) -> None:
    profile = profile_with(place, tmp_path, lambda data: probed(data, **damage))
    sentence = tiny.refused(cli("kit", place.task, "--target", profile, "--out", tmp_path / "kit"))
    assert sentence.startswith(f"{profile}: capabilities are not those that nightpress wrote (")
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize("command", ["predict", "measure"])
def test_a_policy_is_taken_as_it_is_written_where_the_target_would_not_have_proposed_it(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, command: str
) -> None:
    """A width between the channel steps that a profile's device was measured to have."""
    coarse = profile_with(place, tmp_path, lambda data: data["target"].update(channel_steps=[[0, 16], [64, 32]]))
    policy = tmp_path / "between.json"
    policy.write_text(policy_to_json(Policy(model=place.anatomy.digest, prune={place.anatomy.groups[0].name: 0.125})))

    rows = [cli(command, place.task, policy, "--target", profile, "--json").json["policies"][0]
            for profile in (place.profile, coarse)]  # fmt: skip

    assert {row["digest"] for row in rows} == {digest(policy_from_json(policy.read_text(), str(policy)))}
    assert rows[0]["size_bytes"] == rows[1]["size_bytes"]


@pytest.mark.parametrize("command", ["calibrate", "measure"])
def test_threads_and_batch_are_the_target_s(cli: tiny.Cli, place: tiny.Place, tmp_path: Path, command: str) -> None:
    rest = {"calibrate": ["--out", tmp_path / "here.json"], "measure": [place.policy]}[command]
    sentence = tiny.refused(cli(command, place.task, *rest, "--threads", MANY, "--json"))
    assert sentence.startswith("target.threads must be between 1 and this machine's ")
    assert tiny.refused(cli(command, place.task, *rest, "--batch", 0)).startswith("Invalid value for '--batch': ")


# A calibration


def without_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of a target cannot be kept, as it is not where the windows do not settle."""
    (folder / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def told_of_capabilities(err: str) -> list[str]:
    """A line for each time that they were measured without being kept."""
    return [line for line in err.splitlines() if "/capabilities-" in line or "of the probes never agreed" in line]


def test_a_task_that_is_wrong_is_told_before_the_target_is_measured(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cache(tmp_path, monkeypatch)

    done = cli("calibrate", f"{place.task_file}:nothing", "--out", tmp_path / "here.json")

    assert "nothing" in tiny.refused(done)
    assert told_of_capabilities(done.err) == []


@pytest.mark.slow
def test_a_calibration_of_few_policies_knows_every_kernel_and_says_what_it_does(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seed is one with a kind of kernel that the ten random policies and the rules do not run."""
    out, drawn = tmp_path / "here.json", tmp_path / "drawn"
    without_cache(tmp_path, monkeypatch)

    done = cli("calibrate", place.task, "-n", 10, "--seed", 3, "--batch", 2, "--out", out, "--json")

    assert done.json["target"]["batch"] == 2
    measuring = [line for line in done.err.splitlines() if " measuring " in line]
    assert [line.endswith("a second time") for line in measuring] == [False, True]
    assert len(told_of_capabilities(done.err)) == 1
    written = json.loads(out.read_text())
    assert written["target"]["channel_steps"] == written["capabilities"]["channel_steps"]["both"]
    words = ["sample", place.task, "-n", 210, "--seed", 3, "--target", out, "--out", drawn, "--json"]
    files = [entry["file"] for entry in cli(*words).json["policies"]]
    assert len(cli("predict", place.task, *files, "--target", out, "--json").json["policies"]) == 210


@pytest.mark.parametrize("command", ["calibrate", "apply"])
def test_a_folder_in_the_place_of_the_file_is_refused_before_the_work(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, command: str
) -> None:
    words = {"calibrate": ["calibrate", place.task], "apply": ["apply", place.policy, place.task]}[command]
    out = tmp_path / "there"
    out.mkdir()

    assert tiny.refused(cli(*words, "--out", out)) == f"{out}: a folder is there, but this is to be a file."
    assert tiny.refused(cli(*words, "--out", out / "no" / "a")) == f"{out}/no/a: its folder does not exist."
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("remote", "remedy"),
    [(False, "measure it, or calibrate with more policies"), (True, "make a larger kit")],
)
def test_a_policy_with_kernels_that_no_measured_one_ran_is_named(
    cli: tiny.Cli, place: tiny.Place, tmp_path: Path, remote: bool, remedy: str
) -> None:
    generator = np.random.default_rng(0)
    space = space_of(place.anatomy, RunConfig(task="tiny", base=None, out=tmp_path))
    floats = [replace(space.random(generator), bits={}) for _ in range(14)]
    profile = calibrate(place.anatomy, floats, Target(), timer=tiny.FormulaTimer())
    (tmp_path / "floats.json").write_text(json.dumps({**profile_to_dict(profile), "remote": remote}))
    path = tmp_path / "integers.json"
    path.write_text(policy_to_json(Policy(model=place.anatomy.digest, bits={"stem": INT8})))

    sentence = tiny.refused(
        cli("predict", place.task, place.policy, path, "--target", tmp_path / "floats.json", "--json")
    )

    assert sentence.startswith(f"{path}: ")
    assert sentence.endswith(f", which no measured policy did: {remedy}.")


# Files


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from nightpress.cli import main
raise SystemExit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_module_that_finds_no_room_leaves_what_was_there(place: tiny.Place, tmp_path: Path, name: str) -> None:
    """No file may be longer than 20 kB: the module is."""
    out = tmp_path / name
    out.write_text("mine")

    words = [sys.executable, "-c", FULL, "apply", place.policy, place.task, "--out", out, "--json"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)

    sentence = tiny.refused(tiny.Result(done.returncode, done.stdout, done.stderr))
    assert sentence == f"{out}: cannot be written: File too large."
    assert out.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]
