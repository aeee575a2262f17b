"""reference_ops.py: the arithmetic of csrc/ops.h in NumPy, operation by operation, for reference_bits.py.

Every function names the order of its roundings, because that order is what it is for: the same float32 bits as every
kernel table but ref.  Whole numbers (8-bit and 16-bit ones, and their sums) are exact in float64.  Arrays are float32
unless said otherwise; n is the number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ms4.quant.blocks import PLAIN, Bytes, Floats, Opened, dequantize, opened, spread

Whole = npt.NDArray[np.float64]  # whole numbers

SUPERBLOCK = 256
N_PARTIAL = 64  # partial sums of numbers of one row: squares, and exp in the router's choice
N_LANES = 16  # partial sums of products with float weights, and of what is summed over keys
SEGMENT_KEYS = 128
SEGMENT_GROUP = 8  # segments folded together before the groups are
LENGTH_16 = np.float32(44000)
TILE_KEYS = 32  # keys of one step of the tower's attention
AT_ONCE = 1 << 16  # numbers worked on together: what a cache holds


def single(x: float) -> np.float32:
    return np.float32(x)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Floats:
    """a * b + c, rounded once.

    In float64 the product is exact and the sum is rounded; rounding it again goes wrong only where it fell on the
    middle between two floats (or below the normal ones): there it is moved to the side on which the exact sum lies.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = np.asarray(product + c)
    doubtful = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    size = np.abs(total)
    if size.min(initial=1.0) < 2.0**-126:
        doubtful |= (size < 2.0**-126) & (size != 0)
    if doubtful.any():
        p, s = np.broadcast_to(product, total.shape)[doubtful], total[doubtful]
        other = np.broadcast_to(np.asarray(c, np.float64), total.shape)[doubtful]
        rest = s - p
        error = (p - (s - rest)) + (other - rest)
        total[doubtful] = np.where(error == 0, s, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)))
    return total.astype(np.float32)


def nearest(x: Floats) -> Whole:
    """To the nearest whole number, halves to the even one."""
    return np.rint(x).astype(np.float64)


