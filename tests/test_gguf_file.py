"""The GGUF door: files as they come from a stranger."""

import os
import struct

import bad_gguf
import gguf
import numpy as np
import pytest

from ms4.models.describe import describe
from ms4.quant import visible
from ms4.quant.gguf_file import FileError, GgufError, GgufFile, peek, shown
from ms4.quant.tiny import Tiny, write_tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_tiny(path)
    return path.read_bytes()


def refusal(path):
    """What a refused file is told: one printable line."""
    with pytest.raises(FileError) as caught:
        describe(path)
    line = str(caught.value)
    assert line.isprintable() and line.isascii() and len(line) <= 300, line
    return line.removeprefix("...")


def test_the_recipes_start_from_the_good_file(good):
    assert bad_gguf.take_apart(good).encoded() == good


@pytest.mark.parametrize("name", bad_gguf.RECIPES)
def test_damage_is_refused_in_one_line(name, good, tmp_path):
    edit, pattern = bad_gguf.RECIPES[name]
    image = bad_gguf.take_apart(good)
    edit(image)
    path = tmp_path / "bad.gguf"
    path.write_bytes(image.encoded())
    with pytest.raises(FileError, match=pattern):
        describe(path)
    assert "bad.gguf: " in refusal(path)


@pytest.mark.parametrize("name", bad_gguf.CONTROLS)
def test_odd_but_right_files_are_accepted(name, good, tmp_path):
    image = bad_gguf.take_apart(good)
    bad_gguf.CONTROLS[name](image)
    path = tmp_path / "odd.gguf"
    path.write_bytes(image.encoded())
    assert describe(path).shape == describe_bytes(good, tmp_path).shape


def describe_bytes(data, folder):
    path = folder / "good.gguf"
    path.write_bytes(data)
    return describe(path)


def test_random_damage_never_gives_anything_but_a_refusal(good, tmp_path, rng):
    """A header with a few random changes is accepted or refused; nothing else may happen."""
    n_header = len(good) - len(bad_gguf.take_apart(good).data)
    edges = [0, 1, 31, 255, 65535, 1 << 31, 1 << 32, 1 << 61, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
    path = tmp_path / "fuzz.gguf"
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(4, rng.choice([64, 512, 4096, n_header])))
            match rng.integers(4):
                case 0:
                    data[at] ^= 1 << rng.integers(8)
                case 1:
                    data[at : at + 8] = struct.pack("<Q", edges[rng.integers(len(edges))])
                case 2:
                    del data[at : at + int(rng.integers(1, 64))]
                case _:
                    data[at:at] = data[at : at + 16]
        path.write_bytes(data)
        try:
            describe(path)
        except FileError as e:
            assert str(e) == visible.line(str(e)) and len(str(e)) <= 300


def test_tensors_are_where_an_independent_reader_finds_them(tmp_path):
    path = tmp_path / "t.gguf"
    write_tiny(path, Tiny(types={"experts": "Q4_K", "output": "F16"}, d_model=256))
    theirs = gguf.GGUFReader(path)
    ours = GgufFile.open(path)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.dims, mine.type) == (tuple(map(int, t.shape)), t.tensor_type.value)
        assert (mine.offset, mine.bytes, mine.n_weights) == (t.data_offset, t.n_bytes, t.n_elements)
    for key, value in ours.metadata.items():
        field = theirs.fields[key].contents()
        if isinstance(value, np.ndarray):
            assert value.tolist() == field
        elif isinstance(value, (int, float, str)):
            assert value == field, key
        else:
            assert [s.decode() for s in value] == field and value[0].decode() == field[0]


def test_very_many_tensors_are_refused(good, tmp_path):
    image = bad_gguf.take_apart(good)
    image.records = [bad_gguf.Record(b"x.%d" % i, [1], 0, 32 * i) for i in range(20_000)]
    image.data = bytes(32 * 20_000)
    (tmp_path / "many.gguf").write_bytes(image.encoded())
    assert "tensors of 0 layers" in refusal(tmp_path / "many.gguf")


