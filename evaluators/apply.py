"""From a policy to a module: prune, remove blocks, put the quantisers in. The same policy gives the same bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..spaces.anatomy import Anatomy
from ..spaces.plan import Plan, plan, pruned_groups
from ..spaces.policy import Policy
from .inspect import Network
from .quantise import quantise
from .rebuild import rebuild


@dataclass(frozen=True, slots=True)
class Compressor:
    """Applies policies to one model, whose tensors it never changes.

    ``example_input`` has shape (1, ...). Build one per process with :func:`compressor`.
    """

    anatomy: Anatomy
    network: Network
    example_input: Tensor
    orders: dict[str, dict[str, list[int]]]
    """By importance and group: channels, the least important first."""

    def apply(self, policy: Policy) -> tuple[fx.GraphModule, Plan]:
        """A fresh module that follows the policy, on the CPU in evaluation mode, and the plan behind it."""
        return self._build(policy, {g.name: self._order(policy.importance, g.name) for g in self.anatomy.groups})

    def shell(self, policy: Policy) -> tuple[fx.GraphModule, Plan]:
        """As :meth:`apply`, for callers that load a checkpoint into it at once: any channels may stay."""
        return self._build(policy, {g.name: range(g.channels) for g in self.anatomy.groups})

    def whole(self) -> fx.GraphModule:
        """The uncompressed model, rebuilt: its parameters are those that groups name."""
        planned = plan(self.anatomy, Policy(model=self.anatomy.digest))
        return rebuild(planned, self.network.state, self.network.frozen)

    def _build(self, policy: Policy, orders: Mapping[str, Sequence[int]]) -> tuple[fx.GraphModule, Plan]:
        planned = plan(self.anatomy, policy)
        removed = {
            group.name: list(orders[group.name][: group.channels - kept])
            for group, kept in pruned_groups(self.anatomy, policy)
        }
        module = rebuild(planned, slice_state(self.network.state, removed, self.anatomy), self.network.frozen)
        quantise(module, planned)
        return module.eval(), planned

    def _order(self, importance: str, group: str) -> list[int]:
        if importance not in self.orders:
            self.orders[importance] = _rank(self, importance)
        return self.orders[importance][group]


def compressor(anatomy: Anatomy, network: Network, example_input: Tensor) -> Compressor:
    """A :class:`Compressor` for a model inspected with :func:`nightpress.evaluators.inspect.inspect`."""
    return Compressor(anatomy=anatomy, network=network, example_input=example_input, orders={})


def slice_state(
    state: Mapping[str, Tensor], removed: Mapping[str, Sequence[int]], anatomy: Anatomy
) -> dict[str, Tensor]:
    """The state without the channels that ``removed`` names by group; untouched entries are the same tensors."""
    gone: dict[tuple[str, int], list[int]] = {}
    for group in anatomy.groups:
        channels = removed.get(group.name)
        for part in group.slices if channels else ():
            indices = gone.setdefault((part.parameter, part.axis), [])
            indices += [index for channel in channels or () for index in part.indices[channel]]
    sliced = dict(state)
    for (name, axis), indices in gone.items():
        stays = torch.ones(state[name].shape[axis], dtype=torch.bool)
        stays[indices] = False
        sliced[name] = sliced[name].index_select(axis, stays.nonzero().flatten().to(sliced[name].device))
    return sliced


def _rank(made: Compressor, importance: str) -> dict[str, list[int]]:
    """Channels of every group from the least to the most important, judged on the given weights."""
    orders: dict[str, list[int]] = {}
    for group in made.anatomy.groups:
        scores = torch.zeros(group.channels, dtype=torch.float64)
        for part in group.slices:
            weight = made.network.state[part.parameter]
            if weight.dim() > 1:
                other = weight.detach().double().square().transpose(0, part.axis).flatten(1).sum(1)
                scores += other[torch.tensor(part.indices)].sum(1)
        orders[group.name] = torch.argsort(scores, stable=True).tolist()
    return orders
