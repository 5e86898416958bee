"""Training and judging: the loss, the fine-tune, batch-norm statistics, what is computed once."""

import base64
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.data import TensorDataset

from nightpress.evaluators.compute import Compute
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.distill import blended_loss, temperature_at
from nightpress.evaluators.quality import MOST_ITEMS, DivergedError, answers, judge, outputs_of, score
from nightpress.evaluators.quantise import quantisers
from nightpress.evaluators.task import Task
from nightpress.evaluators.training import Trainer, bypassed
from nightpress.spaces.policy import INT8, SCHEDULES, Distill, FineTune, Policy
from nightpress.spaces.space import uniform
from strategies import CLASSES, digits, digits_reader, images, task_of, tiny

HARD = Distill(method="none")


def trainer_of(model: nn.Module, data: Arrays, batch_size: int = 64, **extras: object) -> Trainer:
    dataset = TensorDataset(data.inputs, data.targets)
    task = Task(
        name="toy", model=model, example_input=data.inputs[:1].float(), train=dataset, test=dataset, **extras  # type: ignore[arg-type]
    )  # fmt: skip
    return Trainer(task, data, Compute(), seed=0, batch_size=batch_size)


def policy(distill: Distill = HARD, learning_rate: float = 0.05) -> Policy:
    return Policy(model="m", distill=distill, finetune=FineTune(learning_rate=learning_rate))


# The loss


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("constant", 0.0, 6.0),
        ("constant", 0.99, 6.0),
        ("halving", 0.0, 6.0),
        ("halving", 0.2499, 6.0),
        ("halving", 0.25, 3.0),
        ("halving", 0.5, 1.5),
        ("halving", 0.75, 1.0),  # 0.75, but never below 1
        ("linear", 0.0, 6.0),
        ("linear", 0.5, 3.75),
        ("linear", 1.0, 1.5),
    ],
)
def test_the_temperature_follows_its_schedule(schedule: str, done: float, expected: float) -> None:
    assert temperature_at(Distill(temperature=6.0, schedule=schedule), done) == pytest.approx(expected)


@given(st.sampled_from(SCHEDULES), st.floats(1, 100), st.floats(0, 1), st.floats(0, 1))
def test_the_temperature_never_rises_and_never_leaves_its_bounds(
    schedule: str, temperature: float, one: float, other: float
) -> None:
    early, late = (temperature_at(Distill(temperature=temperature, schedule=schedule), t) for t in sorted((one, other)))

    assert 1 - 1e-9 <= late <= early + 1e-9
    assert early <= temperature * (1 + 1e-9)


def test_the_blended_loss_is_its_formula() -> None:
    student = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 0.25]])
    teacher = np.array([[0.0, 3.0, 0.0], [1.0, -1.0, 0.0]])
    targets = np.array([1, 2])
    alpha, temperature = 0.7, 4.0

    def softmax(logits: np.ndarray, t: float) -> np.ndarray:
        powers = np.exp(logits / t)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = softmax(teacher, temperature), softmax(student, temperature)
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    hard = -np.log(softmax(student, 1.0)[[0, 1], targets]).mean()

    loss = blended_loss(
        torch.from_numpy(student), torch.from_numpy(targets), torch.from_numpy(teacher),
        Distill(alpha=alpha, temperature=temperature), 0.5, None,
    )  # fmt: skip

    assert float(loss) == pytest.approx(alpha * temperature**2 * divergence + (1 - alpha) * hard, rel=1e-6)


def test_the_temperature_of_the_moment_is_used() -> None:
    outputs, answers, targets = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    moving = Distill(alpha=1.0, temperature=6.0, schedule="halving")

    late = blended_loss(outputs, targets, answers, moving, 0.5, None)

    torch.testing.assert_close(
        late, blended_loss(outputs, targets, answers, Distill(alpha=1.0, temperature=1.5), 0.0, None)
    )


