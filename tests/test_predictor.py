"""The latency predictor on truths that are known: what it learns, what it refuses, how sure it is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from nightpress.evaluators.latency.aggregates import aggregate, columns_of, process_on
from nightpress.evaluators.latency.calibrate import (
    BATCH,
    FIRST,
    SECONDS,
    Calibration,
    calibrate,
    calibrate_until_flat,
    covering,
)
from nightpress.evaluators.latency.insitu import UnseenKernelError, learn
from nightpress.evaluators.latency.measure import Kernel, Timing
from nightpress.evaluators.latency.nodes import CONVERSION_OF, Matcher, Timed, timed_from_dict, timed_to_dict
from nightpress.evaluators.latency.predictor import LEAST_POINTS, Measured, Predictor, fit, session_levels
from nightpress.evaluators.latency.profile import Point, Profile, drift
from nightpress.evaluators.latency.tables import Tables, TermTables, sums_of
from nightpress.evaluators.latency.target import Target
from nightpress.evaluators.latency.units import DEQUANTISE, Work, Worker
from nightpress.spaces.plans import choices_of
from nightpress.spaces.policy import FP32, INT8, Policy, digest
from nightpress.spaces.space import uniform
from strategies import FormulaTimer, policies, space_of, tiny

ANATOMY = tiny().anatomy
WORKER = Worker(ANATOMY)
SPACE = space_of(ANATOMY)
Array = NDArray[np.float64]
MOST_HERE = 56


def random_policies(count: int, seed: int) -> list[Policy]:
    generator = np.random.default_rng(seed)
    return [SPACE.random(generator) for _ in range(count)]


@cache
def rare() -> tuple[Policy, ...]:
    """Policies that run what few random ones do."""
    return tuple(covering(WORKER, [], random_policies(600, 9)))


def known_policies(count: int, seed: int) -> list[Policy]:
    """Random ones that run every kind of kernel which random policies do."""
    return [*random_policies(count, seed), *rare()]


def unit_ms(work: Work) -> tuple[Array, Array, dict[str, Array]]:
    """A device by formula: milliseconds of each operation's kernel and weights (n, operations), and of conversions."""
    kernels = np.full((work.count, len(ANATOMY.ops)), np.nan)
    weights = kernels.copy()
    for units in work.units:
        speed = {"int8": 0.4, "blocked": 1.0, "plain": 2.0, "stored": 2.2}.get(units.kind.rpartition(".")[2], 1.0)
        ms = 0.002 + speed * units.terms[:, 1:].sum(axis=1)
        (weights if units.kind == DEQUANTISE else kernels)[units.row, units.site] = ms
    return kernels, weights, {name: 0.001 * a[:, 0] + 0.2 * a[:, 1] for name, a in work.conversions.items()}


def measured(
    some: Sequence[Policy], noise: float = 0.0, seed: int = 0, profiled: bool = True, levels: Sequence[float] = (1.0,)
) -> Measured:
    """What that device would be measured to do, in as many sessions as there are ``levels``, one after the other. A
    profiler takes a microsecond a node."""
    work = WORKER.work(choices_of(ANATOMY, some))
    kernels, weights, conversions = unit_ms(work)
    total = np.nansum(kernels, axis=1) + np.nansum(weights, axis=1) + sum(conversions.values())
    scatter = np.exp(np.random.default_rng(seed).normal(0, noise, work.count))
    timed: list[Timed | None] = [
        Timed(
            kernels=kernels[i] + 0.001, weights=weights[i] + 0.001,
            conversions={
                name: float(ms[i] + 0.001 * work.conversions[name][i, 0]) for name, ms in conversions.items()
            },
        )
        for i in range(work.count)
    ]  # fmt: skip
    nothing: list[Timed | None] = [None] * work.count
    sessions = np.arange(work.count) * len(levels) // work.count
    return Measured(
        worker=WORKER, work=work, latency_ms=total * scatter * np.array(levels)[sessions], sessions=sessions,
        timed=timed if profiled else nothing,
    )  # fmt: skip


@cache
def exact() -> Predictor:
    return fit(measured(known_policies(40, 3)))


def errors(predictor: Predictor, some: Sequence[Policy]) -> Array:
    truth = measured(some).latency_ms
    return np.abs(predictor.predict(choices_of(ANATOMY, some))[:, 0] / truth - 1)


