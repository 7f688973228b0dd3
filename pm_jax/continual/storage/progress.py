"""Signs of life while something takes long: one line that is redrawn, or a line now and then."""

import contextlib
import io
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

FIRST, EVERY, SHARE = 2.0, 3.0, 0.05
"""Where there is no terminal, a line comes after `FIRST` seconds, and the next ones every `EVERY`
seconds, or after `SHARE` of the time that has passed if that is longer, so that logs stay short."""


class _Nowhere(io.TextIOBase):
    """The place where tqdm draws if there is no terminal."""

    def write(self, text: str, /) -> int:
        return len(text)


@contextlib.contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """Show what a block does and for how long it has done so."""
    bar = progress_line("{desc}", quiet, desc=text)
    stop = keep_drawing(bar)
    try:
        yield
    finally:
        stop()
        bar.close()


def progress_line(form: str, quiet: bool = False, **options: Any) -> Any:
    """Make a tqdm bar that shows the time and then `form`, with a bar at a terminal only."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    # A notebook or a test puts an object of its own in this place, and needs no lines.
    hidden = quiet or not (terminal or sys.stderr is sys.__stderr__)
    return tqdm(
        bar_format="[{elapsed}] " + (form if terminal else form.replace("|{bar:8}|", "")),
        file=sys.stderr if terminal else _Nowhere(),
        disable=hidden,
        leave=False,
        **options,
    )


def keep_drawing(bar: Any) -> Callable[[], None]:
    """Draw a bar every second, or print it now and then, in a thread; returns what ends it."""
    done = threading.Event()

    def draw() -> None:
        while not done.wait(1.0):
            bar.refresh()

    def tell() -> None:
        start, pause = time.monotonic(), FIRST
        while not done.wait(pause):
            print(bar, file=sys.stderr, flush=True)
            pause = max(EVERY, SHARE * (time.monotonic() - start))

    thread = None
    if not bar.disable:
        thread = threading.Thread(target=draw if sys.stderr.isatty() else tell, daemon=True)
        thread.start()

    def stop() -> None:
        done.set()
        if thread:
            thread.join()

    return stop


class Pace:
    """How long a run takes for a step of training, and for a task from its last step to its end."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=20)
        self._between: list[float] = []
        self._clock = time.monotonic()

    def trained(self, steps: int, seconds: float) -> None:
        """Note steps of training that just ended."""
        self._steps.append(seconds / steps)
        self._clock = time.monotonic()

    def ended(self) -> None:
        """Note that a task just ended."""
        self._between.append(time.monotonic() - self._clock)

    def left(self, steps: int, tasks: int) -> float | None:
        """Return the seconds that steps and ends of tasks take; `None` where it is not known."""
        # The first of both also compile, which tells nothing of the others.
        if len(self._steps) < 2:
            return None
        between = min(self._between, default=0.0)
        return steps * statistics.median_low(self._steps) + tasks * between


def in_words(seconds: float) -> str:
    """Write a time in the unit that suits it.

    Example:
        >>> in_words(8.4), in_words(100), in_words(9000), in_words(300_000)
        ('8 s', '2 min', '2.5 h', '3.5 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
