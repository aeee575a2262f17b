"""`ms4 logits`: the logits at every position of given token ids, as a NumPy file.  Works without a usable tokenizer.

With images, the [IMG] ids take what the vision tower makes of them, in order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

import ms4
from ms4.cli import errors, image_notes, loading, render, streams
from ms4.cli.attachments import open_image
from ms4.cli.errors import CliError, IncompleteError, UnreadableError, UsageError
from ms4.cli.image_notes import ImageOptions
from ms4.cli.options import EngineOptions
from ms4.models.control import Control


def logits(
    ids_file: str, output: str, chunk: int | None, engine: EngineOptions, pictures: Sequence[str], options: ImageOptions
) -> int:
    """Feeds the ids and writes float32 [positions, vocabulary].

    chunk: most tokens that the engine computes together (its own choice if None); any gives the same bits.
    """
    from ms4.models.interrupt import interruptible

    path = engine.require()
    ids = read_ids(ids_file, engine.quiet)
    status = render.StatusLine(engine.quiet)
    images = options.open(path)
    places = [images.place(open_image(picture)) for picture in pictures]
    if places:
        check_places(ids, sum(place.width * place.height for place in places))
    with loading.open_model(engine, status, chunk or 0) as model:
        shape = model.engine.shape
        check_ids(ids, shape.n_vocab, shape.n_ctx_train)
        with interruptible() as stop, streams.open_bytes(output) as file, model.session(len(ids)) as session:
            image_rows = image_notes.encode(places, images, model.engine, status, stop)
            if places:
                ids = [ms4.ROW if id == Control.IMG else id for id in ids]
            with status.watching(render.prefilling(session.progress, len(ids))):
                rows = session.feed(ids, image_rows, all_logits=True, stop=stop)
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), shape.n_vocab)}
            try:
                np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(rows, "<f4").data)
                file.flush()
            except OSError as error:
                raise CliError(f"{output}: {error.strerror}") from None
    return errors.OK


def check_places(ids: list[int], n_rows: int) -> None:
    """Every row of the images has its [IMG] position."""
    n_places = ids.count(Control.IMG)
    if n_places != n_rows:
        raise UnreadableError(f"the ids have {n_places} [IMG] positions (id {Control.IMG:d}); the images fill {n_rows}")


def read_ids(name: str, quiet: bool = False) -> list[int]:
    """A JSON list of whole numbers, from a file or stdin."""
    text = streams.read_stdin(quiet=quiet) if name == "-" else streams.read_text(name)
    name = "stdin" if name == "-" else name
    if text is None:
        raise UsageError("nothing on stdin", "ms4 logits --ids ids.json")
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{name} is not JSON: {error}") from None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise UnreadableError(f"{name} is not a JSON list of token ids")
    return ids


def check_ids(ids: list[int], n_vocab: int, n_ctx: int) -> None:
    for position, id in enumerate(ids):
        if not 0 <= id < n_vocab:
            raise UnreadableError(f"id {id} at position {position} is outside 0 to {n_vocab - 1}")
    if len(ids) > n_ctx:
        raise IncompleteError(f"{len(ids)} ids, but the model holds at most {n_ctx}")
