"""The default recurrent cell: a rule that picks a family for each part, not a module of its own.

Where the part has a causal attention that looks back at a few tokens, near or far, bounded-attention over as many as
leave little of its output out; linear attention where it looks at all of them alike, or can't be held so (a bias of
distance, a look-ahead, both ways). Both copy the projections, which carry most of what the guide learnt. Elsewhere a
gated linear recurrence, which trains in parallel and inherits no positions. Where a whole block of an attention and an
MLP is to be replaced (granularity="block", or scope="part"), parallel-block. The saved configuration names the family
that was picked.

Measured on the demo's language model (guide 1.448 nats per character; attention replaced, everything else kept; 300
steps of 4 x 256 with the default recipe, seed 0; benchmarks/results/recipes.json):

    cell                after 300 steps   closed form only
    linear-attention    1.476             1.777
    lstm                1.521             2.645
    elman               1.526             2.090
    gru                 1.526             2.407
    mingru              1.533             2.491
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options, Place, parse_options
from thesean.targets.shared.heads import LEFT_OUT, LinearAttentionOptions
from thesean.targets.shared.heads import decide as decide_window
from thesean.targets.shared.locality import held_errors
from thesean.targets.shared.module import TargetModule
from thesean.targets.shared.registry import get_family
from thesean.targets.shared.sequence import SequenceOptions, check_sequence


class RnnOptions(SequenceOptions):
    """Width rule: the picked family's own; `width` overrides it, and then nothing of another width can be copied.

    Defaults: window and kept, or window and sinks, as the part's own attention asks for, measured on the example; in
    whole blocks those of `parallel-block`.
    """

    width: int | None = Field(default=None, gt=0)
    window: int | None = Field(
        default=None, ge=0, description="last tokens that keep a copied attention's softmax; 0: none"
    )
    sinks: int | None = Field(default=None, ge=0, description="first tokens that keep it too, beside a window")
    kept: int | None = Field(
        default=None, ge=0, description="older tokens that keep it too, those foretold to matter; 0: a linear state"
    )
    taps: int | None = Field(
        default=None, ge=0, description="values of so many last tokens beside an attention's heads; 4 in whole blocks"
    )


# Tokens that are held, half of them the last ones. As for a window: the fewest that leave at most LEFT_OUT of the
# output's variance out, and at most a quarter of the rows.
HELD = (16, 32, 64, 128, 256)


def picked(part: PartFacts, options: RnnOptions) -> tuple[Family, Options]:
    attention = "bounded-attention" if options.kept else "linear-attention"
    name = "parallel-block" if part.block is not None else attention if part.attention is not None else "mingru"
    family = get_family(name)
    given = options.model_dump(exclude_none=True)
    return family, parse_options(family, {k: v for k, v in given.items() if k in family.options.model_fields})


def decide(places: Sequence[Place], options: RnnOptions) -> dict[str, Any]:
    """What is held of those places that have an attention to copy, one choice for all of them."""
    attentions = [place for place in places if place.facts.attention is not None]
    if not attentions:
        return {}
    if not (asked := options.model_dump(exclude_none=True).keys() & {"window", "sinks", "kept", "taps", "width"}):
        most = 0
        for held in (_held(place, options) for place in attentions):
            if held is None:  # one choice for all: the others needn't be measured
                break
            most = max(most, held)
        else:
            return {"window": most // 2, "kept": most // 2}
    if "kept" in asked and options.kept:
        return {}
    _, family_options = picked(attentions[0].facts, options)
    return decide_window(attentions, cast(LinearAttentionOptions, family_options))


def _held(place: Place, options: RnnOptions) -> int | None:
    """Tokens that bounded-attention is to hold; None where it can't, nothing can be measured, or a mean is as near."""
    facts = place.facts.attention
    plain = facts is not None and facts.plain and facts.bias is None and place.facts.mixing == "causal"
    if facts is None or not plain or place.facts.block is not None or options.lookahead:
        return None
    x_BTD, mask_BT = place.look()
    length = x_BTD.shape[1] if mask_BT is None else int(mask_BT.sum(1).max())
    sizes = [size for size in HELD if size <= length // 4]
    errors = held_errors(facts, x_BTD, mask_BT, [(size // 2, size // 2) for size in sizes]) if sizes else {}
    if not errors:
        return None
    found = next((s for s in sizes if errors[s // 2, s // 2] <= LEFT_OUT), sizes[-1])
    return found if errors[found // 2, found // 2] < errors[0, 0] else None


def check(part: PartFacts, options: RnnOptions) -> None:
    check_sequence("rnn", part)
    if options.taps is not None and part.attention is None and part.block is None:
        raise part.mismatch(
            "rnn",
            found=f"taps={options.taps} for a part without an attention",
            expected="an attention, of whose values taps are made",
            advice="Leave taps out, or choose target 'linear-attention' or 'conv' for it.",
        )
    if options.kept and (part.attention is None or part.block is not None):
        where = "a whole block" if part.block is not None else "a part without an attention"
        raise part.mismatch(
            "rnn",
            found=f"kept={options.kept} for {where}",
            expected="an attention, whose tokens are kept",
            advice="Leave kept out.",
        )
    if options.kept and (options.sinks or options.taps or options.window == 0):
        raise part.mismatch(
            "rnn",
            found=f"kept={options.kept} with sinks, taps or window=0",
            expected="kept and a window alone: the first tokens are kept where they matter",
            advice="Leave sinks and taps out, or kept.",
        )
    family, family_options = picked(part, options)
    family.check(part, family_options)


def build(part: PartFacts, options: RnnOptions) -> TargetModule:
    family, family_options = picked(part, options)
    return family.build(part, family_options)


TARGET = Family(
    name="rnn",
    summary="the default recurrent cell: bounded-attention or linear-attention where there are projections to copy, "
    "parallel-block for whole blocks, mingru elsewhere",
    options=RnnOptions,
    module=TargetModule,  # nothing is ever saved under this name
    build=build,
    scope="mixing",
    decide=decide,
    block=True,
    check=check,
)
