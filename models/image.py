"""image.py: a picture from outside to the pixels that the vision tower takes.

It owns the decoding (through Pillow, with everything checked that Pillow does not check), the size rule, the resize
and the normalisation.  The tower is the engine's, and the token ids are made in `prompt`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

import ms4
from ms4.models.untrusted import InputError, check_size, read_file, shown, sniff, stranger

if TYPE_CHECKING:  # at run time only where a picture is opened: text-only prompts start without it
    from PIL.Image import Image as Picture

MAX_BYTES = 128 << 20
MAX_PIXELS = 200_000_000  # as the largest sensors of phones have; the memory at hand may allow fewer
WHOLE_PIXELS = 40_000_000  # above, a JPEG is decoded at a half or a quarter of its size, which the tower halves anyway
SMALL = 64 << 20  # bytes of pixels for which nobody asks how much memory is free
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")  # what Pillow is allowed to open
MAX_SIDE = 65_535
MAX_SCANS = 200  # of a progressive JPEG: each costs a pass over the picture, and can be a few bytes long
NO_END = "the end of the file is missing, the picture is whole"
EOI = b"\xff\xd9"  # what a JPEG ends with
NOISE = bytes(0xA5 ^ i * 89 & 0x7F for i in range(64))  # what is not there would be made of it; no marker is in it


class ImageError(InputError):
    """This picture cannot be used."""


@dataclass(frozen=True)
class PixelRule:
    """What a vision tower asks of its pixels; the values are those of Mistral Small 4."""

    max_side: int = 1540
    cell: int = 28  # pixels along a side of one token
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Image:
    """An opened picture, in whatever mode its file has."""

    name: str
    picture: Picture = field(repr=False)
    digest: bytes = field(repr=False)  # of the file, so that equal pictures are known as equal
    orientation: int = 1  # EXIF's, 1 to 8
    animated: bool = False  # only the first frame is used
    note: str = ""  # what was wrong with it and did not matter
    whole: tuple[int, int] | None = None  # the size in the file, where it was decoded smaller

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as a viewer shows it."""
        width, height = self.whole or self.picture.size
        return (height, width) if self.orientation >= 5 else (width, height)


@dataclass(frozen=True, eq=False)
class Pixels:
    """What the tower takes: float32 [3, cell * gh, cell * gw], normalised."""

    array: np.ndarray = field(repr=False)
    gw: int
    gh: int

    @property
    def n_tokens(self) -> int:
        """Positions in the prompt: every row of the grid ends in a break or end token."""
        return (self.gw + 1) * self.gh


# --- the size rule ------------------------------------------------------------------------------------------------


def grid(width: int, height: int, max_tokens: int | None = None, rule: PixelRule | None = None) -> tuple[int, int]:
    """(columns, rows) of tokens for a picture of width x height pixels.

    max_tokens lowers the longest side until the picture takes no more positions than that.
    """
    rule = rule or PixelRule()
    if max_tokens is not None and max_tokens < 2:
        raise ValueError("a picture takes at least 2 tokens")
    gw, gh = 1, 1
    for side in range(min(rule.max_side, max(width, height)), 0, -1):
        ratio = max(width / side, height / side)
        # Python's round, ties to even, is part of the rule; no side may vanish.
        w, h = (max(round(n / ratio), 1) for n in (width, height)) if ratio > 1 else (width, height)
        gw, gh = (w - 1) // rule.cell + 1, (h - 1) // rule.cell + 1
        if max_tokens is None or (gw + 1) * gh <= max_tokens:
            break
    return gw, gh


# --- pictures in messages -----------------------------------------------------------------------------------------


def measure(
    chunk: Mapping[str, Any], max_tokens: int | None = None, rule: PixelRule | None = None
) -> tuple[int, int, bytes]:
    """(columns, rows, digest) of an image chunk; of encoded bytes only what comes before the pixels is decoded."""
    image = chunk.get("image")
    if not isinstance(image, Image):
        image = _open(image_bytes(chunk), "image")
    return *grid(*image.size, max_tokens, rule), image.digest


def chunk_image(chunk: Mapping[str, Any]) -> Image:
    """The picture of an image chunk: {"type": "image", "image": Image}, or {"type": "image_url", ...}."""
    image = chunk.get("image")
    return image if isinstance(image, Image) else load_image(image_bytes(chunk))


