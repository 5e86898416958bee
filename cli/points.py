"""A point of a run by the name that a user gives it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..search.records import RunRecord, TrialRecord

_NAMED = ("best", "knee", "fastest", "accurate")


def find_trial(record: "RunRecord", name: str) -> "TrialRecord":
    """The trial of a pick's name or a number. Raises InputError when there is none."""
    from ..reports import picks
    from ..spaces.errors import InputError

    if name in _NAMED:
        chosen = picks(record).get(name)
        if chosen is None:
            raise InputError(
                f"{record.path}: no trial can be called {name}: nothing on the front is within the limits."
            )
        return chosen
    found = {str(t.number): t for t in record.trials}.get(name)
    if found is None:
        raise InputError(
            f"{record.path}: TRIAL must be {', '.join(_NAMED)} or the number of one of its "
            f"{len(record.trials)} trials, but got {name!r}."
        )
    return found
