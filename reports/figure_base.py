"""What the figures share: colours that read on light and dark paper, and a bare layout.

Text and grid colours are left to the page, which sets them to its theme.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE = "#3f7ae0"
AMBER = "#d98324"
RED = "#c9364f"
GREEN = "#009e73"
GREY = "#8b95a7"
PALE_GREY = "rgba(139, 149, 167, 0.35)"
PALE_RED = "rgba(212, 72, 94, 0.09)"
PALE_BLUE = "rgba(63, 122, 224, 0.12)"
SIZES = ((0.0, "#2bb5a0"), (0.5, "#3f7ae0"), (1.0, "#9650d2"))
"""Small to large files: light to dark, and different in hue for those who see less of the lightness."""

LOG_FROM = 5.0
"""Latencies that differ by more than this factor are drawn on a logarithmic axis."""

MOST_TICKS = 9
MOST_LETTERS = 48
"""Of a name in a picture."""
MOST_DOTS = 1000
"""Trials in a picture, which more would only blacken."""
MOST_TRIALS = 2500
"""Trials that can be looked at one by one; all are in the tables beside the report."""


@dataclass(frozen=True)
class Panel:
    """A figure with its heading, the sentences that say what it shows, and how to read it; without data,
    sentences alone."""

    key: str
    heading: str
    text: str
    draw: "Callable[[], Figure] | None"
    how: str = ""
    wide: bool = False

    @cached_property
    def figure(self) -> "Figure | None":
        """Drawn when it is first asked for: what prints words alone need not load plotly."""
        return self.draw() if self.draw is not None else None


def no_markup(text: str, most: int = MOST_LETTERS) -> str:
    """Names and reasons are the user's, and Plotly reads markup in labels and hover texts, and gives them all room."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def blank(x_title: str, y_title: str, *, height: int = 340, **layout: Any) -> "Figure":
    """An empty figure with two titled axes, no background and no template."""
    import plotly.graph_objects as go

    axis = {
        "zeroline": False,
        "showline": False,
        "ticklabelstandoff": 6,
        "automargin": True,
        "title": {"standoff": 14},
    }
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 56, "r": 16, "t": 16, "b": 76},
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        xaxis=axis,
        yaxis=axis,
    )
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    figure.update_layout(**layout)
    return figure


def logarithmic(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis between two positive values. Plotly labels the ticks within a decade by their last
    digit alone, which reads as another number; these are written in full."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
        decades = range(first, last + 1)
        ticks = [float(f"{step * 10.0**decade:.3g}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= MOST_TICKS:
            break
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }
