"""Thoughts that can be folded while they come, and the line that says how things stand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ms4.cli import render

if TYPE_CHECKING:
    from ms4.models.answer import Answer

METER = 10  # cells of the meter of the context


class Thoughts:
    """Writes the thoughts of one answer, or holds them while they are folded; fold() may come from any thread.

    What was held is written when it is unfolded, so unfolded thoughts are always whole.
    """

    def __init__(self, screen: render.Screen, answer: Answer, folded: bool) -> None:
        self._screen = screen
        self._answer = answer
        self.folded = folded
        self._quiet = folded  # nobody asked to see them
        self._held = ""
        self._begun: float | None = None  # when the first one came
        self._seconds = 0.0
        self._n_before = 0
        self._n_tokens = 0
        self._over = False

    def fold(self) -> None:
        self.folded = not self.folded
        self._quiet = False

    def add(self, text: str) -> None:
        if self._begun is None:
            self._begun, self._n_before = time.monotonic(), max(len(self._answer.ids) - 1, 0)
        self._held += text
        if not self.folded:
            held, self._held = self._held, ""
            self._screen.thinking(held)

    def end(self) -> None:
        """The answer begins, or there is none; thoughts that are folded leave a line."""
        if self._over or self._begun is None:
            return
        self._over = True
        self._seconds, self._n_tokens = time.monotonic() - self._begun, len(self._answer.ids) - self._n_before
        if self._held.strip() and not self._quiet:
            self._screen.thinking(f"\n[thought {self._n_tokens} tokens, {self._seconds:.0f} s]")

    def status(self) -> str:
        """For the bottom line; "" unless the model thinks."""
        if self._begun is None or self._over:
            return ""
        n, seconds = len(self._answer.ids) - self._n_before, time.monotonic() - self._begun
        return f"thinking {n} tokens {seconds:.0f} s, Ctrl-T {'shows' if self.folded else 'folds'}"


class Pace:
    """Tokens per second of an answer, as it is written."""

    def __init__(self, answer: Answer, clock: Callable[[], float] = time.monotonic) -> None:
        self._answer = answer
        self._clock = clock
        self._begun: tuple[int, float] | None = None

    def __call__(self) -> float:
        """0 until there are enough of them to say."""
        n = len(self._answer.ids)
        if self._begun is None:
            self._begun = (n, self._clock()) if n else None
            return 0.0
        seconds = self._clock() - self._begun[1]
        return (n - self._begun[0]) / seconds if n > self._begun[0] and seconds > 0 else 0.0


def meter(n: int, n_ctx: int, width: int = METER) -> str:
    """How full the context is, in eighths of a cell."""
    eighths = min(max(8 * width * n // n_ctx, 1 if n else 0), 8 * width)
    full, rest = divmod(eighths, 8)
    return f"▕{'█' * full}{' ▏▎▍▌▋▊▉'[rest] if rest else ''}".ljust(width + 1) + "▏"


def bottom_line(model: str, effort: str, n: int, n_ctx: int, rate: float, status: str = "") -> str:
    context = f"ctx {render.short(n)}/{render.short(n_ctx)} {meter(n, n_ctx)}"
    return " · ".join(filter(None, [model, status, f"effort {effort}", context, f"{rate:.1f} tok/s" if rate else ""]))
