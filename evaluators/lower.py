"""A captured graph as a list of operations that the plan, the predictor and the ONNX builder understand."""

import builtins
import keyword
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..spaces.anatomy import Op
from ..spaces.errors import InputError
from .capture import CONSTANT, Captured, scope_of

# Operations of one input that change values one by one.
_ELEMENTWISE = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "relu6_": "relu6", "hardswish": "hardswish",
    "hardswish_": "hardswish", "hardsigmoid": "hardsigmoid", "hardsigmoid_": "hardsigmoid", "silu": "silu",
    "silu_": "silu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "tanh": "tanh", "tanh_": "tanh", "exp": "exp",
    "sqrt": "sqrt", "abs": "abs", "erf": "erf", "neg": "neg", "softplus": "softplus", "mish": "mish",
    "mish_": "mish",
}  # fmt: skip
_IDENTITY = frozenset({
    "dropout", "dropout_", "feature_dropout", "contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy",
})  # fmt: skip
_BINARY = {
    "add": "add", "add_": "add", "mul": "mul", "mul_": "mul", "sub": "sub", "sub_": "sub", "div": "div", "div_": "div",
}  # fmt: skip
_RESHAPES = frozenset({
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "squeeze_", "unsqueeze_", "_unsafe_view",
})  # fmt: skip
_POOLS = {
    "max_pool2d": ("kernel", "stride", "padding", "dilation", "ceil"),
    "avg_pool2d": ("kernel", "stride", "padding", "ceil", "count_include_pad", "divisor"),
}


def lower(captured: Captured) -> tuple[list[Op], str]:
    """Operations in order, and the name of the output. Batch norms are folded into the convolution before.

    May add entries to ``captured.state``: a shortcut that pads channels becomes a frozen convolution.
    Raises InputError naming the first operation that the exporter does not know.
    """
    lowering = _Lowering(captured)
    for node in captured.nodes:
        lowering.add(node)
    output = lowering.alias[captured.output.name]
    return _tidy(list(lowering.ops.values()), output), output


