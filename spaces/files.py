"""Files that are either the old or the new one, never half of the new."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says where a file finds no room."""


def cache_folder() -> Path:
    """Where the user's cache is, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nightpress"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place in one step. What a full disk cut off goes at
    once: a run's record needs the room. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        # mkstemp makes private files; these are as readable as any other.
        beside.chmod(0o644)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
