"""Limits that no policy of the space meets are found before anything is trained."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..spaces.errors import InputError
from ..spaces.plan import plan
from ..spaces.policy import Policy
from ..spaces.space import Space, ratio_of
from .encoding import Encoder
from .session import Session

POPULATION, PARENTS, GENERATIONS = 1024, 64, 12
"""Of the search for the cheapest policy: some ten thousand are priced, which takes a second at most."""
Array = NDArray[np.float64]


def check_costs(session: Session, population: int = POPULATION) -> None:
    """Refuse limits on what is free to know that no policy of the space can meet, with the nearest reachable value.

    Raises InputError. Latency counts by the low end of its interval, as in the search.
    """
    most_ms, most_bytes = session.config.limits.max_latency_ms, session.config.limits.max_size_bytes
    cheapest = partial(_cheapest, session, population)
    _check_macs(session)
    if most_ms is not None and (found := cheapest(lambda low_ms, _: low_ms)) and found[0] > most_ms:
        raise InputError(
            f"limits.max_latency_ms is {most_ms}, but no policy of this space is predicted to be faster than "
            f"{_up(found[0])} ms on this target."
        )
    if most_bytes is not None and (found := cheapest(lambda _, size: size)) and found[1] > most_bytes:
        raise InputError(
            f"limits.max_size_bytes is {most_bytes}, but the smallest file of this space has {found[1]} bytes."
        )
    if most_ms is None or most_bytes is None:
        return
    found = cheapest(lambda low_ms, size: np.where(low_ms <= most_ms, size, 1e12 * low_ms))
    if found and found[1] > most_bytes:
        raise InputError(
            f"limits.max_latency_ms {most_ms} and limits.max_size_bytes {most_bytes} contradict each other: the "
            f"smallest file that is fast enough has {found[1]} bytes."
        )


def _check_macs(session: Session) -> None:
    """Nothing has fewer multiply-accumulates than the narrowest network without all blocks that may go."""
    most, space = session.config.limits.max_macs, session.prepared.space
    if most is not None and (least := min(plan(space.anatomy, policy).macs for policy in _harshest(space))) > most:
        raise InputError(
            f"limits.max_macs is {most}, but no network of this space has fewer than {least} multiply-accumulates "
            f"(uncompressed: {space.anatomy.macs})."
        )


def _up(value: float) -> str:
    """Three digits that are no less: what is said to be within reach must be when it is asked for."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step - 1e-9) * step:.3g}"


def check_accuracy(session: Session, given: float) -> None:
    """Once it is known how accurate the network is on the test split as it was given: refuse a ``min_accuracy`` that
    lies more than half of its error above that, and warn of one above it. A fine-tune may bring a network further than
    it was given, but hardly so far.

    Raises InputError.
    """
    least = session.config.limits.min_accuracy
    if least is None or least <= given:
        return
    above = f"limits.min_accuracy is {least:g}, but the given network has {given:.4g} on the test split"
    if least > (1 + given) / 2:
        raise InputError(f"{above}, and no compressed one will make half of its errors.")
    session.warn("baselines", f"{above}: a compressed one would have to be better than it")


def _cheapest(session: Session, population: int, loss: Callable[[Array, Array], Array]) -> tuple[float, int] | None:
    """Low end of the latency in ms and exact file size in bytes of the policy with the least ``loss`` of both, each of
    shape (n,), that a short evolution from random policies and the harshest ends of the space finds; None where the
    profile has a price for none."""
    encoder, generator = Encoder(session.prepared.space), np.random.default_rng(session.config.seed)
    rows = np.vstack([*map(encoder.row, _harshest(session.prepared.space)), encoder.random(population, generator)])
    for generation in range(GENERATIONS + 1):
        costs = session.costs_of(encoder.choices(rows))
        margin = math.exp(session.profile.predictor.log_margin)
        losses = np.where(np.isnan(costs[:, 0]), np.inf, loss(costs[:, 0] / margin, costs[:, 1]))
        rows = rows[np.argsort(losses, kind="stable")[:PARENTS]]
        if not np.isfinite(losses).any():
            return None
        if generation < GENERATIONS:
            rows = np.vstack([rows, encoder.children(rows, population, generator)])
    _, low_ms, _, size_bytes = session.predict(encoder.policy(rows[0]))
    return low_ms, size_bytes


def _harshest(space: Space) -> list[Policy]:
    """Every group as narrow as it may be, with each choice of bits, with and without the blocks that may go; what the
    space does not offer beside that, an encoder takes to the nearest."""
    narrow = {g.name: ratio_of(g, space.step_range(g)[0]) for g in space.anatomy.groups}
    found = [
        Policy(model=space.anatomy.digest, prune=narrow, bits={layer.name: bits for layer in space.anatomy.layers})
        for bits in space.bit_choices
    ]
    blocks = tuple(b.name for b in space.anatomy.blocks) if space.blocks else ()
    return found + [replace(policy, removed_blocks=blocks) for policy in found if blocks]
