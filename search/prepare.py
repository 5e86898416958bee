"""Before the search: inspect the model, calibrate the target, size the rungs, probe the sensitivities."""

import copy
import hashlib
import json
import logging
import math
import os
import platform
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..evaluators import dryrun
from ..evaluators.apply import compressor
from ..evaluators.compute import Compute
from ..evaluators.data import Arrays, materialise, split_search
from ..evaluators.evaluate import GIVEN, SENSITIVITY, Evaluator, Job, Recipe
from ..evaluators.importance import saliency, scores
from ..evaluators.inspect import inspect, network_of
from ..evaluators.latency.capabilities import (
    MEASURED_BESIDE,
    Capabilities,
    beside_profile,
    capabilities,
    capabilities_from_dict,
    fewer_bits_are_faster,
    measure_capabilities,
)
from ..evaluators.latency.profile_file import is_remote, load_profile
from ..evaluators.latency.target import fingerprint_to_dict
from ..evaluators.latency.timer import PROVIDERS
from ..evaluators.task import Task, check_task, load_task, picked
from ..evaluators.training import Trainer, probe
from ..spaces.anatomy import Anatomy
from ..spaces.errors import InputError
from ..spaces.policy import INT8, Distill, LayerBits, Policy
from ..spaces.space import Offer, Space
from . import limits, study
from .config import RunConfig
from .feedback import measure_target, measure_unseen
from .folder import SENSITIVITY as SENSITIVITY_FILE
from .folder import TARGET
from .jobs import Jobs
from .places import find_places
from .proposals import baselines, probed, probes, rule_count, sensitivity_of
from .session import Prepared, Session, quality_of
from .worker import Failure

log = logging.getLogger("nightpress")
LEAST_STEPS = 8
TRIALS_WANTED = 40
FINALISTS_WANTED = 8
COMPRESSED_STEP = 0.6
"""Of a training step of the original, on the average of what a night trains."""


def prepare(session: Session) -> None:
    """Build the anatomy and the space, choose how to train, start the workers. Raises InputError."""
    config = session.config
    task = load_task(config.task, Path(config.base) if config.base else None)
    check_task(task)
    places = find_places(config.search, session.folder.path)
    session.provide(places=places)
    if config.target_profile is None or not is_remote(Path(config.target_profile)):
        places.check_target(config.target)
    config = _capable(session, config)
    anatomy, _ = inspect(task, step_of=config.target.channel_step)
    dryrun.stop()  # its memory belongs to the night
    space = space_of(anatomy, config)
    device = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda needs a CUDA device, but torch sees none; use device: auto.")
    threads = places.needs.cpu
    torch.set_num_threads(threads)
    train, _ = split_search(materialise(task.train), seed=config.seed)
    trainer = Trainer(task, train, Compute(device=device), config.seed, config.finetune.batch_size)
    space, untaught = teachable(trainer, space)
    if untaught is not None:
        session.folder.decide("inspect", "inner tensors are not distilled", untaught)
    compute, step_ms = _compute(session, trainer, space)
    recipe = Recipe(
        task=config.task, base=config.base, anatomy=anatomy, seed=config.seed, compute=compute,
        batch_size=config.finetune.batch_size, threads=threads, disabled_optimizers=config.target.disabled_optimizers,
        runtime=config.target.runtime,
    )  # fmt: skip
    prepared = Prepared(task=task, anatomy=anatomy, space=space, train_items=len(train), step_ms=step_ms)
    session.provide(prepared=prepared, make=partial(Evaluator, recipe))
    session.provide(jobs=_jobs(session, recipe))
    session.update(
        task=task.name, model=anatomy.digest, anatomy=_anatomy_state(anatomy), environment=_environment(config),
        dimensions=space.dimensions, data=_data_digest(train), code=_code_digest(config),
    )  # fmt: skip
    for item in anatomy.left_out:
        session.folder.decide("inspect", f"left out {item.name}", item.reason)


def _jobs(session: Session, recipe: Recipe) -> Jobs:
    """The workers, with what is known of how long a job takes: its steps, and a pass over all data for the judging."""
    prepared = session.prepared
    epoch = prepared.train_items / recipe.batch_size
    return Jobs(
        session.places.start(session.make, session.folder.path, session.ahead, session.tick), recipe.batch_size,
        expected_seconds=lambda job: (job.steps + epoch) * prepared.step_ms / 1000,
        tell=lambda what, why: session.folder.decide(session.state["phase"], what, why),
    )  # fmt: skip


