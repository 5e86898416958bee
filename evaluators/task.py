"""The user's side: a trained model with its data, given by reference or built in."""

import difflib
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from ..spaces.errors import InputError
from .data import MapDataset, item, last_line, materialise
from .forwards import cannot_run, check_plain, check_types, not_one_tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], float]
Augment = Callable[[Tensor], Tensor]
Normalise = Callable[[Tensor], Tensor]
Output = Callable[[object], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What is to be compressed, and how its worth is judged.

    Attributes:
        name: Names runs and reports.
        model: Trained; maps inputs ``(n, ...)`` to outputs, by default logits ``(n, classes)``.
        example_input: One input, ``(1, ...)``.
        train: Map-style data set of ``(input, target)``: inputs ``(...)`` as ``example_input[0]``, by
            default integer targets in ``[0, classes)``. The search split is carved out of it.
        test: The same; touched by finalists only.
        loss: ``(outputs, targets) -> scalar tensor``, on a batch; default: cross entropy.
        metric: ``(outputs, targets) -> float``, on a whole split, higher is better; default: top-1 accuracy
            in [0, 1].
        augment: ``(n, ...) -> (n, ...)``, applied to the stored inputs of each training batch.
        teacher: Gives the outputs to distil from; default: the uncompressed model.
        normalise: ``(n, ...) -> (n, ...)``, what is stored into what the model takes, after ``augment`` and
            everywhere else; default: conversion to float. It is no part of what is exported.
        output: Picks the tensor that counts where the model (and the teacher) returns a tuple or a dict.
    """

    name: str
    model: nn.Module
    example_input: Tensor
    train: MapDataset
    test: MapDataset
    loss: Loss | None = None
    metric: Metric | None = None
    augment: Augment | None = None
    teacher: nn.Module | None = None
    normalise: Normalise | None = None
    output: Output | None = None

    def model_inputs(self, stored: Tensor) -> Tensor:
        """A batch as the model takes it, from one as the data set stores it."""
        return stored.float() if self.normalise is None else self.normalise(stored)


class Picked(nn.Module):
    """A module of the user's whose output is one tensor."""

    def __init__(self, module: nn.Module, pick: Output) -> None:
        super().__init__()
        self.module = module
        self.pick = pick

    def forward(self, inputs: Tensor) -> Tensor:
        return self.pick(self.module(inputs))


def picked(task: Task, module: nn.Module) -> nn.Module:
    """The task's model or teacher as a module with one output tensor."""
    return module if task.output is None else Picked(module, task.output)


@contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """The module in evaluation mode; afterwards each part of it is in its own mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, training in modes.items():
            child.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU where it has none."""
    return next((value.device for value in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def check_task(task: Task) -> None:
    """Finds the mistakes that would otherwise end a run in the middle of the night.

    With the default loss every label is looked at: at once where the data set has ``targets`` or tensors, by
    reading each item otherwise.

    Raises:
        InputError: The first mistake, in one sentence.
    """
    # What a user passes is not what the annotations promise.
    model, example = cast("object", task.model), cast("object", task.example_input)
    if not isinstance(model, nn.Module):
        raise InputError(f"The task's model must be a torch.nn.Module, but got a value of type {type(model).__name__}.")
    if not isinstance(example, Tensor):
        raise InputError(
            f"The task's example_input must be a tensor, but got a value of type {type(example).__name__}."
        )
    if example.dim() == 0 or example.shape[0] != 1:
        raise InputError(
            f"The task's example_input must be one input of shape (1, ...), but got shape {tuple(example.shape)}."
        )
    check_plain(model)
    check_types(model)
    output = _output(task, model, example, "model")
    _check_extras(task, output)
    splits = (("training set", task.train), ("test set", task.test))
    for name, dataset in splits:
        _check_dataset(name, dataset, example)
    if task.normalise is not None:
        _check_normalise(task.normalise, task.train)
    if task.loss is None:
        classes = _classes(output)
        for name, dataset in splits:
            _check_labels(name, dataset, classes)


def load_task(ref: str, base: Path | None = None) -> Task:
    """The task that a reference stands for.

    Args:
        ref: ``path/to/file.py:function``, or a built-in name: ``mnist5k-resnet``, ``mnist5k-vgg``,
            ``torchvision:<model>``.
        base: The folder that a relative path starts from; default: the working folder.

    Raises:
        InputError: The reference leads nowhere, or the user's code fails or returns something else.
    """
    file_name, _, function_name = (f"{ref}:" if ref.endswith(".py") else ref).rpartition(":")
    if not file_name.endswith(".py"):
        from .builtin import load_builtin

        return load_builtin(ref, base)
    path = ((base or Path()) / Path(file_name).expanduser()).resolve()
    if not path.is_file():
        raise InputError(f"The task file {path} does not exist.")
    if not function_name:
        raise InputError(f"A task is given as {path.name}:function, but {ref!r} names no function of {path}.")
    with _on_sys_path(path.parent):
        module = _load_module(path)
        task = _call(_find_function(module, function_name, path), path)
    if not isinstance(task, Task):
        raise InputError(
            f"{function_name} in {path} must return a nightpress.evaluators.Task, but it returned "
            f"{'None' if task is None else f'a value of type {type(task).__name__}'}."
        )
    return task


def task_digest(model: nn.Module) -> str:
    """16 hexadecimal digits over the model's structure and weights: SHA-256 of its printed form and of each
    state entry's name, dtype, shape and bytes."""
    # Addresses differ from process to process: a module that prints a function shows one.
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(model)).encode())
    for name, value in model.state_dict().items():
        if not isinstance(cast("object", value), Tensor):  # extra state, whatever a module made of it
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _try_model(model: nn.Module, example: Tensor, name: str = "model") -> object:
    """The model's output for the example, in evaluation mode; its modes are left as they were."""
    try:
        with evaluating(model), torch.no_grad():
            return model(example.to(device_of(model)))
    except Exception as error:  # the user's own code
        raise InputError(cannot_run(model, example, error, name)) from error


def _output(task: Task, module: nn.Module, example: Tensor, name: str) -> Tensor:
    returned = _try_model(module, example, name)
    if task.output is not None:
        try:
            returned = cast("object", task.output(returned))
        except Exception as error:  # the user's own code
            raise InputError(f"Task.output fails on what the {name} returns: {last_line(error)}.") from error
    if isinstance(returned, Tensor):
        return returned
    if task.output is not None:
        raise InputError(f"Task.output must pick one tensor, but it returns {_shape_words(returned)}.")
    raise InputError(not_one_tensor(returned, type(module).__name__, name))


def _check_extras(task: Task, output: Tensor) -> None:
    """The optional parts that would fail in the first training step."""
    example = task.example_input
    teacher = cast("object", task.teacher)
    if teacher is not None:
        if not isinstance(teacher, nn.Module):
            kind = type(teacher).__name__
            raise InputError(f"The teacher must be a torch.nn.Module, but got a value of type {kind}.")
        expected, came = _shape_words(output), _shape_words(_output(task, teacher, example, "teacher"))
        if came != expected:
            raise InputError(f"The teacher must give what the model gives, {expected}, but it gives {came}.")
    if task.augment is not None:
        _check_keeps("augment", task.augment, torch.cat([example, example]))


def _check_keeps(name: str, function: Augment, batch: Tensor) -> Tensor:
    """What one of the task's functions makes of a batch; its shape must stay."""
    try:
        with torch.random.fork_rng(devices=[]):  # the check takes no random numbers from the run
            made = cast("object", function(batch))
    except Exception as error:  # the user's own code
        came = _shape_words(batch)
        raise InputError(f"The task's {name} fails on a batch of {came}: {last_line(error)}.") from error
    expected, came = _shape_words(batch), _shape_words(made)
    if came != expected:
        raise InputError(f"The task's {name} must keep a batch's {expected}, but it returned {came}.")
    return cast("Tensor", made)


def _check_normalise(normalise: Normalise, train: MapDataset) -> None:
    made = _check_keeps("normalise", normalise, torch.stack([item(train, 0, "training set")[0]] * 2))
    if not made.is_floating_point():
        raise InputError(f"The task's normalise must return numbers of type float, but it returned {made.dtype}.")


def _shape_words(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a value of type {type(value).__name__}"


def _classes(output: Tensor) -> int:
    if output.dim() == 2 and output.shape[0] == 1:
        return output.shape[1]
    raise InputError(
        "For the default loss the model must map the example input to a tensor of shape (1, classes), but "
        f"got {_shape_words(output)}: give the task a loss and a metric, or return the logits alone."
    )


def _check_dataset(name: str, dataset: MapDataset, example: Tensor) -> None:
    missing = [method for method in ("__len__", "__getitem__") if not hasattr(dataset, method)]
    if missing:
        raise InputError(
            f"The {name} must be a map-style data set, but type {type(dataset).__name__} has no {missing[0]}."
        )
    if len(dataset) == 0:
        raise InputError(f"The {name} is empty, but at least one item is needed.")
    shape = tuple(item(dataset, 0, name)[0].shape)
    if shape != tuple(example.shape[1:]):
        raise InputError(
            f"Inputs of the {name} must have the shape of example_input[0], {tuple(example.shape[1:])}, "
            f"but item 0 has {shape}."
        )


def _check_labels(name: str, dataset: MapDataset, classes: int) -> None:
    targets = _quick_targets(dataset)
    labels = materialise(dataset, name=name).targets if targets is None else targets
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.dim() != 1:
        first = f"targets of shape {tuple(labels[0].shape)}" if labels.dim() != 1 else f"{labels[0].item()}"
        raise InputError(
            f"For the default loss labels must be integers, one an item, but the {name} has {first} "
            f"({labels.dtype}) at index 0."
        )
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong) > 0:
        index = int(wrong[0])
        raise InputError(
            f"Labels must be in [0, {classes}), the number of the model's outputs, but the {name} has label "
            f"{int(labels[index])} at index {index}."
        )


def _quick_targets(dataset: object) -> Tensor | None:
    """All targets without reading an input, or None where only the items themselves can tell."""
    if isinstance(dataset, Subset):
        inner = _quick_targets(cast("object", dataset.dataset))
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    # torchvision's convention; with a target_transform the items hold something else.
    targets = getattr(dataset, "targets", None)
    if targets is None or getattr(dataset, "target_transform", None) is not None:
        return None
    try:
        tensor = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor if len(tensor) == len(cast("MapDataset", dataset)) else None


@contextmanager
def _on_sys_path(folder: Path) -> Generator[None]:
    """Lets a task file import its neighbours."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _load_module(path: Path) -> ModuleType:
    # The name carries the folder, so that two files of one name do not replace each other.
    name = f"nightpress_task_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"The task file {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        del sys.modules[name]
        raise InputError(f"Importing {path} raised {last_line(error)} ({_origin(error, path)}).") from error
    return module


def _find_function(module: ModuleType, name: str, path: Path) -> Callable[[], object]:
    found: object = getattr(module, name, None)
    if callable(found):
        return found
    if found is not None:
        raise InputError(f"{name} in {path} must be a function, but it is of type {type(found).__name__}.")
    # What the file imports is no candidate.
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    raise InputError(f"There is no function {name} in {path}{nearest(name, own)}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """``; the nearest is …`` for the end of a message, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""


def _call(function: Callable[[], object], path: Path) -> object:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        return function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{name} in {path} raised {last_line(error)} ({_origin(error, path)}).") from error


def _origin(error: BaseException, path: Path) -> str:
    """File and line of the user's code where an exception came from.

    The deepest frame in the task file or its neighbours; libraries below that folder are not the user's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    places = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(path.parent) and "site-packages" not in frame.filename
    ]
    return places[-1] if places else str(path)
