"""`ms4 selftest --gpu`: is this card a yes or a no?  One block of text, to be pasted into an issue.

Small random models of every block type, one layer of the real model's shape, the demonstration checkpoint and its tower
are computed by the CPU and by the card, and every logit is compared to the bit: prompts and single tokens, all, some
and few experts on the card, and the same step over and over.  Between them they run every kernel there is.
"""

import os
import platform
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
from ms4.cli.errors import MissingError
from ms4.models.model import Model
from ms4.quant.blocks import BLOCKS
from ms4.quant.tiny import Tiny, write_tiny

SEED = 11
WIDE = Tiny(d_model=256, d_expert=256, d_dense=256, q_rank=256, kv_rank=256, d_nope=64, d_rope=64, d_value=128)
REAL = Tiny(
    n_layer=1, n_expert=8, n_used=4, d_model=4096, d_expert=2048, n_head=32, d_nope=64, d_rope=64, d_value=128,
    q_rank=1024, kv_rank=256, default_type="Q4_K", types={"attn_k_b": "Q8_0", "attn_v_b": "Q8_0"},
)  # fmt: skip
N_REPEATED = 50
MEASURED = 1 << 30  # bytes of host memory read to measure it


@dataclass(frozen=True)
class Verdict:
    name: str
    text: str
    good: bool


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


def of_places(device: str) -> Verdict:
    """Half of the experts on the CPU, others each time."""
    random = np.random.default_rng(SEED)
    want: list[np.ndarray] = []
    got: list[np.ndarray] = []
    with opened(options.DEMO) as (_, cpu), opened(options.DEMO, device=device) as (model, gpu):
        for _ in range(3):
            place = random.integers(0, 2, (model.shape.n_layer, model.shape.n_expert)).astype(np.uint8)
            model.engine.place_experts(place)
            for session, said in ((cpu, want), (gpu, got)):
                session.rewind(0)
                said.append(answer(session, 20, model.shape.n_vocab))
    return compare("half of the experts on the card", np.concatenate(want), np.concatenate(got))


def of_moves(device: str) -> Verdict:
    """Little memory: experts come and go while tokens are computed."""
    said = []
    settings: tuple[dict[str, object], ...] = ({}, {"device": device, "vram": 24 << 20})
    for how in settings:
        with opened(options.DEMO, **how) as (model, session):
            logits = [session.feed(np.arange(5, 45))]
            logits += [session.feed([int(np.argmax(logits[-1]))]) for _ in range(24)]
            said.append(np.stack(logits))
            stats = model.engine.stats()
    moved = f"; {stats.vram_slots} of {stats.experts} experts fit, {stats.uploads} were brought"
    return compare("few experts on the card", said[0], said[1], moved)


def of_tower(device: str) -> Verdict:
    from ms4.models.pixtral import Tower

    tower, rows = Tower.read(options.DEMO.replace("ms4-demo.gguf", "ms4-demo-mmproj.gguf")), []
    pixels = np.random.default_rng(SEED).normal(size=(3, 56, 112)).astype(np.float32)
    for on in ("cpu", device):
        with opened(options.DEMO, device=on) as (model, _):
            rows.append(model.engine.vision(tower.shape, tower.tensors, tower.path).encode(pixels))
    return compare("vision tower", rows[0], rows[1])


def of_repeats(device: str) -> Verdict:
    """The same step over and over: what depends on time would show sooner or later."""
    with opened(options.DEMO, device=device) as (_, session):
        session.feed(np.arange(5, 45))
        said = []
        for _ in range(N_REPEATED):
            said.append(session.feed([7]))
            session.rewind(40)
    return compare(f"one token {N_REPEATED} times", np.repeat(said[:1], N_REPEATED, axis=0), np.stack(said))


def checks(device: str) -> list[Callable[[], Verdict]]:
    kinds = [kind for kind, _, _ in BLOCKS.values()]
    return [
        *(partial(of_tiny, f"all weights {kind}", replace(WIDE, default_type=kind), 24, device) for kind in kinds),
        partial(of_tiny, "odd shapes, two segments", Tiny(), 150, device),
        partial(of_tiny, "one layer of the real shape", REAL, 16, device),
        *(partial(check, device) for check in (of_tower, of_places, of_moves, of_repeats)),
    ]


def about() -> str:
    gpu = ms4.gpu()
    link = host.link(gpu.bus)
    bus = f", {link}" if link else ""
    return (
        f"ms4 {ms4.__version__}, Python {platform.python_version()}, {platform.machine()}, {host.processor()}\n"
        f"{gpu.name}, {gpu.capability}, {gpu.n_multiprocessors} multiprocessors, {gpu.total >> 20} MiB{bus}, "
        f"driver for CUDA {gpu.driver}"
    )


def rates(device: str) -> str:
    with opened(options.DEMO, device=device) as (model, _):
        limits = model.engine.measure(MEASURED)
    names = {"GPU memory": limits.vram_bytes_per_s, "bus": limits.bus_bytes_per_s, "memory": limits.read_bytes_per_s}
    return ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in names.items())


def selftest(safe: bool) -> int:
    """Prints what was compared, as it comes; exit code 1 if anything differs."""
    if not os.path.exists(options.DEMO):
        raise MissingError("the demonstration checkpoint is not installed", "install ms4 anew")
    device, begun, bad, n = "cuda:safe" if safe else "cuda", time.monotonic(), 0, 0
    output = streams.Output()
    output.write(about() + "\n")
    for check in checks(device):
        verdict = check()
        n, bad = n + 1, bad + (not verdict.good)
        output.write(f"{'ok ' if verdict.good else 'BAD'} {verdict.name}: {verdict.text}\n")
    output.write(f"{rates(device)}\n")
    output.write(f"{n - bad} of {n} have the bits of the CPU ({ms4.probe().isa}), {time.monotonic() - begun:.0f} s\n")
    return errors.FAILURE if bad else errors.OK
