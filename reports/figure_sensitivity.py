"""What hurts: the damage of compressing one part of the model alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..search.records import RunRecord
from .figure_base import AMBER, BLUE, GREEN, GREY, blank, no_markup
from .text import counted, digits

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_BARS = 24
COLOURS = {"groups": BLUE, "blocks": AMBER, "layers": GREEN}


class Bar(NamedTuple):
    """One part of the model and its damage, in the unit that the sensitivity phase used."""

    section: str
    name: str
    damage: float


class SensitivityInfo(NamedTuple):
    """The most sensitive parts, worst first, of ``parts`` that were tried."""

    bars: tuple[Bar, ...]
    parts: int
    least: Bar | None


def sensitivity_info(run: RunRecord) -> SensitivityInfo:
    found = [
        Bar(str(section), str(name), damage)
        for section, parts in (run.sensitivity or {}).items()
        if isinstance(parts, Mapping)
        for name, value in cast("Mapping[str, Any]", parts).items()
        if (damage := _worst(value)) is not None
    ]
    found.sort(key=lambda bar: (-bar.damage, bar.section, bar.name))
    return SensitivityInfo(tuple(found[:MOST_BARS]), len(found), found[-1] if found else None)


def _worst(value: object) -> float | None:
    """A damage, or the worst of several choices' damages; None for anything else."""
    if isinstance(value, Mapping):
        known = [_worst(item) for item in cast("Mapping[str, object]", value).values()]
        return max((damage for damage in known if damage is not None), default=None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def sensitivity_text(info: SensitivityInfo) -> str:
    """Which part to leave alone and which costs nothing."""
    if not info.bars or info.least is None:
        return "Sensitivity was not measured in this run."
    worst = info.bars[0]
    said = [f"Of {counted(info.parts, 'part')} compressed one at a time, "]
    said.append(f"{worst.name} hurts most ({digits(worst.damage)})")
    said.append(f" and {info.least.name} least ({digits(info.least.damage)})." if info.parts > 1 else ".")
    if info.parts > len(info.bars):
        said.append(f" The {len(info.bars)} worst are shown.")
    return "".join(said)


def sensitivity_figure(info: SensitivityInfo) -> "Figure":
    """Draw the worst parts, the worst on top, coloured by what they are."""
    figure = blank("damage, nats (KL)", "", height=90 + 20 * max(4, len(info.bars)), margin_b=52)
    for section in dict.fromkeys(bar.section for bar in info.bars):
        bars = [bar for bar in info.bars if bar.section == section]
        figure.add_bar(
            orientation="h",
            y=[no_markup(bar.name) for bar in bars],
            x=[bar.damage for bar in bars],
            name=no_markup(section),
            marker={"color": COLOURS.get(section, GREY)},
            hovertemplate="%{y}: %{x:.3~g}<extra>" + no_markup(section) + "</extra>",
        )
    order = list(dict.fromkeys(no_markup(bar.name) for bar in info.bars))
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order, autorange="reversed")
    figure.update_layout(bargap=0.3, barmode="overlay", legend={"y": 1, "yanchor": "top"}, margin_t=36)
    return figure
