"""Channels that must go together: found, cut out of the weights exactly, and run."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import (
    ATTENTIONS,
    NETWORKS,
    Between,
    Gated,
    Inverted,
    Make,
    OverTokens,
    inputs_for,
    made_of,
    random,
    state_of,
)
from nightpress.evaluators.apply import Compressor
from nightpress.spaces.anatomy import Anatomy, Group
from nightpress.spaces.plan import plan, pruned_groups
from nightpress.spaces.policy import Policy
from strategies import compressor_of, images, seeded, seeds, shapes_of, task_of


def inspected(make: Make, inputs: Tensor, step: int = 1) -> Anatomy:
    return compressor_of(task_of(seeded(make), inputs), step).anatomy


def owns(group: Group) -> dict[tuple[str, int], tuple[tuple[int, ...], ...]]:
    """The entries of each parameter and axis that the group's channels own."""
    return {(part.parameter, part.axis): part.indices for part in group.slices}


def one_by_one(count: int, start: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple((start + channel,) for channel in range(count))


# What is coupled


def test_a_sum_couples_what_it_adds() -> None:
    anatomy = made_of("residual").anatomy

    assert {group.name: group.layers for group in anatomy.groups} == {
        "stem": ("stem", "inner.conv2"), "inner.conv1": ("inner.conv1",),
    }  # fmt: skip
    assert owns(anatomy.group("stem")) == dict.fromkeys(
        [("stem.weight", 0), ("stem.bias", 0), ("inner.conv1.weight", 1), ("inner.conv2.weight", 0),
         ("inner.bn2.weight", 0), ("inner.bn2.bias", 0), ("inner.bn2.running_mean", 0), ("inner.bn2.running_var", 0),
         ("head.weight", 1)],
        one_by_one(8),
    )  # fmt: skip


def test_concatenated_layers_lose_their_own_channels_at_their_own_place() -> None:
    anatomy = made_of("dense").anatomy

    assert [group.layers for group in anatomy.groups] == [("stem",), ("inner.0.grow",), ("inner.2",)]
    assert owns(anatomy.group("stem"))["inner.2.weight", 1] == one_by_one(8)
    assert owns(anatomy.group("inner.0.grow"))["inner.2.weight", 1] == one_by_one(4, start=8)
    assert owns(anatomy.group("inner.0.grow"))["inner.1.running_var", 0] == one_by_one(4, start=8)


def test_a_depthwise_convolution_follows_the_layer_before_it() -> None:
    anatomy = made_of("inverted").anatomy

    assert anatomy.group("inner.expand.0").layers == ("inner.expand.0", "inner.depthwise.0")
    assert anatomy.group("stem").layers == ("stem", "inner.project.0")
    assert owns(anatomy.group("inner.expand.0"))["inner.depthwise.0.weight", 0] == one_by_one(12)


def test_a_grouped_convolution_loses_whole_groups() -> None:
    [group] = made_of("grouped").anatomy.groups

    assert (group.name, group.channels, group.unit, group.kind) == ("stem", 4, 2, "conv groups")
    assert owns(group)["stem.weight", 0] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert owns(group)["inner.weight", 0] == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    assert ("inner.weight", 1) not in owns(group)  # the width of a group stays

    module, planned = made_of("grouped").apply(Policy(model="", prune={"stem": 0.5}))

    conv = module.get_submodule("inner")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.groups, conv.in_channels, conv.out_channels) == (2, 4, 6)
    assert [op.groups for op in planned.ops if op.op.module == "inner"] == [2]


def test_the_step_of_a_grouped_convolution_counts_in_groups() -> None:
    [group] = inspected(NETWORKS["grouped"], images(2), step=4).groups

    assert group.step == 2  # two of two channels