def _capable(session: Session, config: RunConfig) -> RunConfig:
    """The config with the channel steps and bit widths that the target was measured to have; a profile's are its own,
    and a resumed night keeps those that it began with."""
    if config.target_profile is not None:
        fewer = min(config.space.bits.weights) < 8
        if fewer and fewer_bits_are_faster(Path(config.target_profile), config.target):
            session.folder.decide(
                "inspect", "integers of fewer than 8 bits are priced as those of 8",
                "they are faster on the device of the profile, whose kit held those of 8: make a kit for that profile",
            )  # fmt: skip
        return config
    if session.places.target_node and config.target.runtime not in PROVIDERS:  # what it runs, its own graph would tell
        session.folder.decide(
            "inspect", "took the usual channel steps", f"what a node's {config.target.runtime} can do is not measured"
        )
        return config
    known = session.state.get("capabilities")
    if known is None and "rungs" in session.state:  # an older version began without asking a node
        return config
    if known is None:
        session.update(activity="measuring what the target can do")
        known = _measured(session, config).to_dict()
        session.update(capabilities=known)
    found = capabilities_from_dict(known)
    target = found.applied(config.target, [LayerBits(weights=w, activations=a) for w in config.space.bits.weights
                                           for a in config.space.bits.activations])  # fmt: skip
    kernels = ", ".join(f"{w.weights}/{w.activations} on {w.kernel} kernels {w.speedup:.2g}×" for w in found.widths)
    steps = ", ".join(f"{step} from {first} channels" for first, step in target.channel_steps)
    session.folder.decide(
        "inspect", f"channel steps: {steps}",
        f"stairs of {len(found.stairs)} kinds of layers; speed by bits of weights/activations: {kernels}; a change of "
        f"precision costs {1000 * found.change_ms:.1f} µs on {found.change_elements} numbers",
        settled=found.settled,
    )  # fmt: skip
    if target.integer_bits < 8:
        session.folder.decide(
            "inspect",
            f"integer weights have {target.integer_bits} bits",
            "those of 8 take slower kernels on this target",
        )
    session.config = replace(config, target=target)
    return session.config


def _measured(session: Session, config: RunConfig) -> Capabilities:
    if not session.places.target_node:
        return capabilities(config.target)
    with session.places.timer(config.target, lambda timings: None) as timer:
        return measure_capabilities(config.target, timer)


def _data_digest(train: Arrays) -> str:
    """Names the training data behind a run: inputs and targets, without the search split."""
    digest = hashlib.sha256()
    for part in (train.inputs, train.targets):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _code_digest(config: RunConfig) -> str:
    """Names the code behind a run: nightpress's version and, for a task file, its text."""
    path = Path(config.base or ".") / config.task.rpartition(":")[0]
    text = path.read_bytes() if path.is_file() else config.task.encode()
    return f"nightpress {version('nightpress')}, task {hashlib.sha256(text).hexdigest()[:16]}"


def space_of(anatomy: Anatomy, config: RunConfig) -> Space:
    """The space that anatomy, target and config allow. Raises InputError when there is nothing to choose."""
    prune = config.space.prune
    space = Space(
        anatomy=anatomy,
        max_ratio=prune.max_ratio if prune is not None else 0.0,
        bit_choices=config.target.bit_choices(config.space.bits.weights, config.space.bits.activations),
        **{offered.name: getattr(config.space, offered.name) for offered in fields(Offer)},
    )
    structural = (
        len(space.bit_choices) > 1
        or any(least < most for least, most in map(space.step_range, anatomy.groups))
        or (space.blocks and anatomy.blocks)
    )
    if not structural:
        raise InputError(
            "space: there is nothing to search: no group that prune.max_ratio lets have fewer channels, one bit choice "
            "and no removable block."
        )
    return space


def teachable(trainer: Trainer, space: Space) -> tuple[Space, str | None]:
    """The space without the distillation of inner tensors where teacher and student have none in common, and why.

    Raises InputError when nothing else is on offer.
    """
    rest = tuple(method for method in space.distill if not Distill(method=method).inner)
    if rest == space.distill:
        return space, None
    try:
        trainer.pairs(picked(trainer.task, copy.deepcopy(trainer.task.model)))
    except InputError as error:
        if not rest:
            raise
        return replace(space, distill=rest), str(error)
    return space, None


