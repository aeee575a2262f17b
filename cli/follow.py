"""Shows an answer as it comes: the progress of its prompt, then event after event, until Ctrl-C or its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ms4.cli import errors, render

if TYPE_CHECKING:
    import numpy as np

    from ms4.models.answer import Answer, Done, Event
    from ms4.models.scheduler import Scheduler
    from ms4.models.timeline import Timeline


def follow(
    scheduler: Scheduler,
    answer: Answer,
    timeline: Timeline,
    image_rows: np.ndarray | None,
    status: render.StatusLine,
    show: Callable[[Event], None],
    hidden: bool = False,
) -> Done:
    """Submits the answer and shows each of its events but the last, which it returns.  Ctrl-C is the caller's.

    hidden: `show` shows no thoughts, so the status says that there are some, up to the first text.
    """
    from ms4.models.answer import Done, Note, Prefill, Token
    from ms4.models.answer_parser import Thinking

    with ExitStack() as until_next_event:
        running = scheduler.submit(answer, timeline, image_rows)
        thinking = shown = False
        for event in running:
            if isinstance(event, Note):
                status.clear()
                if shown and sys.stderr.isatty():
                    sys.stderr.write("\n")  # what was written ends within a line
                errors.note(event.text)
                continue
            shown = shown or not isinstance(event, Prefill)
            if thinking and isinstance(event, (Thinking, Token)):
                show(event)
                continue
            until_next_event.close()
            if isinstance(event, Done):
                return event
            show(event)
            thinking = hidden and isinstance(event, Thinking)
            if thinking:
                until_next_event.enter_context(status.watching(render.thinking(lambda: len(answer.ids))))
            # What has been written stands on the line on which the status would.
            hidden = hidden and isinstance(event, (Prefill, Token))
            if isinstance(event, Prefill):
                until_next_event.enter_context(status.watching(render.prefilling(running.progress)))
    raise AssertionError("an answer ends in Done")
