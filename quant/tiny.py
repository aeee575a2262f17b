"""Writes small random checkpoints of the Mistral Small 4 architecture: models for the tests.

The weights are noise, and so is the text they give; shapes, keys, names and blocks are those of real files, in every
way that converters write them.  Sizes are odd on purpose: 3 heads, rows that end inside a superblock.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import gguf
import numpy as np

from ms4.quant.blocks import BLOCKS, IDS, SMALLER, dequantize
from ms4.quant.spelling import spell

CONTROL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] "
    + " ".join(f"<SPECIAL_{i}>" for i in range(20, 32))
    + " [ARGS] [CALL_ID] [THINK] [/THINK] [MODEL_SETTINGS] [/MODEL_SETTINGS]"
).split()
N_CONTROL = 1000

# What the ordinary tokens of the small vocabulary are learned from.
TEXT = b"""
Once there was a small model that lived in one file. Every morning it read the words that people wrote to it, and every
evening it wrote words back. "How do you know what comes next?" asked the child. "I do not know," said the model, "but I
have read a great many books, and I can tell which word is more likely than another." The child thought about this for a
while, and then said that this was not a bad way to tell a story. So they told one together: first a word, then the next
one, then another, until the night came and there was nothing more to say.
There are 24 hours in a day, 60 minutes in an hour, and 7 days in a week; the year 2026 has 365 days.
def main():
    for i in range(10):
        print(f"line {i}: {values[i]:.2f}")
    return None
"""

# Where the f16 scale (and min) of a block lies.  IQ1_M, MXFP4 and NVFP4 keep theirs in other forms.
SCALE_AT = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


@dataclass(frozen=True)
class Tiny:
    """What to write.

    `types` maps "embedding", "output", "attention", "router", "experts", "shared", or a tensor's own name without its
    layer ("attn_q_a"), which comes first, to a type name.
    """

    architecture: str = "mistral4"
    n_layer: int = 2
    n_dense: int = 0
    n_expert: int = 6
    n_used: int = 3
    n_shared: int = 1
    d_model: int = 160
    d_expert: int = 96
    d_dense: int = 224
    n_head: int = 3
    d_nope: int = 32
    d_rope: int = 16
    d_value: int = 32
    q_rank: int = 96
    kv_rank: int = 64
    n_context: int = 2048
    n_original: int = 64
    factor: float = 16.0
    fused: bool = True  # ffn_gate_up_exps instead of gate and up
    joined_kv_b: bool = False  # attn_kv_b instead of k_b and v_b
    tied: bool = False  # no output.weight
    temperature_keys: bool = False
    default_type: str = "Q8_0"
    types: Mapping[str, str] = field(default_factory=dict)
    nvfp4_scales: bool = True
    router_norm: bool = True  # the weights of the chosen experts add up to one
    router_scale: float = 1.0
    n_vocab: int = 1400
    n_unused: int = 0  # of them, which only fill up the vocabulary
    parts: int = 1
    seed: int = 0


def random_blocks(rng: np.random.Generator, kind: str, n: int, std: float) -> np.ndarray:
    """n weights of random bits with about the given deviation and no mean, as blocks of bytes."""
    id = IDS[kind]
    _, weights, n_bytes = BLOCKS[id]
    if weights == 1:
        values = (rng.standard_normal(n) * std).astype(np.float32)
        if kind == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype({"F32": np.float32, "F16": np.float16}[kind]).view(np.uint8)
    raw = rng.integers(0, 256, (n // weights, n_bytes), np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = 127 + round(np.log2(std)) - 2 + rng.integers(0, 2, len(raw))
    elif kind == "NVFP4":
        raw[:, :4] = rng.integers(0x28, 0x40, (len(raw), 4))  # scales around one; the tensor's own scale does the rest
    else:
        spread = rng.uniform(0.6, 1.4, len(raw))
        for at, scale in zip(SCALE_AT.get(kind, (0,)), _unit_scales(raw[:256].copy(), kind), strict=False):
            _put_scale(raw, kind, at, scale * std * spread)
    return raw.reshape(-1)


def _unit_scales(sample: np.ndarray, kind: str) -> tuple[float, ...]:
    """The scale (and min) by which random bits have a deviation of one and no mean."""

    def weights_with(*scales: float) -> np.ndarray:
        for at, scale in zip(SCALE_AT.get(kind, (0,)), scales, strict=True):
            _put_scale(sample, kind, at, np.full(len(sample), scale))
        return dequantize(sample, kind, len(sample) * BLOCKS[IDS[kind]].weights).astype(np.float64)

    if len(SCALE_AT.get(kind, (0,))) == 1:
        return (1 / float(weights_with(1.0).std()),)
    only_scale, only_min = weights_with(1.0, 0.0), weights_with(0.0, 1.0)
    balance = -float(only_scale.mean() / only_min.mean())
    deviation = float((only_scale + balance * only_min).std())
    return 1 / deviation, balance / deviation


def _put_scale(raw: np.ndarray, kind: str, at: int, scale: np.ndarray) -> None:
    bits = scale.astype("<f2").view("<u2")
    if kind == "IQ1_M":  # four bits of the scale on top of each of the last four words
        for i in range(4):
            raw[:, 49 + 2 * i] = (raw[:, 49 + 2 * i] & 0x0F) | (bits >> 4 * i << 4 & 0xF0).astype(np.uint8)
    else:
        raw[:, at : at + 2] = bits.reshape(-1, 1).view(np.uint8)


@cache
def learn_tokens(n: int, text: bytes) -> tuple[bytes, ...]:
    """The 256 bytes and n - 256 tokens of byte-pair encoding learned from `text`."""
    tokens = [bytes([b]) for b in range(256)]
    words = [[bytes([b]) for b in word] for word in text.replace(b" ", b"\n ").split(b"\n") if word]
    while len(tokens) < n:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        known = set(tokens)
        fresh = [pair for pair in pairs if pair[0] + pair[1] not in known]
        if not fresh:
            raise ValueError(f"the text has no more than {len(tokens)} tokens; {n} were asked for")
        left, right = best = max(fresh, key=lambda pair: (pairs[pair], pair))
        tokens.append(left + right)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [left + right]
    return tuple(tokens)


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int, n_unused: int) -> None:
    ordinary = learn_tokens(n_vocab - n_unused - N_CONTROL, TEXT)
    unused = [f"[PAD{i}]" for i in range(n_vocab - n_unused, n_vocab)]
    control = [*CONTROL, *(f"<SPECIAL_{i}>" for i in range(len(CONTROL), N_CONTROL))]
    known = set(ordinary)
    splits = [(t[:i], t[i:]) for t in ordinary for i in range(1, len(t)) if t[:i] in known and t[i:] in known]

    add_vocabulary(
        writer,
        [*control, *map(spell, ordinary), *unused],
        [3] * len(control) + [1] * len(ordinary) + [5] * len(unused),
        [f"{spell(a)} {spell(b)}" for a, b in splits],
    )


def add_vocabulary(
    writer: gguf.GGUFWriter,
    tokens: Sequence[str] | Sequence[bytes],
    types: Sequence[int],
    merges: Sequence[str] | Sequence[bytes],
) -> None:
    """The tokenizer keys as converters write them."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(11)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}")


