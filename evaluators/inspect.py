"""The anatomy of a model: prunable groups (each verified by a dry run), layers, residual blocks.

The model is exported once (:mod:`.capture`), its channels are followed through the graph (:mod:`.labels`), and the
module that is rebuilt from the anatomy must answer as the model does.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ..spaces.anatomy import WEIGHTED, Anatomy, Layer, LeftOut, Op, anatomy_from_json, anatomy_to_json, op_macs
from ..spaces.errors import InputError
from ..spaces.files import cache_folder, write_whole
from ..spaces.plan import plan
from ..spaces.policy import Policy
from . import dryrun
from .blocks import find_blocks
from .capture import CONSTANT, Captured, capture
from .groups import find_groups
from .lower import has_rule, lower
from .rebuild import rebuild
from .task import Task, device_of, evaluating, picked, task_digest

log = logging.getLogger("nightpress")
_CODE = (
    "capture", "nodes", "lowering", "lower_convs", "lower_shapes", "lower", "labelling", "labels", "groups",
    "blocks", "inspect", "dryrun",
)  # fmt: skip
REPRODUCED = 1e-3
"""Largest difference between the outputs of the model and of the module rebuilt from its anatomy, relative to the
largest output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The tensors behind an anatomy: its state entries by name, and which of them the user keeps frozen."""

    state: Mapping[str, Tensor]
    frozen: frozenset[str]


def inspect(
    task: Task, *, step_of: Callable[[int], int] = lambda channels: 4, cache: bool = True, verify: bool = True
) -> tuple[Anatomy, Network]:
    """The anatomy of a task's model and the tensors behind it.

    ``step_of`` gives the channel step that the target runs well on for a width; a group narrower than two steps is left
    out. A model that was inspected before with the same steps is read from the user's cache.
    ``verify`` False leaves the dry run of the groups out, for callers that apply them anyway; nothing is kept then.
    Raises InputError for a model that cannot be exported.
    """
    digest = task_digest(task.model)
    path = _cache_path(digest, task, step_of) if cache else None
    known = _cached(path, digest) if path is not None else None
    if known is not None:
        network = network_of(task, known)
        if _difference(task, known, network) <= REPRODUCED:
            return known, network
    if verify:
        dryrun.start()
    captured = capture(task.model, task.example_input, task.output, has_rule)
    anatomy, network = _inspect(task, digest, captured, step_of)
    if not verify:
        return anatomy, network
    anatomy = _verified(anatomy, {name: tuple(value.shape) for name, value in network.state.items()})
    if path is not None:
        _keep(path, anatomy)
    return anatomy, network


def network_of(task: Task, anatomy: Anatomy) -> Network:
    """The tensors behind an anatomy, from the task's model; nothing is copied."""
    own = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    names = {entry: anatomy.renamed.get(entry, entry) for op in anatomy.ops for entry in op.params.values()}
    if all(name in own for name in names.values()):
        state = {entry: own[name].detach().cpu() for entry, name in names.items()}
        return Network(state=state, frozen=frozenset(e for e, n in names.items() if not own[n].requires_grad))
    captured = capture(task.model, task.example_input, task.output, has_rule)
    lower(captured)
    return _network(captured)


def _inspect(task: Task, digest: str, captured: Captured, step_of: Callable[[int], int]) -> tuple[Anatomy, Network]:
    ops, output = lower(captured)
    by_name = {op.name: op for op in ops}

    def macs_of(op: Op) -> int:
        return op_macs(op.kind, op.attrs, by_name[op.inputs[0]].shape, op.shape) if op.kind in WEIGHTED else 0

    network = _network(captured)
    shapes = {name: tuple(value.shape) for name, value in network.state.items()}
    used = {entry for op in ops for entry in op.params.values()}
    groups, ops, left_out = find_groups(ops, output, shapes, step_of, macs_of)
    anatomy = Anatomy(
        digest=digest,
        ops=tuple(ops),
        output=output,
        groups=tuple(groups),
        layers=_layers(ops, shapes, macs_of),
        blocks=tuple(find_blocks(ops, output, macs_of)),
        left_out=tuple(left_out),
        params=sum(p.numel() for p in task.model.parameters()),
        renamed={entry: name for entry, name in captured.renamed.items() if entry in used}
        | {entry: entry for entry in used if entry.startswith(CONSTANT)},
    )
    difference = _difference(task, anatomy, network)
    if not difference <= REPRODUCED:
        raise InputError(
            f"The model {type(task.model).__name__} does something that its graph does not show: rebuilt from the "
            f"graph, its output for the example input differs by {difference:.1%}."
        )
    return anatomy, network


