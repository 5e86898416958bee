"""The review page served on this machine, and how a person's word comes into the record.

Only this user's browser may write. The server listens on 127.0.0.1. The page's address carries a secret of the
session, so other users of the machine cannot open it. A page of another site knows no secret, and cannot learn it:
a request must name this server as its Host (DNS rebinding) and, where the browser names one, as its Origin.
"""

import getpass
import hmac
import http.server
import json
import logging
import secrets
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..reports import ReviewLinks, page_html
from ..search.folder import read_run, study_place
from ..search.records import NOTE, PICK, REJECT, RunRecord, TrialRecord
from ..search.store import approve_trial
from ..spaces.errors import InputError

log = logging.getLogger("nightpress")
ACTIONS = (PICK, REJECT, NOTE)
MOST_BYTES, MOST_CHARACTERS = 65_536, 10_000
TOKEN = "X-Nightpress-Token"


def keep_word(run: RunRecord, trial: TrialRecord, action: str, note: str) -> dict[str, Any]:
    """Write what a person said of a trial into the run's record; returns the entry."""
    if len(note) > MOST_CHARACTERS:
        raise InputError(f"A note must have at most {MOST_CHARACTERS} characters, but got {len(note)}.")
    entry: dict[str, Any] = {
        "trial": trial.number, "digest": trial.digest, "action": action, "note": note, "who": user_name(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    approve_trial(run.path, entry, *study_place(run.config))
    return entry


def user_name() -> str:
    """Who sits here; a container may have no name for its user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


class ReviewServer(http.server.ThreadingHTTPServer):
    """Serves one run's page until it is shut down. ``words`` counts what was written."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        read_run(folder)  # what is no run is told before anything listens
        self.folder, self.token, self.words = folder, secrets.token_urlsafe(24), 0
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(f"--port: cannot listen on 127.0.0.1:{port}: {error.strerror}.") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away, a run folder that is gone: a line for whoever sits here, and the server goes on."""
        error = sys.exc_info()[1]
        log.warning("a request could not be answered: %s: %s", type(error).__name__, error)

    @property
    def url(self) -> str:
        """The page's address, with the session's secret."""
        return f"http://{self.hosts[0]}/?token={self.token}"

    @property
    def hosts(self) -> tuple[str, str]:
        """Names under which a browser of this machine reaches the server."""
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"


class _Refused(Exception):  # noqa: N818  an answer to the browser, not an error of ours
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ReviewServer  # pyright: ignore[reportIncompatibleVariableOverride]  the only server that uses it
    server_version, sys_version = "nightpress", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(self._page)

    def do_POST(self) -> None:
        self._answer(self._word)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address holds the secret, and what matters is logged where it is written."""

    def _answer(self, make: Any) -> None:
        try:
            self._check_host()
            kind, body = make()
            status = 200
        except _Refused as refused:
            status, kind, body = refused.status, "application/json", _json({"error": refused.sentence})
        except InputError as error:
            status, kind, body = 400, "application/json", _json({"error": str(error)})
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("X-Frame-Options", "DENY"),
            ("Content-Security-Policy", "frame-ancestors 'none'"), ("Cross-Origin-Resource-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _check_host(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            raise _Refused(403, "This server answers to its own address only.")

    def _check_token(self, given: str) -> None:
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise _Refused(403, "The address lacks this session's secret: open the one that nightpress review printed.")

    def _page(self) -> tuple[str, bytes]:
        address = urlsplit(self.path)
        if address.path != "/":
            raise _Refused(404, "There is nothing here.")
        self._check_token(parse_qs(address.query).get("token", [""])[0])
        links = ReviewLinks(url="/review", token=self.server.token, who=user_name())
        page = page_html(read_run(self.server.folder), review=links)
        return "text/html; charset=utf-8", page.encode("utf-8", errors="replace")

    def _word(self) -> tuple[str, bytes]:
        body = self._body()
        self._check_token(self.headers.get(TOKEN) or "")
        origins = {f"http://{host}" for host in self.server.hosts}
        if self.headers.get("Origin") not in {None, *origins}:
            raise _Refused(403, "Another site's page may not write to this record.")
        if urlsplit(self.path).path != "/review":
            raise _Refused(404, "There is nothing here.")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "A word is sent as application/json.")
        run = read_run(self.server.folder)
        trial, action, note = _parsed(run, body)
        entry = keep_word(run, trial, action, note)
        self.server.words += 1
        log.info("%s: trial %d, %s", action, trial.number, note or "no note")
        return "application/json", _json(entry)

    def _body(self) -> bytes:
        """The request's body; read before anything is refused, so that the browser can read the answer."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            raise _Refused(413, f"A word has at most {MOST_BYTES} bytes.")
        return self.rfile.read(int(length))


def _parsed(run: RunRecord, body: bytes) -> tuple[TrialRecord, str, str]:
    """The trial, the action and the note of a request. Raises InputError."""
    try:
        given = json.loads(body)
    except ValueError:
        raise InputError("The request's body must be JSON.") from None
    if not isinstance(given, dict) or given.get("action") not in ACTIONS or not isinstance(given.get("note", ""), str):
        raise InputError(f"A word needs an action ({', '.join(ACTIONS)}) and a note, which is text.")
    trial = next((t for t in run.trials if t.number == given.get("trial")), None)
    if trial is None or isinstance(given.get("trial"), bool):
        raise InputError(f"{run.path}: there is no trial {given.get('trial')!r}.")
    if given.get("digest") not in {None, trial.digest}:
        raise InputError(
            f"Trial {trial.number} is policy {trial.digest}, not {given.get('digest')!r}: reload the page."
        )
    return trial, given["action"], given.get("note", "")


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode()
