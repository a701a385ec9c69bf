"""The examples on which a conversion is farthest from its guide, as people read them.

B batch, T time, V classes
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx

from thesean.distill.callbacks import telling
from thesean.distill.outputs import Outputs, named_outputs, read_outputs
from thesean.distill.seen import Seen, rows
from thesean.passes.graph.intermediates import intermediates
from thesean.report.answers import Decode
from thesean.report.page.findings import Lost

_SHOWN, _LOOKED_AT = 6, 256
_TOKENS, _NUMBERS = 60, 8  # of a text before the place, of other inputs
_SIDE = 64  # of an image; larger ones are thinned out

Inputs = Mapping[str, torch.Tensor]


class _Pair(NamedTuple):
    """One example: what went in, and what the guide and the converted network gave. `shown`: (1, T) booleans by the
    names of outputs that have hidden steps, True where one counts.
    """

    inputs: Inputs
    exact: Inputs
    own: Inputs
    shown: Inputs


def find_lost(
    guide: fx.GraphModule,
    converted: fx.GraphModule,
    batches: Sequence[Inputs],
    labels: Sequence[torch.Tensor],
    decode: Decode | None,
) -> tuple[list[Lost], str, int]:
    """The worst examples, the unit of their distances, and how many were looked at. `labels` are those of the first
    batch, by which classes are known as such. Raises DataError, NumericalError.
    """
    seen = Seen(guide)
    with_masks = intermediates(guide, seen.names, with_output=True)
    theirs, masks = [], []
    for inputs in batches:
        values = with_masks(**inputs)
        theirs.append(named_outputs(values["output"]))
        masks.append(seen.of_outputs(values))
    outputs = _kinds(theirs, labels)
    scale = {name: _variance([exact[name] for exact in theirs]) for name in theirs[0]}
    found: list[tuple[float, int, _Pair]] = []
    number = 0
    for inputs, exact, shown in zip(batches, theirs, masks, strict=True):
        own = named_outputs(converted(**inputs))
        for row in range(min(map(_rows, [*inputs.values(), *exact.values()]))):
            pair = _Pair(*(_row(values, row) for values in (inputs, exact, own, shown)))
            number += 1
            if any(not bool(mask.any()) for mask in pair.shown.values()):
                continue  # a row of padding alone
            distance = _distance(outputs, pair, scale)
            if math.isfinite(distance) and distance > 0:
                found.append((distance, number, pair))
        if number >= _LOOKED_AT:
            break
    found.sort(key=lambda item: -item[0])
    reading = None if decode is None else _checked(decode)
    lost = [_told(outputs, *item, reading) for item in found[:_SHOWN]]
    return lost, "nats" if outputs.in_nats else "of the variance", number


def _checked(decode: Decode) -> Decode:
    def checked(tokens: list[int]) -> str:
        with telling("decode(tokens)"):
            return str(decode(tokens))

    return checked


def _kinds(theirs: Sequence[Inputs], labels: Sequence[torch.Tensor]) -> Outputs:
    """From outputs of one shape that differ: two halves of the first batch, or batches of single rows."""
    first = theirs[0]
    half = min(map(_rows, first.values())) // 2
    if not half:
        return read_outputs([o for o in theirs if all(o[k].shape == v.shape for k, v in first.items())], labels)
    halves = [{k: v[at : at + half] if v.ndim else v for k, v in first.items()} for at in (0, half)]
    return read_outputs(halves, [label[:half] for label in labels if label.ndim])


def _variance(values: Sequence[torch.Tensor]) -> float:
    return max(float(torch.cat([v.flatten().float() for v in values]).var()), 1e-12)


def _distance(outputs: Outputs, pair: _Pair, scale: Mapping[str, float]) -> float:
    """As the report's, but that squares are divided by the variance over all examples: one may not vary at all."""
    terms = []
    for name, kind in outputs.kinds.items():
        if kind == "mse":
            squares = (pair.own[name].float() - pair.exact[name].float()).square()
            terms.append(float(rows(squares, pair.shown.get(name)).mean()) / scale[name])
        elif kind != "ignore":
            one = replace(outputs, kinds={name: kind})
            terms.append(float(one.distance(pair.own, pair.exact, masks=pair.shown)))
    return sum(terms) / max(len(terms), 1)


