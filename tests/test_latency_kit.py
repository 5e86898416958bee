"""Another device: a kit measured by numpy and ONNX Runtime alone, pinned to one core, and what comes back of it."""

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny
from nightpress.cli.config import read_target
from nightpress.cli.kit import measure_over_ssh
from nightpress.cli.measuring import as_measured, calibrate_from_results, write_kit_of
from nightpress.evaluators.latency import timer
from nightpress.evaluators.latency.capabilities import beside_profile, capabilities_from_dict, probes
from nightpress.evaluators.latency.kit import MEASURE, kit_id, read_results, write_kit
from nightpress.evaluators.latency.measure import REFERENCE, settings
from nightpress.evaluators.latency.profile_file import load_profile, profile_to_dict
from nightpress.evaluators.latency.target import Target, fingerprint, target_to_dict
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import LayerBits, Policy, digest, network_digest, policy_from_dict
from strategies import space_of, toy_anatomy

ANATOMY = toy_anatomy()
SEVEN = LayerBits(weights=7, activations=8)
# What a device with one core sees.
PINNED = """
import os, runpy, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
runpy.run_path(sys.argv[1], run_name="__main__")
"""


class Kit(NamedTuple):
    folder: Path
    python: Path
    policies: list[Policy]

    def measure(self, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """Run the kit's script as the other device would."""
        script = (folder or self.folder) / MEASURE
        return subprocess.run(
            [self.python, "-c", PINNED, script], capture_output=True, text=True, check=False, cwd=self.folder
        )


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit")
    generator = np.random.default_rng(0)
    policies = [space_of(ANATOMY).random(generator) for _ in range(14)]
    quick = settings(3, 3, window_ms=4, round_ms=20)
    write_kit(ANATOMY, policies, Target(), folder / "kit", how=quick, probes=probes())
    found = Kit(folder / "kit", tiny.bare_python(folder / "bare"), policies)
    done = found.measure()
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="the other device is this one with a single core")
@pytest.mark.slow
def test_what_another_device_measured_becomes_its_profile(kit: Kit, tmp_path: Path) -> None:
    results = read_results(kit.folder / timer.RESULTS, ANATOMY)
    assert set(results.timings) == {REFERENCE, *map(digest, kit.policies)}
    assert all(timing.kernels and timing.reference_ms for timing in results.timings.values())

    data = calibrate_from_results(ANATOMY, kit.folder / timer.RESULTS, tmp_path / "there.json")

    assert data["models_measured"] == len({digest(policy) for policy in kit.policies})
    assert data["device"]["cores"] == 1 != fingerprint(Target()).cores
    profile = load_profile(tmp_path / "there.json", ANATOMY)  # of another device, and meant to be used here
    assert profile.remote
    assert profile.device.cores == 1
    low, high = profile.predict(kit.policies)[:, 1:].T
    assert (low > 0).all()
    assert (low <= high).all()


@pytest.mark.slow
def test_what_another_device_can_do_stands_in_its_profile(kit: Kit, tmp_path: Path) -> None:
    found = read_results(kit.folder / timer.RESULTS, ANATOMY).capabilities
    assert found is not None
    assert {(w.weights, w.activations): w.kernel for w in found.widths} == {
        (32, 32): "fp32", (16, 32): "fp32", (8, 32): "fp32", (8, 8): "int8", (7, 8): "int8", (4, 8): "int8"
    }  # fmt: skip
    assert all(ms > 0 for stair in found.stairs for _, ms in stair.points)

    calibrate_from_results(ANATOMY, kit.folder / timer.RESULTS, tmp_path / "there.json")

    data = json.loads((tmp_path / "there.json").read_text())
    assert {key: data[key] for key in ("staircases", "capabilities")} == json.loads(json.dumps(beside_profile(found)))
    assert capabilities_from_dict({**data["capabilities"], "staircases": data["staircases"]}) == found
    target = load_profile(tmp_path / "there.json", ANATOMY).target
    # The kit's policies were drawn on the steps that it was written with.
    assert (target.integer_kernels, target.channel_steps) == (True, Target().channel_steps)


