"""The engine against reference_bits.py: the same bits at every position, for every block type in every place.

A wrong scale in one block of a small tensor, a sum in another order or a value rounded once too often shows here; what
is right at all, test_reference.py and test_golden.py say.
"""

from dataclasses import replace

import bad_gguf
import numpy as np
import pytest
from conftest import SEED
from fixtures import MMPROJ, MODEL, bravo, references
from make_mmproj import write_mmproj
from yardstick import assert_engine_has_the_bits, assert_near, assert_same_bits, errors

import ms4
from ms4 import ffi, lib
from ms4.models import mistral4, pixtral, reference, reference_bits
from ms4.models import reference_ops as ops
from ms4.models.model import Model
from ms4.models.vision import VisionEncoder
from ms4.quant.blocks import BLOCKS, IDS
from ms4.quant.gguf_file import GgufFile
from ms4.quant.tiny import Tiny, write_tiny

not_in_double = pytest.mark.skipif(ms4.probe().isa == "ref", reason="ref sums in double: its bits are its own")

# Shapes whose rows end inside a superblock, and layouts as converters write them.
LAYOUTS = {
    "fused": Tiny(seed=SEED),
    "separate": Tiny(fused=False, architecture="deepseek2", temperature_keys=True, seed=SEED),
    "joined kv_b": Tiny(joined_kv_b=True, seed=SEED),
    "dense layer, tied output": Tiny(n_dense=1, tied=True, seed=SEED),
    "two shared experts": Tiny(n_shared=2, seed=SEED),
    "no shared expert": Tiny(n_shared=0, seed=SEED),
    "split": Tiny(parts=3, seed=SEED),
    "all experts": Tiny(n_used=6, seed=SEED),
    "weights that add up to less": Tiny(router_norm=False, router_scale=2.5, n_expert=21, seed=SEED),
}
# Every tensor in whole superblocks, so that it can have any type.
WIDE = Tiny(
    n_layer=1,
    d_model=256,
    d_expert=256,
    d_dense=256,
    n_head=2,
    d_nope=256,
    d_rope=64,
    d_value=128,
    q_rank=256,
    kv_rank=256,
    n_expert=4,
    n_used=2,
    n_vocab=1256,
    seed=SEED,
)
# What a tensor is for: its name in the file, and a shape that has it.
ROLES = {
    "embedding": ("token_embd", WIDE),
    "output": ("output", WIDE),
    "tied": ("token_embd", replace(WIDE, tied=True)),
    "q_a": ("attn_q_a", WIDE),
    "q_b": ("attn_q_b", WIDE),
    "kv_a": ("attn_kv_a_mqa", WIDE),
    "k_b": ("attn_k_b", WIDE),
    "v_b": ("attn_v_b", WIDE),
    "joined kv_b": ("attn_kv_b", replace(WIDE, joined_kv_b=True)),
    "attention output": ("attn_output", WIDE),
    "router": ("ffn_gate_inp", WIDE),
    "shared gate": ("ffn_gate_shexp", WIDE),
    "shared up": ("ffn_up_shexp", WIDE),
    "shared down": ("ffn_down_shexp", WIDE),
    "dense gate": ("ffn_gate", replace(WIDE, n_layer=2, n_dense=1)),
    "dense up": ("ffn_up", replace(WIDE, n_layer=2, n_dense=1)),
    "dense down": ("ffn_down", replace(WIDE, n_layer=2, n_dense=1)),
    "experts' gate": ("ffn_gate_exps", replace(WIDE, fused=False)),
    "experts' up": ("ffn_up_exps", replace(WIDE, fused=False)),
    "experts' gate and up": ("ffn_gate_up_exps", WIDE),
    "experts' down": ("ffn_down_exps", WIDE),
}
KINDS = [block.name for block in BLOCKS.values()]
# One of each family: with scales, with mins, in 32-blocks without and with a min, in 16-blocks, in floats.
FAMILIES = ("Q6_K", "Q4_K", "Q4_0", "Q5_1", "NVFP4", "NVFP4 alone", "F16")


