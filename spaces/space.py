"""The set of policies that the anatomy, the target and the user's limits allow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from .anatomy import Anatomy, Block, Group, kept_channels
from .errors import InputError
from .policy import FP32, SCHEDULES, Distill, FineTune, LayerBits, Policy, nearest

T = TypeVar("T", str, int)

LEARNING_RATE = (0.003, 0.1)
ALPHA = (0.0, 0.95)
TEMPERATURE = (1.0, 6.0)


class Suggest(Protocol):
    """Whoever decides: an Optuna trial, a random generator, a fixed list of answers."""

    def choice(self, name: str, values: Sequence[str]) -> str: ...
    def integer(self, name: str, low: int, high: int) -> int: ...
    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What may be chosen. ``bit_choices`` are the (weights, activations) pairs that the target can run."""

    anatomy: Anatomy
    max_ratio: float
    bit_choices: tuple[LayerBits, ...]
    blocks: bool = True
    distill: bool = True

    def sample(self, suggest: Suggest) -> Policy:
        """One policy, asked choice by choice; every parameter is always asked, so the space is flat."""
        keep = {
            group.name: suggest.integer(f"keep:{group.name}", *self.step_range(group)) for group in self.anatomy.groups
        }
        bits = {
            layer.name: parse_bits(suggest.choice(f"bits:{layer.name}", self._bit_names()))
            for layer in self.anatomy.layers
        }
        removed = [b.name for b in self._blocks() if suggest.choice(f"block:{b.name}", ("keep", "remove")) == "remove"]
        policy = Policy(
            model=self.anatomy.digest,
            prune={g.name: ratio_of(g, keep[g.name]) for g in self.anatomy.groups},
            bits=bits,
            removed_blocks=tuple(removed),
            distill=self._sample_distill(suggest),
            finetune=FineTune(learning_rate=suggest.real("finetune.learning_rate", *LEARNING_RATE, log=True)),
        )
        return canonical(policy, self.anatomy)

    def params(self, policy: Policy) -> dict[str, str | int | float]:
        """The answers that make :meth:`sample` return this policy (its inverse up to canonical form)."""
        answers: dict[str, str | int | float] = {
            f"keep:{g.name}": math.ceil(kept_channels(g, policy.prune.get(g.name, 0.0)) / g.step)
            for g in self.anatomy.groups
        }
        gone = _layers_of(self.anatomy, policy.removed_blocks)  # theirs must still be an answer that is on offer
        unheard = FP32 if FP32 in self.bit_choices else self.bit_choices[0]
        answers |= {
            f"bits:{n.name}": bits_name(unheard if n.name in gone else policy.bits.get(n.name, FP32))
            for n in self.anatomy.layers
        }
        answers |= {f"block:{b.name}": "remove" if b.name in policy.removed_blocks else "keep" for b in self._blocks()}
        if self.distill:
            answers["distill.alpha"] = policy.distill.alpha if policy.distill.method == "logit" else 0.0
            answers["distill.temperature"] = policy.distill.temperature
            answers["distill.schedule"] = policy.distill.schedule
        return answers | {"finetune.learning_rate": policy.finetune.learning_rate}

    def random(self, generator: np.random.Generator) -> Policy:
        """A random policy. One level of harshness is drawn first and the ratios scatter about it.

        Independent ratios would nearly always average out to the middle of the space and leave its
        mild and harsh ends unseen, and both calibration and search need those.
        """
        return self.sample(_RandomSuggest(generator, float(generator.uniform()), float(generator.uniform())))

    def contains(self, policy: Policy) -> bool:
        """Whether the policy's choices are all among those that this space offers."""
        in_steps = all(
            kept_channels(g, policy.prune.get(g.name, 0.0)) >= min(g.channels, self.step_range(g)[0] * g.step)
            for g in self.anatomy.groups
        )
        live = [n for n in self.anatomy.layers if n.name not in _layers_of(self.anatomy, policy.removed_blocks)]
        return (
            in_steps
            and all(policy.bits.get(n.name, FP32) in self.bit_choices for n in live)
            and all(name in {b.name for b in self._blocks()} for name in policy.removed_blocks)
        )

    def step_range(self, group: Group) -> tuple[int, int]:
        """The least and the largest number of channel steps that a group may keep."""
        least = round(group.channels * (1 - self.max_ratio) / group.step, 6)  # 40 · (1 − 0.7) / 4 is a little over 3
        return max(1, math.ceil(least)), math.ceil(group.channels / group.step)

    @property
    def dimensions(self) -> int:
        """How many choices one policy makes."""
        return len(self.params(Policy(model=self.anatomy.digest)))

    def _blocks(self) -> list[Block]:
        return list(self.anatomy.blocks) if self.blocks else []

    def _bit_names(self) -> tuple[str, ...]:
        return tuple(bits_name(pair) for pair in self.bit_choices)

    def _sample_distill(self, suggest: Suggest) -> Distill:
        if not self.distill:
            return Distill(method="none", alpha=0.0)
        return Distill(
            alpha=suggest.real("distill.alpha", *ALPHA),
            temperature=suggest.real("distill.temperature", *TEMPERATURE),
            schedule=suggest.choice("distill.schedule", SCHEDULES),
        )


