"""What the runtime really runs, beside what the policy says."""

from dataclasses import replace
from pathlib import Path

import pytest

from nightpress.evaluators.runtime import bits_used, check_bits, check_grids
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import FP32, INT8, LayerBits
from nightpress.spaces.space import uniform
from strategies import images, tiny
from test_apply import ANATOMY, DISABLED, PLAIN, exported, prepared, session


def test_a_layer_that_does_not_run_as_the_policy_says_is_named(tmp_path: Path) -> None:
    policy = uniform(ANATOMY, width=1, bits=INT8)
    module, planned = prepared(tiny(), policy, images(4))
    path = exported(module, planned, policy, tmp_path)
    intended = plan(ANATOMY, replace(policy, bits={**policy.bits, "one.conv2": FP32}))

    used = bits_used(path, intended, DISABLED)

    with pytest.raises(ValueError, match=r"^layer one\.conv2 was to run in fp32, but the runtime runs it in int8$"):
        check_bits(used, intended)
    with pytest.raises(ValueError, match=r"^layer stem\.0 was to run in int8, but the runtime runs it in fp32$"):
        check_bits(dict.fromkeys(used, "fp32"), planned)
    with pytest.raises(ValueError, match=r"but the runtime runs it in unknown$"):
        check_bits(dict.fromkeys(used, "unknown"), planned)


def test_integers_of_more_bits_than_the_policy_has_are_noticed(tmp_path: Path) -> None:
    policy = uniform(ANATOMY, width=1, bits=INT8)
    module, planned = prepared(tiny(), policy, images(4))
    path = exported(module, planned, policy, tmp_path)
    check_grids(path, planned)

    small = plan(ANATOMY, uniform(ANATOMY, width=1, bits=LayerBits(weights=4, activations=8)))
    with pytest.raises(ValueError, match=r"^layer stem\.0 was to have weights of 4 bits, at most 15 levels"):
        check_grids(path, small)
    plain = exported(*prepared(tiny(), PLAIN, images(4)), PLAIN, tmp_path)
    with pytest.raises(ValueError, match=r"^layer stem\.0 .* its file has no integers for it$"):
        check_grids(plain, planned)


def test_an_optimiser_that_quantises_on_its_own_is_noticed(tmp_path: Path) -> None:
    """Why targets disable one: beside integer neighbours it turns layers into INT8 that were to stay in fp32."""
    bits = {layer.name: INT8 for layer in ANATOMY.layers if layer.name != "one.conv1"}
    policy = replace(PLAIN, bits=bits)
    module, planned = prepared(tiny(), policy, images(4))
    path = exported(module, planned, policy, tmp_path)

    check_bits(bits_used(path, planned, DISABLED), planned)
    with pytest.raises(ValueError, match=r"^layer one\.conv1 was to run in fp32, but the runtime runs it in int8$"):
        check_bits(bits_used(path, planned, ()), planned)


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")

    with pytest.raises(RuntimeError, match=r"^ONNX Runtime cannot load broken\.onnx: [^\n]*$"):
        session(path)
