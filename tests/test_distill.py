"""What a student learns: each loss against its formula, which tensors are paired, and that nothing stays behind."""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.data import TensorDataset

from nightpress.evaluators.compute import Compute
from nightpress.evaluators.data import Arrays
from nightpress.evaluators.distill import Hints, attention_loss, attention_map, blended_loss, feature_loss, pair
from nightpress.evaluators.taps import MOST_TAPS, Tap, find_taps, tapped
from nightpress.evaluators.task import Task
from nightpress.evaluators.training import Trainer
from nightpress.search.prepare import teachable
from nightpress.spaces.errors import InputError
from nightpress.spaces.policy import DISTILL_METHODS, INT8, Distill, FineTune, Policy
from nightpress.spaces.space import uniform
from strategies import CLASSES, Counted, Tiny, images, seeded, space_of, tiny

INNER = [method for method in DISTILL_METHODS if Distill(method=method).inner]
SMALL = uniform(tiny().anatomy, width=0.5, bits=INT8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trainer_of(teacher: nn.Module | None = None, **options: object) -> Trainer:
    inputs = images(64)
    data = Arrays(inputs, torch.arange(64) % CLASSES)
    dataset = TensorDataset(data.inputs, data.targets)
    task = Task(name="t", model=seeded(Tiny), example_input=inputs[:1], train=dataset, test=dataset, teacher=teacher)
    return Trainer(
        task, data, Compute(), seed=0, batch_size=32,
        uncompressed=lambda: tiny().apply(Policy(model=tiny().anatomy.digest))[0], **options,  # type: ignore[arg-type]
    )  # fmt: skip


def policy(method: str, **distill: object) -> Policy:
    return replace(
        SMALL,
        distill=Distill(method=method, **distill),  # type: ignore[arg-type]
        finetune=FineTune(learning_rate=0.02),
    )


class Wide(nn.Module):
    """Another architecture with the same outputs, whose convolutions see 8×8 and ``side``×``side`` pixels."""

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.second = nn.Conv2d(40, 48, 1)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.pool(self.first(x))).mean((2, 3)))


# Losses


def test_feature_loss_is_the_squared_distance_over_the_teachers_square() -> None:
    ours, theirs = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)

    expected = ((ours.numpy() - theirs.numpy()) ** 2).mean() / (theirs.numpy() ** 2).mean()

    assert float(feature_loss(ours, theirs)) == pytest.approx(float(expected), rel=1e-5)


@given(st.floats(0.01, 100))
def test_feature_loss_does_not_depend_on_the_scale_of_the_network(scale: float) -> None:
    ours, theirs = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)

    assert float(feature_loss(scale * ours, scale * theirs)) == pytest.approx(
        float(feature_loss(ours, theirs)), rel=1e-3
    )


@pytest.mark.parametrize(("shape", "channels"), [((3, 4, 2, 5), 1), ((3, 7, 4), 2)])
def test_attention_loss_is_half_the_squared_distance_of_unit_maps(shape: tuple[int, ...], channels: int) -> None:
    def unit(value: Tensor) -> np.ndarray:
        energy = (value.numpy().astype(np.float64) ** 2).sum(axis=channels).reshape(len(value), -1)
        return energy / np.sqrt((energy**2).sum(axis=1, keepdims=True))

    ours, theirs = noise(*shape), noise(*shape, seed=1)

    expected = 0.5 * ((unit(ours) - unit(theirs)) ** 2).sum(axis=1).mean()

    assert float(attention_loss(ours, theirs)) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(attention_map(ours).numpy(), unit(ours), rtol=1e-5)


def test_attention_maps_of_different_widths_can_be_compared() -> None:
    assert 0 < float(attention_loss(noise(2, 3, 4, 4), noise(2, 9, 4, 4))) < 1


@pytest.mark.parametrize("loss", [feature_loss, attention_loss])
def test_equal_features_cost_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert float(loss(noise(2, 3, 4, 4), noise(2, 3, 4, 4))) == pytest.approx(0, abs=1e-7)


def test_logits_of_every_pixel_weigh_the_same_as_those_of_an_image() -> None:
    outputs, answers, targets = noise(2, 5), noise(2, 5, seed=1), torch.tensor([0, 3])
    whole = blended_loss(outputs, targets, answers, Distill(), 0.0, None)

    pixels = [value[:, :, None, None].expand(2, 5, 3, 3) for value in (outputs, answers)]

    found = blended_loss(pixels[0], targets[:, None, None].expand(2, 3, 3), pixels[1], Distill(), 0.0, None)
    assert float(found) == pytest.approx(float(whole), rel=1e-5)


# Taps


