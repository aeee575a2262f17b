"""`ms4 bench`: how fast the model reads (prefill) and writes (decode), and which limit of the machine that is near to.

The limits are bytes per second when the weights are just read in order, and 8-bit multiply-adds per second in
registers.  On shared machines they change by the second, so they are measured before and after every repetition of a
phase, and its shares are of their mean.  The tokens are random, so no tokenizer is needed and the experts are spread
as evenly as the router allows.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

import ms4
from ms4.cli import errors, loading, render, streams
from ms4.cli.errors import UsageError
from ms4.cli.options import EngineOptions
from ms4.models.mistral4 import macs_per_token

if TYPE_CHECKING:
    from ms4.models.model import Model

SEED = 4
MOST_MEASURED = 1 << 33  # bytes of the weights read to measure the bandwidth
ON_CARD = "GPU arithmetic, launches or waits"  # of which none is measured
NEAR = 0.25  # below this share of both limits, neither of them is what holds the phase back


@dataclass(frozen=True)
class Plan:
    n_prefill: int
    n_decode: int
    repeat: int
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One phase at one depth.  The shares of the limits are medians of the repetitions; `bottleneck` names the nearer
    limit, if one is near."""

    phase: str
    depth: int
    n_tokens: int
    best_tokens_per_s: float
    median_tokens_per_s: float
    bytes_per_token: float
    macs_per_token: float
    share_of_read_bandwidth: float
    share_of_int8_peak: float
    share_of_experts_in_memory: float  # of those that were needed, when they were
    disk_bytes_per_token: float
    share_waited_for_disk: float  # of the time
    share_of_vram_bandwidth: float
    share_of_bus: float  # to the GPU
    share_of_experts_on_gpu: float  # of their work
    bottleneck: str


def bench(plan: Plan, engine: EngineOptions, form: str) -> int:
    from ms4.models.interrupt import interruptible

    engine.require()
    status = render.StatusLine(engine.quiet)
    n_ctx = max(plan.depths) + plan.n_prefill + plan.n_decode
    with loading.open_model(engine, status, n_tokens=n_ctx) as model:
        shape = model.engine.shape
        if n_ctx > shape.n_ctx_train:
            raise UsageError(f"depth, --pp and --tg need {n_ctx} positions; the model has {shape.n_ctx_train}")
        rows: list[Row] = []
        limits: list[ms4.Limits] = []
        with model.session(n_ctx) as session, interruptible() as stop:
            for depth in plan.depths:
                status.show(f"depth {depth}")
                rows += measure_depth(plan, depth, model, session, limits, stop)
        status.clear()
        show(about(model, engine.require()), rows, combined(limits, statistics.median), form)
    return errors.OK


def combined(limits: list[ms4.Limits], how: Callable[[list[float]], float]) -> ms4.Limits:
    return ms4.Limits(*(how([getattr(each, name) for each in limits]) for name in asdict(limits[0])))


@dataclass(frozen=True)
class Disk:
    """What experts that stay on the disk cost; nothing where none do."""

    wanted: int = 0
    there: int = 0
    n_bytes: int = 0
    ns_waited: int = 0

    @classmethod
    def between(cls, before: ms4.Stats, after: ms4.Stats) -> "Disk":
        names = ("experts_wanted", "experts_there", "bytes_disk", "ns_waited")
        return cls(*(getattr(after, name) - getattr(before, name) for name in names))


@dataclass(frozen=True)
class Card:
    """What a GPU read in its own memory, what was brought to it, and its part of the experts' work; nothing without."""

    n_bytes: int = 0
    brought: int = 0
    pairs: int = 0
    of_pairs: int = 0

    @classmethod
    def between(cls, before: ms4.Stats, after: ms4.Stats) -> "Card":
        def passed(name: str) -> int:
            return int(getattr(after, name) - getattr(before, name))

        brought = passed("bytes_uploaded") + passed("bytes_streamed")
        return cls(passed("bytes_on_gpu"), brought, passed("pairs_on_gpu"), passed("experts_used"))


@dataclass(frozen=True)
class Timing:
    """One repetition of a phase, and the limits of the machine around it."""

    seconds: float
    n_bytes: int  # of weights that it read
    limits: ms4.Limits
    disk: Disk = Disk()
    card: Card = Card()


def measure_depth(
    plan: Plan, depth: int, model: "Model", session: ms4.Session, limits: list[ms4.Limits], stop: ms4.StopFlag
) -> list[Row]:
    """Both phases after `depth` positions: one uncounted round to warm up, then `repeat` counted ones.

    As for an answer, a prefill gives the logits after its last position, and a decode those of each.  The limits that
    it measured are added to `limits`.
    """
    random = np.random.default_rng(SEED)
    shape = model.engine.shape

    def ids(n: int) -> np.ndarray:
        return random.integers(0, shape.n_vocab, n, np.int32)

    def timed(work: Callable[[], object]) -> Timing:
        session.rewind(depth)
        before = model.engine.stats()
        begun = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun
        after = model.engine.stats()
        limits.append(model.engine.measure(MOST_MEASURED))
        n_bytes = bytes_read(after) - bytes_read(before)
        around = combined(limits[-2:], statistics.mean)
        return Timing(seconds, n_bytes, around, Disk.between(before, after), Card.between(before, after))

    def prefill() -> None:
        session.feed(ids(plan.n_prefill), stop=stop)

    def decode() -> None:
        for id in ids(plan.n_decode):
            session.feed([id], stop=stop)

    session.rewind(0)
    if depth:
        session.feed(ids(depth), n_logits=0, stop=stop)
    limits.append(model.engine.measure(MOST_MEASURED))
    rounds = [(timed(prefill), timed(decode)) for _ in range(plan.repeat + 1)]
    prefills, decodes = zip(*rounds[1:], strict=True)
    head = shape.n_vocab * shape.d_model
    return [
        phase_row("prefill", depth, plan.n_prefill, prefills, macs_per_token(shape, 1 - 1 / plan.n_prefill)),
        phase_row("decode", depth, plan.n_decode, decodes, macs_per_token(shape) + head),
    ]


