"""How many of an attention's heads stay, and which attentions can lose any: narrow and narrow-heads alike."""

from __future__ import annotations

from pydantic import Field

from thesean.targets.shared.facts import PartFacts
from thesean.targets.shared.family import Options
from thesean.targets.shared.sequence import check_sequence


class NarrowHeadsOptions(Options):
    """Heads: `heads`, or `ratio` times the guide's, at least one; their widths are the guide's."""

    ratio: float = Field(default=0.5, gt=0, le=1)
    heads: int | None = Field(default=None, gt=0)


def check_heads(target: str, part: PartFacts, options: NarrowHeadsOptions) -> None:
    """Raises TargetMismatchError unless the part is a plain attention with heads enough."""
    check_sequence(target, part)
    facts = part.attention
    keep = f"Keep it with {part.keep}"
    if facts is None:
        raise part.mismatch(
            target, found="a part without attention", expected="one attention to take heads from", advice=f"{keep}."
        )
    if not facts.plain:
        raise part.mismatch(
            target,
            found=f"an attention that softmax(q k' scale + bias) v alone does not reproduce: {facts.differs}",
            expected="one that is known whole: rotary positions, norms of each head and a bias of distance included",
            advice=f"{keep}, or choose target 'rnn' for it.",
        )
    if facts.norm_form == "whole":
        raise part.mismatch(
            target,
            found="queries and keys that are normed over all heads at once, so that no head can go",
            expected="norms of each head by itself",
            advice=f"{keep}, or choose target 'linear-attention' for it.",
        )
    if options.heads is not None and options.heads > facts.heads:
        raise part.mismatch(
            target,
            found=f"heads {options.heads}",
            expected=f"at most the {facts.heads} heads that there are",
            advice="Lower heads, or set ratio.",
        )
