"""Policies that need no search: uniform baselines, sensitivity probes, and a greedy latency-per-damage walk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..spaces.anatomy import Anatomy
from ..spaces.policy import FP32, INT8, Distill, Policy
from ..spaces.space import Space, bits_name, canonical, uniform
from .costs import Costs

PROBE_RATIO = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Damage (mean KL divergence in nats) of one choice alone, before any fine-tune.

    ``groups``: half the channels pruned; ``blocks``: removed; ``bits``: by layer and ``weights/activations``.
    """

    groups: Mapping[str, float] = field(default_factory=dict[str, float])
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])
    bits: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])

    def damage(self, policy: Policy) -> float:
        """Additive estimate for a whole policy; a group's damage grows with the square of its ratio."""
        pruned = sum(self.groups.get(name, 0.0) * (ratio / PROBE_RATIO) ** 2 for name, ratio in policy.prune.items())
        removed = sum(self.blocks.get(name, 0.0) for name in policy.removed_blocks)
        stored = sum(self.bits.get(n, {}).get(bits_name(pair), 0.0) for n, pair in policy.bits.items())
        return pruned + removed + stored


def baselines(anatomy: Anatomy, distill: bool) -> dict[str, Policy]:
    """The simple rules that a search must beat, by name. The uncompressed model is trained without distillation."""
    plain = Policy(model=anatomy.digest, distill=Distill(method="none", alpha=0.0))
    like = Policy(model=anatomy.digest) if distill else plain
    rules = {
        "uncompressed": canonical(plain, anatomy),
        "uniform INT8": uniform(anatomy, width=1, bits=INT8, like=like),
    }
    if not anatomy.groups:
        return rules
    for width in (0.75, 0.5, 0.25):
        rules[f"uniform {width:.0%} fp32"] = uniform(anatomy, width=width, bits=FP32, like=like)
        rules[f"uniform {width:.0%} INT8"] = uniform(anatomy, width=width, bits=INT8, like=like)
    return rules


def probes(space: Space) -> dict[tuple[str, str, str], Policy]:
    """One policy a choice, to measure its damage alone; keyed by (kind, name, choice)."""
    plain = Policy(model=space.anatomy.digest)
    found: dict[tuple[str, str, str], Policy] = {}
    for group in space.anatomy.groups:
        found["group", group.name, ""] = canonical(replace(plain, prune={group.name: PROBE_RATIO}), space.anatomy)
    for block in space.anatomy.blocks if space.blocks else ():
        found["block", block.name, ""] = canonical(replace(plain, removed_blocks=(block.name,)), space.anatomy)
    for pair in space.bit_choices:
        if pair.weights < 8:  # eight bits cost next to nothing: not worth a probe a layer
            for layer in space.anatomy.layers:
                found["bits", layer.name, bits_name(pair)] = replace(plain, bits={layer.name: pair})
    return found


def sensitivity_of(damages: Mapping[tuple[str, str, str], float]) -> Sensitivity:
    """Gather the probes' damages; what could not be probed counts as the worst of its kind."""
    worst = max((d for d in damages.values() if math.isfinite(d)), default=1.0)
    known = {key: max(d, 1e-6) if math.isfinite(d) else worst for key, d in damages.items()}
    bits: dict[str, dict[str, float]] = {}
    for (kind, name, choice), value in known.items():
        if kind == "bits":
            bits.setdefault(name, {})[choice] = value
    return Sensitivity(
        groups={name: v for (kind, name, _), v in known.items() if kind == "group"},
        blocks={name: v for (kind, name, _), v in known.items() if kind == "block"},
        bits=bits,
    )


def greedy_walk(space: Space, sensitivity: Sensitivity, costs: Costs, count: int) -> list[Policy]:
    """Policies along a walk that always takes the cut with the most time and size saved per damage.

    In the spirit of NetAdapt (Yang et al. 2018), with predicted costs and probed damage in place of a
    fine-tune a step. Starts from all layers in INT8 where the space has it; that start, a baseline, is not returned.
    """
    start = INT8 if INT8 in space.bit_choices else space.bit_choices[0]
    policy = uniform(space.anatomy, width=1, bits=start)
    cost, walk = _cost(costs(policy)), [policy]
    while True:
        options = [
            (p, _cost(costs(p)), sensitivity.damage(p) - sensitivity.damage(policy)) for p in _cuts(space, policy)
        ]
        options = [option for option in options if option[1] < cost]
        if not options:
            break
        policy, cost, _ = max(options, key=lambda o: (cost - o[1]) / max(o[2], 1e-6))
        walk.append(policy)
    steps = walk[1:]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)) if steps else []
    return [steps[i] for i in chosen]


def _cost(pair: tuple[float, int]) -> float:
    """Time and size count alike, as ratios."""
    return math.log(pair[0]) + math.log(pair[1])


def _cuts(space: Space, policy: Policy) -> Sequence[Policy]:
    options: list[Policy] = []
    for group in space.anatomy.groups:
        cut = max(group.step, group.channels // 8) / group.channels
        least = space.step_range(group)[0] * group.step / group.channels
        ratio = policy.prune.get(group.name, 0.0) + cut
        if 1 - ratio >= least - 1e-9:
            options.append(replace(policy, prune={**policy.prune, group.name: ratio}))
    blocks = [b.name for b in space.anatomy.blocks if b.name not in policy.removed_blocks] if space.blocks else []
    options += [replace(policy, removed_blocks=(*policy.removed_blocks, name)) for name in blocks]
    changed = (canonical(option, space.anatomy) for option in options)
    return [option for option in changed if option != policy]
