"""A captured graph as a list of operations that the plan, the predictor and the ONNX builder understand."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..spaces.anatomy import Op
from .capture import Captured
from .lower_convs import CONV, conv_attrs
from .lower_shapes import POOLS, SEVERAL, ShapeLowering
from .lowering import BINARY, ELEMENTWISE
from .nodes import arguments, is_tensor, module_of, plain_argument, shape_of, target_name, unsupported

_IDENTITY = frozenset({
    "dropout", "dropout_", "feature_dropout", "contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy",
})  # fmt: skip
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_RECURRENT = frozenset({
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
})  # fmt: skip
_RESHAPES = frozenset({
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "squeeze_", "unsqueeze_", "_unsafe_view",
})  # fmt: skip


def has_rule(node: fx.Node) -> bool:
    """Whether :func:`lower` has a rule for what a node does; which of its forms, it says itself."""
    kind = target_name(node)
    several = isinstance(node.meta.get("val"), list | tuple)
    by_name = kind in SEVERAL if several else kind in _IDENTITY | _CASTS or _Lowering.rule(kind) is not None
    return by_name or not isinstance(node.meta.get("val"), Tensor | list | tuple)


def lower(captured: Captured) -> tuple[list[Op], str]:
    """Operations in order, and the name of the output. Batch norms are folded into the convolution before.

    May add entries to ``captured.state``: a shortcut that pads channels becomes a frozen convolution.
    Raises InputError naming the first operation that the exporter does not know.
    """
    lowering = _Lowering(captured)
    recurrent = next((node for node in captured.nodes if target_name(node) in _RECURRENT), None)
    if recurrent is not None:  # before its initial state of zeros is complained of
        raise unsupported(recurrent, "a recurrent layer")
    for node in captured.nodes:
        lowering.add(node)
    output = lowering.output()
    return _tidy(list(lowering.ops.values()), output), output


class _Lowering(ShapeLowering):
    """Layers, activations and arithmetic, and which method lowers a node."""

    def output(self) -> str:
        return self._input(self.captured.output)

    def add(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            self._emit(node, "input", ())
            return
        if isinstance(value, list | tuple):  # a split: its parts are taken by getitem
            return
        if not isinstance(value, Tensor):  # the size of the batch; what reads it is judged by its own shape
            return
        kind = target_name(node)
        if kind in _IDENTITY or (kind in _CASTS and value.dtype == torch.float32):
            self._same(node, node.args[0])  # type: ignore[arg-type]
            return
        if kind in _CASTS:
            raise unsupported(node, f"a cast to {str(value.dtype).removeprefix('torch.')}")
        rule = self.rule(kind)
        if rule is None:
            raise unsupported(node)
        rule(self, node)

    @staticmethod
    def rule(kind: str) -> "Callable[[_Lowering, fx.Node], None] | None":
        """What lowers an operation of torch: a method of its name, or that of its family."""
        if kind in ELEMENTWISE:
            return lambda lowering, node: lowering._emit(node, ELEMENTWISE[kind], (node.args[0],))
        if kind in BINARY:
            return lambda lowering, node: lowering._binary(node, BINARY[kind])
        if kind in _RESHAPES:
            return _Lowering._reshaped
        if kind in POOLS:
            return lambda lowering, node: lowering._pool(node, kind)
        return getattr(_Lowering, f"_{kind}", None)

    # Layers

    def _conv2d(self, node: fx.Node) -> None:
        given = arguments(node, CONV)
        kernel = tuple(self.captured.state[self._weights(node, given["weight"])].shape[2:])
        self._layer(node, "conv", given, conv_attrs(node, given, kernel))

    def _linear(self, node: fx.Node) -> None:
        self._layer(node, "linear", arguments(node, ("input", "weight", "bias")), {})

    def _batch_norm(self, node: fx.Node) -> None:
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        given = arguments(node, names)
        params = {role: self._state(given[role]) for role in names[1:5]}
        if given["training"] or params["running_mean"] is None or params["running_var"] is None:
            raise unsupported(node, "a batch norm without running statistics")
        path = module_of(params["running_mean"])
        known = self._entries(path, {role: name for role, name in params.items() if name is not None})
        source = self.ops[self._stored(given["input"])]
        attrs = {"eps": float(given["eps"]), "momentum": float(given["momentum"])}
        alone = self._users[given["input"].name] == 1 and self._readers.get(source.params.get("weight", "")) == 1
        if source.kind == "conv" and source.norm is None and alone:  # one that is used twice may have two norms
            attrs = dict(source.attrs) | {"norm_eps": attrs["eps"], "norm_momentum": attrs["momentum"]}
            params = dict(source.params) | {f"norm_{role}": name for role, name in known.items()}
            self.ops[source.name] = replace(source, norm=path, params=params, attrs=attrs)
            self._same(node, given["input"])
            return
        self._emit(node, "batch_norm", (given["input"],), name=path, module=path, params=known, attrs=attrs)

    def _layer_norm(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "shape", "weight", "bias", "eps"))
        if len(given["shape"]) != 1:
            raise unsupported(node, f"a layer norm over {len(given['shape'])} axes")
        self._with_vectors(node, "layer_norm", given, {"eps": float(given.get("eps", 1e-5))})

    def _group_norm(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "groups", "weight", "bias", "eps"))
        self._normalised(node, given, int(given["groups"]))

    def _instance_norm(self, node: fx.Node) -> None:
        """A group norm whose groups are single channels."""
        names = ("input", "weight", "bias", "running_mean", "running_var", "own_statistics", "momentum", "eps")
        given = arguments(node, names)
        if not given["own_statistics"]:  # a batch norm at inference, but not while it is trained
            raise unsupported(node, "an instance norm with running statistics")
        self._normalised(node, given, shape_of(node)[0][1])

    def _normalised(self, node: fx.Node, given: Mapping[str, Any], groups: int) -> None:
        if shape_of(node)[1] != 0:
            raise unsupported(node, "a norm over channels without a batch before them")
        self._with_vectors(node, "group_norm", given, {"groups": groups, "eps": float(given.get("eps", 1e-5))})

    def _with_vectors(self, node: fx.Node, kind: str, given: Mapping[str, Any], attrs: dict[str, Any]) -> None:
        """A layer that has a number for each channel, or none. It bears its weight's name, unless another does."""
        named = {role: self._state(given.get(role)) for role in ("weight", "bias")}
        known = {role: name for role, name in named.items() if name is not None}
        path, layer = module_of(next(iter(known.values()))) if known else node.name, (kind, known, attrs)
        while not self._free(path, known) or self._layers.setdefault(path, layer) != layer:
            path += "_"
        params = self._entries(path, known)
        self._emit(node, kind, (given["input"],), name=path, module=path, params=params, attrs=attrs)

    # Activations with arguments

    def _prelu(self, node: fx.Node) -> None:
        """With one slope a channel, or one for all."""
        given = arguments(node, ("input", "weight"))
        shared = self.captured.state[self._weights(node, given["weight"])].numel() == 1
        self._with_vectors(node, "prelu", given, {"shared": shared})

    def _gelu(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "approximate"))
        self._emit(node, "gelu", (given["input"],), attrs={"approximate": given.get("approximate", "none")})

    def _hardtanh(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "low", "high"))
        low, high = float(given.get("low", -1)), float(given.get("high", 1))
        if (low, high) == (0, 6):
            self._emit(node, "relu6", (given["input"],))
        else:
            self._emit(node, "clip", (given["input"],), attrs={"low": low, "high": high})

    _hardtanh_ = _hardtanh

    def _clamp(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "low", "high"))
        low, high = given.get("low"), given.get("high")
        if any(isinstance(end, fx.Node) for end in (low, high)):
            raise unsupported(node, "a clamp whose bound depends on the input")
        attrs = {"low": -math.inf if low is None else float(low), "high": math.inf if high is None else float(high)}
        self._emit(node, "clip", (given["input"],), attrs=attrs)

    def _softplus(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "beta", "threshold"))
        if (given.get("beta", 1), given.get("threshold", 20)) != (1, 20):
            raise unsupported(node, "a softplus of another sharpness")
        self._emit(node, "softplus", (given["input"],))

    def _leaky_relu(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "slope"))
        self._emit(node, "leaky_relu", (given["input"],), attrs={"slope": float(given.get("slope", 0.01))})

    _leaky_relu_ = _leaky_relu

    def _elu(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "alpha", "scale", "input_scale"))
        if given.get("scale", 1) != 1 or given.get("input_scale", 1) != 1:
            raise unsupported(node, "an ELU with a scale")
        self._emit(node, "elu", (given["input"],), attrs={"alpha": float(given.get("alpha", 1))})

    def _softmax(self, node: fx.Node) -> None:
        axis = int(plain_argument(node, "dim", 1, -1)) % len(shape_of(node)[0])
        self._emit(node, target_name(node), (node.args[0],), attrs={"axis": axis})

    _log_softmax = _softmax

    # Arithmetic

    def _binary(self, node: fx.Node, kind: str) -> None:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise unsupported(node, f"{kind} with {dict(node.kwargs)}")
        first, second = node.args[0], node.args[1]
        if isinstance(first, fx.Node) and isinstance(second, fx.Node) and is_tensor(first) and is_tensor(second):
            self._emit(node, kind, (first, second))
        elif isinstance(first, fx.Node) and isinstance(second, int | float):
            self._emit(node, kind, (first,), attrs={"constant": float(second)})
        else:
            raise unsupported(node, f"{kind} with a number that depends on the batch")

    def _rsub(self, node: fx.Node) -> None:
        """A number less the tensor."""
        given = arguments(node, ("input", "other", "alpha"))
        if given.get("alpha", 1) != 1 or not isinstance(given["other"], int | float):
            raise unsupported(node, "a subtraction of a multiple, or from what depends on the batch")
        attrs = {"constant": float(given["other"])}
        self._emit(node, "add", (self._before(node, "neg", (node.args[0],)),), attrs=attrs)

    def _pow(self, node: fx.Node) -> None:
        exponent = node.args[1]
        if isinstance(exponent, fx.Node) or not isinstance(node.args[0], fx.Node):
            raise unsupported(node, "a power that depends on the input")
        if exponent == 2:
            self._emit(node, "mul", (node.args[0], node.args[0]))
        else:
            self._emit(node, "pow", (node.args[0],), attrs={"constant": float(exponent)})  # type: ignore[arg-type]

    def _matmul(self, node: fx.Node) -> None:
        self._emit(node, "matmul", (node.args[0], node.args[1]))

    _bmm = _matmul

    def _scaled_dot_product_attention(self, node: fx.Node) -> None:
        given = arguments(node, ("query", "key", "value", "mask", "dropout", "causal"))
        if given.get("causal") or given.get("enable_gqa"):
            raise unsupported(node, "causal or grouped attention")
        size = shape_of(given["query"])[0][-1]
        scale = given.get("scale")
        inputs = [given["query"], given["key"], given["value"]]
        if given.get("mask") is not None:
            inputs.append(given["mask"])
        self._emit(node, "attention", inputs, attrs={"scale": float(scale) if scale is not None else size**-0.5})


def _tidy(ops: list[Op], output: str) -> list[Op]:
    """Without what nobody reads, such as the slices that a padded shortcut took in."""
    needed = {output}
    for op in reversed(ops):
        if op.name in needed:
            needed.update(op.inputs)
    return [op for op in ops if op.name in needed or op.kind == "input"]
