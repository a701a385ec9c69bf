"""The small guides that hostile inputs are tried on, and results that must be right.

B batch, T time, D width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import thesean
from benchmarks.hostility.trial import Call, check, only_typed

WIDTH, WORDS, POSITIONS = 8, 20, 12
QUICK = {"steps": 4}


class Blocks(nn.Module):
    """x_BTD -> y_BTD, token by token."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Words(nn.Module):
    """ids_BT -> logits_BTV; positions from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.body, self.head = Blocks(), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))))


def vectors(count: int = 9, batch: int = 4, time: int = 6) -> list[torch.Tensor]:
    return [torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def ids(count: int = 9, batch: int = 4, time: int = 6) -> list[torch.Tensor]:
    return [torch.randint(0, WORDS, (batch, time), generator=torch.Generator().manual_seed(k)) for k in range(count)]


def seeded(make: type[nn.Module]) -> nn.Module:
    before = torch.get_rng_state()
    torch.manual_seed(0)
    made = make().eval()
    torch.set_rng_state(before)
    return made


def compiled(guide: nn.Module | None = None, target: Any = "narrow", **arguments: Any) -> thesean.Converted:
    """What `compile` makes of the arguments: checked. The guide must be left as it was."""
    guide = seeded(Blocks) if guide is None else guide
    arguments = {"data": vectors(), "recipe": QUICK, "progress": False, **arguments}
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    flags = [(p.requires_grad, p.grad is None) for p in guide.parameters()], [m.training for m in guide.modules()]
    try:
        converted = thesean.compile(guide, target, **arguments)
    finally:
        after = guide.state_dict()
        same = (torch.equal(after[k].nan_to_num(7.0), v.nan_to_num(7.0)) for k, v in before.items())
        check(all(same), "the guide's weights changed")
        now = [(p.requires_grad, p.grad is None) for p in guide.parameters()], [m.training for m in guide.modules()]
        check(flags == now, "the guide's flags changed")
    return sound(converted)


def sound(converted: thesean.Converted) -> thesean.Converted:
    """It runs on its own kind of inputs, and its weights and its report are finite numbers."""
    signature = converted.signature
    output = converted(**signature.random_inputs(signature.example_sizes))
    leaves = [v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]
    check(leaves and all(v.isfinite().all() for v in leaves), "outputs that are not finite")
    check(all(p.isfinite().all() for p in converted.module.parameters()), "weights that are not finite")
    divergence = converted.report.converted["divergence"]
    check(divergence is None or 0 <= divergence < float("inf"), f"a divergence of {divergence}")
    return converted


def said(target: Any = "narrow", **arguments: Any) -> Call:
    """`compile` with these arguments: an error, or a result that is right all the same."""
    return lambda folder: compiled(None, target, **arguments)


def refused(target: Any = "narrow", **arguments: Any) -> Call:
    return only_typed(said(target, **arguments))
