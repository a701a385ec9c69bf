"""Data that a hurried or a malicious caller gives: batches of vectors, and of ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

import thesean
from benchmarks.hostility.guides import (
    POSITIONS,
    WIDTH,
    WORDS,
    Words,
    compiled,
    ids,
    refused,
    said,
    seeded,
    vectors,
)
from benchmarks.hostility.trial import Call, Inputs, only_typed


def worded(**arguments: Any) -> Call:
    """As `said`, of a guide that takes ids."""
    return lambda folder: compiled(seeded(Words), **{"data": ids(), **arguments})


class Endless:
    """Batches without an end."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for k in itertools.count():
            yield torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(k))


class Once:
    """Says that it can be iterated, and can be so once."""

    def __init__(self) -> None:
        self.left = iter(vectors())

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.left


class Failing:
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from vectors(2)
        raise OSError("the disk with the data is gone")


def changed(value: torch.Tensor, number: float) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] = number
    return value


def inferred() -> list[torch.Tensor]:
    with torch.inference_mode():
        return [x.clone() for x in vectors()]


DATA: Inputs = {
    "data is a string": refused(data="batches"),
    "data is a number": refused(data=7),
    "data is a tensor": refused(data=torch.zeros(4, 6, WIDTH)),
    "data is empty": refused(data=[]),
    "data is a generator": refused(data=(x for x in vectors())),
    "data is a dict": refused(data={"x": torch.zeros(4, 6, WIDTH)}),
    "data can be read once": said(data=Once()),
    "data is endless": said(data=Endless()),
    "data is endless, with eval_data": said(data=Endless(), eval_data=vectors(2)),
    "data fails after two batches": said(data=Failing()),
    "data holds None": refused(data=[None]),
    "data holds strings": refused(data=["a", "b"]),
    "data holds lists of numbers": refused(data=[[1.0, 2.0]]),
    "data holds arrays": lambda folder: compiled(data=[x.numpy() for x in vectors()]),
    "data holds None among batches": refused(data=[*vectors(8), None]),
    "data holds an empty tuple": refused(data=[()]),
    "data holds an empty dict": refused(data=[{}]),
    "data holds an empty batch": refused(data=[torch.zeros(0, 6, WIDTH)]),
    "data holds an empty batch later": said(data=[*vectors(8), torch.zeros(0, 6, WIDTH)]),
    "data holds an empty batch in the middle": said(data=[*vectors(3), torch.zeros(0, 6, WIDTH), *vectors(6)]),
    "data holds batches of no steps": refused(data=[torch.zeros(4, 0, WIDTH)]),
    "data holds a batch of no steps later": said(data=[*vectors(3), torch.zeros(4, 0, WIDTH), *vectors(6)]),
    "data holds one row": said(data=[torch.randn(1, 6, WIDTH)]),
    "data holds one step": said(data=[torch.randn(4, 1, WIDTH)]),
    "data holds one number": refused(data=[torch.zeros(())]),
    "data holds another width": refused(data=[torch.zeros(4, 6, WIDTH + 1)]),
    "data holds another width later": refused(data=[*vectors(8), torch.zeros(4, 6, WIDTH + 1)]),
    "data holds another rank later": refused(data=[*vectors(8), torch.zeros(6, WIDTH)]),
    "data holds doubles": refused(data=[x.double() for x in vectors()]),
    "data holds doubles later": refused(data=[*vectors(8), vectors(1)[0].double()]),
    "data holds halves": refused(data=[x.half() for x in vectors()]),
    "data holds integers": refused(data=[x.long() for x in vectors()]),
    "data holds complex numbers": refused(data=[x.to(torch.complex64) for x in vectors()]),
    "data holds booleans": refused(data=[x > 0 for x in vectors()]),
    "data holds sparse tensors": said(data=[x.to_sparse() for x in vectors()]),
    "data holds tensors of the meta device": refused(data=[x.to("meta") for x in vectors()]),
    "data holds tensors with gradients": said(data=[x.requires_grad_() for x in vectors()]),
    "data holds NaN": refused(data=[x * float("nan") for x in vectors()]),
    "data holds NaN later": said(data=[*vectors(3), changed(vectors(1)[0], float("nan")), *vectors(6)]),
    "data holds infinity later": said(data=[*vectors(3), changed(vectors(1)[0], float("inf")), *vectors(6)]),
    "data holds NaN among what is held out": said(data=[*vectors(8), changed(vectors(1)[0], float("nan"))]),
    "data holds huge numbers": said(data=[x * 1e30 for x in vectors()]),
    "data holds zeros": said(data=[torch.zeros(4, 6, WIDTH)] * 9),
    "data holds the same row": said(data=[torch.ones(4, 6, WIDTH)] * 9),
    "data holds expanded views": said(data=[torch.randn(1, 1, WIDTH).expand(4, 6, WIDTH)] * 9),
    "data was made in inference mode": lambda folder: compiled(data=inferred()),
    "data changes its length": said(data=[torch.randn(4, 2 + k, WIDTH) for k in range(9)]),
    "eval_data is a string": refused(eval_data="batches"),
    "eval_data is empty": refused(eval_data=[]),
    "eval_data is endless": said(eval_data=Endless()),
    "eval_data is a generator": refused(eval_data=(x for x in vectors())),
    "eval_data has another width": refused(eval_data=[torch.zeros(4, 6, WIDTH + 1)]),
    "eval_data holds an empty batch": said(eval_data=[torch.zeros(0, 6, WIDTH)]),
    "eval_data holds NaN": said(eval_data=[x * float("nan") for x in vectors(2)]),
    "eval_data is a number": refused(eval_data=5),
    "example_inputs is a string": refused(example_inputs="x"),
    "example_inputs is empty": refused(example_inputs=()),
    "example_inputs is too many": refused(example_inputs=(vectors(1)[0], vectors(1)[0])),
    "example_inputs has another name": refused(example_inputs={"y": vectors(1)[0]}),
    "example_inputs is None in a tuple": refused(example_inputs=(None,)),
}

