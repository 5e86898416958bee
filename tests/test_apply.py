"""From a policy to a module, to ONNX, to ONNX Runtime: the same network at every step."""

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from onnx import numpy_helper
from torch import Tensor, fx, nn

from nightpress.evaluators.apply import Compressor
from nightpress.evaluators.bake import bake
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.evaluate import write_onnx
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.onnx_graph import build_onnx, random_tensors
from nightpress.evaluators.quantise import quantisers, weight_scales
from nightpress.evaluators.runtime import Session, bits_used, check_bits, check_grids, optimised_graph
from nightpress.evaluators.training import Trainer
from nightpress.spaces.plan import Plan
from nightpress.spaces.policy import FP32, INT8, LayerBits, Policy, digest
from nightpress.spaces.space import uniform
from strategies import (
    OFFERED,
    Tiny,
    compressor_of,
    images,
    seeded,
    seeds,
    space_of,
    state_after,
    task_of,
    tiny,
)

ANATOMY = tiny().anatomy
SPACE = space_of(ANATOMY)
PLAIN = Policy(model=ANATOMY.digest)
DISABLED = Target().disabled_optimizers


def random(seed: int) -> Policy:
    return SPACE.random(np.random.default_rng(seed))


def group_of(layer: str) -> str:
    return next(g.name for g in ANATOMY.groups if layer in g.layers)


def bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(inputs)


def prepared(made: Compressor, policy: Policy, inputs: Tensor) -> tuple[fx.GraphModule, Plan]:
    """A policy applied, with statistics and quantiser ranges from the inputs."""
    module, planned = made.apply(policy)
    data = Arrays(inputs, torch.zeros(len(inputs), dtype=torch.int64))
    Trainer(task_of(made.whole(), inputs), data, Compute(), seed=0).reestimate(module)
    return module, planned


def exported(module: fx.GraphModule, planned: Plan, policy: Policy, folder: Path) -> Path:
    path = folder / f"{digest(policy)}.onnx"
    write_onnx(module, planned, policy, path)
    return path


def session(path: Path) -> Session:
    return Session(path, threads=1, disabled_optimizers=DISABLED)


def relative_error(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


def cosine(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


# The same policy, the same bits


@settings(max_examples=10)
@given(seeds(), seeds())
def test_a_policy_gives_the_same_bits_whatever_came_between(seed: int, between: int) -> None:
    first, _ = tiny().apply(random(seed))
    other, _ = tiny().apply(random(between))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)  # as training would

    again, _ = tiny().apply(random(seed))

    assert bit_equal(first.state_dict(), again.state_dict())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_policy_gives_the_same_bits_in_another_process() -> None:
    chosen = [replace(random(seed), importance=importance) for seed, importance in ((1, "l2"), (2, "l1"), (3, "bn"))]

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = [{k: torch.from_numpy(v) for k, v in found.items()} for found in pool.map(state_after, chosen)]

    for policy, found in zip(chosen, there, strict=True):
        assert bit_equal(found, tiny().apply(policy)[0].state_dict())


def test_applying_leaves_the_given_model_alone() -> None:
    network = seeded(Tiny)
    made = compressor_of(task_of(network))
    before, known = copy.deepcopy(network.state_dict()), copy.deepcopy(made.anatomy)

    for seed in range(3):
        module, _ = made.apply(random(seed))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(7.0)  # as training would

    assert bit_equal(before, dict(network.state_dict()))
    assert all(torch.equal(before[name], value) for name, value in made.network.state.items())
    assert made.anatomy == known


def test_an_empty_policy_gives_the_given_outputs() -> None:
    module, _ = tiny().apply(PLAIN)

    assert torch.equal(outputs(module, images(4)), outputs(seeded(Tiny), images(4)))


@settings(max_examples=10)
@given(seeds())
def test_a_shell_takes_what_a_policy_left(seed: int) -> None:
    module, planned = tiny().apply(random(seed))
    shell, same = tiny().shell(random(seed))

    shell.load_state_dict(module.state_dict())

    assert same == planned
    assert torch.equal(outputs(shell, images(4)), outputs(module, images(4)))


# What stays, and what may train


@pytest.mark.parametrize("choices", [{}, {"prune": {"one.conv1": 0.5}}, {"bits": {"stem.0": INT8}}])
def test_frozen_parameters_stay_frozen(choices: dict[str, object]) -> None:
    network = seeded(Tiny)
    for parameter in network.get_submodule("stem").parameters():
        parameter.requires_grad_(False)
    made = compressor_of(task_of(network))

    module, _ = made.apply(replace(PLAIN, model=made.anatomy.digest, **choices))

    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert {name for name, trains in trained.items() if not trains} == {
        "stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias",
    }  # fmt: skip
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in made.whole().parameters()]


