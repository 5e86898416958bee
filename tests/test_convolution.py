"""Convolutions whose gradient torch computes wrongly, or dies of, in channels_last on a CPU."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from nightpress.evaluators.convolution import BLOCK, Conv2d, is_risky
from nightpress.evaluators.quantised_layers import with_quantised_weight

TRAIN = """
import torch
from nightpress.evaluators.convolution import Conv2d

torch.manual_seed(0)
layer = Conv2d({channels}, 48, 1, 2, bias=False)
inputs = torch.randn(80, {channels}, 14, 14)
layer(inputs).square().mean().backward()
truth = layer.weight.grad.clone()
layer = layer.to(memory_format=torch.channels_last)
for _ in range(20):
    layer.zero_grad()
    layer(inputs.contiguous(memory_format=torch.channels_last)).square().mean().backward()
    assert torch.allclose(layer.weight.grad, truth, rtol=1e-3, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 12])
def test_narrow_strided_pointwise_layers_learn_the_same_in_either_memory_format(channels: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(channels=channels)], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [2, (3, 1)])
def test_the_layer_computes_what_torch_s_does(stride: int | tuple[int, int], bias: bool, quantised: bool) -> None:
    torch.manual_seed(0)
    plain, ours = nn.Conv2d(6, 8, 1, stride, bias=bias), Conv2d(6, 8, 1, stride, bias=bias)
    ours.load_state_dict(plain.state_dict())
    inputs = torch.randn(3, 6, 13, 10)
    layer = with_quantised_weight(ours, 8, ranges="minmax", scales="fixed") if quantised else ours
    if quantised:
        plain.weight.data = layer.quantised_weight().detach()  # type: ignore[union-attr,operator]

    assert is_risky(layer)
    assert torch.allclose(layer(inputs), plain(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(BLOCK, 8, 1, 2), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1, 2, padding=1),
        nn.Conv2d(4, 8, 1, 2, groups=4), nn.Linear(4, 8),
    ],
)  # fmt: skip
def test_other_layers_are_torch_s_business(layer: nn.Module) -> None:
    assert not is_risky(layer)
