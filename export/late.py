"""What the night did not measure, measured now: weights of a task's policy, trained further where that is asked for,
exported, compared on the test split and timed beside the original."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..evaluators.compute import Compute
from ..evaluators.evaluate import RUNGS, Evaluator, Job, Recipe, checkpoint
from ..evaluators.inspect import inspect
from ..evaluators.latency.measure import Timer
from ..evaluators.latency.target import Target, check_target
from ..evaluators.onnx_graph import build_onnx, random_tensors
from ..evaluators.task import load_task
from ..search.records import RunRecord, TrialRecord, Verified
from ..search.session import latency_of
from ..search.store import policy_of
from ..search.verification import verified_of
from ..spaces.errors import InputError
from ..spaces.plan import plan
from ..spaces.policy import Policy
from .origin import Origin

log = logging.getLogger("nightpress")
MODEL, WEIGHTS, REFERENCE = "model.onnx", "model.safetensors", "reference.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What to measure: ``file`` holds the weights of ``policy`` on the task's model; ``rung`` says how they came to
    be. ``epochs`` of training with quantisation simulated come first."""

    task: str
    policy: Policy
    file: Path
    rung: str
    target: Target
    batch_size: int
    seed: int
    epochs: float = 0.0


def verify_now(run: RunRecord, trial: TrialRecord, origin: Origin, folder: Path) -> Verified:
    """A trial's latest weights, measured into ``folder``.

    Raises InputError when the trial left no weights, its task has changed since, or this machine cannot run the target.
    """
    if (run.target or {}).get("remote"):
        raise InputError(
            f"{run.path}: trial {trial.number} was not verified during the night, and its profile is of another "
            "device than this machine, so it cannot be measured here."
        )
    number = trial.number if trial.reused_from is None else trial.reused_from
    if not str(number).isdigit():  # a record from elsewhere may hold a path
        raise InputError(f"{run.path}: trial {trial.number} reuses {number!r}, which is no trial's number.")
    source = run.path / "artifacts" / str(number)
    reached = [rung for rung in RUNGS if checkpoint(source, rung).is_file()]
    if not reached:
        raise InputError(f"{run.path}: trial {trial.number} ({trial.state}) left no weights, so it cannot be exported.")
    log.info("trial %d was not verified during the night: exporting its %s weights now", trial.number, reached[-1])
    weights = Weights(
        task=origin.task, policy=policy_of(trial), file=checkpoint(source, reached[-1]), rung=reached[-1],
        target=origin.target, batch_size=origin.batch_size, seed=origin.seed,
    )  # fmt: skip
    return measure_weights(weights, folder, f"{run.path}: the run was made with", str(run.state["model"]))


def measure_weights(weights: Weights, folder: Path, whose: str, model: str) -> Verified:
    """Write model.onnx, model.safetensors and reference.onnx into ``folder``; returns what was measured.

    Raises InputError when this machine cannot run the target, and, beginning with ``whose``, when the task's model is
    not ``model`` any more.
    """
    check_target(weights.target)  # before hours of training that could not be timed
    task = load_task(weights.task)
    anatomy, _ = inspect(task, step_of=weights.target.channel_step)
    if anatomy.digest != model:
        raise InputError(f"{whose} model {model}, but the task's model is {anatomy.digest} now.")
    threads = len(os.sched_getaffinity(0)) if weights.epochs else 1
    recipe = Recipe(
        task=weights.task, base=None, anatomy=anatomy, seed=weights.seed, compute=Compute(),
        batch_size=weights.batch_size, threads=threads, disabled_optimizers=weights.target.disabled_optimizers,
        runtime=weights.target.runtime,
    )  # fmt: skip
    evaluator = Evaluator(recipe, task)
    epoch = max(1, len(evaluator.trainer.train) // weights.batch_size)
    steps = round(weights.epochs * epoch)
    if steps:
        log.info("training %g epochs of %d steps", weights.epochs, epoch)
    # The long rung goes on from what the short one left.
    checkpoint(folder, "short").write_bytes(weights.file.read_bytes())
    outcome = evaluator(Job(policy=weights.policy, rung="long", seed=weights.seed, steps=steps, folder=folder))
    checkpoint(folder, "short").unlink()
    checkpoint(folder, "long").rename(folder / WEIGHTS)
    uncompressed = plan(anatomy, Policy(model=anatomy.digest))
    (folder / REFERENCE).write_bytes(build_onnx(uncompressed, random_tensors(uncompressed), batch=None))
    with Timer(weights.target) as timer:
        timing = timer.time({"model": folder / MODEL}, folder / REFERENCE)["model"]
    return verified_of(outcome, latency_of(timing), rung=weights.rung, model_file="", struck_out=None)
