"""A real PostgreSQL for the tests: its own cluster in a temporary folder, reached by a socket there alone."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs; Debian does not put them on PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


@contextmanager
def server() -> Generator[str]:
    """A running server's URL without a database's name, ``postgresql://…/{database}?…``; skips the test without one."""
    where = binaries()
    if where is None:
        pytest.skip("PostgreSQL is not installed (apt package postgresql)")
    pytest.importorskip("psycopg", reason="the extra postgresql is not installed")
    with tempfile.TemporaryDirectory(prefix="nightpress-pg-") as name:
        folder = Path(name)
        data, log = folder / "data", folder / "log"
        prefix: list[str] = []
        if os.getuid() == 0:  # PostgreSQL does not run as root; its package brings a user
            shutil.chown(folder, "postgres")
            prefix = ["runuser", "-u", "postgres", "--"]
        folder.chmod(0o755)
        run = lambda *words: subprocess.run([*prefix, *words], check=True, capture_output=True, cwd=folder)  # noqa: E731
        run(str(where / "initdb"), "-D", str(data), "-U", "night", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-c listen_addresses='' -k {folder} -c fsync=off -c unix_socket_permissions=0777"
        run(str(where / "pg_ctl"), "-D", str(data), "-l", str(log), "-w", "-o", options, "start")
        try:
            yield f"postgresql://night@/{{database}}?host={folder}"
        finally:
            run(str(where / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")


def make_database(url: str, name: str) -> str:
    """An empty database; returns its URL."""
    import psycopg

    with psycopg.connect(url.format(database="postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type]  the name is the test's own
    return url.format(database=name)
