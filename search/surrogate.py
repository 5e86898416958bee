"""What a policy's accuracy will be after the long fine-tune, from all that every rung has shown so far.

A Gaussian process over (policy, rung) with the intrinsic coregionalisation model (Bonilla et al. 2007, eq. 2): what a
cheap rung shows of a policy counts for the dear ones by how well rungs agree. Its linear part holds what is known
before the first trial, the additive damage of the sensitivity probes and the capacity that is left; its smooth part
learns which group, layer or block is worth more than that; another one learns the fine-tune's settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from ..spaces.policy import Policy
from .encoding import Encoder
from .pareto import MAX_DROP
from .proposals import Sensitivity
from .records import Rung

Array = NDArray[np.float64]
Parts = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
RUNGS = tuple(str(rung) for rung in Rung)
MOST_OBSERVATIONS = 240
LEAST_AT_RUNG = 3
_NOISE_FLOOR = 0.05
_PLACES = np.array([0.0, 0.0, 0.3, 0.7])
"""Where the rungs stand: the further apart, the less one says about the other. How far those that train stand from the
one that does not is learned (``Kernel.apart``)."""
_COLLAPSE = 0.5
"""Of the accuracy's scale: networks below the best by more than this are all equally useless."""
_GRID = {
    "linear": (0.5, 1.0, 2.0), "smooth": (0.1, 0.3, 0.6, 1.0), "length": (0.7, 1.4, 2.8),
    # Never less: settings that no trial has varied yet would look as if they did not matter, and never be tried.
    "hyper": (0.3, 0.6), "apart": (0.35, 0.7, 1.4, 2.8),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Accuracy of a row at a rung (an index into ``RUNGS``); ``se`` its standard error."""

    row: Array
    rung: int
    accuracy: float
    se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Accuracy a ↔ u = −log(ceiling − a): near the top a tenth of a point counts as much as whole points below,
    and the noise of a test set is about the same everywhere."""

    ceiling: float
    floor: float

    def up(self, accuracy: Array | float) -> Array:
        return -np.log(self.ceiling - np.clip(accuracy, self.floor, self.ceiling - 1e-9))

    def down(self, value: Array | float) -> Array:
        return self.ceiling - np.exp(-np.asarray(value))

    def interval(self, mean: Array, spread: Array) -> tuple[Array, Array, Array]:
        """Median and the ends of a 90 % interval of the accuracy, from the mean and standard deviation of u."""
        return self.down(mean), self.down(mean - 1.645 * spread), self.down(mean + 1.645 * spread)

    def error(self, accuracy: Array, se: Array) -> Array:
        """A standard error on the scale of u."""
        return se / np.maximum(self.ceiling - np.clip(accuracy, self.floor, self.ceiling), 1e-9)


def scale_of(observations: Sequence[Observation]) -> Scale:
    """The ceiling is a standard error above the best that was seen: no zero behind the logarithm."""
    seen = np.array([(o.accuracy, o.se) for o in observations])
    best, worst, middle = (float(f(seen[:, 0])) for f in (np.max, np.min, np.median))
    errors = seen[seen[:, 1] > 0, 1]
    margin = max(1.5 * float(np.median(errors)) if len(errors) else 0.0, 0.01 * max(best - worst, 1e-6), 1e-6)
    return Scale(ceiling=best + margin, floor=best - max(_COLLAPSE * abs(best), best - middle, margin))


class Describer:
    """Rows as the surrogate sees them: what is known to matter (linear), the network (smooth), fine-tuning (hyper)."""

    def __init__(self, encoder: Encoder, sensitivity: Sensitivity) -> None:
        self.encoder, self.shapes = encoder, encoder.shapes
        anatomy = encoder.space.anatomy
        self._channels = np.array([g.channels for g in anatomy.groups], dtype=np.float64)
        damages = [sensitivity.groups.get(g.name, 0.0) for g in anatomy.groups]
        blocks = [encoder.columns[i].name.partition(":")[2] for i in encoder.block]
        self._groups, self._blocks = np.array(damages), np.array([sensitivity.blocks.get(n, 0.0) for n in blocks])
        self._bits = _bit_damages(encoder, sensitivity)
        self._harmed = np.flatnonzero(self._bits.any(axis=1))
        self._worst = max(float(self._bits.max(axis=1, initial=0.0).sum()), 1e-9)
        self._weights = _shares(self._groups), _shares(self._blocks)
        self.total_macs = float(sum(layer.macs for layer in anatomy.layers))
        self._params = float(sum(layer.params for layer in anatomy.layers))

    def damage(self, rows: Array) -> Array:
        """Additive estimate in nats, shape (n,); a group's damage grows with its ratio squared."""
        ratios = 1 - self.encoder.kept(rows) / self._channels if len(self._channels) else np.zeros((len(rows), 0))
        removed = rows[:, self.encoder.block]
        return (2 * ratios) ** 2 @ self._groups + removed @ self._blocks + self._stored(rows).sum(axis=1)

    def macs(self, rows: Array) -> Array:
        """Share of the uncompressed model's multiply-accumulates, shape (n,)."""
        return self.shapes.totals(rows)[0] / self.total_macs

    def __call__(self, rows: Array) -> Parts:
        """(linear, smooth, hyper), each of shape (n, ·)."""
        macs, weights = self.shapes.totals(rows)
        compute = np.log(np.maximum(macs / self.total_macs, 1e-4))
        stored = np.log(np.maximum(weights / self._params, 1e-4))
        damage = np.log(self.damage(rows) + 0.01)
        narrow = (
            np.log2(np.maximum(self.encoder.kept(rows), 1) / self._channels) if len(self._channels) else rows[:, :0]
        )
        least = narrow.min(axis=1) if narrow.shape[1] else np.zeros(len(rows))
        linear = np.column_stack([compute / 3, stored / 3, damage / 3, least / 3])
        removed, low = rows[:, self.encoder.block], self._low_bits(rows)
        smooth = np.column_stack([narrow * self._weights[0] / 2, removed * self._weights[1], low, linear / 2])
        # Half the digits make the kernels of a whole population twice as quick.
        single = np.float32
        return linear.astype(single), smooth.astype(single), self._fine_tune(rows).astype(single)

    def _stored(self, rows: Array) -> Array:
        """Damage of the bits of each layer where any choice is known to do some, shape (n, ·)."""
        codes = rows[:, self.encoder.bits[self._harmed]].astype(np.intp)
        return self._bits[self._harmed, codes]

    def _low_bits(self, rows: Array) -> Array:
        """How much each layer's bits are known to damage, as a share; integers of eight bits are nearly free."""
        if not len(self.encoder.bits):
            return rows[:, :0]
        integers = self.shapes.int8(rows).mean(axis=1)
        return np.column_stack([np.sqrt(self._stored(rows) / self._worst), 0.3 * integers])

    def _fine_tune(self, rows: Array) -> Array:
        parts: list[Array] = []
        for index in self.encoder.hyper:
            column = self.encoder.columns[index]
            if column.choices:
                parts += [(rows[:, index] == i) * 0.7 for i in range(len(column.choices))]
            else:
                parts.append((rows[:, index] - column.low) / max(column.high - column.low, 1e-9) * 2)
        return np.column_stack(parts) if parts else rows[:, :0]


def _bit_damages(encoder: Encoder, sensitivity: Sensitivity) -> Array:
    """Shape (layers, choices)."""
    columns = [encoder.columns[i] for i in encoder.bits]
    known = [sensitivity.bits.get(column.name.partition(":")[2], {}) for column in columns]
    found = [[of.get(choice, 0.0) for choice in column.choices] for column, of in zip(columns, known, strict=True)]
    return np.array(found, dtype=np.float64).reshape(len(columns), -1 if columns else 0)


def _shares(damages: Array) -> Array:
    """Weights around 1: how much a choice is known to matter. None is below 0.5, since a probe is one sample."""
    if not len(damages) or damages.max() <= 0:
        return np.ones(len(damages))
    return np.clip(np.sqrt(damages / damages.mean()), 0.5, 2.0)


@dataclass(frozen=True, slots=True)
class Kernel:
    linear: float
    smooth: float
    length: float
    hyper: float
    apart: float

    def agreement(self) -> tuple[Array, Array]:
        """How well rungs agree, for the linear and the smooth part, each of shape (rungs, rungs)."""
        places = _PLACES + self.apart * (np.arange(len(RUNGS)) > 0)
        distance = np.abs(np.subtract.outer(places, places))
        return np.exp(-distance / 1.5), np.exp(-distance / 1.2)

    def near(self, a: Parts, b: Parts) -> Parts:
        """What does not depend on the rungs: products of the linear parts, nearness as networks and as fine-tunes."""
        close = _nearness(a[1], b[1], self.length)
        tuned = _nearness(a[2], b[2], 1.0) * (0.5 + 0.5 * close) if a[2].shape[1] else 0.0 * close
        return a[0] @ b[0].T, close, tuned

    def __call__(self, near: Parts, i: NDArray[np.intp], j: NDArray[np.intp]) -> Array:
        wide, alike = self.agreement()
        product, close, tuned = near
        if len(i) == 1:  # one rung asked of all: vectors do for matrices
            wide, alike, same, trained = wide[i[0], j], alike[i[0], j], i[0] == j, (i[0] > 0) & (j > 0)
        else:
            wide, alike = wide[np.ix_(i, j)], alike[np.ix_(i, j)]
            same, trained = i[:, None] == j, np.outer(i > 0, j > 0)
        # Each rung has a level of its own, of which nothing is known beforehand; and without a fine-tune its
        # settings change nothing.
        level = 0.3 + 3.0 * same
        return (
            self.linear**2 * product * wide + level + self.smooth**2 * close * alike
            + self.hyper**2 * tuned * trained
        )  # fmt: skip

    def mean(self, a: Parts, b: Parts, i: int, j: NDArray[np.intp], alpha: Array) -> Array:
        """The kernel between ``a`` at rung i and ``b`` at rungs j, times alpha, without making its matrix."""
        wide, alike = self.agreement()
        single = np.float32
        close = _nearness(a[1], b[1], self.length)
        found = a[0] @ (b[0].T @ (self.linear**2 * wide[i, j] * alpha)) + (alpha * (0.3 + 3.0 * (i == j))).sum()
        found += close @ (self.smooth**2 * alike[i, j] * alpha).astype(single)
        if a[2].shape[1] and i > 0:
            close += 1
            close *= _nearness(a[2], b[2], 1.0)
            found += close @ (0.5 * self.hyper**2 * (j > 0) * alpha).astype(single)
        return found

    def prior(self, a: Parts, i: int, j: int) -> Array:
        """Covariance of each policy's own values at two rungs, shape (n,)."""
        wide, alike = self.agreement()
        tuned = self.hyper**2 * (i > 0 and j > 0) * bool(a[2].shape[1])
        own = self.linear**2 * (a[0] ** 2).sum(axis=1) * wide[i, j]
        return own + 0.3 + 3.0 * (i == j) + self.smooth**2 * alike[i, j] + tuned


def _nearness(a: NDArray[Any], b: NDArray[Any], length: float) -> NDArray[Any]:
    """exp(−|a − b|² / 2·length²), shape (n, m): one product of matrices and three passes over what it gives, since for
    a whole population passes are what takes time."""
    left = np.column_stack([a, (a**2).sum(axis=1), np.ones(len(a), a.dtype)])
    right = np.column_stack([2 * b, -np.ones(len(b), b.dtype), -(b**2).sum(axis=1)])
    found = left @ right.T
    np.minimum(found, 0, out=found)
    found *= 0.5 / length**2
    return np.exp(found, out=found)


class Surrogate:
    """Fitted to observations; predicts u (see :class:`Scale`) at ``rung``, the highest that is known well enough."""

    def __init__(self, describer: Describer, observations: Sequence[Observation], kernel: Kernel | None = None) -> None:
        """``kernel`` None looks for the likeliest one. Raises ValueError without observations."""
        if not observations:
            raise ValueError("a surrogate needs at least one observation")
        self.scale = scale_of(observations)
        self.describer = describer
        used = _useful(observations)
        accuracy, se = np.array([o.accuracy for o in used]), np.array([o.se for o in used])
        self._rungs = np.array([o.rung for o in used], dtype=np.intp)
        self._rows = describer(np.stack([o.row for o in used]))
        self.rung = _target_rung(self._rungs)
        values = self.scale.up(accuracy)
        self._noise = _noise_by_rung(self.scale.error(accuracy, se), self._rungs)
        self._mean = float(values[self._rungs == self.rung].mean())
        self._values = values - self._mean
        self.kernel = kernel or self._likeliest()
        self._factor = cho_factor(self._gram(self.kernel), lower=True)
        self._alpha = cho_solve(self._factor, self._values)

    def _gram(self, kernel: Kernel) -> Array:
        gram = kernel(kernel.near(self._rows, self._rows), self._rungs, self._rungs)
        gram[np.diag_indices_from(gram)] += self._noise
        return gram

    def _likeliest(self) -> Kernel:
        """Coordinate search for the largest marginal likelihood (Rasmussen and Williams 2006, eq. 2.30)."""
        best = Kernel(linear=1.0, smooth=0.3, length=1.4, hyper=0.3, apart=0.7)
        score = self._likelihood(best)
        for _ in range(2):
            for name, values in _GRID.items():
                for value in values:
                    tried = replace(best, **{name: value})
                    found = self._likelihood(tried)
                    if found > score + 1e-9:
                        best, score = tried, found
        return best

    def _likelihood(self, kernel: Kernel) -> float:
        factor = cho_factor(self._gram(kernel), lower=True)
        alpha = cho_solve(factor, self._values)
        return float(-0.5 * self._values @ alpha - np.log(np.diag(factor[0])).sum())

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of u at ``rung``, each of shape (n,); without the noise of a test."""
        mean, spread, _ = self._posterior(rows, self.rung)
        return mean, spread

    def mean(self, rows: Array) -> Array:
        """Mean of u at ``rung``, shape (n,); cheaper than :meth:`predict`."""
        return self.kernel.mean(self.describer(rows), self._rows, self.rung, self._rungs, self._alpha) + self._mean

    def hoped(self, rows: Array, rung: int) -> tuple[Array, Array]:
        """Mean of u at ``self.rung``, and how far an evaluation at ``rung`` is likely to move it (one standard
        deviation), each of shape (n,).

        Only what a trial would find out is worth a trial: doubts that all neighbours share, or that only a long
        fine-tune settles, are none of its merits (the knowledge gradient, Frazier et al. 2009, eq. 2.11).
        """
        mean, spread, own = self._posterior(rows, rung)
        if rung == self.rung:
            return mean, (spread**2 / np.sqrt(spread**2 + self.noise_at(rung))).astype(np.float64)
        top, _, shared = own
        return top.astype(np.float64), np.abs(shared) / np.sqrt(spread**2 + self.noise_at(rung))

    def noise_at(self, rung: int) -> float:
        """Variance of a typical observation at a rung."""
        at = self._noise[self._rungs == rung]
        return float(np.median(at if len(at) else self._noise))

    def _posterior(self, rows: Array, rung: int) -> tuple[Array, Array, Parts]:
        """Mean and standard deviation at a rung; then the mean and standard deviation at ``self.rung`` and the
        covariance with it."""
        asked = self.describer(rows)
        known = self.explained(asked, rung)
        (mean, half), (top, other) = known[rung], known[self.rung]
        return (
            mean,
            self._spread(asked, rung, half),
            (
                top,
                self._spread(asked, self.rung, other),
                self.kernel.prior(asked, rung, self.rung) - np.einsum("ij,ij->j", half, other),
            ),
        )

    def explained(self, asked: Parts, rung: int) -> dict[int, tuple[Array, Array]]:
        """What the observations say of rows at ``rung`` and at ``self.rung``: the mean of u, shape (n,), and a factor,
        shape (observations, n), whose products are what they take off the prior's covariances."""
        near = self.kernel.near(asked, self._rows)
        found: dict[int, tuple[Array, Array]] = {}
        for r in {rung, self.rung}:
            cross = self.kernel(near, np.array([r]), self._rungs)
            half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
            found[r] = cross @ self._alpha + self._mean, half
        return found

    def _spread(self, asked: Parts, rung: int, half: Array) -> Array:
        variance = self.kernel.prior(asked, rung, rung) - np.einsum("ij,ij->j", half, half)
        return np.sqrt(np.maximum(variance, 1e-8))

    def accuracy(self, rows: Array) -> tuple[Array, Array, Array]:
        """Median and the ends of a 90 % interval of the accuracy after the highest rung, each of shape (n,)."""
        return self.scale.interval(*self.predict(rows))


def kept_accuracy(surrogate: Surrogate, min_accuracy: float | None) -> float:
    """What the point to be picked must have after the highest rung: the user's limit, or nearly that of the
    uncompressed network."""
    if min_accuracy is not None:
        return min_accuracy
    encoder = surrogate.describer.encoder
    row = encoder.row(Policy(model=encoder.space.anatomy.digest))
    return float(surrogate.scale.down(surrogate.mean(row[None]))[0]) - MAX_DROP


def _noise_by_rung(errors: Array, rungs: NDArray[np.intp]) -> Array:
    """Variance of each observation: that of its rung's typical error. By its own, which shrinks as the accuracy that
    was seen nears the top, what luck raised would weigh several times what bad luck lowered."""
    typical = {rung: float(np.median(errors[rungs == rung])) for rung in set(rungs.tolist())}
    return np.array([min(typical[rung], 1.0) ** 2 + _NOISE_FLOOR**2 for rung in rungs.tolist()])


def _target_rung(rungs: NDArray[np.intp]) -> int:
    """A rung that hardly anything has reached has a level of its own that nobody knows yet."""
    known = [rung for rung in range(len(RUNGS)) if (rungs == rung).sum() >= LEAST_AT_RUNG]
    return max(known) if known else int(rungs.max())


def _useful(observations: Sequence[Observation]) -> list[Observation]:
    """At most :data:`MOST_OBSERVATIONS`: of each policy what its highest rung showed, then an even choice of the rest
    by rung and accuracy. Of policies that are too many by themselves the long fine-tunes, the latest, and an even
    choice by their accuracy: most trials are near the front, and the fast end is known by the few that are harsh."""
    if len(observations) <= MOST_OBSERVATIONS:
        return list(observations)
    highest: dict[bytes, int] = {}
    for i, seen in enumerate(observations):
        key = seen.row.tobytes()
        if key not in highest or seen.rung >= observations[highest[key]].rung:
            highest[key] = i
    kept = sorted(highest.values())
    if len(kept) > MOST_OBSERVATIONS:
        third = MOST_OBSERVATIONS // 3
        dear = [i for i in kept if RUNGS[observations[i].rung] == Rung.LONG][-third:]
        late = [i for i in kept if i not in dear][-third:]
        others, kept = set(kept) - {*dear, *late}, [*dear, *late]
    else:
        others = set(range(len(observations))) - set(kept)
    rest = sorted(others, key=lambda i: (observations[i].rung, observations[i].accuracy))
    even = np.linspace(0, len(rest) - 1, MOST_OBSERVATIONS - len(kept)).round().astype(int)
    return [observations[i] for i in sorted([*kept, *(rest[i] for i in even)])]
