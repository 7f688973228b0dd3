"""The kernels of dense layers: which axes are inputs and outputs, and what a layer does with them.

A kernel `[*stacked, *inputs, *outputs]` is a stack of matrices (inputs) x (outputs). An ordinary
`Dense` kernel is one matrix [in, out]; the kernels of attention have several axes on one side
([in, heads, size] and [heads, size, out]); that of a convolution is (h w in) x out; and `nn.scan`
stacks the kernels of all layers, [layers, in, out].
"""

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from pm_jax.types import Array, InvalidInput

Shape = tuple[int, ...]
T = TypeVar("T")


class Axes(NamedTuple):
    """How the axes of a kernel `[*stacked, *inputs, *outputs]` divide.

    Attributes:
        stacked: number of leading axes that count matrices.
        inputs: number of axes that the matrices are multiplied by inputs over.
    """

    stacked: int
    inputs: int

    def split(self, shape: Sequence[T]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
        """The parts of a shape, or of letters, for the stack, the inputs and the outputs.

        Example:
            >>> Axes(stacked=1, inputs=1).split((12, 768, 4, 64))
            ((12,), (768,), (4, 64))
        """
        first, last = self.stacked, self.stacked + self.inputs
        return tuple(shape[:first]), tuple(shape[first:last]), tuple(shape[last:])

    def sides(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        _, inputs, outputs = self.split(shape)
        return math.prod(inputs), math.prod(outputs)


def axes_of(
    leaves: Mapping[str, Array],
    path: str,
    input_axes: int | None = None,
    stacked_axes: int | None = None,
) -> Axes:
    """How the axes of a kernel divide, as far as its shape and that of its bias tell.

    A kernel of two axes is [in, out]. The bias beside a kernel has the axes of the stack and of the
    outputs, so it tells the number of input axes, and mostly that of the stack.

    Args:
        leaves: flat `{path: array}`, with the bias beside the kernel if the layer has one.
        path: of the kernel.
        input_axes: number of input axes, where it is known; otherwise `None`.
        stacked_axes: number of axes of the stack, where it is known; otherwise `None`.

    Raises:
        InvalidInput: the leaf is no kernel, the numbers do not fit it, or more than one division
            is possible.

    Example:
        >>> attention = {"out/kernel": jnp.ones((4, 8, 32)), "out/bias": jnp.ones(32)}
        >>> axes_of(attention, "out/kernel")
        Axes(stacked=0, inputs=2)
    """
    kernel, shape = leaves[path], tuple(leaves[path].shape)
    named_otherwise = path.rpartition("/")[2] in ("bias", "scale")
    if len(shape) < 2 or named_otherwise or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise InvalidInput(
            f"{path}: of shape {shape} and type {kernel.dtype} is none of the dense kernels "
            "[in, out], [*inputs, *outputs] or [layers, in, out]; choose other leaves"
        )
    bias = leaves.get(f"{path.rpartition('/')[0]}/bias".lstrip("/"))
    every = [
        Axes(stacked, inputs)
        for stacked in range(len(shape) - 1)
        for inputs in range(1, len(shape) - stacked)
    ]
    given = [
        axes
        for axes in every
        if input_axes in (None, axes.inputs) and stacked_axes in (None, axes.stacked)
    ]
    if not given:
        raise InvalidInput(
            f"{path}: of shape {shape} cannot have input_axes={input_axes} and stacked_axes="
            f"{stacked_axes}; leave at least one axis to each side of its matrices"
        )
    # The bias has the axes of the stack and then those of the outputs.
    fitting = [
        axes
        for axes in given
        if bias is not None and axes.split(shape)[0] + axes.split(shape)[2] == tuple(bias.shape)
    ]
    # Without a bias a kernel is one matrix, if it can be: no stack unless one is spoken of.
    unstacked = [axes for axes in given if axes.stacked == (stacked_axes or 0)]
    candidates = fitting or (given if len(given) == 1 else unstacked)
    if len(candidates) == 1:
        return candidates[0]
    possible = " or ".join(
        f"{inputs} x {outputs}" + (f" for each of {stacked}" if stacked else "")
        for stacked, inputs, outputs in (axes.split(shape) for axes in fitting or given)
    )
    raise InvalidInput(
        f"{path}: of shape {shape} may be {possible}; give the number of its input axes as "
        "input_axes= and of the axes that stack layers as stacked_axes=, or module="
    )


class Contraction(NamedTuple):
    """A layer that is an einsum of its inputs and its kernel, by the letters of their axes.

    Attributes:
        inputs: letters of the inputs, the examples first.
        kernel: letters of the kernel.
        outputs: letters of the outputs.
    """

    inputs: str
    kernel: str
    outputs: str

    @classmethod
    def general(
        cls, ndim: int, axis: Sequence[int], batch_axes: Sequence[int], features: int
    ) -> "Contraction":
        """The contraction of a `DenseGeneral` layer; `Dense` is the one of the last axis.

        Args:
            ndim: number of axes of the inputs.
            axis: axes of the inputs that are summed over.
            batch_axes: axes of the inputs that the kernel has too.
            features: number of new axes.
        """
        letters = string.ascii_letters[:ndim]
        new = string.ascii_letters[ndim : ndim + features]
        # In ascending order, whatever order the layer was given them in: so does flax.
        summed = "".join(letters[a] for a in sorted(a % ndim for a in axis))
        batch = "".join(letters[a] for a in sorted(a % ndim for a in batch_axes))
        rest = "".join(letter for letter in letters if letter not in summed + batch)
        return cls(letters, batch + summed + new, batch + rest + new)

    @classmethod
    def einsum(cls, equation: str, ndim: int) -> "Contraction | None":
        """The contraction of an einsum of inputs with some axes; `None` for dots in the kernel."""
        operands, outputs = equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        if "..." in kernel:
            return None
        unused = [letter for letter in string.ascii_letters if letter not in equation]
        dots = "".join(unused[: ndim - len(inputs.replace("...", ""))])
        return cls(inputs.replace("...", dots), kernel, outputs.replace("...", dots))

    @property
    def summed(self) -> list[str]:
        """Letters of the kernel that the product sums over, in the kernel's order."""
        return [c for c in self.kernel if c in self.inputs and c not in self.outputs]

    @property
    def produced(self) -> list[str]:
        """Letters that the kernel brings into the outputs, in the kernel's order."""
        return [c for c in self.kernel if c not in self.inputs and c in self.outputs]

    @property
    def axes(self) -> Axes | None:
        """Division of the kernel's axes; `None` for kernels that are not [stack, inputs, outputs].

        Example:
            >>> Contraction("btd", "dnh", "btnh").axes
            Axes(stacked=0, inputs=1)
        """
        stacked = [c for c in self.kernel if c in self.inputs and c in self.outputs]
        divided = [*stacked, *self.summed, *self.produced]
        if divided != [*self.kernel] or not self.summed or not self.produced:
            return None
        return Axes(len(stacked), len(self.summed))

    @property
    def matrices(self) -> Axes | None:
        """Division of the kernel's axes by their order: those before the summed ones are a stack.

        Example:
            >>> Contraction("btd", "ndh", "btnh").matrices  # one matrix for each head n
            Axes(stacked=1, inputs=1)
        """
        first = min((self.kernel.index(c) for c in self.summed), default=0)
        last = first + len(self.summed)
        if [*self.kernel[first:last]] != self.summed:
            return None
        return Axes(first, last - first) if first < last < len(self.kernel) else None

    @property
    def is_matrix_product(self) -> bool:
        """Whether rows of the inputs are multiplied by one matrix, in any order of its axes.

        Example:
            >>> Contraction("btd", "hd", "bth").is_matrix_product
            True
            >>> Contraction("bnd", "ndh", "bnh").is_matrix_product  # a matrix for each n
            False
        """
        rest = [c for c in self.inputs if c not in self.summed]
        whole = sorted([*self.summed, *self.produced]) == sorted(self.kernel)
        # The rows of inputs and outputs are the same ones in the same order, examples first.
        return (
            whole
            and rest == [c for c in self.outputs if c not in self.produced]
            and rest[:1] == [self.inputs[0]]
            and all(len(set(part)) == len(part) for part in self)
        )

    def as_matrix(self, leaf: Array, kind: str) -> Array:
        """The kernel of a matrix product as [in, out], or its bias as [out].

        Args:
            leaf: the kernel or the bias.
            kind: "kernel" or "bias".
        """
        moved = jnp.transpose(leaf, self._matrix_order(kind))
        if kind == "bias":
            return moved.reshape(-1)
        return moved.reshape(math.prod(moved.shape[: len(self.summed)]), -1)

    def from_matrix(self, matrix: Array, kind: str, shape: Shape) -> Array:
        """The way back from `as_matrix` to a leaf of a shape."""
        order = self._matrix_order(kind)
        moved = matrix.reshape([shape[axis] for axis in order])
        return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])

    def _matrix_order(self, kind: str) -> list[int]:
        """Axes of the kernel or the bias in the order of the matrix."""
        if kind == "kernel":
            return [self.kernel.index(c) for c in [*self.summed, *self.produced]]
        # The axes of a bias come in the order of the outputs.
        letters = [c for c in self.outputs if c in self.kernel]
        return [letters.index(c) for c in self.produced]