def test_a_student_that_answers_as_the_teacher_has_no_soft_loss() -> None:
    outputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])

    assert float(blended_loss(outputs, targets, outputs.clone(), Distill(alpha=1.0), 0.0, None)) == pytest.approx(0)


@pytest.mark.parametrize(("answers", "distill"), [(None, Distill()), (torch.zeros(2, 2), HARD)])
def test_without_a_teacher_or_a_method_the_loss_is_the_tasks_own(answers: Tensor | None, distill: Distill) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().sum()

    assert blended_loss(torch.ones(2, 2), torch.zeros(2, 2), answers, distill, 0.0, loss) == 4


# The fine-tune


def test_a_fine_tune_lowers_the_loss_and_raises_the_accuracy() -> None:
    data, model = digits(), digits_reader()
    trainer = trainer_of(model, data)
    before = judge(model, data, trainer.task, trainer.compute)

    losses = trainer.fit(model, policy(learning_rate=0.1), steps=60, seed=0)

    after = judge(model, data, trainer.task, trainer.compute)
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    assert before.accuracy < 0.3
    assert after.accuracy > 0.85


@pytest.mark.slow
def test_distillation_alone_teaches_the_teachers_answers() -> None:
    data, teacher, student = digits(), digits_reader(), digits_reader(seed=1)
    trainer_of(teacher, data).fit(teacher, policy(learning_rate=0.1), steps=60, seed=0)
    unlabelled = Arrays(data.inputs, torch.zeros_like(data.targets))
    trainer = trainer_of(student, unlabelled, teacher=teacher)

    trainer.fit(student, policy(Distill(alpha=1.0), learning_rate=0.1), steps=60, seed=0)

    assert judge(student, data, trainer.task, trainer.compute).accuracy > 0.8


def quantised(width: float = 1.0) -> fx.GraphModule:
    """The tiny network in INT8, its ranges not yet known."""
    return tiny().apply(uniform(tiny().anatomy, width=width, bits=INT8))[0]


def tiny_trainer(inputs: Tensor, compute: Compute | None = None) -> Trainer:
    data = Arrays(inputs, torch.arange(len(inputs)) % CLASSES)
    return Trainer(task_of(tiny().whole(), inputs), data, compute or Compute(), seed=0)


@pytest.mark.parametrize("simulate", [True, False])
@pytest.mark.parametrize("compute", [Compute(), Compute(bf16=True, channels_last=True)])
def test_a_quantised_network_trains_too(simulate: bool, compute: Compute) -> None:
    module, trainer = quantised(width=0.75), tiny_trainer(images(64), compute)
    trainer.reestimate(module)

    losses = trainer.fit(module, policy(learning_rate=0.05), steps=20, seed=0, simulate=simulate)

    assert losses[-1] < losses[0]


@pytest.mark.parametrize("simulate", [True, False])
def test_ranges_are_known_and_used_after_a_fine_tune(simulate: bool) -> None:
    module, trainer = quantised(), tiny_trainer(images(64))

    trainer.fit(module, policy(), steps=3, seed=0, simulate=simulate)

    assert all(float(site.high - site.low) > 0 for site in quantisers(module).values())
    assert not any(site.bypassed or site.observing for site in quantisers(module).values())
    with bypassed(quantisers(module).values()):
        unquantised = outputs_of(module, trainer.train, trainer.task, trainer.compute)
    assert not torch.equal(outputs_of(module, trainer.train, trainer.task, trainer.compute), unquantised)


def test_without_simulation_ranges_are_those_of_the_trained_weights() -> None:
    module, trainer = quantised(), tiny_trainer(images(64))
    trainer.fit(module, policy(), steps=3, seed=0, simulate=False)
    found = {name: value.clone() for name, value in module.state_dict().items()}

    trainer.observe(module)

    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())


def test_judging_does_not_move_the_ranges() -> None:
    module, trainer = quantised(), tiny_trainer(images(64))
    trainer.reestimate(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}

    judge(module, Arrays(10 * images(64), trainer.train.targets), trainer.task, trainer.compute)

    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("distill", [HARD, Distill()])
