"""Several runs on one page: their fronts over each other, what changed, and what dominates what."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..search import pareto
from ..search.records import RunRecord, row
from .compare import compare_runs, kind_of
from .figure_base import AMBER, BLUE, GREEN, GREY, LOG_FROM, RED, blank, logarithmic, no_markup
from .front import front, point
from .html import fill, write_page
from .text import UNKNOWN, accuracy, counted, cut, digits, milliseconds, percent, size, title

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = (BLUE, AMBER, GREEN, RED, "#9650d2", GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "cross")
"""With colour and dashes: a run is told from another without seeing its hue."""
WARNINGS = {
    "data": "model or data",
    "device": "device or runtime",
    "code": "code or libraries",
}


def write_comparison(runs: Sequence[RunRecord], out: Path) -> None:
    """Write the page that compares runs; an older one is replaced in one step."""
    write_page(comparison_html(runs), out)


def comparison_html(runs: Sequence[RunRecord]) -> str:
    """The page that compares runs as text."""
    data = compare_runs(runs)
    names = run_names(runs)
    shown = any(front(run) for run in runs)
    figure = json.loads(str(fronts_figure(runs).to_json())) if shown else None
    return fill(
        "compare.html.j2",
        data={"figures": {"fronts": figure} if figure else {}},
        scripts=("elements.js", "theme.js", "compare.js"),
        names=names,
        sentences=sentences(runs, data),
        has_figure=shown,
        runs=[_run_row(run, entry, name) for run, entry, name in zip(runs, data["runs"], names, strict=True)],
        differences=_differences(data["differences"], runs),
        dominance=[_dominance_row(entry, runs, names) for entry in data["dominance"]],
        front=[_front_row(entry, runs, names) for entry in data["front"]],
    )


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """A short name for each run: its folder's, with as much of the path as tells it from the others."""
    paths = [run.path.parts for run in runs]
    for depth in range(1, max((len(parts) for parts in paths), default=1) + 1):
        names = [str(Path(*parts[-depth:])) if parts else "." for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{Path(*parts)} ({i})" if parts else f". ({i})" for i, parts in enumerate(paths, start=1)]


def sentences(runs: Sequence[RunRecord], data: dict[str, Any]) -> list[str]:
    """Which run covers more and whether that is more than noise; what makes the comparison doubtful."""
    names = run_names(runs)
    said = [_against(row, runs, names, data) for row in data["gains"]]
    if not said:
        said = ["There are not two fronts whose hypervolumes could be compared."]
    said += [_dominated(run, i, names, data) for i, run in enumerate(runs)]
    kinds = {kind_of(entry["what"]) for entry in data["differences"]}
    said += [f"The runs differ in {words}: compare with care." for kind, words in WARNINGS.items() if kind in kinds]
    splits = {row(trial)["split"] for run in runs for trial in front(run)}
    if len(splits) > 1:
        said.append("Some points stand on the test split and some on the search split: accuracies differ by that too.")
    return said


def _against(row: dict[str, Any], runs: Sequence[RunRecord], names: Sequence[str], data: dict[str, Any]) -> str:
    best, other = (_name_of(row[key], runs, names) for key in ("run", "over"))
    shares = {entry["run"]: accuracy(entry["hypervolume_common"], entry["hypervolume_common_se"])
              for entry in data["runs"]}  # fmt: skip
    basis = "both answered the same test items" if row["paired"] else "their errors taken as independent"
    gain = f"a gain of {digits(100 * row['gain'], 2)} ± {digits(100 * row['gain_se'], 2)} points ({basis})"
    numbers = f"{shares[row['run']]} of the common box against {shares[row['over']]}, {gain}"
    if row["gain"] - row["gain_luck"] <= 2 * row["gain_se"]:
        return f"{best} and {other} cover the same within noise: {numbers}."
    return f"{best} covers more than {other}, by more than noise: {numbers}."


def _dominated(run: RunRecord, at: int, names: Sequence[str], data: dict[str, Any]) -> str:
    beaten = sum(entry["run"] == str(run.path) for entry in data["dominance"])
    points = counted(len(front(run)), "point")
    verb = "is" if beaten == 1 else "are"
    return f"{names[at]}: {beaten} of {points} of its front {verb} dominated by another run's."


def fronts_figure(runs: Sequence[RunRecord]) -> "Figure":
    """Draw the fronts over each other: a staircase for each run, verified points filled."""
    figure = blank("latency, ms", "accuracy, %", height=540, margin_t=34)
    latencies = [found.latency_ms for run in runs for trial in front(run) if (found := point(trial))]
    for i, (run, name) in enumerate(zip(runs, run_names(runs), strict=True)):
        pairs = [(trial, found) for trial in front(run) if (found := point(trial))]
        if not pairs:
            continue
        colour, symbol = COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]
        corners = pareto.non_dominated([(found.latency_ms, -found.accuracy) for _, found in pairs])
        steps = sorted((pairs[c][1].latency_ms, 100 * pairs[c][1].accuracy) for c in corners)
        figure.add_scatter(
            x=[*(x for x, _ in steps), max(latencies) * 1.05],
            y=[*(y for _, y in steps), steps[-1][1]],
            mode="lines",
            line={"shape": "hv", "width": 1.5, "color": colour, "dash": DASHES[i % len(DASHES)]},
            legendgroup=str(i),
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=[found.latency_ms for _, found in pairs],
            y=[100 * found.accuracy for _, found in pairs],
            mode="markers",
            name=no_markup(cut(name)),
            legendgroup=str(i),
            marker={
                "color": colour,
                "size": 10,
                "symbol": [symbol if trial.verified else f"{symbol}-open" for trial, _ in pairs],
                "line": {"width": 1.5},
            },
            text=[f"{no_markup(cut(title(trial)))}<br>{size(found.size_bytes)}" for trial, found in pairs],
            hovertemplate="<b>%{text}</b><br>%{x:.4~g} ms · %{y:.1f} %<extra>" + no_markup(cut(name)) + "</extra>",
        )
    low, high = min(latencies, default=0.0), max(latencies, default=1.0)
    if low > 0 and high / low > LOG_FROM:
        figure.update_xaxes(logarithmic(low / 1.25, high * 1.1))
    figure.update_layout(hovermode="closest")
    return figure


