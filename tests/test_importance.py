"""Importances: values by hand, and orders that do not depend on where they are computed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nightpress.evaluators.importance import METHODS, Saliency, rank, saliency, scores
from nightpress.spaces.anatomy import Slice
from nightpress.spaces.errors import InputError
from strategies import images, seeded

NEED_DATA = ("activation", "weight_activation", "taylor", "hessian")


def owned(parameter: str, axis: int, indices: tuple[tuple[int, ...], ...]) -> Slice:
    return Slice(parameter=parameter, axis=axis, indices=indices)


def each(count: int) -> tuple[tuple[int, ...], ...]:
    return tuple((channel,) for channel in range(count))


# Two linear layers with three channels between them, and two items.
WEIGHTS = {
    "0.weight": [[1.0, -2.0], [0.5, 0.0], [-3.0, 1.0]],
    "0.bias": [0.0, 10.0, 0.0],
    "2.weight": [[2.0, 0.0, 1.0], [0.0, -1.0, 0.0]],
    "2.bias": [0.0, 0.0],
}
HIDDEN = {"hidden": [owned("0.weight", 0, each(3)), owned("0.bias", 0, each(3)), owned("2.weight", 1, each(3))]}
INPUTS = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # hidden activations (0, 10.5, 0) and (2, 11, 0)
TARGETS = torch.tensor([[1.0, 0.0], [0.0, 3.0]])


def two_layers() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    network.load_state_dict({name: torch.tensor(value) for name, value in WEIGHTS.items()})
    return network


def product(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient by the outputs is the targets."""
    return (outputs * targets).sum()


def relative(*values: float) -> pytest.approx:  # type: ignore[valid-type]
    """Scores as they are given: with a mean of 1."""
    return pytest.approx(np.array(values) / np.mean(values), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("l1", (3 + 2, 0.5 + 1, 4 + 1)),
        ("l2", (9**0.5, 1.25**0.5, 11**0.5)),
        ("activation", (1, 10.75, 0)),
        # |w| times the mean inputs (1.5, 0.5), and (1, 10.75, 0) for the layer that follows.
        ("weight_activation", (2.5 + 2, 0.75 + 10.75, 5 + 0)),
        # One batch. Gradients: first layer (0, 0), (−3·2, 0), (0, 0), its bias (0, −3, 0); second layer's columns
        # t · a summed over items: (0, 6), (10.5, 33), (0, 0).
        ("taylor", (0, (0.5 * 6) ** 2 + (10 * 3) ** 2 + 33**2, 0)),
        # Item by item: the first teaches only 2.weight[0, 1], which is 0; the mean halves what the second gives.
        ("hessian", (0, 0.5 * 0.5 * ((0.5 * 6) ** 2 + (10 * 3) ** 2 + 33**2), 0)),
    ],
)  # fmt: skip
def test_scores_by_hand(method: str, expected: tuple[float, ...]) -> None:
    found = saliency(two_layers(), method, inputs=INPUTS, targets=TARGETS, loss=product)

    assert scores(HIDDEN, found)["hidden"] == relative(*expected)


def test_hessian_and_taylor_by_hand_for_every_element() -> None:
    items: dict[str, Any] = {"inputs": INPUTS, "targets": TARGETS, "loss": product}

    taylor = saliency(two_layers(), "taylor", **items).values
    hessian = saliency(two_layers(), "hessian", **items).values

    # dL/dW2 is t·aᵀ: (0 0 0; …) + (…): only W2[0, 0], W2[0, 2] and W2[1, 1] are not 0 themselves.
    torch.testing.assert_close(taylor["2.weight"], torch.tensor([[0.0, 0, 0], [0, (33.0 * 1) ** 2, 0]]))
    torch.testing.assert_close(hessian["2.weight"], torch.tensor([[0.0, 0, 0], [0, 0.5 * 33.0**2 / 2, 0]]))
    torch.testing.assert_close(taylor["0.bias"], torch.tensor([0.0, 900.0, 0.0]))
    torch.testing.assert_close(hessian["0.bias"], torch.tensor([0.0, 225.0, 0.0]))


