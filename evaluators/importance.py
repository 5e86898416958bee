"""Which channels matter least: a saliency for every element of every parameter, summed over what a channel owns.

A channel owns the weights that make it and those of the following layers that read it: one that nobody reads is worth
nothing however large its own weights are. Scores are divided by their mean over the group, so that groups compare.
"""

import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..spaces.anatomy import Slice
from ..spaces.errors import InputError

METHODS = ("l1", "l2", "bn", "activation", "weight_activation", "taylor", "hessian", "random")
DATA_METHODS = frozenset({"activation", "weight_activation", "taylor", "hessian"})
SAMPLES = 64
"""Training items that activations and gradients are taken from."""
_TAYLOR_BATCH = 8
_ACTIVATION_BATCH = 64
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saliency:
    """What each element of a parameter is worth, by the parameter's name and in its shape; parameters that do not
    count are missing. ``axes`` names the one axis along which slices count, for parameters where it is not every
    axis. ``power``: a channel's score is its sum to this power. Groups in which nothing counts go by ``otherwise``.
    """

    values: Mapping[str, Tensor]
    axes: Mapping[str, int] = field(default_factory=dict[str, int])
    power: float = 1.0
    otherwise: "Saliency | None" = None


def saliency(
    module: nn.Module, method: str, *, inputs: Tensor | None = None, targets: Tensor | None = None,
    loss: Loss | None = None, seed: int = 0, samples: int = SAMPLES,
) -> Saliency:  # fmt: skip
    """The saliency of a module's parameters by one of ``METHODS``; the module is left exactly as it was.

    - ``l1``, ``l2``: \\|w\\|; w², and the root of a channel's sum. Weights and scales of norms, not biases.
    - ``bn``: \\|γ\\| of the norms (Liu et al. 2017, "Learning Efficient Convolutional Networks through Network
      Slimming"); ``l2`` in groups without one.
    - ``activation``: mean \\|a\\| of the channel at the layers that read it.
    - ``weight_activation``: \\|w_ij\\| · mean \\|a_j\\| of the input j (Sun et al. 2024, "Wanda", with the mean for the
      norm).
    - ``taylor``: (g · w)², averaged over batches of 8 items (Molchanov et al. 2019, "Importance Estimation for Neural
      Network Pruning", eq. 8).
    - ``hessian``: ½ h w² (LeCun et al. 1990, "Optimal Brain Damage", eq. 5), h the diagonal of the empirical Fisher
      matrix: the mean of the squared gradient of each single item.
    - ``random``: uniform in [0, 1) by ``seed``, as a control.

    ``inputs`` (items, …) and ``targets`` (items, …) are needed by the methods that look at data, which take the first
    ``samples`` of them; batch norms use their running statistics. ``loss`` is cross-entropy by default.
    Raises InputError for an unknown method or missing data, ValueError when a value is not finite.
    """
    if method not in METHODS:
        raise InputError(f"importance must be one of {', '.join(METHODS)}, but got {method!r}.")
    found = _METHODS[method](module, _Data(method, inputs, targets, loss or F.cross_entropy, samples, seed))
    for name, value in found.values.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the importance {method} of {name} is not finite")
    return found


def rank(slices: Mapping[str, Sequence[Slice]], found: Saliency) -> dict[str, list[int]]:
    """The channels of each group, the least important first. Ties keep their order, so that they fall the same way
    in every process."""
    return {group: np.argsort(values, kind="stable").tolist() for group, values in scores(slices, found).items()}


def scores(slices: Mapping[str, Sequence[Slice]], found: Saliency) -> dict[str, NDArray[np.float64]]:
    """Score of each channel of each group, shape (channels,), with a mean of 1 unless all are 0.

    Raises ValueError for a group without anything that counts.
    """
    arrays: dict[str, NDArray[np.float64]] = {}
    return {group: _group_scores(group, owned, found, arrays) for group, owned in slices.items()}


