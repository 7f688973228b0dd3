"""Files of models read as displacements from theta_0, and their lengths on the way."""

import dataclasses
import math

import numpy as np

from pm_jax.offline.requests import Inputs
from pm_jax.offline.tensor_files import FLOATS, TensorFile


@dataclasses.dataclass(frozen=True)
class Displacement(TensorFile):
    """A file whose numbers are those of a model less those of `theta_0`."""

    model: TensorFile
    theta_0: TensorFile
    # Sums of squares of all that was read, float64.
    squares: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, file: TensorFile, theta_0: TensorFile) -> "Displacement":
        """Return a model's file as the displacement from another."""
        fields = {field.name: getattr(file, field.name) for field in dataclasses.fields(TensorFile)}
        return cls(**fields, model=file, theta_0=theta_0)

    @property
    def length(self) -> float:
        """The norm of all that was read, which is the whole once each part was read once."""
        return math.sqrt(math.fsum(self.squares))

    def read(self, name: str, first: int, stop: int) -> np.ndarray:
        """Read elements, in float32 or wider; raises InvalidInput as a file does."""
        sides = (self.model.read(name, first, stop), self.theta_0.read(name, first, stop))
        wide = np.result_type(np.float32, *(FLOATS[f.entries[name].dtype] for f in self._files))
        model, origin = (side.astype(wide) for side in sides)
        step = model - origin
        self.squares.append(float(np.sum(step.astype(np.float64) ** 2)))
        return step

    @property
    def _files(self) -> tuple[TensorFile, TensorFile]:
        return self.model, self.theta_0


def as_displacements(inputs: Inputs) -> Inputs:
    """Return the same files as displacements; that of theta_0 is 0."""
    base, *models = (Displacement.of(file, inputs.base) for file in (inputs.base, *inputs.models))
    return dataclasses.replace(inputs, base=base, models=tuple(models))
