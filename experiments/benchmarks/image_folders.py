"""Reading a folder of JPEGs to stored form, beside the same images prepared as array_record.

python -m experiments.benchmarks.image_folders --images=10000

Both are read in turns, nothing is kept between them, and the least of the times is compared: what
else the machine does only ever adds to a time. The bound is 1.3.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from experiments import flags as experiment_flags
from pm_jax.data import image_folders, tfds_images

CLASSES = 20
BOUND = 1.3

flags.DEFINE_integer("images", 10_000, "Images, of which a tenth is for testing.")
flags.DEFINE_integer("side", 168, "Their side in pixels.")
flags.DEFINE_integer("stored_size", 0, "Side that they are resized to; 0 to leave them.")
flags.DEFINE_integer("repeats", 3, "Turns.")


def jpegs(count: int, side: int) -> Iterator[tuple[str, int, bytes]]:
    """Yield split, class and content of files that are smooth, as photographs are."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(256, size=(12, 12, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        yield ("test" if number % 10 == 0 else "train"), number // 10 % CLASSES, file.getvalue()


def prepare(folder: Path, written: Sequence[tuple[str, int, bytes]]) -> None:
    """Write the images as files in folders, and as a data set of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
    )

    def examples(self: Any, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        of_split = (x for x in enumerate(written) if x[1][0] == split)
        for number, (_, label, content) in of_split:
            yield number, {"image": io.BytesIO(content), "label": label}

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "name": "jpegs",
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
        "_split_generators": lambda self, manager: {
            split: self._generate_examples(split) for split in ("train", "test")
        },
        "_generate_examples": examples,
        "__module__": __name__,
    }
    with tfds.core.registered.skip_registration():
        make = type("jpegs", (tfds.core.GeneratorBasedBuilder,), body)
        make(data_dir=folder / "prepared", file_format="array_record").download_and_prepare()
    for number, (split, label, content) in enumerate(written):
        path = folder / "files" / split / f"class_{label:02}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def table(count: int, side: int, stored_size: int, repeats: int) -> dict[str, float]:
    """Time both ways of reading, in seconds, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), dict[str, list[float]]()
        prepare(folder, list(jpegs(count, side)))

        def prepared(**settings: Any) -> Any:
            return tfds_images.load_images(["jpegs"], str(folder / "prepared"), **settings)

        def files(**settings: Any) -> Any:
            return image_folders.load(folder / "files", **settings)

        ways: dict[str, Callable[..., Any]] = {"array_record": prepared, "folder": files}
        for turn in range(repeats):
            for way, read in ways.items():
                cache = str(folder / f"{way}_{turn}")
                clock = time.perf_counter()
                [found] = read(stored_size=stored_size, cache_dir=cache)
                seconds.setdefault(way, []).append(time.perf_counter() - clock)
                assert len(found.train_labels) + len(found.test_labels) == count
    least = {way: min(times) for way, times in seconds.items()}
    ratio = least["folder"] / least["array_record"]
    return {f"{way}, s": value for way, value in least.items()} | {"folder / array_record": ratio}


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    del argv
    values = flags.FLAGS
    found = table(values.images, values.side, values.stored_size, values.repeats)
    for name, value in found.items():
        bound = f"  (bound {BOUND})" if "/" in name else ""
        print(f"  {name:30s}{value:10.3f}{bound}")


if __name__ == "__main__":
    app.run(main, flags_parser=experiment_flags.parse)