class _Lowering:
    """Goes through the nodes once. ``alias`` says which operation makes a node's tensor."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.ops: dict[str, Op] = {}
        self.alias: dict[str, str] = {}
        self._users = _users(captured)
        self._readers = {captured.names[name]: count for name, count in self._users.items() if name in captured.names}
        self._parts: dict[str, list[tuple[int, int]]] = {}

    def add(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            self._put(node, "input", ())
            return
        if isinstance(value, list | tuple):  # a split: its parts are taken by getitem
            return
        if not isinstance(value, Tensor):  # the size of the batch; what reads it is judged by its own shape
            return
        kind = _name(node)
        if kind in _IDENTITY or (kind in {"to", "_to_copy", "type_as"} and value.dtype == torch.float32):
            self.alias[node.name] = self._input(node.args[0])
            return
        handler = getattr(self, f"_{kind}", None) or self._by_family(kind)
        if handler is None:
            raise unsupported(node)
        handler(node)

    def _by_family(self, kind: str) -> Callable[[fx.Node], None] | None:
        if kind in _ELEMENTWISE:
            return lambda node: self._put(node, _ELEMENTWISE[kind], (node.args[0],))
        if kind in _BINARY:
            return lambda node: self._binary(node, _BINARY[kind])
        if kind in _RESHAPES:
            return self._reshaped
        if kind in _POOLS:
            return lambda node: self._pool(node, kind)
        return None

    # What an operation reads and makes

    def _put(self, node: fx.Node, kind: str, inputs: Sequence[Any], name: str | None = None, **fields: Any) -> None:
        shape, batch_axis = shape_of(node)
        name = self._unused(name or node.name)
        self.alias[node.name] = name
        self.ops[name] = Op(
            name=name, kind=kind, inputs=tuple(self._input(i) for i in inputs), shape=shape, batch_axis=batch_axis,
            **fields,
        )  # fmt: skip

    def _unused(self, name: str) -> str:
        name = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "op"
        if name[0].isdigit() or keyword.iskeyword(name) or hasattr(builtins, name):
            name = f"op_{name}"  # a graph of torch would not take it as it is
        if name not in self.ops:
            return name
        return next(f"{name}_{i}" for i in range(1, len(self.ops) + 2) if f"{name}_{i}" not in self.ops)

    def _input(self, value: Any) -> str:
        """The operation that makes a tensor; a parameter or constant becomes one of its own."""
        if value.name in self.alias:
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

    # Layers

    def _conv2d(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
        if isinstance(given.get("padding", 0), str):
            raise unsupported(node, f"a convolution with padding {given['padding']!r}")
        weight = self.captured.state[self._weights(node, given["weight"])]
        attrs = {
            "kernel": tuple(weight.shape[2:]), "stride": pair(given.get("stride", 1)),
            "padding": pair(given.get("padding", 0)), "dilation": pair(given.get("dilation", 1)),
            "groups": int(given.get("groups", 1)),
        }  # fmt: skip
        self._layer(node, "conv", given, attrs)

    def _linear(self, node: fx.Node) -> None:
        self._layer(node, "linear", _arguments(node, ("input", "weight", "bias")), {})

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
        self._put(node, kind, (given["input"],), name=module, module=module, params=params, attrs=attrs)

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
        return same and taken <= set(params.values())

    def _batch_norm(self, node: fx.Node) -> None:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = _arguments(node, names)
        params = {role: self._state(given[role]) for role in names[1:5]}
        if params["running_mean"] is None or params["running_var"] is None:
            raise unsupported(node, "a batch norm without running statistics")
        path = module_of(params["running_mean"])
        known = self._entries(path, {role: name for role, name in params.items() if name is not None})
        source = self.ops[self._input(given["input"])]
        attrs = {"eps": float(given["eps"]), "momentum": float(given["momentum"])}
        alone = self._users[given["input"].name] == 1 and self._readers.get(source.params.get("weight", "")) == 1
        if source.kind == "conv" and source.norm is None and alone:  # one that is used twice may have two norms
            attrs = dict(source.attrs) | {"norm_eps": attrs["eps"], "norm_momentum": attrs["momentum"]}
            params = dict(source.params) | {f"norm_{role}": name for role, name in known.items()}
            self.ops[source.name] = replace(source, norm=path, params=params, attrs=attrs)
            self.alias[node.name] = source.name
            return
        self._put(node, "batch_norm", (given["input"],), name=path, module=path, params=known, attrs=attrs)

    def _layer_norm(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "shape", "weight", "bias", "eps"))
        if len(given["shape"]) != 1:
            raise unsupported(node, f"a layer norm over {len(given['shape'])} axes")
        params = {role: self._state(given.get(role)) for role in ("weight", "bias")}
        known = {role: name for role, name in params.items() if name is not None}
        path = module_of(next(iter(known.values()))) if known else node.name
        attrs = {"eps": float(given.get("eps", 1e-5))}
        params = self._entries(path, known)
        self._put(node, "layer_norm", (given["input"],), name=path, module=path, params=params, attrs=attrs)

    # Activations with arguments

    def _gelu(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "approximate"))
        self._put(node, "gelu", (given["input"],), attrs={"approximate": given.get("approximate", "none")})

    def _hardtanh(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "low", "high"))
        low, high = float(given.get("low", -1)), float(given.get("high", 1))
        if (low, high) == (0, 6):
            self._put(node, "relu6", (given["input"],))
        else:
            self._put(node, "clip", (given["input"],), attrs={"low": low, "high": high})

    _hardtanh_ = _hardtanh

    def _clamp(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "low", "high"))
        low, high = given.get("low"), given.get("high")
        attrs = {"low": -math.inf if low is None else float(low), "high": math.inf if high is None else float(high)}
        self._put(node, "clip", (given["input"],), attrs=attrs)

    def _leaky_relu(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "slope"))
        self._put(node, "leaky_relu", (given["input"],), attrs={"slope": float(given.get("slope", 0.01))})

    _leaky_relu_ = _leaky_relu

    def _elu(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "alpha", "scale", "input_scale"))
        if given.get("scale", 1) != 1 or given.get("input_scale", 1) != 1:
            raise unsupported(node, "an ELU with a scale")
        self._put(node, "elu", (given["input"],), attrs={"alpha": float(given.get("alpha", 1))})

    def _softmax(self, node: fx.Node) -> None:
        axis = int(_plain(node, "dim", 1, -1)) % len(shape_of(node)[0])
        self._put(node, "softmax", (node.args[0],), attrs={"axis": axis})

    # Arithmetic

    def _binary(self, node: fx.Node, kind: str) -> None:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise unsupported(node, f"{kind} with {dict(node.kwargs)}")
        first, second = node.args[0], node.args[1]
        if isinstance(first, fx.Node) and isinstance(second, fx.Node) and _tensor(first) and _tensor(second):
            self._put(node, kind, (first, second))
        elif isinstance(first, fx.Node) and isinstance(second, int | float):
            self._put(node, kind, (first,), attrs={"constant": float(second)})
        else:
            raise unsupported(node, f"{kind} with a number that depends on the batch")

    def _pow(self, node: fx.Node) -> None:
        if node.args[1] != 2:
            raise unsupported(node, f"a power of {node.args[1]}")
        self._put(node, "mul", (node.args[0], node.args[0]))

    def _matmul(self, node: fx.Node) -> None:
        self._put(node, "matmul", (node.args[0], node.args[1]))

    _bmm = _matmul

    def _scaled_dot_product_attention(self, node: fx.Node) -> None:
        given = _arguments(node, ("query", "key", "value", "mask", "dropout", "causal"))
        if given.get("causal") or given.get("enable_gqa"):
            raise unsupported(node, "causal or grouped attention")
        size = shape_of(given["query"])[0][-1]
        scale = given.get("scale")
        inputs = [given["query"], given["key"], given["value"]]
        if given.get("mask") is not None:
            inputs.append(given["mask"])
        self._put(node, "attention", inputs, attrs={"scale": float(scale) if scale is not None else size**-0.5})

    # Channels and positions

    def _cat(self, node: fx.Node) -> None:
        joined: Any = node.args[0]
        self._put(node, "cat", joined, attrs={"axis": int(_plain(node, "dim", 1, 0)) % len(shape_of(node)[0])})

    def _slice(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "dim", "start", "end", "step"))
        source = shape_of(given["input"])[0]
        axis = int(given.get("dim", 0)) % len(source)
        if shape_of(node)[0] == source:
            self.alias[node.name] = self._input(given["input"])
            return
        start, step = given.get("start"), int(given.get("step", 1))
        start = max(0, int(start) + source[axis]) if start is not None and int(start) < 0 else int(start or 0)
        self._put(node, "slice", (given["input"],), attrs={"axis": axis, "start": start, "step": step})

    def _narrow(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "dim", "start", "length"))
        attrs = {"axis": int(given["dim"]) % len(shape_of(node)[0]), "start": int(given["start"]), "step": 1}
        self._put(node, "slice", (given["input"],), attrs=attrs)

    def _select(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "dim", "index"))
        self._pick(node, given["input"], int(given["dim"]), int(given["index"]))

    def _pick(self, node: fx.Node, source: fx.Node, axis: int, index: int) -> None:
        shape = shape_of(source)[0]
        axis %= len(shape)
        self._put(node, "select", (source,), attrs={"axis": axis, "index": index % shape[axis]})

    def _getitem(self, node: fx.Node) -> None:
        """One part of a chunk, split or unbind."""
        whole, number = node.args
        if not isinstance(whole, fx.Node) or not isinstance(number, int):
            raise unsupported(node)
        source: Any = whole.args[0]
        axis = int(_plain(whole, "dim", 1 if _name(whole) == "unbind" else 2, 0))
        if _name(whole) == "unbind":
            self._pick(node, source, axis, number)
            return
        if _name(whole) not in {"chunk", "split", "split_with_sizes"}:
            raise unsupported(whole)
        axis %= len(shape_of(source)[0])
        sizes = [_dims(part)[0][axis] for part in whole.meta["val"]]
        attrs = {"axis": axis, "start": sum(sizes[:number]), "step": 1}
        self._put(node, "slice", (source,), attrs=attrs)

    def _reshaped(self, node: fx.Node) -> None:
        if shape_of(node) == shape_of(node.args[0]):
            self.alias[node.name] = self._input(node.args[0])
            return
        shape, axis = shape_of(node)
        flat = len(shape) == 2 and axis == 0 and shape[0] == 1 and shape_of(node.args[0])[1] == 0
        self._put(node, "flatten" if flat else "reshape", (node.args[0],))

    def _permute(self, node: fx.Node) -> None:
        order: Any = node.args[1]
        self._put(node, "permute", (node.args[0],), attrs={"order": tuple(int(i) % len(order) for i in order)})

    def _transpose(self, node: fx.Node) -> None:
        order = list(range(len(shape_of(node)[0])))
        one, other = (int(i) % len(order) for i in node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
        self._put(node, "permute", (node.args[0],), attrs={"order": tuple(order)})

    def _expand(self, node: fx.Node) -> None:
        if shape_of(node) == shape_of(node.args[0]):
            self.alias[node.name] = self._input(node.args[0])
            return
        self._put(node, "expand", (node.args[0],))

    def _roll(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "shifts", "dims"))
        if len(given.get("dims", ())) != len(given["shifts"]):
            raise unsupported(node, "roll over all axes at once")
        count = len(shape_of(node)[0])
        attrs = {"shifts": tuple(int(s) for s in given["shifts"]), "axes": tuple(int(d) % count for d in given["dims"])}
        self._put(node, "roll", (given["input"],), attrs=attrs)

    def _pad(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "pad", "mode", "value"))
        amounts = [int(a) for a in given["pad"]]
        if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
            raise unsupported(node, f"padding with {given.get('mode')!r}, {given.get('value')}")
        if not any(amounts):
            self.alias[node.name] = self._input(given["input"])
            return
        rank = len(shape_of(node)[0])
        before, after = [0] * rank, [0] * rank
        for i, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
            before[rank - 1 - i], after[rank - 1 - i] = low, high
        if rank == 4 and (before[1] or after[1]) and before[0] == after[0] == 0 and not any(before[2:] + after[2:]):
            self._padded_shortcut(node, given["input"], before[1])
            return
        self._put(node, "pad", (given["input"],), attrs={"before": tuple(before), "after": tuple(after)})

    _constant_pad_nd = _pad

    def _padded_shortcut(self, node: fx.Node, source: fx.Node, before: int) -> None:
        """Every n-th pixel with channels of zeros around it (the option-A shortcut of He et al. 2016): exactly a 1×1
        convolution with a stride and a frozen identity, which can be pruned and quantised like any other."""
        stride, reader = [1, 1], source
        while _name(reader) in {"slice", "alias"} and reader.op == "call_function":
            given = _arguments(reader, ("input", "dim", "start", "end", "step"))
            inner, outer = shape_of(given["input"])[0], shape_of(reader)[0]
            axis, step = int(given.get("dim", 0)) % 4, int(given.get("step", 1))
            if inner != outer:
                if axis < 2 or int(given.get("start") or 0) != 0 or outer[axis] != -(-inner[axis] // step):
                    break
                stride[axis - 2] *= step
            reader = given["input"]
        wide, narrow = shape_of(node)[0][1], shape_of(reader)[0][1]
        weight = torch.zeros(wide, narrow, 1, 1)
        weight[torch.arange(narrow) + before, torch.arange(narrow)] = 1.0
        module = f"{scope_of(node)}.as_conv".lstrip(".")
        while f"{module}.weight" in self.captured.state:
            module += "_"
        self.captured.state[f"{module}.weight"] = weight
        self.captured.renamed[f"{module}.weight"] = CONSTANT + module
        attrs = {"kernel": (1, 1), "stride": tuple(stride), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        self._put(node, "conv", (reader,), name=module, module=module,
                  params={"weight": f"{module}.weight"}, attrs=attrs)  # fmt: skip

    # Pooling and resizing

    def _pool(self, node: fx.Node, kind: str) -> None:
        given = _arguments(node, ("input", *_POOLS[kind]))
        if pair(given.get("dilation", 1)) != (1, 1) or given.get("divisor") is not None:
            raise unsupported(node, f"{kind} with dilation or a divisor")
        attrs: dict[str, Any] = {
            "kernel": pair(given["kernel"]), "stride": pair(given.get("stride") or given["kernel"]),
            "padding": pair(given.get("padding", 0)), "ceil": int(given.get("ceil", False)),
        }  # fmt: skip
        if kind == "avg_pool2d":
            attrs["count_include_pad"] = int(given.get("count_include_pad", True))
        self._put(node, kind.removesuffix("2d"), (given["input"],), attrs=attrs)

    def _adaptive_avg_pool2d(self, node: fx.Node) -> None:
        """Adaptive pooling to 1×1 is a global pool; to the size that is there already, nothing."""
        source: Any = node.args[0]
        before, after = shape_of(source)[0], shape_of(node)[0]
        if before == after and after[2:] != (1, 1):
            self.alias[node.name] = self._input(source)
        elif after[2:] == (1, 1):
            self._put(node, "global_pool", (source,), attrs={"keepdim": True})
        elif before[2] % after[2] == 0 and before[3] % after[3] == 0:
            kernel = (before[2] // after[2], before[3] // after[3])
            attrs = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "ceil": 0, "count_include_pad": 1}
            self._put(node, "avg_pool", (source,), attrs=attrs)
        else:
            raise unsupported(node, f"adaptive pooling from {before[2:]} to {after[2:]}")

    def _mean(self, node: fx.Node) -> None:
        given = _arguments(node, ("input", "dims", "keepdim"))
        rank = len(shape_of(given["input"])[0])
        if not given.get("dims"):
            raise unsupported(node, "a mean over all axes")
        dims = tuple(sorted(int(d) % rank for d in given["dims"]))
        keepdim = bool(given.get("keepdim", False))
        if rank == 4 and dims == (2, 3):
            self._put(node, "global_pool", (given["input"],), attrs={"keepdim": keepdim})
        else:
            self._put(node, "mean", (given["input"],), attrs={"axes": dims, "keepdim": keepdim})

    def _upsample_nearest2d(self, node: fx.Node) -> None:
        self._resize(node, "nearest", None)

    def _upsample_bilinear2d(self, node: fx.Node) -> None:
        self._resize(node, "linear", bool(_arguments(node, ("input", "size", "align_corners"))["align_corners"]))

    def _resize(self, node: fx.Node, mode: str, align_corners: bool | None) -> None:
        source: Any = node.args[0]
        before, after = shape_of(source)[0], shape_of(node)[0]
        factors: Any = node.args[-1] if isinstance(node.args[-1], list | tuple) else ()
        if len(node.args) > 2 and any(of * f != to for of, f, to in zip(before[2:], factors, after[2:], strict=False)):
            raise unsupported(node, f"resizing by {tuple(factors)} to a rounded size")
        if before == after:
            self.alias[node.name] = self._input(source)
            return
        attrs = {"mode": mode, "align_corners": align_corners, "size": after[2:]}
        self._put(node, "resize", (source,), attrs=attrs)


def shape_of(node: Any) -> tuple[tuple[int, ...], int | None]:
    """The shape of a node's value for one example, and the axis of the batch (see :class:`Op`)."""
    return _dims(node.meta["val"])