def bytes_read(stats: ms4.Stats) -> int:
    """Of the weights, since the model was opened."""
    return stats.bytes_prefill + stats.bytes_decode


def disk_columns(n: int, timings: tuple[Timing, ...]) -> tuple[float, float, float]:
    """Medians: the share of experts that was there, bytes read from the disk per token, the share of time waited."""
    there = statistics.median(t.disk.there / t.disk.wanted if t.disk.wanted else 1.0 for t in timings)
    waited = statistics.median(t.disk.ns_waited / 1e9 / t.seconds for t in timings)
    return there, statistics.median(t.disk.n_bytes for t in timings) / n, waited


def card_columns(timings: tuple[Timing, ...]) -> tuple[float, float, float]:
    """Medians: the shares of the bandwidths of the GPU's memory and of the bus, and its share of the experts' work."""
    timings = tuple(t for t in timings if t.limits.vram_bytes_per_s and t.limits.bus_bytes_per_s)
    if not timings:  # there is none, or no room on it to measure
        return 0.0, 0.0, 0.0
    vram = statistics.median(t.card.n_bytes / t.seconds / t.limits.vram_bytes_per_s for t in timings)
    bus = statistics.median(t.card.brought / t.seconds / t.limits.bus_bytes_per_s for t in timings)
    return vram, bus, statistics.median(t.card.pairs / max(t.card.of_pairs, 1) for t in timings)


def phase_row(phase: str, depth: int, n: int, timings: tuple[Timing, ...], macs: float) -> Row:
    rates = [n / t.seconds for t in timings]
    n_bytes = statistics.mean(t.n_bytes for t in timings) / n
    read = statistics.median((t.n_bytes - t.card.n_bytes) / t.seconds / t.limits.read_bytes_per_s for t in timings)
    int8 = statistics.median(n * macs / t.seconds / t.limits.int8_macs_per_s for t in timings)
    disk, card = disk_columns(n, timings), card_columns(timings)
    on_card = any(t.card.n_bytes for t in timings)
    if on_card:
        int8 = 0.0  # the peak is the CPU's, which did some of the work or none
    near = {"memory bandwidth": read, "int8 arithmetic": int8, "GPU memory": card[0], "bus": card[1]}
    name = max(near, key=lambda each: near[each])
    if near[name] < NEAR:
        name = ON_CARD if on_card else "attention or overhead"
    if disk[-1] > NEAR:
        name = "disk"
    return Row(phase, depth, n, max(rates), statistics.median(rates), n_bytes, macs, read, int8, *disk, *card, name)


def about(model: "Model", path: str) -> dict[str, object]:
    """What stands above the rows: the file, and who computes it."""
    stats = model.engine.stats()
    return {
        "model": os.path.basename(path),
        "version": ms4.__version__,
        "device": stats.device,
        "isa": stats.isa,
        "threads": stats.n_threads,
        "load": stats.load,
    }


def show(about: dict[str, object], rows: list[Row], limits: ms4.Limits, form: str) -> None:
    output = streams.Output()
    if form == "json":
        output.write(json.dumps({**about, **asdict(limits), "rows": [asdict(row) for row in rows]}) + "\n")
    elif form == "csv":
        names = list(asdict(rows[0]))
        output.write(",".join([*about, *asdict(limits), *names]) + "\n")
        for row in rows:
            values = [*about.values(), *asdict(limits).values(), *asdict(row).values()]
            output.write(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n")
    else:
        output.write(table(about, rows, limits))


def gpu_limits(limits: ms4.Limits) -> str:
    return f"GPU: {limits.vram_bytes_per_s / 1e9:.0f} GB/s its memory, {limits.bus_bytes_per_s / 1e9:.1f} GB/s to it"


def table(about: dict[str, object], rows: list[Row], limits: ms4.Limits) -> str:
    """A Markdown table, with the machine above it."""
    lines = [
        "{model}: ms4 {version}, {device}, {isa}, {threads} threads, weights: {load}".format(**about),
        f"limits: {limits.read_bytes_per_s / 1e9:.1f} GB/s read, {limits.int8_macs_per_s / 1e9:.0f} G int8 MAC/s",
        *([gpu_limits(limits)] if limits.vram_bytes_per_s else []),
        "",
        "| phase | depth | tokens | best tok/s | median tok/s | MB/token | of bandwidth | of int8 | nearest limit |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        shares = f"{100 * r.share_of_read_bandwidth:.0f} % | {100 * r.share_of_int8_peak:.0f} %"
        speeds = f"{r.best_tokens_per_s:.2f} | {r.median_tokens_per_s:.2f} | {r.bytes_per_token / 1e6:.2f}"
        if r.disk_bytes_per_token:
            shares += f" (experts: {100 * r.share_of_experts_in_memory:.0f} % in memory, "
            shares += f"{r.disk_bytes_per_token / 1e6:.0f} MB/token from the disk)"
        if r.share_of_vram_bandwidth:
            shares += f" (GPU: {100 * r.share_of_vram_bandwidth:.0f} % of its memory's bandwidth, "
            shares += (
                f"{100 * r.share_of_bus:.0f} % of the bus, {100 * r.share_of_experts_on_gpu:.0f} % of the experts)"
            )
        lines.append(f"| {r.phase} | {r.depth} | {r.n_tokens} | {speeds} | {shares} | {r.bottleneck} |")
    return "\n".join(lines) + "\n"