def _compute(session: Session, trainer: Trainer, space: Space) -> tuple[Compute, float]:
    """How to train and what a step costs; probed once a run, so that a resumed night trains the same way."""
    known = session.state.get("compute")
    if known is None:
        # With the method that most trials use: the dearest would make all fine-tunes as short as its own must be.
        logit = next((m for m in space.distill if Distill(method=m).logit), None)
        method = logit or next(iter(space.distill), "none")
        policy = Policy(model=space.anatomy.digest, distill=Distill(method=method))
        try:
            compute, step_ms = probe(trainer, picked(trainer.task, copy.deepcopy(trainer.task.model)), policy)
        except Exception as error:  # the user's loss, augment or teacher runs here
            reason = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"{session.config.task}: the given model cannot be trained for a few steps: "
                f"{type(error).__name__}: {reason}."
            ) from error
        fastest = min(step_ms, key=lambda name: step_ms[name])
        session.folder.decide(
            "inspect",
            f"train in {fastest}",
            f"{step_ms[fastest]:.0f} ms a step, fp32 {step_ms['fp32']:.0f} ms",
            step_ms=step_ms,
        )
        known = {**asdict(compute), "step_ms": step_ms[fastest]}
        session.update(compute=known)
    fields: dict[str, Any] = {key: known[key] for key in ("device", "bf16", "channels_last")}
    return Compute(**fields), float(known["step_ms"])


