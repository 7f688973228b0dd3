"""Data sets that tensorflow-datasets has prepared, read with or without TensorFlow."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pm_jax.data.packages import needed_for
from pm_jax.types import InvalidInput

AT_ONCE = 256
"""Records that are read together: one by one, most of the time is spent waiting for a thread."""


def find(name: str, data_dir: str = "", splits: Sequence[str] = ()) -> Any:
    """Find the builder of a prepared data set, such as "cifar100" or "domainnet/real".

    Raises:
        InvalidInput: the data set is unknown, is not prepared, lacks a split, or needs TensorFlow.
    """
    with needed_for(f"dataset={name}"):
        import tensorflow_datasets as tfds
    where = {"data_dir": data_dir} if data_dir else {}
    try:
        builder = tfds.builder(name, **where)
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError):
        raise InvalidInput(
            f"dataset={name}: is not in the catalogue of tensorflow-datasets, nor 'digits', a "
            "folder or the path of an .npz, .csv or .jsonl"
        ) from None
    command = f"tfds build {name} --file_format=array_record"
    command += f" --data_dir={data_dir}" if data_dir else ""
    if not builder.is_prepared():
        raise InvalidInput(
            f"dataset={name}: is not prepared in {builder.data_path.parent}; prepare it with: "
            f"{command}"
        )
    if lacking := [split for split in splits if split not in builder.info.splits]:
        raise InvalidInput(
            f"dataset={name}: needs a split {lacking[0]!r}; it has {', '.join(builder.info.splits)}"
        )
    if not _has_random_access(builder) and not importlib.util.find_spec("tensorflow"):
        raise InvalidInput(
            f"dataset={name}: is prepared as {builder.info.file_format.value}, which takes "
            f"TensorFlow; pip install 'pm_jax[tensorflow]', or prepare it elsewhere with: {command}"
        )
    return builder


def is_known(name: str, data_dir: str = "") -> bool:
    """Tell whether tensorflow-datasets knows a data set, prepared or not."""
    with needed_for(f"dataset={name}"):
        import tensorflow_datasets as tfds
    try:
        tfds.builder(name, **({"data_dir": data_dir} if data_dir else {}))
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError):
        return False
    return True


def field_of(builder: Any, field: str, name: str) -> Any:
    """Return the feature of a data set that has the domains of its examples.

    Raises:
        InvalidInput: it has no such feature.
    """
    features = dict(builder.info.features.items())
    if field not in features:
        raise InvalidInput(
            f"domain_field={field}: {name} has the fields {', '.join(features)}; name one of them"
        )
    return features[field]


def domain_of(feature: Any, value: Any) -> Any:
    """Return the value of a field as a whole number or a string, by its name if it has one."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return feature.int2str(int(value)) if getattr(feature, "names", None) else int(value)


def examples(
    builder: Any, split: str, fields: Sequence[str], positions: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """Yield some fields of a split's examples in the order of the files, images still encoded.

    Raises:
        InvalidInput: a file is missing or damaged.
    """
    import tensorflow_datasets as tfds

    name, features = builder.info.full_name, builder.info.features
    try:
        if _has_random_access(builder):
            # Only the wanted fields are decoded, and of images not even these: threads do so later.
            wanted = tfds.features.FeaturesDict({field: features[field] for field in fields})
            decoders, raw = _encoded(features, fields), tfds.decode.DeserializeMethod.RAW_BYTES
            source = builder.as_data_source(split=split, deserialize_method=raw)
            places = range(len(source)) if positions is None else positions.tolist()
            for first in range(0, len(places), AT_ONCE):
                for record in source.__getitems__(places[first : first + AT_ONCE]):
                    yield wanted.deserialize_example_np(record, decoders=decoders)
        else:
            yield from _with_tensorflow(builder, split, fields, positions)
    except Exception as error:
        # The readers raise many types for damaged files.
        raise InvalidInput(
            f"dataset={name}: split {split} cannot be read ({type(error).__name__}: {error}); "
            "prepare it again"
        ) from error


def _has_random_access(builder: Any) -> bool:
    import tensorflow_datasets as tfds

    formats = tfds.core.FileFormat.with_random_access()
    return bool(builder.info.available_file_formats() & formats)


def _encoded(features: Any, fields: Sequence[str]) -> dict[str, Any]:
    """Make decoders that leave the images among some fields encoded."""
    import tensorflow_datasets as tfds

    images = [field for field in fields if isinstance(features[field], tfds.features.Image)]
    return {field: tfds.decode.SkipDecoding() for field in images}


def _with_tensorflow(
    builder: Any, split: str, fields: Sequence[str], positions: np.ndarray | None
) -> Iterator[dict[str, Any]]:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # TensorFlow would take all memory of the GPU. It refuses to be told once it has been used.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    decoders = tfds.decode.PartialDecoding(
        dict.fromkeys(fields, True), decoders=_encoded(builder.info.features, fields)
    )
    # Interleaved files would change the order of the examples.
    in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    dataset = builder.as_dataset(split=split, decoders=decoders, read_config=in_order)
    chosen = None if positions is None else set(positions.tolist())
    for position, example in enumerate(tfds.as_numpy(dataset)):
        if chosen is None or position in chosen:
            yield example
