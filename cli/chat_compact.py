"""What a chat does about a context that fills up: it says so in time, and /compact makes the older turns a summary.

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

MARKS = (0.8, 0.95)  # shares of the context at which something is said
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
        talk.say(
            f"the context is {100 * share:.0f} % full: /compact makes the older turns a summary, /new begins again"
        )
    talk.warned = passed


def compact(talk: Talk, hint: str) -> None:
    """Puts a summary into the place of all turns but the newest, or of as many as leave room for it."""
    from ms4.models.dialogue import Turn, closed
    from ms4.models.sessions import unfolded

    turns = talk.dialogue.turns
    message = f"{REQUEST} {hint}".strip()
    if len(turns) < 2 or len(turns) == 2 and turns[0].older:
        talk.tell("nothing is older than the newest turn, which stays as it is")
        return
    found = fitting(talk, message)
    if found is None:
        talk.tell("the first turn leaves no room for a summary; /undo takes back the newest, --ctx allows more")
        return
    n, answer = found
    before = size(talk)
    pieces = remembered.Pieces()
    if summarize(talk, answer, pieces) not in ("stop", "length"):
        talk.tell("stopped; nothing was changed")
        return
    text = "".join(pieces.text).strip()
    old = list(turns)
    turns[:n] = [Turn(message, closed(answer.ids), tuple(turns[:n]))]
    after = size(talk)
    if not text or after >= before:
        turns[:] = old
        talk.tell(f"the summary of {len(answer.ids)} tokens makes nothing shorter; nothing was changed")
        return
    talk.memory.compact(n, message, answer.ids, text)
    talk.warned = 0
    n_older = len(unfolded(old[:n]))
    replaced = f"this summary takes the place of {n_older} turn{'' if n_older == 1 else 's'}"
    talk.tell(f"compacted: {before} -> {after} tokens; {replaced}:")
    talk.tell(visible.text(text))
    talk.say("/undo behind it brings them back" + (", and the session keeps them" if talk.memory.path else ""))


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
