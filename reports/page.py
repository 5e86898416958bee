"""What the report page holds: the data that its script reads, and the tables that its template prints."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..search.records import Quality, RunRecord, TrialRecord, TrialState, row
from .figure_base import MOST_TRIALS, Panel
from .front import (
    Limits,
    breaches,
    front,
    limits,
    most_interesting,
    picked,
    point,
    shrinkage,
    speedup,
    uncompressed,
    verified_any,
)
from .text import UNKNOWN, accuracy, counted, local_time, milliseconds, plain, size, times, title
from .verdict import doubts, findings, finished

DETAIL_BYTES = 500_000
"""What the trials' details may take, so that the page stays below 6 MB beside the 4.8 MB of plotly.js."""
BRIEF = (
    "trial",
    "title",
    "role",
    "state",
    "digest",
    "accuracy",
    "split",
    "latency_ms",
    "size_bytes",
    "reason",
)
MOST_LETTERS = 400
MOST_ROWS = 200
"""Rows of a table of trials that did not complete; the rest stands in trials.csv."""


class TableRow(NamedTuple):
    """A trial as a line of a table, everything already in words."""

    trial: int
    name: str
    labels: str
    accuracy: str
    latency: str
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
    on_front = {trial.number for trial in best}
    labels = {trial.number: ", ".join(names) for trial, names in chosen}

    def rows(trials: Sequence[TrialRecord]) -> list[TableRow]:
        return [table_row(run, t, labels.get(t.number, ""), t.number in on_front) for t in trials]

    return {
        "name": run.path.name or str(run.path),
        "facts": facts(run),
        "unknown": UNKNOWN,
        "state": str(run.state.get("state") or "unknown"),
        "finished": finished(run),
        "findings": findings(run),
        "doubts": doubts(run),
        "picks": rows([trial for trial, _ in chosen]),
        "front_rows": rows(best),
        "baseline_rows": rows([trial for trial in run.trials if trial.role == "baseline"]),
        "panels": panels,
        "decisions": [decision_row(entry) for entry in run.decisions],
        "approvals": [approval_row(entry) for entry in run.approvals],
        "unfinished": unfinished(run),
        "environment": flat(run.state.get("environment") or {}),
        "config": json.dumps(plain(run.config), indent=2, ensure_ascii=False),
    }


def facts(run: RunRecord) -> list[str]:
    """The line below the title."""
    said = [str(run.config["task"])] if run.config.get("task") else []
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


def table_row(run: RunRecord, trial: TrialRecord, labels: str, on_front: bool) -> TableRow:
    """A trial in words; what is not known is a dash."""
    found, values = point(trial), row(trial)
    struck = trial.verified.struck_out if trial.verified else None
    note = (struck and f"struck out: {struck}") or trial.reason or ""
    if not note and found is not None:
        note = "; ".join(breaches(limits(run), found))
    if not note and trial.verified is None and verified_any(run):
        note = "not exported: search split, not compared"
    return TableRow(
        trial=trial.number,
        name=title(trial),
        labels=labels,
        accuracy=accuracy(values["accuracy"], values["accuracy_se"]),
        latency=milliseconds(values["latency_ms"]),
        ratio=times(speedup(run, trial)),
        size=size(values["size_bytes"]),
        size_ratio=times(shrinkage(run, trial)),
        measured=bool(values["measured"]),
        on_front=on_front,
        note=note,
    )


def export_command(run: RunRecord, number: int) -> str:
    """The command that exports a trial, safe to paste into a shell."""
    return f"nightpress export {shlex.quote(str(run.path))} {number} --out DIR"


def decision_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """One line of decisions.jsonl in words; its evidence as ``key: value`` pairs."""
    evidence: object = entry.get("evidence")
    if isinstance(evidence, Mapping):
        words = ", ".join(f"{name}: {_short(value)}" for name, value in flat(evidence))
    else:
        words = "" if evidence is None else _short(evidence)
    return {
        "time": local_time(entry.get("time")),
        "phase": str(entry.get("phase") or ""),
        "decision": _short(entry.get("decision") or ""),
        "reason": str(entry.get("reason") or ""),
        "evidence": words,
    }


