"""The NumPy reference against numbers from outside: tables of the specification, and logits and image features that
transformers computed from the same files.  The engine's own tests take the reference as right."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import SEED
from fixtures import IMAGE, MMPROJ, image_references, references
from fixtures import bravo as fixture
from yardstick import assert_near

import ms4
from ms4.models import reference as ref
from ms4.models.image import load_image, preprocess
from ms4.models.mistral4 import shape_of
from ms4.quant.gguf_file import GgufFile

SHAPE = ms4.Shape(
    n_layer=3,
    n_dense_layer=1,
    n_vocab=40,
    n_ctx_train=512,
    d_model=24,
    d_dense=20,
    d_expert=10,
    d_shared=14,
    n_head=3,
    d_nope=8,
    d_rope=8,
    d_value=12,
    q_rank=16,
    kv_rank=14,
    n_expert=6,
    n_expert_used=2,
    norm_eps=1e-6,
    router_scale=1.25,
    router_norm=True,
    attn_scale=ref.attention_scale(16, "mscale2", 8),
    temp_beta=0.1,
    temp_length=8,
    rope_freq=tuple(ref.yarn(8, 10000, 8, 16, 32, 1)),
)


def random_weights(s: ms4.Shape) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)

    def matrix(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims) / np.sqrt(dims[-1])

    w = {"token_embd.weight": matrix(s.n_vocab, s.d_model) * 4, "output_norm.weight": 1 + 0.1 * matrix(s.d_model)}
    for i in range(s.n_layer):
        layer = {
            "attn_norm": 1 + 0.1 * matrix(s.d_model),
            "attn_q_a": matrix(s.q_rank, s.d_model),
            "attn_q_a_norm": 1 + 0.1 * matrix(s.q_rank),
            "attn_q_b": matrix(s.n_head * (s.d_nope + s.d_rope), s.q_rank),
            "attn_kv_a_mqa": matrix(s.kv_rank + s.d_rope, s.d_model),
            "attn_kv_a_norm": 1 + 0.1 * matrix(s.kv_rank),
            "attn_k_b": matrix(s.n_head, s.kv_rank, s.d_nope),
            "attn_v_b": matrix(s.n_head, s.d_value, s.kv_rank),
            "attn_output": matrix(s.d_model, s.n_head * s.d_value),
            "ffn_norm": 1 + 0.1 * matrix(s.d_model),
            "ffn_gate_inp": matrix(s.n_expert, s.d_model),
            "ffn_gate_up_exps": matrix(s.n_expert, 2 * s.d_expert, s.d_model),
            "ffn_down_exps": matrix(s.n_expert, s.d_model, s.d_expert),
        }
        for suffix, width in (("", s.d_dense), ("_shexp", s.d_shared)):
            layer[f"ffn_gate{suffix}"] = matrix(width, s.d_model)
            layer[f"ffn_up{suffix}"] = matrix(width, s.d_model)
            layer[f"ffn_down{suffix}"] = matrix(s.d_model, width)
        w.update({f"blk.{i}.{name}.weight": array for name, array in layer.items()})
    return w


IDS = np.arange(30) * 7 % SHAPE.n_vocab


# --- by hand ------------------------------------------------------------------------------------------------------


def test_yarn_gives_the_published_frequencies():
    want = {0: 1, 8: 0.1, 12: 0.0316227766, 13: 0.0219038545, 20: 0.0012314639, 25: 5.85854851e-06, 31: 1.04181362e-06}
    freq = ref.yarn(64, 10000, 128, 8192, 32, 1)
    assert {i: freq[i] for i in want} == pytest.approx(want, rel=1e-8)


def test_the_query_temperature_steps_every_8192_positions():
    want = {0: 1, 8191: 1, 8192: 1.06931472, 16384: 1.10986123, 131072: 1.28332133, 1048575: 1.48520303}
    assert ref.temperature(np.array(list(want)), 0.1, 8192) == pytest.approx(list(want.values()), rel=1e-8)


def test_the_two_attention_scales():
    assert ref.attention_scale(128, "plain", 128) == pytest.approx(0.0883883476, rel=1e-8)
    assert ref.attention_scale(128, "mscale2", 128) == pytest.approx(0.1949694947, rel=1e-8)


def test_rope_turns_neighbours():
    turned = ref.rotate(np.array([1.0, 0.0, 0.0, 2.0]), np.array([np.pi / 2, np.pi]))
    assert turned == pytest.approx([0, 1, 0, -2], abs=1e-15)


def test_the_router_weighs_its_two_best_experts():
    # Down gives 1 for gate = up = 1, times silu(1); the router's logits are ln 1, ln 3, ln 2, so the best two weigh
    # 3/5 and 2/5 when normalised, 3/6 and 2/6 when not.
    layer = {"ffn_gate_inp": np.log([[1.0], [3.0], [2.0]])}
    layer["ffn_gate_exps"] = layer["ffn_up_exps"] = np.ones((3, 1, 1))
    layer["ffn_down_exps"] = np.array([100.0, 10.0, 1.0]).reshape(3, 1, 1)
    shape = replace(SHAPE, d_shared=0, n_expert=3, n_expert_used=2, router_scale=2.0)
    silu1 = 1 / (1 + np.exp(-1))
    assert ref.moe(layer, shape, np.ones((1, 1)))[0, 0] == pytest.approx(2 * silu1 * (10 * 3 / 5 + 2 / 5))
    plain = replace(shape, router_norm=False)
    assert ref.moe(layer, plain, np.ones((1, 1)))[0, 0] == pytest.approx(2 * silu1 * (10 * 3 / 6 + 2 / 6))


def test_the_merger_takes_channels_first():
    # Two channels, one block of 2 x 2 patches: the merged row is c0 of the four patches, then c1.
    patches = np.array([[[1.0, 5.0], [2.0, 6.0]], [[3.0, 7.0], [4.0, 8.0]]])
    weights = {"mm.patch_merger.weight": np.eye(8), "mm.1.weight": np.eye(8), "mm.2.weight": np.eye(8)}
    shape = ref.VisionShape(n_layer=0, n_head=1, patch=14, merge=2, norm_eps=1e-5, activation="silu")
    assert ref.project(weights, shape, 10 * patches)[0] == pytest.approx(10 * np.arange(1.0, 9.0))


# --- one way and the other ----------------------------------------------------------------------------------------


@cache
def logits() -> np.ndarray:
    return ref.forward(random_weights(SHAPE), SHAPE, IDS)


def test_absorbed_attention_is_direct_attention():
    assert np.abs(ref.forward(random_weights(SHAPE), SHAPE, IDS, absorbed=True) - logits()).max() < 1e-10


@pytest.mark.parametrize("chunk", [1, 7])
def test_a_prompt_in_pieces_is_the_prompt_at_once(chunk):
    weights, kv = random_weights(SHAPE), ref.KvCache(SHAPE)
    pieces = [
        ref.forward(weights, SHAPE, IDS[i : i + chunk], cache=kv, absorbed=i % 2 == 0)
        for i in range(0, len(IDS), chunk)
    ]
    assert np.abs(np.concatenate(pieces) - logits()).max() < 1e-10


def test_rows_stand_in_for_embeddings():
    weights, ids = random_weights(SHAPE), IDS.copy()
    rows = weights["token_embd.weight"][ids[[3, 9]]]
    ids[[3, 9]] = ms4.ROW
    assert np.abs(ref.forward(weights, SHAPE, ids, rows) - logits()).max() < 1e-10


def test_other_layouts_of_the_same_weights():
    weights = random_weights(SHAPE)
    weights["output.weight"] = weights["token_embd.weight"].copy()
    for i in range(SHAPE.n_layer):
        both = weights.pop(f"blk.{i}.ffn_gate_up_exps.weight")
        weights[f"blk.{i}.ffn_gate_exps.weight"] = both[:, : SHAPE.d_expert]
        weights[f"blk.{i}.ffn_up_exps.weight"] = both[:, SHAPE.d_expert :]
        k_b, v_b = weights.pop(f"blk.{i}.attn_k_b.weight"), weights.pop(f"blk.{i}.attn_v_b.weight")
        heads = [np.concatenate([k.T, v]) for k, v in zip(k_b, v_b, strict=True)]
        weights[f"blk.{i}.attn_kv_b.weight"] = np.concatenate(heads)
    assert np.abs(ref.forward(weights, SHAPE, IDS) - logits()).max() < 1e-10


# --- against transformers -----------------------------------------------------------------------------------------


@cache
def bravo(name: str) -> tuple[GgufFile, dict[str, np.ndarray]]:
    file = GgufFile.open(MMPROJ if name == "mmproj" else fixture(name))
    return file, ref.load_weights(file)


# At an original context of 64, 74 positions cross one step of the query temperature.
@pytest.mark.parametrize("scale", ["mscale2", "plain"])
def test_logits_are_those_of_transformers(scale):
    file, weights = bravo("Q4_K_M")
    want = references()
    positions = want["positions"][want["positions"] < 74]
    got = ref.forward(weights, shape_of(file, scale), want["ids"][:74])[positions]
    assert len(positions) > 5
    assert_near(got, want[scale][: len(positions)], 5e-6)


def test_image_features_and_the_logits_after_them_are_those_of_transformers():
    want = image_references()
    tower, tower_weights = bravo("mmproj")
    meta = tower.metadata
    shape = ref.VisionShape(
        n_layer=meta["clip.vision.block_count"],
        n_head=meta["clip.vision.attention.head_count"],
        patch=meta["clip.vision.patch_size"],
        merge=meta["clip.vision.spatial_merge_size"],
        norm_eps=meta["clip.vision.attention.layer_norm_epsilon"],
        activation="silu" if meta.get("clip.use_silu") else "gelu",
    )
    pixels = preprocess(load_image(IMAGE))
    features = ref.vision(tower_weights, shape, pixels.array)
    assert_near(features, want["features"], 5e-6)

    file, weights = bravo("Q4_K_M")
    ids = np.where(want["ids"] == 10, ms4.ROW, want["ids"])
    assert np.count_nonzero(ids == ms4.ROW) == pixels.gw * pixels.gh
    got = ref.forward(weights, shape_of(file, "mscale2"), ids, features)
    assert_near(got[want["positions"]], want["logits"], 5e-6)
