"""What one trial of the engine is worth on CIFAR-10 (JPEG): accuracy of uniform and of chosen policies, and speed.

Every accuracy is that of the exported file in ONNX Runtime on the 10,000 test images, seen once a row; 5,000 of the
50,000 training images are held out as the search split. A drop is counted against the better of the given weights and
of the uncompressed network after the same fine-tune without distillation. Each finished row is appended to a file at
once, and rows that stand there are not computed again, so the table can be made in pieces.

    python benchmarks/engine_cifar10.py --data DIR --part accuracy --rows rows.jsonl
    python benchmarks/engine_cifar10.py --data DIR --part goals --rows rows.jsonl
    python benchmarks/engine_cifar10.py --data DIR --part retime --rows rows.jsonl   # latencies anew
    python benchmarks/engine_cifar10.py --data DIR --part speed
    python benchmarks/engine_cifar10.py --data DIR --part memory
    python benchmarks/engine_cifar10.py --data DIR --part table --rows rows.jsonl --out docs/results/engine_cifar10.txt
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cifar10 import task

from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Recipe, write_onnx
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.measure import REFERENCE, measure_policies
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.quality import score
from nightpress.evaluators.runtime import Session, bits_used, check_bits
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.policy import FP32, INT8, Distill, FineTune, LayerBits, Policy
from nightpress.spaces.space import canonical, uniform

NETWORKS = ("resnet20", "vgg16_half", "resnet56")
WIDTHS = (0.75, 0.5, 0.25)
PRECISIONS = {"fp32": FP32, "INT8": INT8, "W4A8": LayerBits(weights=4, activations=8)}
NONE = Distill(method="none", alpha=0.0)
DISTILLS = {
    "none": NONE,
    "logit": Distill(method="logit", alpha=0.7, temperature=3.0),
    "logit+feature": Distill(method="logit+feature", alpha=0.7, temperature=3.0),
}
IMAGES = 5_000
"""Training images that the fine-tune of one row of the accuracy table sees."""
BATCH = 64
TARGET = Target()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table to be made. ``images`` 0: no fine-tune, only batch norms and ranges anew."""

    network: str
    name: str
    distill: str
    seed: int
    images: int
    policy: Policy
    timed: bool = True
    """Whether the latency is measured: how a policy was trained does not change it."""

    @property
    def key(self) -> str:
        return f"{self.network} | {self.name} | {self.distill} | {self.seed} | {self.images}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with images and weights")
    parser.add_argument("--part", choices=("accuracy", "goals", "retime", "speed", "memory", "table"), required=True)
    parser.add_argument("--rows", type=Path, default=Path("rows.jsonl"), help="finished rows, appended")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="table: also write it there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "table":
        write_table(options.rows, options.out)
    elif options.part in {"speed", "memory"}:
        import engine_speed

        getattr(engine_speed, options.part)(options.data, options.threads)
    else:
        for network in options.networks.split(","):
            bench = Bench(network, options.data, options.threads)
            if options.part == "retime":
                bench.retime(options.rows)
            else:
                bench.make({"accuracy": accuracy_rows, "goals": goal_rows}[options.part](bench), options.rows)


