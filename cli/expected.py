"""What a run is expected to do, before it and after: from what `ms4 plan` has measured, never measured here.

Where this machine has not been measured, or a GPU computes, nothing is expected and nothing is said.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ms4
from ms4.cli import errors, host, measured, render
from ms4.cli.errors import CliError
from ms4.cli.options import EngineOptions
from ms4.cli.render import gigabytes

if TYPE_CHECKING:
    from ms4 import Stats
    from ms4.models import forecast
    from ms4.models.answer import Statistics
    from ms4.models.clock import Machine
    from ms4.models.forecast import Fit, Other, Plan, Room
    from ms4.models.model import Model
    from ms4.quant.gguf_file import GgufFile

SHORT = 512  # tokens of context, at which a run begins
N_OTHERS = 2
SLOW = 3.0  # tokens per second, below which one should know before waiting


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


def chosen(gguf: GgufFile, engine: EngineOptions, n_tokens: int) -> str:
    """How the weights are to be loaded for a context of n_tokens: as `ms4 plan` says, or as the user does.

    NoRoomError, before a byte of weights, if that cannot fit.  --load map and copy are the user's word.
    """
    from ms4.models import forecast

    if engine.load in ("map", "copy"):
        return engine.load
    model = forecast.Model.of(gguf)
    room = room_here(gguf, engine.ram or 0)
    found = forecast.fit(model, room, min(n_tokens, model.shape.n_ctx_train))
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
def known(model: Model) -> tuple[forecast.Model, Machine] | None:
    """What is known of a model that is open, and of this machine; None: there is nothing to expect it from."""
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
    return about, clock.Machine(None, rates.ram, rates.flops, disk.bytes_per_s if disk else clock.GB)


def plan_of(model: Model) -> Plan | None:
    """The plan for a model that is open, as it was opened."""
    from ms4.models import forecast

    if (found := known(model)) is None:
        return None
    stats = model.engine.stats()
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
    plan = plan.corrected(*measured.ratios(measured.run_key(model.gguf.path, stats.load)))
    if plan.warm.tokens_per_s < SLOW:
        errors.note(
            f"expect about {plan.warm.tokens_per_s:.1f} tok/s of writing, {plan.prompt.tokens_per_s:.0f} of reading; "
            f"the limit is {plan.warm.terms.limit}"
        )


def note_after(model: Model, s: Statistics, read: Stats | None) -> str:
    """Compares a run with what was expected of it, and keeps the ratio for the next plan; what to add to --stats.

    read: the engine's counters when the prompt had been read.  Of experts on the disk as many are expected to be found
    in memory as were: the first prompt after opening finds none, and that is no fault of the prediction.
    """
    from ms4.models import forecast

    if (found := known(model)) is None:
        return ""
    now = model.engine.stats()
    key = measured.run_key(model.gguf.path, now.load)
    n_read = s.n_prompt - s.n_cached
    in_prompt = share_found(read)
    after = share_found(now, read)
    written, prompt = forecast.of_run(*found, n_read, s.n_context, in_prompt=in_prompt, found=after)
    decode = s.decode_per_second / written if s.n_decode >= measured.LEAST_TOKENS else None
    prefill = s.prefill_per_second / prompt if n_read >= measured.LEAST_PROMPT else None
    before = measured.ratios(key)
    measured.learn(key, decode, prefill)
    said = []
    for what, ratio, learnt, speed in (
        ("writing", decode, before[0], written),
        ("reading", prefill, before[1], prompt),
    ):
        if ratio is not None:
            off = ratio / learnt - 1
            far = f", off by {100 * abs(off):.0f} %: the next plan knows" if abs(off) > measured.FAR else ""
            said.append(f"{what} predicted {speed * learnt:.1f} tok/s{far}")
    return "".join(f" · {text}" for text in said)


def share_found(now: Stats | None, before: Stats | None = None) -> float:
    """Of the experts that were wanted between two looks, those that needed no disk; 1 if none can stay there."""
    if now is None:
        return 1.0
    wanted = now.experts_wanted - (before.experts_wanted if before else 0)
    there = now.experts_there - (before.experts_there if before else 0)
    return there / wanted if wanted else 1.0
