"""What a conversation leaves on disk: its session, and the kv cache behind it.

`Memory` is told what happens and writes it down.  What cannot be written is said once, and the conversation goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ms4
from ms4.cli import errors, streams
from ms4.cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from ms4.cli.image_notes import ImageOptions
    from ms4.cli.options import EngineOptions, Sampling
    from ms4.models import sessions
    from ms4.models.answer import Event, Prompt
    from ms4.models.dialogue import Content, Dialogue, Turn
    from ms4.models.sampling import Sampler
    from ms4.models.sessions import Session
    from ms4.models.timeline import Timeline

WORTH_A_WORD = 1024  # tokens: of fewer it is not said that they will be read again
MOST_SHOWN = 20  # of the sessions to choose from
NOT_SAVED = "the conversation is not saved: {}; --no-session says that it need not be"


def wanted(no_session: bool) -> bool:
    """False: nothing that was typed or answered is to stay on disk."""
    return not no_session and not os.environ.get("MS4_NO_HISTORY")


def open_session(name: str | None) -> Session:
    """The session of that id, or the last one."""
    from ms4.models import sessions

    return sessions.read(sessions.find(name))


def chosen(resume: str | None, words: Sequence[str]) -> Session | None:
    """What -c ("") and --resume (an id, or "?" for a list) go on with; None where neither is given."""
    if resume is None:
        return None
    no_number(words)
    return open_session((pick() if resume == "?" else resume) or None)


def no_number(words: Sequence[str]) -> None:
    """UsageError where -c stands before a number: elsewhere that is the size of the context."""
    if words and words[0].isascii() and words[0].isdigit() and len(words[0]) > 2:
        raise UsageError("-c goes on with the last conversation", f"--ctx {words[0]} is a context of that size")


def pick() -> str:
    """The id of a session that the user chooses from a list, at a terminal."""
    from ms4.models import sessions

    known = [s for s in sessions.sessions() if isinstance(s, sessions.Session)][:MOST_SHOWN]
    if not known:
        raise MissingError("there is no session yet", "ms4 chat begins one")
    if not streams.is_terminal(sys.stdin) or not streams.is_terminal(sys.stderr):
        raise UsageError("--resume needs an id where nobody can choose", "ms4 sessions ls lists them")
    for number, session in enumerate(known, 1):
        print(f"{number:3}  {described(session)}", file=sys.stderr)
    while True:
        print("number (Enter: 1): ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise KeyboardInterrupt
        text = line.strip() or "1"
        if text.isascii() and text.isdigit() and 1 <= int(text) <= len(known):
            return known[int(text) - 1].id


def described(session: Session) -> str:
    """One line about a session."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.path.stat().st_mtime))
    n = len(session.all_turns)
    return f"{session.id}  {when}  {n:3} turn{'' if n == 1 else 's'}  {errors.escape(session.title)}"


def replay(session: Session, dialogue: Dialogue) -> None:
    """Gives a dialogue the turns of a session."""
    dialogue.system, dialogue.effort = session.system, session.effort
    dialogue.turns = list(turns_of(session.turns))


def turns_of(turns: Sequence[sessions.Turn]) -> tuple[Turn, ...]:
    from ms4.models.dialogue import Turn

    return tuple(Turn(turn.message, turn.answer, turns_of(turn.older)) for turn in turns)


def sampler_of(session: Session | None, sampling: Sampling, effort: str) -> Sampler:
    """That of a conversation: its random numbers go on where they were, unless another seed is wanted."""
    made = sampling.sampler(effort)
    if session is None or session.seed is None or sampling.seed not in (None, session.seed):
        return made
    return type(made)(replace(made.params, seed=session.seed), session.n_drawn)


