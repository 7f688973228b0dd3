"""Conditions on the settings of a run: their ranges, and those that tie several together."""

import dataclasses
import inspect
import itertools
import math
import typing
from collections.abc import Iterator
from typing import Any

from pm_jax import rules
from pm_jax.continual.settings.chosen_classifiers import chosen
from pm_jax.continual.settings.factories import is_reference
from pm_jax.continual.settings.settings import LIMITS, Settings, names_of
from pm_jax.data import several, sources
from pm_jax.data.assembling import without_domains
from pm_jax.rules import MergeRule
from pm_jax.types import InvalidInput

LARGEST = 2**31 - 1
"""Largest whole number of a setting: arrays on the device hold int32."""
TEXT_POSITIONS = 512
"""Positions of BERT's text encoders, so the most tokens that a text may have."""
SIZES = ("patch_size", "width", "depth", "num_heads")
OWN = "{}=package.module:factory"
NOT_DIAGONAL = ("kronecker", "low_rank", "input_moment")
"""Kinds of curvature that have more than a number for each entry."""
READING = (
    *("data_dir", "class_subset", "train_per_class", "test_per_class", "cache_dir"),
    *("test_split", "validation_split", "domain_field", "skip_unreadable"),
)
"""Settings of how data sets are read that a factory of one's own has no use for."""
Condition = tuple[str, bool, str]
"""Name of a setting, whether its value is allowed, and the remedy if it is not."""


def check(settings: Settings) -> None:
    """Check the settings of a run against their ranges and one another.

    Raises:
        InvalidInput: for the first that is wrong, by name, with its value and the remedy.
    """
    for field in dataclasses.fields(settings):
        _check_value(field, getattr(settings, field.name))
    parts = (_limits, _ranges, _stream, _model, _zero_shot, _perturbation)
    for name, holds, remedy in itertools.chain.from_iterable(part(settings) for part in parts):
        if not holds:
            value = getattr(settings, name)
            shown = ",".join(value) if name == "classifiers" else value
            raise InvalidInput(f"{name}={shown}: {remedy}")


