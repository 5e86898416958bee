"""Which networks can be traced and exported, and that every operation means in ONNX what it means in torch."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nightpress.evaluators.bake import bake
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.lower import lower, trace
from nightpress.evaluators.onnx_graph import KINDS, build_onnx
from nightpress.evaluators.runtime import Session
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import Policy
from strategies import compressor_of, images, seeded, task_of

Forward = Callable[[Tensor], object]


class Convolution(nn.Module):
    """A convolution of 3 → 8 channels on 8×8 pixels, then the function that a test is about."""

    def __init__(self, then: Forward) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.then = then

    def forward(self, x: Tensor) -> object:
        return self.then(self.conv(x))


def network(then: Forward) -> nn.Module:
    return seeded(lambda: Convolution(then))


def kinds(model: nn.Module, inputs: Tensor) -> list[str]:
    return [op.kind for op in lower(trace(model, inputs[:1]))[0]]


def in_runtime(model: nn.Module, inputs: Tensor, folder: Path) -> Tensor:
    """What ONNX Runtime computes for the uncompressed model."""
    made = compressor_of(task_of(model, inputs))
    policy = Policy(model=made.anatomy.digest)
    module, planned = made.apply(policy)
    path = folder / "model.onnx"
    path.write_bytes(build_onnx(planned, bake(module, planned), batch=None))
    return Session(path, threads=1, disabled_optimizers=()).outputs(inputs)


def check(model: nn.Module, inputs: Tensor, folder: Path) -> None:
    with torch.no_grad():
        expected = model(inputs)
    torch.testing.assert_close(in_runtime(model, inputs, folder), expected, rtol=1e-4, atol=1e-5)


# What is refused


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_control_flow_on_values_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"^The model Branching cannot be traced: .*control flow.* Its forward must not branch on tensor values; ",
    ):
        trace(Branching(), images(1))


def test_a_forward_that_fails_is_refused_with_its_reason() -> None:
    with pytest.raises(InputError, match=r"^The model Convolution cannot be traced: no such thing\. Its forward"):
        trace(network(_raise), images(1))


def _raise(x: Tensor) -> Tensor:
    raise RuntimeError("no such thing.\nmore of it")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus()), r"^The model uses Softplus in 1, which nightpress cannot"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU())), r"^The model uses PReLU in 0\.1, which"),
        (nn.Sequential(nn.Conv2d(3, 8, 3, padding="same")), r"uses padding 'same' \(zeros\) in 0"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
            r"uses padding \(1, 1\) \(reflect\) in 0",
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(4)), r"adaptive pooling from \(6, 6\) to \(4, 4\) in"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2)), r"uses reshape to \(8, 36\) in 1"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, dilation=2)), r"uses max_pool with dilation 2 in 1"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, divisor_override=3)), r"avg_pool with divisor_override 3"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU("tanh")), r"uses gelu with approximate 'tanh' in 1"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_exported_is_named_with_its_place(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lower(trace(model, images(1)))


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda x: torch.exp(x), r"^The model uses .*exp.* in .*, which nightpress cannot export yet; replace it"),
        (lambda x: x.abs(), r"^The model uses abs in "),
        (lambda x: x + 1, r"uses add with a constant or of a tensor with itself in "),
        (lambda x: x + x, r"uses add with a constant or of a tensor with itself in "),
        (lambda x: x * 2.0, r"uses mul with a constant or of"),
        (lambda x: torch.add(x, x.relu(), alpha=2), r"uses add with alpha in "),
        (lambda x: x.add(x.relu(), alpha=0.5), r"uses add with alpha in "),
        (lambda x: torch.cat([x, x], 1), r"uses concatenation of a tensor with itself in "),
        (lambda x: torch.cat([x, x.relu()], 2), r"uses concatenation along another axis than the channels in "),
        (lambda x: torch.cat([x, x.relu()]), r"uses concatenation along another axis than the channels in "),
        (lambda x: x * x.size(1), r"uses mul with a constant or of"),
        (lambda x: F.avg_pool2d(x, x.size(3)), r"uses avg_pool with a size that is computed; nn\.AdaptiveAvgPool2d"),
        (lambda x: x.view(x.size(0), 4, -1), r"uses reshape to \(4, 128\) in "),
        (lambda x: x.split(4, 1)[0], r"uses split in "),
        (lambda x: x.mean(1), r"uses mean over 1 in "),
        (lambda x: x.mean(), r"uses mean over None in "),
        (lambda x: x.view(-1, 4, 128), r"uses reshape to \(4, 128\) in "),
        (lambda x: torch.flatten(x), r"uses reshape to \(\) in "),
        (lambda x: F.max_pool2d(x, 2, dilation=2), r"uses max_pool with dilation 2 in "),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), r"uses avg_pool with divisor_override 3 in "),
        (lambda x: F.gelu(x, approximate="tanh"), r"uses gelu with approximate 'tanh' in "),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_exported_is_named(then: Forward, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lower(trace(network(then), images(1)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_parameter_of_the_users_own_is_named() -> None:
    with pytest.raises(InputError, match=r"^The model uses 1\.scale in "):
        lower(trace(nn.Sequential(nn.Conv2d(3, 8, 3), Scaled()), images(1)))


@pytest.mark.parametrize(
    ("then", "kind"),
    [(lambda x: (x, x), "tuple"), (lambda x: [x], "list"), (lambda x: {"logits": x}, "dict")],
)
def test_a_model_that_returns_more_than_a_tensor_is_refused(then: Forward, kind: str) -> None:
    with pytest.raises(InputError, match=rf"^The model must return one tensor, but it returns a {kind}; wrap it"):
        lower(trace(network(then), images(1)))


# What is known


class Excited(nn.Module):
    """Squeeze and excitation: channels multiplied by a gate of shape (c, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.squeeze(x))


