"""Conversations on disk: a file for each, a line of JSON for each thing that happened.

A file is only ever added to.  Its first line says what it is, the others replay the conversation:

    {"event": "begin", "format": 1, "id", "created", "model", "version", "system", "effort", "budget"}
    {"event": "turn", "message", "answer": [ids], "text", "thinking", "at", "reason", "cut", "seed", "drawn"}
    {"event": "undo", "n"}    {"event": "effort", "value", "budget"}
    {"event": "system", "value"}    {"event": "name", "value"}
    {"event": "compact", "n", "message", "answer": [ids], "text"}

A message is what `dialogue.Content` is; its images stand in it as they were decoded (PNG, base64), so a session needs
no other file.  The answer is kept as the ids that the model wrote: a session that goes on has the very prompt that it
would have had.  An answer that did not come to its end can go on from the very token: its first `cut` ids are what the
model wrote, the others close it.  A budget is that of thoughts, in tokens, and left out where there is none; "drawn" is
how many random numbers of the seed were used up to there, left out where none were.  A summary ("compact") takes the
place of the first n turns until an undo takes it back; what it stands for stays in the file.

Who writes a line has it on the disk (fsync) before the next message; a last line that is torn is left out, and cut off
when the session goes on.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms4.models import atomic, places
from ms4.models.image import Image
from ms4.models.untrusted import InputError, shown

if TYPE_CHECKING:
    from ms4.models.dialogue import Content

FORMAT = 1
MOST_BYTES = 1 << 30  # of a file that is read
ID_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
EFFORTS = ("none", "high")
AHEAD = 3600 * 10**9  # nanoseconds by which the clock of a server may differ


class SessionError(InputError):
    """This session cannot be read; the message is one sentence."""


class UnknownSessionError(SessionError):
    """No session is meant, or more than one."""


class NoSessionError(UnknownSessionError):
    """There is none at all."""


@dataclass
class Turn:
    message: Content
    answer: tuple[int, ...]
    text: str
    thinking: str = ""
    cut: int | None = None  # so many ids of the answer were written when it was cut; None: it came to its end
    older: list[Turn] = field(default_factory=list)  # turns whose summary it is


@dataclass
class Session:
    """What a file says, replayed."""

    path: Path
    id: str
    created: float
    model: str
    system: str | None = None
    effort: str = "none"
    budget: int | None = None  # tokens of thought
    seed: int | None = None  # of the random numbers behind its last answer that needed some
    n_drawn: int = 0  # so many of them were used
    turns: list[Turn] = field(default_factory=list)
    name: str | None = None  # that its user gave it
    n_bytes: int = 0  # of its whole lines
    n_read: int = 0  # bytes of the file when it was read
    torn: bool = False  # its last line was cut

    @property
    def all_turns(self) -> list[Turn]:
        """The turns as they were, those behind summaries too, and no summary."""
        return unfolded(self.turns)

    @property
    def title(self) -> str:
        """Its name, or the first words of the first message."""
        if self.name:
            return self.name
        text = " ".join(words_of(self.all_turns[0].message).split()) if self.turns else ""
        return text[:77] + "..." if len(text) > 80 else text


def unfolded(turns: Sequence[Any]) -> list[Any]:
    """Turns of whatever class, where those behind a summary stand in its place."""
    return [one for turn in turns for one in (unfolded(turn.older) or [turn])]


def take_back(turns: list[Any], n: int) -> int:
    """Takes back the last n of turns, of whatever class; returns how many there were.

    Of a summary only itself goes: the turns that it stood for are there again.
    """
    for done in range(n):
        if not turns:
            return done
        turns.extend(turns.pop().older)
    return n


def folder() -> Path:
    return places.ours("DATA") / "sessions"


def text_of(message: Content) -> str:
    """The text of a message, without its images."""
    if isinstance(message, str):
        return message
    return "\n\n".join(str(chunk["text"]) for chunk in message if chunk.get("type") == "text")


def words_of(message: Content) -> str:
    """The text of a message, an image as its name."""
    if isinstance(message, str):
        return message
    parts = []
    for chunk in message:
        if chunk.get("type") == "text":
            parts.append(str(chunk["text"]))
        elif chunk.get("type") == "image":
            parts.append(f"[{os.path.basename(chunk['image'].name)}]")
    return "\n".join(parts)


# --- writing


class Recorder:
    """Adds to one session; the file is made with its first turn, so a chat in which nothing is said leaves nothing."""

    def __init__(
        self,
        model: str,
        version: str,
        system: str | None,
        effort: str,
        where: Path | None = None,
        budget: int | None = None,
    ) -> None:
        self._begin = {
            "event": "begin",
            "format": FORMAT,
            "id": new_id(),
            "created": round(time.time(), 3),
            "model": model,
            "version": version,
            "system": system,
            "effort": effort,
            **budgeted(budget),
        }
        self.id = str(self._begin["id"])
        self.path = (where or folder()) / f"{self.id}.jsonl"
        self._file: int | None = None
        self._before: list[dict[str, Any]] = []  # what happened before the first turn

    @classmethod
    def onto(cls, session: Session) -> Recorder:
        """One that goes on where a session has ended; a torn last line is cut off.

        If another process has it open, or has added to it since it was read, this one goes on in a copy.
        """
        made = cls(session.model, "", session.system, session.effort)
        file = os.open(session.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if not locked(file) or os.fstat(file).st_size != session.n_read:
            os.close(file)
            made._copy(session.path, session.n_bytes)
            return made
        made.id, made.path, made._file = session.id, session.path, file
        os.ftruncate(file, session.n_bytes)
        return made

    def fork(self) -> Recorder:
        """One that goes on from here in a file of its own, which begins with a copy of this one."""
        made = Recorder("", "", None, "none", self.path.parent)
        made._copy(self.path)
        return made

    def _copy(self, path: Path, n_bytes: int | None = None) -> None:
        """Begins with what is in another session's file, or its first bytes."""
        first, rest = path.read_bytes()[:n_bytes].split(b"\n", 1)
        begin = json.loads(first) | {"id": self.id, "created": self._begin["created"], "forked": path.stem}
        with atomic.replacing(self.path, 0o600, durable=True) as file:
            file.write(as_lines(begin) + rest)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        locked(self._file)

    def turn(
        self,
        message: Content,
        answer: Sequence[int],
        text: str,
        thinking: str,
        reason: str,
        cut: int | None = None,
        drawn: tuple[int, int] | None = None,
    ) -> None:
        """drawn: the seed, and how many of its random numbers were used by now."""
        more = {} if cut is None else {"cut": cut}
        if drawn is not None:
            more |= {"seed": drawn[0], "drawn": drawn[1]}
        self._put(
            event="turn",
            message=pack(message),
            answer=[int(id) for id in answer],
            text=text,
            thinking=thinking,
            at=round(time.time(), 3),
            reason=reason,
            **more,
        )

    def compact(self, n: int, message: str, answer: Sequence[int], text: str) -> None:
        self._put(event="compact", n=n, message=message, answer=[int(id) for id in answer], text=text)

    def undo(self, n: int) -> None:
        if n and self._file is not None:
            self._put(event="undo", n=n)

    def effort(self, value: str, budget: int | None = None) -> None:
        self._note(event="effort", value=value, **budgeted(budget))

    def system(self, value: str | None) -> None:
        self._note(event="system", value=value)

    def name(self, value: str) -> None:
        self._note(event="name", value=value)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def _note(self, **event: Any) -> None:
        if self._file is None:
            self._before.append(event)
        else:
            self._put(**event)

    def _put(self, **event: Any) -> None:
        """Writes a line, whole or not at all, and waits until the disk has it.  OSError: it is not there."""
        if self._file is None:
            self._begin_with(event)
            return
        data = as_lines(event)
        size = os.fstat(self._file).st_size
        try:
            write_all(self._file, data)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _begin_with(self, event: Mapping[str, Any]) -> None:
        """Makes the file, which gets its name when its first lines are in it: a kill leaves all of them, or no file."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic.renamed(self.path) as new:
            file = os.open(new, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                write_all(file, as_lines(self._begin, *self._before, event))
            except BaseException:
                os.close(file)
                raise
        self._file = file
        locked(file)
        atomic.sync(self.path.parent)
        self._before = []


def as_lines(*events: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(e, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" for e in events)


def write_all(fd: int, data: bytes) -> None:
    """Writes all of it, and waits until the disk has it."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])
    os.fsync(fd)


