"""How well latency is predicted: five networks on this machine's ONNX Runtime, 60 fresh policies each.

For each (network, threads) the script keeps in ``--cache``: the anatomy, the truth of 60 random policies (their seed is
used nowhere else), and a calibration made with the product's own code. The truth is measured in eight passes (fewer
will do), minutes apart and each in another order: it is the lowest window of every other pass; those of the others say
how far the truth agrees with itself. A step that is in the cache is not repeated, so the
script can be stopped at any time.

    python benchmarks/latency.py calibrate vgg16 --cache DIR          # one network on a silent machine, 1 to 2 minutes
    python benchmarks/latency.py truth vgg16 --cache DIR              # the next pass, half a minute; eight in all
    python benchmarks/latency.py truth vgg16 --cache DIR --threads 2
    python benchmarks/latency.py isolate vgg16 --cache DIR            # the layers on their own
    python benchmarks/latency.py evaluate --cache DIR                 # the figures, from what was measured
    python benchmarks/latency.py table --cache DIR --out docs/results/latency.txt
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency_table import TRUTH_POLICIES, heading, table
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from nightpress.evaluators import Task
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.calibrate import calibrate_until_flat, stages_to_list
from nightpress.evaluators.latency.insitu import UnseenKernelError
from nightpress.evaluators.latency.measure import REFERENCE, Timer, write_random
from nightpress.evaluators.latency.predictor import spearman
from nightpress.evaluators.latency.profile import Profile
from nightpress.evaluators.latency.profile_file import load_profile, profile_to_dict
from nightpress.evaluators.latency.target import Target, fingerprint, fingerprint_from_dict
from nightpress.search.encoding import Encoder
from nightpress.search.proposals import baselines
from nightpress.spaces.anatomy import Anatomy, Layer, Op, anatomy_from_json, anatomy_to_json
from nightpress.spaces.plan import Plan, PlannedOp, plan
from nightpress.spaces.policy import Policy, policy_from_dict, policy_to_dict
from nightpress.spaces.space import Space

SIDES = {"resnet56": 32, "vgg16": 32, "mobilenet_v2": 96, "resnet18": 64, "efficientnet_b0": 96}
CALIBRATION_SEED, MOST_CALIBRATION = 7, 80
TRUTH_SEED = 20_261_130
"""Another one whenever the predictor or the timing was changed by what the policies before it showed."""
PASSES, PASS_WINDOWS = 8, 4
MOST_REMEASURED, BATCH = 25, 10_000
Array = NDArray[np.float64]


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


def measure_truth(anatomy: Anatomy, target: Target, number: int) -> dict[str, Any]:
    """Windows of the 60 fresh policies; each pass has an order of its own, for those timed together share a level."""
    start = time.perf_counter()
    policies = random_policies(anatomy, TRUTH_POLICIES, TRUTH_SEED)
    order = np.random.default_rng(number).permutation(len(policies)).tolist()
    with tempfile.TemporaryDirectory() as folder, Timer(target) as timer:
        files = {str(i): Path(folder) / f"{i}.onnx" for i in order}
        for i in order:
            write_random(plan(anatomy, policies[i]), files[str(i)])
        reference = Path(folder) / "reference.onnx"
        write_random(plan(anatomy, Policy(model=anatomy.digest)), reference)
        timings = timer.time(files, reference, least_rounds=PASS_WINDOWS, most_rounds=PASS_WINDOWS)
    return {
        "policies": [policy_to_dict(policy) for policy in policies],
        "windows_ms": [timings[str(i)].windows_ms for i in range(len(policies))],
        "reference_ms": timings[REFERENCE].latency_ms,
        "seconds": time.perf_counter() - start,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was measured of the policies; ``windows_ms`` has the shape (policy, pass, window)."""

    policies: list[Policy]
    windows_ms: Array
    reference_ms: list[float]
    dates: list[str]

    @property
    def lowest_ms(self) -> Array:
        return self.windows_ms[:, ::2].min(axis=(1, 2))

    @property
    def again_ms(self) -> Array:
        return self.windows_ms[:, 1::2].min(axis=(1, 2))


