"""Float32 to blocks: exact where blocks can be, no worse than llama.cpp's quantizer, and sound on extreme weights."""

import math
from pathlib import Path

import numpy as np
import pytest

from ms4.quant.blocks import BLOCKS, IDS, dequantize
from ms4.quant.quantize import CHUNK, ENCODERS, quantize

pytestmark = pytest.mark.filterwarnings("error")
ROWS = np.load(Path(__file__).parent / "data" / "bravo-rows.npz")  # 16,384 weights each, before they were quantized
SMALL = 256  # weights of the longest block

# Root of the mean squared error over that of these weights, in files that llama.cpp b11434 made.
PEERS = {
    "Q8_0": ("blk.0.attn_q_a", 0.005398),
    "Q4_0": ("blk.0.attn_q_a", 0.086562),
    "Q4_K": ("blk.0.attn_q_a", 0.071632),
    "Q5_0": ("blk.0.attn_k_b", 0.042813),
    "Q6_K": ("blk.2.ffn_down_shexp", 0.017574),
    "Q5_K": ("blk.0.attn_output", 0.036568),
    "Q5_1": ("blk.0.attn_k_b", 0.037865),
    "Q3_K": ("blk.0.attn_q_a", 0.151621),
    "Q2_K": ("blk.0.attn_q_a", 0.299762),
}
SCALES = (1, 8, 9, 31, 44, 55, 60, 63)  # of the eight groups of a superblock
BLOCKED = [name for name in ENCODERS if name not in ("F32", "F16", "BF16")]


def there_and_back(x, kind):
    x = np.asarray(x, np.float32)
    return dequantize(quantize(x, kind), kind, x.size).reshape(x.shape)


def relative_error(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return math.sqrt(((x - y) ** 2).sum() / (x * x).sum())


@pytest.mark.parametrize("kind", PEERS)
def test_the_error_is_not_larger_than_that_of_the_peer(kind):
    name, theirs = PEERS[kind]
    x = ROWS[name].astype(np.float32)
    assert relative_error(x, there_and_back(x, kind)) <= theirs


def test_every_type_that_has_blocks_is_compared_or_has_a_sibling_that_is():
    assert set(BLOCKED) - set(PEERS) == {"Q4_1"}


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("Q8_0", 0.25 * np.linspace(-127, 127, 32).round()),
        ("Q4_0", -0.5 * np.tile(np.arange(-8, 8), 2)),
        ("Q5_0", 0.125 * np.arange(-16, 16)),
        ("Q4_1", 3 + 0.5 * np.tile(np.arange(16), 2)),
        ("Q5_1", 0.25 * np.arange(32) - 40),
        # Groups of 16 or 32 whose scales are whole multiples of one factor, and whose mins are of another.
        ("Q2_K", np.concatenate([2**-4 * s * np.tile(np.arange(4), 4) - 0.5 * (15 - s) for s in range(16)])),
        ("Q3_K", np.concatenate([0.25 * s * (np.arange(16) % 8 - 4) for s in (*range(-32, -25), *range(23, 32))])),
        ("Q4_K", np.concatenate([0.5 * s * (np.arange(32) % 16) - 0.25 * (64 - s) for s in SCALES])),
        ("Q5_K", np.concatenate([0.5 * s * np.arange(32) - 2 * (64 - s) for s in SCALES])),
        ("Q6_K", np.concatenate([0.25 * s * (4 * np.arange(16) - 32) for s in (*range(-128, -120), *range(120, 128))])),
    ],
)  # fmt: skip
def test_weights_that_a_block_can_hold_are_kept(kind, block):
    assert relative_error(block.astype(np.float32), there_and_back(block, kind)) < 1e-6