def test_the_same_seed_gives_the_same_weights(distill: Distill) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        model = digits_reader()
        trainer_of(model, digits(128), teacher=digits_reader(seed=1)).fit(model, policy(distill), steps=5, seed=seed)
        return model.state_dict()

    first, second, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_frozen_parameters_are_not_trained() -> None:
    model = digits_reader()
    before = copy.deepcopy(model.state_dict())
    model.get_parameter("0.weight").requires_grad_(False)

    trainer_of(model, digits(128)).fit(model, policy(), steps=3, seed=0)

    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert not torch.equal(model.state_dict()["5.weight"], before["5.weight"])


@pytest.mark.parametrize("steps", [1, 3, 10, 23])
def test_progress_ends_at_one_and_never_falls(steps: int) -> None:
    seen: list[float] = []

    losses = trainer_of(digits_reader(), digits(64)).fit(
        digits_reader(), policy(), steps=steps, seed=0, progress=seen.append
    )

    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(losses) == len(seen) <= 10


def test_a_batch_is_at_most_all_of_the_data() -> None:
    assert len(trainer_of(digits_reader(), digits(10)).fit(digits_reader(), policy(), steps=3, seed=0)) == 3


# Divergence


def test_inputs_that_are_not_finite_end_the_fine_tune() -> None:
    data = digits(64)
    data.inputs[0] = math.inf

    with pytest.raises(DivergedError, match=r"^the training loss became nan by step 1 of 10$"):
        trainer_of(digits_reader(), data).fit(digits_reader(), policy(), steps=10, seed=0)


def explosive() -> nn.Module:
    """Nothing in it keeps activations small."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def test_a_huge_learning_rate_ends_the_fine_tune() -> None:
    with pytest.raises(DivergedError, match=r"^the training loss became (nan|inf) by step \d+ of 100$"):
        trainer_of(digits_reader(), digits(64)).fit(explosive(), policy(learning_rate=1e15), steps=100, seed=0)


@pytest.mark.parametrize("simulate", [True, False])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_quantised_network_diverges_with_the_same_error(bad: float, simulate: bool) -> None:
    inputs = images(64)
    inputs[3] = bad

    with pytest.raises(DivergedError, match=r"^the training loss became nan by step "):
        tiny_trainer(inputs).fit(quantised(), policy(), steps=4, seed=0, simulate=simulate)


def test_what_is_not_finite_is_no_accuracy() -> None:
    data = digits(4)
    broken = torch.full((4, 10), math.nan)

    with pytest.raises(DivergedError, match=r"^the network's outputs are not finite$"):
        score(broken, data, trainer_of(digits_reader(), data).task)
    with pytest.raises(DivergedError, match=r"^the task's metric is nan$"):
        score(torch.zeros(4, 10), data, trainer_of(digits_reader(), data, metric=lambda *_: math.nan).task)


# Judging


def test_accuracy_comes_with_its_binomial_error() -> None:
    data = Arrays(torch.zeros(8, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    outputs = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 0, 0])]

    found = score(outputs, data, trainer_of(digits_reader(), data).task)

    assert found.accuracy == 0.75
    assert found.accuracy_se == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    assert found.samples == 8


def test_which_items_were_answered_rightly_is_kept_in_a_bit_each() -> None:
    data = Arrays(torch.zeros(9, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3]))
    outputs = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 0, 0, 3])]
    kept = answers(outputs, data, trainer_of(digits_reader(), data).task)
    assert base64.b64decode(kept or "") == bytes([0b11111100, 0b10000000])


def test_no_answers_are_kept_where_an_item_has_not_one_that_is_right_or_wrong() -> None:
    data = digits(4)
    task = trainer_of(digits_reader(), data).task
    own = trainer_of(digits_reader(), data, metric=lambda *_: 0.5).task
    assert answers(torch.zeros(4, 10), data, own) is None
    assert answers(torch.zeros(4, 10, 3), Arrays(data.inputs, torch.zeros(4, 3, dtype=torch.long)), task) is None
    many = torch.zeros(MOST_ITEMS + 1, dtype=torch.long)
    assert answers(torch.zeros(len(many), 2), Arrays(many, many), task) is None
    assert answers(torch.zeros(MOST_ITEMS, 2), Arrays(many[1:], many[1:]), task) is not None


def test_a_metric_above_one_is_refused() -> None:
    task = trainer_of(digits_reader(), digits(4), metric=lambda *_: 31.25).task
    with pytest.raises(ValueError, match=r"^the task's metric must be at most 1, but it is 31\.25$"):
        score(torch.zeros(4, 10), digits(4), task)


def test_the_error_of_a_custom_metric_is_unknown() -> None:
    data = digits(16)
    task = trainer_of(digits_reader(), data, metric=lambda outputs, targets: outputs.shape[1] / 20).task

    found = judge(digits_reader(), data, task, Compute())

    assert (found.accuracy, found.accuracy_se, found.samples) == (0.5, None, 16)
    assert found.seconds > 0


def test_a_custom_metric_sees_the_whole_split_at_once() -> None:
    seen: list[tuple[int, ...]] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        seen.append((*outputs.shape, *targets.shape))
        return 0.0

    data = digits(300)
    judge(digits_reader(), data, trainer_of(digits_reader(), data, metric=metric).task, Compute())

    assert seen == [(300, 10, 300)]


def test_outputs_do_not_depend_on_batches_or_on_training_mode() -> None:
    data, model = digits(300), digits_reader()
    with torch.no_grad():
        expected = model(data.inputs)

    torch.testing.assert_close(outputs_of(model.train(), data, trainer_of(model, data).task, Compute()), expected)


# Batch norms and ranges


class Seen(nn.Module):
    """A batch norm right on the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, momentum=0.3)
        self.flat = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.norm(x))


