"""tower.py: teaches the vision tower and its projector to read, before there is a language model behind them.

    python -m ms4.models.training.tower FOLDER [--steps N] [--seed N] [--batch N]
    python -m ms4.models.training.tower FOLDER --measure N

Where each character stands is known, because `lines` drew it.  So every image embedding is made to say, through one
linear layer that is thrown away afterwards, which characters its token holds (up to five, in order) and how many come
before it.  That is learned many times faster than from the text alone, and leaves embeddings that spell the line.
Towards the end only the text as a whole counts, so that a character between two tokens is read in exactly one.

FOLDER gets `state.pt` (weights, optimizer and step: a run that is stopped goes on from there), `log.jsonl`, and
`tower.safetensors`: the weights under the names that they have in transformers' Mistral3ForConditionalGeneration.
Every batch follows from the seed and its step alone, so there is no other state.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

from ms4.models.training import drawing, network

SLOTS = 5  # characters that one token can hold; rarer crowds are not drawn
N_COUNT = drawing.LENGTHS[-1] + 1
EMBEDDING_RMS = 0.5  # of the text model's token embeddings at the start of its training
BLANK = 0
CLASS = {char: i + 1 for i, char in enumerate(drawing.CHARS)}


@dataclass(frozen=True)
class Stage:
    """Up to the share `until` of all steps: pictures of these (columns, rows) of tokens, with these weights."""

    until: float
    sizes: dict[tuple[int, int], float]
    lengths: range
    odd_sizes: float = 0.0
    placed: float = 1.0  # how much it counts that each character is read where it stands; the rest: that the text is


MIXED = {(6, 1): 2.0, (8, 1): 1.0, (4, 2): 1.0, (6, 2): 3.0, (8, 2): 2.0, (12, 2): 1.5}
STAGES = (
    Stage(0.20, {(4, 1): 1.0}, range(2, 7)),
    Stage(0.45, {(4, 1): 1.0, (5, 2): 3.0}, range(2, 9)),
    Stage(0.65, MIXED, range(2, 13), 0.1),
    Stage(1.00, MIXED, range(2, 13), 0.1, 0.2),
)


class Reader(nn.Module):
    """transformers' tower and projector, and the two linear layers that ask what the embeddings say."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        config = Mistral3Config(**network.config())
        self.vision_tower = PixtralVisionModel(config.vision_config)
        self.multi_modal_projector = Mistral3MultiModalProjector(config)
        self.spell = nn.Linear(network.D_MODEL, SLOTS * (len(CLASS) + 1))
        self.count = nn.Linear(network.D_MODEL, N_COUNT)
        network.start_weights(self, torch.Generator().manual_seed(seed))
        for layer in (self.spell, self.count):
            nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(characters [pictures, tokens * SLOTS, classes], characters before each token [pictures, tokens, ...])."""
        x = embed(self, pixels)
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        return self.spell(x).unflatten(-1, (SLOTS, -1)).flatten(1, 2), self.count(x)


# --- the same arithmetic as transformers', for a batch of pictures of one size --------------------------------------


def embed(reader: Reader, pixels: Tensor) -> Tensor:
    """Image embeddings [pictures, tokens, width], token by token in rows.

    transformers packs all pictures into one sequence and masks the attention between them; here each picture is its
    own row of the batch, which needs no mask.  `check_embed` compares the two.
    """
    tower, projector = reader.vision_tower, reader.multi_modal_projector
    n, _, height, width = pixels.shape
    side = network.PATCH
    h, w = height // side, width // side
    x = pixels.view(n, 3, h, side, w, side).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, -1)
    x = _norm(F.linear(x, tower.patch_conv.weight.flatten(1)), tower.ln_pre)
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    cos, sin = tower.patch_positional_embedding(x, at)
    sin = torch.cat([-sin[:, : sin.shape[1] // 2], sin[:, sin.shape[1] // 2 :]], 1)
    for layer in tower.transformer.layers:
        x = x + _attention(layer.attention, _norm(x, layer.attention_norm), cos, sin)
        mlp, y = layer.feed_forward, _norm(x, layer.ffn_norm)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    x, m = _norm(x, projector.norm), network.MERGE
    x = x.view(n, h // m, m, w // m, m, -1).permute(0, 1, 3, 5, 2, 4).reshape(n, h * w // m**2, -1)
    x = projector.linear_1(projector.patch_merger.merging_layer(x))
    return projector.linear_2(F.gelu(x))


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _attention(attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = (x.shape[0], x.shape[1], attention.num_heads, attention.head_dim)
    q, k, v = (f(x).view(heads).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    half = attention.head_dim // 2
    q, k = (y * cos + y.roll(half, -1) * sin for y in (q, k))
    # With so few patches this is faster than scaled_dot_product_attention, by a quarter of the whole step.
    y = (q * attention.scaling @ k.transpose(2, 3)).softmax(-1).to(v.dtype) @ v
    return attention.o_proj(y.transpose(1, 2).reshape(x.shape))


@torch.no_grad()
def check_embed(reader: Reader) -> float:
    """The largest difference to transformers, relative to the largest value."""
    pixels = torch.from_numpy(np.stack([drawing.random_line(Random(i), 4, 2).pixels for i in range(3)]))
    sizes = [pixels.shape[2:]] * len(pixels)
    features = reader.vision_tower(pixels, torch.tensor(sizes)).last_hidden_state.squeeze(0)
    wanted = reader.multi_modal_projector(features, sizes)
    got = embed(reader, pixels).flatten(0, 1)
    return float((got - wanted).abs().max() / wanted.abs().max())


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    texts: list[str]
    pixels: Tensor
    slots: Tensor  # [pictures, tokens * SLOTS]: the characters of each token in order, then BLANK
    before: Tensor  # [pictures, tokens]: how many characters come before this token


def stage_of(step: int, n_steps: int) -> Stage:
    return next(stage for stage in STAGES if step < stage.until * n_steps)


def training_batch(seed: int, step: int, n_steps: int, n: int) -> Batch:
    stage = stage_of(step, n_steps)
    rng = Random(f"{seed} {step}")
    columns, rows = rng.choices(list(stage.sizes), list(stage.sizes.values()))[0]
    # About the same number of patches in every batch.
    n = max(8, round(n * 20 / (columns * rows + 10)))
    return make_batch(rng, n, columns, rows, stage.lengths, odd_sizes=stage.odd_sizes)


def make_batch(rng: Random, n: int, columns: int, rows: int, lengths: range, **how: Any) -> Batch:
    fonts = drawing.installed_fonts()
    made: list[drawing.Line] = []
    while len(made) < n:
        line = drawing.random_line(rng, columns, rows, lengths, fonts=fonts, **how)
        if max(map(line.cells.count, line.cells)) <= SLOTS:
            made.append(line)
    slots = np.zeros((n, columns * rows, SLOTS), np.int64)
    before = np.zeros((n, columns * rows), np.int64)
    for i, line in enumerate(made):
        for j, (char, cell) in enumerate(zip(line.text, line.cells, strict=True)):
            slots[i, cell, line.cells[:j].count(cell)] = CLASS[char]
            before[i, cell + 1 :] += 1
    pixels = torch.from_numpy(np.stack([line.pixels for line in made]))
    return Batch([line.text for line in made], pixels, *map(torch.from_numpy, (slots.reshape(n, -1), before)))


def losses(spelled: Tensor, counted: Tensor, batch: Batch, placed: float = 1.0) -> tuple[Tensor, Tensor]:
    """(of the spelling, per character; of the counts, per token)."""
    scores = spelled.float().log_softmax(-1)
    n_chars = sum(map(len, batch.texts))
    spell = F.nll_loss(scores.flatten(0, 1), batch.slots.flatten(), reduction="sum") / n_chars
    if placed < 1:
        spell = placed * spell - (1 - placed) * text_scores(scores, batch.texts).sum() / n_chars
    return spell, F.cross_entropy(counted.flatten(0, 1).float(), batch.before.flatten())


def text_scores(scores: Tensor, texts: list[str]) -> Tensor:
    """The log-probability of each text, however its characters are spread over the slots; the other slots are blank.

    `scores` are log-probabilities [pictures, slots, classes].  It goes through the slots once, with one sum for every
    number of characters that were read so far.
    """
    longest = max(map(len, texts))
    classes = torch.tensor([[CLASS[c] for c in text] + [BLANK] * (longest - len(text)) for text in texts])
    wanted = scores.gather(2, classes[:, None].expand(-1, scores.shape[1], -1))
    none = scores.new_full((len(texts), 1), -1e30)
    reached = torch.cat([torch.zeros_like(none), none.expand(-1, longest)], 1)
    for blank, char in zip(scores[:, :, BLANK, None].unbind(1), wanted.unbind(1), strict=True):
        reached = torch.logaddexp(reached + blank, torch.cat([none, reached[:, :-1] + char], 1))
    return reached.gather(1, torch.tensor([[len(text)] for text in texts])).squeeze(1)


def read(spelled: Tensor) -> list[str]:
    """What the slots say, from left to right."""
    return ["".join(drawing.CHARS[i - 1] for i in row if i != BLANK) for row in spelled.argmax(-1).tolist()]


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    seed: int = 1
    steps: int = 8000
    batch: int = 64
    muon: float = 3e-3
    adamw: float = 2e-3


def optimizers(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for its ends, the norms and the two extra layers.

    Whoever steps them sets their learning rates.
    """
    named = list(named)
    inner = {name for name, p in named if p.dim() == 2 and not name.startswith(("spell", "count"))}
    matrices = [p for name, p in named if name in inner]
    others = [p for name, p in named if name not in inner]
    return {
        "muon": torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    }


