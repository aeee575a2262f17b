"""The tables of predictions in docs/speed.md and docs/placement.md, from the model of time and from replayed traces.

    python docs/speed/predict.py          # a minute or two

writes them anew between their marks.  PEERS is what others have measured; tests/test_clock.py holds the model to it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ms4.models import clock, routing
from ms4.models.cards import GIB, Card
from ms4.models.clock import GB, LLAMA_CPP, MS4, SMALL_4, US, Machine, Sizes, Terms
from ms4.models.replay import NAMES, Outcome, Room, predict, replay
from ms4.models.routing import SKEWS, Trace, synthetic

DOCS = Path(__file__).resolve().parents[1]
PAGES = (DOCS / "speed.md", DOCS / "placement.md")
MARK = re.compile(r"(<!-- predicted (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CONTEXT = 4096  # tokens held while one is written
COPIES = 9.0  # experts that may be copied up between two tokens, where no machine is named
N_LAYER, N_PROMPT, N_TOKENS = 12, 256, 1456  # of synthetic traces; layers are drawn independently, so 12 do for 36
TRACES = {"coherent": "coherent", "flat": "flat", "demonstration": "", "uniform": "uniform"}  # and their skews


# --- what others have measured
class Peer(NamedTuple):
    """A row of somebody's table beside what the model says.  met: the model is within 25 per cent of it."""

    what: str
    source: str
    measured: float
    predicted: float
    met: bool = True


D = 2880  # gpt-oss-120b: experts in MXFP4, the rest in Q8_0
ATTENTION = D * (64 * 64 + 2 * 8 * 64) + 64 * 64 * D
GPT_OSS = Sizes(
    n_layer=36,
    n_expert=128,
    n_used=4,
    expert=3 * D * D * 17 / 32,
    every=36 * (ATTENTION * clock.Q8_0 + 128 * D * clock.F32),
    shared=0,
    output=201088 * D * clock.Q8_0,
    kv=36 * 2 * 8 * 64 * 2,
    flops_every=2 * 36 * ATTENTION,
    flops_expert=2 * 3 * D * D,
    flops_pair=0,
)


def flash_next(expert: float) -> Sizes:
    """Qwen3.8-Flash-Next: 48 layers, 10 of 512 experts.  Beside them 3 GB a pass: assumed, for 3.6 of its 6 billion."""
    return Sizes(48, 512, 10, expert, 3 * GB, 0, 0, 0, 0, 0, 0)


UD_Q4_K_XL = flash_next(71.7 * GIB / (48 * 512))
IQ3_S = flash_next(14.13 * GIB / 7935)  # so many slots took the place of 4,844 larger ones
VERIFIED = 2.44  # what verifying five tokens cost another engine, in steps of one
PER_PASS = 1.71  # tokens that came out of a pass of such a verification, in the one test that says it
FLOATS = 55e12  # llama.cpp's products of a prompt on a 3090, which are of 16-bit floats


def split(n_cpu: int, memory: str = "DDR5-5600", card: Card = clock.CARDS["3090"]) -> float:
    """llama.cpp --n-cpu-moe."""
    here = Machine(card, clock.MEMORIES[memory])
    return clock.decode(GPT_OSS, here, LLAMA_CPP, *clock.at_split(GPT_OSS, n_cpu)).tokens_per_s


def split_prompt(chunk: int, n_cpu: int) -> float:
    here = replace(clock.machine("3090", "DDR5-5600"), card=replace(clock.CARDS["3090"], flops=FLOATS))
    return clock.prefill(GPT_OSS, here, LLAMA_CPP, max(chunk, 4096), chunk, resident=1 - n_cpu / 36).tokens_per_s


def drafted(sizes: Sizes, memory: str, hit_rate: float) -> float:
    """An expert cache with drafts on a 3090, at the hit rate that was reported."""
    here = clock.machine("3090", memory)
    terms = clock.decode(sizes, here, MS4, *clock.at_hit_rate(sizes, hit_rate), union=VERIFIED)
    return PER_PASS * terms.tokens_per_s


def whole() -> float:
    """Small 4 in the VRAM of one card, as one graph."""
    here = Machine(Card(96 * GIB, 1792 * GB, 290e12, clock.PCIE["5 x16"]), clock.MEMORIES["DDR5-6000"])
    graph = replace(LLAMA_CPP, s_kernel=2 * US)
    return clock.decode(SMALL_4, here, graph, *clock.at_hit_rate(SMALL_4, 1.0), n_context=4096).tokens_per_s


