"""`ms4 trace`: records which experts a model chooses while it answers prompts, or makes a trace of stated skew."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ms4.cli import errors, loading, render, streams
from ms4.cli.errors import UnreadableError, UsageError
from ms4.cli.options import EngineOptions
from ms4.models.untrusted import Reading

if TYPE_CHECKING:
    import ms4
    from ms4.models.prompt import Prompt
    from ms4.models.routing import Trace
    from ms4.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """prompts: a file of prompts, one a line; chat: one of conversations, JSON objects; "" is none, - is stdin."""

    prompts: str
    chat: str
    output: str
    max_tokens: int
    n_ctx: int
    effort: str


def trace(job: Job, engine: EngineOptions, rule: Reading) -> int:
    """Answers every prompt in a context of its own, the likeliest token each time, and writes the trace."""
    from ms4.models.interrupt import interruptible
    from ms4.models.routing import Recorder

    if bool(job.prompts) == bool(job.chat):
        raise UsageError("name one file: prompts, one a line, or conversations after --chat", "ms4 trace --help")
    engine.require()
    name = job.prompts or job.chat
    text = streams.read_stdin(rule, engine.quiet) if name == "-" else streams.read_text(name, rule)
    if not text or text.isspace():
        raise UnreadableError(f"{'stdin' if name == '-' else name}: no prompts")
    status = render.StatusLine(engine.quiet)
    with loading.open_model(engine, status, n_tokens=job.n_ctx) as model:
        if model.shape.n_dense_layer == model.shape.n_layer:
            raise UsageError("this model has no experts, so there is no routing to record")
        tokenizer = loading.usable(model.vocabulary)
        n_ctx = loading.context_for(model, job.n_ctx)
        prompts = [prompt_of(line, number, name, job, tokenizer) for number, line in lines_of(text)]
        begun = time.monotonic()
        with Recorder(model.engine) as recorder, model.session(n_ctx) as session, interruptible() as stop:
            for i, prompt in enumerate(prompts):
                status.show(f"prompt {i + 1}/{len(prompts)}  {time.monotonic() - begun:.0f} s")
                answer(prompt, job, session, tokenizer, stop)
    status.clear()
    return write(recorder.trace(), job.output, engine.quiet)


def lines_of(text: str) -> Sequence[tuple[int, str]]:
    """(number, line) of those that are not empty.  Not splitlines(): JSON may hold U+2028 and its like unescaped."""
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def prompt_of(line: str, number: int, name: str, job: Job, tokenizer: Tokenizer) -> Prompt:
    from ms4.models.prompt import PromptError, parse_line, render

    if job.prompts:
        return render([{"role": "user", "content": line}], tokenizer, effort=job.effort)
    try:
        messages, tools, effort = parse_line(line)
        return render(messages, tokenizer, tools=tools, effort=effort)
    except PromptError as error:
        raise UnreadableError(f"{name}, line {number}: {error}") from None


def answer(prompt: Prompt, job: Job, session: ms4.Session, tokenizer: Tokenizer, stop: ms4.StopFlag) -> None:
    """The likeliest token each time, until the answer or the context is at its end."""
    from ms4.models.answer import Answer
    from ms4.models.sampling import Sampler, SamplingParams

    sampler = Sampler(SamplingParams.for_effort("none", greedy=True))
    most = max(1, min(job.max_tokens, session.n_ctx - len(prompt.ids)))
    writing = Answer(prompt, sampler, tokenizer, session.n_ctx, max_tokens=most)
    session.rewind(0)
    writing.choose(session.feed(prompt.ids, stop=stop))
    while writing.reason is None:
        writing.choose(session.feed(writing.ids[-1:], stop=stop))


def make(skew: str, n_tokens: int, output: str, seed: int, quiet: bool) -> int:
    """A synthetic trace of the real model's shape, whose first tenth is a prompt."""
    from ms4.models.routing import SKEWS, synthetic

    return write(synthetic(SKEWS[skew], n_tokens, n_prompt=n_tokens // 10, seed=seed), output, quiet)


def write(trace: Trace, output: str, quiet: bool) -> int:
    """The trace, into a file that appears when it is whole; - is stdout."""
    with streams.open_bytes(output) as file:
        trace.save(file)
    if not quiet:
        n_prompts = int((trace.rows.max(axis=1) > 1).sum())
        errors.note(f"{trace.n_decode} tokens written and {n_prompts} steps of prompts, {trace.n_layer_used} layers")
    return errors.OK
