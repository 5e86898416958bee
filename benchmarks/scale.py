"""How far the driver carries: its own time for a trial, two workers against one, and a thousand workers by simulation.

    python benchmarks/scale.py driver --trials 5000             # overhead of a trial whose evaluation takes no time
    python benchmarks/scale.py workers --runner ray             # trials an hour of one worker and of two, on two cores
    python benchmarks/scale.py node                             # a node is killed with work in flight
    python benchmarks/scale.py simulate --workers 1000 --trials 100000 --seconds 30
    python benchmarks/scale.py simulate --workers 100 --trials 500 --sampler nightpress --task mnist5k-resnet

Needs the test extra: the tiny task of the tests is what is searched, or a built-in one, whose proposals are dearer.
Latencies come from a profile made by a formula.
``simulate`` runs the real driver, study and journal included; only the workers and the clock are made up. The clock
jumps to the next event where the driver has nothing to do, and moves with the driver's own time where it has.
"""

import argparse
import heapq
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
from fakes_jobs import Acting, Instant
from fakes_jobs import job as acting
from nightpress.cli.config import load_config
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Outcome, Recipe
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.insitu import UnseenKernelError
from nightpress.evaluators.latency.measure import measure_policies
from nightpress.evaluators.latency.profile_file import load_profile
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.quality import Score
from nightpress.evaluators.task import load_task
from nightpress.search.clock import Clock, Times
from nightpress.search.cluster import Needs
from nightpress.search.config import RUNNERS, Resources, RunConfig, SearchConfig
from nightpress.search.corner import corner_of
from nightpress.search.feedback import feed_back
from nightpress.search.folder import RunFolder
from nightpress.search.jobs import Jobs
from nightpress.search.memory import Memory
from nightpress.search.night import MOST_WAITING
from nightpress.search.pareto import losses, relative_hypervolume
from nightpress.search.places import find_places
from nightpress.search.prepare import space_of
from nightpress.search.ray_runner import RayRunner
from nightpress.search.records import Rung
from nightpress.search.runner import Runner
from nightpress.search.sampler import NightpressSampler, make_sampler
from nightpress.search.session import Prepared, Session
from nightpress.search.store import Store, open_storage
from nightpress.search.trials import Trials
from nightpress.search.worker import Failure
from nightpress.spaces.policy import Policy
from ray_nodes import two_nodes

