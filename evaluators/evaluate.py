"""What a policy is worth at a rung: an idempotent function of (policy, rung, seed, steps).

It runs in worker processes. The task is built once a process; results travel back as plain values, trained
weights as checkpoints that are written whole or not at all.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import fx, nn

from ..spaces.anatomy import Anatomy
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
from .quality import Score, judge, outputs_of, score
from .runtime import check_bits, open_session
from .sparsity import sparsify
from .staged import cut_further
from .task import Task, load_task, picked
from .training import Trainer

RUNGS = ("bn", "short", "long")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a job. ``divergence`` is the mean KL divergence from the uncompressed model in nats
    (sensitivity only); what follows it are the finalists' own: test split, export and parity."""

    search: Score
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    divergence: float | None = None
    simulated: Score | None = None
    exported: Score | None = None
    top1_agreement: float | None = None
    max_abs_diff: float | None = None
    bits_used: dict[str, str] | None = None
    size_bytes: int | None = None


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
        module, plan, losses = (*self.prepare(job), ()) if job.rung == "bn" else self.train(job, progress)
        save_checkpoint(module, checkpoint(job.folder, job.rung))
        # The lowest rung only sorts out the hopeless: fewer examples will do, and its standard error says so.
        split = self.search.take(torch.arange(min(len(self.search), BN_ITEMS))) if job.rung == "bn" else self.search
        found = judge(module, split, self.task, self.compute)
        outcome = Outcome(search=found, losses=losses)
        if job.rung == "long":
            outcome = self.export(job, module, plan, outcome)
        return replace(outcome, seconds=time.perf_counter() - start)

    def prepare(self, job: Job) -> tuple[fx.GraphModule, Plan]:
        """The module as the rung before left it; from the policy where there is no such checkpoint."""
        rung = RUNGS.index(job.rung) if job.rung in RUNGS else 0
        before = RUNGS[rung - 1] if rung else None
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
        stages = stage_policies(job.policy, self.recipe.anatomy)
        if job.rung == "long" and checkpoint(job.folder, "short").is_file():
            stages = stages[-1:]
        if len(stages) == 1:
            module, plan = self.prepare(job)
            return module, plan, self._fit(module, job, job.policy, (0.0, 1.0), progress)
        compressed, losses = self.compressor, ()
        module, plan = compressed.apply(stages[0])
        for number, (before, stage) in enumerate(zip((stages[0], *stages), stages, strict=False)):
            if number:
                compressed, module, plan = cut_further(compressed, module, before, stage)
            self._settle(module, stage)
            span = number / len(stages), (number + 1) / len(stages)
            losses += self._fit(module, job, stage, span, progress)
        return module, plan, losses

    def _fit(
        self, module: fx.GraphModule, job: Job, policy: Policy, span: tuple[float, float],
        progress: Callable[[float], None] | None,
    ) -> tuple[float, ...]:  # fmt: skip
        begin, end = (round(job.steps * share) for share in span)
        told = None if progress is None else lambda done: progress(span[0] + (span[1] - span[0]) * done)
        return self.trainer.fit(
            module, policy, steps=end - begin, seed=job.seed + begin, simulate=job.rung == "long", span=span,
            progress=told,
        )  # fmt: skip

    def load(self, policy: Policy, path: Path) -> tuple[fx.GraphModule, Plan]:
        """A policy's module with the weights of a checkpoint."""
        module, plan = self.compressor.shell(policy)
        module.load_state_dict(load_file(path))
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
        agreement = float((simulated.argmax(dim=1) == exported.argmax(dim=1)).float().mean())
        return replace(
            outcome,
            simulated=score(simulated, self.test, self.task),
            exported=score(exported, self.test, self.task, seconds),
            top1_agreement=agreement,
            max_abs_diff=float((simulated - exported).abs().max()),
            bits_used=used,
            size_bytes=path.stat().st_size,
        )


def evidence_of(task: Task, train: Arrays) -> Evidence:
    """What the importances look at: the first items of the (shuffled) training split, as the model takes them."""
    return lambda: (task.model_inputs(train.inputs[:SAMPLES]), train.targets[:SAMPLES], task.loss)


def write_onnx(module: fx.GraphModule, plan: Plan, policy: Policy, path: Path) -> None:
    """The module as an ONNX file with a dynamic batch axis, whole or not at all."""
    metadata = {"nightpress.policy": digest(policy), "nightpress.model": policy.model}
    data = build_onnx(plan, bake(module.cpu(), plan), batch=None, metadata=metadata)
    _write(path, data)


def checkpoint(folder: Path, rung: str) -> Path:
    """Where a rung leaves its weights."""
    return folder / f"{rung}.safetensors"


def _give_back_memory() -> None:
    """What the trial before has freed: glibc keeps it in pieces, and a process grew by 8 % over 200 trials."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def save_checkpoint(module: nn.Module, path: Path) -> None:
    """State dict as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, partial)
    partial.replace(path)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
