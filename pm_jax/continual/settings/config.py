"""The configuration of a run: its settings, and the model, rule, law and stream made from them."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from pm_jax import models, perturbation, rules
from pm_jax.continual.settings import conditions, factories
from pm_jax.continual.settings.chosen_classifiers import RECOMMENDED, ChosenClassifier, chosen
from pm_jax.continual.settings.settings import PUBLIC_SIZES, Settings, names_of
from pm_jax.curvature.dense_layers import kernel_paths
from pm_jax.curvature.diagonal import DiagonalQuadratic
from pm_jax.curvature.input_moments import InputMomentQuadratic
from pm_jax.curvature.kronecker import KroneckerQuadratic
from pm_jax.curvature.low_rank import LowRankQuadratic
from pm_jax.curvature.quadratics import Quadratic
from pm_jax.data import own, prompts, sources, stream, texts
from pm_jax.perturbation import Perturbation
from pm_jax.rules import MergeRule
from pm_jax.types import InvalidInput, Params
from pm_jax.weights import clip

MLP_KERNELS, ATTENTION_KERNELS = r"hidden_\d+/kernel", r".*/attn/(key|value)/kernel"
"""Kernels that get adapters by default."""
FAMILIES: dict[str, dict[str, Any]] = {
    "dinov2": {"layer_scale": 1e-5},
    "dinov3": {
        "layer_scale": 1e-5,
        "registers": 4,
        "positions": "rotary",
        "layer_norm_epsilon": 1e-5,
    },
}
"""Options of architectures whose names have these words."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of a run, with the law and the rule that they make, which are built once.

    Raises:
        InvalidInput: a value out of range; the message names the field, the value and the remedy.
    """

    def __post_init__(self):
        if not self.classifiers:
            # The name of what predicts is in every table and file, so it is filled in at once.
            by_class = self.scenario == "class_incremental"
            found = RECOMMENDED if by_class else "trained"
            object.__setattr__(self, "classifiers", (found,))
        conditions.check(self)
        try:
            # Building the law checks its numbers.
            _ = self.perturbation_law
        except ValueError as error:
            raise InvalidInput(str(error)) from None
        conditions.check_rule(self, self.merge_rule)

    @functools.cached_property
    def perturbation_law(self) -> Perturbation:
        """Law by which the training loss is perturbed."""
        match self.perturbation:
            case "symmetric":
                return perturbation.symmetric(self.epsilon, self.probabilities)
            case "one_sided":
                return perturbation.one_sided(self.epsilon)
            case "gaussian":
                return perturbation.gaussian(self.epsilon)
            case "antithetic":
                return perturbation.antithetic(self.epsilon)
        return perturbation.none()

    @functools.cached_property
    def merge_rule(self) -> MergeRule:
        """Merge rule, with its settings."""
        # Exact curvature is not kept from task to task: another rule replays the data of all tasks.
        replays = self.rule == "perturb_and_merge" and self.curvature == "exact_all"
        return rules.make(
            "exact_curvature" if replays else self.rule,
            self.rule_settings,
            max_tasks=self.num_tasks,
            memory=self._memory,
        )

    def _memory(self, params: Params) -> Quadratic:
        """Return the quadratic that is 0 everywhere, of the kind that tasks leave behind."""
        match self.kept_curvature:
            case "kronecker":
                kernels = kernel_paths(params)
                # Slots beyond the number of tasks would stay empty.
                slots = min(self.num_tasks, self.curvature_slots)
                return KroneckerQuadratic.zero(params, kernels, slots)
            case "low_rank":
                return LowRankQuadratic.zero(params, self.curvature_rank)
            case "input_moment":
                return InputMomentQuadratic.zero(params)
        return DiagonalQuadratic.zero(params)

    def without_merging(self) -> "Config":
        """Return settings that train and evaluate alike, with the defaults of merging."""
        # A field's default is also an attribute of the class.
        defaults = {name: getattr(Config, name) for name in names_of("merging")}
        # Text columns are no matter of merging alone: they stay as they are while the tasks train.
        kept = ("zero_shot",) if self.has_text_columns else ()
        return dataclasses.replace(self, **defaults | {"classifiers": kept})

    def network(self, num_classes: int) -> Any:
        """Make the model for a number of classes: a linen module, or what one's factory returns.

        Raises:
            InvalidInput: the factory cannot be imported, or fails.
        """
        if factories.is_reference(self.model):
            settings = self.model_settings
            return factories.called("model", self.model, settings, num_classes=num_classes)
        dtype = jnp.dtype(self.compute_dtype)
        if self.model == "mlp":
            return models.MLP(num_classes, self.hidden_sizes, dtype)
        side = self.image_size or None
        options: dict[str, Any] = {
            "dtype": dtype,
            "attention": self.attention,
            "remat": self.remat == "blocks",
        }
        if self.model == "clip":
            image_tower = clip.sizes(self.pretrained).image
            return models.ClipImageTower(num_classes, image_size=side, **image_tower, **options)
        sizes = PUBLIC_SIZES.get(self.model, (self.width, self.depth, self.num_heads))
        family = next((FAMILIES[name] for name in FAMILIES if name in self.model), {})
        # BERT was trained with 1e-12, most public weights of ViTs with 1e-6.
        usual = family.get("layer_norm_epsilon", 1e-12 if self.reads_text else 1e-6)
        options["layer_norm_epsilon"] = self.layer_norm_epsilon or usual
        if self.reads_text:
            positions = conditions.TEXT_POSITIONS
            return models.TextEncoder(num_classes, self.vocabulary, positions, *sizes, **options)
        # The names of the public sizes say the patch.
        named = re.search(r"_patch(\d+)", self.model)
        patch = int(named[1]) if named else self.patch_size
        options |= {
            "registers": self.registers or family.get("registers", 0),
            "layer_scale": self.layer_scale or family.get("layer_scale", 0.0),
            "positions": family.get("positions", self.positions),
            "pooling": self.pooling,
        }
        return models.VisionTransformer(num_classes, patch, side, *sizes, **options)

    @property
    def kernel_pattern(self) -> str:
        """Regular expression for the paths of the kernels that get adapters."""
        return self.lora_pattern or (MLP_KERNELS if self.model == "mlp" else ATTENTION_KERNELS)

    def epochs_of(self, task: int) -> int:
        """Return the number of passes over the data of a task, which counts from 0."""
        longer = task == 0 and self.from_scratch and self.first_task_epochs
        return self.epoch_repeats * (self.first_task_epochs if longer else self.epochs)

    @property
    def chosen_classifiers(self) -> tuple[ChosenClassifier, ...]:
        """Classifiers that are evaluated, in the order of the settings."""
        return chosen(tuple(self.classifiers), self.drift_correction)

    def moves(self, task: int) -> bool:
        """Return whether a task, which counts from 0, can move what merges."""
        first_tasks = self.merge_rule.needs.moving_tasks
        # From scratch the first task is the pre-training, whatever the rule.
        is_origin = task == 0 and self.from_scratch
        return first_tasks is None or task < first_tasks or is_origin

    def trains(self, task: int) -> bool:
        """Return whether anything trains in a task: what merges, or columns that predict."""
        has_columns = self.scenario == "class_incremental" and self.needs_columns
        return self.moves(task) or has_columns

    @property
    def needs_columns(self) -> bool:
        """True if a classifier reads columns that tasks train."""
        reads = any(each.classifier.needs_columns for each in self.chosen_classifiers)
        return reads and not self.has_text_columns

    def task_stream(self, seed: int) -> stream.TaskStream:
        """Load the tasks, split by a seed; raises `InvalidInput` where they cannot be formed."""
        if factories.is_reference(self.dataset):
            data = _own_data(self.dataset, self.dataset_settings)
            return self.stream_of_data(data, seed, self.dataset)
        data_sets = self._texts() if self.reads_text else self._images()
        if self.scenario == "class_incremental":
            tasks = stream.class_incremental(
                data_sets[0],
                self.num_tasks,
                seed,
                class_order=self.class_order,
                base_classes=self.base_classes,
                validation_fraction=self.validation_fraction,
            )
            return self._with_classes(self.with_class_names(tasks))
        tasks = stream.domain_incremental(
            data_sets, seed, validation_fraction=self.validation_fraction
        )
        return self.with_class_names(tasks)

    def stream_of_data(self, data: Any, seed: int, name: str) -> stream.TaskStream:
        """Make a stream of one's own data; raises `InvalidInput` where it cannot be formed."""
        tasks = own.stream_of_data(
            data,
            seed,
            name=name,
            scenario=self.scenario,
            num_tasks=self.num_tasks,
            class_order=self.class_order,
            base_classes=self.base_classes,
            validation_fraction=self.validation_fraction,
        )
        return self._with_classes(self.with_class_names(tasks))

    def with_class_names(self, tasks: stream.TaskStream) -> stream.TaskStream:
        """Return a stream whose classes are called as the settings say.

        Raises:
            InvalidInput: the file of the names cannot be read, or does not fit the classes.
        """
        if not self.class_names:
            return tasks
        names = prompts.read_class_names(
            self.class_names, tasks.num_classes, tasks.left_out_classes
        )
        return dataclasses.replace(tasks, class_names=names)

    def _with_classes(self, tasks: stream.TaskStream) -> stream.TaskStream:
        """Return a stream whose tasks have two classes at least, where they train.

        Raises:
            InvalidInput: a task that trains has one class.
        """
        for task, classes in enumerate(tasks.class_masks.sum(axis=1)):
            if classes < 2 and self.trains(task):
                raise InvalidInput(
                    f"num_tasks={self.num_tasks}: leaves a task with one class, whose loss over "
                    "its own classes is constant; use fewer tasks, or train nothing in it: "
                    "rule=frozen, or first_session with base_classes, and classifiers that need "
                    "no trained columns, as discriminant"
                )
        return tasks

    def _images(self) -> Sequence[stream.LabelledArrays]:
        """Load images: one data set, or one for each domain."""
        given = self._reading() | {name: getattr(self, name) for name in sources.ONLY_OF_IMAGES}
        given["rgb"] = bool(self.pretrained)
        if self.scenario == "class_incremental":
            return [sources.load(self.dataset, **given)]
        if self.dataset != "digits":
            return sources.load_domains(self.dataset, self.num_tasks, **given)
        angles = tuple(self.rotation_step * task for task in range(self.num_tasks))
        return sources.load_rotated(self.dataset, angles, **given)

    def _reading(self) -> dict[str, Any]:
        names = (
            *("data_dir", "class_subset", "train_per_class", "test_per_class"),
            *("test_split", "validation_split", "domain_field"),
        )
        return {name: getattr(self, name) for name in names}

    def _texts(self) -> Sequence[stream.LabelledArrays]:
        """Load texts likewise."""
        # Public text models come with their tokenizer in the same folder.
        weights = pathlib.Path(self.pretrained)
        folder = weights if weights.is_dir() else weights.parent
        given = {**self._reading(), "max_tokens": self.max_tokens}
        given["tokenizer"] = self.tokenizer or str(folder / "tokenizer.json")
        if self.scenario == "class_incremental":
            loaded: Sequence[stream.LabelledArrays] = [texts.load(self.dataset, **given)]
        else:
            loaded = texts.load_domains(self.dataset, self.num_tasks, **given)
        largest = max(int(ids.max()) for arrays in loaded for ids, _ in arrays.parts())
        if largest >= self.vocabulary:
            raise InvalidInput(
                f"vocabulary={self.vocabulary}: the tokenizer gives ids up to {largest}; raise the "
                "vocabulary or give the tokenizer of the model"
            )
        return loaded


# Seeds and baselines share one reading.
@functools.lru_cache(maxsize=1)
def _own_data(reference: str, settings: str) -> Any:
    """Call a factory of data; a generator of tasks becomes a list."""
    data = factories.called("dataset", reference, settings)
    return list(data) if isinstance(data, Iterator) else data
