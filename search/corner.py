"""Where policies begin to be worth something, by what a night's state tells of its splits."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import Limits
from .records import Rung


def gap_at(state: Mapping[str, Any], rung: str, unknown: float) -> float:
    """By how much the search split is easier after this rung; ``unknown`` where no fine-tune has told."""
    short = state.get("split_gap", unknown)
    return float(state.get("long_gap", short) if rung == Rung.LONG else short)


def limits_at(state: Mapping[str, Any], limits: Limits, rung: str) -> Limits:
    """The user's limits for accuracies on the search split at this rung."""
    if limits.min_accuracy is None:
        return limits
    return replace(limits, min_accuracy=limits.min_accuracy + gap_at(state, rung, 0.0))


def asked_rung(state: Mapping[str, Any], rung: str) -> str:
    """The rung whose limits are asked of what is expected in the end, where that is judged by accuracies of ``rung``.

    Once it is known what a long fine-tune leaves of the split, that counts also while too few were trained to expect
    anything after them. What is compressed has nearly the same accuracy after both: of four ResNet-20 without three
    blocks the two on the search split lay 0.0 to 0.7 points apart, the limits 2.9, and nothing came near the short one.
    """
    return Rung.LONG if "long_gap" in state else rung


def least_accuracy(state: Mapping[str, Any], limits: Limits, rung: str) -> float:
    """Where policies begin to be worth something, for accuracies of this rung on the search split: at the user's limit
    there (:func:`limits_at`), also where that is less strict than the reference point of a night's ``state``. The
    reference point is as far below what is remembered of the split as that is below the given network."""
    if limits.min_accuracy is not None:
        return limits.min_accuracy
    given = state["given"]
    remembered = max(0.0, given["search"]["accuracy"] - given["test"]["accuracy"])
    return float(state["reference"]["accuracy"]) - max(0.0, remembered - gap_at(state, rung, remembered))


def corner_of(state: Mapping[str, Any], limits: Limits, rung: str) -> tuple[float, float, float]:
    """Accuracy at this rung, latency in ms and size in bytes beyond which a policy is worth nothing: the reference
    point, or a limit that is stricter."""
    reference = state["reference"]
    return (
        least_accuracy(state, limits, rung),
        min(reference["latency_ms"], limits.max_latency_ms or math.inf),
        min(reference["size_bytes"], limits.max_size_bytes or math.inf),
    )