def image_bytes(chunk: Mapping[str, Any]) -> bytes:
    """The image file inside an `image_url` chunk: {"type": "image_url", "image_url": {"url": "data:..."}}."""
    url = chunk.get("image_url")
    if isinstance(url, Mapping):
        url = url.get("url")
    if not isinstance(url, str):
        raise ImageError("an image chunk needs image_url.url")
    head, comma, body = url.partition(",")
    head = head.strip().lower()
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ImageError("an image must be given as a data URL (data:image/png;base64,...); ms4 fetches no images")
    try:
        # Many encoders break the lines, as for mail.
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the data URL of an image is not base64") from None


# --- decoding -----------------------------------------------------------------------------------------------------


def load_image(source: str | os.PathLike[str] | bytes, name: str = "image") -> Image:
    """Decodes a file, or the bytes of one, which `name` then names in messages."""
    if not isinstance(source, bytes):
        source, name = read_file(source, MAX_BYTES, ImageError), os.fsdecode(source)
    image = _open(source, name)
    _decoding(image.name, lambda: _load(image.picture))
    # A frame may turn out larger than what the header said.
    _decoding(image.name, lambda: _check_pixels(*image.picture.size))
    if sniff(source) == "JPEG" and _lacks_end(source):
        _check_whole(image, source)
    return image


def _check_whole(image: Image, data: bytes) -> None:
    """Refuses a JPEG without an end, if its pixels depend on what would follow: then some of them are missing.

    libjpeg makes gray of what is missing, and Pillow says nothing about it.
    """
    from PIL import ImageChops

    half = b"\0" if data.endswith(b"\xff") else b""  # of a marker
    other = _open(data + half + NOISE, image.name).picture
    _decoding(image.name, lambda: _load(other))
    if ImageChops.difference(image.picture, other).getbbox(alpha_only=False) or not _has_all_scans(data):
        raise ImageError(f"{image.name}: truncated: the last part of the picture is missing")


def _open(data: bytes, name: str) -> Image:
    """The picture with its header checked, its pixels not yet decoded."""
    name = shown(name)
    check_size(data, MAX_BYTES, name, ImageError)
    kind = sniff(data)
    if kind == "RAW":
        raise ImageError(f"{name}: a raw photograph (as CR2, NEF, DNG); export it as JPEG")
    if kind not in KINDS:
        if known := stranger(data):
            raise ImageError(f"{name}: {known}")
        raise ImageError(f"{name}: not a PNG, JPEG, WebP, GIF, BMP, TIFF, HEIC or AVIF; save it as one of these")
    picture, animated, orientation, note = _decoding(name, lambda: _open_kind(data, kind))
    return Image(name, picture, hashlib.sha256(data).digest(), orientation, animated, note, picture.size)


