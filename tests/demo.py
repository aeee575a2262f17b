"""`make demo`: the commands of the README's first run on the checkpoint that comes with ms4, and whether they answer
as it says; then the speed of this machine with it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def blocks(text: str) -> list[str]:
    """The blocks of a paper in which commands stand: those without a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in fenced if not language]


def examples() -> list[tuple[str, str]]:
    """(command, answer) of every line of the README that says what comes out, as `ms4 run "..."  # -> answer`."""
    text = "".join(blocks((ROOT / "README.md").read_text(encoding="utf-8")))
    return re.findall(r"^(ms4 .*?) +# -> (.+)$", text, re.MULTILINE)


def show(command: str) -> str:
    """Runs a command as a user would, with the line itself above its output; what it wrote to stdout."""
    print(f"\n$ {command}", flush=True)
    environment = {**os.environ, "PATH": PATH}
    out = subprocess.run(
        command, shell=True, check=True, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ).stdout.decode()
    print(out, end="", flush=True)
    return out.removesuffix("\n")


def main() -> None:
    wanted = examples()
    wrong = [answer for command, answer in wanted if show(command) != answer]
    show("ms4 bench -q --pp 128 --tg 16 -r 3")
    if wrong:
        sys.exit(f"\nThese answers were expected and did not come: {', '.join(wrong)}")
    print(f"\n{len(wanted)} of {len(wanted)} answers are right.")


if __name__ == "__main__":
    main()
