import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.py"))
HEAVY = ("tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn", "absl.flags")


def test_import_loads_nothing_heavy():
    """Beyond what jax, flax, optax and chex load themselves."""
    script = (
        "import sys, jax, flax.linen, optax, chex; before = set(sys.modules); import pm_jax; "
        "print(*sorted(set(sys.modules) - before))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    loaded = ended.stdout.split()
    assert "pm_jax.rules" in loaded, ended.stderr
    assert [name for name in loaded if name.startswith(HEAVY)] == []
    assert all(name.startswith("pm_jax") for name in loaded), loaded


def test_import_alone_loads_nothing_heavy():
    script = "import sys, pm_jax; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    loaded = set(ended.stdout.split())
    for name in ("tensorflow", "tensorflow_datasets", "orbax.checkpoint", "matplotlib", "sklearn"):
        assert name not in loaded


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path):
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "task 2: alpha" in ended.stdout
    assert "# %%" in path.read_text()
