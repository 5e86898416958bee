"""Convolutions that torch's kernels for CPUs cannot be trusted with, said in another way."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16
"""Channels of the widest vector of a CPU in fp32."""


def is_risky(layer: nn.Module) -> bool:
    """Whether a layer is a strided 1×1 convolution of fewer channels than a vector holds.

    In channels_last the weight's gradient of such a layer is written past the end of its memory: processes die of it,
    or learn nonsense (oneDNN issue 6035, open in November 2026; seen with torch 2.14.1 on AVX2).
    """
    return (
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.groups == 1
        and layer.padding == (0, 0) and layer.in_channels < BLOCK
    )  # fmt: skip


class Conv2d(nn.Conv2d):
    """Computes what torch's does. Where its gradient is risky, the inputs between the strides, which a kernel of one
    pixel never sees, are left out first; without a stride nothing goes wrong."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (torch.is_grad_enabled() and is_risky(self)):
            return super()._conv_forward(input, weight, bias)
        down, right = self.stride
        return F.conv2d(input[..., ::down, ::right], weight, bias)
