"""`ms4 chat`: reads messages, streams answers, keeps the conversation.

On a terminal the messages are edited and the answers styled; otherwise each line of stdin is a message and stdout gets
the answers alone.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ms4
from ms4.cli import attachments, errors, lines, loading, render, streams
from ms4.cli.errors import IncompleteError
from ms4.cli.options import EngineOptions, Sampling
from ms4.cli.run import system_text
from ms4.cli.sight import Sight, SightOptions

if TYPE_CHECKING:
    import numpy as np

    from ms4.cli.history import History
    from ms4.models.document import Part
    from ms4.models.generate import Done, Line, Statistics
    from ms4.models.prompt import Prompt
    from ms4.models.sampling import Sampler

HELP = """\
/effort none|high  how long the model thinks before it answers
/think show|hide   show its thoughts or not
/system [TEXT]     set the system prompt; without TEXT, none
/image PATH        attach an image to the next message
/file PATH[:PAGES] attach a text file, an image or pages of a PDF
/paste             attach the image on the clipboard
/drop              attach nothing after all
/new               begin a new conversation
/undo [N]          take back the last N turns
/retry             answer the last message again
/stats             what the last turn cost
/help              this list
/exit              leave (also Ctrl-D)
Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer and keeps what there is.
A message that begins with / needs a space before it."""


@dataclass(frozen=True)
class Settings:
    sampling: Sampling
    system: str | None = None
    think: str = "auto"
    max_tokens: int | None = None
    n_ctx: int = 0
    files: tuple[str, ...] = ()
    pdf: str = "auto"
    sight: SightOptions = SightOptions()


def chat(settings: Settings, engine: EngineOptions) -> int:
    """Runs the loop until the input ends; returns the exit code."""
    settings.sampling.sampler()  # a setting out of range is said before the model is opened
    engine.require()
    system = system_text(settings.system) if settings.system is not None else None
    status = render.StatusLine(engine.quiet)
    sight = Sight(settings.sight, engine.require(), status)
    attached = [part for path in settings.files for part in attachments.open_path(path, settings.pdf)]
    prices = [note(part, sight) for part in attached]
    with loading.open_model(engine, status) as model:
        from ms4.cli.history import History
        from ms4.models.generate import Line

        tokenizer = loading.usable(model.vocabulary)
        n_ctx = loading.context_for(model, settings.n_ctx)
        output = streams.Output()
        interactive = output.terminal and streams.is_terminal(sys.stdin)
        with model.session(n_ctx) as session:
            history = History(tokenizer, system, settings.sampling.effort, sight.measure)
            talk = Talk(settings, history, Line(session), session, output, status, sight, interactive)
            talk.take(attached, prices)
            source = lines.EditedLines(list(talk.commands)) if interactive else lines.PipedLines()
            talk.say(f"context of {n_ctx} tokens · /help lists the commands · Ctrl-D leaves")
            return loop(talk, source)


def loop(talk: Talk, source: lines.Lines) -> int:
    """Message after message.  Ctrl-C twice at an empty prompt leaves."""
    again = False
    while not talk.over:
        try:
            text = source.next()
        except KeyboardInterrupt:
            if again or not talk.interactive:
                return errors.INTERRUPTED
            again = True
            talk.say("Ctrl-C once more, or Ctrl-D, leaves")
            continue
        again = False
        if text is None:
            break
        if text.startswith("/"):
            talk.command(text)
        elif text.strip():
            talk.send(text.removeprefix(" ") if text.startswith(" /") else text)
    return errors.OK


def note(part: Part, sight: Sight) -> str:
    """What an attachment costs."""
    return f"text of {len(part)} characters" if isinstance(part, str) else sight.price(part)


class Talk:
    """One chat: the conversation, the line of tokens behind it, and what the user has set."""

    def __init__(
        self,
        settings: Settings,
        history: History,
        line: Line,
        session: ms4.Session,
        output: streams.Output,
        status: render.StatusLine,
        sight: Sight,
        interactive: bool,
    ) -> None:
        self.settings = settings
        self.history = history
        self.line = line
        self.session = session
        self.output = output
        self.status = status
        self.sight = sight
        self.attached: list[Part] = []  # to the next message
        self.interactive = interactive
        self.over = False
        self.last: Statistics | None = None
        self._sampler: Sampler = settings.sampling.sampler()
        self.commands: dict[str, Callable[[str], None]] = {
            "/effort": self.set_effort,
            "/think": self.set_think,
            "/system": self.set_system,
            "/image": self.add_image,
            "/file": self.add_file,
            "/paste": self.paste,
            "/drop": self.drop,
            "/new": self.new,
            "/undo": self.undo,
            "/retry": self.retry,
            "/stats": self.stats,
            "/help": lambda _: self.tell(HELP),
            "/exit": self.leave,
        }

    def say(self, text: str) -> None:
        """A remark that only a person needs."""
        if self.interactive:
            self.tell(text)

    def tell(self, text: str) -> None:
        """An answer to a command: beside the conversation, so on stderr."""
        style, plain = (render.DIM, render.PLAIN) if streams.use_colour(sys.stderr) else ("", "")
        print(f"{style}{text}{plain}", file=sys.stderr, flush=True)

    # --- commands

    def command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name in self.commands:
            self.commands[name](argument.strip())
            return
        if self.interactive and attachments.is_file(text):  # dropped on the terminal
            self.add_file(text)
            return
        near = difflib.get_close_matches(name, self.commands, 1)
        self.tell(f"no command {errors.escape(name, 40)}; " + (f"{near[0]}?" if near else "/help lists them"))

    def set_effort(self, value: str) -> None:
        if value not in ("none", "high"):
            self.tell(f"effort is {self.history.effort}; /effort none or /effort high")
            return
        if value != self.history.effort:
            self.history.effort = value
            self._sampler = self.settings.sampling.sampler(value)
        self.tell(f"effort {value}{self.price()}")

    def price(self) -> str:
        """What it costs that the beginning of the prompt has changed."""
        if not self.history.turns:
            return ""
        n = len(self.history.prompt().ids) + len(self.history.turns[-1].answer or ())
        rate = render.rate(self.last.n_prompt - self.last.n_cached, self.last.s_prompt) if self.last else 0.0
        seconds = f", about {n / rate:.0f} s" if rate and n / rate >= 1 else ""
        return f": the next message reads the conversation again ({n} tokens{seconds})"

    def set_think(self, value: str) -> None:
        if value not in ("auto", "show", "hide"):
            self.tell(f"thoughts: {self.settings.think}; /think show or /think hide")
            return
        self.settings = replace(self.settings, think=value)
        self.tell(f"thoughts: {value}")

    def set_system(self, value: str) -> None:
        self.history.system = value or None
        self.tell(("system prompt set" if value else "no system prompt") + self.price())

    def add_image(self, value: str) -> None:
        self.attach(lambda: [attachments.open_image(attachments.typed_path(value))])

    def add_file(self, value: str) -> None:
        self.attach(lambda: attachments.open_file(attachments.typed_path(value), self.settings.pdf))

    def paste(self, _: str) -> None:
        self.attach(lambda: [attachments.clipboard_image()])

    def attach(self, load: Callable[[], list[Part]]) -> None:
        """Opens what a command names; at a terminal a failure is only told."""
        try:
            parts = load()
            prices = [note(part, self.sight) for part in parts]
        except Exception as error:
            code, text, hint = errors.describe(error)
            if not self.interactive or code not in (errors.USAGE, errors.MISSING, errors.UNREADABLE):
                raise
            self.tell(f"{text}; {hint}" if hint else text)
            return
        self.take(parts, prices)

    def take(self, parts: Sequence[Part], prices: Sequence[str]) -> None:
        self.attached += parts
        for price in prices:
            self.tell(errors.escape(price))
        if parts:
            self.say("goes with the next message; /drop leaves it out")

    def drop(self, _: str) -> None:
        self.tell("nothing is attached any more" if self.attached else "nothing was attached")
        self.attached.clear()

    def new(self, _: str) -> None:
        self.history.turns.clear()
        self.tell("a new conversation")

    def undo(self, value: str) -> None:
        if value and not (value.isascii() and value.isdigit() and 0 < int(value) < 10**6):
            self.tell("/undo N: N is a number of turns")
            return
        n = self.history.undo(int(value or 1))
        self.tell(f"took back {n} turn{'' if n == 1 else 's'}" if n else "there is nothing to take back")

    def retry(self, _: str) -> None:
        if not self.history.turns:
            self.tell("there is nothing to answer again")
            return
        message = self.history.turns[-1].message
        self.history.undo()
        self.turn(message)

    def stats(self, _: str) -> None:
        self.tell(render.statistics(self.last) if self.last else "no turn yet")

    def leave(self, _: str) -> None:
        self.over = True

    # --- one turn

    def send(self, text: str) -> None:
        """A message with what is attached to it.  If it is taken back, the attachments wait for the next one."""
        attached, self.attached = self.attached, []
        if not self.turn(attachments.content(attached, text)):
            self.attached = attached

    def turn(self, message: attachments.Content) -> bool:
        """Sends a message and streams the answer; False: the message was taken back.

        A failure takes it back too; at a terminal the chat goes on.
        """
        try:
            prompt = self.history.ask(message)
            ids, done = self.answer(prompt, self.look(prompt))
        except BaseException as error:
            self.history.answered([])
            code, text, hint = errors.describe(error)
            if not self.interactive or code not in (errors.INCOMPLETE, errors.USAGE):
                raise
            self.tell(f"{text}; {hint or '/new begins a new conversation'}")
            return False
        self.history.answered(ids)
        self.last = done.statistics
        self.conclude(done, bool(ids))
        return bool(ids)

    def look(self, prompt: Prompt) -> np.ndarray:
        """The rows of the prompt's images."""
        from ms4 import Canceled
        from ms4.models.generate import ContextError

        n_prompt, n_ctx = len(prompt.ids), self.line.n_ctx
        if n_prompt + (self.settings.max_tokens or 1) > n_ctx:  # said before the images are computed
            raise ContextError(n_prompt, n_ctx, self.settings.max_tokens)
        try:
            return self.sight.rows(prompt.images, self.session.engine)
        except (Canceled, KeyboardInterrupt):
            if not self.interactive:
                raise
            raise IncompleteError("stopped", "the message is taken back") from None

    def answer(self, prompt: Prompt, rows: np.ndarray) -> tuple[list[int], Done]:
        """Streams one answer; returns its ids and how it ended."""
        from ms4.models.generate import Done, Reading, Text, Thinking, Token, generate
        from ms4.models.interrupt import interruptible

        ids: list[int] = []
        screen = render.Screen(self.output)
        thoughts = self.output.terminal and self.settings.think != "hide"
        stop = ms4.StopFlag()
        with interruptible(stop):
            source = generate(
                self.line,
                prompt,
                self._sampler,
                self.history.tokenizer,
                max_tokens=self.settings.max_tokens,
                logprobs=0,  # for the ids of the tokens
                image_rows=rows,
                interrupt=stop,
            )
            event = next(source)
            if isinstance(event, Reading):
                with self.status.watching(render.reading(self.session.progress, event.total - event.cached)):
                    event = next(source)
            while not isinstance(event, Done):
                if isinstance(event, Token):
                    ids.append(event.id)
                elif isinstance(event, Text):
                    screen.text(event.text)
                elif isinstance(event, Thinking) and thoughts:
                    screen.thinking(event.text)
                event = next(source)
        screen.end()
        return ids, event

    def conclude(self, done: Done, kept: bool) -> None:
        if done.reason == "interrupted":
            if not self.interactive:
                raise KeyboardInterrupt
            self.tell("stopped; what there is is kept" if kept else "stopped; the message is taken back")
        elif done.reason == "context":
            if not self.interactive:
                raise IncompleteError(f"the context of {done.statistics.n_ctx} tokens is full", "a larger --ctx")
            self.tell(f"the context of {done.statistics.n_ctx} tokens is full; /new begins again, --ctx allows more")
        elif done.reason == "length":
            self.say("cut by --max-tokens")
        s = done.statistics
        self.say(
            f"{s.tokens_per_second:.1f} tok/s · ctx {render.short(s.n_context)}/{render.short(s.n_ctx)} · "
            f"effort {self.history.effort}"
        )
