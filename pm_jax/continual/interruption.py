"""Ending a run early because the operating system asks for it, with everything saved."""

import signal
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pm_jax.continual.placement import processes

SECONDS = 1.0
"""What steps are made at a time, about, so that a request is seen soon."""

Data = TypeVar("Data")


class Interrupted(RuntimeError):
    """A run ended early on request; the message says what was saved.

    Args:
        message: one line.
        signal_number: of the request.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def end_if(number: signal.Signals | None, step: int, total: int) -> None:
    """End a run where a signal asked for it.

    Args:
        number: the signal, or `None`.
        step: that has been saved.
        total: steps of the run.

    Raises:
        Interrupted: it did.

    Example:
        >>> end_if(signal.SIGTERM, 40, 72)
        Traceback (most recent call last):
        pm_jax.continual.interruption.Interrupted: ended by SIGTERM at step 40 of 72; the same ...
    """
    if number:
        raise Interrupted(
            f"ended by {number.name} at step {step} of {total}; the same command goes on from "
            "there",
            number,
        )


class StopRequests:
    """Notes SIGTERM and SIGINT while it is entered; a second one acts as it would without.

    Example:
        >>> with StopRequests() as requests:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> requests.received().name
        'SIGTERM'
    """

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
        del frame
        self._number = number
        self._restore_handlers()

    def received(self) -> signal.Signals | None:
        """The signal that came, to any of the run's processes; they have to ask at once."""
        number = processes.largest(self._number)
        return signal.Signals(number) if number else None

    def cut(self, stretches: Iterable[tuple[int, int, Data]]) -> Iterator[tuple[int, int, Data]]:
        """Cut stretches of steps into pieces that take about a second, until a request comes.

        Args:
            stretches: first step, one past the last, and what they are made with.

        Yields:
            The same of each piece, one at least; the stretches as they are where nothing is noted.
        """
        for first, stop, data in stretches:
            while first < stop:
                end = processes.agreed(min(first + self._steps, stop)) if self._noting else stop
                clock = time.perf_counter()
                yield first, end, data
                if time.perf_counter() - clock < SECONDS / 2 and end - first == self._steps:
                    self._steps *= 2
                first = end
                if self._noting and self.received():
                    return
