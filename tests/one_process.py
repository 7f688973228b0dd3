"""Several programs one after another in one other process, which imports what they share once.

echo '[["package.module", "--flag=1"]]' | python -m tests.one_process
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parents[1]


def outputs(*commands):
    """What each of the commands, a module and its arguments, prints as `python -m` would."""
    ended = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def _printed(module, *arguments):
    """Run a program, whose flags are gone afterwards, and return what it prints."""
    before, printed = set(flags.FLAGS), io.StringIO()
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return printed.getvalue()


if __name__ == "__main__":
    app.define_help_flags()
    print(json.dumps([_printed(*command) for command in json.load(sys.stdin)]))
