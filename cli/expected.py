"""What a run is expected to do, before it and after: from what `ms4 plan` has measured, never measured here.

Where this machine has not been measured, or a GPU computes, nothing is expected and nothing is said.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import ms4
from ms4.cli import errors, host, measured
from ms4.cli.errors import CliError
from ms4.cli.options import EngineOptions
from ms4.cli.render import gigabytes

if TYPE_CHECKING:
    from ms4.models.answer import Statistics
    from ms4.models.forecast import Plan
    from ms4.models.model import Model
    from ms4.quant.gguf_file import GgufFile

SHORT = 512  # tokens of context, at which a run begins
SLOW = 3.0  # tokens per second, below which one should know before waiting


class NoRoomError(CliError):
    """The model cannot run in the memory that there is."""

    code = errors.NO_ROOM


def require_room(gguf: GgufFile, engine: EngineOptions) -> None:
    """NoRoomError, before a byte of weights, if not even one expert would find a place beside all else.

    A lower bound of what is needed, so that nothing is refused which runs.  --load map and copy are the user's word.
    """
    from ms4.models.forecast import reserve_of

    if engine.load not in ("auto", "stream"):
        return
    room = ms4.allowed().room
    if room is None:
        return
    by_layer: dict[str, int] = {}
    dense = 0
    for name, t in gguf.tensors.items():
        if name.endswith("_exps.weight"):
            layer = name.split(".")[1]
            by_layer[layer] = by_layer.get(layer, 0) + t.bytes // t.dims[-1]
        else:
            dense += t.bytes
    one = max(by_layer.values(), default=0)
    most = room - int(reserve_of(room))
    most = max(0, min(most, engine.ram - host.own_memory()) if engine.ram else most)
    if dense + one > most:
        raise NoRoomError(
            f"this model needs {gigabytes(dense + one)} of memory at the least, {gigabytes(most)} are there: "
            f"all but experts {gigabytes(dense)}, one expert {gigabytes(one)}",
            f"ms4 plan {shlex.quote(gguf.path[-80:])} names what fits; --load map tries it all the same",
        )


def plan_of(model: Model, n_context: int) -> Plan | None:
    """The plan for a model that is open, as it was opened; None: there is nothing to expect it from."""
    stats = model.engine.stats()
    if stats.device != "cpu" or not measured.machine_path().exists():
        return None
    from ms4.models import clock, forecast, mistral4

    tensors = mistral4.tensors_of(model.gguf, model.shape)
    rates = measured.rates(measured.rates_key(model.shape, tensors, stats.n_threads))
    disk = measured.disk(measured.disk_key(model.gguf.path))
    if rates is None or (disk is None and stats.load == "stream"):
        return None
    about = forecast.Model.made_of(model.shape, tensors, sum(model.gguf.sizes))
    here = clock.Machine(None, rates.ram, rates.flops, disk.bytes_per_s if disk else clock.GB)
    ram = stats.ram if stats.load == "stream" else None
    return forecast.make(about, forecast.Resources(here, ram, limited=True), max(n_context, 1))


def note_before(model: Model) -> None:
    """One line, if it will be slow."""
    stats = model.engine.stats()
    plan = plan_of(model, SHORT)
    if plan is None:
        if stats.load == "stream":
            errors.note(f"how fast that will be:  ms4 plan {shlex.quote(model.gguf.path[-80:])}")
        return
    plan = plan.corrected(*measured.ratios(measured.run_key(model.gguf.path, stats.load)))
    if plan.warm.tokens_per_s < SLOW:
        errors.note(
            f"expect about {plan.warm.tokens_per_s:.1f} tok/s of writing, {plan.prompt.tokens_per_s:.0f} of reading; "
            f"the limit is {plan.warm.terms.limit}"
        )


def note_after(model: Model, s: Statistics) -> str:
    """Compares a run with what was expected of it, and keeps the ratio for the next plan; what to add to --stats."""
    plan = plan_of(model, s.n_context)
    if plan is None:
        return ""
    key = measured.run_key(model.gguf.path, model.engine.stats().load)
    n_read = s.n_prompt - s.n_cached
    decode = s.decode_per_second / plan.warm.tokens_per_s if s.n_decode >= measured.LEAST_TOKENS else None
    prefill = s.prefill_per_second / plan.prompt.tokens_per_s if n_read >= measured.LEAST_PROMPT else None
    before = measured.ratios(key)
    measured.learn(key, decode, prefill)
    said = []
    for what, ratio, known, speed in (
        ("writing", decode, before[0], plan.warm.tokens_per_s),
        ("reading", prefill, before[1], plan.prompt.tokens_per_s),
    ):
        if ratio is not None:
            off = ratio / known - 1
            far = f", off by {100 * abs(off):.0f} %: the next plan knows" if abs(off) > measured.FAR else ""
            said.append(f"{what} predicted {speed * known:.1f} tok/s{far}")
    return "".join(f" · {text}" for text in said)
