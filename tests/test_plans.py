"""Plans of batches say what the plan of each policy says, and the runtime makes the kernels that they foretell."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from networks import Projected, made_of
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.latency.kernels import CONVERSIONS, kernels
from nightpress.evaluators.latency.measure import write_random
from nightpress.evaluators.latency.nodes import CONVERSION_OF, Matcher
from nightpress.evaluators.latency.sizes import batch_bytes, payload_bytes, structure
from nightpress.evaluators.latency.target import Target, fingerprint
from nightpress.evaluators.latency.timer import processor, session_config
from nightpress.evaluators.latency.units import Worker
from nightpress.evaluators.task import Task
from nightpress.spaces.anatomy import Anatomy
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Planner, choices_of, chunks, pack, pack_rows, policy_at, unpack
from nightpress.spaces.policy import FP32, INT8, LayerBits, Policy
from nightpress.spaces.space import canonical
from strategies import compressor_of, images, policies, seeded, space_of, task_of, tiny, toy_anatomy

ANATOMIES = (tiny().anatomy, toy_anatomy())
PROJECTED = compressor_of(task_of(seeded(lambda: nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.ReLU(), Projected(1), Projected(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)), images(2))).anatomy  # fmt: skip


def random_policies(anatomy: Anatomy, count: int, seed: int) -> list[Policy]:
    generator, space = np.random.default_rng(seed), space_of(anatomy)
    return [space.random(generator) for _ in range(count)]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_flags_come_back_from_an_integer(values: list[bool]) -> None:
    flags = pack(np.array(values))

    assert unpack([flags, 0], len(values)).tolist() == [values, [False] * len(values)]
    assert pack_rows(np.array([values, values])) == [flags, flags]


def assert_same_as_plans(anatomy: Anatomy, some: list[Policy]) -> None:
    planner = Planner(anatomy)
    made = planner.plans(choices_of(anatomy, some))
    alive, int8, quantised = (unpack(flags, len(some)) for flags in (made.alive, made.int8, made.quantised))
    for column, policy in enumerate(some):
        single = plan(anatomy, policy)
        by_name = {planned.op.name: planned for planned in single.ops}
        for row, op in enumerate(anatomy.ops):
            assert alive[row, column] == (op.name in by_name), op.name
            if op.name not in by_name:
                continue
            rows = zip(planner.axis_of[row], op.shape, strict=True)
            shape = tuple(size if axis is None else int(made.axes[axis, column]) for axis, size in rows)
            assert shape == by_name[op.name].shape
            assert int8[row, column] == by_name[op.name].int8, op.name
            assert quantised[row, column] == (op.name in single.quantised), op.name


@settings(max_examples=40)
@given(st.lists(policies(ANATOMIES[0]), min_size=1, max_size=4))
def test_a_batch_is_planned_as_its_policies_are(some: list[Policy]) -> None:
    assert_same_as_plans(ANATOMIES[0], some)


@pytest.mark.parametrize("anatomy", [*ANATOMIES, PROJECTED], ids=["tiny", "toy", "projected"])
def test_random_policies_are_planned_alike(anatomy: Anatomy) -> None:
    assert_same_as_plans(anatomy, random_policies(anatomy, 120, 1))


@pytest.mark.parametrize("anatomy", [*ANATOMIES, PROJECTED], ids=["tiny", "toy", "projected"])
def test_what_a_batch_says_of_a_policy_is_that_policy(anatomy: Anatomy) -> None:
    some = random_policies(anatomy, 40, 2)
    choices = choices_of(anatomy, some)

    for row, policy in enumerate(some):
        found = canonical(policy_at(anatomy, choices, row), anatomy)
        assert (found.prune, found.bits, found.removed_blocks) == (policy.prune, policy.bits, policy.removed_blocks)


class Tokens(nn.Module):
    """Layer norms and a parameter of their own, one norm in a removable block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(6, 8), nn.Parameter(torch.zeros(1, 4, 8))
        self.norm, self.grow, self.shrink = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.places
        x = x + self.shrink(torch.relu(self.grow(self.norm(x))))
        return self.head(self.last(x).mean(dim=1))


def tokens() -> Anatomy:
    x = torch.zeros(1, 4, 6)
    data = TensorDataset(x.repeat(4, 1, 1), torch.zeros(4, dtype=torch.int64))
    task = Task(name="tokens", model=Tokens().eval(), example_input=x, train=data, test=data)
    return inspect(task, step_of=lambda channels: 2, cache=False, verify=False)[0]


@pytest.mark.parametrize(
    "make", [lambda: ANATOMIES[0], lambda: ANATOMIES[1], tokens, lambda: made_of("group norm").anatomy],
    ids=["tiny", "toy", "tokens", "group norm"],
)  # fmt: skip
def test_files_of_a_batch_weigh_what_those_of_its_plans_do(make: Callable[[], Anatomy]) -> None:
    anatomy = make()
    some = random_policies(anatomy, 60, 3)
    overheads = np.array([300.0, 40.0, 90.0, 170.0, 210.0])
    plans = [plan(anatomy, policy) for policy in some]

    found = batch_bytes(Worker(anatomy), choices_of(anatomy, some), overheads)

    assert found.tolist() == [payload_bytes(made) + round(float(structure(made) @ overheads)) for made in plans]


