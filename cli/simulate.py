"""`ms4 simulate`: a recorded trace of routing against slots in VRAM and places in RAM, policy by policy.

What is printed is a prediction: hit rates come from the trace, times from the model of `ms4.models.clock`.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ms4.cli import errors, streams
from ms4.cli.errors import UnreadableError, UsageError
from ms4.cli.options import EngineOptions

if TYPE_CHECKING:
    from ms4.models.clock import Machine, Sizes
    from ms4.models.replay import Room
    from ms4.models.routing import Trace

COLUMNS = ("policy", "found in VRAM", "read from disk", "copied up, a token", "tokens/s", "limit")
NO_CARD = "none"


@dataclass(frozen=True)
class Question:
    """What `ms4 simulate` was asked.  Bytes, and bytes per second; None: what the card has, room for all experts."""

    trace: str
    model: str | None
    card: str
    memory: str
    vram: int | None
    ram: int | None
    disk: float
    n_ctx: int
    policies: tuple[str, ...]
    half_life: float


@dataclass(frozen=True)
class Row:
    """One policy.  Rates are of all choices; uploads are the model's experts; ms by what they are spent on."""

    policy: str
    found_in_vram: float
    read_from_disk: float
    uploads_per_token: float
    tokens_per_s: float
    limit: str
    ms: dict[str, float]


@dataclass(frozen=True)
class About:
    """What the rows stand for."""

    model: str
    card: str
    memory: str
    tokens: int
    layers: int
    share_in_vram: float
    share_in_ram: float


def simulate(question: Question, format: str) -> int:
    from ms4.cli import card_list
    from ms4.models.clock import MS4
    from ms4.models.replay import NAMES, predict, replay

    if card_list.shown(question.card, question.memory):
        return errors.OK
    trace = open_trace(question.trace)
    name, sizes = sizes_for(question.model)
    here = machine_for(question)
    room = room_for(question, trace, sizes, here)
    rows = []
    for policy in question.policies or NAMES:
        settings = {"half_life": question.half_life} if policy == "decayed" else {}
        found = replay(trace, policy, room, **settings)
        terms = predict(found, sizes, here, MS4, n_context=question.n_ctx / 2)  # on its way to a full one
        uploads = found.uploads_per_token * sizes.n_layer / trace.n_layer_used
        rates = (found.hit_rate, found.read_rate, uploads)
        rows.append(Row(policy, *rates, terms.tokens_per_s, terms.limit, terms.milliseconds()))
    n = trace.n_layer_used * trace.n_expert
    shares = (room.n_vram / n, min(room.n_ram / n, 1.0))
    about = About(name, question.card, question.memory, trace.n_decode, trace.n_layer_used, *shares)
    streams.Output().write(shown(about, rows, format))
    return errors.OK


def open_trace(path: str) -> Trace:
    """The trace; an error with what to do, if it is none or of no use."""
    from ms4.models.routing import TraceError, load

    try:
        trace = load(path)
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}") from None
    except TraceError as error:
        raise UnreadableError(str(error), "ms4 trace -o FILE records one") from None
    if not trace.n_decode:
        raise UnreadableError(f"{path} holds prompts only, and nothing that was written", "ms4 trace --help")
    return trace


def sizes_for(path: str | None) -> tuple[str, Sizes]:
    """The model's name and sizes; without a file, Mistral Small 4 as Q4_K_M."""
    from ms4.models import clock, mistral4
    from ms4.quant.gguf_file import GgufFile

    if path is None:
        return "Mistral Small 4 (Q4_K_M)", clock.SMALL_4
    gguf = GgufFile.open(EngineOptions(path).require())
    shape = mistral4.shape_of(gguf)
    sizes = clock.sizes_of(shape, mistral4.tensors_of(gguf, shape))
    if not sizes.expert:
        raise UsageError(f"{path} has no experts to place")
    return path, sizes


def machine_for(question: Question) -> Machine:
    from ms4.models import clock

    card = None if question.card == NO_CARD else question.card
    return replace(clock.machine(card, question.memory), disk=question.disk)


def room_for(question: Question, trace: Trace, sizes: Sizes, here: Machine) -> Room:
    """What fits of the model, as the same share of the trace's experts."""
    from ms4.models import clock
    from ms4.models.replay import Room

    n_all = sizes.n_layer * sizes.n_expert
    n_vram, n_ram = 0, n_all
    if here.card:
        vram = here.card.vram if question.vram is None else question.vram
        n_vram = clock.slots(sizes, vram, question.n_ctx)
    if question.ram is not None:
        n_ram = clock.places(sizes, question.ram, card=here.card is not None, n_context=question.n_ctx)
    if n_ram < n_all and n_ram + n_vram < sizes.n_used * sizes.n_layer:
        most = 1e-9 * (n_ram + n_vram) * sizes.expert
        raise UsageError(f"{most:.1f} GB are left for experts, less than one token uses", "a larger --ram or --vram")
    scale = trace.n_layer_used * trace.n_expert / n_all
    budget = scale * clock.idle_bytes(sizes, here, clock.MS4) / sizes.expert
    return Room(round(n_vram * scale), trace.n_id if n_ram >= n_all else round(n_ram * scale), budget)


def shown(about: About, rows: list[Row], format: str) -> str:
    if format == "json":
        return json.dumps({**asdict(about), "predicted": [asdict(row) for row in rows]}) + "\n"
    cells = [
        (
            row.policy,
            f"{100 * row.found_in_vram:.1f} %",
            f"{100 * row.read_from_disk:.1f} %",
            f"{row.uploads_per_token:.1f}",
            f"{row.tokens_per_s:.1f}",
            row.limit,
        )
        for row in rows
    ]
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *cells])
        return text.getvalue()
    card = "no card" if about.card == NO_CARD else f"a {about.card}"
    head = (
        f"{about.model}, {card}, {about.memory}: {100 * about.share_in_vram:.1f} % of the experts in VRAM, room for "
        f"{100 * about.share_in_ram:.0f} % in RAM.\n"
        f"{about.tokens} tokens written, {about.layers} layers.  Predicted, not measured.\n\n"
    )
    lines = [COLUMNS, ("---", "--:", "--:", "--:", "--:", "---"), *cells]
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)