def test_taylor_averages_batches_and_hessian_items() -> None:
    """On w · x with the loss t · w · x the gradient is Σ t · x."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    inputs, targets = torch.arange(1.0, 17).reshape(16, 1), torch.ones(16, 1)

    taylor = saliency(network, "taylor", inputs=inputs, targets=targets, loss=product)
    hessian = saliency(network, "hessian", inputs=inputs, targets=targets, loss=product)
    some = saliency(network, "hessian", inputs=inputs, targets=targets, loss=product, samples=2)

    assert float(taylor.values["weight"]) == pytest.approx(4 * (36**2 + 100**2) / 2)  # items 1 … 8 and 9 … 16
    assert float(hessian.values["weight"]) == pytest.approx(0.5 * 4 * sum(x * x for x in range(1, 17)) / 16)
    assert float(some.values["weight"]) == pytest.approx(0.5 * 4 * (1 + 4) / 2)


# Convolutions and norms


class Stages(nn.Module):
    """A convolution of four channels with a norm, a depthwise and a grouped one, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.flatten(self.pool(torch.relu(self.grouped(self.depthwise(x)))), 1))


STAGES = {
    "conv": [
        *[owned(name, 0, each(4)) for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")],
        owned("depthwise.weight", 0, each(4)), owned("depthwise.bias", 0, each(4)),
    ],
    "grouped": [
        owned("grouped.weight", 0, each(6)), owned("grouped.bias", 0, each(6)),
        owned("head.weight", 1, tuple(tuple(range(4 * c, 4 * c + 4)) for c in range(6))),
    ],
}  # fmt: skip


def stages_data() -> dict[str, Any]:
    return {"inputs": images(12), "targets": torch.arange(12) % 5}


def test_a_channel_of_a_flattened_tensor_owns_all_of_its_places() -> None:
    network = seeded(Stages)
    columns = network.get_parameter("head.weight").detach().abs().sum(0).reshape(6, 4).sum(1)
    rows = network.get_parameter("grouped.weight").detach().abs().flatten(1).sum(1)

    found = scores(STAGES, saliency(network, "l1"))["grouped"]

    assert found == relative(*(rows + columns).tolist())


def test_norms_rank_by_their_scale_and_the_rest_by_magnitude() -> None:
    network = seeded(Stages)

    by_norm, by_magnitude = (scores(STAGES, saliency(network, method)) for method in ("bn", "l2"))

    assert by_norm["conv"] == relative(*network.get_parameter("norm.weight").abs().tolist())
    assert np.array_equal(by_norm["grouped"], by_magnitude["grouped"])
    assert not np.array_equal(by_norm["conv"], by_magnitude["conv"])


def layer_inputs(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """By layer, computed step by step."""
    stages: Any = network
    with torch.no_grad():
        first = torch.relu(stages.norm(stages.conv(inputs)))
        second = stages.depthwise(first)
        flat = torch.flatten(stages.pool(torch.relu(stages.grouped(second))), 1)
    return {"conv": inputs, "depthwise": first, "grouped": second, "head": flat}


def test_activations_are_those_that_the_following_layers_read() -> None:
    network, data = seeded(Stages), stages_data()
    read = layer_inputs(network, data["inputs"])

    found = scores(STAGES, saliency(network, "activation", **data))

    assert found["conv"] == relative(*read["depthwise"].abs().mean((0, 2, 3)).tolist())
    assert found["grouped"] == relative(*read["head"].abs().mean(0).reshape(6, 4).sum(1).tolist())


def test_weights_of_a_grouped_convolution_meet_their_own_inputs() -> None:
    network, data = seeded(Stages), stages_data()
    means = layer_inputs(network, data["inputs"])["grouped"].abs().mean((0, 2, 3))
    weight = network.get_parameter("grouped.weight").detach().abs()[:, :, 0, 0]

    found = saliency(network, "weight_activation", **data).values["grouped.weight"][:, :, 0, 0]

    torch.testing.assert_close(found[:3], weight[:3] * means[:2])
    torch.testing.assert_close(found[3:], weight[3:] * means[2:])


def test_a_channel_that_nothing_reads_is_worth_nothing() -> None:
    network = seeded(Stages)
    with torch.no_grad():
        network.get_parameter("head.weight")[:, 8:12] = 0  # the third channel's places

    for method in ("taylor", "hessian"):
        found = scores(STAGES, saliency(network, method, **stages_data()))["grouped"]
        assert found[2] == 0
        assert np.count_nonzero(found) >= 3


# Orders


@pytest.mark.parametrize("method", METHODS)
def test_every_channel_is_ranked_once_by_rising_scores(method: str) -> None:
    found = saliency(seeded(Stages), method, **stages_data())

    orders, values = rank(STAGES, found), scores(STAGES, found)

    assert {group: sorted(order) for group, order in orders.items()} == {"conv": [*range(4)], "grouped": [*range(6)]}
    for group, order in orders.items():
        assert (np.diff(values[group][order]) >= 0).all()
        assert values[group].mean() == pytest.approx(1)


def test_methods_differ() -> None:
    network = seeded(Stages)
    orders = {m: str(rank(STAGES, saliency(network, m, **stages_data()))) for m in METHODS}

    assert len(set(orders.values())) >= 6


def test_ties_keep_their_order() -> None:
    network = seeded(Stages)
    for parameter in network.parameters():
        nn.init.ones_(parameter)

    for method in ("l1", "l2", "bn"):
        assert rank(STAGES, saliency(network, method)) == {"conv": [*range(4)], "grouped": [*range(6)]}


def test_random_orders_follow_from_the_seed() -> None:
    orders = [rank(STAGES, saliency(seeded(Stages), "random", seed=seed)) for seed in (0, 0, 1, 2, 3)]

    assert orders[0] == orders[1]
    assert len({str(order) for order in orders}) >= 3


ELSEWHERE = """
import json, torch
from torch import nn
from nightpress.evaluators.importance import METHODS, rank, saliency

class Owned:
    def __init__(self, parameter, axis, count):
        self.parameter, self.axis, self.indices = parameter, axis, [[i] for i in range(count)]

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 3), nn.Flatten())
data = dict(inputs=torch.randn(16, 3, 5, 5), targets=torch.arange(16) % 5)
slices = {"0": [Owned("0.weight", 0, 16), Owned("1.weight", 0, 16), Owned("3.weight", 1, 16)]}
print(json.dumps({m: rank(slices, saliency(network.eval(), m, **data)) for m in METHODS}))
"""


@pytest.mark.slow
def test_orders_are_the_same_in_other_processes_and_on_other_threads() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=True, timeout=60,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    ]  # fmt: skip

    assert found[0] == found[1]
    assert set(json.loads(found[0])) == set(METHODS)


# What is left behind, and what is refused


def hooks(module: nn.Module) -> int:
    return len(vars(module)["_forward_pre_hooks"]) + len(vars(module)["_forward_hooks"])


@pytest.mark.parametrize("method", METHODS)
def test_the_module_is_left_as_it_was(method: str) -> None:
    network = seeded(Stages).train()
    network.get_submodule("norm").eval()
    network.get_parameter("conv.weight").requires_grad_(False)
    network.get_parameter("head.bias").grad = torch.ones(5)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]

    saliency(network, method, **stages_data())

    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["head.bias"]
    assert torch.equal(network.get_parameter("head.bias").grad, torch.ones(5))  # type: ignore[arg-type]
    assert not any(hooks(module) for module in network.modules())


