"""The anatomy that is kept, the one that is made anew, and groups that do not survive their dry run."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Between, Inverted, Shrunk, Tied, Vision, tokens
from nightpress.evaluators.dryrun import Caps, caps, verify_groups
from nightpress.evaluators.inspect import inspect, network_of, without_groups
from nightpress.spaces.anatomy import Anatomy, LeftOut, Slice, anatomy_from_json, anatomy_to_dict, anatomy_to_json
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.policy import INT8, Policy
from strategies import Residual, compressor_of, images, seeded, task_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nightpress"


def four(channels: int) -> int:
    del channels
    return 4


def small(then: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    """Two convolutions with a function between them that the printed form of the model does not show."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(then(self.one(x))).flatten(1)

    return seeded(Small)


def kept(folder: Path) -> Path:
    [path] = folder.glob("anatomy-*.json")
    return path


# The cache


def test_a_model_that_is_known_is_read_from_the_cache(cache: Path) -> None:
    task = task_of(small(), images(2))
    first, _ = inspect(task)
    marked = replace(first, params=first.params + 1)  # only the file can know this number
    kept(cache).write_text(anatomy_to_json(marked))

    again, network = inspect(task)

    assert again == marked
    assert all(value.data_ptr() == task.model.state_dict()[name].data_ptr() for name, value in network.state.items())


def test_the_cache_can_be_left_out(cache: Path) -> None:
    task = task_of(small(), images(2))
    first, _ = inspect(task, cache=False)
    assert not cache.exists()
    inspect(task)
    kept(cache).write_text("poison")

    assert inspect(task, cache=False)[0] == first
    assert kept(cache).read_text() == "poison"


def test_other_steps_examples_and_weights_have_files_of_their_own(cache: Path) -> None:
    one, other = small(), small()
    with torch.no_grad():
        other.get_parameter("one.bias").add_(1)

    inspect(task_of(one, images(2)))
    inspect(task_of(one, images(2)), step_of=four)  # the same step
    assert len(list(cache.iterdir())) == 1
    inspect(task_of(one, images(2)), step_of=lambda channels: 2)
    inspect(task_of(other, images(2)))

    assert len(list(cache.iterdir())) == 3


def test_a_forward_that_changed_under_the_same_weights_is_noticed(cache: Path) -> None:
    before, _ = inspect(task_of(small(F.relu), images(2)))

    after, _ = inspect(task_of(small(torch.tanh), images(2)))

    assert before.digest == after.digest
    assert "tanh" in {op.kind for op in after.ops}
    assert anatomy_from_json(kept(cache).read_text()) == after


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"digest": 1, "ops": 3}', ""])
def test_a_damaged_file_is_made_anew_with_a_warning(
    content: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(small(), images(2))
    first, _ = inspect(task)
    kept(cache).write_text(content)

    with caplog.at_level(logging.WARNING, "nightpress"):
        again, _ = inspect(task)

    assert again == first
    assert f"{kept(cache)} is damaged and will be made anew" in caplog.text
    assert anatomy_from_json(kept(cache).read_text()) == first


def test_a_file_of_another_model_is_not_believed(cache: Path) -> None:
    task = task_of(small(), images(2))
    first, _ = inspect(task)
    kept(cache).write_text(anatomy_to_json(replace(first, digest="0" * 16, params=1)))

    assert inspect(task)[0] == first


def test_a_cache_that_cannot_be_written_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "file"))

    with caplog.at_level(logging.WARNING, "nightpress"):
        anatomy, _ = inspect(task_of(small(), images(2)))

    assert anatomy.groups
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(Vision, images(2)), (lambda: Between(Shrunk(), width=16), images(2)), (Tied, tokens(2))],
)
def test_an_anatomy_survives_its_file(make: Callable[[], nn.Module], inputs: Tensor) -> None:
    task = task_of(seeded(make), inputs)
    made = compressor_of(task, step=1)

    read = anatomy_from_json(anatomy_to_json(made.anatomy))

    assert read == made.anatomy
    policy = Policy(model=read.digest, prune={g.name: 0.5 for g in read.groups})
    assert plan(read, policy) == plan(made.anatomy, policy)
    network = network_of(task, read)
    assert network.frozen == made.network.frozen
    assert set(network.state) <= set(made.network.state)
    assert all(torch.equal(value, made.network.state[name]) for name, value in network.state.items())
    assert {entry for op in read.ops for entry in op.params.values()} <= set(network.state)


# What is reported


def test_the_report_names_everything_that_is_offered_or_left_out() -> None:
    anatomy = compressor_of(task_of(seeded(lambda: Between(Residual(8, 6))), images(2)), step=4).anatomy

    data = anatomy_to_dict(anatomy, ((32, 32), (8, 8)))

    assert data["model"] == {"params": anatomy.params, "macs": anatomy.macs, "size_bytes": 4 * anatomy.params}
    assert [(g["name"], g["channels"], g["step"], g["unit"], g["kind"]) for g in data["groups"]] == [
        ("stem", 8, 4, 1, "channels")
    ]
    assert data["left_out"] == [
        {"name": "inner.conv1", "reason": "6 channels are fewer than two steps of 4"},
        {"name": "head", "reason": "its channels are the model's output"},
    ]
    macs = {layer.name: layer.macs for layer in anatomy.layers}
    assert data["coverage"] == (macs["stem"] + macs["inner.conv2"]) / (sum(macs.values()) - macs["head"])
    assert [b["name"] for b in data["blocks"]] == ["inner"]
    assert all(layer["bits"] == [[32, 32], [8, 8]] for layer in data["layers"])


# The dry run