class Bench:
    """One network with its evaluator."""

    def __init__(self, network: str, folder: Path, threads: int) -> None:
        self.network = network
        self.task = task(network, folder)
        self.anatomy: Anatomy = inspect(self.task, step_of=TARGET.channel_step)[0]
        recipe = Recipe(
            task=network, base=None, anatomy=self.anatomy, seed=0, compute=Compute(channels_last=True, bf16=True),
            batch_size=BATCH, threads=threads, disabled_optimizers=TARGET.disabled_optimizers,
        )  # fmt: skip
        self.evaluator = Evaluator(recipe, self.task)

    def make(self, rows: Iterator[Row], path: Path) -> None:
        """Compute the rows that the file does not have."""
        done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.is_file() else set()
        for row in rows:
            if row.key in done:
                continue
            found = self.row(row)
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{row.key}: {100 * found['accuracy']:.2f} %  {found['seconds']:.0f} s", flush=True)

    def retime(self, path: Path) -> None:
        """Measure again what the file has a latency of."""
        found = [json.loads(line) for line in path.read_text().splitlines()]
        policies = {row.key: row.policy for rows in (accuracy_rows, goal_rows) for row in rows(self)}
        for row in found:
            if "ratio" in row and row["key"] in policies:
                row |= self._speed(policies[row["key"]])
                print(f"{row['key']}: {row['latency_ms']:.3f} ms, {row['ratio']:.2f}x", flush=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found))

    def row(self, row: Row) -> dict[str, Any]:
        """Compress, fine-tune with quantisation simulated, export, and ask the runtime for the test split."""
        start = time.perf_counter()
        whole = self.evaluator.compressor.apply(Policy(model=self.anatomy.digest))[1]
        with tempfile.TemporaryDirectory() as folder:
            job = Job(policy=row.policy, rung="long", seed=row.seed, steps=row.images // BATCH, folder=Path(folder))
            module, planned, _ = self.evaluator.train(job)
            path = Path(folder) / "model.onnx"
            write_onnx(module, planned, row.policy, path)
            used = bits_used(path, planned, TARGET.disabled_optimizers)
            check_bits(used, planned)
            session = Session(path, threads=1, disabled_optimizers=TARGET.disabled_optimizers)
            test = self.evaluator.test
            outputs = session.outputs(self.task.model_inputs(test.inputs))
            accuracy = score(outputs, test, self.task).accuracy
            size_bytes = path.stat().st_size
        measured = self._speed(row.policy) if row.timed else {}
        return {
            "key": row.key, "network": row.network, "name": row.name, "distill": row.distill, "seed": row.seed,
            "images": row.images, "accuracy": accuracy, "int8_layers": sum(kind == "int8" for kind in used.values()),
            "layers": len(used), "macs": planned.macs / whole.macs, "params": planned.params / whole.params,
            "size_bytes": size_bytes, "seconds": time.perf_counter() - start, **measured,
        }  # fmt: skip

    def _speed(self, policy: Policy) -> dict[str, Any]:
        """Measured latency beside the fp32 original, interleaved."""
        timings, _ = measure_policies(self.anatomy, {"row": policy}, TARGET)
        found = timings["row"]
        return {
            "latency_ms": found.latency_ms, "repeat_error": found.repeat_error, "ratio": found.ratio,
            "reference_ms": timings[REFERENCE].latency_ms,
        }  # fmt: skip

    def uniform(self, width: float, bits: LayerBits, distill: Distill, learning_rate: float = 0.02) -> Policy:
        like = Policy(model=self.anatomy.digest, distill=distill, finetune=FineTune(learning_rate=learning_rate))
        return uniform(self.anatomy, width=width, bits=bits, like=like)


def accuracy_rows(bench: Bench) -> Iterator[Row]:
    """The uniform table. Seeds 1 and 2 on ResNet-20 at half width and below, where the noise of the gain counts."""

    def row(name: str, policy: Policy, distill: str, seed: int = 0, images: int = IMAGES) -> Row:
        return Row(network=bench.network, name=name, distill=distill, seed=seed, images=images, policy=policy,
                   timed=seed == 0 and distill == "none")  # fmt: skip

    yield row("original", bench.uniform(1, FP32, NONE), "none", images=0)
    yield row("INT8 alone", bench.uniform(1, INT8, NONE), "none", images=0)
    yield row("W4A8 alone", bench.uniform(1, PRECISIONS["W4A8"], NONE), "none", images=0)
    yield row("100 % fp32", bench.uniform(1, FP32, NONE), "none")
    for seed in (0, 1, 2) if bench.network == "resnet20" else (0,):
        for width in WIDTHS if seed == 0 else WIDTHS[1:]:
            for precision, bits in PRECISIONS.items():
                if seed and precision == "W4A8":
                    continue
                for distill, settings in DISTILLS.items():
                    yield row(f"{width:.0%} {precision}", bench.uniform(width, bits, settings), distill, seed)


def goal_rows(bench: Bench) -> Iterator[Row]:
    """One hand-made policy a network with a longer fine-tune, and the uncompressed network after the same."""
    images, make = GOALS.get(bench.network, (0, None))
    if make is None:
        return
    like = Policy(model=bench.anatomy.digest, distill=DISTILLS["logit"], finetune=FineTune(learning_rate=0.05))
    plain = replace(like, distill=NONE)
    yield Row(network=bench.network, name="original", distill="none", seed=0, images=0, policy=plain)
    name, policy = make(bench, like)
    yield Row(network=bench.network, name=name, distill="logit", seed=0, images=images, policy=policy)
    yield Row(network=bench.network, name="100 % fp32", distill="none", seed=0, images=images, policy=plain)


def narrow_late(bench: Bench, like: Policy) -> tuple[str, Policy]:
    """VGG-16: the later a layer, the fewer of its channels stay, since they hold nearly all parameters and see hardly
    any pixels."""
    kept = (1, 1, 1, 1, 0.8125, 0.8125, 0.8125, 0.4375, 0.4375, 0.4375, 0.15625, 0.15625, 0.15625)
    ratios = {group.name: 1 - share for group, share in zip(bench.anatomy.groups, kept, strict=True)}
    bits = {layer.name: INT8 for layer in bench.anatomy.layers}
    return "last layers narrow, INT8", canonical(replace(like, prune=ratios, bits=bits), bench.anatomy)


def half_the_work(bench: Bench, like: Policy) -> tuple[str, Policy]:
    """ResNet-56 at half the MACs: without the nine blocks that are missed least, and a quarter fewer channels inside
    the others.

    After half an epoch this mixture was better than either alone: 87.5 % against 86.1 % (14 blocks removed) and
    87.0 % (half the inner channels).
    """
    damage: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for block in bench.anatomy.blocks:
            policy = replace(like, removed_blocks=(block.name,))
            job = Job(policy=policy, rung="sensitivity", seed=0, steps=0, folder=Path(folder))
            damage[block.name] = bench.evaluator(job).divergence or 0.0
    removed = sorted(bench.anatomy.blocks, key=lambda b: damage[b.name] / b.macs)[:9]
    inner = {group.name: 0.25 for group in bench.anatomy.groups if group.name.endswith(".conv1")}
    bits = {layer.name: INT8 for layer in bench.anatomy.layers}
    names = tuple(sorted(block.name for block in removed))
    policy = replace(like, removed_blocks=names, prune=inner, bits=bits)
    return f"without {len(removed)} blocks, INT8", canonical(policy, bench.anatomy)


GOALS: dict[str, tuple[int, Callable[[Bench, Policy], tuple[str, Policy]]]] = {
    "vgg16_half": (5 * 45_000, narrow_late),
    "vgg16": (45_000, narrow_late),  # an epoch takes a core nine minutes
    "resnet56": (4 * 45_000, half_the_work),
}


def write_table(path: Path, out: Path | None) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = "\n".join(table(rows))
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows by network, with the drop against the better of the given weights and the longer trained original."""
    yield (
        f"{'network':11} {'policy':26} {'distill':14} {'images':>7} {'seed':>4} {'accuracy':>8} {'drop':>6} "
        f"{'MACs':>5} {'params':>6} {'kB':>6} {'int8':>7} {'ms':>7} {'faster':>7} {'s':>6}"
    )
    for row in rows:
        before = [r["accuracy"] for r in rows if _plain(r) and r["network"] == row["network"]
                  and r["images"] in (0, row["images"])]  # fmt: skip
        drop = f"{100 * (max(before) - row['accuracy']):6.2f}" if before else ""
        speed = f"{row['latency_ms']:7.3f} {row['ratio']:6.2f}x" if "ratio" in row else f"{'':15}"
        yield (
            f"{row['network']:11} {row['name']:26} {row['distill']:14} {row['images']:7} {row['seed']:4} "
            f"{100 * row['accuracy']:7.2f}% {drop} {row['macs']:5.2f} {row['params']:6.2f} "
            f"{row['size_bytes'] / 1000:6.0f} {row['int8_layers']:3}/{row['layers']:3} {speed} {row['seconds']:6.0f}"
        )
    yield from gains(rows)


def _plain(row: dict[str, Any]) -> bool:
    return row["name"] in {"original", "100 % fp32"} and row["distill"] == "none"


def gains(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What distillation adds at the same policy, and how much the seeds scatter."""
    names = list(dict.fromkeys((r["network"], r["name"]) for r in rows))
    for network, name in names:
        by_method = {
            method: [r["accuracy"] for r in rows if (r["network"], r["name"], r["distill"]) == (network, name, method)]
            for method in DISTILLS
        }
        if not all(by_method.values()):
            continue
        mean = {method: sum(values) / len(values) for method, values in by_method.items()}
        spread = max(max(values) - min(values) for values in by_method.values())
        words = ", ".join(f"{m} {100 * (mean[m] - mean['none']):+.2f}" for m in DISTILLS if m != "none")
        seeds = f" (seeds of one method lie {100 * spread:.2f} apart)" if len(by_method["none"]) > 1 else ""
        yield f"{network} {name}: {words} points against no distillation{seeds}"


if __name__ == "__main__":
    main()
