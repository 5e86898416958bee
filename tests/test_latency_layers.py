"""Time and bytes of an exported file, layer by layer, from real ONNX Runtime."""

from pathlib import Path

import pytest

from nightpress.evaluators.latency.layers import layer_costs
from nightpress.evaluators.latency.measure import MeasurementError, Timer, write_random
from nightpress.evaluators.latency.target import Target
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import INT8, Policy
from nightpress.spaces.space import uniform
from strategies import tiny, toy_anatomy

ANATOMY = toy_anatomy()
POLICIES = {
    "uncompressed": Policy(model=ANATOMY.digest),
    "INT8": uniform(ANATOMY, width=1, bits=INT8),
    "half of it": uniform(ANATOMY, width=0.5, bits=INT8),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_layer_has_its_time_and_its_bytes(tmp_path: Path, policy: Policy) -> None:
    planned = plan(ANATOMY, policy)
    size_bytes = write_random(planned, tmp_path / "model.onnx")
    with Timer(Target()) as timer:
        costs = layer_costs(tmp_path / "model.onnx", ANATOMY, timer)
    assert set(costs.layers) == {layer.name for layer in ANATOMY.layers}
    assert all(layer["ms"] > 0 for layer in costs.layers.values())
    assert costs.other_ms >= 0
    weights = {op.op.module: op.weight_count * (1 if op.bits.weights < 32 else 4) for op in planned.ops}
    # Biases and scales come on top of the weights, and the graph itself on top of all layers.
    assert all(layer["bytes"] > weights[name] for name, layer in costs.layers.items())
    assert sum(layer["bytes"] for layer in costs.layers.values()) < size_bytes


@pytest.mark.slow
def test_a_linear_layer_with_its_activation_fused_has_its_time(tmp_path: Path) -> None:
    """ONNX Runtime puts "fused" before its name."""
    anatomy = tiny().anatomy
    write_random(plan(anatomy, Policy(model=anatomy.digest)), tmp_path / "model.onnx")
    with Timer(Target()) as timer:
        costs = layer_costs(tmp_path / "model.onnx", anatomy, timer)
    assert {name for name, layer in costs.layers.items() if "ms" in layer} == {layer.name for layer in anatomy.layers}


def test_a_file_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    with Timer(Target()) as timer, pytest.raises(MeasurementError, match=r"cannot load model\.onnx: ") as caught:
        layer_costs(tmp_path / "model.onnx", ANATOMY, timer)
    assert "\n" not in str(caught.value)
