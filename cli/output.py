"""Printing: one JSON object on stdout for scripts, tables for people, logs and progress on stderr."""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import typer

from ..spaces.errors import InputError
from ..spaces.files import write_whole


def emit(data: Mapping[str, Any]) -> None:
    """One JSON object; unknown is null, never NaN."""
    sys.stdout.write(json.dumps(data, allow_nan=False, default=str) + "\n")


def say(text: str) -> None:
    """A line for a person on stdout."""
    typer.echo(text)


def serve(server: BaseServer) -> None:
    """Answer requests until Ctrl-C."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("")


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Rows as a table on stdout; None is shown as a dash."""
    from rich.console import Console
    from rich.table import Table

    names = list(columns or (rows[0] if rows else []))
    drawn = Table(title=title, title_justify="left", header_style="bold")
    for name in names:
        number = all(isinstance(row.get(name), int | float | None) for row in rows)
        drawn.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell(row.get(name)) for name in names))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(drawn)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    from rich.markup import escape

    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value)))
    return escape(str(value))


def log_to_stderr(level: int = logging.INFO) -> None:
    """Plain lines with the time, as a log file wants them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("nightpress")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def check_file(path: Path) -> None:
    """Raises InputError when a file cannot be put there, before the work that it is for."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist.")
    if path.is_dir():
        raise InputError(f"{path}: a folder is there, but this is to be a file.")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """What ``write`` puts into a file, whole or not at all. Raises InputError when it cannot be written."""
    try:
        write_whole(path, write)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}.") from None
