"""`make demo`: the real command on the checkpoint that comes with ms4, and whether it answers rightly.

A prompt, a prompt that needs reasoning, and an image; then the speed of this machine with it.
"""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMPTS = (  # arguments of `ms4 run`, the right answer
    (("Reverse the word planet.",), "tenalp"),
    (("-r", "high", "--think", "show", "4711 + 238 = ?"), "4949"),
    (("-i", "models/demo/hello.png", "Read the text."), "Hello, ms4!"),
)


def show(*arguments: str) -> str:
    """Runs `ms4 ...` as a user would, with the command line above its output; what it wrote to stdout."""
    print(f"\n$ ms4 {shlex.join(arguments)}", flush=True)
    command = [str(Path(sys.executable).with_name("ms4")), *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    print(out, end="", flush=True)
    return out.strip()


def main() -> None:
    wrong = [right for arguments, right in PROMPTS if show("run", "--greedy", *arguments) != right]
    show("bench", "-q", "--pp", "128", "--tg", "16", "-r", "3")
    if wrong:
        sys.exit(f"\nThese answers were expected and did not come: {', '.join(wrong)}")
    print(f"\n{len(PROMPTS)} of {len(PROMPTS)} answers are right.")


if __name__ == "__main__":
    main()
