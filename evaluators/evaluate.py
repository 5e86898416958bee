"""What a policy is worth at a rung: an idempotent function of (policy, rung, seed, steps).

It runs in worker processes. The task is built once a process; results travel back as plain values, trained
weights as checkpoints that are written whole or not at all.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from ..spaces.anatomy import Anatomy
from ..spaces.files import write_whole
from ..spaces.plan import Plan
from ..spaces.policy import Policy, digest
from ..spaces.stages import stage_policies
from .apply import Compressor, Evidence, compressor
from .bake import bake
from .compute import Compute
from .data import Arrays, materialise, split_search
from .importance import SAMPLES
from .inspect import network_of
from .onnx_graph import build_onnx
from .pausing import Place, read_place, read_weights
from .quality import Score, answers, judge, outputs_of, score
from .runtime import check_bits, check_grids, open_session
from .sparsity import sparsify
from .staged import cut_further, widened
from .task import Task, load_task, picked
from .training import Trainer

RUNGS = ("bn", "part", "short", "long")
_BEFORE = {"part": "bn", "short": "bn", "long": "short"}
"""The rung whose weights a fine-tune begins with."""
GIVEN, SENSITIVITY = "given", "sensitivity"
SENSITIVITY_ITEMS = 256
BN_ITEMS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a worker needs to build its evaluator. ``base`` is the folder that the task's path starts from."""

    task: str
    base: str | None
    anatomy: Anatomy
    seed: int
    compute: Compute
    batch_size: int
    threads: int
    disabled_optimizers: tuple[str, ...] = ()
    runtime: str = "onnxruntime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One evaluation. ``folder`` holds the trial's checkpoints; ``steps`` is the fine-tune's length.

    The rung ``part`` is the short fine-tune up to its step ``stop``; the short one goes on from there. ``looks`` are
    steps of a short fine-tune at which it is judged on its way, ascending. An ``untrained`` policy is exported as the
    lowest rung left it. ``rate`` multiplies the policy's learning rate.

    ``rung`` is one of :data:`RUNGS`, ``given`` (the given weights on both splits) or ``sensitivity``
    (how far batch-norm re-estimation alone leaves the outputs from the uncompressed model's). ``batch_size`` takes the
    place of the recipe's where that was too large for the memory; evaluations then run in batches as small.
    """

    policy: Policy
    rung: str
    seed: int
    steps: int
    folder: Path
    batch_size: int | None = None
    stop: int | None = None
    looks: tuple[int, ...] = ()
    untrained: bool = False
    rate: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a job, trained at ``rate`` times the policy's learning rate. ``looks`` are pairs of a step and the
    accuracy there. ``divergence`` is the mean KL divergence from the uncompressed model in nats (sensitivity only);
    what follows it are the finalists' own: test split, export and parity. ``answers`` are the exported file's, by
    :func:`answers`."""

    search: Score
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    looks: tuple[tuple[int, float], ...] = ()
    divergence: float | None = None
    simulated: Score | None = None
    exported: Score | None = None
    top1_agreement: float | None = None
    max_abs_diff: float | None = None
    bits_used: dict[str, str] | None = None
    size_bytes: int | None = None
    rate: float = 1.0
    answers: str | None = None


@dataclass(slots=True, kw_only=True)
class _Course:
    """A fine-tune under way: the module at the ``number``-th of its policy's stages, and what it was made by."""

    stages: tuple[Policy, ...]
    number: int
    compressed: Compressor
    module: fx.GraphModule
    plan: Plan
    place: Place = field(default_factory=Place)

    def ends(self, steps: int) -> tuple[int, int]:
        """The steps between which the present stage lies."""
        return _step_at(self.number, self.stages, steps), _step_at(self.number + 1, self.stages, steps)

    @property
    def span(self) -> tuple[float, float]:
        return self.number / len(self.stages), (self.number + 1) / len(self.stages)

    @property
    def last(self) -> bool:
        return self.number == len(self.stages) - 1


class Evaluator:
    """Runs jobs on one task in one process."""

    def __init__(self, recipe: Recipe, task: Task | None = None) -> None:
        torch.set_num_threads(recipe.threads)
        self.recipe = recipe
        self.compute = recipe.compute
        self.task = task or load_task(recipe.task, Path(recipe.base) if recipe.base else None)
        train, self.search = split_search(materialise(self.task.train), seed=recipe.seed)
        self.compressor: Compressor = compressor(
            recipe.anatomy,
            network_of(self.task, recipe.anatomy),
            self.task.example_input,
            evidence_of(self.task, train),
        )
        self.model = picked(self.task, self.task.model)
        self.trainer = Trainer(
            self.task, train, recipe.compute, recipe.seed, recipe.batch_size,
            uncompressed=lambda: self.compressor.whole(),
        )  # fmt: skip
        self._test: Arrays | None = None
        self._given_outputs: torch.Tensor | None = None

    @property
    def test(self) -> Arrays:
        """The test split, loaded when a finalist needs it."""
        if self._test is None:
            self._test = materialise(self.task.test)
        return self._test

    def __call__(self, job: Job, progress: Callable[[float], None] | None = None) -> Outcome:
        """Evaluate. Raises DivergedError, MemoryError, or whatever the user's code raises."""
        start = time.perf_counter()
        _give_back_memory()
        self.trainer.batch_size = job.batch_size or self.recipe.batch_size
        compute = self.recipe.compute
        self.compute = replace(compute, evaluation_batch=job.batch_size or compute.evaluation_batch)
        if job.rung == GIVEN:
            search, test = (judge(self.model, split, self.task, self.compute) for split in (self.search, self.test))
            return Outcome(search=search, exported=test, seconds=time.perf_counter() - start)
        if job.rung == SENSITIVITY:
            return replace(self.sensitivity(self.prepare(job)[0]), seconds=time.perf_counter() - start)
        if job.looks:
            return replace(self._looked(job, progress), seconds=time.perf_counter() - start)
        if job.rung == "bn":
            module, plan, losses, kept = *self.prepare(job), (), {}
        elif job.untrained:
            module, plan, losses, kept = *self.prepare(replace(job, rung="short")), (), {}
        else:
            module, plan, losses, kept = self._trained(job, progress)
        save_checkpoint(module, checkpoint(job.folder, job.rung), kept)
        # The lowest rung only sorts out the hopeless: fewer examples will do, and its standard error says so.
        split = self.search.take(torch.arange(min(len(self.search), BN_ITEMS))) if job.rung == "bn" else self.search
        found = judge(module, split, self.task, self.compute)
        outcome = Outcome(search=found, losses=losses, rate=job.rate)
        if job.rung == "long":
            outcome = self.export(job, module, plan, outcome)
        return replace(outcome, seconds=time.perf_counter() - start)

    def _looked(self, job: Job, progress: Callable[[float], None] | None) -> Outcome:
        """A short fine-tune that is judged on its way; what it is at its end is not changed by that."""
        parts = [self(replace(job, rung="part", stop=step, looks=()), progress) for step in job.looks]
        outcome = self(replace(job, looks=()), progress)
        looks = tuple((step, part.search.accuracy) for step, part in zip(job.looks, parts, strict=True))
        return replace(outcome, looks=looks, losses=sum((p.losses for p in parts), ()) + outcome.losses)

    def prepare(self, job: Job) -> tuple[fx.GraphModule, Plan]:
        """The module as the rung before left it; from the policy where there is no such checkpoint."""
        before = _BEFORE.get(job.rung)
        if before is not None and checkpoint(job.folder, before).is_file():
            return self.load(job.policy, checkpoint(job.folder, before))
        module, plan = self.compressor.apply(job.policy)
        self._settle(module, job.policy)
        return module, plan

    def _settle(self, module: fx.GraphModule, policy: Policy) -> None:
        """Masks, and batch norms and ranges that fit the compressed module."""
        sparsify(module, policy.sparsity)
        few_bits = any(pair.weights < 8 for pair in policy.bits.values())
        if policy.prune or policy.removed_blocks or policy.sparsity or few_bits:
            self.trainer.reestimate(module)
        else:  # the statistics that the model came with fit it better than those of a few items
            self.trainer.observe(module)

    def train(
        self, job: Job, progress: Callable[[float], None] | None = None
    ) -> tuple[fx.GraphModule, Plan, tuple[float, ...]]:
        """The fine-tune of a rung, with the losses of its parts. The first fine-tune of a policy prunes in stages
        where the policy says so, each with an equal share of the steps."""
        return self._trained(job, progress)[:3]

    def _trained(
        self, job: Job, progress: Callable[[float], None] | None
    ) -> tuple[fx.GraphModule, Plan, tuple[float, ...], Mapping[str, Tensor]]:
        """The fine-tune of a rung, with what its checkpoint needs beside the weights."""
        course = self._course(job)
        stop = job.steps if job.stop is None else job.stop
        losses = self._fit(course, job, stop, progress)
        while not course.last and course.ends(job.steps)[1] < stop:
            self._next_stage(course)
            losses += self._fit(course, job, stop, progress)
        if job.rung != "part":
            return course.module, course.plan, losses, {}
        course.place.step = stop
        if course.last:
            return course.module, course.plan, losses, course.place.tensors()
        # What is judged is the policy: what its last stage would cut is cut now, beside the fine-tune.
        course.place.stage = course.module.state_dict()
        course.place.wide = dict(course.compressed.network.state) if course.number else {}
        _, module, plan = cut_further(course.compressed, course.module, course.stages[course.number], job.policy)
        self._settle(module, job.policy)
        return module, plan, losses, course.place.tensors()

    def _course(self, job: Job) -> _Course:
        """Where a rung's fine-tune begins: where a part of it ended, else at its policy's first stage."""
        stages, path = stage_policies(job.policy, self.recipe.anatomy), checkpoint(job.folder, "part")
        if job.rung == "long" and checkpoint(job.folder, "short").is_file():
            stages = stages[-1:]
        place = read_place(path) if job.rung != "long" else None
        if place is not None and place.step <= (job.steps if job.stop is None else job.stop):
            return self._resumed(job, stages, place)
        if len(stages) == 1:
            module, plan = self.prepare(job)
        else:
            module, plan = self.compressor.apply(stages[0])
            self._settle(module, stages[0])
        return _Course(stages=stages, number=0, compressed=self.compressor, module=module, plan=plan)

    def _resumed(self, job: Job, stages: tuple[Policy, ...], place: Place) -> _Course:
        """The course as a part of it left it."""
        number = next(k for k in range(len(stages)) if place.step <= _step_at(k + 1, stages, job.steps))
        compressed = widened(self.compressor, place.wide) if place.wide else self.compressor
        module, plan = compressed.shell(stages[number])
        module.load_state_dict(place.stage or read_weights(checkpoint(job.folder, "part")))
        place.step -= _step_at(number, stages, job.steps)
        return _Course(stages=stages, number=number, compressed=compressed, module=module, plan=plan, place=place)

    def _next_stage(self, course: _Course) -> None:
        before, after = course.stages[course.number : course.number + 2]
        course.compressed, course.module, course.plan = cut_further(course.compressed, course.module, before, after)
        self._settle(course.module, after)
        course.number, course.place = course.number + 1, Place()

    def _fit(self, course: _Course, job: Job, stop: int, progress: Callable[[float], None] | None) -> tuple[float, ...]:
        """The steps of the present stage up to ``stop`` of the whole fine-tune."""
        (begin, end), span = course.ends(job.steps), course.span
        told = None if progress is None else lambda done: progress(span[0] + (span[1] - span[0]) * done)
        policy = course.stages[course.number]
        finetune = replace(policy.finetune, learning_rate=policy.finetune.learning_rate * job.rate)
        return self.trainer.fit(
            course.module, replace(policy, finetune=finetune), steps=end - begin, seed=job.seed + begin,
            simulate=job.rung == "long", span=span, progress=told, place=course.place, stop=min(stop, end) - begin,
        )  # fmt: skip

    def load(self, policy: Policy, path: Path) -> tuple[fx.GraphModule, Plan]:
        """A policy's module with the weights of a checkpoint."""
        module, plan = self.compressor.shell(policy)
        module.load_state_dict(read_weights(path))
        return module, plan

    def sensitivity(self, module: fx.GraphModule) -> Outcome:
        """Mean KL(uncompressed ‖ compressed) over the first items of the search split."""
        part = Arrays(self.search.inputs[:SENSITIVITY_ITEMS], self.search.targets[:SENSITIVITY_ITEMS])
        outputs = outputs_of(module, part, self.task, self.compute)
        if self._given_outputs is None:
            self._given_outputs = outputs_of(self.model, part, self.task, self.compute)
        divergence = F.kl_div(
            F.log_softmax(outputs, dim=1),
            F.log_softmax(self._given_outputs, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return Outcome(search=score(outputs, part, self.task), divergence=float(divergence))

    def export(self, job: Job, module: fx.GraphModule, plan: Plan, outcome: Outcome) -> Outcome:
        """Write ``model.onnx`` beside the checkpoint and compare it with the simulation on the whole test split."""
        path = job.folder / "model.onnx"
        write_onnx(module, plan, job.policy, path)
        session = open_session(
            path, self.recipe.runtime, threads=self.recipe.threads,
            disabled_optimizers=self.recipe.disabled_optimizers,
        )  # fmt: skip
        start = time.perf_counter()
        exported = session.outputs(self.task.model_inputs(self.test.inputs))
        seconds = time.perf_counter() - start
        simulated = outputs_of(module, self.test, self.task, self.compute)
        used = session.bits_used(plan)
        check_bits(used, plan)
        check_grids(path, plan)
        agreement = float((simulated.argmax(dim=1) == exported.argmax(dim=1)).float().mean())
        return replace(
            outcome,
            simulated=score(simulated, self.test, self.task),
            exported=score(exported, self.test, self.task, seconds),
            top1_agreement=agreement,
            max_abs_diff=float((simulated - exported).abs().max()),
            bits_used=used,
            size_bytes=path.stat().st_size,
            answers=answers(exported, self.test, self.task),
        )


def evidence_of(task: Task, train: Arrays) -> Evidence:
    """What the importances look at: the first items of the (shuffled) training split, as the model takes them."""
    return lambda: (task.model_inputs(train.inputs[:SAMPLES]), train.targets[:SAMPLES], task.loss)


def write_onnx(module: fx.GraphModule, plan: Plan, policy: Policy, path: Path) -> None:
    """The module as an ONNX file with a dynamic batch axis, whole or not at all."""
    metadata = {"nightpress.policy": digest(policy), "nightpress.model": policy.model}
    data = build_onnx(plan, bake(module.cpu(), plan), batch=None, metadata=metadata)
    write_whole(path, lambda partial: partial.write_bytes(data))


def checkpoint(folder: Path, rung: str) -> Path:
    """Where a rung leaves its weights."""
    return folder / f"{rung}.safetensors"


def _step_at(number: int, stages: tuple[Policy, ...], steps: int) -> int:
    """The step at which a stage begins: each has an equal share."""
    return round(steps * (number / len(stages)))


def _give_back_memory() -> None:
    """What the trial before has freed: glibc keeps it in pieces, and a process grew by 8 % over 200 trials."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def save_checkpoint(module: nn.Module, path: Path, kept: Mapping[str, Tensor] | None = None) -> None:
    """State dict as safetensors, whole or not at all; ``kept`` is what a fine-tune needs to go on."""
    weights = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    tensors = {**weights, **{k: v.contiguous() for k, v in (kept or {}).items()}}
    write_whole(path, lambda partial: save_file(tensors, partial))
