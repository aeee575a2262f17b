"""What a person sees while they wait: the status line on stderr, dimmed thoughts, the line of statistics."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ms4.cli import streams, wrap
from ms4.quant import visible

if TYPE_CHECKING:
    import ms4
    from ms4.cli.markdown import Markdown
    from ms4.models.answer import Statistics

DIM, PLAIN, ERASE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
PERIOD = 0.1  # seconds between two looks at the progress
LONG_WAIT = 5  # seconds


class StatusLine:
    """One line on stderr that is written over and disappears.  Silent unless stderr is a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.enabled = not quiet and streams.is_terminal(sys.stderr) and not streams.is_plain()
        self.also: Callable[[], str] = lambda: ""  # what is to be said besides
        self._shown = False
        self._lock = threading.Lock()

    def show(self, text: str) -> None:
        if not self.enabled:
            return
        with self._lock:
            self._shown = True
            # One cell is left free: at the last one some terminals begin a new line.
            text = fitting(text, streams.columns(sys.stderr) - 1)
            style, plain = (DIM, PLAIN) if streams.use_colour(sys.stderr) else ("", "")
            sys.stderr.write(f"{ERASE}{style}{text}{plain}")
            sys.stderr.flush()

    def clear(self) -> None:
        with self._lock:
            if self._shown:
                self._shown = False
                sys.stderr.write(ERASE)
                sys.stderr.flush()

    @contextmanager
    def watching(self, look: Callable[[], str]) -> Iterator[None]:
        """Shows look() every PERIOD while the block runs, from another thread."""
        if not self.enabled:
            yield
            return
        over = threading.Event()

        def poll() -> None:
            if not over.wait(streams.PATIENCE):
                while not over.is_set():
                    self.show(look() + self.also())
                    over.wait(PERIOD)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.clear()


def fitting(text: str, width: int) -> str:
    """As much of a text as is at most `width` cells wide."""
    if text.isascii():
        return text[: max(width, 0)]
    for n, c in enumerate(text):
        width -= wrap.cell(c)
        if width < 0:
            return text[:n]
    return text


def prefilling(progress: Callable[[], tuple[int, int]], n_tokens: int = 0) -> Callable[[], str]:
    """What to show while a prompt is computed.

    progress gives (done, total): tokens, or parts of the work for n_tokens.
    """
    begun = time.monotonic()

    def look() -> str:
        done, total = progress()
        share = done / total if total else 0.0
        n = n_tokens or total
        text = f"reading {100 * share:.0f} %  {int(share * n)}/{n} tokens"
        seconds = time.monotonic() - begun
        return text + (f"  {seconds * (1 - share) / share:.0f} s left" if share > 0.02 else "")

    return look


def thinking(n_tokens: Callable[[], int]) -> Callable[[], str]:
    """What to show while the model has a thought that is not shown."""
    begun, before = time.monotonic(), n_tokens()
    return lambda: f"thinking  {n_tokens() - before} tokens  {time.monotonic() - begun:.0f} s"


def short(n: int) -> str:
    """A count of tokens in few characters: 812, 2.4k, 32k; as --ctx takes it, 32K is 32,768."""
    if n < 1000:
        return str(n)
    if n % 1024 == 0:
        return f"{n // 1024}K"
    return f"{n / 1000:.1f}k" if n < 10_000 else f"{round(n / 1000)}k"


def gigabytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def rate(s: "Statistics") -> str:
    """Tokens per second.  The first token comes out of the prompt: one alone has no rate."""
    return f"{s.decode_per_second:.1f} tok/s" if s.n_decode else ""


def statistics(s: "Statistics", s_images: float = 0.0) -> str:
    images = f"images {s_images:.1f} s · " if s_images else ""
    cached = f" ({s.n_cached} cached)" if s.n_cached else ""
    thinking = f" ({s.n_thinking} thinking)" if s.n_thinking else ""
    wrote = f"wrote {s.n_answer} tok {rate(s)}".rstrip()
    return (
        f"{images}read {s.n_prompt} tok{cached} {s.s_prefill:.1f} s · {wrote}{thinking} · "
        f"ctx {short(s.n_context)}/{short(s.n_ctx)}"
    )