@pytest.mark.slow
def test_a_device_on_which_seven_bits_are_faster_gets_a_kit_of_seven(
    kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def quicken(data: dict[str, Any]) -> None:
        probed = data["answers"][2]["windows_ms"]
        probed.update({key: [min(times) / (2 if key == f"bits {SEVEN}" else 1)] * 2 for key, times in probed.items()})

    profile = tmp_path / "there.json"
    calibrate_from_results(ANATOMY, results_with(kit, tmp_path, quicken), profile)

    assert f"which this kit holds: nightpress kit TASK --target {profile} --out DIR makes one" in caplog.messages[-1]
    first = read_target(profile)
    assert first.integer_bits == 8  # the kit's policies
    again = as_measured(first, profile)
    write_kit_of(ANATOMY, again, tmp_path / "seven", 3, 0)
    description = json.loads((tmp_path / "seven" / timer.KIT).read_text())
    bits = {tuple(pair.values()) for policy in description["policies"].values() for pair in policy["bits"].values()}
    assert (7, 8) in bits
    assert (8, 8) not in bits
    assert description["settings"]["integer_bits"] == 7
    assert as_measured(first, tmp_path / "nothing") == first


@pytest.mark.slow
def test_what_disturbed_another_device_is_said_here(kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def disturb(data: dict[str, Any]) -> None:
        first, again, _ = data["answers"]
        first["busy_cores"] = 7.5
        first["windows_ms"][REFERENCE], again["windows_ms"][REFERENCE] = [0.001, 0.101], [0.2]

    calibrate_from_results(ANATOMY, results_with(kit, tmp_path, disturb), tmp_path / "there.json")

    assert any(text.startswith("other processes used 7.5 cores on average while latencies were measured: measure the ")
               for text in caplog.messages)  # fmt: skip
    [unsettled] = [text for text in caplog.messages if text.startswith("the device is so noisy that the windows of ")]
    assert " (the two lowest lie up to 10000.0% apart): " in unsettled


@pytest.mark.slow
def test_a_kit_is_files_and_the_script_that_measures_here_too(kit: Kit) -> None:
    assert (kit.folder / MEASURE).read_bytes() == Path(timer.__file__).read_bytes()
    description = json.loads((kit.folder / timer.KIT).read_text())
    for part in ("models", "probes"):
        assert {f"{part}/{path.name}" for path in (kit.folder / part).iterdir()} == {
            entry["file"] for entry in description[part].values()
        }


def results_with(kit: Kit, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((kit.folder / timer.RESULTS).read_text())
    change(data)
    path = folder / "results.json"
    path.write_text(json.dumps(data).replace('"1e999"', "1e999"))  # which Python reads as infinity
    return path


def set_window(value: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: next(iter(data["answers"][0]["windows_ms"].values())).__setitem__(0, value)


def kit_with(**keys: object) -> Callable[[dict[str, Any]], object]:
    """As a kit with other keys would have been written."""

    def change(data: dict[str, Any]) -> None:
        data["kit"].update(keys)
        data["kit"]["id"] = kit_id(data["kit"])

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_window(float("nan")), r"a kit's results must be a readable JSON file, but: NaN is not a time\.$"),
        (set_window(-0.1), r"windows_ms of \w+ in 'all models' must be positive numbers, but one is -0\.1\.$"),
        (set_window(0), r"must be positive numbers, but one is 0\.$"),
        (set_window("fast"), r"must be positive numbers, but one is 'fast'\.$"),
        (set_window(1e300), r"must lie between 1e-06 and 1e\+12, but one is 1e\+300\.$"),
        (set_window(1e-300), r"must lie between 1e-06 and 1e\+12, but one is 1e-300\.$"),
        (set_window(10**400), r"these are not the whole results of a kit \(OverflowError: "),
        (lambda d: d["answers"][1]["windows_ms"].update(reference=[0]), r"reference in 'the same models a sec"),
        (lambda d: d.update(seconds=0), r"json: seconds must be positive numbers, but one is 0\.$"),
        (lambda d: d.update(seconds=-1.5), r"json: seconds must be positive numbers, but one is -1\.5\.$"),
        (lambda d: d.update(seconds="1e999"), r"json: seconds must be positive numbers, but one is inf\.$"),
        (lambda d: d["answers"][2].update(seconds="1e999"), r"seconds of 'single layers' must be positive"),
        (lambda d: d["answers"][1].update(busy_cores=-1), r"busy_cores must be numbers that are not negative, but"),
        (lambda d: d["answers"][0].update(busy_cores="all"), r"busy_cores must be numbers .*, but one is 'all'\.$"),
        (lambda d: d["answers"][0].update(session=[1]), r"session must be text, but one is \[1\]"),
        (lambda d: d.update(date=None), r"date must be text, but one is None"),
        (lambda d: d["device"].update(runtime_version=None), r"device\.runtime_version must be text, but got None\.$"),
        (lambda d: d["device"].update(cores=None), r"device\.cores must be a whole number from 1 to 1,000,000, "),
        (lambda d: d["answers"][0]["windows_ms"].popitem(), r"windows_ms of \w+ in 'all models' are missing: run mea"),
        (lambda d: d["answers"][0]["windows_ms"].update(other=[1]), r"'all models' hold models that are not of t"),
        (lambda d: d["answers"][2]["windows_ms"].update(mixed=[-1]), r"windows_ms of mixed in 'single layers' must"),
        (lambda d: d["answers"][0]["kernels"].update(reference={}), r"kernels of reference in 'all models' are emp"),
        (lambda d: d["answers"].pop(), r"these are not the whole results of a kit \(ValueError: zip\(\) .* shorter"),
        (lambda d: d.pop("device"), r"these are not the whole results of a kit \(KeyError: 'device'\); run meas"),
        (lambda d: d["kit"]["target"].update(threads=2), r"the kit was changed after nightpress kit wrote it"),
        (kit_with(model="f" * 16), r"another kit: it was made for model f{16}, the task's model is 0011"),
        (kit_with(operations={"x": [1, 3, 64, 64]}),
         r"made for other layers \(an operation was x of shape \(1, 3, 64, 64\), here it is x of shape .* 8, 8\)\)\.$"),
        (kit_with(settings={**target_to_dict(Target()), "threads": "2"}),
         r"json: target\.threads must be a whole number from 1 to 1,000,000, but got '2'\.$"),
        (kit_with(version=2),
         r"results of a kit of version 4 were expected, but got 2: make the kit again with nightpress kit and measure"),
    ],
)  # fmt: skip
def test_results_that_cannot_be_trusted_are_refused(
    kit: Kit, tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    path = results_with(kit, tmp_path, change)
    with pytest.raises(InputError, match=sentence) as refused:
        read_results(path, ANATOMY)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["", "[1]", '{"id": '])
def test_a_damaged_kit_beside_the_results_says_nothing_against_them(kit: Kit, tmp_path: Path, beside: str) -> None:
    path = results_with(kit, tmp_path, lambda data: None)
    (tmp_path / timer.KIT).write_text(beside)
    assert read_results(path, ANATOMY).timings


@pytest.mark.slow
def test_truncated_results_are_refused(kit: Kit, tmp_path: Path) -> None:
    whole = (kit.folder / timer.RESULTS).read_text()
    (tmp_path / "results.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"results\.json: a kit's results must be a readable JSON file, but: "):
        read_results(tmp_path / "results.json", ANATOMY)


@pytest.mark.slow
def test_nodes_quicker_than_the_profiler_can_tell_are_taken(kit: Kit, tmp_path: Path) -> None:
    def at_once(data: dict[str, Any]) -> None:
        kernels = next(iter(data["answers"][0]["kernels"].values()))
        kernels[next(iter(kernels))][1] = 0.0

    found = read_results(results_with(kit, tmp_path, at_once), ANATOMY)
    assert 0.0 in [kernel.ms for timing in found.timings.values() for kernel in timing.kernels.values()]


def test_results_nested_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"results\.json: a kit's results must be a readable JSON file, but: "):
        read_results(tmp_path / "results.json", ANATOMY)


@pytest.mark.slow
def test_results_beside_another_kit_are_refused(kit: Kit, tmp_path: Path) -> None:
    write_kit(ANATOMY, kit.policies[:2], Target(), tmp_path)
    results_with(kit, tmp_path, lambda data: None)
    with pytest.raises(InputError, match=r"the results are of kit \w+, but the kit beside them is \w+\.$"):
        read_results(tmp_path / "results.json", ANATOMY)


@pytest.mark.slow
def test_a_kit_that_the_device_cannot_measure_says_why(kit: Kit, tmp_path: Path) -> None:
    write_kit(ANATOMY, kit.policies[:1], Target(threads=2), tmp_path / "threads")
    done = kit.measure(tmp_path / "threads")
    assert (done.returncode, done.stderr) == (
        1, "measure: the kit asks for 2 threads, but this device has 1 cores.\n"
    )  # fmt: skip

    write_kit(ANATOMY, kit.policies[:1], Target(), tmp_path / "swapped")
    (tmp_path / "swapped" / "models" / "reference.onnx").write_bytes(b"another")
    done = kit.measure(tmp_path / "swapped")
    assert done.returncode == 1
    assert done.stderr == "measure: models/reference.onnx is not the file that the kit was made with.\n"
    assert not (tmp_path / "swapped" / timer.RESULTS).exists()


@pytest.mark.slow
def test_a_model_that_the_runtime_loads_and_cannot_run_ends_in_a_sentence(kit: Kit, tmp_path: Path) -> None:
    """Its 192 numbers are to become seven."""
    description = write_kit(ANATOMY, kit.policies[:1], Target(), tmp_path)
    shape = numpy_helper.from_array(np.array([7]), "shape")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])], "seven",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7])], [shape],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "models" / "reference.onnx").write_bytes(model.SerializeToString())
    description["models"][REFERENCE]["sha256"] = timer.digest(tmp_path / "models" / "reference.onnx")
    (tmp_path / timer.KIT).write_text(json.dumps(description))

    done = kit.measure(tmp_path)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.fullmatch(r"measure: .* Reshape .*\.", done.stderr.splitlines()[-1])  # behind the runtime's own log


