"""The one boundary where text becomes a config: YAML files, times and targets. Errors name file and key."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml

from ..evaluators.latency.target import RUNTIMES, Target, target_from_dict
from ..search.claims import sqlite_file, without_password
from ..search.clock import Deadline
from ..search.config import (
    AUTO,
    PARTS,
    RAY,
    RUNNERS,
    SAMPLERS,
    BitsConfig,
    FineTuneConfig,
    Limits,
    Notify,
    PruneConfig,
    RunConfig,
    SearchConfig,
    SpaceConfig,
)
from ..spaces.errors import InputError
from ..spaces.policy import (
    ACTIVATION_BITS,
    DISTILL_METHODS,
    IMPORTANCES,
    MAX_STAGES,
    RANGES,
    SCALES,
    WEIGHT_BITS,
    nearest,
)

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTarget:
    """``target:`` written in full."""

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpace:
    """``space:`` as a file writes it; ``distill`` is a list of methods, or true for all of them."""

    prune: PruneConfig | None = field(default_factory=PruneConfig)
    bits: BitsConfig = field(default_factory=BitsConfig)
    blocks: bool = True
    distill: tuple[str, ...] | bool = ("logit",)
    sparsity: bool = False
    importance: tuple[str, ...] = ("l2",)
    stages: tuple[int, ...] = (1,)
    ranges: tuple[str, ...] = ("minmax",)
    scales: tuple[str, ...] = ("fixed",)

    @property
    def methods(self) -> tuple[str, ...]:
        """The distillation methods on offer; none at all where distillation is off."""
        if isinstance(self.distill, bool):
            return DISTILL_METHODS if self.distill else ()
        return () if self.distill == ("none",) else self.distill

    @property
    def resolved(self) -> SpaceConfig:
        return SpaceConfig(
            prune=self.prune, bits=self.bits, blocks=self.blocks, distill=self.methods, sparsity=self.sparsity,
            importance=self.importance, stages=self.stages, ranges=self.ranges, scales=self.scales,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FileConfig:
    """A run's config file: every key has a default but ``task``."""

    task: str
    target: str | FileTarget = "onnxruntime"
    out: str | None = None
    seed: int = 0
    until: str | None = None
    budget: str | None = None
    limits: Limits = field(default_factory=Limits)
    space: FileSpace = field(default_factory=FileSpace)
    search: SearchConfig = field(default_factory=SearchConfig)
    finetune: FineTuneConfig = field(default_factory=FineTuneConfig)
    calibration_policies: int | None = None
    warm_start: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    device: str = "auto"
    max_disk: str = "20GB"
    notify: Notify = field(default_factory=Notify)


def load_config(path: Path, out: Path | None = None) -> RunConfig:
    """Read a config file; ``out`` overrides its run folder. Raises InputError with file and key."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such config file; nightpress init DIR makes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the config cannot be read: {error}.") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise InputError(
            f"{path}: not YAML{where}: {getattr(error, 'problem', None) or 'it cannot be parsed'}."
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a config is a mapping of keys, but got {type(data).__name__}.")
    file = validated(cast("dict[str, Any]", data), path)
    return _resolved(file, path, out)


def validated(data: Mapping[str, Any], path: Path) -> FileConfig:
    """Check keys by name, then types by pydantic, then values. Raises InputError for the first that is wrong."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(data, FileConfig, "", path)
    if data.get("task") is None:
        raise InputError(f"{path}: task is missing; it names a built-in task or path/to/file.py:function.")
    until = data.get("until")
    if until is not None and not isinstance(until, str):  # YAML reads 22:30 as a number in base 60
        raise InputError(f'{path}: until must stand in quotes, as "22:30" does, but without them YAML reads {until!r}.')
    try:
        return TypeAdapter(FileConfig).validate_python(dict(data))
    except ValidationError as error:
        # Of a union's alternatives the one that got furthest is what was meant.
        wrong = max(error.errors(), key=lambda found: len(found["loc"]))
        key = ".".join(str(part) for part in wrong["loc"] if not str(part)[:1].isupper() and part not in _ALTERNATIVES)
        text = _WORDS.get(wrong["type"]) or re.sub(r"^(Input|Value) should be", "must be", wrong["msg"])
        raise InputError(f"{path}: {key} {text[0].lower() + text[1:]}, but got {wrong['input']!r}.") from None


_ALTERNATIVES = (
    "str",
    "bool",
    "int",
    "literal['auto']",
    "tuple[str, ...]",
)  # of unions, as pydantic calls them in a key's path
_WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "dataclass_type": "must be a mapping of keys",
}


def _check_keys(data: Mapping[str, Any], kind: type, prefix: str, path: Path) -> None:
    hints = get_type_hints(kind)
    for key, value in data.items():
        if key not in hints:
            raise InputError(f"{path}: unknown key {prefix}{key}{nearest(str(key), sorted(hints))}.")
        nested = next((t for t in (hints[key], *get_args(hints[key])) if is_dataclass(t)), None)
        if nested is not None and isinstance(value, dict):
            _check_keys(cast("dict[str, Any]", value), cast("type", nested), f"{prefix}{key}.", path)


