"""What a chat does about a context that fills up: it says so in time, and makes the older turns a summary.

That is /compact; at a terminal a chat does it by itself, before a message for which there is hardly room and when an
answer has filled the context, unless --no-compact or the options in files say that it is not to.

The model writes the summary as an answer to a message that asks for one, and that turn takes their place: its ids stay
what they were, and what it stands for stays in the session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ms4.cli import errors, remembered, render
from ms4.quant import visible

if TYPE_CHECKING:
    from ms4.cli.repl import Talk
    from ms4.models.answer import Answer, Statistics
    from ms4.models.dialogue import Content

MARKS = (0.8, 0.95)  # shares of the context at which something is said
CROWDED = 0.85  # the share with which a message has the older turns compacted first
LONGEST, SHORTEST = 1024, 64  # tokens that there must be room for in a summary: an eighth of the context, within these
REQUEST = (
    "Summarize our conversation so far, so that we can go on without it. Keep names, numbers, decisions, open "
    "questions and whatever else may be asked about again. Write only the summary."
)


def warn(talk: Talk, s: Statistics) -> None:
    """Says once at each mark how full the context is."""
    share = s.n_context / s.n_ctx
    passed = sum(share >= mark for mark in MARKS)
    if passed > talk.warned:
        makes = "a message soon makes" if talk.settings.compact else "/compact makes"
        talk.say(f"the context is {100 * share:.0f} % full: {makes} the older turns a summary, /new begins again")
    talk.warned = passed


def make_room(talk: Talk, message: Content) -> None:
    """Before a message is sent: compacts what is too long for it and its answer, unless that has failed before."""
    turns = talk.dialogue.turns
    if not (talk.interactive and talk.settings.compact and is_compactable(talk)) or talk.uncompacted == len(turns):
        return
    n_before, n_ctx = size(talk), talk.timeline.n_ctx
    try:
        n = len(talk.dialogue.ask(message).ids)
    except ValueError:  # whoever sends it says what is wrong
        return
    finally:
        talk.dialogue.answered(())
    room = answer_room(talk)
    if (n < CROWDED * n_ctx and n + room <= n_ctx) or n - n_before + room > n_ctx:
        return
    by_itself(talk, f"with this message the context is nearly full ({n} of {n_ctx} tokens)")


def by_itself(talk: Talk, why: str) -> bool:
    """Compacts without being asked; True if that made room."""
    talk.tell(f"{why}: the older turns become a summary; Ctrl-C leaves them as they are, --no-compact always")
    done = compact(talk, "")
    talk.uncompacted = 0 if done else len(talk.dialogue.turns)
    return done


def go_on(talk: Talk) -> None:
    """An answer has filled the context: makes room, and has it go on."""
    full, talk.full = talk.full, False
    if full and talk.interactive and talk.settings.compact and is_compactable(talk):
        if by_itself(talk, "so that the answer can go on") and talk.cut is not None:
            talk.turn(talk.dialogue.turns[-1].message, talk.cut)


def answer_room(talk: Talk) -> int:
    """The tokens that an answer is given room for before older turns have to go."""
    n_ctx = talk.timeline.n_ctx
    thought = 0 if talk.dialogue.effort == "none" else min(talk.think_budget or LONGEST, n_ctx // 4)
    return min(talk.settings.max_tokens or LONGEST, n_ctx // 8) + thought


def is_compactable(talk: Talk) -> bool:
    """True if there is more than the newest turn, and a summary before it."""
    turns = talk.dialogue.turns
    return len(turns) > 2 or len(turns) == 2 and not turns[0].older


def compact(talk: Talk, hint: str) -> bool:
    """Puts a summary into the place of all turns but the newest, or of as many as leave room; True if it could."""
    from ms4.models.dialogue import Turn, closed
    from ms4.models.sessions import unfolded

    turns = talk.dialogue.turns
    message = f"{REQUEST} {hint}".strip()
    if not is_compactable(talk):
        talk.tell("nothing is older than the newest turn, which stays as it is")
        return False
    found = fitting(talk, message)
    if found is None:
        talk.tell("the first turn leaves no room for a summary; /undo takes back the newest, --ctx allows more")
        return False
    n, answer = found
    before = size(talk)
    pieces = remembered.Pieces()
    if summarize(talk, answer, pieces) not in ("stop", "length"):
        talk.tell("stopped; nothing was changed")
        return False
    text = "".join(pieces.text).strip()
    old = list(turns)
    turns[:n] = [Turn(message, closed(answer.ids), tuple(turns[:n]))]
    after = size(talk)
    if not text or after >= before:
        turns[:] = old
        talk.tell(f"the summary of {len(answer.ids)} tokens makes nothing shorter; nothing was changed")
        return False
    talk.memory.compact(n, message, answer.ids, text)
    talk.recount()
    talk.warned = 0
    n_older = len(unfolded(old[:n]))
    replaced = f"this summary takes the place of {n_older} turn{'' if n_older == 1 else 's'}"
    talk.tell(f"compacted: {before} -> {after} tokens; {replaced}:")
    talk.tell(visible.text(text))
    talk.say("/undo behind it brings them back" + (", and the session keeps them" if talk.memory.path else ""))
    return True


def size(talk: Talk) -> int:
    """The tokens of the conversation, the last answer included."""
    return len(talk.dialogue.prompt().ids) + len(talk.dialogue.turns[-1].answer or ())


def fitting(talk: Talk, message: str) -> tuple[int, Answer] | None:
    """(how many turns, the answer that is their summary): as many as leave room for it, but never the newest."""
    from ms4.models.answer import Answer
    from ms4.models.dialogue import Dialogue

    dialogue, n_ctx = talk.dialogue, talk.timeline.n_ctx
    room = min(max(n_ctx // 8, SHORTEST), LONGEST)
    for n in range(len(dialogue.turns) - 1, 0, -1):
        part = Dialogue(dialogue.tokenizer, dialogue.system, dialogue.effort, dialogue.measure)
        part.turns = dialogue.turns[:n]
        prompt = part.ask(message)
        if len(prompt.ids) + room <= n_ctx:
            answer = Answer(prompt, talk.sampler, dialogue.tokenizer, n_ctx, max_tokens=room)
            answer.hurried = True  # without a thought
            return n, answer
    return None


def summarize(talk: Talk, answer: Answer, pieces: remembered.Pieces) -> str:
    """Computes a summary; why it ended."""
    from ms4.models.answer import Done
    from ms4.models.interrupt import Interrupt

    with Interrupt(answer.stop_flag) as ctrl_c:
        try:
            rows = talk.ready(answer, ctrl_c)
        except errors.IncompleteError:
            return "interrupted"
        running = talk.scheduler.submit(answer, talk.timeline, rows)
        reading = render.prefilling(running.progress)
        watched = talk.status.watching(lambda: f"summarizing  {len(answer.ids)} tokens" if answer.ids else reading())
        with ctrl_c.leaving(), watched:
            for event in running:
                pieces(event)
                if isinstance(event, Done):
                    return event.reason
    raise AssertionError("an answer ends in Done")
