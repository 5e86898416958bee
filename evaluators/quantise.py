"""Quantisers in a module: the grids that the exported integers will lie on, simulated in training and evaluation.

Weights are symmetric per output channel, activations asymmetric per tensor on unsigned integers. Scales follow the
ranges of what is seen, or are learned. docs/quantisation.md says what each choice means and what is exact.
"""

from collections.abc import Iterable
from typing import cast

from torch import fx, nn

from ..spaces.errors import InputError
from ..spaces.plan import Plan, PlannedOp, bias_refinement
from .biases import RoundedBias
from .quantised_activations import ActivationQuantiser, LearnedActivationQuantiser
from .quantised_layers import (
    QuantConv2d,
    QuantisedWeight,
    QuantLinear,
    weight_grid,
    weight_integers,
    weight_scales,
    with_quantised_weight,
)
from .ranges import RANGES

__all__ = [
    "ActivationQuantiser", "LearnedActivationQuantiser", "QuantConv2d", "QuantLinear", "QuantisedWeight",
    "end_observation", "quantise", "quantiser_path", "quantisers", "weight_grid",
    "weight_integers", "weight_scales",
]  # fmt: skip

SCALES = ("fixed", "learned")
WEIGHT_BITS = (*range(2, 9), 16, 32)
ACTIVATION_BITS = (*range(2, 9), 16, 32)
_GRID_BITS = range(2, 9)
# What they return is never negative, and the runtime drops them if the grid's lowest integer stands for 0.
_UNSIGNED = frozenset({"relu", "relu6"})


def quantise(traced: fx.GraphModule, plan: Plan, *, ranges: str = "minmax", scales: str = "fixed") -> None:
    """Put the plan's quantisers into a traced, pruned module, in place.

    Weights of every layer below 32 bits; activations where the runtime quantises them. ``ranges`` (one of ``RANGES``)
    says how ranges are found after training, ``scales`` whether they stay ``"fixed"`` to the ranges or are
    ``"learned"``. Raises InputError for anything else and for layers and widths without quantiser.
    """
    _check("ranges", ranges, RANGES)
    _check("scales", scales, SCALES)
    for planned in plan.ops:
        if planned.weight_count and planned.op.module:
            _swap_layer(traced, planned, ranges, scales)
    kinds = {planned.op.name: planned.op.kind for planned in plan.ops}
    made = {node.name: node for node in traced.graph.nodes}
    for name, site in plan.quantised.items():
        if name == site:  # else on the grid of its input already
            bits = plan.activation_bits[name]
            traced.add_submodule(quantiser_path(name), _activation_quantiser(kinds[name], bits, ranges, scales))
    for planned in plan.ops:
        name = planned.op.name
        if planned.int8_bias:
            traced.add_submodule(f"bias_{name}", _rounded_bias(traced, planned, plan))
            made[name] = _behind(made[name], f"bias_{name}")
        if plan.quantised.get(name) == name:
            _behind(made[name], quantiser_path(name))
    traced.graph.lint()
    traced.recompile()


def _behind(node: fx.Node, path: str) -> fx.Node:
    """Everybody who reads the node reads it through a submodule; returns its node."""
    with node.graph.inserting_after(node):
        inserted = node.graph.call_module(path, args=(node,))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    return inserted


def end_observation(module: nn.Module) -> None:
    """Call it once after the forward passes in which the quantisers were ``observing``."""
    for quantiser in quantisers(module).values():
        quantiser.end_observation()


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


def _activation_quantiser(kind: str, bits: int, ranges: str, scales: str) -> ActivationQuantiser:
    if bits not in _GRID_BITS:
        raise InputError(f"The activations behind {kind} cannot lie on a grid of {bits} bits; it must be 2 to 8.")
    ceiling = 6.0 if kind == "relu6" else None
    if scales == "learned":
        return LearnedActivationQuantiser(bits, ceiling=ceiling, ranges=ranges, unsigned=kind in _UNSIGNED)
    return ActivationQuantiser(bits, ceiling=ceiling, ranges=ranges)


def _rounded_bias(root: nn.Module, planned: PlannedOp, plan: Plan) -> RoundedBias:
    site = plan.quantised[planned.inputs[0]]
    layer = cast("QuantConv2d | QuantLinear", root.get_submodule(planned.op.module or ""))
    norm = cast("nn.BatchNorm2d", root.get_submodule(planned.op.norm)) if planned.op.norm else None
    source = cast("ActivationQuantiser", root.get_submodule(quantiser_path(site)))
    return RoundedBias(layer, norm, source, bias_refinement(planned.bits.weights, plan.activation_bits[site]))


def _swap_layer(root: nn.Module, planned: PlannedOp, ranges: str, scales: str) -> None:
    path, bits = planned.op.module or "", planned.bits
    _check(f"bits.{path}.weights", bits.weights, WEIGHT_BITS)
    _check(f"bits.{path}.activations", bits.activations, ACTIVATION_BITS)
    if bits.weights == 32:
        return
    layer = root.get_submodule(path)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = type(layer).__name__
        raise InputError(f"The layer {path} is a {kind}; only Conv2d and Linear can be quantised: set its bits to 32.")
    parent, _, name = path.rpartition(".")
    quantised = with_quantised_weight(layer, bits.weights, ranges=ranges, scales=scales)
    setattr(root.get_submodule(parent), name, quantised)


def _check(key: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}, but got {value!r}.")
