"""The set of policies that the anatomy, the target and the user's limits allow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Protocol

import numpy as np

from .anatomy import Anatomy, Block, Group, Layer, kept_channels
from .errors import InputError
from .policy import DISTILL_METHODS, FP32, SCHEDULES, Distill, FineTune, LayerBits, Policy, nearest
from .stages import useful_stages

LEARNING_RATE = (0.003, 0.1)
ALPHA = (0.0, 0.95)
TEMPERATURE = (1.0, 6.0)
FEATURE_WEIGHT = (0.1, 10.0)
MOST_SPARSE_TENTHS = 9
NO_DISTILL = Distill(method="none", alpha=0.0)
_UNSAID = Policy(model="")


class Suggest(Protocol):
    """Whoever decides: an Optuna trial, a random generator, a fixed list of answers."""

    def choice(self, name: str, values: Sequence[str]) -> str: ...
    def integer(self, name: str, low: int, high: int) -> int: ...
    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What may be chosen beside ratios and bits; of lists the search chooses where there is more than one.

    ``distill`` lists methods, none of them means no distillation.
    """

    blocks: bool = True
    distill: tuple[str, ...] = DISTILL_METHODS
    sparsity: bool = False
    importance: tuple[str, ...] = ("l2",)
    stages: tuple[int, ...] = (1,)
    ranges: tuple[str, ...] = ("minmax",)
    scales: tuple[str, ...] = ("fixed",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space(Offer):
    """What may be chosen. ``bit_choices`` are the (weights, activations) pairs that the target can run.

    A parameter is asked when there is more than one answer to it, and then always: the space is flat although
    some parameters have no meaning without others (a temperature without logit distillation, an importance
    where nothing is pruned). Samplers that cross or model parameters only where every trial has them, as
    NSGA-II and multivariate TPE do, would otherwise lose most of the space. The condition lies in the meaning:
    :func:`canonical` takes away what has no effect, so such answers make one policy with one digest.
    """

    anatomy: Anatomy
    max_ratio: float
    bit_choices: tuple[LayerBits, ...]

    @property
    def integers(self) -> LayerBits | None:
        """The most exact of the pairs that run on integers, None where none does."""
        return max((pair for pair in self.bit_choices if pair.int8), key=astuple, default=None)

    def sample(self, suggest: Suggest) -> Policy:
        """One policy, asked choice by choice; every parameter is always asked, so the space is flat."""
        keep = {
            group.name: suggest.integer(f"keep:{group.name}", *self.step_range(group)) for group in self.anatomy.groups
        }
        bits = {
            layer.name: parse_bits(suggest.choice(f"bits:{layer.name}", self._bit_names()))
            for layer in self.anatomy.layers
        }
        sparsity = {
            layer.name: suggest.integer(f"sparsity:{layer.name}", 0, MOST_SPARSE_TENTHS) / 10
            for layer in self._sparse_layers()
        }
        removed = [b.name for b in self._blocks() if suggest.choice(f"block:{b.name}", ("keep", "remove")) == "remove"]
        policy = Policy(
            model=self.anatomy.digest,
            prune={g.name: ratio_of(g, keep[g.name]) for g in self.anatomy.groups},
            bits=bits,
            sparsity=sparsity,
            removed_blocks=tuple(removed),
            importance=_asked(suggest, "importance", self.importance),
            ranges=_asked(suggest, "ranges", self.ranges),
            scales=_asked(suggest, "scales", self.scales),
            distill=self._sample_distill(suggest),
            finetune=FineTune(
                learning_rate=suggest.real("finetune.learning_rate", *LEARNING_RATE, log=True),
                stages=int(_asked(suggest, "finetune.stages", tuple(map(str, self.stages)))),
            ),
        )
        return canonical(policy, self.anatomy)

    def params(self, policy: Policy) -> dict[str, str | int | float]:
        """The answers that make :meth:`sample` return this policy (its inverse up to canonical form).

        What has no effect is answered with the first of the values on offer.
        """
        return self._answers(canonical(policy, self.anatomy))

    def nearest_params(self, policy: Policy) -> dict[str, str | int | float]:
        """:meth:`params` with each answer that this space does not offer taken to the nearest that it does: the nearer
        end of a range, the first of several choices."""
        nearest = _Nearest(self.params(policy))
        self.sample(nearest)
        return nearest.found

    def _answers(self, policy: Policy) -> dict[str, str | int | float]:
        """Those of a policy in its canonical form."""
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
        answers |= {f"sparsity:{n.name}": round(10 * policy.sparsity.get(n.name, 0)) for n in self._sparse_layers()}
        answers |= {f"block:{b.name}": "remove" if b.name in policy.removed_blocks else "keep" for b in self._blocks()}
        answers |= self._distill_answers(policy.distill) | self._method_answers(policy)
        return answers | {"finetune.learning_rate": policy.finetune.learning_rate}

    def random(self, generator: np.random.Generator) -> Policy:
        """A random policy. One level of harshness is drawn first and the ratios scatter about it.

        Independent ratios would nearly always average out to the middle of the space and leave its
        mild and harsh ends unseen, and both calibration and search need those.
        """
        return self.sample(_RandomSuggest(generator, float(generator.uniform()), float(generator.uniform())))

    def contains(self, policy: Policy) -> bool:
        """Whether the policy's choices are all among those that this space offers."""
        told = canonical(policy, self.anatomy)
        nearest = _Nearest(self._answers(told))
        same = self.sample(nearest) == told
        return same and all(answer == nearest.table[name] for name, answer in nearest.found.items())

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

    def _sparse_layers(self) -> tuple[Layer, ...]:
        return self.anatomy.layers if self.sparsity else ()

    def _sample_distill(self, suggest: Suggest) -> Distill:
        methods = [Distill(method=name) for name in self.distill]
        if not methods:
            return NO_DISTILL
        chosen = Distill(method=_asked(suggest, "distill.method", self.distill))
        if any(method.logit for method in methods):
            chosen = replace(
                chosen,
                alpha=suggest.real("distill.alpha", *ALPHA),
                temperature=suggest.real("distill.temperature", *TEMPERATURE),
                schedule=suggest.choice("distill.schedule", SCHEDULES),
            )
        if any(method.inner for method in methods):
            weight = suggest.real("distill.feature_weight", *FEATURE_WEIGHT, log=True)
            chosen = replace(chosen, feature_weight=weight)
        return chosen

    def _distill_answers(self, distill: Distill) -> dict[str, str | int | float]:
        if not self.distill:
            return {}
        method, alpha = distill.method, distill.alpha if distill.logit else 0.0
        if method not in self.distill:  # without its share α, logit distillation is no distillation
            wider = "logit" if method == "none" else f"logit+{method}"
            method = wider if wider in self.distill else method
        methods = [Distill(method=name) for name in self.distill]
        answers: dict[str, str | int | float] = {"distill.method": method} if len(methods) > 1 else {}
        if any(m.logit for m in methods):
            answers["distill.alpha"] = alpha
            answers["distill.temperature"] = distill.temperature
            answers["distill.schedule"] = distill.schedule
        if any(m.inner for m in methods):
            answers["distill.feature_weight"] = distill.feature_weight
        return answers

    def _method_answers(self, policy: Policy) -> dict[str, str | int | float]:
        """Answers about how the compression is done, for each that there is a choice of."""
        stages = tuple(map(str, self.stages))
        pruned, quantised = bool(policy.prune), any(pair.weights <= 8 for pair in policy.bits.values())
        asked = {
            "importance": (policy.importance, self.importance, pruned),
            "ranges": (policy.ranges, self.ranges, quantised),
            "scales": (policy.scales, self.scales, quantised),
            "finetune.stages": (self._stage_answer(policy), stages, True),
        }
        return {
            name: value if heard or value in offered else offered[0]
            for name, (value, offered, heard) in asked.items()
            if len(offered) > 1
        }

    def _stage_answer(self, policy: Policy) -> str:
        """The number of stages on offer that comes to what the policy does."""
        asked = (replace(policy, finetune=FineTune(stages=count)) for count in self.stages)
        same = (p.finetune.stages for p in asked if useful_stages(p) == policy.finetune.stages)
        return str(next(same, policy.finetune.stages))


def canonical(policy: Policy, anatomy: Anatomy) -> Policy:
    """The one way to write a policy: ratios on the channel grid, nothing said of what is removed, no temperature
    where no logits are distilled, no importance where nothing is ranked. Policies that do the same have the
    same digest."""
    gone = _layers_of(anatomy, policy.removed_blocks)
    ratios = {
        g.name: round(1 - kept_channels(g, policy.prune.get(g.name, 0.0)) / g.channels, 6)
        for g in anatomy.groups
        if not set(g.layers) <= gone
    }
    bits = {name: _canonical_bits(pair) for name, pair in policy.bits.items() if name not in gone}
    sparsity = {name: round(ratio, 6) for name, ratio in policy.sparsity.items() if name not in gone}
    written = replace(
        policy,
        prune={k: v for k, v in ratios.items() if v > 0},
        bits={k: v for k, v in bits.items() if v != FP32},
        sparsity={k: v for k, v in sparsity.items() if v > 0},
        removed_blocks=tuple(sorted(set(policy.removed_blocks))),
        distill=_canonical_distill(policy.distill),
    )
    quantised = any(pair.weights <= 8 for pair in written.bits.values())
    return replace(
        written,
        importance=policy.importance if written.prune else _UNSAID.importance,
        ranges=policy.ranges if quantised else _UNSAID.ranges,
        scales=policy.scales if quantised else _UNSAID.scales,
        finetune=FineTune(
            learning_rate=float(f"{policy.finetune.learning_rate:.3g}"),
            stages=useful_stages(written),
        ),
    )


def _canonical_bits(pair: LayerBits) -> LayerBits:
    """Activations are quantised on integer kernels only: beside wider weights, or in 16 bits, for which no runtime has
    a kernel, they stay as they are."""
    idle = pair.weights > 8 or pair.activations == 16
    return LayerBits(weights=pair.weights, activations=32) if idle else pair


def _canonical_distill(distill: Distill) -> Distill:
    alpha = round(distill.alpha, 3) if distill.logit else 0.0
    weight = float(f"{distill.feature_weight:.3g}") if distill.inner else 0.0
    terms = [term for term, share in (("logit", alpha), (distill.inner, weight)) if term and share > 0]
    if not terms:
        return NO_DISTILL
    told = Distill(method="+".join(terms), alpha=alpha)
    if told.inner:
        told = replace(told, feature_weight=weight)
    if not told.logit:
        return told
    temperature = round(distill.temperature, 2)
    # From T on halving stops at 1 and the line at 1.5: below those T stands still.
    moves = temperature > {"halving": 1.0, "linear": 1.5}.get(distill.schedule, math.inf)
    return replace(told, temperature=temperature, schedule=distill.schedule if moves else "constant")


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
        ("sparsity", policy.sparsity, [n.name for n in anatomy.layers]),
        ("removed_blocks", policy.removed_blocks, [b.name for b in anatomy.blocks]),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"{source}: {key} names {name}, which this model does not have{nearest(name, known)}.")
    if bit_choices is None:
        return
    for name, pair in policy.bits.items():
        if _canonical_bits(pair) not in bit_choices:
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


