"""Training a compressed module: batch-norm re-estimation and the fine-tune with distillation.

Augmented views of the training data are made once and kept, with the teacher's answers to them, so that a
trial pays for neither (both are the same for every trial of a night). The teacher's features are not kept:
they would take a hundred times the memory of the images.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..spaces.policy import Distill, Policy
from .compute import EVALUATION_BATCH, Compute, has_fast_bf16
from .convolution import is_risky
from .data import Arrays
from .distill import Hints, Pairs, blended_loss, pair
from .pausing import Parameters, Place
from .quality import DivergedError
from .quantise import ActivationQuantiser, end_observation, quantisers
from .sparsity import hold, masks
from .taps import Tapped, find_taps, tapped
from .task import Task, picked

REESTIMATION_ITEMS = 1024
RANGE_ITEMS = 256
VIEW_BYTES = 1 << 30
ANSWER_BYTES = 1 << 29
MAX_VIEWS = 8
_LOSS_PARTS = 10
_PROBE_STEPS = 2
_CLIP_NORM = 1.0
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Inputs, targets and the teacher's answers (None where they are not distilled or not kept)."""


@dataclass(slots=True)
class Trainer:
    """Data, teacher and compute that all trials of a process share. ``train`` is what is left of the training
    data once the search split is taken out.

    ``uncompressed`` makes the uncompressed model in the form that students have, so that inner tensors have the
    same names; without it the task's model is taken as it is. At most 1 GiB of views and 512 MiB of answers are
    kept; answers beyond are asked for anew in each step.
    """

    task: Task
    train: Arrays
    compute: Compute
    seed: int
    batch_size: int = 64
    uncompressed: Callable[[], nn.Module] | None = None
    views: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    answers: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    answer_bytes: int = ANSWER_BYTES
    _featured: nn.Module | None = None

    def reestimate(self, module: nn.Module) -> None:
        """Batch-norm statistics and quantiser ranges anew, from forward passes over a few training items.

        Two passes: the ranges are taken once the statistics have settled.
        """
        inputs = self.train.inputs[:REESTIMATION_ITEMS]
        norms = [m for m in module.modules() if isinstance(m, _NORMS)]
        momenta = [norm.momentum for norm in norms]
        self.compute.module(module)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        sites = list(quantisers(module).values())
        with bypassed(sites), self.compute.autocast():
            self._pass_through(module, inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.eval()
        self.observe(module)

    def observe(self, module: nn.Module) -> None:
        """Ranges of the activation quantisers anew, with everything else as it is at inference."""
        sites = list(quantisers(module).values())
        if not sites:
            return
        self.compute.module(module).eval()
        for site in sites:
            site.seen.zero_()
            site.observing = True
        self._pass_through(module, self.train.inputs[:RANGE_ITEMS])
        end_observation(module)

    @torch.no_grad()
    def _pass_through(self, module: nn.Module, inputs: Tensor) -> None:
        for part in inputs.split(self.batch_size * 2):
            module(self._cast(part))

    def _cast(self, stored: Tensor) -> Tensor:
        return self.compute.cast(self.task.model_inputs(stored))

    def fit(
        self, module: nn.Module, policy: Policy, *, steps: int, seed: int, simulate: bool = True,
        span: tuple[float, float] = (0.0, 1.0), progress: Callable[[float], None] | None = None,
        place: Place | None = None, stop: int | None = None,
    ) -> tuple[float, ...]:  # fmt: skip
        """Train in place for ``steps`` steps; returns the mean loss over each tenth of them.

        SGD with Nesterov momentum, weight decay, warm-up and cosine, gradient norm clipped to 1. ``simulate``
        trains with quantised activations; without it they are left alone, which is much quicker, and their ranges
        are taken afterwards (weights are always on their grid: few bits need the training). Weights that the
        policy's sparsity takes out stay zero. ``span`` is the part of the whole fine-tune that this is, for what
        changes on the way. With ``place`` it goes on from there, and with ``stop`` it ends after so many of the steps;
        both change nothing of what the remaining steps do. Raises DivergedError when the loss is no longer finite.
        """
        self.compute.module(module).train()
        with bypassed(() if simulate else quantisers(module).values()), self._lesson(module, policy, seed) as lesson:
            losses = self._loop(lesson, steps, seed, span, progress, place or Place(), steps if stop is None else stop)
        if not simulate:
            self.observe(module)
        module.eval()
        return losses

    def _loop(
        self, lesson: "_Lesson", steps: int, seed: int, span: tuple[float, float],
        progress: Callable[[float], None] | None, place: Place, stop: int,
    ) -> tuple[float, ...]:  # fmt: skip
        parameters = lesson.parameters()
        optimiser = sgd(parameters, lesson.policy.finetune.learning_rate)
        place.recall(optimiser, parameters)
        means: list[float] = []
        running = torch.zeros((), device=self.compute.device)
        part, counted = max(1, math.ceil(steps / _LOSS_PARTS)), 0
        for step, batch in self._batches(lesson.policy.distill, place.step, stop, seed):
            for group in optimiser.param_groups:
                group["lr"] = lesson.policy.finetune.learning_rate * _warm_cosine(step, steps)
            running += lesson.step(optimiser, parameters, batch, span[0] + (span[1] - span[0]) * step / steps)
            counted += 1
            if counted == part or step == stop - 1:  # one look at the loss a tenth: no host sync a step
                means.append(float(running) / counted)
                if not math.isfinite(means[-1]):
                    raise DivergedError(f"the training loss became {means[-1]} by step {step + 1} of {steps}")
                running.zero_()
                counted = 0
                if progress is not None:
                    progress((step + 1) / steps)
        place.remember(optimiser, parameters, stop)
        return tuple(means)

    @contextmanager
    def _lesson(self, module: nn.Module, policy: Policy, seed: int) -> Generator["_Lesson"]:
        """What a fine-tune needs beside the module; nothing of it is left in the module afterwards."""
        held = masks(module, policy.sparsity)
        inner = policy.distill.inner
        teacher = self._teacher() if policy.distill.logit or inner else None
        if inner is None or teacher is None:
            yield _Lesson(self.task, self.compute, module, policy, held, teacher)
            return
        teacher = self._feature_teacher()
        pairs = self.pairs(module)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hints = self.compute.module(Hints(pairs, inner))
        with tapped(module, pairs.student) as student, tapped(teacher, pairs.teacher) as open_teacher:
            yield _Lesson(self.task, self.compute, module, policy, held, teacher, _Inner(student, open_teacher, hints))

    def pairs(self, module: nn.Module) -> Pairs:
        """Which inner tensors of a student learn from which of the teacher's. Raises InputError when none can."""
        example = self._cast(self.train.inputs[:1])
        student = find_taps(self.compute.module(module), example)
        return pair(student, find_taps(self._feature_teacher(), example))

    def _teacher(self) -> nn.Module:
        return self.compute.module(picked(self.task, self.task.teacher or self.task.model)).eval()

    def _feature_teacher(self) -> nn.Module:
        if self.task.teacher is not None or self.uncompressed is None:
            return self._teacher()
        if self._featured is None:
            self._featured = self.uncompressed()
        return self.compute.module(self._featured).eval()

    def _batches(self, distill: Distill, first: int, stop: int, seed: int) -> Iterator[tuple[int, Batch]]:
        """Steps from ``first`` up to ``stop``, with the batches that they always have."""
        generator = torch.Generator().manual_seed(seed)
        count, size = len(self.train.targets), min(self.batch_size, len(self.train.targets))
        targets = self.train.targets.to(self.compute.device)
        # A teacher that is asked for features in each step gives its logits with them.
        asked = distill.logit and distill.inner is None
        step, epoch = 0, 0
        while step < stop:
            order = torch.randperm(count, generator=generator).to(self.compute.device)
            view, last = epoch % self._view_count(), step + count // size
            epoch += 1
            if last <= first:
                step = last
                continue
            inputs = self._view(view)
            answers = self._answers(view) if asked else None
            for start in range(0, count - size + 1, size):
                if step == stop:
                    return
                if step >= first:
                    index = order[start : start + size]
                    answered = answers[index] if answers is not None else None
                    yield step, (self._cast(inputs[index]), targets[index], answered)
                step += 1

    def _view_count(self) -> int:
        size = self.train.inputs.numel() * self.train.inputs.element_size()
        return max(1, min(MAX_VIEWS, VIEW_BYTES // max(1, size))) if self.task.augment else 1

    def _view(self, number: int) -> Tensor:
        """Inputs as the task stores them, augmented once, where the training reads them."""
        if self.task.augment is None and self.compute.device == "cpu":
            return self.train.inputs
        if number not in self.views:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed * MAX_VIEWS + number)
                augment = self.task.augment or (lambda part: part)
                parts = [augment(part) for part in self.train.inputs.split(EVALUATION_BATCH)]
            self.views[number] = torch.cat(parts).to(self.compute.device)
        return self.views[number]

    def _answers(self, number: int) -> Tensor | None:
        """The teacher's logits on a view, shape (items, classes, …), or None where they would take too much memory."""
        if number in self.answers:
            return self.answers[number]
        teacher, view = self._teacher(), self._view(number)
        parts: list[Tensor] = []
        with torch.no_grad(), self.compute.autocast():
            for stored in view.split(EVALUATION_BATCH):
                parts.append(teacher(self._cast(stored)).float())
                view_bytes = len(view) * parts[0][0].nbytes
                if view_bytes * (len(self.answers) + 1) > self.answer_bytes:
                    return None
        self.answers[number] = torch.cat(parts)
        return self.answers[number]


@dataclass(frozen=True, slots=True)
class _Inner:
    """Student and teacher with their taps open, and the distance between what comes out of them."""

    student: Tapped
    teacher: Tapped
    hints: Hints


@dataclass(frozen=True, slots=True)
class _Lesson:
    """One fine-tune: who learns, from whom, and which weights are held at zero."""

    task: Task
    compute: Compute
    module: nn.Module
    policy: Policy
    held: Mapping[str, Tensor]
    teacher: nn.Module | None
    inner: _Inner | None = None

    def parameters(self) -> Parameters:
        regressors = list(self.inner.hints.parameters()) if self.inner is not None else []
        return [p for p in self.module.parameters() if p.requires_grad], regressors

    def step(self, optimiser: torch.optim.Optimizer, parameters: Parameters, batch: Batch, done: float) -> Tensor:
        """One optimiser step; the loss, a scalar on the device."""
        optimiser.zero_grad(set_to_none=True)
        loss = self._loss(*batch, done)
        loss.backward()
        for own in parameters:  # regressors apart: their gradients must not shorten the student's
            nn.utils.clip_grad_norm_(own, _CLIP_NORM)
        optimiser.step()
        hold(self.module, self.held)
        return loss.detach()

    def _loss(self, inputs: Tensor, targets: Tensor, answers: Tensor | None, done: float) -> Tensor:
        distill, inner = self.policy.distill, self.inner
        if inner is not None:
            return self._inner_loss(inner, inputs, targets, done)
        with self.compute.autocast():
            outputs = self.module(inputs)
        if answers is None and self.teacher is not None:
            with torch.no_grad(), self.compute.autocast():
                answers = self.teacher(inputs).float()
        return blended_loss(outputs.float(), targets, answers, distill, done, self.task.loss)

    def _inner_loss(self, inner: _Inner, inputs: Tensor, targets: Tensor, done: float) -> Tensor:
        with torch.no_grad(), self.compute.autocast():
            answers, theirs = inner.teacher(inputs)
        with self.compute.autocast():
            outputs, ours = inner.student(inputs)
            distance = inner.hints(ours, theirs)
        distill = self.policy.distill
        loss = blended_loss(outputs.float(), targets, answers.float(), distill, done, self.task.loss)
        return loss + distill.feature_weight * distance


def probe(trainer: Trainer, module: nn.Module, policy: Policy, rounds: int = 4) -> tuple[Compute, dict[str, float]]:
    """The fastest of the ways to train on the trainer's device, and the milliseconds a step of each.

    The ways take turns and the quickest turn of each counts: what else the machine does only ever adds.
    The module's weights are left as they were.
    """
    device = trainer.compute.device
    options = {
        "fp32": Compute(device=device),
        "fp32 channels_last": Compute(device=device, channels_last=True),
    }
    if has_fast_bf16(device):
        options["bf16 channels_last"] = Compute(device=device, channels_last=True, bf16=True)
    if device == "cpu" and any(
        map(is_risky, module.modules())
    ):  # it is the given network, whose layers are torch's own
        options = {"fp32": options["fp32"]}
    trials = {name: replace(trainer, compute=compute) for name, compute in options.items()}
    start_state = {k: v.clone() for k, v in module.state_dict().items()}
    step_ms = dict.fromkeys(options, math.inf)
    for turn in range(rounds + 1):
        for name, trial in trials.items():
            start = time.perf_counter()
            trial.fit(module, policy, steps=_PROBE_STEPS, seed=0)
            if turn:  # the first is a warm-up
                step_ms[name] = min(step_ms[name], 1000 * (time.perf_counter() - start) / _PROBE_STEPS)
    module.load_state_dict(start_state)
    return options[min(step_ms, key=lambda k: step_ms[k])], step_ms


@contextmanager
def bypassed(sites: Iterable[ActivationQuantiser]) -> Generator[None]:
    """Activation quantisers that let everything through unchanged."""
    held = list(sites)
    for site in held:
        site.bypassed = True
    try:
        yield
    finally:
        for site in held:
            site.bypassed = False


def sgd(parameters: Parameters, learning_rate: float) -> torch.optim.SGD:
    """Weight decay is for weights; batch norms and biases go without."""
    trained = [*parameters[0], *parameters[1]]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 5e-4},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
