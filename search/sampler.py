"""Who proposes the next policy: Optuna's samplers by name, a greedy walk with measured steps, and ours.

Latency and size of a policy cost nothing to know, only its accuracy does. So each proposal of the ``nightpress``
sampler breeds up to 32,000 policies, prices them all, and takes the one with the largest expected gain in
hypervolume after the long fine-tune.
"""

import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from threadpoolctl import threadpool_limits

from ..spaces.policy import Policy, digest
from ..spaces.space import Space
from .batch import CANDIDATES, MOST, TOGETHER, Batch, Looked
from .breeding import PARENTS, breed, crowded, fresh, population
from .costs import ManyCosts, trial_effort
from .encoding import Encoder
from .experience import SHORT, Experience
from .gain import Target, expected_gain, front_of, target
from .memory import Memory
from .netadapt import NetAdaptSampler
from .policy_sampler import PolicySampler
from .proposals import Sensitivity
from .records import Rung
from .surrogate import RUNGS, Describer, Kernel, Surrogate

LEAST_TRIALS = 6
SCREENED = 250
"""Of a generation: those whose uncertainty is looked at."""
REFIT = 1.15
"""The kernel is looked for again when there are so many times more observations."""
LEAST_FRONT = 12
"""So many parents there must be; a front of fewer is joined by all that was tried."""
UNPRICED = -1.0
"""Worth of a policy whose costs cannot be said."""
Array = NDArray[np.float64]


def make_sampler(name: str, seed: int, trials: int, space: Space, costs: ManyCosts) -> optuna.samplers.BaseSampler:
    """A sampler by its name in the config. ``trials`` (begun so far) moves the seed, because a resumed sampler with the
    same seed would repeat its draws. Both are mixed: by their sum the draws of one seed would be those of the next one,
    a trial later, and Optuna takes no seed of more than 32 bits."""
    with warnings.catch_warnings():
        # Optuna calls these interfaces experimental; the tests of this project hold them.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        mixed = int(np.random.SeedSequence((seed, trials)).generate_state(1)[0])
        return _sampler(name, mixed, space, costs)