@pytest.mark.parametrize("importance", ["l1", "l2", "bn"])
def test_the_weakest_channels_go(importance: str) -> None:
    network = seeded(Tiny)
    block = network.get_submodule("one")
    weak = [1, 5, 6, 20]
    with torch.no_grad():
        for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
            block.get_parameter(name)[weak] *= 1e-3
        block.get_parameter("conv2.weight")[:, weak] *= 1e-3
    made = compressor_of(task_of(network))

    module, _ = made.apply(Policy(model=made.anatomy.digest, prune={"one.conv1": 4 / 24}, importance=importance))

    stays = [i for i in range(24) if i not in weak]
    assert torch.equal(module.get_parameter("one.conv1.weight"), block.get_parameter("conv1.weight")[stays])
    assert torch.equal(module.get_parameter("one.conv2.weight"), block.get_parameter("conv2.weight")[:, stays])
    assert relative_error(outputs(module, images(8)), outputs(network, images(8))) < 1e-2


def test_batch_norm_importance_ranks_by_magnitude_where_there_is_no_batch_norm() -> None:
    hidden = Policy(model=ANATOMY.digest, prune={group_of("hidden"): 0.5})

    by_norm, _ = tiny().apply(replace(hidden, importance="bn"))
    by_magnitude, _ = tiny().apply(replace(hidden, importance="l2"))

    assert bit_equal(by_norm.state_dict(), by_magnitude.state_dict())


@pytest.mark.parametrize(
    "removed", [("one",), ("two",), ("three",), ("one", "two"), ("two", "one"), ("one", "two", "three")]
)
def test_removed_blocks_are_replaced_by_nothing(removed: tuple[str, ...]) -> None:
    network = seeded(Tiny)
    expected = copy.deepcopy(network)
    for name in removed:
        setattr(expected, name, nn.Identity())

    module, planned = tiny().apply(replace(PLAIN, removed_blocks=removed))

    assert torch.equal(outputs(module, images(4)), outputs(expected, images(4)))
    assert {name.split(".")[0] for name in module.state_dict()}.isdisjoint(removed)
    assert {p.op.name for p in planned.ops} <= {node.name for node in module.graph.nodes}


def test_the_only_layers_on_a_grid_are_those_that_the_policy_names() -> None:
    module, _ = tiny().apply(replace(PLAIN, bits={"one.conv1": LayerBits(weights=4), "head": INT8}))

    changed = {name for name, layer in module.named_modules() if hasattr(layer, "weight_bits")}
    assert changed == {"one.conv1", "head"}
    assert list(module.state_dict())[:8] == list(seeded(Tiny).state_dict())[:8]


# In ONNX Runtime


def check_export(made: Compressor, policy: Policy, inputs: Tensor, folder: Path) -> None:
    """Export, run, and compare with the fake-quantised module; every layer runs as the policy says."""
    module, planned = prepared(made, policy, inputs)
    simulated = outputs(module, inputs)
    path = exported(module, planned, policy, folder)

    run = session(path).outputs(inputs)

    if planned.quantised:
        assert cosine(run, simulated) >= 0.99
        # What the inputs have in common would hide much.
        assert cosine(run - run.mean(0), simulated - simulated.mean(0)) >= 0.97
    else:
        assert relative_error(run, simulated) < 1e-4
    used = bits_used(path, planned, DISABLED)
    assert used == {p.op.module: "int8" if p.int8 else "fp32" for p in planned.ops if p.weight_count}
    check_bits(used, planned)
    check_grids(path, planned)


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds())
def test_the_runtime_computes_what_was_simulated(tmp_path: Path, seed: int) -> None:
    check_export(tiny(), random(seed), images(16), tmp_path)


@pytest.mark.parametrize("bits", OFFERED)
def test_the_runtime_computes_every_pair_of_widths(tmp_path: Path, bits: LayerBits) -> None:
    check_export(tiny(), uniform(ANATOMY, width=0.75, bits=bits), images(16), tmp_path)


