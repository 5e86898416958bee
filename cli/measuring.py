"""What calibrate and apply do between parsing and printing."""

import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..evaluators.apply import compressor
from ..evaluators.data import materialise, split_search
from ..evaluators.evaluate import evidence_of
from ..evaluators.importance import Loss
from ..evaluators.inspect import inspect, network_of
from ..evaluators.latency.calibrate import (
    CANDIDATES,
    calibrate,
    calibrate_until_flat,
    check_drawn,
    covering,
    stages_to_list,
    worth_measuring,
)
from ..evaluators.latency.capabilities import FASTER, beside_profile, capabilities, probes, read_capabilities
from ..evaluators.latency.kit import read_results, write_kit
from ..evaluators.latency.measure import AGREE, Timer, Timing, noise_warnings
from ..evaluators.latency.profile import Profile, profile_of
from ..evaluators.latency.profile_file import profile_to_dict
from ..evaluators.latency.target import Target
from ..evaluators.latency.timer import PROVIDERS
from ..evaluators.latency.units import Worker
from ..evaluators.task import Task
from ..search.config import RunConfig
from ..search.prepare import space_of
from ..search.proposals import baselines
from ..spaces.anatomy import Anatomy
from ..spaces.errors import InputError
from ..spaces.policy import INT8, Policy, digest
from .output import write_file

log = logging.getLogger("nightpress")


def calibrate_to_file(task: Task, target: Target, out: Path, count: int | None, seed: int) -> dict[str, Any]:
    """Calibrate with ``count`` random policies, or as many as lower the error, on the steps that the target's kernels
    are measured to have; write the profile and return the command's JSON."""
    found = capabilities(target)  # once: where the windows do not settle, a second time would say something else
    target = found.applied(target)
    anatomy, _ = inspect(task, step_of=target.channel_step)
    draw, always = _drawing(anatomy, target, seed)
    with Timer(target, warn_of_noise) as timer:
        if count is not None:
            profile = calibrate(
                anatomy, [*draw(count), *always], target, candidates=draw(CANDIDATES), timer=timer, progress=log.info
            )
            stages, reason = (), "as asked, each timed twice"
        else:
            made = calibrate_until_flat(anatomy, draw, target, always=always, timer=timer, progress=log.info)
            profile, stages, reason = made.profile, made.stages, made.reason
    told = _write_profile(profile, out, beside_profile(found))
    return {**told, "stages": stages_to_list(stages), "stopped": reason}


def calibrate_from_results(anatomy: Anatomy, results: Path, out: Path) -> dict[str, Any]:
    """Fit a profile to what a kit measured on another device, and write it; returns the command's JSON."""
    found = read_results(results, anatomy)
    warn_of_noise(found.timings, elsewhere=True)
    # Its channel steps stay those that the kit's policies were drawn on.
    integers = found.capabilities is None or found.capabilities.integer_kernels
    try:
        profile = profile_of(
            anatomy, replace(found.target, integer_kernels=integers), found.policies, found.timings, found.sizes,
            seconds=lambda: found.seconds, device=found.device,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"{results}: no predictor fits these times: {error}.") from None
    able = beside_profile(found.capabilities) if found.capabilities is not None else None
    if found.capabilities is not None and found.capabilities.integer_bits < found.target.integer_bits:
        log.warning(
            "on that device integers of %d bits are at least %g times as fast as those of %d, which this kit holds: "
            "nightpress kit TASK --target %s --out DIR makes one that holds them",
            found.capabilities.integer_bits, FASTER, found.target.integer_bits, out,
        )  # fmt: skip
    told = _write_profile(replace(profile, remote=True, date=found.date), out, able)
    return {**told, "stages": [], "stopped": "all that the kit held"}


def as_measured(target: Target, profile: Path) -> Target:
    """A target with the bits that the integers of its device should have, where an earlier profile of it says so."""
    known = read_capabilities(profile) if profile.is_file() else None
    return target if known is None else replace(target, integer_bits=known.integer_bits)


def write_kit_of(anatomy: Anatomy, target: Target, out: Path, count: int, seed: int) -> dict[str, Any]:
    """Random policies, the baselines, and what else it takes to meet each kind of kernel, as a kit; with the probes of
    what the device can do, where the runtime's times of nodes tell the kernels. Raises InputError, OSError."""
    draw, always = _drawing(anatomy, target, seed)
    policies = covering(Worker(anatomy, target.runtime), [*always, *draw(count)], draw(CANDIDATES))
    check_drawn(len(worth_measuring(policies)))
    return write_kit(anatomy, policies, target, out, probes=probes() if target.runtime in PROVIDERS else None)


def _drawing(anatomy: Anatomy, target: Target, seed: int) -> tuple[Callable[[int], list[Policy]], list[Policy]]:
    """Draws random policies of the space; and those that every calibration measures."""
    space = space_of(anatomy, RunConfig(task="", base=None, out=Path(), target=target))
    generator = np.random.default_rng(seed)
    return lambda count: [space.random(generator) for _ in range(count)], list(
        baselines(anatomy, True, integers=space.integers or INT8).values()
    )


def warn_of_noise(timings: Mapping[str, Timing], *, elsewhere: bool = False) -> None:
    """Say on stderr what disturbed a measurement; that of a kit was made ``elsewhere``."""
    for text in noise_warnings(timings, elsewhere=elsewhere):
        log.warning("%s", text)


def _write_profile(profile: Profile, out: Path, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    data = {**profile_to_dict(profile), **(beside or {})}
    for text in profile.noise_warnings():
        log.warning("%s", text)
    write_file(out, lambda partial: partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n"))
    return {
        "profile": str(out),
        "target": data["target"],
        "device": data["device"],
        "models_measured": len(profile.points),
        "unsettled": sum(point.repeat_error > AGREE for point in profile.points),
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
    data = io.BytesIO()
    if out.suffix == ".safetensors":
        data.write(save({k: v.contiguous() for k, v in module.state_dict().items()}))
    else:
        torch.save(module, data)
    write_file(out, lambda partial: partial.write_bytes(data.getbuffer()))
    return {"out": str(out), "digest": digest(policy), "params": planned.params, "macs": planned.macs}