def test_of_each_resolution_the_last_tensor_of_the_graph_is_taken() -> None:
    module, _ = tiny().apply(SMALL)

    taps = find_taps(module, images(1))

    assert [tap.resolution for tap in taps] == [(8, 8), (4, 4)]
    with tapped(module, taps) as call:
        _, features = call(images(2))
    assert [tuple(value.shape[1:]) for value in features] == [tap.shape for tap in taps]
    # The output of the last block on 8×8 pixels is what the depthwise stage takes.
    taken: list[Tensor] = []
    hook = module.get_submodule("depthwise.0").register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    module(images(2))
    hook.remove()
    assert taken[0].shape == features[0].shape


def test_of_modules_the_outputs_are_taken_in_the_order_in_which_they_run() -> None:
    taps = find_taps(Wide(), images(1))

    assert [(tap.name, tap.shape) for tap in taps] == [("first", (40, 8, 8)), ("second", (48, 4, 4))]


def test_of_many_resolutions_the_last_ones_are_taken() -> None:
    pools = nn.Sequential(*(nn.AvgPool2d(2) for _ in range(7)), nn.Flatten(), nn.Linear(4, 2))

    assert [tap.resolution for tap in find_taps(pools, torch.zeros(1, 1, 256, 256))] == [
        (16, 16), (8, 8), (4, 4), (2, 2),
    ]  # fmt: skip
    assert MOST_TAPS == 4


def test_vectors_have_no_resolution() -> None:
    assert find_taps(nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2)), torch.zeros(1, 3, 2, 2)) == ()


def test_sequences_are_tapped_by_their_length() -> None:
    (tap,) = find_taps(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Flatten(), nn.Linear(40, 2)), torch.zeros(1, 5, 6))

    assert (tap.resolution, tap.channels) == ((5,), 8)


@pytest.mark.parametrize("make", [lambda: tiny().apply(SMALL)[0], Wide])
def test_open_taps_change_neither_outputs_nor_state(make: Callable[[], nn.Module]) -> None:
    module = make().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    taps = find_taps(module, images(1))

    assert module.training
    assert {n: v.shape for n, v in module.state_dict().items()} == {n: v.shape for n, v in before.items()}
    module.eval()
    expected = module(images(3))
    with tapped(module, taps) as call:
        output, _ = call(images(3))
        torch.testing.assert_close(output, expected)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(child._forward_hooks for child in module.modules())  # pyright: ignore[reportPrivateUsage]


# Pairs


def test_tensors_of_one_resolution_are_paired() -> None:
    student = (Tap(name="a", shape=(8, 8, 8)), Tap(name="b", shape=(8, 4, 4)))
    teacher = (Tap(name="x", shape=(9, 16, 16)), Tap(name="y", shape=(9, 4, 4)))

    pairs = pair(student, teacher)

    assert ([tap.name for tap in pairs.student], [tap.name for tap in pairs.teacher]) == (["b"], ["y"])


def test_without_a_common_resolution_the_last_images_are_paired_and_resized() -> None:
    student, teacher = Tap(name="a", shape=(8, 6, 6)), Tap(name="x", shape=(8, 4, 4))

    hints = Hints(pair([student], [teacher]), "attention")
    theirs = noise(2, 8, 4, 4)

    resized = nn.functional.adaptive_avg_pool2d(theirs, 6)
    assert float(hints([resized], [theirs])) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("teacher", "has"), [([], "none"), ([Tap(name="x", shape=(16, 32))], "16")])
def test_a_teacher_without_images_is_refused_with_a_sentence(teacher: list[Tap], has: str) -> None:
    with pytest.raises(InputError, match=rf"^space\.distill: .* student has 4×4 and the teacher {has}: offer logit"):
        pair([Tap(name="a", shape=(8, 4, 4))], teacher)