def pairs(kinds, others):
    """Every kind with every one of the others; for every minute one of FAMILIES with each, all of them in turn."""
    some = [kind for kind in FAMILIES if kind in kinds]
    quick = {(some[i % len(some)], other) for i, other in enumerate(others)}
    every = [(kind, other) for other in others for kind in kinds]
    return [pytest.param(*pair, id=", ".join(pair), marks=() if pair in quick else pytest.mark.slow) for pair in every]


def every(kinds):
    return [pytest.param(kind, marks=() if kind in FAMILIES else pytest.mark.slow) for kind in kinds]


@pytest.fixture
def ids(rng):
    return lambda n: rng.integers(0, 1256, n)


@not_in_double
@pytest.mark.parametrize("kind, role", pairs((*KINDS, "NVFP4 alone"), ROLES))
def test_d1_a_tensor_of_any_type_in_any_role_gives_the_bits(kind, role, tmp_path, ids):
    name, shape = ROLES[role]
    kind, scales = kind.removesuffix(" alone"), not kind.endswith(" alone")  # NVFP4's float for a whole tensor
    path = write_tiny(tmp_path / "t.gguf", replace(shape, types={name: kind}, nvfp4_scales=scales))[0]
    tensors = GgufFile.open(path).tensors
    of_role = [t for n, t in tensors.items() if n.split(".")[-2:] == [name, "weight"]]
    assert of_role and all(t.type == IDS[kind] for t in of_role)
    assert any(n.endswith(f"{name}.scale") for n in tensors) == (kind == "NVFP4" and scales)
    assert_engine_has_the_bits(path, ids(9))


@not_in_double
@pytest.mark.parametrize("kind", every(KINDS))
def test_a_file_of_one_type_gives_the_bits(kind, tmp_path, ids):
    path = write_tiny(tmp_path / "t.gguf", replace(WIDE, n_layer=3, default_type=kind))[0]
    assert_engine_has_the_bits(path, ids(20))


