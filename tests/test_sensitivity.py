"""What is thought of choices whose damage nobody measured."""

import math
from collections.abc import Callable
from pathlib import Path

from fakes_jobs import Instant
from nightpress.evaluators.evaluate import Job, Outcome
from nightpress.evaluators.quality import Score
from nightpress.search.folder import read_run
from nightpress.search.jobs import Jobs
from nightpress.search.prepare import probe_sensitivity
from nightpress.search.session import Session
from nightpress.search.worker import Failure
from test_long_tuning import SPACE, judged

FIRST = SPACE.anatomy.groups[0].name


def probing(folder: Path, evaluate: Callable[[Session, Job], Outcome | Failure]) -> Session:
    session = judged(folder, least=None)
    runner = Instant(lambda job: evaluate(session, job))
    session.provide(jobs=Jobs(runner, 64, expected_seconds=lambda job: 1.0, tell=print))
    probe_sensitivity(session)
    return session


def damage(nats: float | None) -> Outcome:
    return Outcome(search=Score(accuracy=0.9, accuracy_se=0.01, samples=1, seconds=0.0), divergence=nats)


def fails_on_the_first(session: Session, job: Job) -> Outcome | Failure:
    return Failure("RuntimeError", "no") if FIRST in job.policy.prune else damage(2.0)


def test_a_probe_that_failed_counts_as_the_worst_also_when_the_night_is_resumed(tmp_path: Path) -> None:
    first, resumed = (probing(tmp_path, fails_on_the_first) for _ in range(2))
    assert first.sensitivity.groups[FIRST] == 2.0
    assert resumed.sensitivity == first.sensitivity
    # The picture shows what was measured.
    assert FIRST not in (read_run(tmp_path).sensitivity or {})["groups"]


def test_a_damage_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    found = probing(tmp_path, lambda session, job: damage(math.inf if FIRST in job.policy.prune else 2.0))
    assert found.sensitivity.groups[FIRST] == 2.0


def test_what_there_was_no_time_to_probe_counts_as_the_worst(tmp_path: Path) -> None:
    """Nothing would be taken for no damage, and the walk begin with it."""

    def slow(session: Session, job: Job) -> Outcome:
        session.clock.deadline -= 3600
        return damage(2.0)

    found = probing(tmp_path, slow)

    [told] = [d for d in read_run(tmp_path).decisions if d["decision"].startswith("probed")]
    assert told["decision"].startswith("probed 1 of ")
    assert set(found.sensitivity.groups) == {group.name for group in SPACE.anatomy.groups}
    assert set(found.sensitivity.groups.values()) == {2.0}
    assert set(found.sensitivity.blocks) == {block.name for block in SPACE.anatomy.blocks if SPACE.blocks}
