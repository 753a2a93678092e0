"""Where the tests find what was built: COMPACT_CLI names the executable `compact`."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cli() -> str:
    path = os.environ.get("COMPACT_CLI")
    if not path:
        pytest.fail("COMPACT_CLI does not name the executable; run the tests through ctest or scripts/test")
    return path


@pytest.fixture(scope="session")
def demo_dir() -> pathlib.Path:
    return ROOT / "assets" / "demo"
