"""Files that once broke a reader, found by fuzzing, and their like: each ends in one line.

Of checkpoints and manifests see interruption_test.py and inspect_test.py.
"""

import io
import json
import pathlib
import pickle
import struct
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from pm_jax.continual import Config
from pm_jax.continual.report.results import METRICS, read_results, summarize_seeds
from pm_jax.continual.storage.logs import RunLog
from pm_jax.continual.storage.reuse import SharedTraining
from pm_jax.continual.storage.workdir import check_claim, claim
from pm_jax.data import archives, class_incremental, stored_images
from pm_jax.models import VisionTransformer
from pm_jax.offline.merging import Merge, merge_files
from pm_jax.offline.tensor_files import TensorFile
from pm_jax.types import InvalidInput
from pm_jax.weights import pretrained
from tests.binaries import refused

ROOT = pathlib.Path(__file__).parents[2]


def line_of(function, *arguments):
    """What a call that is refused says."""
    with pytest.raises(InvalidInput) as refused:
        function(*arguments)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 1000 and (";" in line or "must" in line), line
    return line


# Data sets and weights in .npz.

LABELS = np.arange(12) % 4
IMAGES = {
    "x_train": np.zeros((12, 4, 4), np.uint8), "y_train": LABELS,
    "x_test": np.zeros((12, 4, 4), np.uint8), "y_test": LABELS,
}  # fmt: skip


def archive(path, **changes):
    np.savez(path, **{**IMAGES, **changes})
    return path


def with_header(path, header, version=1):
    """An archive whose x_train has a header of its own."""
    text = header.encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x_train.npy", b"\x93NUMPY" + bytes([version, 0]) + size + text + b"\1" * 64)
        for name in ("y_train", "x_test", "y_test"):
            content = io.BytesIO()
            np.save(content, IMAGES[name])
            file.writestr(f"{name}.npy", content.getvalue())
    return path


def use_data(path):
    class_incremental(*archives.load_images(path), 2, seed=0)


@pytest.mark.parametrize(
    "changes, wanted",
    [
        (dict.fromkeys(("x_train", "x_test"), np.zeros((0, 4, 4), np.uint8)), "x_train is uint8"),
        ({"x_test": np.zeros((12, 0, 4), np.uint8)}, "x_test is uint8 (12, 0, 4); it must be"),
        ({"x_train": np.zeros((12, 4, 4, 0), np.uint8)}, "x_train is uint8 (12, 4, 4, 0)"),
        ({"x_train": IMAGES["x_train"][:0], "y_train": LABELS[:0]}, "none of them 0"),
        ({"y_train": np.asarray(3)}, "y_train is int64 ()"),
        ({"y_train": np.where(LABELS == 3, 10**12, LABELS)}, "class 3 has test examples and no"),
        (
            {"y_test": np.where(LABELS == 3, 2**63 - 1, LABELS)},
            "class 9223372036854775807 has test",
        ),
        ({"y_train": LABELS.astype([("label", "<i8")])}, "y_train is [('label', '<i8')]"),
        ({"x_train": IMAGES["x_train"].astype("M8[s]")}, "x_train is datetime64[s]"),
    ],
)
def test_arrays_that_are_no_data_set(tmp_path, changes, wanted):
    line = line_of(use_data, archive(tmp_path / "mine.npz", **changes))
    assert wanted in line and "dataset=" in line


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }\n"