def _open_kind(data: bytes, kind: str) -> tuple[Picture, bool, int, str]:
    """(picture, whether it has more frames, EXIF's orientation, a note)."""
    from PIL import Image as Pillow

    Pillow.MAX_IMAGE_PIXELS = MAX_PIXELS  # _check_pixels comes first
    animated, ended, pixels = False, True, data
    if kind == "PNG":
        data, animated, ended = _clean_png(data)
        pixels = data
    elif kind == "JPEG":
        if data.count(b"\xff\xda") > MAX_SCANS:
            raise ImageError(f"damaged: more than {MAX_SCANS} scans")
        ended = not _lacks_end(data)
        pixels = _clean_jpeg(data) + (b"" if ended else EOI)
    elif kind in ("HEIF", "AVIF"):
        kind = _iso_reader(kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        picture = Pillow.open(BytesIO(pixels), formats=[kind])
    _check_pixels(*picture.size)
    if picture.mode in ("I", "F"):
        raise ImageError(
            "its pixels are numbers of 32 bits, and nothing says which of them is white; save it with 8 or 16"
        )
    if kind not in ("PNG", "JPEG"):
        animated = _has_pages(picture) if kind == "TIFF" else bool(getattr(picture, "is_animated", False))
    # Pillow turns a TIFF by itself.
    orientation, damaged = (1, False) if kind == "TIFF" else _orientation(data, kind)
    notes = ["damaged metadata ignored"] * bool(damaged or said) + [NO_END] * (not ended)
    return picture, animated, orientation, ", ".join(notes)


def _has_pages(picture: Picture) -> bool:
    """Whether a TIFF has a second page; counting them all would go through a chain of any length."""
    try:
        picture.seek(1)
        return True
    except EOFError:
        return False
    except Exception:  # there is one, and it is damaged
        return True
    finally:
        picture.seek(0)


def _iso_reader(kind: str) -> str:
    """The name by which Pillow opens HEIC or AVIF, which not every Pillow does by itself."""
    from PIL import Image as Pillow
    from PIL import features

    if kind == "AVIF" and features.check("avif"):
        return kind
    try:
        import pillow_heif
    except ImportError:
        name = "HEIC" if kind == "HEIF" else kind
        raise ImageError(f"reading {name} needs pillow-heif: pip install pillow-heif; or save it as JPEG") from None
    register = getattr(pillow_heif, "register_heif_opener" if kind == "HEIF" else "register_avif_opener", None)
    if register is not None:
        register()
    if kind not in Pillow.OPEN:
        raise ImageError(f"this pillow-heif reads no {kind}; save it as JPEG or PNG")
    return kind


def _load(picture: Picture) -> None:
    """Decodes the pixels, large JPEGs smaller, if there is memory for them."""
    width, height = picture.size
    reduced = 1
    while width * height > WHOLE_PIXELS * reduced**2:
        reduced *= 2
    if reduced > 1:
        picture.draft(None, (width // reduced, height // reduced))  # for other kinds than JPEG it does nothing
    each = 1 if picture.mode in ("1", "L", "P") else 2 if picture.mode.startswith("I;16") else 4
    need = picture.width * picture.height * each
    if "progressive" in picture.info:  # libjpeg keeps the coefficients of the whole picture
        need += width * height * 6
    if need > SMALL:
        room = ms4.allowed().room
        if room is not None and need > room:
            raise ImageError(f"decoding it needs {need / 2**30:.1f} GiB; {room / 2**30:.1f} GiB are free")
    picture.load()


def _decoding(name: str, step: Any) -> Any:
    """step(), with whatever it raises turned into one line.

    What Pillow only warns of is metadata: pixels that are missing or damaged are errors already.
    """
    from PIL import Image as Pillow

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            return step()
    except ImageError as e:
        reason = str(e)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        reason = f"more than {MAX_PIXELS // 10**6} million pixels"
    except MemoryError:
        reason = "not enough memory to decode it"
    except Pillow.UnidentifiedImageError:
        reason = "damaged: its header cannot be read"
    except Exception as e:  # a decoder that is fed rubbish raises nearly anything
        reason = f"damaged: {shown(' '.join(str(e).split())[:120]) or type(e).__name__}"
    raise ImageError(f"{name}: {reason}")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} is {width * height / 1e6:.1f} million pixels; the limit is {MAX_PIXELS // 10**6}"
        )
    if not 0 < min(width, height) <= max(width, height) <= MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels; a side has 1 to {MAX_SIDE}")


def _orientation(data: bytes, kind: str) -> tuple[int, bool]:
    """(EXIF's orientation, whether the metadata is damaged)."""
    from PIL import Image as Pillow

    value = 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with Pillow.open(BytesIO(data), formats=[kind]) as picture:
                if "exif" not in picture.info:  # Pillow would decode the pixels in search of it
                    return 1, bool(said)
                value = picture.getexif().get(0x0112, 1)
                header = picture.info["exif"].removeprefix(b"Exif\0\0")[:4]
        except Exception:  # metadata that cannot be read says nothing
            return 1, True
    return value if isinstance(value, int) and 1 <= value <= 8 else 1, bool(said) or header not in (b"II*\0", b"MM\0*")


def _jpeg_parts(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, where it begins, where it ends) of each part before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # filling
            at += 1
            continue
        if length < 2:
            break
        yield marker, at, min(at + 2 + length, len(data))
        at += 2 + length


def _clean_jpeg(data: bytes) -> bytes:
    """The same picture without the parts that only speak about it, which cameras and editors often write wrongly."""
    kept, end = [data[:2]], 2
    for marker, at, end in _jpeg_parts(data):
        part = data[at:end]
        # Of what is not the picture itself, JFIF and Adobe say how its colours are meant.
        colours = (part[4:8] == b"JFIF" and len(part) >= 18) or (part[4:9] == b"Adobe" and len(part) >= 16)
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(part)
    return b"".join(kept) + data[end:]


def _lacks_end(data: bytes) -> bool:
    """Whether a JPEG has scans, and nothing that ends them; in the data of a scan, no such bytes can stand."""
    first = _first_scan(data)
    return data[first : first + 2] == b"\xff\xda" and data.find(EOI, first) < 0


def _first_scan(data: bytes) -> int:
    return data.find(b"\xff\xda", max((end for _, _, end in _jpeg_parts(data)), default=2))


def _has_all_scans(data: bytes) -> bool:
    """Whether the headers of the scans name every coefficient of every component down to its last bit."""
    frame = [data[at:end] for marker, at, end in _jpeg_parts(data) if 0xC0 <= marker <= 0xC2]
    there, at = set(), _first_scan(data)
    while at >= 0:
        head = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]
        n = head[0] if head else 0
        if len(head) >= 2 * n + 4:
            first, last, bits = head[2 * n + 1 : 2 * n + 4]
            there |= {(head[1 + 2 * i], k) for i in range(n) for k in range(first, last + 1) if not bits & 15}
        at = data.find(b"\xff\xda", at + 2)
    wanted = {(part[i], k) for part in frame for i in range(10, len(part), 3) for k in range(64)}
    return bool(frame) and wanted <= there


# Pillow accepts PNGs with wrong checksums, missing rows or no palette, inflates metadata that nobody asked for and
# scales transparent values wrongly.  So a PNG is checked here, and Pillow gets a copy of only the parts that count.

_PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf")


def _clean_png(data: bytes) -> tuple[bytes, bool, bool]:
    """(the same picture without what is not needed, whether it is animated, whether the file has its end)."""
    parts: dict[bytes, bytes] = {}
    idat: list[bytes] = []
    animated = ended = False
    for kind, body in _png_chunks(data):
        ended = kind == b"IEND"
        if kind == b"IDAT":
            idat.append(body)
        elif kind == b"eXIf":
            parts.setdefault(kind, body)
        elif kind in _PNG_KEPT:
            if kind in parts or idat:
                raise ImageError(f"damaged: {kind.decode()} in the wrong place")
            parts[kind] = body
        elif kind[0] & 0x20 == 0 and kind != b"IEND":
            raise ImageError(f"damaged: unknown part {shown(kind.decode('latin-1'))}")
        animated = animated or kind == b"acTL"
        if b"IHDR" not in parts:
            break
    if len(parts.get(b"IHDR", b"")) != 13 or not idat:
        raise ImageError("damaged: no picture in it")
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    _check_pixels(width, height)
    if bits not in _PNG_BITS.get(colour, ()) or interlaced > 1:
        raise ImageError("damaged: no such colour type")
    if colour == 3 and len(parts.get(b"PLTE", b"")) < 3:
        raise ImageError("damaged: the palette is missing")
    _check_rows(idat, width, height, bits * _PNG_CHANNELS[colour], interlaced)
    if b"tRNS" in parts:
        parts[b"tRNS"] = _transparent(parts[b"tRNS"], bits, colour)
    chunks = [(kind, parts[kind]) for kind in _PNG_KEPT if kind in parts]
    chunks += [(b"IDAT", b"".join(idat)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:8] + b"".join(packed), animated, ended


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of each chunk up to IEND; the checksums of those that nobody reads do not matter.

    Once there are pixels, the file may be cut: whether they are all of them is to be counted.
    """
    at, pixels = 8, False
    while True:
        length, kind = struct.unpack_from(">I4s", data, at) if at + 8 <= len(data) else (len(data), b"")
        pixels = pixels or kind == b"IDAT"
        if at + 12 + length > len(data):
            if not pixels:
                raise ImageError("truncated")
            if kind == b"IDAT":
                yield kind, data[at + 8 : at + 8 + length]
            return
        body = data[at + 8 : at + 8 + length]
        if kind in (*_PNG_KEPT, b"IDAT", b"IEND") and kind != b"eXIf":
            (crc,) = struct.unpack_from(">I", data, at + 8 + length)
            if crc != zlib.crc32(kind + body):
                raise ImageError(f"damaged: wrong checksum in {kind.decode()}")
        yield kind, body
        if kind == b"IEND":
            return
        at += 12 + length


def _check_rows(idat: list[bytes], width: int, height: int, bits: int, interlaced: int) -> None:
    """Refuses a PNG whose compressed stream ends before the last row."""
    want = 0
    for x, y, dx, dy in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        want += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    have, inflate = 0, zlib.decompressobj()
    for part in [*idat, b""]:  # the empty one lets the last bytes out
        while have < want and not inflate.eof:
            have += len(inflate.decompress(part, 1 << 18))
            part = inflate.unconsumed_tail
            if not part:
                break
    if have < want:
        raise ImageError(f"truncated: {100 * have // want} % of the picture is there")


def _transparent(body: bytes, bits: int, colour: int) -> bytes:
    """tRNS in the units of Pillow's pixels, which have 8 bits except in 16-bit gray."""
    if colour == 0 and bits < 8 and len(body) == 2:
        return struct.pack(">H", struct.unpack(">H", body)[0] * 255 // (2**bits - 1) & 255)
    if colour == 2 and bits == 16 and len(body) == 6:
        return bytes([0, body[0], 0, body[2], 0, body[4]])
    return body


# --- pixels -------------------------------------------------------------------------------------------------------


def preprocess(image: Image, max_tokens: int | None = None, rule: PixelRule | None = None) -> Pixels:
    """Resizes to whole tokens and normalises; never pads and never crops."""
    rule = rule or PixelRule()
    gw, gh = grid(*image.size, max_tokens, rule)
    target = (gw * rule.cell, gh * rule.cell)
    turned = _resize(image.picture, *(target[::-1] if image.orientation >= 5 else target))
    upright = _upright(turned, image.orientation)
    mean, std = np.asarray(rule.mean, np.float32), np.asarray(rule.std, np.float32)
    array = np.empty((3, target[1], target[0]), np.float32)
    for c in range(3):
        array[c] = (upright[:, :, c] / np.float32(255) - mean[c]) / std[c]
    return Pixels(array, gw, gh)


def _upright(rows: np.ndarray, orientation: int) -> np.ndarray:
    """Turns the array as EXIF says: first about the diagonal, then top to bottom, then left to right."""
    if orientation >= 5:
        rows = rows.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rows = rows[::-1]
    return rows[:, ::-1] if orientation in (2, 3, 6, 7) else rows


def _resize(picture: Picture, width: int, height: int) -> np.ndarray:
    """Bicubic without antialiasing, as in the model's training: float32 [height, width, 3], not clipped.

    It goes strip by strip, so that a large picture is never held a second time.
    """
    columns, column_weight = _taps(picture.width, width)
    rows, row_weight = _taps(picture.height, height)
    out = np.empty((height, width, 3), np.float32)
    step = max(1, (1 << 19) * height // (picture.width * picture.height))
    for top in range(0, height, step):
        block = slice(top, min(top + step, height))
        first, last = int(rows[0, block].min()), int(rows[3, block].max()) + 1
        strip = _rgb(picture.crop((0, first, picture.width, last))).astype(np.float32)
        tall = _weighted(strip, rows[:, block] - first, row_weight[:, block], axis=0)
        out[block] = _weighted(tall, columns, column_weight, axis=1)
    return out


def _weighted(x: np.ndarray, index: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """The sum of four gathers along `axis`, each with its weights."""
    shape = [1, 1, 1]
    shape[axis] = -1
    out = np.take(x, index[0], axis) * weight[0].reshape(shape)
    for i, w in zip(index[1:], weight[1:], strict=True):
        part = np.take(x, i, axis)
        part *= w.reshape(shape)
        out += part
    return out


def _taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """For every output position the four input positions [4, n_out] and their weights; borders repeat."""
    a = -0.75
    at = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    first = np.floor(at).astype(np.int64)
    t = at - first
    outer = [((a * d - 5 * a) * d + 8 * a) * d - 4 * a for d in (1 + t, 2 - t)]
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in (t, 1 - t)]
    index = np.clip(first + np.arange(-1, 3)[:, None], 0, n_in - 1)
    return index, np.stack([outer[0], *inner, outer[1]]).astype(np.float32)


def _rgb(strip: Picture) -> np.ndarray:
    """uint8 [height, width, 3]; what is transparent shows white."""
    from PIL import Image as Pillow

    if strip.mode.startswith("I;16"):
        wide = np.asarray(strip)
        gray = (wide >> 8).astype(np.uint8)
        gray[wide == strip.info.get("transparency", -1)] = 255
        return np.repeat(gray[:, :, None], 3, axis=2)
    if strip.has_transparency_data:
        clear = strip.convert("RGBA")
        strip = Pillow.new("RGB", clear.size, "white")
        strip.paste(clear, mask=clear)
    return np.asarray(strip.convert("RGB"))