def _group_scores(
    group: str, owned: Sequence[Slice], found: Saliency, arrays: dict[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    counted = [s for s in owned if s.parameter in found.values and found.axes.get(s.parameter, s.axis) == s.axis]
    if not counted:
        if found.otherwise is None:
            raise ValueError(f"nothing in the group {group} has an importance")
        return _group_scores(group, owned, found.otherwise, {})
    sums = sum(_slice_sums(s, found, arrays) for s in counted)
    powered = np.asarray(sums) ** found.power
    mean = powered.mean()
    return powered / mean if mean > 0 else powered


def _slice_sums(owned: Slice, found: Saliency, arrays: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """A channel's sum over one slice, shape (channels,). numpy sums on one thread: in the same order everywhere."""
    if owned.parameter not in arrays:
        arrays[owned.parameter] = found.values[owned.parameter].detach().cpu().double().numpy()
    values = arrays[owned.parameter]
    others = tuple(axis for axis in range(values.ndim) if axis != owned.axis)
    return values.sum(axis=others)[np.asarray(owned.indices, dtype=np.intp)].sum(axis=1)


@dataclass(frozen=True, slots=True)
class _Data:
    method: str
    inputs: Tensor | None
    targets: Tensor | None
    loss: Loss
    samples: int
    seed: int

    def batches(self, module: nn.Module, size: int, *, labelled: bool) -> Generator[tuple[Tensor, Tensor]]:
        inputs = self.inputs
        targets = self.targets if labelled else inputs
        if inputs is None or targets is None or len(inputs) == 0 or self.samples < 1:
            needs = "inputs and targets" if labelled else "inputs"
            raise InputError(f"The importance {self.method} needs {needs} of at least one training item.")
        device = next(module.parameters()).device
        count = min(self.samples, len(inputs))
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield inputs[part].float().to(device), targets[part].to(device)


def _magnitude(power: int) -> Callable[[nn.Module, _Data], Saliency]:
    def values_of(module: nn.Module, data: _Data) -> Saliency:
        del data
        norms = _norm_scales(module)
        values = {
            name: parameter.detach().abs().pow(power)
            for name, parameter in module.named_parameters()
            if parameter.dim() > 1 or name in norms
        }
        return Saliency(values=values, power=1 / power)

    return values_of


def _norm_magnitude(module: nn.Module, data: _Data) -> Saliency:
    values = {name: parameter.detach().abs() for name, parameter in _norm_scales(module).items()}
    return Saliency(values=values, otherwise=_magnitude(2)(module, data))


def _norm_scales(module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    scales = (f"{name}.weight" for name, norm in module.named_modules() if isinstance(norm, _NORMS))
    return {name: named[name] for name in scales if name in named}  # norms without parameters have none


def _activation(module: nn.Module, data: _Data) -> Saliency:
    values: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    for name, (layer, mean) in _input_means(module, data).items():
        weight = layer.weight.detach()
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
        axes[f"{name}.weight"] = 0 if depthwise else 1
        # Each input channel's elements sum to its mean: what they weigh does not matter here.
        values[f"{name}.weight"] = _per_weight(layer, mean) / (weight.numel() / len(mean)) * torch.ones_like(weight)
    return Saliency(values=values, axes=axes, otherwise=_magnitude(2)(module, data))


def _weight_activation(module: nn.Module, data: _Data) -> Saliency:
    return Saliency(
        values={
            f"{name}.weight": layer.weight.detach().abs() * _per_weight(layer, mean)
            for name, (layer, mean) in _input_means(module, data).items()
        },
        otherwise=_magnitude(1)(module, data),
    )


def _input_means(module: nn.Module, data: _Data) -> dict[str, tuple[nn.Conv2d | nn.Linear, Tensor]]:
    """For each layer that ran, the mean magnitude of its input channels, shape (cin,)."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def hook(name: str, channels: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def collect(_: nn.Module, given: tuple[Any, ...]) -> None:
            value: Tensor = given[0].detach().abs()
            axis = channels % value.dim()
            mean = value.mean(dim=[d for d in range(value.dim()) if d != axis], dtype=torch.float64)
            sums[name] = sums.get(name, torch.zeros_like(mean)) + mean * len(value)
            seen[name] = seen.get(name, 0) + len(value)

        return collect

    handles = [m.register_forward_pre_hook(hook(n, 1 if isinstance(m, nn.Conv2d) else -1)) for n, m in layers.items()]
    try:
        with _judged(module), torch.no_grad():
            for inputs, _ in data.batches(module, _ACTIVATION_BATCH, labelled=False):
                module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (layers[name], (total / seen[name]).float()) for name, total in sums.items()}


def _per_weight(layer: nn.Conv2d | nn.Linear, per_input: Tensor) -> Tensor:
    """A value of each input channel, shaped to broadcast against the weight (cout, cin / groups, …)."""
    if isinstance(layer, nn.Linear):
        return per_input
    parts = per_input.reshape(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, dim=0)
    return parts[:, :, None, None]


def _taylor(module: nn.Module, data: _Data) -> Saliency:
    squares = _mean_squared_gradients(module, data, _TAYLOR_BATCH)
    return Saliency(values={name: square * weight**2 for name, (weight, square) in squares.items()})


def _hessian(module: nn.Module, data: _Data) -> Saliency:
    squares = _mean_squared_gradients(module, data, 1)
    return Saliency(values={name: 0.5 * square * weight**2 for name, (weight, square) in squares.items()})


def _mean_squared_gradients(module: nn.Module, data: _Data, batch: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each parameter and the mean over batches of the square of its gradient of the loss; 0 where it has none."""
    with _judged(module):
        named = dict(module.named_parameters())
        sums = [torch.zeros_like(parameter) for parameter in named.values()]
        count = 0
        for inputs, targets in data.batches(module, batch, labelled=True):
            with torch.enable_grad():
                value = data.loss(module(inputs), targets)
                found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                gradients = cast("tuple[Tensor | None, ...]", found)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient.detach() ** 2
            count += 1
        return {n: (p.detach(), total / count) for (n, p), total in zip(named.items(), sums, strict=True)}


def _random(module: nn.Module, data: _Data) -> Saliency:
    values: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{data.seed} {name}".encode()))
        values[name] = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    return Saliency(values=values)


@contextmanager
def _judged(module: nn.Module) -> Generator[None]:
    """The module as at inference and with gradients for everything; afterwards as it was."""
    modes = [(m, m.training) for m in module.modules()]
    trained = [(p, p.requires_grad) for p in module.parameters()]
    module.eval()
    for parameter, _ in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
        for parameter, trains in trained:
            parameter.requires_grad_(trains)


_METHODS: dict[str, Callable[[nn.Module, _Data], Saliency]] = {
    "l1": _magnitude(1),
    "l2": _magnitude(2),
    "bn": _norm_magnitude,
    "activation": _activation,
    "weight_activation": _weight_activation,
    "taylor": _taylor,
    "hessian": _hessian,
    "random": _random,
}
