"""The programs of experiments/, called in this process."""

import pytest
from absl import flags

from experiments import compare, fisher, inspect, merge, reference, report, train
from experiments import flags as experiment_flags

BINARIES = {
    "compare": compare, "fisher": fisher, "inspect": inspect, "merge": merge,
    "reference": reference, "report": report, "train": train,
}  # fmt: skip


def call(binary, *arguments):
    """Parse and run as `app.run` would."""
    module, typed = BINARIES[binary], [binary, *map(str, arguments)]
    if hasattr(module, "define_flags"):  # its flags are its own
        values = flags.FlagValues()
        module.define_flags(values)
        return module.main(experiment_flags.parse(typed, values), values)
    flags.FLAGS.unparse_flags()
    return module.main(
        experiment_flags.parse(typed, positional=int(binary in ("inspect", "reference")))
    )


def refused(capsys, binary, *arguments, code=2):
    """The error of a call that ends with an exit code: its last line; before any work, its only."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(binary, *arguments)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and err.endswith("\n"), err
    *others, line = err.splitlines()
    assert line.startswith("error: ") and not any(other.startswith("error: ") for other in others)
    assert code != 2 or not others, err
    return line
