"""Values for the properties, and a tiny residual network with its anatomy: no download, no training."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.utils.data import TensorDataset

from nightpress.evaluators.apply import Compressor, compressor
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.measure import REFERENCE, Timer, Timing
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.task import Task
from nightpress.spaces.anatomy import Anatomy, Block, Group, Layer, Op
from nightpress.spaces.policy import (
    ACTIVATION_BITS,
    DISTILL_METHODS,
    IMPORTANCES,
    MAX_STAGES,
    RANGES,
    SCALES,
    SCHEDULES,
    WEIGHT_BITS,
    Distill,
    FineTune,
    LayerBits,
    Policy,
)
from nightpress.spaces.space import Space

EVERY_PAIR = tuple(LayerBits(weights=w, activations=a) for w in WEIGHT_BITS for a in ACTIVATION_BITS)
# What targets offer on integer kernels: fp32 activations beside fp32 weights, since 32/8 means the same as 32/32.
OFFERED = tuple(
    LayerBits(weights=w, activations=a) for w in (2, 3, 4, 5, 6, 7, 8, 32) for a in (8, 32) if w < 32 or a == 32
)
CLASSES = 5


# Policies


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)


def distills() -> st.SearchStrategy[Distill]:
    return st.builds(
        Distill,
        method=st.sampled_from(DISTILL_METHODS),
        alpha=st.floats(0, 1),
        temperature=st.floats(1, 100),
        schedule=st.sampled_from(SCHEDULES),
        feature_weight=st.floats(0, 1000),
    )


def ratios() -> st.SearchStrategy[float]:
    """Prune ratios as the policy file keeps them: six digits, in (0, 1)."""
    return st.integers(1, 999_999).map(lambda millionths: millionths / 1e6)


def policies(anatomy: Anatomy | None = None) -> st.SearchStrategy[Policy]:
    """Any policy that a file can hold: of a model's own names, or of any names where no anatomy is given.

    Zero ratios and fp32 layers, which a file leaves out, do not occur.
    """
    if anatomy is None:
        groups = layers = blocks = st.text(min_size=1, max_size=8)
    else:
        groups = st.sampled_from([g.name for g in anatomy.groups])
        layers = st.sampled_from([n.name for n in anatomy.layers])
        blocks = st.sampled_from([b.name for b in anatomy.blocks])
    return st.builds(
        Policy,
        model=st.text(max_size=16) if anatomy is None else st.just(anatomy.digest),
        prune=st.dictionaries(groups, ratios(), max_size=5),
        bits=st.dictionaries(layers, st.sampled_from([b for b in EVERY_PAIR if b != LayerBits()]), max_size=6),
        sparsity=st.dictionaries(layers, ratios(), max_size=4),
        removed_blocks=st.sets(blocks, max_size=3).map(lambda names: tuple(sorted(names))),
        importance=st.sampled_from(IMPORTANCES),
        ranges=st.sampled_from(RANGES),
        scales=st.sampled_from(SCALES),
        distill=distills(),
        finetune=st.builds(FineTune, learning_rate=st.floats(0, 10), stages=st.integers(1, MAX_STAGES)),
    )


# An anatomy by hand


def _op(name: str, kind: str, inputs: str, shape: tuple[int, ...], follows: str = "", **attrs: object) -> Op:
    """An operation whose tensor loses one channel for each that the group ``follows`` loses."""
    none: dict[str, int] = {}
    return Op(
        name=name,
        kind=kind,
        inputs=tuple(inputs.split()),
        shape=(1, *shape),
        module=name if kind in {"conv", "linear"} else None,
        attrs=attrs,
        lost=(none, {follows: 1}, *(none for _ in shape[1:])) if follows else (),
    )


def _conv(name: str, source: str, channels: int, follows: str) -> Op:
    return _op(
        name, "conv", source, (channels, 8, 8), follows,
        kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
    )  # fmt: skip


def toy_anatomy() -> Anatomy:
    """Two residual blocks on 16 channels and a classifier. One inner width, 10, is no multiple of its step."""
    ops = (
        _op("x", "input", "", (3, 8, 8)),
        _conv("stem", "x", 16, "stem"),
        _conv("one.a", "stem", 32, "one.a"),
        _conv("one.b", "one.a", 16, "stem"),
        _op("one.sum", "add", "stem one.b", (16, 8, 8), "stem"),
        _conv("two.a", "one.sum", 10, "two.a"),
        _conv("two.b", "two.a", 16, "stem"),
        _op("two.sum", "add", "one.sum two.b", (16, 8, 8), "stem"),
        _op("pool", "global_pool", "two.sum", (16, 1, 1), "stem"),
        _op("flat", "flatten", "pool", (16,), "stem"),
        _op("head", "linear", "flat", (CLASSES,)),
    )
    layers = tuple(Layer(name=op.name, kind=op.kind, op=op.name, macs=1000, params=100) for op in ops if op.module)
    return Anatomy(
        digest="00112233445566ff",
        ops=ops,
        output="head",
        groups=(
            Group(name="stem", channels=16, step=4, layers=("stem", "one.b", "two.b"), macs=3000),
            Group(name="one.a", channels=32, step=8, layers=("one.a",), macs=1000),
            Group(name="two.a", channels=10, step=4, layers=("two.a",), macs=1000),
        ),
        layers=layers,
        blocks=(
            Block(name="one", ops=("one.a", "one.b", "one.sum"), source="stem", output="one.sum",
                  layers=("one.a", "one.b"), macs=2000),
            Block(name="two", ops=("two.a", "two.b", "two.sum"), source="one.sum", output="two.sum",
                  layers=("two.a", "two.b"), macs=2000),
        ),
        left_out=(),
        params=600,
    )  # fmt: skip


# A real network


class Residual(nn.Module):
    """Two convolutions and a sum."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Tiny(nn.Module):
    """Stem, two residual blocks in a row, a depthwise stage with ReLU6, a third block, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.one = Residual(16, 24)
        self.two = Residual(16, 16)
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.widen = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.three = Residual(32, 32)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.depthwise(self.two(self.one(self.stem(x)))))
        x = torch.flatten(self.pool(self.three(x)), 1)
        return self.head(F.relu(self.hidden(x)))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose weights and batch norms (some scales negative) follow from the seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = make()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
                size = module.num_features
                module.weight.copy_((0.5 + torch.rand(size)) * torch.where(torch.rand(size) < 0.2, -1.0, 1.0))
                module.bias.copy_(0.3 * torch.randn(size))
                module.running_mean = 0.3 * torch.randn(size)
                module.running_var = 0.5 + torch.rand(size)
    return network.eval()


def images(count: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    """Standard normal inputs, shape (count, channels, side, side)."""
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def task_of(network: nn.Module, inputs: Tensor | None = None) -> Task:
    """A task around a network; its labels mean nothing."""
    inputs = images(32) if inputs is None else inputs
    data = TensorDataset(inputs, torch.arange(len(inputs)) % CLASSES)
    return Task(name="toy", model=network, example_input=inputs[:1], train=data, test=data)


def compressor_of(task: Task, step: int = 4) -> Compressor:
    """Without the groups' dry run, which is a process of its own: what a test applies, it tries itself."""
    anatomy, network = inspect(task, step_of=lambda channels: step, cache=False, verify=False)
    return compressor(anatomy, network, task.example_input)


