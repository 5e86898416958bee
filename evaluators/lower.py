"""A traced module as a list of operations that the plan, the predictor and the ONNX builder understand."""

import contextlib
import io
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..spaces.anatomy import Op
from ..spaces.errors import InputError

_ELEMENTWISE_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
    nn.Dropout: "identity",
    nn.Dropout2d: "identity",
}
_FUNCTIONS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.cat: "cat",
    torch.flatten: "flatten",
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.silu: "silu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.gelu: "gelu",
    F.dropout: "identity",
    F.max_pool2d: "max_pool",
    F.avg_pool2d: "avg_pool",
    F.adaptive_avg_pool2d: "adaptive_avg_pool",
    torch.mean: "mean",
}
_POOL_ARGUMENTS = {
    "max_pool": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}
_METHODS = {"add": "add", "add_": "add", "mul": "mul", "relu": "relu", "flatten": "flatten", "view": "flatten",
            "reshape": "flatten", "mean": "mean", "sigmoid": "sigmoid", "contiguous": "identity"}  # fmt: skip


def trace(model: nn.Module, example_input: torch.Tensor) -> fx.GraphModule:
    """The model as a graph, traced in evaluation mode, with the shape of every value noted.

    Raises InputError when the model's control flow depends on its values.
    """
    model.eval()
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # the user's own forward runs here
        raise InputError(
            f"The model {type(model).__name__} cannot be traced: {_last_line(error)}. "
            "Its forward must not branch on tensor values; wrap such a part with torch.fx.wrap."
        ) from error
    note_shapes(traced, example_input)
    return traced


def note_shapes(traced: fx.GraphModule, example_input: torch.Tensor) -> None:
    """Run the graph once and note the shape of every value in ``node.meta``."""
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # it prints each traceback before it raises
        ShapeProp(traced).propagate(example_input.to(next(traced.parameters()).device))


