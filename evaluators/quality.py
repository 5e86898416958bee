"""Training a compressed module and judging it: batch-norm re-estimation, the fine-tune with distillation, accuracy.

Augmented views of the training data are made once and kept, with the teacher's answers to them, so that a
trial pays for neither (both are the same for every trial of a night).
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spaces.policy import Distill, Policy
from .data import Arrays
from .quantise import ActivationQuantiser, quantisers
from .task import Task

EVALUATION_BATCH = 256
REESTIMATION_ITEMS = 256
RANGE_ITEMS = 128
VIEW_BYTES = 1 << 30
MAX_VIEWS = 8
_LOSS_PARTS = 10
_PROBE_STEPS = 2
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class DivergedError(RuntimeError):
    """The training loss stopped being a finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """How this machine trains fastest: see :func:`probe`."""

    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = False

    def cast(self, value: Tensor) -> Tensor:
        value = value.to(self.device, non_blocking=True)
        return value.contiguous(memory_format=torch.channels_last) if self._image(value) else value

    def module(self, module: nn.Module) -> nn.Module:
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module  # type: ignore[call-overload]

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def _image(self, value: Tensor) -> bool:
        return self.channels_last and value.dim() == 4


@dataclass(slots=True)
class Trainer:
    """Data, teacher and compute that all trials of a process share. ``train`` is what is left of the training
    data once the search split is taken out."""

    task: Task
    train: Arrays
    compute: Compute
    seed: int
    batch_size: int = 64
    views: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    answers: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def reestimate(self, module: nn.Module) -> None:
        """Batch-norm statistics and quantiser ranges anew, from forward passes over a few training items.

        Two passes: the ranges are taken once the statistics have settled.
        """
        inputs = self.train.inputs[:REESTIMATION_ITEMS].float()
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
        self._pass_through(module, self.train.inputs[:RANGE_ITEMS].float())
        for site in sites:
            site.observing = False

    @torch.no_grad()
    def _pass_through(self, module: nn.Module, inputs: Tensor) -> None:
        for start in range(0, len(inputs), self.batch_size * 2):
            module(self.compute.cast(inputs[start : start + self.batch_size * 2]))

    def fit(
        self, module: nn.Module, policy: Policy, *, steps: int, seed: int, simulate: bool = True,
        progress: Callable[[float], None] | None = None,
    ) -> tuple[float, ...]:  # fmt: skip
        """Train in place for ``steps`` steps; returns the mean loss over each tenth of them.

        SGD with Nesterov momentum, weight decay, warm-up and cosine, gradient norm clipped to 1. ``simulate``
        trains with quantised activations; without it they are left alone, which is much quicker, and their ranges
        are taken afterwards (weights are always on their grid: few bits need the training).
        Raises DivergedError when the loss is no longer finite.
        """
        self.compute.module(module).train()
        if simulate:
            losses = self._loop(module, policy, steps, seed, progress)
        else:
            with bypassed(quantisers(module).values()):
                losses = self._loop(module, policy, steps, seed, progress)
            self.observe(module)
        module.eval()
        return losses

    def _loop(
        self, module: nn.Module, policy: Policy, steps: int, seed: int, progress: Callable[[float], None] | None
    ) -> tuple[float, ...]:
        trained = [p for p in module.parameters() if p.requires_grad]
        optimiser = _optimiser(trained, policy.finetune.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warm_cosine(step, steps))
        means: list[float] = []
        running = torch.zeros((), device=self.compute.device)
        part, counted = max(1, math.ceil(steps / _LOSS_PARTS)), 0
        for step, batch in enumerate(self._batches(policy.distill, steps, seed)):
            running += self._step(module, optimiser, trained, batch, policy.distill, step / steps)
            schedule.step()
            counted += 1
            if counted == part or step == steps - 1:  # one look at the loss a tenth: no host sync a step
                means.append(float(running) / counted)
                if not math.isfinite(means[-1]):
                    raise DivergedError(f"the training loss became {means[-1]} by step {step + 1} of {steps}")
                running.zero_()
                counted = 0
                if progress is not None:
                    progress((step + 1) / steps)
        return tuple(means)

    def _step(
        self, module: nn.Module, optimiser: torch.optim.Optimizer, trained: list[nn.Parameter],
        batch: tuple[Tensor, Tensor, Tensor | None], distill: Distill, done: float,
    ) -> Tensor:  # fmt: skip
        inputs, targets, answers = batch
        optimiser.zero_grad(set_to_none=True)
        with self.compute.autocast():
            outputs = module(inputs)
        loss = blended_loss(outputs.float(), targets, answers, distill, done, self.task.loss)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        return loss.detach()

    def _batches(self, distill: Distill, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(seed)
        count, size = len(self.train.targets), min(self.batch_size, len(self.train.targets))
        done, epoch = 0, 0
        while done < steps:
            view = epoch % self._view_count()
            inputs = self._view(view)
            answers = self._answers(view) if distill.method != "none" else None
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                if done == steps:
                    return
                index = order[start : start + size]
                yield (
                    self.compute.cast(inputs[index].float()),
                    self.train.targets[index].to(self.compute.device),
                    answers[index].to(self.compute.device) if answers is not None else None,
                )
                done += 1
            epoch += 1

    def _view_count(self) -> int:
        size = self.train.inputs.numel() * self.train.inputs.element_size()
        return max(1, min(MAX_VIEWS, VIEW_BYTES // max(1, size))) if self.task.augment else 1

    def _view(self, number: int) -> Tensor:
        if self.task.augment is None:
            return self.train.inputs
        if number not in self.views:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed * MAX_VIEWS + number)
                parts = [self.task.augment(part) for part in self.train.inputs.split(EVALUATION_BATCH)]
            self.views[number] = torch.cat(parts)
        return self.views[number]

    def _answers(self, number: int) -> Tensor:
        """The teacher's logits on a view, shape (items, classes)."""
        if number not in self.answers:
            teacher = self.compute.module(self.task.teacher or self.task.model).eval()
            with torch.no_grad(), self.compute.autocast():
                parts = [
                    teacher(self.compute.cast(part.float())).float().cpu()
                    for part in self._view(number).split(EVALUATION_BATCH)
                ]
            self.answers[number] = torch.cat(parts)
        return self.answers[number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The metric over a split, its standard error (None for metrics whose error is not known), seconds."""

    accuracy: float
    accuracy_se: float | None
    samples: int
    seconds: float


def outputs_of(module: nn.Module, arrays: Arrays, compute: Compute) -> Tensor:
    """The module's fp32 outputs over a split, shape (items, …)."""
    compute.module(module).eval()
    with torch.no_grad():
        parts = [module(compute.cast(part.float())).float().cpu() for part in arrays.inputs.split(EVALUATION_BATCH)]
    return torch.cat(parts)


def score(outputs: Tensor, arrays: Arrays, task: Task, seconds: float = 0.0) -> Score:
    """The task's metric, top-1 accuracy by default with its binomial standard error.

    Raises DivergedError when an output or the metric is not finite.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise DivergedError("the network's outputs are not finite")
    if task.metric is not None:
        value, error = float(task.metric(outputs, arrays.targets)), None
        if not math.isfinite(value):
            raise DivergedError(f"the task's metric is {value}")
    else:
        value = float((outputs.argmax(dim=1) == arrays.targets).float().mean())
        error = math.sqrt(value * (1 - value) / len(arrays.targets))
    return Score(accuracy=value, accuracy_se=error, samples=len(arrays.targets), seconds=seconds)


def judge(module: nn.Module, arrays: Arrays, task: Task, compute: Compute) -> Score:
    """:func:`score` of a module, timed; always in fp32."""
    start = time.perf_counter()
    outputs = outputs_of(module, arrays, compute)
    return score(outputs, arrays, task, time.perf_counter() - start)


def blended_loss(
    outputs: Tensor, targets: Tensor, answers: Tensor | None, distill: Distill, done: float,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    """α·T²·KL(teacher ‖ student) + (1−α)·loss; ``done`` in [0, 1) moves the temperature."""
    hard = (loss or F.cross_entropy)(outputs, targets)
    if answers is None or distill.method == "none":
        return hard
    temperature = temperature_at(distill, done)
    soft = F.kl_div(
        F.log_softmax(outputs / temperature, dim=1), F.log_softmax(answers / temperature, dim=1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return distill.alpha * temperature**2 * soft + (1 - distill.alpha) * hard


def temperature_at(distill: Distill, done: float) -> float:
    """The distillation temperature when a share ``done`` of the fine-tune has passed."""
    if distill.schedule == "halving":
        return max(1.0, distill.temperature / 2 ** int(done * 4))
    if distill.schedule == "linear":
        low = min(1.5, distill.temperature)
        return distill.temperature + (low - distill.temperature) * done
    return distill.temperature


def probe(trainer: Trainer, module: nn.Module, policy: Policy, rounds: int = 4) -> tuple[Compute, dict[str, float]]:
    """The fastest of the ways to train on the trainer's device, and the milliseconds a step of each.

    The ways take turns and the quickest turn of each counts: what else the machine does only ever adds.
    The module's weights are left as they were.
    """
    device = trainer.compute.device
    options = {
        "fp32": Compute(device=device),
        "fp32 channels_last": Compute(device=device, channels_last=True),
        "bf16 channels_last": Compute(device=device, channels_last=True, bf16=True),
    }
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


def _optimiser(trained: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Weight decay is for weights; batch norms and biases go without."""
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
