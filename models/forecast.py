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
BLOCK = 4096  # bytes of the disk that are read together
PROCESS = 160 << 20  # bytes: Python, the libraries, the tokenizer (96 MB were measured where no picture is read)
DRIVER = 256 << 20  # bytes of host memory that a card's driver and pinned copies take: assumed
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
    least: float = 0  # bytes of experts that have to be in memory: one of each size; 0: one of the mean size

    @classmethod
    def of(cls, gguf: GgufFile) -> Model:
        """From its header.  GgufError, ModelError: it is no model that runs."""
        shape = mistral4.shape_of(gguf)
        return cls.made_of(shape, mistral4.tensors_of(gguf, shape, is_here=False), sum(gguf.sizes))

    @classmethod
    def made_of(cls, shape: ms4.Shape, tensors: Sequence[ms4.Tensor], bytes_file: int) -> Model:
        tied = {(t.file, t.offset): t.bytes for t in tensors}
        return cls(shape, clock.sizes_of(shape, tensors), sum(tied.values()), bytes_file, _least(tensors))

    def scaled(self, bytes_file: int) -> Model:
        """The same model in a file of another size: its weights are larger or smaller in proportion."""
        part = bytes_file / self.bytes_file
        s = self.sizes
        sizes = replace(s, expert=part * s.expert, every=part * s.every, shared=part * s.shared, output=part * s.output)
        return Model(self.shape, sizes, int(part * self.bytes_weights), bytes_file, part * self.least)

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


