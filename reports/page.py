"""What the report page holds: the data that its script reads, and the tables that its template prints."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..search.records import RunRecord, TrialRecord, TrialState, row
from .cards import packed, rounded
from .figure_base import PALE_RED, SIZES, Panel
from .figure_front import across_axes, front_info
from .front import breaches, front, limits, picked, point, rule, shrinkage, speedup, uncompressed, verified_any
from .text import UNKNOWN, accuracy, counted, cut, digits, local_time, milliseconds, plain, size, times, title
from .verdict import answer, doubts, drop_points, finished

MOST_ROWS = 200
"""Rows of a table of trials that did not complete; the rest stands in trials.csv."""

MOST_REASONS = 12
"""Choices of a finalist for which the card says what they save."""


class TableRow(NamedTuple):
    """A trial as a line of a table, everything already in words."""

    trial: int
    name: str
    labels: str
    why: str
    accuracy: str
    drop: str
    latency: str
    interval: str
    ratio: str
    size: str
    size_ratio: str
    measured: bool
    on_front: bool
    note: str


class Unfinished(NamedTuple):
    """Trials of one state other than COMPLETE, with the reasons that they recorded."""

    state: str
    number: int
    rows: tuple[tuple[int, str, str], ...]


def context(run: RunRecord, panels: Sequence[Panel]) -> dict[str, Any]:
    """What the template prints without the script."""
    best, chosen = front(run), picked(run)
    baselines = [trial for trial in run.trials if trial.role == "baseline"]
    return {
        "name": run.path.name or str(run.path),
        "facts": facts(run),
        "unknown": UNKNOWN,
        "state": str(run.state.get("state") or "unknown"),
        "finished": finished(run),
        "answer": answer(run),
        "doubts": doubts(run),
        "picks": rows_of(run, [trial for trial, _ in chosen]),
        "front_rows": rows_of(run, best),
        "baseline_rows": rows_of(run, baselines),
        "panels": panels,
        "limits": _limit_fields(run),
        "has_macs": all(t.macs for t in run.trials if t.quality is not None),
        "decisions": [decision_row(entry) for entry in run.decisions],
        "reviews": [review_row(entry) for entry in run.approvals],
        "unfinished": unfinished(run),
        "environment": flat(run.state.get("environment") or {}),
        "config": json.dumps(plain(run.config), indent=2, ensure_ascii=False),
    }


def _limit_fields(run: RunRecord) -> dict[str, str]:
    """The config's limits in the units of the page's fields; empty where there is none."""
    known = limits(run, verified=verified_any(run))
    values = {
        "max_latency_ms": known.max_latency_ms,
        "min_accuracy": None if known.min_accuracy is None else 100 * known.min_accuracy,
        "max_size_kb": None if known.max_size_bytes is None else known.max_size_bytes / 1000,
    }
    return {key: "" if value is None else f"{value:.10g}" for key, value in values.items()}


def facts(run: RunRecord) -> list[str]:
    """The line below the title."""
    task = run.state.get("task") or run.config.get("task")
    said = [str(task)] if task else []
    target: Mapping[str, Any] = run.target or {}
    device: Mapping[str, Any] = target.get("target") or target
    if device.get("runtime"):
        said.append(str(device["runtime"]))
    if device.get("threads"):
        said.append(counted(int(device["threads"]), "thread"))
    if run.state.get("host"):
        said.append(str(run.state["host"]))
    if run.state.get("started"):
        said.append(f"started {local_time(run.state['started'])}")
    return [*said, counted(len(run.trials), "trial")]


def rows_of(run: RunRecord, trials: Sequence[TrialRecord]) -> list[TableRow]:
    """Trials as lines of a table."""
    on_front = {trial.number for trial in front(run)}
    labels = {trial.number: names for trial, names in picked(run)}
    return [table_row(run, t, labels.get(t.number, ()), t.number in on_front) for t in trials]


def why(run: RunRecord, label: str) -> str:
    """What a pick's name means; the rule is named, since a night without limits has one all the same."""
    if label == "knee":
        return "the best balance of the three"
    return "the most accurate point of the front" if label == "most accurate" else f"the fastest {rule(run).words}"


def table_row(run: RunRecord, trial: TrialRecord, labels: Sequence[str], on_front: bool) -> TableRow:
    """A trial in words; what is not known is a dash."""
    found, values = point(trial), row(trial)
    note = (trial.struck_out and f"struck out: {trial.struck_out}") or trial.reason or ""
    if not note and found is not None:
        note = "; ".join(breaches(limits(run, verified=trial.verified is not None), found))
    if trial.verified is None and verified_any(run):
        # Given weights remember the search split: side by side with the others' it would be the most accurate of all.
        note = "; ".join(filter(None, [note, "accuracy of the search split, not compared"]))
    return TableRow(
        trial=trial.number,
        name=title(trial),
        labels=", ".join(labels),
        why="; ".join(why(run, label) for label in labels),
        accuracy=accuracy(values["accuracy"], values["accuracy_se"]),
        drop=_signed(drop_points(run, trial)),
        latency=milliseconds(values["latency_ms"]),
        interval=_interval(values["low_ms"], values["high_ms"]),
        ratio=times(speedup(run, trial)),
        size=size(values["size_bytes"]),
        size_ratio=times(shrinkage(run, trial)),
        measured=bool(values["measured"]),
        on_front=on_front,
        note=cut(note),
    )


def _signed(points: float | None) -> str:
    return "" if points is None else f"{'−' if points < 0 else '+'}{abs(points):.1f} points"


