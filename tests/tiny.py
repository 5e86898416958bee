"""A tiny task with real data, the command line called as a user calls it, and one real night shared by all tests."""

import json
import logging
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from nightpress.cli import main
from nightpress.cli.config import load_config
from nightpress.evaluators import Task
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.calibrate import calibrate
from nightpress.evaluators.latency.measure import REFERENCE, Timer, Timing
from nightpress.evaluators.latency.profile_file import profile_to_dict
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.task import load_task
from nightpress.search.config import RunConfig
from nightpress.search.mark import mark
from nightpress.search.prepare import space_of
from nightpress.search.records import Quality, TrialState
from nightpress.search.resolved import resolved_config
from nightpress.search.store import Store, open_storage
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.policy import Policy, policy_to_json

TASK = '''"""Which quarter of an 8x8 picture is bright: a residual network of three convolutions."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nightpress.evaluators import Task

WEIGHTS = Path(__file__).with_name("weights.pt")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block = Block(width)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.bn(self.stem(x))))
        return self.head(torch.flatten(self.pool(x), 1))


def pictures(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for item, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        x[item, :, row : row + 4, column : column + 4] += 0.6
    return TensorDataset(x, labels)


def build(**parts) -> Task:
    net = Net()
    if WEIGHTS.is_file():
        net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    given = dict(name="tiny", model=net, example_input=torch.zeros(1, 1, 8, 8), train=pictures(200, 0),
                 test=pictures(80, 1))
    return Task(**{**given, **parts})
'''

CONFIG: Mapping[str, Any] = {
    "task": "task.py:build",
    "budget": "240s",  # four trials end it long before, where nothing else uses the cores
    "finetune": {"short_steps": 3, "long_steps": 4, "finalists": 2},
    "search": {"max_trials": 4},
    "calibration_policies": 10,
}

RUN_FILES = {
    "config.yaml", "study.journal", "target.json", "decisions.jsonl", "trials.csv", "trials.parquet", "artifacts",
    "report.html", "log.jsonl",
}  # fmt: skip
"""What every run folder holds at the end."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, f"stdout must be one line of JSON, but is {self.out!r}"
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What is said to the user, after the log lines, which begin with a digit of the time."""
        lines = self.err.splitlines()
        told = [line for line in lines if line.startswith("nightpress: ")]
        assert len(told) == 1, self.err
        assert lines[-1] == told[0], self.err
        assert all(line[:1].isdigit() for line in lines[:-1]), self.err
        return told[0].removeprefix("nightpress: ")


def write_task(folder: Path, more: str = "") -> Path:
    """``task.py`` with trained weights beside it; ``more`` is code at its end. Returns the file."""
    path = folder / "task.py"
    path.write_text(TASK)
    task = load_task(f"{path}:build")
    torch.save(trained(task), folder / "weights.pt")
    path.write_text(f"{TASK}\n\n{more}")
    return path


_weights: dict[str, torch.Tensor] = {}


def trained(task: Task) -> dict[str, torch.Tensor]:
    """Weights of the tiny network after a second of training, the same for every test of a session."""
    if not _weights:
        inputs, labels = task.train.tensors  # type: ignore[attr-defined]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for module in task.model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
            task.model.train()
            for _ in range(25):  # plain gradient descent: torch.optim takes seconds to import
                task.model.zero_grad()
                F.cross_entropy(task.model(inputs), labels).backward()
                with torch.no_grad():
                    for weight in task.model.parameters():
                        if weight.grad is not None:
                            weight -= 0.5 * weight.grad
        _weights.update({key: value.clone() for key, value in task.model.state_dict().items()})
    return _weights


def write_config(folder: Path, name: str = "config.yaml", **keys: Any) -> Path:
    """A config for the tiny task, quick to run; ``keys`` replace its own, None leaves one out."""
    data = {key: value for key, value in {**CONFIG, "out": str(folder / "run"), **keys}.items() if value is not None}
    path = folder / name
    path.write_text(yaml.safe_dump(data))
    return path


def anatomy_of(task_file: Path, function: str = "build") -> Anatomy:
    """The anatomy of the task in a file for the default target."""
    return inspect(load_task(f"{task_file}:{function}"), step_of=Target().channel_step)[0]


class FormulaTimer(Timer):
    """Times models by the size of their files, so that a profile needs no quiet machine."""

    def __init__(self) -> None:
        self.target = Target()

    def time(
        self, models: Mapping[str, Path], reference: Path | None, *, least_rounds: int = 4, most_rounds: int = 20,
        kernels: bool = False, window_ms: float = 0, round_ms: float = 0,
    ) -> dict[str, Timing]:  # fmt: skip
        del least_rounds, most_rounds, kernels, window_ms, round_ms
        files = {**models, REFERENCE: reference} if reference is not None else {**models}
        latency_ms = {key: 0.01 + path.stat().st_size / 1e7 for key, path in files.items()}
        return {
            key: Timing(windows_ms=(value, value), reference_ms=latency_ms.get(REFERENCE))
            for key, value in latency_ms.items()
        }


