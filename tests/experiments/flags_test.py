"""The flags of every binary and the settings of every preset are those of flags_golden.json."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import flags as experiment_flags

GOLDEN = json.loads((pathlib.Path(__file__).parent / "flags_golden.json").read_text())
BINARIES = ("train", "compare", "merge", "report")
LISTING = """
import importlib, json, sys
from absl import app, flags
app.define_help_flags()
before, found = set(flags.FLAGS), {}
for binary in BINARIES:
    module = importlib.import_module(f"experiments.{binary}")
    getattr(module, "define_flags", lambda: None)()
    names = sorted(set(flags.FLAGS) - before)
    found[binary] = {
        name: [flag.flag_type(), flag.default_as_str, flag.help]
        for name, flag in ((name, flags.FLAGS[name]) for name in names)
    }
    for name in names:
        delattr(flags.FLAGS, name)
    for name in [name for name in sys.modules if name.startswith("experiments")]:
        del sys.modules[name]
print(json.dumps(found))
"""


def listed():
    """`{binary: {flag: [type, default, help]}}`, from another process because flags are global."""
    code = f"BINARIES = {BINARIES}{LISTING}"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def presets():
    """`{preset: its flags}`, without comments."""
    return {
        path.stem: [line for line in path.read_text().splitlines() if line[:2] == "--"]
        for path in sorted(experiment_flags.PRESETS.glob("*.flags"))
    }


@pytest.fixture(scope="module")
def now():
    return listed()


@pytest.mark.parametrize("binary", BINARIES)
def test_flags_have_the_names_types_defaults_and_help_that_they_had(now, binary):
    assert now[binary] == GOLDEN["flags"][binary]


def test_presets_have_the_settings_that_they_had():
    assert presets() == GOLDEN["presets"]
