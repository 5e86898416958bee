"""Data in memory: loading, splitting by label, cutting into batches."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from nightpress.evaluators.data import Arrays, MapDataset, batches, materialise, split_search
from nightpress.spaces.errors import InputError


def labelled(*counts: int) -> Arrays:
    """``counts[label]`` items of each label; an item's only feature is its own index."""
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return Arrays(torch.arange(len(targets)).float().unsqueeze(1), targets)


def ids(arrays: Arrays) -> list[int]:
    return [int(value) for value in arrays.inputs.flatten()]


class Broken:
    """A data set whose file of item 2 is gone."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 2:
            raise OSError("no such image\ncat.png")
        return torch.zeros(2), 0


def test_a_tensor_dataset_is_used_without_a_copy() -> None:
    inputs = torch.zeros(3, 2)

    arrays = materialise(TensorDataset(inputs, torch.tensor([0, 1, 2])))

    assert arrays.inputs.data_ptr() == inputs.data_ptr()
    assert arrays.targets.tolist() == [0, 1, 2]


def test_items_are_read_one_by_one() -> None:
    dataset = [(torch.full((1, 2), float(i)), i) for i in range(4)]

    arrays = materialise(dataset)

    assert arrays.inputs.shape == (4, 1, 2)
    assert arrays.inputs[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert arrays.targets.tolist() == [0, 1, 2, 3]
    assert arrays.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.uint8, torch.uint8), (torch.float64, torch.float32), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("tensors", [True, False])
def test_inputs_are_kept_as_uint8_or_float32(given: torch.dtype, kept: torch.dtype, tensors: bool) -> None:
    inputs, targets = torch.ones(2, 3, dtype=given), torch.tensor([0, 1], dtype=torch.int32)
    items = list(zip(inputs, targets, strict=True))
    dataset: MapDataset = TensorDataset(inputs, targets) if tensors else items

    arrays = materialise(dataset)

    assert (arrays.inputs.dtype, arrays.targets.dtype) == (kept, torch.int64)


def test_targets_of_other_tasks_keep_their_shape() -> None:
    arrays = materialise([(torch.zeros(2), torch.ones(3, dtype=torch.float64)) for _ in range(5)])

    assert arrays.targets.shape == (5, 3)
    assert arrays.targets.dtype == torch.float32


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "The data set is empty"),
        (
            [torch.zeros(2)],
            r"Item 0 .* must be \(input, target\), but got a value of type Tensor",
        ),
        ([(torch.zeros(2), 0, 1)], r"must be \(input, target\), but got a tuple of 3 values"),
        (TensorDataset(torch.zeros(2, 2)), "but got a TensorDataset of 1 tensors"),
        ([("image", 0)], "The input of item 0 of the data set must be a tensor, but got a value of type str"),
        ([(torch.zeros(2), "cat")], "The target of item 0 of the data set must be a number or a tensor"),
        (
            [(torch.zeros(2), 0), (torch.zeros(3), 0)],
            r"item 0, input \(2,\) and target \(\), but item 1 has \(3,\) and \(\)",
        ),
        (Broken(), r"Item 2 of the data set cannot be read: OSError: cat\.png\.$"),
    ],
)
def test_what_cannot_be_loaded_is_named(dataset: MapDataset, message: str) -> None:
    with pytest.raises(InputError, match=message):
        materialise(dataset)


def test_a_dataset_beyond_the_memory_limit_is_refused_before_it_is_read() -> None:
    dataset = [(torch.zeros(1000), 0) for _ in range(10)]

    with pytest.raises(InputError, match=r"must fit into 0\.0 MB .* but its 10 inputs .* take 0\.0 MB"):
        materialise(dataset, limit_bytes=39_999)
    assert len(materialise(dataset, limit_bytes=40_000)) == 10


def test_the_split_keeps_each_labels_share() -> None:
    train, search = split_search(labelled(100, 50, 10), fraction=0.2)

    assert search.targets.bincount().tolist() == [20, 10, 2]
    assert train.targets.bincount().tolist() == [80, 40, 8]


def test_the_parts_are_disjoint_and_complete() -> None:
    train, search = split_search(labelled(7, 13), fraction=0.3)

    assert sorted(ids(train) + ids(search)) == list(range(20))
    assert len(search) == 6


def test_the_first_items_of_each_part_stand_for_all_labels_of_sorted_data() -> None:
    for part in split_search(labelled(100, 100, 100, 100), fraction=0.3):
        assert set(part.targets[:40].tolist()) == {0, 1, 2, 3}


def test_the_split_is_decided_by_its_seed() -> None:
    arrays = labelled(50, 50)

    assert ids(split_search(arrays, seed=3)[1]) == ids(split_search(arrays, seed=3)[1])
    assert ids(split_search(arrays, seed=3)[1]) != ids(split_search(arrays, seed=4)[1])


def test_the_search_part_is_bounded() -> None:
    _, search = split_search(labelled(300, 100), fraction=0.5, max_items=8)

    assert search.targets.bincount().tolist() == [6, 2]


def test_no_label_loses_its_last_training_item() -> None:
    train, search = split_search(labelled(1, 1, 2), fraction=0.9)

    assert train.targets.tolist() == [0, 1, 2]
    assert search.targets.tolist() == [2]


def test_targets_that_are_no_labels_are_split_at_random() -> None:
    arrays = dataclasses.replace(labelled(10), targets=torch.linspace(0, 1, 10))

    train, search = split_search(arrays, fraction=0.3)

    assert (len(train), len(search)) == (7, 3)


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1)])
def test_a_training_set_that_cannot_be_split_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"two items of one label.* but got {len(counts)} items"):
        split_search(labelled(*counts))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_the_open_interval_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match=rf"fraction must be in \(0, 1\), but got {fraction}"):
        split_search(labelled(10), fraction=fraction)


def test_batches_in_order() -> None:
    cut = list(batches(labelled(5), 2))

    assert [inputs.flatten().tolist() for inputs, _ in cut] == [[0, 1], [2, 3], [4]]


def test_no_training_batch_is_left_with_one_item() -> None:
    """65 = 33 + 32, not 64 + 1: batch norm cannot train on one value a channel."""
    cut = list(batches(labelled(65), 64, torch.Generator().manual_seed(0), shuffle=True))

    assert [len(targets) for _, targets in cut] == [33, 32]


def test_shuffled_batches_hold_every_item_once_and_follow_the_generator() -> None:
    def order(seed: int) -> list[float]:
        cut = batches(labelled(20), 8, torch.Generator().manual_seed(seed), shuffle=True)
        return [value for inputs, _ in cut for value in inputs.flatten().tolist()]

    assert sorted(order(0)) == list(range(20))
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_inputs_and_targets_stay_together() -> None:
    arrays = labelled(3, 3, 3)

    for inputs, targets in batches(arrays, 4, torch.Generator().manual_seed(0), shuffle=True):
        assert targets.tolist() == [int(value) // 3 for value in inputs.flatten()]
