"""A fine-tune that pauses goes on as if it had not, in this process or another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nightpress.evaluators.evaluate import Evaluator, Job, checkpoint
from nightpress.evaluators.pausing import read_place, read_weights
from nightpress.spaces.policy import INT8, Distill, FineTune, LayerBits, Policy
from test_staged import HARSH, LIGHT, evaluator, weight

STEPS = 9
STAGED = replace(HARSH, prune={"one.conv1": 0.7, "two.conv1": 0.5}, finetune=FineTune(learning_rate=0.05, stages=3))
POLICIES = {
    "plain": replace(LIGHT, finetune=FineTune(learning_rate=0.05)),
    "in stages": STAGED,
    "in stages, few bits and zeros": replace(
        STAGED, sparsity={"head": 0.5}, bits={"widen.0": LayerBits(weights=4, activations=8)}
    ),
    "inner tensors and learned scales": replace(
        LIGHT, distill=Distill(method="logit+feature"), bits={"widen.0": INT8, "head": INT8}, scales="learned"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return evaluator()


def short(policy: Policy, folder: Path, **keys: object) -> Job:
    return Job(**{"policy": policy, "rung": "short", "seed": 0, "steps": STEPS, "folder": folder, **keys})  # type: ignore[arg-type]


def same(one: Path, other: Path) -> bool:
    weights = load_file(checkpoint(one, "short")), load_file(checkpoint(other, "short"))
    return weights[0].keys() == weights[1].keys() and all(torch.equal(weights[1][n], v) for n, v in weights[0].items())


@pytest.mark.parametrize("name", POLICIES)
def test_paused_and_gone_on_with_elsewhere_it_ends_at_the_same_bits(
    judge: Evaluator, tmp_path: Path, name: str
) -> None:
    policy = POLICIES[name]
    through, paused, looked = (tmp_path / part for part in ("through", "paused", "looked"))
    for folder in (through, paused, looked):
        judge(short(policy, folder, rung="bn"))
    outcome = judge(short(policy, through))

    parts = [judge(short(policy, paused, rung="part", stop=stop)) for stop in (2, 5)]
    after = evaluator()(short(policy, paused))
    seen = judge(short(policy, looked, looks=(2, 5)))

    assert same(through, paused)
    assert same(through, looked)
    assert after.search.accuracy == seen.search.accuracy == outcome.search.accuracy
    assert seen.looks == tuple((stop, part.search.accuracy) for stop, part in zip((2, 5), parts, strict=True))


@settings(max_examples=5, deadline=None)
@given(stops=st.lists(st.integers(1, STEPS), min_size=1, max_size=3, unique=True).map(sorted))
def test_wherever_it_pauses_nothing_changes(
    judge: Evaluator, tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    through, paused = (tmp_path_factory.mktemp(part) for part in ("through", "paused"))
    judge(short(STAGED, through))

    for stop in stops:
        judge(short(STAGED, paused, rung="part", stop=stop))
    judge(short(STAGED, paused))

    assert same(through, paused)


def test_a_part_of_staged_pruning_is_judged_as_the_policy_and_not_as_its_stage(
    judge: Evaluator, tmp_path: Path
) -> None:
    judge(short(STAGED, tmp_path, rung="part", stop=4))

    path = checkpoint(tmp_path, "part")
    module, _ = judge.load(STAGED, path)
    place = read_place(path)
    assert place is not None
    assert place.step == 4
    assert len(weight(module, "one.conv1")) < len(place.stage["one.conv1.weight"]) < len(place.wide["one.conv1.weight"])
    assert not any(name.startswith("training:") for name in read_weights(path))


def test_a_part_that_is_behind_the_step_asked_for_is_begun_anew(judge: Evaluator, tmp_path: Path) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    judge(short(STAGED, once, rung="part", stop=2))
    for stop in (5, 2):
        judge(short(STAGED, again, rung="part", stop=stop))

    found = [load_file(checkpoint(folder, "part")) for folder in (once, again)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
