"""Passes over examples that lie on the device, or come from the host stretch by stretch.

Both make the same steps on the same examples in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from pm_jax.continual.placement.devices import Devices, devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.training.task_program import DeviceData, Window
from pm_jax.data.stream import TaskIndices, TaskStream
from pm_jax.types import Array, InvalidInput, PyTree

WINDOWS_IN_MEMORY = 3
"""On the device at a time: the one just used, the next, and one on its way."""


class HostData(NamedTuple):
    """A stream whose inputs do not fit the device's memory.

    Attributes:
        inputs: uint8 [N, ...], in the host's memory.
        rest: all else, on the devices; its inputs are `None`.
        window_bytes: most that one stretch of examples may take of a device.
        devices: that examples are divided among.
    """

    inputs: np.ndarray
    rest: DeviceData
    window_bytes: float
    devices: Devices


def placed(config: Config, stream: TaskStream, split: TaskIndices) -> DeviceData | HostData:
    """A stream and one of its splits on the device, but for inputs that exceed the budget.

    Args:
        config: settings.
        stream: the tasks.
        split: of the stream.

    Returns:
        `DeviceData`, divided among the devices, or `HostData` where `config.resident_mb` of each is
        not enough.

    Raises:
        InvalidInput: inputs have to be streamed and the loader is not installed.

    Example:
        >>> stream = Config().task_stream(0)
        >>> type(placed(Config(), stream, stream.train)).__name__
        'DeviceData'
    """
    budget, devices = resident_bytes(config), devices_of(config)
    if stream.inputs.nbytes / devices.count <= budget:
        return DeviceData.of(devices, stream, split)
    try:
        import grain  # noqa: F401
    except ImportError:
        raise InvalidInput(
            f"resident_mb={config.resident_mb:g}: inputs of {stream.inputs.nbytes / 1e6:.0f} MB "
            "are streamed, which needs grain: pip install 'pm_jax[streaming]'; or raise it"
        ) from None
    arrays = (stream.labels, split.positions, split.sizes, stream.class_masks)
    rest = DeviceData(None, *devices.place(arrays))
    return HostData(stream.inputs, rest, budget / WINDOWS_IN_MEMORY, devices)


def resident_bytes(config: Config) -> float:
    """How much of one kind a run keeps on the device.

    Args:
        config: settings.

    Returns:
        `resident_mb` in bytes; half of the device's memory by default, and no bound for a CPU,
        which does not say what it has.

    Example:
        >>> resident_bytes(Config(resident_mb=2))
        2000000.0
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    return 1e6 * config.resident_mb or statistics.get("bytes_limit", float("inf")) / 2


def of_split(
    data: DeviceData | HostData, split: TaskIndices, class_masks: np.ndarray
) -> DeviceData | HostData:
    """The same examples in memory, another split of them.

    Args:
        data: as placed.
        split: of the stream, T tasks.
        class_masks: bool [T, C], of its tasks.

    Returns:
        As `data`, with the positions, sizes and classes of the split.

    Example:
        >>> stream = Config().task_stream(0)
        >>> data = placed(Config(), stream, stream.train)
        >>> held_out = of_split(data, stream.test, stream.class_masks)
        >>> bool((held_out.sizes == stream.test.sizes).all())
        True
    """
    names = ("positions", "sizes", "class_masks")
    rest = data.rest if isinstance(data, HostData) else data
    devices = Devices.like(rest.labels)
    rest = rest._replace(**devices.place(dict(zip(names, (*split, class_masks), strict=True))))
    return data._replace(rest=rest) if isinstance(data, HostData) else rest


