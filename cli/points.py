"""A point of a run by the name that a user gives it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..search.records import RunRecord, TrialRecord

_NAMED = ("best", "knee", "fastest", "accurate")


def find_trial(record: "RunRecord", name: str) -> "TrialRecord":
    """The trial of a pick's name or a number. Raises InputError when there is none."""
    from ..reports import picks
    from ..reports.verdict import answer
    from ..spaces.errors import InputError

    if name in _NAMED:
        chosen = picks(record).get(name)
        if chosen is None:
            raise InputError(f"{record.path}: no trial can be called {name}. {_why_none(answer(record))}")
        return chosen
    found = {str(t.number): t for t in record.trials}.get(name)
    if found is None:
        raise InputError(
            f"{record.path}: TRIAL must be {', '.join(_NAMED)} or the number of one of its "
            f"{len(record.trials)} trials, but got {name!r}."
        )
    return found


def _why_none(said: list[str]) -> str:
    """Of what the report says, what speaks of points: that there is no front, or that none of it keeps the rule, and
    which comes nearest."""
    return " ".join(text for text in said if text.startswith(("No ", "The nearest")))
