"""The tour: what it announces and links, and that its commands do what they say."""

import re
import shlex

import pytest
from absl import flags

from experiments import flags as experiment_flags
from experiments import processes, tour
from tests.binaries import call, refused

TINY = ["--num_tasks=2", "--epochs=1", "--first_task_epochs=1", "--hidden_sizes=8"]


def commands(folder):
    """The arguments of each command, by its program and without `experiments.`."""
    typed = [line for step in tour.STEPS for line in step.commands]
    words = [shlex.split(line.format(folder=folder)) for line in typed]
    return [(module.removeprefix("experiments."), arguments) for module, *arguments in words]


@pytest.fixture
def children(monkeypatch):
    """The commands that the tour starts; nothing runs."""
    started = []

    def run(words):
        started.append(words)
        return 0

    monkeypatch.setattr(processes, "run_as_child", run)
    return started


def test_each_example_is_announced_in_a_line_with_its_commands_and_linked(
    tmp_path, capsys, children
):
    call("train", "--preset=tour", f"--workdir={tmp_path}", "--dry_run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    announced = [line for line in lines if re.match(r"\d of 5\. .*\. Look at this: .*\.$", line)]
    typed = [line.split(maxsplit=3) for line in lines if line.startswith("$ python -m ")]
    assert len(announced) == 5 and len(typed) == 6 and len(lines) == 11
    assert not children and not [*tmp_path.iterdir()]

    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "a table.csv").write_text("")
    call("train", "--preset=tour", f"--workdir={tmp_path}")
    assert [shlex.join(words) for words in children] == [words[-1] for words in typed]
    page = (tmp_path / "tour.html").read_text()
    assert re.findall(r'<a href="(.*?)">(.*?)</a>', page) == [
        ("rules/a%20table.csv", "rules/a table.csv")
    ]
    assert all(shlex.join(words).replace("'", "&#39;") in page for words in children)


def test_an_example_that_fails_ends_the_tour_with_its_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "run_as_child", lambda words: 143)
    line = refused(capsys, "train", "--preset=tour", f"--workdir={tmp_path}", code=143)
    assert line == "error: the tour ends here; the same command goes on with what is not finished"
    assert not (tmp_path / "tour.html").exists()


def test_other_programs_than_train_refuse_it(capsys):
    values = flags.FlagValues()
    flags.DEFINE_string("preset", None, "As experiments.compare has it.", flag_values=values)
    with pytest.raises(SystemExit):
        experiment_flags.parse(["compare", "--preset=tour"], values)
    line = "error: --preset=tour: is for experiments.train alone\n"
    assert capsys.readouterr().err == line


@pytest.mark.slow
def test_the_commands_are_ones_that_the_programs_take(tmp_path, capsys):
    for binary, arguments in commands(tmp_path):
        if binary == "compare":
            call(binary, *arguments, *TINY, "--dry_run")
        elif "." not in binary:  # Notebooks have a test of their own.
            call(binary, *arguments, *(TINY if binary == "train" else ()))
    assert "merged 2 models by ties: " in capsys.readouterr().out
    assert (tmp_path / "merged.safetensors").exists()
