"""What an exported graph becomes: operations with names, shapes of one example, and the state that each reads."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from networks import Between, Shrunk, Vision, Windowed, tokens
from nightpress.evaluators.capture import capture
from nightpress.evaluators.lower import lower
from nightpress.evaluators.nodes import module_of, pair
from nightpress.evaluators.task import task_digest
from nightpress.spaces.anatomy import Op
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import INT8, Policy
from strategies import compressor_of, images, seeded, task_of


def lowered(model: nn.Module, inputs: Tensor) -> tuple[list[Op], str]:
    return lower(capture(model, inputs[:1]))


def kinds(model: nn.Module, inputs: Tensor) -> list[str]:
    return [op.kind for op in lowered(model, inputs)[0]]


class Around(nn.Module):
    """A sum of a module's output and its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


# Batch norms


def test_a_batch_norm_behind_a_convolution_belongs_to_it() -> None:
    ops, output = lowered(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())), images(1))

    assert [(op.kind, op.module, op.norm) for op in ops] == [
        ("input", None, None), ("conv", "0", "1"), ("relu", None, None),
    ]  # fmt: skip
    assert ops[1].params == {
        "weight": "0.weight", "bias": "0.bias", "norm_weight": "1.weight", "norm_bias": "1.bias",
        "norm_running_mean": "1.running_mean", "norm_running_var": "1.running_var",
    }  # fmt: skip
    assert output == ops[-1].name == "relu"


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Around(nn.BatchNorm2d(8))),  # another reader bypasses it
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8)),
    ],
)
def test_any_other_batch_norm_is_an_operation_of_its_own(make: Callable[[], nn.Module]) -> None:
    ops, _ = lowered(seeded(make), images(1))

    assert "batch_norm" in [op.kind for op in ops]
    assert all(op.norm is None for op in ops)


def test_of_two_batch_norms_in_a_row_the_second_stands_alone() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))

    assert kinds(model, images(1)) == ["input", "conv", "batch_norm"]


# What is nothing at inference


@pytest.mark.parametrize(
    "nothing",
    [nn.Dropout(), nn.Dropout2d(), nn.Identity(), StochasticDepth(0.5, "row")],
)
def test_what_does_nothing_at_inference_is_no_operation(nothing: nn.Module) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nothing, nn.ReLU()))

    assert kinds(model, images(1)) == ["input", "conv", "relu"]


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(
            F.adaptive_avg_pool2d(x, (x.shape[-2], x.shape[-1])).contiguous().clone().float()[:, :], (0, 0)
        ).reshape(x.shape)


def test_what_changes_nothing_here_is_no_operation() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Idle(), nn.ReLU()))

    assert kinds(model, images(1)) == ["input", "conv", "relu"]


def test_what_nobody_reads_is_no_operation() -> None:
    ops, _ = lowered(seeded(lambda: Between(Shrunk(), width=16)), images(1))

    # The shortcut's strided slices went into the convolution that stands for it.
    assert "slice" not in {op.kind for op in ops}
    assert "pad" not in {op.kind for op in ops}
    [shortcut] = [op for op in ops if op.module == "inner.as_conv"]
    assert shortcut.attrs["stride"] == (2, 2)
    assert shortcut.inputs == ("relu",)


# Names


