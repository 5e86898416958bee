"""Which parts of a network an identity can replace, and that removing them is replacing them by one."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import (
    DIM,
    Between,
    Dense,
    Encoder,
    Excited,
    Inverted,
    Make,
    OverTokens,
    Projected,
    Shrunk,
    Twice,
    Vision,
    tokens,
)
from nightpress.evaluators.apply import Compressor
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.policy import Policy
from strategies import Residual, compressor_of, images, seeded, task_of


def made(make: Make, inputs: Tensor) -> Compressor:
    return compressor_of(task_of(seeded(make), inputs), step=1)


def blocks(make: Make, inputs: Tensor | None = None) -> dict[str, tuple[str, ...]]:
    """The layers of each block."""
    return {b.name: b.layers for b in made(make, images(2) if inputs is None else inputs).anatomy.blocks}


def kinds(anatomy: Anatomy, block: str) -> list[str]:
    ops = {op.name: op.kind for op in anatomy.ops}
    return next([ops[name] for name in b.ops] for b in anatomy.blocks if b.name == block)


def without(make: Make, inputs: Tensor, *removed: str) -> Tensor:
    """The outputs of the compressed module without these blocks."""
    compressor = made(make, inputs)
    module, _ = compressor.apply(Policy(model=compressor.anatomy.digest, removed_blocks=removed))
    with torch.no_grad():
        return module(inputs)


def replaced(make: Make, inputs: Tensor, **parts: Callable[[], nn.Module]) -> Tensor:
    """The outputs of the original with other modules in the place of some."""
    model = copy.deepcopy(seeded(make))
    for path, part in parts.items():
        owner, _, name = path.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(owner), name, part())
    with torch.no_grad():
        return model(inputs)


class Zero(nn.Module):
    """The branch of a sum that is gone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_block_ends_with_the_relu_that_alone_reads_its_sum() -> None:
    anatomy = made(lambda: Between(Residual(8, 6)), images(2)).anatomy

    [block] = anatomy.blocks
    assert (block.name, block.layers) == ("inner", ("inner.conv1", "inner.conv2"))
    assert kinds(anatomy, "inner") == ["conv", "relu", "conv", "add", "relu"]
    assert next(op.kind for op in anatomy.ops if op.name == block.source) == "relu"
    assert block.macs == sum(layer.macs for layer in anatomy.layers if layer.name.startswith("inner."))


def test_a_block_without_relu_ends_with_its_sum() -> None:
    anatomy = made(lambda: Between(Inverted()), images(2)).anatomy

    assert kinds(anatomy, "inner")[-1] == "add"
    assert [b.layers for b in anatomy.blocks] == [("inner.expand.0", "inner.depthwise.0", "inner.project.0")]


def test_a_relu_that_shares_the_sum_with_another_reader_is_no_part_of_the_block() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            total = x + self.conv(x)
            return F.relu(total) * torch.sigmoid(total)

    anatomy = made(lambda: Between(Read()), images(2)).anatomy

    assert kinds(anatomy, "inner.conv") == ["conv", "add"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Between(Residual(8, 6)),
        lambda: Between(nn.Sequential(Residual(8, 6), Inverted(), Residual(8, 4))),
        lambda: Between(Inverted()),
    ],
)
def test_removing_every_block_is_replacing_it_by_an_identity(make: Make) -> None:
    inputs = images(3)
    names = list(blocks(make, inputs))

    found = without(make, inputs, *names)

    parts = {name.replace(".", "__"): nn.Identity for name in names}
    assert torch.equal(found, replaced(make, inputs, **parts))


def test_a_block_in_the_middle_joins_what_is_around_it() -> None:
    def make() -> nn.Module:
        return Between(nn.Sequential(Residual(8, 6), Residual(8, 5), Residual(8, 4)))

    assert torch.equal(without(make, images(3), "inner.1"), replaced(make, images(3), inner__1=nn.Identity))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Between(Dense(), width=12),
        lambda: Between(Excited()),
        lambda: Between(Twice()),
        lambda: Between(nn.Conv2d(8, 8, 3, padding=1)),
    ],
)
def test_what_changes_the_shape_or_is_no_sum_is_no_block(make: Make) -> None:
    assert blocks(make) == {}


