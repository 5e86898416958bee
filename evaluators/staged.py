"""Cutting a network that has been pruned and trained already: the next stage of staged pruning."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..spaces.plan import Plan
from ..spaces.policy import Policy
from .apply import Compressor


def cut_further(
    compressor: Compressor, module: fx.GraphModule, before: Policy, after: Policy
) -> tuple[Compressor, fx.GraphModule, Plan]:
    """The module that ``compressor`` made for ``before``, trained since, pruned down to ``after``.

    Its weights are put back into the full-width model, with zeros for the channels that are gone, and channels
    are ranked anew on what training made of them: those that are gone stay the least important. Returns the
    compressor of that full-width model too, which the stage after this one starts from.
    """
    places = _places(compressor, before)
    widened = copy.deepcopy(compressor.traced)
    trained = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    _put_back(widened, trained, places)
    following = replace(compressor, traced=widened, orders={})
    return following, *following.apply(after)


def _places(compressor: Compressor, policy: Policy) -> dict[str, Tensor]:
    """For each parameter and buffer of the compressed module, where its elements stand in the full-width one.

    Found by compressing a model whose every element is its own place, with the channel order that is known.
    """
    numbered = copy.deepcopy(compressor.traced).double()  # exact up to 2⁵³
    with torch.no_grad():
        for value in _numbers(numbered).values():
            value.copy_(torch.arange(value.numel(), dtype=torch.float64).view(value.shape))
    tagged = replace(compressor, traced=numbered, example_input=compressor.example_input.double())
    module, _ = tagged.apply(replace(policy, bits={}))
    return {name: value.detach().long() for name, value in _numbers(module).items()}


@torch.no_grad()
def _put_back(widened: fx.GraphModule, trained: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    for name, value in _numbers(widened).items():
        if name in places:  # a removed block's are not, and stay as they were
            value.zero_()
            value.view(-1)[places[name].flatten()] = trained[name].to(value.dtype).flatten()


def _numbers(module: fx.GraphModule) -> dict[str, Tensor]:
    """Parameters and buffers that hold real numbers, by name; in the module's own memory."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.data for name, value in named.items() if value.is_floating_point()}