def _rows(value: torch.Tensor) -> int:
    return value.shape[0] if value.ndim else 1


def _row(values: Inputs, row: int) -> dict[str, torch.Tensor]:
    return {name: value[row : row + 1] if value.ndim else value for name, value in values.items()}


def _told(
    outputs: Outputs,
    distance: float,
    number: int,
    pair: _Pair,
    decode: Decode | None,
) -> Lost:
    name = next((n for n, kind in outputs.kinds.items() if kind == "softmax"), None)
    where, place = "", None
    hidden = None if name is None or name not in pair.shown else ~pair.shown[name]
    if name is None:
        first = next(n for n, kind in outputs.kinds.items() if kind != "ignore")
        answers = [_numbers(values[first]) for values in (pair.exact, pair.own)]
    else:
        log_p, log_q = (values[name][0].float().log_softmax(-1) for values in (pair.exact, pair.own))
        if log_p.ndim == 2:  # of each position: tell of the one where they are farthest apart
            apart_T = (log_p.exp() * (log_p - log_q)).nan_to_num().sum(-1)
            place = int((apart_T if hidden is None else apart_T.masked_fill(hidden[0], -torch.inf)).argmax())
            log_p, log_q = log_p[place], log_q[place]
            where = f", farthest apart after position {place + 1}"
        text = decode if log_p.ndim == 1 and place is not None else None
        answers = [_answer(v, text) for v in (log_p, log_q)]
    return Lost(
        number=number,
        distance=distance,
        shown=_shown(pair, place, decode),
        guide=answers[0],
        converted=answers[1],
        where=where,
    )


def _answer(log_p: torch.Tensor, decode: Decode | None) -> str:
    if log_p.ndim != 1:
        return _numbers(log_p.exp())
    best = int(log_p.argmax())
    told = repr(decode([best])) if decode is not None else f"class {best}"
    return f"{told} at {float(log_p[best].exp()):.0%}"


def _shown(pair: _Pair, place: int | None, decode: Decode | None) -> str | list[list[float]]:
    """Text where the inputs are tokens, padding left out, an image where they have the shape of one, else numbers."""
    for value in pair.inputs.values():
        if not value.is_floating_point() and value.ndim == 2 and decode is not None:
            end = value.shape[1] if place is None else min(place + 1, value.shape[1])
            mask_BT = next((m for m in pair.shown.values() if m.shape == value.shape), torch.ones_like(value))
            tokens = value[0, :end][mask_BT[0, :end].bool()].tolist()
            start = max(0, len(tokens) - _TOKENS)
            text = decode(tokens[start:])
            return ("... " if start else "") + (text[:-1] + "\u21b5" if text.endswith("\n") else text)
        if value.is_floating_point() and value.ndim == 4 and value.shape[1] in (1, 3) and min(value.shape[2:]) > 3:
            return _image(value[0])
    return "; ".join(f"{name}: {_numbers(value)}" for name, value in pair.inputs.items())


def _image(pixels: torch.Tensor) -> list[list[float]]:
    """Grey levels, darkest 0 and lightest 1."""
    grey = pixels.float().mean(0).nan_to_num()
    step = -(-max(grey.shape) // _SIDE)
    grey = grey[::step, ::step]
    low, high = grey.min(), grey.max()
    levels: list[list[float]] = ((grey - low) / (high - low).clamp(min=1e-12)).tolist()
    return levels


def _numbers(value: torch.Tensor) -> str:
    flat = value.flatten()
    told = ", ".join(f"{v:.4g}" for v in flat[:_NUMBERS].tolist())
    return told + (f", ... ({flat.numel():,} in all)" if flat.numel() > _NUMBERS else "")
