"""`ms4 plan`: what of a model would lie where, whether it fits, and how fast it would be.

The weights are not read.  What this machine does in a second is measured once, in about ten seconds, and remembered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ms4
from ms4.cli import errors, expected, measured, render, streams
from ms4.cli.errors import MissingError
from ms4.cli.options import EngineOptions
from ms4.cli.render import StatusLine, gigabytes

if TYPE_CHECKING:
    from ms4.models.calibration import DiskRate, Rates
    from ms4.models.clock import Terms
    from ms4.models.forecast import Model, Other, Plan, Resources, Speed
    from ms4.quant.gguf_file import GgufFile

NO_CARD = "none"
MEASURED = "measured"  # --memory: that of this machine


@dataclass(frozen=True)
class Question:
    """What `ms4 plan` was asked.  Bytes; None: what this machine, or the card, has."""

    engine: EngineOptions
    ram: int | None
    vram: int | None
    n_ctx: int
    card: str = NO_CARD
    memory: str = MEASURED
    recalibrate: bool = False
    as_json: bool = False


def plan(question: Question) -> int:
    """Prints the plan; exit code 6, with the nearest that fit, if there is none."""
    from ms4.models import mistral4
    from ms4.models.forecast import Model, make

    status = StatusLine(question.engine.quiet)
    path, gguf = header(question, status)
    shape = mistral4.shape_of(gguf)
    tensors = mistral4.tensors_of(gguf, shape, is_here=False)
    model = Model.made_of(shape, tensors, sum(gguf.sizes))
    there, notes = resources(question, gguf, shape, tensors, status)
    n_ctx = min(question.n_ctx, shape.n_ctx_train)
    if n_ctx < question.n_ctx:
        notes.append(f"the model holds at most {n_ctx} tokens")
    made = make(model, there, n_ctx)
    ratios = measured.ratios(measured.run_key(path, made.load)) if is_here(question) else (1.0, 1.0)
    if ratios != (1.0, 1.0):
        notes.append("corrected by earlier runs: writing x {:.2f}, reading x {:.2f}".format(*ratios))
    made = made.corrected(*ratios)
    others = [] if made.fits else expected.nearest(model, there.room, made, path)
    output = streams.Output()
    if question.as_json:
        output.write(json.dumps(as_json(path, model, there, made, ratios, others, notes)) + "\n")
    else:
        output.write(shown(path, there, made, notes))
    if not made.fits:
        raise expected.refusal(made, others)
    return errors.OK


def is_here(question: Question) -> bool:
    """Whether it is this machine that is asked about, and not one of the tables."""
    return question.card == NO_CARD and question.memory == MEASURED


# --- the model
def header(question: Question, status: StatusLine) -> tuple[str, GgufFile]:
    """(path or name, header) of a file here, or of one elsewhere, of which nothing but the header is fetched."""
    from ms4.models import hf_cache, remote, variants
    from ms4.quant.gguf_file import GgufFile

    name = question.engine.model or ""
    wanted = variants.parse(name) if name.startswith("hf:") and not os.path.lexists(name) else None
    if not remote.is_address(name) and (wanted is None or is_stored(name)):
        path = question.engine.require()
        return path, GgufFile.open(path)
    if hf_cache.is_offline():
        raise MissingError(f"{name[-80:]} is not on this machine, and the network may not be used", "ms4 ls")
    from ms4.cli.pull import connected
    from ms4.models.acquire import ASSUMED

    status.show(f"asking for the header of {name[-60:]}")
    try:
        with connected() as web:
            if wanted is None:
                return name, remote.at_address(web, name)
            return remote.on_hub(web, wanted, measured.some_machine() or ASSUMED)
    finally:
        status.clear()


def is_stored(name: str) -> bool:
    from ms4.models import stored

    try:
        stored.find(name.removeprefix("hf:"))
    except stored.NotStoredError:
        return False
    return True


# --- the machine
def resources(
    question: Question, gguf: GgufFile, shape: ms4.Shape, tensors: Sequence[ms4.Tensor], status: StatusLine
) -> tuple[Resources, list[str]]:
    """The machine, measured or remembered or from the tables, and what is to be said about that."""
    from ms4.models import clock
    from ms4.models.forecast import Resources

    room = expected.room_here(gguf, question.ram or 0, what_if=True)
    notes = []
    rates = known_rates(question, shape, tensors, room.ram, status)
    disk = known_disk(question, gguf, status)
    if disk is None:
        notes.append(
            f"the disk is assumed to give {gigabytes(int(clock.DISK_ASSUMED))}/s: there is no file that is large "
            "enough to measure it"
        )
    elif not disk.direct:
        notes.append("the disk was measured through the page cache, as its file system reads no other way")
    card = None if question.card == NO_CARD else clock.CARDS[question.card]
    vram = 0.0 if card is None else card.vram if question.vram is None else question.vram
    here = clock.Machine(card, rates.ram, rates.flops, disk.bytes_per_s if disk else clock.DISK_ASSUMED)
    if question.memory != MEASURED:
        here = replace(here, ram=clock.MEMORIES[question.memory])
        notes.append(f"{question.memory}: what others have measured with such memory, not this machine")
    if card is not None:
        notes.append(f"a {question.card} by its data sheet: nothing was measured on one")
    return Resources(here, room.ram, room.limited, vram, room.available, room.cached), notes


def known_rates(
    question: Question, shape: ms4.Shape, tensors: Sequence[ms4.Tensor], room: float | None, status: StatusLine
) -> Rates:
    """Rates of the CPU, from earlier or measured now."""
    from ms4.models.calibration import calibrate

    key = measured.rates_key(shape, tensors, question.engine.threads or 0)
    found = None if question.recalibrate else measured.rates(key)
    if found is None:
        status.show("measuring what this machine does with such a model: about ten seconds, once")
        most = min(1 << 30, int(room or 4 << 30) // 4)
        found = calibrate(shape, tensors, most, question.engine.threads or 0)
        status.clear()
        measured.keep_rates(key, found)
    return found


def known_disk(question: Question, gguf: GgufFile, status: StatusLine) -> DiskRate | None:
    """The rate of the disk that the file is on, or would be; None: it cannot be measured with it."""
    from ms4.models import hf_cache
    from ms4.models.calibration import disk_rate

    here = os.path.exists(gguf.path)
    key = measured.disk_key(gguf.path if here else existing(hf_cache.root()))
    found = None if question.recalibrate and here else measured.disk(key)
    if found is None and here:
        status.show("measuring the disk")
        found = disk_rate(gguf.paths)
        status.clear()
        if found is not None:
            measured.keep_rates(key, found)
    return found


def existing(folder: Path) -> Path:
    """The folder, or where it would be made."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


