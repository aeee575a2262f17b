"""Faults that users met with what they attach and name, each test named after its row in the list."""

import struct
from io import BytesIO

import numpy as np
import pytest
from bad_images import encoded
from PIL import Image as Pillow

from ms4.models import image as img
from ms4.models.image import ImageError, load_image, measure, preprocess
from ms4.models.untrusted import sniff

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
