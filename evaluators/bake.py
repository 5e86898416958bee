"""The numbers of an export, read from a trained, fake-quantised module: batch norms folded, weights as integers.

Folding multiplies a channel's scale by |γ/σ| and puts the sign of γ into its integers, so the integers that
training simulated are the integers that ship (exact for per-channel symmetric weights only).
"""

import operator
from typing import cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..spaces.plan import Plan, PlannedOp
from .biases import fold, folded_scales
from .onnx_graph import Array, LayerTensors, Tensors
from .quantise import QuantConv2d, quantisers, weight_integers


def bake(module: fx.GraphModule, plan: Plan) -> Tensors:
    """All numbers that :func:`build_onnx` needs. Raises ValueError when a value is not finite."""
    layers: dict[str, LayerTensors] = {}
    norms: dict[str, tuple[Array, ...]] = {}
    constants: dict[str, Array] = {}
    with torch.no_grad():
        for planned in plan.ops:
            name = planned.op.module
            if planned.op.kind == "param":
                value = operator.attrgetter(planned.op.params["value"])(module)
                constants[planned.op.name] = _known(value.detach().float(), planned.op.params["value"])
            if name is None:
                continue
            if planned.weight_count:
                layers[name] = _layer(module, planned, name)
            elif planned.op.kind == "batch_norm":
                norms[name] = _norm(cast("nn.BatchNorm2d", module.get_submodule(name)))
            elif planned.op.kind in {"layer_norm", "group_norm"}:
                norms[name] = _affine(cast("nn.LayerNorm", module.get_submodule(name)), planned.channels)
            elif planned.op.kind == "prelu":
                norms[name] = (_finite(cast("nn.PReLU", module.get_submodule(name)).weight.detach().float(), name),)
        grids = {
            tensor: (float(grid[0]), int(grid[1]))
            for tensor, grid in ((t, q.grid()) for t, q in quantisers(module).items())
        }
    return Tensors(layers=layers, grids=grids, norms=norms, constants=constants)


def _layer(module: fx.GraphModule, planned: PlannedOp, name: str) -> LayerTensors:
    layer = cast("QuantConv2d", module.get_submodule(name))
    weight = layer.weight.detach().float()
    norm = cast("nn.BatchNorm2d", module.get_submodule(planned.op.norm)) if planned.op.norm else None
    factor, bias = fold(layer, norm)
    if planned.bits.weights == 32:
        folded = weight * _per_channel(factor, weight)
        return LayerTensors(weight=_finite(folded, name), scales=None, bias=_finite(bias, name))
    if planned.bits.weights == 16:  # rounded as training rounds them, before the batch norm's factor
        halves = _finite(weight_integers(layer), name).astype(np.float16)
        return LayerTensors(weight=halves, scales=_finite(factor, name), bias=_finite(bias, name))
    integers = weight_integers(layer) * _per_channel(torch.where(factor < 0, -1.0, 1.0), weight)
    return LayerTensors(
        weight=_finite(integers, name).astype(np.int8),
        scales=_finite(folded_scales(layer, factor), name),
        bias=_finite(bias, name),
    )


def _norm(norm: nn.BatchNorm2d) -> tuple[Array, Array, Array, Array]:
    mean, var = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
    gamma = norm.weight if norm.affine else torch.ones_like(mean)
    beta = norm.bias if norm.affine else torch.zeros_like(mean)
    scale, shift, centre, spread = (value.detach().float().numpy() for value in (gamma, beta, mean, var))
    return scale, shift, centre, spread


def _affine(norm: nn.LayerNorm | nn.GroupNorm, channels: int) -> tuple[Array, ...]:
    values: list[tuple[Tensor | None, Tensor]] = [
        (norm.weight, torch.ones(channels)), (norm.bias, torch.zeros(channels)),
    ]  # fmt: skip
    return tuple((fill if value is None else value).detach().float().numpy() for value, fill in values)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _known(value: Tensor, name: str) -> Array:
    """A mask may be −∞ where nothing is to be seen."""
    if bool(torch.isnan(value).any()):
        raise ValueError(f"the values of {name} are not numbers")
    return value.contiguous().numpy()


def _finite(value: Tensor, name: str) -> Array:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"the weights of {name} are not finite")
    return value.contiguous().numpy()