def tree(part: Floats) -> Floats:
    """Partial sums along the last axis, added as a tree: the first half and the second, until one is left."""
    while (half := part.shape[-1] // 2) > 0:
        part = part[..., :half] + part[..., half:]
    return part[..., 0]


def dot(a: Floats, b: Floats, n_partial: int) -> Floats:
    """Sums of products along the last axis: partial sum j takes elements k = j (mod n_partial), ascending, by fma."""
    n = a.shape[-1]
    part = np.zeros((*np.broadcast_shapes(a.shape, b.shape)[:-1], n_partial), np.float32)
    for k in range(0, n, n_partial):
        m = min(n_partial, n - k)
        part[..., :m] = fma(a[..., k : k + m], b[..., k : k + m], part[..., :m])
    return tree(part)


def ascending_sum(x: Floats) -> Floats:
    """Along the last axis, one after the other."""
    total = np.zeros(x.shape[:-1], np.float32)
    for j in range(x.shape[-1]):
        total = total + x[..., j]
    return total


def partial_sum(x: Floats, n_partial: int) -> Floats:
    """Along the last axis: partial sum j takes elements k = j (mod n_partial), ascending; then as a tree."""
    part = np.zeros((*x.shape[:-1], n_partial), np.float32)
    for k in range(0, x.shape[-1], n_partial):
        m = min(n_partial, x.shape[-1] - k)
        part[..., :m] += x[..., k : k + m]
    return tree(part)


# --- elements -----------------------------------------------------------------------------------------------------


def polynomial(x: Floats, *coefficients: str) -> Floats:
    """By Horner's rule with fma, the highest power first."""
    p: Floats = np.full_like(x, float.fromhex(coefficients[0]))
    for coefficient in coefficients[1:]:
        p = fma(p, x, single(float.fromhex(coefficient)))
    return p


def exp(x: npt.ArrayLike) -> Floats:
    """e^x: x = k ln 2 + r, a polynomial for e^r, then 2^k in two halves."""
    x = np.clip(np.asarray(x, np.float32), single(-104), single(89))
    shifted = fma(x, single(float.fromhex("0x1.715476p+0")), 12582912)  # rounds to a whole number: 1.5 * 2^23
    whole = shifted - single(12582912)
    r = fma(whole, single(float.fromhex("-0x1.62e43p-1")), x)
    r = fma(whole, single(float.fromhex("0x1.05c61p-29")), r)
    p = polynomial(r, "0x1.6a2432p-10", "0x1.1239e4p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2")
    p = fma(p, r * r, r) + single(1)
    k = whole.astype(np.int32)
    halves = np.ldexp(single(1), k >> 1), np.ldexp(single(1), k - (k >> 1))
    return np.asarray(p * halves[0] * halves[1], np.float32)


def erf(x: Floats) -> Floats:
    """t + t p(t^2) of the magnitude t where it is small, else 1 - e^-q(t)."""
    t = np.abs(x)
    p = polynomial(
        t * t,
        *("0x1.4e1556p-14", "-0x1.a5b0f8p-11", "0x1.5441d4p-8", "-0x1.b8007ap-6", "0x1.ce2d6p-4", "-0x1.812740p-2"),
        "0x1.06eba8p-3",
    )
    q = polynomial(
        t,
        *("0x1.6370b8p-16", "-0x1.c8a54p-12", "0x1.11acbap-8", "-0x1.9bc356p-6", "0x1.bb97e8p-4", "0x1.4443d2p-1"),
        *("0x1.21286ep+0", "-0x1.71dae4p-13"),
    )
    return np.copysign(np.where(t < single(0.921875), fma(p, t, t), single(1) - exp(-q)), x)


def silu_mul(gate: Floats, up: Floats) -> Floats:
    return gate / (1 + exp(-gate)) * up


def gelu(x: Floats) -> Floats:
    half: Floats = single(0.5) * x
    return half * (single(1) + erf(x * single(0.70710678)))


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean = dot(x, x, N_PARTIAL) / single(x.shape[-1])
    factor: Floats = single(1) / np.sqrt(mean + single(eps))
    return x * factor[..., None] * weight


# --- activations --------------------------------------------------------------------------------------------------


class Quants(NamedTuple):
    """Rows of activations in 8 bits: x = d * q."""

    q: Whole  # [n, superblocks, 256]; behind the end of a row, zero
    d: Floats  # [n, superblocks]


def quantize_8(x: Floats) -> Quants:
    """The largest magnitude of 256 becomes 127."""
    n, width = x.shape
    blocks = np.zeros((n, -(-width // SUPERBLOCK), SUPERBLOCK), np.float32)
    blocks.reshape(n, -1)[:, :width] = x
    largest = np.abs(blocks).max(axis=-1)
    largest[largest < 2.0**-121] = 0  # as good as zero
    factor = single(127) / np.where(largest == 0, np.inf, largest).astype(np.float32)
    return Quants(nearest(blocks * factor[..., None]), largest / single(127))


def quantize_16(x: Floats) -> tuple[Whole, Floats]:
    """Along the last axis: whole numbers of at most 32767 and a length of at most LENGTH_16, and their scale."""
    largest = np.abs(x).max(axis=-1)
    nothing = largest < 2.0**-100
    one = single(1) / np.where(nothing, single(1), largest)
    unit: Floats = x * one[..., None]
    length = np.sqrt(dot(unit, unit, N_PARTIAL))
    top = np.minimum(LENGTH_16 / np.where(nothing, single(1), length), single(32767))
    q = nearest(x * (top * one)[..., None])
    return np.where(nothing[..., None], 0, q), np.where(nothing, 0, largest / top).astype(np.float32)


# --- products -----------------------------------------------------------------------------------------------------


def product(kind: str, data: Bytes, x: Floats) -> Floats:
    """[n, rows]: rows of weights as they lie in the file, [rows, bytes], times rows of activations, [n, columns]."""
    n_weights = len(data) * x.shape[1]
    if kind in PLAIN:
        return float_product(dequantize(data, kind, n_weights).reshape(len(data), -1), x)
    blocks, quants = opened(data, kind, n_weights), quantize_8(x)
    if blocks.scale is not None:
        return superblock_product(blocks, blocks.scale, quants, len(data))
    return block_product(blocks, quants, len(data))


def float_product(w: Floats, x: Floats) -> Floats:
    y = np.empty((len(x), len(w)), np.float32)
    rows = min(len(w), AT_ONCE // N_LANES)
    tokens = max(1, AT_ONCE // (rows * N_LANES))
    for r in range(0, len(w), rows):
        for t in range(0, len(x), tokens):
            y[t : t + tokens, r : r + rows] = dot(x[t : t + tokens, None], w[None, r : r + rows], N_LANES)
    return y


def superblock_product(w: Opened, scale: Floats, x: Quants, n_rows: int) -> Floats:
    """y = fma(x.d, fma(-dmin, J, d * I), y) over the superblocks: I = sum scale * q * x.q, J = sum min * x.q."""
    q = (spread(scale, SUPERBLOCK) * w.q).reshape(n_rows, -1, SUPERBLOCK).astype(np.float64)
    d = w.d.reshape(n_rows, -1)
    y = np.zeros((len(x.q), n_rows), np.float32)
    for i in range(q.shape[1]):
        t = d[:, i] * (x.q[:, i] @ q[:, i].T).astype(np.float32)
        if w.min is not None and w.dmin is not None:
            sums = x.q[:, i].reshape(len(x.q), 16, 16).sum(axis=-1)
            mins = spread(w.min, 16).reshape(n_rows, -1, 16)[:, i].astype(np.float64)
            t = fma(-w.dmin.reshape(n_rows, -1)[:, i], (sums @ mins.T).astype(np.float32), t)
        y = fma(x.d[:, i, None], t, y)
    return y


def block_product(w: Opened, x: Quants, n_rows: int) -> Floats:
    """In every superblock t = fma(d, I, t), then t = fma(m, S, t), over its blocks; y = fma(x.d, t, y).

    I = sum q * x.q and S = sum x.q of a block, which is 32 wide, or 16 for NVFP4."""
    width = w.q.shape[1] // w.d.shape[1]
    q, d = w.q.reshape(n_rows, -1, width).astype(np.float64), w.d.reshape(n_rows, -1)
    m = None if w.m is None else w.m.reshape(n_rows, -1)
    y = np.zeros((len(x.q), n_rows), np.float32)
    for i in range(x.q.shape[1]):
        t = np.zeros_like(y)
        for b in range(i * SUPERBLOCK // width, min((i + 1) * SUPERBLOCK // width, q.shape[1])):
            column = b * width - i * SUPERBLOCK
            some = x.q[:, i, column : column + width]
            t = fma(d[:, b], (some @ q[:, b].T).astype(np.float32), t)
            if m is not None:
                t = fma(m[:, b], some.sum(axis=-1, keepdims=True).astype(np.float32), t)
        y = fma(x.d[:, i, None], t, y)
    return y


# --- attention over the kv cache ----------------------------------------------------------------------------------


class Keys(NamedTuple):
    """At most SEGMENT_KEYS positions of a kv cache, filled up with zeros."""

    latent: Whole  # [keys, kv_rank]
    rope: Whole  # [keys, d_rope]
    d: Floats  # [2, keys]: scales of latents and of rope keys


class Queries(NamedTuple):
    latent: Whole  # [n, heads, kv_rank]
    rope: Whole  # [n, heads, d_rope]
    d: Floats  # [2, n, heads]


class Running(NamedTuple):
    """Of every query: the largest score, the sum of exp(score - m), and the sum of exp(score - m) times the values."""

    m: Floats  # [n, heads]
    l: Floats  # [n, heads]  # noqa: E741
    o: Floats  # [n, heads, kv_rank]


def attend_segment(q: Queries, k: Keys, seen: npt.NDArray[np.int64]) -> Running:
    """Every query attends to the first seen[t] keys of one segment."""
    latent = (q.latent @ k.latent.T).astype(np.float32)
    rope = (q.rope @ k.rope.T).astype(np.float32)
    of_rope = q.d[1][..., None] * k.d[1] * rope
    score = fma(q.d[0][..., None] * k.d[0], latent, of_rope)
    score = np.where(np.arange(SEGMENT_KEYS) < seen[:, None, None], score, single(-np.inf))
    m = score.max(axis=-1)
    weight = exp(score - np.where(np.isneginf(m), single(0), m)[..., None])

    total = np.zeros((*m.shape, N_LANES), np.float32)
    largest = np.abs(k.latent).max(axis=-1).astype(np.float32)
    scaled = weight * k.d[0]
    for j in range(0, SEGMENT_KEYS, N_LANES):
        total = fma(scaled[..., j : j + N_LANES], largest[j : j + N_LANES], total)
    by_sum = tree(total) * (single(1) / single(float.fromhex("0x1.fp+30")))
    unit = np.maximum(by_sum, scaled.max(axis=-1) * (single(1) / single(32767)))
    factor = np.where(unit < 2.0**-100, single(0), 1 / np.maximum(unit, single(2.0**-100)))
    whole = nearest(scaled * factor[..., None])
    return Running(m, partial_sum(weight, N_LANES), (whole @ k.latent).astype(np.float32) * unit[..., None])


def nothing_seen(n: tuple[int, ...], d: int) -> Running:
    zeros = np.zeros(n, np.float32)
    return Running(zeros - single(np.inf), zeros, np.zeros((*n, d), np.float32))


def fold(into: Running, other: Running) -> Running:
    """l = fma(l2, exp(m2 - m), l * exp(m1 - m)), each o likewise; what saw no key (l2 = 0) changes nothing."""
    m = np.maximum(into.m, other.m)
    with np.errstate(invalid="ignore"):
        old, new = exp(into.m - m), exp(other.m - m)
    none = other.l == 0
    o = fma(other.o, new[..., None], into.o * old[..., None])
    return Running(
        np.where(none, into.m, m),
        np.where(none, into.l, fma(other.l, new, into.l * old)),
        np.where(none[..., None], into.o, o),
    )


# --- attention of the tower ---------------------------------------------------------------------------------------


def attend_tile(q: Floats, k: Floats, v: Floats, into: Running) -> Running:
    """Every query, [heads, n, width], attends to all keys of one tile of at most TILE_KEYS."""
    score = np.zeros((*q.shape[:2], k.shape[1]), np.float32)
    for i in range(q.shape[2]):
        score = fma(q[..., i, None], k[:, None, :, i], score)
    m = np.maximum(into.m, score.max(axis=-1))
    factor, weight = exp(into.m - m), np.zeros((*q.shape[:2], TILE_KEYS), np.float32)
    weight[..., : k.shape[1]] = exp(score - m[..., None])
    total = fma(into.l, factor, tree(weight[..., :16] + weight[..., 16:]))
    o = into.o * factor[..., None]
    for j in range(k.shape[1]):
        o = fma(weight[..., j, None], v[:, None, j], o)
    return Running(m, total, o)
