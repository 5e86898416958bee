"""What a node of an exported graph says: its target, arguments, shape and place."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..spaces.errors import InputError
from .capture import CONSTANT, Captured, described_scope


def shape_of(node: Any) -> tuple[tuple[int, ...], int | None]:
    """The shape of a node's value for one example, and the axis of the batch (see :class:`Op`)."""
    return dims(node.meta["val"])


def dims(value: Any) -> tuple[tuple[int, ...], int | None]:
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
    where = described_scope(node) or "the model's own forward"
    return InputError(
        f"The model uses {what or target_name(node)} in {where}, which nightpress cannot export yet; "
        "replace it, or leave it out of the model given to nightpress."
    )


def target_name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    if node.target is operator.getitem:
        return "getitem"
    name: str = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Positional arguments under these names, keyword arguments under their own."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def plain_argument(node: fx.Node, key: str, position: int, default: int) -> Any:
    if key in node.kwargs:
        return node.kwargs[key]
    return node.args[position] if len(node.args) > position else default


def count_users(captured: Captured) -> dict[str, int]:
    """How many nodes read each node's tensor."""
    counts: dict[str, int] = {}
    for node in captured.nodes:
        for source in node.all_input_nodes:
            counts[source.name] = counts.get(source.name, 0) + 1
    return counts
