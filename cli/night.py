"""Commands on a run: start it, watch it, read it."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .options import ForceProfile, Json, RunDir
from .output import emit, log_to_stderr, say, table

if TYPE_CHECKING:
    from ..search.clock import Deadline
    from ..search.config import RunConfig
    from ..search.process import WorkerProcess
    from ..search.records import RunRecord

T = TypeVar("T")


def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A run's config.")],
    until: Annotated[str | None, typer.Option("--until", help="Done by then: 07:00 or an ISO 8601 time.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Done after so long: 8h, 1h30m, 600s.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="The run folder; wins over the config.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run folder that is there.")] = False,
    force: ForceProfile = False,
    json: Json = False,
) -> int:
    """One night: search, verify, report. Example: nightpress run config.yaml --until 07:00"""
    from ..search.ahead import started_ahead
    from .config import deadline_of, load_config

    settings = replace(load_config(config, out), force=force)
    deadline = deadline_of(settings, until, budget)
    with started_ahead(settings, resume=resume) as worker:  # before what the driver itself imports
        return _night(settings, deadline, resume=resume, ahead=worker, json=json)


def _night(
    settings: "RunConfig", deadline: "Deadline | None", *, resume: bool, ahead: "WorkerProcess | None", json: bool
) -> int:
    from ..reports import summary
    from ..search.folder import read_run
    from ..search.night import run_night
    from ..search.notify import notify
    from .live import watching

    live = sys.stderr.isatty()
    if not live:
        log_to_stderr()
    try:
        with watching(live) as watch:
            state = run_night(settings, deadline, resume=resume, watch=watch, ahead=ahead)
        start = time.monotonic()
        page = write_page(settings.out, settings.out / "report.html")
        _add_seconds(settings.out, "report", time.monotonic() - start)
        record = read_run(settings.out)
    except BaseException as error:
        ending = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        notify(settings.notify, settings.out, ending, f"{type(error).__name__}: {error}")
        raise
    data = summary(record)
    found = f"{state}; {len(data['front'])} points on the front, {sum(data['trials'].values())} trials; report: {page}"
    notify(settings.notify, settings.out, state, found, trials=data["trials"], hypervolume=data["hypervolume"])
    if json:
        emit(data)
    else:
        _print_night(record, page)
    return {"interrupted": 130, "failed": 1}.get(state, 0)


def status(folder: RunDir, json: Json = False) -> None:
    """How a run stands, also while it goes on. Example: nightpress status runs/plates"""
    from ..reports import summary
    from ..search.folder import read_run
    from ..search.glance import apart

    data = summary(read_run(folder))
    if json:
        emit(data)
        return
    left = _left(data)
    shown = apart(data["trials"], data["waiting"])
    counts = ", ".join(f"{count} {name.lower()}" for name, count in shown.items() if count)
    say(f"{data['run']}: {data['state']}, phase {data['phase']}, deadline {data['deadline']}{left}")
    say(f"trials: {counts or 'none yet'}")
    _caveat(data["forced"])
    _print_rows("Best points so far", data["front"])


def report(
    folder: RunDir,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write it; a folder for png and svg.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="FORMAT", help="html, md, csv, parquet, png or svg; default: as --out ends, or html."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write the report of a run. Example: nightpress report runs/plates --out report.md"""
    from ..reports import FORMATS, summary
    from ..search.folder import read_run
    from ..spaces.errors import InputError

    if form is None:
        ending = out.suffix.removeprefix(".") if out is not None else ""
        form = ending if ending in FORMATS else "html"
    if form not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, but got {form!r}.")
    wanted = out or folder / FORMATS[form].default
    if form == "html":
        files = [write_page(folder, wanted)]
    else:
        files = _writing(wanted, lambda: FORMATS[form].write(read_run(folder), wanted))
    if json:
        emit({**summary(read_run(folder)), "report": str(files[0]), "files": [str(file) for file in files]})
    else:
        say(f"wrote {', '.join(str(file) for file in files)}")


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Two or more run folders.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="compare.html", help="Write it as a page, too.")] = None,
    json: Json = False,
) -> None:
    """Fronts of several runs beside each other. Example: nightpress compare runs/a runs/b --out compare.html"""
    from ..reports import compare_runs, forced, write_comparison
    from ..search.folder import read_run
    from ..spaces.errors import InputError

    if len(folders) < 2:
        raise InputError("compare needs at least two run folders.")
    runs = [read_run(folder) for folder in folders]
    data = compare_runs(runs)
    if out is not None:
        _writing(out, lambda: write_comparison(runs, out))
    if json:
        emit({**data, **({"page": str(out)} if out is not None else {})})
        return
    table("Runs", data["runs"], ["run", "state", "hypervolume_common", "hypervolume_common_se", "trials", "front"])
    table("What the first covers more than others", data["gains"])
    table("What differs", data["differences"])
    table("Which points dominate which", data["dominance"])
    table("Common front", data["front"], ["run", "trial", "accuracy", "latency_ms", "size_bytes"])
    for run in runs:
        _caveat(forced(run), f" of {run.path}")
    if out is not None:
        say(f"wrote {out}")


def _caveat(forced: str | None, whose: str = "") -> None:
    if forced is not None:
        say(f"The latencies{whose} may not hold: {forced}.")


def write_page(folder: Path, out: Path) -> Path:
    """A run's page and tables anew; returns the page. Raises InputError when they cannot be written."""
    from ..reports import write_report, write_tables
    from ..search.folder import read_run

    record = read_run(folder)
    _writing(out, lambda: write_report(record, out))
    _writing(folder, lambda: write_tables(record, folder))
    return out


def _writing(out: Path, write: Callable[[], T]) -> T:
    """What ``write`` returns. Raises InputError when the file cannot be written."""
    from ..spaces.errors import InputError

    try:
        return write()
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}.") from None


def _add_seconds(folder: Path, phase: str, seconds: float) -> None:
    from ..search.folder import STATE, RunFolder

    run_folder = RunFolder(folder)
    state = run_folder.read_json(STATE)
    state.setdefault("seconds", {})[phase] = round(seconds, 2)
    run_folder.write_json(STATE, state)


def _left(data: dict[str, Any]) -> str:
    from datetime import datetime

    from ..search.clock import length

    if data["state"] != "running" or data["deadline"] is None:
        return ""
    return f", {length((datetime.fromisoformat(data['deadline']) - datetime.now().astimezone()).total_seconds())} left"


def _print_night(record: "RunRecord", page: Path) -> None:
    from ..reports import summary_table, verdict

    rows = summary_table(record)
    if rows:
        table("The night", rows)
    for sentence in verdict(record):
        say(sentence)
    say(f"report: {page}")
    if record.state.get("state") == "interrupted":
        say("interrupted; go on with --resume")
    else:
        say(f"export: nightpress export {record.path} best --out {record.path / 'export'}")


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    shown = [
        "trial",
        "name",
        "accuracy",
        "accuracy_se",
        "split",
        "latency_ms",
        "measured",
        "ratio",
        "size_bytes",
    ]
    if rows:
        table(title, rows, shown)
    else:
        say("no point yet")