DAY_SECONDS = 86_400.0
TINY = "tiny"
WARM = 3
"""Jobs a worker before time is taken, so that each has made its evaluator."""
BUSY = "count the driver's CPU time, because others use the machine; what it waits for the disk is left out"
SHORT_SHARE = 0.1
"""Of a simulated trial's time; the first rung takes the rest, so that a trial which is stopped takes as long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    driving = commands.add_parser("driver")
    driving.add_argument("--trials", type=int, default=5000)
    driving.add_argument("--sampler", default="random")
    driving.add_argument("--task", default=TINY)
    driving.add_argument("--cpu", action="store_true", help=BUSY)
    simulating = commands.add_parser("simulate")
    simulating.add_argument("--workers", type=int, default=1000)
    simulating.add_argument("--trials", type=int, default=100_000)
    simulating.add_argument("--seconds", type=float, default=30.0)
    simulating.add_argument("--sampler", default="random")
    simulating.add_argument("--task", default=TINY)
    simulating.add_argument("--cpu", action="store_true", help=BUSY)
    working = commands.add_parser("workers")
    working.add_argument("--runner", choices=RUNNERS, default="ray")
    working.add_argument("--jobs", type=int, default=16)
    working.add_argument("--steps", type=int, default=150)
    working.add_argument("--counts", default="1,2", help="numbers of workers, one after the other")
    commands.add_parser("node")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nightpress-scale-") as name:
        folder = Path(name)
        now = time.process_time if getattr(arguments, "cpu", False) else time.perf_counter
        if arguments.command == "driver":
            driver(folder, arguments, now)
        elif arguments.command == "workers":
            counts = [int(count) for count in arguments.counts.split(",")]
            workers(folder, arguments.runner, arguments.jobs, arguments.steps, counts)
        elif arguments.command == "node":
            node(folder)
        else:
            simulated = Simulation(arguments.workers, arguments.seconds, now)
            simulate(folder, simulated, arguments)


def begun(folder: Path, runner: Runner, times: Times, asked: argparse.Namespace) -> Trials:
    """A night at the moment when its search begins."""
    name = f"{tiny.write_task(folder)}:build" if asked.task == TINY else asked.task
    loaded = load_task(name)
    anatomy, _ = inspect(loaded, step_of=Target().channel_step)
    profile = tiny.write_profile(folder / "profile.json", anatomy)
    file = tiny.write_config(folder, task=name, target=str(profile), search={"sampler": asked.sampler})
    config: RunConfig = load_config(file)
    config.out.mkdir()
    clock = Clock(times.wall() + 1000 * DAY_SECONDS, times=times)
    session = Session(config=config, folder=RunFolder(config.out), clock=clock, watch=lambda session: None)
    session.state |= {"rungs": {"part_steps": 1, "short_steps": 3}, "phase": "search"}
    session.provide(
        prepared=Prepared(task=loaded, anatomy=anatomy, space=space_of(anatomy, config), train_items=180, step_ms=15.0),
        profile=load_profile(profile, anatomy),
        jobs=Jobs(runner, 64, expected_seconds=lambda job: 1.0, tell=print, now=times.awake),
    )
    session.provide(measure_unseen=learn_formula)
    plain = session.predict(Policy(model=anatomy.digest))
    session.state["given"] = {split: {"accuracy": 0.7} for split in ("search", "test")}
    session.state["reference"] = {"accuracy": 0.6, "latency_ms": plain[0], "size_bytes": plain[3]}
    made = make_sampler(asked.sampler, 0, 0, session.prepared.space, session.costs_of)
    if isinstance(made, NightpressSampler):
        box = corner_of(session.state, config.limits, Rung.SHORT)
        made.reference, made.memory = losses(*box), Memory(config.out)
    session.provide(store=Store(open_storage(config.out, None), made), sampler=made)
    return Trials(session, most_waiting=MOST_WAITING * session.workers)


def learn_formula(session: Session, policy: Policy, error: UnseenKernelError) -> None:
    """A kind of kernel that the made-up profile does not know is measured by the same formula."""
    found = {"unseen": policy}
    timings, sizes = measure_policies(session.prepared.anatomy, found, Target(), tiny.FormulaTimer(), kernels=True)
    feed_back(session, found, timings, sizes)


def outcome(job: Job, seconds: float) -> Outcome:
    """A made-up accuracy: less with every channel and bit that is gone, and some luck."""
    policy = job.policy
    lost = sum(0.1 * ratio**2 for ratio in policy.prune.values()) + 0.05 * len(policy.removed_blocks)
    lost += 0.002 * len(policy.bits) + (0.1 if job.rung == "bn" else 0.0)
    luck = np.random.default_rng(int(job.folder.name)).normal(0, 0.01)
    score = Score(accuracy=float(np.clip(0.95 - lost + luck, 0, 1)), accuracy_se=0.01, samples=400, seconds=0.0)
    return Outcome(search=score, seconds=seconds)


def driver(folder: Path, asked: argparse.Namespace, now: Callable[[], float]) -> None:
    """Milliseconds of a trial, by where in the night it stands."""
    trials, count = begun(folder, Instant(partial(outcome, seconds=0.0), 2), Times(), asked), int(asked.trials)
    marks: list[float] = [now()]
    while trials.finished < count:
        trials.fill(1)
        trials.collect(0.0)
        while len(marks) <= trials.finished:
            marks.append(now())
    spans = [1000 * (b - a) for a, b in itertools.pairwise(marks)]
    part = max(1, count // 10)
    print(f"{count} trials, sampler {asked.sampler}: {statistics.mean(spans):.1f} ms a trial")
    for start in range(0, count, part):
        some = spans[start : start + part]
        print(f"  {start + 1:6} – {start + len(some):6}: mean {statistics.mean(some):6.1f} ms, "
              f"median {statistics.median(some):6.1f} ms, longest {max(some):6.0f} ms")  # fmt: skip
    print(f"  the journal has {(folder / 'run' / 'study.journal').stat().st_size / 1e6:.1f} MB")


@dataclass(slots=True)
class Simulation:
    """Workers that take ``seconds`` a trial, on a clock of their own: it moves with this process's time while the
    driver is busy, and jumps to the next result while it waits. Every method of a runner is called by the driver."""

    workers: int
    seconds: float
    driver: Callable[[], float]
    """The driver's own time, in seconds."""
    progress: float = 0.0
    skipped: float = 0.0
    """Seconds that were jumped over."""
    worked: float = 0.0
    """Seconds that all workers were busy, together."""
    _queue: list[tuple[float, int, Job]] = field(default_factory=list[tuple[float, int, Job]])

    def now(self) -> float:
        return self.driver() + self.skipped

    def submit(self, key: int, job: Job, cap_seconds: float | None = None) -> None:
        share = {"bn": 1 - SHORT_SHARE, "part": SHORT_SHARE / 3, "short": SHORT_SHARE * 2 / 3}[job.rung]
        span = self.seconds * share * (0.8 + 0.4 * (key * 0.618034 % 1))  # they do not all end together
        self.worked += span
        heapq.heappush(self._queue, (self.now() + span, key, job))

    def as_completed(self, timeout_seconds: float) -> Iterator[tuple[int, Outcome | Failure]]:
        if self._queue:
            self.skipped += min(timeout_seconds, max(0.0, self._queue[0][0] - self.now()))
        now = self.now()
        while self._queue and self._queue[0][0] <= now:
            _, key, job = heapq.heappop(self._queue)
            yield key, outcome(job, self.seconds)

    def done(self) -> float:
        """Seconds of work that lie behind all workers together."""
        now = self.now()
        return self.worked - sum(max(0.0, end - now) for end, *_ in self._queue)

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._queue.clear()


