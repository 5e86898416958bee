"""What the trials of a night are judged by, and what that says of those that wait."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .corner import corner_of
from .costs import trial_effort
from .promotion import Worth, gains
from .records import Rung, TrialRecord
from .session import Session
from .split_gap import least_short, search_limits
from .stopping import Judge
from .study import BEGIN_STEPS, first_steps, look_steps

PATIENCE = 8
"""A judge stands for as many results as an eighth of the workers gives: each result would change a little of what all
that wait are worth, and of many workers many wait."""


@dataclass(slots=True)
class Judging:
    """The judge of the hour. ``waiting`` maps trials that wait, by number, to what they are worth in its eyes."""

    session: Session
    waiting: dict[int, Worth | None] = field(default_factory=dict[int, Worth | None])
    _judge: Judge | None = None
    _least: float | None = None
    _made_at: tuple[int, int | None] = (0, None)

    def judge(self) -> Judge:
        """By what trials of this night are judged, as it stands; anew where that has changed."""
        session, tally = self.session, self.session.store.tally()
        part = session.state["rungs"].get("part_steps")
        changes, part_then = self._made_at
        if self._judge is None or part != part_then or tally.changes - changes > session.workers // PATIENCE:
            self._least = least_short(session)
            self._judge = Judge(tally.judges(), self._least, part, session.config.limits)
            self._made_at = tally.changes, part
            self.waiting.clear()
        return self._judge

    def unseen(self, paused: Mapping[int, TrialRecord]) -> dict[int, TrialRecord]:
        """Those that wait of whom the judge has not said yet what they are worth."""
        self.judge()
        if len(self.waiting) == len(paused):
            return {}
        return {number: record for number, record in paused.items() if number not in self.waiting}

    def look(self, paused: Mapping[int, TrialRecord]) -> None:
        """Say what they are worth."""
        new = self.unseen(paused)
        self.waiting.update(zip(new, self.worths(list(new.values())), strict=True))

    def worths(self, records: Sequence[TrialRecord]) -> list[Worth | None]:
        """What it is worth to go on with trials that have come to a rung."""
        if not records:
            return []
        session, judge = self.session, self.judge()
        prepared, rungs = session.prepared, session.state["rungs"]
        items, batch = prepared.train_items, session.config.finetune.batch_size
        first, look, part = first_steps(items, batch), look_steps(items, batch), rungs.get("part_steps") or 0
        corner = corner_of(session.state, search_limits(session, Rung.SHORT), Rung.SHORT)
        least = min(session.state["reference"]["accuracy"], corner[0]) if self._least is None else self._least
        corner = (least, *corner[1:])
        found: list[Worth | None] = []
        for record, gain in zip(records, gains(records, judge, corner), strict=True):
            effort = trial_effort((record.macs or 0) / max(prepared.anatomy.macs, 1))
            at_part = record.quality is not None and record.quality.rung == Rung.PART
            rest = rungs["short_steps"] + look - part if at_part else rungs["short_steps"] + look + bool(part) * look
            spent = first if rungs.get("bn", True) else part + look
            found.append(None if gain is None else Worth(gain, effort * rest, BEGIN_STEPS + effort * spent))
        return found
