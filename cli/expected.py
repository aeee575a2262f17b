"""What a run is expected to do, before it and after: from what `ms4 plan` has measured, never measured here.

Where this machine has not been measured, or a GPU computes, nothing is expected and nothing is said.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ms4
from ms4.cli import errors, host, measured, render
from ms4.cli.errors import CliError
from ms4.cli.options import EngineOptions
from ms4.cli.render import gigabytes

if TYPE_CHECKING:
    from ms4 import Stats
    from ms4.models import forecast
    from ms4.models.acquire import Here
    from ms4.models.answer import Statistics
    from ms4.models.cards import Card
    from ms4.models.clock import Machine
    from ms4.models.forecast import Fit, Other, Plan, Room
    from ms4.models.model import Model
    from ms4.quant.gguf_file import GgufFile

SHORT = 512  # tokens of context, at which a run begins
N_OTHERS = 2
SLOW = 3.0  # tokens per second, below which one should know before waiting
LEAST_CAPABILITY = 8.0  # of a GPU


class NoRoomError(CliError):
    """The model cannot run in the memory that there is."""

    code = errors.NO_ROOM


# --- where weights will lie
def room_here(gguf: GgufFile, ram: int, what_if: bool = False) -> Room:
    """The memory of this machine for a model file.  ram: bytes that the user allows, 0: what is free, which is the most
    in any case, unless it is asked what would be if there were so much."""
    from ms4.models.forecast import Room

    got = ms4.allowed()
    shares = [(host.cached_share(path) or 0.0) * n for path, n in zip(gguf.paths, gguf.sizes, strict=True)]
    cached = sum(shares) / max(sum(gguf.sizes), 1)
    if ram:
        most = ram if what_if or got.room is None else min(ram, most_of(got.room))
        return Room(most, True, None if what_if else got.available or None, cached)
    return Room(got.room, False, got.available or None, cached)


def most_of(free: int) -> int:
    """Bytes that this process may have if so many are free: it has some of them already (csrc/budget.c)."""
    from ms4.models.forecast import reserve_of

    return free + host.own_memory() - int(reserve_of(free))


@dataclass(frozen=True)
class HostCard:
    """The GPU of this machine.  vram: bytes of it that may be taken; total: that it has."""

    name: str
    vram: int
    total: int

    @property
    def speeds(self) -> Card | None:
        """Its row of the table, with the memory that it has; None: there is none."""
        from ms4.models import cards

        row = cards.of_driver(self.name, self.total)
        return replace(row[1], vram=self.total) if row else None


def card_here(device: str, vram: int = 0) -> HostCard | None:
    """The GPU that would compute, as its driver describes it; None: the CPU would.  vram: what the user allows."""
    if device == "cpu":
        return None
    try:
        gpu = ms4.gpu()
    except (ms4.EngineError, MemoryError):
        return None
    if float(gpu.capability) < LEAST_CAPABILITY or not has_kernels():
        return None
    return HostCard(gpu.name, min(gpu.free, vram or gpu.free), gpu.total)


def this_machine() -> Here:
    """What a model that is not here yet would run on: as far as it was measured, without measuring."""
    from ms4.models.acquire import ASSUMED, Here

    machine, card = measured.some_machine() or ASSUMED, card_here("auto")
    return Here(replace(machine, card=card.speeds), card.vram, card.name) if card else Here(machine)


def has_kernels() -> bool:
    """Whether there is code for a GPU, or what compiles it."""
    from ms4.models import gpu_code

    if ms4.has_gpu_code():
        return True
    try:
        gpu_code.Nvrtc()
    except gpu_code.CompilerError:
        return False
    return True


def chosen(gguf: GgufFile, engine: EngineOptions, n_tokens: int) -> str:
    """How the weights are to be loaded for a context of n_tokens: as `ms4 plan` says, or as the user does.

    NoRoomError, before a byte of weights, if that cannot fit.  --load map and copy are the user's word.
    """
    from ms4.models import clock, forecast

    if engine.load in ("map", "copy"):
        return engine.load
    model = forecast.Model.of(gguf)
    room = room_here(gguf, engine.ram or 0)
    n_ctx = min(n_tokens, model.shape.n_ctx_train)
    card = card_here(engine.device, engine.vram or 0)
    found = forecast.fit(model, room, n_ctx, clock.slots(model.sizes, card.vram, n_ctx) if card else 0)
    if not found.fits:
        raise refusal(found, nearest(model, room, found, gguf.path))
    return "stream" if engine.load == "stream" else found.how


def nearest(model: forecast.Model, room: Room, found: Fit, path: str) -> list[Other]:
    """The N_OTHERS plans that fit and are nearest: this file with less context or more memory, then smaller files."""
    from ms4.models.forecast import more_memory, smaller_contexts, smaller_files

    others = smaller_contexts(model, room, found.n_ctx)
    others += more_memory(found, room, ms4.allowed().room)
    others += smaller_files(model, room, found.n_ctx, files(path))
    return others[:N_OTHERS]


def files(path: str) -> list[tuple[str, int]]:
    """Other model files: those on this machine, and those that the table of repositories knows."""
    from ms4.models import repositories, stored

    here = [(f"-m {one.name}", one.bytes) for one in stored.everything() if str(one.paths[0]) != path]
    known = [(f"ms4 pull {one.quant}", one.bytes) for one in repositories.DEFAULT.files if one.bytes]
    return here + known


def refusal(found: Fit, others: Sequence[Other]) -> NoRoomError:
    """What happened, why in numbers, and what to type."""
    parts = [f"all but experts {gigabytes(int(found.dense))}", f"kv cache {gigabytes(int(found.kv))}"]
    parts += [f"buffers {gigabytes(int(found.buffers + found.process))}"]
    parts += [f"one expert {gigabytes(int(found.expert))}"] if found.n_experts else []
    there = gigabytes(int((found.ram or 0) - found.reserve))
    message = (
        f"with {render.short(found.n_ctx)} tokens of context this needs {gigabytes(int(found.needed))} of memory at "
        f"the least, {there} are there: {', '.join(parts)}"
    )
    hint = "   or   ".join(f"{other.how} ({gigabytes(int(other.needed))})" for other in others)
    return NoRoomError(message, hint or f"a machine with {gigabytes(int(found.needed))} of free memory")


# --- how fast that will be
def known(model: Model, n_fresh: float) -> tuple[forecast.Model, Machine] | None:
    """What is known of a model that is open, and of this machine; None: there is nothing to expect it from.

    n_fresh: bytes of experts that come into memory that was never used.
    """
    stats = model.engine.stats()
    if stats.device != "cpu" or not measured.machine_path().exists():
        return None
    from ms4.models import clock, forecast, mistral4

    tensors = mistral4.tensors_of(model.gguf, model.shape)
    rates = measured.rates(measured.rates_key(model.shape, tensors, stats.n_threads))
    disk = measured.disk(measured.disk_key(model.gguf.path))
    if rates is None or (disk is None and stats.load == "stream"):
        return None
    about = forecast.Model.made_of(model.shape, tensors, sum(model.gguf.sizes))
    found = (disk.bytes_per_s, 0.0, disk.filling(n_fresh)) if disk else (clock.DISK_ASSUMED, 0.0, 0.0)
    return about, clock.Machine(None, rates.ram, rates.flops, *found)


def plan_of(model: Model) -> Plan | None:
    """The plan for a model that is open, as it was opened."""
    from ms4.models import forecast

    stats = model.engine.stats()
    if (found := known(model, stats.slot_bytes_most)) is None:
        return None
    ram = stats.ram if stats.load == "stream" else None
    return forecast.make(found[0], forecast.Resources(found[1], ram, limited=True), SHORT)


def note_before(model: Model) -> None:
    """One line, if it will be slow."""
    stats = model.engine.stats()
    plan = plan_of(model)
    if plan is None:
        if stats.load == "stream":
            errors.note(f"how fast that will be:  ms4 plan {shlex.quote(model.gguf.path[-80:])}")
        return
    learnt = measured.ratios(measured.run_key(model.gguf.path, stats.load))
    plan = plan.corrected(learnt.decode.usual, learnt.prefill.usual)
    if plan.warm.tokens_per_s < SLOW:
        errors.note(
            f"expect about {plan.warm.tokens_per_s:.1f} tok/s of writing, {plan.prompt_cold.tokens_per_s:.0f} of "
            f"reading; the limit is {plan.warm.terms.limit}"
        )


@dataclass(frozen=True)
class Compared:
    """A phase of a run beside its prediction, in tokens per second.  why: what was other than expected."""

    what: str
    predicted: float
    measured: float
    why: str = ""

    @property
    def text(self) -> str:
        off = self.measured / self.predicted - 1
        far = f", off by {100 * abs(off):.0f} %{self.why}: the next plan knows" if abs(off) > measured.FAR else ""
        return f" · {self.what} predicted {self.predicted:.1f} tok/s{far}"


def learn(model: Model, s: Statistics, read: Stats | None, before: Stats | None = None) -> list[Compared]:
    """Compares a run with what was expected of it, and keeps what it says about disk and machine for the next plan.

    read: the engine's counters when the prompt had been read; before: when the turn began, None: the model was opened.
    Of experts on the disk as many are expected to be found in memory as were: the first prompt after opening finds
    none, and that is no fault of the prediction.  What a run got of the disk is kept by itself; the ratio that is kept
    is what is left when the model of time is given that.
    """
    from ms4.models import forecast

    now = model.engine.stats()
    wrote, came = disks_of(now, read, before)
    try:
        found, disk = known(model, came.fresh), measured.disk_key(model.gguf.path)
    except OSError:  # the file is gone
        return []
    if now.load == "stream" and now.device == "cpu":
        measured.learn_disk(disk, wrote, came)
    if found is None:
        return []
    about, machine = found
    key = measured.run_key(model.gguf.path, now.load)
    n_read, learnt = s.n_prompt - s.n_cached, measured.ratios(key)
    shares = {"in_prompt": share_found(read, before), "found": share_found(now, read)}
    filled = replace(machine, disk=machine.filling(came.bytes, came.fresh))
    made = []
    for what, enough, speed, here, part, ratio in (
        ("decode", s.n_decode >= measured.LEAST_TOKENS, s.decode_per_second, machine, wrote, learnt.decode),
        ("prefill", n_read >= measured.LEAST_PROMPT, s.prefill_per_second, filled, came, learnt.prefill),
    ):
        if not enough or speed <= 0:
            continue
        one = 0 if what == "decode" else 1
        plain = forecast.of_run(about, here, n_read, s.n_context, **shares)[one]
        own = replace(here, disk=part.rate or here.disk)
        measured.learn(key, what, speed / forecast.of_run(about, own, n_read, s.n_context, **shares)[one])
        why = f" as the disk gave {gigabytes(int(part.rate))}/s" if part.rate and is_far(part.rate, here.disk) else ""
        made.append(Compared("writing" if what == "decode" else "reading", plain * ratio.usual, speed, why))
    return made


def is_far(one: float, other: float) -> bool:
    return abs(one / other - 1) > measured.FAR


def disks_of(now: Stats, read: Stats | None, before: Stats | None) -> tuple[measured.DiskUse, measured.DiskUse]:
    """What of the disk was used to write, and before, to read the prompt and to fill places for the first time."""
    last = read or now
    n_bytes, ns, held = (u.bytes_disk, u.ns_disk, u.slot_bytes) if (u := before) else (0, 0, 0)
    came = last.bytes_disk - n_bytes
    fresh = min(max(last.slot_bytes - held, 0), came)
    wrote = measured.DiskUse(now.bytes_disk - last.bytes_disk, now.ns_disk - last.ns_disk)
    return wrote, measured.DiskUse(came, last.ns_disk - ns, fresh)


def note_after(compared: Sequence[Compared]) -> str:
    """What to add to --stats."""
    return "".join(one.text for one in compared)


def share_found(now: Stats | None, before: Stats | None = None) -> float:
    """Of the experts that were wanted between two looks, those that needed no disk; 1 if none can stay there."""
    if now is None:
        return 1.0
    wanted = now.experts_wanted - (before.experts_wanted if before else 0)
    there = now.experts_there - (before.experts_there if before else 0)
    return there / wanted if wanted else 1.0
