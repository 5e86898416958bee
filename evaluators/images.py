"""Ready parts of a task on images: augmentation of whole batches, and numbers from bytes."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_flip(padding: int = 4, *, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """A ``Task.augment``: each image cut at random out of its zero-padded self, every second one mirrored.

    Takes batches of shape (n, channels, height, width), bytes or floats, on any device. One indexed copy makes
    the whole batch, so bytes are quicker than floats.
    """

    def augment(images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        padded = F.pad(images, (padding,) * 4).flatten(2)
        rows = torch.arange(height) + torch.randint(0, 2 * padding + 1, (count, 1))
        columns = torch.arange(width).expand(count, width)
        if flip:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        columns = columns + torch.randint(0, 2 * padding + 1, (count, 1))
        places = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
        places = places.to(images.device).view(count, 1, -1).expand(-1, channels, -1)
        return padded.gather(2, places).view(images.shape)

    return augment


def normalise(mean: Sequence[float], std: Sequence[float], largest: float = 255.0) -> Callable[[Tensor], Tensor]:
    """A ``Task.normalise``: (x / largest − mean) / std for each channel of a batch (n, channels, height, width)."""
    scale = 1 / (largest * torch.tensor(std))
    shift = -torch.tensor(mean) / torch.tensor(std)

    def apply(images: Tensor) -> Tensor:
        factor, offset = (value.to(images.device).view(1, -1, 1, 1) for value in (scale, shift))
        return torch.addcmul(offset, images.float(), factor)

    return apply
