"""What can be compressed, shown to a person; and a policy as a module for the user's own training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from nightpress.spaces.policy import INT8, LayerBits, Policy, policy_to_json

ATTENTION = '''
class Attention(nn.Module):
    """Four heads over the rows of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(self.embed(x[:, 0])).reshape(x.shape[0], 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(*made.unbind(0))
        return self.head(x.transpose(1, 2).reshape(x.shape[0], 8, 32).mean(1))


def attention() -> Task:
    return build(model=Attention())
'''

Cli = Callable[..., tiny.Result]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> tiny.Place:
    return tiny.place(tmp_path_factory, ATTENTION)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: object) -> tiny.Result:
        return tiny.call(*words, capsys=capsys)

    return run


def write_policy(path: Path, policy: Policy) -> Path:
    path.write_text(policy_to_json(policy))
    return path


def joint(place: tiny.Place) -> Policy:
    """A ratio in every group, every layer on a grid."""
    bits = {layer.name: INT8 for layer in place.anatomy.layers} | {"stem": LayerBits(weights=3, activations=8)}
    return Policy(model=place.anatomy.digest, prune={g.name: 0.5 for g in place.anatomy.groups}, bits=bits)


def test_bits_are_shown_as_pairs(cli: Cli, place: tiny.Place) -> None:
    shown = cli("inspect", place.task).out

    rows = [line for line in shown.splitlines() if "block.conv1" in line and "conv " in line]
    assert len(rows) == 1
    assert "32/32, 8/8" in rows[0] or "8/8, 32/32" in rows[0]
    assert "[" not in shown


def test_heads_are_shown_with_the_rows_that_each_takes(cli: Cli, place: tiny.Place) -> None:
    task = f"{place.task_file}:attention"

    [row] = [line for line in cli("inspect", task).out.splitlines() if "×" in line]
    found = next(g for g in cli("inspect", task, "--json").json["groups"] if g["kind"] == "heads")

    assert (found["channels"], found["unit"], found["step"]) == (4, 24, 1)
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["qkv", "4 × 24", "1"]


def test_a_policy_of_another_model_is_refused_with_both_digests(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    path = write_policy(tmp_path / "other.json", Policy(model="0123456789abcdef"))

    sentence = tiny.refused(cli("apply", path, place.task, "--out", tmp_path / "model.pt", "--json"))

    assert sentence == (
        f"{path}: a policy belongs to one model; this one is for 0123456789abcdef, the task's model is "
        f"{place.anatomy.digest}."
    )


def test_a_policy_writes_the_same_bytes_whatever_came_between(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.json", joint(place))
    other = write_policy(tmp_path / "other.json", replace(joint(place), importance="taylor", bits={}))
    outs = [tmp_path / f"{number}.safetensors" for number in range(3)]

    assert cli("apply", policy, place.task, "--out", outs[0], "--json").code == 0
    assert cli("apply", other, place.task, "--out", tmp_path / "other.safetensors", "--json").code == 0
    assert cli("apply", policy, place.task, "--out", outs[1], "--json").code == 0
    assert tiny.nightpress("apply", policy, place.task, "--out", outs[2], "--json").code == 0

    assert len({out.read_bytes() for out in outs}) == 1
    assert (tmp_path / "other.safetensors").read_bytes() != outs[0].read_bytes()


def test_a_policy_and_its_weights_are_all_that_a_module_needs(cli: Cli, place: tiny.Place, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.json", joint(place))
    first, given, again = (tmp_path / f"{name}.safetensors" for name in ("first", "given", "again"))
    assert cli("apply", policy, place.task, "--out", first, "--json").code == 0
    generator = torch.Generator().manual_seed(0)
    save_file({k: torch.rand(v.shape, generator=generator).to(v.dtype) for k, v in load_file(first).items()}, given)

    data = cli("apply", policy, place.task, "--out", again, "--weights", given, "--json").json

    assert again.read_bytes() == given.read_bytes() != first.read_bytes()
    assert json.loads(policy.read_text())["model"] == place.anatomy.digest
    assert 0 < data["params"] < place.anatomy.params
