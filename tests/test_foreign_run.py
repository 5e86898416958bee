"""A run folder from somebody else: it can be read, reported and compared, and nothing in it is executed or escapes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from nightpress.search import mark
from nightpress.search.folder import read_run
from nightpress.search.store import Store, open_storage
from nightpress.spaces.policy import policy_from_json

Cli = Callable[..., tiny.Result]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: object) -> tiny.Result:
        return tiny.call(*words, capsys=capsys)

    return run


@pytest.fixture
def hostile(place: tiny.Place, tmp_path: Path) -> Path:
    """A run whose task, notifications and names would leave a file ``planted`` behind, were they executed."""
    run = tiny.write_run(tiny.config_for(place, tmp_path))
    planted = tmp_path / "planted"
    evil = run / "evil.py"
    evil.write_text(f"open({str(planted)!r}, 'w').close()\ndef build(): raise SystemExit('executed')\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"task": f"{evil}:build", "base": str(run), "notify": {"command": f"touch {planted}"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    number = tiny.add_trial(run, policy_from_json(place.policy.read_text(), "policy"))
    source = run / "artifacts" / str(number)
    source.mkdir(parents=True)
    (source / "short.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch planted'\ntR.")  # a pickle
    state = {"state": "running", "phase": "search", "model": place.anatomy.digest, "mark": "0" * 64, "seconds": {},
             "deadline": "2026-01-31T07:00:00+00:00", "task": "<script>alert(1)</script>"}  # fmt: skip
    (run / "state.json").write_text(json.dumps(state))
    return run


def test_reading_reporting_and_comparing_execute_nothing(cli: Cli, hostile: Path, tmp_path: Path) -> None:
    assert cli("status", hostile, "--json").json["state"] == "interrupted"
    assert cli("report", hostile, "--json").code == 0
    assert cli("compare", hostile, hostile, "--json").code == 0
    assert cli("approve", hostile, "0", "--note", "x", "--json").code == 0
    assert "<script>alert(1)</script>" not in (hostile / "report.html").read_text()
    assert not (tmp_path / "planted").exists()


def test_exporting_what_was_not_verified_would_execute_and_is_refused(cli: Cli, hostile: Path, tmp_path: Path) -> None:
    sentence = tiny.refused(cli("export", hostile, "0", "--out", tmp_path / "out", "--json"))
    assert f"the night did not verify trial 0, so exporting it executes {hostile}/evil.py" in sentence
    assert sentence.endswith("--run-task says that you trust its code.")
    assert not (tmp_path / "planted").exists()
    assert not (tmp_path / "out").exists()


def test_who_says_that_the_code_is_trusted_has_it_executed(cli: Cli, hostile: Path, tmp_path: Path) -> None:
    cli("export", hostile, "0", "--out", tmp_path / "out", "--run-task")
    assert (tmp_path / "planted").exists()  # so the refusal above is what kept it from being there


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch planted']", "!!python/name:os.system ''"])
def test_yaml_makes_no_objects(cli: Cli, hostile: Path, tag: str, tmp_path: Path) -> None:
    (hostile / "config.yaml").write_text(f"task: {tag}\n")
    assert "the run's config must be a YAML mapping" in tiny.refused(cli("status", hostile))
    assert not Path("planted").exists()


@pytest.mark.parametrize("name", ["../../secret.onnx", "/etc/passwd", "artifacts/../../secret.onnx"])
def test_a_path_in_a_record_does_not_lead_out_of_the_folder(cli: Cli, hostile: Path, name: str, tmp_path: Path) -> None:
    quality = {"rung": "long", "split": "test", "accuracy": 0.9, "accuracy_se": 0.1, "samples": 9, "seconds": 1.0}
    latency = {"latency_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "measured": True, "repeat_error": 0.0,
               "reference_ms": 2.0}  # fmt: skip
    verified: dict[str, Any] = {
        "quality": quality, "simulated": quality, "search_quality": quality, "latency": latency, "size_bytes": 9,
        "top1_agreement": 1.0, "max_abs_diff": 0.0, "bits_used": {}, "model_file": name,
    }  # fmt: skip
    Store(open_storage(hostile, None)).study.set_user_attr("verified:0", verified)
    sentence = tiny.refused(cli("export", hostile, "0", "--out", tmp_path / "out"))
    assert sentence == f"{hostile}: its record names the file {name!r}, which lies outside the run."


def test_a_trial_that_reuses_a_path_is_refused(cli: Cli, hostile: Path, tmp_path: Path) -> None:
    journal = hostile / "study.journal"
    with journal.open() as file:
        lines = file.read().splitlines()
    at = max(number for number, line in enumerate(lines) if '"state":"COMPLETE"' in line)
    lines.insert(at, json.dumps({**json.loads(lines[at]), "user_attr": {"reused_from": "../../.."}}))
    journal.write_text("\n".join(lines) + "\n")
    assert read_run(hostile).trials[0].reused_from == "../../.."  # type: ignore[comparison-overlap]
    sentence = tiny.refused(cli("export", hostile, "0", "--out", tmp_path / "out", "--run-task"))
    assert sentence == f"{hostile}: trial 0 reuses '../../..', which is no trial's number."


def test_a_storage_that_a_run_names_is_not_made_by_reading(cli: Cli, hostile: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((hostile / "config.yaml").read_text())
    file = tmp_path / "elsewhere.db"
    config["search"]["storage"] = f"sqlite:///{file}"
    (hostile / "config.yaml").write_text(yaml.safe_dump(config))
    assert "there is no file" in tiny.refused(cli("status", hostile, "--json"))
    assert not file.exists()


def test_a_run_of_one_s_own_is_known_by_a_key_that_nobody_else_can_read(hostile: Path) -> None:
    run = read_run(hostile)
    signed = mark.mark(run.config["task"], run.config["base"])
    state = json.loads((hostile / "state.json").read_text())
    assert not mark.is_ours(run)
    (hostile / "state.json").write_text(json.dumps({**state, "mark": signed}))
    assert mark.is_ours(read_run(hostile))
    (hostile / "state.json").write_text(json.dumps({**state, "mark": mark.mark("other.py:build", None)}))
    assert not mark.is_ours(read_run(hostile))
    key = Path(os.environ["XDG_CACHE_HOME"]) / "nightpress" / "key"
    assert key.stat().st_mode & 0o077 == 0
