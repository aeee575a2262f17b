"""What is installed: the files of the wheel and of the sdist, as the build backend lists them."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = """
import json, os, sys
sys.path.insert(0, "csrc")
import build_core
out, sys.stdout = sys.stdout, sys.stderr
dist = build_core.run_setup(script_args=["-q", "--name"])
build, info, sdist = (dist.get_command_obj(name) for name in ("build_py", "egg_info", "sdist"))
info.egg_base = sys.argv[1]
for command in (build, info):
    command.ensure_finalized()
info.run()
sdist.ensure_finalized()
wheel = [os.path.relpath(path, build.build_lib) for path in build.get_outputs(include_bytecode=False)]
json.dump([wheel, info.filelist.files], out)
"""


@cache
def listed(folder):
    run = subprocess.run([sys.executable, "-c", LIST, folder], cwd=ROOT, check=True, capture_output=True, text=True)
    return [set(names) for names in json.loads(run.stdout)]


def test_the_wheel_holds_the_demonstration_and_not_its_trainer(tmp_path_factory):
    wheel, _ = listed(str(tmp_path_factory.getbasetemp()))
    assert {"ms4/__init__.py", "ms4/py.typed", "ms4/cli/start.py", "ms4/models/model.py"} <= wheel
    assert {f"ms4/models/demo/ms4-demo{name}.gguf" for name in ("", "-mmproj")} <= wheel
    assert not [name for name in wheel if "training" in name or "build_core" in name or "tests" in name]


def test_the_wheel_holds_every_module_that_the_package_imports(tmp_path_factory):
    wheel, _ = listed(str(tmp_path_factory.getbasetemp()))
    for folder, package in (("csrc", "ms4"), ("cli", "ms4/cli"), ("models", "ms4/models"), ("quant", "ms4/quant")):
        modules = {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")} - {"ms4/build_core.py"}
        assert modules == {name for name in wheel if Path(name).parent == Path(package) and name.endswith(".py")}


def test_the_sdist_can_be_built_from(tmp_path_factory):
    _, sdist = listed(str(tmp_path_factory.getbasetemp()))
    sources = {str(p.relative_to(ROOT)) for end in ("c", "h", "cdef") for p in (ROOT / "csrc").rglob(f"*.{end}")}
    assert sources | {"csrc/build_core.py", "quant/grids.py", "pyproject.toml", "LICENSE", "README.md"} <= sdist
    assert not [name for name in sdist if name.startswith(("tests/", "models/training/"))]
