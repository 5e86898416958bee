"""What all trials of a process share: views, the teacher's answers, ways to compute."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nightpress.evaluators.compute import Compute, has_fast_bf16
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.quality import judge
from nightpress.evaluators.training import MAX_VIEWS, probe
from nightpress.spaces.policy import DISTILL_METHODS, Distill
from strategies import Counted, digits, digits_reader
from test_quality import policy, trainer_of

# What is computed once


def test_views_and_the_teachers_answers_are_made_once() -> None:
    calls: list[int] = []

    def augment(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return batch + torch.rand(1)

    teacher = Counted(digits_reader(seed=1))
    trainer = trainer_of(digits_reader(), digits(128), teacher=teacher, augment=augment)

    for _ in range(2):  # 128 items are two batches
        trainer.fit(digits_reader(), policy(Distill()), steps=2 * MAX_VIEWS, seed=0)

    assert sum(calls) == 128 * MAX_VIEWS
    assert teacher.items == 128 * MAX_VIEWS
    assert sorted(trainer.views) == sorted(trainer.answers) == list(range(MAX_VIEWS))
    assert len({float(view[0, 0, 0, 0]) for view in trainer.views.values()}) == MAX_VIEWS


def test_without_augmentation_there_is_one_view_and_it_is_the_data() -> None:
    teacher = Counted(digits_reader(seed=1))
    trainer = trainer_of(digits_reader(), digits(128), teacher=teacher)

    trainer.fit(digits_reader(), policy(Distill()), steps=10, seed=0)

    assert teacher.items == 128
    assert trainer.views == {}
    with torch.no_grad():
        torch.testing.assert_close(trainer.answers[0], teacher.inner(trainer.train.inputs))


def test_without_distillation_the_teacher_is_not_asked() -> None:
    teacher = Counted(digits_reader(seed=1))

    trainer_of(digits_reader(), digits(64), teacher=teacher).fit(digits_reader(), policy(), steps=4, seed=0)

    assert teacher.items == 0


def test_a_view_belongs_to_the_trainers_seed_and_takes_no_random_numbers_from_the_run() -> None:
    def augment(batch: Tensor) -> Tensor:
        return batch + torch.rand(len(batch), 1, 1, 1)

    def views(seed: int) -> dict[int, Tensor]:
        trainer = trainer_of(digits_reader(), digits(64), augment=augment)
        trainer.seed = seed
        trainer.fit(digits_reader(), policy(), steps=2, seed=0)
        return trainer.views

    torch.manual_seed(1)
    first = views(0)
    drawn = torch.rand(1)
    torch.manual_seed(1)

    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(first[number], view) for number, view in views(0).items())
    assert not torch.equal(first[0], views(1)[0])


def test_integer_inputs_are_trained_on_as_numbers() -> None:
    data = digits(64)
    bytes_of = Arrays((data.inputs * 255).to(torch.uint8), data.targets)

    losses = trainer_of(digits_reader(), bytes_of).fit(digits_reader(), policy(), steps=2, seed=0)

    assert all(math.isfinite(loss) for loss in losses)


def test_stored_bytes_are_normalised_in_training_and_in_judging() -> None:
    data, model = digits(128), digits_reader()
    bytes_of = Arrays((data.inputs * 16).to(torch.uint8), data.targets)
    stored = trainer_of(copy.deepcopy(model), bytes_of, normalise=lambda batch: batch.float() / 16)
    given = trainer_of(copy.deepcopy(model), data)

    for trainer in (stored, given):
        trainer.fit(trainer.task.model, policy(), steps=4, seed=0)

    assert all(
        torch.equal(given.task.model.state_dict()[name], value)
        for name, value in stored.task.model.state_dict().items()
    )
    scores = [judge(t.task.model, t.train, t.task, Compute()).accuracy for t in (stored, given)]
    assert scores[0] == scores[1]


class Answers(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


@pytest.mark.parametrize("method", DISTILL_METHODS)
def test_a_teacher_that_returns_a_tuple_teaches_the_tensor_that_the_task_picks(method: str) -> None:
    teacher, data = Answers(digits_reader(seed=1)), digits(128)
    trainer = trainer_of(Answers(digits_reader()), data, teacher=teacher, output=lambda returned: returned[0])
    plain = trainer_of(digits_reader(), data, teacher=teacher.inner)
    students = digits_reader(), digits_reader()

    for one, student in zip((trainer, plain), students, strict=True):
        one.fit(student, policy(Distill(method=method)), steps=3, seed=0)

    states = [student.state_dict() for student in students]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


# Compute


@pytest.mark.parametrize("make", [lambda: Compute(channels_last=True), lambda: Compute(bf16=True)])
def test_other_ways_to_compute_train_as_well(make: Callable[[], Compute]) -> None:
    model, data = digits_reader(), digits(256)
    trainer = trainer_of(model, data)
    trainer.compute = make()

    losses = trainer.fit(model, policy(learning_rate=0.1), steps=20, seed=0)

    assert losses[-1] < losses[0]


def test_the_probe_leaves_the_weights_as_they_were() -> None:
    model = digits_reader()
    before = copy.deepcopy(model.state_dict())

    best, step_ms = probe(trainer_of(model, digits(64), batch_size=16), model, policy(), rounds=1)

    ways = {"fp32", "fp32 channels_last", "bf16 channels_last"}
    assert set(step_ms) == ways - ({"bf16 channels_last"} if not has_fast_bf16("cpu") else set())
    assert all(0 < value < math.inf for value in step_ms.values())
    assert best.device == "cpu"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
