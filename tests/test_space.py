"""The space of policies: sampling, its inverse, the canonical form, and what it refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.spaces.anatomy import Group, kept_channels
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import (
    DISTILL_METHODS,
    FP32,
    IMPORTANCES,
    INT8,
    RANGES,
    SCALES,
    Distill,
    FineTune,
    LayerBits,
    Policy,
    digest,
    policy_from_json,
    policy_to_json,
)
from nightpress.spaces.space import (
    ALPHA,
    LEARNING_RATE,
    TEMPERATURE,
    Space,
    bits_name,
    canonical,
    check_policy,
    parse_bits,
    ratio_of,
    uniform,
)
from strategies import EVERY_PAIR, OFFERED, policies, seeds, space_of, toy_anatomy

T = TypeVar("T")
ANATOMY = toy_anatomy()
SPACE = space_of(ANATOMY)
PLAIN = Policy(model=ANATOMY.digest)


class Answers:
    """Suggests what a table says, and remembers which of it was asked."""

    def __init__(self, table: Mapping[str, str | int | float]) -> None:
        self.table = table
        self.asked: list[str] = []

    def choice(self, name: str, values: Sequence[str]) -> str:
        self.asked.append(name)
        assert self.table[name] in values
        return str(self.table[name])

    def integer(self, name: str, low: int, high: int) -> int:
        self.asked.append(name)
        assert low <= int(self.table[name]) <= high
        return int(self.table[name])

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        del log
        self.asked.append(name)
        assert low <= float(self.table[name]) <= high
        return float(self.table[name])


def random(seed: int, space: Space = SPACE) -> Policy:
    return space.random(np.random.default_rng(seed))


def some_of(values: tuple[T, ...], least: int = 1) -> st.SearchStrategy[tuple[T, ...]]:
    return st.lists(st.sampled_from(values), min_size=least, unique=True).map(tuple)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    return Space(
        anatomy=ANATOMY,
        max_ratio=draw(st.floats(0, 0.99)),
        bit_choices=tuple(draw(st.lists(st.sampled_from(OFFERED), min_size=1, unique=True))),
        blocks=draw(st.booleans()),
        distill=draw(some_of(DISTILL_METHODS, least=0)),
        sparsity=draw(st.booleans()),
        importance=draw(some_of(IMPORTANCES)),
        stages=draw(some_of((1, 2, 3, 6))),
        ranges=draw(some_of(RANGES)),
        scales=draw(some_of(SCALES)),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    step = draw(st.sampled_from([1, 4, 8, 16]))
    return Group(name="g", channels=draw(st.integers(2 * step, 40 * step)), step=step, layers=("g",), macs=0)


# Channels


@given(groups(), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_pruned_group_keeps_whole_steps_and_at_least_one(group: Group, ratio: float) -> None:
    kept = kept_channels(group, ratio)

    assert kept == group.channels or kept % group.step == 0
    assert group.step <= kept <= group.channels


@given(groups(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_higher_ratio_never_keeps_more(group: Group, one: float, other: float) -> None:
    low, high = sorted((one, other))

    assert kept_channels(group, high) <= kept_channels(group, low)


@given(groups())
def test_a_ratio_of_zero_keeps_everything(group: Group) -> None:
    assert kept_channels(group, 0.0) == group.channels


@given(groups(), st.data())
def test_the_ratio_of_a_number_of_steps_keeps_that_many(group: Group, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, group.channels // group.step))

    assert kept_channels(group, ratio_of(group, steps)) in {steps * group.step, group.channels}


@pytest.mark.parametrize(
    ("max_ratio", "channels", "step", "least"),
    [(0.7, 40, 4, 3), (0.8, 40, 8, 1), (0.8, 64, 8, 2), (0.5, 64, 8, 4), (0.0, 64, 8, 8), (0.99, 64, 8, 1)],
)
def test_the_least_steps_are_those_that_the_largest_ratio_leaves(
    max_ratio: float, channels: int, step: int, least: int
) -> None:
    space = Space(anatomy=ANATOMY, max_ratio=max_ratio, bit_choices=(FP32,))
    group = Group(name="g", channels=channels, step=step, layers=("g",), macs=0)

    assert space.step_range(group) == (least, channels // step)


# Sampling


@given(spaces(), seeds())
def test_a_space_contains_its_random_policies(space: Space, seed: int) -> None:
    assert space.contains(random(seed, space))


@given(spaces(), seeds())
def test_a_random_policy_can_be_followed_by_the_model(space: Space, seed: int) -> None:
    policy = random(seed, space)

    check_policy(policy, ANATOMY, (*space.bit_choices, FP32), "p.json")
    assert plan(ANATOMY, policy).output == "head"


@given(spaces(), st.data())
def test_a_space_contains_every_policy_that_is_asked_for(space: Space, data: st.DataObject) -> None:
    class Drawn:
        def choice(self, name: str, values: Sequence[str]) -> str:
            return data.draw(st.sampled_from(values), name)

        def integer(self, name: str, low: int, high: int) -> int:
            return data.draw(st.integers(low, high), name)

        def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
            del log
            return data.draw(st.floats(low, high), name)

    policy = space.sample(Drawn())

    assert space.contains(policy)
    assert space.sample(Answers(space.params(policy))) == policy


@given(spaces(), seeds())
def test_the_answers_of_a_policy_make_that_policy(space: Space, seed: int) -> None:
    policy = random(seed, space)

    assert space.sample(Answers(space.params(policy))) == policy


@given(spaces(), seeds(), seeds())
def test_every_policy_of_a_space_answers_the_same_questions(space: Space, one: int, other: int) -> None:
    answers = Answers(space.params(random(one, space)))
    space.sample(answers)

    assert set(answers.asked) == set(space.params(random(other, space)))
    assert len(answers.asked) == space.dimensions


@given(seeds())
def test_the_same_seed_gives_the_same_policy(seed: int) -> None:
    assert random(seed) == random(seed)


def test_random_policies_reach_both_ends_of_the_space() -> None:
    macs = [plan(ANATOMY, random(seed)).macs / plan(ANATOMY, PLAIN).macs for seed in range(200)]

    assert max(macs) > 0.95
    assert min(macs) < 0.15


def test_random_policies_use_every_choice_of_bits() -> None:
    used = {random(seed).bits.get("one.a", FP32) for seed in range(400)}

    assert used == set(OFFERED)


def test_a_space_without_blocks_or_distillation_asks_for_neither() -> None:
    space = space_of(ANATOMY, blocks=False, distill=())

    assert not [name for name in space.params(PLAIN) if name.startswith(("block:", "distill."))]
    assert all(random(seed, space).distill == Distill(method="none", alpha=0.0) for seed in range(20))
    assert not space.contains(replace(PLAIN, removed_blocks=("one",)))


@pytest.mark.parametrize(
    "outside",
    [
        {"prune": {"stem": 0.9}},
        {"bits": {"stem": LayerBits(weights=4, activations=8)}},
        {"bits": {"one.a": INT8}, "removed_blocks": ("two",)},
    ],
)
def test_a_policy_beyond_the_limits_is_not_contained(outside: dict[str, object]) -> None:
    space = Space(anatomy=ANATOMY, max_ratio=0.5, bit_choices=(FP32, LayerBits(weights=8)))

    assert not space.contains(replace(PLAIN, **outside))


def test_the_bits_of_a_removed_layer_do_not_matter() -> None:
    space = Space(anatomy=ANATOMY, max_ratio=0.5, bit_choices=(FP32,))

    assert space.contains(replace(PLAIN, bits={"one.a": INT8}, removed_blocks=("one",)))


@pytest.mark.parametrize(("weights", "activations"), [(32, 8), (16, 8), (8, 16)])
def test_bits_that_come_to_what_is_offered_are_contained(weights: int, activations: int) -> None:
    policy = replace(PLAIN, bits={"stem": LayerBits(weights=weights, activations=activations)})
    offered = LayerBits(weights=weights, activations=32)
    space = Space(anatomy=ANATOMY, max_ratio=0.5, bit_choices=tuple({FP32, offered}))

    check_policy(policy, ANATOMY, space.bit_choices, "p.json")
    assert space.contains(policy)
    assert space.params(policy)["bits:stem"] == bits_name(offered)


@given(spaces(), seeds())
def test_a_space_contains_its_policies_however_they_are_written(space: Space, seed: int) -> None:
    policy = random(seed, space)
    idle = {layer.name: LayerBits(weights=32, activations=8) for layer in ANATOMY.layers}

    assert space.contains(replace(policy, bits={**idle, **policy.bits}))


@given(seeds())
def test_what_is_trained_lies_within_its_limits(seed: int) -> None:
    policy = random(seed)

    assert LEARNING_RATE[0] * 0.99 <= policy.finetune.learning_rate <= LEARNING_RATE[1] * 1.01
    assert ALPHA[0] <= policy.distill.alpha <= ALPHA[1]
    assert TEMPERATURE[0] <= policy.distill.temperature <= TEMPERATURE[1]


# The canonical form


@given(policies(ANATOMY))
def test_the_canonical_form_is_its_own(policy: Policy) -> None:
    once = canonical(policy, ANATOMY)

    assert canonical(once, ANATOMY) == once
    assert digest(canonical(once, ANATOMY)) == digest(once)


@given(policies(ANATOMY))
def test_the_canonical_form_makes_the_same_network(policy: Policy) -> None:
    as_given, same = plan(ANATOMY, policy), plan(ANATOMY, canonical(policy, ANATOMY))

    assert [(p.op.name, p.inputs, p.shape, p.int8, p.bits.weights) for p in as_given.ops] == [
        (p.op.name, p.inputs, p.shape, p.int8, p.bits.weights) for p in same.ops
    ]
    assert as_given.quantised == same.quantised


@given(policies(ANATOMY))
def test_a_canonical_policy_is_unchanged_by_its_file(policy: Policy) -> None:
    once = canonical(policy, ANATOMY)

    assert policy_from_json(policy_to_json(once), "p.json") == once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Both ratios keep 12 of 16 channels.
        ({"prune": {"stem": 0.25}}, {"prune": {"stem": 0.28}}),
        ({"prune": {"stem": 0.01}}, {}),
        ({"prune": {"stem": 0.0}, "bits": {"stem": FP32}}, {}),
        # Beside fp32 weights no activations are quantised.
        ({"bits": {"stem": LayerBits(weights=32, activations=8)}}, {}),
        # What is said of a removed block is not heard.
        ({"removed_blocks": ("one",), "prune": {"one.a": 0.5}, "bits": {"one.b": INT8}}, {"removed_blocks": ("one",)}),
        ({"removed_blocks": ("two", "one")}, {"removed_blocks": ("one", "two")}),
        ({"removed_blocks": ("one", "one")}, {"removed_blocks": ("one",)}),
        # Nothing is distilled.
        ({"distill": Distill(method="none", temperature=4.0)}, {"distill": Distill(alpha=0.0)}),
        ({"distill": Distill(alpha=0.0001, schedule="linear")}, {"distill": Distill(method="none")}),
        ({"distill": Distill(alpha=0.70001, temperature=3.001)}, {"distill": Distill(alpha=0.7, temperature=3.0)}),
        ({"finetune": FineTune(learning_rate=0.020001)}, {"finetune": FineTune(learning_rate=0.02)}),
        ({"distill": Distill(method="logit+feature", feature_weight=0)}, {"distill": Distill()}),
        ({"distill": Distill(feature_weight=2)}, {"distill": Distill()}),
        # Without logits there is neither a share nor a temperature, without inner tensors no weight of theirs.
        (
            {"distill": Distill(method="attention", temperature=5, alpha=0.1, schedule="linear")},
            {"distill": Distill(method="attention")},
        ),
        ({"distill": Distill(method="logit+attention", alpha=0)}, {"distill": Distill(method="attention")}),
        ({"distill": Distill(method="feature", feature_weight=0)}, {"distill": Distill(method="none")}),
        # No schedule moves a temperature that stands at its end.
        ({"distill": Distill(temperature=1, schedule="halving")}, {"distill": Distill(temperature=1)}),
        ({"distill": Distill(temperature=1.4, schedule="linear")}, {"distill": Distill(temperature=1.4)}),
        # Nothing is ranked, nothing is quantised, one stage is enough.
        ({"importance": "taylor", "ranges": "mse", "scales": "learned"}, {}),
        ({"bits": {"stem": LayerBits(weights=16)}, "ranges": "mse"}, {"bits": {"stem": LayerBits(weights=16)}}),
        ({"finetune": FineTune(stages=7)}, {}),
        (
            {"prune": {"stem": 0.5}, "finetune": FineTune(stages=9)},
            {"prune": {"stem": 0.5}, "finetune": FineTune(stages=3)},
        ),
        ({"sparsity": {"stem": 0.0}}, {}),
        ({"bits": {"stem": LayerBits(weights=8, activations=16)}}, {"bits": {"stem": LayerBits(weights=8)}}),
        ({"bits": {"stem": LayerBits(activations=16)}}, {}),
        ({"removed_blocks": ("one",), "sparsity": {"one.a": 0.5}}, {"removed_blocks": ("one",)}),
    ],
)
def test_policies_that_do_the_same_have_one_digest(one: dict[str, object], other: dict[str, object]) -> None:
    first, second = (canonical(replace(PLAIN, **changes), ANATOMY) for changes in (one, other))

    assert first == second
    assert digest(first) == digest(second)


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": {"stem": 0.5}, "importance": "taylor"},
        {"bits": {"stem": INT8}, "ranges": "mse"},
        {"bits": {"stem": INT8}, "scales": "learned"},
        {"prune": {"stem": 0.5}, "finetune": FineTune(stages=2)},
        {"sparsity": {"stem": 0.5}},
        {"distill": Distill(method="logit+feature", feature_weight=0.5)},
        {"distill": Distill(method="feature", feature_weight=0.5)},
        {"distill": Distill(method="attention")},
        {"distill": Distill(schedule="halving")},
    ],
)
def test_what_has_an_effect_is_kept(changes: dict[str, object]) -> None:
    policy = replace(PLAIN, **changes)

    for name, value in changes.items():
        kept = getattr(canonical(policy, ANATOMY), name)
        assert kept == (replace(value, alpha=0.0) if isinstance(value, Distill) and not value.logit else value)


# What is offered


def test_a_choice_is_asked_where_there_is_one() -> None:
    space = space_of(
        ANATOMY, sparsity=True, importance=("l2", "bn"), stages=(1, 3), ranges=("minmax", "mse"),
        scales=("fixed", "learned"),
    )  # fmt: skip
    new = {"importance", "finetune.stages", "ranges", "scales", *(f"sparsity:{n.name}" for n in ANATOMY.layers)}

    assert set(space.params(PLAIN)) - set(SPACE.params(PLAIN)) == new
    for name, value in (("importance", "bn"), ("ranges", "mse"), ("scales", "learned")):
        policy = replace(PLAIN, prune={"stem": 0.5}, bits={"stem": INT8}, **{name: value})
        assert space.params(policy)[name] == value
        assert space.contains(policy)
        assert not SPACE.contains(policy)


@pytest.mark.parametrize(
    ("methods", "asked"),
    [
        ((), set()),
        (("logit",), {"alpha", "temperature", "schedule"}),
        (("feature",), {"feature_weight"}),
        (("none", "logit"), {"method", "alpha", "temperature", "schedule"}),
        (("attention", "feature"), {"method", "feature_weight"}),
        (("logit+feature",), {"alpha", "temperature", "schedule", "feature_weight"}),
    ],
)
def test_only_what_some_method_on_offer_uses_is_asked(methods: tuple[str, ...], asked: set[str]) -> None:
    params = space_of(ANATOMY, distill=methods).params(PLAIN)

    assert {name.removeprefix("distill.") for name in params if name.startswith("distill.")} == asked


@pytest.mark.parametrize(
    ("methods", "distill", "contained"),
    [
        (("logit",), Distill(method="none"), True),  # a share α of 0
        (("logit+feature",), Distill(method="feature"), True),
        (("logit+feature",), Distill(method="logit"), False),  # the weight of features is never 0
        (("feature",), Distill(method="none"), False),
        (("none", "attention"), Distill(method="none"), True),
        (("none", "attention"), Distill(method="feature"), False),
        ((), Distill(method="none"), True),
        ((), Distill(), False),
        (("logit",), Distill(temperature=50), False),
    ],
)
def test_distillation_that_is_not_offered_is_not_contained(
    methods: tuple[str, ...], distill: Distill, contained: bool
) -> None:
    assert space_of(ANATOMY, distill=methods).contains(replace(PLAIN, distill=distill)) is contained


def test_random_policies_use_every_method_and_reach_sparse_layers() -> None:
    space = space_of(ANATOMY, sparsity=True)
    drawn = [random(seed, space) for seed in range(200)]

    assert {policy.distill.method for policy in drawn} == set(DISTILL_METHODS)
    assert {policy.sparsity.get("stem", 0.0) for policy in drawn} == {tenths / 10 for tenths in range(10)}


# Checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"one.c": 0.5}}, r"^p\.json: prune names one\.c, which this model does not have; did you mean one"),
        ({"bits": {"heads": INT8}}, r"json: bits names heads, which this model does not have; did you mean head\.$"),
        ({"sparsity": {"heads": 0.5}}, r"json: sparsity names heads, which .*; did you mean head\.$"),
        ({"removed_blocks": ("ones",)}, r"removed_blocks names ones, which this model does not have; did you mean one"),
        ({"prune": {"zzz": 0.5}}, r"prune names zzz, which this model does not have \(known: stem, one\.a, two\.a\)"),
        # A layer that follows another's group has no ratio of its own.
        ({"prune": {"two.b": 0.5}}, r"prune names two\.b, which this model does not have; did you mean two\.a"),
        (
            {"model": "ffee"},
            r"^p\.json: a policy belongs to one model; this one is for ffee, the task's model is 00112233445566ff\.$",
        ),
        (
            {"bits": {"stem": LayerBits(weights=4, activations=8)}},
            r"^p\.json: bits\.stem must be one of 32/32, 8/8 \(weights/activations\) on this target, but got 4/8\.$",
        ),
    ],
)  # fmt: skip
def test_a_policy_that_the_model_or_target_cannot_follow_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_policy(replace(PLAIN, **changes), ANATOMY, (FP32, INT8), "p.json")


@given(policies(ANATOMY))
def test_without_a_target_every_width_of_the_format_is_allowed(policy: Policy) -> None:
    check_policy(policy, ANATOMY, None, "p.json")


# Uniform policies


@pytest.mark.parametrize("bits", OFFERED)
def test_a_uniform_policy_treats_every_layer_alike(bits: LayerBits) -> None:
    policy = uniform(ANATOMY, width=0.5, bits=bits)

    assert {policy.bits.get(layer.name, FP32) for layer in ANATOMY.layers} == {bits}
    # 10 channels in steps of 4: one step is the multiple nearest to 5.
    assert {g.name: kept_channels(g, policy.prune[g.name]) for g in ANATOMY.groups} == {
        "stem": 8, "one.a": 16, "two.a": 4,
    }  # fmt: skip
    assert policy == canonical(policy, ANATOMY)


def test_a_uniform_policy_at_full_width_in_fp32_changes_nothing() -> None:
    assert uniform(ANATOMY, width=1.0, bits=FP32) == canonical(PLAIN, ANATOMY)


def test_a_uniform_policy_takes_its_training_from_another() -> None:
    like = replace(PLAIN, removed_blocks=("one",), finetune=FineTune(learning_rate=0.05), distill=Distill(alpha=0.2))

    policy = uniform(ANATOMY, width=0.5, bits=INT8, like=like)

    assert (policy.finetune, policy.distill, policy.removed_blocks) == (like.finetune, like.distill, ())


@pytest.mark.parametrize("bits", EVERY_PAIR)
def test_a_pair_of_widths_has_a_name(bits: LayerBits) -> None:
    assert parse_bits(bits_name(bits)) == bits
