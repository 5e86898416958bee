"""Unstructured magnitude pruning: single weights held at zero. It saves (compressed) size, never time.

Nothing is added to the module: a mask follows from the weights themselves, because weights that were set to
zero stay the smallest. To go on without masks is therefore to train without asking for them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def masks(module: nn.Module, sparsity: Mapping[str, float]) -> dict[str, Tensor]:
    """For each layer named in ``sparsity`` and present in the module, the weights that stay: booleans, shaped like
    the layer's weight. The ratio's share of the smallest magnitudes goes, of equal ones the first."""
    present = {name: child for name, child in module.named_modules() if sparsity.get(name, 0) > 0}
    return {name: _mask(_weight(child), sparsity[name]) for name, child in present.items()}


@torch.no_grad()
def hold(module: nn.Module, held: Mapping[str, Tensor]) -> None:
    """Set the weights that :func:`masks` took out to zero, in place."""
    for name, mask in held.items():
        _weight(module.get_submodule(name)).mul_(mask)


def sparsify(module: nn.Module, sparsity: Mapping[str, float]) -> None:
    """Set the smallest weights of the named layers to zero, in place."""
    hold(module, masks(module, sparsity))


@torch.no_grad()
def ratios_below(module: nn.Module, layers: tuple[str, ...], threshold: float) -> dict[str, float]:
    """The sparsity of each layer, as a policy says it, that takes out every weight with \\|w\\| ≤ ``threshold``."""
    weights = {name: _weight(module.get_submodule(name)) for name in layers}
    return {name: float((weight.abs() <= threshold).double().mean()) for name, weight in weights.items()}


@torch.no_grad()
def global_ratios(module: nn.Module, layers: tuple[str, ...], ratio: float) -> dict[str, float]:
    """The sparsity of each layer when the ratio's share of the smallest weights of all layers together goes."""
    sizes = torch.cat([_weight(module.get_submodule(name)).abs().flatten() for name in layers])
    count = int(ratio * sizes.numel())
    return ratios_below(module, layers, float(sizes.kthvalue(count).values) if count else -1.0)


def _mask(weight: Tensor, ratio: float) -> Tensor:
    order = weight.abs().flatten().argsort(stable=True)
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[order[: round(ratio * len(order))]] = False
    # In the weight's own memory layout, so that each step multiplies without a copy.
    return torch.empty_like(weight, dtype=torch.bool).copy_(kept.view(weight.shape))


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a layer with a weight was expected, but got {type(layer).__name__}")
    return weight