def _verified(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    """Without the groups that fail their dry run; the reason stands in what is left out."""
    failed = dryrun.verify_groups(anatomy, shapes)
    if not failed:
        return anatomy
    return without_groups(anatomy, [LeftOut(name=name, reason=reason) for name, reason in failed.items()])


def without_groups(anatomy: Anatomy, left_out: Sequence[LeftOut]) -> Anatomy:
    """The anatomy with these groups at their full width."""
    gone = {item.name for item in left_out}

    def kept(lost: Mapping[str, int]) -> dict[str, int]:
        return {group: times for group, times in lost.items() if group not in gone}

    return replace(
        anatomy,
        groups=tuple(g for g in anatomy.groups if g.name not in gone),
        ops=tuple(replace(op, lost=tuple(map(kept, op.lost)), lost_before=kept(op.lost_before)) for op in anatomy.ops),
        left_out=(*anatomy.left_out, *left_out),
    )


def _network(captured: Captured) -> Network:
    def frozen(entry: str) -> bool:
        name = captured.renamed.get(entry, entry)
        return name in captured.frozen or name.startswith(CONSTANT)

    return Network(state=captured.state, frozen=frozenset(filter(frozen, captured.state)))


def _difference(task: Task, anatomy: Anatomy, network: Network) -> float:
    """How far the rebuilt module's output is from the model's, relative to the largest output: for the example and its
    mirror image, since what mixes examples shows with several alone."""
    examples = torch.cat([task.example_input, task.example_input.flip(-1)])
    module = rebuild(plan(anatomy, Policy(model=anatomy.digest)), network.state, network.frozen)
    with evaluating(task.model), torch.no_grad():
        expected = picked(task, task.model)(examples.to(device_of(task.model))).float().cpu()
        found = module(examples.cpu())
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def _layers(
    ops: Sequence[Op], shapes: Mapping[str, tuple[int, ...]], macs_of: Callable[[Op], int]
) -> tuple[Layer, ...]:
    """Layers in order; one that the model uses several times counts its MACs each time."""
    found: dict[str, Layer] = {}
    for op in ops:
        if op.kind not in WEIGHTED or op.module is None:
            continue
        if op.module in found:
            found[op.module] = replace(found[op.module], macs=found[op.module].macs + macs_of(op))
            continue
        kind = op.kind
        if kind == "conv" and op.attrs["groups"] > 1:
            kind = "depthwise" if op.attrs["groups"] == op.shape[1] else "grouped"
        params = sum(_count(shapes[op.params[role]]) for role in ("weight", "bias") if role in op.params)
        found[op.module] = Layer(name=op.module, kind=kind, op=op.name, macs=macs_of(op), params=params)
    return tuple(found.values())


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


# The cache


def _cache_path(digest: str, task: Task, step_of: Callable[[int], int]) -> Path:
    """Named after all that an anatomy depends on: model, example, steps, and the code that finds it."""
    folder = cache_folder()
    parts = [digest, tuple(task.example_input.shape), [step_of(width) for width in (4, 8, 16, 32, 64, 128, 256, 512)]]
    code = hashlib.sha256()
    here = Path(__file__).parent
    for name in _CODE:
        code.update((here / f"{name}.py").read_bytes())
    parts.append(astuple(dryrun.caps()))
    code.update((here.parent / "spaces" / "anatomy.py").read_bytes())
    key = hashlib.sha256(json.dumps([*parts, version("torch"), code.hexdigest()]).encode()).hexdigest()[:24]
    return folder / f"anatomy-{key}.json"


def _cached(path: Path, digest: str) -> Anatomy | None:
    try:
        anatomy = anatomy_from_json(path.read_text())
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and will be made anew: %s", path, error)
        return None
    return anatomy if anatomy.digest == digest else None


def _keep(path: Path, anatomy: Anatomy) -> None:
    try:
        write_whole(path, lambda partial: partial.write_text(anatomy_to_json(anatomy)))
    except OSError as error:
        log.warning("%s cannot be kept: %s", path, error)
