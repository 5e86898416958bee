"""What the trials of a study have shown, as rows and observations; a finished trial is read once."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..spaces.policy import policy_from_dict
from .encoding import Encoder
from .records import TrialRecord, TrialState
from .store import LONG
from .surrogate import RUNGS, Observation

Array = NDArray[np.float64]
_COUNTED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING)


class Experience:
    """Rows, costs and accuracies of policies that were tried or are being tried."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._finished: dict[int, dict[str, Any]] = {}
        self._entries: list[dict[str, Any]] = []
        self.rows = np.zeros((0, len(encoder.columns)))
        """Policies whose costs are known, shape (n, columns)."""
        self.costs = np.zeros((0, 2))
        """Latency in ms and size in bytes of each of the rows."""
        self.digests: set[str] = set()
        """Of all policies that ever began, so that none is proposed twice."""

    def read(self, study: Study) -> None:
        """Bring up to date with the study."""
        extra = study.user_attrs
        entries: list[dict[str, Any]] = []
        for trial in study.get_trials(deepcopy=False):
            if "digest" in trial.user_attrs:
                self.digests.add(trial.user_attrs["digest"])
            if trial.state in _COUNTED and "policy" in trial.user_attrs and "reused_from" not in trial.user_attrs:
                entries.append(self._entry(trial, extra))
        self._keep([entry for entry in entries if entry["costs"] is not None])

    def take(self, trials: Sequence[TrialRecord]) -> None:
        """Bring up to date with the records of a run instead."""
        entries: list[dict[str, Any]] = []
        for trial in trials:
            self.digests.add(trial.digest)
            done = trial.state in {TrialState.COMPLETE, TrialState.STOPPED} and trial.reused_from is None
            if not done or trial.latency is None or trial.size_bytes is None:
                continue
            seen = [*trial.qualities, *([trial.verified.search_quality] if trial.verified else [])]
            entries.append(
                {
                    "row": self._encoder.row(policy_from_dict(dict(trial.policy), f"trial {trial.number}")),
                    "costs": (trial.latency.latency_ms, float(trial.size_bytes)),
                    "qualities": [{"rung": q.rung, "accuracy": q.accuracy, "accuracy_se": q.accuracy_se} for q in seen],
                    "full": trial.state is TrialState.COMPLETE,
                }
            )
        self._keep(entries)

    def _keep(self, entries: list[dict[str, Any]]) -> None:
        self._entries, size = entries, len(entries)
        self.rows = np.array([e["row"] for e in entries]).reshape(size, len(self._encoder.columns))
        self.costs = np.array([e["costs"] for e in entries], dtype=np.float64).reshape(size, 2)

    def _entry(self, trial: FrozenTrial, extra: Mapping[str, Any]) -> dict[str, Any]:
        entry = self._finished.get(trial.number) or self._read(trial)
        if trial.state is optuna.trial.TrialState.COMPLETE:
            self._finished[trial.number] = entry
        long = extra.get(f"{LONG}{trial.number}")
        if long is None and f"measured:{trial.number}" not in extra:
            return entry
        measured = extra.get(f"measured:{trial.number}")
        costs = (measured["latency_ms"], entry["costs"][1]) if measured and entry["costs"] else entry["costs"]
        return {**entry, "costs": costs, "qualities": [*entry["qualities"], long] if long else entry["qualities"]}

    def _read(self, trial: FrozenTrial) -> dict[str, Any]:
        attrs = trial.user_attrs
        latency = (attrs.get("measured") or attrs.get("predicted") or {}).get("latency_ms")
        size = attrs.get("size_bytes")
        return {
            "row": self._encoder.row(policy_from_dict(attrs["policy"], f"trial {trial.number}")),
            "costs": (float(latency), float(size)) if latency is not None and size is not None else None,
            "qualities": list(attrs.get("qualities", [])),
            "full": attrs.get("state") == TrialState.COMPLETE,
        }

    def observations(self, *, cheap: bool = True) -> list[Observation]:
        """Every accuracy that was seen; without ``cheap`` only the highest rung of trials that were not stopped."""
        found: list[Observation] = []
        for entry in self._entries:
            qualities = entry["qualities"] if cheap else entry["qualities"][-1:] if entry["full"] else []
            found += [
                Observation(row=entry["row"], rung=RUNGS.index(q["rung"]), accuracy=q["accuracy"],
                            se=q["accuracy_se"] or 0.0)
                for q in qualities
                if q["rung"] in RUNGS
            ]  # fmt: skip
        return found

    def nearest_costs(self, rows: Array) -> Array:
        """Costs of the nearest policies that were tried: all that is known where costs are not predicted."""
        span = np.maximum(self._encoder.high - self._encoder.low, 1e-9)
        known, asked = self.rows / span, rows / span
        return self.costs[np.argmin((known**2).sum(axis=1) - 2 * asked @ known.T, axis=1)]
