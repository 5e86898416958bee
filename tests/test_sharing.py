"""Drivers that share a study: what they agree on, whom they refuse, and what a late one finds."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

import tiny
from nightpress.evaluators.latency.target import Target
from nightpress.search import sharing
from nightpress.search.claims import DatabaseClaims
from nightpress.search.config import FineTuneConfig, Limits, PruneConfig, RunConfig, SpaceConfig
from nightpress.search.folder import read_run
from nightpress.search.session import Session
from nightpress.search.storages import close, open_storage
from nightpress.search.store import Store
from nightpress.search.study import end_study, studying
from nightpress.search.trials import enqueue
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import INT8
from nightpress.spaces.space import uniform
from test_trials import SPACE, begun

SHORTER = {"short_steps": 8, "looks": [2, 4], "study": 12, "long_steps": 40, "finalists": 3, "epoch_steps": 5}
LONGER = {"short_steps": 24, "looks": [3, 6, 12], "study": 30, "long_steps": 90, "finalists": 8, "epoch_steps": 5}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Optuna's tables, which take a second to make."""
    folder = tmp_path_factory.mktemp("empty")
    close(open_storage(folder, url(folder)))
    return folder / "study.db"


@pytest.fixture(autouse=True)
def database(empty: Path, tmp_path: Path) -> None:
    shutil.copy(empty, tmp_path)


@pytest.fixture
def opened(tmp_path: Path) -> Generator[Callable[[], optuna.storages.RDBStorage]]:
    """Opens the study's database, each time with connections of its own, which end with the test."""
    there: list[optuna.storages.RDBStorage] = []

    def opened() -> optuna.storages.RDBStorage:
        found = open_storage(tmp_path, url(tmp_path))
        assert isinstance(found, optuna.storages.RDBStorage)
        there.append(found)
        return found

    yield opened
    for storage in there:
        close(storage)


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def driver(folder: Path, name: str, rungs: dict[str, Any], cpu: str = "x1", data: str = "d1", **keys: Any) -> Session:
    """A driver that is about to join the study, with the lengths that it has planned for itself."""
    folder.joinpath(name).mkdir()
    session = begun(folder / name, dict(rungs), **keys).session
    search = replace(session.config.search, storage=url(folder))
    session.config = replace(session.config, search=search)
    session.state["data"] = data
    session.provide(
        store=Store(open_storage(folder, url(folder)), study=search.study, driver=name),
        profile=SimpleNamespace(device=SimpleNamespace(cpu=cpu)),
    )
    return session


@pytest.fixture
def join(tmp_path: Path) -> Generator[Callable[..., Session]]:
    """Makes drivers, whose connections end with the test."""
    there: list[Session] = []

    def join(name: str, rungs: dict[str, Any], **keys: Any) -> Session:
        there.append(driver(tmp_path, name, rungs, **keys))
        return there[-1]

    yield join
    for session in there:
        session.store.close()


Join = Callable[..., Session]
Open = Callable[[], optuna.storages.RDBStorage]


def test_who_comes_first_says_how_long_a_short_fine_tune_is(join: Join, tmp_path: Path) -> None:
    first, second = join("a", SHORTER), join("b", LONGER)

    sharing.agree(first)
    sharing.agree(second)

    assert first.state["rungs"] == SHORTER
    assert second.state["rungs"] == {**LONGER, "short_steps": 8, "looks": [2, 4], "study": 12}  # finalists are its own
    [said] = read_run(tmp_path / "b").decisions
    assert said["decision"] == "short fine-tune of 8 steps, as the study has it"
    assert said["evidence"]["before"]["short_steps"] == 24


def test_a_driver_that_chose_no_part_takes_the_study_of_the_first_one_and_the_other_way_round(join: Join) -> None:
    first, second = join("a", SHORTER), join("b", {"short_steps": 8, "part_steps": 0, "long_steps": 40, "finalists": 3})
    sharing.agree(first)
    sharing.agree(second)
    assert studying(second.state["rungs"])
    assert "part_steps" not in second.state["rungs"]


