"""The staircase of the device: how its latency steps with the number of channels."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

from ..search.records import RunRecord
from .figure_base import AMBER, BLUE, GREEN, GREY, RED, blank, no_markup
from .text import counted, digits

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = (BLUE, AMBER, GREEN, RED, GREY)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""With the colours: a line is told from another without seeing its hue."""
LARGEST_GAP = 8
"""Between neighbours on a line, in the smallest distance of two."""


class Stair(NamedTuple):
    """One kind of layer measured at several widths: (channels, milliseconds), by channels."""

    name: str
    points: tuple[tuple[float, float], ...]


class StaircaseInfo(NamedTuple):
    """All stairs that the target's profile holds."""

    stairs: tuple[Stair, ...]


def staircase_info(run: RunRecord) -> StaircaseInfo:
    """Stairs from ``staircases`` of the target: ``[{name, points: [{channels, latency_ms}]}]``, measured alone."""
    known: object = (run.target or {}).get("staircases")
    if not isinstance(known, list):
        return StaircaseInfo(())
    stairs: list[Stair] = []
    for entry in cast("list[object]", known):
        if not isinstance(entry, Mapping):
            continue
        stair = cast("Mapping[str, Any]", entry)
        points: list[Any] = [p for p in stair.get("points") or [] if isinstance(p, Mapping)]
        pairs = [(p.get("channels"), p.get("latency_ms")) for p in points]
        numbers = sorted((float(x), float(y)) for x, y in pairs if _number(x) and _number(y))
        if numbers:
            stairs.append(Stair(str(stair.get("name") or "layer"), tuple(numbers)))
    return StaircaseInfo(tuple(stairs))


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def staircase_text(info: StaircaseInfo) -> str:
    """What was measured, and the widest tread of it; says so when nothing was."""
    if not info.stairs:
        return (
            "This target's profile holds no measured staircase: how latency steps with single channels was not "
            "measured on this device, and nothing is drawn in its place."
        )
    points = sum(len(stair.points) for stair in info.stairs)
    stairs = counted(len(info.stairs), "kind of layer", "kinds of layers")
    said = [f"{counted(points, 'measurement')} of {stairs} at different widths."]
    found = [(gain, stair, a, b) for stair in info.stairs if (step := _riser(stair)) for gain, a, b in [step]]
    if found:
        gain, stair, a, b = max(found, key=lambda item: item[0])
        said.append(
            f"The highest step: {stair.name} takes {digits(gain)} ms more with {b:.0f} channels than with {a:.0f}."
        )
    return " ".join(said)


def _riser(stair: Stair) -> tuple[float, float, float] | None:
    """The largest rise between neighbouring widths: (ms, from channels, to channels)."""
    rises = (
        (second[1] - first[1], first[0], second[0])
        for first, second in itertools.pairwise(_with_gaps(stair.points))
        if first[1] is not None and second[1] is not None
    )
    return max(rises, default=None)


def staircase_figure(info: StaircaseInfo) -> "Figure":
    """Draw a line of steps for each kind of layer, with its measured points."""
    figure = blank("channels", "latency, ms", height=380)
    for i, stair in enumerate(info.stairs):
        colour = COLOURS[i % len(COLOURS)]
        points = list(_with_gaps(stair.points))
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="lines+markers",
            name=no_markup(stair.name),
            line={"shape": "hvh", "color": colour, "dash": DASHES[i // len(COLOURS) % len(DASHES)], "width": 1.5},
            marker={"size": 6, "color": colour},
            hovertemplate="%{x} channels: %{y:.4~g} ms<extra>" + no_markup(stair.name) + "</extra>",
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def _with_gaps(points: tuple[tuple[float, float], ...]) -> Iterator[tuple[float, float | None]]:
    """A line says that what lies between was looked at: it ends where widths were left out."""
    closest = min((b[0] - a[0] for a, b in itertools.pairwise(points)), default=0)
    for before, (width, latency_ms) in zip((None, *points), points, strict=False):
        if before is not None and width - before[0] > LARGEST_GAP * closest:
            yield (before[0] + width) / 2, None
        yield width, latency_ms
