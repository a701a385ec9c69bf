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
from thesean.targets.shared.rotation import Rotate, Rotation

# Of a head's largest entry: fp32 tables differ from their formula by 1e-6, another map by its whole scale.
_EXACT = 1e-4

# Of a head's largest entry: how far a feature moves that is turned, over the steps that were recorded. Rows that are
# alike differ by 1e-7.
_MOVED = 3e-6


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


@torch.no_grad()
def find_turned(
    values: dict[fx.Node, Any], run: Sequence[fx.Node], source: fx.Node, wanted: Operand
) -> Rotation | None:
    """How `wanted` is turned, which is a token-wise affine map of the source, (B, T, width), but for that; of no pairs
    where it isn't turned, None for anything else. What was turned may be no value of the graph, as where a part of each
    head is, and joined to the rest then.
    """
    template, width = values[source], wanted.of(values[wanted.node]).shape[3]
    generator = torch.Generator().manual_seed(7)
    rows_NI = torch.randn(2 * width + 8, template.shape[-1], generator=generator).to(template)
    nothing, *found = (
        wanted.of(evaluate(run, values, {source: _at_all_steps(rows, template)}, wanted.node)).double()[: len(rows)]
        for rows in (torch.zeros_like(rows_NI[:1]), *rows_NI.split(len(template)))
    )
    heads_STC = (torch.cat(found) - nothing).flatten(0, 1)  # a sample is a head of a row
    first_SC = heads_STC[:, 0]
    largest = first_SC.abs().max()
    moved_C = (heads_STC - first_SC.unsqueeze(1)).abs().amax((0, 1)) > _MOVED * largest
    pairs = _pairs(heads_STC, moved_C)
    if pairs is None:
        return None
    rotation, expected_STC = Rotation((), (), ()), first_SC.unsqueeze(1).expand_as(heads_STC).clone()
    for a, b in pairs:
        size = (first_SC[:, a].square() + first_SC[:, b].square()).sum()
        at_a, at_b = heads_STC[..., a], heads_STC[..., b]
        cos_T = (at_a.mT @ first_SC[:, a] + at_b.mT @ first_SC[:, b]) / size
        sin_T = (at_b.mT @ first_SC[:, a] - at_a.mT @ first_SC[:, b]) / size
        angle = _angle(cos_T, sin_T)
        rotation = Rotation((*rotation.first, a), (*rotation.second, b), (*rotation.angle, angle))
        angle_T = torch.arange(len(cos_T), dtype=torch.float64, device=cos_T.device) * angle
        cos_T, sin_T = angle_T.cos(), angle_T.sin()
        expected_STC[..., a] = cos_T * first_SC[:, a, None] - sin_T * first_SC[:, b, None]
        expected_STC[..., b] = sin_T * first_SC[:, a, None] + cos_T * first_SC[:, b, None]
    return rotation if (expected_STC - heads_STC).abs().max() <= _EXACT * largest else None


def _at_all_steps(rows_NI: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    filled = torch.nn.functional.pad(rows_NI, (0, 0, 0, len(template) - len(rows_NI)))
    return filled.unsqueeze(1).expand_as(template).contiguous()


def _pairs(heads_STC: torch.Tensor, moved_C: torch.Tensor) -> list[tuple[int, int]] | None:
    """Of the features that move, those that are turned into each other; None where they don't pair up."""
    moved = [int(c) for c in moved_C.nonzero().flatten()]
    if not moved:
        return []
    known_SM = heads_STC[:, 0, moved]
    maps_TMM = torch.linalg.pinv(known_SM) @ heads_STC[..., moved].transpose(0, 1)
    into_MM = maps_TMM.abs().amax(0).fill_diagonal_(0)
    partner = into_MM.argmax(0).tolist()
    if any(partner[partner[at]] != at for at in range(len(moved))):
        return None
    return [(moved[at], moved[other]) for at, other in enumerate(partner) if at < other]


def turned_back(rotation: Rotation, x_BHTC: torch.Tensor) -> torch.Tensor:
    """x_BTHC as it was before."""
    x_BTHC = x_BHTC.transpose(1, 2)
    if not rotation.angle:
        return x_BTHC
    back = rotation._replace(angle=tuple(-angle for angle in rotation.angle))
    turned: torch.Tensor = Rotate(back, x_BTHC.shape[-1]).to(x_BTHC.device)(x_BTHC)
    return turned


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