def ours(n_layer: int) -> float:
    """A file of the real shape with fewer layers and words, in the memory of a server that reads 14.5 GB/s."""
    share = n_layer / SMALL_4.n_layer
    sizes = replace(SMALL_4, n_layer=n_layer, every=share * SMALL_4.every, output=22016 / 131072 * SMALL_4.output)
    return clock.decode(sizes, Machine(None, 14.5 * GB), MS4, *clock.at_hit_rate(sizes, 0.0)).tokens_per_s


OSS, FLASH = "gpt-oss-120b, llama.cpp", "Flash-Next, 3090, Strata"
LAPTOP = Card(8 * GIB, 448 * GB, 30e12, clock.PCIE["4 x16"])
PEERS = (
    Peer(f"{OSS}, 3090, 25 layers' experts on the CPU", "ai-maestro", 33.1, split(25)),
    Peer(f"{OSS}, 3090, 26 layers", "ai-maestro", 32.3, split(26)),
    Peer(f"{OSS}, 3090, 28 layers", "ai-maestro", 30.1, split(28)),
    Peer(f"{OSS}, 8 GB card, 14900K, all on the CPU", "gokawiil", 25.6, split(36, "DDR5-6000", LAPTOP)),
    Peer(f"{OSS}, 3090, prompt, chunks of 2,048", "ai-maestro", 1113, split_prompt(2048, 25)),
    Peer(f"{OSS}, 3090, prompt, chunks of 4,096", "ai-maestro", 1682, split_prompt(4096, 26)),
    Peer(f"{OSS}, 3090, prompt, chunks of 8,192", "ai-maestro", 2091, split_prompt(8192, 28)),
    Peer(f"{OSS}, 3090, prompt, chunks of 512", "ai-maestro", 380, split_prompt(512, 26), met=False),
    Peer(f"{FLASH} fork, UD-Q4_K_XL, DDR5, 81 % hits", "the fork", 74.3, drafted(UD_Q4_K_XL, "DDR5-5600", 0.81)),
    Peer(f"{FLASH}, IQ3_S, DDR4, 86.6 % hits", "its users", 90.4, drafted(IQ3_S, "DDR4-3200", 0.866)),
    Peer(f"{FLASH}, IQ3_S, DDR4, 59 % hits", "its users", 50.4, drafted(IQ3_S, "DDR4-3200", 0.59)),
    Peer(f"{FLASH}, UD-Q4_K_XL, DDR4, 81 % hits", "its users", 37.5, drafted(UD_Q4_K_XL, "DDR4-3200", 0.81), False),
    Peer("ms4 itself, 6 layers, no card, memory at 14 to 15 GB/s", "speed.md", 24.7, ours(6)),
    Peer("Mistral Small 4 Q4_K_M, llama.cpp, PRO 6000, all in VRAM", "llama.cpp 22286", 185.9, whole()),
)


# --- what traces say
@cache
def trace_of(name: str) -> Trace:
    if not TRACES[name]:
        return routing.load(DOCS.parent / "tests" / "data" / "demo.trace")
    return synthetic(SKEWS[TRACES[name]], N_TOKENS, n_prompt=N_PROMPT, n_layer=N_LAYER, seed=1)


@cache
def outcome(name: str, policy: str, share_vram: float, share_ram: float, copies: float) -> Outcome:
    """copies: experts that may be copied up between two tokens of all 36 layers."""
    trace = trace_of(name)
    budget = copies * trace.n_layer / SMALL_4.n_layer
    return replay(trace, policy, Room(round(share_vram * trace.n_id), round(share_ram * trace.n_id), budget))


def written(name: str, policy: str, here: Machine, share_ram: float = 1.0) -> tuple[Outcome, Terms]:
    n = SMALL_4.n_layer * SMALL_4.n_expert
    slots = clock.slots(SMALL_4, here.card.vram, CONTEXT) if here.card else 0
    copies = round(clock.idle_bytes(SMALL_4, here, MS4) / SMALL_4.expert, 1)
    found = outcome(name, policy, slots / n, share_ram, copies)
    return found, predict(found, SMALL_4, here, MS4, n_context=CONTEXT)


# --- tables
def table(head: str, numbers: int, lines: list[list[str]]) -> str:
    """A Markdown table whose last `numbers` columns stand to the right."""
    titles = head.split(" | ")
    rule = ["---"] * (len(titles) - numbers) + ["--:"] * numbers
    return "".join(f"| {' | '.join(line)} |\n" for line in [titles, rule, *lines])


