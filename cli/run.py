"""`ms4 run`: one prompt in, one answer out.

The order is: what was typed is checked, then stdin is read, then the model is opened; nothing is computed for a prompt
that cannot be answered.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ms4
from ms4.cli import errors, image_notes, loading, render, streams, writers
from ms4.cli.attachments import Sources, gather
from ms4.cli.errors import IncompleteError, UsageError
from ms4.cli.follow import follow
from ms4.cli.image_notes import ImageOptions
from ms4.cli.options import EngineOptions, Sampling
from ms4.models.untrusted import Reading, drop_line_end
from ms4.quant import visible

if TYPE_CHECKING:
    from ms4.models.answer import Answer, ContextError, Done, Event
    from ms4.models.model import Model
    from ms4.models.sampling import Sampler
    from ms4.models.vision import ImageInput


SHORT = 1024  # tokens that every context of a usable model holds
OVERHEAD = 128  # tokens of a prompt that are not its texts


@dataclass(frozen=True)
class Request:
    """What `ms4 run` was asked for, as far as it does not concern the engine or the choice of tokens."""

    words: tuple[str, ...]
    attached: Sources = Sources()
    images: ImageOptions = ImageOptions()
    system: str | None = None
    prefill: str = ""
    only: str = ""  # "prompt" or "count": show it and stop
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_ctx: int = 0
    format: str = "text"
    think: str = "auto"
    output: str | None = None
    stats: bool = False
    logprobs: int | None = None
    strict: bool = False


def run(request: Request, sampling: Sampling, engine: EngineOptions) -> int:
    """Carries out one `ms4 run` and returns its exit code."""
    if request.logprobs is not None and request.format == "text":
        raise UsageError("--logprobs needs --format json or jsonl")
    if not all(request.stop):
        raise UsageError("--stop needs a text that is not empty")
    sampler = sampling.sampler()
    if request.words or request.attached or streams.is_terminal(sys.stdin):
        engine.require()
    messages = build_messages(request)
    status = render.StatusLine(engine.quiet)
    images = request.images.open(engine.require())
    announced = image_notes.announce(messages, images, engine.quiet)
    if request.only:
        return show_prompt(request, sampling, engine, messages, images)
    output = streams.Output(request.output)
    name = os.path.basename(engine.require())
    about = writers.About(name, ms4.__version__, sampling.effort, sampler.seed, request.prefill, None, announced)
    try:
        check_length(messages, request.n_ctx, request.max_tokens, sampling.effort, engine, images)
    except BaseException as error:
        new_writer(request, output, about).failed(*errors.describe(error))
        output.close()
        raise
    begun = time.monotonic()
    with loading.open_model(engine, status) as model:
        load_ms = round(1000 * (time.monotonic() - begun))
        writer = new_writer(request, output, replace(about, load_ms=load_ms))
        job = Job(request, model, sampler, writer, status, images)
        try:
            return job.answer(messages, sampling.effort)
        except BaseException as error:
            job.writer.failed(*errors.describe(error))
            raise
        finally:
            output.close()


def build_messages(request: Request) -> list[dict[str, Any]]:
    """System prompt, question with what is attached, beginning of the answer."""
    messages: list[dict[str, Any]] = []
    question = gather(request.attached, request.words)
    if request.system is not None:
        messages.append({"role": "system", "content": system_text(request.system, request.attached.rule)})
    messages.append({"role": "user", "content": question})
    if request.prefill:
        text = streams.argument(request.prefill, "--prefill", request.attached.rule)
        messages.append({"role": "assistant", "content": text, "prefix": True})
    return messages


def system_text(given: str, rule: Reading) -> str:
    """The text of --system: given as it is, or in the file behind an @."""
    if not given.startswith("@"):
        return streams.argument(given, "--system", rule)
    return drop_line_end(streams.read_text(given[1:], rule))


def check_length(
    messages: Sequence[dict[str, Any]],
    n_ctx: int,
    max_tokens: int | None,
    effort: str,
    engine: EngineOptions,
    images: "ImageInput",
) -> None:
    """An error for a prompt that is too long, before the weights are loaded: the tokenizer is enough.

    A short text, which has no more tokens than bytes, is not worth a second look at the header of the file.
    """
    texts = [message["content"] for message in messages]
    if all(isinstance(text, str) for text in texts):
        n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        if n_bytes + (max_tokens or 1) + OVERHEAD <= min(n_ctx, SHORT):
            return
    from ms4.models import mistral4
    from ms4.models import prompt as prompts
    from ms4.models.answer import ContextError
    from ms4.models.vocabulary import Vocabulary
    from ms4.quant.gguf_file import GgufFile

    gguf = GgufFile.open(engine.require())
    most = mistral4.shape_of(gguf).n_ctx_train
    n_ctx = loading.context_within(most, n_ctx)
    tokenizer = loading.usable(Vocabulary.from_gguf(gguf))
    n_prompt = len(prompts.render(messages, tokenizer, effort=effort, measure=images.measure).ids)
    if n_prompt + (max_tokens or 1) > n_ctx:
        raise no_room(ContextError(n_prompt, n_ctx, max_tokens), most)


def show_prompt(
    request: Request, sampling: Sampling, engine: EngineOptions, messages: list[dict[str, Any]], images: "ImageInput"
) -> int:
    """--count and --show-prompt: the tokenizer is enough, the weights stay closed."""
    from ms4.models import prompt as prompts

    tokenizer = loading.open_tokenizer(engine.require())
    ids = prompts.render(messages, tokenizer, effort=sampling.effort, measure=images.measure).ids
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
    return writers.TextWriter(output, request.think, about.prefill)


@dataclass(frozen=True)
class Job:
    """One answer under way."""

    request: Request
    model: "Model"
    sampler: "Sampler"
    writer: writers.Writer
    status: render.StatusLine
    images: "ImageInput"

    def answer(self, messages: list[dict[str, Any]], effort: str) -> int:
        """Renders the prompt, answers it, and judges how that ended."""
        from ms4.models import prompt as prompts
        from ms4.models.answer import Answer, ContextError

        request = self.request
        tokenizer = loading.usable(self.model.vocabulary)
        prompt = prompts.render(messages, tokenizer, effort=effort, measure=self.images.measure)
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
            )
        except ContextError as error:
            raise no_room(error, self.model.engine.shape.n_ctx_train) from None
        done, answered = self.follow(answer)
        code, message = verdict(done, answered or bool(request.prefill), request.strict)
        self.writer.done(done, code)
        if message:
            errors.note(f"error: {message}")
        if request.stats:
            errors.note(render.statistics(done.statistics, self.images.seconds))
        return code

    def follow(self, answer: "Answer") -> tuple["Done", bool]:
        """Passes every event to the writer.  Returns the last one, and whether there was any text or tool call."""
        from ms4.models.answer_parser import Text, ToolCall
        from ms4.models.scheduler import Scheduler

        answered = False
        continuation = writers.Continuation(self.request.prefill)

        def show(event: "Event") -> None:
            nonlocal answered
            answered = answered or isinstance(event, (Text, ToolCall))
            if rest := continuation.event(event):
                self.writer.event(rest)

        engine = self.model.engine
        rows = image_notes.encode(answer.prompt.images, self.images, engine, self.status, answer.stop_flag)
        with Scheduler(engine) as scheduler:
            timeline = scheduler.open(answer.n_ctx)
            done = follow(scheduler, answer, timeline, rows, self.status, show, self.writer.hides_thoughts)
        return done, answered


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


def verdict(done: "Done", answered: bool, strict: bool) -> tuple[int, str]:
    """(exit code, what to say) for the way in which a generation ended."""
    s = done.statistics
    if done.reason == "interrupted":
        return errors.INTERRUPTED, ""
    if done.reason == "context":
        return errors.INCOMPLETE, f"the context of {s.n_ctx} tokens is full; --ctx allows more"
    if not answered and s.n_thinking and done.reason == "stop":
        return errors.INCOMPLETE, f"the model ended by itself after {s.n_thinking} tokens of thought, without an answer"
    if not answered and s.n_thinking and done.reason != "tool_calls":
        return errors.INCOMPLETE, f"{s.n_thinking} tokens of thought and no answer; allow more with --max-tokens"
    if done.reason == "length" and strict:
        return errors.INCOMPLETE, f"--max-tokens cut the answer after {s.n_answer} tokens"
    return errors.OK, ""
