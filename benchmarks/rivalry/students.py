"""What each rival starts from, after its paper. None of it takes a step of gradients.

B batch, T time, D width, E neurons or concatenated heads, H heads, N tokens
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rivalry.blocks import keep_blocks, keep_inputs, keep_outputs, matrix_OI, put, seeing
from benchmarks.rivalry.subjects import Batches, Subject, far


@dataclass(frozen=True)
class Student:
    """A network, and which of the guide's blocks each of its own ends where."""

    model: Any
    ends: tuple[int, ...]


def evenly(blocks: int, count: int) -> list[int]:
    """`count` of so many blocks, the first and the last among them."""
    return torch.linspace(0, blocks - 1, count).round().int().tolist()


def copied(subject: Subject, count: int) -> Student:
    """Every so manyth block with its weights, the rest left out: DistilBERT's start (Sanh et al. 2019, 1910.01108)."""
    kept = evenly(len(subject.layout.blocks(subject.guide)), count)
    return Student(keep_blocks(subject.guide, subject.layout, kept), tuple(kept))


def random_weights(subject: Subject, count: int) -> Student:
    """As many blocks, nothing of the guide's: what logit distillation starts from (Hinton et al. 2015, 1503.02531)."""
    student = copied(subject, count)

    def anew(module: nn.Module) -> None:
        for own in (module, *module.children()):
            made = getattr(own, "_init_weights", None)
            if made is not None:
                own.apply(made)
                return

    anew(student.model)
    return student


@torch.no_grad()
def influence(subject: Subject, batches: Batches) -> list[float]:
    """Block influence of each block, 1 - E cos(x_in, x_out) over tokens (Men et al. 2024, 2403.03853, eq. 1)."""
    blocks = list(subject.layout.blocks(subject.guide))
    total, tokens = [0.0] * len(blocks), 0
    for batch in batches:
        with seeing(blocks, inputs=True) as read, seeing(blocks) as made:
            subject.output(subject.guide, batch)
        for k in range(len(blocks)):
            x_ND, y_ND = subject.seen(read[k], batch), subject.seen(made[k], batch)
            total[k] += (1 - F.cosine_similarity(x_ND, y_ND, dim=-1)).sum().item()
        tokens += len(x_ND)
    return [t / tokens for t in total]


def least_influence(subject: Subject, batches: Batches, count: int) -> Student:
    """The blocks of the least influence left out (ShortGPT)."""
    scores = influence(subject, batches)
    kept = sorted(sorted(range(len(scores)), key=scores.__getitem__)[-count:])
    return Student(keep_blocks(subject.guide, subject.layout, kept), tuple(kept))


@torch.no_grad()
def replaced_by_a_map(subject: Subject, batches: Batches, count: int) -> Student:
    """Neighbouring blocks become one linear map (Shopkhoev et al. 2025, ReplaceMe, 2505.02819, eq. 2 to 6).

    Of all cuts of that length the one whose ends are nearest by the cosine. With M the MLP's output of the block before
    the cut and Y what it is added to, T solves min |M T + Y - L|^2, L the stream behind the cut, and goes into the
    MLP's last matrix: the map costs nothing. Where a block ends in a norm, L is what the cut's last norm reads, and
    that norm stands in place of the block's own.
    """
    layout, blocks = subject.layout, list(subject.layout.blocks(subject.guide))
    cut = len(blocks) - count
    first = min(range(1, count + 1), key=lambda k: _apart(subject, batches, k, cut))
    before, last = blocks[first - 1], blocks[first + cut - 1]
    downs = [layout.mlp(before)[1], layout.mlp(last)[1]]
    width = len(layout.mlp(before)[1].bias)
    gram_DD, cross_DD = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for batch in batches:
        watched = [layout.residual(before), layout.residual(last)]
        with seeing(downs) as mlp, seeing(watched, inputs=True) as read, seeing([last]) as made:
            subject.output(subject.guide, batch)
        m_ND = subject.seen(mlp[0], batch).double()
        stream, behind = (read[0] - mlp[0], read[1]) if layout.normed_after else (read[0], made[0])
        wanted_ND = subject.seen(behind - stream, batch).double()
        gram_DD += m_ND.T @ m_ND
        cross_DD += m_ND.T @ wanted_ND
    gram_DD.diagonal().add_(1e-4 * gram_DD.diagonal().mean())
    map_DD = torch.linalg.solve(gram_DD, cross_DD).float()
    kept = [k for k in range(len(blocks)) if not first <= k < first + cut]
    model = keep_blocks(subject.guide, layout, kept)
    block = layout.blocks(model)[first - 1]
    down = layout.mlp(block)[1]
    put(down, map_DD.T @ matrix_OI(down), down.bias.detach() @ map_DD)
    if layout.normed_after:
        layout.residual(block).load_state_dict(layout.residual(last).state_dict())
    ends = [k + cut if k == first - 1 else k for k in kept]
    return Student(model, tuple(ends))


