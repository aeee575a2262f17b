"""reference_bits.py: the model once more, in the engine's own arithmetic: what every device must give, to the bit.

reference.py says what is right; this file says how it is rounded: activations in 8 bits, kv cache and queries in 16,
sums of float32 in the order of csrc/ops.h (reference_ops.py).  So the engine is held to these logits at every position,
and not to a bound that a wrong scale in a small tensor would stay below.  Weights are the bytes of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ms4 import ROW, Shape
from ms4.models import reference_ops as ops
from ms4.models.reference import VisionShape, tie_gap
from ms4.quant.blocks import BLOCKS, Bytes, Floats, dequantize
from ms4.quant.gguf_file import GgufFile


@dataclass(frozen=True)
class Matrix:
    """Weights as they lie in the file, [experts or heads (else 1), rows, bytes], and NVFP4's scales of the former."""

    kind: str
    data: Bytes
    n_columns: int
    scales: Floats | None = None

    def at(self, i: int) -> Matrix:
        """One expert, or one head."""
        scales = self.scales if self.scales is None or len(self.scales) == 1 else self.scales[i : i + 1]
        return Matrix(self.kind, self.data[i : i + 1], self.n_columns, scales)

    def rows(self, first: int, end: int) -> Matrix:
        return Matrix(self.kind, self.data[:, first:end], self.n_columns, self.scales)

    def floats(self) -> Floats:
        """The weights themselves, [rows, columns]: what is looked up, or folded into a query."""
        n = self.data[0].size // BLOCKS_BY_NAME[self.kind].bytes * BLOCKS_BY_NAME[self.kind].weights
        weights = dequantize(self.data[0], self.kind, n).reshape(-1, self.n_columns)
        return weights if self.scales is None else weights * self.scales[0]

    def __call__(self, x: Floats) -> Floats:
        """The product with every row of x; the scale multiplies what comes out."""
        y = ops.product(self.kind, self.data[0], x)
        return y if self.scales is None else y * self.scales[0]


BLOCKS_BY_NAME = {block.name: block for block in BLOCKS.values()}
Weights = Mapping[str, Matrix]


def load_weights(file: GgufFile) -> dict[str, Matrix]:
    """Every matrix and vector of the file."""
    raw: dict[str, Bytes] = {}
    for name, tensor in file.tensors.items():
        with open(file.paths[tensor.file], "rb") as stream:
            stream.seek(tensor.offset)
            raw[name] = np.frombuffer(stream.read(tensor.bytes), np.uint8)
    weights = {}
    for name, data in raw.items():
        if not name.endswith((".weight", ".bias")):
            continue
        tensor = file.tensors[name]
        *outer, n_columns = tensor.dims[::-1]
        n_slices = outer[0] if len(outer) == 2 else 1
        if len(outer) > 2:  # a convolution: its kernels are the rows
            n_columns, outer = math.prod(tensor.dims[:3]), outer[:1]
        n_rows = outer[-1] if outer else 1
        scales = raw.get(name.removesuffix("weight") + "scale")
        weights[name] = Matrix(
            BLOCKS[tensor.type].name,
            data.reshape(n_slices, n_rows, -1),
            n_columns,
            None if scales is None else scales.view("<f4"),
        )
    return weights


# --- the text model -----------------------------------------------------------------------------------------------


