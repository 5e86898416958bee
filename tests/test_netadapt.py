"""The greedy rival's rounds: all of a round's cuts save what the round is to save."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nightpress.search.costs import ManyCosts
from nightpress.search.netadapt import STEP, NetAdaptSampler
from nightpress.spaces.plans import Choices, policy_at
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import Space, uniform
from strategies import toy_anatomy

SPACE = Space(anatomy=toy_anatomy(), max_ratio=0.8, bit_choices=(FP32, INT8))
HEAVY, *LIGHT = [group.name for group in SPACE.anatomy.groups]
WHOLE = uniform(SPACE.anatomy, width=1, bits=INT8)


def latency_ms(policy: Policy, floor_ms: float) -> float:
    """Nearly all of what can be saved lies in one group, some in a block, and next to nothing in the others."""
    saved = policy.prune.get(HEAVY, 0.0) + 0.3 * ("one" in policy.removed_blocks)
    return floor_ms + 1 - 0.5 * saved - 0.01 * sum(policy.prune.get(name, 0.0) for name in LIGHT)


def costs(floor_ms: float) -> ManyCosts:
    def priced(choices: Choices) -> NDArray[np.float64]:
        found = [latency_ms(policy_at(SPACE.anatomy, choices, i), floor_ms) for i in range(len(choices))]
        return np.array([(value, 1.0) for value in found])

    return priced


def test_a_round_has_only_cuts_that_save_its_latency() -> None:
    """A cut of a light group costs no accuracy, and would win each round while the network stays as slow as it is."""
    cuts = NetAdaptSampler(SPACE, costs(0.0), 0).cuts(WHOLE)

    wanted = (1 - STEP) * latency_ms(WHOLE, 0.0)
    assert {*(name for cut in cuts for name in cut.prune), *(name for cut in cuts for name in cut.removed_blocks)} == {
        HEAVY, "one"
    }  # fmt: skip
    assert all(latency_ms(cut, 0.0) <= wanted for cut in cuts)


@pytest.mark.parametrize("floor_ms", [100.0, np.nan])
def test_where_no_cut_saves_it_each_is_tried_as_far_as_it_goes(floor_ms: float) -> None:
    cuts = NetAdaptSampler(SPACE, costs(floor_ms), 0).cuts(WHOLE)

    assert {name for cut in cuts for name in cut.prune} == {HEAVY, *LIGHT}
    assert {name for cut in cuts for name in cut.removed_blocks} == {block.name for block in SPACE.anatomy.blocks}
