"""Latency and size of policies, which cost nothing to know."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..spaces.plans import Choices
from ..spaces.policy import Policy

Costs = Callable[[Policy], tuple[float, int]]
"""Predicted latency in ms and file size in bytes of a policy."""

ManyCosts = Callable[[Choices], NDArray[np.float64]]
"""The same of a batch, shape (n, 2), quick enough for tens of thousands of policies. NaN where nothing can be said."""
