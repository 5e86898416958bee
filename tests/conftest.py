"""What every test shares."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    import tiny

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


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> "tiny.Cli":
    """The command line in this process."""
    import tiny  # torch and all: only for those who ask

    def call(*words: object) -> tiny.Result:
        return tiny.call(*words, capsys=capsys)

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """The system's Chromium, one for a file of tests."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra 'test'")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield launched
        launched.close()