def read_truth(path: Path) -> Truth:
    passes = json.loads(path.read_text())
    return Truth(
        policies=[policy_from_dict(p, str(path)) for p in passes[0]["policies"]],
        windows_ms=np.array([p["windows_ms"] for p in passes]).swapaxes(0, 1),
        reference_ms=[p["reference_ms"] for p in passes], dates=[p["date"] for p in passes],
    )  # fmt: skip


def files_of(name: str, target: Target, cache: Path) -> tuple[Path, Path]:
    """Where the truth and the calibration are kept."""
    key = f"{name}.{'' if target.runtime == 'onnxruntime' else target.runtime + '.'}{target.threads}"
    return cache / f"{key}.truth{TRUTH_SEED}.json", cache / f"{key}.profile.json"


def pass_truth(name: str, target: Target, cache: Path) -> None:
    """One pass more, unless there are all."""
    anatomy, path = anatomy_of(name, cache), files_of(name, target, cache)[0]
    passes: list[Any] = json.loads(path.read_text()) if path.is_file() else []
    if len(passes) < PASSES:
        passes.append(measure_truth(anatomy, target, len(passes)))
        path.write_text(json.dumps(passes))


def calibrate(name: str, target: Target, cache: Path) -> None:
    path = files_of(name, target, cache)[1]
    if not path.is_file():
        path.write_text(json.dumps(measure_profile(anatomy_of(name, cache), target)))


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


def measure_isolated(anatomy: Anatomy, target: Target, policies: Sequence[Policy]) -> list[float]:
    """For each policy the sum of its layers, each timed as a model of its own; ms."""
    plans = [plan(anatomy, policy) for policy in policies]
    layers = {_layer_key(planned): planned for made in plans for planned in made.ops if planned.weight_count}
    with tempfile.TemporaryDirectory() as folder, Timer(target) as timer:
        files = {str(number): Path(folder) / f"{number}.onnx" for number in range(len(layers))}
        for path, planned in zip(files.values(), layers.values(), strict=True):
            write_random(_alone(planned), path)
        timings = timer.time(files, None, least_rounds=3, most_rounds=3, window_ms=8, round_ms=0)
    each = {key: timings[str(number)].latency_ms for number, key in enumerate(layers)}
    return [sum(each[_layer_key(planned)] for planned in made.ops if planned.weight_count) for made in plans]


def _layer_key(planned: PlannedOp) -> str:
    return str((planned.in_shapes[0], planned.shape, planned.groups, planned.bits, sorted(planned.op.attrs.items())))


def _alone(planned: PlannedOp) -> Plan:
    """A model of one layer."""
    shape = planned.in_shapes[0]
    source = Op(name="x", kind="input", inputs=(), shape=shape)
    attrs = {**planned.op.attrs, "groups": planned.groups} if planned.op.kind == "conv" else planned.op.attrs
    layer = replace(planned.op, name="layer", inputs=("x",), shape=planned.shape, module="layer", attrs=attrs, lost=())
    named = Layer(name="layer", kind=layer.kind, op="layer", macs=0, params=0)
    anatomy = Anatomy(
        digest="", ops=(source, layer), output="layer", groups=(), layers=(named,), blocks=(), left_out=(), params=0
    )
    return plan(anatomy, Policy(model="", bits={"layer": planned.bits}))


def isolate(name: str, target: Target, cache: Path) -> None:
    path = files_of(name, target, cache)[0].with_suffix(".isolated.json")
    if not path.is_file():
        anatomy = anatomy_of(name, cache)
        policies = random_policies(anatomy, TRUTH_POLICIES, TRUTH_SEED)
        path.write_text(json.dumps(measure_isolated(anatomy, target, policies)))


# Figures


@dataclass(frozen=True, kw_only=True)
class Row:
    """Errors against the truth, as shares."""

    mape: float
    within_5: float
    within_10: float
    spearman: float


def errors_of(predicted: Array, truth: Array) -> Row:
    off = np.abs(predicted / truth - 1)
    return Row(
        mape=float(off.mean()), within_5=float((off <= 0.05).mean()), within_10=float((off <= 0.10).mean()),
        spearman=spearman(predicted, truth),
    )  # fmt: skip