def write_profile(path: Path, anatomy: Anatomy, **keys: Any) -> Path:
    """A profile for this device as calibration writes it, its latencies by a formula; ``keys`` replace entries."""
    space = space_of(anatomy, RunConfig(task="tiny", base=None, out=path))
    generator = np.random.default_rng(0)
    policies = [space.random(generator) for _ in range(12)]
    profile = calibrate(anatomy, policies, Target(), timer=FormulaTimer())
    path.write_text(json.dumps({**profile_to_dict(profile), **keys}))
    return path


def write_run(config: Path) -> Path:
    """The run folder of a night that has only just begun, so that nothing needs to be trained."""
    settings = load_config(config)
    settings.out.mkdir(parents=True)
    (settings.out / "config.yaml").write_text(yaml.safe_dump(resolved_config(settings)))
    state = {"state": "interrupted", "phase": "inspect", "mark": mark(settings.task, settings.base)}
    (settings.out / "state.json").write_text(json.dumps(state))
    return settings.out


Cli = Callable[..., Result]
"""What the fixture ``cli`` gives: :func:`call` with the test's own output."""


def call(*words: object, capsys: pytest.CaptureFixture[str]) -> Result:
    """The command line in this process."""
    logger = logging.getLogger("nightpress")
    before = list(logger.handlers), logger.level, logger.propagate
    threads, arguments = torch.get_num_threads(), sys.argv
    capsys.readouterr()
    sys.argv = ["nightpress", *map(str, words)]
    try:
        code = main()
    finally:
        sys.argv = arguments
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def nightpress(*words: object, cwd: Path | None = None, timeout: float = 240) -> Result:
    """The command line in a process of its own."""
    done = subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "nightpress.cli", *map(str, words)]


@contextmanager
def driver(*words: object) -> Generator[subprocess.Popen[str]]:
    """A command that goes on beside the test; killed at the end, should it still run."""
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def bare_python(folder: Path) -> Path:
    """A virtual environment that sees only numpy, onnxruntime and what onnxruntime itself requires."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in ("numpy", "onnxruntime", "flatbuffers", "protobuf", "packaging"):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if not file.parts[0].startswith("..")}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


def add_trial(folder: Path, policy: Policy) -> int:
    """A complete trial in a run's study, its figures made up and without weights; returns its number."""
    store = Store(open_storage(folder, None))
    trial = store.study.ask()
    store.begin(trial, policy, time.time())
    latency = {"latency_ms": 0.02, "low_ms": 0.01, "high_ms": 0.03, "measured": False}
    store.note(trial.number, predicted=latency, size_bytes=80_000, macs=1_000_000, params=20_000)
    quality = Quality(rung="bn", split="search", accuracy=0.9, accuracy_se=0.05, samples=40, seconds=0.1)
    store.note_quality(trial.number, quality)
    store.finish(trial.number, TrialState.COMPLETE, finished=time.time())
    return trial.number


@dataclass(frozen=True, slots=True)
class Night:
    """One real night on the tiny task, run as ``run --json`` in a process of its own."""

    folder: Path
    task: str
    config: Path
    run: Path
    result: Result


_nights: list[Night] = []


def night(factory: pytest.TempPathFactory) -> Night:
    """The session's one night; it is run when the first test asks for it."""
    if not _nights:
        folder = factory.mktemp("night")
        task = write_task(folder)
        config = write_config(folder)
        result = nightpress("run", config, "--json")
        _nights.append(Night(folder, f"{task}:build", config, folder / "run", result))
    return _nights[0]


def bare(path: Path) -> dict[str, bytes]:
    """A folder's files by name."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with a task, its profile and a policy that is right."""

    folder: Path
    task_file: Path
    anatomy: Anatomy
    profile: Path
    policy: Path

    @property
    def task(self) -> str:
        return f"{self.task_file}:build"


_places: dict[str, Place] = {}


def place(factory: pytest.TempPathFactory, more: str = "") -> Place:
    """The session's folder for a task file with ``more`` code at its end."""
    if more not in _places:
        folder = factory.mktemp("place")
        task_file = write_task(folder, more)
        anatomy = anatomy_of(task_file)
        policy = folder / "policy.json"
        policy.write_text(policy_to_json(Policy(model=anatomy.digest, prune={anatomy.groups[0].name: 0.5})))
        profile = write_profile(folder / "profile.json", anatomy)
        _places[more] = Place(folder, task_file, anatomy, profile, policy)
    return _places[more]


def config_for(place: Place, folder: Path, **keys: Any) -> Path:
    """A config in a test's own folder for the task of a place, its target not measured but read."""
    return write_config(folder, **{"task": place.task, "target": str(place.profile), **keys})


def refused(result: Result) -> str:
    """The one sentence of a command that was given something wrong."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    return result.sentence
