"""The rules of the tree that a machine can check."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cli", "csrc", "models", "quant")
KERNELS = ROOT / "csrc" / "cpu"
MAY_IMPORT = {  # folder -> our packages it may import besides itself
    "cli": {"ms4", "ms4.models", "ms4.quant"},
    "models": {"ms4", "ms4.quant"},
    "quant": set(),
    "csrc": set(),
}
SUFFIXES = {".py", ".c", ".h", ".cu", ".cuh"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LINE = 800, 60, 120
MOST_VARIABLES = 10


def files(*suffixes):
    found = [p for d in FOLDERS for p in (ROOT / d).rglob("*") if p.suffix in (suffixes or SUFFIXES)]
    assert len(found) > 20
    return found


@cache
def nodes(path):
    """The statements of a file, however deep; the module itself is the first."""
    found = [ast.parse(path.read_text())]
    for node in found:
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            found += getattr(node, part, [])
    return found


@cache
def imported(path):
    """Our modules that a file imports, by package."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{a.name}" if node.module == "ms4" else node.module for a in node.names]
    return found


def package(module):
    name = ".".join(module.split(".")[:2])
    return name if name in ("ms4.cli", "ms4.models", "ms4.quant") else "ms4"


def test_python_imports_point_down():
    for path in files(".py"):
        folder = path.relative_to(ROOT).parts[0]
        names = set(imported(path))
        ours = {package(name) for name in names if name.split(".")[0] == "ms4"}
        assert ours - {f"ms4.{folder}"} <= MAY_IMPORT[folder], f"{path} imports {ours}"
        assert not set(FOLDERS) & {name.split(".")[0] for name in names}, f"{path}: write ms4.models, not models"


def test_only_the_face_of_the_engine_touches_the_core():
    for path in files(".py"):
        if path.parent.name != "csrc":
            assert "_core" not in {part for name in imported(path) for part in name.split(".")}, path


def test_kernels_include_no_model():
    """Neither do the folders of the ISAs, and what they share (plain), know each other's files, but for these."""
    users = {"avxvnni": {"avx2"}, "avx512": {"avx2"}}
    kernels = [p for p in KERNELS.glob("*/*") if p.suffix in SUFFIXES]
    assert {"avx2", "avx512", "neon", "plain"} <= {p.parent.name for p in kernels}
    for path in kernels:
        folder = path.parent
        allowed = {"ops.h", "quant.h"} | {p.name for p in folder.glob("*.h")}
        for other in {"plain"} | users.get(folder.name, set()):
            allowed |= {f"cpu/{other}/{p.name}" for p in (KERNELS / other).glob("*.h")}
        ours = set(re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE))
        assert ours <= allowed, f"{path} includes {ours - allowed}"


def test_files_are_short_and_have_unique_names():
    """But for kernels: the same name in each folder is the same thing for another ISA."""
    names = [p.name for p in files() if p.name != "__init__.py" and p.parent.parent != KERNELS]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)
    long = {str(p): len(p.read_text().splitlines()) for p in files()}
    assert not {name: n for name, n in long.items() if n > LONGEST_FILE}


def test_lines_of_c_are_short():
    """Those of Python are ruff's matter."""
    paths = [*files(".c", ".h"), *(p for p in (ROOT / "tests").iterdir() if p.suffix in (".c", ".h"))]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LONGEST_LINE
    ]
    assert not long


def test_functions_are_short():
    long = [
        f"{path.name}: {node.name}"
        for path in files(".py")
        for node in nodes(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_every_file_says_what_it_owns():
    for path in files():
        text = path.read_text().lstrip()
        if not text:
            continue
        if path.suffix == ".py":
            assert ast.get_docstring(nodes(path)[0]), f"{path}: no docstring"
        else:
            # The ISA of a kernel file is chosen on its first line.
            text = re.sub(r"^(#pragma GCC target.*\n|//.*\n)+", "", text)
            assert text.startswith("/*"), f"{path}: no comment at the top"


def test_the_environment_is_in_the_readme():
    readme = set(re.findall(r"^\| `(MS4_[A-Z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    used = set()
    for path in [*files(".py", ".c", ".h"), *(ROOT / "tests").glob("*.py")]:
        text = path.read_text()
        used |= set(re.findall(r'(?:getenv\(|environ(?:\.get\(|\[)|envvar=)"(MS4_[A-Z_]+)"', text))
    assert readme == used
    assert len(readme) <= MOST_VARIABLES
