"""What a Mistral Small 4 file must hold: shapes and tensors out of metadata, and the vocabulary."""

import math
from dataclasses import replace

import bad_gguf
import numpy as np
import pytest

import ms4
from ms4.models import mistral4
from ms4.models.merge_check import first_unknown
from ms4.models.mistral4 import ModelError
from ms4.models.vocabulary import Vocabulary
from ms4.quant import tiny
from ms4.quant.gguf_file import GgufFile
from ms4.quant.spelling import byte_letters, spell, unspell_lines
from ms4.quant.tiny import Tiny, write_tiny

# The real model (SPEC 1.2) as this project's own shape.
REAL = ms4.Shape(
    n_layer=36,
    n_dense_layer=0,
    n_vocab=131072,
    n_ctx_train=1048576,
    d_model=4096,
    d_dense=0,
    d_expert=2048,
    d_shared=2048,
    n_head=32,
    d_nope=64,
    d_rope=64,
    d_value=128,
    q_rank=1024,
    kv_rank=256,
    n_expert=128,
    n_expert_used=4,
    norm_eps=1e-6,
    router_scale=1.0,
    router_norm=True,
    attn_scale=128**-0.5,
    temp_beta=0.1,
    temp_length=8192,
    rope_freq=(),
)


def opened(tmp_path, **options):
    return GgufFile.open(write_tiny(tmp_path / "t.gguf", Tiny(**options))[0])


def edited(tmp_path, change, **options):
    path = write_tiny(tmp_path / "t.gguf", Tiny(**options))[0]
    with open(path, "rb") as file:
        image = bad_gguf.take_apart(file.read())
    image.arch = options.get("architecture", "mistral4")
    change(image)
    with open(path, "wb") as file:
        file.write(image.encoded())
    return GgufFile.open(path)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """The 32 inverse frequencies of the real model, as SPEC 1.3 lists them."""
    want = """1, 0.749894209, 0.562341325, 0.421696503, 0.316227766, 0.237137371, 0.177827941, 0.133352143, 0.1,
    0.0749894209, 0.0562341325, 0.0421696503, 0.0316227766, 0.0219038545, 0.0150683532, 0.010281899, 0.00694711538,
    0.00463726647, 0.00304826848, 0.00196403119, 0.0012314639, 0.000742479387, 0.000421058947, 0.000213972489,
    8.41346154e-05, 5.85854851e-06, 4.3932916e-06, 3.29450393e-06, 2.47052942e-06, 1.85263571e-06, 1.38928079e-06,
    1.04181362e-06"""
    got = mistral4.rope_frequencies(64, 10000.0, 128.0, 8192, 32.0, 1.0)
    assert got == pytest.approx([float(x) for x in want.split(",")], rel=1e-8)
    assert mistral4.rope_frequencies(4, 100.0, 1.0, 8192, 32.0, 1.0) == pytest.approx([1, 0.1])


def test_the_tensors_of_the_real_model_hold_118972826624_weights():
    dims = mistral4.expected_dims(REAL)
    layer = sum(math.prod(dims[name]) for name in mistral4._wanted(REAL, 0, {}))
    assert layer == 3_274_974_464
    whole = sum(math.prod(dims[name]) for name in mistral4.WHOLE)
    assert 36 * layer + whole == 118_972_826_624


def test_a_shape_is_what_was_written(tmp_path):
    t = Tiny()
    s = mistral4.shape_of(opened(tmp_path))
    assert (s.n_layer, s.n_vocab, s.n_ctx_train, s.d_model) == (t.n_layer, t.n_vocab, t.n_context, t.d_model)
    assert (s.n_head, s.d_nope, s.d_rope, s.d_value) == (t.n_head, t.d_nope, t.d_rope, t.d_value)
    assert (s.q_rank, s.kv_rank, s.d_expert, s.d_shared) == (t.q_rank, t.kv_rank, t.d_expert, t.d_expert)
    assert (s.n_expert, s.n_expert_used, s.n_dense_layer, s.d_dense) == (t.n_expert, t.n_used, 0, 0)
    assert (s.router_norm, s.router_scale) == (True, 1.0) and s.norm_eps == pytest.approx(1e-6)
    assert len(s.rope_freq) == t.d_rope // 2


