"""What takes an exported point off the front: the rules that each verified trial must pass."""

from typing import Any

import pytest

from nightpress.evaluators.evaluate import Outcome
from nightpress.evaluators.quality import Score
from nightpress.search.config import Limits
from nightpress.search.records import UNCOMPRESSED, Latency
from nightpress.search.verification import LEAST_AGREEMENT, strike

LIMITS = Limits(max_latency_ms=0.9, min_accuracy=0.9, max_size_bytes=1000)


def struck(
    limits: Limits = LIMITS, name: str | None = None, *, latency_ms: float = 0.9, repeat_error: float = 0.02,
    accuracy: float = 0.9, size_bytes: int = 1000, agreement: float = LEAST_AGREEMENT,
) -> str | None:  # fmt: skip
    """Beside an uncompressed model of 1 ms; all else is as little as the rules allow."""
    score = Score(accuracy=accuracy, accuracy_se=0.01, samples=100, seconds=0.0)
    outcome = Outcome(search=score, exported=score, top1_agreement=agreement, size_bytes=size_bytes)
    latency = Latency(latency_ms=latency_ms, low_ms=latency_ms, high_ms=latency_ms, measured=True,
                      repeat_error=repeat_error, reference_ms=1.0)  # fmt: skip
    return strike(limits, name, outcome, latency)


def test_a_point_that_just_passes_every_rule_stands() -> None:
    assert struck() is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"latency_ms": 1.0, "repeat_error": 0.0}, "not faster than the original: 1.000 ms against 1.000 ms"),
        ({"repeat_error": 0.12}, "not faster than the original: 0.900 ms against 1.000 ms"),
        ({"agreement": 0.96}, "the exported file agrees with torch on only 96.0% of the test split"),
        ({"accuracy": 0.899}, "test accuracy 0.8990 is below min_accuracy 0.9"),
        ({"latency_ms": 0.91}, "measured 0.910 ms, above max_latency_ms 0.9"),
        ({"size_bytes": 1001}, "its file has 1001 bytes, above max_size_bytes 1000"),
    ],
)
def test_a_point_that_fails_one_rule_is_struck_out_and_says_which(changed: dict[str, Any], reason: str) -> None:
    assert struck(**changed) == reason


def test_the_uncompressed_model_need_not_be_faster_than_itself() -> None:
    assert struck(Limits(), UNCOMPRESSED, latency_ms=1.0) is None