class Pieces:
    """Collects what an answer says, while it is shown."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thinking: list[str] = []

    def __call__(self, event: Event) -> None:
        from ms4.models.answer_parser import Text, Thinking

        if isinstance(event, Text):
            self.text.append(event.text)
        elif isinstance(event, Thinking):
            self.thinking.append(event.text)


CUT = ("interrupted", "length", "context")  # why an answer ends that can go on


@dataclass(frozen=True)
class Cut:
    """An answer that did not come to its end: its ids, as they were chosen, and what they say."""

    ids: tuple[int, ...]
    pieces: Pieces


def cut_of(session: Session | None) -> Cut | None:
    """The last answer of a session, if it can go on."""
    turn = session.turns[-1] if session is not None and session.turns else None
    if turn is None or turn.cut is None:
        return None
    pieces = Pieces()
    pieces.text.append(turn.text)
    pieces.thinking.append(turn.thinking)
    return Cut(turn.answer[: turn.cut], pieces)


class Memory:
    """A conversation on disk.  `off`: it leaves nothing there."""

    def __init__(
        self,
        engine: EngineOptions,
        images: ImageOptions,
        tell: Callable[[str], None],
        *,
        off: bool = False,
        session: Session | None = None,
    ) -> None:
        self._tell = tell
        self._off = off
        self.model = os.path.basename(engine.require())
        self.named = session.name if session is not None else None
        self._recorder: Any = None
        self._kv: Any = None
        if off:
            return
        from ms4.models.kv_files import KvFiles
        from ms4.models.sessions import Recorder

        self._kv = KvFiles.of(engine.require(), engine.attn_scale, images.mmproj)
        if session is not None:
            self._guard(lambda: setattr(self, "_recorder", Recorder.onto(session)))
            if self._recorder is not None and self._recorder.id != session.id:
                tell(f"session {session.id} goes on elsewhere; here it goes on as {self._recorder.id}")

    def begin(self, dialogue: Dialogue, budget: int | None = None) -> None:
        """From here on it is another conversation; its file comes with its first turn.  budget: tokens of thought."""
        self.close()
        self.named = None
        if not self._off:
            from ms4.models.sessions import Recorder

            self._recorder = Recorder(self.model, ms4.__version__, dialogue.system, dialogue.effort, budget=budget)

    @property
    def on(self) -> bool:
        """True if the conversation is kept."""
        return self._recorder is not None

    @property
    def path(self) -> Path | None:
        """The file of the conversation, if there is one yet."""
        recorder = self._recorder
        return recorder.path if recorder is not None and recorder.path.exists() else None

    def fork(self) -> Path | None:
        """From here on it has another file, which this gives; None: nothing is on disk yet.  OSError: it failed."""
        if self.path is None:
            return None
        old, self._recorder = self._recorder, self._recorder.fork()
        old.close()
        return self.path

    def name(self, value: str) -> None:
        self.named = value
        self._guard(lambda: self._recorder and self._recorder.name(value))

    def turn(self, message: Content, ids: Sequence[int], pieces: Pieces, reason: str, sampler: Sampler) -> None:
        """A message and the ids of its answer, as they were chosen."""
        from ms4.models.dialogue import closed

        text, thinking = "".join(pieces.text), "".join(pieces.thinking)
        answer, cut = closed(ids), len(ids) if reason in CUT else None
        drawn = (sampler.seed, sampler.n_drawn) if sampler.n_drawn else None
        self._guard(lambda: self._recorder and self._recorder.turn(message, answer, text, thinking, reason, cut, drawn))

    def compact(self, n: int, message: str, ids: Sequence[int], text: str) -> None:
        """The first n turns are a summary now."""
        from ms4.models.dialogue import closed

        answer = closed(ids)
        self._guard(lambda: self._recorder and self._recorder.compact(n, message, answer, text))

    def undo(self, n: int) -> None:
        self._guard(lambda: self._recorder and self._recorder.undo(n))

    def effort(self, value: str, budget: int | None) -> None:
        self._guard(lambda: self._recorder and self._recorder.effort(value, budget))

    def system(self, value: str | None) -> None:
        self._guard(lambda: self._recorder and self._recorder.system(value))

    def restore(self, timeline: Timeline, prompt: Prompt) -> int:
        """Before a prompt is computed: what is kept of it.  The last position is always computed."""
        keys = prompt.keys[:-1]
        if self._kv is None or timeline.common(keys) == len(timeline.keys) > 0:
            return 0
        return int(self._kv.restore(timeline, keys))

    def keep(self, timeline: Timeline) -> None:
        """At the end: what the timeline holds."""
        reason = self._kv.keep(timeline) if self._kv is not None else ""
        if reason and timeline.length >= WORTH_A_WORD:
            self._tell(f"what was read is not kept on disk: {reason}")

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def _guard(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            self._tell(NOT_SAVED.format(error.strerror))
            self.close()
            self._off = True
