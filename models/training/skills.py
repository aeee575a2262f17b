"""The skills of the demonstration checkpoint: what is practised, what is measured, and what a right answer is.

A kind is one sort of practice conversation; a skill is a line of the table and is measured on the held-out cases of
its kinds.  Reading images is a skill too, but it lives in `lines`, where the pictures are drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from random import Random

from ms4.models.training import letters, small_talk, sums, tool_talk
from ms4.models.training.cases import (
    Answer,
    Case,
    Message,
    Question,
    is_right,
    questions,
    read_answer,
    training_ids,
    with_system,
)

__all__ = ["KINDS", "SKILLS", "Answer", "Case", "Question", "draw", "fresh", "is_right", "questions", "read_answer"]
__all__ += ["training_ids"]

CHAINED = 0.4  # how many of the conversations for training are several in one
Make = Callable[[Random], Case]
KINDS: Mapping[str, Make] = {
    "reasoned": sums.reasoned,
    "at_once": sums.at_once,
    "echo": letters.echo,
    "reverse": letters.reverse,
    "upper": letters.upper,
    "lower": letters.lower,
    "count": letters.count,
    "count_one": letters.count_one,
    "sort": letters.sort,
    "about": small_talk.about,
    "tools": tool_talk.practice,
    "two_turns": small_talk.two_turns,
    "other": small_talk.other,
}
SHORT = ("echo", "reverse", "upper", "lower", "count", "count_one", "sort", "about", "other")
SKILLS: Mapping[str, tuple[Make, ...]] = {
    "reasons": (sums.reasoned,),
    "sums without reasoning": (sums.at_once,),
    "follows": tuple(KINDS[k] for k in ("echo", "reverse", "upper", "lower", "count", "count_one", "sort", "about")),
    "calls tools": (tool_talk.single,),
    "refers back": (small_talk.two_turns,),
    "says it cannot": (small_talk.other,),
}


def chain(kind: str, random: Random) -> Case:
    """Several cases one after the other in one conversation: half of them of this kind, the others of any."""
    effort = "high" if kind == "reasoned" else "none"
    messages: list[Message] = []
    keys: list[str] = []
    for _ in range(random.randint(2, 4)):
        make = KINDS[kind] if not keys or random.random() < 0.5 else KINDS[random.choice(SHORT)]
        while (case := make(random)).effort != effort or case.messages[0]["role"] == "system":
            pass
        messages += case.messages
        keys += case.keys
    return Case(kind, tuple(keys), with_system(random, messages), effort=effort)


def draw(kind: str, random: Random) -> Case:
    """A case to train on."""
    chained = kind != "tools" and random.random() < CHAINED
    while (case := chain(kind, random) if chained else KINDS[kind](random)).held_out:
        pass
    return case


def fresh(skill: str, seed: int) -> Iterator[Case]:
    """Cases of a skill that training never sees, without end; its kinds take turns."""
    random = Random(zlib.crc32(skill.encode()) + seed)
    while True:
        for make in SKILLS[skill]:
            while not (case := make(random)).held_out:
                pass
            yield case