class Optimizers:
    """The optimizers of a run, with their learning rates."""

    def __init__(self, reader: Reader, settings: Settings) -> None:
        self.settings = settings
        self.named = optimizers(reader.named_parameters())

    def step(self, step: int) -> None:
        rate = min(1.0, (step + 1) / 100, 0.02 + 1.25 * (1 - step / self.settings.steps))
        for name, optimizer in self.named.items():
            for group in optimizer.param_groups:
                group["lr"] = vars(self.settings)[name] * rate
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.named.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.named.items():
            optimizer.load_state_dict(state[name])


def train(folder: Path, settings: Settings) -> None:
    """Trains to the last step, or until SIGTERM or Ctrl-C; either way everything is saved."""
    reader = Reader(settings.seed)
    difference = check_embed(reader)
    if difference > 1e-4:
        raise SystemExit(f"the batched tower differs from transformers' by {difference:.1e}")
    optimizers = Optimizers(reader, settings)
    first = load_state(folder, reader, optimizers, settings)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopped.append(number))
    started, n_pictures, mean = time.monotonic(), 0, [0.0, 0.0]
    for step in range(first, settings.steps):
        batch = training_batch(settings.seed, step, settings.steps, settings.batch)
        with torch.autocast("cpu", torch.bfloat16):
            spelled, counted = reader(batch.pixels)
        spell, count = losses(spelled, counted, batch, stage_of(step, settings.steps).placed)
        (spell + 0.3 * count).backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizers.step(step)
        n_pictures += len(batch.texts)
        keep = 1 - 1 / min(50, step - first + 1)
        mean = [keep * m + (1 - keep) * loss.item() for m, loss in zip(mean, (spell, count), strict=True)]
        done = step + 1
        if done % 50 == 0:
            seconds = time.monotonic() - started
            left = seconds / (done - first) * (settings.steps - done) / 60
            show(
                f"step {done}/{settings.steps}, spell {mean[0]:.3f}, count {mean[1]:.3f}, "
                f"{n_pictures / seconds:.0f} pictures/s, {left:.0f} min left"
            )
        if done % 250 == 0 or done == settings.steps or stopped:
            save_state(folder, reader, optimizers, settings, done)
            note(folder, {"step": done, "spell": mean[0], "count": mean[1], "exact": measure(reader, 64)})
        if stopped:
            print()
            raise SystemExit(f"stopped and saved at step {done}; the same command goes on from here")
    print()


