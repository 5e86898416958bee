"""From a policy to a module: prune, remove blocks, put the quantisers in. The same policy gives the same bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..spaces.anatomy import Anatomy
from ..spaces.plan import Plan, plan, pruned_groups
from ..spaces.policy import Policy
from .importance import DATA_METHODS, Loss, rank, saliency
from .inspect import Network
from .quantise import quantise
from .rebuild import rebuild

Evidence = Callable[[], tuple[Tensor | None, Tensor | None, Loss | None]]


@dataclass(frozen=True, slots=True)
class Compressor:
    """Applies policies to one model, whose tensors it never changes.

    ``example_input`` has shape (1, ...). Build one per process with :func:`compressor`.
    """

    anatomy: Anatomy
    network: Network
    example_input: Tensor
    evidence: Evidence
    orders: dict[str, dict[str, list[int]]]
    """By importance and group: channels, the least important first."""

    def apply(self, policy: Policy) -> tuple[fx.GraphModule, Plan]:
        """A fresh module that follows the policy, on the CPU in evaluation mode, and the plan behind it."""
        return self._build(policy, self.removed(policy))

    def shell(self, policy: Policy) -> tuple[fx.GraphModule, Plan]:
        """As :meth:`apply`, for callers that load a checkpoint into it at once: any channels may stay."""
        pruned = pruned_groups(self.anatomy, policy)
        return self._build(policy, {group.name: range(group.channels - kept) for group, kept in pruned})

    def whole(self) -> fx.GraphModule:
        """The uncompressed model, rebuilt: its parameters are those that groups name."""
        planned = plan(self.anatomy, Policy(model=self.anatomy.digest))
        return rebuild(planned, self.network.state, self.network.frozen)

    def removed(self, policy: Policy) -> dict[str, Sequence[int]]:
        """The channels that a policy takes out of each group: its least important ones."""
        pruned = pruned_groups(self.anatomy, policy)
        return {g.name: self._order(policy.importance)[g.name][: g.channels - kept] for g, kept in pruned}

    def _build(self, policy: Policy, removed: Mapping[str, Sequence[int]]) -> tuple[fx.GraphModule, Plan]:
        planned = plan(self.anatomy, policy)
        module = rebuild(planned, slice_state(self.network.state, removed, self.anatomy), self.network.frozen)
        quantise(module, planned, ranges=policy.ranges, scales=policy.scales)
        return module.eval(), planned

    def _order(self, importance: str) -> dict[str, list[int]]:
        if importance not in self.orders:
            inputs, targets, loss = self.evidence() if importance in DATA_METHODS else _no_evidence()
            found = saliency(self.whole(), importance, inputs=inputs, targets=targets, loss=loss)
            self.orders[importance] = rank({group.name: group.slices for group in self.anatomy.groups}, found)
        return self.orders[importance]


def compressor(
    anatomy: Anatomy, network: Network, example_input: Tensor, evidence: Evidence | None = None
) -> Compressor:
    """A :class:`Compressor` for a model inspected with :func:`nightpress.evaluators.inspect.inspect`.

    ``evidence`` gives training inputs and targets, (items, …) each, and the loss (None: cross entropy) to the
    importances that look at data.
    """
    return Compressor(
        anatomy=anatomy, network=network, example_input=example_input, evidence=evidence or _no_evidence, orders={}
    )


def _no_evidence() -> tuple[None, None, None]:
    return None, None, None


def slice_state(
    state: Mapping[str, Tensor], removed: Mapping[str, Sequence[int]], anatomy: Anatomy
) -> dict[str, Tensor]:
    """The state without the channels that ``removed`` names by group; untouched entries are the same tensors."""
    sliced = dict(state)
    for (name, axis), stays in _staying(state, removed, anatomy).items():
        sliced[name] = sliced[name].index_select(axis, stays.to(sliced[name].device))
    return sliced


def spread_state(
    sliced: Mapping[str, Tensor], removed: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], anatomy: Anatomy
) -> dict[str, Tensor]:
    """The inverse of :func:`slice_state`: the full-width state with zeros where channels are gone.

    Entries that ``sliced`` does not have (a removed block's) are those of ``state``.
    """
    wide = {name: value.to(state[name].dtype) for name, value in sliced.items() if name in state}
    for (name, axis), stays in _staying(state, removed, anatomy).items():
        if name in wide:
            shape = list(wide[name].shape)
            shape[axis] = state[name].shape[axis]
            wide[name] = torch.zeros(shape, dtype=wide[name].dtype).index_copy_(axis, stays, wide[name])
    return {**state, **wide}


def _staying(
    state: Mapping[str, Tensor], removed: Mapping[str, Sequence[int]], anatomy: Anatomy
) -> dict[tuple[str, int], Tensor]:
    """For each state entry and axis that loses something, the indices that stay."""
    kept: dict[tuple[str, int], Tensor] = {}
    for group in anatomy.groups:
        channels = removed.get(group.name, ())
        for part in group.slices if channels else ():
            place = (part.parameter, part.axis)
            if place not in kept:
                kept[place] = torch.ones(state[part.parameter].shape[part.axis], dtype=torch.bool)
            kept[place][[index for channel in channels for index in part.indices[channel]]] = False
    return {place: mask.nonzero().flatten() for place, mask in kept.items()}
