"""table.py: what the demonstration checkpoint can do, measured through the engine on cases that training never saw.

    python -m ms4.models.training.table [-n 200] [--model FILE] [--seed N] [--skill NAME] [--card README.md]

Every answer is decoded greedily and counts only if it is exactly right; of a conversation of several turns, only if
all of them are.  The table is printed, and with --card also put into a model card between two marks.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from ms4.models import prompt
from ms4.models.answer import Answer
from ms4.models.answer_parser import Text, Thinking, ToolCall
from ms4.models.companion import find
from ms4.models.image import Image, measure, preprocess
from ms4.models.model import Model
from ms4.models.pixtral import Tower
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.scheduler import Scheduler
from ms4.models.tokenizer import Tokenizer
from ms4.models.training import drawing, pictures, skills
from ms4.models.vision import VisionEncoder

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

DEMO = Path(__file__).parents[1] / "demo" / "ms4-demo.gguf"
READS = "reads"
GRID = (12, 2)  # tokens of a picture: 336 x 56 pixels
N_CTX = 2048
MOST_TOKENS = 400  # of one answer; the longest right one has fewer than 200
BARS = {READS: "90 %", "reasons": "95 %", "follows": "95 %", "calls tools": "95 %"}


class Marks:
    """The two lines of a model card between which a table stands."""

    def __init__(self, what: str) -> None:
        self.begin, self.end = f"<!-- {what} -->\n", f"<!-- end of {what} -->\n"


@dataclass
class Score:
    """How many cases of a skill were right; `kinds` the same by kind of case."""

    n: int = 0
    right: int = 0
    kinds: dict[str, Score] = field(default_factory=dict)

    def add(self, right: bool, kind: str = "") -> None:
        self.n += 1
        self.right += right
        if kind:
            self.kinds.setdefault(kind, Score()).add(right)

    def __str__(self) -> str:
        return f"{100 * self.right / max(self.n, 1):.1f} %"


class Examiner:
    """Asks one open model."""

    def __init__(self, model: Model) -> None:
        self.tokenizer = Tokenizer(model.vocabulary)
        self.sampler = Sampler(SamplingParams(temperature=0.0))
        self.scheduler = Scheduler(model.engine)
        self.timeline = self.scheduler.open(min(N_CTX, model.shape.n_ctx_train))
        tower = find(model.gguf.path)
        self.encoder = VisionEncoder(model.engine, Tower.read(tower)) if tower else None

    def close(self) -> None:
        self.scheduler.close()
        if self.encoder:
            self.encoder.close()

    def ask(self, asked: prompt.Prompt, rows: np.ndarray | None = None) -> skills.Answer:
        """The greedy answer."""
        text, thought, calls = "", "", []
        n_ctx = self.timeline.n_ctx
        most = min(n_ctx - len(asked.ids), MOST_TOKENS)
        answer = Answer(asked, self.sampler, self.tokenizer, n_ctx, max_tokens=most)
        for event in self.scheduler.submit(answer, self.timeline, rows):
            if isinstance(event, Text):
                text += event.text
            elif isinstance(event, Thinking):
                thought += event.text
            elif isinstance(event, ToolCall) and event.complete:
                calls.append((event.name, event.arguments))
        return skills.Answer(text, tuple(calls), thought)

    def passes(self, case: skills.Case) -> bool:
        """True if every turn is answered rightly, each after the right answers before it."""
        turns = skills.questions(case)
        return all(skills.is_right(q.answer, self.ask(q.prompt(self.tokenizer))) for q in turns)

    def read(self, picture: Picture) -> str:
        """What the model reads in a picture."""
        if self.encoder is None:
            raise FileNotFoundError("no mmproj file beside the model")
        rule = self.encoder.rule
        image = Image("line", picture, hashlib.sha256(picture.tobytes()).digest())
        chunks = [{"type": "image", "image": image}, {"type": "text", "text": pictures.READ[0]}]
        asked = prompt.render(
            [{"role": "user", "content": chunks}], self.tokenizer, measure=lambda chunk: measure(chunk, None, rule)
        )
        return self.ask(asked, self.encoder.encode(preprocess(image, None, rule))).text.strip()


def fresh_lines(seed: int) -> Iterator[drawing.Line]:
    """Lines that training never saw, without end."""
    random = Random(seed)
    while True:
        yield drawing.random_line(random, *GRID, held_out=True)


def score_text(examiner: Examiner, cases: Iterable[skills.Case]) -> Score:
    score = Score()
    for case in cases:
        score.add(examiner.passes(case), case.kind)
    return score


def score_reading(examiner: Examiner, drawn: Iterable[drawing.Line]) -> Score:
    score = Score()
    for line in drawn:
        score.add(examiner.read(line.picture) == line.text)
    return score


def table(examiner: Examiner, names: Iterable[str], n: int, seed: int) -> Iterator[str]:
    """The lines of the table, each as soon as it is known."""
    yield "| skill | fresh cases | exactly right | wanted |"
    yield "|---|---|---|---|"
    for name in names:
        if name == READS:
            score = score_reading(examiner, islice(fresh_lines(seed), n))
        else:
            score = score_text(examiner, islice(skills.fresh(name, seed), n))
        yield f"| {name} | {score.n} | {score} | {BARS.get(name, '')} |"
        if len(score.kinds) > 1:
            for kind, part in sorted(score.kinds.items()):
                yield f"| &nbsp; {kind.replace('_', ' ')} | {part.n} | {part} | |"


def put_into_card(path: Path, rows: list[str], marks: Marks) -> None:
    """Replaces what stands between the marks of the model card."""
    before, mark, rest = path.read_text(encoding="utf-8").partition(marks.begin)
    _, end, after = rest.partition(marks.end)
    if not mark or not end:
        raise ValueError(f"{path}: the marks {marks.begin.strip()} and {marks.end.strip()} are missing")
    path.write_text(before + mark + "".join(f"{row}\n" for row in rows) + end + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    names = [READS, *skills.SKILLS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=200, metavar="N", help="cases of each skill (200)")
    parser.add_argument("--model", type=Path, default=DEMO, metavar="FILE", help="default: the shipped checkpoint")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="other cases")
    parser.add_argument("--skill", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--card", type=Path, metavar="FILE", help="put the table into this model card")
    given = parser.parse_args(arguments)
    rows = []
    with Model.open(given.model) as model:
        examiner = Examiner(model)
        try:
            for row in table(examiner, given.skill or names, given.n, given.seed):
                rows.append(row)
                print(row, flush=True)
        finally:
            examiner.close()
    if given.card:
        put_into_card(given.card, rows, Marks("skills"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
