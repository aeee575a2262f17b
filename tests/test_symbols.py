"""Which functions of C's mathematics the built library calls: numbers that depend on weights come from none of them.

Their last bits differ between C libraries, and no other device has them.  Allowed is what the host computes in double
and hands over as floats (angles, the temperature of a position), what ref, which sums in double, is written with, and
how the counts of experts fade, which decides where weights lie and no number.
Square roots, roundings, fused multiply-adds and the like are exact wherever they are called, and no matter here.
"""

import re
import struct
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As C99 has them, with a suffix for their type, or as GCC calls them when finite numbers will do.
NAMES = (
    "acos|acosh|asin|asinh|atan|atan2|atanh|cbrt|cos|cosh|erf|erfc|exp|exp10|exp2|expm1|hypot|j0|j1|jn|lgamma|log|log10"
    "|log1p|log2|pow|sin|sincos|sinh|tan|tanh|tgamma|y0|y1|yn"
)
ROUNDED_SOMEHOW = re.compile(rf"_*({NAMES})[fl]?(_finite)?")
HOST = {"cos", "sin", "sincos", "log1p", "pow"}  # in double
ALLOWED = {"step.c": HOST, "vision.c": HOST, "ref.c": {"exp", "erf"}, "policy.c": {"pow"}}
DYNSYM, SYMTAB = 11, 2

needs_elf = pytest.mark.skipif(
    sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 1 << 32,
    reason="reads 64-bit little-endian ELF files",
)


def undefined(data, kind):
    """Names of the undefined symbols in an ELF file's table of this kind."""
    assert data[:6] == b"\x7fELF\x02\x01"
    first, size, n = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQII", data, first + i * size) for i in range(n)]
    names = set()
    for _, type_, _, _, start, length, link, _ in sections:
        if type_ == kind:
            strings = sections[link][4]
            for at in range(start + 24, start + length, 24):  # the first entry is empty
                name, _, _, section = struct.unpack_from("<IBBH", data, at)
                if section == 0:
                    names.add(data[strings + name : data.index(b"\0", strings + name)].decode())
    return names


def mathematics(names):
    return {name for name in names if ROUNDED_SOMEHOW.fullmatch(name)}


def library():
    return undefined((ROOT / "csrc" / "_core.abi3.so").read_bytes(), DYNSYM)


def test_names_of_mathematics_are_recognised():
    they = {"expf", "erff", "exp", "__exp_finite", "sinl", "log1p", "sincosf"}
    assert mathematics(they | {"sqrtf", "fmaf", "ldexpf", "expect", "printf"}) == they


@needs_elf
def test_the_library_calls_no_mathematics_but_what_is_listed():
    names = library()
    assert "memcpy" in names  # so the table was read
    assert mathematics(names) <= set.union(*ALLOWED.values())


@needs_elf
def test_mathematics_are_called_where_they_are_listed_only():
    calls = {}
    for source in (ROOT / "csrc").rglob("*.c"):
        data = (ROOT / "build" / "obj" / source.relative_to(ROOT)).with_suffix(".o").read_bytes()
        calls[source.name] = calls.get(source.name, set()) | mathematics(undefined(data, SYMTAB))
    unlisted = {name: found - ALLOWED.get(name, set()) for name, found in calls.items()}
    assert not {name: found for name, found in unlisted.items() if found}
    assert set.union(*calls.values()) == mathematics(library())
