"""A population search over tens of thousands of policies, none of which is trained."""

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from ..spaces.policy import Policy, digest
from .costs import QuickCosts
from .encoding import Encoder

Array = NDArray[np.float64]
GENERATIONS = 3
POPULATION = 4000
PARENTS = 200
PRICED = 48
"""Candidates whose costs are predicted exactly."""
SAME_SPEED = 0.1
"""Width of a class of latencies, as a logarithm."""


def breed(
    encoder: Encoder, parents: Array, worth: Callable[[Array], Array], generator: np.random.Generator
) -> Array:  # fmt: skip
    """Rows after some generations of crossing, mutation and choice by ``worth``, the best first. Begins with children
    of the parents, shape (n, columns), and with random rows."""
    pool = np.vstack(
        [encoder.random(POPULATION // 5, generator), encoder.children(parents, POPULATION, generator)]
    )  # fmt: skip
    worths = worth(pool)
    for _ in range(GENERATIONS - 1):
        best = np.argsort(-worths, kind="stable")[:PARENTS]
        born = encoder.children(pool[best], POPULATION, generator)
        pool, worths = np.vstack([pool[best], born]), np.concatenate([worths[best], worth(born)])
    return pool[np.argsort(-worths, kind="stable")]


def fresh(encoder: Encoder, rows: Array, quick: QuickCosts, known: Collection[str]) -> dict[str, Policy]:
    """At most :data:`PRICED` policies by digest that are not known, from the first rows on; not too many that run
    equally fast, because the quick costs may be wrong about all of those alike."""
    chosen: dict[str, Policy] = {}
    rows = rows[: 20 * PRICED]
    speeds = np.round(np.log(quick(rows)[:, 0]) / SAME_SPEED).tolist()
    counts: dict[float, int] = {}
    for row, speed in zip(rows, speeds, strict=True):
        if counts.get(speed, 0) >= PRICED // 4:
            continue
        policy = encoder.policy(row)
        key = digest(policy)
        if key not in known and key not in chosen:
            chosen[key] = policy
            counts[speed] = counts.get(speed, 0) + 1
        if len(chosen) == PRICED:
            break
    return chosen
