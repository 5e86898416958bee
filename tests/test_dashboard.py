"""Optuna's dashboard on a run: it shows the study, to this machine only, and changes nothing."""

import http.client
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tiny
from nightpress.spaces.policy import policy_from_json

pytest.importorskip("optuna_dashboard", reason="the extra dashboard is not installed")
from nightpress.cli.dashboard import make_server
from nightpress.spaces.errors import InputError


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tiny.place(tmp_path_factory)
    folder = tiny.write_run(tiny.config_for(place, tmp_path))
    tiny.add_trial(folder, policy_from_json(place.policy.read_text(), "policy"))
    return folder


@contextmanager
def served(folder: Path) -> Generator[int]:
    with make_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def ask(port: int, method: str, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_it_shows_the_study_and_leaves_the_record_alone(run: Path) -> None:
    before = tiny.bare(run)
    with served(run) as port:
        status, page = ask(port, "GET", "/dashboard")
        studies = json.loads(ask(port, "GET", "/api/studies")[1])["study_summaries"]
        detail = json.loads(ask(port, "GET", "/api/studies/0?after=0")[1])
    assert status == 200
    assert b"<html" in page.lower()
    assert [s["study_name"] for s in studies] == ["nightpress"]
    assert [t["state"] for t in detail["trials"]] == ["Complete"]
    assert detail["trials"][0]["values"][0] == 0.9
    assert tiny.bare(run) == before


def test_it_only_reads(run: Path) -> None:
    before = tiny.bare(run)
    with served(run) as port:
        for method, path in (("DELETE", "/api/studies/0"), ("POST", "/api/studies"), ("PUT", "/api/studies/0/note")):
            status, text = ask(port, method, path)
            assert status == 405
            assert text == b"A run's record is only read here."
    assert tiny.bare(run) == before


def test_it_answers_to_its_own_name_only(run: Path) -> None:
    with served(run) as port:
        assert ask(port, "GET", "/api/studies", host=f"localhost:{port}")[0] == 200
        assert ask(port, "GET", "/api/studies", host=f"evil.example:{port}")[0] == 403


def test_a_run_that_has_no_study_yet(tmp_path: Path) -> None:
    run = tiny.write_run(tiny.write_config(tmp_path))
    with pytest.raises(InputError, match="its study has not begun yet"):
        make_server(run, 0)
    with pytest.raises(InputError, match="not a run folder"):
        make_server(tmp_path / "none", 0)
