"""Names of our parameters in public checkpoints: a list of `Entry` for each layout.

A list also has the leaves that only some models have: registers, layer scales, the norm of a mean.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Entry(NamedTuple):
    """The place of one of our leaves in a checkpoint."""

    # Path of our leaf, "blocks_0/attn/key/kernel".
    path: str
    # Name of their tensor, "blocks.0.attn.qkv.weight".
    name: str
    # Difference between the arrays: "same"; "dense" and "conv", whose output axis comes first in
    # PyTorch; "heads_in", "heads_out" and "heads_bias", with an axis of heads in `.npz`;
    # "class_half", a dense kernel that reads the mean of the patches too, after the class token;
    # "squeezed", without our leading axes of size 1.
    kind: str = "same"
    # (i, n) if our leaf is the i-th of n equal parts along their first axis.
    part: tuple[int, int] | None = None


def _linear(path: str, name: str, part: tuple[int, int] | None = None) -> list[Entry]:
    return [
        Entry(f"{path}/kernel", f"{name}.weight", "dense", part),
        Entry(f"{path}/bias", f"{name}.bias", "same", part),
    ]


def _norm(path: str, name: str) -> list[Entry]:
    return [Entry(f"{path}/scale", f"{name}.weight"), Entry(f"{path}/bias", f"{name}.bias")]


def _blocks(depth: int, prefix: str, attention: str, norms: tuple[str, str]) -> list[Entry]:
    """List the entries of all blocks in the two layouts of transformers."""
    entries = []
    for layer in range(depth):
        ours, theirs = f"blocks_{layer}", f"{prefix}.{layer}"
        for name in ("query", "key", "value"):
            entries += _linear(f"{ours}/attn/{name}", f"{theirs}.{attention}.{name}")
        entries += _linear(f"{ours}/attn/proj", f"{theirs}.attention.output.dense")
        entries += _linear(f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense")
        entries += _linear(f"{ours}/mlp/fc2", f"{theirs}.output.dense")
        for number, norm in enumerate(norms, start=1):
            entries += _norm(f"{ours}/norm{number}", f"{theirs}.{norm}")
    return entries


def _timm(depth: int) -> list[Entry]:
    entries = [
        Entry("cls_token", "cls_token"),
        Entry("reg_token", "reg_token"),
        Entry("pos_embed", "pos_embed"),
        Entry("patch_embed/kernel", "patch_embed.proj.weight", "conv"),
        Entry("patch_embed/bias", "patch_embed.proj.bias"),
        *_norm("norm", "norm"),
        *_norm("fc_norm", "fc_norm"),
        *_linear("head", "head"),
    ]
    for layer in range(depth):
        ours, theirs = f"blocks_{layer}", f"blocks.{layer}"
        # timm keeps query, key and value in one matrix, one after another.
        for part, name in enumerate(("query", "key", "value")):
            entries += _linear(f"{ours}/attn/{name}", f"{theirs}.attn.qkv", (part, 3))
        entries += _linear(f"{ours}/attn/proj", f"{theirs}.attn.proj")
        for name in ("fc1", "fc2"):
            entries += _linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}")
        for name in ("norm1", "norm2"):
            entries += _norm(f"{ours}/{name}", f"{theirs}.{name}")
        entries += [
            Entry(f"{ours}/{name}/gamma", f"{theirs}.{name}.gamma") for name in ("ls1", "ls2")
        ]
    return entries


def _transformers(depth: int) -> list[Entry]:
    embeddings = "vit.embeddings"
    entries = [
        Entry("cls_token", f"{embeddings}.cls_token"),
        Entry("pos_embed", f"{embeddings}.position_embeddings"),
        Entry("patch_embed/kernel", f"{embeddings}.patch_embeddings.projection.weight", "conv"),
        Entry("patch_embed/bias", f"{embeddings}.patch_embeddings.projection.bias"),
        *_norm("norm", "vit.layernorm"),
        *_linear("head", "classifier"),
    ]
    norms = ("layernorm_before", "layernorm_after")
    return entries + _blocks(depth, "vit.encoder.layer", "attention.attention", norms)


def _dinov2(depth: int) -> list[Entry]:
    entries = [
        Entry("cls_token", "embeddings.cls_token"),
        Entry("reg_token", "embeddings.register_tokens"),
        Entry("pos_embed", "embeddings.position_embeddings"),
        Entry("patch_embed/kernel", "embeddings.patch_embeddings.projection.weight", "conv"),
        Entry("patch_embed/bias", "embeddings.patch_embeddings.projection.bias"),
        *_norm("norm", "layernorm"),
        Entry("head/kernel", "classifier.weight", "class_half"),
        Entry("head/bias", "classifier.bias"),
    ]
    attention = {name: f"attention.{name}" for name in ("query", "key", "value")}
    layers = {**attention, "proj": "output.dense"}
    return entries + _dino_blocks(depth, "encoder.layer", layers, {"fc1": "fc1", "fc2": "fc2"})


def _dinov3(depth: int) -> list[Entry]:
    entries = [
        Entry("cls_token", "embeddings.cls_token"),
        Entry("reg_token", "embeddings.register_tokens"),
        Entry("patch_embed/kernel", "embeddings.patch_embeddings.weight", "conv"),
        Entry("patch_embed/bias", "embeddings.patch_embeddings.bias"),
        *_norm("norm", "norm"),
        *_linear("head", "classifier"),
    ]
    layers = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "proj": "o_proj"}
    return entries + _dino_blocks(depth, "layer", layers, {"fc1": "up_proj", "fc2": "down_proj"})


def _dino_blocks(
    depth: int, prefix: str, attention: dict[str, str], mlp: dict[str, str]
) -> list[Entry]:
    """List the entries of all blocks with layer scales, for DINO's names of our layers."""
    entries = []
    for layer in range(depth):
        ours, theirs = f"blocks_{layer}", f"{prefix}.{layer}"
        for name, other in attention.items():
            entries += _linear(f"{ours}/attn/{name}", f"{theirs}.attention.{other}")
        for name, other in mlp.items():
            entries += _linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{other}")
        for number in (1, 2):
            entries += _norm(f"{ours}/norm{number}", f"{theirs}.norm{number}")
            gamma = f"{theirs}.layer_scale{number}.lambda1"
            entries.append(Entry(f"{ours}/ls{number}/gamma", gamma))
    return entries


