"""A person's word: kept with name, time and digest, the last one counts, and nobody else's page can give it."""

import http.client
import json
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import exports
import tiny
from nightpress.cli.reviewing import ReviewServer, keep_word
from nightpress.export import Options, export_trial
from nightpress.search.records import last_word
from nightpress.search.store import Store, open_storage
from nightpress.spaces.errors import InputError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

APPROVED = Options(require_approval=True)


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to write into."""
    return exports.copy_of(exports.run_folder(tmp_path_factory), tmp_path)


# On the command line


def test_the_last_word_counts(run: Path, cli: tiny.Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("export", run, "2", "--out", out, "--require-approval", "--json")

    nobody = tiny.refused(cli(*words))
    cli("approve", run, "2", "--note", "fine", "--json")
    assert cli(*words).code == 0
    entry = cli("reject", run, "2", "--note", "small plates are missed", "--json").json
    rejected = cli(*words, "--force")

    assert nobody == (
        f"{run}: trial 2 needs an approval, but nobody approved it; nightpress approve {run} 2 --note TEXT gives one."
    )
    assert rejected.code == 2
    assert f"trial 2 needs an approval, but {entry['who']} rejected it" in rejected.sentence
    cli("approve", run, "2", "--note", "retrained", "--json")
    assert cli(*words, "--force").code == 0
    assert "approved by" in (out / "card.md").read_text()
    assert "rejected by" in (out / "card.md").read_text()


def test_a_rejection_keeps_who_when_what_and_why(run: Path, cli: tiny.Cli) -> None:
    before = time.time()
    entry = cli("reject", run, "1", "--note", "  two\nlines | <b> ", "--json").json
    trial = exports.record(run).trials[1]
    assert entry == {
        "trial": 1, "digest": trial.digest, "action": "reject", "note": "  two\nlines | <b> ", "who": entry["who"],
        "time": entry["time"],
    }  # fmt: skip
    assert entry["who"]
    assert before - 1 <= time.mktime(time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S")) <= time.time()
    assert exports.record(run).approvals == (entry,)
    assert last_word(exports.record(run), trial) == entry


def test_a_rejected_point_is_marked_in_the_report(run: Path, cli: tiny.Cli) -> None:
    cli("reject", run, "1", "--note", "misses small plates", "--json")
    assert "misses small plates" in (run / "report.html").read_text()


def test_a_word_on_another_policy_of_the_same_number_does_not_count(run: Path, cli: tiny.Cli, tmp_path: Path) -> None:
    Store(open_storage(run, None)).approve(
        {"trial": 2, "digest": "0" * 12, "note": "another run's", "who": "ada", "time": "now"}
    )
    assert "nobody approved it" in tiny.refused(
        cli("export", run, "2", "--out", tmp_path / "out", "--require-approval", "--json")
    )


def test_approvals_of_the_first_version_still_count(run: Path, tmp_path: Path) -> None:
    """They stood in one list, and had no action."""
    digest = exports.record(run).trials[2].digest
    entry = {"trial": 2, "digest": digest, "note": "checked", "who": "ada", "time": "2026-01-31T07:10:00+0000"}
    Store(open_storage(run, None)).study.set_user_attr("approvals", [entry])
    record = exports.record(run)
    assert record.approvals == (entry,)
    export_trial(record, record.trials[2], tmp_path / "out", APPROVED)
    assert "approvals: approved by ada, 2026-01-31T07:10:00+0000: checked" in (tmp_path / "out" / "card.md").read_text()


def test_a_note_decides_nothing(run: Path, tmp_path: Path) -> None:
    record = exports.record(run)
    keep_word(record, record.trials[2], "note", "look again")
    record = exports.record(run)
    assert [entry["note"] for entry in record.approvals] == ["look again"]
    assert last_word(record, record.trials[2]) is None
    with pytest.raises(InputError, match="nobody approved it"):
        export_trial(record, record.trials[2], tmp_path / "out", APPROVED)


def test_words_given_at_once_are_all_kept(run: Path) -> None:
    record = exports.record(run)

    def speak(name: str) -> None:
        for number in range(5):
            keep_word(record, record.trials[number % 4], "note", f"{name}{number}")

    speakers = [threading.Thread(target=speak, args=(name,)) for name in "abc"]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join()
    notes = [entry["note"] for entry in exports.record(run).approvals]
    assert sorted(notes) == sorted(f"{name}{number}" for name in "abc" for number in range(5))
    assert [note for note in notes if note.startswith("a")] == [f"a{number}" for number in range(5)]


@pytest.mark.parametrize("command", ["approve", "reject"])
def test_a_trial_that_does_not_exist(run: Path, cli: tiny.Cli, command: str) -> None:
    sentence = tiny.refused(cli(command, run, "77", "--note", "x", "--json"))
    assert "the number of one of its 4 trials, but got '77'" in sentence
    assert exports.record(run).approvals == ()


# In the browser


@contextmanager
def serving(run: Path) -> Generator[ReviewServer]:
    with ReviewServer(run, 0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


@pytest.fixture
def server(run: Path) -> Generator[ReviewServer]:
    with serving(run) as found:
        yield found


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Generator[ReviewServer]:
    """A server whose record must stay empty."""
    run = exports.run_folder(tmp_path_factory)
    with serving(exports.copy_of(run, tmp_path_factory.mktemp("untouched"))) as found:
        yield found
        assert exports.record(found.folder).approvals == ()


def ask(
    server: ReviewServer, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str, Mapping[str, str]]:
    """Status, body and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, dict(headers or {}))
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", errors="replace")
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def speak(server: ReviewServer, word: object, **headers: str | None) -> tuple[int, Any]:
    """POST a word as the page does; a header can be replaced or, by None, left out."""
    given = {
        "Content-Type": "application/json", "X-Nightpress-Token": server.token,
        "Origin": f"http://127.0.0.1:{server.server_port}",
    }  # fmt: skip
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {name: value for name, value in given.items() if value is not None}
    status, text, _ = ask(server, "POST", "/review", word, sent)
    return status, json.loads(text)


