"""Biases as they ship: the batch norm folded, and rounded to the grid on which the kernel adds them.

An integer kernel sums whole numbers of steps, input scale · weight scale each, and its bias is one of them. With few
bits such a step is large enough for the rounding to be seen, so evaluation rounds as the file does. Training does not:
its batch norms use the statistics of each batch, and the bias is not known yet.
"""

from typing import cast

import torch
from torch import Tensor, nn

from .quantised_activations import ActivationQuantiser
from .quantised_layers import QuantConv2d, QuantLinear, weight_grid

_LEAST_SCALE = 1e-12
"""A channel whose γ is 0 has scale 0, which no runtime accepts: the least positive number stands in."""


def fold(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """The factor γ/σ of each output channel's weights and the bias that stays, both fp32 of shape (cout,)."""
    zeros = torch.zeros(len(layer.weight), device=layer.weight.device)
    bias = layer.bias.detach().float() if layer.bias is not None else zeros
    if norm is None:
        return zeros + 1, bias
    mean, var = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
    gamma = norm.weight.detach() if norm.affine else torch.ones_like(mean)
    beta = norm.bias.detach() if norm.affine else torch.zeros_like(mean)
    factor = gamma / torch.sqrt(var + norm.eps)
    return factor, beta + (bias - mean) * factor


def folded_scales(layer: QuantConv2d | QuantLinear, factor: Tensor) -> Tensor:
    """Scale (cout,) of the layer's integers with the factor of :func:`fold` in it."""
    return (weight_grid(layer)[0] * factor.abs()).clamp_min(_LEAST_SCALE)


class RoundedBias(nn.Module):
    """Stands behind a layer and its norm, and adds at inference what rounding changes of the bias.

    ``source`` quantises the layer's input; ``refinement`` divides the grid's step (see
    :func:`nightpress.spaces.plan.bias_refinement`). None of them is a child: they stand in the network already.
    """

    def __init__(
        self,
        layer: QuantConv2d | QuantLinear,
        norm: nn.BatchNorm2d | None,
        source: ActivationQuantiser,
        refinement: int,
    ) -> None:
        super().__init__()
        self._parts = (layer, norm, source)
        self.refinement = refinement

    def forward(self, value: Tensor) -> Tensor:
        source = self._parts[2]
        if self.training or source.bypassed or source.observing:
            return value
        return value + self._change().reshape(-1, *[1] * (value.dim() - 2))

    def _change(self) -> Tensor:
        layer, norm, source = self._parts
        factor, bias = fold(layer, norm)
        step = folded_scales(layer, factor) / self.refinement * source.grid()[0]
        step = step.maximum(bias.abs() / 2**30)  # where the weights have all but vanished the file's grid is coarser
        return torch.round(bias.double() / step).mul_(step).sub_(bias).float()
