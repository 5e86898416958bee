"""Train the full-width VGG16-BN on CIFAR-10 (JPEG), for which there are no weights to be had.

Eight to ten minutes an epoch on one core, so it runs in the background, keeps a checkpoint after each epoch and
goes on from it when it is started again. ``engine_cifar10.py --networks vgg16`` takes the weights from where it leaves
them.

    nice python benchmarks/train_vgg16.py --data DIR --epochs 10 --threads 1
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar10 import normaliser, pixels, vgg16, vgg16_weights
from torch import Tensor, nn

from nightpress.evaluators.images import crop_flip

BATCH, PEAK = 128, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each epoch; default: all (for a quick look)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = vgg16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = pixels(options.data)
    steps = options.steps or len(images["train_labels"]) // BATCH
    optimiser = torch.optim.SGD(network.parameters(), PEAK, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=steps * options.epochs, pct_start=0.2)
    path = vgg16_weights().with_suffix(f".{options.epochs}x{steps}.checkpoint")
    first = 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, options.epochs):
        start = time.perf_counter()
        loss = _epoch(network, optimiser, schedule, images, epoch, steps)
        print(
            f"epoch {epoch + 1} of {options.epochs}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True
        )
        state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(),
                 "schedule": schedule.state_dict(), "epoch": epoch + 1}  # fmt: skip
        _save(state, path)
    _save(network.state_dict(), vgg16_weights())
    print(f"test accuracy {100 * _accuracy(network.eval(), images):.2f} %, weights in {vgg16_weights()}")


def _epoch(
    network: nn.Module, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler,
    images: dict[str, Tensor], epoch: int, steps: int,
) -> float:  # fmt: skip
    """Mean loss over an epoch, in bf16."""
    network.train()
    augment, normalise, total = crop_flip(), normaliser("vgg16"), 0.0
    order = torch.randperm(len(images["train_labels"]), generator=torch.Generator().manual_seed(epoch))
    for step in range(steps):
        index = order[step * BATCH : (step + 1) * BATCH]
        inputs = normalise(augment(images["train_images"][index])).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(inputs)
        loss = F.cross_entropy(outputs.float(), images["train_labels"][index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
    return total / steps


@torch.no_grad()
def _accuracy(network: nn.Module, images: dict[str, Tensor]) -> float:
    normalise = normaliser("vgg16")
    parts = [network(normalise(part)).argmax(1) for part in images["test_images"].split(500)]
    return float((torch.cat(parts) == images["test_labels"]).float().mean())


def _save(state: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    torch.save(state, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
