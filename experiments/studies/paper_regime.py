r"""The paper's regime, some 400 steps a task from pre-trained weights, cell by cell.

A cell is one training, evaluated with all of --classifiers on test and on validation data, and one
line of the ledger in experiments/studies/results; cells that have a line are left out. They run in
the order of what they teach: the rules of FIRST, their bound, other seeds, other rates, OTHERS. A
cell takes about a minute on an H100. With --minutes as many run as fit, and the same command goes
on later. --tables prints the tables of the ledger alone.

python -m experiments.studies.paper_regime --preset=cifar100_10_vit_tiny_paper --minutes=8 \
    --data_dir=DIR --pretrained=vit_tiny.safetensors
python -m experiments.studies.paper_regime --tables

For a machine without tensorflow-datasets, the first command makes a folder of under 60 MiB with
images and weights here; the folder goes there, and the second command runs there:

python -m experiments.studies.paper_regime --preset=cifar100_10_vit_tiny_paper \
    --pack=runs/card_cifar100 --data_dir=DIR --pretrained=vit_tiny.safetensors
python -m experiments.studies.paper_regime --preset=cifar100_10_vit_tiny_paper \
    --packed=runs/card_cifar100 --minutes=7
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import flags as experiment_flags
from experiments.studies import packed_images, study
from pm_jax import files
from pm_jax.continual import Config
from pm_jax.types import InvalidInput

RESULTS = Path(__file__).parent / "results" / "paper_regime.jsonl"
FIRST = (
    *("frozen", "sequential", "averaging", "perturb_and_merge"),
    "perturb_and_merge+perturbation=none",
)
BOUND = "joint"
OTHERS = (
    *("pam", "became", "null_space", "opcm", "regmean"),
    "averaging+perturbation=symmetric",
)
SEEDS = (1, 2)
RATES = (3e-4, 1e-4)
IMAGES, WEIGHTS = "images.npz", "weights"
"""Names in a packed folder; the weights have the ending of their file besides."""
TINY: dict[str, Any] = {
    "scenario": "class_incremental",
    "num_tasks": 2,
    "epochs": 1,
    "first_task_epochs": 1,
    "hidden_sizes": (4,),
    "classifiers": ("trained", "discriminant"),
}


def cells(regime: study.Study, *, tiny: bool) -> Iterator[study.Cell]:
    """Yield the cells, the most telling first."""
    rate = regime.base.learning_rate
    kinds = [
        [(rule, rate, 0) for rule in FIRST],
        [(BOUND, rate, 0)],
        [(rule, rate, seed) for seed in SEEDS for rule in (*FIRST, BOUND)],
        # The rate of the backbone is none of the frozen model's.
        [(rule, other, 0) for other in RATES for rule in FIRST[1:]],
        [(rule, rate, 0) for rule in OTHERS],
    ]
    for kind in kinds:
        yield from (regime.cell(*cell) for cell in kind[-1 if tiny else 0 :])


def pack(config: Config, folder: Path) -> None:
    """Make a folder with the images and the weights of a run, and print its size.

    Raises:
        InvalidInput: the folder cannot be made, or the images or the weights cannot be read.
    """
    files.check_folder("pack", folder)
    weights = Path(config.pretrained)
    if not weights.is_file():
        raise InvalidInput(f"pretrained={weights}: there is no such file; name one to pack")
    folder.mkdir(exist_ok=True)
    packed_images.pack(config, folder / IMAGES)
    shutil.copyfile(weights, folder / (WEIGHTS + weights.suffix))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB")


def unpacked(folder: Path, workdir: Path) -> dict[str, str]:
    """Return dataset and weights of a packed folder, the images unpacked in a work directory.

    Raises:
        InvalidInput: the folder lacks them, or the images are damaged.
    """
    weights = sorted(folder.glob(f"{WEIGHTS}.*"))
    if not weights or not (folder / IMAGES).is_file():
        raise InvalidInput(f"packed={folder}: lacks {IMAGES} or {WEIGHTS}; make it with --pack")
    images = workdir / IMAGES
    packed_images.unpack(folder / IMAGES, images)
    return {"dataset": str(images), "pretrained": str(weights[0])}


def main(argv: Sequence[str]) -> None:
    """Run the cells that are missing, as long as there is time, and print the tables."""
    del argv
    values = flags.FLAGS
    with experiment_flags.exits():
        # Each stream has its own runs and its own images.
        workdir = Path(values.workdir, values.stream or values.preset or "")
        path = Path(values.ledger or (workdir / RESULTS.name if values.tiny else RESULTS))
        if values.tables:
            return study.print_ledger(path)
        if not (values.tiny or values.preset or values.stream):
            raise InvalidInput("stream=: name the stream, or take its preset")
        if values.pack:
            return pack(experiment_flags.config_from_flags(), Path(values.pack))
        instead: dict[str, Any] = dict(TINY) if values.tiny else {}
        if values.packed:
            instead |= unpacked(Path(values.packed), workdir)
        base = experiment_flags.config_from_flags(**instead)
        rules = (*FIRST, BOUND, *OTHERS)
        regime = study.Study(base, rules, RATES, workdir=workdir, path=path)
        chosen = list(cells(regime, tiny=values.tiny))
        for cell in chosen:
            regime.find(cell)  # for its errors
        regime.run_missing(chosen)


def define_flags() -> None:
    """Define the flags of this program alone, as tests import it beside others."""
    study.define_flags(
        "runs/paper_regime",
        f"experiments/studies/results/{RESULTS.name}, or one in WORKDIR with tiny",
    )
    flags.DEFINE_string("pack", "", "Folder to pack images and weights into; nothing runs then.")
    flags.DEFINE_string("packed", "", "Such a folder, in place of --dataset and --pretrained.")
    flags.DEFINE_boolean("tiny", False, "Go through it on digits, with one cell of each kind.")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=experiment_flags.parse)