@pytest.mark.parametrize("options", [{}, {"architecture": "deepseek2", "fused": False, "temperature_keys": True}])
def test_both_ways_of_conversion_give_one_shape(tmp_path, options):
    s = mistral4.shape_of(opened(tmp_path, **options))
    assert replace(s, temp_beta=0.1) == mistral4.shape_of(opened(tmp_path))
    assert s.temp_beta == pytest.approx(0.1) and s.temp_length == 64


@pytest.mark.parametrize("architecture", mistral4.ARCHITECTURES)
def test_query_temperature_is_on_without_its_keys(tmp_path, architecture):
    s = mistral4.shape_of(opened(tmp_path, architecture=architecture, n_original=128))
    assert (s.temp_beta, s.temp_length) == (0.1, 128)


def test_query_temperature_obeys_its_keys(tmp_path):
    def change(image):
        image.hp("attention.temperature_scale", bad_gguf.F32, 0.25)
        image.hp("attention.temperature_length", bad_gguf.U32, 77)

    s = mistral4.shape_of(edited(tmp_path, change))
    assert (s.temp_beta, s.temp_length) == (0.25, 77)


def test_attention_scale_is_plain_or_mscale_squared(tmp_path):
    gguf = opened(tmp_path, d_nope=48, d_rope=16, factor=8.0)
    assert mistral4.shape_of(gguf).attn_scale == 1 / 8
    mscale = 1 + 0.1 * math.log(8)
    assert mistral4.shape_of(gguf, "mscale2").attn_scale == pytest.approx(mscale**2 / 8, rel=1e-7)
    absent = edited(tmp_path, bad_gguf.drop("mistral4.rope.scaling.yarn_log_multiplier"), d_nope=48, factor=8.0)
    assert mistral4.shape_of(absent, "mscale2").attn_scale == pytest.approx(mscale**2 / 8, rel=1e-12)
    with pytest.raises(ValueError, match="plain or mscale2"):
        mistral4.shape_of(gguf, "mscale")


def test_no_scaling_means_plain_frequencies(tmp_path):
    s = mistral4.shape_of(edited(tmp_path, bad_gguf.hp("rope.scaling.type", bad_gguf.STR, "none")))
    assert s.rope_freq == pytest.approx([10000 ** (-i / 8) for i in range(8)])


def roles(tensors, layer):
    return {t.role for t in tensors if t.layer == layer}


