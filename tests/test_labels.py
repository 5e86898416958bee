"""Labels on axes: what stays equal, what is fixed and why, and where a split axis keeps its labels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import DIM, HEADS, TOKENS, Between, OverTokens, Shuffled, tokens
from nightpress.evaluators.capture import capture
from nightpress.evaluators.labelling import FIXED, Labelling, Part
from nightpress.evaluators.labels import label
from nightpress.evaluators.lower import lower
from strategies import images, seeded


class Labelled:
    """A model's labels, asked by parameter."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        captured = capture(model, inputs[:1])
        self.ops, output = lower(captured)
        shapes = {name: tuple(value.shape) for name, value in captured.state.items()}
        self.labelling = label(self.ops, output, shapes)
        self._number, self._reason = self.labelling.channels()

    def channels(self, entry: str, axis: int = 0) -> list[int]:
        """Channel of each entry along an axis; 0 for what is fixed."""
        return self._number(self.labelling.parameter(entry, axis)).tolist()

    def reason(self, entry: str) -> str:
        return self._reason(self.labelling.parameter(entry, 0))

    def fixed(self, entry: str, axis: int = 0) -> bool:
        return set(self.channels(entry, axis)) == {FIXED}


def on_images(then: Callable[[Tensor], Tensor], width: int = 8) -> Labelled:
    """A convolution, a function, a classifier over the channels."""

    class Then(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return then(x)

    return Labelled(seeded(lambda: Between(Then(), width)), images(1))


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x,
        lambda x: F.max_pool2d(F.gelu(x), 2),
        lambda x: F.interpolate(x, size=(4, 4)) * 0.5,
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: torch.roll(x, (1, 1), (2, 3)),
        lambda x: x.permute(0, 2, 3, 1).softmax(1).permute(0, 3, 1, 2),
        lambda x: x.flatten(2).unflatten(2, (8, 8)),
        lambda x: x / x.abs().mean((2, 3), keepdim=True).add(1),
        lambda x: x @ x.abs().transpose(-1, -2),
        lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
    ],
)
def test_channels_pass_through_what_treats_them_one_by_one(then: Callable[[Tensor], Tensor]) -> None:
    found = on_images(then)

    assert len(set(found.channels("stem.weight"))) == 8
    assert not found.fixed("stem.weight")
    assert found.channels("stem.weight") == found.channels("stem.bias") == found.channels("head.weight", 1)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda x: x.softmax(1), "softmax (softmax) needs all of its channels"),
        (lambda x: x * x.mean(1, keepdim=True), "mean (mean) needs all of its channels"),
        (lambda x: torch.roll(x, 1, 1), "roll (roll) needs all of its channels"),
        (lambda x: torch.cat([x[:, 1::2], x[:, ::2]], 1), "slice_2 (slice) needs all of its channels"),
        (lambda x: torch.cat([x[:, 0][:, None], x[:, 1:]], 1), "select (select) needs all of its channels"),
        (lambda x: x + torch.eye(8), ""),
        (lambda x: x.permute(0, 2, 1, 3) + x, "add (add) needs all of its channels"),
    ],
)  # fmt: skip
def test_what_needs_all_channels_says_which_operation_it_is(then: Callable[[Tensor], Tensor], reason: str) -> None:
    found = on_images(then)

    if reason:
        assert found.reason("stem.weight") == reason
        assert found.fixed("stem.weight") or "select" in reason
    else:
        assert not found.fixed("stem.weight")


def test_a_sum_with_a_constant_of_every_channel_loses_it_too() -> None:
    found = on_images(lambda x: x * torch.arange(8.0).reshape(8, 1, 1))

    constant = next(op.params["value"] for op in found.ops if op.kind == "param")
    assert found.channels(constant) == found.channels("stem.weight")
    assert not found.fixed(constant)


def test_the_output_keeps_all_channels() -> None:
    found = on_images(lambda x: x)

    assert found.fixed("head.weight")
    assert found.reason("head.weight") == "its channels are the model's output"


def test_the_image_keeps_its_channels() -> None:
    assert on_images(lambda x: x).fixed("stem.weight", 1)


