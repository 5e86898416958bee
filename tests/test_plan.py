"""What a policy makes of a model, checked against a network that is really exported and really pruned."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nightpress.spaces.plan import FOLLOWERS, Plan, PlannedOp, plan, pruned_groups
from nightpress.spaces.policy import FP32, INT8, LayerBits, Policy
from nightpress.spaces.space import uniform
from strategies import CLASSES, compressor_of, images, policies, seeds, shapes_of, space_of, task_of, tiny

WEIGHT_ONLY = LayerBits(weights=8)
ANATOMY = tiny().anatomy
SPACE = space_of(ANATOMY)
PLAIN = Policy(model=ANATOMY.digest)
KINDS = {op.name: op.kind for op in ANATOMY.ops}


def planned(**choices: object) -> Plan:
    return plan(ANATOMY, replace(PLAIN, **choices))


def of_layer(made: Plan, layer: str) -> PlannedOp:
    return next(p for p in made.ops if p.op.module == layer)


def after(made: Plan, op: PlannedOp, kind: str) -> PlannedOp:
    """The operation of a kind that reads this one."""
    return next(p for p in made.ops if op.op.name in p.inputs and p.op.kind == kind)


def sum_of(made: Plan, block: str) -> PlannedOp:
    """The residual sum of a block."""
    return after(made, of_layer(made, f"{block}.conv2"), "add")


def int8(*layers: str) -> dict[str, LayerBits]:
    return dict.fromkeys(layers, INT8)


def group_of(layer: str) -> str:
    """The group whose output channels a layer loses."""
    return next(g.name for g in ANATOMY.groups if layer in g.layers)


# What was inspected


def test_the_tiny_network_has_what_these_tests_rely_on() -> None:
    assert [b.name for b in ANATOMY.blocks] == ["one", "two", "three"]
    assert {g.layers for g in ANATOMY.groups} == {
        ("stem.0", "one.conv2", "two.conv2", "depthwise.0"),
        ("one.conv1",),
        ("two.conv1",),
        ("widen.0", "three.conv2"),
        ("three.conv1",),
        ("hidden",),
    }
    assert [(item.name, item.reason) for item in ANATOMY.left_out] == [("head", "its channels are the model's output")]
    assert {n.name: n.kind for n in ANATOMY.layers}["depthwise.0"] == "depthwise"


def test_an_empty_policy_leaves_the_model_as_it_is() -> None:
    made = plan(ANATOMY, PLAIN)

    assert [p.op for p in made.ops] == list(ANATOMY.ops)
    assert [p.shape for p in made.ops] == [op.shape for op in ANATOMY.ops]
    assert made.macs == ANATOMY.macs
    assert made.quantised == {}
    assert not any(p.int8 for p in made.ops)


def test_parameters_are_those_of_inference_with_batch_norms_folded() -> None:
    whole = tiny().whole()
    layers = [whole.get_submodule(n.name) for n in ANATOMY.layers]

    weights = sum(layer.get_parameter("weight").numel() for layer in layers)
    biases = sum(layer.get_parameter("weight").shape[0] for layer in layers)
    assert plan(ANATOMY, PLAIN).params == weights + biases


# Pruning


@given(policies(ANATOMY), policies(ANATOMY))
def test_pruning_more_never_costs_more(policy: Policy, more: Policy) -> None:
    harsher = replace(
        policy,
        prune={g.name: max(policy.prune.get(g.name, 0), more.prune.get(g.name, 0)) for g in ANATOMY.groups},
        removed_blocks=tuple({*policy.removed_blocks, *more.removed_blocks}),
    )
    mild, harsh = plan(ANATOMY, policy), plan(ANATOMY, harsher)

    assert harsh.macs <= mild.macs <= ANATOMY.macs
    assert harsh.params <= mild.params <= plan(ANATOMY, PLAIN).params


@settings(max_examples=20)
@given(seeds())
def test_planned_shapes_are_those_of_the_pruned_module(seed: int) -> None:
    policy = SPACE.random(np.random.default_rng(seed))

    module, made = tiny().apply(policy)

    shapes = shapes_of(module, images(1))
    assert {p.op.name: p.shape for p in made.ops} == {p.op.name: shapes[p.op.name] for p in made.ops}
    for p in made.ops:
        assert p.in_shapes == tuple(shapes[name] for name in p.inputs)
        if p.weight_count and p.op.module:
            layer = module.get_submodule(p.op.module)
            assert p.weight_count == layer.get_parameter("weight").numel()
            assert p.groups == getattr(layer, "groups", 1)


def test_the_output_keeps_its_width() -> None:
    made = plan(ANATOMY, uniform(ANATOMY, width=0.25, bits=FP32))

    assert of_layer(made, "head").shape == (1, CLASSES)
    assert of_layer(made, "head").in_shapes == ((1, 4),)


def test_a_depthwise_convolution_stays_depthwise() -> None:
    op = of_layer(planned(prune={group_of("stem.0"): 0.5}), "depthwise.0")

    assert (op.groups, op.shape[1], op.in_shapes[0][1]) == (8, 8, 8)
    assert op.weight_count == 8 * 9
    assert op.macs == 8 * 4 * 4 * 9


class Flattening(nn.Module):
    """The way to flatten of older code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(16 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.view(x.size(0), -1))


def test_a_channel_that_is_flattened_takes_all_its_pixels_with_it() -> None:
    made = compressor_of(task_of(Flattening()))
    policy = Policy(model=made.anatomy.digest, prune={"conv": 0.25})

    module, planned = made.apply(policy)

    assert of_layer(planned, "head").in_shapes == ((1, 12 * 36),)
    assert module.get_parameter("head.weight").shape == (CLASSES, 12 * 36)
    assert module(images(2)).shape == (2, CLASSES)