@cache
def tiny() -> Compressor:
    """The tiny network, inspected."""
    return compressor_of(task_of(seeded(Tiny)))


def shapes_of(module: fx.GraphModule, inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of every node's tensor as the module runs."""
    shapes: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape)
            return value

    with torch.no_grad():
        Recorder(module).run(inputs)
    return shapes


def space_of(anatomy: Anatomy, **options: Any) -> Space:
    """Everything on offer."""
    return Space(anatomy=anatomy, max_ratio=0.75, bit_choices=OFFERED, **options)


def state_after(policy: Policy) -> dict[str, NDArray[Any]]:
    """The state that a policy leaves the tiny network in. Top level, so that a spawned process can call it;
    as arrays, since tensors would travel through shared memory."""
    return {name: value.numpy() for name, value in tiny().apply(policy)[0].state_dict().items()}


# Data, a counter, a clock


@cache
def all_digits() -> Arrays:
    pixels, labels = load_digits(return_X_y=True)
    return Arrays(torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long())


def digits(count: int = 512) -> Arrays:
    """Real handwritten digits of 8×8 pixels, which scikit-learn brings: inputs (n, 1, 8, 8) in [0, 1]."""
    return all_digits().take(torch.arange(count))


def digits_reader(seed: int = 0) -> nn.Module:
    """A small network for the digits."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
        )

    return seeded(make, seed)


class Counted(nn.Module):
    """Counts the items that pass through it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.items = 0

    def forward(self, x: Tensor) -> Tensor:
        self.items += len(x)
        return self.inner(x)


class FormulaTimer(Timer):
    """Answers with a formula of each file's size instead of measuring. A second look finds ``slower`` times as much."""

    def __init__(self, target: Target, slower: float = 1.01) -> None:
        self.target, self.slower = target, slower
        self.timed: list[str] = []

    def time(
        self, models: Mapping[str, Path], reference: Path | None, *, least_rounds: int = 4, most_rounds: int = 20,
        kernels: bool = False, window_ms: float = 0, round_ms: float = 0,
    ) -> dict[str, Timing]:  # fmt: skip
        del least_rounds, most_rounds, kernels, window_ms, round_ms
        files = {**models, REFERENCE: reference} if reference is not None else dict(models)
        seen = {REFERENCE, *self.timed} if self.timed else set[str]()
        latency_ms = {
            key: (0.02 + path.stat().st_size / 1e6) * (self.slower if key in seen else 1) for key, path in files.items()
        }
        self.timed += models
        return {
            key: Timing(windows_ms=(value, 1.01 * value), reference_ms=latency_ms.get(REFERENCE))
            for key, value in latency_ms.items()
        }
