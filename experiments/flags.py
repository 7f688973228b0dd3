"""Command-line flags: generated from `Config`, with presets, help and one-line errors."""

import contextlib
import dataclasses
import errno
import functools
import logging as standard_logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging

from experiments import compiled_programs
from experiments import help as flag_help
from pm_jax import rules
from pm_jax.continual import Config, RunOptions, TrainingDiverged
from pm_jax.continual.export import Destinations
from pm_jax.continual.interruption import Interrupted
from pm_jax.continual.settings.groups import written
from pm_jax.continual.settings.run_options import KEPT
from pm_jax.continual.settings.settings import names_of
from pm_jax.registries import number
from pm_jax.types import InvalidInput, cause

PRESETS = Path(__file__).parent / "presets"

SEQUENTIAL_ON_DEFAULT_STREAM: dict[str, Any] = {"learning_rate": 3e-4, "epochs": 1}
"""experiments/studies/ablation.py chose these by validation accuracy."""

SEQUENTIAL_DEPENDS_ON = {
    *names_of("stream", "model", "training", identity=True),
    *("devices", "fsdp"),  # The choice was made on one device, and more of them round sums apart.
    *(
        "classifiers",
        "drift_correction",
    ),  # It is no matter of merging alone, but says what predicts.
} - SEQUENTIAL_ON_DEFAULT_STREAM.keys()
"""Settings that must have their defaults for this choice to hold."""


class _TupleParser(flags.ArgumentParser):
    """Comma-separated numbers or names; floats may be given as fractions."""

    def __init__(self, number: type):
        super().__init__()
        self._number = number
        self.syntactic_help = f"{'names' if number is str else 'numbers'} separated by commas"

    def parse(self, argument: Any) -> tuple:
        if isinstance(argument, tuple):
            return argument
        try:
            parts = [part for part in argument.split(",") if part]
            read = number if self._number is float else self._number
            return tuple(read(part) for part in parts)
        except ValueError:
            kind = "whole numbers" if self._number is int else "numbers or fractions"
            raise ValueError(f"must be {kind} separated by commas") from None


class _TupleSerializer(flags.ArgumentSerializer):
    def serialize(self, value: Sequence) -> str:
        return written(tuple(value))


def define_tuple(name: str, default: tuple, description: str, number: type | None = None) -> None:
    """Define a flag of numbers or names with commas, of the type given or the default's."""
    parser = _TupleParser(number or (type(default[0]) if default else str))
    flags.DEFINE(parser, name, default, description, serializer=_TupleSerializer())


@functools.cache  # one process may import two binaries
def define_config_flags() -> None:
    """Define one flag per field of `Config`."""
    for field in dataclasses.fields(Config):
        about = field.metadata
        values = [f"{name}: {meaning}" for name, meaning in about["meanings"].items()]
        if about["choices"] and not values:
            values = [f"One of {', '.join(about['choices'])}."]
        description = "\n".join([about["description"], *values])
        default = field.default
        if isinstance(default, tuple):
            define_tuple(field.name, default, description)
        elif isinstance(default, bool):
            flags.DEFINE_boolean(field.name, default, description)
        elif isinstance(default, int):
            flags.DEFINE_integer(field.name, default, description)
        elif isinstance(default, float):
            flags.DEFINE_float(field.name, default, description)
        else:
            flags.DEFINE_string(field.name, str(default), description)
    flags.DEFINE_string(
        "preset",
        None,
        "File of flags in experiments/presets, such as digits_classes. Flags on the command line "
        "go before it.\n"
        f"One of {', '.join(presets())}.",
    )


