"""A set of exports to switch between while they serve: several points of one front, and the rule that picks one."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..search.records import REJECT, RunRecord, TrialRecord, last_word
from ..spaces.errors import InputError
from . import verify
from .bundle import MANIFEST, PLAIN, Options, export_trial
from .folder import staged

RULE = (
    "Of the models whose input has the shape of yours, the most accurate one whose latency_ms is within the budget; "
    "the fastest when none is. "
)
MEASURED = "Latencies are those of the measured device: elsewhere time each model first."
PREDICTED = (
    "Where latency_measured is false, latency_ms is a prediction for the device of the run: time each model before it "
    "serves, there as well."
)


def export_set(
    run: RunRecord, front: Sequence[TrialRecord], count: int, out: Path, options: Options = PLAIN
) -> dict[str, Any]:
    """Write ``count`` points of a front (its trials, fastest first) as exports below ``out``, with ``set.json``.

    All come from one run, so they take the same input, preprocessed the same way. Raises InputError when the front
    has fewer points, or what :func:`export_trial` raises.
    """
    passed_over = {t.number: why for t in front if (why := _obstacle(run, t, options))}
    chosen = spread([t for t in front if t.number not in passed_over], count)
    if len(chosen) < count:
        raise InputError(
            f"{run.path}: --set {count} needs {count} points, but the front has {len(front)}{_listed(passed_over)}."
        )
    with staged(out, force=options.force) as folder:
        exported = [
            (t, name, export_trial(run, t, folder / name, options))
            for t, name in ((t, f"{rank}-{t.digest}") for rank, t in enumerate(chosen))
        ]
        models = [_entry(folder / name, name, trial, data) for trial, name, data in exported]
        rule = RULE + (MEASURED if all(m["latency_measured"] for m in models) else PREDICTED)
        text = json.dumps({"schema": 1, "rule": rule, "models": models}, indent=2, allow_nan=False)
        (folder / verify.SET).write_text(text + "\n")
        listing = verify.sha256(folder / verify.SET)
    return {"dir": str(out), "files": [verify.SET, *(m["dir"] for m in models)], "manifest": listing, "models": models}


def spread(front: Sequence[TrialRecord], count: int) -> list[TrialRecord]:
    """``count`` trials with latencies as evenly spread on a logarithmic scale as the front allows, both ends among
    them; fastest first. Fewer when the front has fewer."""
    known = sorted(((t.latency.latency_ms, t) for t in front if t.latency is not None), key=lambda pair: pair[0])
    if len(known) <= count:
        return [trial for _, trial in known]
    places = [math.log(latency_ms) for latency_ms, _ in known]
    taken = [0, len(known) - 1][:count]  # the ends first: nothing else may take them
    for step in range(1, count - 1):
        wanted = places[0] + (places[-1] - places[0]) * step / (count - 1)
        free = [i for i in range(len(known)) if i not in taken]
        taken.append(min(free, key=lambda i: abs(places[i] - wanted)))
    return [known[i][1] for i in sorted(taken)]


def _obstacle(run: RunRecord, trial: TrialRecord, options: Options) -> str | None:
    """Why a point is not part of a set: what a person rejected, or did not approve where that is required, is passed
    over."""
    if trial.latency is None:
        return "of unknown latency"
    word = last_word(run, trial)
    if word is not None and word.get("action") == REJECT:
        return f"rejected by {word['who']}"
    if word is None and options.require_approval:
        return "not approved"
    return None if trial.verified is None or trial.verified.struck_out is None or options.force else "struck out"


def _listed(passed_over: Mapping[int, str]) -> str:
    if not passed_over:
        return ""
    trials = ", ".join(f"trial {number} ({why})" for number, why in passed_over.items())
    return f", of which {len(passed_over)} {'is' if len(passed_over) == 1 else 'are'} passed over: {trials}"


def _entry(folder: Path, name: str, trial: TrialRecord, data: dict[str, Any]) -> dict[str, Any]:
    runtime = verify.read_json(folder / verify.RUNTIME)
    kept = (
        "accuracy", "accuracy_se", "latency_ms", "latency_measured", "forced", "reference_ms", "ratio", "size_bytes",
    )  # fmt: skip
    return {
        "dir": name, "trial": trial.number, "policy": trial.digest, **{key: data[key] for key in kept},
        "input": runtime["input"], "output": runtime["output"], "manifest": verify.sha256(folder / MANIFEST),
    }  # fmt: skip