def _check_value(field: dataclasses.Field, value: Any) -> None:
    """Check that a setting is one of its choices, finite and not too large."""
    choices, or_factory = field.metadata["choices"], field.metadata["or_factory"]
    if choices and value not in choices and not (or_factory and is_reference(value)):
        more = " or package.module:factory" if or_factory else ""
        raise InvalidInput(f"{field.name}={value}: must be one of {', '.join(choices)}{more}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput(f"{field.name}={value}: must be a finite number")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and abs(number) > LARGEST:
            raise InvalidInput(f"{field.name}={number}: must be at most {LARGEST}")


def _limits(s: Settings) -> Iterator[Condition]:
    """Yield the limits that the types of the fields state, kind by kind."""
    for limit in LIMITS:
        for field in dataclasses.fields(s):
            if limit in typing.get_args(field.type):
                holds = limit.compare(getattr(s, field.name), limit.bound)
                yield field.name, holds, limit.remedy


def _ranges(s: Settings) -> Iterator[Condition]:
    """Yield the ranges of single settings that are more than one limit."""
    rising = all(a < b for a, b in itertools.pairwise((0.0, *s.milestones, 1.0)))
    yield "milestones", rising, "must be fractions between 0 and 1 in rising order"
    area = len(s.crop_scale) == 2 and 0 < s.crop_scale[0] <= s.crop_scale[1] <= 1
    yield "crop_scale", area, "must be two numbers in (0, 1] in rising order"
    magnitude = 0 <= s.randaugment_magnitude <= 10
    yield "randaugment_magnitude", magnitude, "must lie in [0, 10]"
    yield "warmup_fraction", 0 <= s.warmup_fraction < 1, "must lie in [0, 1)"
    yield "validation_fraction", 0 < s.validation_fraction < 1, "must lie between 0 and 1"
    # One point is no segment and no plane: both ends must be measured.
    yield "landscape_points", s.landscape_points != 1, "must be 0, or at least 2"
    yield "plane_points", s.plane_points != 1, "must be 0, or at least 2"
    yield "hidden_sizes", min(s.hidden_sizes, default=0) >= 1, "needs one width or more"


def _stream(s: Settings) -> Iterator[Condition]:
    """Yield the conditions on the tasks and their data."""
    branch = bool(s.branch_from) == (s.from_task > 0) and s.from_task <= s.num_tasks
    remedy = f"with branch_from from 1 to num_tasks={s.num_tasks}, without it 0"
    yield "from_task", branch, remedy
    by_class = s.scenario == "class_incremental"
    own, names = is_reference(s.dataset), several.names_in(s.dataset)
    kinds = {sources.kind_of(name) for name in names}
    # Digits are turned into domains here; whether files bring theirs, they say when they are read.
    known = s.dataset in sources.DOMAINS or own or len(names) > 1 or bool(s.domain_field)
    what = "is no file or folder here, and a data set by name has no domains"
    remedy = without_domains(s.dataset, what).partition(": ")[2]
    yield "scenario", by_class or known or kinds != {"prepared"}, remedy
    remedy = "names the domains of a stream; use scenario=domain_incremental, or leave it out"
    yield "domain_field", not s.domain_field or not by_class, remedy
    has_field = len(names) == 1 and bool(kinds & {"archive", "table", "prepared"})
    has_field = has_field and s.dataset not in sources.DOMAINS
    remedy = f"dataset={s.dataset} has its domains without one; leave it out"
    yield "domain_field", own or not s.domain_field or has_field, remedy
    for name in ("test_split", "validation_split"):
        remedy = f"has no effect on dataset={s.dataset}; leave it out"
        yield name, not getattr(s, name) or s.dataset != "digits", remedy
    remedy = f"is for folders of images, and dataset={s.dataset} is none; leave it out"
    yield "skip_unreadable", own or not s.skip_unreadable or "folder" in kinds, remedy
    remedy = "is for streams that bring new classes; use scenario=class_incremental, or 0"
    yield "class_subset", not s.class_subset or by_class, remedy
    yield "class_subset", s.class_subset != 1, "must be 0, or at least 2"
    # Settings read from JSON have lists for tuples.
    labels = tuple(s.classifiers)
    made = chosen(labels, s.drift_correction)
    remedy = f"the classes of a {s.scenario} stream have one classifier; use trained"
    yield "classifiers", by_class or labels in (("trained",), ("zero_shot",)), remedy
    remedy = (
        f"none of classifiers={','.join(s.classifiers)} has statistics that could be moved; use "
        "none, or discriminant"
    )
    corrects = s.drift_correction == "none" or any(each.moves for each in made)
    yield "drift_correction", corrects, remedy
    # Digits and archives are arrays already, so their images have one size.
    several_sizes = bool(kinds & {"folder", "prepared"}) and not own
    what = "texts" if "table" in kinds else "images of one size"
    remedy = f"dataset={s.dataset} has {what}; use 0"
    yield "stored_size", not s.stored_size or several_sizes, remedy
    yield "dataset_settings", own or not s.dataset_settings, f"goes with {OWN.format('dataset')}"
    for name in READING:
        remedy = f"has no effect on dataset={s.dataset}; give it by dataset_settings"
        yield name, not own or getattr(s, name) == getattr(Settings, name), remedy


def _model(s: Settings) -> Iterator[Condition]:
    """Yield the conditions on the architecture and the data that it reads."""
    own = is_reference(s.model)
    yield "model_settings", own or not s.model_settings, f"goes with {OWN.format('model')}"
    if own:
        yield from _own_model(s, s.model)
        return
    remedy = "is for a transformer; name its architecture with model"
    yield "pretrained", not s.pretrained or s.model != "mlp", remedy
    remedy = "needs pretrained, the weights that the adapter was trained on"
    yield "adapter_from", bool(s.pretrained) or not s.adapter_from, remedy
    for name in ("attention", "remat"):
        remedy = f"has no effect on model=mlp; use {getattr(Settings, name)}"
        yield name, getattr(s, name) == getattr(Settings, name) or s.model != "mlp", remedy
    for name in ("registers", "layer_scale", "pooling", "positions"):
        remedy = f"has no effect on model={s.model}; use {getattr(Settings, name)}"
        is_vit = s.model.startswith("vit")
        yield name, is_vit or getattr(s, name) == getattr(Settings, name), remedy
    kinds = {sources.kind_of(name) for name in several.names_in(s.dataset)}
    if not s.reads_text:
        remedy = (
            f"reads images and dataset={s.dataset} has texts; use text_encoder, minilm_l6 or "
            "bert_base, with a tokenizer"
        )
        yield "model", "table" not in kinds, remedy
    if s.reads_text:
        remedy = f"reads texts and dataset={s.dataset} has images; choose a dataset of texts"
        yield "model", s.dataset not in ("digits", *sources.DOMAINS), remedy
        remedy = f"must be at most {TEXT_POSITIONS}, the positions of the model"
        yield "max_tokens", s.max_tokens <= TEXT_POSITIONS, remedy
        remedy = f"model={s.model} needs one; give the path of its tokenizer.json"
        tokens = is_reference(s.dataset)
        yield "tokenizer", bool(s.tokenizer or s.pretrained or tokens), remedy
    if s.model == "clip":
        yield "pretrained", bool(s.pretrained), "model=clip needs weights; give a CLIP model's"
        for name in (*SIZES, "layer_norm_epsilon"):
            remedy = "has no effect on model=clip, whose config beside the weights says it"
            yield name, getattr(s, name) == getattr(Settings, name), remedy
    if s.model in ("vit", "text_encoder"):
        yield "num_heads", s.width % s.num_heads == 0, f"must divide width={s.width}"
    if s.model == "vit":
        remedy = (
            f"must leave heads of a multiple of 4 numbers of width={s.width} for rotary positions"
        )
        yield "num_heads", s.positions == "learned" or s.width // s.num_heads % 4 == 0, remedy


def _zero_shot(s: Settings) -> Iterator[Condition]:
    """Yield the conditions on columns that are made of the names of the classes."""
    if not s.has_text_columns:
        remedy = "goes with classifiers=zero_shot"
        yield "templates", s.templates == Settings.templates, remedy
        return
    remedy = "zero_shot makes the columns by CLIP's text tower; use model=clip"
    yield "classifiers", s.model == "clip", remedy
    remedy = "trained trains the columns that zero_shot keeps; name one of the two"
    yield "classifiers", "trained" not in s.classifiers, remedy
    remedy = "the columns of zero_shot do not train; use 0"
    yield "head_learning_rate", not s.head_learning_rate, remedy


def _own_model(s: Settings, model: str) -> Iterator[Condition]:
    """Yield the conditions on settings that only the models of this package have."""
    for name in names_of("model"):
        if name not in ("model", "model_settings"):
            remedy = f"has no effect on model={model}; its factory makes it, see model_settings"
            yield name, getattr(s, name) == getattr(Settings, name), remedy


def check_own_model(settings: Settings, name: str) -> None:
    """Check that no setting is for the models of this package, where the model is another.

    Raises:
        InvalidInput: one is; the message names it.
    """
    for setting, holds, remedy in _own_model(settings, name):
        if not holds:
            raise InvalidInput(f"{setting}={getattr(settings, setting)}: {remedy}")


def _perturbation(s: Settings) -> Iterator[Condition]:
    """Yield the conditions on one draw per example."""
    # Per-example draws scale adapter branches; anything else would need weights per example.
    if s.perturb_per == "example":
        yield "perturb_per", s.adapter == "lora", "needs adapter=lora; use perturb_per=batch"
        remedy = (
            "the classifier of a domain_incremental stream is perturbed as one; use "
            "perturb_per=batch"
        )
        yield "perturb_per", s.scenario != "domain_incremental", remedy
        remedy = "a Gaussian perturbs the weights, which examples share; use perturb_per=batch"
        yield "perturb_per", s.perturbation != "gaussian", remedy


def check_rule(settings: Settings, rule: MergeRule) -> None:
    """Check that the merge rule can use the curvature that the settings choose.

    Raises:
        InvalidInput: it cannot, or has no coefficient that `trust` could shrink.
    """
    s, needs = settings, rule.needs.evidence
    named = f"rule={s.rule} with rule_settings={s.rule_settings}"
    if s.trust == "shrink" and "curvature_along" not in needs:
        raise InvalidInput(
            f"trust=shrink: {named} has no closed form for one coefficient; use warn, or "
            "perturb_and_merge with one"
        )
    if "quadratic" not in needs:
        return
    if s.curvature == "exact_all":
        raise InvalidInput(
            f"curvature=exact_all: rule={s.rule} takes curvature of one task at a time; use "
            "fisher_exact, or perturb_and_merge"
        )
    # Rules that keep any kind of curvature have a parameter `memory`; others read entries.
    takes = inspect.signature(rules.REGISTRY[s.rule]).parameters
    kinds = rule.needs.curvatures or (() if "memory" in takes else ("diagonal",))
    kind = s.kept_curvature if s.kept_curvature in NOT_DIAGONAL else "diagonal"
    if kinds and kind not in kinds:
        raise InvalidInput(
            f"curvature={s.kept_curvature}: rule={s.rule} takes curvature entry by entry; use "
            "fisher_exact, or perturb_and_merge or became"
        )
    if s.curvature == "exact_current" and "curvature_along" not in needs:
        raise InvalidInput(
            f"curvature=exact_current: {named} takes no curvature along the task vector; use "
            "fisher_exact, or perturb_and_merge with one coefficient"
        )
