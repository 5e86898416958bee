"""CIFAR-10 as JPEG files, and the networks that were trained on them, as tasks. Nothing here is part of the package.

``DIR`` holds ``cifar10-jpeg.zip`` (``train/<class>/*.jpg``, ``test/<class>/*.jpg``) and the weights named in
:data:`WEIGHTS`. Decoding takes a minute and is done once; the pixels are kept in the user's cache.
"""

import io
import os
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from option_a import CifarResNet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nightpress.evaluators import Task
from nightpress.evaluators.images import crop_flip, normalise
from nightpress.spaces.files import cache_folder

ARCHIVE = "cifar10-jpeg.zip"
WEIGHTS = {
    "resnet20": "resnet20_cifar10jpeg.pt",
    "resnet56": "resnet56_cifar10jpeg.pt",
    "vgg16_half": "vgg16_bn_half_cifar10jpeg.pt",
}
MOMENTS = {
    "resnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "vgg": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg16(share: float = 1.0, classes: int = 10) -> nn.Module:
    """torchvision's VGG16-BN with every width times ``share``, a global pool and one linear layer."""
    from torchvision.models.vgg import VGG, make_layers

    plan: list[str | int] = [width if isinstance(width, str) else int(width * share) for width in _VGG16]
    network = VGG(make_layers(plan, batch_norm=True), num_classes=classes, init_weights=True)
    network.avgpool = nn.AdaptiveAvgPool2d(1)  # pyright: ignore[reportAttributeAccessIssue]
    network.classifier = nn.Linear(int(512 * share), classes)  # pyright: ignore[reportAttributeAccessIssue]
    return network


def load(name: str, folder: Path) -> nn.Module:
    """A network with its weights, in evaluation mode. Exits with a sentence when they are missing."""
    network = {"resnet20": lambda: CifarResNet(3), "resnet56": lambda: CifarResNet(9), "vgg16": vgg16,
               "vgg16_half": lambda: vgg16(0.5)}[name]()  # fmt: skip
    path = folder / WEIGHTS[name] if name in WEIGHTS else vgg16_weights()
    if not path.is_file():
        sys.exit(f"{path} is missing: the benchmark needs the weights of {name}.")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def task(name: str, folder: Path) -> Task:
    """A network on all 50,000 training and 10,000 test images."""
    images = pixels(folder)
    return Task(
        name=name,
        model=load(name, folder),
        example_input=torch.zeros(1, 3, 32, 32),
        train=TensorDataset(images["train_images"], images["train_labels"]),
        test=TensorDataset(images["test_images"], images["test_labels"]),
        augment=crop_flip(),
        normalise=normaliser(name),
    )


def normaliser(name: str) -> Callable[[Tensor], Tensor]:
    """Bytes to what a network was trained on."""
    mean, spread = MOMENTS["vgg" if "vgg" in name else "resnet"]
    return normalise(mean, spread)


def vgg16_weights() -> Path:
    """Where ``train_vgg16.py`` leaves its weights."""
    return cache_folder() / "vgg16_bn_cifar10jpeg.pt"


@cache
def pixels(folder: Path) -> dict[str, Tensor]:
    """``train_images`` (50000, 3, 32, 32) uint8, ``train_labels`` (50000,), and the same of the test split."""
    archive = folder / ARCHIVE
    if not archive.is_file():
        sys.exit(f"{archive} is missing: the benchmark needs the images.")
    kept = cache_folder() / "cifar10-jpeg.safetensors"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        save_file(_decode(archive), partial)
        partial.replace(kept)
    return load_file(kept)


def _decode(archive: Path) -> dict[str, Tensor]:
    from PIL import Image

    found: dict[str, Tensor] = {}
    with zipfile.ZipFile(archive) as files:
        for split in ("train", "test"):
            names = sorted(n for n in files.namelist() if n.startswith(f"{split}/") and n.endswith(".jpg"))
            classes = sorted({n.split("/")[1] for n in names})
            images = torch.empty(len(names), 3, 32, 32, dtype=torch.uint8)
            for i, name in enumerate(names):
                data = Image.open(io.BytesIO(files.read(name))).convert("RGB").tobytes()
                images[i] = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
            found[f"{split}_images"] = images
            found[f"{split}_labels"] = torch.tensor([classes.index(n.split("/")[1]) for n in names])
    return found
