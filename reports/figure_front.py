"""The front: accuracy against latency, size as colour."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..search import pareto
from ..search.config import Limits
from ..search.records import RunRecord, TrialRecord, TrialState
from .figure_base import (
    GREY,
    LOG_FROM,
    MOST_DOTS,
    PALE_GREY,
    PALE_RED,
    RED,
    SIZES,
    blank,
    logarithmic,
    no_markup,
)
from .front import breaches, front, limits, most_interesting, picked, point, uncompressed, verified_any
from .text import counted, size, title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LEAST_FOCUS, FOCUS = 0.03, 0.25
"""How far below the best accuracy the picture reaches at first, at least and at most; broken models lie far below."""

SHAPES = {
    "predicted": ("circle", 8),
    "verified": ("circle", 12),
    "baseline": ("diamond", 11),
    "struck out": ("x-thin", 9),
}
"""Symbol and diameter of each kind of dot, in the order in which they are drawn."""


class Dot(NamedTuple):
    """One trial in the picture."""

    trial: int
    kind: str
    name: str
    accuracy: float
    latency_ms: float
    size_bytes: float
    macs: int | None
    low_ms: float
    high_ms: float
    split: str
    note: str
    verified: bool
    within: bool
    on_front: bool
    measured: bool = True


class FrontInfo(NamedTuple):
    """All of the picture; ``line`` are (latency, accuracy) corners of the staircase, fastest first."""

    dots: tuple[Dot, ...]
    line: tuple[tuple[float, float], ...]
    labels: tuple[tuple[int, str], ...]
    limits: Limits
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool
    outside: int
    left_out: int


def front_info(run: RunRecord) -> FrontInfo:
    """The picture of a run; without a trial that is known in full, one without dots."""
    on_front = {trial.number for trial in front(run)}
    allowed = limits(run, verified=verified_any(run))
    drawable = [t for t in run.trials if (t.state is TrialState.COMPLETE or t.verified) and point(t) is not None]
    dots = tuple(
        dot
        for trial in most_interesting(replace(run, trials=tuple(drawable)), MOST_DOTS)
        if (dot := _dot(trial, limits(run, verified=trial.verified is not None), trial.number in on_front)) is not None
    )
    best = [dot for dot in dots if dot.on_front]
    corners = pareto.non_dominated([(dot.latency_ms, -dot.accuracy) for dot in best])
    labels = _labels(run)
    shown = _in_focus(dots, {number for number, _ in labels})
    x_range, logarithmic = _latency_range([dot.latency_ms for dot in shown], allowed.max_latency_ms)
    return FrontInfo(
        dots=dots,
        line=tuple(sorted((best[i].latency_ms, best[i].accuracy) for i in corners)),
        labels=labels,
        limits=allowed,
        x_range=x_range,
        y_range=_accuracy_range([dot.accuracy for dot in shown]),
        logarithmic=logarithmic,
        outside=len(dots) - len(shown),
        left_out=len(drawable) - len(dots),
    )


def _labels(run: RunRecord) -> tuple[tuple[int, str], ...]:
    """Names of the picks, and of the uncompressed model, from which one judges all others."""
    labels = [(trial.number, " · ".join(names)) for trial, names in picked(run)]
    origin = uncompressed(run)
    if origin is not None and origin.number not in dict(labels):
        labels.append((origin.number, "uncompressed"))
    return tuple(labels)


def _dot(trial: TrialRecord, allowed: Limits, on_front: bool) -> Dot | None:
    found, latency = point(trial), trial.latency
    quality = trial.verified.quality if trial.verified else trial.quality
    if found is None or latency is None or quality is None:
        return None
    broken = breaches(allowed, found)
    if trial.struck_out:
        kind, note = "struck out", trial.struck_out
    elif trial.role == "baseline":
        kind, note = "baseline", "; ".join(broken)
    else:
        kind, note = "verified" if trial.verified else "predicted", "; ".join(broken)
    return Dot(
        trial=trial.number,
        kind=kind,
        name=title(trial),
        accuracy=found.accuracy,
        latency_ms=found.latency_ms,
        size_bytes=found.size_bytes,
        macs=trial.macs,
        low_ms=latency.low_ms,
        high_ms=latency.high_ms,
        split=quality.split,
        note=note,
        verified=trial.verified is not None,
        within=not broken,
        on_front=on_front,
        measured=latency.measured,
    )


def _in_focus(dots: Sequence[Dot], named: set[int]) -> list[Dot]:
    """Dots that the picture shows at first: what has a name in it, and what is no farther below the best than thrice
    what front and names span, so that a few broken models do not press all others into one line."""
    best = max((dot.accuracy for dot in dots), default=0.0)
    mattering = [best - dot.accuracy for dot in dots if dot.on_front or dot.trial in named]
    depth = min(FOCUS, max(LEAST_FOCUS, 3 * max(mattering))) if mattering else FOCUS
    return [dot for dot in dots if dot.accuracy >= best - depth or dot.trial in named]


def _latency_range(values: list[float], limit: float | None) -> tuple[tuple[float, float], bool]:
    """The axis, and whether it is logarithmic. A limit close to the points is kept in the picture."""
    if not values:
        return (0.0, 1.0), False
    low, high = min(values), max(values)
    if limit is not None and low < limit < 2 * high:
        high = max(high, limit * 1.1)
    if low > 0 and high / low > LOG_FROM:
        return (low / 1.5, high * 1.25), True  # names stand left of their points
    return (0.0, high * 1.1), False


ACROSS = {"latency_ms": 1.0, "size_bytes": 1e-3, "macs": 1e-6}
"""What may stand across, with the factor to the unit that the axis shows."""


def across_axes(info: FrontInfo) -> dict[str, dict[str, Any]]:
    """The horizontal axis for each choice of what stands across."""
    floor = info.y_range[0]
    shown = [dot for dot in info.dots if dot.accuracy >= floor]
    axes: dict[str, dict[str, Any]] = {"latency_ms": _axis(info.x_range, info.logarithmic)}
    for key in ("size_bytes", "macs"):
        values = [value * ACROSS[key] for dot in shown if (value := getattr(dot, key)) is not None]
        axes[key] = _axis(*_latency_range(values, None))
    return axes


def _axis(span: tuple[float, float], is_logarithmic: bool) -> dict[str, Any]:
    return logarithmic(*span) if is_logarithmic else {"range": list(span)}


def _accuracy_range(values: list[float]) -> tuple[float, float]:
    if not values:
        return (0.0, 1.0)
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.01)
    # A perfect model is drawn whole, but there is no tick above 100 %.
    top = high + margin if high + margin < 1 or high > 1 else 1 + 0.12 * margin
    return (max(0.0, low - margin), top)


def front_text(info: FrontInfo) -> str:
    """What the picture shows, and what lies outside of it."""
    if not info.dots:
        return "No trial is known in full yet: there is nothing to draw."
    on_front = sum(dot.on_front for dot in info.dots)
    verified = sum(dot.on_front and dot.verified for dot in info.dots)
    predicted = sum(dot.on_front and dot.verified and not dot.measured for dot in info.dots)
    remeasured = f"re-measured, but for {predicted} whose latency is a prediction" if predicted else "re-measured"
    said = [
        f"{counted(on_front, 'point')} of {len(info.dots)} {'is' if on_front == 1 else 'are'} on the front"
        f" ({verified} exported and {remeasured})."
        if on_front
        else f"There is no front: all {counted(len(info.dots), 'point')} lie beyond the limits or were struck out."
    ]
    beyond = sum(not dot.within for dot in info.dots)
    if beyond and on_front:
        said.append(f"{counted(beyond, 'point')} {'is' if beyond == 1 else 'are'} beyond the limits (shaded, pale).")
    if verified and not all(dot.verified for dot in info.dots):
        said.append("Hollow points were not exported: they stand where the search saw them, on its own split.")
    if info.outside:
        said.append(f"Outside the picture, far below: {counted(info.outside, 'point')} (double-click to see all).")
    if info.left_out:
        said.append(f"{counted(info.left_out, 'trial')} more are not drawn.")
    return " ".join(said)


def front_figure(info: FrontInfo) -> "Figure":
    """Draw the picture. Each marker's customdata starts with its trial's number."""
    sizes = [dot.size_bytes for dot in info.dots]
    scale = (min(sizes, default=0.0), max(sizes, default=1.0))
    scaled = scale[1] > scale[0]
    # Room for the ticks, the legend and the colour bar: plotly draws everything once more where it has to make room.
    room = {"l": 60, "t": 34, "b": 90, "r": 90 if scaled else 16}
    figure = blank("latency, ms", "accuracy, %", height=540, margin=room)
    _draw_limits(figure, info)
    line_x, line_y = _staircase(info)
    figure.add_scatter(
        x=line_x,
        y=line_y,
        mode="lines",
        line={"shape": "hv", "width": 1.5, "color": GREY},
        name="front",
        hoverinfo="skip",
    )
    for kind in SHAPES:
        dots = [dot for dot in info.dots if dot.kind == kind]
        if dots:
            _draw_kind(figure, kind, dots, scale)
    _draw_labels(figure, info)
    figure.update_xaxes(_axis(info.x_range, info.logarithmic))
    figure.update_yaxes(range=[100 * v for v in info.y_range])
    if scaled:
        _draw_scale(figure, scale)
    figure.update_layout(hovermode="closest")
    return figure


def _staircase(info: FrontInfo) -> tuple[list[float], list[float]]:
    """The line's corners, drawn on to the right edge: a slower model may always be as accurate."""
    if not info.line:
        return [], []
    x = [latency_ms for latency_ms, _ in info.line]
    y = [100 * accuracy for _, accuracy in info.line]
    return [*x, max(info.x_range[1], x[-1])], [*y, y[-1]]