# --- what is printed
def speed_json(speed: Speed) -> dict[str, Any]:
    return {
        "tokens_per_s": speed.tokens_per_s,
        "limit": speed.terms.limit,
        "ms": speed.terms.milliseconds(),
        "share_found": speed.found,
        "share_in_vram": speed.in_vram,
    }


def terms_json(terms: Terms) -> dict[str, Any]:
    return {"tokens_per_s": terms.tokens_per_s, "limit": terms.limit, "ms": terms.milliseconds()}


def as_json(
    path: str,
    model: Model,
    there: Resources,
    made: Plan,
    ratios: tuple[float, float],
    others: list[Other],
    notes: list[str],
) -> dict[str, Any]:
    """One object; bytes, tokens per second, and the milliseconds of a token by what they are spent on."""
    from ms4.models.forecast import N_PROMPT

    machine = there.machine
    memory = ("dense", "kv", "buffers", "process", "reserve", "needed")
    return {
        "model": os.path.basename(path),
        "bytes": model.bytes_file,
        "fits": made.fits,
        "load": made.load,
        "ctx": made.n_ctx,
        "prompt": min(N_PROMPT, made.n_ctx),
        "machine": {
            "ram_bytes": made.ram,
            "vram_bytes": there.vram,
            "memory_bytes_per_s": machine.ram,
            "cpu_flops": machine.cpu_flops,
            "disk_bytes_per_s": machine.disk,
            "card": machine.card and asdict(machine.card),
        },
        "memory": {name: int(getattr(made, name)) for name in memory},
        "experts": {
            "all": made.n_experts,
            "in_vram": made.n_vram,
            "in_ram": made.n_ram,
            "in_ram_when_full": made.n_ram_full,
            "on_disk": made.n_disk,
            "bytes_of_one": int(made.expert),
        },
        "seconds_to_open": made.seconds_to_open,
        "decode": {name: speed_json(getattr(made, name)) for name in ("cold", "warm", "usual", "full")},
        "prefill": {"warm": terms_json(made.prompt), "cold": terms_json(made.prompt_cold)},
        "corrected_by": {"decode": ratios[0], "prefill": ratios[1]},
        "nearest": [{"type": other.how, "ctx": other.n_ctx, "needed": int(other.needed)} for other in others],
        "notes": notes,
    }


