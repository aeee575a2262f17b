"""`ms4 batch`: a file of prompts in, a line of JSON for each answer out, several computed together.

Answers are written as they end, each as one line, so whatever stops the process loses only what was under way; the same
command goes on with the rest.  An answer is the one that `ms4 run` gives with the same options and seed, because the
bits of a step do not depend on its company.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ms4.cli import errors, loading, render, streams
from ms4.cli.asked import system_text
from ms4.cli.errors import CliError, UnreadableError, UsageError
from ms4.cli.options import EngineOptions, Sampling, thinking
from ms4.cli.run import verdict
from ms4.cli.templates import Filling
from ms4.models.untrusted import Reading, shown

if TYPE_CHECKING:
    from ms4.models.answer import Answer, Done
    from ms4.models.constraint import Grammar
    from ms4.models.model import Model
    from ms4.models.scheduler import Scheduler
    from ms4.models.timeline import Timeline
    from ms4.models.tokenizer import Tokenizer

# What a line may have beside its id: with the names of OpenAI's chat API where that has them.
FIELDS = ("prompt", "messages", "system", "tools", "schema", "reasoning_effort", "max_tokens", "stop")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
PASSED_OVER = ("model", "stream", "method", "url")  # of OpenAI's batches: there is one model, and one place to answer


@dataclass(frozen=True)
class Job:
    """What holds for every line that does not say otherwise."""

    path: str  # of the prompts; "-" is stdin
    output: str | None
    sampling: Sampling
    system: str | None = None
    schema: str | None = None  # a file, or the schema itself
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_ctx: int = 0
    together: int = 4  # answers under way at the same time
    strict: bool = False
    fill: Filling | None = None  # what a template makes of each prompt


@dataclass(frozen=True)
class Item:
    """One line."""

    id: str | int
    where: str
    messages: list[Any]
    tools: list[Any] | None
    sampling: Sampling
    grammar: Grammar | None
    max_tokens: int | None
    stop: tuple[str, ...]
    sha256: str  # of what was asked, so that another question under the same id is noticed


@dataclass
class Result:
    """An answer that ended, or why there is none."""

    item: Item
    text: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    done: Done | None = None
    complete: bool = True  # it keeps to its schema, if it has one
    error: BaseException | None = None


def batch(job: Job, engine: EngineOptions, rule: Reading) -> int:
    """Carries out one `ms4 batch` and returns its exit code: that of the answers, if they agree, else 1."""
    job.sampling.sampler()  # a setting out of range is said before anything is read
    items = read_items(job, engine, rule)
    with Lines(job) as lines:
        waiting = [item for item in items if not lines.has(item)]
        if len(waiting) < len(items) and not engine.quiet:
            errors.note(f"{len(items) - len(waiting)} of {len(items)} are answered already")
        if not waiting:
            return lines.code()
        engine.require()
        status = render.StatusLine(engine.quiet)
        with loading.open_model(engine, status) as model:
            work = Work(job, model, waiting, lines, status)
            try:
                work.carry_out()
            except KeyboardInterrupt:
                if not engine.quiet:
                    left = sum(not lines.has(item) for item in items)
                    again = "the same command goes on" if job.output else "-o FILE would let the same command go on"
                    errors.note(f"{len(items) - left} of {len(items)} answered; {again}")
                raise
            finally:
                status.clear()
        return lines.code()


# --- what is asked


def read_items(job: Job, engine: EngineOptions, rule: Reading) -> list[Item]:
    """The lines of the file; the first mistake in any of them is an error before the model is opened."""
    name = "stdin" if job.path == "-" else shown(job.path)
    text = streams.read_stdin(rule, engine.quiet) if job.path == "-" else streams.read_text(job.path, rule)
    # Not splitlines(): JSON may hold U+2028 and its like unescaped.
    rows = [(n, line.rstrip("\r")) for n, line in enumerate((text or "").split("\n"), 1) if line.strip()]
    if not rows:
        raise UnreadableError(f"{name}: no prompts")
    as_json = rows[0][1].lstrip().startswith("{")
    system, schema = None if job.system is None else system_text(job.system, rule), job.schema
    if schema is not None and (schema.startswith("@") or os.path.exists(schema)):
        schema = streams.read_text(schema.removeprefix("@"), rule)
    job = replace(job, system=system, schema=schema)
    grammars: dict[str, Grammar] = {}
    items, seen = [], dict[str, int]()
    for number, line in rows:
        where = f"{name}, line {number}"
        fields = parsed(line, where) if as_json else {"prompt": line}
        if job.fill and isinstance(fields.get("prompt"), str):
            fields["prompt"] = job.fill(fields["prompt"])
        item = item_of(fields, number, where, job, grammars)
        if item.id in seen or str(item.id) in seen:
            raise UnreadableError(f"{where}: the id {item.id!r} is that of line {seen[str(item.id)]}, too")
        seen[str(item.id)] = number
        items.append(item)
    return items


def parsed(line: str, where: str) -> dict[str, Any]:
    """The fields of a line; those in the "body" of OpenAI's batches stand beside its id."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UnreadableError(f"{where}: not an object", '{"id": "a", "prompt": "..."}')
    body = value.pop("body", {})
    fields = {**value, **body} if isinstance(body, dict) else value
    if "custom_id" in fields:
        fields["id"] = fields.pop("custom_id")
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    fields = {key: value for key, value in fields.items() if key not in PASSED_OVER}
    if strange := [key for key in fields if key not in ("id", *FIELDS, *SAMPLING)]:
        raise UnreadableError(f"{where}: no such field {strange[0]}", f"there are id, {', '.join(FIELDS + SAMPLING)}")
    return fields


