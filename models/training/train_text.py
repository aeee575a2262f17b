"""Trains the text model of the demonstration checkpoint: python -m ms4.models.training.train_text FOLDER.

Seeded, and resumable at any moment: each step draws its conversations from a seed of its own, and the state is saved
every few minutes and when the process is told to stop.  Started again, it goes on; `--tokens` sets when it is done.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

from ms4.models.control import Control
from ms4.models.training import network, skills
from ms4.models.training import text_forward as forward

SEED = 20
SAVE_EVERY, MEASURE_EVERY, REPORT_EVERY = 480, 300, 20  # seconds
WARM_UP = 100  # steps
FLOOR = 0.1  # how much a kind that is always right is still practised
MUON = 2.0  # its learning rate, as a multiple of AdamW's
# How often a kind is drawn while the model has learned nothing; later what it gets right is drawn less.
SHARES = {
    "reasoned": 2.0,
    "at_once": 0.1,
    "echo": 0.8,
    "reverse": 1.5,
    "upper": 0.6,
    "lower": 0.6,
    "count": 1.2,
    "count_one": 1.5,
    "sort": 2.0,
    "about": 0.5,
    "tools": 0.6,
    "two_turns": 1.2,
    "other": 0.5,
}


@dataclass
class State:
    """What a saved run knows besides weights and moments."""

    step: int = 0
    tokens: int = 0
    marks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SHARES, 0.0))  # share of right rows


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a step trains on: the kind of each conversation, the batch, and its pictures, all of one size."""

    kinds: list[str]
    batch: forward.Batch
    n_tokens: int
    pixels: torch.Tensor | None = None


