"""reference.py: the whole model in NumPy float64, for tiny shapes: the definition of right.

It is written to be read beside the formulas, is never tuned and shares no arithmetic with the engine.  Weights come as
a mapping from GGUF tensor names to arrays of [rows, columns] (or [experts or heads, rows, columns]).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ms4 import ROW, Shape
from ms4.quant.blocks import dequantize
from ms4.quant.gguf_file import GgufFile

Weights = Mapping[str, np.ndarray]


def load_weights(file: GgufFile) -> dict[str, np.ndarray]:
    """Every weight of the file as float64; NVFP4's separate scales are multiplied in."""
    weights: dict[str, np.ndarray] = {}
    for name, tensor in file.tensors.items():
        with open(file.paths[tensor.file], "rb") as stream:
            stream.seek(tensor.offset)
            data = np.frombuffer(stream.read(tensor.bytes), np.uint8)
        weights[name] = dequantize(data, tensor.type, tensor.n_weights).astype(np.float64).reshape(tensor.dims[::-1])
    for name in [n for n in weights if n.endswith(".scale")]:
        target = name.removesuffix("scale") + "weight"
        scale = weights[name].reshape(-1, *[1] * (weights[target].ndim - 1))
        weights[target] = weights[target] * scale
    return {name: weight for name, weight in weights.items() if name.endswith((".weight", ".bias"))}


