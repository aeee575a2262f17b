"""An open model, and the description of a file."""

import os

import numpy as np
import pytest

import ms4
from ms4.models import mistral4
from ms4.models.describe import class_of, describe
from ms4.models.model import Model
from ms4.quant.blocks import BLOCKS, IDS, dequantize
from ms4.quant.gguf_file import GgufError, GgufFile
from ms4.quant.tiny import Tiny, random_blocks, write_tiny


def test_a_model_opens_and_gives_logits(tmp_path):
    path = write_tiny(tmp_path / "t.gguf")[0]
    with Model.open(path, threads=1) as model, model.session(16) as session:
        logits = session.feed([1, 1072, 1105])
        assert logits.shape == (1400,) and np.isfinite(logits).all()
        assert model.vocabulary is model.vocabulary and model.vocabulary.n_vocab == model.shape.n_vocab
    with pytest.raises(ValueError, match="closed"):
        model.session(16)


def test_parts_and_attention_scales_reach_the_engine(tmp_path):
    parts = write_tiny(tmp_path / "p.gguf", Tiny(parts=2))
    whole = write_tiny(tmp_path / "w.gguf")[0]
    seen = {}
    for name, path, scale in (("p", parts[0], "plain"), ("w", whole, "plain"), ("m", whole, "mscale2")):
        with Model.open(path, attn_scale=scale, threads=1) as model, model.session(16) as session:
            seen[name] = session.feed([1, 1072, 1105])
    assert (seen["p"] == seen["w"]).all() and (seen["m"] != seen["w"]).any()


def test_a_file_that_changes_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = write_tiny(tmp_path / "t.gguf")[0]
    closed = []
    real = ms4.Engine.open

    def slow(*arguments, **options):
        engine = real(*arguments, **options)
        os.utime(path, ns=(0, 0))
        monkeypatch.setattr(engine, "close", lambda: (closed.append(1), type(engine).close(engine)))
        return engine

    monkeypatch.setattr(ms4.Engine, "open", slow)
    with pytest.raises(GgufError, match="changed while it was being opened"):
        Model.open(path, threads=1)
    assert closed == [1]


def test_a_description_counts_every_weight(tmp_path):
    t = Tiny(types={"experts": "Q4_K", "output": "Q6_K"}, d_model=256)
    path = write_tiny(tmp_path / "t.gguf", t)[0]
    d = describe(path)
    gguf = GgufFile.open(path)
    assert d.n_weights == sum(i.n_weights for i in gguf.tensors.values())
    assert d.bytes_weights == sum(i.bytes for i in gguf.tensors.values()) <= d.bytes == os.path.getsize(path)
    n_expert = 2 * t.n_expert * 3 * t.d_model * t.d_expert
    classes = {c.name: c for c in d.classes}
    assert classes["experts"].n_weights == n_expert
    assert sum(c.n_weights for c in d.classes) == d.n_weights
    assert sum(c.bytes for c in d.classes) == d.bytes_weights
    assert d.n_active == d.n_weights - n_expert // 2 - t.n_vocab * t.d_model  # 3 of 6 experts; the lookup is none
    assert dict(classes["output"].types) == {"Q6_K": classes["output"].bytes}
    # Expert rows of 256 take Q4_K, the down rows of 96 fall back to Q5_0.
    assert {kind for kind, _ in classes["experts"].types} == {"Q4_K", "Q5_0"}
    assert (d.name, d.architecture, d.mmproj, d.text_problem) == ("ms4 tiny", "mistral4", None, None)
    assert len(d.template_sha256) == 64 and d.template_bytes == 81


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norms"),
        ("blk.3.attn_kv_a_norm.weight", "norms"),
        ("blk.3.attn_kv_a_mqa.weight", "attention"),
        ("blk.3.ffn_gate_inp.weight", "router"),
        ("blk.3.ffn_gate_up_exps.weight", "experts"),
        ("blk.3.ffn_down_shexp.weight", "shared expert"),
        ("blk.3.ffn_down.weight", "dense"),
    ],
)
def test_tensors_have_their_class(name, wanted):
    assert class_of(name) == wanted


@pytest.mark.parametrize("kind", list(IDS))
def test_random_blocks_have_the_deviation_that_was_asked_for(kind, rng):
    n = 256 * 64
    raw = random_blocks(rng, kind, n, 0.05)
    assert raw.dtype == np.uint8 and len(raw) == n // BLOCKS[IDS[kind]].weights * BLOCKS[IDS[kind]].bytes
    weights = dequantize(raw, kind, n)
    assert np.isfinite(weights).all()
    if kind != "NVFP4":  # whose scale is a tensor of its own
        assert 0.02 < weights.std() < 0.13 and abs(weights.mean()) < 0.02


def test_the_same_seed_writes_the_same_file(tmp_path):
    first, second = (write_tiny(tmp_path / name)[0] for name in ("a.gguf", "b.gguf"))
    other = write_tiny(tmp_path / "c.gguf", Tiny(seed=1))[0]
    data = [open(path, "rb").read() for path in (first, second, other)]
    assert data[0] == data[1] != data[2]


def test_every_way_to_write_a_model_is_one_that_is_read(tmp_path):
    for options in ({"joined_kv_b": True}, {"n_dense": 2}, {"tied": True, "fused": False}, {"n_shared": 3}):
        path = write_tiny(tmp_path / "t.gguf", Tiny(**options))[0]
        gguf = GgufFile.open(path)
        assert mistral4.tensors_of(gguf, mistral4.shape_of(gguf))
        assert describe(path).n_active > 0