class KvCache:
    """Per layer what attention keeps of every position: whole numbers [n, kv_rank], [n, d_rope], and scales [2, n]."""

    def __init__(self, shape: Shape) -> None:
        empty = ops.Keys(np.zeros((0, shape.kv_rank)), np.zeros((0, shape.d_rope)), np.zeros((2, 0), np.float32))
        self.layers = [empty] * shape.n_layer

    def __len__(self) -> int:
        return len(self.layers[0].latent)

    def append(self, index: int, latent: Floats, rope: Floats) -> None:
        old, new = self.layers[index], [ops.quantize_16(latent), ops.quantize_16(rope)]
        self.layers[index] = ops.Keys(
            np.concatenate([old.latent, new[0][0]]),
            np.concatenate([old.rope, new[1][0]]),
            np.concatenate([old.d, [d for _, d in new]], axis=1),
        )

    def segment(self, index: int, first: int) -> ops.Keys:
        keys = self.layers[index]
        end = min(first + ops.SEGMENT_KEYS, len(keys.latent))
        absent = (0, first + ops.SEGMENT_KEYS - end)
        return ops.Keys(
            np.pad(keys.latent[first:end], (absent, (0, 0))),
            np.pad(keys.rope[first:end], (absent, (0, 0))),
            np.pad(keys.d[:, first:end], ((0, 0), absent)),
        )


def forward(
    weights: Weights,
    shape: Shape,
    ids: Sequence[int] | np.ndarray,
    rows: Floats | None = None,
    *,
    cache: KvCache | None = None,
    gaps: list[Floats] | None = None,
) -> Floats:
    """Logits [n, n_vocab] of the ids, which follow what `cache` holds; `rows` and `gaps` as in reference.py."""
    cache = cache or KvCache(shape)
    position = len(cache) + np.arange(len(ids))
    h = embed(weights["token_embd.weight"], np.asarray(ids), rows)
    for i in range(shape.n_layer):
        layer = {name.split(".")[2]: w for name, w in weights.items() if name.startswith(f"blk.{i}.")}
        x = ops.rms_norm(h, layer["attn_norm"].floats(), shape.norm_eps)
        h = h + layer["attn_output"](attention(layer, shape, x, position, cache, i))
        x = ops.rms_norm(h, layer["ffn_norm"].floats(), shape.norm_eps)
        h = h + swiglu(layer, x, "") if i < shape.n_dense_layer else experts(layer, shape, h, x, gaps)
    output = weights.get("output.weight", weights["token_embd.weight"])
    return output(ops.rms_norm(h, weights["output_norm.weight"].floats(), shape.norm_eps))


def embed(table: Matrix, ids: np.ndarray, rows: Floats | None) -> Floats:
    x = table.floats()[np.maximum(ids, 0)]
    if rows is not None:
        x[ids == ROW] = rows
    return x


def turns(angle: np.ndarray) -> tuple[Floats, Floats]:
    """cos and sin, in double."""
    cos, sin = (np.vectorize(f, otypes=[np.float32])(angle) for f in (math.cos, math.sin))
    return cos, sin


def rotate(x: Floats, turn: tuple[Floats, Floats]) -> Floats:
    (cos, sin), a, b = turn, x[..., 0::2], x[..., 1::2]
    return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def query_scale(shape: Shape, position: np.ndarray) -> Floats:
    """The attention scale times the temperature of each position."""
    steps = position // shape.temp_length if shape.temp_length else 0 * position
    return np.array([shape.attn_scale * (1 + shape.temp_beta * math.log1p(n)) for n in steps.tolist()], np.float32)


def attention(layer: Weights, shape: Shape, x: Floats, position: np.ndarray, cache: KvCache, index: int) -> Floats:
    """Multi-head latent attention, absorbed: [n, n_head * d_value]."""
    n, rank = len(x), shape.kv_rank
    cos, sin = turns(position[:, None] * np.asarray(shape.rope_freq))
    kv = layer["attn_kv_a_mqa"](x)
    latent = ops.rms_norm(kv[:, :rank], layer["attn_kv_a_norm"].floats(), shape.norm_eps)
    cache.append(index, latent, rotate(kv[:, rank:], (cos, sin)))

    low = ops.rms_norm(layer["attn_q_a"](x), layer["attn_q_a_norm"].floats(), shape.norm_eps)
    q = layer["attn_q_b"](low).reshape(n, shape.n_head, -1)
    q_rope = rotate(q[..., shape.d_nope :], (cos[:, None], sin[:, None]))
    q_nope, q_rope = (part * query_scale(shape, position)[:, None, None] for part in (q[..., : shape.d_nope], q_rope))

    k_b, v_b = key_value_b(layer, shape)
    absorbed = np.stack([ops.float_product(k, q_nope[:, h]) for h, k in enumerate(k_b)], axis=1)
    parts = ops.quantize_16(absorbed), ops.quantize_16(q_rope)
    queries = ops.Queries(parts[0][0], parts[1][0], np.stack([d for _, d in parts]))
    total = attend(queries, cache, index, position)
    o = total.o / total.l[..., None]
    return np.concatenate([ops.float_product(v, o[:, h]) for h, v in enumerate(v_b)], axis=1)


