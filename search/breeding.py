"""A population search over tens of thousands of policies, none of which is trained."""

from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from ..spaces.policy import Policy, digest
from .encoding import Encoder

Array = NDArray[np.float64]
GENERATIONS = 8
POPULATION, MOST_POPULATION = 2_500, 4_000
"""Of a generation: where a policy has :data:`WIDE` columns or more, and at most."""
WIDE = 120
PARENTS = 200
MOST_ALIKE = 4
"""Fine-tunes of one network, those that were tried and those that are looked at closely."""


def breed(
    encoder: Encoder, parents: Array, worth: Callable[[Array], Array], generator: np.random.Generator, count: int
) -> Array:  # fmt: skip
    """Rows after some generations of crossing, mutation and choice by ``worth``, the best first. Begins with children
    of the parents, shape (n, columns), and with random rows. ``count`` of them are born in each generation."""
    pool = np.vstack([encoder.random(count // 10, generator), encoder.children(parents, count, generator)])
    worths = worth(pool)
    for _ in range(GENERATIONS - 1):
        best = np.argsort(-worths, kind="stable")[:PARENTS]
        born = encoder.children(pool[best], count, generator)
        pool, worths = np.vstack([pool[best], born]), np.concatenate([worths[best], worth(born)])
    return pool[np.argsort(-worths, kind="stable")]


def population(columns: int) -> int:
    """Policies in a generation: as many as are looked at in the time of :data:`POPULATION` wide ones."""
    return min(MOST_POPULATION, round(POPULATION * max(1.0, WIDE / columns)))


def crowded(
    networks: NDArray[np.intp], most: int = MOST_ALIKE, tried: NDArray[np.intp] | None = None
) -> NDArray[np.bool_]:
    """Of rows, the best first, those before which ``most`` of the same network stand already, shape (n,). ``tried``:
    how many of each row's network are known beside them."""
    order = np.argsort(networks, kind="stable")
    _, first, counts = np.unique(networks[order], return_index=True, return_counts=True)
    found = np.empty(len(networks), np.bool_)
    before = np.arange(len(networks)) - np.repeat(first, counts)
    found[order] = before + (tried[order] if tried is not None else 0) >= most
    return found


def fresh(encoder: Encoder, rows: Array, known: Collection[str]) -> Iterator[tuple[Array, Policy]]:
    """The rows whose policies are not known by their digests, with these; each policy once."""
    seen = set(known)
    for row in rows:
        policy = encoder.policy(row)
        key = digest(policy)
        if key not in seen:
            seen.add(key)
            yield row, policy
