"""What a run knows about limits that it was not searched for."""

import math
import time
from typing import Annotated, Any

import typer

from .options import Json, RunDir
from .output import emit, log_to_stderr, say, table


def suggest(
    folder: RunDir,
    max_latency_ms: Annotated[float | None, typer.Option("--max-latency-ms", metavar="X")] = None,
    min_accuracy: Annotated[float | None, typer.Option("--min-accuracy", metavar="Y", help="At most 1.")] = None,
    max_size_bytes: Annotated[int | None, typer.Option("--max-size-bytes", metavar="B")] = None,
    max_macs: Annotated[int | None, typer.Option("--max-macs", metavar="M", help="Multiply-accumulates.")] = None,
    json: Json = False,
) -> None:
    """The best verified points within limits, and untried policies expected to be better; nothing is trained.
    Example: nightpress suggest runs/plates --max-latency-ms 1.2 --min-accuracy 0.9"""
    from ..search.config import Limits
    from ..search.folder import read_run
    from ..search.suggest import suggest as ask
    from ..spaces.errors import InputError

    log_to_stderr()
    given = {
        "--max-latency-ms": max_latency_ms, "--min-accuracy": min_accuracy, "--max-size-bytes": max_size_bytes,
        "--max-macs": max_macs,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0 and finite, but got {value:g}.")
    if min_accuracy is not None and min_accuracy > 1:
        raise InputError(f"--min-accuracy must be at most 1, but got {min_accuracy:g}.")
    start = time.monotonic()
    limits = Limits(
        max_latency_ms=max_latency_ms, min_accuracy=min_accuracy, max_size_bytes=max_size_bytes, max_macs=max_macs
    )
    found: dict[str, Any] = {**ask(read_run(folder), limits), "seconds": round(time.monotonic() - start, 2)}
    if json:
        emit(found)
        return
    keys = ["trial", "accuracy", "accuracy_se", "latency_ms", "ratio", "size_bytes"]
    if found["verified"]:
        table("Verified within the limits, none dominated by another", found["verified"], keys)
    else:
        say("No verified point is within the limits.")
    if struck := [str(entry["trial"]) for entry in found["verified"] if entry["struck_out"]]:
        say(f"The run's own limits struck out {', '.join(struck)} of them: nightpress export takes such with --force.")
    if not found["suggested"]:
        say("No untried policy is expected to be better.")
        say(_basis(found["basis"]))
        return
    if caveat := found["suggested"][0]["forced"]:
        say(f"These numbers may not hold: {caveat}.")
    keys = ["digest", "accuracy", "accuracy_low", "accuracy_high", "latency_ms", "low_ms", "high_ms", "size_bytes"]
    table("Untried, expected to be better (90 % intervals)", found["suggested"], keys)
    say(_basis(found["basis"]))


def _basis(known: dict[str, Any]) -> str:
    """What the accuracies of untried policies rest on."""
    of = f"the mean of {known['verified']}" if known["verified"] else "as the uncompressed network's, since none was"
    return (
        f"Accuracies are those expected after the rung {known['rung']}, to which {known['seen']} trials came, on the "
        f"test split: {100 * known['shift']:+.1f} points against the search split, {of} verified."
    )