def test_sums_tie_and_concatenations_do_not() -> None:
    class Two(nn.Module):
        def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
            self.join = join

        def forward(self, x: Tensor) -> Tensor:
            return self.join(self.one(x), self.two(x))

    added = Labelled(seeded(lambda: Between(Two(torch.sub), 4)), images(1))
    joined = Labelled(seeded(lambda: Between(Two(lambda a, b: torch.cat([b, a], 1)))), images(1))

    assert added.channels("inner.one.weight") == added.channels("inner.two.weight")
    assert set(joined.channels("inner.one.weight")).isdisjoint(joined.channels("inner.two.weight"))
    assert joined.channels("head.weight", 1) == [
        *joined.channels("inner.two.weight"), *joined.channels("inner.one.weight"),
    ]  # fmt: skip


def test_a_grouped_convolution_ties_the_channels_of_a_group() -> None:
    found = Labelled(seeded(lambda: Between(nn.Conv2d(8, 12, 1, groups=4), 12)), images(1))

    groups = found.channels("stem.weight")[::2]
    assert len(set(groups)) == 4
    assert found.channels("stem.weight") == [g for g in groups for _ in range(2)]
    assert found.channels("inner.weight") == [g for g in groups for _ in range(3)]


@pytest.mark.parametrize("groups", [2, 4])
def test_a_channel_shuffle_ties_what_shares_a_place_in_its_groups(groups: int) -> None:
    places = 8 // groups
    found = on_images(lambda x: x.view(-1, groups, places, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8))

    table = np.array(found.channels("stem.weight")).reshape(groups, places)
    lines = table if places >= groups else table.T  # the longer of the two parts keeps its labels
    assert (lines == lines[0]).all()
    assert len(set(lines[0].tolist())) == lines.shape[1] == 4
    assert FIXED not in table


def test_grouped_convolutions_and_shuffles_tie_everything_between_them() -> None:
    found = Labelled(seeded(lambda: Between(Shuffled())), images(1))

    assert len(set(found.channels("stem.weight"))) == 1
    assert found.channels("stem.weight") == found.channels("inner.grouped.weight")
    assert len(set(found.channels("inner.after.weight"))) == 6
    assert not found.fixed("inner.last.weight")


class Heads(nn.Module):
    """Attention over the numbers of a head, or over the heads of a number."""

    def __init__(self, order: tuple[int, int]) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).reshape(x.shape[0], TOKENS, *self.order)
        v = v.transpose(1, 2) if self.order == (HEADS, 2) else v.permute(0, 3, 1, 2)
        v = torch.softmax(v @ v.transpose(-1, -2), -1) @ v
        v = v.transpose(1, 2) if self.order == (HEADS, 2) else v.permute(0, 2, 3, 1)
        return self.out(v.reshape(x.shape[0], TOKENS, DIM))


@pytest.mark.parametrize("order", [(HEADS, 2), (2, HEADS)])
def test_a_split_axis_keeps_its_labels_on_the_heads(order: tuple[int, int]) -> None:
    """Whichever factor of the axis comes first."""
    found = Labelled(seeded(lambda: OverTokens(Heads(order))), tokens(1))

    channels = np.array(found.channels("inner.v.weight")).reshape(order)
    heads = channels if order[0] == HEADS else channels.T
    assert len(set(heads[:, 0].tolist())) == HEADS
    assert (heads == heads[:, :1]).all()
    assert FIXED not in heads
    assert found.channels("inner.out.weight", 1) == found.channels("inner.v.weight")


def test_an_axis_with_two_kinds_of_labels_loses_nothing() -> None:
    labelling = Labelling({})
    labelling.now = "a test"
    one, other = (labelling_part(labelling, name) for name in ("one", "two"))

    assert labelling.flat((one, other)) is None

    number, reason = labelling.channels()
    assert one.labels is not None
    assert set(number(one.labels).tolist()) == {FIXED}
    assert reason(one.labels) == "a test"


def labelling_part(labelling: Labelling, name: str) -> Part:
    labelling.shapes[name] = (4,)
    return Part(4, labelling.parameter(name, 0))
