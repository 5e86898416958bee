"""Who proposes the next policy: Optuna's samplers by name, and ours.

Latency and size of a policy cost nothing to know, only its accuracy does. So each proposal of the
``nightpress`` sampler looks at a few hundred policies, predicts all three, and takes the one with the largest
optimistic gain in hypervolume.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from ..spaces.policy import Policy, digest, policy_from_dict
from ..spaces.space import Space
from .pareto import hypervolume, losses, non_dominated
from .proposals import Costs, Sensitivity
from .records import TrialState

POOL = 160
LEAST_TRIALS = 6
OPTIMISM = 1.0
MOST_OBSERVATIONS = 200
Array = NDArray[np.float64]


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


def make_sampler(name: str, seed: int, trials: int, space: Space, costs: Costs) -> optuna.samplers.BaseSampler:
    """A sampler by its name in the config. ``trials`` (finished so far) moves the seed, because a resumed
    sampler with the same seed would repeat its draws."""
    with warnings.catch_warnings():
        # Optuna calls these interfaces experimental; the tests of this project hold them.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _sampler(name, seed + trials, space, costs)


def _sampler(name: str, seed: int, space: Space, costs: Costs) -> optuna.samplers.BaseSampler:
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=24)
    if name == "nsga3":
        return optuna.samplers.NSGAIIISampler(seed=seed, population_size=24)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=12)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return NightpressSampler(space, costs, seed)


@dataclass
class NightpressSampler(optuna.samplers.BaseSampler):
    """Proposes the policy with the largest optimistic hypervolume gain out of a pool of mutants and crosses.

    The accuracy surrogate is a Gaussian process over the choices, the additive damage of the sensitivity
    probes and the rung, so that cheap rungs teach it too.
    """

    space: Space
    costs: Costs
    seed: int
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    reference: tuple[float, float, float] | None = None
    """Losses (−accuracy, latency_ms, size_bytes) beyond which a policy is worth nothing."""

    def __post_init__(self) -> None:
        self._described = distributions(self.space)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._described

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:  # an enqueued policy: nothing to propose
            return {}
        generator = np.random.default_rng((self.seed, trial.number))
        policy = self._propose(_observations(study), generator)
        return {name: value for name, value in self.space.params(policy).items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return optuna.samplers.RandomSampler(seed=self.seed + trial.number).sample_independent(
            study, trial, param_name, param_distribution
        )

    def _propose(self, seen: "list[_Observation]", generator: np.random.Generator) -> Policy:
        full = [o for o in seen if o.complete]
        if len(full) < LEAST_TRIALS or self.reference is None:
            return self.space.random(generator)
        losses = np.array([o.losses for o in full])
        front = non_dominated(losses)
        parents = [full[i].policy for i in front]
        known = {digest(o.policy) for o in seen}
        pool = [p for p in self._pool(parents, generator) if digest(p) not in known]
        if not pool:
            return self.space.random(generator)
        costs = np.array([self.costs(p) for p in pool], dtype=np.float64)
        mean, spread = self._surrogate(seen, pool)
        optimistic = np.column_stack([-(mean + OPTIMISM * spread), costs])
        return pool[_best_gain(optimistic, losses[front], np.array(self.reference))]

    def _pool(self, parents: list[Policy], generator: np.random.Generator) -> list[Policy]:
        pool: dict[str, Policy] = {}
        names = list(self._described.items())
        for number in range(POOL):
            if number % 8 == 0:
                policy = self.space.random(generator)
            else:
                first, second = (self.space.params(parents[i]) for i in generator.integers(len(parents), size=2))
                mixed = {n: (second if generator.uniform() < 0.3 else first).get(n) for n, _ in names}
                for index in generator.choice(len(names), size=int(generator.integers(1, 4)), replace=False):
                    mixed[names[index][0]] = _mutate(mixed[names[index][0]], names[index][1], generator)
                policy = self.space.sample(_Fixed(mixed))
            pool[digest(policy)] = policy
        return list(pool.values())

    def _surrogate(self, seen: "list[_Observation]", pool: list[Policy]) -> tuple[Array, Array]:
        """Mean and standard deviation of the top rung's accuracy for each policy of the pool, shape (pool,)."""
        rows = seen[-MOST_OBSERVATIONS:]
        top = max(o.rung for o in rows)
        inputs = np.array([self._vector(o.policy, o.rung / max(top, 1)) for o in rows])
        best = max(o.accuracy for o in rows)
        # Collapsed networks are all equally useless: their depth must not bend the model where it matters.
        targets = np.maximum([o.accuracy for o in rows], best - 0.25)
        centre, width = inputs.mean(axis=0), inputs.std(axis=0)
        used = width > 1e-9
        kernel: Any = ConstantKernel(1.0) * RBF(np.sqrt(used.sum()), (0.3, 100.0)) + WhiteKernel(0.05, (1e-3, 1.0))
        model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is an answer too
            model.fit((inputs[:, used] - centre[used]) / width[used], targets)
        asked = np.array([self._vector(p, 1.0) for p in pool])
        mean, spread = cast(
            "tuple[Array, Array]",
            model.predict((asked[:, used] - centre[used]) / width[used], return_std=True),
        )
        return mean, spread

    def _vector(self, policy: Policy, rung: float) -> Array:
        params = self.space.params(policy)
        # The damage estimate and the rung matter more than any single choice: they get weight by repetition.
        damage = np.log1p(self.sensitivity.damage(policy))
        choices = [_number(params[name], described) for name, described in self._described.items()]
        return np.array([*choices, damage, damage, damage, rung, rung])


