"""What csrc/cuda/driver.h says of the driver, beside NVIDIA's own header: calls, structs, numbers.

    python tests/cuda/prototypes.py [cuda.h]

The emulated driver is compiled from the same belief as the engine, so that neither can show a wrong argument.  cuda.h
comes with nvcc.  Of each call the exported name has to exist with these arguments, as a calling convention sees them:
as wide, as signed, pointers to the same.  Of structs every member has its place, of constants (the emulated driver's,
too) every number is compared.  Exits 1 where something differs, which g++ says.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODE = {"f": "func", "grid": "gridDimX", "block": "blockDimX", "shared": "sharedMemBytes", "parameters": "kernelParams"}
NODE |= {"extra": "extra", "kernel": "kern", "context": "ctx"}
# Of the emulated driver's errors those that are called otherwise, but for CUDA_ERROR_.
OTHERWISE = {
    "OK": "CUDA_SUCCESS",
    "ALREADY_REGISTERED": "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
    "NOT_REGISTERED": "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
}
PROGRAM = """
#include "error.h"
#include <cstddef>
#include <cstdint>
#include <type_traits>
namespace ours {{
#include "cuda/driver.h"
}}
enum : long {{ {ours} }};       /* before NVIDIA's names, some of which are macros */
#define __CUDA_API_VERSION_INTERNAL
#include "{header}"

template <class A, class B> constexpr bool alike() {{
    using std::is_pointer_v, std::is_floating_point_v, std::is_enum_v, std::is_signed_v;
    if constexpr (is_pointer_v<A> || is_pointer_v<B>) {{
        if constexpr (!is_pointer_v<A> || !is_pointer_v<B>) return false;
        else {{
            using a = std::remove_cv_t<std::remove_pointer_t<A>>;
            using b = std::remove_cv_t<std::remove_pointer_t<B>>;
            if constexpr (std::is_void_v<a> || std::is_void_v<b>) return true;
            else if constexpr (std::is_class_v<a> && std::is_class_v<b>) return true;
            else return alike<a, b>();
        }}
    }} else if constexpr (is_floating_point_v<A> || is_floating_point_v<B>) return std::is_same_v<A, B>;
    else return sizeof(A) == sizeof(B) && (is_enum_v<A> || is_enum_v<B> || is_signed_v<A> == is_signed_v<B>);
}}
template <class A, class B> struct calls {{ static constexpr bool equal = false; }};
template <class A, class... As, class B, class... Bs> struct calls<A (*)(As...), B (*)(Bs...)> {{
    static constexpr bool every() {{
        if constexpr (sizeof...(As) == sizeof...(Bs)) return (alike<As, Bs>() && ... && alike<A, B>());
        else return false;
    }}
    static constexpr bool equal = every();
}};
#define CALL(name, symbol, ...) \\
    static_assert(calls<decltype(ours::cuda_driver::name), decltype(&::symbol)>::equal, #symbol ": its arguments");
{calls}
#define PLACE(our, real) \\
    static_assert(offsetof(ours::cuda_kernel_node, our) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, real), #our);
{places}
static_assert(sizeof(ours::cuda_kernel_node) == sizeof(CUDA_KERNEL_NODE_PARAMS_v2), "CUDA_KERNEL_NODE_PARAMS_v2");
#define NUMBER(name) static_assert(our_##name == (long)name, #name);
{numbers}
#define EMULATED(name, number) static_assert(number == (long)name, "the emulated driver's " #name);
{emulated}
"""


def header() -> Path | None:
    """cuda.h as it lies beside nvcc, or where the toolkit usually is."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    if nvcc:
        homes.insert(0, str(Path(nvcc).resolve().parents[1]))
    found = [Path(home, "include", "cuda.h") for home in homes if home]
    return next((path for path in found if path.exists()), None)


def program(cuda_h: Path, ours: str, emulated: str) -> str:
    """C++ that compiles if all is as cuda.h says; ours, emulated: both driver.h."""
    calls = re.findall(r"^    X\((\w+), (\w+), ", ours, re.MULTILINE)
    numbers = re.findall(r"\b(CU\w+) = \d+", ours)
    errors = re.findall(r"\b([A-Z_]+) = (\d+)", emulated[: emulated.index("};")])
    assert calls and numbers and errors
    return PROGRAM.format(
        header=cuda_h,
        ours=", ".join(f"our_{name} = ours::{name}" for name in numbers),
        calls="\n".join(f"CALL({name}, {symbol})" for name, symbol in calls),
        places="\n".join(f"PLACE({our}, {real})" for our, real in NODE.items()),
        numbers="\n".join(f"NUMBER({name})" for name in numbers),
        emulated="\n".join(f"EMULATED({full_name(name)}, {number})" for name, number in errors),
    )


def full_name(name: str) -> str:
    stem = f"STREAM_{name}" if name.startswith("CAPTURE_") else name
    return OTHERWISE.get(name, f"CUDA_ERROR_{stem}")


def compile_with(cuda_h: Path, ours: str | None = None) -> str:
    """What g++ has against it; empty: nothing.  ours: another text for csrc/cuda/driver.h."""
    given = (ROOT / "csrc" / "cuda" / "driver.h").read_text()
    emulated = (ROOT / "tests" / "cuda" / "driver.h").read_text()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cuda").mkdir()
        Path(folder, "cuda", "driver.h").write_text(ours or given)
        source = Path(folder, "prototypes.cpp")
        source.write_text(program(cuda_h, ours or given, emulated))
        command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{ROOT / 'csrc'}", str(source)]
        return subprocess.run(command, capture_output=True, text=True).stderr


def main() -> int:
    cuda_h = Path(sys.argv[1]) if sys.argv[1:] else header()
    if not cuda_h:
        print("  no cuda.h here: what is said of the driver was not compared with it")
        return 0
    said = compile_with(cuda_h)
    version = re.search(r"^#define CUDA_VERSION (\d+)", cuda_h.read_text(), re.MULTILINE)
    print(said or f"  calls, structs and numbers of the driver: as cuda.h {version[1] if version else ''} has them")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