def test_units_are_learned_from_the_times_of_nodes() -> None:
    assert exact().design.startswith("units")
    assert exact().heldout.mape < 0.02
    assert errors(exact(), random_policies(100, 4)).mean() < 0.02
    assert min(exact().candidates, key=lambda name: exact().candidates[name]) == exact().design


def test_without_times_of_nodes_whole_models_are_learned() -> None:
    predictor = fit(measured(known_policies(40, 3), profiled=False))

    assert not [name for name in predictor.candidates if name.startswith("units")]
    assert errors(predictor, random_policies(100, 4)).mean() < 0.1


@settings(max_examples=25)
@given(st.lists(policies(ANATOMY), min_size=1, max_size=5))
def test_a_batch_is_predicted_as_its_policies_are(some: list[Policy]) -> None:
    try:
        together = exact().predict(choices_of(ANATOMY, some))
    except UnseenKernelError:
        return  # refused together: one of them is refused alone too
    alone = np.concatenate([exact().predict(choices_of(ANATOMY, [policy])) for policy in some])

    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert (together[:, 1] <= together[:, 0]).all()
    assert (together[:, 0] <= together[:, 2]).all()


@pytest.mark.parametrize("profiled", [True, False])
def test_a_session_of_another_level_does_not_mislead(profiled: bool) -> None:
    """A third of the policies took a quarter more time: the others' level is predicted, and the interval holds both."""
    some, fresh = known_policies(60, 3), random_policies(100, 4)
    disturbed = fit(measured(some, noise=0.01, levels=(1.0, 1.25, 1.0), profiled=profiled))
    quiet = fit(measured(some, noise=0.01, profiled=profiled))

    assert errors(disturbed, fresh).mean() < errors(quiet, fresh).mean() + 0.02
    assert disturbed.log_margin > np.log(1.25) - 0.05


def test_levels_of_sessions_are_told_from_chance() -> None:
    generator = np.random.default_rng(0)
    left, sessions = generator.normal(0, 0.04, 64), np.repeat([0, 1, 2, -1], 16)

    by_chance = session_levels(left, sessions)
    slow = session_levels(left + 0.2 * (sessions >= 1) * (sessions != 2) + 0.2 * (sessions == -1), sessions)

    assert np.abs(by_chance).max() < 0.02
    assert np.ptp(slow[sessions == 1]) == 0
    assert slow[sessions == 1][0] - slow[sessions == 0][0] == pytest.approx(0.2, abs=0.04)
    assert (slow[sessions == -1] == 0).all()  # chosen ones tell no level


