"""Policies that need no search: uniform baselines, sensitivity probes, and a greedy latency-per-damage walk."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..spaces.anatomy import Anatomy
from ..spaces.errors import InputError
from ..spaces.plans import choices_of
from ..spaces.policy import FP32, INT8, Distill, LayerBits, Policy, policy_from_json
from ..spaces.space import Space, bits_name, canonical, check_policy, uniform
from .costs import Costs, ManyCosts
from .records import UNCOMPRESSED

PROBE_RATIO = 0.5
GREEDY_WIDTHS = ("50%", "25%")
"""Uniform rules whose latency greedy ones have."""


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


def baselines(
    anatomy: Anatomy, distill: bool, scores: Mapping[str, Sequence[float]] | None = None, integers: LayerBits = INT8
) -> dict[str, Policy]:
    """The simple rules that a search must beat, by name. The uncompressed model is trained without distillation. INT8
    layers have the bits ``integers``, of whose weights the target may run 7 faster.

    ``scores`` are the channels' magnitudes by group, each group's with a mean of 1; without them there is no global
    magnitude among the rules.
    """
    plain = Policy(model=anatomy.digest, distill=Distill(method="none", alpha=0.0))
    like = Policy(model=anatomy.digest) if distill else plain
    rules = {
        UNCOMPRESSED: canonical(plain, anatomy),
        "uniform INT8": uniform(anatomy, width=1, bits=integers, like=like),
    }
    if not anatomy.groups:
        return rules
    for width in (0.75, 0.5, 0.25):
        rules[f"uniform {width:.0%} fp32"] = uniform(anatomy, width=width, bits=FP32, like=like)
        rules[f"uniform {width:.0%} INT8"] = uniform(anatomy, width=width, bits=integers, like=like)
    for width in (0.5, 0.25) if scores else ():
        rules[f"global magnitude {width:.0%} INT8"] = global_magnitude(anatomy, scores or {}, width, like, integers)
    return rules


def rule_count(space: Space) -> int:
    """How many rules a night trains, the greedy ones among them. Where the target runs INT8, those in fp32 are not
    counted, since their twins are nearly always better (see :func:`pointless`)."""
    scores = {group.name: [1.0] * group.channels for group in space.anatomy.groups}
    rules = baselines(space.anatomy, distill=True, scores=scores)
    twins = sum(name.endswith("fp32") for name in rules) if space.integers is not None else 0
    return len(rules) - twins + (len(GREEDY_WIDTHS) if scores else 0)


def global_magnitude(
    anatomy: Anatomy, scores: Mapping[str, Sequence[float]], width: float, like: Policy, integers: LayerBits = INT8
) -> Policy:
    """All layers in INT8; of all channels together the weakest go until the share ``width`` is left (Han et al. 2015,
    with channels for weights)."""
    everything = np.sort(np.concatenate([np.asarray(scores[g.name], dtype=np.float64) for g in anatomy.groups]))
    threshold = everything[min(len(everything) - 1, round((1 - width) * len(everything)))]
    ratios = {g.name: float(np.mean(np.asarray(scores[g.name]) < threshold)) for g in anatomy.groups}
    bits = {layer.name: integers for layer in anatomy.layers}
    return canonical(replace(like, prune={n: min(r, 0.999) for n, r in ratios.items()}, bits=bits), anatomy)


def pointless(rules: Mapping[str, Policy], costs: Costs) -> dict[str, str]:
    """Rules in fp32 whose twin in INT8 is faster and smaller, with the twin's name: equally wide and as accurate within
    the noise, so they would cost training and never stand on a front."""
    found: dict[str, str] = {}
    for name, policy in rules.items():
        twin = name.replace("fp32", "INT8")
        if twin != name and twin in rules:
            mine, its = costs(policy), costs(rules[twin])
            if its[0] < mine[0] and its[1] < mine[1]:
                found[name] = twin
    return found


def probes(space: Space) -> dict[tuple[str, str, str], Policy]:
    """One policy a choice, to measure its damage alone; keyed by (kind, name, choice)."""
    plain = Policy(model=space.anatomy.digest)
    found: dict[tuple[str, str, str], Policy] = {}
    for group in space.anatomy.groups:
        found["group", group.name, ""] = canonical(replace(plain, prune={group.name: PROBE_RATIO}), space.anatomy)
    for block in space.anatomy.blocks if space.blocks else ():
        found["block", block.name, ""] = canonical(replace(plain, removed_blocks=(block.name,)), space.anatomy)
    for pair in space.bit_choices:
        if pair.weights < 7:  # seven bits cost next to nothing: not worth a probe a layer
            for layer in space.anatomy.layers:
                found["bits", layer.name, bits_name(pair)] = replace(plain, bits={layer.name: pair})
    return found


def probed(told: Iterable[tuple[Sequence[str], float | None]]) -> dict[tuple[str, str, str], float]:
    """Damages by probe from a run's file, NaN where it has none."""
    return {(key[0], key[1], key[2]): math.nan if value is None else float(value) for key, value in told}


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