def _dims(value: Any) -> tuple[tuple[int, ...], int | None]:
    sizes: list[int] = []
    batch_axis: int | None = None
    for axis, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt):
            expression: Any = size.node.expr
            symbols = list(expression.free_symbols)
            one, two = (int(expression.subs(dict.fromkeys(symbols, n))) for n in (1, 2))
            if batch_axis is not None or two != 2 * one:
                raise InputError(f"A tensor of shape {tuple(value.shape)} mixes the batch into its axes.")
            batch_axis = axis
            sizes.append(one)
        else:
            sizes.append(int(size))
    return tuple(sizes), batch_axis


def module_of(name: str) -> str:
    """The layer that a state entry belongs to: ``a.weight`` to ``a``, ``a.in_proj_weight`` to ``a.in_proj``."""
    owner, _, entry = name.removeprefix(CONSTANT).rpartition(".")
    for suffix in ("weight", "bias", "running_mean"):
        if entry == suffix:
            return owner or entry
        if entry.endswith(f"_{suffix}"):
            return f"{owner}.{entry.removesuffix(f'_{suffix}')}".lstrip(".")
    return f"{owner}.{entry}".lstrip(".")


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    return (int(value[0]), int(value[-1]))


def unsupported(node: fx.Node, what: str = "") -> InputError:
    where = scope_of(node) or node.name
    return InputError(
        f"The model uses {what or _name(node)} in {where}, which nightpress cannot export yet; "
        "replace it, or leave it out of the model given to nightpress."
    )


def _name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    if node.target is operator.getitem:
        return "getitem"
    name: str = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def _tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Positional arguments under these names, keyword arguments under their own."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _plain(node: fx.Node, key: str, position: int, default: int) -> Any:
    if key in node.kwargs:
        return node.kwargs[key]
    return node.args[position] if len(node.args) > position else default


def _users(captured: Captured) -> dict[str, int]:
    """How many nodes read each node's tensor."""
    counts: dict[str, int] = {}
    for node in captured.nodes:
        for source in node.all_input_nodes:
            counts[source.name] = counts.get(source.name, 0) + 1
    return counts


def _tidy(ops: list[Op], output: str) -> list[Op]:
    """Without what nobody reads, such as the slices that a padded shortcut took in."""
    needed = {output}
    for op in reversed(ops):
        if op.name in needed:
            needed.update(op.inputs)
    return [op for op in ops if op.name in needed or op.kind == "input"]
