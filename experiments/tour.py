"""The tour of `--preset=tour`: five small examples, each of commands that one may type oneself."""

import shlex
from pathlib import Path
from typing import NamedTuple

import jinja2
from absl import flags

from experiments import flags as experiment_flags
from experiments import processes
from pm_jax import files
from pm_jax.types import InvalidInput


class Step(NamedTuple):
    """An example: the folder that it writes, what to look at in it, and its commands."""

    folder: str
    title: str
    look: str
    commands: tuple[str, ...]


STEPS = (
    Step(
        "rules",
        "Merge rules side by side",
        "which rule forgets least, and which has the best final accuracy.",
        (
            "experiments.compare --rules=perturb_and_merge,averaging,ties,sequential "
            "--workdir={folder}",
        ),
    ),
    Step(
        "curvature",
        "One rule, four curvatures",
        "how much accuracy a better curvature brings, and what it costs in seconds and state.",
        (
            "experiments.compare --rules=perturb_and_merge "
            "--curvature=identity,fisher_empirical,fisher_exact,kronecker --workdir={folder}",
        ),
    ),
    Step(
        "classifiers",
        "Classifiers over all classes",
        "each classifier is a column, from one training; the last sentence says whether to adapt.",
        (
            "experiments.compare --scenario=class_incremental "
            "--rules=frozen,sequential,perturb_and_merge "
            "--classifiers=trained,discriminant:drift_correction=affine,ridge --workdir={folder}",
        ),
    ),
    Step(
        "",
        "Your own training loop",
        "five lines of experiments/notebooks/nnx_optimizer.py, marked by '# <-', add the method; "
        "after the merge both tasks are known.",
        ("experiments.notebooks.nnx_optimizer",),
    ),
    Step(
        "files",
        "Merging files, without data or training",
        "the models of five tasks, which need no rule while they train, become one file.",
        (
            "experiments.train --rule=sequential --perturbation=none --keep_task_models "
            "--noreport --workdir={folder}/run",
            "experiments.merge --run={folder}/run/seed_0 --rule=ties --overwrite "
            "--output={folder}/merged.safetensors",
        ),
    ),
)
ALLOWED = {"tour", "preset", "workdir", "dry_run"}
LINKED = (".html", ".csv", ".png", ".safetensors")
"""Files that the page links, in this order."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>A tour of pm_jax</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>A tour of pm_jax</h1>
<ol>
{% for step, lines, names in steps %}
<li><p><b>{{ step.title }}.</b> Look at this: {{ step.look }}</p>
<pre>{{ lines | join("\n") }}</pre>
{% if names %}
<p>Written:{% for name in names %} <a href="{{ name | urlencode }}">{{ name }}</a>{% endfor %}</p>
{% endif %}
</li>
{% endfor %}
</ol>
</body>
</html>
"""


def run() -> None:
    """Run the examples one after another, and write a page of links into the work directory.

    Raises:
        InvalidInput: other flags are given, or no work directory.
    """
    values = flags.FLAGS
    for name in values:
        if values[name].present and name not in ALLOWED:
            raise InvalidInput(
                f"{name}={values[name].value}: does not go with preset=tour, whose examples have "
                "their own settings; see them with --dry_run, and change one of their commands"
            )
    if not values.workdir:
        raise InvalidInput("workdir=: needs a directory, as --workdir=runs/tour")
    workdir, shown = Path(values.workdir), []
    for number, step in enumerate(STEPS, start=1):
        print(f"\n{number} of {len(STEPS)}. {step.title}. Look at this: {step.look}", flush=True)
        folder = workdir / step.folder
        lines = []
        for command in step.commands:
            words = shlex.split(command.format(folder=shlex.quote(str(folder))))
            lines.append(shlex.join(["python", "-m", *words]))
            print(f"$ {lines[-1]}", flush=True)
            if not values.dry_run and (code := processes.run_as_child(words)):
                # The command has said why.
                line = "the tour ends here; the same command goes on with what is not finished"
                experiment_flags.fail(line, code=max(code, 1))
        written = [path for end in LINKED for path in sorted(folder.glob(f"*{end}")) if step.folder]
        shown.append((step, lines, [path.relative_to(workdir).as_posix() for path in written]))
    if not values.dry_run:
        page = workdir / "tour.html"
        template = jinja2.Template(PAGE, autoescape=True, trim_blocks=True)
        files.write_text(page, template.render(steps=shown))
        print(f"\nwritten: {page}, with links to all that the examples wrote")


if __name__ == "__main__":
    experiment_flags.fail(
        "experiments.tour is a preset; use python -m experiments.train --preset=tour "
        "--workdir=runs/tour"
    )
