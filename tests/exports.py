"""A run folder whose four points are trained, exported and compared for real and timed by hand; no night is needed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Recipe
from nightpress.evaluators.latency.measure import Timing
from nightpress.evaluators.latency.target import Target, fingerprint, fingerprint_to_dict
from nightpress.search.folder import read_run
from nightpress.search.records import RunRecord
from nightpress.search.session import latency_of
from nightpress.search.store import Store, open_storage
from nightpress.search.verification import verified_of
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import uniform

REFERENCE_MS = 0.4
LATENCIES_MS = (0.4, 0.2, 0.1, 0.05)
"""Of trials 0 (the original), 1 (INT8), 2 (half, INT8) and 3 (a quarter, INT8)."""

_runs: list[Path] = []


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """The session's run folder; to be read only."""
    if not _runs:
        place, threads = tiny.place(factory), torch.get_num_threads()
        folder = tiny.write_run(tiny.config_for(place, factory.mktemp("verified")))
        state = {
            "state": "done", "phase": "report", "task": "tiny", "model": place.anatomy.digest, "data": "da7a",
            "code": "c0de", "reference_accuracy": {"given": 1.0, "trained_longer": 1.0, "counted": 1.0},
            "started": "2026-01-31T22:00:00+00:00", "deadline": "2026-02-01T07:00:00+00:00",
        }  # fmt: skip
        begun = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**begun, **state}))
        device = fingerprint_to_dict(fingerprint(Target()))
        (folder / "target.json").write_text(json.dumps({"device": device}))
        evaluator = Evaluator(_recipe(place))
        for policy, latency_ms in zip(policies(place.anatomy), LATENCIES_MS, strict=True):
            _add(folder, evaluator, policy, latency_ms)
        torch.set_num_threads(threads)
        _runs.append(folder)
    return _runs[0]


def policies(anatomy: Anatomy) -> list[Policy]:
    like = Policy(model=anatomy.digest)
    return [
        uniform(anatomy, width=1, bits=FP32, like=like),
        *(uniform(anatomy, width=width, bits=INT8, like=like) for width in (1, 0.5, 0.25)),
    ]


def _recipe(place: tiny.Place) -> Recipe:
    return Recipe(
        task=place.task, base=None, anatomy=place.anatomy, seed=0, compute=Compute(), batch_size=64, threads=1,
        disabled_optimizers=Target().disabled_optimizers,
    )  # fmt: skip


def _add(folder: Path, evaluator: Evaluator, policy: Policy, latency_ms: float) -> None:
    number = tiny.add_trial(folder, policy)
    job = Job(policy=policy, rung="long", seed=0, steps=0, folder=folder / "artifacts" / str(number))
    outcome = evaluator(job)
    assert outcome.exported is not None
    # All four answer alike, which would leave one point on the front: a hair less for each faster one.
    stated = replace(outcome.exported, accuracy=outcome.exported.accuracy - 0.0002 * number)
    timing = Timing(windows_ms=(latency_ms, latency_ms * 1.01), reference_ms=REFERENCE_MS)
    verified = verified_of(
        replace(outcome, exported=stated), latency_of(timing), rung="long", model_file=f"artifacts/{number}/model.onnx",
        struck_out=None,
    )  # fmt: skip
    store = Store(open_storage(folder, None))
    store.verify(number, verified)
    if latency_ms == REFERENCE_MS:
        (folder / "artifacts" / "reference.onnx").write_bytes((job.folder / "model.onnx").read_bytes())


def copy_of(run: Path, folder: Path) -> Path:
    """A run to write into."""
    return Path(shutil.copytree(run, folder / "run"))


def record(run: Path) -> RunRecord:
    return read_run(run)


def split_file(run: Path, path: Path, count: int | None = None) -> Path:
    """The test split as an .npz file."""
    from nightpress.evaluators.task import load_task

    inputs, targets = load_task(record(run).config["task"]).test.tensors  # type: ignore[attr-defined]
    np.savez(path, inputs=inputs.numpy()[:count], targets=targets.numpy()[:count])
    return path
