"""What a user asks of a night. Plain values; the command line turns YAML into them."""

from dataclasses import dataclass, field
from pathlib import Path

from ..evaluators.latency.target import Target
from ..spaces.space import Offer

SAMPLERS = ("nightpress", "nsga2", "nsga3", "tpe", "random")
RUNNERS = ("local",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Hard limits; None means no limit."""

    max_latency_ms: float | None = None
    min_accuracy: float | None = None
    max_size_bytes: int | None = None


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
class SearchConfig:
    """``storage`` None keeps the study in the run folder; ``max_trials`` None lets the clock decide."""

    sampler: str = "nightpress"
    runner: str = "local"
    workers: int = 1
    storage: str | None = None
    max_trials: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneConfig:
    """Lengths in optimiser steps; None lets the agent choose them from the budget."""

    short_steps: int | None = None
    long_steps: int | None = None
    batch_size: int = 64
    finalists: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's config as resolved: paths absolute, defaults filled in."""

    task: str
    base: str | None
    """The folder that ``task`` is relative to."""
    out: Path
    target: Target = field(default_factory=Target)
    target_profile: str | None = None
    seed: int = 0
    until: str | None = None
    budget_seconds: float | None = None
    limits: Limits = field(default_factory=Limits)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)
    calibration_policies: int = 40
    warm_start: tuple[str, ...] = ()
    """Run folders of the same model whose fronts are enqueued first."""
    device: str = "auto"