def simulate(folder: Path, simulated: Simulation, asked: argparse.Namespace) -> None:
    """How busy the driver keeps so many workers, over the whole and by tenths, and what the front covers in the end."""
    now, workers, count = simulated.now, simulated.workers, int(asked.trials)
    trials = begun(folder, simulated, Times(wall=now, awake=now, boot=now), asked)
    start = now()
    before = (start, 0.0, simulated.skipped)
    print(f"{workers} workers, {count} trials of {simulated.seconds:.0f} s, sampler {asked.sampler}, {asked.task}")
    for part in range(1, 11):
        while trials.finished < count * part // 10:
            more = trials.fill(workers)
            trials.collect(0.0 if more else 0.25)
        then, done, skipped = now(), simulated.done(), simulated.skipped
        span = then - before[0]
        own = span - (skipped - before[2])
        print(f"  up to trial {trials.finished:6}: {(done - before[1]) / workers / span:6.1%} busy, "
              f"{1000 * own / (count / 10):5.1f} ms of the driver a trial", flush=True)  # fmt: skip
        before = (then, done, skipped)
    total = before[0] - start
    print(f"  all: {before[1] / workers / total:.1%} busy over {total / 3600:.2f} simulated hours, "
          f"{total - before[2]:.0f} s of them the driver's")  # fmt: skip
    session = trials.session
    covered = relative_hypervolume(
        [point for point, _ in session.store.tally().front], losses(**session.state["reference"])
    )
    states = Counter(str(trial.state) for trial in session.store.trials())
    print(f"  {dict(states)}, {len({t.digest for t in session.store.trials()})} different policies; the front covers "
          f"{covered:.1%} of the box")  # fmt: skip


