"""Help of the binaries: their flags under headings, and the names that people guess for them."""

import dataclasses
import itertools
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from pm_jax.continual import Config
from pm_jax.continual.settings.groups import GROUPS, WIDTH, written

MOST_USED = (
    *("preset", "workdir", "seeds", "dry_run", "baseline", "dataset", "data_dir", "scenario"),
    *("num_tasks", "model", "pretrained", "adapter", "epochs", "batch_size", "learning_rate"),
    *("rule", "curvature", "perturbation", "classifiers", "export"),
)
GROUP_OF: dict[str, str] = {
    **{field.name: field.metadata["group"] for field in dataclasses.fields(Config)},
    **dict.fromkeys(("preset", "seeds", "dry_run", "checkpoint_every", "keep_checkpoints"), "run"),
    **dict.fromkeys(("baseline", "baseline_learning_rate", "baseline_epochs"), "run"),
    **dict.fromkeys(("keep_task_models", "keep_shared_training", "tour"), "run"),
    **dict.fromkeys(("deterministic", "coordinator_address"), "devices"),
    **dict.fromkeys(("process_count", "process_index"), "devices"),
    **dict.fromkeys(("workdir", "report", "tensorboard", "compilation_cache"), "files"),
    **dict.fromkeys(("export", "export_adapter", "classifier_in_export", "overwrite"), "files"),
}
FEW = 30
"""A binary of so many flags or fewer shows them whole, whatever is asked for."""
COLUMN = 31
"""Where descriptions begin; together with `WIDTH` it fits all of them to three screens."""
ASKING = frozenset({"help", "helpshort", "helpfull", "h", "?"})
GUESSES = {
    "learning_rate": "lr base_lr peak_lr max_lr init_lr lrate",
    "head_learning_rate": "head_lr lr_head classifier_lr",
    "batch_size": "bs b batch batchsize minibatch_size train_batch_size global_batch_size "
    "per_device_train_batch_size",
    "epochs": "num_epochs n_epochs nb_epochs max_epochs num_train_epochs e",
    "seeds": "seed random_seed rng_seed random_state num_seeds",
    "preset": "config cfg conf config_file config_name experiment recipe",
    "flagfile": "config cfg conf config_file args_file options",
    "workdir": "output_dir out_dir outdir output out o save_dir save_path logdir log_dir logs "
    "run_dir exp_dir experiment_dir result_dir results_dir work_dir default_root_dir ckpt_dir "
    "checkpoint_dir resume resume_from resume_from_checkpoint",
    "output": "output_dir out_dir outdir out o out_path output_path save_path save_dir",
    "weight_decay": "wd l2 decay",
    "rule": "method algo algorithm strategy approach merge_method merging_method",
    "model": "backbone arch architecture net network model_name model_type encoder",
    "pretrained": "weights checkpoint ckpt ckpt_path pretrained_path pretrained_model "
    "model_path model_name_or_path init_from from_pretrained base_model",
    "base": "base_model pretrained",
    "dataset": "data data_path dataset_name dataset_path ds benchmark",
    "data_dir": "data_root root datadir dataset_dir data_path",
    "num_tasks": "tasks task n_tasks nb_tasks n_experiences increment",
    "base_classes": "init_cls init_classes initial_increment",
    "class_subset": "num_classes nb_classes n_classes",
    "class_order": "shuffle class_ordering order",
    "adapter": "lora peft use_lora",
    "lora_rank": "r rank lora_r",
    "lora_pattern": "target_modules lora_target_modules lora_targets",
    "optimizer": "optim opt optimiser",
    "schedule": "scheduler sched lr_schedule lr_scheduler lr_scheduler_type",
    "warmup_fraction": "warmup warmup_ratio warmup_steps warmup_epochs",
    "clip_norm": "clip clip_grad grad_clip clip_grad_norm max_grad_norm gradient_clip_val",
    "accumulation_steps": "accum accum_steps grad_accum gradient_accumulation_steps "
    "accumulate_grad_batches",
    "compute_dtype": "dtype precision fp16 bf16 bfloat16 mixed_precision amp half",
    "devices": "gpu gpus num_gpus n_gpu ngpus device num_devices accelerator",
    "image_size": "img_size input_size resolution",
    "max_tokens": "max_length max_seq_length max_seq_len seq_len",
    "hidden_sizes": "hidden hidden_size hidden_dim hidden_dims layers",
    "width": "embed_dim d_model dim hidden_size",
    "depth": "num_layers n_layers layers num_hidden_layers",
    "num_heads": "heads n_heads nhead num_attention_heads",
    "validation_fraction": "val_split val_fraction val_ratio holdout",
    "augmentation": "aug augment transforms data_augmentation",
    "epsilon": "eps rho radius",
    "temperature": "temp tau",
    "rule_settings": "density scale lam lambda alpha",
    "classifiers": "head classifier_type",
    "evaluate_on": "split eval_split eval_on",
    "checkpoint_every": "save_every save_steps save_freq save_interval checkpoint_interval",
    "keep_checkpoints": "save_total_limit max_to_keep",
    "remat": "gradient_checkpointing grad_checkpointing activation_checkpointing",
    "export": "save save_model export_path",
    "dry_run": "debug check validate print_config",
    "tensorboard": "tb wandb logger",
}
"""Flags by the names that other tools give them."""


