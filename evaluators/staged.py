"""Cutting a network that has been pruned and trained already: the next stage of staged pruning."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from ..spaces.plan import Plan
from ..spaces.policy import Policy
from .apply import Compressor, spread_state


def cut_further(
    compressor: Compressor, module: fx.GraphModule, before: Policy, after: Policy
) -> tuple[Compressor, fx.GraphModule, Plan]:
    """The module that ``compressor`` made for ``before``, trained since, pruned down to ``after``.

    Its weights are put back into the full-width model, with zeros for the channels that are gone, and channels
    are ranked anew on what training made of them: those that are gone stay the least important. Returns the
    compressor of that full-width model too, which the stage after this one starts from.
    """
    trained = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    wide = spread_state(trained, compressor.removed(before), compressor.network.state, compressor.anatomy)
    following = widened(compressor, wide)
    return following, *following.apply(after)


def widened(compressor: Compressor, wide: Mapping[str, Tensor]) -> Compressor:
    """The compressor of a model with the same anatomy and the full-width state ``wide``."""
    return replace(compressor, network=replace(compressor.network, state=wide), orders={})
