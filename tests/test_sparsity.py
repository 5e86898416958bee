"""Masks: which weights go, and that they stay gone through training and on a quantised grid."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nightpress.evaluators.bake import bake
from nightpress.evaluators.quantise import QuantConv2d
from nightpress.evaluators.sparsity import global_ratios, masks, ratios_below, sparsify
from nightpress.spaces.policy import Distill, FineTune, LayerBits, Policy
from strategies import seeds, tiny
from test_distill import trainer_of

LAYERS = ("one.conv1", "three.conv2", "head")
SPARSE = replace(
    Policy(model=tiny().anatomy.digest),
    sparsity={"one.conv1": 0.8, "three.conv2": 0.5, "head": 0.25},
    prune={"one.conv1": 0.5},
    distill=Distill(method="none"),
    finetune=FineTune(learning_rate=0.05),
)


def linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return nn.Sequential(layer)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: module.get_parameter(f"{name}.weight").detach() for name in LAYERS}


def zeros(value: Tensor) -> float:
    return float((value == 0).double().mean())


@given(seeds(), st.floats(0, 1, exclude_max=True))
def test_the_smallest_magnitudes_go(seed: int, ratio: float) -> None:
    weight = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))

    kept = masks(linear(weight), {"0": ratio}).get("0", torch.ones(6, 7, dtype=torch.bool))

    assert int((~kept).sum()) == round(ratio * 42)
    if 0 < int(kept.sum()) < 42:
        assert weight[~kept].abs().max() <= weight[kept].abs().min()


def test_of_equal_weights_the_first_go() -> None:
    assert masks(linear(torch.ones(2, 2)), {"0": 0.5})["0"].tolist() == [[False, False], [True, True]]


@given(seeds(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_harsher_mask_keeps_what_was_zero_at_zero(seed: int, one: float, other: float) -> None:
    layer = linear(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)))
    mild, harsh = sorted((one, other))

    sparsify(layer, {"0": mild})
    before = layer[0].weight.detach() == 0  # type: ignore[index]
    sparsify(layer, {"0": harsh})

    assert bool((layer[0].weight.detach()[before] == 0).all())  # type: ignore[index]
    assert int((layer[0].weight == 0).sum()) == round(25 * harsh)  # type: ignore[index]


def test_layers_that_are_not_there_are_passed_over() -> None:
    assert masks(linear(torch.ones(2, 2)), {"gone": 0.5}) == {}


@pytest.mark.parametrize("bits", [{}, {name: LayerBits(weights=4, activations=8) for name in LAYERS}])
def test_masked_weights_stay_zero_through_training_and_in_the_export(bits: dict[str, LayerBits]) -> None:
    policy = replace(SPARSE, bits=bits)
    module, plan = tiny().apply(policy)
    names = list(module.state_dict())
    sparsify(module, policy.sparsity)
    before = {name: value == 0 for name, value in weights(module).items()}

    trainer_of().fit(module, policy, steps=6, seed=0)

    assert list(module.state_dict()) == names
    for name, value in weights(module).items():
        assert zeros(value) == pytest.approx(policy.sparsity[name], abs=0.01)
        assert torch.equal(value == 0, before[name]), "the mask moved"
        if bits:
            layer = cast("QuantConv2d", module.get_submodule(name))
            assert bool((layer.quantised_weight()[before[name]] == 0).all())
    for name, tensors in bake(module, plan).layers.items():
        assert (tensors.weight == 0).mean() >= policy.sparsity.get(name, 0.0) - 0.01


def test_without_masks_the_weights_come_back() -> None:
    module, _ = tiny().apply(SPARSE)
    sparsify(module, SPARSE.sparsity)

    trainer_of().fit(module, replace(SPARSE, sparsity={}), steps=3, seed=0)

    # Some have no gradient, behind channels that are always off.
    assert all(zeros(value) < SPARSE.sparsity[name] / 2 for name, value in weights(module).items())


def test_masks_hold_in_the_memory_layout_of_the_weights() -> None:
    module, _ = tiny().apply(SPARSE)
    plain = masks(module, SPARSE.sparsity)

    turned = masks(module.to(memory_format=torch.channels_last), SPARSE.sparsity)  # type: ignore[call-overload]

    assert all(torch.equal(plain[name], turned[name]) for name in plain)
    assert turned["three.conv2"].stride() == module.get_parameter("three.conv2.weight").stride()


# Thresholds, in the words of a policy


def test_a_threshold_is_a_ratio_for_each_layer() -> None:
    module = linear(torch.tensor([[0.1, -0.2], [0.3, -0.4]]))

    ratios = ratios_below(module, ("0",), 0.2)

    assert ratios == {"0": 0.5}
    sparsify(module, ratios)
    assert module[0].weight.tolist() == [[0.0, -0.0], [pytest.approx(0.3), pytest.approx(-0.4)]]  # type: ignore[index]


def test_a_global_ratio_takes_the_smallest_of_all_layers_together() -> None:
    module = nn.Sequential(linear(torch.full((2, 2), 0.1)), linear(torch.full((2, 6), 1.0)))

    assert global_ratios(module, ("0.0", "1.0"), 0.25) == {"0.0": 1.0, "1.0": 0.0}
    assert global_ratios(module, ("0.0", "1.0"), 0.0) == {"0.0": 0.0, "1.0": 0.0}