def canonical(policy: Policy, anatomy: Anatomy) -> Policy:
    """The one way to write a policy: ratios on the channel grid, nothing said of what is removed,
    no temperature where nothing is distilled. Policies that do the same have the same digest."""
    gone = _layers_of(anatomy, policy.removed_blocks)
    ratios = {
        g.name: round(1 - kept_channels(g, policy.prune.get(g.name, 0.0)) / g.channels, 6)
        for g in anatomy.groups
        if not set(g.layers) <= gone
    }
    bits = {
        name: LayerBits(weights=pair.weights, activations=32 if pair.weights > 8 else pair.activations)
        for name, pair in policy.bits.items()
        if name not in gone
    }
    distill = policy.distill
    if distill.method == "none" or round(distill.alpha, 3) == 0:
        distill = Distill(method="none", alpha=0.0)
    else:
        distill = replace(distill, alpha=round(distill.alpha, 3), temperature=round(distill.temperature, 2))
    return replace(
        policy,
        prune={k: v for k, v in ratios.items() if v > 0},
        bits={k: v for k, v in bits.items() if v != FP32},
        removed_blocks=tuple(sorted(set(policy.removed_blocks))),
        distill=distill,
        finetune=FineTune(learning_rate=float(f"{policy.finetune.learning_rate:.3g}")),
    )


def check_policy(policy: Policy, anatomy: Anatomy, bit_choices: Sequence[LayerBits] | None, source: str) -> None:
    """Refuse a policy that this model or target cannot follow. Raises InputError naming file and key."""
    if policy.model != anatomy.digest:
        raise InputError(
            f"{source}: a policy belongs to one model; this one is for {policy.model}, the task's model is "
            f"{anatomy.digest}."
        )
    for key, names, known in (
        ("prune", policy.prune, [g.name for g in anatomy.groups]),
        ("bits", policy.bits, [n.name for n in anatomy.layers]),
        ("removed_blocks", policy.removed_blocks, [b.name for b in anatomy.blocks]),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"{source}: {key} names {name}, which this model does not have{nearest(name, known)}.")
    if bit_choices is None:
        return
    for name, pair in policy.bits.items():
        if pair not in bit_choices:
            listed = ", ".join(bits_name(p) for p in bit_choices)
            raise InputError(
                f"{source}: bits.{name} must be one of {listed} (weights/activations) on this target, but got "
                f"{bits_name(pair)}."
            )


def uniform(anatomy: Anatomy, *, width: float, bits: LayerBits, like: Policy | None = None) -> Policy:
    """Every group at the same width (the share of channels that stays), every layer at the same bits."""
    base = like or Policy(model=anatomy.digest)
    policy = replace(
        base,
        prune={g.name: 1 - width for g in anatomy.groups},
        bits={layer.name: bits for layer in anatomy.layers},
        removed_blocks=(),
    )
    return canonical(policy, anatomy)


def ratio_of(group: Group, steps: int) -> float:
    """The prune ratio that keeps this many steps of channels."""
    return max(0.0, 1 - steps * group.step / group.channels)


def bits_name(bits: LayerBits) -> str:
    return f"{bits.weights}/{bits.activations}"


def parse_bits(name: str) -> LayerBits:
    weights, activations = name.split("/")
    return LayerBits(weights=int(weights), activations=int(activations))


def _layers_of(anatomy: Anatomy, blocks: Sequence[str]) -> set[str]:
    return {layer for b in anatomy.blocks if b.name in blocks for layer in b.layers}


@dataclass(frozen=True, slots=True)
class _RandomSuggest:
    generator: np.random.Generator
    harshness: float
    integer_share: float

    def choice(self, name: str, values: Sequence[str]) -> str:
        if name.startswith("block:"):
            return values[int(self.generator.uniform() < 0.4 * self.harshness)]
        if name.startswith("bits:") and "8/8" in values and self.generator.uniform() < self.integer_share:
            return "8/8"
        return values[int(self.generator.integers(len(values)))]

    def integer(self, name: str, low: int, high: int) -> int:
        del name
        middle = high - self.harshness * (high - low)
        return int(np.clip(round(self.generator.normal(middle, 0.25 * (high - low))), low, high))

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        del name
        if log:
            return float(np.exp(self.generator.uniform(math.log(low), math.log(high))))
        return float(self.generator.uniform(low, high))
