"""What `ms4 plan` prints: one JSON object, or lines for people."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, render
from ms4.cli.render import gigabytes

if TYPE_CHECKING:
    from ms4.cli.measured import Ratios
    from ms4.models.clock import Terms
    from ms4.models.forecast import Model, Other, Plan, Resources, Speed

SPEEDS = ("cold", "warm", "usual", "full")
WIDE = 1.25  # times the lower end: a narrower range is one number


@dataclass(frozen=True)
class Between:
    """The plans for the least and the most that earlier runs, or slices of a measurement, say of disk and machine."""

    low: Plan
    high: Plan

    def of(self, name: str) -> tuple[float, float]:
        """Of one of the plan's speeds, in tokens per second."""
        ends = sorted(getattr(plan, name).tokens_per_s for plan in (self.low, self.high))
        return ends[0], ends[1]

    @property
    def disk(self) -> tuple[float, float]:
        return self.low.disk, self.high.disk


def spread(ends: tuple[float, float], shown: Callable[[float], str]) -> str:
    """What is added to a number that lies between these; "" if that is as good as one."""
    low, high = ends
    return f" ({shown(low)} to {shown(high)})" if high > WIDE * low else ""


def per_second(rate: float) -> str:
    return f"{gigabytes(int(rate))}/s"


def tokens(rate: float) -> str:
    """Tokens per second, to three figures: more of them nobody can know beforehand."""
    return f"{rate:.{2 if rate < 10 else 1 if rate < 100 else 0}f}"


def spent(terms: Terms) -> str:
    """What a token's milliseconds are spent on, without what is nothing beside the rest."""
    parts = terms.milliseconds()
    digits = 1 if sum(parts.values()) >= 1 else 3  # a small model's token takes microseconds
    return " · ".join(f"{what} {ms:.{digits}f}" for what, ms in parts.items() if ms >= 0.5 * 10**-digits)


def speed_json(speed: Speed, between: tuple[float, float]) -> dict[str, Any]:
    return {
        "tokens_per_s": speed.tokens_per_s,
        "range": between,
        "limit": speed.terms.limit,
        "ms": speed.terms.milliseconds(),
        "share_found": speed.found,
        "share_in_vram": speed.in_vram,
    }


def terms_json(terms: Terms, between: tuple[float, float]) -> dict[str, Any]:
    return {
        "tokens_per_s": terms.tokens_per_s,
        "range": between,
        "limit": terms.limit,
        "ms": terms.milliseconds(),
    }


@dataclass(frozen=True)
class Said:
    """A plan, and what belongs to it."""

    path: str
    model: Model
    there: Resources
    made: Plan
    between: Between
    learnt: Ratios
    others: list[Other]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """One object; bytes, tokens per second, and the milliseconds of a token by what they are spent on."""
        from ms4.models.forecast import N_PROMPT

        made, machine, between = self.made, self.there.machine, self.between
        memory = ("dense", "kv", "buffers", "process", "reserve", "needed")
        return {
            "model": os.path.basename(self.path),
            "bytes": self.model.bytes_file,
            "fits": made.fits,
            "load": made.load,
            "ctx": made.n_ctx,
            "prompt": min(N_PROMPT, made.n_ctx),
            "machine": {
                "ram_bytes": made.ram,
                "vram_bytes": self.there.vram,
                "memory_bytes_per_s": machine.ram,
                "cpu_flops": machine.cpu_flops,
                "disk_bytes_per_s": machine.disk,
                "disk_range": between.disk,
                "disk_bytes_per_s_first": machine.filling(1.0, 1.0),
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
            "decode": {name: speed_json(getattr(made, name), between.of(name)) for name in SPEEDS},
            "prefill": {
                "warm": terms_json(made.prompt, between.of("prompt")),
                "cold": terms_json(made.prompt_cold, between.of("prompt_cold")),
            },
            "corrected_by": {"decode": self.learnt.decode.usual, "prefill": self.learnt.prefill.usual},
            "nearest": [{"type": other.how, "ctx": other.n_ctx, "needed": int(other.needed)} for other in self.others],
            "notes": self.notes,
        }

    def text(self) -> str:
        """For people: where what lies, how fast it will be, and why."""
        made, machine = self.made, self.there.machine
        name = errors.escape(os.path.basename(self.path), 80)
        verdict = (
            "does not fit" if not made.fits else "fits into memory" if made.load == "memory" else "experts on the disk"
        )
        room = "unknown" if made.ram is None else gigabytes(int(made.ram))
        vram = f", VRAM {gigabytes(int(self.there.vram))}" if self.there.vram else ""
        disk = per_second(machine.disk) + spread(self.between.disk, per_second)
        lines = [
            f"{name}: {verdict}, {render.short(made.n_ctx)} tokens of context",
            f"machine   memory {room}{vram}, weights read at {per_second(machine.ram)}, prompts at "
            f"{machine.cpu_flops / 1e9:.0f} Gflop/s, disk {disk}",
            f"memory    all but experts {gigabytes(int(made.dense))} · kv cache {gigabytes(int(made.kv))} · buffers "
            f"{gigabytes(int(made.buffers))} · process {gigabytes(int(made.process))} · left to others "
            f"{gigabytes(int(made.reserve))}",
        ]
        if made.n_experts:
            lines.append(self.experts())
        if made.fits:
            lines += self.speeds()
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join([*lines, "Predicted, not measured.", ""])

    def experts(self) -> str:
        made = self.made
        places = f"{made.n_ram} in memory"
        if made.n_ram_full < made.n_ram:
            places += f" ({made.n_ram_full} when the context is full)"
        places += f" · {made.n_vram} in VRAM" if made.n_vram else ""
        size = gigabytes(int(made.expert))
        return f"experts   {places} · {made.n_disk} on the disk, of {made.n_experts} with {size} each"

    def speeds(self) -> list[str]:
        """The predicted speeds, one a line, with the terms that they are made of."""
        made = self.made
        lines = [f"opening   {made.seconds_to_open:.0f} s from the disk"]
        rows = [("writing", "warm", "")]
        if made.warm.found < 1 or made.warm.in_vram:
            rows = [
                ("writing", "warm", "  if choices are uniform, the slowest case"),
                ("", "usual", f"  in coherent text, {100 * made.usual.found:.0f} % found in memory"),
                ("", "cold", "  at first, when nothing is in memory yet"),
            ]
        rows += [("", "full", "  when the context is full"), ("reading", "prompt", "")]
        if made.load == "stream":
            rows.append(("", "prompt_cold", "  the first prompt, when nothing is in memory yet"))
        for title, name, why in rows:
            terms = getattr(made, name) if name.startswith("prompt") else getattr(made, name).terms
            speed = f"{tokens(terms.tokens_per_s)} tok/s{spread(self.between.of(name), tokens)}"
            lines.append(f"{title:<9} {speed}, limit: {terms.limit} (ms: {spent(terms)}){why}")
        return lines