def size_rungs(session: Session) -> None:
    """Lengths of the fine-tunes in steps, from the budget and the cost of a step; the config wins."""
    if "rungs" in session.state:
        return
    finetune, clock, step_ms = session.config.finetune, session.clock, session.prepared.step_ms
    epoch = max(1, session.prepared.train_items // finetune.batch_size)
    count = rule_count(session.prepared.space)
    search_ms = 1000 * clock.share_seconds("search") * session.workers
    short = finetune.short_steps or _between(search_ms / TRIALS_WANTED / step_ms, LEAST_STEPS, 2 * epoch)
    finalists = finetune.finalists or FINALISTS_WANTED
    long_ms = 1000 * clock.share_seconds("finalists") * session.workers
    # The baselines go through it as well.
    models = (finalists + count) * COMPRESSED_STEP
    long = finetune.long_steps or _between(long_ms / models / step_ms, 2 * short, 20 * epoch)
    session.folder.decide(
        "inspect", f"short fine-tune of {short} steps, long one of {long}",
        f"a step takes {step_ms:.0f} ms and an epoch has {epoch} steps; the budget should pay for about "
        f"{TRIALS_WANTED} trials and {finalists + count} long fine-tunes",
    )  # fmt: skip
    rungs = study.planned(
        session.config, short_steps=short, train_items=session.prepared.train_items, rules=count,
        payable=search_ms / (COMPRESSED_STEP * short * step_ms),
    )  # fmt: skip
    if "study" in rungs:
        session.folder.decide(
            "inspect", f"study the rungs on {rungs['study']} policies",
            f"{study.WANTED} are wanted, and at most the {count} rules and {study.SHARE:.0%} of the trials that there "
            f"is time for; each is judged after {', '.join(map(str, rungs['looks']))} of {short} steps",
            **rungs,
        )  # fmt: skip
    rungs |= {"short_steps": short, "long_steps": long, "finalists": finalists, "epoch_steps": epoch}
    session.update(rungs=rungs)


def rules_of(session: Session) -> dict[str, Policy]:
    """The simple rules of this night, global magnitude among them."""
    prepared = session.prepared
    return baselines(
        prepared.anatomy, bool(session.config.space.distill), magnitudes(prepared.task, prepared.anatomy),
        prepared.space.integers or INT8,
    )  # fmt: skip


def magnitudes(task: Task, anatomy: Anatomy) -> dict[str, list[float]] | None:
    """L2 norms of the channels by group, each group's with a mean of 1; None where nothing can be pruned."""
    if not anatomy.groups:
        return None
    whole = compressor(anatomy, network_of(task, anatomy), task.example_input).whole()
    found = scores({group.name: group.slices for group in anatomy.groups}, saliency(whole, "l2"))
    return {name: values.tolist() for name, values in found.items()}


def _between(value: float, low: int, high: int) -> int:
    return max(low, min(high, int(value)))


def calibrate_target(session: Session) -> None:
    """Load the run's profile, or the config's, or measure one here and now; then check the limits."""
    config, anatomy = session.config, session.prepared.anatomy
    own, here = session.folder.path / TARGET, session.places.fingerprint(config.target)
    begun = own.is_file()
    if begun:
        forced = config.force or bool(session.state.get("forced"))
        profile = load_profile(own, anatomy, here=here, force=forced)
    elif config.target_profile is not None:
        profile = load_profile(Path(config.target_profile), anatomy, here=here, force=config.force)
    else:
        profile = measure_target(session)
    session.provide(measure_unseen=measure_unseen, beside_profile=_beside_profile(session))
    session.use_profile(profile)
    if not begun:  # what was met once stays so, also by a predictor that was fitted again since
        limits.check_costs(session)
    session.keep_profile(session.profile)
    for difference in profile.forced:
        log.warning("the profile is used all the same: %s", difference)
        session.folder.decide("calibrate", "the profile is used all the same", difference)
    session.update(forced=session.forced, device=fingerprint_to_dict(here))


def _beside_profile(session: Session) -> dict[str, Any]:
    """What the target's file holds beside the profile: the run's own measurement, or that of the config's profile."""
    if session.config.target_profile is None:
        known = session.state.get("capabilities")
        return beside_profile(capabilities_from_dict(known)) if known is not None else {}
    data = json.loads(Path(session.config.target_profile).read_text())
    return {key: data[key] for key in MEASURED_BESIDE if key in data}


def judge_given(session: Session) -> None:
    """Accuracy of the given weights on both splits: what every drop is counted against."""
    if "given" in session.state:
        return
    prepared = session.prepared
    job = Job(policy=Policy(model=prepared.anatomy.digest), rung=GIVEN, seed=session.config.seed, steps=0,
              folder=session.folder.path)  # fmt: skip
    for _, result in session.run_all([(0, job)]):
        if isinstance(result, Failure) or result.exported is None:
            text = f"{result.kind}: {result.text}" if isinstance(result, Failure) else "no accuracy"
            raise InputError(f"{session.config.task}: the given model cannot be evaluated: {text}.")
        given = {
            "search": asdict(quality_of(result.search, GIVEN, "search")),
            "test": asdict(quality_of(result.exported, GIVEN, "test")),
        }
        reference = {
            "accuracy": result.search.accuracy - 0.10,
            "latency_ms": session.profile.reference_ms,
            "size_bytes": session.predict(Policy(model=prepared.anatomy.digest))[3],
        }
        limits.check_accuracy(session, given["test"]["accuracy"])
        session.update(given=given, reference=reference)


def probe_sensitivity(session: Session) -> None:
    """Damage of each choice alone; stops when the phase's share is used up."""
    if (written := session.folder.read_json(SENSITIVITY_FILE)) is not None:
        session.provide(sensitivity=sensitivity_of(probed(written["probes"])))
        return
    asked = list(probes(session.prepared.space).items())
    jobs = {
        number: Job(policy=policy, rung=SENSITIVITY, seed=session.config.seed, steps=0, folder=session.folder.path)
        for number, (_, policy) in enumerate(asked)
    }
    until = session.clock.left_seconds - session.clock.share_seconds("sensitivity")
    found = {
        asked[number][0]: result.divergence
        for number, result in session.run_all(jobs.items(), until) if not isinstance(result, Failure)
    }  # fmt: skip
    known = {key: value for key, value in found.items() if value is not None and math.isfinite(value)}
    # What failed or found no time is unknown, which is not harmless.
    told = [(key, known.get(key)) for key, _ in asked]
    session.provide(sensitivity=sensitivity_of(probed(told)))
    session.folder.write_json(SENSITIVITY_FILE, {**asdict(sensitivity_of(known)), "probes": told})
    session.folder.decide(
        "sensitivity", f"probed {len(found)} of {len(asked)} choices", "the share of the budget for it"
    )


def _anatomy_state(anatomy: Anatomy) -> dict[str, object]:
    return {
        "groups": [{"name": g.name, "channels": g.channels, "layers": list(g.layers)} for g in anatomy.groups],
        "layers": [{"name": n.name, "kind": n.kind, "macs": n.macs, "params": n.params} for n in anatomy.layers],
        "blocks": [{"name": b.name, "layers": list(b.layers)} for b in anatomy.blocks],
        "params": anatomy.params,
        "macs": anatomy.macs,
    }


def _environment(config: RunConfig) -> dict[str, object]:
    packages = ("nightpress", "torch", "optuna", "onnx", "onnxruntime", "scikit-learn")
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: version(name) for name in packages},
        "threads": config.target.threads,
    }
