"""optuna-dashboard on a run: on this machine only, and reading only."""

import socketserver
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .options import Port, RunDir
from .output import say, serve

Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


def dashboard(
    folder: RunDir,
    port: Port = 0,
) -> None:
    """Optuna's dashboard on a run, on this machine and read-only. Example: nightpress dashboard runs/plates"""
    with make_server(folder, port) as server:
        say(f"dashboard of {folder} at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        serve(server)


def make_server(folder: Path, port: int) -> wsgiref.simple_server.WSGIServer:
    """A server on 127.0.0.1, not yet running. Raises InputError when the run or the dashboard is missing."""
    from ..search.folder import read_run, study_place
    from ..search.store import open_reading
    from ..spaces.errors import InputError

    run = read_run(folder)
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise InputError("nightpress dashboard needs optuna-dashboard: pip install 'nightpress[dashboard]'.") from None
    app = reading_only(wsgi(open_reading(folder, *study_place(run.config))))
    try:
        return wsgiref.simple_server.make_server("127.0.0.1", port, app, _Server, _Handler)
    except OSError as error:
        raise InputError(f"--port: cannot listen on 127.0.0.1:{port}: {error.strerror}.") from None


def reading_only(app: Wsgi) -> Wsgi:
    """The dashboard can rename and delete studies; a page of another site could ask for that, or read it under a name
    of its own (DNS rebinding). So nothing but reading, and only under this machine's own name."""

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        hosts = {f"{name}:{environ['SERVER_PORT']}" for name in ("127.0.0.1", "localhost")}
        if environ.get("HTTP_HOST") not in hosts:
            return _refuse(start, "403 Forbidden", "This server answers to its own address only.")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(start, "405 Method Not Allowed", "A run's record is only read here.")
        return app(environ, start)

    return answer


def _refuse(start: Any, status: str, sentence: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [sentence.encode()]


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""
