"""What the page's script reads of each trial, packed so that thousands of trials fit into one small file."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from ..search.config import Limits
from ..search.records import Quality, RunRecord, TrialRecord, row
from .figure_base import MOST_TRIALS
from .front import breaches, candidates, front, limits, most_interesting, point
from .text import cut, plain, title

DETAIL_BYTES = 3_300_000
"""What the trials' details may take, so that the page stays below 6 MB beside 1.5 MB of plotly.js and the figures."""
BRIEF = (
    "trial", "title", "role", "state", "digest", "accuracy", "split", "latency_ms", "size_bytes", "macs", "reason",
    "candidate",
)  # fmt: skip
"""What the card of a trial holds whose details do not fit."""
UNUSED = frozenset({"rung", "repeat_error", "policy", "samples"})
"""Keys of :func:`row` that no card shows, or shows in another form."""


class Column(NamedTuple):
    """One mapping of the policies: every name that occurs in it, and every value, each once."""

    names: dict[str, int]
    values: dict[Any, int]
    """By a key that can be hashed, whose first part is the value itself."""

    def pack(self, mapping: Mapping[str, Any]) -> list[int]:
        """For each known name the position of its value, -1 where the mapping has none."""
        for name in mapping:
            self.names.setdefault(name, len(self.names))
        positions = [-1] * len(self.names)
        for name, value in mapping.items():
            positions[self.names[name]] = self.values.setdefault(_key(value), len(self.values))
        return positions

    def data(self) -> dict[str, Any]:
        values = [json.loads(key[1]) if key[0] is None else key[0] for key in self.values]
        return {"names": list(self.names), "values": values}


def _key(value: Any) -> tuple[Any, Any]:
    """A scalar with its type, since 1, 1.0 and true are equal; anything else as its text."""
    if value is not None and isinstance(value, str | int | float | bool):
        return value, type(value)
    if isinstance(value, dict) and value.keys() == {"weights", "activations"}:  # most values by far
        return None, f'{{"weights":{value["weights"]},"activations":{value["activations"]}}}'
    return None, json.dumps(value, sort_keys=True)


class Packed(NamedTuple):
    """Cards whose policies are positions in ``columns``."""

    cards: list[dict[str, Any]]
    columns: dict[str, dict[str, Any]]


def packed(run: RunRecord) -> Packed:
    """A card for each trial, in order of number, without what is unknown.

    The page has a limited size: policies and curves of the later trials are left out (``brief``) when those of the
    front, of the verified and of the earlier ones have filled it; trials.csv has them.
    """
    # The page's filters may loosen the other limits; nobody who has a budget of work loosens that.
    on_front, most_macs = _numbers(front(run)), limits(run).max_macs or math.inf
    comparable = _numbers(trial for trial in candidates(run) if (trial.macs or 0) <= most_macs)
    columns = dict[str, Column]()
    left = DETAIL_BYTES
    cards: list[dict[str, Any]] = []
    shown = most_interesting(run, MOST_TRIALS)
    for trial in sorted(shown, key=lambda t: (t.number not in on_front, t.verified is None, t.number)):
        allowed = limits(run, verified=trial.verified is not None)
        card = _card(trial, allowed) | ({"candidate": True} if trial.number in comparable else {})
        brief = {key: card[key] for key in BRIEF if key in card} | {"brief": True}
        if left > 0:
            card["policy"] = _pack(trial.policy, columns)
            left -= len(json.dumps(card, separators=(",", ":")))
        cards.append(card if left > 0 else brief)
    cards.sort(key=lambda card: card["trial"])
    return Packed(cards, {key: column.data() for key, column in columns.items()})


def _numbers(trials: Iterable[TrialRecord]) -> set[int]:
    return {trial.number for trial in trials}


def _pack(policy: Mapping[str, Any], columns: dict[str, Column]) -> dict[str, Any]:
    """The policy with its mappings as positions; anything else of it as it is, whatever its schema."""
    found: dict[str, Any] = {}
    for key, given in policy.items():
        if key in {"schema", "model"}:
            continue
        value = rounded(given)
        if isinstance(value, dict):
            found[key] = columns.setdefault(key, Column({}, {})).pack(cast("dict[str, Any]", value))
        else:
            found[key] = value
    return found


def rounded(value: Any, significant: int = 6) -> Any:
    """A value as :func:`plain` makes it, floats with at most so many digits: no card shows more."""
    if isinstance(value, float):
        return float(f"{value:.{significant}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, Any]", value).items()
        return {str(key): rounded(item, significant) for key, item in pairs}
    if isinstance(value, list | tuple):
        return [rounded(item, significant) for item in cast("list[Any]", value)]
    return plain(value)


def _card(trial: TrialRecord, allowed: Limits) -> dict[str, Any]:
    verified, found = trial.verified, point(trial)
    stages = [_stage("search", quality) for quality in trial.qualities]
    if verified is not None:
        stages += [
            _stage("after the long fine-tune", verified.search_quality),
            _stage("quantisation simulated", verified.simulated),
            _stage("exported file", verified.quality),
        ]
    card = {key: value for key, value in row(replace(trial, policy={})).items() if key not in UNUSED}
    card |= {
        "title": cut(title(trial)),
        "name": cut(trial.name) if trial.name else None,
        "reason": cut(trial.reason) if trial.reason else None,
        "struck_out": cut(trial.struck_out) if trial.struck_out else None,
        "beyond": breaches(allowed, found) if found else None,
        "reused_from": trial.reused_from,
        "predicted_ms": trial.predicted.latency_ms if trial.predicted else None,
        "stages": stages,
        "verified": None
        if verified is None
        else {
            "top1_agreement": verified.top1_agreement,
            "max_abs_diff": verified.max_abs_diff,
            "bits_used": verified.bits_used,
            "rate": verified.rate,
        },
    }
    return {key: value for key, value in rounded(card).items() if value is not None and value != []}


def _stage(name: str, quality: Quality) -> dict[str, Any]:
    stage = {
        "name": name,
        "rung": quality.rung,
        "split": quality.split,
        "accuracy": quality.accuracy,
        "se": quality.accuracy_se,
        "samples": quality.samples,
        "losses": [rounded(loss, 3) for loss in quality.losses],
    }
    return {key: value for key, value in stage.items() if value is not None and value != []}