def test_what_was_agreed_on_outlives_a_driver_that_is_resumed_with_another_plan(join: Join) -> None:
    first, second = join("a", SHORTER), join("b", LONGER)
    sharing.agree(first)
    first.state["rungs"] |= {"part_steps": 4, "bn": False}  # its study of the rungs is over
    sharing.agree(first)
    sharing.agree(second)

    assert first.state["rungs"]["part_steps"] == 4
    assert second.state["rungs"]["short_steps"] == 8
    assert studying(second.state["rungs"])


def test_the_rungs_are_those_of_the_driver_whose_study_of_them_ends_first(join: Join) -> None:
    first, second = join("a", SHORTER), join("b", LONGER)
    for session in (first, second):
        sharing.agree(session)
    assert first.store.agreed("part", [4, False]) == [4, False]

    end_study(second)  # which has seen nothing, and would have neither

    assert (second.state["rungs"]["part_steps"], second.state["rungs"]["bn"]) == (4, False)
    said = read_run(second.folder.path).decisions[-1]
    assert said["decision"] == "a rung after 4 of 8 steps, none before it"
    assert said["reason"].endswith("; another driver of the study was the first to end it, and its choice holds")


def test_a_driver_that_is_alone_goes_by_its_own(tmp_path: Path) -> None:
    session = begun(tmp_path, dict(SHORTER)).session
    sharing.agree(session)
    assert session.state["rungs"] == SHORTER
    assert sharing.look(session) == 0
    assert [session.store.agreed("part", value) for value in ([1, True], [2, True])] == [[1, True], [2, True]]
    assert session.store.study.user_attrs.keys() == {"schema"}


# Another search


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"seed": 7}, "with seed 0, this run's is 7"),
        ({"data": "d2"}, "with training data 'd1', this run's is 'd2'"),
        ({"limits": Limits(min_accuracy=0.9)}, "with limits.min_accuracy None, this run's is 0.9"),
        ({"finetune": FineTuneConfig(batch_size=32)}, "with finetune.batch_size 64, this run's is 32"),
        ({"finetune": FineTuneConfig(short_steps=24)}, "with finetune.short_steps None, this run's is 24"),
        ({"target": replace(RunConfig(task="t", base=None, out=Path()).target, threads=2)},
         "with target.threads 1, this run's is 2"),
        ({"space": SpaceConfig(prune=PruneConfig(max_ratio=0.5))},
         "with space.prune {'max_ratio': 0.8}, this run's is {'max_ratio': 0.5}"),
        ({"space": SpaceConfig(importance=("l1", "l2"))},
         "with space.importance ['l2'], this run's is ['l1', 'l2']"),
    ],
)  # fmt: skip
def test_another_search_is_refused_before_anything_is_measured_and_when_both_began_at_once(
    join: Join, keys: dict[str, Any], sentence: str
) -> None:
    refusal = f"search.study: 'nightpress' in this storage is a search {sentence}; choose another name."
    other = join("b", LONGER, **keys)
    assert sharing.look(other) == 0  # nobody is there
    sharing.agree(join("a", SHORTER))
    for refuse in (sharing.look, sharing.agree):
        with pytest.raises(InputError, match=f"^{re.escape(refusal)}$"):
            refuse(other)
    assert sharing.look(join("c", LONGER)) == 0


def test_another_device_is_refused(join: Join) -> None:
    sharing.agree(join("a", SHORTER))
    with pytest.raises(InputError, match=r"is a search with device 'x1', this run's is 'y2'; choose another name\.$"):
        sharing.agree(join("b", SHORTER, cpu="y2"))


def test_integers_of_other_bits_are_refused_once_they_are_measured(join: Join) -> None:
    """A parameter of a study has one list of choices."""
    sharing.agree(join("a", SHORTER))
    other = join("b", SHORTER, target=Target(integer_bits=7))
    assert sharing.look(other) == 0
    with pytest.raises(InputError, match=r"is a search with target\.integer_bits 8, this run's is 7; choose another"):
        sharing.agree(other)


