"""A real night with everything on offer: whatever is chosen (here at random), the workers can do."""

from pathlib import Path

import pytest

import tiny
from nightpress.search.folder import read_run
from nightpress.search.records import TrialState
from nightpress.spaces.policy import IMPORTANCES, RANGES, SCALES, policy_from_dict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_night_tries_all_that_is_on_offer(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    config = tiny.config_for(
        tiny.place(tmp_path_factory), tmp_path,
        search={"max_trials": 20, "sampler": "random"}, finetune={"short_steps": 2, "long_steps": 2, "finalists": 1},
        space={
            "bits": {"weights": [4, 8, 32], "activations": [8, 32]}, "importance": list(IMPORTANCES),
            "stages": [1, 3], "ranges": list(RANGES), "scales": list(SCALES), "sparsity": True, "distill": True,
        },
    )  # fmt: skip

    data = tiny.nightpress("run", config, "--json").json

    assert data["trials"]["FAILED"] == data["trials"]["RUNNING"] == 0
    trials = read_run(tmp_path / "run").trials
    done = [t for t in trials if t.role == "search" and t.state in {TrialState.COMPLETE, TrialState.STOPPED}]
    tried = [policy_from_dict(dict(trial.policy), f"trial {trial.number}") for trial in done]
    assert len(tried) >= 12
    assert len({policy.importance for policy in tried}) >= 4
    assert {policy.finetune.stages for policy in tried} >= {1, 3}
    assert {policy.ranges for policy in tried} == set(RANGES)
    assert {policy.scales for policy in tried} == set(SCALES)
    assert len({policy.distill.method for policy in tried}) >= 3
    assert any(policy.sparsity for policy in tried)
    assert all(trial.quality is not None for trial in done)
