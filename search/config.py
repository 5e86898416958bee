"""What a user asks of a night. Plain values; the command line turns YAML into them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..evaluators.latency.target import Target
from ..spaces.space import Offer

SAMPLERS = ("nightpress", "nsga2", "nsga3", "tpe", "gp", "netadapt", "random")
PARTS = ("free_objectives", "rungs", "sensitivity", "seeds")
LOCAL, RAY = RUNNERS = ("local", "ray")
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Hard limits; None means no limit. ``max_macs`` is for those who have a budget of multiply-accumulates; it says
    nothing of the latency."""

    max_latency_ms: float | None = None
    min_accuracy: float | None = None
    max_size_bytes: int | None = None
    max_macs: int | None = None

    def too_much_work(self, macs: int | None) -> bool:
        """Whether so many multiply-accumulates are above ``max_macs``."""
        return self.max_macs is not None and (macs or 0) > self.max_macs


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    max_ratio: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsConfig:
    weights: tuple[int, ...] = (8, 32)
    activations: tuple[int, ...] = (8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceConfig(Offer):
    """``prune`` None keeps all channels."""

    prune: PruneConfig | None = field(default_factory=PruneConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one worker takes. ``cpu`` None divides this machine's cores among its workers, and means one on a cluster;
    ``memory_gb`` (GiB) None divides 80 % of this machine's memory, and is no condition on a cluster."""

    cpu: int | None = None
    gpu: float = 0.0
    memory_gb: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """``address`` None starts a cluster of our own on this machine where the runner is ``ray``; ``workers`` ``auto``
    takes all the room there is. ``storage`` None keeps the study in the run folder; drivers whose ``storage`` and
    ``study`` are the same search together. ``max_trials`` None lets the clock decide."""

    sampler: str = "nightpress"
    without: tuple[str, ...] = ()
    """What the search does without, of ``PARTS``: to see what each of them is worth."""
    runner: str = LOCAL
    address: str | None = None
    workers: int | Literal["auto"] = 1
    resources: Resources = field(default_factory=Resources)
    storage: str | None = None
    study: str = "nightpress"
    max_trials: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneConfig:
    """Lengths in optimiser steps; None lets the agent choose them, from the budget and a study. ``part_steps`` of the
    short fine-tune are a rung of their own, 0 is for none."""

    part_steps: int | None = None
    short_steps: int | None = None
    long_steps: int | None = None
    batch_size: int = 64
    finalists: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    """Who is told at the end of a night, and of trouble: a URL that takes JSON by POST, a shell command."""

    webhook: str | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's config as resolved: paths absolute, defaults filled in."""

    task: str
    base: str | None
    """The folder that ``task`` is relative to."""
    out: Path
    target: Target = field(default_factory=Target)
    target_profile: str | None = None
    force: bool = False
    """Whether a profile of another model or device is taken all the same."""
    seed: int = 0
    until: str | None = None
    budget_seconds: float | None = None
    limits: Limits = field(default_factory=Limits)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)
    calibration_policies: int | None = None
    """Policies to measure; None lets the agent stop when the held-out error has stopped falling."""
    warm_start: tuple[str, ...] = ()
    """Run folders of the same model whose fronts are enqueued first."""
    seeds: tuple[str, ...] = ()
    """Policy files that are tried first."""
    device: str = "auto"
    max_disk_bytes: int = 20_000_000_000
    """What the run's artefacts may take."""
    notify: Notify = field(default_factory=Notify)
