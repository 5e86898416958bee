"""All figures of a run: each is an info, a value that can be compared, and a function that draws it."""

from ..search.records import RunRecord
from .figure_base import Panel
from .figure_front import FrontInfo, front_figure, front_info, front_text
from .figure_latency import LatencyInfo, latency_figure, latency_info, latency_text
from .figure_night import (
    HypervolumeInfo,
    NoiseInfo,
    PhasesInfo,
    hypervolume_figure,
    hypervolume_info,
    hypervolume_text,
    noise_figure,
    noise_info,
    noise_text,
    phases_figure,
    phases_info,
    phases_text,
)
from .figure_sensitivity import SensitivityInfo, sensitivity_figure, sensitivity_info, sensitivity_text

__all__ = [
    "FrontInfo",
    "HypervolumeInfo",
    "LatencyInfo",
    "NoiseInfo",
    "Panel",
    "PhasesInfo",
    "SensitivityInfo",
    "front_figure",
    "front_info",
    "front_text",
    "hypervolume_figure",
    "hypervolume_info",
    "hypervolume_text",
    "latency_figure",
    "latency_info",
    "latency_text",
    "noise_figure",
    "noise_info",
    "noise_text",
    "panels",
    "phases_figure",
    "phases_info",
    "phases_text",
    "sensitivity_figure",
    "sensitivity_info",
    "sensitivity_text",
]


def panels(run: RunRecord) -> list[Panel]:
    """The report's figures, the front first. A panel without data has its sentence and no figure."""
    front, growth, latency = front_info(run), hypervolume_info(run), latency_info(run)
    sensitivity, noise, phases = sensitivity_info(run), noise_info(run), phases_info(run)
    return [
        Panel("front", "The front", front_text(front), front_figure(front) if front.dots else None),
        Panel(
            "hypervolume",
            "Progress of the search",
            hypervolume_text(growth),
            hypervolume_figure(growth) if growth.steps else None,
        ),
        Panel(
            "latency",
            "Predicted and measured latency",
            latency_text(latency),
            latency_figure(latency) if latency.pairs else None,
        ),
        Panel(
            "sensitivity",
            "What hurts",
            sensitivity_text(sensitivity),
            sensitivity_figure(sensitivity) if sensitivity.bars else None,
        ),
        Panel("noise", "Noise of the machine", noise_text(noise), noise_figure(noise) if noise.samples else None),
        Panel(
            "seconds",
            "Where the time went",
            phases_text(phases),
            phases_figure(phases) if phases.total else None,
        ),
    ]