# --- pieces -------------------------------------------------------------------------------------------------------


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(x / 2))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rotate(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rope: every pair (x[2i], x[2i + 1]) turns by angle[i]."""
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angle), np.sin(angle)
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def yarn(d_rope: int, base: float, factor: float, length: int, beta_fast: float, beta_slow: float) -> np.ndarray:
    """Inverse frequencies of the d_rope / 2 pairs: fast pairs stay, slow ones are stretched by `factor`."""

    def pair(turns: float) -> float:  # the pair that turns so often over the original `length`
        return d_rope * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(pair(beta_fast)), 0), min(math.ceil(pair(beta_slow)), d_rope - 1)
    i = np.arange(d_rope // 2)
    ramp = np.clip((i - low) / max(high - low, 1e-3), 0, 1)
    freq = base ** (-2.0 * i / d_rope)
    return freq * (1 - ramp) + freq / factor * ramp


def attention_scale(d_head: int, kind: str, factor: float, log_multiplier: float = 0.1) -> float:
    """What multiplies q . k: 1 / sqrt(d_head), with `mscale2` also the square of YaRN's magnitude."""
    magnitude = {"plain": 1.0, "mscale2": 1 + log_multiplier * math.log(factor)}[kind]
    return magnitude**2 / math.sqrt(d_head)


def temperature(position: np.ndarray, beta: float, length: int) -> np.ndarray:
    """What the query at `position` is multiplied by, so that attention stays sharp in long contexts."""
    return 1 + beta * np.log1p(np.floor(position / length))


# --- the text model -----------------------------------------------------------------------------------------------


class KvCache:
    """Per layer what attention keeps of every position: the latent, then the rope key, [n, kv_rank + d_rope]."""

    def __init__(self, shape: Shape) -> None:
        self.layers = [np.zeros((0, shape.kv_rank + shape.d_rope)) for _ in range(shape.n_layer)]


def forward(
    weights: Weights,
    shape: Shape,
    ids: Sequence[int] | np.ndarray,
    rows: np.ndarray | None = None,
    *,
    cache: KvCache | None = None,
    absorbed: bool = False,
    gaps: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Logits [n, n_vocab] of the ids, which follow what `cache` holds; an id of ROW takes the next of `rows`.

    gaps: gets of every layer with experts how far the last chosen one is ahead of the next, see tie_gap.
    """
    cache = cache or KvCache(shape)
    x = embed(weights["token_embd.weight"], np.asarray(ids), rows)
    for i in range(shape.n_layer):
        layer = {name.split(".")[2]: w for name, w in weights.items() if name.startswith(f"blk.{i}.")}
        normal = rms(x, layer["attn_norm"], shape.norm_eps)
        x = x + attention(layer, shape, normal, cache, i, absorbed)
        normal = rms(x, layer["ffn_norm"], shape.norm_eps)
        x = x + (dense(layer, normal, "") if i < shape.n_dense_layer else moe(layer, shape, normal, gaps))
    output = weights.get("output.weight", weights["token_embd.weight"])
    return rms(x, weights["output_norm.weight"], shape.norm_eps) @ output.T


def embed(table: np.ndarray, ids: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    x = table[np.maximum(ids, 0)].astype(np.float64)
    if rows is not None:
        x[ids == ROW] = rows
    return x


def attention(
    layer: Weights, shape: Shape, x: np.ndarray, cache: KvCache, index: int, absorbed: bool = False
) -> np.ndarray:
    """Multi-head latent attention.

    Directly, each head's keys and values are expanded from the latents; absorbed, the query goes into the latents'
    space instead and one latent serves all heads.  Both are the same sums in another order.
    n, j: query and key positions; h: head; c: latent; d: key width; v: value width.
    """
    position = len(cache.layers[index]) + np.arange(len(x))
    angle = position[:, None] * np.asarray(shape.rope_freq)

    q = rms(x @ layer["attn_q_a"].T, layer["attn_q_a_norm"], shape.norm_eps) @ layer["attn_q_b"].T
    q = q.reshape(len(x), shape.n_head, shape.d_nope + shape.d_rope)
    q = q * temperature(position, shape.temp_beta, shape.temp_length)[:, None, None]
    q_nope, q_rope = q[..., : shape.d_nope], rotate(q[..., shape.d_nope :], angle[:, None])

    kv = x @ layer["attn_kv_a_mqa"].T
    latent = rms(kv[:, : shape.kv_rank], layer["attn_kv_a_norm"], shape.norm_eps)
    new = np.concatenate([latent, rotate(kv[:, shape.kv_rank :], angle)], axis=1)
    cache.layers[index] = np.concatenate([cache.layers[index], new])
    latents, rope_keys = np.split(cache.layers[index], [shape.kv_rank], axis=1)

    k_b, v_b = key_value_b(layer, shape)
    if absorbed:
        scores = np.einsum("nhc,jc->hnj", np.einsum("nhd,hcd->nhc", q_nope, k_b), latents)
    else:
        scores = np.einsum("nhd,jhd->hnj", q_nope, np.einsum("jc,hcd->jhd", latents, k_b))
    scores = (scores + np.einsum("nhd,jd->hnj", q_rope, rope_keys)) * shape.attn_scale
    scores = np.where(np.arange(len(latents)) <= position[:, None], scores, -np.inf)
    p = softmax(scores)
    if absorbed:
        out = np.einsum("nhc,hvc->nhv", np.einsum("hnj,jc->nhc", p, latents), v_b)
    else:
        out = np.einsum("hnj,jhv->nhv", p, np.einsum("jc,hvc->jhv", latents, v_b))
    return out.reshape(len(x), -1) @ layer["attn_output"].T


def key_value_b(layer: Weights, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """k_b [head, latent, key] and v_b [head, value, latent]; old files hold both in one attn_kv_b."""
    if "attn_kv_b" not in layer:
        return layer["attn_k_b"], layer["attn_v_b"]
    both = layer["attn_kv_b"].reshape(shape.n_head, shape.d_nope + shape.d_value, shape.kv_rank)
    return both[:, : shape.d_nope].transpose(0, 2, 1), both[:, shape.d_nope :]


def dense(layer: Weights, x: np.ndarray, suffix: str) -> np.ndarray:
    """SwiGLU, of a dense layer ("") or of the shared expert ("_shexp")."""
    gate, up, down = (layer[f"ffn_{part}{suffix}"] for part in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def moe(layer: Weights, shape: Shape, x: np.ndarray, gaps: list[np.ndarray] | None = None) -> np.ndarray:
    """The chosen routed experts, weighted, and the shared expert, which is always on."""
    if "ffn_gate_up_exps" in layer:
        gates, ups = np.split(layer["ffn_gate_up_exps"], 2, axis=1)
    else:
        gates, ups = layer["ffn_gate_exps"], layer["ffn_up_exps"]
    out = dense(layer, x, "_shexp") if shape.d_shared else np.zeros_like(x)
    logits = x @ layer["ffn_gate_inp"].T
    if gaps is not None:
        gaps.append(tie_gap(logits, shape.n_expert_used))
    probability = softmax(logits)
    for t, p in enumerate(probability):
        chosen = np.argsort(-p, kind="stable")[: shape.n_expert_used]
        weight = p[chosen] / (p[chosen].sum() if shape.router_norm else 1.0) * shape.router_scale
        for e, w in zip(chosen, weight, strict=True):
            hidden = silu(gates[e] @ x[t]) * (ups[e] @ x[t])
            out[t] += w * (layer["ffn_down_exps"][e] @ hidden)
    return out


def tie_gap(logits: np.ndarray, k: int) -> np.ndarray:
    """How far the k-th largest logit of each row is ahead of the next: where it is little, rounding may swap them."""
    falling = np.sort(logits, axis=1)[:, ::-1]
    return falling[:, k - 1] - falling[:, k] if k < logits.shape[1] else np.full(len(logits), np.inf)


# --- the vision tower ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionShape:
    """Hyperparameters of the tower and the projector, as an mmproj file gives them."""

    n_layer: int
    n_head: int
    patch: int  # pixels along a side
    merge: int  # patches along a side of one token
    norm_eps: float
    activation: str  # "silu" or "gelu"
    rope_base: float = 10000.0


def vision(weights: Weights, shape: VisionShape, pixels: np.ndarray) -> np.ndarray:
    """Feature rows [gh * gw, d_model] of one image [3, height, width], in raster order."""
    n_row, n_col = pixels.shape[1] // shape.patch, pixels.shape[2] // shape.patch
    cut = pixels.reshape(3, n_row, shape.patch, n_col, shape.patch).transpose(1, 3, 0, 2, 4)
    kernel = weights["v.patch_embd.weight"]
    x = cut.reshape(n_row * n_col, -1).astype(np.float64) @ kernel.reshape(len(kernel), -1).T
    x = rms(x, weights["v.pre_ln.weight"], shape.norm_eps)

    # Of the frequencies of a head, the even ones turn with the row and the odd ones with the column.
    d_head = x.shape[1] // shape.n_head
    freq = shape.rope_base ** (-2.0 * np.arange(d_head // 2) / d_head)
    row, col = np.divmod(np.arange(n_row * n_col), n_col)
    angle = np.concatenate([row[:, None] * freq[0::2], col[:, None] * freq[1::2]], axis=1)

    for i in range(shape.n_layer):
        layer = {n.split(".")[3]: w for n, w in weights.items() if n.startswith(f"v.blk.{i}.")}
        x = x + vision_attention(layer, shape, rms(x, layer["ln1"], shape.norm_eps), angle)
        y = rms(x, layer["ln2"], shape.norm_eps)
        act = {"silu": silu, "gelu": gelu}[shape.activation]
        x = x + (act(y @ layer["ffn_gate"].T) * (y @ layer["ffn_up"].T)) @ layer["ffn_down"].T
    return project(weights, shape, x.reshape(n_row, n_col, -1))


def vision_attention(layer: Weights, shape: VisionShape, x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Every patch of the image attends to every other, in both directions."""
    q, k, v = (
        (x @ layer[name].T).reshape(len(x), shape.n_head, -1).swapaxes(0, 1) for name in ("attn_q", "attn_k", "attn_v")
    )
    scores = rotate(q, angle) @ rotate(k, angle).swapaxes(1, 2) / math.sqrt(q.shape[-1])
    return (softmax(scores) @ v).swapaxes(0, 1).reshape(len(x), -1) @ layer["attn_out"].T


def project(weights: Weights, shape: VisionShape, x: np.ndarray) -> np.ndarray:
    """The tower's output [rows, columns, width] into the text model's space; merge x merge patches give one row."""
    if "mm.input_norm.weight" in weights:
        x = rms(x, weights["mm.input_norm.weight"], shape.norm_eps)
    n_row, n_col, width = x.shape
    m = shape.merge
    x = x.reshape(n_row // m, m, n_col // m, m, width).transpose(0, 2, 4, 1, 3).reshape(-1, width * m * m)
    if "mm.patch_merger.weight" in weights:
        x = x @ weights["mm.patch_merger.weight"].T
    x = gelu(x @ weights["mm.1.weight"].T + weights.get("mm.1.bias", 0.0))
    return x @ weights["mm.2.weight"].T + weights.get("mm.2.bias", 0.0)