class Branches(nn.Module):
    """Two convolutions side by side."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


MODULES: list[tuple[str, Callable[[], nn.Module]]] = [
    ("relu", nn.ReLU),
    ("relu6", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU6())),
    ("hardswish", nn.Hardswish),
    ("hardsigmoid", nn.Hardsigmoid),
    ("silu", nn.SiLU),
    ("gelu", nn.GELU),
    ("sigmoid", nn.Sigmoid),
    ("max_pool", lambda: nn.MaxPool2d(3, 2, 1)),
    ("max_pool", lambda: nn.MaxPool2d((3, 2), ceil_mode=True)),
    ("avg_pool", lambda: nn.AvgPool2d(2)),
    ("avg_pool", lambda: nn.AvgPool2d(3, 2, 1)),
    ("avg_pool", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    ("avg_pool", lambda: nn.AvgPool2d(3, 2, ceil_mode=True)),
    ("avg_pool", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    ("avg_pool", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)),
    ("avg_pool", lambda: nn.AdaptiveAvgPool2d((2, 4))),
    ("global_pool", lambda: nn.AdaptiveAvgPool2d(1)),
    ("flatten", nn.Flatten),
    ("batch_norm", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))),
    ("batch_norm", lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, affine=False, eps=0.1))),
    ("conv", lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)),
    ("conv", lambda: nn.Conv2d(8, 16, 3, groups=8, bias=False)),
    ("conv", lambda: nn.Conv2d(8, 12, 3, groups=4)),
    ("conv", lambda: nn.Conv2d(8, 6, (3, 1), stride=(1, 2), padding=(0, 1), dilation=(2, 1))),
    ("conv", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False), nn.ReLU6())),
    ("linear", lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(512, 7, bias=False))),
    ("add", lambda: Branches(torch.add)),
    ("mul", lambda: Branches(torch.mul)),
    ("cat", lambda: Branches(lambda a, b: torch.cat([b, a, torch.relu(b)], dim=1))),
    ("mul", Excited),
]


@pytest.mark.parametrize(("kind", "make"), MODULES)
def test_a_module_means_the_same_in_onnx(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make()))
    inputs = 4 * images(3)

    assert kind in kinds(model, inputs)
    check(model, inputs, tmp_path)


FUNCTIONS: list[tuple[str, Forward]] = [
    ("relu", F.relu),
    ("relu", lambda x: x.relu()),
    ("relu6", F.relu6),
    ("hardswish", F.hardswish),
    ("hardsigmoid", F.hardsigmoid),
    ("silu", F.silu),
    ("gelu", F.gelu),
    ("sigmoid", torch.sigmoid),
    ("sigmoid", lambda x: x.sigmoid()),
    ("max_pool", lambda x: F.max_pool2d(x, 2)),
    ("max_pool", lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1)),
    ("max_pool", lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
    ("avg_pool", lambda x: F.avg_pool2d(x, (2, 1))),
    ("avg_pool", lambda x: F.avg_pool2d(x, 3, stride=2, padding=1)),
    ("avg_pool", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("avg_pool", lambda x: F.adaptive_avg_pool2d(x, 2)),
    ("global_pool", lambda x: F.adaptive_avg_pool2d(x, 1)),
    ("global_pool", lambda x: x.mean([2, 3])),
    ("global_pool", lambda x: x.mean(dim=(-1, -2), keepdim=True)),
    ("global_pool", lambda x: torch.mean(x, (2, 3), True)),
    ("flatten", lambda x: torch.flatten(x, 1)),
    ("flatten", lambda x: x.flatten(1)),
    ("flatten", lambda x: x.view(-1, 512)),
    ("flatten", lambda x: x.reshape(-1, 512)),
    ("flatten", lambda x: x.view(x.size(0), -1)),
    ("flatten", lambda x: torch.flatten(x.view(x.shape[0], -1), 1)),
    ("add", lambda x: x + F.relu(x)),
    ("add", lambda x: x.add(F.relu(x))),
    ("mul", lambda x: x * torch.sigmoid(x)),
    ("cat", lambda x: torch.cat((x, F.relu(x)), dim=-3)),
    ("conv", lambda x: F.dropout(x, 0.5, training=False)),
    ("conv", lambda x: F.adaptive_avg_pool2d(x, 8).contiguous()),
]


@pytest.mark.parametrize(("kind", "then"), FUNCTIONS)
def test_a_function_means_the_same_in_onnx(kind: str, then: Forward, tmp_path: Path) -> None:
    model = network(then)
    inputs = 4 * images(3)

    assert kind in kinds(model, inputs)
    check(model, inputs, tmp_path)


def test_every_kind_of_operation_was_compared() -> None:
    assert {kind for kind, _ in [*MODULES, *FUNCTIONS]} | {"input"} == KINDS


class Around(nn.Module):
    """A sum of a module's output and its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


