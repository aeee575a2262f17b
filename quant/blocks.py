"""The GGUF block types in NumPy: their sizes, the integers and scales that their bytes stand for, and these as float32.

Every product fits the 24 bits of a float32, so a weight is the exact value of its formula, rounded once where a min
is subtracted: the same bits as csrc/cpu/plain/dequantize.c.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ms4.quant.grids import GRIDS, values

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Block(NamedTuple):
    name: str
    weights: int
    bytes: int


# by GGUF type id
BLOCKS: dict[int, Block] = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    10: Block("Q2_K", 256, 84),
    11: Block("Q3_K", 256, 110),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
    16: Block("IQ2_XXS", 256, 66),
    17: Block("IQ2_XS", 256, 74),
    18: Block("IQ3_XXS", 256, 98),
    19: Block("IQ1_S", 256, 50),
    20: Block("IQ4_NL", 32, 18),
    21: Block("IQ3_S", 256, 110),
    22: Block("IQ2_S", 256, 82),
    23: Block("IQ4_XS", 256, 136),
    29: Block("IQ1_M", 256, 56),
    30: Block("BF16", 1, 2),
    39: Block("MXFP4", 32, 17),
    40: Block("NVFP4", 64, 36),
}
IDS = {name: id for id, (name, _, _) in BLOCKS.items()}
# The K and IQ types need rows of whole superblocks; for other rows quantizers take the nearest type of plain blocks.
SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "NVFP4": "Q4_0"}

KV = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # twice the values


@dataclass(frozen=True)
class Opened:
    """Blocks as whole numbers and scales, one row per block; all float32.  A group is n weights / n scales wide.

    Superblocks have integer scales:  weight = d * scale[group] * q - dmin * min[group]  (no mins: the first part)
    Other blocks do not:              weight = d[group] * q + m                          (no m: the first part)
    """

    q: Floats  # [blocks, weights]
    d: Floats  # [blocks, 1], of other blocks [blocks, groups]
    scale: Floats | None = None  # [blocks, groups]
    dmin: Floats | None = None  # [blocks, 1]
    min: Floats | None = None  # [blocks, groups]
    m: Floats | None = None  # [blocks, 1]

    def weights(self) -> Floats:
        width = self.q.shape[1]
        y = spread(self.d if self.scale is None else self.d * self.scale, width) * self.q
        if self.min is not None and self.dmin is not None:
            y = y - spread(self.dmin * self.min, width)
        return y if self.m is None else y + self.m


def blocks_of(data: Bytes, type: int | str, n: int) -> tuple[str, Bytes]:
    """The type's name, and the bytes of the first n weights (whole blocks), one row per block."""
    id = IDS[type.upper()] if isinstance(type, str) else int(type)
    name, weights, n_bytes = BLOCKS[id]
    if n % weights:
        raise ValueError(f"{n} weights are no whole number of {name} blocks of {weights}")
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    size = n // weights * n_bytes
    if flat.size < size:
        raise ValueError(f"{n} weights of {name} take {size} bytes; there are {flat.size}")
    return name, flat[:size].reshape(-1, n_bytes)


def dequantize(data: Bytes, type: int | str, n: int) -> Floats:
    """The first n weights (whole blocks) of data, as float32.  type: a GGUF id, or a name like "Q4_K"."""
    name, blocks = blocks_of(data, type, n)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite or NaN, and then so are its weights
        y = PLAIN[name](blocks) if name in PLAIN else OPENERS[name](blocks).weights()
    return np.asarray(y, np.float32).reshape(n)


def opened(data: Bytes, type: int | str, n: int) -> Opened:
    """The first n weights (whole blocks) of data, opened."""
    name, blocks = blocks_of(data, type, n)
    return OPENERS[name](blocks)


def half(b: Bytes, at: int) -> Floats:
    """The f16 field at byte `at` of every block, one column."""
    return np.ascontiguousarray(b[:, at : at + 2]).view("<f2").astype(np.float32)


