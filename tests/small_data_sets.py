"""Tiny data sets in the form of those of tensorflow-datasets, prepared without TensorFlow."""

import io

import numpy as np
from PIL import Image

SIZES = ((12, 8), (8, 8), (9, 14))


def picture(index, size=None, mode="RGB"):
    """Noise that differs from index to index; sizes take turns."""
    width, height = size or SIZES[index % len(SIZES)]
    rng = np.random.default_rng(index)
    pixels = rng.integers(256, size=(height, width, len(Image.new(mode, (1, 1)).getbands())))
    return Image.fromarray(pixels.astype(np.uint8).squeeze(), mode)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return io.BytesIO(file.getvalue())


def prepare(data_dir, name, version, splits, features=None, *, image=encoded):
    """Write a data set "name" or "name/configuration".

    `splits` holds examples of the fields in `features`; image fields are Pillow's images. What is
    loaded afterwards is the catalogue's builder of this name and version, if there is one.
    """
    import tensorflow_datasets as tfds

    features = features or {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    data_set, _, configuration = name.partition("/")

    def information(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generators(self, manager):
        return {split: self._generate_examples(split) for split in splits}

    def examples(self, split):
        for number, example in enumerate(splits[split]):
            yield (
                number,
                {k: image(v) if isinstance(v, Image.Image) else v for k, v in example.items()},
            )

    body = {
        "VERSION": tfds.core.Version(version),
        "name": data_set,
        "_info": information,
        "_split_generators": generators,
        "_generate_examples": examples,
        "__module__": __name__,
    }
    if configuration:
        body["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=configuration)]
    with tfds.core.registered.skip_registration():
        builder = type(data_set, (tfds.core.GeneratorBasedBuilder,), body)(
            data_dir=data_dir, file_format="array_record"
        )
    builder.download_and_prepare()
    return builder


def labelled(count, classes=3, first=0, **picture_settings):
    return [
        {"image": picture(first + i, **picture_settings), "label": i % classes}
        for i in range(count)
    ]
