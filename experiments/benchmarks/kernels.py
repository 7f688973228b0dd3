"""The kernels that a call spends its time in, from the profiler's trace."""

import collections
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

from pm_jax import files

CONTAINERS = ("while", "conditional", "call")
"""Operations of a CPU whose events contain those of others."""


class Kernel(NamedTuple):
    """All calls of a kernel; those that differ in the number after their name are one."""

    name: str
    calls: int
    milliseconds: float
    # The part of all kernels' time that it takes, in percent.
    share: float


def write(call: Callable[[], object], path: Path) -> float:
    """Write the kernels of a call that has been compiled as a table; return their milliseconds."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(call())
        [trace] = Path(directory).rglob("*.xplane.pb")
        found = kernels_of(ProfileData.from_file(str(trace)))
    files.write_text(path, as_text(found))
    return sum(kernel.milliseconds for kernel in found)


def kernels_of(profile: ProfileData) -> list[Kernel]:
    """List the kernels of a trace, the longest together first."""
    calls: dict[str, list[float]] = collections.defaultdict(list)
    for event in _events(profile):
        calls[re.sub(r"([._]\d+)+$", "", event.name)].append(event.duration_ns / 1e6)
    total = sum(map(sum, calls.values()))
    rows = [
        Kernel(name, len(times), sum(times), 100 * sum(times) / max(total, 1e-9))
        for name, times in calls.items()
    ]
    return sorted(rows, key=lambda kernel: -kernel.milliseconds)


def as_text(rows: list[Kernel]) -> str:
    """Lay out kernels as text, a line each."""
    lines = [f"{'milliseconds':>12s} {'share, %':>9s} {'calls':>6s}  kernel"]
    for name, calls, milliseconds, share in rows:
        lines.append(f"{milliseconds:12.3f} {share:9.1f} {calls:6d}  {name}")
    return "\n".join(lines) + "\n"


def _events(profile: ProfileData) -> Iterator:
    # A GPU has a line for each stream, a TPU one of operations; other lines repeat their time.
    on_devices = [
        line
        for plane in profile.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream") or line.name == "XLA Ops"
    ]
    for line in on_devices:
        yield from line.events
    if on_devices:
        return
    for plane in profile.planes:
        for line in plane.lines:
            yield from filter(_is_operation, line.events)


def _is_operation(event) -> bool:
    with warnings.catch_warnings():
        # Some versions of the reader warn of their own types.
        warnings.simplefilter("ignore", DeprecationWarning)
        names = dict(event.stats)
    return "hlo_op" in names and not event.name.startswith(CONTAINERS)
