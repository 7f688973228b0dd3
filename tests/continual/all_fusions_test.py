"""Tests that compare different programs to the last bit, compiled as a user's run is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import ALL_FUSIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILE = "tests/continual/feed_test.py"


@pytest.mark.skipif(ALL_FUSIONS, reason="this process compiles as a user's run does")
def test_different_programs_agree_to_the_last_bit():
    chosen = ("-m", "different_programs", "-k", "augment")
    arguments = (FILE, *chosen, "-p", "no:cacheprovider", "-p", "no:xdist")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    assert "1 passed" in ended.stdout and "skipped" not in ended.stdout
