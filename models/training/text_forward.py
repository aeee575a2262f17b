"""The text model's forward pass for training, on the weights of transformers' modules.

It computes what those modules compute (`difference` compares them), several times faster on a CPU: all conversations
of a step lie in one list of tokens, the experts' products are grouped by expert in bfloat16, and after the attention of
the last layer only those tokens go on that have something to say.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN generates code for every new shape of a product, and keeps only so much of it (80 kB each).  So lengths and
# numbers of tokens are filled up to a grain: few shapes occur then.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
ROW_GRAIN, TOKEN_GRAIN, ASKED_GRAIN, EXPERT_GRAIN = 8, 256, 64, 32
IGNORED = -100  # the answer at a place that only fills up

HALF = torch.bfloat16
BALANCE = 0.01  # weight of the loss that spreads the tokens over the experts


@dataclass(frozen=True)
class Batch:
    """Conversations one after the other.  `blocks`: from which token on, how many rows, how long a row is."""

    ids: Tensor
    blocks: tuple[tuple[int, int, int], ...]
    asked: Tensor  # the tokens after which the model speaks
    answers: Tensor  # what it shall say there
    rows: Tensor  # which conversation each of them belongs to
    starts: tuple[int, ...]  # where each conversation begins
    pictured: Tensor | None = None  # the places that take the projector's rows


class Experts(torch.autograd.Function):
    """The sum of the chosen experts' outputs.  The gradients of the experts' weights go straight into `.grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, module: Any) -> Tensor:
        k = chosen.shape[1]
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=module.num_experts)
        rooms = (counts + EXPERT_GRAIN - 1) // EXPERT_GRAIN * EXPERT_GRAIN
        shift = (rooms - counts).cumsum(0) - (rooms - counts)
        places = torch.arange(len(order)) + shift[flat[order]]  # of the sorted choices, each expert's with room after
        rooms = rooms.tolist()
        rows = order // k
        inputs = x.new_zeros(sum(rooms), x.shape[1])
        inputs[places] = x[rows]
        gate_up, down = module.half_gate_up, module.half_down
        middle = x.new_empty(len(inputs), gate_up.shape[1])
        outputs = x.new_empty(len(inputs), x.shape[1])
        for expert, begin, end in spans(rooms):
            torch.mm(inputs[begin:end], gate_up[expert].t(), out=middle[begin:end])
        gate, up = middle.chunk(2, dim=1)
        hidden = F.silu(gate) * up
        for expert, begin, end in spans(rooms):
            torch.mm(hidden[begin:end], down[expert].t(), out=outputs[begin:end])
        back = torch.empty_like(order)
        back[order] = places
        ctx.save_for_backward(inputs, middle, hidden, outputs, rows, order, places, back, weights)
        ctx.module, ctx.rooms = module, rooms
        return torch.bmm(weights.to(HALF).unsqueeze(1), outputs[back].view(-1, k, x.shape[1])).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, middle, hidden, outputs, rows, order, places, back, weights = ctx.saved_tensors
        module, k = ctx.module, weights.shape[1]
        spread = torch.zeros_like(outputs)
        spread[places] = gradients[0][rows]
        of_weights = (spread * outputs).sum(1, dtype=torch.float32)[back].view(-1, k)
        shares = spread.new_zeros(len(spread), 1)
        shares[places, 0] = weights.reshape(-1)[order].to(HALF)
        of_outputs = spread * shares
        gate_up, down = module.half_gate_up, module.half_down
        of_hidden = torch.empty_like(hidden)
        for expert, n in enumerate(ctx.rooms):
            if not n:
                module.down_proj.grad[expert].zero_()
                module.gate_up_proj.grad[expert].zero_()
        for expert, begin, end in spans(ctx.rooms):
            torch.mm(of_outputs[begin:end], down[expert], out=of_hidden[begin:end])
            module.down_proj.grad[expert].copy_(of_outputs[begin:end].t() @ hidden[begin:end])
        gate, up = middle.chunk(2, dim=1)
        of_middle = torch.cat((torch.ops.aten.silu_backward(of_hidden * up, gate), of_hidden * F.silu(gate)), dim=1)
        of_inputs = torch.empty_like(inputs)
        for expert, begin, end in spans(ctx.rooms):
            torch.mm(of_middle[begin:end], gate_up[expert], out=of_inputs[begin:end])
            module.gate_up_proj.grad[expert].copy_(of_middle[begin:end].t() @ inputs[begin:end])
        return of_inputs[back].view(-1, k, inputs.shape[1]).sum(1), of_weights, None, None


def spans(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Experts with at least one token: which, and where its tokens begin and end."""
    found, begin = [], 0
    for expert, n in enumerate(counts):
        if n:
            found.append((expert, begin, begin + n))
        begin += n
    return found


def halve(model: Any) -> None:
    """Brings the bfloat16 copies of the experts' weights up to date, and makes room for their gradients."""
    for layer in model.model.language_model.layers:
        experts = layer.mlp.experts
        if not hasattr(experts, "half_gate_up"):
            experts.half_gate_up = torch.empty_like(experts.gate_up_proj, dtype=HALF, requires_grad=False)
            experts.half_down = torch.empty_like(experts.down_proj, dtype=HALF, requires_grad=False)
            experts.gate_up_proj.grad = torch.zeros_like(experts.gate_up_proj)
            experts.down_proj.grad = torch.zeros_like(experts.down_proj)
        experts.half_gate_up.copy_(experts.gate_up_proj.detach())
        experts.half_down.copy_(experts.down_proj.detach())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(HALF), weight.to(HALF))


def norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x.float(), module.weight.shape, module.weight, module.variance_epsilon)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs of the last dimension: (tokens, heads, 64)."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(module: Any, x: Tensor, blocks: Sequence[tuple[int, int, int]], cos: Tensor, sin: Tensor) -> Tensor:
    """Attention inside each row of each block, before the output matrix."""
    heads, nope, rope = module.num_heads, module.qk_nope_head_dim, module.qk_rope_head_dim
    q = linear(norm(linear(x, module.q_a_proj.weight), module.q_a_layernorm), module.q_b_proj.weight)
    q = q.view(-1, heads, nope + rope)
    latent, k_rope = linear(x, module.kv_a_proj_with_mqa.weight).split([module.kv_lora_rank, rope], dim=-1)
    expanded = linear(norm(latent, module.kv_a_layernorm), module.kv_b_proj.weight)
    k_nope, v = expanded.view(-1, heads, nope + module.v_head_dim).split([nope, module.v_head_dim], dim=-1)
    k_rope = turn(k_rope.unsqueeze(1), cos, sin).expand(-1, heads, -1)
    q = torch.cat((q[..., :nope], turn(q[..., nope:], cos, sin)), dim=-1)
    k = torch.cat((k_nope, k_rope), dim=-1)
    outputs = []
    parts = [t.split([n_rows * length for _, n_rows, length in blocks]) for t in (q, k, v)]
    for (_, n_rows, length), *part in zip(blocks, *parts, strict=True):
        queries, keys, values = (t.view(n_rows, length, heads, -1).transpose(1, 2).flatten(0, 1) for t in part)
        # With rows this short three plain products are twice as fast as scaled_dot_product_attention.
        scores = torch.baddbmm(later(length), queries * module.scaling, keys.transpose(1, 2))
        mixed = (scores.softmax(-1) @ values).view(n_rows, heads, length, -1)
        outputs.append(mixed.transpose(1, 2).reshape(n_rows * length, -1))
    return torch.cat(outputs)


@cache
def later(length: int) -> Tensor:
    """Minus infinity where a key comes after the query."""
    return torch.full((1, length, length), -math.inf, dtype=HALF).triu(1)


def mixture(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' part of a layer, and how unevenly the tokens are spread over the experts (1: evenly)."""
    scores = F.linear(x, module.gate.weight).softmax(-1)
    top, chosen = scores.topk(module.gate.top_k, dim=-1, sorted=False)
    weights = top / (top.sum(-1, keepdim=True) + 1e-20)
    half = x.to(HALF)
    shared = module.shared_experts
    inner = F.silu(linear(half, shared.gate_proj.weight)) * linear(half, shared.up_proj.weight)
    output = Experts.apply(half, weights, chosen, module.experts) + linear(inner, shared.down_proj.weight)
    load = torch.bincount(chosen.reshape(-1), minlength=scores.shape[1]) / chosen.numel()
    return output, (load * scores.mean(0)).sum() * scores.shape[1]


def angles(model: Any, blocks: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    positions = torch.cat([torch.arange(length).repeat(n_rows) for _, n_rows, length in blocks])
    turned = torch.outer(positions.float(), model.model.language_model.rotary_emb.inv_freq)[:, None, :]
    return turned.cos().to(HALF), turned.sin().to(HALF)


def forward(model: Any, batch: Batch, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits after the asked tokens, and the imbalance of the experts, summed over the layers."""
    text = model.model.language_model
    x = F.embedding(batch.ids, text.embed_tokens.weight)
    if features is not None:
        x = x.index_copy(0, batch.pictured, features.float())
    cos, sin = angles(model, batch.blocks)
    imbalance = x.new_zeros(())
    last = len(text.layers) - 1
    for i, layer in enumerate(text.layers):
        mixed = attend(layer.self_attn, norm(x, layer.input_layernorm), batch.blocks, cos, sin)
        if i == last:
            x, mixed = x[batch.asked], mixed[batch.asked]
        x = x + linear(mixed, layer.self_attn.o_proj.weight)
        output, uneven = mixture(layer.mlp, norm(x, layer.post_attention_layernorm))
        x = x + output
        imbalance = imbalance + uneven
    return linear(norm(x, text.norm), model.lm_head.weight).float(), imbalance


def filled(n: int, grain: int) -> int:
    """The smallest multiple of the grain that is not below n."""
    return -(-n // grain) * grain


def stack(rows: Sequence[tuple[Sequence[int], Sequence[bool]]], pad: int) -> Batch:
    """Conversations (ids, which of them are said) as one batch; those of like length share a block.

    Rows, and the batch, are filled up with `pad`, and the asked tokens with such whose answer is IGNORED.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    ids: list[int] = []
    blocks: list[tuple[int, int, int]] = []
    asked: list[int] = []
    answers: list[int] = []
    owners: list[int] = []
    starts = [0] * len(rows)
    start = 0
    while start < len(order):
        end, shortest = start + 1, len(rows[order[start]][0])
        while end < len(order) and len(rows[order[end]][0]) <= max(shortest + 4, math.ceil(shortest * 1.06)):
            end += 1
        length = filled(len(rows[order[end - 1]][0]), ROW_GRAIN)
        blocks.append((len(ids), end - start, length))
        for owner in order[start:end]:
            row, said = rows[owner]
            starts[owner] = len(ids)
            places = [i for i in range(len(row) - 1) if said[i + 1]]
            asked += [len(ids) + i for i in places]
            answers += [row[i + 1] for i in places]
            owners += [owner] * len(places)
            ids += [*row, *[pad] * (length - len(row))]
        start = end
    more = filled(len(ids), TOKEN_GRAIN) - len(ids)
    if more:
        blocks.append((len(ids), 1, more))
        ids += [pad] * more
    more = filled(len(asked), ASKED_GRAIN) - len(asked)
    asked, answers, owners = asked + [0] * more, answers + [IGNORED] * more, owners + [0] * more
    ids_, asked_, answers_, owners_ = map(torch.tensor, (ids, asked, answers, owners))
    return Batch(ids_, tuple(blocks), asked_, answers_, owners_, tuple(starts))


def place(batch: Batch, pictured: Sequence[int]) -> Batch:
    """The batch, with these places taking the projector's rows."""
    return replace(batch, pictured=torch.tensor(pictured))


def row_marks(logits: Tensor, batch: Batch, n_rows: int) -> Tensor:
    """For each conversation, 1 if the most likely token is the right one at all its places.

    Every right answer is fixed, token by token: this is whether greedy decoding gives it.
    """
    wrong = ((logits.argmax(-1) != batch.answers) & (batch.answers != IGNORED)).float()
    return (torch.zeros(n_rows).index_add(0, batch.rows, wrong) == 0).float()


@torch.no_grad()
def difference(model: Any, batch: Batch) -> float:
    """The median over the tokens of how far the logits are from transformers', relative to their size.

    The median, because bfloat16 lets a near-tie in the router now and then fall the other way.
    """
    logits, _ = forward(model, batch)
    found = []
    for begin, n_rows, length in batch.blocks:
        end = begin + n_rows * length
        wanted = model(input_ids=batch.ids[begin:end].view(n_rows, length)).logits.flatten(0, 1)
        inside = (batch.asked >= begin) & (batch.asked < end)
        wanted = wanted[batch.asked[inside] - begin]
        found.append((logits[inside] - wanted).norm(dim=-1) / wanted.norm(dim=-1))
    return torch.cat(found).median().item()
