"""Debiased linear CKA: 0 on average between unrelated features, at any number of examples. The one to report."""

from __future__ import annotations

from functools import partial

from thesean.kernels.cka import cka, cka_distance, prepare
from thesean.similarity.shared.measure import Measure

MEASURE = Measure(
    name="cka-debiased",
    summary="linear CKA with the debiased HSIC of Song et al. 2012; can fall below 0",
    value=partial(cka, debiased=True),
    loss=partial(cka_distance, debiased=True),
    prepare=prepare,
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
    takes_half=True,
)
