"""`ms4 perplexity`: how well the model predicts a text.

The text is cut into segments of --ctx tokens.  Each begins with BOS in place of its first token, and only its second
half is judged, so that every judged token has at least half a segment before it: the usual procedure, whose figures
can be compared with those of other programs for the same --ctx.  At the same tokens it is compared with another model
(--ref), of which `divergence.py` has kept the logits (--write-ref).
"""

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ms4.cli import errors, loading, render, streams
from ms4.cli.errors import UnreadableError, UsageError
from ms4.cli.options import EngineOptions
from ms4.models.untrusted import Reading

if TYPE_CHECKING:
    import ms4
    from ms4.cli.divergence import Divergence


@dataclass(frozen=True)
class Result:
    """Perplexity with its standard error."""

    perplexity: float
    error: float
    n_judged: int


@dataclass(frozen=True)
class Question:
    """What `ms4 perplexity` was asked."""

    path: str
    n_ctx: int
    most: int | None  # segments
    ref: str | None = None  # the file of another model's logits
    write_ref: str | None = None
    as_json: bool = False


def perplexity(question: Question, engine: EngineOptions, rule: Reading) -> int:
    """Reads the file, judges its segments, prints the result."""
    from ms4.cli import divergence
    from ms4.models.control import Control
    from ms4.models.interrupt import interruptible
    from ms4.models.sampling import surprise

    path, n_ctx, most = question.path, question.n_ctx, question.most
    engine.require()
    text = streams.read_stdin(rule, engine.quiet) if path == "-" else streams.read_text(path, rule)
    if not text:
        raise UnreadableError(f"{path}: no text")
    status = render.StatusLine(engine.quiet)
    with loading.open_model(engine, status) as model:
        ids = loading.usable(model.vocabulary).encode(text)
        n_segments = min(len(ids) // n_ctx, most or len(ids))
        if n_ctx > model.engine.shape.n_ctx_train:
            raise UsageError(f"--ctx {n_ctx}: the model allows at most {model.engine.shape.n_ctx_train} tokens")
        if n_segments == 0:
            raise UnreadableError(f"{path} has {len(ids)} tokens, less than one segment of {n_ctx}", "a smaller --ctx")
        n_rows = n_segments * (n_ctx - first_judged(n_ctx))
        about = divergence.header_of(ids[: n_segments * n_ctx], n_ctx, n_rows, model.engine.shape.n_vocab)
        other = divergence.Reference(question.ref, about) if question.ref else None
        losses: list[np.ndarray] = []
        with ExitStack() as held:
            kept = held.enter_context(divergence.Writer(question.write_ref, about)) if question.write_ref else None
            session, stop = held.enter_context(model.session(n_ctx)), held.enter_context(interruptible())
            for i in range(n_segments):
                segment = [int(Control.BOS), *ids[i * n_ctx + 1 : (i + 1) * n_ctx]]
                rows = logits(session, segment, stop)
                losses.append(surprise(rows, segment[first_judged(n_ctx) :]))
                if kept:
                    kept.add(rows)
                if other:
                    other.compare(rows)
                status.show(f"segment {i + 1}/{n_segments}  perplexity {summarize(losses).perplexity:.4f}")
    status.clear()
    found = other.result() if other else None
    print_result(summarize(losses), found, n_segments, n_ctx, engine.attn_scale, question.as_json)
    return errors.OK


def first_judged(n_ctx: int) -> int:
    return max(n_ctx // 2, 1)


def logits(session: "ms4.Session", segment: list[int], stop: "ms4.StopFlag") -> np.ndarray:
    """Those from which each token in the second half of the segment is predicted, float32 [tokens, vocabulary]."""
    first = first_judged(len(segment))
    session.rewind(0)
    if first > 1:
        session.feed(segment[: first - 1], n_logits=0, stop=stop)
    return session.feed(segment[first - 1 : -1], all_logits=True, stop=stop)


def summarize(losses: list[np.ndarray]) -> Result:
    every = np.concatenate(losses)
    value = math.exp(float(every.mean()))
    spread = float(every.std(ddof=1)) / math.sqrt(len(every)) if len(every) > 1 else math.inf
    return Result(value, value * spread, len(every))


def print_result(
    result: Result, other: "Divergence | None", n_segments: int, n_ctx: int, attn_scale: str, as_json: bool
) -> None:
    output = streams.Output()
    if as_json:
        fields = {
            "perplexity": result.perplexity,
            "error": result.error,
            "tokens": result.n_judged,
            "segments": n_segments,
            "ctx": n_ctx,
            "attn_scale": attn_scale,
            **({f"kl_{name}": value for name, value in asdict(other).items()} if other else {}),
        }
        output.write(json.dumps(fields) + "\n")
    else:
        output.write(
            f"perplexity {result.perplexity:.4f} +- {result.error:.4f}  "
            f"({result.n_judged} tokens in {n_segments} segments of {n_ctx}, attn-scale {attn_scale})\n"
        )
        if other:
            output.write(
                f"KL from the reference {other.mean:.5f} +- {other.error:.5f}, at most {other.most:.4f}; "
                f"the same token likeliest at {100 * other.same:.1f} %\n"
            )
