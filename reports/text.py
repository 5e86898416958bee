"""Numbers and times as a person reads them, and records as plain JSON-ready data."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, cast

from ..search.records import TrialRecord

UNKNOWN = "–"
MOST_LETTERS = 400


def digits(value: float, significant: int = 3) -> str:
    """A number with so many significant digits, never in scientific notation: 0.328, 12.3, 1,234."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else UNKNOWN
    # Rounded first: 9.996 has three digits as 10.0, not as 10.00.
    rounded = float(f"{value:.{significant}g}")
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def milliseconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{digits(value)} ms"


def times(ratio: float | None) -> str:
    """A ratio with its sign: 3.1×."""
    return UNKNOWN if ratio is None else f"{digits(ratio, 3 if ratio < 1 else 2)}×"


def size(size_bytes: float | None) -> str:
    """Decimal units, as download sizes are given."""
    if size_bytes is None:
        return UNKNOWN
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{digits(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} bytes"


def million_macs(macs: float) -> str:
    return f"{digits(macs / 1e6)} million multiply-accumulates"


def accuracy(value: float | None, error: float | None) -> str:
    """Accuracy with its standard error, both in percent: 91.8 % ± 0.6."""
    if value is None or error is None:
        return percent(value)
    return f"{percent(value)} ± {100 * error:.1f}"


def duration(seconds: float | None) -> str:
    """The two largest units: 7 h 12 min, 3 min 20 s, 4 s."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole} s" if seconds >= 1 or seconds == 0 else f"{digits(seconds, 2)} s"


def seconds_since_epoch(value: object) -> float | None:
    """A moment as records give it: seconds since the epoch, or ISO 8601; None when it is neither."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return None


def local_time(value: object) -> str:
    """A moment as date and time; an ISO string keeps its own zone, seconds are shown in this machine's."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M:%S")
        except ValueError:
            return value
    seconds = seconds_since_epoch(value)
    return UNKNOWN if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """A count with its noun: 1 trial, 12 trials."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def title(trial: TrialRecord) -> str:
    """What a trial is called: its name, else its number."""
    return trial.name or f"trial {trial.number}"


def cut(text: str) -> str:
    """Some errors tell pages; their beginning says what happened."""
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"


def plain(value: object) -> Any:
    """A value as JSON can hold it: mappings and sequences copied, NaN and infinities None, the rest text."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in cast("list[object]", value)]
    return str(value)