def test_looking_up_gives_what_working_out_gives() -> None:
    known = measured(known_policies(40, 3))
    everything = np.ones(known.work.count, np.bool_)
    units = learn(known.work, known.timed, known.latency_ms, everything, known.operations)
    choices = choices_of(ANATOMY, random_policies(200, 5))
    work = WORKER.work(choices)

    looked_up, worked_out = Tables(WORKER, units).sums(choices), sums_of(units.parts(work), work)

    for name in ("total", "groups", "nodes", "model_mb"):
        np.testing.assert_allclose(getattr(looked_up, name), getattr(worked_out, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("left_out", [None, "conv.int8", "weights.dequantise", "quantise"])
def test_terms_that_are_looked_up_are_those_that_are_worked_out(left_out: str | None) -> None:
    work = WORKER.work(choices_of(ANATOMY, known_policies(40, 3)))
    columns = {kind: width for kind, width in columns_of(work).items() if kind != left_out}
    some = random_policies(200, 5)
    expected = aggregate(WORKER.work(choices_of(ANATOMY, some)), columns)
    tables = TermTables(WORKER, columns)

    for _ in range(2):  # the second time nothing is new
        np.testing.assert_allclose(tables.terms(choices_of(ANATOMY, some)), expected, rtol=1e-5, atol=1e-9)
    assert np.isnan(expected).any() == (left_out is not None)


def test_a_gaussian_process_answers_as_the_library_does() -> None:
    generator = np.random.default_rng(0)
    inputs, fresh = generator.normal(3, 2, (40, 6)), generator.normal(3, 3, (200, 6))
    inputs[:, 2] = 1.0  # says nothing
    target = inputs[:, 0] * 0.1 + np.sin(inputs[:, 1]) + generator.normal(0, 0.2, 40)
    used = np.array([0, 1, 3, 4, 5])
    kernel: Any = ConstantKernel(1.0) * RBF(4.0, (0.5, 100.0)) + WhiteKernel(1e-2, (1e-5, 1.0))
    library = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    centre, spread = inputs[:, used].mean(axis=0), inputs[:, used].std(axis=0)
    library.fit((inputs[:, used] - centre) / spread, target)

    expected = library.predict((fresh[:, used] - centre) / spread)

    np.testing.assert_allclose(process_on(inputs, target)(fresh), expected, rtol=1e-6, atol=1e-8)


def test_a_kind_of_kernel_that_was_not_measured_is_refused_by_name() -> None:
    floats = [replace(policy, bits={}) for policy in random_policies(20, 6)]
    predictor = fit(measured(floats))
    integers = uniform(ANATOMY, width=1, bits=INT8)

    assert errors(predictor, floats).mean() < 0.05
    with pytest.raises(UnseenKernelError, match=r"runs as conv\.int8, which no measured policy did$"):
        predictor.predict(choices_of(ANATOMY, [floats[0], integers]))


def test_a_policy_is_not_known_by_its_twin() -> None:
    """Those that differ in their fine-tune alone run the same network: two of one would know each other's noise."""
    known = measured(known_policies(24, 3), noise=0.05)
    twice = replace(
        known, work=measured([*known_policies(24, 3)] * 2).work, latency_ms=np.tile(known.latency_ms, 2),
        timed=[*known.timed] * 2, sessions=np.tile(known.sessions, 2),
    )  # fmt: skip
    told = replace(twice, networks=np.tile(np.arange(len(known.latency_ms)), 2))

    assert fit(twice).heldout.mape < 0.8 * fit(told).heldout.mape
    assert fit(told).heldout.mape == pytest.approx(fit(known).heldout.mape, rel=0.3)


def test_a_kind_of_kernel_that_ran_only_where_no_node_was_timed_is_learned_of_whole_models() -> None:
    """A measurement of one in a file without times of nodes ended in an error."""
    floats = [replace(policy, bits={}) for policy in random_policies(20, 6)]
    known = measured([*floats, *(uniform(ANATOMY, width=width, bits=INT8) for width in (1, 0.75, 0.5))])

    predictor = fit(replace(known, timed=[*known.timed[:20], None, None, None]))

    assert not predictor.design.startswith("units")
    assert errors(predictor, [uniform(ANATOMY, width=1, bits=INT8)]).max() < 0.3


def test_a_kind_of_kernel_that_the_profiler_has_no_time_for_is_predicted_all_the_same() -> None:
    known = measured(known_policies(40, 3))
    kept = np.array([op.kind != "linear" for op in ANATOMY.ops])
    silent = [replace(t, kernels=np.where(kept, t.kernels, np.nan)) for t in known.timed if t is not None]

    predictor = fit(replace(known, timed=silent))

    assert predictor.design.startswith("units")
    assert errors(predictor, random_policies(20, 7)).mean() < 0.1


def test_conversions_inside_the_kernels_have_no_time_of_their_own() -> None:
    known = measured(known_policies(40, 3))
    silent = [replace(t, conversions=dict.fromkeys(t.conversions, 0.0)) for t in known.timed if t is not None]

    predictor = fit(replace(known, timed=silent))

    assert np.isfinite(predictor.latencies(choices_of(ANATOMY, random_policies(20, 7)))).all()
    assert errors(predictor, random_policies(20, 7)).mean() < 0.2


@pytest.mark.parametrize("profiled", [True, False])
def test_in_a_whole_population_only_what_was_not_measured_is_unknown(profiled: bool) -> None:
    floats = [replace(policy, bits={}) for policy in random_policies(20, 6)]
    predictor = fit(measured(floats, profiled=profiled))
    mixed = choices_of(ANATOMY, [floats[0], uniform(ANATOMY, width=1, bits=INT8), floats[1]])

    found = predictor.latencies(mixed)

    assert np.isnan(found).tolist() == [False, True, False]
    np.testing.assert_allclose(found[[0, 2]], predictor.predict(choices_of(ANATOMY, floats[:2]))[:, 0], rtol=1e-5)


def test_without_units_an_unseen_kind_is_refused_too() -> None:
    floats = [replace(policy, bits={}) for policy in random_policies(20, 6)]
    predictor = fit(measured(floats, profiled=False))

    with pytest.raises(UnseenKernelError, match=r"runs as .*int8, which no measured policy did$"):
        predictor.predict(choices_of(ANATOMY, [uniform(ANATOMY, width=1, bits=INT8)]))


@pytest.mark.slow
def test_intervals_cover_nine_in_ten_new_policies() -> None:
    shares: list[float] = []
    for draw in range(3):
        predictor = fit(measured(known_policies(40, 100 + draw), 0.05, draw))
        new = random_policies(200, 200 + draw)
        truth = measured(new, 0.05, 50 + draw).latency_ms
        _, low, high = predictor.predict(choices_of(ANATOMY, new)).T
        shares.append(float(np.mean((low <= truth) & (truth <= high))))

    assert 0.85 <= np.mean(shares) <= 0.97, shares


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a predictor needs at least 10 measured policies, but got 9$"):
        fit(measured(random_policies(LEAST_POINTS - 1, 1)))


def test_the_same_measurements_are_fitted_alike() -> None:
    again = fit(measured(known_policies(40, 3)))

    choices = choices_of(ANATOMY, random_policies(20, 8))
    np.testing.assert_array_equal(again.predict(choices), exact().predict(choices))


# Times of nodes


def test_times_of_nodes_come_back_from_their_data() -> None:
    timed = Matcher(ANATOMY).match({"stem_0": ("Conv", 0.0123), "x.q": ("QuantizeLinear", 0.004)})

    back = timed_from_dict(timed_to_dict(timed), len(ANATOMY.ops))

    np.testing.assert_array_equal(back.kernels, timed.kernels)
    np.testing.assert_array_equal(back.weights, timed.weights)
    assert back.conversions == timed.conversions
    assert set(back.conversions) == set(CONVERSION_OF.values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conv_nchwc", "Conv"),
        ("conv_token_7", "QLinearConv"),
        ("relu_nchwc", "Conv"),
        ("conv_pre_q", "Conv"),
        ("conv/WithoutBiases/DequantizationMultiply", "Convolution"),
    ],
)
def test_a_layer_is_found_under_the_names_that_optimisers_give_it(name: str, kind: str) -> None:
    layer = next(op for op in ANATOMY.ops if op.kind == "conv")
    behind = next(op for op in ANATOMY.ops if layer.name in op.inputs)
    assert behind.kind == "relu"
    real = name.replace("conv", layer.name).replace("relu", behind.name)

    timed = Matcher(ANATOMY).match({real: (kind, 0.5)})

    assert timed.kernels[[op.name for op in ANATOMY.ops].index(layer.name)] == 0.5
    assert np.isnan(timed.kernels).sum() == len(ANATOMY.ops) - 1


def test_a_node_of_nobody_is_left_out() -> None:
    timed = Matcher(ANATOMY).match({"somebody": ("Einsum", 0.5)})

    assert np.isnan(timed.kernels).all()
    assert np.isnan(timed.weights).all()
    assert not any(timed.conversions.values())


# Calibration


class ScatteredTimer(FormulaTimer):
    """Up to as slow again, by a chance that nothing in a policy foretells."""

    def time(
        self, models: Mapping[str, Path], reference: Path | None, *, least_rounds: int = 4, most_rounds: int = 20,
        kernels: bool = False, window_ms: float = 0, round_ms: float = 0,
    ) -> dict[str, Timing]:  # fmt: skip
        del least_rounds, most_rounds, kernels, window_ms, round_ms
        found = super().time(models, reference)
        slower = {key: 1 + int(key[:4], 16) / 0xFFFF if key in models else 1.0 for key in found}  # keys are digests
        return {key: replace(t, windows_ms=tuple(slower[key] * ms for ms in t.windows_ms)) for key, t in found.items()}


def until_flat(timer: FormulaTimer, most: int, seconds: float = SECONDS) -> Calibration:
    generator = np.random.default_rng(1)

    def draw(count: int) -> list[Policy]:
        return [SPACE.random(generator) for _ in range(count)]

    return calibrate_until_flat(ANATOMY, draw, Target(), timer=timer, seconds=seconds, most=most)


@pytest.mark.slow
def test_a_calibration_stops_when_the_error_stops_falling() -> None:
    made = until_flat(ScatteredTimer(Target()), 3 * MOST_HERE)

    errors = [stage.mape for stage in made.stages[:-1]]  # the last is that of the second look
    assert made.reason == f"the held-out error stopped falling at {min(errors):.1%}; all were timed a second time"
    assert min(errors[-2:]) > 0.95 * min(errors[:-2])
    assert all(min(errors[n - 2 : n]) <= 0.95 * min(errors[: n - 2]) for n in range(3, len(errors)))  # no sooner
    assert made.stages[-1].policies == len(made.profile.points) < 3 * MOST_HERE


@pytest.mark.slow
def test_a_calibration_with_its_most_policies_times_all_a_second_time() -> None:
    timer = FormulaTimer(Target())
    made = until_flat(timer, MOST_HERE)

    assert made.stages[0].policies >= FIRST
    assert made.stages[-1].policies == len(made.profile.points) == MOST_HERE
    assert made.reason == f"{MOST_HERE} policies are the most; all were timed a second time"
    assert len(timer.timed) == 2 * MOST_HERE
    assert set(timer.timed[:MOST_HERE]) == set(timer.timed[MOST_HERE:])


def test_a_second_look_at_a_model_takes_what_a_neighbour_took_out_of_the_first() -> None:
    kernels = {"conv": Kernel(op_type="Conv", ms=0.5)}
    slow = Timing(windows_ms=(3.0, 3.01), reference_ms=6.1, kernels=kernels, busy_cores=0.1, session="first")
    quick = Timing(windows_ms=(2.0, 2.02, 2.5), reference_ms=4.0, busy_cores=0.3, session="second")

    for made, looks in (
        (slow.with_again(quick), (3.0, 2.0)),
        (replace(quick, kernels=kernels).with_again(slow), (2.0, 3.0)),
    ):
        assert made.latency_ms == 2.0
        assert made.ratio == 2.0  # beside the reference of the same session
        assert made.repeat_error == pytest.approx(0.01)
        assert made.halves_ms() == looks  # in order
        assert (made.kernels, made.busy_cores, made.session) == (kernels, 0.3, "second")


def test_a_calibration_stops_before_its_time_is_up() -> None:
    timer = FormulaTimer(Target())
    made = until_flat(timer, MOST_HERE, seconds=0.0)

    assert len(made.stages) == 1  # no second look either
    assert made.reason == "the next batch would pass 0 s"
    assert len(timer.timed) < FIRST + BATCH


def test_a_calibration_looks_for_every_kind_of_kernel() -> None:
    floats = [uniform(ANATOMY, width=width, bits=FP32) for width in (1, 0.5)]
    integers = uniform(ANATOMY, width=1, bits=INT8)

    assert covering(WORKER, floats, [floats[0], integers, integers]) == [*floats, integers]


@cache
def calibrated() -> Profile:
    return calibrate(ANATOMY, random_policies(16, 7), Target(), timer=FormulaTimer(Target()))


def test_new_measurements_replace_those_of_the_same_policy() -> None:
    first, second = calibrated().points[:2]
    slower = replace(first, latency_ms=3 * first.latency_ms)
    [fresh] = random_policies(1, 99)
    new = Point(policy=fresh, latency_ms=0.05, halves_ms=(0.05, 0.05), repeat_error=0.0, size_bytes=1000)

    more = calibrated().with_points([slower, new])

    known = {digest(point.policy): point.latency_ms for point in more.points}
    assert len(known) == len(more.points) == 17
    assert known[digest(first.policy)] == slower.latency_ms
    assert known[digest(second.policy)] == second.latency_ms
    assert more.predictor.heldout.n == 17


@pytest.mark.parametrize(("factor", "moved"), [(1.0, 0.0), (1.2, 0.2), (0.9, -0.1)])
def test_drift_is_what_the_reference_has_moved(factor: float, moved: float) -> None:
    now = Timing(windows_ms=(factor * calibrated().reference_ms,), reference_ms=None)

    assert drift(calibrated(), now) == pytest.approx(moved)
