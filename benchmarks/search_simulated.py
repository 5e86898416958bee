"""Samplers on made-up accuracies over a real space with a real latency profile: minutes instead of nights.

    nightpress calibrate mnist5k-resnet --target onnxruntime --out profile.json
    python benchmarks/search_simulated.py --profile profile.json --seeds 3 --trials 40
    python benchmarks/search_simulated.py --profile profile.json --truth bottleneck --samplers nightpress,tpe
    python benchmarks/search_simulated.py --profile profile.json --truth widths --samplers nightpress --pausing

What it can show: whether a sampler finds the front of a truth under the noise of a small search split. What it cannot:
how real networks behave; for that see benchmarks/search.py. Regret is the hypervolume (true long accuracy, predicted
latency, size) that a night's trials lack against the best front that an optimiser finds which sees the truth. Each
trial goes to the top at once; with ``--pausing`` they go through their rungs as those of a night do, with pauses and
stops, and only those count that came to the top.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from nightpress.evaluators.evaluate import Job, Outcome
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.profile import Profile, load_profile
from nightpress.evaluators.quality import Score
from nightpress.evaluators.task import load_task
from nightpress.search.clock import Clock, Times
from nightpress.search.config import RunConfig, SearchConfig, SpaceConfig
from nightpress.search.costs import trial_effort
from nightpress.search.encoding import Encoder
from nightpress.search.folder import RunFolder
from nightpress.search.jobs import Jobs
from nightpress.search.night import MOST_WAITING
from nightpress.search.pareto import hypervolume, non_dominated
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.prepare import space_of
from nightpress.search.proposals import Sensitivity, baselines, greedy_walk, sensitivity_of
from nightpress.search.records import Quality, TrialState
from nightpress.search.sampler import NightpressSampler, Options, make_sampler
from nightpress.search.session import Prepared, Session
from nightpress.search.store import Store, open_storage, policy_of
from nightpress.search.study import BEGIN_STEPS, first_steps, look_steps
from nightpress.search.trials import Trials, enqueue
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import Policy, policy_from_dict, policy_to_dict
from nightpress.spaces.space import LEARNING_RATE, Space

SEARCH_ITEMS, BN_ITEMS = 800, 400
TRAIN_ITEMS, BATCH = 3200, 64
PART_STEPS, SHORT_STEPS = 10, 40
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

    def mean_time(self) -> float:
        """Of random policies."""
        random = self.encoder.random(200, np.random.default_rng(1))
        return float(np.mean([self.time(self.encoder.policy(row)) for row in random]))

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
    parser.add_argument("--pausing", action="store_true")
    parser.add_argument("--waiting", type=float, default=MOST_WAITING, help="paused trials at most, with --pausing")
    parser.add_argument("--samplers", default="nightpress,random,nsga2,tpe,netadapt," + ",".join(ABLATIONS))
    arguments = parser.parse_args()
    from nightpress.cli.config import read_target

    target = read_target(arguments.profile)
    anatomy, _ = inspect(load_task(arguments.task, None), step_of=target.channel_step)
    offered = SpaceConfig(importance=IMPORTANCES)
    config = RunConfig(task=arguments.task, base=None, out=Path("unused"), target=target, space=offered)
    space, profile = space_of(anatomy, config), load_profile(arguments.profile, anatomy, force=True)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(f"regret after a quarter, half and all of the time of {arguments.trials} random trials, rules and walk "
          f"known to all: median over seeds {[*seeds]}, then each; in brackets the trials of that time")  # fmt: skip
    for truth in arguments.truth.split(","):
        worlds = [World(space, profile, truth, seed) for seed in seeds]
        ceilings = [world.covered(world.best()) for world in worlds]
        print(f"{truth}: best front known {' '.join(f'{c:.4f}' for c in ceilings)}", flush=True)
        for name in arguments.samplers.split(","):
            how = partial(pausing_night, waiting=arguments.waiting) if arguments.pausing else night
            nights = [how(world, name, seed, arguments.trials) for seed, world in zip(seeds, worlds, strict=True)]
            found = [
                [ceiling - value for value in values] for (values, _), ceiling in zip(nights, ceilings, strict=True)
            ]
            middle = " ".join(f"{statistics.median(column):.4f}" for column in zip(*found, strict=True))
            rest = "; ".join(" ".join(f"{v:.4f}" for v in values) for values in found)
            counts = " ".join(str(count) for _, count in nights)
            print(f"{('without ' if name in ABLATIONS else '') + name:24} {middle}   ({rest}) [{counts}]", flush=True)


def night(world: World, name: str, seed: int, trials: int) -> tuple[list[float], int]:
    """Hypervolume of the true long accuracies of all that was tried, after each part of the time; the proposals."""
    rng, total = np.random.default_rng(seed), trials * world.mean_time()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(open_storage(Path(folder), None), _sampler(world, name, seed))
        rules, walk = first_policies(world)
        for policy in [*rules, *walk]:
            params = world.space.params(policy) if world.space.contains(policy) else {}
            store.enqueue(params, "seed", None, policy_to_dict(policy))
        begun = len(rules) + len(walk)
        for number in range(begun):
            _trial(world, store, rng, long=number < len(rules))
        spent = [0.0]
        while spent[-1] < total:
            spent.append(spent[-1] + world.time(_trial(world, store, rng, long=False)))
        tried = world.losses([policy_of(trial) for trial in store.trials()])
        counts = [sum(at <= share * total for at in spent[1:]) for share in (0.25, 0.5, 1.0)]
        return [world.covered(tried[: begun + count]) for count in counts], counts[-1]


def first_policies(world: World) -> tuple[list[Policy], list[Policy]]:
    """The rules and the points of a greedy walk, which every sampler begins with."""
    rules = list(baselines(world.space.anatomy, True).values())
    return rules, greedy_walk(world.space, world.sensitivity(), world.costs, 8)


def _sampler(world: World, name: str, seed: int) -> BaseSampler:
    sampler = make_sampler("nightpress" if name in ABLATIONS else name, seed, 0, world.space, world.profile.costs)
    if isinstance(sampler, NightpressSampler):
        sampler.sensitivity = world.sensitivity()
        sampler.reference = (world.corner[0], world.corner[1], world.corner[2])
        sampler.options = Options(**({name: False} if name in ABLATIONS else {}))
    return sampler


@dataclass(slots=True)
class Made:
    """A worker whose jobs take no time; ``steps`` is what they would have cost, in steps of the uncompressed network,
    with a part of a trial that does not shrink with it."""

    world: World
    rng: np.random.Generator
    steps: float = 0.0
    workers: int = 1
    progress: float = 0.0
    _done: list[tuple[int, Outcome]] = field(default_factory=list[tuple[int, Outcome]])

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        look, truth = look_steps(TRAIN_ITEMS, BATCH), self.world.truth(job.policy)
        trained = {"bn": 0, "part": PART_STEPS, "short": SHORT_STEPS - PART_STEPS}[job.rung]
        spent = trained + (first_steps(TRAIN_ITEMS, BATCH) if job.rung == "bn" else look)
        self.steps += self.world.time(job.policy) * spent + BEGIN_STEPS * (job.rung == "bn")
        accuracy = truth["bn"] + 0.75 * (truth["short"] - truth["bn"]) if job.rung == "part" else truth[job.rung]
        seen = _seen(job.rung, accuracy, BN_ITEMS if job.rung == "bn" else SEARCH_ITEMS, self.rng)
        score = Score(accuracy=seen.accuracy, accuracy_se=seen.accuracy_se, samples=seen.samples, seconds=1.0)
        self._done.append((key, Outcome(search=score)))

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome]]:
        done, self._done = self._done, []
        yield from done

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._done.clear()


@dataclass(slots=True)
class Priced(Session):
    """A session that prices by the profile, without a graph for each policy."""

    def predict(self, policy: Policy) -> tuple[float, float, float, int]:
        latency, low, high = self.profile.predict([policy])[0].tolist()
        return latency, low, high, self.profile.predict_size(plan(self.prepared.anatomy, policy))


def pausing_night(world: World, name: str, seed: int, trials: int, waiting: float) -> tuple[list[float], int]:
    """The same as :func:`night` of trials that pause, are gone on with and are stopped as those of a night."""
    runner = Made(world, np.random.default_rng(seed))
    whole = SHORT_STEPS + first_steps(TRAIN_ITEMS, BATCH) + 2 * look_steps(TRAIN_ITEMS, BATCH)
    total = trials * (world.mean_time() * whole + BEGIN_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        session = _session(world, Path(folder), name, seed, runner)
        store, search = session.store, Trials(session, most_waiting=waiting)
        rules, walk = first_policies(world)
        for policy in rules:
            enqueue(session, policy, "baseline")
        for policy in walk:
            enqueue(session, policy, "seed")
        while store.waiting("baseline") or store.waiting("seed"):
            search.fill(1, go_on=False)
            search.collect(0.0)
        search.drain()
        for trial in [t for t in store.trials() if t.role == "baseline"]:
            long = world.truth(policy_of(trial))["long"]
            store.note_long(trial.number, _seen("long", long, SEARCH_ITEMS, runner.rng))
        runner.steps, found, shares = 0.0, list[float](), [0.25, 0.5, 1.0]
        while shares:
            if runner.steps >= shares[0] * total:
                done = [policy_of(t) for t in store.trials() if t.state is TrialState.COMPLETE]
                found.append(world.covered(world.losses(done)))
                shares.pop(0)
                continue
            search.fill(1)
            search.collect(0.0)
        return found, sum(t.role == "search" for t in store.trials())


def _session(world: World, folder: Path, name: str, seed: int, runner: Made) -> Session:
    config = RunConfig(task="simulated", base=None, out=folder, search=SearchConfig(sampler=name), seed=seed)
    (folder / "config.yaml").write_text("{task: simulated}")
    session = Priced(
        config=config, folder=RunFolder(folder), clock=Clock(Times().wall() + 1e7), watch=lambda session: None
    )
    accuracy, latency, size = -world.corner[0], float(world.corner[1]), float(world.corner[2])
    session.state |= {
        "state": "running", "phase": "search", "rungs": {"short_steps": SHORT_STEPS, "part_steps": PART_STEPS},
        "reference": {"accuracy": accuracy, "latency_ms": latency, "size_bytes": size},
    }  # fmt: skip
    task = load_task("mnist5k-resnet", None)
    sampler = _sampler(world, name, seed)
    session.provide(
        prepared=Prepared(
            task=task, anatomy=world.space.anatomy, space=world.space, train_items=TRAIN_ITEMS, step_ms=1
        ),
        profile=world.profile, jobs=Jobs(runner, BATCH, expected_seconds=lambda job: 1.0, tell=print),
        store=Store(open_storage(folder, None), sampler), sampler=sampler, sensitivity=world.sensitivity(),
    )  # fmt: skip
    return session


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