def _resolved(file: FileConfig, path: Path, out: Path | None) -> RunConfig:
    where = str(path)
    _check_values(file, where)
    base = path.resolve().parent
    target, profile = parse_target(file.target, base, where)
    if out is None:
        out = Path(file.out) if file.out is not None else Path("runs") / re.sub(r"\W+", "-", file.task).strip("-")
    return RunConfig(
        task=file.task, base=str(base), out=out, target=target, target_profile=profile, seed=file.seed,
        until=file.until,
        budget_seconds=parse_budget(file.budget, f"{where}: budget") if file.budget is not None else None,
        limits=file.limits,
        space=file.space.resolved,
        search=_search(file.search, base), finetune=file.finetune, calibration_policies=file.calibration_policies,
        warm_start=tuple(str(base / earlier) for earlier in file.warm_start),
        seeds=tuple(str(base / name) for name in file.seeds), device=file.device,
        max_disk_bytes=parse_size(file.max_disk, f"{where}: max_disk"), notify=file.notify,
    )  # fmt: skip


def _about_workers(search: SearchConfig) -> list[tuple[str, object, bool, str]]:
    """Rules of where evaluations run, as key, value, whether it holds, and what must."""
    workers, address, needs = search.workers, search.address, search.resources
    on_ray, alone = search.runner == RAY, "left out unless search.runner is ray"
    named = address is None or re.fullmatch(r"(ray://)?[^\s/]+:\d+", address) is not None
    return [
        ("search.workers", workers, workers == AUTO or int(workers) >= 1, "at least 1, or auto"),
        ("search.address", address, named, "host:port of a cluster's head node, or ray://host:port"),
        ("search.address", address, address is None or on_ray, alone),
        ("search.resources.cpu", needs.cpu, needs.cpu is None or needs.cpu >= 1, "at least 1"),
        ("search.resources.gpu", needs.gpu, needs.gpu >= 0, "at least 0"),
        ("search.resources.gpu", needs.gpu, not needs.gpu or on_ray, alone),
        ("search.resources.memory_gb", needs.memory_gb, needs.memory_gb is None or needs.memory_gb > 0, "above 0"),
    ]  # fmt: skip


def _search(search: SearchConfig, base: Path) -> SearchConfig:
    """A storage's file is named from the config's folder, so that every command finds it from anywhere."""
    if search.storage is None:
        return search
    without_password(search.storage)  # what is no URL is told before the night begins
    file = sqlite_file(search.storage)
    if file is None or Path(file).is_absolute():
        return search
    return replace(search, storage=f"sqlite:///{base / file}")


