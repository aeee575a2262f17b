"""`ms4 run`: one prompt in, one answer out.

The order is: what was typed is checked, then stdin is read, then the model is opened; nothing is computed for a prompt
that cannot be answered.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import ms4
from ms4.cli import card, errors, expected, image_notes, loading, remembered, render, streams, writers
from ms4.cli.asked import Asked, ask
from ms4.cli.attachments import Sources
from ms4.cli.errors import IncompleteError, UsageError
from ms4.cli.follow import follow
from ms4.cli.image_notes import ImageOptions
from ms4.cli.options import EngineOptions, Sampling
from ms4.cli.templates import Filling
from ms4.models.untrusted import Reading
from ms4.quant import visible

if TYPE_CHECKING:
    from ms4.models.answer import Answer, ContextError, Done, Event
    from ms4.models.constraint import Grammar
    from ms4.models.model import Model
    from ms4.models.sampling import Sampler
    from ms4.models.tokenizer import Tokenizer
    from ms4.models.vision import ImageInput


SHORT = 1024  # tokens that every context of a usable model holds
LONG = 1024  # tokens of a prompt that is kept for another question about it
OVERHEAD = 128  # tokens of a prompt that are not its texts


@dataclass(frozen=True)
class Request:
    """What `ms4 run` was asked for, as far as it does not concern the engine or the choice of tokens."""

    words: tuple[str, ...]
    attached: Sources = Sources()
    images: ImageOptions = ImageOptions()
    system: str | None = None
    prefill: str = ""
    fill: Filling | None = None  # the prompt of a template
    effort: str | None = None  # None: what the file of messages says, else none
    resume: str | None = None  # the session to go on with: its id, or "" for the last one
    no_session: bool = False
    messages: str | None = None  # files
    tools: str | None = None
    schema: str | None = None  # a file, or the schema itself
    json_object: bool = False
    extract: bool = False
    timeout: float | None = None
    only: str = ""  # "prompt" or "count": show it and stop
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_ctx: int = 0
    format: str = "text"
    think: str = "auto"
    markdown: bool = True
    output: str | None = None
    stats: bool = False
    logprobs: int | None = None
    strict: bool = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Request":
        """From the options of the command by their names, as `main.run` takes them."""
        engine: EngineOptions = given["engine"]
        rule = Reading(given["encoding"], given["lossy"], given["pdf_password"])
        same = {field.name: given[field.name] for field in fields(cls) if field.name in given}
        return cls(
            **same
            | {
                "words": tuple(given["prompt"] or ()),
                "attached": Sources.of(
                    given["image"], given["file"], given["pdf"], rule, not given["no_stdin"], engine.quiet
                ),
                "images": ImageOptions(given["mmproj"], given["image_max_tokens"]),
                "fill": Filling.of(given["template"], given["param"]),
                "resume": "" if given["goes_on"] and given["resume"] is None else given["resume"],
                "only": "prompt" if given["show_prompt"] else "count" if given["count"] else "",
                "stop": tuple(given["stop"] or ()),
                "n_ctx": given["ctx"],
                "stats": given["stats"] or engine.verbose,
                "format": "text" if given["format"] == "auto" else given["format"],
            }
        )


def run(request: Request, sampling: Sampling, engine: EngineOptions) -> int:
    """Carries out one `ms4 run` and returns its exit code."""
    begun = time.monotonic()
    check_request(request)
    grammar = grammar_of(request)
    sampling.sampler()  # a setting out of range is said before anything is read
    session = remembered.chosen(request.resume, request.words)
    if request.words or request.attached or request.messages or request.fill or streams.is_terminal(sys.stdin):
        engine.require()
    asked = ask(
        request.words,
        request.attached,
        request.effort,
        system=request.system,
        prefill=request.prefill,
        messages=request.messages,
        tools=request.tools,
        session=session,
        fill=request.fill,
    )
    sampling = replace(sampling, effort=asked.effort)
    if session is not None and request.effort is None and sampling.think_budget is None:
        sampling = replace(sampling, think_budget=session.budget)
    sampler = remembered.sampler_of(session, sampling, asked.effort)
    status = render.StatusLine(engine.quiet)
    images = request.images.open(engine.require())
    announced = image_notes.announce(asked.messages, images, engine.quiet)
    if request.only:
        return show_prompt(request, asked, engine, images)
    output = streams.Output(request.output)
    name = os.path.basename(engine.require())
    about = writers.About(name, ms4.__version__, sampling.effort, sampler.seed, request.prefill, None, announced)
    try:
        n_tokens = check_length(asked, request.n_ctx, request.max_tokens, engine, images)
    except BaseException as error:
        new_writer(request, output, about).failed(*errors.describe(error))
        output.close()
        raise
    loading_begun = time.monotonic()
    with loading.open_model(engine, status, n_tokens=n_tokens) as model:
        load_ms = round(1000 * (time.monotonic() - loading_begun))
        writer = new_writer(request, output, replace(about, load_ms=load_ms))
        end = None if request.timeout is None else begun + request.timeout
        off = not remembered.wanted(request.no_session) or request.messages is not None or bool(request.prefill)
        memory = remembered.Memory(engine, request.images, errors.note, off=off, session=session)
        job = Job(request, model, sampler, writer, status, images, memory, grammar, end, sampling)
        try:
            return job.answer(asked)
        except BaseException as error:
            job.writer.failed(*errors.describe(error))
            raise
        finally:
            output.close()


def check_request(request: Request) -> None:
    """UsageError for options that exclude or need each other."""
    if request.logprobs is not None and request.format == "text":
        raise UsageError("--logprobs needs --format json or jsonl")
    if request.tools is not None and request.format == "text" and not request.only:
        raise UsageError("--tools needs --format json or jsonl, which have a place for calls")
    if not all(request.stop):
        raise UsageError("--stop needs a text that is not empty")
    if request.extract and request.format != "text":
        raise UsageError("--extract is for the text of an answer, --format text")
    schema, prefill, tools = ("--schema", request.schema), ("--prefill", request.prefill), ("--tools", request.tools)
    messages, extract = ("--messages", request.messages), ("--extract", request.extract)
    any_object = ("--json-object", request.json_object)
    exclude(("-c", request.resume), messages, prefill, tools)
    exclude(schema, any_object, prefill, tools, extract)
    exclude(any_object, prefill, tools, extract)


def exclude(one: tuple[str, object], *others: tuple[str, object]) -> None:
    """UsageError if an option is given together with one of the others: (name, what was given)."""
    for name, given in others:
        if one[1] not in (None, False) and given not in (None, False, ""):
            raise UsageError(f"{one[0]} and {name} exclude each other")


def grammar_of(request: Request) -> "Grammar | None":
    """What --schema or --json-object hold the answer to."""
    if request.schema is None and not request.json_object:
        return None
    from ms4.models.constraint import Grammar
    from ms4.models.schema import OBJECT, read_schema

    if request.schema is None:
        return Grammar(OBJECT)
    text = request.schema
    if text.startswith("@") or os.path.exists(text):
        text = streams.read_text(text.removeprefix("@"), request.attached.rule)
    return Grammar(read_schema(text))


def check_length(asked: Asked, n_ctx: int, max_tokens: int | None, engine: EngineOptions, images: "ImageInput") -> int:
    """An error for a prompt that is too long, before the weights are loaded: the tokenizer is enough.

    Returns how many tokens will be held at the most, the answer among them: an answer without an end may fill n_ctx.

    A short text, which has no more tokens than bytes, is not worth a second look at the header of the file.
    """
    contents = [message.get("content") for message in asked.messages]
    texts = [content for content in contents if isinstance(content, str)]
    if not asked.tools and asked.session is None and len(texts) == len(contents):
        n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        most = n_bytes + (max_tokens or 1) + OVERHEAD
        if most <= min(n_ctx, SHORT):
            return most if max_tokens else n_ctx
    from ms4.models import mistral4
    from ms4.models.answer import ContextError
    from ms4.models.vocabulary import Vocabulary
    from ms4.quant.gguf_file import GgufFile

    gguf = GgufFile.open(engine.require())
    most = mistral4.shape_of(gguf).n_ctx_train
    n_ctx = loading.context_within(most, n_ctx)
    tokenizer = loading.usable(Vocabulary.from_gguf(gguf))
    n_prompt = len(asked.prompt(tokenizer, images.measure).ids)
    if n_prompt + (max_tokens or 1) > n_ctx:
        raise no_room(ContextError(n_prompt, n_ctx, max_tokens), most)
    return n_prompt + max_tokens if max_tokens else n_ctx


def show_prompt(request: Request, asked: Asked, engine: EngineOptions, images: "ImageInput") -> int:
    """--count and --show-prompt: the tokenizer is enough, the weights stay closed."""
    tokenizer = loading.open_tokenizer(engine.require())
    ids = asked.prompt(tokenizer, images.measure).ids
    output = streams.Output(request.output)
    if request.only == "count":
        output.write(f"{len(ids)}\n")
    else:
        spelled = b"".join(tokenizer.spelling(id) for id in ids).decode("utf-8", "replace")
        output.write((visible.text(spelled) if output.terminal else spelled) + "\n")
    output.close()
    return errors.OK


def new_writer(request: Request, output: streams.Output, about: writers.About) -> writers.Writer:
    if request.format == "json":
        return writers.JsonWriter(output, about)
    if request.format == "jsonl":
        return writers.JsonlWriter(output, about)
    if request.extract:
        return writers.BlockWriter(output, request.think, about.prefill)
    return writers.TextWriter(output, request.think, about.prefill, request.markdown)


@dataclass(frozen=True)
class Job:
    """One answer under way."""

    request: Request
    model: "Model"
    sampler: "Sampler"
    writer: writers.Writer
    status: render.StatusLine
    images: "ImageInput"
    memory: remembered.Memory
    grammar: "Grammar | None" = None
    end: float | None = None  # when --timeout is over
    sampling: Sampling = Sampling()
    read: list[ms4.Stats | None] = field(default_factory=lambda: [None])  # the counters behind the prompt

    @property
    def remembers(self) -> bool:
        """True if another call may go on from here."""
        return self.request.resume is not None or self.writer.output.terminal

    def answer(self, asked: Asked) -> int:
        """Renders the prompt, answers it, and judges how that ended."""
        from ms4.models.answer import Answer, ContextError
        from ms4.models.constraint import Constraint

        request = self.request
        tokenizer = loading.usable(self.model.vocabulary)
        prompt = asked.prompt(tokenizer, self.images.measure)
        free = asked.effort != "none"
        held = Constraint(self.grammar, tokenizer, may_think=free) if self.grammar else None
        n_ctx = loading.context_for(self.model, request.n_ctx)
        try:
            answer = Answer(
                prompt,
                self.sampler,
                tokenizer,
                n_ctx,
                max_tokens=request.max_tokens,
                stop=request.stop,
                logprobs=request.logprobs,
                constraint=held,
                think_budget=self.sampling.think_budget,
                think_seconds=self.sampling.think_seconds,
            )
        except ContextError as error:
            raise no_room(error, self.model.engine.shape.n_ctx_train) from None
        pieces = asked.resumed.pieces if asked.resumed else remembered.Pieces()
        with deadline(answer, self.end) as late:
            done, answered = self.follow(answer, pieces)
        self.record(asked, tokenizer, answer, pieces)
        most = self.model.engine.shape.n_ctx_train
        code, message = verdict(done, answered or bool(request.prefill), request.strict, most)
        if late() and done.reason == "interrupted":
            code, message = errors.INCOMPLETE, f"--timeout {request.timeout:g} cut the answer"
        elif held and not held.complete and code in (errors.OK, errors.INCOMPLETE):
            code, message = errors.FORM, message or unfinished(done)
        self.writer.done(done, code)
        if message:
            errors.note(f"error: {message}")
        compared = expected.learn(self.model, done.statistics, *self.read)
        if request.stats:
            stats = self.model.engine.stats()
            disk = render.from_disk(stats) + expected.note_after(compared)
            errors.note(render.statistics(done.statistics, self.images.seconds) + disk)
            if stats.device != "cpu":
                errors.note(card.line(stats))
        return code

    def record(self, asked: Asked, tokenizer: "Tokenizer", answer: "Answer", pieces: remembered.Pieces) -> None:
        """Writes the turn into its session: that of -c, or at a terminal a new one."""
        if not answer.ids or not self.remembers:
            return
        dialogue = asked.dialogue(tokenizer, self.images.measure)
        if asked.session is None:
            self.memory.begin(dialogue, self.sampling.think_budget)
        else:
            effort = dialogue.effort, self.sampling.think_budget
            if effort != (asked.session.effort, asked.session.budget):
                self.memory.effort(*effort)
            if dialogue.system != asked.session.system:
                self.memory.system(dialogue.system)
        before = asked.resumed.ids if asked.resumed else ()
        if before:
            self.memory.undo(1)
        self.memory.turn(asked.question, (*before, *answer.ids), pieces, answer.reason or "", self.sampler)
        self.memory.close()

    def follow(self, answer: "Answer", pieces: remembered.Pieces) -> tuple["Done", bool]:
        """Passes every event to the writer.  Returns the last one, and whether there was any text or tool call."""
        from ms4.models.answer import Prefill
        from ms4.models.answer_parser import Text, ToolCall
        from ms4.models.interrupt import interruptible
        from ms4.models.scheduler import Scheduler

        answered = False
        continuation = writers.Continuation(self.request.prefill)

        def show(event: "Event") -> None:
            nonlocal answered
            if None in self.read and not isinstance(event, Prefill):
                self.read[:] = [engine.stats()]
            answered = answered or isinstance(event, (Text, ToolCall))
            pieces(event)
            if rest := continuation.event(event):
                self.writer.event(rest)

        engine = self.model.engine
        with Scheduler(engine) as scheduler:
            with interruptible(answer.stop_flag) as stop:
                rows = image_notes.encode(answer.prompt.images, self.images, engine, self.status, stop)
                timeline = scheduler.open(answer.n_ctx)
                self.memory.restore(timeline, answer.prompt)
                done = follow(scheduler, answer, timeline, rows, self.status, show, self.writer.hides_thoughts)
            if self.remembers or len(answer.prompt.ids) >= LONG:
                self.memory.keep(timeline)
        return done, answered


@contextmanager
def deadline(answer: "Answer", end: float | None) -> Iterator[Callable[[], bool]]:
    """Stops the answer at that time (of time.monotonic), if it still runs; gives what says whether it did."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        answer.stop_flag.set()

    timer = None if end is None else threading.Timer(max(0.0, end - time.monotonic()), stop)
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield late.is_set
    finally:
        if timer:
            timer.cancel()


