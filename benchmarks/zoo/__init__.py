"""Small guides of many architectures with random weights, for the matrix. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.zoo.hand_written import hand_written
from benchmarks.zoo.hugging_face import from_config, hugging_face
from benchmarks.zoo.specimen import LENGTH, Inputs, Specimen, ids, masked, seq2seq, tokens

__all__ = ["LENGTH", "Inputs", "Specimen", "from_config", "ids", "masked", "seq2seq", "specimens", "tokens"]


def specimens() -> Iterator[Specimen]:
    yield from hugging_face()
    yield from hand_written()
