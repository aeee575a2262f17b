"""presets.py: what quantizing costs the demonstration checkpoint: its perplexity on right answers, preset by preset.

    python -m ms4.models.training.presets HF_DIR [-n 200] [--card README.md]

The text is that of held-out cases of all skills; only what the model is to say there counts.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ms4.models.convert import PRESETS, convert
from ms4.models.model import Model
from ms4.models.sampling import surprise
from ms4.models.tokenizer import Tokenizer
from ms4.models.training import skills
from ms4.models.training.table import Marks, put_into_card

MARKS = Marks("presets")
RANKED = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def cases(n: int, seed: int = 1) -> Iterator[skills.Case]:
    """n held-out cases of every skill that has a single right answer; sums at once are guesses and left out."""
    for name in skills.SKILLS:
        if name != "sums without reasoning":
            yield from islice(skills.fresh(name, seed), n)


def perplexity(path: str | Path, asked: Iterable[skills.Case]) -> float:
    """exp of the mean of -log p over the tokens that the model is to say."""
    losses: list[np.ndarray] = []
    with Model.open(path) as model:
        tokenizer = Tokenizer(model.vocabulary)
        with model.session(min(2048, model.shape.n_ctx_train)) as session:
            for case in asked:
                ids, said = skills.training_ids(case, tokenizer)
                session.rewind(0)
                answered = np.array(said[1:])
                logits = session.feed(ids[:-1], all_logits=True)
                losses.append(surprise(logits[answered], np.array(ids[1:])[answered]))
    return math.exp(float(np.concatenate(losses).mean()))


def rank(folder: Path, n: int) -> Iterator[str]:
    """The lines of the table, best first by size."""
    yield "| type | MB | perplexity of right answers |"
    yield "|---|--:|--:|"
    with tempfile.TemporaryDirectory() as place:
        for preset in RANKED:
            path = Path(place, f"{preset}.gguf")
            convert(folder, path, preset)
            yield f"| {preset} | {path.stat().st_size / 1e6:.1f} | {perplexity(path, cases(n)):.4f} |"
            path.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="HF_DIR")
    parser.add_argument("-n", type=int, default=200, metavar="N", help="cases of each skill (200)")
    parser.add_argument("--card", type=Path, metavar="FILE", help="put the table into this model card")
    given = parser.parse_args(arguments)
    assert set(RANKED) <= set(PRESETS)
    rows = []
    for row in rank(given.folder, given.n):
        rows.append(row)
        print(row, flush=True)
    if given.card:
        put_into_card(given.card, rows, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
