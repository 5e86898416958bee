"""The trials as tables for other programs: CSV and Parquet."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..search.records import RunRecord, TrialRecord, row
from ..spaces.files import write_whole
from .front import front
from .text import plain

if TYPE_CHECKING:
    import pandas

# Nullable types, so that a column without a value keeps its type and an integer stays one.
COLUMNS = {
    "trial": "Int64",
    "name": "string",
    "role": "string",
    "state": "string",
    "digest": "string",
    "accuracy": "Float64",
    "accuracy_se": "Float64",
    "samples": "Int64",
    "split": "string",
    "rung": "string",
    "latency_ms": "Float64",
    "low_ms": "Float64",
    "high_ms": "Float64",
    "measured": "boolean",
    "repeat_error": "Float64",
    "reference_ms": "Float64",
    "ratio": "Float64",
    "size_bytes": "Int64",
    "macs": "Int64",
    "params": "Int64",
    "struck_out": "string",
    "reason": "string",
    "forced": "string",
    "settled": "boolean",
    "policy": "string",
}
FREE_TEXT = ("name", "reason", "struck_out")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def frame(trials: Sequence[TrialRecord]) -> "pandas.DataFrame":
    """One row a trial, in the keys of :func:`row`; the policy as JSON text, unknown as NA."""
    import pandas as pd

    rows = [_cells(trial) for trial in trials]
    return pd.DataFrame({name: pd.array([cells[name] for cells in rows], dtype=kind) for name, kind in COLUMNS.items()})


def _cells(trial: TrialRecord) -> dict[str, Any]:
    cells: dict[str, Any] = plain(row(trial))
    return {**cells, "policy": json.dumps(cells["policy"], sort_keys=True)}


def write_tables(run: RunRecord, folder: Path) -> list[Path]:
    """Write trials.csv, trials.parquet, front.csv and baselines.csv; each is replaced in one step."""
    write_csv(run, folder / "trials.csv")
    write_parquet(run, folder / "trials.parquet")
    _write_csv(frame(front(run)), folder / "front.csv")
    _write_csv(frame([t for t in run.trials if t.role == "baseline"]), folder / "baselines.csv")
    return [folder / name for name in ("trials.csv", "trials.parquet", "front.csv", "baselines.csv")]


def write_csv(run: RunRecord, out: Path) -> None:
    """Write all trials as CSV."""
    _write_csv(frame(run.trials), out)


def write_parquet(run: RunRecord, out: Path) -> None:
    """Write all trials as Parquet."""
    trials = frame(run.trials)
    write_whole(out, lambda beside: trials.to_parquet(beside, index=False))


def _write_csv(table: "pandas.DataFrame", path: Path) -> None:
    safe = table.assign(**{name: table[name].map(_inert, na_action="ignore") for name in FREE_TEXT})
    # All texts in quotes: a carriage return (progress bars in error messages) would else end the row.
    quoting = csv.QUOTE_NONNUMERIC
    write_whole(path, lambda beside: safe.to_csv(beside, index=False, encoding="utf-8", quoting=quoting))


def _inert(text: str) -> str:
    """Spreadsheets run cells that start like a formula; a leading apostrophe makes them text."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
