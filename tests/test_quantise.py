"""Quantisers: the grid is the one that is exported, to the last integer, whatever found its scales."""

import copy
import itertools
import pickle
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from torch import Tensor, fx, nn

from nightpress.evaluators.quantise import (
    ActivationQuantiser,
    LearnedActivationQuantiser,
    QuantConv2d,
    QuantisedWeight,
    QuantLinear,
    end_observation,
    quantise,
    quantisers,
    weight_grid,
    weight_integers,
)
from nightpress.evaluators.quantised_layers import with_quantised_weight
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import Plan, plan
from nightpress.spaces.policy import LayerBits, Policy
from nightpress.spaces.space import uniform
from strategies import Tiny, images, seeded, tiny

BITS = (2, 3, 4, 5, 6, 7, 8)
CHOICES = list(itertools.product(("minmax", "percentile", "mse"), ("fixed", "learned")))
ANATOMY = tiny().anatomy


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planned(weights: int = 8, activations: int = 8, layers: Mapping[str, LayerBits] | None = None) -> Plan:
    policy = uniform(ANATOMY, width=1, bits=LayerBits(weights=weights, activations=activations))
    return plan(ANATOMY, replace(policy, bits={**policy.bits, **(layers or {})}))


def quantised(chosen: Plan, ranges: str = "minmax", scales: str = "fixed") -> fx.GraphModule:
    module = tiny().whole()
    quantise(module, chosen, ranges=ranges, scales=scales)
    return module.eval()


def observe(module: nn.Module, *batches: Tensor) -> None:
    """As the trainer does."""
    for site in quantisers(module).values():
        site.observing = True
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for site in quantisers(module).values():
        site.observing = False
    end_observation(module)


def train(module: nn.Module, steps: int = 1) -> None:
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    module.train()
    for step in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(module(images(16, seed=step)), torch.arange(16) % 5).backward()
        optimiser.step()
    module.eval()


def layers_of(module: nn.Module) -> dict[str, QuantisedWeight]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantisedWeight)}


# Weights


@pytest.mark.parametrize(("ranges", "scales"), CHOICES)
@pytest.mark.parametrize("bits", [*BITS, 16])
def test_the_weight_of_the_forward_is_integers_times_scales(bits: int, ranges: str, scales: str) -> None:
    module = quantised(planned(weights=bits), ranges, scales)
    observe(module, images(8))
    train(module)

    layers = layers_of(module)
    assert set(layers) == {layer.name for layer in ANATOMY.layers}
    for layer in layers.values():
        used = layer.quantised_weight().detach()
        found, width = weight_grid(layer)
        whole = weight_integers(layer)
        assert width == bits
        assert torch.equal(used, whole * found.reshape(-1, *[1] * (used.dim() - 1)))
        if bits == 16:
            assert torch.equal(whole, whole.half().float())
        else:
            assert torch.equal(whole, whole.round())
            assert int(whole.abs().max()) == 2 ** (bits - 1) - 1


def test_a_layer_computes_with_that_weight() -> None:
    module = quantised(planned(weights=3), "mse", "learned")
    convolution, linear = module.get_submodule("one.conv1"), module.get_submodule("head")
    assert isinstance(convolution, QuantConv2d)
    assert isinstance(linear, QuantLinear)

    x = images(2, channels=16)
    assert torch.equal(convolution(x), F.conv2d(x, convolution.quantised_weight(), padding=1))
    assert torch.equal(linear(x[:, :, 0, 0]), F.linear(x[:, :, 0, 0], linear.quantised_weight(), linear.bias))


@pytest.mark.parametrize("scales", ["fixed", "learned"])
@pytest.mark.parametrize("bits", [2, 4])
def test_mse_scales_lose_less_than_the_largest_weight_would(bits: int, scales: str) -> None:
    lost = {}
    for ranges in ("minmax", "mse"):
        module = quantised(planned(weights=bits), ranges, scales)
        lost[ranges] = {
            name: (layer.weight - layer.quantised_weight()).square().flatten(1).sum(1).detach()
            for name, layer in layers_of(module).items()
        }

    for name, least in lost["mse"].items():
        assert bool((least <= lost["minmax"][name] * 1.0001).all()), name
    assert sum(float(v.sum()) for v in lost["mse"].values()) < 0.9 * sum(
        float(v.sum()) for v in lost["minmax"].values()
    )


def test_fixed_scales_follow_the_weight() -> None:
    layer = layers_of(quantised(planned(weights=4), "mse"))["one.conv1"]
    before = weight_grid(layer)[0]

    with torch.no_grad():
        layer.weight.mul_(3)

    torch.testing.assert_close(weight_grid(layer)[0], 3 * before)


def test_a_learned_scale_starts_at_the_range_and_is_never_decayed() -> None:
    module, fixed = quantised(planned(weights=4), "mse", "learned"), quantised(planned(weights=4), "mse")
    layer = layers_of(module)["one.conv1"]

    assert torch.equal(weight_grid(layer)[0], weight_grid(layers_of(fixed)["one.conv1"])[0])
    learned = [p for name, p in module.named_parameters() if name.endswith(("scale", "offset"))]
    assert len(learned) > len(layers_of(module))
    assert all(p.dim() <= 1 for p in learned)  # the optimiser decays weights, which have two dimensions and more


