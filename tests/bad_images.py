"""Odd and hostile pictures, each made from a few lines: what test_image.py feeds to the decoder."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image as Pillow

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RED, WHITE = (255, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Sample:
    """`says`: part of the refusal, or None for a picture that must be read, then with this size and colour."""

    id: str
    data: bytes
    says: str | None = None
    size: tuple[int, int] | None = None
    colour: tuple[int, int, int] | None = None


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def header(width: int, height: int, bits: int = 8, colour: int = 2, lace: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, lace)


def png(width: int, height: int, pixel: bytes = b"\xff\0\0", extra: bytes = b"", **kind: int) -> bytes:
    """A PNG of equal pixels; `pixel` is one of them, or for less than 8 bits a byte of them, in rows of whole bytes."""
    bits = kind.get("bits", 8)
    rows = (b"\0" + pixel * (width if bits >= 8 else -(-width * bits // 8))) * height
    return assemble(header(width, height, **kind), extra, chunk(b"IDAT", zlib.compress(rows)))


def assemble(head: bytes, *parts: bytes) -> bytes:
    return SIGNATURE + chunk(b"IHDR", head) + b"".join(parts) + chunk(b"IEND", b"")


def zeros(n: int) -> bytes:
    """A zlib stream of n zero bytes, without holding them."""
    pack, rest = zlib.compressobj(9, wbits=-15), bytes(n % (1 << 20))
    mib = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)  # the same wherever it stands
    sum_of_zeros = n % 65521 << 16 | 1  # Adler-32
    return b"\x78\xda" + mib * (n >> 20) + pack.compress(rest) + pack.flush() + struct.pack(">I", sum_of_zeros)


def encoded(picture: Pillow.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def samples() -> Iterator[Sample]:
    yield from strangers()
    yield from bombs()
    yield from broken_pngs()
    yield from odd_pngs()
    yield from jpegs()
    yield from others()


def strangers() -> Iterator[Sample]:
    firsts = {
        "empty": b"",
        "text": b"hello, I am not a picture\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "fits": b"SIMPLE  =                    T" + b" " * 2850,
    }
    for id, data in firsts.items():
        yield Sample(id, data, "not a PNG, JPEG, WebP, GIF, BMP, TIFF, HEIC or AVIF")
    yield Sample("gguf", b"GGUF" + bytes(60), "a model, not an attachment")
    yield Sample("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript; export it as PDF")
    photoshop = b"8BPS" + struct.pack(">HIHHII", 1, 0, 0, 3, 30000, 30000) + bytes(20)
    yield Sample("psd", photoshop, "Photoshop; save it as PNG or JPEG")


def bombs() -> Iterator[Sample]:
    one = chunk(b"IDAT", zlib.compress(b"\0"))
    for width, height in ((65500, 65500), (1 << 31, 1), (0x7FFFFFFF, 0x7FFFFFFF), (20_000, 10_001)):
        yield Sample(f"declares-{width}x{height}", assemble(header(width, height), one), "million pixels")
    yield Sample("too-wide", assemble(header(70_000, 1), one), "a side has 1 to 65535")
    for width, height in ((0, 8), (8, 0)):
        yield Sample(f"declares-{width}x{height}", assemble(header(width, height), one), "a side has 1 to")
    gray = chunk(b"IDAT", zeros(24_000 * 3001))
    yield Sample("bomb-1-bit", assemble(header(24_000, 24_000, 1, 0), gray), "576.0 million pixels")
    huge = b"BM" + struct.pack("<IHHI", 70, 0, 0, 54) + struct.pack("<IiiHH", 40, *[-(1 << 31)] * 2, 1, 24)
    yield Sample("bmp-2^31", huge + bytes(40), "million pixels")
    for kind in (b"iCCP", b"zTXt"):
        bomb = chunk(kind, b"x\0\0" + zeros(1 << 26))
        yield Sample(f"bomb-{kind.decode()}", png(8, 8, extra=bomb), None, (8, 8), RED)
    yield Sample("50000-texts", png(8, 8, extra=chunk(b"tEXt", b"k\0v") * 50_000), None, (8, 8), RED)


def broken_pngs() -> Iterator[Sample]:
    good, head = png(8, 8), header(8, 8)
    idat = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8))
    yield Sample("signature-only", SIGNATURE, "truncated")
    yield Sample("no-idat", assemble(head), "no picture")
    yield Sample("no-header", SIGNATURE + idat + chunk(b"IEND", b""), "no picture")
    yield Sample("no-end", good[:-12], None, (8, 8), RED)
    yield Sample("half-an-end", good[:-5], None, (8, 8), RED)
    yield Sample("no-checksum-of-pixels", good[:-16], None, (8, 8), RED)
    yield Sample("two-headers", assemble(head, chunk(b"IHDR", head), idat), "wrong place")
    yield Sample("unknown-critical", assemble(head, chunk(b"ABCD", b""), idat), "unknown part ABCD")
    yield Sample("checksum-of-header", good[:29] + b"\0\0\0\0" + good[33:], "wrong checksum in IHDR")
    yield Sample("checksum-of-pixels", assemble(head, chunk(b"IDAT", idat[8:-4], crc=1)), "wrong checksum in IDAT")
    yield Sample("length-2^31", SIGNATURE + chunk(b"IHDR", head) + b"\x80\0\0\0IDATabc", "damaged")
    short = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 64) * 3))
    yield Sample("3-rows-of-64", assemble(header(64, 64), short), "4 % of the picture")
    half = chunk(b"IDAT", idat[8:-4][: len(idat) // 3])
    yield Sample("stream-ends-early", assemble(head, half), "of the picture is there")
    yield Sample("not-zlib", assemble(head, chunk(b"IDAT", b"\xff" * 64)), "damaged")
    filters = zlib.compress((b"\x09" + b"\xff\0\0" * 8) * 8)
    yield Sample("filter-9", assemble(head, chunk(b"IDAT", filters)), "damaged")
    yield Sample("no-palette", png(8, 8, b"\0", colour=3), "palette")
    yield Sample("3-bits", assemble(header(8, 8, 3), idat), "colour type")
    yield Sample("colour-5", assemble(header(8, 8, 8, 5), idat), "colour type")
    yield Sample("interlace-2", assemble(header(8, 8, lace=2), idat), "colour type")


def odd_pngs() -> Iterator[Sample]:
    palette = chunk(b"PLTE", bytes((*RED, 0, 0, 255)))
    yield Sample("rgb", png(8, 8), None, (8, 8), RED)
    yield Sample("palette", png(8, 8, b"\0", extra=palette, colour=3), None, (8, 8), RED)
    clear = chunk(b"tRNS", b"\0")
    yield Sample("palette-clear", png(8, 8, b"\0", extra=palette + clear, colour=3), None, (8, 8), WHITE)
    yield Sample("palette-index-255", png(8, 8, b"\xff", extra=palette, colour=3), None, (8, 8))
    for value, shows in ((0xFFFF, 255), (0x8000, 128), (0x00FF, 0)):
        gray = struct.pack(">H", value)
        yield Sample(f"gray-16-{value:x}", png(8, 8, gray, bits=16, colour=0), None, (8, 8), (shows,) * 3)
    key = chunk(b"tRNS", b"\x12\x34")
    yield Sample("gray-16-clear", png(8, 8, b"\x12\x34", extra=key, bits=16, colour=0), None, (8, 8), WHITE)
    yield Sample("gray-16-near-clear", png(8, 8, b"\x12\x35", extra=key, bits=16, colour=0), None, (8, 8), (18,) * 3)
    rgb = b"\x80\0\x40\0\x20\0"
    yield Sample("rgb-16", png(8, 8, rgb, bits=16), None, (8, 8), (128, 64, 32))
    yield Sample("rgb-16-clear", png(8, 8, rgb, extra=chunk(b"tRNS", rgb), bits=16), None, (8, 8), WHITE)
    for bits, pixels in ((1, b"\xff"), (2, b"\x55"), (4, b"\x33")):
        shows = (255 * (pixels[0] >> (8 - bits)) // (2**bits - 1),) * 3
        yield Sample(f"gray-{bits}", png(8, 8, pixels, bits=bits, colour=0), None, (8, 8), shows)
    for bits, pixels in ((1, b"\0"), (2, b"\x55"), (4, b"\x33"), (8, b"\x33")):
        key = chunk(b"tRNS", struct.pack(">H", pixels[0] >> (8 - bits)))
        yield Sample(f"gray-{bits}-clear", png(8, 8, pixels, extra=key, bits=bits, colour=0), None, (8, 8), WHITE)
    yield Sample("rgba-clear", png(8, 8, b"\xff\0\0\0", colour=6), None, (8, 8), WHITE)
    yield Sample("rgba-half", png(8, 8, b"\xff\0\0\x80", colour=6), None, (8, 8), (255, 127, 127))
    yield Sample("gray-alpha", png(8, 8, b"\x80\x80", colour=4), None, (8, 8), (191,) * 3)
    yield Sample("interlaced", png(1, 1, lace=1), None, (1, 1), RED)
    yield Sample("one-pixel", png(1, 1), None, (1, 1), RED)
    for width, height in ((1, 20_000), (20_000, 1), (52_800, 44)):
        yield Sample(f"{width}x{height}", png(width, height), None, (width, height), RED)
    yield Sample("zip-behind", png(8, 8) + b"PK\x03\x04" + bytes(64), None, (8, 8), RED)
    frames = chunk(b"acTL", struct.pack(">II", 1_000_000, 0))
    yield Sample("apng", png(8, 8, extra=frames), None, (8, 8), RED)


def jpegs() -> Iterator[Sample]:
    red = Pillow.new("RGB", (32, 16), (254, 0, 0))
    good = encoded(red, "JPEG", quality=100)
    yield Sample("jpeg", good, None, (32, 16), (254, 0, 0))
    yield Sample("jpeg-cut", good[: len(good) * 2 // 3], "damaged")
    yield Sample("jpeg-no-end", good[:-2], None, (32, 16), (254, 0, 0))
    yield Sample("jpeg-half-an-end", good[:-1], None, (32, 16), (254, 0, 0))
    cmyk = encoded(Pillow.new("CMYK", (32, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    yield Sample("jpeg-cmyk", cmyk, None, (32, 16), RED)
    yield Sample("jpeg-gray", encoded(Pillow.new("L", (32, 16), 128), "JPEG"), None, (32, 16), (128, 128, 128))
    at = good.index(b"\xff\xc0")
    yield Sample("jpeg-65535", good[: at + 5] + b"\xff" * 4 + good[at + 9 :], "million pixels")
    yield Sample("jpeg-no-components", good[: at + 9] + b"\0" + good[at + 10 :], "damaged")
    scan = good.index(b"\xff\xda")
    yield Sample("jpeg-1000-scans", good[:scan] + b"\xff\xda\0\x02" * 1000 + good[scan:], "scans")
    loop = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0"
    exif = b"\xff\xe1" + struct.pack(">H", len(loop) + 2) + loop
    yield Sample("jpeg-exif-loop", good[:2] + exif + good[2:], None, (32, 16), (254, 0, 0))
    for orientation in range(10):
        turned = Pillow.Exif()
        turned[0x112] = orientation
        size = (16, 32) if 5 <= orientation <= 8 else (32, 16)
        data = encoded(red, "JPEG", quality=100, exif=turned)
        yield Sample(f"jpeg-orientation-{orientation}", data, None, size, (254, 0, 0))


def others() -> Iterator[Sample]:
    red, blue = (Pillow.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255)))
    yield Sample("gif-50-frames", encoded(red, "GIF", save_all=True, append_images=[blue, red] * 25), None, (8, 8), RED)
    yield Sample("gif-0x0", b"GIF89a" + bytes(7) + b";", "damaged")
    yield Sample("gif-cut", encoded(red, "GIF")[:-12], "damaged")
    webp = encoded(red, "WEBP", lossless=True)
    yield Sample("webp", webp, None, (8, 8), RED)
    yield Sample("webp-cut", webp[:-8], "damaged")
    both = encoded(red, "WEBP", lossless=True, save_all=True, append_images=[blue])
    yield Sample("webp-2-frames", both, None, (8, 8), RED)
    for kind in ("BMP", "TIFF"):
        data = encoded(red, kind)
        yield Sample(kind.lower(), data, None, (8, 8), RED)
        yield Sample(f"{kind.lower()}-cut", data[:-40], "damaged")
