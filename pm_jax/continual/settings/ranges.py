"""What the settings of a run may be: their ranges, and which of them go together."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pm_jax.data import sources
from pm_jax.types import InvalidInput

if TYPE_CHECKING:
    from pm_jax.continual.settings.settings import Settings

TEXT_POSITIONS = 512
AT_LEAST_ONE = (
    *("num_tasks", "patch_size", "width", "depth", "num_heads", "lora_rank"),
    *("epochs", "epoch_repeats", "batch_size", "accumulation_steps"),
    *("max_tokens", "vocabulary", "randaugment_layers", "evaluation_resize"),
    *("merge_examples", "curvature_rank", "curvature_slots", "fsdp"),
)
NOT_NEGATIVE = (
    *("base_classes", "first_task_epochs", "head_learning_rate", "weight_decay"),
    *("clip_norm", "curvature_samples", "curvature_examples", "curvature_memory_mb"),
    *("train_per_class", "test_per_class", "image_size", "stored_size"),
    *("layer_norm_epsilon", "resident_mb", "landscape_points", "plane_points"),
    *("curvature_error", "devices"),
)

Condition = tuple[str, bool, str]
"""Name of a setting, whether it may be what it is, and what to do if not."""


def check(settings: "Settings") -> None:
    """Check the settings of a run against their ranges and one another.

    Args:
        settings: whose choices are known to be there and whose numbers are finite.

    Raises:
        InvalidInput: the first that is wrong, by name, with its value and the remedy.

    Example:
        >>> from pm_jax.continual.settings.settings import Settings
        >>> check(Settings())
    """
    parts = (_ranges, _stream, _model, _perturbation)
    for name, holds, remedy in itertools.chain.from_iterable(part(settings) for part in parts):
        if not holds:
            raise InvalidInput(f"{name}={getattr(settings, name)}: {remedy}")


def _ranges(s: "Settings") -> Iterator[Condition]:
    """Of numbers by themselves."""
    yield from ((name, getattr(s, name) >= 1, "must be at least 1") for name in AT_LEAST_ONE)
    yield from ((name, getattr(s, name) >= 0, "must not be negative") for name in NOT_NEGATIVE)
    yield "learning_rate", s.learning_rate > 0, "must be above 0"
    yield "temperature", s.temperature > 0, "must be above 0"
    rising = all(a < b for a, b in itertools.pairwise((0.0, *s.milestones, 1.0)))
    yield "milestones", rising, "must be fractions between 0 and 1 in rising order"
    area = len(s.crop_scale) == 2 and 0 < s.crop_scale[0] <= s.crop_scale[1] <= 1
    yield "crop_scale", area, "must be two numbers in (0, 1] in rising order"
    magnitude = 0 <= s.randaugment_magnitude <= 10
    yield "randaugment_magnitude", magnitude, "must lie in [0, 10]"
    yield "warmup_fraction", 0 <= s.warmup_fraction < 1, "must lie in [0, 1)"
    yield "validation_fraction", 0 < s.validation_fraction < 1, "must lie between 0 and 1"
    yield "landscape_points", s.landscape_points != 1, "must be 0, or at least 2"
    yield "plane_points", s.plane_points != 1, "must be 0, or at least 2"
    yield "hidden_sizes", min(s.hidden_sizes, default=0) >= 1, "needs one width or more"


def _stream(s: "Settings") -> Iterator[Condition]:
    """Of the tasks and their data."""
    branch = bool(s.branch_from) == (s.from_task > 0) and s.from_task <= s.num_tasks
    remedy = f"with branch_from from 1 to num_tasks={s.num_tasks}, without it 0"
    yield "from_task", branch, remedy
    by_class = s.scenario == "class_incremental"
    has_domains = s.dataset in ("digits", *sources.DOMAINS)
    remedy = f"dataset={s.dataset} has no domains; use scenario=class_incremental"
    yield "scenario", has_domains or by_class, remedy
    remedy = f"the classes of a {s.scenario} stream have one classifier; use trained"
    yield "classifier", s.classifier == "trained" or by_class, remedy
    several_sizes = s.dataset != "digits" and not s.dataset.endswith(".npz")
    remedy = f"dataset={s.dataset} has images of one size; use 0"
    yield "stored_size", not s.stored_size or several_sizes, remedy


def _model(s: "Settings") -> Iterator[Condition]:
    """Of the architecture and what it reads."""
    remedy = "is for a transformer; name its architecture with model"
    yield "pretrained", not s.pretrained or s.model != "mlp", remedy
    if s.reads_text:
        remedy = f"reads texts and dataset={s.dataset} has images; choose a dataset of texts"
        yield "model", s.dataset not in ("digits", *sources.DOMAINS), remedy
        remedy = f"must be at most {TEXT_POSITIONS}, the positions of the model"
        yield "max_tokens", s.max_tokens <= TEXT_POSITIONS, remedy
        remedy = f"model={s.model} needs one; give the path of its tokenizer.json"
        yield "tokenizer", bool(s.tokenizer or s.pretrained), remedy
    if s.model in ("vit", "text_encoder"):
        yield "num_heads", s.width % s.num_heads == 0, f"must divide width={s.width}"


def _perturbation(s: "Settings") -> Iterator[Condition]:
    """Of draws for each example."""
    if s.perturb_per == "example":
        yield "perturb_per", s.adapter == "lora", "needs adapter=lora; use perturb_per=batch"
        remedy = (
            "the classifier of a domain_incremental stream is perturbed as one; use "
            "perturb_per=batch"
        )
        yield "perturb_per", s.scenario != "domain_incremental", remedy
        remedy = "a Gaussian perturbs the weights, which examples share; use perturb_per=batch"
        yield "perturb_per", s.perturbation != "gaussian", remedy
