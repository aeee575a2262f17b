"""Puts tower and text model together: python -m ms4.models.training.train_joint FOLDER [--from HF] [--export HF].

Goes on from what `tower` and `train_text` left in FOLDER, or from an exported checkpoint.  Every step holds pictures
of lines as well as text-only conversations, so that the one is learned and the other not forgotten.  At first only
what lies between the two is trained: the projector, and the text model at its usual rate, while the tower stands
still.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import torch

from ms4.models.control import Control
from ms4.models.training import network, pictures, tower, train_text
from ms4.models.training import text_forward as forward
from ms4.models.training.cases import training_ids
from ms4.models.training.train_text import Drawn, Trainer

N_PICTURES = 64  # in a step
FROZEN = 100  # steps in which the tower stands still
TOKENS = [42_000_000, 46_000_000, 50_000_000]  # the rate falls to zero at each, and begins once more in between
TOWER_RATE = 0.5  # afterwards its learning rate, as a multiple of the text model's


class JointTrainer(Trainer):
    file = "joint.pt"
    decay = 0.4

    def is_trained(self, name: str) -> bool:
        return True

    def begin(self, folder: Path) -> None:
        """The text model from `train_text`, tower and projector from `tower`; or all of them from `--from`."""
        from safetensors.torch import load_file

        self.state.marks["read"] = 0.0
        if self.options.source:
            self.model.load_state_dict(network.load(self.options.source))
            return
        state = torch.load(folder / Trainer.file, map_location="cpu", weights_only=True, mmap=True)
        state = state["model"] | load_file(folder / "tower.safetensors")
        self.model.load_state_dict(state)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Those of the text model, and two for the tower; the projector belongs to the text model's."""
        of_tower = {n: p for n, p in self.named.items() if "vision_tower" in n}
        everything, self.named = self.named, {n: p for n, p in self.named.items() if n not in of_tower}
        optimizers = super().make_optimizers()
        self.named = everything
        return optimizers | {f"tower {name}": one for name, one in tower.optimizers(of_tower.items()).items()}

    def rate(self, optimizer: str) -> float:
        if not optimizer.startswith("tower"):
            return super().rate(optimizer)
        return 0.0 if self.state.step < FROZEN else super().rate(optimizer.removeprefix("tower ")) * TOWER_RATE

    def draw(self) -> Drawn:
        random = Random(train_text.SEED * 1_000_033 + self.state.step)
        seen = pictures.draw(random, N_PICTURES)
        kinds, rows = self.text_rows(random)
        return with_pictures(seen, kinds, rows, self.tokenizer)

    def features(self, drawn: Drawn) -> torch.Tensor | None:
        with torch.autocast("cpu", torch.bfloat16):
            return tower.embed(self.model.model, drawn.pixels).flatten(0, 1)

    @torch.no_grad()
    def measure(self, n_cases: int = 48) -> str:
        random = Random(7)
        seen = [pictures.fresh(random) for _ in range(n_cases)]
        drawn = with_pictures(seen, [], [], self.tokenizer)
        logits, _ = forward.forward(self.model, drawn.batch, self.features(drawn))
        right = forward.row_marks(logits, drawn.batch, n_cases).mean().item()
        return f"reads {right:.0%}, {super().measure(n_cases)}"


def with_pictures(
    seen: list[pictures.Seen],
    kinds: list[str],
    rows: list[tuple[list[int], list[bool]]],
    tokenizer: network.Tokenizer,
) -> Drawn:
    """Conversations about pictures of one size, and others, as one batch."""
    rows = [*(training_ids(one.case, tokenizer) for one in seen), *rows]
    batch = forward.stack(rows, Control.PAD)
    places = [
        batch.starts[i] + place
        for i, (ids, _) in enumerate(rows[: len(seen)])
        for place, id in enumerate(ids)
        if id == Control.IMG
    ]
    pixels = torch.stack([torch.from_numpy(one.line.pixels) for one in seen])
    batch = forward.place(batch, places)
    return Drawn([*["read"] * len(seen), *kinds], batch, sum(len(ids) for ids, _ in rows), pixels)


def export(folder: Path, target: Path) -> None:
    """Writes the newest state of a run as a Hugging Face folder."""
    source = folder / JointTrainer.file
    state = torch.load(source if source.exists() else folder / Trainer.file, map_location="cpu", weights_only=True)
    network.export(state["model"], target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains text model and tower together.")
    parser.add_argument("--export", type=Path, help="write what was trained so far into this folder, and stop")
    parser.add_argument("--from", type=Path, dest="source", help="begin with the weights of this exported checkpoint")
    options = train_text.arguments(parser, tokens=TOKENS, batch=1536, rate=1.2e-3)
    if options.export:
        export(options.folder, options.export)
    else:
        train_text.start(JointTrainer(options.folder, options))
