"""Where the tests find what was built: COMPACT_CLI names the executable `compact`."""

import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(cli, *arguments, stdin=b"", expect=0, cwd=None):
    """Standard output of the executable if it must succeed, else its messages."""
    done = subprocess.run([cli, *map(str, arguments)], input=stdin, capture_output=True, timeout=300, cwd=cwd)
    output = done.stdout.decode("utf-8", "replace")
    error = done.stderr.decode("utf-8", "replace")
    assert done.returncode == expect, f"exit code {done.returncode}\n{output}\n{error}"
    return output if expect == 0 else error


@pytest.fixture(scope="session")
def cli() -> str:
    path = os.environ.get("COMPACT_CLI")
    if not path:
        pytest.fail("COMPACT_CLI does not name the executable; run the tests through ctest or scripts/test")
    return path


@pytest.fixture(scope="session")
def demo_dir() -> pathlib.Path:
    return ROOT / "assets" / "demo"
