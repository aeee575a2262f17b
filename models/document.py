"""document.py: what `-f` attaches: text files, pictures, and pages of a PDF, as parts of a message.

A part is a str or an `Image`, in the order in which the model is to read them.  PDFs go through pdfium, which is
imported only when one comes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from ms4.models import pdf_page
from ms4.models.image import MAX_BYTES, Image, PixelRule, load_image
from ms4.models.untrusted import (
    InputError,
    Reading,
    check_size,
    decode_text,
    drop_line_end,
    marked,
    read_file,
    shown,
    sniff,
    stranger,
)

MAX_TEXT_BYTES = 16 << 20
MAX_PDF_BYTES = 128 << 20
MAX_PDF_IMAGES = 100
UTF_8 = Reading()
PDF_MODES = ("auto", "text", "image")
_NO_TEXT = re.compile(r"\.(pdf|png|jpe?g|webp|gif|bmp|tiff?|avif|hei[cf])$", re.IGNORECASE)
_PAGES = re.compile(r"(.+):(\d+(?:-\d*)?(?:,\d+(?:-\d*)?)*)")
_NEARLY_PAGES = re.compile(r"[\d\s,.;:+\u2010-\u2015\u2212-]*")

SIDE = PixelRule.max_side  # pixels on the longer side of a page that becomes an image

Attachment = str | Image


class DocumentError(InputError):
    """This document cannot be used."""


class EncodingError(DocumentError):
    """This text is in another encoding than the one that was expected."""


class PasswordError(DocumentError):
    """This PDF opens only with its password."""


def load_file(spec: str, pdf: str = "auto", side: int = SIDE, rule: Reading = UTF_8) -> list[Attachment]:
    """The parts of `PATH` or `PATH:PAGES`, for example `report.pdf:1-3,7`; `load_bytes` explains the rest."""
    path, pages = split_spec(spec)
    near, _, wrong = path.rpartition(":")
    if _NEARLY_PAGES.fullmatch(wrong) and os.path.isfile(near) and not os.path.lexists(path):
        raise DocumentError(f"{shown(near)}: pages are named as in :1-3,7, not :{shown(wrong)}")
    return load_bytes(read_file(path, MAX_PDF_BYTES, DocumentError), path, pages, pdf, side, rule)


def load_bytes(
    data: bytes, name: str, pages: str | None = None, pdf: str = "auto", side: int = SIDE, rule: Reading = UTF_8
) -> list[Attachment]:
    """The parts of a file's bytes.

    pages: as in `1-3,7`, for a PDF; None takes all.  pdf: `text` takes the text layer, `image` a picture of the page
    with `side` pixels on its longer side, `auto` the text, and the picture too if the page has pictures, drawings,
    filled forms or annotations, or no text.
    rule: how the bytes of a text become text, and the password of a PDF.
    """
    name, kind = shown(name), sniff(data)
    if kind == "PDF":
        check_size(data, MAX_PDF_BYTES, name, DocumentError)
        return [part for page in _pages(data, name, pages, pdf, side, rule.password) for part in page]
    if pages is not None:
        raise DocumentError(f"{name}: only a PDF has pages; leave out :{pages}")
    if kind is not None:
        check_size(data, MAX_BYTES, name, DocumentError)
        return [load_image(data, name)]
    if not data and _NO_TEXT.search(name):
        raise DocumentError(f"{name}: the file is empty")
    if known := "" if rule.lossy or rule.encoding else stranger(data):
        raise DocumentError(f"{name}: {known}")
    check_size(data, MAX_TEXT_BYTES, name, DocumentError)
    return [f"{name}:\n{drop_line_end(_text(data, name, rule))}"]


def split_spec(spec: str) -> tuple[str, str | None]:
    """(path, pages or None); a file whose name really ends so is meant as a whole."""
    match = _PAGES.fullmatch(spec)
    if match is None or os.path.exists(spec):
        return spec, None
    return match[1], match[2]


def select_pages(pages: str, n_pages: int, name: str) -> list[int]:
    """Page numbers, from 1, in the order asked for; an open end (`5-`) goes to the last page."""
    chosen: list[int] = []
    for piece in pages.split(","):
        first, dash, last = piece.partition("-")
        begin, end = int(first), int(last) if last else n_pages if dash else int(first)
        if not 1 <= begin <= n_pages or not 1 <= end <= n_pages:
            raise DocumentError(f"{name}: page {piece} is not there; the document has {n_pages}")
        if end < begin:
            raise DocumentError(f"{name}: pages {piece} run backwards")
        chosen += range(begin, end + 1)
    return chosen


def _text(data: bytes, name: str, rule: Reading) -> str:
    try:
        text = decode_text(data, rule)
    except UnicodeError as e:
        if mark := marked(data, rule):
            raise EncodingError(f"{name}: a text in {mark}, not UTF-8") from None
        where = f" (byte {e.start})" if isinstance(e, UnicodeDecodeError) else ""
        raise EncodingError(f"{name}: neither a PDF, a picture nor {rule.name} text{where}") from None
    if "\0" in text and not rule.lossy:
        raise EncodingError(f"{name}: neither a PDF, a picture nor text (it holds NUL bytes)")
    return text.replace("\0", "\ufffd")


# --- PDF ----------------------------------------------------------------------------------------------------------


def _pages(
    data: bytes, name: str, pages: str | None, mode: str, side: int, password: str
) -> Iterator[list[Attachment]]:
    if mode not in PDF_MODES:
        raise ValueError(f"pdf is {mode!r}; one of {', '.join(PDF_MODES)} was expected")
    try:
        import pypdfium2
    except ImportError:
        raise DocumentError(f"{name}: reading a PDF needs pypdfium2; `pip install pypdfium2`") from None
    logging.getLogger("pypdfium2").setLevel(logging.ERROR)  # it would say on stderr what it was built without
    try:
        with pypdfium2.PdfDocument(data, password=password or None) as document:
            document.init_forms()
            yield from _open_pages(document, hashlib.sha256(data).digest(), name, pages, mode, side)
    except pypdfium2.PdfiumError as e:
        # pdfium keeps the code of an earlier document, if it gives none for this one.
        if e.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD and b"/Encrypt" in data:
            raise PasswordError(f"{name}: {'not the right password' if password else 'needs a password'}") from None
        if b"/Encrypt" not in data and e.err_code in (pypdfium2.raw.FPDF_ERR_SUCCESS, pypdfium2.raw.FPDF_ERR_PASSWORD):
            raise DocumentError(f"{name}: damaged PDF (it has no pages)") from None
        raise DocumentError(f"{name}: damaged PDF ({shown(' '.join(str(e).split()))[:120]})") from None


def _open_pages(
    document: Any, digest: bytes, name: str, pages: str | None, mode: str, side: int
) -> Iterator[list[Attachment]]:
    n_pages, n_images, has_text = len(document), 0, False
    if n_pages == 0:
        raise DocumentError(f"{name}: the PDF has no pages")
    if (filled := pdf_page.form_data(document)) is not None:
        if not filled:
            raise DocumentError(f"{name}: a form in XFA, which only Adobe's reader shows; print it there as a PDF")
        yield ["\n".join([f"{name}, what is filled in:", *filled])]
    if lying := pdf_page.attached(document):
        yield [f"[files that lie in {name} and are not shown here: {shown(', '.join(lying))[:400]}]"]
    for number in select_pages(pages or "1-", n_pages, name):
        page = document[number - 1]
        label = f"{name}, page {number}"
        text = "" if mode == "image" else "\n".join(filter(None, (_page_text(page), *pdf_page.kept_apart(page))))
        parts: list[Attachment] = [f"{label}:\n{text}"] if text else [f"{label}:"]
        if mode == "image" or mode == "auto" and (not text or pdf_page.has_pictures(page)):
            n_images += 1
            if n_images > MAX_PDF_IMAGES:
                raise DocumentError(f"{name}: over {MAX_PDF_IMAGES} pages as images; choose some, as in {name}:1-20")
            parts.append(_page_image(page, hashlib.sha256(digest + f"{number} {side}".encode()).digest(), label, side))
        has_text = has_text or bool(text)
        page.close()
        yield parts
    if mode == "text" and not has_text:
        raise DocumentError(f"{name}: these pages have no text layer; read them with --pdf image")


def _page_text(page: Any) -> str:
    layer = page.get_textpage()
    text = layer.get_text_bounded().replace("\r\n", "\n")
    layer.close()
    # pdfium marks a hyphen at the end of a line with U+FFFE or U+0002.
    return text.replace("\ufffe", "-").replace("\x02", "-").replace("\0", "").strip()


def _page_image(page: Any, digest: bytes, label: str, side: int) -> Image:
    width, height = page.get_size()
    if not (width > 0 and height > 0):
        raise DocumentError(f"{label}: the page has no size")
    # pdfium rounds up, and a side must not pass the limit by that.
    bitmap = page.render(scale=(side - 0.01) / max(width, height))
    picture = bitmap.to_pil().convert("RGB")
    bitmap.close()
    return Image(label, picture, digest)
