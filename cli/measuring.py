"""What calibrate and apply do between parsing and printing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..evaluators.apply import compressor
from ..evaluators.data import materialise, split_search
from ..evaluators.evaluate import evidence_of
from ..evaluators.importance import Loss
from ..evaluators.inspect import network_of
from ..evaluators.latency.kit import RecordedTimer, read_results, write_kit
from ..evaluators.latency.profile import Profile, calibrate, profile_to_dict
from ..evaluators.latency.target import Target
from ..evaluators.task import Task
from ..search.config import RunConfig
from ..search.prepare import space_of
from ..search.proposals import baselines
from ..spaces.anatomy import Anatomy
from ..spaces.errors import InputError
from ..spaces.policy import Policy, digest
from .output import write_json


def calibrate_to_file(anatomy: Anatomy, target: Target, out: Path, count: int, seed: int, task: str) -> dict[str, Any]:
    """Calibrate and write the profile; returns the command's JSON."""
    _check_folder(out)
    profile = calibrate(anatomy, _policies(anatomy, target, count, seed, task), target)
    return _write_profile(profile, out)


def calibrate_from_results(anatomy: Anatomy, results: Path, out: Path) -> dict[str, Any]:
    """Fit a profile to what a kit measured on another device, and write it; returns the command's JSON."""
    _check_folder(out)
    found = read_results(results, anatomy)
    with RecordedTimer(found) as timer:
        profile = calibrate(anatomy, found.policies, found.target, timer=timer)
    return _write_profile(
        replace(profile, device=found.device, remote=True, seconds=found.seconds, date=found.date), out
    )


def write_kit_of(anatomy: Anatomy, target: Target, out: Path, count: int, seed: int, task: str) -> dict[str, Any]:
    """The policies that a calibration here would measure, as a kit."""
    try:
        return write_kit(anatomy, _policies(anatomy, target, count, seed, task), target, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}.") from None


def _policies(anatomy: Anatomy, target: Target, count: int, seed: int, task: str) -> list[Policy]:
    space = space_of(anatomy, RunConfig(task=task, base=None, out=Path(), target=target))
    generator = np.random.default_rng(seed)
    return [space.random(generator) for _ in range(count)] + list(baselines(anatomy, True).values())


def _check_folder(out: Path) -> None:
    if not out.parent.is_dir():
        raise InputError(f"{out}: its folder does not exist.")


def _write_profile(profile: Profile, out: Path) -> dict[str, Any]:
    data = profile_to_dict(profile)
    write_json(out, data)
    return {
        "profile": str(out),
        "target": data["target"],
        "device": data["device"],
        "models_measured": len(profile.points),
        "seconds": profile.seconds,
        "design": profile.predictor.design,
        "heldout": data["heldout"],
        "truth_repeat": data["truth_repeat"],
        "reference_ms": profile.reference_ms,
    }


def apply_to_file(task: Task, anatomy: Anatomy, policy: Policy, out: Path, weights: Path | None) -> dict[str, Any]:
    """Write the compressed module, with an export's weights where they are given."""

    def evidence() -> tuple[torch.Tensor | None, torch.Tensor | None, Loss | None]:
        return evidence_of(task, split_search(materialise(task.train))[0])()

    engine = compressor(anatomy, network_of(task, anatomy), task.example_input, evidence)
    if weights is None:
        module, planned = engine.apply(policy)
    else:
        module, planned = engine.shell(policy)
        try:
            module.load_state_dict(load_file(weights))
        except (OSError, RuntimeError, SafetensorError) as error:
            lines = str(error).strip().splitlines()  # torch says what is wrong below a headline
            reason = lines[min(1, len(lines) - 1)].strip().rstrip(".")
            raise InputError(f"{weights}: not the weights of this policy: {reason}.") from None
    try:
        if out.suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in module.state_dict().items()}, out)
        else:
            torch.save(module, out)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: cannot be written: {str(error).splitlines()[0]}.") from None
    return {"out": str(out), "digest": digest(policy), "params": planned.params, "macs": planned.macs}