@dataclass(frozen=True, slots=True)
class _Observation:
    policy: Policy
    rung: int
    accuracy: float
    losses: tuple[float, float, float]
    complete: bool


def _observations(study: Study) -> list[_Observation]:
    """Every rung that every finished trial reached."""
    rungs = {"bn": 0, "short": 1}
    found: list[_Observation] = []
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        attrs = trial.user_attrs
        if "policy" not in attrs or trial.values is None:
            continue
        policy = policy_from_dict(attrs["policy"], f"trial {trial.number}")
        values = trial.values
        for quality in attrs.get("qualities", []):
            last = quality is attrs["qualities"][-1]
            found.append(
                _Observation(
                    policy=policy, rung=rungs.get(quality["rung"], 1), accuracy=quality["accuracy"],
                    losses=losses(quality["accuracy"], values[1], values[2]),
                    complete=last and attrs.get("state") == TrialState.COMPLETE,
                )
            )  # fmt: skip
    return found


def _best_gain(points: Array, front: Array, reference: Array) -> int:
    """The point that adds most to the front's hypervolume, scaled to the reference; ties to the first."""
    scale = np.abs(reference - np.minimum(front.min(axis=0), points.min(axis=0))) + 1e-12
    have, corner = front / scale, reference / scale
    base = hypervolume(have, corner)
    gains = [hypervolume(np.vstack([have, p / scale]), corner) - base for p in points]
    if max(gains) > 0:
        return int(np.argmax(gains))
    return int(np.argmin((points / scale).sum(axis=1)))


def _mutate(value: Any, distribution: BaseDistribution, generator: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(generator.integers(len(distribution.choices)))]
    if isinstance(distribution, IntDistribution):
        reach = max(1.0, 0.2 * (distribution.high - distribution.low))
        return int(np.clip(round(generator.normal(value, reach)), distribution.low, distribution.high))
    floats = cast("FloatDistribution", distribution)
    if floats.log:
        return float(np.clip(value * np.exp(generator.normal(0, 0.5)), floats.low, floats.high))
    return float(np.clip(generator.normal(value, 0.2 * (floats.high - floats.low)), floats.low, floats.high))


def _number(value: Any, distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices.index(value) / max(1, len(distribution.choices) - 1)
    if isinstance(distribution, FloatDistribution) and distribution.log:
        return float(np.log(value))
    return float(value)


@dataclass(frozen=True, slots=True)
class _Fixed:
    answers: Mapping[str, Any]

    def choice(self, name: str, values: Sequence[str]) -> str:
        return self.answers[name]

    def integer(self, name: str, low: int, high: int) -> int:
        return self.answers[name]

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self.answers[name]


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