def test_a_batch_norm_that_another_reader_bypasses_is_not_folded(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Around(nn.BatchNorm2d(8))))

    assert kinds(model, images(1)) == ["input", "conv", "batch_norm", "add"]
    check(model, images(3), tmp_path)


def test_a_batch_norm_behind_a_convolution_is_folded_into_it() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))

    ops, output = lower(trace(model, images(1)))

    assert [(op.kind, op.module, op.norm) for op in ops] == [
        ("input", None, None), ("conv", "0", "1"), ("relu", None if ops[2].module is None else "2", None),
    ]  # fmt: skip
    assert output == ops[-1].name


def test_stochastic_depth_is_nothing_at_inference() -> None:
    from torchvision.ops import StochasticDepth

    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), StochasticDepth(0.5, "row"), nn.ReLU()))

    assert kinds(model, images(1)) == ["input", "conv", "relu"]


def test_a_layer_that_is_used_twice_computes_the_same_both_times(tmp_path: Path) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.ReLU(), conv, nn.ReLU()).eval()

    check(model, images(3), tmp_path)


def test_an_unknown_model_is_refused_at_inspection() -> None:
    with pytest.raises(InputError, match=r"^The model uses Tanh in 1, which nightpress cannot export yet"):
        inspect(task_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh())))


def test_what_cannot_be_pruned_is_left_out_with_a_reason_and_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 36, 3), nn.Conv2d(36, 36, 3, groups=9), nn.Conv2d(36, 4, 3), nn.Flatten())

    anatomy, _ = inspect(task_of(model))

    reasons = {item.name: item.reason for item in anatomy.left_out}
    assert reasons["2"] == "4 channels are fewer than two steps of 4"
    assert not [reason for reason in reasons.values() if "ShapeProp" in reason or "\n" in reason]
    assert anatomy.groups == ()
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_is_written_into_the_file() -> None:
    made = compressor_of(task_of(network(F.relu)))
    module, planned = made.apply(Policy(model=made.anatomy.digest))

    written = onnx.load_from_string(build_onnx(planned, bake(module, planned), batch=4))

    shapes = [
        [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*written.graph.input, *written.graph.output)
    ]
    assert shapes == [[4, 3, 8, 8], [4, 8, 8, 8]]


def test_tracing_does_not_change_the_weights() -> None:
    model = network(F.relu)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    traced = trace(model, images(1))

    assert isinstance(traced, fx.GraphModule)
    assert all(torch.equal(before[name], value) for name, value in traced.state_dict().items())
    assert plan(inspect(task_of(model))[0], Policy(model="")).macs == 64 * 8 * 27
