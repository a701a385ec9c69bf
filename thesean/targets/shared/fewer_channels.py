"""How many channels stay, and which parts can lose any: narrow and narrow-channels alike."""

from __future__ import annotations

from pydantic import Field

from thesean.targets.shared.channel_groups import Channels
from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Options
from thesean.targets.shared.sequence import describe

# Channels come in as many as onnxruntime's convolutions take together.
MULTIPLE = 8


class NarrowChannelsOptions(Options):
    """Width rule: of each group of channels inside the part `width`, or `ratio` times as many as the guide's, in
    multiples of 8 where there are 16 or more, and by whole groups of a convolution in groups.

    A group is inside where neither the part's input nor its output has it: the middle of a residual block, what an
    inverted bottleneck expands to. Plain convolutions in a row, with no channels of their own, are one part together,
    and what lies between any two of them is narrowed: FLOPs fall with the square of `ratio`.
    """

    ratio: float = Field(default=0.5, gt=0, le=1)
    width: int | None = Field(default=None, gt=0)


def check_channels(target: str, part: PartFacts, options: NarrowChannelsOptions) -> None:
    facts = part.channels
    if facts is None or not facts.inner:
        shapes = f"{describe(part.input_shape)} -> {describe(part.output_shape)}"
        why = part.channels_unread if facts is None else "no channels that are neither the input's nor the output's"
        raise part.mismatch(
            target,
            found=f"{shapes}: {why}",
            expected="convolutions with channels between them",
            advice=f"Choose target 'bottleneck' or 'resnet-block' with width=, or keep it with {part.keep}.",
        )
    most = max(channels.count for channels in facts.inner)
    if options.width is not None and options.width > most:
        raise part.mismatch(
            target,
            found=f"width {options.width}",
            expected=f"at most the {most} channels that there are",
            advice="Lower width, or set ratio.",
        )


def fewer(channels: Channels, options: NarrowChannelsOptions) -> int:
    """How many of a group stay."""
    count, block = channels.count, channels.block
    if options.width is not None:
        return max(block, min(count, options.width) // block * block)
    multiple = block if block > 1 or count < 2 * MULTIPLE else MULTIPLE
    return min(count, max(multiple, round(options.ratio * count / multiple) * multiple))
