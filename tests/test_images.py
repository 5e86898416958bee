"""Augmentation and normalisation of whole batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nightpress.evaluators.images import crop_flip, normalise


def numbered(count: int = 1, channels: int = 2, height: int = 5, width: int = 6) -> Tensor:
    """Images whose every pixel has its own number, from 1."""
    size = count * channels * height * width
    return torch.arange(1, size + 1).view(count, channels, height, width)


def views(image: Tensor, padding: int) -> list[Tensor]:
    """Every crop out of the padded image, and its mirror image."""
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
    height, width = image.shape[1:]
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return [torch.from_numpy(crop.copy()) for one in crops for crop in (one, one[:, :, ::-1])]


@given(st.integers(0, 3), st.integers(0, 2**31))
def test_each_image_becomes_a_crop_of_itself_or_its_mirror_image(padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    batch = numbered(4)

    made = crop_flip(padding)(batch)

    for before, after in zip(batch, made, strict=True):
        assert any(torch.equal(after, view) for view in views(before, padding))


def test_every_crop_and_both_directions_occur() -> None:
    torch.manual_seed(0)
    image = numbered()

    made = crop_flip(1)(image.expand(400, -1, -1, -1))

    assert len({tuple(view.flatten().tolist()) for view in made}) == len(views(image[0], 1)) == 18


def test_without_flips_no_image_is_mirrored() -> None:
    image = numbered()

    assert torch.equal(crop_flip(0, flip=False)(image), image)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_type_of_the_images_stays(dtype: torch.dtype) -> None:
    assert crop_flip()(torch.ones(3, 1, 8, 8, dtype=dtype)).dtype == dtype


def test_the_same_seed_gives_the_same_views() -> None:
    batch = numbered(8)
    torch.manual_seed(3)
    first = crop_flip()(batch)
    torch.manual_seed(3)

    assert torch.equal(crop_flip()(batch), first)
    assert not torch.equal(crop_flip()(batch), first)


def test_bytes_become_numbers_about_zero() -> None:
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)

    made = normalise((0.5, 0.2), (0.5, 0.1))(images)

    torch.testing.assert_close(made, torch.tensor([[[[-1.0, 1.0]], [[0.0, 2.0]]]]), atol=1e-5, rtol=1e-5)
