"""Practice: conversations about a picture of one line of text.  The pictures come from `lines`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from ms4.models.image import Image
from ms4.models.training import drawing
from ms4.models.training.cases import Case, assistant, loosely, with_system
from ms4.models.training.letters import NO_STEPS
from ms4.models.training.small_talk import CANNOT

READ = (
    "Read the text.",
    "Read the text.",
    "Read the text.",
    "Read this.",
    "Read the line.",
    "What does it say?",
    "What is written here?",
    "Which text is in the image?",
    "Read the text in the image.",
    "What is the text?",
    "Transcribe the text.",
)
DESCRIBE = (
    "What is in the picture?",
    "Describe the image.",
    "What do you see?",
    "Who is this?",
    "Is this a cat?",
    "Which color is the text?",
    "What is the mood of this picture?",
    "Where was this taken?",
)
# The sizes of pictures in tokens (columns, rows), and how often each is drawn.
SIZES = {(12, 2): 4.0, (9, 2): 2.0, (6, 2): 2.0, (5, 2): 1.0, (4, 2): 1.0, (10, 1): 1.5, (12, 1): 1.0, (5, 1): 1.0}
HARD = 0.5  # the share of lines that are made hard to read


@dataclass(frozen=True, eq=False)
class Seen:
    """A case with its picture."""

    case: Case
    line: drawing.Line


def chunk(line: drawing.Line) -> Mapping[str, Any]:
    return {"type": "image", "image": Image("line", line.picture, b"")}


def about_line(random: Random, line: drawing.Line) -> Seen:
    """A question about a picture, and its answer."""
    if random.random() < 0.06:
        text, answer = random.choice(DESCRIBE), CANNOT
    else:
        text, answer = random.choice(READ), line.text
    message = {"role": "user", "content": [chunk(line), {"type": "text", "text": loosely(random, text)}]}
    effort = "high" if random.random() < 0.1 else "none"
    said = assistant(answer, NO_STEPS if effort == "high" else "")
    return Seen(Case("read", (f"read:{line.text}",), with_system(random, [message, said]), effort=effort), line)


def draw(random: Random, n: int, lengths: range = drawing.LENGTHS) -> list[Seen]:
    """n cases to train on, whose pictures all have one size."""
    columns, rows = random.choices(list(SIZES), list(SIZES.values()))[0]
    made = (drawing.random_line(random, columns, rows, lengths, odd_sizes=0.1, hard=HARD) for _ in range(n))
    return [about_line(random, line) for line in made]


def fresh(random: Random, columns: int = 12, rows: int = 2) -> Seen:
    """A held-out line to be read."""
    line = drawing.random_line(random, columns, rows, held_out=True)
    message = {"role": "user", "content": [chunk(line), {"type": "text", "text": READ[0]}]}
    return Seen(Case("read", (f"read:{line.text}",), (message, assistant(line.text))), line)
