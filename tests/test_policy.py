"""Policies as data: the file format, its errors, digests, pickling."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import (
    FP32,
    INT8,
    Distill,
    FineTune,
    LayerBits,
    Policy,
    digest,
    nearest,
    policy_from_dict,
    policy_from_json,
    policy_to_dict,
    policy_to_json,
)
from strategies import policies

GOLDEN = Path(__file__).parent / "golden" / "policy_v1.json"
# What the golden file says. Neither changes while schema 1 is read.
GOLDEN_POLICY = Policy(
    model="0123456789abcdef",
    prune={"features.0": 0.25, "features.3": 0.5},
    bits={
        "classifier": LayerBits(weights=4, activations=32),
        "features.0": INT8,
        "features.3": LayerBits(weights=4, activations=8),
    },
    removed_blocks=("layer1.1", "layer2.1"),
    importance="l1",
    distill=Distill(method="logit", alpha=0.9, temperature=4.0, schedule="halving"),
    finetune=FineTune(learning_rate=0.01),
)
GOLDEN_DIGEST = "df138c7af119"

GOLDEN_2 = GOLDEN.with_name("policy_v2.json")
GOLDEN_POLICY_2 = replace(
    GOLDEN_POLICY,
    bits={"classifier": LayerBits(weights=16, activations=16), "features.0": LayerBits(weights=2, activations=3)},
    sparsity={"features.3": 0.9},
    importance="weight_activation",
    ranges="percentile",
    scales="learned",
    distill=Distill(method="logit+feature", alpha=0.9, temperature=4.0, schedule="linear", feature_weight=0.5),
    finetune=FineTune(learning_rate=0.01, stages=3),
)
GOLDEN_DIGEST_2 = "f3a7d164fcac"


def file_with(**changes: object) -> str:
    """A sound policy file with some keys replaced."""
    return json.dumps({"schema": 1, "model": "0123456789abcdef"} | changes)


def reordered(value: Any) -> Any:
    """The same JSON with the keys of every object in reverse order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return value


@given(policies())
def test_a_policy_comes_back_from_its_file(policy: Policy) -> None:
    assert policy_from_json(policy_to_json(policy), "p.json") == policy


@given(policies())
def test_a_policy_from_a_file_is_written_as_the_same_file(policy: Policy) -> None:
    text = policy_to_json(policy)

    assert policy_to_json(policy_from_json(text, "p.json")) == text


@given(st.floats(0, 1, exclude_max=True))
def test_every_ratio_that_is_allowed_survives_writing_and_reading(ratio: float) -> None:
    first = policy_from_json(policy_to_json(Policy(model="m", prune={"a": ratio})), "p.json")

    assert digest(policy_from_json(policy_to_json(first), "p.json")) == digest(first)


@given(policies())
def test_the_order_of_keys_does_not_matter(policy: Policy) -> None:
    turned = policy_from_dict(reordered(policy_to_dict(policy)), "p.json")

    assert turned == policy
    assert digest(turned) == digest(policy)


@given(policies(), policies())
def test_digests_are_equal_exactly_for_equal_policies(one: Policy, other: Policy) -> None:
    assert (digest(one) == digest(other)) == (one == other)


def test_a_digest_is_twelve_hexadecimal_digits() -> None:
    assert len(digest(Policy(model="m"))) == 12
    assert int(digest(Policy(model="m")), 16) >= 0


@pytest.mark.parametrize(
    "same",
    [
        Policy(model="m", prune={"a": 0.5}, bits={"b": FP32}),
        Policy(model="m", prune={"a": 0.5, "c": 0.0}),
        Policy(model="m", prune={"a": 0.5, "c": 1e-9}),
        Policy(model="m", prune={"a": 0.5 + 1e-9}),
        Policy(model="m", prune=MappingProxyType({"a": 0.5})),
        Policy(model="m", prune={"a": 0.5}, distill=Distill(temperature=3), finetune=FineTune(learning_rate=0.02)),
    ],
)
def test_what_a_policy_need_not_say_does_not_change_its_digest(same: Policy) -> None:
    assert digest(same) == digest(Policy(model="m", prune={"a": 0.5}))


def test_the_order_and_repetition_of_removed_blocks_do_not_change_the_digest() -> None:
    one, other = (Policy(model="m", removed_blocks=names) for names in (("b", "a"), ("a", "b", "a")))

    assert digest(one) == digest(other)
    assert policy_from_json(policy_to_json(one), "p.json").removed_blocks == ("a", "b")


