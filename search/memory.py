"""What our sampler remembers from one proposal to the next, in the run folder: a night that was killed goes on as an
undisturbed one would."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float64]]
NUMBER = "number"


class Memory:
    """Two files by turns: a driver may be killed after a proposal was remembered and before its trial began, and then
    that proposal is made again from what was known before it."""

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"sampler-{turn}.npz" for turn in range(2)]
        self._turn = 0

    def before(self, number: int) -> Arrays | None:
        """What was remembered with the last proposal before trial ``number``; None where nothing was."""
        known = [(int(found[NUMBER]), turn, found) for turn, path in enumerate(self._paths)
                 if (found := _read(path)) is not None and found[NUMBER] < number]  # fmt: skip
        if not known:
            return None
        _, turn, found = max(known, key=lambda entry: entry[0])
        self._turn = 1 - turn
        return found

    def keep(self, number: int, arrays: Arrays) -> None:
        """Remember with the proposal of trial ``number``; whole or not at all. A full disk costs the memory only."""
        path = self._paths[self._turn]
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **cast("Any", {**arrays, NUMBER: np.array(float(number))}))
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            return
        self._turn = 1 - self._turn


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file:  # numpy leaves a file that it cannot read open
            arrays = np.load(file, allow_pickle=False)
            return {name: arrays[name] for name in arrays.files} if NUMBER in arrays.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
