"""Word to whoever is away: a real web server, real commands, and what goes wrong with them."""

import http.server
import json
import logging
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from nightpress.search.config import Notify
from nightpress.search.notify import notify

RUN = Path("runs/plates")


@contextmanager
def listening(status: int = 200, location: str | None = None) -> Generator[tuple[str, list[dict[str, Any]]]]:
    """A web server that keeps what it is sent and answers with ``status``."""
    got: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            if location is not None:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hooks/s3cret", got
        server.shutdown()


def test_a_webhook_gets_a_sentence_and_the_figures() -> None:
    with listening() as (url, got):
        notify(Notify(webhook=url), RUN, "done", "3 points on the front", trials={"COMPLETE": 4})
    [told] = got
    assert told["text"] == "nightpress runs/plates: 3 points on the front"
    assert (told["event"], told["run"], told["trials"]) == ("done", "runs/plates", {"COMPLETE": 4})
    assert told["host"]


@pytest.mark.parametrize("status", [404, 500, 302])
def test_a_webhook_that_fails_is_logged_without_its_secret(status: int, caplog: pytest.LogCaptureFixture) -> None:
    with listening(status, "http://127.0.0.1:1/elsewhere" if status == 302 else None) as (url, got):
        notify(Notify(webhook=url), RUN, "trouble", "the disk is full")
    assert len(got) == 1
    assert caplog.messages == [f"notify.webhook: 127.0.0.1 does not take the message (HTTP {status})"]


def test_a_webhook_where_nobody_listens_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    notify(Notify(webhook="http://127.0.0.1:1/s3cret"), RUN, "done", "x")
    assert caplog.messages == ["notify.webhook: 127.0.0.1 does not take the message (URLError)"]


def test_a_webhook_that_does_not_speak_http_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        notify(Notify(webhook=f"http://127.0.0.1:{server.getsockname()[1]}/s3cret"), RUN, "done", "x")
        thread.join()
    assert caplog.messages == ["notify.webhook: 127.0.0.1 does not take the message (BadStatusLine)"]


def test_a_command_is_told_by_its_environment_and_no_text_becomes_a_command(tmp_path: Path) -> None:
    told, planted = tmp_path / "told", tmp_path / "planted"
    command = f'printf "%s|%s|%s" "$NIGHTPRESS_EVENT" "$NIGHTPRESS_RUN" "$NIGHTPRESS_TEXT" > {told}'
    notify(Notify(command=command), RUN, "trouble", f'"; touch {planted}; $(touch {planted})')
    event, run, text = told.read_text().split("|")
    assert (event, run) == ("trouble", "runs/plates")
    assert text == f'nightpress runs/plates: "; touch {planted}; $(touch {planted})'
    assert not planted.exists()


def test_a_command_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    notify(Notify(command="echo no such host >&2; exit 3"), RUN, "done", "x")
    assert caplog.messages == ["notify.command: exit code 3: no such host"]


def test_nobody_asked_nobody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    notify(Notify(), RUN, "done", "x")
    assert caplog.messages == []


def test_what_ends_a_night_is_told_and_who_is_told_is_not_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that cannot be built ends the night at once."""
    with listening() as (url, got):
        command = f"echo $NIGHTPRESS_EVENT > {tmp_path / 'event'}"
        config = tiny.write_config(tmp_path, task="none.py:build", notify={"webhook": url, "command": command})
        result = tiny.call("run", config, "--json", capsys=capsys)
    assert result.code == 2
    assert [told["event"] for told in got] == ["failed"]
    assert (tmp_path / "event").read_text() == "failed\n"
    run = tiny.write_run(config)
    assert "s3cret" not in (run / "config.yaml").read_text()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host/x"])
def test_a_webhook_is_a_web_address(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.write_config(tmp_path, notify={"webhook": url})
    sentence = tiny.refused(tiny.call("run", config, "--json", capsys=capsys))
    assert "notify.webhook must be a URL that begins with https://" in sentence
    assert url not in sentence