def _augreg(depth: int) -> list[Entry]:
    def same(path: str, name: str) -> list[Entry]:
        leaves = ("scale", "bias") if "norm" in path else ("kernel", "bias")
        return [Entry(f"{path}/{leaf}", f"{name}/{leaf}") for leaf in leaves]

    entries = [
        Entry("cls_token", "cls"),
        Entry("pos_embed", "Transformer/posembed_input/pos_embedding"),
        *same("patch_embed", "embedding"),
        *same("norm", "Transformer/encoder_norm"),
        *same("head", "head"),
    ]
    for layer in range(depth):
        ours, theirs = f"blocks_{layer}", f"Transformer/encoderblock_{layer}"
        # The numbers in these names are those that Flax gave to modules without a name.
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            entries += [
                Entry(f"{ours}/attn/{name}/kernel", f"{attention}/{name}/kernel", "heads_in"),
                Entry(f"{ours}/attn/{name}/bias", f"{attention}/{name}/bias", "heads_bias"),
            ]
        entries += [
            Entry(f"{ours}/attn/proj/kernel", f"{attention}/out/kernel", "heads_out"),
            Entry(f"{ours}/attn/proj/bias", f"{attention}/out/bias"),
            *same(f"{ours}/mlp/fc1", f"{theirs}/MlpBlock_3/Dense_0"),
            *same(f"{ours}/mlp/fc2", f"{theirs}/MlpBlock_3/Dense_1"),
            *same(f"{ours}/norm1", f"{theirs}/LayerNorm_0"),
            *same(f"{ours}/norm2", f"{theirs}/LayerNorm_2"),
        ]
    return entries


def _bert(depth: int) -> list[Entry]:
    entries = [
        Entry("word_embed/embedding", "embeddings.word_embeddings.weight"),
        Entry("position_embed/embedding", "embeddings.position_embeddings.weight"),
        Entry("type_embed/embedding", "embeddings.token_type_embeddings.weight"),
        *_norm("embed_norm", "embeddings.LayerNorm"),
        *_linear("head", "classifier"),
    ]
    norms = ("attention.output.LayerNorm", "output.LayerNorm")
    return entries + _blocks(depth, "encoder.layer", "attention.self", norms)


