"""Whatever stands in a profile or in a kit's results: it can be used, or a sentence names the file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightpress.evaluators.latency import timer
from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.capabilities import probes
from nightpress.evaluators.latency.kit import kit_id, read_results, write_kit
from nightpress.evaluators.latency.measure import settings as how
from nightpress.evaluators.latency.profile import Profile, profile_of
from nightpress.evaluators.latency.profile_file import is_remote, load_profile, measured_elsewhere, profile_to_dict
from nightpress.evaluators.latency.target import Target, target_to_dict
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import ACTIVATION_BITS, WEIGHT_BITS, Policy
from strategies import FormulaTimer, space_of, toy_anatomy

ANATOMY = toy_anatomy()
EXAMPLES = 25
"""What is accepted is fitted, which takes a second or two."""
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([1e300, 1e-300, -1])
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


def random_policies(count: int) -> list[Policy]:
    generator = np.random.default_rng(0)
    return [space_of(ANATOMY).random(generator) for _ in range(count)]


def replace_any(content: Any, data: st.DataObject) -> None:
    """Put any value in the place of any part of a file's content, deep inside or as a whole."""
    while True:
        key = data.draw(st.sampled_from(list(content) if isinstance(content, dict) else range(len(content))))
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            content[key] = data.draw(VALUES)
            return
        content = cast("Any", inner)


def used_or_refused(path: Path, read: Callable[[], object]) -> None:
    """Read a file, which may be refused by an InputError that names it, and by nothing else."""
    try:
        read()
    except InputError as error:
        if not str(error).startswith(f"{path}: "):
            raise


def use(profile: Profile, policies: Sequence[Policy]) -> None:
    """What predictions, a night's space and the next file take of a profile."""
    assert np.isfinite(profile.predict(policies)).all()
    assert profile.seconds_each >= 0
    assert profile.caveat is None or profile.caveat
    assert profile.target.bit_choices(WEIGHT_BITS, ACTIVATION_BITS)
    assert all(profile.target.channel_step(channels) >= 1 for channels in (1, 100, 10_000))
    json.dumps([profile_to_dict(profile), profile.noise_warnings()], allow_nan=False)


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile = calibrate(ANATOMY, random_policies(12), Target(), timer=FormulaTimer(Target()))
    path.write_text(json.dumps(profile_to_dict(profile)))
    return path


@pytest.fixture(scope="module")
def results_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    quick = how(3, 3, window_ms=2, round_ms=5)
    write_kit(ANATOMY, random_policies(12), Target(), folder, how=quick, probes=probes())
    (folder / timer.RESULTS).write_text(json.dumps(timer.measure_kit(folder)))
    return folder / timer.RESULTS


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_a_profile_with_anything_in_it_is_used_or_refused(profile_file: Path, data: st.DataObject) -> None:
    content = json.loads(profile_file.read_text())
    replace_any(content, data)
    path = profile_file.with_name("replaced.json")
    path.write_text(json.dumps(content))

    is_remote(path)
    used_or_refused(path, lambda: measured_elsewhere(path, force=True))
    used_or_refused(path, lambda: use(load_profile(path, ANATOMY, force=True), random_policies(12)))


@pytest.mark.slow
@settings(max_examples=8 * EXAMPLES, deadline=None)
@given(data=st.data())
def test_results_with_anything_in_them_are_used_or_refused(results_file: Path, data: st.DataObject) -> None:
    """Also in the kit's own description, as if it had been written so."""
    content = json.loads(results_file.read_text())
    replace_any(content, data)
    if isinstance(content["kit"], dict) and "id" in content["kit"]:
        content["kit"]["id"] = kit_id(content["kit"])
    path = results_file.parent.with_name("replaced.json")
    path.write_text(json.dumps(content))

    def read() -> None:
        found = read_results(path, ANATOMY)
        json.dumps([found.date, found.capabilities and found.capabilities.to_dict()], allow_nan=False)
        profile = profile_of(
            ANATOMY, found.target, found.policies, found.timings, found.sizes, seconds=lambda: found.seconds,
            device=found.device,
        )  # fmt: skip
        use(profile, random_policies(12))

    used_or_refused(path, read)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("threads", "2", r"a whole number from 1 to 1,000,000, but got '2'"),
        ("threads", True, r"a whole number from 1 to 1,000,000, but got True"),
        ("batch", 0, r"a whole number from 1 to 1,000,000, but got 0"),
        ("channel_steps", [], r"a list of \[width, step\] by width, the first of width 0, but got \[\]"),
        ("channel_steps", [[8, 4]], r"a list of \[width, step\] by width, the first of width 0, but got \[\[8, 4\]\]"),
        ("channel_steps", [[0, 0]], r"a list of \[width, step\] by width, the first of width 0, but got \[\[0, 0\]\]"),
        ("disabled_optimizers", "all", r"a list of texts, but got 'all'"),
        ("integer_kernels", "no", r"true or false, but got 'no'"),
        ("runtime", "tvm", r"one of onnxruntime, .*openvino, but got 'tvm'"),
    ],
)  # fmt: skip
def test_a_target_of_wrong_types_is_refused_with_its_key(
    profile_file: Path, tmp_path: Path, key: str, value: object, rule: str
) -> None:
    path = tmp_path / "profile.json"
    content = json.loads(profile_file.read_text())
    path.write_text(json.dumps({**content, "target": {**target_to_dict(Target()), key: value}}))

    with pytest.raises(InputError, match=rf"^{path}: target\.{key} must be {rule}\.$"):
        load_profile(path, ANATOMY)


@pytest.mark.parametrize("value", [1e300, 1e-300])
def test_times_that_no_device_takes_are_refused(profile_file: Path, tmp_path: Path, value: float) -> None:
    path = tmp_path / "profile.json"
    content = json.loads(profile_file.read_text())
    content["points"][3]["measured_ms"] = value
    path.write_text(json.dumps(content))

    with pytest.raises(InputError, match=r"measured_ms must lie between 1e-06 and 1e\+12, but one is 1e"):
        load_profile(path, ANATOMY)
