"""`ms4 sessions`: lists, shows, exports, searches and removes the conversations on this disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ms4.cli import errors, streams
from ms4.cli.errors import UsageError
from ms4.cli.remembered import described
from ms4.models import kv_files, sessions
from ms4.models.sessions import Session, SessionError
from ms4.quant import visible

ACTIONS = ("ls", "show", "export", "search", "rm")


def carry_out(action: str, names: Sequence[str], *, as_json: bool, yes: bool) -> int:
    if action not in ACTIONS:
        raise UsageError(f"no such action {errors.escape(action, 40)}", f"ms4 sessions {'|'.join(ACTIONS)}")
    if action == "ls":
        return ls(as_json)
    if action == "search":
        return search(" ".join(names), as_json)
    if not names:
        raise UsageError(f"ms4 sessions {action} needs the id of a session", "ms4 sessions ls lists them")
    found = [sessions.find(name) for name in dict.fromkeys(names)]
    if action == "rm":
        return remove(found, yes)
    output = streams.Output()
    for path in found:
        session = sessions.read(path)
        output.write(as_messages(session) if action == "export" or as_json else as_markdown(session, output.terminal))
    output.close()
    return errors.OK


def ls(as_json: bool) -> int:
    output = streams.Output()
    rows = []
    known = list(sessions.sessions())
    if not known and not as_json:
        errors.note("no session yet; ms4 chat begins one")
    for session in known:
        if isinstance(session, SessionError):
            errors.note(str(session))
        elif as_json:
            rows.append(about(session))
        else:
            output.write(described(session) + "\n")
    if as_json:
        output.write(json.dumps(rows, ensure_ascii=False) + "\n")
    output.close()
    return errors.OK


def about(session: Session) -> dict[str, object]:
    return {
        "id": session.id,
        "created": session.created,
        "modified": session.path.stat().st_mtime,
        "model": session.model,
        "turns": len(session.all_turns),
        "title": session.title,
        "path": str(session.path),
    }


def as_markdown(session: Session, terminal: bool) -> str:
    lines = [f"# {session.title or session.id}\n", f"{session.id}, {session.model}, effort {session.effort}\n"]
    if session.system:
        lines.append(f"**System:** {session.system}\n")
    for turn in session.all_turns:
        lines += [f"**You:** {sessions.words_of(turn.message)}\n", f"**Model:** {turn.text.strip()}\n"]
    text = "\n".join(lines) + "\n"
    return visible.text(text) if terminal else text


def as_messages(session: Session) -> str:
    """What `ms4 run --messages` takes; images as data."""
    messages: list[dict[str, object]] = []
    if session.system:
        messages.append({"role": "system", "content": session.system})
    for turn in session.all_turns:
        content = turn.message if isinstance(turn.message, str) else [open_chunk(chunk) for chunk in turn.message]
        messages.append({"role": "user", "content": content})
        answer: dict[str, object] = {"role": "assistant", "content": turn.text}
        if turn.thinking:
            answer["reasoning_content"] = turn.thinking
        messages.append(answer)
    whole = {"messages": messages, "reasoning_effort": session.effort}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def open_chunk(chunk: dict[str, object]) -> dict[str, object]:
    if chunk.get("type") != "image":
        return chunk
    packed = sessions.pack_image(chunk["image"])  # type: ignore[arg-type]
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{packed['png']}"}}


def search(words: str, as_json: bool) -> int:
    """Sessions in which all the words stand, the best first, each with where."""
    from ms4.models.session_index import SessionIndex

    if not words.strip():
        raise UsageError("search for what?", "ms4 sessions search WORDS")
    output = streams.Output()
    hits = SessionIndex.open().search(words)
    if as_json:
        output.write(json.dumps([{"id": id, "where": where} for id, where in hits], ensure_ascii=False) + "\n")
    if not hits and not as_json:
        errors.note("no session has all of these words")
    for id, where in [] if as_json else hits:
        output.write(f"{id}  {errors.escape(where)}\n")
    output.close()
    return errors.OK


def named(path: Path) -> str:
    """One line about a session, also if it cannot be read."""
    try:
        return described(sessions.read(path))
    except SessionError as error:
        return errors.escape(str(error))


def remove(found: Sequence[Path], yes: bool) -> int:
    """Removes sessions; their kv caches go with the oldest, or at once if no session is left."""
    if not yes:
        if not streams.is_terminal(sys.stdin):
            raise UsageError("nothing is removed without being asked", "--yes")
        for path in found:
            print(named(path), file=sys.stderr)
        print("remove? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return errors.OK
    for path in found:
        path.unlink()
    if not sessions.paths():
        for path, _ in kv_files.kept_bytes():
            path.unlink(missing_ok=True)
    return errors.OK