def _least(tensors: Sequence[ms4.Tensor]) -> float:
    """Bytes of one expert of each size, as csrc/slots.c has a pool for each: whole blocks of the disk."""
    by_layer: dict[int, int] = {}
    for t in tensors:
        if t.role.endswith("_exps"):
            parts = 2 if t.role == "ffn_gate_up_exps" else 1  # gate and up are read by themselves
            room = parts * -(-(t.bytes // t.dims[2] // parts + BLOCK - 1) // BLOCK) * BLOCK
            by_layer[t.layer] = by_layer.get(t.layer, 0) + room
    return float(sum(set(by_layer.values())))


@dataclass(frozen=True)
class Room:
    """Memory.  ram: bytes that may be taken, None: nobody says.  limited: --ram has said so.

    available: bytes of the machine, whatever limits this process has; None: as ram.  cached: the share of the file that
    lies in the page cache.
    """

    ram: float | None
    limited: bool = False
    available: float | None = None
    cached: float = 0.0

    @property
    def reserve(self) -> float:
        return 0.0 if self.ram is None or self.limited else reserve_of(self.ram)

    @property
    def most(self) -> float:
        """Bytes that this process gets."""
        return float("inf") if self.ram is None else self.ram - self.reserve


@dataclass(frozen=True)
class Resources:
    """Of the machine.  ram, limited, available, cached: as in Room.  vram: bytes of a card that may be taken."""

    machine: Machine
    ram: float | None
    limited: bool = False
    vram: float = 0.0
    available: float | None = None
    cached: float = 0.0

    @property
    def room(self) -> Room:
        return Room(self.ram, self.limited, self.available, self.cached)


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
class Fit:
    """What lies where, and whether that fits: what `run` does, and what a plan says of it.  Sizes in bytes.

    how: "map", "copy" or "stream", as the engine is told.
    """

    fits: bool
    how: str
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

    @property
    def needed_whole(self) -> float:
        """The bytes with which no expert stays on the disk.  What a card holds needs no memory."""
        besides = self.kv + self.buffers + self.process
        if self.n_vram and self.n_vram >= self.n_experts:
            return besides
        return self.dense + besides + (self.n_experts - self.n_vram) * self.expert

    @property
    def load(self) -> str:
        return "stream" if self.how == "stream" else "memory"

    @property
    def n_disk(self) -> int:
        return max(0, self.n_experts - self.n_ram - self.n_vram)


@dataclass(frozen=True)
class Plan(Fit):
    """And how fast that is.  Prompts are of N_PROMPT tokens."""

    seconds_to_open: float
    disk: float  # bytes per second that it is predicted for
    cold: Speed
    warm: Speed
    usual: Speed
    full: Speed  # as warm, when the context is full
    prompt: Terms
    prompt_cold: Terms

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


def fit(model: Model, room: Room, n_ctx: int, n_vram: int = 0) -> Fit:
    """What lies where for a context of n_ctx tokens.

    n_vram: experts that a card holds, and with them all but experts, the kv cache and the rows of a step.  The host has
    to hold the others then; what the card has is read once, through pages that may go again.
    """
    sizes = model.sizes
    n_all = sizes.n_layer * sizes.n_expert if sizes.expert else 0
    kv, buffers = float(mistral4.kv_bytes(model.shape, n_ctx)), model.buffers(n_ctx)
    begun = min(N_PROMPT, n_ctx)  # the places shrink from then on, as cache and buffers grow
    first = mistral4.kv_bytes(model.shape, begun) + model.buffers(begun)
    process, grown = (float(PROCESS + DRIVER), (0.0, 0.0)) if n_vram else (float(PROCESS), (first, kv + buffers))
    besides = grown[1] + process
    needed = model.dense + besides + ((model.least or sizes.expert) if n_all else 0)
    how = ms4.choose_load(
        model.bytes_weights,
        sizes.experts if n_all else 0,
        besides,
        room.ram,
        reserve=room.reserve,
        available=room.available,
        cached=room.cached,
        limited=room.limited,
    )
    n_ram = n_all
    if how == "stream" and n_vram and not room.limited:  # pages of the file are beyond any --ram
        left = 0.0 if n_vram >= n_all else model.dense + (n_all - n_vram) * sizes.expert
        if left + besides <= room.most:
            how, n_ram, needed = "map", n_all - n_vram, left + besides
    whole = how != "stream" and (n_all > 0 or model.dense + besides <= room.most)
    n_ram, n_ram_full = (n_ram if whole else places(sizes, room.most - model.dense - process - n) for n in grown)
    return Fit(
        fits=whole or (n_all > 0 and needed <= room.most),
        how=how,
        n_ctx=n_ctx,
        ram=room.ram,
        needed=needed,
        dense=model.dense,
        kv=kv,
        buffers=buffers,
        process=process,
        reserve=room.reserve,
        n_experts=n_all,
        n_ram=n_ram,
        n_ram_full=n_ram_full,
        n_vram=n_vram,
        expert=sizes.expert,
    )


def make(model: Model, there: Resources, n_ctx: int) -> Plan:
    """The plan for a context of n_ctx tokens."""
    sizes = model.sizes
    found = fit(model, there.room, n_ctx, clock.slots(sizes, there.vram, n_ctx))
    n_all, whole = found.n_experts, found.load == "memory"
    share, share_full = (
        min(1.0, (n + found.n_vram) / n_all) if n_all else 1.0 for n in (found.n_ram, found.n_ram_full)
    )
    in_vram = found.n_vram / n_all if n_all else 0.0
    opened = model.dense + (sizes.experts if whole else 0)
    # Places are filled for the first time: by the first tokens, and by the first prompt, which wants all experts once.
    first = replace(there.machine, disk=there.machine.filling(1.0, 1.0))
    filled = replace(there.machine, disk=there.machine.filling(sizes.experts, found.n_ram * sizes.expert))
    n = min(N_PROMPT, n_ctx)
    speed = _Speeds(sizes, there.machine, n)
    return Plan(
        **vars(found),
        seconds_to_open=opened / there.machine.filling(opened, opened),
        disk=there.machine.disk,
        cold=_Speeds(sizes, first, n).decode(1.0 if whole else 0.0, 0.0),
        warm=speed.decode(share, in_vram),
        usual=speed.decode(coherent(share), coherent(in_vram)),
        full=replace(speed, n_context=n_ctx).decode(share_full, in_vram),
        prompt=speed.prompt(model, in_vram, 1 - share),
        prompt_cold=_Speeds(sizes, filled, n).prompt(model, 0.0, 0.0 if whole else 1.0),
    )


def of_run(
    model: Model, machine: Machine, n_prompt: int, n_context: int, *, in_prompt: float = 1.0, found: float = 1.0
) -> tuple[float, float]:
    """(written, read): tokens per second of an answer behind n_context tokens, and of n_prompt tokens before it.

    in_prompt, found: which share of the experts was in memory when it was wanted, while the prompt was read and after.
    """
    written = _Speeds(model.sizes, machine, max(n_context, 1)).decode(found, 0.0)
    read = _Speeds(model.sizes, machine, max(n_prompt, 1)).prompt(model, 0.0, 1 - in_prompt)
    return written.tokens_per_s, read.tokens_per_s


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
        return clock.prefill(self.sizes, here, clock.MS4, n, N_BATCH, resident=in_vram, on_disk=on_disk, n_wanted=1)


# --- what would fit instead
@dataclass(frozen=True)
class Other:
    """A plan near the one that does not fit: what to type for it, and the bytes that it needs.  n_ctx: its context."""

    how: str
    n_ctx: int
    needed: float


def smaller_contexts(model: Model, there: Room, n_ctx: int) -> list[Other]:
    """The largest context that fits, as a power of two from 512 up; none if even that does not."""
    n = 1 << max(0, n_ctx - 1).bit_length()
    while (n := n // 2) >= 512:
        found = fit(model, there, n)
        if found.fits:
            return [Other(f"--ctx {n}", n, found.needed)]
    return []


def smaller_files(model: Model, there: Room, n_ctx: int, files: Sequence[tuple[str, int]]) -> list[Other]:
    """Of files (how they are had, bytes) those that would fit, the largest first: weights are smaller in proportion."""
    if there.ram is None:
        return []
    found = []
    for how, n_bytes in sorted(files, key=lambda file: -file[1]):
        part = n_bytes / model.bytes_file
        if 0 < part < 1:
            besides = mistral4.kv_bytes(model.shape, n_ctx) + model.buffers(n_ctx) + PROCESS
            needed = part * (model.dense + (model.least or model.sizes.expert)) + besides
            if needed <= there.most:
                found.append(Other(how, n_ctx, needed))
    return found


def more_memory(plan: Fit, there: Room, free: float | None) -> list[Other]:
    """Where --ram is what makes it not fit: a larger one, if so much is free."""
    if not there.limited or free is None or plan.needed > free - reserve_of(free):
        return []
    n = int(-(-plan.needed // (GB / 10)))  # in tenths of a GB, rounded up
    return [Other(f"--ram {n * 100}m", plan.n_ctx, plan.needed)]