@pytest.mark.slow
def test_a_host_is_measured_over_ssh(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With programs named ssh and scp whose other machine is a folder, and which would ask for a password."""
    caplog.set_level(logging.INFO, "nightpress")
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    shutil.copytree(kit.folder, near)
    (near / timer.RESULTS).unlink()
    shims = {"ssh": f'shift 12; cd {far}; exec sh -c "$*"',
             "scp": f'shift "$(($# - 2))"; cp -r "$(echo "$1" | sed s#^pi@board:#{far}/#)" '
                    f'"$(echo "$2" | sed s#^pi@board:#{far}/#)"'}  # fmt: skip
    for name, text in shims.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1 $2" = "-o BatchMode=yes" ] || exit 5\n{text}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    (far / "nightpress-kit" / "models").mkdir(parents=True)  # what a copy that broke off has left
    measure_over_ssh(near, "pi@board", str(kit.python), "nightpress-kit")

    assert read_results(near / timer.RESULTS, ANATOMY).policies
    assert list(far.iterdir()) == []  # nothing is left there
    assert any(text.startswith("pi@board: the same models a second time: ") for text in caplog.messages)
    with pytest.raises(RuntimeError, match=r"^pi@board: ssh failed: .*no-python"):
        measure_over_ssh(near, "pi@board", "no-python", "nightpress-kit")


# A profile that is used although it is of another device


def test_an_overridden_profile_says_so_in_every_number(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    place, path = tiny.place(tmp_path_factory), tmp_path / "profile.json"
    data = json.loads(place.profile.read_text())
    path.write_text(json.dumps({**data, "device": {**data["device"], "cpu": "Another CPU"}}))
    words = ("predict", place.task, place.policy, "--target", path, "--json")

    assert "cpu was 'Another CPU' when it was made" in tiny.call(*words, capsys=capsys).sentence

    [row] = tiny.call(*words, "--force", capsys=capsys).json["policies"]
    assert row["forced"].startswith("a profile holds for one device; cpu was 'Another CPU' when it was made, here it")
    kept = profile_to_dict(load_profile(path, place.anatomy, force=True))
    assert kept["forced"] == [row["forced"]]
    path.write_text(json.dumps({**kept, "device": data["device"]}))
    with pytest.raises(InputError, match=r"cpu was 'Another CPU'"):  # what was overridden once stays in the file
        load_profile(path, place.anatomy)


@pytest.mark.slow
def test_a_night_for_another_device_claims_no_measurement_of_this_one(tmp_path: Path) -> None:
    task = tiny.write_task(tmp_path)
    tiny.write_profile(tmp_path / "there.json", tiny.anatomy_of(task), remote=True)
    config = tiny.write_config(tmp_path, target="there.json", search={"max_trials": 1})

    run = tiny.nightpress("run", config, "--json").json

    latencies = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()]
    assert "latencies are predictions" in {entry["decision"] for entry in latencies}

    # The calibration's own policies were measured there; nothing else was.
    def network(policy: dict[str, Any]) -> str:
        return network_digest(policy_from_dict(policy, ""))

    known = {network(p["policy"]) for p in json.loads((tmp_path / "run" / "target.json").read_text())["points"]}
    assert run["front"]
    rows = run["front"] + run["baselines"]
    assert {row["measured"] for row in rows if network(row["policy"]) not in known} <= {False}
