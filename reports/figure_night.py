"""How the night went: hypervolume over time, noise of the machine, seconds by phase."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..search.records import RunRecord
from .clock import clock
from .covered import HypervolumeStep, baseline_level, hypervolume_over_time, late_gain
from .figure_base import AMBER, BLUE, GREEN, GREY, PALE_GREY, RED, blank, no_markup
from .text import counted, digits, duration, local_time, percent, seconds_since_epoch
from .verdict import NOISY, STILL_GROWING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class HypervolumeInfo(NamedTuple):
    """The search's relative hypervolume as it grew, and the baselines' for comparison."""

    steps: tuple[HypervolumeStep, ...]
    baselines: float | None


def hypervolume_info(run: RunRecord) -> HypervolumeInfo:
    return HypervolumeInfo(tuple(hypervolume_over_time(run)), baseline_level(run))


def hypervolume_text(info: HypervolumeInfo) -> str:
    """Where it ended, when it passed the baselines, and whether it was still growing."""
    if not info.steps:
        return "No complete trial of the search, or no reference point: there is no hypervolume."
    last = info.steps[-1]
    trials = counted(len(info.steps), "complete trial")
    covered = f"{percent(last.hypervolume)} of the objective box (on the search split)"
    said = [f"After {trials} the search covers {covered}."]
    if info.baselines is not None:
        passed = next((s.seconds for s in info.steps if s.hypervolume > info.baselines), None)
        said.append(
            f"It passed the baselines ({percent(info.baselines)}) after {duration(passed)}."
            if passed is not None
            else f"It never passed the baselines ({percent(info.baselines)})."
        )
    gain = late_gain(info.steps)
    if gain is not None:
        said.append(
            f"The last quarter of the time still added {percent(gain)}: a longer night would pay."
            if gain > STILL_GROWING
            else "The last quarter of the time added next to nothing."
        )
    return " ".join(said)


def _time_unit(longest: float) -> tuple[str, float]:
    """A unit in which the axis reads well, and its seconds."""
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)


def hypervolume_figure(info: HypervolumeInfo) -> "Figure":
    """Draw the steps, with the baselines as a dashed level."""
    unit, factor = _time_unit(max((step.seconds for step in info.steps), default=0.0))
    figure = blank(f"{unit} of work", "hypervolume, %")
    figure.add_scatter(
        x=[step.seconds / factor for step in info.steps],
        y=[100 * step.hypervolume for step in info.steps],
        mode="lines",
        name="search",
        line={"shape": "hv", "color": BLUE, "width": 2},
        hovertemplate="%{y:.2f} % after %{x:.2f} " + unit + "<extra></extra>",
    )
    if info.baselines is not None and info.steps:
        figure.add_scatter(
            x=[info.steps[0].seconds / factor, info.steps[-1].seconds / factor],
            y=[100 * info.baselines] * 2,
            mode="lines",
            name="baselines",
            line={"dash": "dash", "color": AMBER, "width": 1.5},
            hovertemplate="baselines: %{y:.2f} %<extra></extra>",
        )
    return figure


class NoiseSample(NamedTuple):
    """One look at the uncompressed model's latency, after ``seconds`` of work; ``repeat_error`` is a share."""

    time: str
    seconds: float | None
    phase: str
    reference_ms: float
    repeat_error: float | None


class NoiseInfo(NamedTuple):
    """The night's noise, as the uncompressed model felt it."""

    samples: tuple[NoiseSample, ...]


def noise_info(run: RunRecord) -> NoiseInfo:
    night = clock(run)
    samples: list[NoiseSample] = []
    for entry in run.state.get("noise") or []:
        known: Mapping[str, Any] = entry
        if known.get("reference_ms") is None:
            continue
        moment = seconds_since_epoch(known.get("time"))
        seconds = night.worked(moment) if moment is not None and night is not None else None
        samples.append(
            NoiseSample(
                local_time(known.get("time")),
                seconds,
                str(known.get("phase") or ""),
                float(known["reference_ms"]),
                known.get("repeat_error"),
            )
        )
    return NoiseInfo(tuple(samples))


def noise_text(info: NoiseInfo) -> str:
    """How far the same model's latency wandered over the night."""
    if not info.samples:
        return "The machine's noise was not recorded."
    values = [sample.reference_ms for sample in info.samples]
    if len(values) == 1:
        said = [f"The uncompressed model was measured once: {digits(values[0])} ms."]
    else:
        said = [_wandering(values)]
    errors = [sample.repeat_error for sample in info.samples if sample.repeat_error is not None]
    if errors:
        noisy = sum(error > NOISY for error in errors)
        said.append(
            f"Its repeat error was over {percent(NOISY)} in {noisy} of them (worst {percent(max(errors))})."
            if noisy
            else f"Its repeat error never exceeded {percent(max(errors))}."
        )
    said.append("Ratios hold better than milliseconds, since both models were measured in turn.")
    return " ".join(said)


