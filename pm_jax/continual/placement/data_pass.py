"""Passes over examples: what hands out batches, and functions that go over them one by one.

Inputs lie on the device, or come from the host window by window; both make the same steps on the
same examples in the same order.
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
    """Hands out the batches of a pass: gathered, transformed, weighed, divided among the devices.

    Attributes:
        devices: devices that the examples of a batch are divided among.
        size: examples of a batch, a multiple of the devices.
    """

    devices: Devices
    size: int

    def at(
        self, data: DeviceData, order: Order, number: Array, transform: Callable[[Array], Array]
    ) -> Batch:
        """The batch with a number, counted from 0; what lies beyond the order has weight 0."""
        places = number * self.size + jnp.arange(self.size)
        last = order.rows.shape[0] - 1
        inside = jnp.minimum(places, last)
        rows = order.rows[inside]
        weights = jnp.where(places <= last, order.weights[inside], 0.0)
        inputs = transform(data.take(self.devices, rows, places))
        return self.devices.spread(Batch(inputs, data.labels[rows], weights))

    def windows(
        self,
        data: StreamData,
        rows: Callable[[DeviceData], Array],
        first: int,
        stop: int,
    ) -> Iterator[tuple[int, int, DeviceData]]:
        """Pieces of a pass: first batch, one past the last, and the data to make them with.

        Data on the device is one piece. While one window of host data is in use, the next is on the
        device and the one after it is being loaded.

        Args:
            data: stream with the split to go over.
            rows: rows of the whole pass in order, int32 [P]; called for host data only.
            first: batch to begin with.
            stop: one past the last batch.
        """
        if isinstance(data, DeviceData):
            yield first, stop, data
            return
        import grain

        order = np.asarray(rows(data.rest))
        batch_bytes = self.size * data.inputs[:1].nbytes / self.devices.count
        length = max(1, int(data.window_bytes // batch_bytes))
        length = min(length, -(-len(order) // self.size))
        columns = self.devices.columns(self.size)

        def load(start: int) -> tuple[int, np.ndarray]:
            places = start * self.size + np.arange(length * self.size).reshape(length, -1)
            rows_of_process = order[np.minimum(places[:, columns], len(order) - 1)]
            return start, data.inputs[rows_of_process]

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        source = grain.MapDataset.source(list(range(first, stop, length)))
        waiting = None
        for start, values in source.map(load).to_iter_dataset(options):
            first_place = self.devices.place(np.asarray(start * self.size, np.int32))
            window = Window(self.devices.place_columns(values, self.size), first_place)
            if waiting:
                yield waiting
            waiting = start, min(start + length, stop), data.rest._replace(inputs=window)
        if waiting:
            yield waiting


class DataPass(abc.ABC):
    """A function that goes over examples batch by batch and is compiled as a whole.

    A subclass says how to begin, what to do with a batch, and what comes out. It is called as
    `run(data, *given)`; all three functions are given the tuple of the other arguments.

    Attributes:
        batches: what hands out the batches.
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
        """What the pass carries before the first batch, and the examples it goes over."""

    @abc.abstractmethod
    def update(self, carry: PyTree, batch: Batch, data: DeviceData, given: Any) -> PyTree:
        """What the pass carries after a batch."""

    @abc.abstractmethod
    def finish(self, carry: PyTree, data: DeviceData, given: Any) -> Any:
        """What the pass returns."""

    def __call__(self, data: StreamData, *given: Any) -> Any:
        """Go over the data, with the tuple of the other arguments."""
        return self.run(data, given)

    def run(self, data: StreamData, given: Any) -> Any:
        """Go over the data."""
        if isinstance(data, DeviceData):
            return self.resident(data, given)
        carry, order = self._begin(data.rest, given)
        stop = int(self._number(order))
        for first, last, window in self.batches.windows(data, lambda _: order.rows, 0, stop):
            # Waits, so that no more windows than planned are on the device.
            carry = jax.block_until_ready(self.window(carry, order, first, last, window, given))
        return self._finish(carry, data.rest, given)

    def _whole(self, data: DeviceData, given: Any) -> Any:
        carry, order = self.begin(data, given)
        carry = self._batches_between(carry, order, 0, self._number(order), data, given)
        return self.finish(carry, data, given)

    def _number(self, order: Order) -> Array:
        """Batches up to the last example that counts."""
        return -(-order.length // self.batches.size)

    def _batches_between(
        self,
        carry: PyTree,
        order: Order,
        first: Array | int,
        stop: Array | int,
        data: DeviceData,
        given: Any,
    ) -> PyTree:
        def step(number: Array, carry: PyTree) -> PyTree:
            batch = self.batches.at(data, order, number, self._transform)
            return self.update(carry, batch, data, given)

        return jax.lax.fori_loop(first, stop, step, carry)
