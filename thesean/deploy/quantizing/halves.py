"""What an encoder's and a decoder's file are calibrated and judged on: each on what it is given itself.

B batch, T steps of the target, S steps of the source
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from thesean.deploy.quantizing.samples import Inputs, Judge, Outputs, Samples
from thesean.passes.analyse.float_masks import hides_by_adding
from thesean.passes.base import run_passes
from thesean.passes.cast_floats import CastFloats, dtypes_for
from thesean.passes.freeze_on_cpu import FreezeOnCpu
from thesean.passes.graph.halves import Halves


def samples_of_halves(samples: Samples, encoder: fx.GraphModule, halves: Halves) -> tuple[Samples, Samples]:
    """The encoder's samples, and the decoder's: those of the target, beside what the encoder gives in torch, exactly.

    The encoder is judged by what crosses, masks left out: those hold no product of weights.
    """
    frozen, _ = run_passes(encoder, FreezeOnCpu(), CastFloats(dtypes_for(encoder, halves.encoder, None)))

    def of_source(inputs: Inputs) -> Inputs:
        return {spec.name: inputs[spec.name] for spec in halves.encoder.inputs}

    @torch.no_grad()
    def of_target(inputs: Inputs) -> Inputs:
        source = {n: v.cpu().float() if v.is_floating_point() else v.cpu() for n, v in of_source(inputs).items()}
        found = frozen(**source)
        target = {spec.name: inputs[spec.name] for spec in halves.decoder.inputs if not spec.held}
        return {**target, **{name: found[name] for name in halves.crossing}}

    def judged(observed: Sequence[Outputs]) -> Judge:
        masks = {n for outputs in observed for n, v in outputs.items() if n in halves.crossing and hides_by_adding(v)}
        judge = samples.judged([{n: v for n, v in outputs.items() if n not in masks} for outputs in observed])
        return replace(judge, classes=tuple(n for n in judge.classes if n not in halves.crossing))

    return replace(samples.each(of_source), judged=judged), samples.each(of_target)