def locked(fd: int) -> bool:
    """Takes a file for this process until it is closed; False if another has it.  Some file systems know no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def budgeted(budget: int | None) -> dict[str, int]:
    return {} if budget is None else {"budget": budget}


def new_id() -> str:
    """Ids sort by the time at which they were made."""
    return time.strftime("%Y%m%d-%H%M%S-") + "".join(secrets.choice(ID_LETTERS) for _ in range(4))


def pack(message: Content) -> Any:
    """A message as JSON has it."""
    if isinstance(message, str):
        return message
    return [pack_image(chunk["image"]) if chunk.get("type") == "image" else dict(chunk) for chunk in message]


def pack_image(image: Image) -> dict[str, Any]:
    data = io.BytesIO()
    picture = image.picture if image.picture.mode in PNG_MODES else image.picture.convert("RGBA")
    picture.save(data, "PNG", compress_level=1)
    return {
        "type": "image",
        "name": image.name,
        "digest": image.digest.hex(),
        "orientation": image.orientation,
        "whole": list(image.whole) if image.whole else None,
        "png": base64.b64encode(data.getvalue()).decode("ascii"),
    }


PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def unpack(value: Any) -> Content:
    """The reverse of pack; ValueError, KeyError or TypeError if it is none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TypeError("neither a text nor a list")
    return [unpack_chunk(chunk) for chunk in value]