@pytest.mark.parametrize(
    "header, version",
    {
        "too long to be safe": (HEADER % "12, 4, 4" + " " * 20_000 + "\n", 2),
        "long and no expression": ("{'descr': " + "-" * 2000 + "\n", 1),
        "not closed": ("{" * 50 + "\n", 1),
        "100 TB": (HEADER % "100000000000000,", 1),
        "of negative size": (HEADER % "-12, 4, 4", 1),
        "beyond whole numbers": (HEADER % f"{2**70},", 1),
        "of another version": (HEADER % "12, 4, 4", 9),
    }.values(),
)
def test_headers_that_lie(tmp_path, header, version):
    path = with_header(tmp_path / "mine.npz", header, version)
    for read in (archives.load_images, pretrained.read_tensors):
        assert "mine.npz: cannot be read (" in line_of(read, path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04N.", b"\xff" * 99])
def test_files_that_are_no_archive(tmp_path, content):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    for read in (archives.load_images, pretrained.read_tensors):
        assert "mine.npz: cannot be read (" in line_of(read, path)
    np.save(tmp_path / "one.npy", LABELS)
    (tmp_path / "one.npy").rename(path)
    assert "cannot be read" in line_of(archives.load_images, path)


class Canary:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return pathlib.Path.touch, (self.trace,)


def test_nothing_is_unpickled(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "mine.npz"
    objects = np.asarray([Canary(trace)] * 12, object)
    for field in IMAGES:
        archive(path, **{field: objects})
        assert "Object arrays cannot be loaded" in line_of(use_data, path)
        assert "Object arrays cannot be loaded" in line_of(archives.load_texts, path)
        assert "Object arrays cannot be loaded" in line_of(pretrained.read_tensors, path)
    path.write_bytes(pickle.dumps(Canary(trace)))
    for read in (archives.load_images, pretrained.read_tensors):
        line_of(read, path)
    np.save(tmp_path / "x.images.npy", objects, allow_pickle=True)
    np.save(tmp_path / "x.labels.npy", objects, allow_pickle=True)
    assert stored_images.cached([tmp_path], "x", (4, 4, 1)) is None  # they are made anew
    assert not trace.exists()
    pickle.loads(pickle.dumps(Canary(trace)))
    assert trace.exists()
    for source in [*(ROOT / "pm_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        assert not {"import pickle", "allow_pickle=True"} & set(source.read_text().split("\n"))


MODEL = VisionTransformer(3, patch_size=2, width=4, depth=1, num_heads=2)
PARAMS = jax.tree.map(
    lambda x: np.ones(x.shape, np.float32),
    jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"]),
)
TENSORS = pretrained.export_params(PARAMS, "timm")
BIAS, POSITIONS = "patch_embed.proj.bias", "pos_embed"


@pytest.mark.parametrize(
    "name, change, wanted",
    [
        (BIAS, lambda x: x.astype("U8"), f"not of floating-point numbers {BIAS}"),
        (BIAS, lambda x: x.astype([("a", "<f4")]), f"not of floating-point numbers {BIAS}"),
        (BIAS, lambda x: x.astype(np.complex64), f"not of floating-point numbers {BIAS}"),
        (BIAS, lambda x: x.astype("m8[s]"), f"not of floating-point numbers {BIAS}"),
        (BIAS, lambda x: x.astype(np.int8), f"not of floating-point numbers {BIAS}"),
        (BIAS, lambda x: x * np.float32(np.nan), f"not finite {BIAS};"),
        (BIAS, lambda x: x.astype(np.float64) * 1e300, f"not finite {BIAS};"),
        ("blocks.0.attn.qkv.bias", lambda x: x / 0, "not finite blocks.0.attn.qkv.bias;"),
        ("blocks.0.attn.qkv.bias", lambda x: x[0], "misshapen blocks.0.attn.qkv.bias gives ()"),
        ("blocks.0.attn.qkv.bias", lambda x: x[:11], "gives (11,) for blocks_0/attn/query/bias"),
        (POSITIONS, lambda x: x.ravel(), "misshapen pos_embed gives (20,)"),
        (POSITIONS, lambda x: x[:, :0], "misshapen pos_embed gives (1, 0, 4)"),
        (POSITIONS, lambda x: x[:, :1], "misshapen pos_embed gives (1, 1, 4)"),
        ("a\nname", lambda _: np.ones(1), "extra a name;"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_weights_that_do_not_fit(name, change, wanted):
    tensors = TENSORS | {name: change(TENSORS.get(name))}
    assert wanted in line_of(pretrained.load_params, tensors, PARAMS)


# Safetensors.


def tensor_file(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((length or len(text)).to_bytes(8, "little") + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"w":%s,"w":%s}' % ((json.dumps(ENTRY).encode(),) * 2)


@pytest.mark.parametrize(
    "header, length",
    [
        (TWICE, None),
        ({"w": ENTRY}, 2**40),
        ({"w": ENTRY}, 3),
        ({"w": {**ENTRY, "shape": [2**63]}}, None),
        ({"w": {**ENTRY, "shape": [2**62, 4]}}, None),
        ({"w": {**ENTRY, "shape": [-2]}}, None),
        ({"w": {**ENTRY, "data_offsets": [0, 2**60]}}, None),
        ({"w": {**ENTRY, "data_offsets": [4, 8]}}, None),
        ({"w": {**ENTRY, "dtype": "F31"}}, None),
        ({"w": ENTRY, "v": ENTRY}, None),
        ({"w": ENTRY, "__metadata__": {"a": 1}}, None),
        (b"[" * 100_000, None),
        (b'{"\xff":1}', None),
        (b"", None),
    ],
)
def test_headers_of_safetensors(tmp_path, header, length):
    path = tensor_file(tmp_path / "x.safetensors", header, length=length)
    assert "base=" in line_of(TensorFile.open, "base", path)
    if header is not TWICE:  # the package takes the last one
        assert "pretrained=" in line_of(pretrained.read_tensors, path)


def test_a_file_whose_metadata_are_null_merges(tmp_path):
    base = tensor_file(tmp_path / "base.safetensors", {"w": ENTRY, "__metadata__": None})
    model = tmp_path / "model.safetensors"
    model.write_bytes(save({"w": np.full(2, 4, np.float32)}))
    merged = tmp_path / "merged.safetensors"
    merge_files(Merge(base, (base, model), merged))
    assert pretrained.read_tensors(merged)["w"].tolist() == [2, 2]


# Flags.


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"--epochs=\xff\n", "error: flagfile=PATH: cannot be read (UnicodeDecodeError"),
        (b"--flagfile=a\0b\n", "error: flagfile=PATH: cannot be read (ValueError: embedded"),
        (b"--preset=paper_recipe\n", "error: --preset=paper_recipe: does not count in a flagfile"),
        (b"--milestones=1e999999999\n", "--milestones=1e999999999: must be numbers or fractions"),
        (b"--milestones=1/0\n", "--milestones=1/0: must be numbers or fractions"),
        (b"--crop_scale=nan,1\n", "--crop_scale=nan,1: must be numbers or fractions"),
        (b"--crop_scale=" + b"9" * 400 + b"/1,1\n", "must be numbers or fractions"),
        (b"--hidden_sizes=" + b"9" * 5000 + b"\n", "must be whole numbers"),
        (b"--rule=ties\n--rule_settings=keep=1e999999999\n", "keep=1e999999999: must be a number"),
        (b"--learning_rate=inf\n", "error: --learning_rate=inf: must be a finite number"),
        (b"--rotation_step=nan\n", "error: --rotation_step=nan: must be a finite number"),
        (b"--weight_decay=1e999\n", "error: --weight_decay=inf: must be a finite number"),
        (b"--seeds=4294967296\n", "error: --seeds=4294967296: needs one or more whole numbers"),
    ],
)
def test_flagfiles(tmp_path, capsys, content, wanted):
    path = tmp_path / "é.flags"
    path.write_bytes(content)
    line = refused(capsys, "train", f"--flagfile={path}")
    assert wanted.replace("PATH", str(path)) in line


# Run directories.

RESULTS = {
    "seed": 0,
    **dict.fromkeys(METRICS, 0.5),
    "accuracy_matrix": [[1.0, None], [0.5, 1.0]],
    "task_aware": dict.fromkeys(METRICS),
    "merges": [{"alpha": 1.0}, {"alpha": None}],
    "seconds": {"train": 1.0},
    "rule_state_bytes": 8,
    "manifest": {"tasks": []},
    "environment": {"python": "3", "device": "cpu", "devices": 1, "packages": {}},
}
FIGURES = {
    **dict.fromkeys(METRICS[:6], 0.5),
    "accuracy_matrix": RESULTS["accuracy_matrix"],
    "task_aware": RESULTS["task_aware"],
}
OTHER_SIZE = FIGURES | {"accuracy_matrix": [[1.0]]}
BOTH = {"test": FIGURES, "validation": FIGURES}


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "is damaged;"),
        (b"\xff\xfe{", "is damaged;"),
        (b"[" * 100_000, "is damaged;"),
        (b"[]", "is damaged;"),
        (b"9" * 5000, "is damaged;"),
        ({"seed": "0"}, "is damaged at seed;"),
        ({"forward_transfer": {}}, "is damaged at forward_transfer;"),
        ({"forgetting": 10**400}, "is damaged at forgetting;"),
        ({"task_aware": []}, "is damaged at task_aware;"),
        ({"task_aware": {"final_average_accuracy": [1]}}, "is damaged at task_aware;"),
        ({"accuracy_matrix": [[1.0], [1.0, 1.0]]}, "is damaged at accuracy_matrix;"),
        ({"accuracy_matrix": []}, "is damaged at accuracy_matrix;"),
        ({"merges": [{"alpha": "1"}] * 2}, "is damaged at merges;"),
        ({"merges": [{"alpha": 1.0}, {}]}, "is damaged at merges;"),
        ({"seconds": {"train": []}}, "is damaged at seconds;"),
        ({"manifest": {"tasks": [{"classes": 1}]}}, "is damaged at manifest;"),
        ({"seed": None, "merges": None}, "is damaged at seed;"),
        ({"scores": {"trained": {"test": {}}}}, "is damaged at scores;"),
        ({"scores": {"trained": BOTH}, "classifiers": ["x"]}, "is damaged at classifiers;"),
        ({"scores": {"trained": BOTH | {"test": OTHER_SIZE}}}, "is damaged at scores;"),
        ({"classifiers": []}, "is damaged at classifiers;"),
        ({"evaluate_on": []}, "is damaged at evaluate_on;"),
        ({"config": {"evaluate_on": "train"}}, "is damaged at evaluate_on;"),
        ({"config": []}, "is damaged at config;"),
    ],
)
def test_results(tmp_path, content, wanted):
    path = tmp_path / "seed_0" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(RESULTS))
    assert summarize_seeds(tmp_path)["forgetting"]["mean"] == 0.5
    whole = content if isinstance(content, bytes) else json.dumps(RESULTS | content).encode()
    path.write_bytes(whole)
    assert line_of(read_results, path) == (
        f"workdir={tmp_path}: seed_0/results.json {wanted} move it away to have it written again"
    )
    rest = {name: value for name, value in RESULTS.items() if name not in ("seed", "merges")}
    path.write_text(json.dumps(rest))
    assert "seed_0/results.json lacks seed, merges; move it away" in line_of(read_results, path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"null", b"[]", b"{}", b'"x"'])