def silent(stride: int) -> nn.Module:
    conv = nn.Conv2d(8, 8, 3, stride=stride, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    return conv


@pytest.mark.parametrize("stride", [1, 2])
def test_a_projection_stands_for_its_block_alone(stride: int) -> None:
    """An identity would not fit: it has another shape, or may lose other channels."""

    def make() -> nn.Module:
        return Between(Projected(stride))

    anatomy = made(make, images(2)).anatomy
    assert {b.name: b.layers for b in anatomy.blocks} == {"inner.conv": ("inner.conv",)}
    assert kinds(anatomy, "inner.conv") == ["conv", "add"]  # the activation behind the sum stays
    assert [group.layers for group in anatomy.groups] == [("stem",), ("inner.conv", "inner.shortcut")]
    expected = replaced(make, images(3), inner__conv=lambda: silent(stride))
    assert torch.equal(without(make, images(3), "inner.conv"), expected)


def test_the_shortcut_without_weights_stands_for_its_block_too() -> None:
    def make() -> nn.Module:
        return Between(Shrunk(), width=16)

    assert blocks(make) == {"inner": ("inner.conv1", "inner.conv2")}
    assert torch.equal(without(make, images(3), "inner"), replaced(make, images(3), inner__bn2=Zero))


def test_a_branch_that_the_projection_shares_a_layer_with_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            short = self.first(x)
            return short + self.second(short)

    assert blocks(lambda: Between(Shared())) == {"inner.second": ("inner.second",)}  # by an identity


def test_an_identity_goes_before_a_projection_inside_it() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.wide(x) + self.narrow(x) + x)

    assert blocks(lambda: Between(Three())) == {"inner": ("inner.wide", "inner.narrow")}


def test_the_branches_of_a_transformer_layer_go_one_by_one() -> None:
    def make() -> nn.Module:
        return OverTokens(Encoder())

    assert blocks(make, tokens(2)) == {
        "inner.attention": ("inner.attention.qkv", "inner.attention.proj"),
        "inner.mlp": ("inner.mlp.0", "inner.mlp.2"),
    }
    inputs = tokens(3)
    assert torch.equal(without(make, inputs, "inner.attention"), replaced(make, inputs, inner__attention=Zero))
    assert torch.equal(without(make, inputs, "inner.mlp"), replaced(make, inputs, inner__mlp=Zero))
    both = without(make, inputs, "inner.mlp", "inner.attention")
    assert torch.equal(both, replaced(make, inputs, inner=nn.Identity))


def test_a_norm_goes_with_its_branch() -> None:
    anatomy = made(lambda: OverTokens(Encoder()), tokens(2)).anatomy

    attention = next(b for b in anatomy.blocks if b.name == "inner.attention")
    assert "layer_norm" in kinds(anatomy, "inner.attention")
    assert attention.source == "embed"


def test_every_layer_of_a_vision_transformer_has_two_blocks() -> None:
    assert list(blocks(Vision)) == [
        f"layers.{layer}.{branch}" for layer in (0, 1) for branch in ("attention", "mlp")
    ]  # fmt: skip


def test_an_mlp_without_a_sum_around_it_is_no_block() -> None:
    def make() -> nn.Module:
        return OverTokens(nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM)))

    assert blocks(make, tokens(2)) == {}


class Nested(nn.Module):
    """A block within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside = nn.Conv2d(8, 8, 3, padding=1), Residual(8, 4)
        self.behind = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.behind(self.inside(F.relu(self.before(x))))


def test_of_nested_blocks_the_inner_one_is_offered() -> None:
    found = blocks(lambda: Between(Nested()))

    assert found == {"inner.inside": ("inner.inside.conv1", "inner.inside.conv2")}


class Overlapping(nn.Module):
    """Two sums that share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = x + self.one(x)
        return x + first + self.two(first)


def test_blocks_never_share_an_operation() -> None:
    for make in (lambda: Between(Nested()), lambda: Between(Overlapping()), Vision):
        anatomy = made(make, images(2)).anatomy
        ops = [name for block in anatomy.blocks for name in block.ops]
        assert len(ops) == len(set(ops))
        assert anatomy.blocks


def test_a_layer_that_is_used_elsewhere_too_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.conv(x + self.conv(x)))

    assert blocks(lambda: Between(Shared())) == {}


def test_the_input_itself_is_no_source_of_a_block() -> None:
    """Then its convolution would take any number of channels for those of the image."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.conv(x)).flatten(1)

    assert blocks(First) == {}