def attend(queries: ops.Queries, cache: KvCache, index: int, position: np.ndarray) -> ops.Running:
    """Segment by segment, folded in order in groups, and these in order."""
    none = ops.nothing_seen(queries.d.shape[1:], queries.latent.shape[-1])
    total, n_keys = none, position[-1] + 1
    for start in range(0, n_keys, ops.SEGMENT_GROUP * ops.SEGMENT_KEYS):
        group = none
        for first in range(start, min(start + ops.SEGMENT_GROUP * ops.SEGMENT_KEYS, n_keys), ops.SEGMENT_KEYS):
            seen = np.clip(position + 1 - first, 0, ops.SEGMENT_KEYS)
            group = ops.fold(group, ops.attend_segment(queries, cache.segment(index, first), seen))
        total = ops.fold(total, group)
    return total


def key_value_b(layer: Weights, shape: Shape) -> tuple[list[Floats], list[Floats]]:
    """Of every head k_b [latent, key] and v_b [value, latent]; old files hold both in one attn_kv_b."""
    heads = range(shape.n_head)
    if "attn_kv_b" not in layer:
        return [layer["attn_k_b"].at(h).floats() for h in heads], [layer["attn_v_b"].at(h).floats() for h in heads]
    both = layer["attn_kv_b"].floats().reshape(shape.n_head, -1, shape.kv_rank)
    return [both[h, : shape.d_nope].T for h in heads], [both[h, shape.d_nope :] for h in heads]


def swiglu(layer: Weights, x: Floats, suffix: str) -> Floats:
    """Of a dense layer ("") or of the shared expert ("_shexp")."""
    gate, up, down = (layer[f"ffn_{part}{suffix}"] for part in ("gate", "up", "down"))
    return down(ops.silu_mul(gate(x), up(x)))


def experts(layer: Weights, shape: Shape, h: Floats, x: Floats, gaps: list[Floats] | None) -> Floats:
    """h, the shared expert added first, then the chosen experts, ascending."""
    if "ffn_gate_up_exps" in layer:
        both, d = layer["ffn_gate_up_exps"], shape.d_expert
        gates, ups = both.rows(0, d), both.rows(d, 2 * d)
    else:
        gates, ups = layer["ffn_gate_exps"], layer["ffn_up_exps"]
    downs = layer["ffn_down_exps"]
    h = h + swiglu(layer, x, "_shexp") if shape.d_shared else h.copy()
    logits = layer["ffn_gate_inp"](x)
    if gaps is not None:
        gaps.append(tie_gap(logits, shape.n_expert_used))
    chosen, weight = choose(logits, shape)
    for e in range(shape.n_expert):
        token, place = np.nonzero(chosen == e)
        if len(token):
            out = downs.at(e)(ops.silu_mul(gates.at(e)(x[token]), ups.at(e)(x[token])))
            h[token] = ops.fma(weight[token, place, None], out, h[token])
    return h


def choose(logits: Floats, shape: Shape) -> tuple[np.ndarray, Floats]:
    """Of every token the n_expert_used largest, ties to the lowest index, ascending by index; and their weights."""
    chosen = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, : shape.n_expert_used], axis=1)
    all_e = ops.exp(logits - logits.max(axis=1, keepdims=True))
    e = np.take_along_axis(all_e, chosen, axis=1)
    total = ops.ascending_sum(e) if shape.router_norm else ops.partial_sum(all_e, ops.N_PARTIAL)
    return chosen, np.float32(shape.router_scale) * e / total[:, None]


