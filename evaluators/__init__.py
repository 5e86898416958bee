"""What a policy is worth: the task, its anatomy, applying and fine-tuning a policy, measuring it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .task import Task

__all__ = ["Task"]


def __getattr__(name: str) -> Any:
    """``Task`` without importing torch before it is asked for."""
    if name == "Task":
        from .task import Task

        return Task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
