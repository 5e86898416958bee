"""Data sets held in memory: loaded once, split by label, cut into batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..spaces.errors import InputError

DEFAULT_LIMIT_BYTES = 4 * 1024**3


class MapDataset(Protocol):
    """A map-style data set: item ``i`` in ``range(len(dataset))`` is ``(input, target)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """A data set of ``n`` items in memory.

    Attributes:
        inputs: ``(n, ...)``, uint8 or integers as given, any other number as float32.
        targets: ``(n,)`` int64 labels, or ``(n, ...)`` int64 or float32 for other tasks.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Tensor) -> "Arrays":
        """The items at ``indices``, shape ``(k,)``, as a copy of ``k`` items."""
        return Arrays(self.inputs[indices], self.targets[indices])


def materialise(dataset: MapDataset, limit_bytes: int = DEFAULT_LIMIT_BYTES, name: str = "data set") -> Arrays:
    """Loads every item once and keeps them in memory.

    A ``TensorDataset`` is in memory already: its tensors are used as they are, without a copy.
    Random transforms inside any other data set are frozen by this at one draw an item; that is
    why random augmentation belongs into the task's ``augment``.

    Args:
        dataset: Items are ``(input, target)``; inputs are tensors of one shape.
        limit_bytes: The largest size that the inputs may take.
        name: How messages call the data set.

    Raises:
        InputError: The data set is empty, too large, or an item is not ``(input, target)`` or has another
            shape than the first.
    """
    if len(dataset) == 0:
        raise InputError(f"The {name} is empty, but at least one item is needed.")
    if isinstance(dataset, TensorDataset):
        return _from_tensors(dataset, name)
    first_input, first_target = item(dataset, 0, name)
    size_bytes = len(dataset) * _stored_inputs(first_input).nbytes
    if size_bytes > limit_bytes:
        raise InputError(
            f"The {name} must fit into {limit_bytes / 1e6:,.1f} MB of memory, but its {len(dataset)} inputs "
            f"of shape {tuple(first_input.shape)} take {size_bytes / 1e6:,.1f} MB: use fewer or smaller ones."
        )
    inputs = torch.empty((len(dataset), *first_input.shape), dtype=_stored_inputs(first_input).dtype)
    targets = torch.empty((len(dataset), *first_target.shape), dtype=first_target.dtype)
    for index in range(len(dataset)):
        one_input, one_target = item(dataset, index, name)
        if one_input.shape != first_input.shape or one_target.shape != first_target.shape:
            raise InputError(
                f"All items of the {name} must have the shapes of item 0, input {tuple(first_input.shape)} "
                f"and target {tuple(first_target.shape)}, but item {index} has {tuple(one_input.shape)} and "
                f"{tuple(one_target.shape)}."
            )
        inputs[index] = one_input
        targets[index] = one_target
    return Arrays(inputs, _stored_targets(targets))


def item(dataset: MapDataset, index: int, name: str = "data set") -> tuple[Tensor, Tensor]:
    """Item ``index`` as ``(input, target)`` tensors without a batch dimension.

    Raises:
        InputError: The item cannot be read, is not a pair, or its input is not a tensor.
    """
    try:
        pair: object = dataset[index]
    except Exception as error:  # the user's own code
        raise InputError(f"Item {index} of the {name} cannot be read: {last_line(error)}.") from error
    if not isinstance(pair, tuple | list) or len(cast("tuple[object, ...]", pair)) != 2:
        raise InputError(f"Item {index} of the {name} must be (input, target), but got {_kind(pair)}.")
    one_input, one_target = cast("tuple[object, object]", pair)
    if not isinstance(one_input, Tensor):
        raise InputError(
            f"The input of item {index} of the {name} must be a tensor, but got {_kind(one_input)}: "
            "convert it in the data set, for example with torchvision.transforms.ToTensor()."
        )
    try:
        return one_input, torch.as_tensor(one_target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The target of item {index} of the {name} must be a number or a tensor, but got {_kind(one_target)}."
        ) from error


def last_line(error: BaseException) -> str:
    """The exception's type and the last line of its text, without a full stop."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip().rstrip('.')}" if lines else type(error).__name__


