"""A trial's record as attributes of Optuna's trial and study, and back."""

import base64
from collections.abc import Mapping
from typing import Any

from .records import Latency, Quality, TrialRecord, TrialState, Verified

WORD = "word:"


def record_of(number: int, attrs: Mapping[str, Any], extra: Mapping[str, Any]) -> TrialRecord:
    """A trial from its attributes and the study's. Raises KeyError, TypeError or ValueError when they are damaged."""
    return TrialRecord(
        number=number,
        state=TrialState(attrs.get("state", "RUNNING")),
        role=attrs.get("role", "search"),
        name=attrs.get("name"),
        digest=attrs.get("digest", ""),
        policy=attrs.get("policy", {}),
        qualities=tuple(quality_from(q) for q in attrs.get("qualities", [])),
        predicted=_latency(attrs.get("predicted")),
        measured=_latency(extra.get(f"measured:{number}") or attrs.get("measured")),
        size_bytes=attrs.get("size_bytes"),
        macs=attrs.get("macs"),
        params=attrs.get("params"),
        reason=attrs.get("reason"),
        reused_from=attrs.get("reused_from"),
        started=attrs.get("started"),
        finished=attrs.get("finished"),
        long=quality_from(extra[f"long:{number}"]) if f"long:{number}" in extra else None,
        verified=_verified(extra.get(f"verified:{number}")),
        hopeless=(extra.get(f"hopeless:{number}") or {}).get("reason"),
        driver=attrs.get("driver"),
        looks=tuple((int(step), float(accuracy)) for step, accuracy in attrs.get("looks", ())),
    )


def approvals_in(attrs: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """What people said of trials, in order, from a study's attributes; the first version kept it in one list."""
    words = sorted((int(key.removeprefix(WORD)), key) for key in attrs if key.startswith(WORD))
    return (*attrs.get("approvals", []), *(attrs[key] for _, key in words))


def quality_from(data: Mapping[str, Any]) -> Quality:
    values: dict[str, Any] = {**data, "losses": tuple(data.get("losses", ()))}
    return Quality(**values)


def _latency(data: Mapping[str, Any] | None) -> Latency | None:
    return Latency(**data) if data is not None else None


def _verified(data: Mapping[str, Any] | None) -> Verified | None:
    if data is None:
        return None
    values: dict[str, Any] = {**data, "latency": Latency(**data["latency"])}
    values |= {key: quality_from(data[key]) for key in ("quality", "simulated", "search_quality")}
    base64.b64decode(values.get("answers") or "")  # damaged, it is refused here and not in the middle of a report
    return Verified(**values)