@pytest.mark.parametrize(
    ("options", "layer", "has", "lacks"),
    [
        ({}, 1, {"ffn_gate_up_exps", "attn_k_b", "ffn_up_shexp"}, {"ffn_gate_exps", "attn_kv_b", "ffn_gate"}),
        ({"fused": False}, 0, {"ffn_gate_exps", "ffn_up_exps"}, {"ffn_gate_up_exps"}),
        ({"joined_kv_b": True}, 0, {"attn_kv_b"}, {"attn_k_b", "attn_v_b"}),
        ({"n_dense": 1}, 0, {"ffn_gate", "ffn_up", "ffn_down"}, {"ffn_gate_inp", "ffn_down_exps", "ffn_up_shexp"}),
        ({"n_dense": 1}, 1, {"ffn_gate_inp", "ffn_down_exps"}, {"ffn_gate"}),
        ({"n_shared": 0}, 0, {"ffn_down_exps"}, {"ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}),
    ],
)
def test_every_form_of_the_model_gives_its_table(tmp_path, options, layer, has, lacks):
    gguf = opened(tmp_path, **options)
    table = mistral4.tensors_of(gguf, mistral4.shape_of(gguf))
    found = roles(table, layer)
    assert has <= found and not lacks & found
    assert roles(table, -1) == {"token_embd", "output_norm", "output"}
    assert len(table) == len(gguf.tensors) and set(ms4.ROLES) >= {t.role for t in table}
    for t in table:
        assert t.bytes == next(i.bytes for i in gguf.tensors.values() if (i.file, i.offset) == (t.file, t.offset))


def test_tied_output_is_the_embedding_once_more(tmp_path):
    gguf = opened(tmp_path, tied=True)
    table = {t.role: t for t in mistral4.tensors_of(gguf, mistral4.shape_of(gguf)) if t.layer < 0}
    assert table["output"] == replace(table["token_embd"], role="output")


def test_two_shared_experts_are_one_of_twice_the_width(tmp_path):
    gguf = opened(tmp_path, n_shared=2)
    shape = mistral4.shape_of(gguf)
    assert shape.d_shared == 2 * 96
    table = mistral4.tensors_of(gguf, shape)
    assert next(t.dims for t in table if t.role == "ffn_down_shexp") == (192, 160, 1)


NVFP4 = {"default_type": "NVFP4", "d_model": 192, "d_expert": 128}


def test_nvfp4_tensors_come_with_their_scales(tmp_path):
    gguf = opened(tmp_path, **NVFP4)
    table = mistral4.tensors_of(gguf, mistral4.shape_of(gguf))
    experts = next(t for t in table if t.role == "ffn_gate_up_exps")
    assert experts.scales.shape == (6,) and len(set(experts.scales.tolist())) == 6
    info = gguf.tensors["blk.0.ffn_gate_up_exps.scale"]
    with open(gguf.path, "rb") as file:
        file.seek(info.offset)
        assert file.read(info.bytes) == experts.scales.tobytes()
    assert next(t for t in table if t.role == "attn_q_a_norm").scales is None


def test_one_nvfp4_scale_serves_all_experts(tmp_path):
    gguf = edited(tmp_path, lambda i: i.record("blk.0.ffn_down_exps.scale").dims.__setitem__(0, 1), **NVFP4)
    table = mistral4.tensors_of(gguf, mistral4.shape_of(gguf))
    scales = next(t.scales for t in table if t.role == "ffn_down_exps" and t.layer == 0)
    assert scales.shape == (6,) and len(set(scales.tolist())) == 1


def test_nvfp4_scales_must_fit_and_be_finite(tmp_path):
    gguf = edited(tmp_path, lambda i: i.record("blk.0.ffn_down_exps.scale").dims.__setitem__(0, 5), **NVFP4)
    with pytest.raises(ModelError, match="1 or 6 F32 scales"):
        mistral4.tensors_of(gguf, mistral4.shape_of(gguf))

    def poison(image):
        at = image.record("blk.0.ffn_down_exps.scale").offset
        image.data = image.data[:at] + np.float32("nan").tobytes() + image.data[at + 4 :]

    gguf = edited(tmp_path, poison, **NVFP4)
    with pytest.raises(ModelError, match="not finite"):
        mistral4.tensors_of(gguf, mistral4.shape_of(gguf))


def test_norms_must_not_be_quantized(tmp_path):
    def only_a_norm(image):
        record = image.record("output_norm.weight")
        record.type, record.offset = 8, 0
        image.records, image.data = [record], bytes(170)

    gguf = edited(tmp_path, only_a_norm)
    with pytest.raises(ModelError, match="Q8_0; F32, F16 or BF16 was expected"):
        mistral4._check_tensor(gguf, gguf.tensors["output_norm.weight"], "output_norm", (160, 1, 1))


def test_old_keys_of_unsplit_attention_are_understood(tmp_path):
    """Before absorbed MLA, key_length and value_length were those of a head, and every head had its own kv."""

    def change(image):
        for key in ("key_length_mla", "value_length_mla"):
            image.keys.pop(f"mistral4.attention.{key}".encode())
        image.hp("attention.key_length", bad_gguf.U32, 48)
        image.hp("attention.value_length", bad_gguf.U32, 32)
        image.hp("attention.head_count_kv", bad_gguf.U32, 3)

    gguf = edited(tmp_path, change, joined_kv_b=True)
    assert mistral4.shape_of(gguf) == mistral4.shape_of(opened(tmp_path))


# --- vocabulary -------------------------------------------------------------------------------


def test_spelling_is_gpt2s():
    letters = byte_letters()
    assert letters[ord("A")] == "A" and letters[ord(" ")] == "Ġ" and letters[ord("\n")] == "Ċ"
    assert letters[0] == "Ā" and letters[0xAD] == "Ń" and letters[255] == "ÿ" and len(set(letters)) == 256


def test_unspelling_undoes_spelling(rng):
    tokens = [rng.bytes(int(n)) for n in rng.integers(1, 9, 300)] + [bytes([b]) for b in range(256)]
    spelled = "".join("\n" + spell(token) for token in tokens).encode()
    assert unspell_lines(spelled) == tokens
    assert unspell_lines(b"") == []


@pytest.mark.parametrize("bad", ["a b", "日", "ſ", "\x7f"])
def test_unspelling_refuses_other_letters(bad):
    with pytest.raises(ValueError, match="spelling|no byte"):
        unspell_lines(f"\n{bad}\na".encode())


def test_a_vocabulary_gives_bytes_and_ranks(tmp_path):
    vocabulary = Vocabulary.from_gguf(opened(tmp_path))
    assert (vocabulary.n_vocab, vocabulary.n_control, vocabulary.bos, vocabulary.eos) == (1400, 1000, 1, 2)
    assert (vocabulary.model, vocabulary.pre, vocabulary.problem) == ("gpt2", "tekken", None)
    ranks = vocabulary.mergeable_ranks()
    assert [ranks[bytes([b])] for b in range(256)] == list(range(256))
    assert list(ranks) == list(tiny.learn_tokens(400, tiny.TEXT))
    assert vocabulary.spelling(34) == b"[THINK]" and vocabulary.spelling(1000 + 0xE9) == b"\xe9"
    assert vocabulary.is_control(999) and not vocabulary.is_control(1000)
    with pytest.raises(IndexError):
        vocabulary.spelling(1400)
    vocabulary.require_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bad_gguf.token(1000 + 65, b"AB"), "256 single bytes"),
        (bad_gguf.drop("tokenizer.ggml.eos_token_id"), "is missing"),
        (lambda i: types(i, [3] * 1000 + [1] * 399 + [3]), "among the ordinary"),
    ],
)
def test_a_vocabulary_without_text_still_serves_ids(tmp_path, change, reason):
    vocabulary = Vocabulary.from_gguf(edited(tmp_path, change))
    with pytest.raises(ModelError, match=f"no usable text vocabulary: .*{reason}"):
        vocabulary.require_text()
    assert vocabulary.n_vocab == 1400


