"""A model that is open: the file, its vocabulary and the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from types import TracebackType

import ms4
from ms4.models import mistral4
from ms4.models.vocabulary import Vocabulary
from ms4.quant.gguf_file import GgufFile


class Model:
    """One open model.  Made by `Model.open`; close its sessions before it."""

    def __init__(self, gguf: GgufFile, shape: ms4.Shape, engine: ms4.Engine) -> None:
        self.gguf = gguf
        self.shape = shape
        self.engine = engine
        self.at_close: Callable[[], None] | None = None  # called before the engine is closed

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        attn_scale: str = "plain",
        threads: int = 0,
        load: str = "auto",
        n_batch: int = 0,
        ram: int = 0,
        device: str = "cpu",
        vram: int = 0,
        patience: int = 0,
        pinned: bool = True,
        progress: Callable[[int, int], bool] | None = None,
        seen: Callable[[GgufFile], str] | None = None,
        said: Callable[[str], None] = lambda text: None,
    ) -> Model:
        """Opens a model file.  GgufError or ModelError: the file; EngineError and MemoryError: this machine.

        attn_scale is "plain" or "mscale2"; seen is called with the header, before the weights are opened, and says how
        to load them ("map" and "copy" take no budget); said with a line for a person, if the GPU's kernels have to be
        compiled; the rest is as in `ms4.Engine.open`.
        """
        gguf = GgufFile.open(path)
        if seen is not None and (load := seen(gguf)) in ("map", "copy"):
            ram = 0
        shape = mistral4.shape_of(gguf, attn_scale)
        table = mistral4.tensors_of(gguf, shape)
        engine = ms4.Engine.open(
            shape,
            table,
            gguf.paths,
            threads=threads,
            load=load,
            n_batch=n_batch,
            ram=ram,
            device=device,
            vram=vram,
            patience=patience,
            pinned=pinned,
            code=code_for(device, said),
            progress=progress,
        )
        try:
            # The engine opened the files once more, by name: they must be those whose headers were checked.
            gguf.check_unchanged()
        except BaseException:
            engine.close()
            raise
        return cls(gguf, shape, engine)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The file's vocabulary, checked at the first use: work with token ids alone needs none."""
        return Vocabulary.from_gguf(self.gguf)

    def session(self, n_ctx: int) -> ms4.Session:
        """A new, empty line of at most n_ctx tokens."""
        return self.engine.session(n_ctx)

    def close(self) -> None:
        last, self.at_close = self.at_close, None
        try:
            if last is not None:
                last()
        finally:
            self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def code_for(device: str, said: Callable[[str], None]) -> str:
    """The GPU's kernels, if they do not come with ms4."""
    if device == "cpu":
        return ""
    from ms4.models import gpu_code

    try:
        return gpu_code.ready(said)
    except gpu_code.CompilerError:
        if device != "auto":
            raise
        return ""  # the engine says that there are none, and the CPU computes