def test_whole_numbers_of_a_file_mean_the_same_as_real_ones() -> None:
    whole = file_with(bits={"a": {"weights": 8, "activations": 8}}, distill={"temperature": 3, "alpha": 1})
    real = file_with(bits={"a": {"weights": 8.0, "activations": 8}}, distill={"temperature": 3.0, "alpha": 1.0})

    assert digest(policy_from_json(whole, "p.json")) == digest(policy_from_json(real, "p.json"))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"prune": {"a": 0.25}},
        {"bits": {"a": INT8}},
        {"sparsity": {"a": 0.25}},
        {"removed_blocks": ("a",)},
        {"importance": "l1"},
        {"ranges": "mse"},
        {"scales": "learned"},
        {"distill": Distill(alpha=0.5)},
        {"distill": Distill(feature_weight=0.5)},
        {"finetune": FineTune(stages=2)},
        {"finetune": FineTune(learning_rate=0.01)},
    ],
)
def test_every_part_of_a_policy_counts_in_its_digest(change: dict[str, Any]) -> None:
    policy = Policy(model="m")

    assert digest(replace(policy, **change)) != digest(policy)


def test_a_file_of_schema_1_loads_for_ever() -> None:
    policy = policy_from_json(GOLDEN.read_text(), "golden")

    assert policy == GOLDEN_POLICY
    assert digest(policy) == GOLDEN_DIGEST


def test_a_file_of_schema_2_loads_for_ever() -> None:
    policy = policy_from_json(GOLDEN_2.read_text(), "golden")

    assert policy == GOLDEN_POLICY_2
    assert digest(policy) == GOLDEN_DIGEST_2


def test_a_policy_is_written_as_the_golden_file() -> None:
    assert policy_to_json(GOLDEN_POLICY_2) == GOLDEN_2.read_text()


def test_a_file_of_schema_1_is_written_in_schema_2_with_the_same_keys() -> None:
    old = json.loads(GOLDEN.read_text())

    assert policy_to_dict(GOLDEN_POLICY) == {**old, "schema": 2}


def test_a_file_may_leave_everything_but_schema_and_model_out() -> None:
    assert policy_from_json(file_with(model="m"), "p.json") == Policy(model="m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'schema': 1}", r"^p\.json: a policy is a JSON file, but line 1 is not: Expecting property name"),
        ('{"schema": 1,\n', r"p\.json: a policy is a JSON file, but line 2 is not"),
        ("", r"p\.json: a policy is a JSON file, but line 1 is not: Expecting value\.$"),
        ("[" * 100_000, r"^p\.json: a policy is a JSON file, but"),
        ("9" * 5000, r"^p\.json: a policy is a JSON file, but"),
        ("[1]", r"^p\.json: policy must be a JSON object, but got \[1\]\.$"),
        ("null", r"policy must be a JSON object, but got None"),
        ('{"model": "m"}', r"^p\.json: schema must be one of 1, 2, the versions .* reads, but got None\.$"),
        (file_with(schema=3), r"schema must be one of 1, 2, .* but got 3\.$"),
        (file_with(schema="1"), r"schema must be one of 1, 2, .* but got '1'\.$"),
        (file_with(schema=True), r"schema must be one of 1, 2, .* but got True\.$"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_policy_of_this_schema_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        policy_from_json(text, "p.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prunne": {}}, r"^p\.json: unknown key prunne; did you mean prune\.$"),
        ({"removed_block": []}, r"unknown key removed_block; did you mean removed_blocks\.$"),
        ({"zzz": 1}, r"unknown key zzz \(known: bits, .*prune, "),
        ({"bits": {"a": {"weight": 8}}}, r"unknown key bits\.a\.weight; did you mean weights\.$"),
        ({"distill": {"temprature": 3}}, r"unknown key distill\.temprature; did you mean temperature\.$"),
        ({"finetune": {"lr": 0.1}}, r"unknown key finetune\.lr \(known: learning_rate, stages\)\.$"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        policy_from_json(file_with(**changes), "p.json")


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, 1.5, float("nan"), float("inf"), 10**400, True, "0.5", None, [0.5]])
def test_a_ratio_outside_its_interval_is_refused(ratio: object) -> None:
    with pytest.raises(InputError, match=r"^p\.json: prune\.conv1 must be a number in \[0, 1\), but got "):
        policy_from_json(file_with(prune={"conv1": ratio}), "p.json")


@pytest.mark.parametrize("width", [1, 9, 15, 0, -8, 7.5, "8", None, True, [8]])
def test_a_weight_width_that_is_not_listed_is_refused(width: object) -> None:
    with pytest.raises(InputError, match=r"bits\.a\.weights must be one of 2, 3, 4, 5, 6, 7, 8, 16, 32, but got "):
        policy_from_json(file_with(bits={"a": {"weights": width}}), "p.json")


