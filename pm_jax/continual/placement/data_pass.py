"""Passes over examples, batch by batch.

Inputs lie on the device, or come from the host window by window; the batches are the same.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax.continual.placement.data import DeviceData, Order, StreamData, Window
from pm_jax.continual.placement.devices import Devices
from pm_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Batches:
    """Hands out batches of `size` examples: gathered, transformed and divided among the devices."""

    devices: Devices
    size: int

    def at(
        self, data: DeviceData, order: Order, number: Array, transform: Callable[[Array], Array]
    ) -> Batch:
        """Make the batch with a number, from 0; places beyond the order have weight 0."""
        places = number * self.size + jnp.arange(self.size)
        last = order.rows.shape[0] - 1
        inside = jnp.minimum(places, last)
        rows = order.rows[inside]
        weights = jnp.where(places <= last, order.weights[inside], 0.0)
        inputs = transform(data.take(self.devices, rows, places))
        return self.devices.spread(Batch(inputs, data.labels[rows], weights))

    def windows(
        self, data: StreamData, rows: Callable[[DeviceData], Array], first: int, stop: int
    ) -> Iterator[tuple[int, int, DeviceData]]:
        """Split batches `first` to `stop` into (first, stop, data) by what the device can hold.

        Data on the device need no split, and `rows`, the pass in order, is then not called.
        """
        if isinstance(data, DeviceData):
            yield first, stop, data
            return
        import grain

        order = np.asarray(rows(data.rest))
        # No window is longer than the pass, and all have one shape, for one program.
        batch_bytes = self.size * data.inputs[:1].nbytes / self.devices.count
        length = max(1, int(data.window_bytes // batch_bytes))
        length = min(length, -(-len(order) // self.size))
        columns = self.devices.columns(self.size)

        def load(start: int) -> tuple[int, np.ndarray]:
            # The last window repeats the last example, which has no weight then.
            places = start * self.size + np.arange(length * self.size).reshape(length, -1)
            rows_of_process = order[np.minimum(places[:, columns], len(order) - 1)]
            return start, data.inputs[rows_of_process]

        # One window is loaded ahead, while one is in use and one on its way to the device.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        source = grain.MapDataset.source(list(range(first, stop, length)))
        waiting = None
        for start, values in source.map(load).to_iter_dataset(options):
            first_place = self.devices.place(np.asarray(start * self.size, np.int32))
            window = Window(self.devices.place_columns(values, self.size), first_place)
            # Yielded one round late, so that the copy to the device runs beside the computation.
            if waiting:
                yield waiting
            waiting = start, min(start + length, stop), data.rest._replace(inputs=window)
        if waiting:
            yield waiting


class DataPass(abc.ABC):
    """A function of data and other arguments that goes over examples, compiled as a whole.

    Attributes:
        resident: the whole pass compiled as one function, for data on the device.
        window: the batches of one window compiled, for data of the host.
    """

    def __init__(
        self, devices: Devices, batch_size: int, transform: Callable[[Array], Array]
    ) -> None:
        self.batches = Batches(devices, devices.multiple(batch_size))
        self._transform = transform
        self.resident = devices.jit(self._whole)
        self._begin, self.window, self._finish = (
            devices.jit(method) for method in (self.begin, self._batches_between, self.finish)
        )

    @abc.abstractmethod
    def begin(self, data: DeviceData, given: Any) -> tuple[PyTree, Order]:
        """Return the first carry, and the examples to go over."""

    @abc.abstractmethod
    def update(self, carry: PyTree, batch: Batch, data: DeviceData, given: Any) -> PyTree:
        """Return the carry after a batch."""

    def finish(self, carry: PyTree, data: DeviceData, given: Any) -> Any:
        """Return the result of the last carry, by default the carry itself."""
        del data, given
        return carry

    def __call__(self, data: StreamData, *given: Any) -> Any:
        """Go over the data with some other arguments."""
        return self.run(data, given)

    def run(self, data: StreamData, given: Any) -> Any:
        """Go over the data with the tuple of the other arguments."""
        if isinstance(data, DeviceData):
            return self.resident(data, given)
        carry, order = self._begin(data.rest, given)
        stop = int(self._batch_count(order))
        for *bounds, window in self.batches.windows(data, lambda _: order.rows, 0, stop):
            # Waits, so that no more windows than planned are on the device.
            carry = jax.block_until_ready(self.window(carry, order, bounds, window, given))
        return self._finish(carry, data.rest, given)

    def _whole(self, data: DeviceData, given: Any) -> Any:
        carry, order = self.begin(data, given)
        carry = self._batches_between(carry, order, (0, self._batch_count(order)), data, given)
        return self.finish(carry, data, given)

    def _batch_count(self, order: Order) -> Array:
        """Count the batches up to the last example that counts."""
        return -(-order.length // self.batches.size)

    def _batches_between(
        self, carry: PyTree, order: Order, bounds: Any, data: DeviceData, given: Any
    ) -> PyTree:
        """Update the carry by the batches from the first bound to the second."""
        first, stop = bounds

        def step(number: Array, carry: PyTree) -> PyTree:
            batch = self.batches.at(data, order, number, self._transform)
            return self.update(carry, batch, data, given)

        return jax.lax.fori_loop(first, stop, step, carry)
