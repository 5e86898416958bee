"""Groups are tried before they are offered: pruned, run, and every shape compared with the plan's.

The trial is a process of its own with a cap on memory and time, which needs only the anatomy: shapes do not depend on
weights. It stays for the next model, because importing torch takes longer than most trials.
"""

import atexit
import gc
import importlib
import json
import math
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spaces.anatomy import Anatomy, Group, anatomy_from_json, anatomy_to_json, kept_channels
from ..spaces.errors import InputError
from ..spaces.plan import Plan, plan
from ..spaces.policy import Policy

MEMORY_GIB, SECONDS = 4.0, 120.0
"""The caps where the environment names no others. The time is that of one group; all at once get it too."""
_MEMORY, _TIME = "NIGHTPRESS_DRY_RUN_GIB", "NIGHTPRESS_DRY_RUN_SECONDS"
_DONE = "done"


@dataclass(frozen=True, slots=True)
class Caps:
    """Of a dry run."""

    memory_bytes: int
    seconds: float


def caps() -> Caps:
    """Those of the environment, so that every command finds the same groups. Raises InputError for no number."""
    return Caps(int(_number(_MEMORY, MEMORY_GIB) * 1024**3), _number(_TIME, SECONDS))


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name} in the environment must be a number above 0, but is {text!r}.")
    return value


def start() -> None:
    """Let the process come up, which takes seconds, while something else is done."""
    _child(caps().memory_bytes)


def verify_groups(
    anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], allowed: Caps | None = None
) -> dict[str, str]:
    """Groups that cannot be pruned, with the reason. ``shapes`` are those of the model's state.

    A group at which the process dies or hangs is left out, and a new process goes on with the others.
    """
    allowed = allowed or caps()
    failed: dict[str, str] = {}
    waiting = [group.name for group in anatomy.groups]
    with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
        path = Path(folder) / "request.json"
        together = True
        while waiting:
            request = {"anatomy": anatomy_to_json(anatomy), "shapes": shapes, "groups": waiting, "together": together}
            path.write_text(json.dumps(request))
            answers, ended = _child(allowed.memory_bytes).ask(path, allowed.seconds)
            failed |= {name: _with_cap(why, allowed) for name, why in answers.items() if why}
            waiting = [name for name in waiting if name not in answers]
            if ended is not None and not together and waiting:
                failed[waiting.pop(0)] = _with_cap(ended, allowed)
            together = False  # what ended the first process may have been all of them at once
    return failed


def _with_cap(why: str, allowed: Caps) -> str:
    """The reason, with the cap on memory where that was it."""
    if "alloc" not in why.lower() and "memory" not in why.lower():
        return why
    return f"{why} ({allowed.memory_bytes / 1024**3:g} GiB are allowed; {_MEMORY} allows more)"


class _Child:
    """The process in which groups are tried."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nightpress.evaluators.dryrun", str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: Path, seconds: float) -> tuple[dict[str, str], str | None]:
        """Reasons by group, empty for those that passed, and how the process ended where it did not get through."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the dry run's process has no pipes")
        answers: dict[str, str] = {}
        try:
            stdin.write(f"{path}\n".encode())
            stdin.flush()
        except BrokenPipeError:
            return answers, self._ended()
        with selectors.DefaultSelector() as waiting:
            waiting.register(stdout, selectors.EVENT_READ)
            text, deadline = b"", time.monotonic() + seconds
            while True:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    return answers, f"its dry run took more than {seconds:g} s ({_TIME} allows more)"
                part = os.read(stdout.fileno(), 1 << 16)
                if not part:
                    return answers, self._ended()
                *lines, text = (text + part).split(b"\n")
                for line in lines:
                    if line.decode() == _DONE:
                        return answers, None
                    answers |= json.loads(line)
                    deadline = time.monotonic() + seconds

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def _ended(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"its dry run was killed by signal {-code}"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        told = lines[-1] if lines else f"exit code {code}"
        return f"its dry run failed: {told}"


_children: list[_Child] = []


def _child(memory_bytes: int) -> _Child:
    """The running process, or a new one."""
    if _children and (not _children[0].alive or _children[0].memory_bytes != memory_bytes):
        stop()
    if not _children:
        _children.append(_Child(memory_bytes))
    return _children[0]


def stop() -> None:
    """End the process; the next trial starts another."""
    while _children:
        _children.pop().close()


atexit.register(stop)


def main(memory_bytes: int) -> None:
    """Answer requests, one path a line, until standard input closes."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    importlib.import_module("torch")  # before anybody waits for it

    for line in sys.stdin:
        _answer(json.loads(Path(line.strip()).read_text()))
        sys.stdout.write(f"{_DONE}\n")
        sys.stdout.flush()


def _answer(request: Mapping[str, Any]) -> None:
    """Try groups, all of them at once or one after the other."""
    anatomy = anatomy_from_json(request["anatomy"])
    shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
    groups = [group for group in anatomy.groups if group.name in set(request["groups"])]
    if request["together"]:
        # Losses add up along every axis, so shapes that are right for all groups at once are right for each of them.
        if not _fault(anatomy, shapes, groups):
            _say({group.name: "" for group in groups})
        return
    for group in groups:
        gc.collect()  # a module refers to itself, and what the one before took must not count against this one
        _say({group.name: _fault(anatomy, shapes, [group])})


def _fault(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Group]) -> str:
    """Why these groups cannot lose a step together; empty when they can."""
    import torch

    from .apply import slice_state
    from .rebuild import rebuild

    kept = {g.name: kept_channels(g, g.step / g.channels) for g in groups}
    policy = Policy(
        model=anatomy.digest, prune={name: 1 - n / anatomy.group(name).channels for name, n in kept.items()}
    )
    planned = plan(anatomy, policy)
    try:
        state = {name: torch.zeros(shape) for name, shape in shapes.items()}
        sliced = slice_state(state, {g.name: list(range(g.channels - kept[g.name])) for g in groups}, anatomy)
        module = rebuild(planned, sliced)
        source = next(op for op in planned.ops if op.op.kind == "input")
        return _compare(module, planned, torch.zeros(source.shape))
    except (RuntimeError, ValueError, IndexError, MemoryError) as error:
        cause = error.__cause__ or error
        return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _compare(module: Any, planned: Plan, example: Any) -> str:
    import torch
    from torch import fx

    shapes = {op.op.name: op.shape for op in planned.ops}
    found: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in shapes and isinstance(value, torch.Tensor):
                found[n.name] = tuple(value.shape)
            return value

    with torch.no_grad():
        Recorder(module).run(example)
    for name, expected in shapes.items():
        if name in found and found[name] != expected:
            return f"pruning it turns {name} into {found[name]}, but {expected} was expected"
    return ""


def _say(answer: Mapping[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