def test_settings_of_a_work_directory(tmp_path, content):
    claim(tmp_path, Config())
    (tmp_path / "config.json").write_bytes(content)
    line = line_of(check_claim, tmp_path, Config())
    assert line == f"workdir={tmp_path}: its config.json is damaged; choose another directory"


def test_many_settings_that_differ_are_counted_and_long_ones_cut(tmp_path):
    claim(tmp_path, Config())
    (tmp_path / "config.json").write_text(json.dumps({"rule": "x" * 10_000}))
    line = line_of(check_claim, tmp_path, Config())
    assert "accumulation_steps=None, not 1" in line and " more; choose another" in line


def test_lines_of_a_log_that_are_damaged_are_left_out(tmp_path):
    good = {"step": 1, "event": "epoch", "task": 1, "epoch": 1, "loss": 0.5}
    damaged = [b"\xff", b"[" * sys.getrecursionlimit() * 50, b"null", b"{}", b'{"step": "1"}', b"7"]
    whole = json.dumps(good).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([whole, *damaged, whole, whole[:20]]))
    log = RunLog(tmp_path, "", total_steps=2, resume_step=1, quiet=True)
    assert log.lines("epoch", 1) == [good, good]
    log.close()
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    "tensors, log",
    [
        ({"v": np.ones(2, np.float32)}, []),
        ({"w": np.ones(3, np.float32)}, []),
        ({"w": np.ones(2, np.float16)}, []),
        ({"w": np.ones(2, np.float32)}, [[]]),
        ({"w": np.ones(2, np.float32)}, [{"event": "epoch", "step": 1}]),
        ({"w": np.ones(2, np.float32)}, 1),
    ],
)
def test_training_that_was_kept_by_another_program(tmp_path, tensors, log):
    start = {"w": jnp.zeros(2)}
    shared = SharedTraining(tmp_path)
    shared.keep(0, start, {"w": jnp.ones(2)}, [])
    assert shared.find(0, start)[0]["w"].tolist() == [1, 1]
    path = tmp_path / "task_1.safetensors"
    path.write_bytes(save(tensors, {"log": json.dumps(log)}))
    for task in (0, 1):
        (tmp_path / "task_2.safetensors").write_bytes(path.read_bytes())
        assert "task_1.safetensors: cannot be read" in line_of(shared.find, task, start)
