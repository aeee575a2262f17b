"""How long a token takes, from sizes and rates: a model of time that needs no machine.

    misses = at_hit_rate(SMALL_4, 0.75)
    decode(SMALL_4, machine("3090", "DDR5-5600"), MS4, *misses).tokens_per_s

Three descriptions go in: what a token reads (`Sizes`), how fast that can be read (`Machine`), and what an engine spends
beside that (`Engine`).  What comes out are the terms of one token's time, in ms, and the one that limits.  The terms
are those of a layer that waits for its slowest part: while the card computes the shared expert and the experts that
lie in VRAM, the CPU computes the others, and what lies on disk is read.

Bytes and seconds throughout, floats; ms only in what is shown.  Where a constant comes from stands beside it; what is
assumed says so.  tests/test_clock.py holds what others have measured against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import comb
from typing import TYPE_CHECKING

import numpy as np

from ms4.models import cards
from ms4.models.cards import Card

if TYPE_CHECKING:
    import ms4

GB, MB, US = 1e9, 1e6, 1e-6


# --- what a token reads
@dataclass(frozen=True)
class Sizes:
    """A model in bytes and floating-point operations; `expert`, `flops_expert`: of one expert, the mean of all."""

    n_layer: int  # with experts
    n_expert: int
    n_used: int
    expert: float
    every: float  # what every token reads beside experts and output: attention, router, norms, shared experts
    shared: float  # the shared experts' part of it, which a card computes while the CPU is at the misses
    output: float
    kv: float  # of one position
    flops_every: float  # of a prompt's token beside its experts
    flops_expert: float
    flops_pair: float  # of a query and a key in all layers, as prompts are computed

    @property
    def experts(self) -> float:
        """Bytes of all experts."""
        return self.n_layer * self.n_expert * self.expert

    @property
    def used(self) -> float:
        """Bytes of the experts of one token."""
        return self.n_layer * self.n_used * self.expert

    def distinct(self, n_tokens: float) -> float:
        """Experts of a layer that so many tokens use, if their choices are independent; coherent text uses fewer."""
        return self.n_expert * (1 - (1 - self.n_used / self.n_expert) ** n_tokens)


def sizes_of(shape: ms4.Shape, tensors: Sequence[ms4.Tensor]) -> Sizes:
    """Those of a model file, from its table of tensors."""
    n_bytes: dict[str, float] = {}
    n_weights: dict[str, float] = {}
    for t in tensors:
        kind = "expert" if t.role.endswith("_exps") else "shared" if t.role.endswith("_shexp") else t.role
        kind = kind if kind in ("expert", "shared", "output", "token_embd") else "rest"
        n_bytes[kind] = n_bytes.get(kind, 0) + t.bytes
        n_weights[kind] = n_weights.get(kind, 0) + t.dims[0] * t.dims[1] * t.dims[2]
    n_layer = shape.n_layer - shape.n_dense_layer
    n_experts = max(n_layer * shape.n_expert, 1)
    every = n_bytes.get("rest", 0) + n_bytes.get("shared", 0)
    return Sizes(
        n_layer=n_layer,
        n_expert=shape.n_expert,
        n_used=shape.n_expert_used,
        expert=n_bytes.get("expert", 0) / n_experts,
        every=every,
        shared=n_bytes.get("shared", 0),
        output=n_bytes.get("output", 0) or n_bytes.get("token_embd", 0),  # the embedding once more, if they are tied
        kv=shape.n_layer * (2 * (shape.kv_rank + shape.d_rope) + 12),  # 16-bit integers and three floats
        flops_every=2 * (n_weights.get("rest", 0) + n_weights.get("shared", 0)),
        flops_expert=2 * n_weights.get("expert", 0) / n_experts,
        flops_pair=2 * shape.n_layer * shape.n_head * (shape.d_nope + shape.d_rope + shape.d_value),
    )


Q4_K, Q6_K, Q8_0, F32 = 144 / 256, 210 / 256, 34 / 32, 4.0  # bytes of a weight


def small_4(down: float = (Q4_K + Q6_K) / 2) -> Sizes:
    """Mistral Small 4 as Q4_K_M; down: bytes of a weight in the down projections, which are a mix in such a file."""
    attention = (4096 * 1024 + 1024 * 4096 + 4096 * 4096) * Q4_K + (4096 * 320 + 32 * 256 * (64 + 128)) * Q8_0
    expert = 4096 * 2048 * (2 * Q4_K + down)
    weights = 4096 * (1024 + 1024 + 4096 + 320 + 128) + 32 * 256 * (64 + 128) + 3 * 4096 * 2048
    return Sizes(
        n_layer=36,
        n_expert=128,
        n_used=4,
        expert=expert,
        every=36 * (attention + 128 * 4096 * F32 + expert),
        shared=36 * expert,
        output=131072 * 4096 * Q6_K,
        kv=36 * (2 * 320 + 12),
        flops_every=2 * 36 * weights,
        flops_expert=2 * 3 * 4096 * 2048,
        flops_pair=2 * 36 * 32 * (64 + 64 + 128),
    )


SMALL_4 = small_4()


# --- how fast it can be read
PCIE = cards.buses()
CARDS = cards.cards()
MEMORIES = {name: memory.rate for name, memory in cards.memories().items()}
DISK_ASSUMED = 2 * GB  # bytes per second, of a disk that nobody has measured: a slow NVMe, or a good SATA array


@dataclass(frozen=True)
class Machine:
    """card None: there is none.  ram: bytes read per second; disk: of large reads with several under way.

    fresh: of such reads into memory that was never used; 0: as fast as others.
    """

    card: Card | None
    ram: float
    cpu_flops: float = 1.5e12  # of prompts' products: AVX2, eight to twelve cores
    disk: float = 6 * GB
    bus: float = 0.0  # if it is not the card's usual link
    fresh: float = 0.0

    def filling(self, n_bytes: float, n_fresh: float) -> float:
        """Bytes per second of reading n_bytes, the first n_fresh of them into memory that was never used."""
        n_fresh = min(n_fresh, n_bytes)
        if not 0 < self.fresh < self.disk or n_fresh <= 0:
            return self.disk
        return n_bytes / (n_fresh / self.fresh + (n_bytes - n_fresh) / self.disk)

    @property
    def link(self) -> float:
        return self.bus or (self.card.bus if self.card else 0.0)


def machine(card: str | None, memory: str, bus: str = "") -> Machine:
    """By names in the tables."""
    return Machine(CARDS[card] if card else None, MEMORIES[memory], bus=PCIE[bus] if bus else 0.0)


def measured(limits: ms4.Limits, card: Card | None = None, *, disk: float = 6 * GB, bus: float = 0.0) -> Machine:
    """From what `Engine.measure` has found.  Prompts reach about half of the 8-bit peak (docs/speed.md)."""
    return Machine(card, limits.read_bytes_per_s, 0.5 * 2 * limits.int8_macs_per_s, disk, bus)


# --- what an engine spends beside that
@dataclass(frozen=True)
class Engine:
    """overlaps: the CPU computes misses while the card is at the same layer, and prompts are copied while computed."""

    n_kernels: float  # of a layer
    s_kernel: float  # from one to the next, on top of the bytes
    s_miss: float  # to hand a layer to the CPU and take its rows back, where it has a part in it
    overlaps: bool


# Assumed until there is a card: 20 kernels of a layer in a graph (its nodes cost others 1.3 us, and a small kernel does
# not end sooner than after 2), 45 us for the CPU's part (others: 30 to 50 with callbacks, 40 with flags).
MS4 = Engine(20, 2 * US, 45 * US, overlaps=True)
# llama.cpp with layers or tensors on the CPU: about 30 launches of a layer at 4.6 us, no graph, one after the other.
LLAMA_CPP = Engine(30, 4.6 * US, 45 * US, overlaps=False)


# --- what comes out
@dataclass(frozen=True)
class Terms:
    """Of a token that is written, or of a token of a prompt: seconds, by what they are spent on."""

    dense: float = 0.0  # attention's weights, router, shared experts, output
    context: float = 0.0  # the kv cache, or the scores of a prompt
    hits: float = 0.0  # experts in VRAM
    misses: float = 0.0  # what the CPU takes longer than the card, or than it computes
    disk: float = 0.0  # what reading takes longer than both
    bus: float = 0.0  # experts copied up that something waited for
    control: float = 0.0  # kernels one after another, and handing over to the CPU

    @property
    def seconds(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.seconds

    @property
    def limit(self) -> str:
        """The largest term."""
        return max((field.name for field in fields(self)), key=lambda name: getattr(self, name))

    def milliseconds(self) -> dict[str, float]:
        return {field.name: 1e3 * getattr(self, field.name) for field in fields(self)}


def at_hit_rate(sizes: Sizes, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(misses [k + 1, n_layer], weights [k + 1]) if each choice is found with this probability, by itself."""
    k = sizes.n_used
    weights = np.array([comb(k, m) * (1 - rate) ** m * rate ** (k - m) for m in range(k + 1)])
    return np.repeat(np.arange(k + 1)[:, None], sizes.n_layer, axis=1), weights


