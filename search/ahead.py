"""A resumed night's first worker imports its libraries while the driver imports its own."""

from collections.abc import Generator
from contextlib import contextmanager

from .config import LOCAL, RunConfig
from .folder import TARGET
from .process import WorkerProcess


@contextmanager
def started_ahead(config: RunConfig, *, resume: bool) -> Generator[WorkerProcess | None]:
    """A worker for a night that goes on where it trains, None otherwise: one that begins measures the target first,
    which nothing of ours may disturb. The worker has ended when the block has."""
    worker = WorkerProcess() if resume and config.search.runner == LOCAL and (config.out / TARGET).is_file() else None
    try:
        yield worker
    finally:
        if worker is not None and not worker.buried:
            worker.process.kill()
            worker.bury()
