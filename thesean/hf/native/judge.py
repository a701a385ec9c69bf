"""Is a network of the guide's class the conversion? Weights are put in, and outputs compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from thesean.converted import Converted
from thesean.hf.native.assign import Assignment, place, slots_of
from thesean.hf.native.layers import Layers
from thesean.hf.native.pieces import Pieces
from thesean.passes.base import run_passes
from thesean.passes.cast_floats import CastFloats, cast_signature, dtypes_for
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.nodes import leaf_values

TOLERANCE = 1e-5  # of the output's scale, in float32


@dataclass
class Judge:
    """What a network of the guide's class has to give; `nearest` is how near one came."""

    inputs: Mapping[str, torch.Tensor]
    wanted: list[torch.Tensor]
    nearest: float = math.inf

    @classmethod
    def of(cls, converted: Converted) -> Judge:
        """The conversion's outputs, in float32."""
        dtypes = dtypes_for(converted.module, converted.signature, None)
        exact, _ = run_passes(converted.module, FreezeOnCpu(), CastFloats(dtypes))
        signature = cast_signature(converted.signature, dtypes)
        sizes = {s: 2 if s.startswith("batch") else 7 for s in signature.symbols}
        inputs = signature.random_inputs(signature.within(sizes), seed=1)
        with torch.no_grad():
            return cls(inputs, [v for v in leaf_values(exact(**inputs)) if v.is_floating_point()])

    @torch.no_grad()
    def fill(self, model: nn.Module, layers: Layers, pieces: Pieces, ways: Sequence[Assignment]) -> bool:
        """Put the weights in, each way that the shapes allow, until the outputs are the conversion's."""
        own = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        for name, weight in pieces.weights.items():
            own[layers.renamed(name)].copy_(weight)
        taken = {id(own[layers.renamed(name)]) for name in pieces.weights}
        filled = {name for name, p in own.items() if id(p) in taken}
        cached = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}
        for assigned in ways:
            for module in pieces.smaller:
                slots = slots_of(module, shapes, filled, layers)
                for name, value in place(module, assigned.ways[module.kind], slots).items():
                    own[name].copy_(value)
            output = model(**self.inputs, **cached)
            plain = dict(output) if isinstance(output, Mapping) else output
            found = [v for v in leaf_values(plain) if v.is_floating_point()]
            off = _apart(found, self.wanted)
            self.nearest = min(self.nearest, off)
            if off <= TOLERANCE:
                return True
        return False

    def told(self, cls: type) -> str:
        """Of weights that had a place; "" where none did."""
        if not math.isfinite(self.nearest):
            return ""
        return (
            f"{cls.__name__}: the weights have a place, but the outputs are {self.nearest:.1e} of their scale apart, "
            f"and at most {TOLERANCE:.0e} is allowed. A part computes otherwise than its shapes tell, or the guide was "
            "called with settings that its configuration doesn't hold."
        )


def _apart(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    if [v.shape for v in found] != [v.shape for v in wanted]:
        return float("inf")
    errors = [float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in zip(found, wanted, strict=True)]
    return max(errors, default=float("inf"))