# --- the vision tower ---------------------------------------------------------------------------------------------


def vision(weights: Weights, shape: VisionShape, pixels: Floats) -> Floats:
    """Feature rows [gh * gw, d_model] of one image [3, height, width], in raster order."""
    n_row, n_col = pixels.shape[1] // shape.patch, pixels.shape[2] // shape.patch
    cut = pixels.reshape(3, n_row, shape.patch, n_col, shape.patch).transpose(1, 3, 0, 2, 4)
    h = weights["v.patch_embd.weight"](cut.reshape(n_row * n_col, -1).astype(np.float32))
    h = ops.rms_norm(h, weights["v.pre_ln.weight"].floats(), shape.norm_eps)

    # Of the frequencies of a head, the even ones turn with the row and the odd ones with the column.
    d_head = h.shape[1] // shape.n_head
    freq = np.array([math.pow(np.float32(shape.rope_base), -2.0 * f / d_head) for f in range(d_head // 2)])
    row, col = np.divmod(np.arange(n_row * n_col), n_col)
    turn = turns(np.concatenate([row[:, None] * freq[0::2], col[:, None] * freq[1::2]], axis=1))
    for i in range(shape.n_layer):
        layer = {n.split(".")[3]: w for n, w in weights.items() if n.startswith(f"v.blk.{i}.")}
        x = ops.rms_norm(h, layer["ln1"].floats(), shape.norm_eps)
        h = h + layer["attn_out"](vision_attention(layer, shape, x, turn))
        x = ops.rms_norm(h, layer["ln2"].floats(), shape.norm_eps)
        gate, up = layer["ffn_gate"](x), layer["ffn_up"](x)
        h = h + layer["ffn_down"](ops.silu_mul(gate, up) if shape.activation == "silu" else ops.gelu(gate) * up)
    return project(weights, shape, h.reshape(n_row, n_col, -1))


def vision_attention(layer: Weights, shape: VisionShape, x: Floats, turn: tuple[Floats, Floats]) -> Floats:
    """Every patch attends to every other, a tile of keys at a time."""
    q, k, v = (
        layer[name](x).reshape(len(x), shape.n_head, -1).swapaxes(0, 1) for name in ("attn_q", "attn_k", "attn_v")
    )
    scale = np.float32(1) / np.sqrt(np.float32(q.shape[2]))
    q, k = rotate(q * scale, turn), rotate(k, turn)
    total = ops.nothing_seen(q.shape[:2], q.shape[2])
    for first in range(0, len(x), ops.TILE_KEYS):
        end = first + ops.TILE_KEYS
        total = ops.attend_tile(q, k[:, first:end], v[:, first:end], total)
    return (total.o / total.l[..., None]).swapaxes(0, 1).reshape(len(x), -1)


def project(weights: Weights, shape: VisionShape, x: Floats) -> Floats:
    """The tower's output [rows, columns, width] into the text model's space; merge x merge patches give one row."""
    if "mm.input_norm.weight" in weights:
        x = ops.rms_norm(x, weights["mm.input_norm.weight"].floats(), shape.norm_eps)
    n_row, n_col, width = x.shape
    m = shape.merge
    x = x.reshape(n_row // m, m, n_col // m, m, width).transpose(0, 2, 4, 1, 3).reshape(-1, width * m * m)
    if "mm.patch_merger.weight" in weights:
        x = weights["mm.patch_merger.weight"](x)
    x = weights["mm.1.weight"](x)
    if "mm.1.bias" in weights:
        x = x + weights["mm.1.bias"].floats()[0]
    x = weights["mm.2.weight"](ops.gelu(x))
    return x + weights["mm.2.bias"].floats()[0] if "mm.2.bias" in weights else x
