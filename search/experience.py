"""What the trials of a study have shown, as rows and observations; a finished trial is read once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..spaces.policy import policy_from_dict
from .encoding import Encoder
from .records import Rung, TrialRecord, TrialState, by_divergence
from .store import LONG, MEASURED
from .surrogate import RUNGS, Observation

Array = NDArray[np.float64]
SHORT = RUNGS.index(Rung.SHORT)
"""How far a trial of the search goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What one trial has shown; ``full`` where nobody stopped it, ``open`` where it has not ended, ``diverged`` where
    its own policy made it fail."""

    row: Array
    costs: tuple[float, float] | None
    seen: tuple[Observation, ...]
    full: bool
    open: bool = False
    diverged: bool = False


class Experience:
    """Rows, costs and accuracies of policies that were tried or are being tried."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._finished: dict[int, _Entry] = {}
        self._entries: list[_Entry] = []
        self.rows = np.zeros((0, len(encoder.columns)))
        """Policies whose costs are known, shape (n, columns)."""
        self.costs = np.zeros((0, 2))
        """Latency in ms and size in bytes of each of the rows."""
        self.digests: set[str] = set()
        """Of all policies that ever began, so that none is proposed twice."""

    def read(self, study: Study) -> None:
        """Bring up to date with the study."""
        extra = study.user_attrs
        later = {key.rpartition(":")[2] for key in extra if key.startswith((LONG, MEASURED))}
        entries: list[_Entry] = []
        for trial in study.get_trials(deepcopy=False):
            known = self._finished.get(trial.number)
            if known is None:
                if "digest" in trial.user_attrs:
                    self.digests.add(trial.user_attrs["digest"])
                if not _counts(trial):
                    continue
                known = self._read(trial)
                if trial.state.is_finished():
                    self._finished[trial.number] = known
            entries.append(_with_later(known, trial.number, extra) if str(trial.number) in later else known)
        self._keep([entry for entry in entries if entry.costs is not None])

    def take(self, trials: Sequence[TrialRecord]) -> None:
        """Bring up to date with the records of a run instead."""
        entries: list[_Entry] = []
        for trial in trials:
            self.digests.add(trial.digest)
            done = trial.state in {TrialState.COMPLETE, TrialState.STOPPED} or trial.diverged
            if not done or trial.reused_from is not None or trial.latency is None or trial.size_bytes is None:
                continue
            row = self._encoder.row(policy_from_dict(dict(trial.policy), f"trial {trial.number}"))
            entries.append(
                _Entry(
                    row=row, costs=(trial.latency.latency_ms, float(trial.size_bytes)),
                    seen=_observations(row, [(q.rung, q.accuracy, q.accuracy_se) for q in trial.seen]),
                    full=trial.state is TrialState.COMPLETE, diverged=trial.diverged,
                )
            )  # fmt: skip
        self._keep(entries)

    def _keep(self, entries: list[_Entry]) -> None:
        self._entries, size = entries, len(entries)
        self.rows = np.array([e.row for e in entries]).reshape(size, len(self._encoder.columns))
        self.costs = np.array([e.costs for e in entries], dtype=np.float64).reshape(size, 2)

    def _read(self, trial: FrozenTrial) -> _Entry:
        attrs = trial.user_attrs
        latency = (attrs.get("measured") or attrs.get("predicted") or {}).get("latency_ms")
        size, row = attrs.get("size_bytes"), self._encoder.row(policy_from_dict(attrs["policy"], "a trial"))
        return _Entry(
            row=row, costs=(float(latency), float(size)) if latency is not None and size is not None else None,
            seen=_observations(row, [_triple(quality) for quality in attrs.get("qualities", [])]),
            full=attrs.get("state") == TrialState.COMPLETE, open=not trial.state.is_finished(),
            diverged=trial.state is optuna.trial.TrialState.FAIL,
        )  # fmt: skip

    @property
    def pending(self) -> Array:
        """Rows of trials that have not ended, the latest last."""
        return self.rows[[entry.open for entry in self._entries]]

    def observations(self, *, cheap: bool = True) -> list[Observation]:
        """Every accuracy that was seen; without ``cheap`` only the highest rung of trials that were not stopped.

        A fine-tune that diverged counts as the worst that was seen of any: the model must not go on hoping for its
        like, and an accuracy of nothing would blame everything that it shares with good ones.
        """
        if cheap:
            found = [seen for entry in self._entries for seen in entry.seen]
        else:
            found = [entry.seen[-1] for entry in self._entries if entry.full and entry.seen]
        worst = min((o for o in found if o.rung == SHORT), key=lambda o: o.accuracy, default=None)
        if worst is not None:
            found += [replace(worst, row=entry.row) for entry in self._entries if entry.diverged]
        return found

    def nearest_costs(self, rows: Array) -> Array:
        """Costs of the nearest policies that were tried: all that is known where costs are not predicted."""
        span = np.maximum(self._encoder.high - self._encoder.low, 1e-9)
        known, asked = self.rows / span, rows / span
        return self.costs[np.argmin((known**2).sum(axis=1) - 2 * asked @ known.T, axis=1)]


def _counts(trial: FrozenTrial) -> bool:
    attrs = trial.user_attrs
    if "policy" not in attrs or "reused_from" in attrs:
        return False
    state = optuna.trial.TrialState
    if trial.state is state.FAIL:
        return by_divergence(attrs.get("reason"))
    if trial.state is state.PRUNED:  # so is what was never trained; what older versions stopped is COMPLETE to Optuna
        return attrs.get("state") == TrialState.STOPPED
    return trial.state in {state.COMPLETE, state.RUNNING}


def _with_later(entry: _Entry, number: int, extra: Mapping[str, Any]) -> _Entry:
    """With what was learned after the trial had ended: its long fine-tune, its measured latency."""
    long, measured = extra.get(f"{LONG}{number}"), extra.get(f"{MEASURED}{number}")
    costs = (measured["latency_ms"], entry.costs[1]) if measured and entry.costs else entry.costs
    seen = (*entry.seen, *_observations(entry.row, [_triple(long)])) if long else entry.seen
    return replace(entry, costs=costs, seen=seen)


def _triple(quality: Mapping[str, Any]) -> tuple[str, float, float | None]:
    return quality["rung"], quality["accuracy"], quality["accuracy_se"]


def _observations(row: Array, seen: Sequence[tuple[str, float, float | None]]) -> tuple[Observation, ...]:
    return tuple(
        Observation(row=row, rung=RUNGS.index(rung), accuracy=accuracy, se=se or 0.0)
        for rung, accuracy, se in seen
        if rung in RUNGS
    )
