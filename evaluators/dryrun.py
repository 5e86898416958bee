"""Groups are tried before they are offered: pruned, run, and every shape compared with the plan's.

The trial is a process of its own with a cap on memory and time, which needs only the anatomy: shapes do not depend on
weights. ``python -m nightpress.evaluators.dryrun`` reads it from a file and prints one JSON line a group.
"""

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spaces.anatomy import Anatomy, Group, anatomy_from_json, anatomy_to_json, kept_channels
from ..spaces.plan import Plan, plan
from ..spaces.policy import Policy

MEMORY_BYTES = 4 * 1024**3
SECONDS = 120.0


def verify_groups(
    anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], *, memory_bytes: int = MEMORY_BYTES,
    seconds: float = SECONDS,
) -> dict[str, str]:  # fmt: skip
    """Groups that cannot be pruned, with the reason. ``shapes`` are those of the model's state.

    A group at which the process dies or hangs is left out, and a new process goes on with the others.
    """
    failed: dict[str, str] = {}
    waiting = [group.name for group in anatomy.groups]
    with tempfile.TemporaryDirectory(prefix="nightpress-") as folder:
        path = Path(folder) / "request.json"
        while waiting:
            request = {"anatomy": anatomy_to_json(anatomy), "shapes": shapes, "groups": waiting}
            path.write_text(json.dumps({**request, "memory_bytes": memory_bytes}))
            answers, ended = _run(path, seconds)
            failed |= {name: why for name, why in answers.items() if why}
            waiting = [name for name in waiting if name not in answers]
            if waiting and ended is not None:
                failed[waiting.pop(0)] = ended
            elif waiting:  # all were tried together, and they fit
                break
    return failed


def _run(path: Path, seconds: float) -> tuple[dict[str, str], str | None]:
    """Reasons by group, empty for those that passed, and how the process ended where it did not get through."""
    command = [sys.executable, "-m", "nightpress.evaluators.dryrun", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        output, ended = done.stdout, _ended(done)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        ended = f"its dry run took more than {seconds:.0f} s"
    answers: dict[str, str] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            answers |= json.loads(line)
    return answers, ended


def _ended(done: "subprocess.CompletedProcess[str]") -> str | None:
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"its dry run was killed by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return f"its dry run failed: {lines[-1] if lines else f'exit code {done.returncode}'}"


def main(path: str) -> None:
    """Try the groups that a request names: first all of them at once, then each alone where that fails."""
    request: dict[str, Any] = json.loads(Path(path).read_text())
    cap = int(request["memory_bytes"])
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    anatomy = anatomy_from_json(request["anatomy"])
    shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
    groups = [group for group in anatomy.groups if group.name in set(request["groups"])]
    if len(groups) == len(anatomy.groups) and not _fault(anatomy, shapes, groups, meta=False):
        alone = {group.name: _fault(anatomy, shapes, [group], meta=True) for group in groups}
        if not any(alone.values()):
            _say(alone)
            return
    for group in groups:
        _say({group.name: _fault(anatomy, shapes, [group], meta=False)})


def _fault(anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Group], *, meta: bool) -> str:
    """Why these groups cannot lose a step together; empty when they can. ``meta`` computes shapes only."""
    import torch

    from .apply import slice_state
    from .rebuild import rebuild

    kept = {g.name: kept_channels(g, g.step / g.channels) for g in groups}
    policy = Policy(
        model=anatomy.digest, prune={name: 1 - n / anatomy.group(name).channels for name, n in kept.items()}
    )
    planned = plan(anatomy, policy)
    device = torch.device("meta" if meta else "cpu")
    try:
        state = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        sliced = slice_state(state, {g.name: list(range(g.channels - kept[g.name])) for g in groups}, anatomy)
        module = rebuild(planned, sliced)
        source = next(op for op in planned.ops if op.op.kind == "input")
        return _compare(module, planned, torch.zeros(source.shape, device=device))
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
        Recorder(module.to(example.device)).run(example)
    for name, expected in shapes.items():
        if name in found and found[name] != expected:
            return f"pruning it turns {name} into {found[name]}, but {expected} was expected"
    return ""


def _say(answer: Mapping[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
