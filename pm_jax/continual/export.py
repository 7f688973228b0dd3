"""The merged model of a run as files that timm, transformers and PEFT load."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pm_jax import files, models
from pm_jax.continual.learner import Learner
from pm_jax.continual.merging.programs import partitions
from pm_jax.continual.settings.config import Config
from pm_jax.continual.settings.factories import is_reference
from pm_jax.continual.settings.run_options import RunOptions
from pm_jax.continual.storage import manifest
from pm_jax.continual.storage.provenance import environment
from pm_jax.continual.training.initial_model import earlier_adapter, starting_params
from pm_jax.data import several
from pm_jax.types import InvalidInput
from pm_jax.weights import clip, peft_adapter, pretrained
from pm_jax.weights.checkpoint_files import find
from pm_jax.weights.layouts import OURS
from pm_jax.weights.peft_start import places_of
from pm_jax.weights.public_names import Form, known


@dataclasses.dataclass(frozen=True)
class Destinations:
    """The paths that a merged model is written to."""

    # File of the whole model, ending in .safetensors; `None` not to write it.
    model: Path | None = None
    # Folder of the LoRA adapter; `None` not to write it.
    adapter: Path | None = None
    overwrite: bool = False
    # One of the run's classifiers, whose kernel and bias the files get; `None` for the first.
    classifier: str | None = None


def check(
    destinations: Destinations, config: Config, seeds: Sequence[int], workdir: Path | None
) -> None:
    """Check before a run that its model can be exported; the run may make the work directory.

    Raises:
        InvalidInput: a path that exists, has the wrong ending or lies nowhere; several seeds; a
            model without a public layout; an adapter of a run that trains no adapter; a classifier
            that the run does not have, or that is not linear in the features.
    """
    model, adapter = destinations.model, destinations.adapter
    _check_classifier(destinations, config)
    _check_clip(destinations, config)
    for flag, path in (("export", model), ("export_adapter", adapter)):
        if path is None:
            continue
        if len(seeds) > 1:
            raise InvalidInput(
                f"{flag}={path}: takes the model of one seed; give one of seeds="
                f"{','.join(map(str, seeds))} a call, which does not train a finished run again"
            )
        _check_path(flag, path, is_file=path is model, overwrite=destinations.overwrite)
        # The run makes its work directory, so that one may still be absent.
        if path.parent.is_dir() or path.parent.absolute() != (workdir and workdir.absolute()):
            files.check_folder(flag, path)
        form = form_for(config)
        if path is adapter and form.layout in ("dinov2", "dinov3"):
            raise InvalidInput(
                f"export_adapter={adapter}: is not written under transformers' names of DINO; use "
                "export, or start from timm's weights"
            )
    if adapter and (config.adapter != "lora" or config.from_scratch):
        raise InvalidInput(
            f"export_adapter={adapter}: needs adapter=lora and pretrained; export writes the whole "
            "model"
        )
    earlier = Path(config.adapter_from).resolve()
    # Its file of weights stands for the folder as well.
    if adapter and config.adapter_from and adapter.resolve() in (earlier, earlier.parent):
        raise InvalidInput(
            f"export_adapter={adapter}: is what the run starts from; choose another name"
        )
    start = find("pretrained", config.pretrained).tensors if config.pretrained else ()
    if model and model.exists() and any(model.samefile(path) for path in start):
        raise InvalidInput(f"export={model}: is what the run starts from; choose another name")


def _check_classifier(destinations: Destinations, config: Config) -> None:
    """Check that the classifier of an export can be the head of a model; raises `InvalidInput`."""
    label, by_label = destinations.classifier, {x.label: x for x in config.chosen_classifiers}
    names = ",".join(by_label)
    path = destinations.model or destinations.adapter
    if label and not path:
        raise InvalidInput(f"classifier_in_export={label}: goes with export or export_adapter")
    if label and label not in by_label:
        raise InvalidInput(
            f"classifier_in_export={label}: must be one of the run's classifiers={names}"
        )
    chosen = by_label[label or config.classifiers[0]]
    if path and not chosen.classifier.linear:
        linear = [each.label for each in by_label.values() if each.classifier.linear]
        remedy = f"use {' or '.join(linear)}" if linear else "run it with one that is"
        given = "" if label else f"the first of classifiers={names}, "
        raise InvalidInput(
            f"classifier_in_export={chosen.label}: {given}is not linear in the features, as the "
            f"head of the exported model is; {remedy}"
        )


def _check_clip(destinations: Destinations, config: Config) -> None:
    """Check that a CLIP model's files have places for all that changes; raises `InvalidInput`."""
    if config.model != "clip":
        return
    label = destinations.classifier or config.classifiers[0]
    if (destinations.model or destinations.adapter) and label != "zero_shot":
        raise InvalidInput(
            f"classifier_in_export={label}: the files of a CLIP model have no place for a "
            "classifier; use zero_shot, which its text tower makes"
        )
    if destinations.adapter and form_for(config).layout == "open_clip":
        raise InvalidInput(
            f"export_adapter={destinations.adapter}: PEFT has no adapters for the joint "
            "projections of open_clip's attention; export writes the whole model"
        )


