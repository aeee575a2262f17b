"""`ms4 plan`: what of a model would lie where, whether it fits, and how fast it would be.

The weights are not read.  What this machine does in a second is measured once, in about ten seconds, and remembered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ms4
from ms4.cli import errors, expected, measured, plan_shown, streams
from ms4.cli.errors import MissingError
from ms4.cli.options import EngineOptions
from ms4.cli.render import StatusLine, gigabytes

if TYPE_CHECKING:
    from ms4.models.calibration import Rates
    from ms4.models.cards import Card
    from ms4.models.clock import Machine
    from ms4.models.disk_rate import DiskRate
    from ms4.models.forecast import Model, Resources, Room
    from ms4.quant.gguf_file import GgufFile

HERE, NO_CARD = "here", "none"  # --gpu: what this machine has, or what if it had none
MEASURED = "measured"  # --memory: that of this machine


@dataclass(frozen=True)
class Question:
    """What `ms4 plan` was asked.  Bytes; None: what this machine, or the card, has."""

    engine: EngineOptions
    ram: int | None
    vram: int | None
    n_ctx: int
    card: str = HERE
    memory: str = MEASURED
    recalibrate: bool = False
    as_json: bool = False


def plan(question: Question) -> int:
    """Prints the plan; exit code 6, with the nearest that fit, if there is none."""
    from ms4.cli import card_list
    from ms4.models import mistral4
    from ms4.models.forecast import Model, make

    if card_list.shown(question.card, question.memory):
        return errors.OK
    status = StatusLine(question.engine.quiet)
    path, gguf = header(question, status)
    shape = mistral4.shape_of(gguf)
    tensors = mistral4.tensors_of(gguf, shape, is_here=False)
    model = Model.made_of(shape, tensors, sum(gguf.sizes))
    n_ctx = min(question.n_ctx, shape.n_ctx_train)
    there, ends, notes = resources(question, gguf, model, tensors, n_ctx, status)
    if n_ctx < question.n_ctx:
        notes.append(f"the model holds at most {n_ctx} tokens")
    made = make(model, there, n_ctx)
    learnt = measured.Ratios()
    if is_here(question) and not made.n_vram:
        learnt = measured.ratios(measured.run_key(path, made.load))
    if learnt.known:
        ratios = (learnt.decode.usual, learnt.prefill.usual)
        notes.append("corrected by earlier runs: writing x {:.2f}, reading x {:.2f}".format(*ratios))
    low, high = (make(model, replace(there, machine=machine), n_ctx) for machine in ends)
    between = plan_shown.Between(
        low.corrected(learnt.decode.low, learnt.prefill.low), high.corrected(learnt.decode.high, learnt.prefill.high)
    )
    made = made.corrected(learnt.decode.usual, learnt.prefill.usual)
    others = [] if made.fits else expected.nearest(model, there.room, made, path)
    said = plan_shown.Said(path, model, there, made, between, learnt, others, notes)
    streams.Output().write(json.dumps(said.as_json()) + "\n" if question.as_json else said.text())
    if not made.fits:
        raise expected.refusal(made, others)
    return errors.OK


def is_here(question: Question) -> bool:
    """Whether it is this machine that is asked about, and not one of the tables."""
    return question.card in (HERE, NO_CARD) and question.memory == MEASURED


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

    status.show(f"asking for the header of {name[-60:]}")
    try:
        with connected() as web:
            if wanted is None:
                return name, remote.at_address(web, name)
            return remote.on_hub(web, wanted, expected.this_machine())
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
    question: Question,
    gguf: GgufFile,
    model: Model,
    tensors: Sequence[ms4.Tensor],
    n_ctx: int,
    status: StatusLine,
) -> tuple[Resources, tuple[Machine, Machine], list[str]]:
    """The machine, measured or remembered or from the tables; the same with its disk at its slowest and fastest; and
    what is to be said about that."""
    from ms4.models import cards, clock
    from ms4.models.disk_rate import DiskRate
    from ms4.models.forecast import Resources, fit

    room = expected.room_here(gguf, question.ram or 0, what_if=True)
    card, vram, notes = card_for(question)
    found = fit(model, room, n_ctx, clock.slots(model.sizes, vram, n_ctx))
    streamed = found.load == "stream"
    rates, disk = measure(question, gguf, model.shape, tensors, room, status, streamed)
    if disk is None:
        notes.append(
            f"the disk is assumed to give {gigabytes(int(clock.DISK_ASSUMED))}/s: there is no file that is large "
            "enough to measure it"
        )
    elif not disk.direct:
        notes.append("the disk was measured through the page cache, as its file system reads no other way")
    if disk and streamed:
        notes.append(disk_note(disk))
    filled = found.n_ram * found.expert if streamed else model.bytes_weights
    disk = disk or DiskRate(clock.DISK_ASSUMED, low=clock.DISK_ASSUMED, high=clock.DISK_ASSUMED)
    here = clock.Machine(card, rates.ram, rates.flops, disk.bytes_per_s, fresh=disk.filling(filled))
    if question.memory != MEASURED:
        memory = cards.find_memory(question.memory)[1]
        here = replace(here, ram=memory.rate)
        notes.append(f"{question.memory}: not this machine's memory, but by {memory.source}, {memory.date}")
    (slow, fills_slow), (fast, fills_fast) = disk.slowest(filled), disk.fastest(filled)
    ends = replace(here, disk=slow, fresh=fills_slow), replace(here, disk=fast, fresh=fills_fast)
    return Resources(here, room.ram, room.limited, vram, room.available, room.cached), ends, notes


def disk_note(disk: DiskRate) -> str:
    """Where the rate of the disk comes from."""
    if not disk.n_runs:
        return "the disk's rate is that of a measurement; what runs get of it is kept and corrects it"
    runs = "the last run" if disk.n_runs == 1 else f"the last {disk.n_runs} runs"
    return f"the disk's rate is the median of what {runs} got of it"


def card_for(question: Question) -> tuple[Card | None, float, list[str]]:
    """The card whose speed is known, the bytes of VRAM that may be taken, and what is to be said about that."""
    from ms4.models import cards

    if question.card == NO_CARD:
        return None, 0.0, []
    if question.card != HERE:
        name, card = cards.find(question.card)
        note = f"a {name} by {card.source}, {card.date}: nothing was measured on one"
        return card, card.vram if question.vram is None else question.vram, [note]
    there = expected.card_here("auto", question.vram or 0)
    if there is None:
        return None, 0.0, []
    known = there.speeds
    if known is None:
        return None, there.vram, [f"{there.name} is not in the table of cards: speeds are those of the CPU alone"]
    note = f"{there.name}: its memory as the driver says, its speed by {known.source}, {known.date}"
    return known, there.vram, [note]


def measure(
    question: Question,
    gguf: GgufFile,
    shape: ms4.Shape,
    tensors: Sequence[ms4.Tensor],
    room: Room,
    status: StatusLine,
    streamed: bool,
) -> tuple[Rates, DiskRate | None]:
    """Rates of CPU and disk, from earlier or measured now: of the disk, whose rate changes by the second, a part before
    the CPU's and a part after.  streamed: experts will be read from the disk, so that its rate matters.
    """
    from ms4.models import hf_cache
    from ms4.models.disk_rate import N_SLICES, Probe

    here = os.path.exists(gguf.path)
    key = measured.disk_key(gguf.path if here else existing(hf_cache.root()))
    n = N_SLICES if streamed else 2
    probe = None
    if here and (question.recalibrate or not measured.samples(key).enough(n, sum(gguf.sizes))):
        probe = Probe(gguf.paths, tensors, shape.n_expert_used)
    try:
        if probe:
            status.show("measuring the disk")
            probe.slices(n // 2)
        rates = known_rates(question, shape, tensors, room.ram, status)
        if probe:
            status.show("measuring the disk")
            probe.slices(n - n // 2)
            if streamed:
                probe.fresh(int(room.ram or 4 << 30) // 4)
            if found := probe.samples:
                measured.keep_disk(key, found)
    finally:
        status.clear()
        if probe:
            probe.close()
    return rates, measured.disk(key)


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


def existing(folder: Path) -> Path:
    """The folder, or where it would be made."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
