"""Ranges found after training: what each covers, over all that was observed."""

import pytest
import torch
from torch import Tensor

from nightpress.evaluators.quantise import ActivationQuantiser, LearnedActivationQuantiser, end_observation
from nightpress.evaluators.ranges import SAMPLE, mse_range, mse_shares, percentile_range, sample


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(*batches: Tensor, ranges: str, bits: int = 8) -> ActivationQuantiser:
    quantiser = ActivationQuantiser(bits, ranges=ranges).eval()
    quantiser.observing = True
    for batch in batches:
        quantiser(batch)
    quantiser.observing = False
    end_observation(quantiser)
    return quantiser


def lost(quantiser: ActivationQuantiser, value: Tensor) -> float:
    return float((quantiser(value) - value).square().mean())


def test_min_max_covers_everything_that_was_observed() -> None:
    quantiser = observed(normal(100), 5 * normal(100, seed=1), normal(100, seed=2), ranges="minmax")

    assert float(quantiser.low) == float((5 * normal(100, seed=1)).min())
    assert float(quantiser.high) == float((5 * normal(100, seed=1)).max())


def test_percentile_leaves_the_rarest_values_out() -> None:
    value = torch.cat([torch.linspace(-1, 2, 100_000), torch.tensor([50.0, -50.0])])

    quantiser = observed(value, ranges="percentile")

    assert float(quantiser.high) == pytest.approx(2, abs=0.01)
    assert float(quantiser.low) == pytest.approx(-1, abs=0.01)
    assert float(observed(value, ranges="minmax").high) == 50


def test_percentile_of_many_values_is_that_of_a_sample() -> None:
    most = SAMPLE["percentile"]
    value = normal(4 * most)

    assert len(sample(value, most)) == most
    assert torch.equal(sample(value, most), sample(value, most))
    assert len(sample(torch.arange(1000.0), 999).unique()) == 999
    lower = sample(torch.arange(1000.0), 100) < 500
    assert 48 <= int(lower.sum()) <= 52
    assert float(observed(value, ranges="percentile").high) == pytest.approx(3.72, abs=0.3)  # of a normal distribution


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_loses_least(bits: int) -> None:
    value = normal(20_000) ** 3  # heavy tails

    best = observed(value, ranges="mse", bits=bits)

    assert lost(best, value) < lost(observed(value, ranges="minmax", bits=bits), value)
    for share in (0.9, 1.1):
        other = observed(value, ranges="mse", bits=bits)
        other.low.mul_(share)
        other.high.mul_(share)
        assert lost(best, value) <= lost(other, value)


def test_mse_keeps_what_fits_the_grid() -> None:
    low, high = mse_range(torch.arange(-3.0, 13.0), 15)

    assert (float(low), float(high)) == (-3, 12)


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("shift", [5.0, -5.0])
def test_ranges_contain_zero(ranges: str, shift: float) -> None:
    quantiser = observed(normal(1000).clamp(-1, 1) + shift, ranges=ranges)

    assert float(quantiser.low) <= 0 <= float(quantiser.high)
    assert float(quantiser.low * quantiser.high) == 0
    assert torch.equal(quantiser(torch.zeros(1)), torch.zeros(1))


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
def test_ranges_cover_all_batches_and_hold_none_of_them(ranges: str) -> None:
    quantiser = observed(normal(4000).clamp(-1, 1), 2 * normal(4000, seed=1).clamp(-1, 1), ranges=ranges)

    assert float(quantiser.high) == pytest.approx(2, rel=0.06)
    assert int(quantiser.seen) == 2
    assert vars(quantiser)["_samples"] == []
    assert not quantiser.observing


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
def test_fixed_ranges_move_some_way_with_what_training_sees(ranges: str) -> None:
    quantiser = observed(normal(4000).clamp(-1, 1), ranges=ranges).train()
    before = float(quantiser.high)

    quantiser(10 * normal(4000).clamp(-1, 1))

    assert float(quantiser.high) == pytest.approx(before + 0.2 * 9 * before, rel=0.1)


def test_ranges_are_held_in_evaluation() -> None:
    for quantiser in (observed(normal(100), ranges="mse"), LearnedActivationQuantiser(8).eval()):
        before = {name: value.clone() for name, value in quantiser.state_dict().items()}
        quantiser(100 * normal(100))
        assert all(torch.equal(before[name], value) for name, value in quantiser.state_dict().items())


@pytest.mark.parametrize("top", [1, 3, 7, 127])
def test_the_share_of_a_channel_is_its_best(top: int) -> None:
    weight = normal(5, 4, 3, 3) ** 3

    shares = mse_shares(weight, top)

    def error(channel: Tensor, share: float) -> float:
        scale = float(channel.abs().max()) * share / top
        return float((torch.round(channel / scale).clamp(-top, top) * scale - channel).square().sum())

    for channel, share in zip(weight, shares.tolist(), strict=True):
        best = min(error(channel, step / 40) for step in range(4, 41))
        assert error(channel, share) == pytest.approx(best, rel=1e-4)


def test_percentiles_have_their_name() -> None:
    low, high = percentile_range(torch.linspace(-100, 100, 20_001), 255)

    assert (float(low), float(high)) == pytest.approx((-99.98, 99.98), abs=1e-3)
