"""Where an export comes from: what its files say of the night, the task and the target, but cannot measure."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from ..evaluators.latency.target import Target, fingerprint, fingerprint_to_dict, target_from_dict, target_to_dict
from ..search.records import PICK, RunRecord, TrialRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """``task`` as :func:`load_task` takes it, absolute where it is a file; ``policy`` in its JSON form.

    ``reference_accuracy`` is the original's: given, trained_longer, counted. ``truth_repeat`` is how far two
    independent measurements of one model lay apart in the night, as a share; None where that was not measured.
    ``device`` is that of the latencies, empty where it is not known; ``forced`` says in what the profile that the
    search went by differs from it or from the model, where --force overrode that.
    """

    name: str
    task: str
    seed: int
    batch_size: int
    trial: int
    digest: str
    policy: Mapping[str, Any]
    target: Target
    device: Mapping[str, Any]
    digests: Mapping[str, str | None]
    reference_accuracy: Mapping[str, float | None] | None
    original_bytes: int | None
    truth_repeat: float | None
    approvals: tuple[Mapping[str, Any], ...] = ()
    epochs: float = 0.0
    """Of training after the night."""
    forced: str | None = None

    @property
    def file_name(self) -> str:
        """The task's name where a name may hold letters, digits, ``_``, ``-`` and ``.`` only."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", self.name) or "model"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the policy has a file of its own."""
        data = {**asdict(self), "target": target_to_dict(self.target), "approvals": list(self.approvals)}
        del data["policy"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], policy: Mapping[str, Any]) -> Self:
        """The inverse. Raises KeyError or TypeError when something is missing or unknown."""
        values: dict[str, Any] = dict(data)
        values |= {"target": target_from_dict(data["target"]), "approvals": tuple(data["approvals"])}
        return cls(policy=policy, **values)

    def here(self) -> Self:
        """The same origin, measured on this machine."""
        return replace(self, device=fingerprint_to_dict(fingerprint(self.target)))

    def trained(self, digest: str, policy: Mapping[str, Any], epochs: float) -> Self:
        """The same origin after more training."""
        return replace(self, digest=digest, policy=policy, epochs=self.epochs + epochs)


def origin_of(run: RunRecord, trial: TrialRecord) -> Origin:
    """A trial's origin, from its run's record."""
    original = next((t for t in run.trials if t.name == "uncompressed"), None)
    found = run.target or {}
    target = target_from_dict(found.get("target") or run.config["target"])
    carried = trial.latency.forced if trial.latency is not None else None
    return Origin(
        name=str(run.state.get("task", "model")),
        task=_absolute(run.config["task"], run.config.get("base")),
        seed=run.config["seed"],
        batch_size=run.config["finetune"]["batch_size"],
        trial=trial.number,
        digest=trial.digest,
        policy=trial.policy,
        target=target,
        device=run.device,
        digests={key: run.state.get(key) for key in ("model", "data", "code")},
        reference_accuracy=_reference_accuracy(run),
        original_bytes=original.size_bytes if original is not None else None,
        truth_repeat=(found.get("truth_repeat") or {}).get("mape"),
        approvals=tuple(
            {"action": PICK, **entry} for entry in run.approvals
            if entry.get("trial") == trial.number and entry.get("digest") == trial.digest
        ),
        forced=carried or "; ".join(found.get("forced") or ()) or None,
    )  # fmt: skip


def _absolute(task: str, base: str | None) -> str:
    """A task file's path may be relative to the night's config; a built-in's name stays."""
    file, colon, function = task.rpartition(":")
    return str((Path(base or "") / file).resolve()) + colon + function if file.endswith(".py") else task


def _reference_accuracy(run: RunRecord) -> dict[str, float | None] | None:
    known: Mapping[str, Any] | None = run.state.get("reference_accuracy")
    if known is not None:
        return dict(known)
    given = (run.state.get("given") or {}).get("test")
    return {"given": given["accuracy"], "trained_longer": None, "counted": given["accuracy"]} if given else None
