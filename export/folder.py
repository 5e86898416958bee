"""A folder that is there whole or not at all: written beside its place, then moved there in one step."""

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from ..spaces.errors import InputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextlib.contextmanager
def staged(out: Path, *, force: bool) -> Generator[Path]:
    """A folder to write into; it becomes ``out`` when the block ends, and is gone when the block raises.

    Raises InputError when ``out`` exists and ``force`` is not set, or its place cannot be written.
    """
    if (out.exists() or out.is_symlink()) and not force:
        raise InputError(f"{out}: the export folder exists already; --force replaces it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: the export cannot be written: {error.strerror}.") from None
    try:
        folder.chmod(0o755)  # what serves it may be another user
        yield folder
        flush(folder)
        swap(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def flush(folder: Path) -> None:
    """Everything below a folder onto the disk: a rename must not be durable before what it names."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def swap(folder: Path, out: Path) -> None:
    """Move a finished folder into its place. What was there is exchanged with it in one step of the kernel, so
    that at each moment ``out`` is one of the two, whole."""
    if not (out.exists() or out.is_symlink()):
        folder.rename(out)
        return
    if _exchange(folder, out):
        _remove(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))  # the file system has no exchange
    out.rename(aside / out.name)
    try:
        folder.rename(out)
    except BaseException:
        (aside / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths at once; False where system or file system cannot. Raises OSError otherwise."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(code, os.strerror(code), str(first))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
