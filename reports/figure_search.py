"""What the search did: how far its trials came, and which choices mattered."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..search.records import NOT_CONTINUED, Rung, RunRecord, TrialRecord, TrialState
from .figure_base import AMBER, BLUE, GREEN, GREY, RED, blank, no_markup
from .importances import LEAST_TRIALS, Importances
from .text import counted, percent

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_PARAMETERS = 12
RUNG_WORDS: Mapping[str, str] = {
    Rung.BN: "batch-norm re-estimation",
    Rung.PART: "first part of the short fine-tune",
    Rung.SHORT: "short fine-tune",
    Rung.LONG: "long fine-tune",
}
ENDS = {
    "went on": BLUE,
    "known already": GREY,
    "beyond the limits": GREY,
    "stopped": AMBER,
    "not continued": GREY,
    "failed": RED,
    "struck out": RED,
}


class Stage(NamedTuple):
    """How many trials came to a stage of the search, and how they ended there, by the keys of ENDS."""

    name: str
    ends: tuple[tuple[str, int], ...]

    @property
    def number(self) -> int:
        return sum(count for _, count in self.ends)


class Trust(NamedTuple):
    """How far a cheap rung ranks policies as the long fine-tune does: rank correlation with its 90 % interval."""

    rung: str
    pairs: int
    rank_correlation: float
    low: float
    high: float


class Study(NamedTuple):
    """What the study at the start of the night found: each cheap rung's trust, against the whole short fine-tune, and
    the steps of the part that became a rung (0: none)."""

    rungs: tuple[tuple[int, Trust], ...]
    part_steps: int


class RungsInfo(NamedTuple):
    """The stages in order; ``standing`` of the verified were not struck out."""

    stages: tuple[Stage, ...]
    standing: int
    trust: tuple[Trust, ...] = ()
    study: Study | None = None


def rungs_info(run: RunRecord) -> RungsInfo:
    """Survival of the trials of the search and its seeds; baselines are never stopped and do not count."""
    trials = [t for t in run.trials if t.role != "baseline" and t.state is not TrialState.RUNNING]
    if not trials:
        return RungsInfo((), 0)
    rungs = list(dict.fromkeys(q.rung for t in trials for q in t.qualities))
    known = [rung.value for rung in Rung]
    rungs.sort(key=lambda rung: known.index(rung) if rung in known else len(known))
    stages = [_stage("proposed", trials, None)]
    for i, rung in enumerate(rungs):
        came = [t for t in trials if t.reused_from is None and _came_to(t, rung)]
        stages.append(_stage(RUNG_WORDS.get(rung, rung), came, rungs[i + 1] if i + 1 < len(rungs) else ""))
    verified = [t for t in trials if t.verified is not None]
    standing = sum(t.verified is not None and t.verified.struck_out is None for t in verified)
    ends = {"went on": standing, "struck out": len(verified) - standing}
    stages.append(Stage("exported and re-measured", tuple((end, n) for end, n in ends.items() if n)))
    return RungsInfo(tuple(stages), standing, _trust(run), _study(run))


def _came_to(trial: TrialRecord, rung: str) -> bool:
    """Trials of the study were looked at on their way, without a pause."""
    return any(q.rung == rung for q in trial.qualities) or (rung == Rung.PART and bool(trial.looks))


def _trust(run: RunRecord) -> tuple[Trust, ...]:
    """From the decisions of the finalists' phase that hold it as evidence; nights of earlier versions have none."""
    evidence = [entry.get("evidence") for entry in run.decisions if entry.get("phase") == "finalists"]
    return tuple(trust for found in evidence if (trust := _trusted(found)) is not None)


def _trusted(found: object) -> Trust | None:
    kinds: tuple[type, ...] = (str, int, float, float, float)
    if not isinstance(found, Mapping):
        return None
    values = [cast("Mapping[str, Any]", found).get(field) for field in Trust._fields]
    known = all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
    return Trust._make(values) if known else None


def _study(run: RunRecord) -> Study | None:
    """From the decision that ended it."""
    for entry in run.decisions:
        evidence: Any = entry.get("evidence")
        if isinstance(evidence, Mapping) and isinstance(evidence.get("study"), list):
            found = [(c.get("steps", 0), _trusted(c)) for c in evidence["study"] if isinstance(c, Mapping)]
            return Study(tuple((s, t) for s, t in found if t is not None), int(evidence.get("part_steps") or 0))
    return None


def _stage(name: str, came: list[TrialRecord], following: str | None) -> Stage:
    ends = Counter(_end(trial, following) for trial in came)
    return Stage(name, tuple((end, ends[end]) for end in ENDS if ends[end]))


def _end(trial: TrialRecord, following: str | None) -> str:
    """How a trial left a stage: ``following`` is the next rung, empty at the highest, None before the first."""
    if following is None:
        if trial.reused_from is not None:
            return "known already"
        went_on = bool(trial.qualities)
    else:
        went_on = trial.state is TrialState.COMPLETE or any(q.rung == following for q in trial.qualities)
    if went_on:
        return "went on"
    if trial.reason == NOT_CONTINUED:
        return "not continued"
    ends = {TrialState.INFEASIBLE: "beyond the limits", TrialState.STOPPED: "stopped"}
    return ends.get(trial.state, "failed")