def split_search(train: Arrays, fraction: float = 0.2, max_items: int = 5000, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Carves the search split out of the training data.

    Where targets are ``(n,)`` integers every label keeps its share in both parts, and no label
    loses its last training item. The same arguments give the same split, shuffled the same way.

    Args:
        train: All training items.
        fraction: The search part's share, in (0, 1).
        max_items: The search part's largest number of items.
        seed: Chooses which items.

    Returns:
        The remaining training items and the search items; neither is empty.

    Raises:
        InputError: The fraction is not in (0, 1), or one of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"The search split's fraction must be in (0, 1), but got {fraction}.")
    total = len(train)
    size = min(max(round(total * fraction), 1), max_items, total - 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    chosen = torch.zeros(total, dtype=torch.bool)
    if size > 0:
        for part, quota in _quotas(train.targets[order], size):
            chosen[order[part[:quota]]] = True
    if not bool(chosen.any()):
        raise InputError(
            f"A search split needs a training set with two items of one label, and at least one item to "
            f"take, but got {total} items and {max_items=}."
        )
    # Shuffled, because data sets come sorted by label and the first items of a part stand for the whole of it.
    return train.take(order[~chosen[order]]), train.take(order[chosen[order]])


def batches(
    arrays: Arrays, batch_size: int, generator: torch.Generator | None = None, shuffle: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts a data set into ``ceil(n / batch_size)`` batches ``(inputs, targets)``.

    Their lengths differ by one at most: a last batch of one item would break batch norm in training.
    Batches that are not shuffled are views.
    """
    count = max(-(-len(arrays) // batch_size), 1)
    if not shuffle:
        yield from zip(arrays.inputs.tensor_split(count), arrays.targets.tensor_split(count), strict=True)
        return
    for indices in torch.randperm(len(arrays), generator=generator).tensor_split(count):
        yield arrays.inputs[indices], arrays.targets[indices]


def _quotas(targets: Tensor, size: int) -> list[tuple[Tensor, int]]:
    """Positions of each label and how many of them to take, ``size`` in all (largest remainders)."""
    if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex():
        return [(torch.arange(len(targets)), size)]
    positions = [(targets == label).nonzero().flatten() for label in targets.unique()]
    shares = [size * len(part) / len(targets) for part in positions]
    quotas = [min(int(share), len(part) - 1) for share, part in zip(shares, positions, strict=True)]
    by_remainder = sorted(range(len(shares)), key=lambda label: quotas[label] - shares[label])
    while sum(quotas) < size:
        open_labels = [label for label in by_remainder if quotas[label] < len(positions[label]) - 1]
        if not open_labels:
            break
        for label in open_labels[: size - sum(quotas)]:
            quotas[label] += 1
    return list(zip(positions, quotas, strict=True))


def _from_tensors(dataset: TensorDataset, name: str) -> Arrays:
    if len(dataset.tensors) != 2:
        raise InputError(
            f"Items of the {name} must be (input, target), but got a TensorDataset of {len(dataset.tensors)} tensors."
        )
    inputs, targets = dataset.tensors
    return Arrays(_stored_inputs(inputs), _stored_targets(targets))


def _stored_inputs(inputs: Tensor) -> Tensor:
    return inputs.float() if inputs.is_floating_point() else inputs


def _stored_targets(targets: Tensor) -> Tensor:
    """Integers as int64, which cross entropy asks for, and real numbers as float32."""
    if targets.is_floating_point():
        return targets.float()
    narrow = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return targets.long() if targets.dtype in narrow else targets


def _kind(value: object) -> str:
    """What a value is, short enough for a sentence."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(cast('tuple[object, ...]', value))} values"
    return f"a value of type {type(value).__name__}"
