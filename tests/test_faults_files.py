"""Faults that users met with what they attach and name, each test named after its row in the list."""

import base64
import json
import os
import re
import shlex
import struct
import threading
import time
from dataclasses import replace
from hashlib import md5
from io import BytesIO
from pathlib import Path

import bad_gguf
import gguf
import numpy as np
import pytest
import test_cli
import test_document
from bad_images import encoded
from PIL import Image as Pillow
from standins import tekken

import ms4
from ms4.cli import attachments, image_notes, repl
from ms4.cli import options as opt
from ms4.models import companion, vision
from ms4.models import image as img
from ms4.models.answer import Answer
from ms4.models.dialogue import Dialogue
from ms4.models.document import DocumentError, load_file
from ms4.models.image import Image, ImageError, load_image, measure, preprocess
from ms4.models.prompt import Prompt
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.tokenizer import Tokenizer
from ms4.models.untrusted import Reading, sniff
from ms4.models.vocabulary import Vocabulary
from ms4.quant.gguf_file import GgufFile

command = test_cli.ms4  # command(arguments..., stdin=bytes) -> its exit code and what it wrote
DATA = Path(__file__).parent / "data"
DAMAGED = "damaged metadata ignored"


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def exif(*entries: tuple[int, int, int, int], more: bytes = b"") -> bytes:
    """EXIF of (tag, type, count, value or offset) entries."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + more


# --- B1 -----------------------------------------------------------------------------------------------------------

METADATA = {
    "a tag that is larger than the file": segment(0xE1, exif((271, 2, 4000, 5000), (0x112, 3, 1, 6))),
    "EXIF that is cut": segment(0xE1, exif((0x112, 3, 1, 6))[:-9]),
    "EXIF that is rubbish": segment(0xE1, b"Exif\0\0" + b"\xee" * 40),
    "an MPO without its index": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + bytes(20)),
    "an MPO whose index points nowhere": segment(0xE2, b"MPF\0II*\0\xf0\xff\0\0"),
    "a JFIF header that is too short": segment(0xE0, b"JFIF\0"),
    "Photoshop's block, cut": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\xff\xff"),
    "an Adobe part of two bytes": segment(0xEE, b"Adobe\0"),
    "a colour profile with no parts": segment(0xE2, b"ICC_PROFILE\0"),
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_b1_damaged_metadata_refuses_no_pixels(metadata):
    picture = Pillow.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3))
    good = encoded(picture, "JPEG")
    loaded = load_image(good[:2] + metadata + good[2:])
    assert np.array_equal(np.asarray(loaded.picture), np.asarray(load_image(good).picture))
    assert load_image(good).note == ""
    with pytest.raises(ImageError):  # what truncates the pixels is an error as before
        load_image((good[:2] + metadata + good[2:])[:-200])


def test_b1_what_is_right_in_damaged_metadata_counts_and_the_rest_is_a_note():
    good = encoded(Pillow.new("RGB", (64, 48)), "JPEG")
    loaded = load_image(good[:2] + METADATA["a tag that is larger than the file"] + good[2:])
    assert loaded.note == DAMAGED and loaded.orientation == 6 and loaded.size == (48, 64)
    for name in ("EXIF that is rubbish", "an MPO whose index points nowhere"):
        assert load_image(good[:2] + METADATA[name] + good[2:]).note == DAMAGED, name


def test_b1_a_png_and_a_tiff_with_damaged_metadata():
    good = encoded(Pillow.new("RGB", (9, 7), (255, 0, 0)), "PNG")
    for body in (exif((271, 2, 4000, 5000))[6:], b"rubbish"):
        wrong = struct.pack(">I", len(body)) + b"eXIf" + body + b"\0\0\0\0"  # its checksum, too
        assert load_image(good[:33] + wrong + good[33:]).size == (9, 7)
        assert load_image(good[:33] + wrong * 2 + good[33:]).note == DAMAGED
    tiff = encoded(Pillow.new("RGB", (9, 7), (255, 0, 0)), "TIFF", software="x" * 20)
    at = tiff.index(struct.pack("<HHI", 305, 2, 21))
    loaded = load_image(tiff[: at + 8] + b"\xff\xff\0\0" + tiff[at + 12 :])
    assert loaded.size == (9, 7) and loaded.note == DAMAGED


# --- B10 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, mode, options",
    [
        ("BMP", "RGB", {}),
        ("BMP", "L", {}),
        ("BMP", "1", {}),
        ("BMP", "P", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {"compression": "tiff_deflate"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "packbits", "big_tiff": True}),
        ("TIFF", "I;16", {}),
    ],
)
def test_b10_bmp_and_tiff_are_read(kind, mode, options, capfd):
    gray = np.where(np.arange(56)[:, None] // 7 % 2, np.full((56, 28), 255), 0).astype(np.uint8)
    soft = Pillow.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Pillow.fromarray(gray).convert(mode)
    data = encoded(soft, kind, **options)
    assert sniff(data) == kind
    loaded = load_image(data)
    assert np.abs(img._rgb(loaded.picture).astype(int) - gray[:, :, None]).max() <= 1
    assert preprocess(loaded).n_tokens == measure({"image": loaded})[1] * 2 == 4
    assert not loaded.note and not loaded.animated and capfd.readouterr() == ("", "")


def test_b10_a_text_that_begins_like_a_picture_is_a_text():
    for text in (b"BM is short for bitmap, and this is a text of more than twenty bytes", b"II* and MM", b"x" * 20):
        assert sniff(text) is None
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic") == "HEIF"
    assert sniff(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf") == "AVIF"
    assert sniff(b"\0\0\0\x18ftypisom\0\0\0\0isomavc1") is None  # a film


def test_b10_a_tiff_is_turned_as_it_says_and_only_its_first_page_is_used():
    red, turned = Pillow.new("RGB", (30, 20), (255, 0, 0)), Pillow.Exif()
    turned[0x112] = 6
    loaded = load_image(encoded(red, "TIFF", exif=turned))
    assert loaded.size == (20, 30) and loaded.orientation == 1
    assert measure({"image": loaded})[:2] == (1, 2)
    pages = load_image(encoded(red, "TIFF", save_all=True, append_images=[Pillow.new("RGB", (8, 8))] * 3))
    assert pages.animated and pages.size == (30, 20)


def test_b10_avif_is_read_where_pillow_reads_it():
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    loaded = load_image(encoded(Pillow.new("RGB", (64, 32), (255, 0, 0)), "AVIF"))
    assert loaded.size == (64, 32) and np.abs(np.asarray(loaded.picture)[0, 0] - [254.0, 0, 0]).max() < 4


def test_b10_heic_is_read_by_pillow_heif_and_without_it_the_line_names_it(monkeypatch):
    import sys

    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="HEIC needs pillow-heif: pip install pillow-heif; or save it as JPEG"):
        load_image(heic)
    monkeypatch.undo()
    heif = pytest.importorskip("pillow_heif")
    with pytest.raises(ImageError, match="damaged"):
        load_image(heic)
    out = BytesIO()
    heif.from_pillow(Pillow.new("RGB", (64, 32), (255, 0, 0))).save(out)
    loaded = load_image(out.getvalue())
    assert loaded.size == (64, 32) and np.abs(np.asarray(loaded.picture)[0, 0] - [254.0, 0, 0]).max() < 4


def test_b10_a_picture_of_a_phone_is_decoded_reduced():
    tall = Pillow.new("L", (6000, 8000), 255)
    tall.paste(0, (0, 0, 6000, 4000))
    loaded = load_image(encoded(tall, "JPEG"))
    assert loaded.size == (6000, 8000) and loaded.picture.size == (3000, 4000)
    pixels = preprocess(loaded)
    assert (pixels.gw, pixels.gh) == img.grid(6000, 8000) == (42, 55)
    rows = pixels.array[0].mean(1)
    assert rows[0] == rows[700] < rows[-1] == rows[-700]


def test_b10_memory_is_the_limit(monkeypatch):
    data = encoded(Pillow.new("RGB", (7000, 7000)), "PNG", compress_level=1)

    class Allowed:
        room: int | None = 64 << 20

    monkeypatch.setattr(img.ms4, "allowed", Allowed)
    with pytest.raises(ImageError, match="decoding it needs 0.2 GiB; 0.1 GiB are free"):
        load_image(data)
    Allowed.room = None
    assert load_image(data).size == (7000, 7000)


# --- B2, B3 -------------------------------------------------------------------------------------------------------

KEYS = {"name": "general.name", "basename": "general.basename", "size": "general.size_label"}


def header(path, width: int = 64, kind: int | None = None, tower: bool = False, **names: str):
    """A GGUF file that holds no more than what names a model and how wide it is."""
    writer = gguf.GGUFWriter(path, "clip" if tower else "mistral4")
    for key, value in names.items():
        writer.add_string(KEYS[key], value)
    writer.add_uint32("clip.vision.projection_dim" if tower else "mistral4.embedding_length", width)
    if kind is not None:
        writer.add_uint32("general.file_type", kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.close()
    return path


NAME = "Mistral Small 4 119B 2603"


@pytest.mark.parametrize(
    "files, found",
    [
        (["model-Q4_K_M.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"], "mmproj-F16.gguf"),
        (["model.gguf", "mmproj-F32.gguf", "mmproj-Q8_0.gguf"], "mmproj-Q8_0.gguf"),
        (["model.gguf", "mmproj-Q8_0.gguf", "mmproj-bf16.gguf"], "mmproj-bf16.gguf"),
        (["Q4_K_M/model-00001-of-00002.gguf", "mmproj-F32.gguf", "mmproj-F16.gguf"], "mmproj-F16.gguf"),
        (["Q4/model.gguf", "Q4/mmproj-F32.gguf", "mmproj-F16.gguf"], "Q4/mmproj-F32.gguf"),
        (["Q4/model.gguf", "other/mmproj-F16.gguf"], None),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_b2_the_tower_is_found_where_repositories_put_it(tmp_path, monkeypatch, files, found, named):
    for name in files:
        if named:
            header(tmp_path / name, tower="mmproj" in name, name=NAME)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    want = found and tmp_path / found
    assert companion.find(tmp_path / files[0]) == want
    monkeypatch.chdir((tmp_path / files[0]).parent)
    assert companion.find((tmp_path / files[0]).name) == want
    assert bool(companion.choose(tmp_path / files[0]).doubt) == bool(found and not named)


def test_b2_the_type_in_the_header_counts_before_the_one_in_the_name(tmp_path):
    model = header(tmp_path / "m.gguf", name=NAME)
    header(tmp_path / "mmproj-a.gguf", kind=0, tower=True, name=NAME)
    header(tmp_path / "mmproj-b.gguf", kind=1, tower=True, name=NAME)
    header(tmp_path / "mmproj-f16.gguf", kind=7, tower=True, name=NAME)
    assert companion.find(model) == tmp_path / "mmproj-b.gguf"


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        ({"name": NAME}, {"name": "mistral-small-4-119b-2603"}, "agree"),
        ({"name": NAME}, {"name": "Mistral Small 4"}, "agree"),
        ({"name": NAME, "size": "128x3.9B"}, {"name": NAME, "size": "439M"}, "agree"),
        ({"name": "Our Tune", "basename": "Mistral-Small-4"}, {"name": NAME}, "agree"),
        ({"name": NAME}, {"name": "Mistral Small 3.1 24B 2503"}, "refuse"),
        ({"name": NAME}, {"name": "Mistral Small 4 119B 2512"}, "refuse"),
        ({"name": NAME}, {"name": "Pixtral 12B"}, "refuse"),
        ({"name": "Mistral Small", "size": "119B"}, {"name": "Mistral Small", "size": "24B"}, "refuse"),
        ({"name": "Mistral Small Reasoning"}, {"name": "Mistral Small Base"}, "doubt"),
        ({"name": NAME}, {}, "doubt"),
        ({}, {"name": NAME}, "doubt"),
        ({"name": NAME}, {"name": NAME, "width": 128}, "refuse"),
    ],
)
def test_b3_what_the_headers_name_counts(tmp_path, ours, theirs, verdict):
    # The names of the files say the contrary, or what all of them say.
    model = header(tmp_path / "q4,k,m.gguf", **ours)
    header(tmp_path / "mmproj-q4,k,m.gguf", tower=True, **theirs)
    choice = companion.choose(model)
    assert (choice.path is None) == (verdict == "refuse") == bool(choice.problem)
    assert bool(choice.doubt) == (verdict == "doubt") and (choice.doubt + choice.problem).isprintable()


def test_b3_a_type_in_a_name_is_no_name(tmp_path):
    model = tmp_path / "mistral-small-4,119b,2603,q4,k,m.gguf"
    for path in (model, tmp_path / "mmproj-other,q4,k,m.gguf", tmp_path / "mmproj-4,119b,2603.gguf"):
        path.touch()
    choice = companion.choose(model)
    assert choice.path == tmp_path / "mmproj-4,119b,2603.gguf" and not choice.doubt


def test_b3_the_right_tower_among_several_and_one_folder_up(tmp_path):
    model = header(tmp_path / "q4" / "m.gguf", name=NAME)
    header(tmp_path / "q4" / "mmproj-F16.gguf", tower=True, name="Pixtral 12B")
    assert "Pixtral" not in companion.choose(model).doubt and "12b pixtral" in companion.choose(model).problem
    right = header(tmp_path / "mmproj-BF16.gguf", tower=True, name=NAME)
    header(tmp_path / "mmproj-F16.gguf", tower=True, name="Pixtral 12B")
    assert companion.choose(model) == companion.Choice(right)


def test_b3_a_contradiction_is_an_error_that_mmproj_overrides(tmp_path, monkeypatch, capsys):
    model, tower = tmp_path / "m.gguf", tmp_path / "mmproj-m.gguf"
    model.symlink_to(DATA / "bravo-Q4_K_M.gguf")
    data = (DATA / "bravo-mmproj-f16.gguf").read_bytes()
    tower.write_bytes(data.replace(b"Hf Bravo", b"Hf Delta", 1))
    image = Image("x.png", Pillow.new("RGB", (28, 28)), b"")
    with pytest.raises(vision.NoTowerError, match="belongs to another model: it names delta hf, the model bravo hf"):
        vision.ImageInput(model).size(image)
    assert vision.ImageInput(model, mmproj=str(tower)).size(image).n_tokens == 2
    tower.write_bytes(data.replace(b"general.name", b"general.nome", 1))
    images = vision.ImageInput(model)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}] * 2}]
    image_notes.announce(messages, images, quiet=True)
    assert capsys.readouterr().err == ""
    assert "may belong" in repl.note(image, vision.ImageInput(model))
    image_notes.announce(messages, images, quiet=False)
    assert capsys.readouterr().err.count("may belong to another model") == 1


# --- B8 -----------------------------------------------------------------------------------------------------------


def padded(path: Path, kinds: list[int], names: list[str]) -> Path:
    """The vocabulary of a checkpoint whose last tokens are padding."""
    image = bad_gguf.take_apart((DATA / "bravo-Q4_K_M.gguf").read_bytes())
    n = len(image.strings("tokenizer.ggml.tokens"))
    for i, name in enumerate(names):
        bad_gguf.token(n - len(names) + i, name.encode())(image)
    merges = [merge.decode() for merge in image.strings("tokenizer.ggml.merges")]
    known = {token.decode() for token in image.strings("tokenizer.ggml.tokens")}
    whole = [merge for merge in merges if set(merge.split(" ")) <= known]
    image.put("tokenizer.ggml.merges", bad_gguf.ARR, bad_gguf.array(bad_gguf.STR, whole))
    types = [3] * 1000 + [1] * (n - 1000 - len(names)) + kinds
    image.put("tokenizer.ggml.token_type", bad_gguf.ARR, bad_gguf.array(bad_gguf.I32, types))
    image.put("tokenizer.ggml.padding_token_id", bad_gguf.I32, -1)
    path.write_bytes(image.encoded())
    return path


@pytest.mark.parametrize(
    "kinds, names",
    [
        ([5], ["[PAD7]"]),
        ([5, 5, 5], ["[PAD0]", "[PAD1]", "[PAD2]"]),
        ([3, 4], ["[PAD1254]", "[PAD1255]"]),
        ([5, 5], ["<unused0>", "<unused1>"]),
        ([5, 5], ["a", "b"]),  # unused tokens that spell what another one does
    ],
)
def test_b8_padding_behind_the_vocabulary_is_not_refused_and_never_produced(tmp_path, kinds, names):
    vocabulary = Vocabulary.from_gguf(GgufFile.open(padded(tmp_path / "m.gguf", kinds, names)))
    assert vocabulary.problem is None and vocabulary.n_used == vocabulary.n_vocab - len(names)
    assert vocabulary.notes == (
        f"tokenizer.ggml.padding_token_id is -1, out of range: there are {vocabulary.n_vocab} tokens; not needed",
    )
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.text(tokenizer.encode(" ".join(names))) == " ".join(names)
    assert tokenizer.piece(vocabulary.n_vocab - 1) == b""
    assert tokenizer.spelling(vocabulary.n_vocab - 1) == names[-1].encode()
    logits = np.zeros(vocabulary.n_vocab, np.float32)
    logits[vocabulary.n_used :] = 50
    logits[vocabulary.n_used - 1] = 9
    answer = Answer(Prompt([1]), Sampler(SamplingParams(0.0)), tokenizer, 9, logprobs=20)
    answer.choose(logits)
    assert answer.ids == [vocabulary.n_used - 1]


def test_b8_such_a_file_answers_and_info_notes_what_is_wrong(tmp_path, command):
    path = str(padded(tmp_path / "m.gguf", [5] * 3, ["[PAD0]", "[PAD1]", "[PAD2]"]))
    run = ("run", "-m", path, "--greedy", "-n", 4, "hi")
    assert "padding" not in command(*run).err and command(*run).code == 0
    assert "padding_token_id is -1" in command("info", path).out
    lines = command(*run, "-v").err.splitlines()
    assert "padding_token_id is -1" in lines[0] and "kernels" in lines[1] and lines[2].startswith("ms4: read ")
    assert test_cli.refused(command(*run, "-q", "-v"), 2, "--quiet is given twice")


# --- B9 -----------------------------------------------------------------------------------------------------------


def tokenized(command, *messages: dict):
    return command("tokenize", "--chat", "-", stdin=json.dumps({"messages": messages}).encode())


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_b9_a_developer_is_the_system(command, content):
    user = {"role": "user", "content": "Hi"}
    got = tokenized(command, {"role": "developer", "content": content}, user)
    assert got.code == 0 and got.out == tokenized(command, {"role": "system", "content": content}, user).out
    assert 17 in json.loads(got.out) and 18 in json.loads(got.out)  # [SYSTEM_PROMPT] and its end
    two = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, user]
    same = [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, user]
    assert tokenized(command, *two).out == tokenized(command, *same).out
    assert "role must be system, developer, user" in tokenized(command, {"role": ["user"], "content": "x"}).err


@pytest.mark.parametrize("between", ["\n", "\r\n", " ", "\n  ", "\t"])
@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png;charset=utf-8;base64,", "Data:;BASE64,"])
def test_b9_base64_may_be_broken_into_lines(head, between):
    data = encoded(Pillow.new("RGB", (60, 40), (255, 0, 0)), "PNG")
    text = base64.b64encode(data).decode()
    lines = between.join(text[i : i + 76] for i in range(0, len(text), 76)) + between
    for url in (head + lines, {"url": head + lines}):
        assert measure({"type": "image_url", "image_url": url})[:2] == (3, 2)
        assert img.image_bytes({"type": "image_url", "image_url": url}) == data
    with pytest.raises(ImageError, match="not base64"):
        img.image_bytes({"type": "image_url", "image_url": head + "@" + lines})


# --- B11 ----------------------------------------------------------------------------------------------------------

LATIN = "naïve café\n".encode("latin-1")
TELLS = "--encoding NAME says what it is (latin-1, utf-16), --lossy shows what is no text as U+FFFD"


def shown(command, *arguments, stdin: bytes = b"") -> str:
    got = command("run", "-m", test_cli.MODEL, "--show-prompt", *arguments, stdin=stdin)
    assert got.code == 0, got
    return got.out


def test_b11_text_that_is_not_utf8_has_a_way_out_wherever_it_comes_from(command, tmp_path):
    path = tmp_path / "a.diff"
    path.write_bytes(LATIN)
    ways = {"stdin": ((), LATIN), "-f": (("-f", path, "x"), b""), "-f -": (("-f", "-", "x"), LATIN)}
    ways["@file"] = ("-s", f"@{path}", "x"), b""
    for name, (arguments, stdin) in ways.items():
        got = command("run", "-m", test_cli.MODEL, "--show-prompt", *arguments, stdin=stdin)
        assert got.code == 7 and "(byte 2)" in got.err and TELLS in got.err, name
        assert "naïve café" in shown(command, "--encoding", "latin-1", *arguments, stdin=stdin), name
        assert "na\ufffdve caf\ufffd" in shown(command, "--lossy", *arguments, stdin=stdin), name
    wrong = command("run", "-m", test_cli.MODEL, "--show-prompt", "--encoding", "ascii", stdin=LATIN)
    assert wrong.code == 7 and "stdin is not ascii (byte 2)" in wrong.err
    assert "日本語" in shown(command, "--encoding", "shift_jis", stdin="日本語".encode("shift_jis"))


def test_b11_utf16_is_named_and_read(command, tmp_path):
    for name in ("utf-16", "utf-16-le", "utf-16-be"):
        data = "\ufeffnaïve".encode(name) if name != "utf-16" else "naïve".encode(name)
        path = tmp_path / "a.txt"
        path.write_bytes(data)
        got = command("run", "-m", test_cli.MODEL, "--count", "-f", path)
        assert got.code == 7 and "a text in UTF-16, not UTF-8" in got.err and TELLS in got.err
        out = shown(command, "--encoding", name, "-f", path)
        assert "naïve" in out and "\ufeff" not in out
        assert "naïve" in shown(command, "--encoding", name, stdin=data)
    assert "\ufeff" not in shown(command, stdin="\ufeffhello".encode())


def test_b11_arguments_are_utf8_whatever_the_files_are(command):
    assert "é" in shown(command, "--encoding", "latin-1", "é")
    assert "a\ufffd" in shown(command, "--lossy", "a\udce9")
    assert command("run", "--encoding", "base64", "x").code == 2
    assert command("run", "--encoding", "nonsense\0", "x").code == 2


def test_b11_the_other_commands_that_read_texts(command, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(LATIN * 40)
    want = command("tokenize", stdin="naïve café\n".encode()).out
    assert command("tokenize", "--encoding", "latin-1", stdin=LATIN).out == want
    assert TELLS in command("tokenize", stdin=LATIN).err
    assert command("perplexity", "-m", test_cli.MODEL, "--ctx", 64, "--segments", 1, path).code == 7
    got = command("perplexity", "-m", test_cli.MODEL, "--ctx", 64, "--segments", 1, "--encoding", "latin-1", path)
    assert got.code == 0
    chat = ("chat", "-m", test_cli.MODEL, "--greedy", "-n", 2)
    assert command(*chat, stdin=LATIN).code == 7 and command(*chat, "--lossy", stdin=LATIN).code == 0
    assert command(*chat, "--encoding", "latin-1", path, stdin=LATIN).code == 0
    assert "cannot be utf-16" in command(*chat, "--encoding", "utf-16", stdin="a\n".encode("utf-16")).err
    assert "iconv" in command("logits", "-m", test_cli.MODEL, "--ids", path, "-o", tmp_path / "o.npy").err


# --- B13 ----------------------------------------------------------------------------------------------------------


def test_b13_paths_as_terminals_write_them(tmp_path, monkeypatch):
    for name in ("x.png", "my image.png", "50%.png", "it's.png", "é.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    here = str(tmp_path)
    for line, names in {
        f"file://{here}/x.png": ["x.png"],
        f"file://localhost{here}/my%20image.png\n": ["my image.png"],
        f"'{here}/my image.png' ": ["my image.png"],
        f'"{here}/my image.png"': ["my image.png"],
        f"{here}/my\\ image.png": ["my image.png"],
        f"{here}/my image.png": ["my image.png"],
        f"{here}/50%.png": ["50%.png"],
        f"{here}/it\\'s.png": ["it's.png"],
        f"file://{here}/%C3%A9.png": ["é.png"],
        "~/x.png": ["x.png"],
        f"{here}/x.png '{here}/my image.png'": ["x.png", "my image.png"],
    }.items():
        assert attachments.dropped(line) == [f"{here}/{name}" for name in names], line
    assert attachments.dropped("./x.png") == ["./x.png"]
    for text in (
        *("x.png", "", "what is ./x.png", "./x.png what is this?", f"file://{here}/none.png", "./none.png", "don't"),
        *(f"file://elsewhere{here}/x.png", f"{here}/folder", "~", "./x.png\0", "https://example.org/x.png"),
    ):
        assert attachments.dropped(text) == [], text
    assert attachments.typed_path(f"file://{here}/my%20image.png") == f"{here}/my image.png"


@pytest.mark.parametrize("interactive", [True, False])
def test_b13_a_dropped_file_is_attached_and_said_and_other_lines_are_messages(tmp_path, monkeypatch, interactive):
    (tmp_path / "a b.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    texts = iter(["'./a b.txt'", "./none.png", None])
    said, sent = [], []
    talk = repl.Talk.__new__(repl.Talk)
    talk.settings, talk.attached, talk.images, talk.interactive, talk.over = (
        repl.ChatSettings(opt.Sampling(), None, "auto", None, 9, ()),
        [],
        None,
        interactive,
        False,
    )
    talk.dialogue = Dialogue(tekken(), None, "none")
    monkeypatch.setattr(talk, "send", sent.append)
    monkeypatch.setattr(talk, "tell", said.append)

    class Source:
        def next(self):
            return next(texts)

    talk.commands = {}
    assert repl.loop(talk, Source()) == 0
    if interactive:
        assert sent == ["./none.png"] and talk.attached == ["./a b.txt:\nsome text"]
        assert "goes with the next message; /drop leaves it out" in said
    else:
        assert sent == ["'./a b.txt'", "./none.png"] and not talk.attached and not said


# --- B12 ----------------------------------------------------------------------------------------------------------

FILLING = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")


def rc4(key: bytes, data: bytes) -> bytes:
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def locked(password: bytes) -> bytes:
    """A PDF of one page that opens with this password: encryption of revision 2, by the book."""
    plain, owner = test_document.pdf(test_document.TEXT), b"\xab" * 32
    key = md5((password + FILLING)[:32] + owner + struct.pack("<i", -4) + b"\0").digest()[:5]

    def lock(match: re.Match[bytes]) -> bytes:
        one = md5(key + int(match[1]).to_bytes(3, "little") + b"\0\0").digest()[:10]
        return match[0].replace(match[2], rc4(one, match[2]))

    data = re.sub(rb"(\d) 0 obj\n<<[^\n]*>>stream\n(.*?)\nendstream", lock, plain, flags=re.DOTALL)
    user = rc4(key, FILLING)
    entry = f"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{owner.hex()}>/U<{user.hex()}>>>/ID[<00><00>]".encode()
    return data.replace(b"/Root 1 0 R", b"/Root 1 0 R" + entry)


def test_b12_a_pdf_with_a_password(command, tmp_path, monkeypatch):
    path = tmp_path / "a.pdf"
    path.write_bytes(locked(b"se cret"))
    got = command("run", "-m", test_cli.MODEL, "--count", "-f", path)
    assert got.code == 7 and "needs a password" in got.err and "hint: --pdf-password TEXT" in got.err
    got = command("run", "-m", test_cli.MODEL, "--count", "--pdf-password", "wrong", "-f", path)
    assert got.code == 7 and "not the right password" in got.err and "wrong" not in got.err
    for arguments, stdin in ((("-f", path), b""), ((), path.read_bytes()), (("-f", "-"), path.read_bytes())):
        assert "Total due 42 EUR" in shown(command, "--pdf-password", "se cret", *arguments, stdin=stdin)
    assert "secret" not in repr(Reading(password="secret"))
    # At a terminal it is asked for, once.
    monkeypatch.setattr(attachments.streams, "is_terminal", lambda stream: True)
    asked = []
    monkeypatch.setattr(attachments.getpass, "getpass", lambda text, stream: asked.append(text) or "se cret")
    assert attachments.open_file(str(path)) == [f"{path}, page 1:\nTotal due 42 EUR"] and len(asked) == 1
    monkeypatch.setattr(attachments.getpass, "getpass", lambda text, stream: "nonsense")
    with pytest.raises(DocumentError, match="not the right password"):
        attachments.open_file(str(path))


def test_b12_what_comes_out_of_a_pipe_is_a_file(tmp_path):
    picture = encoded(Pillow.new("RGB", (9, 7)), "PNG")
    for data, kind in ((b"some text\n", str), (picture, Image), (test_document.pdf(test_document.TEXT), str)):
        out, into = os.pipe()
        writer = threading.Thread(target=lambda: (time.sleep(0.05), os.write(into, data), os.close(into)))  # noqa: B023
        writer.start()
        (part,) = load_file(f"/dev/fd/{out}")
        assert isinstance(part, kind)
        writer.join()
        os.close(out)
    out, into = os.pipe()
    os.close(into)
    with pytest.raises(DocumentError, match="nothing came out of it"):
        load_file(f"/dev/fd/{out}")
    os.close(out)
    with pytest.raises(DocumentError, match="larger than 128 MiB"):
        load_file("/dev/zero")
    _, terminal = os.openpty()
    with pytest.raises(DocumentError, match="a terminal, not a file"):
        load_file(os.ttyname(terminal))


# --- A4 -----------------------------------------------------------------------------------------------------------


def with_annotation(annotation: bytes, form: bytes = b"") -> bytes:
    """A page of text with one annotation, object 3 of the file being the font."""
    page = test_document.pdf(test_document.TEXT)
    page = page.replace(b"/Type/Page/Parent", b"/Type/Page/Annots[<<%s>>]/Parent" % annotation)
    return page.replace(b"<</Type/Catalog", b"<</Type/Catalog" + form)


def seen(data: bytes, mode: str = "auto") -> tuple[str, bool]:
    """The text of the page, and whether its picture comes with it."""
    text, *pictures = test_document.doc.load_bytes(data, "a.pdf", pdf=mode)
    return text, bool(pictures)


@pytest.mark.parametrize(
    "drawing, counts",
    [
        (b"0 0 1 rg 100 100 40 200 re f ", True),  # a bar
        (b"100 100 m 150 180 l 200 120 l S ", True),  # a curve
        (b"/P sh ", False),  # nothing: there is no such shading
        (b"72 690 m 300 690 l S ", False),  # a line under the text
        (b"72 690 300 1 re f ", False),
        (b"1 1 1 rg 0 0 595 842 re f ", False),  # a background
        (b"100 100 40 200 re W n ", False),  # a clipping
    ],
)
def test_a4_a_page_with_drawings_counts_as_one_with_pictures(drawing, counts):
    text, picture = seen(test_document.pdf(drawing + test_document.TEXT))
    assert "Total due 42 EUR" in text and picture == counts
    assert not seen(test_document.pdf(drawing + test_document.TEXT), "text")[1]


NOTE = b"/Type/Annot/Subtype/FreeText/Rect[10 10 200 60]/DA(/F 12 Tf)/Contents(PAID in May)"
FIELD = b"/Type/Annot/Subtype/Widget/FT/Tx/T(Name)/Rect[10 10 200 60]/DA(/F 12 Tf)"


def test_a4_annotations_and_form_values_reach_the_model():
    for mode in ("auto", "text"):
        text, picture = seen(with_annotation(NOTE), mode)
        assert "Total due 42 EUR\n[note on the page: PAID in May]" in text and picture == (mode == "auto")
    for hidden in (NOTE + b"/F 2", NOTE.replace(b"FreeText", b"Link"), NOTE + b"/F 32"):
        assert seen(with_annotation(hidden)) == ("a.pdf, page 1:\nTotal due 42 EUR", False)


def test_a4_form_values(tmp_path):
    def form(value: bytes) -> bytes:
        page = test_document.pdf(test_document.TEXT)
        data = page.replace(b"<</Type/Catalog", b"<</Type/Catalog/AcroForm<</Fields[9 0 R]/DA(/F 12 Tf)>>")
        data = data.replace(b"/Type/Page/Parent", b"/Type/Page/Annots[9 0 R]/Parent")
        return data.replace(b"xref\n", b"9 0 obj\n<<%s%s>>\nendobj\nxref\n" % (FIELD, value), 1)

    for mode in ("auto", "text"):
        text, picture = seen(form(b"/V(Ada Lovelace)"), mode)
        assert "[form field Name: Ada Lovelace]" in text and picture == (mode == "auto")
    assert seen(form(b"")) == ("a.pdf, page 1:\nTotal due 42 EUR", False)


# --- A3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with pictures, a PDF and texts, where commands are typed."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg", "c d.jpg"):
        (tmp_path / name).write_bytes(encoded(Pillow.new("RGB", (9, 7)), "JPEG"))
    (tmp_path / "e.pdf").write_bytes(test_document.pdf(test_document.TEXT))
    (tmp_path / "notes.txt").write_text("some text")
    (tmp_path / "Makefile").write_text("all:\n")


OURS = {"-i": "PATH", "--image": "PATH", "-f": "PATH", "--file": "PATH", "-n": "N", "-q": None, "--prefill": "TEXT"}


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("-i a.jpg b.jpg What?", "-i a.jpg -i b.jpg What?"),
        ("What? -i a.jpg b.jpg 'c d.jpg'", "What? -i a.jpg -i b.jpg -i 'c d.jpg'"),
        ("--image=a.jpg b.jpg -q What?", "--image=a.jpg --image b.jpg -q What?"),
        ("-ia.jpg b.jpg", "-ia.jpg -i b.jpg"),
        ("-f e.pdf notes.txt What?", "-f e.pdf -f notes.txt What?"),
        ("-f notes.txt e.pdf:1 -i a.jpg b.jpg", "-f notes.txt -f e.pdf:1 -i a.jpg -i b.jpg"),
        # Names that are wrong are said to be, not read to the model.
        ("-i a.jpg bb.jpg What?", "-i a.jpg -i bb.jpg What?"),
        ("-f notes.txt e.PDF:1-3 What?", "-f notes.txt -f e.PDF:1-3 What?"),
        # Words stay words, and what follows an option's value or --, too.
        ("-i a.jpg Is this a.jpg b.jpg", "-i a.jpg Is this a.jpg b.jpg"),
        ("-i a.jpg 'is this b.jpg?'", "-i a.jpg 'is this b.jpg?'"),
        ("-i a.jpg notes.txt", "-i a.jpg notes.txt"),
        ("-f notes.txt Makefile", "-f notes.txt Makefile"),
        ("-n 3 a.jpg --prefill -i a.jpg", "-n 3 a.jpg --prefill -i a.jpg"),
        ("-i a.jpg -- b.jpg", "-i a.jpg -- b.jpg"),
        ("-q b.jpg", "-q b.jpg"),
        ("-i", "-i"),
    ],
)
def test_a3_an_image_option_takes_the_files_behind_it(files, typed, meant):
    assert attachments.spread(shlex.split(typed), OURS) == shlex.split(meant)


def test_a3_every_image_behind_the_option_is_read_and_a_wrong_name_is_said(files, command):
    got = command("run", "-m", test_cli.MODEL, "--count", "-i", "a.jpg", "b.jpg", "c d.jpg", "What?")
    assert got.code == 0 and [line.split()[1] for line in got.err.splitlines()] == ["a.jpg", "b.jpg", "c"]
    assert test_cli.refused(command("run", "-i", "a.jpg", "bb.jpg", "What?"), 7, "bb.jpg")


def test_a3_a_file_among_the_words_of_the_prompt_is_refused(command, files):
    for arguments, hint in {
        ("-i", "a.jpg", "And", "b.jpg", "What?"): "-i a.jpg -i b.jpg",
        ("c d.jpg", "-i", "a.jpg", "b.jpg"): "-i a.jpg -i b.jpg -i 'c d.jpg'",
        ("-f", "e.pdf", "What?", "notes.txt"): "-f e.pdf -f notes.txt",
        ("-f", "notes.txt", "About", "e.pdf:1"): "-f notes.txt -f e.pdf:1",
    }.items():
        got = command("run", "-m", test_cli.MODEL, *arguments)
        assert test_cli.refused(got, 2, "is a file, not a word of the prompt") and f"hint: {hint}\n" in got.err
    for words in (("notes.txt", "b.jpg"), ("-f", "notes.txt", "What", "of", "Makefile"), ("-f", "e.pdf", "is a.jpg?")):
        assert command("run", "-m", test_cli.MODEL, "--count", *words).code == 0, words


# --- B7 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, stdin",
    [
        (("--ctx", 64), b"long " * 100),
        ((), b"long " * 40_000),
        (("--ctx", 256, "-n", 200, "-s", "long " * 100, "Hi"), b""),
        (("--ctx", 40, "-i", DATA / "bravo-image.png", "Hi"), b""),
    ],
)
def test_b7_a_prompt_that_is_too_long_is_refused_before_the_model_is_loaded(command, monkeypatch, arguments, stdin):
    def open_model(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(repl.loading, "open_model", open_model)
    got = command("run", "-m", test_cli.MODEL, *arguments, stdin=stdin)
    assert got.code == 3 and "tokens" in got.err and "loaded" not in got.err, got
    assert "loaded" in command("run", "-m", test_cli.MODEL, "Hi").err  # one that fits gets that far


def test_b7_events_of_what_was_refused_before_it_was_loaded_name_no_load(command):
    got = command("run", "-m", test_cli.MODEL, "--format", "jsonl", "one two three " * 999)
    assert got.code == 3 and [json.loads(line)["event"] for line in got.out.splitlines()] == ["start", "error"]
    answered = command("run", "-m", test_cli.MODEL, "--format", "jsonl", "-n", "2", "Hi").out.splitlines()
    assert [json.loads(line)["event"] for line in answered[:2]] == ["start", "load"]


def test_b7_a_chat_refuses_what_is_too_long_before_the_model_is_loaded(command, files, tmp_path, monkeypatch):
    def open_model(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(repl.loading, "open_model", open_model)
    (tmp_path / "long.txt").write_text("one two three " * 999)
    chat = ("chat", "-m", test_cli.MODEL)
    for arguments in (("long.txt",), ("-s", "@long.txt"), ("a.jpg", "notes.txt", "--ctx", "10")):
        got = command(*chat, *arguments, stdin=b"Hi\n")
        assert got.code == 3 and "the prompt has" in got.err and "loaded" not in got.err, got
    assert "loaded" in command(*chat, "notes.txt", "a.jpg", "-s", "Be brief.", stdin=b"Hi\n").err


# --- B6 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "chat", "perplexity"])
def test_b6_a_file_larger_than_memory_is_said_in_one_line(command, monkeypatch, kind):
    def notes(room, *more):
        monkeypatch.setattr(ms4, "allowed", lambda: replace(allowed, room=room))
        words = {"run": ("-n", "2", "Hi"), "chat": ("-n", "2"), "perplexity": ("-",)}[kind]
        got = command(
            kind, "-m", test_cli.MODEL, "--load", "map", *words, *more, stdin=b"one two three four five six " * 90
        )
        assert got.code == 0, got
        return [line for line in got.err.splitlines() if "memory" in line]

    allowed, size = ms4.allowed(), os.path.getsize(test_cli.MODEL)
    (line,) = notes(size - 1)
    assert f"of weights, {(size - 1) / 1e6:.1f} MB of memory free: what does not fit is read from the disk" in line
    assert line.endswith(f"ms4 doctor -m {test_cli.MODEL[-80:]} says what helps")
    assert notes(size) == notes(None) == notes(size - 1, "-q") == []
