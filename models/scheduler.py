"""One thread owns the engine and gives every answer its turn, step by step.

    with Model.open(path) as model, Scheduler(model.engine) as scheduler:
        timeline = scheduler.open(n_ctx)
        for event in scheduler.submit(Answer(prompt, sampler, tokenizer, n_ctx), timeline): ...

A step takes the next token of every answer under way, and after them pieces of the prompts that wait, whose turns go
round.  Any thread may submit, iterate, stop or close at any time: what it waits for is a plan, never a step.  An
answer's tokens are the same alone and among others, because the engine's bits do not depend on what is in a step.  For
the same reason a GPU that fails costs time and nothing else: the CPU reads again what was held, and goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType

import numpy as np

import ms4
from ms4 import Canceled, Highest, Span
from ms4.models.answer import Answer, Done, Event, Note, Prefill
from ms4.models.timeline import BLOCK, Timeline, common_prefix

# Tokens of prompts in a step in which somebody decodes.  More make the prompt cheaper, because a step reads the weights
# once; but whoever decodes waits for all of them.  256 are two blocks of the kv cache, and enough that every expert
# of a layer is used by several tokens.  In a step without decodes nobody waits, so the prompts get all of n_batch.
PROMPT_CHUNK = 256

Result = np.ndarray | Highest | BaseException  # of a span


class Running:
    """An answer on its way: an iterator over its events.  The last is Done, unless it raises what went wrong."""

    def __init__(self, answer: Answer, timeline: Timeline, image_rows: np.ndarray | None) -> None:
        self.answer = answer
        self.timeline = timeline
        self.image_rows = image_rows
        self.begun = False  # the timeline is its own now, and Prefill was sent
        self.served = -1  # the number of the last step that it had a part in
        self.chunk = 0  # tokens of the prompt in the current step
        self._events: SimpleQueue[Event | BaseException] = SimpleQueue()
        self._over = False

    @property
    def decoding(self) -> bool:
        """Everything but the newest token is computed."""
        return bool(self.answer.ids) and self.timeline.length >= self.total - 1

    @property
    def total(self) -> int:
        """Positions of the prompt and of what was answered so far."""
        return len(self.answer.prompt.ids) + len(self.answer.ids)

    @property
    def tokens(self) -> np.ndarray:
        prompt, ids = self.answer.prompt.tokens, self.answer.ids
        return np.concatenate([prompt, np.array(ids, np.int32)]) if ids else prompt

    @property
    def keys(self) -> np.ndarray:
        prompt, ids = self.answer.prompt.keys, self.answer.ids
        return np.concatenate([prompt, np.array(ids, np.int64)]) if ids else prompt

    def progress(self) -> tuple[int, int]:
        """(tokens of the prompt that are computed, all that were not held already).  May be called from any thread."""
        total, chunk = self.total, self.chunk
        if not self.begun:
            return 0, total
        done, parts = self.timeline.session.progress() if chunk else (0, 1)
        position = min(self.timeline.length + chunk * done // max(parts, 1), total)
        return position - self.answer.n_cached, total - self.answer.n_cached

    def held(self) -> int:
        """How much of the prompt the timeline holds; never all, for the last position gives the logits."""
        return self.timeline.length if self.begun else self.timeline.common(self.keys[:-1])

    def cancel(self) -> None:
        """Ends the answer at the next opportunity; it keeps what it has.  May be called from any thread."""
        self.answer.stop_flag.set()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        event = self._events.get()
        self._over = isinstance(event, (Done, BaseException))
        if isinstance(event, BaseException):
            raise event
        return event

    def send(self, *events: Event | BaseException) -> None:
        for event in events:
            self._events.put(event)


class Scheduler:
    """Owns an engine's steps until it is closed; the engine is closed after it."""

    def __init__(self, engine: ms4.Engine) -> None:
        self.engine = engine
        self._lock = threading.RLock()  # of the lists; held for a plan, never during a step or a choice
        self._work = threading.Condition(self._lock)
        self._running: list[Running] = []  # in order of arrival
        self._timelines: list[Timeline] = []
        self._leaving: list[Timeline] = []  # to be closed as soon as no answer uses them
        self._n_steps = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    # --- for any thread

    def open(self, n_ctx: int) -> Timeline:
        """A new, empty timeline of at most n_ctx positions, for answers of this scheduler."""
        with self._lock:
            self._require_open()
            timeline = Timeline(self.engine.session(n_ctx))
            self._timelines.append(timeline)
        return timeline

    def drop(self, timeline: Timeline) -> None:
        """Closes a timeline, after what still runs on it, which is interrupted."""
        with self._lock:
            if timeline not in self._timelines:
                return
            self._timelines.remove(timeline)
            self._leaving.append(timeline)
            for running in self._running:
                if running.timeline is timeline:
                    running.cancel()
            self._close_leaving()

    def submit(self, answer: Answer, timeline: Timeline, image_rows: np.ndarray | None = None) -> Running:
        """Begins an answer on a timeline, or after the answers that were submitted to it before.

        image_rows: what the projector gave for all images of the prompt, one row per [IMG] token.
        """
        n_places, n_rows = len(answer.prompt.rows), 0 if image_rows is None else len(image_rows)
        if n_places != n_rows:
            raise ValueError(f"the prompt has {n_places} image positions, but {n_rows} rows came with it")
        if answer.n_ctx > timeline.n_ctx:
            raise ValueError(f"an answer for a context of {answer.n_ctx} on a timeline of {timeline.n_ctx}")
        running = Running(answer, timeline, image_rows)
        with self._lock:
            self._require_open()
            if timeline not in self._timelines:
                raise ValueError("the timeline is closed, or not of this scheduler")
            self._running.append(running)
            self._work.notify()
        return running

    def close(self) -> None:
        """Interrupts every answer, and closes the timelines.  Waits for the running step, which ends early."""
        with self._lock:
            self._closed = True
            for running in self._running:
                running.cancel()
            self._work.notify()
        hit: KeyboardInterrupt | None = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt as error:  # who closes the engine next must not do so under a running step
                hit = error
        if hit:
            raise hit

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the scheduler is closed")

    # --- the thread that owns the engine

    def _run(self) -> None:
        fault: BaseException | None = None
        try:
            while self._turn():
                pass
        except BaseException as error:  # our own mistake: whoever waits must hear of it
            fault = error
        with self._lock:
            self._closed = True
            for running in list(self._running):
                self._fail(running, fault or ValueError("the scheduler is closed"))
            self._leaving += self._timelines
            self._timelines.clear()
            self._close_leaving()

    def _turn(self) -> bool:
        """One step, if there is work; False at the end."""
        with self._lock:
            while not self._running and not self._closed:
                self._work.wait()
            self._end_stopped()
            if self._closed:
                return False
            plan = self._plan()
        note, begun = self.engine.note, time.perf_counter()
        results = self._step([span for _, span in plan])
        seconds = time.perf_counter() - begun
        failed = self._gpu_failed(results)
        self._tell(note)
        if failed:
            return True
        for (running, span), result in zip(plan, results, strict=True):
            self._settle(running, span, result, seconds)
        return True

    def _step(self, spans: list[Span]) -> list[Result]:
        """The engine's results.  If a step fails as a whole, each span has a step of its own: the fault is in one."""
        if not spans:
            return []
        try:
            return [*self.engine.step(spans)]
        except Exception as error:
            return [error] if len(spans) == 1 else [result for span in spans for result in self._step([span])]

    def _gpu_failed(self, results: list[Result]) -> bool:
        """If so, leaves it; the results count for nothing, and whoever was under way begins anew on the CPU."""
        errors = [result for result in results if isinstance(result, (ms4.DeviceError, MemoryError))]
        if not errors or not self.engine.on_gpu:
            return False
        with self._lock:
            for timeline in {id(t): t for t in (*self._timelines, *self._leaving)}.values():
                timeline.session.rewind(0)  # it may have had a part in the step that counts for nothing now
                timeline.length = 0
            for running in self._running:
                running.chunk = 0
            try:
                self.engine.leave_gpu(str(errors[0]))
            except Exception:  # no memory for it, or somebody else's sessions: the GPU's failure is the better reason
                return False
        return True

    def _tell(self, before: str) -> None:
        """Tells whoever is under way what the engine has had to do without in this step."""
        note = self.engine.note
        if note != before:
            with self._lock:
                for running in self._running:
                    running.send(Note(note))

    def _plan(self) -> list[tuple[Running, Span]]:
        """Who takes part in the next step, with what."""
        n_batch = self.engine.n_batch
        turns = sorted(self._first_of_each_timeline(), key=lambda running: running.served)
        prompts = [running for running in turns if not running.decoding]
        # First the decodes, each of which is one token.  Should they fill a step, prompts keep a place in it.
        most = n_batch - min(PROMPT_CHUNK, n_batch // 2) if prompts else n_batch
        plan = [(running, self._decode_span(running)) for running in turns if running.decoding][:most]
        # Then the prompts, until the budget is used up.
        budget = min(PROMPT_CHUNK, n_batch - len(plan)) if plan else n_batch
        chosen: list[Running] = []
        for running in prompts:
            if budget and not self._comes_anyway(running, chosen) and self._begin(running):
                span = self._prefill_span(running, budget)
                budget -= len(span.ids)
                chosen.append(running)
                plan.append((running, span))
        for running, _ in plan:
            running.served = self._n_steps
        self._n_steps += 1
        return plan

    def _first_of_each_timeline(self) -> list[Running]:
        """The other answers of a timeline wait."""
        first: dict[int, Running] = {}
        for running in self._running:
            first.setdefault(id(running.timeline), running)
        return list(first.values())

    def _comes_anyway(self, running: Running, chosen: list[Running]) -> bool:
        """True if the next positions of its prompt are computed in this step for another: then it can share them."""
        keys = running.keys[:-1]
        held = running.held()
        for other in chosen:
            theirs = other.keys[: other.timeline.length + other.chunk]
            if common_prefix(keys, theirs) - held >= BLOCK:
                return True
        return False

    def _begin(self, running: Running) -> bool:
        """Makes the timeline hold as much of the prompt as is held anywhere.  False: that failed, and so the answer."""
        answer, timeline = running.answer, running.timeline
        keys, held = running.keys[:-1], running.held()
        try:
            found = [(other.common(keys), other) for other in self._timelines if holds_more(other, keys, held)]
            n, best = max(found, key=lambda item: item[0], default=(0, timeline))
            if n > held:
                timeline.fork(best, n)
                answer.n_cached += n - held
            elif not running.begun:
                timeline.rewind(held)
        except Exception as error:
            self._fail(running, error)
            return False
        if not running.begun:
            answer.n_cached += held
            running.begun = True
            running.send(Prefill(len(answer.prompt.ids), answer.n_cached))
        return True

    def _prefill_span(self, running: Running, budget: int) -> Span:
        prompt, start = running.answer.prompt, running.timeline.length
        end = min(start + budget, running.total)
        running.chunk = end - start
        rows = None
        if running.image_rows is not None:
            first, last = np.searchsorted(prompt.rows, (start, end))
            rows = running.image_rows[first:last] if last > first else None
        return span_of(running, running.tokens[start:end], rows, int(end == running.total))

    def _decode_span(self, running: Running) -> Span:
        return span_of(running, np.array(running.answer.ids[-1:], np.int32), None, 1)

    def _settle(self, running: Running, span: Span, result: Result, seconds: float) -> None:
        """What a step gave one answer."""
        answer, timeline = running.answer, running.timeline
        running.chunk = 0
        if isinstance(result, Canceled) and answer.stop_flag.is_set():
            return  # the next turn ends it
        if isinstance(result, BaseException):
            self._fail(running, result)
            return
        n = len(span.ids)
        if running.decoding:
            timeline.append(span.ids)
            answer.n_decode += 1
            answer.s_decode += seconds
        else:
            timeline.append(running.keys[timeline.length : timeline.length + n])
            answer.s_prefill += seconds
        if not span.n_logits or answer.stop_flag.is_set():
            return
        if running.image_rows is not None and not self.engine.on_gpu:
            running.image_rows = None  # they are read once; if a GPU fails, once more
        try:
            running.send(*answer.choose(result[-1]))
        except Exception as error:
            self._fail(running, error)
            return
        if answer.reason:
            self._end(running)

    def _end_stopped(self) -> None:
        """Ends the answers that were stopped, also those that have not begun."""
        for running in [r for r in self._running if self._closed or r.answer.stop_flag.is_set()]:
            self._end(running)

    def _end(self, running: Running) -> None:
        self._remove(running)
        running.send(*running.answer.end(running.timeline.length))

    def _fail(self, running: Running, error: BaseException) -> None:
        self._remove(running)
        running.send(error)

    def _remove(self, running: Running) -> None:
        with self._lock:
            self._running.remove(running)
            self._close_leaving()

    def _close_leaving(self) -> None:
        """Closes the timelines that were dropped and that no answer uses any more."""
        used = {id(running.timeline) for running in self._running}
        for timeline in [t for t in self._leaving if id(t) not in used]:
            self._leaving.remove(timeline)
            timeline.close()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def span_of(running: Running, ids: np.ndarray, rows: np.ndarray | None, n_logits: int) -> Span:
    """Its next part of a step, with the logits that its answer chooses from, and no others."""
    answer = running.answer
    return Span(running.timeline.session, ids, rows, n_logits, answer.stop_flag, answer.n_highest, answer.n_among)


def holds_more(timeline: Timeline, keys: np.ndarray, held: int) -> bool:
    """True if a timeline has the block of the prompt after what is held, and perhaps what is before it too."""
    next_block = slice(held, held + BLOCK)
    return len(keys) >= held + BLOCK and np.array_equal(timeline.keys[next_block], keys[next_block])
