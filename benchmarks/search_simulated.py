"""Samplers on made-up accuracies over a real space with a real latency profile: minutes instead of nights.

    nightpress calibrate mnist5k-resnet --target onnxruntime --out profile.json
    python benchmarks/search_simulated.py --profile profile.json --seeds 3 --trials 40
    python benchmarks/search_simulated.py --profile profile.json --truth bottleneck --samplers nightpress,tpe

All samplers know the rules, as in a night; ours begins with the greedy walk, whose trials take their time too.

What it can show: whether a sampler finds the front of a truth under the noise of a small search split. What it cannot:
how real networks behave; for that see benchmarks/search.py. Regret is the hypervolume (true long accuracy, predicted
latency, size) that a night's trials lack against the best front that an optimiser finds which sees the truth; in angle
brackets, how many times slower the fastest trial that truly keeps its accuracy is than the fastest there is.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.profile import Profile
from nightpress.evaluators.latency.profile_file import load_profile
from nightpress.evaluators.task import load_task
from nightpress.search.config import RunConfig, SpaceConfig
from nightpress.search.costs import trial_effort
from nightpress.search.encoding import Encoder
from nightpress.search.night import SEEDS, WALK
from nightpress.search.pareto import MAX_DROP, hypervolume, non_dominated
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.prepare import space_of
from nightpress.search.proposals import Sensitivity, baselines, greedy_walk, sensitivity_of, walk_seeds
from nightpress.search.records import Quality, TrialState
from nightpress.search.sampler import NightpressSampler, Options, make_sampler
from nightpress.search.store import Store, open_storage, policy_of
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import Policy, policy_from_dict, policy_to_dict
from nightpress.spaces.space import LEARNING_RATE, Space

SEARCH_ITEMS, BN_ITEMS = 800, 400
ABLATIONS = ("free_objectives", "rungs", "sensitivity")
IMPORTANCES = ("l2", "l1", "bn", "taylor")
TRUTHS = ("widths", "quadratic", "bottleneck")
Array = NDArray[np.float64]


class World:
    """A truth, by its name; all else about it is drawn from the seed. Each group and block has a need of its own:

    - ``widths``: narrow groups need most, all blocks alike; integers cost nothing, and harsh networks stay accurate;
    - ``quadratic``: needs add up by squared ratios, blocks differ, each layer in integers costs a little;
    - ``bottleneck``: the narrowest group and the work that is left decide, and harsh networks break down.

    A fine-tune away from its best settings costs, and in the last two truths so does another ranking of the channels
    than the best. Harsh policies lose most before the fine-tune and gain most by it. A trial takes time in proportion
    to the work that is left, beside a fixed part.
    """

    def __init__(self, space: Space, profile: Profile, truth: str, seed: int) -> None:
        self.space, self.profile, self.encoder, self.truth_name = space, profile, Encoder(space), truth
        rng = np.random.default_rng((TRUTHS.index(truth), seed))
        anatomy = space.anatomy
        self._group = {g.name: float(w) for g, w in zip(anatomy.groups, rng.uniform(0.3, 3, 999), strict=False)}
        blocks = np.full(999, 6.0) if truth == "widths" else rng.lognormal(1.2, 0.7, 999)
        self._block = {b.name: float(w) for b, w in zip(anatomy.blocks, blocks, strict=False)}
        integers = rng.uniform(0, 0.3, 999) * (truth == "quadratic")
        self._integer = {n.name: float(w) for n, w in zip(anatomy.layers, integers, strict=False)}
        self._rate = rng.uniform(*np.log(np.array(LEARNING_RATE) * [2, 0.7]))
        self._alpha, self._inner = rng.uniform(0.2, 0.9), rng.uniform(-0.2, 0.6)
        ranking = rng.lognormal(0, 0.2, len(IMPORTANCES)) if truth != "widths" else np.ones(len(IMPORTANCES))
        self._ranking: dict[str, float] = dict(zip(IMPORTANCES, ranking / ranking.min(), strict=True))
        self._errors = rng.normal(size=999)
        self._macs = plan(anatomy, Policy(model=anatomy.digest)).macs
        self.corner = np.array([-0.8975, profile.reference_ms, float(4 * anatomy.params)])

    def costs(self, policy: Policy) -> tuple[float, int]:
        planned = plan(self.space.anatomy, policy)
        return float(self.profile.predict([policy])[0, 0]), self.profile.predict_size(planned)

    def need(self, policy: Policy) -> float:
        """How much a policy takes away, before any fine-tune."""
        ratios = {name: policy.prune.get(name, 0.0) for name in self._group}
        removed = sum(self._block[name] for name in policy.removed_blocks)
        if self.truth_name == "quadratic":
            integers = sum(self._integer[name] for name, pair in policy.bits.items() if pair.int8)
            return sum(6 * w * ratios[name] ** 2 for name, w in self._group.items()) + removed + integers
        narrow = {name: w * (1 / max(1 - ratios[name], 0.02) - 1) for name, w in self._group.items()}
        if self.truth_name == "widths":
            return sum(narrow.values()) + removed
        left = plan(self.space.anatomy, policy).macs / self._macs
        return 2 * max(narrow.values()) + 0.3 * sum(narrow.values()) + 3 * np.log(1 / left) + removed

    def truth(self, policy: Policy) -> dict[str, float]:
        need = self.need(policy)
        rate = np.log(policy.finetune.learning_rate) - self._rate
        alpha = policy.distill.alpha if policy.distill.logit else 0.0
        tuned = 0.25 * rate**2 + 0.5 * (alpha - self._alpha) ** 2 + (self._inner if policy.distill.inner else 0.0)
        hard = need * (1 + 0.3 * tuned) * self._ranking[policy.importance]
        bent = 0.0 if self.truth_name == "widths" else hard**2 / 40
        found = {
            "bn": 0.99 - 0.85 * (1 - np.exp(-need / 6)),
            "short": 0.992 - 0.0015 * (hard + bent) - 0.004 * tuned,
            "long": 0.9925 - 0.0006 * (hard + bent) - 0.002 * tuned,
        }
        return {rung: float(np.clip(value, 0.1, 0.999)) for rung, value in found.items()}

    def time(self, policy: Policy) -> float:
        """Of a trial, with that of the uncompressed network as the unit."""
        return trial_effort(plan(self.space.anatomy, policy).macs / self._macs)

    def sensitivity(self) -> Sensitivity:
        """What probes would show: the needs alone, with an error of about a half."""
        plain, error = Policy(model=self.space.anatomy.digest), iter(np.exp(0.5 * self._errors))
        groups = {("group", n, ""): self.need(Policy(model=plain.model, prune={n: 0.5})) for n in self._group}
        blocks = {("block", n, ""): self.need(Policy(model=plain.model, removed_blocks=(n,))) for n in self._block}
        return sensitivity_of({key: 0.1 * value * next(error) for key, value in (groups | blocks).items()})

    def losses(self, policies: list[Policy]) -> Array:
        """Shape (n, 3): −true long accuracy, latency in ms, size in bytes."""
        rows = np.stack([self.encoder.row(policy) for policy in policies])
        costs = self.profile.costs(self.encoder.choices(rows))
        return np.column_stack([[-self.truth(policy)["long"] for policy in policies], costs])

    def covered(self, points: Array) -> float:
        scaled = (points - np.array([-1.0, 0, 0])) / (self.corner - np.array([-1.0, 0, 0]))
        return hypervolume(scaled, np.ones(3))

    def pick_ms(self, points: Array) -> float:
        """Latency of the fastest that is truly within a point of the uncompressed network's accuracy."""
        least = self.truth(Policy(model=self.space.anatomy.digest))["long"] - MAX_DROP
        return float(points[-points[:, 0] >= least, 1].min())

    def best(self, generations: int = 10, size: int = 600) -> Array:
        """Losses of a front found by crossing and mutation with the truth in sight, shape (n, 3)."""
        rng = np.random.default_rng(0)
        pool = [self.encoder.policy(row) for row in self.encoder.random(2 * size, rng)]
        losses = self.losses(pool)
        for _ in range(generations):
            kept = non_dominated(losses)
            rows = np.stack([self.encoder.row(pool[i]) for i in kept])
            born = [self.encoder.policy(row) for row in self.encoder.children(rows, size, rng)]
            pool, losses = [pool[i] for i in kept] + born, np.vstack([losses[kept], self.losses(born)])
        return losses[non_dominated(losses)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mnist5k-resnet")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--truth", default=",".join(TRUTHS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--samplers", default="nightpress,random,nsga2,tpe,netadapt," + ",".join(ABLATIONS))
    arguments = parser.parse_args()
    from nightpress.cli.config import read_target

    target = read_target(arguments.profile)
    anatomy, _ = inspect(load_task(arguments.task, None), step_of=target.channel_step)
    offered = SpaceConfig(importance=IMPORTANCES)
    config = RunConfig(task=arguments.task, base=None, out=Path("unused"), target=target, space=offered)
    space, profile = space_of(anatomy, config), load_profile(arguments.profile, anatomy, force=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(f"regret after a quarter, half and all of the time of {arguments.trials} random trials, rules known "
          f"to all: median over seeds {[*seeds]}, then each; in brackets the trials of that time")  # fmt: skip
    for truth in arguments.truth.split(","):
        worlds = [World(space, profile, truth, seed) for seed in seeds]
        fronts = [world.best() for world in worlds]
        ceilings = [world.covered(front) for world, front in zip(worlds, fronts, strict=True)]
        fastest = [world.pick_ms(front) for world, front in zip(worlds, fronts, strict=True)]
        print(f"{truth}: best front known {' '.join(f'{c:.4f}' for c in ceilings)}", flush=True)
        for name in arguments.samplers.split(","):
            nights = [night(world, name, seed, arguments.trials) for seed, world in zip(seeds, worlds, strict=True)]
            found = [
                [ceiling - value for value in values] for (values, *_), ceiling in zip(nights, ceilings, strict=True)
            ]
            middle = " ".join(f"{statistics.median(column):.4f}" for column in zip(*found, strict=True))
            rest = "; ".join(" ".join(f"{v:.4f}" for v in values) for values in found)
            counts = " ".join(str(count) for *_, count in nights)
            slower = " ".join(f"{ms / best:.2f}" for (_, ms, _), best in zip(nights, fastest, strict=True))
            print(
                f"{('without ' if name in ABLATIONS else '') + name:24} {middle}   ({rest}) [{counts}] <{slower}>",
                flush=True,
            )


def night(world: World, name: str, seed: int, trials: int) -> tuple[list[float], float, int]:
    """Hypervolume of the true long accuracies of all that was tried, after each part of the time; the latency of the
    pick at the end; the proposals."""
    space, rng = world.space, np.random.default_rng(seed)
    random = world.encoder.random(200, np.random.default_rng(1))
    total = trials * float(np.mean([world.time(world.encoder.policy(row)) for row in random]))
    with tempfile.TemporaryDirectory() as folder:
        sampler = make_sampler("nightpress" if name in ABLATIONS else name, seed, 0, space, world.profile.costs)
        steps: list[Policy] = []
        if isinstance(sampler, NightpressSampler):
            if name != "sensitivity":  # the walk is built from the probes, and would bring them back
                steps = greedy_walk(space, world.sensitivity(), world.profile.costs, WALK)
            sampler.sensitivity = world.sensitivity()
            sampler.reference = (world.corner[0], world.corner[1], world.corner[2])
            sampler.options = Options(**({name: False} if name in ABLATIONS else {}))
        store = Store(open_storage(Path(folder), None), sampler)
        rules = list(baselines(space.anatomy, True).values())
        for policy in [*rules, *walk_seeds(steps, SEEDS)]:
            params = space.params(policy) if space.contains(policy) else {}
            store.enqueue(params, "seed", None, policy_to_dict(policy))
        begun = len(rules)
        for _ in rules:
            _trial(world, store, rng, long=True)
        spent = [0.0]
        while spent[-1] < total:
            spent.append(spent[-1] + world.time(_trial(world, store, rng, long=False)))
        tried = world.losses([policy_of(trial) for trial in store.trials()])
        counts = [sum(at <= share * total for at in spent[1:]) for share in (0.25, 0.5, 1.0)]
        tried = tried[: begun + counts[-1]]
        return [world.covered(tried[: begun + count]) for count in counts], world.pick_ms(tried), counts[-1]


def _trial(world: World, store: Store, rng: np.random.Generator, *, long: bool) -> Policy:
    trial = store.ask()
    given = trial.user_attrs.get("given")
    asked = world.space.sample(TrialSuggest(trial))
    policy = policy_from_dict(given, "given") if given else asked
    latency, size = world.costs(policy)
    truth = world.truth(policy)
    store.begin(trial, policy, 0.0)
    known = {"latency_ms": latency, "low_ms": latency, "high_ms": latency, "measured": False}
    store.note(trial.number, size_bytes=size, predicted=known)
    for rung, items in (("bn", BN_ITEMS), ("short", SEARCH_ITEMS)):
        store.note_quality(trial.number, _seen(rung, truth[rung], items, rng))
    store.finish(trial.number, TrialState.COMPLETE, finished=1.0)
    if long:
        store.note_long(trial.number, _seen("long", truth["long"], SEARCH_ITEMS, rng))
    return policy


def _seen(rung: str, accuracy: float, items: int, rng: np.random.Generator) -> Quality:
    """The accuracy as so many examples show it."""
    found = rng.binomial(items, accuracy) / items
    error = float(np.sqrt(max(found * (1 - found), 1 / items) / items))
    return Quality(rung=rung, split="search", accuracy=found, accuracy_se=error, samples=items, seconds=1.0)


if __name__ == "__main__":
    main()