@pytest.mark.parametrize("width", [1, 12, "32", None])
def test_an_activation_width_that_is_not_listed_is_refused(width: object) -> None:
    with pytest.raises(InputError, match=r"bits\.a\.activations must be one of 2, 3, 4, 5, 6, 7, 8, 16, 32, but got "):
        policy_from_json(file_with(bits={"a": {"weights": 8, "activations": width}}), "p.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"model must be a string, but got None\.$"),
        ({"model": 7}, r"model must be a string, but got 7\.$"),
        ({"prune": [0.5]}, r"prune must be a JSON object, but got \[0\.5\]\.$"),
        ({"bits": 8}, r"bits must be a JSON object, but got 8\.$"),
        ({"bits": {"a": 8}}, r"bits\.a must be a JSON object, but got 8\.$"),
        ({"distill": "logit"}, r"distill must be a JSON object, but got 'logit'\.$"),
        ({"distill": {"method": "hint"}}, r"distill\.method must be one of none, logit, feature, .* but got 'hint'\.$"),
        ({"distill": {"alpha": 1.1}}, r"distill\.alpha must be a number in \[0, 1\], but got 1\.1\.$"),
        ({"distill": {"temperature": 0.5}}, r"distill\.temperature must be a number in \[1, 100\], but got 0\.5\.$"),
        ({"distill": {"schedule": "cosine"}}, r"distill\.schedule must be one of constant, halving, linear, but"),
        ({"finetune": []}, r"finetune must be a JSON object, but got \[\]\.$"),
        ({"finetune": {"learning_rate": "0.1"}}, r"finetune\.learning_rate must be a number in \[0, 10\], but"),
        ({"distill": {"feature_weight": -1}}, r"distill\.feature_weight must be a number in \[0, 1000\], but got -1"),
        ({"finetune": {"stages": 0}}, r"finetune\.stages must be a whole number in \[1, 20\], but got 0\.$"),
        ({"finetune": {"stages": 2.0}}, r"finetune\.stages must be a whole number in \[1, 20\], but got 2\.0\.$"),
        ({"finetune": {"stages": True}}, r"finetune\.stages must be a whole number in \[1, 20\], but got True\.$"),
        ({"sparsity": {"a": 1}}, r"sparsity\.a must be a number in \[0, 1\), but got 1\.$"),
        ({"sparsity": [0.5]}, r"sparsity must be a JSON object, but got \[0\.5\]\.$"),
        ({"ranges": "max"}, r"ranges must be one of minmax, percentile, mse, but got 'max'\.$"),
        ({"scales": None}, r"scales must be one of fixed, learned, but got None\.$"),
        ({"importance": "slope"}, r"importance must be one of l2, l1, bn, activation, .*, but got 'slope'\.$"),
        ({"importance": ["l2"]}, r"importance must be one of l2, l1, bn, .*, but got \['l2'\]\.$"),
        ({"removed_blocks": "layer1.0"}, r"removed_blocks must be a list of block names, but got 'layer1\.0'\.$"),
        ({"removed_blocks": {"layer1.0": True}}, r"removed_blocks must be a list of block names, but got \{"),
        ({"removed_blocks": [1]}, r"removed_blocks must be a list of block names, but got \[1\]\.$"),
        ({"removed_blocks": None}, r"removed_blocks must be a list of block names, but got None\.$"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        policy_from_json(file_with(**changes), "p.json")


@pytest.mark.parametrize(
    ("word", "known", "ending"),
    [
        ("conv1", ["conv1x", "head"], "; did you mean conv1x"),
        ("zzz", ["a", "b"], " (known: a, b)"),
        ("zzz", [], ""),
        ("zzz", list("abcdefghij"), " (known: a, b, c, d, e, f, g, h, …)"),
    ],
)
def test_the_nearest_name_or_a_few_of_them_are_shown(word: str, known: list[str], ending: str) -> None:
    assert nearest(word, known) == ending


@given(policies())
def test_a_policy_can_be_pickled(policy: Policy) -> None:
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_a_policy_with_read_only_mappings_can_be_pickled() -> None:
    policy = Policy(model="m", prune=MappingProxyType({"a": 0.5}), bits=MappingProxyType({"b": INT8}),
                    sparsity=MappingProxyType({"b": 0.25}))  # fmt: skip

    copy = pickle.loads(pickle.dumps(policy))

    assert copy == replace(policy, prune={"a": 0.5}, bits={"b": INT8}, sparsity={"b": 0.25})
    assert digest(copy) == digest(policy)


@pytest.mark.parametrize(
    ("bits", "int8"),
    [(INT8, True), (LayerBits(weights=4, activations=8), True), (LayerBits(weights=8), False), (FP32, False)],
)
def test_a_layer_runs_on_integers_when_both_operands_are_quantised(bits: LayerBits, int8: bool) -> None:
    assert bits.int8 is int8
