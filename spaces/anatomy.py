"""What can be compressed in a model: a small graph of operations, with groups, layers and blocks. Data only."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

WEIGHTED = frozenset({"conv", "linear"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation of the model's graph; its name is also the name of the tensor that it makes.

    ``shape`` is that of one example: the axis ``batch_axis`` counts what one example has along it (nearly always 1;
    the windows of an image where they are folded into the batch), and at run time it is that times the batch.
    ``batch_axis`` None marks a constant. ``params`` names the entries of the model's state by their role
    (``weight``, ``bias``, ``norm_mean``, …). ``lost`` says for each axis how many entries disappear when a group loses
    one channel; ``lost_before`` the same for what lies before the start of a slice. A batch norm right after a
    convolution belongs to it (``norm``); it does not exist at inference.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    batch_axis: int | None = 0
    module: str | None = None
    norm: str | None = None
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lost: tuple[Mapping[str, int], ...] = ()
    lost_before: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def channel_axis(self) -> int:
        """Where a layer's output channels stand: the last axis of a linear layer, the one after the batch else."""
        return len(self.shape) - 1 if self.kind in {"linear", "layer_norm"} else min(1, len(self.shape) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The part of one entry of the model's state that belongs to a group: its channel ``c`` owns the entries
    ``indices[c]`` along ``axis`` of ``parameter``."""

    parameter: str
    axis: int
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Coupled channels that are pruned together with one ratio; named after the root layer.

    One of its ``channels`` may stand for several of the root layer's (``unit``): the rows of one attention head, the
    channels of one group of a grouped convolution. ``step`` counts in the same unit.
    """

    name: str
    channels: int
    step: int
    layers: tuple[str, ...]
    """Layers that lose output channels with this group."""
    macs: int
    unit: int = 1
    kind: str = "channels"
    """``channels``, ``heads`` or ``conv groups``."""
    slices: tuple[Slice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer that can be quantised: a convolution or a linear layer."""

    name: str
    kind: str
    op: str
    macs: int
    params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A residual block that an identity can replace: ``ops`` vanish, ``output`` becomes ``source``."""

    name: str
    ops: tuple[str, ...]
    source: str
    output: str
    layers: tuple[str, ...]
    macs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something that was looked at and is not offered, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """The whole model as data; ``digest`` names the model and its weights."""

    digest: str
    ops: tuple[Op, ...]
    output: str
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    left_out: tuple[LeftOut, ...]
    params: int
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    """State entries that the model itself knows under another name; those that begin with ``constant.`` are not the
    model's own but were computed from it."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference of one example."""
        return sum(layer.macs for layer in self.layers)

    @property
    def coverage(self) -> float:
        """Share of the prunable MACs that some group reaches: of all layers but those that make the model's output,
        weighed by their MACs, those that lose output channels with a group."""
        inner = [layer for layer in self.layers if layer.name not in self._last_layers()]
        covered = {name for group in self.groups for name in group.layers}
        total = sum(layer.macs for layer in inner)
        return sum(layer.macs for layer in inner if layer.name in covered) / total if total else 1.0

    def _last_layers(self) -> set[str]:
        ops, name = {op.name: op for op in self.ops}, self.output
        while ops[name].kind not in WEIGHTED and len(ops[name].inputs) == 1:
            name = ops[name].inputs[0]
        module = ops[name].module
        return {module} if module is not None and ops[name].kind in WEIGHTED else set()

    def group(self, name: str) -> Group:
        return {g.name: g for g in self.groups}[name]


def kept_channels(group: Group, ratio: float) -> int:
    """Channels that stay: a multiple of the step nearest to the ratio, never below one step.

    A group whose width is not a multiple of its step keeps its full width at ratio 0.
    """
    if ratio <= 0:
        return group.channels
    steps = round(group.channels * (1 - ratio) / group.step)
    return min(group.channels, max(1, steps) * group.step)


def op_macs(kind: str, attrs: Mapping[str, Any], in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one convolution or linear layer for one example; 0 for anything else."""
    if kind == "conv":
        kernel = math.prod(attrs["kernel"])
        return math.prod(out_shape) * (in_shape[1] // attrs["groups"]) * kernel
    if kind == "linear":
        return in_shape[-1] * math.prod(out_shape)
    return 0


def anatomy_to_dict(anatomy: Anatomy, bit_choices: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """The keys of ``nightpress inspect --json``; ``size_bytes`` is that of the fp32 parameters."""
    return {
        "model": {"params": anatomy.params, "macs": anatomy.macs, "size_bytes": 4 * anatomy.params},
        "digest": anatomy.digest,
        "coverage": anatomy.coverage,
        "groups": [
            {"name": g.name, "channels": g.channels, "step": g.step, "unit": g.unit, "kind": g.kind,
             "layers": g.layers, "macs": g.macs}
            for g in anatomy.groups
        ],
        "layers": [{**asdict(layer), "bits": [list(pair) for pair in bit_choices]} for layer in anatomy.layers],
        "blocks": [{"name": b.name, "layers": b.layers, "macs": b.macs, "source": b.source} for b in anatomy.blocks],
        "left_out": [asdict(item) for item in anatomy.left_out],
    }  # fmt: skip


def anatomy_to_json(anatomy: Anatomy) -> str:
    """The whole anatomy, so that a model need not be traced again."""
    return json.dumps(asdict(anatomy), separators=(",", ":"))


def anatomy_from_json(text: str) -> Anatomy:
    """The inverse of :func:`anatomy_to_json`. Raises ValueError, KeyError or TypeError when the text is another's."""
    data: dict[str, Any] = json.loads(text)
    return Anatomy(
        digest=data["digest"],
        ops=tuple(_op(item) for item in data["ops"]),
        output=data["output"],
        groups=tuple(_group(item) for item in data["groups"]),
        layers=tuple(Layer(**item) for item in data["layers"]),
        blocks=tuple(Block(**_tuples(item, ("ops", "layers"))) for item in data["blocks"]),
        left_out=tuple(LeftOut(**item) for item in data["left_out"]),
        params=data["params"],
        renamed=data["renamed"],
    )


def _op(item: Mapping[str, Any]) -> Op:
    attrs = {key: _tuple(value) for key, value in item["attrs"].items()}
    fields: dict[str, Any] = {**_tuples(item, ("inputs", "shape", "lost")), "attrs": attrs}
    return Op(**fields)


def _group(item: Mapping[str, Any]) -> Group:
    slices = tuple(
        Slice(parameter=s["parameter"], axis=s["axis"], indices=tuple(tuple(i) for i in s["indices"]))
        for s in item["slices"]
    )
    fields: dict[str, Any] = {**_tuples(item, ("layers",)), "slices": slices}
    return Group(**fields)


def _tuples(item: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: tuple(value) if key in keys else value for key, value in item.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
