"""Which channels belong together: labels on the axes of every tensor and parameter, carried through the graph.

Each output channel of a layer starts with a label of its own. An operation says which labels must be equal (the two
sides of a sum, a layer's input and its weight's second axis) and which may never go (what meets an axis that is no
channel axis, what a softmax runs over, the model's output). Labels that are equal form a *channel*: entries of
parameters and tensors that can only go together. Channels that look the same from every tensor form a *group*.

An axis is a product of parts, because attention folds heads into channels and windows into the batch; one part of an
axis can carry labels. When a labelled axis is split, the part that the labels stay with is the one that the graph later
treats as a batch of matrices (heads), never the one that it contracts or picks from (Michel et al. 2019 prune heads);
where it does neither (a channel shuffle), the longer one.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..spaces.anatomy import Op
from .labelling import Axis, Labelling, Labels, Part

_CONTRACTED, _PICKED, _HEADS = "contracted", "picked", "heads"


def label(ops: Sequence[Op], output: str, shapes: dict[str, tuple[int, ...]]) -> Labelling:
    """Carry labels through the operations. ``shapes`` are those of the model's state, by name.

    Goes through the graph twice: what each part of a split axis is used for is known only after the first time.
    """
    found = _label(ops, output, Labelling(shapes))
    return _label(ops, output, Labelling(shapes, roles=found.roles)) if found.splits else found


def _label(ops: Sequence[Op], output: str, labelling: Labelling) -> Labelling:
    for op in ops:
        labelling.now = f"{op.name} ({op.kind}) needs all of its channels"
        axes = _RULES.get(op.kind, _elementwise)(labelling, op, [labelling.tensors[name] for name in op.inputs])
        labelling.tensors[op.name] = axes
    labelling.now = "its channels are the model's output"
    labelling.fix(labelling.tensors[output])
    return labelling


# Rules: the axes of an operation's tensor from those of its inputs


def _plain_axes(op: Op) -> tuple[Axis, ...]:
    return tuple(
        (Part(1, batch=True), Part(size)) if axis == op.batch_axis else (Part(size),)
        for axis, size in enumerate(op.shape)
    )


def _input(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    return _plain_axes(op)


def _param(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    name = op.params["value"]
    return tuple(
        (Part(size, labelling.parameter(name, axis)),) if size > 1 else (Part(size),)
        for axis, size in enumerate(op.shape)
    )


def _conv(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    [source] = inputs
    given, made = labelling.flat(source[1]), labelling.parameter(op.params["weight"], 0)
    groups: int = op.attrs["groups"]
    if groups == 1:
        labelling.equal(given, labelling.parameter(op.params["weight"], 1))
    elif given is None:
        labelling.equal(None, made)
    else:  # it loses whole groups, inputs and outputs together
        ins, outs = given.reshape(groups, -1), made.reshape(groups, -1)
        for columns in (ins, outs):
            for column in range(columns.shape[1]):
                labelling.equal(ins[:, 0], columns[:, column])
    for role in ("bias", "norm_weight", "norm_bias", "norm_running_mean", "norm_running_var"):
        if role in op.params:
            labelling.equal(made, labelling.parameter(op.params[role], 0))
    return (source[0], (Part(op.shape[1], made),), *((Part(size),) for size in op.shape[2:]))


def _linear(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    [source] = inputs
    made = labelling.parameter(op.params["weight"], 0)
    labelling.equal(labelling.flat(source[-1]), labelling.parameter(op.params["weight"], 1))
    if "bias" in op.params:
        labelling.equal(made, labelling.parameter(op.params["bias"], 0))
    return (*source[:-1], (Part(op.shape[-1], made),))


def _norm(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    [source] = inputs
    given = labelling.flat(source[op.channel_axis])
    for name in op.params.values():
        labelling.equal(given, labelling.parameter(name, 0))
    return source


def _group_norm(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """It loses whole groups: what is left of the others would have other statistics."""
    [source] = inputs
    given, groups = labelling.flat(source[1]), op.attrs["groups"]
    if given is not None and 1 < groups < len(given):
        _tied(labelling, given.reshape(groups, -1))
    return _norm(labelling, op, inputs)


def _prelu(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    return inputs[0] if op.attrs["shared"] else _norm(labelling, op, inputs)


def _pixel_shuffle(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """All pixels that a channel is made of go together."""
    [source] = inputs
    given = labelling.flat(source[1])
    made: Axis = (Part(op.shape[1]),)
    if given is not None:
        made = (Part(op.shape[1], _tied(labelling, given.reshape(op.shape[1], -1))),)
    labelling.fix(source[2:])
    return (source[0], made, *((Part(size),) for size in op.shape[2:]))


def _spatial(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """Pooling and resizing: the axes behind the channels change and can lose nothing."""
    [source] = inputs
    labelling.fix(source[2:])
    return (*source[:2], *((Part(size),) for size in op.shape[2:]))


def _mean(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    [source] = inputs
    axes, keepdim = op.attrs["axes"], op.attrs["keepdim"]
    labelling.fix(source[axis] for axis in axes)
    kept = [(Part(1),) if axis in axes else parts for axis, parts in enumerate(source) if keepdim or axis not in axes]
    return tuple(kept)


def _elementwise(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """Broadcast from the right: axes of the same size lose the same channels."""
    return _aligned(labelling, inputs, len(op.shape))


def _aligned(labelling: Labelling, inputs: list[tuple[Axis, ...]], rank: int) -> tuple[Axis, ...]:
    made: list[Axis] = []
    for axis in range(-rank, 0):
        present = [parts[axis] for parts in inputs if len(parts) >= -axis]
        wide = [parts for parts in present if _size(parts) > 1 or _has_batch(parts)] or present[:1]
        for other in wide[1:]:
            _tie(labelling, wide[0], other)
        made.append(wide[0])
    return tuple(made)


def _tie(labelling: Labelling, one: Axis, other: Axis) -> None:
    if _size(one) != _size(other):  # (batch, n) beside a constant's n
        labelling.fix([one, other])
        return
    labelling.equal(labelling.flat(one), labelling.flat(other))


def _softmax(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    labelling.fix([inputs[0][op.attrs["axis"]]])
    return inputs[0]


def _matmul(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    one, other = inputs
    for axes in inputs:
        for axis in axes[-2:]:
            labelling.mark(axis, _CONTRACTED)
        for axis in axes[:-2]:
            labelling.mark(axis, _HEADS)
    _tie(labelling, one[-1], other[-2])
    return (*_aligned(labelling, [one[:-2], other[:-2]], len(op.shape) - 2), one[-2], other[-1])


def _attention(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    query, key, value = inputs[:3]
    for axes in inputs[:3]:
        for axis in axes[-2:]:
            labelling.mark(axis, _CONTRACTED)
        for axis in axes[:-2]:
            labelling.mark(axis, _HEADS)
    _tie(labelling, query[-1], key[-1])
    _tie(labelling, key[-2], value[-2])
    labelling.fix([key[-2]])  # the softmax runs over them
    for mask in inputs[3:]:
        labelling.fix(mask[-2:])
    rank = len(op.shape) - 2
    return (*_aligned(labelling, [axes[:-2] for axes in inputs], rank), query[-2], value[-1])


def _cat(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    axis: int = op.attrs["axis"]
    found = [labelling.flat(axes[axis]) for axes in inputs]
    joined: Axis = (Part(op.shape[axis]),)
    if axis == op.batch_axis:
        labelling.fix(axes[axis] for axes in inputs)
        joined = (Part(1, batch=True), *joined)
    elif any(labels is not None for labels in found):
        pieces = [
            labels if labels is not None else np.zeros(_size(axes[axis]), dtype=np.int64)
            for labels, axes in zip(found, inputs, strict=True)
        ]
        joined = (Part(op.shape[axis], np.concatenate(pieces)),)
    others = _aligned(labelling, [(*axes[:axis], (Part(1),), *axes[axis + 1 :]) for axes in inputs], len(op.shape))
    return (*others[:axis], joined, *others[axis + 1 :])


def _slice(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    [source] = inputs
    axis, start, step = op.attrs["axis"], op.attrs["start"], op.attrs["step"]
    labels = labelling.flat(source[axis])
    made: Axis = (Part(op.shape[axis]),)
    if axis == op.batch_axis or step != 1:
        labelling.fix([source[axis]])
        made = (Part(1, batch=True), *made) if axis == op.batch_axis else made
    elif labels is not None:
        made = (Part(op.shape[axis], labels[start : start + op.shape[axis]]),)
        labelling.before[op.name] = labels[:start]
    return (*source[:axis], made, *source[axis + 1 :])


def _select(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    [source] = inputs
    axis: int = op.attrs["axis"]
    labelling.mark(source[axis], _PICKED)
    labelling.fix([source[axis]])
    return (*source[:axis], *source[axis + 1 :])


def _permute(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    return tuple(inputs[0][axis] for axis in op.attrs["order"])


def _expand(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    padded = ((),) * (len(op.shape) - len(inputs[0])) + inputs[0]
    return tuple(
        parts if parts and _size(parts) == size and axis != op.batch_axis else plain
        for axis, (parts, size, plain) in enumerate(zip(padded, op.shape, _plain_axes(op), strict=True))
    )


def _roll(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    labelling.fix(inputs[0][axis] for axis in op.attrs["axes"])
    return inputs[0]


def _pad(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    amounts = zip(inputs[0], op.shape, op.attrs["before"], op.attrs["after"], strict=True)
    made: list[Axis] = []
    for parts, size, before, after in amounts:
        if before or after:
            labelling.fix([parts])
        made.append((Part(size),) if before or after else parts)
    return tuple(made)


def _reshape(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """Hand the parts of the old axes out to the new ones, splitting a part where an axis ends within it."""
    waiting = [part for axis in inputs[0] for part in axis if part.size > 1 or part.batch]
    made: list[Axis] = []
    count = 0
    for number, size in enumerate(op.shape):
        taken: list[Part] = []
        left = size
        while left > 1 or (number == op.batch_axis and not any(p.batch for p in taken)):
            if not waiting:
                return _lost_track(labelling, op, inputs)
            part = waiting.pop(0)
            if part.batch and number != op.batch_axis:
                return _lost_track(labelling, op, inputs)
            if left % part.size:
                if part.size % left:
                    return _lost_track(labelling, op, inputs)
                part, rest = _split(labelling, part, left, f"{op.name}:{count}")
                waiting.insert(0, rest)
                count += 1
            taken.append(part)
            left //= part.size
        made.append(tuple(taken) or (Part(1),))
    return tuple(made)


def _lost_track(labelling: Labelling, op: Op, inputs: list[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    labelling.fix(inputs[0])
    return _plain_axes(op)


def _split(labelling: Labelling, part: Part, size: int, key: str) -> tuple[Part, Part]:
    """A part as a product of two, of which the labels stay with one (see the module's docstring)."""
    keys, sizes = (f"{key}a", f"{key}b"), (size, part.size // size)
    if part.labels is None:
        return Part(sizes[0], key=keys[0]), Part(sizes[1], key=keys[1])
    labelling.splits += 1
    table = part.labels.reshape(sizes)
    roles = [labelling.roles.get(k, set()) for k in keys]
    free = [i for i in (0, 1) if _PICKED not in roles[i]]
    heads = [i for i in free if _HEADS in roles[i] and _CONTRACTED not in roles[i]]
    chosen = free[0] if len(free) == 1 else heads[0] if heads else None
    if chosen is None and not any(roles):
        chosen = int(sizes[1] >= sizes[0])
    if chosen is None:
        labelling.equal(None, part.labels)
        return Part(sizes[0], key=keys[0]), Part(sizes[1], key=keys[1])
    lines = table if chosen == 0 else table.T  # (chosen, other): what shares an index of the chosen part is one
    labels: list[Labels | None] = [None, None]
    labels[chosen] = _tied(labelling, lines)
    return Part(sizes[0], labels[0], key=keys[0]), Part(sizes[1], labels[1], key=keys[1])


def _tied(labelling: Labelling, rows: Labels) -> Labels:
    """Of a table of labels, those of its first column: all that share a row are made one."""
    for column in range(1, rows.shape[1]):
        labelling.equal(rows[:, 0], rows[:, column])
    return np.ascontiguousarray(rows[:, 0])


def _size(axis: Axis) -> int:
    return math.prod(part.size for part in axis)


def _has_batch(axis: Axis) -> bool:
    return any(part.batch for part in axis)


_RULES: dict[str, Callable[[Labelling, Op, list[tuple[Axis, ...]]], tuple[Axis, ...]]] = {
    "input": _input,
    "param": _param,
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _norm,
    "layer_norm": _norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    "pixel_shuffle": _pixel_shuffle,
    "max_pool": _spatial,
    "avg_pool": _spatial,
    "global_pool": _spatial,
    "resize": _spatial,
    "mean": _mean,
    "sum": _mean,
    "amax": _mean,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "matmul": _matmul,
    "attention": _attention,
    "cat": _cat,
    "slice": _slice,
    "select": _select,
    "permute": _permute,
    "expand": _expand,
    "roll": _roll,
    "pad": _pad,
    "reshape": _reshape,
    "flatten": _reshape,
}
