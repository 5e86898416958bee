"""The greedy rival: NetAdapt (Yang et al. 2018) as an Optuna sampler, each step judged by a real fine-tune."""

from dataclasses import dataclass, replace

import numpy as np
from optuna.study import Study

from ..spaces.plans import choices_of
from ..spaces.policy import Policy, digest
from ..spaces.space import canonical, uniform
from .policy_sampler import PolicySampler

STEP = 0.12
"""Share of the latency that one step saves (the paper begins with 0.05; a night has fewer trials)."""


@dataclass
class NetAdaptSampler(PolicySampler):
    """Each round tries, for every group, the smallest cut that saves the round's latency, and every removable block;
    the most accurate of them is where the next round begins. All of it follows from the study's trials, so a resumed
    run goes on where it was."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rounds: dict[str, list[Policy]] = {}

    def propose(self, study: Study, number: int) -> Policy:
        return self._next(study, number) or self.space.random(np.random.default_rng((self.seed, number)))

    def _next(self, study: Study, number: int) -> Policy | None:
        """The next policy of the current round; None when no group can be cut further, or while the last ones of a
        round are still with other workers."""
        tried = {t.user_attrs["digest"]: t for t in study.get_trials(deepcopy=False) if "digest" in t.user_attrs}

        def accuracy(cut: Policy) -> float:
            qualities = tried[digest(cut)].user_attrs.get("qualities", [])
            return max((q["accuracy"] for q in qualities[-1:]), default=-np.inf)

        bits = self.space.integers or self.space.bit_choices[0]
        policy = uniform(self.space.anatomy, width=1, bits=bits)
        while cuts := self.cuts(policy):
            untried = next((cut for cut in cuts if digest(cut) not in tried), None)
            if untried is not None:
                return untried
            begun = [tried[digest(cut)] for cut in cuts]
            # Who waits tries random policies, but not for ever: another driver may have died with one of the round.
            if not all(t.state.is_finished() for t in begun) and number - max(t.number for t in begun) <= len(cuts):
                return None
            policy = max(cuts, key=accuracy)
        return None

    def cuts(self, policy: Policy) -> list[Policy]:
        """The steps of a round from a policy, one for each group and block that it may cut: those that save the round's
        latency, or, where none does, all."""
        key = digest(policy)
        if key not in self._rounds:
            wanted = (1 - STEP) * self._latency_ms(policy)
            found = [self._cut(policy, group.name, wanted) for group in self.space.anatomy.groups]
            blocks = [b.name for b in self.space.anatomy.blocks if b.name not in policy.removed_blocks]
            for name in blocks if self.space.blocks else ():
                less = replace(policy, removed_blocks=(*policy.removed_blocks, name))
                found.append(canonical(less, self.space.anatomy))
            cuts = [cut for cut in found if cut is not None and cut != policy]
            # The most accurate cut wins, and that is the one that saves least: they must all save what was asked for.
            reaching = [cut for cut in cuts if self._latency_ms(cut) <= wanted]
            self._rounds[key] = reaching or cuts
        return self._rounds[key]

    def _cut(self, policy: Policy, name: str, wanted_ms: float) -> Policy | None:
        """The least pruning of one group that brings the latency down to what is wanted; the most there is, where that
        does not; None where it is cut to its end already."""
        group, answers = self.space.anatomy.group(name), self.space.params(policy)
        now, least = int(answers[f"keep:{name}"]), self.space.step_range(group)[0]
        cut = None
        for steps in range(now - 1, least - 1, -1):
            ratio = 1 - steps * group.step / group.channels
            cut = canonical(replace(policy, prune={**policy.prune, name: ratio}), self.space.anatomy)
            if self._latency_ms(cut) <= wanted_ms:
                break
        return cut

    def _latency_ms(self, policy: Policy) -> float:
        return float(self.costs(choices_of(self.space.anatomy, [policy]))[0, 0])