def unfinished(done: "Done") -> str:
    """Why an answer does not keep to its schema."""
    how = {"length": "--max-tokens cut it", "stop": "--stop cut it" if done.stop else "the model ended it"}
    return f"the answer does not complete the schema: {how.get(done.reason, 'it was cut')}"


def no_room(error: "ContextError", most: int) -> IncompleteError:
    """What to say if the prompt, or the answer that was asked for, does not fit; most: what the model allows."""
    wanted = error.n_prompt + (error.max_tokens or 1)
    hint = f"--ctx {wanted}" if wanted <= most else f"the model itself holds at most {most} tokens"
    if error.n_prompt >= error.n_ctx:
        return IncompleteError(f"the prompt has {error.n_prompt} tokens, the context {error.n_ctx}", hint)
    return IncompleteError(
        f"the prompt has {error.n_prompt} tokens and --max-tokens is {error.max_tokens}, "
        f"together more than the context of {error.n_ctx}",
        hint,
    )


def verdict(done: "Done", answered: bool, strict: bool, most: int) -> tuple[int, str]:
    """(exit code, what to say) for the way in which a generation ended; most: tokens that the model allows."""
    s = done.statistics
    if done.reason == "interrupted":
        return errors.INTERRUPTED, ""
    if done.reason == "context":
        return errors.INCOMPLETE, f"the context of {s.n_ctx} tokens is full; {loading.more_context(s.n_ctx, most)}"
    if not answered and s.n_thinking and done.reason == "stop":
        return errors.INCOMPLETE, f"the model ended by itself after {s.n_thinking} tokens of thought, without an answer"
    if not answered and s.n_thinking and done.reason != "tool_calls":
        return errors.INCOMPLETE, f"{s.n_thinking} tokens of thought and no answer; allow more with --max-tokens"
    if done.reason == "length" and strict:
        return errors.INCOMPLETE, f"--max-tokens cut the answer after {s.n_answer} tokens"
    return errors.OK, ""