def word(server: ReviewServer, **fields: object) -> dict[str, object]:
    trial = exports.record(server.folder).trials[2]
    return {"trial": 2, "digest": trial.digest, "action": "pick", "note": "fine", **fields}


def test_the_page_has_buttons_and_is_not_kept_by_caches_or_frames(untouched: ReviewServer) -> None:
    status, text, headers = ask(untouched, "GET", f"/?token={untouched.token}")
    assert status == 200
    assert untouched.token in text
    assert "/review" in text
    assert (headers["Cache-Control"], headers["X-Frame-Options"]) == ("no-store", "DENY")
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_a_word_is_written_to_the_record(server: ReviewServer) -> None:
    status, entry = speak(server, word(server, note="gut & <fine>"))
    assert status == 200
    assert (entry["trial"], entry["action"], entry["note"]) == (2, "pick", "gut & <fine>")
    assert entry.keys() == {"trial", "digest", "action", "note", "who", "time"}
    speak(server, word(server, action="reject", note=""))
    record = exports.record(server.folder)
    assert record.approvals[0] == entry
    assert [a["action"] for a in record.approvals] == ["pick", "reject"]
    assert server.words == 2


def test_the_server_listens_on_this_machine_only(untouched: ReviewServer) -> None:
    assert untouched.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/", "/?token=", "/?token=wrong", "/?token=%00", "/?token=%C3%A4"])
def test_the_page_needs_the_session_s_secret(untouched: ReviewServer, path: str) -> None:
    status, text, _ = ask(untouched, "GET", path)
    assert status == 403
    assert untouched.token not in text
    assert "secret" in json.loads(text)["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X_Nightpress_Token": None}, 403),
        ({"X_Nightpress_Token": "wrong"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": None}, 415),
    ],
)
def test_another_site_s_page_cannot_write(untouched: ReviewServer, headers: dict[str, str | None], status: int) -> None:
    found, answer = speak(untouched, word(untouched), **headers)
    assert found == status
    assert answer["error"].endswith(".")


