"""Linear CKA: blind to rotation and scale, the measure that parts are aligned by."""

from __future__ import annotations

from thesean.kernels.cka import cka, cka_distance, prepare
from thesean.similarity.shared.measure import Measure

MEASURE = Measure(
    name="cka",
    summary="linear CKA (Kornblith et al. 2019), biased; reads high where examples are fewer than features",
    value=cka,
    loss=cka_distance,
    prepare=prepare,
    min_examples=4,
    must_vary=("x", "y"),
    blind_to=frozenset({"rotation", "scale", "shift"}),
    takes_half=True,
)
