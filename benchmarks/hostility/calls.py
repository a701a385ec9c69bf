"""What a converted network is called with, asked to export and to time.

B batch, T time, D width, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.hostility.guides import POSITIONS, WIDTH, WORDS, ids, vectors
from benchmarks.hostility.saved import converted, of_words
from benchmarks.hostility.trial import Call, Inputs, check, only_typed

X_BTD, IDS_BT = vectors(1)[0], ids(1)[0]


def called(*arguments: Any, **named: Any) -> Call:
    """The output must have a row for each of the input's."""

    def calling(folder: Any) -> None:
        output = converted()(*arguments, **named)
        given = next(v for v in (*arguments, *named.values()) if isinstance(v, torch.Tensor))
        check(output.shape == given.shape, f"an output of shape {tuple(output.shape)} for {tuple(given.shape)}")
        check(output.is_floating_point(), f"an output of {output.dtype}")

    return calling


def spoken(ids_BT: Any) -> Call:
    """The output must have logits for each id."""

    def calling(folder: Any) -> None:
        logits_BTV = of_words()(ids_BT)
        check(logits_BTV.shape == (*ids_BT.shape, WORDS), f"logits of shape {tuple(logits_BTV.shape)}")
        check(logits_BTV.isfinite().all(), "logits that are not finite")

    return calling


def refused(call: Call) -> Call:
    return only_typed(call)


def exported(**options: Any) -> Call:
    return lambda folder: converted().export("m.onnx", **options)


def timed(**options: Any) -> Call:
    return lambda folder: converted().benchmark(**options)


def changed(value: int) -> torch.Tensor:
    ids_BT = IDS_BT.clone()
    ids_BT[-1, -1] = value
    return ids_BT


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(X_BTD, 0.1, 0, torch.qint8)


INPUTS: Inputs = {
    "called with nothing": refused(lambda folder: converted()()),
    "called with too many": refused(called(X_BTD, X_BTD)),
    "called by another name": refused(called(y=X_BTD)),
    "called by position and name": refused(called(X_BTD, x=X_BTD)),
    "called with None": refused(lambda folder: converted()(None)),
    "called with a string": refused(lambda folder: converted()("x")),
    "called with a number": refused(lambda folder: converted()(1.0)),
    "called with a list": refused(lambda folder: converted()(X_BTD.tolist())),
    "called with an array": refused(lambda folder: converted()(X_BTD.numpy())),
    "called with a batch of none": called(X_BTD[:0]),
    "called with a sequence of none": called(X_BTD[:, :0]),
    "called with one row": called(X_BTD[:1]),
    "called with one step": called(X_BTD[:, :1]),
    "called with another width": refused(called(torch.zeros(4, 6, WIDTH + 1))),
    "called with another rank": refused(called(torch.zeros(4, WIDTH))),
    "called with a scalar": refused(called(torch.zeros(()))),
    "called with doubles": refused(called(X_BTD.double())),
    "called with halves": refused(called(X_BTD.half())),
    "called with integers": refused(called(X_BTD.long())),
    "called with complex numbers": refused(called(X_BTD.to(torch.complex64))),
    "called with booleans": refused(called(X_BTD > 0)),
    "called on the meta device": refused(called(X_BTD.to("meta"))),
    "called with a sparse tensor": refused(called(X_BTD.to_sparse())),
    "called with a quantised tensor": refused(lambda folder: converted()(quantised())),
    "called with NaN": called(X_BTD * float("nan")),
    "called with infinity": called(X_BTD * float("inf")),
    "called with a view": called(X_BTD.transpose(0, 1).contiguous().transpose(0, 1)),
    "called with an expanded view": called(X_BTD[:1, :1].expand(4, 6, WIDTH)),
    "called with what wants a gradient": called(X_BTD.clone().requires_grad_()),
    "called with 100,000 steps": called(torch.zeros(1, 100_000, WIDTH)),
    "called with an id past the table": refused(spoken(changed(WORDS))),
    "called with the greatest id": refused(spoken(changed(2**63 - 1))),
    "called with a negative id": refused(spoken(changed(-1))),
    "called with the least id": refused(spoken(changed(-(2**63)))),
    "called with ids of 32 bits": refused(spoken(IDS_BT.int())),
    "called with ids that are floats": refused(spoken(IDS_BT.float())),
    "called with no ids": spoken(IDS_BT[:0]),
    "called with ids of no steps": spoken(IDS_BT[:, :0]),
    "called past the table of positions": spoken(torch.zeros(1, POSITIONS + 5, dtype=torch.long)),
    "called far past the table of positions": spoken(torch.zeros(1, 100 * POSITIONS, dtype=torch.long)),
    "exported stateful by a word": refused(exported(stateful="maybe")),
    "exported at opset 3": refused(exported(opset=3)),
    "exported at opset 1000": refused(exported(opset=1000)),
    "exported at an opset that is a string": refused(exported(opset="20")),
    "exported at a tolerance below zero": refused(exported(tolerance=-1.0)),
    "exported at a tolerance of NaN": refused(exported(tolerance=float("nan"))),
    "exported at a tolerance that is a string": refused(exported(tolerance="low")),
    "exported in int8": refused(exported(dtype=torch.int8)),
    "exported in an unknown dtype": refused(exported(dtype="float8")),
    "timed at no context": refused(timed(contexts=())),
    "timed at a negative context": refused(timed(contexts=(-1,))),
    "timed at a context that is a string": refused(timed(contexts="64")),
    "timed at a batch of zero": refused(timed(batch=0)),
    "timed at a batch that is a string": refused(timed(batch="1")),
    "timed zero times": refused(timed(repeats=0)),
    "timed a negative number of times": refused(timed(repeats=-3)),
}