def words(b: Bytes, at: int, n: int, bits: int = 16) -> npt.NDArray[np.int64]:
    """n little-endian integers of every block, from byte `at` on."""
    return np.ascontiguousarray(b[:, at : at + n * bits // 8]).view(f"<u{bits // 8}").astype(np.int64)


def nibbles(qs: Bytes) -> Ints:
    """Low nibbles of a run of bytes, then the high ones, along the last axis."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1).astype(np.int32)


def bits(b: Bytes) -> Ints:
    """The bits of each byte, lowest first, along the last axis."""
    return np.unpackbits(b, axis=-1, bitorder="little").astype(np.int32)


def floats(x: npt.NDArray[np.generic]) -> Floats:
    return x.astype(np.float32)


def spread(groups: Floats, width: int) -> Floats:
    """One value per group to one per weight, of which a block has `width`."""
    return np.repeat(groups, width // groups.shape[1], axis=1)


@cache
def grid(name: str) -> Floats:
    return np.array(values(name), np.float32).reshape(GRIDS[name].rows, GRIDS[name].width)


def signs_of(x: npt.NDArray[np.int64]) -> Floats:
    """Sign bytes (any shape with blocks first) to factors 1 and -1, one per weight."""
    return 1 - 2 * floats(bits(x.astype(np.uint8).reshape(len(x), -1)))


def sign7(x: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Seven sign bits with the eighth that makes the number of ones even."""
    parity = x ^ x >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return x | (parity & 1) << 7


# --- plain numbers ---------------------------------------------------------------------------


def f32(b: Bytes) -> Floats:
    return b.view("<f4")


def f16(b: Bytes) -> Floats:
    return half(b, 0)


def bf16(b: Bytes) -> Floats:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


# --- 32-blocks -------------------------------------------------------------------------------


def q4_0(b: Bytes) -> Opened:
    return Opened(floats(nibbles(b[:, 2:]) - 8), half(b, 0))


def q4_1(b: Bytes) -> Opened:
    return Opened(floats(nibbles(b[:, 4:])), half(b, 0), m=half(b, 2))


def q5_0(b: Bytes) -> Opened:
    return Opened(floats((nibbles(b[:, 6:]) | bits(b[:, 2:6]) << 4) - 16), half(b, 0))


def q5_1(b: Bytes) -> Opened:
    return Opened(floats(nibbles(b[:, 8:]) | bits(b[:, 4:8]) << 4), half(b, 0), m=half(b, 2))


def q8_0(b: Bytes) -> Opened:
    return Opened(floats(b[:, 2:].view(np.int8)), half(b, 0))


def iq4_nl(b: Bytes) -> Opened:
    return Opened(KV[nibbles(b[:, 2:])], half(b, 0))


def mxfp4(b: Bytes) -> Opened:
    return Opened(E2M1[nibbles(b[:, 1:])], np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128))


def nvfp4(b: Bytes) -> Opened:
    s = b[:, :4]
    exponent, mantissa = (s >> 3 & 15).astype(np.int32), floats(s & 7)
    half_scale = np.where(exponent == 0, np.ldexp(mantissa, -10), np.ldexp(8 + mantissa, exponent - 11))
    half_scale = np.where(s == 0x7F, np.float32(0), half_scale)
    return Opened(E2M1[nibbles(b[:, 4:].reshape(-1, 4, 8))].reshape(-1, 64), half_scale)


# --- superblocks -----------------------------------------------------------------------------


def two_bits(qs: Bytes) -> Ints:
    """64 bytes of 2-bit quants in element order: byte 32 h + l holds elements 128 h + 32 j + l, j = 0..3."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (qs.reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256).astype(np.int32)


def fifth_bits(b: Bytes) -> Ints:
    """32 bytes, one bit of each for every 32 weights: the lowest for the first."""
    return (b[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(-1, 256).astype(np.int32)


def q2_k(b: Bytes) -> Opened:
    scales = b[:, :16]
    return Opened(floats(two_bits(b[:, 16:80])), half(b, 80), floats(scales & 15), half(b, 82), floats(scales >> 4))


def q3_k(b: Bytes) -> Opened:
    q = two_bits(b[:, 32:96]) + 4 * fifth_bits(b[:, :32]) - 4
    sc = b[:, 96:108].astype(np.int32)
    low = np.concatenate([sc[:, :8] & 15, sc[:, :8] >> 4], axis=1)
    top = np.concatenate([sc[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return Opened(floats(q), half(b, 108), floats((low | top << 4) - 32))


def scales_mins(s: Bytes) -> tuple[Floats, Floats]:
    """The 6-bit scales and mins of Q4_K and Q5_K."""
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return floats(scales), floats(mins)


def q4_k(b: Bytes) -> Opened:
    scales, mins = scales_mins(b[:, 4:16])
    q = nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return Opened(floats(q), half(b, 0), scales, half(b, 2), mins)


def q5_k(b: Bytes) -> Opened:
    scales, mins = scales_mins(b[:, 4:16])
    q = nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256) | fifth_bits(b[:, 16:48]) << 4
    return Opened(floats(q), half(b, 0), scales, half(b, 2), mins)


def q6_k(b: Bytes) -> Opened:
    low = nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    q = (low | two_bits(b[:, 128:192]) << 4) - 32
    return Opened(floats(q), half(b, 208), floats(b[:, 192:208].view(np.int8)))


def iq4_xs(b: Bytes) -> Opened:
    low = nibbles(b[:, 4:8, None]).reshape(-1, 8)
    high = words(b, 2, 1) >> 2 * np.arange(8) & 3
    q = nibbles(b[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256)
    return Opened(KV[q], half(b, 0), floats((low | high << 4) - 32))


# The scales of the IQ types are odd numbers, 1 + 2 times what is stored; d makes up for it.
QUARTER, EIGHTH = np.float32(0.25), np.float32(0.125)


def on_grid(name: str, index: npt.NDArray[np.integer], signs: npt.NDArray[np.int64]) -> Floats:
    return grid(name)[index].reshape(-1, 256) * signs_of(signs)


def nibble_scales(scales: Bytes) -> Floats:
    """4-bit scales, low nibble first."""
    return floats(1 + 2 * nibbles(scales[:, :, None]).reshape(len(scales), -1))


def iq2_xxs(b: Bytes) -> Opened:
    parts = np.ascontiguousarray(b[:, 2:]).reshape(-1, 8, 8)
    w = np.ascontiguousarray(parts[:, :, 4:]).view("<u4").astype(np.int64)
    q = on_grid("iq2xxs", parts[:, :, :4], sign7(w >> 7 * np.arange(4) & 127))
    return Opened(q, half(b, 0) * EIGHTH, floats(1 + 2 * (w[:, :, 0] >> 28)))


def iq2_xs(b: Bytes) -> Opened:
    v = words(b, 2, 32)
    return Opened(on_grid("iq2xs", v & 511, sign7(v >> 9)), half(b, 0) * EIGHTH, nibble_scales(b[:, 66:]))


def iq2_s(b: Bytes) -> Opened:
    high = b[:, 66:74, None] >> 2 * np.arange(4, dtype=np.uint8) & 3
    index = b[:, 2:34].astype(np.int64) | high.reshape(-1, 32).astype(np.int64) << 8
    return Opened(on_grid("iq2s", index, b[:, 34:66].astype(np.int64)), half(b, 0) * EIGHTH, nibble_scales(b[:, 74:]))


def iq3_xxs(b: Bytes) -> Opened:
    w = words(b, 66, 8, 32)
    q = on_grid("iq3xxs", b[:, 2:66], sign7(w[:, :, None] >> 7 * np.arange(4) & 127))
    return Opened(q, half(b, 0) * QUARTER, floats(1 + 2 * (w >> 28)))


def iq3_s(b: Bytes) -> Opened:
    index = b[:, 2:66].astype(np.int64) | bits(b[:, 66:74]).astype(np.int64) << 8
    return Opened(on_grid("iq3s", index, b[:, 74:106].astype(np.int64)), half(b, 0), nibble_scales(b[:, 106:]))


def shifted(index: npt.NDArray[np.int64], negative: npt.NDArray[np.int64]) -> Floats:
    """Eight times what IQ1 has: its grid, 1/8 more or less."""
    delta = np.repeat(floats(1 - 2 * (negative != 0)), 256 // negative.shape[1], axis=1)
    return 8 * grid("iq1")[index].reshape(-1, 256) + delta


def iq1_s(b: Bytes) -> Opened:
    h = words(b, 34, 8)
    high = (h[:, :, None] >> 3 * np.arange(4) & 7).reshape(-1, 32)
    q = shifted(b[:, 2:34].astype(np.int64) | high << 8, h & 0x8000)
    return Opened(q, half(b, 0) * EIGHTH, floats(1 + 2 * (h >> 12 & 7)))


def iq1_m(b: Bytes) -> Opened:
    t = words(b, 48, 4)
    d_bits = (t >> 12 << 4 * np.arange(4)).sum(axis=1, keepdims=True)
    d = floats(d_bits.astype(np.uint16).view(np.float16))
    n = nibbles(b[:, 32:48, None]).reshape(-1, 32).astype(np.int64)
    q = shifted(b[:, :32].astype(np.int64) | (n & 7) << 8, n & 8)
    return Opened(q, d * EIGHTH, floats(1 + 2 * (t[:, :, None] >> 3 * np.arange(4) & 7).reshape(-1, 16)))


PLAIN: dict[str, Callable[[Bytes], Floats]] = {"F32": f32, "F16": f16, "BF16": bf16}
OPENERS: dict[str, Callable[[Bytes], Opened]] = {
    opener.__name__.upper(): opener
    for opener in (
        *(q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4, nvfp4),
        *(q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s, iq1_m),
    )
}
