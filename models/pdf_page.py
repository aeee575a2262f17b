"""pdf_page.py: what a reader sees on a page of a PDF besides its text layer: pictures, drawings, form values, notes.

It says whether the text alone would leave something out, and gives the texts that pdfium keeps apart from the layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

THIN = 3.0  # points: rules, underlines and the borders of tables are no drawing
WHOLE = 0.9  # of the page: a background is none, either
MOST_FORM = 16 << 20  # bytes of a form's data
DEPTH = 12  # of forms within forms


def has_pictures(page: Any) -> bool:
    """Whether the page shows something that its text does not say."""
    import pypdfium2.raw as raw

    seen = (raw.FPDF_PAGEOBJ_IMAGE, raw.FPDF_PAGEOBJ_SHADING)
    for item in page.get_objects(filter=[*seen, raw.FPDF_PAGEOBJ_PATH], max_depth=DEPTH):
        if item.type in seen or _is_drawing(item, page):
            return True
    return any(True for _ in _annotations(page))


def kept_apart(page: Any) -> list[str]:
    """Values of forms and texts of annotations, a line each."""
    import pypdfium2.raw as raw

    lines = []
    for annotation, kind in _annotations(page):
        if kind == raw.FPDF_ANNOT_WIDGET:
            name = _string(lambda *room: raw.FPDFAnnot_GetFormFieldName(page.formenv, annotation, *room))  # noqa: B023
            lines.append(f"[form field {name}: {_value(page, annotation)}]")
        elif text := _contents(annotation):
            lines.append(f"[note on the page: {text}]")
    return lines


def form_data(document: Any) -> list[str] | None:
    """What was filled into a form that only XFA draws, a line a field; None for a PDF without such a form.

    Its pages say no more than that another reader is needed.
    """
    import pypdfium2.raw as raw

    if raw.FPDF_GetFormType(document.raw) != raw.FORMTYPE_XFA_FULL:
        return None
    lines = []
    for index in range(raw.FPDF_GetXFAPacketCount(document.raw)):
        try:
            packet = ElementTree.fromstring(_packet(document, index))
        except ElementTree.ParseError:  # the parts of one paper, as its beginning alone is
            continue
        found = [packet] if _local(packet) == "datasets" else [e for e in packet.iter() if _local(e) == "datasets"]
        for field in (e for datasets in found for e in datasets.iter()):
            if len(field) == 0 and field.text and field.text.strip():
                lines.append(f"[form field {_local(field)}: {field.text.strip()}]")
    return lines


def attached(document: Any) -> list[str]:
    """The names of the files that lie in a PDF."""
    return [document.get_attachment(i).get_name() for i in range(document.count_attachments())]


def _packet(document: Any, index: int) -> bytes:
    import pypdfium2.raw as raw

    n_bytes = ctypes.c_ulong()
    if not raw.FPDF_GetXFAPacketContent(document.raw, index, None, 0, n_bytes) or n_bytes.value > MOST_FORM:
        return b""
    room = ctypes.create_string_buffer(n_bytes.value)
    raw.FPDF_GetXFAPacketContent(document.raw, index, room, n_bytes.value, n_bytes)
    return room.raw


def _local(element: ElementTree.Element) -> str:
    """The name of an element without its namespace."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _is_drawing(item: Any, page: Any) -> bool:
    import pypdfium2.raw as raw

    fill, stroke = ctypes.c_int(), ctypes.c_int()
    if not raw.FPDFPath_GetDrawMode(item.raw, fill, stroke) or not (fill.value or stroke.value):
        return False  # it only clips
    left, bottom, right, top = item.get_bounds() if hasattr(item, "get_bounds") else item.get_pos()
    width, height = right - left, top - bottom
    if min(width, height) < THIN:
        return False
    page_width, page_height = page.get_size()
    return bool(width * height < WHOLE * page_width * page_height)


def _annotations(page: Any) -> Iterator[tuple[Any, int]]:
    """(annotation, kind) of those that show something."""
    import pypdfium2.raw as raw

    hidden = raw.FPDF_ANNOT_FLAG_HIDDEN | raw.FPDF_ANNOT_FLAG_NOVIEW
    for index in range(raw.FPDFPage_GetAnnotCount(page.raw)):
        annotation = raw.FPDFPage_GetAnnot(page.raw, index)
        if not annotation:
            continue
        try:
            kind = raw.FPDFAnnot_GetSubtype(annotation)
            if kind in (raw.FPDF_ANNOT_LINK, raw.FPDF_ANNOT_POPUP) or raw.FPDFAnnot_GetFlags(annotation) & hidden:
                continue
            if kind == raw.FPDF_ANNOT_WIDGET and _value(page, annotation) in ("", "Off"):
                continue  # an empty field
            yield annotation, kind
        finally:
            raw.FPDFPage_CloseAnnot(annotation)


def _value(page: Any, annotation: Any) -> str:
    import pypdfium2.raw as raw

    if page.formenv is None:
        return ""
    return _string(lambda *room: raw.FPDFAnnot_GetFormFieldValue(page.formenv, annotation, *room))


def _contents(annotation: Any) -> str:
    import pypdfium2.raw as raw

    return _string(lambda *room: raw.FPDFAnnot_GetStringValue(annotation, b"Contents", *room))


def _string(ask: Callable[..., int]) -> str:
    """A text that pdfium writes as UTF-16 into the room that it is given."""
    import pypdfium2.raw as raw

    n_bytes = ask(None, 0)
    room = ctypes.create_string_buffer(n_bytes + 2)
    ask(ctypes.cast(room, ctypes.POINTER(raw.FPDF_WCHAR)), n_bytes)
    text = room.raw[:n_bytes].decode("utf-16-le", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\0", "").strip()