def _interval(low_ms: float | None, high_ms: float | None) -> str:
    return f"{digits(low_ms)} to {digits(high_ms)}" if low_ms is not None and high_ms is not None else ""


def decision_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """One line of decisions.jsonl in words; its evidence as ``key: value`` pairs."""
    evidence: object = entry.get("evidence")
    if isinstance(evidence, Mapping):
        words = ", ".join(f"{name}: {_short(value)}" for name, value in flat(evidence))
    else:
        words = "" if evidence is None else _short(evidence)
    return {
        "time": cut(local_time(entry.get("time"))),
        "phase": cut(str(entry.get("phase") or "")),
        "decision": cut(_short(entry.get("decision") or "")),
        "reason": cut(str(entry.get("reason") or "")),
        "evidence": words,
    }


VERBS = {"pick": "approved", "reject": "rejected", "note": "noted"}


def review_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """A person's word on a trial; without an ``action`` it is an approval. Empty where it does not say."""
    words = {key: str(entry.get(key) or "") for key in ("who", "note")}
    time = entry.get("time")
    verb = VERBS.get(str(entry.get("action")), VERBS["pick"])
    return {**words, "trial": str(entry.get("trial")), "verb": verb, "time": local_time(time) if time else ""}


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def flat(nested: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in nested.items():
        name = f"{prefix}{key}"
        pairs += flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, _short(value))]
    return pairs


def unfinished(run: RunRecord) -> list[Unfinished]:
    """Failed, stopped and infeasible trials, and those still running, with their reasons."""
    tables: list[Unfinished] = []
    for state in (TrialState.FAILED, TrialState.STOPPED, TrialState.INFEASIBLE, TrialState.RUNNING):
        trials = [trial for trial in run.trials if trial.state is state]
        rows = tuple((t.number, title(t), cut(t.reason or _stands(t))) for t in trials[:MOST_ROWS])
        if trials:
            tables.append(Unfinished(str(state), len(trials), rows))
    return tables


def _stands(trial: TrialRecord) -> str:
    if trial.state is not TrialState.RUNNING:
        return "no reason recorded"
    return f"waiting or being trained after rung {trial.quality.rung}" if trial.quality else "being evaluated"


# What the script reads


def script_data(run: RunRecord, panels: Sequence[Panel]) -> dict[str, Any]:
    """Everything that the page's script needs, as JSON-ready data."""
    origin, chosen = uncompressed(run), picked(run)
    first = chosen[0][0].number if chosen else (run.trials[0].number if run.trials else None)
    info = front_info(run)
    dots = {dot.trial for dot in info.dots}
    trials = packed(run)
    for card in trials.cards:
        if card["trial"] in dots:
            card["drawn"] = True
    return {
        "selected": first,
        "front": [trial.number for trial in front(run)],
        "front_axes": {**across_axes(info), "stops": SIZES, "shade": PALE_RED},
        "labels": {str(trial.number): names for trial, names in chosen},
        "origin": plain({key: value for key, value in row(origin).items() if key != "policy"}) if origin else None,
        "anatomy": plain(anatomy(run)),
        "layers": rounded(layer_costs(run)),
        "why": rounded(reasons(run)),
        "sensitivity": {key: rounded((run.sensitivity or {}).get(key) or {}) for key in ("groups", "bits")},
        "trials": trials.cards,
        "packed": trials.columns,
        "reviews": [plain(entry) for entry in run.approvals],
        # The command that exports a trial, safe to paste into a shell.
        "commands": {"before": f"nightpress export {shlex.quote(str(run.path))} ", "after": " --out DIR"},
        "figures": {panel.key: json.loads(str(panel.figure.to_json())) for panel in panels if panel.figure},
    }


def reasons(run: RunRecord) -> dict[str, list[Any]]:
    """By trial number the choices of a finalist that save most, names as long as the page bears."""
    known: Mapping[str, Sequence[Mapping[str, Any]]] = run.why or {}
    return {
        number: [{**entry, "name": cut(str(entry["name"]))} for entry in entries[:MOST_REASONS]]
        for number, entries in known.items()
    }


def layer_costs(run: RunRecord) -> dict[str, Any]:
    """Milliseconds and bytes of each layer of the trials that were profiled.

    A profiler slows what it watches, so its milliseconds are scaled to add up to the latency measured without it.
    """
    latencies = {str(trial.number): trial.latency for trial in run.trials}
    found: dict[str, Any] = {}
    for number, known in (run.layers or {}).items():
        layers: Mapping[str, Mapping[str, float]] = known["layers"]
        total = sum(cost.get("ms") or 0.0 for cost in layers.values()) + known["other_ms"]
        latency = latencies.get(number)
        if latency is None or total <= 0:
            continue
        scale = latency.latency_ms / total
        scaled = {name: {**cost, "ms": cost["ms"] * scale} if "ms" in cost else cost for name, cost in layers.items()}
        found[number] = {"layers": scaled, "other_ms": known["other_ms"] * scale}
    return found


def anatomy(run: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """What the layers' bars need of the anatomy, which may hold much more."""
    known: Mapping[str, Any] = run.state.get("anatomy") or {}
    needed = {
        "groups": ("name", "channels", "step", "layers"),
        "layers": ("name",),
        "blocks": ("name", "layers"),
    }
    return {
        part: [{key: item[key] for key in keys if key in item} for item in known.get(part) or []]
        for part, keys in needed.items()
    }