def _check_path(flag: str, path: Path, *, is_file: bool, overwrite: bool) -> None:
    if is_file and path.suffix != ".safetensors":
        raise InvalidInput(f"{flag}={path}: must end in .safetensors")
    if not is_file and path.suffix == ".safetensors":
        raise InvalidInput(f"{flag}={path}: is a folder of two files; leave the ending out")
    if path.exists():
        if path.is_dir() == is_file:
            kind = "a folder" if is_file else "a file"
            raise InvalidInput(f"{flag}={path}: is {kind} already; choose another name")
        if not overwrite:
            raise InvalidInput(f"{flag}={path}: exists; choose another name or set overwrite")


def form_for(config: Config) -> Form:
    """Return the layout and names in which the weights of a run are exported.

    They are those of the weights that it started from, so that both load in the same model.

    Raises:
        InvalidInput: there is none for the model.
    """
    network = None if is_reference(config.model) else config.network(num_classes=1)
    if config.pretrained:
        form = known(pretrained.read_tensors(config.pretrained)).form
        # AugReg's layout is for .npz only, and ours for Orbax.
        if form.layout not in ("augreg", OURS):
            return form
    if isinstance(network, models.VisionTransformer):
        rotary = network.positions == "rotary"
        if rotary and network.pooling == "mean_norm":
            raise InvalidInput(
                "pooling=mean_norm: has no public layout with positions=rotary to be exported in; "
                "use mean or class_token"
            )
        return Form("dinov3" if rotary else "timm")
    if isinstance(network, models.TextEncoder):
        return Form("bert")
    raise InvalidInput(f"model={config.model}: has no public layout to be exported in; use a ViT")


def write(destinations: Destinations, config: Config, seed: int, workdir: Path) -> None:
    """Write the merged model of a finished run, from its last checkpoint.

    Raises:
        InvalidInput: no finished run, a path that cannot be written, or a displacement whose rank
            the rule made too high.
    """
    if not (destinations.model or destinations.adapter):
        return
    learner = Learner(config, seed, workdir / f"seed_{seed}", RunOptions(quiet=True))
    # A learner begins with theta_0; `finished_params` then restores the end of the run.
    start = learner.params
    classifier = destinations.classifier or config.classifiers[0]
    merged, form = learner.finished_params(classifier), form_for(config)
    layout = form.layout
    overwrite = destinations.overwrite
    if path := destinations.model:
        if config.model == "clip":
            # The text tower is as it was, and makes the columns.
            tensors = pretrained.read_tensors(config.pretrained)
            tensors |= pretrained.export_params(clip.without_columns(merged), form)
        else:
            tensors = pretrained.export_params(merged, form)
        metadata = {**_metadata(learner, layout), "classifier": classifier}
        with _covering(workdir, path):
            pretrained.write_tensors(tensors, path, metadata=metadata, overwrite=overwrite)
    if path := destinations.adapter:
        paths, rank = partitions(config, merged)[1].adapted, config.lora_rank
        rank *= learner.stream.num_tasks
        if earlier := earlier_adapter(config):
            # One adapter takes the place of the earlier one: it is relative to the weights.
            start = starting_params(dataclasses.replace(config, adapter_from=""), start)
            paths = tuple(dict.fromkeys([*paths, *places_of(start, earlier, layout)]))
            rank += earlier.rank
        if config.model == "clip":
            start, merged = (clip.without_columns(params) for params in (start, merged))
        try:
            adapter = peft_adapter.peft_adapter(start, merged, paths, layout, rank)
        except InvalidInput:
            raise
        except ValueError as error:
            raise InvalidInput(
                f"export_adapter={path}: {error}, with rule={config.rule}; export writes the whole "
                "model"
            ) from error
        # Checked once more, as training can take long.
        _check_path("export_adapter", path, is_file=False, overwrite=overwrite)
        with _covering(workdir, path):
            peft_adapter.write_adapter(adapter, path)


def _covering(workdir: Path, path: Path) -> contextlib.AbstractContextManager:
    """List a file that is exported into the work directory in its manifest."""
    if not path.resolve().is_relative_to(workdir.resolve()):
        return contextlib.nullcontext()
    return manifest.covering(workdir, path.resolve().relative_to(workdir.resolve()).as_posix())


def _metadata(learner: Learner, layout: str) -> dict[str, str]:
    config, stream = learner.config, learner.stream
    network = config.network(stream.num_classes)
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    sizes: dict[str, object] = {
        name: value for name, value in fields.items() if isinstance(value, (int, float))
    }
    if isinstance(network, models.VisionTransformer):
        height, width = stream.inputs.shape[1:3]
        side = config.image_size or height
        sizes["image_size"] = side if config.image_size or height == width else f"{height}x{width}"
        sizes["inputs"] = "pixels 0..255 as x / 127.5 - 1"
    content = {
        "made_by": f"pm_jax {environment()['packages']['pm_jax']}",
        "layout": layout,
        "model": config.model,
        **sizes,
        "rule": config.rule,
        "dataset": several.title_of(config.dataset),
        "num_tasks": stream.num_tasks,
        "seed": learner.seed,
        "classes": "column c of the classifier is label c of the data",
    }
    if stream.class_names:
        content["classes"] = "column c of the classifier is class c of class_names"
        content["class_names"] = json.dumps(stream.class_names)
    return {name: str(value) for name, value in content.items()}
