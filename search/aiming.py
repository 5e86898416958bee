"""What our sampler is told of the night: anew whenever the night has learned more of it."""

from .corner import asked_rung, corner_of
from .memory import Memory
from .pareto import losses
from .records import Rung
from .sampler import NightpressSampler, Options
from .session import Session
from .split_gap import search_limits


def aim(session: Session) -> None:
    """Tell our sampler what it may build on; another one is told nothing."""
    sampler = session.sampler
    if isinstance(sampler, NightpressSampler):
        sampler.memory = Memory(session.folder.path)
        sampler.sensitivity = session.sensitivity
        if (most := session.config.limits.max_macs) is not None:
            sampler.most_macs = most / session.prepared.anatomy.macs
        sampler.options = Options(**{part: False for part in session.config.search.without if part != "seeds"})
        sampler.reference, sampler.reference_long = (
            losses(*corner_of(session.state, search_limits(session, rung), rung))
            for rung in (asked_rung(session.state, Rung.SHORT), Rung.LONG)
        )
