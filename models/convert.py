"""Turns a checkpoint in Hugging Face layout into GGUF files: the text model, and its vision tower (mmproj).

Tensors go from file to file one by one, and a large one in slices.  A file appears under its name only when it is
whole, and when ms4 itself opens it.  Keys and types are those of llama.cpp's converter and quantizer, with three keys
more: the temperature of the queries, its length, and the router's softmax, which that converter leaves out.  The
tower's file has the embedding of [IMG_BREAK] too, which that converter writes for some checkpoints and llama.cpp asks
for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from ms4.models import atomic, mistral4
from ms4.models.hf_folder import CONTROL, NORMAL, ConvertError, Folder, Settings, read_vocabulary
from ms4.models.image import PixelRule
from ms4.models.pixtral import Tower
from ms4.models.vocabulary import Vocabulary
from ms4.quant.blocks import BLOCKS, IDS, SMALLER, Floats
from ms4.quant.gguf_file import GgufFile
from ms4.quant.quantize import quantize
from ms4.quant.safetensors_file import Stored
from ms4.quant.spelling import spell

SLICE = 1 << 24  # weights turned into float32 at a time
TOWER_EPS = 1e-5


class Preset(NamedTuple):
    """The types of one kind of file.  `down` and its two neighbours are for the down projections of the experts."""

    file_type: int
    base: str
    output: str = ""  # "": as base
    attn_output: str = ""
    down: str = ""
    more: str = ""  # instead of `down` in the layers that `layers` says
    layers: Callable[[int, int], bool] = lambda layer, n_layer: False


def sensitive(layer: int, n_layer: int) -> bool:
    """The first and the last eighth of the layers, and of those between every third."""
    eighth = n_layer // 8
    return layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2


PRESETS = {
    "F32": Preset(0, "F32"),
    "F16": Preset(1, "F16"),
    "BF16": Preset(32, "BF16"),
    "Q8_0": Preset(7, "Q8_0"),
    "Q6_K": Preset(18, "Q6_K"),
    "Q5_K_M": Preset(17, "Q5_K", "Q6_K", more="Q6_K", layers=sensitive),
    "Q4_K_M": Preset(15, "Q4_K", "Q6_K", more="Q6_K", layers=sensitive),
    "Q4_0": Preset(2, "Q4_0", "Q6_K"),
    "Q3_K_M": Preset(12, "Q3_K", "Q6_K", "Q4_K", "Q4_K", "Q5_K", lambda layer, n_layer: layer < n_layer // 16),
    "Q2_K": Preset(10, "Q2_K", "Q6_K", "Q3_K", "Q3_K"),
}


def type_of(preset: Preset, name: str, dims: tuple[int, ...], layer: int, n_layer: int) -> str:
    """The type of one tensor, by its GGUF name without layer and ".weight", and its dimensions as GGUF has them."""
    if len(dims) == 1 or name == "ffn_gate_inp":
        return "F32"
    kind = preset.base
    if name == "output":
        kind = preset.output or kind
    elif name == "attn_output":
        kind = preset.attn_output or kind
    elif name in ("ffn_down_exps", "ffn_down_shexp"):
        kind = preset.more if preset.layers(layer, n_layer) else preset.down or kind
    if dims[0] % BLOCKS[IDS[kind]].weights:
        kind = SMALLER.get(kind, kind)
    return kind if dims[0] % BLOCKS[IDS[kind]].weights == 0 else "F16"


class Item(NamedTuple):
    """One tensor to be written."""

    name: str
    kind: str
    source: Stored


@dataclass(frozen=True)
class Plan:
    """A file to be written: its keys are in the writer already."""

    writer: gguf.GGUFWriter
    items: list[Item]

    def write(self, path: str, check: Callable[[str], object], progress: Callable[[str, int, int], None]) -> None:
        """Writes the file beside `path`, has it checked, and gives it its name.  A link stays one."""
        path = os.path.realpath(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConvertError(path, "not a regular file, so no model can take its place")
        for name, kind, source in self.items:
            n_bytes = source.array.size // BLOCKS[IDS[kind]].weights * BLOCKS[IDS[kind]].bytes
            shape = (*source.shape[:-1], n_bytes * source.shape[-1] // source.array.size)
            self.writer.add_tensor_info(name, shape, np.dtype(np.uint8), n_bytes, gguf.GGMLQuantizationType(IDS[kind]))
        self.writer.add_size_label(gguf.size_label(*self.writer.get_total_parameter_count()[:4]))
        with atomic.renamed(path, f"{path}.part") as partial, closing(self.writer):
            self.writer.open_output_file(Path(partial))
            self.writer.write_header_to_file()
            self.writer.write_kv_data_to_file()
            self.writer.write_ti_data_to_file()
            for number, item in enumerate(self.items):
                progress(item.name, number, len(self.items))
                self.writer.write_tensor_data(encode(item, path))
            self.writer.close()
            check(partial)


def encode(item: Item, path: str) -> np.ndarray:
    """The blocks of one tensor."""
    try:
        return np.concatenate([quantize(part, item.kind) for part in slices(item.source)])
    except ValueError as error:
        raise ConvertError(path, f"tensor {item.name}: {error}") from error


def slices(source: Stored) -> Iterator[Floats]:
    """The values in order, some rows (or some experts) at a time."""
    n = source.shape[0]
    step = max(1, SLICE * n // source.array.size)
    for i in range(0, n, step):
        yield source.floats(slice(i, i + step))


# --- the text model --------------------------------------------------------------------------


def text_plan(folder: Folder, preset: Preset, name: str) -> Plan:
    text = folder.config.section("text_config")
    text.must_be("model_type", "mistral4")
    items = list(text_items(folder, text, preset))
    writer = gguf.GGUFWriter(None, "mistral4")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(preset.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_text_keys(writer, text)
    add_rope_keys(writer, text)
    add_vocabulary(writer, folder, text.number("vocab_size"))
    return Plan(writer, items)


def add_text_keys(w: gguf.GGUFWriter, text: Settings) -> None:
    """The hyperparameters; settings of which there is only one that ms4 runs are checked."""
    text.must_be("hidden_act", "silu")
    text.must_be("attention_bias", False)
    text.must_be("tie_word_embeddings", False)
    text.must_be("first_k_dense_replace", 0)
    text.must_be("n_group", 1)
    text.must_be("topk_group", 1)
    rank, rope = text.number("kv_lora_rank"), text.number("qk_rope_head_dim")
    w.add_block_count(text.number("num_hidden_layers"))
    w.add_context_length(text.number("max_position_embeddings"))
    w.add_embedding_length(text.number("hidden_size"))
    w.add_feed_forward_length(text.number("intermediate_size"))
    w.add_vocab_size(text.number("vocab_size"))
    w.add_head_count(text.number("num_attention_heads"))
    w.add_head_count_kv(1)  # keys and values are the one latent that all heads share
    w.add_layer_norm_rms_eps(text.number("rms_norm_eps", 0, whole=False))
    w.add_q_lora_rank(text.number("q_lora_rank"))
    w.add_kv_lora_rank(rank)
    w.add_key_length(rank + rope)
    w.add_value_length(rank)
    w.add_key_length_mla(text.number("qk_nope_head_dim") + rope)
    w.add_value_length_mla(text.number("v_head_dim"))
    w.add_leading_dense_block_count(0)
    w.add_expert_count(text.number("n_routed_experts"))
    w.add_expert_used_count(text.number("num_experts_per_tok"))
    w.add_expert_shared_count(text.number("n_shared_experts"))
    w.add_expert_group_count(1)
    w.add_expert_group_used_count(1)
    w.add_expert_feed_forward_length(text.number("moe_intermediate_size"))
    w.add_expert_weights_scale(text.number("routed_scaling_factor", 0, whole=False))
    w.add_expert_weights_norm(text.must_be("norm_topk_prob", True, False))
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def add_rope_keys(w: gguf.GGUFWriter, text: Settings) -> None:
    """Rope, YaRN and the temperature of the queries."""
    text.must_be("rope_interleave", True)
    rope = text.section("rope_parameters")
    original = rope.number("original_max_position_embeddings")
    rope.must_be("rope_type", "yarn")
    w.add_rope_dimension_count(text.number("qk_rope_head_dim"))
    w.add_rope_freq_base(rope.number("rope_theta", 1, whole=False))
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(rope.number("factor", 1, whole=False))
    w.add_rope_scaling_orig_ctx_len(original)
    w.add_float32("mistral4.rope.scaling.yarn_beta_fast", rope.number("beta_fast", 0, whole=False, default=32))
    w.add_float32("mistral4.rope.scaling.yarn_beta_slow", rope.number("beta_slow", 0, whole=False, default=1))
    multiplier = 0.1 * rope.number("mscale_all_dim", 0, whole=False, default=0)
    w.add_float32("mistral4.rope.scaling.yarn_log_multiplier", multiplier)
    beta = rope.number("llama_4_scaling_beta", 0, whole=False)
    w.add_float32("mistral4.attention.temperature_scale", beta)
    w.add_uint32("mistral4.attention.temperature_length", original)


def add_vocabulary(w: gguf.GGUFWriter, folder: Folder, n_vocab: int) -> None:
    vocabulary = read_vocabulary(folder, n_vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("tekken")
    w.add_token_list([*vocabulary.control, *map(spell, vocabulary.ordinary)])
    w.add_token_scores([0] * n_vocab)
    w.add_token_types([CONTROL] * len(vocabulary.control) + [NORMAL] * len(vocabulary.ordinary))
    w.add_token_merges([f"{spell(left)} {spell(right)}" for left, right in vocabulary.merges()])
    special = {"<s>": w.add_bos_token_id, "</s>": w.add_eos_token_id}
    special |= {"<unk>": w.add_unk_token_id, "<pad>": w.add_pad_token_id}
    for name, add in special.items():
        id = vocabulary.id(name)
        if id is None:
            raise ConvertError(folder.path / "tekken.json", f"the special token {name} is missing")
        add(id)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    template = folder.path / "chat_template.jinja"
    if template.exists():
        w.add_chat_template(template.read_text(encoding="utf-8"))


def text_items(folder: Folder, text: Settings, preset: Preset) -> Iterator[Item]:
    """Every tensor of the text model in the order of the file."""
    n_layer, d, n_vocab = (text.number(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    used: set[str] = set()

    def item(name: str, source: str, *shape: int, layer: int = -1, part: Callable[..., Any] | None = None) -> Item:
        used.add(source)
        stored = folder.tensor(source, *shape)
        if part is not None:
            stored = Stored(stored.dtype, part(stored.array))
        kind = type_of(preset, name, stored.shape[::-1], layer, n_layer)
        return Item(f"blk.{layer}.{name}.weight" if layer >= 0 else f"{name}.weight", kind, stored)

    yield item("token_embd", "embed_tokens.weight", n_vocab, d)
    yield item("output", "lm_head.weight", n_vocab, d)
    for layer in range(n_layer):
        for name, source, shape, part in layer_tensors(text):
            yield item(name, f"layers.{layer}.{source}", *shape, layer=layer, part=part)
    yield item("output_norm", "norm.weight", d)
    folder.check_all_used(used, tower=False)


Row = tuple[str, str, tuple[int, ...], Callable[[np.ndarray], np.ndarray] | None]


def layer_tensors(text: Settings) -> Iterator[Row]:
    """(GGUF name, name in the layer, shape there, which part of it) for each tensor of a layer."""
    d, heads = text.number("hidden_size"), text.number("num_attention_heads")
    q_rank, rank = text.number("q_lora_rank"), text.number("kv_lora_rank")
    nope, rope, value = (text.number(f"{key}_head_dim") for key in ("qk_nope", "qk_rope", "v"))
    n_expert, width = text.number("n_routed_experts"), text.number("moe_intermediate_size")
    shared = text.number("n_shared_experts") * width

    def keys(w: np.ndarray) -> np.ndarray:
        return w.reshape(heads, nope + value, rank)[:, :nope].swapaxes(1, 2)

    def values(w: np.ndarray) -> np.ndarray:
        return w.reshape(heads, nope + value, rank)[:, nope:]

    joined = (heads * (nope + value), rank)
    yield "attn_norm", "input_layernorm.weight", (d,), None
    yield "attn_q_a", "self_attn.q_a_proj.weight", (q_rank, d), None
    yield "attn_q_a_norm", "self_attn.q_a_layernorm.weight", (q_rank,), None
    yield "attn_q_b", "self_attn.q_b_proj.weight", (heads * (nope + rope), q_rank), None
    yield "attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, d), None
    yield "attn_kv_a_norm", "self_attn.kv_a_layernorm.weight", (rank,), None
    yield "attn_k_b", "self_attn.kv_b_proj.weight", joined, keys
    yield "attn_v_b", "self_attn.kv_b_proj.weight", joined, values
    yield "attn_output", "self_attn.o_proj.weight", (d, heads * value), None
    yield "ffn_norm", "post_attention_layernorm.weight", (d,), None
    yield "ffn_gate_inp", "mlp.gate.weight", (n_expert, d), None
    yield "ffn_gate_up_exps", "mlp.experts.gate_up_proj", (n_expert, 2 * width, d), None
    yield "ffn_down_exps", "mlp.experts.down_proj", (n_expert, d, width), None
    for name, shape in (("gate", (shared, d)), ("up", (shared, d)), ("down", (d, shared))):
        yield f"ffn_{name}_shexp", f"mlp.shared_experts.{name}_proj.weight", shape, None


# --- the vision tower ------------------------------------------------------------------------


def tower_plan(folder: Folder, name: str) -> Plan:
    """The mmproj file: matrices in F16."""
    config, vision = folder.config, folder.config.section("vision_config")
    vision.must_be("model_type", "pixtral")
    vision.must_be("num_channels", 3)
    config.must_be("multimodal_projector_bias", False)
    config.must_be("projector_hidden_act", "gelu")
    config.must_be("vision_feature_layer", -1)
    silu = vision.must_be("hidden_act", "silu", "gelu") == "silu"
    items = list(tower_items(folder, vision))
    w = gguf.GGUFWriter(None, "clip")
    w.add_type("mmproj")
    w.add_name(name)
    w.add_file_type(PRESETS["F16"].file_type)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.use_silu" if silu else "clip.use_gelu", True)
    w.add_string("clip.projector_type", "pixtral")
    numbers = {
        "image_size": vision.number("image_size"),
        "patch_size": vision.number("patch_size"),
        "spatial_merge_size": config.number("spatial_merge_size"),
        "embedding_length": vision.number("hidden_size"),
        "feed_forward_length": vision.number("intermediate_size"),
        "block_count": vision.number("num_hidden_layers"),
        "projection_dim": config.section("text_config").number("hidden_size"),
        "attention.head_count": vision.number("num_attention_heads"),
    }
    for key, value in numbers.items():
        w.add_uint32(f"clip.vision.{key}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", TOWER_EPS)
    for key, values in zip(("image_mean", "image_std"), pixel_rule(folder), strict=True):
        w.add_array(f"clip.vision.{key}", values)
    return Plan(w, items)


def pixel_rule(folder: Folder) -> tuple[list[float], list[float]]:
    """Mean and deviation of the three colours: those of preprocessor_config.json, or the family's."""
    found = folder.read_json("preprocessor_config.json")
    values = found.get("image_mean", list(PixelRule.mean)), found.get("image_std", list(PixelRule.std))
    for triple in values:
        if not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(x, float) and x > 0 for x in triple):
            raise ConvertError(folder.path / "preprocessor_config.json", "image_mean and image_std must be 3 numbers")
    return values


