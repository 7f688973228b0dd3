"""The settings of a run: a frozen dataclass whose fields become flags."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from pm_jax import classifiers, rules
from pm_jax.continual.settings.chosen_classifiers import CORRECTIONS, RECOMMENDED
from pm_jax.continual.settings.meanings import CURVATURES, PERTURBATIONS
from pm_jax.data import augmentation, stream
from pm_jax.models.attention import IMPLEMENTATIONS
from pm_jax.models.vit import POOLINGS, POSITIONS
from pm_jax.registries import meanings

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
    group: str = "",
    meanings: Mapping[str, str] = MappingProxyType({}),
    identity: bool = True,
    or_factory: bool = False,
    later: bool = False,
) -> Any:
    """Make a field; a setting without identity may differ between calls on a work directory.

    The description's first sentence stands alone: it is all that a list of flags has room for.
    `meanings` say what values do, in a sentence each. With `or_factory` it may also be a
    package.module:factory instead of one of its choices. Runs of earlier versions do not have a
    `later` setting; its default must be what they did.
    """
    group = group or {"placement": "devices"}.get(stage, stage)
    about: dict[str, Any]
    about = {"description": description, "choices": choices, "stage": stage, "identity": identity}
    about |= {"meanings": meanings, "group": group, "or_factory": or_factory, "later": later}
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
        "Data: digits (scikit-learn's), a path, a prepared data set, or package.module:factory. "
        "A path is that of a folder of images (train/CLASS/1.jpg), of a .csv or .jsonl with text "
        "and label, or of an .npz with x_train, y_train, x_test and y_test (images or strings). "
        "Any other name is an image or text classification data set that tensorflow-datasets has "
        "prepared in data_dir, such as cifar100, imagenet_r or clinc_oos. A factory is a function "
        "of one's own that returns tasks. Several with commas between them are domains, one a "
        "task.",
    )
    dataset_settings: str = _stream(
        "",
        "Keyword arguments of one's own dataset factory: key=value,key=value. The numbers of a "
        "tuple have colons between them.",
    )
    # A path is no identity: a run may go on after its data have moved.
    data_dir: str = _stream(
        "", "Where tensorflow-datasets has its data; empty: its default.", identity=False
    )
    test_split: str = _stream(
        "",
        "Split, or folder, to test on; empty: test. With train a fifth of each class is held out "
        "of it, as of a data set that has one split only.",
        later=True,
    )
    validation_split: str = _stream(
        "",
        "Split, or folder, for validation; empty: part of the training data. See "
        "validation_fraction for how much.",
        later=True,
    )
    domain_field: str = _stream(
        "",
        "Field or column whose values are the domains. For domain-incremental streams of "
        "tensorflow-datasets or files; empty: domain in a .csv or .jsonl, domain_train and "
        "domain_test in an .npz.",
        later=True,
    )
    skip_unreadable: bool = _stream(
        False,
        "Leave out and count images that cannot be read, instead of ending. For folders of images.",
        later=True,
    )
    stored_size: Natural = _stream(
        0,
        "Side in pixels that images are resized to once, and kept; 0: never. For images of several "
        "sizes, in folders or of tensorflow-datasets; they become squares.",
    )
    cache_dir: str = _stream(
        "",
        "Where resized images are kept; empty: beside the prepared data. Where that cannot be "
        "written, empty means the user's cache directory.",
        identity=False,
    )
    class_subset: Natural = _stream(
        0,
        "Classes to keep, the first so many by their numbers; 0: all. For class-incremental "
        "streams.",
        later=True,
    )
    train_per_class: Natural = _stream(0, "Training examples of each class to keep; 0: all.")
    test_per_class: Natural = _stream(0, "Test examples of each class to keep; 0: all.")
    scenario: str = _stream(
        "domain_incremental",
        "What a task brings: another domain of all classes, or new classes. Domains of the "
        "digits are turned further from task to task, those of domainnet are its first ones in "
        "alphabetical order, and for other data dataset and domain_field tell.",
        stream.SCENARIOS,
    )
    num_tasks: Positive = _stream(
        5,
        "Number of tasks. Where the classes do not divide evenly, earlier tasks have one more.",
    )
    class_order: str = _stream(
        "random",
        "Order in which classes come: random, given or groups. For class-incremental streams: "
        "random by the seed; given is by their numbers; groups gives each task a group of classes "
        "that the data set names, such as the domains of clinc_oos.",
        stream.CLASS_ORDERS,
    )
    base_classes: Natural = _stream(
        0, "Classes of the first task (class-incremental); 0: an even share."
    )
    rotation_step: float = _stream(
        20.0, "Degrees by which digits turn from task to task (domain-incremental)."
    )
    class_names: str = _stream(
        "",
        "File with the names of the classes; empty: those of the data set. It has one a line in "
        "the order of the labels.",
        later=True,
    )
    # Every merge measures its loss change on held-out examples, so some are always needed.
    validation_fraction: float = _stream(
        0.15, "Share of each class's training data held out for validation."
    )
    # Both are always measured, so a work directory may be shown with either.
    evaluate_on: str = _evaluation(
        "test",
        "Split whose accuracies tables, plots and report show. Every run measures both after every "
        "task, so a finished work directory is shown with either without training again; choose "
        "settings by validation.",
        SPLITS,
        identity=False,
    )

    # Model.
    model: str = _model(
        "mlp",
        "Architecture, or package.module:factory of one's own. vit and text_encoder take their "
        "sizes from width, depth and num_heads; clip is the image tower of the CLIP model in "
        "pretrained, whose config says its sizes; the longer names have public weights. A factory "
        "is a function of num_classes that returns a linen or nnx module.",
        MODELS,
        or_factory=True,
    )
    model_settings: str = _model(
        "", "Keyword arguments of one's own model factory: key=value,key=value."
    )
    pretrained: str = _model(
        "",
        "File or folder of weights to start from; empty: from scratch. It is one of timm or "
        "transformers (safetensors, in shards too), AugReg's .npz, or a folder of Orbax (its "
        "newest step, or folder@step). From scratch, the first task is the pre-training. Grey "
        "images become RGB for such weights.",
    )
    adapter_from: str = _model(
        "",
        "Folder of a LoRA adapter of PEFT that the run starts from. It is added to the pre-trained "
        "weights, without its classifier, and export_adapter writes one adapter of both.",
        later=True,
    )
    tokenizer: str = _model(
        "",
        "Tokenizer's file; empty: the one beside the pre-trained weights. For texts and zero_shot: "
        "a tokenizer.json or, for CLIP, vocab.json with merges.txt beside it.",
    )
    max_tokens: Positive = _model(32, "Tokens that texts are cut or padded to.")
    vocabulary: Positive = _model(30522, "Number of token ids of a text_encoder.")
    # Unlike stored_size, this resizes at every step and takes no room on a disk.
    image_size: Natural = _model(
        0,
        "Side in pixels that a vit's images are resized to; 0: unchanged. The device "
        "resizes them at every step.",
    )
    compute_dtype: str = _model(
        "float32",
        "Type that the model computes in: float32 or bfloat16. Parameters, adapters, curvature and "
        "merges are float32.",
        ("float32", "bfloat16"),
        group="devices",
    )
    # Both change numbers by rounding only, so a run may go on with another choice.
    attention: str = _model(
        "auto",
        "Implementation of attention in a vit or text_encoder. auto is cudnn on NVIDIA GPUs in "
        "bfloat16, with the tokens padded to a multiple of 8, own on a CPU, and xla elsewhere.",
        IMPLEMENTATIONS,
        identity=False,
        later=True,
        group="devices",
    )
    remat: str = _model(
        "none",
        "Parts of a vit or text_encoder that are computed twice to save memory. blocks computes "
        "every block again in the backward pass: little more than the blocks' inputs stay in "
        "memory, and training takes a third longer.",
        ("none", "blocks"),
        identity=False,
        later=True,
        group="devices",
    )
    # 0 means "that of the public weights", which differs between the two encoders.
    layer_norm_epsilon: NonNegativeReal = _model(
        0.0,
        "Epsilon of the layer norms; 0: that of the architecture. This is 1e-6 in a vit (timm's "
        "and AugReg's), 1e-5 in a dinov3 model and 1e-12 in text encoders; transformers' ViT "
        "weights need 1e-12.",
    )
    hidden_sizes: tuple[int, ...] = _model((256, 256), "Width of each hidden layer of an mlp.")
    patch_size: Positive = _model(2, "Side of a vit's patches in pixels; must divide the image's.")
    width: Positive = _model(64, "Width of the tokens in a vit or text_encoder.")
    depth: Positive = _model(4, "Number of blocks of a vit or text_encoder.")
    num_heads: Positive = _model(
        4, "Attention heads of a vit or text_encoder; must divide the width."
    )
    registers: Natural = _model(
        0,
        "Learned tokens of a vit that no classifier reads. The reg4 weights of DINOv2 and every "
        "dinov3 model have 4.",
        later=True,
    )
    layer_scale: NonNegativeReal = _model(
        0.0,
        "Initial value of learned factors of what a vit's blocks add; 0: none. In a dinov2 or "
        "dinov3 model 0 stands for 1e-5.",
        later=True,
    )
    pooling: str = _model(
        "class_token",
        "Features of a vit that its classifier reads. mean and mean_norm go without a class token: "
        "the mean of the patches after the last norm, or before it.",
        POOLINGS,
        later=True,
    )
    positions: str = _model(
        "learned",
        "Positions of a vit: a learned embedding of each, or rotary ones. A dinov3 model has "
        "rotary ones.",
        POSITIONS,
        later=True,
    )

    # Adapters.
    adapter: str = _training(
        "full",
        "Whether all parameters train and merge (full), or adapters (lora). They are of low rank. "
        "From scratch, the first task trains all parameters in any case.",
        ("full", "lora"),
        group="what trains",
    )
    # Rank and pattern are those of the paper: https://arxiv.org/abs/2505.22389
    lora_rank: Positive = _training(10, "Rank of the LoRA adapters.", group="what trains")
    lora_pattern: str = _training(
        "",
        "Regular expression over the paths of kernels that LoRA adapts. It must match the whole "
        "path of a dense kernel; empty: key and value projections, or an mlp's hidden layers.",
        group="what trains",
    )

    # Training.
    epochs: Positive = _training(3, "Passes over the data of a task.")
    # From scratch, the first task also stands in for the pre-training that adapters presuppose.
    first_task_epochs: Natural = _training(
        9, "Passes over the first task of a run from scratch; 0: as epochs."
    )
    # The code of the paper repeats the data ten times an epoch.
    epoch_repeats: Positive = _training(1, "Passes over the data that count as one epoch.")
    batch_size: Positive = _training(32, "Examples per step.")
    accumulation_steps: Positive = _training(
        1,
        "Steps whose gradients make one update. A batch_size so many times as large does the same "
        "in more memory; an epoch's last update may be of fewer steps.",
    )
    # Curvature, merges and statistics do not follow it: they always have full float32.
    matmul_precision: str = _training(
        "default",
        "Precision of float32 matrix products in training and evaluation. It is a name of JAX's "
        "default_matmul_precision: default is the platform's, TF32 on NVIDIA GPUs; highest is full "
        "float32, which curvature, merges, class statistics and exports have in any case.",
        ("default", "high", "highest"),
        later=True,
        group="devices",
    )
    optimizer: str = _training(
        "adamw", "Optimiser, adamw or sgd; it restarts at each task.", OPTIMIZERS
    )
    learning_rate: PositiveReal = _training(3e-3, "Peak learning rate.")
    head_learning_rate: NonNegativeReal = _training(
        0.0, "Peak learning rate of the classifier; 0: learning_rate."
    )
    # The code of the paper divides by 28; the curvature is then that of the divided logits too.
    temperature: PositiveReal = _training(
        1.0, "Divisor of the logits in the loss, and so in its curvature."
    )
    weight_decay: NonNegativeReal = _training(0.0, "Decoupled weight decay of adamw.")
    schedule: str = _training("constant", "Course of the learning rate over each task.", SCHEDULES)
    # The fractions of the code of the paper; other schedules do not read them.
    milestones: tuple[float, ...] = _training(
        (0.5, 0.8),
        "Fractions of a task where the rate falls to a tenth (milestones).",
    )
    warmup_fraction: float = _training(0.0, "Share of each task's steps with a linear warm-up.")
    clip_norm: NonNegativeReal = _training(0.0, "Bound on the gradient's global norm; 0: none.")

    # Devices.
    # Devices change numbers by rounding only, so a run may go on with more or fewer.
    devices: Natural = _placement(
        1,
        "Devices that divide the examples of a step; 0: all, of all processes. The numbers are "
        "those of one device up to rounding; batch_size must be a multiple.",
        identity=False,
    )
    fsdp: Positive = _placement(
        1,
        "Devices that share one copy of the parameters; 1: a copy on each. They divide "
        "every matrix, and the optimiser's and the rule's state; must divide devices.",
        identity=False,
    )

    # Images.
    augmentation: str = _training(
        "none",
        "Random changes of the training images, made on the device. crop is a random resized crop, "
        "crop_flip is that and a flip; randaugment and autoaugment (ImageNet's policy) come before "
        "both.",
        augmentation.AUGMENTATIONS,
    )
    # The bounds of torchvision's RandomResizedCrop.
    crop_scale: tuple[float, ...] = _training(
        (0.08, 1.0), "Least and greatest area of a random crop over that of the image."
    )
    # Two operations of magnitude 9 are the choice of the RandAugment paper for ResNet-50.
    randaugment_layers: Positive = _training(2, "Operations of randaugment for each image.")
    randaugment_magnitude: float = _training(
        9.0, "Strength of the operations of randaugment, 0 to 10."
    )
    # Placement, not identity: streamed and resident inputs give the same numbers.
    resident_mb: NonNegativeReal = _placement(
        0.0,
        "MB of a device that inputs may fill; 0: by the platform. Inputs that would take more stay "
        "in the host's memory and are streamed, with the same numbers (pip install "
        "'.[streaming]'); so do snapshots of training until the merge. 0 stands for half of the "
        "device's memory and, on a CPU, for no bound.",
        identity=False,
    )
    evaluation_resize: Annotated[float, AT_LEAST_ONE] = _training(
        1.0,
        "Resizing of images before their middle is read; 1: all of it is read. Evaluation, "
        "curvature and training without crops resize to this multiple of what the model reads; "
        "256/224 is common.",
        group="evaluation",
    )

    # Perturbation.
    perturbation: str = _perturbation(
        "symmetric",
        "Where along the task vector the training loss is taken. The task vector is the "
        "displacement from the model that the task started from.",
        tuple(PERTURBATIONS),
        meanings=PERTURBATIONS,
    )
    # The choices of the paper: p * epsilon ** 2 = 1/12 of the curvature along the task vector is
    # added to the loss.
    epsilon: float = _perturbation(
        0.5, "Radius of the perturbation over the task vector, in (0, 1]."
    )
    probabilities: tuple[float, ...] = _perturbation(
        (1 / 3, 1 / 3, 1 / 3),
        "Probabilities of 0, +epsilon and -epsilon (symmetric). Fractions may be given.",
    )
    # Without adapters all examples share the perturbed weights, so only lora draws per example.
    perturb_per: str = _perturbation(
        "batch",
        "Whether a batch shares one draw or, with lora, each example has one.",
        ("batch", "example"),
    )

    # Merging.
    rule: str = _merging(
        "perturb_and_merge",
        "Merge rule. It makes a model of the previous and the trained one. oracle, "
        "exact_curvature and joint are bounds: they need the data of all tasks. became, pam and "
        "trm take part in training or look at its path. With frozen and first_session later tasks "
        "train a classifier's columns at most.",
        tuple(rules.REGISTRY),
        meanings=meanings(rules.REGISTRY, given=("model_weights", "max_tasks")),
    )
    rule_settings: str = _merging(
        "",
        "Settings of the rule: name=value,name=value. Such are keep=0.1,trim=tensor for ties, and "
        "jackknife=8 for an error bar of perturb_and_merge's coefficient over the examples of all "
        "tasks; an unknown one is answered with the list.",
    )
    # The paper measures fisher_empirical, which fades with the square of the residuals where the
    # exact Fisher fades with the residuals: well-fitted tasks would count for less.
    curvature: str = _merging(
        "fisher_exact",
        "Curvature that a task leaves behind for the merge rule.",
        tuple(CURVATURES),
        meanings=CURVATURES,
    )
    stored_curvature: str = _merging(
        "fisher_exact",
        "Curvature that tasks leave behind where curvature=exact_current.",
        tuple(CURVATURES)[:-2],
    )
    # Rank and slots fix the memory's shape, so that one compilation serves the whole stream.
    curvature_rank: Positive = _merging(
        16,
        "Rank of curvature=low_rank, of a task and of the memory of all. So many columns of the "
        "size of what merges are kept.",
    )
    curvature_slots: Positive = _merging(
        16,
        "Tasks whose factors curvature=kronecker keeps apart. Later ones share the last slot.",
    )
    # One label a pass is unbiased and costs one backward pass instead of one per class.
    curvature_samples: Natural = _merging(
        1,
        "Labels drawn per example for the curvature; 0: sum over all classes. For fisher_exact, "
        "gauss_newton_diag and kronecker.",
    )
    curvature_examples: Natural = _merging(
        0, "Training examples that curvature is measured on; 0: the task's."
    )
    curvature_error: NonNegativeReal = _merging(
        0.0,
        "Relative standard error at which measuring curvature stops; 0: never. It is that along "
        "the task vector, on examples in random order, and bounds that of the coefficient.",
    )
    # The settings of that run are compared when it is read, so its path may change.
    branch_from: str = _merging(
        "",
        "Work directory of a run whose first from_task tasks are taken over. It had "
        "keep_task_models and other merging or perturbation; its tasks are not trained again but "
        "merged anew, from the models it trained.",
        identity=False,
        group="run",
    )
    from_task: int = _merging(0, "Number of tasks taken over from branch_from.", group="run")
    merge_examples: Positive = _merging(
        256,
        "Training examples of a task that a rule sees beyond curvature. trm optimises on them, "
        "became takes the inputs of layers from them, and curvature=exact_all replays them.",
    )
    onset_gradients: bool = _merging(
        False,
        "Log the norm of the loss gradient at the onset of each task. trm always does.",
        group="evaluation",
    )
    # Part of a run's identity: its checkpoints hold their statistics, its results their figures.
    classifiers: tuple[str, ...] = _merging(
        (),
        "Classifiers of a class-incremental run, with commas between them. Empty: "
        f"{RECOMMENDED}. All are evaluated after one training, each in its own column; the first "
        "is shown where there is room for one. Training goes on with the trained columns; the "
        "others, but zero_shot, are made after each merge from statistics of the merged model's "
        "features that are kept of all classes seen. One may have settings, with colons between "
        "them, as ridge:features=5000.",
        meanings=meanings(classifiers.REGISTRY),
        later=True,
        group="classifier",
    )
    templates: str = _training(
        "a photo of a {}.",
        "Phrases of classifiers=zero_shot with {} in place of a class's name. They have | between "
        "them, or the value is a file of one a line; a column is the mean of their unit vectors.",
        later=True,
        group="classifier",
    )
    drift_correction: str = _merging(
        "none",
        "Whether class statistics follow the features as merges move them. affine moves those of "
        "earlier tasks by a map that is fitted at each merge to the task's features before and "
        "after it; discriminant:drift_correction=affine in classifiers corrects one of several.",
        CORRECTIONS,
        later=True,
        group="classifier",
    )
    trust: str = _merging(
        "off",
        "Answer to a merge with a wrong quadratic model: off, warn or shrink. It is wrong if its "
        "minimum lies outside [0, 1], or if a predicted loss change of the task, on held-out data, "
        "is not within 3 times the measured one. warn says so when it happens; shrink also moves "
        "the coefficient towards 1/t, the further the more the two differ. The report says it in "
        "any case.",
        ("off", "warn", "shrink"),
    )
    # Measured on digits with a residual network: BUILD_NOTES.md has the numbers.
    model_state: str = _merging(
        "measured",
        "Running averages of batch normalisation after a merge. For models of one's own. measured: "
        "anew on the task's training examples; merged: interpolated by the coefficient like the "
        "parameters; trained: those of the trained model.",
        ("measured", "merged", "trained"),
    )
    # A landscape evaluates every point on all tasks seen, so it is off unless it is asked for.
    landscape_points: Natural = _merging(
        0,
        "Points of each merge's segment to measure all tasks at; 0: none. So many lie between the "
        "model that a task started from and the trained one, some more beyond either; losses and "
        "accuracies of all tasks seen, on validation data, go to landscape.npz and, with the "
        "regret, to the report.",
        group="evaluation",
    )
    plane_points: Natural = _merging(
        0,
        "Points a side of a square to measure tasks at after merges; 0: none. It lies in the "
        "plane of the last two tasks' task vectors; losses and accuracies on validation data go to "
        "landscape.npz and the report.",
        group="evaluation",
    )
    # 8 MB stay in the cache of a CPU; 2048 MB are little of an accelerator's memory.
    curvature_memory_mb: NonNegativeReal = _merging(
        0.0,
        "MB of per-example gradients in memory at a time; 0: by the platform. That is 8 on a CPU "
        "and 2048 on accelerators.",
        group="devices",
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
