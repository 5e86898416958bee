"""Whether this user began a run: only then may its record say what code is executed.

A run names the file of its task. A folder from somebody else could name any file, so the driver signs what it ran
with a key that this user alone can read.
"""

import hashlib
import hmac
import os
import secrets

from ..spaces.files import cache_folder
from .records import RunRecord

KEY_BYTES = 32


def mark(task: str, base: str | None) -> str | None:
    """The signature of a task as a config names it; None where no key can be kept."""
    key = _key(make=True)
    return _signed(key, task, base) if key is not None else None


def is_ours(run: RunRecord) -> bool:
    """Whether the run's task is one that this user ran."""
    key, given = _key(make=False), run.state.get("mark")
    task, base = run.config.get("task"), run.config.get("base")
    if key is None or not isinstance(given, str) or not isinstance(task, str):
        return False
    return hmac.compare_digest(given.encode(), _signed(key, task, base).encode())


def _signed(key: bytes, task: str, base: object) -> str:
    return hmac.new(key, f"{base}\0{task}".encode(), hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes | None:
    path = cache_folder() / "key"
    try:
        if make and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"key.{os.getpid()}")
            file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(file, "wb") as key:
                key.write(secrets.token_bytes(KEY_BYTES))
            partial.replace(path)
        found = path.read_bytes()
    except OSError:
        return None
    return found if len(found) == KEY_BYTES else None