def waiting(stats: "ms4.Stats") -> str:
    """That a disk gives nothing, once that has lasted."""
    seconds = stats.ns_waiting // 10**9
    return f"  waiting for the disk {seconds} s" if seconds >= LONG_WAIT else ""


def from_disk(now: "ms4.Stats", before: "ms4.Stats | None" = None) -> str:
    """What experts that stay on the disk cost between two looks, or since the model was opened; "" if none do."""
    names = ("experts_wanted", "experts_there", "bytes_disk", "ns_waited")
    wanted, there, n_bytes, ns = (getattr(now, name) - (getattr(before, name) if before else 0) for name in names)
    if not wanted:
        return ""
    share = f"{100 * there // wanted} %"
    return f" · experts {share} in memory, {gigabytes(n_bytes)} from the disk, waited {ns / 1e9:.1f} s"


class Screen:
    """Text for a person: thoughts dimmed, newlines at the end held back until more text follows.

    On a terminal, lines are broken between words, and so the last word is held back, too.  On one with colours, the
    answer is rendered as the Markdown it is, unless that is not wanted.
    """

    def __init__(self, output: streams.Output, markdown: bool = True) -> None:
        self.output = output
        self._rendered: Markdown | None = None
        if markdown and output.colour:
            from ms4.cli import markdown as rendering

            self._rendered = rendering.Markdown(lambda: output.columns() - 1)
        self._part = ""  # what was written last: "", "thinking" or "text"
        self._held = ""
        self._wrap = self._new_wrap()

    def _new_wrap(self) -> wrap.Wrap:
        # One cell is left free, as in the status.
        return wrap.Wrap(lambda: self.output.columns() - 1)

    def begin(self, text: str) -> None:
        """The beginning of the answer that was given: nothing of it is left out."""
        if self._rendered:
            self._render(text)
            return
        self._held = text[len(text.rstrip("\n")) :]
        self._part = "text"
        self._put(text.rstrip("\n"))

    def thinking(self, text: str) -> None:
        self._write("thinking", text)

    def text(self, text: str) -> None:
        if self._rendered:
            self._render(text)
        else:
            self._write("text", text)

    def _render(self, text: str) -> None:
        """Markdown; it holds newlines, and whatever is not certain, by itself."""
        assert self._rendered
        if self._part != "text":
            text = text.lstrip("\n")
            if not text:
                return
            self._flush()
            before, self._part, self._held = "\n\n" if self._part else "", "text", ""
            self.output.write(before)
        shown = self._rendered.feed(text)
        if shown:
            self.output.write(shown)

    def _write(self, part: str, text: str) -> None:
        if part != self._part:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if not body:
            self._held += text
            return
        if part != self._part:
            self._flush()
            self._wrap = self._new_wrap()
            self._held = ("\n\n" if self._part else "") + self._label(part)
        before, self._held = self._held, text[len(body) :]
        self._part = part
        self._put(body, before)

    def _put(self, body: str, before: str = "") -> None:
        """Text of this part; before: the newlines that were held, and the label."""
        if self.output.terminal:
            before, body = self._wrap.feed(before), self._wrap.feed(visible.text(body))
        self._style(before, body)

    def _style(self, before: str, body: str) -> None:
        # What stands before may bring a word that was held back: thoughts are dim as a whole.
        if before or body:
            dim = self._part == "thinking" and self.output.colour and (before + body).strip()
            style, plain = (DIM, PLAIN) if dim else ("", "")
            self.output.write(f"{style}{before}{body}{plain}")

    def _flush(self) -> None:
        """Writes what is held."""
        if self._rendered and self._part == "text":
            self.output.write(self._rendered.end())
        self._style("", self._wrap.flush())

    def _label(self, part: str) -> str:
        """What says where thoughts begin and end, on a terminal that cannot dim them."""
        if not self.output.terminal or self.output.colour:
            return ""
        return "thinking:\n" if part == "thinking" else "answer:\n" if self._part else ""

    def end(self) -> None:
        """Exactly one newline after the last word."""
        self._flush()
        if self._part:
            self.output.write("\n")
        self._part, self._held = "", ""
