"""After verification: where the time and the bytes of what may ship go, layer by layer."""

import logging
from dataclasses import asdict
from typing import Any

from ..evaluators.latency.layers import layer_costs
from ..evaluators.latency.measure import MeasurementError, Timer
from .folder import LAYERS
from .records import TrialRecord
from .session import Session

log = logging.getLogger("nightpress")


def record_layers(session: Session) -> None:
    """Profile every verified file that stands, the uncompressed model first; nothing trains meanwhile.

    Written to ``layers.json`` after each file, so an interruption keeps what there is. Ends with the time for it.
    """
    if session.profile.remote:  # this machine's kernels are not that device's
        return
    known: dict[str, Any] = session.folder.read_json(LAYERS) or {}
    with Timer(session.config.target) as timer:
        for trial in sorted(_standing(session), key=lambda t: (t.role != "baseline", t.number)):
            session.check()
            if str(trial.number) in known or trial.verified is None:
                continue
            if session.clock.left_before("report") <= 0:
                session.folder.decide("verify", f"layers of {len(known)} models profiled", "the deadline")
                return
            try:
                costs = layer_costs(session.folder.path / trial.verified.model_file, session.prepared.anatomy, timer)
            except MeasurementError as error:  # a picture less, not a night less
                log.warning("trial %d: %s", trial.number, error)
                continue
            known[str(trial.number)] = asdict(costs)
            session.folder.write_json(LAYERS, known)


def _standing(session: Session) -> list[TrialRecord]:
    return [t for t in session.store.trials() if t.verified is not None and t.verified.struck_out is None]
