"""What a target can do, by measurement, and what the space makes of it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.evaluators.latency.capabilities import (
    COARSEST,
    CONV,
    NARROW,
    WIDE,
    Capabilities,
    Stair,
    Width,
    beside_profile,
    capabilities,
    capabilities_from_dict,
    forget_capabilities,
    steps_of,
)
from nightpress.evaluators.latency.target import CHANNEL_STEPS, Target, target_from_dict, target_to_dict
from nightpress.search.proposals import Sensitivity, baselines, greedy_walk, own_policies
from nightpress.spaces.policy import FP32, INT8, LayerBits, policy_to_json
from nightpress.spaces.space import Space, uniform
from strategies import toy_anatomy
from test_search import batch_costs_of

WIDTHS = NARROW + WIDE


def treads(of: int) -> dict[int, float]:
    """Latencies that rise only every so many channels."""
    return {width: float(-(-width // of)) for width in WIDTHS}


@pytest.mark.parametrize(
    ("kinds", "steps"),
    [
        ([treads(1)], ((0, 4), (64, 8))),
        ([treads(8)], ((0, 8), (64, 8))),
        ([treads(16)], ((0, 16), (64, 16))),
        # A width that is worth having in one precision stays on offer.
        ([treads(16), treads(4)], ((0, 4), (64, 8))),
        # Off the grid it takes longer: that wastes no width on it.
        ([{w: t * (1 if w % 4 == 0 else 1.5) for w, t in treads(1).items()}], ((0, 4), (64, 8))),
    ],
)
def test_the_step_is_the_smallest_that_wastes_few_widths(
    kinds: list[dict[int, float]], steps: tuple[tuple[int, int], ...]
) -> None:
    assert steps_of(kinds) == steps


@given(st.lists(st.floats(0.1, 10), min_size=len(WIDTHS), max_size=len(WIDTHS)))
def test_measured_steps_are_multiples_of_those_that_nothing_measured(times: list[float]) -> None:
    """So that a policy of one target is the same network for another."""
    for (first, step), (known, least) in zip(steps_of([dict(zip(WIDTHS, times, strict=True))]), CHANNEL_STEPS,
                                             strict=True):  # fmt: skip
        assert first == known
        assert step in {least * 2**power for power in range(COARSEST.bit_length())}


@pytest.mark.slow
def test_a_target_is_measured_once_and_told_to_space_profile_and_report() -> None:
    found = capabilities(Target())

    assert {(w.weights, w.activations): w.kernel for w in found.widths} == {
        (32, 32): "fp32", (16, 32): "fp32", (8, 32): "fp32", (8, 8): "int8", (7, 8): "int8", (4, 8): "int8"
    }  # fmt: skip
    assert found.integer_kernels
    assert all(width.speedup > 0 for width in found.widths)
    assert found.change_ms >= 0
    assert [stair.name for stair in found.stairs] == ["conv 3×3 fp32", "conv 3×3 INT8", "linear fp32", "linear INT8"]
    stored = json.loads(json.dumps(found.to_dict()))
    assert capabilities_from_dict(stored) == found
    beside = beside_profile(found)
    assert beside["staircases"][0]["points"][0].keys() == {"channels", "latency_ms"}
    target = found.applied(Target())
    assert target_from_dict(json.loads(json.dumps(target_to_dict(target)))) == target
    if found.settled:
        assert capabilities(Target()) == found  # read, not measured again: its seconds are the same


def test_what_is_forgotten_of_one_target_is_forgotten_of_all_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "nightpress"
    kept.mkdir()
    for name in ("capabilities-0a.json", "capabilities-1b.json", "pixels.safetensors"):
        (kept / name).write_text("{}")

    forget_capabilities()

    assert [path.name for path in kept.iterdir()] == ["pixels.safetensors"]


def test_integers_alone_on_a_device_without_them_take_the_steps_of_fp32() -> None:
    """Which is what their space offers."""
    treaded = (
        Stair(name=f"{CONV} {kind}", points=tuple(treads(of).items())) for kind, of in (("fp32", 8), ("INT8", 1))
    )
    found = Capabilities(
        stairs=tuple(treaded), widths=(Width(weights=8, activations=8, kernel="fp32", speedup=0.5),), change_ms=0.0,
        change_elements=1, settled=True, seconds=1.0,
    )  # fmt: skip

    target = found.applied(Target(), [INT8])

    assert target.channel_steps == ((0, 8), (64, 8))
    assert target.bit_choices((8,), (8,)) == (FP32,)


def capable(seven: float, *, settled: bool = True) -> Capabilities:
    """A device whose integers of 7 bits are so many times as fast as those of 8."""
    stairs = (Stair(name=f"{CONV} {kind}", points=tuple(treads(4).items())) for kind in ("fp32", "INT8"))
    widths = ((8, 1.2), (7, 1.2 * seven))
    return Capabilities(
        stairs=tuple(stairs), change_ms=0.0, change_elements=1, settled=settled, seconds=1.0,
        widths=tuple(Width(weights=w, activations=8, kernel="int8", speedup=speedup) for w, speedup in widths),
    )  # fmt: skip


@pytest.mark.parametrize(("seven", "settled", "bits"), [(1.5, True, 7), (1.05, True, 8), (1.5, False, 8)])
def test_where_seven_bits_are_clearly_faster_than_eight_integers_have_seven(
    seven: float, settled: bool, bits: int
) -> None:
    target = capable(seven, settled=settled).applied(Target())

    assert target.bit_choices((8, 32), (8, 32)) == (
        FP32, LayerBits(weights=bits, activations=8), LayerBits(weights=8, activations=32),
    )  # fmt: skip
    assert target.bit_choices((7, 8), (8,)) == tuple(LayerBits(weights=w, activations=8) for w in sorted({7, bits}))


def test_rules_walk_and_the_user_s_own_integers_are_as_the_target_runs_them(tmp_path: Path) -> None:
    target = capable(1.5).applied(Target())
    anatomy = toy_anatomy()
    space = Space(anatomy=anatomy, max_ratio=0.8, bit_choices=target.bit_choices((8, 32), (8, 32)))
    seven = LayerBits(weights=7, activations=8)
    assert space.integers == seven
    own = tmp_path / "own.json"
    own.write_text(policy_to_json(uniform(anatomy, width=0.5, bits=INT8)))

    rules = baselines(anatomy, distill=True, integers=seven)
    walk = greedy_walk(space, Sensitivity(), batch_costs_of(anatomy), 3)
    [seed] = own_policies([str(own)], space)

    for policy in (*(rules[name] for name in rules if name.endswith("INT8")), *walk, seed):
        assert set(policy.bits.values()) == {seven}
        assert space.contains(policy)


def test_without_integer_kernels_the_space_offers_none() -> None:
    choices = ((8, 16, 32), (8, 32))
    assert INT8 in Target().bit_choices(*choices)
    assert Target(integer_kernels=False).bit_choices(*choices) == (FP32, LayerBits(weights=16, activations=32))
