"""A budget that is too short, and what is advised in its place."""

import re
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from nightpress.cli.config import parse_budget
from nightpress.search.clock import Clock, Deadline
from nightpress.search.config import RunConfig
from nightpress.search.folder import RunFolder
from nightpress.search.planning import check_budget
from nightpress.search.proposals import rule_count
from nightpress.search.session import Prepared, Session
from nightpress.spaces.errors import InputError
from test_clock import Machine
from test_planning import TASK, Idle, Jobs
from test_trials import SPACE

ADVICE = re.compile(r"the least budget here is (.+)\.$")
RULES = rule_count(SPACE)


def started(folder: Path, budget_seconds: float, *, start: float, inspection: float, step_ms: float) -> Session:
    """A night after its inspection, which took so many seconds, as did the start of the driver before it."""
    machine = Machine(wall=1e6)
    deadline = Deadline(machine.wall + budget_seconds, fixed=False, given=machine.wall)
    machine.works(start)
    clock = Clock(deadline.epoch, deadline.fixed, machine.times, before=machine.wall - deadline.given)
    machine.works(inspection)
    config = RunConfig(task="t", base=None, out=folder)
    session = Session(config=config, folder=RunFolder(folder), clock=clock, watch=lambda session: None)
    prepared = Prepared(task=TASK, anatomy=SPACE.anatomy, space=SPACE, train_items=160, step_ms=step_ms)
    session.provide(prepared=prepared, jobs=Jobs(Idle()))
    return session


def advised(session: Session) -> float | None:
    """The least budget that a refusal names, in seconds; None where there is none."""
    try:
        check_budget(session)
    except InputError as error:
        found = ADVICE.search(str(error))
        assert found is not None
        return parse_budget(found[1].replace(" ", "").replace("min", "m"), "--budget")
    return None


@given(
    budget=st.floats(12, 60), start=st.floats(0, 30), inspection=st.floats(0, 300), step_ms=st.floats(1, 20_000),
    slower=st.floats(1, 1.45),
)  # fmt: skip
def test_who_follows_the_advice_is_not_refused_again_though_all_takes_longer(
    tmp_path_factory: pytest.TempPathFactory, budget: float, start: float, inspection: float, step_ms: float,
    slower: float,
) -> None:  # fmt: skip
    folder = tmp_path_factory.getbasetemp()
    found = advised(started(folder, budget, start=start, inspection=inspection, step_ms=step_ms))
    if found is None:
        return
    assert found > budget
    again = {"start": slower * start, "inspection": slower * inspection, "step_ms": slower * step_ms}
    assert advised(started(folder, found, **again)) is None


def test_baselines_that_other_drivers_have_begun_cost_this_one_nothing(tmp_path: Path) -> None:
    took = {"start": 5.0, "inspection": 5.0, "step_ms": 2000.0}
    alone = advised(started(tmp_path, 60, **took))
    assert alone is not None
    late = started(tmp_path, alone / 2, **took)

    with pytest.raises(InputError, match=rf" {RULES} baselines at about 1200 ms a training step "):
        check_budget(late)
    with pytest.raises(InputError, match=rf" {RULES - 1} baselines at about 1200 ms a training step "):
        check_budget(late, others=1)
    check_budget(late, others=RULES)
    check_budget(late, others=RULES + 1)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory)


@pytest.mark.slow
def test_the_command_that_follows_the_advice_goes_on_to_calibrate(place: tiny.Place, tmp_path: Path) -> None:
    """A budget counts from the command, and a process has much to import before its night begins."""
    config = tiny.config_for(place, tmp_path)
    found = None
    for budget in ("6s", "12s", "24s"):  # on a busy machine the shortest are over before the night begins
        found = found or ADVICE.search(tiny.refused(tiny.nightpress("run", config, "--budget", budget, "--json")))
        if found is not None:
            break
    assert found is not None

    with tiny.driver("run", config, "--budget", found[1].replace(" ", "").replace("min", "m"), "--json") as night:
        end = time.monotonic() + 120
        while night.poll() is None and not (tmp_path / "run" / "target.json").is_file() and time.monotonic() < end:
            time.sleep(0.1)
        night.send_signal(signal.SIGINT)
        said = night.communicate(timeout=60)[1]

    assert "The budget is too short" not in said
    assert (tmp_path / "run" / "target.json").is_file()
