"""The flags of every binary and the settings of every preset are those of flags_golden.json."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import flags as experiment_flags
from experiments import help as flag_help
from tests.binaries import call

GOLDEN = json.loads((pathlib.Path(__file__).parent / "flags_golden.json").read_text())
BINARIES = ("train", "compare", "merge", "report")
GUESSES = {
    "lr": "learning_rate",
    "learning-rate": "learning_rate",
    "bs": "batch_size",
    "seed": "seeds",
    "config": "preset, flagfile",
    "output_dir": "workdir",
    "logdir": "workdir",
    "num_epochs": "epochs",
    "wd": "weight_decay",
    "method": "rule",
    "backbone": "model",
    "data_root": "data_dir",
    "gpus": "devices",
    "img_size": "image_size",
    "fp16": "compute_dtype",
}
LISTING = """
import importlib, json, sys
from absl import app, flags
app.define_help_flags()
before, found = set(flags.FLAGS), {}
def short(help):  # without the meanings of values, which are docstrings of rules and classifiers
    first, *values = help.split("\\n")
    return "\\n".join([first, *(value.partition(": ")[0] for value in values)])
for binary in BINARIES:
    module = importlib.import_module(f"experiments.{binary}")
    getattr(module, "define_flags", lambda: None)()
    names = sorted(set(flags.FLAGS) - before)
    about = found[binary] = {}
    about["flags"] = {
        name: [flag.flag_type(), flag.default_as_str, short(flag.help)]
        for name, flag in ((name, flags.FLAGS[name]) for name in names)
    }
    help = importlib.import_module("experiments.help")
    about["help"], about["whole"] = (
        help.text(flags.FLAGS, module.__doc__, whole=whole) for whole in (False, True)
    )
    about["guesses"] = {}
    for guess in GUESSES:
        try:
            flags.FLAGS(["", f"--{guess}=1"])
        except flags.Error as error:
            about["guesses"][guess] = help.suggested(error, flags.FLAGS)
    for name in names:
        delattr(flags.FLAGS, name)
    for name in [name for name in sys.modules if name.startswith("experiments")]:
        del sys.modules[name]
print(json.dumps(found))
"""


def listed():
    """Flags, help and answers of each binary, from another process because flags are global."""
    code = f"BINARIES, GUESSES = {BINARIES}, {list(GUESSES)}{LISTING}"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))


def sentences(description):
    """A description without its values; absl writes some before it, and a remark after it."""
    return description.split(">: ")[-1].split("\n")[0].removesuffix(";")


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
    assert now[binary]["flags"] == GOLDEN["flags"][binary]


@pytest.mark.parametrize("binary", BINARIES)
def test_help_fits_three_screens_and_has_every_flag_with_its_default_in_a_group(now, binary):
    text, whole = now[binary]["help"], now[binary]["whole"]
    assert max(map(len, [*text.splitlines(), *whole.splitlines()])) <= 100
    assert len(text.splitlines()) <= 150
    for name, (kind, default, description) in now[binary]["flags"].items():
        assert sentences(description) in " ".join(whole.split())
        if "_orbax_" in name:  # The library defines it when train, the first binary, is imported.
            continue
        [line] = [line for line in text.splitlines() if line.startswith(f"  --{name}=")]
        shown = line.partition("=")[2].strip("'")
        wanted = (default or "").strip("'").replace("[]", "")
        assert shown.startswith(wanted.removesuffix(".0") if kind == "float" else wanted), name
    assert ("of this program:" in text) is (binary in ("compare", "merge"))


def test_the_twenty_most_used_flags_come_first_and_others_in_groups(now):
    first, _, rest = now["train"]["help"].partition("\nrun:\n")
    names = [line.split("=")[0] for line in first.splitlines() if line.startswith("  --")]
    assert len(names) == 20 and "  --learning_rate" in names and "  --rule" in names
    assert "Merge rule: perturb_and_merge, frozen," in first
    headings = [line for line in rest.splitlines() if line.endswith(":") and line[0] != " "]
    wanted = "stream model what_trains training perturbation merging classifier evaluation devices"
    assert headings == [f"{name.replace('_', ' ')}:" for name in [*wanted.split(), "files"]]
    assert "\n  --log_dir=" in now["train"]["whole"].partition("of libraries:")[2]


@pytest.mark.parametrize("binary", BINARIES)
def test_the_first_sentence_of_every_description_stands_alone(now, binary):
    leaning = ("Of ", "The same", "Their", "It ", "As ", "Which ", "With ", "By default")
    for name, (_, _, description) in now[binary]["flags"].items():
        text = sentences(description)
        assert text[:1].isupper() and text.endswith(".") or name == "coordinator_address", name
        assert not text.startswith(leaning), name


@pytest.mark.parametrize("guess", GUESSES)
def test_flags_that_people_guess_are_answered_with_ours(now, guess):
    wanted = f"Unknown command line flag '{guess}'. Did you mean: {GUESSES[guess]} ?"
    assert now["train"]["guesses"][guess] == wanted


def test_guesses_are_answered_with_flags_that_the_binary_has(now):
    assert now["merge"]["guesses"]["output_dir"].endswith("Did you mean: output ?")
    assert now["merge"]["guesses"]["lr"] == "Unknown command line flag 'lr'"
    everywhere = {"flagfile"}.union(*(now[binary]["flags"] for binary in BINARIES))
    assert everywhere >= set(flag_help.GUESSES)
    assert everywhere >= set(flag_help.MOST_USED) and len(flag_help.MOST_USED) == 20


@pytest.mark.parametrize("spelling", ["--help", "-h", "--helpfull"])
def test_help_is_printed_and_ends_the_program_well(capsys, spelling):
    with pytest.raises(SystemExit) as ended:
        call("train", "--epochs=nonsense", spelling)
    assert not ended.value.code
    assert "\n  --learning_rate=0.003 " in capsys.readouterr().out


def test_presets_have_the_settings_that_they_had():
    assert presets() == GOLDEN["presets"]
