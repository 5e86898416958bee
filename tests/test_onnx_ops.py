"""Every operation means in ONNX Runtime what it means in torch, for any batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from networks import (
    DIM,
    TOKENS,
    Chunked,
    Dense,
    Encoder,
    Excited,
    OfTorch,
    OverTokens,
    Shrunk,
    Vision,
    Windowed,
    tokens,
)
from nightpress.evaluators.apply import Compressor
from nightpress.evaluators.bake import bake
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.onnx_graph import build_onnx
from nightpress.evaluators.onnx_ops import EMIT
from nightpress.evaluators.quantise import quantisers
from nightpress.evaluators.rebuild import KINDS
from nightpress.evaluators.runtime import Session, bits_used
from nightpress.evaluators.training import Trainer
from nightpress.spaces.policy import INT8, LayerBits, Policy
from strategies import compressor_of, images, seeded, task_of

Forward = Callable[[Tensor], Tensor]


class Then(nn.Module):
    """A layer, then the function that a test is about: a convolution of 3 → 8 channels on 8×8 pixels, or a linear
    layer over tokens."""

    def __init__(self, then: Forward, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Conv2d(3, 8, 3, padding=1)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))


class Branches(nn.Module):
    """Two convolutions side by side."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


class Scaled(nn.Module):
    """Channels scaled and moved by parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale - self.shift


def whole(model: nn.Module, inputs: Tensor) -> Compressor:
    """Inspected without groups: nothing is pruned here."""
    return compressor_of(task_of(model, inputs), step=10_000)


def write(
    made: Compressor, path: Path, policy: Policy | None = None, inputs: Tensor | None = None
) -> tuple[nn.Module, Path]:
    module, planned = made.apply(policy or Policy(model=made.anatomy.digest))
    if inputs is not None:
        data = Arrays(inputs, torch.zeros(len(inputs), dtype=torch.int64))
        Trainer(task_of(made.whole(), inputs), data, Compute(), seed=0).reestimate(module)
    path.write_bytes(build_onnx(planned, bake(module, planned), batch=None))
    return module, path


def check(model: nn.Module, inputs: Tensor, folder: Path, kind: str) -> None:
    """The rebuilt module and ONNX Runtime answer as the model does, for one example and for all of them."""
    made = whole(model, inputs)
    assert kind in {op.kind for op in made.anatomy.ops}
    module, path = write(made, folder / "model.onnx")
    session = Session(path, threads=1, disabled_optimizers=())
    for given in (inputs[:1], inputs):
        with torch.no_grad():
            expected = model(given)
            torch.testing.assert_close(module(given), expected, rtol=1e-5, atol=1e-6)
        found = session.outputs(given)
        assert found.shape == expected.shape
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


MODULES: list[tuple[str, Callable[[], nn.Module]]] = [
    ("relu", nn.ReLU),
    ("relu6", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU6())),
    ("hardswish", nn.Hardswish),
    ("hardsigmoid", nn.Hardsigmoid),
    ("silu", nn.SiLU),
    ("gelu", nn.GELU),
    ("gelu", lambda: nn.GELU("tanh")),
    ("sigmoid", nn.Sigmoid),
    ("tanh", nn.Tanh),
    ("softplus", nn.Softplus),
    ("mish", nn.Mish),
    ("leaky_relu", lambda: nn.LeakyReLU(0.2)),
    ("elu", lambda: nn.ELU(0.7)),
    ("clip", lambda: nn.Hardtanh(-0.5, 2)),
    ("selu", nn.SELU),
    ("prelu", lambda: nn.PReLU(8)),
    ("prelu", nn.PReLU),
    ("group_norm", lambda: nn.GroupNorm(2, 8)),
    ("group_norm", lambda: nn.GroupNorm(1, 8, eps=0.1)),
    ("group_norm", lambda: nn.GroupNorm(8, 8, affine=False)),
    ("group_norm", lambda: nn.InstanceNorm2d(8, affine=True)),
    ("group_norm", lambda: nn.Sequential(nn.Flatten(2), nn.InstanceNorm1d(8))),
    ("pixel_shuffle", lambda: nn.PixelShuffle(2)),
    ("pixel_shuffle", lambda: nn.ConvTranspose2d(8, 5, 2, stride=2)),
    ("pixel_shuffle", lambda: nn.Sequential(nn.ConvTranspose2d(8, 2, 3, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU())),
    ("permute", lambda: nn.ChannelShuffle(4)),
    ("log_softmax", lambda: nn.LogSoftmax(1)),
    ("pad", lambda: nn.ReflectionPad2d((1, 2, 0, 3))),
    ("pad", lambda: nn.ReplicationPad2d(2)),
    ("amax", lambda: nn.AdaptiveMaxPool2d(1)),
    ("max_pool", lambda: nn.AdaptiveMaxPool2d((2, 4))),
    ("rsqrt", lambda: nn.RMSNorm(8)),
    ("rsqrt", lambda: nn.RMSNorm(8, eps=0.1, elementwise_affine=False)),
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
    ("batch_norm", lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 6), nn.BatchNorm1d(6))),
    ("conv", lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)),
    ("conv", lambda: nn.Conv2d(8, 16, 3, groups=8, bias=False)),
    ("conv", lambda: nn.Conv2d(8, 12, 3, groups=4)),
    ("conv", lambda: nn.Conv2d(8, 6, (3, 1), stride=(1, 2), padding=(0, 1), dilation=(2, 1))),
    ("conv", lambda: nn.Conv2d(8, 6, 3, padding="same")),
    ("conv", lambda: nn.Conv2d(8, 6, (4, 1), padding="same", dilation=(3, 2))),
    ("conv", lambda: nn.Conv2d(8, 8, 2, padding="same", groups=8)),
    ("conv", lambda: nn.Conv2d(8, 6, 3, padding="valid", stride=2)),
    ("conv", lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False), nn.ReLU6())),
    ("linear", lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(512, 7, bias=False))),
    ("add", lambda: Branches(torch.add)),
    ("mul", lambda: Branches(torch.mul)),
    ("sub", lambda: Branches(torch.sub)),
    ("div", lambda: Branches(lambda a, b: a / (b.abs() + 1))),
    ("cat", lambda: Branches(lambda a, b: torch.cat([b, a, torch.relu(b)], dim=1))),
    ("mul", Excited),
    ("cat", Dense),
    ("conv", Shrunk),
    ("param", Scaled),
    ("resize", lambda: nn.Upsample(scale_factor=2)),
    ("resize", lambda: nn.Upsample((12, 20), mode="bilinear")),
    ("resize", lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
    ("roll", Windowed),
    ("pad", lambda: nn.ZeroPad2d((1, 2, 0, 3))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch pads a copy of the input
@pytest.mark.parametrize(("kind", "make"), MODULES)
def test_a_module_means_the_same_in_onnx(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), make()))

    check(model, 4 * images(3), tmp_path, kind)


FUNCTIONS: list[tuple[str, Forward]] = [
    ("relu", F.relu),
    ("relu", lambda x: x.relu()),
    ("relu", lambda x: F.relu(x, inplace=True)),
    ("relu6", F.relu6),
    ("hardswish", F.hardswish),
    ("hardsigmoid", F.hardsigmoid),
    ("silu", F.silu),
    ("gelu", F.gelu),
    ("sigmoid", torch.sigmoid),
    ("exp", torch.exp),
    ("sqrt", lambda x: torch.sqrt(x.abs())),
    ("abs", lambda x: x.abs()),
    ("erf", torch.erf),
    ("neg", lambda x: -x),
    ("clip", lambda x: x.clamp(-1, 1)),
    ("clip", lambda x: x.clamp(min=0.1)),
    ("clip", lambda x: torch.clamp(x, max=0.1)),
    ("log", lambda x: torch.log(x.abs() + 1)),
    ("rsqrt", lambda x: torch.rsqrt(x.abs() + 1)),
    ("reciprocal", lambda x: 2 / (x.abs() + 1)),
    ("pow", lambda x: x.abs() ** 0.5),
    ("pow", lambda x: x**3),
    ("mul", torch.square),
    ("mul", lambda x: F.glu(x, 1)),
    ("neg", lambda x: (1 - torch.sigmoid(x)) * x),
    ("maximum", lambda x: torch.maximum(x, 0.1 * x)),
    ("minimum", lambda x: torch.minimum(x, x.mean(1, keepdim=True))),
    ("sum", lambda x: x.sum((2, 3))),
    ("sum", lambda x: x.sum(1, keepdim=True)),
    ("amax", lambda x: x.amax((2, 3), keepdim=True)),
    ("amax", lambda x: x.max(1, keepdim=True)[0]),
    ("amax", lambda x: x.flatten(2).max(-1).values),
    ("sum", lambda x: F.normalize(x, dim=1)),
    ("sum", lambda x: x.norm(dim=(2, 3))),
    ("sum", lambda x: torch.linalg.vector_norm(x, 1, dim=1)),
    ("matmul", lambda x: torch.einsum("bchw,bdhw->bcd", x, x.exp())),
    ("mul", lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(8)) * x),
    ("permute", lambda x: x.movedim(1, -1)),
    ("permute", lambda x: F.pixel_unshuffle(x, 2)),
    ("mul", lambda x: torch.addcmul(x, x, x.abs(), value=0.5)),
    ("maximum", lambda x: torch.max(x, x.abs() * 0.5)),
    ("softmax", lambda x: F.softmin(x, 1)),
    ("group_norm", lambda x: F.group_norm(x, 4, torch.arange(8.0))),
    ("log_softmax", lambda x: F.log_softmax(x, dim=-1)),
    ("cat", lambda x: torch.stack([x, x.relu()], 2)),
    ("mean", lambda x: torch.stack([x, x.relu()], 0).mean(0)),
    ("max_pool", lambda x: F.max_pool2d(x, 2)),
    ("max_pool", lambda x: F.max_pool2d(x, kernel_size=3, stride=2, padding=1)),
    ("max_pool", lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
    ("avg_pool", lambda x: F.avg_pool2d(x, (2, 1))),
    ("avg_pool", lambda x: F.avg_pool2d(x, 3, stride=2, padding=1)),
    ("avg_pool", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("avg_pool", lambda x: F.avg_pool2d(x, x.size(3) // 2)),
    ("avg_pool", lambda x: F.adaptive_avg_pool2d(x, 2)),
    ("global_pool", lambda x: F.adaptive_avg_pool2d(x, 1)),
    ("global_pool", lambda x: x.mean([2, 3])),
    ("global_pool", lambda x: x.mean(dim=(-1, -2), keepdim=True)),
    ("mean", lambda x: x.mean(1)),
    ("mean", lambda x: x.mean((1, 3), keepdim=True)),
    ("flatten", lambda x: torch.flatten(x, 1)),
    ("flatten", lambda x: x.view(-1, 512)),
    ("flatten", lambda x: x.view(x.size(0), -1)),
    ("flatten", lambda x: torch.flatten(x.view(x.shape[0], -1), 1)),
    ("reshape", lambda x: x.flatten(2)),
    ("reshape", lambda x: x.view(x.size(0), 4, -1)),
    ("reshape", lambda x: x.mean((2, 3), keepdim=True).squeeze(3).unsqueeze(1)),
    ("permute", lambda x: x.permute(0, 2, 3, 1)),
    ("permute", lambda x: x.transpose(-1, 1)),
    ("permute", lambda x: x.flatten(2).transpose(1, 2).contiguous()),
    ("add", lambda x: x + F.relu(x)),
    ("add", lambda x: x + 1),
    ("add", lambda x: x + x),
    ("sub", lambda x: x - 0.5),
    ("mul", lambda x: x * torch.sigmoid(x)),
    ("mul", lambda x: x * 2.0),
    ("mul", lambda x: x**2),
    ("div", lambda x: x / 3),
    ("cat", lambda x: torch.cat((x, F.relu(x)), dim=-3)),
    ("cat", lambda x: torch.cat((x, x), 2)),
    ("slice", lambda x: x[:, 2:6]),
    ("slice", lambda x: x[:, :, ::2, 1:-1:3]),
    ("slice", lambda x: x.split(3, 1)[2]),
    ("slice", lambda x: x.chunk(2, dim=1)[1] * x.narrow(1, 4, 4)),
    ("select", lambda x: x[:, -1]),
    ("select", lambda x: x.unbind(2)[3]),
    ("softmax", lambda x: x.softmax(1)),
    ("softmax", lambda x: F.softmax(x, dim=-1)),
    ("matmul", lambda x: x @ x.transpose(-1, -2)),
    ("matmul", lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2))),
    ("attention", lambda x: F.scaled_dot_product_attention(x, x.exp(), x.abs())),
    (
        "attention",
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3, attn_mask=torch.ones(8, 8).tril().log()),
    ),
    ("attention", lambda x: F.scaled_dot_product_attention(x[:, :, :5], x, x[..., :3])),
    ("roll", lambda x: torch.roll(x, (1, -3), (2, 3))),
    ("roll", lambda x: x.roll(2, 1)),
    ("pad", lambda x: F.pad(x, (1, 0, 2, 1))),
    ("pad", lambda x: F.pad(x.flatten(2), (0, 0, 1, 1))),
    ("resize", lambda x: F.interpolate(x, size=(5, 11))),
    ("resize", lambda x: F.interpolate(x, size=(5, 11), mode="bilinear")),
    ("resize", lambda x: F.interpolate(x, size=(24, 3))),
    ("resize", lambda x: F.interpolate(x, scale_factor=1.5)),
    ("resize", lambda x: F.interpolate(x, scale_factor=(0.5, 2.0), mode="bilinear")),
    ("conv", lambda x: F.conv2d(x, torch.full((6, 8, 1, 1), 0.3), torch.arange(6.0))),
    ("conv", lambda x: F.dropout(x, 0.5, training=False)),
    ("conv", lambda x: F.adaptive_avg_pool2d(x, 8).contiguous()),
    ("layer_norm", lambda x: F.layer_norm(x, (8,))),
    ("layer_norm", lambda x: F.layer_norm(x, (8,), torch.arange(8.0), eps=0.1)),
]


@pytest.mark.parametrize(("kind", "then"), FUNCTIONS)
def test_a_function_means_the_same_in_onnx(kind: str, then: Forward, tmp_path: Path) -> None:
    check(seeded(lambda: Then(then)), 2 * images(3), tmp_path, kind)


OVER_TOKENS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("linear", lambda: nn.Linear(DIM, 6)),
    ("linear", lambda: nn.Linear(DIM, 6, bias=False)),
    ("layer_norm", lambda: nn.LayerNorm(DIM)),
    ("layer_norm", lambda: nn.LayerNorm(DIM, eps=0.1, bias=False)),
    ("attention", lambda: Encoder()),
    ("attention", lambda: Encoder(OfTorch(batch_first=False))),
    ("matmul", lambda: Encoder(Chunked())),
    ("mean", lambda: OverTokens(nn.Identity())),
    ("batch_norm", lambda: Then(lambda x: x.transpose(1, 2), nn.Sequential(nn.BatchNorm1d(TOKENS)))),
]


OVER_SEQUENCES: list[tuple[str, Callable[[], nn.Module]]] = [
    ("conv", lambda: nn.Conv1d(TOKENS, 6, 3)),
    ("conv", lambda: nn.Conv1d(TOKENS, 6, 3, padding="same", dilation=2)),
    ("conv", lambda: nn.Conv1d(TOKENS, 6, 4, padding="same", bias=False)),
    ("conv", lambda: nn.Conv1d(TOKENS, 2 * TOKENS, 3, stride=2, padding=1, groups=TOKENS)),
    ("batch_norm", lambda: nn.Sequential(nn.Conv1d(TOKENS, 6, 1), nn.ReLU(), nn.BatchNorm1d(6), nn.PReLU(6))),
    ("group_norm", lambda: nn.Sequential(nn.Conv1d(TOKENS, 6, 1), nn.GroupNorm(3, 6), nn.Dropout(), nn.GELU())),
    ("max_pool", lambda: nn.Sequential(nn.MaxPool1d(2), nn.Conv1d(TOKENS, 6, 1), nn.MaxPool1d(3, 1, 1))),
    ("avg_pool", lambda: nn.Sequential(nn.Conv1d(TOKENS, 6, 1), nn.AvgPool1d(2, padding=1, count_include_pad=False))),
    ("avg_pool", lambda: nn.AdaptiveAvgPool1d(DIM // 2)),
    ("global_pool", lambda: nn.Sequential(nn.Conv1d(TOKENS, 6, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten())),
    ("softmax", lambda: nn.Sequential(nn.Conv1d(TOKENS, 6, 1), nn.Softmax(1), nn.Conv1d(6, 5, 1))),
]


@pytest.mark.parametrize(("kind", "make"), OVER_SEQUENCES)
def test_sequences_mean_the_same_in_onnx(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    check(seeded(lambda: nn.Sequential(nn.Linear(DIM, DIM), make())), tokens(3), tmp_path, kind)


@pytest.mark.parametrize(("kind", "make"), OVER_TOKENS)
def test_tokens_mean_the_same_in_onnx(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    check(seeded(lambda: nn.Sequential(nn.Linear(DIM, DIM), make())), tokens(3), tmp_path, kind)


def test_a_vision_transformer_means_the_same_in_onnx(tmp_path: Path) -> None:
    check(seeded(Vision), images(3), tmp_path, "expand")


def test_every_kind_of_operation_was_compared() -> None:
    compared = {kind for kind, _ in [*MODULES, *FUNCTIONS, *OVER_TOKENS]} | {"expand", "input"}

    assert compared == KINDS
    assert set(EMIT) | {"input", "param"} == KINDS


@pytest.mark.parametrize(("before", "after"), [(28, 4), (14, 16), (21, 6), (30, 36), (7, 14), (10, 3), (3, 31)])
def test_the_nearest_pixel_is_the_same_for_every_size(before: int, after: int, tmp_path: Path) -> None:
    model = seeded(lambda: Then(lambda x: F.interpolate(x, size=(after, before))))

    check(model, images(2, side=before), tmp_path, "resize")


# Precision


def test_integer_linear_layers_over_tokens_run_on_integer_kernels(tmp_path: Path) -> None:
    model, inputs = seeded(Vision), images(16)
    made = whole(model, inputs)
    policy = Policy(model=made.anatomy.digest, bits={layer.name: INT8 for layer in made.anatomy.layers})

    module, path = write(made, tmp_path / "int8.onnx", policy, inputs)

    _, planned = made.shell(policy)
    used = bits_used(path, planned, Target().disabled_optimizers)
    assert used == {layer.name: "int8" for layer in made.anatomy.layers}
    with torch.no_grad():
        simulated = module(inputs)
    found = Session(path, threads=1, disabled_optimizers=Target().disabled_optimizers).outputs(inputs)
    assert float((found - simulated).norm() / simulated.norm()) < 0.02


def test_weights_of_16_bits_halve_the_file_and_run(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(DIM, 512), nn.ReLU(), nn.Linear(512, DIM)))
    made = whole(model, tokens(3))
    halves = {layer.name: LayerBits(weights=16) for layer in made.anatomy.layers}

    _, full = write(made, tmp_path / "full.onnx")
    _, half = write(made, tmp_path / "half.onnx", Policy(model=made.anatomy.digest, bits=halves))

    weights = sum(value.numel() for name, value in model.named_parameters() if name.endswith("weight"))
    factors = 4 * (512 + DIM)  # one for each channel: what a batch norm would multiply it by
    assert abs(full.stat().st_size - half.stat().st_size - 2 * weights + factors) < 500
    written = [numpy_helper.to_array(i) for i in onnx.load(str(half)).graph.initializer]
    assert sum(value.size for value in written if value.dtype == np.float16) == weights
    assert sum(value.size for value in written if value.dtype == np.float32) < weights / 4
    sessions = [Session(path, threads=1, disabled_optimizers=()) for path in (full, half)]
    exact, rounded = (session.outputs(tokens(3)) for session in sessions)
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("activations", [2, 3, 4, 5, 6, 7, 8])
def test_activations_in_the_file_lie_on_the_simulated_grid(activations: int, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)))
    inputs = images(16)
    made = whole(model, inputs)
    bits = {layer.name: LayerBits(weights=8, activations=activations) for layer in made.anatomy.layers}
    module, path = write(made, tmp_path / "small.onnx", Policy(model=made.anatomy.digest, bits=bits), inputs)
    source = next(op.name for op in made.anatomy.ops if op.kind == "input")

    with torch.no_grad():
        expected = quantisers(module)[source](inputs)
    found = read(path, f"{source}.dq", inputs)

    levels = 2**activations
    assert levels / 2 < len(torch.unique(expected)) <= levels  # normal inputs seldom reach the outer steps
    assert torch.equal(found, expected)
    integers = read(path, f"{source}.clipped" if activations < 8 else f"{source}.q", inputs)
    assert (int(integers.min()), int(integers.max())) == (0, levels - 1)


def read(path: Path, tensor: str, inputs: Tensor) -> Tensor:
    """A tensor inside the file, computed node by node as it is written."""
    model = onnx.load(str(path))
    kind = onnx.TensorProto.FLOAT if tensor.endswith(".dq") else onnx.TensorProto.UINT8
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, kind, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run([tensor], {"input": inputs.numpy()})[0]))


def test_the_batch_of_a_file_may_be_fixed() -> None:
    made = whole(seeded(lambda: Then(F.relu)), images(2))
    module, planned = made.apply(Policy(model=made.anatomy.digest))

    written = onnx.load_from_string(build_onnx(planned, bake(module, planned), batch=4))

    shapes = [
        [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*written.graph.input, *written.graph.output)
    ]
    assert shapes == [[4, 3, 8, 8], [4, 8, 8, 8]]


def test_constants_are_written_once(tmp_path: Path) -> None:
    """A layer without a bias gets none in the file, unless the runtime needs one."""
    made = whole(seeded(lambda: nn.Linear(DIM, DIM, bias=False)), tokens(2))
    _, path = write(made, tmp_path / "bare.onnx")

    initializers = [numpy_helper.to_array(i).shape for i in onnx.load(str(path)).graph.initializer]
    assert initializers == [(DIM, DIM)]
