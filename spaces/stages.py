"""Staged pruning: a little is cut, the network trains, and then more is cut (Molchanov et al. 2017 prune so)."""

import math
from collections.abc import Mapping
from dataclasses import replace

from .anatomy import Anatomy, Group, kept_channels
from .policy import Policy

FIRST_RATIO = 0.3
STEP_RATIO = 0.1


def stage_policies(policy: Policy, anatomy: Anatomy) -> tuple[Policy, ...]:
    """What the network is after each stage of its pruning; the last is the policy itself.

    No ratio passes 30 % in the first stage, and each further stage allows 10 points more: or, where
    ``finetune.stages`` is too few for that, so many more that the last one arrives. Channels are cut in
    whole steps, so a group may wait for a later stage but never runs ahead. Stages that cut nothing fall out.
    """
    count = policy.finetune.stages
    harshest = harshest_ratio(policy)
    if count == 1 or harshest <= FIRST_RATIO:
        return (policy,)
    step = max(STEP_RATIO, (harshest - FIRST_RATIO) / (count - 1))
    limits = (FIRST_RATIO + step * k for k in range(count - 1))
    stages = [_limited(policy, anatomy, limit) for limit in limits if limit < harshest]
    stages = [s for s in (*stages, policy) if s.prune or s.sparsity or s is policy]
    return tuple(s for s, after in zip(stages, (*stages[1:], None), strict=True) if after is None or _cuts(s, after))


def useful_stages(policy: Policy) -> int:
    """How many of the policy's stages there is something to cut in; more would change nothing."""
    rest = harshest_ratio(policy) - FIRST_RATIO
    return min(policy.finetune.stages, 1 + max(0, math.ceil(round(rest / STEP_RATIO, 6))))


def harshest_ratio(policy: Policy) -> float:
    """The largest share that any group's channels or any layer's weights lose."""
    return max((*policy.prune.values(), *policy.sparsity.values()), default=0.0)


def _cuts(before: Policy, after: Policy) -> bool:
    return (before.prune, before.sparsity) != (after.prune, after.sparsity)


def _limited(policy: Policy, anatomy: Anatomy, limit: float) -> Policy:
    groups = {group.name: group for group in anatomy.groups}
    prune = {name: _ratio_within(groups[name], ratio, limit) for name, ratio in policy.prune.items()}
    return replace(
        policy, prune=_positive(prune), sparsity=_positive({n: min(r, limit) for n, r in policy.sparsity.items()})
    )


def _ratio_within(group: Group, ratio: float, limit: float) -> float:
    """The largest ratio of whole steps that passes neither the limit nor the policy's own ratio."""
    least = math.ceil(round(group.channels * (1 - limit) / group.step, 6)) * group.step
    kept = min(group.channels, max(least, kept_channels(group, ratio)))
    return round(1 - kept / group.channels, 6)


def _positive(ratios: Mapping[str, float]) -> dict[str, float]:
    return {name: round(ratio, 6) for name, ratio in ratios.items() if ratio > 0}
