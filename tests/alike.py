"""Does another engine write the same greedy text? python tests/alike.py PATH/llama-completion [-n 60] [--model FILE]

Asks both the first question of held-out cases of every skill, and prints what differs.  They compute with different
8-bit activations, so a near-tie may fall either way now and then.
"""

import argparse
import subprocess
import sys
from itertools import islice
from pathlib import Path

from ms4.models.answer import Answer
from ms4.models.control import Control
from ms4.models.model import Model
from ms4.models.prompt import Prompt
from ms4.models.training import skills
from ms4.models.training.table import DEMO, Examiner

MOST_TOKENS = 200


def written(peer: str, model: Path, text: str) -> str:
    """What the peer writes after `text`, control tokens included."""
    command = [peer, "-m", str(model), "-p", text, "-no-cnv", "-sp", "--temp", "0"]
    command += ["-n", str(MOST_TOKENS), "-t", "1", "--no-warmup"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    return out.partition(text)[2].partition("</s>")[0].removesuffix(" [end of text]")


def greedy(examiner: Examiner, question: Prompt) -> list[int]:
    """The ids that ms4 writes, without the one that ends them."""
    n_ctx = examiner.timeline.n_ctx
    answer = Answer(question, examiner.sampler, examiner.tokenizer, n_ctx, max_tokens=MOST_TOKENS)
    for _ in examiner.scheduler.submit(answer, examiner.timeline):
        pass
    return [id for id in answer.ids if id != Control.EOS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peer", metavar="PATH", help="llama.cpp's llama-completion")
    parser.add_argument("-n", type=int, default=60, metavar="N", help="cases in all (60)")
    parser.add_argument("--model", type=Path, default=DEMO, metavar="FILE", help="default: the shipped checkpoint")
    given = parser.parse_args()
    same = asked = 0
    with Model.open(given.model) as model:
        examiner = Examiner(model)
        spelling = examiner.tokenizer.spelling
        for name in skills.SKILLS:
            for case in islice(skills.fresh(name, 2), given.n // len(skills.SKILLS)):
                question = next(skills.questions(case)).prompt(examiner.tokenizer)
                text = b"".join(spelling(id) for id in question.ids if id != Control.BOS).decode()
                ours = b"".join(map(spelling, greedy(examiner, question))).decode("utf-8", "replace")
                theirs = written(given.peer, given.model, text)
                asked, same = asked + 1, same + (ours == theirs)
                if ours != theirs:
                    print(f"{name}: {text!r}\n  ms4  {ours!r}\n  peer {theirs!r}")
        examiner.close()
    print(f"{same} of {asked} the same")
    sys.exit(same < 0.9 * asked)


if __name__ == "__main__":
    main()
