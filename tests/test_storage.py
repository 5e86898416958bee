"""Studies elsewhere than in the run folder: SQLite and a real PostgreSQL, several drivers at one study, old records."""

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import optuna
import pytest

import postgres
import tiny
from nightpress.search.claims import DatabaseClaims, engine_options, without_password
from nightpress.search.folder import read_run
from nightpress.search.records import TrialState
from nightpress.search.store import SCHEMA, Store, close, open_reading, open_storage, read_study
from nightpress.spaces.errors import InputError

pytestmark = pytest.mark.timeout(240)

DRIVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import test_search as made
from nightpress.search.records import TrialState
from nightpress.search.policy_sampler import TrialSuggest
from nightpress.search.store import Store, open_storage
from nightpress.spaces.policy import FP32, INT8, digest
from nightpress.spaces.space import Space
from strategies import toy_anatomy
import optuna

url, driver, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
space = Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))
# The same draws in both drivers: whatever is evaluated only once, the claims kept apart.
fresh = lambda trials: optuna.samplers.RandomSampler(seed=trials // 2)
store = Store(open_storage(Path(), url), study="shared", driver=driver, sampler_at=fresh)
store.join("m")
print("ready", flush=True)
sys.stdin.readline()
done = 0
while done < count:
    trial = store.ask()
    policy = space.sample(TrialSuggest(trial))
    if store.claims.take(f"policy:{digest(policy)}") != driver or digest(policy) in {t.digest for t in store.trials()}:
        store.drop(trial)
        continue
    store.begin(trial, policy, time.time())
    store.note(trial.number, size_bytes=1,
               predicted={"latency_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "measured": False})
    store.note_quality(trial.number, made.quality(0.5))
    store.finish(trial.number, TrialState.COMPLETE, finished=time.time())
    done += 1
"""


@pytest.fixture(scope="module")
def server() -> Generator[str]:
    with postgres.server() as url:
        yield url


_opened: list[optuna.storages.BaseStorage] = []


def opened(folder: Path, url: str | None) -> optuna.storages.BaseStorage:
    """A storage whose connections end with the test."""
    _opened.append(open_storage(folder, url))
    return _opened[-1]


@pytest.fixture(autouse=True)
def closed() -> Generator[None]:
    yield
    while _opened:
        close(_opened.pop())


def begin(store: Store, policy_digest: str = "d") -> int:
    """A trial that is being evaluated."""
    trial = store.ask()
    trial.set_user_attr("digest", policy_digest)
    trial.set_user_attr("policy", {})
    return trial.number


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


@pytest.mark.slow
def test_two_drivers_on_postgresql_evaluate_nothing_twice(server: str) -> None:
    url = postgres.make_database(server, "drivers")
    words = [sys.executable, "-c", DRIVER, url]
    drivers = [
        subprocess.Popen([*words, name, "12", str(Path(__file__).parent)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]  # fmt: skip
    for driver in drivers:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n", driver.communicate()[1]
    for driver in drivers:
        assert driver.stdin is not None
        driver.stdin.write("\n")
        driver.stdin.flush()
    for driver in drivers:
        assert driver.communicate(timeout=120)[1] == ""
        assert driver.returncode == 0

    trials = read_study(Path(), url, "shared").trials

    assert len(trials) == 24
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert len({t.digest for t in trials}) == 24
    assert {name: sum(t.driver == name for t in trials) for name in "ab"} == {"a": 12, "b": 12}


@pytest.mark.slow
def test_two_hosts_share_a_night_on_postgresql(server: str, tmp_path: Path) -> None:
    """A run folder each, as on two machines; only the database is common to them."""
    url = postgres.make_database(server, "night")
    task = tiny.write_task(tmp_path)
    profile = tiny.write_profile(tmp_path / "profile.json", tiny.anatomy_of(task))
    keys = {"target": str(profile), "search": {"max_trials": 2, "storage": url}}
    keys["finetune"] = {"short_steps": 3, "long_steps": 4, "finalists": 1}
    configs = [tiny.write_config(tmp_path, f"{h}.yaml", out=str(tmp_path / h), **keys) for h in "ab"]  # type: ignore[arg-type]
    nights = [
        subprocess.Popen(
            tiny.command("run", config, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for config in configs
    ]
    for night in nights:
        _, said = night.communicate(timeout=200)
        assert night.returncode == 0, said

    runs = [read_run(tmp_path / h) for h in "ab"]

    trials = runs[0].trials
    assert runs[1].trials == trials
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert len({t.digest for t in trials if t.reused_from is None}) == sum(t.reused_from is None for t in trials)
    rules = [t.name for t in trials if t.role == "baseline"]
    assert len(rules) == len(set(rules)) >= 8
    for run in runs:
        mine = {t.number for t in trials if t.driver == run.state["driver"]}
        assert {int(p.parent.name) for p in run.path.glob("artifacts/*/long.json")} <= mine
    assert all(t.verified for t in trials if t.role == "baseline")
    assert sum(len(list(run.path.glob("artifacts/*/long.json"))) for run in runs) == sum(
        bool(t.verified) for t in trials
    )


@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_a_claim_is_given_once_and_kept(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = sqlite(tmp_path)
    if where == "postgresql":
        url = postgres.make_database(request.getfixturevalue("server"), "claims")
    storage = opened(tmp_path, url)
    assert isinstance(storage, optuna.storages.RDBStorage)
    first, second = (DatabaseClaims(storage.engine, "s", name) for name in ("a", "b"))

    assert [c.take("policy:1") for c in (first, second, second, first)] == ["a", "a", "a", "a"]
    assert second.take("policy:2") == "b"
    assert DatabaseClaims(storage.engine, "another", "b").take("policy:1") == "b"


def test_a_driver_leaves_the_trials_of_others_alone_and_takes_up_its_own(tmp_path: Path) -> None:
    url = sqlite(tmp_path)
    first, second = (Store(opened(tmp_path, url), driver=name) for name in ("a", "b"))
    number = begin(first)

    assert second.repair() == []
    assert [t.number for t in Store(opened(tmp_path, url), driver="a").repair()] == [number]
    assert not second.ours(second.trial(number))
    assert first.ours(first.trial(number))


def test_two_models_do_not_share_a_study(tmp_path: Path) -> None:
    store = Store(opened(tmp_path, sqlite(tmp_path)), study="plates", driver="a")
    assert store.join("m1") == 0
    begin(store)
    assert Store(opened(tmp_path, sqlite(tmp_path)), study="plates", driver="b").join("m1") == 1
    with pytest.raises(
        InputError, match=r"search\.study: 'plates' in this storage is a search of model m1, this run's is"
    ):
        Store(opened(tmp_path, sqlite(tmp_path)), study="plates", driver="b").join("m2")
    assert Store(opened(tmp_path, sqlite(tmp_path)), study="signs", driver="b").join("m2") == 0


def test_what_a_reader_opens_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"search.storage: there is no file .*study.db, so the run's record cannot"):
        read_study(tmp_path, sqlite(tmp_path))
    with pytest.raises(InputError, match="its study has not begun yet"):
        open_reading(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_written_down() -> None:
    url = "postgresql://night:hunter2@db.example:5432/studies?sslmode=require&password=hunter3"
    assert without_password(url) == "postgresql://night@db.example:5432/studies?sslmode=require"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://root@localhost/x", "search.storage must begin with one of sqlite://, postgresql://"),
        ("study.db", "search.storage must be a URL such as postgresql://user@host/database"),
        ("sqlite://", "search.storage names no file"),
        ("redis://localhost", "search.storage must begin with one of"),
    ],
)
def test_a_storage_that_is_none(url: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path, url)


def test_a_server_that_is_silent_is_given_up_soon() -> None:
    assert engine_options("postgresql://localhost/x")["connect_args"] == {"connect_timeout": 10}


# Records of other versions


def first_version(folder: Path) -> None:
    """A study as the first version wrote it: its schema, no driver, no model, and its approvals in one list."""
    store = Store(opened(folder, None))
    begin(store)
    store.study.set_user_attr("schema", 1)
    store.study.set_user_attr("approvals", [{"trial": 0, "who": "me"}])


def test_a_record_of_the_first_version_is_read_and_gone_on_with(tmp_path: Path) -> None:
    first_version(tmp_path)

    found = read_study(tmp_path, None)

    assert [(t.number, t.driver) for t in found.trials] == [(0, None)]
    assert found.approvals == ({"trial": 0, "who": "me"},)
    store = Store(opened(tmp_path, None))
    assert store.join("m") == 1
    assert [t.number for t in store.repair()] == [0]


def test_a_record_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    store = Store(opened(tmp_path, None))
    store.study.set_user_attr("schema", SCHEMA + 1)
    message = f"the study's attributes are of schema {SCHEMA + 1}, but this nightpress reads up to {SCHEMA}"
    with pytest.raises(InputError, match=message):
        read_study(tmp_path, None)
    with pytest.raises(InputError, match=message):
        Store(opened(tmp_path, None))


def test_a_run_of_a_version_with_fewer_keys_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a key means by default is what the version before it did."""
    config = tiny.write_config(tmp_path)
    run = tiny.write_run(config)
    import yaml

    written = yaml.safe_load((run / "config.yaml").read_text())
    del written["max_disk_bytes"], written["search"]["study"]
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    state = {"state": "interrupted", "deadline": "2026-01-31T07:00:00+00:00", "deadline_epoch": 1769842800.0}
    (run / "state.json").write_text(json.dumps(state))
    config.write_text(config.read_text().replace(f"budget: {tiny.CONFIG['budget']}\n", ""))

    sentence = tiny.refused(tiny.call("run", config, "--resume", "--json", capsys=capsys))

    assert sentence.startswith(f"{run}: its deadline")  # the config was taken
