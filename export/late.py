"""A point that the night did not verify (it was interrupted, or the point was no finalist), exported all the same:
its latest weights are exported, compared on the test split and measured now."""

import logging
from pathlib import Path

from ..evaluators.compute import Compute
from ..evaluators.evaluate import RUNGS, Evaluator, Job, Recipe, checkpoint
from ..evaluators.inspect import inspect
from ..evaluators.latency.measure import Timer
from ..evaluators.latency.target import Target, target_from_dict
from ..evaluators.onnx_graph import build_onnx, random_tensors
from ..evaluators.task import load_task
from ..search.finalists import verified_of
from ..search.records import RunRecord, TrialRecord, Verified
from ..search.store import policy_of
from ..spaces.errors import InputError
from ..spaces.plan import plan
from ..spaces.policy import Policy

log = logging.getLogger("nightpress")


def target_of(run: RunRecord) -> Target:
    """The run's target."""
    return target_from_dict(run.config["target"])


def verify_now(run: RunRecord, trial: TrialRecord, folder: Path) -> Verified:
    """Export into ``folder`` (model.onnx and long.safetensors), compare and measure.

    Raises InputError when the trial left no weights or its task has changed since.
    """
    source = run.path / "artifacts" / str(trial.number if trial.reused_from is None else trial.reused_from)
    reached = [rung for rung in RUNGS if checkpoint(source, rung).is_file()]
    if not reached:
        raise InputError(f"{run.path}: trial {trial.number} ({trial.state}) left no weights, so it cannot be exported.")
    log.info("trial %d was not verified during the night: exporting its %s weights now", trial.number, reached[-1])
    target = target_of(run)
    task = load_task(run.config["task"], Path(run.config["base"]) if run.config["base"] else None)
    anatomy, _ = inspect(task, step_of=target.channel_step)
    if anatomy.digest != run.state["model"]:
        raise InputError(
            f"{run.path}: the task's model is {anatomy.digest} now, but the run was made with {run.state['model']}."
        )
    recipe = Recipe(
        task=run.config["task"], base=run.config["base"], anatomy=anatomy, seed=run.config["seed"], compute=Compute(),
        batch_size=run.config["finetune"]["batch_size"], threads=1, disabled_optimizers=target.disabled_optimizers,
    )  # fmt: skip
    evaluator = Evaluator(recipe, task)
    policy = policy_of(trial)
    checkpoint(folder, "short").write_bytes(checkpoint(source, reached[-1]).read_bytes())
    outcome = evaluator(Job(policy=policy, rung="long", seed=run.config["seed"], steps=0, folder=folder))
    reference = folder / "reference.onnx"
    uncompressed = plan(anatomy, Policy(model=anatomy.digest))
    reference.write_bytes(build_onnx(uncompressed, random_tensors(uncompressed), batch=None))
    with Timer(target) as timer:
        timing = timer.time({"model": folder / "model.onnx"}, reference)["model"]
    reference.unlink()
    return verified_of(outcome, timing, rung=reached[-1], model_file="", struck_out=None)