def test_reestimation_sets_the_statistics_of_the_training_data() -> None:
    inputs = 3 * images(128, channels=2) + 5
    module = Seen()
    module.norm.running_mean = torch.full((2,), 99.0)
    weights = [value.clone() for value in module.parameters()]

    trainer_of(module, Arrays(inputs, torch.zeros(128).long())).reestimate(module)

    # Batches of 128: one, so that the average over batches is that of all items.
    mean, var = module.norm.running_mean, module.norm.running_var
    assert mean is not None
    assert var is not None
    torch.testing.assert_close(mean, inputs.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(var, inputs.var(dim=(0, 2, 3)))
    assert module.norm.momentum == 0.3
    assert all(torch.equal(old, new) for old, new in zip(weights, module.parameters(), strict=True))
    assert not any(child.training for child in module.modules())


def test_reestimation_twice_is_reestimation_once() -> None:
    module, trainer = quantised(), tiny_trainer(images(300))

    trainer.reestimate(module)
    first = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.reestimate(module)

    assert all(torch.equal(first[name], value) for name, value in module.state_dict().items())


def test_reestimation_sets_the_ranges_of_quantisers() -> None:
    module, planned = tiny().apply(uniform(tiny().anatomy, width=1, bits=INT8))
    inputs = images(100)

    tiny_trainer(inputs).reestimate(module)

    sites = quantisers(module)
    assert set(sites) == set(planned.quantised.values())
    source = next(op.op.name for op in planned.ops if op.op.kind == "input")
    assert float(sites[source].low) == pytest.approx(float(inputs.min()))
    assert float(sites[source].high) == pytest.approx(float(inputs.max()))
    for name, site in sites.items():
        scale, zero_point = site.grid()
        assert scale > 0, name
        assert 0 <= int(zero_point) <= 255
        assert site.low <= 0 <= site.high
        assert not site.observing
