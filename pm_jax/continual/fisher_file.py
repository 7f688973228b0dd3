"""The diagonal Fisher of a fine-tuned model as a file, for merging with others.

The file is safetensors with the names and shapes of the model's own file. An entry is

    F_k = 1/N sum_n E_y[(d/d theta_k log p(y | x_n))^2]

over the N training examples, with labels y drawn from the model (fisher_exact), all of them weighed
by their probability (curvature_samples=0), or the true ones (fisher_empirical). It is float32, not
negative, and 0 where a tensor plays no part in the predictions. Metadata say how it was measured.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pm_jax import files, rules, trees
from pm_jax.continual.merging.evidence import EvidencePass, Given
from pm_jax.continual.merging.programs import StreamShape, dense_layers_of
from pm_jax.continual.placement.data import place_stream
from pm_jax.continual.placement.devices import devices_of
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.own import model_of
from pm_jax.continual.storage.provenance import environment
from pm_jax.continual.training.initial_model import blank_example, init_fn, plain
from pm_jax.data.stream import TaskStream
from pm_jax.models.model import Model
from pm_jax.rules.building import diagonal_of
from pm_jax.types import InvalidInput, Params, PyTree
from pm_jax.weights import pretrained
from pm_jax.weights.layouts import LAYOUTS, depth_of

KINDS = ("fisher_exact", "gauss_newton_diag", "fisher_empirical")
"""Kinds of curvature that such a file holds: one number for each of the model's."""


def write_fisher(config: Config, seed: int, output: Path, *, overwrite: bool = False) -> str:
    """Measure the Fisher of `config.pretrained` on its data, write it, and say so in a line.

    Raises:
        InvalidInput: a curvature that is no diagonal, weights that do not fit or have no
            classifier, or an output that cannot be written.
    """
    check(config, output, overwrite=overwrite)
    tensors = pretrained.read_tensors(config.pretrained)
    layout = pretrained.layout_of(tensors)
    stream = config.task_stream(seed).together()
    model = model_of(config, stream.num_classes)
    params, state = _fine_tuned(config, stream, model, tensors, layout)
    fisher = _measured(config, seed, stream, model, params, state)
    heads = getattr(config.network(stream.num_classes), "num_heads", 1)
    theirs = _as_file(pretrained.export_params(fisher, layout, num_heads=heads), tensors)
    metadata = {
        "made_by": f"pm_jax {environment()['packages']['pm_jax']}",
        "curvature": config.curvature,
        "curvature_samples": str(config.curvature_samples),
        "examples": str(config.curvature_examples or int(stream.train.sizes.sum())),
        "dataset": Path(config.dataset).name,
        "model": Path(config.pretrained).name,
    }
    pretrained.write_tensors(
        theirs, output, metadata=metadata, overwrite=overwrite, argument="output"
    )
    unused = [name for name in theirs if not theirs[name].any()]
    line = f"wrote the Fisher of {len(theirs)} tensors, on {metadata['examples']} examples"
    return line + (f"; 0 throughout: {files.listed(unused)}" if unused else "")


def check(config: Config, output: Path, *, overwrite: bool = False) -> None:
    """Check, before any data are read, that a Fisher can be measured and written.

    Raises:
        InvalidInput: it cannot.
    """
    if config.from_scratch:
        raise InvalidInput("pretrained=: needs the weights of the model that was fine-tuned")
    if config.curvature not in KINDS:
        raise InvalidInput(
            f"curvature={config.curvature}: is no number for each of the model's, as a Fisher file "
            f"holds; use {', '.join(KINDS)}"
        )
    if output.suffix != ".safetensors":
        raise InvalidInput(f"output={output}: must end in .safetensors")
    if output.exists() and not overwrite:
        raise InvalidInput(f"output={output}: exists; choose another name or set overwrite")
    files.check_folder("output", output)


def _fine_tuned(
    config: Config,
    stream: TaskStream,
    model: Model,
    tensors: pretrained.Tensors,
    layout: str,
) -> tuple[Params, PyTree]:
    """Read the model with its classifier, and its state; raises `InvalidInput`."""
    init = init_fn(
        config,
        stream.num_classes,
        stream.inputs.shape[1:],
        model=model,
        input_dtype=str(stream.inputs.dtype),
    )
    shapes, state = jax.eval_shape(init, jax.random.key(0))
    depth = depth_of(trees.leaves_by_path(shapes))
    heads = [entry.name for entry in LAYOUTS[layout](depth) if entry.path.startswith("head/")]
    if lacking := [name for name in heads if name not in tensors]:
        raise InvalidInput(
            f"pretrained={config.pretrained}: has no classifier ({files.listed(lacking)}), and the "
            "Fisher is that of its predictions; give the fine-tuned model, as --export writes it"
        )
    try:
        return pretrained.load_params(tensors, shapes, head=True), state
    except InvalidInput as error:
        what = str(error).partition(": ")[2]
        raise InvalidInput(f"pretrained={config.pretrained}: {what}") from None


def _measured(
    config: Config, seed: int, stream: TaskStream, model: Model, params: Params, state: PyTree
) -> Params:
    """Measure the diagonal at a model, for all of its parameters."""
    shape, place = StreamShape.of(stream), devices_of(config).place
    blank = blank_example(config, shape.input_shape, shape.input_dtype)
    measure = EvidencePass(
        config,
        plain(model),
        rules.fisher_averaging(),
        trees.leaves_by_path(params),
        shape.largest_task,
        dense_layers_of(model, blank),
        shape.task_classes,
    )
    params = place(params)
    given = Given(place(jax.random.key(seed)), params, params, place(jnp.int32(0)), state)
    evidence = measure.run(place_stream(config, stream, stream.train), given)
    return trees.replace(params, diagonal_of(evidence))


def _as_file(measured: pretrained.Tensors, tensors: pretrained.Tensors) -> pretrained.Tensors:
    """Give a measured Fisher the tensors of the model's file; 0 for those that it does not use."""
    whole = {}
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            continue
        whole[name] = measured.get(name, np.zeros(tensor.shape, np.float32))
        if whole[name].shape != tensor.shape:
            raise InvalidInput(
                f"image_size=: the model reads {name} of shape {list(whole[name].shape)}, and its "
                f"file has {list(tensor.shape)}; give the image_size of the weights"
            )
    return whole