def workers(folder: Path, runner: str, count: int, steps: int, numbers: Sequence[int]) -> None:
    """Fine-tunes an hour of so many workers with one thread each, on the built-in example: of one policy, so that all
    take as long and no worker idles while the last one ends."""
    task = load_task("mnist5k-resnet")
    anatomy, _ = inspect(task, step_of=Target().channel_step)
    recipe = Recipe(
        task="mnist5k-resnet", base=None, anatomy=anatomy, seed=0, compute=Compute(), batch_size=64, threads=1
    )
    space = space_of(anatomy, RunConfig(task="", base=None, out=folder))
    generator = np.random.default_rng(0)
    policy = space.random(generator)
    hours: list[float] = []
    for turn, number in enumerate(numbers):
        config = SearchConfig(runner=runner, workers=number, resources=Resources(cpu=1))
        places = find_places(config, folder)
        running = places.start(partial(Evaluator, recipe), folder)
        jobs = Jobs(running, 64, expected_seconds=lambda job: 60.0, tell=print)
        job = Job(policy=policy, rung="short", seed=0, steps=4, folder=folder)  # makes the evaluators, teacher and all
        gather(jobs, [replace(job, folder=folder / f"warm{turn}-{key}") for key in range(WARM * number)], number)
        start, job = time.perf_counter(), replace(job, steps=steps)
        found = gather(jobs, [replace(job, folder=folder / f"{turn}-{key}") for key in range(count)], number)
        failed = [outcome for outcome in found.values() if isinstance(outcome, Failure)]
        hours.append(count / (time.perf_counter() - start) * 3600)
        running.close()
        places.close()  # only then is stdout ours again: a Ray cluster's messages must not reach it
        print(f"{runner}, {number} workers: {hours[-1]:.0f} trials an hour, {len(failed)} failed", flush=True)
    if len(numbers) > 1:
        share = hours[-1] * numbers[0] / (hours[0] * numbers[-1])
        print(f"{numbers[-1]} workers: {share:.3f} of {numbers[-1] / numbers[0]:g} times {numbers[0]}")


def gather(jobs: Jobs, wanted: Sequence[Job], workers: int) -> dict[int, Outcome | Failure]:
    """What comes of jobs, as many at a time as there are workers, which is how a night submits them."""
    found: dict[int, Outcome | Failure] = {}
    waiting = list(enumerate(wanted))
    while len(found) < len(wanted):
        while waiting and len(wanted) - len(waiting) - len(found) < workers:
            jobs.submit(*waiting.pop(0))
        found |= dict(jobs.as_completed(0.25))
    return found


def node(folder: Path) -> None:
    """Two nodes with a worker each; one is killed while its job runs. When do the next result and the lost one come?"""
    told: list[tuple[float, str]] = []
    with two_nodes() as (cluster, nodes, kill):
        runner = RayRunner(cluster, Acting(folder), Needs(), None, folder)
        jobs = Jobs(runner, 64, lambda job: 1.0, lambda what, why: told.append((time.monotonic(), f"{what}: {why}")))
        results: list[tuple[float, int, bool]] = []
        submitted, killed, total = 0, 0.0, 40
        while len(results) < total:
            while submitted < total and submitted - len(results) < 2:
                jobs.submit(submitted, acting("sleep 1", folder / str(submitted)))
                submitted += 1
            for key, found in jobs.as_completed(0.25):
                results.append((time.monotonic(), key, isinstance(found, Outcome)))
            if not killed and len(results) >= 8:
                time.sleep(0.5)  # both are in the middle of a job
                kill(nodes[1])
                killed = time.monotonic()
        runner.close()
    after = [moment - killed for moment, *_ in results if moment > killed]
    print(f"{len(results)} of {total} jobs have a result, {sum(good for *_, good in results)} of them good")
    print(f"next result {after[0]:.1f} s after the kill")
    for moment, what in told:
        print(f"{moment - killed:.1f} s after the kill: {what}")
    again = [moment - killed for moment, key, _ in results if any(f" {key}:" in what for _, what in told)]
    print(f"the lost job's result came {again[0] if again else float('nan'):.1f} s after the kill")


if __name__ == "__main__":
    main()
