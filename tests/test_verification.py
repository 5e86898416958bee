"""What takes an exported point off the front: the rules that each must pass; and what its record keeps of it."""

import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Outcome, Recipe
from nightpress.evaluators.quality import Score
from nightpress.search.attributes import record_of
from nightpress.search.config import Limits
from nightpress.search.long_tuning import load_outcome
from nightpress.search.records import LEAST_AGREEMENT, UNCOMPRESSED, Latency, Rung, TrialRecord, TrialState
from nightpress.search.verification import strike, verified_of
from nightpress.spaces.policy import INT8
from nightpress.spaces.space import uniform

LIMITS = Limits(max_latency_ms=0.9, min_accuracy=0.9, max_size_bytes=1000, max_macs=1000)


def struck(
    limits: Limits = LIMITS, name: str | None = None, *, latency_ms: float = 0.9, repeat_error: float = 0.02,
    accuracy: float = 0.9, size_bytes: int = 1000, agreement: float = LEAST_AGREEMENT, macs: int = 1000,
) -> str | None:  # fmt: skip
    """Beside an uncompressed model of 1 ms; all else is as little as the rules allow."""
    score = Score(accuracy=accuracy, accuracy_se=0.01, samples=100, seconds=0.0)
    outcome = Outcome(search=score, exported=score, top1_agreement=agreement, size_bytes=size_bytes)
    latency = Latency(latency_ms=latency_ms, low_ms=latency_ms, high_ms=latency_ms, measured=True,
                      repeat_error=repeat_error, reference_ms=1.0)  # fmt: skip
    trial = TrialRecord(number=0, state=TrialState.COMPLETE, digest="d", role="search", policy={}, name=name, macs=macs)
    return strike(limits, trial, outcome, latency)


def test_a_point_that_just_passes_every_rule_stands() -> None:
    assert struck() is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"latency_ms": 1.0, "repeat_error": 0.0}, "not surely faster than the original: 1.000 ms against 1.000 ms"),
        (
            {"repeat_error": 0.12},
            "not surely faster than the original: 0.900 ms ± 12% (its repeat error) against 1.000 ms",
        ),
        ({"agreement": 0.96}, "the exported file agrees with torch on only 96.0% of the test split"),
        ({"accuracy": 0.899}, "test accuracy 0.8990 is below min_accuracy 0.9"),
        ({"latency_ms": 0.91}, "measured 0.910 ms, above max_latency_ms 0.9"),
        ({"macs": 1001}, "it has 1001 multiply-accumulates, above max_macs 1000"),
        ({"size_bytes": 1001}, "its file has 1001 bytes, above max_size_bytes 1000"),
    ],
)
def test_a_point_that_fails_one_rule_is_struck_out_and_says_which(changed: dict[str, Any], reason: str) -> None:
    assert struck(**changed) == reason


def test_the_uncompressed_model_need_not_be_faster_than_itself() -> None:
    assert struck(Limits(), UNCOMPRESSED, latency_ms=1.0) is None


SCORE = Score(accuracy=0.9, accuracy_se=0.01, samples=8, seconds=0.0)
EXPORTED = Outcome(
    search=SCORE, simulated=SCORE, exported=SCORE, top1_agreement=1.0, max_abs_diff=0.0, size_bytes=9, answers="/w=="
)


def read_back(data: dict[str, Any]) -> str | None:
    verified = record_of(3, {}, {"verified:3": json.loads(json.dumps(data))}).verified
    assert verified is not None
    return verified.answers


def test_the_answers_of_an_export_last_from_its_evaluation_into_the_record(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    path.write_text(json.dumps(asdict(EXPORTED)))
    latency = Latency.of_windows(0.5, 0.01, 1.0, settled=True)
    record = asdict(verified_of(load_outcome(path), latency, rung=Rung.LONG, model_file="m.onnx", struck_out=None))
    assert read_back(record) == "/w=="
    # Older versions wrote neither.
    older = {key: value for key, value in record.items() if key != "answers"}
    assert read_back(older) is None
    path.write_text(json.dumps({key: value for key, value in asdict(EXPORTED).items() if key != "answers"}))
    assert load_outcome(path).answers is None


def test_damaged_answers_are_refused_as_the_record_is_read() -> None:
    latency = Latency.of_windows(0.5, 0.01, 1.0, settled=True)
    record = asdict(verified_of(EXPORTED, latency, rung=Rung.LONG, model_file="m.onnx", struck_out=None))
    with pytest.raises(ValueError, match="padding"):
        read_back({**record, "answers": "/w"})


@pytest.mark.slow
def test_an_export_leaves_the_answers_that_its_accuracy_counts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tiny.place(tmp_path_factory)
    recipe = Recipe(
        task=place.task, base=None, anatomy=place.anatomy, seed=0, compute=Compute(), batch_size=64, threads=1
    )
    job = Job(policy=uniform(place.anatomy, width=0.5, bits=INT8), rung="long", seed=0, steps=0, folder=tmp_path)
    outcome = Evaluator(recipe)(job)
    assert outcome.exported is not None
    assert outcome.answers is not None
    bits = np.unpackbits(np.frombuffer(base64.b64decode(outcome.answers), np.uint8))[: outcome.exported.samples]
    assert bits.mean() == pytest.approx(outcome.exported.accuracy)
