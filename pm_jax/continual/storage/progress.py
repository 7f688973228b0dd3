"""Signs of life at a terminal, while something goes on that takes long."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """Show at a terminal what a block does and for how long it has done so."""
    from tqdm import tqdm

    with tqdm(
        desc=text,
        bar_format="{desc} ... {elapsed}",
        leave=False,
        disable=True if quiet else None,  # None shows it at a terminal only
    ) as bar:
        stop = keep_drawing(bar)
        try:
            yield
        finally:
            stop()


def keep_drawing(bar: Any) -> Callable[[], None]:
    """Draw a progress bar every second, so that its clock goes on; returns what ends it."""
    done = threading.Event()

    def draw() -> None:
        while not done.wait(1.0):
            bar.refresh()

    thread = threading.Thread(target=draw, daemon=True)
    if not bar.disable:
        thread.start()

    def stop() -> None:
        done.set()
        if thread.ident:
            thread.join()

    return stop
