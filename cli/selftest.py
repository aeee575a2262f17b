"""`ms4 selftest --gpu`: is this card a yes or a no?  One block of text, to be pasted into an issue.

Small random models of every block type, one layer of the real model's shape, the demonstration checkpoint and its tower
(random ones, where those are not installed) are computed by the CPU and by the card, and every logit is compared to the
bit: prompts and single tokens, all, some and no experts on the card, experts that come and go meanwhile, host memory
that is not pinned, and the same step over and over.  Between them they run every kernel there is.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import ms4
from ms4.cli import errors, host, options, streams
from ms4.models.model import Model
from ms4.quant.blocks import BLOCKS
from ms4.quant.tiny import Tiny, write_tiny
from ms4.quant.tiny_tower import write_mmproj

SEED = 11
WIDE = Tiny(d_model=256, d_expert=256, d_dense=256, q_rank=256, kv_rank=256, d_nope=64, d_rope=64, d_value=128)
REAL = Tiny(
    n_layer=1, n_expert=8, n_used=4, d_model=4096, d_expert=2048, n_head=32, d_nope=64, d_rope=64, d_value=128,
    q_rank=1024, kv_rank=256, default_type="Q4_K", types={"attn_k_b": "Q8_0", "attn_v_b": "Q8_0"},
)  # fmt: skip
SPREAD = Tiny(n_layer=4, n_expert=64, n_used=4, d_model=256, d_expert=256, default_type="Q4_K")
WEIGHTY = Tiny(d_model=256, d_expert=1024)  # experts that many rows of a prompt want
PADDED = Tiny(n_layer=1, n_vocab=6000, n_unused=4600)  # so many logits that the highest are found in two launches
N_REPEATED = 50
N_ROUNDS = 4
MEASURED = 1 << 30  # bytes of host memory read to measure it


@dataclass(frozen=True)
class Verdict:
    name: str
    text: str
    good: bool
    made: bool = True  # False: it could not be compared, and the text says why


@dataclass(frozen=True)
class Files:
    """What is computed where a model of some depth is needed."""

    model: str
    tower: str


DEMO = Files(options.DEMO, options.DEMO.replace("ms4-demo.gguf", "ms4-demo-mmproj.gguf"))


@contextmanager
def chosen() -> Iterator[Files]:
    """The demonstration checkpoint, or in its place random weights."""
    if os.path.exists(DEMO.model) and os.path.exists(DEMO.tower):
        yield DEMO
        return
    with tempfile.TemporaryDirectory() as folder:
        files = Files(f"{folder}/model.gguf", f"{folder}/mmproj.gguf")
        write_tiny(files.model, SPREAD)
        write_mmproj(files.tower, layers=2, width=256, heads=4, out_width=SPREAD.d_model)
        yield files


@contextmanager
def opened(path: Path | str, **how: object) -> Iterator[tuple[Model, ms4.Session]]:
    with Model.open(path, **how) as model, model.session(min(512, model.shape.n_ctx_train)) as session:  # type: ignore[arg-type]
        yield model, session


def compare(name: str, want: np.ndarray, got: np.ndarray, more: str = "") -> Verdict:
    """Bits, but for NaN, of which there is more than one."""
    same = (want.view(np.uint32) == got.view(np.uint32)) | (np.isnan(want) & np.isnan(got))
    if same.all():
        return Verdict(name, f"{same.size} numbers, all bits equal{more}", True)
    row, column = np.argwhere(~same)[0]
    first = f"first in row {row}, column {column}: {want[row, column]!r} became {got[row, column]!r}"
    return Verdict(name, f"{np.count_nonzero(~same)} of {same.size} numbers differ, {first}{more}", False)


def answer(session: ms4.Session, n_prompt: int, n_vocab: int) -> np.ndarray:
    """The logits of a prompt, of a second piece behind it, and of three single tokens."""
    ids = np.random.default_rng(SEED).integers(0, n_vocab, n_prompt + 12)
    parts = [session.feed(ids[:n_prompt], all_logits=True), session.feed(ids[n_prompt : n_prompt + 9], all_logits=True)]
    return np.concatenate([*parts, *([session.feed([id])] for id in ids[-3:])])


def of_tiny(name: str, tiny: Tiny, n_prompt: int, device: str) -> Verdict:
    said = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "model.gguf", tiny)[0]
        for on in ("cpu", device):
            with opened(path, device=on) as (_, session):
                said.append(answer(session, n_prompt, tiny.n_vocab))
    return compare(name, said[0], said[1])


def of_highest(device: str) -> Verdict:
    """What steps bring home to those who want no other logits: of many rows, and of a single token."""
    ids, said = np.random.default_rng(SEED).integers(0, PADDED.n_vocab, 20), []
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "model.gguf", PADDED)[0]
        for on in ("cpu", device):
            with opened(path, device=on) as (model, session):
                rows = []
                for part in (ids[:-1], ids[-1:]):
                    span = ms4.Span(session, part, None, len(part), None, 40, model.vocabulary.n_used)
                    (found,) = model.engine.step([span])
                    if isinstance(found, ms4.EngineError):
                        raise found
                    assert isinstance(found, ms4.Highest)
                    rows.append(np.hstack([found.logits, found.ids.view(np.float32)]))
                said.append(np.concatenate(rows))
    return compare("the highest logits alone", said[0], said[1])


def of_places(name: str, share: float, device: str, files: Files) -> Verdict:
    """A share of the experts on the CPU, others each time."""
    random = np.random.default_rng(SEED)
    want: list[np.ndarray] = []
    got: list[np.ndarray] = []
    with opened(files.model) as (_, cpu), opened(files.model, device=device) as (model, gpu):
        for _ in range(3 if 0 < share < 1 else 1):
            place = random.random((model.shape.n_layer, model.shape.n_expert)) < share
            model.engine.place_experts(place.astype(np.uint8))
            for session, said in ((cpu, want), (gpu, got)):
                session.rewind(0)
                said.append(answer(session, 20, model.shape.n_vocab))
        stats = model.engine.stats()
    more = f"; {100 * stats.pairs_on_gpu / max(stats.experts_used, 1):.0f} % of their work done there"
    return compare(name, np.concatenate(want), np.concatenate(got), more)


def of_moves(device: str, files: Files) -> Verdict:
    """Little memory: experts come and go while tokens are computed."""
    said = []
    settings: tuple[dict[str, object], ...] = ({}, {"device": device, "vram": 24 << 20})
    for how in settings:
        with opened(files.model, **how) as (model, session):
            logits = [session.feed(np.arange(5, 45))]
            logits += [session.feed([int(np.argmax(logits[-1]))]) for _ in range(24)]
            said.append(np.stack(logits))
            stats = model.engine.stats()
    moved = f"; {stats.vram_slots} of {stats.experts} experts fit, {stats.uploads} were brought"
    return compare("few experts on the card", said[0], said[1], moved)


def of_streams(device: str) -> Verdict:
    """Copies beside the work: prompts bring experts for a layer, tokens of two sessions bring others to stay."""
    said = []
    settings: tuple[dict[str, object], ...] = ({}, {"device": device, "vram": 25 << 20})
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "model.gguf", WEIGHTY)[0]
        for how in settings:
            ids = np.random.default_rng(SEED).integers(0, WEIGHTY.n_vocab, (N_ROUNDS, 96))
            with opened(path, n_batch=128, **how) as (model, one), model.session(512) as two:
                logits = []
                for turn in ids:
                    one.rewind(0)
                    logits += [one.feed(turn[:80])]
                    for id in turn[80:]:
                        spans = [ms4.Span(session, np.array([id], np.int32)) for session in (one, two)]
                        logits += [row[0] for row in model.engine.step(spans) if isinstance(row, np.ndarray)]
                said.append(np.stack(logits))
                stats = model.engine.stats()
    moved = f"; {stats.uploads} experts brought to stay, {stats.bytes_streamed / 1e6:.0f} MB for prompts"
    return compare("copies beside the work", said[0], said[1], moved)


def of_disk(device: str) -> Verdict:
    """Prompts whose experts are read from the disk and go on to the card, out of few places and out of many."""
    said = []
    settings: tuple[dict[str, object], ...] = ({}, {"device": device, "vram": 25 << 20, "load": "stream"})
    ids = np.random.default_rng(SEED).integers(0, WEIGHTY.n_vocab, (N_ROUNDS, 80))
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "model.gguf", WEIGHTY)[0]
        for how in settings:
            with opened(path, n_batch=128, **how) as (model, session):
                for i, turn in enumerate(ids):
                    if how:
                        model.engine.fix_slots(1 if i % 2 else 1 << 30)
                    session.rewind(0)
                    said.append(session.feed(turn))
                stats = model.engine.stats()
    half = len(said) // 2
    more = f"; {stats.bytes_disk / 1e6:.0f} MB read, {stats.bytes_streamed / 1e6:.0f} MB brought"
    return compare("experts from the disk", np.stack(said[:half]), np.stack(said[half:]), more)


def of_unpinned(device: str, files: Files) -> Verdict:
    """As where the system pins no memory."""
    said = []
    settings: tuple[dict[str, object], ...] = ({}, {"device": device, "pinned": False})
    for how in settings:
        with opened(files.model, **how) as (model, session):
            said.append(answer(session, 40, model.shape.n_vocab))
            stats = model.engine.stats()
    more = f"; {stats.unpinned_bytes / 1e6:.0f} MB refused, {stats.pinned_bytes / 1e6:.0f} MB pinned"
    return compare("memory that is not pinned", said[0], said[1], more)


def of_tower(device: str, files: Files = DEMO) -> Verdict:
    from ms4.models.pixtral import Tower

    tower, rows = Tower.read(files.tower), []
    pixels = np.random.default_rng(SEED).normal(size=(3, 56, 112)).astype(np.float32)
    for on in ("cpu", device):
        with opened(files.model, device=on) as (model, _):
            rows.append(model.engine.vision(tower.shape, tower.tensors, tower.path).encode(pixels))
    return compare("vision tower", rows[0], rows[1])


def of_repeats(device: str, files: Files) -> Verdict:
    """The same step over and over: what depends on time would show sooner or later.  Who watches the router waits for a
    flag of the card in every layer, and who does not, for none."""
    with opened(files.model, device=device) as (model, session):
        session.feed(np.arange(5, 45))
        said = []
        for i in range(N_REPEATED):
            model.engine.watch((lambda layer, ids: None) if i % 2 else None)
            said.append(session.feed([7]))
            session.rewind(40)
    return compare(f"one token {N_REPEATED} times", np.repeat(said[:1], N_REPEATED, axis=0), np.stack(said))


def checks(device: str, files: Files) -> list[tuple[str, Callable[[], Verdict]]]:
    """What is compared, by names for the case that it cannot be."""
    kinds = [kind for kind, _, _ in BLOCKS.values()]
    tiny = {f"all weights {kind}": (replace(WIDE, default_type=kind), 24) for kind in kinds}
    tiny |= {"odd shapes, two segments": (Tiny(), 150), "one layer of the real shape": (REAL, 16)}
    places = {"all experts on the card": 0.0, "half of the experts on the card": 0.5, "no experts on the card": 1.0}
    return [
        *((name, partial(of_tiny, name, *what, device)) for name, what in tiny.items()),
        ("the highest logits alone", partial(of_highest, device)),
        ("vision tower", partial(of_tower, device, files)),
        *((name, partial(of_places, name, share, device, files)) for name, share in places.items()),
        ("few experts on the card", partial(of_moves, device, files)),
        ("copies beside the work", partial(of_streams, device)),
        ("experts from the disk", partial(of_disk, device)),
        ("memory that is not pinned", partial(of_unpinned, device, files)),
        ("the same token again", partial(of_repeats, device, files)),
    ]


def run(name: str, check: Callable[[], Verdict]) -> Verdict:
    """A check that cannot be made is a bad one, with the reason."""
    try:
        return check()
    except (ms4.EngineError, MemoryError) as error:
        return Verdict(name, str(error), False, made=False)


def about() -> str:
    gpu = ms4.gpu()
    link = host.link(gpu.bus)
    bus = f", {link}" if link else ""
    return (
        f"ms4 {ms4.__version__}, Python {platform.python_version()}, {platform.machine()}, {host.processor()}\n"
        f"{gpu.name}, {gpu.capability}, {gpu.n_multiprocessors} multiprocessors, {gpu.total >> 20} MiB{bus}, "
        f"driver for CUDA {gpu.driver}"
    )


def rates(device: str, files: Files) -> str:
    """What the card and its bus do: bytes per second, and what a layer costs in which there is little to compute."""
    with opened(files.model, device=device) as (model, session):
        limits = model.engine.measure(MEASURED)
        session.feed(np.arange(5, 45))
        times = []
        for _ in range(N_REPEATED):
            begun = time.perf_counter()
            session.feed([7])
            times.append(time.perf_counter() - begun)
            session.rewind(40)
    names = {"GPU memory": limits.vram_bytes_per_s, "bus": limits.bus_bytes_per_s, "memory": limits.read_bytes_per_s}
    parts = [f"{name} {value / 1e9:.1f} GB/s" for name, value in names.items()]
    return ", ".join([*parts, f"a small layer {1e6 * statistics.median(times) / model.shape.n_layer:.0f} us"])


def selftest(safe: bool) -> int:
    """Prints what was compared, as it comes; exit code 1 if anything differs."""
    device, begun, bad, n = "cuda:safe" if safe else "cuda", time.monotonic(), 0, 0
    output = streams.Output()
    output.write(about() + "\n")
    with chosen() as files:
        if files != DEMO:
            output.write("without the demonstration checkpoint, which is not installed: random weights in its place\n")
        unmade = 0  # in a row
        for name, check in checks(device, files):
            verdict = run(name, check)
            unmade = 0 if verdict.made else unmade + 1
            n, bad = n + 1, bad + (not verdict.good)
            output.write(f"{'ok ' if verdict.good else 'BAD'} {verdict.name}: {verdict.text}\n")
            if unmade == 2:
                output.write("the others are left out\n")
                break
        if not bad:
            output.write(f"{rates(device, files)}\n")
    output.write(f"{n - bad} of {n} have the bits of the CPU ({ms4.probe().isa}), {time.monotonic() - begun:.0f} s\n")
    if bad and not safe:
        output.write("ms4 selftest --gpu --safe waits for every call, so that a failure names the call that failed\n")
    return errors.FAILURE if bad else errors.OK
