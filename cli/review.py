"""Commands of the morning: a person's word on the points of a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .night import write_page
from .options import Json, Port, RunDir
from .output import emit, log_to_stderr, say, serve
from .points import find_trial

Trial = Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's number, or best, knee, fastest, accurate.")]
Note = Annotated[str, typer.Option("--note", metavar="TEXT", help="Why; kept with name, time and digest.")]


def approve(folder: RunDir, trial: Trial, note: Note, json: Json = False) -> None:
    """A person's word that a point may be shipped. Example: nightpress approve runs/plates best --note "checked" """
    from ..search.records import PICK

    _keep(folder, trial, PICK, note, json, "approved")


def reject(folder: RunDir, trial: Trial, note: Note, json: Json = False) -> None:
    """A person's word that a point must not be shipped; the last word counts.
    Example: nightpress reject runs/plates 12 --note "misses small plates" """
    from ..search.records import REJECT

    _keep(folder, trial, REJECT, note, json, "rejected")


def review(
    folder: RunDir,
    port: Port = 0,
) -> None:
    """Serve the report on this machine, with buttons to pick and reject points.
    Example: nightpress review runs/plates"""
    from .reviewing import ReviewServer

    log_to_stderr()
    with ReviewServer(folder, port) as server:
        say(f"review {folder} at {server.url} (Ctrl-C ends it)")
        serve(server)
    if server.words:
        write_page(folder, folder / "report.html")
    say(f"{server.words} {'entry' if server.words == 1 else 'entries'} kept in {folder}")


def _keep(folder: Path, trial: str, action: str, note: str, json: bool, done: str) -> None:
    from ..search.folder import read_run
    from .reviewing import keep_word

    record = read_run(folder)
    chosen = find_trial(record, trial)
    entry: dict[str, Any] = keep_word(record, chosen, action, note)
    write_page(folder, folder / "report.html")  # so that it shows the word
    if json:
        emit(entry)
    else:
        say(f"trial {chosen.number} ({chosen.digest}) {done} by {entry['who']}")
