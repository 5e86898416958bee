"""From a plan and the model's state to a torch module: the graph of the anatomy with the channels that stay.

The module is an ``fx.GraphModule`` of plain torch layers and functions. Its nodes are named after the operations, its
layers stand under their names in the model; dropout and the like, which do nothing at inference, are gone.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..spaces.plan import Plan, PlannedOp
from .convolution import Conv2d

_NORM_ROLES = {"norm_weight": "weight", "norm_bias": "bias", "norm_running_mean": "running_mean",
               "norm_running_var": "running_var"}  # fmt: skip


def rebuild(plan: Plan, state: Mapping[str, Tensor], frozen: frozenset[str] = frozenset()) -> fx.GraphModule:
    """The module, on the CPU in evaluation mode. It owns its tensors; ``state`` is copied.

    ``state`` holds parameters and buffers by their names in the model, in the plan's shapes. Entries named in
    ``frozen`` do not require gradients.
    """
    builder = _Builder(state, frozen)
    for planned in plan.ops:
        builder.add(planned)
    builder.graph.output(builder.nodes[plan.output])
    module = fx.GraphModule(builder.root, builder.graph)
    return module.eval()


class _Builder:
    def __init__(self, state: Mapping[str, Tensor], frozen: frozenset[str]) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self._state = state
        self._frozen = frozen
        self._made: dict[str, nn.Parameter | Tensor] = {}

    def add(self, planned: PlannedOp) -> None:
        op = planned.op
        inputs = [self.nodes[name] for name in planned.inputs]
        if op.kind == "input":
            self.nodes[op.name] = self.graph.placeholder(op.name)
        elif op.kind == "param":
            self.nodes[op.name] = self._read(op.name, op.params["value"])
        elif op.kind in _LAYERS:
            self.nodes[op.name] = self._layer(planned, inputs)
        else:
            target, args, kwargs = _FUNCTIONS[op.kind](planned, inputs)
            self.nodes[op.name] = self.graph.create_node("call_function", target, tuple(args), kwargs, name=op.name)

    def _layer(self, planned: PlannedOp, inputs: list[fx.Node]) -> fx.Node:
        op = planned.op
        path = op.module or op.name
        if not _has(self.root, path):
            layer = _LAYERS[op.kind](planned)
            self._fill(layer, {role: name for role, name in op.params.items() if role not in _NORM_ROLES})
            _put(self.root, path, layer)
        if op.norm is None:
            return self.graph.create_node("call_module", path, tuple(inputs), name=op.name)
        if not _has(self.root, op.norm):
            norm = _batch_norm(planned.channels, op.attrs["norm_eps"], op.attrs["norm_momentum"],
                               affine="norm_weight" in op.params)  # fmt: skip
            self._fill(norm, {_NORM_ROLES[role]: name for role, name in op.params.items() if role in _NORM_ROLES})
            _put(self.root, op.norm, norm)
        bare = self.graph.create_node("call_module", path, tuple(inputs), name=f"{op.name}_before_norm")
        return self.graph.create_node("call_module", op.norm, (bare,), name=op.name)

    def _read(self, name: str, entry: str) -> fx.Node:
        owner, _, last = entry.rpartition(".")
        holder = _module(self.root, owner)
        value = self._value(entry)
        if isinstance(value, nn.Parameter):
            holder.register_parameter(last, value)
        else:
            holder.register_buffer(last, value)
        return self.graph.create_node("get_attr", entry, name=name)

    def _fill(self, layer: nn.Module, roles: Mapping[str, str]) -> None:
        for role, entry in roles.items():
            setattr(layer, role, self._value(entry))

    def _value(self, entry: str) -> nn.Parameter | Tensor:
        """A parameter or buffer; what the model shares stays shared."""
        if entry not in self._made:
            value = self._state[entry].detach().clone()
            buffer = entry.rpartition(".")[2] in {"running_mean", "running_var"} or not value.is_floating_point()
            self._made[entry] = value if buffer else nn.Parameter(value, requires_grad=entry not in self._frozen)
        return self._made[entry]


def _module(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, with empty ones on the way where there are none."""
    for name in filter(None, path.split(".")):
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = cast("nn.Module", getattr(root, name))
    return root


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, last = path.rpartition(".")
    parent = _module(root, owner)
    for name, child in getattr(parent, last, nn.Module()).named_children():  # layers below it that came first
        layer.add_module(name, child)
    parent.add_module(last, layer)


