"""Layers that are used twice, share weights or are written as others mean in ONNX Runtime what they mean in torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import DIM, TOKENS, made_of, tokens
from strategies import images, seeded
from test_onnx_ops import check, whole


def test_a_layer_that_is_used_twice_computes_the_same_both_times(tmp_path: Path) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), conv, nn.ReLU(), conv, nn.ReLU()).eval()

    check(model, images(3), tmp_path, "conv")


def test_a_convolution_with_another_norm_each_time_keeps_both(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = seeded(lambda: nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(3)))

    check(model, images(3), tmp_path, "batch_norm")


@pytest.mark.parametrize(("kind", "rank"), [(nn.Conv1d, 1), (nn.ConvTranspose2d, 2)])
def test_rewritten_layers_that_share_a_weight_still_do(kind: type[nn.Conv1d], rank: int, tmp_path: Path) -> None:
    one, other = seeded(lambda: kind(5, 5, 2, stride=2)), seeded(lambda: kind(5, 5, 2, stride=2))
    other.register_parameter("weight", one.get_parameter("weight"))
    model, given = nn.Sequential(one, nn.Tanh(), other).eval(), torch.randn(3, 5, *[8] * rank)

    check(model, given, tmp_path, "conv")

    weights = [value for value in whole(model, given).whole().parameters() if value.dim() > 1]
    assert [value.numel() for value in weights] == [one.get_parameter("weight").numel()]


@pytest.mark.parametrize("first", [0, 1])
def test_a_weight_that_a_transposed_convolution_shares_with_another_is_warned_of(
    first: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [nn.Conv2d(3, 3, 2, padding="same"), nn.ConvTranspose2d(3, 3, 2, stride=2)]
    layers[1].weight = layers[0].weight

    check(nn.Sequential(layers[first], layers[1 - first]).eval(), images(3), tmp_path, "pixel_shuffle")

    assert caplog.messages[-1].endswith("which gets a copy of its own: the two are no longer tied")


def test_norms_that_share_a_weight_stay_two(tmp_path: Path) -> None:
    one, other = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)
    other.weight, other.bias = one.weight, nn.Parameter(torch.arange(8.0))
    twice = nn.Sequential(nn.Conv2d(3, 8, 3), one, nn.ReLU(), other, nn.ReLU(), one)

    check(twice.eval(), images(3), tmp_path, "group_norm")


class Rooted(nn.Module):
    """A slope of the model itself that is read as a number, too, and a norm without weights beside its namesake."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group_norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)
        self.slope = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(self.group_norm(self.conv(x)), 2)
        return F.prelu(x, self.slope) * self.slope[:, None, None]


def test_layers_without_a_module_get_names_that_no_other_has(tmp_path: Path) -> None:
    check(seeded(Rooted), images(3), tmp_path, "prelu")


def test_a_tied_layer_keeps_its_own_bias(tmp_path: Path) -> None:
    one, other, bare = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False)
    other.weight = bare.weight = one.weight

    check(nn.Sequential(bare, nn.Tanh(), one, nn.Tanh(), other).eval(), tokens(3), tmp_path, "linear")


# Sequences


class Squeezed(nn.Module):
    """Squeeze and excitation of a sequence, its gate expanded by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(TOKENS, 6, 1), nn.Conv1d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.cat([x, x.relu()], 1)
        return x * torch.sigmoid(self.gate(x.mean(-1, keepdim=True))).expand_as(x)


def test_an_expansion_of_what_stands_as_an_image_is_left_to_the_product(tmp_path: Path) -> None:
    check(seeded(Squeezed), tokens(3), tmp_path, "cat")


def test_between_convolutions_a_sequence_stays_an_image() -> None:
    ops = made_of("heard").anatomy.ops

    kinds = [op.kind for op in ops]
    assert kinds.count("reshape") == 1
    assert {"conv", "max_pool", "global_pool"} <= set(kinds)
    assert [op.norm for op in ops if op.kind == "conv"] == ["norm", None, None]
    assert "batch_norm" not in kinds
