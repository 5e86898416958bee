"""Labels of axes, and which of them are equal: what :mod:`.labels` finds out about a graph."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components  # scikit-learn brings scipy

Labels = NDArray[np.int64]
FIXED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A factor of an axis: its size, its labels (None: it can lose nothing), whether it is the batch; ``key`` names it
    where it came from a split."""

    size: int
    labels: Labels | None = None
    batch: bool = False
    key: str = ""


Axis = tuple[Part, ...]


@dataclass(slots=True)
class Labelling:
    """The labels of all tensors and parameters, and which of them are equal.

    ``parameters`` maps (state entry, axis) to labels; ``tensors`` an operation to its axes; ``before`` a slice to the
    labels that lie before its start.
    """

    shapes: dict[str, tuple[int, ...]]
    roles: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    parameters: dict[tuple[str, int], Labels] = field(default_factory=dict[tuple[str, int], Labels])
    tensors: dict[str, tuple[Axis, ...]] = field(default_factory=dict[str, tuple[Axis, ...]])
    before: dict[str, Labels] = field(default_factory=dict[str, Labels])
    splits: int = 0
    now: str = ""
    """What the graph is at: the reason for labels that are fixed there."""
    _next: int = 1
    _equal: list[tuple[Labels, Labels]] = field(default_factory=list[tuple[Labels, Labels]])
    _fixed: list[tuple[Labels, str]] = field(default_factory=list[tuple[Labels, str]])

    def parameter(self, name: str, axis: int) -> Labels:
        """Labels of a state entry's axis; new ones where it has none yet."""
        if (name, axis) not in self.parameters:
            size = self.shapes[name][axis]
            self.parameters[name, axis] = np.arange(self._next, self._next + size)
            self._next += size
        return self.parameters[name, axis]

    def equal(self, one: Labels | None, other: Labels | None) -> None:
        """Tie labels to each other; to an axis without labels nothing can be lost, so they are fixed."""
        if one is None or other is None:
            for labels in (one, other):
                if labels is not None:
                    self._fixed.append((labels, self.now))
        elif one is not other:
            self._equal.append((one, other))

    def fix(self, axes: Iterable[Axis]) -> None:
        for axis in axes:
            for part in axis:
                self.equal(None, part.labels)

    def mark(self, axis: Axis, role: str) -> None:
        for part in axis:
            if part.key:
                self.roles.setdefault(part.key, set()).add(role)

    def flat(self, axis: Axis) -> Labels | None:
        """One label for each entry of an axis (the batch aside), or None where none can go."""
        labelled = [part for part in axis if part.labels is not None]
        if not labelled:
            return None
        if len(labelled) > 1:
            self.fix([axis])
            return None
        found = np.zeros(1, dtype=np.int64)
        for part in (p for p in axis if not p.batch):
            own = part.labels if part.labels is not None else np.zeros(part.size, dtype=np.int64)
            found = (found[:, None] + own[None, :]).reshape(-1)  # only one part's labels are not 0
        return found

    def channels(self) -> tuple[Callable[[Labels], Labels], Callable[[Labels], str]]:
        """Two functions of labels: the numbers of their channels, 0 for what is fixed; and why the first is fixed."""
        pairs = self._equal or [(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))]
        one, other = (np.concatenate([p[i] for p in pairs]) for i in (0, 1))
        graph = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(self._next, self._next))
        _, component = connected_components(graph, directed=False)
        reasons: dict[int, str] = {int(component[FIXED]): "it is joined with channels that cannot go"}
        for labels, why in self._fixed:
            for number in np.unique(component[labels]):
                reasons.setdefault(int(number), why)
        numbers = component + 1
        numbers[np.isin(component, list(reasons))] = FIXED
        return lambda labels: numbers[labels], lambda labels: reasons.get(int(component[labels[0]]), "")
