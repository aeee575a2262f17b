"""`ms4 chat`: reads messages, streams answers, keeps the conversation.

On a terminal the messages are edited and the answers styled; otherwise each line of stdin is a message and stdout gets
the answers alone.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ms4.cli import (
    attachments,
    card,
    chat_attached,
    chat_compact,
    chat_kept,
    chat_settings,
    errors,
    expected,
    image_notes,
    lines,
    loading,
    remembered,
    render,
    streams,
    terminal,
    typed,
    wrap,
)
from ms4.cli.asked import Asked, system_text
from ms4.cli.chat_commands import ALIASES, COMMAND, GOODBYES, HELP
from ms4.cli.errors import IncompleteError, UsageError
from ms4.cli.follow import follow
from ms4.cli.image_notes import ImageOptions
from ms4.cli.options import BUDGETS, LEVELS, EngineOptions, Sampling, thinking
from ms4.cli.run import check_length
from ms4.cli.thoughts import Pace, Thoughts, bottom_line
from ms4.models.untrusted import Reading
from ms4.quant import visible

if TYPE_CHECKING:
    import numpy as np

    from ms4 import Stats, StopFlag
    from ms4.models.answer import Answer, Done, Event, Statistics
    from ms4.models.dialogue import Content, Dialogue
    from ms4.models.document import Attachment
    from ms4.models.interrupt import Interrupt
    from ms4.models.sampling import Sampler
    from ms4.models.scheduler import Scheduler
    from ms4.models.sessions import Session
    from ms4.models.timeline import Timeline
    from ms4.models.vision import ImageInput

Opened = tuple[list["Attachment"], list[str]]  # what was opened, and what is to be said of it
TWICE = 2.0  # seconds in which the second Ctrl-C leaves


@dataclass(frozen=True)
class ChatSettings:
    sampling: Sampling
    system: str | None = None
    think: str = "auto"
    max_tokens: int | None = None
    n_ctx: int = 0
    files: tuple[str, ...] = ()
    pdf: str = "auto"
    images: ImageOptions = ImageOptions()
    rule: Reading = Reading()  # --encoding, --lossy, --pdf-password
    resume: str | None = None  # the session to go on with: its id, or "" for the last one
    no_session: bool = False
    markdown: bool = True
    compact: bool = True  # a context that is full makes older turns a summary by itself, at a terminal
    own_effort: bool = False  # the effort and its budget are wanted, whatever the session to go on with had
    live: bool = True  # what is typed and the bottom line stand below an answer that comes


def chat(settings: ChatSettings, engine: EngineOptions) -> int:
    """Runs the loop until the input ends; returns the exit code."""
    settings.sampling.sampler()  # a setting out of range is said before the model is opened
    engine.require()
    session = remembered.chosen(settings.resume, settings.files)
    system = system_text(settings.system, settings.rule) if settings.system is not None else None
    status = render.StatusLine(engine.quiet)
    images = settings.images.open(engine.require())
    typed.refuse_messages(settings.files)
    attached = [part for path in settings.files for part in attachments.open_path(path, settings.pdf, settings.rule)]
    prices = [note(part, images) for part in attached]
    if attached or system:  # what is too long before the first word is refused before the weights are loaded
        messages: list[dict[str, Any]] = [{"role": "user", "content": attachments.content(attached, "?")}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        asked = Asked(messages, settings.sampling.effort)
        check_length(asked, settings.n_ctx, settings.max_tokens, engine, images)
    output = streams.Output()
    seen = sys.stdout if output.terminal else sys.stderr  # `ms4 chat | tee log`: the prompt is on stderr
    interactive = streams.is_terminal(seen) and streams.is_terminal(sys.stdin)
    keys = terminal.quiet(seen) if interactive else contextlib.nullcontext()
    with keys, loading.open_model(engine, status, n_tokens=settings.n_ctx) as model:
        from ms4.models.dialogue import Dialogue
        from ms4.models.scheduler import Scheduler

        tokenizer = loading.usable(model.vocabulary)
        n_ctx = loading.context_for(model, settings.n_ctx)
        with Scheduler(model.engine) as scheduler:
            dialogue = Dialogue(tokenizer, system, settings.sampling.effort, images.measure)
            off = not remembered.wanted(settings.no_session)
            memory = remembered.Memory(engine, settings.images, errors.note, off=off, session=session)
            timeline = scheduler.open(n_ctx)
            talk = Talk(settings, dialogue, scheduler, timeline, output, status, images, interactive, memory)
            talk.model = visible.line(os.path.basename(engine.require()).removesuffix(".gguf"))
            talk.learn = partial(expected.learn, model)
            talk.open(session, system)
            talk.take(attached, prices)
            source = lines.EditedLines(seen, talk.bar) if interactive else lines.PipedLines(settings.rule)
            if isinstance(source, lines.EditedLines):
                talk.editor, source.take_image = source, partial(talk.paste, "")
            talk.say(f"context of {n_ctx} tokens · /help lists the commands · Ctrl-D leaves")
            try:
                return loop(talk, source)
            finally:
                source.close()
                talk.close()


def loop(talk: Talk, source: lines.Lines) -> int:
    """Message after message.  Ctrl-C twice at an empty prompt, within two seconds, leaves."""
    last = float("-inf")  # when Ctrl-C was pressed
    while not talk.over:
        try:
            text = source.next()
            last = float("-inf")
            if text is None:
                break
            if text.strip() and not talk.command(text):
                escaped = (" /", " !") if talk.interactive else " /"
                talk.send(text.removeprefix(" ") if text.startswith(escaped) else text)
        except KeyboardInterrupt:  # also one that comes when a turn has just ended
            before, last = last, time.monotonic()
            if last - before <= TWICE or not talk.interactive:
                return errors.INTERRUPTED
            talk.say("Ctrl-C once more, or Ctrl-D, leaves")
    return errors.OK


def note(part: Attachment, images: ImageInput) -> str:
    """What an attachment costs."""
    if isinstance(part, str):
        return f"text of {len(part)} characters"
    cost = image_notes.price(part, images)
    doubt, images.doubt = images.doubt, ""
    return f"{cost}; {doubt}" if doubt else cost


@contextlib.contextmanager
def unseen(ctrl_c: Interrupt) -> Iterator[None]:
    """Inside, what cannot be shown is no error once the process is being ended: its terminal may be gone."""
    try:
        yield
    except (errors.CliError, OSError):
        if not ctrl_c.ended:
            raise


class Talk:
    """One chat: the dialogue, the timeline behind it, and what the user has set."""

    def __init__(
        self,
        settings: ChatSettings,
        dialogue: Dialogue,
        scheduler: Scheduler,
        timeline: Timeline,
        output: streams.Output,
        status: render.StatusLine,
        images: ImageInput,
        interactive: bool,
        memory: remembered.Memory,
    ) -> None:
        self.memory = memory
        self.settings: ChatSettings = settings
        self.dialogue = dialogue
        self.scheduler = scheduler
        self.timeline = timeline
        self.output = output
        self.status = status
        self.images = images
        self.attached: list[Attachment] = []  # to the next message
        self.interactive = interactive
        self.over = False
        self.warned = 0  # how often, that the context fills up
        self.uncompacted = 0  # of so many turns, no summary could be made
        self.full = False  # the last answer has filled the context
        self.cut: remembered.Cut | None = None  # the last answer, if it can go on
        self.editor: lines.EditedLines | None = None
        self.model = ""  # its name, for the bottom line
        self.n_context: int | None = None  # tokens of the conversation, where the timeline holds another one
        self.last: Statistics | None = None
        self.last_disk, self.last_card = "", ("", "")  # in short, and all
        self.read: Stats | None = None  # the engine's counters when the last prompt had been read
        self.learn: Callable[[Statistics, Stats | None, Stats], list[expected.Compared]] = lambda s, read, before: []
        self.think_budget: int | None = settings.sampling.think_budget
        self.sampler: Sampler = settings.sampling.sampler()
        self.commands: dict[str, Callable[[str], object]] = {
            "/effort": self.set_effort,
            "/think": self.set_think,
            "/system": self.set_system,
            "/set": partial(chat_settings.change, self),
            "/image": self.add_image,
            "/file": self.add_file,
            "/paste": self.paste,
            "/drop": self.drop,
            "/new": self.new,
            "/fork": partial(chat_kept.fork, self),
            "/undo": self.undo,
            "/retry": self.retry,
            "/edit": self.edit,
            "/continue": self.resume,
            "/compact": partial(chat_compact.compact, self),
            "/copy": partial(chat_kept.copy, self),
            "/save": partial(chat_kept.save, self),
            "/export": partial(chat_kept.export, self),
            "/stats": self.stats,
            "/help": lambda _: self.tell(HELP),
            "/exit": self.leave,
        }

    def open(self, session: Session | None, system: str | None) -> None:
        """Begins a conversation, or goes on with one; a system prompt that is given now replaces its own."""
        if session is None:
            self.memory.begin(self.dialogue, self.think_budget)
            return
        from ms4.models.sessions import words_of

        remembered.replay(session, self.dialogue)
        sampling, wanted = self.settings.sampling, self.think_budget
        self.sampler, self.think_budget = remembered.sampler_of(session, sampling, session.effort), session.budget
        if self.settings.own_effort or wanted is not None:
            self.take_effort(sampling.effort if self.settings.own_effort else session.effort, wanted)
        if system is not None and system != session.system:
            self.set_system(system)
        n = len(session.all_turns)
        self.recount()
        self.say(f"session {session.id}: {n} turn{'' if n == 1 else 's'}{', the last one:' if n else ''}")
        for turn in session.turns[-1:]:
            self.tell(errors.escape(f"> {words_of(turn.message)}"))
            self.tell(visible.text(turn.text.strip()))
        self.cut = remembered.cut_of(session)
        if self.cut is not None:
            self.say("it was cut; /continue goes on with it")
        if session.torn:
            self.tell("its last turn was cut while it was written, and is left out")

    def close(self) -> None:
        """Keeps what the next chat need not read again."""
        path = self.memory.path
        if path is not None:
            self.memory.keep(self.timeline)
            self.say(f"ms4 chat -c goes on with this conversation, {path.stem}")
        self.memory.close()

    def say(self, text: str) -> None:
        """A remark that only a person needs."""
        if self.interactive:
            self.tell(text)

    def tell(self, text: str) -> None:
        """An answer to a command: beside the conversation, so on stderr."""
        style, plain = (render.DIM, render.PLAIN) if streams.use_colour(sys.stderr) else ("", "")
        if streams.is_terminal(sys.stderr):
            text = wrap.reflow(text, streams.columns(sys.stderr) - 1)
        print(f"{style}{text}{plain}", file=sys.stderr, flush=True)

    def refuse(self, text: str) -> None:
        """What is wrong with a command; without a person it is an error, as the messages after it rest on it."""
        if not self.interactive:
            raise UsageError(text)
        self.tell(text)

    # --- commands

    def command(self, text: str) -> bool:
        """Carries out a line that is no message; False if it is one.  From a pipe, an unknown command is an error."""
        if self.interactive and text.strip() in GOODBYES:
            self.leave("")
            return True
        if chat_attached.run_shell(self, text):
            return True
        match = COMMAND.fullmatch(text)
        name = ALIASES.get(match[1], match[1]) if match else ""
        if match and name in self.commands:
            self.commands[name]((match[2] or "").strip())
            return True
        if self.take_dropped(text):
            return True
        if not match:
            return False
        near = difflib.get_close_matches(name, [*self.commands, *ALIASES], 1)
        said, hint = f"no command {errors.escape(name, 40)}", f"{near[0]}?" if near else "/help lists them"
        if not self.interactive:
            raise UsageError(said, f"{hint.rstrip('?')}; a message that looks like a command needs a space before it.")
        self.tell(f"{said}; {hint}")
        return True

    def set_effort(self, value: str) -> None:
        if value not in LEVELS:
            (self.refuse if value else self.tell)(
                f"effort is {self.effort()}; /effort {', '.join(LEVELS[:-1])} or {LEVELS[-1]}"
            )
            return
        self.take_effort(*thinking(value))
        self.tell(f"effort {value}{self.price()}")

    def take_effort(self, effort: str, budget: int | None) -> None:
        """budget: tokens of thought."""
        if (effort, budget) == (self.dialogue.effort, self.think_budget):
            return
        if effort != self.dialogue.effort:
            self.dialogue.effort = effort
            self.sampler = self.settings.sampling.sampler(effort)
        self.think_budget = budget
        self.memory.effort(effort, budget)

    def effort(self) -> str:
        """What the effort is called."""
        effort, budget = self.dialogue.effort, self.think_budget
        named = [level for level in BUDGETS if thinking(level) == (effort, budget)]
        return named[0] if named else f"{effort}, {budget} tokens" if budget and effort != "none" else effort

    def price(self) -> str:
        """What it costs if the beginning of the prompt has changed: the tokens that will be read again."""
        if not self.dialogue.turns:
            return ""
        import numpy as np

        keys = np.concatenate([self.dialogue.prompt().keys, np.array(self.dialogue.turns[-1].answer or (), np.int64)])
        held = self.timeline.common(keys)
        if held == min(self.timeline.length, len(keys)):
            return ""
        n = len(keys) - held
        rate = self.last.prefill_per_second if self.last else 0.0
        seconds = f", about {n / rate:.0f} s" if rate and n / rate >= 1 else ""
        return f": the next message reads the conversation again ({n} tokens{seconds})"

    def set_think(self, value: str) -> None:
        if value not in ("auto", "show", "hide"):
            (self.refuse if value else self.tell)(f"thoughts: {self.settings.think}; /think show or /think hide")
            return
        self.settings = replace(self.settings, think=value)
        self.tell(f"thoughts: {value}")

    def set_system(self, value: str) -> None:
        self.dialogue.system = value or None
        self.memory.system(self.dialogue.system)
        self.tell(("system prompt set" if value else "no system prompt") + self.price())

    def add_image(self, value: str) -> None:
        self.attach(lambda: self.priced([attachments.open_image(attachments.typed_path(value))]))

    def add_file(self, value: str) -> None:
        self.attach(lambda: chat_attached.open_files(self, value))

    def take_dropped(self, text: str) -> bool:
        """Attaches the files of a line that is nothing but their paths, dropped on the terminal."""
        paths = attachments.dropped(text) if self.interactive else []
        self.attach_files(paths)
        return bool(paths)

    def attach_files(self, paths: Sequence[str]) -> None:
        pdf, rule = self.settings.pdf, self.settings.rule
        if paths:
            self.attach(lambda: self.priced([p for path in paths for p in attachments.open_file(path, pdf, rule)]))

    def paste(self, _: str) -> None:
        self.attach(lambda: self.priced([attachments.clipboard_image()]))

    def n_tokens(self, part: Attachment) -> int:
        return len(self.dialogue.tokenizer.encode(part)) if isinstance(part, str) else self.images.size(part).n_tokens

    def priced(self, parts: list[Attachment]) -> Opened:
        """Attachments, and what each of them costs."""
        prices = [
            f"text of {self.n_tokens(part)} tokens" if isinstance(part, str) else note(part, self.images)
            for part in parts
        ]
        return parts, prices

    def attach(self, load: Callable[[], Opened]) -> None:
        """Opens what a command names; at a terminal a failure is only told."""
        try:
            parts, prices = load()
        except Exception as error:
            code, text, hint = errors.describe(error)
            if not self.interactive or code not in (errors.USAGE, errors.MISSING, errors.UNREADABLE):
                raise
            self.tell(errors.escape(f"{text}; {hint}" if hint else text))
            return
        self.take(parts, prices)

    def take(self, parts: Sequence[Attachment], prices: Sequence[str]) -> None:
        self.attached += parts
        for price in prices:
            self.tell(errors.escape(price))
        if parts:
            self.say("goes with the next message; /drop leaves it out")

    def drop(self, _: str) -> None:
        self.tell("nothing is attached any more" if self.attached else "nothing was attached")
        self.attached.clear()

    def new(self, _: str) -> None:
        if self.memory.path is not None:
            self.memory.keep(self.timeline)
        self.cut = None
        self.dialogue.turns.clear()
        self.recount()
        self.memory.begin(self.dialogue, self.think_budget)
        self.tell("a new conversation")

    def undo(self, value: str) -> None:
        if value and not (value.isascii() and value.isdigit() and 0 < int(value) < 10**6):
            self.tell("/undo N: N is a number of turns")
            return
        self.cut = None
        n = self.dialogue.undo(int(value or 1))
        self.recount()
        self.memory.undo(n)
        self.tell(f"took back {n} turn{'' if n == 1 else 's'}" if n else "there is nothing to take back")

    def retry(self, _: str) -> None:
        if not self.dialogue.turns or self.dialogue.turns[-1].older:
            self.tell("there is nothing to answer again")
            return
        message = self.dialogue.turns[-1].message
        self.memory.undo(self.dialogue.undo())
        self.turn(message)

    def edit(self, _: str) -> None:
        """Takes back the last turn; its text comes into the editor, its images wait for the next message."""
        from ms4.models.sessions import text_of

        if self.editor is None:
            self.tell("/edit needs a terminal")
        elif not self.dialogue.turns or self.dialogue.turns[-1].older:
            self.tell("there is no message to change")
        else:
            message = self.dialogue.turns[-1].message
            self.cut = None
            self.memory.undo(self.dialogue.undo())
            self.recount()
            images = [] if isinstance(message, str) else [c["image"] for c in message if c["type"] == "image"]
            self.attached = [*images, *self.attached]
            self.editor.offer(text_of(message))

    def resume(self, _: str) -> None:
        """Goes on with the last answer, behind the very token at which it was cut."""
        if self.cut is None:
            self.tell("the last answer was not cut; /retry answers the last message again")
        else:
            self.turn(self.dialogue.turns[-1].message, self.cut)

    def stats(self, _: str) -> None:
        self.tell(render.statistics(self.last) + self.last_disk if self.last else "no turn yet")
        if self.last_card[1]:
            self.tell(self.last_card[1])

    def leave(self, _: str) -> None:
        self.over = True

    # --- one turn

    def send(self, text: str) -> None:
        """A message with what is attached to it.  If it is taken back, the attachments wait for the next one."""
        if self.interactive:
            self.attach_files(attachments.named(text))
        attached, self.attached = self.attached, []
        message = attachments.content(attached, text)
        chat_compact.make_room(self, message)
        if not self.turn(message):
            self.attached = attached

    def turn(self, message: Content, cut: remembered.Cut | None = None) -> bool:
        """Sends a message and streams the answer; False: the message was taken back.

        cut: there is a beginning of the answer, with which it goes on.  A failure takes back what was sent, or leaves
        what there was; at a terminal the chat goes on.
        """
        from ms4.models.interrupt import Interrupt

        with Interrupt(until_kept=True) as ctrl_c:
            kept = self._turn(message, cut, ctrl_c)
        chat_compact.go_on(self)
        return kept

    def _turn(self, message: Content, cut: remembered.Cut | None, ctrl_c: Interrupt) -> bool:
        before, self.read, self.n_context = self.scheduler.engine.stats(), None, None
        ids, pieces = (cut.ids, cut.pieces) if cut else ((), remembered.Pieces())
        try:
            with ctrl_c.leaving():
                answer = self.begin(message, ctrl_c.flag, ids)
            done = self.show(answer, self.ready(answer, ctrl_c), pieces, ctrl_c)
        except BaseException as error:
            self.dialogue.answered(ids)
            code, text, hint = errors.describe(error)
            if not self.interactive or code not in (errors.INCOMPLETE, errors.USAGE):
                raise
            hint = hint or ("/compact makes room, /new begins again" if code == errors.INCOMPLETE else "")
            self.tell(f"{text}; {hint}" if hint else text)
            return False
        ids = (*ids, *answer.ids)
        self.dialogue.answered(ids)
        if answer.ids:
            if cut:
                self.memory.undo(1)
            self.memory.turn(message, ids, pieces, done.reason, self.sampler)
        self.cut = remembered.Cut(ids, pieces) if ids and done.reason in remembered.CUT else None
        self.last = done.statistics
        compared = self.learn(done.statistics, self.read, before)
        now = self.scheduler.engine.stats()
        self.last_disk = render.from_disk(now, before) + expected.note_after(compared)
        self.last_card = card.of_turn(now, before)
        self.conclude(done, bool(ids))
        return bool(ids)

    def begin(self, message: Content, stop: StopFlag, ids: Sequence[int] = ()) -> Answer:
        """An answer to the dialogue with this message, or the rest of one that begins with these ids.

        One that does not fit is refused before images are encoded.
        """
        from ms4.models.answer import Answer

        prompt = self.dialogue.resume(ids) if ids else self.dialogue.ask(message)
        n_ctx, most = self.timeline.n_ctx, self.settings.max_tokens
        budget, seconds = self.think_budget, self.settings.sampling.think_seconds
        return Answer(
            prompt,
            self.sampler,
            self.dialogue.tokenizer,
            n_ctx,
            max_tokens=most,
            think_budget=budget,
            think_seconds=seconds,
            stop_flag=stop,
        )

    def ready(self, answer: Answer, ctrl_c: Interrupt) -> np.ndarray | None:
        """The rows of the prompt's images; what is kept of the prompt is in the timeline then."""
        from ms4 import Canceled

        engine = self.scheduler.engine
        try:
            with ctrl_c.leaving():
                rows = image_notes.encode(answer.prompt.images, self.images, engine, self.status, ctrl_c.flag)
        except (Canceled, KeyboardInterrupt):
            if not self.interactive:
                raise
            raise IncompleteError("stopped", "the message is taken back") from None
        if not ctrl_c.flag.is_set():
            self.memory.restore(self.timeline, answer.prompt)  # to be left would part the session from its keys
        return rows

    def show(self, answer: Answer, rows: np.ndarray | None, pieces: remembered.Pieces, ctrl_c: Interrupt) -> Done:
        """Streams one answer, and lets `pieces` see it; returns how it ended."""
        from ms4.models.answer import Prefill
        from ms4.models.answer_parser import Text, Thinking

        screen = render.Screen(self.output, self.settings.markdown)
        thoughts = Thoughts(screen, answer, not self.output.terminal or self.settings.think == "hide")
        pace = Pace(answer)

        def show(event: Event) -> None:
            if self.read is None and not isinstance(event, Prefill):
                self.read = self.scheduler.engine.stats()
            pieces(event)
            with unseen(ctrl_c):
                if isinstance(event, Text):
                    thoughts.end()
                    screen.text(event.text)
                elif isinstance(event, Thinking):
                    thoughts.add(event.text)

        def stand() -> str:
            return self.bar(pace(), thoughts.status())

        def hurry() -> None:
            answer.hurried = True

        live = self.editor is not None and self.settings.live and self.output.has_rows()
        if self.editor:
            self.editor.hurried_by(hurry, thoughts.fold if live else None)
        rows_below = self.editor.live(self.output, stand) if self.editor and live else contextlib.nullcontext()
        done: Done | None = None
        with unseen(ctrl_c), rows_below:
            try:
                hidden = thoughts.folded and not live
                with ctrl_c.leaving():
                    done = follow(self.scheduler, answer, self.timeline, rows, self.status, show, hidden)
            finally:
                if self.editor:
                    self.editor.hurried_by(None)
                thoughts.end()
                screen.end()
        if done is None:  # it failed while the process was being ended
            raise KeyboardInterrupt
        return done

    def bar(self, rate: float = 0.0, status: str = "") -> str:
        """The bottom line."""
        rate = rate or (self.last.decode_per_second if self.last and self.last.n_decode else 0.0)
        n = self.timeline.length if self.n_context is None else self.n_context
        return bottom_line(self.model, self.effort(), n, self.timeline.n_ctx, rate, status)

    def recount(self) -> None:
        """The conversation is another one than that of the last answer."""
        self.n_context = chat_compact.size(self) if self.dialogue.turns else 0

    def conclude(self, done: Done, kept: bool) -> None:
        if done.reason == "interrupted":
            if not self.interactive:
                raise KeyboardInterrupt
            self.tell(
                "stopped; what there is is kept, /continue goes on" if kept else "stopped; the message is taken back"
            )
        elif done.reason == "context":
            n_ctx, most = done.statistics.n_ctx, self.scheduler.engine.shape.n_ctx_train
            if not self.interactive:
                raise IncompleteError(f"the context of {n_ctx} tokens is full", loading.more_context(n_ctx, most))
            self.full = True
            more = loading.more_context(n_ctx, most)
            self.tell(f"the context of {n_ctx} tokens is full; /compact makes room, {more}")
        elif done.reason == "length":
            self.say("cut by --max-tokens; /continue goes on")
        s = done.statistics
        context = f"ctx {render.short(s.n_context)}/{render.short(s.n_ctx)}"
        self.say(" · ".join(filter(None, [render.rate(s), self.last_card[0], context, f"effort {self.effort()}"])))
        chat_compact.warn(self, s)