@pytest.mark.parametrize("weights", [2, 4, 8])
@pytest.mark.parametrize("activations", [2, 4, 6])
def test_the_runtime_computes_activations_of_few_bits(tmp_path: Path, weights: int, activations: int) -> None:
    bits = LayerBits(weights=weights, activations=activations)

    check_export(tiny(), uniform(ANATOMY, width=1, bits=bits), images(64), tmp_path)


def test_biases_are_judged_as_they_ship(tmp_path: Path) -> None:
    """Each layer's bias in the file is what evaluation adds, to the last bit of fp32."""
    policy = uniform(ANATOMY, width=1, bits=LayerBits(weights=3, activations=2))
    module, planned = prepared(tiny(), policy, images(16))
    tensors = bake(module, planned)
    written = onnx.load(str(exported(module, planned, policy, tmp_path))).graph.initializer
    numbers = {i.name: numpy_helper.to_array(i) for i in written}
    checked = 0
    for p in planned.ops:
        if not p.weight_count:
            continue
        shipped = numbers[f"{p.op.name}.bias.q"] * numbers[f"{p.op.name}.bias.scale"].astype(np.float64)
        rounding = module.get_submodule(f"bias_{p.op.name}")
        added = rounding(torch.zeros(1, len(shipped)))[0].numpy()
        np.testing.assert_allclose(tensors.layers[p.op.module or ""].bias + added, shipped, rtol=1e-5, atol=1e-6)
        checked += bool(np.abs(added).max() > 1e-4)
    assert checked > 5


def test_training_does_not_round_biases() -> None:
    policy = uniform(ANATOMY, width=1, bits=LayerBits(weights=2, activations=2))
    module, _ = prepared(tiny(), policy, images(16))
    rounding = module.get_submodule("bias_hidden")
    value = torch.zeros(1, 16)

    assert not torch.equal(rounding(value), value)
    assert torch.equal(rounding.train()(value), value)
    for quantiser in quantisers(module).values():
        quantiser.bypassed = True
    assert torch.equal(rounding.eval()(value), value)


ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Hardswish]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_before_any_activation_runs_as_the_policy_says(
    activation: type[nn.Module], kind: str, tmp_path: Path
) -> None:
    first = [nn.Flatten(), nn.Linear(192, 16)] if kind == "linear" else [nn.Conv2d(3, 8, 3, stride=2)]
    last = [nn.Linear(16, 5)] if kind == "linear" else [nn.Conv2d(8, 5, 3), nn.Flatten()]
    made = compressor_of(task_of(seeded(lambda: nn.Sequential(*first, activation(), *last))))
    layers = [layer.name for layer in made.anatomy.layers]

    for quantised in ([layers[0]], [layers[1]], layers):
        policy = Policy(model=made.anatomy.digest, bits=dict.fromkeys(quantised, INT8))
        check_export(made, policy, images(16), tmp_path)


