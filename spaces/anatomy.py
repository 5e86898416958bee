"""What can be compressed in a model: a small graph of operations, with groups, layers and blocks. Data only."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

WEIGHTED = frozenset({"conv", "linear"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation of the model's graph; its name is also the name of the tensor that it makes.

    ``shape`` is the output's shape without the batch axis. ``channels_by_group`` says how many
    channels (axis 0 of ``shape``) disappear when a group loses one channel. A batch norm right
    after a convolution belongs to it (``norm``); it does not exist at inference.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    module: str | None = None
    norm: str | None = None
    attrs: Mapping[str, Any]
    channels_by_group: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Coupled channels that are pruned together with one ratio; named after the root layer."""

    name: str
    channels: int
    step: int
    layers: tuple[str, ...]
    """Layers that lose output channels with this group."""
    macs: int


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

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference of one example."""
        return sum(layer.macs for layer in self.layers)

    def group(self, name: str) -> Group:
        return {g.name: g for g in self.groups}[name]

    def op_of_layer(self) -> dict[str, Op]:
        ops = {op.name: op for op in self.ops}
        return {layer.name: ops[layer.op] for layer in self.layers}


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
        return math.prod(out_shape) * (in_shape[0] // attrs["groups"]) * kernel
    if kind == "linear":
        return in_shape[-1] * math.prod(out_shape)
    return 0


def anatomy_to_dict(anatomy: Anatomy, bit_choices: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """The keys of ``nightpress inspect --json``; ``size_bytes`` is that of the fp32 parameters."""
    return {
        "model": {"params": anatomy.params, "macs": anatomy.macs, "size_bytes": 4 * anatomy.params},
        "digest": anatomy.digest,
        "groups": [asdict(group) for group in anatomy.groups],
        "layers": [{**asdict(layer), "bits": [list(pair) for pair in bit_choices]} for layer in anatomy.layers],
        "blocks": [{"name": b.name, "layers": b.layers, "macs": b.macs, "source": b.source} for b in anatomy.blocks],
        "left_out": [asdict(item) for item in anatomy.left_out],
    }
