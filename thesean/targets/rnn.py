"""The default recurrent cell: a rule that picks a family for each part, not a module of its own.

Linear attention where the part has an attention whose projections can be copied, for they carry most of what the
guide learnt; a gated linear recurrence everywhere else, which trains in parallel and inherits no positions. Where a
whole block of an attention and an MLP is to be replaced (granularity="block", or scope="part"), parallel-block. The
saved configuration names the family that was picked.

Measured on the demo's language model (guide 1.448 nats per character; attention replaced, everything else kept; 300
steps of 4 x 256 with the default recipe, seed 0; benchmarks/results/recipes.json):

    cell                after 300 steps   closed form only
    linear-attention    1.469             1.770
    lstm                1.518             2.662
    elman               1.527             2.085
    gru                 1.529             2.407
    mingru              1.539             2.492
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options, Place, parse_options
from thesean.targets.shared.heads import LinearAttentionOptions
from thesean.targets.shared.heads import decide as decide_window
from thesean.targets.shared.module import TargetModule
from thesean.targets.shared.registry import get_family
from thesean.targets.shared.sequence import SequenceOptions, check_sequence


class RnnOptions(SequenceOptions):
    """Width rule: the picked family's own; `width` overrides it, and then nothing of another width can be copied.

    Defaults: window and sinks as the part's own attention asks for, measured on the example; in whole blocks those of
    `parallel-block`.
    """

    width: int | None = Field(default=None, gt=0)
    window: int | None = Field(
        default=None, ge=0, description="last tokens that keep a copied attention's softmax; 0: none"
    )
    sinks: int | None = Field(default=None, ge=0, description="first tokens that keep it too, beside a window")
    taps: int | None = Field(
        default=None, ge=0, description="values of so many last tokens beside an attention's heads; 4 in whole blocks"
    )


def picked(part: PartFacts, options: RnnOptions) -> tuple[Family, Options]:
    name = (
        "parallel-block" if part.block is not None else "linear-attention" if part.attention is not None else "mingru"
    )
    family = get_family(name)
    given = options.model_dump(exclude_none=True)
    return family, parse_options(family, {k: v for k, v in given.items() if k in family.options.model_fields})


def decide(places: Sequence[Place], options: RnnOptions) -> dict[str, Any]:
    """The window of those places that have an attention to copy."""
    attentions = [place for place in places if place.facts.attention is not None]
    if not attentions:
        return {}
    _, family_options = picked(attentions[0].facts, options)
    return decide_window(attentions, cast(LinearAttentionOptions, family_options))


def check(part: PartFacts, options: RnnOptions) -> None:
    check_sequence("rnn", part)
    if options.taps is not None and part.attention is None and part.block is None:
        raise part.mismatch(
            "rnn",
            found=f"taps={options.taps} for a part without an attention",
            expected="an attention, of whose values taps are made",
            advice="Leave taps out, or choose target 'linear-attention' or 'conv' for it.",
        )
    family, family_options = picked(part, options)
    family.check(part, family_options)


def build(part: PartFacts, options: RnnOptions) -> TargetModule:
    family, family_options = picked(part, options)
    return family.build(part, family_options)


TARGET = Family(
    name="rnn",
    summary="the default recurrent cell: linear-attention where there are projections to copy, parallel-block for "
    "whole blocks, mingru elsewhere",
    options=RnnOptions,
    module=TargetModule,  # nothing is ever saved under this name
    build=build,
    scope="mixing",
    decide=decide,
    block=True,
    check=check,
)