def suggested(error: flags.Error, values: flags.FlagValues) -> str:
    """Put an error in words; for a flag that is not known, name the flags that may be meant."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        return str(error)
    guess, known = error.flagname.lower().replace("-", "_"), {*values, "flagfile"}
    ours = [name for name, others in GUESSES.items() if guess in others.split() and name in known]
    if guess in known:  # It was written with hyphens or capitals.
        ours = [guess]
    if not ours:
        return str(error)  # absl's own suggestions are names that look alike.
    return str(flags.UnrecognizedFlagError(error.flagname, suggestions=ours))


def show_if_asked(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Print the help and end, if a flag asks for it."""
    typed = itertools.takewhile(lambda argument: argument != "--", argv[1:])
    asked = {text.lstrip("-") for text in typed if text.startswith("-")} & ASKING
    if not asked:
        return
    try:
        about = sys.modules["__main__"].__doc__ or ""
        print(text(values, about, whole="helpfull" in asked), flush=True)
    except BrokenPipeError:  # As of a pipe to head, whose end Python would complain of once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def text(values: flags.FlagValues, about: str, *, whole: bool = False) -> str:
    """Write the help of a binary: the most used flags first, or all flags with all they take."""
    own, others = _flags_of(values)
    lines, parts = [about.strip()], _by_group(own.values())
    in_full = whole or len(own) <= FEW
    if not in_full:
        first = [own.pop(name) for name in MOST_USED if name in own]
        lines += ["", "The most used flags, with their defaults:"]
        lines += [line for flag in first for line in _entry(flag, _summary(flag) + _choices(flag))]
        parts = _by_group(own.values())
    for group, members in parts.items():
        lines.append(f"\n{group}:" if in_full else f"{group}:")
        for flag in members:
            lines += _entry(flag, *(_paragraphs(flag) if in_full else [_summary(flag)]))
    if whole:
        lines.append("\nof libraries:")
        lines += [line for flag in others for line in _entry(flag, *_paragraphs(flag))]
    elif not in_full:
        lines.append("--helpfull says what every value means; --flagfile=FILE reads flags.")
    return "\n".join(lines)


def _flags_of(values: flags.FlagValues) -> tuple[dict[str, flags.Flag], list[flags.Flag]]:
    """Divide the flags into those of the binary, by name, and those of libraries."""
    own, others = {}, []
    for module, members in values.flags_by_module_dict().items():
        # absl calls the main module by the name of its file.
        if module == sys.argv[0] or module.partition(".")[0] in ("experiments", "__main__"):
            own.update({flag.name: flag for flag in members})
        elif module != "absl.app":
            others += members
    return own, others


def _by_group(members: Iterable[flags.Flag]) -> dict[str, list[flags.Flag]]:
    """Sort flags into groups, of which the one of this binary alone comes first."""
    groups: dict[str, list[flags.Flag]] = {name: [] for name in ("of this program", *GROUPS)}
    for flag in sorted(members, key=lambda flag: flag.name not in MOST_USED):
        groups[GROUP_OF.get(flag.name, "of this program")].append(flag)
    return {name: found for name, found in groups.items() if found}


def _entry(flag: flags.Flag, *paragraphs: str) -> list[str]:
    """Lines of a flag: name and default at the left, paragraphs at the right."""
    label, lines = f"  --{flag.name}={_default(flag)} ", []
    if len(label) > 2 * COLUMN:
        lines, label = [label.rstrip()], ""
    for paragraph in filter(None, paragraphs):
        lines += textwrap.wrap(
            paragraph,
            WIDTH,
            initial_indent=label.ljust(COLUMN),
            subsequent_indent=" " * COLUMN,
            break_on_hyphens=False,
            break_long_words=False,
        )
        label = ""
    return lines or [label]


def _default(flag: flags.Flag) -> str:
    value: Any = flag.default
    if value in (None, "", (), []):
        return ""
    return shlex.quote(written(tuple(value) if isinstance(value, list) else value))


def _paragraphs(flag: flags.Flag) -> list[str]:
    # absl ends the help of a flag that may be repeated with a semicolon and a line that says so.
    return [line.strip().removesuffix(";") for line in (flag.help or "").split("\n")]


def _summary(flag: flags.Flag) -> str:
    """Return the first sentence of a description, without its point."""
    return _paragraphs(flag)[0].partition(". ")[0].removesuffix(".")


def _choices(flag: flags.Flag) -> str:
    """List the values that a flag takes, unless its summary does."""
    _, *values = _paragraphs(flag)
    if len(values) == 1:
        values = values[0].removeprefix("One of ").removesuffix(".").split(", ")
    names = [value.partition(": ")[0] for value in values]
    if flag.name == "preset" or all(name in _summary(flag) for name in names):
        return ""
    return f": {', '.join(names)}"