def _sampler(name: str, seed: int, space: Space, costs: ManyCosts) -> optuna.samplers.BaseSampler:
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=24)
    if name == "nsga3":
        return optuna.samplers.NSGAIIISampler(seed=seed, population_size=24)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=12)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=12)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "netadapt":
        return NetAdaptSampler(space, costs, seed)
    return NightpressSampler(space, costs, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an ablation leaves out, one at a time.

    ``free_objectives``: latency and size are taken from what was tried, not predicted for each candidate.
    ``rungs``: cheap rungs teach nothing. ``sensitivity``: the damages of the probes are not known.
    """

    free_objectives: bool = True
    rungs: bool = True
    sensitivity: bool = True


@dataclass
class NightpressSampler(PolicySampler):
    """Proposes the policy with the largest expected hypervolume gain out of a population bred for it.

    Policies that are being evaluated count as if they had come out as expected, so workers in parallel get
    different ones. Where several are wanted at once, they come from one population (:mod:`~nightpress.search.batch`),
    until it is used up or as many results have come as it was meant for.
    """

    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    reference: tuple[float, float, float] | None = None
    """Losses (−accuracy, latency_ms, size_bytes) beyond which a policy is worth nothing."""
    reference_long: tuple[float, float, float] | None = None
    """The same of accuracies after the long fine-tune, where it differs."""
    most_macs: float = np.inf
    """Share of the uncompressed model's multiply-accumulates above which a policy is worth nothing."""
    options: Options = field(default_factory=Options)
    memory: Memory | None = None
    """Where a proposal leaves what the next one builds on; None keeps it in this process alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder = Encoder(self.space)
        self.experience = Experience(self.encoder)
        self._fitted: tuple[int, Any] | None = None
        self._survivors: Array | None = None
        self._spread = 0.2
        self._recalled = False
        self._batch: Batch | None = None
        self._news = 0  # results since the batch was made

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:  # fmt: skip
        self._news += 1

    def propose(self, study: Study, number: int) -> Policy:
        if (policy := self._from_batch()) is not None:
            return policy
        generator = np.random.default_rng((self.seed, number))
        self.experience.read(study)
        self._recall(number)
        with threadpool_limits(limits=1, user_api="blas"):  # small matrices: threads would only wait for each other
            policy = self._propose(generator)
        if self.memory is not None:
            self.memory.keep(number, self._remembered())
        return policy

    def _propose(self, generator: np.random.Generator) -> Policy:
        known = self.experience
        if len(known.rows) < LEAST_TRIALS or self.reference is None or not known.observations(cheap=self.options.rungs):
            return self.space.random(generator)
        surrogate = self.surrogate()
        long = self.reference_long if RUNGS[surrogate.rung] == Rung.LONG else None
        aim, best_known = self._aim(surrogate, long or self.reference)
        looked = Looked(lambda rows: self._worth(rows, surrogate, aim))
        best = next(fresh(self.encoder, self._bred(looked, best_known, generator), known.digests), None)
        if best is None:
            return self.space.random(generator)
        if self.wanted >= TOGETHER:
            rows = looked.best(CANDIDATES)
            self._keep_batch(rows[self._allowed(surrogate.describer.macs(rows))], best, surrogate, aim)
        return best[1]

    def _keep_batch(self, rows: Array, best: tuple[Array, Policy], surrogate: Surrogate, aim: Target) -> None:
        """Keep a population for the proposals that are wanted beside its best."""
        self._news, known = 0, self.experience
        self._batch = Batch(
            self.encoder, surrogate, aim, min(SHORT, surrogate.rung), rows=rows, costs=self._costs(rows),
            taken=(best[0], self._costs(best[0][None])[0]), pending=known.pending,
            known={*known.digests, digest(best[1])}, most=min(self.wanted, MOST) - 1,
        )  # fmt: skip

    def _from_batch(self) -> Policy | None:
        if self._batch is None or self._news > self._batch.size:
            return None
        with threadpool_limits(limits=1, user_api="blas"):
            return self._batch.take()

    def _remembered(self) -> dict[str, Array]:
        found = {"spread": np.array(self._spread)}
        if self._fitted is not None:
            found["fitted"] = np.array([self._fitted[0], *astuple(self._fitted[1])])
        if self._survivors is not None:
            found["survivors"] = self._survivors
        return found

    def _recall(self, number: int) -> None:
        """Once a process: what the driver before remembered."""
        if self._recalled or self.memory is None:
            return
        self._recalled = True
        known = self.memory.before(number)
        if known is None:
            return
        self._spread = float(known["spread"])
        if "fitted" in known:
            count, *kernel = known["fitted"].tolist()
            if len(kernel) == len(fields(Kernel)):  # else another version's
                self._fitted = int(count), Kernel(*kernel)
        self._survivors = known.get("survivors")

    def surrogate(self) -> Surrogate:
        """Fitted to all that is known; its kernel is looked for again only now and then."""
        sensitivity = self.sensitivity if self.options.sensitivity else Sensitivity()
        observations = self.experience.observations(cheap=self.options.rungs)
        kernel = None
        if self._fitted is not None and len(observations) < self._fitted[0] * REFIT:
            kernel = self._fitted[1]
        found = Surrogate(Describer(self.encoder, sensitivity), observations, kernel)
        if kernel is None:
            self._fitted = len(observations), found.kernel
        return found

    def _aim(self, surrogate: Surrogate, reference: tuple[float, float, float]) -> tuple[Target, Array]:
        """What is to be beaten, each known policy at the accuracy that it will probably have in the end; and the
        rows of those policies that stand on that front, or of all while they are few.

        The uncompressed network is among them, and hardly anything will be more accurate than the best of them.
        Without that bound, hopes above the top pay best of all, since they are multiplied by whatever latency and
        size a policy saves: trials would go to large networks that the noise flatters.
        """
        rows, corner = self.experience.rows, np.array([-reference[0], *reference[1:]])
        allowed = self._allowed(surrogate.describer.macs(rows))
        expected = surrogate.scale.down(surrogate.mean(rows))
        points = np.column_stack([expected, self.experience.costs])
        front = np.flatnonzero(allowed)[front_of(points[allowed], corner)]
        parents = rows[front] if len(front) >= LEAST_FRONT else rows
        # Where nothing known is in the box, that bound would leave no hope to anything.
        top = float(expected.max()) if expected.max() > corner[0] else np.inf
        return target(points[front], corner, top=top), parents

    def _bred(self, worth: Looked, best: Array, generator: np.random.Generator) -> Array:
        """A population after some generations, the most promising first."""
        parents = np.vstack([best, self._survivors]) if self._survivors is not None else best
        found = breed(self.encoder, parents, worth, generator, population(len(self.encoder.columns)))
        self._survivors = found[:PARENTS]
        return found

    def _worth(self, rows: Array, surrogate: Surrogate, aim: Target) -> Array:
        """Of the rows that the mean alone makes the best, what they are worth; the rest come after them.

        The mean does not know what has been found out already: fine-tunes of one good network would fill those that
        are looked at and soon the whole population, although none is worth another trial. So few of each are looked at.
        """
        costs = self._costs(rows)
        mean = surrogate.mean(rows)
        rough = self._by_effort(rows, costs, (mean, np.full(len(rows), self._spread)), surrogate, aim.rough())
        order = np.argsort(-rough, kind="stable")
        networks = self.encoder.networks(np.vstack([self.experience.rows, rows]))
        known, new = networks[: -len(rows)], networks[-len(rows) :]
        tried = np.bincount(known, minlength=int(networks.max()) + 1)[new]
        crowd = crowded(new[order], tried=tried[order])
        best = np.concatenate([order[~crowd], order[crowd]])[:SCREENED]
        worth = rough - 1e3
        hoped = surrogate.hoped(rows[best], min(SHORT, surrogate.rung))
        self._spread = float(np.median(hoped[1]))
        worth[best] = self._by_effort(rows[best], costs[best], hoped, surrogate, aim)
        return worth

    def _by_effort(
        self, rows: Array, costs: Array, hoped: tuple[Array, Array], surrogate: Surrogate, aim: Target
    ) -> Array:  # fmt: skip
        """Expected gain by the cost of the trial, which is a fixed part and a part that goes with the work; where
        nothing can gain, the nearness to the box counts instead. ``hoped``: mean and standard deviation of u."""
        gains = expected_gain(*hoped, surrogate.scale, costs, aim)
        macs = surrogate.describer.macs(rows)
        likely = surrogate.scale.down(hoped[0] + hoped[1])
        short = np.maximum(aim.corner[0] - likely, 0) / max(abs(float(aim.corner[0])), 1e-9)
        beyond = np.maximum(costs / aim.corner[1:] - 1, 0).sum(axis=1) + short
        beyond += np.maximum(macs / self.most_macs - 1, 0)
        found = np.where((gains > 1e-12) & self._allowed(macs), gains / trial_effort(macs), -1e-6 * (1 + beyond))
        return np.where(np.isnan(costs).any(axis=1), UNPRICED, found)

    def _allowed(self, macs: Array) -> NDArray[np.bool_]:
        """Of shares of the uncompressed model's multiply-accumulates, shape (n,), which are within the limit; a part in
        a million is for the sums' rounding."""
        return macs <= self.most_macs * (1 + 1e-6)

    def _costs(self, rows: Array) -> Array:
        free = self.options.free_objectives
        return self.costs(self.encoder.choices(rows)) if free else self.experience.nearest_costs(rows)
