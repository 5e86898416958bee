"""How well latency is predicted: five networks on this machine's ONNX Runtime, 60 fresh policies each.

For each (network, threads) the script keeps in ``--cache``: the anatomy, the truth of 60 random policies (their seed is
used nowhere else), and a calibration made with the product's own code. The truth is the lowest of eight windows that
are spread in time and interleaved with the uncompressed network; eight more windows between them say how far the truth
agrees with itself. A step that is in the cache is not repeated, so the script can be stopped at any time.

    python benchmarks/latency.py measure vgg16 --cache DIR            # one network on a silent machine, 2 to 4 minutes
    python benchmarks/latency.py measure vgg16 --cache DIR --threads 2
    python benchmarks/latency.py table --cache DIR --out docs/results/latency.txt
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nightpress.evaluators import Task
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.calibrate import calibrate_until_flat, stages_to_list
from nightpress.evaluators.latency.measure import REFERENCE, Timer, write_random
from nightpress.evaluators.latency.profile import profile_to_dict
from nightpress.evaluators.latency.target import Target
from nightpress.search.proposals import baselines
from nightpress.spaces.anatomy import Anatomy, anatomy_from_json, anatomy_to_json
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from nightpress.spaces.space import Space

SIDES = {"resnet56": 32, "vgg16": 32, "mobilenet_v2": 96, "resnet18": 64, "efficientnet_b0": 96}
CALIBRATION_SEED, MOST_CALIBRATION = 7, 80
TRUTH_SEED, TRUTH_POLICIES, TRUTH_WINDOWS = 20_261_124, 60, 8


def network(name: str) -> nn.Module:
    """With random weights from a fixed seed: latency does not depend on them."""
    torch.manual_seed(0)
    if name == "resnet56":
        from option_a import CifarResNet

        return CifarResNet(9).eval()
    if name == "vgg16":
        from cifar10 import vgg16

        return vgg16().eval()
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=10).eval()


def anatomy_of(name: str, cache: Path) -> Anatomy:
    path = cache / f"{name}.anatomy.json"
    if not path.is_file():
        image = torch.zeros(1, 3, SIDES[name], SIDES[name])
        data = TensorDataset(image.repeat(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
        task = Task(name=name, model=network(name), example_input=image, train=data, test=data)
        path.write_text(anatomy_to_json(inspect(task, step_of=Target().channel_step, cache=False, verify=False)[0]))
    return anatomy_from_json(path.read_text())


def space_of(anatomy: Anatomy) -> Space:
    """What a night searches by default."""
    return Space(anatomy=anatomy, max_ratio=0.8, bit_choices=Target().bit_choices((8, 32), (8, 32)))


def random_policies(anatomy: Anatomy, count: int, seed: int) -> list[Policy]:
    generator, space = np.random.default_rng(seed), space_of(anatomy)
    return [space.random(generator) for _ in range(count)]


def measure_truth(anatomy: Anatomy, target: Target) -> dict[str, Any]:
    """Windows of the 60 fresh policies."""
    start = time.perf_counter()
    policies = {digest(p): p for p in random_policies(anatomy, TRUTH_POLICIES, TRUTH_SEED)}
    with tempfile.TemporaryDirectory() as folder, Timer(target) as timer:
        files = {key: Path(folder) / f"{key}.onnx" for key in policies}
        for key, path in files.items():
            write_random(plan(anatomy, policies[key]), path)
        reference = Path(folder) / "reference.onnx"
        write_random(plan(anatomy, Policy(model=anatomy.digest)), reference)
        rounds = 2 * TRUTH_WINDOWS
        timings = timer.time(files, reference, least_rounds=rounds, most_rounds=rounds)
    return {
        "policies": [
            {"policy": policy_to_dict(policies[key]), "windows_ms": timing.windows_ms}
            for key, timing in timings.items()
            if key != REFERENCE
        ],
        "reference_ms": timings[REFERENCE].latency_ms,
        "seconds": time.perf_counter() - start,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def read_truth(path: Path) -> tuple[list[Policy], np.ndarray]:
    data = json.loads(path.read_text())
    policies = [policy_from_dict(p["policy"], str(path)) for p in data["policies"]]
    return policies, np.array([p["windows_ms"] for p in data["policies"]])


def files_of(name: str, target: Target, cache: Path) -> tuple[Path, Path]:
    """Where the truth and the calibration are kept."""
    key = f"{name}.{'' if target.runtime == 'onnxruntime' else target.runtime + '.'}{target.threads}"
    return cache / f"{key}.truth.json", cache / f"{key}.profile.json"


def measure(name: str, target: Target, cache: Path) -> None:
    anatomy = anatomy_of(name, cache)
    path, profile = files_of(name, target, cache)
    if not path.is_file():
        path.write_text(json.dumps(measure_truth(anatomy, target)))
    if not profile.is_file():
        profile.write_text(json.dumps(measure_profile(anatomy, target)))


def measure_profile(anatomy: Anatomy, target: Target) -> dict[str, Any]:
    """A calibration as the command makes it, with at most 80 policies: the profile file, and how it came about."""
    generator, space = np.random.default_rng(CALIBRATION_SEED), space_of(anatomy)
    with Timer(target) as timer:
        made = calibrate_until_flat(
            anatomy, lambda count: [space.random(generator) for _ in range(count)], target,
            always=list(baselines(anatomy, distill=True).values()), timer=timer, most=MOST_CALIBRATION,
        )  # fmt: skip
    return {
        "profile": profile_to_dict(made.profile), "stages": stages_to_list(made.stages), "reason": made.reason,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "table"))
    parser.add_argument("network", nargs="?", choices=tuple(SIDES))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", default="onnxruntime", help="or openvino")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.step == "measure":
        measure(args.network, Target(runtime=args.runtime, threads=args.threads), args.cache)


if __name__ == "__main__":
    main()