@torch.no_grad()
def _apart(subject: Subject, batches: Batches, first: int, cut: int) -> float:
    """Mean cosine distance between the streams before and behind the blocks first..first + cut - 1."""
    blocks = subject.layout.blocks(subject.guide)
    found = []
    for batch in batches[:4]:
        with seeing([blocks[first - 1], blocks[first + cut - 1]]) as made:
            subject.output(subject.guide, batch)
        x_ND, y_ND = (subject.seen(made[k], batch) for k in (0, 1))
        found.append((1 - F.cosine_similarity(x_ND, y_ND, dim=-1)).mean().item())
    return sum(found) / len(found)


@torch.no_grad()
def narrowed(subject: Subject, batches: Batches, heads: int, neurons: int) -> Student:
    """In each block the heads and neurons of the largest activations (Muralidharan et al. 2024, Minitron, 2407.14679).

    The importance of a neuron is its activation, that of a head the norm of what it gives, mean over a sequence and L2
    over sequences: the paper's choice for width. Nothing is folded in: what was lost is left to the distillation.
    """
    layout, model = subject.layout, copy.deepcopy(subject.guide)
    blocks = list(layout.blocks(model))
    watched = [linear for block in blocks for linear in (layout.attention_output(block), layout.mlp(block)[1])]
    scores: list[Any] = [0.0] * len(watched)
    for batch in batches:
        with seeing(watched, inputs=True) as read:
            subject.output(model, batch)
        for k, x_BTE in read.items():
            mean_BE = torch.stack([subject.seen(x, b).abs().mean(0) for x, b in _one_by_one(subject, x_BTE, batch)])
            scores[k] = scores[k] + mean_BE.square().sum(0)
    for k, block in enumerate(blocks):
        of_E, of_neurons = scores[2 * k].sqrt(), scores[2 * k + 1].sqrt()
        width = len(of_E) // _heads_of(subject)
        best_H = of_E.unflatten(0, (-1, width)).norm(dim=1).topk(heads).indices.sort().values
        best_E = of_neurons.topk(neurons).indices.sort().values
        layout.fewer_heads(block, best_H)
        up, down = layout.mlp(block)
        keep_outputs(up, best_E)
        keep_inputs(down, best_E)
    return Student(model, tuple(range(len(blocks))))


def _one_by_one(subject: Subject, x_BTE: torch.Tensor, batch: Any) -> list[tuple[torch.Tensor, Any]]:
    if not isinstance(batch, dict):
        return [(x, batch) for x in x_BTE.split(1)]
    rows = range(len(x_BTE))
    return [(x_BTE[k : k + 1], {name: value[k : k + 1] for name, value in batch.items()}) for k in rows]


def _heads_of(subject: Subject) -> int:
    config = next(m.config for m in subject.guide.modules() if hasattr(m, "config"))
    return int(config.num_attention_heads)


def attentions_by_return(subject: Subject, batches: Batches) -> list[int]:
    """Blocks, the one first whose attention's return helps most once all are away.

    How Li et al. 2025 (2512.20569, KL-guided) choose which attentions stay: here beside nothing at all, since a
    linear attention in their place is slower than a softmax over so few tokens.
    """
    count = len(subject.layout.blocks(subject.guide))
    scores = {k: far(subject, silenced(subject, [k]).model, batches) for k in range(count)}
    return sorted(scores, key=scores.__getitem__)


def silenced(subject: Subject, kept: Sequence[int]) -> Student:
    """The guide with the attentions of these blocks alone."""
    model = copy.deepcopy(subject.guide)
    blocks = list(subject.layout.blocks(model))
    for k, block in enumerate(blocks):
        if k not in kept:
            subject.layout.silence(block)
    return Student(model, tuple(range(len(blocks))))


Start = Callable[[Subject, Batches], Student]
