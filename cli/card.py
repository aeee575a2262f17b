"""What is said of a GPU: what lies there, what it did and was brought, what it had to do without, and how fast its bus
was seen to be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ms4.cli.render import gigabytes

if TYPE_CHECKING:
    import ms4

COUNTERS = (
    "experts_used pairs_on_gpu uploads bytes_uploaded evictions downloads bytes_downloaded bytes_streamed "
    "bytes_prefill bytes_decode bytes_on_gpu bytes_fetched bytes_disk"
).split()


def line(s: ms4.Stats) -> str:
    """For --stats and -v.  Whatever a GPU had to do without is in it."""
    parts = [f"GPU {gigabytes(s.vram_bytes)}, {s.vram_experts} of {s.experts} experts"]
    if s.experts_used:
        parts[0] += f" with {100 * s.pairs_on_gpu / s.experts_used:.0f} % of their work"
    if s.vram_slots < s.experts:
        down = f", {s.downloads} down into RAM ({gigabytes(s.bytes_downloaded)})" if s.downloads else ""
        parts.append(f"{s.uploads} brought ({gigabytes(s.bytes_uploaded)}), {s.evictions} put out{down}")
    if s.bytes_streamed:
        parts.append(f"{gigabytes(s.bytes_streamed)} brought for one layer")
    parts += tiers(s)
    if s.bytes_fetched:
        parts.append(f"{gigabytes(s.bytes_fetched)} fetched from it")
    if s.bus_bytes_per_s:
        parts.append(f"bus {gigabytes(round(s.bus_bytes_per_s))}/s: prompts bring experts from {s.stream_from} rows on")
    parts.append(f"{gigabytes(s.pinned_bytes)} pinned")
    return " · ".join(parts + without(s))


def tiers(s: ms4.Stats) -> list[str]:
    """Where the weights were that steps read."""
    used = s.bytes_prefill + s.bytes_decode
    if not used:
        return []
    text = f"weights read: {gigabytes(s.bytes_on_gpu)} by the GPU, {gigabytes(used - s.bytes_on_gpu)} by the CPU"
    return [f"{text}, {gigabytes(s.bytes_disk)} from the disk" if s.bytes_disk else text]


def without(s: ms4.Stats) -> list[str]:
    """What was to be and was not."""
    counts = (
        (s.unpinned_bytes, f"{gigabytes(s.unpinned_bytes)} refused"),
        (s.slots_given_up, f"{s.slots_given_up} places for experts given up for want of memory"),
        (s.uploads_failed, f"{s.uploads_failed} experts could not be brought"),
    )
    return [text for n, text in counts if n]


def key(gpu: ms4.Gpu) -> str:
    return f"bus {gpu.name} {gpu.bus}"


def keep(s: ms4.Stats) -> None:
    """For `ms4 doctor`: what a run has seen of the bus."""
    import ms4
    from ms4.cli import measured

    if s.bus_bytes_per_s:
        row = {"bytes_per_s": s.bus_bytes_per_s, "stream_from": float(s.stream_from)}
        measured.keep(measured.machine_path(), key(ms4.gpu()), row)


def remembered(gpu: ms4.Gpu) -> str:
    """The same, as the last run left it; "": none has."""
    from ms4.cli import measured

    row = measured.read(measured.machine_path()).get(key(gpu), {})
    if not row.get("bytes_per_s"):
        return ""
    return (
        f"; the last run brought experts at {gigabytes(round(row['bytes_per_s']))}/s, and those of prompts from "
        f"{row.get('stream_from', 0):.0f} rows on"
    )


def of_turn(now: ms4.Stats, before: ms4.Stats) -> tuple[str, str]:
    """What one answer of a chat took: in short, and all of it; "" where no GPU computes."""
    if now.device == "cpu":
        return "", ""
    turn = replace(now, **{name: getattr(now, name) - getattr(before, name) for name in COUNTERS})
    if now.vram_slots == now.experts or not turn.experts_used:
        return "", line(turn)
    return f"{100 * turn.pairs_on_gpu / turn.experts_used:.0f} % of the experts on the GPU", line(turn)