def stretches(
    data: DeviceData | HostData,
    rows: Callable[[DeviceData], Array],
    batch_size: int,
    first: int,
    stop: int,
) -> Iterator[tuple[int, int, DeviceData]]:
    """Pieces of a pass, each with the data to make it with.

    While one is in use, the next is on the device and the one after it is being loaded.

    Args:
        data: as placed.
        rows: the examples of the whole pass in order, int32 [P], padded or not; called for
            `HostData` only.
        batch_size: of the pass.
        first: batch to begin with.
        stop: one past the last batch.

    Yields:
        First batch, one past the last, and data: everything in one piece for `DeviceData`,
        otherwise windows of one size.

    Example:
        >>> stream = Config().task_stream(0)
        >>> data = placed(Config(), stream, stream.train)
        >>> [piece[:2] for piece in stretches(data, None, 32, 0, 5)]
        [(0, 5)]
    """
    if isinstance(data, DeviceData):
        yield first, stop, data
        return
    import grain

    order, devices = np.asarray(rows(data.rest)), data.devices
    batch_bytes = batch_size * data.inputs[:1].nbytes / devices.count
    size = min(max(1, int(data.window_bytes // batch_bytes)), -(-len(order) // batch_size))
    own = devices.columns(batch_size)

    def load(start: int) -> tuple[int, np.ndarray]:
        places = start * batch_size + np.arange(size * batch_size).reshape(size, -1)[:, own]
        return start, data.inputs[order[np.minimum(places, len(order) - 1)]]

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    source = grain.MapDataset.source(list(range(first, stop, size)))
    waiting = None
    for start, values in source.map(load).to_iter_dataset(options):
        first_place = devices.place(np.asarray(start * batch_size, np.int32))
        window = Window(devices.place_columns(values, batch_size), first_place)
        if waiting:
            yield waiting
        waiting = start, min(start + size, stop), data.rest._replace(inputs=window)
    if waiting:
        yield waiting


class Pass:
    """A function that goes over examples batch by batch, of data on the device or the host.

    Args:
        begin: `begin(*arguments) -> (carry, rows, batches)`: where to start, the examples of the
            pass in order (int32 [P]) and how many batches to make of them.
        step: `step(number, carry, rows, *arguments) -> carry`, for one batch; it reads inputs by
            `DeviceData.take`.
        finish: `finish(carry, *arguments) -> result`.
        batch_size: `batch_size(*arguments) -> int`, by shapes alone.
        devices: where the result lies; the default one if `None`.

    Attributes:
        resident: the function compiled as one, for `DeviceData`.

    Example:
        >>> import jax.numpy as jnp
        >>> total = Pass(
        ...     begin=lambda x, data: (0.0, jnp.arange(4), 2),
        ...     step=lambda number, carry, rows, x, data: carry + x[rows[number]],
        ...     finish=lambda carry, x, data: carry,
        ...     batch_size=lambda x, data: 2,
        ... )
        >>> float(total(jnp.asarray([1.0, 2.0, 4.0, 8.0]), None))
        3.0
    """

    def __init__(
        self,
        *,
        begin: Callable[..., tuple[PyTree, Array, Array | int]],
        step: Callable[..., PyTree],
        finish: Callable[..., Any],
        batch_size: Callable[..., int],
        devices: Devices | None = None,
    ):
        compiled: Callable[..., Any] = devices.jit if devices else jax.jit

        def stretch(carry, rows, first, stop, *arguments):
            return jax.lax.fori_loop(
                first, stop, lambda number, carry: step(number, carry, rows, *arguments), carry
            )

        def resident(*arguments):
            carry, rows, batches = begin(*arguments)
            return finish(stretch(carry, rows, 0, batches, *arguments), *arguments)

        self.resident = compiled(resident)
        self._begin, self._stretch, self._finish = map(compiled, (begin, stretch, finish))
        self._batch_size = batch_size

    def __call__(self, *arguments: Any) -> Any:
        """The result; one of the arguments is the data."""
        host = [number for number, value in enumerate(arguments) if isinstance(value, HostData)]
        if not host:
            return self.resident(*arguments)

        def given(data: DeviceData) -> tuple:
            return (*arguments[: host[0]], data, *arguments[host[0] + 1 :])

        source = arguments[host[0]]
        rest = given(source.rest)
        carry, rows, batches = self._begin(*rest)
        pieces = stretches(source, lambda _: rows, self._batch_size(*rest), 0, int(batches))
        for first, stop, data in pieces:
            # Waits, so that no more windows than planned are on the device.
            carry = jax.block_until_ready(self._stretch(carry, rows, first, stop, *given(data)))
        return self._finish(carry, *rest)
