"""Bare `ms4` at a terminal: a chat, if a model is ready; else one screen that says what this machine can run.

The screen costs no network.  Its numbers are those of `ms4 plan`; the machine is measured while the screen stands
there, so that a key can be pressed at any time.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ms4
from ms4.cli import errors, expected, host, measured, streams, wrap
from ms4.cli.render import StatusLine, gigabytes, short
from ms4.models import acquire, hf_cache, repositories, stored
from ms4.models.clock import DISK_ASSUMED, Machine

if TYPE_CHECKING:
    from ms4.models.acquire import Here
    from ms4.models.calibration import Rates
    from ms4.models.forecast import Plan
    from ms4.models.repositories import Known

N_CTX = 32768
LOOK = 0.1  # seconds between two looks whether the machine has been measured
MOST_MODELS = 9  # one digit each
WIDEST = 100


@dataclass(frozen=True)
class Choice:
    """The file that suits this machine.  name: what `ms4 pull` takes; n_here: bytes that have been fetched already."""

    name: str
    bytes: int
    n_here: int = 0
    fits: bool = True  # into memory and a card's, all of it


def begin() -> int:
    """What bare `ms4` does at a terminal; the exit code."""
    from ms4.cli import config

    if "model" in config.effective((), config.layers(None)):  # MS4_MODEL, or a file
        return start("chat")
    models = stored.everything()
    if len(models) == 1:
        return start("chat", "-m", models[0].name)
    if models:
        return choose([model.name for model in models[:MOST_MODELS]])
    return guide()


def start(*arguments: str) -> int:
    """Carries out a command as if it had been typed."""
    os.environ["TYPER_USE_RICH"] = "0"
    from ms4.cli import main

    return main.carry_out(arguments[0], [*arguments[1:]])


def choose(names: Sequence[str]) -> int:
    """Which of the models that are here is to talk."""
    lines = [f"  {number}  chat with {name}" for number, name in enumerate(names, 1)]
    show(["Models on this machine:", "", *lines, "  q  leave"])
    key = pressed({**{str(n): str(n) for n in range(1, len(names) + 1)}, "q": "q"})
    return errors.OK if key == "q" else start("chat", "-m", names[int(key) - 1])


def guide() -> int:
    """Nothing is here yet: what would run, and how fast; then what is asked for."""
    (n_memory, n_free), disk, here = acquire.memory(), acquire.free_disk(), expected.this_machine()
    choice = suited(n_memory, here.vram)
    show(described(choice, n_memory, n_free, disk, here))
    keys = {"d": "d", "h": "h", "q": "q"}
    if choice.bytes - choice.n_here + acquire.SPARE <= disk:
        keys = {"p": "p", **keys}
    key = pressed(keys, Speeds(choice, n_free, here))
    if key == "h":
        from ms4.cli import start as beginning

        streams.Output().write(beginning.shown(beginning.HELP, sys.stdout))
    if key in "hq":
        return errors.OK
    if key == "d":
        return start("chat")
    got = start("pull", choice.name, *([] if choice.fits else ["--anyway"]))
    return got or start("chat", "-m", choice.name)


# --- what would run here
def suited(n_memory: int | None, vram: float = 0.0) -> Choice:
    """What was begun; else the largest known file that fits into memory, but none that is larger than the one `ms4
    pull` takes by itself; if none fits, the smallest: its experts stay on the disk."""
    begun = [one for repo in hf_cache.repositories() for one in stored.unfinished(repo)]
    known = [file for file in repositories.DEFAULT.files if file.bytes]
    for one in begun:
        for file in known:
            if (one.repo.repo, one.quant) == (repositories.DEFAULT.repo, file.quant):
                return Choice(one.name, file.bytes, one.bytes, is_in_memory(file, n_memory, vram))
    most = max(file.bytes for file in known if file.quant == acquire.LARGEST_BY_ITSELF)
    able = sorted((file for file in known if file.bytes <= most), key=lambda file: file.bytes)
    fitting = [file for file in able if is_in_memory(file, n_memory, vram)]
    best = fitting[-1] if fitting else able[0]
    return Choice(f"{repositories.DEFAULT.repo}:{best.quant}", best.bytes, 0, bool(fitting))


def is_in_memory(file: Known, n_memory: int | None, vram: float = 0.0) -> bool:
    """Whether none of it has to stay on the disk.  vram: bytes of a card."""
    from ms4.models import small_4

    on_card = acquire.bytes_on_card(small_4.model(file.bytes), vram) if vram else 0.0
    return n_memory is None or file.bytes - on_card + acquire.ESTIMATE <= n_memory


def planned(choice: Choice, n_free: int | None, here: Here, rates: Rates | None = None) -> Plan:
    """The plan for that file; without rates only its sizes mean something."""
    from ms4.models import forecast, small_4

    ram, flops = (rates.ram, rates.flops) if rates else (1.0, 1.0)
    machine = Machine(here.machine.card, ram, flops, DISK_ASSUMED)
    return forecast.make(small_4.model(choice.bytes), forecast.Resources(machine, n_free, vram=here.vram), N_CTX)


def described(choice: Choice, n_memory: int | None, n_free: int | None, disk: int, here: Here) -> list[str]:
    """The lines of the screen, but for the speed."""
    made = planned(choice, n_free, here)
    memory = "" if n_memory is None else f", {gigabytes(n_memory)} of memory"
    memory += "" if n_free is None else f" ({gigabytes(n_free)} free)"
    quant = choice.name.rpartition(":")[2]
    on_card = 100 * made.n_vram // max(made.n_experts, 1)
    card = f"on the card all but experts and {on_card} % of those, " if made.n_vram else ""
    if made.load == "memory":
        where = f"{card}the rest in memory" if card else "all of it in memory"
    else:
        where = f"{card}in memory what is needed most, the rest on the disk"
    if not made.fits:
        where = f"too large for now: it needs {gigabytes(int(made.needed))} of free memory"
    lines = [
        f"ms4 {ms4.__version__} runs Mistral Small 4 on this machine.",
        "",
        f"machine  {host.processor()}, {ms4.probe().n_threads} threads{memory}, {gigabytes(disk)} of disk free",
        *([f"card     {here.card}, {gigabytes(int(here.vram))} free"] if here.card else []),
        f"file     {quant}, {gigabytes(choice.bytes)}: {where}, {short(made.n_ctx)} tokens of context",
        f"from     {choice.name.rpartition(':')[0]}, by its model card",
    ]
    left = choice.bytes - choice.n_here
    if left + acquire.SPARE > disk:
        get = f"   p  not now: {gigabytes(left)} are to be fetched; HF_HUB_CACHE=DIR names a larger disk"
    elif choice.n_here:
        get = f"   p  go on with the download: {gigabytes(choice.n_here)} of {gigabytes(choice.bytes)} are here"
    else:
        get = f"   p  download it, {gigabytes(left)}; Ctrl-C stops, and the same key goes on later"
    demo = "   d  try the demonstration, a toy of 80 million weights that came with ms4"
    return [*lines, "", get, demo, "   h  all commands", "   q  leave"]


class Speeds:
    """How fast it would be, measured meanwhile, unless that is known from earlier."""

    def __init__(self, choice: Choice, n_free: int | None, here: Here) -> None:
        self._choice, self._n_free, self._here = choice, n_free, here
        self._found: Rates | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._measure, daemon=True)  # whoever leaves does not wait for it
        self._thread.start()

    def _measure(self) -> None:
        from ms4.models import small_4
        from ms4.models.calibration import calibrate

        try:
            tensors = small_4.tensors()
            key = measured.rates_key(small_4.SHAPE, tensors, 0)
            found = measured.rates(key)
            if found is None:
                found = calibrate(small_4.SHAPE, tensors, min(1 << 30, (self._n_free or 4 << 30) // 4))
                measured.keep_rates(key, found)
            self._found = found
        except (ms4.EngineError, MemoryError, OSError, ValueError):
            self._failed = True

    def text(self) -> str:
        """A line; empty while it is measured."""
        if self._failed:
            return "speed    not known: this machine could not be measured"
        if self._found is None:
            return ""
        made = planned(self._choice, self._n_free, self._here, self._found)
        if not made.fits:
            return "speed    not predicted, as it does not fit now"
        if made.n_vram and self._here.machine.card is None:
            return "speed    not predicted, as the table of cards does not have this one"
        slow, fast = made.warm.tokens_per_s, made.usual.tokens_per_s
        writes = f"{slow:.1f}" if fast - slow < 0.05 else f"{slow:.1f} to {fast:.1f}"
        disk = "" if made.load == "memory" else f", with a disk of {gigabytes(int(DISK_ASSUMED))}/s"
        return (
            f"speed    about {writes} tok/s written, {made.prompt.tokens_per_s:.0f} read{disk}: predicted, not measured"
        )


# --- the terminal
def show(lines: Sequence[str]) -> None:
    width = min(streams.columns(sys.stdout) - 1, WIDEST)
    streams.Output().write("".join(f"{wrap.reflow(line, width)}\n" for line in lines) + "\n")


def pressed(keys: dict[str, str], speeds: Speeds | None = None) -> str:
    """The one of these keys that is pressed.  Ctrl-D, and a terminal that goes away, leave."""
    status = StatusLine()
    prompt = f"{', '.join([*keys][:-1])} or {[*keys][-1]}?"
    told = speeds is None
    with one_key():
        while True:
            if speeds is not None and not told and (text := speeds.text()):
                status.clear()
                show([text])
                told = True
            status.show(prompt if told else f"{prompt}  (measuring how fast it would be here, some seconds)")
            if not select.select([sys.stdin], [], [], LOOK)[0]:
                continue
            key = os.read(sys.stdin.fileno(), 64).decode("utf-8", "replace").lower()
            if key in ("", "\x04"):
                key = "q"
            if key in keys:
                status.clear()
                return keys[key]


@contextmanager
def one_key() -> Iterator[None]:
    """Inside, a key counts as soon as it is pressed, and is not shown; Ctrl-C is what it always is."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