def test_the_gate_of_squeeze_and_excitation_follows_what_it_multiplies() -> None:
    anatomy = made_of("excited").anatomy

    assert {group.name: group.layers for group in anatomy.groups} == {
        "stem": ("stem", "inner.up"), "inner.down": ("inner.down",),
    }  # fmt: skip


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.chunk(2, 1),
        lambda x: x.split(8, 1),
        lambda x: torch.split(x, [8, 8], dim=1),
        lambda x: (x[:, :8], x[:, 8:]),
        lambda x: (x.narrow(1, 0, 8), x.narrow(1, 8, 8)),
    ],
)
def test_channels_and_their_gates_from_one_layer_go_in_pairs(split: object) -> None:
    group = inspected(lambda: Between(Gated(split)), images(2)).group("inner.both")  # type: ignore[arg-type]

    assert (group.channels, group.unit) == (8, 2)
    assert owns(group)["inner.both.weight", 0] == tuple((c, 8 + c) for c in range(8))
    assert owns(group)["head.weight", 1] == one_by_one(8)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_loses_whole_heads_however_it_is_written(name: str) -> None:
    anatomy = made_of(name).anatomy

    heads = [group for group in anatomy.groups if group.kind == "heads"]
    assert len(heads) == 1
    assert (heads[0].channels, heads[0].step) == (4, 1)
    owned = owns(heads[0])
    of_head = tuple((2 * head, 2 * head + 1) for head in range(4))
    [projection] = [place for place in owned if place[0].endswith("proj.weight") and place[1] == 1]
    assert owned[projection] == of_head
    if name == "q, k, v":
        assert heads[0].unit == 2
        assert all(
            owned[f"inner.attention.{part}.{role}", 0] == of_head for part in "qkv" for role in ("weight", "bias")
        )
    else:
        assert heads[0].unit == 6
        [source] = [indices for (entry, axis), indices in owned.items() if axis == 0 and entry.endswith(".weight")]
        assert source == tuple((*one, *(8 + i for i in one), *(16 + i for i in one)) for one in of_head)
    assert anatomy.coverage == 1


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_transformer_layer_loses_its_width_and_that_of_its_mlp(name: str) -> None:
    anatomy = made_of(name).anatomy

    width = anatomy.group("embed")
    assert width.layers[0] == "embed"
    assert width.layers[-1] == "inner.mlp.2"
    assert {("inner.norm1.weight", 0), ("inner.norm2.bias", 0), ("inner.mlp.0.weight", 1)} <= set(owns(width))
    assert anatomy.group("inner.mlp.0").layers == ("inner.mlp.0",)
    assert owns(anatomy.group("inner.mlp.0"))["inner.mlp.2.weight", 1] == one_by_one(16)


def test_positions_and_the_class_token_lose_the_width_of_the_tokens() -> None:
    owned = owns(made_of("vision").anatomy.group("patches"))

    assert owned["cls", 2] == owned["positions", 2] == one_by_one(8)
    assert [place for place in owned if place[0] in {"cls", "positions"}] == [("cls", 2), ("positions", 2)]


def test_windows_folded_into_the_batch_leave_heads_and_channels_apart() -> None:
    anatomy = made_of("windowed").anatomy

    assert {group.name: (group.channels, group.unit, group.kind) for group in anatomy.groups} == {
        "stem": (8, 1, "channels"), "inner.qkv": (4, 6, "heads"), "inner.proj": (8, 1, "channels"),
    }  # fmt: skip
    folded = next(op for op in anatomy.ops if op.name == "inner_qkv")
    assert (folded.shape, folded.batch_axis) == ((4, 16, 24), 0)


def test_a_channel_that_is_flattened_owns_all_its_pixels() -> None:
    assert owns(made_of("flattened").anatomy.group("conv"))["hidden.weight", 1] == tuple(
        tuple(range(9 * channel, 9 * channel + 9)) for channel in range(8)
    )


def test_a_shortcut_that_pads_channels_is_a_frozen_convolution() -> None:
    made = made_of("option A")

    shortcut = made.network.state["inner.as_conv.weight"]
    assert shortcut.shape == (16, 8, 1, 1)
    assert torch.equal(shortcut[4:12, :, 0, 0], torch.eye(8))
    assert not shortcut[:4].any() and not shortcut[12:].any()  # noqa: PT018
    assert made.anatomy.group("inner.conv2").layers == ("inner.conv2", "inner.as_conv")
    assert owns(made.anatomy.group("stem"))["inner.as_conv.weight", 1] == one_by_one(8)
    module, _ = made.apply(Policy(model="", prune={"stem": 0.5, "inner.conv2": 0.25}))
    parameter = module.get_parameter("inner.as_conv.weight")
    assert parameter.shape == (12, 4, 1, 1)
    assert not parameter.requires_grad


