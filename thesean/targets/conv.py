"""Convolutions: a rule that picks conv-1d for sequences and conv-2d for feature maps, not a module of its own.

The saved configuration names the family that was picked.
"""

from __future__ import annotations

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Family, Options, parse_options
from thesean.targets.shared.module import TargetModule
from thesean.targets.shared.registry import get_family
from thesean.targets.shared.sequence import describe


class ConvOptions(Options):
    """Width rule, defaults: the picked family's own. `width`, `dilations`, `causal`, `lookahead` and `norm` are for
    sequences alone: a feature map is normalised after its depthwise convolution.
    """

    kernel: int | None = Field(default=None, ge=2)
    dilations: tuple[int, ...] | None = None
    width: int | None = Field(default=None, gt=0)
    expand: int | None = Field(default=None, gt=0)
    residual: bool | None = None
    norm: bool | None = None
    causal: bool | None = Field(default=None, description="of sequences: read no later step")
    lookahead: int | None = Field(
        default=None, ge=0, description="of sequences: read so many later steps; a stream comes as late"
    )


def picked(part: PartFacts, options: ConvOptions) -> tuple[Family, Options]:
    family = get_family("conv-1d" if part.is_sequence else "conv-2d")
    given = options.model_dump(exclude_none=True, exclude=None if part.is_sequence else {"norm"})
    return family, parse_options(family, given)


def check(part: PartFacts, options: ConvOptions) -> None:
    if not part.is_sequence and not len(part.input_shape) == len(part.output_shape) == 4:
        raise part.mismatch(
            "conv",
            found=f"{describe(part.input_shape)} -> {describe(part.output_shape)}",
            expected="a sequence (batch, time, width) or a feature map (batch, channels, height, width)",
            advice=f"Choose target 'mlp' for it, or keep it with {part.keep}.",
        )
    family, family_options = picked(part, options)
    family.check(part, family_options)


def build(part: PartFacts, options: ConvOptions) -> TargetModule:
    family, family_options = picked(part, options)
    return family.build(part, family_options)


TARGET = Family(
    name="conv",
    summary="the default convolution: conv-1d for sequences, conv-2d for feature maps",
    options=ConvOptions,
    module=TargetModule,  # nothing is ever saved under this name
    build=build,
    scope="mixing",
    check=check,
)
