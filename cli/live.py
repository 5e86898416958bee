"""The live view of a night on a terminal: phase, time left, trials by state, the last warning, best points, the
current trial."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..search.session import Session

_REFRESH_SECONDS = 0.5
_BEST = 5


@contextmanager
def watching(live: bool) -> Generator[Callable[["Session"], None]]:
    """A callback for the driver; without a terminal it does nothing, because the log lines say it all."""
    if not live:
        yield lambda session: None
        return
    view = View()
    with Live(view, console=Console(stderr=True), refresh_per_second=2, transient=True):
        yield view.update


@dataclass(slots=True)
class View:
    """Drawn anew by rich twice a second, so the time left runs on while a phase is busy."""

    state: dict[str, Any] = field(default_factory=dict[str, Any])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    best: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    progress: float = 0.0
    _read: float = 0.0

    def update(self, session: "Session") -> None:
        """Copy what is shown; the study is read at most twice a second."""
        from ..search.glance import apart, glance

        self.state = dict(session.state)
        if time.monotonic() - self._read < _REFRESH_SECONDS:
            return
        self._read = time.monotonic()
        counts, self.best, self.progress = glance(session, _BEST)
        self.counts = apart(counts, self.state.get("waiting") or 0)

    def __rich__(self) -> RenderableType:
        left = max(0, round(float(self.state.get("deadline_epoch", 0)) - time.time()))
        phase = self.state.get("phase") or "starting"
        activity = self.state.get("activity")
        head = Text.assemble((f" {phase} ", "reverse bold"), "  ", (str(timedelta(seconds=left)), "bold"), " left",
                             f"   {activity}" if activity else "")  # fmt: skip
        counts = Text(
            "  ".join(f"{name.lower()} {count}" for name, count in self.counts.items() if count) or "no trial yet"
        )
        parts: list[RenderableType] = [head, counts]
        warnings = self.state.get("warnings")
        if warnings:  # the log, which says it too, is not on the terminal
            last = warnings[-1]
            moment = time.strftime("%H:%M", time.localtime(last["time"]))
            parts.append(Text(f"{moment} {last['phase']}: {last['text']}", "yellow"))
        current = self.state.get("current")
        if current:
            row = Table.grid(padding=(0, 1))
            row.add_row(
                f"trial {current['trial']} ({current['rung']})",
                ProgressBar(total=1.0, completed=self.progress, width=30),
            )
            parts.append(row)
        if self.best:
            parts.append(self._table())
        return Group(*parts)

    def _table(self) -> Table:
        drawn = Table(box=None, header_style="dim")
        for name in ("trial", "accuracy", "latency ms", "size kB"):
            drawn.add_column(name, justify="right")
        for row in self.best:
            drawn.add_row(
                str(row["trial"]),
                f"{row['accuracy']:.4f}",
                f"{row['latency_ms']:.3f}",
                f"{row['size_bytes'] / 1000:.0f}",
            )
        return drawn