def shown(path: str, there: Resources, made: Plan, notes: list[str]) -> str:
    """For people: where what lies, how fast it will be, and why."""
    name = errors.escape(os.path.basename(path), 80)
    verdict = (
        "does not fit" if not made.fits else "fits into memory" if made.load == "memory" else "experts on the disk"
    )
    room = "unknown" if made.ram is None else gigabytes(int(made.ram))
    machine = there.machine
    lines = [
        f"{name}: {verdict}, {render.short(made.n_ctx)} tokens of context",
        f"machine   memory {room}, weights read at {gigabytes(int(machine.ram))}/s, prompts at "
        f"{machine.cpu_flops / 1e9:.0f} Gflop/s, disk {gigabytes(int(machine.disk))}/s",
        f"memory    all but experts {gigabytes(int(made.dense))} · kv cache {gigabytes(int(made.kv))} · buffers "
        f"{gigabytes(int(made.buffers))} · process {gigabytes(int(made.process))} · left to others "
        f"{gigabytes(int(made.reserve))}",
    ]
    if made.n_experts:
        places = f"{made.n_ram} in memory · " + (f"{made.n_vram} in VRAM · " if there.machine.card else "")
        size = gigabytes(int(made.expert))
        lines.append(f"experts   {places}{made.n_disk} on the disk, of {made.n_experts} with {size} each")
    if made.fits:
        lines += speeds(made)
    lines += [f"note      {note}" for note in notes]
    return "\n".join([*lines, "Predicted, not measured.", ""])


def speeds(made: Plan) -> list[str]:
    """The predicted speeds, one a line, with the terms that they are made of."""
    lines = [f"opening   {made.seconds_to_open:.0f} s from the disk"]
    if made.warm.found == 1 and not made.warm.in_vram:
        rows = [("writing", made.warm.terms, "")]
    else:
        rows = [
            ("writing", made.warm.terms, "  if choices are uniform, the slowest case"),
            ("", made.usual.terms, f"  in coherent text, {100 * made.usual.found:.0f} % found in memory"),
            ("", made.cold.terms, "  at first, when nothing is in memory yet"),
        ]
    rows.append(("", made.full.terms, "  when the context is full"))
    for name, terms, why in [*rows, ("reading", made.prompt, "")]:
        spent = " · ".join(f"{what} {ms:.1f}" for what, ms in terms.milliseconds().items() if ms >= 0.05)
        lines.append(f"{name:<9} {terms.tokens_per_s:.2f} tok/s, limit: {terms.limit} (ms: {spent}){why}")
    return lines