def unpack_chunk(chunk: Mapping[str, Any]) -> dict[str, Any]:
    if chunk["type"] != "image":
        return {"type": "text", "text": str(chunk["text"])}
    from PIL import Image as pillow

    picture = pillow.open(io.BytesIO(base64.b64decode(chunk["png"], validate=True)), formats=("PNG",))
    picture.load()
    whole = chunk.get("whole")
    image = Image(
        str(chunk["name"]),
        picture,
        bytes.fromhex(chunk["digest"]),
        int(chunk["orientation"]),
        whole=(int(whole[0]), int(whole[1])) if whole else None,
    )
    return {"type": "image", "image": image}


# --- reading


def read(path: Path) -> Session:
    """Replays a file.  SessionError if it is none, or damaged elsewhere than in its last line."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise SessionError(f"{shown(path.name)}: a session of more than {MOST_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{shown(path.name)}: {error.strerror}") from None
    session: Session | None = None
    at = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            event = json.loads(line)
            session = began(path, event) if session is None else session
            replay(session, event)
        except (ValueError, KeyError, TypeError, IndexError, OSError, RecursionError) as error:
            if session is not None and at + len(line) == len(data):
                session.torn = True
                break
            raise SessionError(f"{shown(path.name)}: line {number} is damaged ({type(error).__name__})") from None
        at += len(line)
    if session is None:
        raise SessionError(f"{shown(path.name)}: empty")
    session.n_bytes, session.n_read = at, len(data)
    return session


def began(path: Path, event: Mapping[str, Any]) -> Session:
    if event["event"] != "begin":
        raise ValueError("no beginning")
    if event["format"] != FORMAT:
        raise SessionError(f"{shown(path.name)}: format {event['format']!r}; this version reads {FORMAT}")
    system, effort = event.get("system"), event["effort"]
    if not (system is None or isinstance(system, str)) or effort not in EFFORTS:
        raise ValueError("system or effort")
    budget = natural(event, "budget")
    return Session(path, path.stem, float(event["created"]), str(event["model"]), system, effort, budget)


def replay(session: Session, event: Mapping[str, Any]) -> None:
    kind = event["event"]
    if kind == "turn":
        answer = ids_in(event)
        cut = event.get("cut")
        if cut is not None and not (type(cut) is int and 0 < cut <= len(answer)):
            raise ValueError("cut")
        turn = Turn(unpack(event["message"]), answer, str(event["text"]), str(event.get("thinking", "")), cut)
        session.turns.append(turn)
        if (seed := natural(event, "seed")) is not None:
            session.seed, session.n_drawn = seed, natural(event, "drawn") or 0
    elif kind == "undo":
        take_back(session.turns, int(event["n"]))
    elif kind == "effort" and event["value"] in EFFORTS:
        session.effort, session.budget = event["value"], natural(event, "budget")
    elif kind == "system" and (event["value"] is None or isinstance(event["value"], str)):
        session.system = event["value"]
    elif kind == "compact":
        n = int(event["n"])
        if not 0 < n <= len(session.turns):
            raise ValueError("n")
        older = session.turns[:n]
        session.turns[:n] = [Turn(unpack(event["message"]), ids_in(event), str(event["text"]), older=older)]
    elif kind == "name" and isinstance(event["value"], str):
        session.name = event["value"]
    elif kind != "begin":
        raise ValueError("an unknown event")


def natural(event: Mapping[str, Any], name: str) -> int | None:
    """A number that need not be there."""
    value = event.get(name)
    if value is not None and not (type(value) is int and 0 <= value < 1 << 64):
        raise ValueError(name)
    return value


def ids_in(event: Mapping[str, Any]) -> tuple[int, ...]:
    answer = tuple(int(id) for id in event["answer"])
    if not answer or min(answer) < 0 or max(answer) > 1 << 30:
        raise ValueError("ids")
    return answer


def paths(where: Path | None = None) -> list[Path]:
    """The files of all sessions, those that went on last first; behind them those of a clock that was wrong."""
    found = []
    now = time.time_ns()
    try:
        for path in (where or folder()).glob("*.jsonl"):
            at = path.stat().st_mtime_ns
            found.append((at < now + AHEAD, at, path))
    except OSError:
        pass
    return [path for _, _, path in sorted(found, reverse=True)]


def sessions(where: Path | None = None) -> Iterator[Session | SessionError]:
    """All of them, those that went on last first; what cannot be read as its error."""
    for path in paths(where):
        try:
            yield read(path)
        except SessionError as error:
            yield error


def find(name: str | None, where: Path | None = None) -> Path:
    """The session that has this name or whose id begins with it, or the last one.  UnknownSessionError: none, several.

    Of those that were given the same name, the one that went on last.
    """
    known = paths(where)
    if name is None:
        last = next((path for path in known if path.stat().st_size), None)  # a disk that failed may leave empty ones
        if last is None:
            raise NoSessionError("there is no session yet")
        return last
    matching = [path for path in known if path.stem.startswith(name) or path.stem.endswith(f"-{name}")]
    if not matching:
        matching = [s.path for s in sessions(where) if isinstance(s, Session) and s.name == name][:1]
    if len(matching) != 1:
        said = "several sessions begin" if matching else "no session begins"
        raise UnknownSessionError(f"{said} with {shown(name)[:40]}")
    return matching[0]
