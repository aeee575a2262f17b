"""The converter: the same files as llama.cpp's from the same weights, types by preset, and clean ends of all errors."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from fixtures import MMPROJ as TOWER
from fixtures import MODEL, references
from make_hf import hf_tensors, write_hf, write_safetensors
from yardstick import assert_near

from ms4.models.convert import PRESETS, convert, type_of
from ms4.models.model import Model
from ms4.models.pixtral import Tower
from ms4.quant.blocks import BLOCKS, dequantize
from ms4.quant.gguf_file import GgufFile, Strings

ROOT = Path(__file__).parents[1]

# What that converter does not write, and what follows from the name of the folder and from the preset.
MORE = {f"mistral4.{key}" for key in ("attention.temperature_length", "attention.temperature_scale")}
MORE |= {"mistral4.expert_gating_func"}
OTHER = {"general.name", "general.size_label", "general.file_type"}
BREAK = {"v.token_embd.img_break"}


@pytest.fixture(scope="module")
def bravo_hf(tmp_path_factory):
    """The weights of tests/data, dequantized, and its tower, as a folder like the one that they came from."""
    folder = tmp_path_factory.mktemp("hf") / "bravo"
    write_hf(folder, MODEL, TOWER)
    return folder


@pytest.fixture
def folder(bravo_hf, tmp_path):
    """A copy of it that a test may damage."""
    copy = tmp_path / "bravo"
    copy.mkdir()
    for path in bravo_hf.iterdir():
        os.link(path, copy / path.name)
    return copy


def change(folder, name, edit):
    path = folder / name
    value = json.loads(path.read_text())
    edit(value)
    path.unlink()  # it is a link to the original
    path.write_text(json.dumps(value))


def data(file, tensor):
    with open(file.paths[tensor.file], "rb") as stream:
        stream.seek(tensor.offset)
        return stream.read(tensor.bytes)


def comparable(value):
    return list(value) if isinstance(value, Strings) else value.tolist() if isinstance(value, np.ndarray) else value


def floats(file, name):
    tensor = file.tensors[name]
    return dequantize(np.frombuffer(data(file, tensor), np.uint8), tensor.type, tensor.n_weights)


def assert_same_tensors(path, wanted):
    """The same names, dimensions and numbers; of the tower the same types, too; of the text model floats."""
    mine, theirs = GgufFile.open(path), GgufFile.open(wanted)
    is_tower = theirs.metadata["general.type"] == "mmproj"
    assert set(mine.tensors) == set(theirs.tensors) | (BREAK if is_tower else set())
    for name, tensor in theirs.tensors.items():
        found = mine.tensors[name]
        assert found.dims == tensor.dims, name
        assert BLOCKS[found.type].name == "F32" if not is_tower else found.type == tensor.type, name
        assert np.array_equal(floats(mine, name), floats(theirs, name)), name
    return mine, theirs


def test_the_files_are_those_of_the_peer(bravo_hf, tmp_path):
    convert(bravo_hf, tmp_path / "text.gguf", "F32", mmproj=tmp_path / "mmproj.gguf")
    for path, wanted, more in (("text.gguf", MODEL, MORE), ("mmproj.gguf", TOWER, set())):
        mine, theirs = assert_same_tensors(tmp_path / path, wanted)
        assert set(mine.metadata) - set(theirs.metadata) == more
        for key in set(theirs.metadata) - OTHER:
            assert comparable(mine.metadata[key]) == comparable(theirs.metadata[key]), key


def test_the_temperature_of_the_queries_is_written_down(bravo_hf, tmp_path):
    convert(bravo_hf, tmp_path / "text.gguf", "F16", name="Bravo")
    metadata = GgufFile.open(tmp_path / "text.gguf").metadata
    assert metadata["mistral4.attention.temperature_scale"] == pytest.approx(0.1)
    assert metadata["mistral4.attention.temperature_length"] == 64
    assert metadata["general.name"] == "Bravo"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_numbers_of_16_bits_are_read(tmp_path, dtype):
    write_hf(tmp_path / "hf", MODEL, TOWER, dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "text.gguf", "F32")
    name = "blk.1.attn_k_b.weight"
    found, wanted = (floats(GgufFile.open(path), name) for path in (tmp_path / "text.gguf", MODEL))
    cut = {"F16": wanted.astype("<f2").astype("<f4"), "BF16": ((wanted.view("<u4") >> 16) << 16).view("<f4")}
    assert found.tolist() == cut[dtype].tolist()


# How far the logits of any position may be from those of the same weights in floats: a little more than was measured.
# Random weights feel every rounding, so the figures say nothing about trained ones.
MOST = {"F32": 3e-4, "F16": 1.2e-3, "BF16": 0.011, "Q8_0": 0.055, "Q6_K": 0.11, "Q5_K_M": 0.11, "Q4_K_M": 0.14}
MOST |= {"Q4_0": 0.38, "Q3_K_M": 0.6, "Q2_K": 1.1}


def every_preset():
    quick = ("F16", "Q4_K_M")
    return [pytest.param(preset, marks=() if preset in quick else pytest.mark.slow) for preset in PRESETS]


@pytest.mark.parametrize("preset", every_preset())
def test_every_preset_gives_a_file_that_runs(bravo_hf, tmp_path, preset):
    """Logits of the engine, against those of transformers on the weights before they were converted."""
    convert(bravo_hf, tmp_path / "text.gguf", preset)
    assert GgufFile.open(tmp_path / "text.gguf").metadata["general.file_type"] == PRESETS[preset].file_type
    refs = references()
    positions, wanted = refs["positions"], refs["mscale2"]
    with Model.open(tmp_path / "text.gguf", attn_scale="mscale2", threads=1) as model, model.session(256) as session:
        got = session.feed(refs["ids"], all_logits=True)[positions]
    assert_near(got, wanted, MOST[preset])


def test_which_layers_get_more_bits():
    """SPEC 4.5, for the 36 layers of the real model."""
    q4, q3, q2 = PRESETS["Q4_K_M"], PRESETS["Q3_K_M"], PRESETS["Q2_K"]

    def layers(preset, name, kind):
        return [i for i in range(36) if type_of(preset, name, (2048, 4096, 128), i, 36) == kind]

    assert layers(q4, "ffn_down_exps", "Q6_K") == [*range(4), *range(6, 31, 3), *range(31, 36)]
    assert layers(q4, "ffn_down_shexp", "Q6_K") == layers(q4, "ffn_down_exps", "Q6_K")
    assert layers(q4, "ffn_gate_up_exps", "Q4_K") == layers(q4, "attn_output", "Q4_K") == [*range(36)]
    assert layers(q3, "ffn_down_exps", "Q5_K") == [0, 1] and layers(q3, "ffn_down_exps", "Q4_K") == [*range(2, 36)]
    assert layers(q3, "attn_output", "Q4_K") == layers(q2, "attn_output", "Q3_K") == [*range(36)]
    assert layers(q2, "ffn_down_exps", "Q3_K") == [*range(36)]
    for preset in (q4, q3, q2):
        assert type_of(preset, "output", (4096, 131072), -1, 36) == "Q6_K"
        assert (
            type_of(preset, "ffn_gate_inp", (4096, 128), 7, 36) == type_of(preset, "attn_norm", (4096,), 7, 36) == "F32"
        )
    short = {name: type_of(preset, "attn_k_b", (64, 256, 32), 0, 36) for name, preset in PRESETS.items()}
    assert (
        short["Q4_K_M"] == "Q5_0" and short["Q5_K_M"] == "Q5_1" and short["Q6_K"] == "Q8_0" and short["Q2_K"] == "Q4_0"
    )
    assert type_of(q4, "attn_q_b", (40, 64), 0, 36) == "F16"


@pytest.mark.slow
def test_the_types_are_those_of_the_peer(bravo_hf, tmp_path):
    """But for attn_output, to which the peer gives more bits in models of eight experts."""
    convert(bravo_hf, tmp_path / "text.gguf", "Q4_K_M")
    mine, theirs = GgufFile.open(tmp_path / "text.gguf"), GgufFile.open(MODEL)
    for name, tensor in theirs.tensors.items():
        kind = BLOCKS[mine.tensors[name].type].name
        assert kind == ("Q4_K" if "attn_output" in name else BLOCKS[tensor.type].name), name


def test_the_tower_reads_as_the_peers_does(bravo_hf, tmp_path):
    convert(bravo_hf, mmproj=tmp_path / "mmproj.gguf")
    mine, theirs = Tower.read(tmp_path / "mmproj.gguf"), Tower.read(TOWER)
    assert (mine.shape, mine.rule) == (theirs.shape, theirs.rule)
    row = floats(GgufFile.open(MODEL), "token_embd.weight").reshape(-1, 256)[12]
    assert np.array_equal(floats(mine.gguf, "v.token_embd.img_break"), row)
    assert not (tmp_path / "text.gguf").exists()


def test_names_with_other_prefixes_are_understood(bravo_hf, folder, tmp_path):
    renamed = {}
    for name, x in hf_tensors(MODEL, TOWER, 4).items():
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        renamed[name if "language_model" in name or "lm_head" in name else f"model.{name}"] = x
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", renamed)
    convert(folder, tmp_path / "text.gguf", "F32", mmproj=tmp_path / "mmproj.gguf")
    assert_same_tensors(tmp_path / "text.gguf", MODEL)
    assert_same_tensors(tmp_path / "mmproj.gguf", TOWER)


def test_a_chat_template_is_taken_along(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}ünd")
    convert(folder, tmp_path / "text.gguf", "Q8_0")
    assert GgufFile.open(tmp_path / "text.gguf").metadata["tokenizer.chat_template"] == "{{ bos_token }}ünd"


# --- errors ----------------------------------------------------------------------------------


def refused(ms4, folder, out, *more):
    """Runs the command, which must fail; its one line.  There must be no file, whole or in part."""
    before = set(os.listdir(os.path.dirname(out)))
    code, printed, line = ms4("convert", folder, out, "--type", "F16", *more)
    assert code == 5 and set(os.listdir(os.path.dirname(out))) == before
    assert not printed and line.count("\n") == 1 and line.startswith("ms4: error: ")
    return line


def drop(section, key):
    return lambda config: (config[section] if section else config).pop(key)


def put(section, key, value):
    return lambda config: (config[section] if section else config).update({key: value})


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("config.json", drop("", "text_config"), "text_config is missing"),
        ("config.json", drop("text_config", "kv_lora_rank"), "text_config.kv_lora_rank is missing"),
        ("config.json", put("text_config", "hidden_size", "256"), 'text_config.hidden_size is "256"; a number from 1'),
        ("config.json", put("text_config", "hidden_size", True), "text_config.hidden_size is true"),
        ("config.json", put("text_config", "hidden_size", 512), r"shape 2304 x 256; config.json says 2304 x 512"),
        ("config.json", put("text_config", "num_hidden_layers", 2), "unexpected tensor layers.2."),
        ("config.json", put("text_config", "num_hidden_layers", 4), "layers.3.input_layernorm.weight is missing"),
        ("config.json", put("text_config", "rope_interleave", False), "rope_interleave is false; only true"),
        ("config.json", put("text_config", "model_type", "llama"), 'model_type is "llama"; only "mistral4"'),
        ("config.json", put("text_config", "rope_parameters", {}), "max_position_embeddings is missing"),
        ("config.json", put("text_config", "rms_norm_eps", float("nan")), "rms_norm_eps is NaN"),
        ("config.json", put("text_config", "v_head_dim", 12), "says 152 x 256"),
        ("config.json", put("vision_config", "num_attention_heads", 3), "head_dim must be"),
        ("config.json", put("vision_config", "hidden_act", "relu"), 'hidden_act is "relu"; only "silu" or "gelu"'),
        ("config.json", put("", "projector_hidden_act", "relu"), "projector_hidden_act"),
        ("tekken.json", drop("", "config"), "config is missing"),
        ("tekken.json", put("config", "default_vocab_size", 2303), "another size than the model"),
        ("tekken.json", lambda t: t["vocab"].pop(), "fewer than 1304 tokens"),
        ("tekken.json", lambda t: t["vocab"].insert(5, t["vocab"][4]), "entry 5 of vocab is damaged"),
        ("tekken.json", lambda t: t["vocab"][7].update(token_bytes="?"), "entry 7 of vocab is damaged"),
        ("tekken.json", lambda t: t["vocab"][7].update(token_bytes="AA=="), "two tokens have the same bytes"),
        ("tekken.json", lambda t: t["special_tokens"][3].update(rank=5000), "special_tokens is damaged"),
        ("tekken.json", lambda t: t["special_tokens"].pop(2), "special token </s> is missing"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_converted_is_refused(folder, tmp_path, ms4, name, edit, reason):
    change(folder, name, edit)
    line = refused(ms4, folder, tmp_path / "text.gguf", "--mmproj", tmp_path / "mmproj.gguf")
    assert reason in line and name.split(".")[0] in line.replace("model.safetensors", "config")


@pytest.mark.parametrize("name", ["config.json", "tekken.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, tmp_path, ms4, name):
    (folder / name).unlink()
    assert name in refused(ms4, folder, tmp_path / "text.gguf")
    assert "no such folder" in refused(ms4, folder / "nothing", tmp_path / "text.gguf")


@pytest.mark.parametrize("name", ["config.json", "tekken.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_json_that_is_none_is_refused(folder, tmp_path, ms4, name, text):
    (folder / name).unlink()
    (folder / name).write_text(text, encoding="latin-1")
    assert f"{name}: not a JSON object" in refused(ms4, folder, tmp_path / "text.gguf")


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "not a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 2) + b"{\xff", "not JSON"),
        ({"x": 5}, "type None is not supported"),
        ({"x": ENTRY | {"dtype": "F8_E4M3"}}, "type F8_E4M3 is not supported; F32, F16, BF16 are"),
        ({"x": ENTRY | {"dtype": ["F32"]}}, "is not supported"),
        ({"x": ENTRY | {"shape": [2, -2]}}, "the shape is damaged"),
        ({"x": ENTRY | {"shape": [2, True]}}, "the shape is damaged"),
        ({"x": ENTRY | {"shape": []}}, "the shape is damaged"),
        ({"x": ENTRY | {"shape": [2, 1 << 61]}}, "not what its shape takes"),
        ({"x": ENTRY | {"data_offsets": [0, 17]}}, "outside the file"),
        ({"x": ENTRY | {"data_offsets": [12, 4]}}, "outside the file"),
        ({"x": ENTRY | {"data_offsets": [0]}}, "outside the file"),
        ({"x\x1b": ENTRY | {"data_offsets": [0, 12]}}, "tensor x\\x1b: it has 12 bytes"),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_file_is_refused(folder, tmp_path, ms4, header, reason):
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + bytes(16)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(header)
    assert reason in refused(ms4, folder, tmp_path / "text.gguf")


def test_weights_that_are_not_numbers_are_refused_and_the_old_file_stays(folder, tmp_path, ms4):
    tensors = hf_tensors(MODEL, TOWER, 4)
    tensors["language_model.model.layers.1.mlp.experts.down_proj"][3, 5, 7] = np.nan
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", tensors)
    out = tmp_path / "text.gguf"
    out.write_bytes(b"old")
    assert "tensor blk.1.ffn_down_exps.weight: the weights hold NaN" in refused(ms4, folder, out)
    assert out.read_bytes() == b"old"


def test_a_file_that_ms4_would_not_open_gets_no_name(folder, tmp_path, ms4):
    change(folder, "config.json", put("text_config", "num_experts_per_tok", 9))
    assert "expert_used_count is 9, but expert_count is 8" in refused(ms4, folder, tmp_path / "text.gguf")


def test_a_folder_that_cannot_be_written_to_is_named(bravo_hf, tmp_path, ms4):
    code, _, said = ms4("convert", bravo_hf, tmp_path / "no" / "text.gguf")
    assert code == 1 and "No such file or directory" in said


def test_a_type_that_is_none_is_refused(bravo_hf, tmp_path, ms4):
    code, printed, said = ms4("convert", bravo_hf, tmp_path / "x", "--type", "Q9_K")
    assert (code, printed) == (2, "") and "--type: Q9_K is not one of F32, F16" in said


def test_c13_the_command_writes_both_files_and_only_says_so(bravo_hf, tmp_path, ms4):
    out, mmproj = tmp_path / "text.gguf", tmp_path / "mmproj.gguf"
    assert ms4("convert", bravo_hf, out, "--type", "F16", "--mmproj", mmproj, "--name", "B", "-q") == (0, "", "")
    assert [GgufFile.open(path).metadata["general.name"] for path in (out, mmproj)] == ["B", "B"]
    assert ms4("convert", bravo_hf, out, "--type", "F16") == (0, "", f"ms4: wrote {out}\n")


def test_c13_the_layers_below_the_commands_read_no_arguments():
    """But the trainer's programs, which no wheel has."""
    for path in [*ROOT.glob("models/*.py"), *ROOT.glob("quant/*.py")]:
        assert "argparse" not in path.read_text(encoding="utf-8") and "sys.argv" not in path.read_text(encoding="utf-8")