def test_a_learned_scale_below_the_least_comes_back() -> None:
    layer = layers_of(quantised(planned(weights=4), scales="learned"))["one.conv1"]
    assert layer.weight_scale is not None
    with torch.no_grad():
        layer.weight_scale[0] = -1.0

    layer.quantised_weight().backward(torch.ones_like(layer.weight) * layer.weight.sign())

    assert float(weight_grid(layer)[0][0]) == pytest.approx(1e-8)
    assert layer.weight_scale.grad is not None
    assert float(layer.weight_scale.grad[0]) > 0
    assert bool(torch.isfinite(layer.weight_scale.grad).all())


def test_frozen_weights_have_frozen_scales() -> None:
    module = tiny().whole()
    module.get_parameter("head.weight").requires_grad_(False)

    quantise(module, planned(), scales="learned")

    trains = {name: p.requires_grad for name, p in module.named_parameters() if name.endswith("weight_scale")}
    assert {name for name, trained in trains.items() if not trained} == {"head.weight_scale"}


def test_a_channel_of_zeros_has_a_scale() -> None:
    network = seeded(Tiny)
    with torch.no_grad():
        network.get_parameter("one.conv1.weight")[3] = 0
    for ranges, scales in CHOICES:
        module = tiny().whole()
        module.load_state_dict(network.state_dict())
        quantise(module, planned(weights=2), ranges=ranges, scales=scales)
        layer = layers_of(module)["one.conv1"]

        assert float(weight_grid(layer)[0].min()) > 0
        assert torch.equal(layer.quantised_weight()[3], torch.zeros(16, 3, 3))


# Activations


def site(bits: int, scales: str, ranges: str = "minmax", *, relu: bool = False) -> ActivationQuantiser:
    if scales == "learned":
        return LearnedActivationQuantiser(bits, ranges=ranges, unsigned=relu)
    return ActivationQuantiser(bits, ranges=ranges)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("ranges", "scales"), CHOICES)