def _asked(suggest: Suggest, name: str, offered: tuple[str, ...]) -> str:
    return suggest.choice(name, offered) if len(offered) > 1 else next(iter(offered))


def _layers_of(anatomy: Anatomy, blocks: Sequence[str]) -> set[str]:
    return {layer for b in anatomy.blocks if b.name in blocks for layer in b.layers}


@dataclass(frozen=True, slots=True)
class _Nearest:
    """Answers from a table, each taken to the nearest on offer; ``found`` are the answers given."""

    table: Mapping[str, str | int | float]
    found: dict[str, str | int | float] = field(default_factory=dict[str, str | int | float])

    def choice(self, name: str, values: Sequence[str]) -> str:
        told = str(self.table[name])
        self.found[name] = answer = told if told in values else values[0]
        return answer

    def integer(self, name: str, low: int, high: int) -> int:
        self.found[name] = answer = min(max(int(self.table[name]), low), high)
        return answer

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        del log
        self.found[name] = answer = min(max(float(self.table[name]), low), high)
        return answer


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
        harsh, mild = (high, low) if name.startswith("sparsity:") else (low, high)
        middle = mild + self.harshness * (harsh - mild)
        return int(np.clip(round(self.generator.normal(middle, 0.25 * (high - low))), low, high))

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        del name
        if log:
            return float(np.exp(self.generator.uniform(math.log(low), math.log(high))))
        return float(self.generator.uniform(low, high))
