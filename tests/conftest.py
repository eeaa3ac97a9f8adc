"""Device of the tests: ``--device cuda`` runs all tests that can use a GPU there, marked ``gpu``."""

import importlib.util
import os
import sys

import pytest
import torch
from hypothesis import settings

# Triton reads the variable when it is imported, which the conftest of a folder does before pytest has parsed options.
# Workers of pytest-xdist inherit it.
_AFTER = " ".join(sys.argv).replace("--device=", "--device ").partition("--device ")[2]
if (
    _AFTER.split(" ")[0] in ("", "cpu")
    and "PYTEST_XDIST_WORKER" not in os.environ
    and importlib.util.find_spec("triton")
):
    os.environ["TRITON_INTERPRET"] = "1"


# A first example imports and compiles; no test is timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--device``."""
    parser.addoption("--device", default="cpu", help="device of the tests that take one (default: cpu)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that use the device as ``gpu`` if it is one."""
    if config.getoption("--device") != "cpu":
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of ``--device``; inputs are drawn on the CPU, so they are equal on all devices."""
    return torch.device(request.config.getoption("--device"))
