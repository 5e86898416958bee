"""What fake quantisation costs: a training step of a CIFAR ResNet-20, batch 128, with every weight and activation
quantised, against the plain step.

    python benchmarks/quantise_step.py --threads 1 --rounds 8

The variants take turns step by step. Ranges are looked at in one step of eight, so a variant's figure is the mean over
the eight, of each the quickest of all rounds: what else the machine does only ever adds.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightpress.evaluators.quantise import ActivationQuantiser, LearnedActivationQuantiser
from nightpress.evaluators.quantised_layers import with_quantised_weight

PERIOD = 8
Site = Callable[[], nn.Module]


class Block(nn.Module):
    """A residual block with a quantiser wherever ONNX Runtime quantises."""

    def __init__(self, cin: int, cout: int, stride: int, site: Site) -> None:
        super().__init__()
        self.conv1, self.bn1, self.q1 = _conv(cin, cout, 3, stride), nn.BatchNorm2d(cout), site()
        self.conv2, self.bn2, self.q2 = _conv(cout, cout, 3, 1), nn.BatchNorm2d(cout), site()
        self.shortcut = nn.Sequential()
        if cin != cout:
            self.shortcut = nn.Sequential(_conv(cin, cout, 1, stride), nn.BatchNorm2d(cout), site())
        self.q3 = site()

    def forward(self, x: Tensor) -> Tensor:
        y = self.q1(F.relu(self.bn1(self.conv1(x))))
        return self.q3(F.relu(self.q2(self.bn2(self.conv2(y))) + self.shortcut(x)))


def resnet20(site: Site) -> nn.Module:
    """32 sites."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(cin, cout, 1 if cin == cout else 2, site) for cin, cout in itertools.pairwise(widths)]
    stem = [site(), _conv(3, 16, 3, 1), nn.BatchNorm2d(16), nn.ReLU(), site()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), site(), nn.Flatten(), nn.Linear(64, 10))


def _conv(cin: int, cout: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)


def quantised(ranges: str, scales: str) -> nn.Module:
    """8-bit weights and activations everywhere."""
    site = LearnedActivationQuantiser if scales == "learned" else ActivationQuantiser
    network = resnet20(partial(site, ranges=ranges))
    for path, layer in list(network.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent, _, name = path.rpartition(".")
            quantised_layer = with_quantised_weight(layer, 8, ranges=ranges, scales=scales)
            setattr(network.get_submodule(parent), name, quantised_layer)
    return network


def steps(network: nn.Module, *, bf16: bool) -> Iterator[None]:
    """One training step for each item asked for."""
    network = network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    inputs = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(0, 10, (128,))
    while True:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
            outputs = network(inputs)
        F.cross_entropy(outputs.float(), targets).backward()
        optimiser.step()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": partial(resnet20, nn.Identity),
        "min-max, fixed": partial(quantised, "minmax", "fixed"),
        "MSE, fixed": partial(quantised, "mse", "fixed"),
        "MSE, learned": partial(quantised, "mse", "learned"),
    }
    runs = {(name, bf16): steps(make(), bf16=bf16) for bf16 in (False, True) for name, make in makers.items()}
    phases = {key: [math.inf] * PERIOD for key in runs}
    for step in range(PERIOD * (given.rounds + 1)):
        for key, run in runs.items():
            start = time.perf_counter()
            next(run)
            if step >= PERIOD:  # the first round is a warm-up
                phases[key][step % PERIOD] = min(phases[key][step % PERIOD], 1000 * (time.perf_counter() - start))
    print(f"torch {torch.__version__}, {given.threads} thread(s), the quickest of {given.rounds} rounds")
    step_ms = {key: sum(quickest) / PERIOD for key, quickest in phases.items()}
    for (name, bf16), value in step_ms.items():
        ratio = value / step_ms["plain", bf16]
        print(f"{'bf16' if bf16 else 'fp32'} {name:16} {value:7.1f} ms {ratio:5.2f}x")


if __name__ == "__main__":
    main()