def test_a_convolution_that_is_used_twice_ties_its_inputs_to_its_outputs() -> None:
    made = made_of("twice")

    assert made.anatomy.group("stem").layers == ("stem", "inner.conv")
    assert owns(made.anatomy.group("stem"))["inner.conv.weight", 0] == one_by_one(8)
    assert owns(made.anatomy.group("stem"))["inner.conv.weight", 1] == one_by_one(8)
    [layer] = [layer for layer in made.anatomy.layers if layer.name == "inner.conv"]
    assert layer.macs == 2 * 64 * 8 * 8 * 9
    module, _ = made.apply(Policy(model="", prune={"stem": 0.5}))
    assert sum(node.target == "inner.conv" for node in module.graph.nodes) == 2


def test_tied_weights_stay_one_parameter() -> None:
    made = made_of("tied")

    module, _ = made.apply(Policy(model="", prune={"first": 0.5}))

    assert made.anatomy.group("first").layers == ("first", "second")
    assert module.get_parameter("first.weight") is module.get_parameter("second.weight")
    assert module.get_parameter("first.weight").shape == (6, 8)
    assert not torch.equal(module.get_parameter("first.bias"), module.get_parameter("second.bias"))


def test_a_channel_shuffle_ties_what_it_puts_side_by_side() -> None:
    anatomy = made_of("dealt").anatomy

    # Of the four that pass the first unit two pass the second one too, and take two channels of it each with them.
    assert {group.name: owns(group)["stem.weight", 0] for group in anatomy.groups} == {
        "stem": ((0,), (1,)), "stem#1": ((2,), (3,)), "stem#2": ((4,), (5,), (6,), (7,)),
    }  # fmt: skip
    assert owns(anatomy.group("stem"))["inner.one.weight", 0] == ((0,), (1,))
    assert owns(anatomy.group("stem"))["inner.two.weight", 0] == ((0, 1), (2, 3))
    assert owns(anatomy.group("stem"))["head.weight", 1] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert owns(anatomy.group("stem#1"))["inner.two.weight", 1] == ((0, 1), (2, 3))


def test_a_shuffle_of_a_grouped_convolutions_channels_ties_all_of_them() -> None:
    anatomy = made_of("shuffled").anatomy

    assert {item.name: item.reason for item in anatomy.left_out} == {
        "stem": "1 conv groups are fewer than two steps of 1",
        "head": "its channels are the model's output",
    }
    assert [group.name for group in anatomy.groups] == ["inner.after", "inner.last"]
    assert 0 < anatomy.coverage < 1


def test_a_group_narrower_than_two_steps_is_left_out() -> None:
    anatomy = inspected(lambda: Between(Inverted()), images(2), step=5)

    assert [group.name for group in anatomy.groups] == ["inner.expand.0"]
    assert ("stem", "8 channels are fewer than two steps of 5") in [(i.name, i.reason) for i in anatomy.left_out]
    # expand and depthwise of the four convolutions before the head
    macs = {layer.name: layer.macs for layer in anatomy.layers}
    inner = sum(macs.values()) - macs["head"]
    assert anatomy.coverage == (macs["inner.expand.0"] + macs["inner.depthwise.0"]) / inner


# Any policy


def bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


