"""The mesh of devices that a run's arrays lie on.

Every function of a run is one program over the mesh. Examples are divided along their first axis.
Parameters, and arrays of their shapes, are copied to each device or, with `fsdp`, divided among so
many devices that together hold one copy. XLA moves data between devices by itself, and the numbers
are those of one device up to the order of sums.
"""

import contextlib
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
"""Examples are divided along both axes of the mesh."""

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh of devices, and how arrays lie on it; with one device, as if there were none."""

    # Its axes are `data`, along which parameters are copied, and `fsdp`, which divides them.
    mesh: Mesh
    # Compiled functions multiply matrices in this precision, where they name no other.
    precision: str = "default"

    @classmethod
    def of(cls, count: int = 1, parts: int = 1, precision: str = "default") -> "Devices":
        """Make a mesh of the first `count` devices (0: all), of which `parts` hold one copy.

        Raises:
            InvalidInput: there are not so many, or the parts do not divide them.
        """
        present = jax.devices()
        number = count or len(present)
        if number > len(present):
            raise InvalidInput(
                f"devices={count}: there are {len(present)}; give at most as many, or 0 for all"
            )
        if processes.several() and number < len(present):
            raise InvalidInput(
                f"devices={count}: several processes use all their {len(present)} devices; give 0"
            )
        if number % parts:
            raise InvalidInput(f"fsdp={parts}: must divide the {number} devices")
        shape, automatic = (number // parts, parts), (jax.sharding.AxisType.Auto,) * 2
        chosen = present[:number]
        mesh = jax.make_mesh(shape, EXAMPLES, axis_types=automatic, devices=chosen)
        return cls(mesh, precision)

    @classmethod
    def like(cls, array: Array) -> "Devices":
        """Return the mesh that an array lies on."""
        mesh = getattr(array.sharding, "mesh", None)
        return cls(mesh) if isinstance(mesh, Mesh) else cls.of()

    @property
    def count(self) -> int:
        """The number of devices."""
        return self.mesh.size

    def multiple(self, examples: int) -> int:
        """Round a number of examples up, so that all devices have equally many."""
        return -(-examples // self.count) * self.count

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Return the sharding of an array without an axis of examples."""
        parts, spec = self.mesh.shape[PARTS], list[str | None]()
        fitting = [axis for axis, length in enumerate(shape) if length % parts == 0 and length]
        # Matrices and larger arrays are divided, along the longest axis that allows it.
        if parts > 1 and len(shape) > 1 and fitting:
            axis = max(fitting, key=lambda axis: shape[axis])
            spec = [*[None] * axis, PARTS]
        return NamedSharding(self.mesh, P(*spec))

    def place(self, tree: PyTree) -> Any:
        """Put arrays, which all processes must have, where `sharding` says."""
        return jax.tree.map(jnp.asarray if self.count == 1 else self._put, tree)

    def _put(self, leaf: Any) -> Array:
        sharding = self.sharding(np.shape(leaf))
        # An array that already spans the processes cannot be read here, only moved.
        if not processes.several() or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, sharding)
        # NumPy has no type for keys: their numbers are placed instead.
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self._put(jax.random.key_data(leaf)))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def whole(self, tree: PyTree) -> Any:
        """Copy arrays to NumPy's, put together from their parts; all processes must call."""
        # Copies of every part go to every process, as NumPy sees its own devices only.
        if processes.several():
            tree = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))(tree)
        return jax.tree.map(np.array, tree)

    def shapes(self, tree: PyTree) -> PyTree:
        """Describe arrays for Orbax to restore; NumPy's arrays stay as they are."""
        only = SingleDeviceSharding(self.mesh.devices.flat[0]) if self.count == 1 else None

        def shape(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray):
                return leaf
            sharding = only or self.sharding(leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape, tree)

    def place_rows(self, array: np.ndarray) -> Array:
        """Divide an array by its rows, padded to equally many; a process reads only its rows."""
        if self.count == 1:
            # NumPy reads the examples of a source, which JAX does not.
            return jnp.asarray(np.asarray(array))
        length = -(-len(array) // self.count)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index
            rows = array[index[0]]
            return np.pad(rows, [(0, length - len(rows)), *[(0, 0)] * (array.ndim - 1)])

        shape = (length * self.count, *array.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, P(EXAMPLES)), part)

    def columns(self, number: int) -> slice:
        """Return the slice that this process holds of `number` columns, as many for each device."""
        places = self._by_columns.addressable_devices_indices_map((1, number)).values()
        ranges = [index[1].indices(number) for index in places if index]
        return slice(min(first for first, *_ in ranges), max(stop for _, stop, _ in ranges))

    def place_columns(self, array: np.ndarray, number: int) -> Array:
        """Join the `columns` of all processes, [S, ...], to one divided array [S, number, ...]."""
        if self.count == 1:
            return jnp.asarray(array)
        shape = (len(array), number, *array.shape[2:])
        return jax.make_array_from_process_local_data(self._by_columns, array, shape)

    @property
    def _by_columns(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(None, EXAMPLES))

    def rows(self, array: Array, rows: Array) -> Array:
        """Gather rows (int32 [B], B a multiple of the devices) of divided integers."""
        if self.count == 1:
            return array[rows]

        def of_device(part: Array, rows: Array) -> Array:
            places = rows - jax.lax.axis_index(EXAMPLES) * part.shape[0]
            inside = (places >= 0) & (places < part.shape[0])
            values = part[jnp.where(inside, places, 0)]
            values = jnp.where(inside.reshape(-1, *[1] * (part.ndim - 1)), values, 0)
            # Each row comes from one device, and the others add zeros: exact for integers.
            return jax.lax.psum_scatter(values, EXAMPLES, scatter_dimension=0, tiled=True)

        divided = P(EXAMPLES)
        gather = jax.shard_map(
            of_device, mesh=self.mesh, in_specs=(divided, P()), out_specs=divided
        )
        return gather(array, rows)

    def by_each(self, function: Callable[..., Tree], *arguments: Any) -> Tree:
        """Have each device compute a function of whole arrays by itself, inside a compiled one.

        Loops that XLA would divide exchange something in every step, for which a CPU's devices can
        wait for ever where several such loops run at a time.
        """
        if self.count == 1:
            return function(*arguments)
        whole = jax.shard_map(
            function, mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
        return whole(*arguments)

    def spread(self, examples: Tree, axis: int = 0) -> Tree:
        """Divide examples along an axis, inside a compiled function."""
        if self.count == 1:
            return examples
        sharding = NamedSharding(self.mesh, P(*[None] * axis, EXAMPLES))
        return jax.lax.with_sharding_constraint(examples, sharding)

    def keep(self, tree: Tree) -> Tree:
        """Constrain arrays to lie where `sharding` says, inside a compiled function."""
        if self.count == 1:
            return tree
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, self.sharding(np.shape(x))), tree
        )

    def jit(
        self, function: Callable[..., Any], *, once: bool = False, **options: Any
    ) -> Callable[..., Any]:
        """Compile a function, in `precision`, whose results lie where `sharding` says.

        One that runs `once` is compiled in less than half of the time on a CPU, and is slower.
        """
        if once and self.mesh.devices.flat[0].platform == "cpu":
            options["compiler_options"] = {"xla_backend_optimization_level": 1}

        # A run's state then always lies in the same way, so that nothing is compiled twice.
        @functools.wraps(function)
        def kept(*arguments: Any, **named: Any) -> Any:
            # Without a choice, that of JAX's own setting holds.
            chosen = None if self.precision == "default" else self.precision
            with jax.default_matmul_precision(chosen) if chosen else contextlib.nullcontext():
                return self.keep(function(*arguments, **named))

        return jax.jit(kept, **options)


@functools.lru_cache(maxsize=8)
def devices_of(config: Config) -> Devices:
    """Return the devices of a run.

    Raises:
        InvalidInput: there are no such devices, or they do not divide `batch_size`.
    """
    devices = Devices.of(config.devices, config.fsdp, config.matmul_precision)
    if config.batch_size % devices.count:
        raise InvalidInput(
            f"batch_size={config.batch_size}: must be a multiple of the {devices.count} devices "
            "that examples are divided among"
        )
    return devices
