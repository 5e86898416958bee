"""What hurts: the damage of compressing one part of the model alone, as a map of parts and choices."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..search.records import RunRecord
from .figure_base import blank, no_markup
from .text import counted, digits

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_ROWS = 60
COLUMNS = {"groups": "half the width", "blocks": "removed", "layers": "compressed"}
SCALE = ((0.0, "#dbe7fb"), (0.45, "#7aa5ec"), (1.0, "#14418f"))
"""Light to dark blue: order is read from the lightness alone."""


class Cell(NamedTuple):
    """One part of the model under one choice, and its damage in the unit that the sensitivity phase used."""

    name: str
    choice: str
    damage: float


class SensitivityInfo(NamedTuple):
    """The cells shown, parts in the order of the network; ``worst`` and ``least`` are of all ``parts`` tried."""

    cells: tuple[Cell, ...]
    parts: int
    worst: Cell | None
    least: Cell | None


def sensitivity_info(run: RunRecord) -> SensitivityInfo:
    cells = [
        cell
        for section, parts in (run.sensitivity or {}).items()
        if isinstance(parts, Mapping)
        for name, value in cast("Mapping[str, Any]", parts).items()
        for cell in _cells(COLUMNS.get(section, section), str(name), value)
    ]
    if not cells:
        return SensitivityInfo((), 0, None, None)
    ranked = sorted(cells, key=lambda cell: (-cell.damage, cell.name, cell.choice))
    names = list(dict.fromkeys(cell.name for cell in ranked))
    place = _places(run)
    shown = sorted(names[:MOST_ROWS], key=lambda name: (place.get(name, len(place)), name))
    order = {name: i for i, name in enumerate(shown)}
    kept = sorted((cell for cell in cells if cell.name in order), key=lambda cell: order[cell.name])
    return SensitivityInfo(tuple(kept), len(names), ranked[0], ranked[-1])


def _cells(choice: str, name: str, value: object) -> list[Cell]:
    """A damage, or one of each of several choices; nothing for anything else."""
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, object]", value)
        return [cell for key, item in inner.items() for cell in _cells(str(key), name, item)]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return [Cell(name, choice, float(value))]
    return []


def _places(run: RunRecord) -> dict[str, int]:
    """Where a part stands in the network: a block before its first layer."""
    known: Mapping[str, Any] = run.state.get("anatomy") or {}
    layers = {str(layer["name"]): 2 * i + 1 for i, layer in enumerate(known.get("layers") or [])}
    blocks = {
        str(block["name"]): min(places) - 1
        for block in known.get("blocks") or []
        if (places := [layers[str(name)] for name in block.get("layers") or [] if str(name) in layers])
    }
    return layers | blocks


def sensitivity_text(info: SensitivityInfo) -> str:
    """Which part to leave alone and which costs nothing."""
    if info.worst is None or info.least is None:
        return "Sensitivity was not measured in this run."
    said = [f"Of {counted(info.parts, 'part')} compressed one at a time, {_words(info.worst)} hurts most"]
    said.append(f" and {_words(info.least)} least." if info.worst != info.least else ".")
    shown = len({cell.name for cell in info.cells})
    if info.parts > shown:
        said.append(f" The {shown} worst are shown.")
    return "".join(said)


def _words(cell: Cell) -> str:
    return f"{cell.name} ({cell.choice}: {digits(cell.damage)})"


def sensitivity_figure(info: SensitivityInfo) -> "Figure":
    """Draw the map: the network from top to bottom, a column for each choice, colour by the damage's logarithm."""
    names = list(dict.fromkeys(cell.name for cell in info.cells))
    choices = list(dict.fromkeys(cell.choice for cell in info.cells))
    damages = {(cell.name, cell.choice): cell.damage for cell in info.cells}
    figure = blank("", "", height=110 + 22 * max(4, len(names)), margin_b=40, margin_t=44)
    least = min((d for d in damages.values() if d > 0), default=1e-6)
    rows = [[damages.get((name, choice)) for choice in choices] for name in names]
    figure.add_heatmap(
        x=[no_markup(choice) for choice in choices],
        y=[no_markup(name) for name in names],
        z=[[None if d is None else math.log10(max(d, least)) for d in row] for row in rows],
        text=[["" if d is None else digits(d, 2) for d in row] for row in rows],
        texttemplate="%{text}",
        colorscale=[list(stop) for stop in SCALE],
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate="%{y}, %{x}: %{text} nats<extra></extra>",
    )
    figure.update_xaxes(type="category", side="top", showgrid=False, tickangle=0)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure
