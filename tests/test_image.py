"""Pictures from outside: which are read, as what pixels, and that no other harm is done."""

import base64
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from bad_images import RED, Sample, chunk, encoded, png, samples
from PIL import Image as Pillow
from PIL import ImageOps

from ms4.models import image as img
from ms4.models.image import ImageError, PixelRule, grid, load_image, measure, preprocess
from ms4.models.untrusted import read_file, sniff
from ms4.quant import visible

SAMPLES = list(samples())


def unnormalised(array: np.ndarray) -> np.ndarray:
    """Back to 0..255, [height, width, 3]."""
    rule = PixelRule()
    return (array.transpose(1, 2, 0) * np.array(rule.std) + np.array(rule.mean)) * 255


def pattern(kind: str, width: int, height: int) -> np.ndarray:
    """A picture that needs no file: soft like a photo, or hard like small print."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    if kind == "photo":
        channels = [np.sin(x / (7 + k) + y / (31 - 3 * k)) * np.cos(y / (11 + k)) for k in range(3)]
        return (127.5 + 127 * np.stack(channels, -1)).astype(np.uint8)
    ink = ((x * 7 + (y // 9) * 13) % 17 < 5) & (y % 9 < 7)
    return np.repeat(np.where(ink, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


# --- the size rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, columns, rows, n_tokens",
    [
        (1, 1, 1, 1, 2),
        (28, 28, 1, 1, 2),
        (29, 28, 2, 1, 3),
        (100, 60, 4, 3, 15),
        (1540, 1540, 55, 55, 3080),
        (3000, 1000, 55, 19, 1064),
        (1920, 1080, 55, 31, 1736),
        (4000, 3000, 55, 42, 2352),
        (1541, 10, 55, 1, 56),
        (2, 5000, 1, 55, 110),
        # Half the size is 28.5 and 85.5 pixels: ties go to even, so one and four cells, not two and four.
        (3080, 57, 55, 1, 56),
        (3080, 171, 55, 4, 224),
    ],
)
def test_the_grid_of_a_size(width, height, columns, rows, n_tokens):
    assert grid(width, height) == (columns, rows)
    assert img.Pixels(np.empty(0), columns, rows).n_tokens == n_tokens


def test_max_tokens_is_kept_and_changes_nothing_that_fits(rng):
    for _ in range(300):
        width, height = (int(n) for n in np.exp(rng.uniform(0, 9, 2)))
        most = int(rng.integers(2, 3500))
        native, lowered = grid(width, height), grid(width, height, most)
        fits = (native[0] + 1) * native[1] <= most
        assert (lowered[0] + 1) * lowered[1] <= most
        assert not fits or lowered == native
    assert grid(1540, 1540, 1024) == (31, 31)  # 32 x 32 cells would need 33 x 32 = 1056
    with pytest.raises(ValueError):
        grid(10, 10, 1)


def test_a_tower_with_other_cells():
    assert grid(2048, 1000, rule=PixelRule(max_side=1024, cell=16)) == (64, 32)


# --- what is read and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_every_odd_picture(sample: Sample):
    if sample.says is None:
        picture = load_image(sample.data, "odd.png")
        pixels = preprocess(picture)
        assert sample.size in (None, picture.size)
        assert pixels.array.shape == (3, 28 * pixels.gh, 28 * pixels.gw) and pixels.n_tokens <= 3080
        if sample.colour is not None:
            assert np.abs(unnormalised(pixels.array) - sample.colour).max() < 1
    else:
        with pytest.raises(ImageError) as caught:
            load_image(sample.data, "odd\x1b[31m.png")
        message = str(caught.value)
        assert message.startswith("odd\\x1b[31m.png: ") and message.isprintable() and len(message) < 200
        assert sample.says in message


def test_only_the_first_frame_and_a_note_of_it():
    animated = {s.id for s in SAMPLES if s.says is None and load_image(s.data).animated}
    assert animated == {"apng", "gif-50-frames", "webp-2-frames"}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_cut_file_is_refused_wherever_a_pixel_is_missing(kind, options):
    data = encoded(Pillow.fromarray(pattern("photo", 90, 60)), kind, **options)
    want = preprocess(load_image(data)).array
    # What comes after the pixels: the mark of the end, checksums, what fills the last row.
    after = {"GIF": 2, "BMP": 2, "JPEG": 2, "PNG": 24}.get(kind, 0)
    for cut in {*range(1, len(data) - after, max(1, len(data) // 40)), len(data) - after - 1}:
        with pytest.raises(ImageError):
            load_image(data[:cut])
    for cut in range(len(data) - after, len(data)):
        try:
            assert np.array_equal(preprocess(load_image(data[:cut])).array, want)
        except ImageError:
            assert cut < len(data) - 16


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_damaged_bytes_never_do_more_than_refuse(kind, rng):
    data = np.frombuffer(encoded(Pillow.fromarray(pattern("text", 40, 30)), kind), np.uint8)
    for _ in range(150):
        broken = data.copy()
        at = rng.integers(4, len(data), 3)
        broken[at] = rng.integers(0, 256, 3)
        try:
            preprocess(load_image(broken.tobytes()))
        except ImageError as e:
            assert str(e) == visible.line(str(e))


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.png").write_bytes(b"")
    os.truncate(tmp_path / "large.png", (128 << 20) + 1)
    for path, says in {
        tmp_path / "pipe": "nothing came out of it",
        "/dev/zero": "larger than 128 MiB",
        "/dev/null": "nothing came out of it",
        tmp_path: "is a directory",
        tmp_path / "none.png": "no such file",
        tmp_path / "large.png": "larger than 128 MiB",
        "nul\0.png": "not a possible file name",
    }.items():
        with pytest.raises(ImageError, match=says):
            load_image(path)
    assert read_file(__file__, 1 << 20).startswith(b'"""Pictures')


def test_magic_numbers():
    kinds = {s.id: sniff(s.data) for s in SAMPLES}
    want = {"rgb": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif-cut": "GIF", "text": None, "empty": None}
    assert {id: kinds[id] for id in want} == want
    assert sniff(b"%PDF-1.7\n") == "PDF"


MEMORY = """
import sys
from ms4.models.image import load_image, preprocess
preprocess(load_image(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS:")
preprocess(load_image(sys.argv[2]))
print((status("VmHWM:") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 6])
def test_a_large_picture_is_held_once(tmp_path, turn):
    width, height = 5000, 4000
    exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([turn, 0, 0, 0]) + bytes(4))
    (tmp_path / "large.png").write_bytes(png(width, height, extra=exif))
    (tmp_path / "small.png").write_bytes(png(8, 8))
    command = [sys.executable, "-c", MEMORY, tmp_path / "small.png", tmp_path / "large.png"]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert load_image(tmp_path / "large.png").size == ((height, width) if turn == 6 else (width, height))
    assert width * height * 3 < peak < 1.2 * width * height * 3 + (64 << 20)


# --- pixels -------------------------------------------------------------------------------------------------------


def test_bicubic_weights_by_hand():
    # Twice as large: every output lies a quarter away from an input; (a, a + 2, a + 3) = (-3, 5, 9) / 4 gives 256ths.
    index, weight = img._taps(4, 8)
    assert index[:, 3].tolist() == [0, 1, 2, 3]
    assert (weight[:, 3] * 256).tolist() == [-27, 225, 67, -9]
    assert index[:, 0].tolist() == [0, 0, 0, 1]  # the border repeats
    # Half as large: each output lies in the middle of two inputs.
    index, weight = img._taps(8, 4)
    assert index[:, 1].tolist() == [1, 2, 3, 4]
    assert weight[:, 1].tolist() == [-0.09375, 0.59375, 0.59375, -0.09375]


def test_a_picture_that_fits_is_not_resampled():
    picture = pattern("text", 56, 84)
    pixels = preprocess(load_image(encoded(Pillow.fromarray(picture), "PNG")))
    assert np.abs(unnormalised(pixels.array) - picture).max() < 1e-4


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "golden" / "resize.json").read_text()))
def test_pixels_are_those_of_mistral_common(case):
    picture = Pillow.fromarray(pattern(case["kind"], *case["size"]))
    pixels = preprocess(load_image(encoded(picture, "PNG", compress_level=1)))
    flat = pixels.array.reshape(-1)
    some = flat[np.arange(len(case["samples"])) * 7919 % flat.size]
    assert [pixels.gw, pixels.gh] == case["grid"]
    assert np.abs(some - case["samples"]).max() < 1e-3
    assert np.abs(pixels.array.mean((1, 2), dtype=np.float64) - case["mean"]).max() < 1e-4
    assert np.abs(pixels.array.std((1, 2), dtype=np.float64) - case["std"]).max() < 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_what_viewers_show(orientation):
    exif = Pillow.Exif()
    exif[0x112] = orientation
    picture = Pillow.fromarray(pattern("photo", 56, 28))
    turned = ImageOps.exif_transpose(Pillow.open(BytesIO(encoded(picture, "PNG", exif=exif))))
    pixels = preprocess(load_image(encoded(picture, "PNG", exif=exif)))
    assert np.abs(unnormalised(pixels.array) - np.asarray(turned)).max() < 1e-4


# --- pictures in messages -----------------------------------------------------------------------------------------


def data_url(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def test_measuring_agrees_with_reading():
    seen = {}
    for sample in SAMPLES:
        if sample.says is None:
            *size, seen[sample.id] = measure(data_url(sample.data), 600)
            picture = img.chunk_image(data_url(sample.data))
            pixels = preprocess(picture, 600)
            assert size == [pixels.gw, pixels.gh]
            assert measure({"type": "image", "image": picture}, 600) == (*size, seen[sample.id])
    assert len(set(seen.values())) == len({s.data for s in SAMPLES if s.id in seen})  # digests tell files apart


@pytest.mark.parametrize(
    "chunk, says",
    [
        ({"type": "image_url"}, "needs image_url.url"),
        ({"type": "image_url", "image_url": {"url": 3}}, "needs image_url.url"),
        ({"type": "image_url", "image_url": "https://example.org/a.png"}, "fetches no images"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "fetches no images"),
        ({"type": "image_url", "image_url": "data:image/png;base64,@@@"}, "not base64"),
        (data_url(b"hello"), "not a PNG"),
    ],
)
def test_chunks_without_a_picture_are_refused(chunk, says):
    with pytest.raises(ImageError, match=says):
        measure(chunk)


def test_text_only_prompts_start_without_pillow():
    code = "import sys, ms4.models.image; print('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_red_is_red():
    assert np.abs(unnormalised(preprocess(load_image(png(28, 28))).array) - RED).max() < 1e-4
