"""Images on their way into a prompt: finds the vision tower, says what they cost, and has each encoded only once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import ms4
from ms4.models.companion import choose
from ms4.models.image import Image, Pixels, chunk_image, measure, preprocess
from ms4.models.mistral4 import ModelError
from ms4.models.pixtral import Tower
from ms4.models.prompt import ImagePlace

CACHE_BYTES = 256 << 20  # of rows that no prompt at hand needs: five of the largest pictures of Mistral Small 4


class NoTowerError(Exception):
    """There is no mmproj file, or not the one that was named."""


class VisionEncoder:
    """A tower opened in an engine: pixels -> rows for the [IMG] positions of a prompt."""

    def __init__(self, engine: ms4.Engine, tower: Tower) -> None:
        if tower.shape.d_out != engine.shape.d_model:
            raise ModelError(
                tower.path,
                f"this mmproj gives {tower.shape.d_out} values a token, but the model takes {engine.shape.d_model}: "
                "it belongs to another model",
            )
        self.rule = tower.rule
        self.vision = engine.vision(tower.shape, tower.tensors, tower.path)
        self.displaced = engine.stats().device != "cpu" and not self.vision.on_gpu
        try:
            # The engine opened the file once more, by name: it must be the one whose header was checked.
            tower.gguf.check_unchanged()
        except BaseException:
            self.vision.close()
            raise

    def encode(self, pixels: Pixels, stop: ms4.StopFlag | None = None) -> np.ndarray:
        """float32 [gh * gw, d_model], in raster order."""
        return self.vision.encode(pixels.array, stop)

    def close(self) -> None:
        self.vision.close()


@dataclass(frozen=True)
class Size:
    """What becomes of an image: the pixels that the tower gets, and the positions it takes in a prompt."""

    width: int
    height: int
    n_tokens: int


# Around the encoding of an image: its number, how many there are, and the progress of the encoding, to show it.
Watch = Callable[[int, int, Callable[[], tuple[int, int]]], AbstractContextManager[None]]


class ImageInput:
    """The vision tower of a model, looked for when the first image comes, and the rows of the images in use.

    mmproj: the tower's file; None takes the one beside the model.  max_tokens: the most positions of one image.
    """

    def __init__(self, model: str | os.PathLike[str], mmproj: str | None = None, max_tokens: int | None = None) -> None:
        self.model = model
        self.mmproj = mmproj
        self.max_tokens = max_tokens
        self.doubt = ""  # a line to say: whether the tower belongs to the model, and who computes it
        self.seconds = 0.0  # spent on the images of the last prompt
        self._encoder: VisionEncoder | None = None
        self._rows: dict[tuple[bytes, int, int], np.ndarray] = {}  # those used last at the end

    @cached_property
    def tower(self) -> Tower:
        """The checked mmproj file."""
        if self.mmproj is not None:
            if not Path(self.mmproj).exists():
                raise NoTowerError(f"{self.mmproj[-80:]}: no such file")
            return Tower.read(self.mmproj)
        found = choose(self.model)
        if found.path is None:
            reason = "images need the vision tower, and there is no mmproj file beside the model"
            raise NoTowerError(found.problem or reason)
        self.doubt = found.doubt
        return Tower.read(found.path)

    def measure(self, chunk: Mapping[str, Any]) -> tuple[int, int, bytes]:
        """(columns, rows, digest) of an image chunk, as `prompt.render` asks for it."""
        return measure(chunk, self.max_tokens, self.tower.rule)

    def size(self, image: Image) -> Size:
        columns, rows, _ = self.measure({"image": image})
        cell = self.tower.rule.cell
        return Size(columns * cell, rows * cell, (columns + 1) * rows)

    def place(self, image: Image) -> ImagePlace:
        """The image as a prompt has it, of which it is the beginning."""
        chunk = {"type": "image", "image": image}
        return ImagePlace(0, *self.measure(chunk), chunk)

    def rows(
        self,
        places: Sequence[ImagePlace],
        engine: ms4.Engine,
        stop: ms4.StopFlag | None = None,
        watch: Watch = lambda number, n, progress: nullcontext(),
    ) -> np.ndarray | None:
        """The tower's rows for the images of a prompt, in order; None without images.  A stop ends it with Canceled."""
        begun = time.monotonic()
        found = []
        for number, place in enumerate(places, 1):
            key = place.digest, place.width, place.height
            rows = self._rows.pop(key, None)
            if rows is None:
                self._encoder = self._encoder or self._open(engine)
                pixels = preprocess(chunk_image(place.chunk), self.max_tokens, self.tower.rule)
                with watch(number, len(places), self._encoder.vision.progress):
                    rows = self._encoder.encode(pixels, stop)
            self._rows[key] = rows
            found.append(rows)
        self._forget({(place.digest, place.width, place.height) for place in places})
        self.seconds = time.monotonic() - begun if places else 0.0
        return np.concatenate(found) if found else None

    def _open(self, engine: ms4.Engine) -> VisionEncoder:
        encoder = VisionEncoder(engine, self.tower)
        if encoder.displaced:
            self.doubt = "the CPU computes images: beside the text model the GPU has no room for the vision tower"
        return encoder

    def _forget(self, needed: set[tuple[bytes, int, int]]) -> None:
        """The rows that were not used for the longest time, until the others are few enough."""
        spare = [key for key in self._rows if key not in needed]
        n_bytes = sum(self._rows[key].nbytes for key in spare)
        for key in spare:
            if n_bytes <= CACHE_BYTES:
                break
            n_bytes -= self._rows.pop(key).nbytes
