"""Limits that nothing meets are found before anything is trained, and none that something meets is refused."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from nightpress.search.clock import Clock, Times
from nightpress.search.config import BitsConfig, Limits, PruneConfig, RunConfig, SpaceConfig
from nightpress.search.folder import RunFolder
from nightpress.search.limits import check_accuracy
from nightpress.search.limits import check_costs as check_costs_of
from nightpress.search.prepare import space_of
from nightpress.search.session import Prepared, Session
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Choices, policy_at
from nightpress.spaces.policy import FP32, INT8, Policy
from nightpress.spaces.space import Space, canonical, ratio_of
from strategies import toy_anatomy
from test_planning import TASK

SPACE = Space(anatomy=toy_anatomy(), max_ratio=0.85, bit_choices=(FP32, INT8))
"""Of 32 channels in steps of 8, 4.8 may stay: one step would be the nearest, and two are the least."""
NARROW = canonical(
    Policy(
        model=SPACE.anatomy.digest,
        prune={g.name: ratio_of(g, SPACE.step_range(g)[0]) for g in SPACE.anatomy.groups},
        bits={layer.name: INT8 for layer in SPACE.anatomy.layers},
        removed_blocks=("one", "two"),
    ),
    SPACE.anatomy,
)


def costs_of(policy: Policy, *, opposed: bool = False) -> tuple[float, int]:
    """Milliseconds that grow with the work, a quarter of it in integers, or, ``opposed``, shrink as the file grows."""
    planned = plan(SPACE.anatomy, policy)
    size = 100 + sum(op.weight_count * op.bits.weights // 8 for op in planned.ops if op.weight_count)
    integers = sum(pair.weights == 8 for pair in policy.bits.values()) / len(SPACE.anatomy.layers)
    return (1e4 / size if opposed else 0.01 + planned.macs * (1 - 0.75 * integers) / 1e6), size


@dataclass
class Formula:
    """A profile whose latencies follow a formula; none of them has a price where it is ``blind``."""

    opposed: bool = False
    blind: bool = False
    predictor = SimpleNamespace(log_margin=0.0)
    forced = ()
    reference_ms = 1.0

    @property
    def remote(self) -> bool:
        return self.blind

    def costs(self, choices: Choices) -> NDArray[np.float64]:
        found = [costs_of(policy_at(SPACE.anatomy, choices, i), opposed=self.opposed) for i in range(len(choices))]
        return np.array(found) * ([np.nan, 1.0] if self.blind else 1.0)


class Priced(Session):
    def predict(self, policy: Policy) -> tuple[float, float, float, int]:
        latency_ms, size = costs_of(policy, opposed=self.profile.opposed)  # type: ignore[attr-defined]
        return latency_ms, latency_ms, latency_ms, size


def night(folder: Path, profile: Formula | None = None, *, space: Space = SPACE, **given_limits: float) -> Session:
    config = RunConfig(task="t", base=None, out=folder, limits=Limits(**given_limits))  # type: ignore[arg-type]
    (folder / "config.yaml").write_text("{task: t}")
    session = Priced(
        config=config, folder=RunFolder(folder), clock=Clock(Times().wall() + 3600), watch=lambda session: None
    )
    prepared = Prepared(task=TASK, anatomy=SPACE.anatomy, space=space, train_items=64, step_ms=1)
    session.provide(prepared=prepared, profile=profile or Formula())
    return session


def check_costs(session: Session) -> None:
    check_costs_of(session, population=128)  # the formula prices one policy after the other


def refused(session: Session) -> str:
    with pytest.raises(InputError, match=r"^limits\.") as error:
        check_costs(session)
    return str(error.value)


@pytest.mark.slow
def test_limits_that_the_narrowest_policy_meets_are_not_refused(tmp_path: Path) -> None:
    """It is far from every policy that is drawn at random."""
    latency_ms, size = costs_of(NARROW)
    check_costs(night(tmp_path, max_latency_ms=latency_ms))
    check_costs(night(tmp_path, max_size_bytes=size))
    check_costs(night(tmp_path, max_latency_ms=latency_ms, max_size_bytes=size))
    others = replace(SPACE, distill=(), importance=("taylor",), stages=(2,))
    check_costs(night(tmp_path, space=others, max_latency_ms=latency_ms, max_size_bytes=size))


def test_limits_that_no_policy_meets_are_refused_with_the_nearest_value(tmp_path: Path) -> None:
    latency_ms, size = costs_of(NARROW)
    too_fast = refused(night(tmp_path, max_latency_ms=0.99 * latency_ms))
    assert f"predicted to be faster than {latency_ms:.3g} ms on this target." in too_fast
    assert f"the smallest file of this space has {size} bytes." in refused(night(tmp_path, max_size_bytes=size - 1))


@pytest.mark.slow
def test_limits_that_contradict_each_other_are_refused_and_each_alone_is_not(tmp_path: Path) -> None:
    """Where the largest network is the fastest one."""
    largest, smallest = (costs_of(p, opposed=True) for p in (Policy(model=SPACE.anatomy.digest), NARROW))
    check_costs(night(tmp_path, Formula(opposed=True), max_latency_ms=1.01 * largest[0]))
    check_costs(night(tmp_path, Formula(opposed=True), max_size_bytes=smallest[1]))

    both = night(tmp_path, Formula(opposed=True), max_latency_ms=1.01 * largest[0], max_size_bytes=smallest[1])
    found = re.search(r"contradict each other: the smallest file that is fast enough has (\d+) bytes\.$", refused(both))

    assert found is not None
    assert 0.99 * largest[1] <= int(found[1]) <= largest[1]


def test_fewer_multiply_accumulates_than_the_narrowest_network_has_are_refused(tmp_path: Path) -> None:
    least = plan(SPACE.anatomy, NARROW).macs
    check_costs(night(tmp_path, max_macs=least))

    said = refused(night(tmp_path, max_macs=least - 1))
    assert said.startswith(f"limits.max_macs is {least - 1}, but no network of this space has fewer than {least} mul")


def test_where_no_policy_has_a_price_nothing_is_refused(tmp_path: Path) -> None:
    """A kit that met none of the space's kernels: each policy fails alone, and says why."""
    check_costs(night(tmp_path, Formula(blind=True), max_latency_ms=1e-9))


def test_an_accuracy_far_above_the_given_network_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^limits.min_accuracy is 0.96, but the given network has 0.9 on the test"):
        check_accuracy(night(tmp_path, min_accuracy=0.96), 0.9)


@pytest.mark.parametrize(("least", "warned"), [(0.92, True), (0.9, False), (None, False)])
def test_an_accuracy_a_little_above_the_given_network_s_is_warned_of(
    tmp_path: Path, least: float, warned: bool
) -> None:
    session = night(tmp_path, min_accuracy=least)
    check_accuracy(session, 0.9)
    assert bool(session.state.get("warnings")) == warned


@pytest.mark.parametrize("prune", [None, PruneConfig(max_ratio=0.05)])
def test_a_space_with_one_network_is_refused(prune: PruneConfig | None) -> None:
    """No group of 32 channels in steps of 8 has fewer where one in twenty may go."""
    one = SpaceConfig(prune=prune, bits=BitsConfig(weights=(32,), activations=(32,)), blocks=False)
    config = RunConfig(task="t", base=None, out=Path("run"), space=one)
    with pytest.raises(InputError, match=r"^space: there is nothing to search: no group that prune.max_ratio lets"):
        space_of(SPACE.anatomy, config)
