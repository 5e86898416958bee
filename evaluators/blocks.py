"""Residual blocks, found in the graph: a sum that everything since one tensor flows into. An identity can replace it
where shapes agree, and its shortcut where that is a 1×1 projection."""

from collections.abc import Callable, Mapping, Sequence

from ..spaces.anatomy import WEIGHTED, Block, Op

_ACTIVATIONS = frozenset({"relu", "relu6"})


def find_blocks(ops: Sequence[Op], output: str, macs_of: Callable[[Op], int]) -> list[Block]:
    """Blocks that an identity or their own projection can replace, the smaller first where they would overlap, and an
    identity before a projection.

    A block ends with a sum whose dominator (the last tensor that all its paths come through) has the same shape and
    loses the same channels. An activation that alone reads the sum belongs to it. Where a summand is a 1×1 convolution
    of the dominator, the block is all else that leads to the sum, whose activation stays.
    """
    graph = _Graph(ops, output)
    sums = [op for op in ops if op.kind == "add" and len(op.inputs) == 2]
    chosen: list[Block] = []
    taken: set[str] = set()
    for find in (graph.block, graph.beside_projection):
        found = [block for op in sums if (block := find(op, macs_of)) is not None]
        for block in sorted(found, key=lambda b: len(b.ops)):
            if taken.isdisjoint(block.ops):
                chosen.append(block)
                taken.update(block.ops)
    order = {op.name: i for i, op in enumerate(ops)}
    return _named(sorted(chosen, key=lambda b: order[b.output]))


class _Graph:
    def __init__(self, ops: Sequence[Op], output: str) -> None:
        self._by_name = {op.name: op for op in ops}
        self._users: dict[str, list[str]] = {op.name: [] for op in ops}
        for op in ops:
            for name in op.inputs:
                self._users[name].append(op.name)
        self._users[output].append("")  # the output is read by whoever runs the model
        self._dominator = _dominators(ops)
        self._order = {op.name: i for i, op in enumerate(ops)}

    def block(self, end: Op, macs_of: Callable[[Op], int]) -> Block | None:
        start = self._dominator.get(end.name)
        if start is None or not self._agree(self._by_name[start], end):
            return None
        inside = self._between(start, end.name)
        last = end.name
        after = self._users[last]
        if len(after) == 1 and after[0] and self._by_name[after[0]].kind in _ACTIVATIONS:
            last = after[0]
            inside.add(last)
        return self._closed(inside, start, last, macs_of)

    def beside_projection(self, end: Op, macs_of: Callable[[Op], int]) -> Block | None:
        start = self._dominator.get(end.name)
        shortcut = next((name for name in end.inputs if self._projects(self._by_name[name], start)), None)
        if start is None or shortcut is None or self._by_name[shortcut].lost != end.lost:
            return None
        return self._closed(self._between(start, end.name) - {shortcut}, shortcut, end.name, macs_of)

    def _projects(self, op: Op, start: str | None) -> bool:
        return op.kind == "conv" and set(op.attrs["kernel"]) == {1} and op.inputs[0] == start

    def _closed(self, inside: set[str], source: str, last: str, macs_of: Callable[[Op], int]) -> Block | None:
        """The block of these operations with ``source`` in the place of ``last``; None where something else reads what
        is inside, or uses its layers."""
        layers = [op for op in self._by_name.values() if op.name in inside and op.kind in WEIGHTED and op.module]
        closed = all(user in inside for name in inside - {last} for user in self._users[name])
        elsewhere = {op.module for op in self._by_name.values() if op.name not in inside and op.kind in WEIGHTED}
        if not layers or not closed or any(op.module in elsewhere for op in layers):
            return None
        names = tuple(dict.fromkeys(op.module for op in layers if op.module))
        return Block(
            name=_common(names),
            ops=tuple(sorted(inside, key=lambda n: self._order[n])),
            source=source,
            output=last,
            layers=names,
            macs=sum(macs_of(op) for op in layers),
        )

    def _agree(self, one: Op, other: Op) -> bool:
        """Same shape, and the same channels go from both."""
        alike = one.shape == other.shape and one.batch_axis == other.batch_axis and one.kind != "input"
        return alike and one.lost == other.lost

    def _between(self, start: str, end: str) -> set[str]:
        """What lies on the paths from ``start`` to ``end``, and the constants that only they read."""
        found: set[str] = set()
        waiting = [end]
        while waiting:
            name = waiting.pop()
            if name != start and name not in found:
                found.add(name)
                waiting += self._by_name[name].inputs
        return found


def _dominators(ops: Sequence[Op]) -> dict[str, str]:
    """The immediate dominator of every operation that depends on the input (Cooper et al. 2001)."""
    order: dict[str, int] = {}
    found: dict[str, str] = {}
    for number, op in enumerate(ops):
        sources = [name for name in op.inputs if name in order]
        if sources or op.kind == "input":
            order[op.name] = number
        if not sources:
            continue
        meet = sources[0]
        for other in sources[1:]:
            while meet != other:
                if order[meet] > order[other]:
                    meet = found[meet]
                else:
                    other = found[other]
        found[op.name] = meet
    return found


def _common(layers: Sequence[str]) -> str:
    """The module that holds all these layers; the layer itself where there is one."""
    parts = [name.split(".") for name in layers]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or layers[0]


def _named(blocks: list[Block]) -> list[Block]:
    """Two branches of one module get the names of their first layers."""
    counts: Mapping[str, int] = {b.name: sum(other.name == b.name for other in blocks) for b in blocks}
    return [
        Block(name=b.layers[0], ops=b.ops, source=b.source, output=b.output, layers=b.layers, macs=b.macs)
        if counts[b.name] > 1
        else b
        for b in blocks
    ]
