"""What a finished night knows about other limits, and why its finalists are as they are."""

import json

import pytest

import tiny
from nightpress.spaces.policy import digest, policy_from_json


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tiny.Night:
    return tiny.night(tmp_path_factory)


def test_suggestions_are_untried_policies_within_the_limits(
    night: tiny.Night, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = json.loads((night.run / "state.json").read_text())["reference"]
    most = 0.9 * reference["latency_ms"]

    found = tiny.call("suggest", night.run, "--max-latency-ms", most, "--min-accuracy", 0.05, "--json", capsys=capsys)

    assert found.code == 0, found.err
    tried = {trial["digest"] for trial in night.result.json["front"] + night.result.json["baselines"]}
    assert all(point["latency_ms"] <= most and point["measured"] for point in found.json["verified"])
    assert found.json["suggested"]
    for entry in found.json["suggested"]:
        assert entry["latency_ms"] <= most * 1.0001
        assert entry["accuracy_low"] < entry["accuracy"] < entry["accuracy_high"]
        assert entry["low_ms"] <= entry["latency_ms"] <= entry["high_ms"]
        assert entry["digest"] not in tried
        assert digest(policy_from_json(json.dumps(entry["policy"]), "suggested")) == entry["digest"]


def test_a_limit_of_nothing_is_refused(night: tiny.Night, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = tiny.refused(tiny.call("suggest", night.run, "--max-latency-ms", 0, capsys=capsys))

    assert "--max-latency-ms must be above 0, but got 0" in sentence


def test_a_night_says_why_its_finalists_are_as_they_are(night: tiny.Night) -> None:
    why = json.loads((night.run / "why.json").read_text())
    verified = [t for t in night.result.json["front"] if t["role"] != "baseline"]

    assert {str(trial["trial"]) for trial in verified} <= set(why)
    for entries in why.values():
        for entry in entries:
            assert entry["kind"] in {"group", "block", "layer"}
            assert entry.keys() >= {"name", "choice", "sensitivity", "saved_ms", "accuracy_cost", "measured"}
        rest = [entry["saved_ms"] for entry in entries if not entry["measured"]]
        assert rest == sorted(rest, reverse=True)