def _check_values(file: FileConfig, where: str) -> None:
    count = file.calibration_policies
    rules: list[tuple[str, object, bool, str]] = [
        ("search.sampler", file.search.sampler, file.search.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
        ("search.without", file.search.without, set(file.search.without) <= set(PARTS), f"a list out of {list(PARTS)}"),
        ("search.runner", file.search.runner, file.search.runner in RUNNERS, f"one of {', '.join(RUNNERS)}"),
        *_about_workers(file.search),
        ("device", file.device, file.device in DEVICES, f"one of {', '.join(DEVICES)}"),
        ("seed", file.seed, 0 <= file.seed < 2**32, "at least 0 and of at most 32 bits"),
        ("calibration_policies", count, count is None or 10 <= count <= 500, "between 10 and 500"),
        ("finetune.batch_size", file.finetune.batch_size, file.finetune.batch_size >= 2, "at least 2"),
    ]
    rules += [_listed(f"space.{key}", *listed) for key, *listed in _lists(file.space)]
    if file.space.prune is not None:
        ratio = file.space.prune.max_ratio
        rules.append(("space.prune.max_ratio", ratio, 0 <= ratio < 1, "in [0, 1)"))
    for name in ("short_steps", "long_steps", "finalists"):
        value = getattr(file.finetune, name)
        rules.append((f"finetune.{name}", value, value is None or value >= 1, "at least 1"))
    part, short = file.finetune.part_steps, file.finetune.short_steps
    fits = part is None or 0 <= part < (short or part + 1)
    rules.append(("finetune.part_steps", part, fits, "at least 0 and less than short_steps"))
    if file.search.max_trials is not None:
        rules.append(("search.max_trials", file.search.max_trials, file.search.max_trials >= 1, "at least 1"))
    webhook = file.notify.webhook
    holds = webhook is None or webhook.startswith(("https://", "http://"))
    rules.append(("notify.webhook", "another URL" if not holds else None, holds, "a URL that begins with https://"))
    for limit in fields(Limits):
        value = getattr(file.limits, limit.name)
        rules.append((f"limits.{limit.name}", value, value is None or value > 0, "above 0"))
    least = file.limits.min_accuracy
    rules.append(("limits.min_accuracy", least, least is None or least <= 1, "at most 1"))
    for key, value, holds, rule in rules:
        if not holds:
            shown = list(value) if isinstance(value, tuple) else value  # type: ignore[arg-type]
            raise InputError(f"{where}: {key} must be {rule}, but got {shown!r}.")


def _lists(space: FileSpace) -> list[tuple[str, tuple[object, ...], tuple[object, ...]]]:
    """Keys below ``space:`` that hold a list, with what came and what may."""
    return [
        ("bits.weights", space.bits.weights, WEIGHT_BITS),
        ("bits.activations", space.bits.activations, ACTIVATION_BITS),
        ("distill", space.distill if isinstance(space.distill, tuple) else DISTILL_METHODS, DISTILL_METHODS),
        ("importance", space.importance, IMPORTANCES),
        ("stages", space.stages, tuple(range(1, MAX_STAGES + 1))),
        ("ranges", space.ranges, RANGES),
        ("scales", space.scales, SCALES),
    ]


def _listed(key: str, came: tuple[object, ...], allowed: tuple[object, ...]) -> tuple[str, object, bool, str]:
    holds = bool(came) and set(came) <= set(allowed) and len(set(came)) == len(came)
    return key, came, holds, f"a list out of {list(allowed)}, none of them twice"


def parse_target(value: str | FileTarget, base: Path, where: str) -> tuple[Target, str | None]:
    """A target from a runtime's name, its settings, or a profile file (then its path is returned as well)."""
    if isinstance(value, FileTarget):
        if value.runtime not in RUNTIMES:
            raise InputError(
                f"{where}: target.runtime must be one of {', '.join(RUNTIMES)}, but got {value.runtime!r}."
            )
        for name, number in (("threads", value.threads), ("batch", value.batch)):
            if number < 1:
                raise InputError(f"{where}: target.{name} must be at least 1, but got {number}.")
        return Target(runtime=value.runtime, threads=value.threads, batch=value.batch), None
    if value in RUNTIMES:
        return Target(runtime=value), None
    profile = base / value
    if not profile.is_file():
        raise InputError(f"{where}: target must be one of {', '.join(RUNTIMES)} or a profile file, but got {value!r}.")
    return read_target(profile), str(profile)


def read_target(profile: Path) -> Target:
    """The target that a profile file was measured on. Raises InputError when it is not a profile."""
    try:
        return target_from_dict(json.loads(profile.read_text())["target"], str(profile))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{profile}: not a profile of nightpress calibrate ({type(error).__name__}: {error})."
        ) from None


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_MOST_SECONDS = 365 * 86400


def parse_budget(text: str, where: str) -> float:
    """``8h``, ``1h30m``, ``90s`` in seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([dhms])", text)
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*([dhms])|\s", "", text):
        raise InputError(f"{where} must be a length of time such as 8h or 1h30m, but got {text!r}.")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not 0 < seconds <= _MOST_SECONDS:
        raise InputError(f"{where} must be longer than no time and at most 365d, but got {text!r}.")
    return seconds


_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_size(text: str, where: str) -> int:
    """``20GB``, ``500 MB`` in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]b)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{where} must be a size such as 20GB or 500MB, but got {text!r}.")
    return int(float(match[1]) * _BYTES[match[2]])


def parse_until(text: str, where: str, now: datetime | None = None) -> float:
    """``07:00`` (the next one, local time) or an ISO 8601 date and time, in seconds since the epoch."""
    now = now or datetime.now().astimezone()
    clock = re.fullmatch(r"(\d{1,2}):(\d{2})", text)
    if clock and int(clock[1]) < 24 and int(clock[2]) < 60:
        naive = now.replace(tzinfo=None, hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        if naive <= now.replace(tzinfo=None):
            naive += timedelta(days=1)
        return naive.astimezone().timestamp()  # the zone's own rules for that day: nights with a clock change too
    try:
        moment = datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise InputError(f"{where} must be a time such as 07:00 or 2026-01-31T07:00, but got {text!r}.") from None
    if moment <= now:
        raise InputError(
            f"{where} must lie in the future, but got {text!r} and it is {now.isoformat(timespec='minutes')}."
        )
    return moment.timestamp()


def deadline_of(config: RunConfig, until: str | None, budget: str | None) -> Deadline | None:
    """When the night ends; the command line wins over the config; None when nobody says."""
    if until is not None and budget is not None:
        raise InputError("--until and --budget exclude each other.")
    if until is not None:
        return Deadline(parse_until(until, "--until"), fixed=True)
    if budget is not None:
        return Deadline(time.time() + parse_budget(budget, "--budget"), fixed=False)
    if config.until is not None and config.budget_seconds is not None:
        raise InputError("until and budget exclude each other in a config.")
    if config.until is not None:
        return Deadline(parse_until(config.until, "until"), fixed=True)
    return Deadline(time.time() + config.budget_seconds, fixed=False) if config.budget_seconds is not None else None