def test_sequences_of_a_teacher_are_images_as_those_of_a_compressed_network() -> None:
    teacher = nn.Sequential(nn.Conv1d(5, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    student = Tap(name="a", shape=(8, 1, 8))

    pairs = pair([student], find_taps(teacher, noise(1, 5, 8)))
    with tapped(teacher, pairs.teacher) as run:
        loss = Hints(pairs, "feature")((noise(2, 8, 1, 8),), run(noise(2, 5, 8))[1])

    assert [tap.name for tap in pairs.teacher] == ["0"]
    assert bool(loss.isfinite())


def test_regressors_are_there_only_where_features_of_other_widths_are_compared() -> None:
    student = (Tap(name="a", shape=(8, 8, 8)), Tap(name="b", shape=(5, 16)), Tap(name="c", shape=(8, 2, 2)))
    teacher = (Tap(name="x", shape=(9, 8, 8)), Tap(name="y", shape=(5, 24)), Tap(name="z", shape=(8, 2, 2)))

    regressors = list(Hints(pair(student, teacher), "feature").regressors)

    assert [type(regressor) for regressor in regressors] == [nn.Conv2d, nn.Linear, nn.Identity]
    assert list(Hints(pair(student, teacher), "attention").parameters()) == []


def test_a_space_offers_inner_tensors_only_where_there_are_some() -> None:
    inputs = torch.randn(4, 6)
    data = TensorDataset(inputs, torch.arange(4))
    flat = Task(name="t", model=nn.Linear(6, 4), example_input=inputs[:1], train=data, test=data)
    trainer = Trainer(flat, Arrays(*data.tensors), Compute(), seed=0)
    space = space_of(tiny().anatomy)

    assert teachable(trainer_of(), space) == (space, None)
    narrower, reason = teachable(trainer, space)
    assert narrower.distill == ("none", "logit")
    assert "student has none and the teacher none" in str(reason)
    with pytest.raises(InputError, match="student has none"):
        teachable(trainer, space_of(tiny().anatomy, distill=("feature",)))


# In the fine-tune


@pytest.mark.parametrize("method", INNER)
@pytest.mark.parametrize("teacher", [None, Wide], ids=["itself", "another architecture"])
def test_inner_distillation_leaves_a_state_dict_like_any_other(
    method: str, teacher: Callable[[], nn.Module] | None
) -> None:
    trainer = trainer_of(teacher() if teacher else None)
    module, _ = tiny().apply(SMALL)
    names = list(module.state_dict())

    losses = trainer.fit(module, policy(method), steps=4, seed=0)

    assert all(np.isfinite(losses))
    assert list(module.state_dict()) == names
    for network in (module, trainer.task.model, trainer.task.teacher or nn.Identity()):
        assert not any(child._forward_hooks for child in network.modules())  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("method", INNER)
def test_the_same_seed_gives_the_same_weights_with_inner_distillation(method: str) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        module, _ = tiny().apply(SMALL)
        trainer_of().fit(module, policy(method), steps=4, seed=seed)
        return module.state_dict()

    first = trained(1)

    assert all(torch.equal(first[name], value) for name, value in trained(1).items())
    assert not all(torch.equal(first[name], value) for name, value in trained(2).items())


@pytest.mark.parametrize("kind", ["feature", "attention"])
def test_inner_tensors_come_nearer_to_the_teachers(kind: str) -> None:
    trainer, start = trainer_of(), tiny().apply(replace(SMALL, bits={}))[0]
    given_to = policy(kind, feature_weight=3.0, alpha=0.0)

    def distance(module: fx.GraphModule) -> float:
        teacher, pairs = tiny().apply(Policy(model=tiny().anatomy.digest))[0], trainer.pairs(module)
        with torch.no_grad(), tapped(module.eval(), pairs.student) as ours, tapped(teacher, pairs.teacher) as theirs:
            maps = zip(ours(trainer.train.inputs)[1], theirs(trainer.train.inputs)[1], strict=True)
            return sum(float(attention_loss(one, other)) for one, other in maps)

    plain, taught = copy.deepcopy(start), copy.deepcopy(start)
    trainer.fit(plain, policy("none"), steps=40, seed=0)
    trainer.fit(taught, given_to, steps=40, seed=0)

    assert distance(taught) < distance(plain)


def test_a_teacher_that_shows_its_features_gives_its_logits_with_them() -> None:
    teacher = Counted(Wide())

    trainer_of(teacher).fit(tiny().apply(SMALL)[0], policy("logit+feature"), steps=4, seed=0)

    assert teacher.items == 4 * 32 + 1  # each batch once, and one image to see the shapes


def test_answers_that_would_take_too_much_memory_are_asked_for_in_each_step() -> None:
    teacher = Counted(Wide())
    trainer = trainer_of(teacher, answer_bytes=64)

    losses = trainer.fit(tiny().apply(SMALL)[0], policy("logit"), steps=4, seed=0)

    assert trainer.answers == {}
    assert all(np.isfinite(losses))


def test_many_trials_leave_nothing_in_memory() -> None:
    trainer = trainer_of()

    def trial(number: int) -> None:
        method = DISTILL_METHODS[number % len(DISTILL_METHODS)]
        module, _ = tiny().apply(SMALL)
        trainer.fit(module, replace(policy(method), sparsity={"head": 0.5}), steps=1, seed=number)

    def held() -> tuple[int, int]:
        gc.collect()
        kinds = (Tensor, nn.Module, fx.Graph)
        things = [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]  # lazy modules lie of theirs
        return len(things), sum(t.numel() for t in things if isinstance(t, Tensor))

    for number in range(6):
        trial(number)
    before = held()
    for number in range(24):
        trial(number)

    assert held() == before
