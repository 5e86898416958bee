"""Whose kernels a profile shows: node times matched to the operations of the anatomy and to conversions by name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...spaces.anatomy import WEIGHTED, Anatomy
from ...spaces.plan import FUSED_ACTIVATIONS
from .kernels import FLOAT_FUSED

Array = NDArray[np.float64]
NodeTimes = Mapping[str, tuple[str, float]]
"""Type and milliseconds of each node of an optimised graph, by its name."""
CONVERSION_OF = {
    "QuantizeLinear": "quantise", "DequantizeLinear": "dequantise", "Transpose": "transpose",
    "ReorderInput": "block", "ReorderOutput": "unblock",
}  # fmt: skip
# What the runtime's optimisers append to a node's name when they rewrite it.
_SUFFIX = re.compile(
    r"(_nchwc|_pre_q|_token_\d+|/duplicated|/QuickGeluFusion/|/WithoutBiases|/DequantizationMultiply)+$"
)
_WEIGHTS = (".weight", ".bias", ".weight.wide")
_FUSED_DEPTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Milliseconds of each operation's kernels and of the kernels that prepare its weights, shape (operations,), NaN
    where there are none; and of each conversion in total."""

    kernels: Array
    weights: Array
    conversions: Mapping[str, float]


class Matcher:
    """Finds the operation behind a node's name: its own, or that of an activation or sum which was fused into it."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._ops = anatomy.ops
        self._index = {op.name: i for i, op in enumerate(anatomy.ops)}
        self._behind = self._followers(anatomy)

    def _followers(self, anatomy: Anatomy) -> dict[int, list[str]]:
        """For each layer, what may be fused into its kernel, nearest first."""
        readers: dict[str, list[str]] = {}
        for op in anatomy.ops:
            for name in op.inputs:
                readers.setdefault(name, []).append(op.name)
        found: dict[int, list[str]] = {}
        for position, op in enumerate(anatomy.ops):
            if op.kind in WEIGHTED:
                names, at = [], op.name
                for _ in range(_FUSED_DEPTH):
                    fused = [
                        n
                        for n in readers.get(at, [])
                        if self._ops[self._index[n]].kind in FUSED_ACTIVATIONS | FLOAT_FUSED | {"add"}
                    ]
                    if not fused:
                        break
                    at = fused[0]
                    names.append(at)
                found[position] = names
        return found

    def match(self, nodes: NodeTimes) -> Timed:
        """Without the nodes that belong to nothing."""
        kernels, weights = np.full(len(self._ops), np.nan), np.full(len(self._ops), np.nan)
        conversions = dict.fromkeys(CONVERSION_OF.values(), 0.0)
        spare: dict[str, float] = {}
        for name, (kind, milliseconds) in nodes.items():
            base = _SUFFIX.sub("", name).removeprefix("fused ")
            stem = next((base.removesuffix(end) for end in _WEIGHTS if base.endswith(end)), None)
            if stem in self._index:
                _add(weights, self._index[stem], milliseconds)
            elif kind in CONVERSION_OF and self._converts(base):
                conversions[CONVERSION_OF[kind]] += milliseconds
            elif (owner := self._owner(base)) is None:
                continue
            elif "Conv" in kind and self._ops[owner].kind != "conv":
                spare[self._ops[owner].name] = milliseconds  # named after what was fused into it
            else:
                _add(kernels, owner, milliseconds)
        for position, names in self._behind.items():
            if np.isnan(kernels[position]) and (name := next((n for n in names if n in spare), None)) is not None:
                kernels[position] = spare.pop(name)
        for name, milliseconds in spare.items():
            _add(kernels, self._index[name], milliseconds)
        # To the digits that a profile keeps, so that one that is read again is fitted to the same numbers.
        rounded = {name: round(value, 5) for name, value in conversions.items()}
        return Timed(kernels=kernels.round(5), weights=weights.round(5), conversions=rounded)

    def _converts(self, base: str) -> bool:
        """Whether a node with a converter's type is one, and not an operation of the model (a permutation)."""
        return base not in self._index

    def _owner(self, base: str) -> int | None:
        while base:
            if base in self._index:
                return self._index[base]
            base = base.rpartition(".")[0]
        return None


def _add(values: Array, position: int, milliseconds: float) -> None:
    values[position] = milliseconds if np.isnan(values[position]) else values[position] + milliseconds


def timed_to_dict(timed: Timed) -> dict[str, Any]:
    """As JSON-ready data in microseconds: by the operation's position, what it has kernels for."""

    def known(values: Array) -> dict[str, float]:
        return {str(i): _microseconds(v) for i, v in enumerate(values) if not np.isnan(v)}

    return {
        "kernels": known(timed.kernels), "weights": known(timed.weights),
        "conversions": {name: _microseconds(value) for name, value in timed.conversions.items() if value},
    }  # fmt: skip


def timed_from_dict(data: Mapping[str, Any], operations: int) -> Timed:
    """The inverse of :func:`timed_to_dict`. Raises KeyError, ValueError or IndexError when something is damaged."""

    def read(values: Mapping[str, float]) -> Array:
        found = np.full(operations, np.nan)
        for position, microseconds in values.items():
            if int(position) < 0:
                raise IndexError(f"there is no operation {position}")
            found[int(position)] = round(float(microseconds) / 1000, 5)
        return found

    conversions = dict.fromkeys(CONVERSION_OF.values(), 0.0)
    conversions |= {str(name): round(float(value) / 1000, 5) for name, value in data["conversions"].items()}
    return Timed(kernels=read(data["kernels"]), weights=read(data["weights"]), conversions=conversions)


def _microseconds(milliseconds: float) -> float:
    return round(1000 * float(milliseconds), 2)