def test_more_finalists_are_no_other_search(join: Join) -> None:
    sharing.agree(join("a", SHORTER))
    sharing.agree(join("b", SHORTER, finetune=FineTuneConfig(finalists=9)))


def test_a_late_driver_sees_how_many_baselines_others_have_begun(join: Join) -> None:
    first, second = join("a", SHORTER), join("b", SHORTER)
    for width in (1, 0.5, 0.25):
        enqueue(first, uniform(SPACE.anatomy, width=width, bits=INT8), "baseline")
    for width in (1, 0.5):
        trial = first.store.study.ask()
        trial.set_user_attr("driver", "a")
        first.store.begin(trial, uniform(SPACE.anatomy, width=width, bits=INT8), 0.0)

    assert sharing.look(second) == 2
    first.state["driver"] = "a"
    assert sharing.look(first) == 0


# What the store keeps for it


def test_drivers_that_ask_at_the_same_moment_get_the_same_answer(opened: Open) -> None:
    names = [f"driver {i}" for i in range(6)]
    stores = [Store(opened(), driver=name) for name in names]
    barrier, found = threading.Barrier(len(names)), dict[str, str]()

    def ask(name: str, store: Store) -> None:
        barrier.wait()
        found[name] = store.agreed("long", {"steps": name})["steps"]

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(names, stores, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found.keys() == set(names)
    assert len(set(found.values())) == 1


def test_what_a_driver_proposed_before_it_was_killed_holds_when_it_comes_back(opened: Open) -> None:
    """It had claimed the key, and had not yet written that its value is the one."""
    storage = opened()
    killed = Store(storage, driver="a")
    killed.study.set_user_attr("proposed:long:a", 40)
    assert DatabaseClaims(storage.engine, "nightpress", "a").take("agreed:long") == "a"

    assert Store(opened(), driver="a").agreed("long", 90) == 40
    assert Store(opened(), driver="b").agreed("long", 16) == 40


# The real thing


@pytest.mark.slow
def test_two_nights_of_different_length_share_their_rungs_and_a_third_of_another_seed_is_refused(
    tmp_path: Path,
) -> None:
    more = "def more():\n    return build(train=pictures(1600, 0))"  # so that an epoch bounds no fine-tune
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(tiny.write_task(tmp_path, more)))

    def config(name: str, **keys: Any) -> Path:
        return tiny.write_config(
            tmp_path, f"{name}.yaml", task="task.py:more", out=str(tmp_path / name), target=str(profile),
            finetune={"batch_size": 4}, search={"storage": url(tmp_path)}, **keys,
        )  # fmt: skip

    def rungs(name: str, budget: str) -> dict[str, Any]:
        """Of a driver that is interrupted once its baselines are trained."""
        state: dict[str, Any] = {}
        with tiny.driver("run", config(name, budget=budget)) as night:
            while night.poll() is None and state.get("phase") not in {"sensitivity", "search"}:
                time.sleep(0.2)
                if (tmp_path / name / "state.json").is_file():
                    state = json.loads((tmp_path / name / "state.json").read_text())
            night.send_signal(signal.SIGINT)
            night.communicate(timeout=60)
        return state["rungs"]

    first, second = rungs("a", "120s"), rungs("b", "50s")
    refused = tiny.nightpress("run", config("c", budget="60s", seed=1), "--json")

    assert first["short_steps"] > 8, "both would have come to the least there is"
    assert {key: second.get(key) for key in sharing.LENGTHS} == {key: first.get(key) for key in sharing.LENGTHS}
    assert tiny.refused(refused) == (
        "search.study: 'nightpress' in this storage is a search with seed 0, this run's is 1; choose another name."
    )
    assert not (tmp_path / "c").exists()
