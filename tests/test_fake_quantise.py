"""Rounding to a grid, and the gradients of value, scale and offset."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nightpress.evaluators.fake_quantise import Grid, fake_quantise, integers, learned_quantise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(1e-3, 1e3), st.integers(0, 15), st.integers(0, 1000))
def test_a_value_goes_to_the_nearest_point_of_the_grid(scale: float, zero_point: int, seed: int) -> None:
    value = 4 * scale * normal(64, seed=seed)
    grid = Grid(scale=scale, low=float(-zero_point), high=float(15 - zero_point))

    rounded = fake_quantise(value, grid)

    points = scale * torch.arange(-zero_point, 16 - zero_point)
    assert torch.isin(integers(value, grid) + zero_point, torch.arange(16)).all()
    nearest = (value[:, None] - points).abs().min(dim=1).values
    torch.testing.assert_close((value - rounded).abs(), nearest, rtol=1e-4, atol=1e-4 * scale)


def test_the_gradient_passes_where_the_grid_reaches() -> None:
    value = torch.tensor([-1.1, -0.9, 0.0, 0.3, 1.4, 1.6], requires_grad=True)
    grid = Grid(scale=0.5, low=-1.0, high=2.0)  # reaches from −0.75 to 1.25

    fake_quantise(value, grid).backward(torch.arange(1.0, 7.0))

    assert value.grad is not None
    assert value.grad.tolist() == [0, 0, 3, 4, 0, 0]


def gradients(rounding: Callable[..., Tensor], value: Tensor, upstream: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
    leaves = [leaf.clone().requires_grad_() for leaf in (value, *learned)]
    result = rounding(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, upstream))


def test_the_scales_of_channels_learn_as_in_torch() -> None:
    weight, upstream, scales = normal(6, 3, 3, 3), normal(6, 3, 3, 3, seed=1), normal(6, seed=2).abs() / 5 + 0.1
    grid = Grid(scale=scales.reshape(-1, 1, 1, 1), low=-7.0, high=7.0)

    ours = gradients(lambda w, s: learned_quantise(w, grid, s), weight, upstream, scales)

    factor = (27 * 7) ** -0.5
    torchs = gradients(
        lambda w, s: torch.ops.aten._fake_quantize_learnable_per_channel_affine(w, s, torch.zeros(6), 0, -7, 7, factor),
        weight, upstream, scales,
    )  # fmt: skip
    for given_, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(given_, expected, rtol=1e-5, atol=1e-5)


def test_scale_and_offset_learn_by_their_definition() -> None:
    """One value in the grid, one above it, one below it: grid 0 … 3, zero point 1."""
    value, upstream = torch.tensor([[0.7, 9.0, -9.0]]), torch.tensor([[2.0, 3.0, 5.0]])
    scale, offset = torch.tensor(0.5), torch.tensor(-0.5)
    grid = Grid(scale=0.5, low=-1.0, high=2.0)

    rounded, by_value, by_scale, by_offset = gradients(
        lambda v, s, o: learned_quantise(v, grid, s, o), value, upstream, scale, offset
    )

    factor = (3 * 3) ** -0.5
    torch.testing.assert_close(rounded, torch.tensor([[0.5, 1.0, -0.5]]))
    assert by_value.tolist() == [[2, 0, 0]]
    torch.testing.assert_close(by_scale, torch.tensor(factor * (2 * (1 - 1.4) + 3 * 3 + 5 * 0)))
    torch.testing.assert_close(by_offset, torch.tensor(factor * (3.0 + 5.0)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_and_scalars_on_a_device_mean_the_same(layout: torch.memory_format) -> None:
    value, upstream = normal(4, 3, 5, 5).contiguous(memory_format=layout), normal(4, 3, 5, 5, seed=1)
    scale, offset = torch.tensor(0.1), torch.tensor(-0.4)
    by_number = Grid(scale=scale.item(), low=-4.0, high=11.0)
    by_scalar = Grid(scale=scale, low=torch.tensor(-4.0), high=torch.tensor(11.0))

    fixed = [gradients(lambda v, g=g: fake_quantise(v, g), value, upstream) for g in (by_number, by_scalar)]
    learned = [
        gradients(lambda v, s, o, g=g: learned_quantise(v, g, s, o), value, upstream, scale, offset)
        for g in (by_number, by_scalar)
    ]

    assert all(torch.equal(one, other) for one, other in zip(*fixed, strict=True))
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other)


def test_values_of_16_bits_lie_on_the_same_integers() -> None:
    value = normal(1000).bfloat16()
    grid = Grid(scale=0.013, low=-128.0, high=127.0)

    rounded = fake_quantise(value, grid)

    assert rounded.dtype == torch.bfloat16
    assert torch.equal(integers(value, grid), integers(value.float(), grid))
    assert torch.equal(rounded, fake_quantise(value.float(), grid).bfloat16())


def test_a_scale_learns_from_values_of_16_bits() -> None:
    """Their own rounding is noise of a few per cent in the scale's gradient."""
    value, upstream = normal(64, 8, 16, 16).relu().bfloat16(), 1 + normal(64, 8, 16, 16, seed=1).bfloat16()
    scale, grid = torch.tensor(0.2), Grid(scale=0.2, low=0.0, high=15.0)

    wide = gradients(lambda v, s: learned_quantise(v, grid, s), value.float(), upstream.float(), scale)
    narrow = gradients(lambda v, s: learned_quantise(v, grid, s), value, upstream, scale)

    assert narrow[1].dtype == torch.bfloat16
    assert torch.equal(narrow[1].float(), wide[1])
    assert narrow[2].dtype == torch.float32
    torch.testing.assert_close(narrow[2], wide[2], rtol=0.05, atol=0)
