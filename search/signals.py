"""SIGINT and SIGTERM, as a night takes them."""

import logging
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from .session import InterruptionError, Session

log = logging.getLogger("nightpress")


@contextmanager
def graceful(session: Session) -> Generator[None]:
    """SIGINT and SIGTERM ask the night to stop; a second one ends it at once. While the task is being loaded, which may
    take minutes in code that is not ours and where there is nothing to save yet, the first one does."""

    def ask(number: int, frame: FrameType | None) -> None:
        if session.stop:
            raise KeyboardInterrupt
        log.info("signal %s: ending the night gracefully", signal.Signals(number).name)
        session.stop = True
        if not session.inspected:
            raise InterruptionError

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
