"""Images on their way into a prompt: finds the vision tower, says what they cost, and has each read only once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, render
from ms4.cli.errors import MissingError

if TYPE_CHECKING:
    import numpy as np

    import ms4
    from ms4.models.image import Image
    from ms4.models.pixtral import Eyes, Tower
    from ms4.models.prompt import Image as Place


@dataclass(frozen=True)
class SightOptions:
    mmproj: str | None = None  # None: the file beside the model
    max_tokens: int | None = None  # of one image


class Sight:
    """The vision tower of a model, looked for when the first image comes, and the rows of the images in use."""

    def __init__(self, options: SightOptions, model: str, status: render.StatusLine) -> None:
        self.options = options
        self.model = model
        self.status = status
        self.seconds = 0.0  # spent on the images of the last prompt
        self._eyes: Eyes | None = None
        self._rows: dict[tuple[bytes, int, int], np.ndarray] = {}

    @cached_property
    def tower(self) -> Tower:
        """The checked mmproj file."""
        from ms4.models.pixtral import Tower

        return Tower.read(self._path())

    def _path(self) -> str:
        from ms4.models.pixtral import find

        given = self.options.mmproj
        if given is not None:
            if not Path(given).exists():
                raise MissingError(f"{given[-80:]}: no such file", "--mmproj names the mmproj GGUF of the model")
            return given
        found = find(self.model)
        if found is None:
            hint = "the mmproj GGUF comes from where the model came from; put it beside the model, or add --mmproj FILE"
            raise MissingError("images need the vision tower, and there is no mmproj file beside the model", hint)
        return str(found)

    def measure(self, chunk: Mapping[str, Any]) -> tuple[int, int, bytes]:
        """(columns, rows, digest) of an image chunk, as `prompt.render` asks for it."""
        from ms4.models.image import measure

        return measure(chunk, self.options.max_tokens, self.tower.rule)

    def sizes(self, image: Image) -> tuple[int, int, int]:
        """(width, height, tokens): the pixels that the tower gets of an image, and the positions it takes."""
        columns, rows, _ = self.measure({"image": image})
        cell = self.tower.rule.cell
        return columns * cell, rows * cell, (columns + 1) * rows

    def price(self, image: Image) -> str:
        """doc.png 2480x3508 -> 1092x1540, 2200 tokens"""
        (width, height), (to_width, to_height, n_tokens) = image.size, self.sizes(image)
        first = ", first frame" if image.animated else ""
        return f"{image.name[-80:]} {width}x{height}{first} -> {to_width}x{to_height}, {n_tokens} tokens"

    def announce(self, messages: Sequence[Mapping[str, Any]], quiet: bool) -> list[dict[str, Any]]:
        """Says on stderr what each image costs; returns the same as JSON has it."""
        chunks = [chunk for message in messages for chunk in message["content"] if isinstance(chunk, dict)]
        images = [chunk["image"] for chunk in chunks if chunk["type"] == "image"]
        found = []
        for image in images:
            width, height, n_tokens = self.sizes(image)
            found.append({"px": [width, height], "tokens": n_tokens})
            if not quiet:
                errors.note(self.price(image))
        return found

    def place(self, image: Image) -> Place:
        """The image as a prompt has it, of which it is the beginning."""
        from ms4.models.prompt import Image as Place

        chunk = {"type": "image", "image": image}
        return Place(0, *self.measure(chunk), chunk)

    def rows(self, places: Sequence[Place], engine: ms4.Engine) -> np.ndarray:
        """The tower's rows for the images of a prompt, in order.  Ctrl-C ends it with Canceled or KeyboardInterrupt.

        Rows of images that the prompt no longer has are forgotten.
        """
        import numpy as np

        from ms4.models.image import chunk_image, preprocess
        from ms4.models.pixtral import Eyes

        begun = time.monotonic()
        known: dict[tuple[bytes, int, int], np.ndarray] = {}
        for number, place in enumerate(places, 1):
            key = place.digest, place.width, place.height
            if key not in self._rows:
                self._eyes = self._eyes or Eyes(engine, self.tower)
                pixels = preprocess(chunk_image(place.chunk), self.options.max_tokens, self.tower.rule)
                self._rows[key] = self.encode(pixels.array, f"image {number} of {len(places)}")
            known[key] = self._rows[key]
        self._rows = known
        self.seconds = time.monotonic() - begun if places else 0.0
        found = [known[place.digest, place.width, place.height] for place in places]
        return np.concatenate(found) if found else np.empty((0, engine.shape.d_model), np.float32)

    def encode(self, pixels: np.ndarray, name: str) -> np.ndarray:
        from ms4 import StopFlag
        from ms4.models.interrupt import interruptible

        assert self._eyes is not None
        vision, stop = self._eyes.vision, StopFlag()
        with self.status.watching(reading(name, vision.progress)), interruptible(stop):
            return vision.encode(pixels, stop)


def reading(name: str, progress: Callable[[], tuple[int, int]]) -> Callable[[], str]:
    """What to show while an image is read."""
    begun = time.monotonic()

    def look() -> str:
        done, total = progress()
        share = done / total if total else 0.0
        seconds = time.monotonic() - begun
        left = f"  {seconds * (1 - share) / share:.0f} s left" if share > 0.02 else ""
        return f"reading {name}  {100 * share:.0f} %{left}"

    return look