def _run_row(run: RunRecord, entry: dict[str, Any], name: str) -> dict[str, str]:
    def covered(key: str) -> str:
        return accuracy(entry[key], entry[f"{key}_se"])

    return {
        "name": name,
        "state": str(entry["state"] or UNKNOWN),
        "trials": f"{entry['trials']:,}",
        "front": f"{entry['front']:,}",
        "own": covered("hypervolume"),
        "common": covered("hypervolume_common"),
        "path": str(run.path),
    }


def _differences(rows: Sequence[dict[str, Any]], runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind_of(entry["what"]),
            "what": entry["what"],
            "values": [_value(entry.get(str(run.path))) for run in runs],
        }
        for entry in sorted(rows, key=lambda entry: (kind_of(entry["what"]), entry["what"]))
    ]


def _value(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _name_of(path: str, runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    return next(name for run, name in zip(runs, names, strict=True) if str(run.path) == path)


def _dominance_row(entry: dict[str, Any], runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, str]:
    return {
        "run": _name_of(entry["run"], runs, names),
        "point": _numbers(entry["run"], entry["trial"], runs),
        "by_run": _name_of(entry["by_run"], runs, names),
        "by": _numbers(entry["by_run"], entry["by_trial"], runs),
        "others": str(entry["others"] or ""),
    }


def _numbers(path: str, number: int, runs: Sequence[RunRecord]) -> str:
    trial = next(t for run in runs if str(run.path) == path for t in run.trials if t.number == number)
    found = point(trial)
    if found is None:
        return title(trial)
    numbers = f"{milliseconds(found.latency_ms)}, {percent(found.accuracy)}, {size(found.size_bytes)}"
    return f"{cut(title(trial))} ({numbers})"


def _front_row(entry: dict[str, Any], runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, str]:
    return {
        "run": _name_of(entry["run"], runs, names),
        "trial": cut(entry["name"] or f"trial {entry['trial']}"),
        "accuracy": accuracy(entry["accuracy"], entry["accuracy_se"]),
        "latency": milliseconds(entry["latency_ms"]) + ("" if entry["measured"] else " (pred.)"),
        "size": size(entry["size_bytes"]),
    }