def tower_items(folder: Folder, vision: Settings) -> Iterator[Item]:
    """Every tensor of the tower and the projector."""
    d, f, heads = (vision.number(key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    side, merge = vision.number("patch_size"), folder.config.number("spatial_merge_size")
    d_out = folder.config.section("text_config").number("hidden_size")
    if d % (2 * heads) or vision.number("head_dim", default=d // heads) * heads != d:
        raise vision.refuse("head_dim", f"must be hidden_size / num_attention_heads, and even; that is {d} / {heads}")
    used: set[str] = set()

    def item(name: str, source: str, *shape: int, permute: bool = False) -> Item:
        used.add(source)
        stored = folder.tensor(source, *shape)
        if permute:
            stored = Stored(stored.dtype, adjacent_pairs(stored.array, heads))
        return Item(f"{name}.weight", "F32" if len(shape) == 1 else "F16", stored)

    yield item("v.patch_embd", "vision_tower.patch_conv.weight", d, 3, side, side)
    yield item("v.pre_ln", "vision_tower.ln_pre.weight", d)
    for layer in range(vision.number("num_hidden_layers")):
        to, source = f"v.blk.{layer}.", f"vision_tower.transformer.layers.{layer}."
        yield item(f"{to}ln1", f"{source}attention_norm.weight", d)
        for name in ("q", "k", "v"):
            yield item(f"{to}attn_{name}", f"{source}attention.{name}_proj.weight", d, d, permute=name != "v")
        yield item(f"{to}attn_out", f"{source}attention.o_proj.weight", d, d)
        yield item(f"{to}ln2", f"{source}ffn_norm.weight", d)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            yield item(f"{to}ffn_{name}", f"{source}feed_forward.{name}_proj.weight", *shape)
    yield item("mm.input_norm", "multi_modal_projector.norm.weight", d)
    yield item("mm.patch_merger", "multi_modal_projector.patch_merger.merging_layer.weight", d, d * merge**2)
    yield item("mm.1", "multi_modal_projector.linear_1.weight", d_out, d)
    yield item("mm.2", "multi_modal_projector.linear_2.weight", d_out, d_out)
    folder.check_all_used(used, tower=True)
    # Engines that write the end of an image row themselves need its embedding, which is the text model's.
    n_vocab = folder.config.section("text_config").number("vocab_size")
    row = read_vocabulary(folder, n_vocab).id("[IMG_BREAK]")
    if row is not None:
        table = folder.tensor("embed_tokens.weight", n_vocab, d_out)
        yield Item("v.token_embd.img_break", "F32", Stored(table.dtype, table.array[row]))


def adjacent_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head reordered: rope turns rows j and j + half together there, and 2j and 2j + 1 here."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


# --- the whole -------------------------------------------------------------------------------


def check_text(path: str) -> None:
    """Opens a file as a model is opened."""
    file = GgufFile.open(path)
    mistral4.tensors_of(file, mistral4.shape_of(file))
    Vocabulary.from_gguf(file).require_text()


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    preset: str = "Q4_K_M",
    *,
    mmproj: str | os.PathLike[str] | None = None,
    name: str = "",
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> None:
    """Writes the text model to `out` and the vision tower to `mmproj`, those of the two that are given.

    FileError: the folder, or what came out of it, cannot be used; OSError: a file could not be read or written.
    """
    folder = Folder.open(source)
    name = name or folder.path.resolve().name
    text = text_plan(folder, PRESETS[preset], name) if out is not None else None
    tower = tower_plan(folder, name) if mmproj is not None else None
    if text and out is not None:
        text.write(os.fspath(out), check_text, progress)
    if tower and mmproj is not None:
        tower.write(os.fspath(mmproj), Tower.read, progress)