def lower(traced: fx.GraphModule) -> tuple[list[Op], str]:
    """Operations in order, and the name of the output. Batch norms are folded into the convolution before.

    Raises InputError naming the first operation that the exporter does not know.
    """
    modules: dict[str, nn.Module] = dict(traced.named_modules())
    ops: dict[str, Op] = {}
    alias: dict[str, str] = {}
    output = ""
    for node in traced.graph.nodes:
        if node.op == "output":
            output = _only_output(node, alias)
            continue
        if "tensor_meta" not in node.meta:  # a size; the reshape that reads it is judged by its own shape
            continue
        inputs = tuple(alias.get(str(n.name), str(n.name)) for n in _tensors(node))
        kind, attrs, module = _describe(node, modules)
        if kind == "identity":
            alias[str(node.name)] = inputs[0]
            continue
        folds = kind == "batch_norm" and ops[inputs[0]].kind == "conv" and len(node.all_input_nodes[0].users) == 1
        if folds and ops[inputs[0]].norm is None:
            conv = ops.pop(inputs[0])
            kind, attrs, inputs = "conv", dict(conv.attrs), conv.inputs
            module, norm = conv.module, module
        else:
            norm = None
        name = str(node.name)
        ops[name] = Op(
            name=name, kind=kind, inputs=inputs, shape=shape_of(node), module=module, norm=norm,
            attrs=attrs, channels_by_group={},
        )  # fmt: skip
    return list(ops.values()), output


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads, without the sizes."""
    return [source for source in node.all_input_nodes if "tensor_meta" in source.meta]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The noted shape of a node's value without the batch axis."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape[1:]) if meta is not None and hasattr(meta, "shape") else ()


def _only_output(node: fx.Node, alias: dict[str, str]) -> str:
    value = node.args[0]
    if not isinstance(value, fx.Node):
        raise InputError(
            f"The model must return one tensor, but it returns a {type(value).__name__.removeprefix('immutable_')}; "
            "wrap it so that it returns the logits."
        )
    return alias.get(str(value.name), str(value.name))


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, dict[str, Any], str | None]:
    if node.op == "placeholder":
        return "input", {}, None
    if node.op == "call_module":
        module = modules[str(node.target)]
        kind, attrs = _describe_module(module, node)
        return kind, attrs, str(node.target)
    target = node.target
    kind = _METHODS.get(str(target)) if node.op == "call_method" else _function_kind(target)
    if kind is None or node.op == "get_attr":
        raise _unsupported(node)
    return *_describe_function(kind, node), None


def _function_kind(target: Any) -> str | None:
    if getattr(target, "__name__", "") == "stochastic_depth":  # torchvision; identity in evaluation mode
        return "identity"
    return _FUNCTIONS.get(target)


def _describe_module(module: nn.Module, node: fx.Node) -> tuple[str, dict[str, Any]]:
    if isinstance(module, nn.Conv2d):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise _unsupported(node, f"padding {module.padding!r} ({module.padding_mode})")
        return "conv", {
            "kernel": module.kernel_size, "stride": module.stride, "padding": module.padding,
            "dilation": module.dilation, "groups": module.groups,
        }  # fmt: skip
    if isinstance(module, nn.Linear):
        return "linear", {}
    if isinstance(module, nn.BatchNorm2d):
        return "batch_norm", {"eps": module.eps}
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        kind = "max_pool" if isinstance(module, nn.MaxPool2d) else "avg_pool"
        return _pooling(kind, node, {name: getattr(module, name) for name in _POOL_ARGUMENTS[kind]})
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive(node)
    if isinstance(module, nn.Flatten):
        return _flatten(node)
    if isinstance(module, nn.GELU):
        return _gelu(node, module.approximate)
    kind = _ELEMENTWISE_MODULES.get(type(module))
    if kind is None:
        raise _unsupported(node, type(module).__name__)
    return kind, {}


def _describe_function(kind: str, node: fx.Node) -> tuple[str, dict[str, Any]]:
    args, kwargs = node.args, node.kwargs
    if kind == "adaptive_avg_pool":
        return _adaptive(node)
    if kind == "mean":
        axes: Any = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(axes, list | tuple) or sorted(axes) not in ([2, 3], [-2, -1]):
            raise _unsupported(node, f"mean over {axes}")
        return "global_pool", {"keepdim": bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))}
    if kind in {"max_pool", "avg_pool"}:
        return _pooling(kind, node, dict(zip(_POOL_ARGUMENTS[kind], args[1:], strict=False)) | dict(kwargs))
    if kind in {"add", "mul"}:
        if len(_tensors(node)) != 2:
            raise _unsupported(node, f"{kind} with a constant or of a tensor with itself")
        if kwargs.get("alpha", 1) != 1:
            raise _unsupported(node, f"{kind} with alpha")
    if kind == "cat":
        if kwargs.get("dim", args[1] if len(args) > 1 else 0) not in (1, -3):
            raise _unsupported(node, "concatenation along another axis than the channels")
        joined: Any = args[0] if args else kwargs["tensors"]
        if len(joined) != len(_tensors(node)):
            raise _unsupported(node, "concatenation of a tensor with itself")
    if kind == "flatten":
        return _flatten(node)
    if kind == "gelu":
        return _gelu(node, kwargs.get("approximate", "none"))
    return kind, {}


def _flatten(node: fx.Node) -> tuple[str, dict[str, Any]]:
    if len(shape_of(node)) != 1:
        raise _unsupported(node, f"reshape to {shape_of(node)}")
    return "flatten", {}


def _gelu(node: fx.Node, approximate: Any) -> tuple[str, dict[str, Any]]:
    if approximate != "none":
        raise _unsupported(node, f"gelu with approximate {approximate!r}")
    return "gelu", {}


def _adaptive(node: fx.Node) -> tuple[str, dict[str, Any]]:
    """Adaptive pooling to 1×1 is a global pool; to the size that is there already, nothing."""
    source, result = shape_of(node.all_input_nodes[0]), shape_of(node)
    if source == result and result[1:] != (1, 1):
        return "identity", {}
    if result[1:] == (1, 1):
        return "global_pool", {"keepdim": True}
    if source[1] % result[1] == 0 and source[2] % result[2] == 0:
        kernel = (source[1] // result[1], source[2] // result[2])
        return "avg_pool", {**_pool(kernel, kernel, 0, False), "count_include_pad": 1}
    raise _unsupported(node, f"adaptive pooling from {source[1:]} to {result[1:]}")


def _pooling(kind: str, node: fx.Node, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and attributes from torch's own arguments, of which some have no counterpart in every runtime."""
    for name, usual in (("dilation", 1), ("return_indices", False), ("divisor_override", None)):
        if given.get(name, usual) not in (usual, (usual, usual), [usual, usual]):
            raise _unsupported(node, f"{kind} with {name} {given[name]!r}")
    if len(node.all_input_nodes) != 1:
        raise _unsupported(node, f"{kind} with a size that is computed; nn.AdaptiveAvgPool2d(1) would be known")
    attrs = _pool(given["kernel_size"], given.get("stride"), given.get("padding", 0), given.get("ceil_mode", False))
    return kind, attrs | ({"count_include_pad": int(given.get("count_include_pad", 1))} if kind == "avg_pool" else {})


def _pool(kernel: Any, stride: Any, padding: Any, ceil: bool) -> dict[str, Any]:
    return {"kernel": _pair(kernel), "stride": _pair(stride if stride is not None else kernel),
            "padding": _pair(padding), "ceil": int(ceil)}  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _unsupported(node: fx.Node, what: str = "") -> InputError:
    stack = node.meta.get("nn_module_stack") or {}
    where = list(stack)[-1] if stack else node.name
    return InputError(
        f"The model uses {what or node.target!s} in {where}, which nightpress cannot export yet; "
        "replace it, or leave it out of the model given to nightpress."
    )


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