@pytest.mark.parametrize("anatomy", [*ANATOMIES, PROJECTED], ids=["tiny", "toy", "projected"])
def test_every_size_that_an_axis_takes_is_a_whole_step(anatomy: Anatomy) -> None:
    planner = Planner(anatomy)
    least, step, counts = planner.axis_range()

    axes = planner.plans(choices_of(anatomy, random_policies(anatomy, 200, 2))).axes
    steps = (axes - least[:, None]) / step[:, None]

    np.testing.assert_array_equal(steps, steps.round())
    assert (steps >= 0).all()
    assert (steps < counts[:, None]).all()


def test_parts_of_a_batch_are_the_batch() -> None:
    anatomy = ANATOMIES[0]
    choices = choices_of(anatomy, random_policies(anatomy, 7, 3))

    parts = list(chunks(choices, 3))

    assert [len(part) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part.kept for part in parts]), choices.kept)
    np.testing.assert_array_equal(np.concatenate([part.bits for part in parts]), choices.bits)


# The runtime's own graph


def optimised(policy: Policy, anatomy: Anatomy, folder: Path) -> onnx.GraphProto:
    """What the runtime executes."""
    path, made = folder / "model.onnx", folder / "optimised.onnx"
    write_random(plan(anatomy, policy), path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(made)
    for name, value in session_config(processor()).items():
        options.add_session_config_entry(name, value)
    onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=list(Target().disabled_optimizers),
    )  # fmt: skip
    return onnx.load(str(made)).graph


@pytest.mark.parametrize(
    ("machine", "flags", "told"),
    [
        ("x86_64", ["avx2", "avx512f"], {"session.x64quantprecision": "1"}),
        ("AMD64", [], {"session.x64quantprecision": "1"}),
        ("x86_64", ["avx2", "avx512f", "avx512_vnni"], {}),
        ("x86_64", ["avx2", "avx_vnni"], {}),
        ("aarch64", ["asimddp"], {}),
    ],
)
def test_integers_are_told_not_to_saturate_where_they_would_and_nowhere_else(
    machine: str, flags: list[str], told: dict[str, str]
) -> None:
    assert session_config({"machine": machine, "flags": flags}) == told


def test_weights_stay_signed_where_there_are_kernels_for_them_that_do_not_saturate(tmp_path: Path) -> None:
    """Unsigned ones took 2.5 times as long on a processor with VNNI."""
    anatomy = ANATOMIES[0]
    graph = optimised(Policy(model=anatomy.digest, bits={x.name: INT8 for x in anatomy.layers}), anatomy, tmp_path)
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = {types[node.input[3]] for node in graph.node if node.op_type == "QLinearConv"}
    exact = bool(session_config(processor()))
    assert weights == {onnx.TensorProto.UINT8 if exact else onnx.TensorProto.INT8}


@pytest.mark.slow
@pytest.mark.skipif("avx512f" not in fingerprint(Target()).flags, reason="blocks of 16 channels need AVX-512")
@pytest.mark.parametrize("name", ["tiny", "projected", "twice", "up", "pixel shuffle"])
def test_the_runtime_makes_the_kernels_that_were_foretold(tmp_path: Path, name: str) -> None:
    anatomy = {"tiny": ANATOMIES[0], "projected": PROJECTED}.get(name) or made_of(name).anatomy
    some = random_policies(anatomy, 24, 4)
    worker = Worker(anatomy)
    made = kernels(worker.planner, worker.planner.plans(choices_of(anatomy, some)))
    work = worker.work(choices_of(anatomy, some))
    for column, policy in enumerate(some):
        nodes = [(node.op_type, node.name) for node in optimised(policy, anatomy, tmp_path).node]
        foretold = Counter(
            {name: sum(flags >> column & 1 for _, flags in made.conversions[name]) for name in CONVERSIONS}
        )
        real = Counter(CONVERSION_OF[kind] for kind, name in nodes if kind in CONVERSION_OF and ".weight" not in name)

        assert {k: v for k, v in foretold.items() if v} == dict(real)
        assert work.nodes[column] == len(nodes)
        timed = Matcher(anatomy).match({name: (kind, 1.0) for kind, name in nodes})
        parts = [timed.kernels, timed.weights, np.array([*timed.conversions.values()])]
        assert sum(np.nansum(part) for part in parts) == len(nodes)  # each belongs to something
        expected = {int(u.site[i]) for u in work.units for i in np.nonzero(u.row == column)[0]}
        assert {i for i, ms in enumerate(timed.kernels) if not np.isnan(ms)} == expected


@pytest.mark.parametrize(("before", "after"), list(itertools.product((FP32, INT8), repeat=2)))
def test_a_maximum_behind_a_quantiser_is_a_kind_of_its_own(tmp_path: Path, before: LayerBits, after: LayerBits) -> None:
    """On bytes that are not channels-last it runs on, and slowly."""
    image = torch.zeros(1, 3, 8, 8)
    data = TensorDataset(image.repeat(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3), nn.Flatten())
    task = Task(name="pooled", model=net.eval(), example_input=image, train=data, test=data)
    anatomy = inspect(task, step_of=Target().channel_step, cache=False, verify=False)[0]
    names = [layer.name for layer in anatomy.layers]
    policy = Policy(model=anatomy.digest, bits=dict(zip(names, (before, after), strict=True)))

    graph = optimised(policy, anatomy, tmp_path)

    maker = {name: node.op_type for node in graph.node for name in node.output}
    [pool] = [node for node in graph.node if "MaxPool" in node.op_type]
    kinds = {units.kind for units in Worker(anatomy).work(choices_of(anatomy, [policy])).units}
    assert (
        ("max_pool.early" in kinds) == (maker[pool.input[0]] == "QuantizeLinear") == (before == FP32 and after == INT8)
    )