def test_trailing_bytes_are_a_warning(good, tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(good + bytes(1 << 20))
    (warning,) = GgufFile.open(path).warnings
    assert "unused bytes after the last tensor" in warning


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "nowhere.gguf").symlink_to(tmp_path / "missing")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "null.gguf").symlink_to("/dev/null")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "hole.gguf").touch()
    os.truncate(tmp_path / "hole.gguf", 1 << 40)
    said = {p.stem: refusal(p) for p in tmp_path.iterdir()}
    for name, pattern in {
        "pipe": "not a regular file",
        "nowhere": "no such file",
        "loop": "too many levels of symbolic links",
        "device": "not a regular file",
        "null": "not a regular file",
        "folder": "is a directory",
        "hole": "begins with zeros",
    }.items():
        assert pattern in said[name]


def test_odd_paths_are_shown_escaped_and_cut(tmp_path):
    assert "a\\x0ab\\x1b[31m.gguf" in refusal(tmp_path / "a\nb\x1b[31m.gguf")
    assert "\\xff" in refusal(os.path.join(tmp_path, os.fsdecode(b"\xff.gguf")))
    assert len(refusal("x" * 4000)) < 200
    assert "not a file name" in refusal("a\0b")


def test_text_from_a_file_is_shown_in_one_line():
    assert shown(b"\x1b[2J\x07\nok") == "\\x1b[2J\\x07\\x0aok"
    assert shown("é" * 100) == "é" * 80
    assert shown("\x9b" * 100) == "\\x9b" * 19 + "\\..."
    assert len(shown("\x00" * 1000)) <= 80 and len(shown(b"a" * 1000)) == 80


# --- split files ------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    return write_tiny(tmp_path / "split.gguf", Tiny(parts=3))


def edit(path, change):
    with open(path, "rb") as file:
        image = bad_gguf.take_apart(file.read())
    change(image)
    with open(path, "wb") as file:
        file.write(image.encoded())


def test_parts_are_one_model(parts, tmp_path):
    write_tiny(tmp_path / "whole.gguf")
    whole, split = GgufFile.open(tmp_path / "whole.gguf"), GgufFile.open(parts[0])
    assert split.paths == tuple(parts) and len(split.sizes) == 3
    assert set(whole.tensors) == set(split.tensors)
    assert {t.file for t in split.tensors.values()} == {0, 1, 2}
    for name, tensor in whole.tensors.items():
        with open(split.paths[split.tensors[name].file], "rb") as part, open(tmp_path / "whole.gguf", "rb") as file:
            part.seek(split.tensors[name].offset)
            file.seek(tensor.offset)
            assert part.read(tensor.bytes) == file.read(tensor.bytes)


def test_a_missing_part_is_named(parts):
    os.remove(parts[1])
    assert "split-00002-of-00003.gguf: part 2 of 3 of the split model is missing" in refusal(parts[0])


def test_a_later_part_alone_is_refused(parts):
    assert "part 2 of 3 of a split model; give part 1" in refusal(parts[1])


def test_a_cut_part_is_named(parts):
    os.truncate(parts[2], os.path.getsize(parts[2]) - 4096)
    assert "split-00003-of-00003.gguf: truncated" in refusal(parts[0])


def test_a_tensor_in_two_parts_is_refused(parts):
    with open(parts[0], "rb") as file:
        name = bad_gguf.take_apart(file.read()).records[0].name
    edit(parts[1], lambda i: setattr(i.records[0], "name", name))
    assert "is also in another part" in refusal(parts[0])


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("split.no", 2, "something else than part 2 of 3"),
        ("split.count", 4, "something else than part 2 of 3"),
        ("general.architecture", "deepseek2", "a part of another model"),
    ],
)
def test_a_part_of_another_model_is_refused(parts, key, value, pattern):
    edit(parts[1], lambda i: i.put(key, bad_gguf.STR if isinstance(value, str) else bad_gguf.U16, value))
    assert pattern in refusal(parts[0])


