"""What every part of lowering needs: the operations so far, and the tensors and state entries that they read."""

import builtins
import keyword
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from ..spaces.anatomy import Op
from ..spaces.errors import InputError
from .capture import CONSTANT, Captured, scope_of
from .nodes import count_users, module_of, shape_of, unsupported

ELEMENTWISE = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6", "hardswish": "hardswish",
    "hardswish_": "hardswish", "hardsigmoid": "hardsigmoid", "hardsigmoid_": "hardsigmoid", "silu": "silu",
    "silu_": "silu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "tanh": "tanh", "tanh_": "tanh", "exp": "exp",
    "sqrt": "sqrt", "abs": "abs", "erf": "erf", "neg": "neg", "mish": "mish", "mish_": "mish", "log": "log",
    "rsqrt": "rsqrt", "reciprocal": "reciprocal", "selu": "selu", "selu_": "selu",
}  # fmt: skip
"""Torch's operations of one input that change values one by one, and what we call them."""
BINARY = {
    "add": "add", "add_": "add", "mul": "mul", "mul_": "mul", "sub": "sub", "sub_": "sub", "div": "div", "div_": "div",
    "maximum": "maximum", "minimum": "minimum",
}  # fmt: skip
ALONG_IMAGES = frozenset(ELEMENTWISE.values()) | frozenset(BINARY.values()) | {
    "softplus", "gelu", "clip", "leaky_relu", "elu", "prelu", "pow", "batch_norm", "group_norm",
}  # fmt: skip
"""What makes of an image of height 1 what it makes of the sequence."""


