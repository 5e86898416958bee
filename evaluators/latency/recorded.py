"""What is asked of files that hold measured times, a profile and a kit's results: numbers that can be times, and the
operations that they belong to."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from ...spaces.anatomy import Anatomy
from ...spaces.errors import InputError

LEAST, MOST = 1e-6, 1e12
"""Between these lie all milliseconds, seconds and bytes of this world: further out, sums and squares overflow."""


def check_numbers(what: str, values: Iterable[object], path: Path, *, zero: bool = False) -> None:
    """Raises InputError unless all are finite and positive, or with ``zero`` not negative, and none is absurd."""
    rule = "be numbers that are not negative" if zero else "be positive numbers"
    for value in values:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
            raise InputError(f"{path}: {what} must {rule}, but one is {value!r}.")
        if number > MOST or (number < LEAST and not zero):
            raise InputError(f"{path}: {what} must lie between {LEAST:g} and {MOST:g}, but one is {value!r}.")


def is_whole(value: object, least: int = 1, most: int = 10**6) -> bool:
    """Whether a JSON value is a whole number between these."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def are_texts(values: object) -> bool:
    """Whether a value is a list or tuple of texts."""
    return isinstance(values, list | tuple) and all(isinstance(text, str) for text in cast("list[object]", values))


def operations_of(anatomy: Anatomy) -> dict[str, list[int]]:
    """What times of nodes and policies belong to: the shape of each operation, in order. The model's digest alone does
    not tell it, since the same weights take examples of several sizes."""
    return {op.name: list(op.shape) for op in anatomy.ops}


def first_difference(then: Mapping[str, Sequence[int]], anatomy: Anatomy) -> str | None:
    """The first operation that was recorded otherwise than the anatomy has it; None where none was."""
    for old, new in itertools.zip_longest(then.items(), operations_of(anatomy).items()):
        if old != new:
            was, here = ("none" if op is None else f"{op[0]} of shape {tuple(op[1])}" for op in (old, new))
            return f"an operation was {was}, here it is {here}"
    return None