def stand_in_accuracy(anatomy: Anatomy, policy: Policy) -> float:
    """What a front needs on its other axis, random weights having no accuracy: falls with the channels that go, with
    removed blocks and, a little, with integers. Any such order will do to ask what a wrong latency costs."""
    pruned = [policy.prune.get(group.name, 0.0) ** 2 for group in anatomy.groups]
    integers = sum(pair.weights <= 8 for pair in policy.bits.values()) / len(anatomy.layers)
    blocks = len(policy.removed_blocks) / max(1, len(anatomy.blocks))
    return 1 - float(np.mean(pruned or [0.0])) - 0.3 * blocks - 0.02 * integers


def front_regret(accuracy: Array, predicted: Array, truth: Array) -> float:
    """For each point of the true front, how much slower the fastest-looking policy of no lower accuracy really is."""
    found: list[float] = []
    for level, best in zip(accuracy, truth, strict=True):
        allowed = np.nonzero(accuracy >= level)[0]
        if best <= truth[allowed].min():
            found.append(truth[allowed[np.argmin(predicted[allowed])]] / best - 1)
    return float(np.mean(found))


def remeasured(accuracy: Array, predicted: Array, low: Array, truth: Array) -> tuple[Array, int]:
    """Predictions with the truth in place of those that the low end of their interval could put on the front, the
    nearest first, as a night does it; 25 at most."""
    best = np.array([predicted[accuracy >= level].min() for level in accuracy])
    near = [i for i in np.argsort(predicted / best, kind="stable") if low[i] <= best[i]][:MOST_REMEASURED]
    better = predicted.copy()
    better[near] = truth[near]
    return better, len(near)


