"""Does anything show when the host does something wrong around what the router chose?

    python tests/cuda/host_mutants.py [--jobs N] [--only WORDS]

Each mutant is a line of the engine, changed; the rest is as it was built.  A program computes tokens on the emulated
card, of a model that fits and of one of which two layers of five do, and hashes logits and the counts of the policy.
Caught is what gives another hash, stops or hangs; where nothing answers, the engine's own watchdog ends it.  Prints how
many of how many; exits 1 if one was not caught, or if the program itself does not always give one hash.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda"
sys.path.insert(0, str(ROOT / "csrc"))
from build_parts import CFLAGS, SOURCES, link_package  # noqa: E402  (it lies beside the C)
from forget import outcome  # noqa: E402

SEEDS = (0, 1)
PROGRAM = """
import hashlib, sys
import numpy as np
import ms4
from ms4.models.model import Model
out = hashlib.sha256()
def tokens(model, session, n):
    for i in range(n):
        out.update(session.feed([20 + 37 * i]).tobytes())
    out.update(model.engine.uses())
with Model.open(sys.argv[1], device="cuda", patience=5) as model, model.session(64) as session:
    tokens(model, session, 6)
    shape, fingerprint = model.shape, int.from_bytes(model.engine.uses()[24:32], "little")
ids, often = np.arange(shape.n_expert, dtype=np.int32), np.full(shape.n_expert, 50, np.int32)
with ms4.Policy(shape.n_layer, shape.n_expert) as policy:
    for layer in (0, 2):
        policy.count(layer, ids, often, 1)
    uses = policy.pack(fingerprint)
with Model.open(sys.argv[1], device="cuda", vram=18 << 20, patience=5) as model, model.session(64) as session:
    model.engine.fix_rates(1.0, 4096)
    model.engine.warm(uses)
    tokens(model, session, 8)
    stats = model.engine.stats()
    assert 0 < stats.pairs_on_gpu < stats.experts_used
print(out.hexdigest())
"""


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    what: str


LOGITS, RECALL = "    TRY(logits(r));\n", "        TRY(layer_recall(&r->st, r->e->home, r->st.late[i], r->e->experts, "
RECALL = f"    for (int32_t i = 0; i < r->st.n_late; i++)\n{RECALL}&r->e->room.picks));\n"
FFN = "csrc/cuda/cuda_ffn.c"
MUTANTS = [
    Mutant(FFN, "if (to) atomic_store(to->flag, 0);", "", "the flag is not lowered"),
    Mutant(FFN, ".flag = (int32_t *)(void *)to->flag", ".flag = to->ids", "the flag is never raised"),
    Mutant(FFN, "TRY(gpu_poll(d->g, to->flag));", "TRY(gpu_go(d->g));", "nobody waits for the flag"),
    Mutant(FFN, "choice_at(a->layer, p->k);", "0;", "all layers choose in one place"),
    Mutant(FFN, "    p->late = 0;\n    if (gpu", "    if (gpu", "a layer is late because the one before was"),
    Mutant("csrc/cuda/cuda_tokens.c", "TRY(cuda_bring_choices(d));", "", "what was chosen never comes home"),
    Mutant("csrc/step.c", LOGITS + RECALL, RECALL + LOGITS, "what was chosen is read before the step has ended"),
    Mutant("csrc/cuda/vram.c", "v->n_in[layer] == v->n_expert", "v->n_in[layer] > 0", "a few are taken for all"),
]


def build(mutant: Mutant | None, folder: Path) -> None:
    """The package in this folder, with one source changed; the other objects are those of `make`."""
    package = link_package(folder) / "ms4"
    objects = [str(Path("build/obj", source).with_suffix(".o")) for source in [*SOURCES, "build/glue/grids.c"]]
    if mutant:
        text = (ROOT / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            sys.exit(f"host_mutants: {mutant.file} has {mutant.old!r} {text.count(mutant.old)} times: mend the list")
        source = folder / Path(mutant.file).name
        source.write_text(text.replace(mutant.old, mutant.new))
        changed = source.with_suffix(".o")
        include = ["-Icsrc", f"-I{Path(mutant.file).parent}"]
        subprocess.run(["gcc", *CFLAGS, "-w", "-fPIC", *include, "-c", "-o", changed, source], check=True)
        objects[objects.index(str(Path("build/obj", mutant.file).with_suffix(".o")))] = str(changed)
    core = ["build/obj/build/glue/_core.o", "-shared", "-pthread", "-ldl", "-o", package / "_core.abi3.so"]
    subprocess.run(["gcc", *objects, *core], check=True)


def run(folder: Path, model: Path, seed: int) -> str:
    """What the program prints, or how it ended."""
    environment = {**os.environ, "MS4_LIBCUDA": str(BUILD / "libcuda_emu.so"), "MS4_EMU_SEED": str(seed)}
    environment |= {"MS4_GPU_CODE": __file__, "PYTHONPATH": str(folder)}
    return outcome([sys.executable, "-c", PROGRAM, str(model)], environment)


def fate(number: int, model: Path, want: str) -> str:
    """How the mutant was caught; empty: it was not."""
    folder = BUILD / f"host_mutant_{number}"
    build(MUTANTS[number], folder)
    for seed in SEEDS:
        got = run(folder, model, seed)
        if got != want:
            return "another hash" if re.fullmatch("[0-9a-f]{64}", got) else got[:100]
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="mistakes of the host, each of which must be caught")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="only what has this in its description")
    options = parser.parse_args()
    os.chdir(ROOT)
    build(None, BUILD / "host_right")
    from ms4.quant.tiny import Tiny, write_tiny

    model = Path(write_tiny(BUILD / "host_mutants.gguf", Tiny(n_layer=5, d_model=256, d_expert=256))[0])
    right = {run(BUILD / "host_right", model, seed) for seed in SEEDS}
    want = right.pop()
    if right or not re.fullmatch("[0-9a-f]{64}", want):
        print(f"  without a mistake, not one hash in every order: {right | {want}}")
        return 1
    chosen = [number for number, mutant in enumerate(MUTANTS) if options.only in mutant.what]
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, how in zip(chosen, pool.map(lambda number: fate(number, model, want), chosen), strict=True):
            print(f"  {MUTANTS[number].file}: {MUTANTS[number].what}: {how or 'NOT CAUGHT'}", flush=True)
            missed += not how
    print(f"mistakes of the host caught: {len(chosen) - missed} of {len(chosen)} tried")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
