"""Latency and size of policies, which cost nothing to know, and what a trial costs."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..spaces.plans import Choices
from ..spaces.policy import Policy

Costs = Callable[[Policy], tuple[float, int]]
"""Predicted latency in ms and file size in bytes of a policy."""

ManyCosts = Callable[[Choices], NDArray[np.float64]]
"""The same of a batch, shape (n, 2), quick enough for tens of thousands of policies. NaN where nothing can be said."""

Share = TypeVar("Share", float, NDArray[np.float64])


def trial_effort(macs: Share) -> Share:
    """What a trial costs beside one of the uncompressed network, from the share of its multiply-accumulates: data,
    judgement and bookkeeping do not shrink with the network."""
    return 0.3 + 0.7 * macs