@not_in_double
@pytest.mark.parametrize("kind, layout", pairs(("F32", "BF16", "Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "MXFP4"), LAYOUTS))
def test_every_layout_gives_the_bits(layout, kind, tmp_path, ids):
    types = dict.fromkeys(("embedding", "output", "attention", "experts", "shared"), kind)
    path = write_tiny(tmp_path / "t.gguf", replace(LAYOUTS[layout], types=types))[0]
    assert_engine_has_the_bits(path, ids(40))


@not_in_double
@pytest.mark.slow
def test_many_segments_give_the_bits(tmp_path, ids):
    path = write_tiny(tmp_path / "t.gguf", replace(LAYOUTS["fused"], n_vocab=1256))[0]
    assert_engine_has_the_bits(path, ids(1300))  # attention works on segments of 128 keys


@not_in_double
@pytest.mark.parametrize("name, scale", [("Q4_K_M", "plain"), pytest.param("F16", "mscale2", marks=pytest.mark.slow)])
def test_the_fixtures_have_the_bits(name, scale):
    tokens = references()["ids"][:80]  # the temperature of queries begins at 64
    assert_engine_has_the_bits(bravo(name), tokens, scale)


def assert_rows_have_the_bits(path, pixels):
    with Model.open(MODEL) as model:
        vision = VisionEncoder(model.engine, pixtral.Tower.read(path)).vision
        got = vision.encode(pixels)
    s = vision.shape
    shape = reference.VisionShape(s.n_layer, s.n_head, s.patch_size, s.merge, s.eps, "gelu" if s.gelu else "silu")
    assert_same_bits(got, reference_bits.vision(reference_bits.load_weights(GgufFile.open(path)), shape, pixels))


@not_in_double
@pytest.mark.parametrize("size", [(28, 28), (196, 140), (28, 280)])
def test_rows_of_an_image_have_the_bits(size, rng):
    assert_rows_have_the_bits(MMPROJ, rng.standard_normal((3, *size)).astype(np.float32))


@not_in_double
@pytest.mark.parametrize("kind, activation", pairs(("F16", "Q8_0", "Q5_1", "Q6_K"), ["silu", "gelu"]))
def test_rows_of_any_tower_have_the_bits(kind, activation, tmp_path, rng):
    path = tmp_path / "mmproj.gguf"
    write_mmproj(path, layers=2, width=256, heads=2, out_width=256, kind=kind)
    file = bad_gguf.take_apart(path.read_bytes())
    for name in ("silu", "gelu"):
        file.put(f"clip.use_{name}", bad_gguf.BOOL, name == activation)
    path.write_bytes(file.encoded())
    assert_rows_have_the_bits(path, rng.standard_normal((3, 84, 56)).astype(np.float32))


# --- the yardstick itself -----------------------------------------------------------------------------------------


def assert_without_roundings_it_is_the_reference(path, tokens, monkeypatch):
    """8 and 16 bits are all that parts the two: with numbers left as they are, float32's own error remains."""
    gguf, gaps = GgufFile.open(path), []
    shape, weights = mistral4.shape_of(gguf), reference_bits.load_weights(gguf)
    want = reference.forward(reference.load_weights(gguf), shape, tokens, gaps=gaps)
    rounded = reference_bits.forward(weights, shape, tokens)
    monkeypatch.setattr(ops, "nearest", lambda x: x.astype(np.float64))
    # Where two experts nearly tie, float32 may choose the other one; and what comes after may attend to that.
    near_ties = np.flatnonzero(np.min(gaps, axis=0) < 1e-5) if gaps else []
    n = near_ties[0] if len(near_ties) else len(tokens)
    assert_near(reference_bits.forward(weights, shape, tokens[:n]), want[:n], 2e-6)
    assert errors(rounded, want).max() > 1e-5


@pytest.mark.parametrize(
    "layout", ["fused", *(pytest.param(k, marks=pytest.mark.slow) for k in LAYOUTS if k != "fused")]
)
def test_without_its_roundings_every_layout_is_the_reference(layout, tmp_path, monkeypatch, ids):
    types = dict.fromkeys(("embedding", "output", "attention", "experts", "shared"), "F32")
    path = write_tiny(tmp_path / "t.gguf", replace(LAYOUTS[layout], types=types))[0]
    assert_without_roundings_it_is_the_reference(path, ids(40), monkeypatch)


@pytest.mark.parametrize("kind", every(KINDS))
def test_without_its_roundings_every_type_is_the_reference(kind, tmp_path, monkeypatch, ids):
    path = write_tiny(tmp_path / "t.gguf", replace(WIDE, default_type=kind))[0]
    assert_without_roundings_it_is_the_reference(path, ids(12), monkeypatch)


def test_fma_rounds_once():
    # 1 + 2^-23 + 2^-24 (1 - 2^-46) is just below the middle of two floats; in float64 it is that middle.
    a, b, c = np.float32(2**-12 + 2**-35), np.float32(2**-12 - 2**-35), np.float32(1 + 2**-23)
    assert ops.fma(a, b, c) == c and np.float32(float(a) * float(b) + float(c)) == np.float32(1 + 2**-22)
    assert ops.fma(-a, b, -c) == -c
    tiny = np.float32(2.0**-149)  # half of it and a little more, in float64 just half
    assert ops.fma(np.float32(0.5 + 2**-24), tiny, 0) == tiny and ops.fma(np.float32(0.5), tiny, 0) == 0


@not_in_double
def test_fma_is_the_one_of_the_machine(rng):
    kernels = lib.ms4_ops_for(ms4.probe().isa.encode())
    for power in (-30, -24, -12, 0, 12, 24, 30):
        x, y = rng.standard_normal((2, 4096)).astype(np.float32)
        scale = np.ldexp(rng.standard_normal(1), power).astype(np.float32)
        want = y.copy()
        kernels.add_scaled(ffi.from_buffer("float[]", want), ffi.from_buffer("float[]", x), scale[0], len(x))
        assert np.array_equal(ops.fma(scale, x, y), want)