class Named(nn.Module):
    """Modules and arguments with names that Python or a graph would not take."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.parts = nn.ModuleList([nn.Conv2d(8, 5, 3)])

    def forward(self, input: Tensor) -> Tensor:
        return self.parts[0](F.relu(self.relu(F.relu(self.filter(input)))))


def test_every_node_of_the_rebuilt_graph_has_its_operations_name() -> None:
    for make, inputs in ((Named, images(2)), (Vision, images(2)), (lambda: Between(Windowed()), images(2))):
        made = compressor_of(task_of(seeded(make), inputs))
        bits = {layer.name: INT8 for layer in made.anatomy.layers}

        module, planned = made.apply(Policy(model=made.anatomy.digest, bits=bits))

        names = [op.op.name for op in planned.ops]
        assert len(set(names)) == len(names)
        assert set(names) <= {node.name for node in module.graph.nodes}
        assert all(name.isidentifier() for name in names)


def test_operations_are_named_after_layers_and_functions() -> None:
    ops, _ = lowered(seeded(Named), images(1))

    assert [op.name for op in ops] == ["op_input", "op_filter", "relu", "relu_1", "relu_1_1", "parts_0"]
    assert [op.module for op in ops if op.module] == ["filter", "relu", "parts.0"]


def test_a_layers_state_has_the_names_of_a_layer() -> None:
    captured = capture(nn.Sequential(nn.Linear(8, 8), Attending()).eval(), tokens(1))
    ops, _ = lower(captured)

    fused = next(op for op in ops if op.module == "1.mha.in_proj")
    assert fused.params == {"weight": "1.mha.in_proj.weight", "bias": "1.mha.in_proj.bias"}
    assert captured.renamed["1.mha.in_proj.weight"] == "1.mha.in_proj_weight"


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("entry", "module"),
    [
        ("a.b.weight", "a.b"), ("a.in_proj_weight", "a.in_proj"), ("weight", "weight"), ("w", "w"),
        ("bn.running_mean", "bn"), ("constant.lift_1", "lift_1"), ("a.kernel", "a.kernel"),
    ],
)  # fmt: skip
def test_the_layer_of_an_entry(entry: str, module: str) -> None:
    assert module_of(entry) == module


# Shapes


def test_shapes_are_those_of_one_example() -> None:
    ops, _ = lowered(seeded(lambda: Between(Windowed())), images(1))

    shapes = {op.name: (op.shape, op.batch_axis) for op in ops}
    assert shapes["x"] == ((1, 3, 8, 8), 0)
    assert shapes["inner_qkv"] == ((4, 16, 24), 0)  # four windows
    permuted = next(op for op in ops if op.kind == "permute" and len(op.shape) == 5 and op.shape[0] == 3)
    assert (permuted.shape, permuted.batch_axis) == ((3, 4, 4, 16, 2), 1)


def test_a_parameter_of_the_models_own_has_no_batch() -> None:
    ops, _ = lowered(seeded(Vision), images(1))

    params = {op.params["value"]: (op.shape, op.batch_axis) for op in ops if op.kind == "param"}
    assert params == {"cls": ((1, 1, 8), None), "positions": ((1, 5, 8), None)}


def test_work_is_counted_from_the_shapes_of_one_example() -> None:
    made = compressor_of(task_of(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten())), images(2)))

    assert plan(made.anatomy, Policy(model="")).macs == made.anatomy.macs == 64 * 8 * 27


@pytest.mark.parametrize(("given", "expected"), [(3, (3, 3)), ((1, 2), (1, 2)), ([4], (4, 4))])
def test_a_number_counts_for_both_axes(given: object, expected: tuple[int, int]) -> None:
    assert pair(given) == expected


def test_the_bounds_of_a_clip_may_be_open() -> None:
    class Clipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(min=-1).clamp(max=2).clamp(-1, 2)

    ops, _ = lowered(nn.Sequential(nn.Conv2d(3, 8, 3), Clipped()).eval(), images(1))

    assert [(op.attrs["low"], op.attrs["high"]) for op in ops if op.kind == "clip"] == [
        (-1, math.inf), (-math.inf, 2), (-1, 2),
    ]  # fmt: skip


def test_a_hardtanh_from_0_to_6_is_a_relu6() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0, 6), nn.Hardtanh(0, 5)).eval()

    assert kinds(model, images(1)) == ["input", "conv", "relu6", "clip"]


def test_lowering_leaves_the_model_as_it_is() -> None:
    model = seeded(Vision)
    before = task_digest(model)

    captured = capture(model, images(1))
    lower(captured)

    assert task_digest(model) == before
    with torch.no_grad():
        for value in captured.state.values():
            value.fill_(7)
    assert task_digest(model) == before  # what was captured is a copy