def test_a_program_without_a_browser_may_write_with_the_secret(server: ReviewServer) -> None:
    assert speak(server, word(server), Origin=None)[0] == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "The request's body must be JSON."),
        (b"\xff\xfe", "The request's body must be JSON."),
        ([1], "A word needs an action (pick, reject, note) and a note, which is text."),
        ({"trial": 2, "action": "delete"}, "A word needs an action (pick, reject, note) and a note, which is text."),
        ({"trial": 2, "action": "pick", "note": 3}, "A word needs an action"),
        ({"trial": 77, "action": "pick"}, "there is no trial 77."),
        ({"trial": "../2", "action": "pick"}, "there is no trial '../2'."),
        ({"trial": True, "action": "pick"}, "there is no trial True."),
        ({"trial": [2], "action": "pick"}, "there is no trial [2]."),
        ({"trial": 2, "digest": "0" * 12, "action": "pick"}, "not '000000000000': reload the page."),
        ({"trial": 2, "action": "note", "note": "x" * 10_001}, "at most 10000 characters, but got 10001."),
    ],
)
def test_a_word_that_makes_no_sense(untouched: ReviewServer, body: object, sentence: str) -> None:
    status, answer = speak(untouched, body)
    assert status == 400
    assert sentence in answer["error"]


@pytest.mark.parametrize("length", ["70000", "-1", "x"])
def test_a_body_without_a_bearable_length(untouched: ReviewServer, length: str) -> None:
    status, answer = speak(untouched, b"", Content_Length=length)
    assert (status, answer["error"]) == (413, "A word has at most 65536 bytes.")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/study.journal"), ("GET", "/../config.yaml"), ("POST", "/other")]
)
def test_nothing_else_is_served(untouched: ReviewServer, method: str, path: str) -> None:
    headers = {"X-Nightpress-Token": untouched.token, "Content-Type": "application/json"}
    assert ask(untouched, method, path, b"{}" if method == "POST" else None, headers)[0] == 404


def test_a_run_that_is_gone_ends_one_request_and_not_the_server(run: Path) -> None:
    with serving(run) as server:
        (run / "state.json").unlink()
        status, text, _ = ask(server, "GET", f"/?token={server.token}")
        assert (status, json.loads(text)["error"]) == (400, f"{run}: not a run folder: it has no state.json.")
        assert ask(server, "GET", "/elsewhere")[0] == 404


def test_a_port_that_is_taken(untouched: ReviewServer, cli: tiny.Cli) -> None:
    sentence = tiny.refused(cli("review", untouched.folder, "--port", untouched.server_port))
    assert sentence.startswith(f"--port: cannot listen on 127.0.0.1:{untouched.server_port}: ")


def test_a_folder_that_is_no_run(cli: tiny.Cli, tmp_path: Path) -> None:
    assert "not a run folder" in tiny.refused(cli("review", tmp_path))


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_with_ctrl_c(run: Path) -> None:
    process = subprocess.Popen(
        tiny.command("review", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    port = int(line.split("127.0.0.1:")[1].split("/")[0])
    token = line.split("token=")[1].split()[0]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"trial": 3, "action": "reject", "note": "no"})
    connection.request("POST", "/review", body, {"Content-Type": "application/json", "X-Nightpress-Token": token})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert out.endswith(f"1 entry kept in {run}\n")
    assert exports.record(run).approvals[0]["trial"] == 3
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_words_from_two_tabs_reach_the_record_and_the_page(
    server: ReviewServer, browser: "Browser", cli: tiny.Cli, tmp_path: Path
) -> None:
    problems: list[str] = []
    tabs = [browser.new_page() for _ in range(2)]
    for tab in tabs:
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text))
        tab.goto(server.url)
        tab.locator("#choose").select_option("2")
    said = [
        (0, "Pick", "pick", "fine"),
        (1, "Reject", "reject", "<b>misses</b> small plates"),
        (0, "Keep note", "note", "x"),
    ]
    for tab, button, action, note in said:
        tabs[tab].locator("#review-note").fill(note)
        tabs[tab].get_by_role("button", name=button, exact=True).click()
        tabs[tab].locator(f".said-{action}").wait_for()
    # Each tab shows what it sent; a page opened later shows what both did.
    assert tabs[0].locator(".said").count() == 2
    tabs[1].goto(server.url)
    tabs[1].locator("#choose").select_option("2")
    assert [text.split(": ")[1] for text in tabs[1].locator(".said").all_inner_texts()] == [note for *_, note in said]
    for tab in tabs:
        tab.close()
    assert problems == []
    kept = [(entry["trial"], entry["action"], entry["note"]) for entry in exports.record(server.folder).approvals]
    assert kept == [(2, action, note) for _, _, action, note in said]
    assert "rejected it" in tiny.refused(
        cli("export", server.folder, "2", "--out", tmp_path / "out", "--require-approval")
    )