def item_of(fields: dict[str, Any], number: int, where: str, job: Job, grammars: dict[str, Grammar]) -> Item:
    from ms4.models.conversation import PromptError, read_conversation, read_tools
    from ms4.models.sampling import SamplingError

    id = fields.get("id", number)
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        raise UnreadableError(f"{where}: the id is neither a text nor a whole number")
    system, schema = fields.get("system", job.system), fields.get("schema", job.schema)
    max_tokens, stop = fields.get("max_tokens", job.max_tokens), fields.get("stop", list(job.stop))
    stop = [stop] if isinstance(stop, str) else stop
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise UnreadableError(f"{where}: max_tokens is not a whole number above 0")
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise UnreadableError(f"{where}: stop is not a text or a list of texts")
    try:
        messages = messages_of(fields, system)
        read_conversation(messages)
        read_tools(fields.get("tools"))
        sampling = sampling_of(fields, job.sampling)
        sampling.sampler()
        grammar = grammar_of(schema, grammars)
    except (PromptError, SamplingError, ValueError, TypeError, KeyError) as error:
        raise UnreadableError(f"{where}: {error}") from None
    if grammar and fields.get("tools"):
        raise UnreadableError(f"{where}: a schema and tools exclude each other")
    asked = [messages, fields.get("tools"), schema, max_tokens, stop, vars(sampling)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Item(id, where, messages, fields.get("tools"), sampling, grammar, max_tokens, tuple(stop), digest)


def messages_of(fields: dict[str, Any], system: Any) -> list[Any]:
    """The conversation of a line; ValueError with what is wrong."""
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError("either prompt or messages is needed")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError("the prompt is empty or no text")
    messages = [{"role": "user", "content": prompt}] if messages is None else messages
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError("messages is not a list of messages")
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    if any(isinstance(part, dict) and "image" in str(part.get("type")) for parts in contents for part in parts):
        raise ValueError("images are not taken here yet; ms4 run -i IMAGE takes them")
    if system is None or messages[0].get("role") in ("system", "developer"):
        return messages
    if not isinstance(system, str):
        raise ValueError("system is not a text")
    return [{"role": "system", "content": system}, *messages]


def sampling_of(fields: dict[str, Any], plain: Sampling) -> Sampling:
    """How tokens of a line are chosen; ValueError for an effort that there is none of."""
    given = {name: fields[name] for name in SAMPLING if fields.get(name) is not None}
    sampling = replace(plain, **given)
    if "temperature" in given:
        sampling = replace(sampling, greedy=False)
    effort = fields.get("reasoning_effort")
    if effort is None:
        return sampling
    if effort not in ("none", "low", "medium", "high"):
        raise ValueError("reasoning_effort is not one of none, low, medium, high")
    effort, budget = thinking(effort)
    return replace(sampling, effort=effort, think_budget=budget)


def grammar_of(schema: Any, grammars: dict[str, Grammar]) -> Grammar | None:
    """What a schema holds an answer to, made once for each; a text has the short form, 'name, age int'."""
    if schema is None:
        return None
    from ms4.models.constraint import Grammar
    from ms4.models.schema import read_schema

    key = json.dumps(schema, sort_keys=True)
    if key not in grammars:
        grammars[key] = Grammar(read_schema(schema) if isinstance(schema, str) else schema)
    return grammars[key]


# --- what is answered


class Lines:
    """The file of answers, or stdout.  Holds what an earlier call has written, and repairs what it had begun."""

    def __init__(self, job: Job) -> None:
        self._codes: dict[str | int, int] = {}
        self._hashes: dict[str | int, str] = {}
        self._path = None if job.output in (None, "-") else job.output
        self._output = streams.Output() if self._path is None else None
        self._fd = -1
        if self._path is None:
            return
        if os.path.exists(self._path) and job.path != "-" and os.path.samefile(self._path, job.path):
            raise UsageError("the answers would be written over the prompts", "-o names another file")
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            if stat.S_ISREG(os.fstat(self._fd).st_mode):  # a pipe or a device holds no earlier answers
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._read(self._path)
        except BlockingIOError:
            raise CliError(f"{self._path}: another ms4 batch writes to it") from None
        except OSError as error:
            raise CliError(f"{self._path}: {error.strerror}") from None
        except CliError:
            os.close(self._fd)
            raise

    def _read(self, path: str) -> None:
        """Takes the answers that are there, and cuts off half a line; a file of something else is left alone."""
        with open(path, "rb") as file:
            whole, newline, rest = file.read().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else (), 1):
            try:
                value = json.loads(line)
                self._codes[value["id"]], self._hashes[value["id"]] = value["exit"], value["sha256"]
            except (ValueError, TypeError, KeyError):
                raise UnreadableError(f"{shown(path)}, line {number}: no answer of ms4 batch", "-o FILE") from None
        begin = b'{"id": '
        if rest and not (rest.startswith(begin) or begin.startswith(rest)):
            raise UnreadableError(f"{shown(path)}: holds something else than answers of ms4 batch", "-o FILE")
        if rest:
            os.ftruncate(self._fd, len(whole) + len(newline))

    def has(self, item: Item) -> bool:
        if item.id not in self._hashes:
            return False
        if self._hashes[item.id] != item.sha256:
            hint = "-o with another file; options and prompts have to be the same to go on with this one"
            raise UsageError(f"{item.where}: {self._path} has an answer to another question as {item.id!r}", hint)
        return True

    def add(self, item: Item, code: int, value: dict[str, Any] | None) -> None:
        """value: what is written; None for what has failed, which another call tries again."""
        self._codes[item.id] = code
        if value is None:
            return
        self._hashes[item.id] = item.sha256
        line = json.dumps({"id": item.id, **value, "sha256": item.sha256, "exit": code}, ensure_ascii=False) + "\n"
        if self._output is not None:
            self._output.write(line)
            return
        data = memoryview(line.encode("utf-8", "backslashreplace"))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise CliError(f"{self._path}: {error.strerror}", "the same command goes on, once there is room") from None

    def code(self) -> int:
        codes = {code for code in self._codes.values() if code}
        return codes.pop() if len(codes) == 1 else errors.FAILURE if codes else errors.OK

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        elif self._output is not None:
            self._output.close()


