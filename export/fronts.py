"""A set of exports to switch between while they serve: several points of one front, and the rule that picks one."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..search.records import REJECT, RunRecord, TrialRecord, last_word
from ..spaces.errors import InputError
from . import verify
from .bundle import MANIFEST, PLAIN, Options, check_trial, export_trial
from .folder import staged

RULE = (
    "Of the models whose input has the shape of yours, the most accurate one whose latency_ms is within the budget; "
    "the fastest when none is. Latencies are those of the measured device: elsewhere time each model first."
)


def export_set(
    run: RunRecord, front: Sequence[TrialRecord], count: int, out: Path, options: Options = PLAIN
) -> dict[str, Any]:
    """Write ``count`` points of a front (its trials, fastest first) as exports below ``out``, with ``set.json``.

    All come from one run, so they take the same input, preprocessed the same way. Raises InputError when the front
    has fewer points, or what :func:`export_trial` raises.
    """
    chosen = spread([t for t in front if _allowed(run, t, options)], count)
    if len(chosen) < count:
        approved = "approved " if options.require_approval else ""
        raise InputError(f"{run.path}: --set {count} needs as many {approved}points, but the front has {len(chosen)}.")
    with staged(out, force=options.force) as folder:
        exported = [
            (t, name, export_trial(run, t, folder / name, options))
            for t, name in ((t, f"{rank}-{t.digest}") for rank, t in enumerate(chosen))
        ]
        models = [_entry(folder / name, name, trial, data) for trial, name, data in exported]
        text = json.dumps({"schema": 1, "rule": RULE, "models": models}, indent=2, allow_nan=False)
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


def _allowed(run: RunRecord, trial: TrialRecord, options: Options) -> bool:
    """Whether a point may be part of a set: what a person rejected, or did not approve where that is required, is
    passed over."""
    word = last_word(run, trial)
    if trial.latency is None or (word is not None and word.get("action") == REJECT):
        return False
    try:
        check_trial(run, trial, options)
    except InputError:
        return False
    return True


def _entry(folder: Path, name: str, trial: TrialRecord, data: dict[str, Any]) -> dict[str, Any]:
    runtime = verify.read_json(folder / verify.RUNTIME)
    kept = ("accuracy", "accuracy_se", "latency_ms", "reference_ms", "ratio", "size_bytes")
    return {
        "dir": name, "trial": trial.number, "policy": trial.digest, **{key: data[key] for key in kept},
        "input": runtime["input"], "output": runtime["output"], "manifest": verify.sha256(folder / MANIFEST),
    }  # fmt: skip
