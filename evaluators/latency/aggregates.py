"""Designs of a latency predictor that need no profile of nodes: a non-negative sum of physical terms, a Gaussian
process on the logarithms of the terms, and the sum corrected by such a process."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.metrics.pairwise import euclidean_distances

from ...spaces.plans import Choices
from .insitu import relative_nnls
from .tables import TermTables
from .units import Work, Worker

Array = NDArray[np.float64]
Predict = Callable[[Choices], NDArray[np.floating[Any]]]
FOLDS = 8
LEAST_MS = 1e-6


def columns_of(work: Work) -> dict[str, int]:
    """The kinds of work that were measured, and how many terms each has."""
    kinds = {units.kind: units.terms.shape[1] for units in work.units}
    return kinds | {name: 2 for name, amounts in work.conversions.items() if amounts[:, 0].any()}


def aggregate(work: Work, columns: dict[str, int]) -> Array:
    """Terms summed by kind, shape (n, terms), behind a constant; NaN for a policy with a kind that is no column."""
    blocks: dict[str, Array] = {}
    unseen = np.zeros(work.count, np.bool_)
    for units in work.units:
        if units.kind not in columns:
            unseen[units.row] = True
            continue
        summed = [np.bincount(units.row, weights=units.terms[:, i], minlength=work.count)
                  for i in range(units.terms.shape[1])]  # fmt: skip
        blocks[units.kind] = np.stack(summed, axis=1).astype(np.float64)
    for name, amounts in work.conversions.items():
        if name in columns:
            blocks[name] = amounts
        else:
            unseen |= amounts[:, 0] > 0
    found = [blocks.get(kind, np.zeros((work.count, width))) for kind, width in columns.items()]
    terms = np.concatenate([np.ones((work.count, 1)), *found], axis=1)
    terms[unseen] = np.nan
    return terms


def of_terms(worker: Worker, model: Callable[[Array], Array], columns: dict[str, int]) -> Predict:
    tables = TermTables(worker, columns)

    def predict(choices: Choices) -> Array:
        terms = tables.terms(choices)
        seen = np.isfinite(terms[:, 0])
        return filled(seen, model(terms[seen]) if seen.any() else terms[:0, 0])

    return predict


def out_of_fold(
    make: Callable[[Array, Array], Callable[[Array], Array]], terms: Array, latency_ms: Array,
    folds: NDArray[np.int64],
) -> Array:  # fmt: skip
    held = np.empty(len(latency_ms))
    for fold in range(FOLDS):
        out = folds == fold
        if out.any():
            held[out] = make(terms[~out], latency_ms[~out])(terms[out])
    return np.maximum(held, LEAST_MS)


def physical(terms: Array, latency_ms: Array) -> Callable[[Array], Array]:
    """Non-negative least squares on relative errors: no amount of work makes a model faster."""
    costs = relative_nnls(terms, latency_ms)
    return lambda new: np.maximum(new @ costs, LEAST_MS)


def _alone(terms: Array, latency_ms: Array) -> Callable[[Array], Array]:
    """Gaussian process on the logarithms of the terms."""
    process = process_on(np.log1p(terms), np.log(latency_ms))
    return lambda new: np.exp(process(np.log1p(new)))


def _both(terms: Array, latency_ms: Array) -> Callable[[Array], Array]:
    """The physical sum times a Gaussian process on what it leaves in the logarithm."""
    sums = physical(terms, latency_ms)
    process = process_on(np.log1p(terms), np.log(latency_ms / sums(terms)))
    return lambda new: sums(new) * np.exp(process(np.log1p(new)))


def process_on(inputs: Array, target: Array) -> Callable[[Array], Array]:
    """A Gaussian process with one length for all inputs, each brought to unit spread."""
    used = inputs.std(axis=0) > 1e-9
    centre, spread = inputs[:, used].mean(axis=0), inputs[:, used].std(axis=0)
    level, scale = target.mean(), target.std() or 1.0
    kernel: Any = ConstantKernel(1.0) * RBF(4.0, (0.5, 100.0)) + WhiteKernel(1e-2, (1e-5, 1.0))
    model: Any = GaussianProcessRegressor(kernel, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is an answer too
        model.fit((inputs[:, used] - centre) / spread, (target - level) / scale)
    smooth = model.kernel_.k1
    points, weights = model.X_train_, smooth.k1.constant_value * scale * model.alpha_
    rate = -0.5 / smooth.k2.length_scale**2

    def predict(new: Array) -> Array:
        """The posterior mean, as ``model.predict`` answers: its distances one by one take three times as long as a
        product of matrices."""
        squares = euclidean_distances((new[:, used] - centre) / spread, points, squared=True)
        return level + np.exp(squares * rate) @ weights

    return predict


AGGREGATES: dict[str, Callable[[Array, Array], Callable[[Array], Array]]] = {
    "physical terms": physical,
    "Gaussian process": _alone,
    "physical terms × Gaussian process": _both,
}


def filled(seen: NDArray[np.bool_], values: Array) -> Array:
    """The values where ``seen``, shape (n,), NaN elsewhere."""
    found = np.full(len(seen), np.nan)
    found[seen] = values
    return found
