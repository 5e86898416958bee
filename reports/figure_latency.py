"""Predicted against measured latency: can the figures that steered the search be trusted?"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..search.records import Latency, RunRecord, TrialRecord
from .figure_base import AMBER, BLUE, GREY, PALE_BLUE, blank, logarithmic, no_markup
from .text import counted, percent, title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

KINDS = {"calibration": GREY, "held out": BLUE, "trial": AMBER}
BAND = 0.10


class Pair(NamedTuple):
    """A model whose latency was both predicted and measured, in milliseconds."""

    kind: str
    name: str
    predicted_ms: float
    low_ms: float
    high_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """How far off the prediction is, as a share of the measured latency."""
        return abs(self.predicted_ms / self.measured_ms - 1)


class LatencyInfo(NamedTuple):
    """All pairs, the calibration's own figures on models that it held out, and by how much two measurements
    of the same models differ."""

    pairs: tuple[Pair, ...]
    heldout: Mapping[str, Any]
    truth_repeat: Mapping[str, Any]


def latency_info(run: RunRecord) -> LatencyInfo:
    target: Mapping[str, Any] = run.target or {}
    pairs = [
        Pair(
            "held out" if known.get("held_out") else "calibration",
            "calibration model",
            known["predicted_ms"],
            known.get("low_ms") or known["predicted_ms"],
            known.get("high_ms") or known["predicted_ms"],
            known["measured_ms"],
        )
        for known in target.get("points") or []
        if known.get("predicted_ms") and known.get("measured_ms")
    ]
    pairs += [
        Pair(
            "trial",
            title(t),
            t.predicted.latency_ms,
            t.predicted.low_ms,
            t.predicted.high_ms,
            real.latency_ms,
        )
        for t in run.trials
        if t.predicted is not None and (real := _measured(t)) is not None
    ]
    return LatencyInfo(tuple(pairs), dict(target.get("heldout") or {}), dict(target.get("truth_repeat") or {}))


def _measured(trial: TrialRecord) -> Latency | None:
    return trial.verified.latency if trial.verified is not None else trial.measured


def heldout_title(heldout: Mapping[str, Any]) -> str:
    """The held-out error in one line; says so when there is none."""
    if heldout.get("mape") is None:
        return "no held-out error known"
    count = f" (n = {heldout['n']})" if heldout.get("n") is not None else ""
    return f"held-out error {percent(heldout['mape'])}{count}"


def latency_text(info: LatencyInfo) -> str:
    """The predictor's error on models that it never saw, and on this night's trials."""
    said: list[str] = []
    heldout = info.heldout
    if heldout.get("mape") is not None:
        count = counted(heldout.get("n") or 0, "model")
        said.append(f"On {count} that it had not seen, the predictor is {percent(heldout['mape'])} off on average.")
        if heldout.get("within_10") is not None:
            said.append(f"{percent(heldout['within_10'])} of them are within 10 %.")
        if heldout.get("interval_coverage") is not None:
            said.append(f"Its 90 % intervals hold {percent(heldout['interval_coverage'])} of them.")
        if heldout.get("spearman") is not None:
            said.append(f"Rank correlation {heldout['spearman']:.2f}.")
        if info.truth_repeat.get("mape") is not None:
            said.append(f"Measuring them twice differs by {percent(info.truth_repeat['mape'])}.")
    else:
        said.append("The predictor's error on unseen models is not known.")
    trials = [pair for pair in info.pairs if pair.kind == "trial"]
    if trials:
        off = sum(pair.error for pair in trials) / len(trials)
        within = sum(pair.error <= BAND for pair in trials)
        said.append(
            f"Of {counted(len(trials), 'measured trial')} of this night, {within} lay within 10 % of the "
            f"prediction (mean error {percent(off)})."
        )
    return " ".join(said)


def latency_figure(info: LatencyInfo) -> "Figure":
    """Draw the pairs around the diagonal, both axes logarithmic."""
    figure = blank("predicted, ms", "measured, ms", height=400)
    values = [v for pair in info.pairs for v in (pair.predicted_ms, pair.measured_ms)]
    low, high = min(values, default=1.0) / 1.2, max(values, default=1.0) * 1.2
    figure.add_scatter(
        x=[low, high, high, low],
        y=[low * (1 + BAND), high * (1 + BAND), high * (1 - BAND), low * (1 - BAND)],
        fill="toself",
        fillcolor=PALE_BLUE,
        mode="none",
        name="± 10 %",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": GREY, "dash": "dot", "width": 1},
        hoverinfo="skip",
        showlegend=False,
    )
    for kind, colour in KINDS.items():
        pairs = [pair for pair in info.pairs if pair.kind == kind]
        if pairs:
            _draw_pairs(figure, kind, colour, pairs)
    axis = logarithmic(low, high)
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    figure.update_layout(
        title={"text": heldout_title(info.heldout), "font": {"size": 13}, "x": 0, "xref": "paper", "y": 0.97},
        margin_t=40,
    )
    return figure


def _draw_pairs(figure: "Figure", kind: str, colour: str, pairs: Sequence[Pair]) -> None:
    figure.add_scatter(
        x=[pair.predicted_ms for pair in pairs],
        y=[pair.measured_ms for pair in pairs],
        text=[no_markup(pair.name) for pair in pairs],
        mode="markers",
        name=kind,
        marker={"color": colour, "size": 7, "symbol": "circle-open" if kind == "calibration" else "circle"},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [pair.high_ms - pair.predicted_ms for pair in pairs],
            "arrayminus": [pair.predicted_ms - pair.low_ms for pair in pairs],
            "thickness": 1,
            "width": 0,
            "color": colour,
        }
        if kind != "calibration"
        else None,
        opacity=0.8,
        hovertemplate="%{text}<br>predicted %{x:.4~g} ms, measured %{y:.4~g} ms<extra></extra>",
    )
