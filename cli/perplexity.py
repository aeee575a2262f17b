"""`ms4 perplexity`: how well the model predicts a text.

The text is cut into segments of --ctx tokens.  Each begins with BOS in place of its first token, and only its second
half is judged, so that every judged token has at least half a segment before it: the usual procedure, whose figures
can be compared with those of other programs for the same --ctx.
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ms4.cli import errors, loading, render, streams
from ms4.cli.errors import UnreadableError, UsageError
from ms4.cli.options import EngineOptions
from ms4.models.untrusted import Reading

if TYPE_CHECKING:
    import ms4


@dataclass(frozen=True)
class Result:
    """Perplexity with its standard error."""

    perplexity: float
    error: float
    n_judged: int


def perplexity(path: str, n_ctx: int, most: int | None, engine: EngineOptions, rule: Reading, *, as_json: bool) -> int:
    """Reads the file, judges its segments (at most `most`), prints the result."""
    from ms4.models.control import Control
    from ms4.models.interrupt import interruptible

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
        losses: list[np.ndarray] = []
        with model.session(n_ctx) as session, interruptible() as stop:
            for i in range(n_segments):
                segment = [int(Control.BOS), *ids[i * n_ctx + 1 : (i + 1) * n_ctx]]
                losses.append(judge(session, segment, stop))
                status.show(f"segment {i + 1}/{n_segments}  perplexity {summarize(losses).perplexity:.4f}")
    status.clear()
    print_result(summarize(losses), n_segments, n_ctx, engine.attn_scale, as_json)
    return errors.OK


def judge(session: "ms4.Session", segment: list[int], stop: "ms4.StopFlag") -> np.ndarray:
    """-log p of each token in the second half of the segment."""
    from ms4.models.sampling import surprise

    first = max(len(segment) // 2, 1)
    session.rewind(0)
    if first > 1:
        session.feed(segment[: first - 1], n_logits=0, stop=stop)
    return surprise(session.feed(segment[first - 1 : -1], all_logits=True, stop=stop), segment[first:])


def summarize(losses: list[np.ndarray]) -> Result:
    every = np.concatenate(losses)
    value = math.exp(float(every.mean()))
    spread = float(every.std(ddof=1)) / math.sqrt(len(every)) if len(every) > 1 else math.inf
    return Result(value, value * spread, len(every))


def print_result(result: Result, n_segments: int, n_ctx: int, attn_scale: str, as_json: bool) -> None:
    output = streams.Output()
    if as_json:
        fields = {
            "perplexity": result.perplexity,
            "error": result.error,
            "tokens": result.n_judged,
            "segments": n_segments,
            "ctx": n_ctx,
            "attn_scale": attn_scale,
        }
        output.write(json.dumps(fields) + "\n")
    else:
        output.write(
            f"perplexity {result.perplexity:.4f} +- {result.error:.4f}  "
            f"({result.n_judged} tokens in {n_segments} segments of {n_ctx}, attn-scale {attn_scale})\n"
        )
