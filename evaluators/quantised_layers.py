"""Layers whose weights lie on grids, symmetric per output channel, and the one place that says which grid it is."""

import copy

import torch
from torch import Tensor, nn

from .convolution import Conv2d
from .fake_quantise import LEAST_SCALE, Grid, as_half, fake_quantise, integers, learned_quantise, round_to_half
from .ranges import mse_shares


def weight_scales(weight: Tensor, bits: int) -> Tensor:
    """Scale of each output channel, shape (cout,), that reaches its largest magnitude."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())))
    return (largest / (2 ** (bits - 1) - 1)).clamp_min(LEAST_SCALE)


class QuantisedWeight(nn.Module):
    """What :class:`QuantConv2d` and :class:`QuantLinear` add to a layer with a ``weight`` of shape (cout, …).

    State: ``weight_share`` (cout,), a buffer, with MSE ranges; ``weight_scale`` (cout,), a parameter, with learned
    scales; nothing otherwise, where the scales follow the weight.
    """

    weight: Tensor
    weight_bits: int
    weight_share: Tensor | None
    weight_scale: nn.Parameter | None

    def prepare(self, bits: int, *, ranges: str, scales: str) -> None:
        """Take up the quantiser's state; it is found from the weight as it is now."""
        self.weight_bits = bits
        on_grid = bits != 16
        share = mse_shares(self.weight, 2 ** (bits - 1) - 1) if on_grid and ranges == "mse" else None
        self.register_buffer("weight_share", share)
        self.register_parameter("weight_scale", None)
        if on_grid and scales == "learned":
            self.weight_scale = nn.Parameter(weight_grid(self)[0], requires_grad=self.weight.requires_grad)

    def quantised_weight(self) -> Tensor:
        """The weight as the exported layer will have it, with its gradient."""
        if self.weight_bits == 16:
            return round_to_half(self.weight)
        grid = _broadcast_grid(self)
        if self.weight_scale is not None:
            return learned_quantise(self.weight, grid, self.weight_scale)
        return fake_quantise(self.weight, grid, clips=self.weight_share is not None)


class QuantConv2d(QuantisedWeight, Conv2d):
    """A convolution whose weight lies on a grid."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.quantised_weight(), self.bias)


class QuantLinear(QuantisedWeight, nn.Linear):
    """A linear layer whose weight lies on a grid."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.quantised_weight(), self.bias)


def with_quantised_weight(
    layer: nn.Conv2d | nn.Linear, bits: int, *, ranges: str, scales: str
) -> QuantConv2d | QuantLinear:
    """A layer with the same parameters and hyperparameters, whose weight is on a grid."""
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    twin = kind.__new__(kind)
    # Dictionaries are copied: what the twin registers does not appear in the layer.
    vars(twin).update({k: copy.copy(value) if isinstance(value, dict) else value for k, value in vars(layer).items()})
    twin.prepare(bits, ranges=ranges, scales=scales)
    return twin


def weight_grid(layer: QuantisedWeight) -> tuple[Tensor, int]:
    """The scales (cout,) that the layer's forward uses, and its bits; ones at 16 bits."""
    weight, bits = layer.weight.detach(), layer.weight_bits
    if bits == 16:
        return torch.ones_like(weight[(slice(None), *[0] * (weight.dim() - 1))]), bits
    if layer.weight_scale is not None:
        return layer.weight_scale.detach().clamp_min(LEAST_SCALE), bits
    scales = weight_scales(weight, bits)
    return scales if layer.weight_share is None else (scales * layer.weight_share).clamp_min(LEAST_SCALE), bits


def weight_integers(layer: QuantisedWeight) -> Tensor:
    """The whole numbers behind the layer's weight, in fp32 and its shape: times the scales of :func:`weight_grid`
    they are the weight that its forward uses, to the last bit. At 16 bits: the fp16 numbers themselves."""
    if layer.weight_bits == 16:
        return as_half(layer.weight)
    return integers(layer.weight, _broadcast_grid(layer))


def _broadcast_grid(layer: QuantisedWeight) -> Grid:
    scales, bits = weight_grid(layer)
    top = float(2 ** (bits - 1) - 1)
    return Grid(scale=scales.reshape(-1, *[1] * (layer.weight.dim() - 1)), low=-top, high=top)
