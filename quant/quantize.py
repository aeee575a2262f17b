"""Float32 weights to GGUF blocks: what `blocks.dequantize` reads, in the bytes that lose least.

Nothing here knows the activations, so all weights count alike: scales and mins are those of the least squared error
that a search finds.  It begins with a grid of scales around the one that just covers the largest weight; solves for the
best scale (and min) of the integers that each gives; and for superblocks tries the neighbours of every stored scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ms4.quant.blocks import BLOCKS, IDS, Bytes, Floats

CHUNK = 1 << 18  # weights worked on at a time: the temporaries stay small
SCALE_STEPS = np.linspace(-1, 1, 17)  # where the largest weight may come to lie, from the end of the range
SHARE_STEPS = np.linspace(0, 6, 25)  # the same for the largest scale of a superblock
REFINEMENTS = 2
LARGEST_HALF = 65504.0


def quantize(values: Floats, type: int | str) -> Bytes:
    """The weights as blocks: an array of bytes with the same rows.  ValueError if the type cannot hold them."""
    id = IDS[type.upper()] if isinstance(type, str) else int(type)
    name, weights, n_bytes = BLOCKS[id]
    if name not in ENCODERS:
        raise ValueError(f"{name} can be read but not written; there are {', '.join(ENCODERS)}")
    values = np.asarray(values, np.float32)
    if not values.ndim or values.shape[-1] % weights:
        raise ValueError(f"rows of {values.shape[-1:]} weights are no whole number of {name} blocks of {weights}")
    if not np.isfinite(values).all():
        raise ValueError("the weights hold NaN or infinity")
    if weights > 1 and np.abs(values).max(initial=0) > LARGEST_HALF:  # the scales are 16-bit numbers
        raise ValueError(f"the weights are too large for {name}")
    blocks = values.reshape(-1, weights)
    out = np.empty((len(blocks), n_bytes), np.uint8)
    step = CHUNK // weights
    for i in range(0, len(blocks), step):
        out[i : i + step] = ENCODERS[name](blocks[i : i + step])
    return out.reshape(*values.shape[:-1], values.shape[-1] // weights * n_bytes)


# --- the search ------------------------------------------------------------------------------


def halves(x: Floats) -> Floats:
    """x as an f16 field will give it back."""
    return x.astype("<f2").astype(np.float32)


def inverse(x: Floats) -> Floats:
    """1/x, and 0 for the zeros: a scale of zero has only zeros below it."""
    with np.errstate(over="ignore"):
        found = np.divide(1, x, out=np.zeros_like(x), where=x != 0)
    return np.where(np.isfinite(found), found, np.float32(0))


def levels(x: Floats, low: int, high: int) -> Floats:
    """The nearest integers of low to high.  x is overwritten."""
    np.rint(x, out=x)
    return np.clip(x, low, high, out=x)


def dot(a: Floats, b: Floats) -> Floats:
    """Sums of products along the last axis."""
    return np.einsum("...i,...i->...", a, b)


def ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def fit_scale(x: Floats, low: int, high: int) -> Floats:
    """For every row the scale s by which s q, q in low to high, comes nearest to it."""
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    unit = inverse(largest)
    best, scale = np.zeros_like(x[..., 0]), np.zeros_like(x[..., 0])

    def consider(q: Floats) -> None:
        xq, qq = dot(x, q), dot(q, q)
        gain = ratio(xq * xq, qq)  # by how much the scale xq / qq makes the squared error smaller
        better = gain > best
        best[better], scale[better] = gain[better], ratio(xq, qq)[better]

    for end in (low, high):
        for step in SCALE_STEPS:
            consider(levels(x * (unit * np.float32(end + step)), low, high))
    for _ in range(REFINEMENTS):
        consider(levels(x * inverse(scale)[..., None], low, high))
    return scale


def fit_scale_and_min(x: Floats, high: int, least: float) -> tuple[Floats, Floats]:
    """For every row the scale s and min m by which s q - m, q in 0 to high, comes nearest to it; m is at least `least`.

    The sums run over x - x.min, so that a large common part of the row costs no precision.
    """
    n = x.shape[-1]
    base = np.minimum(x.min(-1, keepdims=True), np.float32(-least))
    over = x - base
    unit = inverse(over.max(-1, keepdims=True))
    total, squares = over.sum(-1), dot(over, over)
    scale, offset = np.zeros_like(total), ratio(total, np.full_like(total, n))
    if np.isfinite(least):
        offset = np.minimum(offset, -least - base[..., 0])
    best = squares - 2 * offset * total + n * offset * offset

    def consider(q: Floats) -> None:
        a, b, c = dot(q, q), q.sum(-1), dot(over, q)
        s = ratio(n * c - b * total, n * a - b * b)
        o = (total - s * b) / n
        if np.isfinite(least):  # -m = base + o may not pass -least
            bound = -least - base[..., 0]
            s = np.where(o > bound, ratio(c - bound * b, a), s)
            o = np.minimum(o, bound)
        error = squares - 2 * (s * c + o * total) + s * s * a + 2 * s * o * b + n * o * o
        better = (error < best) & (s > 0)
        best[better], scale[better], offset[better] = error[better], s[better], o[better]

    for low in (0.0, 0.5) if high <= 3 else (0.0,):
        for step in SCALE_STEPS:
            consider(levels(over * (unit * np.float32(high + step)) - np.float32(low), 0, high))
    for _ in range(REFINEMENTS):
        consider(levels((over - offset[..., None]) * inverse(scale)[..., None], 0, high))
    return scale, -(base[..., 0] + offset)


def share(scales: Floats, weight: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    """For every superblock the f16 factor d and the integers in low to high by which d times them is near its scales.

    `weight` says how much the squared error of each scale counts.
    """
    largest = np.take_along_axis(scales, np.abs(scales).argmax(-1, keepdims=True), -1)
    best, factor = np.full(len(scales), np.inf, np.float32), np.zeros_like(largest)
    for end in (low, high) if low else (high,):
        for step in SHARE_STEPS[SHARE_STEPS < high / 2]:
            d = halves(largest / np.float32(end - np.sign(end) * step))
            off = d * levels(scales * inverse(d), low, high) - scales
            error = dot(weight, off * off)
            better = error < best
            best[better], factor[better] = error[better], d[better]
    return factor, levels(scales * inverse(factor), low, high)


# --- superblocks -----------------------------------------------------------------------------


def superblock(
    x: Floats, n_groups: int, lows: tuple[int, int], highs: tuple[int, int]
) -> tuple[Floats, Floats, Floats]:
    """y = d S q: the factor d [n, 1], the scales S [n, groups] and the integers q, as floats.

    lows, highs: the range of S, and that of q.
    """
    x = x.reshape(len(x), n_groups, -1)
    scale = fit_scale(x, lows[1], highs[1])
    q = levels(x * inverse(scale)[..., None], lows[1], highs[1])
    d, stored = share(scale, dot(q, q), lows[0], highs[0])

    def integers(d: Floats, stored: Floats) -> tuple[Floats, Floats]:
        """The best q, and the squared error of every group."""
        s = (d * stored)[..., None]
        q = levels(x * inverse(s), lows[1], highs[1])
        off = x - s * q
        return q, dot(off, off)

    for _ in range(REFINEMENTS):
        q, error = integers(d, stored)
        for step in (-1, 1):
            other = np.clip(stored + step, lows[0], highs[0])
            _, its_error = integers(d, other)
            stored = np.where(its_error < error, other, stored)
            error = np.minimum(error, its_error)
        q, error = integers(d, stored)
        part = stored[..., None] * q
        solved = halves(ratio(dot(part, x).sum(1), dot(part, part).sum(1))[:, None])
        _, its_error = integers(solved, stored)
        d = np.where(its_error.sum(1, keepdims=True) < error.sum(1, keepdims=True), solved, d)
    return d, stored, integers(d, stored)[0].reshape(len(x), -1)


def superblock_with_mins(
    x: Floats, n_groups: int, most: int, high: int
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """y = d S q - dmin M: d, dmin [n, 1], S, M [n, groups] in 0 to most, and q in 0 to high, as floats."""
    x = x.reshape(len(x), n_groups, -1)
    scale, low = fit_scale_and_min(x, high, 0.0)
    q = levels((x + low[..., None]) * inverse(scale)[..., None], 0, high)
    d, scales = share(scale, dot(q, q), 0, most)
    dmin, mins = share(low, np.ones_like(low), 0, most)

    def integers(d: Floats, scales: Floats, dmin: Floats, mins: Floats) -> tuple[Floats, Floats]:
        s, over = (d * scales)[..., None], x + (dmin * mins)[..., None]
        q = levels(over * inverse(s), 0, high)
        off = over - s * q
        return q, dot(off, off)

    for _ in range(REFINEMENTS):
        _, error = integers(d, scales, dmin, mins)
        base_s, base_m = scales, mins
        for step_s, step_m in [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]:
            s, m = np.clip(base_s + step_s, 0, most), np.clip(base_m + step_m, 0, most)
            _, its_error = integers(d, s, dmin, m)
            better = its_error < error
            scales, mins, error = np.where(better, s, scales), np.where(better, m, mins), np.minimum(error, its_error)
        q, error = integers(d, scales, dmin, mins)
        solved = solve_factors(x, scales[..., None] * q, mins)
        _, its_error = integers(solved[0], scales, solved[1], mins)
        better = its_error.sum(1, keepdims=True) < error.sum(1, keepdims=True)
        d, dmin = np.where(better, solved[0], d), np.where(better, solved[1], dmin)
    # Where all weights are tiny, halves are so coarse that zeros may be nearer.
    worse = integers(d, scales, dmin, mins)[1].sum(1, keepdims=True) > dot(x, x).sum(1, keepdims=True)
    d, dmin = np.where(worse, np.float32(0), d), np.where(worse, np.float32(0), dmin)
    return d, dmin, scales, mins, integers(d, scales, dmin, mins)[0].reshape(len(x), -1)


def solve_factors(x: Floats, part: Floats, mins: Floats) -> tuple[Floats, Floats]:
    """The d and dmin by which d part - dmin mins is nearest to x in each superblock, neither below zero."""
    pp, px = dot(part, part).sum(1), dot(part, x).sum(1)
    pm, mx = dot(part.sum(-1), mins), dot(x.sum(-1), mins)
    mm = dot(mins, mins) * x.shape[-1]
    det = pp * mm - pm * pm
    d, dmin = ratio(px * mm - mx * pm, det), ratio(px * pm - mx * pp, det)
    alone = (det <= 0) | (d < 0) | (dmin < 0)
    d, dmin = np.where(alone, ratio(np.maximum(px, 0), pp), d), np.where(alone, np.float32(0), dmin)
    return halves(d[:, None]), halves(dmin[:, None])


# --- blocks, as bytes ------------------------------------------------------------------------


def half_bytes(x: Floats) -> Bytes:
    return x.reshape(-1, 1).astype("<f2").view(np.uint8)


def whole(q: Floats, offset: int = 0) -> Bytes:
    return (q + offset).astype(np.uint8)


def nibble_bytes(q: Bytes) -> Bytes:
    """Along the last axis: the first half of the values in the low nibbles, the second half in the high ones."""
    n = q.shape[-1] // 2
    return q[..., :n] & np.uint8(15) | q[..., n:] << np.uint8(4)


def bit_planes(q: Bytes, bit: int) -> Bytes:
    """One bit of 256 values: byte l holds those of the elements 32 s + l, s = 0 first."""
    planes = (q.reshape(-1, 8, 32) >> bit & 1) << np.arange(8, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(planes, axis=1)


def two_bit_bytes(q: Bytes) -> Bytes:
    """256 values of two bits: byte 32 h + l holds the elements 128 h + 32 j + l, j = 0 first."""
    crumbs = q.reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(crumbs, axis=2).reshape(-1, 64)


def scale_min_bytes(scales: Floats, mins: Floats) -> Bytes:
    """Eight pairs of six bits, as Q4_K and Q5_K store them."""
    s, m = whole(scales), whole(mins)
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    return np.concatenate([first, second, s[:, 4:] & 15 | m[:, 4:] << 4], axis=1)


def f32(x: Floats) -> Bytes:
    return x.astype("<f4").view(np.uint8)


def f16(x: Floats) -> Bytes:
    if np.abs(x).max(initial=0) > LARGEST_HALF:
        raise ValueError("the weights are too large for F16")
    return half_bytes(x)


def bf16(x: Floats) -> Bytes:
    """Rounded to nearest, ties to even."""
    bits = x.astype("<f4").view("<u4").astype(np.uint64)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    if (rounded & 0x7F80 == 0x7F80).any():
        raise ValueError("the weights are too large for BF16")
    return rounded.astype("<u2").view(np.uint8)


def one_scale(x: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    d = halves(fit_scale(x, low, high)[:, None])
    return d, levels(x * inverse(d), low, high)


def scale_and_min(x: Floats, high: int) -> tuple[Floats, Floats, Floats]:
    s, low = fit_scale_and_min(x, high, -np.inf)
    d, m = halves(s[:, None]), halves(-low[:, None])
    return d, m, levels((x - m) * inverse(d), 0, high)


def high_bits(q: Bytes) -> Bytes:
    """The fifth bit of 32 values, as four bytes."""
    return np.packbits(q >> 4 & 1, axis=-1, bitorder="little")


def q4_0(x: Floats) -> Bytes:
    d, q = one_scale(x, -8, 7)
    return np.hstack([half_bytes(d), nibble_bytes(whole(q, 8))])


def q5_0(x: Floats) -> Bytes:
    d, q = one_scale(x, -16, 15)
    five = whole(q, 16)
    return np.hstack([half_bytes(d), high_bits(five), nibble_bytes(five)])


def q8_0(x: Floats) -> Bytes:
    d, q = one_scale(x, -127, 127)
    return np.hstack([half_bytes(d), q.astype(np.int8).view(np.uint8)])


def q4_1(x: Floats) -> Bytes:
    d, m, q = scale_and_min(x, 15)
    return np.hstack([half_bytes(d), half_bytes(m), nibble_bytes(whole(q))])


def q5_1(x: Floats) -> Bytes:
    d, m, q = scale_and_min(x, 31)
    return np.hstack([half_bytes(d), half_bytes(m), high_bits(whole(q)), nibble_bytes(whole(q))])


def q2_k(x: Floats) -> Bytes:
    d, dmin, scales, mins, q = superblock_with_mins(x, 16, 15, 3)
    packed = whole(scales) | whole(mins) << 4
    return np.hstack([packed, two_bit_bytes(whole(q)), half_bytes(d), half_bytes(dmin)])


def q3_k(x: Floats) -> Bytes:
    d, scales, q = superblock(x, 16, (-32, -4), (31, 3))
    six, three = whole(scales, 32), whole(q, 4)
    top = six.reshape(-1, 4, 4) >> 4 << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    packed = np.hstack([nibble_bytes(six), np.bitwise_or.reduce(top, axis=1)])
    return np.hstack([bit_planes(three, 2), two_bit_bytes(three & np.uint8(3)), packed, half_bytes(d)])


def q4_k(x: Floats) -> Bytes:
    d, dmin, scales, mins, q = superblock_with_mins(x, 8, 63, 15)
    qs = nibble_bytes(whole(q).reshape(-1, 4, 64)).reshape(-1, 128)
    return np.hstack([half_bytes(d), half_bytes(dmin), scale_min_bytes(scales, mins), qs])


def q5_k(x: Floats) -> Bytes:
    d, dmin, scales, mins, q = superblock_with_mins(x, 8, 63, 31)
    five = whole(q)
    qs = nibble_bytes(five.reshape(-1, 4, 64)).reshape(-1, 128)
    return np.hstack([half_bytes(d), half_bytes(dmin), scale_min_bytes(scales, mins), bit_planes(five, 4), qs])


def q6_k(x: Floats) -> Bytes:
    d, scales, q = superblock(x, 16, (-128, -32), (127, 31))
    six = whole(q, 32)
    low = nibble_bytes(six.reshape(-1, 2, 128)).reshape(-1, 128)
    return np.hstack([low, two_bit_bytes(six >> np.uint8(4)), scales.astype(np.int8).view(np.uint8), half_bytes(d)])


ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    encoder.__name__.upper(): encoder
    for encoder in (f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k)
}