def _add_keys(w: gguf.GGUFWriter, t: Tiny) -> None:
    w.add_type("model")
    w.add_name("ms4 tiny")
    w.add_block_count(t.n_layer)
    w.add_context_length(t.n_context)
    w.add_embedding_length(t.d_model)
    w.add_feed_forward_length(t.d_dense)
    w.add_vocab_size(t.n_vocab)
    w.add_head_count(t.n_head)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_q_lora_rank(t.q_rank)
    w.add_kv_lora_rank(t.kv_rank)
    w.add_key_length(t.kv_rank + t.d_rope)
    w.add_value_length(t.kv_rank)
    w.add_key_length_mla(t.d_nope + t.d_rope)
    w.add_value_length_mla(t.d_value)
    w.add_rope_dimension_count(t.d_rope)
    w.add_rope_freq_base(10000.0)
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(t.factor)
    w.add_rope_scaling_orig_ctx_len(t.n_original)
    w.add_leading_dense_block_count(t.n_dense)
    w.add_expert_count(t.n_expert)
    w.add_expert_used_count(t.n_used)
    w.add_expert_shared_count(t.n_shared)
    w.add_expert_group_count(1)
    w.add_expert_group_used_count(1)
    w.add_expert_feed_forward_length(t.d_expert)
    w.add_expert_weights_scale(t.router_scale)
    w.add_expert_weights_norm(t.router_norm)
    for name, value in (("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0), ("yarn_log_multiplier", 0.1)):
        w.add_float32(f"{t.architecture}.rope.scaling.{name}", value)
    if t.temperature_keys:
        w.add_float32(f"{t.architecture}.attention.temperature_scale", 0.1)
        w.add_uint32(f"{t.architecture}.attention.temperature_length", t.n_original)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


class _Tensors:
    """Puts random tensors into a file."""

    def __init__(self, writer: gguf.GGUFWriter, tiny: Tiny) -> None:
        self.writer = writer
        self.tiny = tiny
        self.rng = np.random.default_rng(tiny.seed)

    def add(self, name: str, purpose: str, *dims: int, std: float | None = None) -> None:
        """A matrix of the type its purpose has; dims[0] is the length of a row."""
        types = self.tiny.types
        kind = types.get(name.split(".")[-1]) or types.get(
            purpose, "F32" if purpose == "router" else self.tiny.default_type
        )
        if dims[0] % BLOCKS[IDS[kind]].weights:
            kind = SMALLER.get(kind, "IQ4_NL" if kind.startswith("IQ") else "F16")
        std = dims[0] ** -0.5 if std is None else std
        raw = random_blocks(self.rng, kind, int(np.prod(dims)), std)
        if kind == "NVFP4" and not self.tiny.nvfp4_scales:
            raw.reshape(-1, 36)[:, :4] >>= 2  # scales around 1 / 42: right for rows of 256
        shape = (*reversed(dims[1:]), len(raw) // int(np.prod(dims[1:])))
        self.writer.add_tensor(f"{name}.weight", raw.reshape(shape), raw_dtype=gguf.GGMLQuantizationType(IDS[kind]))
        if kind == "NVFP4" and self.tiny.nvfp4_scales:
            n = dims[2] if len(dims) > 2 else 1
            scales = (self.rng.uniform(0.6, 1.4, n) * std / 4).astype(np.float32)
            self.writer.add_tensor(f"{name}.scale", scales)
            self.writer.add_tensor(f"{name}.input_scale", np.ones(n, np.float32))

    def norm(self, name: str, n: int) -> None:
        self.writer.add_tensor(f"{name}.weight", self.rng.uniform(0.5, 1.5, n).astype(np.float32))

    def attention(self, blk: str) -> None:
        t = self.tiny
        self.norm(f"{blk}.attn_norm", t.d_model)
        self.norm(f"{blk}.attn_q_a_norm", t.q_rank)
        self.norm(f"{blk}.attn_kv_a_norm", t.kv_rank)
        self.add(f"{blk}.attn_q_a", "attention", t.d_model, t.q_rank)
        self.add(f"{blk}.attn_q_b", "attention", t.q_rank, t.n_head * (t.d_nope + t.d_rope))
        self.add(f"{blk}.attn_kv_a_mqa", "attention", t.d_model, t.kv_rank + t.d_rope)
        if t.joined_kv_b:
            self.add(f"{blk}.attn_kv_b", "attention", t.kv_rank, t.n_head * (t.d_nope + t.d_value))
        else:
            self.add(f"{blk}.attn_k_b", "attention", t.d_nope, t.kv_rank, t.n_head, std=t.kv_rank**-0.5)
            self.add(f"{blk}.attn_v_b", "attention", t.kv_rank, t.d_value, t.n_head)
        self.add(f"{blk}.attn_output", "attention", t.n_head * t.d_value, t.d_model)

    def ffn(self, blk: str, suffix: str, purpose: str, width: int, *n: int, fused: bool = False) -> None:
        d = self.tiny.d_model
        if fused:
            self.add(f"{blk}.ffn_gate_up{suffix}", purpose, d, 2 * width, *n)
        else:
            self.add(f"{blk}.ffn_gate{suffix}", purpose, d, width, *n)
            self.add(f"{blk}.ffn_up{suffix}", purpose, d, width, *n)
        self.add(f"{blk}.ffn_down{suffix}", purpose, width, d, *n)

    def all(self) -> None:
        t = self.tiny
        self.add("token_embd", "embedding", t.d_model, t.n_vocab, std=1.0)
        self.norm("output_norm", t.d_model)
        if not t.tied:
            self.add("output", "output", t.d_model, t.n_vocab)
        for layer in range(t.n_layer):
            blk = f"blk.{layer}"
            self.attention(blk)
            self.norm(f"{blk}.ffn_norm", t.d_model)
            if layer < t.n_dense:
                self.ffn(blk, "", "shared", t.d_dense)
                continue
            self.add(f"{blk}.ffn_gate_inp", "router", t.d_model, t.n_expert, std=2 * t.d_model**-0.5)
            self.ffn(blk, "_exps", "experts", t.d_expert, t.n_expert, fused=t.fused)
            if t.n_shared:
                self.ffn(blk, "_shexp", "shared", t.n_shared * t.d_expert)


def write_tiny(path: str | os.PathLike[str], tiny: Tiny | None = None) -> list[str]:
    """Writes the checkpoint; the names of the files, of which there are several if tiny.parts says so."""
    t = tiny or Tiny()
    path = os.fspath(path)
    per_part = 0
    if t.parts > 1:
        probe = gguf.GGUFWriter(None, t.architecture)
        _Tensors(probe, t).all()
        per_part = -(-sum(len(part) for part in probe.tensors) // t.parts)
    w = gguf.GGUFWriter(path, t.architecture, split_max_tensors=per_part)
    _add_keys(w, t)
    _add_vocabulary(w, t.n_vocab, t.n_unused)
    _Tensors(w, t).all()
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    if t.parts <= 1:
        return [path]
    stem = path.removesuffix(".gguf")
    return [f"{stem}-{i + 1:05}-of-{t.parts:05}.gguf" for i in range(t.parts)]