def rungs_text(info: RungsInfo) -> str:
    """How many came how far."""
    if not info.stages:
        return "The search has finished no trial."
    first, *others = info.stages
    said = [f"The search proposed {counted(first.number, 'policy', 'policies')}{_lost(first)}."]
    said += [f"{counted(stage.number, 'trial')} had the {stage.name}{_lost(stage)}." for stage in others[:-1]]
    last = others[-1]
    said.append(f"{counted(last.number, 'trial')} of the search {'was' if last.number == 1 else 'were'} {last.name}; ")
    said[-1] += f"{info.standing} of them stood."
    said += _study_text(info.study) if info.study is not None else []
    said += [
        f"The {RUNG_WORDS.get(trust.rung, trust.rung)} ranked {trust.pairs} policies as the long fine-tune did with a "
        f"rank correlation of {trust.rank_correlation:.2f} (90 %: {trust.low:.2f} to {trust.high:.2f})."
        for trust in info.trust
    ]
    return " ".join(said)


def _study_text(study: Study) -> list[str]:
    """How the rungs of this night were chosen."""
    if not study.rungs:
        return ["Too few policies went through the study of the rungs, or they were too alike, to choose by it."]
    told = [
        f"{f'{steps} of its steps' if trust.rung == Rung.PART else RUNG_WORDS.get(trust.rung, trust.rung)} with "
        f"{trust.rank_correlation:.2f} (90 %: {trust.low:.2f} to {trust.high:.2f})"
        for steps, trust in study.rungs
    ]
    chosen = f"a rung after {study.part_steps} steps" if study.part_steps else "no rung on the way"
    pairs = study.rungs[0][1].pairs
    said = f"At first {pairs} policies went through the whole short fine-tune, to see what ranks policies as it does: "
    return [f"{said}{', '.join(told)}; so it got {chosen}."]


def _lost(stage: Stage) -> str:
    lost = [f"{count} {end}" for end, count in stage.ends if end != "went on"]
    return f" ({', '.join(lost)})" if lost else ""


def rungs_figure(info: RungsInfo) -> "Figure":
    """Draw a bar for each stage, the first on top: what went on, and what ended there."""
    figure = blank("trials", "", height=110 + 34 * len(info.stages), margin_b=84)
    for end, colour in ENDS.items():
        counts = [dict(stage.ends).get(end, 0) for stage in info.stages]
        if any(counts):
            figure.add_bar(
                orientation="h",
                y=[stage.name for stage in info.stages],
                x=counts,
                name=end,
                text=[str(count) if count else "" for count in counts],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                marker={"color": colour},
                hovertemplate="%{y}: %{x} " + end + "<extra></extra>",
            )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(barmode="stack", bargap=0.35, legend={"traceorder": "normal"})
    return figure


# Importances

COLOURS = {"the front": BLUE, "accuracy": GREEN, "latency": AMBER}


def importances_text(found: Importances) -> str:
    """Which choice mattered most for each objective."""
    if not found.parameters:
        few = f"of complete trials there are {found.trials}, and {LEAST_TRIALS} are needed"
        return f"Which choices mattered cannot be said: {few}, with choices that differ."
    said = [f"From {counted(found.trials, 'complete trial')}:"]
    for objective in COLOURS:
        best = max(found.parameters, key=lambda p: p.shares[objective])
        words = "reaching the front" if objective == "the front" else f"a good {objective}"
        said.append(f"{words} depended most on {words_of(best.name)} ({percent(best.shares[objective])});")
    text = " ".join(said)[:-1] + "."
    return text + (" With so few trials these are hints." if found.trials < 100 else "")


def words_of(name: str) -> str:
    """A parameter's name as a person says it."""
    kind, _, rest = name.partition(":")
    words = {"prune": "width of", "bits": "bits of", "block": "block", "sparsity": "zeros in"}
    return f"{words[kind]} {rest}" if rest and kind in words else name.replace(":", " ").replace("_", " ")


def importances_figure(found: Importances) -> "Figure":
    """Draw the most important parameters, the first on top, with a bar for each objective."""
    shown = found.parameters[:MOST_PARAMETERS]
    figure = blank("importance, %", "", height=110 + 34 * len(shown), margin_b=84)
    for objective, colour in COLOURS.items():
        figure.add_bar(
            orientation="h",
            y=[no_markup(words_of(parameter.name)) for parameter in shown],
            x=[100 * parameter.shares[objective] for parameter in shown],
            name=objective,
            marker={"color": colour},
            hovertemplate="%{y}: %{x:.1f} % for " + objective + "<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(barmode="group", bargap=0.3, legend={"traceorder": "normal"})
    return figure