def cards() -> str:
    """Cards and memories: writing on three traces, reading prompts."""
    lines = []
    n = SMALL_4.n_layer * SMALL_4.n_expert
    for card in ("3090", "4090", "5090"):
        for memory in ("DDR4-3200", "DDR5-5600"):
            here = clock.machine(card, memory)
            slots = clock.slots(SMALL_4, clock.CARDS[card].vram, CONTEXT)
            fixed = clock.decode(SMALL_4, here, MS4, *clock.at_hit_rate(SMALL_4, slots / n), n_context=CONTEXT)
            speeds = [written(name, "decayed", here)[1] for name in ("coherent", "demonstration")]
            lent = max(slots - 2 * SMALL_4.n_expert, 0) / n  # two layers' worth of slots take what is on its way
            chunk = clock.chunk(SMALL_4, clock.CARDS[card].vram)
            prompts = [
                clock.prefill(SMALL_4, here, MS4, tokens, min(tokens, chunk), resident=lent)
                for tokens in (512, 4096, 16384)
            ]
            lines.append(
                [f"{card}, {memory}", f"{100 * slots / n:.0f} %", f"{fixed.tokens_per_s:.0f}"]
                + [f"{terms.tokens_per_s:.0f}" for terms in speeds]
                + [f"{terms.tokens_per_s:,.0f}" for terms in prompts]
            )
    head = "card, memory | experts in VRAM | write: never moved | coherent | demonstration"
    return table(f"{head} | read 512 | read 4,096 | read 16,384", 7, lines)


def terms() -> str:
    """Where the milliseconds of a written token go."""
    lines = []
    for card, memory in (("3090", "DDR4-3200"), ("3090", "DDR5-5600"), ("4090", "DDR5-5600"), ("5090", "DDR5-5600")):
        _, found = written("coherent", "decayed", clock.machine(card, memory))
        spent = found.milliseconds()
        lines.append(
            [f"{card}, {memory}", *(f"{spent[k]:.1f}" for k in ("dense", "context", "hits", "misses", "control"))]
        )
        lines[-1].append(f"{1e3 * found.seconds:.1f}")
    return table("card, memory | dense | context | hits | misses | control | all, ms", 6, lines)


def policies() -> str:
    """Every policy on every trace, on a 3090 with DDR5."""
    here, lines = clock.machine("3090", "DDR5-5600"), []
    for name in TRACES:
        for policy in NAMES:
            found, spent = written(name, policy, here)
            copies = found.uploads_per_token * SMALL_4.n_layer / found.misses.shape[1]
            lines.append([name, policy, f"{100 * found.hit_rate:.1f} %", f"{copies:.1f}", f"{spent.tokens_per_s:.0f}"])
    return table("trace | policy | found in VRAM | copied up, experts a token | tokens/s", 3, lines)


def shares() -> str:
    """Hit rates by the share of experts in VRAM."""
    lines = []
    for name in TRACES:
        for policy in ("lru", "decayed", "optimum"):
            rates = [
                outcome(name, policy, share, 1.0, COPIES).hit_rate for share in (0.06, 0.12, 0.18, 0.25, 0.33, 0.5)
            ]
            lines.append([name, policy, *(f"{100 * rate:.0f} %" for rate in rates)])
    return table("trace | policy | 6 % | 12 % | 18 % | 25 % | 33 % | 50 %", 6, lines)


def memories() -> str:
    """Less RAM than experts: what is read from a disk of 6 GB/s."""
    lines = []
    n = SMALL_4.n_layer * SMALL_4.n_expert
    for card in ("3090", None):
        for ram in (96, 64, 48, 32):
            here = clock.machine(card, "DDR5-5600")
            places = clock.places(SMALL_4, ram * GIB, card=card is not None, n_context=CONTEXT)
            line = [f"{card or 'no card'}, {ram} GiB", f"{100 * places / n:.0f} %"]
            for name in ("coherent", "demonstration"):
                for policy in ("lru", "decayed"):
                    found, spent = written(name, policy, here, places / n)
                    line.append(f"{100 * found.read_rate:.1f} %: {spent.tokens_per_s:.1f}")
            lines.append(line)
    head = "card, RAM | places in RAM | coherent: lru | decayed | demonstration: lru | decayed"
    return table(head, 5, lines)


def peers() -> str:
    lines = [
        [
            p.what,
            p.source,
            f"{p.measured:,.4g}",
            f"{p.predicted:,.4g}",
            f"{100 * (p.predicted / p.measured - 1):+.0f} %",
        ]
        for p in PEERS
    ]
    return table("what | measured by | tokens/s | model | off by", 3, lines)


TABLES = {f.__name__: f for f in (cards, terms, policies, shares, memories, peers)}


def page(text: str) -> str:
    """The text with its tables made anew."""
    return MARK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> None:
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
