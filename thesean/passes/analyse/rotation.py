"""Read rotary positions off a graph, as numbers: what makes of a projected query the one that meets the keys.

Between the affine map and the product with the keys each head's features go through a linear map of their own at every
step. It is probed with one basis vector after another; where pairs of features are turned by angles that grow with the
step, it is a rotation, whatever it is written as (halves, neighbours, part of a head, complex numbers).

B batch, T time, H heads, C width of a head
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from thesean.passes.analyse.scores import Operand
from thesean.passes.graph.record import evaluate
from thesean.targets.shared.rotation import Rotation

# Of a head's largest entry: fp32 tables differ from their formula by 1e-6, another map by its whole scale.
_EXACT = 1e-4


@torch.no_grad()
def find_rotation(
    values: dict[fx.Node, Any], run: Sequence[fx.Node], source: fx.Node, wanted: Operand
) -> tuple[Rotation | None, float] | None:
    """(rotation, scale) with wanted = scale * rotated source; (None, scale) where nothing is turned; None for any other
    map. `run` is what lies between; both nodes hold heads of the same width.
    """
    maps_TCC = _maps(values, run, source, wanted)
    if maps_TCC is None:
        return None
    first_CC = maps_TCC[0]
    scale = float(first_CC.square().sum().div(len(first_CC)).sqrt())
    if not scale > 0:
        return None
    turns_TCC = first_CC.T @ maps_TCC / scale**2  # as the source orders its features, step 0 not turned
    return _turned(turns_TCC, scale)


def _turned(turns_TCC: torch.Tensor, scale: float) -> tuple[Rotation | None, float] | None:
    width = turns_TCC.shape[1]
    off_CC = turns_TCC[1] - torch.diag(turns_TCC[1].diagonal())
    pairs = [(int(a), int(b)) for a, b in off_CC.nonzero().tolist() if a < b and off_CC[b, a] != 0]
    members = [m for pair in pairs for m in pair]
    if len(set(members)) != len(members):
        return None
    angles = [_angle(turns_TCC[:, a, a], turns_TCC[:, b, a]) for a, b in pairs]
    expected_TCC = torch.eye(width, dtype=torch.float64).repeat(len(turns_TCC), 1, 1)
    step_T = torch.arange(len(turns_TCC), dtype=torch.float64)
    for (a, b), angle in zip(pairs, angles, strict=True):
        cos_T, sin_T = (step_T * angle).cos(), (step_T * angle).sin()
        expected_TCC[:, a, a] = expected_TCC[:, b, b] = cos_T
        expected_TCC[:, b, a], expected_TCC[:, a, b] = sin_T, -sin_T
    if (expected_TCC - turns_TCC).abs().max() > _EXACT:
        return None
    if not pairs:
        return None, scale
    first, second = zip(*pairs, strict=True)
    return Rotation(first, second, tuple(angles)), scale


def _angle(cos_T: torch.Tensor, sin_T: torch.Tensor) -> float:
    """The angle of one step, from the farthest one that it can be followed to."""
    angle = float(torch.atan2(sin_T[1], cos_T[1]))
    for t in range(2, len(cos_T)):
        # step t is near t times what is known by now, but for rounding and whole turns
        near = angle * t
        found = float(torch.atan2(sin_T[t], cos_T[t]))
        found += round((near - found) / (2 * torch.pi)) * 2 * torch.pi
        angle = found / t
    return angle


def _maps(values: dict[fx.Node, Any], run: Sequence[fx.Node], source: fx.Node, wanted: Operand) -> torch.Tensor | None:
    """(T, C, C), the map of a head's features at each step, in double; None unless it is linear, and the same for all
    heads and examples.
    """
    template, shape = values[source], wanted.of(values[wanted.node]).shape
    width = template.shape[-1]
    if template.ndim != 4 or shape[3] != width:
        return None

    def run_on(x: torch.Tensor) -> torch.Tensor:
        return wanted.of(evaluate(run, values, {source: x}, wanted.node))

    columns = []
    for feature in range(width):
        basis = torch.zeros_like(template)
        basis[..., feature] = 1
        out_BHTC = run_on(basis)
        if out_BHTC.shape != shape or not torch.equal(out_BHTC, out_BHTC[:1, :1].expand_as(out_BHTC)):
            return None
        columns.append(out_BHTC[0, 0])
    maps_TCC = torch.stack(columns, -1)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(template.shape, generator=generator).to(template)
    got_BHTC = run_on(x)
    x_BHTC = _as(x, shape)
    if x_BHTC is None:
        return None
    want_BHTC = torch.einsum("tic,bhtc->bhti", maps_TCC, x_BHTC)
    if (got_BHTC - want_BHTC).abs().max() > _EXACT * want_BHTC.abs().max():
        return None
    return maps_TCC.double()


def _as(x: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """(B, T, G, C) or (B, G, T, C) as (B, H, T, C), each of G heads repeated for those that share it."""
    time = [d for d in (1, 2) if x.shape[d] == shape[2]]
    if len(time) != 1:
        return None
    x_BGTC = x.movedim(time[0], 2)
    groups, heads = x_BGTC.shape[1], shape[1]
    return x_BGTC.repeat_interleave(heads // groups, 1) if heads % groups == 0 else None


def as_written(rotation: Rotation, constants: Iterable[torch.Tensor]) -> Rotation:
    """With the angles that stand in one of the guide's own tables of frequencies, to the last digit; those that were
    measured over a few steps are right to 1e-6.
    """
    order = sorted(range(len(rotation.angle)), key=lambda p: -abs(rotation.angle[p]))
    measured = torch.tensor([abs(rotation.angle[p]) for p in order], dtype=torch.float64)
    for constant in constants:
        if constant.numel() != len(order) or not constant.is_floating_point():
            continue
        written = constant.detach().double().flatten().sort(descending=True).values.cpu()
        if torch.allclose(written, measured, rtol=1e-3, atol=1e-6):
            angles = dict(zip(order, written.tolist(), strict=True))
            signed = tuple(math.copysign(angles[p], rotation.angle[p]) for p in range(len(order)))
            return rotation._replace(angle=signed)
    return rotation
