"""Writes the routing trace in tests/data: the demonstration checkpoint on talk of every kind that it practised.

    python tests/make_trace.py tests/data/demo.trace

Eight conversations of a kind follow one another, then eight of the next, as somebody's topics do; their last turn is
answered, the likeliest token each time.  The same on every machine, as the bits of the engine are.
"""

import sys
from random import Random

from ms4.cli.options import DEMO
from ms4.models.answer import Answer
from ms4.models.model import Model
from ms4.models.routing import Recorder
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.tokenizer import Tokenizer
from ms4.models.training.skills import KINDS, questions

IN_A_ROW, ROUNDS, N_CTX = 8, 2, 2048


def main(path: str) -> None:
    random, sampler = Random(7), Sampler(SamplingParams.for_effort("none", greedy=True))
    with Model.open(DEMO) as model, model.session(N_CTX) as session, Recorder(model.engine) as recorder:
        tokenizer = Tokenizer(model.vocabulary)
        for kind in [*KINDS] * ROUNDS:
            for _ in range(IN_A_ROW):
                *_, question = questions(KINDS[kind](random))
                answer = Answer(question.prompt(tokenizer), sampler, tokenizer, N_CTX, max_tokens=300)
                session.rewind(0)
                answer.choose(session.feed(answer.prompt.ids))
                while answer.reason is None:
                    answer.choose(session.feed(answer.ids[-1:]))
    with open(path, "wb") as file:
        recorder.trace().save(file)


if __name__ == "__main__":
    main(sys.argv[1])