@pytest.mark.parametrize("bits", BITS)
def test_activations_lie_on_the_integers_of_their_width(bits: int, ranges: str, scales: str, relu: bool) -> None:
    quantiser = site(bits, scales, ranges, relu=relu).eval()
    value = normal(8, 4, 6, 6).relu() if relu else normal(8, 4, 6, 6) + 0.5
    observe(quantiser, value)

    result = quantiser(10 * value).detach()

    scale, zero_point = quantiser.grid()
    whole = result / scale + zero_point
    torch.testing.assert_close(whole, whole.round())
    assert (int(whole.round().min()), int(whole.round().max())) == (0, 2**bits - 1)
    assert int(zero_point) == 0 if relu else 0 < int(zero_point) < 2**bits
    assert torch.equal(quantiser(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("scales", ["fixed", "learned"])
@pytest.mark.parametrize("bits", BITS)
def test_the_runtime_has_the_same_integers(bits: int, scales: str) -> None:
    """As they stand in a file: below 8 bits a clip of integers follows the quantisation."""
    quantiser = site(bits, scales).eval()
    value = normal(4096) - 0.2
    observe(quantiser, value)
    scale, zero_point = quantiser.grid()
    halves = (torch.arange(-300, 300) + 0.5) * scale  # where a reciprocal rounds the other way
    value = torch.cat([value, 2 * value, halves])
    constants = {
        "scale": np.float32(scale), "zero": np.uint8(zero_point),
        "top": np.array(quantiser.levels, np.uint8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("Clip", ["q", "", "top"], ["clipped"]),
        helper.make_node("DequantizeLinear", ["clipped", "scale", "zero"], ["y"]),
    ]
    shape = [len(value)]
    graph = helper.make_graph(
        nodes, "grid", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    run = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    assert torch.equal(torch.from_numpy(run.run(None, {"x": value.numpy()})[0]), quantiser(value).detach())


def test_learned_zero_points_behind_a_relu_stay_at_the_lowest_integer() -> None:
    module = quantised(planned(activations=4), scales="learned")
    observe(module, images(16))
    before = {name: p.clone() for name, p in module.named_parameters() if name.endswith(".scale")}

    train(module, steps=5)

    kinds = {p.op.name: p.op.kind for p in planned().ops}
    behind = {name: quantiser for name, quantiser in quantisers(module).items() if kinds[name] in {"relu", "relu6"}}
    assert {int(quantiser.grid()[1]) for quantiser in behind.values()} == {0}
    assert not any(torch.equal(module.get_parameter(name), value) for name, value in before.items())
    (clipped,) = (quantiser for name, quantiser in behind.items() if kinds[name] == "relu6")
    assert clipped.levels == 15
    assert 0 < float(clipped.grid()[0]) * 15 < 6


def test_a_learned_grid_starts_at_the_observed_range() -> None:
    learned, fixed = site(4, "learned", "mse"), site(4, "fixed", "mse")
    for quantiser in (learned, fixed):
        observe(quantiser.eval(), normal(512))

    assert [tensor.item() for tensor in learned.grid()] == [tensor.item() for tensor in fixed.grid()]


@pytest.mark.parametrize(("ranges", "scales"), CHOICES)
def test_what_follows_a_quantiser_is_observed_as_it_will_be(ranges: str, scales: str) -> None:
    module, again = (quantised(planned(activations=8), ranges, scales) for _ in range(2))
    observe(module, images(16))
    again.load_state_dict(module.state_dict())

    observe(again, images(16))

    for name, quantiser in quantisers(module).items():
        other = quantisers(again)[name]
        assert float(quantiser.high - quantiser.low) == pytest.approx(float(other.high - other.low), rel=0.1), name


def test_without_observation_the_first_batch_is_observed() -> None:
    learned, seen = site(8, "learned").train(), site(8, "learned").eval()

    learned(normal(64))
    learned(3 * normal(64))
    observe(seen, normal(64))

    assert learned.grid() == seen.grid()


def test_the_width_of_a_tensor_is_the_widest_that_reads_it() -> None:
    chosen = planned(activations=4, layers={"one.conv1": LayerBits(weights=8, activations=6)})
    bits = chosen.activation_bits
    readers = {p.op.module: chosen.quantised[p.inputs[0]] for p in chosen.ops if p.weight_count}

    assert bits[readers["one.conv1"] or ""] == 6
    assert bits[readers["one.conv2"] or ""] == 4
    unread = set(bits) - set(readers.values())
    assert unread  # what only a sum reads stays on the runtime's own integers
    assert {bits[name] for name in unread} == {8}


def test_quantisers_get_the_width_of_their_tensor() -> None:
    chosen = planned(activations=3)

    levels = {name: quantiser.levels for name, quantiser in quantisers(quantised(chosen)).items()}

    assert levels == {name: 2**bits - 1 for name, bits in chosen.activation_bits.items()}


@pytest.mark.parametrize(("ranges", "scales"), CHOICES)
def test_training_never_waits_for_the_device(ranges: str, scales: str) -> None:
    """A meta tensor has no value: whoever reads one fails."""
    module = quantised(planned(weights=4, activations=4), ranges, scales)
    observe(module, images(8))
    train(module)  # on a device too, the first step of all may look whether a range is known
    module.to("meta").train()

    for _ in range(9):  # of which one moves the ranges
        module(images(8).to("meta")).sum().backward()

    with pytest.raises(RuntimeError, match="meta"):
        float(module(images(8).to("meta")).sum())


# State


@pytest.mark.parametrize(("ranges", "scales"), CHOICES)
def test_a_state_dict_holds_all_of_a_grid(ranges: str, scales: str) -> None:
    chosen = planned(weights=3, activations=5)
    module = quantised(chosen, ranges, scales)
    observe(module, images(16))
    train(module)
    fresh = quantised(chosen, ranges, scales)

    fresh.load_state_dict(module.state_dict())

    with torch.no_grad():
        assert torch.equal(fresh(images(8)), module(images(8)))


@pytest.mark.parametrize(("ranges", "scales"), CHOICES)
def test_modules_pickle_and_copy(ranges: str, scales: str) -> None:
    module = quantised(planned(weights=16 if scales == "fixed" else 2), ranges, scales)
    observe(module, images(8))

    with torch.no_grad():
        expected = module(images(4))
        assert torch.equal(pickle.loads(pickle.dumps(module))(images(4)), expected)
        assert torch.equal(copy.deepcopy(module)(images(4)), expected)


def test_quantising_leaves_the_given_layers_alone() -> None:
    layer = nn.Conv2d(3, 4, 1)

    quantised_layer = with_quantised_weight(layer, 4, ranges="mse", scales="learned")

    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(quantised_layer.state_dict()) == ["weight", "bias", "weight_scale", "weight_share"]
    assert quantised_layer.weight is layer.weight


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": "max"}, r"^ranges must be one of minmax, percentile, mse, but got 'max'\.$"),
        ({"scales": "free"}, r"^scales must be one of fixed, learned, but got 'free'\.$"),
    ],
)
def test_an_unknown_choice_is_a_sentence(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantise(tiny().whole(), planned(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("weights", "activations"), [(1, 8), (9, 32), (8, 1), (8, 12)])
def test_an_unknown_width_is_a_sentence(weights: int, activations: int) -> None:
    chosen = plan(ANATOMY, Policy(model="", bits={"head": LayerBits(weights=weights, activations=activations)}))

    with pytest.raises(
        InputError, match=r"^bits\.head\.\w+ must be one of 2, 3, 4, 5, 6, 7, 8, 16, 32, but got \d+\.$"
    ):
        quantise(tiny().whole(), chosen)


def test_a_layer_that_has_no_quantiser_is_named() -> None:
    module = tiny().whole()
    module.hidden = nn.Bilinear(2, 2, 16)

    with pytest.raises(InputError, match=r"^The layer hidden is a Bilinear; only Conv2d and Linear can be quantised"):
        quantise(module, planned())