def test_pruned_groups_are_listed_with_what_stays() -> None:
    # 1 % of 16 channels is less than half a step.
    policy = replace(PLAIN, prune={group_of("one.conv1"): 0.5, group_of("stem.0"): 0.25, group_of("hidden"): 0.01})

    assert {group.layers[0]: kept for group, kept in pruned_groups(ANATOMY, policy)} == {"one.conv1": 12, "stem.0": 12}


# Blocks


@given(st.sets(st.sampled_from([b.name for b in ANATOMY.blocks])))
def test_removed_blocks_disappear_and_the_rest_stays_connected(removed: set[str]) -> None:
    made = planned(removed_blocks=tuple(removed))

    gone = {name for b in ANATOMY.blocks if b.name in removed for name in b.ops}
    names = [p.op.name for p in made.ops]
    assert set(names) == {op.name for op in ANATOMY.ops} - gone
    assert made.macs == ANATOMY.macs - sum(b.macs for b in ANATOMY.blocks if b.name in removed)
    for position, p in enumerate(made.ops):
        assert set(p.inputs) <= set(names[:position])
        assert len(p.inputs) == len(p.op.inputs)
    assert made.output in names


def test_removing_two_blocks_in_a_row_joins_what_is_around_them() -> None:
    made = planned(removed_blocks=("two", "one"))

    assert of_layer(made, "depthwise.0").inputs == (after(made, of_layer(made, "stem.0"), "relu").op.name,)


# Precision


def test_an_integer_convolution_is_quantised_behind_its_relu() -> None:
    made = planned(bits=int8("one.conv1"))

    conv = of_layer(made, "one.conv1")
    relu = after(made, conv, "relu")
    assert conv.int8
    assert made.quantised == {name: name for name in (*conv.inputs, relu.op.name)}


def test_relu6_is_absorbed_too() -> None:
    made = planned(bits=int8("depthwise.0"))

    conv = of_layer(made, "depthwise.0")
    assert conv.op.name not in made.quantised
    assert after(made, conv, "relu6").op.name in made.quantised


def test_an_integer_convolution_before_a_sum_is_quantised_itself() -> None:
    made = planned(bits=int8("one.conv2"))

    assert of_layer(made, "one.conv2").op.name in made.quantised


def test_an_integer_linear_layer_may_return_fp32() -> None:
    made = planned(bits=int8("head"))

    head = of_layer(made, "head")
    assert head.int8
    assert set(made.quantised) == set(head.inputs)
    assert made.output not in made.quantised


@pytest.mark.parametrize(
    ("layers", "on_integers"),
    [
        (("one.conv1", "one.conv2"), True),  # the stem's output is quantised, since one.conv1 reads it
        (("stem.0", "one.conv2"), True),
        (("one.conv2",), False),
        (("stem.0", "one.conv1"), False),
        ((), False),
    ],
)
def test_a_residual_sum_runs_on_integers_only_if_both_inputs_are_quantised(
    layers: tuple[str, ...], on_integers: bool
) -> None:
    made = planned(bits=int8(*layers))

    total = sum_of(made, "one")
    assert total.int8 is on_integers
    assert (after(made, total, "relu").op.name in made.quantised) is on_integers
    assert total.op.name not in made.quantised  # the kernel absorbs the ReLU behind it


@pytest.mark.parametrize("weights", [2, 4, 8])
def test_weight_only_layers_leave_activations_alone(weights: int) -> None:
    made = plan(ANATOMY, uniform(ANATOMY, width=1, bits=LayerBits(weights=weights)))

    assert made.quantised == {}
    assert not any(p.int8 for p in made.ops)
    assert {p.bits.weights for p in made.ops if p.weight_count} == {weights}


def test_a_uniform_int8_model_runs_on_integers_throughout() -> None:
    made = plan(ANATOMY, uniform(ANATOMY, width=1, bits=INT8))

    assert {p.op.name for p in made.ops if not p.int8} == {
        p.op.name for p in made.ops if p.op.kind in {"input", "relu", "relu6"}
    }
    assert made.output not in made.quantised


@given(policies(ANATOMY))
def test_what_runs_on_integers_reads_integers(policy: Policy) -> None:
    made = plan(ANATOMY, policy)

    for p in made.ops:
        if p.int8:
            assert set(p.inputs) <= set(made.quantised)
        if p.op.kind in FOLLOWERS:
            assert p.int8 == all(name in made.quantised for name in p.inputs)
        if p.op.module is not None and p.weight_count:
            assert p.int8 == policy.bits.get(p.op.module, FP32).int8


@given(policies(ANATOMY))
def test_every_grid_belongs_to_a_tensor_that_exists(policy: Policy) -> None:
    made = plan(ANATOMY, policy)

    names = {p.op.name for p in made.ops}
    assert set(made.quantised) <= names
    assert set(made.quantised.values()) <= names
    for name, site in made.quantised.items():
        assert made.quantised[site] == site
        assert (name == site) or KINDS[name] in {"max_pool", "flatten"}


def test_flattening_keeps_the_grid_of_its_input() -> None:
    made = planned(bits=int8("three.conv2", "three.conv1", "hidden"))

    flatten = next(p for p in made.ops if p.op.kind == "flatten")
    assert made.quantised[flatten.op.name] == flatten.inputs[0]