def test_plain_numbers_are_rounded_to_nearest_even():
    assert there_and_back([1.5, -2, 1e-30], "F32").tolist() == [1.5, -2, np.float32(1e-30)]
    assert there_and_back([1 + 2**-11, 1 + 3 * 2**-11, -65504], "F16").tolist() == [1, 1 + 2**-9, -65504]
    assert there_and_back([1 + 2**-8, 1 + 3 * 2**-8, -(2.0**127)], "BF16").tolist() == [1, 1 + 2**-6, -(2.0**127)]


@pytest.mark.parametrize("kind", ENCODERS)
def test_zeros_stay_zeros(kind):
    assert not there_and_back(np.zeros(2 * SMALL), kind).any()


# Halves have steps of 6e-8 near zero: too coarse for the min of weights that are smaller than a hundred of them.
@pytest.mark.parametrize(
    ("kind", "scale"),
    [(k, s) for k in ENCODERS for s in (1e-9, 1e-6, 1e-3, 1.0, 300.0) if s > 1e-5 or k not in ("Q4_1", "Q5_1")],
)
def test_extreme_weights_are_never_worse_than_zeros(kind, scale, rng):
    x = rng.standard_normal((12, SMALL)) * scale
    x[1] = np.abs(x[1])
    x[2] = -np.abs(x[2])
    x[3] = scale
    x[4] = -scale
    x[5] += 50 * scale
    x[6, 1:] = 0
    x[7] *= x[7] ** 4
    x[8, 100] = 90 * scale
    x[9] = np.where(rng.random(SMALL) < 0.95, 0, x[9])
    x[10, ::3] *= 1e-3
    x = np.clip(x, -60_000, 60_000).astype(np.float32)
    y = there_and_back(x, kind)
    assert np.isfinite(y).all()
    error, energy = ((x - y) ** 2).sum(1), (x * x).sum(1)
    assert (error <= energy * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q5_K"])
def test_a_lone_tiny_weight_is_never_worse_than_a_zero(kind):
    x = np.zeros((4000, SMALL), np.float32)
    # Among these the coarse halves of the mins gave up to 1.6 times as much.
    x[:, 0] = -np.geomspace(1e-6, 1e-2, len(x))
    error = (there_and_back(x, kind) - x).astype(np.float64)
    assert ((error**2).sum(1) <= x[:, 0].astype(np.float64) ** 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", BLOCKED)
def test_constant_weights_are_kept_to_a_thousandth(kind):
    for value in (3.0, -3.0):
        assert np.abs(there_and_back(np.full(SMALL, value), kind) - value).max() <= 3e-3


def test_more_bits_lose_less(rng):
    x = rng.standard_normal(40 * SMALL).astype(np.float32)
    errors = [relative_error(x, there_and_back(x, k)) for k in ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")]
    assert errors == sorted(errors, reverse=True)
    assert relative_error(x, there_and_back(x, "F16")) < errors[-1] / 4


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_block_depends_on_nothing_around_it(kind, rng):
    x = rng.standard_normal((CHUNK // SMALL + 3, SMALL)).astype(np.float32)
    whole = quantize(x, kind)
    assert whole.shape == (len(x), SMALL // BLOCKS[IDS[kind]].weights * BLOCKS[IDS[kind]].bytes)
    assert np.array_equal(quantize(x[CHUNK // SMALL - 1 :], kind), whole[CHUNK // SMALL - 1 :])


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(kind, bad):
    x = np.ones(SMALL, np.float32)
    x[17] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(x, kind)


@pytest.mark.parametrize("kind", sorted(set(ENCODERS) - {"F32"}))
def test_what_is_too_large_for_the_type_is_refused(kind):
    with pytest.raises(ValueError, match="too large"):
        quantize(np.linspace(-3.4e38, 3.4e38, SMALL, dtype=np.float32), kind)


def test_rows_and_types_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no whole number of Q4_K blocks of 256"):
        quantize(np.ones((2, 128), np.float32), "Q4_K")
    with pytest.raises(ValueError, match="IQ3_S can be read but not written"):
        quantize(np.ones(256, np.float32), "IQ3_S")
