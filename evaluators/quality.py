"""Judging a module: its outputs over a split, the metric and its standard error."""

import base64
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .compute import Compute
from .data import Arrays
from .task import Task

MOST_ITEMS = 200_000
"""Splits of more items leave no answers behind: they would be too long for a record."""


class DivergedError(RuntimeError):
    """The training loss stopped being a finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The metric over a split, its standard error (None for metrics whose error is not known), seconds."""

    accuracy: float
    accuracy_se: float | None
    samples: int
    seconds: float


def outputs_of(module: nn.Module, arrays: Arrays, task: Task, compute: Compute) -> Tensor:
    """The module's fp32 outputs over a split, shape (items, …)."""
    compute.module(module).eval()
    with torch.no_grad():
        parts = [
            module(compute.cast(task.model_inputs(part))).float().cpu()
            for part in arrays.inputs.split(compute.evaluation_batch)
        ]
    return torch.cat(parts)


def score(outputs: Tensor, arrays: Arrays, task: Task, seconds: float = 0.0) -> Score:
    """The task's metric, top-1 accuracy by default with its binomial standard error.

    Raises DivergedError when an output or the metric is not finite, ValueError when the metric is above 1: a front's
    hypervolume is measured from a perfect model, whose accuracy is 1.
    """
    if not bool(torch.isfinite(outputs).all()):
        raise DivergedError("the network's outputs are not finite")
    if task.metric is not None:
        value, error = float(task.metric(outputs, arrays.targets)), None
        if not math.isfinite(value):
            raise DivergedError(f"the task's metric is {value}")
        if value > 1 + 1e-6:  # a mean in fp32 may come out a little above
            raise ValueError(f"the task's metric must be at most 1, but it is {value:.4g}")
        value = min(value, 1.0)
    else:
        value = float((outputs.argmax(dim=1) == arrays.targets).float().mean())
        error = math.sqrt(value * (1 - value) / len(arrays.targets))
    return Score(accuracy=value, accuracy_se=error, samples=len(arrays.targets), seconds=seconds)


def answers(outputs: Tensor, arrays: Arrays, task: Task) -> str | None:
    """Which items of a split were answered rightly: a bit each, in order, the highest first, as base64.

    None under a metric of the task's own, where an item has several answers, and beyond :data:`MOST_ITEMS`.
    """
    if task.metric is not None or outputs.dim() != 2 or arrays.targets.dim() != 1 or len(outputs) > MOST_ITEMS:
        return None
    return base64.b64encode(np.packbits((outputs.argmax(dim=1) == arrays.targets).numpy()).tobytes()).decode()


def judge(module: nn.Module, arrays: Arrays, task: Task, compute: Compute) -> Score:
    """:func:`score` of a module, timed; always in fp32."""
    start = time.perf_counter()
    outputs = outputs_of(module, arrays, task, compute)
    return score(outputs, arrays, task, time.perf_counter() - start)
