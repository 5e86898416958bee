"""A fine-tune that stops on the way and goes on later, in whichever process: what it needs beside the weights.

The schedule stays that of the whole fine-tune, so that a pause changes nothing of its end, bit for bit. With a
warm-up and a cosine of its own each part would end well annealed, but what comes after it would begin hot again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

KEPT = "training:"
"""Before the names of what a checkpoint holds beside the weights; a colon is in no module's name."""
_STEP, _MOMENTUM, _REGRESSOR, _STAGE, _WIDE = "step", "momentum.", "regressor.", "stage.", "wide."
Parameters = tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]
"""The student's that are trained, and those of the regressors."""


@dataclass(slots=True)
class Place:
    """How far a fine-tune has come. A fine-tune that is given one goes on from it, and moves it along.

    ``step`` counts the steps that are done. ``momentum`` has a tensor for each parameter that the optimiser has moved,
    by its position; ``regressors`` are those of inner distillation. While a policy is pruned in stages, ``stage`` is
    the module's state at the stage that it has come to (the checkpoint's own weights are cut to the policy) and
    ``wide`` the full-width state that the stage was cut from, empty at the first one.
    """

    step: int = 0
    momentum: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    regressors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    stage: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    wide: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def recall(self, optimiser: torch.optim.Optimizer, parameters: Parameters) -> None:
        """Make an optimiser and regressors those that :meth:`remember` saw."""
        own, regressors = parameters
        with torch.no_grad():
            for number, value in self.regressors.items():
                regressors[int(number)].copy_(value)
        for number, value in self.momentum.items():
            parameter = [*own, *regressors][int(number)]
            optimiser.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(value).detach()

    def remember(self, optimiser: torch.optim.Optimizer, parameters: Parameters, step: int) -> None:
        """Keep what going on from ``step`` takes."""
        own, regressors = parameters
        states = {str(n): optimiser.state.get(p, {}) for n, p in enumerate([*own, *regressors])}
        self.step = step
        self.momentum = {n: s["momentum_buffer"] for n, s in states.items() if s.get("momentum_buffer") is not None}
        self.regressors = {str(n): p.detach() for n, p in enumerate(regressors)}

    def tensors(self) -> dict[str, Tensor]:
        """As entries of a checkpoint; :func:`read_place` reads them."""
        parts = {_MOMENTUM: self.momentum, _REGRESSOR: self.regressors, _STAGE: self.stage, _WIDE: self.wide}
        found = {KEPT + prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
        return {KEPT + _STEP: torch.tensor(self.step), **{n: v.detach().cpu().clone() for n, v in found.items()}}


def read_place(path: Path) -> Place | None:
    """Where the fine-tune of a checkpoint stands; None where there is no such file."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        kept = {n.removeprefix(KEPT): file.get_tensor(n) for n in file.keys() if n.startswith(KEPT)}  # noqa: SIM118
    return Place(
        step=int(kept[_STEP]), momentum=_named(kept, _MOMENTUM), regressors=_named(kept, _REGRESSOR),
        stage=_named(kept, _STAGE), wide=_named(kept, _WIDE),
    )  # fmt: skip


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint alone."""
    return {name: value for name, value in load_file(path).items() if not name.startswith(KEPT)}


def _named(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