@cache
def of_torchvision(name: str) -> Compressor:
    """With random weights, for inputs of 64×64.

    A deep network of random weights is chaotic: one integer that is rounded the other way grows from layer to
    layer until the output is another. Shifts that keep most activations above 0 calm it.
    """
    network = seeded(lambda: torchvision.models.get_model(name))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.ones_(module.bias)
    return compressor_of(task_of(network, images(8, side=64)))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("bits", ["fp32", "int8", "mixed"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_torchvision_model_survives_a_joint_policy(name: str, bits: str, tmp_path: Path) -> None:
    made = of_torchvision(name)
    policy = space_of(made.anatomy).random(np.random.default_rng(5))
    if bits != "mixed":
        pair = FP32 if bits == "fp32" else INT8
        policy = replace(policy, bits={layer.name: pair for layer in made.anatomy.layers})
    blocks = {block.name for block in made.anatomy.blocks}
    policy = replace(policy, removed_blocks=tuple(sorted(blocks)[:2]))

    check_export(made, policy, images(8, side=64), tmp_path)


@pytest.mark.parametrize("weights", [2, 3, 4, 8])
@pytest.mark.parametrize("activations", [4, 8, 32])
def test_the_integers_of_the_file_are_those_that_training_saw(weights: int, activations: int, tmp_path: Path) -> None:
    policy = uniform(ANATOMY, width=0.75, bits=LayerBits(weights=weights, activations=activations))
    module, planned = prepared(tiny(), policy, images(16))

    path = exported(module, planned, policy, tmp_path)

    initializers = {i.name: numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer}
    for p in planned.ops:
        if not p.weight_count or p.op.module is None:
            continue
        weight = module.get_parameter(f"{p.op.module}.weight").detach()
        scales = weight_scales(weight, weights)
        grid = torch.round(weight / scales.reshape(-1, *[1] * (weight.dim() - 1)))
        if p.op.norm is not None:  # a negative scale of the batch norm turns the channel's signs
            turned = module.get_parameter(f"{p.op.norm}.weight").detach() < 0
            grid[turned] *= -1
        integers = initializers[f"{p.op.name}.weight.q"]
        assert integers.dtype == np.int8
        if activations < 8:  # stretched over the eight bits, so that the bias has a finer grid
            assert not (integers % 2 ** (8 - weights)).any()
            integers = integers // 2 ** (8 - weights)
        assert abs(integers).max() == 2 ** (weights - 1) - 1
        np.testing.assert_array_equal(integers, grid.numpy())


@pytest.mark.parametrize("weakness", ["scale of the batch norm", "weights"])
def test_a_channel_without_weights_keeps_its_bias_in_integers(weakness: str, tmp_path: Path) -> None:
    """Its bias is many steps of a vanishing scale: more than 32 bits hold."""
    network = seeded(Tiny)
    with torch.no_grad():
        dead = network.get_parameter("stem.1.weight" if weakness != "weights" else "stem.0.weight")
        dead[:8] = 0
        network.get_parameter("stem.1.bias")[:8] = 3.0
    made = compressor_of(task_of(network))

    check_export(made, uniform(made.anatomy, width=1, bits=INT8), images(16), tmp_path)


def test_the_integer_kernel_absorbs_the_clip_behind_it(tmp_path: Path) -> None:
    policy = uniform(ANATOMY, width=1, bits=INT8)
    module, planned = tiny().apply(policy)
    inputs = 100 * images(4)  # far above 6, with the statistics that the network came with
    Trainer(task_of(tiny().whole()), Arrays(inputs, torch.zeros(4).long()), Compute(), seed=0).observe(module)
    clipped = next(p.op.name for p in planned.ops if p.op.kind == "relu6")

    run = optimised_graph(exported(module, planned, policy, tmp_path), DISABLED).graph

    assert 5.99 < float(quantisers(module)[clipped].grid()[0]) * 255 < 6
    assert "Clip" not in {node.op_type for node in run.node}


def test_a_file_takes_batches_of_any_size(tmp_path: Path) -> None:
    module, planned = tiny().apply(PLAIN)
    run = session(exported(module, planned, PLAIN, tmp_path))

    together = run.outputs(images(70))

    assert together.shape == (70, 5)
    torch.testing.assert_close(together[:1], run.outputs(images(70)[:1]))


def test_a_file_names_its_policy_and_model(tmp_path: Path) -> None:
    module, planned = tiny().apply(PLAIN)

    written = onnx.load(str(exported(module, planned, PLAIN, tmp_path)))

    assert {entry.key: entry.value for entry in written.metadata_props} == {
        "nightpress.model": ANATOMY.digest, "nightpress.policy": digest(PLAIN),
    }  # fmt: skip


def test_a_norm_whose_output_lies_on_a_grid_keeps_its_own_scale(tmp_path: Path) -> None:
    made = compressor_of(task_of(seeded(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 8), nn.Flatten()))))

    check_export(made, uniform(made.anatomy, width=1, bits=INT8), images(16), tmp_path)


@settings(max_examples=10)
@given(seeds())
def test_the_graph_that_is_timed_is_the_graph_that_ships(seed: int) -> None:
    policy = random(seed)
    module, planned = prepared(tiny(), policy, images(4))

    ships = onnx.load_from_string(build_onnx(planned, bake(module, planned)))
    timed = onnx.load_from_string(build_onnx(planned, random_tensors(planned)))

    assert [(n.op_type, n.name, list(n.input)) for n in ships.graph.node] == [
        (n.op_type, n.name, list(n.input)) for n in timed.graph.node
    ]
    assert {(i.name, i.data_type, tuple(i.dims)) for i in ships.graph.initializer} == {
        (i.name, i.data_type, tuple(i.dims)) for i in timed.graph.initializer
    }


def test_weights_that_are_not_finite_are_refused_by_layer() -> None:
    module, planned = tiny().apply(PLAIN)
    with torch.no_grad():
        module.get_parameter("one.conv2.weight")[0] = float("nan")

    with pytest.raises(ValueError, match=r"^the weights of one\.conv2 are not finite$"):
        bake(module, planned)