class Lowering:
    """Goes through the nodes once. ``alias`` says which operation makes a node's tensor, ``images`` which one makes a
    sequence (n, channels, length) as an image (n, channels, 1, length)."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.ops: dict[str, Op] = {}
        self.alias: dict[str, str] = {}
        self.images: dict[str, str] = {}
        self._layers: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {}
        self._users = count_users(captured)
        self._readers = {captured.names[name]: count for name, count in self._users.items() if name in captured.names}

    # What an operation reads and makes

    def _emit(
        self, node: fx.Node, kind: str, inputs: Sequence[Any], name: str | None = None, *, image: bool = False,
        **fields: Any,
    ) -> None:  # fmt: skip
        """The operation that makes a node's tensor; as an ``image`` where it makes a sequence out of one, and where it
        changes values one by one of sequences that stand as images already."""
        shape, batch_axis = shape_of(node)
        along = kind in ALONG_IMAGES and all(isinstance(i, fx.Node) and i.name in self.images for i in inputs)
        if image or (along and len(shape) == 3):
            made, shape, names = self.images, (*shape[:2], 1, *shape[2:]), tuple(map(self._image, inputs))
        else:
            made, names = self.alias, tuple(map(self._input, inputs))
        name = self._unused(name or node.name)
        made[node.name] = name
        self.ops[name] = Op(name=name, kind=kind, inputs=names, shape=shape, batch_axis=batch_axis, **fields)

    def _same(self, node: fx.Node, source: fx.Node) -> None:
        """A node's tensor is another's."""
        if source.name in self.images:
            self.images[node.name] = self.images[source.name]
        else:
            self.alias[node.name] = self._input(source)

    def _stored(self, value: fx.Node) -> str:
        """The operation that makes a tensor, in whichever of the two shapes it has been made."""
        return self.images.get(value.name) or self._input(value)

    def _image(self, value: Any) -> str:
        """The operation that makes a sequence as an image."""
        if isinstance(value, str):
            return value
        if value.name not in self.images:
            shape, batch_axis = shape_of(value)
            if len(shape) != 3 or batch_axis != 0:
                raise unsupported(value, "a convolution over a sequence without a batch before its channels")
            self.images[value.name] = self._reshaped_as(value, self._input(value), (*shape[:2], 1, shape[2]))
        return self.images[value.name]

    def _reshaped_as(self, value: fx.Node, source: str, shape: tuple[int, ...]) -> str:
        name = self._unused(f"{value.name}_as_{'image' if len(shape) == 4 else 'sequence'}")
        self.ops[name] = Op(name=name, kind="reshape", inputs=(source,), shape=shape)
        return name

    def _before(
        self, node: fx.Node, kind: str, inputs: Sequence[Any], shape: tuple[int, ...] | None = None,
        name: str | None = None, **fields: Any,
    ) -> str:  # fmt: skip
        """An operation that a node's own builds on, of the shape of its first input unless another is given. Returns
        its name, which the next may take as its input."""
        names = tuple(self._input(i) for i in inputs)
        first = self.ops[names[0]]
        name = self._unused(name or f"{node.name}_{kind}")
        self.ops[name] = Op(name=name, kind=kind, inputs=names, shape=shape or first.shape,
                            batch_axis=first.batch_axis, **fields)  # fmt: skip
        return name

    def _unused(self, name: str) -> str:
        name = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "op"
        if name[0].isdigit() or keyword.iskeyword(name) or hasattr(builtins, name):
            name = f"op_{name}"  # a graph of torch would not take it as it is
        if name not in self.ops:
            return name
        return next(f"{name}_{i}" for i in range(1, len(self.ops) + 2) if f"{name}_{i}" not in self.ops)

    def _input(self, value: Any) -> str:
        """The operation that makes a tensor; a parameter or constant becomes one of its own. What is a name already
        stays."""
        if isinstance(value, str):
            return value
        if value.name in self.alias:
            return self.alias[value.name]
        if value.name in self.images:
            made = self.ops[self.images[value.name]].shape  # smaller than the node's where an expansion was left out
            self.alias[value.name] = self._reshaped_as(value, self.images[value.name], (*made[:2], *made[3:]))
            return self.alias[value.name]
        state = self.captured.names[value.name]
        shape = tuple(self.captured.state[state].shape)
        name = self._unused(state.removeprefix(CONSTANT))
        self.ops[name] = Op(name=name, kind="param", inputs=(), shape=shape, batch_axis=None, params={"value": state})
        self.alias[value.name] = name
        return name

    def _state(self, value: Any) -> str | None:
        """The state entry that an argument stands for; None for an argument that is None."""
        if value is None:
            return None
        name = self.captured.names.get(value.name)
        if name is None:
            raise InputError(f"The weights {value.name} are computed from the input, which nightpress cannot compress.")
        return name

    def _entries(self, module: str, given: Mapping[str, str]) -> dict[str, str]:
        """A layer's state by role, under the names that its entries have in a layer of torch: ``a.in_proj_weight``
        becomes ``a.in_proj.weight``."""
        found: dict[str, str] = {}
        for role, name in given.items():
            entry = f"{module}.{role}"
            if entry != name:
                self.captured.state[entry] = self.captured.state[name]
                self.captured.renamed[entry] = name
            found[role] = entry
        return found

    def _weights(self, node: fx.Node, value: Any) -> str:
        name = self._state(value)
        if name is None:
            raise unsupported(node)
        return name

    def _layer(self, node: fx.Node, kind: str, given: Mapping[str, Any], attrs: dict[str, Any]) -> None:
        params = {"weight": self._weights(node, given["weight"])}
        bias = self._state(given.get("bias"))
        if bias is not None:
            params["bias"] = bias
        module = module_of(params["weight"])
        if self._free(module, params):
            params = self._entries(module, params)
        else:  # the weights of another layer, with a bias of its own or none: they stay shared
            names = (scope_of(node), *(f"{module}_{number}" for number in range(1, len(self.ops) + 2)))
            module = next(name for name in names if name and self._free(name, params))
        self._emit(node, kind, (given["input"],), name=module, module=module, params=params, attrs=attrs)

    def _free(self, module: str, params: Mapping[str, str]) -> bool:
        """Whether a layer of that name with these entries would be no other layer than those so far and to come."""
        renamed = self.captured.renamed
        others = (op.params for op in self.ops.values() if op.module == module)
        same = all(
            {role: renamed.get(entry, entry) for role, entry in other.items() if role in ("weight", "bias")} == params
            for other in others
        )
        entries = {f"{module}.{role}" for role in ("weight", "bias")}
        taken = {entry for entry in entries & self.captured.state.keys() if entry not in renamed}
        return same and taken <= set(params.values()) and module not in self.captured.state
