"""`ms4 bench --image`: how long the vision tower takes for an image, with how much memory, and how near to the peak.

The pixels are random.  Memory is what the process holds besides the pages of files, at most, above what it held with
the model and the tower open: the weights lie in the files' pages.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import ms4
from ms4.cli import bench as text_bench
from ms4.cli import errors, host, loading, render, streams
from ms4.cli.image_notes import ImageOptions, encoding
from ms4.cli.options import EngineOptions
from ms4.models.image import grid
from ms4.models.interrupt import interruptible
from ms4.models.pixtral import Tower, encode_macs
from ms4.models.vision import VisionEncoder

PERIOD = 0.01  # seconds between two looks at the memory


@dataclass(frozen=True)
class Result:
    """One size of image; GFLOP/s counts a multiply-add as two."""

    width: int
    height: int
    n_patches: int
    n_tokens: int
    best_seconds: float
    median_seconds: float
    peak_bytes: int
    macs: int
    gflop_per_s: float
    share_of_float_peak: float


@dataclass
class Peak:
    """The most memory seen, above that at the beginning."""

    bytes: int = 0


@contextmanager
def watched_memory() -> Iterator[Peak]:
    peak, over, before = Peak(), threading.Event(), host.own_memory()

    def look() -> None:
        while not over.wait(PERIOD):
            peak.bytes = max(peak.bytes, host.own_memory() - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def bench(size: tuple[int, int], repeat: int, mmproj: str | None, engine: EngineOptions, form: str) -> int:
    status = render.StatusLine(engine.quiet)
    tower = ImageOptions(mmproj).open(engine.require()).tower
    with loading.open_model(engine, status) as model:
        encoder = VisionEncoder(model.engine, tower)
        before = model.engine.measure(text_bench.MOST_MEASURED)
        found = measure(encoder, tower, size, repeat, status)
        limits = text_bench.combined([before, model.engine.measure(text_bench.MOST_MEASURED)], max)
        peak = 2 * limits.float_macs_per_s / 1e9
        result = Result(**{**asdict(found), "share_of_float_peak": found.gflop_per_s / peak})
        stats = model.engine.stats()
    about = {
        "mmproj": os.path.basename(tower.path),
        "version": ms4.__version__,
        "device": stats.device,
        "isa": stats.isa,
        "threads": stats.n_threads,
        "float_peak_gflop_per_s": peak,
    }
    streams.Output().write(shown(about, result, form))
    return errors.OK


def measure(
    encoder: VisionEncoder, tower: Tower, size: tuple[int, int], repeat: int, status: render.StatusLine
) -> Result:
    """One small image to bring the weights into memory, then `repeat` of the wanted size."""
    cell = tower.rule.cell
    columns, rows = grid(*size, None, tower.rule)
    random = np.random.default_rng(text_bench.SEED)
    seconds: list[float] = []
    with interruptible() as stop:
        encoder.vision.encode(random.standard_normal((3, cell, cell), np.float32), stop)
        with watched_memory() as peak:
            pixels = random.standard_normal((3, rows * cell, columns * cell), np.float32)
            for _ in range(repeat):
                begun = time.perf_counter()
                with status.watching(encoding(f"{columns * cell}x{rows * cell}", encoder.vision.progress)):
                    encoder.vision.encode(pixels, stop)
                seconds.append(time.perf_counter() - begun)
    macs = encode_macs(tower, columns * rows)
    return Result(
        width=columns * cell,
        height=rows * cell,
        n_patches=columns * rows * tower.shape.merge**2,
        n_tokens=(columns + 1) * rows,
        best_seconds=min(seconds),
        median_seconds=statistics.median(seconds),
        peak_bytes=peak.bytes,
        macs=macs,
        gflop_per_s=2 * macs / min(seconds) / 1e9,
        share_of_float_peak=0.0,
    )


def shown(about: dict[str, Any], r: Result, form: str) -> str:
    """The result as JSON, as CSV or as a Markdown table with the machine above it."""
    if form == "json":
        return json.dumps({**about, **asdict(r)}) + "\n"
    if form == "csv":
        values = {**about, **asdict(r)}
        line = ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values.values())
        return ",".join(values) + "\n" + line + "\n"
    head = "{mmproj}: ms4 {version}, {isa}, {threads} threads; float peak {float_peak_gflop_per_s:.0f} GFLOP/s"
    lines = [
        head.format(**about),
        "",
        "| image | patches | tokens | best s | median s | peak memory | GFLOP/s | of float peak |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        f"| {r.width}x{r.height} | {r.n_patches} | {r.n_tokens} | {r.best_seconds:.2f} | {r.median_seconds:.2f} | "
        f"{render.gigabytes(r.peak_bytes)} | {r.gflop_per_s:.1f} | {100 * r.share_of_float_peak:.0f} % |",
    ]
    return "\n".join(lines) + "\n"
