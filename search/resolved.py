"""A run's config as its folder keeps it, and whether a resumed run means the same."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..spaces.errors import InputError
from .claims import without_password
from .config import RunConfig
from .folder import CONFIG

WHERE = ("runner", "address", "workers", "resources")


def resolved_config(config: RunConfig) -> dict[str, Any]:
    """The config as a run keeps it: all defaults filled in, the time limits left to the state, and without what is
    secret or nobody else's: the password of a storage, and who is told."""
    data = asdict(config)
    for key in ("out", "until", "budget_seconds", "notify", "force"):  # what force led to stands in the state
        data.pop(key)
    if config.search.storage is not None:
        data["search"]["storage"] = without_password(config.search.storage)
    return _plain(data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def check_same(before: Any, now: dict[str, Any], config: RunConfig, path: Path) -> None:
    """A resumed run must mean the same thing; the time limit may differ, and so may where it runs and what it may use.
    A key that the version before did not have must be at its default."""
    before = before if isinstance(before, dict) else {}
    default = resolved_config(RunConfig(task=config.task, base=config.base, out=config.out))
    for key, value in now.items():
        if key == "max_disk_bytes":
            continue
        was = before.get(key, default[key])
        if isinstance(was, dict) and isinstance(default[key], dict):
            was = {**default[key], **was}
        if key == "search":
            was, value = _what(was), _what(value)
        if was != value:
            raise InputError(
                f"{path / CONFIG}: a run is resumed with the config it began with, but {key} was {was!r} and is now "
                f"{value!r}."
            )


def _what(search: Any) -> Any:
    """The part of ``search`` that says what is run; where it runs may differ."""
    return {k: v for k, v in search.items() if k not in WHERE} if isinstance(search, dict) else search
