"""What every test shares."""

import os
import tempfile

# Models are inspected once a session, and the user's own cache is left alone. Workers of xdist inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="nightpress-tests-")
    os.environ["XDG_CACHE_HOME"] = _cache.name

# Read when ray is imported, so set before any test module is.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# As the command line sets it: read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

# An example's time depends on what else the machine does; pytest-timeout bounds the whole test.
settings.register_profile("nightpress", deadline=None)
settings.load_profile("nightpress")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew", action="store_true", help="write the files in tests/golden anew")


@pytest.fixture
def renew(request: pytest.FixtureRequest) -> bool:
    """Whether a test should write its golden file rather than compare with it."""
    return bool(request.config.getoption("--renew"))
