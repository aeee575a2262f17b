"""A plan: what of a model lies where, whether it fits, and how fast it will be.  Before a byte of weights is read.

    plan = make(Model.of(gguf), Resources(machine, ram=32 * GB), n_ctx=32768)
    plan.fits, plan.warm.tokens_per_s, plan.cold.limit

Pure: a header and a description of the machine go in; nothing is measured or opened here.  Bytes are counted as the
engine counts them (csrc/budget.c, csrc/files.c), times come from `ms4.models.clock`.

Three speeds are given for what is written, which differ in how many experts are found where they are wanted: `cold`, in
places that are still empty; `warm`, in full ones, if choices are uniform, which is the least that they can give; and
`usual`, if they are as coherent as published curves of real models say (docs/placement.md).  Where all experts lie in
the same place, these are one.  `full` is `warm` when the context is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

import ms4
from ms4.models import clock, mistral4
from ms4.models.clock import GB, Machine, Sizes, Terms
from ms4.quant.gguf_file import GgufFile

N_BATCH = 2048  # tokens of a prompt that are computed together, as the engine chooses
N_PROMPT = 512  # of the prompt whose speed is predicted, and before the tokens that are written
PROCESS = 160 << 20  # bytes: Python, the libraries, the tokenizer (96 MB were measured where no picture is read)
# Which share of the choices a recency cache finds if it holds this share of the experts: published curves of real
# models that nearly coincide (docs/placement.md names the traces that were made like them).
COHERENT = ((0.0, 0.06, 0.12, 0.18, 0.25, 0.33, 0.39, 1.0), (0.0, 0.40, 0.64, 0.73, 0.79, 0.85, 0.90, 1.0))


@dataclass(frozen=True)
class Model:
    """What a plan needs of a model file."""

    shape: ms4.Shape
    sizes: Sizes
    bytes_weights: int  # of all tensors
    bytes_file: int

    @classmethod
    def of(cls, gguf: GgufFile) -> Model:
        """From its header.  GgufError, ModelError: it is no model that runs."""
        shape = mistral4.shape_of(gguf)
        return cls.made_of(shape, mistral4.tensors_of(gguf, shape), sum(gguf.sizes))

    @classmethod
    def made_of(cls, shape: ms4.Shape, tensors: Sequence[ms4.Tensor], bytes_file: int) -> Model:
        tied = {(t.file, t.offset): t.bytes for t in tensors}
        return cls(shape, clock.sizes_of(shape, tensors), sum(tied.values()), bytes_file)

    @property
    def dense(self) -> float:
        """Bytes of everything but experts, the embedding among them."""
        return self.bytes_weights - self.sizes.experts

    def buffers(self, n_ctx: int) -> float:
        """Bytes of the rows of a step, as csrc/step.c asks for them: floats, and the same rows as 8-bit blocks."""
        s = self.shape
        widths = 4 * s.d_model + s.kv_rank + s.d_rope + s.q_rank + s.n_head * (s.d_nope + s.d_rope + s.d_value)
        experts = s.n_expert + s.n_expert_used * (s.d_model + 2 * s.d_expert) if self.sizes.expert else 2 * s.d_dense
        return min(N_BATCH, n_ctx) * (4 * (widths + experts) + 1.1 * (2 * s.d_model + s.n_head * s.d_value))


@dataclass(frozen=True)
class Resources:
    """Of the machine.  ram: bytes that may be taken, None: nobody says.  limited: --ram has said so; vram: likewise."""

    machine: Machine
    ram: float | None
    limited: bool = False
    vram: float = 0.0


@dataclass(frozen=True)
class Speed:
    """found: the share of chosen experts that need no disk; in_vram: that the card computes."""

    terms: Terms
    found: float
    in_vram: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.terms.tokens_per_s


@dataclass(frozen=True)
class Plan:
    """load: "memory" or "stream", what `run` asks the engine for.  Sizes in bytes; prompts are of N_PROMPT tokens."""

    fits: bool
    load: str
    n_ctx: int
    ram: float | None  # that may be taken
    needed: float  # the least with which it runs
    dense: float
    kv: float
    buffers: float
    process: float
    reserve: float
    n_experts: int
    n_ram: int  # places for experts behind a short prompt, and when the context is full
    n_ram_full: int
    n_vram: int
    expert: float
    seconds_to_open: float
    cold: Speed
    warm: Speed
    usual: Speed
    full: Speed  # as warm, when the context is full
    prompt: Terms
    prompt_cold: Terms

    @property
    def n_disk(self) -> int:
        return max(0, self.n_experts - self.n_ram - self.n_vram)

    def corrected(self, decode: float, prefill: float) -> Plan:
        """The same with tokens/s times these ratios, as earlier runs were that much faster than what was predicted."""
        return replace(
            self,
            cold=replace(self.cold, terms=_scaled(self.cold.terms, decode)),
            warm=replace(self.warm, terms=_scaled(self.warm.terms, decode)),
            usual=replace(self.usual, terms=_scaled(self.usual.terms, decode)),
            full=replace(self.full, terms=_scaled(self.full.terms, decode)),
            prompt=_scaled(self.prompt, prefill),
            prompt_cold=_scaled(self.prompt_cold, prefill),
        )


def _scaled(terms: Terms, ratio: float) -> Terms:
    return Terms(**{name: ms / 1e3 / ratio for name, ms in terms.milliseconds().items()})


def reserve_of(free: float) -> float:
    """Bytes of what is free that are left to others: csrc/budget.c."""
    return min(256 * (1 << 20) + free / 32, free / 4)


def make(model: Model, there: Resources, n_ctx: int) -> Plan:
    """The plan for a context of n_ctx tokens."""
    sizes = model.sizes
    n_all = sizes.n_layer * sizes.n_expert if sizes.expert else 0
    kv, buffers = float(mistral4.kv_bytes(model.shape, n_ctx)), model.buffers(n_ctx)
    reserve = 0.0 if there.ram is None or there.limited else reserve_of(there.ram)
    besides = model.dense + kv + buffers + PROCESS
    most = float("inf") if there.ram is None else there.ram - reserve
    needed = besides + (sizes.expert if n_all else 0)
    n_vram = clock.slots(sizes, there.vram, n_ctx) if there.machine.card else 0
    whole = besides + sizes.experts <= most
    begun = min(N_PROMPT, n_ctx)  # the places shrink from then on, as cache and buffers grow
    short = besides - kv - buffers + mistral4.kv_bytes(model.shape, begun) + model.buffers(begun)
    n_ram, n_ram_full = (n_all if whole else places(sizes, most - taken) for taken in (short, besides))
    fits = whole or (n_all > 0 and needed <= most)
    found, found_full = (min(1.0, (n + n_vram) / n_all) if n_all else 1.0 for n in (n_ram, n_ram_full))
    in_vram = n_vram / n_all if n_all else 0.0
    opened = model.dense + (sizes.experts if whole else 0)
    speed = _Speeds(sizes, there.machine, begun)
    return Plan(
        fits=fits,
        load="memory" if whole else "stream",
        n_ctx=n_ctx,
        ram=there.ram,
        needed=needed,
        dense=model.dense,
        kv=kv,
        buffers=buffers,
        process=PROCESS,
        reserve=reserve,
        n_experts=n_all,
        n_ram=n_ram,
        n_ram_full=n_ram_full,
        n_vram=n_vram,
        expert=sizes.expert,
        seconds_to_open=opened / there.machine.disk,
        cold=speed.decode(1.0 if whole else 0.0, 0.0),
        warm=speed.decode(found, in_vram),
        usual=speed.decode(coherent(found), coherent(in_vram)),
        full=replace(speed, n_context=n_ctx).decode(found_full, in_vram),
        prompt=speed.prompt(model, in_vram, 1 - found),
        prompt_cold=speed.prompt(model, 0.0, 0.0 if whole else 1.0),
    )


def places(sizes: Sizes, left: float) -> int:
    """How many experts find a place in so many bytes."""
    return min(int(max(0.0, left) // sizes.expert), sizes.n_layer * sizes.n_expert) if sizes.expert else 0


def coherent(share: float) -> float:
    """Which share of the choices is found if this share of the experts is held, in coherent text."""
    return float(np.interp(share, *COHERENT))


@dataclass(frozen=True)
class _Speeds:
    """Of one model on one machine, behind n_context tokens."""

    sizes: Sizes
    machine: Machine
    n_context: int

    def decode(self, found: float, in_vram: float) -> Speed:
        """found: the share of choices that need no disk, of which in_vram (of all) are computed by the card."""
        sizes = self.sizes
        found = max(found, in_vram)
        if not sizes.expert:
            misses, reads, weights = np.zeros((1, max(sizes.n_layer, 1))), None, np.ones(1)
        elif self.machine.card is None:
            reads, weights = clock.at_hit_rate(sizes, found)
            misses = np.full_like(reads, sizes.n_used)
        else:
            misses, weights = clock.at_hit_rate(sizes, in_vram)
            lost = (1 - found) / (1 - in_vram) if in_vram < 1 else 0.0  # of what the card has not, by its mean
            reads = misses * lost
        terms = clock.decode(sizes, self.machine, clock.MS4, misses, weights, reads=reads, n_context=self.n_context)
        return Speed(terms, found, in_vram)

    def prompt(self, model: Model, in_vram: float, on_disk: float) -> Terms:
        n = self.n_context
        asked = mistral4.macs_per_token(model.shape, 1 - 1 / n) / mistral4.macs_per_token(model.shape)
        here = replace(self.machine, cpu_flops=self.machine.cpu_flops / asked)  # the last layer is computed for one row
        return clock.prefill(self.sizes, here, clock.MS4, n, N_BATCH, resident=in_vram, on_disk=on_disk)


# --- what would fit instead
@dataclass(frozen=True)
class Other:
    """A plan near the one that does not fit: what to type for it, and what it needs and gives.  n_ctx: its context."""

    how: str
    n_ctx: int
    needed: float
    plan: Plan | None = None  # None: a file of which only the size is known


def smaller_contexts(model: Model, there: Resources, n_ctx: int) -> list[Other]:
    """The largest context that fits, as a power of two from 512 up; none if even that does not."""
    n = 1 << max(0, n_ctx - 1).bit_length()
    while (n := n // 2) >= 512:
        plan = make(model, there, n)
        if plan.fits:
            return [Other(f"--ctx {n}", n, plan.needed, plan)]
    return []


def smaller_files(model: Model, there: Resources, n_ctx: int, files: Sequence[tuple[str, int]]) -> list[Other]:
    """Of files (how they are had, bytes) those that would fit, the largest first: weights are smaller in proportion."""
    if there.ram is None:
        return []
    found = []
    for how, n_bytes in sorted(files, key=lambda file: -file[1]):
        part = n_bytes / model.bytes_file
        if 0 < part < 1:
            besides = mistral4.kv_bytes(model.shape, n_ctx) + model.buffers(n_ctx) + PROCESS
            needed = part * (model.dense + model.sizes.expert) + besides
            if needed <= there.ram - (0 if there.limited else reserve_of(there.ram)):
                found.append(Other(how, n_ctx, needed))
    return found


def more_memory(plan: Plan, there: Resources, free: float | None) -> list[Other]:
    """Where --ram is what makes it not fit: a larger one, if so much is free."""
    if not there.limited or free is None or plan.needed > free - reserve_of(free):
        return []
    n = int(-(-plan.needed // (GB / 10)))  # in tenths of a GB, rounded up
    return [Other(f"--ram {n * 100}m", plan.n_ctx, plan.needed)]
