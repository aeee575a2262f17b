"""`make demo`: the real command on a small checkpoint that ms4 writes itself.

The weights are random numbers, so the text is noise; everything else is what a user of a real checkpoint sees.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from ms4.quant.tiny import Tiny, write_tiny

PROMPT = "Tell me a story about a small model."
SHAPE = Tiny(n_layer=4, n_expert=16, n_used=4, d_model=512, d_expert=256, default_type="Q4_K", seed=4)


def show(*arguments: str) -> None:
    """Runs `ms4 ...` as a user would, with the command line above its output."""
    print(f"\n$ ms4 {' '.join(repr(a) if ' ' in a else a for a in arguments)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("ms4")), *arguments], check=True)


def main() -> None:
    print("There is no trained checkpoint here yet. This demo writes a small one of the same architecture, with random")
    print("weights: its text is noise, but it is read and written as that of a real model is.")
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "random.gguf"))
        write_tiny(model, SHAPE)
        show("info", model)
        show("run", "-m", model, "--seed", "1", "-n", "120", "--stats", PROMPT)
        show("bench", "-m", model, "--pp", "128", "--tg", "16", "-r", "3")


if __name__ == "__main__":
    main()
