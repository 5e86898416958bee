"""Calibration of another device: a kit that goes there, and, over ssh, the whole way there and back."""

import logging
import shlex
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from .options import Batch, Force, Json, TaskRef, Threads
from .output import emit, log_to_stderr, say
from .parts import find_anatomy

log = logging.getLogger("nightpress")


def kit(
    task: TaskRef,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    target: Annotated[
        str, typer.Option("--target", metavar="T", help="The device's runtime, or an earlier profile of it.")
    ] = "onnxruntime",
    threads: Threads = None,
    batch: Batch = None,
    count: Annotated[int, typer.Option("-n", min=10, max=500, help="Policies to measure.")] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@HOST", help="Measure there at once, over this system's ssh.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="The Python of --host, as its shell takes it.")] = "python3",
    force: Force = False,
    json: Json = False,
) -> None:
    """What another device needs to be calibrated: ONNX files and one script.
    Example: nightpress kit mnist5k-resnet --out kit"""
    from ..evaluators.latency.kit import MEASURE
    from ..evaluators.latency.timer import RESULTS
    from ..export.folder import staged
    from ..spaces.errors import InputError
    from .measuring import as_measured, write_kit_of

    log_to_stderr()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise InputError(f"{out}: the folder is not empty; --force replaces it.")
    _, anatomy, where = find_anatomy(task, target, runs_here=False, threads=threads, batch=batch)
    try:
        with staged(out, force=force or out.is_dir()) as folder:
            made = write_kit_of(anatomy, as_measured(where, Path(target)), folder, count, seed)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}.") from None
    if host is not None:
        measure_over_ssh(out, host, python, f"nightpress-kit-{made['id']}")
    if json:
        emit({"kit": str(out), "id": made["id"], "models": len(made["models"]), "target": made["target"],
              "results": str(out / RESULTS) if host is not None else None})  # fmt: skip
        return
    say(f"wrote {out}: {len(made['models'])} models and {MEASURE}")
    if host is None:
        package = "onnxruntime-gpu" if where.runtime.startswith("onnxruntime-") else where.runtime
        say(f"next: copy {out} to the device, run python {MEASURE} in it (it needs numpy and {package}), bring "
            f"{RESULTS} back")  # fmt: skip
    say(f"then: nightpress calibrate {task} --from {out / RESULTS} --out PROFILE.json")


def measure_over_ssh(folder: Path, host: str, python: str, name: str) -> None:
    """Copy a kit to a host, measure it there and fetch the results; what is said there is said here. Raises
    RuntimeError with ssh's last line."""
    from ..evaluators.latency.kit import MEASURE
    from ..evaluators.latency.timer import RESULTS

    remove = f"rm -rf {shlex.quote(name)}"
    # A question may meet nobody; and what is left in the background, for the next connection, would keep stderr open.
    # A board that goes away meanwhile is noticed within a minute.
    alive = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
    keys = [part for option in ("BatchMode=yes", "ControlMaster=no", *alive) for part in ("-o", option)]
    # A name that begins with a dash would be an option of ssh.
    for command in (
        ["ssh", *keys, "--", host, remove],  # into what a broken copy has left the next one would be put
        ["scp", *keys, "-q", "-r", "--", str(folder.resolve()), f"{host}:{name}"],
        ["ssh", *keys, "--", host, f"{python} {shlex.quote(f'{name}/{MEASURE}')}"],
        ["scp", *keys, "-q", "--", f"{host}:{name}/{RESULTS}", str(folder.resolve() / RESULTS)],
        ["ssh", *keys, "--", host, remove],
    ):
        code, last = _run(command, host)
        if code:
            raise RuntimeError(f"{host}: {command[0]} failed: {last or f'code {code}'}")


def _run(command: list[str], host: str) -> tuple[int, str]:
    """Its exit code and the last line that it said, each of which is told as it comes: measuring takes minutes."""
    last = ""
    try:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as running:
            for line in filter(str.strip, running.stderr or ()):
                last = line.strip()
                log.info("%s: %s", host, last)
    except FileNotFoundError:
        raise RuntimeError(f"--host needs the system's {command[0]}, which is not installed") from None
    return running.returncode, last
