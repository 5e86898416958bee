"""Several points to switch between: which of the front, what set.json says, and a loader that obeys the rule."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import exports
import fakes_run
import tiny
from nightpress.export import Options, export_set, verify
from nightpress.export.bundle import timer_script
from nightpress.export.fronts import spread
from nightpress.search.records import TrialRecord
from nightpress.spaces.errors import InputError
from serve import Model, Server, choose, load_set, send


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.run_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def pristine(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three; to be read only."""
    out = tmp_path_factory.mktemp("sets") / "three"
    record = exports.record(run)
    export_set(record, record.trials[::-1], 3, out)
    return out


# Which points


def front(*latencies_ms: float) -> list[TrialRecord]:
    return [fakes_run.trial(i, latency_ms=value) for i, value in enumerate(latencies_ms)]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12, unique=True), st.integers(2, 6))
def test_a_spread_holds_both_ends_and_no_point_twice(latencies_ms: list[float], count: int) -> None:
    chosen = [t.latency.latency_ms for t in spread(front(*latencies_ms), count) if t.latency]
    assert len(chosen) == len(set(chosen)) == min(count, len(latencies_ms))
    assert chosen == sorted(chosen)
    assert {chosen[0], chosen[-1]} == {min(latencies_ms), max(latencies_ms)}


def test_a_spread_is_even_on_a_logarithmic_scale() -> None:
    chosen = spread(front(1, 1.1, 1.2, 9, 10.5, 90, 95, 100), 3)
    assert [t.number for t in chosen] == [0, 4, 7]


# The folder


def test_a_set_is_exports_with_a_rule(pristine: Path) -> None:
    listing = json.loads((pristine / "set.json").read_text())
    assert "most accurate one whose latency_ms is within the budget" in listing["rule"]
    assert [m["trial"] for m in listing["models"]] == [3, 2, 0]  # 0.05, 0.1 (nearest to the middle), 0.4 ms
    assert [m["latency_ms"] for m in listing["models"]] == [0.05, 0.1, 0.4]
    assert {json.dumps(m["input"]) for m in listing["models"]} == {
        '{"name": "input", "shape": [null, 1, 8, 8], "type": "float"}'
    }
    assert sorted(path.name for path in pristine.iterdir()) == sorted(
        [*(m["dir"] for m in listing["models"]), "set.json"]
    )
    for entry in listing["models"]:
        manifest = json.loads((pristine / entry["dir"] / "manifest.json").read_text())
        assert (manifest["trial"], manifest["measured"]["accuracy"]) == (entry["trial"], entry["accuracy"])


def test_the_command_takes_the_run_s_front(run: Path, cli: tiny.Cli, tmp_path: Path) -> None:
    data = cli("export", run, "--set", "2", "--out", tmp_path / "set", "--json").json
    again = cli("export", run, "--set", "2", "--out", tmp_path / "again", "--json").json
    assert len(data["models"]) == 2
    assert data["models"][0]["latency_ms"] < data["models"][1]["latency_ms"]
    assert data["models"][0]["accuracy"] < data["models"][1]["accuracy"]
    assert data["manifest"] == again["manifest"]  # which names those of its exports


def test_a_trial_beside_a_set_is_refused(run: Path, cli: tiny.Cli, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("export", run, "2", "--set", "2", "--out", tmp_path / "set", "--json"))
    assert sentence == "--set takes points of the front by itself, so TRIAL '2' cannot stand beside it."


def test_a_front_with_fewer_points_is_refused(run: Path, tmp_path: Path) -> None:
    record = exports.record(run)
    with pytest.raises(InputError, match=r"--set 3 needs 3 points, but the front has 2\."):
        export_set(record, record.trials[:2], 3, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_rejected_points_and_where_asked_unapproved_ones_are_passed_over(run: Path, tmp_path: Path) -> None:
    record = exports.record(run)
    words = [
        {"trial": t.number, "digest": t.digest, "action": action, "who": "ada", "note": "", "time": "now"}
        for t, action in zip(record.trials, ("pick", "reject", "pick", "note"), strict=True)
    ]
    judged = replace(record, approvals=tuple(words))
    data = export_set(judged, record.trials, 3, tmp_path / "set")
    assert [m["trial"] for m in data["models"]] == [3, 2, 0]
    approved = Options(require_approval=True)
    reasons = r"the front has 4, of which 2 are passed over: trial 1 \(rejected by ada\), trial 3 \(not approved\)\."
    with pytest.raises(InputError, match=r"--set 3 needs 3 points, but " + reasons):
        export_set(judged, record.trials, 3, tmp_path / "approved", approved)
    assert [m["trial"] for m in export_set(judged, record.trials, 2, tmp_path / "two", approved)["models"]] == [2, 0]


def test_a_set_that_exists_is_refused_and_replaced_by_force(run: Path, tmp_path: Path) -> None:
    record, out = exports.record(run), tmp_path / "set"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="the export folder exists already"):
        export_set(record, record.trials, 2, out)
    export_set(record, record.trials, 2, out, Options(force=True))
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# The gate


