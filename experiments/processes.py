"""One run in several processes, on one host or on many.

Every process is started by the same command, but for its number. The command starts a second
process, which trains, and watches over it: JAX ends that one without a word when another process of
the run is gone.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import flags

from experiments import flags as experiment_flags
from pm_jax.continual.placement.processes import several
from pm_jax.types import InvalidInput, cause

SECONDS = 30
"""A process counts as gone after so long without a sign of life."""
GONE = "another process of the run is gone"
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Barrier")
"""Words in the errors that JAX raises then; their types say nothing."""
AGAIN = "start all of them again, they go on from the newest checkpoint"
WATCHED = "PM_JAX_WATCHED"
"""Variable in the environment of the process that trains."""


@functools.cache
def define_process_flags() -> None:
    """Define how the processes of a run find each other."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "host:port of the first process of a run in several, or auto. auto is for TPU pods and "
        "Slurm. All processes see one work directory; use --devices=0.",
    )
    flags.DEFINE_integer("process_count", None, "Number of processes of a run; not with auto.")
    flags.DEFINE_integer(
        "process_index", None, "Number of this process of a run, from 0; not with auto."
    )


@contextlib.contextmanager
def joined(module: str) -> Iterator[None]:
    """Be one of several processes, if flags say so; only the process that trains enters.

    `module` is the binary, for `python -m`.

    Raises:
        InvalidInput: flags that do not go together.
    """
    _join_or_watch(module)
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not several() or not any(word in str(error) for word in LOST):
            raise
        print(f"error: {GONE} ({cause(error)}); {AGAIN}", file=sys.stderr, flush=True)
        # The usual exit would wait for the other processes.
        os._exit(1)


def _join_or_watch(module: str) -> None:
    """Join the other processes, or start the process that does and end as it ends."""
    values = flags.FLAGS
    address = values.coordinator_address
    count, index = values.process_count, values.process_index
    numbers = {"process_count": count, "process_index": index}
    if address in (None, "auto"):
        for name, number in numbers.items():
            if number is not None:
                raise InvalidInput(f"{name}={number}: goes with coordinator_address=host:port")
        if address is None:
            return
    else:
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
            raise InvalidInput(f"coordinator_address={address}: must be host:port, or auto")
        if count is None or count < 1:
            raise InvalidInput(f"process_count={count}: must be at least 1")
        if index is None or not 0 <= index < count:
            raise InvalidInput(f"process_index={index}: must be from 0 to {count - 1}")
    if values.export or values.export_adapter:
        raise InvalidInput(
            f"export={values.export or values.export_adapter}: is written by one process; run the "
            "same command with it, but without coordinator_address, when the run is finished"
        )
    if WATCHED not in os.environ:
        _watch(module)
    threading.Thread(target=_end_with_watcher, daemon=True).start()
    jax.distributed.initialize(
        None if address == "auto" else address,
        count,
        index,
        heartbeat_timeout_seconds=SECONDS,
        shutdown_timeout_seconds=SECONDS,
    )


def run_as_child(arguments: Sequence[str], **settings: Any) -> int:
    """Run `python -m` with arguments, passing on the signals that come, and return its code."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        start_new_session=True,  # Signals of the terminal come by way of this process only.
        **settings,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: process.send_signal(number))
    return process.wait()


def _watch(module: str) -> NoReturn:
    """Run the command in a second process and end as it does, with a line if it was killed."""
    environment = {**os.environ, WATCHED: "1"}
    code = run_as_child([module, *sys.argv[1:]], env=environment, stdin=subprocess.PIPE)
    if code < 0:
        name = signal.Signals(-code).name
        experiment_flags.fail(f"{GONE}, or this one was killed ({name}); {AGAIN}", code=1)
    sys.exit(code)


def _end_with_watcher() -> None:
    """End this process when the one that watches over it is gone, which closes the pipe."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