def approval_row(entry: Mapping[str, Any]) -> dict[str, str]:
    """One approval in words; empty where it does not say."""
    words = {key: str(entry.get(key) or "") for key in ("who", "note")}
    time = entry.get("time")
    return {**words, "trial": str(entry.get("trial")), "time": local_time(time) if time else ""}


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


def _cut(text: str) -> str:
    """Some errors tell pages; their beginning says what happened."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"


def unfinished(run: RunRecord) -> list[Unfinished]:
    """Failed, stopped and infeasible trials, and those still running, with their reasons."""
    tables: list[Unfinished] = []
    for state in (TrialState.FAILED, TrialState.STOPPED, TrialState.INFEASIBLE, TrialState.RUNNING):
        trials = [trial for trial in run.trials if trial.state is state]
        rows = tuple((t.number, title(t), _cut(t.reason or "no reason recorded")) for t in trials[:MOST_ROWS])
        if trials:
            tables.append(Unfinished(str(state), len(trials), rows))
    return tables


# What the script reads


def script_data(run: RunRecord, panels: Sequence[Panel]) -> dict[str, Any]:
    """Everything that the page's script needs, as JSON-ready data."""
    origin, chosen = uncompressed(run), picked(run)
    first = chosen[0][0].number if chosen else (run.trials[0].number if run.trials else None)
    return {
        "selected": first,
        "front": [trial.number for trial in front(run)],
        "labels": {str(trial.number): names for trial, names in chosen},
        "origin": plain(row(origin)) if origin else None,
        "anatomy": plain(anatomy(run)),
        "trials": details(run),
        "approved": {str(a.get("trial")): plain(a) for a in run.approvals},
        "commands": {"before": f"nightpress export {shlex.quote(str(run.path))} ", "after": " --out DIR"},
        "figures": {panel.key: json.loads(str(panel.figure.to_json())) for panel in panels if panel.figure},
    }


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


def details(run: RunRecord) -> list[dict[str, Any]]:
    """A card's data for each trial, in order of number, without what is unknown.

    The page has a limited size: policies and curves of the later trials are left out (``brief``) when those
    of the front, of the verified and of the earlier ones have filled it; trials.csv has them.
    """
    on_front, allowed = {trial.number for trial in front(run)}, limits(run)
    left = DETAIL_BYTES
    cards: list[dict[str, Any]] = []
    shown = most_interesting(run, MOST_TRIALS)
    for trial in sorted(shown, key=lambda t: (t.number not in on_front, t.verified is None, t.number)):
        card = _card(trial, allowed)
        left -= len(json.dumps(card))
        cards.append(card if left > 0 else {key: card[key] for key in BRIEF if key in card} | {"brief": True})
    return sorted(cards, key=lambda card: card["trial"])


def _card(trial: TrialRecord, allowed: Limits) -> dict[str, Any]:
    verified, found = trial.verified, point(trial)
    stages = [_stage("search", quality) for quality in trial.qualities]
    if verified is not None:
        stages += [
            _stage("after the long fine-tune", verified.search_quality),
            _stage("quantisation simulated", verified.simulated),
            _stage("exported file", verified.quality),
        ]
    card = row(trial)
    card |= {
        "title": title(trial),
        "reason": _cut(trial.reason) if trial.reason else None,
        "beyond": breaches(allowed, found) if found else [],
        "reused_from": trial.reused_from,
        "seconds": trial.finished - trial.started if trial.finished and trial.started else None,
        "predicted_ms": trial.predicted.latency_ms if trial.predicted else None,
        "interval_ms": [trial.predicted.low_ms, trial.predicted.high_ms] if trial.predicted else None,
        "stages": stages,
        "verified": None
        if verified is None
        else {
            "top1_agreement": verified.top1_agreement,
            "max_abs_diff": verified.max_abs_diff,
            "bits_used": verified.bits_used,
        },
    }
    return {key: value for key, value in plain(card).items() if value is not None}


def _stage(name: str, quality: Quality) -> dict[str, Any]:
    return {
        "name": name,
        "rung": quality.rung,
        "split": quality.split,
        "accuracy": quality.accuracy,
        "se": quality.accuracy_se,
        "samples": quality.samples,
        "losses": list(quality.losses),
    }