def presets() -> list[str]:
    """List the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.flags"))


def config_from_flags(**instead: Any) -> Config:
    """Make the configuration of the parsed flags, some replaced; raises `InvalidInput`."""
    values = flags.FLAGS
    settings = {field.name: values[field.name].value for field in dataclasses.fields(Config)}
    return Config(**{**settings, **instead})


def parse_setting(name: str, text: str) -> Any:
    """Read the value of a setting as its flag would; raises `ValueError`."""
    return flags.FLAGS[name].parser.parse(text)


@functools.cache  # one process may import two binaries
def define_run_flags() -> None:
    """Define which seeds run, and where to."""
    define_tuple("seeds", (0,), "Seeds with commas between them: one run of each.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder for results, checkpoints and logs. The same command goes on from what is there.",
    )
    flags.DEFINE_integer(
        "checkpoint_every",
        0,
        "Steps between checkpoints within a task; 0: none within tasks. They are written while "
        "training goes on.",
    )
    flags.DEFINE_integer(
        "keep_checkpoints", KEPT, "Number of the newest checkpoints that stay, at least 1."
    )
    flags.DEFINE_boolean(
        "deterministic",
        False,
        "Use XLA's deterministic operations only, on a GPU; slower. The same command then gives "
        "the same bits, with a kill on the way too. A CPU always does.",
    )
    flags.DEFINE_boolean("tensorboard", False, "Write TensorBoard events beside the other logs.")
    flags.DEFINE_boolean(
        "dry_run",
        False,
        "Check everything, print settings and parameter counts, and stop.",
    )
    compiled_programs.define_flag()


def options_from_flags(**more: Any) -> RunOptions:
    """Make the options of the parsed run flags, and check the seeds; raises `InvalidInput`."""
    values = flags.FLAGS
    check_seeds("seeds", values.seeds)
    return RunOptions(
        values.checkpoint_every, values.keep_checkpoints, tensorboard=values.tensorboard, **more
    )


def check_seeds(name: str, seeds: Sequence[int]) -> None:
    """Raise `InvalidInput` unless a flag has one seed or more."""
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32:
        given = ",".join(map(str, seeds))
        raise InvalidInput(f"{name}={given}: needs one or more whole numbers from 0 to {2**32 - 1}")


def define_baseline_flags() -> None:
    """Define the flags of a second run beside the main one."""
    flags.DEFINE_string(
        "baseline",
        None,
        "Second rule to run, unperturbed; empty: none, not given: sequential or none. It runs in "
        "WORKDIR/baseline. Not given, it is sequential if --rule is not given either, and none "
        "otherwise.",
    )
    default = (
        "By default sequential's best one where stream, model and optimiser are the default ones, "
        "and that of the main run otherwise."
    )
    flags.DEFINE_float(
        "baseline_learning_rate", None, f"Peak learning rate of the baseline. {default}"
    )
    flags.DEFINE_integer(
        "baseline_epochs", None, f"Passes of the baseline over the data of a task. {default}"
    )


def baseline_from_flags(config: Config) -> Config | None:
    """Make the baseline's configuration, unperturbed; `None` for no baseline."""
    values = flags.FLAGS
    rule = values.baseline
    if rule is None:
        rule = "" if values["rule"].present else "sequential"
    if not rule:
        return None
    if rule not in rules.REGISTRY:
        raise InvalidInput(f"baseline={rule}: must be one of {', '.join(rules.REGISTRY)}")
    chosen = {"learning_rate": config.learning_rate, "epochs": config.epochs}
    if rule == "sequential" and _is_default_stream(config):
        chosen = dict(SEQUENTIAL_ON_DEFAULT_STREAM)
    for name in chosen:
        given = values[f"baseline_{name}"].value
        if given is not None and not 0 < given < math.inf:
            raise InvalidInput(f"baseline_{name}={given}: must be above 0 and finite")
        chosen[name] = given or chosen[name]
    settings: dict[str, Any] = {"perturbation": "none", "perturb_per": "batch", **chosen}
    return dataclasses.replace(config, rule=rule, rule_settings="", **settings)


def define_export_flags() -> None:
    """Define where the merged model goes."""
    flags.DEFINE_string(
        "export",
        None,
        "A .safetensors file to write the merged model to. It has the run's resolution, a column c "
        "of the classifier for label c, and the names of the pre-trained weights, or timm's where "
        "there are none or AugReg's. A run that is finished is not trained again.",
    )
    flags.DEFINE_string(
        "export_adapter",
        None,
        "Folder to write the merged model to as a LoRA adapter for PEFT. The adapter is its "
        "displacement from the pre-trained weights; needs adapter=lora and pretrained.",
    )
    flags.DEFINE_string(
        "classifier_in_export",
        None,
        "Classifier whose kernel and bias exports have; by default the first. It is one of "
        "--classifiers and linear in the features.",
    )
    define_overwrite_flag()


@functools.cache  # one process may import two binaries
def define_overwrite_flag() -> None:
    """Define whether files that are there may be replaced."""
    flags.DEFINE_boolean("overwrite", False, "Let exports replace files that are there.")


def export_from_flags() -> Destinations:
    """Make the destinations that the parsed flags name for the merged model."""
    values = flags.FLAGS
    paths = (values.export, values.export_adapter)
    model, adapter = (Path(path) if path else None for path in paths)
    return Destinations(model, adapter, values.overwrite, values.classifier_in_export or None)


def _is_default_stream(config: Config) -> bool:
    """Tell whether the choice for sequential training applies to a configuration."""
    default = Config()
    return all(getattr(config, name) == getattr(default, name) for name in SEQUENTIAL_DEPENDS_ON)