def test_parts_must_hold_all_tensors(parts):
    edit(parts[0], lambda i: i.put("split.tensors.count", bad_gguf.I32, 99))
    assert "split.tensors.count is 99" in refusal(parts[0])


def test_a_part_that_is_no_part_is_refused(parts):
    edit(parts[1], lambda i: i.keys.pop(b"split.no"))
    assert "split.no is missing" in refusal(parts[0])


def test_a_file_replaced_after_its_header_was_read_is_noticed(good, tmp_path):
    path = tmp_path / "t.gguf"
    path.write_bytes(good)
    opened = GgufFile.open(path)
    opened.check_unchanged()
    path.with_suffix(".new").write_bytes(good)
    os.replace(path.with_suffix(".new"), path)
    with pytest.raises(GgufError, match="changed while it was being opened"):
        opened.check_unchanged()
    path.unlink()
    with pytest.raises(GgufError, match="no such file"):
        opened.check_unchanged()


@pytest.mark.parametrize("kind", ["words", "empty", "with NULs", "long", "all of them"])
def test_arrays_of_strings_hold_what_was_written(good, tmp_path, rng, kind):
    """Found by what lengths look like, or walked one by one; more of them than fit into one window."""
    alphabet = list(b"abc\xc4\xa0") + ([0] if kind in ("with NULs", "all of them") else [])
    sizes = {"words": (1, 20), "empty": (0, 1), "with NULs": (1, 12), "long": (60_000, 70_000)}.get(kind, (0, 300))
    n = 8 if kind == "long" else 2000
    strings = [bytes(rng.choice(alphabet, k).astype(np.uint8)) for k in rng.integers(*sizes, n)] * 30
    image = bad_gguf.take_apart(good)
    image.put("x.strings", bad_gguf.ARR, bad_gguf.array(bad_gguf.STR, strings))
    image.put("x.after", bad_gguf.U32, 7)
    (tmp_path / "s.gguf").write_bytes(image.encoded())
    metadata = GgufFile.open(tmp_path / "s.gguf").metadata
    assert list(metadata["x.strings"]) == strings and metadata["x.after"] == 7
    joined = metadata["x.strings"].joined()
    assert joined == (None if "NULs" in kind or "all" in kind else b"".join(b"\n" + s for s in strings))


# --- files that lie elsewhere, and a single key ------------------------------------------------


class Elsewhere:
    """The parts of a split model, behind names that no file here has."""

    def __init__(self, paths):
        self.files = {f"far/{os.path.basename(p)}": p for p in paths}
        self.n_read = 0

    def __call__(self, name):
        with open(self.files[name], "rb") as file:
            return Far(self, file.read())


class Far:
    def __init__(self, owner, data):
        self.owner, self.data, self.stamp = owner, data, (0, 0, len(data), 0)

    def read(self, n, offset):
        self.owner.n_read += n
        return self.data[offset : offset + min(n, 1000)]  # a source may give less than it is asked for

    def close(self):
        pass


def test_headers_can_be_read_from_elsewhere(parts):
    far = GgufFile.open("far/split-00001-of-00003.gguf", Elsewhere(parts))
    near = GgufFile.open(parts[0])
    assert far.tensors == near.tensors and far.sizes == near.sizes and far.metadata.keys() == near.metadata.keys()


def test_one_key_is_read_without_what_lies_behind_it(tmp_path):
    write_tiny(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    assert peek(tmp_path / "whole.gguf", "general.architecture") == "mistral4"
    assert peek(tmp_path / "whole.gguf", "no.such.key") is None
    (tmp_path / "cut.gguf").write_bytes(data[: data.index(b"tokenizer.ggml.tokens") + 4])
    assert peek(tmp_path / "cut.gguf", "general.architecture") == "mistral4"
    with pytest.raises(GgufError, match="truncated"):
        peek(tmp_path / "cut.gguf", "no.such.key")
    with pytest.raises(GgufError, match="no such file"):
        peek(tmp_path / "none.gguf", "general.architecture")