class Convolution(NamedTuple):
    """A convolution, by the settings that linen and nnx have in common.

    Attributes:
        strides: by axis of the window, as are the dilations.
        padding: as flax has it.
        input_dilation: of the inputs.
        kernel_dilation: of the kernel.
        groups: number of groups of features.
    """

    strides: Shape
    padding: Any
    input_dilation: Shape
    kernel_dilation: Shape
    groups: int

    @classmethod
    def of(cls, layer: Any) -> "Convolution | None":
        """The convolution of a linen or nnx `Conv`; `None` for a masked kernel."""
        if layer.mask is not None:
            return None
        size = layer.kernel_size
        window = 1 if isinstance(size, int) else len(size)

        def by_axis(value: int | Sequence[int] | None) -> Shape:
            return (value or 1,) * window if isinstance(value, int | None) else tuple(value)

        return cls(
            by_axis(layer.strides),
            layer.padding,
            by_axis(layer.input_dilation),
            by_axis(layer.kernel_dilation),
            layer.feature_group_count,
        )

    def __call__(self, inputs: Array, kernel: Array) -> Array:
        """Convolve inputs [..., *window, in] with a kernel [*window, in / groups, out]."""
        window = len(self.strides)
        leading = inputs.shape[: inputs.ndim - window - 1]
        x = inputs.reshape(-1, *inputs.shape[inputs.ndim - window - 1 :])
        spans = [(k - 1) * d for k, d in zip(kernel.shape, self.kernel_dilation, strict=False)]
        padding = self.padding
        if padding in ("CIRCULAR", "REFLECT", "CAUSAL"):
            mode = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}[padding]
            around = [(s, 0) if padding == "CAUSAL" else (s // 2, s - s // 2) for s in spans]
            x = jnp.pad(x, [(0, 0), *around, (0, 0)], mode=mode)
            padding = "VALID"
        elif isinstance(padding, int):
            padding = [(padding, padding)] * window
        elif not isinstance(padding, str):
            padding = [(p, p) if isinstance(p, int) else p for p in padding]
        y = lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            # Channels come last in flax: batch, axes of the window, channels.
            dimension_numbers=lax.ConvDimensionNumbers(
                (0, window + 1, *range(1, window + 1)),
                (window + 1, window, *range(window)),
                (0, window + 1, *range(1, window + 1)),
            ),
            feature_group_count=self.groups,
        )
        return y.reshape(*leading, *y.shape[1:])


def shape_of(leaf: Any) -> Shape:
    """Shape of an array, of a description of one, or of the array in a box of flax."""
    # Boxed leaves, as `nn.Partitioned`, are trees of one leaf.
    (array,) = jax.tree.leaves(leaf)
    return tuple(array.shape)
