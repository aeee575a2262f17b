"""What -f attaches: page ranges, the text layer and pictures of a PDF, and text files."""

import io

import numpy as np
import pypdfium2
import pytest
from bad_images import png
from PIL import Image as Pillow

from ms4.models import document as doc
from ms4.models.document import DocumentError, load_bytes, load_file, select_pages, split_spec
from ms4.models.image import Image, ImageError, grid, preprocess
from ms4.quant import visible

TEXT = b"BT /F 24 Tf 72 700 Td (Total due 42 EUR) Tj ET "
PICTURE = b"q 100 0 0 100 100 100 cm /I Do Q "
DRAWING = b"0 0 1 rg 0 0 600 850 re f "


def pdf(*pages: bytes) -> bytes:
    """A PDF of A4 pages with these contents; they may use the font /F and the 1 x 1 picture /I."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Type/XObject/Subtype/Image/Width 1/Height 1/ColorSpace/DeviceRGB/BitsPerComponent 8/Length 3>>"
        b"stream\n\xff\0\0\nendstream",
    ]
    kids = []
    for content in pages:
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(content), content))
        resources = b"/Resources<</Font<</F 3 0 R>>/XObject<</I 4 0 R>>>>"
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents %d 0 R%s>>" % (len(objects), resources)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<</Type/Pages/Kids[%s]/Count %d>>" % (b" ".join(kids), len(kids))
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % o for o in offsets)
    size = len(objects) + 1
    tail = b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
    return out + tail % (size, table, size, len(out))


THREE = pdf(TEXT, TEXT + PICTURE, DRAWING)


def outline(parts: list) -> list:
    """Texts as they are, pictures by their size."""
    return [part.size if isinstance(part, Image) else part for part in parts]


def test_auto_adds_a_picture_where_the_page_has_one_or_no_text():
    assert outline(load_bytes(THREE, "a.pdf")) == [
        "a.pdf, page 1:\nTotal due 42 EUR",
        "a.pdf, page 2:\nTotal due 42 EUR",
        (1089, 1540),
        "a.pdf, page 3:",
        (1089, 1540),
    ]


def test_text_and_image_take_only_that():
    text = [f"a.pdf, page {n}:\nTotal due 42 EUR" for n in (1, 2)]
    assert load_bytes(THREE, "a.pdf", "1-2", "text") == text
    assert outline(load_bytes(THREE, "a.pdf", "3,1", "image", side=280)) == [
        "a.pdf, page 3:",
        (198, 280),
        "a.pdf, page 1:",
        (198, 280),
    ]
    with pytest.raises(DocumentError, match="no text layer"):
        load_bytes(THREE, "a.pdf", "3", "text")


def test_a_page_has_its_colours_and_the_largest_grid_of_its_shape():
    page = load_bytes(THREE, "a.pdf", "3")[1]
    assert np.asarray(page.picture)[700, 500].tolist() == [0, 0, 255]
    assert grid(*page.size) == (39, 55) and preprocess(page).n_tokens == 2200


def test_equal_pages_are_known_again():
    first, again, other = (load_bytes(THREE, "a.pdf", n, "image")[1].digest for n in "113")
    assert first == again != other


@pytest.mark.parametrize(
    "pages, want", [("1", [1]), ("2-4", [2, 3, 4]), ("5,1-2", [5, 1, 2]), ("4-", [4, 5]), ("1-", [1, 2, 3, 4, 5])]
)
def test_page_ranges(pages, want):
    assert select_pages(pages, 5, "a.pdf") == want


@pytest.mark.parametrize("pages, says", [("0", "not there"), ("6", "has 5"), ("2-6", "has 5"), ("3-2", "backwards")])
def test_impossible_page_ranges(pages, says):
    with pytest.raises(DocumentError, match=says):
        select_pages(pages, 5, "a.pdf")


def test_the_end_of_a_name_is_pages_unless_a_file_is_called_so(tmp_path):
    assert split_spec("report.pdf:1-3,7") == ("report.pdf", "1-3,7")
    assert split_spec("/a:b/c.pdf:3-") == ("/a:b/c.pdf", "3-")
    for name in ("report.pdf", "notes:x", "a.pdf:", "a.pdf:1,", ":3"):
        assert split_spec(name) == (name, None)
    (tmp_path / "log:1").write_text("hello")
    assert load_file(str(tmp_path / "log:1")) == [f"{tmp_path}/log:1:\nhello"]


def locked() -> bytes:
    """A PDF that names an encryption nobody can open without its password."""
    entry = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>/ID[<00><00>]" % (b"ab" * 32, b"cd" * 32)
    return THREE.replace(b"/Root 1 0 R", b"/Root 1 0 R" + entry)


@pytest.mark.parametrize(
    "data, says",
    [
        (locked(), "needs a password"),
        (THREE[:300], "damaged PDF"),
        (b"%PDF-1.4\n", "damaged PDF"),
        (pdf(), "no pages|damaged"),
        (b"hello \xff", r"nor UTF-8 text \(byte 6\)"),
        (b"a\0b", "NUL"),
        (b"x" * ((16 << 20) + 1), "larger than 16 MiB"),
    ],
    ids=["locked", "cut", "header-only", "no-pages", "latin-1", "nul", "large"],
)
def test_what_cannot_be_used_is_refused_in_one_line(data, says):
    with pytest.raises(DocumentError, match=says) as caught:
        load_bytes(data, "odd\x1b.bin")
    assert str(caught.value).startswith("odd\\x1b.bin: ") and str(caught.value).isprintable()


def test_damaged_pdfs_never_do_more_than_refuse(rng):
    good = np.frombuffer(THREE, np.uint8)
    for _ in range(60):
        broken = good.copy()
        at = rng.integers(9, len(good), 5)
        broken[at] = rng.integers(0, 256, 5)
        try:
            load_bytes(broken.tobytes(), "a.pdf", side=56)
        except DocumentError as e:
            assert str(e) == visible.line(str(e))


def test_too_many_pages_as_images_are_refused(monkeypatch):
    monkeypatch.setattr(doc, "MAX_PDF_IMAGES", 2)
    with pytest.raises(DocumentError, match="as images; choose some"):
        load_bytes(THREE, "a.pdf", None, "image", side=28)


def test_text_files_and_pictures():
    assert load_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe\n", "a.txt") == ["a.txt:\ngrüße"]
    assert outline(load_bytes(png(8, 6), "a.png")) == [(8, 6)]
    with pytest.raises(DocumentError, match="only a PDF has pages"):
        load_bytes(b"hello", "a.txt", "1")
    with pytest.raises(ImageError, match="a.png: truncated"):
        load_bytes(png(8, 6)[:40], "a.png")


def test_a_pdf_made_by_other_software():
    out = io.BytesIO()
    Pillow.new("RGB", (200, 100), (0, 128, 0)).save(out, "PDF")
    parts = load_bytes(out.getvalue(), "scan.pdf")
    assert outline(parts) == ["scan.pdf, page 1:", (1540, 770)]
    assert np.abs(np.asarray(parts[1].picture)[385, 770].astype(int) - (0, 128, 0)).max() < 4
    assert len(pypdfium2.PdfDocument(out.getvalue())) == 1
