"""The plan made anew: what finalists can use, what they need, and what a device takes to verify them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nightpress.evaluators import Task
from nightpress.search.clock import SHARES, Clock
from nightpress.search.config import FineTuneConfig, RunConfig
from nightpress.search.finalists import choose
from nightpress.search.folder import RunFolder, read_run
from nightpress.search.glance import minute_line
from nightpress.search.night import worthwhile
from nightpress.search.planning import plan_finalists
from nightpress.search.proposals import baselines
from nightpress.search.records import Quality, TrialState
from nightpress.search.session import OverdueError, Prepared, Session
from nightpress.search.store import Store, open_storage
from nightpress.spaces.policy import FP32, INT8
from nightpress.spaces.space import Space
from strategies import toy_anatomy
from test_clock import Machine

NOTHING = TensorDataset(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
TASK = Task(name="t", model=nn.Identity(), example_input=torch.zeros(1, 1), train=NOTHING, test=NOTHING)


@dataclass
class Idle:
    """Workers that have nothing to do."""

    workers: int = 1
    progress: float = 0.0

    def as_completed(self, timeout_seconds: float) -> list[tuple[int, object]]:
        return []


@dataclass
class Jobs:
    runner: Idle

    def as_completed(self, timeout_seconds: float) -> list[tuple[int, object]]:
        return []


@pytest.fixture
def machine() -> Machine:
    return Machine()


def night(folder: Path, machine: Machine, seconds: float, short_seconds: float, **finetune: int) -> Session:
    """A night in its search with four trials, whose short fine-tunes of 10 steps took ``short_seconds`` each."""
    config = RunConfig(task="t", base=None, out=folder, finetune=FineTuneConfig(**finetune))
    (folder / "config.yaml").write_text("{task: t}")
    session = Session(
        config=config, folder=RunFolder(folder), clock=Clock(machine.wall + seconds, True, machine.times),
        watch=lambda session: None,
    )  # fmt: skip
    session.state |= {
        "state": "running", "phase": "search",
        "rungs": {"short_steps": 10, "long_steps": 50, "finalists": 4, "epoch_steps": 20},
        "reference": {"accuracy": 0.5, "latency_ms": 1.0, "size_bytes": 1e6},
        "given": {split: {"accuracy": 0.6, "accuracy_se": 0.01} for split in ("search", "test")},
    }  # fmt: skip
    store = Store(open_storage(folder, None))
    space = Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))
    generator = np.random.default_rng(0)
    for number in range(4):
        trial = store.study.ask()
        store.begin(trial, space.random(generator), 0.0)
        latency = {"latency_ms": 0.5 - 0.1 * number, "low_ms": 0.01, "high_ms": 1.0, "measured": False}
        store.note(trial.number, predicted=latency, size_bytes=80_000, macs=1, params=1)
        for rung, spent in (("bn", 0.0), ("short", short_seconds)):
            store.note_quality(trial.number, Quality(rung=rung, split="search", accuracy=0.9 - 0.05 * number,
                                                     accuracy_se=0.01, samples=9, seconds=spent))  # fmt: skip
        store.finish(trial.number, TrialState.COMPLETE, finished=1.0)
    prepared = Prepared(task=TASK, anatomy=space.anatomy, space=space, train_items=1280, step_ms=10)
    session.provide(store=store, jobs=Jobs(Idle()), prepared=prepared)
    return session


def test_what_the_finalists_cannot_use_goes_to_the_search(tmp_path: Path, machine: Machine) -> None:
    """Twenty epochs of 20 steps at 0.01 s a step are 4 s, a third more where quantisation is simulated."""
    session = night(tmp_path, machine, seconds=10_000, short_seconds=0.1)
    before = session.clock.left_before("finalists", "verify", "report")

    plan_finalists(session)

    chosen = choose(session)
    wanted = 1.15 * sum(5.2 if t.policy["bits"] else 4.0 for t in chosen)
    assert chosen
    assert session.clock.share_seconds("finalists") == pytest.approx(wanted)
    assert session.clock.left_before("finalists", "verify", "report") > before + 2700
    assert sum(session.state["shares"].values()) == pytest.approx(1.0)
    [decision] = read_run(tmp_path).decisions
    assert decision["decision"] == f"planned anew: finalists {round(wanted)} s"
    assert decision["reason"].startswith(f"{len(chosen)} long fine-tunes need between ")
    assert f" and {wanted:.0f} s" in decision["reason"]


def test_finalists_that_need_longer_than_their_share_get_up_to_half_of_the_night(
    tmp_path: Path, machine: Machine
) -> None:
    session = night(tmp_path, machine, seconds=1000, short_seconds=600, long_steps=11)  # 660 s each
    plan_finalists(session)
    assert session.clock.share_seconds("finalists") == pytest.approx(500)


def test_the_finalists_keep_their_time_while_the_search_goes_on(tmp_path: Path, machine: Machine) -> None:
    session = night(tmp_path, machine, seconds=1000, short_seconds=10)
    wanted = SHARES["finalists"] * 1000
    for _ in range(9):
        plan_finalists(session)
        assert session.clock.share_seconds("finalists") == pytest.approx(wanted)
        machine.works(100)
    assert session.clock.left_before("finalists", "verify", "report") < 0  # so the search has ended by now


def test_a_phase_ends_when_it_would_take_the_time_of_the_verification(tmp_path: Path, machine: Machine) -> None:
    session = night(tmp_path, machine, seconds=1000, short_seconds=10)
    with session.phase("finalists", "verify", "report"):
        session.tick()
        machine.works(1000 - 0.08 * 1000 - 1)
        session.tick()
        machine.works(2)
        with pytest.raises(OverdueError, match="the time for verify, report has come"):
            session.tick()
    session.tick()  # the verification itself has no such followers


def test_a_machine_that_slept_is_told_and_planned_for(tmp_path: Path, machine: Machine) -> None:
    session = night(tmp_path, machine, seconds=4000, short_seconds=10)
    session.tick()
    machine.sleeps(2000)
    session.tick()
    [decision] = read_run(tmp_path).decisions
    assert decision["reason"] == "the machine slept for 33 min 20 s"
    assert decision["decision"] == "planned anew: what is left"
    assert session.clock.share_seconds("finalists") == pytest.approx(SHARES["finalists"] * 2000)


def test_what_was_left_out_of_the_rules_stays_so_whatever_the_profile_says_later(
    tmp_path: Path, machine: Machine
) -> None:
    session = night(tmp_path, machine, 600, 1.0)
    session.state["pointless"] = ["uniform 50% fp32"]
    rules = baselines(session.prepared.anatomy, distill=False)

    kept = worthwhile(session, rules)  # there is no profile to ask

    assert [name for name in rules if name not in kept] == ["uniform 50% fp32"]


def test_the_line_of_the_log_says_what_the_night_is_busy_with(tmp_path: Path, machine: Machine) -> None:
    session = night(tmp_path, machine, seconds=1000, short_seconds=1)
    with session.phase("finalists"):
        session.update(activity="2 of 4 long fine-tunes")
        line = minute_line(session)
    assert line.startswith("finalists, 16 min 40 s left; 2 of 4 long fine-tunes; 4 complete; most accurate 0.9000 in ")
    with session.phase("verify"):
        assert "fine-tunes" not in minute_line(session)
