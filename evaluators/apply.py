"""From a policy to a module: prune, remove blocks, put the quantisers in. The same policy gives the same bits."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp  # type: ignore[import-untyped]
from torch import fx, nn

from ..spaces.anatomy import Anatomy
from ..spaces.plan import Plan, plan, pruned_groups
from ..spaces.policy import Policy
from .inspect import dependency_graph, prune_group
from .quantise import quantise


@dataclass(frozen=True, slots=True)
class Compressor:
    """Applies policies to one model. Holds the traced model, which it never changes.

    ``example_input`` has shape (1, ...). Build one per process with :func:`compressor`.
    """

    anatomy: Anatomy
    traced: fx.GraphModule
    example_input: torch.Tensor
    orders: dict[str, dict[str, list[int]]]
    """By importance and group: channel indices, the least important first."""

    def apply(self, policy: Policy) -> tuple[fx.GraphModule, Plan]:
        """A fresh module that follows the policy, on the CPU in evaluation mode, and the plan behind it."""
        return self._build(policy, with_weights=True)

    def shell(self, policy: Policy) -> tuple[fx.GraphModule, Plan]:
        """As :meth:`apply`, for callers that load a checkpoint into it at once: any channels may stay."""
        return self._build(policy, with_weights=False)

    def _build(self, policy: Policy, *, with_weights: bool) -> tuple[fx.GraphModule, Plan]:
        compressed = copy.deepcopy(self.traced)
        pruned = pruned_groups(self.anatomy, policy)
        if pruned:
            graph = dependency_graph(compressed, self.example_input)
            for group, kept in pruned:
                count = group.channels - kept
                order = self._order(policy.importance, group.name) if with_weights else list(range(group.channels))
                prune_group(graph, compressed.get_submodule(group.name), sorted(order[:count]))
            for name, parameter in self.traced.named_parameters():  # what the user froze stays frozen
                compressed.get_parameter(name).requires_grad_(parameter.requires_grad)
        _remove_blocks(compressed, self.anatomy, policy)
        planned = plan(self.anatomy, policy)
        quantise(compressed, planned)
        return compressed.eval(), planned

    def _order(self, importance: str, group: str) -> list[int]:
        if importance not in self.orders:
            self.orders[importance] = _rank(self.traced, self.anatomy, self.example_input, importance)
        return self.orders[importance][group]


def compressor(anatomy: Anatomy, traced: fx.GraphModule, example_input: torch.Tensor) -> Compressor:
    """A :class:`Compressor` for a model inspected with :func:`nightpress.evaluators.inspect.inspect`."""
    return Compressor(anatomy=anatomy, traced=traced, example_input=example_input, orders={})


def _rank(
    traced: fx.GraphModule, anatomy: Anatomy, example_input: torch.Tensor, importance: str
) -> dict[str, list[int]]:
    """Channels of every group from the least to the most important, judged on the given weights."""
    criterion = _criterion(importance)
    graph = dependency_graph(copy.deepcopy(traced), example_input)
    modules = dict(graph.model.named_modules())
    orders: dict[str, list[int]] = {}
    for group in anatomy.groups:
        root = modules[group.name]
        prune = tp.prune_linear_out_channels if isinstance(root, nn.Linear) else tp.prune_conv_out_channels
        members = graph.get_pruning_group(root, prune, idxs=list(range(group.channels)))
        scores = criterion(members)
        if scores is None:  # asked for batch norms where there are none
            scores = _criterion("l2")(members)
        # A stable sort, so that ties fall the same way in every process.
        orders[group.name] = torch.argsort(scores.detach().double(), stable=True).tolist()
    return orders


def _criterion(importance: str) -> Any:
    if importance == "bn":  # network slimming (Liu et al. 2017)
        return tp.importance.BNScaleImportance()
    return tp.importance.GroupMagnitudeImportance(p={"l1": 1, "l2": 2}[importance])


def _remove_blocks(compressed: fx.GraphModule, anatomy: Anatomy, policy: Policy) -> None:
    blocks = [b for b in anatomy.blocks if b.name in policy.removed_blocks]
    if not blocks:
        return
    nodes = {node.name: node for node in compressed.graph.nodes}
    source_of = {b.output: b.source for b in blocks}
    for block in blocks:
        source = block.source
        while source in source_of:  # blocks in a row, all removed
            source = source_of[source]
        nodes[block.output].replace_all_uses_with(nodes[source])
    compressed.graph.eliminate_dead_code()
    compressed.delete_all_unused_submodules()
    compressed.recompile()
