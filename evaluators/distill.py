"""What a student learns from a teacher: logits, features, attention maps.

- Logits: α·T²·KL(teacher ‖ student at temperature T) + (1−α)·loss. Hinton, Vinyals & Dean 2015, "Distilling the
  Knowledge in a Neural Network", section 2.
- Features: the squared distance of the student's features, after a 1×1 regressor where their channels differ, from
  the teacher's. Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3; divided here by the mean square of
  the teacher's, so that one weight serves networks and layers of any scale.
- Attention: the squared distance of normalised maps Σ_c |a_c|². Zagoruyko & Komodakis 2017, "Paying More Attention
  to Attention", eq. 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spaces.errors import InputError
from ..spaces.policy import Distill
from .taps import Tap


def blended_loss(
    outputs: Tensor, targets: Tensor, answers: Tensor | None, distill: Distill, done: float,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """α·T²·KL(teacher ‖ student) + (1−α)·loss, or the loss alone where no logits are distilled.

    ``outputs`` and the teacher's ``answers`` have shape (n, classes, …); ``done`` in [0, 1) moves the temperature.
    """
    hard = (loss or F.cross_entropy)(outputs, targets)
    if answers is None or not distill.logit:
        return hard
    temperature = temperature_at(distill, done)
    soft = F.kl_div(
        F.log_softmax(outputs / temperature, dim=1), F.log_softmax(answers / temperature, dim=1),
        reduction="none", log_target=True,
    ).sum(dim=1).mean()  # fmt: skip
    return distill.alpha * temperature**2 * soft + (1 - distill.alpha) * hard


def temperature_at(distill: Distill, done: float) -> float:
    """The distillation temperature when a share ``done`` of the fine-tune has passed."""
    if distill.schedule == "halving":
        return max(1.0, distill.temperature / 2 ** int(done * 4))
    if distill.schedule == "linear":
        low = min(1.5, distill.temperature)
        return distill.temperature + (low - distill.temperature) * done
    return distill.temperature


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance over the teacher's mean square; both of shape (n, channels, height, width) or
    (n, tokens, channels)."""
    student, teacher = student.float(), teacher.float()
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the two normalised attention maps, mean over the batch, in [0, 1] for any two tensors."""
    return 0.5 * (attention_map(student) - attention_map(teacher)).square().sum(dim=1).mean()


def attention_map(features: Tensor) -> Tensor:
    """Where a tensor is strong: Σ_c |a_c|² at each place, as unit vectors of shape (n, places)."""
    channels = 1 if features.dim() > 3 else -1
    return F.normalize(features.float().square().sum(dim=channels).flatten(1), dim=1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which of the student's tensors learn from which of the teacher's."""

    student: tuple[Tap, ...]
    teacher: tuple[Tap, ...]


def pair(student: Sequence[Tap], teacher: Sequence[Tap]) -> Pairs:
    """Tensors of equal resolution; where there are none of those, the last tensors of both, which :class:`Hints`
    brings to one size.

    Raises InputError when there is nothing to compare.
    """
    by_resolution = {tap.resolution: tap for tap in teacher}
    equal = [(tap, by_resolution[tap.resolution]) for tap in student if tap.resolution in by_resolution]
    if not equal and student and teacher and len(student[-1].shape) == len(teacher[-1].shape) == 3:
        equal = [(student[-1], teacher[-1])]
    if not equal:
        raise InputError(
            "space.distill: feature and attention distillation compare inner tensors of one resolution, but the "
            f"student has {_resolutions(student)} and the teacher {_resolutions(teacher)}: offer logit or none."
        )
    return Pairs(*(tuple(taps) for taps in zip(*equal, strict=True)))


class Hints(nn.Module):
    """The distance between paired tensors, with a regressor for each pair whose channels differ.

    The regressors train with the student and are thrown away after it; they are none of its parts.
    """

    def __init__(self, pairs: Pairs, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.regressors = nn.ModuleList(
            _regressor(student, teacher) if kind == "feature" else nn.Identity()
            for student, teacher in zip(pairs.student, pairs.teacher, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean over the pairs, a scalar."""
        distance = feature_loss if self.kind == "feature" else attention_loss
        pairs = zip(self.regressors, student, teacher, strict=True)
        return torch.stack([distance(change(ours), _sized(theirs, ours)) for change, ours, theirs in pairs]).mean()


def _regressor(student: Tap, teacher: Tap) -> nn.Module:
    if student.channels == teacher.channels:
        return nn.Identity()
    if len(student.shape) == 3:
        return nn.Conv2d(student.channels, teacher.channels, 1)
    return nn.Linear(student.channels, teacher.channels)


def _sized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's images brought to the student's height and width."""
    if teacher.dim() != 4 or teacher.shape[2:] == student.shape[2:]:
        return teacher
    return F.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))


def _resolutions(taps: Sequence[Tap]) -> str:
    return ", ".join("×".join(map(str, tap.resolution)) for tap in taps) or "none"
