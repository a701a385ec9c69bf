"""The default recurrent cell: a rule that picks a family for each part, not a module of its own.

Linear attention where the part has an attention whose projections can be copied, for they carry most of what the
guide learnt; a gated linear recurrence everywhere else, which trains in parallel and inherits no positions. The
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

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options, parse_options
from thesean.targets.shared.module import TargetModule
from thesean.targets.shared.registry import get_family
from thesean.targets.shared.sequence import SequenceOptions, check_sequence


class RnnOptions(SequenceOptions):
    """Width rule: the picked family's own; `width` overrides it, and then nothing of another width can be copied."""

    width: int | None = Field(default=None, gt=0)


def picked(part: PartFacts, options: RnnOptions) -> tuple[Family, Options]:
    family = get_family("mingru" if part.attention is None else "linear-attention")
    return family, parse_options(family, options.model_dump())


def check(part: PartFacts, options: RnnOptions) -> None:
    check_sequence("rnn", part)
    family, family_options = picked(part, options)
    family.check(part, family_options)


def build(part: PartFacts, options: RnnOptions) -> TargetModule:
    family, family_options = picked(part, options)
    return family.build(part, family_options)


TARGET = Family(
    name="rnn",
    summary="the default recurrent cell: linear-attention where there are projections to copy, mingru elsewhere",
    options=RnnOptions,
    module=TargetModule,  # nothing is ever saved under this name
    build=build,
    scope="mixing",
    check=check,
)