def anatomy_of(make: Callable[[], nn.Module]) -> tuple[Anatomy, dict[str, tuple[int, ...]]]:
    made = compressor_of(task_of(seeded(make), images(2)), step=2)
    return made.anatomy, {name: tuple(value.shape) for name, value in made.network.state.items()}


def with_slices(anatomy: Anatomy, group: str, change: Callable[[tuple[Slice, ...]], tuple[Slice, ...]]) -> Anatomy:
    """The anatomy with other slices in one group."""
    changed = replace(anatomy.group(group), slices=change(anatomy.group(group).slices))
    return replace(anatomy, groups=tuple(changed if g.name == group else g for g in anatomy.groups))


def test_groups_that_can_be_pruned_pass() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(nn.Sequential(Inverted(), Residual(8, 6))))

    assert len(anatomy.groups) == 3
    assert verify_groups(anatomy, shapes) == {}


def test_a_group_that_forgets_a_parameter_fails_alone() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(nn.Sequential(Inverted(), Residual(8, 6))))
    wrong = with_slices(anatomy, "inner.0.expand.0", lambda slices: slices[:-1])

    failed = verify_groups(wrong, shapes)

    assert list(failed) == ["inner.0.expand.0"]
    assert "12" in failed["inner.0.expand.0"]
    assert "10" in failed["inner.0.expand.0"]


def test_a_group_whose_tensor_has_another_shape_than_planned_fails() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(Residual(8, 6)))
    twice: tuple[dict[str, int], ...] = ({}, {"inner.conv1": 2}, {}, {})
    wrong = replace(
        anatomy,
        ops=tuple(replace(op, lost=twice) if op.name == "relu_1" else op for op in anatomy.ops),
    )  # fmt: skip

    failed = verify_groups(wrong, shapes)

    assert failed == {"inner.conv1": "pruning it turns relu_1 into (1, 4, 8, 8), but (1, 2, 8, 8) was expected"}


def test_a_group_at_which_the_process_dies_is_left_out_and_the_rest_stays() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(nn.Sequential(Inverted(), Residual(8, 6))))
    stranger = Slice(parameter="nobody.weight", axis=0, indices=((0,),) * 12)
    wrong = with_slices(anatomy, "inner.0.expand.0", lambda slices: (stranger, *slices))

    failed = verify_groups(wrong, shapes)

    assert failed == {"inner.0.expand.0": "its dry run failed: KeyError: 'nobody.weight'"}


def test_a_group_that_needs_more_memory_than_the_cap_is_left_out_and_the_rest_stays() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(Residual(8, 6)))
    big = Slice(parameter="big", axis=0, indices=tuple((channel,) for channel in range(6)))
    wrong = with_slices(anatomy, "inner.conv1", lambda slices: (*slices, big))

    failed = verify_groups(wrong, {**shapes, "big": (6, 100_000_000)}, Caps(7 * 1024**3 // 2, 120))

    assert list(failed) == ["inner.conv1"]
    assert "alloc" in failed["inner.conv1"].lower()
    assert failed["inner.conv1"].endswith("(3.5 GiB are allowed; NIGHTPRESS_DRY_RUN_GIB allows more)")


def test_without_memory_for_anything_every_group_says_so() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(Residual(8, 6)))

    failed = verify_groups(anatomy, shapes, Caps(16 * 1024**2, 120))

    assert set(failed) == {"stem", "inner.conv1"}
    assert all(reason.startswith("its dry run ") for reason in failed.values())


def test_the_environment_sets_the_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert caps() == Caps(4 * 1024**3, 120.0)
    monkeypatch.setenv("NIGHTPRESS_DRY_RUN_GIB", "0.5")
    monkeypatch.setenv("NIGHTPRESS_DRY_RUN_SECONDS", "7")
    assert caps() == Caps(1024**3 // 2, 7.0)


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_a_cap_that_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NIGHTPRESS_DRY_RUN_GIB", text)
    with pytest.raises(InputError, match=rf"^NIGHTPRESS_DRY_RUN_GIB .* a number above 0, but is '{text}'\.$"):
        caps()


def test_groups_that_take_longer_than_the_cap_are_left_out_with_it() -> None:
    anatomy, shapes = anatomy_of(lambda: Between(Residual(8, 6)))

    failed = verify_groups(anatomy, shapes, Caps(4 * 1024**3, 0.001))

    assert failed == dict.fromkeys(
        ["stem", "inner.conv1"], "its dry run took more than 0.001 s (NIGHTPRESS_DRY_RUN_SECONDS allows more)"
    )
    assert verify_groups(anatomy, shapes) == {}  # and the next one has a process again


def test_a_group_that_is_left_out_keeps_its_width_everywhere() -> None:
    anatomy, _ = anatomy_of(lambda: Between(Residual(8, 6)))

    smaller = without_groups(anatomy, [LeftOut(name="inner.conv1", reason="a reason")])

    assert [g.name for g in smaller.groups] == ["stem"]
    assert smaller.left_out[-1].reason == "a reason"
    made = plan(smaller, Policy(model=anatomy.digest, prune={"stem": 0.5}, bits={"stem": INT8}))
    shapes = {p.op.name: p.shape for p in made.ops}
    assert shapes["inner_conv1"] == (1, 6, 8, 8)
    assert shapes["inner_conv2"] == (1, 4, 8, 8)


def test_an_unknown_model_is_refused_at_inspection(cache: Path) -> None:
    with pytest.raises(InputError, match=r"^The model uses cumsum in 1 \(\w+\), which nightpress cannot export yet"):
        inspect(task_of(nn.Sequential(nn.Conv2d(3, 8, 3), Cumulated()), images(2)))
    assert not cache.exists()


class Cumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)
