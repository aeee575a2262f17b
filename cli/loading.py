"""Opens a model for a command: progress on a terminal, Ctrl-C at any moment, the context checked.

The opening runs in a thread of its own, so that a signal is answered at once even while a cold disk is read.
"""

import os
import shlex
import threading
import time
from typing import TYPE_CHECKING

import ms4
from ms4.cli import card, errors, expected, options, render, state
from ms4.cli.errors import INTERRUPTED, UsageError
from ms4.cli.options import N_CTX_DEFAULT, AtMost, EngineOptions
from ms4.cli.render import StatusLine

if TYPE_CHECKING:
    from ms4.models.model import Model
    from ms4.models.tokenizer import Tokenizer
    from ms4.models.vocabulary import Vocabulary
    from ms4.quant.gguf_file import GgufFile

LOADED = {"map": "used where the file lies in memory", "copy": "copied into memory", "stream": "experts on the disk"}
GRACE = 0.5  # seconds that an interrupted opening has to end by itself
DEMO_NOTE = "the demonstration model answers, a toy; -m FILE names a real one"


def name_demo(path: str, quiet: bool) -> None:
    """Says so, if this is the checkpoint that comes with ms4: nobody shall take it for the real one.  Once a day."""
    if path == options.DEMO and not quiet and state.first_today("demo-noted"):
        errors.note(DEMO_NOTE)


def name_size(gguf: "GgufFile", path: str) -> None:
    """Says so, if the file is larger than the memory that there is for it."""
    size, room = sum(gguf.sizes), ms4.allowed().room
    if room is not None and size > room:
        there = f"{render.gigabytes(size)} of weights, {render.gigabytes(room)} of memory free"
        advice = f"ms4 doctor -m {shlex.quote(path[-80:])} says what helps"
        errors.note(f"{there}: what does not fit is read from the disk again and again, which is slow; {advice}")


def name_disk(model: "Model", engine: EngineOptions) -> None:
    """Says so, if weights have stayed on the disk: that is slower than what fits."""
    stats = model.engine.stats()
    if stats.load == "map" and engine.load == "auto":
        name_size(model.gguf, model.gguf.path)
    if not stats.slot_bytes_most:
        return
    n_bytes = sum(t.bytes for name, t in model.gguf.tensors.items() if "_exps." in name)
    share = min(100 * stats.slot_bytes_most // n_bytes, 100)
    through = "" if stats.direct else "; this file system reads through the page cache"
    errors.note(
        f"of {render.gigabytes(stats.ram)} of memory {render.gigabytes(stats.slot_bytes_most)} are left for experts, "
        f"{share} % of them: the others are read from the disk when they are needed{through}"
    )


def warm(model: "Model") -> None:
    """Of experts that move, from the disk or to a GPU, brings those that earlier calls used most; at the end, keeps
    what was used."""
    stats = model.engine.stats()
    if not stats.slot_bytes_most and stats.vram_slots == stats.experts:
        return
    path = state.uses_path(model.gguf.path)
    try:
        model.engine.warm(path.read_bytes())
    except (OSError, ms4.EngineError):  # none, or of another file that had this name
        pass

    def keep() -> None:
        if uses := model.engine.uses():  # none, if the GPU has been left
            state.keep(path, uses)
            card.keep(model.engine.stats())

    model.at_close = keep


def name_notes(model: "Model") -> None:
    """-v: what was passed over in the file, and how it was opened."""
    for text in (*model.gguf.warnings, *model.vocabulary.notes):
        errors.note(text)
    stats = model.engine.stats()
    kernels = f"{stats.isa} kernels, {stats.n_threads} threads"
    errors.note(f"{model.gguf.path[-80:]}: weights {LOADED[stats.load]}; {kernels}")
    if stats.device != "cpu":
        errors.note(card.line(stats))


def open_model(engine: EngineOptions, status: StatusLine, n_batch: int = 0, n_tokens: int = expected.SHORT) -> "Model":
    """The opened model, with room for n_tokens of context beside it, of all sessions together.

    Ctrl-C raises KeyboardInterrupt, or ends the process if the opening does not stop.
    """
    path = engine.require()
    name_demo(path, engine.quiet)
    from ms4.models.model import Model

    stop = threading.Event()
    opened: list[Model] = []
    failed: list[BaseException] = []
    begun = time.monotonic()

    def progress(done: int, total: int) -> bool:
        if time.monotonic() - begun > 0.3:
            share = 100 * done // max(total, 1)
            status.show(f"loading {share} %  {render.gigabytes(done)} of {render.gigabytes(total)}")
        return stop.is_set()

    def work() -> None:
        try:
            opened.append(
                Model.open(
                    path,
                    attn_scale=engine.attn_scale,
                    threads=engine.threads or 0,
                    load=engine.load,
                    n_batch=n_batch,
                    ram=engine.ram or 0,
                    device=engine.device,
                    vram=engine.vram or 0,
                    progress=progress,
                    seen=lambda gguf: look(gguf, engine, path, n_tokens),
                    said=errors.note,
                )
            )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(1.0)
    except KeyboardInterrupt:
        stop.set()
        thread.join(GRACE)
        if thread.is_alive():  # stuck in a read: nothing has been computed yet that could be lost
            status.clear()
            os._exit(INTERRUPTED)
        raise
    finally:
        status.clear()
    if failed:
        raise failed[0]
    begin(opened[0], engine, status)
    return opened[0]


def look(gguf: "GgufFile", engine: EngineOptions, path: str, n_tokens: int) -> str:
    """With a header alone: how the weights are to be loaded.  Refuses what has no room, and says that of what has
    little."""
    load = expected.chosen(gguf, engine, n_tokens)
    if engine.load == "map" and not engine.quiet:
        name_size(gguf, path)
    return load


def begin(model: "Model", engine: EngineOptions, status: StatusLine) -> None:
    """With a model that is open: says where its weights are, and has the hot experts brought."""
    if engine.verbose:
        name_notes(model)
    if not engine.quiet:
        name_disk(model, engine)
        expected.note_before(model)
        if note := model.engine.stats().note:
            errors.note(note)
    warm(model)
    status.also = lambda: render.waiting(model.engine.stats())


def context_for(model: "Model", n_ctx: int) -> int:
    """The size of the kv cache: what was asked for, unless the model allows less."""
    return context_within(model.engine.shape.n_ctx_train, n_ctx)


def context_within(most: int, n_ctx: int) -> int:
    """The same, of a model that allows `most`."""
    if n_ctx > most and n_ctx != N_CTX_DEFAULT and not isinstance(n_ctx, AtMost):
        raise UsageError(f"--ctx {n_ctx}: the model allows at most {most} tokens")
    return min(n_ctx, most)


def more_context(n_ctx: int, most: int) -> str:
    """What to do about a context that is full; most: tokens that the model allows."""
    return "--ctx allows more" if n_ctx < most else "the model itself holds no more"


def usable(vocabulary: "Vocabulary") -> "Tokenizer":
    """The tokenizer of a vocabulary that text can be made of."""
    from ms4.models.tokenizer import Tokenizer

    vocabulary.require_text()
    return Tokenizer(vocabulary)


def open_tokenizer(path: str) -> "Tokenizer":
    """The tokenizer of a model file; its weights, if it has any, stay closed.  No model answers, so none is named."""
    from ms4.models.vocabulary import Vocabulary
    from ms4.quant.gguf_file import GgufFile

    return usable(Vocabulary.from_gguf(GgufFile.open(path)))
