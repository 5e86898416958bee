"""The config file: defaults, every mistake named with file and key, times, and targets."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.cli.config import (
    FileTarget,
    deadline_of,
    load_config,
    parse_budget,
    parse_target,
    parse_until,
    read_target,
)
from nightpress.evaluators.latency.target import Target, target_to_dict
from nightpress.search.clock import Deadline
from nightpress.search.config import SAMPLERS, Limits, RunConfig
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import DISTILL_METHODS

Load = Callable[[str], RunConfig]
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Reads a text as a config file."""

    def read(text: str) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(path)

    return read


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone with daylight-saving time, written out so that no zone files are needed."""
    monkeypatch.setenv("TZ", BERLIN)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# Defaults


def test_every_key_but_task_has_its_default(load: Load, tmp_path: Path) -> None:
    config = load("task: plates.py:build")

    assert asdict(config) == {
        "task": "plates.py:build",
        "base": str(tmp_path.resolve()),
        "out": Path("runs/plates-py-build"),
        "target": {
            "runtime": "onnxruntime",
            "threads": 1,
            "batch": 1,
            "disabled_optimizers": ("WeightBiasQuantization",),
            "channel_steps": ((0, 4), (64, 8)),
            "integer_kernels": True,
            "integer_bits": 8,
        },
        "target_profile": None,
        "seed": 0,
        "until": None,
        "budget_seconds": None,
        "limits": {"max_latency_ms": None, "min_accuracy": None, "max_size_bytes": None, "max_macs": None},
        "space": {
            "prune": {"max_ratio": 0.8},
            "bits": {"weights": (8, 32), "activations": (8, 32)},
            "blocks": True,
            "distill": ("logit",),
            "sparsity": False,
            "importance": ("l2",),
            "stages": (1,),
            "ranges": ("minmax",),
            "scales": ("fixed",),
        },
        "search": {
            "sampler": "nightpress",
            "without": (),
            "runner": "local",
            "address": None,
            "workers": 1,
            "resources": {"cpu": None, "gpu": 0.0, "memory_gb": None},
            "storage": None,
            "study": "nightpress",
            "max_trials": None,
        },
        "finetune": {"part_steps": None, "short_steps": None, "long_steps": None, "batch_size": 64, "finalists": None},
        "calibration_policies": None,
        "force": False,
        "warm_start": (),
        "seeds": (),
        "device": "auto",
        "max_disk_bytes": 20_000_000_000,
        "notify": {"webhook": None, "command": None},
    }


def test_every_key_can_be_set(load: Load, tmp_path: Path) -> None:
    config = load(
        """
        task: mnist5k-resnet
        target: {runtime: onnxruntime, threads: 2, batch: 8}
        out: runs/plates
        seed: 7
        until: "07:00"
        limits: {max_latency_ms: 4.0, min_accuracy: 0.9, max_size_bytes: 2000000}
        space:
          prune: {max_ratio: 0.5}
          bits: {weights: [4, 8], activations: [8]}
          blocks: false
          distill: false
          sparsity: true
          importance: [l1, taylor]
          stages: [1, 4]
          ranges: [mse]
          scales: [fixed, learned]
        search:
          sampler: random
          without: [rungs, seeds]
          runner: ray
          address: 10.0.0.1:6379
          workers: auto
          resources: {cpu: 4, gpu: 0.5, memory_gb: 8}
          storage: "sqlite:///a.db"
          study: plates
          max_trials: 9
        finetune: {part_steps: 1, short_steps: 3, long_steps: 4, batch_size: 8, finalists: 2}
        calibration_policies: 12
        warm_start: [runs/a, runs/b]
        seeds: [mine.json]
        device: cpu
        """
    )

    assert (config.target.threads, config.target.batch) == (2, 8)
    assert (config.out, config.seed, config.until, config.device) == (Path("runs/plates"), 7, "07:00", "cpu")
    assert config.limits == Limits(max_latency_ms=4.0, min_accuracy=0.9, max_size_bytes=2_000_000)
    assert config.space.prune is not None
    assert config.space.prune.max_ratio == 0.5
    assert (config.space.bits.weights, config.space.bits.activations) == ((4, 8), (8,))
    assert not config.space.blocks
    assert config.space.distill == ()
    assert config.space.sparsity
    assert (config.space.importance, config.space.stages) == (("l1", "taylor"), (1, 4))
    assert (config.space.ranges, config.space.scales) == (("mse",), ("fixed", "learned"))
    assert asdict(config.search) == {
        "sampler": "random", "without": ("rungs", "seeds"), "runner": "ray", "address": "10.0.0.1:6379",
        "workers": "auto",
        "resources": {"cpu": 4, "gpu": 0.5, "memory_gb": 8.0}, "storage": f"sqlite:///{tmp_path.resolve()}/a.db",
        "study": "plates", "max_trials": 9,
    }  # fmt: skip
    steps = {"part_steps": 1, "short_steps": 3, "long_steps": 4}
    assert asdict(config.finetune) == {**steps, "batch_size": 8, "finalists": 2}
    assert config.calibration_policies == 12
    assert config.warm_start == (str(tmp_path.resolve() / "runs/a"), str(tmp_path.resolve() / "runs/b"))
    assert config.seeds == (str(tmp_path.resolve() / "mine.json"),)


@pytest.mark.parametrize(
    ("written", "methods"),
    [("true", DISTILL_METHODS), ("false", ()), ("[none]", ()), ("[none, logit]", ("none", "logit"))],
)
def test_distillation_is_all_or_nothing_or_a_list_of_methods(
    load: Load, written: str, methods: tuple[str, ...]
) -> None:
    assert load(f"task: a\nspace: {{distill: {written}}}").space.distill == methods


def test_prune_null_keeps_all_channels(load: Load) -> None:
    assert load("task: a\nspace: {prune: null}").space.prune is None


def test_json_is_yaml_too(load: Load) -> None:
    assert load(json.dumps({"task": "a", "seed": 3})).seed == 3


def test_the_run_folder_of_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: a\nout: runs/here")
    assert load_config(path, tmp_path / "there").out == tmp_path / "there"


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: a\nsed: 1", "unknown key sed; did you mean seed"),
        ("task: a\nlimits: {max_latency: 1}", "unknown key limits.max_latency; did you mean max_latency_ms"),
        ("task: a\nspace: {block: true}", "unknown key space.block; did you mean blocks"),
        ("task: a\nspace: {prune: {ratio: 0.5}}", "unknown key space.prune.ratio; did you mean max_ratio"),
        ("task: a\nspace: {bits: {weight: [8]}}", "unknown key space.bits.weight; did you mean weights"),
        ("task: a\nsearch: {sampeler: tpe}", "unknown key search.sampeler; did you mean sampler"),
        ("task: a\nfinetune: {short_step: 1}", "unknown key finetune.short_step; did you mean short_steps"),
        ("task: a\ntarget: {thread: 1}", "unknown key target.thread; did you mean threads"),
        (
            "task: a\nsearch: {zzzz: 1}",
            "unknown key search.zzzz (known: address, max_trials, resources, runner, sampler, storage, study, without",
        ),
        ("task: a\n1: 2", "unknown key 1 (known: budget, calibration_policies"),
    ],
)
def test_an_unknown_key_names_the_nearest(load: Load, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"config\.yaml: {re.escape(message)}"):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: 5", "task must be a valid string, but got 5"),
        ("task: a\nseed: x", "seed must be a valid integer, unable to parse string as an integer, but got 'x'"),
        ("task: a\nseed: 1.5", "seed must be a valid integer, got a number with a fractional part, but got 1.5"),
        ("task: a\nout: 3", "out must be a valid string, but got 3"),
        ("task: a\ntarget: 5", "target must be a valid string, but got 5"),
        ("task: a\ntarget: {threads: x}", "target.threads must be a valid integer"),
        ("task: a\nlimits: [1]", "limits must be a mapping of keys, but got [1]"),
        ("task: a\nlimits:", "limits must be a mapping of keys, but got None"),
        ("task: a\nlimits: {max_latency_ms: fast}", "limits.max_latency_ms must be a valid number"),
        ("task: a\nspace: {blocks: maybe}", "space.blocks must be true or false"),
        ("task: a\nspace: {distill: logit}", "space.distill must be a list, but got 'logit'"),
        ("task: a\nspace: {distill: 3}", "space.distill must be "),
        ("task: a\nspace: {prune: {max_ratio: x}}", "space.prune.max_ratio must be a valid number"),
        ("task: a\nspace: {bits: {weights: 8}}", "space.bits.weights must be a list, but got 8"),
        ("task: a\nspace: {bits: {weights: [a]}}", "space.bits.weights.0 must be a valid integer"),
        ("task: a\nsearch: {workers: many}", "search.workers must be a valid integer"),
        ("task: a\nwarm_start: runs/a", "warm_start must be a list, but got 'runs/a'"),
        ("task: a\nbudget: 3600", "budget must be a valid string, but got 3600"),
        ("task: a\nuntil: 22:30", 'until must stand in quotes, as "22:30" does, but without them YAML reads 1350'),
        ("task: a\nuntil: 2026-01-31", "until must stand in quotes"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_came(load: Load, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"config\.yaml: {re.escape(message)}"):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: a\nseed: -1", "seed must be at least 0 and of at most 32 bits, but got -1"),
        ("task: a\nseed: 4294967296", "seed must be at least 0 and of at most 32 bits, but got 4294967296"),
        ("task: a\ndevice: gpu", "device must be one of auto, cpu, cuda, but got 'gpu'"),
        ("task: a\ncalibration_policies: 5", "calibration_policies must be between 10 and 500, but got 5"),
        ("task: a\nsearch: {runner: slurm}", "search.runner must be one of local, ray, but got 'slurm'"),
        ("task: a\nsearch: {workers: 0}", "search.workers must be at least 1, or auto, but got 0"),
        ("task: a\nsearch: {runner: ray, address: auto}", "search.address must be host:port of a cluster's head node"),
        ("task: a\nsearch: {address: 'h:1'}", "search.address must be left out unless search.runner is ray"),
        ("task: a\nsearch: {resources: {gpu: 1}}", "search.resources.gpu must be left out unless search.runner is ray"),
        ("task: a\nsearch: {resources: {cpu: 0}}", "search.resources.cpu must be at least 1, but got 0"),
        ("task: a\nsearch: {resources: {memory_gb: 0}}", "search.resources.memory_gb must be above 0, but got 0.0"),
        ("task: a\nsearch: {max_trials: 0}", "search.max_trials must be at least 1, but got 0"),
        ("task: a\nspace: {prune: {max_ratio: 1}}", "space.prune.max_ratio must be in [0, 1), but got 1.0"),
        ("task: a\nspace: {prune: {max_ratio: -0.1}}", "space.prune.max_ratio must be in [0, 1), but got -0.1"),
        ("task: a\nspace: {prune: {max_ratio: .nan}}", "space.prune.max_ratio must be in [0, 1), but got nan"),
        ("task: a\nspace: {bits: {weights: [9]}}", "space.bits.weights must be a list out of [2, 3, 4, 5, 6"),
        ("task: a\nspace: {bits: {weights: []}}", "space.bits.weights must be a list out of"),
        ("task: a\nspace: {bits: {activations: [9]}}", "space.bits.activations must be a list out of [2, 3, 4, 5"),
        ("task: a\nspace: {bits: {weights: [8, 8]}}", "space.bits.weights must be a list out of"),
        ("task: a\nspace: {distill: [logits]}", "space.distill must be a list out of ['none', 'logit', "),
        ("task: a\nspace: {distill: []}", "space.distill must be a list out of ['none', 'logit', "),
        ("task: a\nspace: {importance: [l3]}", "space.importance must be a list out of ['l2', 'l1', "),
        ("task: a\nspace: {stages: [0]}", "space.stages must be a list out of [1, 2, "),
        ("task: a\nspace: {ranges: [max]}", "space.ranges must be a list out of ['minmax', 'percentile', 'mse']"),
        ("task: a\nspace: {scales: []}", "space.scales must be a list out of ['fixed', 'learned']"),
        ("task: a\nlimits: {max_latency_ms: -1}", "limits.max_latency_ms must be above 0, but got -1.0"),
        ("task: a\nlimits: {max_latency_ms: .nan}", "limits.max_latency_ms must be above 0, but got nan"),
        ("task: a\nlimits: {min_accuracy: 90}", "limits.min_accuracy must be at most 1, but got 90"),
        ("task: a\nlimits: {max_macs: 0}", "limits.max_macs must be above 0, but got 0"),
        ("task: a\nlimits: {max_size_bytes: 0}", "limits.max_size_bytes must be above 0, but got 0"),
        ("task: a\nfinetune: {short_steps: 0}", "finetune.short_steps must be at least 1, but got 0"),
        (
            "task: a\nfinetune: {part_steps: 9, short_steps: 9}",
            "finetune.part_steps must be at least 0 and less than short_steps, but got 9",
        ),
        ("task: a\nfinetune: {long_steps: 0}", "finetune.long_steps must be at least 1, but got 0"),
        ("task: a\nfinetune: {finalists: 0}", "finetune.finalists must be at least 1, but got 0"),
        ("task: a\nfinetune: {batch_size: 1}", "finetune.batch_size must be at least 2, but got 1"),
        ("task: a\ntarget: {threads: 0}", "target.threads must be at least 1, but got 0"),
        ("task: a\ntarget: {batch: 0}", "target.batch must be at least 1, but got 0"),
        ("task: a\ntarget: {runtime: tensorrt}", "target.runtime must be one of onnxruntime"),
        ("task: a\ntarget: tensorrt", "target must be one of onnxruntime"),
        ("task: a\nbudget: soon", "budget must be a length of time such as 8h or 1h30m, but got 'soon'"),
        ("task: a\nbudget: ''", "budget must be a length of time such as 8h or 1h30m, but got ''"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_the_rule(load: Load, text: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"config\.yaml: {re.escape(message)}"):
        load(text)


def test_an_unknown_sampler_is_told_the_list(load: Load) -> None:
    with pytest.raises(InputError, match=f"search.sampler must be one of {', '.join(SAMPLERS)}, but got 'tpee'"):
        load("task: a\nsearch: {sampler: tpee}")


@pytest.mark.parametrize("text", ["seed: 1", "task: null", "{}"])
def test_a_missing_task_is_told_what_it_may_be(load: Load, text: str) -> None:
    with pytest.raises(InputError, match=r"task is missing; it names a built-in task or path/to/file.py:function"):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: a\nlimits: {", "not YAML at line 2"),
        ("task: [a", "not YAML at line 1"),
        ("task: !!python/object:os.system x", "not YAML at line 1: could not determine a constructor"),
        ("task: \x00", "not YAML: it cannot be parsed"),
        ("- task: a", "a config is a mapping of keys, but got list"),
        ("", "a config is a mapping of keys, but got NoneType"),
        ("just text", "a config is a mapping of keys, but got str"),
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_refused(load: Load, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load(text)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: there is no such config file; nightpress init DIR makes one"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"the config cannot be read: .*Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin1.yaml").write_bytes(b"task: \xe9")
    with pytest.raises(InputError, match=r"latin1\.yaml: the config cannot be read: .*utf-8"):
        load_config(tmp_path / "latin1.yaml")


# Lengths of time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h", 28800), ("90s", 90), ("1h30m", 5400), ("1h 30m", 5400), ("2d", 172800), ("0.5h", 1800),
        ("1d1h1m1s", 90061),
    ],
)  # fmt: skip
def test_a_budget_is_read(text: str, seconds: float) -> None:
    assert parse_budget(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "-8h", "8H", "1e3h", "8h later", "nan", "8.h"])
def test_what_is_not_a_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--budget must be a length of time such as 8h or 1h30m, but got {text!r}")):  # noqa: E501  # fmt: skip
        parse_budget(text, "--budget")


@pytest.mark.parametrize("text", ["0h", "0s", "366d", "99999999999d"])
def test_a_budget_is_neither_nothing_nor_years(text: str) -> None:
    with pytest.raises(InputError, match=f"--budget must be longer than no time and at most 365d, but got '{text}'"):
        parse_budget(text, "--budget")


@given(st.integers(0, 300), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_a_budget_is_the_sum_of_its_parts(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
    assert parse_budget(f"{days}d{hours}h{minutes}m{seconds}s", "--budget") == expected


# Moments


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone()


@pytest.mark.parametrize(
    ("now", "text", "expected"),
    [
        ("2026-01-30T22:00", "07:00", "2026-01-31T07:00"),
        ("2026-01-31T06:59:59", "07:00", "2026-01-31T07:00"),
        ("2026-01-31T07:00", "07:00", "2026-02-01T07:00"),
        ("2026-01-31T07:00:01", "7:00", "2026-02-01T07:00"),
        ("2026-12-31T23:00", "00:00", "2027-01-01T00:00"),
        ("2026-01-30T22:00", "2026-02-02T06:30", "2026-02-02T06:30"),
        ("2026-01-30T22:00", "2026-01-31T06:30:00+00:00", "2026-01-31T06:30:00+00:00"),
    ],
)
def test_until_is_the_next_such_moment(now: str, text: str, expected: str) -> None:
    assert parse_until(text, "--until", local(now)) == local(expected).timestamp()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("evening", "hours"),
    [
        ("2026-10-24T22:00:00+02:00", 10),  # clocks go back in the night
        ("2026-03-28T22:00:00+01:00", 8),  # clocks go forward
        ("2026-07-01T22:00:00+02:00", 9),
    ],
)
def test_seven_stays_seven_when_the_clocks_change(evening: str, hours: int) -> None:
    now = local(evening)
    until = parse_until("07:00", "--until", now)
    assert until - now.timestamp() == hours * 3600
    assert time.strftime("%H:%M", time.localtime(until)) == "07:00"


def test_a_moment_in_the_past_is_refused() -> None:
    with pytest.raises(InputError, match="--until must lie in the future, but got '2026-01-30T21:00' and it is 2026-01-30T22:00"):  # noqa: E501  # fmt: skip
        parse_until("2026-01-30T21:00", "--until", local("2026-01-30T22:00"))


@pytest.mark.parametrize("text", ["", "tomorrow", "24:00", "07:60", "7", "2026-13-01", "0001-01-01"])
def test_what_is_not_a_moment_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"until must be a time such as 07:00 or 2026-01-31T07:00, but got '{text}'"):
        parse_until(text, "until")


# Which of them counts


def test_the_command_line_wins_over_the_config(load: Load) -> None:
    config = load('task: a\nuntil: "07:00"')
    soon: Any = pytest.approx(time.time() + 3600, abs=5)
    hour = Deadline(soon, fixed=False)
    assert deadline_of(config, None, "1h") == hour
    until = deadline_of(load("task: a\nbudget: 1h"), "2099-01-31T07:00", None)
    assert until == Deadline(local("2099-01-31T07:00").timestamp(), fixed=True)
    assert deadline_of(load('task: a\nuntil: "07:00"\nbudget: 8h'), None, "1h") == hour


def test_the_config_counts_where_the_command_line_is_silent(load: Load) -> None:
    now = time.time()
    later: Any = pytest.approx(now + 7200, abs=5)
    assert deadline_of(load("task: a\nbudget: 2h"), None, None) == Deadline(later, fixed=False)
    deadline = deadline_of(load('task: a\nuntil: "07:00"'), None, None)
    assert deadline is not None
    assert deadline.fixed
    assert 0 < deadline.epoch - now <= 25 * 3600
    assert deadline_of(load("task: a"), None, None) is None


def test_until_and_budget_exclude_each_other(load: Load) -> None:
    with pytest.raises(InputError, match="--until and --budget exclude each other"):
        deadline_of(load("task: a"), "07:00", "8h")
    with pytest.raises(InputError, match="until and budget exclude each other in a config"):
        deadline_of(load('task: a\nuntil: "07:00"\nbudget: 8h'), None, None)


def test_a_moment_in_the_past_in_the_config_is_refused(load: Load) -> None:
    with pytest.raises(InputError, match="until must lie in the future"):
        deadline_of(load('task: a\nuntil: "2020-01-31T07:00"'), None, None)


# Targets


def test_a_target_is_a_runtime_or_its_settings(tmp_path: Path) -> None:
    assert parse_target("onnxruntime", tmp_path, "here") == (Target(), None)
    full = FileTarget(runtime="onnxruntime", threads=2, batch=8)
    assert parse_target(full, tmp_path, "here") == (Target(threads=2, batch=8), None)


def test_a_target_is_a_profile_file_beside_the_config(load: Load, tmp_path: Path) -> None:
    target = Target(threads=2, batch=4, disabled_optimizers=())
    profile = tmp_path / "here.json"
    profile.write_text(json.dumps({"target": target_to_dict(target)}))

    config = load("task: a\ntarget: here.json")

    assert config.target == target
    assert config.target_profile == str(tmp_path.resolve() / "here.json")


NO_PROFILES = ["[]", "{}", "not json", '{"target": {}}', 2000 * "[", '{"target": {"disabled_optimizers": [], "x": 1}}']
REFUSED = dict.fromkeys(NO_PROFILES, "not a profile of nightpress calibrate")
REFUSED['{"target": {"disabled_optimizers": null}}'] = "target.disabled_optimizers must be a list of texts, but got"


@pytest.mark.parametrize("text", REFUSED)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "here.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"here\.json: {re.escape(REFUSED[text])}"):
        read_target(path)


def test_a_part_that_the_search_does_not_have_cannot_be_left_out(load: Load) -> None:
    with pytest.raises(InputError, match=r"search.without must be a list out of .*'rungs'.*, but got \['rung'\]"):
        load("task: a\nsearch: {without: [rung]}")