@pytest.mark.parametrize("method", NEED_DATA)
def test_the_module_is_left_as_it_was_when_it_fails(method: str) -> None:
    network = two_layers().train()
    network.get_parameter("0.weight").requires_grad_(False)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        saliency(network, method, inputs=torch.ones(2, 7), targets=TARGETS, loss=product)

    assert all(module.training for module in network.modules())
    assert not network.get_parameter("0.weight").requires_grad
    assert not any(hooks(module) for module in network.modules())


def test_dropout_and_batch_statistics_do_not_count() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))

    made = seeded(network)
    data = stages_data()

    judged = saliency(made.eval(), "taylor", **data).values
    while_training = saliency(made.train(), "taylor", **data).values

    assert all(torch.equal(judged[name], value) for name, value in while_training.items())


def test_an_unknown_method_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"^importance must be one of l1, l2, bn, .*, random, but got 'magnitude'\.$"):
        saliency(two_layers(), "magnitude")


@pytest.mark.parametrize("method", NEED_DATA)
@pytest.mark.parametrize("data", [{}, {"inputs": INPUTS[:0], "targets": TARGETS[:0]}])
def test_methods_that_look_at_data_say_so(method: str, data: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^The importance {method} needs inputs.* of at least one training item\.$"):
        saliency(two_layers(), method, **data)


@pytest.mark.parametrize("break_it", [lambda w: w.fill_(torch.nan), lambda w: w.fill_(torch.inf)])
def test_what_is_not_finite_ranks_nothing(break_it: Callable[[Tensor], Tensor]) -> None:
    network = two_layers()
    with torch.no_grad():
        break_it(network.get_parameter("0.weight"))

    with pytest.raises(ValueError, match=r"^the importance l2 of 0\.weight is not finite$"):
        saliency(network, "l2")


def test_a_group_in_which_nothing_counts_is_named() -> None:
    with pytest.raises(ValueError, match=r"^nothing in the group lost has an importance$"):
        rank({"lost": [owned("gone", 0, each(2))]}, Saliency(values={}))
