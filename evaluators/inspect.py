"""The anatomy of a model: prunable groups (each verified by a dry run), layers, residual blocks.

Dependency groups come from torch-pruning (Fang et al. 2023, "DepGraph"); how many channels of every
tensor follow a group is observed by pruning it once and looking at the shapes, not derived.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from torch import fx, nn

from ..spaces.anatomy import Anatomy, Block, Group, Layer, LeftOut, Op, op_macs
from ..spaces.errors import InputError
from .lower import lower, note_shapes, shape_of, trace
from .task import Task, task_digest

PRUNABLE = (nn.Conv2d, nn.Linear)


def inspect(task: Task, *, step_of: Callable[[int], int] = lambda channels: 4) -> tuple[Anatomy, fx.GraphModule]:
    """The anatomy of a task's model and its traced graph.

    ``step_of`` gives the channel step that the target runs well on for a width; a group narrower than
    two steps is left out. Raises InputError for a model that cannot be traced or exported.
    """
    traced = trace(copy.deepcopy(task.model).cpu(), task.example_input)
    ops, output = lower(traced)
    groups, ops, left_out = _groups(traced, ops, output, task.example_input, step_of)
    layers = tuple(_layer(op, ops, traced) for op in ops if op.kind in {"conv", "linear"})
    return (
        Anatomy(
            digest=task_digest(task.model),
            ops=tuple(ops),
            output=output,
            groups=tuple(groups),
            layers=layers,
            blocks=tuple(_blocks(traced, ops, output)),
            left_out=tuple(left_out),
            params=sum(p.numel() for p in task.model.parameters()),
        ),
        traced,
    )


def dependency_graph(traced: nn.Module, example_input: torch.Tensor) -> Any:
    """torch-pruning's graph of a module. Not picklable; rebuilt for every copy.

    Makes every parameter of the module require gradients.
    """
    for parameter in traced.parameters():
        parameter.requires_grad_(True)  # the graph is read from autograd: frozen layers would be invisible
    return tp.DependencyGraph().build_dependency(traced, example_inputs=example_input, verbose=False)


def prune_group(graph: Any, root: nn.Module, indices: list[int]) -> None:
    """Remove these output channels of the root layer, and all that depends on them."""
    prune = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else tp.prune_conv_out_channels
    group = graph.get_pruning_group(root, prune, idxs=indices)
    if not graph.check_pruning_group(group):
        raise ValueError("pruning it would remove a whole layer")
    group.prune()


def _groups(
    traced: fx.GraphModule, ops: list[Op], output: str, example: torch.Tensor, step_of: Callable[[int], int]
) -> tuple[list[Group], list[Op], list[LeftOut]]:
    copied = copy.deepcopy(traced)
    names = {module: name for name, module in copied.named_modules()}
    try:
        found = [
            [(names[dep.target.module], dep.pruning_fn) for dep, _ in group if dep.target.module in names]
            for group in dependency_graph(copied, example).get_all_groups(root_module_types=list(PRUNABLE))
        ]
    except Exception as error:  # noqa: BLE001  a library's bug on a model it cannot follow must not end the night
        reason = f"the dependency graph cannot be built ({type(error).__name__}: {error})"
        return [], ops, [LeftOut(name="all groups", reason=reason)]
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    dry_run = _DryRun(traced, ops, output, example)
    for members in found:
        root = members[0][0]
        width = _width(traced.get_submodule(root))
        step = step_of(width)
        if width < 2 * step:
            left_out.append(LeftOut(name=root, reason=f"{width} channels are fewer than two steps of {step}"))
            continue
        try:
            lost = dry_run.prune(root, min(step, width // 2))
        except Exception as error:  # noqa: BLE001  anything a model can raise when it is pruned
            left_out.append(LeftOut(name=root, reason=_reason(error)))
            dry_run = _DryRun(traced, ops, output, example)
            continue
        ops = [replace(op, channels_by_group=_with(op, root, lost.get(op.name, 0))) for op in ops]
        group_layers = tuple(
            op.module for op in ops if op.module and op.kind in {"conv", "linear"} and lost.get(op.name)
        )
        macs = sum(_op_macs(op, ops) for op in ops if op.module in group_layers)
        groups.append(Group(name=root, channels=width, step=step, layers=group_layers, macs=macs))
    return groups, ops, left_out


class _DryRun:
    """A copy of the model that is pruned group after group; each step shows what follows that group.

    One copy for all groups, because building the dependency graph costs far more than pruning. After a
    failure the copy is in an unknown state and the caller starts a fresh one.
    """

    def __init__(self, traced: fx.GraphModule, ops: list[Op], output: str, example: torch.Tensor) -> None:
        self._copy = copy.deepcopy(traced)
        self._ops = ops
        self._output = output
        self._example = example
        self._graph = dependency_graph(self._copy, example)
        self._shapes = {op.name: op.shape for op in ops}

    def prune(self, root: str, count: int) -> dict[str, int]:
        """Prune ``count`` channels; for each operation, how many of its channels went per pruned one.

        Raises ValueError when a shape changes in a way that is not a loss of channels.
        """
        prune_group(self._graph, self._copy.get_submodule(root), list(range(count)))
        note_shapes(self._copy, self._example)
        nodes = {node.name: shape_of(node) for node in self._copy.graph.nodes}
        after = {op.name: nodes[op.name] for op in self._ops}
        lost: dict[str, int] = {}
        for op in self._ops:
            old, new = self._shapes[op.name], after[op.name]
            if op.name == self._output and old != new:
                raise ValueError("it is the model's output")
            if old[1:] != new[1:] or (old[0] - new[0]) % count:
                raise ValueError(f"pruning {count} of its channels turns {op.name} from {old} into {new}")
            if old[0] != new[0]:
                lost[op.name] = (old[0] - new[0]) // count
            elif self._uneven(op, after):
                raise ValueError(f"{op.module} is a grouped convolution that would lose channels unevenly")
        self._shapes = after
        return lost

    def _uneven(self, op: Op, after: dict[str, tuple[int, ...]]) -> bool:
        if op.kind != "conv" or op.attrs["groups"] in (1, op.shape[0]):
            return False
        return after[op.inputs[0]][0] != self._shapes[op.inputs[0]][0]


def _with(op: Op, group: str, times: int) -> dict[str, int]:
    return {**op.channels_by_group, group: times} if times else dict(op.channels_by_group)


def _width(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else cast("nn.Conv2d", module).out_channels


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # what went wrong in the user's module, rather than where
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _op_macs(op: Op, ops: list[Op]) -> int:
    source = next(o for o in ops if o.name == op.inputs[0])
    return op_macs(op.kind, op.attrs, source.shape, op.shape)


def _layer(op: Op, ops: list[Op], traced: fx.GraphModule) -> Layer:
    if op.module is None:
        raise InputError(f"{op.name} has no module to hold its weights.")
    module = traced.get_submodule(op.module)
    kind = op.kind
    if kind == "conv" and op.attrs["groups"] > 1:
        kind = "depthwise" if op.attrs["groups"] == op.shape[0] else "grouped"
    params = sum(p.numel() for p in module.parameters())
    return Layer(name=op.module, kind=kind, op=op.name, macs=_op_macs(op, ops), params=params)


def _blocks(traced: fx.GraphModule, ops: list[Op], output: str) -> list[Block]:
    """Residual blocks: a module whose input and output have the same shape and the same coupled channels.

    Coupling is what a residual sum does, so a plain convolution of equal width is not a block.
    """
    by_name = {op.name: op for op in ops}
    found: list[Block] = []
    for path in _module_paths(traced):
        inside = [op for op in ops if _belongs(op, path, traced)]
        names = {op.name for op in inside}
        sources = {name for op in inside for name in op.inputs if name not in names}
        results = {op.name for op in inside if op.name == output or _used_outside(op.name, ops, names)}
        layers = tuple(op.module for op in inside if op.kind in {"conv", "linear"} and op.module)
        if len(sources) != 1 or len(results) != 1 or len(layers) < 2 or output in names:
            continue
        source, result = by_name[sources.pop()], by_name[results.pop()]
        coupled = source.channels_by_group == result.channels_by_group and source.channels_by_group
        taken = {name for block in found for name in block.layers}
        if source.shape == result.shape and coupled and taken.isdisjoint(layers):
            macs = sum(_op_macs(op, ops) for op in inside if op.kind in {"conv", "linear"})
            found.append(
                Block(name=path, ops=tuple(op.name for op in inside), source=source.name, output=result.name,
                      layers=layers, macs=macs)
            )  # fmt: skip
    return found


def _module_paths(traced: fx.GraphModule) -> list[str]:
    """Dotted names of modules that contain others, the innermost first: blocks do not overlap."""
    targets = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    paths = {".".join(t.split(".")[:i]) for t in targets for i in range(1, t.count(".") + 1)}
    return sorted(
        paths, key=lambda p: (-p.count("."), targets.index(next(t for t in targets if t.startswith(p + "."))))
    )


def _belongs(op: Op, path: str, traced: fx.GraphModule) -> bool:
    node = next(n for n in traced.graph.nodes if n.name == op.name)
    stack = node.meta.get("nn_module_stack") or {}
    return any(key == path or key.startswith(path + ".") for key in stack)


def _used_outside(name: str, ops: list[Op], names: set[str]) -> bool:
    return any(name in op.inputs for op in ops if op.name not in names)
