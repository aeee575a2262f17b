"""What a Mistral Small 4 file must say and hold: GGUF metadata -> `ms4.Shape`, GGUF tensors -> a list of `ms4.Tensor`.

Every hyperparameter is a row of KEYS, checked for its type, its range and, where a tensor shows it, its shape.  Every
tensor must be one that this model has, with exactly the dimensions that the hyperparameters give it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import ms4
from ms4.quant.blocks import BLOCKS, IDS
from ms4.quant.gguf_file import FileError, GgufFile, Strings, TensorInfo, shown

ARCHITECTURES = ("mistral4", "deepseek2")  # the two names under which converters write this model
ATTN_SCALES = ("plain", "mscale2")


class ModelError(FileError):
    """The file is a GGUF file, but not a model that ms4 runs."""


REQUIRED = object()


class Key(NamedTuple):
    """One hyperparameter: `shows` is the tensor, and its dimension, that must say the same."""

    name: str
    kind: type[Any]
    low: float = 0
    high: float = 1
    default: Any = REQUIRED
    shows: tuple[str, int] | None = None


KEYS = (
    Key("block_count", int, 1, 4096),
    Key("context_length", int, 1, 1 << 24),
    Key("embedding_length", int, 8, 1 << 20, shows=("token_embd", 0)),
    Key("vocab_size", int, 1, 1 << 22, None, ("token_embd", 1)),
    Key("leading_dense_block_count", int, 0, 4096, 0),
    Key("feed_forward_length", int, 1, 1 << 22, None, ("ffn_gate", 1)),
    Key("attention.head_count", int, 1, 4096, shows=("attn_k_b", 2)),
    Key("attention.head_count_kv", int, 1, 4096, 1),
    Key("attention.layer_norm_rms_epsilon", float, 1e-12, 0.1),
    Key("attention.q_lora_rank", int, 1, 1 << 20, shows=("attn_q_a_norm", 0)),
    Key("attention.kv_lora_rank", int, 8, 1 << 16, shows=("attn_kv_a_norm", 0)),
    Key("attention.key_length", int, 1, 1 << 17, None),
    Key("attention.value_length", int, 1, 1 << 17, None),
    Key("attention.key_length_mla", int, 16, 1 << 16, None),
    Key("attention.value_length_mla", int, 8, 1 << 16, None, ("attn_v_b", 1)),
    Key("attention.temperature_scale", float, 0, 10, 0.1),
    Key("attention.temperature_length", int, 1, 1 << 24, None),
    Key("rope.dimension_count", int, 8, 256),
    Key("rope.freq_base", float, 1.001, 1e12),
    Key("rope.scaling.factor", float, 1, 1e6, 1.0),
    Key("rope.scaling.original_context_length", int, 1, 1 << 24, None),
    Key("rope.scaling.yarn_beta_fast", float, 1e-3, 1e6, 32.0),
    Key("rope.scaling.yarn_beta_slow", float, 1e-3, 1e6, 1.0),
    Key("rope.scaling.yarn_log_multiplier", float, 0, 10, 0.1),
    Key("expert_count", int, 1, 4096, shows=("ffn_gate_inp", 1)),
    Key("expert_used_count", int, 1, 64),
    Key("expert_shared_count", int, 0, 256, 1),
    Key("expert_group_count", int, 1, 1, 1),
    Key("expert_group_used_count", int, 1, 1, 1),
    Key("expert_feed_forward_length", int, 1, 1 << 20, shows=("ffn_down_exps", 0)),
    Key("expert_weights_scale", float, 1e-6, 1e6, 1.0),
    Key("expert_weights_norm", bool, default=True),
    Key("expert_gating_func", int, 1, 1, 1),  # softmax; sigmoid would be 2
)
KINDS = {int: "an integer", float: "a number with a fraction", bool: "a bool", str: "a string"}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([a-z_]+)\.(weight|scale|input_scale)")
WHOLE = ("token_embd", "output_norm", "output")
NORMS = ("output_norm", "attn_norm", "attn_q_a_norm", "attn_kv_a_norm", "ffn_norm")


def _kind(value: Any) -> str:
    if isinstance(value, (np.ndarray, Strings)):
        return "an array"
    return KINDS[type(value)]


def architecture(gguf: GgufFile) -> str:
    """Name of the architecture, if it is ours."""
    value = gguf.metadata.get("general.architecture")
    if value is None:
        raise ModelError(gguf.path, "general.architecture is missing: the file does not say what model it holds")
    if type(value) is not str:
        raise ModelError(gguf.path, f"general.architecture has the wrong type: {_kind(value)}; a string was expected")
    if value == "clip":
        raise ModelError(gguf.path, "the architecture is clip: a vision tower (mmproj); give the text model instead")
    if value not in ARCHITECTURES:
        raise ModelError(
            gguf.path, f"the architecture '{shown(value)}' is not supported: ms4 runs only Mistral Small 4 (mistral4)"
        )
    return value


def hyperparameters(gguf: GgufFile) -> dict[str, Any]:
    """All values of KEYS by their name without the architecture; None where an optional one is absent."""
    prefix = architecture(gguf)
    if not gguf.tensors:
        raise ModelError(gguf.path, "the file has no tensors: a vocabulary, not a model")
    shapes = _first_of_each(gguf)
    values: dict[str, Any] = {}
    for key in KEYS:
        name = f"{prefix}.{key.name}"
        value = gguf.metadata.get(name)
        if value is None and key.default is REQUIRED:
            raise ModelError(gguf.path, f"the key {name} is missing")
        if value is not None:
            check_value(gguf, name, key, value)
            _check_against_shape(gguf, name, key, value, shapes)
        values[key.name] = key.default if value is None else value
    _fill_in(gguf, prefix, values, shapes)
    return values


def check_value(gguf: GgufFile, name: str, key: Key, value: Any) -> None:
    if type(value) is not key.kind:
        raise ModelError(gguf.path, f"{name} has the wrong type: {_kind(value)}; {KINDS[key.kind]} was expected")
    if key.kind is not bool and not key.low <= value <= key.high:
        wanted = f"{key.low:g}" if key.low == key.high else f"a finite number from {key.low:g} to {key.high:g}"
        raise ModelError(gguf.path, f"{name} is {value:.12g}; ms4 expects {wanted}")


def _check_against_shape(gguf: GgufFile, name: str, key: Key, value: int, shapes: Mapping[str, TensorInfo]) -> None:
    if key.shows is None or key.shows[0] not in shapes:
        return
    tensor, axis = shapes[key.shows[0]], key.shows[1]
    found = tensor.dims[axis] if axis < len(tensor.dims) else 1
    if found != value:
        raise ModelError(gguf.path, f"{name} is {value}, but dimension {axis} of {tensor.name} is {found}")


def _first_of_each(gguf: GgufFile) -> dict[str, TensorInfo]:
    """The first tensor of each kind, by its name without layer and suffix."""
    found: dict[str, TensorInfo] = {}
    for name, tensor in gguf.tensors.items():
        match = _LAYER_TENSOR.fullmatch(name)
        if match and match[3] == "weight":
            found.setdefault(match[2], tensor)
        elif name.endswith(".weight"):
            found.setdefault(name[: -len(".weight")], tensor)
    return found


def _fill_in(gguf: GgufFile, prefix: str, v: dict[str, Any], shapes: Mapping[str, TensorInfo]) -> None:
    """Checks what several keys say together, and gives the optional ones their values."""

    def refuse_if(wrong: bool, reason: str) -> None:
        if wrong:
            raise ModelError(gguf.path, f"{prefix}.{reason}")

    # Before absorbed MLA, key_length and value_length were those of a head.
    for name in ("key_length", "value_length"):
        if v[f"attention.{name}_mla"] is None:
            v[f"attention.{name}_mla"] = v[f"attention.{name}"]
        refuse_if(v[f"attention.{name}_mla"] is None, f"attention.{name}_mla is missing")
    d_key, d_value = v["attention.key_length_mla"], v["attention.value_length_mla"]
    d_rope, kv_rank = v["rope.dimension_count"], v["attention.kv_lora_rank"]
    refuse_if(d_rope % 8 != 0, f"rope.dimension_count is {d_rope}; a multiple of 8 was expected")
    refuse_if(d_key <= d_rope, f"attention.key_length_mla is {d_key}, but rope.dimension_count alone is {d_rope}")
    for name, d in (("key_length_mla", d_key), ("value_length_mla", d_value), ("kv_lora_rank", kv_rank)):
        refuse_if(d % 8 != 0, f"attention.{name} is {d}; a multiple of 8 was expected")
    for name, absorbed, plain in (("key_length", kv_rank + d_rope, d_key), ("value_length", kv_rank, d_value)):
        value = v[f"attention.{name}"]
        refuse_if(
            value not in (None, absorbed, plain),
            f"attention.{name} is {value}; {absorbed} (latent) or {plain} (head) was expected",
        )
    n_head, n_kv = v["attention.head_count"], v["attention.head_count_kv"]
    refuse_if(n_kv not in (1, n_head), f"attention.head_count_kv is {n_kv}; 1 was expected (or {n_head})")
    n_expert, n_used = v["expert_count"], v["expert_used_count"]
    refuse_if(n_used > n_expert, f"expert_used_count is {n_used}, but expert_count is {n_expert}")
    n_layer, n_dense = v["block_count"], v["leading_dense_block_count"]
    refuse_if(n_dense > n_layer, f"leading_dense_block_count is {n_dense}, but block_count is {n_layer}")
    refuse_if(n_dense > 0 and v["feed_forward_length"] is None, "feed_forward_length is missing")
    found = 1 + max((int(m[1]) for m in map(_LAYER_TENSOR.fullmatch, gguf.tensors) if m), default=-1)
    refuse_if(found != n_layer, f"block_count is {n_layer}, but the file has tensors of {found} layers (blk.N)")
    if v["vocab_size"] is None:
        v["vocab_size"] = _rows(gguf, shapes)
    _fill_in_rope(gguf, prefix, v)


def _rows(gguf: GgufFile, shapes: Mapping[str, TensorInfo]) -> int:
    embedding = shapes.get("token_embd")
    if embedding is None or len(embedding.dims) != 2:
        raise ModelError(gguf.path, "tensor token_embd.weight is missing")
    return embedding.dims[1]


def _fill_in_rope(gguf: GgufFile, prefix: str, v: dict[str, Any]) -> None:
    scaling = gguf.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if type(scaling) is not str:
        raise ModelError(gguf.path, f"{prefix}.rope.scaling.type has the wrong type; a string was expected")
    if scaling not in ("yarn", "none"):
        raise ModelError(gguf.path, f"{prefix}.rope.scaling.type is '{shown(scaling)}'; yarn was expected")
    if scaling == "none":
        v["rope.scaling.factor"] = 1.0
    original = v["rope.scaling.original_context_length"]
    if original is None:
        if scaling == "yarn":
            raise ModelError(gguf.path, f"the key {prefix}.rope.scaling.original_context_length is missing")
        v["rope.scaling.original_context_length"] = original = v["context_length"]
    # Converters of the Hugging Face checkpoint drop the query temperature; the model has it all the same.
    if v["attention.temperature_length"] is None:
        v["attention.temperature_length"] = original


def rope_frequencies(
    d_rope: int, base: float, factor: float, original: int, beta_fast: float, beta_slow: float
) -> tuple[float, ...]:
    """Inverse frequencies of the d_rope / 2 pairs: YaRN keeps the fast ones and divides the slow ones by factor."""

    def pair_that_turns(times: float) -> float:
        return d_rope * math.log(original / (2 * math.pi * times)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), d_rope - 1)
    width = high - low if high > low else 0.001
    i = np.arange(d_rope // 2, dtype=np.float64)
    plain = base ** (-2 * i / d_rope)
    ramp = np.clip((i - low) / width, 0, 1)
    return tuple((plain * (1 - ramp) + plain / factor * ramp).tolist())


def shape_of(gguf: GgufFile, attn_scale: str = "plain") -> ms4.Shape:
    """The hyperparameters as the engine takes them.  attn_scale: see SPEC 1.3; one of ATTN_SCALES."""
    if attn_scale not in ATTN_SCALES:
        raise ValueError(f"attn_scale is {attn_scale!r}; plain or mscale2 was expected")
    v = hyperparameters(gguf)
    d_key, d_rope, factor = v["attention.key_length_mla"], v["rope.dimension_count"], v["rope.scaling.factor"]
    scale = 1 / math.sqrt(d_key)
    if attn_scale == "mscale2":
        scale *= (1 + v["rope.scaling.yarn_log_multiplier"] * math.log(factor)) ** 2
    original = v["rope.scaling.original_context_length"]
    betas = v["rope.scaling.yarn_beta_fast"], v["rope.scaling.yarn_beta_slow"]
    return ms4.Shape(
        n_layer=v["block_count"],
        n_dense_layer=v["leading_dense_block_count"],
        n_vocab=v["vocab_size"],
        n_ctx_train=v["context_length"],
        d_model=v["embedding_length"],
        d_dense=v["feed_forward_length"] if v["leading_dense_block_count"] else 0,
        d_expert=v["expert_feed_forward_length"],
        d_shared=v["expert_shared_count"] * v["expert_feed_forward_length"],
        n_head=v["attention.head_count"],
        d_nope=d_key - d_rope,
        d_rope=d_rope,
        d_value=v["attention.value_length_mla"],
        q_rank=v["attention.q_lora_rank"],
        kv_rank=v["attention.kv_lora_rank"],
        n_expert=v["expert_count"],
        n_expert_used=v["expert_used_count"],
        norm_eps=v["attention.layer_norm_rms_epsilon"],
        router_scale=v["expert_weights_scale"],
        router_norm=v["expert_weights_norm"],
        attn_scale=scale,
        temp_beta=v["attention.temperature_scale"],
        temp_length=v["attention.temperature_length"],
        rope_freq=rope_frequencies(d_rope, v["rope.freq_base"], factor, original, *betas),
    )


def expected_dims(s: ms4.Shape) -> dict[str, tuple[int, int, int]]:
    """Dimensions of every tensor this model may have, by name without layer and suffix (SPEC 4.4)."""
    d, heads = s.d_model, s.n_head
    dims = {
        "token_embd": (d, s.n_vocab, 1),
        "output_norm": (d, 1, 1),
        "output": (d, s.n_vocab, 1),
        "attn_norm": (d, 1, 1),
        "attn_q_a": (d, s.q_rank, 1),
        "attn_q_a_norm": (s.q_rank, 1, 1),
        "attn_q_b": (s.q_rank, heads * (s.d_nope + s.d_rope), 1),
        "attn_kv_a_mqa": (d, s.kv_rank + s.d_rope, 1),
        "attn_kv_a_norm": (s.kv_rank, 1, 1),
        "attn_k_b": (s.d_nope, s.kv_rank, heads),
        "attn_v_b": (s.kv_rank, s.d_value, heads),
        "attn_kv_b": (s.kv_rank, heads * (s.d_nope + s.d_value), 1),
        "attn_output": (heads * s.d_value, d, 1),
        "ffn_norm": (d, 1, 1),
    }
    for suffix, width, n in (("", s.d_dense, 1), ("_exps", s.d_expert, s.n_expert), ("_shexp", s.d_shared, 1)):
        dims[f"ffn_gate{suffix}"] = dims[f"ffn_up{suffix}"] = (d, width, n)
        dims[f"ffn_down{suffix}"] = (width, d, n)
    dims["ffn_gate_inp"] = (d, s.n_expert, 1)
    dims["ffn_gate_up_exps"] = (d, 2 * s.d_expert, s.n_expert)
    return dims


def _wanted(s: ms4.Shape, layer: int, present: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the tensors that layer must have; of two ways to store a thing, the one that is present."""
    names = ["attn_norm", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_output"]
    names += ["attn_kv_b"] if f"blk.{layer}.attn_kv_b.weight" in present else ["attn_k_b", "attn_v_b"]
    names += ["ffn_norm"]
    if layer < s.n_dense_layer:
        return [*names, "ffn_gate", "ffn_up", "ffn_down"]
    fused = f"blk.{layer}.ffn_gate_up_exps.weight" in present
    names += ["ffn_gate_inp", "ffn_down_exps"]
    names += ["ffn_gate_up_exps"] if fused else ["ffn_gate_exps", "ffn_up_exps"]
    return names + (["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"] if s.d_shared else [])


def tensors_of(gguf: GgufFile, shape: ms4.Shape, *, is_here: bool = True) -> list[ms4.Tensor]:
    """The engine's table of tensors.  ModelError for one that is missing, unknown, or of other dimensions.

    is_here: the file itself, not its header alone: the scales of NVFP4 are read.
    """
    table: list[ms4.Tensor] = []
    used: set[str] = set()
    dims = expected_dims(shape)

    def add(role: str, layer: int, base: str, stored_as: str) -> None:
        name = f"{base}.weight"
        if name not in gguf.tensors:
            raise ModelError(gguf.path, f"tensor {name} is missing")
        tensor = gguf.tensors[name]
        _check_tensor(gguf, tensor, stored_as, dims[stored_as])
        scales = _scales(gguf, tensor, base, dims[stored_as][2]) if is_here else None
        used.update((name, f"{base}.scale", f"{base}.input_scale") if tensor.type == IDS["NVFP4"] else (name,))
        place = tensor.file, tensor.offset, tensor.bytes
        table.append(ms4.Tensor(role, layer, tensor.type, *place, dims[stored_as], scales))

    tied = "output.weight" not in gguf.tensors
    for name in WHOLE:
        add(name, -1, "token_embd" if tied and name == "output" else name, name)
    for layer in range(shape.n_layer):
        for name in _wanted(shape, layer, gguf.tensors):
            add(name, layer, f"blk.{layer}.{name}", name)
    for name in gguf.tensors:
        if name not in used:
            raise ModelError(gguf.path, f"unexpected tensor {name}: this model has no such tensor")
    return table


def _check_tensor(gguf: GgufFile, tensor: TensorInfo, name: str, wanted: tuple[int, int, int]) -> None:
    found = (*tensor.dims, 1, 1)
    if found[:3] != wanted or any(d != 1 for d in found[3:]):
        shapes = (
            " x ".join(map(str, tensor.dims)),
            " x ".join(map(str, wanted)).removesuffix(" x 1").removesuffix(" x 1"),
        )
        raise ModelError(gguf.path, f"tensor {tensor.name} has the shape {shapes[0]}; the metadata says {shapes[1]}")
    if name in NORMS and BLOCKS[tensor.type].weights != 1:
        kind = BLOCKS[tensor.type].name
        raise ModelError(gguf.path, f"tensor {tensor.name} has the type {kind}; F32, F16 or BF16 was expected")


def _scales(gguf: GgufFile, tensor: TensorInfo, base: str, n: int) -> np.ndarray | None:
    """NVFP4 keeps a float for each expert, or one for all, in a tensor of its own."""
    stored = gguf.tensors.get(f"{base}.scale")
    if stored is None or tensor.type != IDS["NVFP4"]:
        return None
    if stored.type != IDS["F32"] or stored.dims not in ((1,), (n,)):
        raise ModelError(gguf.path, f"tensor {stored.name} does not have the shape of 1 or {n} F32 scales")
    with open(gguf.paths[stored.file], "rb", buffering=0) as file:
        values = np.frombuffer(os.pread(file.fileno(), stored.bytes, stored.offset), "<f4")
    if len(values) != stored.dims[0] or not np.isfinite(values).all():
        raise ModelError(gguf.path, f"tensor {stored.name} holds scales that are not finite")
    return np.ascontiguousarray(np.broadcast_to(values, n))


def macs_per_token(s: ms4.Shape, skipped: float = 0) -> float:
    """Multiply-adds with weights for one token; scores and the output matrix are not among them.

    skipped: the share of tokens whose logits nobody wants; in the last layer they only leave their latents.
    """
    attention = s.d_model * (s.q_rank + s.kv_rank + s.d_rope)
    attention += s.q_rank * s.n_head * (s.d_nope + s.d_rope)
    attention += s.n_head * (s.kv_rank * (s.d_nope + s.d_value) + s.d_value * s.d_model)
    moe = s.d_model * (s.n_expert + 3 * s.n_expert_used * s.d_expert + 3 * s.d_shared)
    dense = 3 * s.d_model * s.d_dense
    last = attention + (dense if s.n_dense_layer == s.n_layer else moe) - s.d_model * (s.kv_rank + s.d_rope)
    return s.n_layer * attention + s.n_dense_layer * dense + (s.n_layer - s.n_dense_layer) * moe - skipped * last


def kv_bytes(s: ms4.Shape, n_tokens: int) -> int:
    """Bytes of the kv cache for so many tokens: latents and rope keys, of 16-bit numbers, and three floats."""
    return (2 * (s.kv_rank + s.d_rope) + 12) * s.n_layer * n_tokens
