"""How a night stands, for those who look on while it goes on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .clock import length
from .pareto import non_dominated
from .records import TrialState, row

if TYPE_CHECKING:
    from .session import Session


def minute_line(session: "Session") -> str:
    """How the night stands, in one line for the log."""
    counts, best, _ = glance(session, 1000)
    counts = apart(counts, session.state.get("waiting") or 0)
    words = [f"{count} {name.lower()}" for name, count in counts.items() if count]
    parts = [f"{session.state.get('phase')}, {length(session.clock.left_seconds)} left"]
    if activity := session.state.get("activity"):
        parts.append(activity)
    parts.append(", ".join(words) or "no trial yet")
    if best:
        fastest = min(best, key=lambda r: r["latency_ms"])
        parts.append(f"most accurate {best[0]['accuracy']:.4f} in {best[0]['latency_ms']:.3f} ms")
        parts.append(f"fastest {fastest['latency_ms']:.3f} ms with {fastest['accuracy']:.4f}")
    return "; ".join(parts)


def apart(counts: Mapping[str, int], waiting: int) -> dict[str, int]:
    """Counts of trials by state for people: those that wait for a worker are not being evaluated."""
    waiting = min(waiting, counts.get(TrialState.RUNNING, 0))
    return {**counts, TrialState.RUNNING.value: counts.get(TrialState.RUNNING, 0) - waiting, "waiting": waiting}


def glance(session: "Session", most: int) -> tuple[dict[str, int], list[dict[str, Any]], float]:
    """For a live view: trials by state, the best points so far as rows, and the current fine-tune's progress."""
    if not session.begun:
        return {}, [], 0.0
    trials = session.store.trials()
    counts = {str(state): sum(t.state is state for t in trials) for state in TrialState}
    known = [(point, t) for t in trials if t.state is TrialState.COMPLETE and (point := t.losses)]
    front = sorted((known[i] for i in non_dominated([point for point, _ in known])), key=lambda found: found[0][0])
    return counts, [row(t) for _, t in front[:most]], session.runner.progress