def test_a_set_is_verified_export_by_export(pristine: Path, cli: tiny.Cli, run: Path, tmp_path: Path) -> None:
    data = exports.split_file(run, tmp_path / "test.npz")
    answer = cli("verify", pristine, "--data", data, "--no-latency", "--json").json
    names = [entry["dir"] for entry in json.loads((pristine / "set.json").read_text())["models"]]
    assert [check["name"] for check in answer["checks"]] == [
        f"{name}/{check}" for name in names for check in ("files", "outputs", "accuracy")
    ]
    assert {check["state"] for check in answer["checks"]} == {"ok"}


def test_a_tampered_export_of_a_set_is_named(pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "set"))
    first, second, third = (entry["dir"] for entry in json.loads((folder / "set.json").read_text())["models"])
    (folder / first / "card.md").write_text("better")
    manifest = folder / second / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"trial"', '"trail"'))
    shutil.rmtree(folder / third)
    checks = verify.verify(folder, verify.Options(latency=False), timer_script())
    assert [(check.name, check.state) for check in checks] == [
        (f"{first}/files", "failed"), (f"{second}/files", "failed"), (f"{third}/files", "failed"),
    ]  # fmt: skip
    assert "card.md" in checks[0].text
    assert checks[1].text == "its manifest.json is not the one of set.json"
    assert checks[2].text == "set.json names it, but it is not an export"


# The loader


def model(name: str, accuracy: float, latency_ms: float, shape: tuple[int, ...] = (1, 8, 8)) -> Model:
    return Model(name, accuracy, latency_ms, shape, None)


MODELS = [
    model("fast", 0.8, 1.0),
    model("middle", 0.9, 2.0),
    model("slow", 0.95, 5.0),
    model("wide", 0.99, 1.0, (1, 16, 16)),
]


@pytest.mark.parametrize(
    ("budget_ms", "expected"),
    [(math.inf, "slow"), (5.0, "slow"), (4.9, "middle"), (2.0, "middle"), (1.5, "fast"), (0.5, "fast"), (-3.0, "fast")],
)
def test_the_budget_chooses_the_model(budget_ms: float, expected: str) -> None:
    assert choose(MODELS, budget_ms, (1, 8, 8)).name == expected


def test_the_input_s_resolution_chooses_the_model() -> None:
    assert choose(MODELS, 0.1, (1, 16, 16)).name == "wide"
    with pytest.raises(LookupError, match=r"no model takes inputs of shape \(3, 4, 4\)"):
        choose(MODELS, 1.0, (3, 4, 4))


def test_the_loader_reads_the_set(pristine: Path, run: Path) -> None:
    models = load_set(pristine, runs=3)
    assert len(models) == 3
    assert [m.latency_ms for m in models] == sorted(m.latency_ms for m in models)
    stated = {m["dir"]: m["accuracy"] for m in json.loads((pristine / "set.json").read_text())["models"]}
    assert {m.name: m.accuracy for m in models} == stated
    batch = verify.probe_inputs((1, 8, 8), 2)
    for found in models:
        probe = json.loads((pristine / found.name / "manifest.json").read_text())["probe"]
        np.testing.assert_allclose(found(batch), probe, atol=1e-5)


def test_a_backlog_is_answered_by_faster_models_and_calm_by_the_best(pristine: Path) -> None:
    """Latencies as if the models were slow, so that what is chosen does not depend on the machine."""
    stated = {"0": 30.0, "1": 100.0, "2": 400.0}
    models = [replace(m, latency_ms=stated[m.name[0]]) for m in load_set(pristine, runs=1)]
    batch = verify.probe_inputs((1, 8, 8), 1)
    server = Server(models, budget_ms=500)
    alone = server.submit(batch).result(timeout=10)[1]
    heavy = np.repeat(batch, 2000, axis=0)  # the first is not over before all are there
    crowd = [server.submit(heavy) for _ in range(40)]
    answered = [future.result(timeout=30)[1] for future in crowd]
    server.close()
    assert alone.startswith("2-")  # 400 ms are within 500
    assert answered[1].startswith("0-")  # 500 ms for some forty: the fastest


def test_a_request_that_fails_does_not_end_the_service(pristine: Path) -> None:
    server = Server(load_set(pristine, runs=1), budget_ms=50)
    bad = server.submit(np.zeros((1, 1, 8, 8), np.float64))  # type: ignore[arg-type]
    with pytest.raises(Exception, match="double"):  # the runtime's own type
        bad.result(timeout=10)
    assert server.submit(verify.probe_inputs((1, 8, 8), 1)).result(timeout=10)[0].shape == (1, 4)
    server.close()


def test_every_request_of_a_load_is_answered(pristine: Path) -> None:
    models = load_set(pristine, runs=3)
    answered = send(Server(models, 100.0), verify.probe_inputs((1, 8, 8), 1), [(100, 0.2), (500, 0.2)])
    assert [sum(a.phase == phase for a in answered) for phase in (0, 1)] == [20, 100]
    assert all(a.latency_ms > 0 for a in answered)