def greedy_walk(space: Space, sensitivity: Sensitivity, costs: ManyCosts, count: int) -> list[Policy]:
    """Policies along a walk that always takes the cut with the most time and size saved per damage.

    In the spirit of NetAdapt (Yang et al. 2018), with predicted costs and probed damage in place of a
    fine-tune a step. Starts from all layers in INT8 where the space has it; that start, a baseline, is not returned.
    """

    def price(policies: Sequence[Policy]) -> NDArray[np.float64]:
        """Time and size count alike, as ratios; shape (n,)."""
        return np.log(costs(choices_of(space.anatomy, policies))).sum(axis=1)

    start = space.integers or space.bit_choices[0]
    walk = [uniform(space.anatomy, width=1, bits=start)]
    [price_now] = price(walk)
    while cuts := _cuts(space, walk[-1]):
        prices, before = price(cuts), sensitivity.damage(walk[-1])
        harm = np.array([max(sensitivity.damage(cut) - before, 1e-6) for cut in cuts])
        gains = np.nan_to_num((price_now - prices) / harm, nan=-1.0)
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        walk.append(cuts[best])
        price_now = prices[best]
    return spread_out(walk[1:], count)


def spread_out(steps: Sequence[Policy], count: int) -> list[Policy]:
    """At most ``count`` of the steps, evenly."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)) if steps else []
    return [steps[i] for i in chosen]


def walk_seeds(steps: Sequence[Policy], count: int) -> list[Policy]:
    """Steps of a greedy walk to begin a search with, the harshest first: the rules have shown the gentle end, and a
    night too short for all of them should not end there."""
    return spread_out(steps, count)[::-1]


def own_policies(files: Sequence[str], space: Space) -> list[Policy]:
    """The user's own policies. Raises InputError when one is none, or one of another model or target."""
    found: list[Policy] = []
    for name in files:
        try:
            text = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"seeds: {name} cannot be read: {error}.") from None
        policy = _as_run(policy_from_json(text, f"seeds: {name}"), space)
        check_policy(policy, space.anatomy, space.bit_choices, f"seeds: {name}")
        found.append(canonical(policy, space.anatomy))
    return found


def _as_run(policy: Policy, space: Space) -> Policy:
    """Integers of eight bits as the target runs them."""
    if space.integers is None or INT8 in space.bit_choices:
        return policy
    bits = {name: space.integers if pair == INT8 else pair for name, pair in policy.bits.items()}
    return replace(policy, bits=bits)


def greedy_rules(walk: Sequence[Policy], rules: Mapping[str, Policy], costs: Costs) -> dict[str, Policy]:
    """The points of a greedy walk that are as fast as the uniform half and quarter width: rivals at equal speed."""
    found: dict[str, Policy] = {}
    for width in GREEDY_WIDTHS:
        like = rules.get(f"uniform {width} INT8")
        if like is None or not walk:
            continue
        wanted = math.log(costs(like)[0])
        nearest = min(walk, key=lambda policy: abs(math.log(costs(policy)[0]) - wanted))
        if nearest not in found.values():
            found[f"greedy {width}"] = nearest
    return found


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
