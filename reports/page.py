"""What the report page holds: the data that its script reads, and the tables that its template prints."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..search.records import Quality, RunRecord, TrialRecord, TrialState, row
from .figures import Panel
from .front import breaches, front, limits, picked, point, shrinkage, speedup, uncompressed
from .text import UNKNOWN, accuracy, counted, local_time, milliseconds, plain, size, times, title
from .verdict import doubts, findings, finished

DETAIL_BYTES = 700_000
"""What the trials' details may take, so that the page stays below 6 MB beside the 4.8 MB of plotly.js."""
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
    best = front(run)
    on_front = {trial.number for trial in best}
    labels = {trial.number: ", ".join(names) for trial, names in picked(run)}

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
        "picks": rows([trial for trial, _ in picked(run)]),
        "commands": {trial.number: export_command(run, trial.number) for trial, _ in picked(run)},
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
    if target.get("runtime"):
        said.append(str(target["runtime"]))
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
        rows = tuple((t.number, title(t), t.reason or "no reason recorded") for t in trials[:MOST_ROWS])
        if trials:
            tables.append(Unfinished(str(state), len(trials), rows))
    return tables


# What the script reads


def script_data(run: RunRecord, panels: Sequence[Panel]) -> dict[str, Any]:
    """Everything that the page's script needs, as JSON-ready data."""
    origin, chosen = uncompressed(run), picked(run)
    best = [trial.number for trial in front(run)]
    first = chosen[0][0].number if chosen else (run.trials[0].number if run.trials else None)
    return {
        "selected": first,
        "front": best,
        "labels": {str(trial.number): names for trial, names in chosen},
        "origin": plain(row(origin)) if origin else None,
        "anatomy": plain(run.state.get("anatomy")),
        "trials": details(run, best),
        "approved": {str(a.get("trial")): plain(a) for a in run.approvals},
        "commands": {"before": f"nightpress export {shlex.quote(str(run.path))} ", "after": " --out DIR"},
        "figures": {panel.key: json.loads(str(panel.figure.to_json())) for panel in panels if panel.figure},
    }


def details(run: RunRecord, best: Sequence[int]) -> list[dict[str, Any]]:
    """A card's data for each trial, in order of number. When there are too many for one page, policies and
    curves of the least interesting are left out (``brief``); trials.csv has them."""
    on_front = set(best)
    ranks = {TrialState.COMPLETE: 2, TrialState.STOPPED: 3}

    def interest(trial: TrialRecord) -> tuple[int, int]:
        if trial.number in on_front:
            return 0, trial.number
        if trial.verified is not None or trial.role == "baseline":
            return 1, trial.number
        return ranks.get(trial.state, 4), trial.number

    left = DETAIL_BYTES
    cards: list[dict[str, Any]] = []
    for trial in sorted(run.trials, key=interest):
        card = _card(trial)
        left -= len(json.dumps(card))
        cards.append(card if left > 0 else _brief(card))
    return sorted(cards, key=lambda card: card["trial"])


def _card(trial: TrialRecord) -> dict[str, Any]:
    verified = trial.verified
    stages = [_stage("search", quality) for quality in trial.qualities]
    if verified is not None:
        stages += [
            _stage("after the long fine-tune", verified.search_quality),
            _stage("quantisation simulated", verified.simulated),
            _stage("exported file", verified.quality),
        ]
    card = {
        key: value for key, value in row(trial).items() if key not in ("rung", "samples", "low_ms", "high_ms")
    }
    card |= {
        "title": title(trial),
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
    return plain(card)


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


def _brief(card: dict[str, Any]) -> dict[str, Any]:
    return {
        **card,
        "brief": True,
        "policy": {},
        "stages": [{**stage, "losses": []} for stage in card["stages"]],
    }
