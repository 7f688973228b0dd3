"""Where the examples of a stream lie: on the devices, or, if too many, in the host's memory."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.continual.placement.devices import Devices, devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.data.stream import TaskIndices, TaskStream
from pm_jax.types import Array, InvalidInput, Key

WINDOWS_IN_MEMORY = 3
"""Windows on the device at a time: the one just used, the next, and one on its way."""


class Order(NamedTuple):
    """The examples that a pass goes over, in their order.

    Attributes:
        rows: int32 [P], rows in the stream.
        weights: float32 [P], 1 for an example that counts and 0 for padding.
        length: int32 scalar, places up to the last example that counts.
    """

    rows: Array
    weights: Array
    length: Array

    @classmethod
    def of(cls, rows: Array, count: Array) -> "Order":
        """Make the order in which the first `count` rows are examples and the others padding."""
        return cls(rows, (jnp.arange(rows.shape[0]) < count).astype(jnp.float32), count)

    def padded_with_examples(self, batch_size: int) -> "Order":
        """Return the order in which padding repeats the first examples, to the end of a batch.

        Batch statistics then see examples of the pass only, whatever pads them.
        """
        places = jnp.arange(-(-self.rows.shape[0] // batch_size) * batch_size)
        return Order.of(self.rows[places % jnp.maximum(self.length, 1)], self.length)


class Window(NamedTuple):
    """The inputs of some consecutive batches of a pass.

    Attributes:
        values: uint8 [batches, batch size, ...].
        first: place of the first input in the pass, int32 scalar.
    """

    values: Array
    first: Array


class DeviceData(NamedTuple):
    """A stream on the device.

    Attributes:
        inputs: uint8 images or int32 token ids [N, ...], divided by rows among the devices; one
            window of them, or `None`, where the host has the rest.
        labels: int32 [N].
        positions: int32 [T, M], rows of each task's examples, padded to the largest task.
        sizes: int32 [T], how many entries of each row of `positions` are examples.
        class_masks: bool [T, C].
    """

    inputs: Array | Window | None
    labels: Array
    positions: Array
    sizes: Array
    class_masks: Array

    @classmethod
    def of(
        cls, devices: Devices, stream: TaskStream, split: TaskIndices, *, with_inputs: bool = True
    ) -> "DeviceData":
        """Put a stream and one of its splits on the devices."""
        rest = devices.place((stream.labels, split.positions, split.sizes, stream.class_masks))
        return cls(devices.place_rows(stream.inputs) if with_inputs else None, *rest)

    def order(self, task: Array) -> Order:
        """Return the examples of a task in stored order."""
        return Order.of(self.positions[task], self.sizes[task])

    def shuffled(self, key: Key, task: Array) -> Order:
        """Return the examples of a task in random order."""
        rows, count = self.positions[task], self.sizes[task]
        draws = jax.random.uniform(key, rows.shape)
        # Padding gets a larger number than any draw, so that it stays behind the examples.
        order = jnp.argsort(jnp.where(jnp.arange(rows.shape[0]) < count, draws, 2.0))
        return Order.of(rows[order], count)

    def take(self, devices: Devices, rows: Array, places: Array) -> Array:
        """Gather the inputs of a batch, by rows of the stream or places of the pass."""
        if isinstance(self.inputs, Window):
            values, first = self.inputs
            if devices.count == 1:
                # Gathered as resident inputs are, for the same program and the same last bit.
                return values.reshape(-1, *values.shape[2:])[places - first]
            return values[(places[0] - first) // places.shape[0]]
        assert self.inputs is not None
        return devices.rows(self.inputs, rows)


class HostData(NamedTuple):
    """A stream whose inputs do not fit the device's memory.

    Attributes:
        inputs: uint8 [N, ...], in the host's memory.
        rest: all other arrays, on the devices; its inputs are `None`.
        window_bytes: most bytes of a device for one window.
        devices: devices that examples are divided among.
    """

    inputs: np.ndarray
    rest: DeviceData
    window_bytes: float
    devices: Devices


StreamData: TypeAlias = DeviceData | HostData


def place_stream(config: Config, stream: TaskStream, split: TaskIndices) -> StreamData:
    """Put a stream and one of its splits on the devices; inputs above the budget stay on the host.

    Raises:
        InvalidInput: inputs have to be streamed and the loader is not installed.
    """
    budget, devices = resident_bytes(config), devices_of(config)
    if stream.inputs.nbytes / devices.count <= budget:
        return DeviceData.of(devices, stream, split)
    # Imported when needed: grain is an extra.
    try:
        import grain  # noqa: F401
    except ImportError:
        raise InvalidInput(
            f"resident_mb={config.resident_mb:g}: inputs of {stream.inputs.nbytes / 1e6:.0f} MB "
            "are streamed, which needs grain: pip install 'pm_jax[streaming]'; or raise it"
        ) from None
    rest = DeviceData.of(devices, stream, split, with_inputs=False)
    return HostData(stream.inputs, rest, budget / WINDOWS_IN_MEMORY, devices)


def resident_bytes(config: Config) -> float:
    """Return the bytes of one kind of data that a run may keep on a device."""
    # Half of the device's memory by default; a CPU does not say what it has, and has no bound.
    statistics = jax.local_devices()[0].memory_stats() or {}
    return 1e6 * config.resident_mb or statistics.get("bytes_limit", float("inf")) / 2


def of_splits(data: StreamData, stream: TaskStream, names: Sequence[str]) -> dict[str, StreamData]:
    """Return other splits of a stream, with the same inputs in memory.

    All have one shape, so that one program serves them.
    """
    rest = data.rest if isinstance(data, HostData) else data
    splits = {name: getattr(stream, name) for name in names}
    width = max(split.positions.shape[1] for split in splits.values())
    devices, found = Devices.like(rest.labels), dict[str, StreamData]()
    for name, (positions, sizes) in splits.items():
        positions = np.pad(positions, ((0, 0), (0, width - positions.shape[1])))
        positions, sizes, masks = devices.place((positions, sizes, stream.class_masks))
        part = rest._replace(positions=positions, sizes=sizes, class_masks=masks)
        found[name] = data._replace(rest=part) if isinstance(data, HostData) else part
    return found