def _wandering(values: list[float]) -> str:
    between = f"between {digits(min(values))} and {digits(max(values))} ms"
    apart = percent(max(values) / min(values) - 1)
    return f"The uncompressed model, measured {len(values)} times, took {between}: {apart} apart."


def noise_figure(info: NoiseInfo) -> "Figure":
    """Draw the reference's latency; samples that did not repeat in red."""
    moments = [sample.seconds for sample in info.samples if sample.seconds is not None]
    timed = len(moments) == len(info.samples)
    unit, factor = _time_unit(max(moments, default=0.0))
    x_title = f"{unit} of work" if timed else "measurement"
    figure = blank(x_title, "uncompressed model, ms", height=300, margin_b=52)
    figure.add_scatter(
        x=[moment / factor for moment in moments] if timed else list(range(1, len(info.samples) + 1)),
        y=[sample.reference_ms for sample in info.samples],
        error_y={
            "type": "data",
            "array": [(sample.repeat_error or 0) * sample.reference_ms for sample in info.samples],
            "thickness": 1,
            "width": 0,
            "color": GREY,
        },
        mode="lines+markers",
        line={"color": GREY, "width": 1},
        marker={
            "size": 7,
            "color": [RED if (sample.repeat_error or 0) > NOISY else BLUE for sample in info.samples],
        },
        customdata=[
            [no_markup(sample.phase), percent(sample.repeat_error), no_markup(sample.time)] for sample in info.samples
        ],
        hovertemplate="%{y:.4~g} ms, repeat error %{customdata[1]}<br>%{customdata[0]} %{customdata[2]}<extra></extra>",
        showlegend=False,
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


class PhasesInfo(NamedTuple):
    """Seconds of each phase, in the order in which they ran, and those that were planned for it, where known. A night
    that was resumed planned what it had worked until then and the time that it was given again."""

    phases: tuple[tuple[str, float], ...]
    planned: Mapping[str, float] = {}

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.phases)


def phases_info(run: RunRecord) -> PhasesInfo:
    seconds: Mapping[str, Any] = run.state.get("seconds") or {}
    phases = tuple((str(name), float(value)) for name, value in seconds.items() if value is not None)
    night, deadline = clock(run), seconds_since_epoch(run.state.get("deadline"))
    if night is None or deadline is None:
        return PhasesInfo(phases)
    shares: Mapping[str, Any] = run.state.get("shares") or {}
    return PhasesInfo(phases, {str(name): float(share) * night.worked(deadline) for name, share in shares.items()})


def phases_text(info: PhasesInfo) -> str:
    """Where the time went, and which phase took most beyond its plan."""
    if not info.total:
        return "No time was recorded."
    name, longest = max(info.phases, key=lambda phase: phase[1])
    said = [f"The night took {duration(info.total)}; {percent(longest / info.total)} of it went to {name}."]
    if info.planned:
        planned = sum(info.planned.values())
        said.append(f"{duration(planned)} were planned; what a phase does not use goes to the search.")
        over = [(spent - info.planned[n], n) for n, spent in info.phases if n in info.planned and n != "search"]
        most, which = max(over, default=(0.0, ""))
        if most > 0.02 * planned:
            said.append(f"{which[:1].upper()}{which[1:]} took {duration(most)} longer than planned.")
    return " ".join(said)


def phases_figure(info: PhasesInfo) -> "Figure":
    """Draw a bar for each phase, the first on top, with the planned time below it."""
    unit, factor = _time_unit(max(info.total, *info.planned.values()) if info.planned else info.total)
    figure = blank(unit, "", height=100 + 38 * max(3, len(info.phases)), margin_b=84)
    names = [no_markup(name) for name, _ in info.phases]
    bars = [("used", GREEN, [seconds for _, seconds in info.phases])]
    if info.planned:
        bars.append(("planned", PALE_GREY, [info.planned.get(name, 0.0) for name, _ in info.phases]))
    for name, colour, values in bars:
        figure.add_bar(
            orientation="h",
            y=names,
            x=[seconds / factor for seconds in values],
            text=[duration(seconds) for seconds in values],
            textposition="outside",  # inside a short bar it would shrink to nothing
            cliponaxis=False,
            name=name,
            marker={"color": colour},
            hovertemplate="%{y}, " + name + ": %{text}<extra></extra>",
        )
    longest = max(max(values, default=0.0) for _, _, values in bars)
    figure.update_xaxes(range=[0, 1.3 * longest / factor])
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(bargap=0.3, barmode="group", legend={"traceorder": "normal"}, showlegend=bool(info.planned))
    return figure
