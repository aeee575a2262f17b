"""What this machine does with a model of some shape: seconds of measuring, on a small model with the same rows.

    rates = calibrate(shape, tensors, most_bytes=1 << 30)

No weight of the file is read.  A few layers of its shape and its block types, with fewer experts and words, are made as
a file that is nearly all hole (zeros); only the norms and the router hold numbers, so that each row chooses other
experts.  Kernels take as long for zeros as for anything else.  What comes out is the speed of the engine itself, with
all that it spends between kernels, and so nearer to what a user will see than the peaks of the machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

import ms4
from ms4.models import clock
from ms4.models.mistral4 import NORMS

F32 = 0  # the id of the type
ALIGN = 4096
MOST_WORDS = 1024  # of the vocabulary: a prompt's rows are all multiplied with the output, so that no layer is skipped
MOST_LAYERS = 2
ROWS_OF_AN_EXPERT = 16  # that a prompt of 512 tokens brings to each of 128 experts
S_DECODE, S_PREFILL = 2.0, 3.0  # seconds for each
GROUPS = 20  # the best of so many counts, as others who use the machine can only make them slower

Feed = Callable[[ms4.Session, int, int], None]  # so many rows into the session, and so many logits


@dataclass(frozen=True)
class Rates:
    """ram: bytes of weights per second while tokens are written; flops: per second while prompts are read."""

    ram: float
    flops: float


def excerpt(shape: ms4.Shape, tensors: Sequence[ms4.Tensor], most_bytes: int) -> tuple[ms4.Shape, list[ms4.Tensor]]:
    """A model of the same rows and types in about most_bytes: at most MOST_LAYERS layers, fewer experts and words.

    Layers that differ in their types are taken before others.  Offsets count from 0 in one file.
    """
    layers = _layers(shape, tensors)
    chosen = [t for t in tensors if t.layer in (-1, *layers)]
    an_expert = sum(t.bytes // t.dims[2] for t in chosen if t.role.endswith("_exps"))
    n_expert = min(shape.n_expert, max(shape.n_expert_used, most_bytes // an_expert)) if an_expert else 0
    n_dense = sum(layer < shape.n_dense_layer for layer in layers)
    small = replace(
        shape,
        n_layer=len(layers),
        n_dense_layer=n_dense,
        n_expert=n_expert or shape.n_expert,
        n_vocab=min(shape.n_vocab, MOST_WORDS),
    )
    made, at = [], 0
    for t in chosen:
        t = _cut(t, small, layers)
        made.append(replace(t, file=0, offset=at))
        at += -(-t.bytes // ALIGN) * ALIGN
    return small, made


def _layers(shape: ms4.Shape, tensors: Sequence[ms4.Tensor]) -> list[int]:
    """Which layers stand for all: of those that have experts, if there are any, the commonest mixtures of types."""
    first = shape.n_dense_layer if shape.n_dense_layer < shape.n_layer else 0
    types: dict[int, list[tuple[str, int]]] = {}
    for t in tensors:
        if t.layer >= first:
            types.setdefault(t.layer, []).append((t.role, t.type))
    kinds = {layer: tuple(sorted(kind)) for layer, kind in types.items()}
    common = [kind for kind, _ in Counter(kinds.values()).most_common(MOST_LAYERS)]
    return sorted(next(layer for layer in sorted(kinds) if kinds[layer] == kind) for kind in common)


def _cut(t: ms4.Tensor, small: ms4.Shape, layers: list[int]) -> ms4.Tensor:
    """The tensor with as many experts and words as the small model has; norms and routers as floats."""
    columns, rows, parts = t.dims
    if t.role in ("token_embd", "output"):
        rows = small.n_vocab
    elif t.role == "ffn_gate_inp":
        rows = small.n_expert
    elif t.role.endswith("_exps"):
        parts = small.n_expert
    kind, n_bytes = t.type, t.bytes // (t.dims[1] * t.dims[2]) * rows * parts
    if t.role in NORMS or t.role == "ffn_gate_inp":
        kind, n_bytes = F32, 4 * columns * rows * parts
    layer = layers.index(t.layer) if t.layer >= 0 else -1
    scales = None if t.scales is None else t.scales[:parts]
    return replace(t, layer=layer, type=kind, bytes=n_bytes, dims=(columns, rows, parts), scales=scales)


def write(path: str | os.PathLike[str], tensors: Sequence[ms4.Tensor], seed: int = 0) -> None:
    """The file of an excerpt: ones in norms, random routers, and a hole for everything else."""
    drawn = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for t in tensors:
            n = t.dims[0] * t.dims[1] * t.dims[2]
            if t.role in NORMS:
                os.pwrite(file.fileno(), np.ones(n, np.float32).tobytes(), t.offset)
            elif t.role == "ffn_gate_inp":
                os.pwrite(file.fileno(), drawn.standard_normal(n).astype(np.float32).tobytes(), t.offset)
        file.truncate(max(t.offset + t.bytes for t in tensors))


def calibrate(shape: ms4.Shape, tensors: Sequence[ms4.Tensor], most_bytes: int, threads: int = 0) -> Rates:
    """The rates of this machine for such a model.  MemoryError, EngineError, OSError: it cannot be measured."""
    small, table = excerpt(shape, tensors, most_bytes)
    with tempfile.TemporaryDirectory(prefix="ms4-") as folder:
        path = os.path.join(folder, "excerpt")
        write(path, table)
        with ms4.Engine.open(small, table, [path], threads=threads, load="copy") as engine:
            return measure(engine, clock.sizes_of(small, table))


def measure(engine: ms4.Engine, sizes: clock.Sizes) -> Rates:
    """The rates of an open excerpt.  Rows of random numbers go in, in place of words."""
    shape, drawn = engine.shape, np.random.default_rng(1)
    share = shape.n_expert / shape.n_expert_used if sizes.expert else 32
    n_prompt = int(min(max(ROWS_OF_AN_EXPERT * share, 32), 512, shape.n_ctx_train))
    n_ctx = min(shape.n_ctx_train, 1024)

    def feed(session: ms4.Session, n: int, n_logits: int) -> None:
        rows = drawn.standard_normal((n, shape.d_model)).astype(np.float32)
        session.feed(np.full(n, ms4.ROW, np.int32), rows, n_logits=n_logits)

    with engine.session(n_ctx) as session:
        feed(session, 1, 1)  # what is made at the first use
        return Rates(_decode(engine, session, feed), _prefill(engine, session, feed, n_prompt, sizes))


def _decode(engine: ms4.Engine, session: ms4.Session, feed: Feed) -> float:
    """Bytes of weights per second: the best of GROUPS counts."""
    rates = []
    for _ in range(GROUPS):
        before, end = engine.stats(), time.monotonic() + S_DECODE / GROUPS
        while time.monotonic() < end or engine.stats().tokens_decode == before.tokens_decode:
            session.rewind(1)
            feed(session, 1, 1)
        after = engine.stats()
        rates.append((after.bytes_decode - before.bytes_decode) / (1e-9 * (after.ns_decode - before.ns_decode)))
    return max(rates)


def _prefill(engine: ms4.Engine, session: ms4.Session, feed: Feed, n: int, sizes: clock.Sizes) -> float:
    """Operations per second in prompts of n tokens: the best of as many as there is time for."""
    shape = engine.shape
    of_row = sizes.flops_every + sizes.n_layer * sizes.n_used * sizes.flops_expert + 2 * shape.n_vocab * shape.d_model
    flops = n * of_row + sizes.flops_pair * n * n / 2
    rates: list[float] = []
    end = time.monotonic() + S_PREFILL
    while not rates or (time.monotonic() < end and len(rates) < GROUPS):
        session.rewind(0)
        before = engine.stats()
        feed(session, n, n)
        rates.append(flops / (1e-9 * (engine.stats().ns_prefill - before.ns_prefill)))
    return max(rates)
