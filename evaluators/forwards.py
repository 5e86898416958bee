"""What a user reads of a model that cannot be run as it is, or returns something else than one tensor."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..spaces.errors import InputError

_INSIDE = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Wrappers, with the attribute that holds the user's module."""


def check_plain(model: nn.Module) -> None:
    """Raises InputError for what wraps or replaces a Python module; its parameters have other names, or no forward."""
    for name, module in model.named_modules():
        kind, where = type(module).__name__, f"its part {name}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"The model must be a Python module, but {where} is TorchScript: build the module and load its weights."
            )
        if kind in _INSIDE:
            raise InputError(f"The model must be a plain module, but {where} is a {kind}: give its .{_INSIDE[kind]}.")


def check_types(model: nn.Module) -> None:
    """Raises InputError for weights that are not fp32: training and the exported file are."""
    for name, value in model.named_parameters():
        if value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            raise InputError(f"The model's weights must be float32, but {name} is {kind}: call model.float() first.")


def cannot_run(model: nn.Module, example: Tensor, error: Exception, role: str = "model") -> str:
    """Why a forward failed, in which module, and what is asked of it. ``example`` has shape (n, …)."""
    count = f"{len(example)} example{'s' if len(example) != 1 else ''}"
    return (
        f"The {role} {type(model).__name__} cannot run a batch of {count} of shape {tuple(example.shape[1:])}: "
        f"{first_line(error)} (in {culprit(error, model)}). Its forward must take one tensor, a batch of any "
        "size in fp32."
    )


def not_one_tensor(returned: object, name: str, role: str = "model") -> str:
    """What to do about a forward that returns several tensors, or none."""
    kind = type(returned).__name__
    if isinstance(returned, Mapping) and returned:
        keys = list(cast("Mapping[Any, object]", returned))
        return several(name, kind, len(keys), f"[{keys[0]!r}]", role)
    if isinstance(returned, Sequence) and not isinstance(returned, str) and returned:
        return several(name, kind, len(cast("Sequence[object]", returned)), "[0]", role)
    parts = [key for key, value in getattr(returned, "__dict__", {}).items() if isinstance(value, Tensor)]
    if parts:
        return several(name, kind, len(parts), f".{parts[0]}", role)
    return f"The {role} must return one tensor, but {name} returns {returned!r}."


def several(name: str, kind: str, count: int, access: str, role: str = "model") -> str:
    """What to do about a forward that returns ``count`` tensors in one ``kind``; ``access`` is how one is taken."""
    return (
        f"The {role} must return one tensor, but {name} returns a {kind} of {count}; Task.output picks the one that "
        f"counts: Task(output=lambda outputs: outputs{access}, …)."
    )


def culprit(error: BaseException, model: nn.Module) -> str:
    """The deepest module of the user's own whose forward was running when it failed."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            found = f"{names[id(owner)]} ({type(owner).__name__})"
        trace = trace.tb_next
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
