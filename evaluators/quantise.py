"""Fake quantisation: the grids that the exported integers will lie on, simulated in fp32.

Weights are symmetric per output channel, activations asymmetric per tensor on unsigned 8 bits, rounded
with a straight-through gradient (Jacob et al. 2018, "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference").
"""

import torch
from torch import Tensor, fx, nn

from ..spaces.plan import Plan

ACTIVATION_LEVELS = 255
_MOMENTUM = 0.2
_OBSERVE_EVERY = 8
_LEAST_SCALE = 1e-8


def weight_scales(weight: Tensor, bits: int) -> Tensor:
    """Scale of each output channel, shape (cout,): its largest magnitude over the largest integer."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())))
    return (largest / (2 ** (bits - 1) - 1)).clamp_min(_LEAST_SCALE)


def fake_quantise_weight(weight: Tensor, bits: int) -> Tensor:
    """The weight rounded to its own grid of 2^bits − 1 integers; the gradient passes straight through."""
    top = 2 ** (bits - 1) - 1
    scales = weight_scales(weight, bits)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -top, top)


class QuantConv2d(nn.Conv2d):
    """A convolution whose weight lies on a grid of ``weight_bits``; its state dict is that of Conv2d."""

    weight_bits: int = 8

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, fake_quantise_weight(self.weight, self.weight_bits), self.bias)


class QuantLinear(nn.Linear):
    """A linear layer whose weight lies on a grid of ``weight_bits``; its state dict is that of Linear."""

    weight_bits: int = 8

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, fake_quantise_weight(self.weight, self.weight_bits), self.bias)


class ActivationQuantiser(nn.Module):
    """Per-tensor u8 quantiser. It follows the range of what it sees while ``observing``, and in training once every
    few steps, because ranges move slowly; else it holds it. While ``bypassed`` it does nothing.

    Buffers ``low`` and ``high`` (scalars): the range, which always contains 0.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, ceiling: float | None = None) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.ceiling = ceiling
        self.observing = False
        self.bypassed = False
        self._steps = 0

    def forward(self, value: Tensor) -> Tensor:
        if self.bypassed:
            return value
        if self.observing or (self.training and self._steps % _OBSERVE_EVERY == 0):
            self._observe(value.detach())
        self._steps += self.training
        scale, zero_point = self.grid()
        return torch.fake_quantize_per_tensor_affine(value, scale, zero_point, 0, ACTIVATION_LEVELS)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale (fp32 scalar) and zero point (int32 scalar in [0, 255])."""
        scale = ((self.high - self.low) / ACTIVATION_LEVELS).clamp_min(_LEAST_SCALE)
        if self.ceiling is not None:  # the runtime absorbs a clip only if no grid point lies above it
            scale = scale.clamp_max(self.ceiling / ACTIVATION_LEVELS * (1 - 1e-6))
        zero_point = torch.round(-self.low / scale).clamp(0, ACTIVATION_LEVELS)
        return scale, zero_point.to(torch.int32)

    def _observe(self, value: Tensor) -> None:
        low, high = (edge.float() for edge in torch.aminmax(value))
        low, high = low.clamp_max(0), high.clamp_min(0)
        first = (self.seen == 0).float()
        weight = first + (1 - first) * _MOMENTUM
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)
        self.seen.add_(1)


def quantise(traced: fx.GraphModule, plan: Plan) -> None:
    """Put the plan's quantisers into a traced, pruned module, in place.

    Weights of every layer below 32 bits; activations where the runtime quantises them.
    """
    for planned in plan.ops:
        if planned.weight_count and planned.bits.weights < 32 and planned.op.module:
            _swap_layer(traced, planned.op.module, planned.bits.weights)
    kinds = {planned.op.name: planned.op.kind for planned in plan.ops}
    by_name = {node.name: node for node in traced.graph.nodes}
    for name, site in plan.quantised.items():
        if name != site:  # on the grid of its input already
            continue
        quantiser = ActivationQuantiser(ceiling=6.0 if kinds[name] == "relu6" else None)
        path = quantiser_path(name)
        traced.add_submodule(path, quantiser)
        node = by_name[name]
        with traced.graph.inserting_after(node):
            inserted = traced.graph.call_module(path, args=(node,))
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user, new=inserted: user is not new)
    traced.graph.lint()
    traced.recompile()


def quantiser_path(tensor: str) -> str:
    """The submodule that quantises a tensor."""
    return f"quantiser_{tensor}"


def quantisers(module: nn.Module) -> dict[str, ActivationQuantiser]:
    """Activation quantisers by the tensor that they quantise."""
    prefix = quantiser_path("")
    return {
        name.removeprefix(prefix): child
        for name, child in module.named_modules()
        if isinstance(child, ActivationQuantiser)
    }


def _swap_layer(root: nn.Module, path: str, bits: int) -> None:
    layer = root.get_submodule(path)
    quantised = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    copy = quantised.__new__(quantised)
    nn.Module.__init__(copy)
    copy.__dict__.update(layer.__dict__)  # same parameters, same hyperparameters
    copy.weight_bits = bits
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, copy)
