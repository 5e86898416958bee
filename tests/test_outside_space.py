"""Rules that the space does not contain: Optuna still sees the whole space, and what is trained is the rule."""

import warnings
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from nightpress.search.policy_sampler import distributions
from nightpress.search.records import TrialState
from nightpress.search.sampler import make_sampler
from nightpress.search.session import Prepared
from nightpress.search.store import policy_of
from nightpress.search.trials import Trials, enqueue
from nightpress.spaces.policy import FP32, INT8, FineTune, LayerBits, Policy
from nightpress.spaces.space import Space, uniform
from strategies import toy_anatomy
from test_planning import TASK
from test_search import batch_costs_of
from test_trials import PLANNED, begun, run

INT4 = LayerBits(weights=4, activations=8)
SPACE = Space(anatomy=toy_anatomy(), max_ratio=0.6, bit_choices=(FP32, INT8))
INTEGERS = replace(SPACE, bit_choices=(INT8,), blocks=False)
OUTSIDE = {
    "quarter": uniform(SPACE.anatomy, width=0.1, bits=FP32),
    "four bits": uniform(SPACE.anatomy, width=1, bits=INT4),
    "slow": Policy(model=SPACE.anatomy.digest, finetune=FineTune(learning_rate=0.5)),
}


def trained(folder: Path) -> Trials:
    """A night with three rules outside its space, all complete."""
    trials = begun(folder, PLANNED, most=6)
    trials.session.provide(
        prepared=Prepared(task=TASK, anatomy=SPACE.anatomy, space=SPACE, train_items=160, step_ms=9.0)
    )
    for name, policy in OUTSIDE.items():
        assert not SPACE.contains(policy)
        enqueue(trials.session, policy, "baseline", name)
    assert run(trials)
    return trials


@pytest.mark.parametrize("name", ["gp", "nsga2", "nsga3", "tpe"])
def test_rules_outside_the_space_leave_optuna_all_of_it_to_sample_jointly(tmp_path: Path, name: str) -> None:
    study = trained(tmp_path).session.store.study
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = make_sampler(name, 0, 6, SPACE, batch_costs_of(SPACE.anatomy))

        found = sampler.infer_relative_search_space(study, study.get_trials()[-1])

    whole = {key: value for key, value in distributions(SPACE).items() if not value.single()}
    assert found.keys() == whole.keys()


def test_a_rule_outside_the_space_is_trained_and_reported_as_it_is(tmp_path: Path) -> None:
    trials = trained(tmp_path)
    rules = [t for t in trials.session.store.trials() if t.role == "baseline"]

    assert {t.name: policy_of(t) for t in rules} == OUTSIDE
    assert {t.state for t in rules} == {TrialState.COMPLETE}
    seen = trials.session.store.study.get_trials()[0].params
    group = SPACE.anatomy.groups[0]
    assert seen[f"keep:{group.name}"] == SPACE.step_range(group)[0]


def test_what_a_space_does_not_offer_is_answered_with_the_nearest_that_it_does() -> None:
    policy = replace(
        uniform(INTEGERS.anatomy, width=0.1, bits=INT4), removed_blocks=("one",),
        finetune=FineTune(learning_rate=0.5),
    )  # fmt: skip

    found = INTEGERS.nearest_params(policy)

    assert found["finetune.learning_rate"] == 0.1
    assert {value for key, value in found.items() if key.startswith("bits:")} == {"8/8"}
    assert "block:one" not in found
    for group in INTEGERS.anatomy.groups:  # of what a removed block holds nothing is said
        least, most = INTEGERS.step_range(group)
        assert found[f"keep:{group.name}"] == (most if group.name == "one.a" else least)
    inside = uniform(INTEGERS.anatomy, width=0.5, bits=INT8)
    assert INTEGERS.nearest_params(inside) == INTEGERS.params(inside)
