"""Counting what is compiled."""

import contextlib
from collections.abc import Iterator

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Collect the seconds of each compilation while the context lasts, as they come."""
    durations: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == EVENT:
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
