"""Images/s of training a ViT with LoRA: this library against transformers and peft on PyTorch.

python -m experiments.benchmarks.peer --model=vit_tiny_patch16

On both sides the same architecture with random weights, batch, resolution, rank 10 on key and
value, AdamW and cross-entropy. Ours is the jitted epoch of a run, perturbation included. Both run
in one process, in turns, on the cores that it may use (`taskset`); the ratio is that of medians.
"""

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

from pm_jax.continual import Config

PACKAGES = ("torch", "transformers", "peft")
MARKS = {"vit_base_patch16": 1.4, "vit_tiny_patch16": 1.0}
DEFAULT_SIZES = {"vit_base_patch16": 224, "vit_tiny_patch16": 160, "vit": 32}


def missing_package() -> str:
    """Name a package that the peer needs and that is not installed; empty for none."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is None), "")


def peer_epoch(
    config: Config, image_size: int, steps: int, *, device: str = "cpu", compiled: bool = False
) -> Callable[[], float]:
    """Make a call that trains some steps with transformers and peft, and returns the last loss.

    Images lie on the device as bytes. Computation in bfloat16 is `torch.autocast`; `compiled` uses
    `torch.compile`. The call returns when the device is done.
    """
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vit = config.network(10)
    sizes = transformers.ViTConfig(
        hidden_size=vit.width,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads,
        intermediate_size=int(vit.width * vit.mlp_ratio),
        image_size=image_size,
        patch_size=vit.patch_size,
        num_labels=10,
    )
    rank = config.lora_rank
    adapters = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["k_proj", "v_proj"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(transformers.ViTForImageClassification(sizes), adapters)
    model = model.train().to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, fused=device == "cuda")
    size = (config.batch_size, 3, image_size, image_size)
    images = torch.randint(256, size, dtype=torch.uint8, device=device)
    labels = torch.randint(10, size[:1], device=device)
    half = config.compute_dtype == "bfloat16"
    forward = torch.compile(model) if compiled else model

    def call() -> float:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                logits = forward(pixel_values=images.float() / 127.5 - 1).logits
                loss = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss.item()

    return call


def compare(config: Config, image_size: int, steps: int, repeats: int) -> dict[str, float]:
    """Measure the images/s of both sides in turns, and their ratio."""
    from experiments.benchmarks.workloads import Workload, interleaved

    images = config.batch_size * steps
    work = Workload(config, (image_size, image_size, 3), images)
    seconds = interleaved(
        {"ours": work.epoch(), "peer": peer_epoch(config, image_size, steps)}, repeats
    )
    return {
        "pm_jax, images/s": images / seconds["ours"],
        "transformers + peft, images/s": images / seconds["peer"],
        "ratio": seconds["peer"] / seconds["ours"],
    }


def median_rate(call: Callable[[], object], images: int, repeats: int) -> float:
    """Measure the images/s of a call after a warm-up."""
    call()
    seconds = []
    for _ in range(repeats):
        clock = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - clock)
    return images / statistics.median(seconds)


def main(argv: Sequence[str]) -> None:
    """Print the table, or the peer's images/s alone."""
    del argv
    values = flags.FLAGS
    if name := missing_package():
        print(f"error: {name} is not installed; pip install 'pm_jax[benchmark]'", file=sys.stderr)
        sys.exit(2)
    config = Config(
        **{
            "model": values.model,
            "batch_size": values.batch_size,
            "adapter": "lora",
            "scenario": "class_incremental",
            **json.loads(values.settings),
        }
    )
    size, steps = values.image_size or DEFAULT_SIZES[config.model], values.steps
    if values.only_peer:
        call = peer_epoch(config, size, steps, device=values.device, compiled=values.compiled)
        print(median_rate(call, config.batch_size * steps, values.repeats))
        return
    title = f"{config.model}, {size} px, batch {config.batch_size}, {config.compute_dtype}"
    print(f"{title}, cores {sorted(os.sched_getaffinity(0))}")
    for name, value in compare(config, size, steps, values.repeats).items():
        mark = (
            f"  (mark {MARKS[config.model]})" if name == "ratio" and config.model in MARKS else ""
        )
        print(f"  {name:32s}{value:10.3f}{mark}")


if __name__ == "__main__":
    flags.DEFINE_enum("model", "vit_tiny_patch16", list(DEFAULT_SIZES), "Architecture.")
    flags.DEFINE_integer("image_size", 0, "Side in pixels; 0 for 224 (base) or 160 (tiny).")
    flags.DEFINE_integer("batch_size", 32, "Images of a step.")
    flags.DEFINE_integer("steps", 2, "Steps of an epoch.")
    flags.DEFINE_integer("repeats", 5, "Epochs of each side.")
    flags.DEFINE_string("settings", "{}", "More fields of Config as JSON, such as the ViT's sizes.")
    flags.DEFINE_boolean("only_peer", False, "Print the peer's images/s and nothing else.")
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "only_peer: where it runs.")
    flags.DEFINE_boolean("compiled", False, "only_peer: through torch.compile.")
    app.run(main)