def _draw_kind(figure: "Figure", kind: str, dots: Sequence[Dot], scale: tuple[float, float]) -> None:
    shape, width = SHAPES[kind]
    struck = kind == "struck out"
    # The legend's marker stands for the kind alone, so it has no size's colour.
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        name=kind,
        legendgroup=kind,
        marker={
            "symbol": shape if kind != "predicted" else f"{shape}-open",
            "size": width,
            "color": RED if struck else GREY,
        }
        | ({"line": {"width": 2, "color": RED}} if struck else {}),
    )
    figure.add_scatter(
        x=[dot.latency_ms for dot in dots],
        y=[100 * dot.accuracy for dot in dots],
        mode="markers",
        name=kind,
        legendgroup=kind,
        showlegend=False,
        marker={
            "symbol": [shape if dot.verified else f"{shape}-open" for dot in dots],
            "size": width,
            "color": RED if struck else [_colour(dot.size_bytes, scale) for dot in dots],
            "opacity": [1.0 if dot.within else 0.45 for dot in dots],
            "line": {"width": 2, "color": RED} if struck else {"width": 1.5},
        },
        error_x=_interval(dots) if kind == "predicted" else None,
        customdata=[_hover(dot) for dot in dots],
        hovertemplate="<b>%{customdata[1]}</b><br>%{x:.4~g} ms · %{y:.1f} % (%{customdata[2]} split)"
        "<br>%{customdata[3]}%{customdata[4]}<extra></extra>",
    )


