"""Where a run's arrays lie: on a mesh of devices that divide the examples of a batch.

Every function of a run is one program over all of the mesh. Examples are divided along their first
axis; parameters, and all that has their shape, are copied to each device or, with `fsdp`, divided
among so many that together hold one copy. What XLA has to move for that, it moves by itself, and
the numbers are those of one device up to the order of sums.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pm_jax.continual.placement import processes
from pm_jax.continual.settings.config import Config
from pm_jax.types import Array, InvalidInput, PyTree

COPIES, PARTS = "data", "fsdp"
EXAMPLES = (COPIES, PARTS)
"""Axes of the mesh that examples are divided along: both."""

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh of devices, and how arrays lie on it; with one device, as if there were none.

    Attributes:
        mesh: with the axes `data`, along which parameters are copied, and `fsdp`, along which they
            are divided.

    Example:
        >>> devices = Devices.of(count=2, parts=2)
        >>> devices.place({"w": np.ones((4, 3))})["w"].addressable_shards[0].data.shape
        (2, 3)
        >>> devices.place_rows(np.arange(3)).tolist()  # padded
        [0, 1, 2, 0]
        >>> jax.jit(devices.rows)(devices.place_rows(np.arange(3)), jnp.asarray([2, 1])).tolist()
        [2, 1]
    """

    mesh: Mesh

    @classmethod
    def of(cls, count: int = 1, parts: int = 1) -> "Devices":
        """A mesh of the first devices.

        Args:
            count: number of devices; 0 for all, of all processes.
            parts: how many of them hold one copy of the parameters.

        Returns:
            The mesh; the same one for the same arguments.

        Raises:
            InvalidInput: there are not so many, or the parts do not divide them.
        """
        there = jax.devices()
        number = count or len(there)
        if number > len(there):
            raise InvalidInput(
                f"devices={count}: there are {len(there)}; give at most as many, or 0 for all"
            )
        if processes.several() and number < len(there):
            raise InvalidInput(
                f"devices={count}: several processes use all their {len(there)} devices; give 0"
            )
        if number % parts:
            raise InvalidInput(f"fsdp={parts}: must divide the {number} devices")
        shape, automatic = (number // parts, parts), (jax.sharding.AxisType.Auto,) * 2
        return cls(jax.make_mesh(shape, EXAMPLES, axis_types=automatic, devices=there[:number]))

    @classmethod
    def like(cls, array: Array) -> "Devices":
        """The mesh that an array lies on."""
        mesh = getattr(array.sharding, "mesh", None)
        return cls(mesh) if isinstance(mesh, Mesh) else cls.of()

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.mesh.size

    def multiple(self, examples: int) -> int:
        """The number of examples from this on that all devices have equally many of."""
        return -(-examples // self.count) * self.count

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of what is not divided by examples, of some shape.

        Matrices and larger arrays are divided along their longest axis that can be.
        """
        parts, spec = self.mesh.shape[PARTS], list[str | None]()
        fitting = [axis for axis, length in enumerate(shape) if length % parts == 0 and length]
        if parts > 1 and len(shape) > 1 and fitting:
            axis = max(fitting, key=lambda axis: shape[axis])
            spec = [*[None] * axis, PARTS]
        return NamedSharding(self.mesh, P(*spec))

    def place(self, tree: PyTree) -> Any:
        """Put arrays, which all processes have, where `sharding` says."""
        return jax.tree.map(jnp.asarray if self.count == 1 else self._put, tree)

    def _put(self, leaf: Any) -> Array:
        sharding = self.sharding(np.shape(leaf))
        if not processes.several() or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self._put(jax.random.key_data(leaf)))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def whole(self, tree: PyTree) -> Any:
        """Copies as NumPy's, put together where they are divided; by all processes at once."""
        if processes.several():
            tree = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(tree)
        return jax.tree.map(np.array, tree)

    def shapes(self, tree: PyTree) -> PyTree:
        """What arrays are to be restored as: shape, type and, if they are not NumPy's, sharding."""
        only = SingleDeviceSharding(self.mesh.devices.flat[0]) if self.count == 1 else None

        def shape(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray):
                return leaf
            sharding = only or self.sharding(leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape, tree)

    def place_rows(self, array: np.ndarray) -> Array:
        """Divide an array by its rows, padded to as many for each; a process reads its own only."""
        if self.count == 1:
            return jnp.asarray(array)
        each = -(-len(array) // self.count)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index
            own = array[index[0]]
            return np.pad(own, [(0, each - len(own)), *[(0, 0)] * (array.ndim - 1)])

        shape = (each * self.count, *array.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, P(EXAMPLES)), part)

    def columns(self, number: int) -> slice:
        """Those of a number of columns, a multiple of the devices, that this process has."""
        places = self._by_columns.addressable_devices_indices_map((1, number)).values()
        found = [index[1].indices(number) for index in places if index]
        return slice(min(first for first, *_ in found), max(stop for _, stop, _ in found))

    def place_columns(self, array: np.ndarray, number: int) -> Array:
        """Divide an array by its second axis.

        Args:
            array: [S, ...], the `columns` of this process.
            number: of columns in all.

        Returns:
            [S, number, ...].
        """
        if self.count == 1:
            return jnp.asarray(array)
        shape = (len(array), number, *array.shape[2:])
        return jax.make_array_from_process_local_data(self._by_columns, array, shape)

    @property
    def _by_columns(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(None, EXAMPLES))

    def rows(self, array: Array, rows: Array) -> Array:
        """Rows of an array that `place_rows` divided, divided anew in their order.

        Args:
            array: [N, ...] of integers.
            rows: int32 [B], a multiple of the devices.

        Returns:
            [B, ...].
        """
        if self.count == 1:
            return array[rows]

        def of_device(part: Array, rows: Array) -> Array:
            places = rows - jax.lax.axis_index(EXAMPLES) * part.shape[0]
            own = (places >= 0) & (places < part.shape[0])
            found = part[jnp.where(own, places, 0)]
            found = jnp.where(own.reshape(-1, *[1] * (part.ndim - 1)), found, 0)
            # One device has each row and the others zeros.
            return jax.lax.psum_scatter(found, EXAMPLES, scatter_dimension=0, tiled=True)

        divided = P(EXAMPLES)
        gather = jax.shard_map(
            of_device, mesh=self.mesh, in_specs=(divided, P()), out_specs=divided
        )
        return gather(array, rows)

    def spread(self, examples: Tree, axis: int = 0) -> Tree:
        """Divide examples along an axis, inside a compiled function."""
        if self.count == 1:
            return examples
        sharding = NamedSharding(self.mesh, P(*[None] * axis, EXAMPLES))
        return jax.lax.with_sharding_constraint(examples, sharding)

    def keep(self, tree: Tree) -> Tree:
        """Have arrays lie where `sharding` says, inside a compiled function."""
        if self.count == 1:
            return tree
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, self.sharding(np.shape(x))), tree
        )

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compile a function whose results lie where `sharding` says.

        So a run's state always lies alike, and nothing is compiled twice.
        """
        if self.count == 1:
            return jax.jit(function, **options)

        @functools.wraps(function)
        def kept(*arguments: Any, **named: Any) -> Any:
            return self.keep(function(*arguments, **named))

        return jax.jit(kept, **options)


@functools.lru_cache(maxsize=8)
def devices_of(config: Config) -> Devices:
    """The devices of a run.

    Raises:
        InvalidInput: there are no such devices, or they do not divide `batch_size`.
    """
    devices = Devices.of(config.devices, config.fsdp)
    if config.batch_size % devices.count:
        raise InvalidInput(
            f"batch_size={config.batch_size}: must be a multiple of the {devices.count} devices "
            "that examples are divided among"
        )
    return devices
