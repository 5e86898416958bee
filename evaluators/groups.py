"""From labels to groups: channels that look the same from every tensor and parameter, with what they own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..spaces.anatomy import WEIGHTED, Group, LeftOut, Op, Slice
from .labelling import FIXED, Labelling, Labels
from .labels import label

# Where labels occur: ("parameter", entry, axis), ("tensor", operation, axis) or ("before", operation, 0).
_Place = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class _Found:
    """A group in the making: its channels' numbers in the order of the root layer, and how often each of them occurs
    at every place."""

    channels: tuple[int, ...]
    times: dict[_Place, int]


def find_groups(
    ops: Sequence[Op], output: str, shapes: dict[str, tuple[int, ...]], step_of: Callable[[int], int],
    macs_of: Callable[[Op], int],
) -> tuple[list[Group], list[Op], list[LeftOut]]:  # fmt: skip
    """Groups, the operations with what each axis loses by them, and layers that stay whole with the reason.

    ``shapes`` are those of the model's state; ``step_of`` gives the channel step that the target runs well on for a
    width; a group narrower than two steps is left out.
    """
    labelling = label(ops, output, shapes)
    places = _places(labelling)
    number, reason = labelling.channels()
    numbered = {place: number(labels) for place, labels in places.items()}
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    lost: dict[str, dict[_Place, int]] = {}
    for found in _by_signature(numbered):
        group = _group(found, ops, numbered, step_of, macs_of, {g.name for g in groups})
        if group is None:
            continue
        if group.channels < 2 * group.step:
            reason_ = f"{group.channels} {group.kind} are fewer than two steps of {group.step}"
            left_out.append(LeftOut(name=group.name, reason=reason_))
            continue
        groups.append(group)
        lost[group.name] = found.times
    order = {op.module: i for i, op in enumerate(ops) if op.module}
    groups.sort(key=lambda g: order[g.name.partition("#")[0]])
    left_out += _whole(ops, groups, left_out, labelling, reason)
    return groups, [_with_losses(op, lost) for op in ops], left_out


def _places(labelling: Labelling) -> dict[_Place, Labels]:
    places: dict[_Place, Labels] = {
        ("parameter", name, axis): labels for (name, axis), labels in labelling.parameters.items()
    }
    for name, axes in labelling.tensors.items():
        labelling.now = f"{name} folds two kinds of channels into one axis"
        for axis, parts in enumerate(axes):
            labels = labelling.flat(parts)
            if labels is not None:
                places["tensor", name, axis] = labels
    places |= {("before", name, 0): labels for name, labels in labelling.before.items() if len(labels)}
    return places


def _by_signature(numbered: dict[_Place, Labels]) -> list[_Found]:
    """Channels that occur equally often at the same places."""
    signatures: dict[int, list[tuple[_Place, int]]] = {}
    for place, numbers in numbered.items():
        for channel, times in zip(*np.unique(numbers, return_counts=True), strict=True):
            if channel != FIXED:
                signatures.setdefault(int(channel), []).append((place, int(times)))
    alike: dict[tuple[tuple[_Place, int], ...], list[int]] = {}
    for channel, occurrences in signatures.items():
        alike.setdefault(tuple(occurrences), []).append(channel)
    return [_Found(tuple(channels), dict(times)) for times, channels in alike.items()]


def _group(
    found: _Found, ops: Sequence[Op], numbered: dict[_Place, Labels], step_of: Callable[[int], int],
    macs_of: Callable[[Op], int], taken: set[str],
) -> Group | None:  # fmt: skip
    """The group named after its first layer; None for channels that no layer makes."""
    makers = [op for op in ops if op.kind in WEIGHTED and ("parameter", op.params["weight"], 0) in found.times]
    if not makers:
        return None
    root = makers[0]
    place = ("parameter", root.params["weight"], 0)
    unit = found.times[place]
    rows = numbered[place]
    mine = set(found.channels)
    channels = [int(n) for n in dict.fromkeys(rows.tolist()) if n in mine]  # in the order of the root's rows
    kind = _kind(found, ops)
    step = 1 if kind == "heads" else -(-step_of(unit * len(channels)) // unit)
    layers = tuple(dict.fromkeys(op.module for op in makers if op.module))
    name = root.module or root.name
    names = [name, *(f"{name}#{i}" for i in range(1, len(taken) + 2))]
    return Group(
        name=next(n for n in names if n not in taken),
        channels=len(channels),
        step=step,
        layers=layers,
        macs=sum(macs_of(op) for op in makers),
        unit=unit,
        kind=kind,
        slices=tuple(
            Slice(parameter=name, axis=axis, indices=_indices(numbered[what, name, axis], channels))
            for what, name, axis in found.times
            if what == "parameter"
        ),
    )


def _kind(found: _Found, ops: Sequence[Op]) -> str:
    heads = any(
        ("tensor", op.name, axis) in found.times
        for op in ops if op.kind in {"matmul", "attention"} for axis in range(len(op.shape) - 2)
    )  # fmt: skip
    grouped = any(
        1 < op.attrs["groups"] < op.shape[1] and ("tensor", op.name, 1) in found.times
        for op in ops if op.kind == "conv"
    )  # fmt: skip
    return "heads" if heads else "conv groups" if grouped else "channels"


def _indices(numbers: Labels, channels: list[int]) -> tuple[tuple[int, ...], ...]:
    positions: dict[int, list[int]] = {channel: [] for channel in channels}
    for index, channel in enumerate(numbers.tolist()):
        if channel in positions:
            positions[channel].append(index)
    return tuple(tuple(positions[channel]) for channel in channels)


def _with_losses(op: Op, lost: dict[str, dict[_Place, int]]) -> Op:
    axes = tuple(
        {group: times["tensor", op.name, axis] for group, times in lost.items() if ("tensor", op.name, axis) in times}
        for axis in range(len(op.shape))
    )
    before = {group: times["before", op.name, 0] for group, times in lost.items() if ("before", op.name, 0) in times}
    return replace(op, lost=axes if any(axes) else (), lost_before=before)


def _whole(
    ops: Sequence[Op], groups: Sequence[Group], named: Sequence[LeftOut], labelling: Labelling,
    reason: Callable[[Labels], str],
) -> list[LeftOut]:  # fmt: skip
    """Layers that lose no output channels, with what keeps them."""
    done = {layer for group in groups for layer in group.layers} | {item.name for item in named}
    found: dict[str, str] = {}
    for op in ops:
        if op.kind in WEIGHTED and op.module and op.module not in done:
            why = reason(labelling.parameter(op.params["weight"], 0))
            if why:
                found[op.module] = why
    return [LeftOut(name=name, reason=why) for name, why in found.items()]
