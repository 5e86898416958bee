"""A sampler of Optuna's that proposes whole policies, and how a space looks to Optuna."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from ..spaces.policy import Policy
from ..spaces.space import Space
from .costs import ManyCosts


@dataclass
class PolicySampler(optuna.samplers.BaseSampler):
    """Answers all of a trial's questions by the policy that :meth:`propose` gives; an enqueued one needs none."""

    space: Space
    costs: ManyCosts
    seed: int

    def __post_init__(self) -> None:
        self.wanted = 1  # proposals at once, the next one included
        self._described = distributions(self.space)

    @abstractmethod
    def propose(self, study: Study, number: int) -> Policy:
        """The policy of the trial of this number."""

    def proposed(self, study: Study, number: int, attrs: Mapping[str, Any], wanted: int = 1) -> FrozenTrial:
        """A running trial with the proposal's answers and these user attributes, to be created as it is: one entry of
        the record in place of one a parameter. ``wanted`` is how many will be asked for at once, this one included."""
        self.wanted = wanted
        params = self.space.params(self.propose(study, number))
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, params={name: params[name] for name in self._described},
            distributions=self._described, user_attrs=dict(attrs),
        )  # fmt: skip

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._described

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:  # an enqueued policy: nothing to propose
            return {}
        policy = self.propose(study, trial.number)
        return {name: value for name, value in self.space.params(policy).items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return optuna.samplers.RandomSampler(seed=self.seed + trial.number).sample_independent(
            study, trial, param_name, param_distribution
        )


@dataclass(frozen=True, slots=True)
class TrialSuggest:
    """An Optuna trial as the space's :class:`~nightpress.spaces.space.Suggest`."""

    trial: Trial

    def choice(self, name: str, values: Sequence[str]) -> str:
        return self.trial.suggest_categorical(name, list(values))

    def integer(self, name: str, low: int, high: int) -> int:
        return self.trial.suggest_int(name, low, high)

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self.trial.suggest_float(name, low, high, log=log)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's description of the space."""
    recorder = _Recorder()
    space.sample(recorder)
    return recorder.found


@dataclass(slots=True)
class _Recorder:
    found: dict[str, BaseDistribution] = field(default_factory=dict[str, BaseDistribution])

    def choice(self, name: str, values: Sequence[str]) -> str:
        self.found[name] = CategoricalDistribution(list(values))
        return values[0]

    def integer(self, name: str, low: int, high: int) -> int:
        self.found[name] = IntDistribution(low, high)
        return low

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.found[name] = FloatDistribution(low, high, log=log)
        return low
