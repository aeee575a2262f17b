"""Other inputs of the kinds of faults that users met, found by trying; each test is named after the row of its kind."""

import struct

import pytest
import test_cli
import test_document
from bad_images import chunk, encoded, png
from PIL import Image as Pillow
from test_image import pattern

from ms4.cli import streams
from ms4.models.document import DocumentError, load_bytes, load_file
from ms4.models.image import NO_END, ImageError, load_image
from ms4.models.untrusted import sniff

command = test_cli.ms4  # command(arguments..., stdin=bytes) -> its exit code and what it wrote


# --- B1: pixels that are whole count, however the file ends


def photo(**options):
    return encoded(Pillow.fromarray(pattern("photo", 90, 60)), "JPEG", **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2, "quality": 40}])
def test_b1_a_jpeg_without_its_end_is_read_if_its_pixels_are_there(options):
    data = photo(**options)
    whole, cut = load_image(data), load_image(data[:-2])
    assert cut.picture.tobytes() == whole.picture.tobytes() and (whole.note, cut.note) == ("", NO_END)
    for end in (*range(len(data) // 2, len(data) - 2, 97), len(data) - 3):
        with pytest.raises(ImageError, match="truncated|damaged"):
            load_image(data[:end])


def test_b1_a_jpeg_that_ends_between_two_scans_is_not_whole():
    data = photo(progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xda", b"\xff\xc4")]
    assert len(scans) > 4
    for at in scans[2:]:
        with pytest.raises(ImageError, match="truncated|damaged"):
            load_image(data[:at])


def test_b1_a_png_is_read_if_its_rows_are_there():
    data = png(8, 8)
    for missing in (1, 4, 8, 12, 13, 16):
        cut = load_image(data[:-missing])
        assert cut.picture.tobytes() == load_image(data).picture.tobytes() and cut.note == NO_END
    after = data[:-12] + chunk(b"tEXt", b"k\0v")[:-3]  # what comes after the pixels is cut
    assert load_image(after).note == NO_END and load_image(data).note == ""


# --- B10: what cameras make


def tiff(order, entries, more=b"", head=b""):
    """A TIFF of one page with (tag, type, count, value) entries."""
    packed = b"".join(
        struct.pack(order + "HHI", *entry[:3])
        + (struct.pack(order + "HH", entry[3], 0) if entry[1] == 3 else struct.pack(order + "I", entry[3]))
        for entry in entries
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(head)) + head
    return start + struct.pack(order + "H", len(entries)) + packed + bytes(4) + more


def raws(order):
    small = [(0x100, 4, 1, 8), (0x101, 4, 1, 8), (0x106, 3, 1, 2)]
    page = struct.pack(order + "H", 1) + struct.pack(order + "HHIHH", 0x106, 3, 1, 32803, 0) + bytes(4)
    at = 8 + 2 + 12 * 4 + 4
    yield "DNG", tiff(order, [*small, (0xC612, 1, 4, 0x0401)])
    yield "the sensor's data on the first page", tiff(order, [*small[:2], (0x106, 3, 1, 32803)])
    yield "the sensor's data below a preview", tiff(order, [*small, (0x14A, 4, 1, at)], page)
    two = struct.pack(order + "II", 0, at + 8)
    yield "on the second page below", tiff(order, [*small, (0x14A, 4, 2, at)], two + page)
    yield "CR2", tiff(order, small, head=b"CR\2\0" + bytes(4))


@pytest.mark.parametrize("order", "<>")
def test_b10_a_raw_photograph_says_what_to_do(order, command, tmp_path):
    for name, data in raws(order):
        with pytest.raises(ImageError, match="raw photograph .* export it as JPEG"):
            load_image(data)
        assert sniff(data) == "RAW", name
    (tmp_path / "a.dng").write_bytes(data)
    for option in ("-i", "-f"):
        got = command("run", "-m", test_cli.MODEL, "--count", option, tmp_path / "a.dng", "Hi")
        assert got.code == 7 and "export it as JPEG" in got.err and got.out == ""


def test_b10_headers_of_cameras_and_plain_tiffs_are_told_apart():
    for head in (b"IIRO\x08\0\0\0", b"IIU\0\x18\0\0\0", b"FUJIFILMCCD-RAW 0201", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom"):
        assert sniff(head + bytes(64)) == "RAW"
    assert sniff(encoded(Pillow.new("RGB", (8, 8)), "TIFF")) == "TIFF"
    loop = tiff("<", [(0x14A, 4, 1, 8)])
    large = b"II+\0\x08\0\0\0" + struct.pack("<Q", 3 << 8) + struct.pack("<HHI", 0xC612, 1, 4) * 400
    assert sniff(loop) == sniff(b"II*\0" + b"\xff" * 99) == sniff(large) == "TIFF"


# --- A10: commands from a pipe


@pytest.mark.parametrize("typed", ["/effort hihg", "/think maybe", "/set temp abc", "/set nothing 3", "/set compact 2"])
def test_a10_a_command_from_a_pipe_that_says_nothing_ends_it(command, typed):
    got = command("chat", "-m", test_cli.MODEL, "--greedy", "-n", "2", "--no-session", stdin=f"{typed}\nHi\n".encode())
    assert got.code == 2 and got.out == "" and got.err.startswith("ms4: error: "), got.err
    name = typed.split()[0] if "/set" not in typed else "/set temp"
    assert command("chat", "-m", test_cli.MODEL, "--no-session", stdin=f"{name}\n".encode()).code == 0


# --- A4, B12: PDFs


def xfa(packet):
    """A PDF whose form only XFA draws: its page says that another reader is needed."""
    wait = test_document.pdf(b"BT /F 24 Tf 72 700 Td (Please wait...) Tj ET ")
    form = b"/AcroForm<</Fields[]/XFA 9 0 R>>/NeedsRendering true"
    stream = b"9 0 obj<</Length %d>>stream\n%s\nendstream endobj\n" % (len(packet), packet)
    catalog = b"1 0 obj<</Type/Catalog/Pages 2 0 R%s>>endobj\n" % form
    body = wait[: wait.index(b"xref")].replace(
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Catalog/Pages 2 0 R%s>>" % form
    )
    return body + stream + catalog + b"trailer<</Root 1 0 R/Size 10>>\n%%EOF\n"


def test_a4_what_is_filled_into_a_dynamic_form_is_not_lost(capfd):
    packet = (
        b'<x:xdp xmlns:x="http://ns.adobe.com/xdp/"><template><field>Name?</field></template><f:datasets xmlns:f="f">'
        b"<f:data><form><name> Erika </name><total>42 EUR</total><empty/></form></f:data></f:datasets></x:xdp>"
    )
    parts = load_bytes(xfa(packet), "form.pdf")
    assert parts[0] == "form.pdf, what is filled in:\n[form field name: Erika]\n[form field total: 42 EUR]"
    assert capfd.readouterr() == ("", ""), "what a library has to say of itself is nobody's business"
    for other in (b"<x:xdp", packet.replace(b"datasets", b"others")):
        with pytest.raises(DocumentError, match="a form in XFA, .* print it there as a PDF"):
            load_bytes(xfa(other), "form.pdf")


def test_b12_a_pdf_without_pages_needs_no_password():
    with pytest.raises(DocumentError, match="no pages"):
        load_bytes(test_document.pdf(), "a.pdf")


@pytest.mark.parametrize("pages", ["1\u20133", "1..3", "1 - 3", "-2", "1;2", ""])
def test_b12_pages_in_another_spelling_are_no_part_of_the_name(pages, tmp_path):
    (tmp_path / "a.pdf").write_bytes(test_document.pdf(test_document.TEXT))
    with pytest.raises(DocumentError, match=r"a\.pdf: pages are named as in :1-3,7, not :"):
        load_file(f"{tmp_path}/a.pdf:{pages}")


# --- B10, B11: what is neither text nor a picture


@pytest.mark.parametrize(
    "data, says",
    [
        (
            b"PK\3\4" + bytes(26) + b"[Content_Types].xml" + bytes(40) + b"word/document.xml",
            "a document of Word; export",
        ),
        (
            b"PK\3\4" + bytes(26) + b"mimetypeapplication/vnd.oasis.opendocument.text",
            "a document of LibreOffice; export",
        ),
        (b"PK\3\4" + bytes(26) + b"a.txt", "an archive; unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "a document of Microsoft Office; export it as PDF"),
        (b"\x1f\x8b\x08" + bytes(20), "compressed; gunzip it first"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000; save it as PNG or JPEG"),
        (b"P6\n2 2\n255\n" + b"\xff" * 12, "a Netpbm picture; save it"),
        (b"\0\0\0\x18ftypisom" + bytes(16), "a video or sound"),
        (b"GGUF\3\0\0\0", "a model, not an attachment"),
    ],
)
def test_b10_what_cannot_be_read_says_what_it_is_and_what_to_do(data, says, tmp_path, command):
    (tmp_path / "a.bin").write_bytes(data)
    for option in ("-i", "-f"):
        got = command("run", "-m", test_cli.MODEL, "--count", option, tmp_path / "a.bin", "Hi")
        assert got.code == 7 and got.out == "" and got.err.startswith(f"ms4: error: {tmp_path}/a.bin: {says}"), got.err


def test_b10_numbers_without_a_scale_are_not_taken_for_black_or_white():
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match="numbers of 32 bits"):
            load_image(encoded(Pillow.new(mode, (8, 8), 1), "TIFF"))


def test_b10_an_empty_picture_is_no_text(tmp_path):
    for name in ("scan.pdf", "a.PNG"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DocumentError, match="the file is empty"):
            load_file(str(tmp_path / name))
    (tmp_path / "diff.txt").write_bytes(b"")
    assert load_file(str(tmp_path / "diff.txt")) == [f"{tmp_path}/diff.txt:\n"]


def test_b11_a_pipe_of_a_chat_is_held_to_what_stdin_is(command, monkeypatch):
    assert command("chat", "-m", test_cli.MODEL, stdin="Hi\n".encode("utf-16-le")).code == 7
    monkeypatch.setattr(streams, "MOST_INPUT", 100)
    got = command("chat", "-m", test_cli.MODEL, stdin=b"a" * 101 + b"\n")
    assert got.code == 7 and "more than" in got.err, "half a line is no message"