def _has(root: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(root, name):
            return False
        root = cast("nn.Module", getattr(root, name))
    return type(root) is not nn.Module


# Layers: shapes only, their tensors come from the state


def _conv(planned: PlannedOp) -> nn.Module:
    attrs = planned.op.attrs
    padding = "same" if "padding_behind" in attrs else attrs["padding"]
    return Conv2d(
        planned.in_shapes[0][1], planned.shape[1], attrs["kernel"], attrs["stride"], padding,
        attrs["dilation"], planned.groups, bias="bias" in planned.op.params, device="meta",
    )  # fmt: skip


def _linear(planned: PlannedOp) -> nn.Module:
    bias = "bias" in planned.op.params
    return nn.Linear(planned.in_shapes[0][-1], planned.shape[-1], bias=bias, device="meta")


def _batch_norm(channels: int, eps: float, momentum: float, affine: bool, flat: bool = False) -> nn.Module:
    kind = nn.BatchNorm1d if flat else nn.BatchNorm2d
    norm = kind(channels, eps, momentum, affine=affine, device="meta")
    norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return norm


def _layer_norm(planned: PlannedOp) -> nn.Module:
    params = planned.op.params
    return nn.LayerNorm(
        planned.shape[-1], planned.op.attrs["eps"], elementwise_affine="weight" in params, bias="bias" in params,
        device="meta",
    )  # fmt: skip


def _group_norm(planned: PlannedOp) -> nn.Module:
    attrs = planned.op.attrs  # what it has of weight and bias is set afterwards
    return nn.GroupNorm(planned.groups, planned.shape[1], attrs["eps"], affine=False)


def _prelu(planned: PlannedOp) -> nn.Module:
    return nn.PReLU(1 if planned.op.attrs["shared"] else planned.shape[1], device="meta")


def _lone_norm(planned: PlannedOp) -> nn.Module:
    attrs, affine = planned.op.attrs, "weight" in planned.op.params
    flat = len(planned.shape) < 4
    return _batch_norm(planned.shape[1], attrs["eps"], attrs["momentum"], affine, flat)


_LAYERS: dict[str, Callable[[PlannedOp], nn.Module]] = {
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _lone_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
}

# Functions: target, arguments, keyword arguments

_Call = tuple[Callable[..., Any], list[Any], dict[str, Any]]


def _simple(target: Callable[..., Any]) -> Callable[[PlannedOp, list[fx.Node]], _Call]:
    return lambda planned, inputs: (target, list(inputs), {})


def _binary(target: Callable[..., Any]) -> Callable[[PlannedOp, list[fx.Node]], _Call]:
    def call(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
        if "constant" in planned.op.attrs:
            return target, [*inputs, planned.op.attrs["constant"]], {}
        return target, list(inputs), {}

    return call


def _reshape(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    return torch.reshape, [inputs[0], tuple(planned.run_time_shape)], {}


def _pool(target: Callable[..., Any]) -> Callable[[PlannedOp, list[fx.Node]], _Call]:
    def call(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
        attrs = planned.op.attrs
        kwargs: dict[str, Any] = {
            "stride": attrs["stride"],
            "padding": attrs["padding"],
            "ceil_mode": bool(attrs["ceil"]),
        }
        if "count_include_pad" in attrs:
            kwargs["count_include_pad"] = bool(attrs["count_include_pad"])
        return target, [inputs[0], attrs["kernel"]], kwargs

    return call


def _global_pool(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    return torch.mean, [inputs[0], (2, 3)], {"keepdim": True}


def _reduced(target: Callable[..., Any]) -> Callable[[PlannedOp, list[fx.Node]], _Call]:
    def call(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
        attrs = planned.op.attrs
        return target, [inputs[0], attrs["axes"]], {"keepdim": attrs["keepdim"]}

    return call


def _attention(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    mask = {"attn_mask": inputs[3]} if len(inputs) > 3 else {}
    return F.scaled_dot_product_attention, inputs[:3], {**mask, "scale": planned.op.attrs["scale"]}


def _slice(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    attrs, axis = planned.op.attrs, planned.op.attrs["axis"]
    end = planned.start + (planned.shape[axis] - 1) * attrs["step"] + 1
    index = (*[slice(None)] * axis, slice(planned.start, end, attrs["step"]))
    return operator.getitem, [inputs[0], index], {}


def _expand(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    """To the batch of the graph's input, whose first axis it is."""
    graph, name, axis = inputs[0].graph, planned.op.name, planned.op.batch_axis
    source = next(node for node in graph.nodes if node.op == "placeholder")
    # Named, since a name of torch's choice (getitem) may be that of an operation to come.
    batch = graph.create_node("call_function", getattr, (source, "shape"), name=f"{name}_shape")
    first = graph.create_node("call_function", operator.getitem, (batch, 0), name=f"{name}_batch")
    sizes = [first if i == axis else size for i, size in enumerate(planned.shape)]
    return Tensor.expand, [inputs[0], *sizes], {}


def _pad(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    pairs = list(zip(planned.op.attrs["before"], planned.op.attrs["after"], strict=True))
    amounts, mode = [n for pair in reversed(pairs) for n in pair], planned.op.attrs["mode"]
    if mode != "constant":  # torch wants to hear of the axes behind the channels alone
        amounts = amounts[: 2 * (len(planned.shape) - 2)]
    return F.pad, [inputs[0], tuple(amounts)], {"mode": mode}


def _clip(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    low, high = planned.op.attrs["low"], planned.op.attrs["high"]
    bounds = {key: value for key, value in (("min", low), ("max", high)) if math.isfinite(value)}
    return torch.clamp, [inputs[0]], bounds


def _resize(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    attrs = planned.op.attrs
    mode = {"nearest": "nearest", "linear": "bilinear"}[attrs["mode"]]
    return F.interpolate, [inputs[0]], {"size": attrs["size"], "mode": mode, "align_corners": attrs["align_corners"]}


def _gelu(planned: PlannedOp, inputs: list[fx.Node]) -> _Call:
    return F.gelu, list(inputs), {"approximate": planned.op.attrs["approximate"]}


_FUNCTIONS: dict[str, Callable[[PlannedOp, list[fx.Node]], _Call]] = {
    "relu": _simple(F.relu), "relu6": _simple(F.relu6), "hardswish": _simple(F.hardswish),
    "hardsigmoid": _simple(F.hardsigmoid), "silu": _simple(F.silu), "sigmoid": _simple(torch.sigmoid),
    "tanh": _simple(torch.tanh), "exp": _simple(torch.exp), "sqrt": _simple(torch.sqrt), "abs": _simple(torch.abs),
    "erf": _simple(torch.erf), "neg": _simple(torch.neg), "softplus": _simple(F.softplus), "mish": _simple(F.mish),
    "log": _simple(torch.log), "rsqrt": _simple(torch.rsqrt), "reciprocal": _simple(torch.reciprocal),
    "selu": _simple(F.selu), "pow": _binary(torch.pow), "maximum": _simple(torch.maximum),
    "minimum": _simple(torch.minimum),
    "gelu": _gelu, "clip": _clip,
    "leaky_relu": lambda planned, inputs: (F.leaky_relu, [inputs[0], planned.op.attrs["slope"]], {}),
    "elu": lambda planned, inputs: (F.elu, [inputs[0], planned.op.attrs["alpha"]], {}),
    "softmax": lambda planned, inputs: (torch.softmax, [inputs[0], planned.op.attrs["axis"]], {}),
    "log_softmax": lambda planned, inputs: (torch.log_softmax, [inputs[0], planned.op.attrs["axis"]], {}),
    "add": _binary(torch.add), "sub": _binary(torch.sub), "mul": _binary(torch.mul), "div": _binary(torch.div),
    "matmul": _simple(torch.matmul), "attention": _attention,
    "cat": lambda planned, inputs: (torch.cat, [list(inputs), planned.op.attrs["axis"]], {}),
    "slice": _slice,
    "select": lambda planned, inputs: (
        torch.select, [inputs[0], planned.op.attrs["axis"], planned.op.attrs["index"]], {}
    ),
    "reshape": _reshape, "flatten": _reshape,
    "permute": lambda planned, inputs: (torch.permute, [inputs[0], planned.op.attrs["order"]], {}),
    "expand": _expand,
    "roll": lambda planned, inputs: (torch.roll, [inputs[0], planned.op.attrs["shifts"], planned.op.attrs["axes"]], {}),
    "pad": _pad, "max_pool": _pool(F.max_pool2d), "avg_pool": _pool(F.avg_pool2d), "global_pool": _global_pool,
    "mean": _reduced(torch.mean), "sum": _reduced(torch.sum), "amax": _reduced(torch.amax),
    "resize": _resize,
    "pixel_shuffle": lambda planned, inputs: (F.pixel_shuffle, [inputs[0], planned.op.attrs["factor"]], {}),
}  # fmt: skip
KINDS = frozenset(_FUNCTIONS) | frozenset(_LAYERS) | {"input", "param"}
