"""All figures of a run: each is an info, a value that can be compared, and a function that draws it."""

from dataclasses import replace
from functools import partial

from ..search.records import RunRecord
from .figure_base import Panel
from .figure_front import front_figure, front_info, front_text
from .figure_latency import latency_figure, latency_info, latency_text
from .figure_night import (
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
from .figure_search import importances_figure, importances_text, rungs_figure, rungs_info, rungs_text
from .figure_sensitivity import sensitivity_figure, sensitivity_info, sensitivity_text
from .figure_staircase import staircase_figure, staircase_info, staircase_text
from .importances import importances

HOW = {
    "front": "Up and to the left is better. Filled: exported and measured again in the target's runtime. Hollow: "
    "as the search saw it, on its own split, with the 90 % interval of a predicted latency. Diamonds: "
    "baselines. Crosses: struck out by verification (hover for the reason). Shaded: beyond the limits. "
    "The line joins what nothing beats in both values; a point off the line may stand on the front by "
    "the third one.",
    "hypervolume": "How much of the space between the reference point and a perfect, free model is dominated by what "
    "was found so far. A flat end means that more time would hardly have helped.",
    "rungs": "Each bar is a stage of the search; a trial is stopped when even a hopeful guess of its end is "
    "dominated, and waits while others promise more, so that time goes to those that may matter.",
    "latency": "On the diagonal the prediction is right; the band is ± 10 %. Models that were held out and trials "
    "of this night are the honest test, since the predictor had not seen them.",
    "sensitivity": "Darker hurts more: the mean divergence of the outputs (nats) when this part alone is compressed, "
    "before any fine-tune. From top to bottom as in the network.",
    "staircase": "Where the line is flat, fewer channels save no time on this device.",
    "importances": "PED-ANOVA: how differently the best tenth of the trials chose a value than all trials did. It says "
    "where to look, not in which direction to go.",
    "noise": "The same uncompressed model, measured over and over: what it wanders by is the machine's doing. "
    "Red points did not repeat.",
    "seconds": "What each phase took beside what was planned for it.",
}
"""How to read each picture, in plain words."""


def panels(run: RunRecord) -> list[Panel]:
    """The report's figures, the front first. A panel without data has its sentence and no figure."""
    front, growth, latency = front_info(run), hypervolume_info(run), latency_info(run)
    sensitivity, noise, phases = sensitivity_info(run), noise_info(run), phases_info(run)
    rungs, stairs, mattered = rungs_info(run), staircase_info(run), importances(run)
    found = [
        Panel("front", "The front", front_text(front), partial(front_figure, front) if front.dots else None, wide=True),
        Panel(
            "hypervolume", "Progress of the search", hypervolume_text(growth),
            partial(hypervolume_figure, growth) if growth.steps else None, wide=True,
        ),
        Panel(
            "rungs", "How far the trials came", rungs_text(rungs),
            partial(rungs_figure, rungs) if rungs.stages else None,
        ),
        Panel(
            "importances", "Which choices mattered", importances_text(mattered),
            partial(importances_figure, mattered) if mattered.parameters else None,
        ),
        Panel(
            "latency", "Predicted and measured latency", latency_text(latency),
            partial(latency_figure, latency) if latency.pairs else None,
        ),
        Panel(
            "sensitivity", "What hurts", sensitivity_text(sensitivity),
            partial(sensitivity_figure, sensitivity) if sensitivity.cells else None,
        ),
        Panel(
            "staircase", "Staircase of the device", staircase_text(stairs),
            partial(staircase_figure, stairs) if stairs.stairs else None,
        ),
        Panel(
            "noise", "Noise of the machine", noise_text(noise),
            partial(noise_figure, noise) if noise.samples else None,
        ),
        Panel(
            "seconds", "Where the time went", phases_text(phases),
            partial(phases_figure, phases) if phases.total else None,
        ),
    ]  # fmt: skip
    return [replace(panel, how=HOW[panel.key]) for panel in found]
