"""``nightpress finetune DIR``: the full-length training of an export, as a new export with new numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..spaces.errors import InputError
from ..spaces.policy import digest
from . import verify
from .bundle import MANIFEST, PLAIN, POLICY, Options, write_files
from .folder import staged
from .late import WEIGHTS, Weights, measure_weights
from .origin import Origin
from .recipe import FINETUNE, Training, read_recipe, with_policy


def finetune_export(
    source: Path, out: Path, *, epochs: float | None = None, task: str | None = None, options: Options = PLAIN
) -> dict[str, Any]:
    """Train the weights of the export ``source`` further and write the export ``out``; returns the command's JSON.

    ``epochs`` and ``task`` win over ``finetune.yaml``. Raises InputError when the export is not whole, its task is
    another one now, or this machine cannot run its target.
    """
    origin, training = read_export(source)
    training = replace(training, epochs=training.epochs if epochs is None else epochs, task=task or training.task)
    trained = with_policy(origin, training, digest(training.policy))
    weights = Weights(
        task=training.task, policy=training.policy, file=source / WEIGHTS, rung="long", target=origin.target,
        batch_size=training.batch_size, seed=training.seed, epochs=training.epochs,
    )  # fmt: skip
    with staged(out, force=options.force) as folder:
        verified = measure_weights(weights, folder, f"{source}: the export was made with", str(origin.digests["model"]))
        data = write_files(replace(trained.here(), task=training.task), verified, folder, options)
    return {"dir": str(out), "epochs": training.epochs, "before": origin_accuracy(source), **data}


def read_export(folder: Path) -> tuple[Origin, Training]:
    """An export's origin and training. ``finetune.yaml`` may have been edited, every other file must be as exported.

    Raises InputError.
    """
    try:
        manifest = verify.read_json(folder / MANIFEST)
        files = {name: value for name, value in manifest["files"].items() if name != FINETUNE}
        check = verify.check_files(folder, {"files": files})
        if check.state == "failed":
            raise InputError(f"{folder}: {check.text}.")
        policy = {k: v for k, v in json.loads((folder / POLICY).read_text()).items() if k != "digests"}
        origin = Origin.from_dict(manifest["origin"], policy)
    except verify.VerifyError as error:
        raise InputError(str(error)) from None
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{folder}: its {MANIFEST} is not one that this nightpress writes.") from None
    return origin, read_recipe(folder / FINETUNE, policy)


def origin_accuracy(folder: Path) -> float:
    """The accuracy that an export states."""
    return float(verify.read_json(folder / MANIFEST)["measured"]["accuracy"])
