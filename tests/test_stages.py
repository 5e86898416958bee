"""Staged pruning: how much each stage may cut."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.spaces.anatomy import Anatomy, Group, kept_channels
from nightpress.spaces.policy import MAX_STAGES, FineTune, Policy
from nightpress.spaces.space import canonical
from nightpress.spaces.stages import FIRST_RATIO, STEP_RATIO, stage_policies, useful_stages
from strategies import policies, toy_anatomy

ANATOMY = toy_anatomy()
FINE = Group(name="fine", channels=100, step=1, layers=("stem",), macs=0)
COARSE = Group(name="coarse", channels=16, step=8, layers=("head",), macs=0)


def anatomy_of(*groups: Group) -> Anatomy:
    return replace(ANATOMY, groups=groups)


def staged(stages: int, prune: dict[str, float] | None = None, **changes: object) -> tuple[Policy, ...]:
    policy = Policy(model="m", prune=prune or {}, finetune=FineTune(stages=stages))
    return stage_policies(replace(policy, **changes), anatomy_of(FINE, COARSE))  # type: ignore[arg-type]


def test_the_first_stage_cuts_30_percent_and_each_further_one_10_points_more() -> None:
    stages = staged(6, {"fine": 0.8})

    assert [stage.prune["fine"] for stage in stages] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def test_a_group_that_loses_less_waits_once_it_is_there() -> None:
    stages = staged(20, {"fine": 0.35, "coarse": 0.5})

    assert [dict(stage.prune) for stage in stages] == [{"fine": 0.3}, {"fine": 0.35}, {"fine": 0.35, "coarse": 0.5}]


def test_too_few_stages_widen_evenly_from_30_percent() -> None:
    assert [stage.prune["fine"] for stage in staged(3, {"fine": 0.9})] == pytest.approx([0.3, 0.6, 0.9])


def test_coarse_groups_wait_and_never_run_ahead() -> None:
    stages = staged(6, {"fine": 0.8, "coarse": 0.5})

    # One of two steps may go once half of the channels may.
    assert [stage.prune.get("coarse", 0.0) for stage in stages] == [0, 0, 0.5, 0.5, 0.5, 0.5]


def test_masks_grow_with_the_stages() -> None:
    stages = staged(3, sparsity={"stem": 0.5, "head": 0.2})

    assert [dict(stage.sparsity) for stage in stages] == [
        {"stem": 0.3, "head": 0.2}, {"stem": 0.4, "head": 0.2}, {"stem": 0.5, "head": 0.2},
    ]  # fmt: skip


@pytest.mark.parametrize("prune", [{}, {"fine": 0.3}, {"fine": 0.25}])
def test_what_the_first_stage_may_cut_takes_one_stage(prune: dict[str, float]) -> None:
    assert len(staged(5, prune)) == 1


def test_one_stage_is_the_policy_itself() -> None:
    assert [stage.prune["fine"] for stage in staged(1, {"fine": 0.9})] == [0.9]


@given(policies(ANATOMY))
def test_stages_only_ever_cut_more_and_end_at_the_policy(policy: Policy) -> None:
    stages = stage_policies(policy, ANATOMY)
    widths = [[kept_channels(g, s.prune.get(g.name, 0.0)) for g in ANATOMY.groups] for s in stages]

    assert stages[-1] is policy
    assert len(stages) <= policy.finetune.stages
    assert all(fewer <= more for before, after in pairwise(widths)
               for more, fewer in zip(before, after, strict=True))  # fmt: skip


@given(st.floats(0.31, 0.99))
def test_every_ratio_is_reached_in_steps_of_at_most_10_points(ratio: float) -> None:
    cut = [stage.prune["fine"] for stage in staged(MAX_STAGES, {"fine": ratio})]

    assert cut[0] == pytest.approx(FIRST_RATIO)
    assert all(later - earlier <= STEP_RATIO + 1e-6 for earlier, later in pairwise(cut))


@given(policies(ANATOMY), st.integers(1, MAX_STAGES))
def test_stages_that_would_cut_nothing_do_not_count(policy: Policy, more: int) -> None:
    once = canonical(policy, ANATOMY)
    useful = useful_stages(replace(once, finetune=FineTune(stages=more)))

    one, other = (stage_policies(replace(once, finetune=FineTune(stages=n)), ANATOMY) for n in (useful, more))

    assert [(s.prune, s.sparsity) for s in one] == [(s.prune, s.sparsity) for s in other]