IDS: Inputs = {
    "an id past the table": only_typed(worded(data=[changed(x, WORDS) for x in ids()])),
    "an id past the table in a later batch": only_typed(worded(data=[*ids(3), changed(ids(1)[0], WORDS), *ids(6)])),
    "an id past the table in the last batch": only_typed(worded(data=[*ids(8), changed(ids(1)[0], WORDS + 5)])),
    "a negative id": only_typed(worded(data=[changed(x, -1) for x in ids()])),
    "a negative id in a later batch": only_typed(worded(data=[*ids(3), changed(ids(1)[0], -100), *ids(6)])),
    "an id past the table in eval_data": only_typed(worded(eval_data=[changed(ids(1)[0], WORDS)])),
    "the greatest id that there is": only_typed(worded(data=[*ids(8), changed(ids(1)[0], 2**63 - 1)])),
    "ids of 32 bits": worded(data=[x.int() for x in ids()]),
    "ids of 8 bits": worded(data=[x.to(torch.uint8) for x in ids()]),
    "ids that are floats": only_typed(worded(data=[x.float() for x in ids()])),
    "a sequence past the table of positions": only_typed(worded(data=ids(time=POSITIONS + 1))),
    "a sequence past the table in a later batch": only_typed(worded(data=[*ids(8), *ids(1, time=POSITIONS + 1)])),
    "a sequence past the table in the middle": only_typed(worded(data=[*ids(3), *ids(1, time=POSITIONS + 1), *ids(6)])),
    "a sequence past the table in eval_data": only_typed(worded(eval_data=ids(2, time=POSITIONS + 1))),
    "labels past the classes": worded(data=[(x, changed(x, WORDS)) for x in ids()], loss=thesean.cross_entropy),
    "labels that are negative": worded(data=[(x, changed(x, -7)) for x in ids()], loss=thesean.cross_entropy),
    "labels of another shape": worded(data=[(x, x[:, :2]) for x in ids()], loss=thesean.cross_entropy),
    "labels that are strings": worded(data=[(x, "yes") for x in ids()], loss=thesean.cross_entropy),
    "labels that are missing": worded(loss=thesean.cross_entropy),
}