def types(image, values):
    image.put("tokenizer.ggml.token_type", bad_gguf.ARR, bad_gguf.array(bad_gguf.I32, values))


def test_a_sentencepiece_vocabulary_is_read(tmp_path):
    vocabulary = Vocabulary.from_gguf(edited(tmp_path, bad_gguf.put("tokenizer.ggml.model", bad_gguf.STR, "llama")))
    assert vocabulary.model == "llama" and vocabulary.spelling(1000 + 32) == "Ġ".encode()


def test_only_control_tokens_are_no_text(tmp_path):
    vocabulary = Vocabulary.from_gguf(edited(tmp_path, lambda i: types(i, [3] * 1400)))
    assert vocabulary.n_control == 1400 and vocabulary.mergeable_ranks() == {} and vocabulary.problem


@pytest.mark.parametrize("table_bits", [1, 4, 20])
def test_looking_up_pieces_is_exact(monkeypatch, rng, table_bits):
    """Against a Python set; a small table makes most tokens collide."""
    monkeypatch.setattr("ms4.models.merge_check.TABLE_BITS", table_bits)

    def piece():
        return bytes(rng.choice(list(b"abc"), rng.choice([1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40])))

    for turn in range(40):
        tokens = sorted({piece() for _ in range(80)})
        asked = [tokens[i] for i in rng.integers(0, len(tokens), 100)]
        if turn % 3:
            asked.insert(int(rng.integers(100)), piece())
        want = next((p for p in asked if p not in set(tokens)), None)
        assert first_unknown(b"".join(b"\n" + p for p in asked), b"".join(b"\n" + t for t in tokens)) == want