@settings(max_examples=30)
@given(st.sampled_from(sorted(NETWORKS)), seeds())
def test_any_policy_cuts_out_whole_channels_and_runs(name: str, seed: int) -> None:
    made = made_of(name)
    policy = random(made, seed)

    module, planned = made.apply(policy)

    inputs = inputs_for(name, 3)
    shapes = shapes_of(module, inputs)
    for op in planned.ops:
        expected = list(op.shape)
        if op.op.batch_axis is not None:
            expected[op.op.batch_axis] *= len(inputs)
        assert shapes[op.op.name] == tuple(expected), op.op.name
    whole = plan(made.anatomy, Policy(model=made.anatomy.digest))
    assert planned.macs <= whole.macs
    assert planned.params <= whole.params
    stays = kept_entries(made, policy)
    for entry, value in module.state_dict().items():
        if entry in made.network.state:
            original = made.network.state[entry]
            for axis, indices in stays.get(entry, {}).items():
                original = original.index_select(axis, torch.tensor(indices))
            assert torch.equal(value, original), entry


def kept_entries(made: Compressor, policy: Policy) -> dict[str, dict[int, list[int]]]:
    """For each state entry and axis the indices that stay."""
    removed = made.removed(policy)
    lost: dict[str, dict[int, set[int]]] = {}
    for group, _ in pruned_groups(made.anatomy, policy):
        for part in group.slices:
            gone = lost.setdefault(part.parameter, {}).setdefault(part.axis, set())
            for channel in removed[group.name]:
                gone.update(part.indices[channel])
    return {
        entry: {
            axis: [i for i in range(made.network.state[entry].shape[axis]) if i not in gone]
            for axis, gone in axes.items()
        }
        for entry, axes in lost.items()
    }


@settings(max_examples=15)
@given(st.sampled_from(sorted(NETWORKS)), seeds(), seeds())
def test_a_policy_leaves_the_same_bits_whatever_was_applied_before(name: str, seed: int, between: int) -> None:
    made = made_of(name)
    first, _ = made.apply(random(made, seed))
    other, _ = made.apply(random(made, between))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)

    again, _ = made.apply(random(made, seed))

    assert bit_equal(first.state_dict(), again.state_dict())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_another_process_leaves_the_same_bits() -> None:
    names = ["dense", "option A", "vision"]

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = list(pool.map(state_of, names, range(3)))

    for seed, (name, found) in enumerate(zip(names, there, strict=True)):
        here = state_of(name, seed)
        assert list(here) == list(found)
        assert all(np.array_equal(here[key], found[key]) for key in here)


def test_removing_nothing_changes_nothing() -> None:
    for name in NETWORKS:
        made = made_of(name)
        with torch.no_grad():
            expected = seeded(NETWORKS[name])(inputs_for(name, 3))
            found = made.apply(Policy(model=made.anatomy.digest))[0](inputs_for(name, 3))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_zeroing_a_channel_is_removing_it() -> None:
    """What a group loses contributes nothing once its entries are zero: the two modules answer alike."""
    for name in ("dense", "grouped", "gated", "dealt", "option A", "flattened", "qkv.chunk", "nn.MultiheadAttention",
                 "group norm", "pixel shuffle", "up"):  # fmt: skip
        made = made_of(name)
        group = made.anatomy.groups[0 if name in {"grouped", "dealt", "group norm", "pixel shuffle", "up"} else -1]
        policy = Policy(model=made.anatomy.digest, prune={group.name: 0.5}, importance="l2")
        [(_, gone)] = made.removed(policy).items()
        module, _ = made.apply(policy)
        zeroed = made.whole()
        with torch.no_grad():
            for part in group.slices:
                flat = torch.tensor([i for channel in gone for i in part.indices[channel]])
                if part.axis == 1:  # what reads the channels reads nothing
                    zeroed.get_parameter(part.parameter).index_fill_(1, flat, 0.0)
            torch.testing.assert_close(module(inputs_for(name)), zeroed(inputs_for(name)), rtol=1e-4, atol=1e-5)


class OneHead(nn.Module):
    """Attention without heads: queries and keys of 6 numbers, values of 10."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10)
        self.proj = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_without_heads_queries_go_with_keys_and_values_alone() -> None:
    anatomy = inspected(lambda: OverTokens(OneHead()), inputs_for("tied"))

    layers = [group.layers for group in anatomy.groups]
    assert ("inner.q", "inner.k") in layers
    assert ("inner.v",) in layers
    assert owns(anatomy.group("inner.v"))["inner.proj.weight", 1] == one_by_one(10)