def _clip_image(depth: int) -> list[Entry]:
    embeddings = "vision_model.embeddings"
    return [
        Entry("cls_token", f"{embeddings}.class_embedding", "squeezed"),
        Entry("pos_embed", f"{embeddings}.position_embedding.weight", "squeezed"),
        Entry("patch_embed/kernel", f"{embeddings}.patch_embedding.weight", "conv"),
        *_norm("norm_pre", "vision_model.pre_layrnorm"),
        *_norm("norm", "vision_model.post_layernorm"),
        Entry("projection/kernel", "visual_projection.weight", "dense"),
        *_clip_blocks(depth, "vision_model.encoder.layers"),
    ]


def _clip_text(depth: int) -> list[Entry]:
    embeddings = "text_model.embeddings"
    return [
        Entry("word_embed/embedding", f"{embeddings}.token_embedding.weight"),
        Entry("position_embed/embedding", f"{embeddings}.position_embedding.weight"),
        *_norm("norm", "text_model.final_layer_norm"),
        Entry("projection/kernel", "text_projection.weight", "dense"),
        *_clip_blocks(depth, "text_model.encoder.layers"),
    ]


def _clip_blocks(depth: int, prefix: str) -> list[Entry]:
    entries = []
    for layer in range(depth):
        ours, theirs = f"blocks_{layer}", f"{prefix}.{layer}"
        attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "proj": "out_proj"}
        for name, their_name in attention.items():
            entries += _linear(f"{ours}/attn/{name}", f"{theirs}.self_attn.{their_name}")
        for number in (1, 2):
            entries += _linear(f"{ours}/mlp/fc{number}", f"{theirs}.mlp.fc{number}")
            entries += _norm(f"{ours}/norm{number}", f"{theirs}.layer_norm{number}")
    return entries


def _open_clip_image(depth: int) -> list[Entry]:
    return [
        Entry("cls_token", "visual.class_embedding", "squeezed"),
        Entry("pos_embed", "visual.positional_embedding", "squeezed"),
        Entry("patch_embed/kernel", "visual.conv1.weight", "conv"),
        *_norm("norm_pre", "visual.ln_pre"),
        *_norm("norm", "visual.ln_post"),
        # The projections of OpenAI's model are plain matrices, [in, out] as ours.
        Entry("projection/kernel", "visual.proj"),
        *_open_clip_blocks(depth, "visual.transformer.resblocks"),
    ]


def _open_clip_text(depth: int) -> list[Entry]:
    return [
        Entry("word_embed/embedding", "token_embedding.weight"),
        Entry("position_embed/embedding", "positional_embedding"),
        *_norm("norm", "ln_final"),
        Entry("projection/kernel", "text_projection"),
        *_open_clip_blocks(depth, "transformer.resblocks"),
    ]


def _open_clip_blocks(depth: int, prefix: str) -> list[Entry]:
    entries = []
    for layer in range(depth):
        ours, theirs = f"blocks_{layer}", f"{prefix}.{layer}"
        # PyTorch's attention keeps query, key and value in one matrix, one after another.
        for part, name in enumerate(("query", "key", "value")):
            path, joint = f"{ours}/attn/{name}", f"{theirs}.attn.in_proj"
            entries += [
                Entry(f"{path}/kernel", f"{joint}_weight", "dense", (part, 3)),
                Entry(f"{path}/bias", f"{joint}_bias", "same", (part, 3)),
            ]
        entries += _linear(f"{ours}/attn/proj", f"{theirs}.attn.out_proj")
        entries += _linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.c_fc")
        entries += _linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.c_proj")
        for number in (1, 2):
            entries += _norm(f"{ours}/norm{number}", f"{theirs}.ln_{number}")
    return entries


LAYOUTS = {
    "timm": _timm,
    "transformers": _transformers,
    "augreg": _augreg,
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "bert": _bert,
    "clip": _clip_image,
    "clip_text": _clip_text,
    "open_clip": _open_clip_image,
    "open_clip_text": _open_clip_text,
}
"""Names of the layouts, and their entries for a number of blocks."""

OURS = "flax"
"""The layout of trees that Orbax saved from models of this package: the paths are the names."""


def entries_of(layout: str, paths: Iterable[str]) -> list[Entry]:
    """List the entries of a layout, or of `OURS`, for a model with leaves of these paths."""
    paths = tuple(paths)
    if layout == OURS:
        return [Entry(path, path) for path in paths]
    return LAYOUTS[layout](depth_of(paths))


def depth_of(paths: Iterable[str]) -> int:
    """Count the blocks of a model from the paths of its leaves."""
    return len({path.split("/")[0] for path in paths if path.startswith("blocks_")})
