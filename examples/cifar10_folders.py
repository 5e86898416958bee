"""A task from images in class folders: CIFAR-10 as files, and the ResNet-20 of the ResNet paper.

Expects ``$CIFAR10_DIR/train/<class>/*`` and ``$CIFAR10_DIR/test/<class>/*``, and in ``$CIFAR10_WEIGHTS`` a
state dict named as in github.com/akamaster/pytorch_resnet_cifar10. Then, for example:

    nightpress inspect examples/cifar10_folders.py:build --target onnxruntime
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from nightpress.evaluators.images import crop_flip, normalise
from nightpress.evaluators.task import Task
from nightpress.spaces.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 32


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015: every second pixel, and zeros for the new channels on both sides.

    Written as a frozen 1×1 convolution with stride 2, which computes exactly that and, unlike slicing and
    padding, can follow when channels on either side are removed.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)
        first = (out_channels - in_channels) // 2
        kernel = torch.zeros_like(self.conv.weight)
        kernel[first : first + in_channels, :, 0, 0] = torch.eye(in_channels)
        self.conv.weight = nn.Parameter(kernel, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Maps ``(n, 3, 32, 32)`` to ``(n, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def build() -> Task:
    train, test = _images("train"), _images("test")
    numbers = normalise(MEAN, STD)
    model = ResNet20()
    _load(model, Path(_variable("CIFAR10_WEIGHTS")))
    return Task(
        name="cifar10-resnet20",
        model=model.eval(),
        example_input=numbers(test.tensors[0][:1]),
        train=train,
        test=test,
        augment=crop_flip(padding=4),
        normalise=numbers,
    )


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(2)))


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(f"The environment variable {name} must be set: see the head of {__file__}.")
    return value


def _images(split: str) -> TensorDataset:
    folder = Path(_variable("CIFAR10_DIR"), split)
    if not folder.is_dir():
        raise InputError(f"CIFAR10_DIR must hold the folders train and test, but there is no {folder}.")
    files = ImageFolder(str(folder), transform=PILToTensor())
    # Bytes take a quarter of the memory; they become numbers batch by batch.
    pixels = torch.empty(len(files), 3, SIDE, SIDE, dtype=torch.uint8)
    for index in range(len(files)):
        pixels[index] = files[index][0]
    return TensorDataset(pixels, torch.tensor(files.targets))


def _load(model: ResNet20, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"The weights file {path} of CIFAR10_WEIGHTS does not exist.")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("module."): value for key, value in loaded.get("state_dict", loaded).items()}
    # The shortcuts are constants and stand in no file.
    own = {key: value for key, value in model.state_dict().items() if ".shortcut." in key}
    model.load_state_dict(own | weights)
