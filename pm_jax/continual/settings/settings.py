"""The settings of a run: a frozen dataclass whose fields become flags."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pm_jax import classifiers, rules
from pm_jax.continual.settings.chosen_classifiers import CORRECTIONS, RECOMMENDED
from pm_jax.data import augmentation, stream
from pm_jax.models.attention import IMPLEMENTATIONS
from pm_jax.models.vit import POOLINGS, POSITIONS

PUBLIC_SIZES = {
    "vit_tiny_patch16": (192, 12, 3),
    "vit_small_patch16": (384, 12, 6),
    "vit_base_patch16": (768, 12, 12),
    "vit_small_patch14_dinov2": (384, 12, 6),
    "vit_base_patch14_dinov2": (768, 12, 12),
    "vit_large_patch14_dinov2": (1024, 24, 16),
    "vit_small_patch16_dinov3": (384, 12, 6),
    "vit_base_patch16_dinov3": (768, 12, 12),
    "vit_large_patch16_dinov3": (1024, 24, 16),
    "minilm_l6": (384, 6, 12),
    "bert_base": (768, 12, 12),
}
"""Width, depth and heads of architectures with public weights."""
TEXT_MODELS = ("text_encoder", "minilm_l6", "bert_base")
MODELS = ("mlp", "vit", "text_encoder", *PUBLIC_SIZES, "clip")
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "milestones")
STORED_CURVATURES = (
    *("fisher_empirical", "fisher_exact", "gauss_newton_diag", "kronecker", "low_rank"),
    *("input_moment", "identity"),
)
CURVATURES = (*STORED_CURVATURES, "exact_current", "exact_all")
SPLITS = ("test", "validation")
"""Splits that accuracies are measured on."""
STAGES = ("stream", "model", "training", "placement", "perturbation", "merging", "evaluation")
"""Parts of a run; a field says in which one its value first matters."""


class Limit(NamedTuple):
    """A bound that the type of a setting states, and the remedy for a value beyond it."""

    compare: Callable[[Any, int], bool]
    bound: int
    remedy: str


AT_LEAST_ONE = Limit(operator.ge, 1, "must be at least 1")
NOT_NEGATIVE = Limit(operator.ge, 0, "must not be negative")
ABOVE_ZERO = Limit(operator.gt, 0, "must be above 0")
# In the order in which `conditions` checks them: the first wrong setting is the one reported.
LIMITS = (AT_LEAST_ONE, NOT_NEGATIVE, ABOVE_ZERO)
Positive = Annotated[int, AT_LEAST_ONE]
Natural = Annotated[int, NOT_NEGATIVE]
PositiveReal = Annotated[float, ABOVE_ZERO]
NonNegativeReal = Annotated[float, NOT_NEGATIVE]


def _option(
    default: Any,
    description: str,
    choices: tuple[str, ...] | None = None,
    *,
    stage: str,
    identity: bool = True,
    or_factory: bool = False,
    later: bool = False,
) -> Any:
    """Make a field; a setting without identity may differ between calls on a work directory.

    With `or_factory` it may also be a package.module:factory instead of one of its choices. Runs of
    earlier versions do not have a `later` setting; its default must be what they did.
    """
    about = {"description": description, "choices": choices, "stage": stage, "identity": identity}
    about |= {"or_factory": or_factory, "later": later}
    return dataclasses.field(default=default, metadata=about)


_stream, _model, _training, _placement, _perturbation, _merging, _evaluation = (
    functools.partial(_option, stage=stage) for stage in STAGES
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that determines the numbers of a run; its fields are the flags of the binaries."""

    # Stream.
    # scikit-learn brings the digits along: the default run downloads nothing.
    dataset: str = _stream(
        "digits",
        "digits (scikit-learn's), the path of an .npz with x_train, y_train, x_test and y_test, a "
        "folder of images, as train/CLASS/1.jpg, a .csv or .jsonl with text and label, an "
        "image or text classification data set that tensorflow-datasets has prepared, such as "
        "cifar100, imagenet_r or clinc_oos, or package.module:factory, a function that returns "
        "tasks. Several with commas between them are domains, one a task.",
    )
    dataset_settings: str = _stream(
        "",
        "Keyword arguments of one's own dataset factory, as key=value,key=value; the numbers of a "
        "tuple have colons between them.",
    )
    # A path is no identity: a run may go on after its data have moved.
    data_dir: str = _stream(
        "", "Where tensorflow-datasets has its data; empty for its default.", identity=False
    )
    test_split: str = _stream(
        "",
        "Split, or folder, to test on; empty for test. train: a fifth of each class of it, as of a "
        "data set that has one split only.",
        later=True,
    )
    validation_split: str = _stream(
        "", "Split for validation; empty to hold out training examples.", later=True
    )
    domain_field: str = _stream(
        "",
        "Domain-incremental: field of tensorflow-datasets or column whose values are the domains; "
        "empty for domain in a .csv or .jsonl and for domain_train and domain_test in an .npz.",
        later=True,
    )
    skip_unreadable: bool = _stream(
        False,
        "Folders of images: leave out files that cannot be read, instead of ending.",
        later=True,
    )
    stored_size: Natural = _stream(
        0,
        "tensorflow-datasets, folders: side in pixels of the square that images are resized to, "
        "once, and kept as; for images of several sizes. 0 to leave them.",
    )
    cache_dir: str = _stream(
        "",
        "Where resized images are kept; empty for beside the prepared data or, where that cannot "
        "be written, the user's cache directory.",
        identity=False,
    )
    class_subset: Natural = _stream(
        0,
        "Class-incremental: classes to keep, the first so many by their numbers; 0 for all.",
        later=True,
    )
    train_per_class: Natural = _stream(0, "Training examples of each class to keep; 0 for all.")
    test_per_class: Natural = _stream(0, "Test examples of each class to keep; 0 for all.")
    scenario: str = _stream(
        "domain_incremental",
        "domain_incremental: every task has every class (digits: each task turns the images "
        "further; domainnet: the first domains in alphabetical order; other data: see dataset and "
        "domain_field). class_incremental: every task brings new classes.",
        stream.SCENARIOS,
    )
    num_tasks: Positive = _stream(
        5, "Number of tasks; where the classes do not divide evenly, earlier tasks have one more."
    )
    class_order: str = _stream(
        "random",
        "Class-incremental: random by the seed, given (by their numbers), or groups: one group of "
        "classes that the data set names a task, such as the domains of clinc_oos.",
        stream.CLASS_ORDERS,
    )
    base_classes: Natural = _stream(
        0, "Class-incremental: classes of the first task; 0 for an even share."
    )
    rotation_step: float = _stream(20.0, "Domain-incremental digits: degrees from task to task.")
    class_names: str = _stream(
        "",
        "A file with the names of the classes, one a line in the order of their labels; empty for "
        "those that the data set has.",
        later=True,
    )
    # Every merge measures its loss change on held-out examples, so some are always needed.
    validation_fraction: float = _stream(
        0.15, "Share of each class's training data that is held out for validation."
    )
    # Both are always measured, so a work directory may be shown with either.
    evaluate_on: str = _evaluation(
        "test",
        "Split whose accuracies are shown, of the two that are measured after every task; "
        "validation to choose settings.",
        SPLITS,
        identity=False,
    )

    # Model.
    model: str = _model(
        "mlp",
        "Architecture; vit and text_encoder take the sizes below; clip is the image tower of the "
        "CLIP model in pretrained, whose config says its sizes. package.module:factory is one's "
        "own: a function of num_classes that returns a linen or nnx module.",
        MODELS,
        or_factory=True,
    )
    model_settings: str = _model(
        "", "Keyword arguments of one's own model factory, as key=value,key=value."
    )
    pretrained: str = _model(
        "",
        "Weights to start from: a folder or file of timm or transformers (safetensors, in shards "
        "too), AugReg's .npz, or a folder of Orbax (its newest step, or folder@step); empty to "
        "start from scratch, with the first task as pre-training. Grey images become RGB for them.",
    )
    adapter_from: str = _model(
        "",
        "Folder of a LoRA adapter of PEFT for the pre-trained weights: the run starts from their "
        "sum, but for the adapter's classifier, and export_adapter writes one adapter of both.",
        later=True,
    )
    tokenizer: str = _model(
        "",
        "Text and zero_shot: a tokenizer.json or, for CLIP, vocab.json with merges.txt beside it; "
        "empty for what lies beside the pre-trained weights.",
    )
    max_tokens: Positive = _model(32, "Text: tokens that texts are cut or padded to.")
    vocabulary: Positive = _model(30522, "text_encoder: number of token ids.")
    # Unlike stored_size, this resizes at every step and takes no room on a disk.
    image_size: Natural = _model(
        0, "vit: side in pixels that images are resized to on the device; 0 to leave them."
    )
    compute_dtype: str = _model(
        "float32",
        "Type of the models' computation; parameters, adapters, curvature and merges are float32.",
        ("float32", "bfloat16"),
    )
    # Both change numbers by rounding only, so a run may go on with another choice.
    attention: str = _model(
        "auto",
        "vit, text_encoder: implementation of attention. auto: cudnn on NVIDIA GPUs in bfloat16, "
        "own on a CPU, xla elsewhere.",
        IMPLEMENTATIONS,
        identity=False,
        later=True,
    )
    remat: str = _model(
        "none",
        "vit, text_encoder: what the backward pass computes again instead of keeping it. blocks "
        "keeps little more than the blocks' inputs in memory and takes a third longer.",
        ("none", "blocks"),
        identity=False,
        later=True,
    )
    # 0 means "that of the public weights", which differs between the two encoders.
    layer_norm_epsilon: NonNegativeReal = _model(
        0.0,
        "Of the layer norms; 0 for 1e-6 in a vit, which is timm's and AugReg's, 1e-5 in a dinov3 "
        "model, and 1e-12 in text encoders. transformers' ViT weights need 1e-12.",
    )
    hidden_sizes: tuple[int, ...] = _model((256, 256), "mlp: width of each hidden layer.")
    patch_size: Positive = _model(2, "vit: side of a patch in pixels; must divide the image.")
    width: Positive = _model(64, "vit, text_encoder: width of the tokens.")
    depth: Positive = _model(4, "vit, text_encoder: number of blocks.")
    num_heads: Positive = _model(4, "vit, text_encoder: attention heads; must divide the width.")
    registers: Natural = _model(
        0,
        "vit: learned tokens that no classifier reads, 4 in the reg4 weights of DINOv2; a dinov3 "
        "model has 4.",
        later=True,
    )
    layer_scale: NonNegativeReal = _model(
        0.0,
        "vit: initial value of learned factors of what blocks add; 0 for none, and for 1e-5 in a "
        "dinov2 or dinov3 model.",
        later=True,
    )
    pooling: str = _model(
        "class_token",
        "vit: what the classifier reads. mean and mean_norm, without a class token: the mean of "
        "the patches after the last norm, or before it.",
        POOLINGS,
        later=True,
    )
    positions: str = _model(
        "learned",
        "vit: an embedding of each position, or rotary ones, which a dinov3 model has.",
        POSITIONS,
        later=True,
    )

    # Adapters.
    adapter: str = _training(
        "full",
        "full: all parameters train and merge. lora: low-rank adapters do (from scratch, the first "
        "task trains all parameters).",
        ("full", "lora"),
    )
    # Rank and pattern are those of the paper: https://arxiv.org/abs/2505.22389
    lora_rank: Positive = _training(10, "lora: rank of the adapters.")
    lora_pattern: str = _training(
        "",
        "lora: regular expression over the paths of dense kernels, matched in full; empty for key "
        "and value projections, or an mlp's hidden layers.",
    )

    # Training.
    epochs: Positive = _training(3, "Passes over the data of a task.")
    # From scratch, the first task also stands in for the pre-training that adapters presuppose.
    first_task_epochs: Natural = _training(
        9, "The same for the first task of a run from scratch; 0 for no more."
    )
    # The code of the paper repeats the data ten times an epoch.
    epoch_repeats: Positive = _training(1, "Passes over the data that count as one epoch.")
    batch_size: Positive = _training(32, "Examples per step.")
    accumulation_steps: Positive = _training(
        1,
        "Steps whose gradients make one update, in less memory what batch_size times as large "
        "does; an epoch's last update may be of fewer.",
    )
    # Curvature, merges and statistics do not follow it: they always have full float32.
    matmul_precision: str = _training(
        "default",
        "Precision of float32 matrix products in training and evaluation, a name of JAX's "
        "default_matmul_precision: default is the platform's, TF32 on NVIDIA GPUs; highest is full "
        "float32, which curvature, merges, class statistics and exports have in any case.",
        ("default", "high", "highest"),
        later=True,
    )
    optimizer: str = _training("adamw", "Optimiser, from optax; restarts at each task.", OPTIMIZERS)
    learning_rate: PositiveReal = _training(3e-3, "Peak learning rate.")
    head_learning_rate: NonNegativeReal = _training(
        0.0, "The same for the classifier; 0 for equal."
    )
    # The code of the paper divides by 28; the curvature is then that of the divided logits too.
    temperature: PositiveReal = _training(
        1.0, "Logits are divided by it in the loss, and so in its curvature."
    )
    weight_decay: NonNegativeReal = _training(0.0, "Decoupled weight decay (adamw).")
    schedule: str = _training("constant", "Course of the learning rate over each task.", SCHEDULES)
    # The fractions of the code of the paper; other schedules do not read them.
    milestones: tuple[float, ...] = _training(
        (0.5, 0.8),
        "schedule=milestones: fractions of a task after each of which the rate is a tenth.",
    )
    warmup_fraction: float = _training(0.0, "Share of each task's steps with a linear warm-up.")
    clip_norm: NonNegativeReal = _training(0.0, "Bound on the gradient's global norm; 0 for none.")

    # Devices.
    # Devices change numbers by rounding only, so a run may go on with more or fewer.
    devices: Natural = _placement(
        1,
        "Devices that the examples of each step are divided among, with the numbers of one up to "
        "rounding; 0 for all, of all processes. Must divide batch_size.",
        identity=False,
    )
    fsdp: Positive = _placement(
        1,
        "How many of the devices hold one copy of the parameters, the optimiser's state and the "
        "rule's together, a part of each matrix each; must divide devices. 1 for a copy on each.",
        identity=False,
    )

    # Images.
    augmentation: str = _training(
        "none",
        "Of the training images, on the device: crop is a random resized crop, crop_flip is that "
        "and a flip; randaugment and autoaugment (ImageNet's policy) come before both.",
        augmentation.AUGMENTATIONS,
    )
    # The bounds of torchvision's RandomResizedCrop.
    crop_scale: tuple[float, ...] = _training(
        (0.08, 1.0), "Least and greatest area of a random crop over that of the image."
    )
    # Two operations of magnitude 9 are the choice of the RandAugment paper for ResNet-50.
    randaugment_layers: Positive = _training(2, "randaugment: operations for each image.")
    randaugment_magnitude: float = _training(9.0, "randaugment: strength of each, 0 to 10.")
    # Placement, not identity: streamed and resident inputs give the same numbers.
    resident_mb: NonNegativeReal = _placement(
        0.0,
        "Inputs that would take more than so many MB of a device stay in the host's memory and are "
        "streamed, with the same numbers; so do snapshots of training until the merge. 0 for half "
        "of the device's memory and, on a CPU, no bound.",
        identity=False,
    )
    evaluation_resize: Annotated[float, AT_LEAST_ONE] = _training(
        1.0,
        "Evaluation, curvature and training without crops see the middle of images resized to this "
        "multiple of what the model reads; 256/224 is common, 1 is the whole image.",
    )

    # Perturbation.
    perturbation: str = _perturbation(
        "symmetric",
        "Where along the task vector, the displacement from the model that the task started from, "
        "the training loss is taken.",
        ("symmetric", "gaussian", "one_sided", "antithetic", "none"),
    )
    # The choices of the paper: p * epsilon ** 2 = 1/12 of the curvature along the task vector is
    # added to the loss.
    epsilon: float = _perturbation(
        0.5, "Radius of the perturbation over the task vector, in (0, 1]."
    )
    probabilities: tuple[float, ...] = _perturbation(
        (1 / 3, 1 / 3, 1 / 3), "symmetric: of 0, +epsilon and -epsilon; fractions may be given."
    )
    # Without adapters all examples share the perturbed weights, so only lora draws per example.
    perturb_per: str = _perturbation(
        "batch", "One draw per batch or, with lora, per example.", ("batch", "example")
    )

    # Merging.
    rule: str = _merging("perturb_and_merge", "Merge rule.", tuple(rules.REGISTRY))
    rule_settings: str = _merging(
        "",
        "Settings of the rule that are not its defaults, as clip=false for perturb_and_merge; "
        "several with commas between them.",
    )
    # The paper measures fisher_empirical, which fades with the square of the residuals where the
    # exact Fisher fades with the residuals: well-fitted tasks would count for less.
    curvature: str = _merging(
        "fisher_exact",
        "Curvature that a task leaves behind for the merge rule: the diagonal of the Fisher of the "
        "true labels or of all labels (which is gauss_newton_diag too), its Kronecker factors for "
        "dense kernels, or a Gauss-Newton matrix of low rank; input_moment: second moments of the "
        "inputs of dense kernels, which need one forward pass and no labels, and which regmean "
        "takes whatever is named here; exact_current: stored_curvature, and "
        "the current task's own along its task vector by jvp; exact_all: that of all tasks, by "
        "replay of merge_examples of each, for analysis.",
        CURVATURES,
    )
    stored_curvature: str = _merging(
        "fisher_exact", "exact_current: what earlier tasks left behind.", STORED_CURVATURES
    )
    # Rank and slots fix the memory's shape, so that one compilation serves the whole stream.
    curvature_rank: Positive = _merging(
        16, "low_rank: columns of the size of what merges, of a task and of the memory of all."
    )
    curvature_slots: Positive = _merging(
        16, "kronecker: tasks whose factors are kept apart; later ones share the last slot."
    )
    # One label a pass is unbiased and costs one backward pass instead of one per class.
    curvature_samples: Natural = _merging(
        1,
        "fisher_exact, gauss_newton_diag, kronecker: labels drawn per example; 0 for the sum over "
        "all classes.",
    )
    curvature_examples: Natural = _merging(
        0, "Training examples that curvature is measured on; 0 for all of the task's."
    )
    curvature_error: NonNegativeReal = _merging(
        0.0,
        "Stop measuring a task's curvature, on examples in random order, as soon as its relative "
        "standard error along the task vector is at most this, which bounds that of the "
        "coefficient; 0 to go on to the last example.",
    )
    # The settings of that run are compared when it is read, so its path may change.
    branch_from: str = _merging(
        "",
        "Work directory of a run with keep_task_models, of other merging or perturbation: the "
        "first from_task tasks are not trained again but merged anew, from the models it trained.",
        identity=False,
    )
    from_task: int = _merging(0, "branch_from: number of tasks taken over.")
    merge_examples: Positive = _merging(
        256,
        "Training examples of a task that rules look at while they merge, beyond curvature: trm "
        "optimises on them, became takes the inputs of layers from them.",
    )
    onset_gradients: bool = _merging(
        False, "Log the norm of the loss gradient at the onset of each task, as trm always does."
    )
    # Part of a run's identity: its checkpoints hold their statistics, its results their figures.
    classifiers: tuple[str, ...] = _merging(
        (),
        f"Class-incremental: what predicts, one or more of {', '.join(classifiers.REGISTRY)}, all "
        "evaluated after one training; the first is shown where there is room for one; empty for "
        f"{RECOMMENDED}. trained: "
        "the columns that tasks have trained, side by side. The others are made after each merge "
        "from statistics of the merged model's features that are kept of all classes seen; "
        "training goes on with the trained columns. zero_shot: columns that the text tower of CLIP "
        "makes of class names and templates, which no task trains. One may have settings, with "
        "colons between them, as ridge:features=5000.",
        later=True,
    )
    templates: str = _training(
        "a photo of a {}.",
        "zero_shot: phrases with {} in the place of a class's name, with | between them, or a file "
        "of one a line; a column is the mean of their unit vectors.",
        later=True,
    )
    drift_correction: str = _merging(
        "none",
        "Whether the class statistics of earlier tasks follow the features as merges move them: "
        "affine moves them by a map that is fitted at each merge to the task's features before and "
        "after it. discriminant:drift_correction=affine corrects one of several classifiers.",
        CORRECTIONS,
        later=True,
    )
    trust: str = _merging(
        "off",
        "What to do where a merge's quadratic model is wrong: its minimum outside [0, 1], or a "
        "predicted loss change of the task, on held-out data, that is not within 3 times the "
        "measured one. warn says so when it happens; shrink also moves the coefficient towards "
        "1/t, the further the more the two differ. The report says it in any case.",
        ("off", "warn", "shrink"),
    )
    # Measured on digits with a residual network: BUILD_NOTES.md has the numbers.
    model_state: str = _merging(
        "measured",
        "Running averages of batch normalisation in a model of one's own, at a merge. measured: "
        "measured anew on the task's training examples; merged: interpolated by the coefficient "
        "like the parameters; trained: those of the trained model.",
        ("measured", "merged", "trained"),
    )
    # A landscape evaluates every point on all tasks seen, so it is off unless it is asked for.
    landscape_points: Natural = _merging(
        0,
        "Points between the model that a task started from and the trained one at which, after "
        "each merge, the losses and accuracies of all tasks seen are measured on validation data; "
        "some more lie beyond either. 0 for none.",
    )
    plane_points: Natural = _merging(
        0,
        "The same on a square of so many points a side, in the plane of the last two tasks' task "
        "vectors; 0 for none.",
    )
    # 8 MB stay in the cache of a CPU; 2048 MB are little of an accelerator's memory.
    curvature_memory_mb: NonNegativeReal = _merging(
        0.0,
        "Bound in MB on the per-example gradients in memory at a time; 0 for 8 on a CPU and 2048 "
        "on accelerators.",
    )

    @property
    def reads_text(self) -> bool:
        """True if examples are token ids and not images."""
        return self.model in TEXT_MODELS

    @property
    def has_text_columns(self) -> bool:
        """True if the classifier's columns are made of the names of the classes, and stay."""
        return "zero_shot" in self.classifiers

    @property
    def kept_curvature(self) -> str:
        """Kind of curvature that tasks leave behind for later merges."""
        kinds = rules.REGISTRY[self.rule]().needs.curvatures
        if kinds and "diagonal" not in kinds:
            return kinds[0]  # the only one that the rule takes
        exact = self.curvature == "exact_current"
        return self.stored_curvature if exact else self.curvature

    @property
    def from_scratch(self) -> bool:
        """True if the first task is the pre-training."""
        return not self.pretrained


def as_now(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json, which an earlier version may have written, as of now.

    Settings that it did not have get their defaults; there was one classifier then.
    """
    later = (field for field in dataclasses.fields(Settings) if field.metadata["later"])
    # JSON has lists for tuples.
    defaults = {field.name: field.default for field in later} | {"classifiers": ["trained"]}
    settings = {**defaults, **saved}
    if isinstance(classifier := settings.pop("classifier", None), str):
        settings["classifiers"] = [classifier]
    return settings


def names_of(*stages: str, identity: bool = False) -> tuple[str, ...]:
    """List the settings of some stages; with `identity`, only those that identify a run."""
    return tuple(
        field.name
        for field in dataclasses.fields(Settings)
        if field.metadata["stage"] in stages and (field.metadata["identity"] or not identity)
    )
