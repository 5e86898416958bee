"""The report as Markdown: the same words and tables, for a pull request, a wiki or a terminal."""

import re
from collections.abc import Sequence

from ..search.records import RunRecord
from .figures import panels
from .front import front, picked
from .page import TableRow, decision_row, facts, flat, rows_of
from .text import UNKNOWN, cut
from .verdict import answer, doubts

# What Markdown, and HTML inside it, would read as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&!])")


def markdown(run: RunRecord) -> str:
    """The report of a run as Markdown; what came from a user is escaped."""
    best, baselines = front(run), [trial for trial in run.trials if trial.role == "baseline"]
    parts = [
        f"# {_plain(run.path.name or str(run.path))}",
        " · ".join(_plain(fact) for fact in facts(run)),
        "## What you get",
        _list(answer(run)),
        "## What to distrust",
        _list(doubts(run)) or "Nothing speaks against tonight's figures.",
        "## Picks",
        _trials(rows_of(run, [trial for trial, _ in picked(run)])) or "There is no pick.",
        "## The front",
        _trials(rows_of(run, best)) or "There is no front.",
        "## Baselines",
        _trials(rows_of(run, baselines)) or "No baseline was recorded.",
        "## The night",
        *(f"**{panel.heading}.** {_plain(panel.text)}" for panel in panels(run)),
        "## Decisions",
        _decisions(run) or "No decision was recorded.",
        "## Environment",
        _list([f"{name}: {value}" for name, value in flat(run.state.get("environment") or {})]) or "Not recorded.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(cut(text).split()))


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {_plain(sentence)}" for sentence in sentences)


def _trials(rows: Sequence[TableRow]) -> str:
    return _table(
        ("Trial", "Picked as", "Accuracy", "Latency", "Interval, ms", "Faster", "Size", "Smaller", "Note"),
        [
            (
                r.name, r.labels, r.accuracy, r.latency + ("" if r.measured else " (predicted)"), r.interval or UNKNOWN,
                r.ratio, r.size, r.size_ratio, r.note,
            )
            for r in rows
        ],
        numbers=range(2, 8),
    )  # fmt: skip


def _decisions(run: RunRecord) -> str:
    entries = [decision_row(entry) for entry in run.decisions]
    rows = [tuple(entry[key] for key in ("time", "phase", "decision", "reason")) for entry in entries]
    return _table(("Time", "Phase", "Decision", "Reason"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    if not rows:
        return ""
    rule = ["---:" if i in numbers else "---" for i in range(len(head))]
    lines = [head, rule, *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