def _interval(dots: Sequence[Dot]) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [dot.high_ms - dot.latency_ms for dot in dots],
        "arrayminus": [dot.latency_ms - dot.low_ms for dot in dots],
        "color": PALE_GREY,
        "thickness": 1,
        "width": 0,
    }


def _hover(dot: Dot) -> list[int | str]:
    note = f"<br>{no_markup(dot.note, 160)}" if dot.note else ""
    return [dot.trial, no_markup(dot.name), no_markup(dot.split), size(dot.size_bytes), note]


def _colour(size_bytes: float, scale: tuple[float, float]) -> str:
    """The size's colour as plotly would interpolate it. Given as a name for each marker, since plotly's
    legend cannot read the numbers of a shared colour axis."""
    from plotly.colors import sample_colorscale

    low, high = scale
    share = (size_bytes - low) / (high - low) if high > low else 0.0
    return str(sample_colorscale([list(stop) for stop in SIZES], min(1.0, max(0.0, share)))[0])


def _draw_scale(figure: "Figure", scale: tuple[float, float]) -> None:
    """The colour bar, carried by a trace without points."""
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        hoverinfo="skip",
        showlegend=False,
        name="size",
        marker={
            "color": [scale[0] / 1000, scale[1] / 1000],
            "colorscale": [list(stop) for stop in SIZES],
            "showscale": True,
            "colorbar": {
                "title": {"text": "kB", "side": "top"},
                "thickness": 10,
                "len": 0.6,
                "outlinewidth": 0,
            },
        },
    )


def _draw_labels(figure: "Figure", info: FrontInfo) -> None:
    """Names beside their points: of the front on the side of faster and more accurate, where no points are; of others
    below, clear of the line."""
    dots = {dot.trial: dot for dot in info.dots}
    named = sorted(((dots[n], words) for n, words in info.labels if n in dots), key=lambda pair: -pair[0].accuracy)
    for i, (dot, words) in enumerate(named):
        figure.add_annotation(
            # Annotations, unlike shapes, take the exponent on a logarithmic axis.
            x=math.log10(dot.latency_ms) if info.logarithmic else dot.latency_ms,
            y=100 * dot.accuracy,
            text=words,
            name=str(dot.trial),
            font={"size": 12},
            ax=0 if i == 0 and dot.on_front else -36,
            ay=(-26 if i == 0 else -12) if dot.on_front else 18,
            xanchor="center" if i == 0 and dot.on_front else "right",
            showarrow=True,
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=GREY,
            standoff=8,
        )


def _draw_limits(figure: "Figure", info: FrontInfo) -> None:
    """Shade what the limits rule out, as far as any dot or the picture reaches."""
    latency, accuracy = info.limits.max_latency_ms, info.limits.min_accuracy
    right = max([info.x_range[1], *(dot.latency_ms for dot in info.dots)]) * 2
    style = {"fillcolor": PALE_RED, "line": {"width": 0}, "layer": "below"}
    if latency is not None and latency < info.x_range[1]:
        figure.add_shape(type="rect", x0=latency, x1=right, y0=0, y1=1, yref="paper", **style)
    if accuracy is not None and accuracy > info.y_range[0]:
        figure.add_shape(type="rect", x0=0, x1=1, xref="paper", y0=0, y1=100 * accuracy, **style)
