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
from pm_jax.weights.layouts import OURS, entries_of
from pm_jax.weights.public_names import Form, known

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
    form = known(tensors).form
    stream = config.task_stream(seed).together()
    model = model_of(config, stream.num_classes)
    params, state = _fine_tuned(config, stream, model, tensors, form)
    fisher = _measured(config, seed, stream, model, params, state)
    heads = getattr(config.network(stream.num_classes), "num_heads", 1)
    theirs = _as_file(_exported(fisher, form, heads), tensors)
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
    if config.model == "clip":
        raise InvalidInput(
            "model=clip: has no classifier in its file, and the Fisher is that of its predictions; "
            "use another model"
        )
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
    form: Form,
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
    entries = entries_of(form.layout, trees.leaves_by_path(shapes))
    heads = [form.names.get(e.name, e.name) for e in entries if e.path.startswith("head/")]
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


def _exported(fisher: Params, form: Form, num_heads: int) -> pretrained.Tensors:
    """Give a measured Fisher the names and shapes of the model's file."""
    leaves = trees.leaves_by_path(fisher)
    if form.layout == OURS:
        # Merging knows the arrays of an nnx state by the paths of their variables.
        names = {path: form.names.get(path, path).removesuffix("/value") for path in leaves}
        return {names[path]: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    separate = form.layout == "timm" and {"reg_token", "cls_token"} <= set(leaves)
    if separate if form.class_position is None else not form.class_position:
        # The file has the class token and its position as one sum, and so their derivative once.
        positions = jnp.asarray(leaves["pos_embed"]).at[:, :1].set(0)
        fisher = trees.replace(fisher, {"pos_embed": positions})
    return pretrained.export_params(fisher, form, num_heads=num_heads)


def _as_file(measured: pretrained.Tensors, tensors: pretrained.Tensors) -> pretrained.Tensors:
    """Give a measured Fisher the tensors of the model's file; 0 for those that it does not use."""
    whole = {}
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            continue
        name = name.removesuffix("/value")
        whole[name] = measured.get(name, np.zeros(tensor.shape, np.float32))
        if whole[name].shape != tensor.shape:
            raise InvalidInput(
                f"image_size=: the model reads {name} of shape {list(whole[name].shape)}, and its "
                f"file has {list(tensor.shape)}; give the image_size of the weights"
            )
    return whole
