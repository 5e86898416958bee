"""The live view of a night on a terminal, drawn as text."""

import time
from typing import Any

from rich.console import Console

from nightpress.cli.live import View


def drawn(**state: Any) -> str:
    console = Console(width=160, force_terminal=False)
    with console.capture() as captured:
        console.print(View(state=state))
    return captured.get()


def test_the_last_warning_is_shown_with_its_time() -> None:
    noon = time.mktime((2026, 11, 21, 12, 5, 0, 0, 0, -1))
    warnings = [
        {"time": noon - 60, "phase": "calibrate", "text": "an older one"},
        {"time": noon, "phase": "search", "text": "other processes used [1.3] cores"},
    ]
    assert "12:05 search: other processes used [1.3] cores" in (shown := drawn(phase="search", warnings=warnings))
    assert "an older one" not in shown


def test_a_quiet_night_shows_no_warning() -> None:
    assert [line.strip() for line in drawn(phase="search").splitlines()] == ["search   0:00:00 left", "no trial yet"]
