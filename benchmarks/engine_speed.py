"""Speed and memory of the engine, as ratios taken in one run; called by ``engine_cifar10.py``."""

import gc
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar10 import MOMENTS, pixels, task
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nightpress.evaluators.compute import Compute
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.evaluate import Evaluator, Job, Recipe, checkpoint, save_checkpoint
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.training import Trainer
from nightpress.spaces.policy import INT8, Distill, Policy
from nightpress.spaces.space import Space, uniform

BATCH, STEPS, ROUNDS = 128, 12, 5
NONE = Distill(method="none", alpha=0.0)


class Pictures(Dataset[tuple[Tensor, int]]):
    """CIFAR-10 as a plain training script has it: one picture at a time, transformed on the way."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        mean, spread = MOMENTS["resnet"]
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(mean, spread),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def speed(folder: Path, threads: int) -> None:
    """Steps of ResNet-20 at batch 128: ways to train take turns, and the quickest turn of each counts."""
    given = task("resnet20", folder)
    anatomy, _ = inspect(given)
    images = pixels(folder)
    count = BATCH * STEPS
    train = Arrays(images["train_images"][:count], images["train_labels"][:count])
    plain = Policy(model=anatomy.digest, distill=NONE)
    logit = replace(plain, distill=Distill())
    integer = uniform(anatomy, width=1, bits=INT8, like=plain)
    recipe = Recipe(task="resnet20", base=None, anatomy=anatomy, seed=0, compute=Compute(), batch_size=BATCH,
                    threads=threads)  # fmt: skip
    evaluator = Evaluator(recipe, given)
    fast = Compute(channels_last=True, bf16=True)
    ways: dict[str, Callable[[], None]] = {
        "plain eager, NCHW, fp32, DataLoader of 2 workers": _eager(given.model, train),
        "ours, fp32, NCHW": _ours(evaluator, train, Compute(), plain),
        "ours, fp32, channels_last": _ours(evaluator, train, Compute(channels_last=True), plain),
        "ours, bf16, channels_last": _ours(evaluator, train, fast, plain),
        "ours, bf16, channels_last, logit distillation": _ours(evaluator, train, fast, logit),
        "ours, fp32, channels_last, fake-quantised": _ours(evaluator, train, Compute(channels_last=True), integer),
        "ours, bf16, channels_last, fake-quantised": _ours(evaluator, train, fast, integer),
    }
    seconds = _race(ways)
    first = min(seconds["plain eager, NCHW, fp32, DataLoader of 2 workers"])
    print(f"ResNet-20, batch {BATCH}, {threads} threads, {STEPS} steps a turn, {ROUNDS} turns; images a second")
    for name, turns in seconds.items():
        best, second = sorted(turns)[:2]
        rate = count / best
        print(f"{name:52} {rate:7.0f}  {first / best:5.2f}x  (two quickest turns differ by {second / best - 1:.1%})")
    for kind in ("fp32", "bf16"):
        ratio = min(seconds[f"ours, {kind}, channels_last, fake-quantised"]) / min(
            seconds[f"ours, {kind}, channels_last"]
        )
        print(f"fake-quantised against plain step, {kind}, channels_last: {ratio:.2f}x")
    _apply_share(evaluator, anatomy)


def _race(ways: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _eager(model: nn.Module, train: Arrays) -> Callable[[], None]:
    """The loop of any tutorial. Its workers stay alive from turn to turn."""
    import copy

    network = copy.deepcopy(model)
    loader = DataLoader(
        Pictures(train.inputs, train.targets), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )
    optimiser = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)

    def turn() -> None:
        network.train()
        for inputs, targets in loader:
            optimiser.zero_grad()
            loss = F.cross_entropy(network(inputs), targets)
            loss.backward()
            optimiser.step()

    return turn


def _ours(evaluator: Evaluator, train: Arrays, compute: Compute, policy: Policy) -> Callable[[], None]:
    trainer = Trainer(evaluator.task, train, compute, 0, BATCH, uncompressed=evaluator.compressor.whole)
    module, _ = evaluator.compressor.apply(policy)
    trainer.reestimate(module)
    return lambda: void(trainer.fit(module, policy, steps=STEPS, seed=0))


def void(_: object) -> None:
    """Drop a result."""


def _apply_share(evaluator: Evaluator, anatomy: Any) -> None:
    """What applying a policy and restoring it from a checkpoint cost beside its short fine-tune (3,000 images)."""
    import numpy as np

    generator = np.random.default_rng(0)
    space = Space(anatomy=anatomy, max_ratio=0.7, bit_choices=Target().bit_choices((8, 32), (8, 32)))
    policies = [space.random(generator) for _ in range(5)]
    applied, restored, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, policy in enumerate(policies):
            start = time.perf_counter()
            module, _ = evaluator.compressor.apply(policy)
            applied.append(time.perf_counter() - start)
            path = checkpoint(Path(folder), "bn")
            save_checkpoint(module, path)
            start = time.perf_counter()
            evaluator.compressor.shell(policy)[0].load_state_dict(load_file(path))
            restored.append(time.perf_counter() - start)
            job = Job(policy=policy, rung="short", seed=0, steps=3000 // BATCH, folder=Path(folder) / str(number))
            start = time.perf_counter()
            evaluator(job)
            whole.append(time.perf_counter() - start)
    share = (sum(applied) + sum(restored)) / sum(whole)
    print(
        f"apply {1000 * min(applied):.0f} ms, restore {1000 * min(restored):.0f} ms, a trial of 3,000 images "
        f"{min(whole):.1f} s: {share:.1%} of the trial"
    )


def memory(folder: Path, threads: int) -> None:
    """Resident memory over 200 trials in one process, each with a policy of its own, a few steps and checkpoints."""
    import numpy as np

    given = task("resnet20", folder)
    anatomy, _ = inspect(given)
    recipe = Recipe(task="resnet20", base=None, anatomy=anatomy, seed=0, compute=Compute(channels_last=True, bf16=True),
                    batch_size=32, threads=threads)  # fmt: skip
    evaluator = Evaluator(recipe, given)
    evaluator.search = evaluator.search.take(torch.arange(64))
    space = Space(anatomy=anatomy, max_ratio=0.7, bit_choices=Target().bit_choices((4, 8, 32), (8, 32)))
    generator = np.random.default_rng(0)
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        for number, policy in enumerate(_policies(space, generator, 200)):
            evaluator(Job(policy=policy, rung="short", seed=number, steps=4, folder=Path(root)))
            gc.collect()
            seen.append(_resident_mb())
            if number + 1 in {1, 10, 20, 50, 100, 150, 200}:
                print(f"after {number + 1:3} trials: {seen[-1]:.0f} MB resident", flush=True)
    print(f"trial 200 against trial 20: {seen[-1] / seen[19] - 1:+.1%}; peak {_peak_mb():.0f} MB")


def _policies(space: Space, generator: Any, count: int) -> Iterator[Policy]:
    for _ in range(count):
        yield space.random(generator)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