def show(text: str) -> None:
    """One line that is written over on a terminal, and one after the other in a file."""
    end = "" if sys.stdout.isatty() else "\n"
    print("\r\x1b[K" * (not end) + text, end=end, flush=True)


def note(folder: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record)
    show(line)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def save_state(folder: Path, reader: Reader, optimizers: Optimizers, settings: Settings, step: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {"settings": vars(settings), "step": step, "reader": reader.state_dict(), **optimizers.state_dict()}
    torch.save(state, folder / "state.new")
    os.replace(folder / "state.new", folder / "state.pt")
    save_file(checkpoint(reader), folder / "tower.new", metadata={"format": "pt"})
    os.replace(folder / "tower.new", folder / "tower.safetensors")


def load_state(folder: Path, reader: Reader, optimizers: Optimizers | None, settings: Settings | None) -> int:
    """The step to go on from."""
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if settings and state["settings"] != vars(settings):
        raise SystemExit(f"{path} was begun with {state['settings']}; give the same, or another folder")
    reader.load_state_dict(state["reader"])
    if optimizers:
        optimizers.load_state_dict(state)
    return int(state["step"])


@torch.no_grad()
def checkpoint(reader: Reader) -> dict[str, Tensor]:
    """Tower and projector by transformers' names, the embeddings as large as the text model's.

    Nothing that read them so far minded their size, and nothing in the text model will have been trained to.
    """
    x = embed(reader, make_batch(Random(0), 16, 6, 2, range(2, 9)).pixels)
    state = {f"model.{name}": p.detach().clone() for name, p in reader.named_parameters() if p is not None}
    state = {name: p for name, p in state.items() if not name.startswith(("model.spell", "model.count"))}
    state["model.multi_modal_projector.linear_2.weight"] *= EMBEDDING_RMS / x.square().mean().sqrt()
    return state


@torch.no_grad()
def measure(reader: Reader, n: int, seed: int = 7) -> dict[str, float]:
    """The share of held-out lines that are read exactly, by columns x rows of tokens."""
    exact = {}
    for columns, rows in ((4, 1), (5, 2), (12, 2)):
        batch = make_batch(Random(seed), n, columns, rows, drawing.LENGTHS, held_out=True)
        right = [a == b for a, b in zip(read(reader(batch.pixels)[0]), batch.texts, strict=True)]
        exact[f"{columns}x{rows}"] = round(sum(right) / n, 3)
    return exact


def main() -> None:
    parser = argparse.ArgumentParser(description="Teaches the vision tower and its projector to read lines of text.")
    parser.add_argument("folder", type=Path)
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--measure", type=int, metavar="N", help="only read N held-out lines of each size")
    arguments = vars(parser.parse_args())
    folder, n = arguments.pop("folder"), arguments.pop("measure")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if n:
        reader = Reader(0)
        step = load_state(folder, reader, None, None)
        print(json.dumps({"step": step, "exact": measure(reader, n, seed=11)}))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        train(folder, Settings(**arguments))


if __name__ == "__main__":
    main()
