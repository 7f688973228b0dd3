"""Ending a run early, with everything saved, when the operating system asks for it."""

import signal
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pm_jax.continual.placement import processes

SECONDS = 1.0
"""Steps are made for about so long at a time, so that a request is seen soon."""

Data = TypeVar("Data")


class Interrupted(RuntimeError):
    """A run ended early on a request by a signal; the message says what was saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def end_if(number: signal.Signals | None, step: int, total: int) -> None:
    """End a run whose last saved step is `step`, if a signal asked for it.

    Raises:
        Interrupted: a signal did.
    """
    if number:
        raise Interrupted(
            f"ended by {number.name} at step {step} of {total}; the same command goes on from "
            "there",
            number,
        )


class StopRequests:
    """Notes SIGTERM and SIGINT inside a `with` block; a second signal acts as it would without."""

    def __init__(self) -> None:
        self._number, self._noting = 0, False
        self._before: dict[signal.Signals, object] = {}
        self._steps = 1

    def __enter__(self) -> "StopRequests":
        self._noting = True
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        self._noting = False
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())  # type: ignore[arg-type]

    def _receive(self, number: int, frame: object) -> None:
        # With the handlers restored, a second Ctrl-C ends a run that does not get to its next save.
        del frame
        self._number = number
        self._restore_handlers()

    def received(self) -> signal.Signals | None:
        """Return the signal that came to any process of the run; all processes must call this."""
        number = processes.largest(self._number)
        return signal.Signals(number) if number else None

    def cut(self, stretches: Iterable[tuple[int, int, Data]]) -> Iterator[tuple[int, int, Data]]:
        """Cut stretches (first step, one past the last, data) into pieces of about a second."""
        for first, stop, data in stretches:
            while first < stop:
                # Clocks differ: the first process decides where all cut.
                end = processes.agreed(min(first + self._steps, stop)) if self._noting else stop
                clock = time.perf_counter()
                yield first, end, data
                # The time of a step is not known before, so pieces grow until they take a second.
                if time.perf_counter() - clock < SECONDS / 2 and end - first == self._steps:
                    self._steps *= 2
                first = end
                if self._noting and self.received():
                    return
