"""A latency predictor fitted to whole policies that were measured, which knows its own error.

Three designs compete by cross-validation and the best is used: a non-negative sum of physical terms; a Gaussian
process on the logarithms of the terms; and the sum corrected by a Gaussian process on its log residual. The 90 %
interval is split-conformal on the out-of-fold errors (Vovk et al. 2005; Lei et al. 2018).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LinearRegression
from threadpoolctl import threadpool_limits  # scikit-learn's own dependency

Array = NDArray[np.float64]
Predict = Callable[[Array], Array]
COVERAGE = 0.9
FOLDS = 8
LEAST_POINTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Errors on policies that the model had not seen, by cross-validation; shares in [0, 1]."""

    n: int
    mape: float
    within_5: float
    within_10: float
    spearman: float
    interval_coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """``predict`` maps terms (n, terms) to (n, 3): latency, low and high end of the 90 % interval, in ms."""

    design: str
    heldout: HeldOut
    candidates: dict[str, float]
    """Cross-validated MAPE of each design that competed."""
    out_of_fold: Array
    """Held-out prediction of each calibration point, in their order, in ms."""
    log_margin: float
    _model: Predict

    def predict(self, terms: Array) -> Array:
        latency = np.maximum(self._model(np.atleast_2d(terms)), 1e-6)
        factor = math.exp(self.log_margin)
        return np.column_stack([latency, latency / factor, latency * factor])


def fit(terms: Array, latency_ms: Array, seed: int = 0) -> Predictor:
    """Fit to calibration points: ``terms`` (n, terms), ``latency_ms`` (n,). Raises ValueError below 10 points."""
    if len(latency_ms) < LEAST_POINTS:
        raise ValueError(f"a predictor needs at least {LEAST_POINTS} measured policies, but got {len(latency_ms)}")
    # A few dozen rows: more threads would only wait for each other, for long on a busy machine.
    with threadpool_limits(limits=1, user_api="blas"):
        return _fit(terms, latency_ms, seed)


def _fit(terms: Array, latency_ms: Array, seed: int) -> Predictor:
    folds = np.random.default_rng(seed).permutation(len(latency_ms)) % FOLDS
    held = {name: _out_of_fold(make, terms, latency_ms, folds) for name, make in _DESIGNS.items()}
    errors = {name: float(np.mean(np.abs(h / latency_ms - 1))) for name, h in held.items()}
    design = min(errors, key=lambda name: errors[name])
    scores = np.abs(np.log(held[design] / latency_ms))
    return Predictor(
        design=design,
        heldout=held_out(held[design], latency_ms, scores),
        candidates=errors,
        out_of_fold=held[design],
        log_margin=conformal_margin(scores),
        _model=_DESIGNS[design](terms, latency_ms),
    )


def conformal_margin(scores: Array) -> float:
    """The ⌈(n+1)·0.9⌉-th smallest score: a new policy's error stays below it in 90 % of cases."""
    rank = min(len(scores), math.ceil((len(scores) + 1) * COVERAGE))
    return float(np.sort(scores)[rank - 1])


def held_out(predicted: Array, measured: Array, scores: Array) -> HeldOut:
    """Error figures; coverage leaves each point out of the margin that judges it."""
    errors = np.abs(predicted / measured - 1)
    covered = [scores[i] <= conformal_margin(np.delete(scores, i)) for i in range(len(scores))]
    return HeldOut(
        n=len(measured),
        mape=float(errors.mean()),
        within_5=float((errors <= 0.05).mean()),
        within_10=float((errors <= 0.10).mean()),
        spearman=spearman(predicted, measured),
        interval_coverage=float(np.mean(covered)),
    )


def spearman(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float:
    """Rank correlation; ties by order of appearance."""
    ranks = [np.argsort(np.argsort(np.asarray(v), kind="stable"), kind="stable") for v in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _out_of_fold(
    make: Callable[[Array, Array], Predict], terms: Array, latency_ms: Array, folds: NDArray[np.int64]
) -> Array:
    held = np.empty(len(latency_ms))
    for fold in range(FOLDS):
        out = folds == fold
        if out.any():
            held[out] = make(terms[~out], latency_ms[~out])(terms[out])
    return np.maximum(held, 1e-6)


def _physical(terms: Array, latency_ms: Array) -> Predict:
    """Non-negative least squares on relative errors: no amount of work makes a model faster."""
    scale = np.maximum(terms.max(axis=0), 1e-12)
    model = LinearRegression(positive=True, fit_intercept=False)
    model.fit(terms / scale / latency_ms[:, None], np.ones(len(latency_ms)))
    return lambda new: np.maximum(np.asarray(model.predict(new / scale)), 1e-6)


def _process(terms: Array, latency_ms: Array) -> Predict:
    """Gaussian process on the logarithms of the terms."""
    return _on_logs(terms, np.log(latency_ms))


def _corrected(terms: Array, latency_ms: Array) -> Predict:
    """The physical sum times a Gaussian process on what it leaves in the logarithm."""
    sums = _physical(terms, latency_ms)
    rest = _on_logs(terms, np.log(latency_ms / sums(terms)))
    return lambda new: sums(new) * rest(new)


def _on_logs(terms: Array, target: Array) -> Predict:
    logs = np.log1p(terms)
    used = logs.std(axis=0) > 1e-9
    centre, spread = logs[:, used].mean(axis=0), logs[:, used].std(axis=0)
    kernel: Any = ConstantKernel(1.0) * RBF(4.0, (0.5, 100.0)) + WhiteKernel(1e-2, (1e-5, 1.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0, n_restarts_optimizer=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is an answer too
        model.fit((logs[:, used] - centre) / spread, target)
    return lambda new: np.exp(np.asarray(model.predict((np.log1p(new)[:, used] - centre) / spread)))


_DESIGNS: dict[str, Callable[[Array, Array], Predict]] = {
    "physical terms": _physical,
    "Gaussian process": _process,
    "physical terms × Gaussian process": _corrected,
}