@dataclass
class Work:
    """The answers of a call: threads that submit and follow them, and this one, which writes."""

    job: Job
    model: Model
    waiting: Sequence[Item]
    lines: Lines
    status: render.StatusLine

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer = loading.usable(self.model.vocabulary)
        self.n_ctx = loading.context_for(self.model, self.job.n_ctx)
        self.results: SimpleQueue[Result | None] = SimpleQueue()
        self.queue = deque(self.waiting)
        self.lock = threading.Lock()
        self.workers: list[threading.Thread] = []
        self.active = 0  # of them, those that may still take an item; under the lock

    def carry_out(self) -> None:
        from ms4.models.scheduler import Scheduler

        with Scheduler(self.model.engine) as scheduler:
            try:
                for _ in range(min(self.job.together, len(self.waiting))):
                    try:
                        timeline = scheduler.open(self.n_ctx)
                    except MemoryError:
                        if not self.workers:
                            raise
                        break  # fewer together, then
                    self.workers.append(threading.Thread(target=self.follow, args=(scheduler, timeline), daemon=True))
                left = self.active = len(self.workers)
                n = 0
                for worker in self.workers:
                    worker.start()
                while left:
                    result = self.results.get()
                    if result is None:
                        left -= 1
                        continue
                    self.write(result)
                    n += 1
                    self.status.show(f"{n}/{len(self.waiting)} answered")
            finally:  # Ctrl-C, or a full disk: what has ended by now is kept
                self.queue.clear()
                scheduler.close()
                for worker in self.workers:
                    if worker.is_alive():
                        worker.join()
                while not self.results.empty():
                    if (result := self.results.get()) and result.done and result.done.reason != "interrupted":
                        self.write(result)

    def follow(self, scheduler: Scheduler, timeline: Timeline) -> None:
        """One answer after the other on a timeline, until none waits.

        Where the memory does not do for all, one leaves, and the others answer what it had begun.
        """
        item = self.next()
        while item is not None:
            alone = self.active == 1
            result = self.answer(item, scheduler, timeline)
            if isinstance(result.error, MemoryError) and not alone:
                with self.lock:
                    if self.active > 1:
                        self.queue.appendleft(item)
                        self.active -= 1
                        break
                continue  # the others have ended meanwhile, and their memory is free
            self.results.put(result)
            item = self.next()
        scheduler.drop(timeline)
        self.results.put(None)

    def next(self) -> Item | None:
        with self.lock:
            if self.queue:
                return self.queue.popleft()
            self.active -= 1
            return None

    def answer(self, item: Item, scheduler: Scheduler, timeline: Timeline) -> Result:
        from ms4.models.answer import Done
        from ms4.models.answer_parser import Text, Thinking, ToolCall

        result = Result(item)
        try:
            answer, held = self.prepared(item)
            for event in scheduler.submit(answer, timeline):
                if isinstance(event, Text):
                    result.text.append(event.text)
                elif isinstance(event, Thinking):
                    result.thinking.append(event.text)
                elif isinstance(event, ToolCall):
                    result.calls.append(event)
                elif isinstance(event, Done):
                    result.done = event
            result.complete = held is None or held.complete
        except BaseException as error:
            result.error = error
        return result

    def prepared(self, item: Item) -> tuple[Answer, Any]:
        from ms4.models import prompt as prompts
        from ms4.models.answer import Answer
        from ms4.models.constraint import Constraint

        effort = item.sampling.effort
        prompt = prompts.render(item.messages, self.tokenizer, tools=item.tools, effort=effort)
        held = Constraint(item.grammar, self.tokenizer, may_think=effort != "none") if item.grammar else None
        answer = Answer(
            prompt,
            item.sampling.sampler(),
            self.tokenizer,
            self.n_ctx,
            max_tokens=item.max_tokens,
            stop=item.stop,
            constraint=held,
            think_budget=item.sampling.think_budget,
        )
        return answer, held

    def write(self, result: Result) -> None:
        from ms4.models import usage

        item, done = result.item, result.done
        if done is None:
            assert result.error is not None
            code, message, _ = errors.describe(result.error)
            errors.note(f"error: {item.where}: {message}")
            self.lines.add(item, code, None)
            return
        text, calls = "".join(result.text), result.calls
        code, message = verdict(done, bool(text or calls), self.job.strict, self.model.engine.shape.n_ctx_train)
        if not result.complete and code in (errors.OK, errors.INCOMPLETE):
            code, message = errors.FORM, message or "the answer does not complete the schema"
        if message:
            errors.note(f"error: {item.where}: {message}")
        said = usage.message(text, "".join(result.thinking), calls)
        value = {
            "model": os.path.basename(self.model.gguf.path),
            "choices": [usage.choice(said, done.reason)],
            "usage": usage.usage(done.statistics),
        }
        self.lines.add(item, code, value)
