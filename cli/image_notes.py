"""What is said about images: what each costs, and how far its encoding is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, render

if TYPE_CHECKING:
    import numpy as np

    import ms4
    from ms4.models.image import Image
    from ms4.models.prompt import ImagePlace
    from ms4.models.vision import ImageInput

Progress = Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class ImageOptions:
    mmproj: str | None = None  # None: the file beside the model
    max_tokens: int | None = None  # of one image

    def open(self, model: str) -> ImageInput:
        """The images' way into prompts of a model; the tower is looked for when the first one comes."""
        from ms4.models.vision import ImageInput

        return ImageInput(model, self.mmproj, self.max_tokens)


def price(image: Image, images: ImageInput) -> str:
    """doc.png 2480x3508 -> 1092x1540, 2200 tokens"""
    (width, height), size = image.size, images.size(image)
    first = (", first frame" if image.animated else "") + (f", {image.note}" if image.note else "")
    return f"{image.name[-80:]} {width}x{height}{first} -> {size.width}x{size.height}, {size.n_tokens} tokens"


def doubt(images: ImageInput) -> None:
    """Says, once, that the vision tower may not be the model's."""
    if images.doubt:
        errors.note(images.doubt)
        images.doubt = ""


def announce(messages: Sequence[Mapping[str, Any]], images: ImageInput, quiet: bool) -> list[dict[str, Any]]:
    """Says on stderr what each image costs; returns the same as JSON has it."""
    from ms4.models.image import chunk_image

    contents = [content for message in messages if isinstance(content := message.get("content"), list)]
    chunks = [chunk for content in contents for chunk in content if isinstance(chunk, dict)]
    found = []
    for image in (chunk_image(chunk) for chunk in chunks if chunk.get("type") in ("image", "image_url")):
        size = images.size(image)
        if not quiet:
            doubt(images)
        found.append({"px": [size.width, size.height], "tokens": size.n_tokens})
        if not quiet:
            errors.note(price(image, images))
    return found


def encode(
    places: Sequence[ImagePlace],
    images: ImageInput,
    engine: ms4.Engine,
    status: render.StatusLine,
    stop: ms4.StopFlag,
) -> np.ndarray | None:
    """The rows of a prompt's images, with progress.  The flag ends it with Canceled."""

    @contextmanager
    def watch(number: int, n: int, progress: Progress) -> Iterator[None]:
        with status.watching(encoding(f"image {number} of {n}", progress)):
            yield

    if not places:
        return None
    before = engine.stats().note
    rows = images.rows(places, engine, stop, watch)
    if (after := engine.stats().note) != before:  # the GPU failed, or had no room
        errors.note(after)
    if not status.quiet:
        doubt(images)
    return rows


def encoding(name: str, progress: Progress) -> Callable[[], str]:
    """What to show while an image is encoded."""
    begun = time.monotonic()

    def look() -> str:
        done, total = progress()
        share = done / total if total else 0.0
        seconds = time.monotonic() - begun
        left = f"  {seconds * (1 - share) / share:.0f} s left" if share > 0.02 else ""
        return f"reading {name}  {100 * share:.0f} %{left}"

    return look
