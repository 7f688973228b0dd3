"""The speed of LoRA-P&M on a GPU: one command, under 8 minutes, no network, no data.

python -m experiments.benchmarks.accelerator --json=table.json
python -m experiments.benchmarks.accelerator --parts=step,peer,run --profile=kernels.txt
python -m experiments.benchmarks.accelerator --parts=fisher,compiled_peer

Random uint8 images and random weights; needs jax, flax, optax, orbax and absl, and for the peer's
rows torch, transformers and peft. Every part runs in a process of its own, is given up after its
seconds, and prints its rows as they are measured; the two calls of some parts take 5 minutes each
at most. What several parts compile is compiled once, and kept no longer unless
JAX_COMPILATION_CACHE_DIR is set. `--tiny` runs everything on any machine; its figures mean nothing.
"""

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments import flags as experiment_flags
from experiments.benchmarks import accelerator_parts as parts
from experiments.benchmarks.accelerator_parts import Row, number
from pm_jax import files
from pm_jax.types import InvalidInput

LIMITS = {"step": 120, "peer": 60, "fisher": 90, "run": 120, "compiled_peer": 150}
"""Seconds after which a part is given up, by name; the most telling part comes first."""
PEER, COMPILED_PEER = "transformers + peft, images/s", "the same with torch.compile, images/s"
EAGER, COMPILED = "ours / peer", "ours / compiled peer"
GOALS = {parts.SHARE: 50, EAGER: 1.6, COMPILED: 1.2, parts.FISHER: 1.15, parts.WHOLE_RUN: 75}


class Table:
    """Rows by name, printed as soon as they are measured."""

    def __init__(self):
        self.rows: dict[str, float | str] = {}

    def add(self, name: str, value: float | str) -> None:
        """Print and keep a row."""
        if isinstance(value, float) and math.isnan(value):
            value = "not measured"
        self.rows[name] = value
        shown = value if isinstance(value, str) else f"{value:,.3f}"
        goal = f"  (goal {GOALS[name]:g})" if name in GOALS else ""
        print(f"{name:44s}{shown:>16s}{goal}", flush=True)


def measured_apart(
    rows: Callable[..., Iterator[Row]], arguments: Sequence[Any], seconds: float
) -> Iterator[Row]:
    """Yield rows as another process measures them, at the end one that says why if it is early."""
    end, name = time.monotonic() + seconds, f"  {rows.__name__}"
    context = multiprocessing.get_context("forkserver")
    # The server has the imports, but no device: every process begins with a bare card.
    context.set_forkserver_preload([parts.__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, rows, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            if (row := receiver.recv()) is None:
                process.join(10)
                return
            yield row
        yield name, f"given up after {seconds:.0f} s"
    except EOFError:
        yield name, "failed: its process has ended"
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, rows: Callable[..., Iterator[Row]], *arguments: Any) -> None:
    for row in rows(*arguments):
        sender.send(row)
    sender.send(None)


def rows_of(part: str, size: str, seconds: float, profile: str) -> Iterator[Row]:
    """Yield the rows of a part within some seconds."""
    if part in ("peer", "compiled_peer"):
        # The peer has a process of its own in any case.
        compiled = part == "compiled_peer"
        name = COMPILED_PEER if compiled else PEER
        yield name, parts.peer_rate(parts.SIZES[size], seconds, compiled=compiled)
    elif part == "step":
        yield from measured_apart(parts.step, (size, profile), seconds)
    else:
        yield from measured_apart(getattr(parts, part), (size,), seconds)


def measure(names: Sequence[str], size: str, seconds: float, profile: str) -> Table:
    """Measure parts in their order, as far as some seconds go, and the ratios to the peers."""
    end, table = time.monotonic() + seconds, Table()
    table.add("device", jax.devices()[0].device_kind)
    table.add("jax", jax.__version__)
    for part in names:
        start = time.monotonic()
        if start > end - 1:
            table.add(f"part {part}, s", "skipped: out of time")
            continue
        # Tiny sizes are tried on machines of any speed.
        limit = LIMITS[part] if size == "full" else math.inf
        for row in rows_of(part, size, min(limit, end - start), profile):
            table.add(*row)
        table.add(f"part {part}, s", time.monotonic() - start)
    name = parts.RATE if parts.RATE in table.rows else parts.RATE_BESIDE
    for peer, ratio in ((PEER, EAGER), (COMPILED_PEER, COMPILED)):
        if peer in table.rows:
            table.add(ratio, number(table.rows, name) / number(table.rows, peer))
    return table


def main(argv: Sequence[str]) -> None:
    """Print the table, and write it if asked."""
    del argv
    # Two processes share the card, of whose memory JAX takes most by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    values = flags.FLAGS
    with experiment_flags.exits():
        for part in values.parts:
            if part not in LIMITS:
                raise InvalidInput(f"parts={part}: must be some of {', '.join(LIMITS)}")
        for name in ("json", "profile"):
            if path := getattr(values, name):
                files.check_folder(name, Path(path))
        if values.profile and "step" not in values.parts:
            raise InvalidInput(f"profile={values.profile}: is of the part step; add it to parts")
        if not values.tiny and jax.default_backend() == "cpu":
            raise InvalidInput("tiny=false: jax sees no accelerator; --tiny tries the program")
        size = "tiny" if values.tiny else "full"
        seconds = 60 * values.budget_minutes
        with tempfile.TemporaryDirectory() as compiled:
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", compiled)
            table = measure(list(dict.fromkeys(values.parts)), size, seconds, values.profile)
        if values.json:
            files.write_json(Path(values.json), table.rows)


if __name__ == "__main__":
    limits = ", ".join(f"{name} ({seconds} s)" for name, seconds in LIMITS.items())
    flags.DEFINE_list("parts", list(LIMITS), f"Parts in their order, of {limits}.")
    flags.DEFINE_boolean("tiny", False, "Go through everything with tiny sizes, on any machine.")
    flags.DEFINE_float("budget_minutes", 8.0, "What does not fit is given up or skipped.")
    flags.DEFINE_string("json", "", "File to write the table to as well.")
    flags.DEFINE_string("profile", "", "File to write the kernels of one epoch to, as text.")
    app.run(main, flags_parser=experiment_flags.parse)
