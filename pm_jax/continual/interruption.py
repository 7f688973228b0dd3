"""Ending a run early because the operating system asks for it, with everything saved."""

import signal
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

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


class StopRequests:
    """Notes SIGTERM and SIGINT while it is entered; a second one acts as it would without.

    Attributes:
        received: the signal that came, or `None`.

    Example:
        >>> with StopRequests() as requests:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> requests.received.name
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._steps = 1

    def __enter__(self) -> "StopRequests":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())  # type: ignore[arg-type]

    def _receive(self, number: int, frame: object) -> None:
        del frame
        self.received = signal.Signals(number)
        self._restore_handlers()

    def cut(self, stretches: Iterable[tuple[int, int, Data]]) -> Iterator[tuple[int, int, Data]]:
        """Cut stretches of steps into pieces that take about a second, until a request comes.

        Args:
            stretches: first step, one past the last, and what they are made with.

        Yields:
            The same of each piece, one at least; the stretches as they are where nothing is noted.
        """
        for first, stop, data in stretches:
            while first < stop:
                end = min(first + self._steps, stop) if self._before else stop
                clock = time.perf_counter()
                yield first, end, data
                if time.perf_counter() - clock < SECONDS / 2 and end - first == self._steps:
                    self._steps *= 2
                first = end
                if self.received:
                    return