def at_split(sizes: Sizes, n_cpu_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for whole layers of experts on the CPU, the others in VRAM."""
    misses = np.zeros((1, sizes.n_layer))
    misses[0, :n_cpu_layers] = sizes.n_used
    return misses, np.ones(1)


def decode(
    sizes: Sizes,
    machine: Machine,
    engine: Engine,
    misses: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    reads: np.ndarray | None = None,
    uploads: float = 0.0,
    n_context: float = 0.0,
    union: float = 1.0,
) -> Terms:
    """The mean token.

    misses: [tokens, n_layer], experts that do not lie in VRAM; reads: likewise, those of them that lie on disk.
    weights: of the rows, 1 in all; None: equal.  uploads: bytes copied up during a token.  union: experts that a step
    of several tokens reads (a verified draft), in those of a single token.
    """
    n = len(misses)
    shares = np.full(n, 1 / n) if weights is None else weights
    lacking = union * misses * sizes.expert
    from_disk = np.zeros_like(lacking) if reads is None else union * reads * sizes.expert / machine.disk
    # The experts of a layer are read one after another, by all threads, and computed as they come: the last one alone.
    from_disk = from_disk + (0 if reads is None else union * np.minimum(reads, 1) * sizes.expert / machine.ram)
    control = engine.s_miss * (misses > 0)
    if machine.card is None:
        every = sizes.every + sizes.output
        cpu = union * np.full_like(lacking, sizes.n_used * sizes.expert) / machine.ram
        late = np.maximum(from_disk - cpu, 0)
        return Terms(
            dense=every / machine.ram,
            context=n_context * sizes.kv / machine.ram,
            misses=_mean(cpu, shares),
            disk=_mean(late, shares),
        )
    vram = machine.card.reads
    hits = (union * sizes.n_used * sizes.expert - lacking) / vram
    beside = hits + sizes.shared / sizes.n_layer / vram
    cpu = lacking / machine.ram
    wait = np.maximum(cpu + control - beside, 0) if engine.overlaps else cpu + control
    handed = np.minimum(control, wait)  # what of it shows
    late = np.maximum(from_disk - beside - wait, 0)
    terms = Terms(
        dense=(sizes.every + sizes.output) / vram,
        context=n_context * sizes.kv / vram,
        hits=_mean(hits, shares),
        misses=_mean(wait - handed, shares),
        disk=_mean(late, shares),
        control=_mean(handed, shares) + sizes.n_layer * engine.n_kernels * engine.s_kernel,
    )
    if not uploads:
        return terms
    free = terms.seconds - _mean(cpu, shares)  # while the CPU is at work, copies take from its bandwidth
    late_bytes = max(uploads - free * machine.link, 0.0)
    bus = max(late_bytes / machine.ram, uploads / machine.link - terms.seconds)
    return Terms(**{f.name: getattr(terms, f.name) for f in fields(terms)} | {"bus": bus})


def _mean(by_layer: np.ndarray, shares: np.ndarray) -> float:
    """The sum over layers, averaged over tokens."""
    return float(by_layer.sum(axis=1) @ shares)


AHEAD_FROM, MOST_AHEAD = 0.75, 24  # csrc/experts.c, csrc/slots.c: of a layer's experts that are used; that are read


def prefill(
    sizes: Sizes,
    machine: Machine,
    engine: Engine,
    n_tokens: int,
    n_chunk: int,
    *,
    resident: float = 0.0,
    on_disk: float = 0.0,
    n_wanted: int | None = None,
) -> Terms:
    """A token of a prompt of n_tokens that is read in chunks of n_chunk.

    resident, on_disk: the shares of the experts that lie in VRAM, and that have to be read for every chunk.  With a
    card all others are copied up once for every chunk, and all is computed there.  n_wanted: for how many tokens at the
    end logits are wanted, None: all; the last layer's experts are needed for those alone.
    """
    flops = sizes.flops_every + sizes.n_layer * sizes.n_used * sizes.flops_expert
    scores = sizes.flops_pair * n_tokens / 2
    speed = machine.card.flops if machine.card else machine.cpu_flops
    spent = {field.name: 0.0 for field in fields(Terms)}
    for at in range(0, n_tokens, n_chunk):
        n = min(n_chunk, n_tokens - at)
        last = n if n_wanted is None else min(n, n_wanted) if at + n == n_tokens else 0
        layers = np.full(max(sizes.n_layer, 1), sizes.distinct(n) if sizes.n_layer else 0.0)
        layers[-1] = min(layers[-1], sizes.distinct(last))
        used = float(layers.sum()) * sizes.expert
        busy = n * (flops + scores) / speed
        spent["dense"] += n * flops / speed
        spent["context"] += n * scores / speed
        if machine.card:
            copied = (1 - resident) * used / machine.link
            waited = max(copied - busy, 0.0) if engine.overlaps else copied
            spent["bus"] += waited
            spent["control"] += sizes.n_layer * engine.n_kernels * engine.s_kernel
        else:  # few tokens: what they read takes longer than what they compute
            waited = max((sizes.every + used) / machine.ram - busy, 0.0)
            spent["misses"] += waited
        before = n * (sizes.flops_every + scores) / speed / len(layers)
        spent["disk"] += _read_late(sizes, machine, layers, on_disk, (busy + waited) / len(layers), before)
    return Terms(**{name: seconds / n_tokens for name, seconds in spent.items()})


def _read_late(sizes: Sizes, machine: Machine, used: np.ndarray, on_disk: float, layer: float, before: float) -> float:
    """Seconds for which a chunk waits for the disk.  used: experts, by layer, of which this share has to be read.

    layer: seconds of computing each, of which `before` are over when its experts are known.  They are read from then
    on, while those that are there are computed; of many tokens, some of the next layer's are read before.
    """
    of_expert = sizes.expert / machine.disk
    late = 0.0
    for i, n in enumerate(used):
        ahead = i > 0 and used[i - 1] >= AHEAD_FROM * sizes.n_expert and i + 1 < len(used)
        early = min(before, MOST_AHEAD * of_expert) if ahead else 0.0
        late += max(on_disk * float(n) * of_expert - early - (layer - before), 0.0)
    return late


def idle_bytes(sizes: Sizes, machine: Machine, engine: Engine) -> float:
    """What the bus carries in a token's time while the CPU rests, if half of the experts are found in VRAM."""
    if machine.card is None:
        return 0.0
    idle = (sizes.every + sizes.output + sizes.used / 2) / machine.card.reads
    idle += sizes.n_layer * engine.n_kernels * engine.s_kernel
    return idle * machine.link


# --- what fits
RESERVE = 0.08  # of VRAM: the driver's own, a desktop, and what must never be over-committed
BUFFERS = 0.45 * GB  # k_b and v_b as floats, staging, what else is there once
ROW = 380_000  # bytes of a token in the buffers of a step: csrc/cuda/divide.c
N_CTX_USUAL = 32768  # positions that have their place in VRAM before slots do


RAM_RESERVE = 4 * GB  # of host memory: the system, the process, and what lies there beside experts


def places(sizes: Sizes, ram: float, *, card: bool, n_context: int) -> int:
    """How many experts fit into so many bytes of host memory; without a card, all else lies there, too."""
    left = ram - RAM_RESERVE - (0 if card else sizes.every + sizes.output + n_context * sizes.kv)
    return max(0, min(int(left // sizes.expert), sizes.n_layer * sizes.n_expert)) if sizes.expert else 0


def chunk(sizes: Sizes, vram: float) -> int:
    """Tokens of a prompt that are computed together, as csrc/cuda/divide.c chooses."""
    n, room = 2048, (1 - RESERVE) * vram - sizes.every - sizes.output - BUFFERS
    while sizes.experts > 0.75 * room and n < 8192 and 2 * n * ROW <= room / 10:
        n *= 2
    return n


def slots(sizes: Sizes, vram: float, n_context: int) -> int:
    """How many experts fit into so many bytes of VRAM, beside all that every token reads and the kv cache."""
    aside = chunk(sizes, vram) * ROW + max(n_context, N_CTX_USUAL) * sizes.kv
    left = (1 - RESERVE) * vram - sizes.every - sizes.output - BUFFERS - aside
    return max(0, min(int(left // sizes.expert), sizes.n_layer * sizes.n_expert)) if sizes.expert else 0
