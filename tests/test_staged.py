"""Staged pruning of a real network: what is gone stays gone, what training made decides what goes next."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import fx
from torch.utils.data import TensorDataset

from nightpress.evaluators.apply import Compressor
from nightpress.evaluators.compute import Compute
from nightpress.evaluators.evaluate import Evaluator, Job, Recipe, checkpoint
from nightpress.evaluators.staged import cut_further
from nightpress.evaluators.task import Task
from nightpress.spaces.policy import INT8, Distill, FineTune, Policy
from strategies import CLASSES, Tiny, compressor_of, images, seeded, task_of, tiny

PLAIN = Policy(model=tiny().anatomy.digest, distill=Distill(method="none"))
LIGHT = replace(PLAIN, prune={"one.conv1": 0.3, "widen.0": 0.25})
HARSH = replace(PLAIN, prune={"one.conv1": 0.6, "widen.0": 0.5, "hidden": 0.5})


def fresh() -> Compressor:
    """Its channel orders are its own."""
    return replace(tiny(), orders={})


def weight(module: fx.GraphModule, layer: str) -> torch.Tensor:
    value = module.get_submodule(layer).weight
    assert isinstance(value, torch.Tensor)
    return value.detach()


def rows(value: torch.Tensor) -> list[torch.Tensor]:
    return list(value.flatten(1))


def contains(many: list[torch.Tensor], one: torch.Tensor) -> bool:
    return any(torch.equal(one, other) for other in many)


def test_cutting_further_has_the_shapes_of_the_policy_and_keeps_trained_weights() -> None:
    compressor = fresh()
    module, _ = compressor.apply(LIGHT)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)

    _, further, _ = cut_further(compressor, module, LIGHT, HARSH)

    direct, _ = compressor.apply(HARSH)
    assert {n: v.shape for n, v in further.state_dict().items()} == {n: v.shape for n, v in direct.state_dict().items()}
    before = rows(weight(module, "one.conv1")[:, :, 0, 0])
    assert all(contains(before, row) for row in rows(weight(further, "one.conv1")[:, :, 0, 0]))
    torch.testing.assert_close(module(images(4)).shape, further(images(4)).shape)


def test_cutting_to_the_same_policy_changes_nothing() -> None:
    compressor = fresh()
    module, _ = compressor.apply(LIGHT)

    _, same, _ = cut_further(compressor, module, LIGHT, LIGHT)

    assert all(torch.equal(value, same.state_dict()[name]) for name, value in module.state_dict().items())


def test_the_next_stage_is_ranked_on_the_trained_weights() -> None:
    compressor = fresh()
    module, _ = compressor.apply(LIGHT)
    kept = weight(module, "one.conv1").clone()
    weak = int(torch.linalg.vector_norm(kept.flatten(1), dim=1).argmax())  # the strongest becomes the weakest
    with torch.no_grad():
        module.get_parameter("one.conv1.weight")[weak] *= 1e-3
        module.get_parameter("one.bn1.weight")[weak] *= 1e-3
        module.get_parameter("one.conv2.weight")[:, weak] *= 1e-3

    _, further, _ = cut_further(compressor, module, LIGHT, HARSH)

    stem = {float(row.sum()) for row in rows(weight(compressor.apply(HARSH)[0], "one.conv1"))}
    gone = weight(module, "one.conv1")[weak]
    assert float(kept[weak].sum()) in stem  # one shot would have kept it
    assert not contains(rows(weight(further, "one.conv1")), gone.flatten())


def test_blocks_that_are_removed_stay_removed_and_bits_come_with_the_last_stage() -> None:
    block = tiny().anatomy.blocks[0].name
    before = replace(LIGHT, removed_blocks=(block,), bits={"head": INT8})
    compressor = fresh()
    module, _ = compressor.apply(before)

    _, further, plan = cut_further(compressor, module, before, replace(before, prune=HARSH.prune))

    assert not [name for name in further.state_dict() if name.startswith(f"{block}.")]
    assert plan.quantised
    assert set(further.state_dict()) == set(module.state_dict())


@pytest.mark.parametrize("importance", ["l1", "bn"])
def test_a_chain_of_stages_only_ever_loses_channels(importance: str) -> None:
    policies = [
        replace(PLAIN, prune={"one.conv1": ratio}, importance=importance) for ratio in (1 / 6, 1 / 3, 1 / 2, 2 / 3)
    ]
    compressor = fresh()
    module, _ = compressor.apply(policies[0])
    for before, after in pairwise(policies):
        earlier = rows(weight(module, "one.conv1"))
        compressor, module, _ = cut_further(compressor, module, before, after)
        assert all(contains(earlier, row) for row in rows(weight(module, "one.conv1")))
        assert len(rows(weight(module, "one.conv1"))) < len(earlier)


# The fine-tune


def evaluator() -> Evaluator:
    inputs = images(96)
    data = TensorDataset(inputs, torch.arange(96) % CLASSES)
    task = Task(name="toy", model=seeded(Tiny), example_input=inputs[:1], train=data, test=data)
    anatomy = compressor_of(task_of(seeded(Tiny))).anatomy
    recipe = Recipe(task="toy", base=None, anatomy=anatomy, seed=0, compute=Compute(), batch_size=16, threads=1)
    return Evaluator(recipe, task)


def test_a_staged_fine_tune_ends_at_the_policy_and_its_checkpoint_loads(tmp_path: Path) -> None:
    judge = evaluator()
    policy = replace(HARSH, prune={"one.conv1": 0.7, "two.conv1": 0.5}, finetune=FineTune(stages=4),
                     sparsity={"head": 0.5}, bits={"widen.0": INT8})  # fmt: skip
    told: list[float] = []

    judge(Job(policy=policy, rung="short", seed=0, steps=8, folder=tmp_path), told.append)

    module, _ = judge.load(policy, checkpoint(tmp_path, "short"))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert int((weight(module, "head") == 0).sum()) == weight(module, "head").numel() // 2


def test_stages_share_the_steps_and_go_on_from_each_other(tmp_path: Path) -> None:
    judge = evaluator()
    staged = replace(HARSH, prune={"one.conv1": 0.7}, finetune=FineTune(learning_rate=0.05, stages=3))
    at_once = replace(staged, finetune=FineTune(learning_rate=0.05))
    found = [
        judge.train(Job(policy=policy, rung="short", seed=0, steps=9, folder=tmp_path / str(number)))
        for number, policy in enumerate((staged, staged, at_once))
    ]

    states = [module.state_dict() for module, _, _ in found]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not torch.equal(states[0]["stem.0.weight"], states[2]["stem.0.weight"])
    assert {n: v.shape for n, v in states[0].items()} == {n: v.shape for n, v in states[2].items()}


def test_the_long_fine_tune_goes_on_where_the_staged_one_ended(tmp_path: Path) -> None:
    judge = evaluator()
    policy = replace(HARSH, prune={"one.conv1": 0.7}, finetune=FineTune(stages=3))
    judge(Job(policy=policy, rung="short", seed=0, steps=6, folder=tmp_path))
    before = judge.load(policy, checkpoint(tmp_path, "short"))[0].state_dict()

    module, _, losses = judge.train(Job(policy=policy, rung="long", seed=0, steps=0, folder=tmp_path))

    assert losses == ()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items() if "quant" not in name)


def test_a_policy_is_exported_as_no_fine_tune_has_touched_it(tmp_path: Path) -> None:
    judge = evaluator()
    policy = replace(HARSH, prune={"one.conv1": 0.7})
    for rung, steps in (("bn", 0), ("short", 6), ("long", 0)):
        judge(Job(policy=policy, rung=rung, seed=0, steps=steps, folder=tmp_path, untrained=rung == "long"))

    states = {rung: judge.load(policy, checkpoint(tmp_path, rung))[0].state_dict() for rung in ("bn", "short", "long")}

    assert all(torch.equal(states["bn"][name], value) for name, value in states["long"].items())
    assert not torch.equal(states["short"]["stem.0.weight"], states["long"]["stem.0.weight"])


def test_a_rate_multiplies_the_policys_learning_rate_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    judge = evaluator()
    found = [
        judge.train(Job(policy=policy, rung="long", seed=0, steps=6, folder=tmp_path / str(rate), rate=rate))[0]
        for rate, policy in (
            (4.0, replace(HARSH, finetune=FineTune(learning_rate=0.01))),
            (1.0, replace(HARSH, finetune=FineTune(learning_rate=0.04))),
            (1.0, replace(HARSH, finetune=FineTune(learning_rate=0.01))),
        )
    ]

    raised, high, low = (weight(module, "head") for module in found)
    assert torch.equal(raised, high)
    assert not torch.equal(raised, low)