class Trainer:
    """One training run: a network, its optimizers, and the file that it goes on from."""

    file = "text.pt"
    decay = 0.0  # the last part of the tokens, over which the learning rate falls to zero; here the joint training does

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.path = folder / self.file
        self.options = options
        self.tokenizer = network.tokenizer()
        self.model = network.build(SEED)
        self.named = {n: p for n, p in self.model.named_parameters() if self.is_trained(n)}
        self.optimizers = self.make_optimizers()
        self.state = State()
        self.stopped = False
        if self.path.exists():
            self.load()
        else:
            self.begin(folder)
        forward.halve(self.model)

    def is_trained(self, name: str) -> bool:
        return "language_model" in name or "lm_head" in name

    def begin(self, folder: Path) -> None:
        """What happens before the first step of a new run."""

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Muon for the matrices that every token passes, AdamW for the experts, the router, both ends and the norms."""
        ends = ("embed_tokens", "lm_head", "mlp.gate.")
        dense = {n for n, p in self.named.items() if p.dim() == 2 and not any(end in n for end in ends)}
        inner = [p for n, p in self.named.items() if n in dense]
        experts = [p for n, p in self.named.items() if p.dim() == 3]
        outer = [p for n, p in self.named.items() if p.dim() != 3 and n not in dense]
        groups = [{"params": experts, "weight_decay": 0.05}, {"params": outer, "weight_decay": 0.0}]
        return {
            "muon": torch.optim.Muon(inner, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True),
        }

    def load(self) -> None:
        saved = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        self.model.load_state_dict(saved["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
        self.state = State(**saved["state"])

    def save(self) -> None:
        """Replaces the saved state in one move, so that an interruption never leaves half of one."""
        new = self.path.with_suffix(".new")
        saved = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        saved |= {"model": self.model.state_dict(), "state": vars(self.state)}
        torch.save(saved, new)
        os.replace(new, self.path)

    def rate(self, optimizer: str) -> float:
        """The learning rate of an optimizer at this step."""
        end = next((end for end in self.options.tokens if self.state.tokens < end), self.state.tokens)
        left = 1 - self.state.tokens / end
        rate = self.options.rate * min(1.0, (self.state.step + 1) / WARM_UP, left / self.decay if self.decay else 1.0)
        return rate * MUON if optimizer == "muon" else rate

    def text_rows(self, random: Random) -> tuple[list[str], list[tuple[list[int], list[bool]]]]:
        """Conversations of `batch` tokens, and their kinds."""
        kinds = list(SHARES)
        weights = [SHARES[kind] * (1 - self.state.marks[kind] + FLOOR) for kind in kinds]
        drawn: list[str] = []
        rows: list[tuple[list[int], list[bool]]] = []
        while sum(len(ids) for ids, _ in rows) < self.options.batch:
            drawn += random.choices(kinds, weights)
            rows.append(skills.training_ids(skills.draw(drawn[-1], random), self.tokenizer))
        return drawn, rows

    def draw(self) -> Drawn:
        """What the next step trains on; it follows from the seed, the step and the marks."""
        kinds, rows = self.text_rows(Random(SEED * 1_000_003 + self.state.step))
        return Drawn(kinds, forward.stack(rows, Control.PAD), sum(len(ids) for ids, _ in rows))

    def features(self, drawn: Drawn) -> torch.Tensor | None:
        """The projector's rows for the pictures of a step."""
        return None

    def step(self) -> tuple[float, float]:
        drawn = self.draw()
        batch = drawn.batch
        logits, imbalance = forward.forward(self.model, batch, self.features(drawn))
        loss = F.cross_entropy(logits, batch.answers)
        (loss + forward.BALANCE * imbalance).backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rate(name)
            optimizer.step()
        for name, weight in self.named.items():
            if ".experts." not in name:
                weight.grad = None
        forward.halve(self.model)
        for kind, mark in zip(drawn.kinds, forward.row_marks(logits, batch, len(drawn.kinds)).tolist(), strict=True):
            self.state.marks[kind] += 0.02 * (mark - self.state.marks[kind])
        self.state.step += 1
        self.state.tokens += drawn.n_tokens
        return loss.item(), imbalance.item() / network.N_LAYER

    @torch.no_grad()
    def measure(self, n_cases: int = 48) -> str:
        """The share of held-out cases of each skill that greedy decoding gets right."""
        found = []
        for skill in skills.SKILLS:
            cases = skills.fresh(skill, 0)
            rows = [skills.training_ids(next(cases), self.tokenizer) for _ in range(n_cases)]
            batch = forward.stack(rows, Control.PAD)
            logits, _ = forward.forward(self.model, batch)
            found.append(f"{skill} {forward.row_marks(logits, batch, n_cases).mean().item():.0%}")
        return ", ".join(found)

    def run(self) -> None:
        begun = saved = measured = reported = time.monotonic()
        first, average = self.state.tokens, 0.0
        while self.state.tokens < self.options.tokens[-1] and not self.stopped:
            loss, uneven = self.step()
            average = loss if not average else average + 0.05 * (loss - average)
            now = time.monotonic()
            if now - reported > REPORT_EVERY:
                reported = now
                speed = (self.state.tokens - first) / (now - begun)
                eta = (self.options.tokens[-1] - self.state.tokens) / speed / 60
                marks = " ".join(f"{kind} {mark:.2f}" for kind, mark in self.state.marks.items())
                print(
                    f"step {self.state.step} tokens {self.state.tokens / 1e6:.2f}M loss {average:.4f} "
                    f"uneven {uneven:.2f} {speed:.0f} tokens/s eta {eta:.0f} min | {marks}",
                    flush=True,
                )
            if now - measured > MEASURE_EVERY:
                measured = now
                print(f"held out: {self.measure()}", flush=True)
            if now - saved > SAVE_EVERY:
                saved = now
                self.save()
        self.save()
        print(f"held out: {self.measure(200)}", flush=True)


def start(trainer: Trainer) -> None:
    """Runs until the end, or until the process is told to stop; either way the state is saved."""

    def stop(number: int, frame: object) -> None:
        trainer.stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    trainer.run()
    if trainer.stopped:
        sys.exit("stopped; the same command goes on from here")


def arguments(parser: argparse.ArgumentParser, tokens: list[int], batch: int, rate: float) -> argparse.Namespace:
    """What the command line says; `parser` knows the options that only one of the two trainings has."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/demo-train"))
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="after how many the rate has fallen")
    parser.add_argument("--batch", type=int, default=batch, help="tokens of text in a step")
    parser.add_argument("--rate", type=float, default=rate, help="learning rate")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the text model of the demonstration checkpoint.")
    options = arguments(parser, tokens=[7_500_000], batch=3072, rate=1.5e-3)
    start(Trainer(options.folder, options))