def parse(
    argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, *, positional: int = 0
) -> list[str]:
    """Parse for `app.run`: show help, read presets, end with a line and code 2 on a mistake."""
    flag_help.show_if_asked(argv, values)
    try:
        arguments = _with_preset(argv, values)
    except InvalidInput as error:
        fail(str(error), values)
    try:
        rest = values(arguments)
    except flags.CantOpenFlagFileError as error:
        fail(
            f"flagfile: {error.args[0].split(': ', 1)[-1]}; give the path of a readable file",
            values,
        )
    except flags.Error as error:
        fail(
            f"{flag_help.suggested(error, values)}; --help lists the flags and what they take",
            values,
        )
    except ValueError as error:  # A flagfile, or its name, has bytes that are not text.
        given = ",".join(_given(arguments, "flagfile"))
        fail(f"flagfile={given}: cannot be read ({cause(error)}); give text in UTF-8", values)
    if not flags.FLAGS["verbosity"].present:
        _quieten_orbax()
    if "deterministic" in values and values["deterministic"].value:
        # XLA reads this when JAX first looks for devices, which nothing has done yet.
        given_flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given_flags} --xla_gpu_deterministic_ops=true".lstrip()
    if "compilation_cache" in values:
        compiled_programs.keep_in(values["compilation_cache"].value)
    if len(rest) > 1 + positional:
        fail(f"{rest[1 + positional]!r}: not a flag; settings are given as --name=value", values)
    if "preset" in values and values["preset"].present and not _given(argv, "preset"):
        preset = values["preset"].value
        fail(f"preset={preset}: does not count in a flagfile; give it as a flag", values)
    return rest


@functools.cache  # Every further call would wrap the hook once more.
def _quieten_orbax() -> None:
    """Silence Orbax's logs, and what threads of failed saves print: it raises an error anyway."""
    logging.set_verbosity(logging.FATAL)
    for name in ("asyncio", "concurrent.futures"):
        standard_logging.getLogger(name).setLevel(standard_logging.CRITICAL)
    before = sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = without_closed_loops


def _with_preset(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Put the flags of `--preset=NAME` before all other flags, so that they override it."""
    result = [argv[0]]
    for name in _given(argv, "preset"):
        if name not in presets():
            raise InvalidInput(f"--preset={name}: must be one of {', '.join(presets())}")
        lines = (PRESETS / f"{name}.flags").read_text().splitlines()
        preset = [line for line in lines if line.startswith("--")]
        if "--tour" in preset and "tour" not in values:
            raise InvalidInput(f"--preset={name}: is for experiments.train alone")
        # Only experiments.train runs a baseline beside the rule; other binaries choose their rows.
        left_out = [x for x in preset if x.startswith("--baseline") and "baseline" not in values]
        if left_out:
            names = ", ".join(left_out)
            print(f"--preset={name}: without {names}, for experiments.train only", file=sys.stderr)
        result.extend(line for line in preset if line not in left_out)
    return [*result, *argv[1:]]


def _given(argv: Sequence[str], name: str) -> list[str]:
    """Find the values in `--name=value` and `--name value`."""
    texts = []
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            texts.append(value if equals else following)
    return texts


def fail(message: str, values: flags.FlagValues = flags.FLAGS, *, code: int = 2) -> NoReturn:
    """End with one line on standard error, which may begin with the name of a flag.

    The exit code is 2 for a mistake of the user, and 1 for what went wrong during a run.
    """
    line = " ".join(message.split())
    name = line.split("=", 1)[0]
    if name in values:
        line = f"--{line}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def exits(values: flags.FlagValues = flags.FLAGS) -> Iterator[None]:
    """End as `fail` does on errors that a user can do something about; others pass.

    The exit code is 2 for a mistake of the user, 1 for what happened during a run, and 128 plus the
    signal's number after a request to end. Errors begin with the name of one of `values`.
    """
    try:
        yield
    except InvalidInput as error:
        fail(str(error), values, code=1 if _without_room(error) else 2)
    except TrainingDiverged as error:
        fail(str(error), values, code=1)
    except Interrupted as error:
        fail(str(error), values, code=128 + error.signal_number)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            fail(f"{error.filename}: the name is too long; choose another", values)
        if line := _of_the_machine(error, values):
            fail(line, values, code=1)
        raise


def _of_the_machine(error: Exception, values: flags.FlagValues) -> str | None:
    """Say in a line what is wrong with disk or memory; `None` if the program is at fault."""
    workdir = values["workdir"].value if "workdir" in values else None
    again = "; the same command goes on from what was saved" if workdir else ""
    if isinstance(error, OSError) or _without_room(error):
        places = (workdir and f"workdir={workdir}", getattr(error, "filename", None))
        where = ": ".join(str(place) for place in places if place) or "disk"
        remedy = "make room there" if _without_room(error) else "set right what is there"
        reason = getattr(error, "strerror", None) or cause(error)
        return f"{where}: cannot be written or read ({reason}); {remedy}{again}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        remedy = "leave it more memory"
        if "resident_mb" in values:
            # Models of one's own and the mlp have no such blocks.
            has_blocks = values.model != "mlp" and ":" not in values.model
            blocks = "remat=blocks or " if has_blocks and values.remat == "none" else ""
            remedy = (
                f"set {blocks}resident_mb, which is {values.resident_mb}, or, in another work "
                f"directory, take a smaller model or batch_size than {values.batch_size}, with "
                f"more accumulation_steps than {values.accumulation_steps}"
            )
        return f"out of memory ({cause(error)}); {remedy}{again}"
    return None


def _without_room(error: BaseException | None) -> bool:
    """Tell whether a full disk is the cause of an error."""
    while error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        # TensorStore and safetensors say so in words only.
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False