def speed_of(profile: Profile, anatomy: Anatomy) -> tuple[float, float]:
    """Policies a second in fresh batches of 10,000 on one core, once the tables have filled with two others, as in a
    night's first proposal; and milliseconds of a single prediction. The median of each, of CPU time."""
    encoder, generator = Encoder(space_of(anatomy)), np.random.default_rng(3)
    batches = [encoder.choices(encoder.random(BATCH, generator)) for _ in range(9)]
    seconds = [_seconds(partial(profile.predictor.latencies, batch)) for batch in batches][2:]
    some = [policy for policy in random_policies(anatomy, 40, 3) if _predictable(profile, policy)]
    one = [_seconds(partial(profile.predict, [policy])) for policy in some]
    return BATCH / float(np.median(seconds)), 1000 * float(np.median(one))


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def evaluate(name: str, target: Target, cache: Path) -> dict[str, Any]:
    """All figures of one (network, target); kept beside its data."""
    anatomy = anatomy_of(name, cache)
    truth_path, profile_path = files_of(name, target, cache)
    measured_truth = read_truth(truth_path)
    made = json.loads(profile_path.read_text())
    text = json.dumps(made["profile"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        path.write_text(text)
        start = time.process_time()
        profile = load_profile(path, anatomy, here=fingerprint_from_dict(made["profile"]["device"]))
        refit = time.process_time() - start
    kept = [i for i, policy in enumerate(measured_truth.policies) if _predictable(profile, policy)]
    refused, policies = len(measured_truth.policies) - len(kept), [measured_truth.policies[i] for i in kept]
    truth, again = measured_truth.lowest_ms[kept], measured_truth.again_ms[kept]
    predicted, low, high = profile.predict(policies).T
    macs, known = _macs(anatomy, policies), _macs(anatomy, [p.policy for p in profile.points])
    measured = np.array([p.latency_ms for p in profile.points])
    k = float(np.exp(np.median(np.log(measured / known))))
    accuracy = np.array([stand_in_accuracy(anatomy, policy) for policy in policies])
    better, count = remeasured(accuracy, predicted, low, truth)
    rate, single_ms = speed_of(profile, anatomy)
    rows = {
        "predictor": errors_of(predicted, truth), "truth again": errors_of(again, truth),
        "FLOPs × k": errors_of(k * macs, truth), "one window": errors_of(measured_truth.windows_ms[kept, 1, 0], truth),
    }  # fmt: skip
    isolated = truth_path.with_suffix(".isolated.json")
    if isolated.is_file():
        rows["isolated kernels"] = errors_of(np.array(json.loads(isolated.read_text()))[kept], truth)
    return {
        "network": name, "runtime": target.runtime, "threads": target.threads, "policies": len(profile.points),
        "design": profile.predictor.design, "seconds": profile.seconds, "reason": made["reason"],
        "designs": profile.predictor.candidates, "stages": made["stages"], "dates": measured_truth.dates,
        "rows": {key: asdict(row) for key, row in rows.items()},
        "coverage": float(np.mean((low <= truth) & (truth <= high))),
        "coverage_by_minute": coverage_by_minute(predicted, low, high, measured_truth.windows_ms[kept].min(axis=2)),
        "half_width": float(np.exp(profile.predictor.log_margin) - 1), "bytes": len(text), "refit_seconds": refit,
        "refused": refused, "calibrated": made["date"], "reference_then_ms": profile.reference_ms,
        "reference_ms": measured_truth.reference_ms,
        "calibration_noise": profile.truth_repeat(),
        "regret": front_regret(accuracy, predicted, truth), "regret_flops": front_regret(accuracy, k * macs, truth),
        "regret_remeasured": front_regret(accuracy, better, truth), "remeasured": count,
        "rate": rate, "single_ms": single_ms,
    }  # fmt: skip


def coverage_by_minute(predicted: Array, low: Array, high: Array, lowest_ms: Array) -> list[float]:
    """Coverage had the calibration been made in the minute of each pass: the predictions at the level which that pass
    has beside the others, against the truth of the others. ``lowest_ms`` (policy, pass)."""
    found: list[float] = []
    for i in range(lowest_ms.shape[1]):
        truth = np.delete(lowest_ms, i, axis=1).min(axis=1)
        moved = np.median(lowest_ms[:, i] / truth) / np.median(predicted / truth)
        found.append(float(np.mean((low * moved <= truth) & (truth <= high * moved))))
    return found


def _predictable(profile: Profile, policy: Policy) -> bool:
    """False for one with a kind of kernel that the calibration did not run: a night would measure it."""
    try:
        profile.predict([policy])
    except UnseenKernelError:
        return False
    return True


def _macs(anatomy: Anatomy, policies: Sequence[Policy]) -> Array:
    return np.array([float(plan(anatomy, policy).macs) for policy in policies])


def targets_in(cache: Path) -> Iterator[tuple[str, Target]]:
    """Those that were measured, in the order of the networks."""
    for runtime, threads in (("onnxruntime", 1), ("onnxruntime", 2), ("openvino", 1)):
        for name in SIDES:
            target = Target(runtime=runtime, threads=threads)
            if all(path.is_file() for path in files_of(name, target, cache)):
                yield name, target


def write_table(cache: Path, out: Path | None) -> None:
    rows = [json.loads(path.read_text()) for path in sorted(cache.glob("*.row.json"))]
    order = {"onnxruntime": 0, "openvino": 1}
    rows.sort(key=lambda r: (order[r["runtime"]], r["threads"], list(SIDES).index(r["network"])))
    text = "\n".join([*heading(fingerprint(Target())), "", *table(rows)])
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("truth", "calibrate", "isolate", "evaluate", "table"))
    parser.add_argument("network", nargs="?", choices=tuple(SIDES))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", default="onnxruntime", help="or openvino")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.step == "table":
        write_table(args.cache, args.out)
        return
    target = Target(runtime=args.runtime, threads=args.threads)
    if args.step == "evaluate":
        for name, found in targets_in(args.cache):
            path = files_of(name, found, args.cache)[0].with_suffix(".row.json")
            path.write_text(json.dumps(evaluate(name, found, args.cache)))
        return
    {"truth": pass_truth, "calibrate": calibrate, "isolate": isolate}[args.step](args.network, target, args.cache)


if __name__ == "__main__":
    main()
